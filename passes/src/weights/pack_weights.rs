//! Puts weights into the layout of their kernels.

use crate::pass::prelude::*;
use quantc_ir::target::PackJob;

pass! {
    /// Puts the weights of products into the layout that the target's kernels read.
    ///
    /// Each `matmul` and `qmatmul` gets the layout's name and the packed bytes in its attribute `packed`. A weight is
    /// packed once for each layout, over all compilations that share a store.
    "pack-weights" => pub struct PackWeights {}
    needs: [target],
    scope: Layer, numerics: Exact, stats: keeps
}

impl Pass for PackWeights {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let Some(backend) = cx.backend else {
            return Err(Diag::target(
                "weights are packed for a target, and there is no code generator for one",
            )
            .help("choose a target with `--target`, or leave `pack-weights` out"));
        };
        let mut changed = Changed::No;
        for op in cx.graph().order().to_vec() {
            if packed(cx.graph_mut(), op).is_none_or(|p| !p.is_empty()) {
                continue;
            }
            cx.check_interrupt()?;
            let job = PackJob { module: &*cx.module, store: cx.store, graph: cx.graph(), op };
            let made = backend.pack(&job).map_err(|d| d.at(cx.loc(op)))?;
            if let (Some(made), Some(packed)) = (made, packed(cx.graph_mut(), op)) {
                *packed = format!("{}/{}", made.layout, made.blob);
                changed = Changed::Yes;
            }
        }
        Ok(changed)
    }
}

/// The attribute of a product that says how its weight is packed.
fn packed(graph: &mut Graph, op: OpId) -> Option<&mut String> {
    match &mut graph.node_mut(op).op {
        Op::MatMul(matmul) => Some(&mut matmul.packed),
        Op::QMatMul(qmatmul) => Some(&mut qmatmul.packed),
        _ => None,
    }
}
