//! Attention by dot products: [`AttentionSpec`], a warp for each query head of a token.
//!
//! Keys are taken 32 at a time, one for each lane: a lane multiplies its key with the query, an online softmax makes
//! weights of the products, and then the lanes share the columns of the values. Keys and values are those of the cache,
//! found through its pages, or the rows of the call.

use super::{Pages, WARPS, across, load_cached, warp_item, word};
use crate::cpu::attention::{AttentionSpec, KvSource};
use crate::cpu::cache::CacheTy;
use crate::cpu::math::{self, Lanes};
use crate::cuda::expr::{alignment, load, wide, write};
use crate::cuda::tile::{Access, Binary, Builder, Extent, Kernel, Mem, Unary, Val, WARP};
use crate::eexpr::{MemTy, ReduceOp};
use crate::spec::Rows;
use quantc_ir::diag::{Diag, Result};

/// Below every product of a query and a key.
const LOWEST: f32 = -3.0e38;

/// Where keys and values are.
enum Source {
    Cache { pages: Pages, base_row: Val, scales: Option<[Mem; 2]>, fixed: bool },
    Rows { stride: u32 },
}

/// The kernel of `spec`, called `name`.
///
/// Buffers: q, k, v, then for a cache positions, base, the table of pages, and for codes the scales of keys and of
/// values, then out. The scalar is `t`, and where only wanted rows have queries then `r`.
pub fn build(name: &str, spec: &AttentionSpec) -> Result<Kernel> {
    spec.check().map_err(|e| Diag::bug(format!("no such attention: {e}")))?;
    if spec.softcap.is_some() {
        return Err(Diag::target("attention with capped products has no CUDA kernel"));
    }
    let mut b = Builder::new(name, WARPS * WARP);
    let [q, k, v] = ["q", "k", "v"].map(|name| b.buffer(name, Access::Read));
    let cache = match spec.source {
        KvSource::Cache { ty, fixed_scales, .. } => {
            let [positions, base, table] =
                ["positions", "base", "pages"].map(|name| b.buffer(name, Access::Read));
            let scales =
                ty.is_scaled().then(|| ["k_scales", "v_scales"].map(|name| b.buffer(name, Access::Read)));
            let width = ty.width(spec.head_dim);
            Some((positions, Pages { ty, heads: spec.kv_heads, width, base, table }, scales, fixed_scales))
        }
        KvSource::Direct { .. } => None,
    };
    let out = b.buffer("out", Access::Write);
    let t = b.scalar("t");
    let rows = match spec.rows {
        Rows::T => t,
        Rows::R => b.scalar("r"),
    };
    b.grid(Extent::PerScalar { scalar: rows, times: spec.heads, per: WARPS }, Extent::Fixed(1));
    let weights = b.shared(WARPS * WARP * 4);

    let (item, here, lane) = warp_item(&mut b, rows, spec.heads);
    let (row, head) = (b.div(item, spec.heads), b.rem(item, spec.heads));
    let kv_head = b.div(head, spec.group());
    let tokens = b.scalar_value(t);
    let token = match spec.rows {
        Rows::T => row,
        Rows::R => {
            let wanted = b.scalar_value(rows);
            let before = b.binary(Binary::Sub, tokens, wanted);
            b.add(row, before)
        }
    };
    let (position, source) = match (cache, spec.source) {
        (Some((positions, pages, scales, fixed)), _) => {
            let position = word(&mut b, positions, token);
            let base_row = pages.base(&mut b, token);
            (position, Source::Cache { pages, base_row, scales, fixed })
        }
        (None, KvSource::Direct { stride }) => (token, Source::Rows { stride }),
        (None, KvSource::Cache { .. }) => return Err(Diag::bug("a cache without its pages")),
    };
    // Keys from `first` to before `end` are seen.
    let end = if spec.causal { b.add(position, 1) } else { tokens };
    let first = match spec.window {
        None => 0.into(),
        Some(window) => {
            let inside = b.lt(position, window);
            let first = b.binary(Binary::Sub, end, window);
            b.select(inside, 0, first)
        }
    };
    let work = Work { spec, q, k, v, row, head, kv_head, lane, source };
    let thread = b.thread();
    let warp = b.div(thread, WARP);
    let own = b.mad(warp, WARP * 4, weights);
    let rounds = spec.head_dim.div_ceil(WARP);
    let most = b.var(LOWEST);
    let total = b.var(0.0);
    let sums: Vec<_> = (0..rounds).map(|_| b.var(0.0)).collect();
    b.repeat(first, end, WARP, |b, start| {
        let key = b.add(start, lane);
        let seen = b.lt(key, end);
        let last = b.binary(Binary::Sub, end, 1);
        let key = b.binary(Binary::Min, key, last);
        let product = work.product(b, key);
        let product = b.select(seen, product, LOWEST);
        let largest = across(b, ReduceOp::Max, product);
        let largest = b.select_lt(most.into(), largest, largest, most.into());
        let earlier = Lanes::sub(b, most.into(), largest);
        let earlier = math::exp(b, earlier);
        let weight = Lanes::sub(b, product, largest);
        let weight = math::exp(b, weight);
        let weight = b.select(seen, weight, 0.0);
        let sum = across(b, ReduceOp::Sum, weight);
        let all = b.mul_add(total.into(), earlier, sum);
        b.set(total, all);
        b.set(most, largest);
        let weight = work.scaled(b, weight, key);
        let at = b.mad(lane, 4, own);
        let bits = b.unary(Unary::Bits, weight);
        b.store(Mem::Shared, at, &[bits], 4);
        b.sync_warp();
        for &sum in &sums {
            let less = Lanes::mul(b, sum.into(), earlier);
            b.set(sum, less);
        }
        let count = b.binary(Binary::Sub, end, start);
        let count = b.binary(Binary::Min, count, WARP);
        b.repeat(0, count, 1, |b, i| {
            let at = b.mad(i, 4, own);
            let bits = b.load(Mem::Shared, at, 4)[0];
            let weight = b.unary(Unary::FromBits, bits);
            let key = b.add(start, i);
            for (&sum, x) in sums.iter().zip(work.values(b, key)) {
                let more = b.mul_add(weight, x, sum.into());
                b.set(sum, more);
            }
        });
        b.sync_warp();
    });
    for (i, &sum) in sums.iter().enumerate() {
        let col = b.add(lane, i as u32 * WARP);
        let inside = b.lt(col, spec.head_dim);
        let here = b.binary(Binary::PAnd, here, inside);
        b.when(here, |b| {
            let y = Lanes::div(b, sum.into(), total.into());
            let in_row = b.mad(head, spec.head_dim, col);
            let in_row = b.mul(in_row, 4);
            let at = wide(b, row, spec.heads * spec.head_dim * 4, in_row);
            write(b, out, at, MemTy::F32, &[y], 4);
        });
    }
    Ok(b.finish())
}

