//! `quantc tune`: measures which tiles are fastest on this machine.

use crate::failure::Outcome;
use crate::measure::{Call, Kernel, Memory, Timer, median, processor, turns};
use crate::{output, subject};
use quantc_codegen::spec::{AFmt, Code, KernelSpec, MRange, MatmulSpec, Rows, ScaleTy, WFmt, Zero};
use quantc_codegen::targets;
use quantc_codegen::tune::limits::{Limit, STREAM_ITEM};
use quantc_codegen::tune::{self, Entry, Product, Trials, Tuning, Workload};
use quantc_codegen::{cpu::matmul::schedule, eexpr::EExpr, eexpr::MemTy};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::TargetDesc;
use quantc_runtime::engine::read_file;
use serde_json::{Value, json};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Bytes of the weights that calls of few rows read in turn: more than caches hold.
const POOL: usize = 128 << 20;
/// Items of a limit on registers.
const TURNS: u32 = 1 << 19;
/// Gain from which on a table prefers another tile than the model's: less is noise.
const WORTH: f64 = 1.02;
/// Gain from which on it is told.
const TOLD: f64 = 1.03;

/// Arguments of `quantc tune`.
#[derive(clap::Args)]
pub struct Args {
    /// Engines whose products are measured.
    engines: Vec<PathBuf>,
    /// A product to measure: activations, weights, scale group and size, as in `int8:int4:g128:2048x8192` for 2048 columns
    /// of depth 8192. Activations are int8, bf16 or f32; weights int4, int8, e4m3, bf16 or f32; the group is `gN` or
    /// `row`. Measured for 1, 4, 16 and 512 rows.
    #[arg(long)]
    shape: Vec<String>,
    /// The target whose kernels are measured; this machine must run them.
    #[arg(long, default_value = "host")]
    target: String,
    /// The table to write. What it already says about this processor is kept.
    #[arg(short, long)]
    out: PathBuf,
    /// Tiles compared for each product, the first of the model's ranking.
    #[arg(long, default_value_t = 4)]
    count: usize,
    /// Rounds in which they take turns.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub fn run(args: Args) -> Outcome {
    let start = Instant::now();
    let target = targets::lookup(&args.target)?;
    if !targets::runs_here(target) {
        let diag = Diag::target(format!("this machine does not run kernels for {}", target.name));
        return Err(diag.help("use `--target host`").into());
    }
    let mut specs = vec![];
    for engine in &args.engines {
        specs.extend(products_of(engine)?);
    }
    for shape in &args.shape {
        specs.extend(shapes(shape)?);
    }
    if specs.is_empty() || args.rounds == 0 || args.count == 0 {
        return Err(Diag::input("there is nothing to measure")
            .help("name an engine or a `--shape`, and use at least one round and one tile")
            .into());
    }
    let mut table = known(&args.out, target)?;
    let mut clock: Option<Clock> = None;
    let mut rows = vec![];
    for spec in tune::products(&specs) {
        let key = tune::key(&spec);
        if table.entries.contains_key(&key) {
            continue;
        }
        let clock = match &mut clock {
            Some(clock) => clock,
            None => clock.insert(Clock::new(target)?),
        };
        let found = clock.measure(&spec, &args)?;
        if found.gain >= TOLD {
            eprintln!(
                "note: {key}: {} is {:.1} % faster than {}, which the model chose",
                name(&found.tile),
                100.0 * (found.gain - 1.0),
                name(&found.model)
            );
        }
        rows.push((key.clone(), found.clone()));
        table.entries.insert(key, found);
    }
    let text = table.text();
    std::fs::write(&args.out, &text)
        .map_err(|e| Diag::system(format!("cannot write: {e}")).in_file(args.out.display().to_string()))?;
    if args.json {
        let rows: Vec<Value> = rows
            .iter()
            .map(|(key, e)| {
                json!({
                    "product": key, "tile": name(&e.tile), "model": name(&e.model), "gain": e.gain,
                    "share": e.share, "expected": e.expected,
                })
            })
            .collect();
        return output::json(&json!({
            "target": target.name, "cpu": table.cpu, "measured": rows, "entries": table.entries.len(),
            "seconds": start.elapsed().as_secs_f64(),
        }));
    }
    let percent = |x: f64| format!("{:.1}", 100.0 * x);
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|(key, e)| {
            let gain = format!("{:.3}", e.gain);
            vec![
                key.clone(),
                name(&e.model),
                percent(e.expected),
                percent(e.share / e.gain),
                name(&e.tile),
                gain,
            ]
        })
        .collect();
    let head = ["product", "model's tile", "expected %", "measured %", "fastest", "gain"];
    output::piece(&output::table(&head, &cells))?;
    let seconds = start.elapsed().as_secs_f64();
    output::line(&format!(
        "measured {} products in {seconds:.1} s, {} in the table",
        cells.len(),
        table.entries.len()
    ))
}

