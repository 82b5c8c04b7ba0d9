//! Passes that move what is hard to quantize to where it does less harm.

pub mod equal;
pub mod sites;

crate::passes! {
    fold_norm_gain::FoldNormGain, fold_batch_norm::FoldBatchNorm, smoothquant::SmoothQuant, awq::Awq, smooth_cache::SmoothCache,
}
