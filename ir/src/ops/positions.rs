//! Positions of this call's tokens.

use super::{InferCx, OpSpec};
use crate::diag::Result;
use crate::eval::{EvalCx, Tensor};
use crate::ty::{Dim, ElemTy, TensorTy};

op! {
    /// The position of each token of this call in its sequence, counted from 0.
    "positions" => pub struct Positions () {}
}

impl OpSpec for Positions {
    fn infer(&self, _: &InferCx<'_>) -> Result<TensorTy> {
        Ok(TensorTy::new(ElemTy::I32, [Dim::Sym('t')]))
    }
    fn eval(&self, cx: &mut EvalCx<'_>, _: &[Option<&Tensor>], _: &TensorTy) -> Result<Tensor> {
        Tensor::i32(&[cx.tokens], (0..cx.tokens).map(|i| (cx.past + i) as i32).collect())
    }
}
