//! Speed of whole models: prefill and decode per preset, beside other engines on the same machine when they are there.
//!
//! ```text
//! cargo bench --bench models -- [--model DIR] [--presets a,b] [--engine NAME=DIR]... [--threads N] [--rounds N]
//!     [--prompt-tokens N] [--gen-tokens N] [--batch 1,8] [--decode-at N] [--store DIR] [--peers FOLDER]
//!     [--llama-bench PATH --gguf FILE]... [--out FILE.md]
//! ```
//!
//! Contestants take turns, round after round, each in a process of its own; the table shows medians. Absolute figures
//! mean nothing beside other jobs: run it on a quiet machine. Without `--model` the bundled model is used, with
//! `QUANTC_MODELS` set also every model folder in it that has a safetensors file.
//!
//! `--peers FOLDER` runs what it finds there for a model called M, and says what it does not find:
//!
//! - `build-llama/bin/llama-bench` with every `models/M-*.gguf` (llama.cpp);
//! - `vov/bin/python bench_openvino.py genai` with every `ov/M-*` (OpenVINO GenAI);
//! - `vort/bin/python bench_ort.py model` with every `ort/M-*` (ONNX Runtime GenAI);
//! - `quiet.sh COMMAND...`, which every contestant is then started through.
//!
//! Ratios are to the fastest peer whose weights have as many bits: up to 6, up to 10, or more. `--batch` and
//! `--decode-at` add rows of quantc's engines only: sequences side by side, and decoding after a long prompt.

use serde_json::Value;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

