//! Graphs: typed SSA with operands inside the op.
//!
//! What holds in a valid graph (the verifier checks it):
//! - every value is defined once: a parameter, the result of an op, a weight, a state, or `none`;
//! - [`Graph::order`] lists every live op once, and an op comes after the ops whose results it reads;
//! - weights, states and `none` are values without a defining op, at most one value for each of them;
//! - every op has one result, whose type is what the op's inference says.

use crate::diag::{Diag, Result};
use crate::entity::{OpId, PrimaryMap, StateId, ValueId, WeightId};
use crate::ops::{Op, OpSpec};
use crate::ty::TensorTy;

/// How a value comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Def {
    /// The parameter with this index.
    Param(u32),
    /// The result of an op.
    Op(OpId),
    /// A weight of the module.
    Weight(WeightId),
    /// A state of the module.
    State(StateId),
    /// An optional operand that is absent.
    None,
}

/// A value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// How it comes to be.
    pub def: Def,
    /// Its type; `None` has the empty f32 shape.
    pub ty: TensorTy,
    /// The name in texts, without `%`; values without one are numbered when printed.
    pub name: Option<String>,
}

/// An operation in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// What it computes, with its attributes.
    pub op: Op,
    /// What it reads, one entry for each declared operand.
    pub args: Vec<ValueId>,
    /// What it makes.
    pub result: ValueId,
}

