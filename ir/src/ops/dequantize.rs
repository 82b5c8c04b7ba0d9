//! From codes to numbers.

use super::{InferCx, OpSpec, scales};
use crate::diag::Result;
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Float, TensorTy};

op! {
    /// `y = (q - z) * s`, with the scale and zero point of each element's group.
    "dequantize" => pub struct Dequantize (
        /// Quantized tensor; its type carries the scheme.
        q: One,
        /// One scale per group, shape given by the scheme.
        scale: One,
        /// One zero point per group, for schemes that have them.
        zero: Optional,
    ) {
        /// Result element type.
        to: Float = Float::F32,
    }
}

impl OpSpec for Dequantize {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let (scheme, shape) = scales::scheme(cx, 0)?;
        scales::check(cx, scheme, &shape, 1, Some(2))?;
        Ok(TensorTy { elem: self.to.into(), shape })
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (q, scale) = (arg(args, 0)?, arg(args, 1)?);
        let scheme = q.ty.elem.scheme().expect("inference has checked the operand");
        let grouping = scales::Grouping::new(scheme, &q.dims())?;
        let scale = scale.f32s()?;
        let mut y = scales::centred(q, args[2])?;
        y.iter_mut().enumerate().for_each(|(i, y)| *y *= scale[grouping.of(i)]);
        Tensor::float(out, y)
    }
}
