//! A function built anew: each op is looked at once, with all that it reads already rebuilt.
//!
//! What holds: a value is replaced by one of the same type; ops that act on a state stay, in their order; names of values
//! stay with what takes their place.

use super::canonicalize::simplified;
use super::forms::{self, Form};
use crate::pass::prelude::*;
use quantc_ir::build::infer;
use quantc_ir::entity::SecondaryMap;
use quantc_ir::eval::Tensor;
use quantc_ir::ops::{AsOp, Cast, Expand, Reshape, Slice, Transpose};
use quantc_ir::weights::{Store, WeightDecl, WeightSource};
use std::collections::BTreeMap;

/// The function under construction.
pub(super) struct Rebuild<'a> {
    /// The new function.
    pub(super) graph: Graph,
    pub(super) module: &'a mut Module,
    pub(super) store: &'a Store,
    forms: SecondaryMap<ValueId, Option<Option<Form>>>,
    leaves: BTreeMap<WeightId, ValueId>,
    /// Whether values depend on weights alone.
    constants: SecondaryMap<ValueId, bool>,
    /// Constants of few numbers, by their types and bytes.
    numbers: BTreeMap<(String, Vec<u8>), WeightId>,
    /// What reads each value in the old function, by what it became.
    readers: SecondaryMap<ValueId, Readers>,
}

/// What reads a value.
#[derive(Clone, Debug, Default)]
pub(super) struct Readers {
    /// The ops, one entry for each use.
    pub(super) ops: Vec<Op>,
    /// Whether the function gives it as a result.
    pub(super) result: bool,
}

