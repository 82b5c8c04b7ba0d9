//! From structs to trees: serde's serializer.

use super::error::FieldError;
use super::{Fields, Item, Value, lexer, text_value, word_value};
use serde::ser::{self, Serialize};

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
