//! What is known of values that depend on constants and places alone.
//!
//! A [`Form`] is a closed expression for an element by its indices, for any extents. It proves that a mask is causal, that
//! a table is read at the positions of tokens, or that a comparison always holds.

use quantc_ir::eval::{Tensor, eval_pure};
use quantc_ir::graph::Graph;
use quantc_ir::module::Module;
use quantc_ir::ops::{BinaryKind, Op, Order, Reduce, ReduceKind, UnaryKind};
use quantc_ir::ty::{Dim, ElemTy, Shape, TensorTy};
use quantc_ir::weights::{Store, WeightView};

/// Constants of more elements are looked at only if they are square in their last two axes.
const MOST_READ: u64 = 1 << 16;

/// An element by its indices.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Form {
    /// The same number everywhere.
    Uniform(f64),
    /// A sum of indices with factors.
    Affine(Affine),
    /// `yes` where all of `atoms` are at least 0, else `no`.
    Choice { atoms: Vec<Affine>, yes: f64, no: f64 },
}

/// `offset + sum factor[axis] * index[axis]`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Affine {
    pub(super) factors: Vec<i64>,
    pub(super) offset: i64,
}

impl Affine {
    fn constant(offset: i64) -> Affine {
        Affine { factors: vec![], offset }
    }

    /// With as many axes as `rank`, aligned at the last.
    fn aligned(&self, rank: usize) -> Affine {
        let mut factors = vec![0; rank.saturating_sub(self.factors.len())];
        factors.extend(&self.factors);
        Affine { factors, offset: self.offset }
    }

    /// `self + times * other`.
    fn plus(&self, other: &Affine, times: i64) -> Option<Affine> {
        let rank = self.factors.len().max(other.factors.len());
        let (a, b) = (self.aligned(rank), other.aligned(rank));
        let sum = |x: i64, y: i64| x.checked_add(y.checked_mul(times)?);
        let factors = a.factors.iter().zip(&b.factors).map(|(&x, &y)| sum(x, y)).collect::<Option<_>>()?;
        Some(Affine { factors, offset: sum(a.offset, b.offset)? })
    }

    /// What is at least 0 where this is not: `-a - 1`.
    pub(super) fn negated(&self) -> Option<Affine> {
        Affine::constant(-1).plus(self, -1)
    }

    /// Whether it is at least 0 for all indices, or for none; `None` when it depends on them.
    fn sign(&self) -> Option<bool> {
        if self.offset >= 0 && self.factors.iter().all(|&f| f >= 0) {
            return Some(true);
        }
        (self.offset < 0 && self.factors.iter().all(|&f| f <= 0)).then_some(false)
    }
}

impl Form {
    /// The number that all elements are.
    pub(super) fn uniform(&self) -> Option<f64> {
        match self {
            Form::Uniform(x) => Some(*x),
            _ => None,
        }
    }

    fn affine(&self) -> Option<Affine> {
        match self {
            Form::Affine(a) => Some(a.clone()),
            Form::Uniform(x) if x.fract() == 0.0 && x.abs() < 1e15 => Some(Affine::constant(*x as i64)),
            _ => None,
        }
    }

    /// The truth of `atoms`, with what needs no proof left out.
    fn choice(atoms: Vec<Affine>, yes: f64, no: f64) -> Form {
        let mut kept: Vec<Affine> = vec![];
        for atom in atoms {
            match atom.sign() {
                Some(true) => {}
                Some(false) => return Form::Uniform(no),
                None if kept.contains(&atom) => {}
                None => kept.push(atom),
            }
        }
        kept.sort();
        if kept.is_empty() || yes == no { Form::Uniform(yes) } else { Form::Choice { atoms: kept, yes, no } }
    }

    /// A truth as atoms of which all hold.
    fn atoms(&self) -> Option<Vec<Affine>> {
        match self {
            Form::Choice { atoms, yes, no } if *yes != 0.0 && *no == 0.0 => Some(atoms.clone()),
            Form::Choice { atoms, yes, no } if *yes == 0.0 && *no != 0.0 => match &atoms[..] {
                [one] => Some(vec![one.negated()?]),
                _ => None,
            },
            _ => None,
        }
    }

    fn map(&self, f: impl Fn(f64) -> Option<f64>) -> Option<Form> {
        Some(match self {
            Form::Uniform(x) => Form::Uniform(f(*x)?),
            Form::Choice { atoms, yes, no } => Form::choice(atoms.clone(), f(*yes)?, f(*no)?),
            Form::Affine(_) => return None,
        })
    }

