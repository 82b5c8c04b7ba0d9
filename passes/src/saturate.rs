//! Equality saturation over our own ops: a function becomes an e-graph, rules add equal expressions, the cheapest
//! whole is taken back.
//!
//! What holds:
//! - One function is one region; its parameters, weights and states are leaves. Functions that are the same but for
//!   names and weights are solved once.
//! - A rule that changes a type is refused where it happens.
//! - Ops with effects stay, exactly once each and in their order.
//! - Shared values are paid once. The result is never dearer than the function was.
//! - Limits count rounds and nodes, never seconds: the result does not depend on the machine.
//! - Values that are still computed keep their ids and names.
//!
//! Rules are declared by [`rule!`](crate::rule!) in the files of the passes that use them; [`all_rules`] lists them, and
//! each is proved by evaluating both sides.
//!
//! What is not here, and why: egg's own extraction and its proofs. Both work on trees, whose size multiplies with every
//! residual connection. Instead each rewritten value knows the chain of rules that led to it.

mod cost;
mod enode;
mod extract;
mod pattern;
mod region;
mod rule;

pub use cost::{BackendCost, Cost, TableCost};
pub use rule::{Match, Rule, Sample};

use crate::pass::{Changed, Declared, PassCx};
use egg::{EGraph, Id};
use enode::{ENode, Head, Types};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::graph::Graph;
use quantc_ir::ops::OpSpec;
use region::{Ref, Region, Solution, Step};
use rule::Compiled;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// What saturation told about the functions of a run, kept in its [`Session`](crate::pass::Session).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Explanations(
    /// Function, value and the rules that led to it, the first one first.
    pub Vec<(String, String, Vec<&'static str>)>,
);

/// Saturators of a run by pass and options.
#[derive(Default)]
struct Saturators(BTreeMap<(&'static str, u32, u32, crate::pass::Numerics), Saturator>);

/// Rewrites the function that a pass runs on. What is priced by the code generator when there is one, else by
/// [`TableCost`]; rules that do more to results than the pass or the run allows are left out.
pub fn run(
    pass: &dyn Declared,
    cx: &mut PassCx<'_>,
    rules: &'static [Rule],
    limits: Limits,
) -> Result<Changed> {
    let allowed = cx.env.numerics.max(pass.info().numerics);
    let key = (cx.pass(), limits.rounds, limits.nodes, allowed);
    let mut all = cx.session().take::<Saturators>().unwrap_or_default();
    let mut saturator = match all.0.remove(&key) {
        Some(known) => known,
        None => Saturator::new(rules.iter().filter(|r| r.numerics <= allowed), limits)?,
    };
    let backend = cx.backend.map(|backend| BackendCost { backend, tokens: 1 });
    let cost: &dyn Cost = match &backend {
        Some(cost) => cost,
        None => &TableCost { tokens: 1 },
    };
    let report = saturator.run(cx.graph_mut(), cost)?;
    all.0.insert(key, saturator);
    cx.session().put(all);

    for used in report.rules.iter().filter(|u| u.time > Duration::ZERO) {
        cx.add_span(used.rule, used.time);
    }
    let function = cx.function_name().to_string();
    if let Some(limit) = report.limit {
        cx.remark(format_args!("@{function}"), format_args!("stopped at the limit of {limit}"));
    }
    if report.changed {
        let counted: Vec<String> = report
            .rules
            .iter()
            .filter(|u| u.matches > 0)
            .map(|u| format!("{} x{}", u.rule, u.matches))
            .collect();
        // Without a match, ops that were written twice were merged.
        let told = if counted.is_empty() { "equal ops merged".to_string() } else { counted.join(", ") };
        cx.remark(format_args!("@{function}"), format_args!("{told}"));
        let mut told = cx.session().take::<Explanations>().unwrap_or_default();
        told.0.extend(report.explanations.into_iter().map(|(value, rules)| (function.clone(), value, rules)));
        cx.session().put(told);
    }
    Ok(report.changed.into())
}

/// Every rule of every pass.
pub fn all_rules() -> impl Iterator<Item = &'static Rule> {
    crate::fuse::RULES.iter().chain(crate::raise::RULES).flat_map(|list| list.iter())
}

/// When to stop although there is more to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rounds of searching and rewriting.
    pub rounds: u32,
    /// Nodes of the e-graph.
    pub nodes: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { rounds: 16, nodes: 50_000 }
    }
}

