//! NVIDIA GPUs of compute capability 8.9: L4, L40, RTX 40.

use quantc_ir::target::{GpuDesc, GpuRates, GpuTarget};

pub(super) static TARGET: GpuTarget = GpuTarget {
    name: "cuda-sm89",
    doc: "NVIDIA GPUs of compute capability 8.9 (L4, L40, RTX 40): as 8.0 with less shared memory, and fp8 products.",
    gpu: GpuDesc { arch: "sm_89", shared_bytes: 101_376, registers: 65_536, bulk_copies: false, fp8_products: true, rates: RATES },
};

const RATES: GpuRates = GpuRates {
    model: "L40S",
    multiprocessors: 142,
    memory_gb: 864.0,
    bf16_tmac: 181.0,
    int8_tmac: 366.0,
};
