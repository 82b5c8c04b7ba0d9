//! NVIDIA GPUs of compute capability 9.0: H100, H200, GH200.

use quantc_ir::target::{GpuDesc, GpuRates, GpuTarget};

pub(super) static TARGET: GpuTarget = GpuTarget {
    name: "cuda-sm90",
    doc: "NVIDIA GPUs of compute capability 9.0 (H100, H200): bulk copies, products of warp groups.",
    // Products of fp8 by single warps are emulated by this architecture.
    gpu: GpuDesc { arch: "sm_90a", shared_bytes: 232_448, registers: 65_536, bulk_copies: true, fp8_products: false, rates: RATES },
};

const RATES: GpuRates = GpuRates {
    model: "H100 (SXM)",
    multiprocessors: 132,
    memory_gb: 3350.0,
    bf16_tmac: 494.0,
    int8_tmac: 989.0,
};
