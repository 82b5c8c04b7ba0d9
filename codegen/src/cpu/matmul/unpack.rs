//! From packed codes to operands.

use inkwell::values::PointerValue;
use quantc_ir::diag::{Diag, Result};

use crate::cpu::llvm::{Elem, IntCmp, Val, VecBuilder};
use crate::layout::{Layout, Order};
use crate::spec::{Code, E2M1, Zero};

/// How codes become f32, exactly.
pub(super) struct Unpack<'c> {
    way: Way<'c>,
    order: Order,
    sign_and_size: bool,
}

enum Way<'c> {
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

/// The zero point of [`Way::Integer`].
enum IntZero {
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
    /// The way to convert what lies in `layout` on the builder's target.
    pub(super) fn new(b: &VecBuilder<'_, 'c>, layout: &Layout) -> Unpack<'c> {
        let w = layout.w;
        // A permutation over sixteen lanes.
        let permutes = b.width() == 16;
        let mini = |bits, (shift, mask, factor)| Way::Minifloat { bits, shift, mask, factor };
        let way = match (w.code, w.zero) {
            (Code::U4, Zero::Sym(zero)) if permutes => {
                let values: Vec<f32> = (0..16).map(|code| code as f32 - f32::from(zero)).collect();
                Way::Table(b.f32s(&values))
            }
            (Code::Lut4, _) if permutes => Way::Table(b.f32s(&E2M1)),
            (Code::U4 | Code::U8, Zero::Sym(zero)) => {
                Way::Integer { bits: w.code.bits(), zero: IntZero::Same(zero) }
            }
            (Code::U4 | Code::U8, Zero::Asym) => {
                Way::Integer { bits: w.code.bits(), zero: IntZero::PerGroup }
            }
            (Code::Lut4, _) => mini(4, E2M1_SHIFT),
            (Code::E4m3, _) => mini(8, E4M3_SHIFT),
            (Code::E5m2, _) => mini(8, E5M2_SHIFT),
            (Code::F32, _) => Way::F32,
            (Code::F16, _) => Way::F16,
            (Code::Bf16, _) => Way::Bf16,
        };
        Unpack { way, order: layout.order, sign_and_size: layout.sign_and_size() }
    }

    /// What is loaded once a group and vector: 2^23 plus the zero points at `ptr`, when those differ.
    pub(super) fn group(&self, b: &VecBuilder<'_, 'c>, zeros: PointerValue<'c>) -> Option<Val<'c>> {
        match self.way {
            Way::Integer { zero: IntZero::PerGroup, .. } => {
                let zeros = load_zeros(b, zeros);
                let lanes = b.lanes(zeros);
                Some(b.bitcast(b.or(zeros, b.i32(lanes, MAGIC.to_bits() as i32)), Elem::F32, lanes))
            }
            _ => None,
        }
    }

    /// Loads one vector of one step: packed codes for narrow formats, the operand itself for wide ones.
    pub(super) fn load(&self, b: &VecBuilder<'_, 'c>, ptr: PointerValue<'c>) -> Loaded<'c> {
        let lanes = b.width();
        let one = |v| Loaded { parts: vec![v] };
        match (&self.way, self.order) {
            (Way::F32, _) => one(b.load(ptr, Elem::F32, lanes)),
            (Way::Bf16, Order::Quads) => one(b.load_bf16(ptr, lanes)),
            (Way::F16, _) if b.target().cpu.features.contains(&"f16c") => {
                one(b.fpext(b.load(ptr, Elem::F16, lanes), Elem::F32))
            }
            (Way::F16, _) => {
                // As a minifloat whose sixteen bits lie in the top of the lane.
                let top = b.shl(b.zext(b.load(ptr, Elem::I16, lanes), Elem::I32), b.i32(lanes, 16));
                one(minifloat(b, top, 3, 0x8fff_e000, pow2(112)))
            }
            (Way::Integer { bits: 8, .. } | Way::Minifloat { bits: 8, .. }, Order::Pairs) => {
                // Each run of four columns has its first two k in its first half: a lane gets the pair twice.
                let v = b.load(ptr, Elem::I16, lanes * 2);
                let v = if self.sign_and_size { with_offset(b, v) } else { v };
                let spread = |from: u32| {
                    let halves: Vec<u32> = (0..lanes * 2).map(|i| i / 8 * 8 + from + i % 8 / 2).collect();
                    b.bitcast(b.shuffle(v, v, &halves), Elem::I32, lanes)
                };
                Loaded { parts: vec![spread(0), spread(4)] }
            }
            _ => one(b.load(ptr, Elem::I32, lanes)),
        }
    }

    /// The operand of the `i`th k of a step, out of what [`Unpack::load`] gave.
    pub(super) fn value(
        &self,
        b: &VecBuilder<'_, 'c>,
        codes: &Loaded<'c>,
        i: u32,
        group: Option<Val<'c>>,
    ) -> Val<'c> {
        let lanes = b.width();
        // The part that has the code, and the bit where it starts.
        let place = |bits: u32| match (bits, self.order) {
            (4, Order::Quads) => (0, i % 4 * 8 + i / 4 * 4),
            (4, Order::Pairs) => (0, i % 2 * 16 + i / 2 * 4),
            (_, Order::Quads) => (0, i * 8),
            (_, Order::Pairs) => (i as usize / 2, i % 2 * 8),
        };
        let shifted = |bits: u32| {
            let (part, by) = place(bits);
            let codes = codes.parts[part];
            if by == 0 { codes } else { b.lshr(codes, b.i32(lanes, by as i32)) }
        };
        match self.way {
            Way::Bf16 if self.order == Order::Pairs => pair_of_bf16(b, codes.parts[0])[i as usize],
            Way::F32 | Way::F16 | Way::Bf16 => codes.parts[0],
            Way::Table(table) => {
                // The permutation looks at the low four bits of a lane only.
                b.intrinsic("llvm.x86.avx512.permvar.sf.512", &[], &[table, shifted(4)])
            }
            Way::Integer { bits, ref zero } => {
                let code = b.and(shifted(bits), b.i32(lanes, (1 << bits) - 1));
                let big = b.bitcast(b.or(code, b.i32(lanes, MAGIC.to_bits() as i32)), Elem::F32, lanes);
                let base = match zero {
                    IntZero::Same(zero) => b.f32(lanes, MAGIC + f32::from(*zero)),
                    IntZero::PerGroup => group.expect("the zero points are loaded before the group's codes"),
                };
                b.fsub(big, base)
            }
            Way::Minifloat { bits, shift, mask, factor } => {
                let (part, start) = place(bits);
                let up = 32 - bits - start;
                let codes = codes.parts[part];
                let top = if up == 0 { codes } else { b.shl(codes, b.i32(lanes, up as i32)) };
                minifloat(b, top, shift, mask, factor)
            }
        }
    }
}

