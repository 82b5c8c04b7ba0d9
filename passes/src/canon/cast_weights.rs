//! Stores weights in another float type.

use crate::pass::prelude::*;
use quantc_ir::build::infer;
use std::collections::BTreeMap;

pass! {
    /// Stores weights in another float type.
    ///
    /// Matrices and tables that are read as weights are converted to `to`, rounded to nearest even, a block of rows at
    /// a time. Vectors (gains, biases) are only ever widened: narrowing them saves nothing and costs accuracy. An op
    /// whose result would get another type keeps its weight.
    ///
    /// ```qir before
    /// %y = matmul %x, @w
    /// ```
    /// ```qir after
    /// %y = matmul %x, @w.bf16
    /// ```
    "cast-weights" => pub struct CastWeights {
        /// The type of the results.
        to: Float = Float::Bf16,
        /// Weights left alone, as name patterns. A pattern that matches nothing is an error.
        skip: Vec<Pattern> = vec![],
    }
    scope: Layer, numerics: Requantizes, stats: keeps
}

impl Pass for CastWeights {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let mut done: BTreeMap<WeightId, WeightId> = BTreeMap::new();
        for op in cx.graph().order().to_vec() {
            for i in 0..cx.graph().node(op).args.len() {
                let Some(w) = cx.graph().as_weight(cx.graph().node(op).args[i]) else { continue };
                if !self.applies(cx, w) || !keeps_type(cx, op, i, self.to) {
                    continue;
                }
                let new = match done.get(&w) {
                    Some(&new) => new,
                    None => self.cast(cx, w)?,
                };
                done.insert(w, new);
                let value = cx.weight_value(new);
                cx.graph_mut().node_mut(op).args[i] = value;
            }
        }
        Ok((!done.is_empty()).into())
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::all("skip", &self.skip, NameKind::Weight)
    }
}

impl CastWeights {
    fn applies(&self, cx: &PassCx<'_>, w: WeightId) -> bool {
        let decl = &cx.module.weights[w];
        let to = ElemTy::from(self.to);
        let worth = decl.ty.rank() >= 2 || to.bits() > decl.ty.elem.bits();
        decl.ty.elem.is_float() && decl.ty.elem != to && worth && !self.skip.any_matches(&decl.name)
    }

    fn cast(&self, cx: &mut PassCx<'_>, w: WeightId) -> Result<WeightId> {
        let (to, budget) = (self.to, cx.env.budget);
        let decl = &cx.module.weights[w];
        let (name, ty) = (format!("{}.{to}", decl.name), decl.ty.with_elem(to));
        // The names of skipped weights do not decide the bytes of others.
        cx.derive_weight(&name, ty, &[w], "", &mut |views, out| {
            crate::stream::rows(&views[0], budget, |_, rows| out.write_f32(to, rows))
        })
    }
}

/// Whether `op` keeps its result type when operand `i` has elements of type `to`.
fn keeps_type(cx: &PassCx<'_>, op: OpId, i: usize, to: Float) -> bool {
    let graph = cx.graph();
    let node = graph.node(op);
    if matches!(node.op, Op::Call(_)) {
        return false;
    }
    // Inference looks at values, so it is asked about a graph that has one value more.
    let mut trial = Graph::new();
    let mut args = vec![];
    for (at, &a) in node.args.iter().enumerate() {
        args.push(match (graph.is_none(a), at == i) {
            (true, _) => trial.none(),
            (false, true) => trial.add_param("", graph.ty(a).with_elem(to)),
            (false, false) => trial.add_param("", graph.ty(a).clone()),
        });
    }
    infer(&trial, &node.op, &args, &|_| None).is_ok_and(|ty| ty == *graph.ty(node.result))
}
