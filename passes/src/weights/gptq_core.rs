//! Codes that keep the output of a layer, not each weight by itself: GPTQ, and scales chosen for it.
//!
//! The error of a row of weights with the quantization error `d` is `d H d^T`, with `H` the layer's
//! [`Hessian`]. [`fit_scales`] chooses scales by it, [`rewrite`] rounds column after column and lets the columns still
//! to come make up for the error of those before (Frantar et al. 2022, GPTQ, algorithm 1), then may improve single codes
//! and scales, each given all others. What holds:
//!
//! - Scales are fixed before the first column is rounded, so the order of columns does not touch the layout of groups.
//! - No row is worse, by `d H d^T` without damping, than rounded to nearest with the scales that were searched for, and no run of
//!   rows that share scales is worse than rounded to nearest with the scales of its whole ranges.
//! - A Hessian that cannot be factored even with much damping is no error: the weight is rounded to nearest, and the
//!   [`Facts`] say so.
//! - The result does not depend on the number of threads, which is that of the rayon pool the caller runs in.
//!
//! What is not here: reading weights and writing them, which is the work of passes.

mod factor;
pub(crate) mod product;
mod round;
mod scales;
mod solve;

pub use scales::{ScaleSearch, Weighting, fit_scales};

use crate::calib::hessian::Hessian;
use factor::{Factor, factor};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::quant::{Groups, Params, ScaleRule};
use quantc_ir::scheme::Scheme;
use quantc_ir::ty::{Float, Shape};
use rayon::prelude::*;
use round::Rounder;
use solve::{ROWS, Slab, Solution};
use std::ops::Range;

/// What scales are chosen by. Feedback passes most of the error of columns of much energy on to others, so that counting
/// them more gains little; descent then fits scales to the Hessian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Importance {
    /// All columns count alike.
    #[default]
    Uniform,
    /// Columns count as much as the diagonal of the Hessian says.
    Diagonal,
    /// The error that rounding to nearest would make, see [`Weighting::Block`].
    Block,
    /// Columns count as much as the rounding errors that feedback cannot pass on: the squared pivots of the factor.
    Pivots,
}

/// How [`rewrite`] goes about it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GptqOptions {
    /// Whether columns are visited by descending diagonal of the Hessian, and not from the left.
    pub act_order: bool,
    /// What is added to the diagonal of the Hessian, as a part of its mean.
    pub damp: f64,
    /// Which scales are tried.
    pub search: ScaleSearch,
    /// What they are chosen by.
    pub importance: Importance,
    /// How often coordinate descent goes over all codes afterwards, at most; it ends when nothing gets better.
    pub sweeps: u32,
    /// Whether it goes over scales too, where no two rows share one and they are any numbers.
    pub refit: bool,
}

impl Default for GptqOptions {
    fn default() -> GptqOptions {
        GptqOptions {
            act_order: true,
            damp: 0.01,
            search: ScaleSearch::default(),
            importance: Importance::default(),
            sweeps: 2,
            refit: true,
        }
    }
}

/// What happened. Errors are sums of `d H d^T` over rows, without damping.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Facts {
    /// What was added to the diagonal; `None` when no factor was found and every number was rounded to nearest.
    pub damping: Option<f64>,
    /// How often the damping was made ten times as large.
    pub escalations: u32,
    /// Columns whose input was always 0.
    pub dead: usize,
    /// Error of rounding to nearest with the scales of whole ranges.
    pub error_nearest: f64,
    /// Error of rounding to nearest with the chosen scales.
    pub error_scales: f64,
    /// Error of the result.
    pub error: f64,
    /// Rows for which rounding to nearest was no worse than GPTQ.
    pub rows_nearest: usize,
}

/// A weight as it is to be stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Rewritten {
    /// One code a byte, row by row.
    pub codes: Vec<u8>,
    /// Scales and zero points.
    pub params: Params,
    /// What happened.
    pub facts: Facts,
}

