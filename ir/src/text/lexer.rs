//! Cuts text into tokens, on demand.
//!
//! Nothing here fails: what is not a token becomes [`Tok::Bad`] with its reason, so that the parser meets it in its
//! place. Every step consumes at least one character, and a token borrows its text.

use crate::diag::Loc;
use std::borrow::Cow;
use std::fmt::{self, Write as _};

/// A place in a text. Lines and columns (in characters) count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pos {
    /// Bytes before it.
    pub byte: usize,
    /// The line.
    pub line: u32,
    /// The column.
    pub col: u32,
}

impl Pos {
    /// The start of a text.
    pub const START: Pos = Pos { byte: 0, line: 1, col: 1 };

    /// This place as diagnostics give it.
    pub fn loc(self) -> Loc {
        Loc::Text { line: self.line, col: self.col }
    }
}

impl Default for Pos {
    fn default() -> Pos {
        Pos::START
    }
}

/// What a token is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Tok<'a> {
    /// A bare word: `half`, `rope_table`, `a-b.c`, `4x64`, `l*.q`.
    Word(&'a str),
    /// Decimal digits with an optional minus.
    Int(&'a str),
    /// A decimal number with a fraction or an exponent.
    Float(&'a str),
    /// A quoted text, unescaped.
    Str(String),
    /// `%name`, without the sign.
    Value(Cow<'a, str>),
    /// `@name`, without the sign.
    Name(Cow<'a, str>),
    /// `!q<..>`, whole.
    Scheme(&'a str),
    /// Punctuation.
    Punct(&'static str),
    /// The end of the text.
    End,
    /// Not a token, and why.
    Bad(String),
}

impl fmt::Display for Tok<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Tok::Word(t) | Tok::Int(t) | Tok::Float(t) | Tok::Scheme(t) => write!(f, "`{}`", shorten(t)),
            Tok::Str(t) => write!(f, "`{}`", shorten(&quoted(t))),
            Tok::Value(t) => write!(f, "`%{}`", shorten(t)),
            Tok::Name(t) => write!(f, "`@{}`", shorten(t)),
            Tok::Punct(t) => write!(f, "`{t}`"),
            Tok::End => f.write_str("the end of the text"),
            Tok::Bad(why) => f.write_str(why),
        }
    }
}

/// Enough of a long text to recognize it.
pub(crate) fn shorten(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(60) {
        Some((end, _)) => Cow::Owned(format!("{}..", &text[..end])),
        None => Cow::Borrowed(text),
    }
}

/// A token and where it lies.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Token<'a> {
    pub(crate) tok: Tok<'a>,
    pub(crate) start: Pos,
    pub(crate) end: Pos,
}

/// A stream of tokens with one token in view.
#[derive(Clone)]
pub(crate) struct Tokens<'a> {
    text: &'a str,
    head: Token<'a>,
    /// Where the token before the one in view ends.
    last_end: Pos,
}

impl<'a> Tokens<'a> {
    /// Reads `text` from `at` on.
    pub(crate) fn new(text: &'a str, at: Pos) -> Tokens<'a> {
        Tokens { text, head: scan(text, at), last_end: at }
    }

    /// The token in view.
    pub(crate) fn peek(&self) -> &Tok<'a> {
        &self.head.tok
    }

    /// Where the token in view starts.
    pub(crate) fn pos(&self) -> Pos {
        self.head.start
    }

    /// Where the token taken last ends.
    pub(crate) fn last_end(&self) -> Pos {
        self.last_end
    }

    /// Takes the token in view.
    pub(crate) fn bump(&mut self) -> Token<'a> {
        self.last_end = self.head.end;
        let next = scan(self.text, self.head.end);
        std::mem::replace(&mut self.head, next)
    }

    /// Takes the token in view when it is this punctuation.
    pub(crate) fn eat(&mut self, punct: &'static str) -> bool {
        let found = self.head.tok == Tok::Punct(punct);
        if found {
            self.bump();
        }
        found
    }

    /// The text that follows the token in view on its line.
    pub(crate) fn rest_of_line(&self) -> &'a str {
        let rest = &self.text[self.head.end.byte..];
        rest.split('\n').next().unwrap_or(rest)
    }

    /// Takes the token in view and `len` bytes after it.
    pub(crate) fn skip_raw(&mut self, len: usize) {
        let mut cursor = Cursor { text: self.text, pos: self.head.end };
        cursor.advance(len);
        self.last_end = cursor.pos;
        self.head = scan(self.text, cursor.pos);
    }
}

