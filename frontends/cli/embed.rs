//! `quantc embed`: vectors of texts.

use crate::failure::Outcome;
use crate::output;
use crate::subject;
use clap::ValueEnum;
use quantc_ir::diag::Diag;
use quantc_runtime::format::Kind;
use quantc_runtime::session::{Session, SessionOptions};
use serde_json::json;
use std::path::PathBuf;

/// Arguments of `quantc embed`.
#[derive(clap::Args)]
pub struct Args {
    /// The engine of an encoder.
    engine: PathBuf,
    /// The text to embed.
    #[arg(long, required_unless_present = "file", conflicts_with = "file")]
    text: Option<String>,
    /// A file with one text a line.
    #[arg(long)]
    file: Option<PathBuf>,
    /// How token vectors become one vector.
    #[arg(long, value_enum, default_value_t = Pool::Mean)]
    pool: Pool,
    /// Leave the vector's length as it is instead of making it 1.
    #[arg(long)]
    no_normalize: bool,
    /// Worker threads; 0 means one for each CPU.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Pool {
    /// The mean of all token vectors.
    Mean,
    /// The first token's vector.
    Cls,
}

/// Runs the subcommand.
pub fn run(args: Args) -> Outcome {
    let engine = subject::open_engine(&args.engine, true)?;
    if engine.manifest().kind != Kind::Encoder as i32 {
        return Err(Diag::input("this engine is a decoder and embeds no text")
            .help("use `quantc run`")
            .into());
    }
    let tokenizer = subject::tokenizer(&engine)?;
    let texts: Vec<String> = match (&args.text, &args.file) {
        (Some(text), _) => vec![text.clone()],
        (None, Some(path)) => subject::read_text(path)?.lines().map(String::from).collect(),
        (None, None) => vec![],
    };
    let (width, context) = (engine.manifest().vocab as usize, engine.manifest().context as usize);
    let mut session =
        Session::new(engine, &SessionOptions { threads: args.threads, ..SessionOptions::default() })?;
    let (mut vectors, mut counts) = (vec![], vec![]);
    for text in &texts {
        let tokens = tokenizer.encode(text, true)?;
        if tokens.is_empty() || tokens.len() > context {
            let n = tokens.len();
            return Err(
                Diag::input(format!("a text has {n} tokens, the encoder takes 1 to {context}")).into()
            );
        }
        let rows = session.encode(&tokens)?;
        vectors.push(pooled(rows, width, args.pool, !args.no_normalize));
        counts.push(tokens.len());
    }
    if args.json {
        return output::json(&json!({ "embeddings": vectors, "tokens": counts, "width": width }));
    }
    for vector in &vectors {
        let cells: Vec<String> = vector.iter().map(f32::to_string).collect();
        output::line(&cells.join(" "))?;
    }
    Ok(())
}

/// One vector from the rows of a text, summed in f64.
fn pooled(rows: &[f32], width: usize, pool: Pool, normalize: bool) -> Vec<f32> {
    let count = rows.len() / width;
    let used = match pool {
        Pool::Mean => count,
        Pool::Cls => 1,
    };
    let mut vector = vec![0f64; width];
    for row in rows.chunks_exact(width).take(used) {
        vector.iter_mut().zip(row).for_each(|(v, &x)| *v += f64::from(x) / used as f64);
    }
    let length = vector.iter().map(|v| v * v).sum::<f64>().sqrt();
    let factor = if normalize && length > 0.0 { 1.0 / length } else { 1.0 };
    vector.into_iter().map(|v| (v * factor) as f32).collect()
}
