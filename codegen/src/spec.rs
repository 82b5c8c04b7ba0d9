//! What a kernel computes, as plain data.
//!
//! A [`KernelSpec`] says everything that decides the bytes of a kernel besides the target: two launches with equal
//! specs share one kernel. [`KernelSpec::key`] names it, and stays the same from run to run.

use half::{bf16, f16};
use quantc_ir::diag::{Diag, Result};
use serde::{Deserialize, Serialize};

use crate::conv::ConvSpec;
use crate::cpu::attention::AttentionSpec;
use crate::cpu::cache::CacheAppendSpec;
use crate::cpu::gather::GatherSpec;
use crate::cpu::rope::{RopeSpec, RopeTableSpec};
use crate::cpu::row::RowSpec;
use crate::cuda::sample::SampleSpec;
use crate::cuda::tiles::rows::RowTilesSpec;
use crate::eexpr::{EExpr, Place};
use crate::nest::NestSpec;

/// A kernel of any kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelSpec {
    /// Activations times packed weights.
    Matmul(MatmulSpec),
    /// An expression over the columns of rows.
    Row(RowSpec),
    /// Attention over a cache or the rows of the call.
    Attention(AttentionSpec),
    /// Rows of a table.
    Gather(GatherSpec),
    /// Rows into a state.
    CacheAppend(CacheAppendSpec),
    /// Rotation of heads.
    Rope(RopeSpec),
    /// Cosines and sines of rotation angles.
    RopeTable(RopeTableSpec),
    /// A loop nest over arrays.
    Nest(NestSpec),
    /// Products of windows with weights.
    Conv(ConvSpec),
    /// Rows into tiles, for products of groups of warps; of GPUs only.
    RowTiles(RowTilesSpec),
    /// Activations, as the tiles that [`tokens_spec`] tells, times packed weights; of GPUs only.
    ///
    /// [`tokens_spec`]: crate::cuda::mixed::MixedTile::tokens_spec
    TiledMatmul(MatmulSpec),
    /// Tokens chosen from logits; of GPUs only.
    Sample(SampleSpec),
}

impl KernelSpec {
    /// A stable name: readable facts, then a digest over all of the spec.
    pub fn key(&self) -> String {
        let json = serde_json::to_vec(self).expect("a spec has only serializable fields");
        let digest = blake3::hash(&json).to_hex();
        let facts = match self {
            KernelSpec::Matmul(spec) => spec.facts(),
            KernelSpec::Row(spec) => format!("row_{}_c{}", spec.name, spec.cols),
            KernelSpec::Attention(s) => format!("attention_h{}_kv{}_d{}", s.heads, s.kv_heads, s.head_dim),
            KernelSpec::Gather(spec) => format!("gather_{}_w{}", spec.ty.name(), spec.width),
            KernelSpec::CacheAppend(s) => {
                format!("cache_append_{}_h{}_d{}", s.ty.name(), s.heads, s.head_dim)
            }
            KernelSpec::Rope(spec) => format!("rope_h{}_d{}", spec.heads, spec.head_dim),
            KernelSpec::RopeTable(spec) => format!("rope_table_{}", spec.half),
            KernelSpec::Nest(spec) => format!("nest_{}", spec.name),
            KernelSpec::Conv(spec) => format!("conv_{}_n{}_k{}", spec.name, spec.outs, spec.channels),
            KernelSpec::RowTiles(spec) => format!("row_tiles_{}_k{}", spec.kind.name(), spec.k),
            KernelSpec::TiledMatmul(spec) => format!("tiled_{}", spec.facts()),
            KernelSpec::Sample(spec) => format!("sample_{}", spec.vocab),
        };
        format!("{facts}_{}", &digest[..12])
    }

    /// The template that makes the kernel.
    pub fn template(&self) -> &'static str {
        match self {
            KernelSpec::Matmul(_) => "matmul",
            KernelSpec::Row(_) => "row",
            KernelSpec::Attention(_) => "attention",
            KernelSpec::Gather(_) => "gather",
            KernelSpec::CacheAppend(_) => "cache_append",
            KernelSpec::Rope(_) => "rope",
            KernelSpec::RopeTable(_) => "rope_table",
            KernelSpec::Nest(_) => "nest",
            KernelSpec::Conv(_) => "conv",
            KernelSpec::RowTiles(_) => "row_tiles",
            KernelSpec::TiledMatmul(_) => "tiled_matmul",
            KernelSpec::Sample(_) => "sample",
        }
    }
}

/// The rows that a kernel serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MRange {
    /// Fewest rows of a call.
    pub min: u32,
    /// Most rows of a call.
    pub max: u32,
}