fn name(tile: &schedule::CpuTile) -> String {
    format!("{}x{}", tile.mr, tile.nr)
}

/// The table at `path` as far as it is about this processor and `target`; an empty one when there is none.
fn known(path: &Path, target: &TargetDesc) -> Outcome<Tuning> {
    let empty = Tuning::new(target, processor());
    if !path.exists() {
        return Ok(empty);
    }
    let place = path.display().to_string();
    let table = Tuning::parse(&subject::read_text(path)?, &place)?;
    table.check(target).map_err(|e| e.in_file(&place))?;
    if table.cpu == empty.cpu {
        return Ok(table);
    }
    let diag = Diag::input(format!("this table was measured on {}, not on {}", table.cpu, empty.cpu));
    Err(diag.in_file(place).help("write to another file").into())
}

/// The products of an engine, from its report.
fn products_of(engine: &Path) -> Outcome<Vec<KernelSpec>> {
    let manifest = subject::manifest(engine)?;
    let place = engine.join("report.json").display().to_string();
    let bad = |e: String| Diag::input(format!("the report is not readable: {e}")).in_file(place.clone());
    let bytes = read_file(engine, &manifest, "report.json")?;
    let report: Value = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
    let mut specs = vec![];
    for kernel in report["kernels"].as_array().into_iter().flatten() {
        if kernel["product"].is_null() {
            continue;
        }
        let product: Product =
            serde_json::from_value(kernel["product"].clone()).map_err(|e| bad(e.to_string()))?;
        product.spec.check().map_err(|e| bad(e.message))?;
        specs.push(KernelSpec::Matmul(product.spec));
    }
    if specs.is_empty() {
        let diag = Diag::input("the engine's report names no products").in_file(place);
        return Err(diag.help("compile it again with this version").into());
    }
    Ok(specs)
}

/// The products that a `--shape` stands for.
fn shapes(text: &str) -> Outcome<Vec<KernelSpec>> {
    let bad = |why: &str| {
        Diag::input(format!("the shape `{text}` {why}")).help("write it like `int8:int4:g128:2048x8192`")
    };
    let parts: Vec<&str> = text.split(':').collect();
    let [a, w, group, size] = parts[..] else { return Err(bad("does not have four parts").into()) };
    let a = match a {
        "int8" => AFmt::I8Token,
        "bf16" => AFmt::Bf16,
        "f32" => AFmt::F32,
        _ => return Err(bad("has unknown activations").into()),
    };
    let (code, zero) = match w {
        "int4" => (Code::U4, Zero::Sym(8)),
        "int8" => (Code::U8, Zero::Sym(128)),
        "e4m3" => (Code::E4m3, Zero::Sym(0)),
        "bf16" => (Code::Bf16, Zero::Sym(0)),
        "f32" => (Code::F32, Zero::Sym(0)),
        _ => return Err(bad("has unknown weights").into()),
    };
    let size = size.split_once('x').and_then(|(n, k)| Some((n.parse::<u32>().ok()?, k.parse::<u32>().ok()?)));
    let Some((n, k)) = size else { return Err(bad("does not end with columns x depth").into()) };
    let group = match group.strip_prefix('g').map(str::parse::<u32>) {
        Some(Ok(group)) => group.min(k),
        _ if group == "row" => k,
        _ => return Err(bad("has no group like `g128` or `row`").into()),
    };
    let scale = match code {
        Code::Bf16 | Code::F32 => ScaleTy::None,
        _ if group == k => ScaleTy::F32,
        _ => ScaleTy::Bf16,
    };
    let rows = [(1, 1), (2, 4), (5, 16), (17, 512)];
    rows.into_iter()
        .map(|(min, max)| {
            let (w, m) = (WFmt { code, group, zero, scale }, MRange { min, max });
            let spec = MatmulSpec { n, k, m, rows: Rows::T, w, a, epilogue: EExpr::store_acc(MemTy::F32, n) };
            spec.check().map_err(|e| bad(&format!("has no kernel: {}", e.message)))?;
            Ok(KernelSpec::Matmul(spec))
        })
        .collect()
}

/// Times products on one thread.
struct Clock {
    target: &'static TargetDesc,
    timer: Timer,
    pool: Memory,
    result: Memory,
}

