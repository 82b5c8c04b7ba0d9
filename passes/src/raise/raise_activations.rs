//! Finds activation functions and softmax in what they are computed from.

use super::rebuild::{Rebuild, near, rebuild, tell_found};
use crate::pass::prelude::*;
use crate::rule;
use crate::saturate::{self, Limits, Match, Rule, Sample};
use quantc_ir::ops::{Add, Binary, BinaryKind, Gelu, Reduce, ReduceKind, Silu, Softmax, Tanh, Unary, UnaryKind};
use std::f64::consts::{FRAC_1_SQRT_2, PI};

pass! {
    /// Finds activation functions and softmax in what they are computed from.
    ///
    /// `x * sigmoid(x)` is `silu`; `x * (1 + erf(x / sqrt(2))) / 2` is `gelu`, and `x * (1 + tanh(sqrt(2/pi) * (x +
    /// 0.044715 x^3))) / 2` is `gelu {approx}`, with their factors in any order, divided or multiplied, and whichever of
    /// them the halves stand at. Constants count when they are what these formulas say in f32. `exp(x) / sum(exp(x))` is
    /// `softmax`, with or without the largest number taken off first.
    ///
    /// ```qir before
    /// %s = unary %x {kind=sigmoid}
    /// %y = mul %s, %x
    /// ```
    /// ```qir after
    /// %y = silu %x
    /// ```
    "raise-activations" => pub struct RaiseActivations {
        /// Rounds of rewriting after which to stop.
        rounds: u32 = 16,
        /// Expressions kept at one time after which to stop.
        nodes: u32 = 50000,
    }
    scope: Layer, numerics: Reassociates, stats: keeps
}

impl Pass for RaiseActivations {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let found = rebuild(cx, &mut gelu)?;
        tell_found(cx, "gelu", &found);
        let rules = saturate::run(self, cx, RULES, Limits { rounds: self.rounds, nodes: self.nodes })?;
        Ok((!found.is_empty() || rules == Changed::Yes).into())
    }
}

/// `gelu` where a product of several factors is one.
fn gelu(b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], ty: &TensorTy) -> Result<Option<ValueId>> {
    let mut product = Product { number: 1.0, factors: vec![] };
    if !product.takes_op(b, op, args, DEPTH) || !ty.elem.is_real() {
        return Ok(None);
    }
    // 0.5 x (1 + f) has two factors that are not numbers, if x is none.
    let [p, q] = product.factors[..] else { return Ok(None) };
    for (x, sum) in [(p, q), (q, p)] {
        let Some((inner, one)) = one_more(b, sum) else { continue };
        if b.ty(x) != ty || !near(product.number * one, 0.5) {
            continue;
        }
        if let Some(approx) = phi(b, inner, one, x) {
            return b.emit(Gelu { approx }, &[x]).map(Some);
        }
    }
    Ok(None)
}

/// Products in products that are looked through, at most.
const DEPTH: u32 = 4;

/// A product: a number, and factors that are not numbers.
struct Product {
    number: f64,
    factors: Vec<ValueId>,
}

impl Product {
    /// Takes the factors of an op apart, as far as it is a product; whether it is one.
    fn takes_op(&mut self, b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], depth: u32) -> bool {
        match op {
            Op::Mul(_) => args.iter().for_each(|&a| self.take(b, a, depth)),
            Op::Binary(k) if k.kind == BinaryKind::Div => {
                let Some(n) = b.number(args[1]).filter(|&n| n != 0.0) else { return false };
                self.number /= n;
                self.take(b, args[0], depth);
            }
            _ => return false,
        }
        true
    }

    /// Takes a value apart, `depth` products deep at most.
    fn take(&mut self, b: &mut Rebuild<'_>, v: ValueId, depth: u32) {
        if let Some(n) = b.number(v) {
            self.number *= n;
            return;
        }
        let node = b.graph.def(v).map(|(_, n)| (n.op.clone(), n.args.clone()));
        if let (Some((op, args)), Some(depth)) = (node, depth.checked_sub(1))
            && self.takes_op(b, &op, &args, depth)
        {
            return;
        }
        self.factors.push(v);
    }
}

