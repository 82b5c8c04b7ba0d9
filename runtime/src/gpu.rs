//! Engines whose kernels run on a GPU: what is loaded once for an engine, and what each session has.
//!
//! Everything goes through a [`Driver`]: NVIDIA's with the feature `cuda`, another one in tests. What holds:
//!
//! - Nothing is uploaded before device, driver, architecture and memory have been checked; each has its own error.
//! - Weights are uploaded once for an engine and shared by its sessions. The last of them to go frees them.
//! - A session's memory is one arena, the pages of each state, and the inputs. It is allocated when the session begins.
//! - Pages belong to all sequences of a session together; each takes them as it grows.
//! - The launches of a call are recorded as a graph the first time that a call of its size is made; later calls of that
//!   size replay it. A graph knows the numbers of tokens and rows, and whether tokens are chosen; lengths of sequences,
//!   pages and options are read on the device.
//! - All device memory, graphs and modules are given back on drop, in the reverse order.
//!
//! Sessions of one engine share a stream: their steps follow each other.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    DEVICE_ALIGN, DeviceInputs, Gpu, GpuEntry, GpuKernel, Input, Launch, Manifest, Ref, RefKind, STATE_BLOCK,
    Sym,
};

#[cfg(feature = "cuda")]
pub mod nvidia;
mod pages;

use pages::Pages;

/// What a device is and has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Major and minor compute capability.
    pub capability: (u32, u32),
    /// The newest CUDA that the driver knows: a thousand times the major and ten times the minor number.
    pub cuda: u32,
    /// Bytes of memory that are free.
    pub free: u64,
    /// Bytes of memory.
    pub total: u64,
    /// Multiprocessors.
    pub multiprocessors: u32,
}

/// One launch, with all addresses known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call<'a> {
    /// The kernel's name, for messages.
    pub symbol: &'a str,
    /// What [`Driver::load`] gave for it.
    pub function: u64,
    /// Columns and rows of the grid.
    pub grid: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory of a block.
    pub shared: u32,
    /// Device addresses.
    pub buffers: &'a [u64],
    /// What follows them.
    pub scalars: &'a [u32],
}

/// What the runtime asks of a GPU. Work is done in the order in which it was asked for.
pub trait Driver: Send {
    /// The device, with its memory as it is now.
    fn device(&mut self) -> Result<Device>;
    /// Device memory, aligned to 256 bytes.
    fn allocate(&mut self, bytes: u64) -> Result<u64>;
    /// Gives memory back.
    fn free(&mut self, at: u64);
    /// Sets bytes.
    fn fill(&mut self, at: u64, byte: u8, bytes: u64) -> Result<()>;
    /// Copies to the device. What is copied may change once this returns.
    fn upload(&mut self, to: u64, from: &[u8]) -> Result<()>;
    /// Copies from the device, and waits for it.
    fn download(&mut self, to: &mut [u8], from: u64) -> Result<()>;
    /// Loads a kernel that is launched with this much shared memory, as machine code or from its text.
    fn load(&mut self, entry: &GpuEntry, launch: &GpuKernel, gpu: &Gpu) -> Result<u64>;
    /// Unloads a kernel.
    fn unload(&mut self, function: u64);
    /// Launches a kernel, or records its launch between [`Driver::begin`] and [`Driver::end`].
    fn launch(&mut self, call: &Call<'_>) -> Result<()>;
    /// Begins to record launches.
    fn begin(&mut self) -> Result<()>;
    /// What was recorded, as a graph that can be replayed.
    fn end(&mut self) -> Result<u64>;
    /// Replays a graph.
    fn replay(&mut self, graph: u64) -> Result<()>;
    /// Forgets a graph.
    fn forget(&mut self, graph: u64);
    /// Waits for everything.
    fn wait(&mut self) -> Result<()>;
    /// What other libraries call the stream that work is done in; 0 where there is none.
    fn stream(&self) -> u64 {
        0
    }
}

/// The driver of this machine.
pub fn driver() -> Result<Box<dyn Driver>> {
    #[cfg(feature = "cuda")]
    {
        Ok(Box::new(nvidia::Nvidia::open()?))
    }
    #[cfg(not(feature = "cuda"))]
    {
        Err(Error::new(
            ErrorKind::Target,
            "this build of the runtime knows no GPUs: build it with the feature `cuda`",
        ))
    }
}

/// Bytes uploaded between two reports of progress.
const PIECE: usize = 64 << 20;

/// An engine's kernels and weights on a device.
pub struct Loaded {
    driver: Mutex<Box<dyn Driver>>,
    device: Device,
    weights_at: u64,
    /// Device address of each weight.
    weights: Vec<u64>,
    functions: BTreeMap<String, u64>,
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loaded").field("device", &self.device).finish_non_exhaustive()
    }
}

