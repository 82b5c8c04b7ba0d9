//! The rows that logits are wanted for.

use super::{InferCx, OpSpec};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, TensorTy};

op! {
    /// The last `r` rows of `x`, where `r` is the number of rows wanted of this call.
    "last_rows" => pub struct LastRows (
        /// One row per token.
        x: One,
    ) {}
}

impl OpSpec for LastRows {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let mut ty = cx.float(0)?.clone();
        match ty.shape.0.first_mut() {
            Some(rows) => *rows = Dim::Sym('r'),
            None => return Err(Diag::input(format!("{ty} has no rows"))),
        }
        Ok(ty)
    }
    fn eval(&self, cx: &mut EvalCx<'_>, args: &[Option<&Tensor>], _: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        let (rows, wanted) = (x.dims()[0], cx.symbol('r') as usize);
        let from =
            rows.checked_sub(wanted).ok_or_else(|| Diag::bug("more rows wanted than there are tokens"))?;
        x.slice_rows(from, wanted)
    }
}