/// `f` and `c`, when `v` is `c (1 + f)`.
fn one_more(b: &mut Rebuild<'_>, v: ValueId) -> Option<(ValueId, f64)> {
    let (_, args) = b.is::<Add>(v)?;
    let (f, c) = match (b.number(args[0]), b.number(args[1])) {
        (_, Some(c)) => (args[0], c),
        (Some(c), _) => (args[1], c),
        _ => return None,
    };
    (c != 0.0).then_some((f, c))
}

/// Which form of gelu's function `v / c` is of `x`, when it is one.
fn phi(b: &mut Rebuild<'_>, v: ValueId, c: f64, x: ValueId) -> Option<bool> {
    let mut product = Product { number: 1.0, factors: vec![] };
    product.take(b, v, DEPTH);
    let [f] = product.factors[..] else { return None };
    if !near(product.number, c) {
        return None;
    }
    if let Some((Unary { kind: UnaryKind::Erf }, inner)) = b.is::<Unary>(f) {
        return multiple_of(b, inner[0], x, FRAC_1_SQRT_2).then_some(false);
    }
    let (_, inner) = b.is::<Tanh>(f)?;
    cubic(b, inner[0], x).then_some(true)
}

/// Whether `v` is `times * x`.
fn multiple_of(b: &mut Rebuild<'_>, v: ValueId, x: ValueId, times: f64) -> bool {
    let mut product = Product { number: 1.0, factors: vec![] };
    product.take(b, v, DEPTH);
    // x may be a product itself.
    let mut own = Product { number: 1.0, factors: vec![] };
    own.take(b, x, DEPTH);
    product.factors.sort();
    own.factors.sort();
    product.factors == own.factors && near(product.number, times * own.number)
}

/// Whether `v` is `sqrt(2/pi) * (x + 0.044715 x^3)`.
fn cubic(b: &mut Rebuild<'_>, v: ValueId, x: ValueId) -> bool {
    let Some(terms) = polynomial(b, v, x, 6) else { return false };
    let root = (2.0 / PI).sqrt();
    let want = [0.0, root, 0.0, root * 0.044715];
    // Exporters write sqrt(2/pi) with as few as six digits.
    terms.iter().zip(want).all(|(&is, want)| (is - want).abs() <= 2e-5 * want.abs())
}

/// The coefficients of `v` as a polynomial in `x`, `depth` ops deep at most.
fn polynomial(b: &mut Rebuild<'_>, v: ValueId, x: ValueId, depth: u32) -> Option<[f64; 4]> {
    if v == x {
        return Some([0.0, 1.0, 0.0, 0.0]);
    }
    if let Some(n) = b.number(v) {
        return Some([n, 0.0, 0.0, 0.0]);
    }
    let depth = depth.checked_sub(1)?;
    let (op, args) = b.graph.def(v).map(|(_, n)| (n.op.clone(), n.args.clone()))?;
    let times = |p: [f64; 4], q: [f64; 4]| {
        let mut out = [0.0; 4];
        for (i, p) in p.iter().enumerate().filter(|(_, p)| **p != 0.0) {
            for (j, q) in q.iter().enumerate().filter(|(_, q)| **q != 0.0) {
                *out.get_mut(i + j)? += p * q;
            }
        }
        Some(out)
    };
    match op {
        Op::Mul(_) => times(polynomial(b, args[0], x, depth)?, polynomial(b, args[1], x, depth)?),
        Op::Add(_) => {
            let (p, q) = (polynomial(b, args[0], x, depth)?, polynomial(b, args[1], x, depth)?);
            Some([p[0] + q[0], p[1] + q[1], p[2] + q[2], p[3] + q[3]])
        }
        Op::Binary(k) if k.kind == BinaryKind::Pow => {
            let n = b.number(args[1]).filter(|n| [2.0, 3.0].contains(n))?;
            let p = polynomial(b, args[0], x, depth)?;
            let square = times(p, p)?;
            if n == 2.0 { Some(square) } else { times(square, p) }
        }
        _ => None,
    }
}

