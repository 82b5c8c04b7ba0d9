//! The arithmetic of quantization, in one place for the evaluator and for passes.

use crate::formats::{Class, Format};
use crate::ty::Float;

/// The code of `x` under a scale and zero point: `saturate(round(x / scale) + zero)` for integers, ties to even.
pub fn quantize_one(x: f32, scale: f32, zero: i32, format: &Format) -> u32 {
    if !format.is_int() {
        return format.encode(x / scale);
    }
    format.encode((x / scale).round_ties_even() + zero as f32)
}

/// The scale of a symmetric group whose largest magnitude is `absmax`, rounded to `ty`; 1 when the group is all zero.
pub fn symmetric_scale(absmax: f32, format: &Format, ty: Float) -> f32 {
    let top = match (format.class, format.bits) {
        (Class::Int { signed: true }, bits @ 0..=3) => (1 << (bits - 1)) as f32 - 0.5,
        (Class::Int { signed: true }, bits) => ((1u32 << (bits - 1)) - 1) as f32,
        _ => format.max(),
    };
    let scale = absmax / top;
    let rounded = match ty {
        Float::F32 => scale,
        Float::F16 => half::f16::from_f32(scale).to_f32(),
        Float::Bf16 => half::bf16::from_f32(scale).to_f32(),
    };
    if rounded > 0.0 { rounded } else { 1.0 }
}
