//! Rules: equations between expressions of our ops, each with the means to prove it.

use super::enode::{Discriminant, ENode, Graph, Head, infer};
use super::pattern::{Bindings, Pattern};
use super::region::{LeafKind, Region, Solution, Step};
use crate::pass::Numerics;
use egg::Id;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::entity::ValueId;
use quantc_ir::graph::{Def, Graph as IrGraph};
use quantc_ir::ops::{AsOp, Op};
use quantc_ir::ty::TensorTy;

/// An equation, used from left to right; made by [`rule!`](crate::rule!).
#[derive(Debug)]
pub struct Rule {
    /// The name in explanations and timing tables.
    pub name: &'static str,
    /// The equation.
    pub doc: &'static str,
    /// What it does to results.
    pub numerics: Numerics,
    /// The left-hand side.
    pub lhs: &'static str,
    /// The right-hand side.
    pub rhs: &'static str,
    /// The op at the root of the right-hand side, or `None` when the rule does not apply.
    pub root: fn(&Match<'_>) -> Option<Op>,
    /// Operands and attributes to prove it with; the rule must apply to each.
    pub samples: fn() -> Vec<Sample>,
}

/// Declares a rule: its equation, name, numerics, both sides, the op it makes and samples that prove it.
#[macro_export]
macro_rules! rule {
    (
        $(#[doc = $doc:literal])+
        $name:literal, $numerics:ident, $lhs:literal => $rhs:literal,
        root: $root:expr, samples: $samples:expr $(,)?
    ) => {
        $crate::saturate::Rule {
            name: $name,
            doc: ::core::concat!($($doc, "\n"),+),
            numerics: $crate::pass::Numerics::$numerics,
            lhs: $lhs,
            rhs: $rhs,
            root: $root,
            samples: $samples,
        }
    };
}

/// What a rule found.
pub struct Match<'a> {
    pub(super) egraph: &'a Graph,
    pub(super) root: Id,
    pub(super) found: &'a Bindings,
}

impl Match<'_> {
    /// The labelled op.
    pub fn op<T: AsOp>(&self, label: &str) -> Option<&T> {
        T::of(self.found.op(label)?.0)
    }

    /// The type of a value, or of the result of a labelled op.
    pub fn ty(&self, name: &str) -> Option<&TensorTy> {
        self.egraph[self.found.id(name)?].data.ty.as_ref()
    }

    /// The type of the whole.
    pub fn root_ty(&self) -> Option<&TensorTy> {
        self.egraph[self.root].data.ty.as_ref()
    }

    /// Number of values that a list holds.
    pub fn count(&self, rest: &str) -> usize {
        self.found.rest(rest).map_or(0, <[Id]>::len)
    }

    /// Whether a value is the same in every run.
    pub fn is_constant(&self, name: &str) -> bool {
        self.found.id(name).is_some_and(|id| self.egraph[id].data.constant)
    }

    /// Whether a value is read once, and so is no longer needed when its reader takes it in.
    pub fn is_read_once(&self, name: &str) -> bool {
        self.found.id(name).is_some_and(|id| self.egraph[id].data.uses <= 1)
    }
}

/// A rule with its sides read.
#[derive(Debug)]
pub(super) struct Compiled {
    pub(super) rule: &'static Rule,
    lhs: Pattern,
    rhs: Pattern,
    root: Discriminant,
}

/// Where a rule matched.
pub(super) struct Found {
    pub(super) class: Id,
    /// The node at the root of the left-hand side.
    pub(super) node: ENode,
    pub(super) bindings: Bindings,
}

impl Compiled {
    pub(super) fn new(rule: &'static Rule) -> Result<Compiled> {
        let (lhs, rhs) = (Pattern::parse(rule.lhs)?, Pattern::parse(rule.rhs)?);
        let bad = |why: String| Diag::bug(format!("the rule `{}` {why}", rule.name));
        let known = lhs.names();
        if let Some(name) = rhs.names().into_iter().find(|n| !known.contains(n)) {
            return Err(bad(format!("has a right-hand side with `{name}`, which is not on the left")));
        }
        match (lhs.root(), rhs.root()) {
            (Some(root), Some(_)) => Ok(Compiled { rule, lhs, rhs, root }),
            _ => Err(bad("must have an op at the root of both sides".into())),
        }
    }