/// Which of `dims` counts the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rows {
    /// The tokens of the call.
    T,
    /// The rows of results wanted.
    R,
}

impl Rows {
    /// Index in `dims`.
    pub fn dim(self) -> u32 {
        match self {
            Rows::T => 0,
            Rows::R => 1,
        }
    }
}

/// How one weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
    /// Integers of at most eight bits, stored unsigned.
    U8,
    /// Integers of at most four bits, stored unsigned.
    U4,
    /// The sixteen values of [`E2M1`].
    Lut4,
    /// Eight-bit float: four exponent bits, three mantissa bits, no infinity.
    E4m3,
    /// Eight-bit float: five exponent bits, two mantissa bits.
    E5m2,
}

/// The values of [`Code::Lut4`]: sign, two exponent bits, one mantissa bit.
pub const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

impl Code {
    /// Bits of one weight.
    pub fn bits(self) -> u32 {
        match self {
            Code::F32 => 32,
            Code::F16 | Code::Bf16 => 16,
            Code::U8 | Code::E4m3 | Code::E5m2 => 8,
            Code::U4 | Code::Lut4 => 4,
        }
    }

    /// Bytes of one weight as [`crate::layout::WeightRows`] hands it over.
    pub fn source_bytes(self) -> usize {
        self.bits().div_ceil(8) as usize
    }

    /// Whether the codes are integers, and can meet integer activations and zero points.
    pub fn is_int(self) -> bool {
        matches!(self, Code::U4 | Code::U8)
    }

    /// Short name.
    pub fn name(self) -> &'static str {
        match self {
            Code::F32 => "f32",
            Code::F16 => "f16",
            Code::Bf16 => "bf16",
            Code::U8 => "u8",
            Code::U4 => "u4",
            Code::Lut4 => "lut4",
            Code::E4m3 => "e4m3",
            Code::E5m2 => "e5m2",
        }
    }

    /// What a code stands for, without scale and zero point, by the definition of its format: what kernels are compared
    /// with. It lies as [`crate::layout::WeightRows`] hands it over, in [`Code::source_bytes`] bytes.
    pub fn value(self, bytes: &[u8]) -> f64 {
        let word = bytes.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte));
        let small = |mantissa: u32, bias: i32| {
            let sign = if word & 0x80 != 0 { -1.0 } else { 1.0 };
            let exponent = (word as i32 & 0x7f) >> mantissa;
            let m = f64::from(word & ((1 << mantissa) - 1)) / f64::from(1 << mantissa);
            let size =
                if exponent == 0 { m * 2f64.powi(1 - bias) } else { (1.0 + m) * 2f64.powi(exponent - bias) };
            sign * size
        };
        match self {
            Code::F32 => f64::from(f32::from_bits(word)),
            Code::F16 => f16::from_bits(word as u16).to_f64(),
            Code::Bf16 => bf16::from_bits(word as u16).to_f64(),
            Code::U8 | Code::U4 => f64::from(word),
            Code::Lut4 => f64::from(E2M1[word as usize % E2M1.len()]),
            Code::E4m3 => small(3, 7),
            Code::E5m2 => small(2, 15),
        }
    }
}

/// The code that means zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Zero {
    /// The same for all weights: the offset of a signed format, 0 for an unsigned one and for floats.
    Sym(u8),
    /// One for each scale group, stored with the weights.
    Asym,
}

/// How scales are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleTy {
    /// There are none.
    None,
    /// Single precision.
    F32,
    /// The upper half of single precision.
    Bf16,
}

impl ScaleTy {
    /// Bytes of one scale.
    pub fn bytes(self) -> u32 {
        match self {
            ScaleTy::None => 0,
            ScaleTy::F32 => 4,
            ScaleTy::Bf16 => 2,
        }
    }
}

/// How weights are quantized: `w = (code - zero) * scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WFmt {
    /// How one weight is stored.
    pub code: Code,
    /// Columns of k that share a scale; `k` for one scale a row. The last group of a row may be shorter.
    pub group: u32,
    /// The code that means zero.
    pub zero: Zero,
    /// How scales are stored.
    pub scale: ScaleTy,
}

/// How activations come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AFmt {
    /// Rows of k f32.
    F32,
    /// Rows of k bf16, [`bf16_row_stride`] apart.
    Bf16,
    /// Rows of k signed bytes, [`i8_row_stride`] apart and zero up to there, with one f32 scale a row and the sum of
    /// each group of the row.
    I8Token,
}

/// Bytes from one row of [`AFmt::I8Token`] to the next.
///
/// Whole cache lines, plus one: rows a power of two apart would compete for the same few cache sets.
pub fn i8_row_stride(k: u32) -> u32 {
    k.next_multiple_of(64) + 64
}

