//! Appending to a state.

use super::{InferCx, OpSpec};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, TensorTy};

op! {
    /// Writes the rows of this call's tokens into a state and yields all rows it then holds.
    ///
    /// The state is `[context, ..]`, `x` is `[t, ..]`, the result is `[s, ..]` with `s` the tokens seen so far.
    "cache_append" => pub struct CacheAppend (
        /// The state.
        state: One,
        /// New rows.
        x: One,
    ) {}
}

impl OpSpec for CacheAppend {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let (state, x) = (cx.arg(0)?, cx.arg(1)?);
        if state.elem != x.elem {
            return Err(Diag::input(format!("the state has type {state}, the rows have type {x}"))
                .help("put a `cast` or `quantize` in front of the rows"));
        }
        if state.rank() == 0 || x.rank() == 0 || state.shape.0[1..] != x.shape.0[1..] {
            return Err(Diag::input(format!("rows of type {x} do not fit a state of type {state}")));
        }
        let mut ty = state.clone();
        ty.shape.0[0] = Dim::Sym('s');
        Ok(ty)
    }
    fn eval(&self, cx: &mut EvalCx<'_>, args: &[Option<&Tensor>], _: &TensorTy) -> Result<Tensor> {
        cx.append(0, arg(args, 1)?)
    }
    fn has_effect(&self) -> bool {
        true
    }
}
