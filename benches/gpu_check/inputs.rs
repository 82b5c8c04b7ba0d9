//! Random inputs of kernels, in the order of their buffers.

use crate::cublas::Numbers;
use crate::kernel::Asked;
use crate::random::{Num, Random, weights};
use quantc::ir::diag::{Diag, Result};
use quantc_codegen::cpu::attention::{AttentionSpec, KvSource};
use quantc_codegen::cpu::cache::{CacheAppendSpec, CacheTy};
use quantc_codegen::cpu::row::RowOffset;
use quantc_codegen::cuda::cache::PAGE;
use quantc_codegen::cuda::group::{GroupSpec, Scales};
use quantc_codegen::cuda::layout::FragmentLayout;
use quantc_codegen::cuda::mixed::MixedTile;
use quantc_codegen::cuda::plan;
use quantc_codegen::cuda::sample::RowOptions;
use quantc_codegen::cuda::tile::GroupKind;
use quantc_codegen::cuda::tiles::Tiled;
use quantc_codegen::cuda::tiles::rows::{From, RowTilesSpec};
use quantc_codegen::eexpr::{EExpr, InputKind, MemTy, OutputKind};
use quantc_codegen::layout::{Layout, Unpacked};
use quantc_codegen::spec::{AFmt, MatmulSpec, bf16_row_stride, i8_row_stride};

/// The first position of each sequence.
pub const FIRST: u32 = 5;

/// One buffer.
#[derive(Clone, Debug)]
pub enum Buffer {
    /// What a kernel reads.
    Given(Vec<u8>),
    /// What it writes.
    Made {
        /// Its size.
        bytes: usize,
        /// What it holds.
        num: Num,
    },
}

impl Buffer {
    /// Room for so many numbers.
    pub fn made(count: usize, num: Num) -> Buffer {
        Buffer::Made { bytes: count * num.bytes(), num }
    }

    /// The bytes that are given.
    pub fn given(&self) -> &[u8] {
        match self {
            Buffer::Given(bytes) => bytes,
            Buffer::Made { .. } => &[],
        }
    }
}

const F32: Num = Num::Of(MemTy::F32);

/// Arguments of a call, and what products multiply: rows `[m][k]` and each matrix `[n][k]` in f64.
pub struct Case {
    /// In the kernel's order.
    pub buffers: Vec<Buffer>,
    /// The rows of a product.
    pub x: Vec<f64>,
    /// Its matrices.
    pub w: Vec<Vec<f64>>,
}

impl Case {
    fn plain(buffers: Vec<Buffer>) -> Case {
        Case { buffers, x: vec![], w: vec![] }
    }
}

/// 32-bit integers as a buffer.
pub fn integers(values: impl Iterator<Item = u32>) -> Buffer {
    Buffer::Given(values.flat_map(u32::to_le_bytes).collect())
}

/// 32-bit floats as a buffer.
pub fn floats(values: impl IntoIterator<Item = f32>) -> Buffer {
    Buffer::Given(values.into_iter().flat_map(f32::to_le_bytes).collect())
}

/// Inputs and outputs of an expression over rows, where inputs have some more in front.
fn expression(random: &mut Random, e: &EExpr, before: usize, rows: usize, cols: usize) -> Vec<Buffer> {
    let inputs = e.inputs.iter().map(|desc| {
        let count = match desc.kind {
            InputKind::Elem { stride } => (before + rows) * stride as usize,
            InputKind::Col => cols,
            InputKind::Row => before + rows,
            InputKind::One => 1,
        };
        Buffer::Given(random.numbers(desc.ty, count))
    });
    let mut buffers: Vec<Buffer> = inputs.collect();
    buffers.extend(e.outputs.iter().map(|desc| {
        let count = match desc.kind {
            OutputKind::Elem { stride, .. } | OutputKind::GroupSums { stride, .. } => rows * stride as usize,
            OutputKind::Row => rows,
        };
        Buffer::made(count, Num::Of(desc.ty))
    }));
    buffers
}

