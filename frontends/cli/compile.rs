//! `quantc compile`: from a model to an engine.

use crate::failure::{Failure, Outcome};
use crate::layer_exec::Compiled;
use crate::report::EngineReport;
use crate::text_model::{TextArgs, read_model};
use crate::{agreement, cache_cost, opt, output, subject};
use quantc_codegen::backend;
use quantc_codegen::engine::{self, Request};
use quantc_codegen::targets;
use quantc_codegen::tune::Tuning;
use quantc_ir::diag::{Diag, Diags, Loc};
use quantc_ir::target::TargetDesc;
use quantc_ir::ty::ElemTy;
use quantc_ir::weights::Store;
use quantc_passes::Registry;
use quantc_passes::calib::{Calibrator, Data, StatsFile};
use quantc_passes::manager::{self, LayerAt, Memory};
use quantc_passes::pass::{Env, Fact};
use quantc_passes::pipeline;
use quantc_passes::presets::Preset;
use quantc_runtime::stats;
use serde_json::json;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Arguments of `quantc compile`.
#[derive(clap::Args)]
#[group(id = "how", required = true, multiple = false, args = ["preset", "pipeline"])]
pub struct Args {
    /// A model folder with config.json, safetensors and tokenizer.json; or an `.onnx` file: a model of text when a
    /// tokenizer.json lies beside it, when its inputs are called as those of one, or when --bind says so; else a graph over
    /// arrays.
    pub model: PathBuf,
    /// The machine to compile for: a name from `quantc targets`, or `host`.
    #[arg(long)]
    pub target: String,
    /// A named pipeline from `quantc presets`.
    #[arg(long)]
    pub preset: Option<String>,
    /// A pipeline, as text.
    #[arg(short, long)]
    pub pipeline: Option<String>,
    /// The folder to write.
    #[arg(short, long)]
    pub output: PathBuf,
    /// A text for passes that need data, or token ids in rows, as a NumPy array (`.npy`).
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Statistics in place of a text: a file that `quantc calibrate` wrote for this model.
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    stats: Option<PathBuf>,
    /// Number format of the key/value cache: f32, f16 or bf16, or codes of 8 bits with a scale for each token and head:
    /// int8 or e4m3 (also called fp8). By default f32, and bf16 for GPUs. With --data or --stats, channels are first made alike, so that the scale fits them all.
    #[arg(long)]
    kv_cache: Option<String>,
    /// Tokens that a sequence may have, instead of the model's context.
    #[arg(long)]
    context: Option<u32>,
    /// Most tokens of one call; longer prompts run in chunks.
    #[arg(long, default_value_t = 0)]
    chunk: u32,
    /// A table that `quantc tune` wrote, to choose kernels by. Without one the target's cost model chooses, the same
    /// everywhere.
    #[arg(long)]
    tuning: Option<PathBuf>,
    /// Threads; 0 means one for each CPU. The engine does not depend on it.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Where derived weights are kept between compilations.
    #[arg(long, env = "QUANTC_STORE")]
    pub store: Option<PathBuf>,
    /// Tokens on which the engine is compared with the reference evaluator, layer by layer; 0 skips the comparison. By
    /// default 16 for models of up to 64 million multiply-adds a token on a machine that runs the engine, else 0.
    #[arg(long)]
    agreement: Option<usize>,
    #[command(flatten)]
    pub text: TextArgs,
    #[command(flatten)]
    pub graph: crate::compile_graph::Options,
    #[command(flatten)]
    pub show: opt::Show,
    /// Print one JSON object about the engine.
    #[arg(long)]
    pub json: bool,
}

