//! Pooling.

use super::conv::{Window, taps};
use super::{InferCx, OpSpec, Real, elementwise};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, ElemTy, Shape, TensorTy};
use serde::{Deserialize, Serialize};

op! {
    /// One number for each place of a window that moves over the spatial axes of `[N, C, ..]`.
    ///
    /// Elements outside of `x` do not count, unless `count-margins` says that they are zeros of an average.
    "pool" => pub struct Pool (
        /// `[N, C, ..]`.
        x: One,
    ) {
        /// What is computed.
        kind: PoolKind = PoolKind::Max,
        /// Extents of the window.
        kernel: Vec<u32> = vec![],
        /// Steps along each spatial axis; none means 1.
        strides: Vec<u32> = vec![],
        /// Distances between the elements that a window sees; none means 1.
        dilations: Vec<u32> = vec![],
        /// Margins before each spatial axis; none means 0.
        before: Vec<u32> = vec![],
        /// Margins after each spatial axis; none means 0.
        after: Vec<u32> = vec![],
        /// Whether a last window that is not whole counts.
        ceil: bool = false,
        /// Whether margins count in averages.
        count_margins: bool = false,
        /// The exponent of `norm`.
        p: Real = Real(2.0),
    }
}

/// What is computed of the elements in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PoolKind {
    /// The largest number.
    Max,
    /// The flat index of the largest number in `x`, the first of equal ones.
    ArgMax,
    /// The mean.
    Mean,
    /// `(sum |x|^p)^(1/p)`.
    Norm,
}

impl Pool {
    fn windows(&self) -> Result<Vec<Window>> {
        let kernel: Vec<u64> = self.kernel.iter().map(|&k| k.into()).collect();
        Window::list(&kernel, [&self.strides, &self.dilations, &self.before, &self.after])
    }
}

impl OpSpec for Pool {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = if self.kind == PoolKind::Max || self.kind == PoolKind::ArgMax { cx.number(0)? } else { cx.real(0)? };
        let windows = self.windows()?;
        if x.rank() != windows.len() + 2 || windows.is_empty() {
            return Err(Diag::input(format!("{x} is not pooled by a window of {} axes", windows.len())));
        }
        let mut dims = x.shape.0[..2].to_vec();
        for (d, w) in x.shape.0[2..].iter().zip(windows) {
            let places = d.fixed().and_then(|n| w.places(n, self.ceil)).filter(|&p| p > 0);
            let bad = || Diag::input(format!("the window does not fit into {x}, whose spatial axes need fixed extents"));
            dims.push(Dim::Static(places.ok_or_else(bad)?));
        }
        let elem = if self.kind == PoolKind::ArgMax { ElemTy::I64 } else { x.elem };
        Ok(TensorTy { elem, shape: Shape(dims) })
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        let (xd, yd, windows) = (x.dims(), elementwise::extents(out)?, self.windows()?);
        let (space, per): (usize, usize) = (yd[2..].iter().product(), xd[2..].iter().product());
        let taps: Vec<Vec<usize>> = (0..space)
            .map(|i| taps(i, &yd[2..], &xd[2..], &windows).into_iter().map(|(i, _)| i).collect())
            .collect();
        let xs = x.reals();
        let mut y = Vec::with_capacity(yd.iter().product());
        for row in 0..yd[0] * yd[1] {
            let x = &xs[row * per..(row + 1) * per];
            for (place, taps) in taps.iter().enumerate() {
                let best = || taps.iter().copied().fold(None, |best: Option<usize>, i| match best {
                    Some(b) if !(x[i] > x[b] || x[i].is_nan()) => Some(b),
                    _ => Some(i),
                });
                y.push(match self.kind {
                    PoolKind::Max => best().map_or(f64::NEG_INFINITY, |i| x[i]),
                    PoolKind::ArgMax => best().map_or(0.0, |i| (row * per + i) as f64),
                    PoolKind::Mean => {
                        let count = if self.count_margins {
                            counted(place, &yd[2..], &xd[2..], &windows)
                        } else {
                            taps.len()
                        };
                        taps.iter().map(|&i| x[i]).sum::<f64>() / count.max(1) as f64
                    }
                    PoolKind::Norm => {
                        taps.iter().map(|&i| x[i].abs().powf(self.p.0)).sum::<f64>().powf(1.0 / self.p.0)
                    }
                });
            }
        }
        Tensor::from_reals(out, y)
    }
}

/// Number of elements of the window that lie in `x` or in its margins.
fn counted(place: usize, to: &[usize], from: &[usize], windows: &[Window]) -> usize {
    let places = super::walk::index_of(place, to);
    let one = |(axis, w): (usize, &Window)| {
        let end = from[axis] as u64 + w.before + w.after;
        let inside = |k: &u64| places[axis] as u64 * w.stride + k * w.dilation < end;
        (0..w.kernel).filter(inside).count()
    };
    windows.iter().enumerate().map(one).product()
}
