//! x86-64 processors with AVX-512 and its dot products of integers and of bf16: Zen 4, Sapphire Rapids and later.

use quantc_ir::target::{CpuDesc, Dot, TargetDesc};

pub(super) static TARGET: TargetDesc = TargetDesc {
    name: "cpu-avx512bf16",
    doc: "x86-64 with AVX-512, VNNI, VBMI and BF16 (Zen 4, Sapphire Rapids): dot products of int8 and of bf16.",
    cpu: CpuDesc {
        // The level, not a model: its features are exactly the ones listed, so the loader can check them all.
        llvm_cpu: "x86-64-v4",
        features: &[
            "sse2",
            "avx",
            "avx2",
            "fma",
            "f16c",
            "bmi",
            "bmi2",
            "lzcnt",
            "popcnt",
            "movbe",
            "avx512f",
            "avx512bw",
            "avx512cd",
            "avx512dq",
            "avx512vl",
            "avx512vnni",
            "avx512vbmi",
            "avx512bf16",
        ],
        vector_bits: 512,
        vector_regs: 32,
        fma: true,
        dots: &[Dot::Vnni, Dot::Maddubs, Dot::Widening],
        l1_kib: 32,
        l2_kib: 1024,
        int8_mac_per_cycle: 64.0,
        f32_mac_per_cycle: 16.0,
        bf16_mac_per_cycle: 32.0,
        stream_bytes_per_cycle: 9.0,
    },
    gpu: None,
};
