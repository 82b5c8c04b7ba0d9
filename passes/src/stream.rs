//! Walking over weights a block of rows at a time, so that memory stays bounded.

use quantc_ir::diag::Result;
use quantc_ir::weights::WeightView;

/// Calls `f` with the index of the first row and the numbers of each block of rows, in order. A block takes at most
/// about `budget` bytes, and what was read is released.
pub fn rows(
    view: &WeightView<'_>,
    budget: usize,
    mut f: impl FnMut(usize, &mut [f32]) -> Result<()>,
) -> Result<()> {
    let mut block = vec![];
    for range in view.row_blocks(budget) {
        block.resize(range.len() * view.cols(), 0.0);
        view.read_rows_f32(range.start, range.len(), &mut block)?;
        f(range.start, &mut block)?;
        view.release(range);
    }
    Ok(())
}
