//! Values computed from others, each lane by itself.

use super::{Ty, Val};

/// Functions of one value.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Unary {
    /// The same value in another register.
    Copy,
    /// `-x`.
    FNeg,
    /// `|x|`.
    FAbs,
    /// Square root.
    FSqrt,
    /// `2^x`, within 2^-22 of its size; numbers below 2^-126 become 0.
    Exp2,
    /// The binary logarithm, within 2^-21, or 2^-21 of its size.
    Log2,
    /// Nearest integer as a float, ties to even.
    FRound,
    /// The float of a signed integer.
    IntToFloat,
    /// The signed integer nearest to a float that is in range, ties to even.
    FloatToInt,
    /// The signed byte nearest to a float, ties to even, clamped, sign-extended; 0 for NaN.
    FloatToByte,
    /// The float with these bits.
    FromBits,
    /// The bits of a float.
    Bits,
    /// The float of a half in the low 16 bits.
    HalfToFloat,
    /// The half nearest to a float, in the low 16 bits.
    FloatToHalf,
    /// The low 8 bits, sign-extended.
    SignExtend8,
    /// `!p`.
    PNot,
    /// The same number in 64 bits.
    Widen,
}

/// Functions of two values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[expect(missing_docs, reason = "F operations take floats, P operations conditions, others 32-bit integers")]
pub enum Binary {
    FAdd,
    FSub,
    FMul,
    FDiv,
    /// The larger one; of a number and NaN the number.
    FMax,
    /// The magnitude of the first with the sign of the second.
    FCopySign,
    FLt,
    FEq,
    Add,
    Sub,
    Mul,
    Div,
    Rem,
    And,
    Or,
    Xor,
    Shl,
    Shr,
    Min,
    Lt,
    Eq,
    PAnd,
    /// Two floats rounded to bf16: the first in the low half.
    PackBf16,
    /// Two 64-bit numbers.
    Add64,
}

/// Functions of three values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Ternary {
    /// `a * b + c` in floats, rounded once.
    FFma,
    /// `a ? b : c`.
    Select,
    /// `a * b + c` in each half, as bf16, rounded once.
    Bf16Fma2,
    /// `a * b + c`, where a and b have 32 bits and the rest 64.
    MulWide,
}

/// A value computed from others.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Expr {
    /// Of one value.
    Unary(Unary, Val),
    /// Of two values.
    Binary(Binary, Val, Val),
    /// Of three values.
    Ternary(Ternary, Val, Val, Val),
    /// Thread of the block.
    Thread,
    /// Column of the grid.
    BlockX,
    /// Row of the grid.
    BlockY,
    /// A number the kernel is called with.
    Scalar(u32),
}

impl Expr {
    /// The operands.
    pub fn operands(self) -> impl Iterator<Item = Val> {
        let list = match self {
            Expr::Unary(_, a) => [Some(a), None, None],
            Expr::Binary(_, a, b) => [Some(a), Some(b), None],
            Expr::Ternary(_, a, b, c) => [Some(a), Some(b), Some(c)],
            Expr::Thread | Expr::BlockX | Expr::BlockY | Expr::Scalar(_) => [None; 3],
        };
        list.into_iter().flatten()
    }
}

impl Unary {
    /// Type of the result.
    pub fn ty(self, of: Ty) -> Ty {
        match self {
            Unary::Copy => of,
            Unary::FNeg
            | Unary::FAbs
            | Unary::FSqrt
            | Unary::Exp2
            | Unary::Log2
            | Unary::FRound
            | Unary::IntToFloat
            | Unary::FromBits
            | Unary::HalfToFloat => Ty::F32,
            Unary::FloatToInt
            | Unary::FloatToByte
            | Unary::Bits
            | Unary::FloatToHalf
            | Unary::SignExtend8 => Ty::U32,
            Unary::PNot => Ty::Pred,
            Unary::Widen => Ty::U64,
        }
    }
}

impl Binary {
    /// Type of the result.
    pub fn ty(self) -> Ty {
        use Binary::*;
        match self {
            FAdd | FSub | FMul | FDiv | FMax | FCopySign => Ty::F32,
            FLt | FEq | Lt | Eq | PAnd => Ty::Pred,
            Add | Sub | Mul | Div | Rem | And | Or | Xor | Shl | Shr | Min | PackBf16 => Ty::U32,
            Add64 => Ty::U64,
        }
    }
}
