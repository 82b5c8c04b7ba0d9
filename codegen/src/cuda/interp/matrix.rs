//! Matrix products of a warp.

use super::Block;
use crate::cuda::frag;
use crate::cuda::tile::{MmaKind, Reg, Val, WARP};
use half::bf16;

impl Block<'_> {
    /// `acc += a * b`, by the maps of [`frag`].
    pub(super) fn mma(
        &mut self,
        index: usize,
        kind: MmaKind,
        acc: &[Reg; 4],
        a: &[Val; 4],
        b: &[Val; 2],
    ) -> Result<(), String> {
        self.full(index)?;
        self.memory.counts.products += 1;
        let warp = &mut self.warps[index];
        let (k, per) = (kind.k() as usize, kind.per_reg());
        let number = |word: u64, i: u32| match kind {
            MmaKind::Bf16 => bf16::from_bits((word >> (16 * i)) as u16).to_f64(),
            MmaKind::S8 => f64::from((word >> (8 * i)) as u8 as i8),
        };
        let (mut left, mut right) = (vec![0.0; 16 * k], vec![0.0; 8 * k]);
        for lane in 0..WARP {
            for i in 0..per {
                for (reg, v) in (0..).zip(a) {
                    let (row, col) = frag::left(kind, lane, reg, i);
                    left[row as usize * k + col as usize] = number(warp.get(*v, lane as usize), i);
                }
                for (reg, v) in (0..).zip(b) {
                    let (row, col) = frag::right(kind, lane, reg, i);
                    right[col as usize * k + row as usize] = number(warp.get(*v, lane as usize), i);
                }
            }
        }
        for lane in 0..WARP {
            for (reg, to) in (0..).zip(acc) {
                let (row, col) = frag::sums(lane, reg);
                let x = &left[row as usize * k..][..k];
                let y = &right[col as usize * k..][..k];
                let sum: f64 = x.iter().zip(y).map(|(x, y)| x * y).sum();
                let old = warp.regs[to.0 as usize][lane as usize] as u32;
                let new = match kind {
                    MmaKind::Bf16 => ((f64::from(f32::from_bits(old)) + sum) as f32).to_bits(),
                    MmaKind::S8 => old.wrapping_add(sum as i32 as u32),
                };
                warp.regs[to.0 as usize][lane as usize] = new.into();
            }
        }
        Ok(())
    }
}
