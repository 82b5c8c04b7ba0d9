//! Engines of the bundled model, for the GPU and for processors: both give the same perplexity, nearly.

use crate::kernel::Packed;
use crate::parts::{Part, Verdict};
use crate::report::{Table, WRONG};
use quantc::ir::diag::{Diag, Result};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// How far perplexities may lie apart, relatively.
const APART: f64 = 1e-3;

/// Compares the engines `NAME.gpu` with those called `NAME.cpu` in the folder.
pub fn run(part: &Part<'_>, _: &Packed) -> Result<Verdict> {
    let listed = std::fs::read_dir(part.folder).map_err(|e| crate::system(part.folder, &e))?;
    let mut names: Vec<String> = listed
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_suffix(".gpu").map(str::to_owned))
        .collect();
    names.sort();
    if names.is_empty() {
        println!("## Engines\n\nThere are no engines in the folder.\n");
        return Ok(Verdict::Right);
    }
    let note = format!("Perplexities may lie {} % apart.", APART * 100.0);
    let columns = ["engine", "perplexity on the GPU", "on a processor", "apart", ""];
    let mut table = Table::new(part, "Engines", &note, &columns);
    for (i, name) in names.iter().enumerate() {
        table.each(i, |say| {
            let of = |kind: &str| perplexity(part.folder, &format!("{name}.{kind}"), part.until);
            let (gpu, cpu) = (of("gpu")?, of("cpu")?);
            let apart = gpu / cpu - 1.0;
            let said = if apart.abs() <= APART { "right" } else { WRONG };
            say(vec![
                name.clone(),
                format!("{gpu:.4}"),
                format!("{cpu:.4}"),
                format!("{:.3} %", apart * 100.0),
                said.into(),
            ]);
            Ok(())
        })?;
    }
    Ok(table.finish())
}

fn perplexity(folder: &Path, engine: &str, until: Instant) -> Result<f64> {
    let at = folder.join("quantc");
    let mut command = Command::new(&at);
    command.arg("eval").arg(folder.join(engine)).arg("--text").arg(folder.join("tales_eval.txt"));
    command.args(["--max-tokens", "8176", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| crate::system(&at, &e))?;
    // What it prints is short, so it never waits for a reader.
    while child.try_wait().map_err(|e| crate::system(&at, &e))?.is_none() {
        if Instant::now() >= until {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Diag::system(format!("`quantc eval {engine}` took too long")));
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let out = child.wait_with_output().map_err(|e| crate::system(&at, &e))?;
    let text = String::from_utf8_lossy(&out.stdout);
    let value: serde_json::Value = serde_json::from_str(&text)
        .map_err(|_| Diag::system(format!("{engine}: {}", String::from_utf8_lossy(&out.stderr).trim())))?;
    value["perplexity"].as_f64().ok_or_else(|| Diag::bug("`quantc eval` gives no perplexity"))
}
