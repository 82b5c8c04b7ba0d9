//! Elementwise functions of one number.

use super::{InferCx, OpSpec, elementwise};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{ElemTy, TensorTy};
use serde::{Deserialize, Serialize};

op! {
    /// Elementwise `y = kind(x)`.
    ///
    /// Floats are computed in f64 and rounded once. `abs`, `neg` and `sign` also take integers, `not` takes truth values
    /// and `bit-not` integers; `is-nan`, `is-inf` and its halves make truth values.
    "unary" => pub struct Unary (
        /// Input.
        x: One,
    ) {
        /// Which function.
        kind: UnaryKind = UnaryKind::Neg,
    }
}

/// Functions of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "they are what their names say, as in C's math library")]
pub enum UnaryKind {
    Abs,
    Acos,
    Acosh,
    Asin,
    Asinh,
    Atan,
    Atanh,
    BitNot,
    Ceil,
    Cos,
    Cosh,
    Erf,
    Exp,
    Floor,
    IsInf,
    IsNan,
    IsNegInf,
    IsPosInf,
    Log,
    Neg,
    Not,
    Reciprocal,
    /// To the nearest whole number, halfway cases to even.
    Round,
    Sigmoid,
    /// -1, 0 or 1.
    Sign,
    Sin,
    Sinh,
    /// `log(1 + exp(x))`.
    Softplus,
    Sqrt,
    Tan,
}

use UnaryKind as K;

impl OpSpec for Unary {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.number(0)?;
        let fits = match self.kind {
            K::Abs | K::Neg | K::Sign => x.elem != ElemTy::BOOL,
            K::Not => x.elem == ElemTy::BOOL,
            K::BitNot => x.elem.int().is_some() && x.elem != ElemTy::BOOL,
            _ => x.elem.is_real(),
        };
        if !fits {
            return Err(Diag::input(format!("operand 0 has type {x}, which `{:?}` does not take", self.kind)));
        }
        Ok(match self.kind {
            K::IsInf | K::IsNan | K::IsNegInf | K::IsPosInf => x.with_elem(ElemTy::BOOL),
            _ => x.clone(),
        })
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        if x.ty.elem.int().is_some() {
            let f = |v: i128| match self.kind {
                K::Abs => v.abs(),
                K::Sign => v.signum(),
                K::Not => i128::from(v == 0),
                K::BitNot => !v,
                _ => -v,
            };
            return Tensor::from_ints(out, x.ints().into_iter().map(f));
        }
        let holds: Option<fn(f64) -> bool> = match self.kind {
            K::IsInf => Some(f64::is_infinite),
            K::IsNan => Some(f64::is_nan),
            K::IsNegInf => Some(|v| v == f64::NEG_INFINITY),
            K::IsPosInf => Some(|v| v == f64::INFINITY),
            _ => None,
        };
        match holds {
            Some(holds) => Tensor::from_ints(out, x.reals().into_iter().map(|v| i128::from(holds(v)))),
            None => elementwise::map(x, out, |v| self.real(v)),
        }
    }
}

impl Unary {
    fn real(&self, x: f64) -> f64 {
        match self.kind {
            K::Abs => x.abs(),
            K::Acos => x.acos(),
            K::Acosh => x.acosh(),
            K::Asin => x.asin(),
            K::Asinh => x.asinh(),
            K::Atan => x.atan(),
            K::Atanh => x.atanh(),
            K::Ceil => x.ceil(),
            K::Cos => x.cos(),
            K::Cosh => x.cosh(),
            K::Erf => libm::erf(x),
            K::Exp => x.exp(),
            K::Floor => x.floor(),
            K::Log => x.ln(),
            K::Reciprocal => 1.0 / x,
            K::Round => x.round_ties_even(),
            K::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            K::Sign if x == 0.0 || x.is_nan() => x,
            K::Sign => x.signum(),
            K::Sin => x.sin(),
            K::Sinh => x.sinh(),
            // The two forms agree; the second does not overflow.
            K::Softplus if x > 30.0 => x + (-x).exp().ln_1p(),
            K::Softplus => x.exp().ln_1p(),
            K::Sqrt => x.sqrt(),
            K::Tan => x.tan(),
            K::Neg | K::Not | K::BitNot | K::IsInf | K::IsNan | K::IsNegInf | K::IsPosInf => -x,
        }
    }
}
