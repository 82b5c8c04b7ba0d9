//! The least and the largest number of each channel.

use super::bytes::{Reader, count, same_channels, write_extremes};
use super::rows::Extremes;
use super::{Method, Observer, Rows, check_channels, whole};
use quantc_ir::diag::Result;
use quantc_ir::quant::Span;
use quantc_ir::scheme::Scheme;

/// The least and the largest number of each channel. 8 bytes a channel.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelMinMax {
    rows: u64,
    // Two lists and not pairs, so that a row meets them in whole vectors.
    min: Vec<f32>,
    max: Vec<f32>,
}

impl ChannelMinMax {
    /// The least number of each channel; infinity when nothing was seen.
    pub fn min(&self) -> &[f32] {
        &self.min
    }

    /// The largest number of each channel; minus infinity when nothing was seen.
    pub fn max(&self) -> &[f32] {
        &self.max
    }

    fn extremes(&self) -> impl Iterator<Item = Extremes> {
        self.min.iter().zip(&self.max).map(|(&min, &max)| Extremes { min, max })
    }

    fn add(&mut self, min: &[f32], max: &[f32]) {
        for (((to_min, to_max), &min), &max) in self.min.iter_mut().zip(&mut self.max).zip(min).zip(max) {
            // Adding 0 makes one zero of two, so that it does not matter which of them came first.
            let (min, max) = (min + 0.0, max + 0.0);
            *to_min = if min < *to_min { min } else { *to_min };
            *to_max = if max > *to_max { max } else { *to_max };
        }
    }
}

impl Observer for ChannelMinMax {
    const NAME: &'static str = "channel-min-max";
    const DOC: &'static str = "The least and the largest number of each channel.";

    fn new(channels: usize) -> Result<ChannelMinMax> {
        check_channels(channels)?;
        let Extremes { min, max } = Extremes::NONE;
        Ok(ChannelMinMax { rows: 0, min: vec![min; channels], max: vec![max; channels] })
    }

    fn see(&mut self, rows: &Rows<'_>) -> Result<()> {
        same_channels(self.min.len(), rows.cols())?;
        self.rows = count(self.rows, rows.n_rows() as u64)?;
        rows.iter().for_each(|row| self.add(row, row));
        Ok(())
    }

    fn merge(&mut self, other: &ChannelMinMax) -> Result<()> {
        same_channels(self.min.len(), other.min.len())?;
        self.rows = count(self.rows, other.rows)?;
        self.add(&other.min, &other.max);
        Ok(())
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.rows.to_le_bytes().to_vec();
        self.extremes().for_each(|e| write_extremes(e, &mut out));
        out
    }

    fn from_bytes(bytes: &[u8]) -> Result<ChannelMinMax> {
        let mut input = Reader::new(bytes);
        let rows = input.u64()?;
        let (mut min, mut max) = (vec![], vec![]);
        while !input.is_empty() {
            let extremes = input.extremes(rows)?;
            min.push(extremes.min);
            max.push(extremes.max);
        }
        check_channels(min.len())?;
        Ok(ChannelMinMax { rows, min, max })
    }

    fn memory(&self) -> usize {
        size_of::<Self>() + 4 * (self.min.capacity() + self.max.capacity())
    }

    fn n_seen(&self) -> u64 {
        self.rows
    }

    fn span(&self, method: Method, scheme: &Scheme) -> Result<Option<Span>> {
        if method != Method::Whole {
            return Ok(None);
        }
        let mut all = Extremes::NONE;
        self.extremes().for_each(|e| all.add(e));
        Ok(Some(whole(all, scheme)))
    }

    fn channel_spans(&self, scheme: &Scheme) -> Option<Vec<Span>> {
        Some(self.extremes().map(|e| whole(e, scheme)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let mut m = ChannelMinMax::new(3).unwrap();
        m.see(&Rows::new(0, &[1.0, -2.5, -0.0, -2.0, -2.25, 0.0], 3).unwrap()).unwrap();
        assert_eq!((m.min(), m.max()), (&[-2.0, -2.5, 0.0][..], &[1.0, -2.25, 0.0][..]));
        assert_eq!((m.min()[2].to_bits(), m.max()[2].to_bits(), m.n_seen()), (0, 0, 2));
    }
}
