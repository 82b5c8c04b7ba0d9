//! From packed codes to pairs of bf16, which `vdpbf16ps` multiplies and adds two at a time.
//!
//! A vector holds sixteen columns with two k each. All codes become bf16 exactly, by tables in registers.

use half::bf16;
use inkwell::values::PointerValue;

use super::unpack::load_zeros;
use crate::cpu::llvm::{Elem, IntCmp, Val, VecBuilder};
use crate::spec::{Code, E2M1, WFmt, Zero};

/// How codes in the order of pairs become bf16.
pub(super) enum Pairs<'c> {
    /// Four-bit codes select from sixteen values: one shift and one permutation, which looks at the low five bits.
    Table(Val<'c>),
    /// Four-bit codes less a zero point of their column: differences select from 32 values.
    Differences(Val<'c>),
    /// Seven bits of an eight-bit code select both bytes of the number's size; the eighth is the sign.
    Bytes { high: [Val<'c>; 2], low: [Val<'c>; 2], integer: bool },
    /// As stored.
    Bf16,
}

/// Halves of a vector.
const HALVES: u32 = 32;
/// Bytes of a vector.
const BYTES: u32 = 64;

impl<'c> Pairs<'c> {
    /// The way to convert `w`, which is exact in bf16.
    pub(super) fn new(b: &VecBuilder<'_, 'c>, w: &WFmt) -> Pairs<'c> {
        let table = |values: &dyn Fn(i64) -> f32| {
            let bits = |i| i64::from(bf16::from_f32(values(i)).to_bits());
            b.ints(Elem::I16, &(0..i64::from(HALVES)).map(bits).collect::<Vec<_>>())
        };
        match (w.code, w.zero) {
            (Code::U4, Zero::Sym(zero)) => Pairs::Table(table(&|i| (i % 16) as f32 - f32::from(zero))),
            (Code::U4, Zero::Asym) => Pairs::Differences(table(&|i| ((i + 16) % 32 - 16) as f32)),
            (Code::Lut4, _) => Pairs::Table(table(&|i| E2M1[i as usize % 16])),
            (Code::Bf16, _) => Pairs::Bf16,
            (code, _) => {
                let bits: Vec<i64> = (0..128).map(|i| i64::from(size(code, i).to_bits())).collect();
                let half = |from: usize, shift: u32| {
                    let bytes: Vec<i64> = bits[from..from + 64].iter().map(|b| b >> shift & 0xff).collect();
                    b.ints(Elem::I8, &bytes)
                };
                let both = |shift| [half(0, shift), half(64, shift)];
                Pairs::Bytes { high: both(8), low: both(0), integer: code == Code::U8 }
            }
        }
    }

    /// What is loaded once a group and vector: the zero points at `ptr` in both halves of their columns.
    pub(super) fn group(&self, b: &VecBuilder<'_, 'c>, ptr: PointerValue<'c>) -> Option<Val<'c>> {
        match self {
            Pairs::Differences(_) => {
                let zeros = load_zeros(b, ptr);
                let both = b.or(zeros, b.shl(zeros, b.i32(b.lanes(zeros), 16)));
                Some(b.bitcast(both, Elem::I16, HALVES))
            }
            _ => None,
        }
    }

    /// The operands of one vector of one step, in order of k.
    pub(super) fn load(
        &self,
        b: &VecBuilder<'_, 'c>,
        ptr: PointerValue<'c>,
        zeros: Option<Val<'c>>,
    ) -> Vec<Val<'c>> {
        let halves: Vec<Val<'c>> = match self {
            Pairs::Bf16 => vec![b.load(ptr, Elem::I16, HALVES)],
            Pairs::Table(table) => {
                let codes = b.load(ptr, Elem::I16, HALVES);
                (0..4).map(|i| look_up(b, *table, shifted(b, codes, i))).collect()
            }
            Pairs::Differences(table) => {
                let codes = b.load(ptr, Elem::I16, HALVES);
                let zeros = zeros.expect("the zero points are loaded before the group's codes");
                let code = |i| b.and(shifted(b, codes, i), b.int(Elem::I16, HALVES, 15));
                (0..4).map(|i| look_up(b, *table, b.sub(code(i), zeros))).collect()
            }
            Pairs::Bytes { high, low, integer } => {
                let codes = b.load(ptr, Elem::I8, BYTES);
                let sign = b.int(Elem::I8, BYTES, 0x80);
                let byte = |[a, z]: [Val<'c>; 2]| {
                    b.intrinsic("llvm.x86.avx512.vpermi2var.qi.512", &[], &[a, codes, z])
                };
                let mut top = b.or(byte(*high), b.and(codes, sign));
                if *integer {
                    // A sign and no size is -128.
                    let largest = b.icmp(IntCmp::EQ, codes, sign);
                    top = b.select(largest, b.int(Elem::I8, BYTES, 0xc3), top);
                }
                let bottom = byte(*low);
                let join = |from: u32| {
                    let lanes: Vec<u32> = (0..BYTES)
                        .map(|i| i / 16 * 16 + from + i % 16 / 2 + if i % 2 == 0 { 0 } else { BYTES })
                        .collect();
                    b.bitcast(b.shuffle(bottom, top, &lanes), Elem::I16, HALVES)
                };
                vec![join(0), join(8)]
            }
        };
        halves.into_iter().map(|v| b.bitcast(v, Elem::Bf16, HALVES)).collect()
    }
}

/// The size that the low seven bits of a code mean. What is not finite is never stored.
fn size(code: Code, bits: u32) -> bf16 {
    let mini = |mantissa: u32, bias: i32| {
        let (exponent, m) = (bits >> mantissa, bits & ((1 << mantissa) - 1));
        let hidden = if exponent == 0 { 0 } else { 1 << mantissa };
        let power = exponent.max(1) as i32 - bias - mantissa as i32;
        (m + hidden) as f32 * 2f32.powi(power)
    };
    bf16::from_f32(match code {
        Code::E4m3 => mini(3, 7),
        Code::E5m2 => mini(2, 15),
        _ => bits as f32,
    })
}

fn shifted<'c>(b: &VecBuilder<'_, 'c>, codes: Val<'c>, i: i64) -> Val<'c> {
    if i == 0 { codes } else { b.lshr(codes, b.int(Elem::I16, HALVES, 4 * i)) }
}

fn look_up<'c>(b: &VecBuilder<'_, 'c>, table: Val<'c>, index: Val<'c>) -> Val<'c> {
    b.intrinsic("llvm.x86.avx512.permvar.hi.512", &[], &[table, index])
}

/// Spreads the two activations at `ptr` over a vector; the second is zero when only one is left.
pub(super) fn activations<'c>(b: &VecBuilder<'_, 'c>, ptr: PointerValue<'c>, both: bool) -> Val<'c> {
    let pair = if both {
        b.load_aligned(ptr, Elem::I32, 1, 2)
    } else {
        b.zext(b.load(ptr, Elem::I16, 1), Elem::I32)
    };
    b.bitcast(b.splat(pair, b.width()), Elem::Bf16, HALVES)
}

/// `sum` plus the products of both k of each column.
pub(super) fn accumulate<'c>(
    b: &VecBuilder<'_, 'c>,
    sum: Val<'c>,
    weights: Val<'c>,
    acts: Val<'c>,
) -> Val<'c> {
    b.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", &[], &[sum, weights, acts])
}
