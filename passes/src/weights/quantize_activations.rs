//! Rounds what is multiplied with quantized weights.

use super::options::FormatName;
use super::round_to_nearest::selects;
use crate::pass::prelude::*;
use quantc_ir::formats::{self, Class};
use quantc_ir::ops::{Dequantize, DynamicScale, MatMul, Quantize};
use quantc_ir::scheme::{Group, Scheme, Zero};
use std::collections::BTreeMap;

pass! {
    /// Rounds the rows that are multiplied with quantized weights, with a scale for each token that is computed when the
    /// engine runs.
    ///
    /// In front of each `matmul` whose weight is a `dequantize`d one of the same class (integers with integers, floats
    /// with floats) the other operand goes through `quantize` and `dequantize`; products of the same activation share
    /// them. `fuse-dequant-matmul` then makes products of codes.
    ///
    /// ```qir before
    /// weight @q : tensor<2x4x!q<int8:f32 axis 0>> = inline [[1, 2, 3, 4], [5, 6, 7, 8]]
    /// weight @s : tensor<2x1xf32> = splat 0.5
    /// %w = dequantize @q, @s
    /// %y = matmul %x, %w
    /// ```
    /// ```qir after
    /// %w = dequantize @q, @s
    /// %x.s = dynamic_scale %x
    /// %x.q = quantize %x, %x.s
    /// %x.d = dequantize %x.q, %x.s
    /// %y = matmul %x.d, %w
    /// ```
    "quantize-activations" => pub struct QuantizeActivations {
        /// The format of the codes.
        format: FormatName = FormatName(&formats::INT8),
        /// Weights whose products are changed, as name patterns; none given means all.
        only: Vec<Pattern> = vec![],
        /// Weights whose products are left alone, as name patterns. A pattern that matches nothing is an error.
        skip: Vec<Pattern> = vec![],
        /// Layers to work on, as name patterns; none given means all.
        layers: Vec<Pattern> = vec![],
        /// Layers left alone, as name patterns.
        skip_layers: Vec<Pattern> = vec![],
    }
    scope: Layer, numerics: Requantizes, stats: keeps
}

impl Pass for QuantizeActivations {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        if !selects(&self.layers, &self.skip_layers, cx.function_name()) {
            return Ok(Changed::No);
        }
        let scheme = self.scheme();
        let mut done = BTreeMap::<ValueId, ValueId>::new();
        for op in cx.graph().order().to_vec() {
            let Some(x) = self.operand(cx, op) else { continue };
            let rounded = match done.get(&x) {
                Some(&rounded) => rounded,
                None => round(cx.graph_mut(), op, x, scheme)?,
            };
            done.insert(x, rounded);
            cx.graph_mut().node_mut(op).args[0] = rounded;
        }
        Ok((!done.is_empty()).into())
    }

    fn validate(&self) -> Result<()> {
        let format = self.format.0;
        let signed = matches!(format.class, Class::Int { signed: true } | Class::Float { .. });
        if signed && format.bits <= 8 {
            return Ok(());
        }
        Err(Diag::pipeline(format!("activations cannot be rounded to `{format}`"))
            .help("use a signed format of at most 8 bits, such as `int8`"))
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        [
            PatternUse::all("only", &self.only, NameKind::Weight),
            PatternUse::all("skip", &self.skip, NameKind::Weight),
            PatternUse::all("layers", &self.layers, NameKind::Layer),
            PatternUse::all("skip-layers", &self.skip_layers, NameKind::Layer),
        ]
        .concat()
    }
}

impl QuantizeActivations {
    fn scheme(&self) -> Scheme {
        Scheme { format: self.format.0, group: Group::Token, zero: Zero::Symmetric, scale: Float::F32 }
    }

    /// The activation that `op` multiplies, when it is one to be rounded.
    fn operand(&self, cx: &PassCx<'_>, op: OpId) -> Option<ValueId> {
        let graph = cx.graph();
        let node = graph.node(op);
        let matmul: &MatMul = node.op.is()?;
        let (x, w) = (*node.args.first()?, *node.args.get(1)?);
        let (_, weight) = graph.def(w)?;
        weight.op.is::<Dequantize>()?;
        let codes = *weight.args.first()?;
        let (id, scheme) = (graph.as_weight(codes)?, graph.ty(codes).elem.scheme()?);
        let rounded = graph.def(x).is_some_and(|(_, n)| n.op.kind() == OpKind::Dequantize);
        let fits = scheme.format.is_int() == self.format.0.is_int() && graph.ty(x).elem.is_float();
        let chosen = selects(&self.only, &self.skip, &cx.module.weights[id].name);
        (fits && !rounded && chosen && matmul.packed.is_empty()).then_some(x)
    }
}

/// Puts the rounding of `x` in front of `op`.
fn round(graph: &mut Graph, op: OpId, x: ValueId, scheme: Scheme) -> Result<ValueId> {
    let at = graph.position(op).ok_or_else(|| Diag::bug("an op that is not in the program"))?;
    let name = |graph: &Graph, suffix: &str| {
        let name = format!("{}.{suffix}", graph.value(x).name.as_ref()?);
        let taken = graph.values().any(|(_, v)| v.name.as_ref() == Some(&name));
        (!taken).then_some(name)
    };
    let (s, q, d) = (name(graph, "s"), name(graph, "q"), name(graph, "d"));
    let s = graph.insert_inferred(at, DynamicScale { to: scheme }, &[x], s.as_deref())?;
    let q = graph.insert_inferred(at + 1, Quantize { to: scheme }, &[x, s], q.as_deref())?;
    graph.insert_inferred(at + 2, Dequantize { to: Float::F32 }, &[q, s], d.as_deref())
}
