//! The CUDA code generator as passes see it.

use super::layout::FragmentLayout;
use crate::backend::{MatmulWeight, Order, weight_format};
use crate::spec::AFmt;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::formats;
use quantc_ir::ops::{Dequantize, Op, OpSpec};
use quantc_ir::scheme::{self, Group};
use quantc_ir::target::{Backend, GpuDesc, PackJob, Packed, TargetDesc};
use quantc_ir::ty::{ElemTy, TensorTy};

/// The code generator for one class of GPUs.
#[derive(Clone, Copy, Debug)]
pub struct CudaBackend {
    target: &'static TargetDesc,
    gpu: &'static GpuDesc,
}

impl CudaBackend {
    /// The code generator for `target`, which has the GPU `gpu`.
    pub fn new(target: &'static TargetDesc, gpu: &'static GpuDesc) -> CudaBackend {
        CudaBackend { target, gpu }
    }
}

/// A row as long as any that is asked about: longer than every scale group.
const LONG_ROW: u32 = 1 << 14;

impl Backend for CudaBackend {
    fn target(&self) -> &TargetDesc {
        self.target
    }

    fn supports_matmul(&self, x: ElemTy, w: ElemTy) -> Result<()> {
        let a = match x {
            ElemTy::F32 => AFmt::F32,
            ElemTy::Bf16 => AFmt::Bf16,
            ElemTy::Q(s)
                if *s.format == formats::INT8
                    && matches!(s.group, Group::Token | Group::Tensor)
                    && s.zero == scheme::Zero::Symmetric =>
            {
                AFmt::I8Token
            }
            _ => {
                return Err(Diag::target(format!(
                    "activations of type {x} have no matmul kernel on {}",
                    self.target.name
                ))
                .help("kernels take bf16, or symmetric int8 with one scale per token or for all"));
            }
        };
        let fmt = weight_format(w, LONG_ROW)?;
        if a == AFmt::I8Token && !fmt.code.is_int() {
            return Err(Diag::target(format!(
                "int8 activations meet weights of type {w}, which are not integers"
            ))
            .help("leave the activations in bf16 for this weight format"));
        }
        FragmentLayout::new(16, LONG_ROW, fmt, a).map(|_| ())
    }

    fn cost(&self, op: &Op, args: &[Option<&TensorTy>], out: &TensorTy, tokens: u64) -> f64 {
        let rates = &self.gpu.rates;
        let bind = |_| tokens;
        let work = op.cost(args, out, &bind);
        let weights: f64 = args.iter().flatten().map(|ty| ty.stored_bytes().unwrap_or(0) as f64).sum();
        let tmac = match args.first().copied().flatten().map(|x| x.elem) {
            Some(ElemTy::Q(_)) => rates.int8_tmac,
            _ => rates.bf16_tmac,
        };
        let per_ns = rates.memory_gb;
        let traffic = weights / per_ns;
        let compute = work.macs as f64 / (tmac * 1e3);
        let elementwise = 8.0 * work.elements as f64 / per_ns;
        // Writing a dequantized weight and reading it back is what fusion is there to avoid.
        let expanded = if op.is::<Dequantize>().is_some() { elementwise } else { 0.0 };
        traffic.max(compute) + elementwise + expanded
    }

    fn pack(&self, job: &PackJob<'_>) -> Result<Option<Packed>> {
        let node = job.graph.node(job.op);
        let Some(weight) = MatmulWeight::of(job.module, job.graph, node)? else { return Ok(None) };
        weight.pack(Order::Fragments, job.module, job.store).map(Some)
    }
}
