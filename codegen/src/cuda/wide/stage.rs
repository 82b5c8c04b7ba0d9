//! Stages in shared memory: who copies what where, and who reads it.
//!
//! ```text
//! codes    the chunks of each tile of output columns (of each product), as they lie in the matrix
//! tokens   128 bytes of each row of activations, swizzled
//! records  those of each tile of output columns and scale group
//! ```

use super::{CHUNK_BYTES, ROW_BYTES, WideTile, wide};
use crate::cuda::layout::FragmentLayout;
use crate::cuda::product::{Arguments, copy_token, plus, token};
use crate::cuda::tile::{Binary, Builder, Mem, Val, WARP};
use crate::cuda::warp::{Fragments, TOKENS, WarpTile};

/// How the 16-byte segments of a token's row change places: segment s of row r lies at `s ^ (r & mask) << shift`.
///
/// The lanes of an access read, in some adjacent rows, the same segments of each: 4 every other one, 4 in a row, or 2.
/// The rows' segments must be different ones, so that they meet different banks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Swizzle {
    /// Bits of the row's number that matter.
    pub mask: u32,
    /// Where they go.
    pub shift: u32,
}

impl Swizzle {
    /// The one for rows of which lane t reads from byte `t * quarter` on.
    pub fn of(quarter: u32) -> Swizzle {
        match quarter {
            // 2 rows of segments 0, 2, 4, 6.
            32 => Swizzle { mask: 1, shift: 0 },
            // 2 rows of segments 0 to 3.
            16 => Swizzle { mask: 1, shift: 2 },
            // 4 rows of segments 0 and 1.
            _ => Swizzle { mask: 3, shift: 1 },
        }
    }

    fn place(self, b: &mut Builder, segment: Val, row: Val) -> Val {
        let bits = b.and(row, self.mask);
        let bits = b.shl(bits, self.shift);
        b.binary(Binary::Xor, segment, bits)
    }
}

/// Where a thread is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Rows of the call.
    pub m: Val,
    pub thread: Val,
    pub lane: Val,
    /// Row of a fragment.
    pub g: Val,
    /// Lane of the row.
    pub t: Val,
    /// The block's first tile of output columns, and its first token.
    pub first_tile: Val,
    pub first_token: Val,
    /// The warp's first tile of output columns, and its first token, in the block.
    pub own_tile: Val,
    pub own_token: Val,
}

/// The stages of a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stages<'a> {
    pub warp: WarpTile<'a>,
    pub tile: WideTile,
}

/// A piece that a thread copies in every stage.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// Where it lies in its buffer, in the first stage.
    from: Val,
    /// Where it goes in a slot.
    to: Val,
    /// Whether there is one for this thread.
    there: Val,
}

/// What a thread copies.
pub(super) struct Source<'a> {
    args: &'a Arguments<'a>,
    place: Place,
    /// Codes of each product.
    codes: Vec<Piece>,
    /// Rows of activations with the byte of the row, and where they go in a slot.
    tokens: Vec<((Val, Val), Val, Val)>,
    /// Records of each product: the start of their tile, number of the group in the stage, row, and where they go.
    records: Vec<(Val, Val, Val, Piece)>,
}

impl<'a> Stages<'a> {
    fn layout(&self) -> &FragmentLayout {
        &self.warp.layout
    }

    fn tokens_at(&self) -> u32 {
        self.warp.spec.products() * self.tile.block_rows() * self.warp.chunks() * CHUNK_BYTES
    }

    fn records_at(&self) -> u32 {
        self.tokens_at() + self.tile.block_tokens() * TOKENS * ROW_BYTES
    }

    /// Bytes of a slot.
    pub fn bytes(&self) -> u32 {
        let records = self.warp.spec.products() * self.tile.block_rows() * self.warp.groups() * 8;
        (self.records_at() + records * self.layout().record_bytes()).next_multiple_of(128)
    }

    fn swizzle(&self) -> Swizzle {
        Swizzle::of(self.warp.run_start(0).1)
    }

