//! Layer normalization.

use super::{InferCx, OpSpec, Real, last_dim};
use crate::diag::Result;
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::TensorTy;

op! {
    /// `y = (x - mean(x)) / sqrt(var(x) + eps) * gain + bias` over the last axis; the variance divides by the count.
    "layernorm" => pub struct LayerNorm (
        /// Input.
        x: One,
        /// One factor for each index of the last axis; absent means 1.
        gain: Optional,
        /// One summand for each index of the last axis; absent means 0.
        bias: Optional,
    ) {
        /// Added to the variance.
        eps: Real = Real(1e-5),
    }
}

impl OpSpec for LayerNorm {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.float(0)?;
        let cols = last_dim(x)?;
        cx.expect_shape(1, &[cols], "the gain")?;
        cx.expect_shape(2, &[cols], "the bias")?;
        Ok(x.clone())
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        let (_, cols) = x.rows_cols();
        let gain = args[1].map(|g| g.f32s()).transpose()?;
        let bias = args[2].map(|b| b.f32s()).transpose()?;
        let at = |v: Option<&[f32]>, j: usize, default: f64| v.map_or(default, |v| f64::from(v[j]));
        let mut y = Vec::with_capacity(x.f32s()?.len());
        for row in x.f32s()?.chunks(cols.max(1)) {
            let n = cols as f64;
            let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
            let var = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
            let factor = 1.0 / (var + self.eps.0).sqrt();
            let one = |(j, &v): (usize, &f32)| {
                ((f64::from(v) - mean) * factor * at(gain, j, 1.0) + at(bias, j, 0.0)) as f32
            };
            y.extend(row.iter().enumerate().map(one));
        }
        Tensor::float(out, y)
    }
}
