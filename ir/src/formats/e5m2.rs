//! The format `e5m2`.

use super::{Class, Format, Specials};

/// The format `e5m2`.
pub static E5M2: Format = Format {
    name: "e5m2",
    doc: "",
    bits: 8,
    class: Class::Float { exp: 5, man: 2, bias: 15, specials: Specials::Ieee },
};
