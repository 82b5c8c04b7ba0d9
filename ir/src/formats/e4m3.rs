//! E4M3 of the OCP 8-bit floating point specification (OFP8), which other places call E4M3FN: sign, 4 exponent bits of
//! bias 7, 3 fraction bits. There are no infinities; 0x7f and 0xff are NaN, so the largest exponent is used for numbers
//! up to 448. Least normal `2^-6`, least subnormal `2^-9`.

use super::{Class, Format, Specials};

/// The format `e4m3`.
pub static E4M3: Format = Format {
    name: "e4m3",
    doc: "OCP OFP8 E4M3: bias 7, no infinities, NaN 0x7f and 0xff, largest 448.",
    bits: 8,
    class: Class::Float { exp: 4, man: 3, bias: 7, specials: Specials::NanNoInf },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::check;

    #[test]
    fn every_code() {
        for code in 0..128u32 {
            let (e, m) = (code >> 3, f64::from(code & 7));
            let x = match (e, code) {
                (_, 0x7f) => f64::NAN,
                (0, _) => m / 8.0 * 2f64.powi(-6),
                _ => (1.0 + m / 8.0) * 2f64.powi(e as i32 - 7),
            };
            check::same(&E4M3, code, x as f32);
            check::same(&E4M3, code | 0x80, -x as f32);
        }
        assert_eq!((Format::min(&E4M3), Format::max(&E4M3)), (-448.0, 448.0));
        check::encoding(&E4M3);
    }

    #[test]
    fn published_codes() {
        // The table of the specification: largest, least normal, largest and least subnormal.
        let table =
            [(0x7e, 448.0), (0x08, 2f32.powi(-6)), (0x07, 0.875 * 2f32.powi(-6)), (0x01, 2f32.powi(-9))];
        for (code, x) in table {
            assert_eq!(E4M3.decode(code), x);
            assert_eq!(E4M3.encode(x), code);
        }
        assert!((0..256).all(|code| E4M3.is_nan_code(code) == matches!(code, 0x7f | 0xff)));
    }

    #[test]
    fn outside() {
        for (x, code) in [
            (449.0, 0x7e),
            (464.0, 0x7e),
            (480.0, 0x7e),
            (1e9, 0x7e),
            (f32::INFINITY, 0x7e),
            (f32::NAN, 0x7f),
        ] {
            assert_eq!(E4M3.encode(x), code, "{x}");
            assert_eq!(E4M3.encode(-x), code | 0x80, "-{x}");
        }
    }
}
