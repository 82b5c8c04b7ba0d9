//! Functions of one or a few numbers, element by element.

use super::{Results, one};
use crate::onnx::build::Val;
use crate::onnx::node::Cx;
use crate::onnx::tensor;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::{BinaryKind as B, Cast, Gelu, Order, Relu, Silu, Tanh, UnaryKind as U};
use quantc_ir::ty::ElemTy;

onnx_ops! {
    "" "Abs" since 6 => |cx| unary(cx, U::Abs);
    "" "Acos" since 7 => |cx| unary(cx, U::Acos);
    "" "Acosh" since 9 => |cx| unary(cx, U::Acosh);
    "" "Add" since 7 => |cx| one(pair(cx).and_then(|(a, b)| cx.add(&a, &b)));
    "" "And" since 7 => |cx| binary(cx, B::And);
    "" "Asin" since 7 => |cx| unary(cx, U::Asin);
    "" "Asinh" since 9 => |cx| unary(cx, U::Asinh);
    "" "Atan" since 7 => |cx| unary(cx, U::Atan);
    "" "Atanh" since 9 => |cx| unary(cx, U::Atanh);
    "" "BitShift" since 11 => bit_shift;
    "" "BitwiseAnd" since 18 => |cx| binary(cx, B::And);
    "" "BitwiseNot" since 18 => |cx| unary(cx, U::BitNot);
    "" "BitwiseOr" since 18 => |cx| binary(cx, B::Or);
    "" "BitwiseXor" since 18 => |cx| binary(cx, B::Xor);
    "" "Cast" since 6 => cast;
    "" "CastLike" since 15 => cast_like;
    "" "Ceil" since 6 => |cx| unary(cx, U::Ceil);
    "" "Celu" since 12 => celu;
    "" "Clip" since 6 => clip;
    "" "Cos" since 7 => |cx| unary(cx, U::Cos);
    "" "Cosh" since 9 => |cx| unary(cx, U::Cosh);
    "" "Div" since 7 => |cx| binary(cx, B::Div);
    "" "Elu" since 6 => elu;
    "" "Equal" since 7 => |cx| compare(cx, Order::Equal, false);
    "" "Erf" since 9 => |cx| unary(cx, U::Erf);
    "" "Exp" since 6 => |cx| unary(cx, U::Exp);
    "" "Floor" since 6 => |cx| unary(cx, U::Floor);
    "" "Gelu" since 20 => gelu;
    "" "Greater" since 7 => |cx| compare(cx, Order::Less, true);
    "" "GreaterOrEqual" since 12 => |cx| compare(cx, Order::LessEqual, true);
    "" "HardSigmoid" since 6 => hard_sigmoid;
    "" "HardSwish" since 14 => hard_swish;
    "" "IsInf" since 10 => is_inf;
    "" "IsNaN" since 9 => |cx| unary(cx, U::IsNan);
    "" "LeakyRelu" since 6 => leaky_relu;
    "" "Less" since 7 => |cx| compare(cx, Order::Less, false);
    "" "LessOrEqual" since 12 => |cx| compare(cx, Order::LessEqual, false);
    "" "Log" since 6 => |cx| unary(cx, U::Log);
    "" "Max" since 8 => |cx| many(cx, |cx, a, b| cx.binary(B::Max, a, b));
    "" "Mean" since 8 => mean;
    "" "Min" since 8 => |cx| many(cx, |cx, a, b| cx.binary(B::Min, a, b));
    "" "Mish" since 18 => mish;
    "" "Mod" since 10 => modulo;
    "" "Mul" since 7 => |cx| one(pair(cx).and_then(|(a, b)| cx.mul(&a, &b)));
    "" "Neg" since 6 => |cx| unary(cx, U::Neg);
    "" "Not" since 1 => |cx| unary(cx, U::Not);
    "" "Or" since 7 => |cx| binary(cx, B::Or);
    "" "PRelu" since 7 => prelu;
    "" "Pow" since 7 => pow;
    "" "Reciprocal" since 6 => |cx| unary(cx, U::Reciprocal);
    "" "Relu" since 6 => relu;
    "" "Round" since 11 => |cx| unary(cx, U::Round);
    "" "Selu" since 6 => selu;
    "" "Shrink" since 9 => shrink;
    "" "Sigmoid" since 6 => |cx| unary(cx, U::Sigmoid);
    "" "Sign" since 9 => |cx| unary(cx, U::Sign);
    "" "Sin" since 7 => |cx| unary(cx, U::Sin);
    "" "Sinh" since 9 => |cx| unary(cx, U::Sinh);
    "" "Softplus" since 1 => |cx| unary(cx, U::Softplus);
    "" "Softsign" since 1 => softsign;
    "" "Sqrt" since 6 => |cx| unary(cx, U::Sqrt);
    "" "Sub" since 7 => |cx| binary(cx, B::Sub);
    "" "Sum" since 8 => |cx| many(cx, |cx, a, b| cx.add(a, b));
    "" "SwiGLU" since 27 => swiglu;
    "" "Swish" since 24 => swish;
    "" "Tan" since 7 => |cx| unary(cx, U::Tan);
    "" "Tanh" since 6 => tanh;
    "" "ThresholdedRelu" since 10 => thresholded_relu;
    "" "Where" since 9 => select;
    "" "Xor" since 7 => |cx| binary(cx, B::Xor);
    "com.microsoft" "FastGelu" since 1 => fast_gelu;
    "com.microsoft" "BiasGelu" since 1 => bias_gelu;
    "com.microsoft" "Gelu" since 1 => gelu;
    "com.microsoft" "QuickGelu" since 1 => quick_gelu;
}