/// Rows of activations: their buffers, and their values.
pub fn rows(random: &mut Random, spec: &MatmulSpec, m: u32) -> Result<(Vec<Buffer>, Vec<f64>)> {
    let k = spec.k as usize;
    match spec.a {
        AFmt::Bf16 => {
            let stride = bf16_row_stride(spec.k) as usize * 2;
            // What lies between rows is not zero: NaN.
            let mut bytes = vec![0xff; m as usize * stride];
            let mut values = vec![];
            for row in bytes.chunks_exact_mut(stride) {
                row[..k * 2].copy_from_slice(&random.numbers(MemTy::Bf16, k));
                values.extend(Num::Of(MemTy::Bf16).all(&row[..k * 2]));
            }
            Ok((vec![Buffer::Given(bytes)], values))
        }
        AFmt::I8Token => {
            let stride = i8_row_stride(spec.k) as usize;
            let mut bytes = random.numbers(MemTy::I8, m as usize * stride);
            let (mut scales, mut sums, mut values) = (vec![], vec![], vec![]);
            for row in bytes.chunks_exact_mut(stride) {
                row[k..].fill(0);
                let sum = |g: &[u8]| g.iter().map(|&x| i32::from(x as i8)).sum::<i32>() as u32;
                sums.extend(row[..k].chunks(spec.w.group as usize).map(sum));
                let scale = random.scale();
                scales.push(scale);
                values.extend(row[..k].iter().map(|&x| f64::from(x as i8) * f64::from(scale)));
            }
            let buffers = vec![Buffer::Given(bytes), floats(scales), integers(sums.into_iter())];
            Ok((buffers, values))
        }
        AFmt::F32 => Err(Diag::bug("products of f32 rows are in no table")),
    }
}

/// Rows as the tiles of the template that takes them so: what its own kernel makes of them.
pub fn tiles_of(spec: &RowTilesSpec, from: &[u8], m: u32) -> Result<Vec<u8>> {
    let From::Same { stride } = spec.from else { return Err(Diag::bug("tiles of the same numbers only")) };
    let tiled = Tiled { kind: spec.kind, rows: m, columns: spec.columns() };
    let size = (128 / spec.kind.columns()) as usize;
    let mut to = vec![0; tiled.bytes() as usize];
    for (row, at) in (0..m).flat_map(|row| (0..tiled.columns).map(move |at| (row, at))) {
        let column = spec.column(at);
        if column < spec.k {
            let from = &from[row as usize * stride as usize + column as usize * size..][..size];
            to[tiled.at(row, at) as usize..][..size].copy_from_slice(from);
        }
    }
    Ok(to)
}

/// A matrix as it is packed for warps.
pub fn packed(spec: &MatmulSpec, m: &Unpacked) -> Result<Vec<u8>> {
    let mut blob = vec![];
    FragmentLayout::of(spec)?.pack(&mut (&Layout::of(spec), m), &mut |part| {
        blob.extend_from_slice(part);
        Ok(())
    })?;
    Ok(blob)
}

fn product(random: &mut Random, spec: &MatmulSpec, m: u32, tiles: bool) -> Result<Case> {
    let (mut buffers, x) = rows(random, spec, m)?;
    if tiles {
        buffers[0] = Buffer::Given(tiles_of(&MixedTile::tokens_spec(spec)?, buffers[0].given(), m)?);
    }
    let mut w = vec![];
    for _ in 0..spec.products() {
        let matrix = random.matrix(spec.n, spec.k, spec.w);
        w.push(weights(&matrix, spec.n, spec.k, spec.w));
        buffers.push(Buffer::Given(packed(spec, &matrix)?));
    }
    buffers.extend(expression(random, &spec.epilogue, 0, m as usize, spec.n as usize));
    Ok(Case { buffers, x, w })
}

