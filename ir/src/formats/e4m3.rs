//! The format `e4m3`.

use super::{Class, Format, Specials};

/// The format `e4m3`.
pub static E4M3: Format = Format {
    name: "e4m3",
    doc: "",
    bits: 8,
    class: Class::Float { exp: 4, man: 3, bias: 7, specials: Specials::NanNoInf },
};
