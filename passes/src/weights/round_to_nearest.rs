//! Rounds weights to the nearest code.

use super::install::{install, outputs};
use super::options::{FormatName, Grouping, RangeSearch, ScaleType, ZeroPoints, scheme};
use super::rows::{Loss, Outputs, quantize};
use crate::pass::prelude::*;
use quantc_ir::formats;
use quantc_ir::quant::{self, ScaleRule, Search};
use quantc_ir::scheme::{Scheme, Zero};
use quantc_ir::weights::Recipe;
use std::collections::BTreeMap;

pass! {
    /// Rounds the weights of matrix products to the nearest code of a narrow format.
    ///
    /// Each group of a weight gets a scale from its range, so that `w = (q - z) s` with `q` the nearest code. The weight
    /// operand of the `matmul` becomes a `dequantize` of codes and scales, and of zero points when they are asked for;
    /// the product itself stays. A table that is read as an embedding as well keeps its numbers there. A group at the end
    /// of a row may be shorter. For each weight the pass tells its signal-to-noise ratio, the bits of one weight with
    /// its share of scales, and the largest error.
    ///
    /// ```qir before
    /// %y = matmul %x, @w
    /// ```
    /// ```qir after
    /// %w = dequantize @w.q, @w.s
    /// %y = matmul %x, %w
    /// ```
    "round-to-nearest" => pub struct RoundToNearest {
        /// The format of the codes.
        format: FormatName = FormatName(&formats::INT8),
        /// What shares a scale: `row`, `tensor`, a number of columns, or a tile such as `"16x64"`.
        group: Grouping = Grouping::Row,
        /// `asymmetric` gives each group a zero point; integers of 4 and 8 bits are then stored unsigned.
        zero: ZeroPoints = ZeroPoints::Symmetric,
        /// The type of the scales; `auto` is `bf16` for groups smaller than a row, `f32` for others and for integers
        /// of fewer than 4 bits.
        scale: ScaleType = ScaleType::Auto,
        /// How a scale follows from the range: `real`, `power-of-two`, or `mx` as in OCP MX.
        scale_rule: ScaleRule = ScaleRule::Real,
        /// `mse` looks for the range that makes the sum of squared errors least; `none` takes the whole range.
        search: RangeSearch = RangeSearch::None,
        /// Weights to quantize, as name patterns; none given means all.
        only: Vec<Pattern> = vec![],
        /// Weights left alone, as name patterns. A pattern that matches nothing is an error.
        skip: Vec<Pattern> = vec![],
        /// Layers to work on, as name patterns; none given means all.
        layers: Vec<Pattern> = vec![],
        /// Layers left alone, as name patterns.
        skip_layers: Vec<Pattern> = vec![],
    }
    scope: Layer, numerics: Requantizes, stats: keeps, version: 1
}

/// Ranges that are tried besides the whole one.
const MSE_STEPS: u32 = 80;

impl Pass for RoundToNearest {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        if !selects(&self.layers, &self.skip_layers, cx.function_name()) {
            return Ok(Changed::No);
        }
        let scheme = self.scheme()?;
        let mut done = BTreeMap::<WeightId, ValueId>::new();
        for op in cx.graph().order().to_vec() {
            let Some((w, _)) = float_matrix(cx.graph(), op) else { continue };
            if !selects(&self.only, &self.skip, &cx.module.weights[w].name) {
                continue;
            }
            let value = match done.get(&w) {
                Some(&value) => value,
                None => self.quantize(cx, op, w, scheme)?,
            };
            done.insert(w, value);
            cx.graph_mut().node_mut(op).args[1] = value;
        }
        Ok((!done.is_empty()).into())
    }

    fn validate(&self) -> Result<()> {
        let scheme = self.scheme()?;
        if self.scale_rule == ScaleRule::Mx && scheme.zero != Zero::Symmetric {
            return Err(Diag::pipeline("OCP MX has no zero points").help("use `zero=symmetric`"));
        }
        Ok(())
    }

    fn emits(&self) -> Vec<(ElemTy, ElemTy)> {
        self.scheme().map(|s| (ElemTy::F32, ElemTy::Q(s))).into_iter().collect()
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

impl RoundToNearest {
    fn scheme(&self) -> Result<Scheme> {
        scheme(self.format, self.group, self.zero, self.scale)
    }

    /// Quantizes `w` and puts its `dequantize` in front of `op`.
    fn quantize(&self, cx: &mut PassCx<'_>, op: OpId, w: WeightId, scheme: Scheme) -> Result<ValueId> {
        cx.check_interrupt()?;
        let search = match self.search {
            RangeSearch::None => Search::None,
            RangeSearch::Mse => Search::Mse { steps: MSE_STEPS },
        };
        let options = quant::Options { rule: self.scale_rule, search };
        let decl = &cx.module.weights[w];
        let name = decl.name.clone();
        let about = |d: Diag| d.at(Loc::Item(format!("@{name}")));

        let outputs = outputs(scheme, &decl.ty).map_err(about)?;
        // Names of other weights do not decide these bytes.
        let recipe = Recipe {
            step: Self::INFO.name,
            version: Self::INFO.version,
            options: format!("{scheme} {:?} {:?}", self.scale_rule, search),
            inputs: vec![cx.store.digest(&cx.module.weights, w)?],
        };
        let (store, weights, threads) = (cx.store, &cx.module.weights, cx.env.threads);
        let blobs = store.derive(&recipe, outputs.len() + 1, &mut |out| {
            let view = store.view(weights, w)?;
            let [codes, scales, rest @ .., loss] = out else {
                return Err(Diag::bug("fewer outputs than were asked for"));
            };
            let mut out = Outputs { codes, scales, zeros: rest.first_mut() };
            let found = quantize(&view, &scheme, options, threads, &mut out).map_err(about)?;
            loss.write(&found.to_bytes())
        })?;
        let loss = Loss::from_bytes(&store.read_blob(blobs[outputs.len()])?)?;

        let (value, bits) = install(cx, op, w, outputs, &blobs)?;
        let told = match loss.noise {
            0.0 => "exact".to_string(),
            _ => format!("SQNR {:.2} dB, largest error {:.3e}", loss.sqnr_db(), loss.worst),
        };
        cx.remark(format_args!("@{name}"), format_args!("{scheme}: {told}, {bits:.3} bits per weight"));
        Ok(value)
    }
}

/// Whether `name` is among `only`, or `only` is empty, and not among `skip`.
pub(crate) fn selects(only: &[Pattern], skip: &[Pattern], name: &str) -> bool {
    (only.is_empty() || only.any_matches(name)) && !skip.any_matches(name)
}

/// The weight of a `matmul` when it is a matrix of plain floats with at least one element, and its value.
pub(crate) fn float_matrix(graph: &Graph, op: OpId) -> Option<(WeightId, ValueId)> {
    let node = graph.node(op);
    let Op::MatMul(matmul) = &node.op else { return None };
    let value = *node.args.get(1)?;
    let ty = graph.ty(value);
    let filled = ty.shape.elements().is_some_and(|n| n > 0);
    let plain = ty.rank() == 2 && filled && ty.elem.is_float() && matmul.packed.is_empty();
    graph.as_weight(value).filter(|_| plain).map(|w| (w, value))
}
