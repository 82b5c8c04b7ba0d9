//! Mean and standard deviation of an activation.

use super::bytes::{Reader, count, write_extremes};
use super::exact::{Sum, SumOfSquares, shift_of};
use super::rows::Extremes;
use super::{Method, Observer, Rows, whole};
use quantc_ir::diag::Result;
use quantc_ir::quant::Span;
use quantc_ir::scheme::Scheme;

/// Exact sums of the numbers and of their squares, and the extremes. 200 bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    n: u64,
    extremes: Extremes,
    positive: Sum,
    negative: Sum,
    squares: SumOfSquares,
}

impl Moments {
    /// The mean; 0 when nothing was seen. It is as exact as doubles are.
    pub fn mean(&self) -> f64 {
        let sum = if self.negative.above(&self.positive) {
            -self.negative.less(&self.positive).to_f64()
        } else {
            self.positive.less(&self.negative).to_f64()
        };
        sum / self.n.max(1) as f64
    }

    /// The standard deviation `sqrt(E[x^2] - E[x]^2)`. The sums are exact, so that what cancels costs about
    /// `1e-8 |mean|`, less than the distance of singles at the mean.
    pub fn deviation(&self) -> f64 {
        let mean = self.mean();
        let mean_square = self.squares.to_f64() / self.n.max(1) as f64;
        (mean_square - mean * mean).max(0.0).sqrt()
    }

    /// Adds the numbers to the sums. Numbers of the same exponent are added as integers; what that gives for each
    /// exponent is added to the sums once per block.
    fn add(&mut self, xs: &[f32]) {
        /// Mantissas have 24 bits and their squares 48: in 64 bits there is room for `2^16` squares.
        const BLOCK: usize = 1 << 14;
        /// Neighbours go to different tables, so that no addition waits for the one before it.
        const LANES: usize = 4;
        #[derive(Clone, Copy)]
        struct Bins {
            // By sign and exponent.
            sums: [u64; 512],
            squares: [u64; 256],
        }
        let mut lanes = [Bins { sums: [0; 512], squares: [0; 256] }; LANES];
        for block in xs.chunks(BLOCK) {
            for xs in block.chunks(LANES) {
                for (bins, x) in lanes.iter_mut().zip(xs) {
                    let bits = x.to_bits();
                    let exponent = (bits >> 23) as usize & 255;
                    let m = u64::from(bits & 0x7f_ffff | u32::from(exponent != 0) << 23);
                    bins.sums[(bits >> 23) as usize] += m;
                    bins.squares[exponent] += m * m;
                }
            }
            for bins in &mut lanes {
                for (at, sum) in bins.sums.iter_mut().enumerate().filter(|(_, sum)| **sum != 0) {
                    let to = if at < 256 { &mut self.positive } else { &mut self.negative };
                    to.add(*sum, shift_of(at & 255));
                    *sum = 0;
                }
                for (at, sum) in bins.squares.iter_mut().enumerate().filter(|(_, sum)| **sum != 0) {
                    self.squares.add(*sum, 2 * shift_of(at));
                    *sum = 0;
                }
            }
        }
    }
}

impl Observer for Moments {
    const NAME: &'static str = "moments";
    const DOC: &'static str = "Mean and standard deviation.";

    fn new(_: usize) -> Result<Moments> {
        Ok(Moments {
            n: 0,
            extremes: Extremes::NONE,
            positive: Sum::ZERO,
            negative: Sum::ZERO,
            squares: SumOfSquares::ZERO,
        })
    }

    fn see(&mut self, rows: &Rows<'_>) -> Result<()> {
        self.n = count(self.n, rows.data().len() as u64)?;
        self.extremes.add(rows.extremes());
        self.add(rows.data());
        Ok(())
    }

    fn merge(&mut self, other: &Moments) -> Result<()> {
        self.n = count(self.n, other.n)?;
        self.extremes.add(other.extremes);
        self.positive.add_all(&other.positive);
        self.negative.add_all(&other.negative);
        self.squares.add_all(&other.squares);
        Ok(())
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.n.to_le_bytes().to_vec();
        write_extremes(self.extremes, &mut out);
        self.positive.write(&mut out);
        self.negative.write(&mut out);
        self.squares.write(&mut out);
        out
    }

    fn from_bytes(bytes: &[u8]) -> Result<Moments> {
        let mut input = Reader::new(bytes);
        let n = input.u64()?;
        let extremes = input.extremes(n)?;
        let positive = Sum::read(input.take(Sum::BYTES)?);
        let negative = Sum::read(input.take(Sum::BYTES)?);
        let squares = SumOfSquares::read(input.take(SumOfSquares::BYTES)?);
        if !(positive.is_of(n) && negative.is_of(n) && squares.is_of(n)) {
            return Err(input.refuse("a sum is too large for its number of numbers"));
        }
        input.end()?;
        Ok(Moments { n, extremes, positive, negative, squares })
    }

    fn memory(&self) -> usize {
        size_of::<Self>()
    }

    fn n_seen(&self) -> u64 {
        self.n
    }

    fn span(&self, method: Method, scheme: &Scheme) -> Result<Option<Span>> {
        let deviations = match method {
            Method::Whole => return Ok(Some(whole(self.extremes, scheme))),
            Method::Moments { deviations } => f64::from(deviations),
            _ => return Ok(None),
        };
        let (mean, reach) = (self.mean(), deviations * self.deviation());
        let Extremes { min, max } = self.extremes;
        let near = Extremes {
            min: ((mean - reach) as f32).clamp(min, max),
            max: ((mean + reach) as f32).clamp(min, max),
        };
        Ok(Some(whole(near, scheme)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calib::observers::tests::{ASYMMETRIC, SYMMETRIC};

    fn of(xs: &[f32]) -> Moments {
        let mut m = Moments::new(1).unwrap();
        m.see(&Rows::new(0, xs, 1).unwrap()).unwrap();
        m
    }

    #[test]
    fn by_hand() {
        // Mean 1, mean square 13.5.
        let m = of(&[-4.0, 5.0, 2.0, 1.0, -1.0, 3.0, 1.0, 1.0]);
        assert_eq!((m.mean(), m.deviation()), (1.0, (58.0f64 / 8.0 - 1.0).sqrt()));
        let span = |k, scheme| m.span(Method::Moments { deviations: k }, scheme).unwrap().unwrap();
        assert_eq!(span(1.0, &ASYMMETRIC), Span::new(-1.5, 3.5));
        assert_eq!(span(1.0, &SYMMETRIC), Span::symmetric(3.5));
        // Never wider than what was seen.
        assert_eq!(span(9.0, &ASYMMETRIC), Span::new(-4.0, 5.0));
        assert_eq!(of(&[7.0; 5]).deviation(), 0.0);
        assert_eq!(of(&[f32::MAX, f32::MAX]).mean(), f64::from(f32::MAX));
    }

    #[test]
    fn many_blocks_of_integers() {
        // 0, 1, .., 2^17 - 1 with alternating signs and a large offset: every sum is known.
        let xs: Vec<f32> = (0..1 << 17).map(|i| (i as f32 + 4e6) * if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let m = of(&xs);
        let sum: i64 = xs.iter().map(|&x| x as i64).sum();
        let squares: i128 = xs.iter().map(|&x| (x as i64 as i128).pow(2)).sum();
        assert_eq!(m.mean(), sum as f64 / (1 << 17) as f64);
        assert_eq!(m.squares.to_f64(), squares as f64);
    }
}
