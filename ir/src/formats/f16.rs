//! The format `f16`.

use super::{Class, Format, Specials};

/// The format `f16`.
pub static F16: Format = Format {
    name: "f16",
    doc: "",
    bits: 16,
    class: Class::Float { exp: 5, man: 10, bias: 15, specials: Specials::Ieee },
};
