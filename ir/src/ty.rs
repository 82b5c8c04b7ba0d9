//! Tensor types: element type and shape.

use crate::diag::{Diag, Result};
use crate::formats::{self, Format};
use crate::scheme::{Group, Scheme, Zero};
use std::fmt;

/// One extent of a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dim {
    /// Known when the module is compiled.
    Static(u64),
    /// Known when the engine runs; `?` alone is the symbol `'?'`.
    ///
    /// Decoders use `t` (tokens of this call), `s` (tokens in the state after this call) and `r` (rows of logits asked
    /// for). Equal symbols are equal extents.
    Sym(char),
}

impl Dim {
    /// The extent when it is static.
    pub fn fixed(self) -> Option<u64> {
        match self {
            Dim::Static(n) => Some(n),
            Dim::Sym(_) => None,
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Static(n) => write!(f, "{n}"),
            Dim::Sym('?') => f.write_str("?"),
            Dim::Sym(c) => write!(f, "?{c}"),
        }
    }
}

/// Extents, outermost first. Memory is row-major.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shape(pub Vec<Dim>);

impl Shape {
    /// A shape of static extents.
    pub fn fixed(dims: &[u64]) -> Shape {
        Shape(dims.iter().map(|&d| Dim::Static(d)).collect())
    }
    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.0.len()
    }
    /// The extents when all are static.
    pub fn dims(&self) -> Option<Vec<u64>> {
        self.0.iter().map(|d| d.fixed()).collect()
    }
    /// Number of elements when all extents are static and the product fits.
    pub fn elements(&self) -> Option<u64> {
        self.0.iter().try_fold(1u64, |n, d| n.checked_mul(d.fixed()?))
    }
    /// The innermost extent.
    pub fn last(&self) -> Option<Dim> {
        self.0.last().copied()
    }
}

impl Shape {
    /// Reads `?tx4x64`, the form in which shapes are written; the empty text is rank 0.
    pub fn parse(text: &str) -> Result<Shape> {
        let bad = || Diag::input(format!("`{text}` is not a shape")).help("write extents as in `?tx4x64`");
        let mut dims = vec![];
        let mut rest = text;
        while !rest.is_empty() {
            if !dims.is_empty() {
                rest = rest.strip_prefix('x').ok_or_else(bad)?;
            }
            if let Some(after) = rest.strip_prefix('?') {
                let symbol = after.chars().next().filter(|c| c.is_ascii_lowercase() && *c != 'x');
                dims.push(Dim::Sym(symbol.unwrap_or('?')));
                rest = &after[usize::from(symbol.is_some())..];
            } else {
                let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
                dims.push(Dim::Static(rest[..end].parse().map_err(|_| bad())?));
                rest = &rest[end..];
            }
        }
        Ok(Shape(dims))
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, d) in self.0.iter().enumerate() {
            write!(f, "{}{d}", if i > 0 { "x" } else { "" })?;
        }
        Ok(())
    }
}

impl serde::Serialize for Shape {
    fn serialize<S: serde::Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        out.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Shape {
    fn deserialize<D: serde::Deserializer<'de>>(input: D) -> Result<Shape, D::Error> {
        let text = String::deserialize(input)?;
        Shape::parse(&text).map_err(|e| serde::de::Error::custom(e.message))
    }
}

/// What an element of a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ElemTy {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// The upper half of an IEEE single.
    Bf16,
    /// IEEE double.
    F64,
    /// A plain integer or a truth value.
    Int(Int),
    /// A quantized number, to be read together with its scales.
    Q(Scheme),
}

impl ElemTy {
    /// 32-bit integers: token ids, positions, sums.
    pub const I32: ElemTy = ElemTy::Int(Int::I32);
    /// 64-bit integers: indices and extents.
    pub const I64: ElemTy = ElemTy::Int(Int::I64);
    /// Truth values.
    pub const BOOL: ElemTy = ElemTy::Int(Int::Bool);

