//! Speed of single kernels beside what the machine can do at most.
//!
//! ```text
//! cargo bench --bench kernels -- [--target NAME] [--only TEXT] [--rounds N] [--threads 1,2] [--rows 256,1]
//!     [--columns N] [--tile RxV] [--out FILE.md]
//! ```
//!
//! Every kernel is timed in turns with its limit, a kernel too, on the same threads: many rows beside products on
//! registers (or plain loads, when memory is what bounds them), one row beside a plain read of the same memory. The
//! weights of one row's product come from a pool far larger than any cache, on huge pages. One thread is timed by what it
//! gets of its processor, several by the clock; the table shows medians of the rounds, and the median of the rounds'
//! shares. `--tile 8x2` puts
//! another first tile into the kernels of many rows. Other programs still cost memory bandwidth and cache: absolute
//! figures want a quiet machine.

use quantc::ir::diag::{Diag, Result};
use quantc::ir::target::TargetDesc;
use quantc::measure::{Call, Kernel, Memory, Timer, median, processor, turns};
use quantc_codegen::cpu::attention::{self, AttentionSpec};
use quantc_codegen::cpu::cache::{BLOCK, BlockLayout, CacheTy, Role};
use quantc_codegen::cpu::llvm::Unit;
use quantc_codegen::cpu::matmul::schedule::{CpuTile, ideal, schedule, schedule_from};
use quantc_codegen::cpu::matmul::{candidates, emit};
use quantc_codegen::eexpr::{EExpr, MemTy};
use quantc_codegen::spec::{AFmt, Code, MRange, MatmulSpec, Rows, ScaleTy, WFmt, Zero};
use quantc_codegen::targets;
use quantc_codegen::tune::limits::{Limit, STREAM_ITEM};
use quantc_codegen::tune::{self, Workload};
use std::fmt::Write as _;
use std::path::PathBuf;

/// Columns of the products unless `--columns` says otherwise, and their depth.
const N: u32 = 4096;
const K: u32 = 4096;
/// Bytes of the weights that a pass over memory reads: ten times a large cache.
const POOL: usize = 320 << 20;
/// Items of a limit on registers: a hundredth of a second.
const TURNS: i64 = 3 << 20;
/// Bytes of everything else that one call touches.
const SMALL: usize = 64 << 20;

/// A product to be timed.
struct Kind {
    name: &'static str,
    code: Code,
    group: u32,
    zero: Zero,
    scale: ScaleTy,
    a: AFmt,
}

const fn kind(name: &'static str, code: Code, group: u32, zero: Zero, scale: ScaleTy, a: AFmt) -> Kind {
    Kind { name, code, group, zero, scale, a }
}

/// What engines are made of.
const KINDS: [Kind; 16] = [
    kind("int4 g128 x int8", Code::U4, 128, Zero::Sym(8), ScaleTy::Bf16, AFmt::I8Token),
    kind("int4 g64 x int8", Code::U4, 64, Zero::Sym(8), ScaleTy::Bf16, AFmt::I8Token),
    kind("int4 g32 x int8", Code::U4, 32, Zero::Sym(8), ScaleTy::Bf16, AFmt::I8Token),
    kind("int4 g128 zero point x int8", Code::U4, 128, Zero::Asym, ScaleTy::Bf16, AFmt::I8Token),
    kind("int8 x int8 (W8A8)", Code::U8, K, Zero::Sym(128), ScaleTy::F32, AFmt::I8Token),
    kind("int4 g128 x f32 (W4A16)", Code::U4, 128, Zero::Sym(8), ScaleTy::Bf16, AFmt::F32),
    kind("int4 g128 x bf16 (W4A16)", Code::U4, 128, Zero::Sym(8), ScaleTy::Bf16, AFmt::Bf16),
    kind("int8 x bf16 (W8A16)", Code::U8, K, Zero::Sym(128), ScaleTy::F32, AFmt::Bf16),
    kind("e4m3 x bf16 (fp8)", Code::E4m3, K, Zero::Sym(0), ScaleTy::F32, AFmt::Bf16),
    kind("bf16 x bf16", Code::Bf16, K, Zero::Sym(0), ScaleTy::None, AFmt::Bf16),
    kind("int8 x f32 (W8A16)", Code::U8, K, Zero::Sym(128), ScaleTy::F32, AFmt::F32),
    kind("e2m1 g32 x f32", Code::Lut4, 32, Zero::Sym(0), ScaleTy::Bf16, AFmt::F32),
    kind("e4m3 x f32 (fp8)", Code::E4m3, K, Zero::Sym(0), ScaleTy::F32, AFmt::F32),
    kind("f16 x f32", Code::F16, K, Zero::Sym(0), ScaleTy::None, AFmt::F32),
    kind("bf16 x f32", Code::Bf16, K, Zero::Sym(0), ScaleTy::None, AFmt::F32),
    kind("f32 x f32", Code::F32, K, Zero::Sym(0), ScaleTy::None, AFmt::F32),
];

