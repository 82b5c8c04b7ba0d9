//! Which element of a matrix each register of each lane holds, for matrix products of a warp.
//!
//! The maps are those of `mma.sync.aligned.m16n8k16` (16-bit numbers) and `m16n8k32` (bytes) in NVIDIA's PTX ISA,
//! section "Matrix Fragments for mma". With g = lane / 4 and t = lane % 4, and `per` numbers in a register:
//!
//! ```text
//! left side    register 0: row g,  columns per t ..        1: row g + 8, the same columns
//!              register 2: row g,  columns 4 per + per t .. 3: row g + 8, the same columns
//! right side   register 0: column g, rows per t ..         1: rows 4 per + per t ..
//! sums         0, 1: row g, columns 2 t, 2 t + 1           2, 3: row g + 8
//! ```

use super::tile::MmaKind;

impl MmaKind {
    /// Numbers in one register of either side.
    pub fn per_reg(self) -> u32 {
        match self {
            MmaKind::Bf16 => 2,
            MmaKind::S8 => 4,
        }
    }

    /// Length of the sums.
    pub fn k(self) -> u32 {
        8 * self.per_reg()
    }
}

/// Row and column in the left side of number `i` of register `reg`.
pub fn left(kind: MmaKind, lane: u32, reg: u32, i: u32) -> (u32, u32) {
    let per = kind.per_reg();
    (lane / 4 + reg % 2 * 8, reg / 2 * 4 * per + lane % 4 * per + i)
}

/// Row and column in the right side of number `i` of register `reg`.
pub fn right(kind: MmaKind, lane: u32, reg: u32, i: u32) -> (u32, u32) {
    let per = kind.per_reg();
    (reg * 4 * per + lane % 4 * per + i, lane / 4)
}

/// Row and column of sum `reg`.
pub fn sums(lane: u32, reg: u32) -> (u32, u32) {
    (lane / 4 + reg / 2 * 8, lane % 4 * 2 + reg % 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Every element is held by exactly one register of one lane.
    #[test]
    fn maps_are_bijections() {
        for kind in [MmaKind::Bf16, MmaKind::S8] {
            let places = |regs: u32, f: &dyn Fn(u32, u32, u32) -> (u32, u32)| {
                let all = (0..32).flat_map(|l| (0..regs).map(move |r| (l, r)));
                all.flat_map(|(l, r)| (0..kind.per_reg()).map(move |i| (l, r, i)))
                    .map(|(l, r, i)| f(l, r, i))
                    .collect::<BTreeSet<_>>()
            };
            let grid = |rows, cols| (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))).collect();
            assert_eq!(places(4, &|l, r, i| left(kind, l, r, i)), grid(16, kind.k()));
            assert_eq!(places(2, &|l, r, i| right(kind, l, r, i)), grid(kind.k(), 8));
        }
        let held: BTreeSet<_> = (0..32).flat_map(|l| (0..4).map(move |r| sums(l, r))).collect();
        assert_eq!(held.len(), 16 * 8);
    }

    /// Rows of the tables in the PTX manual.
    #[test]
    fn known_places() {
        assert_eq!(left(MmaKind::Bf16, 6, 3, 1), (9, 13));
        assert_eq!(right(MmaKind::Bf16, 6, 1, 0), (12, 1));
        assert_eq!(left(MmaKind::S8, 6, 2, 3), (1, 27));
        assert_eq!(right(MmaKind::S8, 31, 1, 0), (28, 7));
        assert_eq!(sums(31, 3), (15, 7));
    }
}
