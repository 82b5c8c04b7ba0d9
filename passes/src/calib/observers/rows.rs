//! Checked rows of an activation: what observers are given.

use quantc_ir::diag::{Diag, Result};
use quantc_ir::quant::Span;

/// Rows of an activation in one sample, all of them finite, with their least and largest number.
///
/// Whoever feeds several observers checks the rows once, here; observers need not look for NaNs themselves. A sample
/// may come in several pieces, cut between rows.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    sample: u64,
    data: &'a [f32],
    cols: usize,
    min: f32,
    max: f32,
}

impl<'a> Rows<'a> {
    /// The rows `data`, `[n, cols]` in row-major order, of the sample with the index `sample`.
    ///
    /// Infinities and NaNs are refused; the error names the first by sample, row and channel.
    pub fn new(sample: u64, data: &'a [f32], cols: usize) -> Result<Rows<'a>> {
        if cols == 0 || !data.len().is_multiple_of(cols) {
            return Err(Diag::bug(format!("{} numbers are no rows of {cols} channels", data.len())));
        }
        let mut min = [f32::INFINITY; LANES];
        let mut max = [f32::NEG_INFINITY; LANES];
        // A product with 0 is NaN for all that is not finite, and NaN stays.
        let mut check = [0.0f32; LANES];
        let mut see = |xs: &[f32]| {
            for (((min, max), check), &x) in min.iter_mut().zip(&mut max).zip(&mut check).zip(xs) {
                *min = if x < *min { x } else { *min };
                *max = if x > *max { x } else { *max };
                *check += x * 0.0;
            }
        };
        let (chunks, rest) = data.as_chunks::<LANES>();
        chunks.iter().for_each(|xs| see(xs));
        see(rest);
        if check.iter().any(|c| c.is_nan()) {
            return Err(not_finite(sample, data, cols));
        }
        // Adding 0 makes one zero of two, so that it does not matter which of them came first.
        let min = min.iter().fold(f32::INFINITY, |a, &b| a.min(b)) + 0.0;
        let max = max.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b)) + 0.0;
        Ok(Rows { sample, data, cols, min, max })
    }

    /// The index of the sample.
    pub fn sample(&self) -> u64 {
        self.sample
    }

    /// All numbers, row by row.
    pub fn data(&self) -> &'a [f32] {
        self.data
    }

    /// Number of channels: the length of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.data.len() / self.cols
    }

    /// The rows.
    pub fn iter(&self) -> impl Iterator<Item = &'a [f32]> + use<'a> {
        self.data.chunks_exact(self.cols)
    }

    pub(super) fn extremes(&self) -> Extremes {
        Extremes { min: self.min, max: self.max }
    }
}

/// Enough for the widest vectors, and for a few of them at once.
const LANES: usize = 32;

fn not_finite(sample: u64, data: &[f32], cols: usize) -> Diag {
    let at = data.iter().position(|x| !x.is_finite()).unwrap_or(0);
    let (row, channel) = (at / cols, at % cols);
    Diag::input(format!(
        "an activation is {} in sample {sample}, row {row}, channel {channel}: no range covers it",
        data[at]
    ))
    .help("look for the op that makes it, or leave the sample out")
}

/// The least and the largest of some numbers; of none, infinity and minus infinity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Extremes {
    pub min: f32,
    pub max: f32,
}

impl Extremes {
    pub const NONE: Extremes = Extremes { min: f32::INFINITY, max: f32::NEG_INFINITY };

    pub fn add(&mut self, other: Extremes) {
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    pub fn absmax(self) -> f32 {
        self.max.max(-self.min).max(0.0)
    }

    pub fn span(self) -> Span {
        Span::new(self.min, self.max)
    }

    /// Whether it can be the extremes of `n` finite numbers, in the one way that these are written.
    pub fn are_of(self, n: u64) -> bool {
        let negative_zero = (-0.0f32).to_bits();
        if n == 0 {
            return self == Extremes::NONE;
        }
        self.min.is_finite()
            && self.max.is_finite()
            && self.min <= self.max
            && self.min.to_bits() != negative_zero
            && self.max.to_bits() != negative_zero
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extremes_of_rows() {
        let mut data: Vec<f32> = (0..70).map(|i| i as f32).collect();
        data[41] = -7.5;
        data[69] = 1e30;
        let rows = Rows::new(3, &data, 7).unwrap();
        assert_eq!(rows.extremes(), Extremes { min: -7.5, max: 1e30 });
        assert_eq!((rows.n_rows(), rows.cols(), rows.sample()), (10, 7, 3));
        assert_eq!(rows.iter().nth(1).unwrap(), &data[7..14]);
        assert_eq!(Rows::new(0, &[], 7).unwrap().extremes(), Extremes::NONE);
        assert_eq!(Rows::new(0, &[-0.0], 1).unwrap().extremes().min.to_bits(), 0);
    }

    #[test]
    fn what_is_not_finite_is_named() {
        for (bad, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
            for at in [0, 31, 32, 63, 64, 65] {
                let mut data = vec![f32::MAX; 66];
                data[at] = bad;
                let message = Rows::new(9, &data, 6).unwrap_err().message;
                let place = format!("is {name} in sample 9, row {}, channel {}:", at / 6, at % 6);
                assert!(message.contains(&place), "{message}");
            }
        }
        assert!(Rows::new(0, &[1.0; 5], 2).is_err());
        assert!(Rows::new(0, &[], 0).is_err());
    }
}
