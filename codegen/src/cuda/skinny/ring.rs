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

use super::Place;
use crate::cuda::expr::wide;
use crate::cuda::layout::{CHUNK_BYTES, UNIT};
use crate::cuda::product::{Arguments, copy_token, plus, record, token};
use crate::cuda::tile::{Binary, Builder, Mem, Unary, Val, WARP};
use crate::cuda::warp::{Fragments, TOKENS, WarpTile};

/// The ring of slots of each warp.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ring<'a> {
    pub warp: WarpTile<'a>,
    pub stages: u32,
}

impl<'a> Ring<'a> {
    fn tokens_at(&self) -> u32 {
        self.warp.row_tiles() * self.warp.chunks() * CHUNK_BYTES
    }

    fn records_at(&self) -> u32 {
        self.tokens_at() + self.warp.tokens * self.warp.runs() * self.warp.run_bytes() * WARP
    }

    fn sums_at(&self) -> u32 {
        let records = self.warp.row_tiles() * self.warp.groups();
        self.records_at() + records * self.warp.layout.record_bytes() * WARP
    }

    /// Bytes of a slot.
    pub fn stage_bytes(&self) -> u32 {
        let sums =
            if self.warp.needs_sums() { self.warp.tokens * self.warp.groups() * 2 * 4 * WARP } else { 0 };
        self.sums_at() + sums
    }

    /// A lane's part of a slot.
    pub fn lane(&self, b: &mut Builder, place: Place, slot: Val) -> Lane<'a> {
        let start = b.mad(place.warp, self.stages * self.stage_bytes(), slot);
        Lane { ring: *self, start, lane: place.lane }
    }

    /// Where this lane's fragments come from: `tiles` are the numbers of the block's tiles of output columns.
    pub fn source<'s>(
        &self,
        b: &mut Builder,
        args: &'s Arguments<'s>,
        place: Place,
        tiles: &[Val],
    ) -> Source<'s> {
        let start = |b: &mut Builder, tile: Val| {
            let at = wide(b, tile, self.warp.layout.tile_bytes(), 0.into());
            if tile == Val::U32(0) { b.unary(Unary::Widen, at) } else { at }
        };
        let tiles = tiles.iter().map(|&tile| start(b, tile)).collect();
        let own = |b: &mut Builder, i: u32| {
            let first = b.add(place.first_token, i * TOKENS);
            let index = b.add(first, place.g);
            token(b, index, place.m)
        };
        let tokens = (0..self.warp.tokens).map(|i| own(b, i)).collect();
        Source { args, place, tiles, tokens }
    }

    /// Copies a unit, if there is one, to a slot.
    pub fn issue(&self, b: &mut Builder, source: &Source<'_>, unit: Val, slot: Val) {
        let here = b.lt(unit, self.warp.layout.units());
        b.when(here, |b| {
            let to = self.lane(b, source.place, slot);
            self.issue_weights(b, source, unit, &to);
            self.issue_tokens(b, source, unit, &to);
            if self.warp.needs_sums() {
                self.issue_sums(b, source, unit, &to);
            }
        });
        b.cp_commit();
    }

    fn issue_weights(&self, b: &mut Builder, source: &Source<'_>, unit: Val, to: &Lane<'_>) {
        let own = b.mul(source.place.lane, 16);
        let in_tile = b.mad(unit, self.warp.chunks() * CHUNK_BYTES, own);
        let bytes = self.warp.layout.record_bytes();
        for (p, &w) in (0..).zip(&source.args.weights) {
            for (i, &start) in (0..).zip(&source.tiles) {
                let tile = p * self.warp.rows + i;
                let from = plus(b, start, in_tile);
                for chunk in 0..self.warp.chunks() {
                    let at = b.binary(Binary::Add64, from, Val::U32(chunk * CHUNK_BYTES));
                    let to = to.codes_at(b, tile, chunk);
                    b.cp_async(to, w, at, 16, 16);
                }
                for group in 0..self.warp.groups() {
                    let first = self.warp.first_group(b, unit);
                    let index = b.add(first, group);
                    let at = record(b, &self.warp.layout, start, index, source.place.g);
                    let to = to.record_at(b, tile, group);
                    b.cp_async(to, w, at, bytes, bytes);
                }
            }
        }
    }

    fn issue_tokens(&self, b: &mut Builder, source: &Source<'_>, unit: Val, to: &Lane<'_>) {
        for (i, &row) in (0..).zip(&source.tokens) {
            for run in 0..self.warp.runs() {
                let (fixed, factor) = self.warp.run_start(run);
                let own = b.mul(source.place.t, factor);
                let first = b.mad(unit, UNIT * self.warp.token_bytes(), own);
                let in_row = b.add(first, fixed);
                let to = to.tokens_at(b, i, run);
                copy_token(b, &self.warp, source.args.a, row, in_row, to, self.warp.run_bytes());
            }
        }
    }

    fn issue_sums(&self, b: &mut Builder, source: &Source<'_>, unit: Val, to: &Lane<'_>) {
        let Some((_, sums)) = source.args.rows else { return };
        let groups = self.warp.layout.groups();
        let first = self.warp.first_group(b, unit);
        for tile in 0..self.warp.tokens {
            for i in 0..2 {
                let base = b.add(source.place.first_token, tile * TOKENS + i);
                let index = b.mad(source.place.t, 2, base);
                let (row, there) = token(b, index, source.place.m);
                for group in 0..self.warp.groups() {
                    // Padding has groups that rows have no sums of.
                    let index = b.add(first, group);
                    let inside = b.lt(index, groups);
                    let valid = b.select(inside, 4, 0);
                    let valid = b.select(there, valid, 0);
                    let in_row = b.mul(index, 4);
                    let at = wide(b, row, groups * 4, in_row);
                    let to = to.sums_at(b, tile, group, i);
                    b.cp_async(to, sums, at, 4, valid);
                }
            }
        }
    }
}

