//! The machine classes that engines are compiled for, one file each.

use quantc_ir::diag::{Diag, Result, near_misses};
use quantc_ir::target::{CpuDesc, GpuTarget, TargetDesc};
use quantc_runtime::format::has_feature;
use std::sync::LazyLock;

/// Declares the targets in order of preference, the least demanding first.
macro_rules! targets {
    ($($file:ident),* $(,)?) => {
        $(mod $file;)*

        /// All targets whose kernels run on a processor, the least demanding first.
        pub static TARGETS: &[&TargetDesc] = &[$(&$file::TARGET),*];
    };
}

/// Declares the GPU classes, the least capable first.
macro_rules! gpus {
    ($($file:ident),* $(,)?) => {
        $(mod $file;)*

        /// The GPU classes that CUDA kernels are built for, the least capable first.
        pub static GPUS: &[&GpuTarget] = &[$(&$file::TARGET),*];
    };
}

gpus![cuda_sm80, cuda_sm89, cuda_sm90, cuda_sm100, cuda_sm120];

targets![cpu_generic, cpu_avx2, cpu_avxvnni, cpu_avx512vnni, cpu_avx512bf16];

/// All targets whose kernels run on a GPU, in the order of [`GPUS`]. Any processor feeds one.
pub static GPU_TARGETS: LazyLock<Vec<TargetDesc>> = LazyLock::new(|| {
    let of = |g: &&'static GpuTarget| TargetDesc {
        name: g.name,
        doc: g.doc,
        cpu: cpu_generic::TARGET.cpu.clone(),
        gpu: Some(&g.gpu),
    };
    GPUS.iter().map(of).collect()
});

/// `cpu-avxvnni` in the encoding of AVX-512, which more machines have: tests of kernels run it where the target
/// itself does not run, so that vectors of 256 bits meet products of four bytes.
#[doc(hidden)]
pub static NARROW_VNNI: LazyLock<TargetDesc> = LazyLock::new(|| {
    let (narrow, wide) = (&cpu_avxvnni::TARGET, &cpu_avx512vnni::TARGET);
    TargetDesc {
        name: "256 bits of avx512vnni",
        doc: narrow.doc,
        cpu: CpuDesc { llvm_cpu: wide.cpu.llvm_cpu, features: wide.cpu.features, ..narrow.cpu.clone() },
        gpu: None,
    }
});

/// The targets that this machine runs, with [`NARROW_VNNI`] in the place of the one that it stands in for.
#[doc(hidden)]
pub fn with_stand_in() -> impl Iterator<Item = &'static TargetDesc> {
    let stand_in = (!runs_here(&cpu_avxvnni::TARGET)).then_some(&*NARROW_VNNI);
    TARGETS.iter().copied().chain(stand_in).filter(|t| runs_here(t))
}

/// Every target.
pub fn all() -> impl Iterator<Item = &'static TargetDesc> {
    TARGETS.iter().copied().chain(GPU_TARGETS.iter())
}

/// The target called `name`; `host` is the best one that this machine runs.
pub fn lookup(name: &str) -> Result<&'static TargetDesc> {
    if name == "host" {
        return Ok(host());
    }
    if let Some(found) = all().find(|t| t.name == name) {
        return Ok(found);
    }
    let names = || all().map(|t| t.name).chain(["host"]);
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

/// Whether this machine's processors have every feature of `target`. What runs on a GPU does not count as running here.
pub fn runs_here(target: &TargetDesc) -> bool {
    target.gpu.is_none() && target.cpu.features.iter().all(|f| has_feature(f) == Some(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_and_near_misses_named() {
        for target in all() {
            assert!(std::ptr::eq(lookup(target.name).unwrap(), target));
        }
        assert!(std::ptr::eq(lookup("host").unwrap(), host()));
        let diag = lookup("cpu-avx").unwrap_err();
        assert!(diag.help.unwrap().contains("cpu-avx2"));
        assert!(lookup("zzz").unwrap_err().help.unwrap().contains("cpu-generic"));
    }

    #[test]
    fn no_target_demands_less_than_one_before() {
        for (i, later) in TARGETS.iter().enumerate() {
            for before in &TARGETS[..i] {
                let demanded = |f: &&str| before.cpu.features.contains(f);
                assert!(!later.cpu.features.iter().all(demanded), "{} and {}", before.name, later.name);
                assert!(before.cpu.vector_bits <= later.cpu.vector_bits);
            }
        }
    }

    #[test]
    fn every_feature_can_be_asked_for() {
        for feature in TARGETS.iter().flat_map(|t| t.cpu.features) {
            assert!(has_feature(feature).is_some(), "{feature}");
        }
    }
}
