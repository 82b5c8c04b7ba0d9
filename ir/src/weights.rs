//! Weights: what a module knows of its large tensors, and the store they are read from and derived into.
//!
//! A module names its weights ([`WeightDecl`]) and says where each lies ([`WeightSource`]); it never holds their
//! bytes. A [`Store`] maps files and blobs, so that nothing is read until it is touched, and gives a [`WeightView`]
//! of one weight: rows of numbers or of codes, a block at a time.
//!
//! What holds:
//! - Weights are never changed. A pass derives new ones with [`Store::derive`], which first looks up the [`Recipe`]:
//!   the same step with the same options on the same inputs is done once, over all runs that share a store.
//! - The stored bytes of a weight are its rows (everything but the last axis), each packed as one little-endian bit
//!   stream that starts on a byte boundary. A source of any other length is refused.
//! - A source is never trusted: ranges are checked against the file, and reads need no alignment.

mod blob;
mod digest;
mod store;
mod view;

pub use blob::BlobWriter;
pub use digest::{Digest, Recipe};
pub use store::{ShardBytes, Store, StoreStats};
pub use view::{RowBlocks, WeightView};

use crate::diag::{Diag, Loc, Result};
use crate::entity::{PrimaryMap, ShardId, WeightId};
use crate::ty::TensorTy;
use std::fmt;

/// The weights of a module.
pub type Weights = PrimaryMap<WeightId, WeightDecl>;

/// The files that weights of a module lie in.
pub type Shards = PrimaryMap<ShardId, Shard>;

/// A file that weights lie in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// The file as the model names it; whoever opens the model says which directory that is relative to.
    pub file: String,
}

/// A weight of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightDecl {
    /// The name without its `@`.
    pub name: String,
    /// Element type and shape; all extents are static.
    pub ty: TensorTy,
    /// Where the bytes are.
    pub source: WeightSource,
}

/// Where the bytes of a weight are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WeightSource {
    /// A range of a file.
    File {
        /// Which file.
        shard: ShardId,
        /// First byte.
        at: u64,
        /// Number of bytes.
        len: u64,
    },
    /// A blob of the store, named by its content.
    Blob(Digest),
    /// Every element is this number, rounded to the element type, which is a plain float.
    Splat(F32Bits),
    /// Bytes written in the module itself, packed as stored.
    Inline(Vec<u8>),
    /// The same bytes and the same type as another weight: a tied weight.
    Alias(WeightId),
}

/// An `f32` compared by its bits, so that declarations have an equality.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct F32Bits(u32);

impl F32Bits {
    /// The number.
    pub fn get(self) -> f32 {
        f32::from_bits(self.0)
    }
}

impl From<f32> for F32Bits {
    fn from(x: f32) -> F32Bits {
        F32Bits(x.to_bits())
    }
}

impl fmt::Display for F32Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// The weight that holds the bytes of `id`: follows aliases and refuses those that lead nowhere, to another type or
/// in a circle.
pub fn resolve(weights: &Weights, id: WeightId) -> Result<WeightId> {
    let missing = |id| Diag::bug(format!("weight {id:?} is not in the module"));
    let first = weights.get(id).ok_or_else(|| missing(id))?;
    let mut at = id;
    for _ in 0..=weights.len() {
        let decl = weights.get(at).ok_or_else(|| missing(at))?;
        if decl.ty != first.ty {
            let message =
                format!("is an alias of @{}, but that is {} and not {}", decl.name, decl.ty, first.ty);
            return Err(problem(first, message));
        }
        match decl.source {
            WeightSource::Alias(next) => at = next,
            _ => return Ok(at),
        }
    }
    Err(problem(first, "is an alias of itself"))
}

/// A problem with the source of `decl`.
fn problem(decl: &WeightDecl, message: impl fmt::Display) -> Diag {
    Diag::input(format!("weight @{} {message}", decl.name)).at(Loc::Item(format!("@{}", decl.name)))
}

#[cfg(test)]
mod tests;
