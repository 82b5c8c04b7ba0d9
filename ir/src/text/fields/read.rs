//! From trees to structs: serde's deserializer.

use super::error::{FieldError, one_of};
use super::lexer::Pos;
use super::{Entry, Fields, Item, Value};
use serde::de::{self, IntoDeserializer, Visitor};

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
