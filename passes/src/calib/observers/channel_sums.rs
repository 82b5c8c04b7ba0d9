//! Sums of something of each channel, without rounding: what the means of channels share.

use super::bytes::{Reader, count, same_channels};
use super::{Observer, Rows, check_channels};
use quantc_ir::diag::Result;
use std::fmt::Debug;

/// What is summed up in a channel.
pub trait ChannelSum: Copy + Debug + PartialEq + Send + Sync {
    /// The name in pipelines and files.
    const NAME: &'static str;
    /// What the means tell, in one sentence.
    const DOC: &'static str;
    /// The bytes that a sum is written as.
    const BYTES: usize;
    /// Of no numbers.
    const ZERO: Self;

    /// Adds what `x`, which is finite, counts for.
    fn add(&mut self, x: f32);
    /// Adds another sum.
    fn add_all(&mut self, other: &Self);
    /// The sum rounded to a double.
    fn to_f64(self) -> f64;
    /// Whether it can be the sum of `n` finite numbers.
    fn is_of(&self, n: u64) -> bool;
    /// Writes [`BYTES`](Self::BYTES) bytes.
    fn write(&self, out: &mut Vec<u8>);
    /// Reads as many.
    fn read(bytes: &[u8]) -> Self;
}

/// A sum for each channel, and the number of rows.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelSums<S> {
    rows: u64,
    sums: Vec<S>,
}

/// Channels whose sums are in use at a time: few enough for the nearest cache, enough for runs of whole lines.
pub(super) const TILE: usize = 64;

impl<S: ChannelSum> ChannelSums<S> {
    /// Means: the exact sum rounded to a double, divided by the number of rows. 0 when nothing was seen.
    pub fn means(&self) -> Vec<f64> {
        let n = self.rows.max(1) as f64;
        self.sums.iter().map(|s| s.to_f64() / n).collect()
    }
}

impl<S: ChannelSum> Observer for ChannelSums<S> {
    const NAME: &'static str = S::NAME;
    const DOC: &'static str = S::DOC;

    fn new(channels: usize) -> Result<ChannelSums<S>> {
        check_channels(channels)?;
        Ok(ChannelSums { rows: 0, sums: vec![S::ZERO; channels] })
    }

    fn see(&mut self, rows: &Rows<'_>) -> Result<()> {
        same_channels(self.sums.len(), rows.cols())?;
        self.rows = count(self.rows, rows.n_rows() as u64)?;
        for (i, sums) in self.sums.chunks_mut(TILE).enumerate() {
            for row in rows.iter() {
                for (sum, &x) in sums.iter_mut().zip(&row[i * TILE..]) {
                    sum.add(x);
                }
            }
        }
        Ok(())
    }

    fn merge(&mut self, other: &ChannelSums<S>) -> Result<()> {
        same_channels(self.sums.len(), other.sums.len())?;
        self.rows = count(self.rows, other.rows)?;
        self.sums.iter_mut().zip(&other.sums).for_each(|(a, b)| a.add_all(b));
        Ok(())
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.rows.to_le_bytes().to_vec();
        self.sums.iter().for_each(|s| s.write(&mut out));
        out
    }

    fn from_bytes(bytes: &[u8]) -> Result<ChannelSums<S>> {
        let mut input = Reader::new(bytes);
        let rows = input.u64()?;
        let sums = input.rest();
        if !sums.len().is_multiple_of(S::BYTES) {
            return Err(input.refuse("it ends within a number"));
        }
        check_channels(sums.len() / S::BYTES)?;
        let sums: Vec<S> = sums.chunks_exact(S::BYTES).map(S::read).collect();
        if sums.iter().any(|s| !s.is_of(rows)) {
            return Err(input.refuse("a sum is too large for its number of rows"));
        }
        Ok(ChannelSums { rows, sums })
    }

    fn memory(&self) -> usize {
        size_of::<Self>() + size_of::<S>() * self.sums.capacity()
    }

    fn n_seen(&self) -> u64 {
        self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ChannelMean, ChannelMeanSquare};
    use super::*;

    #[test]
    fn tiles_of_channels() {
        // Channel j holds j in 3 rows and -j / 2 in one.
        let channels = 3 * TILE + 5;
        let data: Vec<f32> = (0..4)
            .flat_map(|row| (0..channels).map(move |j| j as f32 * if row == 2 { -0.5 } else { 1.0 }))
            .collect();
        let rows = Rows::new(0, &data, channels).unwrap();
        let (mut mean, mut square) =
            (ChannelMean::new(channels).unwrap(), ChannelMeanSquare::new(channels).unwrap());
        mean.see(&rows).unwrap();
        square.see(&rows).unwrap();
        for (j, (mean, square)) in mean.means().into_iter().zip(square.means()).enumerate() {
            assert_eq!(mean, j as f64 * 2.5 / 4.0);
            assert_eq!(square, (j * j) as f64 * 3.25 / 4.0);
        }
    }
}
