//! Moves outliers of activations into the weights that read them.

use super::sites::{self, Decision, Site};
use crate::calib::SiteStats;
use crate::calib::observers::{AnyObserver, Method, Rows};
use crate::calib::stats::{self, Kind};
use crate::pass::prelude::*;
use crate::weights::options::FormatName;
use crate::weights::{ScaleTime, selects};
use quantc_ir::formats;
use quantc_ir::quant::{
    Groups, Options, ScaleRule, dequantize_block, dequantize_one, quantize_one, quantize_rows, scale_for,
};
use quantc_ir::scheme::{Group, Scheme, Zero};
use quantc_ir::weights::Recipe;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

pass! {
    /// Moves outliers of activations into the weights that read them.
    ///
    /// Where channels can be divided (behind a norm, behind the other factor of a gated product, and the values of
    /// attention), `s[j] = max|x[j]|^alpha / max|w[j]|^(1 - alpha)`: the channel is divided by it where it is made, and the columns
    /// of the matrices that read it are multiplied (Xiao et al. 2023, SmoothQuant, equation 4). Products stay the same, and that is
    /// checked on a sample whenever there is data. `alpha=search` tries eleven values for each place and takes the
    /// one with the least relative error of the products of rounded rows and rounded weights, on rows of the data. A place
    /// is left as it is when that is best.
    ///
    /// ```qir before
    /// %n = rmsnorm %x, @g
    /// %y = matmul %n, @w
    /// {-# calibration %n.absmax = [1.0, 16.0, 1.0, 1.0] #-}
    /// ```
    /// ```qir after
    /// %n = rmsnorm %x, @g.smoothed
    /// %y = matmul %n, @w.smoothed
    /// ```
    "smoothquant" => pub struct SmoothQuant {
        /// Migration strength: 0 leaves activations alone, 1 moves the whole range into the weights; or `search`.
        alpha: Alpha = Alpha::Fixed(0.5),
        /// A place is left as it is unless `search` finds less than this part of the error there.
        worth: f32 = 1.0,
        /// The format that rows and weights are rounded to, for `search`.
        format: FormatName = FormatName(&formats::INT8),
        /// When scales of rows are decided, for `search`: `dynamic` has one for each row, `static` one for all of them, which
        /// cuts off what costs less than it gains.
        scale: ScaleTime = ScaleTime::Dynamic,
        /// Matrices that must not be changed, as name patterns: places that they read are left alone. A pattern that
        /// matches nothing is an error.
        skip: Vec<Pattern> = vec![],
        /// Layers to work on, as name patterns; none given means all.
        layers: Vec<Pattern> = vec![],
        /// Layers left alone, as name patterns.
        skip_layers: Vec<Pattern> = vec![],
    }
    needs: [stat(absmax)],
    scope: Layer, numerics: Reassociates, stats: transforms, version: 3
}

/// How much is moved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Alpha {
    /// So much everywhere.
    Fixed(f32),
    /// What is best at each place.
    Search,
}

impl Serialize for Alpha {
    fn serialize<S: serde::Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        match self {
            Alpha::Fixed(alpha) => out.serialize_f32(*alpha),
            Alpha::Search => out.serialize_str("search"),
        }
    }
}

impl<'de> Deserialize<'de> for Alpha {
    fn deserialize<D: serde::Deserializer<'de>>(input: D) -> Result<Alpha, D::Error> {
        /// As written.
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Text {
            Number(f32),
            Word(String),
        }
        match Text::deserialize(input) {
            Ok(Text::Number(alpha)) => Ok(Alpha::Fixed(alpha)),
            Ok(Text::Word(word)) if word == "search" => Ok(Alpha::Search),
            _ => Err(serde::de::Error::custom("expected a number or `search`")),
        }
    }
}

/// What is tried by `search`.
const ALPHAS: [f32; 11] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

/// Rows of each matrix that errors are measured on.
const SAMPLED_ROWS: usize = 256;

