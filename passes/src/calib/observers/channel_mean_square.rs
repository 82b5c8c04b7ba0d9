//! The mean square of each channel.

use super::channel_sums::{ChannelSum, ChannelSums};
use super::exact::SumOfSquares;

/// The mean square of each channel. 80 bytes a channel.
pub type ChannelMeanSquare = ChannelSums<Squares>;

/// Squares, summed up without rounding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Squares(SumOfSquares);

impl ChannelSum for Squares {
    const NAME: &'static str = "channel-mean-square";
    const DOC: &'static str = "The mean square of each channel.";
    const BYTES: usize = SumOfSquares::BYTES;
    const ZERO: Squares = Squares(SumOfSquares::ZERO);

    #[inline(always)]
    fn add(&mut self, x: f32) {
        self.0.add_square(x);
    }

    fn add_all(&mut self, other: &Squares) {
        self.0.add_all(&other.0);
    }

    fn to_f64(self) -> f64 {
        self.0.to_f64()
    }

    fn is_of(&self, n: u64) -> bool {
        self.0.is_of(n)
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.0.write(out);
    }

    fn read(bytes: &[u8]) -> Squares {
        Squares(SumOfSquares::read(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Observer, Rows};
    use super::*;

    #[test]
    fn by_hand() {
        let mut m = ChannelMeanSquare::new(2).unwrap();
        assert_eq!(m.means(), [0.0, 0.0]);
        m.see(&Rows::new(0, &[3.0, 0.5, -4.0, 0.0], 2).unwrap()).unwrap();
        assert_eq!((m.means(), m.n_seen()), (vec![12.5, 0.125], 2));
        m.see(&Rows::new(1, &[0.0, -0.5, 0.0, 0.0], 2).unwrap()).unwrap();
        assert_eq!((m.means(), m.n_seen()), (vec![6.25, 0.125], 4));
    }
}
