//! The passes of quantc: declaration, registry, pipelines, manager and the passes themselves.
//!
//! A pass is one file: a [`pass!`] declaration (name, manual page with a before/after example, options with their
//! defaults, what it needs and provides) and an `impl Pass` with `run`. A family file lists its passes with
//! [`passes!`], which is the `mod` line and the registry line at once; everything else (the manual, error suggestions,
//! the whole-pipeline check) follows from the declaration.
//!
//! A pipeline is text, checked as a whole before anything runs: see [`pipeline`]. The manager runs it: see
//! [`manager`].
//!
//! A pass may also live outside of this workspace:
//!
//! ```
//! use quantc_passes::pass::prelude::*;
//!
//! quantc_passes::pass! {
//!     /// Leaves everything as it is.
//!     "do-nothing" => pub struct DoNothing {
//!         /// How often.
//!         times: u32 = 1,
//!     }
//!     scope: Layer, numerics: Exact, stats: keeps
//! }
//!
//! impl Pass for DoNothing {
//!     fn run(&self, _: &mut PassCx<'_>) -> Result<Changed> {
//!         Ok(Changed::No)
//!     }
//! }
//!
//! let registry = quantc_passes::Registry::builtin().with(DoNothing::INFO);
//! assert!(registry.find("do-nothing").is_some());
//! ```
//!
//! What is not here, and why: no target names (passes ask `TargetDesc` and `Backend`), no file formats (importers make
//! modules), no code generation (it is injected as a `Backend`).

// The macros name this crate by its public name, inside and outside of it.
extern crate self as quantc_passes;

pub mod analysis;
pub mod calib;
pub mod calibrate;
pub mod canon;
pub mod fuse;
pub mod manager;
pub mod migrate;
pub mod pass;
pub mod pipeline;
pub mod precision;
pub mod presets;
pub mod raise;
pub mod registry;
pub mod rewrite;
pub mod saturate;
pub mod stream;
pub mod told;
mod vectors;
pub mod weights;

pub use registry::Registry;

/// Sets the number of threads that heavy passes use; the first call in a process decides. Results do not depend on it.
pub fn set_threads(threads: usize) {
    // It fails when the threads are running already: then the number stays what it is.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
}

/// What macros of this crate expand to.
#[doc(hidden)]
pub use serde;

/// The built-in families, each listed by its `passes!`.
static FAMILIES: &[&[&pass::PassInfo]] =
    &[raise::ALL, canon::ALL, calibrate::ALL, migrate::ALL, precision::ALL, weights::ALL, fuse::ALL];
