//! The code generators as passes see them: which products have kernels, what ops cost, and packing.
//!
//! How a weight of the IR becomes a packed weight is decided by [`weight_format`] and nowhere else: the coverage
//! check, the cost model, the packer and the lowering all ask it.

use crate::cuda::layout::FragmentLayout;
use crate::layout::{Layout, WeightRows};
use crate::spec::{AFmt, Code, ScaleTy, WFmt, Zero};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::entity::{ValueId, WeightId};
use quantc_ir::formats;
use quantc_ir::graph::{Graph, Node};
use quantc_ir::module::Module;
use quantc_ir::ops::{Dequantize, MatMul, Op, OpSpec, QMatMul};
use quantc_ir::scheme::{self, Group};
use quantc_ir::target::{Backend, PackJob, Packed, TargetDesc};
use quantc_ir::ty::{ElemTy, Float, TensorTy};
use quantc_ir::weights::{Recipe, Store, WeightView};
use std::ops::Range;

/// The version of the packer: part of every recipe.
const PACK_VERSION: u32 = 1;

/// The CPU code generator for one target.
#[derive(Clone, Copy, Debug)]
pub struct CpuBackend {
    target: &'static TargetDesc,
}

impl CpuBackend {
    /// The code generator for `target`.
    pub fn new(target: &'static TargetDesc) -> CpuBackend {
        CpuBackend { target }
    }
}

/// How a weight matrix of `w` with rows of `k` is stored for the kernels; the error says what has no kernel.
pub fn weight_format(w: ElemTy, k: u32) -> Result<WFmt> {
    let float = |code| Ok(WFmt { code, group: k, zero: Zero::Sym(0), scale: ScaleTy::None });
    let scheme = match w {
        ElemTy::F32 => return float(Code::F32),
        ElemTy::F16 => return float(Code::F16),
        ElemTy::Bf16 => return float(Code::Bf16),
        ElemTy::F64 | ElemTy::Int(_) => {
            return Err(Diag::target("matrices of doubles or integers have no matmul kernel"));
        }
        ElemTy::Q(scheme) => scheme,
    };
    let group = match scheme.group {
        Group::Tensor | Group::Axis(0) => k,
        Group::Block { axis: 1, size } => size.min(k),
        Group::Tile([_, cols]) => cols.min(k),
        _ => {
            return Err(Diag::target(format!("weights of type {scheme} have no matmul kernel"))
                .help("kernels take one scale per tensor, row, run of columns (`block N@1`) or tile"));
        }
    };
    let format = scheme.format;
    let code = match format {
        f if *f == formats::E4M3 => Code::E4m3,
        f if *f == formats::E5M2 => Code::E5m2,
        f if *f == formats::E2M1 => Code::Lut4,
        f if f.is_int() && f.bits <= 4 => Code::U4,
        f if f.is_int() && f.bits == 8 => Code::U8,
        f => return Err(Diag::target(format!("weights of format {f} have no matmul kernel"))),
    };
    let zero = match scheme.zero {
        scheme::Zero::Point(zero) if code.is_int() && *zero == *format => Zero::Asym,
        scheme::Zero::Point(zero) if code.is_int() => {
            return Err(Diag::target(format!("{scheme}: zero points of format {zero} have no kernel"))
                .help("kernels take zero points in the format of the weights"));
        }
        scheme::Zero::Point(_) => {
            return Err(Diag::target(format!("{scheme}: zero points of a float format have no kernel")));
        }
        scheme::Zero::Symmetric => Zero::Sym(sign_bit(format)),
    };
    let scale = if scheme.scale == Float::Bf16 { ScaleTy::Bf16 } else { ScaleTy::F32 };
    Ok(WFmt { code, group, zero, scale })
}

/// What turns a two's complement code into an unsigned one: the weight of the sign bit, 0 for other formats.
fn sign_bit(format: &formats::Format) -> u8 {
    if format.is_signed_int() { 1 << (format.bits - 1) } else { 0 }
}

impl Backend for CpuBackend {
    fn target(&self) -> &TargetDesc {
        self.target
    }

    fn supports_matmul(&self, x: ElemTy, w: ElemTy) -> Result<()> {
        let fmt = weight_format(w, 1 << 12)?;
        match x {
            ElemTy::F32 | ElemTy::Bf16 => Ok(()),
            ElemTy::Q(s)
                if *s.format == formats::INT8
                    && matches!(s.group, Group::Token | Group::Tensor)
                    && s.zero == scheme::Zero::Symmetric =>
            {
                if fmt.code.is_int() {
                    return Ok(());
                }
                Err(Diag::target(format!(
                    "int8 activations meet weights of type {w}, which are not integers"
                ))
                .help("leave the activations in float for this weight format"))
            }
            _ => Err(Diag::target(format!(
                "activations of type {x} have no matmul kernel on {}",
                self.target.name
            ))
            .help("kernels take f32, bf16, or symmetric int8 with one scale per token or for all")),
        }
    }

