//! Name filters of users.

use std::fmt;

/// A name filter: text with `*` for any run of characters.
///
/// It matches a name, and every name below it: `l0.mlp` matches `l0.mlp.up`, and so what passes derive from a weight
/// matches as the weight does.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Pattern(pub String);

impl Pattern {
    /// Whether `name` or something it lies below matches.
    pub fn matches(&self, name: &str) -> bool {
        let prefixes = name.match_indices('.').map(|(end, _)| &name[..end]);
        std::iter::once(name).chain(prefixes).any(|n| glob(self.0.as_bytes(), n.as_bytes()))
    }
}

impl From<&str> for Pattern {
    fn from(text: &str) -> Pattern {
        Pattern(text.into())
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is asked of lists of patterns.
pub trait Patterns {
    /// Whether one of them matches `name`.
    fn any_matches(&self, name: &str) -> bool;
}

impl Patterns for [Pattern] {
    fn any_matches(&self, name: &str) -> bool {
        self.iter().any(|p| p.matches(name))
    }
}

/// What the names are that a pattern filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameKind {
    /// Weights.
    Weight,
    /// Values of functions.
    Value,
    /// Layers.
    Layer,
}

impl fmt::Display for NameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NameKind::Weight => "weight",
            NameKind::Value => "value",
            NameKind::Layer => "layer",
        })
    }
}

/// A pattern of an option, and what it filters.
#[derive(Clone, Copy, Debug)]
pub struct PatternUse<'a> {
    /// The option's name in texts.
    pub option: &'static str,
    /// The pattern.
    pub pattern: &'a Pattern,
    /// What it filters.
    pub names: NameKind,
}

impl<'a> PatternUse<'a> {
    /// The uses of all patterns of one option.
    pub fn all(option: &'static str, patterns: &'a [Pattern], names: NameKind) -> Vec<PatternUse<'a>> {
        patterns.iter().map(|pattern| PatternUse { option, pattern, names }).collect()
    }

    /// The uses of the filters that passes on weights have in common: of weights `only` and `skip`, of layers `layers` and
    /// `skip-layers`.
    pub fn filters(
        only: &'a [Pattern],
        skip: &'a [Pattern],
        layers: &'a [Pattern],
        skip_layers: &'a [Pattern],
    ) -> Vec<PatternUse<'a>> {
        [
            PatternUse::all("only", only, NameKind::Weight),
            PatternUse::all("skip", skip, NameKind::Weight),
            PatternUse::all("layers", layers, NameKind::Layer),
            PatternUse::all("skip-layers", skip_layers, NameKind::Layer),
        ]
        .concat()
    }
}

/// Matches bytes with `*` for any run, in time of the product of the lengths at worst.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    // Where to go back to: after the last star, and the first byte that it has not swallowed.
    let mut retry = None;
    while n < name.len() {
        if pattern.get(p) == Some(&b'*') {
            retry = Some((p + 1, n));
            p += 1;
        } else if pattern.get(p) == Some(&name[n]) {
            p += 1;
            n += 1;
        } else if let Some((star, at)) = retry {
            retry = Some((star, at + 1));
            p = star;
            n = at + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_match_runs() {
        let m = |p: &str, n: &str| Pattern::from(p).matches(n);
        assert!(m("*.down.*", "l3.down.weight"));
        assert!(m("l*.down", "l3.down.smoothed"));
        assert!(m("lm_head*", "lm_head"));
        assert!(m("l0.mlp", "l0.mlp.up.weight"));
        assert!(!m("l0.mlp", "l0.mlps.up"));
        assert!(!m("*.up", "l0.down"));
        assert!(!m("", "l0"));
        assert!(m("*a*b", "xxaaxb"));
        assert!(!m("*a*b", "xxaaxc"));
    }
}