/// A matrix for groups: its blob, and its values.
pub fn group_weights(random: &mut Random, spec: &GroupSpec) -> Result<(Vec<u8>, Vec<f64>)> {
    let w = spec.weights();
    let mut m = random.matrix(spec.n, spec.k, w);
    if spec.scales == Scales::Blocks {
        let groups = spec.k.div_ceil(w.group) as usize;
        for row in 0..spec.n as usize {
            for g in 0..groups {
                m.scales[row * groups + g] = m.scales[row / 128 * 128 * groups + g];
            }
        }
    }
    Ok((spec.pack(&m)?, weights(&m, spec.n, spec.k, w)))
}

/// Rows for groups: their buffers, and their values.
pub fn group_rows(random: &mut Random, spec: &GroupSpec, m: u32) -> (Vec<Buffer>, Vec<f64>) {
    let tiled = Tiled { kind: spec.kind, rows: m, columns: spec.k };
    let blocks = spec.k.div_ceil(128);
    let scales: Vec<f32> = match spec.scales {
        Scales::None => vec![],
        Scales::Rows => (0..m).map(|_| random.scale()).collect(),
        Scales::Blocks => (0..m * blocks).map(|_| random.scale()).collect(),
    };
    let (numbers, num) = match spec.kind {
        GroupKind::Bf16 => (Numbers::Bf16, Num::Of(MemTy::Bf16)),
        GroupKind::S8 => (Numbers::Int8, Num::Of(MemTy::I8)),
        GroupKind::E4m3 => (Numbers::Fp8, Num::E4m3),
    };
    let mut tiles = vec![0; tiled.bytes() as usize];
    let (mut values, mut sums) = (vec![], vec![]);
    for row in 0..m {
        let bytes = random.operands(numbers, spec.k as usize * num.bytes());
        let mut sum = 0i32;
        for (column, code) in (0..).zip(bytes.chunks_exact(num.bytes())) {
            tiles[tiled.at(row, column) as usize..][..code.len()].copy_from_slice(code);
            let v = num.read(code);
            sum += v as i32;
            let scale = match spec.scales {
                Scales::None => 1.0,
                Scales::Rows => scales[row as usize],
                Scales::Blocks => scales[(row * blocks + column / 128) as usize],
            };
            values.push(v * f64::from(scale));
        }
        sums.push(sum as u32);
    }
    let mut buffers = vec![Buffer::Given(tiles)];
    if !scales.is_empty() {
        buffers.push(floats(scales));
    }
    if spec.zeros {
        buffers.push(integers(sums.into_iter()));
    }
    (buffers, values)
}

/// The sequence of a token of a call of `m`, and its position there: two sequences, one after the other.
pub fn place(m: u32, token: u32) -> (u32, u32) {
    let half = m.div_ceil(2);
    if token < half { (0, FIRST + token) } else { (1, FIRST + token - half) }
}

/// Positions, and where sequences begin.
fn places(m: u32, slot_rows: u32) -> [Buffer; 2] {
    [integers((0..m).map(|i| place(m, i).1)), integers((0..m).map(|i| place(m, i).0 * slot_rows))]
}

/// Pages of slots, the last one first.
pub fn pages(slots: u32, slot_rows: u32) -> Buffer {
    integers((0..slots * slot_rows / PAGE).rev())
}

/// What a cache holds.
pub fn cache_num(ty: CacheTy) -> Num {
    match ty {
        CacheTy::F32 => F32,
        CacheTy::F16 => Num::Of(MemTy::F16),
        CacheTy::Bf16 => Num::Of(MemTy::Bf16),
        CacheTy::I8 => Num::Of(MemTy::I8),
        CacheTy::E4m3 => Num::E4m3,
    }
}

/// Random numbers of a cache.
pub fn cache_numbers(random: &mut Random, ty: CacheTy, count: usize) -> Vec<u8> {
    match cache_num(ty) {
        Num::E4m3 => random.e4m3(count),
        Num::Of(ty) => random.numbers(ty, count),
    }
}

