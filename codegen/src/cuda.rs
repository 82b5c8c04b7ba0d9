//! CUDA kernels: from specs, through tile IR, to text and to cubins, without a GPU.
//!
//! A template is a Rust function that turns a spec into a [`tile::Kernel`]. Epilogues and bodies of specs are the
//! expressions of [`crate::eexpr`] that the CPU backend uses; [`expr`] lowers them. [`text`] writes a kernel as CUDA
//! C++, `nvrtc` (feature `cuda`) compiles that for an architecture where NVIDIA's compiler library is found, and
//! [`interp`] runs a kernel in Rust with all its checks.
//!
//! Templates there are:
//!
//! | module | what |
//! |---|---|
//! | [`row`] | kernels over rows: norms, softmax, quantization, elementwise arithmetic |
//! | [`rope`] | tables of rotations, and the rotation of heads |
//! | [`skinny`] | products of up to 64 tokens: int4, int8, fp8, e2m1 and bf16 weights with bf16 rows, int4 and int8 weights with int8 rows |
//! | [`wide`] | products of many tokens, of the same formats from the same packed weights |
//! | [`mixed`] | the same by groups of warps, on sm_90a |
//! | [`group`] | products of many tokens by groups of warps, on sm_90a: bf16, int8 and fp8 with scales of rows or of blocks |
//! | [`tiles`] | rows of activations as the tiles that groups of warps multiply, quantized where that is asked |
//! | [`gather`] | rows of tables |
//! | [`cache`] | rows into paged caches of bf16, int8 or fp8, perhaps rotated |
//! | [`attention`] | over such caches or the rows of the call: few tokens with keys split among blocks, and many tokens |
//! | [`sample`] | tokens from logits: the largest, or drawn with temperature, top-k and top-p |
//! | [`plain`] | appends and attention for caches that the others do not have: f32, f16, and heads of odd widths |
//!
//! [`plan`] chooses the template for each launch of a lowered module. It does not choose products of groups of warps yet:
//! [`mixed`], [`group`] and [`tiles`] are proven and compiled, and no engine has them. Nor is [`sample`] part of an engine.

pub mod attention;
pub mod backend;
pub mod cache;
pub mod dequant;
pub mod expr;
mod finish;
pub mod frag;
pub mod gather;
pub mod group;
pub mod interp;
pub mod layout;
pub mod mixed;
#[cfg(feature = "cuda")]
pub mod nvrtc;
pub mod plain;
pub mod plan;
mod product;
pub mod rope;
pub mod row;
pub mod sample;
pub mod skinny;
pub mod text;
pub mod tile;
pub mod tiles;
mod warp;
pub mod wide;
