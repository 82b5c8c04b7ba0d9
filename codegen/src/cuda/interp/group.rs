//! Matrix products of groups of four warps, which are under way until they are waited for.

use super::Block;
use super::shared::Who;
use crate::cuda::frag;
use crate::cuda::tile::{Addr, GroupKind, GroupLeft, MmaKind, Reg, Stmt, Val, WARP, clean};
use crate::cuda::tiles::swizzled;
use half::bf16;
use quantc_ir::formats;
use std::collections::{HashMap, HashSet, VecDeque};

/// Warps of a group.
const WARPS: usize = 4;

/// Products of a warp's group.
#[derive(Clone, Debug, Default)]
pub(super) struct Group {
    /// Whether the kernel has such products.
    used: bool,
    /// What products of the open group, and of those under way, read in shared memory.
    open: Vec<u64>,
    groups: VecDeque<Vec<u64>>,
    /// Groups ended so far.
    ended: usize,
    /// Sums that may not be read, with the group that is the last to add to them.
    sums: HashMap<Reg, usize>,
    /// Registers that were used since the last fence.
    touched: HashSet<Reg>,
    /// Registers that products under way read, and one that was written meanwhile.
    left: HashSet<Reg>,
    overwritten: Option<Reg>,
}

impl Group {
    /// Whether a product is under way.
    pub fn under_way(&self) -> bool {
        !self.open.is_empty() || !self.groups.is_empty()
    }

    /// Products of a warp of a kernel that has some, or none.
    pub fn new(used: bool) -> Group {
        Group { used, ..Group::default() }
    }

    /// A register is written, or may be read.
    pub fn touched(&mut self, reg: Reg) {
        if self.used {
            self.touched.insert(reg);
            if self.left.contains(&reg) {
                self.overwritten = Some(reg);
            }
        }
    }

    pub fn fence(&mut self) {
        self.touched.clear();
    }

    pub fn commit(&mut self) {
        self.ended += 1;
        self.groups.push_back(std::mem::take(&mut self.open));
    }

    /// Refuses to use sums that nobody has waited for.
    pub fn check(&self, stmt: &Stmt) -> Result<(), String> {
        if let Some(r) = self.overwritten {
            return Err(format!("{r} was written while a product reads it"));
        }
        if self.sums.is_empty() || matches!(stmt, Stmt::GroupMma { .. } | Stmt::GroupWait { .. }) {
            return Ok(());
        }
        let mut early = None;
        clean::uses(stmt, &mut |v| {
            if let Val::Reg(r) = v
                && self.sums.contains_key(&r)
            {
                early = Some(r);
            }
        });
        early.map_or(Ok(()), |r| Err(format!("{r} is used while a product adds to it")))
    }
}

impl GroupKind {
    /// Bytes of a number.
    fn bytes(self) -> usize {
        if self == GroupKind::Bf16 { 2 } else { 1 }
    }

    fn number(self, bytes: &[u8]) -> f64 {
        match self {
            GroupKind::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
            GroupKind::S8 => f64::from(bytes[0] as i8),
            GroupKind::E4m3 => f64::from(formats::E4M3.decode(bytes[0].into())),
        }
    }
}

