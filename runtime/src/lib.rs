//! The engine format, its loader and executor. Knows neither passes nor LLVM.
//!
//! # What is not here, and why
//! No compiler: kernels come as a relocatable object and are mapped by [`object`], so a machine that runs engines
//! needs neither a linker nor LLVM. No intermediate representation: the manifest names symbols, buffers and sizes.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("the runtime runs on 64-bit x86 Linux");

mod cpu;
pub mod engine;
pub mod error;
pub mod format;
mod mem;
pub mod object;
pub mod pool;
pub mod sample;
pub mod session;
pub mod stats;

pub use cpu::host_features;
pub use engine::{Engine, OpenOptions};
pub use error::{Error, ErrorKind, Result};
pub use format::Manifest;
pub use object::{KernelFn, Object};
pub use sample::{SampleOptions, Sampler};
pub use session::{Session, SessionOptions, Step};
