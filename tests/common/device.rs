//! A GPU in Rust: device memory in blocks of bytes, kernels run by the interpreter of tile IR with all its checks, and a
//! log of what was asked for.
//!
//! The runtime goes through it as through NVIDIA's driver, so what is tested is what a GPU would be asked to do. Kernels
//! are made again from the specs that an engine carries, and must be launched as the engine says.

use quantc_codegen::cuda::interp::{self, Schedule};
use quantc_codegen::cuda::plan;
use quantc_codegen::cuda::tile::{Access, Kernel};
use quantc_codegen::targets::GPUS;
use quantc_runtime::format::{Gpu, GpuEntry, GpuKernel};
use quantc_runtime::gpu::{Call, Device, Driver};
use quantc_runtime::{Error, ErrorKind, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

/// What was asked of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    Allocate(u64),
    Free,
    Upload(usize),
    Download(usize),
    Load(String),
    Unload,
    Begin,
    End,
    Replay,
    Forget,
    Launch { symbol: String, grid: [u32; 2], scalars: Vec<u32>, recorded: bool },
}

/// What tests see of a device while a session has it.
#[derive(Debug, Default)]
pub struct Seen {
    pub asked: Vec<Asked>,
    /// What is held: blocks of memory, kernels, graphs.
    pub blocks: BTreeMap<u64, Vec<u8>>,
    pub kernels: usize,
    pub graphs: usize,
}

/// A launch with its own copies of what it is about.
#[derive(Clone, Debug)]
struct Recorded {
    function: u64,
    grid: [u32; 2],
    buffers: Vec<u64>,
    scalars: Vec<u32>,
}

/// The device.
pub struct Interpreter {
    pub device: Device,
    pub seen: Arc<Mutex<Seen>>,
    kernels: BTreeMap<u64, Kernel>,
    graphs: BTreeMap<u64, Vec<Recorded>>,
    open: Option<Vec<Recorded>>,
    next: u64,
    /// Refuses this request, counted from 0.
    pub fail_at: Option<usize>,
    requests: usize,
}

/// Distance between the beginnings of blocks: whatever runs off one does not reach the next.
const APART: u64 = 1 << 32;

impl Interpreter {
    /// A device on which kernels for `arch` run.
    pub fn new(arch: &str) -> Interpreter {
        let digits: String = arch.chars().filter(char::is_ascii_digit).collect();
        let number: u32 = digits.parse().expect("an architecture has a number");
        let capability = (number / 10, number % 10);
        let (free, total) = (1 << 40, 1 << 40);
        let device =
            Device { name: "Interpreter".into(), capability, cuda: 13000, free, total, multiprocessors: 2 };
        Interpreter {
            device,
            seen: Arc::default(),
            kernels: BTreeMap::new(),
            graphs: BTreeMap::new(),
            open: None,
            next: 0,
            fail_at: None,
            requests: 0,
        }
    }

    fn note(&mut self, what: Asked) -> Result<()> {
        self.seen.lock().expect("no test panics while it looks").asked.push(what);
        let request = self.requests;
        self.requests += 1;
        match self.fail_at {
            Some(at) if at == request => Err(Error::new(ErrorKind::Device, "asked to fail")),
            _ => Ok(()),
        }
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Does something with bytes of a block.
    fn bytes<R>(&self, at: u64, f: impl FnOnce(&mut [u8]) -> R) -> Result<R> {
        let mut seen = self.seen.lock().expect("no test panics while it looks");
        let block = seen.blocks.get_mut(&(at / APART * APART));
        let rest = block.and_then(|block| block.get_mut((at % APART) as usize..));
        let outside = || Error::new(ErrorKind::Device, format!("address {at:#x} is not allocated"));
        rest.map(f).ok_or_else(outside)
    }

    fn run(&self, call: &Recorded) -> Result<()> {
        let kernel = &self.kernels[&call.function];
        let broken = |what: String| Error::new(ErrorKind::Device, format!("{}: {what}", kernel.name));
        let grid = kernel.grid.map(|extent| extent.blocks(&call.scalars));
        if grid != call.grid {
            return Err(broken(format!("launched with {:?} blocks, it wants {grid:?}", call.grid)));
        }
        if kernel.buffers.len() != call.buffers.len() {
            return Err(broken(format!("{} buffers", call.buffers.len())));
        }
        let contents: Vec<Vec<u8>> =
            call.buffers.iter().map(|&at| self.bytes(at, |bytes| bytes.to_vec())).collect::<Result<_>>()?;
        let memory = interp::run(kernel, &contents, &call.scalars, Schedule::Ahead)
            .map_err(|fault| broken(fault.to_string()))?;
        for ((desc, &at), out) in kernel.buffers.iter().zip(&call.buffers).zip(&memory.buffers) {
            if !matches!(desc.access, Access::Write | Access::Update) {
                continue;
            }
            self.bytes(at, |bytes| {
                for ((to, &from), _) in bytes.iter_mut().zip(&out.data).zip(&out.written).filter(|(_, w)| **w)
                {
                    *to = from;
                }
            })?;
        }
        Ok(())
    }
}

impl Driver for Interpreter {
    fn device(&mut self) -> Result<Device> {
        Ok(self.device.clone())
    }

