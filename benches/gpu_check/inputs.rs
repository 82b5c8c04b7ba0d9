//! Random inputs of kernels, in the order of their buffers.

use half::{bf16, f16};
use quantc::ir::diag::{Diag, Result};
use quantc_codegen::cpu::attention::KvSource;
use quantc_codegen::cuda::layout::FragmentLayout;
use quantc_codegen::cuda::mixed::MixedTile;
use quantc_codegen::cuda::plan::{self, Want};
use quantc_codegen::cuda::sample::RowOptions;
use quantc_codegen::cuda::tile::GroupKind;
use quantc_codegen::cuda::tiles::rows::{From, RowTilesSpec};
use quantc_codegen::eexpr::{EExpr, InputKind, MemTy, OutputKind};
use quantc_codegen::layout::WeightRows;
use quantc_codegen::spec::{AFmt, Code, KernelSpec, ScaleTy, Zero, bf16_row_stride, i8_row_stride};

/// Numbers that look random: Sebastiano Vigna's splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between -1 and 1.
    pub fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn numbers(&mut self, ty: MemTy, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count * ty.bytes());
        for _ in 0..count {
            match ty {
                MemTy::F32 => bytes.extend(self.float().to_le_bytes()),
                MemTy::F16 => bytes.extend(f16::from_f32(self.float()).to_le_bytes()),
                MemTy::Bf16 => bytes.extend(bf16::from_f32(self.float()).to_le_bytes()),
                MemTy::I8 => bytes.push(self.bits() as u8),
                MemTy::I32 => bytes.extend((self.bits() as i32 % 1000).to_le_bytes()),
            }
        }
        bytes
    }
}

/// One buffer.
pub enum Buffer {
    /// What a kernel reads.
    Given(Vec<u8>),
    /// What it writes: numbers of this type, `bytes` of them.
    Made { bytes: usize, ty: MemTy },
}

/// Weights at random.
struct Weights<'a> {
    random: &'a mut Random,
    code: Code,
}

impl WeightRows for Weights<'_> {
    fn rows(
        &mut self,
        _: u32,
        _: u32,
        codes: &mut [u8],
        scales: &mut [f32],
        zeros: &mut [i32],
    ) -> Result<()> {
        match self.code {
            Code::U4 | Code::Lut4 => codes.iter_mut().for_each(|c| *c = self.random.bits() as u8 & 15),
            Code::Bf16 => {
                let numbers = self.random.numbers(MemTy::Bf16, codes.len() / 2);
                codes.copy_from_slice(&numbers);
            }
            // Without the codes of small floats that are not numbers.
            Code::E4m3 | Code::E5m2 => codes.iter_mut().for_each(|c| *c = self.random.bits() as u8 & 0xbf),
            _ => codes.iter_mut().for_each(|c| *c = self.random.bits() as u8),
        }
        scales.iter_mut().for_each(|s| *s = 0.01 + self.random.float().abs() * 0.05);
        zeros.iter_mut().for_each(|z| *z = (self.random.bits() & 15) as i32);
        Ok(())
    }
}

fn integers(values: impl Iterator<Item = u32>) -> Buffer {
    Buffer::Given(values.flat_map(u32::to_le_bytes).collect())
}

/// Inputs and outputs of an expression over rows.
fn expression(random: &mut Random, e: &EExpr, rows: usize, cols: usize) -> Vec<Buffer> {
    let inputs = e.inputs.iter().map(|desc| {
        let count = match desc.kind {
            InputKind::Elem { stride } => rows * stride as usize,
            InputKind::Col => cols,
            InputKind::Row => rows,
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
        Buffer::Made { bytes: count * desc.ty.bytes(), ty: desc.ty }
    }));
    buffers
}

