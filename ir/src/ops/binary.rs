//! Elementwise functions of two numbers.

use super::{InferCx, OpSpec, elementwise};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{ElemTy, TensorTy};
use serde::{Deserialize, Serialize};

op! {
    /// Elementwise `y = kind(a, b)`; shapes are aligned at the last axis and extents of one are repeated.
    ///
    /// Both operands have elements of one type. Integers wrap around; dividing them by 0 is an error. Sums and products
    /// are ops of their own.
    "binary" => pub struct Binary (
        /// Left operand.
        a: One,
        /// Right operand.
        b: One,
    ) {
        /// Which function.
        kind: BinaryKind = BinaryKind::Sub,
    }
}

/// Functions of two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BinaryKind {
    /// `a - b`.
    Sub,
    /// `a / b`, for integers cut towards zero.
    Div,
    /// `a` to the power `b`.
    Pow,
    /// The smaller; NaN when one is.
    Min,
    /// The larger; NaN when one is.
    Max,
    /// The remainder with the sign of `b`.
    Mod,
    /// The remainder with the sign of `a`.
    Rem,
    /// Logical, of truth values; of integers bit by bit.
    And,
    /// Logical, of truth values; of integers bit by bit.
    Or,
    /// Logical, of truth values; of integers bit by bit.
    Xor,
    /// Bits moved to higher places.
    Shl,
    /// Bits moved to lower places.
    Shr,
}

use BinaryKind as K;

impl OpSpec for Binary {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let ty = elementwise::broadcast(cx)?;
        let fits = match self.kind {
            K::Sub | K::Div | K::Pow | K::Mod | K::Rem => ty.elem != ElemTy::BOOL,
            K::Min | K::Max => true,
            K::And | K::Or | K::Xor => ty.elem.int().is_some(),
            K::Shl | K::Shr => ty.elem.int().is_some() && ty.elem != ElemTy::BOOL,
        };
        if fits {
            return Ok(ty);
        }
        Err(Diag::input(format!("operands have elements {}, which `{:?}` does not take", ty.elem, self.kind)))
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        elementwise::zip(arg(args, 0)?, arg(args, 1)?, out, |a, b| self.real(a, b), |a, b| self.int(a, b))
    }
}

impl Binary {
    fn real(&self, a: f64, b: f64) -> f64 {
        match self.kind {
            K::Div => a / b,
            K::Pow => a.powf(b),
            K::Min => elementwise::least(a, b),
            K::Max => elementwise::most(a, b),
            K::Rem => a % b,
            K::Mod => {
                let r = a % b;
                if r != 0.0 && (r < 0.0) != (b < 0.0) { r + b } else { r }
            }
            K::Sub | K::And | K::Or | K::Xor | K::Shl | K::Shr => a - b,
        }
    }

    fn int(&self, a: i128, b: i128) -> Result<i128> {
        let zero = || Diag::input("an integer is divided by zero");
        Ok(match self.kind {
            K::Sub => a - b,
            K::Div => a.checked_div(b).ok_or_else(zero)?,
            // What does not fit 128 bits has no sensible number of fewer bits either; a negative power is below 1.
            K::Pow if b < 0 => i128::from(a == 1),
            K::Pow => a.wrapping_pow(u32::try_from(b).unwrap_or(u32::MAX)),
            K::Min => a.min(b),
            K::Max => a.max(b),
            K::Rem => a.checked_rem(b).ok_or_else(zero)?,
            K::Mod => {
                let r = a.checked_rem(b).ok_or_else(zero)?;
                if r != 0 && (r < 0) != (b < 0) { r + b } else { r }
            }
            K::And => a & b,
            K::Or => a | b,
            K::Xor => a ^ b,
            // Wrapping around cuts off what was moved out. Places that no type has, negative ones too, leave nothing.
            K::Shl if (0..64).contains(&b) => a << b,
            K::Shl => 0,
            K::Shr => a >> if (0..64).contains(&b) { b } else { 64 },
        })
    }
}
