//! What the elementwise ops share: broadcasting and maps.

use super::InferCx;
use super::walk::Walk;
use crate::diag::{Diag, Result};
use crate::eval::{Data, Tensor};
use crate::ty::{Dim, Shape, TensorTy};

/// The extents of operands that are aligned at the last axis, extents of one repeated.
pub(super) fn shape(types: &[&TensorTy]) -> Result<Shape> {
    let rank = types.iter().map(|t| t.rank()).max().unwrap_or(0);
    let mut dims = vec![Dim::Static(1); rank];
    for ty in types {
        for (i, &d) in ty.shape.0.iter().enumerate() {
            let at = &mut dims[rank - ty.rank() + i];
            match (*at, d) {
                (x, y) if x == y => {}
                (_, Dim::Static(1)) => {}
                (Dim::Static(1), y) => *at = y,
                _ => {
                    let types: Vec<String> = types.iter().map(|t| t.to_string()).collect();
                    let types = types.join(" and ");
                    return Err(Diag::input(format!("operands of types {types} do not broadcast")));
                }
            }
        }
    }
    Ok(Shape(dims))
}

/// The type of a binary op on plain numbers: shapes are aligned at the last axis and extents of one are repeated.
/// The elements are the left operand's; both are plain floats, or of one type.
pub(super) fn broadcast(cx: &InferCx<'_>) -> Result<TensorTy> {
    let (a, b) = (cx.number(0)?, cx.number(1)?);
    if a.elem != b.elem && !(a.elem.is_float() && b.elem.is_float()) {
        return Err(Diag::input(format!("operands of types {a} and {b} have different elements"))
            .help("put a `cast` in front of one"));
    }
    Ok(TensorTy { elem: a.elem, shape: shape(&[a, b])? })
}

/// Applies `real` to the elements of two tensors of floats, and `int` to those of integers, repeating extents of one.
pub(super) fn zip(
    a: &Tensor,
    b: &Tensor,
    out: &TensorTy,
    real: impl Fn(f64, f64) -> f64,
    int: impl Fn(i128, i128) -> Result<i128>,
) -> Result<Tensor> {
    let dims = extents(out)?;
    let places = Walk::broadcast(&a.dims(), &dims).zip(Walk::broadcast(&b.dims(), &dims));
    match (&a.data, &b.data) {
        (Data::F32(x), Data::F32(y)) => {
            let one = |(i, j): (usize, usize)| real(x[i].into(), y[j].into()) as f32;
            Tensor::float(out, places.map(one).collect())
        }
        (Data::F64(x), Data::F64(y)) => {
            Tensor::from_reals(out, places.map(|(i, j)| real(x[i], y[j])).collect())
        }
        _ => {
            let (x, y) = (a.ints(), b.ints());
            let numbers: Vec<i128> = places.map(|(i, j)| int(x[i], y[j])).collect::<Result<_>>()?;
            Tensor::from_ints(out, numbers.into_iter())
        }
    }
}

/// Applies `f` to every element of a tensor of floats.
pub(super) fn map(x: &Tensor, out: &TensorTy, f: impl Fn(f64) -> f64) -> Result<Tensor> {
    match &x.data {
        Data::F64(x) => Tensor::from_reals(out, x.iter().map(|&v| f(v)).collect()),
        _ => Tensor::float(out, x.f32s()?.iter().map(|&v| f(f64::from(v)) as f32).collect()),
    }
}

/// The extents of a type whose symbols are bound.
pub(super) fn extents(ty: &TensorTy) -> Result<Vec<usize>> {
    let dims = ty.shape.dims().ok_or_else(|| Diag::bug("a symbol is unbound in evaluation"))?;
    Ok(dims.iter().map(|&d| d as usize).collect())
}

/// The smaller number; NaN when one is.
pub(super) fn least(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.min(b) }
}

/// The larger number; NaN when one is.
pub(super) fn most(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}