    fn allocate(&mut self, bytes: u64) -> Result<u64> {
        self.note(Asked::Allocate(bytes))?;
        let at = self.fresh() * APART;
        // What was never written shows: these bytes are NaN in every format.
        let block = vec![0xff; usize::try_from(bytes).expect("tests ask for little")];
        self.seen.lock().expect("no test panics while it looks").blocks.insert(at, block);
        Ok(at)
    }

    fn free(&mut self, at: u64) {
        let _ = self.note(Asked::Free);
        let block = self.seen.lock().expect("no test panics while it looks").blocks.remove(&at);
        assert!(block.is_some(), "freed twice: {at:#x}");
    }

    fn fill(&mut self, at: u64, byte: u8, count: u64) -> Result<()> {
        self.bytes(at, |bytes| bytes[..count as usize].fill(byte))
    }

    fn upload(&mut self, to: u64, from: &[u8]) -> Result<()> {
        self.note(Asked::Upload(from.len()))?;
        self.bytes(to, |bytes| bytes[..from.len()].copy_from_slice(from))
    }

    fn download(&mut self, to: &mut [u8], from: u64) -> Result<()> {
        self.note(Asked::Download(to.len()))?;
        self.bytes(from, |bytes| to.copy_from_slice(&bytes[..to.len()]))
    }

    fn load(&mut self, entry: &GpuEntry, launch: &GpuKernel, gpu: &Gpu) -> Result<u64> {
        self.note(Asked::Load(entry.symbol.clone()))?;
        let target = GPUS.iter().find(|g| g.gpu.arch == gpu.arch).expect("engines are for known GPUs");
        let want: plan::Want = serde_json::from_str(&entry.spec).expect("a spec reads back");
        let planned = plan::kernel(&entry.symbol, &want, &target.gpu).expect("the kernel was made before");
        let wanted = plan::launch(&planned.kernel, launch.registers).expect("as above");
        assert_eq!(&wanted, launch, "the engine launches kernels as they are");
        let function = self.fresh();
        self.kernels.insert(function, planned.kernel);
        self.seen.lock().expect("no test panics while it looks").kernels += 1;
        Ok(function)
    }

    fn unload(&mut self, function: u64) {
        let _ = self.note(Asked::Unload);
        assert!(self.kernels.remove(&function).is_some(), "unloaded twice");
        self.seen.lock().expect("no test panics while it looks").kernels -= 1;
    }

    fn launch(&mut self, call: &Call<'_>) -> Result<()> {
        let (symbol, scalars) = (call.symbol.to_owned(), call.scalars.to_vec());
        let recorded = self.open.is_some();
        self.note(Asked::Launch { symbol, grid: call.grid, scalars: scalars.clone(), recorded })?;
        let kernel = &self.kernels[&call.function];
        assert_eq!((call.threads, call.shared), (kernel.threads, kernel.shared), "{}", call.symbol);
        let call =
            Recorded { function: call.function, grid: call.grid, buffers: call.buffers.to_vec(), scalars };
        match &mut self.open {
            Some(open) => open.push(call),
            None => self.run(&call)?,
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<()> {
        self.note(Asked::Begin)?;
        assert!(self.open.is_none(), "two recordings at once");
        self.open = Some(vec![]);
        Ok(())
    }

    fn end(&mut self) -> Result<u64> {
        self.note(Asked::End)?;
        let graph = self.fresh();
        self.graphs.insert(graph, self.open.take().expect("a recording was begun"));
        self.seen.lock().expect("no test panics while it looks").graphs += 1;
        Ok(graph)
    }

    fn replay(&mut self, graph: u64) -> Result<()> {
        self.note(Asked::Replay)?;
        self.graphs[&graph].iter().try_for_each(|call| self.run(call))
    }

    fn forget(&mut self, graph: u64) {
        let _ = self.note(Asked::Forget);
        assert!(self.graphs.remove(&graph).is_some(), "forgotten twice");
        self.seen.lock().expect("no test panics while it looks").graphs -= 1;
    }

    fn wait(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Symbols of the kernels that were launched.
pub fn launched(seen: &Seen) -> BTreeSet<String> {
    let symbol = |asked: &Asked| match asked {
        Asked::Launch { symbol, .. } => Some(symbol.clone()),
        _ => None,
    };
    seen.asked.iter().filter_map(symbol).collect()
}