impl Pass for SmoothQuant {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        if !selects(&self.layers, &self.skip_layers, cx.function_name()) {
            return Ok(Changed::No);
        }
        sites::divide_each(cx, &self.skip, "smoothed", &mut |cx, site| {
            let (alpha, factors, gain) = self.factors(cx, site)?;
            if factors.iter().all(|&s| s == 1.0) {
                return Ok(Decision::Leave("no strength is better than none"));
            }
            if gain.is_some_and(|gain| gain >= f64::from(self.worth)) {
                return Ok(Decision::Leave("no strength is so much better that it is worth it"));
            }
            let span = factors.iter().fold((f32::MAX, 0f32), |(low, high), &s| (low.min(s), high.max(s)));
            let gain = gain.map_or(String::new(), |g| format!(", error {g:.3} of that without"));
            let text = format!("alpha {alpha}, factors {:.3} to {:.3}{gain}", span.0, span.1);
            Ok(Decision::Divide(factors, text))
        })
    }

    fn needs(&self) -> Vec<Fact> {
        let mut needs = Self::INFO.needs.to_vec();
        if self.alpha == Alpha::Search {
            needs.push(Fact::Stat(Kind::Rows.name()));
        }
        needs
    }

    fn validate(&self) -> Result<()> {
        if !(self.worth > 0.0 && self.worth <= 1.0) {
            return Err(Diag::pipeline(format!("`worth` is {}, not above 0 and at most 1", self.worth)));
        }
        match self.alpha {
            Alpha::Fixed(alpha) if !(0.0..=1.0).contains(&alpha) => {
                Err(Diag::pipeline(format!("`alpha` is {alpha}, not between 0 and 1")))
            }
            _ => Ok(()),
        }
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::filters(&[], &self.skip, &self.layers, &self.skip_layers)
    }
}

impl SmoothQuant {
    /// The strength at a place, its factors, and by how much the error falls when that was measured. Kept in the store, so that
    /// rows are not needed when nothing has changed.
    fn factors(&self, cx: &mut PassCx<'_>, site: &Site) -> Result<(f32, Vec<f32>, Option<f64>)> {
        let kind = if self.alpha == Alpha::Search { Kind::Rows } else { Kind::Absmax };
        let known = stats::key(cx, site.x, kind).ok_or_else(|| stats::missing(cx, site.x, kind))?;
        let matrices = site.matrices(cx.graph());
        let mut inputs = vec![known];
        for &w in &matrices {
            inputs.push(cx.store.digest(&cx.module.weights, w)?);
        }
        let options = format!("{:?} {} {:?} {:?}", self.alpha, self.format, self.scale, site.class.iter().max());
        let recipe = Recipe { step: Self::INFO.name, version: Self::INFO.version, options, inputs };
        let stats = if cx.store.has(&recipe, 1) { None } else { Some(stats::of(cx, site.x)?) };
        let (store, weights) = (cx.store, &cx.module.weights);
        let blobs = store.derive(&recipe, 1, &mut |out| {
            let stats = stats.as_ref().ok_or_else(|| Diag::bug("statistics that were not taken"))?;
            let mut readers = vec![];
            for &w in &matrices {
                let view = store.view(weights, w)?;
                readers.push(view.read_all_f32()?);
                view.release(0..view.rows());
            }
            let (alpha, factors, gain) = self.choose(site, stats, &readers)?;
            let numbers: Vec<f32> = [alpha, gain.map_or(-1.0, |g| g as f32)].into_iter().chain(factors).collect();
            out[0].write_f32(Float::F32, &numbers)
        })?;
        let bytes = store.read_blob(blobs[0])?;
        let numbers: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        match &numbers[..] {
            [alpha, gain, factors @ ..] if factors.len() == site.classes => {
                Ok((*alpha, factors.to_vec(), (*gain >= 0.0).then_some(f64::from(*gain))))
            }
            _ => Err(Diag::input("what the store keeps of the factors of a place is damaged")),
        }
    }

