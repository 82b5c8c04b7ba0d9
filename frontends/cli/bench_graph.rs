//! `quantc bench` of engines over arrays: how long a call takes.

use crate::failure::Outcome;
use crate::output;
use crate::subject;
use quantc_ir::diag::Diag;
use quantc_runtime::session::{ProfileRow, Session, SessionOptions};
use quantc_runtime::stats;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

/// Runs the engine on made-up arrays.
pub fn run(path: &Path, threads: usize, repeat: usize, profile: bool, json: bool) -> Outcome {
    if repeat == 0 {
        return Err(Diag::input("there is nothing to measure").help("use at least one run").into());
    }
    let engine = subject::open_engine(path, false)?;
    let options = SessionOptions { threads, profile, ..SessionOptions::default() };
    let mut session = Session::new(engine.clone(), &options)?;
    let manifest = engine.manifest();
    // Floats between 0 and 1; integers that are small, so that indices are as good as any.
    let inputs: Vec<Vec<u8>> = (manifest.array_inputs.iter())
        .map(|array| {
            let n = array.bytes().unwrap_or(0) as usize;
            match array.elem.as_str() {
                "f32" => (0..n / 4).flat_map(|i| ((i * 7919 % 1000) as f32 / 1000.0).to_le_bytes()).collect(),
                _ => vec![0; n],
            }
        })
        .collect();
    let refs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
    // Some runs warm up and are not counted.
    for _ in 0..3 {
        session.run_arrays(&refs)?;
    }
    session.clear_profile();
    let mut times = vec![];
    for _ in 0..repeat {
        let start = Instant::now();
        session.run_arrays(&refs)?;
        times.push(start.elapsed().as_secs_f64());
    }
    let mut sorted = times.clone();
    sorted.sort_by(f64::total_cmp);
    let median = sorted[sorted.len() / 2];
    let (report, _) = subject::report(path, manifest)?;
    let work = work(&report);
    let launches = manifest.programs.first().map_or(&[][..], |p| &p.launches[..]);
    let macs: u64 = launches.iter().filter_map(|l| work.get(&l.symbol)).sum();
    let rate = macs as f64 / median / 1e9;
    let rows = session.profile();
    if json {
        let rows: Vec<Value> = rows.iter().map(|r| row_json(r, repeat, &work)).collect();
        return output::json(&json!({
            "ms": median * 1e3, "least_ms": sorted[0] * 1e3, "macs": macs, "gmac_per_s": rate,
            "weight_bytes": manifest.weight_bytes, "arena_bytes": manifest.arena_bytes,
            "peak_rss_bytes": stats::peak_rss_bytes(), "threads": session.threads(), "runs": times, "profile": rows,
        }));
    }
    output::line(&format!("a call     {:.3} ms (least {:.3})", median * 1e3, sorted[0] * 1e3))?;
    if macs > 0 {
        let millions = macs as f64 / 1e6;
        output::line(&format!(
            "products   {millions:.1} million multiply-adds, {rate:.1} GMAC/s over all of the call"
        ))?;
    }
    output::line(&format!("memory     {} of values", output::bytes(manifest.arena_bytes)))?;
    let mut rows = rows;
    rows.sort_by_key(|r| std::cmp::Reverse(r.nanos));
    let cells: Vec<Vec<String>> = rows
        .iter()
        .take(24)
        .map(|r| {
            let micros = r.nanos as f64 / 1e3 / repeat as f64;
            let rate =
                work.get(&r.symbol).map_or(String::new(), |&m| format!("{:.1}", m as f64 / micros / 1e3));
            vec![r.name.clone(), format!("{micros:.1}"), rate, r.symbol.clone()]
        })
        .collect();
    if cells.is_empty() {
        return Ok(());
    }
    output::piece(&output::table(&["launch", "us", "GMAC/s", "kernel"], &cells))
}

fn row_json(row: &ProfileRow, repeat: usize, work: &BTreeMap<String, u64>) -> Value {
    json!({
        "launch": row.name, "kernel": row.symbol, "us": row.nanos as f64 / 1e3 / repeat as f64,
        "macs": work.get(&row.symbol),
    })
}

/// Multiply-adds of a call of each kernel that is about them.
fn work(report: &Value) -> BTreeMap<String, u64> {
    let kernels = report["kernels"].as_array().into_iter().flatten();
    let one = |k: &Value| Some((k["symbol"].as_str()?.to_string(), k["work"]["macs"].as_u64()?));
    kernels.filter_map(one).collect()
}
