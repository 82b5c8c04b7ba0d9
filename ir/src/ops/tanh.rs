//! Hyperbolic tangent.

use super::{InferCx, OpSpec, elementwise};
use crate::diag::Result;
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::TensorTy;

op! {
    /// Elementwise `y = tanh(x)`.
    "tanh" => pub struct Tanh (
        /// Input.
        x: One,
    ) {}
}

impl OpSpec for Tanh {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        cx.real(0).cloned()
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        elementwise::map(arg(args, 0)?, out, f64::tanh)
    }
}
