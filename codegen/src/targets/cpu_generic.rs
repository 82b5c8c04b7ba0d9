//! Any x86-64 processor.

use quantc_ir::target::{CpuDesc, Dot, TargetDesc};

pub(super) static TARGET: TargetDesc = TargetDesc {
    name: "cpu-generic",
    doc: "Any x86-64 processor: SSE2, 128-bit vectors, no fused multiply-add.",
    cpu: CpuDesc {
        llvm_cpu: "x86-64",
        features: &["sse2"],
        vector_bits: 128,
        vector_regs: 16,
        fma: false,
        dots: &[Dot::Widening],
        l1_kib: 32,
        l2_kib: 256,
        int8_mac_per_cycle: 16.0,
        f32_mac_per_cycle: 4.0,
        bf16_mac_per_cycle: 0.0,
        stream_bytes_per_cycle: 6.0,
    },
    gpu: None,
};
