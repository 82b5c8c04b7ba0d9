//! Codes of some rows for given scales: rounding with feedback, rounding alone, and descent from either.
//!
//! Given the factor, rows do not depend on one another. A task takes [`ROWS`] of them, stored by columns (`k x lanes`,
//! the lanes of one column next to each other), so that whatever is done to a column is done to sixteen rows at a
//! time. What a block of columns receives from all columns visited before is one matrix product.

use super::factor::{BLOCK, Factor};
use super::product::{LANES, Mat, product, transpose};
use super::round::{Lanes, Rounder};
use crate::calib::hessian::Hessian;
use quantc_ir::quant::{Groups, Params, stored_scale};
use quantc_ir::ty::Float;
use std::ops::Range;

/// Rows of a task. It does not depend on the number of threads, and so neither do the sums.
pub(super) const ROWS: usize = 128;

/// No scale becomes smaller than this part of itself at once; negative ones are none.
const LEAST_CHANGE: f32 = 0.1;

/// Some rows of a weight, by columns, with their scales.
pub(super) struct Slab<'a> {
    groups: &'a Groups,
    rounder: Rounder,
    rows: Range<usize>,
    lanes: usize,
    /// `k x lanes`; the lanes beyond the rows are 0.
    w: Vec<f32>,
    /// One row of lanes per column of groups.
    scales: Vec<f32>,
    zeros: Vec<f32>,
}

/// Codes and scales of a [`Slab`] and what they make of it.
#[derive(Clone)]
pub(super) struct Solution {
    /// `k x lanes`, one code a byte.
    pub(super) codes: Vec<u8>,
    /// One row of lanes per column of groups.
    pub(super) scales: Vec<f32>,
    /// `k x lanes`: the quantized number less the number.
    pub(super) delta: Vec<f32>,
}

