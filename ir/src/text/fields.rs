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

use super::lexer::{self, Pos, Tok, Tokens};
use crate::diag::{Diag, Result, near_misses};
use serde::de::{self, DeserializeOwned, IntoDeserializer, Visitor};
use serde::ser::{self, Serialize};
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
    fn new(message: impl Into<String>) -> FieldError {
        FieldError { pos: None, message: message.into(), help: None, named: false }
    }

    fn at(mut self, pos: Pos) -> FieldError {
        self.pos.get_or_insert(pos);
        self
    }

    fn of_field(mut self, key: &str) -> FieldError {
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

fn one_of(names: &[&str]) -> String {
    match names {
        [a] => format!("`{a}`"),
        [a, b] => format!("`{a}` or `{b}`"),
        _ => format!("one of {}", names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")),
    }
}

/// Reads a value through serde.
pub struct Reader<'a> {
    pos: Pos,
    at: At<'a>,
}

#[derive(Clone, Copy)]
enum At<'a> {
    Fields(&'a Fields),
    Value(&'a Value),
}

impl<'a> Reader<'a> {
    /// A reader of a whole attribute list.
    pub fn of(fields: &'a Fields) -> Reader<'a> {
        Reader { pos: fields.pos, at: At::Fields(fields) }
    }

    fn item(item: &'a Item) -> Reader<'a> {
        match &item.value {
            Value::Map(fields) => Reader { pos: item.pos, at: At::Fields(fields) },
            value => Reader { pos: item.pos, at: At::Value(value) },
        }
    }

    /// The text, where a text is wanted.
    fn text(&self) -> Option<String> {
        match self.at {
            At::Value(Value::Word(t) | Value::Str(t) | Value::Scheme(t) | Value::Name(t)) => Some(t.clone()),
            At::Value(Value::Int(n)) => Some(n.to_string()),
            _ => None,
        }
    }

    fn visit<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        let value = match self.at {
            At::Fields(fields) => return visitor.visit_map(Entries { rest: &fields.entries, item: None }),
            At::Value(value) => value,
        };
        match value {
            Value::Bool(b) => visitor.visit_bool(*b),
            Value::Int(n) => match (u64::try_from(*n), i64::try_from(*n)) {
                (Ok(n), _) => visitor.visit_u64(n),
                (_, Ok(n)) => visitor.visit_i64(n),
                _ => visitor.visit_i128(*n),
            },
            Value::Float(x) => visitor.visit_f64(*x),
            Value::Word(t) | Value::Str(t) | Value::Scheme(t) | Value::Name(t) => visitor.visit_str(t),
            Value::List(items) => visit_list(items, visitor),
            Value::Map(fields) => visitor.visit_map(Entries { rest: &fields.entries, item: None }),
            Value::Variant(..) => visitor.visit_enum(self.variant()),
        }
    }

    fn variant(self) -> VariantReader<'a> {
        VariantReader { pos: self.pos, at: self.at }
    }
}

fn visit_list<'de, V: Visitor<'de>>(items: &[Item], visitor: V) -> Result<V::Value, FieldError> {
    let mut list = de::value::SeqDeserializer::new(items.iter().map(Reader::item));
    let value = visitor.visit_seq(&mut list)?;
    list.end()?;
    Ok(value)
}

impl<'de> IntoDeserializer<'de, FieldError> for Reader<'_> {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
    }
}

/// Adds the place to what a visitor refuses.
macro_rules! placed {
    ($self:ident, $result:expr) => {{
        let pos = $self.pos;
        $result.map_err(|e: FieldError| e.at(pos))
    }};
}

