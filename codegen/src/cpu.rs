//! Kernels for CPUs: what each computes is in its spec, how it is emitted is here.

#[cfg(feature = "llvm")]
pub mod llvm;
pub mod math;
