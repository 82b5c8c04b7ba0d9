//! Building the graph: values that are computed when the engine runs, and those that are known before.
//!
//! An op whose operands are all small constants is evaluated at once by its own meaning, so that the arithmetic on
//! shapes that exporters write is gone. Extents that are not known are carried as extents as far as such arithmetic
//! only moves them; as numbers of another type they are computed.

use super::extents::{self, Arithmetic};
use super::tensor::{Const, MOST_READ};
use quantc_ir::diag::{Diag, Loc, Result};
use quantc_ir::entity::ValueId;
use quantc_ir::eval::{Tensor, eval_pure};
use quantc_ir::graph::{Def, Graph};
use quantc_ir::module::Module;
use quantc_ir::ops::{
    Add, Binary, BinaryKind, BitcastStorage, Cast, Compare, Concat, Cumulate, Dequantize, Expand, InferCx,
    Mul, Op, OpSpec, Order, Positions, Reduce, ReduceKind, Reshape, Select, Slice, Transpose, Unary,
    UnaryKind,
};
use quantc_ir::scheme::Group;
use quantc_ir::ty::{Dim, ElemTy, Float, Shape, TensorTy};
use quantc_ir::weights::{Store, WeightDecl, WeightSource};
use std::cell::{Cell, OnceCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Elements of constants that are computed while importing.
const MOST_FOLDED: u64 = 1 << 16;

/// Multiply-adds of an op that is computed while importing.
const MOST_WORK: u64 = 1 << 24;

/// Elements of constants that are computed while importing a model, beside one for each byte of its file.
const MOST_ELEMENTS: u64 = 1 << 23;

/// Ops of the module, beside one for each 16 bytes of the file.
const MOST_OPS: u64 = 1 << 16;

/// Stored bytes of a constant that is written into the module itself.
const MOST_INLINE: usize = 1024;

/// Among extents, the -1 with which shapes say that an extent follows from the others. No extent is called so.
pub(crate) const REST: Dim = Dim::Sym('-');

/// What a name of the model stands for.
#[derive(Clone)]
pub(crate) enum Val {
    /// Computed when the engine runs.
    Value(ValueId),
    /// Known.
    Const(Rc<Const>),
    /// Extents, of which some are known when the engine runs only: a list of i64, or one number.
    Extents {
        /// The extents.
        dims: Rc<Vec<Dim>>,
        /// Whether it is one number, not a list.
        scalar: bool,
    },
    /// Codes that are computed, which the model takes for integers.
    Codes(Rc<Codes>),
    /// An array in more axes than the model takes it for.
    Parted(Rc<Parted>),
}

/// An array that the model takes for one with an axis whose extent is a product without a name: `[4 t, 32]` where this is
/// `[t, 4, 32]`. What is done row by row, and other shapes, are done on its parts; everything else refuses it.
pub(crate) struct Parted {
    /// The array with an axis for each factor.
    pub(crate) parts: Val,
    /// The extents in the model, [`REST`] for the product.
    pub(crate) dims: Vec<Dim>,
}

/// Codes that are computed, and what the model says of them.
pub(crate) struct Codes {
    /// The codes with their scheme.
    pub(crate) codes: Val,
    /// Scales and zero points as the model gives them.
    pub(crate) scale: Val,
    pub(crate) zero: Option<Val>,
    /// The same in the shapes that the scheme wants.
    pub(crate) group_scale: Val,
    pub(crate) group_zero: Option<Val>,
    /// The type in the model: plain integers.
    pub(crate) ty: TensorTy,
    /// The codes as plain integers, once somebody reads them so.
    pub(crate) plain: OnceCell<ValueId>,
}

/// A constant of codes that is read as numbers.
pub(crate) struct Read {
    codes: Val,
    scale: Val,
    zero: Option<Val>,
    to: Float,
}

/// The module under construction.
pub(crate) struct Build<'a> {
    pub(crate) module: Module,
    pub(crate) store: &'a Store,
    /// Inputs that would have to be known.
    pub(crate) needs: BTreeSet<String>,
    /// Names of inputs.
    inputs: BTreeMap<ValueId, String>,
    /// Values that are constants of codes read as numbers.
    read: BTreeMap<ValueId, Rc<Read>>,
    names: BTreeSet<String>,
    /// The last number that was put behind a name.
    stems: BTreeMap<String, u64>,
    empty: Module,
    /// Elements and ops that may still be made.
    elements: Cell<u64>,
    ops: u64,
    none: Option<ValueId>,
    /// Whether `t` counts the tokens of a sequence.
    pub(crate) tokens: bool,
    /// Places along axes whose extent is not known.
    places: BTreeMap<Dim, Val>,
}

