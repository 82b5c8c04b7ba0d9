//! Computes only the rows that results are wanted for.

use crate::pass::prelude::*;
use quantc_ir::ops::{Attention, Call, LastRows, Reshape};
use std::collections::{BTreeMap, BTreeSet};

pass! {
    /// Computes only the rows that results are wanted for.
    ///
    /// A decoder gives logits for the last `r` of a call's `t` tokens: for one, when a prompt is read. Behind the keys
    /// and values of the last layer nothing reads the rows of the other tokens. This pass moves `last_rows` from the
    /// head towards the inputs, through ops that make each row of one row and through calls of layers, as far as rows
    /// are read by nothing else. What keys and values need of all rows stays; norms and roundings in front of both are
    /// computed again for the rows that are wanted. Where all rows are wanted the same numbers come out.
    ///
    /// ```qir before
    /// %y = silu %x
    /// %z = last_rows %y
    /// ```
    /// ```qir after
    /// %x_last = last_rows %x
    /// %z = silu %x_last
    /// ```
    "narrow-rows" => pub struct NarrowRows {}
    scope: Module, numerics: Exact, stats: transforms
}

impl Pass for NarrowRows {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let mut narrowed = BTreeMap::<String, usize>::new();
        loop {
            let mut moved = false;
            let layers: Vec<LayerId> = cx.module.layers.keys().collect();
            for function in std::iter::once(Function::Main).chain(layers.iter().map(|&l| Function::Layer(l)))
            {
                let n = narrow(function.graph_mut(cx.module))?;
                moved |= n > 0;
                *narrowed.entry(function.name(cx.module).to_string()).or_default() += n;
            }
            for layer in layers {
                moved |= out_of_layer(cx.module, layer)? | into_layer(cx.module, layer)?;
            }
            if !moved {
                break;
            }
        }
        narrowed.retain(|_, &mut n| n > 0);
        for (function, n) in &narrowed {
            let s = if *n == 1 { "" } else { "s" };
            cx.remark(format_args!("@{function}"), format_args!("{n} op{s} on wanted rows only"));
        }
        Ok((!narrowed.is_empty()).into())
    }
}

const TOKENS: Dim = Dim::Sym('t');
const WANTED: Dim = Dim::Sym('r');

fn has_rows(ty: &TensorTy, of: Dim) -> bool {
    ty.shape.0.first() == Some(&of)
}

/// What an op does with rows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ByRow {
    /// A row of the result depends on operands beyond their same row.
    No,
    /// Each row is made of the same row of the operands that have rows.
    Costly,
    /// The same, from one operand, with little work: worth doing twice for few rows.
    Again,
}

fn by_row(graph: &Graph, node: &Node) -> ByRow {
    if !has_rows(graph.ty(node.result), TOKENS) {
        return ByRow::No;
    }
    let fixed_or_rows = |&v: &ValueId| {
        let ty = graph.ty(v);
        has_rows(ty, TOKENS) || ty.shape.0.iter().all(|d| matches!(d, Dim::Static(_)))
    };
    match &node.op {
        // The queries are the last of the positions, however many there are.
        Op::Attention(Attention { causal: true, .. }) if has_rows(graph.ty(node.args[1]), Dim::Sym('s')) => {
            ByRow::Costly
        }
        Op::Reshape(Reshape { shape }) if shape.0.iter().filter(|d| **d == TOKENS).count() == 1 => {
            ByRow::Again
        }
        _ if !node.args.iter().all(fixed_or_rows) => ByRow::No,
        Op::RmsNorm(_)
        | Op::LayerNorm(_)
        | Op::Quantize(_)
        | Op::Dequantize(_)
        | Op::DynamicScale(_)
        | Op::Cast(_) => ByRow::Again,
        Op::Add(_)
        | Op::Mul(_)
        | Op::Silu(_)
        | Op::Gelu(_)
        | Op::Relu(_)
        | Op::Tanh(_)
        | Op::Rope(_)
        | Op::MatMul(_)
        | Op::QMatMul(_) => ByRow::Costly,
        _ => ByRow::No,
    }
}

/// The values of which more than the wanted rows are read.
fn wanted_whole(graph: &Graph) -> BTreeSet<ValueId> {
    let mut whole: BTreeSet<ValueId> = graph.results.iter().copied().collect();
    for (_, node) in graph.ops().rev() {
        if node.op.is::<LastRows>().is_some() {
            continue;
        }
        let passes_rows_on = by_row(graph, node) != ByRow::No && !node.op.has_effect();
        let needed = whole.contains(&node.result);
        let read = node.args.iter().filter(|&&a| !passes_rows_on || needed || !has_rows(graph.ty(a), TOKENS));
        whole.extend(read.copied());
    }
    whole
}

/// Moves every `last_rows` of a graph as far up as it goes; the number of ops that then compute fewer rows.
fn narrow(graph: &mut Graph) -> Result<usize> {
    let whole = wanted_whole(graph);
    let mut walk = Walk { whole, narrow: BTreeMap::new(), ops: 0 };
    for op in graph.order().to_vec() {
        let node = graph.node(op);
        let Some(&x) = node.op.is::<LastRows>().and(node.args.first()) else { continue };
        let result = node.result;
        if !has_rows(graph.ty(x), TOKENS) || !walk.goes_through(graph, x) {
            continue;
        }
        let rows = walk.rows(graph, x, op)?;
        if let Some(name) = graph.value_mut(result).name.take() {
            graph.value_mut(rows).name = Some(name);
        }
        graph.replace_all_uses(result, rows)?;
    }
    if walk.ops > 0 {
        graph.drop_dead();
    }
    Ok(walk.ops)
}

