//! Passes that choose the number format of what an engine computes with and keeps between calls.

crate::passes! {
    cast_activations::CastActivations, cast_cache::CastCache, quantize_cache::QuantizeCache,
    quantize_products::QuantizeProducts,
}

pub use quantize_products::{Ranges, RangesOf};
