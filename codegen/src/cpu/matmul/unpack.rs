//! From packed codes to operands.

use inkwell::values::PointerValue;
use quantc_ir::diag::{Diag, Result};

use crate::cpu::llvm::{Elem, Val, VecBuilder};
use crate::spec::{Code, E2M1, WFmt, Zero};

/// How codes become f32, exactly.
pub(super) enum Unpack<'c> {
    /// Four-bit codes select from sixteen values: one shift and one permutation.
    Table(Val<'c>),
    /// Integers of this many bits become the low mantissa bits of 2^23, from which 2^23 and the zero point are taken.
    Integer { bits: u32, zero: IntZero },
    /// Small floats lie in the top bits of a lane: shift the exponent into place, clear the copies of the sign, and
    /// multiply by the power of two between the biases. Subnormals become right by themselves.
    Minifloat { bits: u32, shift: u32, mask: u32, factor: f32 },
    /// The upper half of an f32.
    Bf16,
    /// Half precision.
    F16,
    /// As stored.
    F32,
}

/// The zero point of [`Unpack::Integer`].
pub(super) enum IntZero {
    /// The same for all.
    Same(u8),
    /// One a group and column, loaded at the start of the group.
    PerGroup,
}

const E2M1_SHIFT: (u32, u32, f32) = (6, 0x81c0_0000, pow2(126));
const E4M3_SHIFT: (u32, u32, f32) = (4, 0x87f0_0000, pow2(120));
const E5M2_SHIFT: (u32, u32, f32) = (3, 0x8fe0_0000, pow2(112));
/// 2^23: its mantissa's last place is one.
const MAGIC: f32 = 8_388_608.0;

const fn pow2(exponent: u32) -> f32 {
    f32::from_bits((exponent + 127) << 23)
}

impl<'c> Unpack<'c> {
    /// The way to convert `w` on the builder's target.
    pub(super) fn new(b: &VecBuilder<'_, 'c>, w: &WFmt) -> Unpack<'c> {
        // A permutation over sixteen lanes.
        let permutes = b.width() == 16;
        let mini = |bits, (shift, mask, factor)| Unpack::Minifloat { bits, shift, mask, factor };
        match (w.code, w.zero) {
            (Code::U4, Zero::Sym(zero)) if permutes => {
                let values: Vec<f32> = (0..16).map(|code| code as f32 - f32::from(zero)).collect();
                Unpack::Table(b.f32s(&values))
            }
            (Code::Lut4, _) if permutes => Unpack::Table(b.f32s(&E2M1)),
            (Code::U4 | Code::U8, Zero::Sym(zero)) => {
                Unpack::Integer { bits: w.code.bits(), zero: IntZero::Same(zero) }
            }
            (Code::U4 | Code::U8, Zero::Asym) => {
                Unpack::Integer { bits: w.code.bits(), zero: IntZero::PerGroup }
            }
            (Code::Lut4, _) => mini(4, E2M1_SHIFT),
            (Code::E4m3, _) => mini(8, E4M3_SHIFT),
            (Code::E5m2, _) => mini(8, E5M2_SHIFT),
            (Code::F32, _) => Unpack::F32,
            (Code::F16, _) => Unpack::F16,
            (Code::Bf16, _) => Unpack::Bf16,
        }
    }

    /// What is loaded once a group and vector: 2^23 plus the zero points at `ptr`, when those differ.
    pub(super) fn group(&self, b: &VecBuilder<'_, 'c>, zeros: PointerValue<'c>) -> Option<Val<'c>> {
        match self {
            Unpack::Integer { zero: IntZero::PerGroup, .. } => {
                let zeros = load_zeros(b, zeros);
                let lanes = b.lanes(zeros);
                Some(b.bitcast(b.or(zeros, b.i32(lanes, MAGIC.to_bits() as i32)), Elem::F32, lanes))
            }
            _ => None,
        }
    }

    /// Loads one vector of one step: packed codes for narrow formats, the operand itself for wide ones.
    pub(super) fn load(&self, b: &VecBuilder<'_, 'c>, ptr: PointerValue<'c>) -> Val<'c> {
        let lanes = b.width();
        match self {
            Unpack::F32 => b.load(ptr, Elem::F32, lanes),
            Unpack::Bf16 => b.load_bf16(ptr, lanes),
            Unpack::F16 if b.target().cpu.features.contains(&"f16c") => {
                b.fpext(b.load(ptr, Elem::F16, lanes), Elem::F32)
            }
            Unpack::F16 => {
                // As a minifloat whose sixteen bits lie in the top of the lane.
                let top = b.shl(b.zext(b.load(ptr, Elem::I16, lanes), Elem::I32), b.i32(lanes, 16));
                minifloat(b, top, 3, 0x8fff_e000, pow2(112))
            }
            _ => b.load(ptr, Elem::I32, lanes),
        }
    }

    /// The operand of the `i`th k of a step, out of what [`Unpack::load`] gave.
    pub(super) fn value(
        &self,
        b: &VecBuilder<'_, 'c>,
        codes: Val<'c>,
        i: u32,
        group: Option<Val<'c>>,
    ) -> Val<'c> {
        let lanes = b.lanes(codes);
        let shifted = |by: u32| if by == 0 { codes } else { b.lshr(codes, b.i32(lanes, by as i32)) };
        match *self {
            Unpack::F32 | Unpack::F16 | Unpack::Bf16 => codes,
            Unpack::Table(table) => {
                // The permutation looks at the low four bits of a lane only.
                b.intrinsic("llvm.x86.avx512.permvar.sf.512", &[], &[table, shifted(start(4, i))])
            }
            Unpack::Integer { bits, ref zero } => {
                let code = b.and(shifted(start(bits, i)), b.i32(lanes, (1 << bits) - 1));
                let big = b.bitcast(b.or(code, b.i32(lanes, MAGIC.to_bits() as i32)), Elem::F32, lanes);
                let base = match zero {
                    IntZero::Same(zero) => b.f32(lanes, MAGIC + f32::from(*zero)),
                    IntZero::PerGroup => group.expect("the zero points are loaded before the group's codes"),
                };
                b.fsub(big, base)
            }
            Unpack::Minifloat { bits, shift, mask, factor } => {
                let up = 32 - bits - start(bits, i);
                let top = if up == 0 { codes } else { b.shl(codes, b.i32(lanes, up as i32)) };
                minifloat(b, top, shift, mask, factor)
            }
        }
    }
}

/// The bit of a lane where the code of the `i`th k starts.
fn start(bits: u32, i: u32) -> u32 {
    if bits == 4 { i % 4 * 8 + i / 4 * 4 } else { i * 8 }
}

fn minifloat<'c>(b: &VecBuilder<'_, 'c>, top: Val<'c>, shift: u32, mask: u32, factor: f32) -> Val<'c> {
    let lanes = b.lanes(top);
    let placed = b.and(b.ashr(top, b.i32(lanes, shift as i32)), b.i32(lanes, mask as i32));
    b.fmul(b.bitcast(placed, Elem::F32, lanes), b.f32(lanes, factor))
}

/// One vector of zero points as i32.
pub(super) fn load_zeros<'c>(b: &VecBuilder<'_, 'c>, ptr: PointerValue<'c>) -> Val<'c> {
    b.zext(b.load(ptr, Elem::I8, b.width()), Elem::I32)
}

/// Refuses targets whose vectors the layout cannot feed.
pub(super) fn check_width(bits: u32) -> Result<()> {
    match bits {
        128 | 256 | 512 => Ok(()),
        _ => Err(Diag::bug(format!("no matmul kernels for vectors of {bits} bits"))),
    }
}
