//! Computes in f32 what a graph computes in f16 or bf16.

use super::rebuild::{Rebuild, rebuild, tell_found};
use crate::pass::prelude::*;
use quantc_ir::eval::Tensor;
use quantc_ir::ops::Cast;

pass! {
    /// Computes in f32 what a graph computes in f16 or bf16.
    ///
    /// Weights and tables of narrow floats stay as they are stored, as those of a checkpoint do; sums, products and functions
    /// of narrow floats are computed in f32, and what was rounded on the way from one to the next is not rounded any more.
    /// Constants of gelu that were rounded are what was meant.
    /// Kernels keep what lies between them as wide as their target wants, not as the graph's exporter wanted.
    ///
    /// ```qir before
    /// %a = cast %x {to=f16}
    /// %b = silu %a
    /// %y = cast %b {to=f32}
    /// ```
    /// ```qir after
    /// %y = silu %x
    /// ```
    "widen-floats" => pub struct WidenFloats {}
    scope: Layer, numerics: Requantizes, stats: drops
}

impl Pass for WidenFloats {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let found = rebuild(cx, &mut wide)?;
        tell_found(cx, "narrow arithmetic", &found);
        Ok((!found.is_empty()).into())
    }
}

/// Whether numbers are those that graphs compute in to save memory. Floats of 8 bits are codes: rounding to them is meant.
fn is_narrow(elem: ElemTy) -> bool {
    matches!(elem, ElemTy::F16 | ElemTy::Bf16)
}

fn wide(b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], ty: &TensorTy) -> Result<Option<ValueId>> {
    let narrow = |b: &Rebuild<'_>, v: ValueId| !b.graph.is_none(v) && is_narrow(b.ty(v).elem);
    match op {
        // What was rounded only to be read as f32 again.
        Op::Cast(c) if narrow(b, args[0]) && !is_narrow(c.to) && !b.is_constant(args[0]) => {
            let x = widened(b, args[0])?;
            if x == args[0] { Ok(None) } else { b.cast(x, c.to).map(Some) }
        }
        Op::Cast(_) | Op::Embedding(_) => Ok(None),
        // The matrix of a product stays as it is stored; its rows and what is done to sums do not.
        Op::MatMul(m) if m.packed.is_empty() && narrow(b, args[0]) => {
            let mut args = args.to_vec();
            for (i, arg) in args.iter_mut().enumerate() {
                if i != 1 && narrow(b, *arg) {
                    *arg = widened(b, *arg)?;
                }
            }
            b.emit(op.clone(), &args).map(Some)
        }
        // Rows of a table are read as they are.
        Op::Gather(_) if b.is_constant(args[0]) => Ok(None),
        Op::Add(_)
        | Op::Mul(_)
        | Op::Binary(_)
        | Op::Compare(_)
        | Op::Select(_)
        | Op::Unary(_)
        | Op::Gelu(_)
        | Op::Silu(_)
        | Op::Relu(_)
        | Op::Tanh(_)
        | Op::Softmax(_)
        | Op::LayerNorm(_)
        | Op::RmsNorm(_)
        | Op::Reduce(_)
        | Op::Cumulate(_)
        | Op::Dot(_)
        | Op::Einsum(_)
        | Op::Reshape(_)
        | Op::Transpose(_)
        | Op::Expand(_)
        | Op::Slice(_)
        | Op::Concat(_)
        | Op::Gather(_)
        | Op::Rope(_)
        | Op::Attention(_) => {
            let constant = args.iter().all(|&a| b.graph.is_none(a) || b.is_constant(a));
            if constant || !args.iter().any(|&a| narrow(b, a)) {
                return Ok(None);
            }
            let mut args = args.to_vec();
            for arg in &mut args {
                if narrow(b, *arg) {
                    *arg = widened(b, *arg)?;
                }
            }
            let y = b.emit(op.clone(), &args)?;
            b.cast(y, ty.elem).map(Some)
        }
        _ => Ok(None),
    }
}

/// The numbers of `v` in f32, before they were rounded.
fn widened(b: &mut Rebuild<'_>, v: ValueId) -> Result<ValueId> {
    if let Some((_, inner)) = b.is::<Cast>(v)
        && b.ty(inner[0]).elem == ElemTy::F32
    {
        return Ok(inner[0]);
    }
    if let (Some(x), Some(_)) = (b.number(v), b.ty(v).shape.dims()) {
        let one = b.scalar(ElemTy::F32, meant(x, b.ty(v).elem)?)?;
        let dims = b.dims(v);
        return if dims.is_empty() { Ok(one) } else { b.expand(one, &dims) };
    }
    b.cast(v, ElemTy::F32)
}

/// The number of a formula that was rounded to `x`, if there is one; else `x`.
fn meant(x: f64, elem: ElemTy) -> Result<f64> {
    use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, SQRT_2};
    for number in [SQRT_2, FRAC_1_SQRT_2, FRAC_2_SQRT_PI * FRAC_1_SQRT_2, 0.044715] {
        let rounded = Tensor::from_reals(&TensorTy::fixed(elem, &[]), vec![number])?;
        if rounded.reals() == [x] {
            return Ok(number);
        }
    }
    Ok(x)
}
