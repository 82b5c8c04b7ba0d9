//! NVIDIA GPUs of compute capability 12.0: RTX 50. Kernels are compiled for it and were never run.

use quantc_ir::target::{GpuDesc, GpuRates, GpuTarget};

pub(super) static TARGET: GpuTarget = GpuTarget {
    name: "cuda-sm120",
    doc: "NVIDIA GPUs of compute capability 12.0 (RTX 50): compiled for, never run.",
    gpu: GpuDesc { arch: "sm_120a", shared_bytes: 101_376, registers: 65_536, bulk_copies: true, fp8_products: true, rates: RATES },
};

const RATES: GpuRates = GpuRates {
    model: "RTX 5090",
    multiprocessors: 170,
    memory_gb: 1792.0,
    bf16_tmac: 105.0,
    int8_tmac: 419.0,
};
