//! Products of many tokens by groups of four warps from the weights of [`super::skinny`] and [`super::wide`] (sm_90a).
//!
//! Weights are the left side, from registers: a warp has 16 output columns, loads the codes of its lanes a unit
//! ahead, and takes them apart as the other templates do. Tokens are the right side, from shared memory: tiles
//! ([`super::tiles`]) in the order in which lanes find columns in their codes ([`RowTilesSpec::span`]), brought by the
//! block's first thread, some stages ahead, a unit of [`UNIT`] columns each. Two barriers a stage tell that it is full,
//! and that it is free; a stage is filled again one unit after it was used, so that hardly anybody waits for that. Sums of
//! a scale group are scaled and added outside.
//!
//! Buffers and their order are those of [`MatmulSpec`], but for the tokens: these are tiles, made with
//! [`MixedTile::tokens_spec`]. Scalars are `t` and `r`. Grid: columns are blocks of output columns, rows blocks of tokens; no
//! workspace. Shared memory must begin at a multiple of 1024.

use super::finish::{self, Corner, Finish};
use super::layout::{CHUNK_BYTES, FragmentLayout, Meets, UNIT};
use super::product::{Arguments, plus, record, tile_numbers};
use super::tile::{Binary, Builder, Extent, GroupKind, Kernel, Mem, Reg, Ternary, Unary, Val, WARP};
use super::tiles::rows::{From, RowTilesSpec};
use super::tiles::{ROW_BYTES, ROWS, TILE_BYTES};
use super::warp::{Acc, TOKENS, WarpTile};
use crate::spec::MatmulSpec;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::GpuDesc;
use serde::{Deserialize, Serialize};

/// How a product is cut.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct MixedTile {
    /// Groups of warps, of 64 output columns each.
    pub groups: u32,
    /// Tokens of a block: a multiple of 64.
    pub tokens: u32,
    /// Stages in shared memory, at least 2.
    pub stages: u32,
}

/// Warps of a group.
const GROUP: u32 = 4;

/// Most stages: their barriers have room in [`BARRIERS`] bytes.
const MOST_STAGES: u32 = 8;

/// Bytes of all barriers.
const BARRIERS: u32 = 128;

impl MixedTile {
    /// The tile for calls of up to `m` tokens on a GPU.
    pub fn of(spec: &MatmulSpec, m: u32, gpu: &GpuDesc) -> Result<MixedTile> {
        if gpu.arch != "sm_90a" {
            return Err(Diag::target(format!("groups of warps do not multiply on {}", gpu.arch))
                .help("they do on sm_90a"));
        }
        let layout = FragmentLayout::of(spec)?;
        let copies = spec.products() * if layout.per_row() { 1 } else { 2 };
        let most = if m <= ROWS { ROWS } else { 2 * ROWS };
        let tokens = (2 * 2 * ROWS / copies).min(most).max(ROWS);
        let tiles = [8, 6, 4, 3, 2].map(|stages| MixedTile { groups: 2, tokens, stages });
        let fits = |tile: &MixedTile| tile.shared_bytes(spec, layout) <= gpu.shared_bytes;
        tiles.into_iter().find(fits).ok_or_else(|| {
            Diag::target(format!("a product of many rows has no room in the shared memory of {}", gpu.arch))
        })
    }

    /// How rows of activations become the tiles of tokens that these kernels take.
    pub fn tokens_spec(spec: &MatmulSpec) -> Result<RowTilesSpec> {
        let layout = FragmentLayout::of(spec)?;
        let stride = super::product::row_stride(&layout);
        Ok(RowTilesSpec {
            k: spec.k,
            rows: spec.rows,
            kind: kind(&layout),
            from: From::Same { stride },
            span: layout.span(),
        })
    }

    fn warp<'a>(&self, spec: &'a MatmulSpec, layout: FragmentLayout) -> WarpTile<'a> {
        WarpTile { spec, layout, rows: 1, tokens: self.tokens / TOKENS, columns: UNIT }
    }

    /// Tiles of output columns of a block.
    fn rows(&self) -> u32 {
        self.groups * GROUP
    }

    fn stage_bytes(&self, layout: &FragmentLayout) -> u32 {
        across(layout) * self.tokens / ROWS * TILE_BYTES
    }

    /// Stages, and then sums; the barriers follow.
    fn barriers_at(&self, spec: &MatmulSpec, layout: FragmentLayout) -> u32 {
        let sums = finish::bytes(spec.products(), self.rows(), self.tokens / TOKENS, 1);
        (self.stages * self.stage_bytes(&layout)).max(sums).next_multiple_of(128)
    }

    fn shared_bytes(&self, spec: &MatmulSpec, layout: FragmentLayout) -> u32 {
        self.barriers_at(spec, layout) + BARRIERS
    }
}

