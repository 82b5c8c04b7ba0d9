//! Copies of graphs.

use quantc_ir::entity::ValueId;
use quantc_ir::graph::{Def, Graph};
use std::collections::BTreeMap;

/// A copy of the program of `old` without the values that are no longer part of it. `leaf` renames weights and states.
pub fn copy_live(old: &Graph, leaf: impl Fn(Def) -> Def) -> Graph {
    let mut new = Graph::new();
    let mut at: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for &p in &old.params {
        let value = old.value(p);
        let q = new.add_param(value.name.as_deref().unwrap_or_default(), value.ty.clone());
        new.value_mut(q).name = value.name.clone();
        at.insert(p, q);
    }
    let get = |new: &mut Graph, at: &mut BTreeMap<ValueId, ValueId>, v: ValueId| {
        if let Some(&known) = at.get(&v) {
            return known;
        }
        let value = old.value(v);
        let made = match leaf(value.def) {
            Def::Weight(w) => new.weight(w, &value.ty),
            Def::State(s) => new.state(s, &value.ty),
            Def::None | Def::Param(_) | Def::Op(_) => new.none(),
        };
        if !matches!(value.def, Def::None) {
            new.value_mut(made).name = value.name.clone();
        }
        at.insert(v, made);
        made
    };
    for (_, node) in old.ops() {
        let args = node.args.iter().map(|&a| get(&mut new, &mut at, a)).collect();
        let value = old.value(node.result);
        let made = new.push(node.op.clone(), args, value.ty.clone(), value.name.as_deref());
        at.insert(node.result, made);
    }
    new.results = old.results.iter().map(|&r| get(&mut new, &mut at, r)).collect();
    new
}
