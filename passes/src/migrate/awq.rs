//! Makes channels that matter larger before they are rounded.

use super::sites::{self, Decision, Site};
use crate::calib::SiteStats;
use crate::calib::hessian::Hessian;
use crate::calib::stats::{self, Kind};
use crate::pass::prelude::*;
use crate::weights::gptq_core::{
    GptqOptions, ScaleSearch, Weighting, fit_scales, output_errors, rewrite,
};
use crate::weights::options::{FormatName, Grouping, ScaleType, ZeroPoints, scheme};
use crate::weights::selects;
use quantc_ir::formats;
use quantc_ir::quant::{Groups, dequantize_block, quantize_block};
use quantc_ir::scheme::Scheme;
use quantc_ir::weights::Recipe;
use serde::{Deserialize, Serialize};

pass! {
    /// Makes the columns of weights larger whose rows carry much, so that rounding hurts them less.
    ///
    /// Where channels can be divided (see `smoothquant`), `s[j] = (root of the mean square of x[j])^a`: the matrices that read the
    /// rows are multiplied, what makes them is divided, and `a` is the one of 21 values between 0 and 1 with the
    /// least error of the output when the weights are rounded with the options given (Lin et al. 2023, AWQ,
    /// section 3.2). The error is that of the matrices' outputs on all tokens of the data, by the statistic
    /// `hessian`; the search for narrower ranges is part of it. Products stay the same, and that is checked on a sample. The
    /// options should be those of the pass that rounds afterwards.
    ///
    /// ```qir before
    /// weight @w : tensor<2x4xf32> = inline [[0.13, 0.7, 0.45, 0.31], [0.22, 0.7, 0.41, 0.16]]
    /// %n = rmsnorm %x, @g
    /// %y = matmul %n, @w
    /// {-# calibration %n.hessian = [900.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0] #-}
    /// ```
    /// ```qir after
    /// %n = rmsnorm %x, @g.awq
    /// %y = matmul %n, @w.awq
    /// ```
    "awq" => pub struct Awq {
        /// The format of the codes.
        format: FormatName = FormatName(&formats::INT4),
        /// What shares a scale: `row`, `tensor`, a number of columns, or a tile such as `"16x64"`.
        group: Grouping = Grouping::Columns(128),
        /// `asymmetric` gives each group a zero point.
        zero: ZeroPoints = ZeroPoints::Symmetric,
        /// The type of the scales, as in `round-to-nearest`.
        scale: ScaleType = ScaleType::Auto,
        /// Whether ranges narrower than the whole are tried as well.
        clip: bool = true,
        /// How weights are rounded afterwards: to the `nearest` code, or by `gptq`, which leaves less to gain.
        rounding: Rounding = Rounding::Nearest,
        /// Matrices that must not be changed, as name patterns: places that they read are left alone. A pattern that
        /// matches nothing is an error.
        skip: Vec<Pattern> = vec![],
        /// Layers to work on, as name patterns; none given means all.
        layers: Vec<Pattern> = vec![],
        /// Layers left alone, as name patterns.
        skip_layers: Vec<Pattern> = vec![],
    }
    needs: [stat(hessian)],
    scope: Layer, numerics: Reassociates, stats: transforms, version: 3
}

/// How weights are rounded afterwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rounding {
    /// To the nearest code.
    #[default]
    Nearest,
    /// By the pass `gptq`.
    Gptq,
}

/// Exponents that are tried.
const EXPONENTS: u32 = 20;

impl Rounding {
    /// A place is changed when the error falls below this part of what it was: less is noise of the samples. What a small
    /// gain in one place of many does to a whole model is chance, and `gptq` leaves only small ones.
    fn worth_it(self) -> f64 {
        match self {
            Rounding::Nearest => 0.97,
            Rounding::Gptq => 0.93,
        }
    }
}

/// Rows of each matrix that errors are measured on.
const SAMPLED_ROWS: usize = 128;

