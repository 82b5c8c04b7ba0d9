//! The format `f32`.

use super::{Class, Format, Specials};

/// The format `f32`.
pub static F32: Format = Format {
    name: "f32",
    doc: "",
    bits: 32,
    class: Class::Float { exp: 8, man: 23, bias: 127, specials: Specials::Ieee },
};
