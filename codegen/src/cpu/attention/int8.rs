//! Products of bytes: queries and weights of 16 bits by keys and values of 8.
//!
//! A query is rounded to integers from -32639 to 32639 with one factor for the vector, a block's weights to integers
//! from 0 to 65535 with one factor for the block. Each integer is `256 high + low`, and so is its product: the sums of
//! the upper halves are moved by 8 bits and those of the lower halves added. All of it is exact, keys and values being
//! whole numbers from -128 to 127.
use crate::cpu::llvm::{Elem, FloatCmp, Val};
use crate::cpu::math::Lanes;
use crate::eexpr::llvm::{Valid, Vectors};
use inkwell::values::PointerValue;

use super::emit::{Attention, BLOCK, Block, Cache, Work};

/// The largest magnitude of a query's integers: both halves are then signed bytes.
const QUERY_TOP: f32 = 32639.0;

/// The largest weight.
const WEIGHT_TOP: f32 = 65535.0;

impl<'c> Attention<'_, '_, 'c> {
    /// Bytes of half a query.
    fn code_bytes(&self) -> i64 {
        self.cache.map_or(0, |cache| i64::from(cache.keys.width))
    }

    /// Where the upper (0) or lower (1) half of query `m` begins.
    fn query_half(&self, m: Val<'c>, half: i64) -> PointerValue<'c> {
        let bytes = self.code_bytes();
        self.at(self.plan.q, m, 2 * bytes, self.b.i64(half * bytes), 1)
    }

    /// Rounds the scaled query `m` to integers and stores their halves.
    pub(super) fn query_bytes(&self, m: Val<'c>, query: impl Fn(i64, Valid<'c>) -> Val<'c>) {
        let (b, n) = (self.b, self.lanes as u32);
        let mut largest = b.f32(n, 0.0);
        self.columns(|col, valid| largest = b.fmax(b.fabs(query(col, valid)), largest));
        let largest = b.reduce(largest, |b, x, y| b.fmax(x, y));
        let factor = b.fmax(b.fdiv(largest, b.f32(1, QUERY_TOP)), b.f32(1, f32::MIN_POSITIVE));
        b.store(self.of_query(self.plan.factor, m), factor, Elem::F32);
        let divisor = b.splat(factor, n);
        let mut sum = b.i32(n, 0);
        self.columns(|col, valid| {
            let x = b.fdiv(query(col, valid), divisor);
            // What is not a number must come out as some integer.
            let x = b.select(b.fcmp(FloatCmp::ORD, x, x), x, b.f32(n, 0.0));
            let top = b.f32(n, QUERY_TOP);
            let x = b.fmin(b.fmax(x, b.fneg(top)), top);
            let x = b.fptosi(Vectors { b, lanes: n }.round(x), Elem::I32);
            sum = b.add(sum, x);
            let high = b.ashr(b.add(x, b.i32(n, 128)), b.i32(n, 8));
            for (half, bytes) in [high, b.sub(x, b.shl(high, b.i32(n, 8)))].into_iter().enumerate() {
                let to = b.offset(self.query_half(m, half as i64), col);
                b.store(to, b.trunc(bytes, Elem::I8), Elem::I8);
            }
        });
        // Keys are stored 128 too large.
        let sum = b.reduce(sum, |b, x, y| b.add(x, y));
        b.store(self.of_query(self.plan.start, m), b.mul(sum, b.i32(1, -128)), Elem::I32);
    }

