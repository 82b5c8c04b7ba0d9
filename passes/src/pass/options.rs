//! Options of passes as text.

use quantc_ir::diag::Result;
use quantc_ir::text::fields::{Fields, from_fields, to_fields};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Reads options from text with braces; the empty text is all defaults.
pub fn read_options<T: DeserializeOwned + Default>(text: &str) -> Result<T> {
    if text.is_empty() {
        return Ok(T::default());
    }
    from_fields(&Fields::parse(text)?)
}

/// Writes options with braces, fully spelled; a pass without options has none.
pub fn write_options<T: Serialize>(options: &T) -> String {
    let fields = to_fields(options);
    if fields.is_empty() { String::new() } else { fields.to_string() }
}
