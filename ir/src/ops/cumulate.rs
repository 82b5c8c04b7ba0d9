//! Running sums and products.

use super::walk::around;
use super::{InferCx, OpSpec, axis_of};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{ElemTy, TensorTy};

op! {
    /// `y[i] = x[0] + .. + x[i]` along an axis.
    "cumulate" => pub struct Cumulate (
        /// Input.
        x: One,
    ) {
        /// Which axis.
        axis: u8 = 0,
        /// Whether products are taken.
        product: bool = false,
        /// Whether an element does not count for itself.
        exclusive: bool = false,
        /// Whether it runs from the end.
        reverse: bool = false,
    }
}

impl OpSpec for Cumulate {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.number(0)?;
        axis_of(x, self.axis)?;
        if x.elem == ElemTy::BOOL {
            return Err(Diag::input(format!("{x} has no sums")));
        }
        Ok(x.clone())
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        if let Some(int) = x.ty.elem.int() {
            let one = |a: i128, b| int.wrap(if self.product { a.wrapping_mul(b) } else { a + b });
            let y = self.run(x, x.ints(), i128::from(self.product), one);
            return Tensor::from_ints(out, y.into_iter());
        }
        let one = |a: f64, b| if self.product { a * b } else { a + b };
        Tensor::from_reals(out, self.run(x, x.reals(), f64::from(u8::from(self.product)), one))
    }
}

impl Cumulate {
    fn run<T: Copy>(&self, x: &Tensor, mut xs: Vec<T>, start: T, add: impl Fn(T, T) -> T) -> Vec<T> {
        let (outer, n, inner) = around(&x.dims(), usize::from(self.axis));
        for o in 0..outer {
            for i in 0..inner {
                let mut sum = start;
                for k in 0..n {
                    let k = if self.reverse { n - 1 - k } else { k };
                    let at = &mut xs[(o * n + k) * inner + i];
                    let next = add(sum, *at);
                    *at = if self.exclusive { sum } else { next };
                    sum = next;
                }
            }
        }
        xs
    }
}
