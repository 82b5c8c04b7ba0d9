//! What the quality bench reads: its command line, tables of reference figures, sizes of engines, vectors, and letters
//! to sort. Nothing here runs anything, so that it is tested where tests run.

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The command line.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// A folder of models.
    pub models: Option<PathBuf>,
    /// A folder of outlier twins, each under its model's name.
    pub twins: Option<PathBuf>,
    /// A Python that has NumPy and safetensors.
    pub python: Option<PathBuf>,
    /// Presets to measure; none given means all.
    pub presets: Vec<String>,
    /// Models to measure; none given means all.
    pub only: Vec<String>,
    /// Most tokens taken from an evaluation text; 0 takes all.
    pub max_tokens: usize,
    /// A file of reference figures.
    pub reference: Option<PathBuf>,
    /// Types of scales that the pipelines of the reference are compiled with.
    pub scales: Vec<String>,
    /// Formats of the key/value cache that are measured with float weights.
    pub kv: Vec<String>,
    /// Where derived weights are kept.
    pub store: Option<PathBuf>,
    /// The file to write.
    pub out: Option<PathBuf>,
}

impl Options {
    /// Reads the arguments after the program's name.
    ///
    /// # Errors
    /// Unknown flags, flags without their value, and numbers that are none.
    pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Options, String> {
        let mut o = Options {
            models: None,
            twins: None,
            python: None,
            presets: vec![],
            only: vec![],
            max_tokens: 0,
            reference: None,
            scales: vec!["auto".into()],
            kv: vec![],
            store: None,
            out: None,
        };
        let mut args = args.into_iter();
        while let Some(flag) = args.next() {
            // What cargo itself passes to benches.
            if flag == "--bench" {
                continue;
            }
            let value = args.next().ok_or_else(|| format!("`{flag}` needs a value"))?;
            let path = || Some(PathBuf::from(&value));
            let list = || value.split(',').filter(|s| !s.is_empty()).map(String::from).collect();
            match flag.as_str() {
                "--models" => o.models = path(),
                "--twins" => o.twins = path(),
                "--python" => o.python = path(),
                "--presets" => o.presets = list(),
                "--only" => o.only = list(),
                "--max-tokens" => {
                    o.max_tokens =
                        value.parse().map_err(|_| format!("`--max-tokens {value}` is not a number"))?;
                }
                "--reference" => o.reference = path(),
                "--scales" => o.scales = list(),
                "--kv" => o.kv = list(),
                "--store" => o.store = path(),
                "--out" => o.out = path(),
                _ => return Err(format!("unknown flag `{flag}`")),
            }
        }
        Ok(o)
    }

    /// The command that these options came from, with words instead of paths.
    pub fn command(&self) -> String {
        let lists = [
            ("presets", &self.presets, ""),
            ("only", &self.only, ""),
            ("scales", &self.scales, "auto"),
            ("kv", &self.kv, ""),
        ];
        let given = |path: &Option<PathBuf>, flag: &str| {
            if path.is_some() { format!(" --{flag}") } else { String::new() }
        };
        let mut text = "cargo bench --bench quality --".to_string();
        text += &given(&self.models, "models MODELS");
        text += &given(&self.twins, "twins TWINS");
        text += &given(&self.python, "python PYTHON");
        for (name, list, usual) in lists {
            let list = list.join(",");
            if list != usual {
                text += &format!(" --{name} {list}");
            }
        }
        if self.max_tokens > 0 {
            text += &format!(" --max-tokens {}", self.max_tokens);
        }
        text += &given(&self.reference, "reference REFERENCE.md");
        text += &given(&self.store, "store STORE");
        text + &given(&self.out, "out FILE.md")
    }
}

/// Reference figures of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// The model's name.
    pub model: String,
    /// Perplexity of the float model.
    pub perplexity: f64,
    /// Tokens that were scored.
    pub tokens: u64,
    /// A row for each way of quantizing.
    pub rows: Vec<Textbook>,
}

