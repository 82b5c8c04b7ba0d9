//! What follows from a table entry: decoding, encoding, limits and packing.

use super::{ALL, Class, Format, Specials};
use half::{bf16, f16};
use std::sync::OnceLock;

impl Format {
    /// The number that `code` stands for. Bits above the format's are ignored.
    pub fn decode(&self, code: u32) -> f32 {
        let code = code & self.mask();
        match self.class {
            Class::Int { .. } => self.int_value(code) as f32,
            Class::Exponent => match code {
                0xff => f32::NAN,
                // 2^-127 is subnormal.
                0 => f32::from_bits(1 << 22),
                _ => f32::from_bits(code << 23),
            },
            Class::Float { man, .. } if self.bits == 32 => {
                debug_assert_eq!(man, 23);
                f32::from_bits(code)
            }
            Class::Float { exp, man, bias, .. } => {
                let sign = (code >> (exp + man)) << 31;
                if self.is_nan_code(code) {
                    // The payload stays, so that patterns of NaN survive a round trip.
                    return f32::from_bits(sign | 0x7f80_0000 | (code & ((1 << man) - 1)) << (23 - man));
                }
                match (exp, man) {
                    (5, 10) => return f16::from_bits(code as u16).to_f32(),
                    (8, 7) => return bf16::from_bits(code as u16).to_f32(),
                    _ => {}
                }
                let e = (code >> man & ((1 << exp) - 1)) as i32;
                let m = code & ((1 << man) - 1);
                let magnitude = match self.infinity_code() {
                    Some(inf) if code & (self.mask() >> 1) == inf => f32::INFINITY,
                    // Subnormal: m * 2^(1 - bias - man); else (2^man + m) * 2^(e - bias - man).
                    _ if e == 0 => m as f32 * exp2(1 - bias - man as i32),
                    _ => (m | 1 << man) as f32 * exp2(e - bias - man as i32),
                };
                f32::from_bits(magnitude.to_bits() | sign)
            }
        }
    }

    /// The code nearest to `x`, halfway cases to the even code.
    ///
    /// - Finite numbers beyond the largest finite number become that number, with their sign; below the range of
    ///   unsigned formats they become the least code.
    /// - Infinities become the largest finite number in formats of at most 8 bits (the saturating conversion of OFP8)
    ///   and in integers, and stay infinities in the wider IEEE 754 formats.
    /// - NaN becomes the format's NaN of the same sign, or code 0 where there is none.
    ///
    /// This is the conversion for *codes*. A cast between plain float types follows IEEE 754, which overflows to
    /// infinity instead.
    pub fn encode(&self, x: f32) -> u32 {
        match self.class {
            Class::Int { .. } => {
                // `as` saturates, and turns NaN into 0.
                let (min, max) = self.int_range();
                (x.round_ties_even() as i32).clamp(min, max) as u32 & self.mask()
            }
            Class::Exponent => encode_exponent(x),
            Class::Float { exp, man, bias, .. } => {
                let magnitude = x.abs();
                let sign = (x.to_bits() >> 31) << (exp + man);
                if x.is_nan() {
                    return self.nan_code(x).map_or(0, |code| sign | code);
                }
                if self.bits > 8 && magnitude == f32::INFINITY {
                    return sign | self.infinity_code().unwrap_or(self.max_code());
                }
                let code = match (exp, man) {
                    (8, 23) => magnitude.to_bits(),
                    (5, 10) => u32::from(f16::from_f32(magnitude).to_bits()),
                    (8, 7) => u32::from(bf16::from_f32(magnitude).to_bits()),
                    _ => encode_magnitude(magnitude.to_bits(), man, bias),
                };
                sign | code.min(self.max_code())
            }
        }
    }

    /// The largest finite number.
    pub fn max(&self) -> f32 {
        self.decode(self.max_code())
    }

    /// The smallest finite number: for floats `-max`, for unsigned integers 0, for powers of two the least power.
    pub fn min(&self) -> f32 {
        match self.class {
            Class::Int { .. } => self.int_range().0 as f32,
            Class::Float { .. } => -self.max(),
            Class::Exponent => self.decode(0),
        }
    }

