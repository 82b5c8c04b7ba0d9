//! `quantc calibrate`: statistics of a model on a text, in a file.

use crate::compile::{LayerProgress, PREPARE, default_store, read_data};
use crate::failure::Outcome;
use crate::layer_exec::Compiled;
use crate::text_model::{TextArgs, read_model};
use crate::{opt, output};
use quantc_codegen::targets;
use quantc_ir::diag::Diag;
use quantc_ir::module::Module;
use quantc_ir::weights::Store;
use quantc_passes::Registry;
use quantc_passes::calib::file::{Head, LayerHead};
use quantc_passes::calib::stats::{self, Kind};
use quantc_passes::calib::{Calibrator, LayerExec, StatsFile};
use quantc_passes::pass::prelude::*;
use quantc_passes::pass::{Env, Session};
use quantc_passes::pipeline;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes that Hessians may take in a file.
const HESSIANS: u64 = 1 << 30;

/// Arguments of `quantc calibrate`.
#[derive(clap::Args)]
pub struct Args {
    /// A model folder; with --merge, files of statistics.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// Put files together that were taken of different samples of one text.
    #[arg(long)]
    merge: bool,
    /// The text, or token ids in rows, as a NumPy array (`.npy`).
    #[arg(long, required_unless_present = "merge", conflicts_with = "merge")]
    data: Option<PathBuf>,
    /// The file to write.
    #[arg(short, long)]
    output: PathBuf,
    /// The statistics, as the pass `calibrate` calls them.
    #[arg(long, value_delimiter = ',', default_value = "absmax,cache,histogram")]
    stats: Vec<String>,
    /// Samples at most; 0 takes as many as the text has.
    #[arg(long, default_value_t = 128)]
    samples: u32,
    /// Samples left out in front, for files that are to be merged.
    #[arg(long, default_value_t = 0)]
    first: u32,
    /// Tokens of one sample; 0 takes the model's context, but at most 512.
    #[arg(long, default_value_t = 0)]
    length: u32,
    /// 0 takes the samples in the order of the text, any other number shuffles them first.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Passes that the pipelines have in front of `calibrate`, besides outline-layers, fold-constants and dedupe.
    #[arg(long, value_name = "PIPELINE")]
    before: Option<String>,
    /// Tokens that a sequence may have, instead of the model's context.
    #[arg(long)]
    context: Option<u32>,
    #[command(flatten)]
    text: TextArgs,
    /// Threads; 0 means one for each CPU. The file does not depend on it.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Where derived weights are kept.
    #[arg(long, env = "QUANTC_STORE")]
    store: Option<PathBuf>,
    /// Print one JSON object about the file.
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub fn run(args: Args) -> Outcome {
    let file = match (&args.paths[..], args.merge) {
        (paths, true) => merged(paths)?,
        ([model], false) => taken(&args, model)?,
        _ => {
            return Err(Diag::input("one model is calibrated at a time")
                .help("to merge files, say --merge")
                .into());
        }
    };
    let bytes = file.to_bytes()?;
    let place = args.output.display().to_string();
    let part = args.output.with_extension(format!("{}.part", std::process::id()));
    let written = std::fs::write(&part, &bytes).and_then(|()| std::fs::rename(&part, &args.output));
    written.map_err(|e| {
        let _ = std::fs::remove_file(&part);
        Diag::system(format!("cannot write it: {e}")).in_file(place)
    })?;
    let head = file.head();
    let (layers, samples) = (head.layers.len(), head.samples.len());
    if args.json {
        return output::json(&json!({
            "file": args.output, "model": head.model, "data": head.data, "samples": samples, "length": head.length,
            "seed": head.seed, "statistics": head.statistics, "layers": layers, "bytes": bytes.len(),
            "digest": file.digest().to_string(),
        }));
    }
    let size = output::bytes(bytes.len() as u64);
    let (each, data, statistics) = (head.length, &head.data, head.statistics.join(", "));
    output::line(&format!("file     {} ({size})", args.output.display()))?;
    output::line(&format!(
        "data     {samples} samples of {each} tokens of {data}: {statistics} in {layers} layers"
    ))
}

fn merged(paths: &[PathBuf]) -> Outcome<StatsFile> {
    let mut all: Option<StatsFile> = None;
    for path in paths {
        let file = StatsFile::read(path)?;
        all = Some(match all {
            None => file,
            Some(all) => all.merge(file)?,
        });
    }
    Ok(all.ok_or_else(|| Diag::bug("nothing to merge"))?)
}

/// What was recorded of layers so far.
#[derive(Default)]
struct Recorded {
    layers: Vec<LayerHead>,
    states: Vec<Vec<u8>>,
}

quantc_passes::pass! {
    /// Keeps what `calibrate` has prepared for a file.
    "record-statistics" => pub struct RecordStatistics {}
    scope: Layer, numerics: Exact, stats: keeps
}

impl Pass for RecordStatistics {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let recorded = stats::record(cx)?;
        if let Some((layer, states)) = recorded {
            let mut all = cx.session().take::<Recorded>().unwrap_or_default();
            all.layers.push(layer);
            all.states.extend(states);
            cx.session().put(all);
        }
        Ok(Changed::No)
    }
}