/// What a plain implementation of a method costs.
#[derive(Clone, Debug, PartialEq)]
pub struct Textbook {
    /// `rtn`, `gptq` or `w8a8`.
    pub method: String,
    /// Bits of a code.
    pub bits: u32,
    /// Columns that share a scale; `None` is a whole row.
    pub group: Option<u32>,
    /// Whether groups have zero points.
    pub asymmetric: bool,
    /// Perplexity.
    pub perplexity: f64,
    /// Mean divergence from the float model, in nats.
    pub divergence: f64,
    /// Share of tokens for which both put the same one first.
    pub agreement: f64,
}

/// Reads every table with a `method` below a heading such as `## NAME: f32 perplexity 1.5 (100 tokens scored)`. Other
/// tables are left out.
///
/// # Errors
/// A row with cells that are missing or not what their column promises, by line.
pub fn references(text: &str) -> Result<Vec<Reference>, String> {
    let mut found: Vec<Reference> = vec![];
    let mut columns: Vec<String> = vec![];
    let mut within = false;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.starts_with('#') {
            let reference = heading(line.trim_start_matches('#'));
            within = reference.is_some();
            found.extend(reference);
        }
        if !line.starts_with('|') {
            columns.clear();
            continue;
        }
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        if columns.is_empty() {
            columns = cells.iter().map(|c| c.to_string()).collect();
        } else if within
            && columns[0] == "method"
            && !cells[0].starts_with("--")
            && let Some(last) = found.last_mut()
        {
            last.rows.push(textbook(&columns, &cells).map_err(|e| format!("line {}: {e}", number + 1))?);
        }
    }
    Ok(found)
}

/// `NAME: f32 perplexity P (N tokens scored)`.
fn heading(text: &str) -> Option<Reference> {
    let (model, rest) = text.trim().split_once(": f32 perplexity ")?;
    let (perplexity, rest) = rest.split_once(" (")?;
    let tokens = rest.strip_suffix(" tokens scored)")?;
    Some(Reference {
        model: model.into(),
        perplexity: perplexity.parse().ok()?,
        tokens: tokens.parse().ok()?,
        rows: vec![],
    })
}

fn textbook(columns: &[String], cells: &[&str]) -> Result<Textbook, String> {
    let cell = |name: &str| {
        let at = columns.iter().position(|c| c == name);
        let cell = at.and_then(|at| cells.get(at).copied());
        cell.ok_or_else(|| format!("there is no cell for `{name}`"))
    };
    let number = |name: &str| {
        let text = cell(name)?;
        text.parse::<f64>().map_err(|_| format!("`{text}` is no number for `{name}`"))
    };
    let whole = |name: &str| {
        let text = cell(name)?;
        text.parse::<u32>().map_err(|_| format!("`{text}` is no whole number for `{name}`"))
    };
    Ok(Textbook {
        // What follows a colon explains the method.
        method: cell("method")?.split(':').next().unwrap_or_default().trim().into(),
        bits: whole("bits")?,
        group: if cell("group")? == "row" { None } else { Some(whole("group")?) },
        asymmetric: match cell("zero")? {
            "sym" => false,
            "asym" => true,
            other => return Err(format!("`{other}` is neither `sym` nor `asym`")),
        },
        perplexity: number("perplexity")?,
        divergence: number("KL to float")?,
        agreement: number("top-1 agreement")?,
    })
}

impl Textbook {
    /// The group as its table writes it.
    pub fn group_name(&self) -> String {
        self.group.map_or("row".into(), |g| g.to_string())
    }

