//! The largest magnitude of each channel.

use super::bytes::{Reader, count, same_channels};
use super::{Method, Observer, Rows, check_channels};
use quantc_ir::diag::Result;
use quantc_ir::quant::Span;
use quantc_ir::scheme::{Scheme, Zero};

/// The largest magnitude of each channel. 4 bytes a channel.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelAbsMax {
    rows: u64,
    absmax: Vec<f32>,
}

impl ChannelAbsMax {
    /// The largest magnitudes; 0 when nothing was seen.
    pub fn absmax(&self) -> &[f32] {
        &self.absmax
    }
}

impl Observer for ChannelAbsMax {
    const NAME: &'static str = "channel-absmax";
    const DOC: &'static str = "The largest magnitude of each channel.";

    fn new(channels: usize) -> Result<ChannelAbsMax> {
        check_channels(channels)?;
        Ok(ChannelAbsMax { rows: 0, absmax: vec![0.0; channels] })
    }

    fn see(&mut self, rows: &Rows<'_>) -> Result<()> {
        same_channels(self.absmax.len(), rows.cols())?;
        self.rows = count(self.rows, rows.n_rows() as u64)?;
        for row in rows.iter() {
            for (max, x) in self.absmax.iter_mut().zip(row) {
                let x = x.abs();
                *max = if x > *max { x } else { *max };
            }
        }
        Ok(())
    }

    fn merge(&mut self, other: &ChannelAbsMax) -> Result<()> {
        same_channels(self.absmax.len(), other.absmax.len())?;
        self.rows = count(self.rows, other.rows)?;
        for (max, x) in self.absmax.iter_mut().zip(&other.absmax) {
            *max = max.max(*x);
        }
        Ok(())
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.rows.to_le_bytes().to_vec();
        out.extend(self.absmax.iter().flat_map(|x| x.to_le_bytes()));
        out
    }

    fn from_bytes(bytes: &[u8]) -> Result<ChannelAbsMax> {
        let mut input = Reader::new(bytes);
        let rows = input.u64()?;
        let (words, rest) = input.rest().as_chunks::<4>();
        if !rest.is_empty() {
            return Err(input.refuse("it ends within a number"));
        }
        check_channels(words.len())?;
        let absmax: Vec<f32> = words.iter().map(|w| f32::from_le_bytes(*w)).collect();
        if absmax.iter().any(|x| x.to_bits() > f32::MAX.to_bits() || rows == 0 && *x != 0.0) {
            return Err(input.refuse("a largest magnitude is none"));
        }
        Ok(ChannelAbsMax { rows, absmax })
    }

    fn memory(&self) -> usize {
        size_of::<Self>() + 4 * self.absmax.capacity()
    }

    fn n_seen(&self) -> u64 {
        self.rows
    }

    fn span(&self, method: Method, scheme: &Scheme) -> Result<Option<Span>> {
        let told = method == Method::Whole && scheme.zero == Zero::Symmetric;
        Ok(told.then(|| Span::symmetric(self.absmax.iter().copied().fold(0.0, f32::max))))
    }

    fn channel_spans(&self, scheme: &Scheme) -> Option<Vec<Span>> {
        let told = scheme.zero == Zero::Symmetric;
        told.then(|| self.absmax.iter().map(|&a| Span::symmetric(a)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let mut a = ChannelAbsMax::new(3).unwrap();
        a.see(&Rows::new(0, &[1.0, -2.5, 0.0, -2.0, 2.25, -0.0], 3).unwrap()).unwrap();
        assert_eq!((a.absmax(), a.n_seen()), (&[2.0, 2.5, 0.0][..], 2));
        assert_eq!(a.absmax()[2].to_bits(), 0);
        assert!(a.see(&Rows::new(0, &[1.0; 4], 4).unwrap()).is_err());
    }
}
