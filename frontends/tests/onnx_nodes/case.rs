//! One node test.

use quantc_codegen::arrays::io;
use quantc_codegen::engine::{self, GraphRequest};
use quantc_codegen::targets;
use quantc_frontends::onnx::{self, Imported, Options, Refused};
use quantc_ir::diag::Kind;
use quantc_ir::eval::{Evaluator, Tensor};
use quantc_ir::text;
use quantc_ir::ty::ElemTy;
use quantc_ir::verify::verify;
use quantc_ir::weights::Store;
use quantc_runtime::engine::{Engine, OpenOptions};
use quantc_runtime::format::Array;
use quantc_runtime::session::{Session, SessionOptions};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A node test, and what its file says of it.
pub struct Case {
    /// The folder's name.
    pub name: String,
    /// The operator that is tested: for expanded ones that of the case they are expanded from.
    pub op: String,
    /// The domain of the operator.
    pub domain: String,
    /// The version of that domain.
    pub opset: i64,
    dir: PathBuf,
}

/// What became of a case.
pub enum Verdict {
    /// The recorded outputs.
    Passed {
        /// Whether inputs were given when the model was imported.
        fixed: bool,
        /// What became of it as an engine.
        engine: Compiled,
    },
    /// Not imported, and why.
    Refused(String),
    /// Other outputs, or a panic.
    Failed(String),
}

/// What became of a case as an engine for this machine.
pub enum Compiled {
    /// The recorded outputs.
    Passed,
    /// Not compiled, and why.
    Refused(String),
    /// Other outputs, or a panic.
    Failed(String),
}

/// The fields of a message that this test reads: its own reader, so that the importer's is not trusted with the table.
fn fields(mut bytes: &[u8]) -> Vec<(u64, u64, &[u8])> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let (mut n, mut shift) = (0, 0);
        while let Some((&b, rest)) = bytes.split_first() {
            *bytes = rest;
            n |= u64::from(b & 127) << shift;
            shift += 7;
            if b < 128 {
                break;
            }
        }
        n
    }
    let mut out = vec![];
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let (number, len) = match key & 7 {
            0 => (varint(&mut bytes), 0),
            1 => (0, 8),
            5 => (0, 4),
            _ => (0, varint(&mut bytes) as usize),
        };
        let (value, rest) = bytes.split_at(len);
        bytes = rest;
        out.push((key >> 3, number, value));
    }
    out
}

fn text_of(fields: &[(u64, u64, &[u8])], tag: u64) -> String {
    let found = fields.iter().find(|f| f.0 == tag);
    found.map(|f| String::from_utf8_lossy(f.2).into_owned()).unwrap_or_default()
}

impl Case {
    /// Every case in a folder, in order of name.
    pub fn all(folder: &Path) -> Vec<Case> {
        let entries = std::fs::read_dir(folder).expect("the folder is readable");
        let mut dirs: Vec<PathBuf> = entries.map(|e| e.expect("the folder is readable").path()).collect();
        dirs.retain(|d| d.join("model.onnx").is_file());
        dirs.sort();
        dirs.into_iter().map(Case::read).collect()
    }

    fn read(dir: PathBuf) -> Case {
        let name = dir.file_name().expect("folders have names").to_string_lossy().into_owned();
        // What a case is expanded from stands beside it.
        let base = name.find("_expanded").map(|at| dir.with_file_name(&name[..at]));
        let base = base.filter(|b| b.join("model.onnx").is_file()).unwrap_or_else(|| dir.clone());
        let (op, domain, _) = Case::head(&base);
        let opset = Case::head(&dir).2;
        Case { name, op, domain, opset, dir }
    }