struct Cursor<'a> {
    text: &'a str,
    pos: Pos,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.pos.byte..]
    }

    /// Moves over `len` bytes, which end on a character boundary.
    fn advance(&mut self, len: usize) -> &'a str {
        let over = &self.rest()[..len];
        for c in over.chars() {
            if c == '\n' {
                self.pos.line = self.pos.line.saturating_add(1);
                self.pos.col = 1;
            } else {
                self.pos.col = self.pos.col.saturating_add(1);
            }
        }
        self.pos.byte += len;
        over
    }

    fn skip_blanks(&mut self) {
        loop {
            let rest = self.rest();
            let blanks = rest.len() - rest.trim_start().len();
            self.advance(blanks);
            if !self.rest().starts_with("//") {
                return;
            }
            let comment = self.rest().find('\n').unwrap_or(self.rest().len());
            self.advance(comment);
        }
    }
}

const PUNCT: &[&str] =
    &["{-#", "#-}", "->", "..+", "{", "}", "[", "]", "(", ")", "<", ">", ",", "=", ":", "+"];

fn scan(text: &str, at: Pos) -> Token<'_> {
    let mut c = Cursor { text, pos: at };
    c.skip_blanks();
    let start = c.pos;
    let tok = scan_here(&mut c);
    Token { tok, start, end: c.pos }
}

fn scan_here<'a>(c: &mut Cursor<'a>) -> Tok<'a> {
    let rest = c.rest();
    let Some(first) = rest.chars().next() else { return Tok::End };
    if let Some(p) = PUNCT.iter().find(|p| rest.starts_with(**p)) {
        c.advance(p.len());
        return Tok::Punct(p);
    }
    let run = word_run(rest);
    if run > 0 {
        return classify(c.advance(run));
    }
    match first {
        '"' => string(c).map_or_else(Tok::Bad, Tok::Str),
        '%' | '@' => {
            c.advance(1);
            let name = match c.rest().starts_with('"') {
                true => string(c).map(Cow::Owned),
                false => match name_run(c.rest()) {
                    0 => Err(format!("`{first}` must be followed by a name")),
                    len => Ok(Cow::Borrowed(c.advance(len))),
                },
            };
            match name {
                Err(why) => Tok::Bad(why),
                Ok(name) if first == '%' => Tok::Value(name),
                Ok(name) => Tok::Name(name),
            }
        }
        '!' => match scheme_len(rest) {
            Some(len) => Tok::Scheme(c.advance(len)),
            None => {
                c.advance(1);
                Tok::Bad("`!` must start a scheme, as in `!q<int8:f32 token>`".into())
            }
        },
        other => {
            c.advance(other.len_utf8());
            Tok::Bad(format!("unexpected character {other:?}"))
        }
    }
}

/// Length of a scheme at the start of `rest`.
fn scheme_len(rest: &str) -> Option<usize> {
    let body = rest.strip_prefix("!q<")?;
    let end = body.find(['>', '\n'])?;
    body[end..].starts_with('>').then_some(end + 4)
}

fn is_word_char(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'_' | b'*' | b'?')
}

/// Length of the word or number at the start of `rest`; 0 when there is none. Dots and dashes lie inside a word only.
fn word_run(rest: &str) -> usize {
    let b = rest.as_bytes();
    let at = |i: usize| b.get(i).copied().unwrap_or(b' ');
    let number = at(usize::from(at(0) == b'-')).is_ascii_digit();
    let starts = is_word_char(at(0)) || (at(0) == b'-' && at(1).is_ascii_alphanumeric());
    if !starts {
        return 0;
    }
    let mut n = 1;
    loop {
        let inner = matches!(at(n), b'.' | b'-') && is_word_char(at(n + 1));
        let exponent =
            number && at(n) == b'+' && matches!(at(n - 1), b'e' | b'E') && at(n + 1).is_ascii_digit();
        if !is_word_char(at(n)) && !inner && !exponent {
            return n;
        }
        n += 1;
    }
}

/// Length of the name at the start of `rest`.
fn name_run(rest: &str) -> usize {
    let b = rest.as_bytes();
    let is_name = |i: usize| b.get(i).is_some_and(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'$'));
    let mut n = 0;
    while is_name(n) || (n > 0 && matches!(b.get(n), Some(b'.' | b'-')) && is_name(n + 1)) {
        n += 1;
    }
    n
}

fn classify(run: &str) -> Tok<'_> {
    let digits = |t: &str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
    let body = run.strip_prefix('-').unwrap_or(run);
    if digits(body) {
        return Tok::Int(run);
    }
    let (mantissa, exponent) = match body.split_once(['e', 'E']) {
        Some((m, e)) => (m, Some(e.strip_prefix(['+', '-']).unwrap_or(e))),
        None => (body, None),
    };
    let (whole, fraction) = match mantissa.split_once('.') {
        Some((w, f)) => (w, Some(f)),
        None => (mantissa, None),
    };
    if digits(whole) && fraction.is_none_or(digits) && exponent.is_none_or(digits) {
        Tok::Float(run)
    } else {
        Tok::Word(run)
    }
}

