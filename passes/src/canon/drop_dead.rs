//! Drops what nothing reads.

use crate::pass::prelude::*;
use quantc_ir::entity::{PrimaryMap, SecondaryMap};
use quantc_ir::ops::Call;
use quantc_ir::weights::WeightSource;
use std::collections::BTreeSet;

pass! {
    /// Drops what nothing reads.
    ///
    /// Ops whose result nobody reads and that act on no state, layers that nobody calls, weights and states that no
    /// op reads. Passes that derive weights leave the originals declared; this pass drops those declarations. Nothing
    /// is removed from files.
    ///
    /// ```qir before
    /// %a = silu %x
    /// %y = tanh %x
    /// ```
    /// ```qir after
    /// %y = tanh %x
    /// ```
    "drop-dead" => pub struct DropDead {}
    scope: Module, numerics: Exact, stats: keeps
}

impl Pass for DropDead {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let module = &mut *cx.module;
        let ops = drop_ops(module);
        let layers = drop_layers(module);
        let (weights, states) = drop_declarations(module);
        for (n, what) in [(ops, "op"), (layers, "layer"), (weights, "weight"), (states, "state")] {
            if n > 0 {
                cx.remark("module", format_args!("dropped {n} {what}{}", if n == 1 { "" } else { "s" }));
            }
        }
        Ok((ops + layers + weights + states > 0).into())
    }
}

/// Drops dead ops of all functions, calls of layers without effect included.
fn drop_ops(module: &mut Module) -> usize {
    let mut dropped = 0;
    loop {
        let mut round: usize = module.graphs_mut().map(Graph::drop_dead).sum();
        let acting: BTreeSet<String> = acting_layers(module);
        for graph in module.graphs_mut() {
            for op in graph.order().to_vec() {
                let node = graph.node(op);
                let idle = node.op.is::<Call>().is_some_and(|call| !acting.contains(&call.layer));
                if idle && graph.users(node.result).is_empty() && !graph.is_result(node.result) {
                    graph.erase(op);
                    round += 1;
                }
            }
        }
        dropped += round;
        if round == 0 {
            return dropped;
        }
    }
}

/// The layers that act on a state, themselves or through layers they call.
fn acting_layers(module: &Module) -> BTreeSet<String> {
    let mut acting = BTreeSet::new();
    loop {
        let before = acting.len();
        for layer in module.layers.values() {
            let acts = |(_, n): (OpId, &Node)| match n.op.is::<Call>() {
                Some(call) => acting.contains(&call.layer),
                None => n.op.has_effect(),
            };
            if layer.graph.ops().any(acts) {
                acting.insert(layer.name.clone());
            }
        }
        if acting.len() == before {
            return acting;
        }
    }
}

fn drop_layers(module: &mut Module) -> usize {
    // A text may hold layers alone; then each is wanted for itself.
    if module.main == Graph::default() {
        return 0;
    }
    let mut called: BTreeSet<String> = BTreeSet::new();
    let mut open = vec![&module.main];
    while let Some(graph) = open.pop() {
        for (_, node) in graph.ops() {
            if let Some(call) = node.op.is::<Call>()
                && called.insert(call.layer.clone())
                && let Some(id) = module.layer(&call.layer)
            {
                open.push(&module.layers[id].graph);
            }
        }
    }
    let before = module.layers.len();
    let mut kept = PrimaryMap::new();
    for layer in module.layers.values().filter(|l| called.contains(&l.name)) {
        kept.push(layer.clone());
    }
    module.layers = kept;
    before - module.layers.len()
}

/// Drops declarations of weights and states that no op reads, and renumbers the rest in their order.
fn drop_declarations(module: &mut Module) -> (usize, usize) {
    let mut weights = SecondaryMap::<WeightId, bool>::new();
    let mut states = SecondaryMap::<StateId, bool>::new();
    for (_, graph) in module.graphs() {
        let read = graph.ops().flat_map(|(_, n)| &n.args).chain(&graph.results);
        for &v in read {
            match graph.value(v).def {
                Def::Weight(w) => weights[w] = true,
                Def::State(s) => states[s] = true,
                _ => {}
            }
        }
    }
    // An alias keeps what it stands for; chains are followed to their end.
    let mut open: Vec<WeightId> = module.weights.keys().filter(|&w| weights[w]).collect();
    while let Some(w) = open.pop() {
        if let WeightSource::Alias(of) = module.weights[w].source
            && !std::mem::replace(&mut weights[of], true)
        {
            open.push(of);
        }
    }
    let dead_weights = module.weights.keys().filter(|&w| !weights[w]).count();
    let dead_states = module.states.keys().filter(|&s| !states[s]).count();
    if dead_weights + dead_states == 0 {
        return (0, 0);
    }
    let mut new_weight = SecondaryMap::<WeightId, Option<WeightId>>::new();
    let mut kept = PrimaryMap::new();
    for (id, decl) in module.weights.iter().filter(|(id, _)| weights[*id]) {
        new_weight[id] = Some(kept.push(decl.clone()));
    }
    for (_, decl) in kept.iter_mut() {
        if let WeightSource::Alias(of) = &mut decl.source {
            *of = new_weight[*of].expect("what an alias stands for is kept");
        }
    }
    module.weights = kept;
    let mut new_state = SecondaryMap::<StateId, Option<StateId>>::new();
    let mut kept = PrimaryMap::new();
    for (id, state) in module.states.iter().filter(|(id, _)| states[*id]) {
        new_state[id] = Some(kept.push(state.clone()));
    }
    module.states = kept;
    for graph in module.graphs_mut() {
        *graph = renumbered(graph, &new_weight, &new_state);
    }
    (dead_weights, dead_states)
}

/// The live part of a graph with other ids of weights and states.
fn renumbered(
    old: &Graph,
    weights: &SecondaryMap<WeightId, Option<WeightId>>,
    states: &SecondaryMap<StateId, Option<StateId>>,
) -> Graph {
    crate::canon::copy::copy_live(old, |def| match def {
        Def::Weight(w) => Def::Weight(weights[w].expect("a weight that is read is kept")),
        Def::State(s) => Def::State(states[s].expect("a state that is read is kept")),
        other => other,
    })
}
