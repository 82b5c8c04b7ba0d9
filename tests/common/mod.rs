//! What the tests of the whole tool share: the tool as a process, engines that are compiled once for each test file, known
//! results, damaged files, and numbers to compare.
#![allow(dead_code, reason = "each test file uses a part of this")]

#[cfg(feature = "llvm")]
pub mod device;

use quantc_codegen::targets;
use quantc_passes::presets::Preset;
use quantc_runtime::session::{Session, SessionOptions};
use quantc_runtime::{Engine, OpenOptions, sample};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};

/// Every target's name.
pub const TARGETS: [&str; 5] = ["cpu-generic", "cpu-avx2", "cpu-avxvnni", "cpu-avx512vnni", "cpu-avx512bf16"];

/// What a finished process left.
#[derive(Debug)]
pub struct Done {
    pub code: i32,
    pub out: String,
    pub err: String,
}

/// The tool with these arguments, without the caller's settings.
pub fn command<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantc"));
    command.args(args).env_remove("QUANTC_STORE").stdin(Stdio::null());
    // The width of help, and the place of files that show a failure again.
    command.env("COLUMNS", "100").env("TMPDIR", folder());
    command
}

/// Runs the tool to its end, whatever comes of it.
pub fn quantc<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Done {
    let out = command(args).output().expect("the tool starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the tool prints UTF-8");
    Done { code: out.status.code().unwrap_or(-1), out: text(out.stdout), err: text(out.stderr) }
}

/// Runs the tool, which must succeed, and gives what it printed.
pub fn ok<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> String {
    let args: Vec<_> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
    let done = quantc(&args);
    assert_eq!(done.code, 0, "{args:?}: {}", done.err);
    done.out
}

/// Runs the tool with `--json`; it must succeed and print one object on one line.
pub fn json<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Value {
    let args = args.into_iter().map(|a| a.as_ref().to_owned());
    one_object(&ok(args.chain(["--json".into()])))
}

/// The one JSON object that `out` consists of.
pub fn one_object(out: &str) -> Value {
    assert_eq!(out.lines().count(), 1, "{out}");
    let value: Value = serde_json::from_str(out).expect("stdout is JSON");
    assert!(value.is_object(), "{out}");
    value
}

/// A number of an object.
pub fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("`{key}` is no number in {value}"))
}

/// A file of tests/models.
pub fn models(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models").join(name)
}

/// A file among the models that do not come with the repository, when the environment says where they are.
pub fn outer_models(name: &str) -> Option<PathBuf> {
    match std::env::var_os("QUANTC_MODELS") {
        Some(dir) => Some(Path::new(&dir).join(name)),
        None => {
            eprintln!("skipped: QUANTC_MODELS not set ({name})");
            None
        }
    }
}

/// Whether the long form of the tests was asked for.
pub fn full() -> bool {
    std::env::var_os("QUANTC_FULL").is_some_and(|v| v == "1")
}

/// Whether this machine runs engines of `target`; says so when not.
pub fn runs(target: &str) -> bool {
    let here = targets::runs_here(targets::lookup(target).expect("a known target"));
    if !here {
        eprintln!("skipped: this machine does not run {target}");
    }
    here
}

/// An empty folder for this test file, emptied again by its next run.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let program = std::env::current_exe().expect("a test is a program");
        let name = program.file_stem().expect("a program has a name").to_string_lossy().into_owned();
        // Cargo puts a hash behind the name, which changes from build to build.
        let name = name.rsplit_once('-').map_or(name.clone(), |(name, _)| name.to_string());
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).expect("the target folder is writable");
        folder
    })
}

/// The store that compilations of this test file share.
pub fn store() -> PathBuf {
    folder().join("store")
}

/// A folder with libraries that stand in for those of CUDA, once they are built; `None` where there is no C compiler.
pub fn fake_cuda() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        let to = folder().join("lib");
        std::fs::create_dir_all(&to).expect("the target folder is writable");
        for name in ["libcuda", "libnvrtc", "libcublasLt"] {
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake").join(format!("{name}.c"));
            let mut cc = Command::new("cc");
            cc.args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"]);
            let Ok(done) = cc.arg(to.join(format!("{name}.so"))).arg(source).output() else {
                eprintln!("skipped: there is no `cc`");
                return None;
            };
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        }
        Some(to)
    };
    BUILT.get_or_init(build).as_deref()
}

