//! Rotary position embeddings: a table of cosines and sines per token, and the rotation of heads by it.
//!
//! The angle is the f32 product of the position and the inverse frequency, as the models were trained with; cosine and
//! sine of that f32 number are within 1.2e-7 for angles up to 2^20 (within 6e-7 up to 2^31).
use serde::{Deserialize, Serialize};

use crate::eexpr::F32;
use crate::spec::Rows;

/// Cosines and sines of the call's positions.
///
/// Arguments: positions `i32[t]`, inverse frequencies `f32[half]`, out `f32[t][2 * half]`: per token the cosines,
/// then the sines. Items: tokens.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct RopeTableSpec {
    /// Number of frequencies.
    pub half: u32,
    /// Factor on cosines and sines: 1, or the attention factor of a context extension.
    pub factor: F32,
}

/// Which columns of a head are rotated together.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeStyle {
    /// Column j and column j + rotary_dim / 2.
    Half,
    /// Columns 2j and 2j + 1.
    Interleaved,
}

/// Rotates the heads of each token: `(a, b)` becomes `(a cos - b sin, b cos + a sin)`. Columns from `rotary_dim` on
/// stay as they are.
///
/// Arguments: x `f32[t][x_stride]`, the table of [`RopeTableSpec`] with `half = rotary_dim / 2`, out
/// `f32[t][out_stride]`, which may be x itself when the strides are equal. Items: tokens.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct RopeSpec {
    /// Heads of a token.
    pub heads: u32,
    /// Width of a head.
    pub head_dim: u32,
    /// Columns of a head that are rotated; even.
    pub rotary_dim: u32,
    /// Which columns go together.
    pub style: RopeStyle,
    /// Elements from one row of x to the next.
    pub x_stride: u32,
    /// Elements from one row of out to the next.
    pub out_stride: u32,
    /// What counts the rows, where items do not tell: on GPUs.
    #[serde(default = "all_tokens", skip_serializing_if = "is_all_tokens")]
    pub rows: Rows,
}

fn all_tokens() -> Rows {
    Rows::T
}

fn is_all_tokens(rows: &Rows) -> bool {
    *rows == Rows::T
}

impl RopeTableSpec {
    /// Why no kernel can be emitted, if none can.
    pub fn check(&self) -> Result<(), String> {
        if self.half == 0 { Err("a table of no frequencies".to_owned()) } else { Ok(()) }
    }
}

impl RopeSpec {
    /// Rows that hold the heads and nothing else, all columns rotated.
    pub fn new(heads: u32, head_dim: u32, style: RopeStyle) -> RopeSpec {
        let width = heads * head_dim;
        let rows = Rows::T;
        RopeSpec { heads, head_dim, rotary_dim: head_dim, style, x_stride: width, out_stride: width, rows }
    }

    /// Why no kernel can be emitted, if none can.
    pub fn check(&self) -> Result<(), String> {
        let width = self.heads * self.head_dim;
        if width == 0 || self.x_stride < width || self.out_stride < width {
            return Err(format!("{} heads of {} in narrower rows", self.heads, self.head_dim));
        }
        if self.rotary_dim == 0 || !self.rotary_dim.is_multiple_of(2) || self.rotary_dim > self.head_dim {
            return Err(format!("{} rotated columns of {}", self.rotary_dim, self.head_dim));
        }
        Ok(())
    }
}

#[cfg(feature = "llvm")]
pub use emit::{emit_rope, emit_table};

#[cfg(feature = "llvm")]
mod emit {
    use inkwell::values::PointerValue;
    use quantc_ir::diag::{Diag, Result};

    use super::{RopeSpec, RopeStyle, RopeTableSpec};
    use crate::cpu::llvm::{Elem, IntCmp, Unit, Val, VecBuilder};
    use crate::eexpr::MemTy;
    use crate::eexpr::llvm::{Valid, load_mem, store_mem};

    /// Emits the kernel of `spec` as `symbol`.
    pub fn emit_table(unit: &Unit<'_>, spec: &RopeTableSpec, symbol: &str) -> Result<()> {
        spec.check().map_err(|e| Diag::bug(format!("no such rotation table: {e}")))?;
        let half = i64::from(spec.half);
        unit.kernel(symbol, |b| {
            let (positions, frequencies, out) = (b.arg(0), b.arg(1), b.arg(2));
            b.for_items(|i| {
                let position = b.load(b.row(positions, i, 4), Elem::I32, 1);
                let row = b.row(out, i, half * 8);
                vectors(b, half, |col, valid| {
                    let lanes = b.width();
                    let f = load_mem(b, b.row(frequencies, col, 4), MemTy::F32, lanes, valid);
                    let p = b.splat(b.sitofp(position, Elem::F32), lanes);
                    let (cos, sin) = cos_sin(b, b.fmul(p, f));
                    let factor = b.f32(lanes, spec.factor.get());
                    let to = b.row(row, col, 4);
                    store_mem(b, to, b.fmul(cos, factor), MemTy::F32, valid);
                    store_mem(b, b.offset(to, half * 4), b.fmul(sin, factor), MemTy::F32, valid);
                });
            });
            Ok(())
        })
    }

