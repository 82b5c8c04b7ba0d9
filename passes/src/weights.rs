//! Passes that decide how weights are stored.
//!
//! A quantized weight is codes, scales and perhaps zero points, each a weight of its own, behind a `dequantize`. What
//! reads the weight is not changed here: fusion does that. Weights are read and written by blocks of rows, so that
//! memory does not depend on their size, and in the order of rows, so that bytes do not depend on the number of threads.

crate::passes! {
    round_to_nearest::RoundToNearest, gptq::Gptq, bias_correct::BiasCorrect, quantize_activations::QuantizeActivations, pack_weights::PackWeights,
}

pub use quantize_activations::ScaleTime;
pub(crate) use round_to_nearest::{float_matrix, selects};

pub mod gptq_core;
pub mod install;
pub mod options;
pub mod rows;
