//! Checks that a module is what the rest of quantc takes for granted.
//!
//! All errors are collected. What is checked:
//!
//! **Module.** There is something to run: `main` has results, or there are layers. Names of weights and states are
//! unique together, names of layers are unique and none is `main`.
//!
//! **Weights.** Extents are static and the stored bytes fit 64 bits. A file source names a shard of the module, its
//! range does not overflow and has the length that the type says; inline data has that length too; splats have a plain
//! float type. Aliases lead to a weight of the same type, not in a circle. Inline weights that are read as scales are
//! finite and positive.
//!
//! **States.** Extents are static; there is at least one axis, the context.
//!
//! **Graphs.** Every value that is read is a parameter, the result of a live op that comes before its reader, a weight,
//! a state or `none`, and exists. No value is defined twice: an op is listed once, its result says so, and so do
//! parameters. Weight and state values have the types of their declarations. States are read by `cache_append` only,
//! `none` stands only where an operand is optional. Results are values that are computed.
//!
//! **Ops.** Each has the number of operands it declares, and the type recorded for its result is the one that
//! inference gives. Schemes, and the shapes of scales and zero points, are part of inference.
//!
//! **Calls.** A layer has one result. Layers do not call themselves, not through others either. The layer exists and
//! the operands have its parameters' types (part of inference).
//!
//! **States over calls.** In one run of `main` every state is appended to at most once, calls counted.
//!
//! Layers read nothing of `main`, by construction: a graph's values are its own.

use crate::diag::{Diag, Diags, Loc};
use crate::entity::{Entity, LayerId, OpId, SecondaryMap, ShardId, StateId, ValueId};
use crate::formats::Class;
use crate::graph::{Def, Graph, Node};
use crate::module::{Module, Signature};
use crate::ops::{Arity, Op};
use crate::text::{Function, Line, Listing, MAX_RANK, Place, Pos};
use crate::ty::TensorTy;
use crate::weights::{self, WeightSource};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};

/// Most elements of a weight that is one number repeated: what passes derive from it has as many, and no file of that
/// size stands behind it.
const MOST_SPLAT: u64 = 1 << 30;

/// Something that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyError {
    /// What it is about.
    pub place: Place,
    /// What is wrong.
    pub diag: Diag,
}

/// Everything that does not hold: of the module, then of weights, states and functions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyErrors(pub Vec<VerifyError>);

/// Checks a module; the checks are listed in the documentation of [this module](self).
pub fn verify(module: &Module) -> Result<(), VerifyErrors> {
    verify_with_files(module, &|_| None)
}

/// As [`verify`]; `shard_len` tells the length of those files that are known.
pub fn verify_with_files<'m>(
    module: &'m Module,
    shard_len: &'m dyn Fn(ShardId) -> Option<u64>,
) -> Result<(), VerifyErrors> {
    let mut v = Verifier { module, shard_len, signatures: BTreeMap::new(), errors: vec![] };
    for layer in module.layers.values() {
        if let Some(signature) = signature(&layer.graph) {
            v.signatures.insert(&layer.name, signature);
        }
    }
    v.module();
    v.weights();
    v.states();
    let functions = module.layers.keys().map(Function::Layer).chain([Function::Main]);
    functions.for_each(|f| FunctionVerifier::new(&mut v, f).check());
    v.calls();
    let mut errors = v.errors;
    errors.sort_by_key(|e| e.place);
    if errors.is_empty() { Ok(()) } else { Err(VerifyErrors(errors)) }
}

impl VerifyErrors {
    /// Everything as diagnostics that name the item of the module.
    pub fn diags(&self, module: &Module) -> Diags {
        let one = |e: &VerifyError| e.diag.clone().at(Loc::Item(item(module, e.place)));
        Diags(self.0.iter().map(one).collect())
    }

