//! Rounds what the products of a graph multiply to bytes.

use crate::pass::prelude::*;
use quantc_ir::formats;
use quantc_ir::ops::{Dequantize, Quantize, zero_scheme};
use quantc_ir::quant::{ScaleRule, Span, quantize_one, scale_for};
use quantc_ir::scheme::{Group, Scheme, Zero};
use quantc_ir::weights::Store;
use std::collections::BTreeMap;

/// Runs a graph over samples and tells the least and largest number of values.
pub trait Ranges: Send {
    /// One pair for each of `values`, which are values of `main`.
    fn ranges(&self, module: &Module, store: &Store, values: &[ValueId]) -> Result<Vec<(f32, f32)>>;
}

/// What `quantize-products` asks for ranges, left in the session.
pub struct RangesOf(pub Box<dyn Ranges>);

pass! {
    /// Rounds what convolutions and products with weights multiply to bytes.
    ///
    /// Weights become int8 with a scale for each output, activations unsigned bytes with one scale and zero point for
    /// each array, from the least and largest number that samples give. Kernels then multiply the bytes, and scale the sums.
    ///
    /// Needs samples: `--data NAME=FILE.npy` of `quantc compile MODEL.onnx`.
    "quantize-products" => pub struct QuantizeProducts {
        /// Products that stay as they are, as patterns of the names of their weights.
        skip: Vec<Pattern> = vec![],
    }
    scope: Module, numerics: Requantizes, stats: keeps
}

/// Signed bytes with a scale for each output.
const WEIGHTS: Scheme =
    Scheme { format: &formats::INT8, group: Group::Axis(0), zero: Zero::Symmetric, scale: Float::F32 };
/// Unsigned bytes with one scale and zero point.
const ROWS: Scheme = Scheme {
    format: &formats::UINT8,
    group: Group::Tensor,
    zero: Zero::Point(&formats::UINT8),
    scale: Float::F32,
};

impl Pass for QuantizeProducts {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let sites: Vec<(OpId, ValueId, WeightId)> =
            cx.module.main.ops().filter_map(|(op, node)| self.site(cx.module, op, node)).collect();
        if sites.is_empty() {
            return Ok(Changed::No);
        }
        let mut values: Vec<ValueId> = sites.iter().map(|s| s.1).collect();
        values.sort_unstable();
        values.dedup();
        let store = cx.store;
        let exec = cx.session().take::<RangesOf>().ok_or_else(|| {
            Diag::pipeline("`quantize-products` needs samples to take ranges from")
                .help("give --data NAME=FILE.npy, an array of samples for an input")
        })?;
        let ranges = exec.0.ranges(cx.module, store, &values)?;
        let mut rounded = BTreeMap::new();
        for (&value, &(low, high)) in values.iter().zip(&ranges) {
            rounded.insert(value, self.rounded(cx, value, low, high)?);
        }
        for (op, x, w) in sites {
            let weights = self.weights(cx, op, w)?;
            let node = cx.module.main.node_mut(op);
            node.args[0] = rounded[&x];
            node.args[1] = weights;
        }
        Ok(Changed::Yes)
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::all("skip", &self.skip, NameKind::Weight)
    }
}

impl QuantizeProducts {
    /// A product of f32 rows with an f32 weight: what it reads.
    fn site(&self, module: &Module, op: OpId, node: &Node) -> Option<(OpId, ValueId, WeightId)> {
        if !matches!(node.op, Op::Conv(_) | Op::MatMul(_)) {
            return None;
        }
        let (x, w) = (node.args[0], module.main.as_weight(node.args[1])?);
        let decl = &module.weights[w];
        let float = |ty: &TensorTy| ty.elem == ElemTy::F32;
        let fits = float(&decl.ty) && float(module.main.ty(x)) && module.main.as_weight(x).is_none();
        (fits && !self.skip.any_matches(&decl.name)).then_some((op, x, w))
    }