/// What one rule did in one function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleUse {
    /// The rule.
    pub rule: &'static str,
    /// How often its left-hand side was found and it applied.
    pub matches: u64,
    /// Time spent searching and applying; nothing depends on it.
    pub time: Duration,
}

/// What saturation did to one function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Whether the function is different now.
    pub changed: bool,
    /// Whether an equal function was solved before.
    pub replayed: bool,
    /// The limit that ended the search, if one did.
    pub limit: Option<&'static str>,
    /// What each rule did; without times when the solution was replayed.
    pub rules: Vec<RuleUse>,
    /// For each rewritten value, its name and the rules that led to it, the first one first.
    pub explanations: Vec<(String, Vec<&'static str>)>,
}

impl Report {
    /// The explanations as text, one value a line.
    pub fn explain(&self) -> String {
        let line = |(name, rules): &(String, Vec<&str>)| format!("%{name}: {}\n", rules.join(", "));
        self.explanations.iter().map(line).collect()
    }
}

/// Rewrites functions by a list of rules, remembering what it solved.
pub struct Saturator {
    rules: Vec<Compiled>,
    limits: Limits,
    solved: BTreeMap<Region, Solution>,
}

impl Saturator {
    /// A saturator for `rules`.
    pub fn new(rules: impl IntoIterator<Item = &'static Rule>, limits: Limits) -> Result<Saturator> {
        let rules = rules.into_iter().map(Compiled::new).collect::<Result<_>>()?;
        Ok(Saturator { rules, limits, solved: BTreeMap::new() })
    }

    /// Rewrites `graph` into the cheapest equal function that was found. All calls must give the same prices.
    pub fn run(&mut self, graph: &mut Graph, cost: &dyn Cost) -> Result<Report> {
        let (region, place) = Region::of(graph)?;
        let mut times = vec![Duration::ZERO; self.rules.len()];
        let replayed = self.solved.contains_key(&region);
        if !replayed {
            let solution = self.solve(&region, cost, &mut times)?;
            self.solved.insert(region.clone(), solution);
        }
        let solution = self.solved.get(&region).ok_or_else(|| Diag::bug("a solution got lost"))?;
        let changed = !solution.is_identity(&region);
        let mut explanations = vec![];
        if changed {
            for (i, step) in solution.rewritten() {
                let name =
                    step.replaces.and_then(|op| graph.value(graph.node(place.op(op)).result).name.clone());
                explanations
                    .push((name.unwrap_or_else(|| format!("{}#{i}", step.op.name())), step.because.clone()));
            }
            solution.apply(graph, &place)?;
        }
        let rules = self.rules.iter().zip(&solution.matches).zip(times);
        let rules = rules.map(|((c, &matches), time)| RuleUse { rule: c.rule.name, matches, time }).collect();
        Ok(Report { changed, replayed, limit: solution.limit, rules, explanations })
    }

