//! Barriers in shared memory that count arrivals and bytes, and bulk copies, whose bytes they count.

use super::shared::{Clock, Who};
use super::warp::lanes;
use super::{Block, Status};
use crate::cuda::tile::{Addr, Val};
use std::collections::BTreeMap;

/// A barrier.
#[derive(Clone, Debug)]
struct Bar {
    /// Arrivals of a phase, and those still missing.
    count: u32,
    missing: u32,
    /// Bytes that are expected and have not come.
    bytes: i64,
    /// How many phases are over.
    phase: u64,
    /// What those who arrived know; what those know who wait for the last phase that is over.
    gathered: Clock,
    known: Clock,
    /// The warp that set it up, when, and whether copies know.
    by: (usize, u32),
    fenced: bool,
}

/// A bulk copy under way.
#[derive(Clone, Debug)]
struct Bulk {
    to: u64,
    data: Vec<u8>,
    barrier: u64,
}

/// The barriers of a block, and the copies under way.
#[derive(Clone, Debug)]
pub(super) struct Bars {
    bars: BTreeMap<u64, Bar>,
    copies: Vec<Bulk>,
    /// How many copies have landed.
    landed: u32,
    warps: usize,
}

impl Bars {
    pub fn new(warps: usize) -> Bars {
        Bars { bars: BTreeMap::new(), copies: vec![], landed: 0, warps }
    }

    /// Copies under way.
    pub fn under_way(&self) -> usize {
        self.copies.len()
    }

    /// Makes what a warp has set up known to copies.
    pub fn fence(&mut self, warp: usize) {
        self.bars.values_mut().filter(|bar| bar.by.0 == warp).for_each(|bar| bar.fenced = true);
    }

    /// A barrier that a warp knows of.
    fn get(&mut self, at: u64, warp: usize, clock: &Clock) -> Result<&mut Bar, String> {
        let bar = self.bars.get_mut(&at).ok_or(format!("there is no barrier at shared byte {at}"))?;
        if bar.by.0 != warp && clock[bar.by.0] < bar.by.1 {
            return Err(format!("the barrier at shared byte {at} may not be set up yet"));
        }
        Ok(bar)
    }
}

impl Bar {
    /// Ends the phase when nothing is missing.
    fn settle(&mut self) {
        if self.missing == 0 && self.bytes == 0 {
            self.phase += 1;
            self.missing = self.count;
            self.known.clone_from(&self.gathered);
        }
    }

    fn is_over(&self, parity: u64) -> bool {
        self.phase & 1 != parity
    }
}

impl Block<'_> {
    pub(super) fn bar_init(&mut self, index: usize, at: Addr, count: u32) -> Result<(), String> {
        let warp = &self.warps[index];
        let places = warp.offsets(at);
        for lane in lanes(warp.mask) {
            let at = places[lane];
            let who = Who { warp: index, lane: lane as u32, clock: &warp.clock };
            // Its bytes are nobody else's.
            self.shared.write(who, at, &[0; 8])?;
            let clock = vec![0; self.bars.warps + 1];
            let bar = Bar {
                count,
                missing: count,
                bytes: 0,
                phase: 0,
                gathered: clock.clone(),
                known: clock,
                by: (index, warp.clock[index]),
                fenced: false,
            };
            if self.bars.bars.insert(at, bar).is_some() {
                return Err(format!("the barrier at shared byte {at} is set up twice"));
            }
        }
        Ok(())
    }

    /// Arrivals of the lanes that are here, which expect bytes.
    pub(super) fn bar_arrive(&mut self, index: usize, at: Addr, bytes: u32) -> Result<(), String> {
        let warp = &mut self.warps[index];
        let places = warp.offsets(at);
        for lane in lanes(warp.mask) {
            let bar = self.bars.get(places[lane], index, &warp.clock)?;
            if bar.missing == 0 {
                return Err(format!(
                    "more arrive at the barrier at shared byte {} than it counts",
                    places[lane]
                ));
            }
            bar.missing -= 1;
            bar.bytes += i64::from(bytes);
            for (to, from) in bar.gathered.iter_mut().zip(&warp.clock) {
                *to = (*to).max(*from);
            }
            bar.settle();
        }
        // What the warp does from here on is not part of what it told.
        warp.clock[index] += 1;
        Ok(())
    }

    /// Waits, or goes on where the phase is over.
    pub(super) fn bar_wait(&mut self, index: usize, at: Addr, parity: Val) -> Result<(), String> {
        let warp = &mut self.warps[index];
        let (places, parities) = (warp.offsets(at), warp.all(parity));
        for lane in lanes(warp.mask) {
            let bar = self.bars.get(places[lane], index, &warp.clock)?;
            if parities[lane] > 1 {
                return Err(format!("a phase of parity {}", parities[lane]));
            }
            if !bar.is_over(parities[lane]) {
                warp.status = Status::Waiting;
                return Ok(());
            }
            for (to, from) in warp.clock.iter_mut().zip(&bar.known) {
                *to = (*to).max(*from);
            }
        }
        Ok(())
    }

    /// Whether a warp may take its next step.
    pub(super) fn may_go(&self, index: usize) -> bool {
        let warp = &self.warps[index];
        match warp.status {
            Status::Ready => true,
            Status::AtBarrier | Status::Done => false,
            Status::Waiting => {
                let Some((at, parity)) = self.program.awaited(warp.pc) else { return true };
                let (places, parities) = (warp.offsets(at), warp.all(parity));
                lanes(warp.mask).all(|lane| {
                    self.bars.bars.get(&places[lane]).is_some_and(|bar| bar.is_over(parities[lane]))
                })
            }
        }
    }

    pub(super) fn bulk_copy(
        &mut self,
        index: usize,
        to: Addr,
        buffer: u32,
        at: Addr,
        bytes: u32,
        barrier: Addr,
    ) -> Result<(), String> {
        let warp = &self.warps[index];
        let (to, at, barrier) = (warp.offsets(to), warp.offsets(at), warp.offsets(barrier));
        for lane in lanes(warp.mask) {
            if !bytes.is_multiple_of(16) || !to[lane].is_multiple_of(16) {
                return Err(format!("a bulk copy of {bytes} bytes to shared byte {}", to[lane]));
            }
            let data = self.global(buffer, at[lane], bytes, 16)?.to_vec();
            self.memory.counts.bytes_read += u64::from(bytes);
            let warp = &self.warps[index];
            if !self.bars.get(barrier[lane], index, &warp.clock)?.fenced {
                return Err(format!(
                    "copies do not know of the barrier at shared byte {} yet",
                    barrier[lane]
                ));
            }
            let who = Who { warp: index, lane: lane as u32, clock: &warp.clock };
            self.shared.start_copy(who, to[lane], bytes)?;
            self.bars.copies.push(Bulk { to: to[lane], data, barrier: barrier[lane] });
        }
        Ok(())
    }

    /// Ends one of the copies under way.
    pub(super) fn land(&mut self, which: usize) {
        let Bulk { to, data, barrier } = self.bars.copies.remove(which);
        self.bars.landed += 1;
        self.shared.land(self.bars.landed, to, &data);
        let (landed, engine) = (self.bars.landed, self.bars.warps);
        if let Some(bar) = self.bars.bars.get_mut(&barrier) {
            bar.bytes -= data.len() as i64;
            bar.gathered[engine] = landed;
            bar.settle();
        }
    }
}
