//! Where the time of a step goes: launches of one kind over all layers, waiting, and what is outside of launches.

use crate::output;
use quantc_runtime::engine::read_file;
use quantc_runtime::format::{Launch, Manifest, RefKind};
use quantc_runtime::session::ProfileRow;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What the steps of one phase were about.
#[derive(Clone, Copy, Debug, Default)]
pub struct Steps {
    /// How many steps.
    pub steps: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Their rows of results.
    pub rows: u64,
    /// Pairs of a token and a position that it sees.
    pub pairs: u64,
    /// Positions held by the slots of each step, summed over steps and slots: what attention reads at least once.
    pub held: u64,
    /// Time of the steps as the caller sees it, in nanoseconds.
    pub nanos: u64,
    /// Time to choose tokens, in nanoseconds.
    pub sampling_nanos: u64,
}

impl Steps {
    /// Counts one step: its tokens, rows of results, pairs and positions held.
    pub fn count(&mut self, tokens: u64, rows: u64, pairs: u64, held: u64) {
        self.steps += 1;
        self.tokens += tokens;
        self.rows += rows;
        self.pairs += pairs;
        self.held += held;
    }

    /// Counts the steps of a prompt that begins a sequence, at most `limit` tokens each; the last gives one row.
    pub fn count_prompt(&mut self, tokens: u64, limit: u64) {
        let mut held = 0;
        while held < tokens {
            let step = limit.clamp(1, tokens - held);
            let pairs = step * held + step * (step + 1) / 2;
            held += step;
            self.count(step, u64::from(held == tokens), pairs, held);
        }
    }
}

/// What one phase, prefill or decode, has spent so far.
#[derive(Debug, Default)]
pub struct Phase {
    /// What it ran.
    pub steps: Steps,
    launches: BTreeMap<(String, String), ProfileRow>,
}

impl Phase {
    /// Adds another phase of the same kind.
    pub fn append(&mut self, other: Phase) {
        let (s, o) = (&mut self.steps, other.steps);
        s.steps += o.steps;
        s.tokens += o.tokens;
        s.rows += o.rows;
        s.pairs += o.pairs;
        s.held += o.held;
        s.nanos += o.nanos;
        s.sampling_nanos += o.sampling_nanos;
        self.add(other.launches.into_values().collect());
    }

    /// Adds what a session measured since it was cleared.
    pub fn add(&mut self, rows: Vec<ProfileRow>) {
        for row in rows {
            let key = (row.name.clone(), row.symbol.clone());
            match self.launches.get_mut(&key) {
                None => drop(self.launches.insert(key, row)),
                Some(sum) => {
                    sum.calls += row.calls;
                    sum.nanos += row.nanos;
                    sum.busy_nanos += row.busy_nanos;
                }
            }
        }
    }
}

/// What launches of an engine are about, by name.
pub struct Facts {
    launches: BTreeMap<String, LaunchFacts>,
}

#[derive(Clone, Copy, Default)]
struct LaunchFacts {
    /// Weight bytes that a call reads; 0 where it reads only some rows of a table.
    weight_bytes: u64,
    /// Bytes of states that it reads for each position held.
    state_row_bytes: u64,
    /// Multiply-adds for each token, row of results, and pair.
    macs: [u64; 3],
}

