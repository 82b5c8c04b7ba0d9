//! NVIDIA GPUs of compute capability 12.0: RTX 50. Kernels are compiled for it and were never run.

use quantc_ir::target::{GpuDesc, GpuTarget};

pub(super) static TARGET: GpuTarget = GpuTarget {
    name: "cuda-sm120",
    doc: "NVIDIA GPUs of compute capability 12.0 (RTX 50): compiled for, never run.",
    gpu: GpuDesc { arch: "sm_120a", shared_bytes: 101_376, registers: 65_536, bulk_copies: true, fp8_products: true },
};
