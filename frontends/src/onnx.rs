//! ONNX files: graphs of other people's exporters.
//!
//! [`import`] reads a model into a [`Module`]. The file is mapped and decoded without copying what initializers hold;
//! they, and external data, become weights that are ranges of the files.
//!
//! What holds:
//! - Every operator is declared once, in the file of its family under `onnx/ops/`; [`operators`] lists them. What a
//!   model has beyond them is reported all at once, and attributes that an importer does not read are refused: nothing
//!   of a model is passed over.
//! - What can be known when the model is compiled is: constants are folded, functions and branches inlined, loops of
//!   known length unrolled. What operators need to know (shapes, axes, numbers of things) and is computed from inputs
//!   is an error that names the inputs; [`Options::fixed`] gives them values.
//! - Extents with names are symbols: one letter each, told among the module's facts.
//! - Files are untrusted: nesting, calls of functions and numbers of nodes are bounded, tensors are compared with the
//!   bytes that are there before memory is taken for them, external data stays in the model's folder, and every error
//!   names the node and the field.

mod build;
mod extents;
mod graph;
mod node;
mod ops;
mod proto;
mod tensor;
mod text;

pub use ops::{Operator, operators};
pub use text::{Bind, TextOptions, import_text, is_text};

use crate::json::shown;
use build::{Build, Val};
use graph::{Importer, Scope};
use prost::Message;
use prost::bytes::Bytes;
use proto::{GraphProto, ModelProto, TensorProto, TensorType, ValueInfoProto};
use quantc_ir::diag::{Diag, Diags, Loc, Result};
use quantc_ir::eval::Tensor;
use quantc_ir::module::Module;
use quantc_ir::ops::Reshape;
use quantc_ir::ty::{Dim, Shape, TensorTy};
use quantc_ir::weights::{Shard, Store};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What to import otherwise than the file says.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Numbers for named extents.
    pub dims: BTreeMap<String, u64>,
    /// Extents of inputs, which give their numbers to named ones.
    pub shapes: BTreeMap<String, Vec<u64>>,
    /// Inputs that are known when the model is compiled.
    pub fixed: BTreeMap<String, Tensor>,
    /// Inputs that follow from the tokens of one sequence, as [`import_text`] says them.
    pub binds: BTreeMap<String, Bind>,
}

/// An imported model.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The graph and where its weights lie.
    pub module: Module,
    /// Names of the inputs, in the order of the parameters of `main`. Those that were fixed are not among them.
    pub inputs: Vec<String>,
    /// Names of the outputs, in the order of the results of `main`.
    pub outputs: Vec<String>,
    /// What the user should know although nothing is wrong, one sentence each.
    pub notes: Vec<String>,
}

/// Why a model was not imported.
#[derive(Clone, Debug)]
pub struct Refused {
    /// What is wrong.
    pub problems: Diags,
    /// Inputs that would have to be known when the model is compiled.
    pub needs: Vec<String>,
}

impl From<Refused> for Diags {
    fn from(refused: Refused) -> Diags {
        refused.problems
    }
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.problems.fmt(f)
    }
}

/// Whether `path` is called as ONNX files are.
pub fn is_onnx(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("onnx"))
}

/// Imports the model at `path` and maps its files into `store`.
pub fn import(path: &Path, store: &Store, options: &Options) -> Result<Imported, Refused> {
    let file = path.display().to_string();
    import_inner(path, store, options).map_err(|mut refused| {
        for diag in &mut refused.problems.0 {
            diag.file.get_or_insert(file.clone());
        }
        refused
    })
}

/// The names of a model's inputs, without those that initializers give values to.
pub fn inputs(path: &Path) -> Result<Vec<String>> {
    let store = Store::in_memory();
    let file = path.display().to_string();
    let (bytes, _) = map(path, &store).map_err(|e| e.in_file(&file))?;
    let model = ModelProto::decode(bytes)
        .map_err(|e| Diag::input(format!("this is no ONNX model: {e}")).in_file(&file))?;
    let graph = model.graph.unwrap_or_default();
    let known: BTreeSet<&String> = graph.initializer.iter().filter_map(|t| t.name.as_ref()).collect();
    let names = graph.input.iter().filter_map(|i| i.name.clone());
    Ok(names.filter(|n| !known.contains(n)).collect())
}

