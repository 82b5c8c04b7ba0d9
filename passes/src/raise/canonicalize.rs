//! Writes things in one way that exporters write in many.

use super::forms::Form;
use super::raise_norms::as_written;
use super::rebuild::{Rebuild, rebuild, tell};
use crate::pass::prelude::*;
use quantc_ir::ops::{
    Add, BinaryKind, Cast, Combine, Concat, Cumulate, Embedding, Expand, Gather, GatherElements, LayerNorm,
    Mul, Order, Positions, Real, Reshape, RmsNorm, Slice, Transpose,
};

pass! {
    /// Writes things in one way that exporters write in many.
    ///
    /// Moves of elements that undo each other go, reshapes of reshapes become one, and so do transposes of transposes;
    /// casts to what a value is, sums with 0, products with 1 and choices that are known go, and constants are cast
    /// before they are repeated. What is the same number everywhere, whatever the extents are, becomes one number;
    /// places along the sequence become `positions`; rows that are gathered from a table, whole or element by element,
    /// become `embedding`. Indices into tables are rows of them, never counted from the end. Einstein's sums of two
    /// operands become products. The module's facts count: where `sequence` is `whole`, a running count of the tokens
    /// is their positions, and no token is the `padding`.
    ///
    /// ```qir before
    /// %a = transpose %x
    /// %b = transpose %a
    /// %y = silu %b
    /// ```
    /// ```qir after
    /// %y = silu %x
    /// ```
    "canonicalize" => pub struct Canonicalize {}
    scope: Layer, numerics: Exact, stats: keeps
}

impl Pass for Canonicalize {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let found = rebuild(cx, &mut |b, op, args, ty| simplified(b, op, args, ty))?;
        tell(cx, &found);
        Ok((!found.is_empty()).into())
    }
}

/// The value that an op has in simpler form.
pub(super) fn simplified(
    b: &mut Rebuild<'_>,
    op: &Op,
    args: &[ValueId],
    ty: &TensorTy,
) -> Result<Option<ValueId>> {
    if let Some(v) = identity(b, op, args, ty) {
        return Ok(Some(v));
    }
    let moved = match op {
        Op::Reshape(_) => reshaped(b, args[0], ty)?,
        Op::Transpose(t) => transposed(b, args[0], &t.perm)?,
        Op::Expand(_) => expanded(b, args[0], ty)?,
        Op::Cast(c) => cast(b, args[0], c)?,
        Op::Gather(g) => gathered(b, args, g, ty)?,
        Op::Add(_) | Op::Mul(_) | Op::Binary(_) => match unrepeated(b, op, args, ty)? {
            Some(shorter) => Some(shorter),
            None => shorter_constant(b, op, args, ty)?,
        },
        Op::GatherElements(g) => gathered_elements(b, args, g, ty)?,
        // Rows of a table by lists of one index.
        Op::GatherNd(g) if g.batch == 0 && b.dims(args[1]).last() == Some(&Dim::Static(1)) => {
            let mut list = b.dims(args[1]);
            list.pop();
            let at = b.reshape(args[1], &list)?;
            Some(b.emit(Gather { axis: 0 }, &[args[0], at])?)
        }
        Op::Einsum(e) => super::einsum::product(b, &e.equation, args, ty)?,
        Op::ScatterNd(s) if s.combine == Combine::Replace && args[2] == args[0] && names_itself(b, args)? => {
            Some(args[0])
        }
        Op::Cumulate(c) => counted(b, args[0], c, ty)?,
        Op::Compare(c) if c.order == Order::Equal && is_padding(b, args)? => {
            let never = b.scalar(ty.elem, 0.0)?;
            Some(b.expand(never, &ty.shape.0)?)
        }
        // What is added under a root is the number that was written, not its f32.
        Op::LayerNorm(LayerNorm { eps }) if as_written(eps.0) != eps.0 => {
            Some(b.emit(LayerNorm { eps: Real(as_written(eps.0)) }, args)?)
        }
        Op::RmsNorm(RmsNorm { eps }) if as_written(eps.0) != eps.0 => {
            Some(b.emit(RmsNorm { eps: Real(as_written(eps.0)) }, args)?)
        }
        _ => None,
    };
    if moved.is_some() {
        return Ok(moved);
    }
    known(b, op, args, ty)
}

