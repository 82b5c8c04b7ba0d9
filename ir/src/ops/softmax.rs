//! Softmax.

use super::walk::around;
use super::{InferCx, OpSpec, axis_of};
use crate::diag::Result;
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::TensorTy;

op! {
    /// `y = exp(x - m) / sum exp(x - m)` along an axis, where `m` is the largest number; or its logarithm.
    "softmax" => pub struct Softmax (
        /// Input.
        x: One,
    ) {
        /// Which axis.
        axis: u8 = 0,
        /// Whether the logarithm is taken.
        log: bool = false,
    }
}

impl OpSpec for Softmax {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.real(0)?;
        axis_of(x, self.axis)?;
        Ok(x.clone())
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        let (outer, n, inner) = around(&x.dims(), usize::from(self.axis));
        let mut y = x.reals();
        for o in 0..outer {
            for i in 0..inner {
                let at = |k: usize| (o * n + k) * inner + i;
                let top = (0..n).map(|k| y[at(k)]).fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = (0..n).map(|k| (y[at(k)] - top).exp()).sum();
                for k in 0..n {
                    let v = y[at(k)] - top;
                    y[at(k)] = if self.log { v - sum.ln() } else { v.exp() / sum };
                }
            }
        }
        Tensor::from_reals(out, y)
    }
}
