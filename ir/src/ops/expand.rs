//! Repetition.

use super::walk::Walk;
use super::{InferCx, OpSpec, elementwise};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, Shape, TensorTy};

op! {
    /// The tensor repeated to a shape: axes are aligned at the last, extents of one are repeated.
    "expand" => pub struct Expand (
        /// Input.
        x: One,
    ) {
        /// The new shape, as in `?tx4x64`.
        shape: Shape = Shape::default(),
    }
}

impl OpSpec for Expand {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.movable(0)?;
        let ty = TensorTy { elem: x.elem, shape: self.shape.clone() };
        let ahead = ty.rank().checked_sub(x.rank());
        let fits = ahead.is_some_and(|ahead| {
            x.shape.0.iter().zip(&ty.shape.0[ahead..]).all(|(d, to)| d == to || *d == Dim::Static(1))
        });
        if fits { Ok(ty) } else { Err(Diag::input(format!("{x} does not repeat to {}", self.shape))) }
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        Tensor::new(out, x.data.take(Walk::broadcast(&x.dims(), &elementwise::extents(out)?)))
    }
}
