//! Sums over any interval of a histogram, from prefix sums.

use super::{END, Histogram, SIDE, lower_edge};
use std::ops::{Add, Sub};

/// The buckets of a histogram in order, taken to hold their numbers spread evenly.
///
/// Prefix sums go outward from 0 on each side, so that numbers near 0 are not lost beside large ones.
pub(super) struct Axis {
    negative: Side,
    positive: Side,
}

/// Buckets of one sign, as magnitudes.
pub(super) struct Side {
    bins: Vec<Bin>,
    /// For each bin, the sums over all below it; and over all.
    below: Vec<Sums>,
}

/// An occupied bucket.
#[derive(Clone, Copy)]
pub(super) struct Bin {
    lo: f64,
    /// Where the bucket ends, or the largest number seen where that is less.
    pub hi: f64,
    all: Sums,
}

/// Sums over the numbers of an interval.
#[derive(Clone, Copy, Default)]
pub(super) struct Sums {
    /// How many.
    pub n: f64,
    /// Of the numbers.
    pub x: f64,
    /// Of their squares.
    pub xx: f64,
    /// Of the logarithm of the density: `sum n ln(n / width)`.
    pub info: f64,
    /// Of the widths of occupied buckets.
    pub width: f64,
}

impl Axis {
    /// Positive and negative numbers. What lies below bucket `core` is spread evenly from there to 0, and is 0 where
    /// `core` is 1.
    pub fn signed(h: &Histogram, core: usize) -> Axis {
        let (min, max) = (f64::from(h.extremes.min), f64::from(h.extremes.max));
        Axis {
            negative: Side::new(|at| h.counts[SIDE + at], -max, -min, core),
            positive: Side::new(|at| h.counts[at], min, max, core),
        }
    }

    /// Magnitudes, as positive numbers.
    pub fn magnitudes(h: &Histogram, core: usize) -> Axis {
        let (min, max) = (f64::from(h.extremes.min), f64::from(h.extremes.max));
        let absmax = f64::from(h.extremes.absmax());
        Axis {
            negative: Side::new(|_| 0, 0.0, 0.0, core),
            positive: Side::new(|at| h.magnitudes(at), min.max(-max), absmax, core),
        }
    }

    pub fn negative(&self) -> &Side {
        &self.negative
    }

    pub fn positive(&self) -> &Side {
        &self.positive
    }

    /// The sums over the numbers from `a` to `b`, where `a <= b`; either may be infinite. Zeros count at an end too.
    pub fn between(&self, a: f64, b: f64) -> Sums {
        let mut sums = Sums::default();
        if b >= 0.0 {
            sums = self.positive.between(a, b);
        }
        if a <= 0.0 {
            let mirrored = self.negative.between(-b, -a);
            sums = sums + Sums { x: -mirrored.x, ..mirrored };
        }
        sums
    }
}

impl Side {
    /// The buckets with these counts, whose magnitudes lie from `least` to `largest`.
    fn new(count: impl Fn(usize) -> u64, least: f64, largest: f64, core: usize) -> Side {
        let mut side = Side { bins: vec![], below: vec![Sums::default()] };
        let edge = if core > 1 { f64::from(lower_edge(core)).min(largest) } else { 0.0 };
        side.push((0..core).map(&count).sum(), 0.0, edge, edge);
        for at in core..END {
            let (lo, hi) = (f64::from(lower_edge(at)), f64::from(lower_edge(at + 1)));
            side.push(count(at), lo.max(least), hi.min(largest), hi - lo);
        }
        side
    }

    /// Adds a bin, if there is anything in it.
    fn push(&mut self, n: u64, lo: f64, hi: f64, width: f64) {
        if n == 0 {
            return;
        }
        let n = n as f64;
        let mean = 0.5 * (lo + hi);
        let xx = n * (mean * mean + (hi - lo) * (hi - lo) / 12.0);
        let all = Sums { n, x: n * mean, xx, info: n_log(n, width), width };
        self.below.push(self.below[self.bins.len()] + all);
        self.bins.push(Bin { lo, hi, all });
    }

    pub fn bins(&self) -> &[Bin] {
        &self.bins
    }

    /// How many numbers lie in the bin `at` and those below it.
    pub fn n_up_to(&self, at: usize) -> f64 {
        self.below[at + 1].n
    }

    /// The sums over magnitudes from `a` to `b`, where `b >= 0`.
    fn between(&self, a: f64, b: f64) -> Sums {
        let upper = self.up_to(b);
        if a <= 0.0 { upper } else { upper - self.up_to(a) }
    }

    fn up_to(&self, x: f64) -> Sums {
        // The first bin that does not lie below altogether.
        let at = self.bins.partition_point(|bin| bin.hi <= x);
        let Some(bin) = self.bins.get(at).filter(|bin| bin.lo < x) else { return self.below[at] };
        let share = (x - bin.lo) / (bin.hi - bin.lo);
        let width = x - bin.lo;
        let mean = 0.5 * (bin.lo + x);
        let n = share * bin.all.n;
        let part = Sums {
            n,
            x: n * mean,
            xx: n * (mean * mean + width * width / 12.0),
            info: share * bin.all.info,
            width: share * bin.all.width,
        };
        self.below[at] + part
    }
}

/// `n ln(n / width)`, which is 0 for no numbers.
pub(super) fn n_log(n: f64, width: f64) -> f64 {
    if n > 0.0 { n * libm::log(n / width) } else { 0.0 }
}

impl Add for Sums {
    type Output = Sums;
    fn add(self, b: Sums) -> Sums {
        Sums {
            n: self.n + b.n,
            x: self.x + b.x,
            xx: self.xx + b.xx,
            info: self.info + b.info,
            width: self.width + b.width,
        }
    }
}

impl Sub for Sums {
    type Output = Sums;
    fn sub(self, b: Sums) -> Sums {
        Sums {
            n: self.n - b.n,
            x: self.x - b.x,
            xx: self.xx - b.xx,
            info: self.info - b.info,
            width: self.width - b.width,
        }
    }
}
