//! Rounds weights to the nearest code.

use super::install::{install, outputs};
use super::options::{FormatName, Grouping, RangeSearch, ScaleType, ZeroPoints, check_rule, scheme};
use super::gptq_core::{ScaleSearch, Weighting, fit_scales};
use super::rows::{Loss, Outputs, pack_rows, quantize, write_params};
use crate::calib::SiteStats;
use crate::calib::stats::{self, Kind};
use crate::pass::prelude::*;
use crate::told::{Rounded, Told};
use quantc_ir::formats;
use quantc_ir::quant::{self, Groups, ScaleRule, Search};
use quantc_ir::scheme::Scheme;
use quantc_ir::weights::{Recipe, WeightView};
use std::collections::BTreeMap;
use std::sync::Arc;

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
        /// `none` takes the whole range; `mse` looks for the one that makes the sum of squared errors least, `diagonal` weighs
        /// them by the energy of what each column reads, `output` takes the error in the output. The last two need the
        /// statistic `hessian`.
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
        let mut done = BTreeMap::<(WeightId, Option<ValueId>), ValueId>::new();
        for op in cx.graph().order().to_vec() {
            let Some((w, _)) = float_matrix(cx.graph(), op) else { continue };
            if !selects(&self.only, &self.skip, &cx.module.weights[w].name) {
                continue;
            }
            // What is read decides codes only when it is looked at.
            let x = self.weighs_rows().then(|| cx.graph().node(op).args[0]);
            let value = match done.get(&(w, x)) {
                Some(&value) => value,
                None => self.quantize(cx, op, (w, x), scheme)?,
            };
            done.insert((w, x), value);
            cx.graph_mut().node_mut(op).args[1] = value;
        }
        Ok((!done.is_empty()).into())
    }

    fn validate(&self) -> Result<()> {
        let scheme = self.scheme()?;
        check_rule(self.scale_rule, &scheme)?;
        Ok(())
    }

    fn needs(&self) -> Vec<Fact> {
        if self.weighs_rows() { vec![Fact::Stat(Kind::Hessian.name())] } else { vec![] }
    }

    fn emits(&self) -> Vec<(ElemTy, ElemTy)> {
        self.scheme().map(|s| (ElemTy::F32, ElemTy::Q(s))).into_iter().collect()
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::filters(&self.only, &self.skip, &self.layers, &self.skip_layers)
    }
}

impl RoundToNearest {
    fn scheme(&self) -> Result<Scheme> {
        scheme(self.format, self.group, self.zero, self.scale)
    }

    /// Whether scales depend on the rows that products read.
    fn weighs_rows(&self) -> bool {
        matches!(self.search, RangeSearch::Diagonal | RangeSearch::Output)
    }

    /// Quantizes `w`, which multiplies the rows `x` when those matter, and puts its `dequantize` in front of `op`.
    fn quantize(
        &self,
        cx: &mut PassCx<'_>,
        op: OpId,
        (w, x): (WeightId, Option<ValueId>),
        scheme: Scheme,
    ) -> Result<ValueId> {
        cx.check_interrupt()?;
        let search = match self.search {
            RangeSearch::Mse => Search::Mse { steps: MSE_STEPS },
            RangeSearch::None | RangeSearch::Diagonal | RangeSearch::Output => Search::None,
        };
        let options = quant::Options { rule: self.scale_rule, search };
        let decl = &cx.module.weights[w];
        let name = decl.name.clone();
        let about = |d: Diag| d.at(Loc::Item(format!("@{name}")));

        let outputs = outputs(scheme, &decl.ty).map_err(about)?;
        // Names of other weights do not decide these bytes.
        let mut recipe = Recipe {
            step: Self::INFO.name,
            version: Self::INFO.version,
            options: format!("{scheme} {:?} {:?}", self.scale_rule, search),
            inputs: vec![cx.store.digest(&cx.module.weights, w)?],
        };
        let mut rows = None;
        if let Some(x) = x {
            let key = stats::key(cx, x, Kind::Hessian).ok_or_else(|| stats::missing(cx, x, Kind::Hessian))?;
            recipe.options += &format!(" {:?}", self.search);
            recipe.inputs.push(key);
            let known = cx.store.has(&recipe, outputs.len() + 1);
            rows = Some(if known { Arc::default() } else { stats::of(cx, x)? });
        }
        let (store, weights, threads) = (cx.store, &cx.module.weights, cx.env.threads);
        let blobs = store.derive(&recipe, outputs.len() + 1, &mut |out| {
            let view = store.view(weights, w)?;
            let [codes, scales, rest @ .., loss] = out else {
                return Err(Diag::bug("fewer outputs than were asked for"));
            };
            let mut out = Outputs { codes, scales, zeros: rest.first_mut() };
            let found = match &rows {
                None => quantize(&view, &scheme, options, threads, &mut out),
                Some(rows) => self.by_output(&view, &scheme, rows, &mut out),
            };
            let found = found.map_err(about)?;
            loss.write(&found.to_bytes())
        })?;
        let loss = Loss::from_bytes(&store.read_blob(blobs[outputs.len()])?)?;

        let (value, bits) = install(cx, op, w, outputs, &blobs)?;
        let told = match loss.noise {
            0.0 => "exact".to_string(),
            _ => format!("SQNR {:.2} dB, largest error {:.3e}", loss.sqnr_db(), loss.worst),
        };
        let rounded = Rounded {
            weight: name.clone(),
            scheme: scheme.to_string(),
            bits,
            // Reports have no infinity.
            sqnr_db: loss.sqnr_db().min(999.0),
            largest_error: Some(loss.worst),
            output_error: None,
            by_nearest: None,
            fallback: None,
        };
        let text = format_args!("{scheme}: {told}, {bits:.3} bits per weight");
        cx.tell(format_args!("@{name}"), text, Told::Weight(rounded));
        Ok(value)
    }
}

impl RoundToNearest {
    /// Quantizes a whole matrix with scales that are searched for by what the rows say.
    fn by_output(
        &self,
        view: &WeightView<'_>,
        scheme: &Scheme,
        rows: &SiteStats,
        out: &mut Outputs<'_>,
    ) -> Result<Loss> {
        let h = rows.hessian.as_ref().ok_or_else(|| Diag::bug("a Hessian that was not taken"))?;
        let groups = Groups::new(scheme, &view.ty().shape)?;
        let w = view.read_all_f32()?;
        view.release(0..view.rows());
        let diagonal = h.diag();
        let weighting = match self.search {
            RangeSearch::Diagonal => Weighting::Diagonal(&diagonal),
            _ => Weighting::Block(h),
        };
        let search = ScaleSearch { rule: self.scale_rule, ..ScaleSearch::default() };
        let params = fit_scales(&w, &groups, scheme, weighting, search)?;
        let mut codes = vec![0; w.len()];
        quant::quantize_block(&groups, scheme, &params, 0, &w, &mut codes)?;
        out.codes.write(&pack_rows(scheme.format, &codes, groups.cols().max(1)))?;
        write_params(&groups, scheme, &params, out)?;
        let mut after = vec![0.0; w.len()];
        quant::dequantize_block(&groups, scheme, &params, 0, &codes, &mut after)?;
        Ok(Loss::between(&w, &after))
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
