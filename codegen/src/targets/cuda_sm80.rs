//! NVIDIA GPUs of compute capability 8.0: A100, A30.

use quantc_ir::target::{GpuDesc, GpuRates, GpuTarget};

pub(super) static TARGET: GpuTarget = GpuTarget {
    name: "cuda-sm80",
    doc: "NVIDIA GPUs of compute capability 8.0 (A100): int8 and bf16 matrix products, asynchronous copies.",
    gpu: GpuDesc { arch: "sm_80", shared_bytes: 166_912, registers: 65_536, bulk_copies: false, fp8_products: false, rates: RATES },
};

const RATES: GpuRates = GpuRates {
    model: "A100 (40 GB)",
    multiprocessors: 108,
    memory_gb: 1555.0,
    bf16_tmac: 156.0,
    int8_tmac: 312.0,
};