fn f32(dims: &[u64]) -> TensorTy {
    TensorTy::fixed(ElemTy::F32, dims)
}

fn gate(m: &Match<'_>) -> Option<Op> {
    let gate: &Unary = m.op("s")?;
    (gate.kind == UnaryKind::Sigmoid && m.root_ty() == m.ty("x")).then(|| Silu {}.into())
}

fn gates() -> Vec<Sample> {
    vec![Sample::new().value("x", f32(&[3, 5])).op("s", Unary { kind: UnaryKind::Sigmoid })]
}

/// `softmax` over the axis that the sum of the exponentials is taken over.
fn share(m: &Match<'_>) -> Option<Op> {
    let (quotient, e, sum): (&Binary, &Unary, &Reduce) = (m.op("d")?, m.op("e")?, m.op("r")?);
    let is_share = quotient.kind == BinaryKind::Div
        && e.kind == UnaryKind::Exp
        && sum.kind == ReduceKind::Sum
        && m.root_ty() == m.ty("x");
    match sum.axes[..] {
        [axis] if is_share => Some(Softmax { axis, log: false }.into()),
        _ => None,
    }
}

fn shares() -> Vec<Sample> {
    let over = |axis: u8| {
        Sample::new()
            .value("x", f32(&[3, 5]))
            .op("d", Binary { kind: BinaryKind::Div })
            .op("e", Unary { kind: UnaryKind::Exp })
            .op("r", Reduce { kind: ReduceKind::Sum, axes: vec![axis] })
    };
    vec![over(0), over(1)]
}

/// As [`share`], of numbers from which the largest was taken off.
fn share_of_difference(m: &Match<'_>) -> Option<Op> {
    let (off, top): (&Binary, &Reduce) = (m.op("o")?, m.op("t")?);
    let sum: &Reduce = m.op("r")?;
    if off.kind != BinaryKind::Sub || top.kind != ReduceKind::Max || top.axes != sum.axes {
        return None;
    }
    share(m)
}

fn shares_of_differences() -> Vec<Sample> {
    let with = |(axis, s): (u8, Sample)| {
        s.op("o", Binary { kind: BinaryKind::Sub }).op("t", Reduce { kind: ReduceKind::Max, axes: vec![axis] })
    };
    (0..).zip(shares()).map(with).collect()
}

/// Rules over functions of one number and softmax.
pub static RULES: &[Rule] = &[
    rule! {
        /// `x * sigmoid(x) = silu(x)`.
        "gate-before-sigmoid", Reassociates, "(mul ?x (unary:s ?x))" => "(silu ?x)",
        root: gate, samples: gates,
    },
    rule! {
        /// `sigmoid(x) * x = silu(x)`.
        "gate-after-sigmoid", Reassociates, "(mul (unary:s ?x) ?x)" => "(silu ?x)",
        root: gate, samples: gates,
    },
    rule! {
        /// `exp(x - max x) / sum exp(x - max x) = softmax(x)`.
        "softmax-of-difference", Reassociates,
        "(binary:d (unary:e (binary:o ?x (reduce:t ?x))) (reduce:r (unary:e (binary:o ?x (reduce:t ?x)))))"
            => "(softmax ?x)",
        root: share_of_difference, samples: shares_of_differences,
    },
    rule! {
        /// `exp(x) / sum exp(x) = softmax(x)`.
        "softmax-of-exponentials", Reassociates,
        "(binary:d (unary:e ?x) (reduce:r (unary:e ?x)))" => "(softmax ?x)",
        root: share, samples: shares,
    },
];
