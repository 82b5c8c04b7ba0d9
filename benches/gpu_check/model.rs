//! A checkpoint with the shapes of Llama 3 8B whose matrices are holes in a file: compiling it takes seconds of reading zeros and
//! no space, and gives the plan and the kernels of an engine of 8 billion weights.
//!
//! All layers hold the same, so that what is derived from one is there for all of them. Matrices of different roles differ in
//! their first number, so that nothing takes one for the other.

use quantc::ir::diag::{Diag, Result};
use serde_json::{Map, Value, json};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

const LAYERS: u64 = 32;
const WIDTH: u64 = 4096;
const INNER: u64 = 14336;
const KEYS: u64 = 1024;
const VOCAB: u64 = 128_256;

/// A tensor: name, extents, and its role; 0 for gains, which are all ones.
type Tensor = (String, Vec<u64>, u16);

fn tensors() -> Vec<Tensor> {
    let mut list = vec![("model.embed_tokens.weight".to_string(), vec![VOCAB, WIDTH], 1)];
    for layer in 0..LAYERS {
        let matrices = [
            ("self_attn.q_proj", WIDTH, WIDTH),
            ("self_attn.k_proj", KEYS, WIDTH),
            ("self_attn.v_proj", KEYS, WIDTH),
            ("self_attn.o_proj", WIDTH, WIDTH),
            ("mlp.gate_proj", INNER, WIDTH),
            ("mlp.up_proj", INNER, WIDTH),
            ("mlp.down_proj", WIDTH, INNER),
        ];
        let name = |of: &str| format!("model.layers.{layer}.{of}.weight");
        list.extend((2..).zip(matrices).map(|(role, (of, n, k))| (name(of), vec![n, k], role)));
        list.extend(["input_layernorm", "post_attention_layernorm"].map(|of| (name(of), vec![WIDTH], 0)));
    }
    list.push(("model.norm.weight".into(), vec![WIDTH], 0));
    list.push(("lm_head.weight".into(), vec![VOCAB, WIDTH], 9));
    list
}

/// Writes the model.
pub fn write(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| crate::system(folder, &e))?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": WIDTH,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": VOCAB, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "bos_token_id": 128_000, "eos_token_id": 128_001,
    });
    let at = folder.join("config.json");
    std::fs::write(&at, config.to_string()).map_err(|e| crate::system(&at, &e))?;
    let (mut header, mut end, mut places) = (Map::new(), 0, vec![]);
    for (name, shape, role) in tensors() {
        let bytes = 2 * shape.iter().product::<u64>();
        places.push((end, bytes, role));
        let described = json!({"dtype": "BF16", "shape": shape, "data_offsets": [end, end + bytes]});
        header.insert(name, described);
        end += bytes;
    }
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let at = folder.join("model.safetensors");
    let io = |e: std::io::Error| crate::system(&at, &e);
    let mut file = std::fs::File::create(&at).map_err(io)?;
    let first = 8 + header.len() as u64;
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    file.write_all(header.as_bytes()).map_err(io)?;
    file.set_len(first + end).map_err(io)?;
    for (offset, bytes, role) in places {
        let count = usize::try_from(bytes / 2).map_err(|_| Diag::bug("a tensor too large"))?;
        let numbers = match role {
            0 => half::bf16::ONE.to_le_bytes().repeat(count),
            // Small numbers near each other, one for each role.
            role => half::bf16::from_bits(0x3c00 + role).to_le_bytes().to_vec(),
        };
        file.seek(SeekFrom::Start(first + offset)).map_err(io)?;
        file.write_all(&numbers).map_err(io)?;
    }
    Ok(())
}
