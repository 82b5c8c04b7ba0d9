//! Matmul kernels: packed weights of any format times rows of f32, bf16 or int8.
//!
//! One skeleton (panel, row tile, column strip, scale group, step along k) serves every combination. What differs is
//! chosen at emission: `unpack` says how a step of codes becomes operands, `dot` how operands become sums.
//!
//! What holds, on every target:
//!
//! - Integer sums are exact. They start at `-zero * sum(a)`, so a zero point costs nothing in the loop.
//! - Each group's sum is scaled and added in order of k, fused where the target fuses. Row tiles do not change the
//!   order of any sum, so a row's result does not depend on how many rows the call has.
//! - Nothing outside the rows and columns that exist is read or written; of f32 rows not even padding is assumed.
//! - Floats are computed in the default environment: round to nearest, subnormals kept. `vdpbf16ps` takes no notice of
//!   it: subnormals are zero there.

#[cfg(feature = "llvm")]
mod dot;
#[cfg(feature = "llvm")]
mod emit;
#[cfg(feature = "llvm")]
mod pairs;
pub mod schedule;
#[cfg(feature = "llvm")]
mod unpack;

#[cfg(feature = "llvm")]
pub use emit::emit;
pub use schedule::{CpuTile, MatmulSchedule, candidates, cost, schedule};