/// Quantizes `w`, row-major `n x k`, so that `W x` changes little for the tokens `x` that `h` was made of.
///
/// # Errors
/// Numbers that are not finite in `w`, `h` or the options, a Hessian of another size, and a scheme that numbers cannot
/// be quantized to.
pub fn rewrite(
    w: &[f32],
    n: usize,
    k: usize,
    h: &Hessian,
    scheme: &Scheme,
    options: &GptqOptions,
) -> Result<Rewritten> {
    if n.checked_mul(k) != Some(w.len()) || h.k() != k {
        let text = format!("{} numbers and a Hessian of {} channels are not {n} x {k}", w.len(), h.k());
        return Err(Diag::bug(text));
    }
    if !(options.damp >= 0.0 && options.damp.is_finite()) {
        let text = format!("the damping {} is not finite and at least 0", options.damp);
        return Err(Diag::pipeline(text).help("0.01 is usual"));
    }
    if let Some((i, j)) = h.first_not_finite() {
        let text = format!("element [{i}, {j}] of the Hessian is {}", h.get(i, j));
        return Err(Diag::input(text).help("activations of this size need a calibration with fewer tokens"));
    }
    let groups = Groups::new(scheme, &Shape::fixed(&[n as u64, k as u64]))?;
    let whole = ScaleSearch { steps: 0, ..options.search };
    let plain = fit_scales(w, &groups, scheme, Weighting::Uniform, whole)?;
    let rounder = Rounder::new(scheme.format)
        .ok_or_else(|| Diag::pipeline(format!("{} is not a format to quantize to", scheme.format)))?;
    let (factor, escalations) = factor(h, options.act_order, options.damp);
    let facts = Facts {
        damping: factor.as_ref().map(|f| f.damping),
        escalations,
        dead: h.diag().iter().filter(|&&x| x == 0.0).count(),
        ..Facts::default()
    };
    let fitted = match options.search.steps {
        0 => plain.clone(),
        _ => fit(w, &groups, scheme, h, factor.as_ref(), options)?,
    };
    let free = options.refit && options.search.rule == ScaleRule::Real && groups.rows_per_group() == 1;
    let refit = Some(scheme.scale).filter(|_| free);
    let job =
        Job { w, groups, rounder, h, factor, plain: &plain, fitted: &fitted, sweeps: options.sweeps, refit };
    let mut codes = vec![0; w.len()];
    let strips = codes.par_chunks_mut((ROWS * k).max(1)).enumerate().with_max_len(1);
    let (errors, scales): (Vec<Vec<RowErrors>>, Vec<Vec<f32>>) = strips
        .map(|(i, codes)| {
            let rows = i * ROWS..n.min((i + 1) * ROWS);
            job.run(rows, codes)
        })
        .unzip();
    let errors: Vec<RowErrors> = errors.into_iter().flatten().collect();
    let params = match refit {
        Some(_) => Params { scales: scales.concat(), ..fitted },
        None => fitted,
    };
    let mut rewritten = Rewritten { codes, params, facts };
    for (band, errors) in errors.chunks(groups.rows_per_group()).enumerate() {
        let sum = |of: fn(&RowErrors) -> f64| errors.iter().map(of).sum::<f64>();
        let (plain_error, error) = (sum(|e| e.plain), sum(|e| e.error));
        let facts = &mut rewritten.facts;
        facts.error_nearest += plain_error;
        facts.error_scales += sum(|e| e.fitted);
        facts.rows_nearest += errors.iter().filter(|e| !e.by_gptq || plain_error < error).count();
        facts.error += error.min(plain_error);
        if plain_error < error {
            rewritten.fall_back(w, &groups, scheme, &plain, band)?;
        }
    }
    Ok(rewritten)
}

/// The scales that the options ask for.
fn fit(
    w: &[f32],
    groups: &Groups,
    scheme: &Scheme,
    h: &Hessian,
    factor: Option<&Factor>,
    options: &GptqOptions,
) -> Result<Params> {
    let mut by_column = h.diag();
    let weighting = match options.importance {
        Importance::Uniform => Weighting::Uniform,
        Importance::Diagonal => Weighting::Diagonal(&by_column),
        Importance::Block => Weighting::Block(h),
        Importance::Pivots => {
            for (&col, &pivot) in factor.iter().flat_map(|f| f.order.iter().zip(&f.pivots)) {
                by_column[col] = pivot as f32;
            }
            Weighting::Diagonal(&by_column)
        }
    };
    fit_scales(w, groups, scheme, weighting, options.search)
}

