//! Gaussian error linear unit.

use super::{InferCx, OpSpec, elementwise};
use crate::diag::Result;
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::TensorTy;

op! {
    /// Elementwise `y = x * Phi(x)` with the normal distribution's `Phi`.
    ///
    /// With `approx`, `Phi(x) = (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) / 2`, as GPT-2 computes it.
    "gelu" => pub struct Gelu (
        /// Input.
        x: One,
    ) {
        /// Use the tanh form.
        approx: bool = false,
    }
}

/// The exact form or the tanh form, in f64.
pub fn gelu(x: f64, approx: bool) -> f64 {
    if approx {
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
        return 0.5 * x * (1.0 + inner.tanh());
    }
    0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2))
}

impl OpSpec for Gelu {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        cx.real(0).cloned()
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        elementwise::map(arg(args, 0)?, out, |x| gelu(x, self.approx))
    }
}
