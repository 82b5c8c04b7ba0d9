//! Modules: what a model is to quantc.

use crate::diag::{Diag, Result};
use crate::entity::{LayerId, PrimaryMap, ShardId, StateId, WeightId};
use crate::graph::Graph;
use crate::ty::TensorTy;
use crate::weights::{Shard, Weights};
use std::collections::BTreeMap;

/// A function isolated from above: it reads its parameters, weights and states, nothing of `main`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// The name, without `@`.
    pub name: String,
    /// The body; it has one result.
    pub graph: Graph,
}

/// What the engine keeps between calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The name, without `@`.
    pub name: String,
    /// One row per token of the context: the first extent is the context length.
    pub ty: TensorTy,
}

/// A model: `main`, the layers it calls, and what they read.
///
/// Before layers are outlined everything is in `main`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Module {
    /// The name, without `@`.
    pub name: String,
    /// Facts about the model that the graph does not hold (`context`, `bos`, `eos`, ..), in order of name.
    pub facts: BTreeMap<String, String>,
    /// The target this text is for, when it is for one.
    pub target: Option<String>,
    /// The pipeline applied so far, as text.
    pub pipeline: Option<String>,
    /// Files that weights lie in.
    pub shards: PrimaryMap<ShardId, Shard>,
    /// Weights.
    pub weights: Weights,
    /// States.
    pub states: PrimaryMap<StateId, State>,
    /// Layers, in the order in which `main` first calls them.
    pub layers: PrimaryMap<LayerId, Layer>,
    /// The entry.
    pub main: Graph,
    /// Statistics of values, as in the text's `calibration` section: `layer.value.statistic` to numbers.
    pub calibration: BTreeMap<String, Vec<crate::ops::Real>>,
}

impl Module {
    /// An empty module.
    pub fn new(name: impl Into<String>) -> Module {
        Module { name: name.into(), ..Module::default() }
    }

    /// The layer called `name`.
    pub fn layer(&self, name: &str) -> Option<LayerId> {
        self.layers.iter().find(|(_, l)| l.name == name).map(|(id, _)| id)
    }

    /// The weight called `name`.
    pub fn weight(&self, name: &str) -> Option<WeightId> {
        self.weights.iter().find(|(_, w)| w.name == name).map(|(id, _)| id)
    }

    /// The state called `name`.
    pub fn state(&self, name: &str) -> Option<StateId> {
        self.states.iter().find(|(_, s)| s.name == name).map(|(id, _)| id)
    }

    /// A name for a new weight that starts with `stem` and is not taken.
    pub fn fresh_weight_name(&self, stem: &str) -> String {
        let taken: std::collections::BTreeSet<&str> =
            self.weights.values().map(|w| w.name.as_str()).collect();
        let mut name = stem.to_string();
        let mut n = 1;
        while taken.contains(name.as_str()) {
            n += 1;
            name = format!("{stem}.{n}");
        }
        name
    }

    /// Every graph with the name of its function: the layers, then `main`.
    pub fn graphs(&self) -> impl Iterator<Item = (&str, &Graph)> {
        let layers = self.layers.values().map(|l| (l.name.as_str(), &l.graph));
        layers.chain(std::iter::once(("main", &self.main)))
    }

    /// Every graph, to be changed: the layers, then `main`.
    pub fn graphs_mut(&mut self) -> impl Iterator<Item = &mut Graph> {
        self.layers.iter_mut().map(|(_, l)| &mut l.graph).chain(std::iter::once(&mut self.main))
    }

    /// A number among the facts.
    pub fn fact_u64(&self, name: &str) -> Result<Option<u64>> {
        let parse = |text: &String| {
            text.parse().map_err(|_| Diag::input(format!("fact `{name}` is `{text}`, not a whole number")))
        };
        self.facts.get(name).map(parse).transpose()
    }

    /// The signature of a layer, for inference at its calls.
    pub fn signature(&self, name: &str) -> Option<Signature> {
        let layer = &self.layers[self.layer(name)?];
        let ty = |&v| layer.graph.ty(v).clone();
        Some(Signature {
            params: layer.graph.params.iter().map(ty).collect(),
            result: layer.graph.results.first().map(ty)?,
        })
    }
}

/// Types of a layer's parameters and result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// Parameter types in order.
    pub params: Vec<TensorTy>,
    /// The type of the result.
    pub result: TensorTy,
}
