//! The largest magnitude of an activation.

use super::bytes::{Reader, count};
use super::{Method, Observer, Rows};
use quantc_ir::diag::Result;
use quantc_ir::quant::Span;
use quantc_ir::scheme::{Scheme, Zero};

/// The largest magnitude of all channels. 16 bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AbsMax {
    n: u64,
    absmax: f32,
}

impl AbsMax {
    /// The largest magnitude; 0 when nothing was seen.
    pub fn absmax(&self) -> f32 {
        self.absmax
    }
}

impl Observer for AbsMax {
    const NAME: &'static str = "absmax";
    const DOC: &'static str = "The largest magnitude.";

    fn new(_: usize) -> Result<AbsMax> {
        Ok(AbsMax::default())
    }

    fn see(&mut self, rows: &Rows<'_>) -> Result<()> {
        self.n = count(self.n, rows.data().len() as u64)?;
        self.absmax = self.absmax.max(rows.extremes().absmax());
        Ok(())
    }

    fn merge(&mut self, other: &AbsMax) -> Result<()> {
        self.n = count(self.n, other.n)?;
        self.absmax = self.absmax.max(other.absmax);
        Ok(())
    }

    fn to_bytes(&self) -> Vec<u8> {
        [&self.n.to_le_bytes()[..], &self.absmax.to_le_bytes()].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Result<AbsMax> {
        let mut input = Reader::new(bytes);
        let (n, absmax) = (input.u64()?, input.f32()?);
        // Bits above those of the largest number are infinity, NaNs and everything negative.
        if absmax.to_bits() > f32::MAX.to_bits() || n == 0 && absmax != 0.0 {
            return Err(input.refuse("its largest magnitude is none"));
        }
        input.end()?;
        Ok(AbsMax { n, absmax })
    }

    fn memory(&self) -> usize {
        size_of::<Self>()
    }

    fn n_seen(&self) -> u64 {
        self.n
    }

    fn span(&self, method: Method, scheme: &Scheme) -> Result<Option<Span>> {
        let told = method == Method::Whole && scheme.zero == Zero::Symmetric;
        Ok(told.then(|| Span::symmetric(self.absmax)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let mut a = AbsMax::new(3).unwrap();
        a.see(&Rows::new(0, &[1.0, -2.5, 0.0, 2.0, 2.25, -0.0], 3).unwrap()).unwrap();
        assert_eq!((a.absmax(), a.n_seen()), (2.5, 6));
        a.see(&Rows::new(1, &[0.0, -3.0, 1.0], 3).unwrap()).unwrap();
        assert_eq!((a.absmax(), a.n_seen()), (3.0, 9));
    }
}
