//! Reads modules.
//!
//! Declarations are read in one walk that skips the bodies of functions; bodies are read when every name is known.
//! After an error the reader goes on at the next line, and a value whose definition failed is known but poisoned: ops
//! that read it are skipped in silence, so that one mistake gives one error.

use super::elements::{self, double, single};
use super::fields::{Fields, Reader, Value, near};
use super::lexer::{Pos, Tok, Tokens, shorten};
use super::printer::{is_number, single_function};
use super::{Function, MAX_RANK, Parsed, Place};
use crate::diag::{Diag, Diags, Result};
use crate::entity::{Entity, LayerId, ShardId, StateId, ValueId, WeightId};
use crate::graph::Graph;
use crate::module::{Layer, Module, Signature, State};
use crate::ops::{Op, OpKind, Real};
use crate::scheme::Scheme;
use crate::ty::{ElemTy, Shape, TensorTy};
use crate::weights::{Shard, WeightDecl, WeightSource};
use std::collections::{BTreeMap, BTreeSet};

/// Errors reported for one text.
const MAX_ERRORS: usize = 50;

/// Reads the text of a file called `file`.
pub fn parse(text: &str, file: &str) -> Result<Parsed, Diags> {
    let mut parser = Parser {
        tokens: Tokens::new(text, Pos::START),
        module: Module::default(),
        diags: Diags::default(),
        places: BTreeMap::new(),
        weights: BTreeMap::new(),
        states: BTreeMap::new(),
        layers: BTreeMap::new(),
        signatures: BTreeMap::new(),
        broken: BTreeSet::new(),
        aliases: vec![],
        shard_uses: vec![],
        bodies: vec![],
    };
    parser.file();
    let Parser { module, mut diags, places, .. } = parser;
    if diags.0.len() >= MAX_ERRORS {
        diags.push(Diag::input("there are too many errors; the rest is not shown"));
    }
    diags.0 = diags.0.into_iter().map(|d| d.in_file(file)).collect();
    diags.into_result(Parsed { module, directives: directives(text), places })
}

/// The comment lines before the first line that is something else.
fn directives(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim).take_while(|l| l.is_empty() || l.starts_with("//"));
    lines.filter_map(|l| l.strip_prefix("//")).map(|l| l.trim().to_string()).collect()
}

const DECLARATIONS: [&str; 7] = ["target", "pipeline", "shard", "weight", "state", "layer", "main"];

struct Parser<'a> {
    tokens: Tokens<'a>,
    module: Module,
    diags: Diags,
    places: BTreeMap<Place, Pos>,
    weights: BTreeMap<String, (WeightId, Pos)>,
    states: BTreeMap<String, (StateId, Pos)>,
    layers: BTreeMap<String, (LayerId, Pos)>,
    signatures: BTreeMap<String, Signature>,
    /// Names whose declarations are in error, with the `@` only for layers. Nothing is said about their uses.
    broken: BTreeSet<String>,
    /// Aliases, with the names they refer to.
    aliases: Vec<(WeightId, String, Pos)>,
    /// Weights that lie in files.
    shard_uses: Vec<(ShardId, Pos)>,
    bodies: Vec<Body<'a>>,
}

/// A function whose body is still to be read.
struct Body<'a> {
    function: Function,
    /// After the opening brace.
    tokens: Tokens<'a>,
    /// The byte at which the closing brace stands.
    end: usize,
    graph: Graph,
    results: Vec<TensorTy>,
    scope: BTreeMap<String, Named>,
}

/// A name of a function's scope.
#[derive(Clone, Copy)]
struct Named {
    /// `None` when the definition is in error.
    value: Option<ValueId>,
    pos: Pos,
}

/// An operand as it is written.
enum Operand {
    Value(String),
    Name(String),
    None,
}

fn error(pos: Pos, message: impl Into<String>) -> Diag {
    Diag::input(message).at(pos.loc())
}

fn twice(what: &str, sign: char, name: &str, pos: Pos, first: Pos) -> Diag {
    error(pos, format!("{what} `{sign}{}` is declared twice", shorten(name)))
        .help(format!("it is first declared in line {}", first.line))
}