    fn on_axes(&self, f: impl Fn(&Affine) -> Option<Affine>) -> Option<Form> {
        Some(match self {
            Form::Uniform(x) => Form::Uniform(*x),
            Form::Affine(a) => Form::Affine(f(a)?),
            Form::Choice { atoms, yes, no } => {
                Form::choice(atoms.iter().map(f).collect::<Option<_>>()?, *yes, *no)
            }
        })
    }

    /// Without factors of axes of extent one, whose index is 0.
    fn tidy(self, shape: &Shape) -> Option<Form> {
        let tidy = |a: &Affine| {
            let mut a = a.aligned(shape.rank());
            for (f, d) in a.factors.iter_mut().zip(&shape.0) {
                if *d == Dim::Static(1) {
                    *f = 0;
                }
            }
            Some(a)
        };
        let form = self.on_axes(tidy)?;
        Some(match form {
            Form::Affine(a) if a.factors.iter().all(|&f| f == 0) => Form::Uniform(a.offset as f64),
            form => form,
        })
    }
}

/// The form of the result of `op`, which has type `out`, by the forms and types of what it reads.
pub(super) fn of_op(op: &Op, args: &[(Option<Form>, &TensorTy)], out: &TensorTy) -> Option<Form> {
    let form = raw(op, args, out)?.tidy(&out.shape)?;
    // Indices are exact in these elements, as large as contexts are.
    let exact =
        matches!(out.elem, ElemTy::F32 | ElemTy::F64) || out.elem.int().is_some_and(|i| i.bits() >= 32);
    (exact || !matches!(form, Form::Affine(_))).then_some(form)
}

fn raw(op: &Op, args: &[(Option<Form>, &TensorTy)], out: &TensorTy) -> Option<Form> {
    let form = |i: usize| args.get(i)?.0.as_ref();
    match op {
        Op::Positions(_) => Some(Form::Affine(Affine { factors: vec![1], offset: 0 })),
        Op::Reshape(_) => reshape(form(0)?, &args[0].1.shape, &out.shape),
        Op::Expand(_) => form(0)?.on_axes(|a| Some(a.aligned(out.rank()))),
        Op::Transpose(t) => {
            let perm: Vec<usize> =
                if t.perm.is_empty() { vec![1, 0] } else { t.perm.iter().map(|&p| p.into()).collect() };
            form(0)?.on_axes(|a| {
                let a = a.aligned(perm.len());
                Some(Affine { factors: perm.iter().map(|&p| a.factors[p]).collect(), offset: a.offset })
            })
        }
        Op::Slice(s) => form(0)?.on_axes(|a| {
            let mut a = a.aligned(out.rank());
            let factor = &mut a.factors[usize::from(s.axis)];
            let moved = factor.checked_mul(i64::try_from(s.start).ok()?)?;
            *factor = factor.checked_mul(s.step)?;
            a.offset = a.offset.checked_add(moved)?;
            Some(a)
        }),
        Op::GatherNd(_) | Op::GatherElements(_) => form(0)?.uniform().map(Form::Uniform),
        Op::Gather(g) => gather(form(0)?, args.get(1)?, usize::from(g.axis), args[0].1.rank()),
        Op::Reduce(r) => reduce(form(0)?, r, args[0].1),
        Op::Cumulate(c) if !c.product && !c.reverse => match form(0)? {
            Form::Uniform(x) if x.fract() == 0.0 && x.abs() < 1e9 => {
                let x = *x as i64;
                let mut factors = vec![0; out.rank()];
                factors[usize::from(c.axis)] = x;
                Some(Form::Affine(Affine { factors, offset: if c.exclusive { 0 } else { x } }))
            }
            _ => None,
        },
        Op::Cast(c) => match form(0)? {
            Form::Affine(a) => Some(Form::Affine(a.clone())),
            form => form.map(|x| scalar(&Op::Cast(c.clone()), &[(x, args[0].1.elem)], out.elem)),
        },
        Op::Unary(u) if u.kind == UnaryKind::Neg && matches!(form(0)?, Form::Affine(_)) => {
            let a = form(0)?.affine()?;
            Some(Form::Affine(Affine::constant(0).plus(&a, -1)?))
        }
        Op::Unary(_) | Op::Tanh(_) | Op::Relu(_) => {
            form(0)?.map(|x| scalar(op, &[(x, args[0].1.elem)], out.elem))
        }
        Op::Compare(c) => compare(c.order, form(0)?, form(1)?, args, op),
        Op::Select(_) => select(form(0)?, form(1), form(2)),
        Op::Add(_) | Op::Mul(_) | Op::Binary(_) => combine(op, args, out),
        _ => None,
    }
}

