//! Tensor types: element type and shape.

use crate::diag::{Diag, Result};
use crate::formats::{self, Format};
use crate::scheme::Scheme;
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
    /// 32-bit integers: token ids, positions, sums.
    I32,
    /// A quantized number, to be read together with its scales.
    Q(Scheme),
}

impl ElemTy {
    /// Whether this is one of the plain float types.
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
            ElemTy::F32 | ElemTy::I32 => 32,
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
            ElemTy::I32 => f.write_str("i32"),
            ElemTy::Q(s) => write!(f, "{s}"),
        }
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
