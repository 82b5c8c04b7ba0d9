//! x86-64 processors with AVX-512 and its integer dot products: Cascade Lake, Ice Lake, Zen 4 and later.

use quantc_ir::target::{CpuDesc, Dot, TargetDesc};

pub(super) static TARGET: TargetDesc = TargetDesc {
    name: "cpu-avx512vnni",
    doc: "x86-64 with AVX-512 and VNNI (Ice Lake server, Zen 4): 512-bit vectors, int8 dot products.",
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
        ],
        vector_bits: 512,
        vector_regs: 32,
        fma: true,
        dots: &[Dot::Vnni, Dot::Maddubs, Dot::Widening],
        l1_kib: 32,
        l2_kib: 1024,
        int8_mac_per_cycle: 64.0,
        f32_mac_per_cycle: 16.0,
        bf16_mac_per_cycle: 0.0,
        stream_bytes_per_cycle: 9.0,
    },
    gpu: None,
};