/// The least or largest number along axes, or the mean of equal ones.
fn reduce(form: &Form, op: &Reduce, ty: &TensorTy) -> Option<Form> {
    match (op.kind, form) {
        (ReduceKind::Max | ReduceKind::Min | ReduceKind::Mean, Form::Uniform(x)) => Some(Form::Uniform(*x)),
        // Along the last axis of a mask, each row has its own place, where as much holds as anywhere.
        (ReduceKind::Max, Form::Choice { atoms, yes, no }) if yes >= no => {
            let rank = ty.rank();
            let [.., rows, columns] = ty.shape.0[..] else { return None };
            if rows != columns || op.axes != [rank as u8 - 1] {
                return None;
            }
            let own = |a: &Affine| {
                let mut a = a.aligned(rank);
                let along = a.factors.pop()?;
                a.factors[rank - 2] = a.factors[rank - 2].checked_add(along)?;
                Some(a.sign() == Some(true))
            };
            atoms.iter().all(|a| own(a) == Some(true)).then_some(Form::Uniform(*yes))
        }
        _ => None,
    }
}

/// The op on one element of each operand.
fn scalar(op: &Op, args: &[(f64, ElemTy)], out: ElemTy) -> Option<f64> {
    let make = |&(x, elem): &(f64, ElemTy)| {
        let ty = TensorTy::fixed(elem, &[]);
        match elem.int() {
            Some(_) => Tensor::from_ints(&ty, [x as i128].into_iter()).ok(),
            None => Tensor::from_reals(&ty, vec![x]).ok(),
        }
    };
    let tensors: Vec<Tensor> = args.iter().map(make).collect::<Option<_>>()?;
    let mut graph = Graph::new();
    let params = tensors.iter().map(|t| graph.add_param("", t.ty.clone())).collect();
    let y = graph.push(op.clone(), params, TensorTy::fixed(out, &[]), None);
    graph.results = vec![y];
    let tensors: Vec<&Tensor> = tensors.iter().collect();
    let result = eval_pure(&graph, &tensors, 1, &Module::new(""), &Store::in_memory()).ok()?;
    match out.int() {
        Some(_) => result[0].ints().first().map(|&n| n as f64),
        None => result[0].reals().first().copied(),
    }
}

/// The form under another shape: the axes that are longer than one must stay what they are.
fn reshape(form: &Form, from: &Shape, to: &Shape) -> Option<Form> {
    if let Form::Uniform(x) = form {
        return Some(Form::Uniform(*x));
    }
    let long = |s: &Shape| -> Vec<(usize, Dim)> {
        s.0.iter().copied().enumerate().filter(|(_, d)| *d != Dim::Static(1)).collect()
    };
    let (old, new) = (long(from), long(to));
    if !old.iter().map(|o| o.1).eq(new.iter().map(|n| n.1)) {
        return None;
    }
    form.on_axes(|a| {
        let a = a.aligned(from.rank());
        let mut factors = vec![0; to.rank()];
        for (o, n) in old.iter().zip(&new) {
            factors[n.0] = a.factors[o.0];
        }
        Some(Affine { factors, offset: a.offset })
    })
}

/// `x` read at places that are known: the index of the axis becomes an expression in the indices of the places.
fn gather(x: &Form, places: &(Option<Form>, &TensorTy), axis: usize, rank: usize) -> Option<Form> {
    if let Form::Uniform(x) = x {
        return Some(Form::Uniform(*x));
    }
    let (places, inner) = (places.0.as_ref()?.affine()?, places.1.rank());
    // Negative places would count from the end.
    if places.sign() != Some(true) {
        return None;
    }
    let places = places.aligned(inner);
    x.on_axes(|a| {
        let a = a.aligned(rank);
        let at = a.factors[axis];
        let mut factors = a.factors[..axis].to_vec();
        factors.extend(places.factors.iter().map(|f| f.checked_mul(at)).collect::<Option<Vec<_>>>()?);
        factors.extend(&a.factors[axis + 1..]);
        Some(Affine { factors, offset: a.offset.checked_add(at.checked_mul(places.offset)?)? })
    })
}

