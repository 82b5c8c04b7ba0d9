//! Finds layer norms and root-mean-square norms in what they are computed from.

use super::rebuild::{Rebuild, rebuild, tell_found};
use crate::pass::prelude::*;
use crate::rule;
use crate::saturate::{self, Limits, Match, Rule, Sample};
use quantc_ir::ops::{
    Add, Binary, BinaryKind, LayerNorm, Mul, Real, Reduce, ReduceKind, RmsNorm, Unary, UnaryKind,
};

pass! {
    /// Finds layer norms and root-mean-square norms in what they are computed from.
    ///
    /// `(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)` over the last axis is `layernorm`, `x / sqrt(mean(x^2) + eps)`
    /// is `rmsnorm`: divided, or multiplied with the reciprocal or with the power -1/2, squares written as products or as
    /// powers. The form of a batch norm, `x * f + (bias - mean(x) * f)` with `f = gain / sqrt(..)`, is found too. Rows of
    /// factors and summands that follow become gain and bias.
    ///
    /// ```qir before
    /// %n = rmsnorm %x
    /// %y = mul %n, @g
    /// ```
    /// ```qir after
    /// %y = rmsnorm %x, @g
    /// ```
    "raise-norms" => pub struct RaiseNorms {
        /// Rounds of rewriting after which to stop.
        rounds: u32 = 16,
        /// Expressions kept at one time after which to stop.
        nodes: u32 = 50000,
    }
    scope: Layer, numerics: Reassociates, stats: drops
}

impl Pass for RaiseNorms {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let found = rebuild(cx, &mut norm)?;
        tell_found(cx, "norms", &found);
        let rules = saturate::run(self, cx, RULES, Limits { rounds: self.rounds, nodes: self.nodes })?;
        Ok((!found.is_empty() || rules == Changed::Yes).into())
    }
}

/// The number that people wrote who meant this f32: its shortest decimals.
pub(super) fn as_written(x: f64) -> f64 {
    let short = x as f32;
    if f64::from(short) == x { short.to_string().parse().unwrap_or(x) } else { x }
}

