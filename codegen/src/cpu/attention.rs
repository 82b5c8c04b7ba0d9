//! Attention over a cache of keys and values, or over the rows of the call itself.
//!
//! An item is one key/value head and a block of query rows. The query heads that share the key/value head, of all rows
//! of the block, form one tile of up to [`TILE_ROWS`] query vectors. Keys are taken [`KEY_BLOCK`] at a time: packed
//! transposed (and widened to f32) into scratch, multiplied with the tile, turned into weights by an online softmax,
//! and multiplied with the values. So each key and value is read from the cache once per item, and scratch does not
//! grow with the context.
//!
//! What holds:
//! - Rows of a block go together when they follow each other in one sequence; otherwise they are done one by one.
//!   Batches, chunks and single tokens may be mixed freely.
//! - Key blocks begin at multiples of [`KEY_BLOCK`] positions. A row's result therefore has the same bits whether it
//!   was computed in a long prefill, in a chunk or alone.
//! - Only cache rows that belong to the sequence are read: from the first position any row of the block sees, rounded
//!   down to a whole key block, to the last.
use serde::{Deserialize, Serialize};

use crate::eexpr::{F32, MemTy};

/// Keys of one block.
pub const KEY_BLOCK: u32 = 64;

/// Query vectors that one item takes together, when there are enough of them.
pub const TILE_ROWS: u32 = 32;

/// Where keys and values come from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvSource {
    /// States: rows `base[i] + s` for the positions s of token i's sequence up to its own, `kv_heads * head_dim` wide.
    Cache {
        /// Type of keys and values: `F32`, `F16` or `Bf16`.
        ty: MemTy,
    },
    /// The rows of this call, f32, `stride` elements apart: one sequence from position 0 on.
    Direct {
        /// Elements from one row to the next, of keys and of values.
        stride: u32,
    },
}

/// `softmax(q k^T * scale) v`, head by head.
///
/// Arguments: q `f32[t][q_stride]`, k, v, then for a cache positions and base `i32[t]`, then out
/// `f32[t][heads * head_dim]`, then scratch of [`AttentionSpec::scratch_bytes`] per worker. Items: `kv_heads` times `t`
/// divided by [`AttentionSpec::block_rows`], rounded up.
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
}

