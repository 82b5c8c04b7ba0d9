//! Some keys and values in shared memory, and what a warp does with them.
//!
//! They lie as arrays of lanes' fragments, 16 bytes each, so that a warp's accesses are adjacent whoever copied them:
//!
//! ```text
//! keys     [tile of 8 keys][chunk of columns][lane]     lane g, t: 16 bytes of key g's columns, the t-th quarter of the chunk
//! values   [tile of 8 columns][chunk of keys][lane]     lane g, t: 16 bytes of column g's keys, the t-th quarter of the chunk
//! scales   of keys, of values: f32 in the order of the keys
//! ```
//!
//! A chunk is 64 bytes: 32 numbers of bf16, or 64 codes. Sums do not care in which order numbers are taken, so queries are
//! read in the order in which a lane finds columns in its 16 bytes, and keys are counted in the order in which it finds
//! them there in the values: [`Unit::key`] is the key that is column `2 t + e` of a tile.

use super::{Arguments, AttentionCall};
use crate::cpu::cache::{CacheTy, Role};
use crate::cpu::math::{Lanes, tanh};
use crate::cuda::cache::CacheLayout;
use crate::cuda::dequant;
use crate::cuda::expr::{alignment, load, wide};
use crate::cuda::tile::{Binary, Builder, Mem, MmaKind, Reg, Unary, Val};
use crate::eexpr::MemTy;
use quantc_ir::diag::Result;

/// Bytes of an array of a warp's fragments.
pub(super) const FRAGMENT: u32 = 512;

/// Query vectors of a warp.
pub(in crate::cuda) const ROWS: u32 = 16;

/// Some keys and values of one head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unit<'a> {
    pub call: &'a AttentionCall,
    pub keys: CacheLayout,
    pub values: CacheLayout,
    /// How many.
    pub tokens: u32,
    /// Whether scales of tokens lie as [`Unit::scale_place`] says, and not in order.
    pub spread: bool,
}

/// What a warp knows of its rows: of row g, then of row g + 8.
pub(super) struct State {
    /// The largest product so far, in powers of two.
    pub max: [Reg; 2],
    /// This lane's part of the sum of weights.
    pub sum: [Reg; 2],
    /// Weighted sums of values: for each tile of 8 columns.
    pub out: Vec<[Reg; 4]>,
}

/// Which keys of a sequence a row sees: from the first on, so many.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sees {
    pub first: Val,
    pub count: Val,
}

