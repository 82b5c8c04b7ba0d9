//! Convolution.

use super::{Binding, InferCx, OpSpec, Work, elementwise, elements};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, ElemTy, Shape, TensorTy};
use rayon::prelude::*;

op! {
    /// `y[n, o, i..] = sum_{c, k..} x[n, c, i * stride + k * dilation - before] w[o, c, k..]` for any number of spatial axes.
    ///
    /// Elements outside of `x` count as 0. With groups, the channels of `x` and the outputs are parted into as many runs,
    /// and each output sees the channels of its own run. Integer sums are exact.
    "conv" => pub struct Conv (
        /// `[N, C, ..]`.
        x: One,
        /// `[O, C / groups, ..]`, with elements of the same type.
        w: One,
    ) {
        /// Steps along each spatial axis; none means 1.
        strides: Vec<u32> = vec![],
        /// Distances between the elements that a window sees along each spatial axis; none means 1.
        dilations: Vec<u32> = vec![],
        /// Margins of zeros before each spatial axis; none means 0.
        before: Vec<u32> = vec![],
        /// Margins of zeros after each spatial axis; none means 0.
        after: Vec<u32> = vec![],
        /// Number of groups.
        groups: u32 = 1,
    }
}

/// How a window moves over one axis.
#[derive(Clone, Copy)]
pub(super) struct Window {
    pub(super) kernel: u64,
    pub(super) stride: u64,
    pub(super) dilation: u64,
    pub(super) before: u64,
    pub(super) after: u64,
}

impl Window {
    /// The windows over axes with kernels of these extents; lists without entries mean the default for every axis.
    pub(super) fn list(
        kernel: &[u64],
        [strides, dilations, before, after]: [&[u32]; 4],
    ) -> Result<Vec<Window>> {
        for list in [strides, dilations, before, after] {
            if !list.is_empty() && list.len() != kernel.len() {
                let (n, got) = (kernel.len(), list.len());
                return Err(Diag::input(format!("{got} numbers are given for {n} spatial axes")));
            }
        }
        let of = |list: &[u32], i: usize, default: u64| list.get(i).map_or(default, |&n| n.into());
        let one = |(i, &kernel): (usize, &u64)| {
            let w = Window {
                kernel,
                stride: of(strides, i, 1),
                dilation: of(dilations, i, 1),
                before: of(before, i, 0),
                after: of(after, i, 0),
            };
            if w.stride == 0 || w.dilation == 0 || w.kernel == 0 || w.kernel > u32::MAX.into() {
                return Err(Diag::input("a kernel, stride or dilation of 0 or too large"));
            }
            Ok(w)
        };
        kernel.iter().enumerate().map(one).collect()
    }

    /// Elements from the first to the last that the window sees.
    pub(super) fn reach(self) -> u64 {
        (self.kernel - 1) * self.dilation + 1
    }

    /// Number of places of the window over an axis of extent `n`; `ceil` counts a last one that is not whole, if it
    /// begins inside of the axis or before it.
    pub(super) fn places(self, n: u64, ceil: bool) -> Option<u64> {
        let room = n.checked_add(self.before + self.after)?.checked_sub(self.reach())?;
        let places = if ceil { room.div_ceil(self.stride) } else { room / self.stride } + 1;
        let late = ceil && (places - 1) * self.stride >= n + self.before;
        Some(places - u64::from(late))
    }

    /// The element that the window at `place` sees at `k`, if it lies inside.
    pub(super) fn at(self, place: usize, k: usize, n: usize) -> Option<usize> {
        let at = place as u64 * self.stride + k as u64 * self.dilation;
        at.checked_sub(self.before).map(|i| i as usize).filter(|&i| i < n)
    }
}

impl Conv {
    fn windows(&self, kernel: &[u64]) -> Result<Vec<Window>> {
        Window::list(kernel, [&self.strides, &self.dilations, &self.before, &self.after])
    }
}

