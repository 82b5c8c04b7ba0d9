//! Attention over a cache of keys and values, or over the rows of the call itself.
//!
//! An item is one key/value head and a block of query rows. The query heads that share the key/value head, of all rows
//! of the block, form one tile of up to [`TILE_ROWS`] query vectors. Keys are taken [`KEY_BLOCK`] at a time: multiplied
//! with the tile, turned into weights by an online softmax, and the weights multiplied with the values. So each key and
//! value is read from memory once per item, and scratch does not grow with the context.
//!
//! Products come in two forms, one for each way in which a cache is stored ([`crate::cpu::cache`]):
//! - `emit` multiplies f32 numbers. A cache of f32 is read in place. Narrower numbers are widened while they are
//!   multiplied when there are few queries, and once per block into scratch when there are many; both do the same
//!   operations on the same numbers.
//! - `int8` multiplies bytes, where the target multiplies them four at a time. Queries and weights are rounded to 16
//!   bits for it and go in two halves, so that the sums are those of integers of 16 by 8 bits, exactly.
//!
//! What holds:
//! - Rows of a block go together when they follow each other in one sequence. Batches, chunks and single tokens may be
//!   mixed freely.
//! - Key blocks begin at multiples of [`KEY_BLOCK`] positions. A row's result therefore has the same bits whether it
//!   was computed in a long prefill, in a chunk or alone.
//! - Only blocks that hold a key which some row of the block sees are read. What lies there beside those keys has no
//!   effect on the result.
use serde::{Deserialize, Serialize};

use crate::cpu::cache::{BLOCK, CODE_COLUMNS, CacheTy, check_slot_rows};
use crate::eexpr::F32;
use crate::spec::Rows;

#[cfg(feature = "llvm")]
mod emit;
#[cfg(feature = "llvm")]
mod int8;
#[cfg(all(test, feature = "llvm"))]
mod tests;

#[cfg(feature = "llvm")]
pub use emit::emit;

/// Keys of one block.
pub const KEY_BLOCK: u32 = BLOCK;

/// Query vectors that one item takes together, when there are enough of them.
pub const TILE_ROWS: u32 = 64;

/// Where keys and values come from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvSource {
    /// States, laid out as [`crate::cpu::cache`] says. Token i's sequence begins at row `base[i]`, and it sees the
    /// positions up to its own.
    Cache {
        /// What the cache holds.
        ty: CacheTy,
        /// Rows of a slot.
        slot_rows: u32,
        /// Of codes, whether their scales are given, one for each head, and not one for each token and head in states.
        fixed_scales: bool,
    },
    /// The rows of this call, f32, `stride` elements apart: one sequence from position 0 on.
    Direct {
        /// Elements from one row to the next, of keys and of values.
        stride: u32,
    },
}

/// `softmax(q k^T * scale) v`, head by head.
///
/// Arguments: q `f32[t][q_stride]`, k, v, then for a cache positions and base `i32[t]`, for a cache of codes the scales
/// of keys and of values, states or `f32[kv_heads]`, then out `f32[t][heads * head_dim]`, then scratch of [`AttentionSpec::scratch_bytes`] per
/// worker. Items: `kv_heads` times `t` divided by [`AttentionSpec::block_rows`], rounded up.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct AttentionSpec {
    /// Query heads; query head h uses key/value head `h / (heads / kv_heads)`.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Width of a head.
    pub head_dim: u32,
    /// Factor on the products of queries and keys.
    pub scale: F32,
    /// Whether a row sees only positions up to its own; always so with a cache.
    pub causal: bool,
    /// With `w`, a row at position p sees the positions above p - w only. Needs `causal`.
    pub window: Option<u32>,
    /// With `c`, scaled products x become `c * tanh(x / c)`.
    pub softcap: Option<F32>,
    /// Where keys and values come from.
    pub source: KvSource,
    /// Elements from one row of q to the next.
    pub q_stride: u32,
    /// What counts the rows of q: all tokens of the call, or the last ones, for which results are wanted.
    #[serde(default = "all_tokens", skip_serializing_if = "is_all_tokens")]
    pub rows: Rows,
}

fn all_tokens() -> Rows {
    Rows::T
}

fn is_all_tokens(rows: &Rows) -> bool {
    *rows == Rows::T
}

/// Widest head whose sums of 16-bit queries by 8-bit keys fit in an i32.
const WIDEST_CODES: u32 = 512;