    /// Codes of `format` without scales: the codes are the numbers.
    pub fn bare(format: &'static Format) -> ElemTy {
        ElemTy::Q(Scheme { format, group: Group::Tensor, zero: Zero::Symmetric, scale: Float::F32 })
    }
    /// The format of codes without scales.
    pub fn bare_format(self) -> Option<&'static Format> {
        self.scheme().map(|s| s.format).filter(|f| ElemTy::bare(f) == self)
    }
    /// Whether this is a plain float type or doubles.
    pub fn is_real(self) -> bool {
        self.is_float() || self == ElemTy::F64
    }
    /// The integer type.
    pub fn int(self) -> Option<Int> {
        match self {
            ElemTy::Int(i) => Some(i),
            _ => None,
        }
    }
    /// The plain type called `name`.
    pub fn by_name(name: &str) -> Option<ElemTy> {
        match name {
            "f64" => Some(ElemTy::F64),
            name => Float::by_name(name).map(ElemTy::from).or_else(|| Int::by_name(name).map(ElemTy::Int)),
        }
    }
    /// Reads a type as it is written: the name of a plain type, or a scheme.
    pub fn parse(text: &str) -> Result<ElemTy> {
        if text.starts_with("!q<") {
            return Ok(ElemTy::Q(Scheme::parse(text)?));
        }
        ElemTy::by_name(text).ok_or_else(|| Diag::input(format!("`{text}` is not an element type")))
    }
    /// Whether this is one of the plain float types that kernels compute with: f32, f16, bf16.
    pub fn is_float(self) -> bool {
        matches!(self, ElemTy::F32 | ElemTy::F16 | ElemTy::Bf16)
    }
    /// The scheme of a quantized type.
    pub fn scheme(self) -> Option<Scheme> {
        match self {
            ElemTy::Q(s) => Some(s),
            _ => None,
        }
    }
    /// Bits of one stored element.
    pub fn bits(self) -> u32 {
        match self {
            ElemTy::F32 => 32,
            ElemTy::F64 => 64,
            ElemTy::Int(i) => i.bits(),
            ElemTy::F16 | ElemTy::Bf16 => 16,
            ElemTy::Q(s) => s.format.bits,
        }
    }
}

impl From<Float> for ElemTy {
    fn from(f: Float) -> ElemTy {
        match f {
            Float::F32 => ElemTy::F32,
            Float::F16 => ElemTy::F16,
            Float::Bf16 => ElemTy::Bf16,
        }
    }
}

impl fmt::Display for ElemTy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ElemTy::F32 => f.write_str("f32"),
            ElemTy::F16 => f.write_str("f16"),
            ElemTy::Bf16 => f.write_str("bf16"),
            ElemTy::F64 => f.write_str("f64"),
            ElemTy::Int(i) => f.write_str(i.name()),
            ElemTy::Q(s) => write!(f, "{s}"),
        }
    }
}

impl serde::Serialize for ElemTy {
    fn serialize<S: serde::Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        out.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for ElemTy {
    fn deserialize<D: serde::Deserializer<'de>>(input: D) -> Result<ElemTy, D::Error> {
        let text = String::deserialize(input)?;
        ElemTy::parse(&text).map_err(|e| serde::de::Error::custom(e.message))
    }
}

