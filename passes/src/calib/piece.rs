//! Parts of a model as modules of their own.

use crate::analysis::{Analysis, RegionHash};
use crate::canon::unpacked;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::entity::{OpId, StateId, ValueId, WeightId};
use quantc_ir::graph::{Def, Graph};
use quantc_ir::module::Module;
use quantc_ir::ops::{Call, Op};
use quantc_ir::ty::ElemTy;
use quantc_ir::weights::{Digest, Recipe, Store};
use std::collections::{BTreeMap, BTreeSet};

/// A part of a model: a module whose `main` computes some values from others, with all layers inlined.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The module. It declares what it reads, names the shards of the model, and is called whole: every call has all rows of
    /// a sample, as an encoder's.
    pub module: Module,
    /// A name for what it computes: program and contents of weights.
    pub key: Digest,
}

/// What a piece is to compute.
#[derive(Clone, Copy, Debug)]
pub enum Wanted<'a> {
    /// Values of `main`.
    Main(&'a [ValueId]),
    /// Values inside of the layer that an op of `main` calls.
    Inside(OpId, &'a [ValueId]),
}

/// Cuts the piece of `module` out that computes what is `wanted` from the ids and from the values `given` of `main`.
pub fn cut(
    module: &Module,
    store: &Store,
    given: &[ValueId],
    wanted: Wanted<'_>,
    tokens: usize,
) -> Result<Piece> {
    let mut out = Module { name: module.name.clone(), shards: module.shards.clone(), ..Module::default() };
    let facts = [("kind", "encoder".to_string()), ("context", tokens.to_string())];
    out.facts.extend(facts.map(|(fact, value)| (fact.to_string(), value)));
    out.facts.extend(module.facts.get("vocab").map(|vocab| ("vocab".to_string(), vocab.clone())));
    let mut cutter =
        Cutter { module, out, graph: Graph::new(), weights: BTreeMap::new(), states: BTreeMap::new() };
    let mut at = BTreeMap::new();
    for &p in module.main.params.iter().filter(|&&p| module.main.ty(p).elem == ElemTy::I32).chain(given) {
        let value = module.main.value(p);
        let made = cutter.graph.add_param(value.name.as_deref().unwrap_or("rows"), value.ty.clone());
        at.insert(p, made);
    }
    let results = match wanted {
        Wanted::Main(values) => {
            cutter.copy(&module.main, values, &mut at)?;
            find(values, &at)?
        }
        Wanted::Inside(call, values) => {
            let node = module.main.node(call);
            cutter.copy(&module.main, &node.args, &mut at)?;
            let layer = cutter.layer(&node.op)?;
            let mut inner = layer.params.iter().copied().zip(find(&node.args, &at)?).collect();
            cutter.copy(layer, values, &mut inner)?;
            find(values, &inner)?
        }
    };
    let Cutter { mut out, mut graph, .. } = cutter;
    graph.results = results;
    out.main = graph;
    let key = key(&out, store)?;
    Ok(Piece { module: out, key })
}

fn find(values: &[ValueId], at: &BTreeMap<ValueId, ValueId>) -> Result<Vec<ValueId>> {
    let missing = || Diag::bug("a value that is wanted was not computed");
    values.iter().map(|v| at.get(v).copied().ok_or_else(missing)).collect()
}

/// How many inputs of ids the `main` of a piece has.
pub fn inputs_of_ids(piece: &Module) -> usize {
    piece.main.params.iter().filter(|&&p| piece.main.ty(p).elem == ElemTy::I32).count()
}

/// Names program and weights. Names of values and weights do not count.
fn key(module: &Module, store: &Store) -> Result<Digest> {
    layer_key(module, &module.main, store)
}

/// Names the program and the weights of a function. Names of values and weights do not count.
pub fn layer_key(module: &Module, graph: &Graph, store: &Store) -> Result<Digest> {
    let RegionHash(program) = RegionHash::compute(module, graph)?;
    let mut inputs = vec![program];
    let mut seen = BTreeSet::new();
    for (_, node) in graph.ops() {
        for w in node.args.iter().filter_map(|&a| graph.as_weight(a)) {
            if seen.insert(w) {
                inputs.push(store.digest(&module.weights, w)?);
            }
        }
    }
    Ok(Recipe { step: "piece", version: 1, options: String::new(), inputs }.digest())
}

struct Cutter<'a> {
    module: &'a Module,
    out: Module,
    graph: Graph,
    weights: BTreeMap<WeightId, WeightId>,
    states: BTreeMap<StateId, StateId>,
}

