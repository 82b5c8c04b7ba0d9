//! Random codes of the formats of weights.

use half::{bf16, f16};
use quantc_codegen::spec::Code;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

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
