//! What passes values on, and branches.

use super::{Results, one};
use crate::onnx::node::Cx;
use quantc_ir::diag::Diag;
use quantc_ir::ty::ElemTy;

onnx_ops! {
    /// Inference only.
    "" "Dropout" since 7 => dropout;
    "" "Identity" since 1 => identity;
    /// Conditions that are computed choose between results of one type.
    "" "If" since 1 => branch;
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
