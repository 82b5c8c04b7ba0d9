//! Keeps keys and values of earlier tokens, so that a decoder goes on from call to call.

use crate::pass::prelude::*;
use quantc_ir::module::State;
use quantc_ir::ops::{CacheAppend, LastRows};

pass! {
    /// Keeps keys and values of earlier tokens, so that a decoder goes on from call to call.
    ///
    /// A graph that reads a whole sequence, with attention that sees earlier tokens only and everything else done row by
    /// row, computes the same when it is given the tokens in parts and the keys and values of earlier parts are kept. This
    /// gives each attention its two states, with room for as many tokens as the module's fact `context` says, computes the
    /// result for the `last_rows` that are wanted, and makes the module a decoder. A graph of another kind stays as it is, with a
    /// remark that says why.
    "add-cache" => pub struct AddCache {}
    scope: Module, numerics: Exact, stats: drops
}

impl Pass for AddCache {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let main = &cx.module.main;
        if !cx.module.states.is_empty() || !main.ops().any(|(_, n)| matches!(n.op, Op::Attention(_))) {
            return Ok(Changed::No);
        }
        if let Some(why) = whole(main) {
            cx.remark("@main", format_args!("reads whole sequences: {why}"));
            return Ok(Changed::No);
        }
        let context = cx.module.fact_u64("context")?.filter(|&n| n > 0);
        let context = context.ok_or_else(|| Diag::input("the module has no fact `context`"))?;
        let kept = keep(cx.module, context)?;
        cut(&mut cx.module.main)?;
        cx.module.facts.insert("kind".into(), "decoder".into());
        // A call has a part of the sequence from now on.
        cx.module.facts.remove("sequence");
        cx.remark(
            "@main",
            format_args!("keys and values of {kept} attentions are kept for {context} tokens"),
        );
        Ok(Changed::Yes)
    }
}

const TOKENS: Dim = Dim::Sym('t');

/// Why rows of the graph need later rows, when they do.
fn whole(graph: &Graph) -> Option<String> {
    if graph.results.len() != 1 {
        return Some("it has several results".into());
    }
    let by_token = |v: ValueId| {
        let dims = &graph.ty(v).shape.0;
        !dims[dims.len().min(1)..].contains(&TOKENS)
    };
    let is_rows = |v: ValueId| graph.ty(v).shape.0.first() == Some(&TOKENS);
    for (_, node) in graph.ops() {
        let name = node.op.name();
        let args: Vec<ValueId> = node.args.iter().copied().filter(|&a| !graph.is_none(a)).collect();
        let rank = graph.ty(node.result).rank();
        let aligned = args.iter().all(|&a| !is_rows(a) || graph.ty(a).rank() == rank);
        let fine = match &node.op {
            Op::Attention(a) if !a.causal => return Some(format!("{name} sees later tokens")),
            Op::Attention(_) | Op::Rope(_) | Op::RopeTable(_) | Op::Positions(_) => true,
            // Tables and weights are the same for all tokens.
            Op::Embedding(_) | Op::MatMul(_) => !is_rows(args[1]),
            Op::Expand(_) => !is_rows(args[0]),
            Op::LayerNorm(_) | Op::RmsNorm(_) => rank > 1 || !is_rows(node.result),
            Op::Add(_)
            | Op::Mul(_)
            | Op::Binary(_)
            | Op::Compare(_)
            | Op::Select(_)
            | Op::Unary(_)
            | Op::Cast(_)
            | Op::Gelu(_)
            | Op::Silu(_)
            | Op::Relu(_)
            | Op::Tanh(_) => aligned,
            Op::Reshape(_) => args.iter().all(|&a| is_rows(a) == is_rows(node.result)),
            Op::Transpose(t) => t.perm.first() == Some(&0) || !args.iter().any(|&a| is_rows(a)),
            Op::Slice(s) => s.axis > 0 || !is_rows(args[0]),
            Op::Concat(c) => c.axis > 0 || !is_rows(args[0]),
            Op::Softmax(s) => s.axis > 0 || !is_rows(args[0]),
            Op::Reduce(r) => !r.axes.contains(&0) || !is_rows(args[0]),
            // Nothing of the sequence is read.
            _ => !args.iter().any(|&a| graph.ty(a).shape.0.contains(&TOKENS)) && !is_rows(node.result),
        };
        if !fine || !by_token(node.result) || !args.iter().all(|&a| by_token(a)) {
            let value =
                graph.value(node.result).name.as_ref().map(|n| format!(" (%{n})")).unwrap_or_default();
            return Some(format!("`{name}`{value} mixes tokens"));
        }
    }
    (!is_rows(graph.results[0])).then(|| "the result has no row for each token".into())
}

/// Gives each attention states for its keys and values; how many there are.
fn keep(module: &mut Module, context: u64) -> Result<usize> {
    let attentions: Vec<OpId> =
        module.main.ops().filter(|(_, n)| matches!(n.op, Op::Attention(_))).map(|(op, _)| op).collect();
    for (i, &op) in attentions.iter().enumerate() {
        for (arg, what) in [(1, "k"), (2, "v")] {
            let rows = module.main.node(op).args[arg];
            let mut ty = module.main.ty(rows).clone();
            ty.shape.0[0] = Dim::Static(context);
            let name = format!("l{i}.{what}");
            let id = module.states.push(State { name: name.clone(), ty: ty.clone() });
            let state = module.main.state(id, &ty);
            let at = module.main.position(op).ok_or_else(|| Diag::bug("an op has no place"))?;
            let all = module.main.insert_inferred(at, CacheAppend {}, &[state, rows], None)?;
            module.main.node_mut(op).args[arg] = all;
        }
    }
    Ok(attentions.len())
}

/// Computes the result for the rows that are wanted: from where each row is made of one row alone.
fn cut(graph: &mut Graph) -> Result<()> {
    let mut chain = vec![];
    let mut first = graph.results[0];
    while let Some((op, node)) = graph.def(first) {
        let is_rows = |a: &ValueId| graph.ty(*a).shape.0.first() == Some(&TOKENS);
        let rows: Vec<ValueId> = node.args.iter().copied().filter(is_rows).collect();
        let each_alone = matches!(
            node.op,
            Op::MatMul(_)
                | Op::Add(_)
                | Op::Mul(_)
                | Op::Binary(_)
                | Op::Unary(_)
                | Op::Tanh(_)
                | Op::Gelu(_)
                | Op::Silu(_)
                | Op::Relu(_)
                | Op::Cast(_)
                | Op::LayerNorm(_)
                | Op::RmsNorm(_)
        );
        match rows[..] {
            [only] if each_alone => {
                chain.push(op);
                first = only;
            }
            _ => break,
        }
    }
    let mut old = first;
    let mut new = graph.append(LastRows {}, &[first], None)?;
    for op in chain.into_iter().rev() {
        let node = graph.node(op).clone();
        let args: Vec<ValueId> = node.args.iter().map(|&a| if a == old { new } else { a }).collect();
        let name = graph.value_mut(node.result).name.take();
        new = graph.append(node.op, &args, name.as_deref())?;
        old = node.result;
    }
    graph.results = vec![new];
    graph.drop_dead();
    Ok(())
}
