//! The state of one warp.

use super::Status;
use super::group::Group;
use super::shared::Clock;
use crate::cuda::tile::{Addr, Kernel, Reg, Val, WARP};
use std::collections::VecDeque;

/// One value for each lane.
pub(super) type Lanes = [u64; WARP as usize];

/// A copy under way.
#[derive(Clone, Debug)]
pub(super) struct Copy {
    pub lane: u32,
    pub to: u64,
    pub data: Vec<u8>,
}

/// Lanes that left an `If` or a loop.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    /// All that came.
    pub outer: u32,
    /// Those that take the other branch.
    pub other: u32,
}

/// The state of a warp.
#[derive(Debug)]
pub(super) struct Warp {
    pub pc: usize,
    pub status: Status,
    pub clock: Clock,
    pub mask: u32,
    pub frames: Vec<Frame>,
    pub regs: Vec<Lanes>,
    /// Copies of the group that is still open, and groups under way, the oldest first.
    pub open: Vec<Copy>,
    pub groups: VecDeque<Vec<Copy>>,
    /// Matrix products of its group.
    pub group: Group,
}

impl Warp {
    pub fn new(kernel: &Kernel, index: usize, groups: bool) -> Warp {
        // The last one is that of bulk copies.
        let mut clock = vec![0; (kernel.threads / WARP) as usize + 1];
        // Period 0 stands for never.
        clock[index] = 1;
        Warp {
            pc: 0,
            status: Status::Ready,
            clock,
            mask: u32::MAX,
            frames: vec![],
            regs: vec![[0; WARP as usize]; kernel.regs.len()],
            open: vec![],
            groups: VecDeque::new(),
            group: Group::new(groups),
        }
    }

    /// Whether copies are under way that brought something.
    pub fn has_copies(&self) -> bool {
        !self.open.is_empty() || self.groups.iter().any(|g| !g.is_empty())
    }

    pub fn get(&self, v: Val, lane: usize) -> u64 {
        match v {
            Val::Reg(r) => self.regs[r.0 as usize][lane],
            Val::U32(x) => x.into(),
            Val::F32(x) => x.get().to_bits().into(),
            Val::Pred(p) => p.into(),
        }
    }

    pub fn all(&self, v: Val) -> Lanes {
        std::array::from_fn(|lane| self.get(v, lane))
    }

    /// Byte offsets; those of 32 bits do not wrap, or they would be found out of bounds.
    pub fn offsets(&self, at: Addr) -> Lanes {
        self.all(at.base).map(|base| base + u64::from(at.plus))
    }

    /// Writes a register in the lanes that are here.
    pub fn put(&mut self, to: Reg, values: Lanes) {
        self.group.touched(to);
        let reg = &mut self.regs[to.0 as usize];
        for lane in lanes(self.mask) {
            reg[lane] = values[lane];
        }
    }

    pub fn holds(&self, v: Val) -> u32 {
        (0..WARP).filter(|&lane| self.get(v, lane as usize) != 0).fold(0, |mask, lane| mask | 1 << lane)
    }
}

/// The lanes of a mask.
pub(super) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..WARP as usize).filter(move |lane| mask >> lane & 1 == 1)
}
