//! What lanes copy ahead: each its own fragments of some units, into its own part of shared memory.
//!
//! A slot holds one unit of one warp. In it lie, each as an array over lanes, so that accesses of a warp are adjacent:
//!
//! ```text
//! codes    16 bytes for each tile of output columns (of each product) and chunk
//! tokens   16 or 8 bytes for each tile of tokens and run of adjacent columns
//! records  one for each tile of output columns and scale group
//! sums     two of 4 bytes for each tile of tokens and scale group, where zero points need them
//! ```

use super::{Place, Skinny, SkinnyTile, TOKENS};
use crate::cuda::dequant;
use crate::cuda::expr::wide;
use crate::cuda::layout::{CHUNK_BYTES, FragmentLayout, Meets, UNIT};
use crate::cuda::tile::{Binary, Builder, Mem, Unary, Val, WARP};
use crate::spec::{MatmulSpec, Zero, bf16_row_stride, i8_row_stride};

/// Sizes of a slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ring {
    /// Tiles of output columns of all products.
    tiles: u32,
    chunks: u32,
    token_tiles: u32,
    /// Runs of adjacent columns of one lane in a unit, and bytes of one.
    runs: u32,
    run_bytes: u32,
    groups: u32,
    record_bytes: u32,
    sums: bool,
    stages: u32,
}

impl Ring {
    pub fn new(spec: &MatmulSpec, layout: &FragmentLayout, tile: SkinnyTile) -> Ring {
        let number = token_bytes(layout);
        // Columns of a lane in a span are adjacent.
        let run_bytes = (layout.span() / 4 * number).min(16);
        let grouped = !layout.per_row();
        let zeros = match layout.w.zero {
            Zero::Asym => true,
            Zero::Sym(z) => dequant::stored_zero(layout, z) != 0,
        };
        Ring {
            tiles: spec.products() * tile.rows,
            chunks: UNIT / layout.chunk_k(),
            token_tiles: tile.tokens,
            runs: UNIT / 4 * number / run_bytes,
            run_bytes,
            groups: if grouped { layout.unit_groups() } else { 0 },
            record_bytes: layout.record_bytes(),
            sums: grouped && zeros && layout.meets == Meets::Bytes,
            stages: tile.stages,
        }
    }

    /// Whether sums of the tokens' bytes are copied.
    pub fn has_sums(&self) -> bool {
        self.sums
    }

    fn tokens_at(&self) -> u32 {
        self.tiles * self.chunks * CHUNK_BYTES
    }

    fn records_at(&self) -> u32 {
        self.tokens_at() + self.token_tiles * self.runs * self.run_bytes * WARP
    }

    fn sums_at(&self) -> u32 {
        self.records_at() + self.tiles * self.groups * self.record_bytes * WARP
    }

    /// Bytes of a slot.
    pub fn stage_bytes(&self) -> u32 {
        let sums = if self.sums { self.token_tiles * self.groups * 2 * 4 * WARP } else { 0 };
        self.sums_at() + sums
    }

    /// A lane's part of a slot.
    pub fn lane(&self, b: &mut Builder, warp: Val, lane: Val, slot: Val) -> Lane {
        let start = b.mad(warp, self.stages * self.stage_bytes(), slot);
        Lane { start, lane }
    }
}

/// Bytes of one number of a token.
fn token_bytes(layout: &FragmentLayout) -> u32 {
    match layout.meets {
        Meets::Bf16 => 2,
        Meets::Bytes => 1,
    }
}

/// A lane's part of a slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lane {
    start: Val,
    lane: Val,
}

impl Lane {
    /// The lane's `bytes` in the array that begins at `at` in the slot.
    fn at(&self, b: &mut Builder, at: u32, bytes: u32) -> Val {
        let own = b.mad(self.lane, bytes, self.start);
        b.add(own, at)
    }

    fn codes_at(&self, b: &mut Builder, ring: &Ring, tile: u32, chunk: u32) -> Val {
        self.at(b, (tile * ring.chunks + chunk) * CHUNK_BYTES, 16)
    }

    fn tokens_at(&self, b: &mut Builder, ring: &Ring, tile: u32, run: u32) -> Val {
        let array = ring.run_bytes * WARP;
        self.at(b, ring.tokens_at() + (tile * ring.runs + run) * array, ring.run_bytes)
    }

