//! The end of a product: the warps' sums are added in order, and the epilogue turns them into results.

use super::{Acc, Skinny, SkinnyTile, TOKENS};
use crate::cpu::math::Lanes;
use crate::cuda::expr::{At, wide};
use crate::cuda::layout::{Meets, TILE};
use crate::cuda::tile::{Binary, Builder, Mem, Unary, Val, WARP};
use crate::spec::{MatmulSpec, ScaleTy, Zero};

/// Numbers between a token's sums in shared memory and the next one's: four more than there are, so that the lanes of a
/// fragment, of 8 rows and 4 tokens apart by two, fall into different banks.
fn stride(tile: SkinnyTile) -> u32 {
    tile.rows * TILE + 4
}

/// Bytes of shared memory for the warps' sums.
pub(super) fn bytes(spec: &MatmulSpec, tile: SkinnyTile) -> u32 {
    tile.warps * spec.products() * tile.tokens * TOKENS * stride(tile) * 4
}

impl Skinny<'_> {
    /// Adds up and writes.
    pub(super) fn finish(&self, b: &mut Builder, acc: &[Acc]) {
        // No copy is under way: each was waited for, and those after the last unit copy nothing.
        b.note("all warps are through with their copies, whose places take the sums");
        b.barrier();
        self.put(b, acc);
        b.barrier();
        let n = self.layout.n;
        let width = [4, 2, 1].into_iter().find(|w| n.is_multiple_of(*w)).unwrap_or(1);
        let per_token = self.tile.rows * TILE / width;
        let items = per_token * self.tile.tokens * TOKENS;
        b.repeat(self.place.thread, items, self.tile.warps * WARP, |b, item| {
            let token = b.div(item, per_token);
            let row = b.add(self.place.first_token, token);
            let in_block = b.rem(item, per_token);
            let in_block = b.mul(in_block, width);
            let col = b.mad(self.place.first_tile, TILE, in_block);
            let (row_there, col_there) = (b.lt(row, self.place.m), b.lt(col, n));
            let there = b.binary(Binary::PAnd, row_there, col_there);
            b.when(there, |b| {
                let at = At { row, out_row: row, col, width };
                let accs: Vec<Vec<Val>> =
                    (0..self.spec.products()).map(|p| self.sums(b, p, token, in_block, &at)).collect();
                let mut known = self.frame.nothing();
                for store in &self.frame.expr().stores {
                    let values = self.frame.values(b, store.node, &at, &accs, &mut known);
                    self.frame.store(b, store, &at, &values);
                }
            });
        });
    }

    /// Writes this warp's sums to shared memory: `[warp][product][token][output column]`.
    fn put(&self, b: &mut Builder, acc: &[Acc]) {
        let stride = stride(self.tile);
        let tokens = self.tile.tokens * TOKENS;
        let pair = b.mul(self.place.t, 2 * stride);
        let own = b.add(pair, self.place.g);
        let first = b.mad(self.place.warp, self.spec.products() * tokens * stride, own);
        for (i, acc) in (0..).zip(acc) {
            let (tile, token) = (i / self.tile.tokens, i % self.tile.tokens);
            let (product, tile) = (tile / self.tile.rows, tile % self.tile.rows);
            for (j, &v) in (0..).zip(acc) {
                let token = product * tokens + token * TOKENS + j % 2;
                let at = b.add(first, token * stride + tile * TILE + j / 2 * 8);
                let at = b.mul(at, 4);
                let bits = if self.stays_integer() { v.into() } else { b.unary(Unary::Bits, v) };
                b.store(Mem::Shared, at, &[bits], 4);
            }
        }
    }

    /// The finished sums of a product in adjacent output columns, of a row of the call that is number `token` of the block.
    fn sums(&self, b: &mut Builder, product: u32, token: Val, in_block: Val, at: &At) -> Vec<Val> {
        let stride = stride(self.tile);
        let tokens = self.tile.tokens * TOKENS;
        let mut total: Vec<Val> = vec![];
        for warp in 0..self.tile.warps {
            let first = (warp * self.spec.products() + product) * tokens * stride;
            let own = b.mad(token, stride, in_block);
            let place = b.add(own, first);
            let place = b.mul(place, 4);
            let words = b.load(Mem::Shared, place, at.width * 4);
            let integer = self.stays_integer();
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
        let layout = &self.layout;
        if self.stays_integer() {
            let zero = (layout.w.zero == Zero::Asym).then(|| self.of_record(b, product, i, at, true));
            let total = self.rows.map(|(_, sums)| {
                let place = b.mul(at.row, 4);
                b.load(sums, place, 4)[0]
            });
            sum = self.corrected(b, sum, zero, total);
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
        let layout = &self.layout;
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
