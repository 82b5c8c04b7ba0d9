//! Attention of many tokens: a block has some tokens of one key/value head, and its warps share keys and values.
//!
//! Rows of a block are its tokens' heads, token by token; each warp has 16 of them. Tokens that follow each other in one
//! sequence go together as a run; a block goes over the keys of each of its runs, and rows of other runs see none of them.
//! So any mix of sequences is computed, and long prompts cost what they should.
//!
//! Keys and values of a cache are copied without waiting, some units ahead. Those that are rows of the call are loaded,
//! rounded to bf16 and put where copies would go.

use super::unit::{FRAGMENT, ROWS, Sees, State, Unit};
use super::{Arguments, AttentionCall, Cache, Queries};
use crate::cpu::attention::KvSource;
use crate::cpu::math::Lanes;
use crate::cuda::attention::decode::valid_bytes;
use crate::cuda::cache::{PAGE, page_of};
use crate::cuda::expr::{At, alignment, load, wide};
use crate::cuda::product::plus;
use crate::cuda::tile::{Binary, Builder, Extent, Kernel, Mem, Ternary, Unary, Val, WARP};
use crate::eexpr::MemTy;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::GpuDesc;
use serde::{Deserialize, Serialize};

/// How attention is cut.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct PrefillTile {
    /// Keys of a unit: 32 or 64, of codes 64.
    pub unit: u32,
    /// Warps of a block, with 16 rows each.
    pub warps: u32,
    /// Units under way, at least 2; 1 where keys are rows of the call.
    pub stages: u32,
}

impl PrefillTile {
    /// The tile for a GPU: the most rows and stages that shared memory has room for.
    pub fn of(call: &AttentionCall, gpu: &GpuDesc) -> Result<PrefillTile> {
        let narrow = call.spec.head_dim <= 128;
        let unit = if narrow || call.layout(crate::cpu::cache::Role::Keys)?.ty.is_scaled() { 64 } else { 32 };
        let least = call.spec.group().div_ceil(ROWS).next_power_of_two();
        let sizes: &[(u32, u32)] =
            if call.cache().is_some() { &[(4, 3), (4, 2), (2, 2)] } else { &[(4, 1), (2, 1)] };
        let tiles =
            sizes.iter().map(|&(warps, stages)| PrefillTile { unit, warps: warps.max(least), stages });
        let fits = |part: u32| {
            tiles.clone().find(|tile| tile.shared_bytes(call).is_ok_and(|n| n <= gpu.shared_bytes / part))
        };
        fits(2).or_else(|| fits(1)).ok_or_else(|| {
            Diag::target(format!("attention has no room in the shared memory of {}", gpu.arch))
        })
    }

    /// Tokens of a block.
    fn tokens(&self, call: &AttentionCall) -> u32 {
        self.warps * ROWS / call.spec.group()
    }

    /// Bytes of shared memory: the queries of all warps, and units.
    fn shared_bytes(&self, call: &AttentionCall) -> Result<u32> {
        let unit = Unit::new(call, self.unit)?;
        Ok(self.warps * unit.query_bytes() + self.stages * unit.bytes().next_multiple_of(128))
    }
}

