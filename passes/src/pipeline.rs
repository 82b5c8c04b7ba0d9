//! Pipelines: which passes run, in which order, with which options.
//!
//! ```text
//! pipeline := (element ("," element)*)?
//! element  := name options? | "layers" "(" pipeline ")" | "repeat" "(" pipeline ")"
//! options  := "{" key ("=" value)? ("," ..)* "}"
//! ```
//!
//! - `layers(a, b)` runs `a` then `b` on the first layer, then both on the second, and so on.
//! - A layer pass outside of `layers(..)` is shorthand for `layers(pass)`.
//! - A module without layers is one layer.
//! - `repeat(..)` runs its passes until none of them changes anything.
//!
//! [`parse`] reads the text, [`check`] resolves names and options and finds everything that can be wrong before any
//! weight is read. What is checked prints back fully spelled, and that text parses to the same pipeline.

mod check;
mod parse;

pub use check::{Checked, Step, check, check_given};
pub use parse::parse;

use quantc_ir::diag::Diag;
use std::fmt;
use std::ops::Range;

/// A pipeline as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pipeline {
    /// The text.
    pub text: String,
    /// Its elements in order.
    pub elements: Vec<Element>,
}

/// One element of a pipeline as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    /// Bytes of the text: the name of a pass, or the word before a group.
    pub at: Range<usize>,
    /// What it is.
    pub what: What,
}

/// What an element is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A pass, with the bytes of its options; the range is empty when there are none.
    Pass(Range<usize>),
    /// `layers(..)`.
    Layers(Vec<Element>),
    /// `repeat(..)`.
    Repeat(Vec<Element>),
}

impl Pipeline {
    /// A problem at `at`, shown under the line of the text.
    pub fn problem(&self, at: &Range<usize>, diag: Diag) -> Diag {
        point_at(&self.text, at, diag)
    }
}

/// Prints the pipeline with one space after each comma between passes; options stay as written.
impl fmt::Display for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        list(f, &self.elements, &|f, e| print(f, &self.text, e))
    }
}

fn print(f: &mut fmt::Formatter<'_>, text: &str, element: &Element) -> fmt::Result {
    f.write_str(&text[element.at.clone()])?;
    match &element.what {
        What::Pass(options) => f.write_str(&text[options.clone()]),
        What::Layers(inner) | What::Repeat(inner) => {
            f.write_str("(")?;
            list(f, inner, &|f, e| print(f, text, e))?;
            f.write_str(")")
        }
    }
}

type Printer<'a, T> = dyn Fn(&mut fmt::Formatter<'_>, &T) -> fmt::Result + 'a;

fn list<T>(f: &mut fmt::Formatter<'_>, items: &[T], one: &Printer<'_, T>) -> fmt::Result {
    for (i, item) in items.iter().enumerate() {
        f.write_str(if i > 0 { ", " } else { "" })?;
        one(f, item)?;
    }
    Ok(())
}

/// Adds to the message the line of `text` that holds `at`, with carets below.
fn point_at(text: &str, at: &Range<usize>, mut diag: Diag) -> Diag {
    let start = text[..at.start].rfind('\n').map_or(0, |i| i + 1);
    let end = text[at.start..].find('\n').map_or(text.len(), |i| at.start + i);
    let before = text[start..at.start].chars().count();
    let under = text[at.start..at.end.clamp(at.start, end)].chars().count().max(1);
    let line = text[start..end].replace('\t', " ");
    diag.message += &format!("\n  pipeline: {line}\n            {}{}", " ".repeat(before), "^".repeat(under));
    diag
}
