//! The format `bf16`.

use super::{Class, Format, Specials};

/// The format `bf16`.
pub static BF16: Format = Format {
    name: "bf16",
    doc: "",
    bits: 16,
    class: Class::Float { exp: 8, man: 7, bias: 127, specials: Specials::Ieee },
};
