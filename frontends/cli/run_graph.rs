//! `quantc run` of graphs over arrays: `.onnx` files by the reference evaluator, and engines made of them.

use crate::failure::Outcome;
use crate::output;
use crate::subject;
use quantc_codegen::arrays::io;
use quantc_frontends::{npy, onnx};
use quantc_ir::diag::Diag;
use quantc_ir::eval::{Evaluator, Tensor};
use quantc_ir::weights::Store;
use quantc_runtime::session::{Session, SessionOptions};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The largest array that is read, in bytes.
const MAX_ARRAY: u64 = 1 << 32;

/// Arguments about graphs.
#[derive(clap::Args)]
pub struct Arrays {
    /// An input of an `.onnx` file or its engine: an array as `.npy`, or a tensor as `.pb`. May be given several times.
    #[arg(long = "input", value_name = "NAME=FILE", value_parser = input)]
    pub inputs: Vec<(String, PathBuf)>,
    /// The folder that outputs of an `.onnx` file or its engine are written to, each as `NAME.npy`.
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// Reads `NAME=FILE`.
pub fn input(text: &str) -> Result<(String, PathBuf), String> {
    let (name, file) = text.split_once('=').ok_or("expected NAME=FILE")?;
    Ok((name.into(), file.into()))
}

/// Reads an array as `.npy`, or a tensor as `.pb`.
pub fn read_tensor(path: &Path) -> Outcome<Tensor> {
    let file = path.display().to_string();
    if path.extension().is_some_and(|e| e == "pb") {
        return Ok(onnx::read_tensor(path)?);
    }
    let problem = |e: std::io::Error| Diag::input(format!("cannot read: {e}")).in_file(&file);
    let size = std::fs::metadata(path).map_err(problem)?.len();
    if size > MAX_ARRAY {
        return Err(Diag::input(format!("it has {size} bytes, more than {MAX_ARRAY}")).in_file(&file).into());
    }
    let bytes = std::fs::read(path).map_err(problem)?;
    Ok(npy::read(&bytes).map_err(|e| e.in_file(&file))?)
}

/// Evaluates the model with the reference evaluator.
pub fn run(model: &Path, args: &Arrays, json: bool) -> Outcome {
    let file = model.display().to_string();
    let names = onnx::inputs(model)?;
    let given = given(args, &names, "model", &file)?;
    let shapes = given.iter().map(|(n, t)| (n.clone(), t.ty.shape.dims().unwrap_or_default())).collect();
    let mut options = onnx::Options { shapes, ..onnx::Options::default() };
    let store = Store::in_memory();
    let imported = loop {
        match onnx::import(model, &store, &options) {
            Ok(imported) => break imported,
            Err(refused) => {
                // Shapes and axes that are inputs are known here.
                let fresh: Vec<&String> =
                    refused.needs.iter().filter(|n| !options.fixed.contains_key(*n)).collect();
                if fresh.is_empty() {
                    return Err(refused.problems.into());
                }
                for name in fresh {
                    options.fixed.insert(name.clone(), given[name].clone());
                }
            }
        }
    };
    imported.notes.iter().for_each(|note| eprintln!("note: {note}"));
    crate::opt::verify(&imported.module)?;
    let inputs: Vec<Tensor> = imported.inputs.iter().map(|n| given[n].clone()).collect();
    let begun = Instant::now();
    let mut evaluator = Evaluator::new(&imported.module, &store)?;
    let outputs = evaluator.step(&inputs, u64::MAX).map_err(|e| e.in_file(&file))?;
    let seconds = begun.elapsed().as_secs_f64();
    tell(&imported.outputs, &outputs, args, json, seconds, "the reference evaluator")
}

/// An engine over arrays.
pub struct Net {
    session: Session,
}

impl Net {
    /// Opens an engine in a folder.
    pub fn open(path: &Path, threads: usize) -> Outcome<Net> {
        let engine = subject::open_engine(path, true)?;
        let options = SessionOptions { threads, ..SessionOptions::default() };
        Ok(Net { session: Session::new(engine, &options)? })
    }

    /// The session.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Names of the inputs, in order.
    pub fn inputs(&self) -> Vec<String> {
        self.session.engine().manifest().array_inputs.iter().map(|a| a.name.clone()).collect()
    }