impl<'a> Slab<'a> {
    /// The rows `rows` of `w`, which is `n x k`.
    pub(super) fn new(
        w: &[f32],
        rows: Range<usize>,
        groups: &'a Groups,
        params: &Params,
        rounder: Rounder,
    ) -> Slab<'a> {
        let (n, k) = (rows.len(), groups.cols());
        let lanes = n.next_multiple_of(LANES);
        let mut by_columns = vec![0.0; k * lanes];
        transpose(&w[rows.start * k..rows.end * k], n, k, k, &mut by_columns, lanes);
        let wide = groups.grid().1;
        let (mut scales, mut zeros) = (vec![1.0; wide * lanes], vec![0.0; wide * lanes]);
        for (lane, row) in rows.clone().enumerate() {
            for at in 0..wide {
                let (scale, zero) = params.get(groups.index(row, 0) + at);
                scales[at * lanes + lane] = scale;
                zeros[at * lanes + lane] = zero as f32;
            }
        }
        Slab { groups, rounder, rows, lanes, w: by_columns, scales, zeros }
    }

    fn k(&self) -> usize {
        self.groups.cols()
    }

    /// Where the scales and zero points of sixteen lanes from `lane` on at a column are.
    #[inline(always)]
    fn group(&self, col: usize, lane: usize) -> usize {
        col / self.groups.cols_per_group() * self.lanes + lane
    }

    /// Every number to the code nearest to it.
    pub(super) fn nearest(&self) -> Solution {
        let mut out = self.blank();
        for col in 0..self.k() {
            for lane in (0..self.lanes).step_by(LANES) {
                let at = col * self.lanes + lane;
                let x = *sixteen(&self.w, at);
                self.put(&mut out, col, lane, &x);
            }
        }
        out
    }

    /// GPTQ: every column, in the order of the factor, to the codes nearest to it and the feedback of the errors of
    /// all columns before it.
    pub(super) fn feed_back(&self, factor: &Factor) -> Solution {
        let (k, lanes) = (self.k(), self.lanes);
        let mut out = self.blank();
        // By position, what the columns before have left to be made up for: the number less the quantized number.
        let mut errors = vec![0.0f32; k * lanes];
        let mut goal = vec![0.0f32; BLOCK.min(k) * lanes];
        let mut tile = [[0.0f32; LANES]; BLOCK];
        for from in (0..k).step_by(BLOCK).rev() {
            let to = k.min(from + BLOCK);
            for (goal, &col) in goal.chunks_mut(lanes).zip(&factor.order[from..to]) {
                goal.copy_from_slice(&self.w[col * lanes..][..lanes]);
            }
            // `goal[j] += sum over i >= to of feedback[i, j] errors[i]`.
            let below = factor.feedback.get(to * k + from..).unwrap_or_default();
            let feedback = Mat::new(below, k - to, to - from, k).t();
            product(
                &mut goal,
                lanes,
                1.0,
                1.0,
                feedback,
                Mat::new(&errors[to * lanes..], k - to, lanes, lanes),
            );
            for lane in (0..lanes).step_by(LANES) {
                let part = &mut tile[..to - from];
                for (part, goal) in part.iter_mut().zip(goal.chunks(lanes)) {
                    *part = *sixteen(goal, lane);
                }
                for i in (from..to).rev() {
                    let (ahead, x) = part.split_at_mut(i - from);
                    let col = factor.order[i];
                    let y = self.put(&mut out, col, lane, &x[0]);
                    let w = sixteen(&self.w, col * lanes + lane);
                    let e: Lanes = std::array::from_fn(|l| w[l] - y[l]);
                    errors[i * lanes + lane..][..LANES].copy_from_slice(&e);
                    push(ahead, &factor.feedback[i * k + from..], &e);
                }
            }
        }
        out
    }

    /// One sweep of coordinate descent: every number, from the left, to the code that is best given all others.
    /// With `D` for the errors and `G = D H`, the best place for number `j` is `W[j] + D[j] - G[j] / H[j, j]`.
    ///
    /// With `scales`, the type of scales, each scale is first set to what is best given all codes and all other scales, where
    /// that is better by more than is lost by storing it. Groups of more than [`BLOCK`] columns keep theirs.
    ///
    /// Returns whether anything changed.
    pub(super) fn descend(&self, h: &Hessian, scales: Option<Float>, out: &mut Solution) -> bool {
        let (k, lanes) = (self.k(), self.lanes);
        let mut slope = vec![0.0f32; BLOCK.min(k) * lanes];
        let mut tile = [[0.0f32; LANES]; BLOCK];
        let mut changed = false;
        let wide = self.groups.cols_per_group();
        let scales = scales.filter(|_| wide <= BLOCK);
        // Blocks have whole groups.
        let step = if scales.is_some() { BLOCK / wide * wide } else { BLOCK };
        for from in (0..k).step_by(step) {
            let to = k.min(from + step);
            let corner = corner(h, from, to);
            let n = to - from;
            let delta =
                |rows: Range<usize>| Mat::new(&out.delta[rows.start * lanes..], rows.len(), lanes, lanes);
            let before = Mat::new(h.rows_from(from), n, from, k);
            product(&mut slope, lanes, 0.0, 1.0, before, delta(0..from));
            product(&mut slope, lanes, 1.0, 1.0, Mat::new(&corner, n, n, n), delta(from..to));
            let after = h.rows_from(to).get(from..).unwrap_or_default();
            product(&mut slope, lanes, 1.0, 1.0, Mat::new(after, k - to, n, k).t(), delta(to..k));
            for lane in (0..lanes).step_by(LANES) {
                let part = &mut tile[..n];
                for (part, slope) in part.iter_mut().zip(slope.chunks(lanes)) {
                    *part = *sixteen(slope, lane);
                }
                if let Some(scales) = scales {
                    for first in (from..to).step_by(wide) {
                        let group = first..to.min(first + wide);
                        changed |= self.rescale(out, scales, (group, lane), (&corner, from), part);
                    }
                }
                for col in from..to {
                    let row = &corner[(col - from) * n..][..n];
                    let weight = row[col - from];
                    if weight <= 0.0 {
                        // What nothing is read of stays nearest, whatever became of its scale.
                        if scales.is_some() {
                            let w = *sixteen(&self.w, col * lanes + lane);
                            self.put(out, col, lane, &w);
                        }
                        continue;
                    }
                    let (g, ahead) = part[col - from..].split_at_mut(1);
                    let at = col * lanes + lane;
                    let (w, old) = (sixteen(&self.w, at), *sixteen(&out.delta, at));
                    let goal: Lanes = std::array::from_fn(|l| w[l] + old[l] - g[0][l] / weight);
                    self.put(out, col, lane, &goal);
                    let new = sixteen(&out.delta, at);
                    let step: Lanes = std::array::from_fn(|l| new[l] - old[l]);
                    if step != [0.0; LANES] {
                        push(ahead, &row[col - from + 1..], &step);
                        changed = true;
                    }
                }
            }
        }
        changed
    }

    /// Sets the scales of the group of columns `group` for sixteen lanes from `lane` on to what is best given all codes. `corner` is
    /// the part of the Hessian of the block, which begins at column `from`, and `slope` its part of `D H`, which is kept up to date.
    /// Returns whether any changed.
    ///
    /// With `Q` for what the codes of the group stand for, a scale larger by `s` makes the error larger by `2 s G Q + s^2 Q H Q`.
    #[inline(always)]
    fn rescale(
        &self,
        out: &mut Solution,
        scales: Float,
        (group, lane): (Range<usize>, usize),
        (corner, from): (&[f32], usize),
        slope: &mut [Lanes],
    ) -> bool {
        let n = slope.len();
        let place = self.group(group.start, lane);
        let (old, zero) = (*sixteen(&out.scales, place), *sixteen(&self.zeros, place));
        let mut units = [[0.0f32; LANES]; BLOCK];
        let mut through = [[0.0f32; LANES]; BLOCK];
        for (unit, col) in units.iter_mut().zip(group.clone()) {
            let at = col * self.lanes + lane;
            let (w, delta) = (sixteen(&self.w, at), sixteen(&out.delta, at));
            let y: Lanes = std::array::from_fn(|l| (w[l] + delta[l]) / old[l]);
            *unit = self.rounder.round(&y, &[1.0; LANES], &zero);
            push(&mut through[..n], &corner[(col - from) * n..][..n], unit);
        }
        let units = &units[..group.len()];
        let (mut along, mut curved) = ([0.0f32; LANES], [0.0f32; LANES]);
        for (unit, i) in units.iter().zip(group.start - from..) {
            for l in 0..LANES {
                along[l] += unit[l] * slope[i][l];
                curved[l] += unit[l] * through[i][l];
            }
        }
        let mut steps = [0.0f32; LANES];
        for l in 0..LANES {
            let Ok(new) = stored_scale(old[l] - along[l] / curved[l], scales) else { continue };
            let step = new - old[l];
            if new > old[l] * LEAST_CHANGE
                && new.is_finite()
                && step * (2.0 * along[l] + step * curved[l]) < 0.0
            {
                (steps[l], out.scales[place + l]) = (step, new);
            }
        }
        if steps == [0.0; LANES] {
            return false;
        }
        for (slope, through) in slope.iter_mut().zip(&through) {
            (0..LANES).for_each(|l| slope[l] += steps[l] * through[l]);
        }
        for (unit, col) in units.iter().zip(group) {
            let at = col * self.lanes + lane;
            let w = sixteen(&self.w, at);
            for l in (0..LANES).filter(|&l| steps[l] != 0.0) {
                out.delta[at + l] = unit[l] * out.scales[place + l] - w[l];
            }
        }
        true
    }

    /// Stores codes, errors and, as the result, the numbers that `x` is rounded to.
    #[inline(always)]
    fn put(&self, out: &mut Solution, col: usize, lane: usize, x: &Lanes) -> Lanes {
        let at = col * self.lanes + lane;
        let group = self.group(col, lane);
        let (scale, zero) = (sixteen(&out.scales, group), sixteen(&self.zeros, group));
        let y = self.rounder.round(x, scale, zero);
        let codes = self.rounder.codes(x, scale, zero);
        let w = sixteen(&self.w, at);
        for (l, delta) in out.delta[at..at + LANES].iter_mut().enumerate() {
            *delta = y[l] - w[l];
        }
        out.codes[at..at + LANES].copy_from_slice(&codes);
        y
    }

    fn blank(&self) -> Solution {
        let len = self.k() * self.lanes;
        Solution { codes: vec![0; len], scales: self.scales.clone(), delta: vec![0.0; len] }
    }

    /// The error `d H d^T` of each row.
    pub(super) fn errors(&self, solution: &Solution, h: &Hessian) -> Vec<f64> {
        let mut errors = quadratic(&solution.delta, self.lanes, h);
        errors.truncate(self.rows.len());
        errors
    }

    /// Takes over the rows of `other` that `which` names.
    pub(super) fn take(&self, to: &mut Solution, other: &Solution, which: &[bool]) {
        if !which.contains(&true) {
            return;
        }
        for col in 0..self.k() {
            let at = col * self.lanes;
            for lane in (0..which.len()).filter(|&lane| which[lane]) {
                to.codes[at + lane] = other.codes[at + lane];
                to.delta[at + lane] = other.delta[at + lane];
            }
        }
        for at in (0..to.scales.len()).step_by(self.lanes) {
            for lane in (0..which.len()).filter(|&lane| which[lane]) {
                to.scales[at + lane] = other.scales[at + lane];
            }
        }
    }

    /// The scales of a solution, row by row.
    pub(super) fn scales(&self, solution: &Solution) -> Vec<f32> {
        let wide = self.groups.grid().1;
        let mut scales = vec![0.0; self.rows.len() * wide];
        transpose(&solution.scales, wide, self.rows.len(), self.lanes, &mut scales, wide);
        scales
    }

    /// Writes the codes row by row.
    pub(super) fn write(&self, solution: &Solution, codes: &mut [u8]) {
        transpose(&solution.codes, self.k(), self.rows.len(), self.lanes, codes, self.k());
    }
}