/// Reads a quoted text. It ends on its line.
fn string(c: &mut Cursor<'_>) -> Result<String, String> {
    c.advance(1);
    let mut out = String::new();
    loop {
        let Some(ch) = c.rest().chars().next().filter(|&ch| ch != '\n') else {
            return Err("a quoted text does not end on its line".into());
        };
        c.advance(ch.len_utf8());
        match ch {
            '"' => return Ok(out),
            '\\' => out.push(escape(c)?),
            ch => out.push(ch),
        }
    }
}

fn escape(c: &mut Cursor<'_>) -> Result<char, String> {
    let bad = || "unknown escape in a quoted text; known: \\\" \\\\ \\n \\t \\r \\u{..}".to_string();
    let ch = c.rest().chars().next().filter(|&ch| ch != '\n').ok_or_else(bad)?;
    c.advance(ch.len_utf8());
    match ch {
        '"' | '\\' => Ok(ch),
        'n' => Ok('\n'),
        't' => Ok('\t'),
        'r' => Ok('\r'),
        'u' => {
            let body = c.rest().strip_prefix('{').ok_or_else(bad)?;
            let end = body.bytes().take(7).position(|b| b == b'}').ok_or_else(bad)?;
            let code = u32::from_str_radix(&body[..end], 16).ok().and_then(char::from_u32).ok_or_else(bad)?;
            c.advance(end + 2);
            Ok(code)
        }
        _ => Err(bad()),
    }
}

/// `text` as a quoted text that reads back.
pub(crate) fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c if c.is_control() => {
                // Writing to a string does not fail.
                let _ = write!(out, "\\u{{{:x}}}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Whether `text` reads back as one word that is not a number.
pub(crate) fn is_word(text: &str) -> bool {
    !text.is_empty() && word_run(text) == text.len() && matches!(classify(text), Tok::Word(_))
}

/// Whether `text` reads back as one scheme literal.
pub(crate) fn is_scheme(text: &str) -> bool {
    scheme_len(text) == Some(text.len())
}

/// A name after its `%` or `@`, quoted where it must be.
pub(crate) fn name(text: &str) -> Cow<'_, str> {
    if !text.is_empty() && name_run(text) == text.len() {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(quoted(text))
    }
}

/// A finite float that reads back as itself and is no integer in form; `inf`, `-inf` and `nan` otherwise.
pub(crate) fn float_text(x: f64) -> String {
    match x {
        x if x.is_nan() => "nan".into(),
        x => format!("{x:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str) -> Vec<Tok<'_>> {
        let mut tokens = Tokens::new(text, Pos::START);
        let mut out = vec![];
        while *tokens.peek() != Tok::End {
            out.push(tokens.bump().tok);
        }
        out
    }

    #[test]
    fn numbers_words_and_ranges() {
        use Tok::*;
        assert_eq!(
            all("1 -2 1.5 1e-5 -1e+3 2E4"),
            [Int("1"), Int("-2"), Float("1.5"), Float("1e-5"), Float("-1e+3"), Float("2E4")]
        );
        assert_eq!(
            all("a-b.c 4x64 ?tx4 -inf 9f3c l*.q"),
            [Word("a-b.c"), Word("4x64"), Word("?tx4"), Word("-inf"), Word("9f3c"), Word("l*.q")]
        );
        assert_eq!(
            all("0[16384..+64]"),
            [Int("0"), Punct("["), Int("16384"), Punct("..+"), Int("64"), Punct("]")]
        );
        assert_eq!(all("%x->@a.b-c:"), [Value("x".into()), Punct("->"), Name("a.b-c".into()), Punct(":")]);
    }

    #[test]
    fn positions_count_characters() {
        let mut tokens = Tokens::new("// é\n  \"é\" x", Pos::START);
        let s = tokens.bump();
        assert_eq!((s.start.line, s.start.col), (2, 3));
        assert_eq!((tokens.pos().line, tokens.pos().col), (2, 7));
    }

    #[test]
    fn quoted_text_reads_back() {
        for text in ["", "a b", "\"\\", "line\nend\r\t", "\u{7f}\u{0}é", "//"] {
            assert_eq!(all(&quoted(text)), [Tok::Str(text.into())], "{text:?}");
            assert_eq!(all(&format!("@{}", name(text))), [Tok::Name(text.into())], "{text:?}");
        }
    }
}