    fn cost(&self, op: &Op, args: &[Option<&TensorTy>], out: &TensorTy, tokens: u64) -> f64 {
        let cpu = &self.target.cpu;
        let bind = |_| tokens;
        let work = op.cost(args, out, &bind);
        let static_bytes = |ty: &&TensorTy| ty.stored_bytes().unwrap_or(0) as f64;
        let weights: f64 = args.iter().flatten().map(static_bytes).sum();
        let rate = match args.first().copied().flatten().map(|x| x.elem) {
            Some(ElemTy::Q(_)) => cpu.int8_mac_per_cycle,
            Some(ElemTy::Bf16) => cpu.bf16_mac_per_cycle.max(cpu.f32_mac_per_cycle),
            _ => cpu.f32_mac_per_cycle,
        };
        // Cycles to nanoseconds at 1 GHz: only ratios matter.
        let traffic = weights / f64::from(cpu.stream_bytes_per_cycle);
        let compute = work.macs as f64 / f64::from(rate);
        let elementwise = work.elements as f64 / f64::from(cpu.vector_bits / 32);
        // Writing a dequantized weight and reading it back is what fusion is there to avoid.
        let expanded = if op.is::<Dequantize>().is_some() { 8.0 * work.elements as f64 } else { 0.0 };
        traffic.max(compute) + elementwise + expanded
    }

    fn pack(&self, job: &PackJob<'_>) -> Result<Option<Packed>> {
        let node = job.graph.node(job.op);
        let Some(weight) = MatmulWeight::of(job.module, job.graph, node)? else { return Ok(None) };
        weight.pack(Order::Panels, job.module, job.store).map(Some)
    }
}

/// The code generator for `target`, whatever runs its kernels.
pub fn of(target: &'static TargetDesc) -> Box<dyn Backend> {
    match target.gpu {
        Some(gpu) => Box::new(crate::cuda::backend::CudaBackend::new(target, gpu)),
        None => Box::new(CpuBackend::new(target)),
    }
}

/// The order in which a kind of machine wants packed weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Panels of columns, for processors.
    Panels,
    /// Fragments of lanes, for GPUs.
    Fragments,
}

impl Order {
    /// The order of a target.
    pub fn of(target: &TargetDesc) -> Order {
        if target.gpu.is_some() { Order::Fragments } else { Order::Panels }
    }
}

/// Where the codes of one matrix lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// In panels.
    Panels(Layout),
    /// In fragments.
    Fragments(FragmentLayout),
}

impl Packing {
    /// A short readable name, without the sizes.
    pub fn name(&self) -> String {
        match self {
            Packing::Panels(layout) => layout.name(),
            Packing::Fragments(layout) => layout.name(),
        }
    }

    /// Bytes of the blob.
    pub fn bytes(&self) -> u64 {
        match self {
            Packing::Panels(layout) => layout.bytes(),
            Packing::Fragments(layout) => layout.bytes(),
        }
    }

    /// The digest of everything that decides positions.
    fn hash(&self) -> blake3::Hash {
        match self {
            Packing::Panels(layout) => layout.hash(),
            Packing::Fragments(layout) => layout.hash(),
        }
    }

    fn pack(&self, rows: &mut dyn WeightRows, out: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match self {
            Packing::Panels(layout) => layout.pack(rows, out),
            Packing::Fragments(layout) => layout.pack(rows, out),
        }
    }
}

/// The weight operands of a matmul.
#[derive(Clone, Copy, Debug)]
pub struct MatmulWeight {
    w: WeightId,
    scale: Option<WeightId>,
    zero: Option<WeightId>,
    /// Where the codes lie for processors; extents and format are the same for all.
    pub layout: Layout,
    /// What the weight meets.
    a: AFmt,
}

impl MatmulWeight {
    /// The weight of a `matmul` or `qmatmul`; `None` for other ops.
    pub fn of(module: &Module, graph: &Graph, node: &Node) -> Result<Option<MatmulWeight>> {
        let quantized = node.op.is::<QMatMul>().is_some();
        if !quantized && node.op.is::<MatMul>().is_none() {
            return Ok(None);
        }
        let weight = |v: ValueId, what: &str| {
            graph.as_weight(v).ok_or_else(|| {
                Diag::target(format!("the {what} of a `{}` is computed when the engine runs", node.op.name()))
                    .help("run `fold-constants` and `fuse-dequant-matmul` first")
            })
        };
        let w = weight(node.args[1], "weight")?;
        let optional = |i: usize, what| match quantized && !graph.is_none(node.args[i]) {
            true => weight(node.args[i], what).map(Some),
            false => Ok(None),
        };
        let ty = &module.weights[w].ty;
        let extent = |axis: usize| ty.shape.0[axis].fixed().and_then(|n| u32::try_from(n).ok());
        let (Some(n), Some(k)) = (extent(0), extent(1)) else {
            return Err(Diag::target(format!("a weight of type {ty} is too large for a kernel")));
        };
        // How codes lie depends on what they meet, and is the same on all targets of a kind.
        let a = match graph.ty(node.args[0]).elem {
            ElemTy::Bf16 => AFmt::Bf16,
            ElemTy::Q(_) => AFmt::I8Token,
            ElemTy::F32 | ElemTy::F16 | ElemTy::F64 | ElemTy::Int(_) => AFmt::F32,
        };
        let layout = Layout::new(n, k, weight_format(ty.elem, k)?, a);
        let scale = optional(2, "scale")?;
        let zero = optional(3, "zero point")?;
        Ok(Some(MatmulWeight { w, scale, zero, layout, a }))
    }

