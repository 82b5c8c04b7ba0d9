//! The engine format, its loader and executor. Knows neither passes nor LLVM.
//!
//! An engine is a folder: a manifest, weights, one object with kernels, and what a text needs to become tokens.
//! [`Engine::open`] checks and maps it, a [`Session`] runs it, a [`Sampler`] chooses tokens:
//!
//! ```no_run
//! use std::sync::Arc;
//! use quantc_runtime::{Engine, OpenOptions, SampleOptions, Sampler, Session, SessionOptions};
//!
//! let engine = Arc::new(Engine::open("engine", &OpenOptions::default())?);
//! let mut session = Session::new(engine.clone(), &SessionOptions::default())?;
//! let mut sampler = Sampler::new(SampleOptions::default(), engine.manifest().vocab as usize)?;
//! let mut token = sampler.sample(session.prefill(0, &[1, 15043, 3186], 1)?)?;
//! for _ in 0..16 {
//!     token = sampler.sample(session.decode(0, token)?)?;
//! }
//! # Ok::<(), quantc_runtime::Error>(())
//! ```
//!
//! - [`mod@format`] is the manifest: the contract with the compiler, written and read here.
//! - [`object`] loads kernels, [`pool`] has the threads that call them.
//! - [`gpu`] runs engines made for GPUs: sessions are the same, whatever runs the kernels.
//! - [`stats`] tells what this process and machine have.
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
pub mod gpu;
mod mem;
pub mod object;
pub mod pool;
pub mod sample;
pub mod session;
mod share;
pub mod stats;
mod weights;

pub use cpu::host_features;
pub use engine::{Engine, OpenOptions, Pages, Verifying};
pub use error::{Error, ErrorKind, Result};
pub use format::Manifest;
pub use object::{KernelFn, Object};
pub use sample::{SampleOptions, Sampler};
pub use session::{Session, SessionOptions, Step};
pub use weights::Moved;
