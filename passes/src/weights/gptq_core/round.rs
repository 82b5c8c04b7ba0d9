//! Rounding sixteen rows at a time, by the rules of `quantc_ir::quant`.

use super::product::LANES;
use quantc_ir::formats::{Class, Format};

/// Numbers of sixteen rows at one column.
pub(super) type Lanes = [f32; LANES];

/// How numbers become codes of a format of at most 8 bits.
#[derive(Clone, Copy)]
pub(super) enum Rounder {
    /// The least and the greatest integer.
    Int { min: f32, max: f32, mask: u8 },
    /// A float format with its largest finite number, fraction bits, and the exponent of its least normal number.
    Float { format: &'static Format, max: f32, man: i32, least: i32 },
}

/// Added and taken off again, it leaves no place for a fraction in numbers below `2^22`.
const NO_FRACTION: f32 = 12_582_912.0;

impl Rounder {
    /// For codes of `format`; `None` if it has more than 8 bits or no negative numbers and no zero.
    pub(super) fn new(format: &'static Format) -> Option<Rounder> {
        match format.class {
            _ if format.bits > 8 => None,
            Class::Int { .. } => {
                let (min, max) = format.int_range();
                Some(Rounder::Int { min: min as f32, max: max as f32, mask: format.mask() as u8 })
            }
            Class::Float { man, bias, .. } => {
                Some(Rounder::Float { format, max: Format::max(format), man: man as i32, least: 1 - bias })
            }
            Class::Exponent => None,
        }
    }

    /// The numbers that the codes of `x` stand for.
    #[inline(always)]
    pub(super) fn round(self, x: &Lanes, scale: &Lanes, zero: &Lanes) -> Lanes {
        let mut y = [0.0; LANES];
        match self {
            Rounder::Int { min, max, .. } => {
                for l in 0..LANES {
                    y[l] = nearest(x[l] / scale[l], min - zero[l], max - zero[l]) * scale[l];
                }
            }
            Rounder::Float { max, man, least, .. } => {
                for l in 0..LANES {
                    y[l] = nearest_float(x[l] / scale[l], max, man, least) * scale[l];
                }
            }
        }
        y
    }

    /// The codes of `x`.
    #[inline(always)]
    pub(super) fn codes(self, x: &Lanes, scale: &Lanes, zero: &Lanes) -> [u8; LANES] {
        let mut codes = [0; LANES];
        match self {
            Rounder::Int { min, max, mask } => {
                for l in 0..LANES {
                    let q = nearest(x[l] / scale[l], min - zero[l], max - zero[l]) + zero[l];
                    codes[l] = q as i32 as u8 & mask;
                }
            }
            Rounder::Float { format, .. } => {
                for l in 0..LANES {
                    codes[l] = format.encode(x[l] / scale[l]) as u8;
                }
            }
        }
        codes
    }

    /// What `x` differs from its rounded number by, for one scale.
    #[inline(always)]
    pub(super) fn errors(self, xs: &[f32], scale: f32, zero: i32, out: &mut [f32]) {
        match self {
            Rounder::Int { min, max, .. } => {
                let (min, max) = (min - zero as f32, max - zero as f32);
                for (e, &x) in out.iter_mut().zip(xs) {
                    *e = nearest(x / scale, min, max) * scale - x;
                }
            }
            Rounder::Float { max, man, least, .. } => {
                for (e, &x) in out.iter_mut().zip(xs) {
                    *e = nearest_float(x / scale, max, man, least) * scale - x;
                }
            }
        }
    }
}

/// The number nearest to `x` with `man` fraction bits, of magnitude up to `max`, halfway cases to even. Numbers below
/// `2^least` are as far apart as those above it.
#[inline(always)]
fn nearest_float(x: f32, max: f32, man: i32, least: i32) -> f32 {
    let x = if x < -max { -max } else { x };
    let x = if x > max { max } else { x };
    let exponent = (x.to_bits() >> 23 & 0xff) as i32;
    let exponent = if exponent < least + 127 { least + 127 } else { exponent };
    // `NO_FRACTION` times the distance of neighbours, `2^(exponent - 127 - man)`.
    let no_fraction = f32::from_bits(((exponent - man + 23) << 23 | 1 << 22) as u32);
    (x + no_fraction) - no_fraction
}

/// The integer nearest to `x` within integer bounds, halfway cases to even.
#[inline(always)]
fn nearest(x: f32, min: f32, max: f32) -> f32 {
    let x = if x < min { min } else { x };
    let x = if x > max { max } else { x };
    (x + NO_FRACTION) - NO_FRACTION
}

#[cfg(test)]
mod tests {
    use super::*;
    use quantc_ir::formats::ALL;
    use quantc_ir::quant::{dequantize_one, quantize_one};

    #[test]
    fn it_rounds_as_the_ir_does() {
        let mut tested = 0;
        for format in ALL.iter().copied().filter(|f| f.bits <= 8 && Format::max(f) < 1e6) {
            let rounder = Rounder::new(format).unwrap();
            let zeros: &[i32] = if format.is_int() { &[0, 3, -2, 1] } else { &[0] };
            for (i, &zero) in (0..4000).zip(zeros.iter().cycle()) {
                let x = (i * 16 - 32000) as f32 * [0.125, 0.0003][i as usize / 4 % 2];
                let x: Lanes = std::array::from_fn(|l| x + l as f32 * 0.125);
                let scale: Lanes = std::array::from_fn(|l| 0.5 + l as f32 * 1.7);
                let (y, codes) = (
                    rounder.round(&x, &scale, &[zero as f32; LANES]),
                    rounder.codes(&x, &scale, &[zero as f32; LANES]),
                );
                for l in 0..LANES {
                    let code = quantize_one(x[l], scale[l], zero, format);
                    assert_eq!(u32::from(codes[l]), code, "{format} {} / {}", x[l], scale[l]);
                    assert_eq!(y[l], dequantize_one(code, scale[l], zero, format), "{format}");
                    let mut e = [0.0];
                    rounder.errors(&x[l..=l], scale[l], zero, &mut e);
                    assert_eq!(e[0], y[l] - x[l]);
                    tested += 1;
                }
            }
        }
        assert!(tested > 500_000);
    }
}
