//! Products that read quantized weights, and quantized activations, as they are.

use crate::pass::prelude::*;
use crate::rule;
use crate::saturate::{self, Limits, Match, Rule, Sample};
use quantc_ir::formats;
use quantc_ir::ops::{DYNAMIC_INT8, Dequantize, MatMul, QMatMul, Step, zero_scheme};
use quantc_ir::scheme::{Group, Scheme, Zero};

pass! {
    /// Makes products read quantized operands as they are.
    ///
    /// A `matmul` with a dequantized weight becomes a `qmatmul`, which never expands the weight. When its other operand
    /// is dequantized too, symmetric with one scale per token or for all, and both are integers, the `qmatmul` reads those codes as well; several products
    /// of the same activation share its codes and scales. Epilogues stay.
    ///
    /// ```qir before
    /// weight @q : tensor<2x4x!q<int8:f32 axis 0>> = inline [[1, 2, 3, 4], [5, 6, 7, 8]]
    /// weight @s : tensor<2x1xf32> = splat 0.5
    /// %w = dequantize @q, @s
    /// %y = matmul %x, %w
    /// ```
    /// ```qir after
    /// %y = qmatmul %x, @q, @s
    /// ```
    "fuse-dequant-matmul" => pub struct FuseDequantMatmul {
        /// Rounds of rewriting after which to stop.
        rounds: u32 = 16,
        /// Expressions kept at one time after which to stop.
        nodes: u32 = 50000,
    }
    scope: Layer, numerics: Exact, stats: keeps
}

impl Pass for FuseDequantMatmul {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        saturate::run(self, cx, RULES, Limits { rounds: self.rounds, nodes: self.nodes })
    }
}

/// A quantized weight at full precision is what it is dequantized to; results of fewer bits were rounded on purpose.
fn product_of_codes(m: &Match<'_>) -> Option<Op> {
    let matmul: &MatMul = m.op("m")?;
    let weight: &Dequantize = m.op("d")?;
    if weight.to != Float::F32 || !matmul.packed.is_empty() {
        return None;
    }
    Some(QMatMul { epilogue: matmul.epilogue.clone(), packed: String::new() }.into())
}

fn product_of_rows(m: &Match<'_>) -> Option<Op> {
    let product: &QMatMul = m.op("m")?;
    let rows: &Dequantize = m.op("d")?;
    let (x, w) = (m.ty("q")?.elem.scheme()?, m.ty("w")?.elem.scheme()?);
    let per_row = matches!(x.group, Group::Token | Group::Tensor) && x.zero == Zero::Symmetric;
    // Codes of floats have no product that is worth having: it would read them as the floats they stand for.
    let integers = x.format.is_int() && w.format.is_int();
    if !per_row || m.is_constant("q")
        || rows.to != Float::F32
        || !integers
        || !product.packed.is_empty()
    {
        return None;
    }
    Some(product.clone().into())
}

fn f32(dims: &[u64]) -> TensorTy {
    TensorTy::fixed(ElemTy::F32, dims)
}

fn schemes() -> Vec<Scheme> {
    let scheme = |format, group| Scheme { format, group, zero: Zero::Symmetric, scale: Float::F32 };
    vec![
        scheme(&formats::INT8, Group::Axis(0)),
        scheme(&formats::INT8, Group::Tensor),
        Scheme { scale: Float::Bf16, ..scheme(&formats::INT4, Group::Block { axis: 1, size: 4 }) },
        Scheme {
            zero: Zero::Point(&formats::UINT4),
            ..scheme(&formats::UINT4, Group::Block { axis: 1, size: 5 })
        },
        scheme(&formats::INT3, Group::Tile([2, 4])),
        scheme(&formats::E4M3, Group::Axis(0)),
    ]
}

fn weight(sample: Sample, scheme: Scheme) -> Sample {
    let w = TensorTy::fixed(ElemTy::Q(scheme), &[6, 12]);
    let shape = scheme.scale_shape(&w.shape).unwrap_or_default();
    let sample =
        sample.value("w", w).value("s", TensorTy { elem: scheme.scale.into(), shape: shape.clone() });
    match scheme.zero {
        Zero::Symmetric => sample,
        Zero::Point(format) => {
            sample.value("z", TensorTy { elem: ElemTy::Q(zero_scheme(scheme, format)), shape })
        }
    }
}

/// Rules over products with quantized operands.
pub static RULES: &[Rule] = &[
    rule! {
        /// `x ((q - z) s)^T = sum_g s_g (x (q - z)^T)_g`: the scale of a group is a factor of its part of the sum.
        "dequant-into-matmul", Exact,
        "(matmul:m ?x (dequantize:d ?w ?s ?z) ?e*)" => "(qmatmul ?x ?w ?s ?z none ?e*)",
        root: product_of_codes,
        samples: || {
            let plain = schemes().into_iter().map(|s| weight(Sample::new().value("x", f32(&[3, 12])), s));
            let with_epilogue = weight(Sample::new().value("x", f32(&[3, 12])), schemes()[0])
                .rest("e", vec![f32(&[6]), f32(&[3, 6])])
                .op("m", MatMul { epilogue: vec![Step::Add(0), Step::Silu, Step::Mul(1)], packed: String::new() });
            plain.chain([with_epilogue]).collect()
        },
    },
    rule! {
        /// `(xs xq) w^T = xs (xq w^T)`: the scale of a token, or of all of them, is a factor of its row.
        "tokens-into-qmatmul", Exact,
        "(qmatmul:m (dequantize:d ?q ?xs none) ?w ?s ?z none ?e*)" => "(qmatmul ?q ?w ?s ?z ?xs ?e*)",
        root: product_of_rows,
        samples: || {
            let rows = |s: Sample| {
                s.value("q", TensorTy::fixed(ElemTy::Q(DYNAMIC_INT8), &[3, 12])).value("xs", f32(&[3, 1]))
            };
            let ints = schemes().into_iter().filter(|s| s.format.is_int());
            let plain = ints.map(|s| weight(rows(Sample::new()), s));
            let with_epilogue = weight(rows(Sample::new()), schemes()[2])
                .rest("e", vec![f32(&[6])])
                .op("m", QMatMul { epilogue: vec![Step::Gelu, Step::Add(0)], packed: String::new() });
            let one = Scheme { group: Group::Tensor, ..DYNAMIC_INT8 };
            let one = Sample::new().value("q", TensorTy::fixed(ElemTy::Q(one), &[3, 12])).value("xs", f32(&[1, 1]));
            plain.chain([with_epilogue, weight(one, schemes()[3])]).collect()
        },
    },
];
