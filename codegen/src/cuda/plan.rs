//! From the kernels that a lowered module wants to templates, texts, and machine code where NVRTC is found.

pub use super::plain::PAGE;
use super::tile::Access;
use super::tile::{Extent, Kernel};
use super::{attention, cache, gather, mixed, plain, rope, row, sample, skinny, text, tiles, wide};
use crate::cpu::attention::{AttentionSpec, KvSource};
use crate::cpu::cache::{CacheAppendSpec, CacheTy, Role};
use crate::spec::{KernelSpec, MRange, MatmulSpec, Rows};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::GpuDesc;
use quantc_ir::weights::Store;
use quantc_runtime::format::{Blocks, GpuEntry, GpuKernel, Sym};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Most rows of a call for which weights are read by warps that divide k among them, and keys by blocks that have one
/// token each.
const MOST_SKINNY: u32 = 64;

/// Rows of results that attention of wanted rows is cut for: keys are divided among more blocks where there are fewer rows.
const FEW_WANTED: u32 = 8;

/// Microseconds between the beginnings of two launches that do nothing, of one graph.
const LAUNCH_US: f64 = 2.0;

/// A kernel that a launch wants, with the calls it is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Want {
    /// What it computes.
    pub spec: KernelSpec,
    /// Tokens of the calls.
    pub tokens: MRange,
}

/// The symbol of a kernel for calls of so many tokens. Those of attention are made for the calls, like those of products,
/// whose specs tell them.
pub fn symbol(spec: &KernelSpec, tokens: MRange) -> String {
    match spec {
        KernelSpec::Attention(_) => format!("{}_m{}to{}", spec.key(), tokens.min, tokens.max),
        _ => spec.key(),
    }
}

/// Whether a cache lies as [`cache::CacheLayout`] says; others lie as [`plain`] does.
fn in_fragments(ty: CacheTy, heads: u32, head_dim: u32) -> bool {
    head_dim <= attention::WIDEST && cache::CacheLayout::new(ty, Role::Keys, heads, head_dim).is_ok()
}

/// Bytes of a row of a state: a page by its tokens, for keys and values alike.
pub fn state_row_bytes(ty: CacheTy, heads: u32, head_dim: u32) -> u64 {
    match cache::CacheLayout::new(ty, Role::Keys, heads, head_dim) {
        Ok(layout) if in_fragments(ty, heads, head_dim) => layout.row_bytes().into(),
        _ => u64::from(heads * ty.width(head_dim) * ty.bytes()),
    }
}

/// How the tokens of a product of many rows are to lie on a GPU whose groups of warps multiply, where its weights and its
/// size allow that: as tiles. The product is then a [`KernelSpec::TiledMatmul`]; its weights lie as for few rows, so that one
/// packed copy serves both.
pub fn token_tiles(spec: &MatmulSpec, gpu: &GpuDesc) -> Option<tiles::rows::RowTilesSpec> {
    if spec.m.max <= MOST_SKINNY {
        return None;
    }
    let tile = mixed::MixedTile::of(spec, spec.m.max, gpu).ok()?;
    mixed::check(spec, tile).ok()?;
    mixed::MixedTile::tokens_spec(spec).ok()
}

/// A kernel with the template it came from.
#[derive(Clone, Debug)]
pub struct Planned {
    /// What it does.
    pub kernel: Kernel,
    /// The template.
    pub template: &'static str,
    /// The choices made for it, in words.
    pub choice: String,
}

/// What there is to tell about a kernel of a GPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GpuReport {
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory of a block.
    pub shared: u32,
    /// 32-bit registers of a thread; 0 when no machine code was made.
    pub registers: u32,
    /// Bytes of registers that do not fit and go through memory.
    pub spills: u32,
    /// Rows of the largest call of its class.
    pub rows: u64,
    /// Bytes that such a call moves, caches aside.
    pub bytes: u64,
    /// Multiply-adds of such a call.
    pub macs: u64,
    /// Microseconds that such a call is expected to take, by the target's rates.
    pub predicted_us: f64,
}

