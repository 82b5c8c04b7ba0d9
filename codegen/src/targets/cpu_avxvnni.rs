//! x86-64 processors with AVX2 and the 256-bit form of the integer dot products: Alder Lake, Zen 5 and later.

use quantc_ir::target::{CpuDesc, Dot, TargetDesc};

pub(super) static TARGET: TargetDesc = TargetDesc {
    name: "cpu-avxvnni",
    doc: "x86-64 with AVX2 and AVX-VNNI (Alder Lake, Zen 5): 256-bit vectors, int8 dot products.",
    cpu: CpuDesc {
        // The level, not a model: its features are exactly the ones listed, so the loader can check them all.
        llvm_cpu: "x86-64-v3",
        features: &[
            "sse2", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "popcnt", "movbe", "avxvnni",
        ],
        vector_bits: 256,
        vector_regs: 16,
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
