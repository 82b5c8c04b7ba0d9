//! Codes of the formats of weights: random ones, and what they stand for by the definition of each format.

use half::{bf16, f16};
use quantc_codegen::spec::{Code, E2M1};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// The value of a code, without scale and zero point.
pub fn value(code: Code, bytes: &[u8]) -> f64 {
    let small = |bits: u8, mantissa: u32, bias: i32| {
        let sign = if bits & 0x80 != 0 { -1.0 } else { 1.0 };
        let exponent = i32::from((bits & 0x7f) >> mantissa);
        let m = f64::from(bits & ((1 << mantissa) - 1)) / f64::from(1 << mantissa);
        let size =
            if exponent == 0 { m * 2f64.powi(1 - bias) } else { (1.0 + m) * 2f64.powi(exponent - bias) };
        sign * size
    };
    match code {
        Code::F32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
        Code::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        Code::Bf16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        Code::U8 | Code::U4 => f64::from(bytes[0]),
        Code::Lut4 => f64::from(E2M1[bytes[0] as usize]),
        Code::E4m3 => small(bytes[0], 3, 7),
        Code::E5m2 => small(bytes[0], 2, 15),
    }
}

/// A random code that is a finite number; of floats the stored bytes.
pub fn random_code(code: Code, rng: &mut ChaCha8Rng) -> Vec<u8> {
    match code {
        Code::F32 => rng.random_range(-2f32..2.0).to_le_bytes().to_vec(),
        // Subnormals too.
        Code::F16 if rng.random_ratio(1, 4) => (rng.random_range(0..0x400u16)).to_le_bytes().to_vec(),
        Code::F16 => f16::from_f32(rng.random_range(-2f32..2.0)).to_le_bytes().to_vec(),
        Code::Bf16 => bf16::from_f32(rng.random_range(-2f32..2.0)).to_le_bytes().to_vec(),
        Code::U8 => vec![rng.random()],
        Code::U4 | Code::Lut4 => vec![rng.random_range(0..16)],
        Code::E4m3 => loop {
            let c: u8 = rng.random();
            if c & 0x7f != 0x7f {
                return vec![c];
            }
        },
        Code::E5m2 => loop {
            let c: u8 = rng.random();
            if c & 0x7c != 0x7c {
                return vec![c];
            }
        },
    }
}