/// Runs the subcommand.
pub fn run(args: Args, registry: &Registry) -> Outcome {
    if crate::compile_graph::is_graph(&args) {
        return crate::compile_graph::run(&args, registry);
    }
    args.graph.refuse()?;
    let start = Instant::now();
    return_large_blocks();
    let target = targets::lookup(&args.target)?;
    let mut text = match (&args.preset, &args.pipeline) {
        (Some(name), _) => Preset::get(name)?.pipeline.to_string(),
        (None, Some(text)) => text.clone(),
        (None, None) => String::new(),
    };
    // Attention of GPUs multiplies bf16: a cache of f32 would be twice as large and gain nothing.
    let usual = (target.gpu.is_some() && !mentions_cache(&text)).then(|| "bf16".to_string());
    if let Some(format) = args.kv_cache.as_ref().or(usual.as_ref()) {
        text = with_cache_format(&text, format, args.data.is_some() || args.stats.is_some())?;
    }
    let dir = match &args.store {
        Some(dir) => dir.clone(),
        None => default_store()?,
    };
    let store = Store::open(&dir)?;
    let threads = if args.threads == 0 { stats::available_cpus() } else { args.threads };
    quantc_passes::set_threads(threads);
    let tuning = args.tuning.as_deref().map(|path| read_tuning(path, target)).transpose()?;
    // Which table chose the kernels is part of what an engine is.
    let named = tuning.iter().map(|(_, digest)| ("tuning".to_string(), digest.clone()));
    let facts = args.preset.iter().map(|p| ("preset".to_string(), p.clone())).chain(named).collect();
    let job = Job {
        model: &args.model,
        data: args.data.as_deref(),
        stats: args.stats.as_deref(),
        target,
        pipeline: &text,
        out: &args.output,
        context: args.context,
        text: &args.text,
        chunk: args.chunk,
        threads,
        show: &args.show,
        quiet: false,
        registry,
        facts,
        tuning,
    };
    let built = build(&job, &store)?;
    // An engine for another machine is compared only where that was asked for, which is then an error.
    let usual = if built.macs_per_token <= 64 << 20 && targets::runs_here(target) { 16 } else { 0 };
    let agreement = match args.agreement.unwrap_or(usual) {
        0 => None,
        tokens => match agreement::compare(&args.output, &built.module, &store, tokens) {
            Ok(agreement) => Some(agreement),
            Err(failure) => {
                // What failed leaves no engine.
                let _ = std::fs::remove_dir_all(&args.output);
                return Err(failure.while_doing("comparing the engine with the reference evaluator"));
            }
        },
    };
    let reused = store.stats();
    let summary = json!({
        "engine": args.output,
        "target": target.name,
        "pipeline": built.module.pipeline,
        "weight_bytes": built.written.weight_bytes,
        "decode_bytes_per_token": built.written.decode_bytes_per_token,
        "kernels": built.written.kernels,
        "weights_made": reused.made,
        "weights_reused": reused.reused,
        "seconds": start.elapsed().as_secs_f64(),
        "peak_rss_bytes": stats::peak_rss_bytes(),
        "agreement": agreement,
        "report": built.report.json(&built.module),
        "passes": built.report.passes(),
    });
    if let Some(agreement) = &agreement {
        eprint!("{}", agreement.table());
    }
    if args.json {
        output::json(&summary)?;
        return judge(agreement.as_ref());
    }
    output::line(&format!("engine   {}", args.output.display()))?;
    output::line(&format!("target   {}", target.name))?;
    let written = &built.written;
    let (all, each) = (output::bytes(written.weight_bytes), output::bytes(written.decode_bytes_per_token));
    output::line(&format!("weights  {all}, {each} of them read for each token"))?;
    for line in built.report.lines() {
        output::line(&line)?;
    }
    output::line(&format!("kernels  {}", written.kernels))?;
    let (made, kept) = (output::bytes(reused.bytes_made), output::bytes(reused.bytes_reused));
    output::line(&format!("derived  {} weights ({made}), reused {} ({kept})", reused.made, reused.reused))?;
    if let Some(agreement) = &agreement {
        output::line(&format!("agrees   {}", agreement.verdict()))?;
    }
    let rss =
        stats::peak_rss_bytes().map_or(String::new(), |b| format!(", peak memory {}", output::bytes(b)));
    output::line(&format!("time     {:.1} s{rss}", start.elapsed().as_secs_f64()))?;
    judge(agreement.as_ref())
}

/// Lets the allocator give every block of some size back when it is freed. Statistics and matrices of layers come and go by the
/// hundreds of megabytes; left to itself, glibc keeps more and more of their places.
fn return_large_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it changes a setting of the allocator and nothing else; no allocation is under way in this thread.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
    }
}