fn with_help(diag: Diag, help: String) -> Diag {
    if help.is_empty() { diag } else { diag.help(help) }
}

impl<'a> Parser<'a> {
    fn file(&mut self) {
        if let Err(e) = self.header() {
            self.diags.push(e);
            if !self.at_declaration() {
                self.resync(usize::MAX);
            }
        }
        let mut sections = vec![];
        while *self.tokens.peek() != Tok::End && self.diags.0.len() < MAX_ERRORS {
            let start = self.tokens.pos();
            if self.tokens.peek() == &Tok::Punct("{-#") {
                // Sections are about what is declared, wherever that stands.
                sections.push(self.tokens.clone());
                while !matches!(self.tokens.peek(), Tok::End | Tok::Punct("#-}")) {
                    self.tokens.bump();
                }
                if !self.tokens.eat("#-}") {
                    self.diags.push(error(start, "this section does not end; expected `#-}`"));
                }
                continue;
            }
            let simple =
                matches!(self.tokens.peek(), Tok::Word("target" | "pipeline" | "shard" | "weight" | "state"));
            if let Err(e) = self.declaration() {
                self.diags.push(e);
                self.resync(start.byte);
                // What follows a broken head is most likely a body.
                while !simple && !self.at_declaration() {
                    self.resync(self.tokens.pos().byte);
                }
            }
        }
        self.references();
        for body in std::mem::take(&mut self.bodies) {
            self.body(body);
        }
        for tokens in sections {
            self.tokens = tokens;
            if let Err(e) = self.section() {
                self.diags.push(e);
            }
        }
    }

    /// Whether a declaration or section starts here, or nothing does.
    fn at_declaration(&self) -> bool {
        match self.tokens.peek() {
            Tok::Word(word) => DECLARATIONS.contains(word),
            other => matches!(other, Tok::End | Tok::Punct("{-#")),
        }
    }

    /// Skips what is left of a line in error, and at least one token when none of it was taken.
    fn resync(&mut self, start: usize) {
        if self.tokens.pos().byte == start {
            self.tokens.bump();
        }
        while *self.tokens.peek() != Tok::End && self.tokens.pos().line == self.tokens.last_end().line {
            self.tokens.bump();
        }
    }

    fn expected(&self, what: &str) -> Diag {
        let pos = self.tokens.pos();
        match self.tokens.peek() {
            Tok::Bad(why) => error(pos, why.clone()),
            other => error(pos, format!("expected {what}, got {other}")),
        }
    }

    fn expect(&mut self, punct: &'static str) -> Result<()> {
        if self.tokens.eat(punct) { Ok(()) } else { Err(self.expected(&format!("`{punct}`"))) }
    }

    fn keyword(&mut self, word: &str) -> Result<()> {
        if *self.tokens.peek() == Tok::Word(word) {
            self.tokens.bump();
            return Ok(());
        }
        Err(self.expected(&format!("`{word}`")))
    }

    fn name(&mut self, what: &str) -> Result<(String, Pos)> {
        let pos = self.tokens.pos();
        let Tok::Name(name) = self.tokens.peek() else { return Err(self.expected(what)) };
        let name = name.to_string();
        self.tokens.bump();
        Ok((name, pos))
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let Tok::Str(text) = self.tokens.peek() else { return Err(self.expected(what)) };
        let text = text.clone();
        self.tokens.bump();
        Ok(text)
    }

    fn integer(&mut self, what: &str) -> Result<u64> {
        let Tok::Int(text) = *self.tokens.peek() else { return Err(self.expected(what)) };
        let n = text
            .parse()
            .map_err(|_| error(self.tokens.pos(), format!("`{}` is not {what}", shorten(text))))?;
        self.tokens.bump();
        Ok(n)
    }

    fn header(&mut self) -> Result<()> {
        self.places.insert(Place::Module, self.tokens.pos());
        self.keyword("module")?;
        self.module.name = self.name("the name of the module, as in `@name`")?.0;
        if self.tokens.peek() == &Tok::Punct("{") {
            for entry in Fields::read(&mut self.tokens)?.entries {
                let text = match entry.item.value {
                    Value::Word(t) | Value::Str(t) | Value::Name(t) => t,
                    other => other.to_string(),
                };
                self.module.facts.insert(entry.key, text);
            }
        }
        Ok(())
    }

