//! Rewriting by local rules: a rule looks at one op and may answer with a patch.
//!
//! Rules are for almost everything; equality saturation is for fusion where the order of rewrites matters. The driver
//! is greedy: it walks the function until no rule answers, in program order, rules in the order given. A rule that keeps
//! answering is stopped after as many patches as there could reasonably be, with an error that names it.
//!
//! ```
//! use quantc_ir::entity::OpId;
//! use quantc_ir::graph::Graph;
//! use quantc_ir::ops::{OpKind, Relu};
//! use quantc_ir::patch::Patch;
//! use quantc_ir::ty::{ElemTy, TensorTy};
//! use quantc_passes::rewrite::{Rule, apply};
//!
//! // relu(relu(x)) = relu(x)
//! static TWICE: Rule = Rule {
//!     name: "relu-of-relu",
//!     on: OpKind::Relu,
//!     rewrite: |graph, op| {
//!         let node = graph.node(op);
//!         let Some((inner, _)) = graph.def(node.args[0]) else { return Ok(None) };
//!         if graph.node(inner).op.is::<Relu>().is_none() { return Ok(None) }
//!         let mut patch = Patch::new(graph);
//!         let same = patch.tap(node.args[0]);
//!         patch.shunt(node.result, same)?;
//!         Ok(Some(patch.into_edit()))
//!     },
//! };
//!
//! let mut graph = Graph::new();
//! let x = graph.add_param("x", TensorTy::fixed(ElemTy::F32, &[4]));
//! let a = graph.append(Relu {}, &[x], None)?;
//! let y = graph.append(Relu {}, &[a], Some("y"))?;
//! graph.results.push(y);
//! assert_eq!(apply(&mut graph, &[&TWICE])?, 1);
//! assert_eq!(graph.order().len(), 1);
//! # Ok::<(), quantc_ir::diag::Diag>(())
//! ```

use quantc_ir::diag::{Diag, Loc, Result};
use quantc_ir::entity::OpId;
use quantc_ir::graph::Graph;
use quantc_ir::ops::OpKind;
use quantc_ir::patch::Edit;

/// A local rewrite.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The name in errors and timing tables.
    pub name: &'static str,
    /// The kind of op it looks at.
    pub on: OpKind,
    /// The patch for an op of this kind, unless the rule does not apply.
    pub rewrite: fn(&Graph, OpId) -> Result<Option<Edit>>,
}

/// Patches for each op that a function had at first, at most.
const PATCHES_PER_OP: usize = 16;

/// Applies the rules until none applies any more; returns the number of patches.
pub fn apply(graph: &mut Graph, rules: &[&Rule]) -> Result<usize> {
    let limit = graph.order().len().saturating_mul(PATCHES_PER_OP);
    let mut patches = 0;
    loop {
        let before = patches;
        for op in graph.order().to_vec() {
            for rule in rules {
                // An earlier patch of this round may have taken the op out.
                if graph.position(op).is_none() || graph.node(op).op.kind() != rule.on {
                    continue;
                }
                let place = place(graph, op);
                let named = |e: Diag| e.context(format!("applying the rule `{}` to {place}", rule.name));
                let Some(edit) = (rule.rewrite)(graph, op).map_err(named)? else { continue };
                edit.apply(graph).map_err(named)?;
                patches += 1;
                if patches > limit {
                    let text = format!("the rule `{}` does not come to an end", rule.name);
                    return Err(Diag::bug(text).at(Loc::Item(place)));
                }
            }
        }
        if patches == before {
            return Ok(patches);
        }
    }
}

fn place(graph: &Graph, op: OpId) -> String {
    let node = graph.node(op);
    match &graph.value(node.result).name {
        Some(name) => format!("%{name}"),
        None => format!("`{}`", node.op.name()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quantc_ir::ops::{Relu, Silu, Tanh};
    use quantc_ir::patch::Patch;
    use quantc_ir::ty::{ElemTy, TensorTy};

    fn replace(graph: &Graph, op: OpId, with: impl Into<quantc_ir::ops::Op>) -> Result<Option<Edit>> {
        let node = graph.node(op);
        let mut patch = Patch::new(graph);
        let x = patch.tap(node.args[0]);
        let y = patch.op(with, &[x])?;
        patch.shunt(node.result, y)?;
        Ok(Some(patch.into_edit()))
    }

    fn chain() -> Graph {
        let mut graph = Graph::new();
        let x = graph.add_param("x", TensorTy::fixed(ElemTy::F32, &[4]));
        let a = graph.append(Relu {}, &[x], Some("a")).unwrap();
        let b = graph.append(Relu {}, &[a], Some("b")).unwrap();
        graph.results.push(b);
        graph
    }

    #[test]
    fn rules_run_until_none_applies() {
        let to_silu =
            Rule { name: "relu-to-silu", on: OpKind::Relu, rewrite: |g, op| replace(g, op, Silu {}) };
        let to_tanh =
            Rule { name: "silu-to-tanh", on: OpKind::Silu, rewrite: |g, op| replace(g, op, Tanh {}) };
        let mut graph = chain();
        assert_eq!(apply(&mut graph, &[&to_tanh, &to_silu]).unwrap(), 4);
        let left: Vec<_> = graph.ops().map(|(_, n)| n.op.name()).collect();
        assert_eq!(left, ["tanh", "tanh"]);
        assert_eq!(graph.value(graph.results[0]).name.as_deref(), Some("b"));
    }

    #[test]
    fn a_rule_without_end_is_named() {
        let there = Rule { name: "there", on: OpKind::Relu, rewrite: |g, op| replace(g, op, Silu {}) };
        let back = Rule { name: "back", on: OpKind::Silu, rewrite: |g, op| replace(g, op, Relu {}) };
        let error = apply(&mut chain(), &[&there, &back]).unwrap_err();
        assert!(error.message.contains("does not come to an end"), "{error}");
        assert!(matches!(error.loc, Loc::Item(_)));
    }

    #[test]
    fn a_patch_of_the_wrong_type_names_rule_and_op() {
        let wrong = Rule {
            name: "wrong",
            on: OpKind::Relu,
            rewrite: |g, op| {
                replace(
                    g,
                    op,
                    quantc_ir::ops::Cast { to: quantc_ir::ty::Float::Bf16.into(), ..Default::default() },
                )
            },
        };
        let error = apply(&mut chain(), &[&wrong]).unwrap_err();
        assert_eq!(error.context, ["applying the rule `wrong` to %a"]);
    }
}
