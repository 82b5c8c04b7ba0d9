//! What operations compute: for the interpreter on lanes, and for the builder on constants.

use crate::cuda::tile::{Binary, Ternary, Unary, Val};
use half::{bf16, f16};

/// A unary operation on the bits of a value.
pub(crate) fn unary_bits(op: Unary, x: u64) -> u64 {
    let f = f32::from_bits(x as u32);
    let float = |y: f32| u64::from(y.to_bits());
    match op {
        Unary::Copy | Unary::FromBits | Unary::Bits | Unary::Widen => x,
        Unary::FNeg => float(-f),
        Unary::FAbs => float(f.abs()),
        Unary::FSqrt => float(f.sqrt()),
        Unary::Exp2 => {
            let y = f64::from(f).exp2() as f32;
            float(if y < f32::MIN_POSITIVE { 0.0 } else { y })
        }
        Unary::Log2 => float(f64::from(f).log2() as f32),
        Unary::FRound => float(f.round_ties_even()),
        Unary::IntToFloat => float(x as u32 as i32 as f32),
        Unary::FloatToInt => u64::from(f.round_ties_even() as i32 as u32),
        Unary::FloatToByte => u64::from(f.round_ties_even() as i8 as i32 as u32),
        Unary::HalfToFloat => float(f16::from_bits(x as u16).to_f32()),
        Unary::FloatToHalf => u64::from(f16::from_f32(f).to_bits()),
        Unary::SignExtend8 => u64::from(x as u8 as i8 as i32 as u32),
        Unary::PNot => u64::from(x == 0),
    }
}

/// A binary operation on the bits of values.
pub(crate) fn binary_bits(op: Binary, x: u64, y: u64) -> u64 {
    let (a, b) = (x as u32, y as u32);
    let (f, g) = (f32::from_bits(a), f32::from_bits(b));
    let float = |y: f32| u64::from(y.to_bits());
    let word = u64::from;
    match op {
        Binary::FAdd => float(f + g),
        Binary::FSub => float(f - g),
        Binary::FMul => float(f * g),
        Binary::FDiv => float(f / g),
        Binary::FMax if f.is_nan() || g > f || (f == g && g.is_sign_positive()) => y,
        Binary::FMax => x,
        Binary::FCopySign => float(f.copysign(g)),
        Binary::FLt => u64::from(f < g),
        Binary::FEq => u64::from(f == g),
        Binary::Add => word(a.wrapping_add(b)),
        Binary::Sub => word(a.wrapping_sub(b)),
        Binary::Mul => word(a.wrapping_mul(b)),
        Binary::Div => word(a / b),
        Binary::Rem => word(a % b),
        Binary::And => word(a & b),
        Binary::Or => word(a | b),
        Binary::Xor => word(a ^ b),
        Binary::Shl => word(a << b),
        Binary::Shr => word(a >> b),
        Binary::Min => word(a.min(b)),
        Binary::Lt => u64::from(a < b),
        Binary::Eq => u64::from(a == b),
        Binary::PAnd => u64::from(x != 0 && y != 0),
        Binary::PackBf16 => {
            word(u32::from(bf16::from_f32(f).to_bits()) | u32::from(bf16::from_f32(g).to_bits()) << 16)
        }
        Binary::Add64 => x.wrapping_add(y),
    }
}

/// A ternary operation on the bits of values.
pub(crate) fn ternary_bits(op: Ternary, x: u64, y: u64, z: u64) -> u64 {
    let f = |v: u64| f32::from_bits(v as u32);
    match op {
        Ternary::FFma => u64::from(f(x).mul_add(f(y), f(z)).to_bits()),
        Ternary::Select if x != 0 => y,
        Ternary::Select => z,
        Ternary::Bf16Fma2 => {
            let half = |shift: u32| {
                let h = |v: u64| bf16::from_bits((v >> shift) as u16).to_f64();
                // Products of bf16 are exact in f64; sums are rounded to odd, so that rounding again is right.
                u64::from(bf16::from_f32(narrow_to_odd(sum_to_odd(h(x) * h(y), h(z)))).to_bits()) << shift
            };
            half(0) | half(16)
        }
        Ternary::MulWide => u64::from(x as u32) * u64::from(y as u32) + z,
    }
}

/// `a + b` with the last bit set where the sum is not exact: rounding it to fewer bits is then as if from the exact sum.
fn sum_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    if !sum.is_finite() || sum == 0.0 {
        return sum;
    }
    // Knuth's two-sum: what the addition lost.
    let b_part = sum - a;
    let lost = (a - (sum - b_part)) + (b - b_part);
    if lost == 0.0 || sum.to_bits() & 1 == 1 {
        return sum;
    }
    let toward_larger = (lost > 0.0) == (sum > 0.0);
    f64::from_bits(if toward_larger { sum.to_bits() + 1 } else { sum.to_bits() - 1 })
}

/// `x` in single precision, with the last bit set where that is not exact.
fn narrow_to_odd(x: f64) -> f32 {
    let near = x as f32;
    let lost = x - f64::from(near);
    if !near.is_finite() || lost == 0.0 || near.to_bits() & 1 == 1 {
        return near;
    }
    // Of what is lost beside zero only the sign is known: the number next to zero has it.
    if near == 0.0 {
        return f32::from_bits(1).copysign(x as f32);
    }
    let toward_larger = (lost > 0.0) == (near > 0.0);
    f32::from_bits(if toward_larger { near.to_bits() + 1 } else { near.to_bits() - 1 })
}

/// The result of a unary operation, when it is known.
pub(crate) fn unary(op: Unary, a: Val) -> Option<Val> {
    match (op, a) {
        (Unary::FromBits, Val::U32(x)) => Some(f32::from_bits(x).into()),
        (Unary::Bits, Val::F32(x)) => Some(x.get().to_bits().into()),
        (Unary::PNot, Val::Pred(p)) => Some(Val::Pred(!p)),
        _ => None,
    }
}

/// The result of a binary operation, when it is known.
pub(crate) fn binary(op: Binary, a: Val, b: Val) -> Option<Val> {
    if let (Val::U32(x), Val::U32(y)) = (a, b) {
        let bits = binary_bits(op, x.into(), y.into());
        return Some(match op {
            Binary::Lt | Binary::Eq => Val::Pred(bits != 0),
            _ => Val::U32(bits as u32),
        });
    }
    match (op, a, b) {
        (Binary::Add | Binary::Or | Binary::Xor, Val::U32(0), other) => Some(other),
        (
            Binary::Add | Binary::Sub | Binary::Or | Binary::Xor | Binary::Shl | Binary::Shr,
            other,
            Val::U32(0),
        ) => Some(other),
        (Binary::Mul | Binary::Div, other, Val::U32(1)) | (Binary::Mul, Val::U32(1), other) => Some(other),
        (Binary::Mul | Binary::And, _, Val::U32(0)) | (Binary::Mul | Binary::And, Val::U32(0), _) => {
            Some(Val::U32(0))
        }
        (Binary::Rem, _, Val::U32(1)) => Some(Val::U32(0)),
        (Binary::PAnd, Val::Pred(true), other) | (Binary::PAnd, other, Val::Pred(true)) => Some(other),
        (Binary::PAnd, Val::Pred(false), _) | (Binary::PAnd, _, Val::Pred(false)) => Some(Val::Pred(false)),
        _ => None,
    }
}
