//! The intermediate representation of quantc.
pub mod diag;
pub mod target;
