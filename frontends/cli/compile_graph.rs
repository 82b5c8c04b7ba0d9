//! `quantc compile MODEL.onnx`: from a graph over arrays to an engine.

use crate::compile;
use crate::failure::{Failure, Outcome};
use crate::run_graph::{Net, read_tensor};
use crate::{opt, output, subject};
use quantc_codegen::backend::CpuBackend;
use quantc_codegen::engine::{self, GraphRequest, Written};
use quantc_codegen::targets;
use quantc_frontends::onnx;
use quantc_ir::diag::Diag;
use quantc_ir::entity::ValueId;
use quantc_ir::eval::Tensor;
use quantc_ir::module::Module;
use quantc_ir::target::TargetDesc;
use quantc_ir::weights::Store;
use quantc_passes::Registry;
use quantc_passes::pass::{Env, Session};
use quantc_passes::pipeline;
use quantc_passes::precision::{Ranges, RangesOf};
use quantc_passes::presets::GraphPreset;
use quantc_runtime::stats;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Arguments of `quantc compile` about graphs.
#[derive(clap::Args)]
pub struct Options {
    /// An input of an `.onnx` file that is known now: an array as `.npy`, or a tensor as `.pb`. Shapes and axes that are
    /// inputs have to be. May be given several times.
    #[arg(long = "fix", value_name = "NAME=FILE", value_parser = crate::run_graph::input)]
    pub fixed: Vec<(String, PathBuf)>,
}

impl Options {
    /// Refuses what only graphs have.
    pub fn refuse(&self) -> Outcome {
        if self.fixed.is_empty() {
            return Ok(());
        }
        Err(Diag::input("--fix is for `.onnx` files that are graphs over arrays").into())
    }
}

/// Whether the model is a graph over arrays, and not a model of text.
pub fn is_graph(args: &compile::Args) -> bool {
    let model = &args.model;
    if !onnx::is_onnx(model) || args.text.says_something() {
        return false;
    }
    !args.graph.fixed.is_empty() || !onnx::is_text(model)
}

/// What to build.
pub struct Job<'a> {
    /// The `.onnx` file.
    pub model: &'a Path,
    /// Named extents and known inputs.
    pub import: onnx::Options,
    /// The machine to compile for.
    pub target: &'static TargetDesc,
    /// The pipeline.
    pub pipeline: &'a str,
    /// The folder to write.
    pub out: &'a Path,
    /// For passes.
    pub threads: usize,
    /// What to show of passes.
    pub show: &'a opt::Show,
    /// Passes.
    pub registry: &'a Registry,
    /// What passes take besides the graph.
    pub session: Session,
    /// Facts for the manifest.
    pub facts: Vec<(String, String)>,
}

/// A compiled graph.
pub struct Built {
    /// The graph after its passes.
    pub module: Module,
    /// What the engine holds.
    pub written: Written,
}

/// Imports, runs the pipeline and writes the engine.
pub fn build(job: Job<'_>, store: &Store) -> Outcome<Built> {
    engine::check_place(job.out)?;
    let imported = onnx::import(job.model, store, &job.import).map_err(|refused| {
        let mut problems = refused.problems;
        if let (Some(first), [name, ..]) = (problems.0.first_mut(), &refused.needs[..]) {
            *first = first.clone().help(format!("give it with --fix {name}=FILE"));
        }
        Failure::from(problems)
    })?;
    imported.notes.iter().for_each(|note| eprintln!("note: {note}"));
    let mut module = imported.module;
    opt::verify(&module)?;
    let backend = CpuBackend::new(job.target);
    let parsed = pipeline::parse(job.pipeline)?;
    let checked = pipeline::check(&parsed, job.registry, &module, Some(job.target), Some(&backend))?;
    let checked = job.show.stop(checked)?;
    let env = Env { threads: job.threads, ..Env::new(store).with_backend(&backend) };
    opt::run_pipeline(&mut module, &checked, env, job.session, job.show, &mut [])?;
    let request = GraphRequest {
        module: &module,
        store,
        target: job.target,
        inputs: &imported.inputs,
        outputs: &imported.outputs,
        facts: job.facts,
        report: serde_json::Map::new(),
    };
    let written = engine::write_graph(request, job.out)?;
    Ok(Built { module, written })
}

