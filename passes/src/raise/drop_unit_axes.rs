//! Computes without the axis of a batch of one.

use super::rebuild::{Rebuild, rebuild, tell};
use crate::pass::prelude::*;
use quantc_ir::ops::{Concat, Cumulate, Expand, Gather, Reduce, ReduceKind, Slice, Softmax};
use std::collections::BTreeMap;

pass! {
    /// Computes without the axis of a batch of one.
    ///
    /// Values whose first extent is one are computed without that axis, as far down as ops allow; it comes back where an
    /// op or a result needs it. Numbers of three axes and more are looked at, and integers of two: a row of a matrix
    /// stays one.
    ///
    /// ```qir before
    /// %a = reshape %x {shape=1x?tx4}
    /// %b = silu %a
    /// %y = reshape %b {shape=?tx4}
    /// ```
    /// ```qir after
    /// %y = silu %x
    /// ```
    "drop-unit-axes" => pub struct DropUnitAxes {}
    scope: Layer, numerics: Exact, stats: drops
}

impl Pass for DropUnitAxes {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let mut all = BTreeMap::new();
        // Each round takes one axis; more than one is rare.
        for _ in 0..quantc_ir::text::MAX_RANK {
            let found = rebuild(cx, &mut without)?;
            let done = found.is_empty();
            found.into_iter().for_each(|(name, n)| *all.entry(name).or_default() += n);
            if done {
                break;
            }
        }
        tell(cx, &all);
        Ok((!all.is_empty()).into())
    }
}

/// The op without its first axis, with the axis put back.
fn without(b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], ty: &TensorTy) -> Result<Option<ValueId>> {
    let least = if ty.elem.is_real() { 3 } else { 2 };
    if ty.rank() < least || ty.shape.0[0] != Dim::Static(1) || ty.elem.scheme().is_some() {
        return Ok(None);
    }
    let Some(y) = inner(b, op, args, ty)? else { return Ok(None) };
    if b.dims(y) != ty.shape.0[1..] {
        return Ok(None);
    }
    b.reshape(y, &ty.shape.0).map(Some)
}

fn inner(b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], ty: &TensorTy) -> Result<Option<ValueId>> {
    let rank = ty.rank();
    let shorter = |axis: u8| axis.checked_sub(1);
    match op {
        Op::Add(_) | Op::Mul(_) | Op::Binary(_) | Op::Compare(_) | Op::Select(_) | Op::Unary(_) | Op::Cast(_)
        | Op::Gelu(_) | Op::Silu(_) | Op::Relu(_) | Op::Tanh(_) | Op::Dot(_) => {
            let args = args.iter().map(|&a| aligned(b, a, rank)).collect::<Result<Vec<_>>>()?;
            b.emit(op.clone(), &args).map(Some)
        }
        Op::MatMul(m) if m.epilogue.is_empty() && m.packed.is_empty() => first(b, op.clone(), args),
        Op::LayerNorm(_) | Op::RmsNorm(_) => first(b, op.clone(), args),
        Op::Embedding(_) => first(b, op.clone(), args),
        Op::Softmax(s) => match shorter(s.axis) {
            Some(axis) => first(b, Softmax { axis, log: s.log }.into(), args),
            None => Ok(None),
        },
        Op::Cumulate(c) => match shorter(c.axis) {
            Some(axis) => first(b, Cumulate { axis, ..c.clone() }.into(), args),
            None => Ok(None),
        },
        Op::Slice(s) => match shorter(s.axis) {
            Some(axis) => first(b, Slice { axis, ..s.clone() }.into(), args),
            None => Ok(None),
        },
        Op::Concat(c) => match shorter(c.axis) {
            Some(axis) => {
                let args = args.iter().map(|&a| squeezed(b, a)).collect::<Result<Vec<_>>>()?;
                b.emit(Concat { axis }, &args).map(Some)
            }
            None => Ok(None),
        },
        Op::Reduce(r) => {
            // Of one number, these are the number.
            use ReduceKind as K;
            if r.axes.contains(&0) && !matches!(r.kind, K::Sum | K::Mean | K::Max | K::Min | K::Prod) {
                return Ok(None);
            }
            if b.dims(args[0])[0] != Dim::Static(1) {
                return Ok(None);
            }
            let axes = r.axes.iter().filter_map(|&a| shorter(a)).collect();
            first(b, Reduce { kind: r.kind, axes }.into(), args)
        }
        Op::Transpose(t) => {
            let perm = super::canonicalize::order(&t.perm);
            if perm[0] != 0 {
                return Ok(None);
            }
            let x = squeezed(b, args[0])?;
            let perm: Vec<u8> = perm[1..].iter().map(|p| p - 1).collect();
            b.transpose(x, &perm).map(Some)
        }
        Op::Expand(_) => {
            let x = aligned(b, args[0], rank)?;
            b.emit(Expand { shape: Shape(ty.shape.0[1..].to_vec()) }, &[x]).map(Some)
        }
        Op::Gather(g) => {
            let (x, at) = (args[0], args[1]);
            match shorter(g.axis) {
                Some(axis) => {
                    let x = squeezed(b, x)?;
                    b.emit(Gather { axis }, &[x, at]).map(Some)
                }
                None if b.ty(at).rank() > 0 => {
                    let at = squeezed(b, at)?;
                    b.emit(Gather { axis: 0 }, &[x, at]).map(Some)
                }
                None => Ok(None),
            }
        }
        _ => Ok(None),
    }
}

/// The value without its first axis, which has an extent of one.
fn squeezed(b: &mut Rebuild<'_>, x: ValueId) -> Result<ValueId> {
    let dims = b.dims(x);
    match dims.split_first() {
        Some((Dim::Static(1), rest)) => b.reshape(x, rest),
        _ => Err(Diag::bug(format!("an operand of type {} was to have an axis of extent one", b.ty(x)))),
    }
}

/// The operand of an op that aligns shapes at the last axis: without the first of `rank` axes, if it has it.
fn aligned(b: &mut Rebuild<'_>, x: ValueId, rank: usize) -> Result<ValueId> {
    if b.ty(x).rank() == rank { squeezed(b, x) } else { Ok(x) }
}

/// The op with its first operand squeezed.
fn first(b: &mut Rebuild<'_>, op: Op, args: &[ValueId]) -> Result<Option<ValueId>> {
    let mut args = args.to_vec();
    args[0] = squeezed(b, args[0])?;
    b.emit(op, &args).map(Some)
}