fn compare(order: Order, a: &Form, b: &Form, args: &[(Option<Form>, &TensorTy)], op: &Op) -> Option<Form> {
    if matches!((a, b), (Form::Affine(_), _) | (_, Form::Affine(_))) {
        let difference = b.affine()?.plus(&a.affine()?, -1)?;
        return match order {
            Order::LessEqual => Some(Form::choice(vec![difference], 1.0, 0.0)),
            Order::Less => Some(Form::choice(vec![difference.plus(&Affine::constant(1), -1)?], 1.0, 0.0)),
            // Equal nowhere, when one is always larger.
            Order::Equal => {
                let never =
                    |d: &Affine| d.plus(&Affine::constant(1), -1).is_some_and(|d| d.sign() == Some(true));
                let turned = Affine::constant(0).plus(&difference, -1)?;
                (never(&difference) || never(&turned)).then_some(Form::Uniform(0.0))
            }
        };
    }
    zip(a, b, |x, y| scalar(op, &[(x, args[0].1.elem), (y, args[1].1.elem)], ElemTy::BOOL))
}

/// Elementwise, of forms with the same choice.
fn zip(a: &Form, b: &Form, f: impl Fn(f64, f64) -> Option<f64>) -> Option<Form> {
    match (a, b) {
        (Form::Uniform(x), b) => b.map(|y| f(*x, y)),
        (a, Form::Uniform(y)) => a.map(|x| f(x, *y)),
        (Form::Choice { atoms, yes, no }, Form::Choice { atoms: same, yes: y, no: n }) if atoms == same => {
            Some(Form::choice(atoms.clone(), f(*yes, *y)?, f(*no, *n)?))
        }
        _ => None,
    }
}

fn select(cond: &Form, a: Option<&Form>, b: Option<&Form>) -> Option<Form> {
    match cond {
        Form::Uniform(c) => {
            if *c != 0.0 {
                a.cloned()
            } else {
                b.cloned()
            }
        }
        Form::Choice { atoms, yes, no } => {
            let (a, b) = (a?.uniform()?, b?.uniform()?);
            let pick = |c: f64| if c != 0.0 { a } else { b };
            Some(Form::choice(atoms.clone(), pick(*yes), pick(*no)))
        }
        Form::Affine(_) => None,
    }
}

/// Sums, products and the like.
fn combine(op: &Op, args: &[(Option<Form>, &TensorTy)], out: &TensorTy) -> Option<Form> {
    let (a, b) = (args.first()?.0.as_ref()?, args.get(1)?.0.as_ref()?);
    if matches!((a, b), (Form::Affine(_), _) | (_, Form::Affine(_))) {
        // Small integers are exact in f32, too.
        let (x, y) = (a.affine()?, b.affine()?);
        return Some(Form::Affine(match op {
            Op::Add(_) => x.plus(&y, 1)?,
            Op::Binary(k) if k.kind == BinaryKind::Sub => x.plus(&y, -1)?,
            Op::Mul(_) if x.factors.iter().all(|&f| f == 0) => Affine::constant(0).plus(&y, x.offset)?,
            Op::Mul(_) if y.factors.iter().all(|&f| f == 0) => Affine::constant(0).plus(&x, y.offset)?,
            _ => return None,
        }));
    }
    let apply = |x: f64, y: f64| scalar(op, &[(x, args[0].1.elem), (y, args[1].1.elem)], out.elem);
    if let Some(same) = zip(a, b, apply) {
        return Some(same);
    }
    let (Form::Choice { yes, no, .. }, Form::Choice { yes: y, no: n, .. }) = (a, b) else { return None };
    match op {
        Op::Binary(k) if k.kind == BinaryKind::And && out.elem == ElemTy::BOOL => {
            let mut atoms = a.atoms()?;
            atoms.extend(b.atoms()?);
            Some(Form::choice(atoms, 1.0, 0.0))
        }
        Op::Binary(k) if k.kind == BinaryKind::Or && out.elem == ElemTy::BOOL => {
            // not (p or q) = not p and not q
            let turned = |f: &Form| f.map(|x| Some(f64::from(x == 0.0)))?.atoms();
            let mut atoms = turned(a)?;
            atoms.extend(turned(b)?);
            Some(Form::choice(atoms, 0.0, 1.0))
        }
        // Masks on masks: what one of them hides is hidden, by at least as much.
        Op::Add(_) if hides(*yes, *no) && hides(*y, *n) => {
            let (Form::Choice { atoms, .. }, Form::Choice { atoms: more, .. }) = (a, b) else { return None };
            Some(Form::choice(atoms.iter().chain(more).cloned().collect(), 0.0, no.max(*n)))
        }
        // The lesser of two masks, and the product of two truths.
        Op::Binary(k) if k.kind == BinaryKind::Min && hides(*yes, *no) && hides(*y, *n) => {
            let (Form::Choice { atoms, .. }, Form::Choice { atoms: more, .. }) = (a, b) else { return None };
            Some(Form::choice(atoms.iter().chain(more).cloned().collect(), 0.0, no.max(*n)))
        }
        Op::Mul(_) if [*yes, *y] == [1.0; 2] && [*no, *n] == [0.0; 2] => {
            let mut atoms = a.atoms()?;
            atoms.extend(b.atoms()?);
            Some(Form::choice(atoms, 1.0, 0.0))
        }
        _ => None,
    }
}

