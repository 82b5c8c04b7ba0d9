//! What quantization costs: every preset on every model and on its outlier twin, and the pipelines of plain
//! implementations beside their figures.
//!
//! ```text
//! cargo bench --bench quality -- [--models DIR] [--twins DIR] [--python PATH] [--presets a,b] [--only MODEL,..]
//!     [--max-tokens N] [--reference FILE] [--scales auto,f32] [--kv int8,fp8] [--store DIR] [--out FILE.md]
//! ```
//!
//! Models are the folders of `--models`, or of `QUANTC_MODELS`, with a config.json and safetensors; texts lie in its
//! folder `text`. Without either, the bundled model and its texts are measured. What holds:
//!
//! - Engines are compiled with a calibration text and scored on an evaluation text only, which must not be the same.
//! - An engine is compared with the engine that the preset `f32` makes of the same folder, on the same tokens: a twin
//!   with the float twin, which computes what its model does.
//! - A row that fails says why, and the others go on.
//!
//! Every row is kept in the store, under a digest of the tool, of the model, of its texts and of how it is compiled: what was measured
//! is not measured again, so that a run that was ended goes on where it was, models can be measured one at a time with
//! `--only`, and a run over all of them then puts their tables together.
//!
//! An outlier twin of M is `--twins DIR/M`; one that is not there is made by the models folder's `make_outliers.py`,
//! with `--python`, or with the `python3` of the path where that has NumPy and safetensors. `--reference FILE` reads
//! tables of what a textbook's methods cost on these models, and compiles the same methods.

#[path = "quality/inputs.rs"]
mod inputs;

use inputs::{Bits, Options, Reference, Textbook};
use quantc::passes::presets::{self, Preset};
use quantc_ir::weights::Digest;
use quantc_runtime::session::{Session, SessionOptions};
use quantc_runtime::{Engine, OpenOptions, sample};
use serde_json::Value;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Instant;

/// Models that are known to be measured when their folder is given.
const KNOWN: [&str; 4] = ["stories260K", "babyllama-char105", "gpt-nano-sort", "all-MiniLM-L6-v2"];

/// Lines of the evaluation text that an encoder embeds.
const SENTENCES: usize = 300;

/// Above this part of the textbook's divergence a result of `gptq` is marked.
const GOAL: f64 = 0.95;

fn main() -> ExitCode {
    match Options::parse(std::env::args().skip(1)).and_then(|o| run(&o)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::from(1)
        }
    }
}

/// What a model is measured by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Perplexity and divergence on a text.
    Decoder,
    /// Directions of vectors.
    Encoder,
    /// Divergence on letters, and how many rows of them it sorts.
    Sorter,
}

/// The pipeline with the strength 0.5 instead of those that `smoothquant` finds, of presets that search for them everywhere.
fn with_usual_strength(pipeline: &str) -> Option<String> {
    let (before, behind) = pipeline.split_once("smoothquant{alpha=search")?;
    let (options, _) = behind.split_once('}')?;
    // Places that are not worth it stay as they are, with whatever strength.
    (!options.contains("worth=")).then(|| format!("{before}smoothquant{{alpha=0.5{behind}"))
}

/// What decides the figures of a folder.
struct Place<'a> {
    /// The folder.
    model: &'a Path,
    /// A digest of the tool, of the folder's files and of the texts.
    digest: Digest,
}

/// One row of a model's table.
struct Way {
    label: String,
    /// How it is compiled.
    args: Vec<String>,
    /// Whether it is given the calibration text.
    data: bool,
}

/// A model with its texts.
struct Subject {
    name: String,
    folder: PathBuf,
    kind: Kind,
    calibration: PathBuf,
    evaluation: PathBuf,
    /// What the tables say about the texts.
    texts: String,
}

/// What was found of an engine.
struct Row {
    bits: Bits,
    megabytes: f64,
    figures: Figures,
}

enum Figures {
    Text { scores: Scores, sorted: Option<usize> },
    Vectors { mean: f64, least: f64 },
}

/// What `quantc eval` says of an engine against another.
struct Scores {
    perplexity: f64,
    base: f64,
    mean: f64,
    p99: f64,
    top1: f64,
    tokens: u64,
}