    /// The weight that holds the codes.
    pub fn weight(&self) -> WeightId {
        self.w
    }

    /// Where the codes lie in this order, or what about them has no kernel.
    pub fn packing(&self, order: Order) -> Result<Packing> {
        let Layout { n, k, w, .. } = self.layout;
        match order {
            Order::Panels => Ok(Packing::Panels(self.layout)),
            Order::Fragments => FragmentLayout::new(n, k, w, self.a).map(Packing::Fragments),
        }
    }

    /// Packs the weight through the store.
    pub fn pack(&self, order: Order, module: &Module, store: &Store) -> Result<Packed> {
        let packing = self.packing(order)?;
        let ids = [Some(self.w), self.scale, self.zero];
        let inputs =
            ids.into_iter().flatten().map(|id| store.digest(&module.weights, id)).collect::<Result<_>>()?;
        let layout = packing.name();
        let options = format!("{layout} {}", packing.hash().to_hex());
        let recipe = Recipe { step: "pack", version: PACK_VERSION, options, inputs };
        let mut rows = QuantizedRows::new(self, module, store)?;
        let digests = store.derive(&recipe, 1, &mut |out| {
            let out = &mut out[0];
            packing.pack(&mut rows, &mut |panel| out.write(panel))
        })?;
        Ok(Packed { layout, blob: digests[0] })
    }
}

/// Rows of a weight of the IR in the form the packer takes.
struct QuantizedRows<'a> {
    layout: Layout,
    codes: WeightView<'a>,
    scale: Option<WeightView<'a>>,
    zero: Option<WeightView<'a>>,
    sign_bit: u8,
    /// Rows that share a scale; the whole matrix when there is one scale for all.
    row_block: usize,
}

impl<'a> QuantizedRows<'a> {
    fn new(weight: &MatmulWeight, module: &'a Module, store: &Store) -> Result<QuantizedRows<'a>> {
        let view = |id: WeightId| store.view(&module.weights, id);
        let scheme = module.weights[weight.w].ty.elem.scheme();
        let row_block = match scheme.map(|s| s.group) {
            Some(Group::Tensor) => weight.layout.n as usize,
            Some(Group::Tile([rows, _])) => rows as usize,
            _ => 1,
        };
        Ok(QuantizedRows {
            layout: weight.layout,
            codes: view(weight.w)?,
            scale: weight.scale.map(view).transpose()?,
            zero: weight.zero.map(view).transpose()?,
            sign_bit: scheme.map_or(0, |s| sign_bit(s.format)),
            row_block,
        })
    }

    /// The rows of the scale tensor that rows `from..from + count` read.
    fn scale_rows(&self, from: u32, count: u32) -> Range<usize> {
        let (first, last) = (from as usize / self.row_block, (from + count - 1) as usize / self.row_block);
        first..last + 1
    }
}

impl WeightRows for QuantizedRows<'_> {
    fn rows(
        &mut self,
        from: u32,
        count: u32,
        codes: &mut [u8],
        scales: &mut [f32],
        zeros: &mut [i32],
    ) -> Result<()> {
        let (first, n) = (from as usize, count as usize);
        if self.codes.ty().elem.scheme().is_some() {
            self.codes.read_rows_codes(first, n, codes)?;
            if self.sign_bit != 0 {
                codes.iter_mut().for_each(|c| *c ^= self.sign_bit);
            }
        } else {
            self.codes.read_rows_bytes(first, n, codes)?;
        }
        self.codes.release(first..first + n);
        let groups = self.layout.groups() as usize;
        let from_row = |i: usize| (first + i) / self.row_block;
        if let Some(view) = &self.scale {
            let rows = self.scale_rows(from, count);
            let mut block = vec![0.0; rows.len() * groups];
            view.read_rows_f32(rows.start, rows.len(), &mut block)?;
            for (i, out) in scales.chunks_mut(groups).enumerate() {
                out.copy_from_slice(&block[(from_row(i) - rows.start) * groups..][..groups]);
            }
        }
        if let Some(view) = &self.zero {
            let rows = self.scale_rows(from, count);
            let mut block = vec![0u8; rows.len() * groups];
            view.read_rows_codes(rows.start, rows.len(), &mut block)?;
            for (i, out) in zeros.chunks_mut(groups).enumerate() {
                let row = &block[(from_row(i) - rows.start) * groups..][..groups];
                out.iter_mut().zip(row).for_each(|(z, &code)| *z = i32::from(code ^ self.sign_bit));
            }
        }
        Ok(())
    }
}
