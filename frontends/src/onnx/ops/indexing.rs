//! Elements chosen and written by index.

use super::constants::filled;
use super::{Results, one};
use crate::onnx::build::Val;
use crate::onnx::node::Cx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::{BinaryKind as B, Combine, Gather, GatherElements, GatherNd, Order, ScatterElements, ScatterNd};
use quantc_ir::ty::{Dim, ElemTy};

onnx_ops! {
    "" "Gather" since 1 => gather;
    "" "GatherElements" since 11 => gather_elements;
    "" "GatherND" since 11 => gather_nd;
    "" "OneHot" since 9 => one_hot;
    "" "ReverseSequence" since 10 => reverse_sequence;
    "" "Scatter" since 9 => scatter_elements;
    "" "ScatterElements" since 11 => scatter_elements;
    "" "ScatterND" since 11 => scatter_nd;
    "" "TensorScatter" since 24 => tensor_scatter;
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

/// One number for each index of the axis `batch`, and the indices of the axis `time` of extents `dims`, so that they
/// broadcast.
fn over(cx: &mut Cx<'_, '_>, each: &Val, batch: usize, time: usize, dims: &[u64]) -> Result<(Val, Val)> {
    let mut shape = vec![Dim::Static(1); dims.len()];
    shape[batch] = Dim::Static(dims[batch]);
    let each = cx.cast(each, ElemTy::I64)?;
    let each = cx.reshape(&each, shape)?;
    let mut places = vec![1; dims.len()];
    places[time] = dims[time];
    let places = filled(cx, ElemTy::I64, &places, |i| i[time].into())?;
    Ok((each, places))
}

fn reverse_sequence(cx: &mut Cx<'_, '_>) -> Results {
    let (x, lengths) = (cx.input(0)?, cx.input(1)?);
    let (dims, rank) = (cx.fixed(&x)?, cx.rank(&x));
    let (batch, time) = (cx.int("batch_axis")?.unwrap_or(1), cx.int("time_axis")?.unwrap_or(0));
    let (batch, time) = (cx.axis(batch, rank)?, cx.axis(time, rank)?);
    if batch == time {
        return Err(Diag::input("attributes `batch_axis` and `time_axis` are the same"));
    }
    let (length, place) = over(cx, &lengths, batch, time, &dims)?;
    let inside = cx.compare(Order::Less, &place, &length)?;
    let last = cx.shift(&length, -1.0)?;
    let mirrored = cx.sub(&last, &place)?;
    let from = cx.select(&inside, &mirrored, &place)?;
    let from = cx.expand(&from, dims.iter().map(|&d| Dim::Static(d)).collect())?;
    one(cx.op(GatherElements { axis: time as u8 }, &[&x, &from]))
}

fn tensor_scatter(cx: &mut Cx<'_, '_>) -> Results {
    let (x, updates) = (cx.input(0)?, cx.input(1)?);
    let (whole, dims) = (cx.fixed(&x)?, cx.fixed(&updates)?);
    let axis = cx.int("axis")?.unwrap_or(-2);
    let axis = cx.axis(axis, whole.len())?;
    if dims.len() != whole.len() || axis == 0 {
        return Err(Diag::input(format!("updates of type {} do not go into {}", cx.ty(&updates), cx.ty(&x))));
    }
    let starts = match cx.opt(2) {
        Some(starts) => starts,
        None => {
            let zero = cx.scalar(ElemTy::I64, 0.0)?;
            cx.expand(&zero, vec![Dim::Static(dims[0])])?
        }
    };
    let (start, place) = over(cx, &starts, 0, axis, &dims)?;
    let mut to = cx.add(&start, &place)?;
    match cx.text("mode", "linear")?.as_str() {
        "linear" => {}
        "circular" => {
            let n = cx.scalar(ElemTy::I64, whole[axis] as f64)?;
            to = cx.binary(B::Mod, &to, &n)?;
        }
        other => return Err(Diag::input(format!("attribute `mode` is `{other}`"))),
    }
    let to = cx.expand(&to, dims.iter().map(|&d| Dim::Static(d)).collect())?;
    one(cx.op(ScatterElements { axis: axis as u8, combine: Combine::Replace }, &[&x, &to, &updates]))
}
