//! Sigmoid-weighted linear unit.

use super::{InferCx, OpSpec, elementwise};
use crate::diag::Result;
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::TensorTy;

op! {
    /// Elementwise `y = x / (1 + exp(-x))`.
    "silu" => pub struct Silu (
        /// Input.
        x: One,
    ) {}
}

impl OpSpec for Silu {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        cx.real(0).cloned()
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        elementwise::map(arg(args, 0)?, out, |x| x / (1.0 + (-x).exp()))
    }
}
