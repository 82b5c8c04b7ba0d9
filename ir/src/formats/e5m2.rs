//! E5M2 of the OCP 8-bit floating point specification (OFP8): the upper byte of an IEEE 754 half, with its infinities
//! and NaNs. Largest number 57344, least normal `2^-14`, least subnormal `2^-16`.

use super::{Class, Format, Specials};

/// The format `e5m2`.
pub static E5M2: Format = Format {
    name: "e5m2",
    doc: "OCP OFP8 E5M2: as IEEE 754 with 5 exponent bits of bias 15 and 2 fraction bits, largest 57344.",
    bits: 8,
    class: Class::Float { exp: 5, man: 2, bias: 15, specials: Specials::Ieee },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::check;

    #[test]
    fn every_code() {
        for code in 0..128u32 {
            let (e, m) = (code >> 2, f64::from(code & 3));
            let x = match (e, code & 3) {
                (31, 0) => f64::INFINITY,
                (31, _) => f64::NAN,
                (0, _) => m / 4.0 * 2f64.powi(-14),
                _ => (1.0 + m / 4.0) * 2f64.powi(e as i32 - 15),
            };
            check::same(&E5M2, code, x as f32);
            check::same(&E5M2, code | 0x80, -x as f32);
            // The upper byte of a half.
            let half = half::f16::from_bits((code << 8) as u16).to_f32();
            check::same(&E5M2, code, half);
        }
        assert_eq!((Format::min(&E5M2), Format::max(&E5M2)), (-57344.0, 57344.0));
        check::encoding(&E5M2);
    }

    #[test]
    fn published_codes() {
        // The table of the specification: infinity, largest, least normal, largest and least subnormal.
        assert_eq!(E5M2.decode(0x7c), f32::INFINITY);
        assert_eq!(E5M2.decode(0xfc), f32::NEG_INFINITY);
        let table =
            [(0x7b, 57344.0), (0x04, 2f32.powi(-14)), (0x03, 0.75 * 2f32.powi(-14)), (0x01, 2f32.powi(-16))];
        for (code, x) in table {
            assert_eq!(E5M2.decode(code), x);
            assert_eq!(E5M2.encode(x), code);
        }
        assert!((0..256).all(|code| E5M2.is_nan_code(code) == matches!(code & 0x7f, 0x7d..=0x7f)));
    }

    #[test]
    fn outside() {
        for (x, code) in
            [(57345.0, 0x7b), (61440.0, 0x7b), (1e9, 0x7b), (f32::INFINITY, 0x7b), (f32::NAN, 0x7e)]
        {
            assert_eq!(E5M2.encode(x), code, "{x}");
            assert_eq!(E5M2.encode(-x), code | 0x80, "-{x}");
        }
    }
}
