//! Runs expressions in Rust: the reference that emitted code is compared with.
use super::{BinaryOp, EExpr, ExprError, InputKind, MemTy, Node, OutputKind, Place, ReduceOp, UnaryOp};
use crate::cpu::math::{self, Lanes, Scalar};
use quantc_ir::formats::E4M3;

/// How numbers are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// In f64, from the definitions. Stores round to integers where the output is integer, and not at all otherwise.
    F64,
    /// In f32, with the very operations that kernels use, and stores rounded to the type of the output. Only sums
    /// over rows may differ from a kernel's: here they are in f64, rounded once.
    F32 {
        /// Whether multiply-adds round once.
        fused: bool,
    },
}

/// What an expression is run on.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Number of rows.
    pub rows: usize,
    /// Columns of a row.
    pub cols: usize,
    /// The inputs, widened to f32, with the strides their descriptions give.
    pub inputs: &'a [&'a [f32]],
    /// The sums of the matmul's products one after the other, `rows * cols` values each, when the expression is an
    /// epilogue.
    pub acc: Option<&'a [f32]>,
}

/// Runs `e` and gives the contents of its outputs; what is not written is NaN.
pub fn run(e: &EExpr, mode: Mode, on: Rows<'_>) -> Result<Vec<Vec<f64>>, ExprError> {
    let place = match on.acc {
        Some(_) => Place::Epilogue,
        None => Place::Row { cols: on.cols as u32 },
    };
    e.check(place)?;
    if on.inputs.len() != e.inputs.len() {
        return Err(ExprError(format!("it has {} inputs, not {}", e.inputs.len(), on.inputs.len())));
    }
    let mut outputs: Vec<Vec<f64>> = e
        .outputs
        .iter()
        .map(|desc| {
            let per_row = match desc.kind {
                OutputKind::Elem { stride, .. } | OutputKind::GroupSums { stride, .. } => stride as usize,
                OutputKind::Row => 1,
            };
            vec![f64::NAN; on.rows * per_row]
        })
        .collect();
    for row in 0..on.rows {
        let values = eval_row(e, mode, on, row)?;
        for store in &e.stores {
            let desc = e.outputs[store.output.0 as usize];
            let out = &mut outputs[store.output.0 as usize];
            let values = &values[store.node.0 as usize];
            match desc.kind {
                OutputKind::Elem { stride, zero_pad } => {
                    let at = row * stride as usize;
                    let pad = std::iter::repeat_n(0.0, zero_pad as usize);
                    let stored = values.iter().map(|&v| stored(v, desc.ty, mode)).chain(pad);
                    for (i, v) in stored.enumerate() {
                        let Some(slot) = out.get_mut(at + i) else {
                            return Err(ExprError(
                                "an output row is narrower than what it is to hold".to_owned(),
                            ));
                        };
                        *slot = v;
                    }
                }
                OutputKind::Row => out[row] = stored(values[0], desc.ty, mode),
                OutputKind::GroupSums { group, stride } => {
                    let sums =
                        values.chunks(group as usize).map(|g| g.iter().map(|&v| to_i8(v)).sum::<f64>());
                    for (slot, sum) in out[row * stride as usize..].iter_mut().zip(sums) {
                        *slot = sum;
                    }
                }
            }
        }
    }
    Ok(outputs)
}

fn eval_row(e: &EExpr, mode: Mode, on: Rows<'_>, row: usize) -> Result<Vec<Vec<f64>>, ExprError> {
    let mut values: Vec<Vec<f64>> = Vec::with_capacity(e.nodes.len());
    for node in &e.nodes {
        let input = |id: super::InputId, at: usize| {
            let found = on.inputs[id.0 as usize].get(at).map(|&v| v as f64);
            found.ok_or_else(|| ExprError(format!("input {} ends before element {at}", id.0)))
        };
        let elem = |id: super::InputId, offset: u32| {
            let stride = match e.inputs[id.0 as usize].kind {
                InputKind::Elem { stride } => stride as usize,
                InputKind::Col | InputKind::Row | InputKind::One => 0,
            };
            (0..on.cols).map(|c| input(id, row * stride + c + offset as usize)).collect::<Result<Vec<_>, _>>()
        };
        let of = |id: super::NodeId| &values[id.0 as usize];
        let value = match *node {
            Node::Acc(product) => {
                let at = (usize::from(product) * on.rows + row) * on.cols;
                let acc = on.acc.and_then(|acc| acc.get(at..at + on.cols));
                let acc = acc.ok_or_else(|| ExprError("the accumulator is too short".to_owned()))?;
                acc.iter().map(|&v| v as f64).collect()
            }
            Node::Elem(id) => elem(id, 0)?,
            Node::ElemAt { input, col_offset } => elem(input, col_offset)?,
            Node::Col(id) => (0..on.cols).map(|c| input(id, c)).collect::<Result<_, _>>()?,
            Node::Row(id) => {
                let at = if e.inputs[id.0 as usize].kind == InputKind::One { 0 } else { row };
                vec![input(id, at)?; on.cols]
            }
            Node::Const(v) => vec![v.get() as f64; on.cols],
            Node::Unary(op, a) => of(a).iter().map(|&a| unary(op, a, mode)).collect(),
            Node::Binary(op, a, b) => {
                of(a).iter().zip(of(b)).map(|(&a, &b)| binary(op, a, b, mode)).collect()
            }
            Node::Fma(a, b, c) => {
                let ab = of(a).iter().zip(of(b));
                ab.zip(of(c)).map(|((&a, &b), &c)| fma(a, b, c, mode)).collect()
            }
            Node::Reduce(op, a) => {
                let r = match op {
                    ReduceOp::Sum => of(a).iter().sum(),
                    ReduceOp::Max => of(a).iter().fold(f64::NEG_INFINITY, |m, &v| if v > m { v } else { m }),
                    ReduceOp::AbsMax => of(a).iter().fold(0.0, |m, &v| if v.abs() > m { v.abs() } else { m }),
                };
                let r = if mode == Mode::F64 { r } else { r as f32 as f64 };
                vec![r; on.cols]
            }
        };
        values.push(value);
    }
    Ok(values)
}

