//! Moving averages of the extremes of samples.

use super::bytes::{Reader, count, write_extremes};
use super::rows::Extremes;
use super::{Method, Observer, Rows, whole};
use quantc_ir::diag::Result;
use quantc_ir::quant::Span;
use quantc_ir::scheme::Scheme;

/// The extremes of the last 8192 samples, by index. At most 128 KiB.
///
/// With a constant `c`, the average is that of the recursion `a = e` for the first sample and `a = (1 - c) a + c e` for
/// each next one in the order of indices, whoever saw them and whenever. Samples further back are dropped: their
/// weight, `(1 - c)^8192`, is below `2e-18` for every constant that [`Method`] allows. Which samples are dropped
/// depends on the indices alone, so that it does not matter how samples are divided among states.
#[derive(Clone, Debug, PartialEq)]
pub struct MovingAverage {
    n: u64,
    /// By index, ascending.
    samples: Vec<(u64, Extremes)>,
}

/// Number of samples that are kept.
const KEPT: usize = 8192;

impl MovingAverage {
    /// The moving averages of least and largest numbers with the constant `c`; `None` when nothing was seen.
    pub fn average(&self, c: f32) -> Option<(f32, f32)> {
        let c = f64::from(c);
        let pairs = self.samples.iter().map(|(_, e)| (f64::from(e.min), f64::from(e.max)));
        let average = pairs.reduce(|a, e| ((1.0 - c) * a.0 + c * e.0, (1.0 - c) * a.1 + c * e.1));
        average.map(|(min, max)| (min as f32, max as f32))
    }

    fn add(&mut self, sample: u64, extremes: Extremes) {
        let at = self.samples.partition_point(|(s, _)| *s < sample);
        if let Some((s, known)) = self.samples.get_mut(at)
            && *s == sample
        {
            known.add(extremes);
        } else if self.samples.len() < KEPT {
            self.samples.insert(at, (sample, extremes));
        } else if at > 0 {
            // The oldest makes room; what is older still is not taken.
            self.samples[..at].rotate_left(1);
            self.samples[at - 1] = (sample, extremes);
        }
    }
}

impl Observer for MovingAverage {
    const NAME: &'static str = "moving-average";
    const DOC: &'static str = "Moving averages of the least and the largest number of a sample.";

    fn new(_: usize) -> Result<MovingAverage> {
        Ok(MovingAverage { n: 0, samples: vec![] })
    }

    fn see(&mut self, rows: &Rows<'_>) -> Result<()> {
        self.n = count(self.n, rows.data().len() as u64)?;
        if !rows.data().is_empty() {
            self.add(rows.sample(), rows.extremes());
        }
        Ok(())
    }

    fn merge(&mut self, other: &MovingAverage) -> Result<()> {
        self.n = count(self.n, other.n)?;
        other.samples.iter().for_each(|&(sample, extremes)| self.add(sample, extremes));
        Ok(())
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.n.to_le_bytes().to_vec();
        for (sample, extremes) in &self.samples {
            out.extend(sample.to_le_bytes());
            write_extremes(*extremes, &mut out);
        }
        out
    }

    fn from_bytes(bytes: &[u8]) -> Result<MovingAverage> {
        let mut input = Reader::new(bytes);
        let n = input.u64()?;
        let mut samples: Vec<(u64, Extremes)> = vec![];
        while !input.is_empty() {
            let sample = input.u64()?;
            if samples.len() == KEPT || samples.last().is_some_and(|(last, _)| *last >= sample) {
                return Err(input.refuse("its samples are too many or not in order"));
            }
            samples.push((sample, input.extremes(1)?));
        }
        if n < samples.len() as u64 || n > 0 && samples.is_empty() {
            return Err(input.refuse("its numbers do not fit its samples"));
        }
        Ok(MovingAverage { n, samples })
    }

    fn memory(&self) -> usize {
        size_of::<Self>() + size_of::<(u64, Extremes)>() * self.samples.capacity()
    }

    fn n_seen(&self) -> u64 {
        self.n
    }

    fn span(&self, method: Method, scheme: &Scheme) -> Result<Option<Span>> {
        let Method::MovingAverage { constant } = method else { return Ok(None) };
        Ok(self.average(constant).map(|(min, max)| whole(Extremes { min, max }, scheme)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let mut m = MovingAverage::new(2).unwrap();
        assert_eq!(m.average(0.5), None);
        // Samples out of order, the last of them in two pieces.
        for (sample, row) in [(7, [-4.0, 0.0]), (2, [-1.0, 2.0]), (9, [1.0, 16.0]), (9, [-8.0, 0.0])] {
            m.see(&Rows::new(sample, &row, 2).unwrap()).unwrap();
        }
        // (-1, 2), then halfway to (-4, 0), then halfway to (-8, 16).
        assert_eq!(m.average(0.5), Some((-5.25, 8.5)));
        assert_eq!(m.average(1.0), Some((-8.0, 16.0)));
        assert_eq!(m.n_seen(), 8);
    }

    #[test]
    fn old_samples_go() {
        let n = KEPT as u64 + 100;
        let mut forth = MovingAverage::new(1).unwrap();
        let mut back = forth.clone();
        for i in 0..n {
            forth.see(&Rows::new(i, &[i as f32], 1).unwrap()).unwrap();
            let i = n - 1 - i;
            back.see(&Rows::new(i, &[i as f32], 1).unwrap()).unwrap();
        }
        assert_eq!(forth, back);
        assert_eq!((forth.samples.len(), forth.samples[0].0), (KEPT, 100));
        // The recursion over all samples is no different.
        let all = (1..n).fold(0.0, |a, i| 0.99f32 as f64 * a + (1.0 - 0.99f32 as f64) * i as f64);
        let (min, max) = forth.average(0.01).unwrap();
        assert_eq!(min, max);
        assert!((f64::from(max) - all).abs() < 1e-6 * all, "{max} {all}");
    }
}