impl AttentionSpec {
    /// Causal attention over a cache, with q rows of `heads * head_dim`.
    pub fn cached(heads: u32, kv_heads: u32, head_dim: u32, scale: f32, ty: MemTy) -> AttentionSpec {
        AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            scale: F32::new(scale),
            causal: true,
            window: None,
            softcap: None,
            source: KvSource::Cache { ty },
            q_stride: heads * head_dim,
        }
    }

    /// Attention over the rows of the call, each array with rows of its own width.
    pub fn direct(heads: u32, kv_heads: u32, head_dim: u32, scale: f32, causal: bool) -> AttentionSpec {
        AttentionSpec {
            causal,
            source: KvSource::Direct { stride: kv_heads * head_dim },
            ..AttentionSpec::cached(heads, kv_heads, head_dim, scale, MemTy::F32)
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
        match self.source {
            KvSource::Cache { ty: MemTy::F32 | MemTy::F16 | MemTy::Bf16 } if self.causal => Ok(()),
            KvSource::Cache { ty } if self.causal => Err(format!("a cache of {}", ty.name())),
            KvSource::Cache { .. } => Err("attention over a cache is causal".to_owned()),
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
        let mut bytes = 0;
        let mut take = |floats: u64| {
            let at = bytes;
            bytes += (floats * 4).next_multiple_of(64);
            at as i64
        };
        Plan {
            q: take(m * d),
            kt: take(d * keys),
            rows: take(keys * padded),
            s: take(m * keys),
            o: take(m * padded),
            max: take(m),
            sum: take(m),
            alpha: take(m),
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
    /// The tile's queries, scaled: `[m][head_dim]`.
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
    bytes: u64,
}

#[cfg(feature = "llvm")]
pub use emit::emit;

#[cfg(feature = "llvm")]
mod emit {
    use inkwell::values::PointerValue;
    use quantc_ir::diag::{Diag, Result};

    use super::{AttentionSpec, KEY_BLOCK, KvSource, Plan};
    use crate::cpu::llvm::{Elem, FloatCmp, IntCmp, Unit, Val, VecBuilder};
    use crate::cpu::math;
    use crate::eexpr::MemTy;
    use crate::eexpr::llvm::{Valid, Vectors, load_mem};

    /// Emits the kernel of `spec` as `symbol`.
    pub fn emit(unit: &Unit<'_>, spec: &AttentionSpec, symbol: &str) -> Result<()> {
        spec.check().map_err(|e| Diag::bug(format!("no such attention kernel: {e}")))?;
        unit.kernel(symbol, |b| {
            Attention::new(b, spec).items();
            Ok(())
        })
    }

    /// Vectors of columns in a register tile.
    const TILE_VECTORS: i64 = 2;

    const BLOCK: i64 = KEY_BLOCK as i64;

    /// Rows between the one that is read and the one that is asked for: the time that memory takes.
    const AHEAD: i64 = 16;

    struct Attention<'a, 'u, 'c> {
        b: &'a VecBuilder<'u, 'c>,
        spec: &'a AttentionSpec,
        plan: Plan,
        lanes: i64,
        d: i64,
        padded: i64,
        group: i64,
        /// Rows of register tiles, the largest first.
        tiles: &'static [i64],
        ty: MemTy,
        kv_stride: i64,
        q: PointerValue<'c>,
        k: PointerValue<'c>,
        v: PointerValue<'c>,
        /// Positions and bases, when there is a cache.
        places: Option<(PointerValue<'c>, PointerValue<'c>)>,
        out: PointerValue<'c>,
        scratch: PointerValue<'c>,
    }

    /// What one run over the keys works on.
    #[derive(Clone, Copy)]
    struct Work<'c> {
        /// Key/value head.
        head: Val<'c>,
        /// First row of the call, and how many.
        row: Val<'c>,
        rows: Val<'c>,
        /// Query vectors.
        m: Val<'c>,
        /// Position of the first row.
        position: Val<'c>,
        /// First key or value of the sequence and head, as an address.
        k: PointerValue<'c>,
        v: PointerValue<'c>,
    }

    /// One block of keys.
    #[derive(Clone, Copy)]
    struct Block<'c> {
        /// Position of the first key.
        first: Val<'c>,
        /// How many.
        keys: Val<'c>,
        /// How many, in register tiles.
        tiles: Val<'c>,
        /// One past the last key of all blocks.
        end: Val<'c>,
    }

    impl<'a, 'u, 'c> Attention<'a, 'u, 'c> {
        fn new(b: &'a VecBuilder<'u, 'c>, spec: &'a AttentionSpec) -> Self {
            let lanes = i64::from(b.width());
            let d = i64::from(spec.head_dim);
            let (ty, kv_stride) = match spec.source {
                KvSource::Cache { ty } => (ty, i64::from(spec.kv_heads) * d),
                KvSource::Direct { stride } => (MemTy::F32, i64::from(stride)),
            };
            let cached = matches!(spec.source, KvSource::Cache { .. });
            let out = if cached { 5 } else { 3 };
            Attention {
                b,
                spec,
                plan: spec.plan(lanes as u64),
                lanes,
                d,
                padded: (d as u64).next_multiple_of(lanes as u64) as i64,
                group: i64::from(spec.group()),
                tiles: if b.target().cpu.vector_regs >= 32 { &[8, 4, 1] } else { &[4, 1] },
                ty,
                kv_stride,
                q: b.arg(0),
                k: b.arg(1),
                v: b.arg(2),
                places: cached.then(|| (b.arg(3), b.arg(4))),
                out: b.arg(out),
                scratch: b.arg(out + 1),
            }
        }

        /// `scratch + offset + (row * stride + col)` floats.
        fn at(&self, offset: i64, row: Val<'c>, stride: i64, col: Val<'c>) -> PointerValue<'c> {
            let b = self.b;
            let index = b.add(b.mul(row, b.i64(stride)), col);
            b.row(b.offset(self.scratch, offset), index, 4)
        }

        fn load(&self, ptr: PointerValue<'c>) -> Val<'c> {
            self.b.load(ptr, Elem::F32, self.lanes as u32)
        }

        fn scalar(&self, ptr: PointerValue<'c>) -> Val<'c> {
            self.b.load(ptr, Elem::F32, 1)
        }

        fn int_at(&self, array: PointerValue<'c>, index: Val<'c>) -> Val<'c> {
            self.b.sext(self.b.load(self.b.row(array, index, 4), Elem::I32, 1), Elem::I64)
        }

        fn vectors(&self) -> Vectors<'a, 'u, 'c> {
            Vectors { b: self.b, lanes: self.lanes as u32 }
        }

        fn items(&self) {
            let b = self.b;
            let block = i64::from(self.spec.block_rows());
            let t = b.dim(0);
            let blocks = b.sdiv(b.add(t, b.i64(block - 1)), b.i64(block));
            b.for_items(|item| {
                let (head, index) = (b.sdiv(item, blocks), b.srem(item, blocks));
                let first = b.mul(index, b.i64(block));
                let rows = b.smin(b.sub(t, first), b.i64(block));
                match self.places {
                    // Rows of the call are one sequence.
                    None => self.work(head, first, rows, first, b.i64(0)),
                    Some((positions, bases)) => {
                        let (position, base) = (self.int_at(positions, first), self.int_at(bases, first));
                        let together = b.for_range(b.i64(1), rows, 1, &[b.int(Elem::I1, 1, 1)], |i, all| {
                            let row = b.add(first, i);
                            let follows = b.icmp(IntCmp::EQ, self.int_at(positions, row), b.add(position, i));
                            let same = b.icmp(IntCmp::EQ, self.int_at(bases, row), base);
                            vec![b.and(all[0], b.and(follows, same))]
                        })[0];
                        let turns = b.select(together, b.i64(1), rows);
                        let each = b.select(together, rows, b.i64(1));
                        b.for_range(b.i64(0), turns, 1, &[], |i, _| {
                            let row = b.add(first, i);
                            self.work(head, row, each, self.int_at(positions, row), self.int_at(bases, row));
                            vec![]
                        });
                    }
                }
            });
        }

        /// `rows` rows of one sequence, the first at `position`, over all their keys.
        fn work(&self, head: Val<'c>, row: Val<'c>, rows: Val<'c>, position: Val<'c>, base: Val<'c>) {
            let b = self.b;
            let size = self.ty.bytes() as i64;
            let start = b.add(b.mul(base, b.i64(self.kv_stride)), b.mul(head, b.i64(self.d)));
            let w = Work {
                head,
                row,
                rows,
                m: b.mul(rows, b.i64(self.group)),
                position,
                k: b.row(self.k, start, size),
                v: b.row(self.v, start, size),
            };
            self.begin(&w);
            let end = if self.spec.causal { b.add(position, rows) } else { b.dim(0) };
            let begin = match self.spec.window {
                None => b.i64(0),
                Some(window) => {
                    let first = b.sub(position, b.i64(i64::from(window) - 1));
                    let first = b.smax(first, b.i64(0));
                    b.sub(first, b.srem(first, b.i64(BLOCK)))
                }
            };
            b.for_range(begin, end, BLOCK, &[], |first, _| {
                let keys = b.smin(b.sub(end, first), b.i64(BLOCK));
                let tile = TILE_VECTORS * self.lanes;
                let tiles = b.sdiv(b.add(keys, b.i64(tile - 1)), b.i64(tile));
                let block = Block { first, keys, tiles, end };
                self.copy_rows(w.k, &block);
                self.transpose_keys(&block);
                self.tiles(w.m, |m, mr| self.products(&block, m, mr));
                self.weights(&w, &block);
                self.copy_rows(w.v, &block);
                self.tiles(w.m, |m, mr| self.sums(&block, m, mr));
                vec![]
            });
            self.finish(&w);
        }

        /// Runs `body` for register tiles that cover the rows 0..m.
        fn tiles(&self, m: Val<'c>, body: impl Fn(Val<'c>, i64)) {
            let b = self.b;
            let mut start = b.i64(0);
            for &mr in self.tiles {
                let whole = b.sdiv(b.sub(m, start), b.i64(mr));
                let end = b.add(start, b.mul(whole, b.i64(mr)));
                b.for_range(start, end, mr, &[], |row, _| {
                    body(row, mr);
                    vec![]
                });
                start = end;
            }
        }

        /// Runs `body` for the vectors of a head: first column, and the lanes that exist.
        fn columns(&self, body: impl Fn(i64, Valid<'c>)) {
            let mut col = 0;
            while col < self.d {
                let left = self.d - col;
                let valid = if left >= self.lanes { Valid::All } else { Valid::First(left as u32) };
                body(col, valid);
                col += self.lanes;
            }
        }

        /// Collects the scaled queries; nothing is summed yet.
        fn begin(&self, w: &Work<'c>) {
            let b = self.b;
            let n = self.lanes as u32;
            b.for_range(b.i64(0), w.rows, 1, &[], |r, _| {
                b.for_const(0, self.group, 1, &[], |g, _| {
                    let head = b.add(b.mul(w.head, b.i64(self.group)), g);
                    let row = b.mul(b.add(w.row, r), b.i64(i64::from(self.spec.q_stride)));
                    let from = b.row(self.q, b.add(row, b.mul(head, b.i64(self.d))), 4);
                    let m = b.add(b.mul(r, b.i64(self.group)), g);
                    self.columns(|col, valid| {
                        let x = load_mem(b, b.offset(from, col * 4), MemTy::F32, n, valid);
                        let x = b.fmul(x, b.f32(n, self.spec.scale.get()));
                        let to = self.at(self.plan.q, m, self.d, b.i64(col));
                        match valid {
                            Valid::First(some) => b.store_partial(to, x, Elem::F32, some),
                            _ => b.store(to, x, Elem::F32),
                        }
                        let to = self.at(self.plan.o, m, self.padded, b.i64(col));
                        b.store(to, b.f32(n, 0.0), Elem::F32);
                    });
                    let zero = b.i64(0);
                    b.store(self.at(self.plan.max, m, 1, zero), b.f32(1, f32::NEG_INFINITY), Elem::F32);
                    b.store(self.at(self.plan.sum, m, 1, zero), b.f32(1, 0.0), Elem::F32);
                    vec![]
                });
                vec![]
            });
        }

        /// Copies the rows of a block to scratch as whole f32 vectors.
        ///
        /// The rows of a head lie a whole row of the cache apart, often a power of two: too far for the processor to
        /// guess the next one, and all in the same few cache sets. So each is asked for in advance, and read once.
        fn copy_rows(&self, from: PointerValue<'c>, block: &Block<'c>) {
            let b = self.b;
            let size = self.ty.bytes() as i64;
            let row_bytes = self.kv_stride * size;
            let last = b.sub(block.end, b.i64(1));
            b.for_range(b.i64(0), block.keys, 1, &[], |key, _| {
                let position = b.add(block.first, key);
                if row_bytes > self.d * size {
                    let ahead = b.row(from, b.smin(b.add(position, b.i64(AHEAD)), last), row_bytes);
                    for line in (0..self.d * size).step_by(64) {
                        b.prefetch(b.offset(ahead, line));
                    }
                }
                let row = b.row(from, position, row_bytes);
                self.columns(|col, valid| {
                    let x = load_mem(b, b.offset(row, col * size), self.ty, self.lanes as u32, valid);
                    b.store(self.at(self.plan.rows, key, self.padded, b.i64(col)), x, Elem::F32);
                });
                vec![]
            });
        }

        /// Transposes the keys copied last. Lanes without a key get what lies there; their products are masked later.
        fn transpose_keys(&self, block: &Block<'c>) {
            let b = self.b;
            let groups = b.mul(block.tiles, b.i64(TILE_VECTORS));
            b.for_range(b.i64(0), groups, 1, &[], |group, _| {
                let key = b.mul(group, b.i64(self.lanes));
                self.columns(|col, _| {
                    let from = self.at(self.plan.rows, key, self.padded, b.i64(col));
                    let square: Vec<Val<'c>> =
                        (0..self.lanes).map(|i| self.load(b.offset(from, i * self.padded * 4))).collect();
                    let exist = (self.d - col).min(self.lanes) as usize;
                    for (i, &v) in transpose(b, square).iter().take(exist).enumerate() {
                        let to = self.at(self.plan.kt, b.i64(col + i as i64), BLOCK, key);
                        b.store(to, v, Elem::F32);
                    }
                });
                vec![]
            });
        }

        /// Products of `mr` queries from `m` on with all keys of the block.
        fn products(&self, block: &Block<'c>, m: Val<'c>, mr: i64) {
            let b = self.b;
            let n = self.lanes as u32;
            b.for_range(b.i64(0), block.tiles, 1, &[], |tile, _| {
                let key = b.mul(tile, b.i64(TILE_VECTORS * self.lanes));
                let init = vec![b.f32(n, 0.0); (mr * TILE_VECTORS) as usize];
                let acc = b.for_const(0, self.d, 1, &init, |d, acc| {
                    let kt = self.at(self.plan.kt, d, BLOCK, key);
                    let keys: Vec<_> =
                        (0..TILE_VECTORS).map(|v| self.load(b.offset(kt, v * self.lanes * 4))).collect();
                    let q = self.at(self.plan.q, m, self.d, d);
                    self.tile_fma(mr, acc, &keys, |i| self.scalar(b.offset(q, i * self.d * 4)))
                });
                for (i, &v) in acc.iter().enumerate() {
                    let (row, col) = (i as i64 / TILE_VECTORS, i as i64 % TILE_VECTORS);
                    let to = self.at(self.plan.s, m, BLOCK, key);
                    b.store(b.offset(to, (row * BLOCK + col * self.lanes) * 4), v, Elem::F32);
                }
                vec![]
            });
        }

        /// `acc[i][v] += x(i) * vectors[v]` for a tile of `mr` rows.
        fn tile_fma(
            &self,
            mr: i64,
            acc: &[Val<'c>],
            vectors: &[Val<'c>],
            x: impl Fn(i64) -> Val<'c>,
        ) -> Vec<Val<'c>> {
            let b = self.b;
            let mut next = Vec::with_capacity(acc.len());
            for i in 0..mr {
                let x = b.splat(x(i), self.lanes as u32);
                for (v, &vector) in vectors.iter().enumerate() {
                    next.push(b.fma(x, vector, acc[i as usize * vectors.len() + v]));
                }
            }
            next
        }

        /// Online softmax: turns products into weights relative to the largest product so far.
        fn weights(&self, w: &Work<'c>, block: &Block<'c>) {
            let b = self.b;
            let n = self.lanes as u32;
            let zero = b.i64(0);
            b.for_range(zero, w.m, 1, &[], |m, _| {
                let position = b.add(w.position, b.sdiv(m, b.i64(self.group)));
                // The keys this row sees, counted from the start of the block.
                let last = match self.spec.causal {
                    true => b.sub(position, block.first),
                    false => b.sub(block.keys, b.i64(1)),
                };
                let last = b.splat(b.trunc(b.smin(last, b.i64(BLOCK)), Elem::I32), n);
                let first = self.spec.window.map(|window| {
                    let first = b.sub(position, b.add(block.first, b.i64(i64::from(window) - 1)));
                    b.splat(b.trunc(b.smax(first, b.i64(-1)), Elem::I32), n)
                });
                let row = self.at(self.plan.s, m, BLOCK, zero);
                let turn = |i: Val<'c>, v: i64| {
                    b.add(b.mul(i, b.i64(TILE_VECTORS * self.lanes)), b.i64(v * self.lanes))
                };
                let none = b.f32(n, f32::NEG_INFINITY);
                let largest = b.for_range(zero, block.tiles, 1, &[none], |i, carried| {
                    let mut largest = carried[0];
                    for v in 0..TILE_VECTORS {
                        let col = turn(i, v);
                        let at = b.row(row, col, 4);
                        let x = self.capped(self.load(at));
                        let lanes: Vec<i64> = (0..self.lanes).collect();
                        let key = b.add(b.splat(b.trunc(col, Elem::I32), n), b.ints(Elem::I32, &lanes));
                        let mut seen = b.icmp(IntCmp::SLE, key, last);
                        if let Some(first) = first {
                            seen = b.and(seen, b.icmp(IntCmp::SGE, key, first));
                        }
                        let x = b.select(seen, x, none);
                        b.store(at, x, Elem::F32);
                        largest = b.fmax(x, largest);
                    }
                    vec![largest]
                })[0];
                let largest = b.reduce(largest, |b, x, y| b.fmax(x, y));
                let max_at = self.at(self.plan.max, m, 1, zero);
                let before = self.scalar(max_at);
                let now = b.fmax(largest, before);
                b.store(max_at, now, Elem::F32);
                // Nothing seen so far: all weights come out as zero, not as a difference of infinities.
                let nothing = b.fcmp(FloatCmp::OEQ, now, b.f32(1, f32::NEG_INFINITY));
                let offset = b.select(nothing, b.f32(1, 0.0), now);
                let alpha = math::exp(&mut Vectors { b, lanes: 1 }, b.fsub(before, offset));
                b.store(self.at(self.plan.alpha, m, 1, zero), alpha, Elem::F32);
                let offset = b.splat(offset, n);
                let init = vec![b.f32(n, 0.0); TILE_VECTORS as usize];
                let sums = b.for_range(zero, block.tiles, 1, &init, |i, carried| {
                    carried
                        .iter()
                        .enumerate()
                        .map(|(v, &sum)| {
                            let at = b.row(row, turn(i, v as i64), 4);
                            let p = math::exp(&mut self.vectors(), b.fsub(self.load(at), offset));
                            b.store(at, p, Elem::F32);
                            b.fadd(sum, p)
                        })
                        .collect()
                });
                let sum = sums[1..].iter().fold(sums[0], |x, &y| b.fadd(x, y));
                let sum = b.reduce(sum, |b, x, y| b.fadd(x, y));
                let sum_at = self.at(self.plan.sum, m, 1, zero);
                b.store(sum_at, b.fma(self.scalar(sum_at), alpha, sum), Elem::F32);
                vec![]
            });
        }

        fn capped(&self, x: Val<'c>) -> Val<'c> {
            let Some(cap) = self.spec.softcap else { return x };
            let (b, cap) = (self.b, self.b.f32(self.lanes as u32, cap.get()));
            b.fmul(math::tanh(&mut self.vectors(), b.fdiv(x, cap)), cap)
        }

        /// Weighted sums of values for `mr` rows from `m` on.
        fn sums(&self, block: &Block<'c>, m: Val<'c>, mr: i64) {
            let b = self.b;
            let mut col = 0;
            while col < self.padded {
                let vectors = ((self.padded - col) / self.lanes).min(TILE_VECTORS);
                let o = self.at(self.plan.o, m, self.padded, b.i64(col));
                let place = |i: i64, v: i64| b.offset(o, (i * self.padded + v * self.lanes) * 4);
                let mut init = Vec::new();
                for i in 0..mr {
                    let alpha = self.scalar(self.at(self.plan.alpha, b.add(m, b.i64(i)), 1, b.i64(0)));
                    let alpha = b.splat(alpha, self.lanes as u32);
                    init.extend((0..vectors).map(|v| b.fmul(self.load(place(i, v)), alpha)));
                }
                let acc = b.for_range(b.i64(0), block.keys, 1, &init, |key, acc| {
                    let v_row = self.at(self.plan.rows, key, self.padded, b.i64(col));
                    let values: Vec<_> =
                        (0..vectors).map(|v| self.load(b.offset(v_row, v * self.lanes * 4))).collect();
                    let p = self.at(self.plan.s, m, BLOCK, key);
                    self.tile_fma(mr, acc, &values, |i| self.scalar(b.offset(p, i * BLOCK * 4)))
                });
                for (i, &x) in acc.iter().enumerate() {
                    b.store(place(i as i64 / vectors, i as i64 % vectors), x, Elem::F32);
                }
                col += vectors * self.lanes;
            }
        }

        /// Divides by the sums of weights and writes the rows.
        fn finish(&self, w: &Work<'c>) {
            let b = self.b;
            let n = self.lanes as u32;
            b.for_range(b.i64(0), w.rows, 1, &[], |r, _| {
                b.for_const(0, self.group, 1, &[], |g, _| {
                    let m = b.add(b.mul(r, b.i64(self.group)), g);
                    let sum = self.scalar(self.at(self.plan.sum, m, 1, b.i64(0)));
                    let factor = b.splat(b.fdiv(b.f32(1, 1.0), sum), n);
                    let head = b.add(b.mul(w.head, b.i64(self.group)), g);
                    let row = b.mul(b.add(w.row, r), b.i64(i64::from(self.spec.heads) * self.d));
                    let to = b.row(self.out, b.add(row, b.mul(head, b.i64(self.d))), 4);
                    self.columns(|col, valid| {
                        let x = self.load(self.at(self.plan.o, m, self.padded, b.i64(col)));
                        let x = b.fmul(x, factor);
                        let to = b.offset(to, col * 4);
                        match valid {
                            Valid::First(some) => b.store_partial(to, x, Elem::F32, some),
                            _ => b.store(to, x, Elem::F32),
                        }
                    });
                    vec![]
                });
                vec![]
            });
        }
    }

    /// Transposes a square of as many vectors as lanes.
    fn transpose<'c>(b: &VecBuilder<'_, 'c>, mut rows: Vec<Val<'c>>) -> Vec<Val<'c>> {
        let n = rows.len();
        let mut half = n / 2;
        // Swapping the off-diagonal quarters of squares of size n, n/2, .. 2.
        while half > 0 {
            let pick = |upper: usize| -> Vec<u32> {
                (0..n)
                    .map(|lane| {
                        let (block, within) = (lane / (2 * half) * 2 * half, lane % (2 * half));
                        let from = if within < half { 0 } else { n };
                        (from + block + upper * half + within % half) as u32
                    })
                    .collect()
            };
            let (low, high) = (pick(0), pick(1));
            for i in (0..n).filter(|i| i & half == 0) {
                let (x, y) = (rows[i], rows[i + half]);
                rows[i] = b.shuffle(x, y, &low);
                rows[i + half] = b.shuffle(x, y, &high);
            }
            half /= 2;
        }
        rows
    }
}

