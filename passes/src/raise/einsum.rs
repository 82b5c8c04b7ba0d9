//! Einstein's sums of two operands as products of matrices.

use super::rebuild::Rebuild;
use crate::pass::prelude::*;
use quantc_ir::ops::{Dot, Mul};

/// The places of some letters among others.
fn places(letters: &[char], of: &[char]) -> Option<Vec<u8>> {
    of.iter().map(|c| letters.iter().position(|l| l == c).map(|at| at as u8)).collect()
}

/// Axes in the order of `to`, where they are in the order of `from`.
fn ordered(b: &mut Rebuild<'_>, x: ValueId, from: &[char], to: &[char]) -> Result<Option<ValueId>> {
    let Some(perm) = places(from, to).filter(|p| p.len() == from.len()) else { return Ok(None) };
    if perm.len() < 2 || perm.is_sorted() { Ok(Some(x)) } else { b.transpose(x, &perm).map(Some) }
}

/// The extents of letters.
fn extents(b: &Rebuild<'_>, x: ValueId, letters: &[char], of: &[char]) -> Option<Vec<Dim>> {
    let dims = b.dims(x);
    Some(places(letters, of)?.into_iter().map(|at| dims[usize::from(at)]).collect())
}

/// Extents as one axis: the product of known ones, or one that is not known alone.
fn joined(dims: &[Dim]) -> Option<Dim> {
    if let [one] = dims {
        return Some(*one);
    }
    dims.iter().try_fold(1u64, |n, d| n.checked_mul(d.fixed()?)).map(Dim::Static)
}

/// The sum as a product over what both operands share: of matrices behind the axes that the result has of both, or
/// element by element where nothing is summed. Nothing when an axis is summed in one operand alone, or repeated.
pub(super) fn product(
    b: &mut Rebuild<'_>,
    equation: &str,
    args: &[ValueId],
    ty: &TensorTy,
) -> Result<Option<ValueId>> {
    let (Some((inputs, output)), &[x, y]) = (equation.split_once("->"), args) else { return Ok(None) };
    let Some((xs, ys)) = inputs.split_once(',') else { return Ok(None) };
    let [xs, ys, out]: [Vec<char>; 3] = [xs, ys, output].map(|l| l.chars().collect());
    let once = |l: &[char]| l.iter().enumerate().all(|(i, c)| !l[..i].contains(c));
    if ![&xs, &ys, &out].iter().all(|l| once(l)) || !ty.elem.is_float() {
        return Ok(None);
    }
    let part = |of: &[char], f: &dyn Fn(&char) -> bool| -> Vec<char> {
        of.iter().copied().filter(|c| f(c)).collect()
    };
    let both = part(&out, &|c| xs.contains(c) && ys.contains(c));
    let left = part(&out, &|c| xs.contains(c) && !ys.contains(c));
    let right = part(&out, &|c| !xs.contains(c) && ys.contains(c));
    let inner = part(&xs, &|c| ys.contains(c) && !out.contains(c));
    let lists = |parts: [&[char]; 3]| parts.concat();
    // All letters have their place, and extents are not repeated.
    let (of_x, of_y) = (lists([&both, &left, &inner]), lists([&both, &inner, &right]));
    let shared = lists([&both, &inner, &[]]);
    if of_x.len() != xs.len()
        || of_y.len() != ys.len()
        || extents(b, x, &xs, &shared) != extents(b, y, &ys, &shared)
    {
        return Ok(None);
    }
    let (Some(batch), Some(rows), Some(cols), Some(sum)) = (
        extents(b, x, &xs, &both),
        extents(b, x, &xs, &left),
        extents(b, y, &ys, &right),
        extents(b, x, &xs, &inner),
    ) else {
        return Ok(None);
    };
    let (Some(x), Some(y)) = (ordered(b, x, &xs, &of_x)?, ordered(b, y, &ys, &of_y)?) else {
        return Ok(None);
    };
    let with = |more: [&[Dim]; 2]| [&batch[..], more[0], more[1]].concat();
    let product = if inner.is_empty() {
        let ones = |n: usize| vec![Dim::Static(1); n];
        let x = b.reshape(x, &with([&rows, &ones(cols.len())]))?;
        let y = b.reshape(y, &with([&ones(rows.len()), &cols]))?;
        b.emit(Mul {}, &[x, y])?
    } else {
        let (Some(r), Some(c), Some(k)) = (joined(&rows), joined(&cols), joined(&sum)) else {
            return Ok(None);
        };
        let x = b.reshape(x, &with([&[r], &[k]]))?;
        let y = b.reshape(y, &with([&[k], &[c]]))?;
        b.emit(Dot {}, &[x, y])?
    };
    let product = b.reshape(product, &with([&rows, &cols]))?;
    ordered(b, product, &lists([&both, &left, &right]), &out)
}
