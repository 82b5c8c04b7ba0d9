//! Text models: graphs that read one sequence of tokens.
//!
//! An engine gives a model the tokens of one sequence. [`import_text`] makes a graph of an exporter fit that: inputs are
//! bound to what follows from the tokens ([`Bind`]), the batch is one, and the length of the sequence is the extent `t`.
//! What an input is bound to is said by the caller or, for the names that exporters of text models use, known; the notes
//! tell what was chosen. What comes out is the same kind of module as a checkpoint's: `tokens`, and `types` if the model
//! has them, go into `main`, rows come out; ops still are those that the exporter wrote.

use super::build::Val;
use super::{Imported as Graph, Main, Options, Refused, proto};
use crate::arch::{self, DEFAULT_CONTEXT, Facts, Imported, Kind, tokens};
use crate::config::Config;
use crate::json::shown;
use proto::{GraphProto, TensorType, ValueInfoProto};
use quantc_ir::diag::{Diag, Loc, Result};
use quantc_ir::entity::ValueId;
use quantc_ir::eval::{Data, Tensor};
use quantc_ir::graph::Def;
use quantc_ir::module::Module;
use quantc_ir::ops::{Cast, Op, Positions, Reshape};
use quantc_ir::ty::{Dim, ElemTy, Shape, TensorTy};
use quantc_ir::weights::Store;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What an input of a text model is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bind {
    /// The tokens of the sequence.
    Tokens,
    /// The type of each token, as encoders of pairs of texts have them.
    Types,
    /// The position of each token.
    Positions,
    /// This number for each token: 1 for masks of tokens that count.
    Number(f64),
    /// Nothing: what was kept of earlier tokens, of which there are none.
    Empty,
}

impl Bind {
    /// Reads what stands behind `NAME=`.
    pub fn parse(text: &str) -> Result<Bind> {
        Ok(match text {
            "tokens" => Bind::Tokens,
            "types" => Bind::Types,
            "positions" => Bind::Positions,
            "ones" => Bind::Number(1.0),
            "zeros" => Bind::Number(0.0),
            "empty" => Bind::Empty,
            number => {
                let parsed = number.parse::<f64>().ok().filter(|x| x.is_finite());
                Bind::Number(parsed.ok_or_else(|| {
                    Diag::input(format!("`{}` is nothing that an input can be", shown(number)))
                        .help("inputs are tokens, types, positions, ones, zeros, empty or a number")
                })?)
            }
        })
    }

    /// What an input called `name` is in the files of the usual exporters.
    fn usual(name: &str) -> Option<Bind> {
        Some(match name {
            "input_ids" | "tokens" | "token_ids" | "ids" => Bind::Tokens,
            "token_type_ids" | "segment_ids" => Bind::Types,
            "position_ids" => Bind::Positions,
            "attention_mask" | "input_mask" => Bind::Number(1.0),
            "use_cache_branch" => Bind::Number(0.0),
            past if past.starts_with("past_key_values") || past.starts_with("past.") => Bind::Empty,
            _ => return None,
        })
    }
}

impl std::fmt::Display for Bind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Bind::Tokens => f.write_str("tokens"),
            Bind::Types => f.write_str("types"),
            Bind::Positions => f.write_str("positions"),
            Bind::Number(1.0) => f.write_str("ones"),
            Bind::Number(0.0) => f.write_str("zeros"),
            Bind::Number(x) => x.fmt(f),
            Bind::Empty => f.write_str("empty"),
        }
    }
}

/// What to import otherwise than by default.
#[derive(Clone, Debug, Default)]
pub struct TextOptions {
    /// What inputs are.
    pub binds: BTreeMap<String, Bind>,
    /// Numbers for named extents.
    pub dims: BTreeMap<String, u64>,
    /// The output to compute. By default the first that has a row for each token.
    pub output: Option<String>,
    /// Tokens of a sequence at most. By default what `config.json` says, but no more than 4096.
    pub context: Option<u32>,
}

/// Whether the model at `path` is a text model: a tokenizer lies beside it, or inputs are called as those of one.
pub fn is_text(path: &Path) -> bool {
    let reads_tokens = |names: Vec<String>| names.iter().any(|n| Bind::usual(n) == Some(Bind::Tokens));
    beside(path, "tokenizer.json").is_some() || super::inputs(path).is_ok_and(reads_tokens)
}

/// The file called `name` in the folder of the model, or in the one above, where exporters put several models.
fn beside(path: &Path, name: &str) -> Option<PathBuf> {
    let folder = path.parent()?;
    [folder.join(name), folder.join("..").join(name)].into_iter().find(|p| p.is_file())
}

