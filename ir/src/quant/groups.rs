//! Which elements of a tensor share a scale.

use crate::diag::{Diag, Result};
use crate::scheme::Scheme;
use crate::ty::Shape;
use std::ops::Range;

/// The groups of a tensor seen as rows: rectangles of `rows_per_group x cols_per_group`, those at the lower and right
/// edge perhaps smaller. They are numbered row by row, which is the order of the scale tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    rows: usize,
    cols: usize,
    rows_per_group: usize,
    cols_per_group: usize,
}

impl Groups {
    /// The groups of a tensor of `shape`; its rows are all indices but the last.
    ///
    /// A tensor of more than two axes must have groups that are runs of whole rows or lie inside one row.
    pub fn new(scheme: &Scheme, shape: &Shape) -> Result<Groups> {
        let no_fit = |why| Err(Diag::input(format!("{scheme} cannot be computed for {shape:?}: {why}")));
        let Some(dims) = shape.dims() else { return no_fit("extents are not static") };
        let blocks = scheme.blocks(dims.len())?;
        let (&cols, outer) = dims.split_last().unwrap_or((&1, &[]));
        let cols_block = blocks.last().copied().flatten();
        let mut rows = 1u64;
        let mut rows_block = 1u64;
        let mut whole = true;
        for (&dim, &block) in outer.iter().zip(&blocks).rev() {
            match block {
                None if whole => rows_block = rows_block.saturating_mul(dim),
                Some(b) if rows == 1 && outer.iter().product::<u64>() == dim => {
                    rows_block = b;
                    whole = false;
                }
                Some(1) => whole = false,
                _ if dim == 1 => {}
                _ => return no_fit("its groups are not runs of rows"),
            }
            rows = rows.saturating_mul(dim);
        }
        let size = |n: u64| usize::try_from(n).or_else(|_| no_fit("too large").map(|_: Groups| 0));
        let cols = size(cols)?;
        Ok(Groups {
            rows: size(rows)?,
            cols,
            rows_per_group: size(rows_block)?.max(1),
            cols_per_group: cols_block.map_or(Ok(cols), size)?.max(1),
        })
    }

    /// One group of `len` elements.
    pub(super) fn one(len: usize) -> Groups {
        Groups { rows: 1, cols: len, rows_per_group: 1, cols_per_group: len.max(1) }
    }

    /// Rows of the tensor.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rows that a group spans. Blocks of a multiple of as many rows contain whole groups and can be quantized each by
    /// itself.
    pub fn rows_per_group(&self) -> usize {
        self.rows_per_group
    }

    /// Elements of a row that lie in one group.
    pub fn cols_per_group(&self) -> usize {
        self.cols_per_group
    }

    /// Rows and columns of the grid of groups: the last axis of the scale tensor, and all others together.
    pub fn grid(&self) -> (usize, usize) {
        (self.rows.div_ceil(self.rows_per_group), self.cols.div_ceil(self.cols_per_group))
    }

    /// Number of groups.
    pub fn len(&self) -> usize {
        self.grid().0 * self.grid().1
    }

    /// Whether there are no elements, and so no groups.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The group of an element.
    pub fn index(&self, row: usize, col: usize) -> usize {
        row / self.rows_per_group * self.grid().1 + col / self.cols_per_group
    }

    /// The groups of `rows` alone, which must be whole groups or end with the tensor's last row.
    pub(super) fn of_rows(&self, rows: Range<usize>) -> Groups {
        Groups { rows: rows.len(), ..*self }
    }
}
