//! Attention of few tokens a sequence: each block has one token and one key/value head, and a part of the keys.
//!
//! Every warp has the same queries, the heads that share the key/value head, and takes its own keys: unit by unit, in
//! turn with the other warps of all blocks of the token and head. Its lanes copy what they will multiply themselves,
//! some units ahead, into the warp's part of shared memory, so no warp waits for another. At the end the warps' results
//! are added up, in order; where there are several blocks, each leaves its result in global memory, and the last one to
//! arrive adds them up, in the order of their numbers.

use super::unit::{FRAGMENT, ROWS, Sees, State, Unit};
use super::{Arguments, AttentionCall, Cache, Queries};
use crate::cpu::math::Lanes;
use crate::cuda::cache::{PAGE, page_of};
use crate::cuda::expr::{At, wide};
use crate::cuda::product::plus;
use crate::cuda::tile::{Access, Binary, Builder, Extent, Kernel, Mem, Unary, Val, WARP};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::GpuDesc;
use serde::{Deserialize, Serialize};

/// How attention is cut.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct DecodeTile {
    /// Keys of a unit: 32 or 64, of codes 64.
    pub unit: u32,
    /// Warps of a block.
    pub warps: u32,
    /// Units under way in each warp, at least 2.
    pub stages: u32,
    /// Blocks that share the keys of a token and head.
    pub splits: u32,
}

impl DecodeTile {
    /// The tile for calls of `t` tokens with contexts of up to `context` on a GPU: as many warps and stages as shared
    /// memory has room for, and as many splits as give each of two hundred blocks something to do, if they have some units
    /// each.
    pub fn of(call: &AttentionCall, t: u32, context: u32, gpu: &GpuDesc) -> Result<DecodeTile> {
        let unit = if call.cache().is_some_and(|(ty, _)| ty.is_scaled()) { 64 } else { 32 };
        let blocks = (t * call.spec.kv_heads).max(1);
        let seen = call.spec.window.unwrap_or(context).min(context);
        let worthwhile = (seen / (4 * unit * 2)).max(1);
        let splits = (200 / blocks).clamp(1, worthwhile).min(MOST_SPLITS);
        let sizes = [(4, 4), (4, 3), (4, 2), (2, 3), (2, 2), (1, 2)];
        let tiles = sizes.map(|(warps, stages)| DecodeTile { unit, warps, stages, splits });
        let fits = |part: u32| {
            tiles.into_iter().find(|tile| tile.shared_bytes(call).is_ok_and(|n| n <= gpu.shared_bytes / part))
        };
        fits(2).filter(|t| t.warps == 4).or_else(|| fits(1)).ok_or_else(|| {
            Diag::target(format!("attention of a token has no room in the shared memory of {}", gpu.arch))
        })
    }

    /// Bytes of shared memory: queries and units, and then results.
    fn shared_bytes(&self, call: &AttentionCall) -> Result<u32> {
        let unit = Unit::new(call, self.unit)?;
        let rings = unit.query_bytes() + self.warps * self.stages * unit.bytes();
        Ok(rings.max(self.warps * ROWS * line(call) * 4))
    }
}

/// Most blocks that share a token and head.
const MOST_SPLITS: u32 = 32;

/// Floats of a row's result: its weighted sums, the largest product, the sum of weights, and two more.
fn line(call: &AttentionCall) -> u32 {
    call.spec.head_dim + 4
}

