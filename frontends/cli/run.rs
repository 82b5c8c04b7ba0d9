//! `quantc run`: generates text.

use crate::failure::Outcome;
use crate::output;
use crate::subject;
use quantc_ir::diag::Diag;
use quantc_runtime::sample::{SampleOptions, Sampler};
use quantc_runtime::session::{Session, SessionOptions};
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

/// Arguments of `quantc run`.
#[derive(clap::Args)]
pub struct Args {
    /// The engine.
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
    /// Go on after an end-of-text token.
    #[arg(long)]
    ignore_eos: bool,
    /// Do not compare the weights with their digests when the engine is opened.
    #[arg(long)]
    no_verify: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub fn run(args: Args) -> Outcome {
    let engine = subject::open_engine(&args.engine, !args.no_verify)?;
    let engine = subject::decoder(engine, &args.engine, "run to generate text")?;
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
    let mut session =
        Session::new(engine, &SessionOptions { threads: args.threads, ..SessionOptions::default() })?;

    let start = Instant::now();
    let mut next = sampler.sample(session.prefill(0, &prompt, 1)?)?;
    let prefill = start.elapsed();
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
        if ids.len() < room {
            next = sampler.sample(session.decode(0, next)?)?;
        }
    }
    let rest = stream.finish()?;
    text += &rest;
    let decode = start.elapsed();
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
        }));
    }
    output::line(&rest)?;
    eprintln!(
        "{} prompt tokens at {:.1}/s, {} tokens at {:.1}/s, {} threads, seed {}, ended by {finish}",
        prompt.len(),
        rate(prompt.len(), prefill),
        ids.len(),
        rate(decoded, decode),
        session.threads(),
        args.seed,
    );
    Ok(())
}