/// How an engine is made.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Recipe {
    pub model: PathBuf,
    pub target: String,
    /// What is said on the command line besides.
    pub how: Vec<String>,
}

impl Recipe {
    /// A preset for this machine, calibrated on the bundled text when it is one that is.
    pub fn preset(model: impl Into<PathBuf>, preset: &str) -> Recipe {
        let how = vec!["--preset".into(), preset.into()];
        let recipe = Recipe { model: model.into(), target: "host".into(), how };
        if Preset::get(preset).is_ok_and(Preset::needs_data) { recipe.on_data() } else { recipe }
    }

    /// Calibrated on the bundled text.
    pub fn on_data(self) -> Recipe {
        let text = models("tales_calib.txt").display().to_string();
        self.with(&["--data", &text])
    }

    /// A pipeline for this machine.
    pub fn pipeline(model: impl Into<PathBuf>, pipeline: &str) -> Recipe {
        Recipe { model: model.into(), target: "host".into(), how: vec!["-p".into(), pipeline.into()] }
    }

    pub fn target(mut self, target: &str) -> Recipe {
        self.target = target.into();
        self
    }

    pub fn with(mut self, args: &[&str]) -> Recipe {
        self.how.extend(args.iter().map(|a| a.to_string()));
        self
    }

    /// Compiles it, once for the whole test file.
    pub fn built(&self) -> Built {
        type Cell = Arc<OnceLock<Built>>;
        static BUILT: Mutex<BTreeMap<Recipe, (usize, Cell)>> = Mutex::new(BTreeMap::new());
        let (index, cell) = {
            // A failed compilation in another test says enough there.
            let mut built = BUILT.lock().unwrap_or_else(|e| e.into_inner());
            let next = built.len();
            built.entry(self.clone()).or_insert_with(|| (next, Cell::default())).clone()
        };
        let made = cell.get_or_init(|| {
            let path = folder().join(format!("engine-{index}"));
            let mut command: Vec<std::ffi::OsString> = vec!["compile".into(), self.model.clone().into()];
            command.extend(["--target".into(), self.target.clone().into(), "--store".into(), store().into()]);
            command.extend(self.how.iter().map(Into::into));
            command.extend(["-o".into(), path.clone().into()]);
            Built { summary: json(command), path }
        });
        made.clone()
    }
}

/// A compiled engine.
#[derive(Clone, Debug)]
pub struct Built {
    pub path: PathBuf,
    /// What `compile --json` said.
    pub summary: Value,
}

impl Built {
    pub fn open(&self) -> Arc<Engine> {
        let engine = Engine::open(&self.path, &OpenOptions::default());
        Arc::new(engine.unwrap_or_else(|e| panic!("{}: {e}", self.path.display())))
    }

    /// A session with `slots` sequences; reads of what was never written show as NaN.
    pub fn session(&self, slots: u32) -> Session {
        let options = SessionOptions { slots, poison: true, ..SessionOptions::default() };
        Session::new(self.open(), &options).expect("the engine starts")
    }

    /// The largest relative error of a layer against the reference evaluator.
    pub fn disagreement(&self) -> f64 {
        let layers = self.summary["agreement"]["layers"].as_array().expect("the engine was compared");
        assert!(!layers.is_empty());
        let relative = |l: &Value| l["relative"].as_f64().unwrap_or(f64::INFINITY);
        layers.iter().map(relative).fold(0.0, f64::max)
    }

    /// What `eval` says on a text.
    pub fn eval(&self, text: &Path, args: &[&str]) -> Value {
        let head = [OsStr::new("eval"), self.path.as_os_str(), OsStr::new("--text"), text.as_os_str()];
        json(head.into_iter().chain(args.iter().map(OsStr::new)))
    }
}

/// The logits of all tokens of a text, from an empty state.
pub fn logits(session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let mut all = vec![];
    session.reset(0).expect("slot 0 exists");
    session.score(0, tokens, &mut |_, row| all.extend_from_slice(row)).expect("the text fits");
    all
}

