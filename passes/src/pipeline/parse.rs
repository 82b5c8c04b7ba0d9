//! From text to [`Pipeline`].

use super::{Element, Pipeline, What, point_at};
use quantc_ir::diag::{Diag, Result};
use std::ops::Range;

/// Groups inside groups, at most.
const DEPTH: usize = 16;

/// Reads a pipeline. Names and options are not looked at yet.
pub fn parse(text: &str) -> Result<Pipeline> {
    let mut parser = Parser { text, at: 0 };
    let elements = if parser.peek().is_none() { vec![] } else { parser.list(0)? };
    match parser.peek() {
        None => Ok(Pipeline { text: text.into(), elements }),
        Some(')') => Err(parser.wrong("there is no `(` for this `)`")),
        Some(_) => Err(parser.wrong("expected `,` or the end of the pipeline")),
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn list(&mut self, depth: usize) -> Result<Vec<Element>> {
        let mut elements = vec![self.element(depth)?];
        while self.peek() == Some(',') {
            self.at += 1;
            elements.push(self.element(depth)?);
        }
        Ok(elements)
    }

    fn element(&mut self, depth: usize) -> Result<Element> {
        self.peek();
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let rest = &self.text[self.at..];
        let len = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
        if len == 0 {
            return Err(self.wrong("expected the name of a pass"));
        }
        let at = self.at..self.at + len;
        self.at = at.end;
        let name = &self.text[at.clone()];
        let next = self.peek();
        if next == Some('(') {
            let make = match name {
                "layers" => What::Layers,
                "repeat" => What::Repeat,
                _ => {
                    let help = "options are written in braces, as in `name{key=value}`";
                    return Err(self
                        .wrong("only `layers` and `repeat` take passes in parentheses")
                        .help(help));
                }
            };
            if depth == DEPTH {
                return Err(self.wrong("groups are nested too deeply"));
            }
            let open = self.at;
            self.at += 1;
            let inner = self.list(depth + 1)?;
            match self.peek() {
                Some(')') => self.at += 1,
                Some(_) => return Err(self.wrong("expected `,` or `)`")),
                None => return Err(self.problem(open..open + 1, "there is no `)` for this `(`")),
            }
            return Ok(Element { at, what: make(inner) });
        }
        if matches!(name, "layers" | "repeat") {
            return Err(self.problem(at, format!("`{name}` needs passes in parentheses")));
        }
        let options = if next == Some('{') { self.options()? } else { at.end..at.end };
        Ok(Element { at, what: What::Pass(options) })
    }

    /// The bytes from `{` to its `}`, both included. Braces in quoted texts do not count.
    fn options(&mut self) -> Result<Range<usize>> {
        let open = self.at;
        let (mut depth, mut quoted, mut escaped) = (0usize, false, false);
        for (i, c) in self.text[open..].char_indices() {
            match c {
                _ if escaped => escaped = false,
                '\\' if quoted => escaped = true,
                '"' => quoted = !quoted,
                '{' if !quoted => depth += 1,
                '}' if !quoted => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                self.at = open + i + 1;
                return Ok(open..self.at);
            }
        }
        Err(self.problem(open..open + 1, "there is no `}` for this `{`"))
    }

    /// The next character that is not blank.
    fn peek(&mut self) -> Option<char> {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        rest.trim_start().chars().next()
    }

    /// A problem with the next character.
    fn wrong(&self, message: impl Into<String>) -> Diag {
        let len = self.text[self.at..].chars().next().map_or(0, char::len_utf8);
        self.problem(self.at..self.at + len, message)
    }

    fn problem(&self, at: Range<usize>, message: impl Into<String>) -> Diag {
        point_at(self.text, &at, Diag::pipeline(message))
    }
}
