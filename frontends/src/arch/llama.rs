//! Llama, and what is built like it.

use super::decoder::{Decoder, Defaults};
use super::{Arch, Builder};
use quantc_ir::diag::Diags;

pub(super) const ARCH: Arch = Arch {
    model_type: "llama",
    classes: &["LlamaForCausalLM"],
    doc: "Llama 1 to 3 and models saved as such: grouped keys, linear and llama3 rope scaling, optional biases",
    build,
};

fn build(cx: &mut Builder<'_>) -> Result<(), Diags> {
    let mut decoder = Decoder::read(cx, Defaults::default());
    let bias = cx.config.bool_or("attention_bias", false);
    decoder.qkv_bias = bias;
    decoder.o_bias = bias;
    decoder.mlp_bias = cx.config.bool_or("mlp_bias", false);
    decoder.build(cx)
}