impl<'de> de::Deserializer<'de> for Reader<'_> {
    type Error = FieldError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        placed!(self, self.visit(visitor))
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        placed!(
            self,
            match self.at {
                At::Value(Value::Int(n)) => visitor.visit_f64(*n as f64),
                _ => self.visit(visitor),
            }
        )
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        placed!(
            self,
            match self.text() {
                Some(text) => visitor.visit_string(text),
                None => self.visit(visitor),
            }
        )
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        placed!(
            self,
            match self.at {
                At::Value(Value::Word(word)) if word == "none" => visitor.visit_none(),
                _ => visitor.visit_some(self),
            }
        )
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        placed!(
            self,
            match self.at {
                At::Value(Value::Word(word)) if word == "none" => visitor.visit_unit(),
                _ => self.visit(visitor),
            }
        )
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, FieldError> {
        self.deserialize_unit(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, FieldError> {
        placed!(self, visitor.visit_newtype_struct(self))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, FieldError> {
        placed!(
            self,
            match self.at {
                At::Value(Value::Word(_) | Value::Str(_) | Value::Variant(..)) =>
                    visitor.visit_enum(self.variant()),
                _ => self.visit(visitor),
            }
        )
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 bytes byte_buf seq tuple tuple_struct map struct ignored_any
    }
}

struct Entries<'a> {
    rest: &'a [Entry],
    item: Option<&'a Entry>,
}

impl<'de> de::MapAccess<'de> for Entries<'_> {
    type Error = FieldError;

    fn next_key_seed<K: de::DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, FieldError> {
        let Some((entry, rest)) = self.rest.split_first() else { return Ok(None) };
        (self.rest, self.item) = (rest, Some(entry));
        let key = de::value::StrDeserializer::<FieldError>::new(&entry.key);
        seed.deserialize(key).map(Some).map_err(|e| e.at(entry.pos))
    }

    fn next_value_seed<V: de::DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, FieldError> {
        let entry =
            self.item.take().ok_or_else(|| FieldError::new("a value was asked for before its key"))?;
        seed.deserialize(Reader::item(&entry.item)).map_err(|e| e.of_field(&entry.key))
    }
}

struct VariantReader<'a> {
    pos: Pos,
    at: At<'a>,
}

impl<'de, 'a> de::EnumAccess<'de> for VariantReader<'a> {
    type Error = FieldError;
    type Variant = Held<'a>;

    fn variant_seed<V: de::DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Held<'a>), FieldError> {
        let (name, held) = match self.at {
            At::Value(Value::Word(name) | Value::Str(name)) => (name, None),
            At::Value(Value::Variant(name, held)) => (name, Some(&**held)),
            _ => return Err(FieldError::new("expected the name of a variant").at(self.pos)),
        };
        let key = de::value::StrDeserializer::<FieldError>::new(name);
        let variant = seed.deserialize(key).map_err(|e| e.at(self.pos))?;
        Ok((variant, Held { pos: self.pos, value: held }))
    }
}

/// What a variant holds.
struct Held<'a> {
    pos: Pos,
    value: Option<&'a Value>,
}

impl<'a> Held<'a> {
    fn missing(&self, what: &str) -> FieldError {
        FieldError::new(format!("this variant needs {what}")).at(self.pos)
    }
}