/// Where everything lies while the bench runs.
struct Bench<'a> {
    options: &'a Options,
    /// The folder of models, if there is one.
    models: Option<PathBuf>,
    /// Engines, texts and twins that are made.
    work: PathBuf,
    store: PathBuf,
    /// Folders as results name them.
    known: Vec<(String, &'static str)>,
    presets: Vec<&'static Preset>,
    /// A digest of the tool.
    tool: Digest,
}

fn run(o: &Options) -> Result<(), String> {
    let start = Instant::now();
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let models = o.models.clone().or_else(|| std::env::var_os("QUANTC_MODELS").map(PathBuf::from));
    let presets = match o.presets[..] {
        [] => presets::ALL.iter().collect(),
        ref names => {
            names.iter().map(|n| Preset::get(n).map_err(|e| e.to_string())).collect::<Result<_, _>>()?
        }
    };
    let store = o.store.clone().unwrap_or_else(|| folder.path().join("store"));
    let shown = |path: &Path| path.display().to_string();
    let mut known = vec![(shown(folder.path()), "WORK"), (shown(&store), "STORE")];
    known.extend(models.iter().map(|m| (shown(m), "MODELS")));
    known.push((shown(&bundled()), "tests/models"));
    let tool = digest(Path::new(env!("CARGO_BIN_EXE_quantc")))?;
    let bench = Bench { options: o, models, work: folder.path().into(), store, known, presets, tool };
    let text = bench.report()?;
    println!("{text}");
    eprintln!("{:.0} s", start.elapsed().as_secs_f64());
    match &o.out {
        Some(path) => std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display())),
        None => Ok(()),
    }
}

/// The models and texts of the repository.
fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models")
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

fn digest(path: &Path) -> Result<Digest, String> {
    let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(Digest::of(&bytes))
}

fn json(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|e| format!("what should be JSON is not: {e}"))
}

/// A row of a table.
fn cells(cells: &[String]) -> String {
    format!("| {} |\n", cells.join(" | "))
}

/// The head of a table whose first column is text.
fn head(names: &[&str]) -> String {
    let rule = "--:|".repeat(names.len() - 1);
    format!("| {} |\n|---|{rule}\n", names.join(" | "))
}

/// A row that failed.
fn failed(name: &str, why: &str, columns: usize) -> String {
    let mut row = vec![name.to_string(), why.to_string()];
    row.resize(columns, String::new());
    cells(&row)
}