impl AttentionSpec {
    /// Causal attention over a cache whose slots have `slot_rows` rows, with q rows of `heads * head_dim`.
    pub fn cached(
        heads: u32,
        kv_heads: u32,
        head_dim: u32,
        scale: f32,
        ty: CacheTy,
        slot_rows: u32,
    ) -> AttentionSpec {
        AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            scale: F32::new(scale),
            causal: true,
            window: None,
            softcap: None,
            source: KvSource::Cache { ty, slot_rows, fixed_scales: false },
            q_stride: heads * head_dim,
            rows: Rows::T,
        }
    }

    /// Attention over the rows of the call, each array with rows of its own width.
    pub fn direct(heads: u32, kv_heads: u32, head_dim: u32, scale: f32, causal: bool) -> AttentionSpec {
        AttentionSpec {
            causal,
            source: KvSource::Direct { stride: kv_heads * head_dim },
            ..AttentionSpec::cached(heads, kv_heads, head_dim, scale, CacheTy::F32, BLOCK)
        }
    }

    /// Why no kernel can be emitted, if none can.
    pub fn check(&self) -> Result<(), String> {
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        if kv_heads == 0 || self.head_dim == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(format!("attention of {heads} heads over {kv_heads} of width {}", self.head_dim));
        }
        if self.q_stride < heads * self.head_dim {
            return Err(format!("rows of q are {} apart and hold {heads} heads", self.q_stride));
        }
        if self.window == Some(0) || (self.window.is_some() && !self.causal) {
            return Err("a window needs causal attention and at least one position".to_owned());
        }
        if self.rows == Rows::R && matches!(self.source, KvSource::Direct { .. }) {
            return Err("the rows of a call see each other, and are all computed".to_owned());
        }
        match self.source {
            KvSource::Cache { .. } if !self.causal => Err("attention over a cache is causal".to_owned()),
            KvSource::Cache { ty: CacheTy::I8, .. } if self.head_dim > WIDEST_CODES => {
                Err(format!("heads of {} columns as int8, at most {WIDEST_CODES}", self.head_dim))
            }
            KvSource::Cache { slot_rows, .. } => check_slot_rows(slot_rows),
            KvSource::Direct { stride } if stride >= kv_heads * self.head_dim => Ok(()),
            KvSource::Direct { stride } => Err(format!("keys are {stride} apart and hold {kv_heads} heads")),
        }
    }

    /// Query heads per key/value head.
    pub fn group(&self) -> u32 {
        self.heads / self.kv_heads.max(1)
    }

    /// Query rows of one item.
    pub fn block_rows(&self) -> u32 {
        (TILE_ROWS / self.group().max(1)).max(1)
    }

    /// Items of a call of `t` tokens.
    pub fn items(&self, t: u64) -> u64 {
        u64::from(self.kv_heads) * t.div_ceil(u64::from(self.block_rows()))
    }

    /// Scratch bytes a worker needs; enough for every target.
    pub fn scratch_bytes(&self) -> u64 {
        self.plan(WIDEST).bytes
    }

    /// Where things lie in scratch on a target with vectors of `lanes`, as byte offsets.
    fn plan(&self, lanes: u64) -> Plan {
        let m = u64::from(self.group() * self.block_rows());
        let d = u64::from(self.head_dim);
        let padded = d.next_multiple_of(lanes);
        let keys = u64::from(KEY_BLOCK);
        let codes = d.next_multiple_of(CODE_COLUMNS.into());
        let mut bytes = 0;
        let mut take = |n: u64| {
            let at = bytes;
            bytes += n.next_multiple_of(64);
            at as i64
        };
        Plan {
            q: take(m * d.max(codes) * 4),
            kt: take(d * keys * 4),
            rows: take(keys * padded * 4),
            s: take(m * keys * 4),
            o: take(m * padded * 4),
            max: take(m * 4),
            sum: take(m * 4),
            alpha: take(m * 4),
            start: take(m * 4),
            factor: take(m * 4),
            weight: take(m * 4),
            high: take(m * keys),
            low: take(m * keys),
            bytes,
        }
    }
}

/// Lanes of the widest vectors of any target.
const WIDEST: u64 = 16;

/// Byte offsets in scratch.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "llvm"), expect(dead_code, reason = "only the emitter reads the offsets"))]
struct Plan {
    /// The tile's queries, scaled: `[m][head_dim]`; for bytes the upper halves `[m][codes]`, then the lower ones.
    q: i64,
    /// Keys of the block, transposed: `[head_dim][KEY_BLOCK]`.
    kt: i64,
    /// Keys, then values of the block, padded with zeros: `[KEY_BLOCK][padded]`.
    rows: i64,
    /// Products, then weights: `[m][KEY_BLOCK]`.
    s: i64,
    /// Weighted sums so far: `[m][padded]`.
    o: i64,
    /// Largest product so far: `[m]`.
    max: i64,
    /// Sum of weights so far: `[m]`.
    sum: i64,
    /// What this block's maximum makes of earlier sums: `[m]`.
    alpha: i64,
    /// What integer sums begin with: `i32[m]`.
    start: i64,
    /// What a product of codes is worth, scales of keys aside: `[m]`.
    factor: i64,
    /// What a step of this block's weights is worth: `[m]`.
    weight: i64,
    /// Upper halves of the weights: `u8[m][KEY_BLOCK]`.
    high: i64,
    /// Lower halves of the weights: `u8[m][KEY_BLOCK]`.
    low: i64,
    bytes: u64,
}
