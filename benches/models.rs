//! Speed of whole models: prefill and decode per preset, beside llama.cpp on the same machine when it is there.
//!
//! ```text
//! cargo bench --bench models -- [--model DIR] [--presets a,b] [--threads N] [--rounds N]
//!     [--prompt-tokens N] [--gen-tokens N] [--llama-bench PATH --gguf FILE]... [--out FILE.md]
//! ```
//!
//! Contestants take turns, round after round, each in a process of its own; the table shows medians and ratios to the
//! first llama.cpp row. Absolute figures mean nothing beside other jobs: run it on a quiet machine. Without `--model` the
//! bundled model is used, with `QUANTC_MODELS` set also every model folder in it that has a safetensors file.

use serde_json::Value;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

struct Options {
    models: Vec<PathBuf>,
    presets: Vec<String>,
    threads: usize,
    rounds: usize,
    prompt: usize,
    generated: usize,
    llama_bench: Option<PathBuf>,
    ggufs: Vec<PathBuf>,
    out: Option<PathBuf>,
    store: Option<PathBuf>,
}

fn options() -> Result<Options, String> {
    let mut o = Options {
        models: vec![],
        presets: ["f32", "bf16", "w8a8", "w8a16", "w4a16-g128", "w4a8-g128", "w4a8-g32", "fp8"]
            .map(String::from)
            .to_vec(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        rounds: 5,
        prompt: 256,
        generated: 64,
        llama_bench: None,
        ggufs: vec![],
        out: None,
        store: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        // What cargo itself passes to benches.
        if flag == "--bench" {
            continue;
        }
        let value = args.next().ok_or_else(|| format!("`{flag}` needs a value"))?;
        let number = || value.parse::<usize>().map_err(|_| format!("`{flag} {value}` is not a number"));
        match flag.as_str() {
            "--model" => o.models.push(value.clone().into()),
            "--presets" => o.presets = value.split(',').map(String::from).collect(),
            "--threads" => o.threads = number()?,
            "--rounds" => o.rounds = number()?.max(1),
            "--prompt-tokens" => o.prompt = number()?,
            "--gen-tokens" => o.generated = number()?,
            "--llama-bench" => o.llama_bench = Some(value.clone().into()),
            "--gguf" => o.ggufs.push(value.clone().into()),
            "--out" => o.out = Some(value.clone().into()),
            "--store" => o.store = Some(value.clone().into()),
            _ => return Err(format!("unknown flag `{flag}`")),
        }
    }
    if o.models.is_empty() {
        o.models.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/tales-3M"));
        match std::env::var_os("QUANTC_MODELS") {
            None => eprintln!("skipped: QUANTC_MODELS not set, only the bundled model is measured"),
            Some(dir) => {
                let entries = std::fs::read_dir(&dir).map_err(|e| format!("QUANTC_MODELS: {e}"))?;
                let mut found: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
                found.retain(|p| {
                    p.join("model.safetensors").is_file() && p.join("generation_config.json").is_file()
                });
                found.sort();
                o.models.extend(found);
            }
        }
    }
    Ok(o)
}

/// One row of the table.
struct Row {
    name: String,
    weights: f64,
    prefill: Vec<f64>,
    decode: Vec<f64>,
    rss: Vec<f64>,
}

fn quantc(args: &[&str]) -> Result<Value, String> {
    let out = Command::new(env!("CARGO_BIN_EXE_quantc")).args(args).output().map_err(|e| e.to_string())?;
    if !out.status.success() {
        return Err(format!("quantc {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr)));
    }
    serde_json::from_slice(&out.stdout).map_err(|e| format!("quantc {}: {e}", args.join(" ")))
}

fn number(v: &Value, key: &str) -> f64 {
    v[key].as_f64().unwrap_or(f64::NAN)
}

fn main() -> std::process::ExitCode {
    match options().and_then(|o| run(&o)) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            std::process::ExitCode::from(1)
        }
    }
}

fn run(o: &Options) -> Result<(), String> {
    let mut text = format!("{}\n\n{} threads, {} rounds in turn, medians.\n", machine(), o.threads, o.rounds);
    for model in &o.models {
        text += &measure(o, model)?;
    }
    println!("{text}");
    match &o.out {
        Some(path) => std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display())),
        None => Ok(()),
    }
}