/// Query heads, heads of keys and values, and their width.
const ATTENTION_HEADS: [[u32; 3]; 3] = [[32, 8, 64], [32, 32, 64], [32, 8, 128]];
/// What caches hold.
const CACHES: [CacheTy; 5] = [CacheTy::F32, CacheTy::F16, CacheTy::Bf16, CacheTy::I8, CacheTy::E4m3];

struct Options {
    targets: Vec<&'static TargetDesc>,
    only: String,
    rounds: usize,
    threads: Vec<usize>,
    rows: Vec<u32>,
    columns: u32,
    tile: Option<(u32, u32)>,
    out: Option<PathBuf>,
}

fn options() -> Result<Options> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut o = Options {
        targets: vec![],
        only: String::new(),
        rounds: 7,
        threads: if cpus > 1 { vec![1, 2] } else { vec![1] },
        rows: vec![256, 1],
        columns: N,
        tile: None,
        out: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        // What cargo itself passes to benches.
        if flag == "--bench" {
            continue;
        }
        let value = args.next().ok_or_else(|| Diag::input(format!("`{flag}` needs a value")))?;
        let bad = || Diag::input(format!("`{flag} {value}` is not a number"));
        let list = || {
            value.split([',', 'x']).map(|s| s.parse::<u32>().map_err(|_| bad())).collect::<Result<Vec<_>>>()
        };
        match flag.as_str() {
            "--target" => o.targets.push(targets::lookup(&value)?),
            "--only" => o.only = value,
            "--rounds" => o.rounds = value.parse().map_err(|_| bad())?,
            "--threads" => o.threads = list()?.into_iter().map(|n| n as usize).collect(),
            "--rows" => o.rows = list()?,
            "--columns" => match list()?[..] {
                [n] if (1..=N).contains(&n) => o.columns = n,
                _ => return Err(bad()),
            },
            "--tile" => match list()?[..] {
                [rows, vectors] => o.tile = Some((rows, vectors)),
                _ => return Err(bad()),
            },
            "--out" => o.out = Some(value.into()),
            _ => return Err(Diag::input(format!("unknown flag `{flag}`"))),
        }
    }
    if o.targets.is_empty() {
        let host = targets::lookup("host")?;
        o.targets.push(host);
        // What machines without the widest vectors run.
        o.targets.extend(targets::lookup("cpu-avx2").ok().filter(|t| *t != host && targets::runs_here(t)));
    }
    Ok(o)
}

fn main() -> std::process::ExitCode {
    match options().and_then(|o| run(&o)) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            std::process::ExitCode::from(1)
        }
    }
}

fn run(o: &Options) -> Result<()> {
    let bench = Bench {
        o,
        pool: Memory::filled(POOL, Workload::fill)?,
        small: Memory::filled(SMALL, Workload::fill)?,
    };
    let mut text = format!(
        "# Kernels on {}\n\nProducts with {} columns and depth {K}; medians of {} rounds in turn with the limit.\n",
        processor(),
        o.columns,
        o.rounds
    );
    for target in &o.targets {
        let _ = write!(text, "\n## {}\n\n", target.name);
        text += "| kernel | rows | threads | measured | limit | share | model | tiles |\n|---|--:|--:|--:|--:|--:|--:|---|\n";
        for kind in KINDS.iter().filter(|k| k.name.contains(&o.only)) {
            for &rows in &o.rows {
                for &threads in &o.threads {
                    let row = bench.product(target, kind, rows, threads)?;
                    eprint!("{row}");
                    text += &row;
                }
            }
        }
        for heads in ATTENTION_HEADS {
            for ty in CACHES {
                for (name, tokens, held) in [("prefill", 512, 0), ("decode", 1, 4095)] {
                    let [q, kv, d] = heads;
                    let name = format!("attention, {name}, {q} heads on {kv} of {d}, {} cache", ty.name());
                    if !name.contains(&o.only) {
                        continue;
                    }
                    for &threads in &o.threads {
                        let row = bench.attention(target, &name, heads, ty, (tokens, held), threads)?;
                        eprint!("{row}");
                        text += &row;
                    }
                }
            }
        }
    }
    println!("{text}");
    match &o.out {
        Some(path) => std::fs::write(path, text)
            .map_err(|e| Diag::system(format!("cannot write: {e}")).in_file(path.display().to_string())),
        None => Ok(()),
    }
}

struct Bench<'a> {
    o: &'a Options,
    /// Weights, and what the stream reads.
    pool: Memory,
    /// Everything else a kernel touches.
    small: Memory,
}

