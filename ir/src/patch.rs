//! Patches: small graphs with taps into a graph and shunts out of it.
//!
//! A rule looks at a [`Graph`] and builds a patch against it: [`tap`](Patch::tap) names a value of the graph,
//! [`op`](Patch::op) adds an op on taps and on other new values, and [`shunt`](Patch::shunt) makes every reader of a
//! value of the graph read another value. Nothing changes until [`apply`](Edit::apply), which checks the whole patch
//! first: a shunt whose types disagree is an error of the rule that made it, not of a pass three steps later.
//!
//! What holds after `apply`:
//! - either the graph is as it was and an error says why, or every part of the patch is in it;
//! - new ops stand right after the last op they read, and program order stays topological;
//! - a shunt reaches every reader of the old value but those that the new value is itself computed from, so no patch
//!   makes a circle;
//! - what nobody reads any more and has no effect is gone, as are new ops that nobody came to read;
//! - a value that takes the place of a named one takes its name, when it has none itself.
//!
//! ```
//! use quantc_ir::{graph::Graph, ops::{Relu, Silu}, patch::Patch, ty::{ElemTy, TensorTy}};
//! let mut graph = Graph::new();
//! let x = graph.add_param("x", TensorTy::fixed(ElemTy::F32, &[4]));
//! let y = graph.append(Relu {}, &[x], Some("y"))?;
//! graph.results.push(y);
//!
//! let mut patch = Patch::new(&graph);
//! let x = patch.tap(x);
//! let z = patch.op(Silu {}, &[x])?;
//! patch.shunt(y, z)?;
//! patch.into_edit().apply(&mut graph)?;
//! assert_eq!(graph.ops().map(|(_, n)| n.op.name()).collect::<Vec<_>>(), ["silu"]);
//! # Ok::<(), quantc_ir::diag::Diag>(())
//! ```

use crate::diag::{Diag, Result};
use crate::entity::{Entity, OpId, SecondaryMap, StateId, ValueId, WeightId};
use crate::graph::{Def, Graph};
use crate::module::Signature;
use crate::ops::{InferCx, Op, OpSpec};
use crate::ty::{ElemTy, TensorTy};

/// A value of a patch: one of the graph, or a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PatchValue(Source);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    /// A value of the graph.
    Tap(ValueId),
    /// An entry of [`Edit::leaves`].
    Leaf(usize),
    /// The result of a new op.
    New(usize),
}

#[derive(Clone, Debug)]
struct NewOp {
    op: Op,
    args: Vec<Source>,
    ty: TensorTy,
    name: Option<String>,
}

/// A patch in the making, against a graph that it does not change.
#[derive(Clone, Debug)]
pub struct Patch<'g> {
    graph: &'g Graph,
    edit: Edit,
}

/// A finished patch, which no longer borrows the graph.
#[derive(Clone, Debug, Default)]
pub struct Edit {
    /// Values without a defining op, made when the patch is applied.
    leaves: Vec<(Def, TensorTy)>,
    ops: Vec<NewOp>,
    shunts: Vec<(ValueId, Source)>,
}