impl Pass for Awq {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        if !selects(&self.layers, &self.skip_layers, cx.function_name()) {
            return Ok(Changed::No);
        }
        sites::divide_each(cx, &self.skip, "awq", &mut |cx, site| {
            if stats::too_wide(cx, site.x) {
                return Ok(Decision::Leave("it has too many channels for a Hessian"));
            }
            let Chosen { exponent, gain, factors } = self.factors(cx, site)?;
            if exponent == 0.0 {
                return Ok(Decision::Leave("no exponent is better than 0"));
            }
            let text = format!("exponent {exponent:.2}, error {gain:.3} of that without");
            Ok(Decision::Divide(factors, text))
        })
    }

    fn validate(&self) -> Result<()> {
        self.scheme().map(|_| ())
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::filters(&[], &self.skip, &self.layers, &self.skip_layers)
    }
}

/// What is done at a place.
struct Chosen {
    exponent: f32,
    /// Error by that of rounding what is there now.
    gain: f32,
    factors: Vec<f32>,
}

impl Awq {
    fn scheme(&self) -> Result<Scheme> {
        scheme(self.format, self.group, self.zero, self.scale)
    }

    /// Kept in the store, so that statistics are not needed when nothing has changed.
    fn factors(&self, cx: &mut PassCx<'_>, site: &Site) -> Result<Chosen> {
        let scheme = self.scheme()?;
        let known = stats::key(cx, site.x, Kind::Hessian);
        let known = known.ok_or_else(|| stats::missing(cx, site.x, Kind::Hessian))?;
        let matrices = site.matrices(cx.graph());
        let mut inputs = vec![known];
        for &w in &matrices {
            inputs.push(cx.store.digest(&cx.module.weights, w)?);
        }
        let options = format!("{scheme} clip {} {:?} of {}", self.clip, self.rounding, site.classes);
        let recipe = Recipe { step: Self::INFO.name, version: Self::INFO.version, options, inputs };
        let stats = if cx.store.has(&recipe, 1) { None } else { Some(stats::of(cx, site.x)?) };
        let (store, weights) = (cx.store, &cx.module.weights);
        let blobs = store.derive(&recipe, 1, &mut |out| {
            let stats = stats.as_ref().ok_or_else(|| Diag::bug("statistics that were not taken"))?;
            let mut samples = vec![];
            for &w in &matrices {
                samples.push(sampled(&store.view(weights, w)?)?);
            }
            let search = ScaleSearch { steps: if self.clip { 12 } else { 0 }, ..ScaleSearch::default() };
            let how = How { scheme: &scheme, search, rounding: self.rounding };
            let Chosen { exponent, gain, factors } = choose(site, stats, &samples, how)?;
            let numbers: Vec<f32> = [exponent, gain].into_iter().chain(factors).collect();
            out[0].write_f32(Float::F32, &numbers)
        })?;
        let bytes = store.read_blob(blobs[0])?;
        let numbers: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        match &numbers[..] {
            [exponent, gain, factors @ ..] if factors.len() == site.classes => {
                Ok(Chosen { exponent: *exponent, gain: *gain, factors: factors.to_vec() })
            }
            _ => Err(Diag::input("what the store keeps of the factors of a place is damaged")),
        }
    }
}

/// Some rows of a matrix, evenly taken.
struct Sampled {
    rows: Vec<f32>,
    /// For how many rows one stands.
    stand_for: f64,
}

/// Takes them.
fn sampled(view: &quantc_ir::weights::WeightView<'_>) -> Result<Sampled> {
    let step = view.rows().div_ceil(SAMPLED_ROWS).max(1);
    let mut rows = vec![];
    let mut row = vec![0.0; view.cols()];
    for i in (0..view.rows()).step_by(step) {
        view.read_rows_f32(i, 1, &mut row)?;
        rows.extend_from_slice(&row);
    }
    view.release(0..view.rows());
    Ok(Sampled { stand_for: step as f64, rows })
}

