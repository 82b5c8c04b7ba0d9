//! Attention over a cache of keys and values, or over the rows of the call: the kernels of [`AttentionSpec`].
//!
//! A warp has a tile of 16 query vectors: the heads that share a key/value head, of one token or of several. Keys are
//! taken some at a time ([`unit`]): products with the queries, an online softmax, products of its weights with the values,
//! all in fragments of one warp, with one exchange of registers between: none, since sums of the first product lie as the
//! second one takes its left side. Codes of caches become bf16 in registers, exactly; their scales are factors on products
//! of keys and on weights. Weights are rounded to bf16.
//!
//! There are two forms:
//!
//! - [`decode`] is for few tokens a sequence, bound by the bytes of the cache. A block has one token and one key/value
//!   head; its warps, and further blocks, take turns at the keys. The last block of a token and head adds up what all have.
//! - [`prefill`] is for many tokens, bound by the matrix units. A block has some tokens of one key/value head; its warps
//!   share what they copy.
//!
//! Both take any mix of sequences, and differ in speed alone. A result depends on the tile, and not on what else is in
//! the call, or in which order blocks run.
//!
//! Buffers: q `f32[t][q_stride]`, k and v: states as [`super::cache`] has them, or rows `f32[t][stride]`. With a cache
//! then positions and base `i32[t]`; where pages are looked up their numbers; of codes the scales of keys and those of
//! values, states or `f32[kv_heads]`. Then the inputs and outputs of the epilogue, whose columns are those of all heads.
//! Where keys are split then the partial results and the counters, whose sizes the buffers tell
//! ([`super::tile::Buffer::bytes_each`]); counters must be zero before, and are zero after. Scalar: `t`; where only wanted
//! rows have queries, the last ones of the call, then `r`: q and the results have that many rows.

use super::cache::CacheLayout;
use super::expr::Frame;
use super::tile::{Access, Binary, Builder, Mem, Val};
use crate::cpu::attention::{AttentionSpec, KvSource};
use crate::cpu::cache::{CacheTy, Role};
use crate::eexpr::{EExpr, MemTy, Place};
use crate::spec::Rows;
use quantc_ir::diag::{Diag, Result};
use serde::{Deserialize, Serialize};

pub mod decode;
pub mod prefill;
mod unit;

pub(super) use unit::ROWS;

/// Attention, and what happens to its results.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AttentionCall {
    /// What is computed; `slot_rows` does not matter here.
    pub spec: AttentionSpec,
    /// Whether pages are looked up.
    pub paged: bool,
    /// What happens to a result: one accumulator, a row for each token, columns of all heads.
    pub epilogue: EExpr,
}

impl AttentionCall {
    /// Results as f32, in rows of all heads.
    pub fn plain(spec: AttentionSpec, paged: bool) -> AttentionCall {
        let epilogue = EExpr::store_acc(MemTy::F32, spec.heads * spec.head_dim);
        AttentionCall { spec, paged, epilogue }
    }

    /// Refuses what means nothing, or has no kernel.
    pub fn check(&self) -> Result<()> {
        let bug = |e: String| Diag::bug(format!("no such attention: {e}"));
        self.spec.check().map_err(bug)?;
        self.epilogue.check(Place::Epilogue).map_err(|e| bug(e.to_string()))?;
        if self.epilogue.products() != 1 {
            return Err(bug("its epilogue reads one result".into()));
        }
        if self.paged && self.cache().is_none() {
            return Err(bug("rows of the call have no pages".into()));
        }
        if self.spec.head_dim > WIDEST {
            return Err(Diag::target(format!("heads of {} columns have no CUDA kernel", self.spec.head_dim))
                .help(format!("heads may have up to {WIDEST} columns")));
        }
        self.layout(Role::Keys).map(|_| ())
    }

    /// What the cache holds, and whether its scales are given, if there is a cache.
    fn cache(&self) -> Option<(CacheTy, bool)> {
        match self.spec.source {
            KvSource::Cache { ty, fixed_scales, .. } => Some((ty, fixed_scales)),
            KvSource::Direct { .. } => None,
        }
    }

    /// How keys or values lie: rows of the call become bf16 in shared memory.
    fn layout(&self, role: Role) -> Result<CacheLayout> {
        let ty = self.cache().map_or(CacheTy::Bf16, |(ty, _)| ty);
        CacheLayout::new(ty, role, self.spec.kv_heads, self.spec.head_dim)
    }

    /// Whether each token and head has scales of its own.
    fn token_scales(&self) -> bool {
        self.cache().is_some_and(|(ty, fixed)| ty.is_scaled() && !fixed)
    }
}

/// Widest heads: more would not fit in registers.
pub const WIDEST: u32 = 256;

/// The rows of queries.
struct Queries {
    /// The scalar that counts them.
    scalar: u32,
    /// How many there are.
    count: Val,
    /// Tokens of the call in front of the first one.
    before: Val,
}

impl Queries {
    /// Declares the scalars, after all buffers.
    fn declare(b: &mut Builder, spec: &AttentionSpec) -> Queries {
        let t = b.scalar("t");
        let tokens = b.scalar_value(t);
        match spec.rows {
            Rows::T => Queries { scalar: t, count: tokens, before: 0.into() },
            Rows::R => {
                let scalar = b.scalar("r");
                let count = b.scalar_value(scalar);
                Queries { scalar, count, before: b.binary(Binary::Sub, tokens, count) }
            }
        }
    }
}

/// The buffers of a call.
struct Arguments<'a> {
    call: &'a AttentionCall,
    q: Mem,
    k: Mem,
    v: Mem,
    cache: Option<Cache>,
    frame: Frame<'a>,
}

/// What tells where a cache's rows are.
#[derive(Clone, Copy)]
struct Cache {
    positions: Mem,
    base: Mem,
    pages: Option<Mem>,
    /// Of keys, of values.
    scales: Option<[Mem; 2]>,
}

impl<'a> Arguments<'a> {
    fn declare(b: &mut Builder, call: &'a AttentionCall) -> Arguments<'a> {
        let [q, k, v] = ["q", "k", "v"].map(|name| b.buffer(name, Access::Read));
        let cache = call.cache().map(|(ty, _)| Cache {
            positions: b.buffer("positions", Access::Read),
            base: b.buffer("bases", Access::Read),
            pages: call.paged.then(|| b.buffer("pages", Access::Read)),
            scales: ty.is_scaled().then(|| ["k_scales", "v_scales"].map(|name| b.buffer(name, Access::Read))),
        });
        let frame = Frame::declare(b, &call.epilogue, true);
        Arguments { call, q, k, v, cache, frame }
    }
}