/// Buffers of a call of `m` rows. Tokens of a cache belong to two sequences, in pages that lie anywhere.
pub fn of(want: &Want, m: u32, random: &mut Random) -> Result<Vec<Buffer>> {
    let rows = m as usize;
    let first = 5u32;
    let half = m.div_ceil(2);
    let positions = || integers((0..m).map(|i| first + if i < half { i } else { i - half }));
    let slot = |i: u32| u32::from(i >= half);
    Ok(match &want.spec {
        KernelSpec::Matmul(s) | KernelSpec::TiledMatmul(s) => {
            let layout = FragmentLayout::of(s)?;
            let groups = s.groups() as usize;
            let k = s.k as usize;
            let mut buffers = match s.a {
                AFmt::Bf16 => {
                    vec![Buffer::Given(random.numbers(MemTy::Bf16, rows * bf16_row_stride(s.k) as usize))]
                }
                AFmt::I8Token => {
                    let stride = i8_row_stride(s.k) as usize;
                    let mut a = random.numbers(MemTy::I8, rows * stride);
                    let mut sums = vec![];
                    for row in a.chunks_exact_mut(stride) {
                        row[k..].fill(0);
                        let of_group = |g: &[u8]| g.iter().map(|&x| i32::from(x as i8)).sum::<i32>();
                        sums.extend(row[..k].chunks(s.w.group as usize).map(of_group));
                    }
                    debug_assert_eq!(sums.len(), rows * groups);
                    let scales =
                        (0..rows).flat_map(|_| (0.01 + random.float().abs()).to_le_bytes()).collect();
                    let sums = sums.into_iter().flat_map(i32::to_le_bytes).collect();
                    vec![Buffer::Given(a), Buffer::Given(scales), Buffer::Given(sums)]
                }
                AFmt::F32 => return Err(Diag::bug("products of f32 rows are in no table")),
            };
            if let KernelSpec::TiledMatmul(_) = &want.spec {
                let tiles = MixedTile::tokens_spec(s)?;
                buffers[0] = Buffer::Given(numbers_of_tiles(&tiles, m, random));
            }
            for _ in 0..s.products() {
                let mut blob = vec![];
                let mut weights = Weights { random, code: s.w.code };
                debug_assert!(s.w.scale != ScaleTy::None || s.w.zero == Zero::Sym(0));
                layout.pack(&mut weights, &mut |part| {
                    blob.extend_from_slice(part);
                    Ok(())
                })?;
                buffers.push(Buffer::Given(blob));
            }
            buffers.extend(expression(random, &s.epilogue, rows, s.n as usize));
            buffers
        }
        KernelSpec::Row(s) => expression(random, &s.body, rows * s.rows.per as usize, s.cols as usize),
        KernelSpec::RopeTable(s) => vec![
            positions(),
            Buffer::Given(
                (0..s.half).flat_map(|i| (1e4f32).powf(-(i as f32) / s.half as f32).to_le_bytes()).collect(),
            ),
            Buffer::Made { bytes: rows * s.half as usize * 8, ty: MemTy::F32 },
        ],
        KernelSpec::Rope(s) => vec![
            Buffer::Given(random.numbers(MemTy::F32, rows * s.x_stride as usize)),
            Buffer::Given(random.numbers(MemTy::F32, rows * s.rotary_dim as usize)),
            Buffer::Made { bytes: rows * s.out_stride as usize * 4, ty: MemTy::F32 },
        ],
        KernelSpec::Gather(s) => vec![
            integers((0..m).map(|_| random.bits() as u32 % s.table_rows)),
            Buffer::Given(random.numbers(s.ty, (s.table_rows * s.width) as usize)),
            Buffer::Made { bytes: rows * s.width as usize * 4, ty: MemTy::F32 },
        ],
        KernelSpec::RowTiles(s) => {
            let From::Same { stride } = s.from else {
                return Err(Diag::bug("tiles of floats are in no table"));
            };
            let ty = if s.kind == GroupKind::Bf16 { MemTy::Bf16 } else { MemTy::I8 };
            let rows = random.numbers(ty, rows * stride as usize / ty.bytes());
            let bytes = s.tiled(m).bytes() as usize;
            vec![Buffer::Given(rows), Buffer::Made { bytes, ty }]
        }
        KernelSpec::Sample(s) => {
            let options = (0..m).flat_map(|i| {
                let temperature = if i % 2 == 0 { 0.0 } else { 0.7 };
                RowOptions { temperature, top_k: 9, top_p: 0.8, seed: random.bits() as u32 }.to_bytes()
            });
            let options = options.collect();
            vec![
                Buffer::Given(random.numbers(MemTy::F32, rows * s.stride as usize)),
                Buffer::Given(options),
                Buffer::Made { bytes: rows * 4, ty: MemTy::I32 },
            ]
        }
        KernelSpec::Nest(_) | KernelSpec::Conv(_) => {
            return Err(Diag::bug("a kernel of a graph over arrays among those of GPUs"));
        }
        KernelSpec::CacheAppend(s) => {
            let state = plan::state_row_bytes(s.ty, s.heads, s.head_dim) as usize * 2 * s.slot_rows as usize;
            let ty = number_type(s.ty);
            let mut buffers = vec![
                Buffer::Given(random.numbers(MemTy::F32, rows * s.x_stride as usize)),
                positions(),
                integers((0..m).map(|i| slot(i) * s.slot_rows)),
                pages(s.slot_rows),
                Buffer::Made { bytes: state, ty },
            ];
            if s.ty.is_scaled() {
                buffers
                    .push(Buffer::Made { bytes: 2 * (s.slot_rows * s.heads) as usize * 4, ty: MemTy::F32 });
            }
            buffers
        }
        KernelSpec::Attention(s) => {
            let mut buffers = vec![Buffer::Given(random.numbers(MemTy::F32, rows * s.q_stride as usize))];
            match s.source {
                KvSource::Direct { stride } => {
                    for _ in 0..2 {
                        buffers.push(Buffer::Given(random.numbers(MemTy::F32, rows * stride as usize)));
                    }
                }
                KvSource::Cache { ty, slot_rows, .. } => {
                    let count =
                        plan::state_row_bytes(ty, s.kv_heads, s.head_dim) as usize * 2 * slot_rows as usize;
                    for _ in 0..2 {
                        let numbers = random.numbers(number_type(ty), count / ty.bytes() as usize);
                        // As above: no code that is not a number.
                        let keep = if ty == quantc_codegen::cpu::cache::CacheTy::E4m3 { 0xbf } else { 0xff };
                        buffers.push(Buffer::Given(numbers.into_iter().map(|b| b & keep).collect()));
                    }
                    buffers.extend([
                        positions(),
                        integers((0..m).map(|i| slot(i) * slot_rows)),
                        pages(slot_rows),
                    ]);
                    if ty.is_scaled() {
                        for _ in 0..2 {
                            let count = 2 * (slot_rows * s.kv_heads) as usize;
                            let scale = |_| (0.001 + random.float().abs() * 0.02).to_le_bytes();
                            buffers.push(Buffer::Given((0..count).flat_map(scale).collect()));
                        }
                    }
                }
            }
            buffers.push(Buffer::Made { bytes: rows * (s.heads * s.head_dim) as usize * 4, ty: MemTy::F32 });
            buffers
        }
    })
}

/// Tiles of so many rows, which are numbers at random.
fn numbers_of_tiles(spec: &RowTilesSpec, m: u32, random: &mut Random) -> Vec<u8> {
    let ty = if spec.kind == GroupKind::Bf16 { MemTy::Bf16 } else { MemTy::I8 };
    random.numbers(ty, spec.tiled(m).bytes() as usize / ty.bytes())
}

/// Pages of two slots, the last one first.
fn pages(slot_rows: u32) -> Buffer {
    let count = 2 * slot_rows / plan::PAGE;
    integers((0..count).rev())
}

fn number_type(ty: quantc_codegen::cpu::cache::CacheTy) -> MemTy {
    use quantc_codegen::cpu::cache::CacheTy;
    match ty {
        CacheTy::F32 => MemTy::F32,
        CacheTy::F16 => MemTy::F16,
        CacheTy::Bf16 => MemTy::Bf16,
        CacheTy::I8 | CacheTy::E4m3 => MemTy::I8,
    }
}
