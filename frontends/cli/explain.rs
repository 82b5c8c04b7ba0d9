//! `quantc explain`: kernels chosen, and what was refused and why.

use crate::failure::Outcome;
use crate::output;
use crate::subject;
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
    let arena = output::bytes(manifest.arena_bytes);
    output::line(&format!(
        "memory    arena {arena}, scratch {} a thread",
        output::bytes(manifest.scratch_bytes)
    ))?;
    for program in &manifest.programs {
        let launches = &program.launches;
        let barriers =
            launches.iter().filter(|l| l.flags & quantc_runtime::format::NO_BARRIER_AFTER == 0).count();
        let n = launches.len();
        output::line(&format!(
            "tokens    {} to {}: {n} launches, {barriers} barriers",
            program.min_t, program.max_t
        ))?;
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
        for refused in list(&kernel["refused"]) {
            output::line(&format!("  refused  {refused}"))?;
        }
    }
    Ok(())
}