/// What [`rewrite`] does to each strip of rows.
struct Job<'a> {
    w: &'a [f32],
    groups: Groups,
    rounder: Rounder,
    h: &'a Hessian,
    factor: Option<Factor>,
    /// The scales of whole ranges.
    plain: &'a Params,
    /// The chosen scales.
    fitted: &'a Params,
    sweeps: u32,
    /// The type of scales when they are fitted again.
    refit: Option<Float>,
}

impl Job<'_> {
    /// Writes the best codes of `rows` for the chosen scales. Also returns the scales, row by row, when they are fitted again.
    fn run(&self, rows: Range<usize>, codes: &mut [u8]) -> (Vec<RowErrors>, Vec<f32>) {
        let slab = |params| Slab::new(self.w, rows.clone(), &self.groups, params, self.rounder);
        let plain = {
            let slab = slab(self.plain);
            slab.errors(&slab.nearest(), self.h)
        };
        let slab = slab(self.fitted);
        let mut best = slab.nearest();
        let fitted = slab.errors(&best, self.h);
        let mut errors = fitted.clone();
        let mut by_gptq = vec![false; rows.len()];
        if let Some(factor) = &self.factor {
            by_gptq = self.improve(&slab, &mut best, &mut errors, &slab.feed_back(factor));
        }
        if self.sweeps > 0 {
            let mut next = best.clone();
            for _ in 0..self.sweeps {
                if !slab.descend(self.h, self.refit, &mut next) {
                    break;
                }
            }
            self.improve(&slab, &mut best, &mut errors, &next);
        }
        slab.write(&best, codes);
        let row = |i: usize| RowErrors {
            plain: plain[i],
            fitted: fitted[i],
            error: errors[i],
            by_gptq: by_gptq[i],
        };
        let scales = if self.refit.is_some() { slab.scales(&best) } else { vec![] };
        ((0..rows.len()).map(row).collect(), scales)
    }

    /// Takes over from `next` the rows with less error, and says which. An error that is not a number is not less.
    fn improve(
        &self,
        slab: &Slab<'_>,
        best: &mut Solution,
        errors: &mut [f64],
        next: &Solution,
    ) -> Vec<bool> {
        let found = slab.errors(next, self.h);
        let better: Vec<bool> = found.iter().zip(errors.iter()).map(|(new, old)| new < old).collect();
        slab.take(best, next, &better);
        for (error, new) in errors.iter_mut().zip(found) {
            *error = if new < *error { new } else { *error };
        }
        better
    }
}

/// The errors of a row: rounded to nearest with the scales of whole ranges, with the chosen ones, and of the result.
struct RowErrors {
    plain: f64,
    fitted: f64,
    error: f64,
    by_gptq: bool,
}

impl Rewritten {
    /// Rounds the rows of one row of groups to nearest, with the scales `plain`.
    fn fall_back(
        &mut self,
        w: &[f32],
        groups: &Groups,
        scheme: &Scheme,
        plain: &Params,
        band: usize,
    ) -> Result<()> {
        let (tall, wide, k) = (groups.rows_per_group(), groups.grid().1, groups.cols());
        let of_band = band * wide..(band + 1) * wide;
        self.params.scales[of_band.clone()].copy_from_slice(&plain.scales[of_band.clone()]);
        if !plain.zeros.is_empty() {
            self.params.zeros[of_band.clone()].copy_from_slice(&plain.zeros[of_band]);
        }
        let rows = band * tall..groups.rows().min((band + 1) * tall);
        let numbers = rows.start * k..rows.end * k;
        let codes = &mut self.codes[numbers.clone()];
        quantc_ir::quant::quantize_block(groups, scheme, plain, rows.start, &w[numbers], codes)
    }
}

/// The error `d H d^T` of each row of `d`, row-major `n x k`.
pub fn output_errors(d: &[f32], h: &Hessian) -> Vec<f64> {
    let k = h.k();
    let strip = |d: &[f32]| {
        let n = d.len() / k;
        let mut by_columns = vec![0.0; d.len()];
        product::transpose(d, n, k, k, &mut by_columns, n);
        solve::quadratic(&by_columns, n, h)
    };
    d.par_chunks((ROWS * k).max(1)).map(strip).collect::<Vec<_>>().concat()
}

#[cfg(test)]
mod tests;
