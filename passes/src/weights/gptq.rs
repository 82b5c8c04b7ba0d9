//! Rounds weights so that outputs change little.

use super::gptq_core::{Facts, GptqOptions, Importance, Rewritten, ScaleSearch, Weighting, fit_scales, rewrite};
use super::install::{install, outputs};
use super::options::{FormatName, Grouping, ScaleType, ZeroPoints, check_rule, scheme};
use super::round_to_nearest::{float_matrix, selects};
use super::rows::{Loss, Outputs, pack_rows, write_params};
use crate::calib::stats::{self, Kind};
use crate::calib::SiteStats;
use crate::pass::prelude::*;
use crate::told::Rounded;
use quantc_ir::formats;
use quantc_ir::quant::{Groups, ScaleRule, dequantize_block, quantize_block};
use quantc_ir::scheme::Scheme;
use quantc_ir::weights::{Recipe, WeightView};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

pass! {
    /// Rounds the weights of matrix products so that what they make of the rows they read changes little.
    ///
    /// As `round-to-nearest`, but columns are rounded one after the other, and those still to come make up for the error
    /// of those before, by what the statistic `hessian` says of the rows (Frantar et al. 2022). Scales are
    /// searched for by squared errors, and fitted to that measure once there are codes. No row is worse than rounded to nearest. Where the rows
    /// say nothing of use, numbers are rounded to nearest, and a remark says so.
    ///
    /// ```qir before
    /// %y = matmul %x, @w
    /// {-# calibration %x.hessian = [4.0, 1.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 1.0, 0.0, 0.0, 1.0, 2.0] #-}
    /// ```
    /// ```qir after
    /// %w = dequantize @w.q, @w.s
    /// %y = matmul %x, %w
    /// ```
    "gptq" => pub struct Gptq {
        /// The format of the codes.
        format: FormatName = FormatName(&formats::INT4),
        /// What shares a scale: `row`, `tensor`, a number of columns, or a tile such as `"16x64"`.
        group: Grouping = Grouping::Columns(128),
        /// `asymmetric` gives each group a zero point; integers of 4 and 8 bits are then stored unsigned.
        zero: ZeroPoints = ZeroPoints::Symmetric,
        /// The type of the scales; `auto` is `bf16` for groups smaller than a row, `f32` for others and for integers
        /// of fewer than 4 bits.
        scale: ScaleType = ScaleType::Auto,
        /// How a scale follows from the range: `real`, `power-of-two`, or `mx` as in OCP MX.
        scale_rule: ScaleRule = ScaleRule::Real,
        /// By what scales are searched for: `none` takes the whole range, `mse` the sum of squared errors, `diagonal` the same
        /// weighted by the columns' energy, `output` the error that rounding would make in the output, `pivots` the error that no
        /// other column can make up for.
        search: Search = Search::Mse,
        /// Whether columns are rounded in the order of their energy, and not from the left.
        act_order: bool = true,
        /// What is added to the diagonal of the Hessian, as a part of its mean; ten times as much when that is too little.
        damp: f32 = 0.01,
        /// How often single codes are improved afterwards, given all others.
        sweeps: u32 = 2,
        /// Whether sweeps improve scales too, given the codes, in groups of at most 128 columns of one row.
        refit: bool = true,
        /// Weights to quantize, as name patterns; none given means all.
        only: Vec<Pattern> = vec![],
        /// Weights left alone, as name patterns. A pattern that matches nothing is an error.
        skip: Vec<Pattern> = vec![],
        /// Layers to work on, as name patterns; none given means all.
        layers: Vec<Pattern> = vec![],
        /// Layers left alone, as name patterns.
        skip_layers: Vec<Pattern> = vec![],
    }
    needs: [stat(hessian)],
    scope: Layer, numerics: Requantizes, stats: keeps, version: 4
}

/// By what scales are searched for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Search {
    /// Not at all.
    None,
    /// The sum of squared errors.
    #[default]
    Mse,
    /// The same, weighted by the columns' energy.
    Diagonal,
    /// The error in the output.
    Output,
    /// The error that no other column can make up for.
    Pivots,
}

/// What is told of a weight; kept beside its blobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Told {
    sqnr_db: f64,
    damping: Option<f64>,
    escalations: u32,
    dead: usize,
    /// Output error by that of rounding to nearest.
    by_nearest: f64,
    /// Output error by the output.
    relative: f64,
    /// Whether there was no Hessian, so that nothing is known of outputs.
    too_wide: bool,
}

impl Pass for Gptq {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        if !selects(&self.layers, &self.skip_layers, cx.function_name()) {
            return Ok(Changed::No);
        }
        let scheme = self.scheme()?;
        let mut done = BTreeMap::<(WeightId, ValueId), ValueId>::new();
        for op in cx.graph().order().to_vec() {
            let Some((w, _)) = float_matrix(cx.graph(), op) else { continue };
            if !selects(&self.only, &self.skip, &cx.module.weights[w].name) {
                continue;
            }
            let x = cx.graph().node(op).args[0];
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
        if !(self.damp > 0.0 && self.damp <= 1.0) {
            return Err(Diag::pipeline(format!("`damp` is {}, not above 0 and at most 1", self.damp)));
        }
        Ok(())
    }

    fn emits(&self) -> Vec<(ElemTy, ElemTy)> {
        self.scheme().map(|s| (ElemTy::F32, ElemTy::Q(s))).into_iter().collect()
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::filters(&self.only, &self.skip, &self.layers, &self.skip_layers)
    }
}

impl Gptq {
    fn scheme(&self) -> Result<Scheme> {
        scheme(self.format, self.group, self.zero, self.scale)
    }

