//! Options that passes which quantize have in common.

use quantc_ir::diag::{Diag, Result, near_misses};
use quantc_ir::formats::{self, Class, Format};
use quantc_ir::quant::ScaleRule;
use quantc_ir::scheme::{Group, Scheme, Zero};
use quantc_ir::ty::Float;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// A number format by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FormatName(
    /// The format.
    pub &'static Format,
);

impl fmt::Display for FormatName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name)
    }
}

impl Serialize for FormatName {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        out.serialize_str(self.0.name)
    }
}

impl<'de> Deserialize<'de> for FormatName {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<FormatName, D::Error> {
        let name = String::deserialize(input)?;
        Format::by_name(&name).map(FormatName).ok_or_else(|| {
            let near = near_misses(&name, formats::ALL.iter().map(|f| f.name));
            let near = if near.is_empty() {
                String::new()
            } else {
                format!(", did you mean {}?", crate::pass::quoted(&near))
            };
            serde::de::Error::custom(format!("unknown format `{name}`{near}"))
        })
    }
}

/// Which elements of a weight share a scale: `row`, `tensor`, the number of columns, or `RxC`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Grouping {
    /// One scale per row, that is per output channel.
    #[default]
    Row,
    /// One scale for all.
    Tensor,
    /// Runs of this many columns of a row.
    Columns(u32),
    /// Tiles of so many rows and columns.
    Tile([u32; 2]),
}

impl Grouping {
    /// The group of a scheme for matrices.
    pub fn group(self) -> Group {
        match self {
            Grouping::Row => Group::Axis(0),
            Grouping::Tensor => Group::Tensor,
            Grouping::Columns(size) => Group::Block { axis: 1, size },
            Grouping::Tile(tile) => Group::Tile(tile),
        }
    }
}

impl Serialize for Grouping {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        match self {
            Grouping::Row => out.serialize_str("row"),
            Grouping::Tensor => out.serialize_str("tensor"),
            Grouping::Columns(n) => out.serialize_u32(*n),
            Grouping::Tile([r, c]) => out.collect_str(&format_args!("{r}x{c}")),
        }
    }
}

impl<'de> Deserialize<'de> for Grouping {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Grouping, D::Error> {
        let text = String::deserialize(input)?;
        let number = |t: &str| t.parse::<u32>().ok().filter(|&n| n > 0);
        let tile = || text.split_once('x').and_then(|(r, c)| Some(Grouping::Tile([number(r)?, number(c)?])));
        match text.as_str() {
            "row" => Some(Grouping::Row),
            "tensor" => Some(Grouping::Tensor),
            _ => number(&text).map(Grouping::Columns).or_else(tile),
        }
        .ok_or_else(|| {
            serde::de::Error::custom(format!(
                "`{text}` is no group, expected `row`, `tensor`, a number of columns above 0, or a tile such as \"16x64\""
            ))
        })
    }
}

/// Whether groups have zero points.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ZeroPoints {
    /// Code 0 is zero.
    #[default]
    Symmetric,
    /// The codes of each group cover its range.
    Asymmetric,
}

/// The type of scales.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleType {
    /// `bf16` for groups smaller than a row, `f32` for larger ones and for integers of fewer than 4 bits.
    #[default]
    Auto,
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// The upper half of an IEEE single.
    Bf16,
}

/// Which range a scale covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RangeSearch {
    /// The range of the group.
    #[default]
    None,
    /// The part of it with the least squared error.
    Mse,
    /// The same, weighted by the energy of the columns' rows.
    Diagonal,
    /// The part of it with the least error in the output.
    Output,
}

