//! 8-bit integers in two's complement, from -128 to 127.

use super::{Class, Format};

/// The format `int8`.
pub static INT8: Format = Format {
    name: "int8",
    doc: "8-bit two's complement integers, -128 to 127.",
    bits: 8,
    class: Class::Int { signed: true },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::check;

    #[test]
    fn every_code() {
        // Codes in the order of the integers.
        let codes: Vec<u32> = (-128..=127i32).map(|v| v as u32 & 0xff).collect();
        assert_eq!(codes.len(), 256);
        for (v, code) in (-128..=127i32).zip(codes) {
            assert_eq!(INT8.decode(code), v as f32);
            assert_eq!(INT8.int_value(code), v);
            assert_eq!(INT8.int_code(v), code);
        }
        assert_eq!((Format::min(&INT8), Format::max(&INT8)), (-128.0, 127.0));
        check::encoding(&INT8);
    }

    #[test]
    fn outside() {
        for (x, code) in [
            (f32::INFINITY, 0x7f),
            (1e9, 0x7f),
            (f32::NEG_INFINITY, 0x80),
            (-1e9, 0x80),
            (f32::NAN, 0),
            (-0.0, 0),
        ] {
            assert_eq!(INT8.encode(x), code, "{x}");
        }
    }
}
