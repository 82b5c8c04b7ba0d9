//! Swapped axes of a matrix.

use super::{InferCx, OpSpec};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Shape, TensorTy};

op! {
    /// The transposed matrix.
    "transpose" => pub struct Transpose (
        /// A matrix.
        x: One,
    ) {}
}

impl OpSpec for Transpose {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.float(0)?;
        let (rows, cols) = x.matrix().ok_or_else(|| Diag::input(format!("{x} is not a matrix")))?;
        Ok(TensorTy { elem: x.elem, shape: Shape(vec![cols, rows]) })
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        let (rows, cols) = x.rows_cols();
        let data = x.f32s()?;
        let swapped = (0..cols).flat_map(|c| (0..rows).map(move |r| data[r * cols + c])).collect();
        Tensor::float(out, swapped)
    }
}
