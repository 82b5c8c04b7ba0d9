//! Arithmetic on extents of which some are known when the engine runs only.
//!
//! Exporters compute shapes. What such arithmetic only moves, compares with what it cannot be, or combines with 0, 1 and
//! itself has an answer for any extent; the rest is refused by whoever asks for the result.

use super::build::{Build, REST, Val};
use quantc_ir::diag::Result;
use quantc_ir::eval::Tensor;
use quantc_ir::ops::{BinaryKind as B, Order};
use quantc_ir::ty::{Dim, ElemTy, TensorTy};
use std::rc::Rc;

/// What is done with two lists of extents, element by element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arithmetic {
    Add,
    Mul,
    Binary(B),
    Compare(Order),
}

/// One number: an extent, or any integer that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    Known(i128),
    Extent(char),
}

impl Number {
    fn of(dim: Dim) -> Number {
        match dim {
            Dim::Static(n) => Number::Known(n.into()),
            REST => Number::Known(-1),
            Dim::Sym(c) => Number::Extent(c),
        }
    }

    fn dim(self) -> Option<Dim> {
        match self {
            Number::Known(-1) => Some(REST),
            Number::Known(n) => u64::try_from(n).ok().map(Dim::Static),
            Number::Extent(c) => Some(Dim::Sym(c)),
        }
    }
}

/// Numbers with the type they have in the model.
struct Numbers {
    ty: TensorTy,
    all: Vec<Number>,
}

fn numbers(cx: &Build<'_>, val: &Val) -> Option<Numbers> {
    let ty = cx.ty(val);
    let all = match val {
        Val::Extents { dims, .. } => dims.iter().map(|&d| Number::of(d)).collect(),
        // Lists of extents are short.
        Val::Const(c) if c.ty.elem.int().is_some() && c.ty.shape.elements().is_some_and(|n| n <= 64) => {
            cx.known(val)?.ok()?.ints().into_iter().map(Number::Known).collect()
        }
        _ => return None,
    };
    Some(Numbers { ty, all })
}

fn val(cx: &Build<'_>, ty: TensorTy, all: &[Number]) -> Result<Option<Val>> {
    let known: Option<Vec<i128>> = all
        .iter()
        .map(|n| match n {
            Number::Known(n) => Some(*n),
            Number::Extent(_) => None,
        })
        .collect();
    if let Some(known) = known {
        return Ok(Some(cx.constant(Tensor::from_ints(&ty, known.into_iter())?)));
    }
    let dims: Option<Vec<Dim>> = all.iter().map(|n| n.dim()).collect();
    Ok(match dims {
        Some(dims) if ty.elem == ElemTy::I64 && ty.rank() <= 1 => {
            Some(Val::Extents { dims: Rc::new(dims), scalar: ty.rank() == 0 })
        }
        _ => None,
    })
}

/// Numbers of two lists side by side, the shorter one repeated; the type is that of the longer.
fn pairs(a: &Numbers, b: &Numbers) -> Option<(TensorTy, Vec<(Number, Number)>)> {
    let longer = if a.all.len() > b.all.len() || a.ty.rank() >= b.ty.rank() { a } else { b };
    let n = a.all.len().max(b.all.len());
    if longer.all.len() != n || [a, b].iter().any(|x| x.all.len() != n && x.all.len() != 1) {
        return None;
    }
    let at = |x: &Numbers, i: usize| x.all[if x.all.len() == 1 { 0 } else { i }];
    Some((longer.ty.clone(), (0..n).map(|i| (at(a, i), at(b, i))).collect()))
}

