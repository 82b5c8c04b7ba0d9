//! The mean of each channel.

use super::bytes::{Reader, count, same_channels};
use super::exact::{Sum, parts};
use super::{Observer, Rows, check_channels};
use quantc_ir::diag::Result;

/// The sums of positive and of negative numbers of each channel, without rounding, and the number of rows. 96 bytes a channel.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelMean {
    rows: u64,
    /// Magnitudes of positive and of negative numbers.
    sums: Vec<[Sum; 2]>,
}

/// Channels whose sums are in use at a time: few enough for the nearest cache, enough for runs of whole lines.
const TILE: usize = 64;

impl ChannelMean {
    /// Means: the exact sum rounded to a double, divided by the number of rows. 0 when nothing was seen.
    pub fn means(&self) -> Vec<f64> {
        let n = self.rows.max(1) as f64;
        let sum = |[positive, negative]: &[Sum; 2]| match negative.above(positive) {
            true => -negative.less(positive).to_f64(),
            false => positive.less(negative).to_f64(),
        };
        self.sums.iter().map(|sums| sum(sums) / n).collect()
    }
}

impl Observer for ChannelMean {
    const NAME: &'static str = "channel-mean";
    const DOC: &'static str = "The mean of each channel.";

    fn new(channels: usize) -> Result<ChannelMean> {
        check_channels(channels)?;
        Ok(ChannelMean { rows: 0, sums: vec![[Sum::ZERO; 2]; channels] })
    }

    fn see(&mut self, rows: &Rows<'_>) -> Result<()> {
        same_channels(self.sums.len(), rows.cols())?;
        self.rows = count(self.rows, rows.n_rows() as u64)?;
        for (i, sums) in self.sums.chunks_mut(TILE).enumerate() {
            for row in rows.iter() {
                for (sums, &x) in sums.iter_mut().zip(&row[i * TILE..]) {
                    let (m, shift) = parts(x);
                    sums[usize::from(x.is_sign_negative())].add(m, shift);
                }
            }
        }
        Ok(())
    }

    fn merge(&mut self, other: &ChannelMean) -> Result<()> {
        same_channels(self.sums.len(), other.sums.len())?;
        self.rows = count(self.rows, other.rows)?;
        for (a, b) in self.sums.iter_mut().zip(&other.sums) {
            a.iter_mut().zip(b).for_each(|(a, b)| a.add_all(b));
        }
        Ok(())
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.rows.to_le_bytes().to_vec();
        self.sums.iter().flatten().for_each(|s| s.write(&mut out));
        out
    }

    fn from_bytes(bytes: &[u8]) -> Result<ChannelMean> {
        let mut input = Reader::new(bytes);
        let rows = input.u64()?;
        let (pairs, rest) = input.rest().as_chunks::<{ 2 * Sum::BYTES }>();
        if !rest.is_empty() {
            return Err(input.refuse("it ends within a number"));
        }
        check_channels(pairs.len())?;
        let read = |pair: &[u8; 2 * Sum::BYTES]| [Sum::read(&pair[..Sum::BYTES]), Sum::read(&pair[Sum::BYTES..])];
        let sums: Vec<[Sum; 2]> = pairs.iter().map(read).collect();
        if sums.iter().flatten().any(|s| !s.is_of(rows)) {
            return Err(input.refuse("a sum is too large for its number of rows"));
        }
        Ok(ChannelMean { rows, sums })
    }

    fn memory(&self) -> usize {
        size_of::<Self>() + 2 * Sum::BYTES * self.sums.capacity()
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
        let mut m = ChannelMean::new(2).unwrap();
        assert_eq!(m.means(), [0.0, 0.0]);
        m.see(&Rows::new(0, &[3.0, 0.5, -4.0, 0.0], 2).unwrap()).unwrap();
        assert_eq!(m.means(), [-0.5, 0.25]);
        m.see(&Rows::new(1, &[1.0, -0.5, 8.0, 0.0], 2).unwrap()).unwrap();
        assert_eq!(m.means(), [2.0, 0.0]);
    }

    #[test]
    fn what_cancels_leaves_what_is_small() {
        let mut m = ChannelMean::new(1).unwrap();
        m.see(&Rows::new(0, &[1e30, 3e-30, -1e30], 1).unwrap()).unwrap();
        assert_eq!(m.means(), [f64::from(3e-30f32) / 3.0]);
    }

    #[test]
    fn tiles_of_channels() {
        // Channel j holds j in 3 rows and -j / 2 in one.
        let channels = 3 * TILE + 5;
        let mut m = ChannelMean::new(channels).unwrap();
        let data: Vec<f32> = (0..4)
            .flat_map(|row| (0..channels).map(move |j| j as f32 * if row == 2 { -0.5 } else { 1.0 }))
            .collect();
        m.see(&Rows::new(0, &data, channels).unwrap()).unwrap();
        for (j, mean) in m.means().into_iter().enumerate() {
            assert_eq!(mean, j as f64 * 2.5 / 4.0);
        }
    }
}
