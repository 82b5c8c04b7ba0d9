//! What passes values on, and branches.

use super::{Results, one};
use crate::onnx::build::Val;
use crate::onnx::node::Cx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::Slice;
use quantc_ir::ty::{Dim, ElemTy};

onnx_ops! {
    /// Inference only.
    "" "Dropout" since 7 => dropout;
    "" "Identity" since 1 => identity;
    /// Conditions that are computed choose between results of one type.
    "" "If" since 1 => branch;
    /// Loops whose length is known when the model is compiled; they are unrolled.
    "" "Loop" since 11 => unrolled;
    /// Sequences of known length, which are unrolled.
    "" "Scan" since 9 => scan;
}

fn identity(cx: &mut Cx<'_, '_>) -> Results {
    one(cx.input(0))
}

fn dropout(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    cx.ignore(&["seed", "ratio", "is_test"]);
    if cx.opt(2).is_some() && cx.must_know(2, "training_mode")?.ints().first() != Some(&0) {
        return Err(Diag::input("input 2 (`training_mode`) is true: elements are not dropped at random"));
    }
    let mut results = vec![Some(x.clone())];
    if cx.outputs > 1 {
        let kept = cx.scalar(ElemTy::BOOL, 1.0)?;
        let dims = cx.dims(&x);
        results.push(Some(cx.expand(&kept, dims)?));
    }
    Ok(results)
}

fn branch(cx: &mut Cx<'_, '_>) -> Results {
    let cond = cx.input(0)?;
    let (then, or) = (cx.graph_attr("then_branch")?, cx.graph_attr("else_branch")?);
    let scope = cx.scope;
    if let Some(known) = cx.known(&cond) {
        let taken = if known?.ints().first().is_some_and(|&c| c != 0) { then } else { or };
        return Ok(cx.importer.subgraph(taken, scope, vec![])?.into_iter().map(Some).collect());
    }
    let a = cx.importer.subgraph(then, scope, vec![])?;
    let b = cx.importer.subgraph(or, scope, vec![])?;
    let cond = cx.reshape(&cond, vec![])?;
    let mut results = vec![];
    for (a, b) in a.iter().zip(&b) {
        if cx.ty(a) != cx.ty(b) {
            cx.need(&cond);
            let (a, b) = (cx.ty(a), cx.ty(b));
            return Err(Diag::input(format!("the branches yield {a} and {b}, and the condition is computed")));
        }
        results.push(Some(cx.select(&cond, a, b)?));
    }
    Ok(results)
}

/// The most times that a body is repeated.
const MOST_TURNS: u64 = 4096;

/// The first number of a value that is known.
fn known_number(cx: &Cx<'_, '_>, val: &Val) -> Result<Option<i128>> {
    Ok(match cx.known(val) {
        Some(tensor) => tensor?.ints().first().copied(),
        None => None,
    })
}

/// Tensors of one type behind one another along a new axis.
fn stacked(cx: &mut Cx<'_, '_>, parts: &[Val], axis: usize) -> Result<Val> {
    let mut each = vec![];
    for part in parts {
        cx.check_rank(cx.rank(part) + 1)?;
        each.push(cx.unsqueeze(part, &[axis])?);
    }
    let each: Vec<&Val> = each.iter().collect();
    cx.concat(&each, axis)
}

