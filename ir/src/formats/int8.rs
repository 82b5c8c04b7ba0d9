//! The format `int8`.

use super::{Class, Format};

/// The format `int8`.
pub static INT8: Format = Format {
    name: "int8",
    doc: "",
    bits: 8,
    class: Class::Int { signed: true },
};
