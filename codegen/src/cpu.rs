//! Kernels for CPUs: what each computes is in its spec, how it is emitted is here.

pub mod attention;
pub mod cache;
#[cfg(feature = "llvm")]
pub mod conv;
pub mod gather;
#[cfg(feature = "llvm")]
pub mod llvm;
pub mod math;
pub mod matmul;
#[cfg(feature = "llvm")]
pub mod nest;
#[cfg(feature = "llvm")]
mod products;
pub mod rope;
pub mod row;
#[cfg(all(test, feature = "llvm"))]
pub(crate) mod testing;