    /// Emits the kernel of `spec` as `symbol`.
    pub fn emit_rope(unit: &Unit<'_>, spec: &RopeSpec, symbol: &str) -> Result<()> {
        spec.check().map_err(|e| Diag::bug(format!("no such rotation: {e}")))?;
        let (d, rotary) = (i64::from(spec.head_dim), i64::from(spec.rotary_dim));
        let half = rotary / 2;
        unit.kernel(symbol, |b| {
            let (x, table, out) = (b.arg(0), b.arg(1), b.arg(2));
            b.for_items(|i| {
                let angles = b.row(table, i, rotary * 4);
                let from = b.row(x, i, i64::from(spec.x_stride) * 4);
                let to = b.row(out, i, i64::from(spec.out_stride) * 4);
                b.for_const(0, i64::from(spec.heads), 1, &[], |head, _| {
                    let (from, to) = (b.row(from, head, d * 4), b.row(to, head, d * 4));
                    vectors(b, half, |col, valid| {
                        let lanes = b.width();
                        let at = b.row(angles, col, 4);
                        let cos = load_mem(b, at, MemTy::F32, lanes, valid);
                        let sin = load_mem(b, b.offset(at, half * 4), MemTy::F32, lanes, valid);
                        match spec.style {
                            RopeStyle::Half => {
                                let (from, to) = (b.row(from, col, 4), b.row(to, col, 4));
                                let u = load_mem(b, from, MemTy::F32, lanes, valid);
                                let v = load_mem(b, b.offset(from, half * 4), MemTy::F32, lanes, valid);
                                let (y, z) = rotate(b, u, v, cos, sin);
                                store_mem(b, to, y, MemTy::F32, valid);
                                store_mem(b, b.offset(to, half * 4), z, MemTy::F32, valid);
                            }
                            RopeStyle::Interleaved => {
                                let (from, to) = (b.row(from, col, 8), b.row(to, col, 8));
                                interleaved(b, from, to, cos, sin, valid);
                            }
                        }
                    });
                    let (from, to) = (b.offset(from, rotary * 4), b.offset(to, rotary * 4));
                    vectors(b, d - rotary, |col, valid| {
                        let x = load_mem(b, b.row(from, col, 4), MemTy::F32, b.width(), valid);
                        store_mem(b, b.row(to, col, 4), x, MemTy::F32, valid);
                    });
                    vec![]
                });
            });
            Ok(())
        })
    }

