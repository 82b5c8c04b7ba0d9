//! The format `int4`.

use super::{Class, Format};

/// The format `int4`.
pub static INT4: Format = Format {
    name: "int4",
    doc: "",
    bits: 4,
    class: Class::Int { signed: true },
};
