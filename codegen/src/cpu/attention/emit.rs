//! The kernel: runs of rows, blocks of keys, online softmax, and products in f32.
use inkwell::values::PointerValue;
use quantc_ir::diag::{Diag, Result};

use super::{AttentionSpec, KEY_BLOCK, KvSource, Plan};
use crate::cpu::cache::{self, BlockLayout, CacheTy, Role, Slots};
use crate::cpu::llvm::{Elem, FloatCmp, IntCmp, Unit, Val, VecBuilder};
use crate::cpu::math::{self, Lanes};
use crate::eexpr::MemTy;
use crate::eexpr::llvm::{Valid, Vectors, load_mem};
use crate::spec;

/// Emits the kernel of `spec` as `symbol`.
pub fn emit(unit: &Unit<'_>, spec: &AttentionSpec, symbol: &str) -> Result<()> {
    spec.check().map_err(|e| Diag::bug(format!("no such attention kernel: {e}")))?;
    unit.kernel(symbol, |b| {
        Attention::new(b, spec).items();
        Ok(())
    })
}

pub(super) const BLOCK: i64 = KEY_BLOCK as i64;

/// Query vectors up to which narrow numbers are widened where they are multiplied, and not in scratch.
const FEW_QUERIES: i64 = 8;

/// Rows of register tiles, the largest first.
pub(super) const TILE_QUERIES: [i64; 3] = [4, 2, 1];

/// Rows between the one that is read and the one that is asked for: the time that memory takes.
const AHEAD: i64 = 16;

/// A cache of keys and values.
#[derive(Clone, Copy)]
pub(super) struct Cache<'c> {
    ty: CacheTy,
    pub(super) keys: BlockLayout,
    pub(super) values: BlockLayout,
    slot_rows: u32,
    /// Whether there is one scale for all tokens of a head.
    fixed_scales: bool,
    positions: PointerValue<'c>,
    bases: PointerValue<'c>,
    /// Scales of keys and of values, when those are codes.
    scales: Option<(PointerValue<'c>, PointerValue<'c>)>,
}

pub(super) struct Attention<'a, 'u, 'c> {
    pub(super) b: &'a VecBuilder<'u, 'c>,
    pub(super) spec: &'a AttentionSpec,
    pub(super) plan: Plan,
    pub(super) lanes: i64,
    pub(super) d: i64,
    pub(super) padded: i64,
    pub(super) group: i64,
    /// Vectors of a register tile.
    pub(super) tile_vectors: i64,
    q: PointerValue<'c>,
    k: PointerValue<'c>,
    v: PointerValue<'c>,
    pub(super) cache: Option<Cache<'c>>,
    out: PointerValue<'c>,
    scratch: PointerValue<'c>,
}

/// What one run over the keys works on.
#[derive(Clone, Copy)]
pub(super) struct Work<'c> {
    /// Key/value head.
    head: Val<'c>,
    /// First row of the call, and how many.
    row: Val<'c>,
    rows: Val<'c>,
    /// Query vectors.
    pub(super) m: Val<'c>,
    /// Position of the first row.
    position: Val<'c>,
    /// First key or value of the sequence and head, as an address.
    k: PointerValue<'c>,
    v: PointerValue<'c>,
    /// First scales of keys and values of the sequence and head.
    scales: Option<(PointerValue<'c>, PointerValue<'c>)>,
}

/// One block of keys.
#[derive(Clone, Copy)]
pub(super) struct Block<'c> {
    /// Position of the first key.
    first: Val<'c>,
    /// How many.
    pub(super) keys: Val<'c>,
    /// One past the last key of all blocks.
    end: Val<'c>,
    /// Keys and values in the cache.
    pub(super) k: PointerValue<'c>,
    pub(super) v: PointerValue<'c>,
    /// Their scales.
    pub(super) scales: Option<(PointerValue<'c>, PointerValue<'c>)>,
}