macro_rules! ints {
    ($($(#[doc = $doc:literal])* $name:ident = $text:literal, $bits:literal, $signed:literal;)*) => {
        /// Plain integers and truth values. Arithmetic wraps around.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Int {
            $($(#[doc = $doc])* $name,)*
        }

        impl Int {
            /// Every integer type.
            pub const ALL: &'static [Int] = &[$(Int::$name),*];

            /// The name in texts.
            pub fn name(self) -> &'static str {
                match self {
                    $(Int::$name => $text,)*
                }
            }
            /// Bits of one stored element.
            pub fn bits(self) -> u32 {
                match self {
                    $(Int::$name => $bits,)*
                }
            }
            /// Whether there are negative numbers.
            pub fn signed(self) -> bool {
                match self {
                    $(Int::$name => $signed,)*
                }
            }
        }
    };
}

ints! {
    /// False and true, stored as bytes 0 and 1.
    Bool = "bool", 8, false;
    /// Two's complement of 8 bits.
    I8 = "i8", 8, true;
    /// Two's complement of 16 bits.
    I16 = "i16", 16, true;
    /// Two's complement of 32 bits.
    I32 = "i32", 32, true;
    /// Two's complement of 64 bits.
    I64 = "i64", 64, true;
    /// Unsigned, 8 bits.
    U8 = "u8", 8, false;
    /// Unsigned, 16 bits.
    U16 = "u16", 16, false;
    /// Unsigned, 32 bits.
    U32 = "u32", 32, false;
    /// Unsigned, 64 bits.
    U64 = "u64", 64, false;
}

impl Int {
    /// The type called `name`.
    pub fn by_name(name: &str) -> Option<Int> {
        Int::ALL.iter().copied().find(|i| i.name() == name)
    }
    /// The least and the largest number.
    pub fn range(self) -> (i128, i128) {
        match (self, self.signed()) {
            (Int::Bool, _) => (0, 1),
            (_, true) => (-(1 << (self.bits() - 1)), (1 << (self.bits() - 1)) - 1),
            (_, false) => (0, (1 << self.bits()) - 1),
        }
    }
    /// The number of this type that `x` is, modulo a power of two; what is not 0 is true.
    pub fn wrap(self, x: i128) -> i128 {
        if self == Int::Bool {
            return i128::from(x != 0);
        }
        let (min, max) = self.range();
        (x - min).rem_euclid(max - min + 1) + min
    }
}

/// The plain float types, where nothing else will do.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Float {
    /// IEEE single.
    #[default]
    F32,
    /// IEEE half.
    F16,
    /// The upper half of an IEEE single.
    Bf16,
}

impl Float {
    /// The number format of the same name.
    pub fn format(self) -> &'static Format {
        match self {
            Float::F32 => &formats::F32,
            Float::F16 => &formats::F16,
            Float::Bf16 => &formats::BF16,
        }
    }
    /// The type named `name`.
    pub fn by_name(name: &str) -> Option<Float> {
        [Float::F32, Float::F16, Float::Bf16].into_iter().find(|f| f.format().name == name)
    }
}

impl fmt::Display for Float {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.format().name)
    }
}

/// Element type and shape: the type of a value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorTy {
    /// What the elements are.
    pub elem: ElemTy,
    /// How many there are along each axis.
    pub shape: Shape,
}

impl TensorTy {
    /// A tensor of `elem` with extents `dims`.
    pub fn new(elem: impl Into<ElemTy>, dims: impl Into<Vec<Dim>>) -> TensorTy {
        TensorTy { elem: elem.into(), shape: Shape(dims.into()) }
    }
    /// A tensor of static extents.
    pub fn fixed(elem: impl Into<ElemTy>, dims: &[u64]) -> TensorTy {
        TensorTy { elem: elem.into(), shape: Shape::fixed(dims) }
    }
    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.rank()
    }
    /// The same shape with other elements.
    pub fn with_elem(&self, elem: impl Into<ElemTy>) -> TensorTy {
        TensorTy { elem: elem.into(), shape: self.shape.clone() }
    }
    /// Extents of a matrix.
    pub fn matrix(&self) -> Option<(Dim, Dim)> {
        match self.shape.0[..] {
            [rows, cols] => Some((rows, cols)),
            _ => None,
        }
    }
    /// Stored bytes when the shape is static: rows (everything but the last axis) start on byte boundaries.
    pub fn stored_bytes(&self) -> Option<u64> {
        let dims = self.shape.dims()?;
        let (&cols, outer) = dims.split_last().unwrap_or((&1, &[]));
        let rows = outer.iter().try_fold(1u64, |n, &d| n.checked_mul(d))?;
        rows.checked_mul(self.row_bytes(cols)?)
    }
    /// Stored bytes of one row of `cols` elements.
    pub fn row_bytes(&self, cols: u64) -> Option<u64> {
        Some(cols.checked_mul(u64::from(self.elem.bits()))?.div_ceil(8))
    }
}

impl fmt::Display for TensorTy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tensor<")?;
        for d in &self.shape.0 {
            write!(f, "{d}x")?;
        }
        write!(f, "{}>", self.elem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_read_back() {
        for text in ["", "?", "?tx4x64", "3x?", "?sx1"] {
            assert_eq!(Shape::parse(text).unwrap().to_string(), text);
        }
        for text in ["x", "4x", "4y", "?t4", "-1", "99999999999999999999"] {
            assert!(Shape::parse(text).is_err(), "{text}");
        }
    }
}
