//! The end of a product: sums go through shared memory, where partial ones are added in order, and the epilogue turns
//! them into results, adjacent threads writing adjacent columns.

use super::expr::{At, Frame, wide};
use super::layout::{Meets, TILE};
use super::tile::{Binary, Builder, Mem, Unary, Val};
use super::warp::{Acc, TOKENS, WarpTile};
use crate::cpu::math::Lanes;
use crate::spec::{ScaleTy, Zero};

/// A block's part of a product.
pub(super) struct Finish<'a> {
    /// What one of its warps computed.
    pub warp: WarpTile<'a>,
    /// The epilogue.
    pub frame: &'a Frame<'a>,
    pub weights: &'a [Mem],
    /// Scales and sums of rows of bytes.
    pub rows: Option<(Mem, Mem)>,
    /// Tiles of output columns and of tokens of the block.
    pub tiles: u32,
    pub tokens: u32,
    /// Partial sums of each.
    pub parts: u32,
    pub threads: u32,
    /// Rows of the call.
    pub m: Val,
    pub thread: Val,
    /// The block's first tile of output columns, and its first token.
    pub first_tile: Val,
    pub first_token: Val,
}

/// Where in its block a lane has sums.
#[derive(Clone, Copy, Debug)]
pub(super) struct Corner {
    /// Which of the partial sums.
    pub part: Val,
    /// First tile of output columns and first token of the warp.
    pub tile: Val,
    pub token: Val,
    /// Row and lane of a fragment.
    pub g: Val,
    pub t: Val,
}

/// Numbers between a token's sums in shared memory and the next one's: four more than there are, so that the lanes of a
/// fragment, of 8 columns and 4 tokens apart by two, fall into different banks.
fn stride(tiles: u32) -> u32 {
    tiles * TILE + 4
}

/// Bytes of shared memory for the sums of `tiles` by `tokens` tiles of each product and part.
pub(super) fn bytes(products: u32, tiles: u32, tokens: u32, parts: u32) -> u32 {
    parts * products * tokens * TOKENS * stride(tiles) * 4
}