    fn record_at(&self, b: &mut Builder, ring: &Ring, tile: u32, group: u32) -> Val {
        let array = ring.record_bytes * WARP;
        self.at(b, ring.records_at() + (tile * ring.groups + group) * array, ring.record_bytes)
    }

    fn sums_at(&self, b: &mut Builder, ring: &Ring, tile: u32, group: u32, i: u32) -> Val {
        self.at(b, ring.sums_at() + ((tile * ring.groups + group) * 2 + i) * 4 * WARP, 4)
    }

    /// The codes of a chunk: two words of row g, two of row g + 8.
    pub fn codes(&self, b: &mut Builder, ring: &Ring, tile: u32, chunk: u32) -> Vec<Val> {
        let at = self.codes_at(b, ring, tile, chunk);
        b.load(Mem::Shared, at, 16)
    }

    /// The words of a token that meet a chunk.
    pub fn tokens(
        &self,
        b: &mut Builder,
        ring: &Ring,
        layout: &FragmentLayout,
        tile: u32,
        chunk: u32,
    ) -> Vec<Val> {
        let bytes = layout.lane_k() * token_bytes(layout);
        // A chunk is made of whole runs, since a span is not longer than a chunk.
        let per_chunk = bytes / ring.run_bytes;
        let runs = chunk * per_chunk..(chunk + 1) * per_chunk;
        runs.flat_map(|run| {
            let at = self.tokens_at(b, ring, tile, run);
            b.load(Mem::Shared, at, ring.run_bytes)
        })
        .collect()
    }

    /// The record of a scale group.
    pub fn record(&self, b: &mut Builder, ring: &Ring, tile: u32, group: u32) -> Vec<Val> {
        let at = self.record_at(b, ring, tile, group);
        b.load(Mem::Shared, at, ring.record_bytes)
    }

    /// The sums of the bytes of this lane's two tokens in a scale group.
    pub fn sums(&self, b: &mut Builder, ring: &Ring, tile: u32, group: u32) -> [Val; 2] {
        [0, 1].map(|i| {
            let at = self.sums_at(b, ring, tile, group, i);
            b.load(Mem::Shared, at, 4)[0]
        })
    }
}

/// Where a lane's fragments come from.
pub(super) struct Source {
    /// For each of the block's tiles of output columns, its first byte.
    tiles: Vec<Val>,
    /// For each tile of tokens, this lane's token, and whether it is there.
    tokens: Vec<(Val, Val)>,
}