/// How errors are measured.
#[derive(Clone, Copy)]
struct How<'a> {
    scheme: &'a Scheme,
    search: ScaleSearch,
    rounding: Rounding,
}

fn choose(
    site: &Site,
    stats: &SiteStats,
    samples: &[Sampled],
    how: How<'_>,
) -> Result<Chosen> {
    let h = stats.hessian.as_ref().ok_or_else(|| Diag::bug("a Hessian that was not taken"))?;
    let mut energy = vec![0f64; site.classes];
    for (&class, x) in site.class.iter().zip(h.diag()) {
        energy[class] += f64::from(x);
    }
    let most = energy.iter().copied().fold(0.0, f64::max);
    // Channels that carry nothing are not made huge.
    let root = |e: &f64| e.max(most * 1e-8).sqrt();
    let factors = |exponent: f64| -> Vec<f32> {
        let raw: Vec<f64> = energy.iter().map(|e| root(e).powf(exponent)).collect();
        let (low, high) = raw.iter().fold((f64::MAX, 0f64), |(low, high), &s| (low.min(s), high.max(s)));
        // Near 1 they leave numbers where they were.
        raw.iter().map(|s| (s / (low * high).sqrt()) as f32).collect()
    };
    let mut best = Chosen { exponent: 0.0, gain: 1.0, factors: vec![1.0; site.classes] };
    if most == 0.0 {
        return Ok(best);
    }
    let without = error(site, &best.factors, samples, h, how)?;
    let mut least = without * how.rounding.worth_it();
    // Rounding by gptq takes longer, and what is best lies lower, but where outliers are.
    let step = if how.rounding == Rounding::Gptq { 2 } else { 1 };
    for i in (1..=EXPONENTS).step_by(step) {
        let exponent = f64::from(i) / f64::from(EXPONENTS);
        if how.rounding == Rounding::Gptq && exponent > 0.5 && exponent > f64::from(best.exponent) + 0.15 {
            break;
        }
        let factors = factors(exponent);
        let error = error(site, &factors, samples, h, how)?;
        if error < least {
            least = error;
            best = Chosen { exponent: exponent as f32, gain: (error / without) as f32, factors };
        }
    }
    Ok(best)
}

/// The error of the outputs when the columns are multiplied by the factors, rounded, and divided again.
fn error(
    site: &Site,
    factors: &[f32],
    samples: &[Sampled],
    h: &Hessian,
    how: How<'_>,
) -> Result<f64> {
    let How { scheme, search, rounding } = how;
    let by: Vec<f32> = site.class.iter().map(|&c| factors[c]).collect();
    let (k, scaled_h) = (by.len(), h.scaled(&by)?);
    let mut sum = 0.0;
    for Sampled { rows, stand_for } in samples {
        let scaled: Vec<f32> = rows.chunks_exact(k).flat_map(|row| row.iter().zip(&by).map(|(w, s)| w * s)).collect();
        if rounding == Rounding::Gptq {
            let options = GptqOptions { search, sweeps: 1, ..GptqOptions::default() };
            let made = rewrite(&scaled, rows.len() / k, k, &scaled_h, scheme, &options)?;
            sum += stand_for * made.facts.error;
            continue;
        }
        let groups = Groups::new(scheme, &Shape::fixed(&[(rows.len() / k) as u64, k as u64]))?;
        let params = fit_scales(&scaled, &groups, scheme, Weighting::Block(&scaled_h), search)?;
        let mut codes = vec![0; scaled.len()];
        quantize_block(&groups, scheme, &params, 0, &scaled, &mut codes)?;
        let mut off = vec![0.0; scaled.len()];
        dequantize_block(&groups, scheme, &params, 0, &codes, &mut off)?;
        off.iter_mut().zip(&scaled).for_each(|(y, x)| *y -= x);
        sum += stand_for * output_errors(&off, &scaled_h).iter().sum::<f64>();
    }
    Ok(sum)
}
