//! The intermediate representation of quantc: what a model is between import and engine.
//!
//! # The IR in one page
//!
//! A [`Module`](module::Module) is a small graph plus large weights. It has a `main` function, layers that `main` calls,
//! declarations of weights and states, and facts about the model.
//!
//! - **Graphs.** The body of a function is a [`Graph`](graph::Graph): typed values in single assignment, and ops in an
//!   order in which each comes after those it reads. Operands are a list inside the op. Layers are isolated: they read
//!   their parameters, weights and states, nothing of `main`.
//! - **Ops** are a closed set of plain structs, [one file each](ops): operands, attributes with defaults, type inference
//!   and the meaning, which the [reference evaluator](eval) runs. One table makes the enum, the text form and the
//!   manuals.
//! - **Types.** A value is a tensor of static or symbolic extents ([`TensorTy`](ty::TensorTy)). The element type of a
//!   quantized tensor is its [`Scheme`](scheme::Scheme), which says how to read the codes: number
//!   [format](formats::Format), which elements share a scale, where zero lies. The scales themselves are ordinary
//!   values.
//! - **Weights** are declared, not held: [a declaration](weights::WeightDecl) says where the bytes are, a
//!   [store](weights::Store) maps them and derives new ones. Weights are never changed.
//! - **States** are what an engine keeps between calls, such as a key cache; only `cache_append` touches them.
//! - **Text.** Everything has [a text form](text), `.qir`, which tests, reports and people use; what it says of an op is
//!   the op's own declaration. The [verifier](verify) lists what holds in every module between two passes.
//! - **Changing graphs.** [`Graph`](graph::Graph)'s own methods, or a [patch] that is checked as a whole.
//!
//! ```
//! use quantc_ir::{text, verify::verify};
//!
//! let source = r#"
//! // A linear layer with weights of 4 bits, one scale for each row.
//! module @linear
//! weight @w : tensor<2x4x!q<int4:f32 axis 0>> = inline [[-8, 7, 0, 1], [1, 2, 3, 4]]
//! weight @s : tensor<2x1xf32> = inline [[0.5], [0.25]]
//! main (%x: tensor<?x4xf32>) -> tensor<?x2xf32> {
//!   %y = qmatmul %x, @w, @s {epilogue=[relu]}
//!   return %y
//! }
//! "#;
//! let parsed = text::parse(source, "linear.qir")?;
//! verify(&parsed.module)?;
//! // The printer writes the types that inference has found.
//! let printed = text::print(&parsed.module);
//! assert!(printed.contains("%y = qmatmul %x, @w, @s {epilogue=[relu]} : tensor<?x2xf32>"));
//! assert!(text::same(&text::parse(&printed, "printed.qir")?.module, &parsed.module));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is not here, and why
//!
//! No passes, no kernels, no importers: they are crates of their own that meet here. No target names: a target is
//! [a struct of facts](target). No file paths in ops and no serialized forms besides the text: the engine has its own.

pub mod build;
pub mod diag;
pub mod entity;
pub mod eval;
pub mod formats;
pub mod graph;
pub mod module;
pub mod ops;
pub mod patch;
pub mod quant;
pub mod scheme;
pub mod target;
pub mod text;
pub mod ty;
pub mod verify;
pub mod view;
pub mod weights;
