//! Indices of one axis, chosen when the engine runs.

use super::walk::{around, place};
use super::{InferCx, OpSpec, axis_of};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Shape, TensorTy};

op! {
    /// `y[.., i.., ..] = x[.., indices[i..], ..]`: the axis is replaced by the axes of `indices`.
    ///
    /// Negative indices count from the end.
    "gather" => pub struct Gather (
        /// Input.
        x: One,
        /// Which indices of the axis.
        indices: One,
    ) {
        /// Which axis.
        axis: u8 = 0,
    }
}

impl OpSpec for Gather {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let (x, indices) = (cx.movable(0)?, cx.indices(1)?);
        let axis = axis_of(x, self.axis)?;
        let dims = x.shape.0[..axis].iter().chain(&indices.shape.0).chain(&x.shape.0[axis + 1..]);
        Ok(TensorTy { elem: x.elem, shape: Shape(dims.copied().collect()) })
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (x, indices) = (arg(args, 0)?, arg(args, 1)?);
        let (outer, n, inner) = around(&x.dims(), usize::from(self.axis));
        let at = |i: i128| {
            place(i, n).ok_or_else(|| Diag::input(format!("index {i} of an axis of extent {n}")))
        };
        let at: Vec<usize> = indices.ints().into_iter().map(at).collect::<Result<_>>()?;
        let at = &at;
        let from = (0..outer).flat_map(|o| {
            at.iter().flat_map(move |&k| (o * n + k) * inner..(o * n + k + 1) * inner)
        });
        Tensor::new(out, x.data.take(from))
    }
}