impl<'g> Patch<'g> {
    /// A patch that changes nothing yet.
    pub fn new(graph: &'g Graph) -> Patch<'g> {
        Patch { graph, edit: Edit::default() }
    }

    /// A value of the graph.
    pub fn tap(&mut self, v: ValueId) -> PatchValue {
        PatchValue(Source::Tap(v))
    }

    /// The value of a weight, which the graph need not have read before.
    pub fn weight(&mut self, id: WeightId, ty: &TensorTy) -> PatchValue {
        self.leaf(Def::Weight(id), ty.clone())
    }

    /// The value of a state, which the graph need not have read before.
    pub fn state(&mut self, id: StateId, ty: &TensorTy) -> PatchValue {
        self.leaf(Def::State(id), ty.clone())
    }

    /// The value of an absent operand.
    pub fn none(&mut self) -> PatchValue {
        self.leaf(Def::None, TensorTy::fixed(ElemTy::F32, &[]))
    }

    fn leaf(&mut self, def: Def, ty: TensorTy) -> PatchValue {
        self.edit.leaves.push((def, ty));
        PatchValue(Source::Leaf(self.edit.leaves.len() - 1))
    }

    /// The type of a value.
    pub fn ty(&self, v: PatchValue) -> &TensorTy {
        self.edit.ty(self.graph, v.0)
    }

    /// Adds an op with the inferred result type. Operands absent at the end are filled with `none`.
    pub fn op(&mut self, op: impl Into<Op>, args: &[PatchValue]) -> Result<PatchValue> {
        self.op_with(op, args, &|_| None)
    }

    /// As [`op`](Self::op), where the op may be a call of one of `layers`.
    pub fn op_with(
        &mut self,
        op: impl Into<Op>,
        args: &[PatchValue],
        layers: &dyn Fn(&str) -> Option<Signature>,
    ) -> Result<PatchValue> {
        let op = op.into();
        let mut args = args.to_vec();
        while args.len() < op.operands().fixed() {
            args.push(self.none());
        }
        let types = args.iter().map(|&a| (!self.is_none(a)).then(|| self.ty(a))).collect();
        let ty = op
            .infer(&InferCx { args: types, layers })
            .map_err(|e| e.context(format!("building `{}` in a patch", op.name())))?;
        let args = args.into_iter().map(|a| a.0).collect();
        self.edit.ops.push(NewOp { op, args, ty, name: None });
        Ok(PatchValue(Source::New(self.edit.ops.len() - 1)))
    }

    /// Names a new value. Values of the graph keep their names.
    pub fn name(&mut self, v: PatchValue, name: impl Into<String>) {
        if let Source::New(i) = v.0 {
            self.edit.ops[i].name = Some(name.into());
        }
    }

    fn is_none(&self, v: PatchValue) -> bool {
        match v.0 {
            Source::Tap(v) => self.graph.is_none(v),
            Source::Leaf(i) => self.edit.leaves[i].0 == Def::None,
            Source::New(_) => false,
        }
    }

    /// Makes every reader of `old`, the results of the graph included, read `new`. The types must agree.
    pub fn shunt(&mut self, old: ValueId, new: PatchValue) -> Result<()> {
        let (old_ty, new_ty) = (self.graph.ty(old), self.ty(new));
        if old_ty != new_ty {
            return Err(disagree(old_ty, new_ty));
        }
        self.edit.shunts.push((old, new.0));
        Ok(())
    }

    /// The finished patch.
    pub fn into_edit(self) -> Edit {
        self.edit
    }
}

fn disagree(old: &TensorTy, new: &TensorTy) -> Diag {
    Diag::bug(format!("a patch replaces a value of type {old} with one of type {new}"))
}

impl Edit {
    /// Whether applying it would change nothing.
    pub fn is_empty(&self) -> bool {
        self.shunts.is_empty()
    }

    fn ty<'a>(&'a self, graph: &'a Graph, source: Source) -> &'a TensorTy {
        match source {
            Source::Tap(v) => graph.ty(v),
            Source::Leaf(i) => &self.leaves[i].1,
            Source::New(i) => &self.ops[i].ty,
        }
    }

    /// Applies the patch to the graph it was built against and returns the values of the new ops that stayed, in order.
    pub fn apply(self, graph: &mut Graph) -> Result<Vec<ValueId>> {
        self.check(graph)?;
        let mut patched = graph.clone();
        let leaf = |g: &mut Graph, (def, ty): &(Def, TensorTy)| match *def {
            Def::Weight(w) => g.weight(w, ty),
            Def::State(s) => g.state(s, ty),
            _ => g.none(),
        };
        let leaves: Vec<ValueId> = self.leaves.iter().map(|l| leaf(&mut patched, l)).collect();
        let mut new: Vec<ValueId> = vec![];
        let resolve = |new: &[ValueId], source: Source| match source {
            Source::Tap(v) => v,
            Source::Leaf(i) => leaves[i],
            Source::New(i) => new[i],
        };
        let mut positions = positions(&patched);
        for op in self.ops {
            let args: Vec<ValueId> = op.args.iter().map(|&a| resolve(&new, a)).collect();
            let after = |&a: &ValueId| patched.def(a).map_or(0, |(d, _)| positions[d] + 1);
            let at = args.iter().map(after).max().unwrap_or(0);
            let value = patched.insert(at, op.op, args, op.ty, op.name.as_deref());
            positions = self::positions(&patched);
            new.push(value);
        }
        for (old, to) in self.shunts {
            let to = resolve(&new, to);
            // What the new value is computed from keeps reading the old one, or it would read itself.
            let keep = ancestors(&patched, to);
            redirect(&mut patched, old, to, &keep);
        }
        patched.sort().map_err(|e| e.context("applying a patch"))?;
        patched.drop_dead();
        let listed = self::positions(&patched);
        new.retain(|&v| patched.def(v).is_some_and(|(op, _)| listed[op] != usize::MAX));
        *graph = patched;
        Ok(new)
    }