fn append(random: &mut Random, s: &CacheAppendSpec, table: Option<u32>, paged: bool, m: u32) -> Case {
    let rows = m as usize;
    let state = plan::state_row_bytes(s.ty, s.heads, s.head_dim) as usize * 2 * s.slot_rows as usize;
    let num = cache_num(s.ty);
    let mut buffers = vec![Buffer::Given(random.numbers(MemTy::F32, rows * s.x_stride as usize))];
    if let Some(width) = table {
        buffers.push(Buffer::Given(random.numbers(MemTy::F32, rows * width as usize)));
    }
    buffers.extend(places(m, s.slot_rows));
    if paged {
        buffers.push(pages(2, s.slot_rows));
    }
    buffers.push(Buffer::Made { bytes: state, num });
    if s.ty.is_scaled() {
        buffers.push(Buffer::made(2 * (s.slot_rows * s.heads) as usize, F32));
    }
    Case::plain(buffers)
}

fn attention(random: &mut Random, s: &AttentionSpec, paged: bool, m: u32, tokens: u32) -> Case {
    let rows = m as usize;
    // Queries large enough that some keys weigh more than others, and numbers that bf16 has.
    let queries = random.numbers(MemTy::Bf16, rows * s.q_stride as usize);
    let queries = Num::Of(MemTy::Bf16).all(&queries).into_iter().map(|x| 4.0 * x as f32);
    let mut buffers = vec![floats(queries)];
    match s.source {
        KvSource::Direct { stride } => {
            for _ in 0..2 {
                buffers.push(Buffer::Given(random.numbers(MemTy::F32, rows * stride as usize)));
            }
        }
        KvSource::Cache { ty, slot_rows, .. } => {
            let bytes = plan::state_row_bytes(ty, s.kv_heads, s.head_dim) as usize * 2 * slot_rows as usize;
            for _ in 0..2 {
                buffers.push(Buffer::Given(cache_numbers(random, ty, bytes / ty.bytes() as usize)));
            }
            buffers.extend(places(tokens, slot_rows));
            if paged {
                buffers.push(pages(2, slot_rows));
            }
            if ty.is_scaled() {
                for _ in 0..2 {
                    let count = 2 * slot_rows * s.kv_heads;
                    buffers.push(floats((0..count).map(|_| 0.001 + random.float().abs() * 0.02)));
                }
            }
        }
    }
    buffers.push(Buffer::made(rows * (s.heads * s.head_dim) as usize, F32));
    Case::plain(buffers)
}

/// Options of rows of logits: the largest in turn without and with a temperature, where it is the only one left.
fn options(m: u32) -> Vec<u8> {
    let row = |i: u32| match i % 2 {
        0 => RowOptions { temperature: 0.0, top_k: 0, top_p: 1.0, seed: i },
        _ => RowOptions { temperature: 0.7, top_k: 1, top_p: 1.0, seed: i },
    };
    (0..m).flat_map(|i| row(i).to_bytes()).collect()
}

/// Rows of inputs in front of those that outputs have.
pub fn skipped(asked: &Asked, m: u32) -> usize {
    match asked {
        Asked::Row(s) if s.row_offset == RowOffset::LastRows => (asked.tokens(m) - m) as usize,
        _ => 0,
    }
}