    /// The operator of the last node with one, its domain, and the version of the default domain or that one.
    fn head(dir: &Path) -> (String, String, i64) {
        let bytes = std::fs::read(dir.join("model.onnx")).expect("the model is readable");
        let model = fields(&bytes);
        let graph = model.iter().find(|f| f.0 == 7).map(|f| fields(f.2)).unwrap_or_default();
        let nodes: Vec<_> = graph.iter().filter(|f| f.0 == 1).map(|f| fields(f.2)).collect();
        let plain = |n: &&Vec<(u64, u64, &[u8])>| text_of(n, 4) != "Constant";
        let node = nodes.iter().rfind(plain).or(nodes.last()).cloned().unwrap_or_default();
        let domain = text_of(&node, 7);
        let versions: Vec<_> = model.iter().filter(|f| f.0 == 8).map(|f| fields(f.2)).collect();
        let version = versions.iter().find(|v| text_of(v, 1) == domain);
        let opset = version.and_then(|v| v.iter().find(|f| f.0 == 2)).map_or(0, |f| f.1 as i64);
        (text_of(&node, 4), domain, opset)
    }

    /// Imports, evaluates and compares.
    pub fn run(&self) -> Verdict {
        let run = catch_unwind(AssertUnwindSafe(|| self.run_inner()));
        run.unwrap_or_else(|panic| Verdict::Failed(format!("panicked: {}", said(&*panic))))
    }

    fn run_inner(&self) -> Verdict {
        let mut options = Options::default();
        let (imported, store) = loop {
            let store = Store::in_memory();
            match onnx::import(&self.dir.join("model.onnx"), &store, &options) {
                Ok(imported) => break (imported, store),
                Err(refused) => match self.fix(&refused, &mut options) {
                    true => continue,
                    false => return Verdict::Refused(refused.to_string()),
                },
            }
        };
        if let Err(e) = verify(&imported.module) {
            return Verdict::Failed(format!("not well-formed: {e}"));
        }
        let printed = text::print(&imported.module);
        match text::parse(&printed, "printed.qir") {
            Ok(parsed) if text::same(&parsed.module, &imported.module) => {}
            Ok(_) => return Verdict::Failed("the printed module reads back as another".into()),
            Err(e) => return Verdict::Failed(format!("the printed module is not read: {e}")),
        }
        let outputs = match self.evaluate(&imported, &store, &options) {
            Ok(outputs) => outputs,
            Err(e) => return Verdict::Failed(format!("evaluation: {e}")),
        };
        for (i, got) in outputs.iter().enumerate() {
            if let Err(why) = self.compare(i, got) {
                return Verdict::Failed(format!("output {i}: {why}"));
            }
        }
        let run = catch_unwind(AssertUnwindSafe(|| self.compiled(&imported, &store, &options)));
        let engine = run.unwrap_or_else(|panic| Compiled::Failed(format!("panicked: {}", said(&*panic))));
        Verdict::Passed { fixed: !options.fixed.is_empty(), engine }
    }

    /// Compiles for this machine, runs, and compares.
    fn compiled(&self, imported: &Imported, store: &Store, options: &Options) -> Compiled {
        let folder = match tempfile::tempdir() {
            Ok(folder) => folder,
            Err(e) => return Compiled::Failed(format!("no folder: {e}")),
        };
        let out = folder.path().join("engine");
        let request = GraphRequest {
            module: &imported.module,
            store,
            target: targets::host(),
            inputs: &imported.inputs,
            outputs: &imported.outputs,
            facts: vec![],
            report: serde_json::Map::new(),
        };
        if let Err(e) = engine::write_graph(request, &out) {
            let refused = e.kind == Kind::Target;
            return if refused { Compiled::Refused(e.message) } else { Compiled::Failed(e.to_string()) };
        }
        match self.run_engine(&out, imported, options) {
            Ok(outputs) => {
                for (i, got) in outputs.iter().enumerate() {
                    if let Err(why) = self.compare(i, got) {
                        return Compiled::Failed(format!("output {i}: {why}"));
                    }
                }
                Compiled::Passed
            }
            Err(e) => Compiled::Failed(format!("running: {e}")),
        }
    }

