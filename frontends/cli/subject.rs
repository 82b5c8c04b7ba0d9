//! What subcommands work on: engines, models and texts.

use crate::failure::Outcome;
use indicatif::{ProgressBar, ProgressStyle};
use quantc_frontends::tokenizer::Tokenizer;
use quantc_ir::diag::Diag;
use quantc_ir::eval::Tensor;
use quantc_ir::ty::TensorTy;
use quantc_runtime::engine::{Engine, OpenOptions, Pages};
use quantc_runtime::format::{Kind, MANIFEST_FILE, Manifest};
use quantc_runtime::gpu::Loaded;
use std::io::IsTerminal;
use std::path::Path;
#[cfg(feature = "llvm")]
use std::path::PathBuf;
use std::sync::Arc;

/// Largest text that is read, in bytes.
const MAX_TEXT: u64 = 1 << 30;

/// Whether `path` is an engine's folder.
pub fn is_engine(path: &Path) -> bool {
    path.join(MANIFEST_FILE).is_file()
}

/// Whether `path` is the folder of an engine over arrays. An engine whose manifest cannot be read is an error.
pub fn is_graph(path: &Path) -> Outcome<bool> {
    Ok(is_engine(path) && manifest(path)?.kind() == Kind::Graph)
}

/// The manifest of an engine, which may be for another machine.
pub fn manifest(path: &Path) -> Outcome<Manifest> {
    check_engine(path)?;
    Ok(quantc_runtime::engine::read_manifest(path)?)
}

/// The report of an engine, and an error about it that says why.
pub fn report(
    path: &Path,
    manifest: &Manifest,
) -> Outcome<(serde_json::Value, impl Fn(&str) -> Diag + use<>)> {
    let bytes = quantc_runtime::engine::read_file(path, manifest, "report.json")?;
    let place = path.join("report.json").display().to_string();
    let bad =
        move |why: &str| Diag::input(format!("the report is not readable: {why}")).in_file(place.clone());
    let report = serde_json::from_slice(&bytes).map_err(|e| bad(&e.to_string()))?;
    Ok((report, bad))
}

/// Opens an engine.
pub fn open_engine(path: &Path, verify_weights: bool) -> Outcome<Arc<Engine>> {
    open_engine_with(path, &OpenOptions { verify_weights, ..OpenOptions::default() })
}

/// Opens an engine, as the options say.
pub fn open_engine_with(path: &Path, options: &OpenOptions) -> Outcome<Arc<Engine>> {
    check_engine(path)?;
    Ok(Arc::new(Engine::open(path, options)?))
}

/// Where weights lie, as an option says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Weights {
    /// In the file's pages, which processes share.
    Mapped,
    /// What every token reads moves to huge pages while tokens are generated.
    Huge,
}

impl From<Weights> for Pages {
    fn from(weights: Weights) -> Pages {
        match weights {
            Weights::Mapped => Pages::Mapped,
            Weights::Huge => Pages::Huge,
        }
    }
}

/// Refuses folders that are no engines.
fn check_engine(path: &Path) -> Outcome {
    if path.is_dir() && !is_engine(path) {
        let diag = Diag::input(format!("this folder has no `{MANIFEST_FILE}`, so it is not an engine"));
        let diag = diag.in_file(path.display().to_string());
        return Err(diag
            .help("make one with `quantc compile MODEL --target host --preset f32 -o ENGINE`")
            .into());
    }
    Ok(())
}

/// Opens an engine, or compiles a model to f32 for this machine and opens that.
pub fn open(path: &Path) -> Outcome<Arc<Engine>> {
    if is_engine(path) {
        return open_engine(path, true);
    }
    if !path.exists() {
        return Err(Diag::input("there is nothing here").in_file(path.display().to_string()).into());
    }
    open_model(path)
}

