//! Rows of a table.

use super::{InferCx, OpSpec};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Float, TensorTy};

op! {
    /// `y[i] = table[ids[i]]`.
    "embedding" => pub struct Embedding (
        /// Row numbers.
        ids: One,
        /// One row for each number.
        table: One,
    ) {
        /// Result element type.
        to: Float = Float::F32,
    }
}

impl OpSpec for Embedding {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let (ids, table) = (cx.ints(0)?, cx.float(1)?);
        let (_, width) =
            table.matrix().ok_or_else(|| Diag::input(format!("the table has type {table}, not a matrix")))?;
        let mut ty = ids.with_elem(self.to);
        ty.shape.0.push(width);
        Ok(ty)
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (ids, table) = (arg(args, 0)?, arg(args, 1)?);
        let (rows, width) = table.rows_cols();
        let data = table.f32s()?;
        let mut y = vec![];
        for &id in ids.i32s()? {
            let row = usize::try_from(id).ok().filter(|&r| r < rows);
            let row = row.ok_or_else(|| Diag::input(format!("row {id} of a table of {rows} rows")))?;
            y.extend_from_slice(&data[row * width..][..width]);
        }
        Tensor::float(out, y)
    }
}
