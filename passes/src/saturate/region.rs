//! Regions: one function without its names, so that equal layers are equal regions, and what solving one yields.

use quantc_ir::diag::{Diag, Result};
use quantc_ir::entity::{OpId, ValueId};
use quantc_ir::graph::{Def, Graph};
use quantc_ir::ops::Op;
use quantc_ir::ty::TensorTy;
use std::collections::{BTreeMap, BTreeSet};

/// What a leaf is. Which weight it is does not matter, only that it is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum LeafKind {
    Param,
    Weight,
    State,
}

/// A value of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Ref {
    Leaf(u32),
    /// The result of the op at this place.
    Op(u32),
    None,
}

/// An op of a region.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct RegionOp {
    pub(super) op: Op,
    pub(super) args: Vec<Ref>,
    pub(super) ty: TensorTy,
}

/// One function: leaves in order of first use, ops in program order, results.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Region {
    pub(super) leaves: Vec<(LeafKind, TensorTy)>,
    pub(super) ops: Vec<RegionOp>,
    pub(super) results: Vec<Ref>,
}

/// Where the parts of a region lie in its graph.
pub(super) struct Place {
    leaves: Vec<ValueId>,
    ops: Vec<OpId>,
}

impl Place {
    /// The value of a leaf.
    pub(super) fn leaf(&self, i: u32) -> ValueId {
        self.leaves[i as usize]
    }

    /// The op at a place of the region.
    pub(super) fn op(&self, i: u32) -> OpId {
        self.ops[i as usize]
    }
}

impl Region {
    /// The region that `graph` is.
    pub(super) fn of(graph: &Graph) -> Result<(Region, Place)> {
        let mut region = Region::default();
        let mut place = Place { leaves: vec![], ops: vec![] };
        let mut known = BTreeMap::<ValueId, Ref>::new();
        let read = |region: &mut Region,
                    place: &mut Place,
                    known: &mut BTreeMap<ValueId, Ref>,
                    v: ValueId| {
            if let Some(&r) = known.get(&v) {
                return Ok(r);
            }
            let kind = match graph.value(v).def {
                Def::Param(_) => LeafKind::Param,
                Def::Weight(_) => LeafKind::Weight,
                Def::State(_) => LeafKind::State,
                Def::None => return Ok(Ref::None),
                Def::Op(op) => {
                    let name = graph.node(op).op.name();
                    return Err(Diag::bug(format!("the result of `{name}` is read before it is computed")));
                }
            };
            let r = Ref::Leaf(region.leaves.len() as u32);
            region.leaves.push((kind, graph.ty(v).clone()));
            place.leaves.push(v);
            known.insert(v, r);
            Ok(r)
        };
        for (id, node) in graph.ops() {
            let args = node.args.iter().map(|&a| read(&mut region, &mut place, &mut known, a));
            let args = args.collect::<Result<Vec<_>>>()?;
            known.insert(node.result, Ref::Op(region.ops.len() as u32));
            region.ops.push(RegionOp { op: node.op.clone(), args, ty: graph.ty(node.result).clone() });
            place.ops.push(id);
        }
        for &r in &graph.results {
            let r = read(&mut region, &mut place, &mut known, r)?;
            region.results.push(r);
        }
        Ok((region, place))
    }

    /// How many ops and results read each op.
    pub(super) fn uses(&self) -> Vec<u32> {
        let mut uses = vec![0u32; self.ops.len()];
        let read = self.ops.iter().flat_map(|o| &o.args).chain(&self.results);
        for r in read {
            if let Ref::Op(i) = r {
                uses[*i as usize] += 1;
            }
        }
        uses
    }
}

/// One op of a solution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) op: Op,
    /// Operands; `Ref::Op` counts steps.
    pub(super) args: Vec<Ref>,
    pub(super) ty: TensorTy,
    /// The op of the region that computes the same value.
    pub(super) replaces: Option<u32>,
    /// The rules that led here, first to last.
    pub(super) because: Vec<&'static str>,
}

/// What a region becomes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Solution {
    pub(super) steps: Vec<Step>,
    pub(super) results: Vec<Ref>,
    /// For each rule of the run, how often it matched.
    pub(super) matches: Vec<u64>,
    /// A limit that was hit before nothing new was found.
    pub(super) limit: Option<&'static str>,
}

impl Solution {
    /// Whether it is what `region` is.
    pub(super) fn is_identity(&self, region: &Region) -> bool {
        let same = |(i, (step, op)): (usize, (&Step, &RegionOp))| {
            step.replaces == Some(i as u32) && step.op == op.op && step.args == op.args
        };
        self.results == region.results
            && self.steps.len() == region.ops.len()
            && self.steps.iter().zip(&region.ops).enumerate().all(same)
    }

    /// Rewrites `graph`, which lies at `place`. Values that are still computed keep their ids and names.
    pub(super) fn apply(&self, graph: &mut Graph, place: &Place) -> Result<()> {
        let none = graph.none();
        let kept: BTreeSet<u32> = self.steps.iter().filter_map(|s| s.replaces).collect();
        let mut values: Vec<ValueId> = Vec::with_capacity(self.steps.len());
        // New ops go behind the last op that was placed before them.
        let mut after: Option<OpId> = None;
        for step in &self.steps {
            let value = |r: &Ref| match *r {
                Ref::Leaf(i) => place.leaves[i as usize],
                Ref::Op(i) => values[i as usize],
                Ref::None => none,
            };
            let args: Vec<ValueId> = step.args.iter().map(value).collect();
            let result = match step.replaces {
                Some(i) => {
                    let node = graph.node_mut(place.ops[i as usize]);
                    node.op = step.op.clone();
                    node.args = args;
                    node.result
                }
                None => {
                    let at = after.and_then(|op| graph.position(op)).map_or(0, |p| p + 1);
                    graph.insert(at, step.op.clone(), args, step.ty.clone(), None)
                }
            };
            after = graph.def(result).map(|(op, _)| op);
            values.push(result);
        }
        for (i, &op) in place.ops.iter().enumerate() {
            if !kept.contains(&(i as u32)) {
                graph.erase(op);
            }
        }
        let results = self.results.iter().map(|r| match *r {
            Ref::Leaf(i) => place.leaves[i as usize],
            Ref::Op(i) => values[i as usize],
            Ref::None => none,
        });
        graph.results = results.collect();
        graph.sort()
    }
}