    fn solve(&self, region: &Region, cost: &dyn Cost, times: &mut [Duration]) -> Result<Solution> {
        let Built { mut egraph, ops, roots } = build_egraph(region)?;
        let original: Vec<(Id, ENode)> =
            egraph.classes().flat_map(|c| c.nodes.first().map(|n| (c.id, n.clone()))).collect();
        let mut matches = vec![0u64; self.rules.len()];
        let mut because = BTreeMap::<ENode, Origin>::new();
        let mut limit = Some("rounds");
        'rounds: for _ in 0..self.limits.rounds {
            let mut found = vec![];
            for (compiled, time) in self.rules.iter().zip(times.iter_mut()) {
                let start = Instant::now();
                found.push(compiled.search(&egraph));
                *time += start.elapsed();
            }
            let mut grown = false;
            for (i, found) in found.into_iter().enumerate() {
                let start = Instant::now();
                for found in found {
                    if egraph.total_number_of_nodes() >= self.limits.nodes as usize {
                        limit = Some("nodes");
                        break 'rounds;
                    }
                    let Some(node) = self.rules[i].build(&mut egraph, &found)? else { continue };
                    if egraph
                        .lookup(node.clone())
                        .is_some_and(|id| egraph.find(id) == egraph.find(found.class))
                    {
                        continue;
                    }
                    matches[i] += 1;
                    let name = self.rules[i].rule.name;
                    let inner = found.bindings.ops.into_iter().map(|(_, node, _)| node);
                    let from = std::iter::once(found.node).chain(inner).collect();
                    because.entry(node.clone()).or_insert(Origin { rule: name, from });
                    let made = egraph.add(node);
                    egraph.union_trusted(found.class, made, name);
                    if let Some(conflict) = egraph.analysis.conflict.take() {
                        return Err(Diag::bug(format!("the rule `{name}` changes a type: {conflict}")));
                    }
                    grown = true;
                }
                times[i] += start.elapsed();
            }
            egraph.rebuild();
            if let Some(conflict) = egraph.analysis.conflict.take() {
                return Err(Diag::bug(format!("rules merged values of different types: {conflict}")));
            }
            if !grown {
                limit = None;
                break;
            }
        }
        egraph.rebuild();
        // Without a match there is nothing to choose from, however long the function is.
        let choice = if matches.iter().any(|&n| n > 0) {
            extract::extract(&egraph, cost, &roots, &original)?
        } else {
            extract::Choice::of(original.into_iter())
        };
        let canonical = |node: ENode| node.map_children_to(&egraph);
        let because: BTreeMap<ENode, Origin> = because
            .into_iter()
            .map(|(node, Origin { rule, from })| {
                (canonical(node), Origin { rule, from: from.into_iter().map(canonical).collect() })
            })
            .collect();

        let mut first = BTreeMap::<Id, u32>::new();
        for (i, &id) in ops.iter().enumerate() {
            first.entry(egraph.find(id)).or_insert(i as u32);
        }
        let mut taker = Taker {
            egraph: &egraph,
            choice: &choice,
            first: &first,
            because: &because,
            steps: vec![],
            done: BTreeMap::new(),
        };
        let needed = taker.needed(&roots)?;
        for &id in &ops {
            if needed.contains(&egraph.find(id)) {
                taker.take(id)?;
            }
        }
        let results = roots[..region.results.len()].iter().map(|&r| taker.take(r)).collect::<Result<_>>()?;
        Ok(Solution { steps: taker.steps, results, matches, limit })
    }
}

/// The e-graph of a region, the class of each op, and the classes of what must be computed: results, then effects.
struct Built {
    egraph: EGraph<ENode, Types>,
    ops: Vec<Id>,
    roots: Vec<Id>,
}

fn build_egraph(region: &Region) -> Result<Built> {
    let types = Types {
        leaves: region.leaves.clone(),
        effects: region.ops.iter().map(|o| o.ty.clone()).collect(),
        conflict: None,
    };
    let mut egraph = EGraph::new(types);
    let mut ops: Vec<Id> = Vec::with_capacity(region.ops.len());
    let mut effects = vec![];
    let get = |egraph: &mut enode::Graph, ops: &[Id], r: Ref| match r {
        Ref::Leaf(i) => egraph.add(ENode { head: Head::Leaf(i), args: vec![] }),
        Ref::Op(i) => ops[i as usize],
        Ref::None => egraph.add(ENode { head: Head::None, args: vec![] }),
    };
    for (i, o) in region.ops.iter().enumerate() {
        let args = o.args.iter().map(|&r| get(&mut egraph, &ops, r)).collect();
        let effect = o.op.has_effect();
        let head = if effect { Head::Effect(o.op.clone(), i as u32) } else { Head::Op(o.op.clone()) };
        let id = egraph.add(ENode { head, args });
        if egraph[id].data.ty.as_ref() != Some(&o.ty) {
            return Err(Diag::bug(format!("`{}` does not have its declared type {}", o.op.name(), o.ty)));
        }
        ops.push(id);
        if effect {
            effects.push(id);
        }
    }
    let mut roots: Vec<Id> = region.results.iter().map(|&r| get(&mut egraph, &ops, r)).collect();
    roots.extend(effects);
    egraph.rebuild();
    for (&id, uses) in ops.iter().zip(region.uses()) {
        egraph[id].data.uses += uses;
    }
    Ok(Built { egraph, ops, roots })
}

