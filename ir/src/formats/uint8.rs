//! 8-bit unsigned integers, from 0 to 255.

use super::{Class, Format};

/// The format `uint8`.
pub static UINT8: Format = Format {
    name: "uint8",
    doc: "8-bit unsigned integers, 0 to 255.",
    bits: 8,
    class: Class::Int { signed: false },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::check;

    #[test]
    fn every_code() {
        // Codes in the order of the integers.
        let codes: Vec<u32> = (0..=255i32).map(|v| v as u32 & 0xff).collect();
        assert_eq!(codes.len(), 256);
        for (v, code) in (0..=255i32).zip(codes) {
            assert_eq!(UINT8.decode(code), v as f32);
            assert_eq!(UINT8.int_value(code), v);
            assert_eq!(UINT8.int_code(v), code);
        }
        assert_eq!((Format::min(&UINT8), Format::max(&UINT8)), (0.0, 255.0));
        check::encoding(&UINT8);
    }

    #[test]
    fn outside() {
        for (x, code) in [
            (f32::INFINITY, 0xff),
            (1e9, 0xff),
            (f32::NEG_INFINITY, 0x0),
            (-1e9, 0x0),
            (f32::NAN, 0),
            (-0.0, 0),
        ] {
            assert_eq!(UINT8.encode(x), code, "{x}");
        }
    }
}