fn taken(args: &Args, model: &Path) -> Outcome<StatsFile> {
    let dir = args.store.clone().map_or_else(default_store, Ok)?;
    let store = Store::open(&dir)?;
    let threads = if args.threads == 0 { quantc_runtime::stats::available_cpus() } else { args.threads };
    quantc_passes::set_threads(threads);
    let imported = read_model(model, &store, args.context, &args.text)?;
    let mut module = imported.module;
    opt::verify(&module)?;
    let data = args
        .data
        .as_deref()
        .ok_or_else(|| Diag::input("there is no text to calibrate on").help("give --data"))?;
    let tokenizer = imported.tokenizer.as_deref().map(|path| -> Outcome<_> {
        let place = path.display().to_string();
        let bytes =
            std::fs::read(path).map_err(|e| Diag::input(format!("cannot read it: {e}")).in_file(&place))?;
        Ok(quantc_frontends::Tokenizer::from_bytes(&bytes, &place)?)
    });
    let tokenizer = tokenizer.transpose()?;
    let data = read_data(data, tokenizer.as_ref(), &module)?;
    let text = data.digest().to_string();
    let name = data.name.clone();
    let exec = Compiled::new(targets::host(), threads, &dir.join("tmp"));
    let exec_name = exec.name();
    let mut session = Session::default();
    session.put(Calibrator::new(data, Arc::new(exec)));

    let registry = Registry::builtin().with(RecordStatistics::INFO);
    let facts = [Fact::Data];
    let check = |module: &Module, text: &str| {
        let parsed = pipeline::parse(text)?;
        pipeline::check_given(&parsed, &registry, module, None, None, &facts)
            .map_err(crate::failure::Failure::from)
    };
    let before = args.before.iter().map(|p| format!(", {p}")).collect::<String>();
    let prepare = format!("{PREPARE}{before}");
    let Args { samples, first, length, seed, .. } = args;
    let take = format!(
        "layers(calibrate{{samples={samples}, first={first}, length={length}, seed={seed}, stats=[{}]}}, record-statistics)",
        args.stats.join(", ")
    );
    // Refused before anything runs.
    check(&module, &format!("{prepare}, {take}"))?;
    let env = Env { threads, ..Env::new(&store) };
    let show = opt::Show::default();
    let checked = check(&module, &prepare)?;
    opt::run_pipeline(&mut module, &checked, env, Session::default(), &show, &mut [])?;
    if args.stats.iter().any(|s| s == Kind::Hessian.name()) {
        fits(&module)?;
    }
    let mut progress = LayerProgress::new(false);
    let checked = check(&module, &take)?;
    let mut report = opt::run_pipeline(&mut module, &checked, env, session, &show, &mut [&mut progress])?;
    progress.end();
    let recorded = report.session.take::<Recorded>().unwrap_or_default();
    let mut calibrator = report.session.take::<Calibrator>().ok_or_else(|| Diag::bug("the data is gone"))?;
    calibrator.clear();
    let samples = calibrator.samples().ok_or_else(|| {
        Diag::input(format!("the model has no rows that `{}` are taken of", args.stats.join(", ")))
    })?;
    let head = Head {
        model: module.name.clone(),
        data: name,
        text,
        exec: exec_name,
        length: samples.length,
        seed: *seed,
        samples: samples.names().into_iter().map(|(i, digest)| (i, digest.to_string())).collect(),
        statistics: args.stats.clone(),
        layers: recorded.layers,
    };
    Ok(StatsFile::new(head, recorded.states)?)
}

/// Refuses Hessians that are too large for a file.
fn fits(module: &Module) -> Outcome {
    let all = module.graphs().flat_map(|(_, graph)| stats::sites(graph, |_| true));
    let bytes: u64 = all.map(|(_, k)| 2 * k as u64 * (k as u64 + 1)).sum();
    if bytes <= HESSIANS {
        return Ok(());
    }
    let (bytes, most) = (output::bytes(bytes), output::bytes(HESSIANS));
    let diag =
        Diag::input(format!("the Hessians of this model take {bytes}; a file may have {most} of them"));
    Err(diag
        .help(
            "leave `hessian` out of --stats, and give passes that want it the text: `quantc compile --data`",
        )
        .into())
}