    /// Whether `code` is not a number.
    pub fn is_nan_code(&self, code: u32) -> bool {
        match self.class {
            Class::Int { .. } => false,
            Class::Exponent => code & self.mask() == 0xff,
            Class::Float { .. } => {
                code & (self.mask() >> 1) > self.infinity_code().unwrap_or(self.max_code())
            }
        }
    }

    /// The least and greatest integer of an integer format, and `(0, 0)` for others.
    pub fn int_range(&self) -> (i32, i32) {
        match self.class {
            Class::Int { signed: true } => (-(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1),
            Class::Int { signed: false } => (0, self.mask() as i32),
            _ => (0, 0),
        }
    }

    /// The integer that `code` stands for in an integer format.
    pub fn int_value(&self, code: u32) -> i32 {
        let code = code & self.mask();
        if self.is_signed_int() {
            let unused = 32 - self.bits;
            (code << unused) as i32 >> unused
        } else {
            code as i32
        }
    }

    /// The code of an integer, saturating.
    pub fn int_code(&self, value: i32) -> u32 {
        let (min, max) = self.int_range();
        value.clamp(min, max) as u32 & self.mask()
    }

    /// The number of every code of a format of at most 8 bits; entries above the mask repeat those below.
    pub fn decode_table(&self) -> Option<&'static [f32; 256]> {
        static TABLES: OnceLock<Vec<[f32; 256]>> = OnceLock::new();
        if self.bits > 8 {
            return None;
        }
        let tables = TABLES.get_or_init(|| {
            let table = |f: &&Format| std::array::from_fn(|code| f.decode(code as u32));
            ALL.iter().map(table).collect()
        });
        tables.get(ALL.iter().position(|&f| f == self)?)
    }

    /// Bytes of `n` packed codes.
    pub fn packed_len(&self, n: usize) -> usize {
        // No overflow: at most 8 bits, or n codes that already lie in memory as 32 bits each.
        (n / 8) * self.bits as usize + (n % 8 * self.bits as usize).div_ceil(8)
    }

    /// Packs codes of at most 8 bits, given one a byte, as a bit stream from the least significant bit on. Bits left
    /// over in the last byte are 0.
    ///
    /// # Panics
    /// If the format has more than 8 bits or `out` is not [`packed_len`](Self::packed_len) long.
    pub fn pack(&self, codes: &[u8], out: &mut [u8]) {
        assert!(self.bits <= 8, "{self} has wide codes");
        assert_eq!(out.len(), self.packed_len(codes.len()));
        let mask = self.mask() as u8;
        match self.bits {
            8 => out.copy_from_slice(codes),
            bits => {
                // Eight codes fill whole bytes.
                for (codes, out) in codes.chunks(8).zip(out.chunks_mut(bits as usize)) {
                    let word = codes.iter().rev().fold(0u64, |w, &c| w << bits | u64::from(c & mask));
                    out.copy_from_slice(&word.to_le_bytes()[..out.len()]);
                }
            }
        }
    }

    /// Reads packed codes of at most 8 bits, one a byte of `out`.
    ///
    /// # Panics
    /// If the format has more than 8 bits or `bytes` is not [`packed_len`](Self::packed_len) long.
    pub fn unpack(&self, bytes: &[u8], out: &mut [u8]) {
        assert!(self.bits <= 8, "{self} has wide codes");
        assert_eq!(bytes.len(), self.packed_len(out.len()));
        let mask = self.mask() as u8;
        match self.bits {
            8 => out.copy_from_slice(bytes),
            4 => {
                for (pair, &b) in out.chunks_mut(2).zip(bytes) {
                    pair[0] = b & 15;
                    if let [_, high] = pair {
                        *high = b >> 4;
                    }
                }
            }
            bits => {
                for (out, bytes) in out.chunks_mut(8).zip(bytes.chunks(bits as usize)) {
                    let mut word = [0; 8];
                    word[..bytes.len()].copy_from_slice(bytes);
                    let mut word = u64::from_le_bytes(word);
                    for code in out {
                        *code = word as u8 & mask;
                        word >>= bits;
                    }
                }
            }
        }
    }