    /// `(a cos - b sin, b cos + a sin)`.
    fn rotate<'c>(
        b: &VecBuilder<'_, 'c>,
        u: Val<'c>,
        v: Val<'c>,
        cos: Val<'c>,
        sin: Val<'c>,
    ) -> (Val<'c>, Val<'c>) {
        let minus = b.fneg(b.fmul(v, sin));
        (b.fma(u, cos, minus), b.fma(v, cos, b.fmul(u, sin)))
    }

    /// Rotates neighbours: two vectors of pairs in, two out.
    fn interleaved<'c>(
        b: &VecBuilder<'_, 'c>,
        from: PointerValue<'c>,
        to: PointerValue<'c>,
        cos: Val<'c>,
        sin: Val<'c>,
        valid: Valid<'c>,
    ) {
        let lanes = b.width();
        // Pairs that exist, in the first and in the second vector.
        let parts = match valid {
            Valid::First(n) => [(2 * n).min(lanes), (2 * n).saturating_sub(lanes)],
            _ => [lanes, lanes],
        };
        let second = |p: PointerValue<'c>| b.offset(p, i64::from(lanes) * 4);
        let first = b.load_partial(from, Elem::F32, lanes, parts[0]);
        let other = b.load_partial(second(from), Elem::F32, lanes, parts[1]);
        let pick = |odd: u32| (0..lanes).map(|l| 2 * l + odd).collect::<Vec<u32>>();
        let (u, v) = (b.shuffle(first, other, &pick(0)), b.shuffle(first, other, &pick(1)));
        let (y, z) = rotate(b, u, v, cos, sin);
        let zip = |start: u32| (0..lanes).map(|l| start + l / 2 + l % 2 * lanes).collect::<Vec<u32>>();
        b.store_partial(to, b.shuffle(y, z, &zip(0)), Elem::F32, parts[0]);
        b.store_partial(second(to), b.shuffle(y, z, &zip(lanes / 2)), Elem::F32, parts[1]);
    }

    /// Cosine and sine of f32 lanes. The angle is reduced in f64, where the reduction is exact up to 2^20 quarters.
    fn cos_sin<'c>(b: &VecBuilder<'_, 'c>, angle: Val<'c>) -> (Val<'c>, Val<'c>) {
        let n = b.lanes(angle);
        let double = |x: f64| b.bitcast(b.int(Elem::I64, n, x.to_bits() as i64), Elem::F64, n);
        let wide = b.fpext(angle, Elem::F64);
        // The nearest quarter turn, as a number and in the low bits of a float of that size.
        let magic = double(6_755_399_441_055_744.0);
        let shifted = b.fadd(b.fmul(wide, double(std::f64::consts::FRAC_2_PI)), magic);
        let quarters = b.fsub(shifted, magic);
        let quadrant = b.trunc(b.bitcast(shifted, Elem::I64, n), Elem::I32);
        // A quarter turn in two parts, the first of 33 bits.
        let part = b.fsub(wide, b.fmul(quarters, double(1.570_796_326_734_125_6)));
        let r = b.fsub(part, b.fmul(quarters, double(6.077_100_506_506_192e-11)));
        let r = b.fptrunc(r, Elem::F32);
        let r2 = b.fmul(r, r);
        let poly = |c: [f32; 3]| {
            let y = b.fma(b.f32(n, c[2]), r2, b.f32(n, c[1]));
            b.fma(y, r2, b.f32(n, c[0]))
        };
        let sin = b.fma(b.fmul(r2, r), poly([-0.166_666_5, 0.008_331_957, -1.949_342_8e-4]), r);
        let tail = b.fmul(b.fmul(r2, r2), poly([0.041_666_646, -0.001_388_734_1, 2.443_578e-5]));
        let cos = b.fadd(b.fma(r2, b.f32(n, -0.5), b.f32(n, 1.0)), tail);
        // Quadrant 1: cos, sin = -sin r, cos r; 2: both negated; 3: sin r, -cos r.
        let bit = |value: Val<'c>, mask: i32| b.icmp(IntCmp::NE, b.and(value, b.i32(n, mask)), b.i32(n, 0));
        let odd = bit(quadrant, 1);
        let (c, s) = (b.select(odd, sin, cos), b.select(odd, cos, sin));
        let c = b.select(bit(b.add(quadrant, b.i32(n, 1)), 2), b.fneg(c), c);
        let s = b.select(bit(quadrant, 2), b.fneg(s), s);
        (c, s)
    }

    /// Runs `body` for the vectors of `width` columns.
    fn vectors<'c>(b: &VecBuilder<'_, 'c>, width: i64, body: impl Fn(Val<'c>, Valid<'c>)) {
        let lanes = i64::from(b.width());
        let whole = width - width % lanes;
        b.for_const(0, whole, lanes, &[], |col, _| {
            body(col, Valid::All);
            vec![]
        });
        if whole < width {
            body(b.i64(whole), Valid::First((width - whole) as u32));
        }
    }
}

#[cfg(all(test, feature = "llvm"))]
mod tests {
    use super::*;
    use crate::cpu::testing::{Buf, assert_close, build, call, random, rng, runnable};
    use crate::eexpr::MemTy;

    #[test]
    fn table_of_angles() {
        for target in runnable() {
            for half in [1u32, 5, 16, 24, 32, 64] {
                let factor = 1.25f32;
                let spec = RopeTableSpec { half, factor: F32::new(factor) };
                let object = build(target, |unit| emit_table(unit, &spec, "k"));
                let positions = [0, 1, 2, 17, 511, 4095, 131_071, 1 << 20];
                let frequencies: Vec<f32> =
                    (0..half).map(|j| 10_000f32.powf(-(j as f32) / half as f32)).collect();
                let mut out = Buf::poisoned(positions.len() * 2 * half as usize * 4);
                let (mut p, mut f) = (Buf::ints(&positions), Buf::of(&frequencies, MemTy::F32));
                call(&object, "k", &mut [&mut p, &mut f, &mut out], [8, 8], 0..8);
                let mut want = Vec::new();
                for p in positions {
                    let angles = frequencies.iter().map(|f| f64::from(p as f32 * f));
                    want.extend(angles.clone().map(|a| a.cos() * f64::from(factor)));
                    want.extend(angles.map(|a| a.sin() * f64::from(factor)));
                }
                // 1.2e-7 times the factor, and the rounding of the product.
                assert_close(
                    &out.read(MemTy::F32),
                    &want,
                    2.2e-7,
                    0.0,
                    &format!("{} half {half}", target.name),
                );
            }
        }
    }

