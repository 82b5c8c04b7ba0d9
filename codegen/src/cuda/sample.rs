//! Tokens chosen from logits, a block for each row: the largest one, or one drawn at random.
//!
//! A row has its own options, so that one launch serves all sequences of a call. Without temperature the first of the
//! largest logits is taken. Else a token is drawn with the probabilities of `softmax(logits / temperature)`, from those
//! that are left: the `top_k` largest logits, and of these the fewest largest ones whose probabilities reach `top_p`.
//! Logits that are equal to the last one left are all left.
//!
//! What is left are the logits from some bound on. The bound is searched three bits at a time, in numbers that are in the
//! order of the floats. One is drawn by the smallest of `-log u / p`, with a u for each token, which is a function of the
//! row's seed and the token's number: the same seed gives the same token, whatever the grid is. A caller gives each step
//! another seed.
//!
//! Logits that are not numbers are passed over. Where none is a number the token is -1.

use super::expr::wide;
use super::tile::{Access, Binary, Builder, Extent, Kernel, Mem, Reg, Unary, Val, WARP};
use crate::cpu::math::Lanes;
use quantc_ir::diag::{Diag, Result};
use serde::{Deserialize, Serialize};

/// Rows of logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SampleSpec {
    /// Logits of a row.
    pub vocab: u32,
    /// Elements from one row to the next.
    pub stride: u32,
}

/// How the token of a row is chosen: what the options buffer holds, each field as 4 bytes in this order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowOptions {
    /// 0 for the largest logit.
    pub temperature: f32,
    /// 0 for all.
    pub top_k: u32,
    /// 1 for all.
    pub top_p: f32,
    /// What is drawn.
    pub seed: u32,
}

