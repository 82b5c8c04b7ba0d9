//! Rounds what products multiply to another float type.

use crate::pass::prelude::*;
use quantc_ir::ops::{Cast, MatMul};
use std::collections::BTreeMap;

pass! {
    /// Rounds the rows that products multiply to another float type, to nearest even.
    ///
    /// In front of each `matmul` of f32 rows a `cast` is put, which products of the same rows share. Sums are f32 as before.
    /// Rows that `quantize-activations` rounds to integers are left alone: products read their codes. Targets with a dot product of bf16 multiply such rows
    /// several times as fast as f32; the others widen them and give results that differ in the last bits.
    ///
    /// ```qir before
    /// %y = matmul %x, @w
    /// ```
    /// ```qir after
    /// %x.r = cast %x {to=bf16}
    /// %y = matmul %x.r, @w
    /// ```
    "cast-activations" => pub struct CastActivations {
        /// The type of the rows.
        to: Float = Float::Bf16,
        /// Layers to work on, as name patterns; none given means all.
        layers: Vec<Pattern> = vec![],
        /// Layers left alone, as name patterns.
        skip_layers: Vec<Pattern> = vec![],
    }
    scope: Layer, numerics: Requantizes, stats: keeps
}

impl Pass for CastActivations {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        if self.to == Float::F32 || !self.works_on(cx.function_name()) {
            return Ok(Changed::No);
        }
        let mut done = BTreeMap::<ValueId, ValueId>::new();
        for op in cx.graph().order().to_vec() {
            let Some(x) = operand(cx.graph(), op) else { continue };
            let rounded = match done.get(&x) {
                Some(&rounded) => rounded,
                None => self.round(cx.graph_mut(), op, x)?,
            };
            done.insert(x, rounded);
            cx.graph_mut().node_mut(op).args[0] = rounded;
        }
        Ok((!done.is_empty()).into())
    }

    fn rounds_rows(&self) -> Option<ElemTy> {
        (self.to != Float::F32 && self.layers.is_empty() && self.skip_layers.is_empty()).then(|| self.to.into())
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::filters(&[], &[], &self.layers, &self.skip_layers)
    }
}

impl CastActivations {
    fn works_on(&self, layer: &str) -> bool {
        (self.layers.is_empty() || self.layers.any_matches(layer)) && !self.skip_layers.any_matches(layer)
    }

    /// Puts the rounding of `x` in front of `op`.
    fn round(&self, graph: &mut Graph, op: OpId, x: ValueId) -> Result<ValueId> {
        let at = graph.position(op).ok_or_else(|| Diag::bug("an op that is not in the program"))?;
        let name = graph.value(x).name.as_ref().map(|name| format!("{name}.r"));
        let name = name.filter(|name| !graph.values().any(|(_, v)| v.name.as_ref() == Some(name)));
        graph.insert_inferred(at, Cast { to: self.to.into(), ..Default::default() }, &[x], name.as_deref())
    }
}

/// The rows of f32 that `op` multiplies, when they are computed and not integers expanded.
fn operand(graph: &Graph, op: OpId) -> Option<ValueId> {
    let node = graph.node(op);
    let matmul: &MatMul = node.op.is()?;
    let x = *node.args.first()?;
    let integers = |v: ValueId| graph.ty(v).elem.scheme().is_some_and(|s| s.format.is_int());
    let expanded =
        graph.def(x).is_some_and(|(_, n)| n.op.kind() == OpKind::Dequantize && integers(n.args[0]));
    let fits = graph.ty(x).elem == ElemTy::F32 && graph.as_weight(x).is_none();
    (fits && !expanded && matmul.packed.is_empty()).then_some(x)
}
