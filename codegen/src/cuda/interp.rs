//! Runs kernels in Rust, lane by lane, and checks what a GPU would not tell.
//!
//! A block's warps take turns in an order that a [`Schedule`] gives; a warp gives way before each of its steps, so any
//! interleaving can come about. What is checked at every step:
//!
//! - Addresses are in bounds and aligned to the bytes accessed.
//! - Nothing is read that was not written: neither shared memory, nor outputs.
//! - Each byte of an output is written at most once. What blocks hand each other is read by the last one only, when all
//!   others have been counted.
//! - Shared memory is free of races, whatever the interleaving was: each access happens after the accesses that it
//!   conflicts with, by barriers and warp synchronization, never by luck. Vector clocks tell, with one clock a warp;
//!   lanes of one warp are ordered by what synchronizes warps.
//! - Barriers in shared memory are set up before they are used, and nobody waits for a phase that never ends. Bulk copies
//!   and products of groups of warps touch bytes at any time from when they were asked for until they were waited for:
//!   nobody else may meanwhile, nor read the sums. Fences are where they are needed.
//! - Asynchronous copies are waited for before their bytes are read or overwritten, and before the kernel ends. Their
//!   bytes arrive as late as they may.
//! - Statements for all lanes of a warp, or all warps of a block, are reached by all of them.
//!
//! Arithmetic is that of the GPU to the bit, except that sums inside one bf16 matrix product are exact here and rounded
//! once, where a GPU truncates on the way, and that powers and logarithms are rounded right: results agree within these
//! operations' bounds, not to the bit.

use super::tile::{Access, Kernel, Stmt, WARP};
use std::fmt;

mod bars;
mod between;
mod exec;
pub(crate) mod fold;
mod group;
mod matrix;
mod program;
mod shared;
mod warp;

use bars::Bars;
use between::Between;
use program::{Program, Step};
use shared::Shared;
use warp::Warp;

/// What a kernel did wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// What happened.
    pub what: String,
    /// The block's column and row.
    pub block: [u32; 2],
    /// The warp.
    pub warp: u32,
    /// The step, as the text writes it.
    pub step: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y] = self.block;
        write!(f, "{} (block {x}, {y}, warp {}: {})", self.what, self.warp, self.step)
    }
}

impl std::error::Error for Fault {}

/// In which order warps take their steps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Schedule {
    /// One step each in turn.
    Turns,
    /// Each as far as it gets, the first warps first.
    Ahead,
    /// Each as far as it gets, the last warps first.
    Behind,
    /// One after the other at random, by this seed.
    Random(u64),
}

/// What a run costs, beside what it computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Steps of warps.
    pub steps: u64,
    /// Matrix products of warps.
    pub products: u64,
    /// Bytes read from buffers, per lane.
    pub bytes_read: u64,
    /// Accesses of warps to shared memory by their own width: 16-byte ones count four, 8-byte ones two.
    pub shared_wavefronts: u64,
    /// Those beyond what the bytes need: conflicts of banks.
    pub bank_conflicts: u64,
}

/// A buffer in a run.
#[derive(Clone)]
pub struct Bytes {
    /// Contents; those of outputs are poison until written.
    pub data: Vec<u8>,
    /// For outputs, whether each byte was written.
    pub written: Vec<bool>,
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let written = self.written.iter().filter(|w| **w).count();
        write!(f, "{} bytes, {written} of them written", self.data.len())
    }
}

/// The state of memory of a run.
#[derive(Clone, Debug)]
pub struct Memory {
    /// One for each buffer of the kernel.
    pub buffers: Vec<Bytes>,
    /// What it cost.
    pub counts: Counts,
    between: Between,
}

/// What outputs hold before they are written.
const POISON: u8 = 0xa5;

/// Runs `kernel` on buffers: contents of those it reads, sizes of those it writes (their contents do not matter).
pub fn run(
    kernel: &Kernel,
    buffers: &[Vec<u8>],
    scalars: &[u32],
    schedule: Schedule,
) -> Result<Memory, Fault> {
    let program = Program::new(kernel);
    let bytes = kernel.buffers.iter().zip(buffers).map(|(desc, data)| match desc.access {
        Access::Read | Access::ReadBeforeWrite => Bytes { data: data.clone(), written: vec![] },
        Access::Counters => Bytes { data: data.clone(), written: vec![] },
        Access::Update => Bytes { data: data.clone(), written: vec![false; data.len()] },
        Access::Write | Access::Scratch => {
            Bytes { data: vec![POISON; data.len()], written: vec![false; data.len()] }
        }
    });
    let between = Between::new(kernel, buffers);
    let mut memory = Memory { buffers: bytes.collect(), counts: Counts::default(), between };
    let fault = |what: &str| Fault { what: what.to_owned(), block: [0, 0], warp: 0, step: String::new() };
    if buffers.len() != kernel.buffers.len() || scalars.len() != kernel.scalars.len() {
        return Err(fault("the arguments are not those of the kernel"));
    }
    if kernel.threads == 0 || !kernel.threads.is_multiple_of(WARP) {
        return Err(fault("a block is not made of whole warps"));
    }
    let [columns, rows] = kernel.grid.map(|e| e.blocks(scalars));
    for i in 0..rows * columns {
        let i = if schedule == Schedule::Behind { rows * columns - 1 - i } else { i };
        Block::new(&program, &mut memory, scalars, [i % columns, i / columns], i).run(schedule)?;
    }
    let counts = kernel.buffers.iter().zip(&memory.buffers).filter(|(b, _)| b.access == Access::Counters);
    if let Some((desc, _)) = counts.into_iter().find(|(_, bytes)| bytes.data.iter().any(|&b| b != 0)) {
        return Err(fault(&format!("`{}` does not end as zeros", desc.name)));
    }
    Ok(memory)
}

