//! The largest numbers along an axis.

use super::walk::around;
use super::{InferCx, OpSpec, axis_of};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, ElemTy, TensorTy};
use std::cmp::Ordering;

op! {
    /// The `k` largest numbers along an axis, the largest first, or their indices. Of equal numbers the first counts.
    "topk" => pub struct TopK (
        /// Input.
        x: One,
    ) {
        /// Which axis.
        axis: u8 = 0,
        /// How many.
        k: u64 = 1,
        /// Whether the smallest are sought.
        least: bool = false,
        /// Whether the result is their indices.
        indices: bool = false,
    }
}

impl OpSpec for TopK {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.number(0)?;
        let axis = axis_of(x, self.axis)?;
        if x.shape.0[axis].fixed().is_some_and(|n| n < self.k) {
            return Err(Diag::input(format!("{x} has no {} numbers along axis {axis}", self.k)));
        }
        let mut ty = if self.indices { x.with_elem(ElemTy::I64) } else { x.clone() };
        ty.shape.0[axis] = Dim::Static(self.k);
        Ok(ty)
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        let chosen = if x.ty.elem.int().is_some() {
            let xs = x.ints();
            self.choose(x, |i, j| xs[i].cmp(&xs[j]))?
        } else {
            let xs = x.reals();
            self.choose(x, |i, j| xs[i].total_cmp(&xs[j]))?
        };
        if !self.indices {
            return Tensor::new(out, x.data.take(chosen.into_iter()));
        }
        let (_, n, inner) = around(&x.dims(), usize::from(self.axis));
        Tensor::from_ints(out, chosen.into_iter().map(|at| (at / inner % n) as i128))
    }
}

impl TopK {
    /// The flat places of the chosen numbers, in the order of the result.
    fn choose(&self, x: &Tensor, cmp: impl Fn(usize, usize) -> Ordering) -> Result<Vec<usize>> {
        let (outer, n, inner) = around(&x.dims(), usize::from(self.axis));
        let k = self.k as usize;
        if k > n {
            return Err(Diag::input(format!("{} numbers are wanted of {n}", self.k)));
        }
        let mut chosen = vec![0; outer * k * inner];
        for o in 0..outer {
            for i in 0..inner {
                let mut places: Vec<usize> = (0..n).map(|j| (o * n + j) * inner + i).collect();
                // The sort keeps the order of equal numbers.
                places.sort_by(|&a, &b| if self.least { cmp(a, b) } else { cmp(b, a) });
                for (j, place) in places.into_iter().take(k).enumerate() {
                    chosen[(o * k + j) * inner + i] = place;
                }
            }
        }
        Ok(chosen)
    }
}
