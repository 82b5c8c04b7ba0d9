//! `quantc bench`: speed of an engine.

use crate::failure::Outcome;
use crate::output;
use crate::profile::{Facts, Phase};
use crate::subject::{self, Weights};
use quantc_ir::diag::Diag;
use quantc_runtime::engine::OpenOptions;
use quantc_runtime::sample::{self, SampleOptions, Sampler};
use quantc_runtime::session::{Session, SessionOptions};
use quantc_runtime::stats;
use serde_json::{Map, json};
use std::path::PathBuf;
use std::time::Instant;

/// Arguments of `quantc bench`.
#[derive(clap::Args)]
pub struct Args {
    /// The engine.
    engine: PathBuf,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 512)]
    prompt_tokens: usize,
    /// Tokens to generate after it.
    #[arg(long, default_value_t = 128)]
    gen_tokens: usize,
    /// Sequences decoded side by side.
    #[arg(long, default_value_t = 1)]
    batch: u32,
    /// Worker threads; 0 means one for each CPU.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Worker threads of steps with one token; 0 means as many as for others.
    #[arg(long, default_value_t = 0)]
    decode_threads: usize,
    /// Where weights lie: mapped, in the file's pages, which processes share; or huge, in huge pages, to which they
    /// move while tokens are generated.
    #[arg(long, value_enum, default_value_t = Weights::Huge, hide_possible_values = true)]
    weights: Weights,
    /// Measured runs, after one that is not counted.
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Also print where the time of a step goes.
    #[arg(long)]
    profile: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub fn run(args: Args) -> Outcome {
    if subject::is_graph(&args.engine)? {
        return crate::bench_graph::run(&args.engine, args.threads, args.repeat, args.profile, args.json);
    }
    let start = Instant::now();
    let open = OpenOptions { verify_weights: false, pages: args.weights.into() };
    let engine = subject::open_engine_with(&args.engine, &open)?;
    let engine = subject::decoder(engine, &args.engine, "timed at generating text")?;
    if args.prompt_tokens == 0 || args.repeat == 0 || args.batch == 0 {
        return Err(Diag::input("there is nothing to measure")
            .help("use at least one prompt token, one sequence and one run")
            .into());
    }
    let options = SessionOptions {
        threads: args.threads,
        decode_threads: args.decode_threads,
        slots: args.batch,
        profile: args.profile,
        ..SessionOptions::default()
    };
    let _loaded = subject::load(&engine)?;
    let mut session = Session::new(engine.clone(), &options)?;
    let load_ms = start.elapsed().as_secs_f64() * 1e3;
    let manifest = engine.manifest();
    let context = manifest.context as usize;
    let n = args.prompt_tokens.saturating_add(args.gen_tokens);
    if n > context {
        let diag = Diag::input(format!("{n} tokens exceed the context of {context}"));
        return Err(diag.help("give smaller --prompt-tokens and --gen-tokens").into());
    }
    let ids = u64::from(manifest.token_ids());
    let prompt: Vec<u32> = (0..args.prompt_tokens as u64).map(|i| (i * 7919 % ids) as u32).collect();
    let slots: Vec<u32> = (0..session.slots()).collect();
    let (mut prefill, mut decode, mut runs) = (vec![], vec![], vec![]);
    let (mut prefill_phase, mut decode_phase) = (Phase::default(), Phase::default());
    let width = manifest.vocab as usize;
    let mut choosers = vec![];
    if session.chooses() {
        for _ in &slots {
            choosers.push(Sampler::new(SampleOptions::default(), width)?);
        }
    }
    let nanos = |start: Instant| u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    for n in 0..=args.repeat {
        // The first run warms up and is not counted. It goes on until weights lie where they stay: in a text of some hundred
        // tokens their move is lost, in a short measurement it would be half of what is measured.
        let (mut first, mut then) = (Phase::default(), Phase::default());
        let mut next = vec![0; slots.len()];
        session.clear_profile();
        let start = Instant::now();
        for (&slot, next) in slots.iter().zip(&mut next) {
            session.reset(slot)?;
            let began = Instant::now();
            let logits = match &mut choosers[..] {
                // Tokens are chosen where the kernels run, as a part of the step.
                [chooser, ..] => {
                    *next = session.prefill_next(slot, &prompt, chooser)?;
                    None
                }
                [] => Some(session.prefill(slot, &prompt, 1)?),
            };
            first.steps.nanos += nanos(began);
            first.steps.count_prompt(prompt.len() as u64, manifest.max_tokens.into());
            if let Some(logits) = logits {
                let began = Instant::now();
                *next = sample::greedy(logits).unwrap_or(0);
                first.steps.sampling_nanos += nanos(began);
            }
        }
        let prefill_s = start.elapsed().as_secs_f64();
        if args.profile {
            first.add(session.profile());
            session.clear_profile();
        }
        let start = Instant::now();
        let long = |done: usize| n == 0 && !engine.moved().done && args.prompt_tokens + done < context;
        for done in 0.. {
            if done >= args.gen_tokens && !long(done) {
                break;
            }
            let began = Instant::now();
            if choosers.is_empty() {
                let logits = session.decode_batch(&slots, &next)?;
                then.steps.nanos += nanos(began);
                let began = Instant::now();
                for (next, row) in next.iter_mut().zip(logits.chunks_exact(width)) {
                    *next = sample::greedy(row).unwrap_or(0);
                }
                then.steps.sampling_nanos += nanos(began);
            } else {
                session.decode_batch_next(&slots, &mut next, &mut choosers)?;
                then.steps.nanos += nanos(began);
            }
            let held: u64 = slots.iter().map(|&slot| u64::from(session.position(slot))).sum();
            then.steps.count(slots.len() as u64, slots.len() as u64, held, held);
        }
        let decode_s = start.elapsed().as_secs_f64();
        if n > 0 {
            let batch = slots.len() as f64;
            let rates =
                (args.prompt_tokens as f64 * batch / prefill_s, args.gen_tokens as f64 * batch / decode_s);
            prefill.push(rates.0);
            decode.push(rates.1);
            runs.push(json!({ "prefill_tok_s": rates.0, "decode_tok_s": rates.1 }));
            then.add(session.profile());
            prefill_phase.append(first);
            decode_phase.append(then);
        }
    }
    let (prefill, decode) = (median(prefill), median(decode));
    let profile = args.profile.then(|| {
        let facts = Facts::of(&args.engine, manifest);
        [("prefill", prefill_phase), ("decode", decode_phase)]
            .map(|(name, phase)| (name, facts.summary(&phase, session.threads())))
    });
    if args.json {
        return output::json(&json!({
            "prefill_tok_s": prefill,
            "decode_tok_s": decode,
            "weight_bytes": manifest.weight_bytes,
            "decode_bytes_per_token": manifest.decode_bytes_per_token,
            "peak_rss_bytes": stats::peak_rss_bytes(),
            "load_ms": load_ms,
            "threads": session.threads(),
            "decode_threads": session.decode_threads(),
            "moved_bytes": engine.moved().moved_bytes,
            "batch": args.batch,
            "prompt_tokens": args.prompt_tokens,
            "gen_tokens": args.gen_tokens,
            "runs": runs,
            "profile": profile.map(|phases| {
                phases.map(|(name, s)| (name.to_string(), s.json())).into_iter().collect::<Map<_, _>>()
            }),
        }));
    }
    output::line(&format!("prefill  {prefill:.1} tokens/s ({} tokens)", args.prompt_tokens))?;
    let gb = decode / f64::from(args.batch) * manifest.decode_bytes_per_token as f64 / 1e9;
    output::line(&format!(
        "decode   {decode:.1} tokens/s ({} tokens), weights at {gb:.1} GB/s",
        args.gen_tokens
    ))?;
    output::line(&format!("weights  {}, loaded in {load_ms:.0} ms", output::bytes(manifest.weight_bytes)))?;
    for (name, summary) in profile.iter().flatten() {
        output::piece(&summary.text(name))?;
    }
    Ok(())
}

fn median(mut xs: Vec<f64>) -> f64 {
    xs.sort_by(f64::total_cmp);
    match xs.len() {
        0 => 0.0,
        n if n % 2 == 1 => xs[n / 2],
        n => (xs[n / 2 - 1] + xs[n / 2]) / 2.0,
    }
}
