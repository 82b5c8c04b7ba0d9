//! One of two numbers.

use super::walk::Walk;
use super::{InferCx, OpSpec, elementwise};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::TensorTy;

op! {
    /// Elementwise `y = if cond then a else b`; shapes are aligned at the last axis and extents of one are repeated.
    "select" => pub struct Select (
        /// Truth values.
        cond: One,
        /// What is taken where `cond` is true.
        a: One,
        /// What is taken elsewhere; its elements are of the same type.
        b: One,
    ) {}
}

impl OpSpec for Select {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let (cond, a, b) = (cx.truths(0)?, cx.movable(1)?, cx.movable(2)?);
        if a.elem != b.elem {
            return Err(Diag::input(format!("operands of types {a} and {b} have different elements")));
        }
        Ok(TensorTy { elem: a.elem, shape: elementwise::shape(&[cond, a, b])? })
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (cond, a, b) = (arg(args, 0)?, arg(args, 1)?, arg(args, 2)?);
        let dims = elementwise::extents(out)?;
        let walk = |t: &Tensor| Walk::broadcast(&t.dims(), &dims);
        let cond_at = cond.ints();
        let mut both = a.data.clone();
        both.append(b.data.clone())?;
        let after = a.data.len();
        let from = walk(cond).zip(walk(a).zip(walk(b)));
        Tensor::new(out, both.take(from.map(|(c, (i, j))| if cond_at[c] != 0 { i } else { after + j })))
    }
}