/// The operand that the result is.
fn identity(b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], ty: &TensorTy) -> Option<ValueId> {
    let same = |b: &Rebuild<'_>, v: ValueId| (b.ty(v) == ty).then_some(v);
    let is = |b: &mut Rebuild<'_>, i: usize, x: f64| b.number(args[i]) == Some(x);
    match op {
        Op::Reshape(_) | Op::Expand(_) | Op::Cast(_) => same(b, args[0]),
        Op::Transpose(t)
            if !t.perm.is_empty() && t.perm.iter().enumerate().all(|(i, &p)| i == usize::from(p)) =>
        {
            same(b, args[0])
        }
        Op::Slice(s) if s.start == 0 && s.step == 1 => same(b, args[0]),
        Op::Concat(_) if args.len() == 1 => same(b, args[0]),
        Op::Add(_) if is(b, 1, 0.0) => same(b, args[0]),
        Op::Add(_) if is(b, 0, 0.0) => same(b, args[1]),
        Op::Mul(_) if is(b, 1, 1.0) => same(b, args[0]),
        Op::Mul(_) if is(b, 0, 1.0) => same(b, args[1]),
        Op::Binary(k) if k.kind == BinaryKind::Sub && is(b, 1, 0.0) => same(b, args[0]),
        Op::Binary(k) if matches!(k.kind, BinaryKind::Div | BinaryKind::Pow) && is(b, 1, 1.0) => {
            same(b, args[0])
        }
        Op::Select(_) => match b.number(args[0])? {
            0.0 => same(b, args[2]),
            _ => same(b, args[1]),
        },
        Op::Reduce(r) if r.axes.is_empty() => {
            use quantc_ir::ops::ReduceKind as K;
            if matches!(r.kind, K::Sum | K::Mean | K::Max | K::Min | K::Prod) {
                same(b, args[0])
            } else {
                None
            }
        }
        _ => None,
    }
}

fn reshaped(b: &mut Rebuild<'_>, x: ValueId, ty: &TensorTy) -> Result<Option<ValueId>> {
    if let Some((_, inner)) = b.is::<Reshape>(x) {
        return b.reshape(inner[0], &ty.shape.0).map(Some);
    }
    Ok(None)
}

/// The order of axes of a transpose, written out.
pub(super) fn order(perm: &[u8]) -> Vec<u8> {
    if perm.is_empty() { vec![1, 0] } else { perm.to_vec() }
}

fn transposed(b: &mut Rebuild<'_>, x: ValueId, perm: &[u8]) -> Result<Option<ValueId>> {
    let dims = b.dims(x);
    if dims.len() < 2 {
        return Ok(None);
    }
    if perm == [1, 0] {
        return b.transpose(x, perm).map(Some);
    }
    let perm = order(perm);
    if let Some((first, inner)) = b.is::<Transpose>(x) {
        let first = order(&first.perm);
        let both: Vec<u8> = perm.iter().map(|&p| first[usize::from(p)]).collect();
        if both.iter().enumerate().all(|(i, &p)| i == usize::from(p)) {
            return Ok(Some(inner[0]));
        }
        return b.transpose(inner[0], &both).map(Some);
    }
    // Where only axes of extent one change places, no element moves.
    let long = |a: &&u8| dims[usize::from(**a)] != Dim::Static(1);
    if perm.iter().filter(long).is_sorted() {
        let to: Vec<Dim> = perm.iter().map(|&p| dims[usize::from(p)]).collect();
        return b.reshape(x, &to).map(Some);
    }
    Ok(None)
}

fn expanded(b: &mut Rebuild<'_>, x: ValueId, ty: &TensorTy) -> Result<Option<ValueId>> {
    if let Some((_, inner)) = b.is::<Expand>(x) {
        return b.expand(inner[0], &ty.shape.0).map(Some);
    }
    // Only axes of extent one are new.
    let long = |s: &[Dim]| s.iter().copied().filter(|d| *d != Dim::Static(1)).collect::<Vec<_>>();
    let ahead = ty.rank() - b.ty(x).rank();
    if ty.shape.0[ahead..] == b.dims(x) && long(&ty.shape.0) == long(&b.dims(x)) {
        return b.reshape(x, &ty.shape.0).map(Some);
    }
    Ok(None)
}