/// What a warp is about.
struct Work<'a> {
    spec: &'a AttentionSpec,
    q: Mem,
    k: Mem,
    v: Mem,
    /// The row of q.
    row: Val,
    head: Val,
    kv_head: Val,
    lane: Val,
    source: Source,
}

impl Work<'_> {
    fn ty(&self) -> CacheTy {
        match &self.source {
            Source::Cache { pages, .. } => pages.ty,
            Source::Rows { .. } => CacheTy::F32,
        }
    }

    /// Where column `col` of the key or value of `position` lies.
    fn at(&self, b: &mut Builder, row: Val, col: Val) -> Val {
        match &self.source {
            Source::Cache { pages, .. } => pages.at(b, row, col),
            Source::Rows { stride } => {
                let in_row = b.mad(self.kv_head, self.spec.head_dim, col);
                let in_row = b.mul(in_row, 4);
                wide(b, row, stride * 4, in_row)
            }
        }
    }

    /// The row of a position.
    fn row(&self, b: &mut Builder, position: Val) -> Val {
        match &self.source {
            Source::Cache { pages, base_row, .. } => pages.row(b, *base_row, position, self.kv_head),
            Source::Rows { .. } => position,
        }
    }

    /// The scale of a row, of keys (0) or of values (1).
    fn scale(&self, b: &mut Builder, which: usize, row: Val) -> Option<Val> {
        let Source::Cache { scales: Some(scales), fixed, .. } = &self.source else { return None };
        let bits = match fixed {
            true => word(b, scales[which], self.kv_head),
            false => {
                let at = wide(b, row, 4, 0.into());
                b.load(scales[which], at, 4)[0]
            }
        };
        Some(b.unary(Unary::FromBits, bits))
    }

    /// The scaled product of the query with this lane's key.
    fn product(&self, b: &mut Builder, key: Val) -> Val {
        let (spec, ty) = (self.spec, self.ty());
        let row = self.row(b, key);
        let stride = match &self.source {
            Source::Cache { pages, .. } => pages.width * ty.bytes(),
            Source::Rows { stride } => stride * 4,
        };
        let columns = [8, 4, 2, 1].into_iter().find(|c| spec.head_dim.is_multiple_of(*c)).unwrap_or(1);
        let of_head = spec.head_dim * ty.bytes();
        let aligned = alignment(&[columns * ty.bytes(), stride, of_head]);
        let q_aligned = alignment(&[columns * 4, spec.q_stride * 4, spec.head_dim * 4]);
        let sum = b.var(0.0);
        b.repeat(0, spec.head_dim, columns, |b, col| {
            let in_row = b.mad(self.head, spec.head_dim, col);
            let in_row = b.mul(in_row, 4);
            let at = wide(b, self.row, spec.q_stride * 4, in_row);
            let q = load(b, self.q, at, MemTy::F32, columns, q_aligned);
            let at = self.at(b, row, col);
            let k = load_cached(b, self.k, at, ty, columns, aligned);
            let mut total = sum.into();
            for (q, k) in q.into_iter().zip(k) {
                total = b.mul_add(q, k, total);
            }
            b.set(sum, total);
        });
        let product = match self.scale(b, 0, row) {
            Some(scale) => Lanes::mul(b, sum.into(), scale),
            None => sum.into(),
        };
        Lanes::mul(b, product, spec.scale.get().into())
    }

    /// A weight times the scale of its value.
    fn scaled(&self, b: &mut Builder, weight: Val, key: Val) -> Val {
        if !self.ty().is_scaled() {
            return weight;
        }
        let row = self.row(b, key);
        match self.scale(b, 1, row) {
            Some(scale) => Lanes::mul(b, weight, scale),
            None => weight,
        }
    }

    /// This lane's columns of a value; where there is none, the last.
    fn values(&self, b: &mut Builder, key: Val) -> Vec<Val> {
        let spec = self.spec;
        let row = self.row(b, key);
        let columns = 0..spec.head_dim.div_ceil(WARP);
        columns
            .map(|i| {
                let col = b.add(self.lane, i * WARP);
                let col = b.binary(Binary::Min, col, spec.head_dim - 1);
                let at = self.at(b, row, col);
                load_cached(b, self.v, at, self.ty(), 1, self.ty().bytes())[0]
            })
            .collect()
    }
}
