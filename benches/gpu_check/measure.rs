//! Kernels on a GPU: what they give beside what the interpreter gives, and how long they take.

use crate::inputs::{self, Buffer, Random};
use crate::{Ready, table};
use half::{bf16, f16};
use quantc::ir::diag::{Diag, Result};
use quantc::ir::target::GpuTarget;
use quantc_codegen::cuda::interp::{self, Schedule};
use quantc_codegen::cuda::plan;
use quantc_codegen::cuda::tile::Access;
use quantc_codegen::eexpr::MemTy;
use quantc_runtime::format::Gpu;
use quantc_runtime::gpu::{Call, Driver};
use std::time::{Duration, Instant};

/// What outputs hold before a kernel runs.
const POISON: u8 = 0xa5;

/// Device memory that is given back.
struct Held<'a> {
    driver: &'a mut dyn Driver,
    blocks: Vec<u64>,
    function: Option<u64>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.blocks.drain(..).for_each(|at| self.driver.free(at));
        if let Some(function) = self.function.take() {
            self.driver.unload(function);
        }
    }
}

fn refused(e: quantc_runtime::Error) -> Diag {
    Diag::system(e.to_string())
}

impl<'a> Held<'a> {
    fn load(driver: &'a mut dyn Driver, gpu: &Gpu, kernel: &Ready) -> Result<Held<'a>> {
        let function = driver.load(&kernel.entry, &kernel.launch, gpu).map_err(refused)?;
        Ok(Held { driver, blocks: vec![], function: Some(function) })
    }

    fn allocate(&mut self, bytes: usize) -> Result<u64> {
        let at = self.driver.allocate(bytes as u64).map_err(refused)?;
        self.blocks.push(at);
        Ok(at)
    }

    fn upload(&mut self, bytes: &[u8]) -> Result<u64> {
        let at = self.allocate(bytes.len())?;
        self.driver.upload(at, bytes).map_err(refused)?;
        Ok(at)
    }

    fn launch(&mut self, kernel: &Ready, buffers: &[u64], m: u32) -> Result<()> {
        let count = |at: usize| kernel.launch.grid[at].count(m, m).unwrap_or(0);
        let scalars = vec![m; kernel.launch.scalars.len()];
        let call = Call {
            symbol: &kernel.entry.symbol,
            function: self.function.unwrap_or(0),
            grid: [count(0), count(1)],
            threads: kernel.launch.threads,
            shared: kernel.launch.shared,
            buffers,
            scalars: &scalars,
        };
        self.driver.launch(&call).map_err(refused)
    }
}

/// Runs every kernel of the table on random inputs, and compares. The interpreter computes with the same operations in the
/// same order, except inside of matrix products, and tests compare it with f64.
pub fn correctness(driver: &mut dyn Driver, gpu: &Gpu, kernels: &[Ready]) -> Result<bool> {
    println!("## Kernels\n\n| kernel | template | rows | largest error | |\n|---|---|---|---|---|");
    let (mut random, mut all_right) = (Random(1), true);
    let wanted = table::kernels(false);
    for kernel in kernels.iter().filter(|k| wanted.contains(&k.want)) {
        for m in rows_of_calls(kernel.want.tokens.max) {
            let (symbol, template) = (&kernel.entry.symbol, kernel.planned.template);
            let (text, right) = match one(driver, gpu, kernel, m, &mut random) {
                Ok(error) => (format!("{error:.1e}"), true),
                Err(diag) => (diag.to_string().replace('\n', " "), false),
            };
            println!(
                "| `{symbol}` | {template} | {m} | {text} | {} |",
                if right { "right" } else { "**wrong**" }
            );
            all_right &= right;
        }
    }
    println!();
    Ok(all_right)
}

/// Odd numbers of rows in a class.
fn rows_of_calls(max: u32) -> Vec<u32> {
    match max {
        1 => vec![1],
        2..=8 => vec![1, 7],
        9..=64 => vec![33],
        _ => vec![100],
    }
}

/// The largest error of a kernel's outputs, as a part of their largest number; the error tells what is wrong.
fn one(driver: &mut dyn Driver, gpu: &Gpu, kernel: &Ready, m: u32, random: &mut Random) -> Result<f64> {
    let mut buffers = inputs::of(&kernel.want, m, random)?;
    let workspace = kernel.planned.kernel.buffers.iter().skip(buffers.len());
    let workspace: Vec<Access> = workspace.map(|b| b.access).collect();
    for access in &workspace {
        let each =
            if *access == Access::Scratch { kernel.launch.scratch_each } else { kernel.launch.counters_each };
        buffers.push(Buffer::Given(vec![0; (each * u64::from(m)) as usize]));
    }
    let contents: Vec<Vec<u8>> = buffers
        .iter()
        .map(|b| match b {
            Buffer::Given(bytes) => bytes.clone(),
            Buffer::Made { bytes, .. } => vec![POISON; *bytes],
        })
        .collect();
    let scalars = vec![m; kernel.launch.scalars.len()];
    let want = interp::run(&kernel.planned.kernel, &contents, &scalars, Schedule::Ahead)
        .map_err(|fault| Diag::bug(format!("the interpreter refuses it: {fault}")))?;

    let mut held = Held::load(driver, gpu, kernel)?;
    let at: Vec<u64> = contents.iter().map(|bytes| held.upload(bytes)).collect::<Result<_>>()?;
    held.launch(kernel, &at, m)?;
    held.driver.wait().map_err(refused)?;
    let mut worst = 0.0f64;
    for (i, buffer) in buffers.iter().enumerate() {
        let Buffer::Made { bytes, ty } = buffer else { continue };
        let mut got = vec![0; *bytes];
        held.driver.download(&mut got, at[i]).map_err(refused)?;
        let name = &kernel.planned.kernel.buffers[i].name;
        worst = worst.max(compare(name, &got, &want.buffers[i], *ty)?);
    }
    Ok(worst)
}

/// Compares what was written, and that nothing else was.
fn compare(name: &str, got: &[u8], want: &interp::Bytes, ty: MemTy) -> Result<f64> {
    let size = ty.bytes();
    let wrong = |what: String| Err(Diag::input(format!("`{name}`: {what}")));
    let largest = want.data.chunks_exact(size).zip(want.written.chunks_exact(size));
    let largest = largest.filter(|(_, w)| w[0]).map(|(b, _)| number(b, ty).abs()).fold(1e-20, f64::max);
    let mut worst = 0.0f64;
    for (i, (have, wish)) in got.chunks_exact(size).zip(want.data.chunks_exact(size)).enumerate() {
        if !want.written[i * size] {
            if have.iter().any(|&b| b != POISON) {
                return wrong(format!("number {i} is written and should not be"));
            }
            continue;
        }
        let (have, wish) = (number(have, ty), number(wish, ty));
        let off = (have - wish).abs() / largest;
        // Where sums differ in the last place, a number may round to its neighbour.
        let most = match ty {
            MemTy::F32 => 2e-4,
            MemTy::Bf16 | MemTy::F16 => 1e-2,
            MemTy::I8 | MemTy::I32 => 1.01 / largest,
        };
        if off > most || off.is_nan() {
            return wrong(format!("number {i} is {have}, expected {wish}"));
        }
        worst = worst.max(off);
    }
    Ok(worst)
}

fn number(bytes: &[u8], ty: MemTy) -> f64 {
    match (ty, bytes) {
        (MemTy::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).into(),
        (MemTy::I32, &[a, b, c, d]) => i32::from_le_bytes([a, b, c, d]).into(),
        (MemTy::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f64(),
        (MemTy::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f64(),
        (_, bytes) => f64::from(bytes[0] as i8),
    }
}

/// Bytes of weights that calls of a measurement go through in turn: more than a cache of any GPU holds.
const ROTATED: u64 = 256 << 20;

/// Times the products of the table.
pub fn speed(driver: &mut dyn Driver, gpu: &Gpu, kernels: &[Ready], target: &GpuTarget) -> Result<()> {
    let rates = &target.gpu.rates;
    println!("## Speed of products\n");
    println!(
        "Times are of launches in a graph, one after the other, with weights that no cache holds. Predictions are by the rates"
    );
    println!("of {}.\n", rates.model);
    println!(
        "| model | matrix | format | tokens | us | predicted | GB/s | T multiply-adds/s |\n|---|---|---|---|---|---|---|---|"
    );
    for shape in table::shapes(false) {
        let Some(kernel) = kernels.iter().find(|k| k.want == shape.want) else { continue };
        let (bytes, macs, _) = plan::work(&shape.want.spec, shape.m);
        let time = time(driver, gpu, kernel, shape.m)?;
        let us = time.as_secs_f64() * 1e6;
        let tmac = if shape.format.contains("a8") { rates.int8_tmac } else { rates.bf16_tmac };
        let predicted = (bytes as f64 / (rates.memory_gb * 1e3)).max(macs as f64 / (tmac * 1e6));
        println!(
            "| {} | {} | {} | {} | {us:.1} | {predicted:.1} | {:.0} | {:.0} |",
            shape.model,
            shape.name,
            shape.format,
            shape.m,
            bytes as f64 / us / 1e3,
            macs as f64 / us / 1e6,
        );
    }
    println!();
    Ok(())
}

/// The median time of a launch.
fn time(driver: &mut dyn Driver, gpu: &Gpu, kernel: &Ready, m: u32) -> Result<Duration> {
    let quantc_codegen::spec::KernelSpec::Matmul(spec) = &kernel.want.spec else {
        return Err(Diag::bug("only products are timed"));
    };
    let layout = quantc_codegen::cuda::layout::FragmentLayout::of(spec)?;
    let copies = ROTATED.div_ceil(layout.bytes()).clamp(2, 16);
    let mut held = Held::load(driver, gpu, kernel)?;
    let rows = m as usize;
    // Zeros are multiplied as fast as other numbers, and are quick to make.
    let zeros = |held: &mut Held<'_>, bytes: u64| -> Result<u64> {
        let at = held.allocate(bytes as usize)?;
        held.driver.fill(at, 0, bytes).map_err(refused)?;
        Ok(at)
    };
    let mut a = vec![];
    let row_bytes = match spec.a {
        quantc_codegen::spec::AFmt::I8Token => quantc_codegen::spec::i8_row_stride(spec.k),
        _ => 2 * quantc_codegen::spec::bf16_row_stride(spec.k),
    };
    a.push(zeros(&mut held, rows as u64 * u64::from(row_bytes))?);
    if spec.a == quantc_codegen::spec::AFmt::I8Token {
        a.push(zeros(&mut held, 4 * rows as u64)?);
        a.push(zeros(&mut held, 4 * rows as u64 * u64::from(spec.groups()))?);
    }
    let weights = (0..copies).map(|_| zeros(&mut held, layout.bytes())).collect::<Result<Vec<u64>>>()?;
    let out = zeros(&mut held, 4 * rows as u64 * u64::from(spec.n))?;
    held.driver.begin().map_err(refused)?;
    let recorded = weights.iter().try_for_each(|&w| {
        let buffers: Vec<u64> = a.iter().copied().chain([w, out]).collect();
        held.launch(kernel, &buffers, m)
    });
    let graph = held.driver.end().map_err(refused)?;
    recorded?;
    let mut times = vec![];
    for run in 0..6 {
        held.driver.wait().map_err(refused)?;
        let start = Instant::now();
        held.driver.replay(graph).map_err(refused)?;
        held.driver.wait().map_err(refused)?;
        if run > 0 {
            times.push(start.elapsed() / copies as u32);
        }
    }
    held.driver.forget(graph);
    times.sort_unstable();
    Ok(times[times.len() / 2])
}