fn cast(b: &mut Rebuild<'_>, x: ValueId, c: &Cast) -> Result<Option<ValueId>> {
    // Rows of a table, read as what they are cast to.
    let rows = b.is::<Reshape>(x).map_or(x, |(_, inner)| inner[0]);
    if let (Some((_, found)), Some(Float::F32)) = (b.is::<Embedding>(rows), float(c.to))
        && b.ty(found[1]).elem == b.ty(rows).elem
    {
        let wide = b.emit(Embedding { to: Float::F32 }, &found)?;
        let dims = b.dims(x);
        return b.reshape(wide, &dims).map(Some);
    }
    // A constant is cast once, and repeated then.
    if let Some((_, inner)) = b.is::<Expand>(x).filter(|(_, inner)| b.is_constant(inner[0])) {
        let (once, dims) = (b.cast(inner[0], c.to)?, b.dims(x));
        return b.expand(once, &dims).map(Some);
    }
    let Some((_, inner)) = b.is::<Cast>(x) else { return Ok(None) };
    let (from, over, to) = (b.ty(inner[0]).elem, b.ty(x).elem, c.to);
    // Through a type that holds every number of the first.
    let holds = match (from.int(), over.int()) {
        (Some(f), Some(o)) => o.range().0 <= f.range().0 && f.range().1 <= o.range().1,
        (None, None) => (over == ElemTy::F64 && from.is_real()) || (over == ElemTy::F32 && from.is_float()),
        _ => false,
    };
    if !holds {
        return Ok(None);
    }
    b.cast(inner[0], to).map(Some)
}

fn float(elem: ElemTy) -> Option<Float> {
    [Float::F32, Float::F16, Float::Bf16].into_iter().find(|&f| ElemTy::from(f) == elem)
}

/// The op with an operand that is not repeated first, where the other has the extents of the result.
fn unrepeated(b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], ty: &TensorTy) -> Result<Option<ValueId>> {
    for at in 0..2 {
        let Some((_, inner)) = b.is::<Expand>(args[at]) else { continue };
        if b.ty(args[1 - at]).shape == ty.shape && !b.is_constant(args[1 - at]) {
            let mut args = args.to_vec();
            args[at] = inner[0];
            return b.emit(op.clone(), &args).map(Some);
        }
    }
    Ok(None)
}

/// The op with a constant operand without leading axes of extent one, which shapes that are aligned at the last axis need not
/// have.
fn shorter_constant(
    b: &mut Rebuild<'_>,
    op: &Op,
    args: &[ValueId],
    ty: &TensorTy,
) -> Result<Option<ValueId>> {
    for at in 0..2 {
        let (c, other) = (args[at], args[1 - at]);
        let dims = b.dims(c);
        let long = dims.iter().position(|d| *d != Dim::Static(1)).unwrap_or(dims.len().saturating_sub(1));
        if long > 0 && b.is_constant(c) && b.ty(other).rank() == ty.rank() && !b.is_constant(other) {
            let mut args = args.to_vec();
            args[at] = b.reshape(c, &dims[long..])?;
            return b.emit(op.clone(), &args).map(Some);
        }
    }
    Ok(None)
}

/// Rows of a constant table; and gathers of one known index, which are slices.
fn gathered(b: &mut Rebuild<'_>, args: &[ValueId], g: &Gather, ty: &TensorTy) -> Result<Option<ValueId>> {
    let (x, at) = (args[0], args[1]);
    let (dims, axis) = (b.dims(x), usize::from(g.axis));
    if let (Some(n), Dim::Static(extent)) = (b.number(at), dims[axis]) {
        let n = if n < 0.0 { n + extent as f64 } else { n };
        if n >= 0.0 && n < extent as f64 {
            let cut = b.emit(Slice { axis: g.axis, start: n as u64, len: 1, step: 1 }, &[x])?;
            let mut one = dims[..axis].to_vec();
            one.extend(vec![Dim::Static(1); b.ty(at).rank()]);
            one.extend(&dims[axis + 1..]);
            let row = b.reshape(cut, &one)?;
            return b.expand(row, &ty.shape.0).map(Some);
        }
    }
    let Some(to) = float(b.ty(x).elem).filter(|_| axis == 0 && dims.len() == 2 && b.is_constant(x)) else {
        return Ok(None);
    };
    // The ids as an engine has them: i32 in rows.
    let Some((ids, offset)) = rows(b, at)? else { return Ok(None) };
    let Dim::Static(extent) = dims[0] else { return Ok(None) };
    let Some(left) = extent.checked_sub(offset).filter(|&n| n > 0) else { return Ok(None) };
    let table = b.slice(x, 0, offset, left)?;
    let found = b.emit(Embedding { to }, &[ids, table])?;
    b.reshape(found, &ty.shape.0).map(Some)
}

