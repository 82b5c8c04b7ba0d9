//! Passes that choose the number format of what an engine keeps between calls.

crate::passes! { cast_cache::CastCache, quantize_cache::QuantizeCache }