    /// The strength, the factors, and by how much the error falls when that was measured.
    fn choose(&self, site: &Site, stats: &SiteStats, readers: &[Vec<f32>]) -> Result<(f32, Vec<f32>, Option<f64>)> {
        let columns = site.class.len();
        let mut most_x = vec![0f32; site.classes];
        let mut most_w = vec![0f32; site.classes];
        for (&class, &x) in site.class.iter().zip(&stats.absmax) {
            most_x[class] = most_x[class].max(x);
        }
        for row in readers.iter().flat_map(|w| w.chunks_exact(columns.max(1))) {
            for (&class, &w) in site.class.iter().zip(row) {
                most_w[class] = most_w[class].max(w.abs());
            }
        }
        let factors = |alpha: f32| -> Vec<f32> {
            let factor = |(&x, &w): (&f32, &f32)| match x > 0.0 && w > 0.0 {
                true => (x.powf(alpha) / w.powf(1.0 - alpha)).clamp(1e-5, 1e5),
                false => 1.0,
            };
            let raw: Vec<f32> = most_x.iter().zip(&most_w).map(factor).collect();
            // One factor for all changes nothing; near 1 they leave numbers where they were.
            let logs: f64 = raw.iter().map(|&s| f64::from(s).ln()).sum();
            let mean = (logs / raw.len().max(1) as f64).exp() as f32;
            raw.iter().map(|s| s / mean).collect()
        };
        match self.alpha {
            Alpha::Fixed(alpha) => Ok((alpha, factors(alpha), None)),
            Alpha::Search => {
                let ones = vec![1.0; site.classes];
                let none = self.error(site, &ones, stats, readers)?;
                let mut best = (0.0, ones, none);
                for alpha in ALPHAS {
                    let factors = factors(alpha);
                    let error = self.error(site, &factors, stats, readers)?;
                    if error < best.2 {
                        best = (alpha, factors, error);
                    }
                }
                let gain = if none > 0.0 { best.2 / none } else { 1.0 };
                Ok((best.0, best.1, Some(gain)))
            }
        }
    }

    /// The squared error of products of rounded rows and rounded weights, on the rows that were kept and on some rows of each matrix.
    /// Each token's is taken relative to the size of its product and the usual size together, for each matrix: what is
    /// small, as keys beside values can be, decides as much as what is large.
    fn error(&self, site: &Site, factors: &[f32], stats: &SiteStats, readers: &[Vec<f32>]) -> Result<f64> {
        let by: Vec<f32> = site.class.iter().map(|&c| factors[c]).collect();
        let k = by.len().max(1);
        let scheme = |group| Scheme { format: self.format.0, group, zero: Zero::Symmetric, scale: Float::F32 };
        let rounded = |rows: &[f32]| -> Result<Vec<f32>> {
            let scheme = scheme(Group::Axis(0));
            let groups = Groups::new(&scheme, &Shape::fixed(&[(rows.len() / k) as u64, k as u64]))?;
            let made = quantize_rows(&groups, &scheme, Options::default(), rows)?;
            let mut back = vec![0.0; rows.len()];
            dequantize_block(&groups, &scheme, &made.params, 0, &made.codes, &mut back)?;
            Ok(back)
        };
        let divided: Vec<f32> = stats.rows.chunks_exact(k).flat_map(|row| row.iter().zip(&by).map(|(x, s)| x / s)).collect();
        let rows = match self.scale {
            ScaleTime::Dynamic => rounded(&divided)?,
            ScaleTime::Static => at_one_scale(&divided, k, &scheme(Group::Tensor))?,
        };
        let mut sum = 0.0;
        for w in readers {
            let n = w.len() / k;
            let step = n.div_ceil(SAMPLED_ROWS).max(1);
            let picked: Vec<f32> = w.chunks_exact(k).step_by(step).flatten().copied().collect();
            let scaled: Vec<f32> = picked.chunks_exact(k).flat_map(|row| row.iter().zip(&by).map(|(w, s)| w * s)).collect();
            let weights = rounded(&scaled)?;
            let parts: Vec<(f64, f64)> = rows
                .par_chunks(k)
                .zip(stats.rows.par_chunks(k))
                .map(|(q, x)| {
                    let mut part = (0.0, 0.0);
                    for (w, v) in weights.chunks_exact(k).zip(picked.chunks_exact(k)) {
                        let y = dot(x, v);
                        part.0 += f64::from(dot(q, w) - y).powi(2);
                        part.1 += f64::from(y).powi(2);
                    }
                    part
                })
                .collect();
            let usual = parts.iter().map(|(_, size)| size).sum::<f64>() / parts.len().max(1) as f64;
            let relative = |(error, size): &(f64, f64)| if usual > 0.0 { error / (size + usual) } else { 0.0 };
            sum += parts.iter().map(relative).sum::<f64>();
        }
        Ok(sum)
    }
}

