//! Readers of models, tokenizers and texts.
//!
//! A checkpoint directory (`config.json`, safetensors files, `tokenizer.json`) comes in through [`import`], which
//! answers with a [`quantc_ir::module::Module`] whose weights are ranges of the checkpoint's own files. Nothing is
//! copied and nothing of a weight is read. Graphs of ONNX files come in through [`onnx::import`].
//!
//! What holds for every reader here:
//! - Files are untrusted. Sizes, counts and nesting are bounded before memory is taken for them, ranges are checked
//!   against the file, and what is wrong comes back as a [`quantc_ir::diag::Diag`] that names the file and the place.
//! - Problems of one file are reported together where more than one can be found.
//! - The result depends on the files alone.
//!
//! What is not here, and why: no tensor arithmetic (weights are rearranged by ops that the constant folder evaluates),
//! no names of weights beyond the importer (passes look at the graph), and no GGUF yet.

pub mod arch;
pub mod checkpoint;
pub mod config;
pub mod data;
mod json;
pub mod npy;
pub mod onnx;
pub mod safetensors;
pub mod tokenizer;

pub use arch::{ImportOptions, Imported, import};
pub use checkpoint::Checkpoint;
pub use tokenizer::Tokenizer;
