//! The text form of modules.

pub mod fields;
mod lexer;

pub use lexer::Pos;