    /// Whether the patch fits the graph: every value exists, and shunted types agree.
    fn check(&self, graph: &Graph) -> Result<()> {
        let count = graph.values().count();
        let exists = |s: &Source| !matches!(s, Source::Tap(v) if v.index() >= count);
        let taps = self.ops.iter().flat_map(|o| &o.args).chain(self.shunts.iter().map(|(_, to)| to));
        let old = self.shunts.iter().all(|(old, _)| old.index() < count);
        if !old || !taps.into_iter().all(exists) {
            return Err(Diag::bug("a patch names a value that the graph does not have"));
        }
        let listed = positions(graph);
        for op in &self.ops {
            for arg in &op.args {
                if let Source::Tap(v) = arg
                    && graph.def(*v).is_some_and(|(d, _)| listed[d] == usize::MAX)
                {
                    return Err(Diag::bug(format!(
                        "a patch with `{}` reads a value that is gone",
                        op.op.name()
                    )));
                }
            }
        }
        for (old, to) in &self.shunts {
            let (old_ty, new_ty) = (graph.ty(*old), self.ty(graph, *to));
            if old_ty != new_ty {
                return Err(disagree(old_ty, new_ty));
            }
        }
        Ok(())
    }
}

/// Place of each live op in program order; `usize::MAX` for others.
fn positions(graph: &Graph) -> SecondaryMap<OpId, usize> {
    let mut positions = SecondaryMap::with_default(usize::MAX);
    graph.order().iter().enumerate().for_each(|(i, &op)| positions[op] = i);
    positions
}

/// The ops that `v` is computed from.
fn ancestors(graph: &Graph, v: ValueId) -> SecondaryMap<OpId, bool> {
    let mut seen = SecondaryMap::<OpId, bool>::new();
    let mut stack = vec![v];
    while let Some(v) = stack.pop() {
        if let Some((op, node)) = graph.def(v)
            && !std::mem::replace(&mut seen[op], true)
        {
            stack.extend(&node.args);
        }
    }
    seen
}

fn redirect(graph: &mut Graph, old: ValueId, new: ValueId, keep: &SecondaryMap<OpId, bool>) {
    for op in graph.order().to_vec() {
        if !keep[op] {
            graph.node_mut(op).args.iter_mut().filter(|a| **a == old).for_each(|a| *a = new);
        }
    }
    graph.results.iter_mut().filter(|r| **r == old).for_each(|r| *r = new);
    let takes = graph.value(new).name.is_none() && graph.def(new).is_some() && graph.def(old).is_some();
    if takes && !graph.is_result(old) && graph.users(old).is_empty() {
        graph.value_mut(new).name = graph.value_mut(old).name.take();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Add, Cast, Relu, Silu, Tanh};
    use crate::text::{parse, print};
    use crate::ty::Float;
    use crate::verify::verify;

    /// `main` of a text, a patch on it, and the body that comes out.
    fn patched(
        body: &str,
        build: impl Fn(&mut Patch<'_>, &dyn Fn(&str) -> ValueId) -> Result<()>,
    ) -> Result<String> {
        let head = "module @m\nmain (%x: tensor<4xf32>) -> tensor<4xf32> {\n";
        let mut m = parse(&format!("{head}{body}}}\n"), "test").unwrap().module;
        let edit = {
            let graph = &m.main;
            let named = |n: &str| graph.values().find(|(_, v)| v.name.as_deref() == Some(n)).unwrap().0;
            let mut patch = Patch::new(graph);
            build(&mut patch, &named)?;
            patch.into_edit()
        };
        let before = m.main.clone();
        let applied = edit.apply(&mut m.main);
        if let Err(e) = applied {
            assert_eq!(m.main, before, "a refused patch changes nothing");
            return Err(e);
        }
        verify(&m).unwrap_or_else(|e| panic!("{}", e.show(&m)));
        let text = print(&m);
        let ops =
            text.lines().filter(|l| l.starts_with("  ")).map(|l| l.trim().replace(" : tensor<4xf32>", ""));
        Ok(ops.collect::<Vec<_>>().join("; "))
    }

    const CHAIN: &str = "%a = relu %x\n%b = silu %a\n%c = tanh %b\n%d = add %c, %a\nreturn %d\n";

    #[test]
    fn two_ops_become_one() {
        let text = patched(CHAIN, |p, v| {
            let a = p.tap(v("a"));
            let new = p.op(Tanh {}, &[a])?;
            p.shunt(v("c"), new)
        });
        assert_eq!(text.unwrap(), "%a = relu %x; %c = tanh %a; %d = add %c, %a; return %d");
    }

    #[test]
    fn a_value_may_be_wrapped() {
        let text = patched(CHAIN, |p, v| {
            let a = p.tap(v("a"));
            let new = p.op(Silu {}, &[a])?;
            p.name(new, "w");
            p.shunt(v("a"), new)
        });
        assert_eq!(
            text.unwrap(),
            "%a = relu %x; %w = silu %a; %b = silu %w; %c = tanh %b; %d = add %c, %w; return %d"
        );
    }

    #[test]
    fn a_value_may_be_bypassed() {
        let text = patched(CHAIN, |p, v| {
            let x = p.tap(v("x"));
            p.shunt(v("c"), x)
        });
        assert_eq!(text.unwrap(), "%a = relu %x; %d = add %x, %a; return %d");
    }

    #[test]
    fn ops_that_nobody_reads_do_not_stay() {
        let text = patched(CHAIN, |p, v| {
            let a = p.tap(v("a"));
            let lost = p.op(Silu {}, &[a])?;
            p.op(Add {}, &[lost, a])?;
            let kept = p.op(Relu {}, &[a])?;
            p.shunt(v("d"), kept)
        });
        assert_eq!(text.unwrap(), "%a = relu %x; %d = relu %a; return %d");
    }

    #[test]
    fn order_stays_topological_when_later_values_are_read_earlier() {
        // %b becomes a function of %z, which stands after the readers of %b.
        let body = "%a = relu %x\n%b = silu %a\n%c = tanh %b\n%z = silu %x\n%d = add %c, %z\nreturn %d\n";
        let text = patched(body, |p, v| {
            let z = p.tap(v("z"));
            let new = p.op(Relu {}, &[z])?;
            p.shunt(v("b"), new)
        });
        assert_eq!(text.unwrap(), "%z = silu %x; %b = relu %z; %c = tanh %b; %d = add %c, %z; return %d");
    }

    #[test]
    fn types_must_agree() {
        let error = patched(CHAIN, |p, v| {
            let a = p.tap(v("a"));
            let new = p.op(Cast { to: Float::F16.into(), ..Default::default() }, &[a])?;
            p.shunt(v("c"), new)
        });
        let message = error.unwrap_err().message;
        assert_eq!(message, "a patch replaces a value of type tensor<4xf32> with one of type tensor<4xf16>");
    }

    #[test]
    fn what_a_new_value_is_computed_from_stays() {
        // %new is computed from %c, and %c from %a: %c goes on reading %a, only the sum reads %new.
        let text = patched(CHAIN, |p, v| {
            let c = p.tap(v("c"));
            let new = p.op(Relu {}, &[c])?;
            p.name(new, "new");
            p.shunt(v("a"), new)
        });
        assert_eq!(
            text.unwrap(),
            "%a = relu %x; %b = silu %a; %c = tanh %b; %new = relu %c; %d = add %c, %new; return %d"
        );
    }

    #[test]
    fn a_patch_against_another_graph_is_refused() {
        let mut small = Graph::new();
        small.add_param("x", TensorTy::fixed(ElemTy::F32, &[4]));
        let m = parse(&format!("module @m\nmain (%x: tensor<4xf32>) -> tensor<4xf32> {{\n{CHAIN}}}"), "test")
            .unwrap();
        let mut patch = Patch::new(&m.module.main);
        let last = m.module.main.results[0];
        let tap = patch.tap(last);
        let new = patch.op(Relu {}, &[tap]).unwrap();
        patch.shunt(last, new).unwrap();
        assert!(patch.into_edit().apply(&mut small).is_err());
    }
}
