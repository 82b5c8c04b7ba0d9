//! Putting quantized weights in the place of plain ones.

use crate::pass::PassCx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::entity::{OpId, ValueId, WeightId};
use quantc_ir::ops::{Dequantize, zero_scheme};
use quantc_ir::scheme::{Scheme, Zero};
use quantc_ir::ty::{ElemTy, Float, TensorTy};
use quantc_ir::weights::{Digest, WeightDecl, WeightSource};

/// Suffixes and types of the weights that a matrix of type `ty` is stored as: codes, scales and perhaps zero points.
pub fn outputs(scheme: Scheme, ty: &TensorTy) -> Result<Vec<(&'static str, TensorTy)>> {
    let codes = TensorTy { elem: ElemTy::Q(scheme), shape: ty.shape.clone() };
    let shape = scheme.scale_shape(&ty.shape)?;
    let mut outputs = vec![("q", codes), ("s", TensorTy { elem: scheme.scale.into(), shape: shape.clone() })];
    if let Zero::Point(format) = scheme.zero {
        outputs.push(("z", TensorTy { elem: ElemTy::Q(zero_scheme(scheme, format)), shape }));
    }
    Ok(outputs)
}

/// Declares the `outputs` of `w` with their blobs and puts their `dequantize` in front of `op`. Returns it, and how many bits
/// one weight takes with its share of scales.
pub fn install(
    cx: &mut PassCx<'_>,
    op: OpId,
    w: WeightId,
    outputs: Vec<(&'static str, TensorTy)>,
    blobs: &[Digest],
) -> Result<(ValueId, f64)> {
    let name = cx.module.weights[w].name.clone();
    let mut bytes = 0;
    let mut args = vec![];
    for ((suffix, ty), &blob) in outputs.into_iter().zip(blobs) {
        bytes += ty.stored_bytes().unwrap_or(0);
        let name = cx.module.fresh_weight_name(&format!("{name}.{suffix}"));
        let id = cx.module.weights.push(WeightDecl { name, ty, source: WeightSource::Blob(blob) });
        args.push(cx.weight_value(id));
    }
    let elements = cx.module.weights[w].ty.shape.elements().unwrap_or(0).max(1);
    let bits = 8.0 * bytes as f64 / elements as f64;
    let at = cx.graph().position(op).ok_or_else(|| Diag::bug("an op that is not in the program"))?;
    let graph = cx.graph_mut();
    let taken = graph.values().any(|(_, v)| v.name.as_deref() == Some(&name));
    let value = graph.insert_inferred(at, Dequantize { to: Float::F32 }, &args, (!taken).then_some(&name))?;
    Ok((value, bits))
}