/// What is multiplied.
fn kind(layout: &FragmentLayout) -> GroupKind {
    match layout.meets {
        Meets::Bf16 => GroupKind::Bf16,
        Meets::Bytes => GroupKind::S8,
    }
}

/// Tiles of a unit of columns.
fn across(layout: &FragmentLayout) -> u32 {
    UNIT / kind(layout).columns()
}

/// Refuses products that have no such kernel, and cuts that mean nothing.
pub fn check(spec: &MatmulSpec, tile: MixedTile) -> Result<()> {
    spec.check()?;
    let layout = FragmentLayout::of(spec)?;
    if tile.warp(spec, layout).needs_sums() {
        return Err(Diag::target(
            "zero points for groups of columns have no kernel of groups of warps for bytes",
        )
        .help("the kernel for many rows of single warps has them"));
    }
    let sums = tile.tokens * spec.products() * if layout.per_row() { 1 } else { 2 };
    let stages_fit = (2..=MOST_STAGES).contains(&tile.stages);
    if tile.tokens == 0 || !tile.tokens.is_multiple_of(ROWS) || sums > 256 || tile.groups == 0 || !stages_fit
    {
        return Err(Diag::bug(format!("no such cut of a product: {tile:?}")));
    }
    Ok(())
}

/// The kernel of `spec`, called `name`.
pub fn build(name: &str, spec: &MatmulSpec, tile: MixedTile) -> Result<Kernel> {
    check(spec, tile)?;
    let layout = FragmentLayout::of(spec)?;
    let warp_tile = tile.warp(spec, layout);
    let threads = tile.rows() * WARP;
    let mut b = Builder::new(name, threads);
    let args = Arguments::declare(&mut b, spec);
    let rows = Extent::PerScalar { scalar: spec.rows.dim(), times: 1, per: tile.tokens };
    b.grid(Extent::Fixed(layout.tiles().div_ceil(tile.rows())), rows);
    b.shared(tile.shared_bytes(spec, layout));
    let m = b.scalar_value(spec.rows.dim());
    let (x, y, thread) = (b.block_x(), b.block_y(), b.thread());
    let (warp, lane) = (b.div(thread, WARP), b.rem(thread, WARP));
    let (g, t) = (b.div(lane, 4), b.rem(lane, 4));
    let first_tile = b.mul(x, tile.rows());
    let first_token = b.mul(y, tile.tokens);
    let first = b.lt(thread, 1);
    let barriers = tile.barriers_at(spec, layout);
    let cx = Mixed { args: &args, tile, warp: warp_tile, m, y, lane, g, first, barriers };
    b.when(first, |b| {
        for stage in 0..tile.stages {
            b.bar_init(cx.barriers + 16 * stage, 1);
            b.bar_init(cx.barriers + 16 * stage + 8, tile.rows());
        }
        b.bar_fence();
    });
    b.barrier();
    let acc = warp_tile.accs(&mut b);
    let own = b.add(first_tile, warp);
    let own = tile_numbers(&mut b, &layout, own, 1, tile.rows())[0];
    cx.multiply(&mut b, own, &acc);
    let finish = Finish {
        warp: warp_tile,
        frame: &args.frame,
        weights: &args.weights,
        rows: args.rows,
        tiles: tile.rows(),
        tokens: tile.tokens / TOKENS,
        parts: 1,
        threads,
        m,
        thread,
        first_tile,
        first_token,
    };
    // No copy is under way: all warps have waited for each.
    finish.emit(&mut b, &acc, Corner { part: 0.into(), tile: warp, token: 0.into(), g, t });
    Ok(b.finish())
}

