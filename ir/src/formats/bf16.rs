//! The upper 16 bits of an IEEE 754 single: sign, 8 exponent bits of bias 127, 7 fraction bits; infinities, NaNs and
//! subnormals likewise.

use super::{Class, Format, Specials};

/// The format `bf16`.
pub static BF16: Format = Format {
    name: "bf16",
    doc: "The upper half of an IEEE 754 binary32: 8 exponent bits of bias 127, 7 fraction bits.",
    bits: 16,
    class: Class::Float { exp: 8, man: 7, bias: 127, specials: Specials::Ieee },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::check;

    #[test]
    fn every_pattern() {
        for code in 0..=u16::MAX {
            let x = BF16.decode(code.into());
            assert_eq!(BF16.encode(x), code.into(), "{code:#06x}");
            assert_eq!(BF16.is_nan_code(code.into()), x.is_nan());
            let reference = half::bf16::from_bits(code);
            assert_eq!(x.is_nan(), reference.is_nan());
            if !x.is_nan() {
                assert_eq!(x.to_bits(), reference.to_f32().to_bits());
            }
        }
        check::encoding(&BF16);
    }

    #[test]
    fn outside() {
        assert_eq!(Format::max(&BF16), half::bf16::MAX.to_f32());
        for (x, code) in [(f32::INFINITY, 0x7f80), (f32::MAX, 0x7f80 - 1), (f32::NAN, 0x7fc0)] {
            assert_eq!(BF16.encode(x), code, "{x}");
            assert_eq!(BF16.encode(-x), code | 0x8000, "-{x}");
        }
    }
}
