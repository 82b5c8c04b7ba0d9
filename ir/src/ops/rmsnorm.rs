//! Root-mean-square normalization.

use super::{InferCx, OpSpec, Real, last_dim};
use crate::diag::Result;
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::TensorTy;

op! {
    /// `y = x / sqrt(mean(x^2) + eps) * gain` over the last axis.
    "rmsnorm" => pub struct RmsNorm (
        /// Input.
        x: One,
        /// One factor for each index of the last axis; absent means 1.
        gain: Optional,
    ) {
        /// Added to the mean square.
        eps: Real = Real(1e-6),
    }
}

impl OpSpec for RmsNorm {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.float(0)?;
        cx.expect_shape(1, &[last_dim(x)?], "the gain")?;
        Ok(x.clone())
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        let (_, cols) = x.rows_cols();
        let gain = args[1].map(|g| g.f32s()).transpose()?;
        let mut y = Vec::with_capacity(x.f32s()?.len());
        for row in x.f32s()?.chunks(cols.max(1)) {
            let mean = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / cols as f64;
            let factor = 1.0 / (mean + self.eps.0).sqrt();
            let at = |j: usize| gain.map_or(1.0, |g| f64::from(g[j]));
            y.extend(row.iter().enumerate().map(|(j, &v)| (f64::from(v) * factor * at(j)) as f32));
        }
        Tensor::float(out, y)
    }
}