/// The prompt and the `n` most likely tokens after it.
pub fn greedy(session: &mut Session, prompt: &[u32], n: usize) -> Vec<u32> {
    session.reset(0).expect("slot 0 exists");
    let mut ids = prompt.to_vec();
    let mut next = sample::greedy(session.prefill(0, prompt, 1).expect("the prompt fits"));
    for i in 0..n {
        let token = next.expect("logits are numbers");
        ids.push(token);
        if i + 1 < n {
            next = sample::greedy(session.decode(0, token).expect("the text fits"));
        }
    }
    ids
}

/// Tensors of a file of known results.
pub struct Golden(Vec<u8>);

impl Golden {
    pub fn open(path: &Path) -> Golden {
        Golden(std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    fn tensor(&self, name: &str, ty: safetensors::Dtype) -> (Vec<usize>, Vec<u8>) {
        let file = safetensors::SafeTensors::deserialize(&self.0).expect("a safetensors file");
        let t = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(t.dtype(), ty, "{name}");
        (t.shape().to_vec(), t.data().to_vec())
    }

    /// The names of all tensors.
    pub fn names(&self) -> Vec<String> {
        let file = safetensors::SafeTensors::deserialize(&self.0).expect("a safetensors file");
        let mut names: Vec<String> = file.names().into_iter().map(String::from).collect();
        names.sort();
        names
    }

    /// The elements of a float tensor.
    pub fn floats(&self, name: &str) -> Vec<f32> {
        let bytes = self.tensor(name, safetensors::Dtype::F32).1;
        bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
    }

    /// The elements of a tensor of ids.
    pub fn ids(&self, name: &str) -> Vec<u32> {
        let bytes = self.tensor(name, safetensors::Dtype::I64).1;
        let number = |b: &[u8]| i64::from_le_bytes(b.try_into().expect("eight bytes"));
        bytes.chunks(8).map(|b| u32::try_from(number(b)).expect("ids are small")).collect()
    }

    /// The shape of a tensor of ids.
    pub fn shape_of_ids(&self, name: &str) -> Vec<usize> {
        self.tensor(name, safetensors::Dtype::I64).0
    }
}

/// The largest difference of two lists of numbers.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(!a.is_empty());
    let apart = a.iter().zip(b).map(|(x, y)| (x - y).abs());
    apart.fold(0.0, |most, d| if d.is_nan() { f32::INFINITY } else { most.max(d) })
}

/// The relative distance of two lists of numbers.
pub fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let (mut apart, mut norm) = (0.0, 0.0);
    for (&x, &y) in a.iter().zip(b) {
        apart += (f64::from(x) - f64::from(y)).powi(2);
        norm += f64::from(y).powi(2);
    }
    if apart.is_nan() { f64::INFINITY } else { (apart / norm.max(1e-30)).sqrt() }
}

/// Checks that `got` is within `share` of `want`.
pub fn within(what: &str, got: f64, want: f64, share: f64) {
    let off = (got / want - 1.0).abs();
    eprintln!("{what}: {got:.5}, expected {want:.5} ({:.4} %)", off * 100.0);
    assert!(off <= share, "{what}: {got}, expected {want}");
}

/// Every file under a folder, with its path from there.
pub fn files_under(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.expect("folders are readable").path();
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path.strip_prefix(folder).expect("it was found there").to_path_buf();
                found.insert(name, std::fs::read(&path).expect("files are readable"));
            }
        }
    }
    found
}

/// A NumPy array of token ids, row by row.
pub fn ids_array(rows: &[Vec<i32>]) -> Vec<u8> {
    let shape = (rows.len(), rows.first().map_or(0, Vec::len));
    let header = format!("{{'descr': '<i4', 'fortran_order': False, 'shape': {shape:?}, }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.bytes());
    bytes.extend(rows.iter().flatten().flat_map(|id| id.to_le_bytes()));
    bytes
}

/// Copies the files of a folder into a new one.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("the target folder is writable");
    for (name, bytes) in files_under(from) {
        std::fs::write(to.join(name), bytes).expect("the target folder is writable");
    }
}