impl<'a> Cutter<'a> {
    fn layer(&self, op: &Op) -> Result<&'a Graph> {
        let call: Option<&Call> = op.is();
        let layer = call.and_then(|call| self.module.layer(&call.layer));
        let layer = layer.ok_or_else(|| Diag::input("a call of a layer that does not exist"))?;
        Ok(&self.module.layers[layer].graph)
    }

    /// Copies what of `old` computes `wanted` from what `at` knows.
    fn copy(&mut self, old: &Graph, wanted: &[ValueId], at: &mut BTreeMap<ValueId, ValueId>) -> Result<()> {
        let needed = needed(old, wanted, at);
        for (_, node) in old.ops().filter(|(op, _)| needed.contains(op)) {
            let args: Vec<ValueId> =
                node.args.iter().map(|&a| self.operand(old, a, at)).collect::<Result<_>>()?;
            let result = match node.op {
                Op::Call(_) => {
                    let layer = self.layer(&node.op)?;
                    let mut inner = layer.params.iter().copied().zip(args).collect();
                    self.copy(layer, &layer.results, &mut inner)?;
                    *find(&layer.results, &inner)?
                        .first()
                        .ok_or_else(|| Diag::input("a layer without a result"))?
                }
                _ => {
                    let value = old.value(node.result);
                    // Packed forms belong to a target.
                    self.graph.push(unpacked(&node.op), args, value.ty.clone(), None)
                }
            };
            at.insert(node.result, result);
        }
        // Weights may be wanted as they are.
        for &v in wanted {
            let made = self.operand(old, v, at)?;
            at.insert(v, made);
        }
        Ok(())
    }

    fn operand(&mut self, old: &Graph, v: ValueId, at: &BTreeMap<ValueId, ValueId>) -> Result<ValueId> {
        if let Some(&known) = at.get(&v) {
            return Ok(known);
        }
        let value = old.value(v);
        Ok(match value.def {
            Def::Weight(w) => {
                let made = match self.weights.get(&w) {
                    Some(&made) => made,
                    None => {
                        let real = quantc_ir::weights::resolve(&self.module.weights, w)?;
                        let made = self.out.weights.push(self.module.weights[real].clone());
                        self.weights.insert(w, made);
                        made
                    }
                };
                self.graph.weight(made, &value.ty)
            }
            Def::State(s) => {
                let states = &mut self.out.states;
                let made =
                    *self.states.entry(s).or_insert_with(|| states.push(self.module.states[s].clone()));
                self.graph.state(made, &value.ty)
            }
            Def::None => self.graph.none(),
            Def::Param(_) | Def::Op(_) => {
                return Err(Diag::bug("a piece reads a value that it does not compute"));
            }
        })
    }
}

/// The ops that `wanted` needs, without those behind values that are known.
fn needed(graph: &Graph, wanted: &[ValueId], known: &BTreeMap<ValueId, ValueId>) -> BTreeSet<OpId> {
    let mut needed = BTreeSet::new();
    let mut open: Vec<ValueId> = wanted.to_vec();
    while let Some(v) = open.pop() {
        if known.contains_key(&v) {
            continue;
        }
        if let Some((op, node)) = graph.def(v)
            && needed.insert(op)
        {
            open.extend(&node.args);
        }
    }
    needed
}