/// Writes chosen nodes down as steps, operands first.
struct Taker<'a> {
    egraph: &'a enode::Graph,
    choice: &'a extract::Choice,
    first: &'a BTreeMap<Id, u32>,
    because: &'a BTreeMap<ENode, Origin>,
    steps: Vec<Step>,
    done: BTreeMap<Id, Ref>,
}

impl Taker<'_> {
    /// The classes that the expressions of `roots` consist of.
    fn needed(&self, roots: &[Id]) -> Result<BTreeSet<Id>> {
        let mut needed = BTreeSet::new();
        let mut todo: Vec<Id> = roots.iter().map(|&r| self.egraph.find(r)).collect();
        while let Some(id) = todo.pop() {
            if needed.insert(id) {
                todo.extend(self.choice.node(self.egraph, id)?.args.iter().map(|&a| self.egraph.find(a)));
            }
        }
        Ok(needed)
    }

    /// The value of a class.
    fn take(&mut self, id: Id) -> Result<Ref> {
        let id = self.egraph.find(id);
        if let Some(&known) = self.done.get(&id) {
            return Ok(known);
        }
        // Operands that are not there yet are taken first; an explicit stack, since functions may be long.
        let mut todo = vec![id];
        while let Some(&id) = todo.last() {
            if self.done.contains_key(&id) {
                todo.pop();
                continue;
            }
            let node = self.choice.node(self.egraph, id)?;
            let missing: Vec<Id> = node
                .args
                .iter()
                .map(|&a| self.egraph.find(a))
                .filter(|a| !self.done.contains_key(a))
                .collect();
            if !missing.is_empty() {
                todo.extend(missing.into_iter().rev());
                continue;
            }
            let made = match &node.head {
                Head::Leaf(i) => Ref::Leaf(*i),
                Head::None => Ref::None,
                Head::Op(op) | Head::Effect(op, _) => {
                    let args = node.args.iter().map(|a| self.done[&self.egraph.find(*a)]).collect();
                    let ty =
                        self.egraph[id].data.ty.clone().ok_or_else(|| Diag::bug("an op without a type"))?;
                    let replaces = self.first.get(&id).copied();
                    self.steps.push(Step { op: op.clone(), args, ty, replaces, because: self.chain(node) });
                    Ref::Op(self.steps.len() as u32 - 1)
                }
            };
            self.done.insert(id, made);
            todo.pop();
        }
        self.done.get(&id).copied().ok_or_else(|| Diag::bug("a class was not taken"))
    }

    /// The rules that led to a node, the first one first, each once.
    fn chain(&self, node: &ENode) -> Vec<&'static str> {
        let mut rules = vec![];
        let mut seen = BTreeSet::new();
        // Nodes to be entered, and rules whose nodes were entered before.
        let mut todo: Vec<Result<&ENode, &'static str>> = vec![Ok(node)];
        while let Some(next) = todo.pop() {
            match next {
                Err(rule) if !rules.contains(&rule) => rules.push(rule),
                Err(_) => {}
                Ok(node) => {
                    let Some(Origin { rule, from }) = self.because.get(node) else { continue };
                    if seen.insert(node) {
                        todo.push(Err(rule));
                        todo.extend(from.iter().rev().map(Ok));
                    }
                }
            }
        }
        rules
    }
}

/// How a node came about: by which rule, and from which nodes.
struct Origin {
    rule: &'static str,
    from: Vec<ENode>,
}

#[cfg(test)]
mod tests;