/// The kernel of `call`, called `name`. Grid: columns are key/value heads, rows are blocks of tokens. No workspace.
pub fn build(name: &str, call: &AttentionCall, tile: PrefillTile) -> Result<Kernel> {
    call.check()?;
    let spec = &call.spec;
    let unit = Unit::new(call, tile.unit)?;
    let tokens = tile.tokens(call);
    if tokens == 0 {
        return Err(Diag::target(format!(
            "attention of {} heads for one of keys has no CUDA kernel of {} warps",
            spec.group(),
            tile.warps
        )));
    }
    let stages_fit = if call.cache().is_some() { tile.stages >= 2 } else { tile.stages == 1 };
    if !tile.unit.is_multiple_of(unit.chunk()) || !PAGE.is_multiple_of(tile.unit) || !stages_fit {
        return Err(Diag::bug(format!("no such cut of attention: {tile:?}")));
    }
    let mut b = Builder::new(name, tile.warps * WARP);
    let args = Arguments::declare(&mut b, call);
    let queries = Queries::declare(&mut b, spec);
    let rows = Extent::PerScalar { scalar: queries.scalar, times: 1, per: tokens };
    b.grid(Extent::Fixed(spec.kv_heads), rows);
    let at = b.shared(tile.shared_bytes(call)?);
    debug_assert_eq!(at, 0);

    let (kv_head, block, thread) = (b.block_x(), b.block_y(), b.thread());
    let (warp, lane) = (b.div(thread, WARP), b.rem(thread, WARP));
    let (g, quarter) = (b.div(lane, 4), b.rem(lane, 4));
    let Queries { count, before, .. } = queries;
    let first = b.mul(block, tokens);
    let left = b.binary(Binary::Sub, count, first);
    let here = b.binary(Binary::Min, left, tokens);
    let cx = Prefill { args: &args, unit, tile, kv_head, thread, lane, quarter, first, here, before, count };

    // The token in the block, and the head, of this lane's rows.
    let first_head = b.mul(kv_head, spec.group());
    let rows = [0, 8].map(|plus| {
        let row = b.mad(warp, ROWS, g);
        let row = b.add(row, plus);
        let token = b.div(row, spec.group());
        let head = b.rem(row, spec.group());
        let there = b.lt(token, here);
        Row { token, head: b.add(first_head, head), there }
    });
    let queries = b.mul(warp, unit.query_bytes());
    let of_row = |b: &mut Builder, row: Row| {
        let last = b.binary(Binary::Sub, here, 1);
        let token = b.binary(Binary::Min, row.token, last);
        (b.add(first, token), row.head, row.there)
    };
    let from = [of_row(&mut b, rows[0]), of_row(&mut b, rows[1])];
    // Each lane reads what it has written itself.
    unit.put_queries(&mut b, &args, from, (lane, quarter), queries, 0.into(), 1);
    let state = unit.state(&mut b);
    match args.cache {
        Some(cache) => cx.runs(&mut b, cache, queries, &rows, &state),
        None => cx.direct(&mut b, queries, &rows, &state),
    }
    cx.store(&mut b, &rows, &state);
    Ok(b.finish())
}

/// A row of a lane.
#[derive(Clone, Copy)]
struct Row {
    /// The token in the block.
    token: Val,
    /// The query head.
    head: Val,
    there: Val,
}

struct Prefill<'a> {
    args: &'a Arguments<'a>,
    unit: Unit<'a>,
    tile: PrefillTile,
    kv_head: Val,
    thread: Val,
    lane: Val,
    /// Lane of a fragment's row.
    quarter: Val,
    /// The block's first token, and how many it has.
    first: Val,
    here: Val,
    /// Tokens of the call in front of the first row of queries.
    before: Val,
    /// Rows of queries.
    count: Val,
}

/// Tokens of a block that follow each other.
#[derive(Clone, Copy)]
struct Run {
    cache: Cache,
    base: Val,
    /// Keys that the last token sees.
    keys: Val,
}

