//! The header of a safetensors file, checked whole before anything relies on it.
//!
//! A file is eight bytes of little-endian header length, a JSON header, and one buffer. What holds for a [`Header`]:
//! - the header lies inside the file and is no longer than [`MAX_HEADER`];
//! - no name, and no key of an entry, occurs twice; every element type is known; `__metadata__` maps strings to
//!   strings;
//! - each tensor's bytes are as many as its shape and element type say;
//! - the tensors cover the buffer exactly: no overlap, no hole, nothing behind the last one.

use crate::json::{self, shown};
use quantc_ir::diag::{Diag, Loc, Result};
use quantc_ir::ty::Float;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The longest header that is read, in bytes.
pub const MAX_HEADER: u64 = 100_000_000;

/// The highest rank of a tensor.
const MAX_RANK: usize = 16;

/// An element type of the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dtype {
    /// The name in the header.
    pub name: &'static str,
    /// Bits of one element.
    pub bits: u32,
}

/// Every element type of the container.
const DTYPES: &[Dtype] = &[
    Dtype { name: "BOOL", bits: 8 },
    Dtype { name: "F4", bits: 4 },
    Dtype { name: "F6_E2M3", bits: 6 },
    Dtype { name: "F6_E3M2", bits: 6 },
    Dtype { name: "U8", bits: 8 },
    Dtype { name: "I8", bits: 8 },
    Dtype { name: "F8_E5M2", bits: 8 },
    Dtype { name: "F8_E4M3", bits: 8 },
    Dtype { name: "F8_E8M0", bits: 8 },
    Dtype { name: "F8_E4M3FNUZ", bits: 8 },
    Dtype { name: "F8_E5M2FNUZ", bits: 8 },
    Dtype { name: "I16", bits: 16 },
    Dtype { name: "U16", bits: 16 },
    Dtype { name: "F16", bits: 16 },
    Dtype { name: "BF16", bits: 16 },
    Dtype { name: "I32", bits: 32 },
    Dtype { name: "U32", bits: 32 },
    Dtype { name: "F32", bits: 32 },
    Dtype { name: "C64", bits: 64 },
    Dtype { name: "F64", bits: 64 },
    Dtype { name: "I64", bits: 64 },
    Dtype { name: "U64", bits: 64 },
];

impl Dtype {
    /// The float type that weights of this type have; none for the others.
    pub fn float(self) -> Option<Float> {
        match self.name {
            "F32" => Some(Float::F32),
            "F16" => Some(Float::F16),
            "BF16" => Some(Float::Bf16),
            _ => None,
        }
    }

    /// Whether weights of this type are the work of a quantizer.
    pub fn is_quantized(self) -> bool {
        self.bits <= 8 && self.name != "BOOL" || matches!(self.name, "I16" | "U16" | "I32" | "U32")
    }
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the checkpoint.
    pub name: String,
    /// What the elements are.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<u64>,
    /// First byte in the file.
    pub at: u64,
    /// Number of bytes.
    pub len: u64,
}

/// What a safetensors file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The tensors in order of name.
    pub tensors: Vec<TensorInfo>,
    /// The file's notes on itself, in order of key.
    pub metadata: Vec<(String, String)>,
}

impl Header {
    /// Reads and checks the header of the file at `path`.
    pub fn read(path: &Path) -> Result<Header> {
        let name = path.display().to_string();
        let failed = |e: std::io::Error| {
            let of = if e.kind() == std::io::ErrorKind::NotFound { Diag::input } else { Diag::system };
            of(format!("cannot read the file: {e}")).in_file(name.clone())
        };
        let meta = std::fs::metadata(path).map_err(failed)?;
        if !meta.is_file() {
            return Err(Diag::input("this is not a plain file").in_file(name));
        }
        let mut file = File::open(path).map_err(failed)?;
        let mut start = Vec::with_capacity(8);
        file.by_ref().take(8).read_to_end(&mut start).map_err(failed)?;
        let len = header_len(&start, meta.len()).map_err(|d| d.in_file(&name))?;
        let mut text = Vec::with_capacity(len as usize);
        file.take(len).read_to_end(&mut text).map_err(failed)?;
        parse(&text, meta.len()).map_err(|d| d.in_file(&name))
    }