    fn declaration(&mut self) -> Result<()> {
        let pos = self.tokens.pos();
        let word = match self.tokens.peek() {
            Tok::Word(word) => *word,
            _ => return Err(self.expected("a declaration")),
        };
        if !DECLARATIONS.contains(&word) {
            let d = error(pos, format!("unknown declaration `{}`", shorten(word)));
            return Err(with_help(d, near(word, DECLARATIONS)));
        }
        self.tokens.bump();
        match word {
            "target" => {
                let target = match self.tokens.peek() {
                    Tok::Word(t) => t.to_string(),
                    Tok::Str(t) => t.clone(),
                    _ => return Err(self.expected("the name of a target")),
                };
                self.tokens.bump();
                Self::once(&mut self.module.target, target, "target", pos)
            }
            "pipeline" => {
                let pipeline = self.string("the pipeline in quotes")?;
                Self::once(&mut self.module.pipeline, pipeline, "pipeline", pos)
            }
            "shard" => self.shard(),
            "weight" => self.weight(pos),
            "state" => self.state(pos),
            "layer" => self.layer(pos),
            _ => self.main(pos),
        }
    }

    fn once(slot: &mut Option<String>, value: String, what: &str, pos: Pos) -> Result<()> {
        match slot.replace(value) {
            None => Ok(()),
            Some(_) => Err(error(pos, format!("the {what} is declared twice"))),
        }
    }

    fn shard(&mut self) -> Result<()> {
        let pos = self.tokens.pos();
        let n = self.integer("the number of the shard")?;
        let next = self.module.shards.len() as u64;
        if n != next {
            return Err(error(pos, format!("shards are numbered in order: expected {next}, got {n}")));
        }
        self.expect("=")?;
        let file = self.string("the name of a file in quotes")?;
        self.module.shards.push(Shard { file });
        Ok(())
    }

    /// Refuses a name that a weight or state has already.
    fn free_name(&self, what: &str, name: &str, pos: Pos) -> Result<()> {
        let weight = self.weights.get(name).map(|&(_, first)| first);
        match weight.or(self.states.get(name).map(|&(_, first)| first)) {
            Some(first) => Err(twice(what, '@', name, pos, first)),
            None => Ok(()),
        }
    }

    fn weight(&mut self, start: Pos) -> Result<()> {
        let (name, pos) = self.name("the name of a weight, as in `@name`")?;
        self.free_name("weight", &name, pos)?;
        // Known before it is whole, so that its uses are not errors too.
        let id = WeightId::new(self.module.weights.len());
        self.weights.insert(name.clone(), (id, pos));
        self.broken.insert(name.clone());
        self.places.insert(Place::Weight(id), start);
        let splat = WeightSource::Splat(0.0.into());
        self.module.weights.push(WeightDecl {
            name: name.clone(),
            ty: TensorTy::fixed(ElemTy::F32, &[]),
            source: splat,
        });
        self.expect(":")?;
        let ty = self.ty()?;
        self.module.weights[id].ty = ty.clone();
        self.expect("=")?;
        self.module.weights[id].source = self.source(id, &ty)?;
        self.broken.remove(&name);
        Ok(())
    }

    fn source(&mut self, id: WeightId, ty: &TensorTy) -> Result<WeightSource> {
        const SOURCES: [&str; 5] = ["file", "inline", "splat", "blob", "alias"];
        let pos = self.tokens.pos();
        let word = match *self.tokens.peek() {
            Tok::Word(word) => word,
            _ => return Err(self.expected("the source of the weight")),
        };
        if !SOURCES.contains(&word) {
            let d = error(pos, format!("unknown source `{}` of a weight", shorten(word)));
            return Err(with_help(d, near(word, SOURCES)));
        }
        self.tokens.bump();
        match word {
            "file" => {
                let pos = self.tokens.pos();
                let shard = self.integer("the number of a shard")?;
                let shard =
                    u32::try_from(shard).map_err(|_| error(pos, format!("there is no shard {shard}")))?;
                let shard = ShardId::new(shard as usize);
                self.shard_uses.push((shard, pos));
                self.expect("[")?;
                let at = self.integer("the first byte")?;
                self.expect("..+")?;
                let len = self.integer("the number of bytes")?;
                self.expect("]")?;
                Ok(WeightSource::File { shard, at, len })
            }
            "inline" => self.inline(ty),
            "splat" => {
                let x = self.number("f32", single)?;
                Ok(WeightSource::Splat(x.into()))
            }
            "blob" => {
                let pos = self.tokens.pos();
                let (Tok::Word(text) | Tok::Int(text) | Tok::Float(text)) = *self.tokens.peek() else {
                    return Err(self.expected("a digest"));
                };
                let digest = text.parse().map_err(|e: Diag| e.at(pos.loc()))?;
                self.tokens.bump();
                Ok(WeightSource::Blob(digest))
            }
            _ => {
                let (name, pos) = self.name("the name of a weight, as in `@name`")?;
                self.aliases.push((id, name, pos));
                Ok(WeightSource::Alias(id))
            }
        }
    }