impl<'a> Build<'a> {
    /// The module called `name`, of a file of `size` bytes.
    pub(crate) fn new(name: &str, size: u64, store: &'a Store) -> Build<'a> {
        Build {
            module: Module::new(name),
            store,
            needs: BTreeSet::new(),
            inputs: BTreeMap::new(),
            read: BTreeMap::new(),
            names: BTreeSet::new(),
            stems: BTreeMap::new(),
            empty: Module::new("constants"),
            elements: Cell::new(MOST_ELEMENTS.saturating_add(size)),
            ops: MOST_OPS + size / 16,
            none: None,
            tokens: false,
            places: BTreeMap::new(),
        }
    }

    /// Takes `n` elements from what constants may have that are computed while importing.
    pub(crate) fn spend(&self, n: u64) -> Result<()> {
        let left = self.elements.get().checked_sub(n).ok_or_else(|| {
            Diag::input(format!(
                "{n} elements would be computed here, and all together are too many for this file"
            ))
        })?;
        self.elements.set(left);
        Ok(())
    }

    /// Adds an input.
    pub(crate) fn input(&mut self, name: &str, ty: TensorTy) -> Val {
        let fresh = self.fresh(name);
        let value = self.module.main.add_param(&fresh, ty);
        self.inputs.insert(value, name.into());
        Val::Value(value)
    }

    /// Calls a computed value by the name it has in the model.
    pub(crate) fn name(&mut self, val: &Val, name: &str) {
        let Val::Value(v) = val else { return };
        if self.module.main.def(*v).is_some() && self.module.main.value(*v).name.is_none() {
            let fresh = self.fresh(name);
            self.module.main.value_mut(*v).name = Some(fresh);
        }
    }

    fn fresh(&mut self, name: &str) -> String {
        let clean = |c: char| if c.is_control() || c == '"' || c == '\\' { '_' } else { c };
        let stem: String = name.chars().take(200).map(clean).collect();
        let mut name = stem.clone();
        // Where many have one stem, the next number is remembered.
        let last = self.stems.entry(stem.clone()).or_insert(1);
        while name.is_empty() || !self.names.insert(name.clone()) {
            *last += 1;
            name = format!("{stem}.{last}");
        }
        name
    }

    /// The type of a value.
    pub(crate) fn ty(&self, val: &Val) -> TensorTy {
        match val {
            Val::Value(v) => self.module.main.ty(*v).clone(),
            Val::Const(c) => c.ty.clone(),
            Val::Codes(c) => c.ty.clone(),
            Val::Parted(p) => TensorTy { shape: Shape(p.dims.clone()), ..self.ty(&p.parts) },
            Val::Extents { scalar: true, .. } => TensorTy::fixed(ElemTy::I64, &[]),
            Val::Extents { dims, .. } => TensorTy::fixed(ElemTy::I64, &[dims.len() as u64]),
        }
    }

    /// The extents of a value.
    pub(crate) fn dims(&self, val: &Val) -> Vec<Dim> {
        self.ty(val).shape.0
    }

    /// Number of axes.
    pub(crate) fn rank(&self, val: &Val) -> usize {
        self.ty(val).rank()
    }

    /// The extents of a value, all of which must be known.
    pub(crate) fn fixed(&self, val: &Val) -> Result<Vec<u64>> {
        let ty = self.ty(val);
        ty.shape.dims().ok_or_else(|| {
            Diag::input(format!("an operand of type {ty} has extents that are not known"))
                .help("give the named extents of the inputs numbers")
        })
    }

    /// A constant.
    pub(crate) fn constant(&self, tensor: Tensor) -> Val {
        Val::Const(Rc::new(Const::new(tensor)))
    }

    /// A list of i64.
    pub(crate) fn ints(&self, numbers: &[i64]) -> Val {
        let ty = TensorTy::fixed(ElemTy::I64, &[numbers.len() as u64]);
        let tensor = Tensor::from_ints(&ty, numbers.iter().map(|&n| n.into()));
        self.constant(tensor.expect("there are as many numbers as the type says"))
    }

    /// One number of type `elem`.
    pub(crate) fn scalar(&self, elem: ElemTy, x: f64) -> Result<Val> {
        let ty = TensorTy::fixed(elem, &[]);
        Ok(self.constant(match elem.int() {
            Some(_) => Tensor::from_ints(&ty, [x as i128].into_iter())?,
            None => Tensor::from_reals(&ty, vec![x])?,
        }))
    }

    /// A value that holds these extents: a constant when all are known.
    pub(crate) fn extents(&self, dims: Vec<Dim>) -> Val {
        let fixed: Option<Vec<i64>> = dims.iter().map(|d| i64::try_from(d.fixed()?).ok()).collect();
        match fixed {
            Some(fixed) => self.ints(&fixed),
            None => Val::Extents { dims: Rc::new(dims), scalar: false },
        }
    }

    /// The places `0, 1, ..` along an axis of extent `dim`, as i64.
    pub(crate) fn places(&mut self, dim: Dim) -> Result<Val> {
        if let Some(known) = self.places.get(&dim) {
            return Ok(known.clone());
        }
        let places = if self.tokens && dim == Dim::Sym('t') {
            let places = self.op_with(Positions {}, &[])?;
            self.cast(&places, ElemTy::I64)?
        } else {
            let one = self.scalar(ElemTy::I64, 1.0)?;
            let ones = self.expand(&one, vec![dim])?;
            self.op(Cumulate { exclusive: true, ..Cumulate::default() }, &[&ones])?
        };
        self.places.insert(dim, places.clone());
        Ok(places)
    }

    /// Extents as numbers that the engine computes: an axis is as long as it has ones.
    pub(crate) fn counted(&mut self, dims: &[Dim], scalar: bool) -> Result<Val> {
        let mut parts = vec![];
        for &dim in dims {
            parts.push(match dim {
                REST => self.ints(&[-1]),
                Dim::Static(n) => {
                    let n =
                        i64::try_from(n).map_err(|_| Diag::input(format!("the extent {n} is too large")))?;
                    self.ints(&[n])
                }
                Dim::Sym(_) => {
                    let one = self.ints(&[1]);
                    let ones = self.expand(&one, vec![dim])?;
                    self.reduce(ReduceKind::Sum, &ones, &[0])?
                }
            });
        }
        let parts: Vec<&Val> = parts.iter().collect();
        let list = self.concat(&parts, 0)?;
        if scalar { self.reshape(&list, vec![]) } else { Ok(list) }
    }

    /// The elements of a value that is known, and not too large to be read.
    pub(crate) fn known(&self, val: &Val) -> Option<Result<Rc<Tensor>>> {
        match val {
            Val::Const(c) if c.ty.shape.elements().is_some_and(|n| n <= MOST_READ) => Some(c.tensor()),
            _ => None,
        }
    }

    /// The graph's value for `val`; constants become weights when they are first read.
    pub(crate) fn value(&mut self, val: &Val) -> Result<ValueId> {
        let constant = match val {
            Val::Value(v) => return Ok(*v),
            Val::Const(c) => c,
            Val::Codes(codes) => return self.plain(codes),
            Val::Parted(p) => {
                let ty = self.ty(&p.parts);
                return Err(Diag::input(format!(
                    "two axes of {ty} are one in the model, and only norms of its rows are computed"
                ))
                .help("give the named extents of the inputs numbers"));
            }
            Val::Extents { .. } => {
                return Err(Diag::input("extents that are not known are computed with")
                    .help("give the named extents of the inputs numbers"));
            }
        };
        if let Some(&v) = constant.value.get() {
            return Ok(v);
        }
        let stem = constant.name.as_deref().filter(|n| !n.is_empty()).unwrap_or("const");
        let name = self.fresh(stem);
        let source = match &constant.raw {
            Some(raw) => WeightSource::File { shard: raw.shard, at: raw.at, len: raw.bytes.len() as u64 },
            None => {
                let bytes = constant.tensor()?.to_stored();
                if bytes.len() <= MOST_INLINE {
                    WeightSource::Inline(bytes)
                } else {
                    WeightSource::Blob(self.store.put(&bytes)?)
                }
            }
        };
        let weight = self.module.weights.push(WeightDecl { name, ty: constant.ty.clone(), source });
        let value = self.module.main.weight(weight, &constant.ty);
        Ok(*constant.value.get_or_init(|| value))
    }

    /// Codes as the integers that the model takes them for.
    fn plain(&mut self, codes: &Codes) -> Result<ValueId> {
        if let Some(&v) = codes.plain.get() {
            return Ok(v);
        }
        let bits = self.op(BitcastStorage {}, &[&codes.codes])?;
        let plain = self.cast(&bits, codes.ty.elem)?;
        let plain = self.value(&plain)?;
        Ok(*codes.plain.get_or_init(|| plain))
    }

    /// A constant of codes read as numbers.
    pub(crate) fn dequantized(
        &mut self,
        to: Float,
        codes: Val,
        scale: Val,
        zero: Option<Val>,
    ) -> Result<Val> {
        let y = self.op_with(Dequantize { to }, &[Some(&codes), Some(&scale), zero.as_ref()])?;
        if let Val::Value(v) = y {
            self.read.insert(v, Rc::new(Read { codes, scale, zero, to }));
        }
        Ok(y)
    }

    /// A matrix with its axes swapped that is a constant, or is read from codes that are: the codes are swapped, not the
    /// numbers. `None` when it is neither, or too large to be rewritten.
    pub(crate) fn swapped_weight(&mut self, w: &Val) -> Result<Option<Val>> {
        let Val::Value(v) = w else { return Ok(None) };
        let Some(read) = self.read.get(v).cloned() else { return Ok(None) };
        let Some(codes) = self.known(&read.codes).transpose()? else { return Ok(None) };
        let (Some(mut scheme), Some(&[rows, cols])) = (
            codes.ty.elem.scheme(),
            codes.ty.shape.dims().as_deref().and_then(|d| d.first_chunk()).filter(|_| codes.ty.rank() == 2),
        ) else {
            return Ok(None);
        };
        scheme.group = match scheme.group {
            Group::Axis(axis) => Group::Axis(1 - axis),
            Group::Block { axis, size } => Group::Block { axis: 1 - axis, size },
            Group::Tensor => Group::Tensor,
            Group::Tile(_) | Group::Token => return Ok(None),
        };
        let old = codes.code_bytes()?;
        let (r, c) = (rows as usize, cols as usize);
        let swapped = (0..c).flat_map(|j| (0..r).map(move |i| old[i * c + j])).collect();
        let ty = TensorTy::fixed(ElemTy::Q(scheme), &[cols, rows]);
        let codes = self.constant(Tensor::codes(&ty, swapped)?);
        let scale = self.transpose(&read.scale, &[1, 0])?;
        let zero = read.zero.as_ref().map(|z| self.transpose(z, &[1, 0])).transpose()?;
        self.dequantized(read.to, codes, scale, zero).map(Some)
    }

    /// Whether a value is a constant, or is read from codes that are.
    pub(crate) fn is_weight(&self, val: &Val) -> bool {
        match val {
            Val::Const(_) => true,
            Val::Value(v) => self.read.contains_key(v),
            Val::Extents { .. } | Val::Codes(_) | Val::Parted(_) => false,
        }
    }

    /// Whether two values are the same, or constants of the same numbers.
    pub(crate) fn same(&self, a: &Val, b: &Val) -> Result<bool> {
        Ok(match (a, b) {
            (Val::Value(a), Val::Value(b)) => a == b,
            (Val::Const(x), Val::Const(y)) if Rc::ptr_eq(x, y) => true,
            (Val::Const(_), Val::Const(_)) => match (self.known(a), self.known(b)) {
                (Some(x), Some(y)) => x? == y?,
                _ => false,
            },
            _ => false,
        })
    }

    /// As [`Build::same`], of values that may be absent; an absent zero point is one of zeros.
    pub(crate) fn same_opt(&self, a: Option<&Val>, b: Option<&Val>) -> Result<bool> {
        match (a, b) {
            (Some(a), Some(b)) => self.same(a, b),
            (None, None) => Ok(true),
            (Some(z), None) | (None, Some(z)) => match self.known(z) {
                Some(z) => Ok(z?.reals().iter().all(|&x| x == 0.0)),
                None => Ok(false),
            },
        }
    }

    /// The result of an op.
    pub(crate) fn op(&mut self, op: impl Into<Op>, args: &[&Val]) -> Result<Val> {
        let args: Vec<Option<&Val>> = args.iter().map(|&a| Some(a)).collect();
        self.op_with(op, &args)
    }

    /// The result of an op of which operands are absent.
    pub(crate) fn op_with(&mut self, op: impl Into<Op>, args: &[Option<&Val>]) -> Result<Val> {
        let op = op.into();
        if let Some(known) = self.of_extents(&op, args)? {
            return Ok(known);
        }
        if let Some(folded) = self.fold(&op, args)? {
            return Ok(folded);
        }
        let mut ids = Vec::with_capacity(args.len());
        for arg in args {
            ids.push(match arg {
                Some(arg) => self.value(arg)?,
                None => *self.none.get_or_insert_with(|| self.module.main.none()),
            });
        }
        let left = self.ops.checked_sub(1);
        self.ops = left
            .ok_or_else(|| Diag::input("the model unfolds to more ops than a file of its size may have"))?;
        // Absent operands at the end.
        while ids.len() < op.operands().fixed() {
            ids.push(*self.none.get_or_insert_with(|| self.module.main.none()));
        }
        Ok(Val::Value(self.module.main.append(op, &ids, None)?))
    }

    /// The op on extents that are not known, when it has an answer for any extent.
    fn of_extents(&self, op: &Op, args: &[Option<&Val>]) -> Result<Option<Val>> {
        let what = match op {
            Op::Add(_) => Arithmetic::Add,
            Op::Mul(_) => Arithmetic::Mul,
            Op::Binary(b) => Arithmetic::Binary(b.kind),
            Op::Compare(c) => Arithmetic::Compare(c.order),
            Op::Select(_) => {
                return match args {
                    [Some(cond), Some(a), Some(b)] => extents::select(self, cond, a, b),
                    _ => Ok(None),
                };
            }
            _ => return Ok(None),
        };
        match args {
            [Some(a), Some(b)] => extents::arithmetic(self, what, a, b),
            _ => Ok(None),
        }
    }

    /// The op evaluated now, when everything it reads is known and small.
    fn fold(&self, op: &Op, args: &[Option<&Val>]) -> Result<Option<Val>> {
        if matches!(op, Op::Dequantize(_) | Op::Conv(_) | Op::Pool(_)) {
            // Codes stay codes, and no shape is computed by windows.
            return Ok(None);
        }
        let mut tensors = vec![];
        for arg in args.iter().flatten() {
            match arg {
                Val::Const(c) if c.ty.shape.elements().is_some_and(|n| n <= MOST_FOLDED) => {
                    tensors.push(c.tensor()?);
                }
                _ => return Ok(None),
            }
        }
        if tensors.is_empty() {
            return Ok(None);
        }
        let types: Vec<Option<TensorTy>> = args.iter().map(|a| a.map(|a| self.ty(a))).collect();
        let fixed = op.operands().fixed().max(types.len());
        let mut infer: Vec<Option<&TensorTy>> = types.iter().map(Option::as_ref).collect();
        infer.resize(fixed, None);
        let ty = op.infer(&InferCx { args: infer, layers: &|_| None })?;
        let work = op.cost(&types.iter().map(Option::as_ref).collect::<Vec<_>>(), &ty, &|_| 1);
        let Some(elements) = ty.shape.elements().filter(|&n| n <= MOST_FOLDED && work.macs <= MOST_WORK)
        else {
            return Ok(None);
        };
        self.spend(elements)?;
        let mut graph = Graph::new();
        let ids: Vec<ValueId> = types
            .iter()
            .map(|t| match t {
                Some(t) => graph.add_param("", t.clone()),
                None => graph.none(),
            })
            .collect();
        let y = graph.push(op.clone(), ids, ty, None);
        graph.results = vec![y];
        let tensors: Vec<&Tensor> = tensors.iter().map(|t| &**t).collect();
        // The place is the node, not the graph that was made for it.
        let unplaced = |e: Diag| Diag { loc: Loc::None, ..e };
        let mut out = eval_pure(&graph, &tensors, 1, &self.empty, self.store).map_err(unplaced)?;
        Ok(Some(self.constant(out.remove(0))))
    }

    /// Notes the inputs that `val` is computed from: those that would have to be known for it to be.
    pub(crate) fn need(&mut self, val: &Val) {
        let Val::Value(v) = val else { return };
        let (mut stack, mut seen) = (vec![*v], BTreeSet::new());
        while let Some(v) = stack.pop() {
            if !seen.insert(v) {
                continue;
            }
            match self.module.main.value(v).def {
                Def::Op(op) => stack.extend(&self.module.main.node(op).args),
                _ => self.needs.extend(self.inputs.get(&v).cloned()),
            }
        }
    }

    // Ops by their common use.

    /// `kind(x)`.
    pub(crate) fn unary(&mut self, kind: UnaryKind, x: &Val) -> Result<Val> {
        self.op(Unary { kind }, &[x])
    }
    /// `kind(a, b)`.
    pub(crate) fn binary(&mut self, kind: BinaryKind, a: &Val, b: &Val) -> Result<Val> {
        self.op(Binary { kind }, &[a, b])
    }
    /// `a + b`.
    pub(crate) fn add(&mut self, a: &Val, b: &Val) -> Result<Val> {
        self.op(Add {}, &[a, b])
    }
    /// `a - b`.
    pub(crate) fn sub(&mut self, a: &Val, b: &Val) -> Result<Val> {
        self.binary(BinaryKind::Sub, a, b)
    }
    /// `a * b`.
    pub(crate) fn mul(&mut self, a: &Val, b: &Val) -> Result<Val> {
        self.op(Mul {}, &[a, b])
    }
    /// `a / b`.
    pub(crate) fn div(&mut self, a: &Val, b: &Val) -> Result<Val> {
        self.binary(BinaryKind::Div, a, b)
    }
    /// `x * factor`, with the factor in the element type of `x`.
    pub(crate) fn scale(&mut self, x: &Val, factor: f64) -> Result<Val> {
        let factor = self.scalar(self.ty(x).elem, factor)?;
        self.mul(x, &factor)
    }
    /// `x + summand`, with the summand in the element type of `x`.
    pub(crate) fn shift(&mut self, x: &Val, summand: f64) -> Result<Val> {
        let summand = self.scalar(self.ty(x).elem, summand)?;
        self.add(x, &summand)
    }
    /// Truth of `a order b`.
    pub(crate) fn compare(&mut self, order: Order, a: &Val, b: &Val) -> Result<Val> {
        self.op(Compare { order }, &[a, b])
    }
    /// `if cond then a else b`.
    pub(crate) fn select(&mut self, cond: &Val, a: &Val, b: &Val) -> Result<Val> {
        self.op(Select {}, &[cond, a, b])
    }
    /// The same numbers with other elements.
    pub(crate) fn cast(&mut self, x: &Val, to: ElemTy) -> Result<Val> {
        if self.ty(x).elem == to {
            return Ok(x.clone());
        }
        self.op(Cast { to, ..Cast::default() }, &[x])
    }
    /// The same elements under another shape.
    pub(crate) fn reshape(&mut self, x: &Val, dims: Vec<Dim>) -> Result<Val> {
        if self.dims(x) == dims {
            return Ok(x.clone());
        }
        self.op(Reshape { shape: Shape(dims) }, &[x])
    }
    /// The tensor repeated to a shape.
    pub(crate) fn expand(&mut self, x: &Val, dims: Vec<Dim>) -> Result<Val> {
        if self.dims(x) == dims {
            return Ok(x.clone());
        }
        self.op(Expand { shape: Shape(dims) }, &[x])
    }
    /// Axes in another order.
    pub(crate) fn transpose(&mut self, x: &Val, perm: &[usize]) -> Result<Val> {
        if perm.iter().enumerate().all(|(i, &p)| i == p) {
            return Ok(x.clone());
        }
        let perm = perm.iter().map(|&p| p as u8).collect();
        self.op(Transpose { perm }, &[x])
    }
    /// Indices `start .. start + len` of an axis.
    pub(crate) fn slice(&mut self, x: &Val, axis: usize, start: u64, len: u64) -> Result<Val> {
        if start == 0 && self.dims(x).get(axis) == Some(&Dim::Static(len)) {
            return Ok(x.clone());
        }
        self.op(Slice { axis: axis as u8, start, len, step: 1 }, &[x])
    }
    /// Values behind one another.
    pub(crate) fn concat(&mut self, parts: &[&Val], axis: usize) -> Result<Val> {
        if let [one] = parts {
            return Ok((*one).clone());
        }
        self.op(Concat { axis: axis as u8 }, parts)
    }
    /// A reduction that keeps its axes with an extent of one.
    pub(crate) fn reduce(&mut self, kind: ReduceKind, x: &Val, axes: &[usize]) -> Result<Val> {
        let axes = axes.iter().map(|&a| a as u8).collect();
        self.op(Reduce { kind, axes }, &[x])
    }
    /// The tensor without some axes of extent one.
    pub(crate) fn squeeze(&mut self, x: &Val, axes: &[usize]) -> Result<Val> {
        let dims = self.dims(x);
        if let Some(&bad) = axes.iter().find(|&&a| dims[a] != Dim::Static(1)) {
            return Err(Diag::input(format!("axis {bad} of {} does not have an extent of one", self.ty(x))));
        }
        let kept = dims.iter().enumerate().filter(|(a, _)| !axes.contains(a)).map(|(_, d)| *d);
        let kept = kept.collect();
        self.reshape(x, kept)
    }
    /// The tensor with more axes of extent one, whose places in the result are `axes` in order.
    pub(crate) fn unsqueeze(&mut self, x: &Val, axes: &[usize]) -> Result<Val> {
        let mut dims = self.dims(x);
        for &axis in axes {
            if axis > dims.len() {
                return Err(Diag::input(format!("there is no place {axis} for an axis")));
            }
            dims.insert(axis, Dim::Static(1));
        }
        self.reshape(x, dims)
    }
}