    /// Reads and checks the header of a file whose bytes are at hand.
    pub fn of_bytes(bytes: &[u8]) -> Result<Header> {
        let len = header_len(bytes, bytes.len() as u64)?;
        // The length was compared with the file's.
        parse(&bytes[8..8 + len as usize], bytes.len() as u64)
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        let at = self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok()?;
        Some(&self.tensors[at])
    }
}

/// The length of the header, which lies inside the file.
fn header_len(start: &[u8], file_len: u64) -> Result<u64> {
    let not_one = "this is not a safetensors file, or it is cut short";
    let Some(first) = start.first_chunk::<8>() else {
        return Err(Diag::input(format!("the file has {} bytes; {not_one}", start.len())).at(Loc::Byte(0)));
    };
    let len = u64::from_le_bytes(*first);
    let room = file_len.saturating_sub(8);
    if len > room {
        let text = format!("the header is said to have {len} bytes, but only {room} follow; {not_one}");
        return Err(Diag::input(text).at(Loc::Byte(0)));
    }
    if len > MAX_HEADER {
        let text = format!("the header has {len} bytes, more than the {MAX_HEADER} that are allowed");
        return Err(Diag::input(text).at(Loc::Byte(0)));
    }
    Ok(len)
}

/// Checks the header `text` of a file of `file_len` bytes.
fn parse(text: &[u8], file_len: u64) -> Result<Header> {
    if text.first() != Some(&b'{') {
        return Err(Diag::input("the header does not start with `{`").at(Loc::Byte(8)));
    }
    let buffer = 8 + text.len() as u64;
    let seed = HeaderSeed { buffer, room: file_len - buffer };
    let mut header = json::parse("", text, seed).map_err(|d| Diag {
        file: None,
        loc: Loc::Byte(8 + json::byte_of(text, &d.loc)),
        message: format!("the header is malformed: {}", d.message),
        ..d
    })?;
    check_cover(&header.tensors, buffer, file_len)?;
    header.tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(header)
}

/// Checks that the tensors cover the bytes from `buffer` to the end of the file, each byte once.
fn check_cover(tensors: &[TensorInfo], buffer: u64, file_len: u64) -> Result<()> {
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|t| (t.at, t.len));
    let mut end = buffer;
    let mut before: Option<&TensorInfo> = None;
    for t in order {
        let name = shown(&t.name);
        if t.at < end {
            let other = before.map_or(String::new(), |b| shown(&b.name));
            let text = format!("tensor `{name}` overlaps tensor `{other}`, which ends at byte {end}");
            return Err(Diag::input(text).at(Loc::Byte(t.at)));
        }
        if t.at > end {
            let text = format!("{} bytes in front of tensor `{name}` belong to no tensor", t.at - end);
            return Err(Diag::input(text).at(Loc::Byte(end)));
        }
        end = t.at + t.len;
        before = Some(t);
    }
    if end != file_len {
        let text = format!("{} bytes behind the last tensor belong to no tensor", file_len - end);
        return Err(Diag::input(text).at(Loc::Byte(end)));
    }
    Ok(())
}

/// Reads the header object.
struct HeaderSeed {
    /// Where the buffer starts in the file.
    buffer: u64,
    /// Bytes of the buffer.
    room: u64,
}

impl<'de> DeserializeSeed<'de> for HeaderSeed {
    type Value = Header;
    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Header, D::Error> {
        input.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed {
    type Value = Header;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header { tensors: vec![], metadata: vec![] };
        let mut seen = BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("tensor `{}` is listed twice", shown(&name))));
            }
            if name == "__metadata__" {
                header.metadata = map.next_value_seed(json::Strings)?;
                continue;
            }
            header.tensors.push(map.next_value_seed(EntrySeed { name, header: &self })?);
        }
        Ok(header)
    }
}

/// Reads the entry of one tensor.
struct EntrySeed<'a> {
    name: String,
    header: &'a HeaderSeed,
}

