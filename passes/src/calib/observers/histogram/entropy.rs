//! The range that keeps most of the information.
//!
//! What quantized numbers tell of the distribution is how many have each code: within the interval of a code they may
//! as well be spread evenly over the buckets that are occupied, and what saturates counts in the outermost intervals.
//! With `c_b` numbers in a bucket of width `w_b`, `C_k` in interval `k`, `W_k` the occupied width of it, `N` numbers of
//! which `M` are inside of the range, and `o` outside next to an outermost interval, let `P` be the distribution with
//! the numbers outside moved into the outermost intervals, and `Q` that of the numbers inside as their codes tell it.
//! The relative entropy is
//!
//! ```text
//! N KL(P || Q) = sum_b c_b ln(c_b / w_b) - sum_k C_k ln(C_k / W_k)     lost within intervals
//!              + N ln(M / N) + sum_ends (C + o) ln((C + o) / C)          lost by saturation
//! ```
//!
//! which is one look at the prefix sums for each interval. The range with the least of it, among those that end at the
//! edges of buckets, is taken. This is the search that is known from 8-bit calibration with histograms of equal bins,
//! on bins that are as fine near 0 as far out: an outlier does not make them coarse.
//!
//! Zeros are left out: every range has them exactly. And what is below a 16th of the median magnitude is one bucket:
//! the finest buckets are for telling ranges apart, not for what is all but 0.

use super::axis::{Axis, Side, n_log};
use super::{DROPPED, END, Histogram, SIDE};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::quant::Span;
use quantc_ir::scheme::{Scheme, Zero};

/// The range for an integer scheme.
pub(super) fn span(h: &Histogram, scheme: &Scheme) -> Result<Span> {
    let format = scheme.format;
    if !format.is_int() {
        return Err(Diag::pipeline(format!("`entropy` takes equal steps, which {format} has not"))
            .help("use `mse` or `percentile:99.9`"));
    }
    let (qmin, qmax) = format.int_range();
    let h = without_zeros(h);
    Ok(match scheme.zero {
        Zero::Symmetric => symmetric(&h, qmax as u32 + 1),
        Zero::Point(_) => asymmetric(&h, (qmax - qmin + 1) as u32),
    })
}

pub(super) fn without_zeros(h: &Histogram) -> Histogram {
    let mut h = h.clone();
    h.n -= h.magnitudes(0);
    h.counts[0] = 0;
    h.counts[SIDE] = 0;
    h
}

/// The bucket of a 16th of the median magnitude.
pub(super) fn core(h: &Histogram) -> usize {
    let mut left = h.n / 2;
    let median = (0..END).find(|&at| {
        let n = h.magnitudes(at);
        left.checked_sub(n).map(|less| left = less).is_none()
    });
    // An exponent that is less by 4.
    median.unwrap_or(1).saturating_sub(4 << (23 - DROPPED)).max(1)
}

/// The range whose magnitudes `levels` equally spaced numbers from 0 on are to cover.
fn symmetric(h: &Histogram, levels: u32) -> Span {
    let axis = Axis::magnitudes(h, core(h));
    let whole = f64::from(h.extremes.absmax());
    let reach = best(axis.positive(), whole, |reach| divergence(&axis, h.n as f64, 0.0, reach, levels));
    Span::symmetric(reach as f32)
}

/// The range that `levels` equally spaced numbers are to cover, 0 among them. The ends are found in turns.
fn asymmetric(h: &Histogram, levels: u32) -> Span {
    let axis = Axis::signed(h, core(h));
    let n = h.n as f64;
    let (whole_lo, whole_hi) = (f64::from(h.extremes.span().min()), f64::from(h.extremes.span().max()));
    let (mut lo, mut hi) = (whole_lo, whole_hi);
    for _ in 0..2 {
        hi = best(axis.positive(), whole_hi, |hi| divergence(&axis, n, lo, hi, levels));
        lo = -best(axis.negative(), -whole_lo, |reach| divergence(&axis, n, -reach, hi, levels));
    }
    Span::new(lo as f32, hi as f32)
}

/// The end of a bin with the least cost, among those that leave at least half of the side's numbers inside; of equal
/// ones the last.
fn best(side: &Side, whole: f64, cost: impl Fn(f64) -> f64) -> f64 {
    let Some(last) = side.bins().len().checked_sub(1) else { return whole };
    let half = 0.5 * side.n_up_to(last);
    let candidates = (0..=last).rev().take_while(|&at| side.n_up_to(at) >= half);
    let costs = candidates.map(|at| (cost(side.bins()[at].hi), side.bins()[at].hi));
    costs.reduce(|best, next| if next.0 < best.0 { next } else { best }).map_or(whole, |best| best.1)
}

/// `N KL(P || Q)` for `levels` equally spaced numbers from `lo <= 0` to `hi >= 0`, shifted so that 0 is one of them.
pub(super) fn divergence(axis: &Axis, n: f64, lo: f64, hi: f64, levels: u32) -> f64 {
    let step = (hi - lo) / f64::from(levels - 1);
    if step <= 0.0 {
        return f64::INFINITY;
    }
    let zero = (-lo / step).round();
    let inside = axis.between(lo, hi);
    let mut lost = inside.info;
    let (mut first, mut last) = (None, 0.0);
    let mut from = lo;
    for k in 0..levels {
        let to = if k + 1 == levels { hi } else { ((f64::from(k) - zero + 0.5) * step).min(hi) };
        if to <= from {
            continue;
        }
        let sums = axis.between(from, to);
        lost -= n_log(sums.n, sums.width);
        first.get_or_insert(sums.n);
        last = sums.n;
        from = to;
    }
    let saturated = |outermost: f64, outside: f64| {
        if outside > 0.0 { n_log(outermost + outside, outermost) } else { 0.0 }
    };
    let above = axis.between(hi, f64::INFINITY).n;
    let below = axis.between(f64::NEG_INFINITY, lo).n;
    lost + n * libm::log(inside.n / n) + saturated(last, above) + saturated(first.unwrap_or(0.0), below)
}