    /// What this thread copies.
    pub fn source<'s>(&self, b: &mut Builder, args: &'s Arguments<'s>, place: Place) -> Source<'s> {
        let threads = self.tile.count() * WARP;
        // Piece `i` of this thread among `count`, and whether it is there.
        let piece = |b: &mut Builder, i: u32, count: u32| {
            let index = b.add(place.thread, i * threads);
            let there = if (i + 1) * threads <= count { Val::Pred(true) } else { b.lt(index, count) };
            (index, there)
        };
        let start = |b: &mut Builder, tile: Val| {
            let number = b.add(place.first_tile, tile);
            let number = b.binary(Binary::Min, number, self.layout().tiles() - 1);
            wide(b, number, self.layout().tile_bytes(), 0.into())
        };
        let (mut codes, mut tokens, mut records) = (vec![], vec![], vec![]);
        let per_tile = self.warp.chunks() * CHUNK_BYTES / 16;
        let count = self.tile.block_rows() * per_tile;
        for i in 0..count.div_ceil(threads) {
            let (index, there) = piece(b, i, count);
            let (tile, rest) = (b.div(index, per_tile), b.rem(index, per_tile));
            let start = start(b, tile);
            let in_tile = b.mul(rest, 16);
            codes.push(Piece { from: plus(b, start, in_tile), to: b.mul(index, 16), there });
        }
        let segments = ROW_BYTES / 16;
        let count = self.tile.block_tokens() * TOKENS * segments;
        for i in 0..count.div_ceil(threads) {
            let (index, _) = piece(b, i, count);
            let (row, segment) = (b.div(index, segments), b.rem(index, segments));
            let swizzled = self.swizzle().place(b, segment, row);
            let swizzled = b.mul(swizzled, 16);
            let to = b.mad(row, ROW_BYTES, swizzled);
            let to = b.add(to, self.tokens_at());
            let number = b.add(place.first_token, row);
            tokens.push((token(b, number, place.m), b.mul(segment, 16), to));
        }
        let bytes = self.layout().record_bytes();
        let per_tile = self.warp.groups() * 8;
        let count = self.tile.block_rows() * per_tile;
        for i in 0..count.div_ceil(threads) {
            let (index, there) = piece(b, i, count);
            let (tile, rest) = (b.div(index, per_tile), b.rem(index, per_tile));
            let (group, row) = (b.div(rest, 8), b.rem(rest, 8));
            let start = start(b, tile);
            let to = b.mul(index, bytes);
            let to = b.add(to, self.records_at());
            records.push((start, group, row, Piece { from: start, to, there }));
        }
        Source { args, place, codes, tokens, records }
    }

    /// Copies the stage with this number to a slot.
    pub fn issue(&self, b: &mut Builder, source: &Source<'_>, number: Val, slot: Val) {
        let layout = self.layout();
        let rows = self.tile.block_rows();
        let in_tile = b.mul(number, self.warp.chunks() * CHUNK_BYTES);
        for (p, &w) in (0..).zip(&source.args.weights) {
            for piece in &source.codes {
                b.when(piece.there, |b| {
                    let from = plus(b, piece.from, in_tile);
                    let to = b.add(piece.to, slot);
                    let to = b.add(to, p * rows * self.warp.chunks() * CHUNK_BYTES);
                    b.cp_async(to, w, from, 16, 16);
                });
            }
            for (start, group, row, piece) in &source.records {
                b.when(piece.there, |b| {
                    let first = self.warp.first_group(b, number);
                    let group = b.add(first, *group);
                    let from = crate::cuda::product::record(b, layout, *start, group, *row);
                    let to = b.add(piece.to, slot);
                    let to = b.add(to, p * rows * self.warp.groups() * 8 * layout.record_bytes());
                    b.cp_async(to, w, from, layout.record_bytes(), layout.record_bytes());
                });
            }
        }
        for &(row, in_stage, to) in &source.tokens {
            let in_row = b.mad(number, ROW_BYTES, in_stage);
            let to = b.add(to, slot);
            copy_token(b, &self.warp, source.args.a, row, in_row, to, 16);
        }
    }

