//! Rounds what is multiplied with quantized weights.

use super::options::{FormatName, ZeroPoints};
use super::round_to_nearest::selects;
use crate::calib::SiteStats;
use crate::calib::observers::Method;
use crate::calib::stats::{self, Kind};
use crate::pass::prelude::*;
use crate::told::StaticScale;
use quantc_ir::formats::{self, Class};
use quantc_ir::ops::{Dequantize, DynamicScale, MatMul, Quantize};
use quantc_ir::quant::{ScaleRule, scale_for};
use quantc_ir::scheme::{Group, Scheme, Zero};
use quantc_ir::weights::{Recipe, WeightDecl, WeightSource};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

pass! {
    /// Rounds the rows that are multiplied with quantized weights.
    ///
    /// Scales are computed for each token when the engine runs. With `scale=static` each tensor has one scale that is decided
    /// now, by `range`, from what the statistic of that range tells: the engine then needs no pass over a row to find its
    /// largest number, and numbers beyond the range saturate.
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
        /// `dynamic`, a scale for each token, or `static`, one for the tensor from calibration.
        scale: ScaleTime = ScaleTime::Dynamic,
        /// `symmetric`, the only one that products of codes take.
        zero: ZeroPoints = ZeroPoints::Symmetric,
        /// Of static scales, the range that is covered: `whole`, `percentile:99.9`, `moments:6`, `moving-average:0.01`,
        /// `entropy` or `mse`. `calibrate` must take `min-max`, `histogram`, `moments`, `moving-average` or again
        /// `histogram` for it.
        range: Method = Method::Mse,
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

/// When scales are decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleTime {
    /// When the engine runs.
    #[default]
    Dynamic,
    /// When it is compiled.
    Static,
}

/// What is told of a scale; kept beside its blob.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Told {
    min: f32,
    max: f32,
    /// The share of the numbers seen that saturates, where the statistic tells it.
    outside: Option<f64>,
    /// What more samples would do, when they would do something.
    moved: Option<String>,
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
                None => {
                let scale = match self.scale {
                    ScaleTime::Dynamic => None,
                    ScaleTime::Static => Some(self.static_scale(cx, x, scheme)?),
                };
                round(cx.graph_mut(), op, x, scheme, scale)?
                }
            };
            done.insert(x, rounded);
            cx.graph_mut().node_mut(op).args[0] = rounded;
        }
        Ok((!done.is_empty()).into())
    }

    fn validate(&self) -> Result<()> {
        let format = self.format.0;
        let signed = matches!(format.class, Class::Int { signed: true } | Class::Float { .. });
        if !signed || format.bits > 8 {
            return Err(Diag::pipeline(format!("activations cannot be rounded to `{format}`"))
                .help("use a signed format of at most 8 bits, such as `int8`"));
        }
        if self.zero == ZeroPoints::Asymmetric {
            return Err(Diag::pipeline("products of codes take no zero points of activations")
                .help("use `zero=symmetric`"));
        }
        Ok(())
    }

    fn needs(&self) -> Vec<Fact> {
        match self.scale {
            ScaleTime::Dynamic => vec![],
            ScaleTime::Static => vec![Fact::Stat(self.range.statistic())],
        }
    }

    fn rounds_rows(&self) -> Option<ElemTy> {
        let all = self.patterns().is_empty();
        // Codes of floats are made numbers of again.
        (all && self.format.0.is_int()).then(|| ElemTy::Q(self.scheme()))
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::filters(&self.only, &self.skip, &self.layers, &self.skip_layers)
    }
}

impl QuantizeActivations {
    fn scheme(&self) -> Scheme {
        let group = match self.scale {
            ScaleTime::Dynamic => Group::Token,
            ScaleTime::Static => Group::Tensor,
        };
        Scheme { format: self.format.0, group, zero: Zero::Symmetric, scale: Float::F32 }
    }

