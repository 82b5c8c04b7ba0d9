//! Products of many tokens by groups of four warps, on GPUs whose groups multiply from shared memory (sm_90a).
//!
//! A block computes 64 tokens for each of its groups, by some output columns. Tokens and weights come as tiles
//! ([`super::tiles`]), which one thread of one more group copies, some stages ahead; the other groups do nothing but
//! multiply, and write their results from registers. Two barriers a stage tell that it is full, and that it is free.
//!
//! Sums of bytes are integers until the end. Sums of codes with scales for blocks of 128 columns are of one block each;
//! they are scaled and added outside. So may be those of e4m3, whose sums a GPU keeps with fewer bits than f32 has
//! (`apart`).
//!
//! Buffers: the tokens' tiles; with scales those of the tokens, `f32[m]`, of blocks `f32[m][blocks]`; with zero points the
//! sums of the tokens' bytes, `i32[m]`; each matrix as [`GroupLayout`] stores it; inputs and outputs of the epilogue.
//! Scalars: `t` and `r`. Grid: columns are blocks of output columns, rows blocks of tokens; no workspace. Shared memory
//! must begin at a multiple of 1024.

use super::expr::{At, Frame, wide};
use super::product::plus;
use super::tile::{
    Access, Binary, Builder, Extent, GroupKind, Kernel, Mem, Reg, Ternary, Ty, Unary, Val, WARP,
};
use super::tiles::{ROWS, TILE_BYTES, Tiled};
use crate::cpu::math::Lanes;
use crate::eexpr::{EExpr, Place};
use crate::layout::{Layout, Order, Unpacked, WeightRows};
use crate::spec::{AFmt, Code, MatmulSpec, Rows, ScaleTy, WFmt, Zero};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::GpuDesc;
use serde::{Deserialize, Serialize};

/// Columns of a block of scales, and its rows of weights.
pub const BLOCK: u32 = 128;

/// Which numbers share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scales {
    /// There are none.
    None,
    /// Each token has one, and each output column.
    Rows,
    /// Each token has one for every 128 columns, and each 128 by 128 weights.
    Blocks,
}

/// `out[m][n] = epilogue(sum over k of a[m][k] * w[n][k])`, for one or more `w`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GroupSpec {
    /// Output columns.
    pub n: u32,
    /// Length of the sums.
    pub k: u32,
    /// Which of the scalars counts tokens.
    pub rows: Rows,
    /// What is multiplied.
    pub kind: GroupKind,
    /// What scales there are.
    pub scales: Scales,
    /// Whether each row of weights has a zero point; of bytes with one scale a row.
    pub zeros: bool,
    /// What happens to the sums.
    pub epilogue: EExpr,
}

impl GroupSpec {
    /// The spec of a product, or what about it these kernels do not do.
    pub fn of(spec: &MatmulSpec) -> Result<GroupSpec> {
        let WFmt { code, group, zero, scale } = spec.w;
        let per_row = group >= spec.k;
        let (kind, scales, zeros) = match (spec.a, code) {
            (AFmt::Bf16, Code::Bf16) if scale == ScaleTy::None => (GroupKind::Bf16, Scales::None, false),
            (AFmt::I8Token, Code::U8) if per_row => (GroupKind::S8, Scales::Rows, zero != Zero::Sym(128)),
            _ => {
                return Err(Diag::target(format!(
                    "weights of {} with {} have no kernel of groups of warps",
                    code.name(),
                    if per_row { "one scale a row".into() } else { format!("scales of {group} columns") }
                ))
                .help("bf16 weights have one with bf16 rows, int8 weights with a scale for each row one with int8 rows"));
            }
        };
        let (n, k, rows) = (spec.n, spec.k, spec.rows);
        Ok(GroupSpec { n, k, rows, kind, scales, zeros, epilogue: spec.epilogue.clone() })
    }

    /// Products of the same tokens.
    pub fn products(&self) -> u32 {
        self.epilogue.products()
    }