/// What a warp is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Status {
    Ready,
    AtBarrier,
    /// For a phase of a barrier in shared memory.
    Waiting,
    Done,
}

struct Block<'a> {
    program: &'a Program<'a>,
    memory: &'a mut Memory,
    scalars: &'a [u32],
    at: [u32; 2],
    /// Among all blocks.
    number: u32,
    shared: Shared,
    bars: Bars,
    warps: Vec<Warp>,
}

impl<'a> Block<'a> {
    fn new(
        program: &'a Program<'a>,
        memory: &'a mut Memory,
        scalars: &'a [u32],
        at: [u32; 2],
        number: u32,
    ) -> Block<'a> {
        let kernel = program.kernel;
        let count = (kernel.threads / WARP) as usize;
        let shared = Shared::new(kernel.shared, kernel.shared_granule(), count);
        let warps = (0..count).map(|w| Warp::new(kernel, w, program.groups)).collect();
        let bars = Bars::new(count);
        Block { program, memory, scalars, at, number, shared, bars, warps }
    }

    fn run(&mut self, schedule: Schedule) -> Result<(), Fault> {
        let mut order = Order::new(schedule);
        loop {
            if self.bars.under_way() > 0 && order.lands_early() {
                let which = order.pick(self.bars.under_way());
                self.land(which);
            }
            let ready: Vec<usize> = (0..self.warps.len()).filter(|&w| self.may_go(w)).collect();
            if ready.is_empty() && self.bars.under_way() > 0 {
                let which = order.pick(self.bars.under_way());
                self.land(which);
                continue;
            }
            if ready.is_empty() {
                if let Some(stuck) = self.warps.iter().position(|w| w.status == Status::Waiting) {
                    return Err(self.fault(stuck, "a warp waits for a phase that never ends".into()));
                }
                if self.warps.iter().all(|w| w.status == Status::Done) {
                    return self.finish();
                }
                self.release()?;
                continue;
            }
            let warp = order.next(&ready);
            self.warps[warp].status = Status::Ready;
            // Between points where others can be told apart by what they see, a warp may as well run on.
            let steps = if matches!(schedule, Schedule::Ahead | Schedule::Behind) { usize::MAX } else { 1 };
            for _ in 0..steps {
                self.step(warp)?;
                if self.warps[warp].status != Status::Ready {
                    break;
                }
            }
        }
    }

    fn fault(&self, warp: usize, what: String) -> Fault {
        let step = self.program.describe(self.warps[warp].pc);
        Fault { what, block: self.at, warp: warp as u32, step }
    }

    /// Lets warps go that wait for each other.
    fn release(&mut self) -> Result<(), Fault> {
        if let Some(gone) = self.warps.iter().position(|w| w.status == Status::Done) {
            return Err(self.fault(gone, "some warps wait at a barrier and this one is gone".into()));
        }
        let places: Vec<usize> = self.warps.iter().map(|w| w.pc).collect();
        if let Some(other) = places.iter().position(|&p| p != places[0]) {
            return Err(self.fault(other, "warps wait at different barriers".into()));
        }
        if let Some(Step::Plain(Stmt::LastOf { to, counter, at, count })) = self.program.steps.get(places[0])
        {
            self.count(*to, *counter, *at, *count).map_err(|what| self.fault(0, what))?;
        }
        let joined = (0..self.warps[0].clock.len())
            .map(|i| self.warps.iter().map(|w| w.clock[i]).max().unwrap_or(0))
            .collect::<Vec<_>>();
        for (i, warp) in self.warps.iter_mut().enumerate() {
            warp.clock.clone_from(&joined);
            warp.clock[i] += 1;
            warp.pc += 1;
            warp.status = Status::Ready;
        }
        Ok(())
    }

    fn finish(&self) -> Result<(), Fault> {
        if self.bars.under_way() > 0 {
            return Err(self.fault(0, "a bulk copy is never waited for".into()));
        }
        if let Some(warp) = self.warps.iter().position(|w| w.group.under_way()) {
            return Err(self.fault(warp, "a product of a group is never waited for".into()));
        }
        match self.warps.iter().position(Warp::has_copies) {
            Some(warp) => Err(self.fault(warp, "an asynchronous copy is never waited for".into())),
            None => Ok(()),
        }
    }
}

/// Whose turn it is.
struct Order {
    schedule: Schedule,
    state: u64,
}

impl Order {
    fn new(schedule: Schedule) -> Order {
        Order { schedule, state: if let Schedule::Random(seed) = schedule { seed } else { 0 } }
    }

    fn next(&mut self, ready: &[usize]) -> usize {
        ready[self.pick(ready.len())]
    }

    /// Whether a bulk copy lands before anybody waits for it.
    fn lands_early(&mut self) -> bool {
        match self.schedule {
            Schedule::Ahead => true,
            Schedule::Turns | Schedule::Behind => false,
            Schedule::Random(_) => self.pick(8) == 0,
        }
    }

    /// One of so many.
    fn pick(&mut self, count: usize) -> usize {
        self.state = self.state.wrapping_add(1);
        let at = match self.schedule {
            Schedule::Turns => self.state,
            Schedule::Ahead => 0,
            Schedule::Behind => count as u64 - 1,
            // Sebastiano Vigna's splitmix64.
            Schedule::Random(_) => {
                let mut z = self.state.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
                z ^ z >> 31
            }
        };
        (at % count as u64) as usize
    }
}
