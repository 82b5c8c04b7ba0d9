//! Pools.

use super::linear::{moves, per_axis};
use super::{Results, one};
use crate::onnx::build::Val;
use crate::onnx::node::Cx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::{Pool, PoolKind, Real, ReduceKind};

onnx_ops! {
    "" "AveragePool" since 7 => average_pool;
    "" "GlobalAveragePool" since 1 => |cx| global(cx, ReduceKind::Mean);
    "" "GlobalMaxPool" since 1 => |cx| global(cx, ReduceKind::Max);
    "" "LpPool" since 2 => lp_pool;
    "" "MaxPool" since 1 => max_pool;
}

/// The pool with the attributes that all pools share.
fn pool(cx: &mut Cx<'_, '_>, kind: PoolKind) -> Result<(Val, Pool)> {
    let x = cx.input(0)?;
    let space = cx.dims(&x).get(2..).unwrap_or_default().to_vec();
    if !cx.has("kernel_shape") {
        return Err(Diag::input("attribute `kernel_shape` is missing"));
    }
    let kernel = per_axis(cx, "kernel_shape", space.len(), 1)?;
    let m = moves(cx, &space, &kernel)?;
    let ceil = cx.flag("ceil_mode", false)?;
    let pool = Pool {
        kind,
        kernel,
        strides: m.strides,
        dilations: m.dilations,
        before: m.before,
        after: m.after,
        ceil,
        ..Pool::default()
    };
    Ok((x, pool))
}

fn max_pool(cx: &mut Cx<'_, '_>) -> Results {
    let (x, pool) = pool(cx, PoolKind::Max)?;
    let by_columns = cx.flag("storage_order", false)?;
    let y = cx.op(pool.clone(), &[&x])?;
    if cx.outputs < 2 {
        return one(Ok(y));
    }
    let mut at = cx.op(Pool { kind: PoolKind::ArgMax, ..pool }, &[&x])?;
    if by_columns {
        at = columns_first(cx, &x, at)?;
    }
    Ok(vec![Some(y), Some(at)])
}

/// Flat indices counted with the columns of the last two axes outermost.
fn columns_first(cx: &mut Cx<'_, '_>, x: &Val, at: Val) -> Result<Val> {
    use quantc_ir::ops::BinaryKind as B;
    let dims = cx.fixed(x)?;
    let [.., rows, cols] = dims[..] else { return Err(Diag::input("input 0 has no columns")) };
    let number = |n: u64| -> Result<Val> { cx.scalar(quantc_ir::ty::ElemTy::I64, n as f64) };
    let (area, rows, cols) = (number(rows * cols)?, number(rows)?, number(cols)?);
    let inside = cx.binary(B::Mod, &at, &area)?;
    let (row, col) = (cx.div(&inside, &cols)?, cx.binary(B::Mod, &inside, &cols)?);
    let base = cx.sub(&at, &inside)?;
    let col = cx.mul(&col, &rows)?;
    let inside = cx.add(&row, &col)?;
    cx.add(&base, &inside)
}

fn average_pool(cx: &mut Cx<'_, '_>) -> Results {
    let (x, mut pool) = pool(cx, PoolKind::Mean)?;
    pool.count_margins = cx.flag("count_include_pad", false)?;
    one(cx.op(pool, &[&x]))
}

fn lp_pool(cx: &mut Cx<'_, '_>) -> Results {
    let (x, mut pool) = pool(cx, PoolKind::Norm)?;
    let p = cx.int("p")?.unwrap_or(2);
    pool.p = Real(p as f64);
    one(cx.op(pool, &[&x]))
}

fn global(cx: &mut Cx<'_, '_>, kind: ReduceKind) -> Results {
    let x = cx.input(0)?;
    let axes: Vec<usize> = (2..cx.rank(&x)).collect();
    one(cx.reduce(kind, &x, &axes))
}