fn unrolled(cx: &mut Cx<'_, '_>) -> Results {
    let body = cx.graph_attr("body")?;
    let mut carried: Vec<Val> = (2..cx.inputs.len()).map(|i| cx.input(i)).collect::<Result<_>>()?;
    let turns = match cx.opt(0) {
        None => None,
        Some(_) => {
            let turns = cx.must_know(0, "M")?.ints().first().copied().unwrap_or(0).max(0);
            Some(u64::try_from(turns).unwrap_or(u64::MAX))
        }
    };
    let mut goes_on = match cx.opt(1) {
        None => true,
        Some(_) => cx.must_know(1, "cond")?.ints().first() != Some(&0),
    };
    let scanned = body.output.len().checked_sub(1 + carried.len());
    let scanned = scanned.ok_or_else(|| Diag::input("attribute `body` has too few outputs"))?;
    let mut rows: Vec<Vec<Val>> = vec![vec![]; scanned];
    let scope = cx.scope;
    let mut turn = 0;
    while goes_on && turns.is_none_or(|n| turn < n) {
        if turn >= MOST_TURNS {
            return Err(Diag::input(format!("the loop goes round more than {MOST_TURNS} times")));
        }
        let mut inputs = vec![cx.scalar(ElemTy::I64, turn as f64)?, cx.scalar(ElemTy::BOOL, 1.0)?];
        inputs.extend(carried.iter().cloned());
        let results = cx.importer.subgraph(body, scope, inputs)?;
        let next = known_number(cx, &results[0])?;
        let next = next.ok_or_else(|| Diag::input("whether the loop goes on is computed from inputs"))?;
        goes_on = next != 0;
        let n = carried.len();
        carried = results[1..=n].to_vec();
        rows.iter_mut().zip(&results[1 + n..]).for_each(|(row, r)| row.push(r.clone()));
        turn += 1;
    }
    let mut results: Vec<Option<Val>> = carried.into_iter().map(Some).collect();
    for row in rows {
        if row.is_empty() {
            return Err(Diag::input("the loop never runs, so that its results have no type"));
        }
        results.push(Some(stacked(cx, &row, 0)?));
    }
    Ok(results)
}

fn scan(cx: &mut Cx<'_, '_>) -> Results {
    let body = cx.graph_attr("body")?;
    let all = cx.all()?;
    let scanned = cx.int("num_scan_inputs")?.and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=all.len()).contains(n));
    let scanned = scanned.ok_or_else(|| Diag::input("attribute `num_scan_inputs` is missing or not sensible"))?;
    let states = all.len() - scanned;
    let outputs = body.output.len().checked_sub(states);
    let outputs = outputs.ok_or_else(|| Diag::input("attribute `body` has too few outputs"))?;
    let mut list = |name, n: usize| -> Result<Vec<i64>> {
        let list = cx.ints_attr(name)?.unwrap_or_else(|| vec![0; n]);
        let bad = || Diag::input(format!("attribute `{name}` has {} numbers, expected {n}", list.len()));
        if list.len() == n { Ok(list) } else { Err(bad()) }
    };
    let (axes, back) = (list("scan_input_axes", scanned)?, list("scan_input_directions", scanned)?);
    let (out_axes, out_back) = (list("scan_output_axes", outputs)?, list("scan_output_directions", outputs)?);
    let mut sequences = vec![];
    let mut turns = None;
    for (x, &axis) in all[states..].iter().zip(&axes) {
        let axis = cx.axis(axis, cx.rank(x))?;
        let Dim::Static(n) = cx.dims(x)[axis] else {
            return Err(Diag::input(format!("the length of the sequence {} must be known", cx.ty(x))));
        };
        if *turns.get_or_insert(n) != n {
            return Err(Diag::input("the sequences are not of one length"));
        }
        sequences.push((x, axis));
    }
    let turns = turns.unwrap_or(0);
    if turns == 0 || turns > MOST_TURNS {
        return Err(Diag::input(format!("{turns} steps are none, or more than {MOST_TURNS}, which are unrolled")));
    }
    let mut carried: Vec<Val> = all[..states].to_vec();
    let mut rows: Vec<Vec<Val>> = vec![vec![]; outputs];
    let scope = cx.scope;
    for turn in 0..turns {
        let mut inputs = carried.clone();
        for (&(x, axis), &back) in sequences.iter().zip(&back) {
            let start = if back == 0 { turn } else { turns - 1 - turn };
            let one = cx.op(Slice { axis: axis as u8, start, len: 1, step: 1 }, &[x])?;
            inputs.push(cx.squeeze(&one, &[axis])?);
        }
        let results = cx.importer.subgraph(body, scope, inputs)?;
        carried = results[..states].to_vec();
        rows.iter_mut().zip(&results[states..]).for_each(|(row, r)| row.push(r.clone()));
    }
    let mut results: Vec<Option<Val>> = carried.into_iter().map(Some).collect();
    for ((mut row, &axis), &back) in rows.into_iter().zip(&out_axes).zip(&out_back) {
        if back != 0 {
            row.reverse();
        }
        let axis = cx.axis(axis, cx.rank(&row[0]) + 1)?;
        results.push(Some(stacked(cx, &row, axis)?));
    }
    Ok(results)
}
