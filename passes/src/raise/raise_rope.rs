//! Finds rotary position embeddings in what they are computed from.

use super::forms::Form;
use super::rebuild::{Rebuild, rebuild, tell_found};
use crate::pass::prelude::*;
use quantc_ir::eval::weight_tensor;
use quantc_ir::ops::{
    Concat, Dot, Embedding, Mul, Positions, Real, Reshape, Rope, RopeScaling, RopeStyle, RopeTable, Slice,
    Transpose, Unary, UnaryKind,
};
use quantc_ir::weights::{WeightDecl, WeightSource};

pass! {
    /// Finds rotary position embeddings in what they are computed from.
    ///
    /// `x * cos(a) + turned(x) * sin(a)` over heads becomes `rope`, where `turned` swaps the halves of a head, or its
    /// neighbours, and negates what comes first. The angles are the positions of tokens times constants: if those are
    /// the powers of one base, the table is `rope_table`; tables of cosines and sines that are constants, read at the
    /// positions, stay constants, put side by side. Other angles are written out, for as many positions as the module's fact
    /// `context` says.
    ///
    /// ```qir before
    /// weight @f : tensor<2xf32> = inline [1, 0.01]
    /// %p = positions
    /// %pf = cast %p {to=f32}
    /// %pc = reshape %pf {shape=?tx1}
    /// %a = mul %pc, @f
    /// %e = concat %a, %a {axis=1}
    /// %e1 = reshape %e {shape=?tx1x4}
    /// %c = unary %e1 {kind=cos}
    /// %s = unary %e1 {kind=sin}
    /// %lo = slice %x {axis=2, start=0, len=2}
    /// %hi = slice %x {axis=2, start=2, len=2}
    /// %n = unary %hi {kind=neg}
    /// %r = concat %n, %lo {axis=2}
    /// %xc = mul %x, %c
    /// %rs = mul %r, %s
    /// %y = add %xc, %rs
    /// ```
    /// ```qir after
    /// %p = positions
    /// %0 = rope_table %p {size=4}
    /// %y = rope %x, %0
    /// ```
    "raise-rope" => pub struct RaiseRope {}
    scope: Layer, numerics: Reassociates, stats: drops
}

impl Pass for RaiseRope {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let found = rebuild(cx, &mut rope)?;
        tell_found(cx, "rope", &found);
        Ok((!found.is_empty()).into())
    }
}

fn rope(b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], ty: &TensorTy) -> Result<Option<ValueId>> {
    if let (Op::Concat(c), &[turned, rest]) = (op, args) {
        return if usize::from(c.axis) + 1 == ty.rank() { partial(b, turned, rest, ty) } else { Ok(None) };
    }
    let Op::Add(_) = op else { return Ok(None) };
    let (Some((_, one)), Some((_, two))) = (b.is::<Mul>(args[0]), b.is::<Mul>(args[1])) else {
        return Ok(None);
    };
    let flips = |p: &[ValueId]| [(p[0], p[1]), (p[1], p[0])];
    for (still, turn) in [(&one, &two), (&two, &one)] {
        for (x, cos) in flips(still) {
            for (r, sin) in flips(turn) {
                if b.ty(x) != ty {
                    continue;
                }
                let Some(style) = turned(b, r, x) else { continue };
                if let Some(y) = rotated(b, x, cos, sin, style)? {
                    return Ok(Some(y));
                }
            }
        }
    }
    Ok(None)
}

