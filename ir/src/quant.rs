//! The arithmetic of quantization, in one place: passes, the evaluator and tests all come here.
//!
//! One number: [`quantize_one`] and [`dequantize_one`]. One group of numbers: [`scale_for`] its [`Span`], or [`fit`],
//! which may look for a better scale. A tensor: [`Groups`] says which elements share a scale, [`Fit`] finds the scales
//! and [`quantize_block`] the codes, a block of rows at a time; [`quantize_view`] does all of it for a weight.
//!
//! The rules:
//! - Integers: `q = saturate(round(x / s) + z)`, halfway cases to even, the division in `f32`. Floats:
//!   `q = encode(x / s)`. Back: `y = (q - z) * s`, the difference in integers.
//! - Codes are computed with the scale *as stored*, that is rounded to the scheme's scale type.
//! - Symmetric integers of `b` bits, 4 or more: `s = absmax / (2^(b-1) - 1)`, so that both ends are met; `-2^(b-1)` is
//!   a code all the same. For 3 and 2 bits `s = absmax / 3.5` and `absmax / 1.5`, halfway between the ends, since the
//!   one code more on the negative side is a large part of them. Unsigned ones: `s = absmax / (2^b - 1)`.
//! - With zero points the range is widened to include 0; `s = (max - min) / (2^b - 1)` and `z` is the code nearest to
//!   `qmin - min / s`. So 0 is always exact.
//! - Floats: `s = absmax / largest finite number`.
//! - A group of zeros has the scale 1. No scale is 0, and none is subnormal except in `f16`, where the scale is then
//!   rounded up.
//! - Numbers that are not finite are refused.

mod fit;
mod groups;

pub use fit::{
    Emit, Fit, Params, Quantized, dequantize_block, fit, quantize_block, quantize_rows, quantize_view,
};
pub use groups::Groups;

use crate::diag::{Diag, Result};
use crate::formats::{Class, Format};
use crate::scheme::{Scheme, Zero};
use crate::ty::Float;
use half::{bf16, f16};

/// How a scale follows from the range of its group.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleRule {
    /// The quotient, rounded to the scale type.
    #[default]
    Real,
    /// The least power of two that is not below the quotient: nothing saturates.
    PowerOfTwo,
    /// The shared exponent of OCP MX: `2^(floor(log2 absmax) - floor(log2 max))`. Numbers above the largest finite one
    /// saturate.
    Mx,
}

/// Whether to look for a better scale than the one that covers the range.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Search {
    /// Take the range as it is.
    #[default]
    None,
    /// Try the range shrunk by the factors `1 - 0.8 i / steps` for `i` up to `steps`, and take the first of those
    /// with the least sum of squared errors.
    Mse {
        /// Number of factors below 1.
        steps: u32,
    },
}

/// How scales are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Options {
    /// From range to scale.
    pub rule: ScaleRule,
    /// Which range.
    pub search: Search,
}

/// The range of some numbers; it always includes 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Span {
    min: f32,
    max: f32,
}

impl Span {
    /// The range from `min` to `max`, widened to include 0.
    pub fn new(min: f32, max: f32) -> Span {
        Span { min: min.min(0.0), max: max.max(0.0) }
    }

    /// The range of numbers of magnitude up to `absmax`.
    pub fn symmetric(absmax: f32) -> Span {
        Span::new(-absmax, absmax)
    }

    /// The range of `xs`, or the index of the first that is not finite.
    pub fn of(xs: &[f32]) -> Result<Span, usize> {
        let mut lanes = [(0.0f32, 0.0f32, true); 8];
        let mut chunks = xs.chunks_exact(8);
        for chunk in &mut chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane = (lane.0.min(x), lane.1.max(x), lane.2 & (x.abs() <= f32::MAX));
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(chunks.remainder()) {
            *lane = (lane.0.min(x), lane.1.max(x), lane.2 & (x.abs() <= f32::MAX));
        }
        if lanes.iter().any(|lane| !lane.2) {
            return Err(xs.iter().position(|x| !x.is_finite()).unwrap_or(0));
        }
        Ok(lanes.iter().fold(Span::default(), |s, lane| s.union(Span { min: lane.0, max: lane.1 })))
    }

    /// The range of the numbers of both.
    pub fn union(self, other: Span) -> Span {
        Span { min: self.min.min(other.min), max: self.max.max(other.max) }
    }

    /// The lower end, at most 0.
    pub fn min(self) -> f32 {
        self.min
    }

    /// The upper end, at least 0.
    pub fn max(self) -> f32 {
        self.max
    }

    /// The largest magnitude.
    pub fn absmax(self) -> f32 {
        self.max.max(-self.min)
    }

    fn shrunk(self, factor: f32) -> Span {
        Span { min: self.min * factor, max: self.max * factor }
    }
}

/// The code of `x` for a scale and the integer of a zero point, which is 0 for symmetric schemes and floats.
pub fn quantize_one(x: f32, scale: f32, zero: i32, format: &Format) -> u32 {
    if format.is_int() {
        let bounds = IntBounds::new(format, zero);
        (bounds.round(x / scale) as i32 + zero) as u32 & format.mask()
    } else {
        format.encode(x / scale)
    }
}