fn pair(cx: &Cx<'_, '_>) -> Result<(Val, Val)> {
    Ok((cx.input(0)?, cx.input(1)?))
}

fn unary(cx: &mut Cx<'_, '_>, kind: U) -> Results {
    let x = cx.input(0)?;
    one(cx.unary(kind, &x))
}

fn binary(cx: &mut Cx<'_, '_>, kind: B) -> Results {
    let (a, b) = pair(cx)?;
    one(cx.binary(kind, &a, &b))
}

fn compare(cx: &mut Cx<'_, '_>, order: Order, swapped: bool) -> Results {
    let (a, b) = pair(cx)?;
    one(if swapped { cx.compare(order, &b, &a) } else { cx.compare(order, &a, &b) })
}

/// One operator applied to any number of operands from left to right.
fn many(cx: &mut Cx<'_, '_>, f: fn(&mut Cx<'_, '_>, &Val, &Val) -> Result<Val>) -> Results {
    let all = cx.all()?;
    let mut acc = all.first().cloned().ok_or_else(|| Diag::input("input 0 is missing"))?;
    for next in &all[1..] {
        acc = f(cx, &acc, next)?;
    }
    one(Ok(acc))
}

fn mean(cx: &mut Cx<'_, '_>) -> Results {
    let n = cx.inputs.len();
    let sum = many(cx, |cx, a, b| cx.add(a, b))?.remove(0);
    let sum = sum.ok_or_else(|| Diag::bug("a sum is missing"))?;
    let count = cx.scalar(cx.ty(&sum).elem, n as f64)?;
    one(cx.div(&sum, &count))
}

fn select(cx: &mut Cx<'_, '_>) -> Results {
    let (cond, a, b) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    one(cx.select(&cond, &a, &b))
}

fn bit_shift(cx: &mut Cx<'_, '_>) -> Results {
    let kind = match cx.text("direction", "")?.as_str() {
        "LEFT" => B::Shl,
        "RIGHT" => B::Shr,
        other => return Err(Diag::input(format!("attribute `direction` is `{other}`, expected LEFT or RIGHT"))),
    };
    binary(cx, kind)
}

fn cast(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let to = cx.int("to")?.ok_or_else(|| Diag::input("attribute `to` is missing"))?;
    let to = tensor::elem(to)?;
    cast_to(cx, x, to)
}

fn cast_like(cx: &mut Cx<'_, '_>) -> Results {
    let (x, like) = pair(cx)?;
    let to = cx.ty(&like).elem;
    cast_to(cx, x, to)
}

fn cast_to(cx: &mut Cx<'_, '_>, mut x: Val, to: ElemTy) -> Results {
    let saturate = cx.flag("saturate", true)?;
    let round = cx.text("round_mode", "up")?;
    if to.bare_format().is_some_and(|f| f.name == "e8m0") && cx.ty(&x).elem.is_real() {
        let text = format!("numbers are cast to float8e8m0 and rounded `{round}`, which is not supported");
        return Err(Diag::input(text));
    }
    if cx.ty(&x).elem == to {
        return one(Ok(x));
    }
    // As another type they are numbers, not extents: what reads them as extents refuses them.
    if let Val::Extents { dims, scalar } = x {
        x = cx.counted(&dims, scalar)?;
    }
    one(cx.op(Cast { to, saturate }, &[&x]))
}

