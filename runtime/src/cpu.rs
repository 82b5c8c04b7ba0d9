//! Which instruction sets this machine has, in LLVM's spelling.

use crate::error::{Error, ErrorKind, Result};
use crate::format::Target;

/// Writes the table of instruction sets: LLVM's name, then the standard library's.
macro_rules! features {
    ($($llvm:literal $std:tt),* $(,)?) => {
        /// Whether this machine has the instruction set LLVM calls `name`; `None` when the name is unknown.
        pub fn has_feature(name: &str) -> Option<bool> {
            match name {
                $($llvm => Some(std::is_x86_feature_detected!($std)),)*
                // What every 64-bit machine has, or what is no instruction set of its own.
                "64bit" | "cmov" | "cx8" | "mmx" | "x87" => Some(true),
                "crc32" => Some(std::is_x86_feature_detected!("sse4.2")),
                "evex512" => Some(std::is_x86_feature_detected!("avx512f")),
                _ => None,
            }
        }

        /// Every instruction set the runtime can ask for, in LLVM's spelling.
        const KNOWN: &[&str] = &[$($llvm),*];
    };
}

features! {
    "sse" "sse", "sse2" "sse2", "sse3" "sse3", "ssse3" "ssse3", "sse4.1" "sse4.1", "sse4.2" "sse4.2", "sse4a" "sse4a",
    "avx" "avx", "avx2" "avx2", "fma" "fma", "f16c" "f16c",
    "bmi" "bmi1", "bmi2" "bmi2", "lzcnt" "lzcnt", "popcnt" "popcnt", "movbe" "movbe", "adx" "adx",
    "aes" "aes", "pclmul" "pclmulqdq", "sha" "sha", "gfni" "gfni", "vaes" "vaes", "vpclmulqdq" "vpclmulqdq",
    "rdrnd" "rdrand", "rdseed" "rdseed", "fxsr" "fxsr", "cx16" "cmpxchg16b",
    "xsave" "xsave", "xsaveopt" "xsaveopt", "xsavec" "xsavec", "xsaves" "xsaves",
    "avx512f" "avx512f", "avx512bw" "avx512bw", "avx512cd" "avx512cd", "avx512dq" "avx512dq", "avx512vl" "avx512vl",
    "avx512vnni" "avx512vnni", "avx512bf16" "avx512bf16", "avx512fp16" "avx512fp16",
    "avx512vbmi" "avx512vbmi", "avx512vbmi2" "avx512vbmi2", "avx512bitalg" "avx512bitalg",
    "avx512ifma" "avx512ifma", "avx512vpopcntdq" "avx512vpopcntdq", "avx512vp2intersect" "avx512vp2intersect",
    "avxvnni" "avxvnni", "avxifma" "avxifma", "avxneconvert" "avxneconvert",
    "avxvnniint8" "avxvnniint8", "avxvnniint16" "avxvnniint16",
}

/// The instruction sets this machine has, in LLVM's spelling and a fixed order.
pub fn host_features() -> Vec<&'static str> {
    KNOWN.iter().copied().filter(|name| has_feature(name) == Some(true)).collect()
}

/// Checks that this machine has every instruction set of `target`.
pub(crate) fn check(target: &Target) -> Result<()> {
    let names = || target.features.iter().map(|name| name.strip_prefix('+').unwrap_or(name));
    let unknown: Vec<&str> = names().filter(|name| has_feature(name).is_none()).collect();
    let missing: Vec<&str> = names().filter(|name| has_feature(name) == Some(false)).collect();
    let problem = match (missing.is_empty(), unknown.is_empty()) {
        (true, true) => return Ok(()),
        (false, _) => format!("this machine lacks {}", missing.join(", ")),
        (true, false) => format!("this runtime cannot tell whether a machine has {}", unknown.join(", ")),
    };
    let message = format!(
        "the engine was made for target `{}` ({}), but {problem}; it has {}",
        target.name,
        target.features.join(", "),
        host_features().join(", ")
    );
    Err(Error::new(ErrorKind::Target, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_has_sse2() {
        assert!(host_features().contains(&"sse2"));
        let target = |features: &[&str]| Target {
            name: "t".into(),
            arch: "x86_64".into(),
            features: features.iter().map(|&f| f.into()).collect(),
        };
        check(&target(&["sse2", "+sse", "64bit"])).expect("every 64-bit machine has them");
        let error = check(&target(&["sse2", "mystery"])).expect_err("nobody knows it");
        assert_eq!(error.kind(), ErrorKind::Target);
        assert!(
            error.message().contains("target `t` (sse2, mystery), but this runtime cannot tell"),
            "{error}"
        );
        for name in KNOWN {
            let has = host_features().contains(name);
            assert_eq!(check(&target(&[name])).is_ok(), has, "{name}");
        }
    }
}
