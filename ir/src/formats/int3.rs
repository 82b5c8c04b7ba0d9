//! The format `int3`.

use super::{Class, Format};

/// The format `int3`.
pub static INT3: Format = Format {
    name: "int3",
    doc: "",
    bits: 3,
    class: Class::Int { signed: true },
};
