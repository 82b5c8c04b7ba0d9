//! Targets as facts: what a machine can do, in numbers and names.
//!
//! Passes and kernels ask a [`TargetDesc`]; nothing in quantc compares target names. The entries themselves are
//! declared by the code generator, one file each.

use crate::diag::Result;
use crate::entity::OpId;
use crate::graph::Graph;
use crate::module::Module;
use crate::ops::Op;
use crate::ty::{ElemTy, TensorTy};
use crate::weights::{Digest, Store};

/// One machine class that engines are compiled for.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetDesc {
    /// The name used on the command line, in manifests and in `.qir` files.
    pub name: &'static str,
    /// One sentence.
    pub doc: &'static str,
    /// Facts of the processor; beside a GPU, of the one that feeds it.
    pub cpu: CpuDesc,
    /// Facts of the GPU that runs the kernels, where one does.
    pub gpu: Option<&'static GpuDesc>,
}

/// Facts of a CPU class. Rates are per core.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuDesc {
    /// The processor name given to LLVM.
    pub llvm_cpu: &'static str,
    /// The instruction sets that must be present, in LLVM's spelling (`avx512vnni`).
    pub features: &'static [&'static str],
    /// Width of a vector register in bits.
    pub vector_bits: u32,
    /// Number of vector registers.
    pub vector_regs: u32,
    /// Fused multiply-add on f32 vectors.
    pub fma: bool,
    /// Integer dot products, the best first.
    pub dots: &'static [Dot],
    /// First-level data cache in KiB.
    pub l1_kib: u32,
    /// Second-level cache in KiB.
    pub l2_kib: u32,
    /// Multiply-adds per cycle of the best integer dot.
    pub int8_mac_per_cycle: f32,
    /// Multiply-adds per cycle in f32.
    pub f32_mac_per_cycle: f32,
    /// Multiply-adds per cycle of the dot product of bf16 pairs (`vdpbf16ps`); 0 without one.
    pub bf16_mac_per_cycle: f32,
    /// Bytes per cycle that one core can stream from memory.
    pub stream_bytes_per_cycle: f32,
}

/// A class of GPUs that kernels are compiled for.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuTarget {
    /// The name used on the command line and in manifests.
    pub name: &'static str,
    /// One sentence.
    pub doc: &'static str,
    /// Facts of the GPU.
    pub gpu: GpuDesc,
}

/// Facts of a GPU class, from NVIDIA's tables of compute capabilities.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuDesc {
    /// The architecture given to the compiler.
    pub arch: &'static str,
    /// Bytes of shared memory that a block may have.
    pub shared_bytes: u32,
    /// 32-bit registers of a multiprocessor.
    pub registers: u32,
    /// Copies of many bytes by one instruction, with barriers in shared memory that count them.
    pub bulk_copies: bool,
    /// Matrix products of fp8 by single warps, in hardware.
    pub fp8_products: bool,
    /// What the usual member of the class reaches.
    pub rates: GpuRates,
}

/// Rates of a GPU, from its data sheet: what predictions are made from. Only their ratios matter for choices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GpuRates {
    /// The GPU they belong to.
    pub model: &'static str,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes that memory gives in a second, in GB.
    pub memory_gb: f64,
    /// Multiply-adds of bf16 in a second, in units of 10^12.
    pub bf16_tmac: f64,
    /// Multiply-adds of signed bytes in a second, in units of 10^12.
    pub int8_tmac: f64,
}

/// An integer dot product of unsigned weights and signed activations that accumulates in i32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dot {
    /// `vpdpbusd`: four u8 x s8 products per lane, no saturation.
    Vnni,
    /// `vpmaddubsw` + `vpmaddwd`: exact as long as two adjacent products fit in i16.
    Maddubs,
    /// Sign-extend to i16, then `pmaddwd`: always exact, half the rate.
    Widening,
}

/// What passes may ask of the code generator without depending on it.
///
/// The tool injects it; without one, a pipeline is checked and costed against the target's facts alone.
pub trait Backend: Sync {
    /// The target compiled for.
    fn target(&self) -> &TargetDesc;

    /// Whether a product of rows of `x` with a matrix of `w` has a kernel; the error says what is missing and what has one.
    fn supports_matmul(&self, x: ElemTy, w: ElemTy) -> Result<()>;

    /// Estimated nanoseconds of one execution for `tokens` tokens.
    fn cost(&self, op: &Op, args: &[Option<&TensorTy>], out: &TensorTy, tokens: u64) -> f64;

    /// Packs the weight operands of `op` into the layout its kernel wants, through the store, so that the same weight
    /// is packed once. `None` when the op's kernel reads the weight as it is.
    fn pack(&self, job: &PackJob<'_>) -> Result<Option<Packed>>;
}

/// A matmul whose weight is to be packed.
pub struct PackJob<'a> {
    /// The module that declares the weights.
    pub module: &'a Module,
    /// Where weights are read and the packed bytes go.
    pub store: &'a Store,
    /// The function that holds the op.
    pub graph: &'a Graph,
    /// The op.
    pub op: OpId,
}

/// A weight in a target's layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Name of the layout with its parameters.
    pub layout: String,
    /// The bytes.
    pub blob: Digest,
}
