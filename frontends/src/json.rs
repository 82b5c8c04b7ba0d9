//! JSON files, read strictly: sizes and nesting are bounded, and a key given twice is an error rather than a choice.

use quantc_ir::diag::{Diag, Loc, Result};
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Nesting allowed in any JSON file; real ones have five levels.
const MAX_DEPTH: u32 = 48;

/// The whole of a plain file of at most `limit` bytes.
pub(crate) fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let name = path.display().to_string();
    let failed = |e: std::io::Error| {
        let of = if e.kind() == std::io::ErrorKind::NotFound { Diag::input } else { Diag::system };
        of(format!("cannot read the file: {e}")).in_file(name.clone())
    };
    // The kind is asked for before the file is opened: opening a pipe would wait for its writer.
    let meta = std::fs::metadata(path).map_err(failed)?;
    if !meta.is_file() {
        return Err(Diag::input("this is not a plain file").in_file(name));
    }
    let too_large = || {
        Diag::input(format!("the file has more than the {limit} bytes that such a file may have"))
            .in_file(path.display().to_string())
    };
    if meta.len() > limit {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize);
    File::open(path).and_then(|f| f.take(limit + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > limit { Err(too_large()) } else { Ok(bytes) }
}

/// Reads a JSON object from `bytes`, the content of the file called `file`.
pub(crate) fn object(file: &str, bytes: &[u8]) -> Result<Map<String, Value>> {
    match parse(file, bytes, Strict { depth: 0 })? {
        Value::Object(map) => Ok(map),
        _ => Err(Diag::input("the file does not hold a JSON object").in_file(file).at(text_start())),
    }
}

/// Reads what `seed` describes from the JSON text `bytes`. Problems carry line and column.
pub(crate) fn parse<'de, S: DeserializeSeed<'de>>(file: &str, bytes: &'de [u8], seed: S) -> Result<S::Value> {
    let mut input = serde_json::Deserializer::from_slice(bytes);
    let value = seed.deserialize(&mut input).and_then(|v| input.end().map(|()| v));
    value.map_err(|e| {
        let (line, col) = (e.line().max(1), e.column().max(1));
        let clip = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Diag::input(message(&e)).in_file(file).at(Loc::Text { line: clip(line), col: clip(col) })
    })
}

/// The byte position in `bytes` of a place given as line and column.
pub(crate) fn byte_of(bytes: &[u8], loc: &Loc) -> u64 {
    let Loc::Text { line, col } = *loc else { return 0 };
    let before =
        bytes.split_inclusive(|&b| b == b'\n').take(line as usize - 1).map(<[u8]>::len).sum::<usize>();
    (before + col as usize - 1).min(bytes.len()) as u64
}

/// The problem without its place, which is reported apart.
fn message(e: &serde_json::Error) -> String {
    let text = e.to_string();
    let place = format!(" at line {} column {}", e.line(), e.column());
    text.strip_suffix(&place).map(String::from).unwrap_or(text)
}

fn text_start() -> Loc {
    Loc::Text { line: 1, col: 1 }
}

/// Reads any value, refusing deep nesting and repeated keys.
struct Strict {
    depth: u32,
}

impl Strict {
    fn inner<E: serde::de::Error>(&self) -> Result<Strict, E> {
        if self.depth == MAX_DEPTH {
            return Err(E::custom(format!("values are nested more than {MAX_DEPTH} deep")));
        }
        Ok(Strict { depth: self.depth + 1 })
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Value, D::Error> {
        input.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_bool<E>(self, x: bool) -> Result<Value, E> {
        Ok(x.into())
    }
    fn visit_u64<E>(self, x: u64) -> Result<Value, E> {
        Ok(x.into())
    }
    fn visit_i64<E>(self, x: i64) -> Result<Value, E> {
        Ok(x.into())
    }
    fn visit_f64<E>(self, x: f64) -> Result<Value, E> {
        Ok(x.into())
    }
    fn visit_str<E>(self, x: &str) -> Result<Value, E> {
        Ok(x.into())
    }
    fn visit_string<E>(self, x: String) -> Result<Value, E> {
        Ok(x.into())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut out = vec![];
        while let Some(x) = seq.next_element_seed(self.inner()?)? {
            out.push(x);
        }
        Ok(out.into())
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut out = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if out.contains_key(&key) {
                return Err(A::Error::custom(format!("the key `{}` is given twice", shown(&key))));
            }
            let value = map.next_value_seed(self.inner()?)?;
            out.insert(key, value);
        }
        Ok(out.into())
    }
}

/// Reads an object whose values are all strings, in order of key.
pub(crate) struct Strings;

impl<'de> DeserializeSeed<'de> for Strings {
    type Value = Vec<(String, String)>;
    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Self::Value, D::Error> {
        input.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Strings {
    type Value = Vec<(String, String)>;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of strings")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut out = vec![];
        let mut seen = BTreeSet::new();
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format!("the key `{}` is given twice", shown(&key))));
            }
            out.push((key, value));
        }
        out.sort();
        Ok(out)
    }
}

/// A name from a file, fit for a message: without control characters and not longer than a line.
pub(crate) fn shown(name: &str) -> String {
    const MOST: usize = 120;
    let clean = |c: char| if c.is_control() { '\u{FFFD}' } else { c };
    let mut out: String = name.chars().take(MOST).map(clean).collect();
    if name.chars().nth(MOST).is_some() {
        out.push_str("..");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_read_strictly() {
        let read = |text: &str| object("f.json", text.as_bytes());
        assert_eq!(read(r#"{"a": [1, -2, 0.5, null, true, "x"]}"#).unwrap()["a"][1], -2);
        let twice = read("{\n  \"a\": 1,\n  \"a\": 2}").unwrap_err();
        assert_eq!(
            (twice.message.as_str(), &twice.loc),
            ("the key `a` is given twice", &Loc::Text { line: 3, col: 5 })
        );
        assert_eq!(byte_of(b"{\n  \"a\": 1,\n  \"a\": 2}", &twice.loc), 16);
        assert!(read("[1]").unwrap_err().message.contains("object"));
        assert!(read("{} x").unwrap_err().message.contains("trailing"));
        assert!(read(r#"{"a": NaN}"#).is_err());
        let deep = format!("{{\"a\": {}{}}}", "[".repeat(60), "]".repeat(60));
        assert!(read(&deep).unwrap_err().message.contains("nested"));
    }

    #[test]
    fn only_plain_files_of_bounded_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read_file(&path, 5).unwrap(), b"12345");
        assert!(read_file(&path, 4).unwrap_err().message.contains("more than the 4 bytes"));
        assert!(read_file(dir.path(), 4).unwrap_err().message.contains("not a plain file"));
        assert!(read_file(&dir.path().join("b"), 4).unwrap_err().message.contains("cannot read"));
    }

    #[test]
    fn names_in_messages_are_tame() {
        assert_eq!(shown("a\u{1b}[0m\n"), "a\u{FFFD}[0m\u{FFFD}");
        assert_eq!(shown(&"x".repeat(500)).len(), 122);
    }
}
