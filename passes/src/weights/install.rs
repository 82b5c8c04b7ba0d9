//! Putting quantized weights in the place of plain ones.

use crate::pass::PassCx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::entity::{OpId, ValueId, WeightId};
use quantc_ir::ops::{Dequantize, zero_scheme};
use quantc_ir::scheme::{Scheme, Zero};
use quantc_ir::ty::{ElemTy, Float, TensorTy};
use quantc_ir::weights::{Digest, WeightDecl, WeightSource};
use std::collections::BTreeMap;

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

/// What matrices were before they were rounded, by the weight of their codes. Passes leave it for passes of the same run.
#[derive(Default)]
pub struct Originals(BTreeMap<WeightId, WeightId>);

impl Originals {
    /// The matrix whose codes are `codes`. In a text, where no pass has told it, that is the one whose name [`install`] gave them.
    pub fn of(cx: &mut PassCx<'_>, codes: WeightId) -> Option<WeightId> {
        let told = cx.session().get::<Originals>().and_then(|all| all.0.get(&codes)).copied();
        let weights = &cx.module.weights;
        let decl = &weights[codes];
        let named =
            || weights.iter().find(|(_, w)| decl.name.strip_suffix(".q") == Some(&w.name)).map(|(id, _)| id);
        // A module that was tidied up since may number its weights in another way.
        let fits = |&id: &WeightId| {
            let found = weights.iter().find(|(known, _)| *known == id).map(|(_, w)| w);
            found.is_some_and(|w| {
                w.ty.elem.is_float()
                    && w.ty.shape == decl.ty.shape
                    && decl.name.starts_with(&format!("{}.q", w.name))
            })
        };
        told.filter(fits).or_else(named).filter(fits)
    }

    fn put(cx: &mut PassCx<'_>, codes: WeightId, original: WeightId) {
        let mut all = cx.session().take::<Originals>().unwrap_or_default();
        all.0.insert(codes, original);
        cx.session().put(all);
    }
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
        if args.is_empty() {
            Originals::put(cx, id, w);
        }
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
