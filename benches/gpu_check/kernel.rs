//! Kernels that a machine with a GPU is asked about: what each computes, the template it comes from, and how it is packed.

use crate::ceilings::{self, Ceiling};
use quantc::ir::diag::{Diag, Result};
use quantc::ir::target::{GpuDesc, GpuTarget};
use quantc_codegen::cpu::attention::AttentionSpec;
use quantc_codegen::cpu::cache::CacheAppendSpec;
use quantc_codegen::cpu::gather::GatherSpec;
use quantc_codegen::cpu::rope::{RopeSpec, RopeTableSpec};
use quantc_codegen::cpu::row::RowSpec;
use quantc_codegen::cuda::attention::{AttentionCall, decode, prefill};
use quantc_codegen::cuda::cache::{self, AppendSpec};
use quantc_codegen::cuda::group::{self, GroupSpec, GroupTile};
use quantc_codegen::cuda::mixed::{self, MixedTile};
use quantc_codegen::cuda::nvrtc::Compiler;
use quantc_codegen::cuda::plan;
use quantc_codegen::cuda::row::{self, RowTile};
use quantc_codegen::cuda::sample::{self, SampleSpec};
use quantc_codegen::cuda::skinny::{self, SkinnyTile};
use quantc_codegen::cuda::tile::Kernel;
use quantc_codegen::cuda::tiles::rows::{self, RowTilesSpec};
use quantc_codegen::cuda::wide::{self, WideTile};
use quantc_codegen::cuda::{gather, plain, rope, text};
use quantc_codegen::spec::{MatmulSpec, Rows};
use quantc_runtime::format::{Gpu, GpuCode, GpuEntry, GpuKernel};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The file of kernels in a packed folder.
const KERNELS: &str = "kernels.cuda";

/// Its name of the target.
const TARGET: &str = "target.txt";

/// A kernel: a template and what it is given. Products of more rows than `rows` are not asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Asked {
    /// Products of few rows.
    Skinny(MatmulSpec),
    /// Products of many rows, by single warps.
    Wide(MatmulSpec),
    /// Products of many rows, by groups of warps from the weights of the two before.
    Mixed(MatmulSpec),
    /// Products of many rows, by groups of warps from tiles.
    Group {
        /// What is computed.
        spec: GroupSpec,
        /// Most rows.
        rows: u32,
    },
    /// Rows into tiles.
    Tiles(RowTilesSpec),
    /// Rows from rows.
    Row(RowSpec),
    /// Tables of rotations.
    RopeTable(RopeTableSpec),
    /// Rotated heads.
    Rope(RopeSpec),
    /// Rows of tables.
    Gather(GatherSpec),
    /// Rows into caches.
    Append(AppendSpec),
    /// The same, for caches that lie plainly.
    PlainAppend(CacheAppendSpec),
    /// Attention of few tokens.
    Decode {
        /// What is computed.
        call: AttentionCall,
        /// Most tokens.
        rows: u32,
        /// Most keys.
        context: u32,
    },
    /// Attention of many tokens.
    Prefill(AttentionCall),
    /// Attention over caches that lie plainly.
    PlainAttention(AttentionSpec),
    /// Tokens from logits.
    Sample(SampleSpec),
    /// What the device reaches.
    Ceiling(Ceiling),
}

