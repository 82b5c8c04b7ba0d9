//! The device as the parts use it: memory that is given back, launches, and times of graphs.

use crate::kernel::{Packed, Ready};
use quantc::ir::diag::{Diag, Result};
use quantc_runtime::format::Gpu;
use quantc_runtime::gpu::{self, Call, Driver};
use std::time::Instant;

/// What a row cannot be made for.
#[derive(Debug)]
pub enum Fault {
    /// Results are wrong.
    Wrong(String),
    /// The driver refused something: what follows in this process may fail because of it.
    Lost(String),
}

impl From<Diag> for Fault {
    fn from(diag: Diag) -> Fault {
        Fault::Wrong(diag.to_string().replace('\n', " "))
    }
}

/// The driver's refusal as a fault.
pub fn lost(e: quantc_runtime::Error) -> Fault {
    Fault::Lost(e.to_string().replace('\n', " "))
}

/// A driver, and what loading kernels takes.
pub struct Device<'a> {
    /// The driver.
    pub driver: Box<dyn Driver>,
    gpu: &'a Gpu,
}

impl<'a> Device<'a> {
    /// The first device of this machine.
    pub fn open(packed: &'a Packed) -> Result<Device<'a>> {
        let driver: Box<dyn Driver> = match crate::interpreted() {
            true => Box::new(crate::interpreted::Interpreter::new(packed)),
            false => gpu::driver().map_err(|e| Diag::target(format!("no GPU to check: {e}")))?,
        };
        Ok(Device { driver, gpu: &packed.gpu })
    }

    /// Bytes of memory that are free.
    pub fn free(&mut self) -> std::result::Result<u64, Fault> {
        self.driver.device().map(|d| d.free).map_err(lost)
    }
}

/// A time in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Time {
    /// The median of some measurements.
    pub us: f64,
    /// How far they lie apart, as a part of it.
    pub spread: f64,
}

/// Fewest launches of a graph of short ones.
const SHORT: usize = 64;

/// Bytes that are copied to the device at a time.
const LONG: usize = 16 << 20;

/// Measurements of which the median is taken.
const SAMPLES: usize = 5;

/// Seconds that the replays of one measurement take at least.
const SAMPLE: f64 = 4e-3;

/// Most replays of one measurement.
const MOST_REPLAYS: u32 = 64;

/// Kernels and memory of one row.
pub struct Held<'d, 'a> {
    device: &'d mut Device<'a>,
    blocks: Vec<u64>,
    functions: Vec<(String, u64)>,
}

impl Drop for Held<'_, '_> {
    fn drop(&mut self) {
        self.blocks.drain(..).for_each(|at| self.device.driver.free(at));
        self.functions.drain(..).for_each(|(_, function)| self.device.driver.unload(function));
    }
}

impl<'d, 'a> Held<'d, 'a> {
    /// Nothing yet.
    pub fn new(device: &'d mut Device<'a>) -> Held<'d, 'a> {
        Held { device, blocks: vec![], functions: vec![] }
    }

    /// With one kernel.
    pub fn load(device: &'d mut Device<'a>, kernel: &Ready) -> std::result::Result<Held<'d, 'a>, Fault> {
        let mut held = Held::new(device);
        held.add(kernel)?;
        Ok(held)
    }

    /// One kernel more.
    pub fn add(&mut self, kernel: &Ready) -> std::result::Result<(), Fault> {
        let gpu = self.device.gpu;
        let function = self.device.driver.load(&kernel.entry, &kernel.launch, gpu).map_err(lost)?;
        self.functions.push((kernel.entry.symbol.clone(), function));
        Ok(())
    }

    /// Memory.
    pub fn allocate(&mut self, bytes: u64) -> std::result::Result<u64, Fault> {
        let at = self.device.driver.allocate(bytes).map_err(lost)?;
        self.blocks.push(at);
        Ok(at)
    }

    /// Memory with these bytes.
    pub fn upload(&mut self, bytes: &[u8]) -> std::result::Result<u64, Fault> {
        let at = self.allocate(bytes.len() as u64)?;
        self.device.driver.upload(at, bytes).map_err(lost)?;
        Ok(at)
    }

    /// So much memory with these bytes, again and again.
    pub fn repeated(&mut self, bytes: u64, piece: &[u8]) -> std::result::Result<u64, Fault> {
        let at = self.allocate(bytes)?;
        self.repeat_at(at, bytes, piece)?;
        Ok(at)
    }