/// Imports the text model at `path` and maps its files into `store`.
pub fn import_text(path: &Path, store: &Store, options: &TextOptions) -> Result<Imported, Refused> {
    let file = path.display().to_string();
    import(path, store, options).map_err(|mut refused| {
        for diag in &mut refused.problems.0 {
            diag.file.get_or_insert(file.clone());
        }
        refused
    })
}

fn import(path: &Path, store: &Store, options: &TextOptions) -> Result<Imported, Refused> {
    let refuse = |e: Diag| Refused { problems: e.into(), needs: vec![] };
    let mut notes = vec![];
    let binds = binds(path, options, &mut notes).map_err(refuse)?;
    let inner = Options { dims: options.dims.clone(), binds, ..Options::default() };
    let graph = super::import_inner(path, store, &inner)?;
    finish(path, graph, options, notes).map_err(|problems| Refused { problems, needs: vec![] })
}

/// What each input is.
fn binds(path: &Path, options: &TextOptions, notes: &mut Vec<String>) -> Result<BTreeMap<String, Bind>> {
    let names = super::inputs(path)?;
    if let Some(name) = options.binds.keys().find(|n| !names.contains(n)) {
        let listed: Vec<String> = names.iter().map(|n| format!("`{}`", shown(n))).collect();
        let text = format!("there is no input `{}`; there are {}", shown(name), listed.join(", "));
        return Err(Diag::input(text));
    }
    let mut found = BTreeMap::new();
    for name in &names {
        // A model of one input reads tokens with it, whatever it is called.
        let usual = Bind::usual(name).or((names.len() == 1).then_some(Bind::Tokens));
        let bind = options.binds.get(name).copied().or(usual).ok_or_else(|| {
            Diag::input(format!("what the input `{}` is follows from nothing", shown(name))).help(format!(
                "say it: --bind {}=tokens, types, positions, ones, zeros or empty",
                shown(name)
            ))
        })?;
        found.insert(name.clone(), bind);
    }
    if !found.values().any(|b| *b == Bind::Tokens) {
        let help = "say which input they are: --bind NAME=tokens";
        return Err(Diag::input("no input takes the tokens of a sequence").help(help));
    }
    let chosen = names.iter().filter(|n| !options.binds.contains_key(*n)).map(|n| (n, found[n]));
    let kept = chosen.clone().filter(|(_, b)| *b == Bind::Empty).count();
    let mut all: Vec<String> =
        chosen.filter(|(_, b)| *b != Bind::Empty).map(|(n, b)| format!("`{}` is {b}", shown(n))).collect();
    if kept > 0 {
        all.push(format!("{kept} inputs of earlier tokens are empty"));
    }
    if !all.is_empty() {
        notes.push(format!("one sequence is read: {}", all.join(", ")));
    }
    Ok(found)
}

impl Main<'_, '_> {
    /// Prepares the import of one sequence, when inputs are bound to it.
    pub(super) fn sequence(&mut self, graph: &GraphProto) -> Result<()> {
        if self.options.binds.is_empty() {
            return Ok(());
        }
        self.importer.build.tokens = true;
        let ids = TensorTy::new(ElemTy::I32, [Dim::Sym('t')]);
        // Engines take tokens first.
        for (bind, name) in [(Bind::Tokens, "tokens"), (Bind::Types, "types")] {
            if self.options.binds.values().any(|b| *b == bind) {
                let val = self.importer.build.input(name, ids.clone());
                self.ids.insert(name, val);
            }
        }
        // The names of the axes, before types of inputs are read.
        for info in &graph.input {
            let name = info.name.as_deref().unwrap_or_default();
            let Some(&bind) = self.options.binds.get(name) else { continue };
            let placed = |e: Diag| e.at(Loc::Item(format!("input `{}`", shown(name))));
            self.name_axes(info, bind).map_err(placed)?;
        }
        Ok(())
    }

    /// Gives the names of an input's extents their meaning.
    fn name_axes(&mut self, info: &ValueInfoProto, bind: Bind) -> Result<()> {
        let dims = shape(info)?;
        for (axis, (fixed, name)) in dims.iter().enumerate() {
            let sequence = axis + 1 == dims.len() && bind != Bind::Empty;
            let counts = sequence && !matches!(bind, Bind::Number(_));
            if let (true, Some(n)) = (counts, fixed) {
                let text = format!("the model reads exactly {n} tokens; sequences of any length are needed");
                return Err(Diag::input(text).help("export it with an axis of its own for the sequence"));
            }
            let Some(name) = name.clone() else { continue };
            self.named.insert(name.clone());
            if sequence {
                // Masks over all tokens have an extent of another name; it is the same without earlier tokens.
                self.symbols.insert(name, 't');
            } else if axis == 0 {
                self.dims.entry(name).or_insert(1);
            } else {
                self.dims.entry(name).or_insert(0);
            }
        }
        Ok(())
    }

