//! Elementwise product.

use super::{InferCx, OpSpec, elementwise};
use crate::diag::Result;
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::TensorTy;

op! {
    /// Elementwise `y = a * b`; shapes are aligned at the last axis and extents of one are repeated.
    "mul" => pub struct Mul (
        /// Left factor.
        a: One,
        /// Right factor.
        b: One,
    ) {}
}

impl OpSpec for Mul {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        elementwise::broadcast(cx)
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        elementwise::zip(arg(args, 0)?, arg(args, 1)?, out, |a, b| a * b, |a, b| Ok(a * b))
    }
}