    /// All matches, in a fixed order.
    pub(super) fn search(&self, egraph: &Graph) -> Vec<Found> {
        let mut classes: Vec<Id> =
            egraph.classes_for_op(&self.root).into_iter().flatten().map(|c| egraph.find(c)).collect();
        classes.sort_unstable();
        classes.dedup();
        let mut all = vec![];
        for class in classes {
            for node in &egraph[class].nodes {
                let found = self.lhs.search_node(egraph, node, class, &Bindings::default());
                all.extend(found.into_iter().map(|bindings| Found { class, node: node.clone(), bindings }));
            }
        }
        all
    }

    /// The node that the right-hand side is for a match, once its operands are in the e-graph; `None` when the rule
    /// does not apply.
    pub(super) fn build(&self, egraph: &mut Graph, found: &Found) -> Result<Option<ENode>> {
        let root = Match { egraph, root: found.class, found: &found.bindings };
        let Some(op) = (self.rule.root)(&root) else { return Ok(None) };
        let Pattern::Op { args, kind, .. } = &self.rhs else {
            return Err(self.bug("has no op at the root"));
        };
        if op.kind() != *kind {
            return Err(self.bug(format!("makes `{}` where it says `{}`", op.name(), kind.info().name)));
        }
        let args = self.build_args(egraph, args, &found.bindings)?;
        let ty = infer(egraph, &op, &args).map_err(|e| self.bug(format!("makes an ill-typed op: {e}")))?;
        match &egraph[found.class].data.ty {
            Some(want) if *want == ty => Ok(Some(ENode { head: Head::Op(op), args })),
            want => {
                let want = want.as_ref().map_or("nothing".into(), TensorTy::to_string);
                Err(self.bug(format!("makes {ty} of {want}")))
            }
        }
    }

    fn build_args(&self, egraph: &mut Graph, args: &[Pattern], found: &Bindings) -> Result<Vec<Id>> {
        let mut ids = vec![];
        for arg in args {
            match arg {
                Pattern::Any(name) => {
                    ids.push(found.id(name).ok_or_else(|| self.bug(format!("does not bind `{name}`")))?);
                }
                Pattern::Rest(name) => {
                    let rest = found.rest(name).ok_or_else(|| self.bug(format!("does not bind `{name}`")))?;
                    ids.extend(rest);
                }
                Pattern::None => ids.push(egraph.add(ENode { head: Head::None, args: vec![] })),
                Pattern::Op { kind, label, args } => {
                    let op = match label {
                        Some(label) => {
                            found.op(label).map(|(op, _)| op.clone()).filter(|op| op.kind() == *kind)
                        }
                        None => Some(Op::default_of(*kind)),
                    };
                    let op =
                        op.ok_or_else(|| self.bug(format!("has no attributes for `{}`", kind.info().name)))?;
                    let args = self.build_args(egraph, args, found)?;
                    infer(egraph, &op, &args).map_err(|e| self.bug(format!("makes an ill-typed op: {e}")))?;
                    ids.push(egraph.add(ENode { head: Head::Op(op), args }));
                }
            }
        }
        Ok(ids)
    }

    fn bug(&self, why: impl std::fmt::Display) -> Diag {
        Diag::bug(format!("the rule `{}` {why}", self.rule.name))
    }
}