impl Facts {
    /// Reads what the manifest and the report of the engine in `folder` tell. A report that says nothing about work
    /// leaves that out.
    pub fn of(folder: &Path, manifest: &Manifest) -> Facts {
        let report = read_file(folder, manifest, "report.json").ok();
        let report =
            report.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok()).unwrap_or_default();
        let mut kernels = BTreeMap::new();
        for kernel in report["kernels"].as_array().into_iter().flatten() {
            kernels.insert(kernel["symbol"].as_str().unwrap_or_default(), kernel);
        }
        let facts = |launch: &Launch| {
            let mut facts = LaunchFacts::default();
            let kernel = kernels.get(launch.symbol.as_str()).copied().unwrap_or(&Value::Null);
            let template = kernel["template"].as_str().unwrap_or_default();
            for arg in &launch.args {
                match arg.kind {
                    Some(RefKind::Weight(index)) if template != "gather" => {
                        facts.weight_bytes += manifest.weights.get(index as usize).map_or(0, |blob| blob.len);
                    }
                    Some(RefKind::State(index)) if template == "attention" => {
                        let row = manifest.states.get(index as usize).map_or(0, |state| state.row_bytes);
                        facts.state_row_bytes += row;
                    }
                    _ => {}
                }
            }
            let macs = kernel["work"]["macs"].as_u64().unwrap_or(0);
            match kernel["work"]["per"].as_str() {
                Some("t") => facts.macs[0] = macs,
                Some("r") => facts.macs[1] = macs,
                Some("pair") => facts.macs[2] = macs,
                _ => {}
            }
            facts
        };
        let all = manifest.programs.iter().flat_map(|program| &program.launches);
        Facts { launches: all.map(|launch| (launch.name.clone(), facts(launch))).collect() }
    }

    /// What the phase spent, by kind of launch, for each step.
    pub fn summary(&self, phase: &Phase, workers: usize) -> Summary {
        let steps = phase.steps.steps.max(1) as f64;
        let mut kinds: BTreeMap<String, Kind> = BTreeMap::new();
        for ((name, _), row) in &phase.launches {
            let kind = kinds.entry(kind_of(name)).or_default();
            let facts = self.launches.get(name).copied().unwrap_or_default();
            let s = &phase.steps;
            // Calls of one launch are all steps, or those of the sizes that its program serves.
            let part = row.calls as f64 / steps;
            let amounts = [s.tokens, s.rows, s.pairs].map(|n| n as f64);
            let macs: f64 = amounts.iter().zip(facts.macs).map(|(n, macs)| n * macs as f64).sum();
            kind.launches += 1;
            kind.calls += row.calls as f64 / steps;
            kind.nanos += row.nanos as f64 / steps;
            kind.busy += row.busy_nanos as f64 / (steps * workers as f64);
            kind.macs += macs * part / steps;
            kind.bytes += (facts.weight_bytes * row.calls) as f64 / steps
                + facts.state_row_bytes as f64 * s.held as f64 * part / steps;
        }
        let step = phase.steps.nanos as f64 / steps;
        let launched: f64 = kinds.values().map(|k| k.nanos).sum();
        let busy: f64 = kinds.values().map(|k| k.busy).sum();
        let mut kinds: Vec<(String, Kind)> = kinds.into_iter().collect();
        kinds.sort_by(|a, b| b.1.nanos.total_cmp(&a.1.nanos).then_with(|| a.0.cmp(&b.0)));
        Summary {
            steps: phase.steps.steps,
            step,
            sampling: phase.steps.sampling_nanos as f64 / steps,
            waiting: (launched - busy).max(0.0),
            outside: (step - launched).max(0.0),
            kinds,
        }
    }
}

/// Where the time of a step goes; times in nanoseconds for each step.
pub struct Summary {
    steps: u64,
    step: f64,
    sampling: f64,
    waiting: f64,
    outside: f64,
    kinds: Vec<(String, Kind)>,
}

/// Launches of one kind, for each step.
#[derive(Default)]
struct Kind {
    launches: u64,
    calls: f64,
    nanos: f64,
    busy: f64,
    macs: f64,
    bytes: f64,
}

impl Summary {
    /// All of it.
    pub fn json(&self) -> Value {
        let ms = |nanos: f64| nanos / 1e6;
        let rows = self.kinds.iter().map(|(name, k)| {
            let rate = |amount: f64| (amount > 0.0).then(|| amount / k.nanos.max(1.0));
            json!({
                "kind": name,
                "launches": k.launches,
                "calls_per_step": k.calls,
                "ms_per_step": ms(k.nanos),
                "share": k.nanos / self.whole(),
                "busy": k.busy / k.nanos.max(1.0),
                "macs_per_step": k.macs,
                "bytes_per_step": k.bytes,
                "gmac_s": rate(k.macs),
                "gb_s": rate(k.bytes),
            })
        });
        json!({
            "steps": self.steps,
            "step_ms": ms(self.step),
            "waiting_ms": ms(self.waiting),
            "outside_ms": ms(self.outside),
            "sampling_ms": ms(self.sampling),
            "kinds": rows.collect::<Vec<_>>(),
        })
    }

