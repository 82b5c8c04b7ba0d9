//! Conversion between float types.

use super::{InferCx, OpSpec};
use crate::diag::Result;
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Float, TensorTy};

op! {
    /// The same numbers in another float type, rounded to nearest, ties to even.
    "cast" => pub struct Cast (
        /// Input.
        x: One,
    ) {
        /// Result element type.
        to: Float = Float::F32,
    }
}

impl OpSpec for Cast {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        Ok(cx.float(0)?.with_elem(self.to))
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        Tensor::float(out, arg(args, 0)?.f32s()?.to_vec())
    }
}