/// `engine`, opened from `path`, when it is a decoder: an encoder is not to be `used` so.
pub fn decoder(engine: Arc<Engine>, path: &Path, used: &str) -> Outcome<Arc<Engine>> {
    if engine.manifest().kind() == Kind::Encoder {
        let diag = Diag::input(format!("an encoder cannot be {used}")).in_file(path.display().to_string());
        return Err(diag.help("use `quantc embed`").into());
    }
    if engine.manifest().kind() == Kind::Graph {
        let diag = Diag::input(format!("an engine over arrays cannot be {used}"));
        return Err(diag
            .in_file(path.display().to_string())
            .help("use `quantc run --input NAME=FILE`")
            .into());
    }
    Ok(engine)
}

#[cfg(feature = "llvm")]
fn open_model(path: &Path) -> Outcome<Arc<Engine>> {
    let folder = Scratch::new()?;
    eprintln!("compiling {} to f32 for this machine", path.display());
    crate::compile::float_engine(path, &folder.0.join("engine"))?;
    // Everything but the tokenizer is mapped or loaded now; the folder is kept until the tokenizer was read.
    let engine = open_engine(&folder.0.join("engine"), false)?;
    SCRATCH.with(|s| s.borrow_mut().push(folder));
    Ok(engine)
}

#[cfg(not(feature = "llvm"))]
fn open_model(path: &Path) -> Outcome<Arc<Engine>> {
    let diag = Diag::target("this is not an engine, and this build of quantc compiles no models");
    Err(diag.in_file(path.display().to_string()).into())
}

#[cfg(feature = "llvm")]
thread_local! {
    /// Folders that live as long as the tool's main thread.
    static SCRATCH: std::cell::RefCell<Vec<Scratch>> = const { std::cell::RefCell::new(vec![]) };
}

/// A folder that is removed when it is dropped.
#[cfg(feature = "llvm")]
pub struct Scratch(PathBuf);

#[cfg(feature = "llvm")]
impl Scratch {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A folder for temporary files.
    pub fn new() -> Outcome<Scratch> {
        let base = std::env::temp_dir();
        for n in 0..1000 {
            let path = base.join(format!("quantc-{}-{n}", std::process::id()));
            if std::fs::create_dir(&path).is_ok() {
                return Ok(Scratch(path));
            }
        }
        Err(Diag::system("cannot create a folder for temporary files")
            .in_file(base.display().to_string())
            .into())
    }
}

#[cfg(feature = "llvm")]
impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The file with a model's tokenizer.
const TOKENIZER: &str = "tokenizer.json";
/// The same in compact form, where it has one.
const COMPACT_TOKENIZER: &str = "tokenizer.bin";

/// The files that an engine carries of a tokenizer: itself, and its compact form.
#[cfg(feature = "llvm")]
pub fn tokenizer_files(tokenizer: Option<(Vec<u8>, Option<Vec<u8>>)>) -> Vec<(String, Vec<u8>)> {
    let Some((whole, compact)) = tokenizer else { return vec![] };
    let compact = compact.map(|bytes| (COMPACT_TOKENIZER.to_string(), bytes));
    std::iter::once((TOKENIZER.to_string(), whole)).chain(compact).collect()
}

/// The tokenizer of an engine.
pub fn tokenizer(engine: &Arc<Engine>) -> Outcome<Tokenizer> {
    let missing = engine.manifest().file(TOKENIZER).is_none();
    if missing {
        let place = engine.path().display().to_string();
        return Err(Diag::input("the engine has no tokenizer, because its model had none")
            .in_file(place)
            .into());
    }
    let place = |name: &str| engine.path().join(name).display().to_string();
    if engine.manifest().file(COMPACT_TOKENIZER).is_some() {
        let bytes = engine.read_file(COMPACT_TOKENIZER)?;
        let whole = Arc::clone(engine);
        let read =
            move || whole.read_file(TOKENIZER).map_err(|e| Diag::input(e.message()).in_file(e.place()));
        return Ok(Tokenizer::from_compact(&bytes, &place(COMPACT_TOKENIZER), Box::new(read))?);
    }
    let bytes = engine.read_file(TOKENIZER)?;
    Ok(Tokenizer::from_bytes(&bytes, &place(TOKENIZER))?)
}

