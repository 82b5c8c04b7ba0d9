//! Names of contents: digests, and the recipes whose results they name.

use crate::diag::{Diag, Result};
use std::fmt;
use std::str::FromStr;

/// A BLAKE3 digest, written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = Diag;
    fn from_str(text: &str) -> Result<Digest> {
        let nibble = |c: u8| match c {
            b'0'..=b'9' => Some(c - b'0'),
            b'a'..=b'f' => Some(c - b'a' + 10),
            _ => None,
        };
        let parse = || {
            let digits: &[u8; 64] = text.as_bytes().try_into().ok()?;
            let mut out = [0; 32];
            for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
                *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
            }
            Some(Digest(out))
        };
        parse().ok_or_else(|| Diag::input("a digest is 64 hexadecimal digits in lower case"))
    }
}

impl TryFrom<String> for Digest {
    type Error = Diag;
    fn try_from(text: String) -> Result<Digest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

/// Everything that decides the bytes of a derived weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// The step, e.g. the name of a pass.
    pub step: &'static str,
    /// Counts up when the step's results change.
    pub version: u32,
    /// The step's options as text, with everything else that matters (for example calibration digests).
    pub options: String,
    /// Digests of the weights it reads, in order.
    pub inputs: Vec<Digest>,
}

impl Recipe {
    /// The name of the recipe: the same in every run and on every machine.
    pub fn digest(&self) -> Digest {
        let mut h = Fields::new("quantc recipe 1");
        h.field(self.step.as_bytes());
        h.field(&self.version.to_le_bytes());
        h.field(self.options.as_bytes());
        for input in &self.inputs {
            h.field(&input.0);
        }
        h.finish()
    }
}

/// Hashes fields with their lengths, so that no two lists of fields hash alike by being joined differently.
pub(super) struct Fields(blake3::Hasher);

impl Fields {
    /// Hashes for the purpose called `domain`.
    pub(super) fn new(domain: &str) -> Fields {
        let mut h = Fields(blake3::Hasher::new());
        h.field(domain.as_bytes());
        h
    }
    /// Adds a field.
    pub(super) fn field(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }
    /// The digest of the fields so far.
    pub(super) fn finish(self) -> Digest {
        Digest(*self.0.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_round_trips_and_refuses_the_rest() {
        let d = Digest::of(b"weights");
        assert_eq!(d.to_string().parse::<Digest>().unwrap(), d);
        for bad in ["", "00", &"g".repeat(64), &"A".repeat(64), &"é".repeat(32), &"0".repeat(65)] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn digests_are_blake3() {
        let empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(Digest::of(b"").to_string(), empty);
    }

    #[test]
    fn every_field_of_a_recipe_matters() {
        let base =
            Recipe { step: "gptq", version: 1, options: "bits=4".into(), inputs: vec![Digest::of(b"a")] };
        let variants = [
            Recipe { step: "gpt", options: "qbits=4".into(), ..base.clone() },
            Recipe { version: 2, ..base.clone() },
            Recipe { options: "bits=3".into(), ..base.clone() },
            Recipe { inputs: vec![], ..base.clone() },
            Recipe { inputs: vec![Digest::of(b"a"), Digest::of(b"b")], ..base.clone() },
            Recipe { inputs: vec![Digest::of(b"b"), Digest::of(b"a")], ..base.clone() },
        ];
        let mut seen: Vec<Digest> = variants.iter().map(Recipe::digest).collect();
        seen.push(base.digest());
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 7);
        assert_eq!(base.digest(), base.clone().digest());
    }
}