    /// Everything as diagnostics that name the place in the text the module was read from.
    pub fn locate(&self, module: &Module, places: &BTreeMap<Place, Pos>, file: &str) -> Diags {
        let one = |e: &VerifyError| {
            let loc = places.get(&e.place).map_or_else(|| Loc::Item(item(module, e.place)), |pos| pos.loc());
            e.diag.clone().at(loc).in_file(file)
        };
        Diags(self.0.iter().map(one).collect())
    }

    /// The declarations and functions with errors, each error under its line.
    pub fn show(&self, module: &Module) -> String {
        /// Elements of inline data that are shown.
        const MOST: usize = 64;
        let mut listing = Listing::new(module);
        listing.header();
        let mut shown = BTreeSet::new();
        for e in &self.0 {
            let part = match e.place {
                Place::Op(f, _) | Place::Return(f) => Place::Function(f),
                other => other,
            };
            if !shown.insert(part) {
                continue;
            }
            match part {
                Place::Weight(w) => listing.weight(w, MOST),
                Place::State(s) => listing.state(s),
                Place::Function(f) => {
                    listing.gap();
                    listing.function(f);
                }
                _ => {}
            }
        }
        let mut out = String::new();
        for Line { text, place } in &listing.lines {
            // Writing to a string does not fail.
            let _ = writeln!(out, "{text}");
            let indent = &text[..text.len() - text.trim_start().len()];
            for e in self.0.iter().filter(|e| Some(e.place) == *place) {
                let _ = writeln!(out, "{indent}// ^ error: {}", e.diag.message);
                if let Some(help) = &e.diag.help {
                    let _ = writeln!(out, "{indent}//   help: {help}");
                }
            }
        }
        out
    }
}

impl fmt::Display for VerifyErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.0.iter().map(|e| format!("error: {}", e.diag)).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl std::error::Error for VerifyErrors {}

/// The name of a place for messages.
fn item(module: &Module, place: Place) -> String {
    let function = |f: Function| match f {
        Function::Layer(id) => format!("@{}", module.layers[id].name),
        Function::Main => "main".into(),
    };
    match place {
        Place::Module => format!("@{}", module.name),
        Place::Weight(id) => format!("@{}", module.weights[id].name),
        Place::State(id) => format!("@{}", module.states[id].name),
        Place::Function(f) | Place::Return(f) => function(f),
        Place::Op(f, op) => {
            let graph = graph_of(module, f);
            let node = graph.node(op);
            let known = node.result.index() < graph.values().count();
            let name = known.then(|| graph.value(node.result).name.as_deref()).flatten();
            format!("%{} in {}", name.unwrap_or(node.op.name()), function(f))
        }
    }
}

fn graph_of(module: &Module, function: Function) -> &Graph {
    match function {
        Function::Layer(id) => &module.layers[id].graph,
        Function::Main => &module.main,
    }
}

/// The signature of a graph whose parameters and results exist.
fn signature(graph: &Graph) -> Option<Signature> {
    let count = graph.values().count();
    let ty = |v: &ValueId| (v.index() < count).then(|| graph.ty(*v).clone());
    let params = graph.params.iter().map(ty).collect::<Option<_>>()?;
    Some(Signature { params, result: graph.results.first().and_then(ty)? })
}

struct Verifier<'m> {
    module: &'m Module,
    shard_len: &'m dyn Fn(ShardId) -> Option<u64>,
    signatures: BTreeMap<&'m str, Signature>,
    errors: Vec<VerifyError>,
}

impl<'m> Verifier<'m> {
    fn error(&mut self, place: Place, message: impl Into<String>) {
        self.errors.push(VerifyError { place, diag: Diag::input(message) });
    }

    fn module(&mut self) {
        let m = self.module;
        if m.layers.is_empty() && m.main.results.is_empty() {
            self.error(
                Place::Module,
                "there is nothing to run: `main` has no results and there are no layers",
            );
        }
        let mut seen = BTreeSet::new();
        let weights = m.weights.iter().map(|(id, w)| (Place::Weight(id), &w.name));
        for (place, name) in weights.chain(m.states.iter().map(|(id, s)| (Place::State(id), &s.name))) {
            if !seen.insert(name) {
                self.error(place, format!("the name `@{name}` is given twice"));
            }
        }
        let mut seen = BTreeSet::from(["main"]);
        for (id, layer) in m.layers.iter() {
            if !seen.insert(&layer.name) {
                let place = Place::Function(Function::Layer(id));
                self.error(place, format!("the name `@{}` of a layer is given twice", layer.name));
            }
        }
    }

