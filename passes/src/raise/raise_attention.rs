//! Finds attention in what it is computed from.

use super::forms::{Form, HIDDEN};
use super::rebuild::{Rebuild, near, rebuild, tell_found};
use crate::pass::prelude::*;
use quantc_ir::ops::{Attention, Cast, Dot, Expand, Real, Reshape, Select, Softmax, Unary, UnaryKind};

pass! {
    /// Finds attention in what it is computed from.
    ///
    /// `softmax(scale * q k^T + mask) v` over heads `[h, t, d]` becomes `attention` over `[t, h, d]`. The scale may stand
    /// at the queries, the keys, both of them or the scores; keys and values that are repeated for several heads of
    /// queries are not repeated any more. A mask is understood when it provably hides nothing, what comes later, or what
    /// lies outside of a window: it adds at most -10000 to what it hides, or puts that in its place. Scores behind another
    /// mask, one that depends on inputs or differs from head to head, stay as they are.
    ///
    /// ```qir before
    /// %q = transpose %x {perm=[1, 0, 2]}
    /// %k = transpose %x {perm=[1, 2, 0]}
    /// %s = dot %q, %k
    /// %p = softmax %s {axis=2}
    /// %a = dot %p, %q
    /// %y = transpose %a {perm=[1, 0, 2]}
    /// ```
    /// ```qir after
    /// %y = attention %x, %x, %x {causal=false}
    /// ```
    "raise-attention" => pub struct RaiseAttention {}
    scope: Layer, numerics: Reassociates, stats: drops
}

impl Pass for RaiseAttention {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let mut missed = vec![];
        let found = rebuild(cx, &mut |b, op, args, ty| attention(b, op, args, ty, &mut missed))?;
        for (place, why) in missed {
            cx.remark(place, format_args!("{why}"));
        }
        tell_found(cx, "attention", &found);
        Ok((!found.is_empty()).into())
    }
}