/// What a pass makes of one op: the value to read instead, when it has a better one.
pub(super) type Look<'f> =
    dyn FnMut(&mut Rebuild<'_>, &Op, &[ValueId], &TensorTy) -> Result<Option<ValueId>> + 'f;

/// Ops that were replaced, by their names.
pub(super) type Replaced = BTreeMap<&'static str, usize>;

/// Rebuilds the function that a pass runs on.
pub(super) fn rebuild(cx: &mut PassCx<'_>, look: &mut Look<'_>) -> Result<Replaced> {
    let old = cx.graph().clone();
    let (store, function) = (cx.store, cx.function);
    let mut readers = BTreeMap::<ValueId, Readers>::new();
    for (_, node) in old.ops() {
        node.args.iter().for_each(|&a| readers.entry(a).or_default().ops.push(node.op.clone()));
    }
    old.results.iter().for_each(|&r| readers.entry(r).or_default().result = true);
    let mut b = Rebuild {
        graph: Graph::new(),
        module: cx.module,
        store,
        forms: SecondaryMap::new(),
        leaves: BTreeMap::new(),
        constants: SecondaryMap::new(),
        numbers: BTreeMap::new(),
        readers: SecondaryMap::new(),
    };
    let mut at: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for &p in &old.params {
        let v = b.graph.add_param("", old.ty(p).clone());
        b.graph.value_mut(v).name.clone_from(&old.value(p).name);
        b.readers[v] = readers.get(&p).cloned().unwrap_or_default();
        at.insert(p, v);
    }
    let mut replaced = BTreeMap::new();
    for (_, node) in old.ops() {
        let args: Vec<ValueId> = node.args.iter().map(|&a| b.arg(&old, &mut at, a)).collect();
        let ty = old.ty(node.result);
        let found = if node.op.has_effect() { None } else { look(&mut b, &node.op, &args, ty)? };
        let value = match found {
            Some(v) if b.ty(v) == ty => {
                *replaced.entry(node.op.name()).or_default() += 1;
                v
            }
            Some(v) => {
                let (is, was) = (b.ty(v), node.op.name());
                return Err(Diag::bug(format!("`{was}` of type {ty} is replaced by a value of type {is}")));
            }
            // Moves that what was found makes needless.
            None if !replaced.is_empty() && matches!(node.op, Op::Transpose(_) | Op::Reshape(_)) => {
                let simple = simplified(&mut b, &node.op, &args, ty)?.filter(|&v| b.ty(v) == ty);
                simple.unwrap_or_else(|| b.push(node.op.clone(), args, ty.clone()))
            }
            None => b.push(node.op.clone(), args, ty.clone()),
        };
        if let Some(more) = readers.remove(&node.result) {
            b.readers[value].ops.extend(more.ops);
            b.readers[value].result |= more.result;
        }
        let name = &old.value(node.result).name;
        if b.graph.value(value).name.is_none() && b.graph.def(value).is_some() {
            b.graph.value_mut(value).name.clone_from(name);
        }
        at.insert(node.result, value);
    }
    let results = old.results.iter().map(|&r| b.arg(&old, &mut at, r)).collect();
    let mut graph = b.graph;
    graph.results = results;
    graph.drop_dead();
    // What did not change keeps its values, which others may know.
    if !replaced.is_empty() {
        *function.graph_mut(cx.module) = graph;
    }
    Ok(replaced)
}

/// Tells which ops were written otherwise.
pub(super) fn tell(cx: &mut PassCx<'_>, replaced: &Replaced) {
    let listed: Vec<String> = replaced.iter().map(|(name, n)| format!("{name} x{n}")).collect();
    if !listed.is_empty() {
        let place = format!("@{}", cx.function_name());
        cx.remark(place, format_args!("{}", listed.join(", ")));
    }
}

/// Tells how often `what` was found.
pub(super) fn tell_found(cx: &mut PassCx<'_>, what: &str, replaced: &Replaced) {
    let n: usize = replaced.values().sum();
    if n > 0 {
        let place = format!("@{}", cx.function_name());
        cx.remark(place, format_args!("found {what} x{n}"));
    }
}

impl Rebuild<'_> {
    fn arg(&mut self, old: &Graph, at: &mut BTreeMap<ValueId, ValueId>, v: ValueId) -> ValueId {
        if let Some(&known) = at.get(&v) {
            return known;
        }
        let ty = old.ty(v);
        let new = match old.value(v).def {
            Def::Weight(w) => self.weight(w, ty),
            Def::State(s) => self.graph.state(s, ty),
            Def::None | Def::Param(_) | Def::Op(_) => self.graph.none(),
        };
        at.insert(v, new);
        new
    }

    /// The value of a weight of the module.
    pub(super) fn weight_value(&mut self, w: WeightId) -> ValueId {
        let ty = self.module.weights[w].ty.clone();
        self.weight(w, &ty)
    }

    fn weight(&mut self, w: WeightId, ty: &TensorTy) -> ValueId {
        let graph = &mut self.graph;
        *self.leaves.entry(w).or_insert_with(|| graph.weight(w, ty))
    }

    fn push(&mut self, op: Op, args: Vec<ValueId>, ty: TensorTy) -> ValueId {
        let known: Vec<(Option<Form>, TensorTy)> =
            args.iter().map(|&a| (self.form(a), self.ty(a).clone())).collect();
        let known: Vec<(Option<Form>, &TensorTy)> = known.iter().map(|(f, t)| (f.clone(), t)).collect();
        let form = forms::of_op(&op, &known, &ty);
        let constant =
            |&a: &ValueId| self.graph.is_none(a) || self.graph.as_weight(a).is_some() || self.constants[a];
        let constant = !op.has_effect() && !args.is_empty() && args.iter().all(constant);
        let v = self.graph.push(op, args, ty, None);
        self.forms[v] = Some(form);
        self.constants[v] = constant;
        v
    }

    /// The result of an op, in its simplest form.
    pub(super) fn emit(&mut self, op: impl Into<Op>, args: &[ValueId]) -> Result<ValueId> {
        let op = op.into();
        let ty = infer(&self.graph, &op, args, &|_| None)
            .map_err(|e| e.context(format!("building `{}`", op.name())))?;
        if let Some(simple) = simplified(self, &op, args, &ty)? {
            return Ok(simple);
        }
        Ok(self.push(op, args.to_vec(), ty))
    }

    /// The type of a value.
    pub(super) fn ty(&self, v: ValueId) -> &TensorTy {
        self.graph.ty(v)
    }

    /// The extents of a value.
    pub(super) fn dims(&self, v: ValueId) -> Vec<Dim> {
        self.ty(v).shape.0.clone()
    }

    /// What makes `v`, when it is an op of this kind.
    pub(super) fn is<T: AsOp + Clone>(&self, v: ValueId) -> Option<(T, Vec<ValueId>)> {
        let (_, node) = self.graph.def(v)?;
        Some((T::of(&node.op)?.clone(), node.args.clone()))
    }

    /// What reads `v` in the function as it was.
    pub(super) fn readers(&self, v: ValueId) -> &Readers {
        &self.readers[v]
    }

    /// Whether one op or result at most reads `v`.
    pub(super) fn is_read_once(&self, v: ValueId) -> bool {
        self.readers[v].ops.len() + usize::from(self.readers[v].result) <= 1
    }

    /// What is known of a value.
    pub(super) fn form(&mut self, v: ValueId) -> Option<Form> {
        if let Some(known) = &self.forms[v] {
            return known.clone();
        }
        let form = match self.graph.value(v).def {
            Def::Weight(w) => forms::of_weight(self.graph.ty(v), self.store, self.module, w),
            _ => None,
        };
        self.forms[v] = Some(form.clone());
        form
    }

    /// The number that all elements of `v` are.
    pub(super) fn number(&mut self, v: ValueId) -> Option<f64> {
        self.form(v)?.uniform()
    }

    /// Whether all elements of `v` are `x`, as near as f32 tells.
    pub(super) fn is_number(&mut self, v: ValueId, x: f64) -> bool {
        self.number(v).is_some_and(|n| near(n, x))
    }

    /// Whether `v` is the same in every run.
    pub(super) fn is_constant(&self, v: ValueId) -> bool {
        if self.ty(v).shape.dims().is_none() {
            return false;
        }
        self.constants[v] || self.graph.as_weight(v).is_some()
    }

    /// A constant of one number.
    pub(super) fn scalar(&mut self, elem: ElemTy, x: f64) -> Result<ValueId> {
        self.constant(TensorTy::fixed(elem, &[]), vec![x])
    }

    /// A constant of few numbers.
    pub(super) fn constant(&mut self, ty: TensorTy, numbers: Vec<f64>) -> Result<ValueId> {
        let tensor = match ty.elem.int() {
            Some(_) => Tensor::from_ints(&ty, numbers.into_iter().map(|x| x as i128))?,
            None => Tensor::from_reals(&ty, numbers)?,
        };
        let bytes = tensor.to_stored();
        let key = (ty.to_string(), bytes.clone());
        if let Some(&id) = self.numbers.get(&key) {
            return Ok(self.weight(id, &ty));
        }
        let same = |w: &WeightDecl| w.ty == ty && w.source == WeightSource::Inline(bytes.clone());
        let known = self.module.weights.iter().find(|(_, w)| same(w)).map(|(id, _)| id);
        let id = match known {
            Some(id) => id,
            None => {
                let name = self.module.fresh_weight_name("const");
                self.module.weights.push(WeightDecl {
                    name,
                    ty: ty.clone(),
                    source: WeightSource::Inline(bytes),
                })
            }
        };
        self.numbers.insert(key, id);
        Ok(self.weight(id, &ty))
    }

    // Ops by their common use.

    /// The same elements under another shape.
    pub(super) fn reshape(&mut self, x: ValueId, dims: &[Dim]) -> Result<ValueId> {
        self.emit(Reshape { shape: Shape(dims.to_vec()) }, &[x])
    }

    /// Axes in another order.
    pub(super) fn transpose(&mut self, x: ValueId, perm: &[u8]) -> Result<ValueId> {
        // Matrices are turned in one way of writing, which constants are folded by.
        let perm = if perm == [1, 0] { vec![] } else { perm.to_vec() };
        self.emit(Transpose { perm }, &[x])
    }

    /// The tensor repeated to a shape.
    pub(super) fn expand(&mut self, x: ValueId, dims: &[Dim]) -> Result<ValueId> {
        self.emit(Expand { shape: Shape(dims.to_vec()) }, &[x])
    }

    /// Indices `start .. start + len` of an axis.
    pub(super) fn slice(&mut self, x: ValueId, axis: usize, start: u64, len: u64) -> Result<ValueId> {
        self.emit(Slice { axis: axis as u8, start, len, step: 1 }, &[x])
    }

    /// The same numbers in other elements.
    pub(super) fn cast(&mut self, x: ValueId, to: ElemTy) -> Result<ValueId> {
        self.emit(Cast { to, ..Cast::default() }, &[x])
    }

    /// `x` without a factor that is one number: what it is without, and the factor. Looks through moves of elements.
    pub(super) fn unscaled(&mut self, x: ValueId) -> Result<Option<(ValueId, f64)>> {
        self.unscaled_within(x, 8)
    }

    fn unscaled_within(&mut self, x: ValueId, moves: u32) -> Result<Option<(ValueId, f64)>> {
        let (Some((_, node)), Some(moves)) = (self.graph.def(x), moves.checked_sub(1)) else {
            return Ok(None);
        };
        let (op, args) = (node.op.clone(), node.args.clone());
        match op {
            Op::Transpose(_) | Op::Reshape(_) | Op::Expand(_) => {
                let Some((inner, factor)) = self.unscaled_within(args[0], moves)? else { return Ok(None) };
                Ok(Some((self.emit(op, &[inner])?, factor)))
            }
            op => Ok(self.factor(&op, &args, self.ty(x).clone())),
        }
    }

    /// `x` and `f`, when the op is `x * f` with one number `f` and changes no type.
    pub(super) fn factor(&mut self, op: &Op, args: &[ValueId], ty: TensorTy) -> Option<(ValueId, f64)> {
        let (x, f) = match op {
            Op::Mul(_) => match (self.number(args[0]), self.number(args[1])) {
                (_, Some(f)) => (args[0], f),
                (Some(f), _) => (args[1], f),
                _ => return None,
            },
            Op::Binary(k) if k.kind == quantc_ir::ops::BinaryKind::Div => {
                (args[0], 1.0 / self.number(args[1]).filter(|&f| f != 0.0)?)
            }
            _ => return None,
        };
        (*self.ty(x) == ty && ty.elem.is_real() && f.is_finite()).then_some((x, f))
    }
}

/// Whether two numbers are the same in f32, or next to it.
pub(super) fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 4e-7 * b.abs()
}