/// An engine that disagrees with the evaluator fails the gate; it is kept to be looked at.
fn judge(agreement: Option<&agreement::Agreement>) -> Outcome {
    match agreement {
        Some(agreement) if !agreement.holds() => {
            Err(Failure::Gate(format!("the engine agrees {}", agreement.verdict())))
        }
        _ => Ok(()),
    }
}

/// A tuning table for `target`, with the digest of its file.
fn read_tuning(path: &Path, target: &TargetDesc) -> Outcome<(Tuning, String)> {
    let text = subject::read_text(path)?;
    let place = path.display().to_string();
    let table = Tuning::parse(&text, &place)?;
    table.check(target).map_err(|e| e.in_file(place))?;
    Ok((table, quantc_ir::weights::Digest::of(text.as_bytes()).to_string()))
}

/// The pipeline with the cache's format changed first. With a text to calibrate on, what goes into a cache of 8 bits is first made
/// to fit one scale a head, in the way that its format wants.
fn with_cache_format(text: &str, format: &str, data: bool) -> Outcome<String> {
    let (pass, first) = match format {
        "f32" => return Ok(text.to_string()),
        "f16" | "bf16" => (format!("cast-cache{{to={format}}}"), None),
        "int8" => ("quantize-cache{format=int8}".into(), Some("smooth-cache")),
        "e4m3" | "fp8" => ("quantize-cache{format=e4m3}".into(), Some("smooth-cache{aim=usual}")),
        _ => {
            let diag = Diag::target(format!("a key/value cache of `{format}` has no kernels"));
            return Err(diag.help("use f32, f16, bf16, int8 or fp8").into());
        }
    };
    match first.filter(|_| data) {
        Some(first) => Ok(format!("{PREPARE}, layers(calibrate{{stats=[cache]}}, {first}), {pass}, {text}")),
        None => Ok(format!("{pass}, {text}")),
    }
}

/// Whether a pipeline says what caches hold.
fn mentions_cache(text: &str) -> bool {
    text.contains("cast-cache") || text.contains("quantize-cache")
}

/// What pipelines have in front of `calibrate`.
pub const PREPARE: &str = "outline-layers, fold-constants, dedupe";

/// Where derived weights are kept when nothing else is said.
pub fn default_store() -> Outcome<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|h| h.join(".cache")));
    let cache = cache.ok_or_else(|| {
        Diag::system("there is no home folder to keep derived weights in").help("give --store")
    })?;
    Ok(cache.join("quantc"))
}

/// What to build.
pub struct Job<'a> {
    model: &'a Path,
    /// A text to calibrate on.
    data: Option<&'a Path>,
    /// A file of statistics.
    stats: Option<&'a Path>,
    target: &'static TargetDesc,
    pipeline: &'a str,
    out: &'a Path,
    context: Option<u32>,
    text: &'a TextArgs,
    chunk: u32,
    threads: usize,
    show: &'a opt::Show,
    quiet: bool,
    registry: &'a Registry,
    facts: Vec<(String, String)>,
    /// A tuning table and its digest.
    tuning: Option<(Tuning, String)>,
}

/// What came of it.
pub struct Built {
    /// The module after its passes.
    pub module: quantc_ir::module::Module,
    /// What the engine holds.
    pub written: engine::Written,
    /// Multiply-adds of one token.
    pub macs_per_token: u64,
    /// What passes told.
    pub report: EngineReport,
}

/// Compiles a model to f32 for this machine, deriving weights in memory.
pub fn float_engine(model: &Path, out: &Path) -> Outcome {
    let registry = Registry::builtin();
    let show = opt::Show::default();
    let job = Job {
        model,
        data: None,
        stats: None,
        target: targets::host(),
        pipeline: Preset::get("f32")?.pipeline,
        out,
        context: None,
        text: &TextArgs::default(),
        chunk: 0,
        threads: stats::available_cpus(),
        show: &show,
        quiet: true,
        registry: &registry,
        facts: vec![],
        tuning: None,
    };
    let folder = out.with_extension("store");
    build(&job, &Store::open(&folder)?)?;
    let _ = std::fs::remove_dir_all(&folder);
    Ok(())
}