/// The body of `main` or of a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Graph {
    values: PrimaryMap<ValueId, Value>,
    nodes: PrimaryMap<OpId, Node>,
    order: Vec<OpId>,
    /// Parameters in order.
    pub params: Vec<ValueId>,
    /// Results in order.
    pub results: Vec<ValueId>,
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Graph {
        Graph::default()
    }

    /// Appends a parameter.
    pub fn add_param(&mut self, name: &str, ty: TensorTy) -> ValueId {
        let index = u32::try_from(self.params.len()).expect("parameters are counted by people");
        let v = self.values.push(Value { def: Def::Param(index), ty, name: Some(name.into()) });
        self.params.push(v);
        v
    }

    /// The value of a weight, made on first use.
    pub fn weight(&mut self, id: WeightId, ty: &TensorTy) -> ValueId {
        self.leaf(Def::Weight(id), ty)
    }

    /// The value of a state, made on first use.
    pub fn state(&mut self, id: StateId, ty: &TensorTy) -> ValueId {
        self.leaf(Def::State(id), ty)
    }

    /// The value of an absent operand.
    pub fn none(&mut self) -> ValueId {
        self.leaf(Def::None, &TensorTy::fixed(crate::ty::ElemTy::F32, &[]))
    }

    fn leaf(&mut self, def: Def, ty: &TensorTy) -> ValueId {
        let known = self.values.iter().find(|(_, v)| v.def == def).map(|(id, _)| id);
        known.unwrap_or_else(|| self.values.push(Value { def, ty: ty.clone(), name: None }))
    }

    /// Appends an op whose result type is known. Absent trailing operands are filled with `none`.
    pub fn push(&mut self, op: Op, args: Vec<ValueId>, ty: TensorTy, name: Option<&str>) -> ValueId {
        let at = self.order.len();
        self.insert(at, op, args, ty, name)
    }

    /// Inserts an op at a position of [`Graph::order`].
    pub fn insert(
        &mut self,
        at: usize,
        op: Op,
        mut args: Vec<ValueId>,
        ty: TensorTy,
        name: Option<&str>,
    ) -> ValueId {
        while args.len() < op.operands().fixed() {
            let none = self.none();
            args.push(none);
        }
        let id = OpId::from_index(self.nodes.len());
        let result = self.values.push(Value { def: Def::Op(id), ty, name: name.map(String::from) });
        self.nodes.push(Node { op, args, result });
        self.order.insert(at, id);
        result
    }

    /// The live ops in program order.
    pub fn order(&self) -> &[OpId] {
        &self.order
    }

    /// The live ops in program order with their nodes.
    pub fn ops(&self) -> impl DoubleEndedIterator<Item = (OpId, &Node)> {
        self.order.iter().map(|&id| (id, &self.nodes[id]))
    }

    /// Position of `op` in program order.
    pub fn position(&self, op: OpId) -> Option<usize> {
        self.order.iter().position(|&o| o == op)
    }

    /// An op.
    pub fn node(&self, op: OpId) -> &Node {
        &self.nodes[op]
    }

    /// An op, to be changed. The caller keeps the result type true.
    pub fn node_mut(&mut self, op: OpId) -> &mut Node {
        &mut self.nodes[op]
    }

    /// A value.
    pub fn value(&self, v: ValueId) -> &Value {
        &self.values[v]
    }

    /// A value, to be changed.
    pub fn value_mut(&mut self, v: ValueId) -> &mut Value {
        &mut self.values[v]
    }

    /// All values ever made, dead ones included.
    pub fn values(&self) -> impl Iterator<Item = (ValueId, &Value)> {
        self.values.iter()
    }

    /// The type of a value.
    pub fn ty(&self, v: ValueId) -> &TensorTy {
        &self.values[v].ty
    }

    /// The op that makes `v`, when one does.
    pub fn def(&self, v: ValueId) -> Option<(OpId, &Node)> {
        match self.values[v].def {
            Def::Op(op) => Some((op, &self.nodes[op])),
            _ => None,
        }
    }

    /// The weight that `v` is, when it is one.
    pub fn as_weight(&self, v: ValueId) -> Option<WeightId> {
        match self.values[v].def {
            Def::Weight(w) => Some(w),
            _ => None,
        }
    }

    /// Whether `v` stands for an absent operand.
    pub fn is_none(&self, v: ValueId) -> bool {
        self.values[v].def == Def::None
    }

    /// The live ops that read `v`, in program order, one entry for each use.
    pub fn users(&self, v: ValueId) -> Vec<OpId> {
        let uses = |&(_, n): &(OpId, &Node)| n.args.iter().filter(|&&a| a == v).count();
        self.ops().flat_map(|e| std::iter::repeat_n(e.0, uses(&e))).collect()
    }

    /// Whether `v` is a result of the graph.
    pub fn is_result(&self, v: ValueId) -> bool {
        self.results.contains(&v)
    }

    /// Makes every reader of `old`, the graph's results included, read `new`. The types must agree.
    pub fn replace_all_uses(&mut self, old: ValueId, new: ValueId) -> Result<()> {
        if self.ty(old) != self.ty(new) {
            return Err(Diag::bug(format!(
                "replacing a value of type {} with one of type {}",
                self.ty(old),
                self.ty(new)
            )));
        }
        for &op in &self.order {
            for arg in &mut self.nodes[op].args {
                if *arg == old {
                    *arg = new;
                }
            }
        }
        for r in &mut self.results {
            if *r == old {
                *r = new;
            }
        }
        if self.values[new].name.is_none() && self.values[new].def != Def::None {
            self.values[new].name = self.values[old].name.take();
        }
        Ok(())
    }

    /// Takes `op` out of the program. Its result must have no readers.
    pub fn erase(&mut self, op: OpId) {
        self.order.retain(|&o| o != op);
    }

    /// Takes out every op whose result nobody reads and that has no effect; returns how many.
    pub fn drop_dead(&mut self) -> usize {
        let mut live = crate::entity::SecondaryMap::<ValueId, bool>::new();
        for &r in &self.results {
            live[r] = true;
        }
        let before = self.order.len();
        let mut kept = Vec::with_capacity(before);
        for &op in self.order.iter().rev() {
            let node = &self.nodes[op];
            if live[node.result] || node.op.has_effect() {
                for &a in &node.args {
                    live[a] = true;
                }
                kept.push(op);
            }
        }
        kept.reverse();
        self.order = kept;
        before - self.order.len()
    }

    /// Puts the ops into a topological order that keeps the present order where it can. An error names an op on a cycle.
    pub fn sort(&mut self) -> Result<()> {
        let mut placed = crate::entity::SecondaryMap::<OpId, bool>::new();
        let mut rest = std::mem::take(&mut self.order);
        while !rest.is_empty() {
            let before = rest.len();
            let mut later = vec![];
            for op in rest {
                let ready = self.nodes[op].args.iter().all(|&a| match self.values[a].def {
                    Def::Op(d) => placed[d],
                    _ => true,
                });
                if ready {
                    placed[op] = true;
                    self.order.push(op);
                } else {
                    later.push(op);
                }
            }
            if later.len() == before {
                let name = self.nodes[later[0]].op.name();
                self.order.extend(later);
                return Err(Diag::bug(format!("`{name}` depends on its own result")));
            }
            rest = later;
        }
        Ok(())
    }
}

impl OpId {
    fn from_index(index: usize) -> OpId {
        crate::entity::Entity::new(index)
    }
}