    /// The zero points as their table writes them.
    pub fn zero_name(&self) -> &'static str {
        if self.asymmetric { "asym" } else { "sym" }
    }

    /// The pipeline that does the same with scales of the type `scale`: weights of all layers but the head, and
    /// activations only where the method says so.
    ///
    /// # Errors
    /// A method that has no pipeline.
    pub fn pipeline(&self, scale: &str) -> Result<String, String> {
        let scheme = format!(
            "format=int{}, group={}, zero={}, scale={scale}, skip-layers=[head]",
            self.bits,
            self.group_name(),
            if self.asymmetric { "asymmetric" } else { "symmetric" },
        );
        let layers = match self.method.as_str() {
            "rtn" => format!("round-to-nearest{{{scheme}}}"),
            "w8a8" => format!(
                "round-to-nearest{{{scheme}}}, quantize-activations{{format=int8, skip-layers=[head]}}"
            ),
            "gptq" => format!("calibrate{{samples=64, skip-layers=[head]}}, gptq{{{scheme}}}"),
            other => return Err(format!("`{other}` has no pipeline")),
        };
        Ok(format!(
            "outline-layers, fold-constants, dedupe, layers({layers}, fuse-dequant-matmul, fuse-epilogue), drop-dead, \
             pack-weights"
        ))
    }
}

/// Bits that a weight takes with its share of scales and zero points.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bits {
    /// Of the matrices that are stored as codes, if any are.
    pub quantized: Option<f64>,
    /// Of all weights, embedding and head included.
    pub all: f64,
}

/// The bits of an engine, of what `quantc inspect MODEL --json` says of its model and of the engine's `report.json`.
///
/// What a pass makes of a weight called `w` is called `w`, or begins with `w.`.
///
/// # Errors
/// Lists that are not there, and weights without a name, type or size.
pub fn bits(model: &Value, report: &Value) -> Result<Bits, String> {
    /// Elements in the model; bytes in the engine, and whether codes are among them.
    struct Weight {
        elements: u64,
        bytes: u64,
        codes: bool,
    }
    fn list<'a>(of: &'a Value, what: &str) -> Result<&'a Vec<Value>, String> {
        of["weights"].as_array().ok_or_else(|| format!("{what} lists no weights"))
    }
    fn text<'a>(weight: &'a Value, key: &str) -> Result<&'a str, String> {
        weight[key].as_str().ok_or_else(|| format!("a weight has no {key}"))
    }
    let mut weights: BTreeMap<&str, Weight> = BTreeMap::new();
    for weight in list(model, "the model")? {
        let ty = text(weight, "type")?;
        let elements = elements(ty).ok_or_else(|| format!("`{ty}` has no size"))?;
        weights.insert(text(weight, "name")?, Weight { elements, bytes: 0, codes: false });
    }
    let total: u64 = weights.values().map(|w| w.elements).sum();
    let mut stored = 0;
    for part in list(report, "the report")? {
        let bytes = part["bytes"].as_u64().ok_or("a weight has no size")?;
        stored += bytes;
        let codes = text(part, "type")?.contains("!q<");
        let mut name = text(part, "name")?;
        // The longest beginning that is a weight's name.
        loop {
            if let Some(weight) = weights.get_mut(name) {
                weight.bytes += bytes;
                weight.codes |= codes;
                break;
            }
            match name.rsplit_once('.') {
                Some((front, _)) => name = front,
                None => break,
            }
        }
    }
    let coded = || weights.values().filter(|w| w.codes);
    let (bytes, elements): (u64, u64) = (coded().map(|w| w.bytes).sum(), coded().map(|w| w.elements).sum());
    let each = |bytes: u64, elements: u64| 8.0 * bytes as f64 / elements as f64;
    if total == 0 {
        return Err("the model has no weights".into());
    }
    Ok(Bits { quantized: (elements > 0).then(|| each(bytes, elements)), all: each(stored, total) })
}

/// The type of the scales in an engine's `report.json`: that of the first weight stored as codes.
pub fn scale_type(report: &Value) -> Option<String> {
    let mut types = report["weights"].as_array()?.iter().filter_map(|w| w["type"].as_str());
    let scheme = types.find_map(|ty| ty.split_once("!q<").map(|(_, scheme)| scheme))?;
    let (_, scale) = scheme.split_once(':')?;
    scale.split_whitespace().next().map(String::from)
}

/// Elements of a tensor of the type `tensor<2x3xf32>`.
fn elements(ty: &str) -> Option<u64> {
    let dims = ty.strip_prefix("tensor<")?.split('x').map_while(|d| d.parse::<u64>().ok());
    dims.reduce(|a, b| a * b)
}