impl<'de> DeserializeSeed<'de> for EntrySeed<'_> {
    type Value = TensorInfo;
    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<TensorInfo, D::Error> {
        input.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed<'_> {
    type Value = TensorInfo;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "an object with dtype, shape and data_offsets for tensor `{}`", shown(&self.name))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TensorInfo, A::Error> {
        let name = shown(&self.name);
        let fail = |what: String| A::Error::custom(format!("tensor `{name}` {what}"));
        let (mut dtype, mut shape, mut range) = (None, None, None);
        while let Some(key) = map.next_key::<String>()? {
            let twice = match key.as_str() {
                "dtype" => dtype.replace(map.next_value::<String>()?).is_some(),
                "shape" => shape.replace(map.next_value::<Vec<u64>>()?).is_some(),
                "data_offsets" => range.replace(map.next_value::<[u64; 2]>()?).is_some(),
                other => return Err(fail(format!("has the unknown key `{}`", shown(other)))),
            };
            if twice {
                return Err(fail(format!("has the key `{key}` twice")));
            }
        }
        let missing = |key: &str| fail(format!("lacks the key `{key}`"));
        let dtype = dtype.ok_or_else(|| missing("dtype"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        let [begin, end] = range.ok_or_else(|| missing("data_offsets"))?;

        let known = DTYPES.iter().find(|d| d.name == dtype).copied();
        let dtype = known.ok_or_else(|| fail(format!("has the unknown element type `{}`", shown(&dtype))))?;
        if shape.len() > MAX_RANK {
            return Err(fail(format!("has {} axes, more than {MAX_RANK}", shape.len())));
        }
        let bits = shape.iter().try_fold(u64::from(dtype.bits), |n, &d| n.checked_mul(d));
        let bits = bits.ok_or_else(|| fail(format!("has the shape {shape:?}, which no memory holds")))?;
        if bits % 8 != 0 {
            return Err(fail(format!("of {} elements {shape:?} does not end on a byte", dtype.name)));
        }
        if begin > end || end > self.header.room {
            let room = self.header.room;
            return Err(fail(format!("lies at bytes {begin}..{end} of a buffer of {room} bytes")));
        }
        if end - begin != bits / 8 {
            let (have, need) = (end - begin, bits / 8);
            return Err(fail(format!("has {have} bytes, but {} {shape:?} takes {need}", dtype.name)));
        }
        Ok(TensorInfo { name: self.name, dtype, shape, at: self.header.buffer + begin, len: end - begin })
    }
}

/// The `weight_map` of a sharded checkpoint's index: which file holds which tensor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    /// File of each tensor, relative to the index.
    pub files: BTreeMap<String, String>,
}

impl Index {
    /// Reads the index in `bytes`, the content of the file called `file`.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Index> {
        let index = json::parse(file, bytes, IndexSeed)?;
        for (tensor, shard) in &index.files {
            if !is_plain_relative(shard) {
                let text = format!("tensor `{}` lies in `{}`", shown(tensor), shown(shard));
                return Err(Diag::input(text)
                    .in_file(file)
                    .at(Loc::Item("weight_map".into()))
                    .help("shards are files beside the index, named without `..` and not from the root"));
            }
        }
        if index.files.is_empty() {
            return Err(Diag::input("`weight_map` names no tensor")
                .in_file(file)
                .at(Loc::Item("weight_map".into())));
        }
        Ok(index)
    }
}

/// Whether a file name stays inside the directory it is relative to.
fn is_plain_relative(name: &str) -> bool {
    let parts = Path::new(name).components();
    let plain = |c| matches!(c, std::path::Component::Normal(_));
    !name.is_empty() && !name.contains(['\\', '\0']) && name.len() <= 1024 && parts.into_iter().all(plain)
}

struct IndexSeed;