/// `x` with its first columns rotated, when `turned` is them and `rest` the others.
fn partial(b: &mut Rebuild<'_>, turned: ValueId, rest: ValueId, ty: &TensorTy) -> Result<Option<ValueId>> {
    let last = ty.rank() - 1;
    let Some((cut, whole)) = b.is::<Slice>(rest) else { return Ok(None) };
    let x = whole[0];
    let size = b.dims(turned)[last].fixed();
    if b.ty(x) != ty || usize::from(cut.axis) != last || cut.step != 1 || Some(cut.start) != size {
        return Ok(None);
    }
    // The rotation stands between moves that put tokens first and back.
    let mut v = turned;
    let mut moves = vec![];
    let (rope, args) = loop {
        if let Some(found) = b.is::<Rope>(v) {
            break found;
        }
        let node = b.graph.def(v).map(|(_, n)| (n.op.clone(), n.args.clone()));
        match node {
            Some((op @ (Op::Transpose(_) | Op::Reshape(_)), args)) if moves.len() < 4 => {
                moves.push(op);
                v = args[0];
            }
            _ => return Ok(None),
        }
    };
    let first = |b: &Rebuild<'_>, v: ValueId| {
        b.is::<Slice>(v).is_some_and(|(s, from)| {
            from[0] == x && usize::from(s.axis) == last && (s.start, s.step, Some(s.len)) == (0, 1, size)
        })
    };
    let tokens_first = match b.is::<Transpose>(args[0]) {
        _ if first(b, args[0]) && moves.is_empty() => true,
        Some((turn, inner)) if turn.perm == [1, 0, 2] && first(b, inner[0]) => match &moves[..] {
            [Op::Transpose(back)] if back.perm == [1, 0, 2] => false,
            _ => return Ok(None),
        },
        _ => return Ok(None),
    };
    let heads = if tokens_first { x } else { b.transpose(x, &[1, 0, 2])? };
    let y = b.emit(rope, &[heads, args[1]])?;
    if tokens_first { Ok(Some(y)) } else { b.transpose(y, &[1, 0, 2]).map(Some) }
}

/// Which elements of `x` form pairs, when `r` is `x` with them swapped and the first of them negated.
fn turned(b: &mut Rebuild<'_>, r: ValueId, x: ValueId) -> Option<RopeStyle> {
    let last = b.ty(x).rank().checked_sub(1)?;
    let size = b.dims(x)[last].fixed()?;
    let part = |b: &Rebuild<'_>, v: ValueId| -> Option<Slice> {
        let (slice, from) = b.is::<Slice>(v)?;
        (from[0] == x && usize::from(slice.axis) == last).then_some(slice)
    };
    let negated = |b: &mut Rebuild<'_>, v: ValueId| -> Option<ValueId> {
        if let Some((Unary { kind: UnaryKind::Neg }, inner)) = b.is::<Unary>(v) {
            return Some(inner[0]);
        }
        let (_, two) = b.is::<Mul>(v)?;
        if b.number(two[1]) == Some(-1.0) {
            Some(two[0])
        } else {
            (b.number(two[0]) == Some(-1.0)).then_some(two[1])
        }
    };
    if let Some((concat, parts)) = b.is::<Concat>(r) {
        let &[first, second] = &parts[..] else { return None };
        let first = negated(b, first)?;
        let (high, low) = (part(b, first)?, part(b, second)?);
        let half = size / 2;
        let halves = usize::from(concat.axis) == last
            && (high.start, high.len, high.step) == (half, half, 1)
            && (low.start, low.len, low.step) == (0, half, 1);
        return halves.then_some(RopeStyle::Half);
    }
    // Neighbours: both made columns of pairs.
    let (_, inner) = b.is::<Reshape>(r)?;
    let (concat, parts) = b.is::<Concat>(inner[0])?;
    let &[first, second] = &parts[..] else { return None };
    if usize::from(concat.axis) != last + 1 || b.ty(inner[0]).rank() != last + 2 {
        return None;
    }
    let (first, second) = (b.is::<Reshape>(first)?.1[0], b.is::<Reshape>(second)?.1[0]);
    let first = negated(b, first)?;
    let (odd, even) = (part(b, first)?, part(b, second)?);
    let pairs = (odd.start, odd.len, odd.step) == (1, size / 2, 2)
        && (even.start, even.len, even.step) == (0, size / 2, 2);
    pairs.then_some(RopeStyle::Interleaved)
}