struct Walk {
    whole: BTreeSet<ValueId>,
    /// What holds the wanted rows of a value.
    narrow: BTreeMap<ValueId, ValueId>,
    ops: usize,
}

impl Walk {
    /// Whether the wanted rows of `v` are better computed than taken out of all its rows.
    fn goes_through(&self, graph: &Graph, v: ValueId) -> bool {
        graph.def(v).is_some_and(|(_, node)| match by_row(graph, node) {
            ByRow::No => false,
            ByRow::Costly => !self.whole.contains(&v),
            ByRow::Again => {
                let from = node.args.iter().find(|&&a| has_rows(graph.ty(a), TOKENS));
                !self.whole.contains(&v) || from.is_some_and(|&x| self.can_narrow(graph, x))
            }
        })
    }

    /// Whether the wanted rows of `v` can be had at all: `last_rows` takes floats.
    fn can_narrow(&self, graph: &Graph, v: ValueId) -> bool {
        graph.ty(v).elem.is_float() || self.goes_through(graph, v)
    }

    /// The wanted rows of `v`, which are made in front of `before` unless they are there.
    fn rows(&mut self, graph: &mut Graph, v: ValueId, before: OpId) -> Result<ValueId> {
        if let Some(&known) = self.narrow.get(&v) {
            return Ok(known);
        }
        let through = self.goes_through(graph, v);
        // What is computed no more gives its name away.
        let name = match through && !self.whole.contains(&v) {
            true => graph.value_mut(v).name.take(),
            false => graph.value(v).name.as_ref().map(|name| format!("{name}_last")),
        };
        let rows = if through {
            let (_, node) = graph.def(v).ok_or_else(|| Diag::bug("a value that goes through has an op"))?;
            let (mut op, args) = (node.op.clone(), node.args.clone());
            if let Op::Reshape(reshape) = &mut op {
                reshape.shape.0.iter_mut().filter(|d| **d == TOKENS).for_each(|d| *d = WANTED);
            }
            let mut narrow = vec![];
            for a in args {
                narrow.push(if has_rows(graph.ty(a), TOKENS) { self.rows(graph, a, before)? } else { a });
            }
            let at = self.place(graph, before)?;
            self.ops += 1;
            graph.insert_inferred(at, op, &narrow, name.as_deref())?
        } else {
            let at = self.place(graph, before)?;
            graph.insert_inferred(at, LastRows {}, &[v], name.as_deref())?
        };
        self.narrow.insert(v, rows);
        Ok(rows)
    }

    fn place(&self, graph: &Graph, before: OpId) -> Result<usize> {
        graph.position(before).ok_or_else(|| Diag::bug("`last_rows` is not in the program"))
    }
}

/// Where a layer is called, when that is one place only.
fn only_call(module: &Module, layer: LayerId) -> Option<(Function, OpId)> {
    let name = &module.layers[layer].name;
    let functions = std::iter::once(Function::Main).chain(module.layers.keys().map(Function::Layer));
    let mut calls = functions.flat_map(|f| {
        let of_layer = move |(op, node): (OpId, &Node)| {
            node.op.is::<Call>().is_some_and(|call| call.layer == *name).then_some((f, op))
        };
        f.graph(module).ops().filter_map(of_layer).collect::<Vec<_>>()
    });
    let first = calls.next()?;
    calls.next().is_none().then_some(first)
}

/// The `last_rows` of a value, when nothing else reads it.
fn only_last_rows(graph: &Graph, v: ValueId) -> Option<Vec<OpId>> {
    let users = graph.users(v);
    let all = users.iter().all(|&op| graph.node(op).op.is::<LastRows>().is_some());
    (all && !users.is_empty() && !graph.is_result(v) && has_rows(graph.ty(v), TOKENS)).then_some(users)
}

/// Lets the one call of a layer give it the wanted rows of inputs of which it reads no others.
fn out_of_layer(module: &mut Module, layer: LayerId) -> Result<bool> {
    let Some((caller, call)) = only_call(module, layer) else { return Ok(false) };
    let mut moved = false;
    for i in 0..module.layers[layer].graph.params.len() {
        let graph = &mut module.layers[layer].graph;
        let param = graph.params[i];
        let Some(users) = only_last_rows(graph, param) else { continue };
        graph.value_mut(param).ty.shape.0[0] = WANTED;
        for op in users {
            graph.replace_all_uses(graph.node(op).result, param)?;
        }
        graph.drop_dead();
        let graph = caller.graph_mut(module);
        let arg = graph.node(call).args[i];
        let at = graph.position(call).ok_or_else(|| Diag::bug("a call is not in the program"))?;
        graph.node_mut(call).args[i] = graph.insert_inferred(at, LastRows {}, &[arg], None)?;
        moved = true;
    }
    Ok(moved)
}

/// Lets a layer give its one caller the wanted rows of a result of which that reads no others.
fn into_layer(module: &mut Module, layer: LayerId) -> Result<bool> {
    let Some((caller, call)) = only_call(module, layer) else { return Ok(false) };
    let graph = caller.graph(module);
    let result = graph.node(call).result;
    let Some(users) = only_last_rows(graph, result) else { return Ok(false) };
    let graph = &mut module.layers[layer].graph;
    let [inner] = graph.results[..] else { return Ok(false) };
    let at = graph.order().len();
    graph.results = vec![graph.insert_inferred(at, LastRows {}, &[inner], None)?];
    let graph = caller.graph_mut(module);
    graph.value_mut(result).ty.shape.0[0] = WANTED;
    for op in users {
        graph.replace_all_uses(graph.node(op).result, result)?;
    }
    graph.drop_dead();
    Ok(true)
}