impl<'de> de::VariantAccess<'de> for Held<'_> {
    type Error = FieldError;

    fn unit_variant(self) -> Result<(), FieldError> {
        match self.value {
            None => Ok(()),
            Some(held) => {
                Err(FieldError::new(format!("this variant has no fields, got `{held}`")).at(self.pos))
            }
        }
    }

    fn newtype_variant_seed<T: de::DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, FieldError> {
        match self.value {
            Some(Value::Map(fields)) => seed.deserialize(Reader::of(fields)),
            Some(Value::List(items)) if items.len() == 1 => seed.deserialize(Reader::item(&items[0])),
            _ => Err(self.missing("one value, as in `name[value]`")),
        }
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, FieldError> {
        match self.value {
            Some(Value::List(items)) => placed!(self, visit_list(items, visitor)),
            _ => Err(self.missing("its values, as in `name[a, b]`")),
        }
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        names: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, FieldError> {
        match self.value {
            Some(Value::Map(fields)) => {
                placed!(self, visitor.visit_map(Entries { rest: &fields.entries, item: None }))
            }
            _ => Err(self.missing(&format!("its fields {}, as in `name{{field=value}}`", one_of(names)))),
        }
    }
}

/// Writes a value through serde.
pub struct Writer;

type Written = Result<Value, FieldError>;

impl ser::Serializer for Writer {
    type Ok = Value;
    type Error = FieldError;
    type SerializeSeq = ListWriter;
    type SerializeTuple = ListWriter;
    type SerializeTupleStruct = ListWriter;
    type SerializeTupleVariant = ListWriter;
    type SerializeMap = MapWriter;
    type SerializeStruct = MapWriter;
    type SerializeStructVariant = MapWriter;

    fn serialize_bool(self, v: bool) -> Written {
        Ok(Value::Bool(v))
    }
    fn serialize_i8(self, v: i8) -> Written {
        Ok(Value::Int(v.into()))
    }
    fn serialize_i16(self, v: i16) -> Written {
        Ok(Value::Int(v.into()))
    }
    fn serialize_i32(self, v: i32) -> Written {
        Ok(Value::Int(v.into()))
    }
    fn serialize_i64(self, v: i64) -> Written {
        Ok(Value::Int(v.into()))
    }
    fn serialize_i128(self, v: i128) -> Written {
        Ok(Value::Int(v))
    }
    fn serialize_u8(self, v: u8) -> Written {
        Ok(Value::Int(v.into()))
    }
    fn serialize_u16(self, v: u16) -> Written {
        Ok(Value::Int(v.into()))
    }
    fn serialize_u32(self, v: u32) -> Written {
        Ok(Value::Int(v.into()))
    }
    fn serialize_u64(self, v: u64) -> Written {
        Ok(Value::Int(v.into()))
    }
    fn serialize_u128(self, v: u128) -> Written {
        i128::try_from(v).map(Value::Int).map_err(|_| FieldError::new(format!("{v} is too large")))
    }
    fn serialize_f32(self, v: f32) -> Written {
        // The digits of the single, not those of the double nearest to it; unless rounding twice would change it.
        let short = format!("{v:?}").parse().ok().filter(|&x: &f64| x as f32 == v);
        Ok(Value::Float(short.unwrap_or(f64::from(v))))
    }
    fn serialize_f64(self, v: f64) -> Written {
        Ok(Value::Float(v))
    }
    fn serialize_char(self, v: char) -> Written {
        Ok(text_value(v.encode_utf8(&mut [0; 4])))
    }
    fn serialize_str(self, v: &str) -> Written {
        Ok(text_value(v))
    }
    fn serialize_bytes(self, v: &[u8]) -> Written {
        Ok(Value::List(v.iter().map(|&b| Value::Int(b.into()).into()).collect()))
    }
    fn serialize_none(self) -> Written {
        Ok(Value::Word("none".into()))
    }
    fn serialize_some<T: Serialize + ?Sized>(self, v: &T) -> Written {
        v.serialize(self)
    }
    fn serialize_unit(self) -> Written {
        self.serialize_none()
    }
    fn serialize_unit_struct(self, _: &'static str) -> Written {
        self.serialize_none()
    }
    fn serialize_unit_variant(self, _: &'static str, _: u32, variant: &'static str) -> Written {
        Ok(match word_value(variant) {
            Value::Word(word) if lexer::is_word(&word) => Value::Word(word),
            _ => Value::Str(variant.into()),
        })
    }
    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, v: &T) -> Written {
        v.serialize(self)
    }
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        v: &T,
    ) -> Written {
        let held = match v.serialize(Writer)? {
            Value::Map(fields) => Value::Map(fields),
            other => Value::List(vec![other.into()]),
        };
        Ok(Value::Variant(variant.into(), Box::new(held)))
    }
    fn serialize_seq(self, _: Option<usize>) -> Result<ListWriter, FieldError> {
        Ok(ListWriter { variant: None, items: vec![] })
    }
    fn serialize_tuple(self, _: usize) -> Result<ListWriter, FieldError> {
        self.serialize_seq(None)
    }
    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<ListWriter, FieldError> {
        self.serialize_seq(None)
    }
    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<ListWriter, FieldError> {
        Ok(ListWriter { variant: Some(variant), items: vec![] })
    }
    fn serialize_map(self, _: Option<usize>) -> Result<MapWriter, FieldError> {
        Ok(MapWriter { variant: None, fields: Fields::default(), key: String::new() })
    }
    fn serialize_struct(self, _: &'static str, _: usize) -> Result<MapWriter, FieldError> {
        self.serialize_map(None)
    }
    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<MapWriter, FieldError> {
        Ok(MapWriter { variant: Some(variant), fields: Fields::default(), key: String::new() })
    }
}

