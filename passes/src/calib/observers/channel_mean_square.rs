//! The mean square of each channel.

use super::bytes::{Reader, count, same_channels};
use super::exact::SumOfSquares;
use super::{Observer, Rows, check_channels};
use quantc_ir::diag::Result;

/// The sum of squares of each channel, without rounding, and the number of rows. 80 bytes a channel.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelMeanSquare {
    rows: u64,
    sums: Vec<SumOfSquares>,
}

/// Channels whose sums are in use at a time: few enough for the nearest cache, enough for runs of whole lines.
const TILE: usize = 64;

impl ChannelMeanSquare {
    /// Mean squares: the exact sum rounded to a double, divided by the number of rows. 0 when nothing was seen.
    pub fn mean_squares(&self) -> Vec<f64> {
        let n = self.rows.max(1) as f64;
        self.sums.iter().map(|s| s.to_f64() / n).collect()
    }

    /// Number of rows.
    pub fn n_rows(&self) -> u64 {
        self.rows
    }
}

impl Observer for ChannelMeanSquare {
    const NAME: &'static str = "channel-mean-square";
    const DOC: &'static str = "The mean square of each channel.";

    fn new(channels: usize) -> Result<ChannelMeanSquare> {
        check_channels(channels)?;
        Ok(ChannelMeanSquare { rows: 0, sums: vec![SumOfSquares::ZERO; channels] })
    }

    fn see(&mut self, rows: &Rows<'_>) -> Result<()> {
        same_channels(self.sums.len(), rows.cols())?;
        self.rows = count(self.rows, rows.n_rows() as u64)?;
        for (i, sums) in self.sums.chunks_mut(TILE).enumerate() {
            for row in rows.iter() {
                for (sum, &x) in sums.iter_mut().zip(&row[i * TILE..]) {
                    sum.add_square(x);
                }
            }
        }
        Ok(())
    }

    fn merge(&mut self, other: &ChannelMeanSquare) -> Result<()> {
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

    fn from_bytes(bytes: &[u8]) -> Result<ChannelMeanSquare> {
        let mut input = Reader::new(bytes);
        let rows = input.u64()?;
        let (sums, rest) = input.rest().as_chunks::<{ SumOfSquares::BYTES }>();
        if !rest.is_empty() {
            return Err(input.refuse("it ends within a number"));
        }
        check_channels(sums.len())?;
        let sums: Vec<SumOfSquares> = sums.iter().map(|s| SumOfSquares::read(s)).collect();
        if sums.iter().any(|s| !s.is_of(rows)) {
            return Err(input.refuse("a sum of squares is too large for its number of rows"));
        }
        Ok(ChannelMeanSquare { rows, sums })
    }

    fn memory(&self) -> usize {
        size_of::<Self>() + SumOfSquares::BYTES * self.sums.capacity()
    }

    fn n_seen(&self) -> u64 {
        self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let mut m = ChannelMeanSquare::new(2).unwrap();
        assert_eq!(m.mean_squares(), [0.0, 0.0]);
        m.see(&Rows::new(0, &[3.0, 0.5, -4.0, 0.0], 2).unwrap()).unwrap();
        assert_eq!((m.mean_squares(), m.n_rows()), (vec![12.5, 0.125], 2));
        m.see(&Rows::new(1, &[0.0, -0.5, 0.0, 0.0], 2).unwrap()).unwrap();
        assert_eq!((m.mean_squares(), m.n_rows()), (vec![6.25, 0.125], 4));
    }

    #[test]
    fn tiles_of_channels() {
        // Channel j holds j in 3 rows and -j / 2 in one.
        let channels = 3 * TILE + 5;
        let mut m = ChannelMeanSquare::new(channels).unwrap();
        let data: Vec<f32> = (0..4)
            .flat_map(|row| (0..channels).map(move |j| j as f32 * if row == 2 { -0.5 } else { 1.0 }))
            .collect();
        m.see(&Rows::new(0, &data, channels).unwrap()).unwrap();
        for (j, mean) in m.mean_squares().into_iter().enumerate() {
            assert_eq!(mean, (j * j) as f64 * 3.25 / 4.0);
        }
    }
}