impl Asked {
    /// The template's name.
    pub fn template(&self) -> &'static str {
        match self {
            Asked::Skinny(_) => "skinny",
            Asked::Wide(_) => "wide",
            Asked::Mixed(_) => "mixed",
            Asked::Group { .. } => "group",
            Asked::Tiles(_) => "tiles",
            Asked::Row(_) => "row",
            Asked::RopeTable(_) | Asked::Rope(_) => "rope",
            Asked::Gather(_) => "gather",
            Asked::Append(_) => "cache_append",
            Asked::PlainAppend(_) | Asked::PlainAttention(_) => "plain",
            Asked::Decode { .. } => "decode_attention",
            Asked::Prefill(_) => "prefill_attention",
            Asked::Sample(_) => "sample",
            Asked::Ceiling(_) => "ceiling",
        }
    }

    /// Tokens of a call whose kernel has `rows` rows: more where these are the last ones alone, which are wanted.
    pub fn tokens(&self, rows: u32) -> u32 {
        let counted = match self {
            Asked::Skinny(s) | Asked::Wide(s) | Asked::Mixed(s) => s.rows,
            Asked::Group { spec, .. } => spec.rows,
            Asked::Tiles(s) => s.rows,
            Asked::Row(s) => s.rows.sym,
            Asked::Rope(s) => s.rows,
            Asked::Decode { call, .. } | Asked::Prefill(call) => call.spec.rows,
            Asked::PlainAttention(s) => s.rows,
            Asked::Sample(_) => Rows::R,
            Asked::RopeTable(_)
            | Asked::Gather(_)
            | Asked::Append(_)
            | Asked::PlainAppend(_)
            | Asked::Ceiling(_) => Rows::T,
        };
        match counted {
            Rows::T => rows,
            Rows::R => rows + rows / 2 + 1,
        }
    }

    /// Whether a GPU has what the template needs.
    pub fn exists(&self, gpu: &GpuDesc) -> bool {
        match self {
            Asked::Mixed(_) | Asked::Group { .. } | Asked::Tiles(_) => gpu.arch == "sm_90a",
            Asked::Ceiling(ceiling) => ceiling.exists(gpu),
            _ => true,
        }
    }

    /// The kernel, called `name`.
    fn build(&self, name: &str, gpu: &GpuDesc) -> Result<Kernel> {
        match self {
            Asked::Skinny(s) => skinny::build(name, s, SkinnyTile::of(s, s.m.max, gpu)?),
            Asked::Wide(s) => wide::build(name, s, WideTile::of(s, gpu)?),
            Asked::Mixed(s) => mixed::build(name, s, MixedTile::of(s, s.m.max, gpu)?),
            Asked::Group { spec, rows } => group::build(name, spec, GroupTile::of(spec, *rows, gpu)?),
            Asked::Tiles(s) => rows::build(name, s),
            Asked::Row(s) => row::build(name, s, RowTile::of(s)),
            Asked::RopeTable(s) => rope::build_table(name, s),
            Asked::Rope(s) => rope::build(name, s),
            Asked::Gather(s) => gather::build(name, s),
            Asked::Append(s) => cache::build_append(name, s),
            Asked::PlainAppend(s) => plain::append(name, s),
            Asked::Decode { call, rows, context } => {
                decode::build(name, call, decode::DecodeTile::of(call, *rows, *context, gpu)?)
            }
            Asked::Prefill(call) => prefill::build(name, call, prefill::PrefillTile::of(call, gpu)?),
            Asked::PlainAttention(s) => plain::attention(name, s),
            Asked::Sample(s) => sample::build(name, s),
            Asked::Ceiling(ceiling) => Ok(ceilings::build(name, *ceiling, gpu)),
        }
    }
}

/// A kernel, ready to be loaded.
pub struct Ready {
    /// Code and spec.
    pub entry: GpuEntry,
    /// What it is.
    pub asked: Asked,
    /// What it does.
    pub kernel: Kernel,
    /// How it is launched.
    pub launch: GpuKernel,
}

/// A packed folder, read.
pub struct Packed {
    /// The class of GPUs.
    pub target: &'static GpuTarget,
    /// What loading a kernel takes.
    pub gpu: Gpu,
    /// The kernels.
    pub kernels: Vec<Ready>,
}

impl Packed {
    /// The kernel of what is asked, if the folder has it.
    pub fn find(&self, asked: &Asked) -> Option<&Ready> {
        self.kernels.iter().find(|k| k.asked == *asked)
    }
}

fn gpu_of(target: &GpuTarget) -> Gpu {
    Gpu {
        arch: target.gpu.arch.into(),
        page_rows: plan::PAGE,
        cuda: 0,
        kernels: vec![],
        sampler: String::new(),
    }
}

