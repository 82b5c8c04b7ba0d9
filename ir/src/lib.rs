//! The intermediate representation of quantc.
pub mod diag;
pub mod entity;
pub mod formats;
pub mod scheme;
pub mod target;
pub mod ty;
pub mod weights;
