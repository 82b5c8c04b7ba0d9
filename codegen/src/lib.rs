//! Targets, layouts, kernels and their emission, and the engine writer.