    #[test]
    fn angles_up_to_a_million_are_accurate() {
        for target in runnable() {
            let object = build(target, |unit| {
                emit_table(unit, &RopeTableSpec { half: 1, factor: F32::new(1.0) }, "k")
            });
            let positions: Vec<i32> = (0..50_000).map(|i| i * 20 + i % 7).collect();
            let mut out = Buf::poisoned(positions.len() * 8);
            let (mut p, mut f) = (Buf::ints(&positions), Buf::of(&[0.777], MemTy::F32));
            let t = positions.len() as i64;
            call(&object, "k", &mut [&mut p, &mut f, &mut out], [t, t], 0..t);
            let angle = |p: &i32| f64::from(*p as f32 * 0.777f32);
            let want: Vec<f64> = positions.iter().flat_map(|p| [angle(p).cos(), angle(p).sin()]).collect();
            assert_close(&out.read(MemTy::F32), &want, 1.2e-7, 0.0, target.name);
        }
    }

    #[test]
    fn heads_are_rotated_in_place_and_apart() {
        for target in runnable() {
            for style in [RopeStyle::Half, RopeStyle::Interleaved] {
                for (heads, d, rotary) in [
                    (1, 2, 2),
                    (3, 8, 8),
                    (2, 20, 20),
                    (2, 48, 48),
                    (4, 64, 64),
                    (2, 64, 16),
                    (2, 37, 26),
                    (1, 128, 128),
                ] {
                    let width = heads * d;
                    let spec = RopeSpec {
                        rotary_dim: rotary,
                        x_stride: width + 5,
                        out_stride: width + 5,
                        ..RopeSpec::new(heads, d, style)
                    };
                    let object = build(target, |unit| emit_rope(unit, &spec, "k"));
                    let (t, stride, d, half) = (5usize, width as usize + 5, d as usize, rotary as usize / 2);
                    let x = random(&mut rng(u64::from(width)), t * stride, 3.0);
                    let table = random(&mut rng(10), t * 2 * half, 1.0);
                    let mut want: Vec<f64> = x.iter().map(|&v| v.into()).collect();
                    for i in 0..t {
                        let angles = &table[i * 2 * half..(i + 1) * 2 * half];
                        for h in 0..heads as usize {
                            for j in 0..half {
                                let (u, v) = match style {
                                    RopeStyle::Half => (j, j + half),
                                    RopeStyle::Interleaved => (2 * j, 2 * j + 1),
                                };
                                let at = |c: usize| i * stride + h * d + c;
                                let (a, b) = (x[at(u)] as f64, x[at(v)] as f64);
                                let (c, s) = (angles[j] as f64, angles[half + j] as f64);
                                want[at(u)] = a * c - b * s;
                                want[at(v)] = b * c + a * s;
                            }
                        }
                    }
                    let what = format!("{} {spec:?}", target.name);
                    // Apart: the space between rows is not touched.
                    let (mut xb, mut tb) = (Buf::of(&x, MemTy::F32), Buf::of(&table, MemTy::F32));
                    let mut out = Buf::poisoned(t * stride * 4);
                    call(&object, "k", &mut [&mut xb, &mut tb, &mut out], [5, 5], 0..5);
                    assert_eq!(xb.read(MemTy::F32), x);
                    let got = out.read(MemTy::F32);
                    for (i, line) in got.chunks(stride).enumerate() {
                        let w = width as usize;
                        // Two products and a sum of numbers up to 3: three roundings.
                        assert_close(&line[..w], &want[i * stride..i * stride + w], 1e-6, 0.0, &what);
                        assert!(line[w..].iter().all(|v| v.is_nan()), "{what}");
                    }
                    // In place.
                    let address = xb.ptr();
                    let kernel = object.symbol("k").expect("the object has the kernel");
                    // SAFETY: the buffer holds five rows, the table five rows.
                    unsafe { kernel([address, tb.ptr(), address].as_ptr(), [5i64, 5].as_ptr(), 0, 5) };
                    assert_close(&xb.read(MemTy::F32), &want, 1e-6, 0.0, &what);
                }
            }
        }
    }

    #[test]
    fn malformed_specs_are_refused() {
        let good = RopeSpec::new(2, 16, RopeStyle::Half);
        assert_eq!(good.check(), Ok(()));
        for bad in [
            RopeSpec { heads: 0, ..good.clone() },
            RopeSpec { rotary_dim: 15, ..good.clone() },
            RopeSpec { rotary_dim: 18, ..good.clone() },
            RopeSpec { rotary_dim: 0, ..good.clone() },
            RopeSpec { x_stride: 31, ..good.clone() },
            RopeSpec { out_stride: 31, ..good.clone() },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
        assert!(RopeTableSpec { half: 0, factor: F32::new(1.0) }.check().is_err());
    }
}