impl Loaded {
    /// Checks the device, loads kernels and uploads weights; `progress` is told the bytes done and to do.
    pub(crate) fn new<'a>(
        mut driver: Box<dyn Driver>,
        manifest: &Manifest,
        entries: &[GpuEntry],
        weight: &dyn Fn(usize) -> &'a [u8],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Loaded> {
        let gpu = manifest.gpu.as_ref().ok_or_else(|| Error::input("the engine is for a processor"))?;
        let device = driver.device()?;
        check_device(manifest, gpu, &device)?;
        let need = manifest.device_bytes(1).ok_or_else(|| Error::format("the engine's memory is absurd"))?;
        check_memory(
            need.total(),
            &device,
            &format!("the engine with one sequence of {} tokens", manifest.context),
        )?;
        let mut loaded = Loaded {
            driver: Mutex::new(driver),
            device,
            weights_at: 0,
            weights: vec![],
            functions: BTreeMap::new(),
        };
        let launches: BTreeMap<&str, &GpuKernel> =
            gpu.kernels.iter().map(|k| (k.symbol.as_str(), k)).collect();
        for entry in entries {
            let Some(launch) = launches.get(entry.symbol.as_str()) else { continue };
            let function = loaded.lock().load(entry, launch, gpu)?;
            loaded.functions.insert(entry.symbol.clone(), function);
        }
        if let Some(missing) = launches.keys().find(|symbol| !loaded.functions.contains_key(**symbol)) {
            return Err(Error::object(format!("the file of kernels lacks `{missing}`")));
        }
        if need.weights > 0 {
            let at = loaded.lock().allocate(need.weights)?;
            loaded.weights_at = at;
            let mut done = 0;
            for (index, blob) in manifest.weights.iter().enumerate() {
                let to = at + done;
                loaded.weights.push(to);
                let mut sent = 0;
                for piece in weight(index).chunks(PIECE) {
                    loaded.lock().upload(to + sent, piece)?;
                    sent += piece.len() as u64;
                    progress(done + sent, need.weights);
                }
                done += blob.len.next_multiple_of(DEVICE_ALIGN);
            }
            loaded.lock().wait()?;
        }
        Ok(loaded)
    }

    /// The device, with its memory as it was when the engine was loaded.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn lock(&self) -> MutexGuard<'_, Box<dyn Driver>> {
        self.driver.lock().unwrap_or_else(|broken| broken.into_inner())
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let (at, functions) = (self.weights_at, std::mem::take(&mut self.functions));
        let mut driver = self.lock();
        if at != 0 {
            driver.free(at);
        }
        for function in functions.into_values() {
            driver.unload(function);
        }
    }
}

