//! 4-bit unsigned integers, from 0 to 15.

use super::{Class, Format};

/// The format `uint4`.
pub static UINT4: Format = Format {
    name: "uint4",
    doc: "4-bit unsigned integers, 0 to 15.",
    bits: 4,
    class: Class::Int { signed: false },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::check;

    #[test]
    fn every_code() {
        // Codes in the order of the integers.
        let codes: Vec<u32> = (0..=15i32).map(|v| v as u32 & 0xf).collect();
        assert_eq!(codes.len(), 16);
        for (v, code) in (0..=15i32).zip(codes) {
            assert_eq!(UINT4.decode(code), v as f32);
            assert_eq!(UINT4.int_value(code), v);
            assert_eq!(UINT4.int_code(v), code);
        }
        assert_eq!((Format::min(&UINT4), Format::max(&UINT4)), (0.0, 15.0));
        check::encoding(&UINT4);
    }

    #[test]
    fn outside() {
        for (x, code) in [
            (f32::INFINITY, 0xf),
            (1e9, 0xf),
            (f32::NEG_INFINITY, 0x0),
            (-1e9, 0x0),
            (f32::NAN, 0),
            (-0.0, 0),
        ] {
            assert_eq!(UINT4.encode(x), code, "{x}");
        }
    }
}
