//! A module without the rounding of its caches.

use quantc_ir::diag::{Diag, Result};
use quantc_ir::entity::ValueId;
use quantc_ir::graph::{Def, Graph};
use quantc_ir::module::Module;
use quantc_ir::ops::{Attention, CacheAppend, Op};

/// `module` with caches that hold rows as they are before they are rounded to codes; `None` when no cache holds codes. What the
/// two compute differs by nothing but that rounding.
pub fn plain_cache(module: &Module) -> Result<Option<Module>> {
    if !module.states.values().any(|state| state.ty.elem.scheme().is_some()) {
        return Ok(None);
    }
    let mut plain = module.clone();
    let mut types = vec![];
    for graph in plain.graphs_mut() {
        unround(graph, &mut types)?;
    }
    for (state, elem) in types {
        plain.states[state].ty.elem = elem;
    }
    Ok(Some(plain))
}

fn unround(
    graph: &mut Graph,
    types: &mut Vec<(quantc_ir::entity::StateId, quantc_ir::ty::ElemTy)>,
) -> Result<()> {
    for op in graph.order().to_vec() {
        let node = graph.node(op);
        let Some(CacheAppend {}) = node.op.is() else { continue };
        let (held, codes, all) = (node.args[0], node.args[1], node.result);
        let Def::State(state) = graph.value(held).def else { continue };
        if graph.ty(held).elem.scheme().is_none() {
            continue;
        }
        let rows = match graph.def(codes) {
            Some((_, node)) if matches!(node.op, Op::Quantize(_)) => node.args[0],
            _ => return Err(Diag::input("a cache of codes that are not rounded where they are appended")),
        };
        let elem = graph.ty(rows).elem;
        types.push((state, elem));
        graph.node_mut(op).args[1] = rows;
        graph.value_mut(held).ty.elem = elem;
        graph.value_mut(all).ty.elem = elem;
        for user in graph.users(all) {
            if graph.node(user).op.is::<Attention>().is_none() {
                return Err(Diag::input("a cache of codes that attention does not read"));
            }
            for i in [1, 2] {
                if graph.node(user).args[i] == all
                    && let Some(&scales) = graph.node(user).args.get(i + 2)
                {
                    let none = graph.none();
                    graph.node_mut(user).args[i + 2] = none;
                    forget(graph, scales);
                }
            }
        }
    }
    graph.drop_dead();
    Ok(())
}

/// Takes the append of scales away that nobody reads any more.
fn forget(graph: &mut Graph, scales: ValueId) {
    let append = graph.def(scales).filter(|(_, n)| n.op.is::<CacheAppend>().is_some()).map(|(op, _)| op);
    if let Some(op) = append.filter(|_| graph.users(scales).is_empty()) {
        graph.erase(op);
    }
}
