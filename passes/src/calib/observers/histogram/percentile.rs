//! Ranges that leave out a given share of the numbers.

use super::{END, Histogram, SIDE, lower_edge};
use quantc_ir::quant::Span;
use quantc_ir::scheme::Zero;

/// The range with `ppm` parts of a million of the numbers inside.
///
/// Symmetric: up to the magnitude of rank `ceil(n ppm / 10^6)`. With zero points: half of the numbers that may be left
/// out are left out at each end. An end lies at the outer edge of the bucket of the number of that rank, but not
/// beyond the extremes.
pub(super) fn span(h: &Histogram, ppm: u32, zero: Zero) -> Span {
    let inside = (u128::from(h.n) * u128::from(ppm)).div_ceil(1_000_000);
    let outside = (u128::from(h.n) - inside.min(u128::from(h.n))) as u64;
    match zero {
        Zero::Symmetric => {
            Span::symmetric(reach(|at| h.magnitudes(at), outside).min(h.extremes.absmax()))
        }
        Zero::Point(_) => {
            let max = reach(|at| h.counts[at], outside / 2).min(h.extremes.max);
            let min = -reach(|at| h.counts[SIDE + at], outside / 2);
            Span::new(min.max(h.extremes.min), max)
        }
    }
}

/// The upper edge of the bucket of magnitudes above which at most `outside` numbers lie; 0 when all of them may.
fn reach(count: impl Fn(usize) -> u64, outside: u64) -> f32 {
    let mut left = outside;
    for at in (0..END).rev() {
        match left.checked_sub(count(at)) {
            Some(less) => left = less,
            None => return lower_edge(at + 1),
        }
    }
    0.0
}
