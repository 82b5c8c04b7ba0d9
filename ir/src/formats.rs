//! Number formats, each declared once.
//!
//! A format is a table entry; everything else (decode table, encoding with ties to even and saturation, packing) is
//! derived from it here and tested over every code. One file per format holds the entry, the definition in words and
//! the test against the published table.
//!
//! A *code* is the unsigned integer stored for one number. Rows of codes are packed as one little-endian bit stream:
//! element 0 lies in the least significant bits, and each row starts on a byte boundary.

#[cfg(test)]
mod check;
mod derive;

use std::fmt;
use std::hash::{Hash, Hasher};

macro_rules! formats {
    ($($module:ident :: $name:ident),* $(,)?) => {
        $(mod $module; pub use $module::$name;)*
        /// Every format, narrowest last.
        pub static ALL: &[&Format] = &[$(&$name),*];
    };
}

formats! {
    f32::F32, f16::F16, bf16::BF16,
    int8::INT8, uint8::UINT8, e4m3::E4M3, e5m2::E5M2, e8m0::E8M0,
    int4::INT4, uint4::UINT4, e2m1::E2M1, int3::INT3, int2::INT2,
}

/// What the codes of a format mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Integers: two's complement when signed.
    Int {
        /// Whether negative numbers exist.
        signed: bool,
    },
    /// Sign, biased exponent, fraction; subnormals exist.
    Float {
        /// Exponent bits.
        exp: u32,
        /// Fraction bits.
        man: u32,
        /// Exponent bias.
        bias: i32,
        /// Which codes are not numbers.
        specials: Specials,
    },
    /// An unsigned power of two: `2^(code - 127)`, all ones is NaN.
    Exponent,
}

/// Which codes of a float format are infinities and NaNs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// As IEEE 754: the largest exponent is infinity and NaN.
    Ieee,
    /// No infinities; only all ones after the sign is NaN.
    NanNoInf,
    /// Every code is a finite number.
    None,
}

/// A number format.
#[derive(Debug)]
pub struct Format {
    /// The name in `.qir`, options and tables.
    pub name: &'static str,
    /// One sentence with the source of the definition.
    pub doc: &'static str,
    /// Bits of one code.
    pub bits: u32,
    /// What the codes mean.
    pub class: Class,
}

impl PartialEq for Format {
    fn eq(&self, other: &Format) -> bool {
        self.name == other.name
    }
}
impl Eq for Format {}
impl PartialOrd for Format {
    fn partial_cmp(&self, other: &Format) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Format {
    fn cmp(&self, other: &Format) -> std::cmp::Ordering {
        self.name.cmp(other.name)
    }
}
impl Hash for Format {
    fn hash<H: Hasher>(&self, h: &mut H) {
        self.name.hash(h);
    }
}
impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Format {
    /// The format named `name`.
    pub fn by_name(name: &str) -> Option<&'static Format> {
        ALL.iter().copied().find(|f| f.name == name)
    }

    /// Whether the codes are integers.
    pub fn is_int(&self) -> bool {
        matches!(self.class, Class::Int { .. })
    }

    /// Whether codes above the middle are negative integers.
    pub fn is_signed_int(&self) -> bool {
        matches!(self.class, Class::Int { signed: true })
    }

    /// Mask of the bits of one code.
    pub fn mask(&self) -> u32 {
        if self.bits == 32 { u32::MAX } else { (1 << self.bits) - 1 }
    }
}
