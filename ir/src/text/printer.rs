//! Writes modules as text, line by line; each line knows what it is about, so that messages can be put under it.
//!
//! Anything is printed, broken modules too: an id that leads nowhere is written with a `?`.

use super::elements::{self, f32_text};
use super::fields::{Fields, Value, Writer, collect};
use super::lexer::{float_text, is_word, name, quoted};
use super::{Function, Place};
use crate::entity::{Entity, LayerId, SecondaryMap, ValueId};
use crate::graph::{Def, Graph};
use crate::module::Module;
use crate::ops::{Op, Real};
use crate::weights::{WeightDecl, WeightSource};
use std::collections::BTreeSet;
use std::fmt::Write as _;

/// A module as text.
pub fn print(module: &Module) -> String {
    let mut out = Listing::new(module);
    out.module();
    out.into_text()
}

/// One layer as text.
pub fn print_layer(module: &Module, layer: LayerId) -> String {
    let mut out = Listing::new(module);
    out.function(Function::Layer(layer));
    out.into_text()
}

/// A graph as the text of a `main` function; `module` has its weights and states.
pub fn print_graph(module: &Module, graph: &Graph) -> String {
    let mut out = Listing::new(module);
    out.graph(Function::Main, "main ", graph);
    out.into_text()
}

/// A line and what it is about.
pub(crate) struct Line {
    pub(crate) text: String,
    pub(crate) place: Option<Place>,
}

/// The lines of a text in the making.
pub(crate) struct Listing<'m> {
    module: &'m Module,
    pub(crate) lines: Vec<Line>,
}