    fn weights(&mut self) {
        let m = self.module;
        for (id, w) in m.weights.iter() {
            let place = Place::Weight(id);
            let ty = &w.ty;
            let Some(stored) = ty.stored_bytes() else {
                let why = if ty.shape.dims().is_none() {
                    "has extents that are not static"
                } else {
                    "is too large"
                };
                self.error(place, format!("a weight of type {ty} {why}"));
                continue;
            };
            if let Some(scheme) = ty.elem.scheme()
                && let Err(e) = scheme.scale_shape(&ty.shape)
            {
                self.errors.push(VerifyError { place, diag: e });
            }
            match &w.source {
                WeightSource::File { shard, at, len } => {
                    if m.shards.get(*shard).is_none() {
                        self.error(place, format!("there is no shard {}", shard.index()));
                    }
                    let size = (self.shard_len)(*shard).unwrap_or(u64::MAX);
                    if at.checked_add(*len).is_none_or(|end| end > size) {
                        let file = match size {
                            u64::MAX => "any file".to_string(),
                            size => format!("its file of {size} bytes"),
                        };
                        self.error(place, format!("bytes {at}..+{len} lie outside of {file}"));
                    }
                    if *len != stored {
                        self.error(
                            place,
                            format!("{ty} takes {stored} bytes, the range in the file has {len}"),
                        );
                    }
                }
                WeightSource::Inline(bytes) if bytes.len() as u64 != stored => {
                    self.error(
                        place,
                        format!("{ty} takes {stored} bytes, the inline data has {}", bytes.len()),
                    );
                }
                WeightSource::Splat(_) if ty.shape.elements().is_none_or(|n| n > MOST_SPLAT) => {
                    self.error(place, format!("{ty} repeats one number more than {MOST_SPLAT} times"));
                }
                WeightSource::Splat(_) if !ty.elem.is_float() => {
                    self.error(place, format!("a splat fills plain float tensors only, not {ty}"));
                }
                WeightSource::Alias(_) => {
                    if let Err(mut diag) = weights::resolve(&m.weights, id) {
                        diag.loc = Loc::None;
                        self.errors.push(VerifyError { place, diag });
                    }
                }
                WeightSource::Inline(_) | WeightSource::Splat(_) | WeightSource::Blob(_) => {}
            }
        }
    }

    fn states(&mut self) {
        for (id, s) in self.module.states.iter() {
            if s.ty.shape.dims().is_none() || s.ty.rank() == 0 {
                let message = format!("a state of type {} needs static extents, the context first", s.ty);
                self.error(Place::State(id), message);
            } else if s.ty.stored_bytes().is_none() {
                self.error(Place::State(id), format!("a state of type {} is too large", s.ty));
            }
        }
    }

    /// Recursion, and what is appended to states over all calls.
    fn calls(&mut self) {
        let m = self.module;
        let by_name: BTreeMap<&str, LayerId> = m.layers.iter().map(|(id, l)| (l.name.as_str(), id)).collect();
        let effects = |graph: &'m Graph| -> Vec<(OpId, Effect)> {
            let states = graph.values().count();
            let effect = |(id, node): (OpId, &Node)| match &node.op {
                Op::Call(call) => by_name.get(call.layer.as_str()).map(|&l| (id, Effect::Call(l))),
                Op::CacheAppend(_) => match node.args.first().filter(|a| a.index() < states) {
                    Some(&a) => match graph.value(a).def {
                        Def::State(s) => Some((id, Effect::Append(s))),
                        _ => None,
                    },
                    None => None,
                },
                _ => None,
            };
            graph.ops().filter_map(effect).collect()
        };
        let layers: Vec<Vec<(OpId, Effect)>> = m.layers.values().map(|l| effects(&l.graph)).collect();