impl Prefill<'_> {
    fn stage(&self) -> u32 {
        self.unit.bytes().next_multiple_of(128)
    }

    fn ring(&self) -> u32 {
        self.tile.warps * self.unit.query_bytes()
    }

    /// Position and base of a token of the block.
    fn place(&self, b: &mut Builder, cache: Cache, token: Val) -> (Val, Val) {
        let row = b.add(self.first, token);
        let token = b.add(row, self.before);
        let at = b.mul(token, 4);
        (b.load(cache.positions, at, 4)[0], b.load(cache.base, at, 4)[0])
    }

    /// Goes over the runs of the block.
    fn runs(&self, b: &mut Builder, cache: Cache, queries: Val, rows: &[Row; 2], state: &State) {
        let tokens = self.tile.tokens(self.args.call);
        let fixed = cache.scales.filter(|_| !self.args.call.token_scales()).map(|scales| {
            scales.map(|s| {
                let at = b.mul(self.kv_head, 4);
                let word = b.load(s, at, 4)[0];
                b.unary(Unary::FromBits, word)
            })
        });
        let factor = self.unit.factor(b, fixed.map(|s| s[0]));
        let begin = b.var(0);
        b.repeat(0, tokens, 1, |b, _| {
            let more = b.lt(begin, self.here);
            b.when(more, |b| {
                let from: Val = b.unary(Unary::Copy, begin);
                let to = self.end_of_run(b, cache, from, tokens);
                self.run(b, cache, (from, to), queries, rows, state, factor);
                b.set(begin, to);
            });
        });
        if let Some([_, scale]) = fixed {
            for &v in state.out.iter().flatten() {
                let scaled = Lanes::mul(b, v.into(), scale);
                b.set(v, scaled);
            }
        }
    }

    /// The first token after `from` that does not follow in its sequence, or the end of the block.
    fn end_of_run(&self, b: &mut Builder, cache: Cache, from: Val, tokens: u32) -> Val {
        let (position, base) = self.place(b, cache, from);
        let mut end = self.here;
        for first in (0..tokens).step_by(WARP as usize) {
            let token = b.add(self.lane, first);
            let last = b.binary(Binary::Sub, self.here, 1);
            let inside = b.binary(Binary::Min, token, last);
            let (p, q) = self.place(b, cache, inside);
            let steps = b.binary(Binary::Sub, inside, from);
            let expected = b.add(position, steps);
            let follows = b.binary(Binary::Eq, p, expected);
            let same = b.binary(Binary::Eq, q, base);
            let follows = b.binary(Binary::PAnd, follows, same);
            let before = b.lt(inside, from);
            let one = b.select(before, 1, 0);
            let one = b.select(follows, 1, one);
            let follows = b.lt(0, one);
            let mut at = b.select(follows, self.here, inside);
            for mask in [16, 8, 4, 2, 1] {
                let other = b.shuffle_xor(at, mask);
                at = b.binary(Binary::Min, at, other);
            }
            end = b.binary(Binary::Min, end, at);
        }
        end
    }

    /// Goes over the keys of a run.
    #[expect(clippy::too_many_arguments, reason = "what a run needs, passed once")]
    fn run(
        &self,
        b: &mut Builder,
        cache: Cache,
        (from, to): (Val, Val),
        queries: Val,
        rows: &[Row; 2],
        state: &State,
        factor: Val,
    ) {
        let spec = &self.args.call.spec;
        let size = self.unit.tokens;
        let (position, base) = self.place(b, cache, from);
        let count = b.binary(Binary::Sub, to, from);
        let keys = b.add(position, count);
        let window = spec.window.unwrap_or(u32::MAX);
        let sees = [0, 1].map(|i| {
            let row: &Row = &rows[i];
            let into = b.binary(Binary::Sub, row.token, from);
            let inside = b.lt(into, count);
            let keys = b.add(position, into);
            let keys = b.add(keys, 1);
            let seen = b.binary(Binary::Min, keys, window);
            let first = b.binary(Binary::Sub, keys, seen);
            Sees { first: b.select(inside, first, 0), count: b.select(inside, seen, 0) }
        });
        let least = b.add(position, 1);
        let seen = b.binary(Binary::Min, least, window);
        let first = b.binary(Binary::Sub, least, seen);
        let first = b.div(first, size);
        let end = b.add(keys, size - 1);
        let end = b.div(end, size);
        let run = Run { cache, base, keys };
        b.note("all are through with the run before");
        b.barrier();
        for i in 0..self.tile.stages - 1 {
            let number = b.add(first, i);
            let here = b.lt(number, end);
            b.when(here, |b| self.issue(b, run, number, (self.ring() + i * self.stage()).into()));
            b.cp_commit();
        }
        let (read, write) = (b.var(0), b.var((self.tile.stages - 1) * self.stage()));
        b.repeat(first, end, 1, |b, number| {
            b.cp_wait(self.tile.stages - 2);
            b.barrier();
            let ahead = b.add(number, self.tile.stages - 1);
            let here = b.lt(ahead, end);
            b.when(here, |b| {
                let slot = b.add(write, self.ring());
                self.issue(b, run, ahead, slot);
            });
            b.cp_commit();
            let slot = b.add(read, self.ring());
            let key = b.mul(number, size);
            self.unit.add(b, state, (self.lane, self.quarter), queries, slot, key, sees, factor);
            for slot in [read, write] {
                b.turn(slot, self.stage(), self.tile.stages * self.stage());
            }
        });
    }

    /// For each 16 bytes that a thread puts to a slot: the number of their array, counted from the first of the kind, and
    /// their row and quarter there.
    fn pieces(
        &self,
        b: &mut Builder,
        first: u32,
        count: u32,
        mut f: impl FnMut(&mut Builder, Val, Val, Val, Val),
    ) {
        let threads = self.tile.warps * WARP;
        for i in 0..(count * WARP).div_ceil(threads) {
            let index = b.add(self.thread, i * threads);
            let number = b.div(index, WARP);
            let lane = b.rem(index, WARP);
            let (g, t) = (b.div(lane, 4), b.rem(lane, 4));
            let to = b.mul(index, 16);
            let to = b.add(to, first * FRAGMENT);
            let there = if (i + 1) * threads <= count * WARP { Val::Pred(true) } else { b.lt(number, count) };
            b.when(there, |b| f(b, number, g, t, to));
        }
    }

    /// Copies a unit of a cache to a slot, all threads together.
    fn issue(&self, b: &mut Builder, run: Run, number: Val, slot: Val) {
        let unit = &self.unit;
        let first = b.mul(number, unit.tokens);
        let row = b.add(run.base, first);
        let (page, in_page) = page_of(b, run.cache.pages, row);
        let left = b.binary(Binary::Sub, run.keys, first);
        let start = |b: &mut Builder, page_bytes: u32, head_bytes: u32| {
            let head = b.mul(self.kv_head, head_bytes);
            let head = b.unary(Unary::Widen, head);
            b.ternary(Ternary::MulWide, page, page_bytes, head)
        };
        let keys = start(b, unit.keys.page_bytes(), unit.keys.head_bytes());
        self.pieces(b, 0, unit.key_fragments(), |b, number, g, t, to| {
            let (key, byte) = unit.key_piece(b, number, g, t);
            let key = b.add(in_page, key);
            let in_head = b.mad(key, unit.keys.at(1, 0), byte);
            let from = plus(b, keys, in_head);
            let to = b.add(to, slot);
            b.cp_async(to, self.args.k, from, 16, 16);
        });
        let values = start(b, unit.values.page_bytes(), unit.values.head_bytes());
        let bytes = unit.values.ty.bytes();
        let count = unit.fragments() - unit.key_fragments();
        self.pieces(b, unit.key_fragments(), count, |b, number, g, t, to| {
            let (column, key) = unit.value_piece(b, number, g, t);
            let valid = valid_bytes(b, left, key, bytes);
            let key = b.add(in_page, key);
            let in_head = b.mul(key, bytes);
            let in_head = b.mad(column, unit.values.at(0, 1), in_head);
            let from = plus(b, values, in_head);
            let to = b.add(to, slot);
            b.cp_async(to, self.args.v, from, 16, valid);
        });
        if self.args.call.token_scales()
            && let Some(scales) = run.cache.scales
        {
            let page = wide(b, page, unit.keys.heads * PAGE * 4, 0.into());
            let pieces = unit.tokens / 4;
            for (i, scales) in (0..).zip(scales) {
                let piece = b.binary(Binary::Sub, self.thread, i * pieces);
                let here = b.lt(piece, pieces);
                b.when(here, |b| {
                    let key = b.mul(piece, 4);
                    let valid = valid_bytes(b, left, key, 4);
                    let key = b.add(in_page, key);
                    let line = b.mad(self.kv_head, PAGE, key);
                    let line = b.mul(line, 4);
                    let from = plus(b, page, line);
                    let to = b.mad(piece, 16, slot);
                    let to = b.add(to, unit.scales_at() + i * 4 * unit.tokens);
                    b.cp_async(to, scales, from, 16, valid);
                });
            }
        }
    }

    /// Goes over the rows of the call.
    fn direct(&self, b: &mut Builder, queries: Val, rows: &[Row; 2], state: &State) {
        let spec = &self.args.call.spec;
        let size = self.unit.tokens;
        let window = spec.window.unwrap_or(u32::MAX);
        let sees = [0, 1].map(|i| {
            let row: &Row = &rows[i];
            let position = b.add(self.first, row.token);
            let next = b.add(position, 1);
            let keys = if spec.causal { next } else { self.count };
            let seen = b.binary(Binary::Min, keys, window);
            let first = b.binary(Binary::Sub, keys, seen);
            Sees { first: b.select(row.there, first, 0), count: b.select(row.there, seen, 0) }
        });
        let least = b.add(self.first, 1);
        let seen = b.binary(Binary::Min, least, window);
        let first = b.binary(Binary::Sub, least, seen);
        let first = b.div(first, size);
        let keys = if spec.causal { b.add(self.first, self.here) } else { self.count };
        let end = b.add(keys, size - 1);
        let end = b.div(end, size);
        let factor = self.unit.factor(b, None);
        b.repeat(first, end, 1, |b, number| {
            let key = b.mul(number, size);
            b.barrier();
            self.put(b, key, keys);
            b.barrier();
            self.unit.add(
                b,
                state,
                (self.lane, self.quarter),
                queries,
                self.ring().into(),
                key,
                sees,
                factor,
            );
        });
    }

    /// Puts keys and values, rows of the call from `first` on, to the slot as bf16; zeros from `end` on.
    fn put(&self, b: &mut Builder, first: Val, end: Val) {
        let unit = &self.unit;
        let spec = &self.args.call.spec;
        let KvSource::Direct { stride } = spec.source else { unreachable!("there is no cache") };
        let last = b.binary(Binary::Sub, end, 1);
        let pack = |b: &mut Builder, v: &[Val]| -> Vec<Val> {
            v.chunks(2).map(|v| b.binary(Binary::PackBf16, v[0], v[1])).collect()
        };
        self.pieces(b, 0, unit.key_fragments(), |b, number, g, t, to| {
            let (key, byte) = unit.key_piece(b, number, g, t);
            let row = b.add(first, key);
            let row = b.binary(Binary::Min, row, last);
            let column = b.div(byte, 2);
            let inside = b.lt(column, spec.head_dim);
            let column = b.binary(Binary::Min, column, spec.head_dim - 8);
            let column = b.mad(self.kv_head, spec.head_dim, column);
            let in_row = b.mul(column, 4);
            let from = wide(b, row, stride * 4, in_row);
            let v = load(b, self.args.k, from, MemTy::F32, 8, alignment(&[16, stride * 4]));
            let v: Vec<Val> = v.into_iter().map(|v| b.select(inside, v, 0.0)).collect();
            let words = pack(b, &v);
            let to = b.add(to, self.ring());
            b.store(Mem::Shared, to, &words, 16);
        });
        let count = unit.fragments() - unit.key_fragments();
        self.pieces(b, unit.key_fragments(), count, |b, number, g, t, to| {
            let (column, key) = unit.value_piece(b, number, g, t);
            let column = b.mad(self.kv_head, spec.head_dim, column);
            let in_row = b.mul(column, 4);
            let v: Vec<Val> = (0..8)
                .map(|i| {
                    let key = b.add(key, i);
                    let row = b.add(first, key);
                    let there = b.lt(row, end);
                    let row = b.binary(Binary::Min, row, last);
                    let from = wide(b, row, stride * 4, in_row);
                    let v = load(b, self.args.v, from, MemTy::F32, 1, 4)[0];
                    b.select(there, v, 0.0)
                })
                .collect();
            let words = pack(b, &v);
            let to = b.add(to, self.ring());
            b.store(Mem::Shared, to, &words, 16);
        });
    }

    /// The results of this warp's rows: each lane has two adjacent columns of each tile.
    fn store(&self, b: &mut Builder, rows: &[Row; 2], state: &State) {
        let spec = &self.args.call.spec;
        let sums = self.unit.sums(b, state);
        let frame = &self.args.frame;
        for (i, row) in rows.iter().enumerate() {
            b.when(row.there, |b| {
                let token = b.add(self.first, row.token);
                let head = b.mul(row.head, spec.head_dim);
                let first = b.mad(self.quarter, 2, head);
                for (tile, out) in (0..).zip(&state.out) {
                    let col = b.add(first, tile * 8);
                    let values: Vec<Val> =
                        (0..2).map(|e| Lanes::div(b, out[2 * i + e].into(), sums[i])).collect();
                    let at = At { row: token, out_row: token, col, width: 2 };
                    let accs = [values];
                    let mut known = frame.nothing();
                    for store in &frame.expr().stores {
                        let values = frame.values(b, store.node, &at, &accs, &mut known);
                        frame.store(b, store, &at, &values);
                    }
                }
            });
        }
    }
}
