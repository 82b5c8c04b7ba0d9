//! `quantc inspect`: what a model, an engine or a `.qir` file holds.

use crate::failure::Outcome;
use crate::{output, subject};
use quantc_frontends::{ImportOptions, onnx};
use quantc_ir::diag::{Diag, Diags};
use quantc_ir::module::Module;
use quantc_ir::weights::Store;
use quantc_runtime::format::Kind;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Arguments of `quantc inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// A model folder, an `.onnx` file, an engine or a `.qir` file.
    subject: PathBuf,
    /// Also read every weight and show its digest.
    #[arg(long)]
    digests: bool,
    /// Show the report of an engine: what was rounded and how far off it is, what was moved between channels, and on which data.
    #[arg(long)]
    report: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub fn run(args: Args) -> Outcome {
    if subject::is_engine(&args.subject) {
        return if args.report { report(&args) } else { engine(&args) };
    }
    if args.report {
        let diag = Diag::input("only engines have a report").in_file(args.subject.display().to_string());
        return Err(diag.into());
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
    if onnx::is_onnx(path) && onnx::is_text(path) {
        // As engines read it; what inputs were taken for is told.
        let imported = onnx::import_text(path, store, &onnx::TextOptions::default()).map_err(Diags::from)?;
        imported.notes.iter().for_each(|note| eprintln!("note: {note}"));
        return Ok(imported.module);
    }
    if onnx::is_onnx(path) {
        let imported = onnx::import(path, store, &onnx::Options::default());
        return Ok(imported.map_err(|refused| refused.problems)?.module);
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
            "inputs": arrays(&manifest.array_inputs), "outputs": arrays(&manifest.array_outputs),
            "weights": blobs, "files": files,
        }));
    }
    output::piece(&manifest.to_text())
}

/// Arrays that a graph takes or gives.
fn arrays(all: &[quantc_runtime::format::Array]) -> Vec<Value> {
    all.iter().map(|a| json!({ "name": a.name, "type": a.elem, "dims": a.dims })).collect()
}

/// Sections of a report, with the fields of their rows.
const SECTIONS: [(&str, &[&str]); 5] = [
    ("calibration", &["data", "samples", "length", "seed", "layers", "statistics", "digest"]),
    ("quantized", &["weight", "pass", "scheme", "bits", "sqnr_db", "output_error", "fallback"]),
    ("sites", &["place", "pass", "applied", "matrices", "factors", "what"]),
    ("scales", &["place", "scheme", "range", "min", "max", "saturates"]),
    ("checks", &["layer", "pass", "difference"]),
];

fn report(args: &Args) -> Outcome {
    let manifest = subject::manifest(&args.subject)?;
    let (report, bad) = subject::report(&args.subject, &manifest)?;
    if args.json {
        return output::json(&report);
    }
    let mut first = true;
    for (section, fields) in SECTIONS {
        if report[section].is_null() && manifest.kind() == Kind::Graph {
            continue;
        }
        let rows = report[section].as_array().ok_or_else(|| bad(&format!("it has no list `{section}`")))?;
        if rows.is_empty() {
            continue;
        }
        let cells: Vec<_> = rows.iter().map(|row| fields.iter().map(|f| cell(&row[*f])).collect()).collect();
        output::piece(&format!("{}{}", if first { "" } else { "\n" }, output::table(fields, &cells)))?;
        first = false;
    }
    let cache = ["data", "length", "tokens", "kl_mean", "perplexity", "perplexity_float_cache"];
    if report["cache"].is_object() {
        let row = cache.iter().map(|field| cell(&report["cache"][*field])).collect();
        output::piece(&format!("\n{}", output::table(&cache, &[row])))?;
    }
    Ok(())
}

/// A field for people; what is not there is empty.
fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.into(),
        Value::Array(parts) => parts.iter().map(cell).collect::<Vec<_>>().join(" "),
        Value::Number(n) if n.is_u64() => n.to_string(),
        Value::Number(n) => match n.as_f64().unwrap_or(f64::NAN) {
            x if x != 0.0 && x.abs() < 1e-3 => format!("{x:.2e}"),
            x => format!("{x:.3}"),
        },
        Value::Object(_) => value.to_string(),
    }
}
