//! The Hessian of a linear layer's output error with respect to one row of its weight.
//!
//! For the output `y = W x` and the error `sum over tokens |W x - W' x|^2` it is, but for the factor 2, the sum over
//! tokens of `x x^T` (Frantar et al. 2022, GPTQ, section 3.1): one matrix for all rows. It is symmetric and positive
//! semidefinite; only its lower triangle is computed and kept up to date.
//!
//! Sums are made in `f32` in the order in which blocks of tokens are added. They do not depend on the number of
//! threads, which is that of the rayon pool that the caller runs in. They do depend on the processor's vector units:
//! machines that differ in them may differ in the last bits.

#[cfg(target_arch = "x86_64")]
mod bf16;

use crate::weights::gptq_core::product::{Mat, product};
use quantc_ir::diag::{Diag, Result};
use rayon::prelude::*;

/// Rows of the matrix that one task computes: few enough for even shares, enough for fast products.
const STRIP: usize = 128;

/// The sum of `x x^T` over tokens, `k x k`, and the number of tokens.
#[derive(Clone)]
pub struct Hessian {
    k: usize,
    count: u64,
    /// Row-major `k x k`. What lies above the diagonal has no meaning.
    sum: Vec<f32>,
}

impl PartialEq for Hessian {
    fn eq(&self, other: &Hessian) -> bool {
        (self.k, self.count) == (other.k, other.count)
            && (0..self.k).all(|i| self.lower_row(i) == other.lower_row(i))
    }
}

impl std::fmt::Debug for Hessian {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hessian").field("k", &self.k).field("count", &self.count).finish_non_exhaustive()
    }
}

impl Hessian {
    /// No tokens of `k` channels.
    pub fn new(k: usize) -> Result<Hessian> {
        let too_large = || Diag::system(format!("a Hessian of {k} channels is too large for memory"));
        let len = k.checked_mul(k).ok_or_else(too_large)?;
        let mut sum = vec![];
        sum.try_reserve_exact(len).map_err(|_| too_large())?;
        sum.resize(len, 0.0);
        Ok(Hessian { k, count: 0, sum })
    }

    /// Number of channels.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Number of tokens.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The element `[i, j]`.
    ///
    /// # Panics
    /// If an index is not below [`k`](Self::k).
    pub fn get(&self, i: usize, j: usize) -> f32 {
        let (low, high) = (i.min(j), i.max(j));
        self.sum[high * self.k + low]
    }

    /// Row `i` up to and including the diagonal.
    ///
    /// # Panics
    /// If `i` is not below [`k`](Self::k).
    pub fn lower_row(&self, i: usize) -> &[f32] {
        &self.sum[i * self.k..][..=i]
    }

    /// Rows from `from` on, `k` elements each, of which only those up to the diagonal have a meaning.
    pub(crate) fn rows_from(&self, from: usize) -> &[f32] {
        &self.sum[from * self.k..]
    }

    /// The diagonal.
    pub fn diag(&self) -> Vec<f32> {
        (0..self.k).map(|i| self.sum[i * self.k + i]).collect()
    }

    /// The whole symmetric matrix, row-major.
    pub fn mirrored(&self) -> Vec<f32> {
        let k = self.k;
        let mut full = vec![0.0; k * k];
        full.par_chunks_mut(k.max(1)).enumerate().for_each(|(i, row)| {
            row[..=i].copy_from_slice(self.lower_row(i));
            for (j, x) in row.iter_mut().enumerate().skip(i + 1) {
                *x = self.sum[j * k + i];
            }
        });
        full
    }

    /// Adds tokens: `rows` is `tokens x k`, row-major. Numbers that are not finite are refused and nothing is added.
    pub fn add(&mut self, rows: &[f32]) -> Result<()> {
        let tokens = self.check(rows)?;
        if tokens > 0 {
            self.add_products(rows);
        }
        self.count += tokens as u64;
        Ok(())
    }

    /// As [`add`](Self::add), of rows rounded to bf16, as products of bf16 read them. Faster where the processor multiplies
    /// such numbers.
    pub fn add_rounded(&mut self, rows: &[f32]) -> Result<()> {
        #[cfg(target_arch = "x86_64")]
        if bf16::available() {
            let tokens = self.tokens(rows)?;
            if tokens > 0 && !bf16::add(&mut self.sum, self.k, rows) {
                return Err(self.not_finite(rows));
            }
            self.count += tokens as u64;
            return Ok(());
        }
        let tokens = self.check(rows)?;
        self.count += tokens as u64;
        if tokens == 0 {
            return Ok(());
        }
        let rounded: Vec<f32> =
            rows.par_iter().map(|&x| f32::from_bits(bf16_bits(x) & 0xffff_0000)).collect();
        self.add_products(&rounded);
        Ok(())
    }

    /// The number of tokens in `rows`.
    fn tokens(&self, rows: &[f32]) -> Result<usize> {
        let k = self.k;
        if k == 0 || !rows.len().is_multiple_of(k) {
            let text = format!("{} numbers are no tokens of {k} channels", rows.len());
            return if rows.is_empty() { Ok(0) } else { Err(Diag::bug(text)) };
        }
        Ok(rows.len() / k)
    }

