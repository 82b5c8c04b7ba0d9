//! Slices written at whole indices.

use super::{Combine, InferCx, OpSpec, gather_nd, scatter_elements};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, TensorTy};

op! {
    /// `y = x`, then `y[indices[i..]] = updates[i..]`, in row-major order.
    ///
    /// The last axis of `indices` holds the leading indices of a slice.
    "scatter_nd" => pub struct ScatterNd (
        /// What is written into.
        x: One,
        /// Indices, the last axis being one of them.
        indices: One,
        /// What is written.
        updates: One,
    ) {
        /// What becomes of the element that was there.
        combine: Combine = Combine::Replace,
    }
}

impl OpSpec for ScatterNd {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let (x, indices, updates) = (cx.movable(0)?, cx.indices(1)?, cx.movable(2)?);
        scatter_elements::check(x, updates, self.combine)?;
        let want = || {
            let (&last, outer) = indices.shape.0.split_last()?;
            let rest = x.shape.0.get(usize::try_from(last.fixed()?).ok()?..)?;
            Some(outer.iter().chain(rest).copied().collect::<Vec<Dim>>())
        };
        if want().as_deref() != Some(&updates.shape.0[..]) {
            return Err(Diag::input(format!("indices {indices} and updates {updates} do not belong to {x}")));
        }
        Ok(x.clone())
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (x, indices, updates) = (arg(args, 0)?, arg(args, 1)?, arg(args, 2)?);
        let depth = indices.dims().last().copied().unwrap_or(0);
        let run: usize = x.dims()[depth..].iter().product();
        let starts = gather_nd::places(indices, &x.dims(), 0)?;
        let places = starts.into_iter().flat_map(|s| s..s + run);
        scatter_elements::write(x, places, updates, self.combine, out)
    }
}