    /// `acc[i][v]` plus the products of unsigned and signed bytes, four a lane; `queries` says which are splat.
    fn tile_dot(
        &self,
        acc: &[Val<'c>],
        vectors: &[Val<'c>],
        quads: &[Val<'c>],
        dot: impl Fn(Val<'c>, Val<'c>) -> [Val<'c>; 2],
    ) -> Vec<Val<'c>> {
        let b = self.b;
        let mut next = Vec::with_capacity(acc.len());
        for (i, &quad) in quads.iter().enumerate() {
            for (v, &vector) in vectors.iter().enumerate() {
                let [unsigned, signed] = dot(vector, quad);
                let before = acc[i * vectors.len() + v];
                next.push(b.vpdpbusd(before, unsigned, signed));
            }
        }
        next
    }

    /// Four bytes in every lane.
    fn quad(&self, ptr: PointerValue<'c>) -> Val<'c> {
        self.b.splat(self.b.load_aligned(ptr, Elem::I32, 1, 4), self.lanes as u32)
    }

    /// Products of all queries with the keys of the block, the queries' factors aside.
    pub(super) fn byte_products(&self, w: &Work<'c>, block: &Block<'c>, cache: &Cache<'c>) {
        let (b, n) = (self.b, self.lanes as u32);
        let Some((scales, _)) = block.scales else { return };
        let quads = (self.d + 3) / 4;
        let quad_bytes = BLOCK * 4;
        self.key_tiles(block, |key, vectors| {
            let keys = b.row(block.k, key, 4);
            self.tiles(w.m, |m, mr| {
                let mut acc = vec![b.i32(n, 0); (mr * vectors) as usize];
                for half in 0..2 {
                    let queries = self.query_half(m, half);
                    acc = b.for_const(0, quads, 1, &acc, |quad, acc| {
                        let at = b.row(keys, quad, quad_bytes);
                        let columns: Vec<_> = (0..vectors)
                            .map(|v| b.load(b.offset(at, v * self.lanes * 4), Elem::I32, n))
                            .collect();
                        let q = b.row(queries, quad, 4);
                        let q: Vec<_> = (0..mr)
                            .map(|i| self.quad(b.offset(q, i * 2 * i64::from(cache.keys.width))))
                            .collect();
                        self.tile_dot(acc, &columns, &q, |keys, query| [keys, query])
                    });
                    if half == 0 {
                        acc.iter_mut().for_each(|x| *x = b.shl(*x, b.i32(n, 8)));
                    }
                }
                let products: Vec<_> = acc
                    .iter()
                    .enumerate()
                    .map(|(i, &x)| {
                        let (row, v) = (i as i64 / vectors, i as i64 % vectors);
                        let start = self.of_query(self.plan.start, b.add(m, b.i64(row)));
                        let start = b.splat(b.load(start, Elem::I32, 1), n);
                        let x = b.sitofp(b.add(x, start), Elem::F32);
                        b.fmul(x, self.scales(scales, key, v))
                    })
                    .collect();
                self.store_products(m, key, vectors, &products);
            });
        });
    }

    /// Rounds weights, scales of values included, to integers and stores their halves.
    pub(super) fn weight_bytes(&self, m: Val<'c>, weights: &[Val<'c>]) {
        let (b, n) = (self.b, self.lanes as u32);
        let largest = self.tree(weights, |x, y| b.fmax(x, y));
        let largest = b.reduce(largest, |b, x, y| b.fmax(x, y));
        b.store(self.of_query(self.plan.weight, m), b.fmul(largest, b.f32(1, 1.0 / WEIGHT_TOP)), Elem::F32);
        let some = b.fcmp(FloatCmp::OGT, largest, b.f32(1, f32::MIN_POSITIVE));
        let inverse = b.select(some, b.fdiv(b.f32(1, WEIGHT_TOP), largest), b.f32(1, 0.0));
        let inverse = b.splat(inverse, n);
        for (v, &p) in weights.iter().enumerate() {
            // Added to 2^23 a weight is the nearest integer in the low bits.
            let shifted = b.fma(p, inverse, b.f32(n, 8_388_608.0));
            let bits = b.bitcast(shifted, Elem::I32, n);
            let halves = [(self.plan.high, b.lshr(bits, b.i32(n, 8))), (self.plan.low, bits)];
            for (at, half) in halves {
                let to = self.at(at, m, BLOCK, b.i64(v as i64 * self.lanes), 1);
                b.store(to, b.trunc(half, Elem::I8), Elem::I8);
            }
        }
    }

    /// Weighted sums of values.
    pub(super) fn byte_sums(&self, w: &Work<'c>, block: &Block<'c>, cache: &Cache<'c>) {
        let (b, n) = (self.b, self.lanes as u32);
        let quads = b.sdiv(b.add(block.keys, b.i64(3)), b.i64(4));
        let quad_bytes = i64::from(cache.values.width) * 4;
        self.column_tiles(|col, vectors| {
            let values = b.offset(block.v, col * 4);
            self.tiles(w.m, |m, mr| {
                let mut acc = vec![b.i32(n, 0); (mr * vectors) as usize];
                for half in [self.plan.high, self.plan.low] {
                    let weights = self.at(half, m, BLOCK, b.i64(0), 1);
                    acc = b.for_range(b.i64(0), quads, 1, &acc, |quad, acc| {
                        let at = b.row(values, quad, quad_bytes);
                        let columns: Vec<_> = (0..vectors)
                            .map(|v| b.load(b.offset(at, v * self.lanes * 4), Elem::I32, n))
                            .collect();
                        let p = b.row(weights, quad, 4);
                        let p: Vec<_> = (0..mr).map(|i| self.quad(b.offset(p, i * BLOCK))).collect();
                        self.tile_dot(acc, &columns, &p, |values, weight| [weight, values])
                    });
                    if half == self.plan.high {
                        acc.iter_mut().for_each(|x| *x = b.shl(*x, b.i32(n, 8)));
                    }
                }
                let o = self.at(self.plan.o, m, self.padded, b.i64(col), 4);
                for i in 0..mr {
                    let query = b.add(m, b.i64(i));
                    let alpha = self.spread(self.of_query(self.plan.alpha, query));
                    let weight = self.spread(self.of_query(self.plan.weight, query));
                    for v in 0..vectors {
                        let place = b.offset(o, (i * self.padded + v * self.lanes) * 4);
                        let before = b.fmul(self.load(place), alpha);
                        let x = b.sitofp(acc[(i * vectors + v) as usize], Elem::F32);
                        b.store(place, b.fma(x, weight, before), Elem::F32);
                    }
                }
            });
        });
    }
}
