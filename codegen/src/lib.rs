//! Targets, layouts, kernels and their emission, and the engine writer.

pub mod cpu;
pub mod eexpr;