/// Mean and least cosine between the vectors of the same texts in two answers of `quantc embed --json`.
///
/// # Errors
/// No vectors, different numbers of them or of their elements, and vectors without a direction.
pub fn cosines(ours: &Value, base: &Value) -> Result<(f64, f64), String> {
    let vectors = |v: &Value| -> Option<Vec<Vec<f64>>> {
        let numbers = |v: &Value| v.as_array()?.iter().map(Value::as_f64).collect();
        v["embeddings"].as_array()?.iter().map(numbers).collect()
    };
    let (Some(ours), Some(base)) = (vectors(ours), vectors(base)) else {
        return Err("vectors that are no numbers".into());
    };
    if ours.is_empty() || ours.len() != base.len() {
        return Err(format!("{} and {} vectors", ours.len(), base.len()));
    }
    let (mut sum, mut least) = (0.0, f64::INFINITY);
    for (a, b) in ours.iter().zip(&base) {
        if a.len() != b.len() {
            return Err(format!("vectors of {} and {} elements", a.len(), b.len()));
        }
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
        if cosine.is_nan() {
            return Err("a vector without a direction".into());
        }
        sum += cosine;
        least = least.min(cosine);
    }
    Ok((sum / ours.len() as f64, least))
}

/// Letters of a question to a model that sorts.
pub const LETTERS: usize = 6;

/// All 729 rows of six letters A, B and C, in an order that does not begin with one letter only.
pub fn questions() -> Vec<String> {
    let count = 3usize.pow(LETTERS as u32);
    let row = |i: usize| (0..LETTERS as u32).map(move |d| b"ABC"[i / 3usize.pow(d) % 3] as char).collect();
    // 500 and 729 have no factor in common, so that every row comes once.
    (0..count).map(|i| row(i * 500 % count)).collect()
}

/// The letters of a row, sorted.
pub fn answer(question: &str) -> String {
    let mut letters: Vec<char> = question.chars().collect();
    letters.sort_unstable();
    letters.into_iter().collect()
}

/// Texts for a model that sorts: a third of the questions to calibrate on, the others to evaluate on, each with the
/// first `letters` letters of its answer.
pub fn sorting_texts(letters: [usize; 2]) -> [String; 2] {
    let value = |q: &str| q.bytes().map(|b| usize::from(b - b'A')).sum::<usize>();
    let text = |calibrates: bool, letters: usize| {
        let rows = questions().into_iter().filter(|q| (value(q) % 3 == 0) == calibrates);
        rows.map(|q| format!("{q}{}", &answer(&q)[..letters.min(LETTERS)])).collect()
    };
    [text(true, letters[0]), text(false, letters[1])]
}

/// Refuses texts of which one is or holds the other: what is calibrated on says nothing about the rest.
///
/// # Errors
/// Such texts, and empty ones.
pub fn check_apart(calibration: &str, evaluation: &str) -> Result<(), String> {
    let (a, b) = (calibration.trim(), evaluation.trim());
    match () {
        _ if a.is_empty() || b.is_empty() => Err("a text is empty".into()),
        _ if a.contains(b) || b.contains(a) => Err("the evaluation text was calibrated on".into()),
        _ => Ok(()),
    }
}

/// Texts of a file to embed: its first lines that are not empty, cut to so many characters that no tokenizer makes more
/// than a context of 512 tokens of them.
pub fn sentences(text: &str, most: usize) -> Vec<String> {
    let lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
    lines.take(most).map(|line| line.chars().take(500).collect()).collect()
}

/// The reason in what a failed command wrote: the first error, or the last line. Folders are written as their names in
/// `known`, and nothing in it breaks a table.
pub fn reason(stderr: &str, known: &[(String, &str)]) -> String {
    let mut lines = stderr.lines().map(str::trim).filter(|l| !l.is_empty());
    let found = lines.clone().find(|l| l.starts_with("error")).or_else(|| lines.next_back());
    let mut text = found.unwrap_or("it says nothing").to_string();
    for (path, name) in known {
        text = text.replace(path.as_str(), name);
    }
    text.replace('|', "/")
}