impl<'m> Listing<'m> {
    pub(crate) fn new(module: &'m Module) -> Listing<'m> {
        Listing { module, lines: vec![] }
    }

    fn into_text(self) -> String {
        self.lines.into_iter().fold(String::new(), |out, line| out + &line.text + "\n")
    }

    fn line(&mut self, place: Option<Place>, text: String) {
        self.lines.push(Line { text, place });
    }

    /// An empty line between parts.
    pub(crate) fn gap(&mut self) {
        if !self.lines.is_empty() {
            self.line(None, String::new());
        }
    }

    fn module(&mut self) {
        self.header();
        let m = self.module;
        if let Some(target) = &m.target {
            let target = if is_word(target) { target.clone() } else { quoted(target) };
            self.line(None, format!("target {target}"));
        }
        if let Some(pipeline) = &m.pipeline {
            self.line(None, format!("pipeline {}", quoted(pipeline)));
        }
        for (id, shard) in m.shards.iter() {
            self.line(None, format!("shard {} = {}", id.index(), quoted(&shard.file)));
        }
        for id in m.weights.keys() {
            self.weight(id, usize::MAX);
        }
        for id in m.states.keys() {
            self.state(id);
        }
        for id in m.layers.keys() {
            self.gap();
            self.function(Function::Layer(id));
        }
        if !is_empty(&m.main) {
            self.gap();
            self.function(Function::Main);
        }
        self.calibration();
    }

    pub(crate) fn header(&mut self) {
        let mut text = format!("module @{}", name(&self.module.name));
        if !self.module.facts.is_empty() {
            let mut facts = Fields::default();
            self.module.facts.iter().for_each(|(k, v)| facts.push(k.as_str(), fact(v)));
            // Writing to a string does not fail.
            let _ = write!(text, " {facts}");
        }
        self.line(Some(Place::Module), text);
    }

    /// The declaration of a weight; data of more than `most` elements is left out, which does not parse.
    pub(crate) fn weight(&mut self, id: crate::entity::WeightId, most: usize) {
        let w = &self.module.weights[id];
        let source = match &w.source {
            WeightSource::File { shard, at, len } => format!("file {}[{at}..+{len}]", shard.index()),
            WeightSource::Blob(digest) => format!("blob {digest}"),
            WeightSource::Splat(x) => format!("splat {}", f32_text(x.get())),
            WeightSource::Inline(bytes) => format!("inline {}", inline(w, bytes, most)),
            WeightSource::Alias(of) => format!("alias {}", self.weight_name(*of)),
        };
        self.line(Some(Place::Weight(id)), format!("weight @{} : {} = {source}", name(&w.name), w.ty));
    }

    pub(crate) fn state(&mut self, id: crate::entity::StateId) {
        let s = &self.module.states[id];
        self.line(Some(Place::State(id)), format!("state @{} : {}", name(&s.name), s.ty));
    }

    fn weight_name(&self, id: crate::entity::WeightId) -> String {
        self.module.weights.get(id).map_or(format!("@?{id:?}"), |w| format!("@{}", name(&w.name)))
    }

    pub(crate) fn function(&mut self, function: Function) {
        match function {
            Function::Layer(id) => {
                let layer = &self.module.layers[id];
                self.graph(function, &format!("layer @{} ", name(&layer.name)), &layer.graph);
            }
            Function::Main => self.graph(function, "main ", &self.module.main),
        }
    }

    fn graph(&mut self, function: Function, head: &str, graph: &Graph) {
        let names = Names::of(graph);
        let ty = |v: &ValueId| match names.known(*v) {
            true => graph.ty(*v).to_string(),
            false => format!("?{v:?}"),
        };
        let params: Vec<String> =
            graph.params.iter().map(|v| format!("{}: {}", names.value(self, graph, *v), ty(v))).collect();
        let results: Vec<String> = graph.results.iter().map(ty).collect();
        let results = if results.len() == 1 { results.concat() } else { format!("({})", results.join(", ")) };
        let text = format!("{head}({}) -> {results} {{", params.join(", "));
        self.line(Some(Place::Function(function)), text);
        for (id, node) in graph.ops() {
            let given =
                node.args.iter().rposition(|&a| !(names.known(a) && graph.is_none(a))).map_or(0, |i| i + 1);
            let mut text = format!("  {} = {}", names.value(self, graph, node.result), node.op.name());
            for (i, &arg) in node.args[..given].iter().enumerate() {
                let _ = write!(text, "{}{}", if i > 0 { ", " } else { " " }, names.value(self, graph, arg));
            }
            let fields = attributes(&node.op);
            if !fields.is_empty() {
                let _ = write!(text, " {fields}");
            }
            let _ = write!(text, " : {}", ty(&node.result));
            self.line(Some(Place::Op(function, id)), text);
        }
        let results: Vec<String> = graph.results.iter().map(|&v| names.value(self, graph, v)).collect();
        let text = format!("  return {}", results.join(", "));
        self.line(Some(Place::Return(function)), text.trim_end().to_string());
        self.line(None, "}".into());
    }

    fn calibration(&mut self) {
        let mut entries: Vec<String> = vec![];
        let module = self.module;
        for (key, numbers) in &module.calibration {
            let numbers: Vec<String> = numbers.iter().map(|&Real(x)| float_text(x)).collect();
            let numbers = numbers.join(", ");
            entries.push(match split_key(module, key) {
                Some((function, value)) if Some(function) == single_function(module) => {
                    format!("%{} = [{numbers}]", name(value))
                }
                Some((function, value)) => format!("%{} in @{} = [{numbers}]", name(value), name(function)),
                None => format!("{} = [{numbers}]", quoted(key)),
            });
        }
        match &entries[..] {
            [] => {}
            [entry] => {
                self.gap();
                self.line(None, format!("{{-# calibration {entry} #-}}"));
            }
            _ => {
                self.gap();
                self.line(None, "{-# calibration".into());
                entries.into_iter().for_each(|e| self.line(None, format!("  {e}")));
                self.line(None, "#-}".into());
            }
        }
    }
}

/// Whether nothing was ever put into a graph.
pub(crate) fn is_empty(graph: &Graph) -> bool {
    graph.params.is_empty() && graph.results.is_empty() && graph.order().is_empty()
}

/// The function of a module that has only one.
pub(crate) fn single_function(module: &Module) -> Option<&str> {
    let mut layers = module.layers.values();
    match (layers.next(), layers.next()) {
        (None, _) => Some("main"),
        (Some(layer), None) if is_empty(&module.main) => Some(&layer.name),
        _ => None,
    }
}

/// Splits `function.value.statistic` into the function and the rest; the longest name of a function wins.
fn split_key<'k>(module: &Module, key: &'k str) -> Option<(&'k str, &'k str)> {
    let after =
        |function: &str| key.strip_prefix(function)?.strip_prefix('.').filter(|rest| rest.contains('.'));
    let functions = module.layers.values().map(|l| l.name.as_str()).chain(std::iter::once("main"));
    let rest = functions.filter_map(after).min_by_key(|rest| rest.len())?;
    Some((&key[..key.len() - rest.len() - 1], rest))
}