    /// Refuses what means nothing.
    pub fn check(&self) -> Result<()> {
        let refuse =
            |why: &str| Err(Diag::bug(format!("a product of groups, n {} k {}: {why}", self.n, self.k)));
        if self.n == 0 || self.k == 0 || self.products() == 0 {
            return refuse("nothing to compute");
        }
        let scaled = self.scales != Scales::None;
        if scaled == (self.kind == GroupKind::Bf16) {
            return refuse("codes have scales, and bf16 has none");
        }
        if self.zeros && (self.kind, self.scales) != (GroupKind::S8, Scales::Rows) {
            return refuse("zero points belong to bytes with a scale for each row");
        }
        self.epilogue.check(Place::Epilogue).map_err(|e| Diag::bug(format!("a product of groups: {e}")))
    }

    /// The format that its matrices come in.
    pub fn weights(&self) -> WFmt {
        let code = match self.kind {
            GroupKind::Bf16 => Code::Bf16,
            GroupKind::S8 => Code::U8,
            GroupKind::E4m3 => Code::E4m3,
        };
        let (group, scale) = match self.scales {
            Scales::None => (self.k, ScaleTy::None),
            Scales::Rows => (self.k, ScaleTy::F32),
            Scales::Blocks => (BLOCK.min(self.k), ScaleTy::F32),
        };
        let zero = match self.kind {
            GroupKind::S8 if self.zeros => Zero::Asym,
            GroupKind::S8 => Zero::Sym(128),
            _ => Zero::Sym(0),
        };
        WFmt { code, group, zero, scale }
    }

    /// How a matrix lies.
    pub fn layout(&self) -> GroupLayout {
        let tiles = Tiled { kind: self.kind, rows: self.n, columns: self.k };
        GroupLayout { tiles, scales: self.scales, zeros: self.zeros }
    }

    /// The blob of a matrix.
    pub fn pack(&self, matrix: &Unpacked) -> Result<Vec<u8>> {
        let w = self.weights();
        let rows = Layout { n: self.n, k: self.k, w, order: Order::Quads };
        let mut blob = vec![];
        self.layout().pack(w, &mut (&rows, matrix), &mut |part| {
            blob.extend_from_slice(part);
            Ok(())
        })?;
        Ok(blob)
    }
}

/// A matrix of weights: tiles, then its scales as f32, then its zero points as bytes. Bytes are stored as two's complement
/// around 128. Scales of blocks lie row of blocks by row of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupLayout {
    /// The numbers.
    pub tiles: Tiled,
    /// What scales there are.
    pub scales: Scales,
    /// Whether there are zero points.
    pub zeros: bool,
}

impl GroupLayout {
    /// Blocks of scales side by side.
    pub fn blocks(&self) -> u32 {
        self.tiles.columns.div_ceil(BLOCK)
    }

    /// The first byte of the scales.
    pub fn scales_at(&self) -> u64 {
        self.tiles.bytes()
    }

    fn scale_count(&self) -> u32 {
        match self.scales {
            Scales::None => 0,
            Scales::Rows => self.tiles.rows,
            Scales::Blocks => self.tiles.rows.div_ceil(BLOCK) * self.blocks(),
        }
    }

    /// The first byte of the zero points.
    pub fn zeros_at(&self) -> u64 {
        self.scales_at() + u64::from(self.scale_count()) * 4
    }

    /// Bytes of the blob.
    pub fn bytes(&self) -> u64 {
        (self.zeros_at() + if self.zeros { u64::from(self.tiles.rows) } else { 0 }).next_multiple_of(16)
    }