impl Bench<'_> {
    fn report(&self) -> Result<String, String> {
        let date = Command::new("date").arg("+%Y-%m-%d").output();
        let date = date.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_string()).unwrap_or_default();
        let mut text = format!("# Quality on {}, {date}\n\n", quantc::measure::processor());
        let place = match (&self.options.models, &self.models) {
            (None, Some(_)) => "QUANTC_MODELS=MODELS ",
            _ => "",
        };
        let _ = writeln!(text, "`{place}{}`\n", self.options.command());
        text += "\
Each engine is compiled for `host` with the calibration text and scored on the evaluation text, against the engine of the
preset `f32` of the same folder. KL is the mean of KL(float || engine) over tokens in nats, p99 its 99th percentile, top-1 the
share of tokens where both put the same token first. `bits, quantized` are those of the matrices stored as codes, with
their scales and zero points; `bits, all` those of all weights, with embedding, head and norms (a head tied to
the embedding counts as a matrix of its own); neither counts padding. `MB` is the engine's weight file, with padding.
";
        let (subjects, absent) = self.subjects()?;
        for line in absent {
            eprintln!("{line}");
            let _ = write!(text, "\n{line}\n");
        }
        let mut columns = vec![];
        let mut sections = String::new();
        for subject in &subjects {
            let _ = write!(sections, "\n## {}\n\n{}\n", subject.name, subject.texts);
            columns.push(self.section(subject, &subject.name, &subject.folder, &mut sections));
            let _ = write!(sections, "\n### Outlier twin of {}\n", subject.name);
            match self.twin(subject) {
                Ok(twin) => {
                    let name = format!("{}, twin", subject.name);
                    columns.push(self.section(subject, &name, &twin, &mut sections));
                }
                Err(why) => {
                    eprintln!("{}: skipped: outlier twin: {why}", subject.name);
                    let _ = write!(sections, "\nskipped: outlier twin of {}: {why}\n", subject.name);
                }
            }
        }
        text += &self.summary(&columns);
        text += &sections;
        if let Some(path) = &self.options.reference {
            text += &self.references(&inputs::references(&read(path)?)?, &subjects);
        }
        Ok(text)
    }

    /// Whether `--only` has this model.
    fn wanted(&self, name: &str) -> bool {
        self.options.only.is_empty() || self.options.only.iter().any(|n| n == name)
    }

    /// The models, and a line about each that is not measured.
    fn subjects(&self) -> Result<(Vec<Subject>, Vec<String>), String> {
        let mut folders = vec![bundled().join("tales-3M")];
        let mut absent = vec![];
        match &self.models {
            None => {
                let known = KNOWN.iter().filter(|n| self.wanted(n));
                absent.extend(known.map(|n| format!("{n}: skipped: QUANTC_MODELS not set")));
            }
            Some(dir) => {
                let entries = std::fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
                let mut found: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
                found.retain(|p| p.join("config.json").is_file() && has_weights(p));
                found.sort();
                if found.iter().any(|p| p.ends_with("tales-3M")) {
                    folders.clear();
                }
                folders.extend(found);
            }
        }
        let mut subjects = vec![];
        for folder in folders {
            let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !self.wanted(&name) {
                continue;
            }
            match self.subject(&name, folder) {
                Ok(subject) => subjects.push(subject),
                Err(why) => absent.push(format!("{name}: skipped: {why}")),
            }
        }
        if subjects.is_empty() {
            return Err("there is no model to measure".into());
        }
        Ok((subjects, absent))
    }

    fn subject(&self, name: &str, folder: PathBuf) -> Result<Subject, String> {
        let facts = self.inspect(&folder)?["facts"].clone();
        let sorts = name == "gpt-nano-sort";
        let kind = if sorts {
            Kind::Sorter
        } else if facts["kind"] == "encoder" {
            Kind::Encoder
        } else {
            Kind::Decoder
        };
        let subject = |calibration: PathBuf, evaluation: PathBuf, texts: String| -> Result<Subject, String> {
            inputs::check_apart(&read(&calibration)?, &read(&evaluation)?)?;
            Ok(Subject { name: name.into(), folder, kind, calibration, evaluation, texts })
        };
        if kind == Kind::Sorter {
            let [calibration, evaluation] = inputs::sorting_texts([5, 4]);
            let paths = ["calib", "eval"].map(|n| self.work.join(format!("{name}_{n}.txt")));
            write(&paths[0], &calibration)?;
            write(&paths[1], &evaluation)?;
            let [calibrated, evaluated] = paths;
            let texts = "Calibrated on a third of all 729 questions of six letters and their answers, scored on the others; \
                         `sorted` counts the questions of all 729 whose answer is right to the last letter.";
            return subject(calibrated, evaluated, texts.into());
        }
        let stem = if name == "tales-3M" { "tales" } else { "tinystories" };
        let [calibration, evaluation] =
            [self.text(&format!("{stem}_calib.txt"))?, self.text(&format!("{stem}_eval.txt"))?];
        if kind == Kind::Encoder {
            let whole = read(&evaluation)?;
            inputs::check_apart(&read(&calibration)?, &whole)?;
            let lines = inputs::sentences(&whole, SENTENCES);
            let path = self.work.join(format!("{name}_eval.txt"));
            write(&path, &(lines.join("\n") + "\n"))?;
            let texts = format!(
                "Calibrated on {stem}_calib.txt; cosines between the vectors of the first {} lines of {stem}_eval.txt \
                 and those of the float engine.",
                lines.len()
            );
            return subject(calibration, path, texts);
        }
        let window = facts["context"].as_str().unwrap_or("?");
        let texts = format!(
            "Calibrated on {stem}_calib.txt, scored on {stem}_eval.txt in windows of {window} tokens."
        );
        subject(calibration, evaluation, texts)
    }

    /// A text of the models folder, or of the repository.
    fn text(&self, name: &str) -> Result<PathBuf, String> {
        let folders = self.models.iter().map(|m| m.join("text")).chain([bundled()]);
        let mut paths = folders.map(|f| f.join(name));
        paths.find(|p| p.is_file()).ok_or_else(|| format!("there is no {name}"))
    }

    /// The folder of a subject's outlier twin, or why there is none.
    fn twin(&self, subject: &Subject) -> Result<PathBuf, String> {
        if let Some(twin) = self.options.twins.as_ref().map(|dir| dir.join(&subject.name))
            && has_weights(&twin)
        {
            return Ok(twin);
        }
        let Some(dir) = &self.models else { return Err("QUANTC_MODELS not set".into()) };
        let script = dir.join("make_outliers.py");
        if !script.is_file() {
            return Err("there is no make_outliers.py".into());
        }
        let python = self.options.python.clone().unwrap_or_else(|| "python3".into());
        let has = Command::new(&python).args(["-c", "import numpy, safetensors.numpy"]).output();
        if !has.is_ok_and(|out| out.status.success()) {
            return Err("there is no Python with NumPy and safetensors".into());
        }
        let out = self.work.join("twins").join(&subject.name);
        let mut command = Command::new(&python);
        command.arg(&script).arg(&subject.folder).arg(&out).args(["--seed", "0"]);
        if subject.kind != Kind::Encoder {
            command.arg("--kv");
        }
        self.output(command).map_err(|e| format!("make_outliers.py: {e}"))?;
        Ok(out)
    }

    /// What a command prints, or why it failed.
    fn output(&self, mut command: Command) -> Result<String, String> {
        let out = command.output().map_err(|e| inputs::reason(&e.to_string(), &self.known))?;
        match out.status.success() {
            true => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
            false => Err(inputs::reason(&String::from_utf8_lossy(&out.stderr), &self.known)),
        }
    }

    /// What the tool answers.
    fn quantc<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Value, String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantc"));
        command.args(args).arg("--json").env("QUANTC_STORE", &self.store);
        json(&self.output(command)?)
    }

    fn inspect(&self, folder: &Path) -> Result<Value, String> {
        self.quantc([OsStr::new("inspect"), folder.as_os_str()])
    }

    /// Compiles `model` to the engine `name`, in the place of any other of this name.
    fn compile(
        &self,
        model: &Path,
        calibration: Option<&Path>,
        how: &[&str],
        name: &str,
    ) -> Result<PathBuf, String> {
        let out = self.work.join("engines").join(name);
        let _ = std::fs::remove_dir_all(&out);
        let mut args = vec![OsStr::new("compile"), model.as_os_str()];
        args.extend(["--target", "host", "--agreement", "0", "-o"].map(OsStr::new));
        args.push(out.as_os_str());
        args.extend(how.iter().map(OsStr::new));
        if let Some(calibration) = calibration {
            args.extend([OsStr::new("--data"), calibration.as_os_str()]);
        }
        self.quantc(args)?;
        Ok(out)
    }

    /// What was measured before under the name that `what` is for `place`, or what is measured now. Failures are not kept.
    fn kept(
        &self,
        place: &Place<'_>,
        what: &[&str],
        measure: impl FnOnce() -> Result<Value, String>,
    ) -> Result<Value, String> {
        let name = Digest::of(format!("{} {} {what:?}", place.digest, self.options.max_tokens).as_bytes());
        let path = self.store.join("quality").join(format!("{name}.json"));
        if let Some(found) = std::fs::read_to_string(&path).ok().and_then(|text| json(&text).ok()) {
            return Ok(found);
        }
        let found = measure()?;
        std::fs::create_dir_all(self.store.join("quality")).map_err(|e| e.to_string())?;
        // Whole or not at all: a run may be ended here.
        let part = path.with_extension(format!("{}.part", std::process::id()));
        write(&part, &found.to_string())?;
        std::fs::rename(&part, &path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(found)
    }

    /// A folder to measure, with a name for it and for what it is measured by.
    fn place<'m>(&self, subject: &Subject, model: &'m Path) -> Result<Place<'m>, String> {
        let mut all = self.tool.to_string();
        let entries = std::fs::read_dir(model).map_err(|e| format!("{}: {e}", model.display()))?;
        let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
        files.retain(|p| p.extension().is_some_and(|e| e == "safetensors" || e == "json"));
        files.sort();
        files.extend([subject.calibration.clone(), subject.evaluation.clone()]);
        for file in files {
            let _ = write!(all, " {}", digest(&file)?);
        }
        Ok(Place { model, digest: Digest::of(all.as_bytes()) })
    }

    /// Scores an engine against another.
    fn score(&self, engine: &Path, base: &Path, text: &Path) -> Result<Value, String> {
        let tokens = self.options.max_tokens.to_string();
        let mut args =
            vec![OsStr::new("eval"), engine.as_os_str(), OsStr::new("--against"), base.as_os_str()];
        args.extend([
            OsStr::new("--text"),
            text.as_os_str(),
            OsStr::new("--max-tokens"),
            OsStr::new(&tokens),
        ]);
        self.quantc(args)
    }

    /// Vectors of the lines of a file.
    fn embed(&self, engine: &Path, lines: &Path) -> Result<Value, String> {
        self.quantc([OsStr::new("embed"), engine.as_os_str(), OsStr::new("--file"), lines.as_os_str()])
    }

    /// Everything about one engine.
    fn measure(
        &self,
        subject: &Subject,
        (place, weights): (&Place<'_>, &Value),
        base: &Path,
        vectors: &Value,
        how: &Way,
    ) -> Result<Row, String> {
        let args: Vec<&str> = how.args.iter().map(String::as_str).collect();
        let what = [&["row", if how.data { "calibrated" } else { "" }][..], &args].concat();
        let row = self.kept(place, &what, || {
            let calibration = how.data.then_some(subject.calibration.as_path());
            let engine = self.compile(place.model, calibration, &args, "engine")?;
            let report = json(&read(&engine.join("report.json"))?)?;
            let bytes = self.inspect(&engine)?["weight_bytes"].as_f64().ok_or("an engine without a size")?;
            let Bits { quantized, all } = inputs::bits(weights, &report)?;
            let mut row = serde_json::json!({ "quantized": quantized, "all": all, "bytes": bytes });
            if subject.kind == Kind::Encoder {
                let (mean, least) = inputs::cosines(&self.embed(&engine, &subject.evaluation)?, vectors)?;
                row["cosines"] = serde_json::json!([mean, least]);
            } else {
                row["scores"] = self.score(&engine, base, &subject.evaluation)?;
            }
            if subject.kind == Kind::Sorter {
                let right = sorted(&engine, place.model).map_err(|e| inputs::reason(&e, &self.known))?;
                row["sorted"] = right.into();
            }
            Ok(row)
        })?;
        let number = |value: &Value| value.as_f64().ok_or("a row of the store is damaged");
        let figures = match &row["cosines"] {
            Value::Null => {
                let sorted = row["sorted"].as_u64().map(|n| n as usize);
                Figures::Text { scores: Scores::of(&row["scores"])?, sorted }
            }
            cosines => Figures::Vectors { mean: number(&cosines[0])?, least: number(&cosines[1])? },
        };
        let bits = Bits { quantized: row["quantized"].as_f64(), all: number(&row["all"])? };
        Ok(Row { bits, megabytes: number(&row["bytes"])? / 1e6, figures })
    }

    /// What is measured: the presets, and beside them what their defaults are to be judged by.
    fn ways(&self, subject: &Subject) -> Vec<Way> {
        let way = |label: String, args: &[&str], data: bool| {
            let args = args.iter().map(ToString::to_string).collect();
            Way { label, args, data }
        };
        let mut all: Vec<Way> =
            self.presets.iter().map(|p| way(p.name.into(), &["--preset", p.name], p.needs_data())).collect();
        for (name, pipeline) in
            self.presets.iter().filter_map(|p| Some((p.name, with_usual_strength(p.pipeline)?)))
        {
            all.push(way(format!("{name}, alpha 0.5"), &["-p", &pipeline], true));
        }
        for kv in self.options.kv.iter().filter(|_| subject.kind == Kind::Decoder) {
            let args = ["--preset", "f32", "--kv-cache", kv];
            all.push(way(format!("f32, {kv} cache"), &args, false));
            all.push(way(format!("f32, {kv} cache, calibrated"), &args, true));
        }
        all
    }

    /// The table of one folder. Returns a column of the summary: its name, and for each preset what it costs.
    fn section(
        &self,
        subject: &Subject,
        name: &str,
        model: &Path,
        text: &mut String,
    ) -> (String, Vec<String>) {
        let titles: &[&str] = match subject.kind {
            Kind::Decoder => &["perplexity", "to float, %", "KL", "KL p99", "top-1"],
            Kind::Sorter => &["KL", "KL p99", "top-1", "sorted"],
            Kind::Encoder => &["mean cosine", "least cosine"],
        };
        let titles = [&["preset", "bits, quantized", "bits, all", "MB"], titles].concat();
        let mut short = vec![];
        let begun = || -> Result<(Place<'_>, Value, PathBuf, Value), String> {
            let place = self.place(subject, model)?;
            let weights = self.inspect(model)?;
            let base = self.compile(model, None, &["--preset", "f32"], "base")?;
            let vectors = match subject.kind {
                Kind::Encoder => self.embed(&base, &subject.evaluation)?,
                _ => Value::Null,
            };
            Ok((place, weights, base, vectors))
        };
        let (place, weights, base, vectors) = match begun() {
            Ok(found) => found,
            Err(why) => {
                eprintln!("{name}: {why}");
                let _ = write!(text, "\nskipped: {name}: {why}\n");
                return (name.into(), vec!["-".into(); self.presets.len()]);
            }
        };
        *text += "\n";
        *text += &head(&titles);
        for (n, how) in self.ways(subject).iter().enumerate() {
            let preset = &how.label;
            let start = Instant::now();
            let row = self.measure(subject, (&place, &weights), &base, &vectors, how);
            let cost = match &row {
                Ok(row) => row.cost(),
                Err(_) => "-".into(),
            };
            let told = row.as_ref().map_or_else(|why| why.clone(), |_| cost.clone());
            eprintln!("{name}: {preset}: {told}, {:.1} s", start.elapsed().as_secs_f64());
            if n < self.presets.len() {
                short.push(cost);
            }
            match row {
                Ok(row) => *text += &cells(&row.cells(preset, subject.kind)),
                Err(why) => *text += &failed(preset, &why, titles.len()),
            }
        }
        (name.into(), short)
    }

    /// One line for each preset, one column for each folder.
    fn summary(&self, columns: &[(String, Vec<String>)]) -> String {
        let mut text =
            "\n## All at a glance: KL to float, or for encoders 1 less the mean cosine\n\n".to_string();
        let names = columns.iter().map(|(name, _)| name.as_str());
        text += &head(&[&["preset"][..], &names.collect::<Vec<_>>()].concat());
        for (n, preset) in self.presets.iter().enumerate() {
            let costs = columns.iter().map(|(_, column)| column[n].clone());
            text += &cells(&[preset.name.to_string()].into_iter().chain(costs).collect::<Vec<_>>());
        }
        text
    }

    /// The tables of methods beside those of a textbook.
    fn references(&self, references: &[Reference], subjects: &[Subject]) -> String {
        let mut text = "\n## Beside a textbook's methods\n\n".to_string();
        text += "\
Weights only, but for w8a8; the head and the embedding stay as they are. `gptq` is calibrated on at most 64 samples, each
layer on what the quantized layers before it make. `scales` is the type of ours; the textbook's are `f32`. ";
        let _ = writeln!(text, "Results of `gptq` above {GOAL} of the textbook's KL are marked with `!`.");
        for reference in references.iter().filter(|r| self.wanted(&r.model)) {
            let name = &reference.model;
            let _ = write!(text, "\n### {name}\n\n");
            let subject = subjects.iter().find(|s| s.name == *name && s.kind == Kind::Decoder);
            let base = match subject {
                None => Err("the model is not there".to_string()),
                Some(s) => self.compile(&s.folder, None, &["--preset", "f32"], "base").map(|b| (s, b)),
            };
            match base {
                Ok((subject, base)) => self.reference(reference, subject, &base, &mut text),
                Err(why) => {
                    eprintln!("reference of {name}: skipped: {why}");
                    let _ = writeln!(text, "skipped: {name}: {why}");
                }
            }
        }
        text
    }

    fn reference(&self, reference: &Reference, subject: &Subject, base: &Path, text: &mut String) {
        let name = &reference.model;
        let titles = [
            "method",
            "bits",
            "group",
            "zero",
            "scales",
            "perplexity",
            "theirs",
            "KL",
            "theirs",
            "ratio",
            "top-1",
            "theirs",
            "",
        ];
        let mut table = head(&titles);
        let mut sample = None;
        let mut ratios: Vec<f64> = vec![];
        for row in &reference.rows {
            let mut seen: Vec<String> = vec![];
            for scale in &self.options.scales {
                let start = Instant::now();
                let mut said =
                    vec![row.method.clone(), row.bits.to_string(), row.group_name(), row.zero_name().into()];
                let label = format!("{name}: {}, {scale} scales", said.join(" "));
                match self.compare(row, scale, subject, base, &mut seen) {
                    Ok(None) => eprintln!("{label}: as before"),
                    Ok(Some(scores)) => {
                        let ratio = scores.mean / row.divergence;
                        // What counts is the first type of scales; others are there to compare.
                        if row.method == "gptq" && seen.len() == 1 {
                            ratios.push(ratio);
                        }
                        eprintln!("{label}: ratio {ratio:.3}, {:.1} s", start.elapsed().as_secs_f64());
                        sample = Some((scores.base, scores.tokens));
                        said.extend(seen.last().cloned());
                        said.extend(compared(row, &scores));
                        table += &cells(&said);
                    }
                    Err(why) => {
                        eprintln!("{label}: {why}");
                        said.extend([scale.clone(), why]);
                        said.resize(titles.len(), String::new());
                        table += &cells(&said);
                    }
                }
            }
        }
        if let Some((perplexity, tokens)) = sample {
            let _ = writeln!(
                text,
                "The float engine's perplexity is {perplexity:.5} on {tokens} tokens, the textbook's {:.5} on {}{}.",
                reference.perplexity,
                reference.tokens,
                if tokens == reference.tokens { "" } else { ": not the same tokens, so ratios say little" }
            );
        }
        if !ratios.is_empty() {
            let mean = (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len() as f64).exp();
            let worst = ratios.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let above = ratios.iter().filter(|&&r| r > GOAL).count();
            let _ = writeln!(
                text,
                "KL of `gptq` by the textbook's with `{}` scales: geometric mean {mean:.3}, worst {worst:.3}, {above} of {} rows above {GOAL}.",
                self.options.scales[0],
                ratios.len()
            );
        }
        let _ = write!(text, "\n{table}");
    }

    /// Scores of what does the same as a textbook's row, unless its type of scales was `seen` before.
    fn compare(
        &self,
        row: &Textbook,
        scale: &str,
        subject: &Subject,
        base: &Path,
        seen: &mut Vec<String>,
    ) -> Result<Option<Scores>, String> {
        let pipeline = row.pipeline(scale)?;
        let place = self.place(subject, &subject.folder)?;
        let what = ["textbook", &pipeline];
        let made = std::cell::OnceCell::new();
        let engine = || {
            let how = ["--pipeline", &pipeline];
            made.get_or_init(|| self.compile(&subject.folder, Some(&subject.calibration), &how, "engine"))
                .clone()
        };
        let found = self.kept(&place, &[&what[..], &["scales"]].concat(), || {
            let report = json(&read(&engine()?.join("report.json"))?)?;
            Ok(inputs::scale_type(&report).ok_or("nothing is stored as codes")?.into())
        })?;
        let found = found.as_str().ok_or("a row of the store is damaged")?.to_string();
        if seen.contains(&found) {
            return Ok(None);
        }
        let scores = self.kept(&place, &what, || self.score(&engine()?, base, &subject.evaluation))?;
        seen.push(found);
        Scores::of(&scores).map(Some)
    }
}

