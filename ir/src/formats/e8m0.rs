//! E8M0, the scale of the OCP microscaling (MX) specification: an exponent without sign or fraction. Code `c` is
//! `2^(c - 127)`; 0xff is NaN. There is no zero: what is not positive is encoded as the least power, `2^-127`.

use super::{Class, Format};

/// The format `e8m0`.
pub static E8M0: Format = Format {
    name: "e8m0",
    doc: "OCP MX scale (E8M0): 2^(code - 127), 0xff is NaN.",
    bits: 8,
    class: Class::Exponent,
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::check;

    #[test]
    fn every_code() {
        for code in 0..255 {
            assert_eq!(f64::from(E8M0.decode(code)), 2f64.powi(code as i32 - 127));
            assert!(!E8M0.is_nan_code(code));
        }
        assert!(E8M0.decode(255).is_nan() && E8M0.is_nan_code(255));
        assert_eq!((Format::min(&E8M0), Format::max(&E8M0)), (2f32.powi(-127), 2f32.powi(127)));
        check::encoding(&E8M0);
    }

    #[test]
    fn published_codes() {
        for (x, code) in [(1.0, 127), (0.5, 126), (2.0, 128)] {
            assert_eq!((E8M0.encode(x), E8M0.decode(code)), (code, x));
        }
    }

    #[test]
    fn outside() {
        for (x, code) in [
            (f32::INFINITY, 254),
            (f32::MAX, 254),
            (0.0, 0),
            (-3.0, 0),
            (f32::from_bits(1), 0),
            (f32::NAN, 255),
        ] {
            assert_eq!(E8M0.encode(x), code, "{x}");
        }
    }
}
