//! Losses of classifiers.

use super::{Results, one};
use crate::onnx::build::Val;
use crate::onnx::node::Cx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::{Gather, GatherElements, Order, ReduceKind, Softmax, UnaryKind as U};
use quantc_ir::ty::ElemTy;

onnx_ops! {
    "" "NegativeLogLikelihoodLoss" since 12 => nll;
    "" "SoftmaxCrossEntropyLoss" since 12 => cross_entropy;
}

fn nll(cx: &mut Cx<'_, '_>) -> Results {
    let logs = cx.input(0)?;
    one(loss(cx, &logs))
}

fn cross_entropy(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let logs = cx.op(Softmax { axis: 1, log: true }, &[&x])?;
    let loss = loss(cx, &logs)?;
    Ok(vec![Some(loss), Some(logs)])
}

/// The loss of logarithms `[N, C, ..]` for the classes `[N, ..]` of input 1.
fn loss(cx: &mut Cx<'_, '_>, logs: &Val) -> Result<Val> {
    let target = cx.input(1)?;
    let mut target = cx.cast(&target, ElemTy::I64)?;
    let elem = cx.ty(logs).elem;
    let zero = cx.scalar(elem, 0.0)?;
    let ignored = match cx.int("ignore_index")? {
        None => None,
        Some(class) => {
            let class = cx.ints(&[class]);
            let class = cx.reshape(&class, vec![])?;
            Some(cx.compare(Order::Equal, &target, &class)?)
        }
    };
    if let Some(ignored) = &ignored {
        // Classes that are ignored need not exist.
        let first = cx.scalar(ElemTy::I64, 0.0)?;
        target = cx.select(ignored, &first, &target)?;
    }
    let at = cx.unsqueeze(&target, &[1])?;
    let picked = cx.op(GatherElements { axis: 1 }, &[logs, &at])?;
    let picked = cx.squeeze(&picked, &[1])?;
    let mut y = cx.unary(U::Neg, &picked)?;
    let mut weight = match cx.opt(2) {
        Some(weight) => Some(cx.op(Gather { axis: 0 }, &[&weight, &target])?),
        None if ignored.is_some() => {
            let unit = cx.scalar(elem, 1.0)?;
            let dims = cx.dims(&target);
            Some(cx.expand(&unit, dims)?)
        }
        None => None,
    };
    if let (Some(ignored), Some(w)) = (&ignored, &weight) {
        weight = Some(cx.select(ignored, &zero, w)?);
    }
    if let Some(w) = &weight {
        y = cx.mul(&y, w)?;
    }
    match cx.text("reduction", "mean")?.as_str() {
        "none" => Ok(y),
        "sum" => whole(cx, ReduceKind::Sum, &y),
        "mean" => match weight {
            Some(weight) => {
                let (sum, weights) = (whole(cx, ReduceKind::Sum, &y)?, whole(cx, ReduceKind::Sum, &weight)?);
                cx.div(&sum, &weights)
            }
            None => whole(cx, ReduceKind::Mean, &y),
        },
        other => Err(Diag::input(format!("attribute `reduction` is `{other}`"))),
    }
}

/// One number for all elements.
fn whole(cx: &mut Cx<'_, '_>, kind: ReduceKind, x: &Val) -> Result<Val> {
    let all: Vec<usize> = (0..cx.rank(x)).collect();
    let y = cx.reduce(kind, x, &all)?;
    cx.squeeze(&y, &all)
}
