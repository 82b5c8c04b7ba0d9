//! `quantc inspect`: what a model, an engine or a `.qir` file holds.

use crate::failure::Outcome;
use crate::{output, subject};
use quantc_frontends::ImportOptions;
use quantc_ir::module::Module;
use quantc_ir::weights::Store;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Arguments of `quantc inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// A model folder, an engine or a `.qir` file.
    subject: PathBuf,
    /// Also read every weight and show its digest.
    #[arg(long)]
    digests: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub fn run(args: Args) -> Outcome {
    if subject::is_engine(&args.subject) {
        return engine(&args);
    }
    let store = Store::in_memory();
    let module = read(&args.subject, &store)?;
    let mut rows = vec![];
    for (id, weight) in module.weights.iter() {
        let digest =
            if args.digests { store.digest(&module.weights, id)?.to_string() } else { String::new() };
        rows.push((
            weight.name.clone(),
            weight.ty.to_string(),
            weight.ty.stored_bytes().unwrap_or(0),
            digest,
        ));
    }
    let total: u64 = rows.iter().map(|r| r.2).sum();
    if args.json {
        let weights: Vec<Value> = rows
            .iter()
            .map(|(name, ty, bytes, digest)| json!({ "name": name, "type": ty, "bytes": bytes, "digest": digest }))
            .collect();
        return output::json(&json!({
            "kind": "module", "name": module.name, "facts": module.facts, "weight_bytes": total,
            "layers": module.layers.len(), "weights": weights,
        }));
    }
    output::line(&format!("module  {}", module.name))?;
    for (name, value) in &module.facts {
        output::line(&format!("fact    {name} = {value}"))?;
    }
    let cells: Vec<_> = rows.into_iter().map(|(n, t, b, d)| vec![n, t, b.to_string(), d]).collect();
    output::piece(&output::table(&["weight", "type", "bytes", "digest"], &cells))?;
    output::line(&format!("{} weights, {}", cells.len(), output::bytes(total)))
}

fn read(path: &Path, store: &Store) -> Outcome<Module> {
    if path.is_dir() {
        return Ok(quantc_frontends::import(path, store, &ImportOptions::default())?.module);
    }
    let text = subject::read_text(path)?;
    Ok(quantc_ir::text::parse(&text, &path.display().to_string())?.module)
}

fn engine(args: &Args) -> Outcome {
    let manifest = subject::manifest(&args.subject)?;
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    if args.json {
        let blobs: Vec<Value> = manifest
            .weights
            .iter()
            .map(|b| json!({ "name": b.name, "bytes": b.len, "digest": hex(&b.digest) }))
            .collect();
        let files: Vec<Value> = manifest
            .files
            .iter()
            .map(|f| json!({ "name": f.name, "bytes": f.len, "digest": hex(&f.digest) }))
            .collect();
        let facts: serde_json::Map<String, Value> =
            manifest.facts.iter().map(|f| (f.key.clone(), json!(f.value))).collect();
        return output::json(&json!({
            "kind": "engine", "model": manifest.model, "target": manifest.target.name, "facts": facts,
            "pipeline": manifest.pipeline, "context": manifest.context, "vocab": manifest.vocab,
            "weight_bytes": manifest.weight_bytes, "decode_bytes_per_token": manifest.decode_bytes_per_token,
            "weights": blobs, "files": files,
        }));
    }
    output::piece(&manifest.to_text())
}
