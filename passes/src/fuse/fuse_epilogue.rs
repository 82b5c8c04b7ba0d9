//! What follows a product, done before its sums are stored.

use crate::pass::prelude::*;
use crate::rule;
use crate::saturate::{self, Limits, Match, Rule, Sample};
use quantc_ir::formats;
use quantc_ir::ops::{Gelu, MatMul, QMatMul, Step};
use quantc_ir::scheme::{Group, Scheme, Zero};

pass! {
    /// Takes what follows a product into the product.
    ///
    /// `add` (of a bias row or of a whole tensor, such as a residual), `mul`, `silu`, `gelu`, `relu` and `tanh` become
    /// steps of the `epilogue` of the `matmul` or `qmatmul` before them, in the order in which they were, as long as
    /// nothing else reads what they read. A product takes at most four further operands. Where both operands of an `add`
    /// or `mul` are products, as in `silu(gate) * up`, the cheaper choice is taken; for equal prices the product with
    /// the activation.
    ///
    /// ```qir before
    /// %g = matmul %x, @gate
    /// %u = matmul %x, @up
    /// %a = silu %g
    /// %y = mul %a, %u
    /// ```
    /// ```qir after
    /// %u = matmul %x, @up
    /// %y = matmul %x, @gate, %u {epilogue=[silu, mul0]}
    /// ```
    "fuse-epilogue" => pub struct FuseEpilogue {
        /// Rounds of rewriting after which to stop.
        rounds: u32 = 16,
        /// Expressions kept at one time after which to stop.
        nodes: u32 = 50000,
    }
    scope: Layer, numerics: Exact, stats: keeps
}

impl Pass for FuseEpilogue {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        saturate::run(self, cx, RULES, Limits { rounds: self.rounds, nodes: self.nodes })
    }
}

/// Operands of an epilogue that kernels take.
const MOST_EXTRAS: usize = 4;

/// The product `m`, which nothing else reads, with one more step. `make` gets the number of the next operand.
fn with_step(m: &Match<'_>, make: impl FnOnce(u8) -> Step) -> Option<Op> {
    if !m.is_read_once("m") || m.root_ty() != m.ty("m") {
        return None;
    }
    let step = make(u8::try_from(m.count("e")).ok()?);
    if let Some(product) = m.op::<MatMul>("m") {
        let mut epilogue = product.epilogue.clone();
        epilogue.push(step);
        return product.packed.is_empty().then(|| MatMul { epilogue, packed: String::new() }.into());
    }
    let product: &QMatMul = m.op("m")?;
    let mut epilogue = product.epilogue.clone();
    epilogue.push(step);
    product.packed.is_empty().then(|| QMatMul { epilogue, packed: String::new() }.into())
}

/// As [`with_step`], for a step that reads the operand `b`: a row for all, or a row for each.
fn with_operand(m: &Match<'_>, make: fn(u8) -> Step) -> Option<Op> {
    let (out, b) = (m.root_ty()?, m.ty("b")?);
    let whole = b.shape == out.shape;
    let row = b.shape.0.len() == 1 && b.shape.last() == out.shape.last();
    if !b.elem.is_float() || !(whole || row) || m.count("e") >= MOST_EXTRAS {
        return None;
    }
    with_step(m, make)
}

fn with_gelu(m: &Match<'_>) -> Option<Op> {
    let gelu: &Gelu = m.op("f")?;
    with_step(m, |_| if gelu.approx { Step::GeluTanh } else { Step::Gelu })
}

fn f32(dims: &[u64]) -> TensorTy {
    TensorTy::fixed(ElemTy::F32, dims)
}

/// Operands of a product: of floats, or quantized.
fn operands(quantized: bool) -> Sample {
    let sample = Sample::new().value("x", f32(&[3, 8]));
    if !quantized {
        return sample.value("w", f32(&[5, 8]));
    }
    let scheme = Scheme {
        format: &formats::INT4,
        group: Group::Block { axis: 1, size: 4 },
        zero: Zero::Symmetric,
        scale: Float::F32,
    };
    sample.value("w", TensorTy::fixed(ElemTy::Q(scheme), &[5, 8])).value("s", f32(&[5, 2]))
}

/// The same, behind an epilogue.
fn behind_steps(quantized: bool) -> Sample {
    let epilogue = vec![Step::Add(0), Step::Tanh, Step::Mul(1)];
    let op: Op = match quantized {
        false => MatMul { epilogue, packed: String::new() }.into(),
        true => QMatMul { epilogue, packed: String::new() }.into(),
    };
    operands(quantized).rest("e", vec![f32(&[5]), f32(&[3, 5])]).op("m", op)
}

fn unary(quantized: bool) -> Vec<Sample> {
    vec![operands(quantized), behind_steps(quantized)]
}

fn binary(quantized: bool) -> Vec<Sample> {
    let b = |s: Sample, dims: &[u64]| s.value("b", f32(dims));
    vec![b(operands(quantized), &[5]), b(operands(quantized), &[3, 5]), b(behind_steps(quantized), &[3, 5])]
}

fn gelus(quantized: bool) -> Vec<Sample> {
    let both = |s: Sample| [s.clone(), s.op("f", Gelu { approx: true })];
    unary(quantized).into_iter().flat_map(both).collect()
}

