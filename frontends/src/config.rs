//! A typed reader of `config.json`: what is missing, of another type or out of range is noted with file and key, and
//! all of it is reported together.

use crate::json::{self, shown};
use quantc_ir::diag::{Diag, Diags, Loc, Result};
use serde_json::{Map, Value};
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::Path;

/// The longest configuration file that is read, in bytes.
const MAX_CONFIG: u64 = 16 << 20;

/// An object of a configuration file and the problems found in it so far.
///
/// A getter whose key is unusable notes why and answers with a value of the right type, so that one run finds every
/// problem; [`Config::finish`] then gives them.
#[derive(Debug)]
pub struct Config {
    file: String,
    /// What stands in front of keys in messages, for objects inside the file's.
    prefix: String,
    map: Map<String, Value>,
    /// Problems found so far.
    pub problems: Diags,
}

impl Config {
    /// Reads the object in the file at `path`.
    pub fn read(path: &Path) -> Result<Config> {
        let bytes = json::read_file(path, MAX_CONFIG)?;
        Config::parse(&path.display().to_string(), &bytes)
    }

    /// Reads the object in `bytes`, the content of the file called `file`.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Config> {
        Ok(Config {
            file: file.into(),
            prefix: String::new(),
            map: json::object(file, bytes)?,
            problems: Diags::default(),
        })
    }

    /// The value of `key`; none when it is absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Whether `key` is given, be it null.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The keys of the object, in the file's order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// A problem with `key`, not noted yet.
    pub fn problem(&self, key: &str, what: impl Display) -> Diag {
        let key = format!("{}{key}", self.prefix);
        Diag::input(format!("`{key}` {what}")).in_file(&self.file).at(Loc::Item(format!("key `{key}`")))
    }

    /// Notes a problem with `key`.
    pub fn note(&mut self, key: &str, what: impl Display) {
        let diag = self.problem(key, what);
        self.problems.push(diag);
    }

    /// A whole number that must be given.
    pub fn int(&mut self, key: &str, range: RangeInclusive<u64>) -> u64 {
        let low = *range.start();
        match self.opt_int(key, range) {
            Some(n) => n,
            None => {
                if self.get(key).is_none() {
                    self.note(key, "is missing");
                }
                low
            }
        }
    }

    /// A whole number, or `default` when it is absent or null.
    pub fn int_or(&mut self, key: &str, range: RangeInclusive<u64>, default: u64) -> u64 {
        self.opt_int(key, range).unwrap_or(default)
    }

    /// A whole number; none when it is absent, null or unusable.
    pub fn opt_int(&mut self, key: &str, range: RangeInclusive<u64>) -> Option<u64> {
        let value = self.get(key)?;
        match value.as_u64() {
            Some(n) if range.contains(&n) => Some(n),
            Some(n) => {
                let (low, high) = (range.start(), range.end());
                self.note(key, format!("is {n}, expected {low} to {high}"));
                None
            }
            None => self.ill_typed(key, "a whole number"),
        }
    }

    /// A finite number greater than zero that must be given.
    pub fn positive(&mut self, key: &str) -> f64 {
        let found = self.opt_positive(key);
        if found.is_none() && self.get(key).is_none() {
            self.note(key, "is missing");
        }
        found.unwrap_or(1.0)
    }

    /// A finite number greater than zero; none when it is absent, null or unusable.
    pub fn opt_positive(&mut self, key: &str) -> Option<f64> {
        let value = self.get(key)?;
        match value.as_f64() {
            Some(x) if x.is_finite() && x > 0.0 => Some(x),
            Some(x) => {
                self.note(key, format!("is {x}, expected a number above zero"));
                None
            }
            None => self.ill_typed(key, "a number"),
        }
    }

    /// A truth value, or `default` when it is absent or null.
    pub fn bool_or(&mut self, key: &str, default: bool) -> bool {
        let Some(value) = self.get(key) else { return default };
        value.as_bool().or_else(|| self.ill_typed(key, "true or false")).unwrap_or(default)
    }

    /// A text; none when it is absent, null or of another type.
    pub fn text(&mut self, key: &str) -> Option<String> {
        let value = self.get(key)?;
        match value.as_str() {
            Some(s) => Some(s.into()),
            None => self.ill_typed(key, "a text"),
        }
    }

    /// A list of texts; none when it is absent, null or of another type.
    pub fn texts(&mut self, key: &str) -> Option<Vec<String>> {
        let value = self.get(key)?;
        let list = value.as_array().and_then(|l| l.iter().map(|v| v.as_str().map(String::from)).collect());
        list.or_else(|| self.ill_typed(key, "a list of texts"))
    }

    /// An id or a list of ids; empty when it is absent or null.
    pub fn ids(&mut self, key: &str) -> Vec<u32> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let Some(value) = self.get(key) else { return vec![] };
        let ids = match value {
            Value::Array(list) => list.iter().map(id).collect::<Option<Vec<u32>>>(),
            one => id(one).map(|n| vec![n]),
        };
        ids.or_else(|| self.ill_typed(key, "a token id or a list of them")).unwrap_or_default()
    }

    /// The object at `key` when it is one with entries; null and the empty object count as absent.
    pub fn object(&mut self, key: &str) -> Option<Config> {
        match self.get(key)?.clone() {
            Value::Object(map) if map.is_empty() => None,
            Value::Object(map) => Some(Config {
                file: self.file.clone(),
                prefix: format!("{}{key}.", self.prefix),
                map,
                problems: Diags::default(),
            }),
            _ => self.ill_typed(key, "an object"),
        }
    }

    /// Takes over the problems found in an object inside.
    pub fn absorb(&mut self, inner: Config) {
        self.problems.0.extend(inner.problems.0);
    }

    /// The problems found, if any.
    pub fn finish(&mut self) -> Result<(), Diags> {
        std::mem::take(&mut self.problems).into_result(())
    }

    fn ill_typed<T>(&mut self, key: &str, want: &str) -> Option<T> {
        let got = self.get(key).map(|v| shown(&v.to_string())).unwrap_or_default();
        self.note(key, format!("is {got}, expected {want}"));
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_collected_with_file_and_key() {
        let text = br#"{"a": 3, "b": "x", "c": null, "d": {"e": -1}, "f": [1, 2], "g": 2.0, "h": 99}"#;
        let mut c = Config::parse("config.json", text).unwrap();
        assert_eq!((c.int("a", 1..=9), c.int_or("c", 1..=9, 7), c.ids("f")), (3, 7, vec![1, 2]));
        c.int("b", 1..=9);
        c.int("c", 1..=9);
        c.int("g", 1..=9);
        c.int("h", 1..=9);
        c.bool_or("a", true);
        let mut d = c.object("d").unwrap();
        d.positive("e");
        c.absorb(d);
        let all = c.finish().unwrap_err().to_string();
        for want in [
            "`b` is \"x\", expected a whole number\n  in: config.json, key `b`",
            "`c` is missing",
            "`g` is 2.0, expected a whole number",
            "`h` is 99, expected 1 to 9",
            "`a` is 3, expected true or false",
            "`d.e` is -1, expected a number above zero",
        ] {
            assert!(all.contains(want), "{want} not in {all}");
        }
        assert!(c.finish().is_ok());
    }
}