impl Clock {
    fn new(target: &'static TargetDesc) -> Result<Clock> {
        Ok(Clock {
            target,
            timer: Timer::new(1),
            pool: Memory::filled(POOL, Workload::fill)?,
            result: Memory::new(1 << 16)?,
        })
    }

    /// Times the best tiles for one product in turns with what bounds it.
    fn measure(&self, spec: &MatmulSpec, args: &Args) -> Result<Entry> {
        let cpu = &self.target.cpu;
        let Trials { object, trials, workload, .. } = tune::trials(spec, self.target, args.count)?;
        let symbols: Vec<&str> = trials.iter().map(|t| t.symbol.as_str()).collect();
        let kernels = Kernel::load(&object, &symbols)?;
        let dot = Limit::of(spec, cpu);
        let limits = tune::object(self.target, |unit| {
            dot.emit(unit, "dot")?;
            Limit::Stream.emit(unit, "stream")
        })?;
        let limits = Kernel::load(&limits, &["dot", "stream"])?;

        // Weights come from memory, in engines as here: each call has other weights than the ones before. Calls of few
        // rows are short, so many of them are timed together.
        let few = workload.rows <= 16;
        let matrix = workload.args[workload.weights.start].next_multiple_of(4096);
        let copies = (POOL / matrix.max(1) / workload.weights.len()).max(1);
        let together = if few { copies } else { 1 };
        let turn_of = Cell::new(0);
        let weights = Memory::filled(matrix * copies * workload.weights.len(), Workload::fill)?;
        let others: Vec<Memory> = workload
            .args
            .iter()
            .enumerate()
            .map(|(i, &len)| {
                Memory::filled(if workload.weights.contains(&i) { 1 } else { len }, Workload::fill)
            })
            .collect::<Result<_>>()?;
        let calls: Vec<Call> = (0..copies)
            .map(|copy| {
                let mut pointers: Vec<*mut u8> = others.iter().map(Memory::ptr).collect();
                for (i, at) in workload.weights.clone().enumerate() {
                    let place = (copy * workload.weights.len() + i) * matrix;
                    pointers[at] = weights.ptr().wrapping_add(place);
                }
                Call::shared(1, pointers, workload.rows, workload.items)
            })
            .collect();
        let read = self.pool.ptr();
        let dot_call = [Call::shared(1, vec![read, self.result.ptr()], 1, TURNS)];
        let stream_call = [Call::shared(1, vec![read, self.result.ptr()], 1, (POOL / STREAM_ITEM) as u32)];

        // SAFETY: all trials are kernels of `spec`, and the buffers are as large as its workload demands.
        let time = |kernel: &Kernel| unsafe {
            let from = if few { 0 } else { turn_of.replace(turn_of.get() + 1) % copies };
            self.timer.seconds(kernel, &calls[from..from + together])
        };
        let mut contestants: Vec<Box<dyn FnMut() -> f64 + '_>> = vec![];
        for kernel in &kernels {
            contestants.push(Box::new(|| time(kernel)));
        }
        // SAFETY: the limits read the pool and write the result, which have room for these items.
        contestants.push(Box::new(|| unsafe { self.timer.seconds(&limits[0], &dot_call) }));
        if few {
            // SAFETY: as above.
            contestants.push(Box::new(|| unsafe { self.timer.seconds(&limits[1], &stream_call) }));
        }
        let mut turn: Vec<&mut dyn FnMut() -> f64> = contestants.iter_mut().map(|c| &mut **c as _).collect();
        let times = turns(args.rounds, &mut turn);

        // Ratios within a round, so that a slow round costs all alike.
        let ratio = |a: usize, b: usize| -> f64 {
            median(&times[a].iter().zip(&times[b]).map(|(a, b)| a / b).collect::<Vec<_>>())
        };
        let best = (0..trials.len()).min_by(|&a, &b| ratio(a, 0).total_cmp(&ratio(b, 0))).unwrap_or(0);
        let best = if ratio(0, best) >= WORTH { best } else { 0 };
        let at_limit = |round: usize| {
            let n = trials.len();
            let macs = workload.macs as f64 * together as f64;
            let products = macs * times[n][round] / (f64::from(TURNS) * dot.macs(cpu) as f64);
            let bytes = workload.weight_bytes as f64 * together as f64;
            let reading = if few { bytes * times[n + 1][round] / POOL as f64 } else { 0.0 };
            products.max(reading)
        };
        let shares: Vec<f64> = times[best].iter().enumerate().map(|(i, t)| at_limit(i) / t).collect();
        Ok(Entry {
            tile: trials[best].tile,
            model: trials[0].tile,
            gain: ratio(0, best),
            share: median(&shares),
            expected: schedule::expected(spec, &trials[0].cost, cpu),
        })
    }
}