    fn core(&self) -> GptqOptions {
        let search = ScaleSearch { rule: self.scale_rule, ..ScaleSearch::default() };
        let (search, importance) = match self.search {
            Search::None => (ScaleSearch { steps: 0, ..search }, Importance::Uniform),
            Search::Mse => (search, Importance::Uniform),
            Search::Diagonal => (search, Importance::Diagonal),
            Search::Output => (search, Importance::Block),
            Search::Pivots => (search, Importance::Pivots),
        };
        let damp = f64::from(self.damp);
        GptqOptions { act_order: self.act_order, damp, search, importance, sweeps: self.sweeps, refit: self.refit }
    }

    /// Quantizes `w`, which multiplies the rows `x`, and puts its `dequantize` in front of `op`.
    fn quantize(
        &self,
        cx: &mut PassCx<'_>,
        op: OpId,
        (w, x): (WeightId, ValueId),
        scheme: Scheme,
    ) -> Result<ValueId> {
        cx.check_interrupt()?;
        let name = cx.module.weights[w].name.clone();
        let about = |d: Diag| d.at(Loc::Item(format!("@{name}")));
        let outputs = outputs(scheme, &cx.module.weights[w].ty).map_err(about)?;
        let rows = stats::key(cx, x, Kind::Hessian).ok_or_else(|| stats::missing(cx, x, Kind::Hessian))?;
        let core = self.core();
        let recipe = Recipe {
            step: Self::INFO.name,
            version: Self::INFO.version,
            options: format!("{scheme} {core:?}"),
            inputs: vec![cx.store.digest(&cx.module.weights, w)?, rows],
        };
        let known = cx.store.has(&recipe, outputs.len() + 1);
        let rows = if known { Arc::default() } else { stats::of(cx, x)? };
        let (store, weights) = (cx.store, &cx.module.weights);
        let blobs = store.derive(&recipe, outputs.len() + 1, &mut |out| {
            let view = store.view(weights, w)?;
            let [codes, scales, rest @ .., told] = out else {
                return Err(Diag::bug("fewer outputs than were asked for"));
            };
            let mut out = Outputs { codes, scales, zeros: rest.first_mut() };
            let found = write(&view, &scheme, &rows, &core, &mut out).map_err(about)?;
            told.write(&serde_json::to_vec(&found).map_err(|e| Diag::bug(format!("facts about a weight: {e}")))?)
        })?;
        let told: Told = serde_json::from_slice(&store.read_blob(blobs[outputs.len()])?)
            .map_err(|e| Diag::input(format!("what the store keeps of @{name} is damaged: {e}")))?;
        let (value, bits) = install(cx, op, w, outputs, &blobs)?;
        let why = if told.too_wide { "the rows have too many channels for a Hessian" } else { "the Hessian has no factor" };
        let mut text = match told.damping {
            Some(_) => format!(
                "{scheme}: relative output error {:.3e}, {:.2} of rounding to nearest, SQNR {:.2} dB",
                told.relative, told.by_nearest, told.sqnr_db
            ),
            None => format!("{scheme}: rounded to nearest, SQNR {:.2} dB: {why}", told.sqnr_db),
        };
        if told.escalations > 0 {
            text += &format!(", damping raised {} times", told.escalations);
        }
        if told.dead > 0 {
            text += &format!(", {} columns read nothing but 0", told.dead);
        }
        let rounded = Rounded {
            weight: name.clone(),
            scheme: scheme.to_string(),
            bits,
            sqnr_db: told.sqnr_db,
            largest_error: None,
            output_error: Some(told.relative).filter(|_| !told.too_wide),
            by_nearest: Some(told.by_nearest).filter(|_| !told.too_wide),
            fallback: told.damping.is_none().then(|| why.into()),
        };
        let text = format_args!("{text}, {bits:.3} bits per weight");
        cx.tell(format_args!("@{name}"), text, crate::told::Told::Weight(rounded));
        Ok(value)
    }
}

/// Quantizes a whole matrix and writes it.
fn write(
    view: &WeightView<'_>,
    scheme: &Scheme,
    rows: &SiteStats,
    options: &GptqOptions,
    out: &mut Outputs<'_>,
) -> Result<Told> {
    let (n, k) = (view.rows(), view.cols());
    let w = view.read_all_f32()?;
    view.release(0..n);
    let groups = Groups::new(scheme, &view.ty().shape)?;
    let Rewritten { codes, params, facts } = match &rows.hessian {
        Some(h) => rewrite(&w, n, k, h, scheme, options)?,
        None => {
            let params = fit_scales(&w, &groups, scheme, Weighting::Uniform, options.search)?;
            let mut codes = vec![0; w.len()];
            quantize_block(&groups, scheme, &params, 0, &w, &mut codes)?;
            Rewritten { codes, params, facts: Facts::default() }
        }
    };
    out.codes.write(&pack_rows(scheme.format, &codes, k.max(1)))?;
    write_params(&groups, scheme, &params, out)?;
    let mut after = vec![0.0; w.len()];
    dequantize_block(&groups, scheme, &params, 0, &codes, &mut after)?;
    let Facts { damping, escalations, dead, error, error_nearest, .. } = facts;
    let loss = Loss::between(&w, &after);
    let output: f64 = rows.hessian.iter().flat_map(|h| super::gptq_core::output_errors(&w, h)).sum();
    let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
    Ok(Told {
        // JSON has no infinity.
        sqnr_db: loss.sqnr_db().min(999.0),
        damping,
        escalations,
        dead,
        by_nearest: ratio(error, error_nearest),
        relative: ratio(error, output),
        too_wide: rows.hessian.is_none(),
    })
}