/// Elements from one row of [`AFmt::Bf16`] to the next: whole cache lines plus one, as for bytes.
pub fn bf16_row_stride(k: u32) -> u32 {
    k.next_multiple_of(32) + 32
}

/// `out[m][n] = epilogue(sum over k of a[m][k] * w[n][k])`, for one or more `w` of the same shape and format.
///
/// There are as many products as the epilogue reads accumulators: the gate and the up projection of a gated MLP are two
/// products of the same rows that meet in the epilogue.
///
/// Arguments: `a`; for [`AFmt::I8Token`] then `a_scale f32[m]` and `a_sums i32[m][groups]`; each `w`, packed by
/// [`crate::layout::Layout`]; the inputs and then the outputs of the epilogue. An item is one panel of 64 columns, for all
/// rows of the call.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MatmulSpec {
    /// Columns of the result, rows of the weights.
    pub n: u32,
    /// Length of the sums.
    pub k: u32,
    /// Rows of a call.
    pub m: MRange,
    /// Which of `dims` counts the rows.
    pub rows: Rows,
    /// How weights are quantized.
    pub w: WFmt,
    /// How activations come.
    pub a: AFmt,
    /// What happens to the sums.
    pub epilogue: EExpr,
}

/// Longest k of integer sums: beyond it, i32 could overflow on full-range weights.
const MAX_INT_K: u32 = i32::MAX as u32 / (255 * 128);

impl MatmulSpec {
    /// Scale groups of one row.
    pub fn groups(&self) -> u32 {
        self.k.div_ceil(self.w.group)
    }

    /// Panels of 64 columns: the items of a launch.
    pub fn items(&self) -> u32 {
        self.n.div_ceil(crate::layout::PANEL)
    }

    /// Arguments before those of the epilogue.
    pub fn fixed_args(&self) -> u32 {
        self.weights_arg() + self.products()
    }

    /// The argument that is the first product's weights.
    pub fn weights_arg(&self) -> u32 {
        match self.a {
            AFmt::F32 | AFmt::Bf16 => 1,
            AFmt::I8Token => 3,
        }
    }

    /// Products of the same rows.
    pub fn products(&self) -> u32 {
        self.epilogue.products()
    }

    /// Refuses combinations that mean nothing or that no kernel computes.
    pub fn check(&self) -> Result<()> {
        let MatmulSpec { n, k, m, w, .. } = self;
        let refuse = |why: String| Err(Diag::bug(format!("matmul {}: {why}", self.facts())));
        if *n == 0 || *k == 0 || m.min == 0 || m.min > m.max {
            return refuse("an empty dimension".into());
        }
        if self.products() == 0 {
            return refuse("an epilogue that reads no sums".into());
        }
        if w.group == 0 || w.group > *k {
            return refuse(format!("a scale group of {} columns", w.group));
        }
        if w.zero != Zero::Sym(0) && !w.code.is_int() {
            return refuse("a zero point on a float format".into());
        }
        if w.scale == ScaleTy::None && (w.group != *k || w.code.is_int()) {
            return refuse("integers and grouped formats need scales".into());
        }
        if self.a == AFmt::I8Token && !w.code.is_int() {
            return refuse("integer activations need integer weights".into());
        }
        if self.a == AFmt::I8Token && w.group > MAX_INT_K {
            return refuse(format!("integer sums are exact up to {MAX_INT_K} terms"));
        }
        // Distances inside one row tile and inside one panel are 32-bit displacements.
        if u64::from(*k) * 4 * 64 > i32::MAX as u64 {
            return refuse("k is too long".into());
        }
        self.epilogue.check(Place::Epilogue).map_err(|e| Diag::bug(format!("matmul {}: {e}", self.facts())))
    }

    fn facts(&self) -> String {
        let w = &self.w;
        let zero = match w.zero {
            Zero::Sym(z) => format!("s{z}"),
            Zero::Asym => "a".into(),
        };
        let a = match self.a {
            AFmt::F32 => "f32",
            AFmt::Bf16 => "bf16",
            AFmt::I8Token => "i8",
        };
        let group = if w.group == self.k { "row".into() } else { format!("g{}", w.group) };
        let m = if self.m.min == self.m.max {
            format!("m{}", self.m.min)
        } else {
            format!("m{}to{}", self.m.min, self.m.max)
        };
        let products = match self.products() {
            0 | 1 => String::new(),
            count => format!("{count}x"),
        };
        format!("matmul_{a}_{products}{}_{group}_{zero}_n{}_k{}_{m}", w.code.name(), self.n, self.k)
    }
}
