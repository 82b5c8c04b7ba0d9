//! CUDA kernels without a GPU: run by the interpreter against references, and compiled for every architecture where
//! NVIDIA's compiler is found.

mod broken;
mod compiled;
mod products;
mod rope;
mod rows;
mod support;