/// Refuses a device or driver that cannot run the engine's kernels.
fn check_device(manifest: &Manifest, gpu: &Gpu, device: &Device) -> Result<()> {
    let (name, target) = (&device.name, &manifest.target.name);
    let (major, minor) = device.capability;
    let refuse = |what: String| Err(Error::new(ErrorKind::Target, what));
    let Some((want_major, want_minor, exact)) = parse_arch(&gpu.arch) else {
        return Err(Error::format(format!("there is no GPU architecture {:?}", gpu.arch)));
    };
    let runs = major == want_major && if exact { minor == want_minor } else { minor >= want_minor };
    if !runs {
        return refuse(format!(
            "the engine was made for target `{target}` ({}), but this machine's {name} has compute capability {major}.{minor}; \
             compile the model for `cuda-sm{major}{minor}`",
            gpu.arch
        ));
    }
    // Machine code runs with every driver of the same major version, and with later ones.
    if gpu.cuda / 1000 > device.cuda / 1000 {
        return refuse(format!(
            "the engine's kernels were made by CUDA {}.{}, but this machine's driver knows CUDA up to {}.{}: update the driver",
            gpu.cuda / 1000,
            gpu.cuda % 1000 / 10,
            device.cuda / 1000,
            device.cuda % 1000 / 10
        ));
    }
    Ok(())
}

/// Major and minor capability of `sm_90a`, and whether no other runs it.
fn parse_arch(arch: &str) -> Option<(u32, u32, bool)> {
    let digits = arch.strip_prefix("sm_")?;
    let (digits, exact) = match digits.strip_suffix('a') {
        Some(digits) => (digits, true),
        None => (digits, false),
    };
    let number: u32 = digits.parse().ok()?;
    Some((number / 10, number % 10, exact))
}

fn check_memory(need: u64, device: &Device, what: &str) -> Result<()> {
    if need <= device.free {
        return Ok(());
    }
    let (name, free, total) = (&device.name, device.free, device.total);
    Err(Error::new(
        ErrorKind::Memory,
        format!(
            "{what} needs {need} bytes of device memory, but {free} of the {total} of {name} are free; \
             use fewer sequences or a smaller pool of pages, or compile with a smaller context"
        ),
    ))
}

/// Most graphs that a session keeps.
const MOST_GRAPHS: usize = 32;

/// What a session has on a device.
pub(crate) struct Memory {
    loaded: Arc<Loaded>,
    arena: u64,
    states: Vec<u64>,
    /// What blocks of one launch hand each other, and their counters.
    scratch: u64,
    counters: u64,
    /// What is sent before a step.
    inputs: u64,
    layout: DeviceInputs,
    pages: Pages,
    /// Entries of the table of pages for each sequence.
    pages_of_slot: u64,
    /// Entries on their way.
    entries: Vec<u8>,
    /// Graphs by tokens and rows and whether tokens are chosen, the one used last at the end.
    graphs: Vec<((u32, u32, bool), u64)>,
    /// Calls and nanoseconds of each launch of each program, when they are measured.
    times: Vec<Vec<(u64, u64)>>,
    profile: bool,
}

