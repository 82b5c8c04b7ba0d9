//! Elements written along one axis, each at its own index.

use super::{InferCx, OpSpec, axis_of, elementwise, gather_elements};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::TensorTy;
use serde::{Deserialize, Serialize};

op! {
    /// `y = x`, then `y[indices[i, j, k], j, k] = updates[i, j, k]` for axis 0, and so for the others, in row-major order.
    "scatter_elements" => pub struct ScatterElements (
        /// What is written into.
        x: One,
        /// For each update its index along the axis; negative ones count from the end.
        indices: One,
        /// What is written.
        updates: One,
    ) {
        /// Which axis.
        axis: u8 = 0,
        /// What becomes of the element that was there.
        combine: Combine = Combine::Replace,
    }
}

/// How an update is combined with what was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Combine {
    /// It replaces it.
    Replace,
    /// Their sum.
    Add,
    /// Their product.
    Mul,
    /// The smaller.
    Min,
    /// The larger.
    Max,
}

/// `x` with the `updates` written at flat places.
pub(super) fn write(
    x: &Tensor,
    places: impl Iterator<Item = usize>,
    updates: &Tensor,
    combine: Combine,
    out: &TensorTy,
) -> Result<Tensor> {
    if combine == Combine::Replace {
        let (n, mut from) = (x.data.len(), (0..x.data.len()).collect::<Vec<_>>());
        places.enumerate().for_each(|(i, at)| from[at] = n + i);
        let mut both = x.data.clone();
        both.append(updates.data.clone())?;
        return Tensor::new(out, both.take(from.into_iter()));
    }
    if x.ty.elem.int().is_some() {
        let (mut y, u) = (x.ints(), updates.ints());
        for (i, at) in places.enumerate() {
            y[at] = match combine {
                Combine::Add => y[at] + u[i],
                Combine::Mul => y[at].wrapping_mul(u[i]),
                Combine::Min => y[at].min(u[i]),
                _ => y[at].max(u[i]),
            };
        }
        return Tensor::from_ints(out, y.into_iter());
    }
    let (mut y, u) = (x.reals(), updates.reals());
    for (i, at) in places.enumerate() {
        y[at] = match combine {
            Combine::Add => y[at] + u[i],
            Combine::Mul => y[at] * u[i],
            Combine::Min => elementwise::least(y[at], u[i]),
            _ => elementwise::most(y[at], u[i]),
        };
    }
    Tensor::from_reals(out, y)
}

/// Checks what is written against what it is written into.
pub(super) fn check(x: &TensorTy, updates: &TensorTy, combine: Combine) -> Result<()> {
    if x.elem != updates.elem || (combine != Combine::Replace && x.elem.scheme().is_some()) {
        return Err(Diag::input(format!("updates of type {updates} do not go into {x}")));
    }
    Ok(())
}

impl OpSpec for ScatterElements {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let (x, indices, updates) = (cx.movable(0)?, cx.indices(1)?, cx.movable(2)?);
        check(x, updates, self.combine)?;
        gather_elements::within(indices, x, axis_of(x, self.axis)?)?;
        if indices.shape != updates.shape {
            return Err(Diag::input(format!("indices of type {indices} do not match updates {updates}")));
        }
        Ok(x.clone())
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (x, indices, updates) = (arg(args, 0)?, arg(args, 1)?, arg(args, 2)?);
        let places = gather_elements::places(indices, &x.dims(), usize::from(self.axis))?;
        write(x, places.into_iter(), updates, self.combine, out)
    }
}
