//! Extents, and the same elements under other extents.

use super::{Results, one};
use crate::onnx::build::{Parted, REST, Val};
use crate::onnx::node::Cx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::Expand;
use quantc_ir::ty::{Dim, Shape};
use std::rc::Rc;

onnx_ops! {
    "" "Expand" since 8 => expand;
    "" "Flatten" since 1 => flatten;
    "" "Reshape" since 5 => reshape;
    "" "Shape" since 1 => shape;
    "" "Size" since 1 => size;
    "" "Squeeze" since 1 => squeeze;
    "" "Unsqueeze" since 1 => unsqueeze;
}

fn shape(cx: &mut Cx<'_, '_>) -> Results {
    let dims = { let x = cx.input(0)?; cx.dims(&x) };
    let rank = dims.len() as i64;
    let mut bound = |name, default: i64| -> Result<usize> {
        let at = cx.int(name)?.unwrap_or(default);
        let at = if at < 0 { at.saturating_add(rank) } else { at };
        Ok(at.clamp(0, rank) as usize)
    };
    let (start, end) = (bound("start", 0)?, bound("end", rank)?);
    let part = dims.get(start..end).unwrap_or_default().to_vec();
    if part.contains(&REST) {
        return Err(Diag::input("an extent is asked for that is a product of others, not all of which are known")
            .help("give the named extents of the inputs numbers"));
    }
    one(Ok(cx.extents(part)))
}

fn size(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let n = cx.fixed(&x)?.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let n = n.and_then(|n| i64::try_from(n).ok());
    let n = n.ok_or_else(|| Diag::input(format!("input 0 of type {} is too large", cx.ty(&x))))?;
    let list = cx.ints(&[n]);
    one(cx.reshape(&list, vec![]))
}

/// How many times more elements `from` has than `to`: a number, and the symbols that are left.
fn factors(from: &[Dim], to: &[Dim]) -> Option<(u64, Vec<Dim>)> {
    let split = |dims: &[Dim]| {
        let symbols: Vec<Dim> = dims.iter().copied().filter(|d| d.fixed().is_none()).collect();
        let n = dims.iter().filter_map(|d| d.fixed()).try_fold(1u64, |n, d| n.checked_mul(d));
        (n, symbols)
    };
    let ((n, mut left), (m, taken)) = (split(from), split(to));
    for symbol in taken {
        left.remove(left.iter().position(|&l| l == symbol)?);
    }
    let (n, m) = (n?, m?);
    Some((n.checked_div(m).filter(|q| q * m == n)?, left))
}

/// As [`factors`], as one extent.
fn quotient(from: &[Dim], to: &[Dim]) -> Option<Dim> {
    match factors(from, to)? {
        (q, left) if left.is_empty() => Some(Dim::Static(q)),
        (1, left) if left.len() == 1 => Some(left[0]),
        _ => None,
    }
}

fn reshape(cx: &mut Cx<'_, '_>) -> Results {
    let mut x = cx.input(0)?;
    let keep_zero = cx.flag("allowzero", false)?;
    let mut from = cx.dims(&x);
    let asked = cx.extents_of(1, "shape")?;
    cx.check_rank(asked.len())?;
    let (mut dims, mut rest) = (vec![], None);
    for (i, d) in asked.into_iter().enumerate() {
        dims.push(match d {
            Ok(Dim::Static(0)) if !keep_zero => {
                let kept = from.get(i).copied().filter(|&d| d != REST);
                kept.ok_or_else(|| Diag::input(format!("`shape` keeps axis {i}, which input 0 does not have")))?
            }
            Ok(d) => d,
            Err(-1) if rest.is_none() => {
                rest = Some(i);
                Dim::Static(1)
            }
            Err(n) => return Err(Diag::input(format!("`shape` has the extent {n}"))),
        });
    }
    if let Val::Parted(p) = &x {
        x = p.parts.clone();
        from = cx.dims(&x);
    }
    if let Some(at) = rest {
        // A product of a number and an extent has no name: its factors stay apart.
        if let (Val::Value(_), Some((n @ 2.., left))) = (&x, factors(&from, &dims))
            && let [symbol] = left[..]
        {
            let mut apart = dims.clone();
            apart.splice(at..=at, [symbol, Dim::Static(n)]);
            cx.check_rank(apart.len())?;
            dims[at] = REST;
            let parts = cx.reshape(&x, apart)?;
            return one(Ok(Val::Parted(Rc::new(Parted { parts, dims }))));
        }
        let unknown = || {
            let (ty, to) = (cx.ty(&x), Shape(dims.clone()));
            Diag::input(format!("`shape`: the elements of {ty} do not fill the rest of {to}"))
        };
        dims[at] = quotient(&from, &dims).ok_or_else(unknown)?;
    }
    if let Val::Extents { dims: held, .. } = &x
        && (dims == [Dim::Static(held.len() as u64)] || (dims.is_empty() && held.len() == 1))
    {
        return one(Ok(Val::Extents { dims: held.clone(), scalar: dims.is_empty() }));
    }
    one(cx.reshape(&x, dims))
}

fn flatten(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let dims = cx.dims(&x);
    let axis = cx.int("axis")?.unwrap_or(1);
    let axis = if axis == dims.len() as i64 { dims.len() } else { cx.axis(axis, dims.len())? };
    let product = |part: &[Dim]| {
        quotient(part, &[]).ok_or_else(|| Diag::input(format!("{} is not flattened: it has several named extents", Shape(dims.clone()))))
    };
    let (rows, cols) = (product(&dims[..axis])?, product(&dims[axis..])?);
    one(cx.reshape(&x, vec![rows, cols]))
}

fn squeeze(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let dims = cx.dims(&x);
    let axes = match cx.ints_of(1, "axes")? {
        Some(axes) => cx.axes(&axes, dims.len())?,
        None => (0..dims.len()).filter(|&a| dims[a] == Dim::Static(1)).collect(),
    };
    if let Val::Extents { dims: held, scalar: false } = &x
        && held.len() == 1
    {
        return one(Ok(Val::Extents { dims: held.clone(), scalar: axes == [0] }));
    }
    one(cx.squeeze(&x, &axes))
}

fn unsqueeze(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let axes = cx.ints_of(1, "axes")?.ok_or_else(|| Diag::input("`axes` is missing"))?;
    let rank = cx.rank(&x) + axes.len();
    cx.check_rank(rank)?;
    let axes = cx.axes(&axes, rank)?;
    if let Val::Extents { dims, scalar: true } = &x
        && axes == [0]
    {
        return one(Ok(Val::Extents { dims: dims.clone(), scalar: false }));
    }
    one(cx.unsqueeze(&x, &axes))
}

/// The extents of two shapes aligned at the last axis, extents of one repeated.
pub(super) fn broadcast(a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>> {
    let rank = a.len().max(b.len());
    let at = |dims: &[Dim], i: usize| (i + dims.len()).checked_sub(rank).map_or(Dim::Static(1), |i| dims[i]);
    let one = |i: usize| match (at(a, i), at(b, i)) {
        (x, y) if x == y => Ok(x),
        (Dim::Static(1), y) => Ok(y),
        (x, Dim::Static(1)) => Ok(x),
        (x, y) => Err(Diag::input(format!("extents {x} and {y} do not broadcast"))),
    };
    (0..rank).map(one).collect()
}

fn expand(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let to = cx.shape_of(1, "shape")?;
    let dims = broadcast(&cx.dims(&x), &to)?;
    if dims == cx.dims(&x) {
        return one(Ok(x));
    }
    one(cx.op(Expand { shape: Shape(dims) }, &[&x]))
}
