//! Codes as plain integers.

use super::{InferCx, OpSpec};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{ElemTy, TensorTy};

op! {
    /// The stored codes of a quantized tensor as unsigned integers, without scales.
    "bitcast_storage" => pub struct BitcastStorage (
        /// Quantized tensor.
        q: One,
    ) {}
}

impl OpSpec for BitcastStorage {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let q = cx.arg(0)?;
        if q.elem.scheme().is_none() {
            return Err(Diag::input(format!("operand 0 has type {q}, expected a quantized tensor")));
        }
        Ok(q.with_elem(ElemTy::I32))
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let dims: Vec<u64> = out.shape.dims().unwrap_or_default();
        Tensor::i32(&dims, arg(args, 0)?.code_bytes()?.iter().map(|&c| i32::from(c)).collect())
    }
}