/// The kernel that is wanted, called `symbol`, for a GPU; or what about it has no kernel.
pub fn kernel(symbol: &str, want: &Want, gpu: &GpuDesc) -> Result<Planned> {
    let (kernel, template, choice) = match &want.spec {
        KernelSpec::Matmul(s) if s.m.max <= MOST_SKINNY => {
            let tile = skinny::SkinnyTile::of(s, s.m.max, gpu)?;
            let choice = format!(
                "{} x {} tiles of 16 columns by 8 tokens, {} warps along k, {} stages",
                tile.rows, tile.tokens, tile.warps, tile.stages
            );
            (skinny::build(symbol, s, tile)?, "skinny", choice)
        }
        KernelSpec::Matmul(s) => {
            let tile = wide::WideTile::of(s, gpu)?;
            let choice = format!(
                "{} x {} tiles of 16 columns by 8 tokens a warp, {} x {} warps, {} stages",
                tile.rows, tile.tokens, tile.warps[0], tile.warps[1], tile.stages
            );
            (wide::build(symbol, s, tile)?, "wide", choice)
        }
        KernelSpec::TiledMatmul(s) => {
            let tile = mixed::MixedTile::of(s, s.m.max, gpu)?;
            let choice = format!(
                "{} groups of 64 output columns, {} tokens, {} stages of tokens' tiles",
                tile.groups, tile.tokens, tile.stages
            );
            (mixed::build(symbol, s, tile)?, "mixed", choice)
        }
        KernelSpec::RowTiles(s) => {
            let order =
                if s.span == 0 { "in order".into() } else { format!("by quarters of {} columns", s.span) };
            (tiles::rows::build(symbol, s)?, "row_tiles", order)
        }
        KernelSpec::Sample(s) => (sample::build(symbol, s)?, "sample", String::new()),
        KernelSpec::Row(s) => {
            let tile = row::RowTile::of(s);
            let choice = format!("{} warps a row, {} columns a lane", tile.warps_per_row, tile.width);
            (row::build(symbol, s, tile)?, "row", choice)
        }
        KernelSpec::Rope(s) => (rope::build(symbol, s)?, "rope", String::new()),
        KernelSpec::RopeTable(s) => (rope::build_table(symbol, s)?, "rope", String::new()),
        KernelSpec::Attention(s) => attend(symbol, s, want.tokens, gpu)?,
        KernelSpec::Gather(s) => (gather::build(symbol, s)?, "gather", String::new()),
        KernelSpec::CacheAppend(s) => append(symbol, s)?,
        KernelSpec::Nest(_) | KernelSpec::Conv(_) => {
            return Err(Diag::target("graphs over arrays have kernels on CPUs only"));
        }
    };
    if kernel.shared > gpu.shared_bytes {
        return Err(Diag::target(format!(
            "{symbol} needs {} bytes of shared memory, {} gives {}",
            kernel.shared, gpu.arch, gpu.shared_bytes
        )));
    }
    Ok(Planned { kernel, template, choice })
}

