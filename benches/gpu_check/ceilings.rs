//! What the device reaches: bytes copied and read, and multiply-adds of its matrix units, by kernels that do nothing else.
//! Shares in the other parts are shares of these.

use crate::cublas::{Cublas, Numbers};
use crate::device::{Device, Held};
use crate::kernel::{Asked, Packed};
use crate::parts::{Part, Verdict};
use crate::random::Random;
use crate::report::Table;
use quantc::ir::diag::{Diag, Result};
use quantc::ir::target::GpuDesc;
use quantc_codegen::cuda::tile::{
    Access, Binary, Builder, Extent, GroupKind, Kernel, Mem, MmaKind, Reg, Unary, Val, WARP,
};
use quantc_codegen::cuda::tiles::{ROWS, TILE_BYTES};
use quantc_codegen::eexpr::MemTy;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A kernel that is nothing but what it measures. All take scalars `t` and `r`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ceiling {
    /// Copies `r` pieces of [`PIECE`] bytes.
    Copy,
    /// Reads as many.
    Read,
    /// `t` times [`STEPS`] products of tiles in each of `r` blocks.
    Products(Numbers),
}

/// Bytes that a block copies or reads.
pub const PIECE: u32 = THREADS * 16 * AHEAD;

/// Threads of a block that copies or reads.
const THREADS: u32 = 256;

/// Words of 16 bytes that a thread has under way.
const AHEAD: u32 = 4;

/// Output columns of a group's product, and those of a tile of warps.
const COLUMNS: u32 = 256;

/// Products of 32 bytes of each row, between two looks at the loop's end.
const STEPS: u32 = 16;

/// Groups of warps of a block, or warps by four.
const GROUPS: u32 = 2;

/// Sums of 16 by 8 of a warp, where single warps multiply.
const WARP_SUMS: u32 = 16;

impl Ceiling {
    /// Whether a GPU has the products.
    pub fn exists(self, gpu: &GpuDesc) -> bool {
        self != Ceiling::Products(Numbers::Fp8) || groups(gpu)
    }

    /// Multiply-adds of a launch.
    fn macs(self, t: u32, r: u32, gpu: &GpuDesc) -> f64 {
        let Ceiling::Products(numbers) = self else { return 0.0 };
        let depth = 32 / numbers.bytes();
        let block = if groups(gpu) {
            GROUPS * ROWS * COLUMNS * depth
        } else {
            GROUPS * 4 * WARP_SUMS * 16 * 8 * depth
        };
        f64::from(t) * f64::from(r) * f64::from(STEPS) * f64::from(block)
    }
}

/// Whether groups of warps multiply, which is then what the matrix units reach their rate by.
fn groups(gpu: &GpuDesc) -> bool {
    gpu.arch == "sm_90a"
}

fn start(name: &str, threads: u32) -> (Builder, Mem, Mem) {
    let mut b = Builder::new(name, threads);
    let x = b.buffer("x", Access::Read);
    let out = b.buffer("out", Access::Write);
    b.scalar("t");
    let r = b.scalar("r");
    b.grid(Extent::PerScalar { scalar: r, times: 1, per: 1 }, Extent::Fixed(1));
    (b, x, out)
}

/// The kernel, called `name`, for a GPU.
pub fn build(name: &str, ceiling: Ceiling, gpu: &GpuDesc) -> Kernel {
    match ceiling {
        Ceiling::Copy | Ceiling::Read => memory(name, ceiling == Ceiling::Copy),
        Ceiling::Products(numbers) if groups(gpu) => group_products(name, numbers),
        Ceiling::Products(numbers) => warp_products(name, numbers),
    }
}

/// Copies, or reads and writes where all words of a thread are zero in sum, which they hardly ever are.
fn memory(name: &str, copies: bool) -> Kernel {
    let (mut b, x, out) = start(name, THREADS);
    let (block, thread) = (b.block_x(), b.thread());
    let first = b.mul(block, PIECE);
    let at = b.mad(thread, 16, first);
    let places: Vec<Val> = (0..AHEAD).map(|i| b.add(at, i * THREADS * 16)).collect();
    let words: Vec<Vec<Val>> = places.iter().map(|&at| b.load(x, at, 16)).collect();
    if copies {
        for (at, words) in places.into_iter().zip(&words) {
            b.store(out, at, words, 16);
        }
        return b.finish();
    }
    let mut sum: Val = 0.into();
    for &word in words.iter().flatten() {
        sum = b.binary(Binary::Xor, sum, word);
    }
    let zero = b.lt(sum, 1);
    let at = b.mad(block, THREADS, thread);
    let at = b.mul(at, 4);
    b.when(zero, |b| b.store(out, at, &[sum], 4));
    b.finish()
}

