//! Kernels without tricks: rows into caches, and attention by dot products.
//!
//! They serve every cache that the specs allow, and stand in where [`super::cache`] has no layout for one.
//!
//! # Caches
//!
//! A state lies in pages of [`PAGE`] tokens. A page holds its heads one after the other, and each head its tokens:
//! `[page][head][token][width]`, keys and values alike; scales of codes `[page][head][token]`. Token i of a call is in row
//! `base[i] + positions[i]`; the table of pages tells, by the number of the row by [`PAGE`], which page has it.

use super::expr::{load, wide};
use super::tile::{Binary, Builder, Mem, Unary, Val, WARP};
use crate::cpu::cache::CacheTy;
use crate::cpu::math::Lanes;
use crate::eexpr::{MemTy, ReduceOp};
use quantc_runtime::format::STATE_BLOCK;

mod append;
mod attention;

pub use append::build as append;
pub use attention::build as attention;

/// Tokens of a page.
pub const PAGE: u32 = STATE_BLOCK;

/// Warps of a block.
const WARPS: u32 = 4;

/// Index of this warp's item among `times` for each token, whether there is such an item, and the lane. A warp without
/// one has the last item, for reading.
fn warp_item(b: &mut Builder, t: u32, times: u32) -> (Val, Val, Val) {
    let (block, thread) = (b.block_x(), b.thread());
    let (warp, lane) = (b.div(thread, WARP), b.rem(thread, WARP));
    let index = b.mad(block, WARPS, warp);
    let tokens = b.scalar_value(t);
    let count = b.mul(tokens, times);
    let here = b.lt(index, count);
    let last = b.binary(Binary::Sub, count, 1);
    (b.binary(Binary::Min, index, last), here, lane)
}

/// A number of 32 bits of an array.
fn word(b: &mut Builder, mem: Mem, index: Val) -> Val {
    let at = b.mul(index, 4);
    b.load(mem, at, 4)[0]
}

/// The largest or the sum over all lanes, in all of them.
fn across(b: &mut Builder, op: ReduceOp, mut v: Val) -> Val {
    let mut mask = WARP / 2;
    while mask > 0 {
        let other = b.shuffle_xor(v, mask);
        v = match op {
            ReduceOp::Sum => Lanes::add(b, v, other),
            ReduceOp::Max | ReduceOp::AbsMax => b.select_lt(v, other, other, v),
        };
        mask /= 2;
    }
    v
}

/// A state in its pages.
struct Pages {
    ty: CacheTy,
    heads: u32,
    /// Columns of a head, padding included.
    width: u32,
    base: Mem,
    table: Mem,
}

impl Pages {
    /// Where `position` of a sequence lies that begins at row `base`: the number of a head's row.
    fn row(&self, b: &mut Builder, base: Val, position: Val, head: Val) -> Val {
        let row = b.add(base, position);
        let entry = b.div(row, PAGE);
        let page = word(b, self.table, entry);
        let of_page = b.mad(page, self.heads, head);
        let within = b.rem(row, PAGE);
        b.mad(of_page, PAGE, within)
    }

    /// The row that a token's sequence begins at.
    fn base(&self, b: &mut Builder, token: Val) -> Val {
        word(b, self.base, token)
    }

    /// Byte offset of a column of a row.
    fn at(&self, b: &mut Builder, row: Val, col: Val) -> Val {
        let in_row = b.mul(col, self.ty.bytes());
        wide(b, row, self.width * self.ty.bytes(), in_row)
    }
}

/// Adjacent numbers of a cache, without their scales.
fn load_cached(b: &mut Builder, mem: Mem, at: Val, ty: CacheTy, count: u32, aligned: u32) -> Vec<Val> {
    let plain = match ty {
        CacheTy::F32 => MemTy::F32,
        CacheTy::F16 => MemTy::F16,
        CacheTy::Bf16 => MemTy::Bf16,
        CacheTy::I8 => MemTy::I8,
        CacheTy::E4m3 => {
            let piece = aligned.min(count);
            let mut values = vec![];
            for first in (0..count).step_by(piece as usize) {
                let at = super::expr::advance(b, at, first);
                let words = b.load(mem, at, piece);
                values.extend((0..piece).map(|i| e4m3_to_float(b, words[(i / 4) as usize], i % 4 * 8)));
            }
            return values;
        }
    };
    load(b, mem, at, plain, count, aligned)
}

/// Between the exponents of e4m3 and of f32, once the bits of one are where the other has them.
const E4M3_FACTOR: f32 = f32::from_bits((127 + 120) << 23);

/// The number that the e4m3 code at bit `low` of a word stands for.
fn e4m3_to_float(b: &mut Builder, word: Val, low: u32) -> Val {
    let code = b.shr(word, low);
    let sign = b.and(code, 0x80);
    let sign = b.shl(sign, 24);
    let size = b.and(code, 0x7f);
    let size = b.shl(size, 20);
    let bits = b.binary(Binary::Or, sign, size);
    let small = b.unary(Unary::FromBits, bits);
    Lanes::mul(b, small, E4M3_FACTOR.into())
}

/// The e4m3 code nearest to a float, clamped.
fn float_to_e4m3(b: &mut Builder, x: Val) -> Val {
    let rounded = b.round_e4m3(x);
    let small = Lanes::mul(b, rounded, (1.0 / E4M3_FACTOR).into());
    let bits = b.unary(Unary::Bits, small);
    let sign = b.shr(bits, 24);
    let sign = b.and(sign, 0x80);
    let size = b.shr(bits, 20);
    let size = b.and(size, 0x7f);
    b.binary(Binary::Or, sign, size)
}