/// The CPU's name and the date.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |key: &str| {
        let line = info.lines().find(|l| l.starts_with(key));
        line.and_then(|l| l.split(':').nth(1)).map_or("?", str::trim).to_string()
    };
    let date = Command::new("date").arg("+%Y-%m-%d").output();
    let date = date.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_string()).unwrap_or_default();
    format!(
        "# Models on {}, family {} model {}, {date}",
        field("model name"),
        field("cpu family"),
        field("model\t")
    )
}

fn measure(o: &Options, model: &Path) -> Result<String, String> {
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let store = o.store.clone().unwrap_or_else(|| folder.path().join("store"));
    let name = model.file_name().unwrap_or_default().to_string_lossy().to_string();
    let path = |p: &Path| p.to_string_lossy().to_string();
    let mut rows: Vec<Row> = vec![];
    for preset in &o.presets {
        let out = folder.path().join(preset);
        let args =
            ["compile", &path(model), "--target", "host", "--preset", preset, "--agreement", "0", "--json"];
        quantc(&[&args[..], &["-o", &path(&out), "--store", &path(&store)]].concat())?;
        rows.push(Row { name: preset.clone(), weights: 0.0, prefill: vec![], decode: vec![], rss: vec![] });
    }
    let mut peers: Vec<Row> = vec![];
    for gguf in &o.ggufs {
        let name = format!("llama.cpp {}", gguf.file_stem().unwrap_or_default().to_string_lossy());
        peers.push(Row { name, weights: 0.0, prefill: vec![], decode: vec![], rss: vec![] });
    }
    let (threads, prompt, generated) = (o.threads.to_string(), o.prompt.to_string(), o.generated.to_string());
    for _ in 0..o.rounds {
        for row in &mut rows {
            let engine = path(&folder.path().join(&row.name));
            let sizes = ["--prompt-tokens", &prompt, "--gen-tokens", &generated, "--threads", &threads];
            let v = quantc(&[&["bench", &engine, "--repeat", "1", "--json"], &sizes[..]].concat())?;
            row.weights = number(&v, "decode_bytes_per_token");
            row.prefill.push(number(&v, "prefill_tok_s"));
            row.decode.push(number(&v, "decode_tok_s"));
            row.rss.push(number(&v, "peak_rss_bytes"));
        }
        for (row, gguf) in peers.iter_mut().zip(&o.ggufs) {
            let tool = o.llama_bench.as_ref().ok_or("`--gguf` needs `--llama-bench`")?;
            let args =
                ["-m", &path(gguf), "-p", &prompt, "-n", &generated, "-r", "1", "-t", &threads, "-o", "json"];
            let out =
                Command::new(tool).args(args).output().map_err(|e| format!("{}: {e}", tool.display()))?;
            let v: Value =
                serde_json::from_slice(&out.stdout).map_err(|e| format!("{}: {e}", tool.display()))?;
            for test in v.as_array().into_iter().flatten() {
                let rate = number(test, "avg_ts");
                row.weights = number(test, "model_size");
                if number(test, "n_gen") > 0.0 { row.decode.push(rate) } else { row.prefill.push(rate) }
            }
        }
    }
    let base = peers.first().map(|r| (median(&r.prefill), median(&r.decode)));
    let mut text = format!("\n## {name}: {prompt} tokens in, {generated} out\n\n");
    text += "| engine | MB read a token | prefill tok/s | decode tok/s | decode GB/s | peak RSS MB |";
    text += if base.is_some() { " prefill ratio | decode ratio |\n" } else { "\n" };
    text +=
        if base.is_some() { "|---|--:|--:|--:|--:|--:|--:|--:|\n" } else { "|---|--:|--:|--:|--:|--:|\n" };
    for row in rows.iter().chain(&peers) {
        let (prefill, decode) = (median(&row.prefill), median(&row.decode));
        let rss = if row.rss.is_empty() { "-".into() } else { format!("{:.0}", median(&row.rss) / 1e6) };
        let _ = write!(
            text,
            "| {} | {:.1} | {prefill:.1} | {decode:.1} | {:.1} | {rss} |",
            row.name,
            row.weights / 1e6,
            row.weights * decode / 1e9
        );
        match base {
            Some(b) => {
                let _ = writeln!(text, " {:.2} | {:.2} |", prefill / b.0, decode / b.1);
            }
            None => text += "\n",
        }
    }
    Ok(text)
}

fn median(xs: &[f64]) -> f64 {
    let mut xs = xs.to_vec();
    xs.sort_by(f64::total_cmp);
    match xs.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => xs[n / 2],
        n => (xs[n / 2 - 1] + xs[n / 2]) / 2.0,
    }
}