/// Imports, runs the pipeline and writes the engine.
pub fn build(job: &Job<'_>, store: &Store) -> Outcome<Built> {
    let say = |text: &str| {
        if !job.quiet {
            eprintln!("{text}");
        }
    };
    // Refused before hours of passes, not after them.
    engine::check_place(job.out)?;
    let imported = read_model(job.model, store, job.context, job.text)?;
    let mut module = imported.module;
    imported.notes.iter().for_each(|note| say(&format!("note: {note}")));
    if !imported.unused.is_empty() {
        let shown: Vec<&str> = imported.unused.iter().take(4).map(String::as_str).collect();
        let n = imported.unused.len();
        say(&format!(
            "note: {n} tensors are not used: {}{}",
            shown.join(", "),
            if n > 4 { ", .." } else { "" }
        ));
    }
    opt::verify(&module)?;
    let (mut facts, mut session) = (vec![], quantc_passes::pass::Session::default());
    if let Some(path) = job.stats {
        session.put(Arc::new(StatsFile::read(path)?));
        facts.push(Fact::Data);
    }
    let tokenizer = match &imported.tokenizer {
        None => None,
        Some(path) => {
            let place = path.display().to_string();
            let bytes = std::fs::read(path)
                .map_err(|e| Diag::input(format!("cannot read it: {e}")).in_file(&place))?;
            // An engine must not carry a tokenizer that will not load.
            let tokenizer = quantc_frontends::Tokenizer::from_bytes(&bytes, &place)?;
            Some((bytes, tokenizer))
        }
    };
    if let Some(path) = job.data {
        let data = read_data(path, tokenizer.as_ref().map(|(_, t)| t), &module)?;
        let place = store.dir().map_or_else(std::env::temp_dir, |dir| dir.join("tmp"));
        let exec = Compiled::new(targets::host(), job.threads, &place);
        session.put(Calibrator::new(data, Arc::new(exec)));
        facts.push(Fact::Data);
    }
    let tokenizer = tokenizer.map(|(bytes, t)| Ok::<_, Diag>((bytes, t.to_compact()?))).transpose()?;
    let backend = backend::of(job.target);
    let backend = &*backend;
    let parsed = pipeline::parse(job.pipeline)?;
    let checked =
        pipeline::check_given(&parsed, job.registry, &module, Some(job.target), Some(backend), &facts)?;
    let checked = job.show.stop(checked)?;
    let env = Env { threads: job.threads, ..Env::new(store).with_backend(backend) };
    let mut progress = LayerProgress::new(job.quiet);
    let mut memory = Memory::default();
    let mut hooks: [&mut dyn manager::Hook; 2] = [&mut progress, &mut memory];
    let mut report = opt::run_pipeline(&mut module, &checked, env, session, job.show, &mut hooks)?;
    progress.end();
    let mut told = EngineReport::new(&report, &memory);
    if let Some(calibrator) = report.session.get_mut::<Calibrator>() {
        calibrator.clear();
        if !job.show.stops() {
            told.cache = cache_cost::measure(&module, store, calibrator)?;
        }
    }
    if job.show.stops() {
        output::piece(&quantc_ir::text::print(&module))?;
        return Err(Failure::Closed);
    }
    all_finite(&module, store)?;
    say("generating code");
    let macs_per_token = macs(&module);
    let written = engine::write(
        Request {
            module: &module,
            store,
            target: job.target,
            max_tokens: job.chunk,
            always_full: false,
            tuning: job.tuning.as_ref().map(|(table, _)| table),
            objects: None,
            files: subject::tokenizer_files(tokenizer),
            facts: job.facts.clone(),
            report: told.json(&module),
        },
        job.out,
    )?;
    Ok(Built { module, written, macs_per_token, report: told })
}

