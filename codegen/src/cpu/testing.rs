//! What the tests of kernels share: objects run in this process, guarded buffers, random data.
use inkwell::context::Context;
use quantc_ir::diag::Result;
use quantc_ir::target::TargetDesc;
use quantc_runtime::object::Object;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::llvm::Unit;
use crate::eexpr::MemTy;
use crate::targets;

/// The targets that this machine runs. The generic one always does.
pub fn runnable() -> impl Iterator<Item = &'static TargetDesc> {
    targets::TARGETS.iter().copied().filter(|t| targets::runs_here(t))
}

/// Emits and loads one object.
pub fn build(target: &'static TargetDesc, emit: impl FnOnce(&Unit<'_>) -> Result<()>) -> Object {
    let cx = Context::create();
    let unit = Unit::new(&cx, target, "test").expect("the target is known");
    emit(&unit).expect("the spec can be emitted");
    let bytes = unit.finish().expect("LLVM makes an object");
    Object::load(&bytes).expect("the object loads")
}

/// Asks for huge pages, as the runtime does for weights and states: speeds are measured with what engines get.
fn huge_pages(start: *mut u8, len: usize) {
    unsafe extern "C" {
        fn madvise(address: *mut u8, len: usize, advice: i32) -> i32;
    }
    const HUGE: usize = 2 << 20;
    if let Some(len) = len.checked_sub(HUGE).filter(|len| *len >= HUGE) {
        let skip = start.align_offset(HUGE);
        // SAFETY: the range lies in an allocation that nothing else uses yet; the advice does not change contents. A
        // refusal is as good as none.
        unsafe { madvise(start.wrapping_add(skip), len, 14) };
    }
}

const GUARD: usize = 192;
const GUARD_BYTE: u8 = 0xa7;

/// Bytes with guards on both sides, aligned to 4 and to no more.
pub struct Buf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buf {
    /// A buffer of `len` bytes, every one 0xff: NaN as f32, f16 and bf16, -1 as an integer.
    pub fn poisoned(len: usize) -> Buf {
        let mut bytes = Vec::with_capacity(len + 2 * GUARD + 64);
        huge_pages(bytes.as_mut_ptr(), bytes.capacity());
        bytes.resize(bytes.capacity(), GUARD_BYTE);
        let start = bytes.as_ptr().align_offset(64) + GUARD + 4;
        bytes[start..start + len].fill(0xff);
        Buf { bytes, start, len }
    }

    /// A buffer of these numbers, rounded to `ty`.
    pub fn of(values: &[f32], ty: MemTy) -> Buf {
        let mut buf = Buf::poisoned(values.len() * ty.bytes());
        for (i, &v) in values.iter().enumerate() {
            let at = buf.start + i * ty.bytes();
            let out = &mut buf.bytes[at..at + ty.bytes()];
            match ty {
                MemTy::F32 => out.copy_from_slice(&v.to_le_bytes()),
                MemTy::F16 => out.copy_from_slice(&half::f16::from_f32(v).to_le_bytes()),
                MemTy::Bf16 => out.copy_from_slice(&half::bf16::from_f32(v).to_le_bytes()),
                MemTy::I8 => out.copy_from_slice(&(v as i8).to_le_bytes()),
                MemTy::I32 => out.copy_from_slice(&(v as i32).to_le_bytes()),
            }
        }
        buf
    }

    /// A buffer of i32.
    pub fn ints(values: &[i32]) -> Buf {
        let mut buf = Buf::poisoned(values.len() * 4);
        for (i, v) in values.iter().enumerate() {
            buf.bytes[buf.start + i * 4..buf.start + i * 4 + 4].copy_from_slice(&v.to_le_bytes());
        }
        buf
    }

    /// Overwrites bytes.
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len);
        self.bytes[self.start + at..][..bytes.len()].copy_from_slice(bytes);
    }

    /// The address for a kernel.
    pub fn ptr(&mut self) -> *mut u8 {
        self.bytes[self.start..].as_mut_ptr()
    }

    /// The bytes, with the guards found untouched.
    pub fn bytes(&self) -> &[u8] {
        let (before, after) = (&self.bytes[..self.start], &self.bytes[self.start + self.len..]);
        assert!(before.iter().chain(after).all(|&b| b == GUARD_BYTE), "a kernel wrote outside its buffer");
        &self.bytes[self.start..self.start + self.len]
    }

    /// The contents as numbers.
    pub fn read(&self, ty: MemTy) -> Vec<f32> {
        self.bytes()
            .chunks_exact(ty.bytes())
            .map(|b| match ty {
                MemTy::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
                MemTy::F16 => half::f16::from_le_bytes([b[0], b[1]]).to_f32(),
                MemTy::Bf16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f32(),
                MemTy::I8 => b[0] as i8 as f32,
                MemTy::I32 => i32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f32,
            })
            .collect()
    }
}

/// Calls a kernel for the items `begin..end`.
pub fn call(
    object: &Object,
    symbol: &str,
    args: &mut [&mut Buf],
    dims: [i64; 2],
    items: std::ops::Range<i64>,
) {
    let kernel = object.symbol(symbol).expect("the object has the kernel");
    let args: Vec<*mut u8> = args.iter_mut().map(|buf| buf.ptr()).collect();
    // SAFETY: the buffers are as large as the kernel's spec says, which the tests check with guards.
    unsafe { kernel(args.as_ptr(), dims.as_ptr(), items.start, items.end) }
}

/// Numbers in -range..range.
pub fn random(rng: &mut ChaCha8Rng, len: usize, range: f32) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-range..range)).collect()
}

/// A generator that depends on the test and its shape.
pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// The numbers after a trip through `ty`.
pub fn through(values: &[f32], ty: MemTy) -> Vec<f32> {
    Buf::of(values, ty).read(ty)
}

/// Asserts that all numbers are within `abs + rel * |want|`.
pub fn assert_close(got: &[f32], want: &[f64], abs: f64, rel: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let error = (g as f64 - w).abs();
        assert!(error <= abs + rel * w.abs(), "{what}: element {i} is {g}, not {w}");
    }
}