    fn run_engine(
        &self,
        folder: &Path,
        imported: &Imported,
        options: &Options,
    ) -> Result<Vec<Tensor>, String> {
        let engine = Engine::open(folder, &OpenOptions::default()).map_err(|e| e.to_string())?;
        // What was never written shows.
        let session = SessionOptions { threads: 2, poison: true, ..SessionOptions::default() };
        let mut session = Session::new(Arc::new(engine), &session).map_err(|e| e.to_string())?;
        let inputs = self.inputs(imported, options)?;
        let bytes: Vec<Vec<u8>> =
            inputs.iter().map(io::to_bytes).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
        let refs: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
        session.run_arrays(&refs).map_err(|e| e.to_string())?;
        let outputs = session.engine().manifest().array_outputs.iter().enumerate();
        let one = |(i, array): (usize, &Array)| {
            let bytes = session.array(i).map_err(|e| e.to_string())?;
            io::ty_of(array).and_then(|ty| io::from_bytes(&ty, bytes)).map_err(|e| e.to_string())
        };
        outputs.map(one).collect()
    }

    fn data(&self, kind: &str, i: usize) -> Result<Tensor, String> {
        onnx::read_tensor(&self.dir.join(format!("test_data_set_0/{kind}_{i}.pb"))).map_err(|e| e.to_string())
    }

    /// The names of the model's inputs, in the order of the data files.
    fn input_names(&self) -> Vec<String> {
        let bytes = std::fs::read(self.dir.join("model.onnx")).expect("the model is readable");
        let graph = fields(&bytes).into_iter().find(|f| f.0 == 7).map(|f| f.2).unwrap_or_default();
        fields(graph).iter().filter(|f| f.0 == 11).map(|f| text_of(&fields(f.2), 1)).collect()
    }

    /// Gives the inputs that have to be known; whether there were any new ones.
    fn fix(&self, refused: &Refused, options: &mut Options) -> bool {
        let names = self.input_names();
        let mut new = false;
        for name in &refused.needs {
            let Some(i) = names.iter().position(|n| n == name) else { continue };
            let Ok(tensor) = self.data("input", i) else { continue };
            new |= options.fixed.insert(name.clone(), tensor).is_none();
        }
        new
    }

    /// What the graph takes when it runs.
    fn inputs(&self, imported: &Imported, options: &Options) -> Result<Vec<Tensor>, String> {
        let names = self.input_names();
        let mut inputs = vec![];
        for (i, name) in names.iter().enumerate().filter(|(_, n)| !options.fixed.contains_key(*n)) {
            if imported.inputs.contains(name) {
                inputs.push(self.data("input", i)?);
            }
        }
        Ok(inputs)
    }

    fn evaluate(&self, imported: &Imported, store: &Store, options: &Options) -> Result<Vec<Tensor>, String> {
        let inputs = self.inputs(imported, options)?;
        let mut evaluator = Evaluator::new(&imported.module, store).map_err(|e| e.to_string())?;
        evaluator.step(&inputs, u64::MAX).map_err(|e| e.to_string())
    }

    /// Compares with the recorded output, as loosely as the standard's own runner does.
    fn compare(&self, i: usize, got: &Tensor) -> Result<(), String> {
        let want = self.data("output", i)?;
        if got.ty != want.ty {
            return Err(format!("has type {}, expected {}", got.ty, want.ty));
        }
        if self.name.contains("bernoulli") || self.name.contains("random") {
            return Ok(());
        }
        let exact = want.ty.elem.int().is_some() || want.ty.elem.scheme().is_some();
        if exact && got.data != want.data && want.ty.elem.scheme().is_none_or(|s| s.format.is_int()) {
            return Err(format!("{:?} instead of {:?}", short(&got.reals()), short(&want.reals())));
        }
        let (relative, absolute) = match want.ty.elem {
            ElemTy::F16 => (2e-3, 2e-3),
            ElemTy::Bf16 => (1e-2, 1e-2),
            ElemTy::Q(_) => (0.0, 0.0),
            _ => (1e-3, 1e-6),
        };
        for (at, (g, w)) in got.reals().into_iter().zip(want.reals()).enumerate() {
            let same = g == w || (g.is_nan() && w.is_nan()) || (g - w).abs() <= absolute + relative * w.abs();
            if !same {
                return Err(format!("element {at} is {g} instead of {w}"));
            }
        }
        Ok(())
    }
}

/// What a panic said.
fn said(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or_default()
}

fn short(xs: &[f64]) -> &[f64] {
    &xs[..xs.len().min(12)]
}
