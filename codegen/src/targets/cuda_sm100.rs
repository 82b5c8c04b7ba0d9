//! NVIDIA GPUs of compute capability 10.0: B200. Kernels are compiled for it and were never run.

use quantc_ir::target::{GpuDesc, GpuRates, GpuTarget};

pub(super) static TARGET: GpuTarget = GpuTarget {
    name: "cuda-sm100",
    doc: "NVIDIA GPUs of compute capability 10.0 (B200): compiled for, never run.",
    gpu: GpuDesc { arch: "sm_100a", shared_bytes: 232_448, registers: 65_536, bulk_copies: true, fp8_products: false, rates: RATES },
};

const RATES: GpuRates = GpuRates {
    model: "B200",
    multiprocessors: 148,
    memory_gb: 8000.0,
    bf16_tmac: 1125.0,
    int8_tmac: 2250.0,
};