impl Scores {
    /// Of what `quantc eval --json` says.
    fn of(found: &Value) -> Result<Scores, String> {
        let number = |key: &str| found[key].as_f64().ok_or_else(|| format!("no `{key}` in what eval says"));
        Ok(Scores {
            perplexity: number("perplexity")?,
            base: number("perplexity_base")?,
            mean: number("kl_mean")?,
            p99: number("kl_p99")?,
            top1: number("top1_agreement")?,
            tokens: number("tokens_scored")? as u64,
        })
    }
}

/// The figures of a row beside a textbook's.
fn compared(row: &Textbook, scores: &Scores) -> Vec<String> {
    let ratio = scores.mean / row.divergence;
    let mut all: Vec<String> = [scores.perplexity, row.perplexity].map(|x| format!("{x:.4}")).into();
    all.extend([scores.mean, row.divergence].map(|x| format!("{x:.5}")));
    all.push(format!("{ratio:.3}"));
    all.extend([scores.top1, row.agreement].map(|x| format!("{x:.4}")));
    all.push(if row.method == "gptq" && ratio > GOAL { "!".into() } else { String::new() });
    all
}

impl Row {
    /// The figure of the summary.
    fn cost(&self) -> String {
        match &self.figures {
            Figures::Text { scores, .. } => format!("{:.5}", scores.mean),
            Figures::Vectors { mean, .. } => format!("{:.5}", 1.0 - mean),
        }
    }