/// What was not raised, and why.
type Missed = Vec<(String, &'static str)>;

fn attention(
    b: &mut Rebuild<'_>,
    op: &Op,
    args: &[ValueId],
    ty: &TensorTy,
    missed: &mut Missed,
) -> Result<Option<ValueId>> {
    let (Op::Dot(_), &[weights, values]) = (op, args) else { return Ok(None) };
    if !ty.elem.is_float() || !(2..=3).contains(&ty.rank()) {
        return Ok(None);
    }
    let mut p = weights;
    // Weights that are rounded to the values' type on the way, and guarded against rows in which all is hidden: a query
    // always sees itself through the masks that are known.
    loop {
        if let Some((_, inner)) = b.is::<Cast>(p).filter(|(_, i)| b.ty(i[0]).elem.is_float()) {
            p = inner[0];
        } else if let Some(inner) = guarded(b, p) {
            p = inner;
        } else {
            break;
        }
    }
    let Some((softmax, scores)) = b.is::<Softmax>(p) else { return Ok(None) };
    if softmax.log || usize::from(softmax.axis) + 1 != b.ty(p).rank() {
        return Ok(None);
    }
    let Some(Scores { q, k, scale, mask }) = scores_of(b, scores[0])? else { return Ok(None) };
    let seen = match seen(mask, b.ty(scores[0]).rank()) {
        Some(seen) => seen,
        None => {
            missed.push((name(b, scores[0]), "left as it is: what its mask hides is not known"));
            return Ok(None);
        }
    };
    // Scales at the queries and keys, before heads that are repeated are taken once.
    let (q, more) = b.unscaled(q)?.unwrap_or((q, 1.0));
    let (k, times) = b.unscaled(k)?.unwrap_or((k, 1.0));
    let scale = scale * more * times;
    let (Some(q), Some(k)) = (by_token(b, q, false)?, by_token(b, k, true)?) else { return Ok(None) };
    let Some(v) = by_token(b, values, false)? else { return Ok(None) };
    let ([t, Dim::Static(heads), Dim::Static(d)], kd) = (&b.dims(q)[..], b.dims(k)) else { return Ok(None) };
    let [_, Dim::Static(groups), Dim::Static(width)] = kd[..] else { return Ok(None) };
    let (t, heads, d) = (*t, *heads, *d);
    if b.dims(v) != kd || width != d || groups == 0 || heads % groups != 0 || !scale.is_finite() {
        return Ok(None);
    }
    // Queries are the last of the keys' tokens; without earlier tokens they are all of them, as the mask counts them.
    if seen.causal && kd[0] != t {
        return Ok(None);
    }
    // A scale that is the usual one up to a rounding is the usual one.
    let usual = 1.0 / (d as f64).sqrt();
    let scale = Real(if near(scale, usual) { usual } else { super::raise_norms::as_written(scale) });
    let y = b.emit(Attention { scale, causal: seen.causal, window: seen.window }, &[q, k, v])?;
    let heads_first = b.transpose(y, &[1, 0, 2])?;
    let dims =
        if ty.rank() == 2 { vec![t, Dim::Static(d)] } else { vec![Dim::Static(heads), t, Dim::Static(d)] };
    let y = b.reshape(heads_first, &dims)?;
    Ok((b.ty(y) == ty).then_some(y))
}

/// `p`, when `v` is `if p is not a number then 0 else p`.
fn guarded(b: &mut Rebuild<'_>, v: ValueId) -> Option<ValueId> {
    let (_, args) = b.is::<Select>(v)?;
    let (test, inner) = b.is::<Unary>(args[0])?;
    let fits = test.kind == UnaryKind::IsNan && inner[0] == args[2] && b.number(args[1]) == Some(0.0);
    fits.then_some(args[2])
}

fn name(b: &Rebuild<'_>, v: ValueId) -> String {
    b.graph.value(v).name.as_ref().map_or_else(|| "attention".into(), |n| format!("%{n}"))
}

/// Scores taken apart: `scale * q k^T`, and what is added to them.
struct Scores {
    q: ValueId,
    k: ValueId,
    scale: f64,
    mask: Mask,
}

/// What is done to scores.
enum Mask {
    Known(Form),
    Unknown,
}

fn scores_of(b: &mut Rebuild<'_>, scores: ValueId) -> Result<Option<Scores>> {
    let (mut v, mut factor) = (scores, 1.0);
    let mut mask = Mask::Known(Form::Uniform(0.0));
    loop {
        let node = b.graph.def(v).map(|(_, n)| (n.op.clone(), n.args.clone()));
        let Some((op, args)) = node else { return Ok(None) };
        let ty = b.ty(v).clone();
        if let Some((_, product)) = b.is::<Dot>(v) {
            return Ok(Some(Scores { q: product[0], k: product[1], scale: factor, mask }));
        }
        if let Some((inner, f)) = b.factor(&op, &args, ty.clone()) {
            factor *= f;
            v = inner;
            continue;
        }
        match op {
            Op::Cast(_) if b.ty(args[0]).elem.is_float() && ty.elem.is_float() => v = args[0],
            // Heads of a batch of one that a mask was added to before and after.
            Op::Reshape(_) if without_units(&b.dims(args[0])) == without_units(&ty.shape.0) => v = args[0],
            Op::Add(_) => {
                let scores = [0, 1].into_iter().find(|&i| has_scores(b, args[i], STEPS));
                let Some(at) = scores.filter(|&i| *b.ty(args[i]) == ty) else { return Ok(None) };
                let form = b.form(args[1 - at]);
                mask = mask.and_added(form, factor);
                v = args[at];
            }
            Op::Select(_) => {
                let Some(at) = [1, 2].into_iter().find(|&i| has_scores(b, args[i], STEPS)) else {
                    return Ok(None);
                };
                if *b.ty(args[at]) != ty {
                    return Ok(None);
                }
                let (cond, other) = (b.form(args[0]), b.number(args[3 - at]));
                mask = mask.and_chosen(cond, at == 1, other.map(|x| x * factor));
                v = args[at];
            }
            _ => return Ok(None),
        }
    }
}

fn without_units(dims: &[Dim]) -> Vec<Dim> {
    dims.iter().copied().filter(|d| *d != Dim::Static(1)).collect()
}

/// Ops that stand between a product and the softmax of its scores, at most.
const STEPS: u32 = 8;

/// Whether `v` comes from a product of two values, through what may stand between scores and their softmax.
fn has_scores(b: &Rebuild<'_>, v: ValueId, steps: u32) -> bool {
    let (Some((_, node)), Some(steps)) = (b.graph.def(v), steps.checked_sub(1)) else { return false };
    match node.op {
        Op::Dot(_) => true,
        Op::Mul(_) | Op::Add(_) | Op::Select(_) => node.args.iter().any(|&a| has_scores(b, a, steps)),
        Op::Binary(_) | Op::Cast(_) | Op::Reshape(_) => has_scores(b, node.args[0], steps),
        _ => false,
    }
}

impl Mask {
    /// With one more summand, which is multiplied with `factor` later. What is hidden already stays hidden.
    fn and_added(self, form: Option<Form>, factor: f64) -> Mask {
        let (Mask::Known(old), Some(new)) = (self, form) else { return Mask::Unknown };
        let (more, y, n) = match new {
            Form::Uniform(x) if x.is_finite() => return Mask::Known(old),
            Form::Choice { atoms, yes, no } => (atoms, yes * factor, no * factor),
            _ => return Mask::Unknown,
        };
        // Hidden where an atom fails: one atom may be written the other way round.
        let turned = if let ([one], true) = (&more[..], y < n) { one.negated() } else { None };
        let (more, y, n) = turned.map_or((more, y, n), |atom| (vec![atom], n, y));
        match old {
            Form::Uniform(_) => Mask::Known(Form::Choice { atoms: more, yes: y, no: n }),
            Form::Choice { mut atoms, yes, no } if yes - no >= -HIDDEN && y - n >= -HIDDEN => {
                atoms.extend(more);
                atoms.sort();
                atoms.dedup();
                Mask::Known(Form::Choice { atoms, yes: yes + y, no: (yes + n).max(no + y) })
            }
            _ => Mask::Unknown,
        }
    }

    /// With scores kept where `cond` is `kept`, and `other` elsewhere.
    fn and_chosen(self, cond: Option<Form>, kept: bool, other: Option<f64>) -> Mask {
        let (Some(cond), Some(other)) = (cond, other) else { return Mask::Unknown };
        if other > HIDDEN {
            return Mask::Unknown;
        }
        let cond = match cond {
            Form::Uniform(c) if (c != 0.0) == kept => Form::Uniform(0.0),
            Form::Choice { atoms, yes, no } => {
                let number = |c: f64| if (c != 0.0) == kept { 0.0 } else { other };
                Form::Choice { atoms, yes: number(yes), no: number(no) }
            }
            _ => return Mask::Unknown,
        };
        self.and_added(Some(cond), 1.0)
    }
}

/// What a query sees.
struct Seen {
    causal: bool,
    window: u32,
}

/// What a mask over `[.., queries, keys]` lets queries see.
fn seen(mask: Mask, rank: usize) -> Option<Seen> {
    let (atoms, yes, no) = match mask {
        Mask::Known(Form::Uniform(_)) => return Some(Seen { causal: false, window: 0 }),
        Mask::Known(Form::Choice { atoms, yes, no }) => (atoms, yes, no),
        _ => return None,
    };
    let hides = yes.is_finite() && no - yes <= HIDDEN;
    if !hides {
        return None;
    }
    let mut seen = Seen { causal: false, window: 0 };
    for atom in atoms {
        let mut factors = vec![0; rank.saturating_sub(atom.factors.len())];
        factors.extend(&atom.factors);
        let (others, last) = factors.split_at(factors.len().checked_sub(2)?);
        if others.iter().any(|&f| f != 0) {
            return None;
        }
        match (last, atom.offset) {
            // key <= query
            ([1, -1], 0) => seen.causal = true,
            // key + window > query
            ([-1, 1], n) if n >= 0 => {
                let window = u32::try_from(n + 1).ok()?;
                seen.window = if seen.window == 0 { window } else { seen.window.min(window) };
            }
            _ => return None,
        }
    }
    // A window of past keys alone, with all that comes later, is nothing that models have.
    (seen.window == 0 || seen.causal).then_some(seen)
}

/// Heads `[h, t, d]`, or turned `[h, d, t]`, as `[t, h, d]`; a matrix is one head. Repeated heads are taken once.
fn by_token(b: &mut Rebuild<'_>, x: ValueId, turned: bool) -> Result<Option<ValueId>> {
    let x = match b.dims(x).len() {
        2 => {
            let rows = if turned { b.transpose(x, &[1, 0])? } else { x };
            let [t, d] = b.dims(rows)[..] else { return Ok(None) };
            return b.reshape(rows, &[t, Dim::Static(1), d]).map(Some);
        }
        3 if turned => b.transpose(x, &[0, 2, 1])?,
        3 => x,
        _ => return Ok(None),
    };
    let once = once(b, x)?;
    b.transpose(once, &[1, 0, 2]).map(Some)
}

/// `[g, t, d]`, when `x` is it with each head repeated the same number of times: `x` itself when it is not.
fn once(b: &mut Rebuild<'_>, x: ValueId) -> Result<ValueId> {
    // One head for all.
    if let Some((_, narrow)) = b.is::<Expand>(x)
        && let (&[Dim::Static(1), t, d], &[_, t2, d2]) = (&b.dims(narrow[0])[..], &b.dims(x)[..])
        && (t, d) == (t2, d2)
    {
        return Ok(narrow[0]);
    }
    let Some((_, wide)) = b.is::<Reshape>(x) else { return Ok(x) };
    let Some((_, narrow)) = b.is::<Expand>(wide[0]) else { return Ok(x) };
    let (from, to, dims) = (b.dims(narrow[0]), b.dims(wide[0]), b.dims(x));
    let (&[g, Dim::Static(1), t, d], &[g2, r, t2, d2]) = (&from[..], &to[..]) else { return Ok(x) };
    let fits = [g, t, d] == [g2, t2, d2] && dims.len() == 3 && dims[1..] == [t, d];
    match (g, r) {
        (Dim::Static(n), Dim::Static(times)) if fits && dims[0] == Dim::Static(n * times) => {
            b.reshape(narrow[0], &[g, t, d])
        }
        _ => Ok(x),
    }
}
