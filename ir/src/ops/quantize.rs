//! From numbers to codes.

use super::{InferCx, OpSpec, scales};
use crate::diag::Result;
use crate::eval::{EvalCx, Tensor, arg};
use crate::formats;
use crate::quant;
use crate::scheme::{Group, Scheme, Zero};
use crate::ty::{ElemTy, Float, TensorTy};

op! {
    /// `q = saturate(round(x / s) + z)`, ties to even, with the scale and zero point of each element's group.
    "quantize" => pub struct Quantize (
        /// Numbers.
        x: One,
        /// One scale per group, shape given by the scheme.
        scale: One,
        /// One zero point per group, for schemes that have them.
        zero: Optional,
    ) {
        /// The scheme of the result.
        to: Scheme = DYNAMIC_INT8,
    }
}

/// Symmetric int8 with one scale per token.
pub const DYNAMIC_INT8: Scheme =
    Scheme { format: &formats::INT8, group: Group::Token, zero: Zero::Symmetric, scale: Float::F32 };

impl OpSpec for Quantize {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.float(0)?;
        scales::check(cx, self.to, &x.shape, 1, Some(2))?;
        Ok(TensorTy { elem: ElemTy::Q(self.to), shape: x.shape.clone() })
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (x, scale) = (arg(args, 0)?, arg(args, 1)?);
        let grouping = scales::Grouping::new(self.to, &x.dims())?;
        let scale = scale.f32s()?;
        let zeros = args[2].map(|z| z.code_bytes()).transpose()?;
        let zero_of = |group: usize| match (zeros, self.to.zero) {
            (Some(z), Zero::Point(format)) => format.decode(u32::from(z[group])) as i32,
            _ => 0,
        };
        let one = |(i, &x): (usize, &f32)| {
            let group = grouping.of(i);
            quant::quantize_one(x, scale[group], zero_of(group), self.to.format) as u8
        };
        Tensor::codes(out, x.f32s()?.iter().enumerate().map(one).collect())
    }
}