impl RowOptions {
    /// As they lie in the buffer.
    pub fn to_bytes(self) -> [u8; 16] {
        let words = [self.temperature.to_bits(), self.top_k, self.top_p.to_bits(), self.seed];
        let mut bytes = [0; 16];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// Threads of a block.
const THREADS: u32 = 512;

/// Logits that a thread has under way.
const AHEAD: u32 = 4;

/// Bits of the bound that are found in one pass.
const BITS: u32 = 3;

/// The kernel of `spec`, called `name`.
///
/// Buffers: logits `f32[r][stride]`, options `[r]` of [`RowOptions`], out `i32[r]`. Scalar: `r`. Grid: a block for each
/// row; shared memory as the kernel says, no workspace.
pub fn build(name: &str, spec: &SampleSpec) -> Result<Kernel> {
    if spec.vocab == 0 || spec.stride < spec.vocab || spec.vocab > 1 << 30 {
        return Err(Diag::bug(format!("{} logits in rows of {}", spec.vocab, spec.stride)));
    }
    let mut b = Builder::new(name, THREADS);
    let logits = b.buffer("logits", Access::Read);
    let options = b.buffer("options", Access::Read);
    let out = b.buffer("out", Access::Write);
    let r = b.scalar("r");
    b.grid(Extent::PerScalar { scalar: r, times: 1, per: 1 }, Extent::Fixed(1));
    // One word of each warp for each of the sums of a pass.
    let slots = b.shared(THREADS / WARP * 4 * ((1 << BITS) - 1));
    let (row, thread) = (b.block_x(), b.thread());
    let at = b.mul(row, 16);
    let words = b.load(options, at, 16);
    let temperature = b.unary(Unary::FromBits, words[0]);
    let top_p = b.unary(Unary::FromBits, words[2]);
    let cx = Sampling { spec: *spec, logits, row, thread, slots };

    b.note("the first of the largest");
    let (key, index) = (b.var(0), b.var(u32::MAX));
    cx.each(&mut b, |b, here, _| {
        let better = b.lt(key, here.key);
        let next = b.select(better, here.key, key);
        let next_index = b.select(better, here.index, index);
        b.set(key, next);
        b.set(index, next_index);
    });
    let (key, best) = cx.first_of_largest(&mut b, key.into(), index.into());
    let top = of_key(&mut b, key);
    let size = b.unary(Unary::FAbs, top);
    let infinite = b.binary(Binary::FEq, size, f32::INFINITY);
    let greedy = b.binary(Binary::FEq, temperature, 0.0);
    let draws = b.unary(Unary::PNot, greedy);
    let finite = b.unary(Unary::PNot, infinite);
    let draws = b.binary(Binary::PAnd, draws, finite);
    let any = b.lt(0, key);
    let draws = b.binary(Binary::PAnd, draws, any);
    let token = b.var(best);
    b.when(draws, |b| {
        let factor = Lanes::div(b, std::f32::consts::LOG2_E.into(), temperature);
        let weigh = Weigh { top, factor };
        let bound = b.var(1);
        let few = b.lt(0, words[1]);
        let fewer = b.lt(words[1], spec.vocab);
        let few = b.binary(Binary::PAnd, few, fewer);
        b.note("the largest ones");
        b.when(few, |b| {
            let found = cx.search(b, 1.into(), |_, _| 1.into(), words[1]);
            b.set(bound, found);
        });
        let nucleus = b.binary(Binary::FLt, top_p, 1.0);
        b.note("those whose probabilities reach a part of all");
        b.when(nucleus, |b| {
            let sum = b.var(0.0);
            cx.each(b, |b, here, _| {
                let w = weigh.weight(b, here);
                let left = b.lt(here.key, bound);
                let w = b.select(left, 0.0, w);
                let next = Lanes::add(b, sum.into(), w);
                b.set(sum, next);
            });
            let all = cx.sums(b, &[sum.into()])[0];
            let wanted = Lanes::mul(b, all, top_p);
            let found = cx.search(b, bound.into(), |b, here| weigh.weight(b, here), wanted);
            b.set(bound, found);
        });
        b.note("one of those that are left");
        let (least, at) = (b.var(u32::MAX), b.var(best));
        let seed = mix(b, words[3]);
        cx.each(b, |b, here, _| {
            let h = b.add(seed, here.index);
            let h = mix(b, h);
            let h = b.shr(h, 8);
            let u = b.unary(Unary::IntToFloat, h);
            let u = Lanes::add(b, u, 0.5.into());
            let u = Lanes::mul(b, u, (1.0 / 16_777_216.0).into());
            let log = b.unary(Unary::Log2, u);
            let w = weigh.weight(b, here);
            let time = Lanes::div(b, log, w);
            let time = b.unary(Unary::FAbs, time);
            // Sizes are in the order of their bits; infinite ones are never drawn.
            let time = b.unary(Unary::Bits, time);
            let left_out = b.lt(here.key, bound);
            let time = b.select(left_out, u32::MAX, time);
            let sooner = b.lt(time, least);
            let next = b.select(sooner, time, least);
            let next_at = b.select(sooner, here.index, at);
            b.set(least, next);
            b.set(at, next_at);
        });
        let key = b.binary(Binary::Xor, least, u32::MAX);
        let (_, drawn) = cx.first_of_largest(b, key, at.into());
        b.set(token, drawn);
    });
    let first = b.lt(thread, 1);
    b.when(first, |b| {
        let at = b.mul(row, 4);
        let broken = b.binary(Binary::Eq, key, 0);
        let token = b.select(broken, u32::MAX, token);
        b.store(out, at, &[token], 4);
    });
    Ok(b.finish())
}

/// A logit that a thread looks at.
#[derive(Clone, Copy)]
struct Here {
    index: Val,
    /// In the order of the logits; 0 for what is not a number, or not there.
    key: Val,
    logit: Val,
}

/// Probabilities, up to a factor.
#[derive(Clone, Copy)]
struct Weigh {
    top: Val,
    factor: Val,
}

impl Weigh {
    fn weight(&self, b: &mut Builder, here: Here) -> Val {
        let below = Lanes::sub(b, here.logit, self.top);
        let power = Lanes::mul(b, below, self.factor);
        let w = b.unary(Unary::Exp2, power);
        let number = b.lt(0, here.key);
        b.select(number, w, 0.0)
    }
}

/// Numbers of 32 bits that are in the order of floats, none of which is 0.
fn key_of(b: &mut Builder, x: Val) -> Val {
    // Zeros are equal, whatever their signs.
    let x = Lanes::add(b, x, 0.0.into());
    let bits = b.unary(Unary::Bits, x);
    let negative = b.lt(0x7fff_ffff, bits);
    let down = b.binary(Binary::Xor, bits, u32::MAX);
    let up = b.binary(Binary::Or, bits, 0x8000_0000);
    let key = b.select(negative, down, up);
    let number = b.binary(Binary::FEq, x, x);
    b.select(number, key, 0)
}

/// The float of a key.
fn of_key(b: &mut Builder, key: Val) -> Val {
    let positive = b.lt(0x7fff_ffff, key);
    let up = b.and(key, 0x7fff_ffff);
    let down = b.binary(Binary::Xor, key, u32::MAX);
    let bits = b.select(positive, up, down);
    b.unary(Unary::FromBits, bits)
}

/// Bits that depend on all bits of `h`: multiplications by odd numbers and shifted sums, each of which can be undone.
fn mix(b: &mut Builder, h: Val) -> Val {
    let mut h = h;
    for (shift, factor) in [(16, 0x9e37_79b1), (13, 0x85eb_ca77), (16, 0xc2b2_ae3d), (15, 1)] {
        let high = b.shr(h, shift);
        h = b.binary(Binary::Xor, h, high);
        h = b.mul(h, factor);
    }
    h
}

/// A row of logits and a block.
struct Sampling {
    spec: SampleSpec,
    logits: Mem,
    row: Val,
    thread: Val,
    slots: u32,
}

impl Sampling {
    /// Does something for all logits of this thread.
    fn each(&self, b: &mut Builder, mut f: impl FnMut(&mut Builder, Here, u32)) {
        b.repeat(self.thread, self.spec.vocab, AHEAD * THREADS, |b, first| {
            let mut list = vec![];
            for i in 0..AHEAD {
                let index = b.add(first, i * THREADS);
                let there = b.lt(index, self.spec.vocab);
                let inside = b.binary(Binary::Min, index, self.spec.vocab - 1);
                let in_row = b.mul(inside, 4);
                let at = wide(b, self.row, self.spec.stride * 4, in_row);
                list.push((index, there, b.load(self.logits, at, 4)[0]));
            }
            for (i, (index, there, word)) in (0..).zip(list) {
                let logit = b.unary(Unary::FromBits, word);
                let key = key_of(b, logit);
                let key = b.select(there, key, 0);
                f(b, Here { index, key, logit }, i);
            }
        });
    }

    /// The largest bound from `least` on, for which the `sizes` of logits from it on reach `wanted`.
    fn search(
        &self,
        b: &mut Builder,
        least: Val,
        size: impl Fn(&mut Builder, Here) -> Val,
        wanted: Val,
    ) -> Val {
        let found = b.var(least);
        let fixed = b.var(0);
        let shift = b.var(30);
        b.repeat(0, 32u32.div_ceil(BITS), 1, |b, _| {
            let tries: Vec<Val> = (1..1u32 << BITS)
                .map(|i| {
                    let bits = b.binary(Binary::Shl, i, shift);
                    b.binary(Binary::Or, fixed, bits)
                })
                .collect();
            let float = b.ty(wanted) == super::tile::Ty::F32;
            let sums: Vec<Reg> = tries.iter().map(|_| if float { b.var(0.0) } else { b.var(0) }).collect();
            self.each(b, |b, here, _| {
                let size = size(b, here);
                for (&sum, &bound) in sums.iter().zip(&tries) {
                    let low = b.lt(here.key, bound);
                    let below = b.lt(here.key, least);
                    let next = if float { Lanes::add(b, sum.into(), size) } else { b.add(sum, size) };
                    let next = b.select(low, sum, next);
                    let next = b.select(below, sum, next);
                    b.set(sum, next);
                }
            });
            let sums: Vec<Val> = sums.into_iter().map(Val::Reg).collect();
            let sums = self.sums(b, &sums);
            for (&bound, sum) in tries.iter().zip(sums) {
                let short = if float { b.binary(Binary::FLt, sum, wanted) } else { b.lt(sum, wanted) };
                let next = b.select(short, fixed, bound);
                // The highest bits are tried twice: bounds go up, and never down again.
                let up = b.lt(fixed, next);
                let next = b.select(up, next, fixed);
                b.set(fixed, next);
            }
            let next = b.binary(Binary::Sub, shift, BITS);
            b.set(shift, next);
        });
        let up = b.lt(least, fixed);
        let next = b.select(up, fixed, least);
        b.set(found, next);
        found.into()
    }

    /// The sums of all threads, in all of them, always in the same order.
    fn sums(&self, b: &mut Builder, parts: &[Val]) -> Vec<Val> {
        let add = |b: &mut Builder, x: Val, y: Val| match b.ty(x) {
            super::tile::Ty::F32 => Lanes::add(b, x, y),
            _ => b.add(x, y),
        };
        let mut parts = parts.to_vec();
        for v in &mut parts {
            for mask in [16, 8, 4, 2, 1] {
                let other = b.shuffle_xor(*v, mask);
                *v = add(b, *v, other);
            }
        }
        let all = self.exchange(b, &parts);
        all.into_iter()
            .map(|list| {
                let mut sum = list[0];
                for &v in &list[1..] {
                    sum = add(b, sum, v);
                }
                sum
            })
            .collect()
    }

    /// The largest key of all threads and the smallest index that has it.
    fn first_of_largest(&self, b: &mut Builder, key: Val, index: Val) -> (Val, Val) {
        let better = |b: &mut Builder, (key, index): (Val, Val), (other, at): (Val, Val)| {
            let more = b.lt(key, other);
            let same = b.binary(Binary::Eq, key, other);
            let before = b.lt(at, index);
            let tie = b.binary(Binary::PAnd, same, before);
            let one = b.select(more, 1, 0);
            let take = b.select(tie, 1, one);
            let take = b.lt(0, take);
            (b.select(take, other, key), b.select(take, at, index))
        };
        let mut best = (key, index);
        for mask in [16, 8, 4, 2, 1] {
            let other = (b.shuffle_xor(best.0, mask), b.shuffle_xor(best.1, mask));
            best = better(b, best, other);
        }
        let lists = self.exchange(b, &[best.0, best.1]);
        let mut best = (lists[0][0], lists[1][0]);
        for (&key, &index) in lists[0].iter().zip(&lists[1]).skip(1) {
            best = better(b, best, (key, index));
        }
        best
    }

    /// What each warp has of each of some values, in all threads.
    fn exchange(&self, b: &mut Builder, parts: &[Val]) -> Vec<Vec<Val>> {
        let warps = THREADS / WARP;
        let (warp, lane) = (b.div(self.thread, WARP), b.rem(self.thread, WARP));
        let first = b.lt(lane, 1);
        // All have read what was here before.
        b.barrier();
        b.when(first, |b| {
            for (i, &v) in (0..).zip(parts) {
                let at = b.mad(warp, 4, self.slots + i * warps * 4);
                let bits = if b.ty(v) == super::tile::Ty::F32 { b.unary(Unary::Bits, v) } else { v };
                b.store(Mem::Shared, at, &[bits], 4);
            }
        });
        b.barrier();
        let read = |b: &mut Builder, i: u32, v: Val| {
            let mut list = vec![];
            for warp in (0..warps).step_by(4) {
                list.extend(b.load(Mem::Shared, self.slots + (i * warps + warp) * 4, 16));
            }
            match b.ty(v) {
                super::tile::Ty::F32 => list.into_iter().map(|w| b.unary(Unary::FromBits, w)).collect(),
                _ => list,
            }
        };
        (0..).zip(parts).map(|(i, &v)| read(b, i, v)).collect()
    }
}