/// A kernel, its template and what was chosen.
type Chosen = (Kernel, &'static str, String);

fn attend(symbol: &str, spec: &AttentionSpec, tokens: MRange, gpu: &GpuDesc) -> Result<Chosen> {
    let (ty, context) = match spec.source {
        KvSource::Cache { ty, slot_rows, .. } => (ty, Some(slot_rows)),
        KvSource::Direct { .. } => (CacheTy::Bf16, None),
    };
    if !in_fragments(ty, spec.kv_heads, spec.head_dim) || spec.softcap.is_some() {
        return Ok((plain::attention(symbol, spec)?, "plain", "dot products, a warp for each query".into()));
    }
    let call = attention::AttentionCall::plain(spec.clone(), context.is_some());
    // Of a prompt mostly one row is wanted.
    let rows = if spec.rows == Rows::R { tokens.max.min(FEW_WANTED) } else { tokens.max };
    if let Some(context) = context
        && rows <= MOST_SKINNY
        && spec.group() <= attention::ROWS
    {
        let tile = attention::decode::DecodeTile::of(&call, rows, context, gpu)?;
        let choice = format!(
            "{} warps with units of {} keys, {} stages, {} blocks for each token and head",
            tile.warps, tile.unit, tile.stages, tile.splits
        );
        return Ok((attention::decode::build(symbol, &call, tile)?, "decode_attention", choice));
    }
    let tile = attention::prefill::PrefillTile::of(&call, gpu)?;
    let choice = format!("{} warps, units of {} keys, {} stages", tile.warps, tile.unit, tile.stages);
    Ok((attention::prefill::build(symbol, &call, tile)?, "prefill_attention", choice))
}

fn append(symbol: &str, spec: &CacheAppendSpec) -> Result<Chosen> {
    if !in_fragments(spec.ty, spec.heads, spec.head_dim) {
        return Ok((plain::append(symbol, spec)?, "plain", String::new()));
    }
    let spec = cache::AppendSpec { rows: spec.clone(), rotation: None, paged: true };
    Ok((cache::build_append(symbol, &spec)?, "cache_append", String::new()))
}

/// How a kernel is launched.
pub fn launch(kernel: &Kernel, registers: u32) -> Result<GpuKernel> {
    let sym = |scalar: u32| match kernel.scalars.get(scalar as usize).map(String::as_str) {
        Some("t") => Ok(Sym::T as i32),
        Some("r") => Ok(Sym::R as i32),
        other => Err(Diag::bug(format!("{}: a scalar {other:?} that no call has", kernel.name))),
    };
    let blocks = |extent: Extent| {
        Ok::<_, Diag>(match extent {
            Extent::Fixed(times) => Blocks { sym: Sym::One as i32, times, per: 1 },
            Extent::PerScalar { scalar, times, per } => Blocks { sym: sym(scalar)?, times, per },
        })
    };
    // What a launch gives is followed by at most one buffer of each kind of workspace, scratch first.
    let workspace: Vec<Access> =
        kernel.buffers.iter().map(|b| b.access).skip_while(|&a| !is_workspace(a)).collect();
    if !matches!(workspace[..], [] | [Access::Scratch, Access::Counters]) {
        return Err(Diag::bug(format!("{}: a workspace that no launch has", kernel.name)));
    }
    let each =
        |access: Access| kernel.buffers.iter().find(|b| b.access == access).map_or(0, |b| b.bytes_each);
    Ok(GpuKernel {
        symbol: kernel.name.clone(),
        threads: kernel.threads,
        shared: kernel.shared,
        registers,
        grid: kernel.grid.into_iter().map(blocks).collect::<Result<_>>()?,
        scalars: (0..kernel.scalars.len() as u32).map(sym).collect::<Result<_>>()?,
        buffers: kernel.buffers.iter().filter(|b| !is_workspace(b.access)).count() as u32,
        scratch_each: each(Access::Scratch),
        counters_each: each(Access::Counters),
    })
}

fn is_workspace(access: Access) -> bool {
    matches!(access, Access::Scratch | Access::Counters)
}

/// A kernel with all that an engine says of it.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// For the manifest.
    pub launch: GpuKernel,
    /// For the file of kernels.
    pub entry: GpuEntry,
    /// The template.
    pub template: &'static str,
    /// Its choices.
    pub choice: String,
    /// For the report.
    pub report: GpuReport,
}

/// Kernels with the version of the compiler that made machine code of them; (0, 0) when they are text.
#[derive(Clone, Debug)]
pub struct Code {
    /// The kernels, by symbol.
    pub kernels: Vec<Compiled>,
    /// Version of NVRTC.
    pub nvrtc: (i32, i32),
}

/// Makes the kernels that are wanted, by symbol. Machine code is kept in the store by the text it was
/// made from.
pub fn compile(wanted: &BTreeMap<String, Want>, gpu: &GpuDesc, store: &Store) -> Result<Code> {
    let machine = Machine::find();
    let one = |(symbol, want): (&String, &Want)| {
        let planned = kernel(symbol, want, gpu)?;
        let spec = &want.spec;
        let source = text::emit(&planned.kernel);
        let made = machine.code(symbol, &source, gpu, store)?;
        let (bytes, macs, rows) = work(spec, want.tokens.max);
        let rate = match spec {
            KernelSpec::Matmul(s) | KernelSpec::TiledMatmul(s) if s.a == crate::spec::AFmt::I8Token => {
                gpu.rates.int8_tmac
            }
            _ => gpu.rates.bf16_tmac,
        };
        let predicted = (bytes as f64 / (gpu.rates.memory_gb * 1e3)).max(macs as f64 / (rate * 1e6));
        let report = GpuReport {
            threads: planned.kernel.threads,
            shared: planned.kernel.shared,
            registers: made.registers,
            spills: made.spills,
            rows,
            bytes,
            macs,
            predicted_us: ((predicted + LAUNCH_US) * 100.0).round() / 100.0,
        };
        let described = serde_json::to_string(want)
            .map_err(|e| Diag::bug(format!("the spec of {symbol} does not serialize: {e}")))?;
        let source = if made.cubin.is_empty() { source } else { String::new() };
        Ok(Compiled {
            launch: launch(&planned.kernel, made.registers)?,
            entry: GpuEntry { symbol: symbol.clone(), cubin: made.cubin, source, spec: described },
            template: planned.template,
            choice: planned.choice,
            report,
        })
    };
    let kernels = wanted.par_iter().map(one).collect::<Result<_>>()?;
    Ok(Code { kernels, nvrtc: machine.version() })
}