/// Buffers of a call of `m` rows. Tokens of a cache belong to two sequences, in pages that lie anywhere.
pub fn of(asked: &Asked, m: u32, random: &mut Random) -> Result<Case> {
    let rows = m as usize;
    Ok(match asked {
        Asked::Skinny(s) | Asked::Wide(s) => product(random, s, m, false)?,
        Asked::Mixed(s) => product(random, s, m, true)?,
        Asked::Group { spec, .. } => {
            let (mut buffers, x) = group_rows(random, spec, m);
            let mut w = vec![];
            for _ in 0..spec.products() {
                let (blob, values) = group_weights(random, spec)?;
                buffers.push(Buffer::Given(blob));
                w.push(values);
            }
            buffers.extend(expression(random, &spec.epilogue, 0, rows, spec.n as usize));
            Case { buffers, x, w }
        }
        Asked::Tiles(s) => {
            let tiled = Tiled { kind: s.kind, rows: m, columns: s.columns() };
            let num = match s.kind {
                GroupKind::Bf16 => Num::Of(MemTy::Bf16),
                GroupKind::S8 => Num::Of(MemTy::I8),
                GroupKind::E4m3 => Num::E4m3,
            };
            let mut buffers = match s.from {
                From::Same { stride } => {
                    let numbers = match s.kind {
                        GroupKind::Bf16 => Numbers::Bf16,
                        GroupKind::S8 => Numbers::Int8,
                        GroupKind::E4m3 => Numbers::Fp8,
                    };
                    vec![Buffer::Given(random.operands(numbers, rows * stride as usize))]
                }
                From::Floats { ty, stride, .. } => {
                    vec![Buffer::Given(random.numbers(ty, rows * stride as usize))]
                }
            };
            buffers.push(Buffer::Made { bytes: tiled.bytes() as usize, num });
            if let From::Floats { scales, sums, .. } = s.from {
                match scales {
                    Scales::None => {}
                    Scales::Rows => buffers.push(Buffer::made(rows, F32)),
                    Scales::Blocks => buffers.push(Buffer::made(rows * s.k.div_ceil(128) as usize, F32)),
                }
                if sums {
                    buffers.push(Buffer::made(rows, Num::Of(MemTy::I32)));
                }
            }
            Case::plain(buffers)
        }
        Asked::Row(s) => {
            let per = s.rows.per as usize;
            Case::plain(expression(random, &s.body, skipped(asked, m) * per, rows * per, s.cols as usize))
        }
        Asked::RopeTable(s) => {
            let frequency = |i: u32| 1e4f32.powf(-(i as f32) / s.half as f32);
            Case::plain(vec![
                integers((0..m).map(|i| place(m, i).1 * 1001)),
                floats((0..s.half).map(frequency)),
                Buffer::made(rows * s.half as usize * 2, F32),
            ])
        }
        Asked::Rope(s) => Case::plain(vec![
            Buffer::Given(random.numbers(MemTy::F32, rows * s.x_stride as usize)),
            Buffer::Given(random.numbers(MemTy::F32, rows * s.rotary_dim as usize)),
            Buffer::made(rows * s.out_stride as usize, F32),
        ]),
        Asked::Gather(s) => {
            let mut buffers = vec![
                integers((0..m).map(|_| random.below(s.table_rows))),
                Buffer::Given(random.numbers(s.ty, (s.table_rows * s.width) as usize)),
            ];
            if s.ty == MemTy::I8 {
                buffers.push(floats((0..s.table_rows).map(|_| random.scale())));
            }
            buffers.push(Buffer::made(rows * s.width as usize, F32));
            Case::plain(buffers)
        }
        Asked::Append(s) => append(random, &s.rows, s.rotation.map(|r| r.rotary_dim), s.paged, m),
        Asked::PlainAppend(s) => append(random, s, None, true, m),
        Asked::Decode { call, .. } | Asked::Prefill(call) => {
            attention(random, &call.spec, call.paged, m, asked.tokens(m))
        }
        Asked::PlainAttention(s) => {
            attention(random, s, matches!(s.source, KvSource::Cache { .. }), m, asked.tokens(m))
        }
        Asked::Sample(s) => Case::plain(vec![
            Buffer::Given(random.numbers(MemTy::F32, rows * s.stride as usize)),
            Buffer::Given(options(m)),
            Buffer::made(rows, Num::Of(MemTy::I32)),
        ]),
        Asked::Ceiling(_) => return Err(Diag::bug("ceilings are measured, not compared")),
    })
}