/// The tensor in the file at `path`: a message of type `TensorProto`, as test data of models is stored.
pub fn read_tensor(path: &Path) -> Result<Tensor> {
    let store = Store::in_memory();
    let (bytes, mut module) = map(path, &store)?;
    let read = TensorProto::decode(bytes.clone()).map_err(|e| Diag::input(format!("this is no tensor: {e}")));
    let tensor = read.and_then(|message| {
        let constant = tensor::Files::new(path, bytes, &store).constant(&message, &mut module)?;
        Ok((*constant.tensor()?).clone())
    });
    tensor.map_err(|e| e.in_file(path.display().to_string()))
}

/// The bytes of a file, mapped as shard 0 of a new module.
fn map(path: &Path, store: &Store) -> Result<(Bytes, Module)> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let mut module = Module::new(crate::arch::module_name(&path.with_extension("")));
    let shard = module.shards.push(Shard { file: name });
    store.add_shard(shard, path)?;
    let bytes = store.shard(shard).map(Bytes::from_owner);
    Ok((bytes.ok_or_else(|| Diag::bug("a shard is missing after it was added"))?, module))
}

fn import_inner(path: &Path, store: &Store, options: &Options) -> Result<Imported, Refused> {
    let refuse = |problems: Diags| Refused { problems, needs: vec![] };
    let (bytes, module) = map(path, store).map_err(|e| refuse(e.into()))?;
    let model = ModelProto::decode(bytes.clone())
        .map_err(|e| refuse(Diag::input(format!("this is no ONNX model: {e}")).into()))?;
    let Some(graph) = &model.graph else {
        return Err(refuse(Diag::input("this is no ONNX model: it has no graph").into()));
    };
    let versions = graph::opsets(&model.opset_import);
    let mut build = Build::new(&module.name, bytes.len() as u64, store);
    build.module.shards = module.shards;
    let files = tensor::Files::new(path, bytes, store);
    let mut importer = Importer::new(build, files, &model.functions).map_err(|e| refuse(e.into()))?;
    let unsupported = importer.unsupported(graph, &versions);
    if !unsupported.is_empty() {
        return Err(refuse(crate::checkpoint::capped(unsupported)));
    }
    let facts = [
        ("producer", model.producer_name.clone().unwrap_or_default()),
        ("opset", versions.get("").map(i64::to_string).unwrap_or_default()),
    ];
    for (key, value) in facts.into_iter().filter(|(_, v)| !v.is_empty()) {
        importer.build.module.facts.insert(format!("onnx.{key}"), shown(&value));
    }
    let imported = Main {
        importer: &mut importer,
        options,
        dims: options.dims.clone(),
        symbols: BTreeMap::new(),
        named: BTreeSet::new(),
        ids: BTreeMap::new(),
        notes: vec![],
    }
    .import(graph, Scope::new(versions));
    let needs: Vec<String> = importer.build.needs.iter().cloned().collect();
    imported.map_err(|e| Refused { problems: e.into(), needs })
}

/// The import of the main graph.
struct Main<'i, 'a> {
    importer: &'i mut Importer<'a>,
    options: &'i Options,
    /// Numbers of named extents.
    dims: BTreeMap<String, u64>,
    /// Symbols of named extents.
    symbols: BTreeMap<String, char>,
    /// Names of extents that inputs have.
    named: BTreeSet<String>,
    /// Ids that an engine gives for each token.
    ids: BTreeMap<&'static str, Val>,
    notes: Vec<String>,
}

impl Main<'_, '_> {
    fn import(mut self, graph: &GraphProto, mut scope: Scope<'_>) -> Result<Imported> {
        self.importer.initializers(graph, &mut scope)?;
        self.sequence(graph)?;
        let constants: BTreeSet<&str> = graph.initializer.iter().filter_map(|t| t.name.as_deref()).collect();
        let mut inputs = vec![];
        for info in &graph.input {
            let name = info.name.as_deref().unwrap_or_default();
            if name.is_empty() {
                return Err(Diag::input("an input has no name"));
            }
            if constants.contains(name) {
                // Files of the first versions list initializers among the inputs.
                continue;
            }
            let placed = |e: Diag| e.at(Loc::Item(format!("input `{}`", shown(name))));
            let val = match (self.options.fixed.get(name), self.options.binds.get(name)) {
                (Some(tensor), _) => self.importer.build.constant(tensor.clone()),
                (None, Some(&bind)) => self.bound(info, bind).map_err(placed)?,
                (None, None) => {
                    let ty = self.input_type(info).map_err(placed)?;
                    inputs.push(name.to_string());
                    self.importer.build.input(name, ty)
                }
            };
            scope.set(name, Some(val))?;
        }
        self.importer.run(&graph.node, &mut scope)?;
        let mut results = vec![];
        for (info, val) in graph.output.iter().zip(self.importer.outputs(graph, &scope)?) {
            let name = info.name.as_deref().unwrap_or_default();
            let value =
                self.result(&val).map_err(|e| e.at(Loc::Item(format!("output `{}`", shown(name)))))?;
            results.push(value);
        }
        if results.is_empty() {
            return Err(Diag::input("the graph has no outputs"));
        }
        let mut module = std::mem::take(&mut self.importer.build.module);
        module.main.results = results;
        module.main.drop_dead();
        for (name, symbol) in &self.symbols {
            module.facts.insert(format!("extent.{symbol}"), shown(name));
        }
        for name in self.options.dims.keys().filter(|n| !self.named.contains(*n)) {
            self.notes.push(format!("no extent is called `{}`", shown(name)));
        }
        let names = |info: &ValueInfoProto| info.name.clone().unwrap_or_default();
        Ok(Imported { module, inputs, outputs: graph.output.iter().map(names).collect(), notes: self.notes })
    }