/// What a rule is proved with: the types of its values and the attributes of its labelled ops. Values that are not
/// mentioned are absent operands, lists that are not mentioned are empty.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    values: Vec<(&'static str, TensorTy)>,
    rests: Vec<(&'static str, Vec<TensorTy>)>,
    ops: Vec<(&'static str, Op)>,
}

impl Sample {
    /// Nothing given yet.
    pub fn new() -> Sample {
        Sample::default()
    }

    /// Gives the type of a value.
    pub fn value(mut self, name: &'static str, ty: TensorTy) -> Sample {
        self.values.push((name, ty));
        self
    }

    /// Gives the types of a list.
    pub fn rest(mut self, name: &'static str, types: Vec<TensorTy>) -> Sample {
        self.rests.push((name, types));
        self
    }

    /// Gives the attributes of a labelled op.
    pub fn op(mut self, label: &'static str, op: impl Into<Op>) -> Sample {
        self.ops.push((label, op.into()));
        self
    }
}

impl Rule {
    /// Both sides for a sample, as graphs that take the sample's values as parameters. There is one right-hand side
    /// for each way in which the left one matches; a rule that does not match its sample is an error.
    pub fn sides(&'static self, sample: &Sample) -> Result<(IrGraph, Vec<IrGraph>)> {
        let compiled = Compiled::new(self)?;
        let mut lhs = IrGraph::new();
        let mut known = vec![];
        let root = lower(&compiled.lhs, sample, &mut lhs, &mut known)?;
        lhs.results = root;
        let (region, place) = Region::of(&lhs)?;
        let mut built = super::build_egraph(&region)?;
        let (class, egraph) = (built.ops[region.ops.len() - 1], &mut built.egraph);
        let mut sides = vec![];
        for found in compiled.search(egraph) {
            if egraph.find(found.class) != egraph.find(class) {
                continue;
            }
            let Some(node) = compiled.build(egraph, &found)? else { continue };
            sides.push(raise(egraph, &region, &node, &lhs, &place)?);
        }
        if sides.is_empty() {
            return Err(Diag::bug(format!(
                "the rule `{}` does not apply to a sample: {sample:?}",
                self.name
            )));
        }
        Ok((lhs, sides))
    }
}

/// Makes the left-hand side; values become parameters.
fn lower(
    pattern: &Pattern,
    sample: &Sample,
    graph: &mut IrGraph,
    known: &mut Vec<(&'static str, ValueId)>,
) -> Result<Vec<ValueId>> {
    let Pattern::Op { kind, label, args } = pattern else {
        let (name, types): (&str, Vec<&TensorTy>) = match pattern {
            Pattern::Any(name) => {
                (name, sample.values.iter().filter(|(n, _)| n == name).map(|(_, t)| t).collect())
            }
            Pattern::Rest(name) => {
                (name, sample.rests.iter().filter(|(n, _)| n == name).flat_map(|(_, t)| t).collect())
            }
            _ => ("", vec![]),
        };
        let before: Vec<ValueId> = known.iter().filter(|(n, _)| *n == name).map(|(_, v)| *v).collect();
        if !before.is_empty() && !name.is_empty() {
            return Ok(before);
        }
        if types.is_empty() && !matches!(pattern, Pattern::Rest(_)) {
            return Ok(vec![graph.none()]);
        }
        let mut made = vec![];
        for (i, ty) in types.into_iter().enumerate() {
            let param = graph.add_param(&format!("{name}{i}"), ty.clone());
            if let Pattern::Any(name) | Pattern::Rest(name) = pattern {
                known.push((name, param));
            }
            made.push(param);
        }
        return Ok(made);
    };
    let mut values = vec![];
    for arg in args {
        values.extend(lower(arg, sample, graph, known)?);
    }
    let given = label.and_then(|l| sample.ops.iter().find(|(n, _)| *n == l)).map(|(_, op)| op.clone());
    let op = given.unwrap_or_else(|| Op::default_of(*kind));
    Ok(vec![graph.append(op, &values, None)?])
}

/// The graph of a right-hand side: `node` on top of nodes of the e-graph, the first of each class.
fn raise(
    egraph: &Graph,
    region: &Region,
    node: &ENode,
    lhs: &IrGraph,
    place: &super::region::Place,
) -> Result<IrGraph> {
    let mut graph = IrGraph::new();
    let params: Vec<ValueId> = lhs
        .params
        .iter()
        .map(|&p| graph.add_param(lhs.value(p).name.as_deref().unwrap_or(""), lhs.ty(p).clone()))
        .collect();
    let result = raise_node(egraph, region, node, lhs, place, &params, &mut graph)?;
    graph.results = vec![result];
    Ok(graph)
}

fn raise_node(
    egraph: &Graph,
    region: &Region,
    node: &ENode,
    lhs: &IrGraph,
    place: &super::region::Place,
    params: &[ValueId],
    graph: &mut IrGraph,
) -> Result<ValueId> {
    match &node.head {
        Head::None => Ok(graph.none()),
        Head::Leaf(i) => match (region.leaves.get(*i as usize), lhs.value(place.leaf(*i)).def) {
            (Some((LeafKind::Param, _)), Def::Param(p)) => Ok(params[p as usize]),
            _ => Err(Diag::bug("a sample with a leaf that is no parameter")),
        },
        Head::Op(op) | Head::Effect(op, _) => {
            let mut args = vec![];
            for &arg in &node.args {
                let first = egraph[arg].nodes.first().ok_or_else(|| Diag::bug("an empty class"))?;
                args.push(raise_node(egraph, region, first, lhs, place, params, graph)?);
            }
            graph.append(op.clone(), &args, None)
        }
    }
}

impl Step {
    /// Whether rules made it.
    pub(super) fn is_rewritten(&self) -> bool {
        !self.because.is_empty()
    }
}

impl Solution {
    /// The steps that rules made.
    pub(super) fn rewritten(&self) -> impl Iterator<Item = (usize, &Step)> {
        self.steps.iter().enumerate().filter(|(_, s)| s.is_rewritten())
    }
}
