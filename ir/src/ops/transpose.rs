//! Swapped axes.

use super::walk::{Walk, strides};
use super::{InferCx, OpSpec, elementwise};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Shape, TensorTy};

op! {
    /// The same elements with axes in another order: axis `i` of the result is axis `perm[i]` of the input.
    "transpose" => pub struct Transpose (
        /// Input; a matrix when no order is given.
        x: One,
    ) {
        /// The order of axes; none swaps the two of a matrix.
        perm: Vec<u8> = vec![],
    }
}

impl OpSpec for Transpose {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.movable(0)?;
        if self.perm.is_empty() && x.rank() > 0 {
            let (rows, cols) = x.matrix().ok_or_else(|| Diag::input(format!("{x} is not a matrix")))?;
            return Ok(TensorTy { elem: x.elem, shape: Shape(vec![cols, rows]) });
        }
        let mut sorted = self.perm.clone();
        sorted.sort_unstable();
        if sorted.len() != x.rank() || sorted.iter().enumerate().any(|(i, &p)| i != usize::from(p)) {
            return Err(Diag::input(format!("{:?} is not an order of the axes of {x}", self.perm)));
        }
        let dims = self.perm.iter().map(|&p| x.shape.0[usize::from(p)]);
        Ok(TensorTy { elem: x.elem, shape: Shape(dims.collect()) })
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        let own = strides(&x.dims());
        let default: &[u8] = if own.is_empty() { &[] } else { &[1, 0] };
        let perm = if self.perm.is_empty() { default } else { &self.perm };
        let steps = perm.iter().map(|&p| own[usize::from(p)] as isize).collect();
        Tensor::new(out, x.data.take(Walk::new(&elementwise::extents(out)?, steps, 0)))
    }
}