/// Runs the subcommand.
pub fn run(args: &compile::Args, registry: &Registry) -> Outcome {
    let start = Instant::now();
    let target = targets::lookup(&args.target)?;
    let preset = args.preset.as_deref().map(GraphPreset::get).transpose()?;
    let text = match (preset, &args.pipeline) {
        (Some(preset), _) => preset.pipeline.to_string(),
        (None, text) => text.clone().unwrap_or_default(),
    };
    let dir = match &args.store {
        Some(dir) => dir.clone(),
        None => compile::default_store()?,
    };
    let store = Store::open(&dir)?;
    let threads = if args.threads == 0 { stats::available_cpus() } else { args.threads };
    quantc_passes::set_threads(threads);
    let mut import = onnx::Options { dims: args.text.dims(), ..onnx::Options::default() };
    for (name, path) in &args.graph.fixed {
        import.fixed.insert(name.clone(), read_tensor(path)?);
    }
    let mut session = Session::default();
    if let Some(data) = &args.data {
        session.put(RangesOf(Box::new(Samples::read(&args.model, data)?)));
    }
    let job = Job {
        model: &args.model,
        import,
        target,
        pipeline: &text,
        out: &args.output,
        threads,
        show: &args.show,
        registry,
        session,
        facts: args.preset.iter().map(|p| ("preset".to_string(), p.clone())).collect(),
    };
    let built = build(job, &store)?;
    let agreement = match targets::runs_here(target) {
        true => agreement(&args.output, &built, &store)?,
        false => None,
    };
    let seconds = start.elapsed().as_secs_f64();
    let written = &built.written;
    if args.json {
        return output::json(&json!({
            "engine": args.output,
            "target": target.name,
            "pipeline": built.module.pipeline,
            "weight_bytes": written.weight_bytes,
            "kernels": written.kernels,
            "largest_difference": agreement,
            "seconds": seconds,
        }));
    }
    output::line(&format!("engine   {}", args.output.display()))?;
    output::line(&format!("target   {}", target.name))?;
    output::line(&format!("weights  {}", output::bytes(written.weight_bytes)))?;
    output::line(&format!("kernels  {}", written.kernels))?;
    if let Some(most) = agreement {
        output::line(&format!(
            "agrees   with the reference: largest difference {most:.1e} of the largest number"
        ))?;
    }
    output::line(&format!("time     {seconds:.1} s"))
}

/// Most multiply-adds of graphs that are compared with the evaluator.
const COMPARED: u64 = 1 << 26;

/// The largest difference between the engine and the evaluator on small numbers, as a share of the largest number.
fn agreement(out: &Path, built: &Built, store: &Store) -> Outcome<Option<f64>> {
    use quantc_ir::eval::Evaluator;
    use quantc_ir::ops::{Binding, OpSpec};
    let main = &built.module.main;
    let mut macs = 0u64;
    for (_, node) in main.ops() {
        let args: Vec<_> = node.args.iter().map(|&a| (!main.is_none(a)).then(|| main.ty(a))).collect();
        let bind: Binding<'_> = &|_| 1;
        macs = macs.saturating_add(node.op.cost(&args, main.ty(node.result), bind).macs);
    }
    let plain = main.params.iter().all(|&p| main.ty(p).elem.is_real());
    if macs > COMPARED || !plain {
        return Ok(None);
    }
    let mut seed = 1u64;
    let mut inputs = vec![];
    for &param in &main.params {
        let ty = main.ty(param);
        let n = ty.shape.elements().unwrap_or(0);
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f64 / f64::from(1 << 24)
        };
        inputs.push(Tensor::from_reals(ty, (0..n).map(|_| next()).collect())?);
    }
    let mut net = Net::open(out, 0)?;
    let got = net.run(&inputs)?;
    let want = Evaluator::new(&built.module, store)?.step(&inputs, u64::MAX)?;
    let mut most = 0f64;
    for (got, want) in got.iter().zip(&want) {
        let (got, want) = (got.reals(), want.reals());
        let largest = want.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
        for (g, w) in got.iter().zip(&want) {
            let same = g == w || (g.is_nan() && w.is_nan());
            most = most.max(if same { 0.0 } else { (g - w).abs() / largest });
        }
    }
    Ok(Some(most))
}

/// Samples for inputs: arrays whose first axis counts them.
pub struct Samples {
    names: Vec<String>,
    given: BTreeMap<String, Tensor>,
}