    /// A number of `what`, which `read` makes of its text.
    fn number<T>(&mut self, what: impl std::fmt::Display, read: impl Fn(&str) -> Option<T>) -> Result<T> {
        let text = match *self.tokens.peek() {
            Tok::Int(text) | Tok::Float(text) => text,
            Tok::Word(text @ ("inf" | "-inf" | "nan")) => text,
            _ => return Err(self.expected(&format!("a number of {what}"))),
        };
        let bad = || error(self.tokens.pos(), format!("`{}` is not a number of {what}", shorten(text)));
        let x = read(text).ok_or_else(bad)?;
        self.tokens.bump();
        Ok(x)
    }

    fn inline(&mut self, ty: &TensorTy) -> Result<WeightSource> {
        let pos = self.tokens.pos();
        let dims = ty
            .shape
            .dims()
            .ok_or_else(|| error(pos, format!("inline data of type {ty} has no fixed size")))?;
        let mut codes = vec![];
        if dims.contains(&0) {
            self.expect("[")?;
            self.expect("]")?;
            return Ok(WeightSource::Inline(vec![]));
        }
        self.numbers(&dims, ty, &mut codes)?;
        // There are as many codes as numbers in the text, so this allocates in proportion to it.
        let cols = dims.last().copied().unwrap_or(1) as usize;
        Ok(WeightSource::Inline(elements::pack(&codes, cols, ty.elem)))
    }

    /// Reads as many numbers as `dims` say, nested as they say.
    fn numbers(&mut self, dims: &[u64], ty: &TensorTy, codes: &mut Vec<u64>) -> Result<()> {
        let Some((&n, inner)) = dims.split_first() else {
            codes.push(self.number(ty.elem, |text| elements::read(text, ty.elem))?);
            return Ok(());
        };
        let what = if inner.is_empty() { "numbers" } else { "rows" };
        self.expect("[")?;
        for i in 0..n {
            if i > 0 && !self.tokens.eat(",") {
                return Err(match self.tokens.peek() {
                    Tok::Punct("]") => error(self.tokens.pos(), format!("{ty} has {n} {what} here, got {i}")),
                    _ => self.expected("`,`"),
                });
            }
            self.numbers(inner, ty, codes)?;
        }
        match self.tokens.peek() {
            Tok::Punct(",") => Err(error(self.tokens.pos(), format!("{ty} has {n} {what} here, got more"))),
            _ => self.expect("]"),
        }
    }

    fn state(&mut self, start: Pos) -> Result<()> {
        let (name, pos) = self.name("the name of a state, as in `@name`")?;
        self.free_name("state", &name, pos)?;
        self.broken.insert(name.clone());
        self.expect(":")?;
        let ty = self.ty()?;
        self.broken.remove(&name);
        let id = self.module.states.push(State { name: name.clone(), ty });
        self.states.insert(name, (id, pos));
        self.places.insert(Place::State(id), start);
        Ok(())
    }

