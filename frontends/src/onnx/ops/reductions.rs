//! Reductions, places of extremes, running sums.

use super::{Results, one};
use crate::onnx::node::Cx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::{ArgReduce, Cumulate, ReduceKind as K, TopK};

onnx_ops! {
    "" "ArgMax" since 1 => |cx| arg(cx, false);
    "" "ArgMin" since 1 => |cx| arg(cx, true);
    "" "CumProd" since 26 => |cx| cumulate(cx, true);
    "" "CumSum" since 11 => |cx| cumulate(cx, false);
    "" "ReduceL1" since 1 => |cx| reduce(cx, K::L1);
    "" "ReduceL2" since 1 => |cx| reduce(cx, K::L2);
    "" "ReduceLogSum" since 1 => |cx| reduce(cx, K::LogSum);
    "" "ReduceLogSumExp" since 1 => |cx| reduce(cx, K::LogSumExp);
    "" "ReduceMax" since 1 => |cx| reduce(cx, K::Max);
    "" "ReduceMean" since 1 => |cx| reduce(cx, K::Mean);
    "" "ReduceMin" since 1 => |cx| reduce(cx, K::Min);
    "" "ReduceProd" since 1 => |cx| reduce(cx, K::Prod);
    "" "ReduceSum" since 1 => |cx| reduce(cx, K::Sum);
    "" "ReduceSumSquare" since 1 => |cx| reduce(cx, K::SumSquare);
    "" "TopK" since 1 => topk;
}

fn reduce(cx: &mut Cx<'_, '_>, kind: K) -> Results {
    let x = cx.input(0)?;
    let rank = cx.rank(&x);
    let (keep, as_is) = (cx.flag("keepdims", true)?, cx.flag("noop_with_empty_axes", false)?);
    let axes = cx.ints_of(1, "axes")?.unwrap_or_default();
    let axes = match axes.is_empty() {
        true if as_is => vec![],
        true => (0..rank).collect(),
        false => cx.axes(&axes, rank)?,
    };
    let y = cx.reduce(kind, &x, &axes)?;
    one(if keep { Ok(y) } else { cx.squeeze(&y, &axes) })
}

fn arg(cx: &mut Cx<'_, '_>, least: bool) -> Results {
    let x = cx.input(0)?;
    let (axis, keep) = (cx.int("axis")?.unwrap_or(0), cx.flag("keepdims", true)?);
    let last = cx.flag("select_last_index", false)?;
    let axis = cx.axis(axis, cx.rank(&x))?;
    let y = cx.op(ArgReduce { axis: axis as u8, least, last }, &[&x])?;
    one(if keep { Ok(y) } else { cx.squeeze(&y, &[axis]) })
}

fn cumulate(cx: &mut Cx<'_, '_>, product: bool) -> Results {
    let x = cx.input(0)?;
    let axis = cx.known_ints(1, "axis")?.and_then(|a| a.first().copied());
    let axis = cx.axis(axis.ok_or_else(|| Diag::input("`axis` is missing"))?, cx.rank(&x))? as u8;
    let (exclusive, reverse) = (cx.flag("exclusive", false)?, cx.flag("reverse", false)?);
    one(cx.op(Cumulate { axis, product, exclusive, reverse }, &[&x]))
}

fn topk(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let axis = cx.int("axis")?.unwrap_or(-1);
    let (least, _) = (!cx.flag("largest", true)?, cx.flag("sorted", true)?);
    let axis = cx.axis(axis, cx.rank(&x))? as u8;
    let k = match cx.int("k")? {
        Some(k) => Some(k),
        None => cx.known_ints(1, "k")?.and_then(|k| k.first().copied()),
    };
    let k = k.and_then(|k| u64::try_from(k).ok()).ok_or_else(|| Diag::input("`k` is missing or negative"))?;
    let mut part = |indices| -> Result<_> { cx.op(TopK { axis, k, least, indices }, &[&x]) };
    Ok(vec![Some(part(false)?), Some(part(true)?)])
}