    /// The number of tokens in `rows`, all numbers of which are finite.
    fn check(&self, rows: &[f32]) -> Result<usize> {
        // Without an early exit within a chunk, the comparisons are done by vectors.
        let finite = |xs: &[f32]| xs.iter().fold(true, |all, x| all & (x.abs() <= f32::MAX));
        if !rows.par_chunks(1 << 16).all(finite) {
            return Err(self.not_finite(rows));
        }
        self.tokens(rows)
    }

    /// Names the first number that is not finite.
    fn not_finite(&self, rows: &[f32]) -> Diag {
        let at = rows.iter().position(|x| !x.is_finite()).unwrap_or(0);
        Diag::input(format!(
            "channel {} of token {} is {}; activations must be finite",
            at % self.k,
            self.count + (at / self.k) as u64,
            rows[at]
        ))
    }

    /// Adds the products of one token or more.
    fn add_products(&mut self, rows: &[f32]) {
        let k = self.k;
        let tokens = rows.len() / k;
        // The longest strips first: the last ones even out what the threads have left to do.
        self.sum.par_chunks_mut(STRIP * k).enumerate().rev().with_max_len(1).for_each(|(i, strip)| {
            let (from, len) = (i * STRIP, strip.len() / k);
            let left = Mat::new(&rows[from..], tokens, len, k).t();
            product(strip, k, 1.0, 1.0, left, Mat::new(rows, tokens, from + len, k));
        });
    }

    /// Adds the tokens of `other`, which has as many channels.
    pub fn merge(&mut self, other: &Hessian) -> Result<()> {
        if self.k != other.k {
            return Err(Diag::bug(format!("Hessians of {} and {} channels are merged", self.k, other.k)));
        }
        for (sum, x) in self.sum.iter_mut().zip(&other.sum) {
            *sum += x;
        }
        self.count += other.count;
        Ok(())
    }

    /// What the Hessian becomes when channel `i` of every token is divided by `s[i]`: `H[i, j] / (s[i] s[j])`.
    pub fn scaled(&self, s: &[f32]) -> Result<Hessian> {
        let k = self.k;
        if s.len() != k || s.iter().any(|s| !s.is_finite() || *s == 0.0) {
            return Err(Diag::bug(format!("{k} channels need {k} finite divisors other than 0")));
        }
        let mut sum = vec![0.0; k * k];
        sum.par_chunks_mut(k.max(1)).enumerate().for_each(|(i, row)| {
            for ((y, &x), &s_j) in row.iter_mut().zip(self.lower_row(i)).zip(s) {
                *y = (f64::from(x) / (f64::from(s[i]) * f64::from(s_j))) as f32;
            }
        });
        let scaled = Hessian { k, count: self.count, sum };
        match scaled.first_not_finite() {
            None => Ok(scaled),
            Some((i, _)) => {
                Err(Diag::input(format!("divided by {}, channel {i} is too large for f32", s[i])))
            }
        }
    }

    /// The first element of the lower triangle that is not finite.
    pub(crate) fn first_not_finite(&self) -> Option<(usize, usize)> {
        (0..self.k).find_map(|i| self.lower_row(i).iter().position(|x| !x.is_finite()).map(|j| (i, j)))
    }

    /// As bytes: `k` and the number of tokens as little-endian `u64`, then the lower triangle row by row as
    /// little-endian `f32`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(16 + 2 * self.k * (self.k + 1));
        bytes.extend((self.k as u64).to_le_bytes());
        bytes.extend(self.count.to_le_bytes());
        for i in 0..self.k {
            for x in self.lower_row(i) {
                bytes.extend(x.to_le_bytes());
            }
        }
        bytes
    }

    /// The reverse of [`to_bytes`](Self::to_bytes). Refuses a wrong length, numbers that are not finite and a
    /// negative diagonal.
    pub fn from_bytes(bytes: &[u8]) -> Result<Hessian> {
        let damaged = |why: &str| Diag::input(format!("a stored Hessian is damaged: {why}"));
        let (head, body) = bytes.split_at_checked(16).ok_or_else(|| damaged("it is too short"))?;
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
        // `k (k + 1) / 2` numbers of 4 bytes; the check comes before anything is allocated.
        let body_len = word(0).checked_add(1).and_then(|k1| k1.checked_mul(word(0))?.checked_mul(2));
        if body_len != Some(body.len() as u64) {
            return Err(damaged("its length does not fit its number of channels"));
        }
        let mut hessian = Hessian { count: word(8), ..Hessian::new(word(0) as usize)? };
        let mut numbers = body.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let k = hessian.k;
        for i in 0..k {
            for (to, x) in hessian.sum[i * k..][..=i].iter_mut().zip(&mut numbers) {
                *to = x;
            }
        }
        if let Some((i, j)) = hessian.first_not_finite() {
            return Err(damaged(&format!("element [{i}, {j}] is not finite")));
        }
        if let Some(i) = hessian.diag().iter().position(|&x| x < 0.0) {
            return Err(damaged(&format!("element [{i}, {i}] is negative")));
        }
        Ok(hessian)
    }
}

/// The bits of a finite number, of which the upper half are those of the nearest bf16, ties to even.
fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    bits + 0x7fff + (bits >> 16 & 1)
}

#[cfg(test)]
mod tests;
