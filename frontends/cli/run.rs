//! `quantc run`: generates text, or evaluates a graph.

use crate::failure::Outcome;
use crate::output;
use crate::subject::{self, Weights};
use quantc_ir::diag::Diag;
use quantc_runtime::engine::OpenOptions;
use quantc_runtime::sample::{SampleOptions, Sampler};
use quantc_runtime::session::{Session, SessionOptions};
use quantc_runtime::stats;
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// Arguments of `quantc run`.
#[derive(clap::Args)]
pub struct Args {
    /// An engine that generates text, or an `.onnx` file.
    engine: PathBuf,
    /// The text to continue.
    #[arg(long, default_value = "")]
    prompt: String,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// 0 takes the most likely token; 1 follows the model's distribution.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Only the K most likely tokens; 0 means all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// The fewest tokens whose probability reaches P.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Seed of the sampler.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Worker threads; 0 means one for each CPU.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Worker threads once the prompt is read; 0 means as many as before.
    #[arg(long, default_value_t = 0)]
    decode_threads: usize,
    /// Where weights lie: mapped, in the file's pages, which processes share; or huge, in huge pages, to which they
    /// move while tokens are generated.
    #[arg(long, value_enum, default_value_t = Weights::Huge, hide_possible_values = true)]
    weights: Weights,
    /// Go on after an end-of-text token.
    #[arg(long)]
    ignore_eos: bool,
    /// Do not compare the weights with their digests. It is done beside generating the text, and a difference is
    /// reported at the latest after it.
    #[arg(long)]
    no_verify: bool,
    /// Also print what the start took, peak memory, and how many weights have moved to huge pages.
    #[arg(long)]
    stats: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    graph: crate::run_graph::Arrays,
}

/// Runs the subcommand.
pub fn run(args: Args) -> Outcome {
    if quantc_frontends::onnx::is_onnx(&args.engine) {
        return crate::run_graph::run(&args.engine, &args.graph, args.json);
    }
    if subject::is_graph(&args.engine)? {
        return crate::run_graph::run_engine(&args.engine, &args.graph, args.threads, args.json);
    }
    if !args.graph.inputs.is_empty() || args.graph.output.is_some() {
        return Err(Diag::input("--input and --output are for `.onnx` files and their engines").into());
    }
    let begun = Instant::now();
    // The first token does not wait until all weights have been read.
    let options = OpenOptions { verify_weights: false, pages: args.weights.into() };
    let engine = subject::open_engine_with(&args.engine, &options)?;
    let engine = subject::decoder(engine, &args.engine, "run to generate text")?;
    let prefault = Arc::clone(&engine);
    // It ends by itself, and nobody waits for it: when it is late, the first step touches the pages.
    std::thread::spawn(move || prefault.prefault());
    let tokenizer = subject::tokenizer(&engine)?;
    let manifest = engine.manifest().clone();
    let generation = manifest.generation.clone().unwrap_or_default();
    let mut prompt: Vec<u32> = generation.bos.into_iter().collect();
    prompt.extend(tokenizer.encode(&args.prompt, false)?);
    if prompt.is_empty() {
        return Err(Diag::input("the prompt is empty, and the model has no token to begin with")
            .help("give --prompt")
            .into());
    }
    let context = manifest.context as usize;
    if prompt.len() >= context {
        let n = prompt.len();
        return Err(Diag::input(format!("the prompt has {n} tokens, the context holds {context}")).into());
    }
    let options = SampleOptions {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
    };
    let mut sampler = Sampler::new(options, manifest.vocab as usize)?;
    let options = SessionOptions {
        threads: args.threads,
        decode_threads: args.decode_threads,
        ..SessionOptions::default()
    };
    let _loaded = subject::load(&engine)?;
    let mut session = Session::new(Arc::clone(&engine), &options)?;
    let load = begun.elapsed();

    let start = Instant::now();
    let mut next = session.prefill_next(0, &prompt, &mut sampler)?;
    let prefill = start.elapsed();
    let first = begun.elapsed();
    let mut verifying = None;
    // The last token is not fed back, so it needs no room in the state.
    let room = (context - prompt.len() + 1).min(args.max_tokens);
    let mut ids = Vec::with_capacity(room);
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    let start = Instant::now();
    let mut finish = if room < args.max_tokens { "context" } else { "length" };
    while ids.len() < room {
        if generation.eos.contains(&next) && !args.ignore_eos {
            finish = "eos";
            break;
        }
        ids.push(next);
        let piece = stream.push(next)?;
        if !args.json {
            output::piece(&piece)?;
        }
        text += &piece;
        if verifying.is_none() && !args.no_verify {
            verifying = Some(engine.verify_weights_beside()?);
        }
        if ids.len() < room {
            next = session.decode_next(0, next, &mut sampler)?;
        }
    }
    let rest = stream.finish()?;
    text += &rest;
    let decode = start.elapsed();
    if !args.json {
        output::line(&rest)?;
    }
    match verifying {
        Some(verifying) => verifying.wait()?,
        None if args.no_verify => (),
        None => engine.verify_weights()?,
    }
    let moved = engine.moved();
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    let rate = |n: usize, time: std::time::Duration| n as f64 / time.as_secs_f64().max(1e-9);
    let decoded = ids.len().saturating_sub(1);
    if args.json {
        return output::json(&json!({
            "text": text,
            "prompt": args.prompt,
            "tokens": ids,
            "prompt_tokens": prompt.len(),
            "finish": finish,
            "seed": args.seed,
            "temperature": args.temperature,
            "prefill_tok_s": rate(prompt.len(), prefill),
            "decode_tok_s": rate(decoded, decode),
            "threads": session.threads(),
            "decode_threads": session.decode_threads(),
            "load_ms": ms(load),
            "first_token_ms": ms(first),
            "peak_rss_bytes": stats::peak_rss_bytes(),
            "moved_bytes": moved.moved_bytes,
        }));
    }
    eprintln!(
        "{} prompt tokens at {:.1}/s, {} tokens at {:.1}/s, {} threads, seed {}, ended by {finish}",
        prompt.len(),
        rate(prompt.len(), prefill),
        ids.len(),
        rate(decoded, decode),
        session.threads(),
        args.seed,
    );
    if args.stats {
        let peak = stats::peak_rss_bytes().map_or("unknown".into(), output::bytes);
        let moving = if moved.done { "" } else { ", and more to come" };
        eprintln!(
            "opened in {:.1} ms, first token after {:.1} ms, peak memory {peak}, {} moved to huge pages in {:.1} ms{moving}",
            ms(load),
            ms(first),
            output::bytes(moved.moved_bytes),
            moved.nanos as f64 / 1e6,
        );
    }
    Ok(())
}
