//! Targets, layouts, kernels and their emission, and the engine writer.

pub mod arrays;
pub mod backend;
pub mod conv;
pub mod cpu;
pub mod cuda;
pub mod eexpr;
#[cfg(feature = "llvm")]
pub mod engine;
#[cfg(feature = "llvm")]
pub mod kernels;
pub mod layout;
pub mod lower;
pub mod nest;
pub mod schedule;
pub mod spec;
pub mod targets;
pub mod tune;