/// The scheme of weights with these options. Asymmetric integers of 4 and 8 bits are stored unsigned.
pub fn scheme(format: FormatName, group: Grouping, zero: ZeroPoints, scale: ScaleType) -> Result<Scheme> {
    let format = format.0;
    let refuse = |why: &str| Diag::pipeline(format!("weights cannot be stored as `{format}`: {why}"));
    let within_row = matches!(group, Grouping::Columns(_) | Grouping::Tile(_));
    let scale = match scale {
        // The largest number of a 2- or 3-bit group lies on the edge between two codes: a rounded scale moves it over.
        ScaleType::Auto if within_row && format.bits >= 4 => Float::Bf16,
        ScaleType::Auto | ScaleType::F32 => Float::F32,
        ScaleType::F16 => Float::F16,
        ScaleType::Bf16 => Float::Bf16,
    };
    let symmetric = Scheme { format, group: group.group(), zero: Zero::Symmetric, scale };
    if format.bits > 8 {
        return Err(refuse("it has more than 8 bits").help("use `cast-weights`"));
    }
    match (format.class, zero) {
        (Class::Exponent, _) => Err(refuse("it has no negative numbers and no zero")),
        (Class::Float { .. }, ZeroPoints::Asymmetric) => {
            Err(refuse("only integers have zero points").help("use `zero=symmetric`"))
        }
        (Class::Int { signed: false }, ZeroPoints::Symmetric) => {
            Err(refuse("it has no negative numbers").help("use `zero=asymmetric`, or the signed format"))
        }
        (_, ZeroPoints::Symmetric) => Ok(symmetric),
        (Class::Int { .. }, ZeroPoints::Asymmetric) => {
            let unsigned = |f: &&&Format| f.bits == format.bits && f.class == (Class::Int { signed: false });
            let format = formats::ALL.iter().find(unsigned).copied().unwrap_or(format);
            Ok(Scheme { format, zero: Zero::Point(format), ..symmetric })
        }
    }
}

/// Refuses rules that do not go with a scheme.
pub fn check_rule(rule: ScaleRule, scheme: &Scheme) -> Result<()> {
    if rule == ScaleRule::Mx && scheme.zero != Zero::Symmetric {
        return Err(Diag::pipeline("OCP MX has no zero points").help("use `zero=symmetric`"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use quantc_ir::text::fields::{Fields, from_fields, to_fields};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Both {
        format: FormatName,
        group: Grouping,
    }

    #[test]
    fn options_print_back() {
        for text in
            ["{format=int4, group=128}", "{format=e4m3, group=row}", "{format=uint8, group=\"16x64\"}"]
        {
            let both: Both = from_fields(&Fields::parse(text).unwrap()).unwrap();
            assert_eq!(
                from_fields::<Both>(&Fields::parse(&to_fields(&both).to_string()).unwrap()).unwrap(),
                both
            );
        }
        for text in ["{format=int5, group=row}", "{format=int4, group=0}", "{format=int4, group=\"4x\"}"] {
            assert!(from_fields::<Both>(&Fields::parse(text).unwrap()).is_err(), "{text}");
        }
    }

    #[test]
    fn schemes_follow_from_options() {
        let text = |format: &str, group, zero| {
            let format = FormatName(Format::by_name(format).unwrap());
            scheme(format, group, zero, ScaleType::Auto).map(|s| s.to_string()).map_err(|d| d.message)
        };
        use ZeroPoints::{Asymmetric, Symmetric};
        assert_eq!(text("int8", Grouping::Row, Symmetric).unwrap(), "!q<int8:f32 axis 0>");
        assert_eq!(
            text("int4", Grouping::Columns(64), Asymmetric).unwrap(),
            "!q<uint4:bf16 block 64@1 zero uint4>"
        );
        assert_eq!(text("int3", Grouping::Tensor, Asymmetric).unwrap(), "!q<int3:f32 tensor zero int3>");
        assert_eq!(text("int2", Grouping::Columns(32), Symmetric).unwrap(), "!q<int2:f32 block 32@1>");
        for (format, zero) in
            [("e4m3", Asymmetric), ("uint4", Symmetric), ("f16", Symmetric), ("e8m0", Symmetric)]
        {
            assert!(text(format, Grouping::Row, zero).is_err(), "{format}");
        }
    }
}