        // Layers in an order in which callees come first, and calls that close a circle.
        #[derive(Clone, Copy, PartialEq)]
        enum Mark {
            New,
            Open,
            Done,
        }
        let mut marks = vec![Mark::New; layers.len()];
        let mut order: Vec<usize> = vec![];
        for root in 0..layers.len() {
            if marks[root] != Mark::New {
                continue;
            }
            marks[root] = Mark::Open;
            let mut path = vec![(root, 0)];
            while let Some((layer, next)) = path.last_mut() {
                let (layer, at) = (*layer, *next);
                *next += 1;
                match layers[layer].get(at) {
                    Some(&(op, Effect::Call(callee))) => match marks[callee.index()] {
                        Mark::New => {
                            marks[callee.index()] = Mark::Open;
                            path.push((callee.index(), 0));
                        }
                        Mark::Open => {
                            let place = Place::Op(Function::Layer(LayerId::new(layer)), op);
                            let name = &m.layers[callee].name;
                            self.error(
                                place,
                                format!("layer `@{name}` calls itself, here or through others"),
                            );
                        }
                        Mark::Done => {}
                    },
                    Some(_) => {}
                    None => {
                        marks[layer] = Mark::Done;
                        order.push(layer);
                        path.pop();
                    }
                }
            }
        }

