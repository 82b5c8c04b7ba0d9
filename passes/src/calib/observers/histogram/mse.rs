//! The range with the least sum of squared errors.
//!
//! A number `x` of the interval of code `q` with the value `v` costs `(x - v)^2`; over an interval that is
//! `sum x^2 - 2 v sum x + v^2 n`, and the intervals meet halfway between neighbouring values. So the error of a range
//! is one look at the prefix sums for each code, for integers and floats alike.

use super::Histogram;
use super::axis::Axis;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::quant::{ScaleRule, Span, dequantize_one, scale_for};
use quantc_ir::scheme::{Scheme, Zero};

/// Factors tried: `2^(-i / 32)` for `i` up to this.
const STEPS: u32 = 256;

/// The range with the least error among those that are the whole range times a factor: with zero points, one factor
/// for each end, found in turns.
pub(super) fn span(h: &Histogram, scheme: &Scheme) -> Result<Span> {
    let format = scheme.format;
    if format.bits > 8 {
        return Err(Diag::pipeline(format!("there is no range of least error for {format}: it is too fine"))
            .help("use `whole`"));
    }
    let axis = Axis::signed(h, 1);
    match scheme.zero {
        Zero::Symmetric => {
            let absmax = h.extremes.absmax();
            best(&axis, scheme, |factor| Span::symmetric(absmax * factor))
        }
        Zero::Point(_) => {
            let mut span = h.extremes.span();
            let (min, max) = (span.min(), span.max());
            for _ in 0..2 {
                span = best(&axis, scheme, |factor| Span::new(span.min(), max * factor))?;
                span = best(&axis, scheme, |factor| Span::new(min * factor, span.max()))?;
            }
            Ok(span)
        }
    }
}

/// The span with the least error; of equal ones that of the largest factor.
fn best(axis: &Axis, scheme: &Scheme, span: impl Fn(f32) -> Span) -> Result<Span> {
    let mut best = (f64::INFINITY, span(1.0));
    for i in 0..=STEPS {
        let span = span(factor(i));
        let error = squared_error(axis, span, scheme)?;
        if error < best.0 {
            best = (error, span);
        }
    }
    Ok(best.1)
}

pub(super) fn factor(i: u32) -> f32 {
    libm::exp2(-f64::from(i) / 32.0) as f32
}

/// The sum of squared errors when numbers are quantized with the scale of `span`.
pub(super) fn squared_error(axis: &Axis, span: Span, scheme: &Scheme) -> Result<f64> {
    let format = scheme.format;
    let (scale, zero) = scale_for(span, scheme, ScaleRule::Real)?;
    let codes = (0..=format.mask()).filter(|&code| !format.is_nan_code(code));
    let values = codes.map(|code| f64::from(dequantize_one(code, scale, zero, format)));
    let mut values: Vec<f64> = values.filter(|v| v.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    // Floats have two zeros.
    values.dedup();
    let mut error = 0.0;
    let mut from = f64::NEG_INFINITY;
    for (i, &v) in values.iter().enumerate() {
        let to = values.get(i + 1).map_or(f64::INFINITY, |next| 0.5 * (v + next));
        let sums = axis.between(from, to);
        error += sums.xx - 2.0 * v * sums.x + v * v * sums.n;
        from = to;
    }
    Ok(error)
}
