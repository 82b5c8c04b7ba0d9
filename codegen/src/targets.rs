//! The machine classes that engines are compiled for, one file each.

use quantc_ir::diag::{Diag, Result, near_misses};
use quantc_ir::target::TargetDesc;

/// Declares the targets in order of preference, the least demanding first.
macro_rules! targets {
    ($($file:ident),* $(,)?) => {
        $(mod $file;)*

        /// All targets, the least demanding first.
        pub static TARGETS: &[&TargetDesc] = &[$(&$file::TARGET),*];
    };
}

targets![cpu_generic, cpu_avx2, cpu_avx512vnni];

/// The target called `name`; `host` is the best one that this machine runs.
pub fn lookup(name: &str) -> Result<&'static TargetDesc> {
    if name == "host" {
        return Ok(host());
    }
    if let Some(found) = TARGETS.iter().find(|t| t.name == name) {
        return Ok(found);
    }
    let names = || TARGETS.iter().map(|t| t.name).chain(["host"]);
    let near = near_misses(name, names());
    let help = match near.as_slice() {
        [] => format!("targets are: {}", names().collect::<Vec<_>>().join(", ")),
        near => format!("did you mean {}?", near.join(" or ")),
    };
    Err(Diag::target(format!("there is no target `{name}`")).help(help))
}

/// The best target that this machine runs.
pub fn host() -> &'static TargetDesc {
    let best = TARGETS.iter().rev().find(|t| runs_here(t));
    best.expect("every x86-64 machine runs the generic target, which demands nothing beyond it")
}

/// Whether this machine has every feature of `target`.
pub fn runs_here(target: &TargetDesc) -> bool {
    target.cpu.features.iter().all(|f| has_feature(f) == Some(true))
}

/// Whether this machine has a feature, in LLVM's spelling; nothing for one that cannot be asked for.
#[cfg(target_arch = "x86_64")]
fn has_feature(feature: &str) -> Option<bool> {
    Some(match feature {
        "sse2" => is_x86_feature_detected!("sse2"),
        "avx" => is_x86_feature_detected!("avx"),
        "avx2" => is_x86_feature_detected!("avx2"),
        "fma" => is_x86_feature_detected!("fma"),
        "f16c" => is_x86_feature_detected!("f16c"),
        "bmi" => is_x86_feature_detected!("bmi1"),
        "bmi2" => is_x86_feature_detected!("bmi2"),
        "lzcnt" => is_x86_feature_detected!("lzcnt"),
        "popcnt" => is_x86_feature_detected!("popcnt"),
        "movbe" => is_x86_feature_detected!("movbe"),
        "avx512f" => is_x86_feature_detected!("avx512f"),
        "avx512bw" => is_x86_feature_detected!("avx512bw"),
        "avx512cd" => is_x86_feature_detected!("avx512cd"),
        "avx512dq" => is_x86_feature_detected!("avx512dq"),
        "avx512vl" => is_x86_feature_detected!("avx512vl"),
        "avx512vnni" => is_x86_feature_detected!("avx512vnni"),
        _ => return None,
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn has_feature(_: &str) -> Option<bool> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_and_near_misses_named() {
        for target in TARGETS {
            assert!(std::ptr::eq(lookup(target.name).unwrap(), *target));
        }
        assert!(std::ptr::eq(lookup("host").unwrap(), host()));
        let diag = lookup("cpu-avx").unwrap_err();
        assert!(diag.help.unwrap().contains("cpu-avx2"));
        assert!(lookup("zzz").unwrap_err().help.unwrap().contains("cpu-generic"));
    }

    #[test]
    fn each_target_demands_more_than_the_one_before() {
        for pair in TARGETS.windows(2) {
            assert!(pair[0].cpu.features.iter().all(|f| pair[1].cpu.features.contains(f)));
            assert!(pair[0].cpu.vector_bits < pair[1].cpu.vector_bits);
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn every_feature_can_be_asked_for() {
        for feature in TARGETS.iter().flat_map(|t| t.cpu.features) {
            assert!(has_feature(feature).is_some(), "{feature}");
        }
    }
}
