//! Computes equal things once.

use crate::pass::prelude::*;
use std::collections::BTreeMap;

pass! {
    /// Computes equal things once.
    ///
    /// Two ops with the same attributes and the same operands have the same result, unless they act on a state; the
    /// later one is dropped and its readers read the earlier one. Models repeat angles, casts of shared weights and
    /// the norm in front of several matmuls.
    ///
    /// ```qir before
    /// %a = silu %x
    /// %b = silu %x
    /// %y = mul %a, %b
    /// ```
    /// ```qir after
    /// %a = silu %x
    /// %y = mul %a, %a
    /// ```
    "dedupe" => pub struct Dedupe {}
    scope: Layer, numerics: Exact, stats: keeps
}

impl Pass for Dedupe {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let graph = cx.graph_mut();
        let mut seen: BTreeMap<(Op, Vec<ValueId>), ValueId> = BTreeMap::new();
        let mut dropped = vec![];
        for op in graph.order().to_vec() {
            let node = graph.node(op);
            if node.op.has_effect() {
                continue;
            }
            let result = node.result;
            match seen.get(&(node.op.clone(), node.args.clone())) {
                Some(&first) => {
                    graph.replace_all_uses(result, first)?;
                    dropped.push(op);
                }
                None => {
                    seen.insert((node.op.clone(), node.args.clone()), result);
                }
            }
        }
        dropped.iter().for_each(|&op| graph.erase(op));
        Ok((!dropped.is_empty()).into())
    }
}
