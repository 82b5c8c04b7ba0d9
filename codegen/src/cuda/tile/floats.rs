//! Float arithmetic of kernels under construction: what the functions of [`crate::cpu::math`] are made of.

use super::{Binary, Builder, Ternary, Unary, Val};
use crate::cpu::math::Lanes;

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