/// A gather of whole rows, where the same index is read all along the other axes.
fn gathered_elements(
    b: &mut Rebuild<'_>,
    args: &[ValueId],
    g: &GatherElements,
    ty: &TensorTy,
) -> Result<Option<ValueId>> {
    let (x, mut at, axis) = (args[0], args[1], usize::from(g.axis));
    let (own, dims) = (b.dims(x), b.dims(at));
    // Fewer indices than elements along another axis leave elements out.
    let whole = |(i, (a, b)): (usize, (&Dim, &Dim))| i == axis || (a == b && b.fixed().is_some_and(|n| n > 0));
    if !own.iter().zip(&dims).enumerate().all(whole) {
        return Ok(None);
    }
    let Some(Form::Affine(a)) = b.form(at) else { return Ok(None) };
    if a.factors.len() != dims.len() || a.factors.iter().enumerate().any(|(i, &f)| i != axis && f != 0) {
        return Ok(None);
    }
    for i in (0..dims.len()).filter(|&i| i != axis && dims[i] != Dim::Static(1)) {
        at = b.slice(at, i, 0, 1)?;
    }
    let list = b.reshape(at, &[dims[axis]])?;
    if own[..axis].iter().any(|d| *d != Dim::Static(1)) {
        return b.emit(Gather { axis: g.axis }, &[x, list]).map(Some);
    }
    let table = b.reshape(x, &own[axis..])?;
    let rows = b.emit(Gather { axis: 0 }, &[table, list])?;
    b.reshape(rows, &ty.shape.0).map(Some)
}

/// Ids of type i32 with one axis that are those of `at`, and what is added to them; they are not negative.
fn rows(b: &mut Rebuild<'_>, at: ValueId) -> Result<Option<(ValueId, u64)>> {
    if let Some(Form::Affine(a)) = b.form(at) {
        let dims = b.dims(at);
        let along = a.factors.iter().position(|&f| f != 0);
        let others = |axis: usize| dims.iter().enumerate().all(|(i, d)| i == axis || *d == Dim::Static(1));
        if let Some(axis) = along
            && a.factors[axis] == 1
            && dims[axis] == Dim::Sym('t')
            && others(axis)
            && let Ok(offset) = u64::try_from(a.offset)
            && counts_tokens(b, at)
        {
            return Ok(Some((b.emit(Positions {}, &[])?, offset)));
        }
    }
    // Tokens are rows of a table.
    Ok(tokens(b, at).map(|v| (v, 0)))
}