impl<'a> Unit<'a> {
    pub fn new(call: &'a AttentionCall, tokens: u32) -> Result<Unit<'a>> {
        let (keys, values) = (call.layout(Role::Keys)?, call.layout(Role::Values)?);
        Ok(Unit { call, keys, values, tokens, spread: false })
    }

    fn ty(&self) -> CacheTy {
        self.keys.ty
    }

    /// Numbers of a chunk.
    pub fn chunk(&self) -> u32 {
        64 / self.ty().bytes()
    }

    /// Matrix products of a chunk.
    fn steps(&self) -> u32 {
        self.chunk() / MmaKind::Bf16.k()
    }

    fn key_tiles(&self) -> u32 {
        self.tokens / 8
    }

    fn key_chunks(&self) -> u32 {
        self.keys.width() / self.chunk()
    }

    fn value_tiles(&self) -> u32 {
        self.values.width() / 8
    }

    fn value_chunks(&self) -> u32 {
        self.tokens / self.chunk()
    }

    fn values_at(&self) -> u32 {
        self.key_tiles() * self.key_chunks() * FRAGMENT
    }

    /// Where the scales of keys begin; those of values follow.
    pub fn scales_at(&self) -> u32 {
        self.values_at() + self.value_tiles() * self.value_chunks() * FRAGMENT
    }

    /// Bytes of keys, values and scales.
    pub fn bytes(&self) -> u32 {
        self.scales_at() + if self.call.token_scales() { 2 * 4 * self.tokens } else { 0 }
    }

    /// Arrays of fragments of keys, then of values.
    pub fn fragments(&self) -> u32 {
        self.scales_at() / FRAGMENT
    }

    /// Bytes of the fragments of a warp's queries.
    pub fn query_bytes(&self) -> u32 {
        self.keys.width() / MmaKind::Bf16.k() * FRAGMENT
    }

    /// The key of the unit that is column `2 t + e` of a tile.
    pub fn key(&self, b: &mut Builder, tile: Val, t: Val, e: Val) -> Val {
        let per_chunk = self.chunk() / 8;
        let (chunk, in_chunk) = (b.div(tile, per_chunk), b.rem(tile, per_chunk));
        let first = b.mul(chunk, self.chunk());
        let first = b.mad(t, self.chunk() / 4, first);
        match self.ty().bytes() {
            1 => {
                // Of a word's bytes the first product takes 0 and 2, as a pair, and 1 and 3.
                let (word, odd) = (b.div(in_chunk, 2), b.rem(in_chunk, 2));
                let at = b.mad(word, 4, first);
                let at = b.mad(e, 2, at);
                b.add(at, odd)
            }
            _ => {
                let at = b.mad(in_chunk, 2, first);
                b.add(at, e)
            }
        }
    }

    /// Where lane (g, t) of the array with this number finds its 16 bytes of keys: key of the unit, byte of its row.
    pub fn key_piece(&self, b: &mut Builder, number: Val, g: Val, t: Val) -> (Val, Val) {
        let (tile, chunk) = (b.div(number, self.key_chunks()), b.rem(number, self.key_chunks()));
        let (pair, odd) = (b.div(g, 2), b.rem(g, 2));
        let key = self.key(b, tile, pair, odd);
        let quarter = b.mul(t, 16);
        (key, b.mad(chunk, 64, quarter))
    }

    /// Where lane (g, t) of the array with this number, counted from the first of the values, finds its 16 bytes: column,
    /// and first key of the unit.
    pub fn value_piece(&self, b: &mut Builder, number: Val, g: Val, t: Val) -> (Val, Val) {
        let (tile, chunk) = (b.div(number, self.value_chunks()), b.rem(number, self.value_chunks()));
        let column = b.mad(tile, 8, g);
        let first = b.mul(chunk, self.chunk());
        (column, b.mad(t, self.chunk() / 4, first))
    }

    /// Arrays of fragments of keys.
    pub fn key_fragments(&self) -> u32 {
        self.values_at() / FRAGMENT
    }

    /// Puts the queries of a warp, some matrix products' worth of them, to shared memory, bf16. `rows` are the tokens and
    /// query heads of this lane's two rows, and whether they are there.
    #[expect(clippy::too_many_arguments, reason = "where from, where to, which ones")]
    pub fn put_queries(
        &self,
        b: &mut Builder,
        args: &Arguments<'_>,
        rows: [(Val, Val, Val); 2],
        (lane, t): (Val, Val),
        at: Val,
        first: Val,
        step: u32,
    ) {
        let spec = &self.call.spec;
        let own = b.mad(lane, 16, at);
        b.repeat(first, self.keys.width() / MmaKind::Bf16.k(), step, |b, number| {
            let (chunk, step) = (b.div(number, self.steps()), b.rem(number, self.steps()));
            let column = b.mul(chunk, self.chunk());
            let column = b.mad(t, self.chunk() / 4, column);
            let column = b.mad(step, 4, column);
            let inside = b.lt(column, spec.head_dim);
            let column = b.binary(Binary::Min, column, spec.head_dim - 4);
            let mut words = [Val::U32(0); 4];
            for (i, (token, head, there)) in rows.into_iter().enumerate() {
                let in_row = b.mad(head, spec.head_dim, column);
                let in_row = b.mul(in_row, 4);
                let from = wide(b, token, spec.q_stride * 4, in_row);
                let aligned = alignment(&[16, spec.q_stride * 4, spec.head_dim * 4]);
                let v = load(b, args.q, from, MemTy::F32, 4, aligned);
                let inside = b.binary(Binary::PAnd, inside, there);
                let v: Vec<Val> = v.into_iter().map(|v| b.select(inside, v, 0.0)).collect();
                let pairs = if self.ty().bytes() == 1 { [[0, 2], [1, 3]] } else { [[0, 1], [2, 3]] };
                for (j, [low, high]) in pairs.into_iter().enumerate() {
                    words[i + 2 * j] = b.binary(Binary::PackBf16, v[low], v[high]);
                }
            }
            let to = b.mad(number, FRAGMENT, own);
            b.store(Mem::Shared, to, &words, 16);
        });
    }

    /// Nothing seen yet.
    pub fn state(&self, b: &mut Builder) -> State {
        State {
            max: [(); 2].map(|()| b.var(f32::NEG_INFINITY)),
            sum: [(); 2].map(|()| b.var(0.0)),
            out: (0..self.value_tiles()).map(|_| [(); 4].map(|()| b.var(0.0))).collect(),
        }
    }

    /// Adds the unit at `slot`, whose first key has this number in its sequence.
    #[expect(clippy::too_many_arguments, reason = "where things are, and which keys count")]
    pub fn add(
        &self,
        b: &mut Builder,
        state: &State,
        (lane, t): (Val, Val),
        queries: Val,
        slot: Val,
        first: Val,
        sees: [Sees; 2],
        factor: Val,
    ) {
        let own = b.mad(lane, 16, slot);
        let products = self.products(b, own, lane, queries);
        let scores = self.scores(b, &products, slot, t, factor);
        self.mask(b, &scores, first, t, sees);
        let weights = self.weigh(b, state, &scores);
        self.sum_values(b, state, &weights, own, slot, t);
    }

    /// Products of queries and keys: a tile of sums for each 8 keys.
    fn products(&self, b: &mut Builder, own: Val, lane: Val, queries: Val) -> Vec<[Reg; 4]> {
        let acc: Vec<[Reg; 4]> = (0..self.key_tiles()).map(|_| [(); 4].map(|()| b.var(0.0))).collect();
        let queries = b.mad(lane, 16, queries);
        for chunk in 0..self.key_chunks() {
            let left: Vec<Vec<Val>> = (0..self.steps())
                .map(|i| {
                    let at = b.add(queries, (chunk * self.steps() + i) * FRAGMENT);
                    b.load(Mem::Shared, at, 16)
                })
                .collect();
            for (tile, &acc) in (0..).zip(&acc) {
                let at = b.add(own, (tile * self.key_chunks() + chunk) * FRAGMENT);
                let words = b.load(Mem::Shared, at, 16);
                for (i, left) in left.iter().enumerate() {
                    let right = self.pair(b, &words, i);
                    b.mma(MmaKind::Bf16, acc, [left[0], left[1], left[2], left[3]], right);
                }
            }
        }
        acc
    }

    /// What a matrix product takes of a lane's 16 bytes.
    fn pair(&self, b: &mut Builder, words: &[Val], step: usize) -> [Val; 2] {
        match self.ty().bytes() {
            1 => dequant::byte_pairs(b, self.ty() == CacheTy::E4m3, words[step]),
            _ => [words[2 * step], words[2 * step + 1]],
        }
    }

    /// Where in a unit's scales that are spread a piece of four of them lies: those that the four lanes of a row read at once
    /// lie side by side, in banks of their own. Codes come in chunks of 64 keys, a quarter of them for each such lane.
    pub fn scale_place(&self, b: &mut Builder, piece: Val) -> Val {
        let (quarter, word) = (b.div(piece, 4), b.rem(piece, 4));
        let (chunk, quarter) = (b.div(quarter, 4), b.rem(quarter, 4));
        let place = b.mad(word, 4, quarter);
        b.mad(chunk, 16, place)
    }

    /// A scale for each key that this lane has, as columns of tiles: `[tile][e]`.
    fn token_scales(&self, b: &mut Builder, at: Val, t: Val) -> Vec<[Val; 2]> {
        let (lane, next) = if self.spread { (4, self.chunk() / 4) } else { (self.chunk() / 4, 4) };
        let at = b.mad(t, lane * 4, at);
        let mut list = vec![[Val::F32(1.0.into()); 2]; self.key_tiles() as usize];
        let per_chunk = (self.chunk() / 8) as usize;
        for chunk in 0..self.value_chunks() {
            for word in 0..self.chunk() / 16 {
                let at = b.add(at, (chunk * self.chunk() + next * word) * 4);
                let v = b.load(Mem::Shared, at, 16);
                let v: Vec<Val> = v.into_iter().map(|w| b.unary(Unary::FromBits, w)).collect();
                let tile = chunk as usize * per_chunk + 2 * word as usize;
                list[tile] = [v[0], v[2]];
                list[tile + 1] = [v[1], v[3]];
            }
        }
        list
    }

    /// Products as powers of two: scaled, and bent where they are to be.
    fn scores(
        &self,
        b: &mut Builder,
        products: &[[Reg; 4]],
        slot: Val,
        t: Val,
        factor: Val,
    ) -> Vec<[Reg; 4]> {
        let scales = self.call.token_scales().then(|| {
            let at = b.add(slot, self.scales_at());
            self.token_scales(b, at, t)
        });
        let cap = self.call.spec.softcap.map(|c| c.get());
        for (tile, acc) in products.iter().enumerate() {
            for (i, &acc) in acc.iter().enumerate() {
                let mut x = Lanes::mul(b, acc.into(), factor);
                if let Some(scales) = &scales {
                    x = Lanes::mul(b, x, scales[tile][i % 2]);
                }
                if let Some(cap) = cap {
                    let y = Lanes::mul(b, x, (1.0 / cap).into());
                    let y = tanh(b, y);
                    x = Lanes::mul(b, y, (cap * std::f32::consts::LOG2_E).into());
                }
                b.set(acc, x);
            }
        }
        products.to_vec()
    }

    /// The factor on products that all keys share; `fixed` is the scale of the head's keys, if it is one.
    pub fn factor(&self, b: &mut Builder, fixed: Option<Val>) -> Val {
        let spec = &self.call.spec;
        let log = if spec.softcap.is_some() { 1.0 } else { std::f32::consts::LOG2_E };
        let factor = spec.scale.get() * log;
        match fixed {
            Some(scale) => Lanes::mul(b, scale, factor.into()),
            None => factor.into(),
        }
    }

    /// Keys that a row does not see count nothing.
    fn mask(&self, b: &mut Builder, scores: &[[Reg; 4]], first: Val, t: Val, sees: [Sees; 2]) {
        for (row, Sees { first: from, count }) in sees.into_iter().enumerate() {
            // How far the unit's keys are into what the row sees, which a number below it is not.
            let into = b.binary(Binary::Sub, first, from);
            let end = b.add(into, self.tokens);
            let before = b.lt(count, end);
            let after = b.lt(first, from);
            let some = b.select(before, 1, 0);
            let some = b.select(after, 1, some);
            let some = b.lt(0, some);
            b.when(some, |b| {
                for (tile, acc) in (0..).zip(scores) {
                    for e in 0..2 {
                        let key = self.key(b, Val::U32(tile), t, e.into());
                        let at = b.add(into, key);
                        let seen = b.lt(at, count);
                        let acc = acc[2 * row + e as usize];
                        let x = b.select(seen, acc, f32::NEG_INFINITY);
                        b.set(acc, x);
                    }
                }
            });
        }
    }

    /// Weights, in terms of the largest product so far; what was summed before is put in the same terms.
    fn weigh(&self, b: &mut Builder, state: &State, scores: &[[Reg; 4]]) -> Vec<[Val; 4]> {
        let mut weights = vec![[Val::U32(0); 4]; scores.len()];
        for row in 0..2 {
            let of_row = |e: usize| 2 * row + e;
            let mut max: Val = state.max[row].into();
            for acc in scores {
                for e in 0..2 {
                    max = b.binary(Binary::FMax, max, acc[of_row(e)]);
                }
            }
            for mask in [1, 2] {
                let other = b.shuffle_xor(max, mask);
                max = b.binary(Binary::FMax, max, other);
            }
            // Where nothing was seen yet all weights are zero, and not what differences of infinities give.
            let nothing = b.binary(Binary::FEq, max, f32::NEG_INFINITY);
            let top = b.select(nothing, 0.0, max);
            let before = Lanes::sub(b, state.max[row].into(), top);
            let before = b.unary(Unary::Exp2, before);
            let mut sum = Lanes::mul(b, state.sum[row].into(), before);
            for (acc, weights) in scores.iter().zip(&mut weights) {
                for e in 0..2 {
                    let x = Lanes::sub(b, acc[of_row(e)].into(), top);
                    let w = b.unary(Unary::Exp2, x);
                    sum = Lanes::add(b, sum, w);
                    weights[of_row(e)] = w;
                }
            }
            b.set(state.sum[row], sum);
            b.set(state.max[row], max);
            for out in &state.out {
                for e in 0..2 {
                    let scaled = Lanes::mul(b, out[of_row(e)].into(), before);
                    b.set(out[of_row(e)], scaled);
                }
            }
        }
        weights
    }

    /// Adds the values by their weights.
    fn sum_values(&self, b: &mut Builder, state: &State, weights: &[[Val; 4]], own: Val, slot: Val, t: Val) {
        let scales = self.call.token_scales().then(|| {
            let at = b.add(slot, self.scales_at() + 4 * self.tokens);
            self.token_scales(b, at, t)
        });
        let pack = |b: &mut Builder, tile: usize, row: usize| {
            let [low, high] = [0, 1].map(|e| {
                let w = weights[tile][2 * row + e];
                match &scales {
                    Some(scales) => Lanes::mul(b, w, scales[tile][e]),
                    None => w,
                }
            });
            b.binary(Binary::PackBf16, low, high)
        };
        let left: Vec<[Val; 4]> = (0..weights.len() / 2)
            .map(|step| [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(half, row)| pack(b, 2 * step + half, row)))
            .collect();
        for (tile, &out) in (0..).zip(&state.out) {
            for chunk in 0..self.value_chunks() {
                let at = b.add(own, self.values_at() + (tile * self.value_chunks() + chunk) * FRAGMENT);
                let words = b.load(Mem::Shared, at, 16);
                for i in 0..self.steps() as usize {
                    let right = self.pair(b, &words, i);
                    b.mma(MmaKind::Bf16, out, left[chunk as usize * self.steps() as usize + i], right);
                }
            }
        }
    }

    /// The sums of weights over the lanes of a row.
    pub fn sums(&self, b: &mut Builder, state: &State) -> [Val; 2] {
        state.sum.map(|sum| {
            let mut sum: Val = sum.into();
            for mask in [1, 2] {
                let other = b.shuffle_xor(sum, mask);
                sum = Lanes::add(b, sum, other);
            }
            sum
        })
    }
}