    /// A type: `tensor<?tx64xf32>`.
    fn ty(&mut self) -> Result<TensorTy> {
        let pos = self.tokens.pos();
        if *self.tokens.peek() != Tok::Word("tensor") {
            return Err(self.expected("a type, as in `tensor<?tx64xf32>`"));
        }
        let rest = self.tokens.rest_of_line();
        let body = |rest: &'a str| {
            let body = rest.strip_prefix('<')?;
            let mut end = body.find('>')?;
            if body[..end].contains("!q<") {
                end += 1 + body[end + 1..].find('>')?;
            }
            Some(&body[..end])
        };
        let Some(body) = body(rest) else {
            return Err(error(pos, "expected a type, as in `tensor<?tx64xf32>`"));
        };
        let ty = read_type(body).map_err(|e| e.at(pos.loc()))?;
        self.tokens.skip_raw(body.len() + 2);
        Ok(ty)
    }

    fn layer(&mut self, start: Pos) -> Result<()> {
        let (name, pos) = self.name("the name of a layer, as in `@name`")?;
        if let Some(&(_, first)) = self.layers.get(&name) {
            return Err(twice("layer", '@', &name, pos, first));
        }
        if name == "main" {
            return Err(error(pos, "a layer cannot be called `main`"));
        }
        let layer = Layer { name: name.clone(), graph: Graph::new() };
        let id = self.module.layers.push(layer);
        self.layers.insert(name.clone(), (id, pos));
        self.broken.insert(format!("@{name}"));
        self.function(Function::Layer(id), start)?;
        self.broken.remove(&format!("@{name}"));
        let body = self.bodies.last().expect("a function that was read has left its body");
        let params = body.graph.params.iter().map(|&p| body.graph.ty(p).clone()).collect();
        if let Some(result) = body.results.first() {
            self.signatures.insert(name, Signature { params, result: result.clone() });
        }
        Ok(())
    }

    fn main(&mut self, start: Pos) -> Result<()> {
        if self.places.contains_key(&Place::Function(Function::Main)) {
            return Err(error(start, "`main` is declared twice"));
        }
        self.function(Function::Main, start)
    }

    /// Reads parameters and results, and remembers where the body is.
    fn function(&mut self, function: Function, start: Pos) -> Result<()> {
        self.places.insert(Place::Function(function), start);
        let (mut graph, mut scope) = (Graph::new(), BTreeMap::<String, Named>::new());
        self.expect("(")?;
        while *self.tokens.peek() != Tok::Punct(")") {
            if !graph.params.is_empty() {
                self.expect(",")?;
            }
            let pos = self.tokens.pos();
            let Tok::Value(name) = self.tokens.peek() else {
                return Err(self.expected("a parameter, as in `%x: tensor<?x4xf32>`"));
            };
            let name = name.to_string();
            self.tokens.bump();
            self.expect(":")?;
            let ty = self.ty()?;
            let value = graph.add_param(&name, ty);
            if is_number(&name) {
                graph.value_mut(value).name = None;
            }
            let named = Named { value: Some(value), pos };
            if let Some(first) = scope.insert(name.clone(), named) {
                return Err(twice("parameter", '%', &name, pos, first.pos));
            }
        }
        self.expect(")")?;
        self.expect("->")?;
        let mut results = vec![];
        if self.tokens.eat("(") {
            while !self.tokens.eat(")") {
                if !results.is_empty() {
                    self.expect(",")?;
                }
                results.push(self.ty()?);
            }
        } else {
            results.push(self.ty()?);
        }
        let open = self.tokens.pos();
        self.expect("{")?;
        let tokens = self.tokens.clone();
        let end = self.skip_body().ok_or_else(|| error(open, "this `{` is not closed"))?;
        self.bodies.push(Body { function, tokens, end, graph, results, scope });
        Ok(())
    }

    /// Skips to after the closing brace of a body and returns where that stands. A declaration at the start of a line
    /// means that the brace is missing.
    fn skip_body(&mut self) -> Option<usize> {
        let mut depth = 0;
        loop {
            let pos = self.tokens.pos();
            match self.tokens.peek() {
                Tok::End => return None,
                Tok::Word(word) if pos.col == 1 && DECLARATIONS.contains(word) => return None,
                Tok::Punct("{-#") if pos.col == 1 => return None,
                Tok::Punct("}") if depth == 0 => {
                    self.tokens.bump();
                    return Some(pos.byte);
                }
                Tok::Punct("{") => depth += 1,
                Tok::Punct("}") => depth -= 1,
                _ => {}
            }
            self.tokens.bump();
        }
    }

    /// Resolves what declarations say of each other.
    fn references(&mut self) {
        for (id, name, pos) in std::mem::take(&mut self.aliases) {
            match self.weights.get(&name) {
                Some(&(of, _)) => self.module.weights[id].source = WeightSource::Alias(of),
                None => {
                    let d = error(pos, format!("there is no weight `@{}`", shorten(&name)));
                    self.diags.push(with_help(d, near(&name, self.weights.keys().map(String::as_str))));
                }
            }
        }
        for (shard, pos) in std::mem::take(&mut self.shard_uses) {
            if self.module.shards.get(shard).is_none() {
                let n = self.module.shards.len();
                let d = error(pos, format!("there is no shard {}", shard.index()));
                self.diags.push(d.help(format!("shards declared: {n}")));
            }
        }
    }

    fn body(&mut self, mut body: Body<'a>) {
        self.tokens = body.tokens.clone();
        let mut leaves = Leaves::default();
        let mut returned = false;
        while self.tokens.pos().byte < body.end && self.diags.0.len() < MAX_ERRORS {
            let start = self.tokens.pos();
            let done = match self.tokens.peek() {
                _ if returned => Err(error(start, "expected `}` after `return`")),
                Tok::Word("return") => {
                    returned = true;
                    self.places.insert(Place::Return(body.function), start);
                    self.results(&mut body)
                }
                _ => self.op(&mut body, &mut leaves),
            };
            if let Err(e) = done {
                self.diags.push(e);
                self.resync(start.byte);
            }
        }
        if !returned && self.diags.is_empty() {
            self.diags.push(error(self.tokens.pos(), "expected `return` before the end of the function"));
        }
        match body.function {
            Function::Layer(id) => self.module.layers[id].graph = body.graph,
            Function::Main => self.module.main = body.graph,
        }
    }

    fn results(&mut self, body: &mut Body<'a>) -> Result<()> {
        let start = self.tokens.pos();
        self.tokens.bump();
        let mut poisoned = false;
        let mut results = vec![];
        let mut more =
            self.tokens.pos().line == self.tokens.last_end().line && self.tokens.pos().byte < body.end;
        while more {
            let pos = self.tokens.pos();
            let Tok::Value(name) = self.tokens.peek() else {
                return Err(self.expected("a value, as in `%y`"));
            };
            let name = name.to_string();
            self.tokens.bump();
            more = self.tokens.eat(",");
            let value = Self::value(body, &name, pos)?;
            let declared = body.results.get(results.len());
            results.push(value);
            let (Some(value), Some(declared)) = (value, declared) else {
                poisoned = true;
                continue;
            };
            let ty = body.graph.ty(value);
            if ty != declared {
                let name = shorten(&name);
                return Err(error(pos, format!("`%{name}` has type {ty}, the function returns {declared}")));
            }
        }
        if results.len() != body.results.len() {
            let (got, want) = (results.len(), body.results.len());
            return Err(error(start, format!("values returned: {got}, results declared: {want}")));
        }
        if !poisoned {
            body.graph.results = results.into_iter().flatten().collect();
        }
        Ok(())
    }

    /// The value called `name`; `None` when its definition is in error.
    fn value(body: &Body<'a>, name: &str, pos: Pos) -> Result<Option<ValueId>> {
        let Some(named) = body.scope.get(name) else {
            let d = error(pos, format!("there is no value `%{}` before this line", shorten(name)));
            return Err(with_help(d, near(name, body.scope.keys().map(String::as_str))));
        };
        Ok(named.value)
    }

    /// `%y = op operands fields : type`
    fn op(&mut self, body: &mut Body<'a>, leaves: &mut Leaves) -> Result<()> {
        let pos = self.tokens.pos();
        let Tok::Value(name) = self.tokens.peek() else {
            return Err(self.expected("an op, as in `%y = relu %x`, or `return`"));
        };
        let name = name.to_string();
        self.tokens.bump();
        let made = self.op_of(body, leaves, &name, pos);
        let named = Named { value: *made.as_ref().unwrap_or(&None), pos };
        if let Some(&first) = body.scope.get(&name) {
            made?;
            return Err(twice("value", '%', &name, pos, first.pos));
        }
        body.scope.insert(name, named);
        made.map(|_| ())
    }

    fn op_of(
        &mut self,
        body: &mut Body<'a>,
        leaves: &mut Leaves,
        name: &str,
        start: Pos,
    ) -> Result<Option<ValueId>> {
        self.expect("=")?;
        let op_pos = self.tokens.pos();
        let Tok::Word(word) = *self.tokens.peek() else { return Err(self.expected("the name of an op")) };
        let Some(kind) = OpKind::by_name(word) else {
            let d = error(op_pos, format!("unknown op `{}`", shorten(word)));
            return Err(with_help(d, near(word, OpKind::ALL.iter().map(|k| k.info().name))));
        };
        self.tokens.bump();
        let operands = self.operands()?;
        let op = match self.tokens.peek() {
            Tok::Punct("{") => {
                let fields = Fields::read(&mut self.tokens)?;
                kind.read(Reader::of(&fields)).map_err(|e| e.into_diag().at(op_pos.loc()))?
            }
            _ => Op::default_of(kind),
        };
        let declared = if self.tokens.eat(":") { Some(self.ty()?) } else { None };
        if self.tokens.pos().line == self.tokens.last_end().line && self.tokens.pos().byte < body.end {
            return Err(self.expected("the end of the line"));
        }

        let mut args = vec![];
        let mut poisoned = false;
        for (operand, pos) in operands {
            match self.operand(body, leaves, operand, pos)? {
                Some(arg) => args.push(arg),
                None => poisoned = true,
            }
        }
        if poisoned {
            return Ok(None);
        }
        while args.len() < op.operands().fixed() {
            args.push(leaves.none(&mut body.graph));
        }
        if !self.can_call(&op, op_pos)? {
            return Ok(None);
        }
        let ty = match declared {
            Some(ty) => ty,
            None => {
                let signatures = |name: &str| self.signatures.get(name).cloned();
                crate::build::infer(&body.graph, &op, &args, &signatures).map_err(|e| e.at(op_pos.loc()))?
            }
        };
        if ty.rank() > MAX_RANK {
            return Err(error(op_pos, format!("the result has {} axes, more than {MAX_RANK}", ty.rank())));
        }
        let name = Some(name).filter(|n| !is_number(n));
        let value = body.graph.push(op, args, ty, name);
        let id = body.graph.order().last().copied().expect("an op was just pushed");
        self.places.insert(Place::Op(body.function, id), start);
        Ok(Some(value))
    }

    /// Refuses a call of a layer that is not there; false for one whose declaration is in error.
    fn can_call(&self, op: &Op, pos: Pos) -> Result<bool> {
        let Op::Call(call) = op else { return Ok(true) };
        if self.layers.contains_key(&call.layer) {
            return Ok(!self.broken.contains(&format!("@{}", call.layer)));
        }
        let d = error(pos, format!("there is no layer `@{}`", shorten(&call.layer)));
        Err(with_help(d, near(&call.layer, self.layers.keys().map(String::as_str))))
    }

    fn operands(&mut self) -> Result<Vec<(Operand, Pos)>> {
        let mut operands = vec![];
        loop {
            let pos = self.tokens.pos();
            let operand = match self.tokens.peek() {
                // The next line is the next op.
                _ if operands.is_empty() && pos.line != self.tokens.last_end().line => return Ok(operands),
                Tok::Value(name) => Operand::Value(name.to_string()),
                Tok::Name(name) => Operand::Name(name.to_string()),
                Tok::Word("none") => Operand::None,
                _ if operands.is_empty() => return Ok(operands),
                _ => return Err(self.expected("an operand")),
            };
            self.tokens.bump();
            operands.push((operand, pos));
            if !self.tokens.eat(",") {
                return Ok(operands);
            }
        }
    }

    /// The value of an operand; `None` when it is poisoned.
    fn operand(
        &self,
        body: &mut Body<'a>,
        leaves: &mut Leaves,
        operand: Operand,
        pos: Pos,
    ) -> Result<Option<ValueId>> {
        let name = match operand {
            Operand::None => return Ok(Some(leaves.none(&mut body.graph))),
            Operand::Value(name) => return Self::value(body, &name, pos),
            Operand::Name(name) => name,
        };
        if self.broken.contains(&name) {
            return Ok(None);
        }
        let graph = &mut body.graph;
        if let Some(&(id, _)) = self.weights.get(&name) {
            let ty = &self.module.weights[id].ty;
            return Ok(Some(*leaves.weights.entry(id).or_insert_with(|| graph.weight(id, ty))));
        }
        if let Some(&(id, _)) = self.states.get(&name) {
            let ty = &self.module.states[id].ty;
            return Ok(Some(*leaves.states.entry(id).or_insert_with(|| graph.state(id, ty))));
        }
        let d = error(pos, format!("there is no weight or state `@{}`", shorten(&name)));
        let known = self.weights.keys().chain(self.states.keys()).map(String::as_str);
        Err(with_help(d, near(&name, known)))
    }

    /// `{-# calibration .. #-}`
    fn section(&mut self) -> Result<()> {
        self.expect("{-#")?;
        self.keyword("calibration")?;
        while !self.tokens.eat("#-}") {
            let pos = self.tokens.pos();
            let key = match self.tokens.peek() {
                Tok::Str(key) => {
                    let key = key.clone();
                    self.tokens.bump();
                    key
                }
                Tok::Value(value) if value.contains('.') => {
                    let value = value.to_string();
                    self.tokens.bump();
                    format!("{}.{value}", self.section_function(pos)?)
                }
                _ => return Err(self.expected("a statistic of a value, as in `%x.absmax`")),
            };
            self.expect("=")?;
            self.expect("[")?;
            let mut numbers = vec![];
            while !self.tokens.eat("]") {
                if !numbers.is_empty() {
                    self.expect(",")?;
                }
                numbers.push(Real(self.number("f64", double)?));
            }
            if self.module.calibration.insert(key, numbers).is_some() {
                return Err(error(pos, "this statistic is given twice"));
            }
        }
        Ok(())
    }

    fn section_function(&mut self, pos: Pos) -> Result<String> {
        if *self.tokens.peek() != Tok::Word("in") {
            let single = single_function(&self.module).map(String::from);
            return single.ok_or_else(|| {
                error(pos, "there are several functions").help("say which one, as in `%x.absmax in @layer`")
            });
        }
        self.tokens.bump();
        let (name, pos) = self.name("the name of a layer, as in `@name`")?;
        if name == "main" || self.layers.contains_key(&name) {
            return Ok(name);
        }
        let d = error(pos, format!("there is no layer `@{}`", shorten(&name)));
        Err(with_help(d, near(&name, self.layers.keys().map(String::as_str))))
    }
}