/// `x` rotated, when `cos` and `sin` are tables of the same angles at the positions of tokens.
fn rotated(
    b: &mut Rebuild<'_>,
    x: ValueId,
    cos: ValueId,
    sin: ValueId,
    style: RopeStyle,
) -> Result<Option<ValueId>> {
    let own = b.dims(x);
    // A matrix is one head.
    let x = match own[..] {
        [t, d] => b.reshape(x, &[Dim::Static(1), t, d])?,
        _ => x,
    };
    let [first, second, Dim::Static(size)] = b.dims(x)[..] else { return Ok(None) };
    if size % 2 != 0 || !b.ty(x).elem.is_float() {
        return Ok(None);
    }
    // Tables have a row for each token; which axis of x those are, their shape says.
    let tokens_first = match b.dims(cos)[..] {
        [t, Dim::Static(1), d] if (t, d) == (first, Dim::Static(size)) => true,
        [Dim::Static(1), t, d] | [t, d] if (t, d) == (second, Dim::Static(size)) => false,
        _ => return Ok(None),
    };
    if b.dims(cos) != b.dims(sin) {
        return Ok(None);
    }
    let Some(table) = table(b, cos, sin, style, size)? else { return Ok(None) };
    let heads = if tokens_first { x } else { b.transpose(x, &[1, 0, 2])? };
    if b.dims(table)[0] != b.dims(heads)[0] {
        return Ok(None);
    }
    let y = b.emit(Rope { style }, &[heads, table])?;
    let y = if tokens_first { y } else { b.transpose(y, &[1, 0, 2])? };
    b.reshape(y, &own).map(Some)
}

/// `v` without moves of its axes of extent one.
fn plain(b: &Rebuild<'_>, mut v: ValueId) -> ValueId {
    let long = |b: &Rebuild<'_>, v: ValueId| -> Vec<Dim> {
        b.dims(v).into_iter().filter(|d| *d != Dim::Static(1)).collect()
    };
    while let Some((_, inner)) = b.is::<Reshape>(v).filter(|(_, i)| long(b, i[0]) == long(b, v)) {
        v = inner[0];
    }
    v
}

/// The table of half as many angles as `size`, cosines before sines.
fn table(
    b: &mut Rebuild<'_>,
    cos: ValueId,
    sin: ValueId,
    style: RopeStyle,
    size: u64,
) -> Result<Option<ValueId>> {
    let (cos, sin) = (plain(b, cos), plain(b, sin));
    if let (Some((_, c)), Some((_, s))) = (b.is::<Embedding>(cos), b.is::<Embedding>(sin)) {
        return constant_table(b, &c, &s, style, size);
    }
    if let (Some(c), Some(s)) = (twice(b, cos, style), twice(b, sin, style))
        && let (Some(c), Some(s)) = (table_rows(b, c)?, table_rows(b, s)?)
    {
        let half = |b: &Rebuild<'_>, t: ValueId| b.dims(t).last() == Some(&Dim::Static(size / 2));
        if c.0 != s.0 || !half(b, c.1) || !half(b, s.1) {
            return Ok(None);
        }
        let both = b.emit(Concat { axis: 1 }, &[c.1, s.1])?;
        return b.emit(Embedding::default(), &[c.0, both]).map(Some);
    }
    let (Some(angles), Some(same)) =
        (angles(b, cos, UnaryKind::Cos, style), angles(b, sin, UnaryKind::Sin, style))
    else {
        return Ok(None);
    };
    if angles != same {
        return Ok(None);
    }
    let Some((places, frequencies)) = positions_times(b, angles)? else { return Ok(None) };
    if frequencies.len() as u64 != size / 2 {
        return Ok(None);
    }
    if let Some((theta, scaling)) = base(&frequencies, size) {
        return b.emit(RopeTable { size: size as u32, theta: Real(theta), scaling }, &[places]).map(Some);
    }
    let Some(context) = b.module.fact_u64("context")?.filter(|&n| n > 0 && n <= MOST_POSITIONS) else {
        return Ok(None);
    };
    let table = written_out(b, &frequencies, context)?;
    b.emit(Embedding::default(), &[places, table]).map(Some)
}

/// Positions for which a table is written out.
const MOST_POSITIONS: u64 = 1 << 17;

/// The table for every position, as `rope_table` would compute it.
fn written_out(b: &mut Rebuild<'_>, frequencies: &[f64], context: u64) -> Result<ValueId> {
    let mut bytes = vec![];
    for position in 0..context {
        let angle = |f: &f64| f64::from(position as f32 * *f as f32);
        bytes.extend(frequencies.iter().flat_map(|f| (angle(f).cos() as f32).to_le_bytes()));
        bytes.extend(frequencies.iter().flat_map(|f| (angle(f).sin() as f32).to_le_bytes()));
    }
    let ty = TensorTy::fixed(ElemTy::F32, &[context, 2 * frequencies.len() as u64]);
    let source = WeightSource::Blob(b.store.put(&bytes)?);
    let known = b.module.weights.iter().find(|(_, w)| w.ty == ty && w.source == source).map(|(id, _)| id);
    let id = match known {
        Some(id) => id,
        None => {
            let name = b.module.fresh_weight_name("angles");
            b.module.weights.push(WeightDecl { name, ty, source })
        }
    };
    Ok(b.weight_value(id))
}