/// Whether the indices of a scatter name each element of what they write to in its own place.
fn names_itself(b: &mut Rebuild<'_>, args: &[ValueId]) -> Result<bool> {
    let dims = b.dims(args[0]);
    let mut want = dims.clone();
    want.push(Dim::Static(dims.len() as u64));
    let whole = b.is::<Reshape>(args[1]).map_or(args[1], |(_, inner)| inner[0]);
    let Some((concat, parts)) = b.is::<Concat>(whole) else { return Ok(false) };
    if b.dims(args[1]) != want
        || usize::from(concat.axis) + 1 != b.ty(whole).rank()
        || parts.len() != dims.len()
    {
        return Ok(false);
    }
    let long = |d: &[Dim]| d.iter().copied().filter(|d| *d != Dim::Static(1)).collect::<Vec<_>>();
    for (axis, part) in parts.into_iter().enumerate() {
        if long(&b.dims(part)) != long(&dims) {
            return Ok(false);
        }
        let places = b.reshape(part, &dims)?;
        let own = match b.form(places) {
            Some(Form::Uniform(x)) => x == 0.0 && dims[axis] == Dim::Static(1),
            Some(Form::Affine(a)) => {
                let unit = |(at, &f): (usize, &i64)| f == i64::from(at == axis);
                a.offset == 0 && a.factors.len() == dims.len() && a.factors.iter().enumerate().all(unit)
            }
            _ => false,
        };
        if !own {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Sums of one number along the tokens of a whole sequence, which are their positions times it.
fn counted(b: &mut Rebuild<'_>, x: ValueId, c: &Cumulate, ty: &TensorTy) -> Result<Option<ValueId>> {
    let axis = usize::from(c.axis);
    let is_whole = b.module.facts.get("sequence").is_some_and(|s| s == "whole");
    let counts = is_whole && ty.shape.0[axis] == Dim::Sym('t') && !c.product && !c.reverse;
    let wide = ty.elem.int().is_some_and(|i| i.bits() >= 32);
    let Some(each) = b.number(x).filter(|n| counts && wide && n.fract() == 0.0 && n.abs() < 1024.0) else {
        return Ok(None);
    };
    let places = b.emit(Positions {}, &[])?;
    let mut y = b.cast(places, ty.elem)?;
    if !c.exclusive {
        let one = b.scalar(ty.elem, 1.0)?;
        y = b.emit(Add {}, &[y, one])?;
    }
    let each = b.scalar(ty.elem, each)?;
    y = b.emit(Mul {}, &[y, each])?;
    let mut row = vec![Dim::Static(1); ty.rank()];
    row[axis] = Dim::Sym('t');
    let row = b.reshape(y, &row)?;
    b.expand(row, &ty.shape.0).map(Some)
}

/// Whether the tokens are compared with the module's fact `padding`, which none of them is.
fn is_padding(b: &mut Rebuild<'_>, args: &[ValueId]) -> Result<bool> {
    let Some(padding) = b.module.fact_u64("padding")? else { return Ok(false) };
    let is = |b: &mut Rebuild<'_>, id: ValueId, other: ValueId| {
        b.number(other) == Some(padding as f64)
            && tokens(b, id).is_some_and(|v| b.graph.value(v).name.as_deref() == Some("tokens"))
    };
    Ok(is(b, args[0], args[1]) || is(b, args[1], args[0]))
}

/// The parameter with a row for each token whose elements `v` has, whatever integers they are given as.
fn tokens(b: &Rebuild<'_>, mut v: ValueId) -> Option<ValueId> {
    loop {
        match b.graph.value(v).def {
            Def::Param(_) if *b.ty(v) == TensorTy::new(ElemTy::I32, [Dim::Sym('t')]) => return Some(v),
            Def::Op(op) => match b.graph.node(op).op {
                Op::Cast(_) if b.ty(v).elem.int().is_some_and(|i| i.bits() >= 32) => {
                    v = b.graph.node(op).args[0]
                }
                Op::Reshape(_) => v = b.graph.node(op).args[0],
                _ => return None,
            },
            _ => return None,
        }
    }
}

/// Whether `v` is computed from the positions of tokens, which go on from call to call as other counts do not.
pub(super) fn counts_tokens(b: &Rebuild<'_>, v: ValueId) -> bool {
    let (mut stack, mut seen) = (vec![v], std::collections::BTreeSet::new());
    while let Some(v) = stack.pop() {
        match b.graph.def(v) {
            Some((_, node)) if matches!(node.op, Op::Positions(_)) => return true,
            Some((_, node)) if seen.insert(v) => stack.extend(&node.args),
            _ => {}
        }
    }
    false
}

/// One number, or places along the sequence, where nothing but constants and places is read.
fn known(b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], ty: &TensorTy) -> Result<Option<ValueId>> {
    if ty.elem.scheme().is_some() || matches!(op, Op::Positions(_)) || ty.shape.elements() == Some(0) {
        return Ok(None);
    }
    let types: Vec<TensorTy> = args.iter().map(|&a| b.ty(a).clone()).collect();
    let known: Vec<(Option<Form>, &TensorTy)> = args.iter().map(|&a| b.form(a)).zip(&types).collect();
    match super::forms::of_op(op, &known, ty) {
        Some(Form::Uniform(x)) => {
            let number = b.scalar(ty.elem, x)?;
            // One number, repeated, is what this becomes.
            if let Op::Expand(_) = op
                && args[0] == number
            {
                return Ok(None);
            }
            let rank_zero = ty.rank() == 0;
            if rank_zero { Ok(Some(number)) } else { b.expand(number, &ty.shape.0).map(Some) }
        }
        _ => Ok(None),
    }
}