/// `d H d^T` for every lane of `d`, which is `k x lanes`. From the lower triangle alone: each pair of columns counts
/// twice. Products are made in `f32`, the sum over columns in `f64`.
pub(super) fn quadratic(d: &[f32], lanes: usize, h: &Hessian) -> Vec<f64> {
    let k = h.k();
    let mut errors = vec![0.0f64; lanes];
    let mut slope = vec![0.0f32; BLOCK.min(k) * lanes];
    for from in (0..k).step_by(BLOCK) {
        let to = k.min(from + BLOCK);
        let n = to - from;
        let before = Mat::new(h.rows_from(from), n, from, k);
        product(&mut slope, lanes, 0.0, 2.0, before, Mat::new(d, from, lanes, lanes));
        let corner = corner(h, from, to);
        let inside = Mat::new(&d[from * lanes..], n, lanes, lanes);
        product(&mut slope, lanes, 1.0, 1.0, Mat::new(&corner, n, n, n), inside);
        for (slope, d) in slope.chunks(lanes).zip(d[from * lanes..to * lanes].chunks(lanes)) {
            for ((error, &g), &d) in errors.iter_mut().zip(slope).zip(d) {
                *error += f64::from(g) * f64::from(d);
            }
        }
    }
    errors
}

/// The columns and rows `from..to` of the symmetric matrix.
pub(super) fn corner(h: &Hessian, from: usize, to: usize) -> Vec<f32> {
    let n = to - from;
    let mut corner = vec![0.0; n * n];
    for i in 0..n {
        for (j, &x) in h.lower_row(from + i)[from..].iter().enumerate() {
            corner[i * n + j] = x;
            corner[j * n + i] = x;
        }
    }
    corner
}

/// `to[i] += factors[i] * x` for sixteen lanes.
#[inline(always)]
fn push(to: &mut [Lanes], factors: &[f32], x: &Lanes) {
    for (to, &factor) in to.iter_mut().zip(factors) {
        for (to, x) in to.iter_mut().zip(x) {
            *to += factor * x;
        }
    }
}

#[inline(always)]
fn sixteen(xs: &[f32], at: usize) -> &Lanes {
    xs[at..].first_chunk().expect("lanes come in sixteens")
}