/// The kernel of `call`, called `name`. Grid: columns are key/value heads times splits, rows are tokens.
pub fn build(name: &str, call: &AttentionCall, tile: DecodeTile) -> Result<Kernel> {
    call.check()?;
    let spec = &call.spec;
    let unit = Unit { spread: true, ..Unit::new(call, tile.unit)? };
    if spec.group() > ROWS || call.cache().is_none() {
        return Err(Diag::target(format!(
            "attention of single tokens, with {} heads for one of keys, has no CUDA kernel",
            spec.group()
        ))
        .help(format!(
            "it has one over a cache, with up to {ROWS} heads; the one for many tokens does as well"
        )));
    }
    if !tile.unit.is_multiple_of(unit.chunk()) || !PAGE.is_multiple_of(tile.unit) || tile.stages < 2 {
        return Err(Diag::bug(format!("no such cut of attention: {tile:?}")));
    }
    let mut b = Builder::new(name, tile.warps * WARP);
    let args = Arguments::declare(&mut b, call);
    let line = line(call);
    let each = u64::from(spec.kv_heads * tile.splits * spec.group() * line) * 4;
    let between = (tile.splits > 1).then(|| {
        let partial = b.workspace("partial", Access::Scratch, each);
        (partial, b.workspace("counters", Access::Counters, u64::from(spec.kv_heads) * 4))
    });
    let queries = Queries::declare(&mut b, spec);
    let rows = Extent::PerScalar { scalar: queries.scalar, times: 1, per: 1 };
    b.grid(Extent::Fixed(spec.kv_heads * tile.splits), rows);
    let at = b.shared(tile.shared_bytes(call)?);
    debug_assert_eq!(at, 0);

    let (column, token, thread) = (b.block_x(), b.block_y(), b.thread());
    let (kv_head, split) = (b.div(column, tile.splits), b.rem(column, tile.splits));
    let (warp, lane) = (b.div(thread, WARP), b.rem(thread, WARP));
    let (g, quarter) = (b.div(lane, 4), b.rem(lane, 4));
    let place = Place { kv_head, token, warp, lane, g, t: quarter };
    let cx = Decode { args: &args, unit, tile, place, before: queries.before };

    let first_head = b.mul(kv_head, spec.group());
    let row = |b: &mut Builder, plus: u32| {
        let row = b.add(g, plus);
        let there = b.lt(row, spec.group());
        let row = b.binary(Binary::Min, row, spec.group() - 1);
        (token, b.add(first_head, row), there)
    };
    let rows = [row(&mut b, 0), row(&mut b, 8)];
    unit.put_queries(&mut b, &args, rows, (lane, quarter), 0.into(), warp, tile.warps);
    b.barrier();
    let state = cx.keys(&mut b, split);
    b.note("all warps are through with their copies, whose places take the results");
    b.barrier();
    cx.put(&mut b, &state);
    b.barrier();
    cx.results(&mut b, split, between);
    Ok(b.finish())
}

/// Where a lane is.
#[derive(Clone, Copy)]
struct Place {
    kv_head: Val,
    token: Val,
    warp: Val,
    lane: Val,
    /// Row and lane of a fragment.
    g: Val,
    t: Val,
}

struct Decode<'a> {
    args: &'a Arguments<'a>,
    unit: Unit<'a>,
    tile: DecodeTile,
    place: Place,
    /// Tokens of the call in front of the first query.
    before: Val,
}

/// A sequence, and the unit that is copied next.
#[derive(Clone, Copy)]
struct Source {
    cache: Cache,
    /// The sequence's first row, and its keys.
    base: Val,
    keys: Val,
    /// One more than the last unit.
    end: Val,
}

