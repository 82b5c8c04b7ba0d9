//! A range of one axis.

use super::walk::{Walk, strides};
use super::{InferCx, OpSpec, elementwise};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, TensorTy};

op! {
    /// Indices `start, start + step, ..` of one axis, `len` of them.
    "slice" => pub struct Slice (
        /// Input.
        x: One,
    ) {
        /// The axis that is cut.
        axis: u8 = 0,
        /// First index.
        start: u64 = 0,
        /// Number of indices.
        len: u64 = 0,
        /// From one index to the next; negative steps go back.
        step: i64 = 1,
    }
}

impl Slice {
    /// One more than the largest index, when no index is negative.
    fn end(&self) -> Option<u64> {
        let Some(steps) = self.len.checked_sub(1) else { return Some(0) };
        let last = i128::from(self.start) + i128::from(steps) * i128::from(self.step);
        let last = u64::try_from(last).ok()?;
        self.start.max(last).checked_add(1)
    }
}

impl OpSpec for Slice {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.movable(0)?;
        let end = self.end();
        match (x.shape.0.get(usize::from(self.axis)), end) {
            (Some(Dim::Static(n)), Some(end)) if end <= *n && (self.len == 0 || self.start < *n) => {
                let mut ty = x.clone();
                ty.shape.0[usize::from(self.axis)] = Dim::Static(self.len);
                Ok(ty)
            }
            _ => {
                let (a, s, n) = (self.axis, self.start, self.len);
                Err(Diag::input(format!("{n} indices from {s} on do not lie on axis {a} of {x}")))
            }
        }
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        let dims = x.dims();
        let axis = usize::from(self.axis);
        let mut steps: Vec<isize> = strides(&dims).into_iter().map(|s| s as isize).collect();
        let start = self.start as isize * steps[axis];
        steps[axis] *= self.step as isize;
        Tensor::new(out, x.data.take(Walk::new(&elementwise::extents(out)?, steps, start)))
    }
}
