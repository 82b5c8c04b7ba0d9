//! Targets, layouts, kernels and their emission, and the engine writer.

pub mod cpu;
pub mod eexpr;
pub mod layout;
pub mod spec;
pub mod targets;
