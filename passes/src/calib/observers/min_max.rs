//! The least and the largest number of an activation.

use super::bytes::{Reader, count, write_extremes};
use super::rows::Extremes;
use super::{Method, Observer, Rows, whole};
use quantc_ir::diag::Result;
use quantc_ir::quant::Span;
use quantc_ir::scheme::Scheme;

/// The least and the largest number of all channels. 16 bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct MinMax {
    n: u64,
    extremes: Extremes,
}

impl MinMax {
    /// The least and the largest number, as they are: 0 need not lie between. `None` when nothing was seen.
    pub fn min_max(&self) -> Option<(f32, f32)> {
        (self.n > 0).then_some((self.extremes.min, self.extremes.max))
    }
}

impl Observer for MinMax {
    const NAME: &'static str = "min-max";
    const DOC: &'static str = "The least and the largest number.";

    fn new(_: usize) -> Result<MinMax> {
        Ok(MinMax { n: 0, extremes: Extremes::NONE })
    }

    fn see(&mut self, rows: &Rows<'_>) -> Result<()> {
        self.n = count(self.n, rows.data().len() as u64)?;
        self.extremes.add(rows.extremes());
        Ok(())
    }

    fn merge(&mut self, other: &MinMax) -> Result<()> {
        self.n = count(self.n, other.n)?;
        self.extremes.add(other.extremes);
        Ok(())
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.n.to_le_bytes().to_vec();
        write_extremes(self.extremes, &mut out);
        out
    }

    fn from_bytes(bytes: &[u8]) -> Result<MinMax> {
        let mut input = Reader::new(bytes);
        let n = input.u64()?;
        let extremes = input.extremes(n)?;
        input.end()?;
        Ok(MinMax { n, extremes })
    }

    fn memory(&self) -> usize {
        size_of::<Self>()
    }

    fn n_seen(&self) -> u64 {
        self.n
    }

    fn span(&self, method: Method, scheme: &Scheme) -> Result<Option<Span>> {
        Ok((method == Method::Whole).then(|| whole(self.extremes, scheme)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let mut m = MinMax::new(2).unwrap();
        assert_eq!(m.min_max(), None);
        m.see(&Rows::new(0, &[1.0, 2.5, 0.5, 2.0], 2).unwrap()).unwrap();
        assert_eq!(m.min_max(), Some((0.5, 2.5)));
        m.see(&Rows::new(1, &[-3.0, 1.0], 2).unwrap()).unwrap();
        assert_eq!((m.min_max(), m.n_seen()), (Some((-3.0, 2.5)), 6));
    }
}
