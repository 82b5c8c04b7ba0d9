//! Compiling takes memory for a layer at a time, not for the model.

use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

const HIDDEN: u64 = 512;
const FFN: u64 = 2048;
const LAYERS: u64 = 12;
const VOCAB: u64 = 2000;

/// Writes a Llama of zeros: a sparse file, so that it takes no room on disk. Returns the bytes of all weights and of the
/// largest layer.
fn write_model(dir: &Path) -> std::io::Result<(u64, u64)> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": true, "torch_dtype": "float32", "rope_theta": 10000.0,
    });
    std::fs::write(dir.join("config.json"), config.to_string())?;
    let mut tensors: Vec<(String, Vec<u64>)> =
        vec![("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN])];
    for l in 0..LAYERS {
        let mut add = |name: &str, shape: &[u64]| {
            tensors.push((format!("model.layers.{l}.{name}.weight"), shape.to_vec()))
        };
        for name in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"] {
            add(name, &[HIDDEN, HIDDEN]);
        }
        add("mlp.gate_proj", &[FFN, HIDDEN]);
        add("mlp.up_proj", &[FFN, HIDDEN]);
        add("mlp.down_proj", &[HIDDEN, FFN]);
        add("input_layernorm", &[HIDDEN]);
        add("post_attention_layernorm", &[HIDDEN]);
    }
    tensors.push(("model.norm.weight".into(), vec![HIDDEN]));
    let mut header = serde_json::Map::new();
    let mut at = 0;
    for (name, shape) in &tensors {
        let end = at + 4 * shape.iter().product::<u64>();
        header.insert(name.clone(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [at, end] }));
        at = end;
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(dir.join("model.safetensors"))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    file.set_len(8 + header.len() as u64 + at)?;
    Ok((at, 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)))
}

fn compile(model: &Path, out: &Path, store: &Path) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_quantc"))
        .arg("compile")
        .arg(model)
        .args(["--target", "cpu-generic", "--preset", "w4a8-g128", "--agreement", "0", "--json", "--store"])
        .arg(store)
        .arg("-o")
        .arg(out)
        .output()
        .expect("quantc runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

#[test]
fn memory_is_for_a_layer_not_for_the_model() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model");
    std::fs::create_dir(&model).expect("a folder");
    let (all, layer) = write_model(&model).expect("the model is written");
    let peak = |name: &str, model: &Path| {
        let json = compile(model, &folder.path().join(name), &folder.path().join("store"));
        json["peak_rss_bytes"].as_u64().expect("the system tells the peak")
    };
    // What a compilation takes that reads next to nothing: the code generator above all.
    let base = peak("small", Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/models/tiny-llama3")));
    let large = peak("large", &model);
    let limit = base + 2 * layer + (24 << 20);
    println!("peak {large}, of a tiny model {base}, weights {all}, largest layer {layer}");
    assert!(large < limit, "peak {large} is not below {limit}");
    assert!(all > 3 * (limit - base), "the model is large enough to tell");
}
