//! Elements chosen along one axis, each by its own index.

use super::walk::{index_of, place, strides};
use super::{InferCx, OpSpec, axis_of};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, TensorTy};

op! {
    /// `y[i, j, k] = x[indices[i, j, k], j, k]` for axis 0, and so for the others. Negative indices count from the end.
    "gather_elements" => pub struct GatherElements (
        /// Input.
        x: One,
        /// For each element of the result its index along the axis.
        indices: One,
    ) {
        /// Which axis.
        axis: u8 = 0,
    }
}

/// Checks that `small` lies within `large` but for one axis.
pub(super) fn within(small: &TensorTy, large: &TensorTy, axis: usize) -> Result<()> {
    let fits = |(a, (s, l)): (usize, (&Dim, &Dim))| {
        a == axis || s == l || matches!((s, l), (Dim::Static(s), Dim::Static(l)) if s <= l)
    };
    if small.rank() == large.rank() && small.shape.0.iter().zip(&large.shape.0).enumerate().all(fits) {
        return Ok(());
    }
    Err(Diag::input(format!("indices of type {small} do not belong to {large}")))
}

/// The flat places in a tensor of extents `dims` of indices along `axis`.
pub(super) fn places(indices: &Tensor, dims: &[usize], axis: usize) -> Result<Vec<usize>> {
    let (own, steps) = (indices.dims(), strides(dims));
    let one = |(at, i): (usize, i128)| {
        let mut index = index_of(at, &own);
        let bad = || Diag::input(format!("index {i} of an axis of extent {}", dims[axis]));
        index[axis] = place(i, dims[axis]).ok_or_else(bad)?;
        Ok(index.iter().zip(&steps).map(|(i, s)| i * s).sum())
    };
    indices.ints().into_iter().enumerate().map(one).collect()
}

impl OpSpec for GatherElements {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let (x, indices) = (cx.movable(0)?, cx.indices(1)?);
        within(indices, x, axis_of(x, self.axis)?)?;
        Ok(indices.with_elem(x.elem))
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (x, indices) = (arg(args, 0)?, arg(args, 1)?);
        let places = places(indices, &x.dims(), usize::from(self.axis))?;
        Tensor::new(out, x.data.take(places.into_iter()))
    }
}
