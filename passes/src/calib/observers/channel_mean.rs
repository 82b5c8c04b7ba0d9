//! The mean of each channel.

use super::channel_sums::{ChannelSum, ChannelSums};
use super::exact::{Sum, parts};

/// The mean of each channel. 96 bytes a channel.
pub type ChannelMean = ChannelSums<Signed>;

/// Magnitudes of positive and of negative numbers, each summed up without rounding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Signed([Sum; 2]);

impl ChannelSum for Signed {
    const NAME: &'static str = "channel-mean";
    const DOC: &'static str = "The mean of each channel.";
    const BYTES: usize = 2 * Sum::BYTES;
    const ZERO: Signed = Signed([Sum::ZERO; 2]);

    #[inline(always)]
    fn add(&mut self, x: f32) {
        let (m, shift) = parts(x);
        self.0[usize::from(x.is_sign_negative())].add(m, shift);
    }

    fn add_all(&mut self, other: &Signed) {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| a.add_all(b));
    }

    fn to_f64(self) -> f64 {
        let [positive, negative] = &self.0;
        match negative.above(positive) {
            true => -negative.less(positive).to_f64(),
            false => positive.less(negative).to_f64(),
        }
    }

    fn is_of(&self, n: u64) -> bool {
        self.0.iter().all(|sum| sum.is_of(n))
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.0.iter().for_each(|sum| sum.write(out));
    }

    fn read(bytes: &[u8]) -> Signed {
        let (positive, negative) = bytes.split_at(Sum::BYTES);
        Signed([Sum::read(positive), Sum::read(negative)])
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Observer, Rows};
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
}
