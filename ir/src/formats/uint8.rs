//! The format `uint8`.

use super::{Class, Format};

/// The format `uint8`.
pub static UINT8: Format = Format {
    name: "uint8",
    doc: "",
    bits: 8,
    class: Class::Int { signed: false },
};
