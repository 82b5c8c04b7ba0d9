//! A histogram by the bits of numbers: percentiles, and searches for the range that is best.

mod axis;
mod entropy;
mod mse;
mod percentile;

use super::bytes::{Reader, count, write_extremes};
use super::rows::Extremes;
use super::{Method, Observer, Rows, whole};
use axis::Axis;
use quantc_ir::diag::Result;
use quantc_ir::quant::Span;
use quantc_ir::scheme::Scheme;

/// How many numbers have each upper half of a single: sign, exponent, and 8 bits of the fraction. 1 MiB.
///
/// A bucket is between 0.2 % and 0.4 % of its numbers wide, whatever their magnitude (below `1e-38` it is `1e-40`
/// wide). Nothing has to be known of the data, and counters merge exactly. The extremes are kept beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    n: u64,
    extremes: Extremes,
    counts: Box<[u64; BUCKETS]>,
}

/// Bits of a single that do not tell its bucket.
const DROPPED: u32 = 15;
/// Buckets of both signs.
const BUCKETS: usize = 1 << (32 - DROPPED);
/// Buckets of one sign: a number's bucket is that of its magnitude, and this much higher when it is negative.
const SIDE: usize = BUCKETS / 2;
/// One above the last bucket of finite magnitudes.
const END: usize = (f32::MAX.to_bits() >> DROPPED) as usize + 1;

impl Histogram {
    /// How many numbers have a magnitude in bucket `at`.
    fn magnitudes(&self, at: usize) -> u64 {
        self.counts[at] + self.counts[SIDE + at]
    }
}

/// The least magnitude in a bucket of one sign; for [`END`], the largest finite number.
fn lower_edge(at: usize) -> f32 {
    f32::from_bits(((at as u32) << DROPPED).min(f32::MAX.to_bits()))
}

impl Observer for Histogram {
    const NAME: &'static str = "histogram";
    const DOC: &'static str = "How many numbers lie where, to about 0.3 %: for percentiles, entropy and mse.";

    fn new(_: usize) -> Result<Histogram> {
        let counts: Result<Box<[u64; BUCKETS]>, _> = vec![0; BUCKETS].try_into();
        let counts = counts.unwrap_or_else(|_| unreachable!("the list has as many"));
        Ok(Histogram { n: 0, extremes: Extremes::NONE, counts })
    }

    fn see(&mut self, rows: &Rows<'_>) -> Result<()> {
        self.n = count(self.n, rows.data().len() as u64)?;
        self.extremes.add(rows.extremes());
        for x in rows.data() {
            self.counts[(x.to_bits() >> DROPPED) as usize] += 1;
        }
        Ok(())
    }

    fn merge(&mut self, other: &Histogram) -> Result<()> {
        self.n = count(self.n, other.n)?;
        self.extremes.add(other.extremes);
        self.counts.iter_mut().zip(other.counts.iter()).for_each(|(a, b)| *a += b);
        Ok(())
    }

    /// The number of numbers, the extremes, and each occupied bucket with its count.
    fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.n.to_le_bytes().to_vec();
        write_extremes(self.extremes, &mut out);
        for (at, count) in self.counts.iter().enumerate().filter(|(_, c)| **c > 0) {
            out.extend((at as u32).to_le_bytes());
            out.extend(count.to_le_bytes());
        }
        out
    }

    fn from_bytes(bytes: &[u8]) -> Result<Histogram> {
        let mut input = Reader::new(bytes);
        let n = input.u64()?;
        let mut histogram = Histogram { n, extremes: input.extremes(n)?, ..Histogram::new(1)? };
        let (mut last, mut sum) = (None, 0u64);
        // The extremes of the buckets; zeros of both signs are one number.
        let mut least = (f32::INFINITY, f32::INFINITY);
        let mut largest = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        while !input.is_empty() {
            let (at, count) = (input.u32()? as usize, input.u64()?);
            if last.is_some_and(|last| last >= at) || at % SIDE >= END || at >= BUCKETS || count == 0 {
                return Err(input.refuse("its buckets are none, or not in order"));
            }
            last = Some(at);
            sum = sum.checked_add(count).ok_or_else(|| input.refuse("its counts are too large"))?;
            histogram.counts[at] = count;
            let bits = ((at % SIDE) as u32) << DROPPED;
            let (from, to) = (f32::from_bits(bits), f32::from_bits(bits | ((1 << DROPPED) - 1)));
            let (from, to) = if at < SIDE { (from, to) } else { (-to, -from) };
            if from < least.0 {
                least = (from, to);
            }
            if to > largest.1 {
                largest = (from, to);
            }
        }
        let within = |x: f32, bucket: (f32, f32)| (bucket.0..=bucket.1).contains(&x);
        let Extremes { min, max } = histogram.extremes;
        if sum != n || n > 0 && !(within(min, least) && within(max, largest)) {
            return Err(input.refuse("its buckets do not fit its range and its number of numbers"));
        }
        Ok(histogram)
    }

    fn memory(&self) -> usize {
        size_of::<Self>() + size_of::<[u64; BUCKETS]>()
    }

    fn n_seen(&self) -> u64 {
        self.n
    }

    fn span(&self, method: Method, scheme: &Scheme) -> Result<Option<Span>> {
        Ok(Some(match method {
            Method::Whole => whole(self.extremes, scheme),
            Method::Percentile { ppm } => percentile::span(self, ppm, scheme.zero),
            Method::Entropy => entropy::span(self, scheme)?,
            Method::Mse => mse::span(self, scheme)?,
            Method::Moments { .. } | Method::MovingAverage { .. } => return Ok(None),
        }))
    }

    /// Within the buckets at the ends of `span` numbers are taken to be spread evenly. 0 when nothing was seen.
    fn outside(&self, span: Span) -> Option<f64> {
        let all = self.n.max(1) as f64;
        let axis = Axis::signed(self, 1);
        let inside = axis.between(f64::from(span.min()), f64::from(span.max())).n;
        Some(((self.n as f64 - inside) / all).clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests;