/// Bytes that a call moves (those of caches aside), its multiply-adds, and its rows: the largest call of the class, of at
/// most `tokens` tokens.
pub fn work(spec: &KernelSpec, tokens: u32) -> (u64, u64, u64) {
    let t = u64::from(tokens);
    let rows_of = |rows: Rows| if rows == Rows::T { t } else { 1 };
    match spec {
        KernelSpec::Matmul(s) | KernelSpec::TiledMatmul(s) => {
            let m = u64::from(s.m.max.min(tokens));
            let (n, k, products) = (u64::from(s.n), u64::from(s.k), u64::from(s.products()));
            let weights = super::layout::FragmentLayout::of(s).map_or(0, |l| l.bytes()) * products;
            let row = match s.a {
                crate::spec::AFmt::F32 => 4 * k,
                crate::spec::AFmt::Bf16 => 2 * k,
                crate::spec::AFmt::I8Token => k,
            };
            (weights + m * (row + 4 * n), m * n * k * products, m)
        }
        KernelSpec::Row(s) => {
            let e = &s.body;
            let inputs: usize = e.inputs.iter().map(|i| i.ty.bytes()).sum();
            let outputs: usize = e.outputs.iter().map(|o| o.ty.bytes()).sum();
            let rows = rows_of(s.rows.sym) * u64::from(s.rows.per);
            (rows * u64::from(s.cols) * (inputs + outputs) as u64, 0, rows)
        }
        KernelSpec::Attention(s) => {
            let (row, rows) = (u64::from(s.heads * s.head_dim), rows_of(s.rows));
            (rows * row * 8, 0, rows)
        }
        KernelSpec::RowTiles(s) => {
            let (tiled, rows) = (s.tiled(1).row_bytes(), rows_of(s.rows));
            (rows * 2 * tiled, 0, rows)
        }
        KernelSpec::Sample(s) => (u64::from(s.vocab) * 4, 0, 1),
        KernelSpec::Gather(s) => (t * u64::from(s.width) * (4 + s.ty.bytes() as u64), 0, t),
        KernelSpec::CacheAppend(s) => (t * u64::from(s.heads * s.head_dim * (4 + s.ty.bytes())), 0, t),
        KernelSpec::Rope(s) => {
            let rows = rows_of(s.rows);
            (rows * u64::from(s.heads * s.head_dim) * 8, 0, rows)
        }
        KernelSpec::RopeTable(s) => (t * u64::from(s.half) * 8, 0, t),
        // Of graphs over arrays, which GPUs have no kernels for.
        KernelSpec::Nest(_) | KernelSpec::Conv(_) => (0, 0, 0),
    }
}

/// Machine code of one kernel, or none.
#[derive(Default)]
struct Made {
    cubin: Vec<u8>,
    registers: u32,
    spills: u32,
}

/// NVRTC, when this build knows it and it is found.
struct Machine {
    #[cfg(feature = "cuda")]
    compiler: Option<super::nvrtc::Compiler>,
}

#[cfg(feature = "cuda")]
impl Machine {
    fn find() -> Machine {
        Machine { compiler: super::nvrtc::Compiler::find().ok() }
    }

    fn version(&self) -> (i32, i32) {
        self.compiler.map_or((0, 0), |c| c.version)
    }

    fn code(&self, symbol: &str, source: &str, gpu: &GpuDesc, store: &Store) -> Result<Made> {
        use quantc_ir::weights::Recipe;
        let Some(compiler) = self.compiler else { return Ok(Made::default()) };
        let (major, minor) = compiler.version;
        let options = format!("{} nvrtc {major}.{minor} {}", gpu.arch, blake3::hash(source.as_bytes()));
        let recipe = Recipe { step: "cubin", version: 1, options, inputs: vec![] };
        let digests = store.derive(&recipe, 2, &mut |out| {
            let cubin = compiler.compile(source, gpu)?;
            let usage = cubin.usage().into_iter().find(|u| u.kernel == symbol).unwrap_or_default();
            out[0].write(&cubin.bytes)?;
            out[1].write(format!("{} {}", usage.registers, usage.spills).as_bytes())
        })?;
        let usage = String::from_utf8_lossy(&store.read_blob(digests[1])?).into_owned();
        let mut numbers = usage.split(' ').map(|n| n.parse().unwrap_or(0));
        let (registers, spills) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        Ok(Made { cubin: store.read_blob(digests[0])?, registers, spills })
    }
}

#[cfg(not(feature = "cuda"))]
impl Machine {
    fn find() -> Machine {
        Machine {}
    }

    fn version(&self) -> (i32, i32) {
        (0, 0)
    }

    fn code(&self, _: &str, _: &str, _: &GpuDesc, _: &Store) -> Result<Made> {
        Ok(Made::default())
    }
}
