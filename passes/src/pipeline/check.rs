//! What can be found wrong with a pipeline before any weight is read.

use super::{Element, Pipeline, What, list};
use crate::calib::stats::TENSOR;
use crate::pass::{Fact, NameKind, Pass, PassInfo, PatternUse, Scope, Stats, quoted};
use crate::registry::Registry;
use quantc_ir::diag::{Diag, Diags, Kind, Loc, near_misses};
use quantc_ir::module::Module;
use quantc_ir::target::{Backend, TargetDesc};
use quantc_ir::ty::ElemTy;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A pipeline that was found sound. It prints fully spelled.
#[derive(Clone, Debug)]
pub struct Checked {
    /// What is done, in order.
    pub steps: Vec<Step>,
}

/// One thing to do.
#[derive(Clone, Debug)]
pub enum Step {
    /// Run a pass.
    Pass(Arc<dyn Pass>),
    /// Run the steps on each layer in turn.
    Layers(Vec<Step>),
    /// Run the steps until none changes anything.
    Repeat(Vec<Step>),
}

impl Checked {
    /// Every pass in order; those in groups once.
    pub fn passes(&self) -> Vec<&dyn Pass> {
        fn walk<'a>(steps: &'a [Step], out: &mut Vec<&'a dyn Pass>) {
            for step in steps {
                match step {
                    Step::Pass(pass) => out.push(&**pass),
                    Step::Layers(inner) | Step::Repeat(inner) => walk(inner, out),
                }
            }
        }
        let mut out = vec![];
        walk(&self.steps, &mut out);
        out
    }
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        list(f, &self.steps, &|f, step| fmt::Display::fmt(step, f))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, inner) = match self {
            Step::Pass(pass) => return write!(f, "{}{}", pass.info().name, pass.options()),
            Step::Layers(inner) => ("layers", inner),
            Step::Repeat(inner) => ("repeat", inner),
        };
        write!(f, "{word}(")?;
        list(f, inner, &|f, step| fmt::Display::fmt(step, f))?;
        f.write_str(")")
    }
}

/// Resolves names and options and checks, all problems together:
/// - passes and options exist, and options have values of their types;
/// - what a pass needs is provided before it, and is not stale by then;
/// - name filters match something in the module;
/// - the target has a kernel for each pair of types that a pass leaves to be multiplied;
/// - passes on the module are outside of `layers(..)`.
pub fn check(
    pipeline: &Pipeline,
    registry: &Registry,
    module: &Module,
    target: Option<&TargetDesc>,
    backend: Option<&dyn Backend>,
) -> Result<Checked, Diags> {
    check_given(pipeline, registry, module, target, backend, &[])
}

/// As [`check`], with further facts that hold before the pipeline runs.
pub fn check_given(
    pipeline: &Pipeline,
    registry: &Registry,
    module: &Module,
    target: Option<&TargetDesc>,
    backend: Option<&dyn Backend>,
    more: &[Fact],
) -> Result<Checked, Diags> {
    let mut cx = Cx {
        pipeline,
        registry,
        module,
        backend,
        facts: given(module, target, more),
        text_stale: None,
        tensor_stale: None,
        left: vec![],
        diags: Diags::default(),
    };
    let steps = cx.elements(&pipeline.elements, false);
    cx.multiplied();
    cx.diags.into_result(Checked { steps })
}

/// Whether a fact holds at a place of the pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Known {
    Holds,
    /// It held until this pass ran.
    Stale(&'static str),
}

struct Cx<'a> {
    pipeline: &'a Pipeline,
    registry: &'a Registry,
    module: &'a Module,
    backend: Option<&'a dyn Backend>,
    facts: BTreeMap<Fact, Known>,
    /// The pass that made the statistics in the module's text stale.
    text_stale: Option<&'static str>,
    /// The pass that made those of whole tensors stale, in the text and elsewhere.
    tensor_stale: Option<&'static str>,
    /// What passes so far leave to be multiplied: the pass, its place, and the types.
    left: Vec<(&'static str, Range<usize>, ElemTy, ElemTy)>,
    diags: Diags,
}

/// What holds before the pipeline runs.
fn given(module: &Module, target: Option<&TargetDesc>, more: &[Fact]) -> BTreeMap<Fact, Known> {
    let mut facts: BTreeMap<Fact, Known> = more.iter().map(|&fact| (fact, Known::Holds)).collect();
    if !module.layers.is_empty() {
        facts.insert(Fact::Layers, Known::Holds);
    }
    if target.is_some() {
        facts.insert(Fact::Target, Known::Holds);
    }
    facts
}