    /// Names of the outputs, in order.
    pub fn outputs(&self) -> Vec<String> {
        self.session.engine().manifest().array_outputs.iter().map(|a| a.name.clone()).collect()
    }

    /// Runs on tensors, in the order of the inputs.
    pub fn run(&mut self, inputs: &[Tensor]) -> Outcome<Vec<Tensor>> {
        let engine = std::sync::Arc::clone(self.session.engine());
        for (array, tensor) in engine.manifest().array_inputs.iter().zip(inputs) {
            let want = io::ty_of(array)?;
            if tensor.ty != want {
                let text =
                    format!("input `{}` is of type {}, the engine takes {want}", array.name, tensor.ty);
                return Err(Diag::input(text).into());
            }
        }
        let bytes: Vec<Vec<u8>> = inputs.iter().map(io::to_bytes).collect::<Result<_, _>>()?;
        let refs: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
        self.session.run_arrays(&refs)?;
        let outputs = engine.manifest().array_outputs.iter().enumerate();
        outputs.map(|(i, a)| Ok(io::from_bytes(&io::ty_of(a)?, self.session.array(i)?)?)).collect()
    }
}

/// Runs an engine.
pub fn run_engine(path: &Path, args: &Arrays, threads: usize, json: bool) -> Outcome {
    let file = path.display().to_string();
    let mut net = Net::open(path, threads)?;
    let names = net.inputs();
    let given = given(args, &names, "engine", &file)?;
    let inputs: Vec<Tensor> = names.iter().map(|n| given[n].clone()).collect();
    let begun = Instant::now();
    let outputs = net.run(&inputs)?;
    let seconds = begun.elapsed().as_secs_f64();
    tell(&net.outputs(), &outputs, args, json, seconds, "the engine")
}

/// The tensors given for inputs, all of which must be there.
fn given(args: &Arrays, names: &[String], what: &str, file: &str) -> Outcome<BTreeMap<String, Tensor>> {
    let mut given: BTreeMap<String, Tensor> = BTreeMap::new();
    for (name, path) in &args.inputs {
        given.insert(name.clone(), read_tensor(path)?);
    }
    if let Some(unknown) = given.keys().find(|n| !names.contains(n)) {
        let known = names.join(", ");
        let text = format!("the {what} has no input `{unknown}`");
        return Err(Diag::input(text).help(format!("its inputs are {known}")).in_file(file).into());
    }
    if let Some(missing) = names.iter().find(|n| !given.contains_key(*n)) {
        let text = format!("the input `{missing}` is not given");
        return Err(Diag::input(text).help(format!("add --input {missing}=FILE")).in_file(file).into());
    }
    Ok(given)
}

/// Writes outputs where that is asked for, and tells of them.
fn tell(names: &[String], outputs: &[Tensor], args: &Arrays, json: bool, seconds: f64, by: &str) -> Outcome {
    let mut rows = vec![];
    for (name, tensor) in names.iter().zip(outputs) {
        let mut written = None;
        if let Some(dir) = &args.output {
            let plain = |c: char| if c.is_ascii_alphanumeric() || "_.-".contains(c) { c } else { '_' };
            let path = dir.join(format!("{}.npy", name.chars().map(plain).collect::<String>()));
            let problem = |e: std::io::Error| {
                Diag::system(format!("cannot write: {e}")).in_file(path.display().to_string())
            };
            std::fs::create_dir_all(dir).map_err(problem)?;
            std::fs::write(&path, npy::write(tensor)?).map_err(problem)?;
            written = Some(path.display().to_string());
        }
        rows.push((name.clone(), tensor.ty.to_string(), written));
    }
    if json {
        let outputs: Vec<_> =
            rows.iter().map(|(name, ty, file)| json!({ "name": name, "type": ty, "file": file })).collect();
        return output::json(
            &json!({ "outputs": outputs, "seconds": seconds, "by": by.trim_start_matches("the ") }),
        );
    }
    for (name, ty, file) in rows {
        output::line(&format!("{name}  {ty}{}", file.map(|f| format!("  {f}")).unwrap_or_default()))?;
    }
    eprintln!("evaluated in {seconds:.4} s by {by}");
    Ok(())
}
