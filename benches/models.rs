//! Speed of whole models: prefill and decode per preset, beside other engines on the same machine when they are there.
//!
//! ```text
//! cargo bench --bench models -- [--model DIR] [--presets a,b] [--engine NAME=DIR]... [--threads N] [--rounds N]
//!     [--prompt-tokens N] [--gen-tokens N] [--batch 1,8] [--decode-at N] [--store DIR] [--peers FOLDER]
//!     [--llama-bench PATH --gguf FILE]... [--keep FILE.json] [--out FILE.md]
//! ```
//!
//! Contestants take turns, round after round, each in a process of its own; the table shows medians. Absolute figures
//! mean nothing beside other jobs: run it on a quiet machine. Where strangers share the memory's bandwidth, one
//! contestant may meet half of what the next one gets, so plain reads of memory are timed before and behind every
//! contestant, and a figure counts only when both were within an eighth of the fastest reads of the whole run. Rounds
//! go on for those that were unlucky, up to four times as many; the table tells how many figures count. With `--keep`
//! figures are kept in a file from run to run, and a run ends as soon as memory is slow: start it again, and again, until
//! it says that nothing is left to measure. Without `--model` the bundled model is used, with
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

use quantc::measure::Stream;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
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
    keep: Option<PathBuf>,
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
        keep: None,
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
            "--keep" => o.keep = Some(value.clone().into()),
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
    figures: Vec<Figures>,
}

/// What one run of an engine gave.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Figures {
    /// Tokens a second.
    prefill: f64,
    decode: f64,
    /// Bytes, where the engine tells.
    rss: Option<f64>,
    /// Bytes a second that plain reads of memory gave: the slower one of before and behind.
    stream: f64,
}

/// The share of the fastest reads of memory that reads around a run must reach for the run to count.
const STEADY: f64 = 0.875;

impl Row {
    fn new(o: &Options, name: String, engine: Engine) -> Row {
        Row {
            name,
            engine,
            batch: 1,
            prompt: o.prompt,
            generated: o.generated,
            weights: f64::NAN,
            figures: vec![],
        }
    }

    /// What tells this row from others in a file of kept figures.
    fn key(&self, o: &Options, model: &str) -> String {
        let Row { name, batch, prompt, generated, .. } = self;
        format!("{model}, {name}, {batch} x {prompt} + {generated} tokens, {} threads", o.threads)
    }

    fn is_peer(&self) -> bool {
        !matches!(self.engine, Engine::Quantc { .. })
    }

    /// Whether the run counts when the fastest reads of memory gave `best` bytes a second.
    fn steady(best: f64) -> impl Fn(&&Figures) -> bool {
        move |f| f.stream >= STEADY * best
    }

    /// The medians of the runs that count, and how many those are. Where none counts, of all.
    fn medians(&self, best: f64) -> (Figures, usize) {
        let mut counted: Vec<Figures> = self.figures.iter().filter(Row::steady(best)).copied().collect();
        let n = counted.len();
        if n == 0 {
            counted = self.figures.clone();
        }
        let of = |figure: fn(&Figures) -> f64| median(&counted.iter().map(figure).collect::<Vec<f64>>());
        let (prefill, decode) = (of(|f| f.prefill), of(|f| f.decode));
        let rss: Vec<f64> = counted.iter().filter_map(|f| f.rss).collect();
        let rss = (!rss.is_empty()).then(|| median(&rss));
        (Figures { prefill, decode, rss, stream: of(|f| f.stream) }, n)
    }

    /// Runs the engine once, between a reading of memory that was taken and another one.
    fn run(&mut self, o: &Options, before: f64, stream: &Stream) -> Result<(), String> {
        let figures = self.once(o)?;
        self.figures.push(Figures { stream: before.min(stream.rate()), ..figures });
        Ok(())
    }

    fn once(&mut self, o: &Options) -> Result<Figures, String> {
        let mut found = Figures { prefill: f64::NAN, decode: f64::NAN, rss: None, stream: f64::NAN };
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
                found.prefill = number(&v, "prefill_tok_s");
                found.decode = number(&v, "decode_tok_s");
                found.rss = v["peak_rss_bytes"].as_f64();
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
                    *if number(test, "n_gen") > 0.0 { &mut found.decode } else { &mut found.prefill } = rate;
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
                found.prefill = rate(format!("pp{prompt}="))?;
                found.decode = rate(format!("tg{generated}="))?;
                self.weights = mega("bin=").or(mega("file=")).unwrap_or(f64::NAN);
                found.rss = mega("peakRSS=");
            }
        }
        Ok(found)
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