    /// The one scale of `x`, a weight.
    fn static_scale(&self, cx: &mut PassCx<'_>, x: ValueId, scheme: Scheme) -> Result<ValueId> {
        cx.check_interrupt()?;
        let kind = Kind::of(self.range);
        let known = stats::key(cx, x, kind).ok_or_else(|| stats::missing(cx, x, kind))?;
        let recipe = Recipe {
            step: Self::INFO.name,
            version: Self::INFO.version,
            options: format!("{scheme} {}", self.range),
            inputs: vec![known],
        };
        let place = cx.place(x);
        let stats = if cx.store.has(&recipe, 2) { Arc::default() } else { stats::of(cx, x)? };
        let blobs = cx.store.derive(&recipe, 2, &mut |out| {
            let (scale, told) = self.decide(&stats, &scheme).map_err(|d| d.at(Loc::Item(place.clone())))?;
            out[0].write(&scale.to_le_bytes())?;
            out[1].write(&serde_json::to_vec(&told).map_err(|e| Diag::bug(format!("facts about a scale: {e}")))?)
        })?;
        let Told { min, max, outside, moved } = serde_json::from_slice(&cx.store.read_blob(blobs[1])?)
            .map_err(|e| Diag::input(format!("what the store keeps of the scale of {place} is damaged: {e}")))?;
        let share = outside.map_or(String::new(), |share| format!(", {:.3} % saturate", 100.0 * share));
        let (range, unsettled) = (self.range.to_string(), moved.clone());
        let told = StaticScale { scheme: scheme.to_string(), range, min, max, saturates: outside, unsettled };
        let text = format_args!("{scheme}: {min:.4} to {max:.4} by {}{share}", self.range);
        cx.tell(&place, text, crate::told::Told::Scale(told));
        if let Some(moved) = moved {
            cx.remark(&place, format_args!("{moved}"));
        }
        let graph = cx.graph();
        let name = graph.value(x).name.as_deref().or_else(|| Some(graph.def(x)?.1.op.name())).unwrap_or("x");
        let ty = TensorTy { elem: scheme.scale.into(), shape: scheme.scale_shape(&graph.ty(x).shape)? };
        let name = cx.module.fresh_weight_name(&format!("{}.{name}.s", cx.function_name()));
        let w = cx.module.weights.push(WeightDecl { name, ty, source: WeightSource::Blob(blobs[0]) });
        Ok(cx.weight_value(w))
    }

    /// The scale that covers the range of what was seen.
    fn decide(&self, stats: &SiteStats, scheme: &Scheme) -> Result<(f32, Told)> {
        let name = self.range.statistic();
        let seen = stats.tensor(name).ok_or_else(|| Diag::bug(format!("`{name}` was not taken")))?;
        let span = seen.span(self.range, scheme)?;
        if span.absmax() == 0.0 {
            let why = format!("all numbers in the range `{}` are 0: there is no scale", self.range);
            let wider = if self.range == Method::Whole { "" } else { "take `range=whole`, " };
            return Err(Diag::input(why).help(format!(
                "{wider}calibrate on a text that reaches this tensor, or `skip` the weights that it is multiplied with"
            )));
        }
        let (scale, _) = scale_for(span, scheme, ScaleRule::Real)?;
        if !(scale.is_finite() && scale > 0.0) {
            return Err(Diag::input(format!("the scale of the range up to {} is {scale}", span.absmax()))
                .help("the model overflows on this text; calibrate it in f32"));
        }
        // A scale that moves by a tenth costs a seventh of a bit.
        let moved = stats.convergence(self.range, scheme)?.and_then(|c| c.remark(0.1));
        Ok((scale, Told { min: span.min(), max: span.max(), outside: seen.outside(span), moved }))
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

/// Puts the rounding of `x` in front of `op`, with scales for each token unless one is given.
fn round(
    graph: &mut Graph,
    op: OpId,
    x: ValueId,
    scheme: Scheme,
    scale: Option<ValueId>,
) -> Result<ValueId> {
    let mut at = graph.position(op).ok_or_else(|| Diag::bug("an op that is not in the program"))?;
    let name = |graph: &Graph, suffix: &str| {
        let name = format!("{}.{suffix}", graph.value(x).name.as_ref()?);
        let taken = graph.values().any(|(_, v)| v.name.as_ref() == Some(&name));
        (!taken).then_some(name)
    };
    let (s, q, d) = (name(graph, "s"), name(graph, "q"), name(graph, "d"));
    let s = match scale {
        Some(scale) => scale,
        None => {
            at += 1;
            graph.insert_inferred(at - 1, DynamicScale { to: scheme }, &[x], s.as_deref())?
        }
    };
    let q = graph.insert_inferred(at, Quantize { to: scheme }, &[x, s], q.as_deref())?;
    graph.insert_inferred(at + 1, Dequantize { to: Float::F32 }, &[q, s], d.as_deref())
}
