//! Fusion: several ops become one that a kernel exists for.
//!
//! These passes are lists of rules for [`saturate`](crate::saturate). A fused op is what its parts were: the quantized
//! product never expands its weight, and an epilogue does in registers what ops did in memory.

use crate::passes;
use crate::saturate::Rule;

passes! {
    fuse_dequant_matmul::FuseDequantMatmul, fuse_epilogue::FuseEpilogue,
}

/// The rules of all passes of this family.
pub static RULES: &[&[Rule]] = &[fuse_dequant_matmul::RULES, fuse_epilogue::RULES];
