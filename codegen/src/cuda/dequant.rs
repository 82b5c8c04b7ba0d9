//! Codes of weights, as [`super::layout`] stores them, as the registers that matrix products take.

use super::layout::{FragmentLayout, Meets};
use super::tile::{Binary, Builder, Ternary, Unary, Val};
use crate::spec::{Code, Zero};

/// 128 as bf16, twice: its last seven bits are units.
const MAGIC: u32 = 0x4300_4300;

/// 1 as bf16, twice.
const ONE: u32 = 0x3f80_3f80;

/// -1 as bf16, twice.
const MINUS_ONE: u32 = 0xbf80_bf80;

/// -0 as bf16, twice: added to a product it changes nothing, not even the sign of zero.
const MINUS_ZERO: u32 = 0x8000_8000;

/// What is subtracted from the codes of a row, as [`bf16_pair`] takes it.
#[derive(Clone, Copy, Debug)]
pub struct Offset(Val);

/// The offset of codes without zero points of their own.
pub fn fixed_offset(layout: &FragmentLayout) -> Option<Offset> {
    let twice = |x: f32| Offset((u32::from(half::bf16::from_f32(x).to_bits()) * 0x1_0001).into());
    match (layout.w.code, layout.w.zero) {
        (Code::U4, Zero::Sym(z)) => Some(twice(-128.0 - f32::from(z))),
        (Code::U8, Zero::Sym(128)) => None,
        (Code::U8, Zero::Sym(z)) => Some(twice(128.0 - f32::from(z))),
        _ => None,
    }
}

/// The offset of codes with this zero point.
pub fn offset(b: &mut Builder, layout: &FragmentLayout, zero: Val) -> Offset {
    let half = match layout.w.code {
        // -(128 + z) as bf16: z are its last bits.
        Code::U4 => b.binary(Binary::Or, zero, 0xc300),
        _ => {
            let distance = b.binary(Binary::Sub, 128, zero);
            let number = b.unary(Unary::IntToFloat, distance);
            b.binary(Binary::PackBf16, number, 0.0)
        }
    };
    Offset(b.mul(half, 0x1_0001))
}

/// Numbers 2 i and 2 i + 1 of one row of one lane in a chunk, two words of codes, as a pair of bf16.
pub fn bf16_pair(
    b: &mut Builder,
    layout: &FragmentLayout,
    words: [Val; 2],
    i: u32,
    offset: Option<Offset>,
) -> Val {
    let bits = layout.w.code.bits();
    if bits == 16 {
        return words[i as usize];
    }
    let pairs = 16 / bits;
    let v = b.shr(words[(i / pairs) as usize], i % pairs * bits);
    pair(b, layout.w.code, v, offset)
}

/// The numbers in the bytes of a word, signed or e4m3, as pairs of bf16: bytes 0 and 2, and bytes 1 and 3. NaN of e4m3 is 480.
pub fn byte_pairs(b: &mut Builder, e4m3: bool, word: Val) -> [Val; 2] {
    let code = if e4m3 { Code::E4m3 } else { Code::U8 };
    let odd = b.shr(word, 8);
    [word, odd].map(|v| pair(b, code, v, None))
}

/// Two numbers, in the low bits of the halves of `v`.
fn pair(b: &mut Builder, code: Code, v: Val, offset: Option<Offset>) -> Val {
    let field = |b: &mut Builder, mask: u32| {
        let bits = b.and(v, mask);
        b.binary(Binary::Or, bits, MAGIC)
    };
    // Sign and size of a small float, moved to where bf16 has them, and the difference of the exponents' biases.
    let float = |b: &mut Builder, sign: u32, sign_up: u32, size: u32, size_up: u32, factor: u32| {
        let sign = b.and(v, sign);
        let sign = b.shl(sign, sign_up);
        let size = b.and(v, size);
        let size = b.shl(size, size_up);
        let moved = b.binary(Binary::Or, sign, size);
        b.ternary(Ternary::Bf16Fma2, moved, factor, MINUS_ZERO)
    };
    let plus = |b: &mut Builder, x: Val, offset: Option<Offset>| match offset {
        Some(Offset(c)) => b.ternary(Ternary::Bf16Fma2, x, ONE, c),
        None => x,
    };
    match code {
        // 128 + q, then q - z.
        Code::U4 => {
            let x = field(b, 0x000f_000f);
            plus(b, x, offset)
        }
        // Of a signed byte, 128 + its low bits, minus 128 or, where it is negative, 256.
        Code::U8 => {
            let low = field(b, 0x007f_007f);
            let sign = field(b, 0x0080_0080);
            let x = b.ternary(Ternary::Bf16Fma2, sign, MINUS_ONE, low);
            plus(b, x, offset)
        }
        // Biases of 1, 7 and 15, where bf16 has 127.
        Code::Lut4 => float(b, 0x0008_0008, 12, 0x0007_0007, 6, 0x7e80_7e80),
        Code::E4m3 => float(b, 0x0080_0080, 8, 0x007f_007f, 4, 0x7b80_7b80),
        Code::E5m2 => float(b, 0x0080_0080, 8, 0x007f_007f, 5, 0x7780_7780),
        Code::Bf16 | Code::F16 | Code::F32 => unreachable!("wide codes are not taken apart"),
    }
}

/// Numbers 4 i to 4 i + 3 of one row of one lane in a chunk, two words of codes, as bytes. Those of 4 bits are 16 times
/// what they stand for.
pub fn byte_word(b: &mut Builder, layout: &FragmentLayout, words: [Val; 2], i: u32) -> Val {
    if layout.w.code.bits() == 8 {
        return words[i as usize];
    }
    let word = words[(i / 2) as usize];
    let high = b.shl(word, (i + 1) % 2 * 4);
    b.and(high, 0xf0f0_f0f0)
}

/// How often a sum of byte products is what it stands for.
pub fn byte_factor(layout: &FragmentLayout) -> f32 {
    match (layout.meets, layout.w.code) {
        (Meets::Bytes, Code::U4) => 16.0,
        _ => 1.0,
    }
}

/// What a stored byte code is at zero, for codes without zero points of their own: 0 where nothing is to be corrected.
pub fn stored_zero(layout: &FragmentLayout, zero: u8) -> i32 {
    i32::from(zero) - i32::from(layout.flip())
}