fn unary(op: UnaryOp, x: f64, mode: Mode) -> f64 {
    match mode {
        Mode::F64 => unary_f64(op, x),
        Mode::F32 { fused } => unary_lanes(&mut Scalar { fused }, op, x as f32) as f64,
    }
}

fn unary_f64(op: UnaryOp, x: f64) -> f64 {
    match op {
        UnaryOp::Neg => -x,
        UnaryOp::Abs => x.abs(),
        UnaryOp::Exp => x.exp(),
        UnaryOp::Silu => x / (1.0 + (-x).exp()),
        // 1 + erf(y) = erfc(-y), which does not cancel.
        UnaryOp::GeluErf => 0.5 * x * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2),
        // 0.5 (1 + tanh u) = 1 / (1 + exp(-2u))
        UnaryOp::GeluTanh => {
            let u = std::f64::consts::FRAC_2_PI.sqrt() * (x + 0.044715 * x * x * x);
            x / (1.0 + (-2.0 * u).exp())
        }
        UnaryOp::Tanh => x.tanh(),
        UnaryOp::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        UnaryOp::Sqrt => x.sqrt(),
        UnaryOp::Rsqrt => 1.0 / x.sqrt(),
        UnaryOp::Rcp => 1.0 / x,
        UnaryOp::Relu if x < 0.0 => 0.0,
        UnaryOp::Relu => x,
        UnaryOp::Round => x.round_ties_even(),
        UnaryOp::OneIfZero if x == 0.0 => 1.0,
        UnaryOp::OneIfZero => x,
        UnaryOp::RoundE4m3 => f64::from(E4M3.decode(E4M3.encode(x as f32))),
    }
}

/// A unary operation on lanes: what every f32 lowering for CPUs does.
pub fn unary_lanes<L: Lanes>(l: &mut L, op: UnaryOp, x: L::V) -> L::V {
    match op {
        UnaryOp::Neg => l.neg(x),
        UnaryOp::Abs => l.abs(x),
        UnaryOp::Exp => math::exp(l, x),
        UnaryOp::Silu => math::silu(l, x),
        UnaryOp::GeluErf => math::gelu_erf(l, x),
        UnaryOp::GeluTanh => math::gelu_tanh(l, x),
        UnaryOp::Tanh => math::tanh(l, x),
        UnaryOp::Sigmoid => math::sigmoid(l, x),
        UnaryOp::Sqrt => l.sqrt(x),
        UnaryOp::Rsqrt => {
            let (one, root) = (l.constant(1.0), l.sqrt(x));
            l.div(one, root)
        }
        UnaryOp::Rcp => {
            let one = l.constant(1.0);
            l.div(one, x)
        }
        UnaryOp::Relu => {
            let zero = l.constant(0.0);
            l.select_lt(x, zero, zero, x)
        }
        UnaryOp::Round => l.round(x),
        UnaryOp::OneIfZero => {
            // Zero is what is neither below nor above it; NaN is neither too, and stays by the outer choice.
            let (zero, one) = (l.constant(0.0), l.constant(1.0));
            let size = l.abs(x);
            let inf = l.constant(f32::INFINITY);
            let finite = l.select_lt(zero, size, x, one);
            l.select_lt(size, inf, finite, x)
        }
        UnaryOp::RoundE4m3 => l.round_e4m3(x),
    }
}

fn binary(op: BinaryOp, a: f64, b: f64, mode: Mode) -> f64 {
    match mode {
        Mode::F64 => match op {
            BinaryOp::Add => a + b,
            BinaryOp::Sub => a - b,
            BinaryOp::Mul => a * b,
            BinaryOp::Div => a / b,
            BinaryOp::Min if a < b => a,
            BinaryOp::Max if a > b => a,
            BinaryOp::Min | BinaryOp::Max => b,
        },
        Mode::F32 { fused } => binary_lanes(&mut Scalar { fused }, op, a as f32, b as f32) as f64,
    }
}

/// A binary operation on lanes.
pub fn binary_lanes<L: Lanes>(l: &mut L, op: BinaryOp, a: L::V, b: L::V) -> L::V {
    match op {
        BinaryOp::Add => l.add(a, b),
        BinaryOp::Sub => l.sub(a, b),
        BinaryOp::Mul => l.mul(a, b),
        BinaryOp::Div => l.div(a, b),
        BinaryOp::Min => l.min(a, b),
        BinaryOp::Max => l.max(a, b),
    }
}

fn fma(a: f64, b: f64, c: f64, mode: Mode) -> f64 {
    match mode {
        Mode::F64 => a * b + c,
        Mode::F32 { fused } => Scalar { fused }.mul_add(a as f32, b as f32, c as f32) as f64,
    }
}

/// What a store leaves in memory.
fn stored(v: f64, ty: MemTy, mode: Mode) -> f64 {
    match (ty, mode) {
        (MemTy::I8, _) => to_i8(v),
        (MemTy::F16, Mode::F32 { .. }) => half::f16::from_f32(v as f32).to_f64(),
        (MemTy::Bf16, Mode::F32 { .. }) => half::bf16::from_f32(v as f32).to_f64(),
        _ => v,
    }
}

fn to_i8(v: f64) -> f64 {
    if v.is_nan() { 0.0 } else { v.round_ties_even().clamp(-128.0, 127.0) }
}
