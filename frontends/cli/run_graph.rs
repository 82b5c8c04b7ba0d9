//! `quantc run MODEL.onnx`: evaluates a graph on arrays.

use crate::failure::Outcome;
use crate::output;
use quantc_frontends::{npy, onnx};
use quantc_ir::diag::Diag;
use quantc_ir::eval::{Evaluator, Tensor};
use quantc_ir::weights::Store;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The largest array that is read, in bytes.
const MAX_ARRAY: u64 = 1 << 32;

/// Arguments about graphs.
#[derive(clap::Args)]
pub struct Arrays {
    /// An input of an `.onnx` file: an array as `.npy`, or a tensor as `.pb`. May be given several times.
    #[arg(long = "input", value_name = "NAME=FILE", value_parser = input)]
    pub inputs: Vec<(String, PathBuf)>,
    /// The folder that outputs of an `.onnx` file are written to, each as `NAME.npy`.
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// Reads `NAME=FILE`.
fn input(text: &str) -> Result<(String, PathBuf), String> {
    let (name, file) = text.split_once('=').ok_or("expected NAME=FILE")?;
    Ok((name.into(), file.into()))
}

fn read(path: &Path) -> Outcome<Tensor> {
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
    let mut given: BTreeMap<String, Tensor> = BTreeMap::new();
    for (name, path) in &args.inputs {
        given.insert(name.clone(), read(path)?);
    }
    let names = onnx::inputs(model)?;
    if let Some(unknown) = given.keys().find(|n| !names.contains(n)) {
        let known = names.join(", ");
        let text = format!("the model has no input `{unknown}`");
        return Err(Diag::input(text).help(format!("its inputs are {known}")).in_file(&file).into());
    }
    if let Some(missing) = names.iter().find(|n| !given.contains_key(*n)) {
        let text = format!("the input `{missing}` is not given");
        return Err(Diag::input(text).help(format!("add --input {missing}=FILE")).in_file(&file).into());
    }
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
    let mut rows = vec![];
    for (name, tensor) in imported.outputs.iter().zip(&outputs) {
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
        return output::json(&json!({ "outputs": outputs, "seconds": seconds, "by": "reference evaluator" }));
    }
    for (name, ty, file) in rows {
        output::line(&format!("{name}  {ty}{}", file.map(|f| format!("  {f}")).unwrap_or_default()))?;
    }
    eprintln!("evaluated in {seconds:.2} s by the reference evaluator");
    Ok(())
}