/// Both sides in shared memory, brought there once.
fn group_products(name: &str, numbers: Numbers) -> Kernel {
    let threads = GROUPS * 4 * WARP;
    let (mut b, x, out) = start(name, threads);
    let tiles = GROUPS + COLUMNS / ROWS;
    // A barrier first, and tiles from a multiple of 1024 on.
    b.shared(1024 + tiles * TILE_BYTES);
    let thread = b.thread();
    let first = b.lt(thread, 1);
    b.when(first, |b| {
        b.bar_init(0, 1);
        b.bar_fence();
    });
    b.barrier();
    b.when(first, |b| {
        b.bar_expect(0, tiles * TILE_BYTES);
        for i in 0..tiles {
            let from = b.unary(Unary::Widen, i * TILE_BYTES);
            b.bulk_copy((1024 + i * TILE_BYTES).into(), x, from, TILE_BYTES, 0.into());
        }
    });
    b.bar_wait(0, 0);
    let kind = match numbers {
        Numbers::Bf16 => GroupKind::Bf16,
        Numbers::Int8 => GroupKind::S8,
        Numbers::Fp8 => GroupKind::E4m3,
    };
    let integer = kind == GroupKind::S8;
    let acc: Vec<Reg> = (0..COLUMNS / 2).map(|_| if integer { b.var(0) } else { b.var(0.0) }).collect();
    let group = b.div(thread, 4 * WARP);
    let left = b.mad(group, TILE_BYTES, 1024);
    let times = b.scalar_value(0);
    b.repeat(0, times, 1, |b, _| {
        b.group_fence();
        for i in 0..STEPS {
            let left = b.add(left, 32 * (i % 4));
            b.group_mma(kind, &acc, left, (1024 + GROUPS * TILE_BYTES + 32 * (i % 4)).into(), false);
        }
        b.group_commit();
        b.group_wait(0, &acc);
    });
    sum_up(&mut b, out, &acc, integer, threads);
    b.finish()
}

/// Both sides in registers.
fn warp_products(name: &str, numbers: Numbers) -> Kernel {
    let threads = GROUPS * 4 * WARP;
    let (mut b, x, out) = start(name, threads);
    let thread = b.thread();
    let at = b.mul(thread, 32);
    let a = b.load(x, at, 16);
    let at = b.add(at, 16);
    let right = b.load(x, at, 16);
    let (kind, integer) = match numbers {
        Numbers::Int8 => (MmaKind::S8, true),
        _ => (MmaKind::Bf16, false),
    };
    let acc: Vec<Reg> = (0..4 * WARP_SUMS).map(|_| if integer { b.var(0) } else { b.var(0.0) }).collect();
    let times = b.scalar_value(0);
    b.repeat(0, times, 1, |b, _| {
        for _ in 0..STEPS {
            for sums in acc.chunks_exact(4) {
                let sums = [sums[0], sums[1], sums[2], sums[3]];
                b.mma(kind, sums, [a[0], a[1], a[2], a[3]], [right[0], right[1]]);
            }
        }
    });
    sum_up(&mut b, out, &acc, integer, threads);
    b.finish()
}

/// Writes a number that needs all sums of a thread.
fn sum_up(b: &mut Builder, out: Mem, acc: &[Reg], integer: bool, threads: u32) {
    let mut sum: Val = acc[0].into();
    for &next in &acc[1..] {
        sum = b.binary(if integer { Binary::Add } else { Binary::FAdd }, sum, next);
    }
    let word = if integer { sum } else { b.unary(Unary::Bits, sum) };
    let (block, thread) = (b.block_x(), b.thread());
    let at = b.mad(block, threads, thread);
    let at = b.mul(at, 4);
    b.store(out, at, &[word], 4);
}

/// What was measured. A rate that was not is the data sheet's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ceilings {
    /// GB/s of a copy, bytes read and bytes written together.
    pub copy: f64,
    /// GB/s of reading.
    pub read: f64,
    /// 10^12 multiply-adds a second of bf16, int8 and fp8.
    pub products: [f64; 3],
    /// What was not measured.
    pub assumed: Vec<String>,
}

const FILE: &str = "ceilings.json";

impl Ceilings {
    fn of_sheet(gpu: &GpuDesc) -> Ceilings {
        let rates = &gpu.rates;
        let names = ["copy", "read", "bf16", "int8", "fp8"];
        Ceilings {
            copy: rates.memory_gb,
            read: rates.memory_gb,
            products: [rates.bf16_tmac, rates.int8_tmac, rates.int8_tmac],
            assumed: names.map(str::to_owned).to_vec(),
        }
    }

    /// What the part before has left, or the data sheet.
    pub fn read(scratch: &Path, gpu: &GpuDesc) -> Ceilings {
        let text = std::fs::read_to_string(scratch.join(FILE)).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_else(|_| Ceilings::of_sheet(gpu))
    }

    /// 10^12 multiply-adds a second.
    pub fn tmac(&self, numbers: Numbers) -> f64 {
        self.products[numbers as usize]
    }

    fn save(&self, scratch: &Path) -> Result<()> {
        let at = scratch.join(FILE);
        let text = serde_json::to_string(self).map_err(|e| Diag::bug(format!("ceilings: {e}")))?;
        std::fs::write(&at, text).map_err(|e| crate::system(&at, &e))
    }