#[cfg(all(test, feature = "llvm"))]
mod tests {
    use quantc_runtime::object::Object;

    use super::*;
    use crate::cpu::testing::{Buf, assert_close, build, call, random, rng, runnable, through};

    /// One call: tokens with their positions and bases.
    struct Call {
        positions: Vec<i32>,
        base: Vec<i32>,
    }

    impl Call {
        fn sequence(base: i32, positions: std::ops::Range<i32>) -> Call {
            Call { base: vec![base; positions.len()], positions: positions.collect() }
        }
    }

    /// The definition in f64: which keys row i sees is given as rows of k and v.
    fn reference(
        spec: &AttentionSpec,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        stride: usize,
        sees: impl Fn(usize) -> Vec<usize>,
    ) -> Vec<f64> {
        let (d, group) = (spec.head_dim as usize, spec.group() as usize);
        let t = q.len() / spec.q_stride as usize;
        let mut out = Vec::new();
        for i in 0..t {
            let keys = sees(i);
            for h in 0..spec.heads as usize {
                let q = &q[i * spec.q_stride as usize + h * d..][..d];
                let at = |s: usize| s * stride + h / group * d;
                let scores: Vec<f64> = keys
                    .iter()
                    .map(|&s| {
                        let k = &k[at(s)..][..d];
                        let x: f64 = q.iter().zip(k).map(|(&a, &b)| a as f64 * b as f64).sum();
                        let x = x * spec.scale.get() as f64;
                        spec.softcap.map_or(x, |c| c.get() as f64 * (x / c.get() as f64).tanh())
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for c in 0..d {
                    out.push(
                        keys.iter().zip(&weights).map(|(&s, w)| w * v[at(s) + c] as f64).sum::<f64>() / sum,
                    );
                }
            }
        }
        out
    }

    fn sees(spec: &AttentionSpec, c: &Call, i: usize) -> Vec<usize> {
        let p = c.positions[i];
        let first = spec.window.map_or(0, |w| (p - w as i32 + 1).max(0));
        (first..=p).map(|s| (c.base[i] + s) as usize).collect()
    }

    fn run_cached(
        object: &Object,
        spec: &AttentionSpec,
        c: &Call,
        q: &[f32],
        k: &mut Buf,
        v: &mut Buf,
    ) -> Vec<f32> {
        let t = c.positions.len();
        let mut q = Buf::of(q, MemTy::F32);
        let (mut positions, mut base) = (Buf::ints(&c.positions), Buf::ints(&c.base));
        let mut out = Buf::poisoned(t * (spec.heads * spec.head_dim) as usize * 4);
        let mut scratch = Buf::poisoned(spec.scratch_bytes() as usize);
        let items = spec.items(t as u64) as i64;
        for range in [0..items / 2, items / 2..items] {
            let args = &mut [&mut q, k, v, &mut positions, &mut base, &mut out, &mut scratch];
            call(object, "k", args, [t as i64, t as i64], range);
        }
        scratch.bytes();
        out.read(MemTy::F32)
    }

    // Weights are within 4 units in the last place of f32 plus what the error of products makes of them: sums of d <= 128
    // products of numbers up to 1, scaled, err by 1e-6, and the weighted mean of values up to 1 inherits that.
    const ABS: f64 = 4e-6;

    fn cached_case(spec: &AttentionSpec, calls: &[Call], rows: usize, seed: u64) {
        let KvSource::Cache { ty } = spec.source else { panic!("a cache") };
        let width = (spec.kv_heads * spec.head_dim) as usize;
        let mut rng = rng(seed);
        for target in runnable() {
            let object = build(target, |unit| emit(unit, spec, "k"));
            for c in calls {
                let t = c.positions.len();
                let q = random(&mut rng, t * spec.q_stride as usize, 1.0);
                let (mut k, mut v) = (
                    through(&random(&mut rng, rows * width, 1.0), ty),
                    through(&random(&mut rng, rows * width, 1.0), ty),
                );
                // What no row sees must not matter: it is NaN, unless it shares a sequence's prefix.
                let seen: Vec<bool> = (0..rows)
                    .map(|r| {
                        c.positions.iter().zip(&c.base).any(|(&p, &b)| (b..=b + p).contains(&(r as i32)))
                    })
                    .collect();
                for (r, _) in seen.iter().enumerate().filter(|(_, seen)| !**seen) {
                    k[r * width..(r + 1) * width].fill(f32::NAN);
                    v[r * width..(r + 1) * width].fill(f32::NAN);
                }
                let (mut kb, mut vb) = (Buf::of(&k, ty), Buf::of(&v, ty));
                let got = run_cached(&object, spec, c, &q, &mut kb, &mut vb);
                let want = reference(spec, &q, &k, &v, width, |i| sees(spec, c, i));
                assert_close(&got, &want, ABS, 0.0, &format!("{} {spec:?} t {t}", target.name));
            }
        }
    }

    fn calls() -> Vec<Call> {
        vec![
            Call::sequence(0, 0..1),
            Call::sequence(0, 0..5),
            Call::sequence(100, 70..103),
            Call::sequence(0, 199..200),
            Call::sequence(3, 0..150),
            // A batch: single tokens of three sequences, and chunks of two.
            Call { positions: vec![5, 90, 64], base: vec![0, 100, 200] },
            Call { positions: vec![7, 8, 9, 0, 1, 2, 3], base: vec![0, 0, 0, 150, 150, 150, 150] },
        ]
    }

    #[test]
    fn all_head_widths() {
        for d in [1, 3, 8, 16, 20, 32, 48, 64, 80, 128] {
            let scale = 1.0 / (d as f32).sqrt();
            cached_case(
                &AttentionSpec::cached(2, 1, d, scale, MemTy::F32),
                &calls()[1..4],
                300,
                u64::from(d),
            );
        }
    }

    #[test]
    fn head_groups_types_and_batches() {
        for (heads, kv_heads) in [(1, 1), (3, 3), (4, 2), (8, 1), (6, 2), (64, 1)] {
            cached_case(&AttentionSpec::cached(heads, kv_heads, 16, 0.25, MemTy::F32), &calls(), 300, 1);
        }
        for ty in [MemTy::F16, MemTy::Bf16] {
            for d in [16, 20, 64] {
                cached_case(&AttentionSpec::cached(4, 2, d, 0.2, ty), &calls(), 300, 2);
            }
        }
    }

    #[test]
    fn windows_and_caps() {
        for window in [1, 2, 17, 64, 65, 1000] {
            let spec =
                AttentionSpec { window: Some(window), ..AttentionSpec::cached(4, 2, 16, 0.25, MemTy::F32) };
            cached_case(&spec, &calls(), 300, 3);
        }
        let spec = AttentionSpec {
            softcap: Some(F32::new(1.5)),
            ..AttentionSpec::cached(4, 2, 16, 2.0, MemTy::F32)
        };
        cached_case(&spec, &calls(), 300, 4);
    }

    #[test]
    fn chunks_and_single_tokens_give_the_bits_of_one_prefill() {
        for target in runnable() {
            for window in [None, Some(30)] {
                let spec = AttentionSpec { window, ..AttentionSpec::cached(6, 2, 20, 0.3, MemTy::Bf16) };
                let object = build(target, |unit| emit(unit, &spec, "k"));
                let (t, width) = (140, 40);
                let mut rng = rng(5);
                let q = random(&mut rng, t * 120, 2.0);
                let mut k = Buf::of(&random(&mut rng, t * width, 2.0), MemTy::Bf16);
                let mut v = Buf::of(&random(&mut rng, t * width, 2.0), MemTy::Bf16);
                let whole = run_cached(&object, &spec, &Call::sequence(0, 0..t as i32), &q, &mut k, &mut v);
                for chunk in [1, 7, 33] {
                    let mut parts = Vec::new();
                    for start in (0..t).step_by(chunk) {
                        let end = (start + chunk).min(t);
                        let c = Call::sequence(0, start as i32..end as i32);
                        let q = &q[start * 120..end * 120];
                        parts.extend(run_cached(&object, &spec, &c, q, &mut k, &mut v));
                    }
                    assert!(whole == parts, "{} chunks of {chunk}", target.name);
                }
            }
        }
    }

    #[test]
    fn rows_of_the_call() {
        for target in runnable() {
            for (d, causal, window) in
                [(16, false, None), (20, true, None), (64, false, None), (8, true, Some(9))]
            {
                // q, k and v side by side in one buffer.
                let stride = (4 + 2 + 2) * d;
                let spec = AttentionSpec {
                    window,
                    source: KvSource::Direct { stride },
                    q_stride: stride,
                    ..AttentionSpec::direct(4, 2, d, 0.3, causal)
                };
                let object = build(target, |unit| emit(unit, &spec, "k"));
                for t in [1usize, 2, 5, 33, 130] {
                    let x = random(&mut rng(t as u64), t * stride as usize, 1.0);
                    let (k_at, v_at) = (4 * d as usize, 6 * d as usize);
                    let mut buf = Buf::of(&x, MemTy::F32);
                    let mut out = Buf::poisoned(t * 4 * d as usize * 4);
                    let mut scratch = Buf::poisoned(spec.scratch_bytes() as usize);
                    let q = buf.ptr();
                    let args =
                        [q, q.wrapping_add(k_at * 4), q.wrapping_add(v_at * 4), out.ptr(), scratch.ptr()];
                    let kernel = object.symbol("k").expect("the object has the kernel");
                    // SAFETY: the three parts lie in one buffer of t rows, out and scratch are as large as stated.
                    unsafe {
                        kernel(args.as_ptr(), [t as i64, 1].as_ptr(), 0, spec.items(t as u64) as i64);
                    }
                    scratch.bytes();
                    assert_eq!(buf.read(MemTy::F32), x);
                    let want = reference(&spec, &x, &x[k_at..], &x[v_at..], stride as usize, |i| {
                        let last = if causal { i } else { t - 1 };
                        let first = window.map_or(0, |w| (i + 1).saturating_sub(w as usize));
                        (first..=last).collect()
                    });
                    assert_close(
                        &out.read(MemTy::F32),
                        &want,
                        ABS,
                        0.0,
                        &format!("{} d {d} t {t}", target.name),
                    );
                }
            }
        }
    }

    #[test]
    fn large_products_do_not_overflow() {
        // Products of a thousand: the weights are all or nothing, and nothing is NaN.
        let spec = AttentionSpec::cached(2, 1, 32, 40.0, MemTy::F32);
        for target in runnable() {
            let object = build(target, |unit| emit(unit, &spec, "k"));
            let mut rng = rng(6);
            let q = random(&mut rng, 40 * 64, 3.0);
            let (k, v) = (random(&mut rng, 40 * 32, 3.0), random(&mut rng, 40 * 32, 1.0));
            let c = Call::sequence(0, 0..40);
            let (mut kb, mut vb) = (Buf::of(&k, MemTy::F32), Buf::of(&v, MemTy::F32));
            let got = run_cached(&object, &spec, &c, &q, &mut kb, &mut vb);
            // An f32 product of size 4000 errs by up to 2e-3, and the weights by that much relatively.
            let want = reference(&spec, &q, &k, &v, 32, |i| sees(&spec, &c, i));
            assert_close(&got, &want, 4e-3, 0.0, target.name);
        }
    }

    #[test]
    fn malformed_specs_are_refused() {
        let good = AttentionSpec::cached(4, 2, 16, 0.25, MemTy::F16);
        assert_eq!(good.check(), Ok(()));
        for bad in [
            AttentionSpec { kv_heads: 3, ..good.clone() },
            AttentionSpec { kv_heads: 0, ..good.clone() },
            AttentionSpec { head_dim: 0, ..good.clone() },
            AttentionSpec { q_stride: 63, ..good.clone() },
            AttentionSpec { window: Some(0), ..good.clone() },
            AttentionSpec { causal: false, ..good.clone() },
            AttentionSpec { source: KvSource::Cache { ty: MemTy::I8 }, ..good.clone() },
            AttentionSpec { source: KvSource::Direct { stride: 31 }, ..good.clone() },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }

    /// Seconds that this thread has computed.
    fn thread_seconds() -> f64 {
        unsafe extern "C" {
            fn clock_gettime(clock: i32, time: *mut [i64; 2]) -> i32;
        }
        let mut time = [0i64; 2];
        // SAFETY: on 64-bit Linux a timespec is two 64-bit integers; clock 3 is the thread's processor time.
        unsafe { clock_gettime(3, &mut time) };
        time[0] as f64 + time[1] as f64 * 1e-9
    }

    /// Speed on this machine: `cargo test --release -- --ignored --nocapture attention_speed`.
    #[test]
    #[ignore = "prints speeds; says nothing about correctness"]
    fn attention_speed() {
        // Time on the processor, the best of several: the machine may be doing other things.
        let best = |mut f: Box<dyn FnMut() + '_>| {
            let times = (0..9).map(|_| {
                let start = thread_seconds();
                f();
                thread_seconds() - start
            });
            times.fold(f64::INFINITY, f64::min)
        };
        for target in runnable() {
            for (heads, kv_heads, d, ty) in [
                (32u32, 32u32, 64u32, MemTy::F32),
                (32, 8, 64, MemTy::F16),
                (32, 32, 64, MemTy::F16),
                (32, 32, 64, MemTy::Bf16),
                (32, 8, 128, MemTy::Bf16),
                (6, 6, 48, MemTy::F32),
            ] {
                let spec = AttentionSpec::cached(heads, kv_heads, d, 0.125, ty);
                let object = build(target, |unit| emit(unit, &spec, "k"));
                let (rows, width) = (2048usize, (kv_heads * d) as usize);
                let mut rng = rng(7);
                let t = 512;
                let mut q = Buf::of(&random(&mut rng, t * spec.q_stride as usize, 1.0), MemTy::F32);
                let mut k = Buf::of(&random(&mut rng, rows * width, 1.0), ty);
                let mut v = Buf::of(&random(&mut rng, rows * width, 1.0), ty);
                let mut out = Buf::poisoned(t * (heads * d) as usize * 4);
                let mut scratch = Buf::poisoned(spec.scratch_bytes() as usize);
                let mut time = |c: &Call| {
                    let n = c.positions.len();
                    let (mut p, mut b) = (Buf::ints(&c.positions), Buf::ints(&c.base));
                    let items = spec.items(n as u64) as i64;
                    best(Box::new(|| {
                        let args = &mut [&mut q, &mut k, &mut v, &mut p, &mut b, &mut out, &mut scratch];
                        call(&object, "k", args, [n as i64, n as i64], 0..items);
                    }))
                };
                let prefill = time(&Call::sequence(0, 0..t as i32));
                let decode = time(&Call::sequence(0, rows as i32 - 1..rows as i32));
                let near = rows / 16;
                let near = time(&Call::sequence(0, near as i32 - 1..near as i32)) * 16.0;
                // Each of t rows sees (t + 1) / 2 keys on average: two products of d multiply-adds each.
                let flop = 4.0 * (t * (t + 1) / 2) as f64 * f64::from(heads * d);
                let bytes = (2 * rows * width * ty.bytes()) as f64;
                println!(
                    "{:15} {heads}/{kv_heads} x {d} {:4}: prefill {:6.1} GFLOP/s, decode {:5.1} GB/s, {:5.1} near",
                    target.name,
                    ty.name(),
                    flop / prefill / 1e9,
                    bytes / decode / 1e9,
                    bytes / near / 1e9
                );
            }
        }
    }
}