/// The angles of half of the columns, when `v` is their cosine or sine twice.
fn angles(b: &mut Rebuild<'_>, v: ValueId, kind: UnaryKind, style: RopeStyle) -> Option<ValueId> {
    if let Some((unary, inner)) = b.is::<Unary>(v) {
        let inner = plain(b, inner[0]);
        return (unary.kind == kind).then(|| twice(b, inner, style)).flatten();
    }
    let half = twice(b, v, style)?;
    let (unary, inner) = b.is::<Unary>(half)?;
    (unary.kind == kind).then(|| plain(b, inner[0]))
}

/// What stands in `v` twice: in both halves of its columns, or in neighbours.
fn twice(b: &Rebuild<'_>, v: ValueId, style: RopeStyle) -> Option<ValueId> {
    match style {
        RopeStyle::Half => {
            let (concat, parts) = b.is::<Concat>(v)?;
            let last = usize::from(concat.axis) + 1 == b.ty(v).rank();
            (last && parts.len() == 2 && parts[0] == parts[1]).then(|| plain(b, parts[0]))
        }
        RopeStyle::Interleaved => {
            let (_, wide) = b.is::<Reshape>(v)?;
            let mut dims = b.dims(wide[0]);
            let all = dims.len();
            while dims.last() == Some(&Dim::Static(1)) {
                dims.pop();
            }
            if dims.last() != Some(&Dim::Static(2)) {
                return None;
            }
            let at = dims.len() - 1;
            if let Some((concat, parts)) = b.is::<Concat>(wide[0]) {
                let last = usize::from(concat.axis) == at;
                return (last && parts.len() == 2 && parts[0] == parts[1]).then(|| plain(b, parts[0]));
            }
            let (_, narrow) = b.is::<quantc_ir::ops::Expand>(wide[0])?;
            let from = b.dims(narrow[0]);
            let fits = from.len() == all && from[at] == Dim::Static(1) && from[..at] == dims[..at];
            fits.then(|| plain(b, narrow[0]))
        }
    }
}

/// The positions and the constants of which `v` is the products, a row for each token.
fn positions_times(b: &mut Rebuild<'_>, v: ValueId) -> Result<Option<(ValueId, Vec<f64>)>> {
    let mut v = v;
    let mut is_turned = false;
    while let Some((turn, inner)) = b.is::<Transpose>(v) {
        if super::canonicalize::order(&turn.perm) != [1, 0] {
            return Ok(None);
        }
        (v, is_turned) = (plain(b, inner[0]), !is_turned);
    }
    let factors = match (b.is::<Mul>(v), b.is::<Dot>(v)) {
        (Some((_, f)), _) => f,
        // Of matrices with one column and one row.
        (_, Some((_, f))) if b.dims(f[1]).first() == Some(&Dim::Static(1)) => f,
        _ => return Ok(None),
    };
    for (places, constants) in [(factors[0], factors[1]), (factors[1], factors[0])] {
        let Some(Form::Affine(a)) = b.form(places) else { continue };
        let along: Vec<(usize, i64)> =
            a.factors.iter().copied().enumerate().filter(|(_, f)| *f != 0).collect();
        let counts =
            matches!(along[..], [(axis, 1)] if b.dims(places)[axis] == Dim::Sym('t')) && a.offset == 0;
        if !counts || !super::canonicalize::counts_tokens(b, places) {
            continue;
        }
        let Some(numbers) = vector(b, constants)? else { continue };
        // A row for each token, unless the product is turned.
        let rows = b.dims(v).first() == Some(&Dim::Sym('t'));
        if rows == is_turned {
            continue;
        }
        let places = b.emit(Positions {}, &[])?;
        return Ok(Some((places, numbers)));
    }
    Ok(None)
}

