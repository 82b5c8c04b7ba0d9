//! The triangular factor that tells how the error of one column is made up for by the columns after it.
//!
//! GPTQ takes `U` of `H^-1 = U^T U`, with `U` upper triangular, and passes the error of column `i` on to column `j > i`
//! in proportion `U[i, j] / U[i, i]`. Chee et al. 2023 (QuIP, theorem 6) show that this is the same as feeding back
//! `a[i, j] = R[i, j] / R[j, j]` of `H = R R^T`, with `R` upper triangular: column `j` is rounded after
//! `sum over i < j of (W[i] - W'[i]) a[i, j]` was added to it. So no inverse is needed at all. Here the columns are
//! put in the reverse of the order they are visited in, which turns `R` into the usual lower Cholesky factor `L`.

use super::product::{Mat, product};
use crate::calib::hessian::Hessian;
use rayon::prelude::*;

/// Columns of a block.
pub(super) const BLOCK: usize = 128;

/// Rows of the matrix that one task computes.
const STRIP: usize = 128;

/// How often the damping is made ten times as large before the factorization is given up.
const ESCALATIONS: u32 = 6;

/// The damping that follows 0, as a part of the mean of the diagonal.
const LEAST_DAMP: f64 = 1e-4;

/// The feedback of a damped Hessian.
pub(super) struct Factor {
    /// The column at each position. Positions are visited from the last to the first.
    pub(super) order: Vec<usize>,
    /// Row-major `k x k` by positions: `[i, j]` with `i > j` is what a unit of error at `i` adds to the column at `j`.
    pub(super) feedback: Vec<f32>,
    /// `L[i, i]^2`, by position: the weight of the rounding error made at `i`, in units of the Hessian.
    pub(super) pivots: Vec<f64>,
    /// What was added to the diagonal.
    pub(super) damping: f64,
}

/// The columns in reverse of the order of visits: the one with the largest diagonal is visited first when `act_order`,
/// the leftmost one otherwise. Ties go to the left.
pub(super) fn positions(diag: &[f32], act_order: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..diag.len()).collect();
    if act_order {
        order.sort_by(|&a, &b| diag[b].total_cmp(&diag[a]));
    }
    order.reverse();
    order
}

/// Factors `H + damping` with `damp` times the mean of the diagonal, or with more where that fails. Also returns how
/// often the damping was raised; there is no factor when the last try failed too.
pub(super) fn factor(h: &Hessian, act_order: bool, damp: f64) -> (Option<Factor>, u32) {
    let diag = h.diag();
    let k = diag.len();
    let mean = diag.iter().map(|&x| f64::from(x)).sum::<f64>() / k.max(1) as f64;
    if !(mean > 0.0 && mean.is_finite()) {
        return (None, 0);
    }
    let order = positions(&diag, act_order);
    let mut damp = damp;
    let mut l = vec![0.0f64; k * k];
    for escalations in 0..=ESCALATIONS {
        gather(h, &order, mean, damp, &mut l);
        if cholesky(&mut l, k) {
            let pivots = (0..k).map(|i| l[i * k + i] * l[i * k + i] * mean).collect();
            let feedback = feedback(&l, k);
            return (Some(Factor { order, feedback, pivots, damping: damp * mean }), escalations);
        }
        damp = if damp > 0.0 { damp * 10.0 } else { LEAST_DAMP };
    }
    (None, ESCALATIONS)
}

/// The lower triangle of the Hessian by positions, divided by `mean`, with `damp` added to the diagonal.
fn gather(h: &Hessian, order: &[usize], mean: f64, damp: f64, l: &mut [f64]) {
    let k = order.len();
    l.par_chunks_mut(k).enumerate().for_each(|(i, row)| {
        let col = order[i];
        for (x, &other) in row[..=i].iter_mut().zip(order) {
            *x = f64::from(h.get(col, other)) / mean;
        }
        row[i] += damp;
    });
}

