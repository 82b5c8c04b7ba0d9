//! A device of the interpreter of tile IR: shows on a machine without a GPU that inputs and references of the checks are right,
//! since kernels are. It keeps no time.

use crate::kernel::Packed;
use quantc_codegen::cuda::interp::{self, Schedule};
use quantc_codegen::cuda::tile::{Access, Kernel};
use quantc_runtime::format::{Gpu, GpuEntry, GpuKernel};
use quantc_runtime::gpu::{Call, Device, Driver};
use quantc_runtime::{Error, ErrorKind, Result};
use std::collections::BTreeMap;

/// Distance between the beginnings of blocks: whatever runs off one does not reach the next.
const APART: u64 = 1 << 40;

/// A launch that was recorded.
struct Recorded {
    function: u64,
    buffers: Vec<u64>,
    scalars: Vec<u32>,
}

/// The device.
pub struct Interpreter {
    kernels: Vec<Kernel>,
    blocks: BTreeMap<u64, Vec<u8>>,
    graphs: Vec<Vec<Recorded>>,
    open: Option<Vec<Recorded>>,
    next: u64,
    capability: (u32, u32),
}

fn broken(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Device, what)
}

impl Interpreter {
    /// A device for the kernels of a folder.
    pub fn new(packed: &Packed) -> Interpreter {
        Interpreter::with(packed.kernels.iter().map(|k| k.kernel.clone()).collect(), &packed.gpu.arch)
    }

    /// A device for these kernels.
    pub fn with(kernels: Vec<Kernel>, arch: &str) -> Interpreter {
        let digits: String = arch.chars().filter(char::is_ascii_digit).collect();
        let number: u32 = digits.parse().unwrap_or(0);
        Interpreter {
            kernels,
            blocks: BTreeMap::new(),
            graphs: vec![],
            open: None,
            next: 0,
            capability: (number / 10, number % 10),
        }
    }

    fn bytes(&mut self, at: u64) -> Result<&mut [u8]> {
        let block = self.blocks.get_mut(&(at / APART * APART));
        let rest = block.and_then(|block| block.get_mut((at % APART) as usize..));
        rest.ok_or_else(|| broken(format!("address {at:#x} is not allocated")))
    }

    fn run(&mut self, function: u64, buffers: &[u64], scalars: &[u32]) -> Result<()> {
        let kernel = self.kernels.get((function as usize).wrapping_sub(1)).cloned();
        let kernel = kernel.ok_or_else(|| broken("a kernel that is not loaded"))?;
        let mut contents = vec![];
        for &at in buffers {
            contents.push(self.bytes(at)?.to_vec());
        }
        let memory = interp::run(&kernel, &contents, scalars, Schedule::Ahead)
            .map_err(|fault| broken(format!("{}: {fault}", kernel.name)))?;
        for ((desc, &at), out) in kernel.buffers.iter().zip(buffers).zip(&memory.buffers) {
            if matches!(desc.access, Access::Write | Access::Update) {
                let bytes = self.bytes(at)?;
                for ((to, &from), _) in bytes.iter_mut().zip(&out.data).zip(&out.written).filter(|(_, w)| **w)
                {
                    *to = from;
                }
            }
        }
        Ok(())
    }
}

impl Driver for Interpreter {
    fn device(&mut self) -> Result<Device> {
        let (name, capability) = ("the interpreter".into(), self.capability);
        Ok(Device { name, capability, cuda: 13000, free: 1 << 30, total: 1 << 30, multiprocessors: 2 })
    }

    fn allocate(&mut self, bytes: u64) -> Result<u64> {
        self.next += APART;
        self.blocks.insert(self.next, vec![0xff; bytes as usize]);
        Ok(self.next)
    }

    fn free(&mut self, at: u64) {
        self.blocks.remove(&at);
    }

    fn fill(&mut self, at: u64, byte: u8, count: u64) -> Result<()> {
        self.bytes(at)?[..count as usize].fill(byte);
        Ok(())
    }

    fn upload(&mut self, to: u64, from: &[u8]) -> Result<()> {
        self.bytes(to)?[..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn download(&mut self, to: &mut [u8], from: u64) -> Result<()> {
        let bytes = self.bytes(from)?;
        to.copy_from_slice(&bytes[..to.len()]);
        Ok(())
    }

    fn load(&mut self, entry: &GpuEntry, _: &GpuKernel, _: &Gpu) -> Result<u64> {
        let at = self.kernels.iter().position(|k| k.name == entry.symbol);
        at.map(|at| at as u64 + 1).ok_or_else(|| broken(format!("no kernel `{}`", entry.symbol)))
    }

    fn unload(&mut self, _: u64) {}

    fn launch(&mut self, call: &Call<'_>) -> Result<()> {
        match &mut self.open {
            Some(open) => {
                let (function, scalars) = (call.function, call.scalars.to_vec());
                open.push(Recorded { function, buffers: call.buffers.to_vec(), scalars });
                Ok(())
            }
            None => self.run(call.function, call.buffers, call.scalars),
        }
    }

    fn begin(&mut self) -> Result<()> {
        self.open = Some(vec![]);
        Ok(())
    }

    fn end(&mut self) -> Result<u64> {
        self.graphs.push(self.open.take().unwrap_or_default());
        Ok(self.graphs.len() as u64)
    }

    fn replay(&mut self, graph: u64) -> Result<()> {
        let at = graph as usize - 1;
        let calls = std::mem::take(&mut self.graphs[at]);
        let done = calls.iter().try_for_each(|c| self.run(c.function, &c.buffers, &c.scalars));
        self.graphs[at] = calls;
        done
    }

    fn forget(&mut self, graph: u64) {
        self.graphs[graph as usize - 1].clear();
    }

    fn wait(&mut self) -> Result<()> {
        Ok(())
    }
}