/// Whether a file is a NumPy array rather than a text.
pub fn is_array(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "npy")
}

/// The tokens of a text, or the ids of a NumPy array; and, of an array, the length of its rows, which are samples as they are.
pub fn tokens(
    path: &Path,
    tokenizer: Option<&quantc_frontends::Tokenizer>,
) -> Outcome<(Vec<u32>, Option<usize>)> {
    let place = path.display().to_string();
    if !is_array(path) {
        let tokenizer = tokenizer.ok_or_else(|| {
            Diag::input("a text was given, and the model has no tokenizer to read it with")
                .in_file(&place)
                .help("give token ids in rows, as a NumPy array")
        })?;
        return Ok((tokenizer.encode(&read_text(path)?, false)?, None));
    }
    let bytes =
        std::fs::read(path).map_err(|e| Diag::input(format!("cannot read it: {e}")).in_file(&place))?;
    let (ids, row) = quantc_frontends::data::npy_tokens(&bytes).map_err(|e| e.in_file(place))?;
    Ok((ids, Some(row)))
}

/// An array of samples cut into the batches that an input of type `ty` takes; what is left over is dropped.
pub fn batches_of(samples: &Tensor, ty: &TensorTy) -> Result<Vec<Tensor>, Diag> {
    let (have, want) = (samples.dims(), ty.shape.dims().unwrap_or_default());
    let fits = samples.ty.elem == ty.elem
        && have.len() == want.len()
        && !want.is_empty()
        && have[1..].iter().zip(&want[1..]).all(|(&h, &w)| h as u64 == w);
    if !fits {
        return Err(Diag::input(format!("samples of type {} are not batches of {ty}", samples.ty))
            .help("the first axis counts samples, everything else is as the input wants it"));
    }
    let each = want[0].max(1) as usize;
    (0..have[0] / each).map(|i| samples.slice_rows(i * each, each)).collect()
}

/// Reads a text file.
pub fn read_text(path: &Path) -> Outcome<String> {
    let place = path.display().to_string();
    let io = |e: std::io::Error| Diag::input(format!("cannot read it: {e}")).in_file(place.clone());
    let len = std::fs::metadata(path).map_err(io)?.len();
    if len > MAX_TEXT {
        return Err(Diag::input(format!("a text of {len} bytes is too long")).in_file(place).into());
    }
    let bytes = std::fs::read(path).map_err(io)?;
    String::from_utf8(bytes).map_err(|e| {
        let at = quantc_ir::diag::Loc::Byte(e.utf8_error().valid_up_to() as u64);
        Diag::input("the text is not UTF-8").in_file(place).at(at).into()
    })
}

/// A bar on a terminal, nothing elsewhere.
pub struct Progress(Option<ProgressBar>);

impl Progress {
    /// A bar for `what`.
    pub fn new(what: &str) -> Progress {
        if !std::io::stderr().is_terminal() {
            return Progress(None);
        }
        let bar = ProgressBar::new(1000);
        if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {percent}% {eta}") {
            bar.set_style(style);
        }
        bar.set_message(what.to_string());
        Progress(Some(bar))
    }

    /// Shows the share done.
    pub fn at(&mut self, share: f64) {
        if let Some(bar) = &self.0 {
            bar.set_position((share * 1000.0) as u64);
        }
    }

    /// Takes the bar away.
    pub fn done(self) {
        if let Some(bar) = self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Loads an engine onto this machine's GPU, when its kernels run on one, and shows how far it has come. Sessions use what
/// is loaded as long as the result lives.
pub fn load(engine: &Engine) -> Outcome<Option<Arc<Loaded>>> {
    if engine.manifest().gpu.is_none() {
        return Ok(None);
    }
    let mut bar = Progress::new("loading");
    let loaded = engine.load(&mut |done, all| bar.at(done as f64 / all.max(1) as f64));
    bar.done();
    Ok(Some(loaded?))
}