/// Values of a graph that are not defined by ops, by what they are.
#[derive(Default)]
struct Leaves {
    weights: BTreeMap<WeightId, ValueId>,
    states: BTreeMap<StateId, ValueId>,
    none: Option<ValueId>,
}

impl Leaves {
    fn none(&mut self, graph: &mut Graph) -> ValueId {
        *self.none.get_or_insert_with(|| graph.none())
    }
}

/// Reads what stands between the brackets of a type.
fn read_type(body: &str) -> Result<TensorTy> {
    let bad = || {
        Diag::input(format!("`tensor<{}>` is not a type", shorten(body)))
            .help("write extents, then the element type, as in `tensor<?tx64xf32>`")
    };
    let (dims, elem) = match body.find("!q<") {
        Some(at) => (&body[..at], ElemTy::Q(Scheme::parse(&body[at..])?)),
        None => {
            let at = body.rfind('x').map_or(0, |x| x + 1);
            (&body[..at], ElemTy::by_name(&body[at..]).ok_or_else(bad)?)
        }
    };
    let shape = match dims {
        "" => Shape::default(),
        dims => match dims.strip_suffix('x').filter(|d| !d.is_empty()) {
            Some(dims) => Shape::parse(dims).map_err(|_| bad())?,
            None => return Err(bad()),
        },
    };
    if shape.rank() > MAX_RANK {
        return Err(Diag::input(format!("a type has {} axes, more than {MAX_RANK}", shape.rank())));
    }
    Ok(TensorTy { elem, shape })
}