/// A text to calibrate on: what a decoder reads as one, an encoder line by line, each with what `quantc embed` puts around it.
/// An array of ids holds samples as they are.
pub fn read_data(
    path: &Path,
    tokenizer: Option<&quantc_frontends::Tokenizer>,
    module: &quantc_ir::module::Module,
) -> Outcome<Data> {
    let name = path
        .file_name()
        .map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
    let mut data = Data { name, ..Data::default() };
    let encoder = module.facts.get("kind").is_some_and(|kind| kind == "encoder");
    match tokenizer {
        Some(tokenizer) if encoder && !subject::is_array(path) => {
            let mut ends = vec![];
            for line in subject::read_text(path)?.lines() {
                data.tokens.extend(tokenizer.encode(line, false)?);
                ends.push(data.tokens.len());
            }
            data.ends = Some(ends);
            (data.before, data.after) = tokenizer.around()?;
        }
        _ => {
            let (tokens, row) = subject::tokens(path, tokenizer)?;
            let bos = module.fact_u64("bos").ok().flatten().and_then(|id| u32::try_from(id).ok());
            (data.tokens, data.before) = (tokens, bos.filter(|_| row.is_none()).into_iter().collect());
        }
    }
    let vocab = module.fact_u64("vocab")?.unwrap_or(u64::from(u32::MAX));
    if let Some(id) = data.ids().find(|&id| u64::from(id) >= vocab) {
        let text = format!("the tokenizer makes token {id}, but the model knows {vocab} tokens only");
        return Err(Diag::input(text).help("the tokenizer belongs to another model").into());
    }
    Ok(data)
}

/// Refuses weights with elements that are not finite. Rounding and packing look at what they read; this looks at what is
/// stored as plain floats: embeddings, gains and biases.
fn all_finite(module: &quantc_ir::module::Module, store: &Store) -> Outcome {
    /// Bytes of numbers looked at together.
    const BLOCK: usize = 1 << 20;
    let mut numbers = vec![];
    for (id, weight) in module.weights.iter() {
        if !matches!(weight.ty.elem, ElemTy::F32 | ElemTy::F16 | ElemTy::Bf16) {
            continue;
        }
        let view = store.view(&module.weights, id)?;
        for rows in view.row_blocks(BLOCK) {
            numbers.resize(rows.len() * view.cols(), 0.0);
            view.read_rows_f32(rows.start, rows.len(), &mut numbers)?;
            if let Some(at) = numbers.iter().position(|x: &f32| !x.is_finite()) {
                let (row, column) = (rows.start + at / view.cols(), at % view.cols());
                let diag = Diag::input(format!("row {row}, column {column} is {}", numbers[at]));
                return Err(diag.at(Loc::Item(format!("@{}", weight.name))).into());
            }
            view.release(rows);
        }
    }
    Ok(())
}

/// Multiply-adds of one token.
fn macs(module: &quantc_ir::module::Module) -> u64 {
    use quantc_ir::ops::OpSpec;
    let one = |_: char| 1;
    let graphs = module.graphs().flat_map(|(_, graph)| {
        graph.ops().map(move |(_, node)| {
            let args: Vec<_> = node.args.iter().map(|&a| (!graph.is_none(a)).then(|| graph.ty(a))).collect();
            node.op.cost(&args, graph.ty(node.result), &one).macs
        })
    });
    graphs.sum()
}

/// Tells which layer was done: a bar on a terminal, a line per layer elsewhere.
pub struct LayerProgress {
    start: Instant,
    quiet: bool,
    shown: Option<subject::Progress>,
    /// Seconds at the last line.
    told: f64,
}

impl LayerProgress {
    /// Starts the clock. One that is `quiet` shows nothing.
    pub fn new(quiet: bool) -> LayerProgress {
        LayerProgress { start: Instant::now(), quiet, shown: None, told: 0.0 }
    }

    /// Takes the bar away.
    pub fn end(&mut self) {
        if let Some(bar) = self.shown.take() {
            bar.done();
        }
    }
}

impl manager::Hook for LayerProgress {
    fn after_layer(&mut self, at: &LayerAt) {
        if self.quiet {
            return;
        }
        if std::io::stderr().is_terminal() {
            let bar = self.shown.get_or_insert_with(|| subject::Progress::new("layers"));
            bar.at((at.index + 1) as f64 / at.total as f64);
        } else {
            // A line for each layer that took a while; quick groups of passes are not worth a line.
            let seconds = self.start.elapsed().as_secs_f64();
            if seconds < self.told + 1.0 {
                return;
            }
            self.told = seconds;
            eprintln!("layer @{} {}/{} {seconds:.1} s", at.name, at.index + 1, at.total);
        }
    }
}

impl From<Vec<Diag>> for crate::failure::Failure {
    fn from(diags: Vec<Diag>) -> Self {
        Diags(diags).into()
    }
}
