//! Quantization schemes: the element type of quantized tensors.
//!
//! A scheme says how codes are to be read; the scales and zero points themselves are ordinary values of the graph.
//! The one rule for the shape of those values is [`Scheme::scale_shape`].

use crate::diag::{Diag, Result};
use crate::formats::Format;
use crate::ty::{Dim, Float, Shape};
use std::fmt;

/// Which elements share one scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// The whole tensor.
    Tensor,
    /// One scale for each index of this axis (weights `[N, K]`: axis 0 is one scale per output channel).
    Axis(u8),
    /// Runs of `size` elements along `axis`; the last run of a row may be shorter.
    Block {
        /// The axis the runs lie along.
        axis: u8,
        /// Elements in one run.
        size: u32,
    },
    /// Two-dimensional tiles of a matrix; those at the edges may be smaller.
    Tile([u32; 2]),
    /// One scale for each row: every index but the last axis. Computed when the engine runs.
    Token,
}

/// Where zero lies among the codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Zero {
    /// Code 0 is zero; there is no zero-point operand.
    Symmetric,
    /// Each group has a zero point, stored as codes of this format.
    Point(&'static Format),
}

/// The element type of a quantized tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Scheme {
    /// What one code means.
    pub format: &'static Format,
    /// Which codes share a scale.
    pub group: Group,
    /// Symmetric or with zero points.
    pub zero: Zero,
    /// The type of the scales.
    pub scale: Float,
}

impl Scheme {
    /// Number of elements along each axis that share a scale; `None` means all of that axis.
    pub fn blocks(&self, rank: usize) -> Result<Vec<Option<u64>>> {
        let axis_in_rank = |axis: u8| {
            if usize::from(axis) < rank {
                Ok(usize::from(axis))
            } else {
                Err(Diag::input(format!("{self} groups along axis {axis}, but the tensor has rank {rank}")))
            }
        };
        let mut blocks = vec![None; rank];
        match self.group {
            Group::Tensor => {}
            Group::Axis(axis) => blocks[axis_in_rank(axis)?] = Some(1),
            Group::Block { axis, size } => {
                let axis = axis_in_rank(axis)?;
                blocks.fill(Some(1));
                blocks[axis] = Some(u64::from(size));
            }
            Group::Tile(tile) => {
                if rank != 2 {
                    return Err(Diag::input(format!(
                        "{self} needs a matrix, but the tensor has rank {rank}"
                    )));
                }
                blocks = tile.iter().map(|&n| Some(u64::from(n))).collect();
            }
            Group::Token => {
                blocks.fill(Some(1));
                if let Some(last) = blocks.last_mut() {
                    *last = None;
                }
            }
        }
        if blocks.contains(&Some(0)) {
            return Err(Diag::input(format!("{self} has groups of no elements")));
        }
        Ok(blocks)
    }

    /// The shape of the scale (and zero-point) tensor of a tensor of `shape`: the same rank, each extent divided by
    /// the elements that share a scale, rounded up.
    pub fn scale_shape(&self, shape: &Shape) -> Result<Shape> {
        let blocks = self.blocks(shape.rank())?;
        let dims = shape.0.iter().zip(blocks).map(|(&dim, block)| match (dim, block) {
            (_, None) => Ok(Dim::Static(1)),
            (dim, Some(1)) => Ok(dim),
            (Dim::Static(n), Some(b)) => Ok(Dim::Static(n.div_ceil(b))),
            (Dim::Sym(_), Some(b)) => {
                Err(Diag::input(format!("{self} cuts an extent that is not static into blocks of {b}")))
            }
        });
        Ok(Shape(dims.collect::<Result<_>>()?))
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "!q<{}:{} ", self.format.name, self.scale)?;
        match self.group {
            Group::Tensor => f.write_str("tensor")?,
            Group::Axis(axis) => write!(f, "axis {axis}")?,
            Group::Block { axis, size } => write!(f, "block {size}@{axis}")?,
            Group::Tile([rows, cols]) => write!(f, "tile {rows}x{cols}")?,
            Group::Token => f.write_str("token")?,
        }
        if let Zero::Point(format) = self.zero {
            write!(f, " zero {}", format.name)?;
        }
        f.write_str(">")
    }
}

