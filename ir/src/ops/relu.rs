//! Rectifier.

use super::{InferCx, OpSpec, elementwise};
use crate::diag::Result;
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::TensorTy;

op! {
    /// Elementwise `y = max(x, 0)`.
    "relu" => pub struct Relu (
        /// Input.
        x: One,
    ) {}
}

impl OpSpec for Relu {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        cx.real(0).cloned()
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        elementwise::map(arg(args, 0)?, out, |x| x.max(0.0))
    }
}