impl Samples {
    /// Reads `NAME=FILE,NAME=FILE`, or `FILE` for a model with one input.
    pub fn read(model: &Path, data: &Path) -> Outcome<Samples> {
        let names = onnx::inputs(model)?;
        let text = data.display().to_string();
        let of_input = |part: &str| {
            let (name, file) = part.split_once('=')?;
            names.iter().any(|n| n == name).then(|| (name.to_string(), PathBuf::from(file)))
        };
        // A comma belongs to a file's name unless an input's name follows.
        let mut files: Vec<(String, PathBuf)> = vec![];
        for part in text.split(',') {
            match (of_input(part), files.last_mut()) {
                (Some(file), _) => files.push(file),
                (None, Some((_, file))) => *file = PathBuf::from(format!("{},{part}", file.display())),
                (None, None) => break,
            }
        }
        if let (true, [only]) = (files.is_empty(), &names[..]) {
            files.push((only.clone(), data.to_path_buf()));
        }
        if files.is_empty() {
            let diag = Diag::input(format!("`{text}` names no input of the model"));
            let help = format!("give --data NAME=FILE,NAME=FILE; its inputs are {}", names.join(", "));
            return Err(diag.help(help).into());
        }
        let mut given = BTreeMap::new();
        for (name, file) in files {
            given.insert(name, read_tensor(&file)?);
        }
        Ok(Samples { names, given })
    }

    fn of_all(&self, module: &Module) -> Result<Vec<Vec<Tensor>>, Diag> {
        let main = &module.main;
        let mut batches: Vec<Vec<Tensor>> = vec![];
        for (i, &param) in main.params.iter().enumerate() {
            let ty = main.ty(param);
            let name = self.names.get(i).map_or("", String::as_str);
            let samples = self.given.get(name).ok_or_else(|| {
                Diag::input(format!("there are no samples for the input `{name}`"))
                    .help(format!("give them all: --data {}", self.names.join("=FILE,") + "=FILE"))
            })?;
            for (n, batch) in subject::batches_of(samples, ty)?.into_iter().enumerate() {
                if batches.len() <= n {
                    batches.push(vec![]);
                }
                batches[n].push(batch);
            }
        }
        batches.retain(|b| b.len() == main.params.len());
        Ok(batches)
    }
}

impl Ranges for Samples {
    /// Compiles the graph for this machine with the values as its results, and looks at what they hold.
    fn ranges(&self, module: &Module, store: &Store, values: &[ValueId]) -> Result<Vec<(f32, f32)>, Diag> {
        let batches = self.of_all(module)?;
        if batches.is_empty() {
            return Err(Diag::input("there is no whole batch of samples"));
        }
        let mut tapped = module.clone();
        tapped.main.results = values.to_vec();
        let folder = std::env::temp_dir().join(format!("quantc-ranges-{}", std::process::id()));
        let names: Vec<String> = (0..values.len()).map(|i| i.to_string()).collect();
        let inputs: Vec<String> = (0..tapped.main.params.len()).map(|i| i.to_string()).collect();
        let request = GraphRequest {
            module: &tapped,
            store,
            target: targets::host(),
            inputs: &inputs,
            outputs: &names,
            facts: vec![],
            report: serde_json::Map::new(),
        };
        let ranges = engine::write_graph(request, &folder).and_then(|_| {
            let failed = |f: Failure| Diag::system(format!("calibration: {f}"));
            let mut net = Net::open(&folder, 0).map_err(failed)?;
            let mut ranges = vec![(f32::INFINITY, f32::NEG_INFINITY); values.len()];
            for batch in &batches {
                for (range, seen) in ranges.iter_mut().zip(net.run(batch).map_err(failed)?) {
                    for &x in seen.f32s()? {
                        *range = (range.0.min(x), range.1.max(x));
                    }
                }
            }
            Ok(ranges)
        });
        let _ = std::fs::remove_dir_all(&folder);
        ranges
    }
}

/// Compiles an `.onnx` file as it is for this machine into a folder; inputs have the extents of `shapes`.
pub fn float_engine(model: &Path, shapes: BTreeMap<String, Vec<u64>>, out: &Path) -> Outcome {
    let registry = Registry::builtin();
    let show = opt::Show::default();
    let job = Job {
        model,
        import: onnx::Options { shapes, ..onnx::Options::default() },
        target: targets::host(),
        pipeline: GraphPreset::get("f32")?.pipeline,
        out,
        threads: stats::available_cpus(),
        show: &show,
        registry: &registry,
        session: Session::default(),
        facts: vec![],
    };
    build(job, &Store::in_memory())?;
    Ok(())
}
