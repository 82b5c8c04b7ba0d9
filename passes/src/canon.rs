//! Passes that bring a module into the form that the others expect, and tidy up after them.

crate::passes! {
    outline_layers::OutlineLayers, fold_constants::FoldConstants, dedupe::Dedupe, drop_dead::DropDead,
    narrow_rows::NarrowRows, cast_weights::CastWeights,
}

pub mod copy;

use quantc_ir::ops::Op;

/// The op without the packed form of its weight.
pub(crate) fn unpacked(op: &Op) -> Op {
    let mut op = op.clone();
    match &mut op {
        Op::MatMul(mm) => mm.packed.clear(),
        Op::QMatMul(mm) => mm.packed.clear(),
        _ => {}
    }
    op
}
