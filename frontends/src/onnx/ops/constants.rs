//! Tensors that do not depend on inputs.

use super::{Results, one};
use crate::onnx::build::Val;
use crate::onnx::node::Cx;
use crate::onnx::tensor::{self, MOST_READ};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::eval::Tensor;
use quantc_ir::ty::{Dim, ElemTy, TensorTy};

onnx_ops! {
    "" "Constant" since 1 => constant;
    "" "ConstantOfShape" since 9 => constant_of_shape;
    "" "EyeLike" since 9 => eye_like;
    "" "Range" since 11 => range;
}

fn constant(cx: &mut Cx<'_, '_>) -> Results {
    if let Some(value) = cx.tensor_attr("value")? {
        return one(Ok(value));
    }
    if let Some(x) = cx.int("value_int")? {
        let tensor = Tensor::from_ints(&TensorTy::fixed(ElemTy::I64, &[]), [x.into()].into_iter())?;
        return one(Ok(cx.constant(tensor)));
    }
    if let Some(x) = cx.opt_float("value_float")? {
        return one(cx.scalar(ElemTy::F32, x));
    }
    if let Some(xs) = cx.ints_attr("value_ints")? {
        return one(Ok(cx.ints(&xs)));
    }
    if let Some(xs) = cx.floats_attr("value_floats")? {
        return one(Ok(cx.constant(Tensor::f32(&[xs.len() as u64], xs)?)));
    }
    Err(Diag::input("there is no attribute `value` of numbers"))
}

fn constant_of_shape(cx: &mut Cx<'_, '_>) -> Results {
    let dims = cx.shape_of(0, "shape")?;
    let value = match cx.tensor_attr("value")? {
        None => cx.scalar(ElemTy::F32, 0.0)?,
        Some(value) if cx.ty(&value).shape.elements() == Some(1) => cx.reshape(&value, vec![])?,
        Some(value) => return Err(Diag::input(format!("attribute `value` has type {}", cx.ty(&value)))),
    };
    one(cx.expand(&value, dims))
}

/// The elements of a small constant of floats or integers, one for each index below `dims`.
pub(super) fn filled(
    cx: &Cx<'_, '_>,
    elem: ElemTy,
    dims: &[u64],
    f: impl Fn(&[u64]) -> i128,
) -> Result<Val> {
    let ty = TensorTy::fixed(elem, dims);
    let n = ty.shape.elements().filter(|&n| n <= MOST_READ);
    let n = n.ok_or_else(|| Diag::input(format!("a constant of type {ty} is too large")))?;
    cx.spend(n)?;
    let numbers = (0..n).map(|i| {
        let mut index = vec![0; dims.len()];
        let mut at = i;
        for axis in (0..dims.len()).rev() {
            index[axis] = at % dims[axis];
            at /= dims[axis];
        }
        f(&index)
    });
    Ok(cx.constant(match elem.int() {
        Some(_) => Tensor::from_ints(&ty, numbers)?,
        None => Tensor::from_reals(&ty, numbers.map(|x| x as f64).collect())?,
    }))
}

fn eye_like(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let elem = match cx.int("dtype")? {
        Some(number) => tensor::elem(number)?,
        None => cx.ty(&x).elem,
    };
    let k = i128::from(cx.int("k")?.unwrap_or(0));
    let dims = cx.fixed(&x)?;
    if dims.len() != 2 {
        return Err(Diag::input(format!("input 0 has type {}, expected a matrix", cx.ty(&x))));
    }
    one(filled(cx, elem, &dims, |i| i128::from(i128::from(i[1]) - i128::from(i[0]) == k)))
}

fn range(cx: &mut Cx<'_, '_>) -> Results {
    if let (Some(Val::Extents { dims, scalar: true }), Some(start), Some(delta)) = (cx.opt(1), cx.opt(0), cx.opt(2))
        && let (Some(start), Some(delta), &[dim]) = (cx.known(&start), cx.known(&delta), &dims[..])
        && start?.ints() == [0]
        && delta?.ints() == [1]
    {
        return one(cx.places(dim));
    }
    let (start, limit) = (cx.must_know(0, "start")?, cx.must_know(1, "limit")?);
    let delta = cx.must_know(2, "delta")?;
    let elem = start.ty.elem;
    for part in [&start, &limit, &delta] {
        if part.ty.elem != elem || part.ty.shape.elements() != Some(1) {
            return Err(Diag::input(format!("a bound has type {}, expected one {elem}", part.ty)));
        }
    }
    let bound = |n: f64| n.max(0.0).min(MOST_READ as f64 + 1.0) as u64;
    let ty = |n: u64| {
        let ty = TensorTy::new(elem, [Dim::Static(n)]);
        if n > MOST_READ {
            return Err(Diag::input("the range is too long"));
        }
        cx.spend(n)?;
        Ok(ty)
    };
    let tensor = if elem.int().is_some() {
        let (a, b, d) = (start.ints()[0], limit.ints()[0], delta.ints()[0]);
        if d == 0 {
            return Err(Diag::input("`delta` is 0"));
        }
        let n = if d > 0 { (b - a + d - 1).div_euclid(d) } else { (a - b - d - 1).div_euclid(-d) };
        let ty = ty(u64::try_from(n.max(0)).unwrap_or(u64::MAX))?;
        let n = ty.shape.elements().unwrap_or(0);
        Tensor::from_ints(&ty, (0..n).map(|i| a + i128::from(i) * d))?
    } else {
        let (a, b, d) = (start.reals()[0], limit.reals()[0], delta.reals()[0]);
        if d == 0.0 || !d.is_finite() {
            return Err(Diag::input(format!("`delta` is {d}")));
        }
        let ty = ty(bound(((b - a) / d).ceil()))?;
        let n = ty.shape.elements().unwrap_or(0);
        Tensor::from_reals(&ty, (0..n).map(|i| a + i as f64 * d).collect())?
    };
    one(Ok(cx.constant(tensor)))
}
