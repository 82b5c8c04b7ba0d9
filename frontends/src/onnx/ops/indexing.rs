//! Elements chosen and written by index.

use super::constants::filled;
use super::{Results, one};
use crate::onnx::build::Val;
use crate::onnx::node::Cx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::{Combine, Gather, GatherElements, GatherNd, Order, ScatterElements, ScatterNd};
use quantc_ir::ty::{Dim, ElemTy};

onnx_ops! {
    "" "Gather" since 1 => gather;
    "" "GatherElements" since 11 => gather_elements;
    "" "GatherND" since 11 => gather_nd;
    "" "OneHot" since 9 => one_hot;
    "" "Scatter" since 9 => scatter_elements;
    "" "ScatterElements" since 11 => scatter_elements;
    "" "ScatterND" since 11 => scatter_nd;
}

/// Input `i` as indices; integers of other sizes are taken as i64.
fn indices(cx: &mut Cx<'_, '_>, i: usize) -> Result<Val> {
    let val = cx.input(i)?;
    match cx.ty(&val).elem {
        ElemTy::I32 | ElemTy::I64 => Ok(val),
        elem if elem.int().is_some() => cx.cast(&val, ElemTy::I64),
        _ => Err(Diag::input(format!("input {i} has type {}, expected indices", cx.ty(&val)))),
    }
}

fn gather(cx: &mut Cx<'_, '_>) -> Results {
    let (x, at) = (cx.input(0)?, indices(cx, 1)?);
    let axis = cx.int("axis")?.unwrap_or(0);
    let axis = cx.axis(axis, cx.rank(&x))?;
    cx.check_rank(cx.rank(&x) + cx.rank(&at))?;
    if let Val::Extents { dims, .. } = &x {
        let unknown = || Diag::input("extents that are not known are chosen by indices that are computed");
        let known = cx.known(&at).ok_or_else(unknown)??;
        let pick = |i: i128| {
            let at = if i < 0 { i + dims.len() as i128 } else { i };
            let dim = usize::try_from(at).ok().and_then(|at| dims.get(at));
            dim.copied().ok_or_else(|| Diag::input(format!("there is no extent {i}")))
        };
        let picked: Vec<Dim> = known.ints().into_iter().map(pick).collect::<Result<_>>()?;
        if known.ty.rank() > 1 {
            return Err(Diag::input("extents that are not known are chosen by a matrix"));
        }
        return one(match cx.extents(picked) {
            Val::Extents { dims, .. } => Ok(Val::Extents { dims, scalar: known.ty.rank() == 0 }),
            list if known.ty.rank() == 0 => cx.reshape(&list, vec![]),
            list => Ok(list),
        });
    }
    one(cx.op(Gather { axis: axis as u8 }, &[&x, &at]))
}

fn gather_elements(cx: &mut Cx<'_, '_>) -> Results {
    let (x, at) = (cx.input(0)?, indices(cx, 1)?);
    let axis = cx.int("axis")?.unwrap_or(0);
    let axis = cx.axis(axis, cx.rank(&x))? as u8;
    one(cx.op(GatherElements { axis }, &[&x, &at]))
}

fn gather_nd(cx: &mut Cx<'_, '_>) -> Results {
    let (x, at) = (cx.input(0)?, indices(cx, 1)?);
    let batch = cx.int("batch_dims")?.unwrap_or(0);
    let batch = u8::try_from(batch).map_err(|_| Diag::input(format!("attribute `batch_dims` is {batch}")))?;
    one(cx.op(GatherNd { batch }, &[&x, &at]))
}

fn combine(cx: &mut Cx<'_, '_>) -> Result<Combine> {
    Ok(match cx.text("reduction", "none")?.as_str() {
        "none" => Combine::Replace,
        "add" => Combine::Add,
        "mul" => Combine::Mul,
        "min" => Combine::Min,
        "max" => Combine::Max,
        other => return Err(Diag::input(format!("attribute `reduction` is `{other}`"))),
    })
}

fn scatter_elements(cx: &mut Cx<'_, '_>) -> Results {
    let (x, at, updates) = (cx.input(0)?, indices(cx, 1)?, cx.input(2)?);
    let (axis, combine) = (cx.int("axis")?.unwrap_or(0), combine(cx)?);
    let axis = cx.axis(axis, cx.rank(&x))? as u8;
    one(cx.op(ScatterElements { axis, combine }, &[&x, &at, &updates]))
}

fn scatter_nd(cx: &mut Cx<'_, '_>) -> Results {
    let (x, at, updates) = (cx.input(0)?, indices(cx, 1)?, cx.input(2)?);
    let combine = combine(cx)?;
    one(cx.op(ScatterNd { combine }, &[&x, &at, &updates]))
}

fn one_hot(cx: &mut Cx<'_, '_>) -> Results {
    let (at, values) = (cx.input(0)?, cx.input(2)?);
    let depth = cx.must_know(1, "depth")?.reals();
    let depth = depth.first().copied().filter(|d| (1.0..=65536.0).contains(d));
    let depth = depth.ok_or_else(|| Diag::input("`depth` is not a sensible number"))? as u64;
    let rank = cx.rank(&at) + 1;
    cx.check_rank(rank)?;
    let axis = cx.int("axis")?.unwrap_or(-1);
    let axis = cx.axis(axis, rank)?;
    let at = cx.cast(&at, ElemTy::I64)?;
    let zero = cx.scalar(ElemTy::I64, 0.0)?;
    let negative = cx.compare(Order::Less, &at, &zero)?;
    let wrapped = cx.shift(&at, depth as f64)?;
    let at = cx.select(&negative, &wrapped, &at)?;
    let at = cx.unsqueeze(&at, &[axis])?;
    let mut dims = vec![1; rank];
    dims[axis] = depth;
    let places = filled(cx, ElemTy::I64, &dims, |i| i[axis].into())?;
    let hot = cx.compare(Order::Equal, &at, &places)?;
    let mut value = |i: u64| {
        let part = cx.slice(&values, 0, i, 1)?;
        cx.reshape(&part, vec![])
    };
    let (off, on) = (value(0)?, value(1)?);
    one(cx.select(&hot, &on, &off))
}
