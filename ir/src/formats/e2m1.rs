//! The format `e2m1`.

use super::{Class, Format, Specials};

/// The format `e2m1`.
pub static E2M1: Format = Format {
    name: "e2m1",
    doc: "",
    bits: 4,
    class: Class::Float { exp: 2, man: 1, bias: 1, specials: Specials::None },
};
