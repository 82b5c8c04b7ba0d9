//! Sign, 8 exponent bits of bias 127, 23 fraction bits; infinities, NaNs and subnormals as in IEEE 754.

use super::{Class, Format, Specials};

/// The format `f32`.
pub static F32: Format = Format {
    name: "f32",
    doc: "IEEE 754 binary32.",
    bits: 32,
    class: Class::Float { exp: 8, man: 23, bias: 127, specials: Specials::Ieee },
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_bits() {
        for x in
            [0.0, -0.0, 1.0, f32::MIN_POSITIVE, f32::from_bits(1), f32::MAX, f32::INFINITY, f32::NEG_INFINITY]
        {
            assert_eq!(F32.encode(x), x.to_bits());
            assert_eq!(F32.decode(x.to_bits()).to_bits(), x.to_bits());
            assert!(!F32.is_nan_code(x.to_bits()));
        }
        for nan in [0x7fc0_0000, 0xffc0_1234] {
            assert!(F32.is_nan_code(nan) && F32.decode(nan).is_nan());
            assert_eq!(F32.encode(f32::from_bits(nan)), nan);
        }
        assert_eq!((Format::min(&F32), Format::max(&F32)), (f32::MIN, f32::MAX));
    }
}
