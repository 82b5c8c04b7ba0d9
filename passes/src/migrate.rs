//! Passes that move factors from one place of the graph to another where they cost nothing or quantize better.

crate::passes! { fold_norm_gain::FoldNormGain }
