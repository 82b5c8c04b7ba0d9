//! Passes that find whole ops in what exporters take apart.
//!
//! Graphs of other people's exporters say attention, norms, activations and rotations in ten or thirty small ops each, in
//! as many ways as there are exporters. These passes recognise what is computed, from the ops and their constants and
//! never from names, and put the op there that kernels are made for. What is not provably the same stays as it is.
//!
//! All of them walk a function once and build it anew ([`rebuild`]), looking back at what was built so far. What is known
//! of constants and indices ([`forms`]) tells scalars, masks and places apart.

crate::passes! {
    canonicalize::Canonicalize, drop_unit_axes::DropUnitAxes, raise_products::RaiseProducts,
    raise_activations::RaiseActivations, raise_norms::RaiseNorms, raise_rope::RaiseRope,
    raise_attention::RaiseAttention, add_cache::AddCache, widen_floats::WidenFloats,
}

mod einsum;
mod forms;
mod rebuild;

/// What graphs of exporters go through before everything else.
///
/// Products are parted last: what rotates a part of each head is to be seen first.
pub const PIPELINE: &str = "widen-floats, canonicalize, dedupe, drop-unit-axes, raise-products{parts=false}, \
     raise-activations, raise-norms, raise-rope, raise-products, raise-attention, canonicalize, dedupe, drop-dead";

/// The rules of all families of patterns.
pub static RULES: &[&[crate::saturate::Rule]] = &[raise_activations::RULES, raise_norms::RULES];