struct Mixed<'a> {
    args: &'a Arguments<'a>,
    tile: MixedTile,
    warp: WarpTile<'a>,
    /// Tokens of the call.
    m: Val,
    /// The block's number among blocks of tokens.
    y: Val,
    lane: Val,
    /// Row of a fragment.
    g: Val,
    /// Whether this is the block's first thread.
    first: Val,
    /// Where barriers begin: of each stage that it is full, and that it is free.
    barriers: u32,
}

impl Mixed<'_> {
    fn layout(&self) -> &FragmentLayout {
        &self.warp.layout
    }

    /// The barriers of a stage.
    fn bars(&self, b: &mut Builder, stage: Reg) -> [Val; 2] {
        let full = b.mad(stage, 16, self.barriers);
        [full, b.add(full, 8)]
    }

    /// Goes on to the next stage; the parity is that of the phase in which it is filled.
    fn turn(&self, b: &mut Builder, stage: Reg, parity: Reg) {
        let next = b.add(stage, 1);
        let inside = b.lt(next, self.tile.stages);
        let next = b.select(inside, next, 0);
        let other = b.binary(Binary::Xor, parity, 1);
        let other = b.select(inside, parity, other);
        b.set(stage, next);
        b.set(parity, other);
    }

    /// Where the tiles of the block's tokens begin.
    fn starts(&self, b: &mut Builder) -> Vec<Val> {
        let layout = self.layout();
        let all = layout.units() * across(layout);
        let down = b.add(self.m, ROWS - 1);
        let down = b.div(down, ROWS);
        let count = self.tile.tokens / ROWS;
        let start = |i: u32| {
            let number = b.mad(self.y, count, i);
            let last = b.binary(Binary::Sub, down, 1);
            let number = b.binary(Binary::Min, number, last);
            let zero = b.unary(Unary::Widen, 0);
            b.ternary(Ternary::MulWide, number, all * TILE_BYTES, zero)
        };
        (0..count).map(start).collect()
    }

    /// Copies the tokens of a unit to a stage.
    fn copy(&self, b: &mut Builder, starts: &[Val], unit: Val, stage: Val) {
        let layout = self.layout();
        let (across, bytes) = (across(layout), self.tile.stage_bytes(layout));
        let full = b.mad(stage, 16, self.barriers);
        b.bar_expect(full, bytes);
        let to = b.mul(stage, bytes);
        for column in 0..across {
            let number = b.mad(unit, across, column);
            let in_row = b.mul(number, TILE_BYTES);
            for (i, &start) in (0..).zip(starts) {
                let from = plus(b, start, in_row);
                let to = b.add(to, (column * starts.len() as u32 + i) * TILE_BYTES);
                b.bulk_copy(to, self.args.a, from, TILE_BYTES, full);
            }
        }
    }

    /// The codes of a chunk of a unit of this warp's tile, of each product.
    fn codes(&self, b: &mut Builder, start: Val, unit: Val, chunk: u32) -> Vec<Vec<Val>> {
        let own = b.mad(self.lane, 16, chunk * CHUNK_BYTES);
        let in_tile = b.mad(unit, self.warp.chunks() * CHUNK_BYTES, own);
        let at = plus(b, start, in_tile);
        self.args.weights.iter().map(|&w| b.load(w, at, 16)).collect()
    }

    /// The records of a unit: of each product, group after group.
    fn records(&self, b: &mut Builder, start: Val, unit: Val) -> Vec<Vec<Vec<Val>>> {
        let layout = self.layout();
        let of = |b: &mut Builder, w: Mem| {
            (0..self.warp.groups())
                .map(|group| {
                    let first = self.warp.first_group(b, unit);
                    let group = b.add(first, group);
                    let at = record(b, layout, start, group, self.g);
                    b.load(w, at, layout.record_bytes())
                })
                .collect()
        };
        self.args.weights.iter().map(|&w| of(b, w)).collect()
    }

    /// What warps that multiply do.
    fn multiply(&self, b: &mut Builder, own: Val, acc: &[Acc]) {
        let layout = self.layout();
        let products = self.warp.spec.products() as usize;
        let zero = b.unary(Unary::Widen, 0);
        let start = b.ternary(Ternary::MulWide, own, layout.tile_bytes(), zero);
        let fixed = self.warp.row_offsets(b, &self.args.weights, &[own], self.g);
        let per_row = layout.per_row();
        let sub = if per_row { vec![] } else { self.warp.zeros(b, layout.meets == Meets::Bytes) };
        let to = if per_row { acc } else { &sub };
        // Sums of a product as one list: tiles of tokens one after the other.
        let lists: Vec<Vec<Reg>> = to.chunks(self.warp.tokens as usize).map(|tiles| tiles.concat()).collect();
        // Of each chunk and product: when a chunk was taken apart, that of the next unit takes its place.
        let ahead: Vec<Vec<Vec<Reg>>> = (0..self.warp.chunks())
            .map(|chunk| {
                let words = self.codes(b, start, 0.into(), chunk);
                words.into_iter().map(|of| of.into_iter().map(|w| b.var(w)).collect()).collect()
            })
            .collect();
        let speaks = b.lt(self.lane, 1);
        let starts = self.starts(b);
        b.when(self.first, |b| {
            for stage in 0..self.tile.stages.min(layout.units()) {
                self.copy(b, &starts, stage.into(), stage.into());
            }
        });
        let (stage, parity) = (b.var(0), b.var(0));
        // The stage of the unit before, and the parity of the phase in which all are through with it.
        let (back, through) = (b.var(0), b.var(0));
        let steps = UNIT * self.warp.token_bytes() / 32;
        let per_chunk = steps / self.warp.chunks();
        let per_group = if per_row { steps } else { layout.w.group.min(UNIT) * steps / UNIT };
        b.repeat(0, layout.units(), 1, |b, unit| {
            let later = b.lt(0, unit);
            b.when(later, |b| {
                let ahead = b.add(unit, self.tile.stages - 1);
                let more = b.lt(ahead, layout.units());
                let speaks = b.binary(Binary::PAnd, self.first, more);
                b.when(speaks, |b| {
                    let [_, free] = self.bars(b, back);
                    b.bar_wait(free, through);
                    self.copy(b, &starts, ahead, back.into());
                });
                self.turn(b, back, through);
            });
            let next = b.add(unit, 1);
            let next = b.binary(Binary::Min, next, layout.units() - 1);
            let records = self.records(b, start, unit);
            let [full, free] = self.bars(b, stage);
            b.bar_wait(full, parity);
            let tokens = b.mul(stage, self.tile.stage_bytes(layout));
            let mut group = None;
            for at in 0..steps {
                let (chunk, step) = ((at / per_chunk) as usize, at % per_chunk);
                if at % per_group == 0 {
                    let number = (at / per_group) as usize;
                    group = (!per_row).then(|| {
                        let records = records.iter().map(|of_product| of_product[number].clone());
                        self.warp.group_of(b, records.collect())
                    });
                }
                let row = at / 4 * (self.tile.tokens / ROWS) * TILE_BYTES + at % 4 * (ROW_BYTES / 4);
                let right = b.add(tokens, row);
                let mut left = vec![];
                for p in 0..products {
                    let offsets = group.as_ref().and_then(|g| g.offsets.get(p)).unwrap_or(&fixed[p]);
                    // Copies: some codes are a product's left side as they are, and their places are taken while it goes on.
                    let words: Vec<Val> = ahead[chunk][p].iter().map(|&r| b.unary(Unary::Copy, r)).collect();
                    left.push(self.warp.left(b, &words, step, offsets));
                }
                if step + 1 == per_chunk {
                    let words = self.codes(b, start, next, chunk as u32);
                    for (&to, v) in ahead[chunk].iter().flatten().zip(words.into_iter().flatten()) {
                        b.set(to, v);
                    }
                }
                b.group_fence();
                for (list, left) in lists.iter().zip(left) {
                    b.group_mma_regs(kind(layout), list, left, right, !per_row && at % per_group == 0);
                }
                b.group_commit();
                // The registers of the step before are free again; this one goes on while the next codes are taken apart.
                b.group_wait(1, &[]);
                let ends = (at + 1) % per_group == 0;
                if let Some(group) = group.as_ref().filter(|_| ends) {
                    b.group_wait(0, &lists.concat());
                    self.warp.end_group(b, group, &sub, acc);
                }
            }
            if per_row {
                b.group_wait(0, &[]);
            }
            b.when(speaks, |b| b.bar_arrive(free));
            self.turn(b, stage, parity);
        });
        if per_row {
            b.group_wait(0, &lists.concat());
        }
    }
}
