//! What the elementwise ops share: broadcasting and unary maps.

use super::InferCx;
use crate::diag::{Diag, Result};
use crate::eval::Tensor;
use crate::ty::{Dim, Shape, TensorTy};

/// The type of a binary op: shapes are aligned at the last axis and extents of one are repeated.
/// The elements are the left operand's.
pub(super) fn broadcast(cx: &InferCx<'_>) -> Result<TensorTy> {
    let (a, b) = (cx.float(0)?, cx.float(1)?);
    let rank = a.rank().max(b.rank());
    let extent = |ty: &TensorTy, i: usize| {
        (i + ty.rank()).checked_sub(rank).map_or(Dim::Static(1), |axis| ty.shape.0[axis])
    };
    let mut dims = Vec::with_capacity(rank);
    for i in 0..rank {
        dims.push(match (extent(a, i), extent(b, i)) {
            (x, y) if x == y => x,
            (Dim::Static(1), y) => y,
            (x, Dim::Static(1)) => x,
            _ => return Err(Diag::input(format!("operands of types {a} and {b} do not broadcast"))),
        });
    }
    Ok(TensorTy { elem: a.elem, shape: Shape(dims) })
}

/// Applies `f` to two tensors element by element, repeating extents of one.
pub(super) fn zip(a: &Tensor, b: &Tensor, out: &TensorTy, f: impl Fn(f64, f64) -> f64) -> Result<Tensor> {
    let dims = out.shape.dims().ok_or_else(|| Diag::bug("a symbol is unbound in evaluation"))?;
    let strides = |t: &Tensor| -> Vec<usize> {
        let own = t.dims();
        let mut strides = vec![0; dims.len()];
        let mut stride = 1;
        for (i, &d) in own.iter().enumerate().rev() {
            strides[dims.len() - own.len() + i] = if d == 1 { 0 } else { stride };
            stride *= d;
        }
        strides
    };
    let (sa, sb) = (strides(a), strides(b));
    let (xs, ys) = (a.f32s()?, b.f32s()?);
    let total: u64 = dims.iter().product();
    let mut index = vec![0u64; dims.len()];
    let mut data = Vec::with_capacity(total as usize);
    let (mut ia, mut ib) = (0usize, 0usize);
    for _ in 0..total {
        data.push(f(f64::from(xs[ia]), f64::from(ys[ib])) as f32);
        for axis in (0..dims.len()).rev() {
            index[axis] += 1;
            ia += sa[axis];
            ib += sb[axis];
            if index[axis] < dims[axis] {
                break;
            }
            ia -= sa[axis] * dims[axis] as usize;
            ib -= sb[axis] * dims[axis] as usize;
            index[axis] = 0;
        }
    }
    Tensor::float(out, data)
}

/// Applies `f` to every element.
pub(super) fn map(x: &Tensor, out: &TensorTy, f: impl Fn(f64) -> f64) -> Result<Tensor> {
    Tensor::float(out, x.f32s()?.iter().map(|&v| f(f64::from(v)) as f32).collect())
}
