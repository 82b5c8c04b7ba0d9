//! The nodes of the e-graph: our own ops with their attributes, and the leaves of a region.

use super::region::LeafKind;
use egg::{Analysis, DidMerge, EGraph, Id, Language};
use quantc_ir::diag::Result;
use quantc_ir::ops::{InferCx, Op, OpKind, OpSpec};
use quantc_ir::ty::TensorTy;
use std::fmt;

/// What a node is, besides its children.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Head {
    /// An op.
    Op(Op),
    /// An op with an effect. Its place in the region tells it from every other, so that two appends of the same rows
    /// stay two.
    Effect(Op, u32),
    /// A leaf of the region.
    Leaf(u32),
    /// An absent operand.
    None,
}

/// A node of the e-graph.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ENode {
    pub(super) head: Head,
    pub(super) args: Vec<Id>,
}

impl ENode {
    /// The op, when this is one that rules may look at.
    pub(super) fn op(&self) -> Option<&Op> {
        match &self.head {
            Head::Op(op) => Some(op),
            _ => None,
        }
    }
}

/// What nodes are looked up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Discriminant {
    Op(OpKind),
    Effect(OpKind),
    Leaf,
    None,
}

impl Language for ENode {
    type Discriminant = Discriminant;

    fn discriminant(&self) -> Discriminant {
        match &self.head {
            Head::Op(op) => Discriminant::Op(op.kind()),
            Head::Effect(op, _) => Discriminant::Effect(op.kind()),
            Head::Leaf(_) => Discriminant::Leaf,
            Head::None => Discriminant::None,
        }
    }

    fn matches(&self, other: &ENode) -> bool {
        self.head == other.head && self.args.len() == other.args.len()
    }

    fn children(&self) -> &[Id] {
        &self.args
    }

    fn children_mut(&mut self) -> &mut [Id] {
        &mut self.args
    }
}

impl fmt::Display for ENode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.head {
            Head::Op(op) | Head::Effect(op, _) => f.write_str(op.name()),
            Head::Leaf(i) => write!(f, "leaf{i}"),
            Head::None => f.write_str("none"),
        }
    }
}

/// What is known of a class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fact {
    /// The type of the value; absent operands have none.
    pub(super) ty: Option<TensorTy>,
    /// Whether the value is the same in every run.
    pub(super) constant: bool,
    /// How many ops and results of the region read the value before rewriting.
    pub(super) uses: u32,
}

/// Infers types and finds constants. A type that changes where classes merge is kept as a conflict, which the driver
/// reports together with the rule at fault.
#[derive(Clone, Debug, Default)]
pub(super) struct Types {
    /// Kind and type of each leaf.
    pub(super) leaves: Vec<(LeafKind, TensorTy)>,
    /// Type of each op with an effect, by its place in the region.
    pub(super) effects: Vec<TensorTy>,
    pub(super) conflict: Option<String>,
}

pub(super) type Graph = EGraph<ENode, Types>;

/// The type of `op` on classes of the e-graph.
pub(super) fn infer(egraph: &Graph, op: &Op, args: &[Id]) -> Result<TensorTy> {
    let args = args.iter().map(|&a| egraph[a].data.ty.as_ref()).collect();
    op.infer(&InferCx { args, layers: &|_| None })
}

impl Analysis<ENode> for Types {
    type Data = Fact;

    fn make(egraph: &mut Graph, node: &ENode, _: Id) -> Fact {
        let ty = match &node.head {
            Head::Op(op) => match infer(egraph, op, &node.args) {
                Ok(ty) => Some(ty),
                Err(e) => {
                    egraph.analysis.conflict.get_or_insert(format!("`{}` is ill-typed: {e}", op.name()));
                    None
                }
            },
            Head::Effect(_, i) => egraph.analysis.effects.get(*i as usize).cloned(),
            Head::Leaf(i) => egraph.analysis.leaves.get(*i as usize).map(|(_, ty)| ty.clone()),
            Head::None => None,
        };
        let constant = match &node.head {
            Head::Op(op) => {
                // `last_rows` of a constant still depends on the call.
                let fixed = !node.args.is_empty() && op.kind() != OpKind::LastRows;
                fixed && node.args.iter().all(|&a| egraph[a].data.constant)
            }
            Head::Effect(..) => false,
            Head::Leaf(i) => {
                egraph.analysis.leaves.get(*i as usize).is_some_and(|(k, _)| *k == LeafKind::Weight)
            }
            Head::None => true,
        };
        Fact { ty, constant, uses: 0 }
    }

    fn merge(&mut self, a: &mut Fact, b: Fact) -> DidMerge {
        if a.ty != b.ty {
            let text = |ty: &Option<TensorTy>| ty.as_ref().map_or("none".to_string(), TensorTy::to_string);
            self.conflict.get_or_insert(format!("{} is not {}", text(&a.ty), text(&b.ty)));
        }
        let merged = Fact {
            ty: a.ty.clone(),
            constant: a.constant || b.constant,
            uses: a.uses.saturating_add(b.uses),
        };
        let did = DidMerge(merged != *a, merged != b);
        *a = merged;
        did
    }
}
