//! Mistral: Llama in which each token sees a window of positions.

use super::decoder::{Decoder, Defaults};
use super::{Arch, Builder};
use quantc_ir::diag::Diags;

pub(super) const ARCH: Arch = Arch {
    model_type: "mistral",
    classes: &["MistralForCausalLM"],
    doc: "Mistral 7B and its relatives, with or without a sliding window",
    build,
};

/// `sliding_window` of configurations that leave it out.
const WINDOW: u64 = 4096;

fn build(cx: &mut Builder<'_>) -> Result<(), Diags> {
    let mut decoder = Decoder::read(cx, Defaults { kv_heads: Some(8), head_dim: None });
    let absent = if cx.config.has("sliding_window") { 0 } else { WINDOW };
    let window = cx.config.int_or("sliding_window", 1..=1 << 26, absent);
    decoder.windows.fill(u32::try_from(window).unwrap_or(u32::MAX));
    decoder.build(cx)
}