/// Rules over products and what follows them.
pub static RULES: &[Rule] = &[
    rule! {
        /// `p + b = p then +b`.
        "add-after-matmul", Exact,
        "(add (matmul:m ?x ?w ?e*) ?b)" => "(matmul ?x ?w ?e* ?b)",
        root: |m| with_operand(m, Step::Add), samples: || binary(false),
    },
    rule! {
        /// `b + p = p then +b`.
        "add-before-matmul", Exact,
        "(add ?b (matmul:m ?x ?w ?e*))" => "(matmul ?x ?w ?e* ?b)",
        root: |m| with_operand(m, Step::Add), samples: || binary(false),
    },
    rule! {
        /// `p * b = p then *b`.
        "mul-after-matmul", Exact,
        "(mul (matmul:m ?x ?w ?e*) ?b)" => "(matmul ?x ?w ?e* ?b)",
        root: |m| with_operand(m, Step::Mul), samples: || binary(false),
    },
    rule! {
        /// `b * p = p then *b`.
        "mul-before-matmul", Exact,
        "(mul ?b (matmul:m ?x ?w ?e*))" => "(matmul ?x ?w ?e* ?b)",
        root: |m| with_operand(m, Step::Mul), samples: || binary(false),
    },
    rule! {
        /// `silu(p) = p then silu`.
        "silu-of-matmul", Exact,
        "(silu (matmul:m ?x ?w ?e*))" => "(matmul ?x ?w ?e*)",
        root: |m| with_step(m, |_| Step::Silu), samples: || unary(false),
    },
    rule! {
        /// `gelu(p) = p then gelu`, in the same form.
        "gelu-of-matmul", Exact,
        "(gelu:f (matmul:m ?x ?w ?e*))" => "(matmul ?x ?w ?e*)",
        root: with_gelu, samples: || gelus(false),
    },
    rule! {
        /// `relu(p) = p then relu`.
        "relu-of-matmul", Exact,
        "(relu (matmul:m ?x ?w ?e*))" => "(matmul ?x ?w ?e*)",
        root: |m| with_step(m, |_| Step::Relu), samples: || unary(false),
    },
    rule! {
        /// `tanh(p) = p then tanh`.
        "tanh-of-matmul", Exact,
        "(tanh (matmul:m ?x ?w ?e*))" => "(matmul ?x ?w ?e*)",
        root: |m| with_step(m, |_| Step::Tanh), samples: || unary(false),
    },
    rule! {
        /// `p + b = p then +b`.
        "add-after-qmatmul", Exact,
        "(add (qmatmul:m ?x ?w ?s ?z ?xs ?e*) ?b)" => "(qmatmul ?x ?w ?s ?z ?xs ?e* ?b)",
        root: |m| with_operand(m, Step::Add), samples: || binary(true),
    },
    rule! {
        /// `b + p = p then +b`.
        "add-before-qmatmul", Exact,
        "(add ?b (qmatmul:m ?x ?w ?s ?z ?xs ?e*))" => "(qmatmul ?x ?w ?s ?z ?xs ?e* ?b)",
        root: |m| with_operand(m, Step::Add), samples: || binary(true),
    },
    rule! {
        /// `p * b = p then *b`.
        "mul-after-qmatmul", Exact,
        "(mul (qmatmul:m ?x ?w ?s ?z ?xs ?e*) ?b)" => "(qmatmul ?x ?w ?s ?z ?xs ?e* ?b)",
        root: |m| with_operand(m, Step::Mul), samples: || binary(true),
    },
    rule! {
        /// `b * p = p then *b`.
        "mul-before-qmatmul", Exact,
        "(mul ?b (qmatmul:m ?x ?w ?s ?z ?xs ?e*))" => "(qmatmul ?x ?w ?s ?z ?xs ?e* ?b)",
        root: |m| with_operand(m, Step::Mul), samples: || binary(true),
    },
    rule! {
        /// `silu(p) = p then silu`.
        "silu-of-qmatmul", Exact,
        "(silu (qmatmul:m ?x ?w ?s ?z ?xs ?e*))" => "(qmatmul ?x ?w ?s ?z ?xs ?e*)",
        root: |m| with_step(m, |_| Step::Silu), samples: || unary(true),
    },
    rule! {
        /// `gelu(p) = p then gelu`, in the same form.
        "gelu-of-qmatmul", Exact,
        "(gelu:f (qmatmul:m ?x ?w ?s ?z ?xs ?e*))" => "(qmatmul ?x ?w ?s ?z ?xs ?e*)",
        root: with_gelu, samples: || gelus(true),
    },
    rule! {
        /// `relu(p) = p then relu`.
        "relu-of-qmatmul", Exact,
        "(relu (qmatmul:m ?x ?w ?s ?z ?xs ?e*))" => "(qmatmul ?x ?w ?s ?z ?xs ?e*)",
        root: |m| with_step(m, |_| Step::Relu), samples: || unary(true),
    },
    rule! {
        /// `tanh(p) = p then tanh`.
        "tanh-of-qmatmul", Exact,
        "(tanh (qmatmul:m ?x ?w ?s ?z ?xs ?e*))" => "(qmatmul ?x ?w ?s ?z ?xs ?e*)",
        root: |m| with_step(m, |_| Step::Tanh), samples: || unary(true),
    },
];
