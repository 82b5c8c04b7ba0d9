//! Float arithmetic of kernels under construction: what the functions of [`crate::cpu::math`] are made of.

use super::{Binary, Builder, Ternary, Unary, Val};
use crate::cpu::math::Lanes;

impl Builder {
    /// The code of the number nearest to `a` that OCP E4M3 has, in the low byte: ties to even, beyond 448 the largest one,
    /// 0x7f for what is not a number.
    pub fn e4m3_bits(&mut self, a: Val) -> Val {
        let rounded = self.round_e4m3(a);
        let all = self.unary(Unary::Bits, rounded);
        let size = self.unary(Unary::FAbs, rounded);
        let bits = self.unary(Unary::Bits, size);
        // Exponents are biased by 7, not 127. Below 2^-6 the last place is 2^-9.
        let moved = self.shr(bits, 20);
        let normal = self.binary(Binary::Sub, moved, 120 << 3);
        let steps = Lanes::mul(self, size, 512.0.into());
        let small = self.unary(Unary::FloatToInt, steps);
        let least = self.binary(Binary::FLt, size, 0.015_625);
        let code = self.select(least, small, normal);
        let sign = self.shr(all, 24);
        let sign = self.and(sign, 0x80);
        let code = self.binary(Binary::Or, code, sign);
        let number = self.binary(Binary::FEq, a, a);
        self.select(number, code, 0x7f)
    }
}

/// Floats of a kernel under construction: what expressions and their functions are made of.
impl Lanes for Builder {
    type V = Val;

    fn constant(&mut self, x: f32) -> Val {
        x.into()
    }
    fn add(&mut self, a: Val, b: Val) -> Val {
        self.binary(Binary::FAdd, a, b)
    }
    fn sub(&mut self, a: Val, b: Val) -> Val {
        self.binary(Binary::FSub, a, b)
    }
    fn mul(&mut self, a: Val, b: Val) -> Val {
        self.binary(Binary::FMul, a, b)
    }
    fn div(&mut self, a: Val, b: Val) -> Val {
        self.binary(Binary::FDiv, a, b)
    }
    fn mul_add(&mut self, a: Val, b: Val, c: Val) -> Val {
        self.ternary(Ternary::FFma, a, b, c)
    }
    fn sqrt(&mut self, a: Val) -> Val {
        self.unary(Unary::FSqrt, a)
    }
    fn abs(&mut self, a: Val) -> Val {
        self.unary(Unary::FAbs, a)
    }
    fn neg(&mut self, a: Val) -> Val {
        self.unary(Unary::FNeg, a)
    }
    fn copysign(&mut self, a: Val, sign: Val) -> Val {
        self.binary(Binary::FCopySign, a, sign)
    }
    fn select_lt(&mut self, a: Val, b: Val, x: Val, y: Val) -> Val {
        let p = self.binary(Binary::FLt, a, b);
        self.select(p, x, y)
    }
    fn bits_shl_23(&mut self, a: Val) -> Val {
        let bits = self.unary(Unary::Bits, a);
        let shifted = self.shl(bits, 23);
        self.unary(Unary::FromBits, shifted)
    }
    fn round(&mut self, a: Val) -> Val {
        self.unary(Unary::FRound, a)
    }
    fn round_e4m3(&mut self, a: Val) -> Val {
        let largest = self.constant(448.0);
        let size = self.abs(a);
        let size = self.select_lt(size, largest, size, largest);
        let bits = self.unary(Unary::Bits, size);
        // Normal numbers: add just under half of the last place (all of it when odd), cut.
        let last = self.shr(bits, 20);
        let odd = self.and(last, 1);
        let up = Builder::add(self, bits, 0x7_ffff);
        let up = Builder::add(self, up, odd);
        let cut = self.and(up, 0xfff0_0000);
        let normal = self.unary(Unary::FromBits, cut);
        // Subnormal ones: the last place of numbers from 2^14 on is theirs, 2^-9.
        let shift = self.constant(16384.0);
        let small = self.binary(Binary::FAdd, size, shift);
        let small = self.binary(Binary::FSub, small, shift);
        let least = self.constant(0.015_625);
        let rounded = self.select_lt(size, least, small, normal);
        let signed = self.copysign(rounded, a);
        let number = self.binary(Binary::FEq, a, a);
        self.select(number, signed, a)
    }
}
