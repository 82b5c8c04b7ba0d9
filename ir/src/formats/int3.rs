//! 3-bit integers in two's complement, from -4 to 3.

use super::{Class, Format};

/// The format `int3`.
pub static INT3: Format = Format {
    name: "int3",
    doc: "3-bit two's complement integers, -4 to 3.",
    bits: 3,
    class: Class::Int { signed: true },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::check;

    #[test]
    fn every_code() {
        // Codes in the order of the integers.
        let codes: Vec<u32> = (-4..=3i32).map(|v| v as u32 & 0x7).collect();
        assert_eq!(codes.len(), 8);
        for (v, code) in (-4..=3i32).zip(codes) {
            assert_eq!(INT3.decode(code), v as f32);
            assert_eq!(INT3.int_value(code), v);
            assert_eq!(INT3.int_code(v), code);
        }
        assert_eq!((Format::min(&INT3), Format::max(&INT3)), (-4.0, 3.0));
        check::encoding(&INT3);
    }

    #[test]
    fn outside() {
        for (x, code) in [
            (f32::INFINITY, 0x3),
            (1e9, 0x3),
            (f32::NEG_INFINITY, 0x4),
            (-1e9, 0x4),
            (f32::NAN, 0),
            (-0.0, 0),
        ] {
            assert_eq!(INT3.encode(x), code, "{x}");
        }
    }
}