fn wrap(variant: Option<&'static str>, value: Value) -> Value {
    match variant {
        Some(name) => Value::Variant(name.into(), Box::new(value)),
        None => value,
    }
}

/// Collects a list.
pub struct ListWriter {
    variant: Option<&'static str>,
    items: Vec<Item>,
}

impl ListWriter {
    fn add<T: Serialize + ?Sized>(&mut self, v: &T) -> Result<(), FieldError> {
        self.items.push(v.serialize(Writer)?.into());
        Ok(())
    }
    fn finish(self) -> Written {
        Ok(wrap(self.variant, Value::List(self.items)))
    }
}

/// Collects fields.
pub struct MapWriter {
    variant: Option<&'static str>,
    fields: Fields,
    key: String,
}

impl MapWriter {
    fn add<T: Serialize + ?Sized>(&mut self, key: &str, v: &T) -> Result<(), FieldError> {
        let value = v.serialize(Writer)?;
        self.fields.push(key, value);
        Ok(())
    }
    fn finish(self) -> Written {
        Ok(wrap(self.variant, Value::Map(self.fields)))
    }
}

macro_rules! list_writer {
    ($($name:ident $method:ident),*) => {$(
        impl ser::$name for ListWriter {
            type Ok = Value;
            type Error = FieldError;
            fn $method<T: Serialize + ?Sized>(&mut self, v: &T) -> Result<(), FieldError> {
                self.add(v)
            }
            fn end(self) -> Written {
                self.finish()
            }
        }
    )*};
}

list_writer!(
    SerializeSeq serialize_element, SerializeTuple serialize_element, SerializeTupleStruct serialize_field,
    SerializeTupleVariant serialize_field
);

macro_rules! struct_writer {
    ($($name:ident),*) => {$(
        impl ser::$name for MapWriter {
            type Ok = Value;
            type Error = FieldError;
            fn serialize_field<T: Serialize + ?Sized>(&mut self, key: &'static str, v: &T) -> Result<(), FieldError> {
                self.add(key, v)
            }
            fn end(self) -> Written {
                self.finish()
            }
        }
    )*};
}

struct_writer!(SerializeStruct, SerializeStructVariant);