    /// Packs codes of any width; see [`pack`](Self::pack).
    ///
    /// # Panics
    /// If `out` is not [`packed_len`](Self::packed_len) long.
    pub fn pack_wide(&self, codes: &[u32], out: &mut [u8]) {
        assert_eq!(out.len(), self.packed_len(codes.len()));
        let (mut word, mut held, mut at) = (0u64, 0, 0);
        for &code in codes {
            word |= u64::from(code & self.mask()) << held;
            held += self.bits;
            while held >= 8 {
                out[at] = word as u8;
                at += 1;
                word >>= 8;
                held -= 8;
            }
        }
        if held > 0 {
            out[at] = word as u8;
        }
    }

    /// Reads packed codes of any width; see [`unpack`](Self::unpack).
    ///
    /// # Panics
    /// If `bytes` is not [`packed_len`](Self::packed_len) long.
    pub fn unpack_wide(&self, bytes: &[u8], out: &mut [u32]) {
        assert_eq!(bytes.len(), self.packed_len(out.len()));
        let (mut word, mut held, mut at) = (0u64, 0, 0);
        for code in out {
            while held < self.bits {
                word |= u64::from(bytes[at]) << held;
                at += 1;
                held += 8;
            }
            *code = word as u32 & self.mask();
            word >>= self.bits;
            held -= self.bits;
        }
    }

    /// The code of the largest finite number.
    fn max_code(&self) -> u32 {
        match self.class {
            Class::Int { .. } => self.int_range().1 as u32,
            Class::Exponent => 0xfe,
            Class::Float { exp, man, specials, .. } => match specials {
                Specials::Ieee => (((1 << exp) - 1) << man) - 1,
                Specials::NanNoInf => (1 << (exp + man)) - 2,
                Specials::None => (1 << (exp + man)) - 1,
            },
        }
    }

    /// The code of positive infinity.
    fn infinity_code(&self) -> Option<u32> {
        match self.class {
            Class::Float { exp, man, specials: Specials::Ieee, .. } => Some(((1 << exp) - 1) << man),
            _ => None,
        }
    }

    /// The code, without sign, of the NaN `x`: as much of its payload as fits, else the quiet NaN.
    fn nan_code(&self, x: f32) -> Option<u32> {
        let Class::Float { man, specials, .. } = self.class else { return None };
        match specials {
            Specials::None => None,
            Specials::NanNoInf => Some(self.mask() >> 1),
            Specials::Ieee => {
                let payload = (x.to_bits() & 0x7f_ffff) >> (23 - man);
                Some(self.infinity_code()? | if payload == 0 { 1 << (man - 1) } else { payload })
            }
        }
    }
}

/// `2^n` for `n` in the range of normal numbers.
fn exp2(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// The code of a finite or infinite magnitude in a format of `man` fraction bits, before saturation.
///
/// With `e` the exponent and `m * 2^(e - 23)` the value, `m >> (23 - man)` is the fraction with its leading one at
/// weight `2^man`. Adding it to `(e + bias - 1) << man` gives the code, and a carry out of the fraction becomes the
/// next exponent. Below the smallest normal exponent the shift grows instead.
fn encode_magnitude(bits: u32, man: u32, bias: i32) -> u32 {
    let e = (bits >> 23) as i32 - 127;
    if e < -126 {
        // A subnormal single is far below half of the least number of any narrow format.
        return 0;
    }
    let m = bits & 0x7f_ffff | 0x80_0000;
    let below = (1 - bias - e).max(0) as u32;
    let shift = 23 - man + below;
    if shift > 24 {
        return 0;
    }
    let rounded = (m + (1 << (shift - 1)) - 1 + (m >> shift & 1)) >> shift;
    rounded + (((e.max(1 - bias) + bias - 1) as u32) << man)
}

/// The exponent code of the power of two nearest to `x`; halfway, 1.5 times a power, goes to the even code. Numbers
/// that are not positive become the least power.
fn encode_exponent(x: f32) -> u32 {
    if x.is_nan() {
        return 0xff;
    }
    if x <= 0.0 {
        return 0;
    }
    let bits = x.to_bits();
    if bits < 1 << 23 {
        // In units of 2^-127 a subnormal is bits / 2^22.
        return u32::from(bits > 3 << 21);
    }
    let (e, m) = (bits >> 23, bits & 0x7f_ffff);
    let up = m > 1 << 22 || (m == 1 << 22 && e & 1 == 1);
    (e + u32::from(up)).min(0xfe)
}
