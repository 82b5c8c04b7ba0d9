//! `quantc explain`: kernels chosen, and what was refused and why.

use crate::failure::Outcome;
use crate::output;
use crate::subject;
use quantc_runtime::Manifest;
use quantc_runtime::format::Launch;
use serde_json::Value;
use std::path::PathBuf;

/// Arguments of `quantc explain`.
#[derive(clap::Args)]
pub struct Args {
    /// The engine.
    engine: PathBuf,
    /// Only kernels whose symbol or launches contain this.
    #[arg(long)]
    only: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub fn run(args: Args) -> Outcome {
    let manifest = subject::manifest(&args.engine)?;
    let (report, bad) = subject::report(&args.engine, &manifest)?;
    let kernels = report["kernels"].as_array().ok_or_else(|| bad("it names no kernels"))?;
    let text = |v: &Value| v.as_str().unwrap_or_default().to_string();
    let list = |v: &Value| v.as_array().into_iter().flatten().map(text).collect::<Vec<_>>();
    let wanted = |k: &&Value| {
        let only = args.only.as_deref().unwrap_or_default();
        text(&k["symbol"]).contains(only) || list(&k["launches"]).iter().any(|l| l.contains(only))
    };
    let chosen: Vec<&Value> = kernels.iter().filter(wanted).collect();
    if args.json {
        return output::json(&serde_json::json!({
            "target": manifest.target.name,
            "pipeline": manifest.pipeline,
            "kernels": chosen,
        }));
    }
    output::line(&format!("target    {} ({})", manifest.target.name, manifest.target.features.join(" ")))?;
    output::line(&format!("pipeline  {}", manifest.pipeline))?;
    output::line(&memory(&manifest))?;
    for program in &manifest.programs {
        let launches = &program.launches;
        let barriers =
            launches.iter().filter(|l| l.flags & quantc_runtime::format::NO_BARRIER_AFTER == 0).count();
        let n = launches.len();
        let rest = match predicted(launches, kernels) {
            Some(us) => format!("about {us:.0} us with all tokens, caches aside"),
            None => format!("{barriers} barriers"),
        };
        output::line(&format!("tokens    {} to {}: {n} launches, {rest}", program.min_t, program.max_t))?;
    }
    for kernel in chosen {
        output::line(&format!("\n{}", text(&kernel["symbol"])))?;
        let launches = list(&kernel["launches"]);
        let shown = launches.iter().take(6).cloned().collect::<Vec<_>>().join(", ");
        let more =
            if launches.len() > 6 { format!(", and {} more", launches.len() - 6) } else { String::new() };
        output::line(&format!("  for      {shown}{more}"))?;
        output::line(&format!("  template {}", text(&kernel["template"])))?;
        let choice = text(&kernel["choice"]);
        if !choice.is_empty() {
            output::line(&format!("  chosen   {choice}"))?;
        }
        let product = &kernel["product"];
        if let Some(expected) = product["expected"].as_f64() {
            let tile = &product["tile"];
            let measured = product["measured"].as_f64();
            let measured = measured.map_or(String::new(), |x| format!(", measured {:.0} %", 100.0 * x));
            output::line(&format!(
                "  tile     {} rows x {} vectors, expected at {:.0} % of the limit{measured}",
                tile["mr"],
                tile["nr"],
                100.0 * expected
            ))?;
        }
        if let Some(line) = on_gpu(&kernel["gpu"]) {
            output::line(&line)?;
        }
        for refused in list(&kernel["refused"]) {
            output::line(&format!("  refused  {refused}"))?;
        }
    }
    Ok(())
}

/// What the engine needs to run.
fn memory(manifest: &Manifest) -> String {
    let arena = output::bytes(manifest.arena_bytes);
    match manifest.device_bytes(1) {
        Some(need) if manifest.gpu.is_some() => format!(
            "memory    {} on the device for one sequence of {} tokens: weights {}, caches {}, arena {arena}, inputs {}",
            output::bytes(need.total()),
            manifest.context,
            output::bytes(need.weights),
            output::bytes(need.states),
            output::bytes(need.inputs)
        ),
        _ => format!("memory    arena {arena}, scratch {} a thread", output::bytes(manifest.scratch_bytes)),
    }
}

/// Microseconds that launches on a GPU are expected to take together, by the rates of the target.
fn predicted(launches: &[Launch], kernels: &[Value]) -> Option<f64> {
    let of = |launch: &Launch| {
        let kernel = kernels.iter().find(|k| k["symbol"] == launch.symbol.as_str())?;
        kernel["gpu"]["predicted_us"].as_f64()
    };
    launches.iter().map(of).sum()
}

/// How a kernel runs on a GPU.
fn on_gpu(gpu: &Value) -> Option<String> {
    let number = |key: &str| gpu[key].as_u64().unwrap_or(0);
    let predicted = gpu["predicted_us"].as_f64()?;
    let registers = match number("registers") {
        0 => "registers not known".to_string(),
        n => format!("{n} registers"),
    };
    let spills = match number("spills") {
        0 => String::new(),
        n => format!(", {n} bytes spilled"),
    };
    Some(format!(
        "  gpu      {} threads, {} of shared memory, {registers}{spills}\n  work     {} rows: {}, {} multiply-adds, about {predicted:.1} us",
        number("threads"),
        output::bytes(number("shared")),
        number("rows"),
        output::bytes(number("bytes")),
        number("macs"),
    ))
}
