//! What the tests of kernels share: buffers of numbers, and comparing what a kernel wrote.

use half::{bf16, f16};
use quantc_codegen::cuda::interp::{self, Memory, Schedule};
use quantc_codegen::cuda::tile::{Kernel, Stmt};
use quantc_codegen::eexpr::MemTy;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Random numbers as they lie in memory, and their values.
pub fn numbers(ty: MemTy, count: usize, rng: &mut ChaCha8Rng) -> (Vec<u8>, Vec<f32>) {
    let values: Vec<f32> = (0..count)
        .map(|_| {
            let x = rng.random_range(-3f32..3.0);
            match ty {
                MemTy::F32 => x,
                MemTy::F16 => f16::from_f32(x).to_f32(),
                MemTy::Bf16 => bf16::from_f32(x).to_f32(),
                MemTy::I8 | MemTy::I32 => rng.random_range(-128..=127) as f32,
            }
        })
        .collect();
    (encode(ty, &values), values)
}

/// Numbers as they lie in memory.
pub fn encode(ty: MemTy, values: &[f32]) -> Vec<u8> {
    let bytes = |&x: &f32| match ty {
        MemTy::F32 => x.to_le_bytes().to_vec(),
        MemTy::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
        MemTy::Bf16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        MemTy::I8 => vec![x as i8 as u8],
        MemTy::I32 => (x as i32).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

/// The values of numbers in memory.
pub fn decode(ty: MemTy, data: &[u8]) -> Vec<f64> {
    let value = |c: &[u8]| match ty {
        MemTy::F32 => f64::from(f32::from_le_bytes([c[0], c[1], c[2], c[3]])),
        MemTy::F16 => f16::from_le_bytes([c[0], c[1]]).to_f64(),
        MemTy::Bf16 => bf16::from_le_bytes([c[0], c[1]]).to_f64(),
        MemTy::I8 => f64::from(c[0] as i8),
        MemTy::I32 => f64::from(i32::from_le_bytes([c[0], c[1], c[2], c[3]])),
    };
    data.chunks_exact(ty.bytes()).map(value).collect()
}

/// Runs a kernel in several orders of its warps; all must give the same bytes.
pub fn run(kernel: &Kernel, buffers: &[Vec<u8>], scalars: &[u32]) -> Memory {
    let schedules = [Schedule::Behind, Schedule::Random(1)];
    let go = |schedule| {
        interp::run(kernel, buffers, scalars, schedule)
            .unwrap_or_else(|fault| panic!("{} in order {schedule:?}: {fault}", kernel.name))
    };
    let first = go(Schedule::Turns);
    for schedule in schedules {
        let other = go(schedule);
        for (i, (a, b)) in first.buffers.iter().zip(&other.buffers).enumerate() {
            assert!(a.data == b.data, "{}: buffer {i} depends on the order {schedule:?}", kernel.name);
        }
    }
    first
}

/// How near a result must be.
#[derive(Clone, Copy, Debug)]
pub struct Near {
    /// Of the reference's size.
    pub relative: f64,
    /// Whatever the size.
    pub absolute: f64,
}

/// Compares what a kernel wrote with a reference, which has NaN where nothing may be written.
pub fn compare(what: &str, ty: MemTy, got: &interp::Bytes, want: &[f64], near: Near) {
    let values = decode(ty, &got.data);
    assert_eq!(values.len(), want.len(), "{what}: size");
    for (i, (&got_value, &want)) in values.iter().zip(want).enumerate() {
        let written = &got.written[i * ty.bytes()..(i + 1) * ty.bytes()];
        assert!(written.iter().all(|&w| w != want.is_nan()), "{what}: element {i} written: {written:?}");
        let limit = near.absolute + near.relative * want.abs();
        let differs = (got_value - want).abs() > limit && got_value != want;
        assert!(want.is_nan() || !differs, "{what}: element {i} is {got_value}, not {want} within {limit}");
    }
}

/// How many statements of a kind a kernel has.
pub fn count(body: &[Stmt], is: &impl Fn(&Stmt) -> bool) -> usize {
    let of = |s: &Stmt| match s {
        Stmt::If(_, a, b) => count(a, is) + count(b, is),
        Stmt::For { body, .. } => count(body, is),
        s => usize::from(is(s)),
    };
    body.iter().map(of).sum()
}