/// One vector of one step, loaded.
pub(super) struct Loaded<'c> {
    parts: Vec<Val<'c>>,
}

fn minifloat<'c>(b: &VecBuilder<'_, 'c>, top: Val<'c>, shift: u32, mask: u32, factor: f32) -> Val<'c> {
    let lanes = b.lanes(top);
    let placed = b.and(b.ashr(top, b.i32(lanes, shift as i32)), b.i32(lanes, mask as i32));
    b.fmul(b.bitcast(placed, Elem::F32, lanes), b.f32(lanes, factor))
}

/// The lower and the upper half of each lane as f32.
pub(super) fn pair_of_bf16<'c>(b: &VecBuilder<'_, 'c>, pair: Val<'c>) -> [Val<'c>; 2] {
    let lanes = b.lanes(pair);
    let first = b.shl(pair, b.i32(lanes, 16));
    let second = b.and(pair, b.i32(lanes, !0xffff));
    [first, second].map(|bits| b.bitcast(bits, Elem::F32, lanes))
}

/// Signed bytes stored as sign and size, with an offset of 128.
fn with_offset<'c>(b: &VecBuilder<'_, 'c>, halves: Val<'c>) -> Val<'c> {
    let bytes = b.lanes(halves) * 2;
    let codes = b.bitcast(halves, Elem::I8, bytes);
    let (zero, sign) = (b.int(Elem::I8, bytes, 0), b.int(Elem::I8, bytes, 0x80));
    let size = b.and(codes, b.int(Elem::I8, bytes, 0x7f));
    // Below zero, the size is taken from 128; a sign and no size stays 0, which is -128.
    let below = b.and(b.sub(zero, size), b.int(Elem::I8, bytes, 0x7f));
    let code = b.select(b.icmp(IntCmp::SLT, codes, zero), below, b.or(size, sign));
    b.bitcast(code, Elem::I16, bytes / 2)
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
