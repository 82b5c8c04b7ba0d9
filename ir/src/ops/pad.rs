//! Margins around a tensor.

use super::walk::strides;
use super::{InferCx, OpSpec, elementwise};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, TensorTy};
use serde::{Deserialize, Serialize};

op! {
    /// The tensor with margins before and after each axis; negative margins cut off.
    "pad" => pub struct Pad (
        /// Input.
        x: One,
        /// What constant margins hold, one number; absent means 0.
        value: Optional,
    ) {
        /// Elements put before each axis.
        before: Vec<i64> = vec![],
        /// Elements put after each axis.
        after: Vec<i64> = vec![],
        /// What the margins hold.
        mode: PadMode = PadMode::Constant,
    }
}

/// What margins hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PadMode {
    /// One number.
    Constant,
    /// The tensor mirrored at its outermost elements.
    Reflect,
    /// The outermost elements.
    Edge,
    /// The tensor repeated.
    Wrap,
}

impl OpSpec for Pad {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.movable(0)?;
        if self.before.len() != x.rank() || self.after.len() != x.rank() {
            return Err(Diag::input(format!("{x} needs {} margins before and after", x.rank())));
        }
        if let Some(value) = cx.opt(1)
            && (value.elem != x.elem || value.shape.elements() != Some(1))
        {
            return Err(Diag::input(format!("margins of {x} are filled with one {}, not {value}", x.elem)));
        }
        let mut ty = x.clone();
        for (axis, (&before, &after)) in self.before.iter().zip(&self.after).enumerate() {
            if (before, after) == (0, 0) {
                continue;
            }
            let bad = || Diag::input(format!("axis {axis} of {x} does not take margins {before} and {after}"));
            let n = x.shape.0[axis].fixed().ok_or_else(bad)?;
            let inside = n.checked_add_signed(before.min(0)).and_then(|n| n.checked_add_signed(after.min(0)));
            let inside = inside.ok_or_else(bad)?;
            // There must be something to repeat; mirroring does not repeat the outermost element.
            let least = match self.mode {
                PadMode::Constant => 0,
                PadMode::Edge | PadMode::Wrap | PadMode::Reflect => 1,
            };
            if before.max(after) > 0 && inside < least {
                return Err(bad());
            }
            let whole = inside.checked_add_signed(before.max(0)).and_then(|n| n.checked_add_signed(after.max(0)));
            ty.shape.0[axis] = Dim::Static(whole.ok_or_else(bad)?);
        }
        Ok(ty)
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        let (dims, to, steps) = (x.dims(), elementwise::extents(out)?, strides(&x.dims()));
        // For each axis, where the elements of the result come from.
        let maps: Vec<Vec<Option<usize>>> = (0..dims.len()).map(|a| self.map(a, dims[a], to[a])).collect();
        let margin = x.data.len();
        let mut from = vec![0usize];
        for (axis, map) in maps.iter().enumerate() {
            let next = |&base: &usize| {
                let step = steps[axis];
                map.iter().map(move |m| match m {
                    Some(i) if base != margin => base + i * step,
                    _ => margin,
                })
            };
            from = from.iter().flat_map(next).collect();
        }
        let mut data = x.data.clone();
        match args.get(1).copied().flatten() {
            Some(value) => data.append(value.data.clone())?,
            None => {
                let scalar = TensorTy::fixed(x.ty.elem, &[]);
                data.append(Tensor::from_reals(&scalar, vec![0.0])?.data)?;
            }
        }
        Tensor::new(out, data.take(from.into_iter()))
    }
}

impl Pad {
    fn map(&self, axis: usize, n: usize, to: usize) -> Vec<Option<usize>> {
        // What is cut off is not mirrored either.
        let (first, last) = (-self.before[axis].min(0), n as i64 + self.after[axis].min(0));
        let inside = last - first;
        let one = |i: i64| {
            let i = i - self.before[axis].max(0);
            let i = match self.mode {
                PadMode::Constant => Some(i).filter(|i| (0..inside).contains(i)),
                PadMode::Edge => Some(i.clamp(0, inside - 1)),
                PadMode::Wrap => Some(i.rem_euclid(inside)),
                PadMode::Reflect if inside == 1 => Some(0),
                PadMode::Reflect => {
                    let period = 2 * (inside - 1);
                    let i = i.rem_euclid(period);
                    Some(if i < inside { i } else { period - i })
                }
            };
            i.map(|i| (first + i) as usize)
        };
        (0..to as i64).map(one).collect()
    }
}