    /// Copies these bytes there again and again.
    pub fn repeat_at(&mut self, at: u64, bytes: u64, piece: &[u8]) -> std::result::Result<(), Fault> {
        let mut done = 0;
        // Pieces that are long enough to be copied at full speed.
        let times = LONG.div_ceil(piece.len()).min(bytes.div_ceil(piece.len() as u64) as usize);
        let long = piece.repeat(times.max(1));
        while done < bytes {
            let count = (bytes - done).min(long.len() as u64);
            self.device.driver.upload(at + done, &long[..count as usize]).map_err(lost)?;
            done += count;
        }
        Ok(())
    }

    /// Memory of one byte, again and again.
    pub fn filled(&mut self, bytes: u64, byte: u8) -> std::result::Result<u64, Fault> {
        let at = self.allocate(bytes)?;
        self.fill(at, bytes, byte)?;
        Ok(at)
    }

    /// Sets bytes.
    pub fn fill(&mut self, at: u64, bytes: u64, byte: u8) -> std::result::Result<(), Fault> {
        self.device.driver.fill(at, byte, bytes).map_err(lost)
    }

    /// What lies there, once everything is done.
    pub fn download(&mut self, at: u64, bytes: usize) -> std::result::Result<Vec<u8>, Fault> {
        let mut to = vec![0; bytes];
        self.device.driver.download(&mut to, at).map_err(lost)?;
        Ok(to)
    }

    /// Waits for everything.
    pub fn wait(&mut self) -> std::result::Result<(), Fault> {
        self.device.driver.wait().map_err(lost)
    }

    /// Launches a loaded kernel for `t` tokens and `r` results.
    pub fn launch(
        &mut self,
        kernel: &Ready,
        buffers: &[u64],
        t: u32,
        r: u32,
    ) -> std::result::Result<(), Fault> {
        let count = |at: usize| kernel.launch.grid[at].count(t, r).unwrap_or(0);
        let size = |name: &String| if name == "r" { r } else { t };
        let scalars: Vec<u32> = kernel.kernel.scalars.iter().map(size).collect();
        let symbol = &kernel.entry.symbol;
        let function = self.functions.iter().find(|(name, _)| name == symbol).map_or(0, |(_, f)| *f);
        let call = Call {
            symbol,
            function,
            grid: [count(0), count(1)],
            threads: kernel.launch.threads,
            shared: kernel.launch.shared,
            buffers,
            scalars: &scalars,
        };
        self.device.driver.launch(&call).map_err(lost)
    }

    /// Launches of a graph that goes through `copies` of something in turn: where they are short so many that what lies
    /// between two replays does not count.
    pub fn launches(copies: usize, short: bool) -> usize {
        if short { copies * SHORT.div_ceil(copies) } else { copies }
    }

    /// The time of one of `count` launches in a graph, where `record` makes the one of this number. What one replay more
    /// takes is measured, so that what a replay costs by itself does not count.
    pub fn time(
        &mut self,
        count: usize,
        record: &mut dyn FnMut(&mut Self, usize) -> std::result::Result<(), Fault>,
    ) -> std::result::Result<Time, Fault> {
        self.device.driver.begin().map_err(lost)?;
        let recorded = (0..count).try_for_each(|i| record(self, i));
        let graph = self.device.driver.end().map_err(lost);
        if let (Err(_), Ok(graph)) = (&recorded, &graph) {
            self.device.driver.forget(*graph);
        }
        recorded?;
        let graph = graph?;
        let time = self.time_graph(graph, count);
        self.device.driver.forget(graph);
        time
    }

    fn time_graph(&mut self, graph: u64, count: usize) -> std::result::Result<Time, Fault> {
        let mut replays = |times: u32| -> std::result::Result<f64, Fault> {
            self.device.driver.wait().map_err(lost)?;
            let start = Instant::now();
            for _ in 0..times {
                self.device.driver.replay(graph).map_err(lost)?;
            }
            self.device.driver.wait().map_err(lost)?;
            Ok(start.elapsed().as_secs_f64())
        };
        replays(1)?;
        let once = replays(1)?.max(1e-6);
        let more = ((SAMPLE / once).ceil() as u32).clamp(1, MOST_REPLAYS);
        let mut times = vec![];
        for _ in 0..SAMPLES {
            let one = replays(1)?;
            times.push((replays(1 + more)? - one).max(1e-9) / f64::from(more) / count as f64);
        }
        times.sort_unstable_by(f64::total_cmp);
        let median = times[SAMPLES / 2];
        Ok(Time { us: median * 1e6, spread: (times[SAMPLES - 1] - times[0]) / median })
    }
}