/// Compiles one kernel and a limit into one object.
fn compile(
    target: &'static TargetDesc,
    limit: Limit,
    kernel: impl FnOnce(&Unit<'_>) -> Result<()>,
) -> Result<(Kernel, Kernel)> {
    let object = tune::object(target, |unit| {
        kernel(unit)?;
        limit.emit(unit, "limit")
    })?;
    let mut both = Kernel::load(&object, &["kernel", "limit"])?;
    let (Some(limit), Some(kernel)) = (both.pop(), both.pop()) else {
        return Err(Diag::bug("two kernels were asked for"));
    };
    Ok((kernel, limit))
}

/// One thing to be timed beside its limit.
struct Contest<'a> {
    name: String,
    rows: String,
    threads: usize,
    kernel: Kernel,
    limit: Kernel,
    kind: Limit,
    target: &'a TargetDesc,
    calls: Vec<Call>,
    /// Multiply-adds, and bytes read, of all the calls.
    macs: f64,
    bytes: f64,
    /// The share that the model expects.
    model: Option<f64>,
    tiles: String,
}

impl Bench<'_> {
    /// Parts of the small memory, one after the other, of these sizes.
    fn parts(&self, sizes: &[usize]) -> Vec<*mut u8> {
        let mut at = 0;
        let parts = sizes.iter().map(|size| {
            let start = at;
            // Not a whole number of pages apart: equal offsets in pages would compete for the same cache sets.
            at += size.next_multiple_of(4096) + 4096 + 192;
            assert!(at <= SMALL, "the parts of one call fit into the memory set aside for them");
            self.small.ptr().wrapping_add(start)
        });
        parts.collect()
    }

    fn product(&self, target: &'static TargetDesc, kind: &Kind, rows: u32, threads: usize) -> Result<String> {
        let m = match rows {
            1 => MRange { min: 1, max: 1 },
            2..=4 => MRange { min: 2, max: 4 },
            5..=16 => MRange { min: 5, max: 16 },
            _ => MRange { min: 17, max: 512 },
        };
        let w = WFmt { code: kind.code, group: kind.group, zero: kind.zero, scale: kind.scale };
        let epilogue = EExpr::store_acc(MemTy::F32, self.o.columns);
        let spec = MatmulSpec { n: self.o.columns, k: K, m, rows: Rows::T, w, a: kind.a, epilogue };
        let mut plan = schedule(&spec, &target.cpu);
        let wanted = |t: &CpuTile| self.o.tile == Some((t.mr, t.nr));
        if let (true, Some(tile)) = (rows > 4, candidates(&spec, &target.cpu).into_iter().find(wanted)) {
            plan = schedule_from(&spec, &target.cpu, tile);
        }
        let work = Workload::new(&spec, rows, u64::MAX);
        // With few rows memory is the limit, and then the weights must come from there.
        let from_memory = rows <= 4;
        let limit = if from_memory { Limit::Stream } else { Limit::of(&spec, &target.cpu) };
        let (kernel, limit_kernel) = compile(target, limit, |unit| emit(unit, "kernel", &spec, &plan))?;
        // Weights lie in the pool.
        let size = |(i, &bytes)| if work.weights.contains(&i) { 0 } else { bytes };
        let mut args = self.parts(&work.args.iter().enumerate().map(size).collect::<Vec<_>>());
        let matrix = work.weight_bytes as usize;
        let copies = if from_memory { (POOL / matrix.next_multiple_of(4096)).max(1) } else { 1 };
        let calls = (0..copies).map(|copy| {
            args[work.weights.start] = self.pool.ptr().wrapping_add(copy * matrix.next_multiple_of(4096));
            Call::shared(threads, args.clone(), work.rows, work.items)
        });
        let calls: Vec<Call> = calls.collect();
        let tile = plan.tiles[0];
        self.line(Contest {
            name: kind.name.into(),
            rows: rows.to_string(),
            threads,
            kernel,
            limit: limit_kernel,
            kind: limit,
            target,
            macs: work.macs as f64 * copies as f64,
            bytes: matrix as f64 * copies as f64,
            calls,
            model: (!from_memory).then(|| ideal(&spec, &target.cpu) / plan.cost.total()),
            tiles: format!("{}x{}", tile.mr, tile.nr),
        })
    }

    fn attention(
        &self,
        target: &'static TargetDesc,
        name: &str,
        [heads, kv_heads, head_dim]: [u32; 3],
        ty: CacheTy,
        (tokens, held): (u32, u32),
        threads: usize,
    ) -> Result<String> {
        let slot_rows = (held + tokens).next_multiple_of(BLOCK);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let spec = AttentionSpec::cached(heads, kv_heads, head_dim, scale, ty, slot_rows);
        let decode = tokens == 1;
        let limit = if decode { Limit::Stream } else { Limit::F32 };
        let (kernel, limit_kernel) = compile(target, limit, |unit| attention::emit(unit, &spec, "kernel"))?;
        let width = (spec.heads * spec.head_dim) as usize;
        let layout = BlockLayout::new(ty, Role::Keys, head_dim, target);
        let cache = (kv_heads * (slot_rows / BLOCK) * layout.bytes()) as usize;
        let rows = width * 4 * tokens as usize;
        let scratch = spec.scratch_bytes() as usize;
        let scales = (kv_heads * slot_rows) as usize * 4;
        let mut sizes = vec![rows, tokens as usize * 4, tokens as usize * 4, rows, scales];
        sizes.extend(std::iter::repeat_n(scratch, threads));
        let parts = self.parts(&sizes);
        for token in 0..tokens {
            // SAFETY: both parts have room for an i32 for each token, and no kernel runs.
            unsafe {
                parts[1].cast::<u32>().add(token as usize).write(held + token);
                parts[2].cast::<u32>().add(token as usize).write(0);
            }
        }
        for scale in 0..scales / 4 {
            // SAFETY: the part has room for so many scales, and no kernel runs.
            unsafe { parts[4].cast::<f32>().add(scale).write(0.01) };
        }
        let copies = if decode { POOL / (2 * cache) } else { 1 };
        let calls = (0..copies).map(|copy| {
            let k = self.pool.ptr().wrapping_add(2 * copy * cache);
            let v = k.wrapping_add(cache);
            let args = |worker: usize| {
                let mut args = vec![parts[0], k, v, parts[1], parts[2]];
                args.extend([parts[4]; 2].into_iter().filter(|_| ty.is_scaled()));
                args.extend([parts[3], parts[5 + worker]]);
                args
            };
            Call {
                args: (0..threads).map(args).collect(),
                dims: [i64::from(tokens); 2],
                items: spec.items(u64::from(tokens)) as i64,
            }
        });
        let calls: Vec<Call> = calls.collect();
        let (t, h) = (f64::from(tokens), f64::from(held));
        let pairs = t * h + t * (t + 1.0) / 2.0;
        self.line(Contest {
            name: name.into(),
            rows: if decode { format!("1 at {held}") } else { tokens.to_string() },
            threads,
            kernel,
            limit: limit_kernel,
            kind: limit,
            target,
            macs: pairs * 2.0 * width as f64 * copies as f64,
            bytes: (h + t)
                * f64::from(spec.kv_heads * spec.head_dim)
                * 2.0
                * ty.bytes() as f64
                * copies as f64,
            calls,
            model: None,
            tiles: String::new(),
        })
    }

    /// Times a contest and writes its line of the table.
    fn line(&self, contest: Contest<'_>) -> Result<String> {
        let Contest { kernel, limit, calls, kind, threads, target, .. } = &contest;
        let timer = Timer::new(*threads);
        let results = Memory::new(threads * 4096)?;
        let (data, items, amount) = match kind {
            Limit::Stream => {
                let items = POOL / STREAM_ITEM;
                (self.pool.ptr(), items as i64, (items * STREAM_ITEM) as f64)
            }
            _ => {
                let items = TURNS * *threads as i64;
                (self.small.ptr(), items, items as f64 * kind.macs(&target.cpu) as f64)
            }
        };
        let args = |worker: usize| vec![data, results.ptr().wrapping_add(worker * 4096)];
        let limit_call = [Call { args: (0..*threads).map(args).collect(), dims: [1, 1], items }];
        // SAFETY: the calls were made for this kernel: buffers of the sizes its spec demands, scratch for each worker.
        let mut time_kernel = || unsafe { timer.seconds(kernel, calls) };
        // SAFETY: the limit reads the pool or the first vectors of the small memory, and each worker has a result.
        let mut time_limit = || unsafe { timer.seconds(limit, &limit_call) };
        let times = turns(self.o.rounds, &mut [&mut time_kernel, &mut time_limit]);
        let about_memory = *kind == Limit::Stream;
        let done = if about_memory { contest.bytes } else { contest.macs };
        let rate = |amount: f64, seconds: &f64| amount / seconds / 1e9;
        let measured: Vec<f64> = times[0].iter().map(|s| rate(done, s)).collect();
        let most: Vec<f64> = times[1].iter().map(|s| rate(amount, s)).collect();
        let shares: Vec<f64> = measured.iter().zip(&most).map(|(a, b)| a / b).collect();
        let unit = if about_memory { "GB/s" } else { "GMAC/s" };
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        Ok(format!(
            "| {} | {} | {threads} | {:.1} {unit} | {:.1} {unit}, {} | {} | {} | {} |\n",
            contest.name,
            contest.rows,
            median(&measured),
            median(&most),
            kind.name(),
            percent(median(&shares)),
            contest.model.map_or(String::new(), percent),
            contest.tiles,
        ))
    }
}
