//! Scales computed when the engine runs.

use super::quantize::DYNAMIC_INT8;
use super::{InferCx, OpSpec, scales};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::quant;
use crate::scheme::{Scheme, Zero};
use crate::ty::TensorTy;

op! {
    /// The scale of each group, from the largest magnitude of its numbers: what `quantize` to the same scheme needs.
    "dynamic_scale" => pub struct DynamicScale (
        /// Numbers to be quantized.
        x: One,
    ) {
        /// The scheme that the scales are for; symmetric.
        to: Scheme = DYNAMIC_INT8,
    }
}

impl OpSpec for DynamicScale {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.float(0)?;
        if self.to.zero != Zero::Symmetric {
            return Err(Diag::input(format!(
                "dynamic scales of {} need zero points, which are not computed",
                self.to
            )));
        }
        Ok(TensorTy { elem: self.to.scale.into(), shape: self.to.scale_shape(&x.shape)? })
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        let grouping = scales::Grouping::new(self.to, &x.dims())?;
        let n = out.shape.elements().ok_or_else(|| Diag::bug("a symbol is unbound in evaluation"))?;
        let mut absmax = vec![0f32; n as usize];
        for (i, &x) in x.f32s()?.iter().enumerate() {
            let top = &mut absmax[grouping.of(i)];
            *top = top.max(x.abs());
        }
        let scale = |a| Ok(quant::scale_for(quant::Span::symmetric(a), &self.to, quant::ScaleRule::Real)?.0);
        let scales: Vec<f32> = absmax.into_iter().map(scale).collect::<Result<_>>()?;
        Tensor::float(out, scales)
    }
}