/// `a what b` where one of them is extents that are not known, when it has an answer for any extent.
pub(crate) fn arithmetic(cx: &Build<'_>, what: Arithmetic, a: &Val, b: &Val) -> Result<Option<Val>> {
    if !matches!(a, Val::Extents { .. }) && !matches!(b, Val::Extents { .. }) {
        return Ok(None);
    }
    let (Some(a), Some(b)) = (numbers(cx, a), numbers(cx, b)) else { return Ok(None) };
    let Some((mut ty, pairs)) = pairs(&a, &b) else { return Ok(None) };
    let all: Option<Vec<Number>> = pairs.into_iter().map(|(a, b)| one(what, a, b)).collect();
    let Some(all) = all else { return Ok(None) };
    if matches!(what, Arithmetic::Compare(_)) {
        ty.elem = ElemTy::BOOL;
    }
    val(cx, ty, &all)
}

/// `if cond then a else b`, of extents.
pub(crate) fn select(cx: &Build<'_>, cond: &Val, a: &Val, b: &Val) -> Result<Option<Val>> {
    if !matches!(a, Val::Extents { .. }) && !matches!(b, Val::Extents { .. }) {
        return Ok(None);
    }
    let (Some(cond), Some(a), Some(b)) = (numbers(cx, cond), numbers(cx, a), numbers(cx, b)) else {
        return Ok(None);
    };
    let Some((ty, pairs)) = pairs(&a, &b) else { return Ok(None) };
    if cond.all.len() != pairs.len() && cond.all.len() != 1 {
        return Ok(None);
    }
    let pick = |(i, (a, b)): (usize, (Number, Number))| match cond.all[i % cond.all.len()] {
        Number::Known(c) => Some(if c != 0 { a } else { b }),
        Number::Extent(_) => None,
    };
    let all: Option<Vec<Number>> = pairs.into_iter().enumerate().map(pick).collect();
    all.map_or(Ok(None), |all| val(cx, ty, &all))
}

fn one(what: Arithmetic, a: Number, b: Number) -> Option<Number> {
    use Arithmetic as A;
    use Number::{Extent, Known};
    let truth = |t: bool| Some(Known(t.into()));
    match (what, a, b) {
        (A::Add, Known(x), Known(y)) => x.checked_add(y).map(Known),
        (A::Add, Known(0), x) | (A::Add | A::Binary(B::Sub), x, Known(0)) => Some(x),
        (A::Mul, Known(x), Known(y)) => x.checked_mul(y).map(Known),
        (A::Mul, Known(0), _) | (A::Mul, _, Known(0)) => Some(Known(0)),
        (A::Mul, Known(1), x) | (A::Mul | A::Binary(B::Div), x, Known(1)) => Some(x),
        (A::Binary(B::Sub), Known(x), Known(y)) => x.checked_sub(y).map(Known),
        (A::Binary(B::Sub), Extent(x), Extent(y)) if x == y => Some(Known(0)),
        (A::Binary(B::Div), Known(x), Known(y)) => x.checked_div(y).map(Known),
        (A::Binary(B::Min | B::Max), x, y) if x == y => Some(x),
        // Extents are not negative.
        (A::Binary(B::Max), x @ Extent(_), Known(n)) | (A::Binary(B::Max), Known(n), x @ Extent(_))
            if n <= 0 =>
        {
            Some(x)
        }
        (A::Compare(order), Known(x), Known(y)) => truth(match order {
            Order::Equal => x == y,
            Order::Less => x < y,
            Order::LessEqual => x <= y,
        }),
        (A::Compare(order), Extent(x), Extent(y)) if x == y => truth(order != Order::Less),
        (A::Compare(Order::Equal), Extent(_), Known(n)) | (A::Compare(Order::Equal), Known(n), Extent(_))
            if n < 0 =>
        {
            truth(false)
        }
        (A::Compare(Order::Less), Extent(_), Known(n)) if n <= 0 => truth(false),
        (A::Compare(Order::LessEqual), Extent(_), Known(n)) if n < 0 => truth(false),
        (A::Compare(Order::Less), Known(n), Extent(_)) if n < 0 => truth(true),
        (A::Compare(Order::LessEqual), Known(n), Extent(_)) if n <= 0 => truth(true),
        _ => None,
    }
}