fn clip(cx: &mut Cx<'_, '_>) -> Results {
    let mut x = cx.input(0)?;
    let elem = cx.ty(&x).elem;
    let (low, high) = match cx.opset {
        ..11 => {
            let bound = |cx: &mut Cx<'_, '_>, name| -> Result<Option<Val>> {
                cx.opt_float(name)?.map(|b| cx.scalar(elem, b)).transpose()
            };
            (bound(cx, "min")?, bound(cx, "max")?)
        }
        _ => (cx.opt(1), cx.opt(2)),
    };
    if let Some(low) = low {
        x = cx.binary(B::Max, &x, &low)?;
    }
    if let Some(high) = high {
        x = cx.binary(B::Min, &x, &high)?;
    }
    one(Ok(x))
}

/// `if x < 0 then below else x`.
fn below_zero(cx: &mut Cx<'_, '_>, x: &Val, below: &Val) -> Result<Val> {
    let zero = cx.scalar(cx.ty(x).elem, 0.0)?;
    let negative = cx.compare(Order::Less, x, &zero)?;
    cx.select(&negative, below, x)
}

/// `exp(x) - 1`.
fn exp_minus_one(cx: &mut Cx<'_, '_>, x: &Val) -> Result<Val> {
    let e = cx.unary(U::Exp, x)?;
    cx.shift(&e, -1.0)
}

fn elu(cx: &mut Cx<'_, '_>) -> Results {
    let (x, alpha) = (cx.input(0)?, cx.float("alpha", 1.0)?);
    let e = exp_minus_one(cx, &x)?;
    let below = cx.scale(&e, alpha)?;
    one(below_zero(cx, &x, &below))
}

fn selu(cx: &mut Cx<'_, '_>) -> Results {
    let (x, alpha) = (cx.input(0)?, cx.float("alpha", 1.673_263_2)?);
    let gamma = cx.float("gamma", 1.050_701)?;
    let e = exp_minus_one(cx, &x)?;
    let below = cx.scale(&e, alpha)?;
    let y = below_zero(cx, &x, &below)?;
    one(cx.scale(&y, gamma))
}

fn celu(cx: &mut Cx<'_, '_>) -> Results {
    let (x, alpha) = (cx.input(0)?, cx.float("alpha", 1.0)?);
    let inner = cx.scale(&x, 1.0 / alpha)?;
    let e = exp_minus_one(cx, &inner)?;
    let below = cx.scale(&e, alpha)?;
    one(below_zero(cx, &x, &below))
}

fn leaky_relu(cx: &mut Cx<'_, '_>) -> Results {
    let (x, alpha) = (cx.input(0)?, cx.float("alpha", 0.01)?);
    let below = cx.scale(&x, alpha)?;
    one(below_zero(cx, &x, &below))
}

fn prelu(cx: &mut Cx<'_, '_>) -> Results {
    let (x, slope) = pair(cx)?;
    let below = cx.mul(&x, &slope)?;
    one(below_zero(cx, &x, &below))
}

fn relu(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    if cx.ty(&x).elem.is_real() {
        return one(cx.op(Relu {}, &[&x]));
    }
    let zero = cx.scalar(cx.ty(&x).elem, 0.0)?;
    one(cx.binary(B::Max, &x, &zero))
}

fn thresholded_relu(cx: &mut Cx<'_, '_>) -> Results {
    let (x, alpha) = (cx.input(0)?, cx.float("alpha", 1.0)?);
    let elem = cx.ty(&x).elem;
    let (alpha, zero) = (cx.scalar(elem, alpha)?, cx.scalar(elem, 0.0)?);
    let above = cx.compare(Order::Less, &alpha, &x)?;
    one(cx.select(&above, &x, &zero))
}

fn shrink(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let (bias, lambda) = (cx.float("bias", 0.0)?, cx.float("lambd", 0.5)?);
    let elem = cx.ty(&x).elem;
    // Integers are shrunk as the numbers they are, and cut again.
    let real = if elem.is_real() { x } else { cx.cast(&x, ElemTy::F32)? };
    let wide = cx.ty(&real).elem;
    let (low, high, zero) = (cx.scalar(wide, -lambda)?, cx.scalar(wide, lambda)?, cx.scalar(wide, 0.0)?);
    let (below, above) = (cx.compare(Order::Less, &real, &low)?, cx.compare(Order::Less, &high, &real)?);
    let (up, down) = (cx.shift(&real, bias)?, cx.shift(&real, -bias)?);
    let inner = cx.select(&above, &down, &zero)?;
    let y = cx.select(&below, &up, &inner)?;
    one(cx.cast(&y, elem))
}

fn hard_sigmoid_of(cx: &mut Cx<'_, '_>, x: &Val, alpha: f64, beta: f64) -> Result<Val> {
    let scaled = cx.scale(x, alpha)?;
    let y = cx.shift(&scaled, beta)?;
    let elem = cx.ty(x).elem;
    let (zero, one) = (cx.scalar(elem, 0.0)?, cx.scalar(elem, 1.0)?);
    let y = cx.binary(B::Min, &y, &one)?;
    cx.binary(B::Max, &y, &zero)
}

