//! What blocks hand each other through global memory: who wrote what, who was counted, and who may read.

use super::Block;
use crate::cuda::tile::{Access, Addr, Kernel, Reg, Val, WARP};
use std::collections::HashMap;
use std::ops::Range;

/// A counter: buffer and byte.
type Counter = (u32, u64);

/// Who wrote scratch, and who was counted where. Blocks are numbered from 0.
#[derive(Clone, Debug, Default)]
pub(super) struct Between {
    /// For each byte of each buffer of scratch one more than the block that wrote it; 0 for none.
    owners: HashMap<u32, Vec<u32>>,
    /// Where blocks were counted.
    counted: HashMap<u32, Counter>,
    /// Blocks that were the last ones at a counter.
    last: HashMap<u32, Counter>,
}

impl Between {
    pub fn new(kernel: &Kernel, buffers: &[Vec<u8>]) -> Between {
        let scratch =
            (0..).zip(&kernel.buffers).zip(buffers).filter(|((_, b), _)| b.access == Access::Scratch);
        let owners = scratch.map(|((i, _), bytes)| (i, vec![0; bytes.len()])).collect();
        Between { owners, ..Between::default() }
    }

    /// Claims bytes for a block to write.
    pub fn write(&mut self, buffer: u32, range: Range<usize>, block: u32) -> Result<(), String> {
        if self.counted.contains_key(&block) && !self.last.contains_key(&block) {
            return Err("the block was counted before".into());
        }
        let owners = self.owners.get_mut(&buffer).ok_or("it is not scratch")?;
        for owner in &mut owners[range] {
            if *owner != 0 && *owner != block + 1 {
                return Err(format!("block {} wrote it too", *owner - 1));
            }
            *owner = block + 1;
        }
        Ok(())
    }

    /// Whether a block may read bytes.
    pub fn read(&self, buffer: u32, range: Range<usize>, block: u32) -> Result<(), String> {
        let owners = self.owners.get(&buffer).ok_or("it is not scratch")?;
        for &owner in &owners[range] {
            let from = owner.checked_sub(1).ok_or("nobody wrote it")?;
            let handed = self.last.get(&block).is_some_and(|at| self.counted.get(&from) == Some(at));
            if from != block && !handed {
                return Err(format!("block {from} wrote it and did not hand it on"));
            }
        }
        Ok(())
    }
}

impl Block<'_> {
    /// Counts this block, all of whose warps are here.
    pub(super) fn count(&mut self, to: Reg, counter: u32, at: Addr, count: Val) -> Result<(), String> {
        let (places, counts) = (self.warps[0].offsets(at), self.warps[0].all(count));
        let same = |warp: &super::warp::Warp| warp.offsets(at) == places && warp.all(count) == counts;
        if places != [places[0]; WARP as usize] || !self.warps.iter().all(same) {
            return Err("threads count their block at different places".into());
        }
        let data = &mut self.memory.buffers[counter as usize].data;
        let place = places[0] as usize;
        let Some(word) = data.get_mut(place..place + 4).filter(|_| place.is_multiple_of(4)) else {
            return Err(format!("a counter at byte {place}"));
        };
        let before = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        let last = u64::from(before) + 1 == counts[0];
        word.copy_from_slice(&(if last { 0 } else { before + 1 }).to_le_bytes());
        let between = &mut self.memory.between;
        if between.counted.insert(self.number, (counter, places[0])).is_some() {
            return Err("a block is counted twice".into());
        }
        if last {
            between.last.insert(self.number, (counter, places[0]));
        }
        for warp in &mut self.warps {
            warp.put(to, [last.into(); WARP as usize]);
        }
        Ok(())
    }
}