/// Where a lane's fragments come from.
pub(super) struct Source<'a> {
    args: &'a Arguments<'a>,
    place: Place,
    /// For each of the block's tiles of output columns, its first byte.
    tiles: Vec<Val>,
    /// For each tile of tokens, this lane's token, and whether it is there.
    tokens: Vec<(Val, Val)>,
}

/// A lane's part of a slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lane<'a> {
    ring: Ring<'a>,
    start: Val,
    lane: Val,
}

impl Lane<'_> {
    /// The lane's `bytes` in the array that begins at `at` in the slot.
    fn at(&self, b: &mut Builder, at: u32, bytes: u32) -> Val {
        let own = b.mad(self.lane, bytes, self.start);
        b.add(own, at)
    }

    fn codes_at(&self, b: &mut Builder, tile: u32, chunk: u32) -> Val {
        self.at(b, (tile * self.ring.warp.chunks() + chunk) * CHUNK_BYTES, 16)
    }

    fn tokens_at(&self, b: &mut Builder, tile: u32, run: u32) -> Val {
        let bytes = self.ring.warp.run_bytes();
        let index = tile * self.ring.warp.runs() + run;
        self.at(b, self.ring.tokens_at() + index * bytes * WARP, bytes)
    }

    fn record_at(&self, b: &mut Builder, tile: u32, group: u32) -> Val {
        let bytes = self.ring.warp.layout.record_bytes();
        let index = tile * self.ring.warp.groups() + group;
        self.at(b, self.ring.records_at() + index * bytes * WARP, bytes)
    }

    fn sums_at(&self, b: &mut Builder, tile: u32, group: u32, i: u32) -> Val {
        let index = (tile * self.ring.warp.groups() + group) * 2 + i;
        self.at(b, self.ring.sums_at() + index * 4 * WARP, 4)
    }
}

impl Fragments for Lane<'_> {
    fn codes(&self, b: &mut Builder, tile: u32, chunk: u32) -> Vec<Val> {
        let at = self.codes_at(b, tile, chunk);
        b.load(Mem::Shared, at, 16)
    }

    fn tokens(&self, b: &mut Builder, tile: u32, run: u32) -> Vec<Val> {
        let at = self.tokens_at(b, tile, run);
        b.load(Mem::Shared, at, self.ring.warp.run_bytes())
    }

    fn record(&self, b: &mut Builder, tile: u32, group: u32) -> Vec<Val> {
        let at = self.record_at(b, tile, group);
        b.load(Mem::Shared, at, self.ring.warp.layout.record_bytes())
    }

    fn sums(&self, b: &mut Builder, tile: u32, group: u32) -> [Val; 2] {
        [0, 1].map(|i| {
            let at = self.sums_at(b, tile, group, i);
            b.load(Mem::Shared, at, 4)[0]
        })
    }
}
