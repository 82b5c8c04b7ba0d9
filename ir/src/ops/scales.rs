//! What the quantized ops share: which scale belongs to which element, and checks of scale operands.

use super::InferCx;
use crate::diag::{Diag, Result};
use crate::eval::Tensor;
use crate::scheme::{Scheme, Zero};
use crate::ty::{ElemTy, Shape, TensorTy};

/// Finds the scale of an element.
pub(super) struct Grouping {
    dims: Vec<usize>,
    blocks: Vec<usize>,
    scale_dims: Vec<usize>,
}

impl Grouping {
    /// The grouping of a tensor of extents `dims`.
    pub(super) fn new(scheme: Scheme, dims: &[usize]) -> Result<Grouping> {
        let blocks = scheme.blocks(dims.len())?;
        let blocks: Vec<usize> =
            blocks.iter().zip(dims).map(|(b, &d)| b.map_or(d.max(1), |b| b as usize)).collect();
        let scale_dims = dims.iter().zip(&blocks).map(|(d, b)| d.div_ceil(*b)).collect();
        Ok(Grouping { dims: dims.to_vec(), blocks, scale_dims })
    }

    /// Index into the scales of the element at flat index `i`.
    pub(super) fn of(&self, mut i: usize) -> usize {
        let (mut group, mut stride) = (0, 1);
        for axis in (0..self.dims.len()).rev() {
            let at = i % self.dims[axis];
            i /= self.dims[axis];
            group += at / self.blocks[axis] * stride;
            stride *= self.scale_dims[axis];
        }
        group
    }
}

/// The scheme of operand `i`.
pub(super) fn scheme(cx: &InferCx<'_>, i: usize) -> Result<(Scheme, Shape)> {
    let ty = cx.arg(i)?;
    match ty.elem {
        ElemTy::Q(s) => Ok((s, ty.shape.clone())),
        _ => Err(Diag::input(format!("operand {i} has type {ty}, expected a quantized tensor"))),
    }
}

/// Checks the scale operand `at` and the zero-point operand of a tensor of `shape` under `scheme`.
pub(super) fn check(
    cx: &InferCx<'_>,
    scheme: Scheme,
    shape: &Shape,
    at: usize,
    zero: Option<usize>,
) -> Result<()> {
    let want = TensorTy { elem: scheme.scale.into(), shape: scheme.scale_shape(shape)? };
    let got = cx
        .opt(at)
        .ok_or_else(|| Diag::input(format!("{scheme} needs its scales, a value of type {want}")))?;
    if *got != want {
        return Err(Diag::input(format!("the scales have type {got}, {scheme} needs {want}")));
    }
    let zero_ty = zero.and_then(|z| cx.opt(z));
    match (scheme.zero, zero_ty) {
        (Zero::Symmetric, None) => Ok(()),
        (Zero::Symmetric, Some(ty)) => {
            Err(Diag::input(format!("{scheme} has no zero points, but one of type {ty} is given")))
        }
        (Zero::Point(format), ty) => {
            let elem = ElemTy::Q(zero_scheme(scheme, format));
            let want = TensorTy { elem, shape: want.shape };
            match ty {
                Some(ty) if *ty == want => Ok(()),
                Some(ty) => {
                    Err(Diag::input(format!("the zero points have type {ty}, {scheme} needs {want}")))
                }
                None => Err(Diag::input(format!("{scheme} needs its zero points, a value of type {want}"))),
            }
        }
    }
}

/// The element type of the zero points of `scheme`: bare codes, with a scheme that groups the whole tensor.
pub fn zero_scheme(scheme: Scheme, format: &'static crate::formats::Format) -> Scheme {
    Scheme { format, group: crate::scheme::Group::Tensor, zero: Zero::Symmetric, scale: scheme.scale }
}

/// The numbers that codes mean before scaling: `decode(code) - decode(zero)`.
pub(super) fn centred(q: &Tensor, zero: Option<&Tensor>) -> Result<Vec<f32>> {
    let scheme = q.ty.elem.scheme().ok_or_else(|| Diag::bug("codes without a scheme"))?;
    let grouping = Grouping::new(scheme, &q.dims())?;
    let zeros: Option<Vec<f32>> = match (zero, scheme.zero) {
        (Some(z), Zero::Point(format)) => {
            Some(z.code_bytes()?.iter().map(|&c| format.decode(u32::from(c))).collect())
        }
        _ => None,
    };
    let one = |(i, &code): (usize, &u8)| {
        let x = scheme.format.decode(u32::from(code));
        zeros.as_ref().map_or(x, |z| x - z[grouping.of(i)])
    };
    Ok(q.code_bytes()?.iter().enumerate().map(one).collect())
}