/// Rows of `k` as they come back from codes with the one scale that `quantize-activations` finds for them.
fn at_one_scale(rows: &[f32], k: usize, scheme: &Scheme) -> Result<Vec<f32>> {
    let mut seen = AnyObserver::new(Method::Mse.statistic(), k)?;
    seen.see(&Rows::new(0, rows, k)?)?;
    let (scale, zero) = scale_for(seen.span(Method::Mse, scheme)?, scheme, ScaleRule::Real)?;
    let code = |&x: &f32| quantize_one(x, scale, zero, scheme.format);
    Ok(rows.iter().map(|x| dequantize_one(code(x), scale, zero, scheme.format)).collect())
}

/// In sixteen interleaved sums, so that the order does not depend on the machine.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (a16, b16) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a16.remainder().iter().zip(b16.remainder()).map(|(x, y)| x * y).sum();
    for (a, b) in a16.zip(b16) {
        for ((sum, x), y) in sums.iter_mut().zip(a).zip(b) {
            *sum += x * y;
        }
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::super::sites::Source;
    use super::*;
    use quantc_ir::ops::RmsNorm;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// A place behind a norm, its statistics with channels of different size, the first of which is 60 times larger in one row of
    /// `rare`, and a matrix that reads it.
    fn place(seed: u64, k: usize, rare: usize) -> (Site, SiteStats, Vec<Vec<f32>>) {
        let mut graph = Graph::new();
        let x = graph.add_param("x", TensorTy::fixed(Float::F32, &[1, k as u64]));
        let x = graph.append(RmsNorm::default(), &[x], None).unwrap();
        let (op, _) = graph.def(x).unwrap();
        let source = Source::Norm(op);
        let site = Site { x, readers: vec![], class: (0..k).collect(), classes: k, source };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let sizes: Vec<f32> = (0..k).map(|_| 2f32.powf(rng.random_range(-2.0..2.0))).collect();
        let mut rows: Vec<f32> = (0..64).flat_map(|_| sizes.clone()).collect();
        rows.iter_mut().for_each(|x| *x *= rng.random_range(-1.0..1.0f32));
        rows.chunks_exact_mut(k).step_by(rare).for_each(|row| row[0] = 60.0 * sizes[0]);
        let mut stats = SiteStats::default();
        (stats.rows, stats.absmax) = (rows, vec![0.0; k]);
        for row in stats.rows.chunks_exact(k) {
            stats.absmax.iter_mut().zip(row).for_each(|(most, x)| *most = most.max(x.abs()));
        }
        let w = (0..24 * k).map(|_| rng.random_range(-1.0..1.0)).collect();
        (site, stats, vec![w])
    }

    fn search(scale: ScaleTime) -> SmoothQuant {
        SmoothQuant { alpha: Alpha::Search, scale, ..SmoothQuant::default() }
    }

    #[test]
    fn no_strength_has_less_error_than_the_one_found() {
        for scale in [ScaleTime::Dynamic, ScaleTime::Static] {
            for seed in 0..10 {
                let (site, stats, readers) = place(seed, 13 + seed as usize, 16);
                let pass = search(scale);
                let (alpha, found, gain) = pass.choose(&site, &stats, &readers).unwrap();
                let none = pass.error(&site, &vec![1.0; site.classes], &stats, &readers).unwrap();
                let least = pass.error(&site, &found, &stats, &readers).unwrap();
                assert_eq!(gain, Some(least / none));
                assert!(least < none);
                for other in ALPHAS {
                    let fixed = SmoothQuant { alpha: Alpha::Fixed(other), ..search(scale) };
                    let (_, factors, _) = fixed.choose(&site, &stats, &readers).unwrap();
                    let error = pass.error(&site, &factors, &stats, &readers).unwrap();
                    assert!(least <= error, "{scale:?}, seed {seed}: {alpha} {least}, {other} {error}");
                }
            }
        }
    }

    /// A scale of their own keeps most rows from a number that few have; one for all of them does not.
    #[test]
    fn static_scales_ask_for_more() {
        let mut gains = [0.0; 2];
        for seed in 0..10 {
            let (site, stats, readers) = place(seed, 32, 16);
            for (sum, scale) in gains.iter_mut().zip([ScaleTime::Dynamic, ScaleTime::Static]) {
                *sum += search(scale).choose(&site, &stats, &readers).unwrap().2.unwrap() / 10.0;
            }
        }
        assert!(gains[1] < 0.7 * gains[0], "{gains:?}");
    }
}