impl Decode<'_> {
    /// Goes over the keys of this warp.
    fn keys(&self, b: &mut Builder, split: Val) -> State {
        let spec = &self.args.call.spec;
        let Some(cache) = self.args.cache else { unreachable!("there is a cache") };
        let token = b.add(self.place.token, self.before);
        let at = b.mul(token, 4);
        let position = b.load(cache.positions, at, 4)[0];
        let base = b.load(cache.base, at, 4)[0];
        let keys = b.add(position, 1);
        let seen = b.binary(Binary::Min, keys, spec.window.unwrap_or(u32::MAX));
        let sees = Sees { first: b.binary(Binary::Sub, keys, seen), count: seen };
        let size = self.unit.tokens;
        let first = b.div(sees.first, size);
        let end = b.add(position, size);
        let end = b.div(end, size);
        let source = Source { cache, base, keys, end };
        let worker = b.mad(split, self.tile.warps, self.place.warp);
        let first = b.add(first, worker);
        let step = self.tile.warps * self.tile.splits;
        let stage = self.unit.bytes();
        let ring = b.mul(self.place.warp, self.tile.stages * stage);
        let ring = b.add(ring, self.unit.query_bytes());
        b.note("units ahead");
        for i in 0..self.tile.stages - 1 {
            let number = b.add(first, i * step);
            let slot = b.add(ring, i * stage);
            self.issue(b, source, number, slot);
        }
        let fixed = cache.scales.filter(|_| !self.args.call.token_scales()).map(|scales| {
            scales.map(|s| {
                let at = b.mul(self.place.kv_head, 4);
                let word = b.load(s, at, 4)[0];
                b.unary(Unary::FromBits, word)
            })
        });
        let factor = self.unit.factor(b, fixed.map(|s| s[0]));
        let state = self.unit.state(b);
        let (read, write) = (b.var(0), b.var((self.tile.stages - 1) * stage));
        b.repeat(first, end, step, |b, number| {
            b.cp_wait(self.tile.stages - 2);
            // Others' scales are there, and all have read the ones that are overwritten next.
            b.sync_warp();
            let ahead = b.add(number, (self.tile.stages - 1) * step);
            let slot = b.add(ring, write);
            self.issue(b, source, ahead, slot);
            let slot = b.add(ring, read);
            let key = b.mul(number, size);
            let lane = (self.place.lane, self.place.t);
            self.unit.add(b, &state, lane, 0.into(), slot, key, [sees; 2], factor);
            for slot in [read, write] {
                b.turn(slot, stage, self.tile.stages * stage);
            }
        });
        if let Some([_, scale]) = fixed {
            for &v in state.out.iter().flatten() {
                let scaled = Lanes::mul(b, v.into(), scale);
                b.set(v, scaled);
            }
        }
        state
    }

    /// Copies a unit, if there is one: what this lane multiplies, and its part of the scales.
    fn issue(&self, b: &mut Builder, source: Source, number: Val, slot: Val) {
        let here = b.lt(number, source.end);
        b.when(here, |b| {
            let unit = &self.unit;
            let Place { kv_head, lane, g, t, .. } = self.place;
            let first = b.mul(number, unit.tokens);
            let row = b.add(source.base, first);
            let (page, in_page) = page_of(b, source.cache.pages, row);
            let start = |b: &mut Builder, page_bytes: u32, head_bytes: u32| {
                let head = b.mul(kv_head, head_bytes);
                let head = b.unary(Unary::Widen, head);
                b.ternary(crate::cuda::tile::Ternary::MulWide, page, page_bytes, head)
            };
            // Keys of the unit that there are.
            let left = b.binary(Binary::Sub, source.keys, first);
            let own = b.mad(lane, 16, slot);
            let keys = start(b, unit.keys.page_bytes(), unit.keys.head_bytes());
            for i in 0..unit.key_fragments() {
                let (key, byte) = unit.key_piece(b, i.into(), g, t);
                let key = b.add(in_page, key);
                let in_head = b.mad(key, unit.keys.at(1, 0), byte);
                let from = plus(b, keys, in_head);
                let to = b.add(own, i * FRAGMENT);
                b.cp_async(to, self.args.k, from, 16, 16);
            }
            let values = start(b, unit.values.page_bytes(), unit.values.head_bytes());
            let bytes = unit.values.ty.bytes();
            for i in unit.key_fragments()..unit.fragments() {
                let (column, key) = unit.value_piece(b, (i - unit.key_fragments()).into(), g, t);
                let valid = valid_bytes(b, left, key, bytes);
                let key = b.add(in_page, key);
                let in_head = b.mul(key, bytes);
                let in_head = b.mad(column, unit.values.at(0, 1), in_head);
                let from = plus(b, values, in_head);
                let to = b.add(own, i * FRAGMENT);
                b.cp_async(to, self.args.v, from, 16, valid);
            }
            if self.args.call.token_scales()
                && let Some([of_keys, of_values]) = source.cache.scales
            {
                let page = wide(b, page, unit.keys.heads * PAGE * 4, 0.into());
                let pieces = unit.tokens / 4;
                let piece = b.rem(lane, pieces);
                let key = b.mul(piece, 4);
                let valid = valid_bytes(b, left, key, 4);
                let key = b.add(in_page, key);
                let line = b.mad(kv_head, PAGE, key);
                let line = b.mul(line, 4);
                let from = plus(b, page, line);
                let place = unit.scale_place(b, piece);
                let to = b.mad(place, 16, slot);
                let to = b.add(to, unit.scales_at());
                for (first, (scales, plus)) in
                    [(of_keys, 0), (of_values, 4 * unit.tokens)].into_iter().enumerate()
                {
                    let own = b.binary(Binary::Sub, lane, first as u32 * pieces);
                    let here = b.lt(own, pieces);
                    b.when(here, |b| {
                        let to = b.add(to, plus);
                        b.cp_async(to, scales, from, 16, valid);
                    });
                }
            }
        });
        b.cp_commit();
    }

    /// Leaves what this warp has in shared memory: `[warp][row][line]`.
    fn put(&self, b: &mut Builder, state: &State) {
        let Place { warp, g, t, .. } = self.place;
        let line = line(self.args.call);
        let sums = self.unit.sums(b, state);
        let row = b.mad(warp, ROWS, g);
        let first = b.mul(row, line * 4);
        let own = b.mad(t, 8, first);
        let one = b.lt(t, 1);
        for half in 0..2u32 {
            let at = b.add(own, half * 8 * line * 4);
            for (i, out) in (0..).zip(&state.out) {
                let at = b.add(at, i * 32);
                let pair = [0, 1].map(|e| b.unary(Unary::Bits, out[(2 * half + e) as usize]));
                b.store(Mem::Shared, at, &pair, 8);
            }
            let at = b.add(first, (half * 8 * line + self.args.call.spec.head_dim) * 4);
            let max = b.unary(Unary::Bits, state.max[half as usize]);
            let sum = b.unary(Unary::Bits, sums[half as usize]);
            b.when(one, |b| b.store(Mem::Shared, at, &[max, sum], 8));
        }
    }

    /// Adds up, and writes or hands on.
    fn results(&self, b: &mut Builder, split: Val, between: Option<(Mem, Mem)>) {
        let call = self.args.call;
        let (spec, line) = (&call.spec, line(call));
        let width = 4;
        let runs = spec.head_dim / width;
        let items = spec.group() * runs;
        let thread = b.thread();
        let threads = self.tile.warps * WARP;
        let warp_lines =
            Lines { mem: Mem::Shared, count: self.tile.warps, stride: ROWS * line, columns: spec.head_dim };
        let Some((partial, counters)) = between else {
            b.repeat(thread, items, threads, |b, item| {
                let (row, run) = (b.div(item, runs), b.rem(item, runs));
                let start = b.mul(row, line * 4);
                let sum = warp_lines.sum(b, start, run);
                let values = sum.finished(b);
                self.store(b, row, run, &values);
            });
            return;
        };
        // Lines of this token and head.
        let head = b.mad(self.place.token, spec.kv_heads, self.place.kv_head);
        let all = wide(b, head, self.tile.splits * spec.group() * line * 4, 0.into());
        let own = b.mul(split, spec.group() * line * 4);
        let own = plus(b, all, own);
        b.repeat(thread, items, threads, |b, item| {
            let (row, run) = (b.div(item, runs), b.rem(item, runs));
            let start = b.mul(row, line * 4);
            let sum = warp_lines.sum(b, start, run);
            let to = plus(b, own, start);
            let in_line = b.mul(run, 16);
            let at = plus(b, to, in_line);
            let words: Vec<Val> = sum.values.iter().map(|&v| b.unary(Unary::Bits, v)).collect();
            b.store(partial, at, &words, 16);
            let first = b.lt(run, 1);
            b.when(first, |b| {
                let end = b.unary(Unary::Widen, spec.head_dim * 4);
                let at = b.binary(Binary::Add64, to, end);
                let pair = [sum.max, sum.sum].map(|v| b.unary(Unary::Bits, v));
                b.store(partial, at, &pair, 8);
            });
        });
        let counter = b.mul(head, 4);
        let last = b.last_of(counters, counter, self.tile.splits);
        b.note("the last one adds up what all have left");
        let lines = Lines {
            mem: partial,
            count: self.tile.splits,
            stride: spec.group() * line,
            columns: spec.head_dim,
        };
        b.when(last, |b| {
            b.repeat(thread, items, threads, |b, item| {
                let (row, run) = (b.div(item, runs), b.rem(item, runs));
                let start = b.mul(row, line * 4);
                let start = plus(b, all, start);
                let sum = lines.sum(b, start, run);
                let values = sum.finished(b);
                self.store(b, row, run, &values);
            });
        });
    }

    /// The end of adjacent columns of a row.
    fn store(&self, b: &mut Builder, row: Val, run: Val, values: &[Val]) {
        let spec = &self.args.call.spec;
        let width = values.len() as u32;
        let head = b.mad(self.place.kv_head, spec.group(), row);
        let in_head = b.mul(run, width);
        let col = b.mad(head, spec.head_dim, in_head);
        let at = At { row: self.place.token, out_row: self.place.token, col, width };
        let frame = &self.args.frame;
        let accs = [values.to_vec()];
        let mut known = frame.nothing();
        for store in &frame.expr().stores {
            let values = frame.values(b, store.node, &at, &accs, &mut known);
            frame.store(b, store, &at, &values);
        }
    }
}