/// The numbers of a constant of one long axis.
fn vector(b: &Rebuild<'_>, v: ValueId) -> Result<Option<Vec<f64>>> {
    let mut v = v;
    loop {
        match b.graph.def(v) {
            Some((_, node)) if matches!(node.op, Op::Reshape(_)) => v = node.args[0],
            Some(_) => return Ok(None),
            None => break,
        }
    }
    let Some(w) = b.graph.as_weight(v) else { return Ok(None) };
    let dims = b.ty(v).shape.dims().unwrap_or_default();
    if dims.iter().filter(|&&d| d != 1).count() > 1
        || dims.iter().product::<u64>() > 1 << 15
        || !b.ty(v).elem.is_real()
    {
        return Ok(None);
    }
    Ok(Some(weight_tensor(b.module, b.store, w)?.reals()))
}

/// The base whose powers the frequencies are, and by what they are divided.
fn base(frequencies: &[f64], size: u64) -> Option<(f64, RopeScaling)> {
    let (first, second) = (*frequencies.first()?, frequencies.get(1).copied());
    if first <= 0.0 || second.is_some_and(|f| f <= 0.0) {
        return None;
    }
    let theta = second.map_or(10000.0, |second| (second / first).powf(-(size as f64) / 2.0));
    let factor = 1.0 / first;
    let fits = |theta: &f64| {
        let power = |j: usize| theta.powf(-2.0 * j as f64 / size as f64) / factor;
        frequencies.iter().enumerate().all(|(j, f)| (f - power(j)).abs() <= 1e-6 * f.abs())
    };
    // Bases are whole numbers, mostly.
    let theta = [theta.round(), theta].into_iter().find(fits)?;
    let scaling =
        if factor == 1.0 { RopeScaling::None } else { RopeScaling::Linear { factor: Real(factor) } };
    Some((theta, scaling))
}

/// The places and the table of which `v` is rows, or some columns of rows.
fn table_rows(b: &mut Rebuild<'_>, v: ValueId) -> Result<Option<(ValueId, ValueId)>> {
    if let Some((_, found)) = b.is::<Embedding>(v) {
        return Ok(Some((found[0], found[1])));
    }
    let Some((cut, wide)) = b.is::<Slice>(v) else { return Ok(None) };
    let last = usize::from(cut.axis) + 1 == b.ty(v).rank();
    let Some((_, found)) = b.is::<Embedding>(plain(b, wide[0])).filter(|_| last && cut.step == 1) else {
        return Ok(None);
    };
    let columns = b.slice(found[1], 1, cut.start, cut.len)?;
    Ok(Some((found[0], columns)))
}

/// Cosines and sines of one number for each pair of the columns of two constant tables, read at the same places, when the
/// other is the same.
fn constant_table(
    b: &mut Rebuild<'_>,
    cos: &[ValueId],
    sin: &[ValueId],
    style: RopeStyle,
    size: u64,
) -> Result<Option<ValueId>> {
    if cos[0] != sin[0] {
        return Ok(None);
    }
    for table in [cos[1], sin[1]] {
        let (Some(w), [Dim::Static(rows), _]) = (b.graph.as_weight(plain(b, table)), &b.dims(table)[..])
        else {
            return Ok(None);
        };
        if rows.checked_mul(size).is_none_or(|n| n > 1 << 26) {
            return Ok(None);
        }
        let numbers = weight_tensor(b.module, b.store, w)?.reals();
        let half = size as usize / 2;
        let pairs = |row: &[f64]| match style {
            RopeStyle::Half => row[..half] == row[half..],
            RopeStyle::Interleaved => row.chunks(2).all(|pair| pair[0] == pair[1]),
        };
        if !numbers.chunks(size as usize).all(pairs) {
            return Ok(None);
        }
    }
    let step = if style == RopeStyle::Half { 1 } else { 2 };
    let one = Slice { axis: 1, start: 0, len: size / 2, step };
    let (c, s) = (b.emit(one.clone(), &[cos[1]])?, b.emit(one, &[sin[1]])?);
    let both = b.emit(Concat { axis: 1 }, &[c, s])?;
    b.emit(Embedding::default(), &[cos[0], both]).map(Some)
}
