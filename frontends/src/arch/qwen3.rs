//! Qwen 3: Llama with norms on each head's queries and keys.

use super::decoder::{Decoder, Defaults};
use super::{Arch, Builder};
use quantc_ir::diag::Diags;

pub(super) const ARCH: Arch =
    Arch { model_type: "qwen3", classes: &["Qwen3ForCausalLM"], doc: "Qwen 3 without experts", build };

fn build(cx: &mut Builder<'_>) -> Result<(), Diags> {
    let mut decoder = Decoder::read(cx, Defaults { kv_heads: Some(32), head_dim: Some(128) });
    let bias = cx.config.bool_or("attention_bias", false);
    decoder.qkv_bias = bias;
    decoder.o_bias = bias;
    decoder.qk_norm = true;
    decoder.read_layer_windows(cx);
    decoder.build(cx)
}