    fn cells(&self, preset: &str, kind: Kind) -> Vec<String> {
        let quantized = self.bits.quantized.map_or("-".into(), |b| format!("{b:.3}"));
        let mut all =
            vec![preset.into(), quantized, format!("{:.3}", self.bits.all), format!("{:.2}", self.megabytes)];
        match &self.figures {
            Figures::Vectors { mean, least } => all.extend([mean, least].map(|c| format!("{c:.5}"))),
            Figures::Text { scores, sorted } => {
                if kind == Kind::Decoder {
                    all.push(format!("{:.4}", scores.perplexity));
                    all.push(format!("{:+.3}", 100.0 * (scores.perplexity / scores.base - 1.0)));
                }
                all.extend([scores.mean, scores.p99].map(|x| format!("{x:.5}")));
                all.push(format!("{:.4}", scores.top1));
                all.extend(sorted.map(|n| n.to_string()));
            }
        }
        all
    }
}

/// Whether a folder has a safetensors file.
fn has_weights(folder: &Path) -> bool {
    let mut entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.any(|e| e.path().extension().is_some_and(|e| e == "safetensors"))
}

/// How many of all questions an engine answers with their letters sorted, always taking the likeliest one.
fn sorted(engine: &Path, model: &Path) -> Result<usize, String> {
    let place = model.join("tokenizer.json");
    let bytes = std::fs::read(&place).map_err(|e| format!("tokenizer.json: {e}"))?;
    let tokenizer = quantc_frontends::Tokenizer::from_bytes(&bytes, &place.display().to_string())
        .map_err(|e| e.to_string())?;
    let ids = |text: &str| tokenizer.encode(text, false).map_err(|e| e.to_string());
    let engine = Engine::open(engine, &OpenOptions::default()).map_err(|e| e.to_string())?;
    let options = SessionOptions { threads: 1, ..SessionOptions::default() };
    let mut session = Session::new(Arc::new(engine), &options).map_err(|e| e.to_string())?;
    let mut right = 0;
    for question in inputs::questions() {
        let mut asked = ids(&question)?;
        let mut answered = vec![];
        session.reset(0).map_err(|e| e.to_string())?;
        while answered.len() < inputs::LETTERS {
            let logits = session.prefill(0, &asked, 1).map_err(|e| e.to_string())?;
            let next = sample::greedy(logits).ok_or("logits that are no numbers")?;
            answered.push(next);
            asked = vec![next];
        }
        right += usize::from(answered == ids(&inputs::answer(&question))?);
    }
    Ok(right)
}
