//! Walking over weights a block of rows at a time, so that memory stays bounded.

use quantc_ir::diag::Result;
use quantc_ir::weights::WeightView;
use std::ops::Range;

/// Calls `f` with the index of the first row and the numbers of each block of rows, in order. A block takes at most
/// about `budget` bytes, and what was read is released. Rows without elements are not visited, however many they are.
pub fn rows(
    view: &WeightView<'_>,
    budget: usize,
    f: impl FnMut(usize, &mut [f32]) -> Result<()>,
) -> Result<()> {
    rows_in(view, 0..view.rows(), budget, f)
}

/// As [`rows`], for some of the rows.
pub fn rows_in(
    view: &WeightView<'_>,
    range: Range<usize>,
    budget: usize,
    mut f: impl FnMut(usize, &mut [f32]) -> Result<()>,
) -> Result<()> {
    if view.cols() == 0 {
        return Ok(());
    }
    let step = (budget / view.cols().saturating_mul(4)).max(1);
    let mut block = vec![];
    let mut first = range.start;
    while first < range.end {
        let count = step.min(range.end - first);
        block.resize(count * view.cols(), 0.0);
        view.read_rows_f32(first, count, &mut block)?;
        f(first, &mut block)?;
        view.release(first..first + count);
        first += count;
    }
    Ok(())
}
