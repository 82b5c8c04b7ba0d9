//! Rotary position embedding.

use super::{InferCx, OpSpec};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, TensorTy};
use serde::{Deserialize, Serialize};

op! {
    /// Rotates pairs of each head's leading elements by the angles of their token.
    ///
    /// `x` is `[t, heads, d]`, the table is `[t, size]` with `size <= d`; elements from `size` on stay. Pair `j` is
    /// `(j, j + size/2)` in style `half` and `(2j, 2j + 1)` in style `interleaved`:
    /// `(a, b) -> (a cos - b sin, b cos + a sin)`.
    "rope" => pub struct Rope (
        /// Heads to rotate.
        x: One,
        /// Cosines and sines, from `rope_table`.
        table: One,
    ) {
        /// Which elements form a pair.
        style: RopeStyle = RopeStyle::Half,
    }
}

/// Which elements of a head form a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RopeStyle {
    /// Element `j` with element `j + size/2`.
    #[default]
    Half,
    /// Element `2j` with element `2j + 1`.
    Interleaved,
}

impl OpSpec for Rope {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let (x, table) = (cx.float(0)?, cx.float(1)?);
        match (&x.shape.0[..], &table.shape.0[..]) {
            ([t, _, Dim::Static(d)], [t2, Dim::Static(size)]) if t == t2 && size <= d && size % 2 == 0 => {
                Ok(x.clone())
            }
            _ => Err(Diag::input(format!("{x} cannot be rotated by a table of type {table}"))),
        }
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (x, table) = (arg(args, 0)?, arg(args, 1)?);
        let (dims, (_, size)) = (x.dims(), table.rows_cols());
        let (heads, d, half) = (dims[1], dims[2], size / 2);
        let table = table.f32s()?;
        let mut y = x.f32s()?.to_vec();
        for (row, head) in y.chunks_mut(d.max(1)).enumerate() {
            let angles = &table[row / heads * size..][..size];
            for j in 0..half {
                let (i0, i1) = match self.style {
                    RopeStyle::Half => (j, j + half),
                    RopeStyle::Interleaved => (2 * j, 2 * j + 1),
                };
                let (a, b) = (f64::from(head[i0]), f64::from(head[i1]));
                let (cos, sin) = (f64::from(angles[j]), f64::from(angles[half + j]));
                head[i0] = (a * cos - b * sin) as f32;
                head[i1] = (b * cos + a * sin) as f32;
            }
        }
        Tensor::float(out, y)
    }
}