    /// Packs a matrix, given in the format `w`, and hands the blob to `out`, band by band.
    pub fn pack(
        &self,
        w: WFmt,
        rows: &mut dyn WeightRows,
        out: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let Tiled { rows: n, columns: k, .. } = self.tiles;
        let bytes = w.code.source_bytes();
        let groups = k.div_ceil(w.group) as usize;
        let flip = if w.code == Code::U8 { 0x80 } else { 0 };
        let first = Tiled { rows: ROWS, ..self.tiles };
        let mut band = vec![0; first.bytes() as usize];
        let (mut tail, mut zero_points) = (vec![], vec![]);
        for from in (0..n).step_by(ROWS as usize) {
            let count = ROWS.min(n - from) as usize;
            let mut codes = vec![0; count * k as usize * bytes];
            let mut scales = vec![0.0; if w.scale == ScaleTy::None { 0 } else { count * groups }];
            let mut zeros = vec![0; if w.zero == Zero::Asym { count * groups } else { 0 }];
            rows.rows(from, count as u32, &mut codes, &mut scales, &mut zeros)?;
            band.fill(0);
            for (row, line) in (0..).zip(codes.chunks_exact(k as usize * bytes)) {
                for (column, code) in (0..).zip(line.chunks_exact(bytes)) {
                    let at = first.at(row, column) as usize;
                    band[at..at + bytes].copy_from_slice(code);
                    band[at] ^= flip;
                }
            }
            out(&band)?;
            match self.scales {
                Scales::None => {}
                Scales::Rows => tail.extend(scales.iter().flat_map(|s| s.to_le_bytes())),
                Scales::Blocks => {
                    for (row, line) in (from..).zip(scales.chunks_exact(groups)) {
                        let own: Vec<u8> = line.iter().flat_map(|s| s.to_le_bytes()).collect();
                        if row % BLOCK == 0 {
                            tail.extend(own);
                        } else if !tail.ends_with(&own) {
                            return Err(Diag::bug(format!("row {row} has other scales than its block")));
                        }
                    }
                }
            }
            if self.zeros {
                match w.zero {
                    Zero::Sym(z) => zero_points.extend(std::iter::repeat_n(z, count)),
                    Zero::Asym => zero_points.extend(zeros.iter().map(|&z| z as u8)),
                }
            }
        }
        tail.extend(zero_points);
        tail.resize((self.bytes() - self.scales_at()) as usize, 0);
        if tail.is_empty() { Ok(()) } else { out(&tail) }
    }
}

/// How a product is cut.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct GroupTile {
    /// Groups that multiply, 1 or 2, of 64 tokens each.
    pub groups: u32,
    /// Output columns of a block, of each product: a multiple of 64, of all products at most 256.
    pub columns: u32,
    /// Stages in shared memory, at least 2.
    pub stages: u32,
    /// Whether sums of a stage are added outside; always so with scales of blocks.
    pub apart: bool,
}

/// Threads of a group.
const GROUP: u32 = 4 * WARP;

/// Registers of a thread that copies, and of one that multiplies, where two groups do.
const REGISTERS: [u32; 2] = [40, 232];

impl GroupTile {
    /// The tile for calls of up to `m` tokens on a GPU.
    pub fn of(spec: &GroupSpec, m: u32, gpu: &GpuDesc) -> Result<GroupTile> {
        if gpu.arch != "sm_90a" {
            return Err(Diag::target(format!("groups of warps do not multiply on {}", gpu.arch))
                .help("they do on sm_90a"));
        }
        let apart = spec.scales == Scales::Blocks || spec.kind == GroupKind::E4m3;
        let groups = if m <= ROWS { 1 } else { 2 };
        let most = 256 / spec.products() / if apart { 2 } else { 1 };
        let columns = [256, 128, 64].into_iter().find(|c| *c <= most && (*c == 64 || spec.n >= 2 * c));
        let tile = GroupTile { groups, columns: columns.unwrap_or(64), stages: 2, apart };
        let stages = (gpu.shared_bytes - BARRIERS) / tile.stage_bytes(spec);
        Ok(GroupTile { stages: stages.min(MOST_STAGES), ..tile })
    }

    fn stage_bytes(&self, spec: &GroupSpec) -> u32 {
        (self.groups + spec.products() * self.columns / ROWS) * TILE_BYTES
    }