/// Lets `rows` take turns, and gives the fastest reads of memory seen.
fn rounds(o: &Options, model: &str, rows: &mut [Row]) -> Result<f64, String> {
    let host = quantc_codegen::targets::lookup("host").map_err(|e| e.to_string())?;
    let stream = Stream::new(host, o.threads).map_err(|e| e.to_string())?;
    let mut kept = match &o.keep {
        Some(path) => Kept::read(path)?,
        None => Kept::default(),
    };
    for row in &mut *rows {
        if let Some((weights, figures)) = kept.rows.get(&row.key(o, model)) {
            (row.weights, row.figures) = (*weights, figures.clone());
        }
    }
    let wanting = |row: &Row, best| row.figures.iter().filter(Row::steady(best)).count() < o.rounds;
    for round in 1..=4 * o.rounds {
        for row in &mut *rows {
            if !wanting(row, kept.best) {
                continue;
            }
            let before = stream.rate();
            kept.best = before.max(kept.best);
            if o.keep.is_some() && before < STEADY * kept.best {
                return Err(format!("memory is slow now, {:.1} GB/s: go on later", before / 1e9));
            }
            row.run(o, before, &stream)?;
            if let Some(last) = row.figures.last() {
                let (decode, rate) = (last.decode, last.stream / 1e9);
                eprintln!("round {round}: {}: {decode:.1} tokens/s, memory {rate:.1} GB/s", row.name);
            }
            if let Some(path) = &o.keep {
                kept.rows.insert(row.key(o, model), (row.weights, row.figures.clone()));
                kept.write(path)?;
            }
        }
        if !rows.iter().any(|row| wanting(row, kept.best)) {
            break;
        }
    }
    Ok(kept.best)
}

/// Figures of earlier runs.
#[derive(Default, Serialize, Deserialize)]
struct Kept {
    /// The fastest reads of memory, in bytes a second.
    best: f64,
    /// Bytes of weights, and the figures, of rows by their keys.
    rows: BTreeMap<String, (f64, Vec<Figures>)>,
}

impl Kept {
    /// What `path` holds; nothing when it is not there.
    fn read(path: &Path) -> Result<Kept, String> {
        match std::fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| format!("{}: {e}", path.display())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Kept::default()),
            Err(e) => Err(format!("{}: {e}", path.display())),
        }
    }

    fn write(&self, path: &Path) -> Result<(), String> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| e.to_string())?;
        std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
    }
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
    let best = rounds(o, &name, &mut rows)?;
    let (rows, more) = rows.split_at(main_rows);
    let mut text = format!("\n## {name}: {} tokens in, {} out\n\n", o.prompt, o.generated);
    let _ = writeln!(text, "{}.\n", versions(rows).join(", "));
    let _ = writeln!(text, "Plain reads of memory: up to {:.1} GB/s.\n", best / 1e9);
    text += &table(rows, parameters(model)?, best);
    if !more.is_empty() {
        text += "\n| engine | sequences | tokens in | prefill tok/s | decode tok/s | peak RSS MB | runs |\n|---|--:|--:|--:|--:|--:|--:|\n";
        for row in more {
            let (Figures { prefill, decode, rss, .. }, runs) = row.medians(best);
            let _ = writeln!(
                text,
                "| {} | {} | {} | {prefill:.1} | {decode:.1} | {:.0} | {} |",
                row.name,
                row.batch,
                row.prompt,
                rss.unwrap_or(f64::NAN) / 1e6,
                counted(runs)
            );
        }
    }
    for line in absent {
        let _ = write!(text, "\n{line}.\n");
    }
    Ok(text)
}

/// How many runs count, as the tables tell it.
fn counted(runs: usize) -> String {
    if runs == 0 { "none steady".into() } else { runs.to_string() }
}

/// The table of prefill and decode; with ratios when there are peers.
fn table(rows: &[Row], parameters: f64, stream: f64) -> String {
    // The fastest peer of each class of bits, for prefill and for decode.
    let mut best = [[f64::NAN; 2]; 3];
    for row in rows.iter().filter(|r| r.is_peer()) {
        let (f, _) = row.medians(stream);
        for (best, speed) in best[row.bits(parameters).1].iter_mut().zip([f.prefill, f.decode]) {
            *best = best.max(speed);
        }
    }
    let ratios = rows.iter().any(Row::is_peer);
    let mut text = String::from(
        "| engine | bits/weight | MB read a token | prefill tok/s | decode tok/s | decode GB/s | of plain reads | peak RSS MB | runs |",
    );
    text += if ratios { " prefill ratio | decode ratio |\n" } else { "\n" };
    text += "|---|--:|--:|--:|--:|--:|--:|--:|--:|";
    text += if ratios { "--:|--:|\n" } else { "\n" };
    for row in rows {
        let (f, runs) = row.medians(stream);
        let (bits, class) = row.bits(parameters);
        let rss = f.rss.map_or("-".into(), |rss| format!("{:.0}", rss / 1e6));
        let rate = row.weights * f.decode;
        let _ = write!(
            text,
            "| {} | {bits:.2} | {:.1} | {:.1} | {:.1} | {:.1} | {:.0} % | {rss} | {} |",
            row.name,
            row.weights / 1e6,
            f.prefill,
            f.decode,
            rate / 1e9,
            100.0 * rate / f.stream,
            counted(runs)
        );
        let ratio = |speed: f64, best: f64| match (speed / best).is_finite() {
            true => format!("{:.2}", speed / best),
            false => "-".into(),
        };
        if ratios {
            let [p, d] = best[class];
            let _ = write!(text, " {} | {} |", ratio(f.prefill, p), ratio(f.decode, d));
        }
        text += "\n";
    }
    text
}

fn median(figures: &[f64]) -> f64 {
    quantc::measure::median(figures)
}