    /// A result: constants are not computed, so there must be an op that yields them.
    fn result(&mut self, val: &Val) -> Result<quantc_ir::entity::ValueId> {
        let build = &mut self.importer.build;
        let value = build.value(val)?;
        match val {
            Val::Const(c) => build.module.main.append(Reshape { shape: c.ty.shape.clone() }, &[value], None),
            _ => Ok(value),
        }
    }

    fn input_type(&mut self, info: &ValueInfoProto) -> Result<TensorTy> {
        let tensor: Option<&TensorType> = info.r#type.as_ref().and_then(|t| t.tensor_type.as_ref());
        let tensor = tensor.ok_or_else(|| {
            Diag::input("`type` is not a tensor: sequences, maps and optional values are not supported")
        })?;
        let elem = tensor::elem(tensor.elem_type.unwrap_or(0).into())?;
        let shape = tensor.shape.as_ref().ok_or_else(|| Diag::input("`type.shape` is missing"))?;
        if shape.dim.len() > quantc_ir::text::MAX_RANK {
            return Err(Diag::input(format!("`type.shape` has {} axes", shape.dim.len())));
        }
        let given = self.options.shapes.get(info.name.as_deref().unwrap_or_default());
        if let Some(given) = given.filter(|g| g.len() != shape.dim.len()) {
            let (got, want) = (given.len(), shape.dim.len());
            return Err(Diag::input(format!("it is given {got} extents, but has {want}")));
        }
        let mut dims = vec![];
        for (axis, dim) in shape.dim.iter().enumerate() {
            let given = given.map(|g| g[axis]);
            let param = dim.dim_param.clone().filter(|p| !p.is_empty());
            self.named.extend(param.clone());
            dims.push(match (dim.dim_value, param) {
                (Some(n), _) => {
                    let bad = || Diag::input(format!("`type.shape` has the extent {n}"));
                    Dim::Static(u64::try_from(n).map_err(|_| bad())?)
                }
                (None, Some(param)) => match given {
                    Some(n) if *self.dims.entry(param.clone()).or_insert(n) == n => Dim::Static(n),
                    Some(n) => {
                        let text =
                            format!("the extent `{}` is given as {n}, and as another before", shown(&param));
                        return Err(Diag::input(text));
                    }
                    None => self.symbol(&param)?,
                },
                (None, None) if let Some(n) = given => Dim::Static(n),
                (None, None) => {
                    let name = info.name.as_deref().unwrap_or_default();
                    self.symbol(&format!("{name}.{axis}"))?
                }
            });
        }
        let ty = TensorTy { elem, shape: Shape(dims) };
        if ty.shape.dims().is_some() && ty.stored_bytes().is_none() {
            return Err(Diag::input(format!("`type`: {ty} is too large")));
        }
        Ok(ty)
    }

    /// The extent called `name`.
    fn symbol(&mut self, name: &str) -> Result<Dim> {
        if let Some(&n) = self.dims.get(name) {
            return Ok(Dim::Static(n));
        }
        if let Some(&c) = self.symbols.get(name) {
            return Ok(Dim::Sym(c));
        }
        // `t` counts what engines take one row each for; `s` and `r` mean something else, and `x` parts extents.
        let own = name.chars().map(|c| c.to_ascii_lowercase());
        let mut letters = std::iter::once('t').chain(own).chain('a'..='z');
        let free = |c: &char| {
            c.is_ascii_lowercase() && !"srx".contains(*c) && self.symbols.values().all(|taken| taken != c)
        };
        let letter = letters.find(free).ok_or_else(|| {
            Diag::input("there are more than 23 extents with names").help("give some of them numbers")
        })?;
        self.symbols.insert(name.into(), letter);
        Ok(Dim::Sym(letter))
    }
}
