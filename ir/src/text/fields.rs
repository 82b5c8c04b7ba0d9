//! Attribute lists: `{eps=1e-5, flag, steps=[add0, silu], scaling=llama3{factor=8.0}}`.
//!
//! Attributes of ops and options of passes are declared as structs; this is the one reader and the one writer of
//! their text. A list is first read as a tree, [`Fields`], that knows where each key and value stands; the struct is
//! then filled from the tree by serde, so an error points at the key or value it is about.
//!
//! ```text
//! fields  := "{" (field ("," field)*)? "}"
//! field   := key ("=" value)?                       a bare key is `true`
//! key     := word | string
//! value   := "true" | "false" | integer | float | word | string | scheme | "@" name
//!          | "[" (value ("," value)*)? "]" | fields | word fields | word "[" .. "]"
//! ```
//!
//! What holds:
//! - printing a tree and reading it gives the same tree; floats are printed with the fewest digits that read back, and
//!   never look like integers;
//! - where a float is wanted an integer will do; where a text is wanted a word, an integer, a scheme or an `@name`
//!   (without its sign) will do; nothing else is converted;
//! - an absent option is the word `none`; an enum variant is its name, followed by its fields when it has some.
//!
//! ```
//! use quantc_ir::text::fields::{Fields, from_fields, to_fields};
//! #[derive(serde::Serialize, serde::Deserialize)]
//! #[serde(default, deny_unknown_fields)]
//! struct Options { alpha: f32, skip: Vec<String> }
//! impl Default for Options {
//!     fn default() -> Self { Options { alpha: 0.5, skip: vec![] } }
//! }
//! let options: Options = from_fields(&Fields::parse("{skip=[l0.norm]}")?)?;
//! assert_eq!(to_fields(&options).to_string(), "{alpha=0.5, skip=[l0.norm]}");
//! let error = from_fields::<Options>(&Fields::parse("{alhpa=0.5}")?).err().unwrap();
//! assert_eq!(error.message, "unknown field `alhpa`, expected `alpha` or `skip`");
//! # Ok::<(), quantc_ir::diag::Diag>(())
//! ```

mod error;
mod read;
mod write;

pub use error::FieldError;
pub(crate) use error::near;
pub use read::Reader;
pub use write::Writer;

use super::lexer::{self, Pos, Tok, Tokens};
use crate::diag::{Diag, Result};
use serde::de::DeserializeOwned;
use serde::ser::Serialize;
use std::fmt::{self, Display};

/// How deep values may be nested in a text.
const MAX_DEPTH: usize = 32;

/// One value of an attribute list.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i128),
    /// A number with a fraction or an exponent; also `inf`, `-inf` and `nan`.
    Float(f64),
    /// A bare word; the name of an enum variant without fields.
    Word(String),
    /// A quoted text.
    Str(String),
    /// A scheme literal, whole: `!q<int4:f16 block 128@1>`.
    Scheme(String),
    /// The name of something in the module, without its `@`.
    Name(String),
    /// A list.
    List(Vec<Item>),
    /// A nested attribute list.
    Map(Fields),
    /// An enum variant with what it holds: a `Map` or a `List`.
    Variant(String, Box<Value>),
}

/// A value in its place.
#[derive(Clone, Debug)]
pub struct Item {
    /// Where it starts.
    pub pos: Pos,
    /// What it is.
    pub value: Value,
}

/// A key with its value.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where the key starts.
    pub pos: Pos,
    /// The key.
    pub key: String,
    /// The value.
    pub item: Item,
}

/// An attribute list as a tree. Equality is about keys and values, not about places.
#[derive(Clone, Debug, Default)]
pub struct Fields {
    /// Where the list starts.
    pub pos: Pos,
    /// The fields in the order of the text.
    pub entries: Vec<Entry>,
}

impl PartialEq for Item {
    fn eq(&self, other: &Item) -> bool {
        self.value == other.value
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        self.key == other.key && self.item == other.item
    }
}

impl PartialEq for Fields {
    fn eq(&self, other: &Fields) -> bool {
        self.entries == other.entries
    }
}