/// `L[i, j] / L[j, j]` below the diagonal.
fn feedback(l: &[f64], k: usize) -> Vec<f32> {
    let inverse: Vec<f64> = (0..k).map(|i| 1.0 / l[i * k + i]).collect();
    let mut out = vec![0.0; k * k];
    out.par_chunks_mut(k).zip(l.par_chunks(k)).enumerate().for_each(|(i, (out, row))| {
        for ((y, x), inverse) in out[..i].iter_mut().zip(row).zip(&inverse) {
            *y = (x * inverse) as f32;
        }
    });
    out
}

/// Overwrites the lower triangle of a symmetric matrix with `L` of `A = L L^T`; `false` when it is not positive
/// definite. By blocks of columns, each of which first makes its own columns final and then is taken off all that is
/// to the right of it.
pub(super) fn cholesky(a: &mut [f64], k: usize) -> bool {
    for from in (0..k).step_by(BLOCK) {
        let to = k.min(from + BLOCK);
        let n = to - from;
        let (done, rest) = a.split_at_mut(to * k);
        let corner = &mut done[from * k..];
        if !cholesky_small(corner, from, n, k) {
            return false;
        }
        let inverse = lower_inverse(corner, from, n, k);
        // The panel below the corner: `L21 = A21 L11^-T`.
        let mut panel = vec![0.0; (k - to) * n];
        let strips = rest.par_chunks_mut(STRIP * k).zip(panel.par_chunks_mut(STRIP * n));
        strips.for_each(|(strip, panel)| {
            let rows = panel.len() / n;
            let old = Mat::new(&strip[from..], rows, n, k);
            product(panel, n, 0.0, 1.0, old, Mat::new(&inverse, n, n, n).t());
            for (to, new) in strip.chunks_mut(k).zip(panel.chunks(n)) {
                to[from..from + n].copy_from_slice(new);
            }
        });
        // What is to the right of it: `A22 -= L21 L21^T`.
        rest.par_chunks_mut(STRIP * k).enumerate().rev().with_max_len(1).for_each(|(i, strip)| {
            let (at, rows) = (i * STRIP, strip.len() / k);
            let left = Mat::new(&panel[at * n..], rows, n, n);
            product(&mut strip[to..], k, 1.0, -1.0, left, Mat::new(&panel, at + rows, n, n).t());
        });
    }
    true
}

/// As [`cholesky`], for the `n x n` matrix at column `at` of rows that are `k` apart.
fn cholesky_small(a: &mut [f64], at: usize, n: usize, k: usize) -> bool {
    for i in 0..n {
        let (above, row) = a.split_at_mut(i * k);
        let row = &mut row[at..at + n];
        for j in 0..i {
            let other = &above[j * k + at..][..=j];
            let dot: f64 = row[..j].iter().zip(other).map(|(x, y)| x * y).sum();
            row[j] = (row[j] - dot) / other[j];
        }
        let square: f64 = row[..i].iter().map(|x| x * x).sum();
        let pivot = row[i] - square;
        // Pivots that are nothing but rounding errors say as little as negative ones.
        if !(pivot > row[i].abs() * 1e-14 && pivot.is_finite()) {
            return false;
        }
        row[i] = pivot.sqrt();
    }
    true
}

/// The inverse of the lower triangular `n x n` matrix at column `at` of rows that are `k` apart.
fn lower_inverse(l: &[f64], at: usize, n: usize, k: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; n * n];
    for i in 0..n {
        let row = &l[i * k + at..][..=i];
        let (above, out) = inverse.split_at_mut(i * n);
        for (j, &x) in row[..i].iter().enumerate() {
            for (y, z) in out[..=j].iter_mut().zip(&above[j * n..]) {
                *y -= x * z;
            }
        }
        for y in &mut out[..i] {
            *y /= row[i];
        }
        out[i] = 1.0 / row[i];
    }
    inverse
}
