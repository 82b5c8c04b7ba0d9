//! Matrices as tiles that groups of warps multiply: images of what is in shared memory, so that one bulk copy brings one.
//!
//! A matrix of rows is cut into tiles of [`ROWS`] rows and [`ROW_BYTES`] of each: 64 numbers of bf16, or 128 codes.
//!
//! ```text
//! matrix = tile[block of rows][block of columns]      tile = 64 rows of 128 bytes, swizzled
//! ```
//!
//! In a tile the 16-byte segments of a row change places by the row's number: segment s of row r lies at `s ^ (r & 7)`
//! ([`swizzled`]), so that eight rows' segments of one column meet all banks. Rows and columns beyond the matrix are zero.

use crate::cuda::tile::GroupKind;

pub mod rows;

/// Rows of a tile.
pub const ROWS: u32 = 64;

/// Bytes of a row of a tile.
pub const ROW_BYTES: u32 = 128;

/// Bytes of a tile.
pub const TILE_BYTES: u32 = ROWS * ROW_BYTES;

/// Where the byte is that would be at `at` if rows were not swizzled.
pub fn swizzled(at: u64) -> u64 {
    at ^ (at >> 7 & 7) << 4
}

impl GroupKind {
    /// Short name.
    pub fn name(self) -> &'static str {
        match self {
            GroupKind::Bf16 => "bf16",
            GroupKind::S8 => "s8",
            GroupKind::E4m3 => "e4m3",
        }
    }

    /// Numbers of a row of a tile.
    pub fn columns(self) -> u32 {
        match self {
            GroupKind::Bf16 => ROW_BYTES / 2,
            GroupKind::S8 | GroupKind::E4m3 => ROW_BYTES,
        }
    }
}

/// A matrix in tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiled {
    /// What numbers are.
    pub kind: GroupKind,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub columns: u32,
}

impl Tiled {
    /// Bytes that each row adds, the rows being whole tiles.
    pub fn row_bytes(&self) -> u64 {
        u64::from(self.across()) * u64::from(ROW_BYTES)
    }

    /// Tiles side by side.
    pub fn across(&self) -> u32 {
        self.columns.div_ceil(self.kind.columns())
    }

    /// Tiles below each other.
    pub fn down(&self) -> u32 {
        self.rows.div_ceil(ROWS)
    }

    /// Bytes of the matrix.
    pub fn bytes(&self) -> u64 {
        u64::from(self.across()) * u64::from(self.down()) * u64::from(TILE_BYTES)
    }

    /// The first byte of a number.
    pub fn at(&self, row: u32, column: u32) -> u64 {
        let tile = row / ROWS * self.across() + column / self.kind.columns();
        let bytes = ROW_BYTES / self.kind.columns();
        let in_tile = row % ROWS * ROW_BYTES + column % self.kind.columns() * bytes;
        u64::from(tile) * u64::from(TILE_BYTES) + swizzled(in_tile.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_number_has_its_own_place() {
        for kind in [GroupKind::Bf16, GroupKind::S8] {
            let m = Tiled { kind, rows: 70, columns: 150 };
            let size = u64::from(ROW_BYTES / kind.columns());
            let places: BTreeSet<u64> = (0..m.rows)
                .flat_map(|r| (0..m.columns).map(move |c| (r, c)))
                .map(|(r, c)| m.at(r, c))
                .collect();
            assert_eq!(places.len(), (m.rows * m.columns) as usize);
            assert!(places.iter().all(|p| p % size == 0 && p + size <= m.bytes()));
        }
    }
}
