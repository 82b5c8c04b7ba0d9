//! What an engine's report says of how it was made, as JSON and in a few lines. `docs/report.md` describes the fields.
//!
//! What goes into `report.json` is the same every time: it has no times, no sizes of memory and nothing of the machine that
//! compiled. Those stand in what `quantc compile --json` prints.

use crate::cache_cost::CacheCost;
use crate::output;
use quantc_ir::module::Module;
use quantc_passes::manager::{Memory, Report};
use quantc_passes::told::{Rounded, Site, StaticScale, Taken, Told};
use serde_json::{Map, Value, json};

/// The form of the report; counts up when a field changes its meaning or goes away.
const VERSION: u32 = 1;

/// What passes told, sorted.
pub struct EngineReport {
    remarks: Vec<Value>,
    calibration: Vec<Calibration>,
    quantized: Vec<(&'static str, Rounded)>,
    sites: Vec<(&'static str, String, Site)>,
    scales: Vec<(String, StaticScale)>,
    checks: Vec<Value>,
    passes: Vec<Value>,
    /// What a cache of codes costs, where that was measured.
    pub cache: Option<CacheCost>,
}

/// Data that layers were looked at on, each once.
struct Calibration {
    taken: Taken,
    layers: usize,
}

impl EngineReport {
    /// Of what a run of passes left.
    pub fn new(report: &Report, memory: &Memory) -> EngineReport {
        let remark =
            |r: &quantc_passes::pass::Remark| json!({ "pass": r.pass, "place": r.place, "text": r.text });
        let (remarks, passes) = (report.remarks.0.iter().map(remark).collect(), passes(report, memory));
        let mut all = EngineReport {
            remarks,
            calibration: vec![],
            quantized: vec![],
            sites: vec![],
            scales: vec![],
            checks: vec![],
            passes,
            cache: None,
        };
        for remark in &report.remarks.0 {
            let (pass, place) = (remark.pass, remark.place.clone());
            match &remark.told {
                Some(Told::Weight(rounded)) => all.quantized.push((pass, rounded.clone())),
                Some(Told::Site(site)) => all.sites.push((pass, place, site.clone())),
                Some(Told::Scale(scale)) => all.scales.push((place, scale.clone())),
                Some(Told::Same(same)) => {
                    all.checks.push(json!({ "pass": pass, "layer": place, "difference": same.difference }));
                }
                Some(Told::Data(taken)) => all.took(taken),
                None => {}
            }
        }
        all
    }

    fn took(&mut self, taken: &Taken) {
        let same = |c: &&mut Calibration| {
            (&c.taken.digest, &c.taken.statistics) == (&taken.digest, &taken.statistics)
        };
        match self.calibration.iter_mut().find(same) {
            Some(known) => {
                known.layers += 1;
                known.taken.values += taken.values;
            }
            None => self.calibration.push(Calibration { taken: taken.clone(), layers: 1 }),
        }
    }

    /// The part of the report that does not depend on the machine or the clock, so that engines are reproducible.
    pub fn json(&self, module: &Module) -> Map<String, Value> {
        let weight = |w: &quantc_ir::weights::WeightDecl| json!({ "name": w.name, "type": w.ty.to_string(), "bytes": w.ty.stored_bytes() });
        let sections = [
            ("version", json!(VERSION)),
            ("model", json!(module.name)),
            ("pipeline", json!(module.pipeline)),
            (
                "calibration",
                self.calibration.iter().map(|c| with(&c.taken, &[("layers", json!(c.layers))])).collect(),
            ),
            ("quantized", self.quantized.iter().map(|(pass, w)| with(w, &[("pass", json!(pass))])).collect()),
            (
                "sites",
                self.sites
                    .iter()
                    .map(|(pass, place, site)| with(site, &[("pass", json!(pass)), ("place", json!(place))]))
                    .collect(),
            ),
            ("scales", self.scales.iter().map(|(place, s)| with(s, &[("place", json!(place))])).collect()),
            ("checks", json!(self.checks)),
            ("cache", json!(self.cache)),
            ("remarks", json!(self.remarks)),
            ("weights", module.weights.values().map(weight).collect()),
        ];
        sections.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
    }

    /// Each pass with how often it ran, its seconds, and the most bytes that were seen resident in it.
    pub fn passes(&self) -> &[Value] {
        &self.passes
    }

    /// The report in a few lines.
    pub fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = self
            .calibration
            .iter()
            .map(|Calibration { taken, layers }| {
                let Taken { data, samples, length, digest, .. } = taken;
                let statistics = taken.statistics.join(", ");
                format!("data     {samples} samples of {length} tokens of {data} ({}): {statistics} in {layers} layers", &digest[..16])
            })
            .collect();
        lines.extend(self.rounded().map(|text| format!("rounded  {text}")));
        lines.extend(self.places().map(|text| format!("places   {text}")));
        lines.extend(self.saturation().map(|text| format!("scales   {text}")));
        lines.extend(self.cache.iter().map(|cost| format!("cache    {}", cost.line())));
        lines.extend(self.longest().map(|text| format!("passes   {text}")));
        lines
    }

    /// How many matrices were rounded, to how many bits, and where it hurt most.
    fn rounded(&self) -> Option<String> {
        let all = || self.quantized.iter().map(|(_, w)| w);
        let range = all().fold((f64::MAX, 0f64), |(low, high), w| (low.min(w.bits), high.max(w.bits)));
        let worst = all().min_by(|a, b| a.sqnr_db.total_cmp(&b.sqnr_db))?;
        let mut text = format!("{} matrices to {:.2}", self.quantized.len(), range.0);
        if range.1 > range.0 {
            text += &format!("..{:.2}", range.1);
        }
        text += &format!(" bits, least SQNR {:.1} dB at @{}", worst.sqnr_db, worst.weight);
        let measured = all().filter_map(|w| Some((w.output_error?, w)));
        if let Some((error, w)) = measured.max_by(|a, b| a.0.total_cmp(&b.0)) {
            text += &format!(", largest output error {error:.1e} at @{}", w.weight);
        }
        let fallbacks = all().filter(|w| w.fallback.is_some()).count();
        if fallbacks > 0 {
            text += &format!(", {fallbacks} rounded to nearest for want of a usable statistic");
        }
        Some(text)
    }

    /// How many places each pass changed, and how many it left.
    fn places(&self) -> Option<String> {
        let mut names: Vec<&str> = vec![];
        for (pass, ..) in &self.sites {
            if !names.contains(pass) {
                names.push(pass);
            }
        }
        let told = |name: &&str| {
            let of = || self.sites.iter().filter(|(pass, ..)| pass == name);
            let applied = of().filter(|(.., site)| site.applied).count();
            format!("{name} changed {applied}, left {}", of().count() - applied)
        };
        let told: Vec<String> = names.iter().map(told).collect();
        (!told.is_empty()).then(|| told.join("; "))
    }

    /// How many activations have static scales, and where most saturates.
    fn saturation(&self) -> Option<String> {
        let n = self.scales.len();
        if n == 0 {
            return None;
        }
        let known = self.scales.iter().filter_map(|(place, scale)| Some((scale.saturates?, place)));
        let most = known.max_by(|a, b| a.0.total_cmp(&b.0));
        let most = most.map_or(String::new(), |(share, place)| {
            format!(", at most {:.3} % saturate, at {place}", 100.0 * share)
        });
        Some(format!("{n} of activations{most}"))
    }

    /// The passes that took longest.
    fn longest(&self) -> Option<String> {
        let seconds = |v: &Value| v["seconds"].as_f64().unwrap_or(0.0);
        let mut slow: Vec<&Value> = self.passes.iter().filter(|v| seconds(v) >= 0.05).collect();
        slow.sort_by(|a, b| seconds(b).total_cmp(&seconds(a)));
        let told = |v: &&Value| {
            let memory =
                v["peak_bytes"].as_u64().map_or(String::new(), |b| format!(" ({})", output::bytes(b)));
            format!("{} {:.1} s{memory}", v["name"].as_str().unwrap_or_default(), seconds(v))
        };
        let told: Vec<String> = slow.iter().take(4).map(told).collect();
        (!told.is_empty()).then(|| told.join(", "))
    }
}

/// The fields of a row, and more.
fn with(row: &impl serde::Serialize, more: &[(&str, Value)]) -> Value {
    let mut value = serde_json::to_value(row).unwrap_or_default();
    more.iter().for_each(|(name, x)| value[*name] = x.clone());
    value
}

fn passes(report: &Report, memory: &Memory) -> Vec<Value> {
    let peak = |name: &str| memory.largest().iter().find(|(n, _)| *n == name).map(|&(_, bytes)| bytes);
    let told = |(name, count, seconds): (&str, usize, f64)| json!({ "name": name, "count": count, "seconds": seconds, "peak_bytes": peak(name) });
    report.timing.passes().into_iter().map(told).collect()
}