struct Options {
    models: Vec<PathBuf>,
    presets: Vec<String>,
    engines: Vec<(String, PathBuf)>,
    threads: usize,
    rounds: usize,
    prompt: usize,
    generated: usize,
    batches: Vec<usize>,
    decode_at: Option<usize>,
    peers: Option<PathBuf>,
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
        engines: vec![],
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        rounds: 5,
        prompt: 256,
        generated: 64,
        batches: vec![],
        decode_at: None,
        peers: None,
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
        let parse = |s: &str| s.parse::<usize>().map_err(|_| format!("`{flag} {value}` is not a number"));
        let number = || parse(&value);
        match flag.as_str() {
            "--model" => o.models.push(value.clone().into()),
            "--presets" => o.presets = value.split(',').filter(|s| !s.is_empty()).map(String::from).collect(),
            "--engine" => {
                let (name, path) = value.split_once('=').ok_or("`--engine` takes NAME=DIR")?;
                o.engines.push((name.into(), path.into()));
            }
            "--threads" => o.threads = number()?,
            "--rounds" => o.rounds = number()?.max(1),
            "--prompt-tokens" => o.prompt = number()?,
            "--gen-tokens" => o.generated = number()?,
            "--batch" => o.batches = value.split(',').map(parse).collect::<Result<_, _>>()?,
            "--decode-at" => o.decode_at = Some(number()?),
            "--peers" => o.peers = Some(value.clone().into()),
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

/// Who runs in a row of the table.
enum Engine {
    Quantc {
        folder: PathBuf,
    },
    /// llama.cpp's `llama-bench` and a model file.
    Llama {
        tool: PathBuf,
        gguf: PathBuf,
    },
    /// A Python of an environment, a script with its first argument, and a model folder.
    Script {
        python: PathBuf,
        script: PathBuf,
        what: &'static str,
        folder: PathBuf,
    },
}

/// One row of the table.
struct Row {
    name: String,
    engine: Engine,
    /// Sequences side by side, tokens of the prompt, and tokens generated.
    batch: usize,
    prompt: usize,
    generated: usize,
    weights: f64,
    prefill: Vec<f64>,
    decode: Vec<f64>,
    rss: Vec<f64>,
}

impl Row {
    fn new(o: &Options, name: String, engine: Engine) -> Row {
        Row {
            name,
            engine,
            batch: 1,
            prompt: o.prompt,
            generated: o.generated,
            weights: f64::NAN,
            prefill: vec![],
            decode: vec![],
            rss: vec![],
        }
    }

    fn is_peer(&self) -> bool {
        !matches!(self.engine, Engine::Quantc { .. })
    }

    /// Runs the engine once.
    fn run(&mut self, o: &Options) -> Result<(), String> {
        let numbers = [self.prompt, self.generated, o.threads].map(|n| n.to_string());
        let [prompt, generated, threads] = &numbers;
        match &self.engine {
            Engine::Quantc { folder } => {
                let batch = self.batch.to_string();
                let mut command = o.command(Path::new(env!("CARGO_BIN_EXE_quantc")));
                command.arg("bench").arg(folder).args(["--repeat", "1", "--json", "--batch", &batch]);
                command.args(["--prompt-tokens", prompt, "--gen-tokens", generated, "--threads", threads]);
                let v = json(command)?;
                self.weights = number(&v, "decode_bytes_per_token");
                self.prefill.push(number(&v, "prefill_tok_s"));
                self.decode.push(number(&v, "decode_tok_s"));
                self.rss.push(number(&v, "peak_rss_bytes"));
            }
            Engine::Llama { tool, gguf } => {
                // It decodes from an empty context unless told how deep it is to begin.
                for sizes in
                    [["-p", prompt, "-n", "0", "-d", "0"], ["-p", "0", "-n", generated, "-d", prompt]]
                {
                    let mut command = o.command(tool);
                    command.arg("-m").arg(gguf).args(sizes).args(["-r", "1", "-t", threads, "-o", "json"]);
                    let v = json(command)?;
                    let test = v.get(0).unwrap_or(&Value::Null);
                    self.weights = number(test, "model_size");
                    let rate = number(test, "avg_ts");
                    if number(test, "n_gen") > 0.0 { self.decode.push(rate) } else { self.prefill.push(rate) }
                }
            }
            Engine::Script { python, script, what, folder } => {
                let mut command = o.command(python);
                command.env("HF_HUB_OFFLINE", "1").arg(script).arg(what).arg(folder);
                command.args(["--threads", threads, "--prompt", prompt, "--gen", generated, "--reps", "1"]);
                let text = output(command)?;
                let mega = |name| figure(&text, name).map(|x| x * 1e6);
                let rate = |name: String| {
                    figure(&text, &name).ok_or_else(|| format!("{name} is missing in: {text}"))
                };
                self.prefill.push(rate(format!("pp{prompt}="))?);
                self.decode.push(rate(format!("tg{generated}="))?);
                self.weights = mega("bin=").or(mega("file=")).unwrap_or(f64::NAN);
                self.rss.extend(mega("peakRSS="));
            }
        }
        Ok(())
    }

    /// Bits of a weight, of `parameters` that every token reads, and the class they belong to.
    fn bits(&self, parameters: f64) -> (f64, usize) {
        let bits = self.weights * 8.0 / parameters;
        (bits, if bits <= 6.0 { 0 } else { 1 + usize::from(bits > 10.0) })
    }
}

impl Options {
    /// A command for `program`, through the quiet script when there is one.
    fn command(&self, program: &Path) -> Command {
        match self.peers.as_ref().map(|p| p.join("quiet.sh")).filter(|p| p.is_file()) {
            Some(quiet) => {
                let mut command = Command::new(quiet);
                command.arg(program);
                command
            }
            None => Command::new(program),
        }
    }
}

/// What a command prints.
fn output(mut command: Command) -> Result<String, String> {
    let name = format!("{command:?}");
    let out = command.output().map_err(|e| format!("{name}: {e}"))?;
    if !out.status.success() {
        return Err(format!("{name}: {}", String::from_utf8_lossy(&out.stderr)));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn json(command: Command) -> Result<Value, String> {
    let name = format!("{command:?}");
    serde_json::from_str(&output(command)?).map_err(|e| format!("{name}: {e}"))
}

fn number(v: &Value, key: &str) -> f64 {
    v[key].as_f64().unwrap_or(f64::NAN)
}

/// The number that follows `name` in a text.
fn figure(text: &str, name: &str) -> Option<f64> {
    let at = text.split_whitespace().find_map(|word| word.strip_prefix(name))?;
    at.parse().ok()
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

/// The processor's name and the date.
fn machine() -> String {
    let date = Command::new("date").arg("+%Y-%m-%d").output();
    let date = date.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_string()).unwrap_or_default();
    format!("# Models on {}, {date}", quantc::measure::processor())
}

/// The files or folders of `folder` whose names begin with `model-`, with what follows, in order.
fn named(folder: &Path, model: &str, ending: &str) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<(String, PathBuf)> = entries
        .filter_map(|e| {
            let name = e.file_name().to_string_lossy().to_string();
            let rest = name.strip_prefix(model)?.strip_prefix('-')?.strip_suffix(ending)?.to_string();
            Some((rest, e.path()))
        })
        .collect();
    found.sort();
    found
}

/// The peers that are there for `model`, and a line about each that is not.
fn peers(o: &Options, model: &str) -> (Vec<Row>, Vec<String>) {
    let (mut rows, mut absent) = (vec![], vec![]);
    for gguf in &o.ggufs {
        let name = format!("llama.cpp {}", gguf.file_stem().unwrap_or_default().to_string_lossy());
        let tool = o.llama_bench.clone().unwrap_or_else(|| "llama-bench".into());
        rows.push(Row::new(o, name, Engine::Llama { tool, gguf: gguf.clone() }));
    }
    let Some(folder) = &o.peers else { return (rows, absent) };
    let mut add = |peer: &str,
                   tool: PathBuf,
                   found: Vec<(String, PathBuf)>,
                   engine: &dyn Fn(PathBuf) -> Engine| {
        if !tool.is_file() || found.is_empty() {
            let what =
                if tool.is_file() { format!("models called {model}-*") } else { tool.display().to_string() };
            absent.push(format!("{peer} is not measured: there is no {what}"));
            return;
        }
        rows.extend(
            found.into_iter().map(|(kind, path)| Row::new(o, format!("{peer} {kind}"), engine(path))),
        );
    };
    let llama = folder.join("build-llama/bin/llama-bench");
    let tool = llama.clone();
    add("llama.cpp", llama, named(&folder.join("models"), model, ".gguf"), &|gguf| Engine::Llama {
        tool: tool.clone(),
        gguf,
    });
    for (peer, python, script, what, models) in [
        ("OpenVINO", "vov/bin/python", "bench_openvino.py", "genai", "ov"),
        ("ONNX Runtime", "vort/bin/python", "bench_ort.py", "model", "ort"),
    ] {
        let (python, script) = (folder.join(python), folder.join(script));
        add(peer, python.clone(), named(&folder.join(models), model, ""), &|folder| Engine::Script {
            python: python.clone(),
            script: script.clone(),
            what,
            folder,
        });
    }
    (rows, absent)
}

/// The versions of what runs in `rows`.
fn versions(rows: &[Row]) -> Vec<String> {
    let mut found = vec![format!("quantc {}", env!("CARGO_PKG_VERSION"))];
    for row in rows {
        let version = match &row.engine {
            Engine::Quantc { .. } => continue,
            Engine::Llama { tool, gguf } => {
                let mut command = Command::new(tool);
                command.arg("-m").arg(gguf).args(["-p", "1", "-n", "0", "-r", "1", "-o", "json"]);
                let v = json(command).unwrap_or_default();
                format!("llama.cpp {}", v[0]["build_commit"].as_str().unwrap_or("?"))
            }
            Engine::Script { python, what, .. } => {
                let package = if *what == "genai" { "openvino-genai" } else { "onnxruntime-genai" };
                let mut command = Command::new(python);
                command
                    .arg("-c")
                    .arg(format!("import importlib.metadata as m; print(m.version('{package}'))"));
                format!("{package} {}", output(command).unwrap_or_else(|_| "?".into()).trim())
            }
        };
        if !found.contains(&version) {
            found.push(version);
        }
    }
    found
}

/// Parameters that every token reads: all but a table of embeddings that only gives rows.
fn parameters(model: &Path) -> Result<f64, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantc"));
    command.arg("inspect").arg(model).arg("--json");
    let v = json(command)?;
    let mut sum = 0.0;
    for weight in v["weights"].as_array().into_iter().flatten() {
        let ty = weight["type"].as_str().unwrap_or_default();
        let dims = ty.strip_prefix("tensor<").unwrap_or_default().split('x');
        let count: f64 = dims.map_while(|d| d.parse::<f64>().ok()).product();
        if weight["name"] != "embed" {
            sum += count;
        }
    }
    Ok(sum)
}

fn measure(o: &Options, model: &Path) -> Result<String, String> {
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let store = o.store.clone().unwrap_or_else(|| folder.path().join("store"));
    let name = model.file_name().unwrap_or_default().to_string_lossy().to_string();
    let mut rows: Vec<Row> = vec![];
    for preset in &o.presets {
        let out = folder.path().join(preset);
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantc"));
        command.arg("compile").arg(model).args([
            "--target",
            "host",
            "--preset",
            preset,
            "--agreement",
            "0",
            "--json",
        ]);
        json({
            command.arg("-o").arg(&out).arg("--store").arg(&store);
            command
        })?;
        rows.push(Row::new(o, preset.clone(), Engine::Quantc { folder: out }));
    }
    for (name, folder) in &o.engines {
        rows.push(Row::new(o, name.clone(), Engine::Quantc { folder: folder.clone() }));
    }
    // More sequences and longer contexts are about the same engines.
    let ours: Vec<(String, PathBuf)> = rows
        .iter()
        .filter_map(|r| match &r.engine {
            Engine::Quantc { folder } => Some((r.name.clone(), folder.clone())),
            _ => None,
        })
        .collect();
    let (others, absent) = peers(o, &name);
    rows.extend(others);
    let main_rows = rows.len();
    for (name, folder) in &ours {
        for &batch in &o.batches {
            rows.push(Row { batch, ..Row::new(o, name.clone(), Engine::Quantc { folder: folder.clone() }) });
        }
        if let Some(prompt) = o.decode_at {
            rows.push(Row { prompt, ..Row::new(o, name.clone(), Engine::Quantc { folder: folder.clone() }) });
        }
    }
    for round in 1..=o.rounds {
        for row in &mut rows {
            row.run(o)?;
            eprintln!("round {round}: {}", row.name);
        }
    }
    let (rows, more) = rows.split_at(main_rows);
    let mut text = format!("\n## {name}: {} tokens in, {} out\n\n", o.prompt, o.generated);
    let _ = writeln!(text, "{}.\n", versions(rows).join(", "));
    text += &table(rows, parameters(model)?);
    if !more.is_empty() {
        text += "\n| engine | sequences | tokens in | prefill tok/s | decode tok/s | peak RSS MB |\n|---|--:|--:|--:|--:|--:|\n";
        for row in more {
            let (prefill, decode, rss) = (median(&row.prefill), median(&row.decode), median(&row.rss) / 1e6);
            let _ = writeln!(
                text,
                "| {} | {} | {} | {prefill:.1} | {decode:.1} | {rss:.0} |",
                row.name, row.batch, row.prompt
            );
        }
    }
    for line in absent {
        let _ = write!(text, "\n{line}.\n");
    }
    Ok(text)
}

/// The table of prefill and decode; with ratios when there are peers.
fn table(rows: &[Row], parameters: f64) -> String {
    let median_of = |row: &Row| [median(&row.prefill), median(&row.decode)];
    // The fastest peer of each class of bits, for prefill and for decode.
    let mut best = [[f64::NAN; 2]; 3];
    for row in rows.iter().filter(|r| r.is_peer()) {
        for (best, speed) in best[row.bits(parameters).1].iter_mut().zip(median_of(row)) {
            *best = best.max(speed);
        }
    }
    let ratios = rows.iter().any(Row::is_peer);
    let mut text = String::from(
        "| engine | bits/weight | MB read a token | prefill tok/s | decode tok/s | decode GB/s | peak RSS MB |",
    );
    text += if ratios { " prefill ratio | decode ratio |\n" } else { "\n" };
    text += "|---|--:|--:|--:|--:|--:|--:|";
    text += if ratios { "--:|--:|\n" } else { "\n" };
    for row in rows {
        let [prefill, decode] = median_of(row);
        let (bits, class) = row.bits(parameters);
        let rss = if row.rss.is_empty() { "-".into() } else { format!("{:.0}", median(&row.rss) / 1e6) };
        let _ = write!(
            text,
            "| {} | {bits:.2} | {:.1} | {prefill:.1} | {decode:.1} | {:.1} | {rss} |",
            row.name,
            row.weights / 1e6,
            row.weights * decode / 1e9
        );
        let ratio = |speed: f64, best: f64| match (speed / best).is_finite() {
            true => format!("{:.2}", speed / best),
            false => "-".into(),
        };
        if ratios {
            let [p, d] = best[class];
            let _ = write!(text, " {} | {} |", ratio(prefill, p), ratio(decode, d));
        }
        text += "\n";
    }
    text
}

fn median(figures: &[f64]) -> f64 {
    quantc::measure::median(figures)
}
