//! The format `uint4`.

use super::{Class, Format};

/// The format `uint4`.
pub static UINT4: Format = Format {
    name: "uint4",
    doc: "",
    bits: 4,
    class: Class::Int { signed: false },
};