/// The number that a code stands for.
pub fn dequantize_one(code: u32, scale: f32, zero: i32, format: &Format) -> f32 {
    if format.is_int() { (format.int_value(code) - zero) as f32 * scale } else { format.decode(code) * scale }
}

/// The scale of a group with the range `span`, as stored, and the integer of its zero point.
pub fn scale_for(span: Span, scheme: &Scheme, rule: ScaleRule) -> Result<(f32, i32)> {
    let format = scheme.format;
    if !(span.min.is_finite() && span.max.is_finite()) {
        return Err(Diag::input("a range that is not finite cannot be quantized"));
    }
    let Zero::Point(zero_format) = scheme.zero else {
        let Some(top) = symmetric_top(format) else {
            return Err(Diag::pipeline(format!("numbers cannot be quantized to {format}")));
        };
        let absmax = span.absmax();
        if absmax == 0.0 {
            return Ok((1.0, 0));
        }
        let scale = match rule {
            ScaleRule::Real => absmax / top,
            ScaleRule::PowerOfTwo => power_of_two_from(absmax / top),
            ScaleRule::Mx => exp2_clamped(floor_log2(absmax) - floor_log2(format.max())),
        };
        return Ok((stored_scale(scale, scheme.scale)?, 0));
    };
    if !format.is_int() || !zero_format.is_int() {
        return Err(Diag::pipeline(format!("{scheme} has zero points, which only integers have")));
    }
    let (qmin, qmax) = format.int_range();
    let steps = (qmax - qmin) as f32;
    let width = span.max - span.min;
    let quotient = if width <= f32::MAX { width / steps } else { span.max / steps - span.min / steps };
    let scale = match rule {
        _ if width == 0.0 => 1.0,
        ScaleRule::Real => quotient,
        ScaleRule::PowerOfTwo => power_of_two_from(quotient),
        ScaleRule::Mx => {
            return Err(Diag::pipeline(format!("{scheme} has zero points, which OCP MX does not know")));
        }
    };
    let scale = stored_scale(scale, scheme.scale)?;
    let zero = (qmin as f32 - span.min / scale).round_ties_even() as i32;
    let (zmin, zmax) = zero_format.int_range();
    Ok((scale, zero.clamp(qmin, qmax).clamp(zmin, zmax)))
}

/// What the largest magnitude of a group is mapped to.
fn symmetric_top(format: &Format) -> Option<f32> {
    match format.class {
        Class::Int { signed: true } if format.bits < 4 => Some(((1 << (format.bits - 1)) as f32) - 0.5),
        Class::Int { .. } | Class::Float { .. } => Some(format.max()),
        Class::Exponent => None,
    }
}

/// `scale` as the scale type stores it.
///
/// # Errors
/// A scale that is too large for its type.
pub fn stored_scale(scale: f32, to: Float) -> Result<f32> {
    // The quotient of a tiny range may be subnormal, or 0.
    let scale = scale.max(f32::MIN_POSITIVE);
    let stored = match to {
        Float::F32 => scale,
        Float::Bf16 => bf16::from_f32(scale).to_f32(),
        Float::F16 => {
            let near = f16::from_f32(scale);
            // Subnormal numbers are so coarse that rounding down would saturate the group.
            let coarse = near < f16::MIN_POSITIVE && near.to_f32() < scale;
            if coarse { f16::from_bits(near.to_bits() + 1).to_f32() } else { near.to_f32() }
        }
    };
    if stored <= f32::MAX {
        return Ok(stored);
    }
    Err(Diag::input(format!("the scale {scale:e} is too large for {to}"))
        .help("take scales of type f32 or bf16"))
}

/// The least power of two that is not below `x`, which is above 0.
fn power_of_two_from(x: f32) -> f32 {
    let floor = exp2_clamped(floor_log2(x));
    if floor < x { floor * 2.0 } else { floor }
}

/// The exponent of `x`, which is above 0; -127 for subnormal numbers.
fn floor_log2(x: f32) -> i32 {
    (x.to_bits() >> 23) as i32 - 127
}

/// `2^n`, kept among normal numbers.
fn exp2_clamped(n: i32) -> f32 {
    f32::from_bits(((n.clamp(-126, 127) + 127) as u32) << 23)
}

/// The codes of an integer format less their zero point, as floats.
#[derive(Clone, Copy)]
struct IntBounds {
    min: f32,
    max: f32,
}

impl IntBounds {
    fn new(format: &Format, zero: i32) -> IntBounds {
        let (min, max) = format.int_range();
        IntBounds { min: (min - zero) as f32, max: (max - zero) as f32 }
    }

    /// The integer nearest to `x` within the bounds, halfway cases to even. The bounds are integers, so clamping
    /// first is the same as clamping last; and below `2^22`, where the bounds are, adding `1.5 * 2^23` leaves no
    /// place for a fraction.
    #[inline(always)]
    fn round(self, x: f32) -> f32 {
        const NO_FRACTION: f32 = 12_582_912.0;
        let x = if x < self.min { self.min } else { x };
        let x = if x > self.max { self.max } else { x };
        (x + NO_FRACTION) - NO_FRACTION
    }
}

#[cfg(test)]
mod tests;
