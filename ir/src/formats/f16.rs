//! Sign, 5 exponent bits of bias 15, 10 fraction bits; infinities, NaNs and subnormals as in IEEE 754. Largest number
//! 65504, least normal `2^-14`, least subnormal `2^-24`.

use super::{Class, Format, Specials};

/// The format `f16`.
pub static F16: Format = Format {
    name: "f16",
    doc: "IEEE 754 binary16: 5 exponent bits of bias 15, 10 fraction bits, largest 65504.",
    bits: 16,
    class: Class::Float { exp: 5, man: 10, bias: 15, specials: Specials::Ieee },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::check;

    #[test]
    fn every_pattern() {
        for code in 0..=u16::MAX {
            let x = F16.decode(code.into());
            assert_eq!(F16.encode(x), code.into(), "{code:#06x}");
            assert_eq!(F16.is_nan_code(code.into()), x.is_nan());
            let reference = half::f16::from_bits(code);
            assert_eq!(x.is_nan(), reference.is_nan());
            if !x.is_nan() {
                assert_eq!(x.to_bits(), reference.to_f32().to_bits());
            }
        }
        check::encoding(&F16);
    }

    #[test]
    fn outside() {
        assert_eq!(Format::max(&F16), 65504.0);
        for (x, code) in [(f32::INFINITY, 0x7c00), (f32::MAX, 0x7c00 - 1), (f32::NAN, 0x7e00)] {
            assert_eq!(F16.encode(x), code, "{x}");
            assert_eq!(F16.encode(-x), code | 0x8000, "-{x}");
        }
    }
}