    fn check(&self, spec: &GroupSpec) -> Result<()> {
        let sums = spec.products() * self.columns * if self.apart { 2 } else { 1 };
        let blocks = spec.scales != Scales::Blocks || (self.apart && BLOCK.is_multiple_of(self.columns));
        let integers = spec.kind != GroupKind::S8 || spec.scales == Scales::Blocks || !self.apart;
        let good = matches!(self.groups, 1 | 2)
            && self.columns > 0
            && self.columns.is_multiple_of(ROWS)
            && sums <= 256
            && (2..=MOST_STAGES).contains(&self.stages);
        match good && blocks && integers {
            true => Ok(()),
            false => Err(Diag::bug(format!("no such cut of a product: {self:?}"))),
        }
    }
}

/// Most stages: their barriers have room in [`BARRIERS`] bytes.
const MOST_STAGES: u32 = 8;

/// Bytes of all barriers, a multiple of 1024 so that tiles begin at one.
const BARRIERS: u32 = 1024;

/// The kernel of `spec`, called `name`.
pub fn build(name: &str, spec: &GroupSpec, tile: GroupTile) -> Result<Kernel> {
    spec.check()?;
    tile.check(spec)?;
    let threads = (tile.groups + 1) * GROUP;
    let mut b = Builder::new(name, threads);
    let a = b.buffer("a", Access::Read);
    let scales = (spec.scales != Scales::None).then(|| b.buffer("a_scale", Access::Read));
    let sums = spec.zeros.then(|| b.buffer("a_sums", Access::Read));
    let weights: Vec<Mem> = (0..spec.products()).map(|i| b.buffer(&format!("w{i}"), Access::Read)).collect();
    let frame = Frame::declare(&mut b, &spec.epilogue, true);
    b.scalar("t");
    b.scalar("r");
    let rows = Extent::PerScalar { scalar: spec.rows.dim(), times: 1, per: tile.groups * ROWS };
    b.grid(Extent::Fixed(spec.n.div_ceil(tile.columns)), rows);
    let at = b.shared(BARRIERS + tile.stages * tile.stage_bytes(spec));
    debug_assert_eq!(at, 0);
    let m = b.scalar_value(spec.rows.dim());
    let (x, y, thread) = (b.block_x(), b.block_y(), b.thread());
    let cx = Product { spec, tile, layout: spec.layout(), a, scales, sums, weights, frame, m, x, y };

    let first = b.lt(thread, 1);
    b.when(first, |b| {
        for stage in 0..tile.stages {
            let at = full(stage.into(), b);
            b.bar_init(at, 1);
            let at = free(stage.into(), b);
            b.bar_init(at, tile.groups * 4);
        }
        b.bar_fence();
    });
    b.barrier();
    let copies = b.lt(thread, GROUP);
    b.either(
        copies,
        |b| {
            if tile.groups == 2 {
                b.registers(REGISTERS[0], false);
            }
            b.when(first, |b| cx.copy(b));
        },
        |b| {
            if tile.groups == 2 {
                b.registers(REGISTERS[1], true);
            }
            cx.multiply(b, thread);
        },
    );
    Ok(b.finish())
}

/// The barrier that tells that a stage is full.
fn full(stage: Val, b: &mut Builder) -> Val {
    b.mul(stage, 16)
}

/// The barrier that tells that a stage is free.
fn free(stage: Val, b: &mut Builder) -> Val {
    b.mad(stage, 16, 8)
}

struct Product<'a> {
    spec: &'a GroupSpec,
    tile: GroupTile,
    layout: GroupLayout,
    a: Mem,
    scales: Option<Mem>,
    sums: Option<Mem>,
    weights: Vec<Mem>,
    frame: Frame<'a>,
    /// Tokens of the call.
    m: Val,
    /// The block's number among blocks of output columns, and of tokens.
    x: Val,
    y: Val,
}

/// Which stage is next, and the parity of the phase in which it is filled.
#[derive(Clone, Copy)]
struct Ring {
    stage: Reg,
    parity: Reg,
    stages: u32,
}

impl Ring {
    fn new(b: &mut Builder, stages: u32) -> Ring {
        Ring { stage: b.var(0), parity: b.var(0), stages }
    }