impl<'de> DeserializeSeed<'de> for IndexSeed {
    type Value = Index;
    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Index, D::Error> {
        input.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for IndexSeed {
    type Value = Index;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object with a `weight_map`")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
        let mut files = None;
        while let Some(key) = map.next_key::<String>()? {
            if key != "weight_map" {
                map.next_value::<serde::de::IgnoredAny>()?;
                continue;
            }
            if files.replace(map.next_value_seed(json::Strings)?).is_some() {
                return Err(A::Error::custom("the key `weight_map` is given twice"));
            }
        }
        let files = files.ok_or_else(|| A::Error::custom("the key `weight_map` is missing"))?;
        Ok(Index { files: files.into_iter().collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of a header and `data` zero bytes.
    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header.as_bytes());
        out.resize(out.len() + data, 0);
        out
    }

    fn refusal(header: &str, data: usize) -> String {
        let d = Header::of_bytes(&file(header, data)).unwrap_err();
        format!("{} @ {}", d.message, d.loc)
    }

    #[test]
    fn a_header_is_read() {
        let text = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"I8","shape":[],"data_offsets":[8,9]},
            "a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},"c":{"dtype":"F4","shape":[0],"data_offsets":[9,9]}}   "#;
        let h = Header::of_bytes(&file(text, 9)).unwrap();
        assert_eq!(h.tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(h.metadata, [("format".into(), "pt".into())]);
        let a = h.tensor("a").unwrap();
        assert_eq!((a.dtype.float(), a.at, a.len), (Some(Float::F16), 8 + text.len() as u64, 8));
        assert!(h.tensor("b").unwrap().dtype.is_quantized());
        assert!(Header::of_bytes(&file("{}", 0)).unwrap().tensors.is_empty());
    }

    #[test]
    fn what_is_wrong_is_refused_where_it_is() {
        let entry = |dtype: &str, shape: &str, at: &str| {
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{at}}}}}"#)
        };
        let cases = [
            (entry("F5", "[1]", "[0,4]"), 4, "unknown element type `F5`"),
            (entry("F32", "[2]", "[0,4]"), 4, "tensor `a` has 4 bytes, but F32 [2] takes 8"),
            (entry("F32", "[4294967296,4294967296]", "[0,4]"), 4, "no memory holds"),
            (entry("F32", "[1]", "[4,0]"), 4, "lies at bytes 4..0"),
            (entry("F32", "[1]", "[4,8]"), 4, "buffer of 4 bytes"),
            (entry("F32", "[1]", "[4,8]"), 8, "4 bytes in front of tensor `a` belong to no tensor"),
            (entry("F32", "[1]", "[0,4]"), 6, "2 bytes behind the last tensor"),
            (entry("F4", "[1]", "[0,1]"), 1, "does not end on a byte"),
            (entry("F32", "[-1]", "[0,4]"), 4, "invalid value"),
            (entry("F32", "[1.5]", "[0,4]"), 4, "invalid type"),
            (entry("F32", "[1]", "[0,4,8]"), 4, "malformed"),
            (entry("F32", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, "17 axes"),
            (r#"{"a":{"dtype":"F32","shape":[1]}}"#.into(), 0, "lacks the key `data_offsets`"),
            (r#"{"a":{"dtype":"F32","dtype":"F32"}}"#.into(), 0, "has the key `dtype` twice"),
            (r#"{"a":{"kind":"F32"}}"#.into(), 0, "unknown key `kind`"),
            (r#"{"a":7}"#.into(), 0, "dtype, shape and data_offsets for tensor `a`"),
            (r#"{"__metadata__":{"a":1}}"#.into(), 0, "malformed"),
            (r#"{"__metadata__":{"a":"1","a":"2"}}"#.into(), 0, "`a` is given twice"),
            (r#"{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},"a":{}}"#.into(), 1, "listed twice"),
            ("[]".into(), 0, "does not start with `{` @ byte 8"),
            ("{} x".into(), 0, "trailing"),
        ];
        for (header, data, want) in cases {
            let got = refusal(&header, data);
            assert!(got.contains(want), "{header}: {got}");
        }
        let overlap = r#"{"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"I8","shape":[4],"data_offsets":[2,6]}}"#;
        assert!(refusal(overlap, 6).contains("tensor `b` overlaps tensor `a`"));
    }

    #[test]
    fn lengths_are_compared_with_the_file() {
        let of = |bytes: &[u8]| Header::of_bytes(bytes).unwrap_err().message;
        assert!(of(b"abc").contains("3 bytes"));
        assert!(of(&u64::MAX.to_le_bytes()).contains("only 0 follow"));
        assert!(header_len(&(MAX_HEADER + 1).to_le_bytes(), u64::MAX).is_err());
    }

    #[test]
    fn an_index_stays_in_its_directory() {
        let parse =
            |file: &str| Index::parse("i.json", format!(r#"{{"weight_map":{{"t":"{file}"}}}}"#).as_bytes());
        assert_eq!(parse("a.safetensors").unwrap().files["t"], "a.safetensors");
        for bad in ["../a", "/etc/passwd", "a/../../b", "", "a\\\\b", ".", "./a"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(Index::parse("i.json", b"{}").unwrap_err().message.contains("weight_map"));
        assert!(Index::parse("i.json", br#"{"weight_map":{}}"#).is_err());
    }
}
