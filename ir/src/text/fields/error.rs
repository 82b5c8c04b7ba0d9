//! Why fields do not fill a struct, in words for people.

use super::lexer::{self, Pos};
use crate::diag::{Diag, near_misses};
use serde::{de, ser};
use std::fmt::{self, Display};

/// Why fields do not fill a struct, and where.
#[derive(Debug)]
pub struct FieldError {
    pos: Option<Pos>,
    message: String,
    help: Option<String>,
    /// Whether the message says which field it is about.
    named: bool,
}

impl FieldError {
    pub(super) fn new(message: impl Into<String>) -> FieldError {
        FieldError { pos: None, message: message.into(), help: None, named: false }
    }

    pub(super) fn at(mut self, pos: Pos) -> FieldError {
        self.pos.get_or_insert(pos);
        self
    }

    pub(super) fn of_field(mut self, key: &str) -> FieldError {
        if !self.named {
            self.message = format!("field `{key}`: {}", self.message);
            self.named = true;
        }
        self
    }

    /// The error as a diagnostic.
    pub fn into_diag(self) -> Diag {
        let mut diag = Diag::input(self.message);
        diag.help = self.help;
        match self.pos {
            Some(pos) => diag.at(pos.loc()),
            None => diag,
        }
    }
}

impl Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for FieldError {}

fn did_you_mean(name: &str, known: &'static [&'static str]) -> Option<String> {
    let near = near(name, known.iter().copied());
    (!near.is_empty()).then_some(near)
}

/// `did you mean ..?`, or nothing.
pub(crate) fn near<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    // One letter is near to any other; long names are machine-made, and comparing them is slow.
    if name.len() < 2 || name.len() > 80 {
        return String::new();
    }
    let near: Vec<String> = near_misses(name, known.into_iter().filter(|k| k.len() <= 80))
        .into_iter()
        .map(|k| format!("`{k}`"))
        .collect();
    if near.is_empty() { String::new() } else { format!("did you mean {}?", near.join(" or ")) }
}

impl de::Error for FieldError {
    fn custom<T: Display>(message: T) -> FieldError {
        FieldError::new(message.to_string())
    }

    fn invalid_type(got: de::Unexpected<'_>, expected: &dyn de::Expected) -> FieldError {
        let expected = match expected.to_string().as_str() {
            "f32" | "f64" => "a number".to_string(),
            "a boolean" => "`true` or `false`".to_string(),
            int if int.len() <= 5 && int.starts_with(['i', 'u']) => format!("a whole number of type {int}"),
            other => other.to_string(),
        };
        let got = match got {
            de::Unexpected::Str(text) => format!("`{}`", lexer::shorten(text)),
            de::Unexpected::Bool(b) => format!("`{b}`"),
            de::Unexpected::Signed(n) => format!("`{n}`"),
            de::Unexpected::Unsigned(n) => format!("`{n}`"),
            de::Unexpected::Float(x) => format!("`{}`", lexer::float_text(x)),
            de::Unexpected::Seq => "a list".to_string(),
            de::Unexpected::Map => "fields".to_string(),
            other => other.to_string(),
        };
        FieldError::new(format!("expected {expected}, got {got}"))
    }

    fn invalid_value(got: de::Unexpected<'_>, expected: &dyn de::Expected) -> FieldError {
        Self::invalid_type(got, expected)
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> FieldError {
        let help = did_you_mean(field, expected);
        let field = lexer::shorten(field);
        let message = match expected {
            [] => format!("unknown field `{field}`, there are no fields"),
            _ => format!("unknown field `{field}`, expected {}", one_of(expected)),
        };
        FieldError { help, named: true, ..FieldError::new(message) }
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> FieldError {
        let help = did_you_mean(variant, expected);
        let message = format!("unknown word `{}`, expected {}", lexer::shorten(variant), one_of(expected));
        FieldError { help, ..FieldError::new(message) }
    }

    fn missing_field(field: &'static str) -> FieldError {
        FieldError { named: true, ..FieldError::new(format!("the field `{field}` is missing")) }
    }
}

impl ser::Error for FieldError {
    fn custom<T: Display>(message: T) -> FieldError {
        FieldError::new(message.to_string())
    }
}

pub(super) fn one_of(names: &[&str]) -> String {
    match names {
        [a] => format!("`{a}`"),
        [a, b] => format!("`{a}` or `{b}`"),
        _ => format!("one of {}", names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")),
    }
}