impl ser::SerializeMap for MapWriter {
    type Ok = Value;
    type Error = FieldError;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), FieldError> {
        self.key = match key.serialize(Writer)? {
            Value::Word(t) | Value::Str(t) | Value::Scheme(t) => t,
            other => other.to_string(),
        };
        Ok(())
    }
    fn serialize_value<T: Serialize + ?Sized>(&mut self, v: &T) -> Result<(), FieldError> {
        let key = std::mem::take(&mut self.key);
        self.add(&key, v)
    }
    fn end(self) -> Written {
        self.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diag::Loc;
    use crate::ops::{Op, OpKind, Real, RopeScaling, RopeTable};
    use proptest::prelude::*;
    use serde::{Deserialize, Serialize};

    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
    struct Options {
        alpha: f32,
        wide: f64,
        count: u8,
        signed: i64,
        on: bool,
        name: String,
        names: Vec<String>,
        maybe: Option<String>,
        scaling: RopeScaling,
        shape: Shape,
        pairs: Vec<(u32, f64)>,
        by_name: std::collections::BTreeMap<String, u64>,
    }

    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Shape {
        #[default]
        Point,
        Round(f64),
        Box(u32, u32),
        Named {
            label: String,
        },
        Inner(Inner),
    }

    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    struct Inner {
        depth: Option<u32>,
    }

    fn read(text: &str) -> Result<Options> {
        from_fields(&Fields::parse(text)?)
    }

    fn refusal(text: &str) -> (String, Loc) {
        let e = read(text).unwrap_err();
        (e.message, e.loc)
    }

    #[test]
    fn values_of_every_kind() {
        let o = read("{alpha=1, wide=-1e-3, on, name=@l0, maybe=none, scaling=llama3{factor=8, low=1.0, high=4.0, original=8192}, shape=box[3, 4], names=[a-b.c, \"x y\", !q<int8:f32 token>, 7]}").unwrap();
        assert_eq!((o.alpha, o.wide, o.on, o.name.as_str(), o.maybe), (1.0, -1e-3, true, "l0", None));
        let factor = Real(8.0);
        assert_eq!(
            o.scaling,
            RopeScaling::Llama3 { factor, low: Real(1.0), high: Real(4.0), original: 8192 }
        );
        assert_eq!(o.shape, Shape::Box(3, 4));
        assert_eq!(o.names, ["a-b.c", "x y", "!q<int8:f32 token>", "7"]);
    }

    #[test]
    fn errors_point_at_the_token() {
        let at = |col| Loc::Text { line: 1, col };
        let (message, loc) = refusal("{alhpa=0.5}");
        assert!(message.starts_with("unknown field `alhpa`, expected one of `alpha`, `wide`"), "{message}");
        assert_eq!(loc, at(2));
        assert_eq!(read("{alhpa=0.5}").unwrap_err().help.unwrap(), "did you mean `alpha`?");
        assert_eq!(refusal("{alpha=\"x\"}"), ("field `alpha`: expected a number, got `x`".into(), at(8)));
        assert_eq!(
            refusal("{count=256}"),
            ("field `count`: expected a whole number of type u8, got `256`".into(), at(8))
        );
        assert_eq!(
            refusal("{scaling=lama3{factor=8.0}}"),
            (
                "field `scaling`: unknown word `lama3`, expected one of `none`, `linear`, `llama3`".into(),
                at(10)
            )
        );
        assert_eq!(
            refusal("{scaling=linear{factr=8.0}}"),
            ("unknown field `factr`, expected `factor`".into(), at(17))
        );
        assert_eq!(refusal("{scaling=linear{}}").0, "the field `factor` is missing");
        assert_eq!(
            refusal("{names=[a, 1.5]}"),
            ("field `names`: expected a string, got `1.5`".into(), at(12))
        );
        assert_eq!(
            refusal("{alpha=1,\n alpha=2}"),
            ("the field `alpha` is given twice".into(), Loc::Text { line: 2, col: 2 })
        );
        assert_eq!(refusal("{alpha=1e999}").1, at(8));
        assert_eq!(refusal("{on").0, "expected `,` or `}`, got the end of the text");
        assert_eq!(refusal("{on} x").0, "unexpected `x` after the fields");
        assert!(Fields::parse(&format!("{{a={}", "[".repeat(100_000))).is_err());
    }

    #[test]
    fn only_what_differs_is_written() {
        let table =
            RopeTable { size: 4, scaling: RopeScaling::Linear { factor: Real(2.0) }, ..RopeTable::default() };
        let text = to_fields_without_defaults(&table, &RopeTable::default()).to_string();
        assert_eq!(text, "{size=4, scaling=linear{factor=2.0}}");
        assert_eq!(from_fields::<RopeTable>(&Fields::parse(&text).unwrap()).unwrap(), table);
    }

    #[test]
    fn defaults_of_every_op_read_back() {
        for &kind in OpKind::ALL {
            let op = Op::default_of(kind);
            let fields = collect(op.write(Writer));
            let again = Fields::parse(&fields.to_string()).unwrap();
            assert_eq!(again, fields);
            assert_eq!(kind.read(Reader::of(&again)).unwrap(), op, "{fields}");
        }
    }

    #[test]
    fn prefixes_are_read_in_place() {
        let text = "gptq{bits=4},x";
        let at = Pos { byte: 4, line: 1, col: 5 };
        let (fields, end) = Fields::parse_at(text, at).unwrap();
        assert_eq!((fields.to_string().as_str(), end.byte), ("{bits=4}", 12));
        assert_eq!(fields.entries[0].item.pos.col, 11);
    }

    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-z*?][a-z0-9.*?-]{0,6}",
            any::<String>(),
            "(none|true|inf|1e5|!q<int8:f32 token>|-?[0-9]{1,3})"
        ]
    }

    fn value() -> impl Strategy<Value = super::Value> {
        use super::Value;
        let word =
            "[a-z_][a-z0-9_]{0,5}".prop_filter("not a literal", |w| matches!(word_value(w), Value::Word(_)));
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::Bool),
            any::<i128>().prop_map(Value::Int),
            any::<f64>().prop_filter("nan is not equal", |x| !x.is_nan()).prop_map(Value::Float),
            word.prop_map(Value::Word),
            any::<String>().prop_map(Value::Str),
            any::<String>().prop_map(Value::Name),
            Just(Value::Scheme("!q<int4:f16 block 128@1>".into())),
        ];
        leaf.prop_recursive(4, 24, 5, |inner| {
            let list =
                prop::collection::vec(inner.clone().prop_map(Item::from), 0..5).prop_map(Value::List).boxed();
            let map = prop::collection::btree_map(text(), inner, 0..5).prop_map(|entries| {
                let mut fields = Fields::default();
                entries.into_iter().for_each(|(k, v)| fields.push(k, v));
                Value::Map(fields)
            });
            let map = map.boxed();
            let held = prop_oneof![list.clone(), map.clone()];
            let variant = ("[a-z]{1,4}", held).prop_map(|(n, v)| Value::Variant(n, Box::new(v)));
            prop_oneof![list, map, variant]
        })
    }

    fn shape() -> impl Strategy<Value = Shape> {
        prop_oneof![
            Just(Shape::Point),
            any::<f64>().prop_map(Shape::Round),
            any::<(u32, u32)>().prop_map(|(a, b)| Shape::Box(a, b)),
            text().prop_map(|label| Shape::Named { label }),
            any::<Option<u32>>().prop_map(|depth| Shape::Inner(Inner { depth })),
        ]
    }

    prop_compose! {
        fn options()(
            (alpha, wide) in (any::<f32>(), any::<f64>()),
            (count, signed, on) in any::<(u8, i64, bool)>(),
            name in text(),
            names in prop::collection::vec(text(), 0..4),
            maybe in prop::option::of(text()),
            shape in shape(),
            pairs in prop::collection::vec(any::<(u32, f64)>(), 0..3),
            by_name in prop::collection::btree_map(text(), any::<u64>(), 0..3),
        ) -> Options {
            let scaling = RopeScaling::Linear { factor: Real(wide) };
            Options { alpha, wide, count, signed, on, name, names, maybe, scaling, shape, pairs, by_name }
        }
    }

    proptest! {
        #[test]
        fn trees_read_back(v in value()) {
            let mut fields = Fields::default();
            fields.push("k", v);
            let text = fields.to_string();
            prop_assert_eq!(Fields::parse(&text).unwrap(), fields, "{}", text);
        }

        #[test]
        fn structs_read_back(o in options()) {
            let text = to_fields(&o).to_string();
            prop_assert_eq!(read(&text).map_err(|e| TestCaseError::fail(format!("{e}: {text}")))?, o);
        }

        #[test]
        fn any_text_is_read_or_refused(t in any::<String>(), u in "[{}\\[\\]=,a-c0-9.\"@%!q<>\\- ]{0,40}") {
            for text in [t, u.clone(), format!("{{{u}")] {
                match Fields::parse(&text) {
                    Ok(fields) => prop_assert_eq!(Fields::parse(&fields.to_string()).unwrap().to_string(), fields.to_string()),
                    Err(e) => prop_assert_ne!(e.loc, Loc::None),
                }
            }
        }
    }
}