    /// As a table.
    pub fn text(&self, phase: &str) -> String {
        let ms = |nanos: f64| format!("{:.3}", nanos / 1e6);
        let share = |nanos: f64| format!("{:.1}", 100.0 * nanos / self.whole());
        let mut rows: Vec<Vec<String>> = vec![];
        for (name, k) in &self.kinds {
            let name = if k.launches > 1 { format!("{name} x{}", k.launches) } else { name.clone() };
            let rate = |amount: f64| match amount > 0.0 {
                true => format!("{:.1}", amount / k.nanos.max(1.0)),
                false => String::new(),
            };
            rows.push(vec![
                name,
                format!("{:.1}", k.calls),
                ms(k.nanos),
                share(k.nanos),
                format!("{:.0}", 100.0 * k.busy / k.nanos.max(1.0)),
                rate(k.macs),
                rate(k.bytes),
            ]);
        }
        let mut line = |what: &str, nanos: f64| {
            rows.push(vec![what.into(), String::new(), ms(nanos), share(nanos)]);
        };
        line("between launches", self.outside);
        line("choosing tokens", self.sampling);
        line("(waiting at barriers, in the above)", self.waiting);
        let head = ["launch", "calls", "ms", "%", "busy %", "GMAC/s", "GB/s"];
        format!("\n{phase}: {} ms a step, {} steps\n", ms(self.whole()), self.steps)
            + &output::table(&head, &rows)
    }

    /// A step with choosing its tokens.
    fn whole(&self) -> f64 {
        (self.step + self.sampling).max(1.0)
    }
}

/// The name of a launch without the number of its layer: `l3.l3_gated` is a `gated`.
fn kind_of(name: &str) -> String {
    let Some((layer, value)) = name.split_once('.') else { return name.into() };
    if !layer.ends_with(|c: char| c.is_ascii_digit()) {
        return name.into();
    }
    match value.strip_prefix(layer).and_then(|rest| rest.strip_prefix('_')) {
        Some(rest) => rest.into(),
        None => value.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_one_kind() {
        assert_eq!(kind_of("l3.l3_gated"), "gated");
        assert_eq!(kind_of("l13.l13_attn_rows.q"), "attn_rows.q");
        assert_eq!(kind_of("l13.l1_x"), "l1_x");
        assert_eq!(kind_of("head.logits"), "head.logits");
        assert_eq!(kind_of("plain"), "plain");
    }

    #[test]
    fn a_step_is_split_without_rest() {
        let row = |name: &str, nanos, busy_nanos| ProfileRow {
            name: name.into(),
            symbol: "s".into(),
            calls: 4,
            nanos,
            busy_nanos,
        };
        let mut phase = Phase::default();
        phase.add(vec![row("l0.l0_up", 400, 700), row("l1.l1_up", 600, 1000), row("head.logits", 800, 1600)]);
        phase.steps =
            Steps { steps: 4, tokens: 4, rows: 4, pairs: 10, held: 10, nanos: 2000, sampling_nanos: 200 };
        let mut facts = Facts { launches: BTreeMap::new() };
        facts.launches.insert(
            "l0.l0_up".into(),
            LaunchFacts { weight_bytes: 50, macs: [100, 0, 0], ..Default::default() },
        );
        let summary = facts.summary(&phase, 2);
        let v = summary.json();
        let kinds = v["kinds"].as_array().expect("a list");
        assert_eq!(
            kinds.iter().map(|k| k["kind"].as_str().expect("a name")).collect::<Vec<_>>(),
            ["up", "head.logits"]
        );
        let up = &kinds[0];
        assert_eq!((up["launches"].as_u64(), up["calls_per_step"].as_f64()), (Some(2), Some(2.0)));
        assert_eq!((up["macs_per_step"].as_f64(), up["bytes_per_step"].as_f64()), (Some(100.0), Some(50.0)));
        let close = |v: &Value, x: f64| assert!((v.as_f64().expect("a number") - x).abs() < 1e-12, "{v} {x}");
        close(&up["ms_per_step"], 250e-6);
        close(&up["busy"], 0.85);
        close(&v["waiting_ms"], (450.0 - 412.5) * 1e-6);
        close(&v["outside_ms"], 50e-6);
        close(&v["sampling_ms"], 50e-6);
        let text = summary.text("decode");
        assert!(text.contains("up x2") && text.contains("choosing tokens"), "{text}");
    }
}