    /// `value` rounded to bytes and read again.
    fn rounded(&self, cx: &mut PassCx<'_>, value: ValueId, low: f32, high: f32) -> Result<ValueId> {
        let place = cx.place(value);
        let (scale, zero) = scale_for(Span::new(low, high), &ROWS, ScaleRule::Real)
            .map_err(|e| e.at(Loc::Item(place.clone())))?;
        cx.remark(&place, format_args!("from {low} to {high}: scale {scale:e}, zero point {zero}"));
        let ty = cx.module.main.ty(value).clone();
        let ones = vec![1u64; ty.rank()];
        let name = cx.module.main.value(value).name.clone().unwrap_or_else(|| "x".into());
        let more = format!("{:08x} {zero} {ones:?}", scale.to_bits());
        let scale_ty = TensorTy::fixed(ElemTy::F32, &ones);
        let zero_ty = TensorTy::fixed(ElemTy::Q(zero_scheme(ROWS, &formats::UINT8)), &ones);
        let (scale_name, zero_name) = (format!("{name}.scale"), format!("{name}.zero"));
        let made = cx.derive_weights(
            &[(&scale_name, scale_ty.clone()), (&zero_name, zero_ty.clone())],
            &[],
            &more,
            &mut |_, out| {
                out[0].write(&scale.to_le_bytes())?;
                out[1].write(&[zero as u8])
            },
        )?;
        let main = &mut cx.module.main;
        let (scale, zero) = (main.weight(made[0], &scale_ty), main.weight(made[1], &zero_ty));
        // Right behind what computes the value.
        let at = match main.def(value) {
            Some((op, _)) => main.position(op).map_or(0, |p| p + 1),
            None => 0,
        };
        let codes = ty.with_elem(ElemTy::Q(ROWS));
        let q = main.insert(at, Op::Quantize(Quantize { to: ROWS }), vec![value, scale, zero], codes, None);
        let back = Op::Dequantize(Dequantize { to: Float::F32 });
        Ok(main.insert(at + 1, back, vec![q, scale, zero], ty, None))
    }

    /// The weight of a product as codes, read.
    fn weights(&self, cx: &mut PassCx<'_>, op: OpId, w: WeightId) -> Result<ValueId> {
        let decl = &cx.module.weights[w];
        let (name, ty) = (decl.name.clone(), decl.ty.clone());
        let codes_ty = ty.with_elem(ElemTy::Q(WEIGHTS));
        let scales_ty = TensorTy { elem: ElemTy::F32, shape: WEIGHTS.scale_shape(&ty.shape)? };
        let outs = ty.shape.0.first().and_then(|d| d.fixed()).unwrap_or(1).max(1) as usize;
        let (codes_name, scales_name) = (format!("{name}.q"), format!("{name}.scale"));
        let outputs = [(codes_name.as_str(), codes_ty.clone()), (scales_name.as_str(), scales_ty.clone())];
        let made = cx.derive_weights(&outputs, &[w], "", &mut |views, out| {
            let numbers = views[0].read_all_f32()?;
            for row in numbers.chunks(numbers.len().div_ceil(outs).max(1)) {
                let largest = row.iter().fold(0f32, |m, x| m.max(x.abs()));
                let (scale, _) = scale_for(Span::symmetric(largest), &WEIGHTS, ScaleRule::Real)?;
                let codes: Vec<u8> =
                    row.iter().map(|&x| quantize_one(x, scale, 0, &formats::INT8) as u8).collect();
                out[0].write(&codes)?;
                out[1].write(&scale.to_le_bytes())?;
            }
            Ok(())
        })?;
        let main = &mut cx.module.main;
        let (q, scale) = (main.weight(made[0], &codes_ty), main.weight(made[1], &scales_ty));
        let none = main.none();
        let at = main.position(op).unwrap_or(0);
        let read = Op::Dequantize(Dequantize { to: Float::F32 });
        Ok(main.insert(at, read, vec![q, scale, none], ty, None))
    }
}
