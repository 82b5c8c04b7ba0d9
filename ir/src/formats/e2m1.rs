//! E2M1, the FP4 of the OCP microscaling (MX) specification: sign, 2 exponent bits of bias 1, 1 fraction bit; neither
//! infinities nor NaN.

use super::{Class, Format, Specials};

/// The format `e2m1`.
pub static E2M1: Format = Format {
    name: "e2m1",
    doc: "OCP MX FP4 (E2M1): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.",
    bits: 4,
    class: Class::Float { exp: 2, man: 1, bias: 1, specials: Specials::None },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::check;

    #[test]
    fn every_code() {
        let published = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0f32];
        for (code, x) in (0..).zip(published) {
            assert_eq!(E2M1.decode(code).to_bits(), x.to_bits());
            assert_eq!(E2M1.decode(code | 8).to_bits(), (-x).to_bits());
        }
        assert_eq!((Format::min(&E2M1), Format::max(&E2M1)), (-6.0, 6.0));
        check::encoding(&E2M1);
    }

    #[test]
    fn outside() {
        for (x, code) in
            [(f32::INFINITY, 7), (1e9, 7), (6.1, 7), (-1e9, 15), (f32::NEG_INFINITY, 15), (f32::NAN, 0)]
        {
            assert_eq!(E2M1.encode(x), code, "{x}");
        }
        assert!((0..16).all(|code| !E2M1.is_nan_code(code)));
    }

    #[test]
    fn ties_go_to_the_even_code() {
        for (x, code) in [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)] {
            assert_eq!(E2M1.encode(x), code, "{x}");
            assert_eq!(E2M1.encode(-x), code | 8, "-{x}");
        }
    }
}
