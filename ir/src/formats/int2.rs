//! 2-bit integers in two's complement, from -2 to 1.

use super::{Class, Format};

/// The format `int2`.
pub static INT2: Format = Format {
    name: "int2",
    doc: "2-bit two's complement integers, -2 to 1.",
    bits: 2,
    class: Class::Int { signed: true },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::check;

    #[test]
    fn every_code() {
        // Codes in the order of the integers.
        let codes: Vec<u32> = (-2..=1i32).map(|v| v as u32 & 0x3).collect();
        assert_eq!(codes.len(), 4);
        for (v, code) in (-2..=1i32).zip(codes) {
            assert_eq!(INT2.decode(code), v as f32);
            assert_eq!(INT2.int_value(code), v);
            assert_eq!(INT2.int_code(v), code);
        }
        assert_eq!((Format::min(&INT2), Format::max(&INT2)), (-2.0, 1.0));
        check::encoding(&INT2);
    }

    #[test]
    fn outside() {
        for (x, code) in [
            (f32::INFINITY, 0x1),
            (1e9, 0x1),
            (f32::NEG_INFINITY, 0x2),
            (-1e9, 0x2),
            (f32::NAN, 0),
            (-0.0, 0),
        ] {
            assert_eq!(INT2.encode(x), code, "{x}");
        }
    }
}