        // States appended by each layer, calls included; a second append is an error where it happens. States count,
        // not paths: what a layer appends is found once, however often it is called.
        let mut appends: Vec<BTreeSet<StateId>> = vec![BTreeSet::new(); layers.len()];
        let main = effects(&m.main);
        let functions = order.iter().map(|&l| (Function::Layer(LayerId::new(l)), &layers[l]));
        for (function, effects) in functions.chain([(Function::Main, &main)]) {
            let mut seen = BTreeSet::new();
            for &(op, effect) in effects {
                let states: Vec<StateId> = match effect {
                    Effect::Append(s) => vec![s],
                    Effect::Call(l) => appends[l.index()].iter().copied().collect(),
                };
                let again: Vec<StateId> = states.into_iter().filter(|&s| !seen.insert(s)).collect();
                if let Some(state) = again.first().and_then(|&s| m.states.get(s)) {
                    let message = format!("state `@{}` is appended to twice in one run", state.name);
                    self.error(Place::Op(function, op), message);
                }
            }
            if let Function::Layer(l) = function {
                appends[l.index()] = seen;
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Effect {
    Append(StateId),
    Call(LayerId),
}

struct FunctionVerifier<'v, 'm> {
    all: &'v mut Verifier<'m>,
    function: Function,
    graph: &'m Graph,
    /// Number of values of the graph.
    count: usize,
    /// Values that are there when the present op is reached.
    defined: SecondaryMap<ValueId, bool>,
}

impl<'v, 'm> FunctionVerifier<'v, 'm> {
    fn new(all: &'v mut Verifier<'m>, function: Function) -> FunctionVerifier<'v, 'm> {
        let graph = graph_of(all.module, function);
        let count = graph.values().count();
        FunctionVerifier { all, function, graph, count, defined: SecondaryMap::new() }
    }

    fn check(mut self) {
        self.params();
        self.leaves();
        let mut listed = SecondaryMap::<OpId, bool>::new();
        for (id, node) in self.graph.ops() {
            let place = Place::Op(self.function, id);
            if std::mem::replace(&mut listed[id], true) {
                self.all.error(place, "the op is listed twice");
                continue;
            }
            self.op(place, id, node);
        }
        self.results();
    }

    fn params(&mut self) {
        let place = Place::Function(self.function);
        for (i, &p) in self.graph.params.iter().enumerate() {
            if p.index() >= self.count {
                self.all.error(place, format!("parameter {i} is not a value of the function"));
                continue;
            }
            if self.graph.value(p).def != Def::Param(i as u32) {
                self.all.error(place, format!("parameter {i} is not defined as a parameter"));
            }
            if self.graph.ty(p).rank() > MAX_RANK {
                self.all.error(place, format!("parameter {i} has more than {MAX_RANK} axes"));
            }
            self.defined[p] = true;
        }
    }

    /// Weight and state values have the types of what they stand for, and there is one of each.
    fn leaves(&mut self) {
        let place = Place::Function(self.function);
        let mut seen = BTreeMap::new();
        for (v, value) in self.graph.values() {
            let m = self.all.module;
            let (key, name, ty) = match value.def {
                Def::Weight(w) => match m.weights.get(w) {
                    Some(w2) => ((0, w.index()), &w2.name, &w2.ty),
                    None => {
                        self.all
                            .error(place, format!("a value stands for the weight {w:?}, which is not there"));
                        continue;
                    }
                },
                Def::State(s) => match m.states.get(s) {
                    Some(s2) => ((1, s.index()), &s2.name, &s2.ty),
                    None => {
                        self.all
                            .error(place, format!("a value stands for the state {s:?}, which is not there"));
                        continue;
                    }
                },
                Def::None => {
                    if seen.insert((2, 0), v).is_some() {
                        self.all.error(place, "`none` is two values of the function");
                    }
                    continue;
                }
                _ => continue,
            };
            if value.ty != *ty {
                let message = format!("`@{name}` is read as {}, but declared as {ty}", value.ty);
                self.all.error(place, message);
            }
            if seen.insert(key, v).is_some() {
                self.all.error(place, format!("`@{name}` is two values of the function"));
            }
        }
    }

    fn op(&mut self, place: Place, id: OpId, node: &'m Node) {
        let mut sound = true;
        for (i, &arg) in node.args.iter().enumerate() {
            sound &= self.arg(place, i, arg, node);
        }
        if node.result.index() >= self.count {
            self.all.error(place, "the result is not a value of the function");
            return;
        }
        let value = self.graph.value(node.result);
        if value.def != Def::Op(id) {
            self.all.error(place, "the result is not defined by this op");
        }
        if value.ty.rank() > MAX_RANK {
            self.all.error(place, format!("the result has more than {MAX_RANK} axes"));
        }
        if std::mem::replace(&mut self.defined[node.result], true) {
            self.all.error(place, "the result is defined twice");
        }
        if !sound {
            return;
        }
        let layers = |name: &str| self.all.signatures.get(name).cloned();
        match crate::build::infer(self.graph, &node.op, &node.args, &layers) {
            Ok(ty) if ty == value.ty => {}
            Ok(ty) => {
                let message =
                    format!("`{}` has a result of type {ty}, but {} is recorded", node.op.name(), value.ty);
                self.all.error(place, message);
            }
            Err(diag) => self.all.errors.push(VerifyError { place, diag }),
        }
        self.scales(place, node);
    }

    fn arg(&mut self, place: Place, i: usize, arg: ValueId, node: &Node) -> bool {
        if arg.index() >= self.count {
            self.all.error(place, format!("operand {i} is not a value of the function"));
            return false;
        }
        let value = self.graph.value(arg);
        match value.def {
            Def::Op(_) | Def::Param(_) if !self.defined[arg] => {
                let name = value.name.as_deref().map_or(format!("{arg:?}"), |n| format!("%{n}"));
                self.all.error(place, format!("operand {i} (`{name}`) is not defined before this op"));
                false
            }
            Def::State(_) if !(i == 0 && matches!(node.op, Op::CacheAppend(_))) => {
                self.all.error(place, format!("operand {i} is a state; only `cache_append` reads states"));
                false
            }
            Def::None => {
                let operands = node.op.operands().0;
                let optional = operands.get(i).is_some_and(|o| o.arity == Arity::Optional);
                if !optional {
                    let name = operands.get(i).or(operands.last()).map_or("", |o| o.name);
                    let message = format!("`{}` needs its operand `{name}`", node.op.name());
                    self.all.error(place, message);
                }
                optional
            }
            def => {
                let append = matches!(node.op, Op::CacheAppend(_)) && i == 0;
                if append && !matches!(def, Def::State(_)) {
                    self.all.error(place, "`cache_append` writes to a state, and operand 0 is none");
                }
                true
            }
        }
    }

    /// Inline scales are finite and positive.
    fn scales(&mut self, place: Place, node: &Node) {
        let at: &[usize] = match node.op {
            Op::Quantize(_) | Op::Dequantize(_) => &[1],
            Op::QMatMul(_) => &[2, 4],
            _ => &[],
        };
        let m = self.all.module;
        for &arg in at.iter().filter_map(|&i| node.args.get(i)) {
            let Some(w) = self.graph.as_weight(arg) else { continue };
            let Ok(w) = weights::resolve(&m.weights, w) else { continue };
            let w = &m.weights[w];
            if let Some(bad) = bad_scale(&w.ty, &w.source) {
                let message =
                    format!("the scales `@{}` have an entry {bad:?}; scales are finite and positive", w.name);
                self.all.error(place, message);
            }
        }
    }

    fn results(&mut self) {
        let place = Place::Return(self.function);
        for (i, &r) in self.graph.results.iter().enumerate() {
            let computed = r.index() < self.count
                && self.defined[r]
                && matches!(self.graph.value(r).def, Def::Op(_) | Def::Param(_));
            if !computed {
                self.all.error(place, format!("result {i} is not a value that the function computes"));
            }
        }
        if let Function::Layer(_) = self.function
            && self.graph.results.len() != 1
        {
            let n = self.graph.results.len();
            self.all.error(place, format!("a layer has one result, this one has {n}"));
        }
    }
}

/// The first scale of inline data or a splat that is not finite and positive.
fn bad_scale(ty: &TensorTy, source: &WeightSource) -> Option<f32> {
    let bad = |x: &f32| !(x.is_finite() && *x > 0.0);
    match source {
        WeightSource::Splat(x) => Some(x.get()).filter(bad),
        WeightSource::Inline(bytes) if ty.elem.is_float() => {
            let format = crate::text::code_format(ty.elem);
            let width = format.bits as usize / 8;
            debug_assert!(matches!(format.class, Class::Float { .. }));
            let code = |b: &[u8]| b.iter().rev().fold(0, |code, &b| code << 8 | u32::from(b));
            bytes.chunks_exact(width).map(|b| format.decode(code(b))).find(bad)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entity::WeightId;
    use crate::ops::{Relu, Silu};
    use crate::text::parse;
    use crate::ty::ElemTy;

    const TEXT: &str = "module @m
shard 0 = \"a.safetensors\"
weight @g : tensor<4xf32> = file 0[16..+16]
main (%x: tensor<?x4xf32>) -> tensor<?x4xf32> {
  %n = rmsnorm %x, @g
  %y = silu %n
  return %y
}
";

    fn module() -> Module {
        parse(TEXT, "test").unwrap().module
    }

    fn messages(m: &Module) -> Vec<String> {
        verify(m).err().unwrap_or_default().0.into_iter().map(|e| e.diag.message).collect()
    }

    /// What the verifier says after `break_it` was done to the graph of a sound module.
    fn broken(break_it: impl Fn(&mut Graph)) -> Vec<String> {
        let mut m = module();
        assert_eq!(messages(&m), [""; 0]);
        break_it(&mut m.main);
        messages(&m)
    }

    fn named(g: &Graph, name: &str) -> ValueId {
        g.values().find(|(_, v)| v.name.as_deref() == Some(name)).unwrap().0
    }

    #[test]
    fn order_and_uses() {
        let late = broken(|g| {
            let y = named(g, "y");
            g.insert(0, Relu {}.into(), vec![y], g.ty(y).clone(), None);
        });
        assert_eq!(late, ["operand 0 (`%y`) is not defined before this op"]);
        let erased = broken(|g| g.erase(g.order()[0]));
        assert_eq!(erased, ["operand 0 (`%n`) is not defined before this op"]);
        let erased = broken(|g| g.erase(g.order()[1]));
        assert_eq!(erased, ["result 0 is not a value that the function computes"]);
    }

    #[test]
    fn ids_that_lead_nowhere() {
        let nowhere = ValueId::new(99);
        assert_eq!(
            broken(|g| g.results = vec![nowhere]),
            ["result 0 is not a value that the function computes"]
        );
        assert_eq!(broken(|g| g.params.push(nowhere)), ["parameter 1 is not a value of the function"]);
        let op = |g: &Graph| g.order()[1];
        assert_eq!(
            broken(|g| g.node_mut(op(g)).args[0] = nowhere),
            ["operand 0 is not a value of the function"]
        );
        let result = broken(|g| g.node_mut(op(g)).result = nowhere);
        assert_eq!(result[0], "the result is not a value of the function");
        let weight = broken(|g| {
            g.weight(WeightId::new(7), &TensorTy::fixed(ElemTy::F32, &[4]));
        });
        assert_eq!(weight, ["a value stands for the weight w7, which is not there"]);
    }

    #[test]
    fn definitions() {
        let two = broken(|g| {
            let n = named(g, "n");
            g.node_mut(g.order()[1]).result = n;
        });
        assert_eq!(two[..2], ["the result is not defined by this op", "the result is defined twice"]);
        let swapped = broken(|g| {
            let x = g.params[0];
            g.params.push(x);
        });
        assert_eq!(swapped, ["parameter 1 is not defined as a parameter"]);
        let retyped = broken(|g| {
            let w = g.values().find(|(_, v)| matches!(v.def, Def::Weight(_))).unwrap().0;
            g.value_mut(w).ty = TensorTy::fixed(ElemTy::F16, &[4]);
        });
        assert_eq!(retyped, ["`@g` is read as tensor<4xf16>, but declared as tensor<4xf32>"]);
        let none = broken(|g| {
            let none = g.none();
            g.node_mut(g.order()[1]).args[0] = none;
        });
        assert_eq!(none, ["`silu` needs its operand `x`"]);
    }

    #[test]
    fn names() {
        let mut m = module();
        let again = m.weights[WeightId::new(0)].clone();
        m.weights.push(again);
        assert_eq!(messages(&m), ["the name `@g` is given twice"]);
        let mut m = module();
        for _ in 0..2 {
            let (name, graph) = ("l".to_string(), m.main.clone());
            m.layers.push(crate::module::Layer { name, graph });
        }
        assert_eq!(messages(&m), ["the name `@l` of a layer is given twice"]);
    }

    #[test]
    fn ranges_lie_in_files_that_are_known() {
        let m = module();
        assert!(verify_with_files(&m, &|_| Some(32)).is_ok());
        let errors = verify_with_files(&m, &|_| Some(31)).unwrap_err();
        assert_eq!(errors.0[0].diag.message, "bytes 16..+16 lie outside of its file of 31 bytes");
    }

    #[test]
    fn errors_stand_under_their_lines() {
        let mut m = module();
        let y = named(&m.main, "y");
        m.main.value_mut(y).ty = TensorTy::fixed(ElemTy::F16, &[4]);
        m.main.append(Silu {}, &[y], None).unwrap();
        m.main.params.push(ValueId::new(99));
        let shown = verify(&m).unwrap_err().show(&m);
        let expected = "\
module @m

main (%x: tensor<?x4xf32>, %?v99: ?v99) -> tensor<4xf16> {
// ^ error: parameter 1 is not a value of the function
  %n = rmsnorm %x, @g : tensor<?x4xf32>
  %y = silu %n : tensor<4xf16>
  // ^ error: `silu` has a result of type tensor<?x4xf32>, but tensor<4xf16> is recorded
  %0 = silu %y : tensor<4xf16>
  return %y
}
";
        assert_eq!(shown, expected);
        let diags = verify(&m).unwrap_err().diags(&m);
        assert_eq!(diags.0[1].loc, Loc::Item("%y in main".into()));
    }
}