impl Skinny<'_> {
    /// Where this lane's fragments come from.
    pub(super) fn source(&self, b: &mut Builder) -> Source {
        let tiles = (0..self.tile.rows).map(|i| {
            let tile = self.tile_index(b, i);
            wide(b, tile, self.layout.tile_bytes(), 0.into())
        });
        let tiles = tiles.collect();
        let tokens = (0..self.tile.tokens).map(|i| {
            let token = b.add(self.place.first_token, i * TOKENS);
            self.token(b, token, self.place.g)
        });
        Source { tiles, tokens: tokens.collect() }
    }

    /// Token `first + i`, or the last one, and whether it is there.
    fn token(&self, b: &mut Builder, first: Val, i: Val) -> (Val, Val) {
        let token = b.add(first, i);
        let there = b.lt(token, self.place.m);
        let last = b.binary(Binary::Sub, self.place.m, 1);
        (b.binary(Binary::Min, token, last), there)
    }

    /// Copies a unit, if there is one, to a slot.
    pub(super) fn issue(&self, b: &mut Builder, source: &Source, unit: Val, slot: Val) {
        let Place { warp, lane, .. } = self.place;
        let here = b.lt(unit, self.layout.units());
        b.when(here, |b| {
            let to = self.ring.lane(b, warp, lane, slot);
            self.issue_weights(b, source, unit, &to);
            self.issue_tokens(b, source, unit, &to);
            if self.ring.sums {
                self.issue_sums(b, unit, &to);
            }
        });
        b.cp_commit();
    }

    fn issue_weights(&self, b: &mut Builder, source: &Source, unit: Val, to: &Lane) {
        let (ring, layout) = (&self.ring, &self.layout);
        let own = b.mul(self.place.lane, 16);
        let in_tile = b.mad(unit, ring.chunks * CHUNK_BYTES, own);
        let in_tile = b.unary(Unary::Widen, in_tile);
        let first_group = if ring.groups == 0 { 0.into() } else { self.first_group(b, unit) };
        for (p, &w) in (0..).zip(&self.weights) {
            for (i, &start) in (0..).zip(&source.tiles) {
                let tile = p * self.tile.rows + i;
                let start = if b.ty(start) == crate::cuda::tile::Ty::U64 {
                    start
                } else {
                    b.unary(Unary::Widen, start)
                };
                let from = b.binary(Binary::Add64, start, in_tile);
                for chunk in 0..ring.chunks {
                    let at = b.binary(Binary::Add64, from, Val::U32(chunk * CHUNK_BYTES));
                    let to = to.codes_at(b, ring, tile, chunk);
                    b.cp_async(to, w, at, 16, 16);
                }
                for group in 0..ring.groups {
                    let index = b.add(first_group, group);
                    let row = b.mad(index, 8, self.place.g);
                    let in_tile = b.mad(row, ring.record_bytes, layout.codes_bytes());
                    let in_tile = b.unary(Unary::Widen, in_tile);
                    let at = b.binary(Binary::Add64, start, in_tile);
                    let to = to.record_at(b, ring, tile, group);
                    b.cp_async(to, w, at, ring.record_bytes, ring.record_bytes);
                }
            }
        }
    }

    /// The scale group that a unit begins with.
    fn first_group(&self, b: &mut Builder, unit: Val) -> Val {
        let group = self.layout.w.group;
        if group < UNIT { b.mul(unit, UNIT / group) } else { b.div(unit, group / UNIT) }
    }

    fn issue_tokens(&self, b: &mut Builder, source: &Source, unit: Val, to: &Lane) {
        let (ring, layout) = (&self.ring, &self.layout);
        let number = token_bytes(layout);
        let stride = match layout.meets {
            Meets::Bf16 => bf16_row_stride(layout.k) * 2,
            Meets::Bytes => i8_row_stride(layout.k),
        };
        // A quarter of a span is adjacent; it is one run, or two or more.
        let quarter = layout.span() / 4 * number;
        let own = b.mul(self.place.t, quarter);
        let first = b.mad(unit, UNIT * number, own);
        for (i, &(token, there)) in (0..).zip(&source.tokens) {
            for run in 0..ring.runs {
                let (span, part) = (run * ring.run_bytes / quarter, run * ring.run_bytes % quarter);
                let in_row = b.add(first, span * layout.span() * number + part);
                let mut valid: Val = ring.run_bytes.into();
                if !layout.k.is_multiple_of(UNIT) {
                    let end = layout.k * number;
                    let inside = b.lt(in_row, end);
                    let left = b.binary(Binary::Sub, end, in_row);
                    let left = b.binary(Binary::Min, left, ring.run_bytes);
                    valid = b.select(inside, left, 0);
                }
                let valid = b.select(there, valid, 0);
                let at = wide(b, token, stride, in_row);
                let to = to.tokens_at(b, ring, i, run);
                b.cp_async(to, self.a, at, ring.run_bytes, valid);
            }
        }
    }

    fn issue_sums(&self, b: &mut Builder, unit: Val, to: &Lane) {
        let Some((_, sums)) = self.rows else { return };
        let groups = self.layout.groups();
        let first = self.first_group(b, unit);
        for tile in 0..self.ring.token_tiles {
            for i in 0..2 {
                let base = b.add(self.place.first_token, tile * TOKENS + i);
                let pair = b.mul(self.place.t, 2);
                let (token, there) = self.token(b, base, pair);
                for group in 0..self.ring.groups {
                    // Padding has groups that rows have no sums of.
                    let index = b.add(first, group);
                    let inside = b.lt(index, groups);
                    let valid = b.select(inside, 4, 0);
                    let valid = b.select(there, valid, 0);
                    let in_row = b.mul(index, 4);
                    let at = wide(b, token, groups * 4, in_row);
                    let to = to.sums_at(b, &self.ring, tile, group, i);
                    b.cp_async(to, sums, at, 4, valid);
                }
            }
        }
    }
}
