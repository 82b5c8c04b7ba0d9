//! Whether more samples would still move the scales.

use super::{AnyObserver, Method};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::quant::{ScaleRule, Span, scale_for};
use quantc_ir::scheme::Scheme;

/// How far scales moved between half of the samples and all of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Convergence {
    /// Number of scales.
    pub n_scales: usize,
    /// The largest move, as a part of the scale after all samples.
    pub largest: f64,
    /// Which scale moved most; the first of them.
    pub at: usize,
    /// The median of the moves.
    pub median: f64,
}

impl Convergence {
    /// Compares the scale of the range, and for statistics of channels the scale of each channel.
    ///
    /// `half` and `all` are statistics of the same kind, of half of the samples and of all.
    pub fn of(half: &AnyObserver, all: &AnyObserver, method: Method, scheme: &Scheme) -> Result<Convergence> {
        let spans = |o: &AnyObserver| match o.channel_spans(scheme) {
            Some(spans) if method == Method::Whole => Ok(spans),
            _ => Ok(vec![o.span(method, scheme)?]),
        };
        Convergence::of_spans(&spans(half)?, &spans(all)?, scheme)
    }

    /// Compares the scales of ranges.
    pub fn of_spans(half: &[Span], all: &[Span], scheme: &Scheme) -> Result<Convergence> {
        if half.len() != all.len() || all.is_empty() {
            let text = format!("{} ranges after half of the samples, {} after all", half.len(), all.len());
            return Err(Diag::input(text));
        }
        let scale =
            |span: &Span| scale_for(*span, scheme, ScaleRule::Real).map(|(scale, _)| f64::from(scale));
        let mut moves = vec![];
        for (half, all) in half.iter().zip(all) {
            // The scale of a range of zeros says nothing.
            moves.push(match (half.absmax() == 0.0, all.absmax() == 0.0) {
                (true, true) => 0.0,
                (true, false) | (false, true) => 1.0,
                (false, false) => (scale(all)? - scale(half)?).abs() / scale(all)?,
            });
        }
        let (at, largest) =
            moves.iter().copied().enumerate().fold((0, 0.0), |a, b| if b.1 > a.1 { b } else { a });
        moves.sort_by(f64::total_cmp);
        Ok(Convergence { n_scales: moves.len(), largest, at, median: moves[moves.len() / 2] })
    }

    /// A remark, when a scale moved by more than `tolerance` of itself.
    pub fn remark(&self, tolerance: f64) -> Option<String> {
        if self.largest <= tolerance {
            return None;
        }
        let percent = |x: f64| format!("{:.1} %", 100.0 * x);
        let moved = if self.n_scales == 1 {
            format!("by {}", percent(self.largest))
        } else {
            format!(
                "by up to {} (channel {}; median {})",
                percent(self.largest),
                self.at,
                percent(self.median)
            )
        };
        Some(format!("more samples would still move the scales: the second half moved them {moved}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calib::observers::tests::{ASYMMETRIC, SYMMETRIC};
    use crate::calib::observers::{ChannelAbsMax, MinMax, Observer, Rows};

    #[test]
    fn by_hand() {
        let of = |xs: &[f32]| {
            let mut o = ChannelAbsMax::new(3).unwrap();
            o.see(&Rows::new(0, xs, 3).unwrap()).unwrap();
            AnyObserver::from(o)
        };
        let c =
            Convergence::of(&of(&[1.0, 3.0, 0.0]), &of(&[1.0, 4.0, 0.0]), Method::Whole, &SYMMETRIC).unwrap();
        assert_eq!((c.n_scales, c.at, c.median), (3, 1, 0.0));
        assert!((c.largest - 0.25).abs() < 1e-6);
        assert!(c.remark(0.3).is_none());
        assert_eq!(
            c.remark(0.05).unwrap(),
            "more samples would still move the scales: the second half moved them by up to 25.0 % (channel 1; median 0.0 %)"
        );
    }

    #[test]
    fn the_width_counts_for_zero_points() {
        let of = |xs: &[f32]| {
            let mut o = MinMax::new(1).unwrap();
            o.see(&Rows::new(0, xs, 1).unwrap()).unwrap();
            AnyObserver::from(o)
        };
        let c = Convergence::of(&of(&[-1.0, 2.0]), &of(&[-2.0, 2.0]), Method::Whole, &ASYMMETRIC).unwrap();
        assert!((c.largest - 0.25).abs() < 1e-6);
        assert!(Convergence::of_spans(&[], &[], &SYMMETRIC).is_err());
        assert!(Convergence::of_spans(&[Span::default()], &[], &SYMMETRIC).is_err());
    }
}