impl OpSpec for Conv {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let (x, w) = (cx.number(0)?, cx.number(1)?);
        let bad = |why: &str| Diag::input(format!("{x} is not convolved with {w}: {why}"));
        let ([n, Dim::Static(channels), space @ ..], Some(wd)) = (&x.shape.0[..], w.shape.dims()) else {
            return Err(bad("the channels and the weights need fixed extents"));
        };
        let groups = u64::from(self.groups);
        if x.rank() != w.rank() || x.rank() < 3 || x.elem != w.elem || x.elem == ElemTy::BOOL {
            return Err(bad("ranks or elements differ"));
        }
        if groups == 0 || channels % groups != 0 || channels / groups != wd[1] || wd[0] % groups != 0 {
            return Err(bad(&format!("channels do not part into {groups} groups")));
        }
        let windows = self.windows(&wd[2..])?;
        let mut dims = vec![*n, Dim::Static(wd[0])];
        for (d, w) in space.iter().zip(windows) {
            let n = d.fixed().ok_or_else(|| bad("spatial axes need fixed extents"))?;
            dims.push(Dim::Static(w.places(n, false).ok_or_else(|| bad("the window is larger than the tensor"))?));
        }
        Ok(TensorTy { elem: x.elem, shape: Shape(dims) })
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (x, w) = (arg(args, 0)?, arg(args, 1)?);
        let (xd, wd, yd) = (x.dims(), w.dims(), elementwise::extents(out)?);
        let kernel: Vec<u64> = wd[2..].iter().map(|&k| k as u64).collect();
        let windows = self.windows(&kernel)?;
        // Where each place of the result reads, and with which weight.
        let (space, per_out): (usize, usize) = (yd[2..].iter().product(), xd[2..].iter().product());
        let taps: Vec<Vec<(usize, usize)>> = (0..space).map(|i| taps(i, &yd[2..], &xd[2..], &windows)).collect();
        let (xs, ws) = (x.reals(), w.reals());
        let (channels, outs, each) = (xd[1], wd[0], wd[1]);
        let per_kernel: usize = wd[2..].iter().product();
        let mut y = vec![0f64; yd.iter().product()];
        y.par_chunks_mut(space.max(1)).enumerate().for_each(|(row, y)| {
            let (n, o) = (row / outs, row % outs);
            let first = o / (outs / self.groups as usize) * each;
            for (sum, taps) in y.iter_mut().zip(&taps) {
                for c in 0..each {
                    let x = &xs[(n * channels + first + c) * per_out..];
                    let w = &ws[(o * each + c) * per_kernel..];
                    *sum += taps.iter().map(|&(i, k)| x[i] * w[k]).sum::<f64>();
                }
            }
        });
        Tensor::from_reals(out, y)
    }

    fn cost(&self, args: &[Option<&TensorTy>], out: &TensorTy, bind: Binding<'_>) -> Work {
        let n = elements(out, bind);
        let weights = args.get(1).copied().flatten().map_or(1, |w| elements(w, bind));
        let outs = out.shape.0.get(1).and_then(|d| d.fixed()).unwrap_or(1).max(1);
        Work { macs: n.saturating_mul(weights / outs), elements: n }
    }
}

/// The elements that the windows at flat place `place` of extents `to` see in extents `from`: their flat places and those
/// in the kernel.
pub(super) fn taps(place: usize, to: &[usize], from: &[usize], windows: &[Window]) -> Vec<(usize, usize)> {
    let places = super::walk::index_of(place, to);
    let mut taps = vec![(0, 0)];
    for (axis, w) in windows.iter().enumerate() {
        let n = from[axis];
        let seen: Vec<(usize, usize)> =
            (0..w.kernel as usize).filter_map(|k| Some((w.at(places[axis], k, n)?, k))).collect();
        let next = |&(at, kernel): &(usize, usize)| {
            seen.iter().map(move |&(i, k)| (at * n + i, kernel * w.kernel as usize + k))
        };
        taps = taps.iter().flat_map(next).collect();
    }
    taps
}
