//! Scales that lose little where it matters.
//!
//! Each group of a weight is tried with its range as it is and with a grid of narrower ones, and the scale with the
//! least weighted error is taken. Which error counts is the [`Weighting`].

use super::product::{Mat, product};
use super::round::Rounder;
use super::solve::corner;
use crate::calib::hessian::Hessian;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::formats::Class;
use quantc_ir::quant::{Fit, Groups, Options, Params, ScaleRule, Span, scale_for};
use quantc_ir::scheme::{Scheme, Zero};
use rayon::prelude::*;

/// Which ranges are tried.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaleSearch {
    /// From range to scale.
    pub rule: ScaleRule,
    /// Number of ranges beside the whole one; 0 takes the whole range without looking.
    pub steps: u32,
    /// The narrowest range, as a part of the whole one.
    pub least: f32,
}

impl Default for ScaleSearch {
    fn default() -> ScaleSearch {
        ScaleSearch { rule: ScaleRule::Real, steps: 24, least: 0.4 }
    }
}

/// Which error a scale is chosen by. `d` are the errors of the numbers of one row in one group.
#[derive(Clone, Copy, Debug)]
pub enum Weighting<'a> {
    /// `sum of d[j]^2`.
    Uniform,
    /// `sum of h[j] d[j]^2`, with one weight per column.
    Diagonal(&'a [f32]),
    /// `d H d^T` with the part of the Hessian that belongs to the group; groups wider than 128 columns are cut into
    /// pieces of 128, whose errors are summed.
    Block(&'a Hessian),
}

/// Columns of a piece of a group.
const PIECE: usize = 128;

/// Rows of a task, unless a group spans more.
const ROWS: usize = 64;

/// Finds the scales and zero points of `w`, whose rows and columns `groups` knows.
///
/// The candidates of a group are `scale_for` its range times `1 - (1 - least) i / steps`. Symmetric integers of 3 and
/// 2 bits also try ranges beyond the whole one, up to where the largest positive code meets the largest number. The
/// first candidate is the whole range; later ones are taken when they are better. With zero points, the ends of the best
/// range are then moved each by itself.
///
/// # Errors
/// Numbers or options that are not finite, a scheme that numbers cannot be quantized to, weights or a Hessian of another
/// size.
pub fn fit_scales(
    w: &[f32],
    groups: &Groups,
    scheme: &Scheme,
    weighting: Weighting<'_>,
    search: ScaleSearch,
) -> Result<Params> {
    let (n, k) = (groups.rows(), groups.cols());
    let Some(rounder) = Rounder::new(scheme.format) else {
        return Err(Diag::pipeline(format!("{} is not a format to quantize to", scheme.format)));
    };
    let known = match weighting {
        Weighting::Uniform => k,
        Weighting::Diagonal(h) => h.len(),
        Weighting::Block(h) => h.k(),
    };
    if w.len() != n * k || known != k {
        return Err(Diag::bug(format!(
            "{} numbers with {known} weights of columns are not {n} x {k}",
            w.len()
        )));
    }
    if !(search.least > 0.0 && search.least <= 1.0) {
        let text =
            format!("the narrowest range, {} of the whole one, is not above 0 and at most 1", search.least);
        return Err(Diag::pipeline(text));
    }
    let options = Options { rule: search.rule, ..Options::default() };
    let mut fit = Fit::new(*groups, scheme, options);
    fit.add_ranges(0, w)?;
    let factors = factors(scheme, search);
    if factors.len() == 1 || n * k == 0 {
        return fit.finish();
    }
    let mut trial = Trial {
        w,
        groups,
        scheme,
        rule: search.rule,
        rounder,
        spans: fit.spans(),
        weights: Weights::new(weighting, groups),
        factors: factors.into_iter().map(|f| [f, f]).collect(),
        start: vec![],
    };
    let mut found = trial.decide()?;
    if scheme.zero != Zero::Symmetric {
        trial.factors = AROUND.iter().flat_map(|&a| AROUND.map(|b| [a, b])).collect();
        trial.start = found.iter().map(|c| c.ends).collect();
        found = trial.decide()?;
    }
    let zeros = if scheme.zero == Zero::Symmetric { &[] } else { &found[..] };
    Ok(Params {
        scales: found.iter().map(|c| c.scale).collect(),
        zeros: zeros.iter().map(|c| c.zero).collect(),
    })
}

/// What each end of the best range is multiplied by when there are zero points.
const AROUND: [f32; 4] = [1.0, 0.8, 0.9, 1.1];

/// A scale with its zero point, and what the numbers of the group lose by it.
#[derive(Clone, Copy)]
struct Candidate {
    /// The ends of its range, as parts of those of the group's.
    ends: [f32; 2],
    scale: f32,
    zero: i32,
    loss: f64,
}

/// The candidates of one group; the first is where the search begins.
type Tried = Vec<Candidate>;

/// The first candidate with the least loss.
fn best(tried: &[Candidate]) -> Candidate {
    tried[1..].iter().fold(tried[0], |best, &next| if next.loss < best.loss { next } else { best })
}

/// What a range is multiplied by; 1 comes first.
fn factors(scheme: &Scheme, search: ScaleSearch) -> Vec<f32> {
    // Where the whole range falls short of the last positive code, see `quantc_ir::quant`.
    let most = match scheme.format.class {
        Class::Int { signed: true } if scheme.zero == Zero::Symmetric && scheme.format.bits < 4 => {
            ((1 << (scheme.format.bits - 1)) as f32 - 0.5) / scheme.format.max()
        }
        _ => 1.0,
    };
    let grid = (0..=search.steps).map(|i| most - (most - search.least) * i as f32 / search.steps as f32);
    let others = grid.filter(|&f| search.steps > 0 && f != 1.0);
    std::iter::once(1.0).chain(others).collect()
}

/// A [`Weighting`] as it is used.
enum Weights<'a> {
    Uniform,
    Diagonal(&'a [f32]),
    /// The corners of the Hessian at each piece of each group of columns, in order.
    Block(Vec<Vec<f32>>),
}

impl Weights<'_> {
    fn new<'a>(weighting: Weighting<'a>, groups: &Groups) -> Weights<'a> {
        match weighting {
            Weighting::Uniform => Weights::Uniform,
            Weighting::Diagonal(h) => Weights::Diagonal(h),
            Weighting::Block(h) => {
                let pieces: Vec<_> = (0..groups.grid().1).flat_map(|at| pieces(groups, at)).collect();
                Weights::Block(pieces.into_par_iter().map(|(from, to)| corner(h, from, to)).collect())
            }
        }
    }
}