impl Finish<'_> {
    /// Adds up and writes. Shared memory from its first byte on is free to use, once all warps are here.
    pub fn emit(&self, b: &mut Builder, acc: &[Acc], corner: Corner) {
        b.note("all warps are through with their copies, whose places take the sums");
        b.barrier();
        self.put(b, acc, corner);
        b.barrier();
        let n = self.warp.layout.n;
        let width = [4, 2, 1].into_iter().find(|w| n.is_multiple_of(*w)).unwrap_or(1);
        let per_token = self.tiles * TILE / width;
        let items = per_token * self.tokens * TOKENS;
        b.repeat(self.thread, items, self.threads, |b, item| {
            let token = b.div(item, per_token);
            let row = b.add(self.first_token, token);
            let in_block = b.rem(item, per_token);
            let in_block = b.mul(in_block, width);
            let col = b.mad(self.first_tile, TILE, in_block);
            let (row_there, col_there) = (b.lt(row, self.m), b.lt(col, n));
            let there = b.binary(Binary::PAnd, row_there, col_there);
            b.when(there, |b| {
                let at = At { row, out_row: row, col, width };
                let products = self.warp.spec.products();
                let accs: Vec<Vec<Val>> =
                    (0..products).map(|p| self.sums(b, p, token, in_block, &at)).collect();
                let mut known = self.frame.nothing();
                for store in &self.frame.expr().stores {
                    let values = self.frame.values(b, store.node, &at, &accs, &mut known);
                    self.frame.store(b, store, &at, &values);
                }
            });
        });
    }

    /// Writes a warp's sums to shared memory: `[part][product][token][output column]`.
    fn put(&self, b: &mut Builder, acc: &[Acc], corner: Corner) {
        let stride = stride(self.tiles);
        let tokens = self.tokens * TOKENS;
        let token = b.mad(corner.t, 2, corner.token);
        let column = b.mad(corner.tile, TILE, corner.g);
        let own = b.mad(token, stride, column);
        let first = b.mad(corner.part, self.warp.spec.products() * tokens * stride, own);
        let first = b.mul(first, 4);
        for (i, acc) in (0..).zip(acc) {
            let (tile, token) = (i / self.warp.tokens, i % self.warp.tokens);
            let (product, tile) = (tile / self.warp.rows, tile % self.warp.rows);
            for (j, &v) in (0..).zip(acc) {
                let token = product * tokens + token * TOKENS + j % 2;
                let at = b.add(first, (token * stride + tile * TILE + j / 2 * 8) * 4);
                let bits = if self.warp.stays_integer() { v.into() } else { b.unary(Unary::Bits, v) };
                b.store(Mem::Shared, at, &[bits], 4);
            }
        }
    }

    /// The finished sums of a product in adjacent output columns, of a row of the call that is number `token` of the block.
    fn sums(&self, b: &mut Builder, product: u32, token: Val, in_block: Val, at: &At) -> Vec<Val> {
        let stride = stride(self.tiles);
        let tokens = self.tokens * TOKENS;
        let integer = self.warp.stays_integer();
        let own = b.mad(token, stride, in_block);
        let own = b.mul(own, 4);
        let mut total: Vec<Val> = vec![];
        for part in 0..self.parts {
            let first = (part * self.warp.spec.products() + product) * tokens * stride;
            let place = b.add(own, first * 4);
            let words = b.load(Mem::Shared, place, at.width * 4);
            let values: Vec<Val> =
                words.into_iter().map(|w| if integer { w } else { b.unary(Unary::FromBits, w) }).collect();
            if total.is_empty() {
                total = values;
                continue;
            }
            for (total, v) in total.iter_mut().zip(values) {
                *total = if integer { b.add(*total, v) } else { Lanes::add(b, *total, v) };
            }
        }
        (0..).zip(total).map(|(i, sum)| self.scaled(b, product, sum, i, at)).collect()
    }

    /// A finished sum, column `i` of a place, with the scales of its row of weights and of its token.
    fn scaled(&self, b: &mut Builder, product: u32, mut sum: Val, i: u32, at: &At) -> Val {
        let layout = &self.warp.layout;
        if self.warp.stays_integer() {
            let zero = (layout.w.zero == Zero::Asym).then(|| self.of_record(b, product, i, at, true));
            let total = self.rows.map(|(_, sums)| {
                let place = b.mul(at.row, 4);
                b.load(sums, place, 4)[0]
            });
            sum = self.warp.corrected(b, sum, zero, total);
        }
        if layout.per_row() && layout.w.scale != ScaleTy::None {
            let scale = self.of_record(b, product, i, at, false);
            sum = Lanes::mul(b, sum, scale);
        }
        if let (Meets::Bytes, Some((scales, _))) = (layout.meets, self.rows) {
            let place = b.mul(at.row, 4);
            let word = b.load(scales, place, 4)[0];
            let scale = b.unary(Unary::FromBits, word);
            sum = Lanes::mul(b, sum, scale);
        }
        sum
    }

    /// The zero point or the scale of output column `i` of a place, where a row of weights has one.
    fn of_record(&self, b: &mut Builder, product: u32, i: u32, at: &At, zero: bool) -> Val {
        let layout = &self.warp.layout;
        let col = b.add(at.col, i);
        let (tile, row) = (b.div(col, TILE), b.rem(col, TILE));
        let (g, half) = (b.rem(row, 8), b.div(row, 8));
        let size = if zero { 1 } else { layout.w.scale.bytes() };
        let first = layout.codes_bytes() + if zero { 2 * layout.w.scale.bytes() } else { 0 };
        let record = b.mad(g, layout.record_bytes(), first);
        let in_tile = b.mad(half, size, record);
        let place = wide(b, tile, layout.tile_bytes(), in_tile);
        let word = b.load(self.weights[product as usize], place, size)[0];
        match (zero, layout.w.scale) {
            (true, _) => word,
            (false, ScaleTy::Bf16) => {
                let bits = b.shl(word, 16);
                b.unary(Unary::FromBits, bits)
            }
            (false, _) => b.unary(Unary::FromBits, word),
        }
    }
}
