//! The format `int2`.

use super::{Class, Format};

/// The format `int2`.
pub static INT2: Format = Format {
    name: "int2",
    doc: "",
    bits: 2,
    class: Class::Int { signed: true },
};