    /// The value of a bound input.
    pub(super) fn bound(&mut self, info: &ValueInfoProto, bind: Bind) -> Result<Val> {
        let tensor: Option<&TensorType> = info.r#type.as_ref().and_then(|t| t.tensor_type.as_ref());
        let elem = super::tensor::elem(tensor.and_then(|t| t.elem_type).unwrap_or(0).into())?;
        let dims = shape(info)?;
        let build = &mut self.importer.build;
        if let Bind::Empty = bind {
            let known = |(axis, (fixed, name)): (usize, &(Option<u64>, Option<String>))| {
                let named = name.as_ref().and_then(|n| self.dims.get(n)).copied();
                fixed.or(named).unwrap_or(u64::from(axis == 0))
            };
            let dims: Vec<u64> = dims.iter().enumerate().map(known).collect();
            let ty = TensorTy::fixed(elem, &dims);
            if ty.shape.elements() != Some(0) {
                return Err(Diag::input(format!("{ty} is not empty, as nothing is kept of earlier tokens")));
            }
            let data = match elem {
                ElemTy::F64 => Data::F64(vec![]),
                ElemTy::I32 => Data::I32(vec![]),
                ElemTy::Int(_) => Data::I64(vec![]),
                _ => Data::F32(vec![]),
            };
            return Ok(build.constant(Tensor::new(&ty, data)?));
        }
        if let Bind::Number(x) = bind {
            let number = build.scalar(elem, x)?;
            let last = dims.len().saturating_sub(1);
            let extent = |(axis, (fixed, _)): (usize, &(Option<u64>, Option<String>))| match fixed {
                Some(n) => Dim::Static(*n),
                None if axis == last => Dim::Sym('t'),
                None => Dim::Static(1),
            };
            return build.expand(&number, dims.iter().enumerate().map(extent).collect());
        }
        let mut shape = vec![Dim::Static(1); dims.len()];
        if let Some((fixed, _)) = dims.first().filter(|_| dims.len() > 1)
            && !matches!(fixed, None | Some(1))
        {
            return Err(Diag::input("the batch is not one").help("export it for one sequence, or any number"));
        }
        if dims.len() > 2 {
            let text = format!(
                "it has {} axes; what is bound has one for the batch and one for the sequence",
                dims.len()
            );
            return Err(Diag::input(text));
        }
        if let Some(last) = shape.last_mut() {
            *last = Dim::Sym('t');
        }
        if elem.int().is_none() || dims.is_empty() {
            return Err(Diag::input(format!("it cannot be the {bind}: its elements are {elem}")));
        }
        let rows = match bind {
            Bind::Positions => build.op_with(Positions {}, &[])?,
            Bind::Types => self.ids["types"].clone(),
            _ => self.ids["tokens"].clone(),
        };
        let rows = build.cast(&rows, elem)?;
        build.reshape(&rows, shape)
    }
}

/// Extents of an input: the number, or the name.
fn shape(info: &ValueInfoProto) -> Result<Vec<(Option<u64>, Option<String>)>> {
    let tensor = info.r#type.as_ref().and_then(|t| t.tensor_type.as_ref());
    let shape =
        tensor.and_then(|t| t.shape.as_ref()).ok_or_else(|| Diag::input("`type.shape` is missing"))?;
    if shape.dim.len() > quantc_ir::text::MAX_RANK {
        return Err(Diag::input(format!("`type.shape` has {} axes", shape.dim.len())));
    }
    let one = |d: &proto::Dimension| {
        let fixed = d.dim_value.and_then(|n| u64::try_from(n).ok());
        (fixed, d.dim_param.clone().filter(|p| !p.is_empty()))
    };
    Ok(shape.dim.iter().map(one).collect())
}

