//! CUDA kernels without a GPU: run by the interpreter against references, and compiled for every architecture where
//! NVIDIA's compiler is found.

mod attention;
mod broken;
mod caches;
#[path = "../common/codes.rs"]
mod codes;
#[cfg(feature = "cuda")]
mod compiled;
mod groups;
#[cfg(feature = "cuda")]
mod machine;
mod products;
mod rope;
mod rows;
mod support;
mod texts;
mod tokens;