impl Memory {
    /// Allocates, with a pool of `pages` pages; 0 is as many as all sequences can fill.
    pub fn new(
        loaded: Arc<Loaded>,
        manifest: &Manifest,
        slots: u32,
        pages: u32,
        profile: bool,
    ) -> Result<Memory> {
        let most = manifest.pages_of(slots);
        let pages = if pages == 0 { most } else { most.min(pages.into()) };
        let absurd =
            || Error::new(ErrorKind::Memory, format!("the states of {slots} slots are absurdly large"));
        let need = manifest.device_bytes_of(slots, pages).ok_or_else(absurd)?;
        let count = u32::try_from(pages).map_err(|_| absurd())?;
        let device = loaded.lock().device()?;
        let context = manifest.context;
        let what = match pages == most {
            true => format!("a session of {slots} sequences of {context} tokens"),
            false => format!("a session of {slots} sequences with {pages} pages of {STATE_BLOCK} tokens"),
        };
        check_memory(need.total() - need.weights, &device, &what)?;
        let times = manifest.programs.iter().map(|p| vec![(0, 0); p.launches.len()]).collect();
        let mut memory = Memory {
            loaded,
            arena: 0,
            states: vec![],
            scratch: 0,
            counters: 0,
            inputs: 0,
            layout: manifest.device_inputs(slots),
            pages: Pages::new(count, slots, manifest.pages_of_slot() as usize),
            pages_of_slot: manifest.pages_of_slot(),
            entries: Vec::with_capacity(4 * manifest.pages_of_slot() as usize),
            graphs: vec![],
            times,
            profile,
        };
        memory.arena = memory.loaded.lock().allocate(manifest.arena_bytes)?;
        for state in &manifest.states {
            let bytes = pages * u64::from(STATE_BLOCK) * state.row_bytes;
            let at = memory.loaded.lock().allocate(bytes)?;
            memory.states.push(at);
        }
        let (scratch, counters) = manifest.workspace_bytes();
        if scratch > 0 {
            memory.scratch = memory.loaded.lock().allocate(scratch)?;
        }
        if counters > 0 {
            memory.counters = memory.loaded.lock().allocate(counters)?;
            memory.loaded.lock().fill(memory.counters, 0, counters)?;
        }
        memory.inputs = memory.loaded.lock().allocate(memory.layout.bytes)?;
        // No page has this number: what has none is never looked up.
        let DeviceInputs { table, choices, .. } = memory.layout;
        memory.loaded.lock().fill(memory.inputs + table, 0xff, choices - table)?;
        Ok(memory)
    }

    pub fn device(&self) -> &Device {
        self.loaded.device()
    }

    /// Checks that each of some sequences can have so many rows.
    pub fn check_rows(&self, wanted: impl Iterator<Item = (u32, u32)>) -> Result<()> {
        self.pages.check(wanted)
    }