/// Where products find numbers as f32.
#[derive(Clone, Copy)]
enum Rows<'c> {
    /// As f32, so many numbers from one row to the next.
    Plain(PointerValue<'c>, i64),
    /// In a cache of narrower numbers.
    Narrow(PointerValue<'c>, BlockLayout),
}

impl<'a, 'u, 'c> Attention<'a, 'u, 'c> {
    fn new(b: &'a VecBuilder<'u, 'c>, spec: &'a AttentionSpec) -> Self {
        let lanes = i64::from(b.width());
        let d = i64::from(spec.head_dim);
        // Of the last rows, positions and bases are the last ones too.
        let of_rows = |array: PointerValue<'c>| match spec.rows {
            spec::Rows::T => array,
            spec::Rows::R => b.row(array, b.sub(b.dim(0), b.dim(1)), 4),
        };
        let (cache, out) = match spec.source {
            KvSource::Direct { .. } => (None, 3),
            KvSource::Cache { ty, slot_rows, fixed_scales } => {
                let layout = |role| BlockLayout::new(ty, role, spec.head_dim, b.target());
                let cache = Cache {
                    ty,
                    keys: layout(Role::Keys),
                    values: layout(Role::Values),
                    slot_rows,
                    fixed_scales,
                    positions: of_rows(b.arg(3)),
                    bases: of_rows(b.arg(4)),
                    scales: ty.is_scaled().then(|| (b.arg(5), b.arg(6))),
                };
                (Some(cache), if ty.is_scaled() { 7 } else { 5 })
            }
        };
        Attention {
            b,
            spec,
            plan: spec.plan(lanes as u64),
            lanes,
            d,
            padded: (d as u64).next_multiple_of(lanes as u64) as i64,
            group: i64::from(spec.group()),
            tile_vectors: if b.target().cpu.vector_regs >= 32 { 4 } else { 2 },
            q: b.arg(0),
            k: b.arg(1),
            v: b.arg(2),
            cache,
            out: b.arg(out),
            scratch: b.arg(out + 1),
        }
    }

    /// Whether keys and values are multiplied as bytes.
    fn in_bytes(&self) -> bool {
        self.cache.is_some_and(|cache| cache.keys.quads)
    }

    /// `scratch + offset + (row * stride + col) * size`.
    pub(super) fn at(
        &self,
        offset: i64,
        row: Val<'c>,
        stride: i64,
        col: Val<'c>,
        size: i64,
    ) -> PointerValue<'c> {
        let b = self.b;
        let index = b.add(b.mul(row, b.i64(stride)), col);
        b.row(b.offset(self.scratch, offset), index, size)
    }

    /// Scratch of floats: `offset + row * stride + col`.
    fn floats(&self, offset: i64, row: Val<'c>, stride: i64, col: i64) -> PointerValue<'c> {
        self.at(offset, row, stride, self.b.i64(col), 4)
    }

    /// Scratch with one number for each query vector.
    pub(super) fn of_query(&self, offset: i64, m: Val<'c>) -> PointerValue<'c> {
        self.floats(offset, m, 1, 0)
    }

    pub(super) fn load(&self, ptr: PointerValue<'c>) -> Val<'c> {
        self.b.load(ptr, Elem::F32, self.lanes as u32)
    }

    pub(super) fn scalar(&self, ptr: PointerValue<'c>) -> Val<'c> {
        self.b.load(ptr, Elem::F32, 1)
    }

    /// The scalar at `ptr` in every lane.
    pub(super) fn spread(&self, ptr: PointerValue<'c>) -> Val<'c> {
        self.b.splat(self.scalar(ptr), self.lanes as u32)
    }

    fn int_at(&self, array: PointerValue<'c>, index: Val<'c>) -> Val<'c> {
        self.b.sext(self.b.load(self.b.row(array, index, 4), Elem::I32, 1), Elem::I64)
    }

    fn items(&self) {
        let b = self.b;
        let block = i64::from(self.spec.block_rows());
        let t = b.dim(self.spec.rows.dim());
        let blocks = b.sdiv(b.add(t, b.i64(block - 1)), b.i64(block));
        b.for_items(|item| {
            let (head, index) = (b.sdiv(item, blocks), b.srem(item, blocks));
            let first = b.mul(index, b.i64(block));
            let rows = b.smin(b.sub(t, first), b.i64(block));
            match &self.cache {
                // Rows of the call are one sequence.
                None => self.work(head, first, rows, first, b.i64(0)),
                Some(cache) => self.runs(cache, first, rows, |row, rows, position, base| {
                    self.work(head, row, rows, position, base);
                }),
            }
        });
    }

    /// Runs `body` for the longest runs of rows that follow each other in one sequence: first row, number of rows,
    /// position of the first, base.
    fn runs(
        &self,
        cache: &Cache<'c>,
        first: Val<'c>,
        rows: Val<'c>,
        body: impl Fn(Val<'c>, Val<'c>, Val<'c>, Val<'c>),
    ) {
        let b = self.b;
        let end = b.add(first, rows);
        let of = |row| (self.int_at(cache.positions, row), self.int_at(cache.bases, row));
        // A run ends before the first row that does not follow, or with the last row.
        b.for_range(b.add(first, b.i64(1)), b.add(end, b.i64(1)), 1, &[first], |row, carried| {
            let start = carried[0];
            let last = b.sub(row, b.i64(1));
            let (position, base) = of(start);
            let inside = b.icmp(IntCmp::SLT, row, end);
            let (next_position, next_base) = of(b.select(inside, row, last));
            let follows = b.icmp(IntCmp::EQ, next_position, b.add(position, b.sub(row, start)));
            let same = b.icmp(IntCmp::EQ, next_base, base);
            let goes_on = b.and(inside, b.and(follows, same));
            b.if_else(
                goes_on,
                || vec![start],
                || {
                    body(start, b.sub(row, start), position, base);
                    vec![row]
                },
            )
        });
    }

    /// `rows` rows of one sequence, the first at `position`, over all their keys.
    fn work(&self, head: Val<'c>, row: Val<'c>, rows: Val<'c>, position: Val<'c>, base: Val<'c>) {
        let b = self.b;
        let (k, v, scales) = match &self.cache {
            None => {
                let start = b.mul(head, b.i64(self.d));
                (b.row(self.k, start, 4), b.row(self.v, start, 4), None)
            }
            Some(cache) => {
                let heads = self.spec.kv_heads;
                let start = |state, layout: &BlockLayout| {
                    Slots::of(layout, heads, cache.slot_rows).head(b, state, base, head)
                };
                let slots = Slots::of_scales(heads, cache.slot_rows);
                let of_head = |scales| match cache.fixed_scales {
                    true => b.row(scales, head, 4),
                    false => slots.head(b, scales, base, head),
                };
                let scales = cache.scales.map(|(k, v)| (of_head(k), of_head(v)));
                (start(self.k, &cache.keys), start(self.v, &cache.values), scales)
            }
        };
        let m = b.mul(rows, b.i64(self.group));
        let w = Work { head, row, rows, m, position, k, v, scales };
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
            let row_bytes = |layout: BlockLayout| i64::from(layout.bytes()) / BLOCK;
            let (k, v) = match &self.cache {
                None => (w.k, w.v),
                Some(cache) => {
                    (b.row(w.k, first, row_bytes(cache.keys)), b.row(w.v, first, row_bytes(cache.values)))
                }
            };
            let of_block = |scales| if self.has_fixed_scales() { scales } else { b.row(scales, first, 4) };
            let scales = w.scales.map(|(k, v)| (of_block(k), of_block(v)));
            self.block(&w, &Block { first, keys, end, k, v, scales });
            vec![]
        });
        self.finish(&w);
    }

    fn has_fixed_scales(&self) -> bool {
        self.cache.as_ref().is_some_and(|cache| cache.fixed_scales)
    }

    /// The scales of vector `v` of the keys from `key` on of a block whose scales are at `scales`.
    pub(super) fn scales(&self, scales: PointerValue<'c>, key: Val<'c>, v: i64) -> Val<'c> {
        let b = self.b;
        match self.has_fixed_scales() {
            true => b.splat(b.load(scales, Elem::F32, 1), self.lanes as u32),
            false => self.load(b.offset(b.row(scales, key, 4), v * self.lanes * 4)),
        }
    }

    fn block(&self, w: &Work<'c>, block: &Block<'c>) {
        let b = self.b;
        match self.cache {
            None => {
                let rows = b.offset(self.scratch, self.plan.rows);
                self.copy_rows(w.k, block);
                self.transpose_keys(block);
                let keys = Rows::Plain(b.offset(self.scratch, self.plan.kt), BLOCK);
                self.products(w, block, keys);
                self.weights(w, block);
                self.copy_rows(w.v, block);
                self.sums(w, block, Rows::Plain(rows, self.padded));
            }
            Some(cache) if cache.keys.quads => {
                self.byte_products(w, block, &cache);
                self.weights(w, block);
                self.byte_sums(w, block, &cache);
            }
            Some(Cache { ty: CacheTy::F32, .. }) => {
                self.products(w, block, Rows::Plain(block.k, BLOCK));
                self.weights(w, block);
                self.sums(w, block, Rows::Plain(block.v, self.d));
            }
            Some(cache) => {
                let few = b.icmp(IntCmp::SLE, w.m, b.i64(FEW_QUERIES));
                b.if_else(
                    few,
                    || {
                        self.products(w, block, Rows::Narrow(block.k, cache.keys));
                        vec![]
                    },
                    || {
                        self.widen_keys(block, &cache);
                        self.products(w, block, Rows::Plain(b.offset(self.scratch, self.plan.kt), BLOCK));
                        vec![]
                    },
                );
                self.weights(w, block);
                b.if_else(
                    few,
                    || {
                        self.sums(w, block, Rows::Narrow(block.v, cache.values));
                        vec![]
                    },
                    || {
                        self.widen_values(block, &cache);
                        self.sums(w, block, Rows::Plain(b.offset(self.scratch, self.plan.rows), self.padded));
                        vec![]
                    },
                );
            }
        }
    }

    /// Runs `body` for register tiles that cover the query vectors 0..m.
    pub(super) fn tiles(&self, m: Val<'c>, body: impl Fn(Val<'c>, i64)) {
        let b = self.b;
        let mut start = b.i64(0);
        for mr in TILE_QUERIES {
            let whole = b.sdiv(b.sub(m, start), b.i64(mr));
            let end = b.add(start, b.mul(whole, b.i64(mr)));
            b.for_range(start, end, mr, &[], |row, _| {
                body(row, mr);
                vec![]
            });
            start = end;
        }
    }

    /// Runs `body` for vectors of keys that cover the block: first key, number of vectors. Whole blocks go in tiles of
    /// several vectors, others in single vectors as far as there are keys.
    pub(super) fn key_tiles(&self, block: &Block<'c>, body: impl Fn(Val<'c>, i64)) {
        let b = self.b;
        let whole = b.icmp(IntCmp::EQ, block.keys, b.i64(BLOCK));
        let each = |vectors: i64, end: Val<'c>| {
            b.for_range(b.i64(0), end, vectors * self.lanes, &[], |key, _| {
                body(key, vectors);
                vec![]
            });
            vec![]
        };
        b.if_else(whole, || each(self.tile_vectors, b.i64(BLOCK)), || each(1, block.keys));
    }

    /// Runs `body` for the vectors of a head: first column, and the lanes that exist.
    pub(super) fn columns(&self, mut body: impl FnMut(i64, Valid<'c>)) {
        let mut col = 0;
        while col < self.d {
            body(col, self.valid(col));
            col += self.lanes;
        }
    }

    /// The columns that exist of the vector at `col`.
    fn valid(&self, col: i64) -> Valid<'c> {
        let left = self.d - col;
        if left >= self.lanes { Valid::All } else { Valid::First(left as u32) }
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
                let query = |col: i64, valid| {
                    let x = load_mem(b, b.offset(from, col * 4), MemTy::F32, n, valid);
                    b.fmul(x, b.f32(n, self.spec.scale.get()))
                };
                if self.in_bytes() {
                    self.query_bytes(m, query);
                } else {
                    self.columns(|col, valid| {
                        let to = self.floats(self.plan.q, m, self.d, col);
                        match valid {
                            Valid::First(some) => b.store_partial(to, query(col, valid), Elem::F32, some),
                            _ => b.store(to, query(col, valid), Elem::F32),
                        }
                    });
                }
                self.columns(|col, _| {
                    b.store(self.floats(self.plan.o, m, self.padded, col), b.f32(n, 0.0), Elem::F32);
                });
                b.store(self.of_query(self.plan.max, m), b.f32(1, f32::NEG_INFINITY), Elem::F32);
                b.store(self.of_query(self.plan.sum, m), b.f32(1, 0.0), Elem::F32);
                vec![]
            });
            vec![]
        });
    }

    /// Copies the rows of a block of the call to scratch as whole vectors.
    ///
    /// The rows of a head lie a whole row of the call apart, often a power of two: too far for the processor to guess
    /// the next one, and all in the same few cache sets. So each is asked for in advance, and read once.
    fn copy_rows(&self, from: PointerValue<'c>, block: &Block<'c>) {
        let b = self.b;
        let KvSource::Direct { stride } = self.spec.source else { return };
        let row_bytes = i64::from(stride) * 4;
        let last = b.sub(block.end, b.i64(1));
        b.for_range(b.i64(0), block.keys, 1, &[], |key, _| {
            let position = b.add(block.first, key);
            if row_bytes > self.d * 4 {
                let ahead = b.row(from, b.smin(b.add(position, b.i64(AHEAD)), last), row_bytes);
                for line in (0..self.d * 4).step_by(64) {
                    b.prefetch(b.offset(ahead, line));
                }
            }
            let row = b.row(from, position, row_bytes);
            self.columns(|col, valid| {
                let x = load_mem(b, b.offset(row, col * 4), MemTy::F32, self.lanes as u32, valid);
                b.store(self.floats(self.plan.rows, key, self.padded, col), x, Elem::F32);
            });
            vec![]
        });
    }

    /// Transposes the keys copied last. Lanes without a key get what lies there; their products are masked later.
    fn transpose_keys(&self, block: &Block<'c>) {
        let b = self.b;
        b.for_range(b.i64(0), block.keys, self.lanes, &[], |key, _| {
            self.columns(|col, _| {
                let from = self.floats(self.plan.rows, key, self.padded, col);
                let square: Vec<Val<'c>> =
                    (0..self.lanes).map(|i| self.load(b.offset(from, i * self.padded * 4))).collect();
                let exist = (self.d - col).min(self.lanes) as usize;
                for (i, &v) in transpose(b, square).iter().take(exist).enumerate() {
                    let to = self.at(self.plan.kt, b.i64(col + i as i64), BLOCK, key, 4);
                    b.store(to, v, Elem::F32);
                }
            });
            vec![]
        });
    }

    /// Copies keys of a block from the cache to scratch as f32, transposed as they are.
    fn widen_keys(&self, block: &Block<'c>, cache: &Cache<'c>) {
        let b = self.b;
        b.for_const(0, self.d, 1, &[], |col, _| {
            b.for_range(b.i64(0), block.keys, self.lanes, &[], |key, _| {
                let x = self.narrow_keys(block.k, &cache.keys, col, key);
                b.store(self.at(self.plan.kt, col, BLOCK, key, 4), x, Elem::F32);
                vec![]
            });
            vec![]
        });
    }

    /// Copies values of a block from the cache to scratch as f32.
    fn widen_values(&self, block: &Block<'c>, cache: &Cache<'c>) {
        let b = self.b;
        b.for_range(b.i64(0), block.keys, 1, &[], |key, _| {
            self.columns(|col, _| {
                let x = self.narrow_values(block.v, &cache.values, key, col);
                b.store(self.floats(self.plan.rows, key, self.padded, col), x, Elem::F32);
            });
            vec![]
        });
    }

    /// One column of a vector of keys from `key` on.
    fn narrow_keys(
        &self,
        block: PointerValue<'c>,
        layout: &BlockLayout,
        col: Val<'c>,
        key: Val<'c>,
    ) -> Val<'c> {
        let b = self.b;
        let size = i64::from(layout.ty.bytes());
        let at = b.row(b.row(block, col, i64::from(layout.column_stride())), key, size);
        cache::load(b, at, layout.ty, self.lanes as u32, Valid::All)
    }

    /// A vector of columns of one value.
    fn narrow_values(
        &self,
        block: PointerValue<'c>,
        layout: &BlockLayout,
        key: Val<'c>,
        col: i64,
    ) -> Val<'c> {
        let b = self.b;
        let size = i64::from(layout.ty.bytes());
        let at = b.offset(b.row(block, key, i64::from(layout.width) * size), col * size);
        // Codes are padded to whole vectors.
        let valid = if layout.ty.is_scaled() { Valid::All } else { self.valid(col) };
        cache::load(b, at, layout.ty, self.lanes as u32, valid)
    }

    /// Products of all queries with the keys of the block, scales of keys aside.
    fn products(&self, w: &Work<'c>, block: &Block<'c>, keys: Rows<'c>) {
        let b = self.b;
        let n = self.lanes as u32;
        self.key_tiles(block, |key, vectors| {
            self.tiles(w.m, |m, mr| {
                let init = vec![b.f32(n, 0.0); (mr * vectors) as usize];
                let acc = b.for_const(0, self.d, 1, &init, |col, acc| {
                    let columns: Vec<_> = (0..vectors)
                        .map(|v| {
                            let key = b.add(key, b.i64(v * self.lanes));
                            match &keys {
                                Rows::Plain(at, stride) => {
                                    self.load(b.row(b.row(*at, col, stride * 4), key, 4))
                                }
                                Rows::Narrow(at, layout) => self.narrow_keys(*at, layout, col, key),
                            }
                        })
                        .collect();
                    let q = self.at(self.plan.q, m, self.d, col, 4);
                    self.tile_fma(mr, acc, &columns, |i| b.offset(q, i * self.d * 4))
                });
                self.store_products(m, key, vectors, &acc);
            });
        });
    }

    /// Stores a register tile of products from query `m` and key `key` on.
    pub(super) fn store_products(&self, m: Val<'c>, key: Val<'c>, vectors: i64, acc: &[Val<'c>]) {
        let b = self.b;
        let to = self.at(self.plan.s, m, BLOCK, key, 4);
        for (i, &v) in acc.iter().enumerate() {
            let (row, col) = (i as i64 / vectors, i as i64 % vectors);
            b.store(b.offset(to, (row * BLOCK + col * self.lanes) * 4), v, Elem::F32);
        }
    }

    /// `acc[i][v] += x(i) * vectors[v]` for a tile of `mr` rows.
    fn tile_fma(
        &self,
        mr: i64,
        acc: &[Val<'c>],
        vectors: &[Val<'c>],
        x: impl Fn(i64) -> PointerValue<'c>,
    ) -> Vec<Val<'c>> {
        let b = self.b;
        let mut next = Vec::with_capacity(acc.len());
        for i in 0..mr {
            let x = self.spread(x(i));
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
        b.for_range(b.i64(0), w.m, 1, &[], |m, _| {
            let position = b.add(w.position, b.sdiv(m, b.i64(self.group)));
            // The keys this row sees, counted from the start of the block.
            let last = match self.spec.causal {
                true => b.sub(position, block.first),
                false => b.sub(block.keys, b.i64(1)),
            };
            let first = self
                .spec
                .window
                .map(|window| b.sub(position, b.add(block.first, b.i64(i64::from(window) - 1))));
            let mut all = b.icmp(IntCmp::SGE, last, b.i64(BLOCK - 1));
            if !self.spec.causal {
                all = b.icmp(IntCmp::EQ, block.keys, b.i64(BLOCK));
            }
            if let Some(first) = first {
                all = b.and(all, b.icmp(IntCmp::SLE, first, b.i64(0)));
            }
            let some = || {
                let last = b.splat(b.trunc(b.smin(last, b.i64(BLOCK)), Elem::I32), n);
                let first = first.map(|f| b.splat(b.trunc(b.smax(f, b.i64(-1)), Elem::I32), n));
                let seen = (0..BLOCK / self.lanes).map(|v| {
                    let keys: Vec<i64> = (v * self.lanes..(v + 1) * self.lanes).collect();
                    let keys = b.ints(Elem::I32, &keys);
                    let seen = b.icmp(IntCmp::SLE, keys, last);
                    match first {
                        None => seen,
                        Some(first) => b.and(seen, b.icmp(IntCmp::SGE, keys, first)),
                    }
                });
                self.row_weights(m, block, Some(&seen.collect::<Vec<_>>()));
                vec![]
            };
            let whole = || {
                self.row_weights(m, block, None);
                vec![]
            };
            b.if_else(all, whole, some);
            vec![]
        });
    }

    /// Weights of one query vector, which sees the lanes where `seen` holds.
    fn row_weights(&self, m: Val<'c>, block: &Block<'c>, seen: Option<&[Val<'c>]>) {
        let b = self.b;
        let n = self.lanes as u32;
        let row = self.floats(self.plan.s, m, BLOCK, 0);
        let vectors = BLOCK / self.lanes;
        let hide = |v: i64, x: Val<'c>, hidden: f32| match seen {
            None => x,
            Some(seen) => b.select(seen[v as usize], x, b.f32(n, hidden)),
        };
        let products: Vec<Val<'c>> = (0..vectors)
            .map(|v| {
                let mut x = self.load(b.offset(row, v * self.lanes * 4));
                if let (Some((scales, _)), false) = (block.scales, self.in_bytes()) {
                    x = b.fmul(x, self.scales(scales, b.i64(0), v));
                }
                if let Some(cap) = self.spec.softcap {
                    let mut x_of_bytes = x;
                    if self.in_bytes() {
                        x_of_bytes = b.fmul(x, self.spread(self.of_query(self.plan.factor, m)));
                    }
                    let x = b.fdiv(x_of_bytes, b.f32(n, cap.get()));
                    return hide(v, math::tanh(&mut Vectors { b, lanes: n }, x), f32::NEG_INFINITY);
                }
                hide(v, x, f32::NEG_INFINITY)
            })
            .collect();
        // What a product is worth in the exponent of 2.
        let factor = match (self.spec.softcap, self.in_bytes()) {
            (Some(cap), _) => b.f32(1, cap.get() * std::f32::consts::LOG2_E),
            (None, false) => b.f32(1, std::f32::consts::LOG2_E),
            (None, true) => {
                b.fmul(self.scalar(self.of_query(self.plan.factor, m)), b.f32(1, std::f32::consts::LOG2_E))
            }
        };
        let largest = self.tree(&products, |x, y| b.fmax(x, y));
        let largest = b.fmul(b.reduce(largest, |b, x, y| b.fmax(x, y)), factor);
        let max_at = self.of_query(self.plan.max, m);
        let before = self.scalar(max_at);
        let now = b.fmax(largest, before);
        b.store(max_at, now, Elem::F32);
        // Nothing seen so far: all weights come out as zero, not as a difference of infinities.
        let nothing = b.fcmp(FloatCmp::OEQ, now, b.f32(1, f32::NEG_INFINITY));
        let offset = b.select(nothing, b.f32(1, 0.0), now);
        let alpha = exp2(&mut Vectors { b, lanes: 1 }, b.fsub(before, offset));
        b.store(self.of_query(self.plan.alpha, m), alpha, Elem::F32);
        let (minus, factor) = (b.splat(b.fneg(offset), n), b.splat(factor, n));
        let weights: Vec<Val<'c>> = (0..vectors)
            .map(|v| {
                let x = b.fma(products[v as usize], factor, minus);
                hide(v, exp2(&mut Vectors { b, lanes: n }, x), 0.0)
            })
            .collect();
        let sum = self.tree(&weights, |x, y| b.fadd(x, y));
        let sum = b.reduce(sum, |b, x, y| b.fadd(x, y));
        let sum_at = self.of_query(self.plan.sum, m);
        b.store(sum_at, b.fma(self.scalar(sum_at), alpha, sum), Elem::F32);
        let scaled: Vec<Val<'c>> = match block.scales {
            None => weights,
            Some((_, scales)) => (0..vectors)
                .map(|v| {
                    let scale = self.scales(scales, b.i64(0), v);
                    b.fmul(weights[v as usize], hide(v, scale, 0.0))
                })
                .collect(),
        };
        if self.in_bytes() {
            self.weight_bytes(m, &scaled);
        } else {
            for (v, &p) in scaled.iter().enumerate() {
                b.store(b.offset(row, v as i64 * self.lanes * 4), p, Elem::F32);
            }
        }
    }

    /// Combines vectors lane by lane in a fixed tree.
    pub(super) fn tree(&self, vectors: &[Val<'c>], combine: impl Fn(Val<'c>, Val<'c>) -> Val<'c>) -> Val<'c> {
        let mut vectors = vectors.to_vec();
        while vectors.len() > 1 {
            let pairs = vectors.chunks(2);
            vectors = pairs.map(|pair| if let [x, y] = *pair { combine(x, y) } else { pair[0] }).collect();
        }
        vectors[0]
    }

    /// Runs `body` for groups of vectors of columns: the first column, the number of vectors.
    pub(super) fn column_tiles(&self, body: impl Fn(i64, i64)) {
        let mut col = 0;
        while col < self.padded {
            let vectors = ((self.padded - col) / self.lanes).min(self.tile_vectors);
            body(col, vectors);
            col += vectors * self.lanes;
        }
    }

    /// Weighted sums of values.
    fn sums(&self, w: &Work<'c>, block: &Block<'c>, values: Rows<'c>) {
        let b = self.b;
        self.column_tiles(|col, vectors| {
            self.tiles(w.m, |m, mr| {
                let o = self.floats(self.plan.o, m, self.padded, col);
                let place = |i: i64, v: i64| b.offset(o, (i * self.padded + v * self.lanes) * 4);
                let mut init = Vec::new();
                for i in 0..mr {
                    let alpha = self.spread(self.of_query(self.plan.alpha, b.add(m, b.i64(i))));
                    init.extend((0..vectors).map(|v| b.fmul(self.load(place(i, v)), alpha)));
                }
                let acc = b.for_range(b.i64(0), block.keys, 1, &init, |key, acc| {
                    let row: Vec<_> = (0..vectors)
                        .map(|v| {
                            let col = col + v * self.lanes;
                            match &values {
                                Rows::Plain(at, stride) => {
                                    let at = b.offset(b.row(*at, key, stride * 4), col * 4);
                                    // Rows in scratch are padded.
                                    let valid = if *stride == self.d { self.valid(col) } else { Valid::All };
                                    load_mem(b, at, MemTy::F32, self.lanes as u32, valid)
                                }
                                Rows::Narrow(at, layout) => self.narrow_values(*at, layout, key, col),
                            }
                        })
                        .collect();
                    let p = self.at(self.plan.s, m, BLOCK, key, 4);
                    self.tile_fma(mr, acc, &row, |i| b.offset(p, i * BLOCK * 4))
                });
                for (i, &x) in acc.iter().enumerate() {
                    b.store(place(i as i64 / vectors, i as i64 % vectors), x, Elem::F32);
                }
            });
        });
    }

    /// Divides by the sums of weights and writes the rows.
    fn finish(&self, w: &Work<'c>) {
        let b = self.b;
        let n = self.lanes as u32;
        b.for_range(b.i64(0), w.rows, 1, &[], |r, _| {
            b.for_const(0, self.group, 1, &[], |g, _| {
                let m = b.add(b.mul(r, b.i64(self.group)), g);
                let sum = self.scalar(self.of_query(self.plan.sum, m));
                let factor = b.splat(b.fdiv(b.f32(1, 1.0), sum), n);
                let head = b.add(b.mul(w.head, b.i64(self.group)), g);
                let row = b.mul(b.add(w.row, r), b.i64(i64::from(self.spec.heads) * self.d));
                let to = b.row(self.out, b.add(row, b.mul(head, b.i64(self.d))), 4);
                self.columns(|col, valid| {
                    let x = self.load(self.floats(self.plan.o, m, self.padded, col));
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

/// `2^x` for x up to 1, within 2e-7 relatively; below `2^-126` it stays there. NaN gives NaN.
pub(super) fn exp2<'c>(l: &mut Vectors<'_, '_, 'c>, x: Val<'c>) -> Val<'c> {
    /// 1.5 * 2^23: added to a small float it leaves the nearest integer in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let low = l.constant(-126.0);
    let x = l.max(low, x);
    // x = n + r, |r| <= 1/2.
    let magic = l.constant(MAGIC);
    let shifted = l.add(x, magic);
    let n = l.sub(shifted, magic);
    let r = l.sub(x, n);
    let ln_2 = std::f32::consts::LN_2;
    let y = l.poly(r, &[1.0, ln_2, 0.240_222_83, 0.055_505_585, 0.009_669_691, 0.001_330_060_5]);
    // n is added to the exponent: shifted by 23 the low bits of the sum are n, and the constant has vanished.
    let (b, lanes) = (l.b, l.lanes);
    let exponent = b.shl(b.bitcast(shifted, Elem::I32, lanes), b.i32(lanes, 23));
    b.bitcast(b.add(b.bitcast(y, Elem::I32, lanes), exponent), Elem::F32, lanes)
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