/// The columns of the pieces of a column of groups.
fn pieces(groups: &Groups, at: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
    let from = at * groups.cols_per_group();
    let to = groups.cols().min(from + groups.cols_per_group());
    (from..to).step_by(PIECE).map(move |from| (from, to.min(from + PIECE)))
}

/// What candidates are tried on.
struct Trial<'a> {
    w: &'a [f32],
    groups: &'a Groups,
    scheme: &'a Scheme,
    rule: ScaleRule,
    rounder: Rounder,
    spans: &'a [Span],
    weights: Weights<'a>,
    /// What the ends of ranges are multiplied by; the first are 1.
    factors: Vec<[f32; 2]>,
    /// For each group, the ends that are multiplied, as parts of those of its range; nothing for whole ranges.
    start: Vec<[f32; 2]>,
}

impl Trial<'_> {
    /// The best candidate of each group.
    fn decide(&self) -> Result<Vec<Candidate>> {
        let (n, tall) = (self.groups.rows(), self.groups.rows_per_group());
        // Whole groups a task, unless one is tall: then what its rows lose is added up in order.
        let step = if tall > ROWS { ROWS } else { ROWS / tall * tall };
        let tasks: Vec<usize> = (0..n).step_by(step).collect();
        let mut all: Vec<Tried> = Vec::with_capacity(self.groups.len());
        // Batches bound the memory of what was tried.
        for batch in tasks.chunks(4 * rayon::current_num_threads()) {
            let run = |&from: &usize| self.run(from, n.min(from + step));
            let done: Vec<(usize, Vec<Tried>)> =
                batch.par_iter().with_max_len(1).map(run).collect::<Result<_>>()?;
            for (group, tried) in done {
                // What is there already are groups that began in rows before.
                let (again, new) = tried.split_at(all.len() - group);
                for (sum, tried) in all[group..].iter_mut().zip(again) {
                    sum.iter_mut().zip(tried).for_each(|(sum, tried)| sum.loss += tried.loss);
                }
                // Groups that no later row belongs to are decided, and only what was best is kept.
                if tall <= ROWS {
                    all.extend(new.iter().map(|tried| vec![best(tried)]));
                } else {
                    all.extend_from_slice(new);
                }
            }
        }
        Ok(all.iter().map(|tried| best(tried)).collect())
    }

    /// The candidates of all groups in the rows `from..to` with their losses there, and the first of these groups.
    fn run(&self, from: usize, to: usize) -> Result<(usize, Vec<Tried>)> {
        let (groups, k) = (self.groups, self.groups.cols());
        let wide = groups.grid().1;
        let first = groups.index(from, 0);
        let last = groups.index(to - 1, 0) + wide;
        let mut all: Vec<Tried> = (first..last).map(|group| self.candidates(group)).collect::<Result<_>>()?;
        let (mut errors, mut slopes) = (vec![], vec![]);
        let mut piece = 0;
        for at in 0..wide {
            for (left, right) in pieces(groups, at) {
                let n = right - left;
                let group_of = |row| groups.index(row, 0) + at - first;
                errors.clear();
                for row in from..to {
                    let xs = &self.w[row * k + left..row * k + right];
                    for candidate in &all[group_of(row)] {
                        let start = errors.len();
                        errors.resize(start + n, 0.0);
                        self.rounder.errors(xs, candidate.scale, candidate.zero, &mut errors[start..]);
                    }
                }
                if let Weights::Block(corners) = &self.weights {
                    let count = errors.len() / n;
                    slopes.resize(errors.len(), 0.0);
                    let corner = Mat::new(&corners[piece], n, n, n);
                    product(&mut slopes, n, 0.0, 1.0, Mat::new(&errors, count, n, n), corner);
                }
                let mut lines = errors.chunks_exact(n).enumerate();
                for row in from..to {
                    for (candidate, (line, d)) in all[group_of(row)].iter_mut().zip(&mut lines) {
                        candidate.loss += f64::from(match &self.weights {
                            Weights::Uniform => dot(d, d),
                            Weights::Diagonal(h) => weighted(&h[left..right], d),
                            Weights::Block(_) => dot(d, &slopes[line * n..][..n]),
                        });
                    }
                }
                piece += 1;
            }
        }
        Ok((first, all))
    }

    /// What a group is tried with. Scales that occur again are left out.
    fn candidates(&self, group: usize) -> Result<Tried> {
        let (span, start) = (self.spans[group], self.start.get(group).unwrap_or(&[1.0; 2]));
        let mut found: Tried = vec![];
        for factors in &self.factors {
            let ends = [start[0] * factors[0], start[1] * factors[1]];
            let end = |x: f32, factor: f32| (x * factor).clamp(-f32::MAX, f32::MAX);
            let range = Span::new(end(span.min(), ends[0]), end(span.max(), ends[1]));
            match scale_for(range, self.scheme, self.rule) {
                Ok((scale, zero)) if !found.iter().any(|c| (c.scale, c.zero) == (scale, zero)) => {
                    found.push(Candidate { ends, scale, zero, loss: 0.0 });
                }
                // The scale of a range that is wider than the first may be too large for its type.
                Err(diag) if found.is_empty() => return Err(diag),
                _ => {}
            }
        }
        Ok(found)
    }
}

/// The sum of products, as eight interleaved sums.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

/// The sum of squares of `d`, each times its weight.
fn weighted(h: &[f32], d: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    for (h, d) in h.chunks(8).zip(d.chunks(8)) {
        for ((sum, h), d) in sums.iter_mut().zip(h).zip(d) {
            *sum += h * d * d;
        }
    }
    sums.iter().sum()
}