    /// Lets each of some sequences have so many rows, or none of them.
    pub fn reserve(&mut self, wanted: impl Iterator<Item = (u32, u32)> + Clone) -> Result<()> {
        self.pages.check(wanted.clone())?;
        for (slot, rows) in wanted {
            let before = self.pages.of(slot).len();
            if self.pages.grow(slot, rows) {
                let entries = self.pages.of(slot)[before..].iter().flat_map(|page| page.to_le_bytes());
                self.entries.clear();
                self.entries.extend(entries);
                let first = self.pages_of_slot * u64::from(slot) + before as u64;
                let at = self.inputs + self.layout.table + 4 * first;
                if let Err(error) = self.loaded.lock().upload(at, &self.entries) {
                    self.pages.cut(slot, before as u32 * STATE_BLOCK);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Takes back the pages of a sequence behind its first `rows` rows.
    pub fn cut(&mut self, slot: u32, rows: u32) {
        self.pages.cut(slot, rows);
    }

    /// Pages that no sequence has, and all pages.
    pub fn free_pages(&self) -> (u32, u32) {
        self.pages.free()
    }

    /// Copies how tokens of the next call are chosen.
    pub fn send_choices(&mut self, bytes: &[u8]) -> Result<()> {
        self.loaded.lock().upload(self.inputs + self.layout.choices, bytes)
    }

    /// Copies the tokens that the last call has chosen.
    pub fn fetch_chosen(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.loaded.lock().download(bytes, self.inputs + self.layout.chosen)
    }

    /// Fills the arena with NaN.
    pub fn poison(&mut self, bytes: u64) -> Result<()> {
        self.loaded.lock().fill(self.arena, 0xff, bytes)
    }

    /// Copies tokens, positions, bases and types.
    pub fn send_inputs(&mut self, bytes: &[u8]) -> Result<()> {
        self.loaded.lock().upload(self.inputs, bytes)
    }

    /// Copies to the arena.
    pub fn send_rows(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.loaded.lock().upload(self.arena + offset, bytes)
    }

    /// Copies from the arena.
    pub fn fetch(&mut self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.loaded.lock().download(bytes, self.arena + offset)
    }

    /// Runs one launch of a program for a call of `t` tokens and `r` rows.
    pub fn run_one(&self, manifest: &Manifest, program: usize, index: usize, t: u32, r: u32) -> Result<()> {
        self.launch(manifest, &manifest.programs[program].launches[index], t, r)
    }

    /// Chooses a token for each of `r` rows of the result.
    pub fn choose(&self, manifest: &Manifest, r: u32) -> Result<()> {
        let (Some(gpu), Some(RefKind::Arena(output))) = (&manifest.gpu, manifest.output.kind) else {
            return Err(Error::object("there is no result to choose from"));
        };
        let DeviceInputs { choices, chosen, .. } = self.layout;
        let buffers = vec![self.arena + output, self.inputs + choices, self.inputs + chosen];
        self.launch_kernel(manifest, &gpu.sampler, buffers, r, r)
    }

    /// Runs a program for a call of `t` tokens and `r` rows, and perhaps chooses a token for each row.
    pub fn run(&mut self, manifest: &Manifest, program: usize, t: u32, r: u32, choose: bool) -> Result<()> {
        let launches = &manifest.programs[program].launches;
        if self.profile {
            self.loaded.lock().wait()?;
            for (index, launch) in launches.iter().enumerate() {
                let start = Instant::now();
                self.launch(manifest, launch, t, r)?;
                self.loaded.lock().wait()?;
                let (calls, nanos) = &mut self.times[program][index];
                *calls += 1;
                *nanos += start.elapsed().as_nanos() as u64;
            }
            return if choose { self.choose(manifest, r) } else { Ok(()) };
        }
        if let Some(at) = self.graphs.iter().position(|(size, _)| *size == (t, r, choose)) {
            let used = self.graphs.remove(at);
            self.graphs.push(used);
            return self.loaded.lock().replay(used.1);
        }
        self.loaded.lock().begin()?;
        let mut recorded = launches.iter().try_for_each(|launch| self.launch(manifest, launch, t, r));
        if choose {
            recorded = recorded.and_then(|()| self.choose(manifest, r));
        }
        // What was begun is ended, whatever became of it.
        let graph = self.loaded.lock().end();
        if let (Err(error), Ok(graph)) = (&recorded, &graph) {
            self.loaded.lock().forget(*graph);
            return Err(error.clone());
        }
        let graph = graph?;
        if self.graphs.len() == MOST_GRAPHS {
            let (_, oldest) = self.graphs.remove(0);
            self.loaded.lock().forget(oldest);
        }
        self.graphs.push(((t, r, choose), graph));
        self.loaded.lock().replay(graph)
    }

    /// Calls and nanoseconds of a launch.
    pub fn time(&self, program: usize, launch: usize) -> (u64, u64) {
        self.times[program][launch]
    }

    /// Forgets what was measured.
    pub fn clear_times(&mut self) {
        self.times.iter_mut().flatten().for_each(|time| *time = (0, 0));
    }

    fn launch(&self, manifest: &Manifest, launch: &Launch, t: u32, r: u32) -> Result<()> {
        let buffers = launch.args.iter().map(|arg| self.address(arg)).collect();
        self.launch_kernel(manifest, &launch.symbol, buffers, t, r)
    }

    fn launch_kernel(
        &self,
        manifest: &Manifest,
        symbol: &str,
        mut buffers: Vec<u64>,
        t: u32,
        r: u32,
    ) -> Result<()> {
        // The manifest was validated: the kernel is there, and its sizes are sane for every call.
        let kernels = manifest.gpu.as_ref().map_or(&[][..], |gpu| &gpu.kernels);
        let kernel = kernels.iter().find(|kernel| kernel.symbol == symbol);
        let kernel = kernel.ok_or_else(|| Error::object(format!("there is no kernel `{symbol}`")))?;
        let mut grid = [0; 2];
        for (blocks, count) in kernel.grid.iter().zip(&mut grid) {
            *count = blocks.count(t, r).unwrap_or(0);
        }
        if grid.contains(&0) {
            return Ok(());
        }
        let size = |sym: &i32| match Sym::try_from(*sym) {
            Ok(Sym::T) => t,
            Ok(Sym::R) => r,
            Ok(Sym::One) | Err(_) => 1,
        };
        if kernel.scratch_each + kernel.counters_each > 0 {
            buffers.extend([self.scratch, self.counters]);
        }
        let scalars: Vec<u32> = kernel.scalars.iter().map(size).collect();
        let call = Call {
            symbol: &kernel.symbol,
            function: self.loaded.functions.get(&kernel.symbol).copied().unwrap_or(0),
            grid,
            threads: kernel.threads,
            shared: kernel.shared,
            buffers: &buffers,
            scalars: &scalars,
        };
        self.loaded.lock().launch(&call)
    }

    fn address(&self, at: &Ref) -> u64 {
        match at.kind {
            Some(RefKind::Weight(index)) => self.loaded.weights[index as usize],
            Some(RefKind::Arena(offset)) => self.arena + offset,
            Some(RefKind::State(index)) => self.states[index as usize],
            Some(RefKind::Input(input)) => {
                let index = match Input::try_from(input) {
                    Ok(Input::Tokens) | Err(_) => 0,
                    Ok(Input::Positions) => 1,
                    Ok(Input::Base) => 2,
                    Ok(Input::Types) => 3,
                    Ok(Input::Pages) => return self.inputs + self.layout.table,
                };
                self.inputs + index * self.layout.each
            }
            Some(RefKind::Scratch(_) | RefKind::Null(_)) | None => 0,
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let mut driver = self.loaded.lock();
        for (_, graph) in self.graphs.drain(..) {
            driver.forget(graph);
        }
        let memory = [self.inputs, self.counters, self.scratch].into_iter();
        let memory = memory.chain(self.states.drain(..)).chain([self.arena]);
        memory.filter(|&at| at != 0).for_each(|at| driver.free(at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(capability: (u32, u32), cuda: u32) -> Device {
        Device { name: "X".into(), capability, cuda, free: 100, total: 200, multiprocessors: 1 }
    }

    #[test]
    fn machine_code_runs_where_it_was_made_for() {
        let runs = |arch: &str, made: u32, capability, cuda| {
            let gpu =
                Gpu { arch: arch.into(), page_rows: 64, cuda: made, kernels: vec![], sampler: String::new() };
            check_device(&Manifest::empty(), &gpu, &device(capability, cuda))
        };
        for (arch, capability) in
            [("sm_80", (8, 0)), ("sm_80", (8, 6)), ("sm_90a", (9, 0)), ("sm_120a", (12, 0))]
        {
            assert_eq!(runs(arch, 13000, capability, 13000), Ok(()));
        }
        for (arch, capability) in
            [("sm_89", (8, 0)), ("sm_80", (9, 0)), ("sm_90a", (9, 1)), ("sm_100a", (10, 3))]
        {
            let error = runs(arch, 13000, capability, 13000).unwrap_err();
            let (major, minor) = capability;
            assert!(error.message().contains(&format!("`cuda-sm{major}{minor}`")), "{error}");
        }
        assert_eq!(runs("sm_80", 12090, (8, 0), 12020), Ok(()));
        assert_eq!(runs("sm_80", 0, (8, 0), 12020), Ok(()));
        let error = runs("sm_80", 13000, (8, 0), 12080).unwrap_err();
        assert!(error.message().contains("CUDA 13.0") && error.message().contains("up to 12.8"), "{error}");
        assert_eq!(runs("compute_80", 0, (8, 0), 12080).unwrap_err().kind(), ErrorKind::Format);
    }

    #[test]
    fn memory_that_is_not_there_is_told() {
        assert_eq!(check_memory(100, &device((9, 0), 0), "it"), Ok(()));
        let error = check_memory(101, &device((9, 0), 0), "it").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Memory);
        assert!(
            error.message().contains("it needs 101 bytes of device memory, but 100 of the 200 of X"),
            "{error}"
        );
    }
}
