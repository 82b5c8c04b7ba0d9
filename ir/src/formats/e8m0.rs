//! The format `e8m0`.

use super::{Class, Format};

/// The format `e8m0`.
pub static E8M0: Format = Format {
    name: "e8m0",
    doc: "",
    bits: 8,
    class: Class::Exponent,
};