/// Leaves one result, a row for each token, and adds the facts.
fn finish(
    path: &Path,
    graph: Graph,
    options: &TextOptions,
    mut notes: Vec<String>,
) -> Result<Imported, quantc_ir::diag::Diags> {
    let Graph { mut module, outputs, notes: more, .. } = graph;
    notes.extend(more);
    let at = choose(&module, &outputs, options.output.as_deref())?;
    let result = module.main.results[at];
    let [.., tokens, width] = module.main.ty(result).shape.0[..] else {
        return Err(Diag::bug("a result without rows was chosen").into());
    };
    let rows = Reshape { shape: Shape(vec![tokens, width]) };
    let mut result = module.main.append(rows, &[result], None)?;
    if module.main.ty(result).elem != ElemTy::F32 {
        // Engines give f32, whatever the graph computes with.
        result = module.main.append(Cast { to: ElemTy::F32, ..Cast::default() }, &[result], None)?;
    }
    let kept = |v: &&String| v.starts_with("present");
    let lost: Vec<&String> = outputs.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, n)| n).collect();
    let states = lost.iter().filter(|n| kept(n)).count();
    let others: Vec<String> = lost.iter().filter(|n| !kept(n)).map(|n| format!("`{}`", shown(n))).collect();
    if !others.is_empty() {
        notes.push(format!("outputs are left out: {}", others.join(", ")));
    }
    if states > 0 {
        notes.push(format!("{states} outputs for later tokens are left out"));
    }
    module.main.results = vec![result];
    module.main.drop_dead();
    module.name =
        arch::module_name(path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")));

    let vocab = vocabulary(&module)?;
    let mut config = match beside(path, "config.json") {
        Some(path) => Config::read(&path)?,
        None => Config::parse("config.json", b"{}")?,
    };
    let keys = ["max_position_embeddings", "n_positions", "n_ctx"];
    let says = keys.iter().find_map(|key| config.opt_int(key, 1..=1 << 26));
    // Where it is none of the tokens, there is no padding.
    let padding = config.get("pad_token_id").and_then(|id| id.as_u64()).filter(|&id| id < u64::from(vocab));
    config.finish()?;
    let context = match (options.context, says) {
        (Some(n), Some(most)) if u64::from(n) > most => {
            let text =
                format!("a context of {n} tokens is asked for, but the model was made for 1 to {most}");
            return Err(Diag::input(text).into());
        }
        (Some(n), _) => u64::from(n),
        (None, says) => says.unwrap_or(DEFAULT_CONTEXT).min(DEFAULT_CONTEXT),
    };
    let mut facts = Facts {
        model_type: "onnx",
        kind: Kind::Encoder,
        context: u32::try_from(context).unwrap_or(u32::MAX),
        vocab,
        bos: None,
        eos: vec![],
    };
    if let Some(dir) = path.parent() {
        tokens::find(dir, &mut config, &mut facts, &mut notes)?;
    }
    facts.write(&mut module);
    module.facts.insert("sequence".into(), "whole".into());
    if let Some(id) = padding {
        module.facts.insert("padding".into(), id.to_string());
    }
    Ok(Imported { module, tokenizer: beside(path, "tokenizer.json"), facts, notes, unused: vec![] })
}

/// Which result to compute.
fn choose(module: &Module, outputs: &[String], asked: Option<&str>) -> Result<usize> {
    let rows = |i: usize| {
        let ty = module.main.ty(module.main.results[i]);
        let fits = matches!(
            ty.shape.0[..],
            [Dim::Static(1), Dim::Sym('t'), Dim::Static(_)] | [Dim::Sym('t'), Dim::Static(_)]
        );
        fits && ty.elem.is_float()
    };
    let typed = |i: usize| format!("`{}` is {}", shown(&outputs[i]), module.main.ty(module.main.results[i]));
    if let Some(name) = asked {
        let found = outputs.iter().position(|o| o == name);
        let listed = || outputs.iter().map(|n| format!("`{}`", shown(n))).collect::<Vec<_>>().join(", ");
        let at = found.ok_or_else(|| {
            Diag::input(format!("there is no output `{}`; there are {}", shown(name), listed()))
        })?;
        return if rows(at) {
            Ok(at)
        } else {
            Err(Diag::input(format!("{}: engines give a row for each token", typed(at))))
        };
    }
    (0..outputs.len()).find(|&i| rows(i)).ok_or_else(|| {
        let all: Vec<String> = (0..outputs.len()).map(typed).collect();
        Diag::input(format!("no output has a row for each token: {}", all.join(", ")))
    })
}

/// Rows of the table that tokens choose from.
fn vocabulary(module: &Module) -> Result<u32> {
    let graph = &module.main;
    let is_tokens = |mut v: ValueId| loop {
        match graph.value(v).def {
            Def::Param(p) => return p == 0,
            Def::Op(op) if matches!(graph.node(op).op, Op::Cast(_) | Op::Reshape(_)) => {
                v = graph.node(op).args[0]
            }
            _ => return false,
        }
    };
    let rows = |node: &quantc_ir::graph::Node| match node.op {
        Op::Gather(ref g) if g.axis == 0 && is_tokens(node.args[1]) => {
            graph.ty(node.args[0]).shape.0.first()?.fixed()
        }
        _ => None,
    };
    let found = graph.ops().filter_map(|(_, node)| rows(node)).min();
    let found = found.and_then(|n| u32::try_from(n).ok()).filter(|&n| n > 0);
    found.ok_or_else(|| Diag::input("no table is read by the tokens, so how many there are is not known"))
}