impl Cx<'_> {
    fn elements(&mut self, elements: &[Element], in_layers: bool) -> Vec<Step> {
        elements.iter().filter_map(|e| self.element(e, in_layers)).collect()
    }

    fn element(&mut self, element: &Element, in_layers: bool) -> Option<Step> {
        match &element.what {
            What::Pass(options) => self.pass(&element.at, options, in_layers),
            What::Layers(_) if in_layers => {
                self.problem(&element.at, Diag::pipeline("`layers` inside of `layers`"));
                None
            }
            What::Layers(inner) => Some(Step::Layers(self.elements(inner, true))),
            What::Repeat(inner) => {
                let steps = self.elements(inner, in_layers);
                // What the last pass of the body makes stale, the first must not need when it runs again. Problems of
                // the first round would only be repeated.
                let found = self.diags.0.len();
                if found == 0 {
                    self.elements(inner, in_layers);
                }
                Some(Step::Repeat(steps))
            }
        }
    }

    fn pass(&mut self, at: &Range<usize>, options: &Range<usize>, in_layers: bool) -> Option<Step> {
        let info = match self.registry.get(&self.pipeline.text[at.clone()]) {
            Ok(info) => info,
            Err(diag) => {
                self.problem(at, diag);
                return None;
            }
        };
        let pass = match (info.read)(&self.pipeline.text[options.clone()]) {
            Ok(pass) => pass,
            Err(problem) => {
                self.bad_options(info, options, problem);
                return None;
            }
        };
        if let Err(diag) = pass.validate() {
            self.problem(options, diag.context(format!("checking the options of `{}`", info.name)));
        }
        if info.scope == Scope::Module && in_layers {
            let text = format!("`{}` runs on the whole module", info.name);
            self.problem(at, Diag::pipeline(text).help("move it out of `layers(..)`"));
        }
        for need in pass.needs() {
            self.need(at, info, need);
        }
        for pattern in pass.patterns() {
            self.pattern(at, info, pattern);
        }
        self.left.extend(pass.emits().into_iter().map(|(x, w)| (info.name, at.clone(), x, w)));
        if let Some(rounded) = pass.rounds_rows() {
            let rows = self.left.iter_mut().map(|(_, _, x, _)| x);
            rows.filter(|x| **x == ElemTy::F32).for_each(|x| *x = rounded);
        }
        match info.stats {
            Stats::Keeps => {}
            Stats::Transforms => {
                self.tensor_stale.get_or_insert(info.name);
                self.stale(info.name, |name| TENSOR.contains(&name));
            }
            Stats::Drops => {
                self.text_stale.get_or_insert(info.name);
                self.stale(info.name, |_| true);
            }
        }
        for fact in pass.provides() {
            self.facts.insert(fact, Known::Holds);
        }
        let step = Step::Pass(Arc::from(pass));
        Some(if info.scope == Scope::Layer && !in_layers { Step::Layers(vec![step]) } else { step })
    }

    /// Asks for kernels of what is left to be multiplied in the end.
    fn multiplied(&mut self) {
        for (pass, at, x, w) in std::mem::take(&mut self.left) {
            let Some(Err(diag)) = self.backend.map(|b| b.supports_matmul(x, w)) else { continue };
            self.problem(&at, diag.context(format!("checking what `{pass}` leaves to be multiplied")));
        }
    }

    /// Makes statistics stale.
    fn stale(&mut self, by: &'static str, of: impl Fn(&str) -> bool) {
        for (fact, known) in &mut self.facts {
            if matches!(fact, Fact::Stat(name) if of(name)) && *known == Known::Holds {
                *known = Known::Stale(by);
            }
        }
    }

    /// A problem with options whose place counts from the start of their text.
    fn bad_options(&mut self, info: &PassInfo, options: &Range<usize>, mut problem: Diag) {
        let text = &self.pipeline.text[options.clone()];
        let at = match std::mem::take(&mut problem.loc) {
            Loc::Text { line, col } => {
                token_at(text, line, col).map(|t| options.start + t.start..options.start + t.end)
            }
            _ => None,
        };
        problem.kind = Kind::Pipeline;
        problem.message = format!("`{}`: {}", info.name, problem.message);
        if problem.help.is_none() {
            problem = problem.help(format!("`quantc passes {}` lists its options", info.name));
        }
        self.problem(&at.unwrap_or(options.clone()), problem);
    }

    fn need(&mut self, at: &Range<usize>, info: &PassInfo, need: Fact) {
        // Statistics may stand in the module's own text, under any function and value.
        let known = self.facts.get(&need).cloned();
        let of_tensor = matches!(need, Fact::Stat(name) if TENSOR.contains(&name));
        let stale = self.text_stale.or(self.tensor_stale.filter(|_| of_tensor));
        let known = known.or_else(|| self.in_text(need).then(|| stale.map_or(Known::Holds, Known::Stale)));
        let diag = match known {
            Some(Known::Holds) => return,
            Some(Known::Stale(by)) => {
                let text =
                    format!("`{}` needs {need}, but `{by}` changes the values it was taken of", info.name);
                Diag::pipeline(text).help(format!("take it again between `{by}` and `{}`", info.name))
            }
            None => {
                let diag = Diag::pipeline(format!("`{}` needs {need}", info.name));
                match (need, &self.providers(need)[..]) {
                    (Fact::Target, _) => diag.help("choose one with `--target`"),
                    (Fact::Data, _) => diag.help("give one with `--data`"),
                    (Fact::Stat(name), []) => {
                        diag.help(format!("put `calibrate{{stats=[{name}]}}` in front of it"))
                    }
                    (_, []) => diag,
                    (_, some) => diag.help(format!("put {} in front of it", quoted(some))),
                }
            }
        };
        self.problem(at, diag);
    }

    fn in_text(&self, need: Fact) -> bool {
        let Fact::Stat(name) = need else { return false };
        self.module.calibration.keys().any(|key| key.rsplit('.').next() == Some(name))
    }

    /// The passes that provide `fact` when their options are left alone, or by declaration.
    fn providers(&self, fact: Fact) -> Vec<&'static str> {
        let provides = |p: &&PassInfo| {
            p.provides.contains(&fact) || (p.read)("").is_ok_and(|pass| pass.provides().contains(&fact))
        };
        self.registry.passes().filter(provides).map(|p| p.name).collect()
    }

    fn pattern(&mut self, at: &Range<usize>, info: &PassInfo, pattern: PatternUse<'_>) {
        // Layers that an earlier pass makes have names that nobody knows yet.
        let unknown = self.module.layers.is_empty() && self.facts.contains_key(&Fact::Layers);
        let names: Vec<&str> = match pattern.names {
            NameKind::Layer if unknown => return,
            NameKind::Layer => self.module.layers.values().map(|l| l.name.as_str()).collect(),
            NameKind::Weight => self.module.weights.values().map(|w| w.name.as_str()).collect(),
            NameKind::Value => {
                let named =
                    |(_, g)| quantc_ir::graph::Graph::values(g).filter_map(|(_, v)| v.name.as_deref());
                self.module.graphs().flat_map(named).collect()
            }
        };
        if names.iter().any(|n| pattern.pattern.matches(n)) {
            return;
        }
        let (kind, option) = (pattern.names, pattern.option);
        let text = format!("`{}` of `{option}` matches no {kind}, in `{}`", pattern.pattern, info.name);
        let bare = pattern.pattern.0.replace('*', "");
        let diag = Diag::pipeline(text);
        let diag = match near_misses(&bare, names.iter().copied())[..] {
            [] => diag.help("`quantc inspect` lists names"),
            ref near => diag.help(format!("did you mean {}?", quoted(near))),
        };
        self.problem(at, diag);
    }

    fn problem(&mut self, at: &Range<usize>, diag: Diag) {
        self.diags.push(self.pipeline.problem(at, diag));
    }
}

/// The bytes of the word at a place of `text`; at least one character, unless the text ends there.
fn token_at(text: &str, line: u32, col: u32) -> Option<Range<usize>> {
    let lines = text.split_inclusive('\n');
    let before: usize = lines.take(line.checked_sub(1)? as usize).map(str::len).sum();
    let rest = text.get(before..)?;
    let start = before + rest.char_indices().nth(col.checked_sub(1)? as usize).map_or(rest.len(), |(i, _)| i);
    let stop = |c: char| c.is_whitespace() || ",={}[]()".contains(c);
    let len = text[start..].find(stop).unwrap_or(text.len() - start);
    Some(start..start + len)
}
