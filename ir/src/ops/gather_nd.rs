//! Slices chosen by whole indices.

use super::walk::{place, strides};
use super::{InferCx, OpSpec};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, Shape, TensorTy};

op! {
    /// `y[b.., i.., ..] = x[b.., indices[b.., i..][0], indices[b.., i..][1], ..]`
    ///
    /// The last axis of `indices` holds the leading indices behind the first `batch` axes, which both operands share.
    "gather_nd" => pub struct GatherNd (
        /// Input.
        x: One,
        /// Indices, the last axis being one of them.
        indices: One,
    ) {
        /// Number of leading axes that both operands share.
        batch: u8 = 0,
    }
}

impl OpSpec for GatherNd {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let (x, indices) = (cx.movable(0)?, cx.indices(1)?);
        let batch = usize::from(self.batch);
        let fits = || {
            let (&last, outer) = indices.shape.0.split_last()?;
            let depth = usize::try_from(last.fixed()?).ok()?;
            let shared = outer.get(..batch)? == x.shape.0.get(..batch)?;
            let rest = x.shape.0.get(batch.checked_add(depth)?..)?;
            shared.then(|| Shape(outer.iter().chain(rest).copied().collect::<Vec<Dim>>()))
        };
        let shape = fits().ok_or_else(|| Diag::input(format!("indices of type {indices} do not belong to {x}")))?;
        Ok(TensorTy { elem: x.elem, shape })
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (x, indices) = (arg(args, 0)?, arg(args, 1)?);
        let starts = places(indices, &x.dims(), usize::from(self.batch))?;
        let depth = indices.dims().last().copied().unwrap_or(0);
        let run: usize = x.dims()[usize::from(self.batch) + depth..].iter().product();
        Tensor::new(out, x.data.take(starts.into_iter().flat_map(|s| s..s + run)))
    }
}

/// The flat places in a tensor of extents `dims` at which the slices begin that `indices` name.
pub(super) fn places(indices: &Tensor, dims: &[usize], batch: usize) -> Result<Vec<usize>> {
    let own = indices.dims();
    let depth = own.last().copied().unwrap_or(0);
    let steps = strides(dims);
    let count: usize = own[..own.len() - 1].iter().product();
    let per_batch = (count / own[..batch].iter().product::<usize>().max(1)).max(1);
    let block: usize = dims[batch..].iter().product();
    let all = indices.ints();
    let one = |row: usize| {
        let mut at = row / per_batch * block;
        for (k, &i) in all[row * depth..(row + 1) * depth].iter().enumerate() {
            let extent = dims[batch + k];
            let bad = || Diag::input(format!("index {i} of an axis of extent {extent}"));
            at += place(i, extent).ok_or_else(bad)? * steps[batch + k];
        }
        Ok(at)
    };
    (0..count).map(one).collect()
}
