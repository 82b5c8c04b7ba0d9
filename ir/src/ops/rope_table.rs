//! Angles of rotary position embeddings.

use super::{InferCx, OpSpec, Real};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, ElemTy, TensorTy};
use serde::{Deserialize, Serialize};

op! {
    /// Cosines and sines of the rotary angles: row `i` is `cos(a)` then `sin(a)` with `a[j] = position[i] * f[j]`.
    ///
    /// `f[j] = theta^(-2j/size)`, changed by `scaling`. Frequencies and angles are rounded to f32, as checkpoints expect.
    "rope_table" => pub struct RopeTable (
        /// Position of each token.
        positions: One,
    ) {
        /// Rotated elements of a head; half of it is the number of angles.
        size: u32 = 0,
        /// Base of the frequencies.
        theta: Real = Real(10000.0),
        /// How a longer context stretches the frequencies.
        scaling: RopeScaling = RopeScaling::None,
    }
}

/// How frequencies are stretched for contexts longer than the model was first trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// Every frequency is divided by `factor`.
    Linear {
        /// The divisor.
        factor: Real,
    },
    /// Llama 3: waves shorter than `original / high` stay, longer than `original / low` are divided, between is blended.
    Llama3 {
        /// The divisor of long waves.
        factor: Real,
        /// Bounds the divided waves.
        low: Real,
        /// Bounds the waves that stay.
        high: Real,
        /// Context the model was first trained on.
        original: u32,
    },
}

impl RopeTable {
    /// The frequencies, `size / 2` of them.
    pub fn frequencies(&self) -> Vec<f32> {
        let scaled = |f: f64| match self.scaling {
            RopeScaling::None => f,
            RopeScaling::Linear { factor } => f / factor.0,
            RopeScaling::Llama3 { factor, low, high, original } => {
                let waves = f64::from(original) * f / std::f64::consts::TAU;
                let keep = ((waves - low.0) / (high.0 - low.0)).clamp(0.0, 1.0);
                f * keep + f / factor.0 * (1.0 - keep)
            }
        };
        let base = |j: u32| self.theta.0.powf(-2.0 * f64::from(j) / f64::from(self.size));
        (0..self.size / 2).map(|j| scaled(base(j)) as f32).collect()
    }
}

impl OpSpec for RopeTable {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let positions = cx.ints(0)?;
        if self.size == 0 || !self.size.is_multiple_of(2) || self.size > 1 << 16 {
            return Err(Diag::input(format!("size {} is not a positive even number", self.size)));
        }
        if self.theta.0.is_nan() || self.theta.0 <= 0.0 {
            return Err(Diag::input(format!("theta {} is not positive", self.theta.0)));
        }
        let mut ty = positions.with_elem(ElemTy::F32);
        ty.shape.0.push(Dim::Static(u64::from(self.size)));
        Ok(ty)
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let frequencies = self.frequencies();
        let mut y = vec![];
        for &p in arg(args, 0)?.i32s()? {
            let angle = |f: &f32| f64::from(p as f32 * f);
            y.extend(frequencies.iter().map(|f| angle(f).cos() as f32));
            y.extend(frequencies.iter().map(|f| angle(f).sin() as f32));
        }
        Tensor::float(out, y)
    }
}
