//! Patterns: the two sides of a rule as text.
//!
//! ```text
//! pattern  := "?" name | "?" name "*" | "none" | "(" op label? pattern* ")"
//! label    := ":" name
//! ```
//!
//! `?x` stands for any value, `none` for an absent operand, `?e*` for all remaining operands of an op that takes any
//! number. A label names an op so that the rule can look at its attributes; on the right-hand side it means the very
//! attributes that were found, and without a label an op has its default attributes. An op lists all its operands.

use super::enode::{Discriminant, ENode, Graph, Head};
use egg::Id;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::{Op, OpKind};

/// One side of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Pattern {
    Any(&'static str),
    Rest(&'static str),
    None,
    Op { kind: OpKind, label: Option<&'static str>, args: Vec<Pattern> },
}

/// What a match found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bindings {
    pub(super) any: Vec<(&'static str, Id)>,
    pub(super) rest: Vec<(&'static str, Vec<Id>)>,
    pub(super) ops: Vec<(&'static str, ENode, Id)>,
}

impl Bindings {
    fn any(&self, name: &str) -> Option<Id> {
        self.any.iter().find(|(n, _)| *n == name).map(|(_, id)| *id)
    }

    pub(super) fn rest(&self, name: &str) -> Option<&[Id]> {
        self.rest.iter().find(|(n, _)| *n == name).map(|(_, ids)| &ids[..])
    }

    pub(super) fn op(&self, label: &str) -> Option<(&Op, Id)> {
        self.ops.iter().find(|(n, ..)| *n == label).and_then(|(_, node, id)| Some((node.op()?, *id)))
    }

    pub(super) fn id(&self, name: &str) -> Option<Id> {
        self.any(name).or_else(|| self.op(name).map(|(_, id)| id))
    }
}

impl Pattern {
    /// Reads a pattern.
    pub(super) fn parse(text: &'static str) -> Result<Pattern> {
        let mut rest = text;
        let pattern = parse(&mut rest, text)?;
        if rest.trim().is_empty() { Ok(pattern) } else { Err(bad(text, "something follows the pattern")) }
    }

    /// The names of the pattern: values, lists and labels.
    pub(super) fn names(&self) -> Vec<&'static str> {
        match self {
            Pattern::Any(name) | Pattern::Rest(name) => vec![name],
            Pattern::None => vec![],
            Pattern::Op { label, args, .. } => {
                label.iter().copied().chain(args.iter().flat_map(Pattern::names)).collect()
            }
        }
    }

    /// All ways in which the class `id` matches, given what was found so far.
    pub(super) fn search(&self, egraph: &Graph, id: Id, found: &Bindings) -> Vec<Bindings> {
        let id = egraph.find(id);
        match self {
            Pattern::Any(name) => match found.any(name) {
                Some(known) if egraph.find(known) != id => vec![],
                Some(_) => vec![found.clone()],
                None => {
                    let mut found = found.clone();
                    found.any.push((name, id));
                    vec![found]
                }
            },
            Pattern::Rest(_) => vec![],
            Pattern::None => {
                let none = egraph[id].nodes.iter().any(|n| n.head == Head::None);
                if none { vec![found.clone()] } else { vec![] }
            }
            Pattern::Op { .. } => {
                let nodes = egraph[id].nodes.iter();
                nodes.flat_map(|node| self.search_node(egraph, node, id, found)).collect()
            }
        }
    }

    /// All ways in which `node` of the class `id` matches an op, given what was found so far.
    pub(super) fn search_node(
        &self,
        egraph: &Graph,
        node: &ENode,
        id: Id,
        found: &Bindings,
    ) -> Vec<Bindings> {
        match (self, node.op()) {
            (Pattern::Op { kind, label, args }, Some(op)) if op.kind() == *kind => {
                search_args(egraph, args, node, *label, id, found)
            }
            _ => vec![],
        }
    }

    /// What nodes at the root may be.
    pub(super) fn root(&self) -> Option<Discriminant> {
        match self {
            Pattern::Op { kind, .. } => Some(Discriminant::Op(*kind)),
            _ => None,
        }
    }
}

fn search_args(
    egraph: &Graph,
    args: &[Pattern],
    node: &ENode,
    label: Option<&'static str>,
    id: Id,
    found: &Bindings,
) -> Vec<Bindings> {
    let mut found = found.clone();
    if let Some(label) = label {
        found.ops.push((label, node.clone(), id));
    }
    let mut all = vec![found];
    let (args, rest) = match args.split_last() {
        Some((Pattern::Rest(name), args)) => (args, Some(*name)),
        _ => (args, None),
    };
    if node.args.len() < args.len() || (rest.is_none() && node.args.len() > args.len()) {
        return vec![];
    }
    for (pattern, &arg) in args.iter().zip(&node.args) {
        all = all.iter().flat_map(|found| pattern.search(egraph, arg, found)).collect();
    }
    if let Some(name) = rest {
        let ids: Vec<Id> = node.args[args.len()..].iter().map(|&a| egraph.find(a)).collect();
        all.iter_mut().for_each(|found| found.rest.push((name, ids.clone())));
    }
    all
}

fn bad(text: &str, why: impl std::fmt::Display) -> Diag {
    Diag::bug(format!("the pattern `{text}` cannot be read: {why}"))
}

fn parse(rest: &mut &'static str, text: &'static str) -> Result<Pattern> {
    *rest = rest.trim_start();
    if let Some(after) = rest.strip_prefix('?') {
        let name = word(&mut { after });
        *rest = &after[name.len()..];
        if name.is_empty() {
            return Err(bad(text, "a name must follow `?`"));
        }
        if let Some(after) = rest.strip_prefix('*') {
            *rest = after;
            return Ok(Pattern::Rest(name));
        }
        return Ok(Pattern::Any(name));
    }
    let Some(after) = rest.strip_prefix('(') else {
        let name = word(rest);
        *rest = &rest[name.len()..];
        return if name == "none" {
            Ok(Pattern::None)
        } else {
            Err(bad(text, format!("`{name}` is neither `?name` nor `none`")))
        };
    };
    *rest = after;
    let name = word(rest);
    *rest = &rest[name.len()..];
    let kind = OpKind::by_name(name).ok_or_else(|| bad(text, format!("there is no op `{name}`")))?;
    let mut label = None;
    if let Some(after) = rest.strip_prefix(':') {
        let name = word(&mut { after });
        *rest = &after[name.len()..];
        label = Some(name);
    }
    let mut args = vec![];
    loop {
        *rest = rest.trim_start();
        if let Some(after) = rest.strip_prefix(')') {
            *rest = after;
            break;
        }
        if rest.is_empty() {
            return Err(bad(text, "a parenthesis is not closed"));
        }
        args.push(parse(rest, text)?);
    }
    let operands = kind.info().operands;
    let given = args.iter().filter(|a| !matches!(a, Pattern::Rest(_))).count();
    let has_rest = given < args.len();
    if given < operands.fixed() || (!operands.many() && (given > operands.fixed() || has_rest)) {
        return Err(bad(text, format!("`{name}` has {} operands", operands.fixed())));
    }
    Ok(Pattern::Op { kind, label, args })
}

fn word(rest: &mut &'static str) -> &'static str {
    let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
    &rest[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_read_whole() {
        let p = Pattern::parse("(matmul:m ?x (dequantize ?w ?s ?z) ?e*)").unwrap();
        assert_eq!(p.names(), ["m", "x", "w", "s", "z", "e"]);
        for text in [
            "(matmul ?x",
            "(matmul ?x)",
            "(matmul ?x ?w) ?y",
            "(nothing ?x)",
            "?",
            "x",
            "(silu ?x ?y)",
            "(silu ?x*)",
        ] {
            assert!(Pattern::parse(text).is_err(), "{text}");
        }
    }
}
