//! `quantc eval`: scores on a text, or of a classifier.

use crate::failure::Outcome;
use crate::output;
use crate::score;
use crate::subject;
use quantc_frontends::data::TokenWindows;
use quantc_ir::diag::Diag;
use quantc_runtime::session::{Session, SessionOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Arguments of `quantc eval`.
#[derive(clap::Args)]
pub struct Args {
    /// An engine, or a model, which is compiled to f32 for this machine first.
    subject: PathBuf,
    /// The text to score, or token ids in rows, as a NumPy array (`.npy`), in front of which no BOS is put.
    #[arg(long, required_unless_present = "input")]
    text: Option<PathBuf>,
    /// Tokens of a window, BOS included; by default the context, at most 2048, or a row of the array.
    #[arg(long)]
    window: Option<u32>,
    /// Most tokens taken from the text; 0 takes all.
    #[arg(long, default_value_t = 0)]
    max_tokens: usize,
    /// An engine or model to compare with.
    #[arg(long)]
    against: Option<PathBuf>,
    #[command(flatten)]
    classes: crate::eval_graph::Classes,
    /// Worker threads; 0 means one for each CPU.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub fn run(args: Args) -> Outcome {
    if subject::is_graph(&args.subject)? || quantc_frontends::onnx::is_onnx(&args.subject) {
        let against = args.against.as_deref();
        return crate::eval_graph::run(&args.subject, against, &args.classes, args.threads, args.json);
    }
    if args.classes.input.is_some() {
        return Err(Diag::input("--input is for `.onnx` files and their engines").into());
    }
    let text = args
        .text
        .as_deref()
        .ok_or_else(|| Diag::input("there is no text to score").help("give --text FILE"))?;
    let open = |path: &Path| {
        subject::open(path).and_then(|engine| subject::decoder(engine, path, "scored on a text"))
    };
    let engine = open(&args.subject)?;
    let base = args.against.as_deref().map(open).transpose()?;
    let (tokens, row) = subject::tokens(text, Some(&subject::tokenizer(&engine)?))?;
    let context = engine.manifest().context;
    let row = row.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
    let window = args.window.or(row).unwrap_or(context.min(2048));
    let shortest = base.as_ref().map_or(context, |b| b.manifest().context.min(context));
    if window > shortest {
        return Err(
            Diag::input(format!("a window of {window} tokens exceeds the context of {shortest}")).into()
        );
    }
    let bos = engine.manifest().generation.as_ref().and_then(|g| g.bos);
    let known = engine.manifest().token_ids().min(engine.manifest().vocab);
    let windows = match row {
        None => TokenWindows::of_ids(tokens, args.max_tokens, bos, window as usize, known)?,
        Some(_) => TokenWindows::of_samples(tokens, args.max_tokens, window as usize, known)?,
    };
    let options = SessionOptions { threads: args.threads, ..SessionOptions::default() };
    let mut session = Session::new(Arc::clone(&engine), &options)?;
    let mut base = base.map(|b| Session::new(b, &options)).transpose()?;
    let mut bar = subject::Progress::new("scoring");
    let scores = score::score(&mut session, base.as_mut(), &windows, &mut |share| bar.at(share))?;
    bar.done();
    if args.json {
        return output::json(&scores);
    }
    output::line(&format!("perplexity       {:.5}", scores.perplexity))?;
    output::line(&format!("tokens scored    {}, windows of {}", scores.tokens_scored, scores.window))?;
    if let Some(c) = &scores.against {
        output::line(&format!("base perplexity  {:.5}", c.perplexity_base))?;
        output::line(&format!("KL to base       mean {:.5}, 99th percentile {:.5}", c.kl_mean, c.kl_p99))?;
        output::line(&format!("top-1 agreement  {:.4}", c.top1_agreement))?;
        output::line(&format!("logits           off by {:.4} of their norm", c.logits_error))?;
    }
    eprintln!("{:.1} s", scores.seconds);
    Ok(())
}
