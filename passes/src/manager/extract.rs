//! One function as a module of its own.

use crate::analysis::Function;
use crate::canon::copy::copy_live;
use quantc_ir::entity::{PrimaryMap, ShardId, StateId, WeightId};
use quantc_ir::graph::Def;
use quantc_ir::module::Module;
use quantc_ir::weights::{WeightDecl, WeightSource};
use std::collections::BTreeMap;

/// The function as the `main` of a module that declares what it reads; layers that it calls are not part of it.
///
/// `source` says where the bytes of a weight are from now on.
pub(super) fn extract(
    module: &Module,
    function: Function,
    source: impl Fn(&WeightDecl) -> WeightSource,
) -> Module {
    let old = function.graph(module);
    let mut weights: BTreeMap<WeightId, WeightId> = BTreeMap::new();
    let mut states: BTreeMap<StateId, StateId> = BTreeMap::new();
    let mut out = Module {
        name: function.name(module).into(),
        target: module.target.clone(),
        facts: module.facts.clone(),
        ..Module::default()
    };
    for &v in old.ops().flat_map(|(_, n)| &n.args).chain(&old.results) {
        match old.value(v).def {
            Def::Weight(w) => {
                weights.entry(w).or_insert_with(|| {
                    let decl = &module.weights[w];
                    out.weights.push(WeightDecl { source: source(decl), ..decl.clone() })
                });
            }
            Def::State(s) => {
                states.entry(s).or_insert_with(|| out.states.push(module.states[s].clone()));
            }
            _ => {}
        }
    }
    out.main = copy_live(old, |def| match def {
        Def::Weight(w) => Def::Weight(weights[&w]),
        Def::State(s) => Def::State(states[&s]),
        other => other,
    });
    let prefix = format!("{}.", function.name(module));
    for (key, numbers) in &module.calibration {
        if let Some(rest) = key.strip_prefix(&prefix) {
            out.calibration.insert(format!("main.{rest}"), numbers.clone());
        }
    }
    out
}

/// The module with other sources of weights. It names no files any more.
pub(super) fn with_sources(module: &Module, source: impl Fn(&WeightDecl) -> WeightSource) -> Module {
    let mut out = module.clone();
    for (_, decl) in out.weights.iter_mut() {
        if !matches!(decl.source, WeightSource::Alias(_)) {
            decl.source = source(decl);
        }
    }
    out.shards = PrimaryMap::<ShardId, _>::new();
    out
}
