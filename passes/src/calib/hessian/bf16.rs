//! Sums of products of rows rounded to bf16, by the instruction that processors have for them: twice as fast as products of
//! f32.

use super::bf16_bits;
use rayon::prelude::*;
use std::arch::x86_64::*;

/// Channels of a panel: one vector of pairs.
const PANEL: usize = 16;

/// Rows of the sum that one step of the kernel computes.
const ROWS: usize = 8;

/// Panels of columns of the same.
const PANELS: usize = 3;

/// Pairs of tokens that are summed up between reading the sum and writing it: as many as the nearest cache holds of what one
/// step reads.
const DEPTH: usize = 96;

/// Rows of the sum that one task computes.
const STRIP: usize = 64;

/// The same channel of two tokens, for all channels of a panel.
type Pairs = [u32; PANEL];

/// Whether this processor has what it takes.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

/// Adds the products of all pairs of channels of `rows`, which has `k` columns, rounded to bf16, to the lower triangle of `sum`.
/// What lies above it gets any numbers. Adds nothing and returns false when a number is not finite.
///
/// # Panics
/// If [`available`] is false.
#[must_use]
pub(super) fn add(sum: &mut [f32], k: usize, rows: &[f32]) -> bool {
    assert!(available());
    let Some(panels) = packed(k, rows) else { return false };
    sum.par_chunks_mut(STRIP * k).enumerate().rev().with_max_len(1).for_each(|(i, strip)| {
        // SAFETY: the assertion above says that the processor has these instructions.
        unsafe { add_strip(strip, k, i * STRIP, &panels) };
    });
    true
}

/// Panels that one task packs: rows are read by stretches of several lines of the cache.
const TOGETHER: usize = 4;

/// Bits of an infinite number. Those of numbers that are none, without their sign, are above it.
const INFINITE: u32 = 0x7f80_0000;

/// The panels of `rows`, each a list of pairs of tokens; `None` when a number is not finite. The last panel is filled with
/// zeros, and an odd number of tokens too.
fn packed(k: usize, rows: &[f32]) -> Option<Vec<Vec<Pairs>>> {
    let step = TOGETHER * PANEL;
    // SAFETY: the only caller has asserted that the processor has these instructions.
    let task = |n: usize| unsafe { packed_panels(k, rows, n * step..k.min((n + 1) * step)) };
    let packed: Option<Vec<_>> = (0..k.div_ceil(step)).into_par_iter().map(task).collect();
    Some(packed?.into_iter().flatten().collect())
}

/// The panels of some `channels`, the first of which begins a panel.
#[target_feature(enable = "avx512f,avx512bf16")]
fn packed_panels(k: usize, rows: &[f32], channels: std::ops::Range<usize>) -> Option<Vec<Vec<Pairs>>> {
    let depth = rows.len() / k;
    let mut largest = [0; PANEL];
    let mut panels = vec![Vec::with_capacity(depth.div_ceil(2)); channels.len().div_ceil(PANEL)];
    for two in rows.chunks(2 * k) {
        let (even, odd) = two.split_at(k);
        let stretches = even[channels.clone()].chunks(PANEL);
        for (n, (panel, even)) in panels.iter_mut().zip(stretches).enumerate() {
            let mut pairs = [0; PANEL];
            for ((to, largest), &x) in pairs.iter_mut().zip(&mut largest).zip(even) {
                *to = bf16_bits(x) >> 16;
                *largest = (*largest).max(x.abs().to_bits());
            }
            if !odd.is_empty() {
                let at = channels.start + n * PANEL;
                for ((to, largest), &x) in pairs.iter_mut().zip(&mut largest).zip(&odd[at..at + even.len()]) {
                    *to |= bf16_bits(x) & 0xffff_0000;
                    *largest = (*largest).max(x.abs().to_bits());
                }
            }
            panel.push(pairs);
        }
    }
    largest.iter().all(|&bits| bits < INFINITE).then_some(panels)
}

/// Adds to rows `from ..` of the sum.
#[target_feature(enable = "avx512f,avx512bf16")]
fn add_strip(strip: &mut [f32], k: usize, from: usize, panels: &[Vec<Pairs>]) {
    let rows = strip.len() / k;
    let depth = panels[0].len();
    let columns = (from + rows).div_ceil(PANEL);
    for group in (0..columns).step_by(PANELS) {
        for start in (0..depth).step_by(DEPTH) {
            let pairs = start..depth.min(start + DEPTH);
            for row in (0..rows).step_by(ROWS) {
                // Nothing of these rows is at or below the diagonal here.
                if group * PANEL >= from + row + ROWS {
                    continue;
                }
                let channel = from + row;
                let left = (&panels[channel / PANEL][pairs.clone()], channel % PANEL);
                let c = &mut strip[row * k..k * rows.min(row + ROWS)];
                let right = |n: usize| &panels[group + n][pairs.clone()];
                match (columns - group).min(PANELS) {
                    1 => add_tile(c, k, group * PANEL, left, [right(0)]),
                    2 => add_tile(c, k, group * PANEL, left, [right(0), right(1)]),
                    _ => add_tile(c, k, group * PANEL, left, [right(0), right(1), right(2)]),
                }
            }
        }
    }
}

/// Adds to at most [`ROWS`] rows of `k` numbers, from column `first` on: products of the channels of `left` from its second
/// part on with those of `right`.
#[target_feature(enable = "avx512f,avx512bf16")]
fn add_tile<const N: usize>(
    c: &mut [f32],
    k: usize,
    first: usize,
    (left, lane): (&[Pairs], usize),
    right: [&[Pairs]; N],
) {
    assert!(lane + ROWS <= PANEL && right.iter().all(|pairs| pairs.len() == left.len()));
    let mut sums = [[_mm512_setzero_ps(); N]; ROWS];
    let mask = |n: usize| -> __mmask16 {
        let columns = k.saturating_sub(first + n * PANEL).min(PANEL);
        (((1u32 << columns) - 1) & 0xffff) as __mmask16
    };
    for (row, sums) in c.chunks_exact(k).zip(&mut sums) {
        for (n, sum) in sums.iter_mut().enumerate() {
            let at = row[k.min(first + n * PANEL)..].as_ptr();
            // SAFETY: the mask lets through what is left of the row.
            *sum = unsafe { _mm512_maskz_loadu_ps(mask(n), at) };
        }
    }
    for (p, pairs) in left.iter().enumerate() {
        let mut columns = [_mm512_setzero_si512(); N];
        for (column, right) in columns.iter_mut().zip(right) {
            // SAFETY: the array has as many bytes as the vector.
            *column = unsafe { _mm512_loadu_si512(right[p].as_ptr().cast()) };
        }
        for (sums, &pair) in sums.iter_mut().zip(&pairs[lane..lane + ROWS]) {
            let pair = bf16(_mm512_set1_epi32(pair as i32));
            for (sum, &column) in sums.iter_mut().zip(&columns) {
                *sum = _mm512_dpbf16_ps(*sum, pair, bf16(column));
            }
        }
    }
    for (row, sums) in c.chunks_exact_mut(k).zip(&sums) {
        for (n, &sum) in sums.iter().enumerate() {
            let at = row[k.min(first + n * PANEL)..].as_mut_ptr();
            // SAFETY: the mask writes only what is left of the row.
            unsafe { _mm512_mask_storeu_ps(at, mask(n), sum) };
        }
    }
}

/// The same bits as pairs of bf16.
#[target_feature(enable = "avx512f")]
fn bf16(x: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes, of which any are allowed.
    unsafe { std::mem::transmute(x) }
}
