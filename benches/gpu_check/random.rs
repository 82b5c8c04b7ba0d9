//! Random numbers as they lie in memory, and what bytes there stand for.

use crate::cublas::Numbers;
use half::{bf16, f16};
use quantc_codegen::eexpr::MemTy;
use quantc_codegen::layout::Unpacked;
use quantc_codegen::spec::{Code, ScaleTy, WFmt, Zero};

/// Bytes that launches of a measurement go through in turn: more than twice what a cache of any GPU holds.
pub const ROTATED: u64 = 256 << 20;

/// Numbers that look random: Sebastiano Vigna's splitmix64.
pub struct Random(pub u64);

impl Random {
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `end`.
    pub fn below(&mut self, end: u32) -> u32 {
        (self.bits() % u64::from(end.max(1))) as u32
    }

    /// Between -1 and 1.
    pub fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// A scale of weights or rows.
    pub fn scale(&mut self) -> f32 {
        0.01 + self.float().abs() * 0.05
    }

    /// Numbers as they lie in memory.
    pub fn numbers(&mut self, ty: MemTy, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count * ty.bytes());
        for _ in 0..count {
            match ty {
                MemTy::F32 => bytes.extend(self.float().to_le_bytes()),
                MemTy::F16 => bytes.extend(f16::from_f32(self.float()).to_le_bytes()),
                MemTy::Bf16 => bytes.extend(bf16::from_f32(self.float()).to_le_bytes()),
                MemTy::I8 => bytes.push(self.bits() as u8),
                MemTy::I32 => bytes.extend((self.bits() as i32 % 1000).to_le_bytes()),
            }
        }
        bytes
    }

    /// Bytes of e4m3 below 2: no code that is not a number is among them.
    pub fn e4m3(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.bits() as u8 & 0xbf).collect()
    }

    /// So many bytes of what is multiplied.
    pub fn operands(&mut self, numbers: Numbers, bytes: usize) -> Vec<u8> {
        match numbers {
            Numbers::Bf16 => self.numbers(MemTy::Bf16, bytes / 2),
            Numbers::Int8 => self.numbers(MemTy::I8, bytes),
            Numbers::Fp8 => self.e4m3(bytes),
        }
    }

    /// A random matrix in a format.
    pub fn matrix(&mut self, n: u32, k: u32, w: WFmt) -> Unpacked {
        let (count, groups) = ((n * k) as usize, (n * k.div_ceil(w.group)) as usize);
        let codes = match w.code {
            Code::U4 | Code::Lut4 => (0..count).map(|_| self.bits() as u8 & 15).collect(),
            Code::Bf16 => self.numbers(MemTy::Bf16, count),
            Code::E4m3 | Code::E5m2 => self.e4m3(count),
            _ => self.numbers(MemTy::I8, count),
        };
        let mut m = Unpacked { codes, ..Unpacked::default() };
        if w.scale != ScaleTy::None {
            let stored = |s: f32| if w.scale == ScaleTy::Bf16 { bf16::from_f32(s).to_f32() } else { s };
            m.scales = (0..groups).map(|_| stored(self.scale())).collect();
        }
        if w.zero == Zero::Asym {
            let end = if w.code == Code::U4 { 16 } else { 256 };
            m.zeros = (0..groups).map(|_| self.below(end) as i32).collect();
        }
        m
    }
}

/// What the bytes of a buffer are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Num {
    /// Numbers.
    Of(MemTy),
    /// Codes of e4m3.
    E4m3,
}

impl Num {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Num::Of(ty) => ty.bytes(),
            Num::E4m3 => 1,
        }
    }

    /// The number there.
    pub fn read(self, bytes: &[u8]) -> f64 {
        match (self, bytes) {
            (Num::Of(MemTy::F32), &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).into(),
            (Num::Of(MemTy::I32), &[a, b, c, d]) => i32::from_le_bytes([a, b, c, d]).into(),
            (Num::Of(MemTy::Bf16), &[a, b]) => bf16::from_le_bytes([a, b]).to_f64(),
            (Num::Of(MemTy::F16), &[a, b]) => f16::from_le_bytes([a, b]).to_f64(),
            (Num::E4m3, bytes) => Code::E4m3.value(bytes),
            (Num::Of(_), bytes) => f64::from(bytes[0] as i8),
        }
    }

    /// All numbers there.
    pub fn all(self, bytes: &[u8]) -> Vec<f64> {
        bytes.chunks_exact(self.bytes()).map(|b| self.read(b)).collect()
    }
}

/// The weights of a matrix in f64, `[n][k]`.
pub fn weights(m: &Unpacked, n: u32, k: u32, w: WFmt) -> Vec<f64> {
    let (groups, bytes) = (k.div_ceil(w.group), w.code.source_bytes());
    let mut list = Vec::with_capacity((n * k) as usize);
    for (row, col) in (0..n).flat_map(|row| (0..k).map(move |col| (row, col))) {
        let group = (row * groups + col / w.group) as usize;
        let zero = match w.zero {
            Zero::Sym(z) => f64::from(z),
            Zero::Asym => f64::from(m.zeros[group]),
        };
        let code = &m.codes[(row * k + col) as usize * bytes..][..bytes];
        list.push((w.code.value(code) - zero) * m.scales.get(group).map_or(1.0, |s| f64::from(*s)));
    }
    list
}
