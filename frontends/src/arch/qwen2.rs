//! Qwen 2 and 2.5: Llama with biases on queries, keys and values.

use super::decoder::{Decoder, Defaults};
use super::{Arch, Builder};
use quantc_ir::diag::Diags;

pub(super) const ARCH: Arch = Arch {
    model_type: "qwen2",
    classes: &["Qwen2ForCausalLM"],
    doc: "Qwen 2 and 2.5, with sliding windows in the layers that have one",
    build,
};

fn build(cx: &mut Builder<'_>) -> Result<(), Diags> {
    let mut decoder = Decoder::read(cx, Defaults { kv_heads: Some(32), head_dim: None });
    decoder.qkv_bias = true;
    decoder.read_layer_windows(cx);
    decoder.build(cx)
}