    fn turn(self, b: &mut Builder) {
        let next = b.add(self.stage, 1);
        let inside = b.lt(next, self.stages);
        let stage = b.select(inside, next, 0);
        let other = b.binary(Binary::Xor, self.parity, 1);
        let parity = b.select(inside, self.parity, other);
        b.set(self.stage, stage);
        b.set(self.parity, parity);
    }
}

impl Product<'_> {
    /// Stages of the sums.
    fn count(&self) -> u32 {
        self.layout.tiles.across()
    }

    fn stage_at(&self, b: &mut Builder, stage: Val) -> Val {
        b.mad(stage, self.tile.stage_bytes(self.spec), BARRIERS)
    }

    /// What the thread that copies does.
    fn copy(&self, b: &mut Builder) {
        let across = self.count();
        let start = |b: &mut Builder, tile: Val, count: Val| {
            let last = b.binary(Binary::Sub, count, 1);
            let tile = b.binary(Binary::Min, tile, last);
            let zero = b.unary(Unary::Widen, 0);
            b.ternary(Ternary::MulWide, tile, across * TILE_BYTES, zero)
        };
        let down = b.add(self.m, ROWS - 1);
        let down = b.div(down, ROWS);
        let mut tiles = vec![];
        for i in 0..self.tile.groups {
            let tile = b.mad(self.y, self.tile.groups, i);
            tiles.push((self.a, start(b, tile, down)));
        }
        let per_block = self.tile.columns / ROWS;
        for &w in &self.weights {
            for i in 0..per_block {
                let tile = b.mad(self.x, per_block, i);
                tiles.push((w, start(b, tile, self.layout.tiles.down().into())));
            }
        }
        let ring = Ring::new(b, self.tile.stages);
        b.repeat(0, across, 1, |b, number| {
            // Before the first round all stages are free.
            let before = b.binary(Binary::Xor, ring.parity, 1);
            let free = free(ring.stage.into(), b);
            b.bar_wait(free, before);
            let full = full(ring.stage.into(), b);
            b.bar_expect(full, self.tile.stage_bytes(self.spec));
            let to = self.stage_at(b, ring.stage.into());
            let column = b.mul(number, TILE_BYTES);
            for (i, &(mem, start)) in (0..).zip(&tiles) {
                let from = plus(b, start, column);
                let to = b.add(to, i * TILE_BYTES);
                b.bulk_copy(to, mem, from, TILE_BYTES, full);
            }
            ring.turn(b);
        });
    }

    fn is_integer(&self) -> bool {
        self.spec.kind == GroupKind::S8 && !self.tile.apart
    }

    /// What groups that multiply do.
    fn multiply(&self, b: &mut Builder, thread: Val) {
        let products = self.spec.products();
        let count = products * self.tile.columns / 2;
        let integer = self.spec.kind == GroupKind::S8;
        let zeros = |b: &mut Builder, integer: bool| -> Vec<Reg> {
            (0..count).map(|_| if integer { b.var(0) } else { b.var(0.0) }).collect()
        };
        let acc = zeros(b, self.is_integer());
        // What a stage adds, where it is added outside.
        let sub = if self.tile.apart { zeros(b, integer) } else { vec![] };
        let to = if self.tile.apart { &sub } else { &acc };
        let group = b.div(thread, GROUP);
        let group = b.binary(Binary::Sub, group, 1);
        let lane = b.rem(thread, WARP);
        let speaks = b.lt(lane, 1);
        let place = self.place(b, thread, group);
        let ring = Ring::new(b, self.tile.stages);
        let before = b.var(0);
        b.repeat(0, self.count(), 1, |b, number| {
            let factors = (self.spec.scales == Scales::Blocks).then(|| self.block_scales(b, &place, number));
            let full = full(ring.stage.into(), b);
            b.bar_wait(full, ring.parity);
            let stage = self.stage_at(b, ring.stage.into());
            let left = b.mad(group, TILE_BYTES, stage);
            let right = b.add(stage, self.tile.groups * TILE_BYTES);
            b.group_fence();
            for i in 0..4 {
                let left = b.add(left, 32 * i);
                for (p, acc) in (0..).zip(to.chunks((self.tile.columns / 2) as usize)) {
                    let right = b.add(right, p * self.tile.columns / ROWS * TILE_BYTES + 32 * i);
                    b.group_mma(self.spec.kind, acc, left, right, self.tile.apart && i == 0);
                }
            }
            b.group_commit();
            let release = |b: &mut Builder, stage: Val, p: Val| {
                b.when(p, |b| {
                    let free = free(stage, b);
                    b.bar_arrive(free);
                });
            };
            if self.tile.apart {
                b.group_wait(0, &sub);
                release(b, ring.stage.into(), speaks);
                self.add_apart(b, &acc, &sub, factors.as_deref());
            } else {
                // The products of the stage before are through.
                b.group_wait(1, &[]);
                let any = b.lt(0, number);
                let speaks = b.binary(Binary::PAnd, any, speaks);
                release(b, before.into(), speaks);
                b.set(before, ring.stage);
            }
            ring.turn(b);
        });
        if !self.tile.apart {
            b.group_wait(0, &acc);
        }
        self.results(b, &place, &acc);
    }

    /// Adds the sums of a stage; `factors` are those of rows g and g + 8 for each product.
    fn add_apart(&self, b: &mut Builder, acc: &[Reg], sub: &[Reg], factors: Option<&[[Val; 2]]>) {
        let per_product = (self.tile.columns / 2) as usize;
        for (i, (&acc, &sub)) in acc.iter().zip(sub).enumerate() {
            let mut v: Val = sub.into();
            if self.spec.kind == GroupKind::S8 {
                v = b.unary(Unary::IntToFloat, v);
            }
            let next = match factors {
                Some(factors) => b.mul_add(v, factors[i / per_product][i % 4 / 2], acc.into()),
                None => Lanes::add(b, acc.into(), v),
            };
            b.set(acc, next);
        }
    }

    /// Where a lane's sums are.
    fn place(&self, b: &mut Builder, thread: Val, group: Val) -> Corner {
        let (warp, lane) = (b.div(thread, WARP), b.rem(thread, WARP));
        let warp = b.rem(warp, 4);
        let (g, t) = (b.div(lane, 4), b.rem(lane, 4));
        let tile = b.mad(self.y, self.tile.groups, group);
        let first = b.mul(tile, ROWS);
        let first = b.mad(warp, 16, first);
        let row = b.add(first, g);
        let rows = [row, b.add(row, 8)].map(|row| {
            let there = b.lt(row, self.m);
            let last = b.binary(Binary::Sub, self.m, 1);
            (b.binary(Binary::Min, row, last), there)
        });
        let first = b.mul(self.x, self.tile.columns);
        Corner { rows, column: b.mad(t, 2, first) }
    }

    /// The factors of a block of columns.
    fn block_scales(&self, b: &mut Builder, place: &Corner, number: Val) -> Vec<[Val; 2]> {
        let Some(scales) = self.scales else { unreachable!("blocks have scales") };
        let blocks = self.layout.blocks();
        let in_row = b.mul(number, 4);
        let of_rows = place.rows.map(|(row, _)| {
            let at = wide(b, row, blocks * 4, in_row);
            let word = b.load(scales, at, 4)[0];
            b.unary(Unary::FromBits, word)
        });
        let band = b.mul(self.x, self.tile.columns);
        let band = b.div(band, BLOCK);
        let mut list = vec![];
        for &w in &self.weights {
            let at = wide(b, band, blocks * 4, in_row);
            let at = self.tail(b, at, self.layout.scales_at());
            let word = b.load(w, at, 4)[0];
            let scale = b.unary(Unary::FromBits, word);
            list.push(of_rows.map(|row| Lanes::mul(b, row, scale)));
        }
        list
    }

    /// A byte after the tiles of a matrix: `first` is where what it belongs to begins, `at` the byte in there.
    fn tail(&self, b: &mut Builder, at: Val, first: u64) -> Val {
        let tiles = self.layout.tiles;
        let rest = b.unary(Unary::Widen, (first - tiles.bytes()) as u32);
        let at = plus_wide(b, rest, at);
        b.ternary(Ternary::MulWide, tiles.down(), tiles.across() * TILE_BYTES, at)
    }

    /// Scales, corrects and stores.
    fn results(&self, b: &mut Builder, place: &Corner, acc: &[Reg]) {
        let width = if self.spec.n.is_multiple_of(2) { 2 } else { 1 };
        let per_row = self.spec.scales == Scales::Rows;
        let of_row = |b: &mut Builder, mem: Option<Mem>, row: Val| {
            mem.map(|mem| {
                let at = b.mul(row, 4);
                b.load(mem, at, 4)[0]
            })
        };
        let rows = place.rows.map(|(row, there)| {
            let scale = of_row(b, self.scales.filter(|_| per_row), row).map(|w| b.unary(Unary::FromBits, w));
            (row, there, scale, of_row(b, self.sums, row))
        });
        let sums_each = (self.tile.columns / 2) as usize;
        for j in 0..self.tile.columns / 8 {
            for part in 0..2 / width {
                let col = b.add(place.column, 8 * j + part);
                let inside = b.lt(col, self.spec.n);
                b.when(inside, |b| {
                    let of_columns: Vec<_> = (0..self.weights.len())
                        .map(|p| (0..width).map(|e| self.of_column(b, p, col, e)).collect::<Vec<_>>())
                        .collect();
                    for (half, &(row, there, scale, sum)) in rows.iter().enumerate() {
                        b.when(there, |b| {
                            let mut accs = vec![];
                            for (p, of_columns) in of_columns.iter().enumerate() {
                                let first = p * sums_each + 4 * j as usize + 2 * half + part as usize;
                                let own = acc[first..].iter().zip(of_columns);
                                let values: Vec<Val> = own
                                    .map(|(&v, &of_column)| self.scaled(b, v.into(), scale, sum, of_column))
                                    .collect();
                                accs.push(values);
                            }
                            let at = At { row, out_row: row, col, width };
                            let mut known = self.frame.nothing();
                            for store in &self.frame.expr().stores {
                                let values = self.frame.values(b, store.node, &at, &accs, &mut known);
                                self.frame.store(b, store, &at, &values);
                            }
                        });
                    }
                });
            }
        }
    }

    /// The scale and the zero point of an output column.
    fn of_column(&self, b: &mut Builder, product: usize, col: Val, plus: u32) -> (Option<Val>, Option<Val>) {
        let col = b.add(col, plus);
        let w = self.weights[product];
        let scale = (self.spec.scales == Scales::Rows).then(|| {
            let at = b.mul(col, 4);
            let at = self.tail(b, at, self.layout.scales_at());
            let word = b.load(w, at, 4)[0];
            b.unary(Unary::FromBits, word)
        });
        let zero = self.spec.zeros.then(|| {
            let at = self.tail(b, col, self.layout.zeros_at());
            b.load(w, at, 1)[0]
        });
        (scale, zero)
    }

    /// A finished sum.
    fn scaled(
        &self,
        b: &mut Builder,
        mut v: Val,
        row_scale: Option<Val>,
        row_sum: Option<Val>,
        (scale, zero): (Option<Val>, Option<Val>),
    ) -> Val {
        if let (Some(zero), Some(sum)) = (zero, row_sum) {
            let zero = b.binary(Binary::Sub, zero, 128);
            let put_in = b.mul(zero, sum);
            v = b.binary(Binary::Sub, v, put_in);
        }
        if self.is_integer() {
            v = b.unary(Unary::IntToFloat, v);
        }
        for scale in [scale, row_scale].into_iter().flatten() {
            v = Lanes::mul(b, v, scale);
        }
        v
    }
}

/// Where a lane's sums are: the tokens of its two rows, and whether they are there; its first output column.
struct Corner {
    rows: [(Val, Val); 2],
    column: Val,
}

/// The sum of a wide offset and one of either width.
fn plus_wide(b: &mut Builder, wide: Val, at: Val) -> Val {
    if b.ty(at) == Ty::U64 { b.binary(Binary::Add64, wide, at) } else { plus(b, wide, at) }
}