    fn measured(&mut self, name: &str) {
        self.assumed.retain(|n| n != name);
    }

    /// One line for the head of a table.
    pub fn note(&self) -> String {
        if self.assumed.is_empty() {
            "Shares are of the ceilings measured above.".into()
        } else {
            format!("Not measured, so taken from data sheets: {}.", self.assumed.join(", "))
        }
    }
}

/// Bytes that the copy reads, and a part of them where little memory is free.
fn bytes(device: &mut Device<'_>) -> u64 {
    let most = device.free().unwrap_or(0) / 4;
    (1u64 << 30).min(most / u64::from(PIECE) * u64::from(PIECE))
}

const PRODUCTS: [Numbers; 3] = [Numbers::Bf16, Numbers::Int8, Numbers::Fp8];

fn all() -> impl Iterator<Item = Ceiling> {
    [Ceiling::Copy, Ceiling::Read].into_iter().chain(PRODUCTS.map(Ceiling::Products))
}

/// The kernels of all of them.
pub fn kernels() -> Vec<Asked> {
    all().map(Asked::Ceiling).collect()
}

/// Measures them, prints them and leaves them to the other parts.
pub fn run(part: &Part<'_>, packed: &Packed) -> Result<Verdict> {
    let gpu = &packed.target.gpu;
    let sheet = Ceilings::of_sheet(gpu);
    let mut ceilings = if part.from == 0 { sheet.clone() } else { Ceilings::read(part.scratch, gpu) };
    let mut table = Table::new(part, "Ceilings", "", &["ceiling", "by", "reached", "data sheet"]);
    let mut device = Device::open(packed)?;
    let bytes = bytes(&mut device);
    let pieces = (bytes / u64::from(PIECE)) as u32;
    let blocks = gpu.rates.multiprocessors;
    let kernels: Vec<Ceiling> = all().collect();
    let blas = Cublas::open(device.driver.stream());
    for (i, &ceiling) in kernels.iter().enumerate() {
        let Some(kernel) = packed.find(&Asked::Ceiling(ceiling)) else { continue };
        table.each(i, |say| {
            let mut held = Held::load(&mut device, kernel)?;
            let mut random = Random(7 + i as u64);
            match ceiling {
                Ceiling::Copy | Ceiling::Read => {
                    let piece = random.numbers(MemTy::Bf16, 1 << 20);
                    let x = held.repeated(bytes, &piece)?;
                    let out = held.allocate(bytes)?;
                    let time = held.time(1, &mut |held, _| held.launch(kernel, &[x, out], 1, pieces))?;
                    let moved = if ceiling == Ceiling::Copy { 2 * bytes } else { bytes };
                    let rate = moved as f64 / time.us / 1e3;
                    let name = if ceiling == Ceiling::Copy { "copy" } else { "read" };
                    match ceiling {
                        Ceiling::Copy => ceilings.copy = rate,
                        _ => ceilings.read = rate,
                    }
                    ceilings.measured(name);
                    say(vec![
                        name.into(),
                        "quantc".into(),
                        format!("{rate:.0} GB/s"),
                        format!("{:.0} GB/s", sheet.copy),
                    ]);
                }
                Ceiling::Products(numbers) => {
                    let sides = random.operands(numbers, 64 << 10);
                    let x = held.upload(&sides)?;
                    let out = held.allocate(u64::from(blocks * GROUPS * 4 * WARP * 4))?;
                    let times = 2000;
                    let time = held.time(1, &mut |held, _| held.launch(kernel, &[x, out], times, blocks))?;
                    let rate = ceiling.macs(times, blocks, gpu) / time.us / 1e6;
                    ceilings.products[numbers as usize] = rate;
                    ceilings.measured(numbers.name());
                    say(vec![
                        numbers.name().into(),
                        "quantc".into(),
                        format!("{:.0} T/s", 2.0 * rate),
                        format!("{:.0} T/s", 2.0 * sheet.tmac(numbers)),
                    ]);
                }
            }
            Ok(())
        })?;
        ceilings.save(part.scratch)?;
    }
    match blas {
        Err(why) => table.skipped(&format!("cuBLASLt is left out: {why}")),
        Ok(mut blas) => {
            for (i, numbers) in (kernels.len()..).zip(PRODUCTS) {
                table.each(i, |say| {
                    let [m, n, k] = [if part.small { 512 } else { 8192 }; 3];
                    let time = blas.time(&mut device, numbers, m, n, k)?;
                    let rate = f64::from(m) * f64::from(n) * f64::from(k) / time.us / 1e6;
                    say(vec![
                        numbers.name().into(),
                        format!("cuBLASLt {}", blas.version()),
                        format!("{:.0} T/s", 2.0 * rate),
                        format!("{:.0} T/s", 2.0 * sheet.tmac(numbers)),
                    ]);
                    Ok(())
                })?;
            }
        }
    }
    Ok(table.finish())
}