/// A fact: as it is where that reads back, else quoted.
fn fact(text: &str) -> Value {
    let read = Fields::parse(&format!("{{k={text}}}")).ok();
    let value = read.filter(|f| f.entries.len() == 1).and_then(|mut f| f.entries.pop()).map(|e| e.item.value);
    let reads_back = |v: &Value| !matches!(v, Value::Str(_) | Value::Name(_)) && v.to_string() == text;
    value.filter(reads_back).unwrap_or_else(|| Value::Str(text.into()))
}

/// The attributes of an op that are not at their defaults.
pub fn attributes(op: &Op) -> Fields {
    collect(op.write(Writer)).without(&collect(Op::default_of(op.kind()).write(Writer)))
}

/// The names under which the values of a graph are printed.
struct Names {
    names: SecondaryMap<ValueId, Option<String>>,
    count: usize,
}

/// Whether a name is only the number of an unnamed value.
pub(crate) fn is_number(name: &str) -> bool {
    name.bytes().all(|b| b.is_ascii_digit())
}

impl Names {
    fn of(graph: &Graph) -> Names {
        let count = graph.values().count();
        let mut names = Names { names: SecondaryMap::new(), count };
        let defined = || graph.params.iter().copied().chain(graph.ops().map(|(_, n)| n.result));
        let own = |v: ValueId| graph.value(v).name.as_deref().filter(|n| !is_number(n));
        let wanted: BTreeSet<&str> = defined().filter(|&v| names.known(v)).filter_map(own).collect();
        let mut taken: BTreeSet<String> = BTreeSet::new();
        let mut unnamed = 0;
        for v in defined() {
            if !names.known(v) || names.names[v].is_some() {
                continue;
            }
            let name = match own(v) {
                None => {
                    unnamed += 1;
                    (unnamed - 1).to_string()
                }
                Some(name) if !taken.contains(name) => name.to_string(),
                Some(name) => {
                    let fresh = |n: &String| !taken.contains(n) && !wanted.contains(n.as_str());
                    (2u64..).map(|i| format!("{name}.{i}")).find(fresh).expect("some number is free")
                }
            };
            taken.insert(name.clone());
            names.names[v] = Some(name);
        }
        names
    }

    /// Whether `v` is a value of the graph at all.
    fn known(&self, v: ValueId) -> bool {
        v.index() < self.count
    }

    fn value(&self, out: &Listing<'_>, graph: &Graph, v: ValueId) -> String {
        if !self.known(v) {
            return format!("%?{v:?}");
        }
        match (graph.value(v).def, &self.names[v]) {
            (Def::Weight(w), _) => out.weight_name(w),
            (Def::State(s), _) => {
                out.module.states.get(s).map_or(format!("@?{s:?}"), |s| format!("@{}", name(&s.name)))
            }
            (Def::None, _) => "none".into(),
            (_, Some(n)) => format!("%{}", name(n)),
            (_, None) => format!("%?{v:?}"),
        }
    }
}

/// The data of a weight as nested lists.
fn inline(w: &WeightDecl, bytes: &[u8], most: usize) -> String {
    let dims = w.ty.shape.dims().filter(|_| w.ty.stored_bytes() == Some(bytes.len() as u64));
    let Some(dims) = dims else { return format!("[?] // {} bytes do not fill the type", bytes.len()) };
    if dims.contains(&0) {
        // The other extents may be anything, and are not written.
        return "[]".into();
    }
    if w.ty.shape.elements().is_none_or(|n| n > most as u64) {
        return "[..]".into();
    }
    let mut out = String::new();
    let cols = dims.last().copied().unwrap_or(1) as usize;
    let mut numbers =
        elements::unpack(bytes, cols, w.ty.elem).into_iter().map(|e| elements::write(e, w.ty.elem));
    nest(&dims, &mut numbers, &mut out);
    out
}

fn nest(dims: &[u64], numbers: &mut impl Iterator<Item = String>, out: &mut String) {
    let Some((&n, inner)) = dims.split_first() else {
        return out.push_str(&numbers.next().unwrap_or_default());
    };
    out.push('[');
    for i in 0..n {
        out.push_str(if i > 0 { ", " } else { "" });
        nest(inner, numbers, out);
    }
    out.push(']');
}
