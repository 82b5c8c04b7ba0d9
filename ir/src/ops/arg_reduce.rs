//! Places of largest and smallest numbers.

use super::walk::around;
use super::{InferCx, OpSpec, axis_of};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, ElemTy, TensorTy};

op! {
    /// The index of the largest number along an axis, whose extent becomes one.
    "arg_reduce" => pub struct ArgReduce (
        /// Input.
        x: One,
    ) {
        /// Which axis.
        axis: u8 = 0,
        /// Whether the smallest is sought.
        least: bool = false,
        /// Whether the last of equal numbers counts, not the first.
        last: bool = false,
    }
}

impl OpSpec for ArgReduce {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.number(0)?;
        let axis = axis_of(x, self.axis)?;
        if x.shape.0[axis] == Dim::Static(0) {
            return Err(Diag::input(format!("there is no largest number along axis {axis} of {x}")));
        }
        let mut ty = x.with_elem(ElemTy::I64);
        ty.shape.0[axis] = Dim::Static(1);
        Ok(ty)
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        let (outer, n, inner) = around(&x.dims(), usize::from(self.axis));
        let find = if x.ty.elem.int().is_some() {
            let xs = x.ints();
            self.find(outer, n, inner, |i, j| xs[i].cmp(&xs[j]))
        } else {
            let xs = x.reals();
            self.find(outer, n, inner, |i, j| xs[i].total_cmp(&xs[j]))
        };
        Tensor::from_ints(out, find.into_iter())
    }
}

impl ArgReduce {
    fn find(
        &self,
        outer: usize,
        n: usize,
        inner: usize,
        cmp: impl Fn(usize, usize) -> std::cmp::Ordering,
    ) -> Vec<i128> {
        let mut found = Vec::with_capacity(outer * inner);
        for o in 0..outer {
            for i in 0..inner {
                let at = |k: usize| (o * n + k) * inner + i;
                let better = |k: usize, best: usize| {
                    let order = if self.least { cmp(at(best), at(k)) } else { cmp(at(k), at(best)) };
                    order.is_gt() || (self.last && order.is_eq())
                };
                found.push((1..n).fold(0, |best, k| if better(k, best) { k } else { best }) as i128);
            }
        }
        found
    }
}