    /// What this lane reads of the stage with this number, in a slot.
    pub fn lane<'s>(&self, b: &mut Builder, source: &'s Source<'s>, number: Val, slot: Val) -> Lane<'s>
    where
        'a: 's,
    {
        let place = source.place;
        let own = b.mul(place.own_tile, self.warp.chunks() * CHUNK_BYTES);
        let own = b.mad(place.lane, 16, own);
        let codes = b.add(own, slot);
        let row = b.add(place.own_token, place.g);
        let tokens = b.mad(row, ROW_BYTES, slot);
        let own = b.mul(place.own_tile, self.warp.groups() * 8 * self.layout().record_bytes());
        let own = b.mad(place.g, self.layout().record_bytes(), own);
        let records = b.add(own, slot);
        Lane { stages: *self, source, number, codes, tokens, records }
    }
}

/// What a lane reads of a slot: where its codes, its rows of tokens and its records begin.
pub(super) struct Lane<'a> {
    stages: Stages<'a>,
    source: &'a Source<'a>,
    number: Val,
    codes: Val,
    tokens: Val,
    records: Val,
}

impl Lane<'_> {
    /// A tile of the warp among those of the block: the warp's first one is part of what was computed before.
    fn tile(&self, tile: u32) -> u32 {
        let (product, tile) = (tile / self.stages.tile.rows, tile % self.stages.tile.rows);
        product * self.stages.tile.block_rows() + tile
    }
}

impl Fragments for Lane<'_> {
    fn codes(&self, b: &mut Builder, tile: u32, chunk: u32) -> Vec<Val> {
        let at = (self.tile(tile) * self.stages.warp.chunks() + chunk) * CHUNK_BYTES;
        let at = b.add(self.codes, at);
        b.load(Mem::Shared, at, 16)
    }

    fn tokens(&self, b: &mut Builder, tile: u32, run: u32) -> Vec<Val> {
        let (fixed, quarter) = self.stages.warp.run_start(run);
        let Place { g, t, .. } = self.source.place;
        let byte = b.mad(t, quarter, fixed);
        let segment = b.shr(byte, 4);
        let swizzled = self.stages.swizzle().place(b, segment, g);
        let swizzled = b.mul(swizzled, 16);
        let rest = b.and(byte, 15);
        let in_row = b.add(swizzled, rest);
        let at = b.add(self.tokens, in_row);
        let at = b.add(at, self.stages.tokens_at() + tile * TOKENS * ROW_BYTES);
        b.load(Mem::Shared, at, self.stages.warp.run_bytes())
    }

    fn record(&self, b: &mut Builder, tile: u32, group: u32) -> Vec<Val> {
        let warp = &self.stages.warp;
        let bytes = warp.layout.record_bytes();
        let at = self.stages.records_at() + (self.tile(tile) * warp.groups() + group) * 8 * bytes;
        let at = b.add(self.records, at);
        b.load(Mem::Shared, at, bytes)
    }

    fn sums(&self, b: &mut Builder, tile: u32, group: u32) -> [Val; 2] {
        let Some((_, sums)) = self.source.args.rows else { unreachable!("only rows of bytes have sums") };
        let warp = &self.stages.warp;
        let place = self.source.place;
        let groups = warp.layout.groups();
        let first = warp.first_group(b, self.number);
        let group = b.add(first, group);
        // Groups of padding have scales of zero: what is read for them does not matter.
        let group = b.binary(Binary::Min, group, groups - 1);
        let in_row = b.mul(group, 4);
        let first = b.add(place.first_token, place.own_token);
        let pair = b.mad(place.t, 2, first);
        [0, 1].map(|i| {
            let number = b.add(pair, tile * TOKENS + i);
            let (row, _) = token(b, number, place.m);
            let at = wide(b, row, groups * 4, in_row);
            b.load(sums, at, 4)[0]
        })
    }
}
