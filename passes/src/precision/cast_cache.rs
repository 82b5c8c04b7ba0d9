//! Stores the key/value cache in another float type.

use crate::pass::prelude::*;
use quantc_ir::build::infer;
use quantc_ir::ops::{CacheAppend, Cast};

pass! {
    /// Stores the key/value cache in another float type.
    ///
    /// Every state that is only appended to gets elements of type `to`; rows are rounded to nearest even on their way
    /// into it. Attention reads the narrower rows as they are and computes in f32 as before. A cache of 16 bits takes
    /// half the memory and half the traffic of a long context.
    ///
    /// ```qir before
    /// %s = cache_append @cache, %x
    /// ```
    /// ```qir after
    /// %c = cast %x {to=f16}
    /// %s = cache_append @cache, %c
    /// ```
    "cast-cache" => pub struct CastCache {
        /// The type of the cache's elements.
        to: Float = Float::F16,
    }
    scope: Module, numerics: Requantizes, stats: keeps
}

impl Pass for CastCache {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let to = ElemTy::from(self.to);
        let mut changed = Changed::No;
        let states: Vec<StateId> = cx.module.states.keys().collect();
        for state in states {
            let old = cx.module.states[state].ty.clone();
            if !old.elem.is_float() || old.elem == to {
                continue;
            }
            let new = old.with_elem(to);
            if let Some(layer) = cx.module.layers.values().find(|l| gives_away(&l.graph, state)) {
                let text =
                    format!("layer @{} yields the rows of @{}", layer.name, cx.module.states[state].name);
                return Err(Diag::pipeline(text).help("callers of the layer would get another type"));
            }
            for graph in cx.module.graphs_mut() {
                convert(graph, state, &new, self.to)?;
            }
            cx.module.states[state].ty = new;
            changed = Changed::Yes;
        }
        Ok(changed)
    }
}

/// Whether a result of `graph` is what an append to `state` yields.
fn gives_away(graph: &Graph, state: StateId) -> bool {
    graph.results.iter().filter_map(|&r| graph.def(r)).any(|(_, node)| {
        node.op.is::<CacheAppend>().is_some() && graph.value(node.args[0]).def == Def::State(state)
    })
}

/// Gives `state` the type `ty` in `graph`: a cast in front of each append, and new types behind it.
fn convert(graph: &mut Graph, state: StateId, ty: &TensorTy, to: Float) -> Result<()> {
    let value = graph.values().find(|(_, v)| v.def == Def::State(state)).map(|(id, _)| id);
    let Some(value) = value else { return Ok(()) };
    graph.value_mut(value).ty = ty.clone();
    for op in graph.users(value) {
        let node = graph.node(op);
        if node.op.is::<CacheAppend>().is_none() || node.args[0] != value {
            return Err(Diag::pipeline(format!(
                "`{}` reads a state, which only appends may do here",
                node.op.name()
            )));
        }
        let at = graph.position(op).ok_or_else(|| Diag::bug("a user of a state is not in the program"))?;
        let x = node.args[1];
        let cast = graph.insert_inferred(at, Cast { to: to.into(), ..Default::default() }, &[x], None)?;
        graph.node_mut(op).args[1] = cast;
    }
    // What attention reads has other elements now; nothing behind it changes.
    for op in graph.order().to_vec() {
        let node = graph.node(op).clone();
        if node.op.is::<CacheAppend>().is_none() || node.args[0] != value {
            continue;
        }
        let ty = infer(graph, &node.op, &node.args, &|_| None)?;
        graph.value_mut(node.result).ty = ty;
        for user in graph.users(node.result) {
            let user = graph.node(user);
            let inferred = infer(graph, &user.op, &user.args, &|_| None)?;
            if inferred != *graph.ty(user.result) {
                return Err(Diag::pipeline(format!("`{}` does not read a cache of {to}", user.op.name()))
                    .help("only attention reads caches of other types than f32"));
            }
        }
    }
    Ok(())
}