impl Block<'_> {
    /// 32 bytes of a row that a product reads, as numbers.
    fn group_row(&mut self, index: usize, start: u64, row: u64, kind: GroupKind) -> Result<Vec<f64>, String> {
        let mut bytes = vec![];
        for half in [0, 16] {
            let at = swizzled(start + row * 128 + half);
            let who = Who { warp: index, lane: 0, clock: &self.warps[index].clock };
            bytes.extend(self.shared.begin_reading(who, at)?);
            self.warps[index].group.open.push(at);
        }
        Ok(bytes.chunks_exact(kind.bytes()).map(|b| kind.number(b)).collect())
    }

    pub(super) fn group_mma(
        &mut self,
        index: usize,
        kind: GroupKind,
        acc: &[Reg],
        a: GroupLeft,
        b: Addr,
        fresh: bool,
    ) -> Result<(), String> {
        self.full(index)?;
        self.memory.counts.products += 1;
        let start = |block: &Self, at: Addr| {
            let places = block.warps[index].offsets(at);
            let first = places[0];
            match places == [first; WARP as usize] && first % 1024 < 128 && first.is_multiple_of(32) {
                true => Ok(first),
                false => Err(format!("rows of a product begin at shared byte {first}")),
            }
        };
        let group = &self.warps[index].group;
        let mut regs: Vec<Reg> = acc.to_vec();
        if let GroupLeft::Regs(a) = a {
            regs.extend(a.iter().filter_map(|v| if let Val::Reg(r) = v { Some(*r) } else { None }));
        }
        if let Some(r) = regs.iter().find(|r| group.touched.contains(r)) {
            return Err(format!("{r} was used, and a product follows without a fence"));
        }
        let numbers = 32 / kind.bytes();
        let mut left = vec![vec![0.0; numbers]; 16];
        match a {
            GroupLeft::Shared(at) => {
                let first = start(self, at)?;
                for (i, row) in (0..).zip(&mut left) {
                    let number = (index % WARPS) as u64 * 16 + i;
                    *row = self.group_row(index, first, number, kind)?;
                }
            }
            GroupLeft::Regs(a) => {
                let like = if kind == GroupKind::Bf16 { MmaKind::Bf16 } else { MmaKind::S8 };
                for (reg, v) in (0..).zip(a) {
                    for lane in 0..WARP {
                        let word = self.warps[index].get(v, lane as usize) as u32;
                        let bytes = word.to_le_bytes();
                        for (i, number) in (0..).zip(bytes.chunks_exact(kind.bytes())) {
                            let (row, col) = frag::left(like, lane, reg, i);
                            left[row as usize][col as usize] = kind.number(number);
                        }
                    }
                }
            }
        }
        let first = start(self, b)?;
        let mut right = vec![];
        for row in 0..2 * acc.len() as u64 {
            right.push(self.group_row(index, first, row, kind)?);
        }
        let warp = &mut self.warps[index];
        for (i, &to) in acc.iter().enumerate() {
            for lane in 0..WARP {
                let (row, col) = frag::sums(lane, i as u32 % 4);
                let (x, y) = (&left[row as usize], &right[i / 4 * 8 + col as usize]);
                let sum: f64 = x.iter().zip(y).map(|(x, y)| x * y).sum();
                let old = if fresh { 0 } else { warp.regs[to.0 as usize][lane as usize] as u32 };
                let new = match kind {
                    GroupKind::S8 => old.wrapping_add(sum as i32 as u32),
                    _ => ((f64::from(f32::from_bits(old)) + sum) as f32).to_bits(),
                };
                warp.regs[to.0 as usize][lane as usize] = new.into();
            }
        }
        if let GroupLeft::Regs(a) = a {
            warp.group
                .left
                .extend(a.iter().filter_map(|v| if let Val::Reg(r) = v { Some(*r) } else { None }));
        }
        let next = warp.group.ended;
        warp.group.sums.extend(acc.iter().map(|&r| (r, next)));
        Ok(())
    }

    pub(super) fn group_wait(&mut self, index: usize, left: usize, acc: &[Reg]) -> Result<(), String> {
        self.full(index)?;
        while self.warps[index].group.groups.len() > left {
            let places = self.warps[index].group.groups.pop_front().unwrap_or_default();
            for at in places {
                let who = Who { warp: index, lane: 0, clock: &self.warps[index].clock };
                self.shared.end_reading(who, at);
            }
        }
        let group = &mut self.warps[index].group;
        let over = group.ended - group.groups.len();
        if !group.under_way() {
            group.left.clear();
        }
        for &reg in acc {
            if group.sums.get(&reg).is_some_and(|&last| last >= over) {
                return Err(format!("{reg} is used while a product adds to it"));
            }
            group.sums.remove(&reg);
            group.touched.insert(reg);
        }
        Ok(())
    }
}