/// Bytes of 16 that are there, of keys from `key` on of a unit that has `left` of them, each of `bytes`.
pub(super) fn valid_bytes(b: &mut Builder, left: Val, key: Val, bytes: u32) -> Val {
    let inside = b.lt(key, left);
    let rest = b.binary(Binary::Sub, left, key);
    let rest = b.binary(Binary::Min, rest, 16 / bytes);
    let rest = b.mul(rest, bytes);
    b.select(inside, rest, 0)
}

/// Results of a row that are to be added up, `stride` floats apart: weighted sums, then the largest product and the sum of
/// weights.
#[derive(Clone, Copy)]
struct Lines {
    mem: Mem,
    count: u32,
    stride: u32,
    columns: u32,
}

/// Some columns of a result.
struct Partial {
    max: Val,
    sum: Val,
    values: Vec<Val>,
}

impl Partial {
    fn finished(&self, b: &mut Builder) -> Vec<Val> {
        self.values.iter().map(|&v| Lanes::div(b, v, self.sum)).collect()
    }
}

impl Lines {
    /// The sum of four columns of the row whose first line begins at `start`.
    fn sum(&self, b: &mut Builder, start: Val, run: Val) -> Partial {
        let (max, sum) = (b.var(f32::NEG_INFINITY), b.var(0.0));
        let values = [(); 4].map(|()| b.var(0.0));
        let at = |b: &mut Builder, number: Val, offset: Val| match self.mem {
            Mem::Shared => {
                let line = b.mad(number, self.stride * 4, start);
                b.add(line, offset)
            }
            Mem::Global(_) => {
                let line = b.mad(number, self.stride * 4, offset);
                plus(b, start, line)
            }
        };
        let floats = |b: &mut Builder, words: Vec<Val>| -> Vec<Val> {
            words.into_iter().map(|w| b.unary(Unary::FromBits, w)).collect()
        };
        b.repeat(0, self.count, 1, |b, number| {
            let place = at(b, number, (self.columns * 4).into());
            let words = b.load(self.mem, place, 8);
            let head = floats(b, words);
            let in_line = b.mul(run, 16);
            let place = at(b, number, in_line);
            let words = b.load(self.mem, place, 16);
            let more = floats(b, words);
            let top = b.binary(Binary::FMax, max, head[0]);
            let nothing = b.binary(Binary::FEq, top, f32::NEG_INFINITY);
            let base = b.select(nothing, 0.0, top);
            let [old, new] = [max.into(), head[0]].map(|m: Val| {
                let below = Lanes::sub(b, m, base);
                b.unary(Unary::Exp2, below)
            });
            let add = |b: &mut Builder, to, v| {
                let kept = Lanes::mul(b, Val::Reg(to), old);
                let next = b.mul_add(v, new, kept);
                b.set(to, next);
            };
            add(b, sum, head[1]);
            for (&to, &v) in values.iter().zip(&more) {
                add(b, to, v);
            }
            b.set(max, top);
        });
        Partial { max: max.into(), sum: sum.into(), values: values.map(Val::Reg).to_vec() }
    }
}
