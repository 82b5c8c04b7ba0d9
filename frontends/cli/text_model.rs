//! Models that subcommands compile: folders with a checkpoint, and ONNX files that read text.

use crate::failure::Outcome;
use crate::opt;
use quantc_frontends::arch::Kind;
use quantc_frontends::onnx::{self, Bind, TextOptions};
use quantc_frontends::{ImportOptions, Imported};
use quantc_ir::diag::{Diag, Diags};
use quantc_ir::module::Module;
use quantc_ir::ops::{Attention, Op};
use quantc_ir::weights::Store;
use quantc_passes::pass::{Env, Remark, Session};
use quantc_passes::raise;
use quantc_passes::{Registry, pipeline};
use std::collections::BTreeMap;
use std::path::Path;

/// What inputs of an `.onnx` file are, when it is compiled.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct TextArgs {
    /// What an input of an `.onnx` file is: tokens, types, positions, ones, zeros, empty or a number. Inputs with the names
    /// that exporters of text models use need no word.
    #[arg(long = "bind", value_name = "NAME=WHAT", value_parser = bind)]
    binds: Vec<(String, Bind)>,
    /// A number for an extent that an `.onnx` file gives a name, as in `heads=12`; batches are one without a word.
    #[arg(long = "dim", value_name = "NAME=N", value_parser = crate::import::dim)]
    dims: Vec<(String, u64)>,
    /// The output of an `.onnx` file to compute, instead of the first with a row for each token.
    #[arg(long = "result", value_name = "NAME")]
    result: Option<String>,
}

impl TextArgs {
    /// Whether anything is said that only models of text have.
    #[cfg(feature = "llvm")]
    pub fn says_something(&self) -> bool {
        !self.binds.is_empty() || self.result.is_some()
    }

    /// Numbers for named extents.
    pub fn dims(&self) -> BTreeMap<String, u64> {
        self.dims.iter().cloned().collect()
    }
}

fn bind(text: &str) -> Result<(String, Bind), String> {
    let (name, what) = text.rsplit_once('=').ok_or("expected NAME=WHAT")?;
    Ok((name.into(), Bind::parse(what).map_err(|e| e.message)?))
}

/// Reads a model: a folder with a checkpoint, or an `.onnx` file that reads text, whose ops are raised to those that
/// kernels are made for.
pub fn read_model(path: &Path, store: &Store, context: Option<u32>, text: &TextArgs) -> Outcome<Imported> {
    if path.is_dir() {
        return Ok(quantc_frontends::import(path, store, &ImportOptions { context })?);
    }
    if !onnx::is_onnx(path) {
        let diag =
            Diag::input("a model is a folder with config.json and safetensors files, or an `.onnx` file");
        return Err(diag.in_file(path.display().to_string()).into());
    }
    let options = TextOptions {
        binds: text.binds.iter().cloned().collect(),
        dims: text.dims(),
        output: text.result.clone(),
        context,
    };
    let mut imported = onnx::import_text(path, store, &options).map_err(Diags::from)?;
    opt::verify(&imported.module)?;
    let told = run(&mut imported.module, store, raise::PIPELINE)?;
    let left = told.iter().filter(|r| r.pass == "raise-attention" && r.text.starts_with("left"));
    imported.notes.extend(left.map(|r| format!("attention of {} is {}", r.place, r.text)));
    let place = path.display().to_string();
    finish(&mut imported, context).map_err(|e| e.in_file(place))?;
    if imported.module.main.ops().any(|(_, n)| n.op.is::<Attention>().is_some_and(|a| a.causal)) {
        // Why a decoder could not go on from call to call is told in a remark.
        let told = run(&mut imported.module, store, "add-cache")?;
        imported.notes.extend(told.into_iter().map(|remark| remark.text));
        if imported.module.facts.get("kind").is_some_and(|kind| kind == Kind::Decoder.name()) {
            imported.facts.kind = Kind::Decoder;
        }
    }
    Ok(imported)
}

/// Runs passes; what they told.
fn run(module: &mut Module, store: &Store, text: &str) -> Outcome<Vec<Remark>> {
    let parsed = pipeline::parse(text)?;
    let checked = pipeline::check(&parsed, &Registry::builtin(), module, None, None)?;
    let (env, show) = (Env::new(store), opt::Show::default());
    let report = opt::run_pipeline(module, &checked, env, Session::default(), &show, &mut [])?;
    Ok(report.remarks.0)
}

/// Makes the facts true for the graph as it is now, and says what engines cannot do with it.
fn finish(imported: &mut Imported, context: Option<u32>) -> Result<(), Diag> {
    let module = &mut imported.module;
    let (rows, mixes) =
        (position_rows(module), module.main.ops().any(|(_, n)| matches!(n.op, Op::Attention(_))));
    if let Some(rows) = rows.and_then(|n| u32::try_from(n).ok()) {
        if let Some(asked) = context.filter(|&n| n > rows) {
            let text =
                format!("a context of {asked} tokens is asked for, but the model has {rows} positions");
            return Err(Diag::input(text));
        }
        imported.facts.context = imported.facts.context.min(rows);
    }
    let scores = module.main.ops().any(|(_, n)| matches!(n.op, Op::Dot(_)));
    if scores || !mixes {
        imported
            .notes
            .push("not every product of the graph was understood: `quantc import --raise` shows it".into());
    }
    module.facts.insert("context".into(), imported.facts.context.to_string());
    Ok(())
}

/// The least rows that a table has which is read at the positions of tokens.
fn position_rows(module: &Module) -> Option<u64> {
    let graph = &module.main;
    let rows = |node: &quantc_ir::graph::Node| {
        let of_places = graph.def(node.args[0]).is_some_and(|(_, n)| matches!(n.op, Op::Positions(_)));
        graph.ty(node.args[1]).shape.0.first()?.fixed().filter(|_| of_places)
    };
    graph.ops().filter(|(_, n)| matches!(n.op, Op::Embedding(_))).filter_map(|(_, n)| rows(n)).min()
}