fn norm(b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], ty: &TensorTy) -> Result<Option<ValueId>> {
    if !ty.elem.is_float() || ty.rank() == 0 {
        return Ok(None);
    }
    if let Some(found) = folded(b, op, args, ty)? {
        return Ok(Some(found));
    }
    // `top / root` in its ways of writing.
    let pairs: Vec<(ValueId, ValueId)> = match op {
        Op::Binary(k) if k.kind == BinaryKind::Div => {
            let Some((variance, eps)) = root(b, args[1]) else { return Ok(None) };
            return centred(b, args[0], variance, eps, ty);
        }
        Op::Mul(_) => vec![(args[0], args[1]), (args[1], args[0])],
        _ => return Ok(None),
    };
    for (top, factor) in pairs {
        if let Some((variance, eps)) = inverse_root(b, factor)
            && let Some(found) = centred(b, top, variance, eps, ty)?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// `v` and `eps`, when `x` is `sqrt(v + eps)`.
fn root(b: &mut Rebuild<'_>, x: ValueId) -> Option<(ValueId, f64)> {
    let inner = match b.is::<Unary>(x) {
        Some((Unary { kind: UnaryKind::Sqrt }, inner)) => inner[0],
        Some(_) => return None,
        None => {
            let (power, args) = b.is::<Binary>(x)?;
            (power.kind == BinaryKind::Pow && b.is_number(args[1], 0.5)).then_some(args[0])?
        }
    };
    shifted(b, inner)
}

/// `v` and `eps`, when `x` is `1 / sqrt(v + eps)`.
fn inverse_root(b: &mut Rebuild<'_>, x: ValueId) -> Option<(ValueId, f64)> {
    if let Some((Unary { kind: UnaryKind::Reciprocal }, inner)) = b.is::<Unary>(x) {
        return root(b, inner[0]);
    }
    let (op, args) = b.is::<Binary>(x)?;
    match op.kind {
        BinaryKind::Div if b.is_number(args[0], 1.0) => root(b, args[1]),
        BinaryKind::Pow if b.is_number(args[1], -0.5) => shifted(b, args[0]),
        _ => None,
    }
}

/// `v` and `eps`, when `x` is `v + eps`. Without an eps a row of zeros would not be a number.
fn shifted(b: &mut Rebuild<'_>, x: ValueId) -> Option<(ValueId, f64)> {
    let (_, args) = b.is::<Add>(x)?;
    let (v, eps) = match (b.number(args[0]), b.number(args[1])) {
        (_, Some(eps)) => (args[0], eps),
        (Some(eps), _) => (args[1], eps),
        _ => return None,
    };
    (eps > 0.0).then_some((v, as_written(eps)))
}

/// What is averaged over the last axis, when `x` is such a mean.
fn mean(b: &Rebuild<'_>, x: ValueId) -> Option<ValueId> {
    let (reduce, args) = b.is::<Reduce>(x)?;
    let last = b.ty(args[0]).rank().checked_sub(1)?;
    (reduce.kind == ReduceKind::Mean && reduce.axes == [last as u8]).then_some(args[0])
}

/// What is squared, when `x` is a square.
fn squared(b: &mut Rebuild<'_>, x: ValueId) -> Option<ValueId> {
    if let Some((_, args)) = b.is::<Mul>(x) {
        return (args[0] == args[1]).then_some(args[0]);
    }
    let (power, args) = b.is::<Binary>(x)?;
    (power.kind == BinaryKind::Pow && b.is_number(args[1], 2.0)).then_some(args[0])
}

/// `x`, when `c` is `x - mean(x)`.
fn difference(b: &mut Rebuild<'_>, c: ValueId) -> Option<ValueId> {
    let (off, args) = b.is::<Binary>(c)?;
    (off.kind == BinaryKind::Sub && mean(b, args[1]) == Some(args[0])).then_some(args[0])
}

/// The norm that `top / sqrt(variance + eps)` is.
fn centred(
    b: &mut Rebuild<'_>,
    top: ValueId,
    variance: ValueId,
    eps: f64,
    ty: &TensorTy,
) -> Result<Option<ValueId>> {
    let Some(square) = mean(b, variance) else { return Ok(None) };
    let Some(base) = squared(b, square) else { return Ok(None) };
    // The mean may be taken off twice, of equal values.
    let same = base == top || (difference(b, base).is_some() && difference(b, base) == difference(b, top));
    if !same || b.ty(top) != ty {
        return Ok(None);
    }
    if let Some(x) = difference(b, top) {
        return b.emit(LayerNorm { eps: Real(eps) }, &[x]).map(Some);
    }
    b.emit(RmsNorm { eps: Real(eps) }, &[top]).map(Some)
}

/// `x * f + (bias - mean(x) * f)` with `f = gain / sqrt(variance(x) + eps)`, as batch norms are written.
fn folded(b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], ty: &TensorTy) -> Result<Option<ValueId>> {
    let Op::Add(_) = op else { return Ok(None) };
    for (scaled, rest) in [(args[0], args[1]), (args[1], args[0])] {
        let (Some((_, product)), Some((off, parts))) = (b.is::<Mul>(scaled), b.is::<Binary>(rest)) else { continue };
        let Some((_, moved)) = b.is::<Mul>(parts[1]).filter(|_| off.kind == BinaryKind::Sub) else { continue };
        for (x, f) in [(product[0], product[1]), (product[1], product[0])] {
            let of_mean = [(moved[0], moved[1]), (moved[1], moved[0])];
            let fits = of_mean.iter().any(|&(m, g)| g == f && mean(b, m) == Some(x));
            if !fits || b.ty(x) != ty {
                continue;
            }
            // The factor: one over the root, with or without a gain.
            let (inverse, gain) = match b.is::<Mul>(f) {
                Some((_, two)) if inverse_root(b, two[0]).is_some() => (two[0], Some(two[1])),
                Some((_, two)) => (two[1], Some(two[0])),
                None => (f, None),
            };
            let Some((variance, eps)) = inverse_root(b, inverse) else { continue };
            let Some(square) = mean(b, variance) else { continue };
            let Some(base) = squared(b, square) else { continue };
            if difference(b, base) != Some(x) {
                continue;
            }
            let columns = ty.shape.0[ty.rank() - 1];
            let row = |b: &Rebuild<'_>, v: ValueId| b.dims(v) == [columns] && b.ty(v).elem.is_float();
            if !row(b, parts[0]) || !gain.is_none_or(|g| row(b, g)) {
                continue;
            }
            let gain = match gain {
                Some(gain) => gain,
                None => b.graph.none(),
            };
            return b.emit(LayerNorm { eps: Real(eps) }, &[x, gain, parts[0]]).map(Some);
        }
    }
    Ok(None)
}

fn f32(dims: &[u64]) -> TensorTy {
    TensorTy::fixed(ElemTy::F32, dims)
}

/// The norm `n`, which nothing else reads, with the row `g` taken in.
fn with_row<T: quantc_ir::ops::AsOp + Clone + Into<Op>>(m: &Match<'_>) -> Option<Op> {
    let (x, g) = (m.ty("x")?, m.ty("g")?);
    let fits = g.rank() == 1 && g.shape.last() == x.shape.last() && m.root_ty() == m.ty("n");
    (fits && g.elem.is_float() && m.is_read_once("n")).then(|| m.op::<T>("n").cloned().map(Into::into))?
}

fn rows() -> Vec<Sample> {
    vec![Sample::new().value("x", f32(&[3, 5])).value("g", f32(&[5]))]
}

fn rows_with_gain() -> Vec<Sample> {
    rows().into_iter().map(|s| s.value("h", f32(&[5]))).collect()
}

/// Rules over norms and the rows that follow them.
pub static RULES: &[Rule] = &[
    rule! {
        /// `layernorm(x) * g = layernorm with gain g`.
        "gain-after-layernorm", Reassociates, "(mul (layernorm:n ?x none none) ?g)" => "(layernorm:n ?x ?g none)",
        root: with_row::<LayerNorm>, samples: rows,
    },
    rule! {
        /// `g * layernorm(x) = layernorm with gain g`.
        "gain-before-layernorm", Reassociates, "(mul ?g (layernorm:n ?x none none))" => "(layernorm:n ?x ?g none)",
        root: with_row::<LayerNorm>, samples: rows,
    },
    rule! {
        /// `layernorm(x) + g = layernorm with bias g`.
        "bias-after-plain-layernorm", Reassociates,
        "(add (layernorm:n ?x none none) ?g)" => "(layernorm:n ?x none ?g)",
        root: with_row::<LayerNorm>, samples: rows,
    },
    rule! {
        /// `layernorm(x) with gain h, + g = layernorm with gain h and bias g`.
        "bias-after-layernorm", Reassociates, "(add (layernorm:n ?x ?h none) ?g)" => "(layernorm:n ?x ?h ?g)",
        root: with_row::<LayerNorm>, samples: rows_with_gain,
    },
    rule! {
        /// `g + layernorm(x) with gain h = layernorm with gain h and bias g`.
        "bias-before-layernorm", Reassociates, "(add ?g (layernorm:n ?x ?h none))" => "(layernorm:n ?x ?h ?g)",
        root: with_row::<LayerNorm>, samples: rows_with_gain,
    },
    rule! {
        /// `rmsnorm(x) * g = rmsnorm with gain g`.
        "gain-after-rmsnorm", Reassociates, "(mul (rmsnorm:n ?x none) ?g)" => "(rmsnorm:n ?x ?g)",
        root: with_row::<RmsNorm>, samples: rows,
    },
    rule! {
        /// `g * rmsnorm(x) = rmsnorm with gain g`.
        "gain-before-rmsnorm", Reassociates, "(mul ?g (rmsnorm:n ?x none))" => "(rmsnorm:n ?x ?g)",
        root: with_row::<RmsNorm>, samples: rows,
    },
];