/// The least that hides a place from softmax when it is added to its score: `exp` of it is 0 in f32 and below.
pub(super) const HIDDEN: f64 = -1e4;

fn hides(yes: f64, no: f64) -> bool {
    yes == 0.0 && no <= HIDDEN
}

/// The form of a constant.
pub(super) fn of_weight(
    ty: &TensorTy,
    store: &Store,
    module: &Module,
    id: quantc_ir::entity::WeightId,
) -> Option<Form> {
    let dims = ty.shape.dims()?;
    let n = ty.shape.elements().filter(|&n| n > 0)?;
    if ty.elem.scheme().is_some() {
        return None;
    }
    let square = |d: &[u64]| matches!(d, [.., a, b] if a == b && a * b == n);
    if n > MOST_READ && !square(&dims) {
        return None;
    }
    let view = store.view(&module.weights, id).ok()?;
    if n > MOST_READ {
        // Most large constants are weights: one row tells.
        let first = first_row(&view, ty)?;
        if first.iter().any(|x| *x != first[0] && *x != first[first.len() - 1]) {
            return None;
        }
    }
    let all = numbers(&view, ty)?;
    if all.iter().all(|x| *x == all[0]) {
        return Some(Form::Uniform(all[0]));
    }
    let rank = dims.len();
    if square(&dims) {
        // Each row sees its own place and so many before it.
        let (n, visible, hidden) = (dims[rank - 1] as usize, all[0], all[1]);
        let window = (0..n).take_while(|row| all[row * n] == visible).count();
        let sees = |row: usize, column: usize| column <= row && row - column < window;
        let band = |(at, &x): (usize, &f64)| x == if sees(at / n, at % n) { visible } else { hidden };
        if visible != hidden && all.iter().enumerate().all(band) {
            let atom = |sign: i64, offset: usize| {
                let mut factors = vec![0; rank];
                (factors[rank - 2], factors[rank - 1]) = (sign, -sign);
                Affine { factors, offset: offset as i64 }
            };
            let mut atoms = vec![atom(1, 0)];
            if window < n {
                atoms.push(atom(-1, window - 1));
            }
            return Some(Form::choice(atoms, visible, hidden));
        }
    }
    // Indices of one axis.
    let axis = dims.iter().position(|&d| d == n)?;
    let step = all[1] - all[0];
    let even = all.iter().enumerate().all(|(i, &x)| x == all[0] + step * i as f64);
    let whole = |x: f64| (x.fract() == 0.0 && x.abs() < 1e9).then_some(x as i64);
    if !even || ty.elem.int().is_none_or(|i| i.bits() < 32) {
        return None;
    }
    let mut factors = vec![0; rank];
    factors[axis] = whole(step)?;
    Some(Form::Affine(Affine { factors, offset: whole(all[0])? }))
}

fn numbers(view: &WeightView<'_>, ty: &TensorTy) -> Option<Vec<f64>> {
    match ty.elem {
        ElemTy::F64 => view.read_all_f64().ok(),
        ElemTy::Int(_) => Some(view.read_all_ints().ok()?.into_iter().map(|n| n as f64).collect()),
        _ => Some(view.read_all_f32().ok()?.into_iter().map(f64::from).collect()),
    }
}

/// The first row, when it can be read alone.
fn first_row(view: &WeightView<'_>, ty: &TensorTy) -> Option<Vec<f64>> {
    if !ty.elem.is_float() {
        return numbers(view, ty);
    }
    let mut row = vec![0f32; view.cols()];
    view.read_rows_f32(0, 1, &mut row).ok()?;
    Some(row.into_iter().map(f64::from).collect())
}
