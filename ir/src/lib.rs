//! The intermediate representation of quantc.
pub mod build;
pub mod diag;
pub mod entity;
pub mod eval;
pub mod formats;
pub mod graph;
pub mod module;
pub mod ops;
pub mod patch;
pub mod quant;
pub mod scheme;
pub mod target;
pub mod text;
pub mod ty;
pub mod verify;
pub mod view;
pub mod weights;