impl From<Value> for Item {
    fn from(value: Value) -> Item {
        Item { pos: Pos::START, value }
    }
}

impl Fields {
    /// Reads a text that is one attribute list.
    pub fn parse(text: &str) -> Result<Fields> {
        let mut tokens = Tokens::new(text, Pos::START);
        let fields = Fields::read(&mut tokens)?;
        match tokens.peek() {
            Tok::End => Ok(fields),
            other => Err(error(tokens.pos(), format!("unexpected {other} after the fields"))),
        }
    }

    /// Reads the attribute list that starts at `at`, and says where it ends. Places count from the start of `text`.
    pub fn parse_at(text: &str, at: Pos) -> Result<(Fields, Pos)> {
        let mut tokens = Tokens::new(text, at);
        let fields = Fields::read(&mut tokens)?;
        Ok((fields, tokens.last_end()))
    }

    pub(crate) fn read(tokens: &mut Tokens<'_>) -> Result<Fields> {
        read_fields(tokens, 0)
    }

    /// Whether there is no field.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Item> {
        self.entries.iter().find(|e| e.key == key).map(|e| &e.item)
    }

    /// Adds a field at the end.
    pub fn push(&mut self, key: impl Into<String>, value: Value) {
        self.entries.push(Entry { pos: Pos::START, key: key.into(), item: value.into() });
    }

    /// The fields that are not the same in `other`.
    pub fn without(mut self, other: &Fields) -> Fields {
        self.entries.retain(|e| other.get(&e.key) != Some(&e.item));
        self
    }
}

/// Fills a struct from its fields. The error points at the key or value it is about.
pub fn from_fields<T: DeserializeOwned>(fields: &Fields) -> Result<T> {
    T::deserialize(Reader::of(fields)).map_err(FieldError::into_diag)
}

/// The fields of a struct, defaults included.
///
/// # Panics
/// If the `Serialize` of `T` fails, or `T` is not a struct, an enum with fields or a map.
pub fn to_fields<T: Serialize + ?Sized>(of: &T) -> Fields {
    collect(of.serialize(Writer))
}

/// The fields of a struct that differ from those of `default`.
///
/// # Panics
/// As [`to_fields`].
pub fn to_fields_without_defaults<T: Serialize + ?Sized>(of: &T, default: &T) -> Fields {
    to_fields(of).without(&to_fields(default))
}

/// The fields that a `Serialize` has written.
pub(crate) fn collect(written: Result<Value, FieldError>) -> Fields {
    match written.expect("declared attributes serialize") {
        Value::Map(fields) => fields,
        other => panic!("attributes are a struct, not {other}"),
    }
}

fn error(pos: Pos, message: impl Into<String>) -> Diag {
    Diag::input(message).at(pos.loc())
}

fn read_fields(tokens: &mut Tokens<'_>, depth: usize) -> Result<Fields> {
    let pos = tokens.pos();
    if !tokens.eat("{") {
        return Err(error(pos, format!("expected `{{`, got {}", tokens.peek())));
    }
    let mut fields = Fields { pos, entries: vec![] };
    let mut seen = std::collections::BTreeSet::new();
    if tokens.eat("}") {
        return Ok(fields);
    }
    loop {
        let pos = tokens.pos();
        let key = match tokens.peek() {
            Tok::Word(key) => key.to_string(),
            Tok::Str(key) => key.clone(),
            other => return Err(error(pos, format!("expected the name of a field, got {other}"))),
        };
        tokens.bump();
        if !seen.insert(key.clone()) {
            return Err(error(pos, format!("the field `{}` is given twice", lexer::shorten(&key))));
        }
        let item = match tokens.eat("=") {
            true => read_item(tokens, depth)?,
            false => Item { pos, value: Value::Bool(true) },
        };
        fields.entries.push(Entry { pos, key, item });
        match tokens.peek() {
            Tok::Punct(",") => tokens.bump(),
            Tok::Punct("}") => {
                tokens.bump();
                return Ok(fields);
            }
            other => return Err(error(tokens.pos(), format!("expected `,` or `}}`, got {other}"))),
        };
    }
}

