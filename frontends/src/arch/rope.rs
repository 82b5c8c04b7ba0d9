//! Rotary positions in configurations, in the spellings of all years.

use crate::config::Config;
use crate::json::shown;
use quantc_ir::ops::{Real, RopeScaling, RopeTable};

/// The base of the frequencies when none is given.
const THETA: f64 = 10000.0;

/// The table of angles for heads of `size` elements.
///
/// The dictionary is `rope_scaling` when that has entries, else `rope_parameters`; a `rope_theta` in it goes before the
/// one beside it. `context` is the context the model was made for.
pub(super) fn read(config: &mut Config, size: u64, context: u64) -> RopeTable {
    let mut theta = config.opt_positive("rope_theta");
    whole_heads(config);
    let dict = config.object("rope_scaling").or_else(|| config.object("rope_parameters"));
    let mut scaling = RopeScaling::None;
    if let Some(mut dict) = dict {
        theta = dict.opt_positive("rope_theta").or(theta);
        whole_heads(&mut dict);
        scaling = read_scaling(&mut dict, context);
        config.absorb(dict);
    }
    RopeTable { size: u32::try_from(size).unwrap_or(u32::MAX), theta: Real(theta.unwrap_or(THETA)), scaling }
}

fn read_scaling(dict: &mut Config, context: u64) -> RopeScaling {
    let kinds: Vec<String> =
        dict.keys().filter(|k| dict.get(k).is_some_and(|v| v.is_object())).map(String::from).collect();
    if let Some(kind) = kinds.first() {
        dict.note(&shown(kind), "gives some layers positions of their own, which is not supported");
        return RopeScaling::None;
    }
    let key = if dict.has("rope_type") { "rope_type" } else { "type" };
    let name = dict.text(key).unwrap_or_else(|| "default".into());
    match name.as_str() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: Real(dict.positive("factor")) },
        "llama3" => {
            let factor = Real(dict.positive("factor"));
            let low = Real(dict.positive("low_freq_factor"));
            let high = Real(dict.positive("high_freq_factor"));
            let original = dict.int_or("original_max_position_embeddings", 1..=1 << 26, context);
            if high <= low && dict.problems.is_empty() {
                dict.note(
                    "high_freq_factor",
                    format!("is {}, not above `low_freq_factor`, {}", high.0, low.0),
                );
            }
            RopeScaling::Llama3 { factor, low, high, original: u32::try_from(original).unwrap_or(u32::MAX) }
        }
        other => {
            let other = shown(other);
            dict.note(
                key,
                format!("is `{other}`, which is not supported; supported are default, linear, llama3"),
            );
            RopeScaling::None
        }
    }
}

/// Refuses models that rotate a part of each head.
fn whole_heads(config: &mut Config) {
    if let Some(part) = config.opt_positive("partial_rotary_factor").filter(|&p| p != 1.0) {
        config.note("partial_rotary_factor", format!("is {part}: heads rotated in part are not supported"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Result<(f64, RopeScaling), String> {
        let mut c = Config::parse("config.json", text.as_bytes()).unwrap();
        let t = read(&mut c, 8, 64);
        c.finish().map(|()| (t.theta.0, t.scaling)).map_err(|d| d.to_string())
    }

    #[test]
    fn old_and_new_spellings_mean_the_same() {
        let llama3 =
            |original| RopeScaling::Llama3 { factor: Real(8.0), low: Real(1.0), high: Real(4.0), original };
        let body = r#""factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4"#;
        let new = format!(r#"{{"rope_parameters": {{"rope_type": "llama3", "rope_theta": 5e5, {body}}}}}"#);
        let old = format!(
            r#"{{"rope_theta": 5e5, "rope_scaling": {{"type": "llama3", {body}, "original_max_position_embeddings": 32}}}}"#
        );
        assert_eq!(table(&new), Ok((5e5, llama3(64))));
        assert_eq!(table(&old), Ok((5e5, llama3(32))));
        assert_eq!(table("{}"), Ok((1e4, RopeScaling::None)));
        assert_eq!(table(r#"{"rope_scaling": null, "rope_theta": 7}"#), Ok((7.0, RopeScaling::None)));
    }

    #[test]
    fn the_dictionary_that_is_read_is_the_one_transformers_reads() {
        let both = r#"{"rope_theta": 7, "rope_parameters": {"rope_type": "default", "rope_theta": 9},
                       "rope_scaling": {"rope_type": "linear", "factor": 2}}"#;
        assert_eq!(table(both), Ok((7.0, RopeScaling::Linear { factor: Real(2.0) })));
        let inner = r#"{"rope_theta": 7, "rope_scaling": {}, "rope_parameters": {"rope_theta": 9}}"#;
        assert_eq!(table(inner), Ok((9.0, RopeScaling::None)));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let yarn = table(r#"{"rope_scaling": {"type": "yarn", "factor": 4}}"#).unwrap_err();
        assert!(yarn.contains("`rope_scaling.type` is `yarn`"), "{yarn}");
        let lacking = table(r#"{"rope_scaling": {"rope_type": "llama3", "factor": 0}}"#).unwrap_err();
        assert!(
            lacking.contains("`rope_scaling.factor` is 0") && lacking.contains("low_freq_factor` is missing")
        );
        let flat = r#"{"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}"#;
        assert!(table(flat).unwrap_err().contains("not above"));
        assert!(table(r#"{"partial_rotary_factor": 0.5}"#).unwrap_err().contains("in part"));
        let nested = r#"{"rope_parameters": {"full_attention": {"rope_theta": 1}}}"#;
        assert!(table(nested).unwrap_err().contains("positions of their own"));
    }
}