fn ready(asked: Asked, symbol: String, cubin: Vec<u8>, gpu: &GpuDesc) -> Result<Ready> {
    let kernel = asked.build(&symbol, gpu)?;
    let launch = plan::launch(&kernel, 0)?;
    let spec = serde_json::to_string(&asked).map_err(|e| Diag::bug(format!("a spec: {e}")))?;
    let source = if cubin.is_empty() { text::emit(&kernel) } else { String::new() };
    Ok(Ready { entry: GpuEntry { symbol, cubin, source, spec }, asked, kernel, launch })
}

/// Compiles kernels into a folder; where there is no NVRTC they stay text, which the GPU's machine then compiles.
pub fn pack(folder: &Path, target: &'static GpuTarget, wanted: Vec<Asked>) -> Result<()> {
    let mut unique: Vec<Asked> = vec![];
    for asked in wanted.into_iter().filter(|a| a.exists(&target.gpu)) {
        if !unique.contains(&asked) {
            unique.push(asked);
        }
    }
    let compiler = Compiler::find().ok();
    let compile = |(i, asked): (usize, Asked)| -> Result<GpuEntry> {
        let symbol = format!("{}_{i:03}", asked.template());
        let mut entry = ready(asked, symbol, vec![], &target.gpu)?.entry;
        if let Some(compiler) = compiler {
            entry.cubin = compiler.compile(&entry.source, &target.gpu)?.bytes;
            entry.source.clear();
        }
        Ok(entry)
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let numbered: Vec<(usize, Asked)> = unique.into_iter().enumerate().collect();
    let part = numbered.len().div_ceil(threads).max(1);
    let parts = std::thread::scope(|scope| {
        let start = |list: &[(usize, Asked)]| {
            let list = list.to_vec();
            scope.spawn(|| list.into_iter().map(compile).collect::<Result<Vec<_>>>())
        };
        let running: Vec<_> = numbered.chunks(part).map(start).collect();
        let ended = |thread: std::thread::ScopedJoinHandle<'_, Result<Vec<GpuEntry>>>| {
            thread.join().unwrap_or_else(|_| Err(Diag::bug("a thread that compiles panicked")))
        };
        running.into_iter().map(ended).collect::<Result<Vec<_>>>()
    });
    let entries: Vec<GpuEntry> = parts?.into_iter().flatten().collect();
    let (count, compiled) = (entries.len(), entries.iter().filter(|e| !e.cubin.is_empty()).count());
    std::fs::create_dir_all(folder).map_err(|e| crate::system(folder, &e))?;
    let bytes = GpuCode { kernels: entries }.encode_file();
    let at = folder.join(KERNELS);
    std::fs::write(&at, &bytes).map_err(|e| crate::system(&at, &e))?;
    let at = folder.join(TARGET);
    std::fs::write(&at, format!("{}\n", target.name)).map_err(|e| crate::system(&at, &e))?;
    println!("{count} kernels for {}, {compiled} of them machine code, {} bytes", target.name, bytes.len());
    Ok(())
}

/// Reads a packed folder, and of its kernels those that are wanted.
pub fn unpack(folder: &Path, wanted: &[Asked]) -> Result<Packed> {
    let at = folder.join(TARGET);
    let name = std::fs::read_to_string(&at)
        .map_err(|e| crate::system(&at, &e).help("`gpu-check pack` makes the folder"))?;
    let target =
        crate::gpu_target(name.trim()).map_err(|e| Diag::input(e).in_file(at.display().to_string()))?;
    let at = folder.join(KERNELS);
    let bytes = std::fs::read(&at).map_err(|e| crate::system(&at, &e))?;
    let place = |what: String| Diag::input(what).in_file(at.display().to_string());
    let code = GpuCode::decode_file(&bytes).map_err(|e| place(e.to_string()))?;
    let mut kernels = vec![];
    for entry in code.kernels {
        let asked: Asked = serde_json::from_str(&entry.spec)
            .map_err(|e| place(format!("the spec of {}: {e}", entry.symbol)))?;
        if wanted.contains(&asked) {
            kernels.push(ready(asked, entry.symbol, entry.cubin, &target.gpu)?);
        }
    }
    Ok(Packed { target, gpu: gpu_of(target), kernels })
}
