//! What a matmul does to its sums before it stores them.

use crate::diag::{Diag, Result};
use crate::eval::Tensor;
use crate::ty::{Dim, TensorTy};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// One step; operand numbers count the extra operands of the matmul.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Step {
    /// Adds an extra operand: one row for each row, or one row for all.
    Add(u8),
    /// Multiplies by an extra operand.
    Mul(u8),
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * Phi(x)`.
    Gelu,
    /// The tanh form of gelu.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `tanh(x)`.
    Tanh,
}

impl Step {
    /// The extra operand that the step reads.
    pub fn operand(self) -> Option<u8> {
        match self {
            Step::Add(i) | Step::Mul(i) => Some(i),
            _ => None,
        }
    }

    /// The step with its operand number moved by `by`.
    pub fn shifted(self, by: u8) -> Step {
        match self {
            Step::Add(i) => Step::Add(i + by),
            Step::Mul(i) => Step::Mul(i + by),
            other => other,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Add(i) => write!(f, "add{i}"),
            Step::Mul(i) => write!(f, "mul{i}"),
            Step::Silu => f.write_str("silu"),
            Step::Gelu => f.write_str("gelu"),
            Step::GeluTanh => f.write_str("gelu-tanh"),
            Step::Relu => f.write_str("relu"),
            Step::Tanh => f.write_str("tanh"),
        }
    }
}

impl From<Step> for String {
    fn from(step: Step) -> String {
        step.to_string()
    }
}

impl FromStr for Step {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Step, String> {
        let fixed = [Step::Silu, Step::Gelu, Step::GeluTanh, Step::Relu, Step::Tanh];
        if let Some(step) = fixed.into_iter().find(|s| s.to_string() == text) {
            return Ok(step);
        }
        let number = |prefix: &str| text.strip_prefix(prefix).and_then(|n| n.parse().ok());
        number("add").map(Step::Add).or_else(|| number("mul").map(Step::Mul)).ok_or_else(|| {
            format!("unknown step `{text}`, expected `addN`, `mulN`, `silu`, `gelu`, `gelu-tanh`, `relu` or `tanh`")
        })
    }
}

impl TryFrom<String> for Step {
    type Error = String;
    fn try_from(text: String) -> std::result::Result<Step, String> {
        text.parse()
    }
}

/// Checks that the extra operands fit a result of type `out` and that the steps name them all.
pub(super) fn infer(steps: &[Step], extras: &[Option<&TensorTy>], out: &TensorTy) -> Result<()> {
    for (i, extra) in extras.iter().enumerate() {
        let extra = extra.ok_or_else(|| Diag::input(format!("extra operand {i} is missing")))?;
        let whole = extra.shape == out.shape;
        let row = extra.shape.0[..] == out.shape.0[out.rank() - 1..];
        if !extra.elem.is_float() || !(whole || row) {
            return Err(Diag::input(format!("extra operand {i} has type {extra}, which does not fit {out}")));
        }
        if !steps.iter().any(|s| s.operand() == Some(i as u8)) {
            return Err(Diag::input(format!("no step of the epilogue reads extra operand {i}")));
        }
    }
    match steps.iter().find(|s| s.operand().is_some_and(|o| usize::from(o) >= extras.len())) {
        Some(step) => Err(Diag::input(format!("step `{step}` names an operand that is not there"))),
        None => Ok(()),
    }
}

/// Applies the steps to row-major sums with rows of `cols`.
pub(super) fn apply(steps: &[Step], sums: &mut [f64], cols: usize, extras: &[Option<&Tensor>]) -> Result<()> {
    for step in steps {
        let operand = match step.operand() {
            Some(i) => {
                let extra = extras.get(usize::from(i)).copied().flatten();
                Some(extra.ok_or_else(|| Diag::bug("an epilogue operand is missing"))?.f32s()?)
            }
            None => None,
        };
        for (i, x) in sums.iter_mut().enumerate() {
            let y = operand.map_or(0.0, |o| f64::from(o[if o.len() == cols { i % cols } else { i }]));
            *x = match step {
                Step::Add(_) => *x + y,
                Step::Mul(_) => *x * y,
                Step::Silu => *x / (1.0 + (-*x).exp()),
                Step::Gelu => super::gelu::gelu(*x, false),
                Step::GeluTanh => super::gelu::gelu(*x, true),
                Step::Relu => x.max(0.0),
                Step::Tanh => x.tanh(),
            };
        }
    }
    Ok(())
}

/// `x`'s type with its last extent replaced by the number of rows of `w`; `w` is `[N, K]`.
pub(super) fn product_type(x: &TensorTy, w: &TensorTy) -> Result<TensorTy> {
    let (n, k) = w.matrix().ok_or_else(|| Diag::input(format!("the weight has type {w}, not a matrix")))?;
    if super::last_dim(x)? != k {
        return Err(Diag::input(format!("rows of {x} cannot be multiplied with rows of {w}")));
    }
    let mut shape = x.shape.clone();
    *shape.0.last_mut().expect("last_dim has found one") = n;
    Ok(TensorTy { elem: crate::ty::ElemTy::F32, shape })
}

/// Multiply-adds of a product of type `out` with rows of `w`.
pub(super) fn macs(w: Option<&TensorTy>, elements: u64, bind: super::Binding<'_>) -> u64 {
    let k = match w.and_then(|w| w.shape.last()) {
        Some(Dim::Static(k)) => k,
        Some(Dim::Sym(c)) => bind(c),
        None => 1,
    };
    elements.saturating_mul(k)
}
