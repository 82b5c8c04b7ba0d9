//! NVIDIA GPUs of compute capability 10.0: B200. Kernels are compiled for it and were never run.

use quantc_ir::target::{GpuDesc, GpuTarget};

pub(super) static TARGET: GpuTarget = GpuTarget {
    name: "cuda-sm100",
    doc: "NVIDIA GPUs of compute capability 10.0 (B200): compiled for, never run.",
    gpu: GpuDesc { arch: "sm_100a", shared_bytes: 232_448, registers: 65_536, bulk_copies: true, fp8_products: false },
};
