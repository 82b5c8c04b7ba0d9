//! 4-bit integers in two's complement, from -8 to 7.

use super::{Class, Format};

/// The format `int4`.
pub static INT4: Format = Format {
    name: "int4",
    doc: "4-bit two's complement integers, -8 to 7.",
    bits: 4,
    class: Class::Int { signed: true },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::check;

    #[test]
    fn every_code() {
        // Codes in the order of the integers.
        let codes: Vec<u32> = (-8..=7i32).map(|v| v as u32 & 0xf).collect();
        assert_eq!(codes.len(), 16);
        for (v, code) in (-8..=7i32).zip(codes) {
            assert_eq!(INT4.decode(code), v as f32);
            assert_eq!(INT4.int_value(code), v);
            assert_eq!(INT4.int_code(v), code);
        }
        assert_eq!((Format::min(&INT4), Format::max(&INT4)), (-8.0, 7.0));
        check::encoding(&INT4);
    }

    #[test]
    fn outside() {
        for (x, code) in [
            (f32::INFINITY, 0x7),
            (1e9, 0x7),
            (f32::NEG_INFINITY, 0x8),
            (-1e9, 0x8),
            (f32::NAN, 0),
            (-0.0, 0),
        ] {
            assert_eq!(INT4.encode(x), code, "{x}");
        }
    }
}