impl Scheme {
    /// Reads `!q<int4:f16 block 128@1>`, the form in which schemes are written.
    pub fn parse(text: &str) -> Result<Scheme> {
        let bad = |why: String| {
            Diag::input(format!("`{text}` is not a scheme: {why}")).help(
                "write `!q<FORMAT:SCALE GROUP>` or `!q<FORMAT:SCALE GROUP zero FORMAT>`, with a group of \
                       `tensor`, `axis A`, `block N@A`, `tile RxC` or `token`",
            )
        };
        let inner = text.strip_prefix("!q<").and_then(|t| t.strip_suffix('>'));
        let inner = inner.ok_or_else(|| bad("it must lie between `!q<` and `>`".into()))?;
        let format = |name: &str| {
            Format::by_name(name).ok_or_else(|| {
                let near = crate::diag::near_misses(name, crate::formats::ALL.iter().map(|f| f.name));
                bad(format!("unknown format `{name}`; near: {near:?}"))
            })
        };
        let number = |t: &str| t.parse::<u32>().map_err(|_| bad(format!("`{t}` is not a number")));
        let axis = |t: &str| t.parse::<u8>().map_err(|_| bad(format!("`{t}` is not an axis")));
        let mut words = inner.split_ascii_whitespace();
        let mut word = |what: &str| words.next().ok_or_else(|| bad(format!("{what} is missing")));
        let head = word("the format")?;
        let (name, scale) = head.split_once(':').unwrap_or((head, "f32"));
        let scale_ty = Float::by_name(scale).ok_or_else(|| bad(format!("unknown scale type `{scale}`")))?;
        let group = match word("the group")? {
            "tensor" => Group::Tensor,
            "token" => Group::Token,
            "axis" => Group::Axis(axis(word("the axis")?)?),
            "block" => {
                let spec = word("the block size")?;
                let (size, at) =
                    spec.split_once('@').ok_or_else(|| bad(format!("`{spec}` is not `SIZE@AXIS`")))?;
                Group::Block { axis: axis(at)?, size: number(size)? }
            }
            "tile" => {
                let spec = word("the tile")?;
                let (r, c) =
                    spec.split_once('x').ok_or_else(|| bad(format!("`{spec}` is not `ROWSxCOLS`")))?;
                Group::Tile([number(r)?, number(c)?])
            }
            other => return Err(bad(format!("unknown group `{other}`"))),
        };
        let zero = match words.next() {
            None => Zero::Symmetric,
            Some("zero") => {
                Zero::Point(format(words.next().ok_or_else(|| bad("a format must follow `zero`".into()))?)?)
            }
            Some(other) => return Err(bad(format!("unexpected `{other}`"))),
        };
        match words.next() {
            None => Ok(Scheme { format: format(name)?, group, zero, scale: scale_ty }),
            Some(other) => Err(bad(format!("unexpected `{other}`"))),
        }
    }
}

impl serde::Serialize for Scheme {
    fn serialize<S: serde::Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        out.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Scheme {
    fn deserialize<D: serde::Deserializer<'de>>(input: D) -> Result<Scheme, D::Error> {
        let text = String::deserialize(input)?;
        Scheme::parse(&text).map_err(|e| serde::de::Error::custom(e.message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats;

    fn scheme(group: Group) -> Scheme {
        Scheme { format: &formats::INT4, group, zero: Zero::Symmetric, scale: Float::F16 }
    }

    #[test]
    fn scale_shapes() {
        let shape = Shape::fixed(&[6, 100]);
        let dims = |g| scheme(g).scale_shape(&shape).unwrap().dims().unwrap();
        assert_eq!(dims(Group::Tensor), [1, 1]);
        assert_eq!(dims(Group::Axis(0)), [6, 1]);
        assert_eq!(dims(Group::Block { axis: 1, size: 32 }), [6, 4]);
        assert_eq!(dims(Group::Tile([4, 64])), [2, 2]);
        assert_eq!(dims(Group::Token), [6, 1]);
        assert!(scheme(Group::Axis(2)).scale_shape(&shape).is_err());
        assert!(scheme(Group::Block { axis: 1, size: 0 }).scale_shape(&shape).is_err());
    }

    #[test]
    fn display() {
        assert_eq!(scheme(Group::Block { axis: 1, size: 128 }).to_string(), "!q<int4:f16 block 128@1>");
    }
}