fn read_item(tokens: &mut Tokens<'_>, depth: usize) -> Result<Item> {
    let pos = tokens.pos();
    if depth >= MAX_DEPTH {
        return Err(error(pos, format!("values are nested more than {MAX_DEPTH} deep")));
    }
    match tokens.peek() {
        Tok::Punct("{") => return Ok(Item { pos, value: Value::Map(read_fields(tokens, depth + 1)?) }),
        Tok::Punct("[") => return Ok(Item { pos, value: read_list(tokens, depth + 1)? }),
        _ => {}
    }
    let token = tokens.bump();
    let value = match token.tok {
        Tok::Word(word) => {
            let held = match tokens.peek() {
                Tok::Punct("{") => Some(Value::Map(read_fields(tokens, depth + 1)?)),
                Tok::Punct("[") => Some(read_list(tokens, depth + 1)?),
                _ => None,
            };
            match held {
                Some(held) => Value::Variant(word.into(), Box::new(held)),
                None => word_value(word),
            }
        }
        Tok::Int(text) => {
            Value::Int(text.parse().map_err(|_| error(pos, format!("{} is too large", token.tok)))?)
        }
        Tok::Float(text) => match text.parse() {
            Ok(x) if f64::is_finite(x) => Value::Float(x),
            _ => return Err(error(pos, format!("{} is beyond the range of floats", token.tok))),
        },
        Tok::Str(text) => Value::Str(text),
        Tok::Scheme(text) => Value::Scheme(text.into()),
        Tok::Name(name) => Value::Name(name.into_owned()),
        other => return Err(error(pos, format!("expected a value, got {other}"))),
    };
    Ok(Item { pos, value })
}

fn read_list(tokens: &mut Tokens<'_>, depth: usize) -> Result<Value> {
    tokens.bump();
    let mut items = vec![];
    if tokens.eat("]") {
        return Ok(Value::List(items));
    }
    loop {
        items.push(read_item(tokens, depth)?);
        if tokens.eat("]") {
            return Ok(Value::List(items));
        }
        if !tokens.eat(",") {
            return Err(error(tokens.pos(), format!("expected `,` or `]`, got {}", tokens.peek())));
        }
    }
}

fn word_value(word: &str) -> Value {
    match word {
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        "inf" => Value::Float(f64::INFINITY),
        "-inf" => Value::Float(f64::NEG_INFINITY),
        "nan" => Value::Float(f64::NAN),
        _ => Value::Word(word.into()),
    }
}

/// The value that a text is written as.
fn text_value(text: &str) -> Value {
    if lexer::is_scheme(text) {
        return Value::Scheme(text.into());
    }
    let plain = lexer::is_word(text) && text != "none" && word_value(text) == Value::Word(text.into());
    if plain { Value::Word(text.into()) } else { Value::Str(text.into()) }
}

impl Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Bool(b) => write!(f, "{b}"),
            Value::Int(n) => write!(f, "{n}"),
            Value::Float(x) => f.write_str(&lexer::float_text(*x)),
            Value::Word(text) | Value::Scheme(text) => f.write_str(text),
            Value::Str(text) => f.write_str(&lexer::quoted(text)),
            Value::Name(name) => write!(f, "@{}", lexer::name(name)),
            Value::List(items) => {
                f.write_str("[")?;
                for (i, item) in items.iter().enumerate() {
                    write!(f, "{}{}", if i > 0 { ", " } else { "" }, item.value)?;
                }
                f.write_str("]")
            }
            Value::Map(fields) => write!(f, "{fields}"),
            Value::Variant(name, held) => write!(f, "{name}{held}"),
        }
    }
}

impl Display for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (i, entry) in self.entries.iter().enumerate() {
            f.write_str(if i > 0 { ", " } else { "" })?;
            match lexer::is_word(&entry.key) {
                true => f.write_str(&entry.key)?,
                false => f.write_str(&lexer::quoted(&entry.key))?,
            }
            if entry.item.value != Value::Bool(true) {
                write!(f, "={}", entry.item.value)?;
            }
        }
        f.write_str("}")
    }
}

#[cfg(test)]
mod tests;