fn hard_sigmoid(cx: &mut Cx<'_, '_>) -> Results {
    let (x, alpha, beta) = (cx.input(0)?, cx.float("alpha", 0.2)?, cx.float("beta", 0.5)?);
    one(hard_sigmoid_of(cx, &x, alpha, beta))
}

fn hard_swish(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let gate = hard_sigmoid_of(cx, &x, 1.0 / 6.0, 0.5)?;
    one(cx.mul(&x, &gate))
}

fn mish(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let soft = cx.unary(U::Softplus, &x)?;
    let gate = cx.op(Tanh {}, &[&soft])?;
    one(cx.mul(&x, &gate))
}

fn swish(cx: &mut Cx<'_, '_>) -> Results {
    let (x, alpha) = (cx.input(0)?, cx.float("alpha", 1.0)?);
    if alpha == 1.0 {
        return one(cx.op(Silu {}, &[&x]));
    }
    one(gated(cx, &x, alpha))
}

/// `x * sigmoid(alpha * x)`.
fn gated(cx: &mut Cx<'_, '_>, x: &Val, alpha: f64) -> Result<Val> {
    let inner = cx.scale(x, alpha)?;
    let gate = cx.unary(U::Sigmoid, &inner)?;
    cx.mul(x, &gate)
}

fn swiglu(cx: &mut Cx<'_, '_>) -> Results {
    let (a, b) = pair(cx)?;
    let alpha = cx.float("alpha", 1.0)?;
    if cx.ty(&a) != cx.ty(&b) {
        return Err(Diag::input(format!("inputs of types {} and {} differ", cx.ty(&a), cx.ty(&b))));
    }
    let gate = if alpha == 1.0 { cx.op(Silu {}, &[&a])? } else { gated(cx, &a, alpha)? };
    one(cx.mul(&gate, &b))
}

fn quick_gelu(cx: &mut Cx<'_, '_>) -> Results {
    let (x, alpha) = (cx.input(0)?, cx.float("alpha", 1.702)?);
    one(gated(cx, &x, alpha))
}

fn gelu(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let approx = match cx.text("approximate", "none")?.as_str() {
        "none" => false,
        "tanh" => true,
        other => return Err(Diag::input(format!("attribute `approximate` is `{other}`"))),
    };
    one(cx.op(Gelu { approx }, &[&x]))
}

fn fast_gelu(cx: &mut Cx<'_, '_>) -> Results {
    let mut x = cx.input(0)?;
    if let Some(bias) = cx.opt(1) {
        x = cx.add(&x, &bias)?;
    }
    one(cx.op(Gelu { approx: true }, &[&x]))
}

fn bias_gelu(cx: &mut Cx<'_, '_>) -> Results {
    let (x, bias) = pair(cx)?;
    let x = cx.add(&x, &bias)?;
    one(cx.op(Gelu { approx: false }, &[&x]))
}

fn softsign(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let size = cx.unary(U::Abs, &x)?;
    let below = cx.shift(&size, 1.0)?;
    one(cx.div(&x, &below))
}

fn tanh(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    one(cx.op(Tanh {}, &[&x]))
}

fn is_inf(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    match (cx.flag("detect_negative", true)?, cx.flag("detect_positive", true)?) {
        (true, true) => one(cx.unary(U::IsInf, &x)),
        (true, false) => one(cx.unary(U::IsNegInf, &x)),
        (false, true) => one(cx.unary(U::IsPosInf, &x)),
        (false, false) => {
            let never = cx.scalar(ElemTy::BOOL, 0.0)?;
            let dims = cx.dims(&x);
            one(cx.expand(&never, dims))
        }
    }
}

fn modulo(cx: &mut Cx<'_, '_>) -> Results {
    let kind = if cx.flag("fmod", false)? { B::Rem } else { B::Mod };
    binary(cx, kind)
}

fn pow(cx: &mut Cx<'_, '_>) -> Results {
    let (a, b) = pair(cx)?;
    let (base, exponent) = (cx.ty(&a).elem, cx.ty(&b).elem);
    if base == exponent {
        return one(cx.binary(B::Pow, &a, &b));
    }
    // Elements differ: the result has those of the base.
    let wide = if base.is_real() || exponent.is_real() { ElemTy::F64 } else { ElemTy::I64 };
    let (a, b) = (cx.cast(&a, wide)?, cx.cast(&b, wide)?);
    let y = cx.binary(B::Pow, &a, &b)?;
    one(cx.cast(&y, base))
}
