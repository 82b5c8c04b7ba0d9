//! exp, tanh, erf and what is made of them, as straight-line arithmetic on f32 lanes.
//!
//! The functions are written once over [`Lanes`]: the LLVM emitter implements it with vectors, the interpreter with
//! plain f32 values, so both run the same operations in the same order. All operations are exact IEEE ones, so a
//! result does not depend on the width of the vector; the only thing that differs between targets is whether
//! [`Lanes::mul_add`] rounds once or twice.
//!
//! Accuracy, checked by the tests over the whole range: exp within 1.5 ulp with fused multiply-add (2 without),
//! subnormal results included; tanh and erf within 3e-7 absolute. NaN gives NaN, infinities the limits.

use quantc_ir::formats::E4M3;

/// Operations on f32 lanes, each rounded to nearest even.
pub trait Lanes {
    /// A value, or a vector of them.
    type V: Copy;

    /// The same constant in all lanes.
    fn constant(&mut self, x: f32) -> Self::V;
    /// `a + b`.
    fn add(&mut self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(&mut self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(&mut self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(&mut self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once if the target can.
    fn mul_add(&mut self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Square root.
    fn sqrt(&mut self, a: Self::V) -> Self::V;
    /// Absolute value.
    fn abs(&mut self, a: Self::V) -> Self::V;
    /// `-a`.
    fn neg(&mut self, a: Self::V) -> Self::V;
    /// The magnitude of `a` with the sign of `sign`.
    fn copysign(&mut self, a: Self::V, sign: Self::V) -> Self::V;
    /// `a < b ? x : y`, lane by lane; `y` where `a` or `b` is NaN.
    fn select_lt(&mut self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// The float with the bits of `a` shifted left by 23.
    fn bits_shl_23(&mut self, a: Self::V) -> Self::V;
    /// The nearest number of OCP E4M3, ties to even; beyond 448 the largest. NaN stays NaN.
    fn round_e4m3(&mut self, a: Self::V) -> Self::V;

    /// Nearest integer, ties to even.
    fn round(&mut self, a: Self::V) -> Self::V {
        // Above 2^23 every float is an integer; below, adding 2^23 leaves no room for a fraction.
        let limit = self.constant(8_388_608.0);
        let size = self.abs(a);
        let up = self.add(size, limit);
        let rounded = self.sub(up, limit);
        let signed = self.copysign(rounded, a);
        self.select_lt(size, limit, signed, a)
    }

    /// `a > b ? a : b`.
    fn max(&mut self, a: Self::V, b: Self::V) -> Self::V {
        self.select_lt(b, a, a, b)
    }

    /// `a < b ? a : b`.
    fn min(&mut self, a: Self::V, b: Self::V) -> Self::V {
        self.select_lt(a, b, a, b)
    }

    /// `c[0] + c[1] x + c[2] x^2 + ..`
    fn poly(&mut self, x: Self::V, c: &[f32]) -> Self::V {
        let Some((&last, rest)) = c.split_last() else { return self.constant(0.0) };
        let mut y = self.constant(last);
        for &k in rest.iter().rev() {
            let k = self.constant(k);
            y = self.mul_add(y, x, k);
        }
        y
    }
}

/// 1.5 * 2^23: added to a small float it leaves the nearest integer in the low bits.
const MAGIC: f32 = 12_582_912.0;

/// `e^x`.
pub fn exp<L: Lanes>(l: &mut L, x: L::V) -> L::V {
    // Beyond these the result is zero or infinity, and the integer below would leave its range. NaN passes both.
    let (low, high) = (l.constant(-104.0), l.constant(89.0));
    let x = l.select_lt(x, low, low, x);
    let x = l.select_lt(high, x, high, x);
    // x = n ln 2 + r, |r| <= ln 2 / 2. The upper part of ln 2 has 10 bits, so n times it is exact even unfused.
    let log2e = l.constant(std::f32::consts::LOG2_E);
    let magic = l.constant(MAGIC);
    let scaled = l.mul(x, log2e);
    let shifted = l.add(scaled, magic);
    let n = l.sub(shifted, magic);
    let (hi, lo) = (l.constant(-0.693_359_4), l.constant(2.121_944_4e-4));
    let r = l.mul_add(n, hi, x);
    let r = l.mul_add(n, lo, r);
    // e^r = 1 + (r + r^2 q(r)): the small part is summed first.
    let q = l.poly(r, &[0.499_999_89, 0.166_665_18, 0.041_669_544, 0.008_368_987, 0.001_375_115]);
    let r2 = l.mul(r, r);
    let tail = l.mul_add(q, r2, r);
    let one = l.constant(1.0);
    let e = l.add(tail, one);
    // 2^n in two exact factors, so that subnormal results round once and overflow gives infinity.
    let half = l.constant(0.5);
    let n1 = l.mul(n, half);
    let n1 = l.add(n1, magic);
    let n1 = l.sub(n1, magic);
    let n2 = l.sub(n, n1);
    let p1 = pow2(l, n1);
    let p2 = pow2(l, n2);
    let e = l.mul(e, p1);
    l.mul(e, p2)
}

/// `2^n` for whole n in -126..=127.
fn pow2<L: Lanes>(l: &mut L, n: L::V) -> L::V {
    let bias = l.constant(MAGIC + 127.0);
    let biased = l.add(n, bias);
    l.bits_shl_23(biased)
}

/// `1 / (1 + e^-x)`.
pub fn sigmoid<L: Lanes>(l: &mut L, x: L::V) -> L::V {
    let minus = l.neg(x);
    let e = exp(l, minus);
    let one = l.constant(1.0);
    let d = l.add(e, one);
    l.div(one, d)
}

/// `x * sigmoid(x)`.
pub fn silu<L: Lanes>(l: &mut L, x: L::V) -> L::V {
    let minus = l.neg(x);
    let e = exp(l, minus);
    let one = l.constant(1.0);
    let d = l.add(e, one);
    l.div(x, d)
}

/// Hyperbolic tangent.
pub fn tanh<L: Lanes>(l: &mut L, x: L::V) -> L::V {
    let t = l.abs(x);
    // Small: x + x^3 p(x^2). There the other form would cancel.
    let t2 = l.mul(t, t);
    let p = l.poly(t2, &[-0.333_332_8, 0.133_314_32, -0.053_739_157, 0.020_637_86, -0.005_704_042_5]);
    let t3 = l.mul(t2, t);
    let small = l.mul_add(p, t3, t);
    // Large: 1 - 2 / (e^2x + 1).
    let (one, two, limit) = (l.constant(1.0), l.constant(2.0), l.constant(0.625));
    let t_twice = l.add(t, t);
    let e = exp(l, t_twice);
    let d = l.add(e, one);
    let f = l.div(two, d);
    let large = l.sub(one, f);
    let y = l.select_lt(t, limit, small, large);
    l.copysign(y, x)
}

/// The error function.
pub fn erf<L: Lanes>(l: &mut L, x: L::V) -> L::V {
    let t = l.abs(x);
    let t2 = l.mul(t, t);
    let p = l.poly(
        t2,
        &[
            std::f32::consts::FRAC_2_SQRT_PI,
            -0.376_126_32,
            0.112_836_71,
            -0.026_858_032,
            0.005_197_642_6,
            -8.104_442e-4,
            8.209_797e-5,
        ],
    );
    let small = l.mul(p, t);
    // From 4 on the result is 1 in f32. Between, 1 - e^p(t) with p close to the logarithm of erfc.
    let (four, one, limit) = (l.constant(4.0), l.constant(1.0), l.constant(0.93));
    let t_low = l.select_lt(four, t, four, t);
    let p = l.poly(
        t_low,
        &[
            -1.952_643e-4,
            -1.127_678_9,
            -0.637_173_6,
            -0.103_942_39,
            0.022_233_925,
            -0.003_045_495,
            1.962_299_1e-4,
        ],
    );
    let e = exp(l, p);
    let large = l.sub(one, e);
    let y = l.select_lt(t, limit, small, large);
    l.copysign(y, x)
}

/// `0.5 x (1 + erf(x / sqrt 2))`.
pub fn gelu_erf<L: Lanes>(l: &mut L, x: L::V) -> L::V {
    let (s, half) = (l.constant(std::f32::consts::FRAC_1_SQRT_2), l.constant(0.5));
    let scaled = l.mul(x, s);
    let e = erf(l, scaled);
    let h = l.mul(x, half);
    l.mul_add(h, e, h)
}

/// `0.5 x (1 + tanh(u))`, `u = sqrt(2 / pi) (x + 0.044715 x^3)`, computed as `x / (1 + e^-2u)`.
pub fn gelu_tanh<L: Lanes>(l: &mut L, x: L::V) -> L::V {
    let x2 = l.mul(x, x);
    let (c1, c3) = (l.constant(-1.595_769), l.constant(-0.071_354_814));
    let u = l.mul_add(x2, c3, c1);
    let u = l.mul(u, x);
    let e = exp(l, u);
    let one = l.constant(1.0);
    let d = l.add(e, one);
    l.div(x, d)
}

/// One lane: plain f32 arithmetic.
#[derive(Clone, Copy, Debug)]
pub struct Scalar {
    /// Whether `mul_add` rounds once, as on targets with fused multiply-add.
    pub fused: bool,
}

impl Lanes for Scalar {
    type V = f32;

    fn constant(&mut self, x: f32) -> f32 {
        x
    }
    fn add(&mut self, a: f32, b: f32) -> f32 {
        a + b
    }
    fn sub(&mut self, a: f32, b: f32) -> f32 {
        a - b
    }
    fn mul(&mut self, a: f32, b: f32) -> f32 {
        a * b
    }
    fn div(&mut self, a: f32, b: f32) -> f32 {
        a / b
    }
    fn mul_add(&mut self, a: f32, b: f32, c: f32) -> f32 {
        match self.fused {
            true => a.mul_add(b, c),
            false => a * b + c,
        }
    }
    fn sqrt(&mut self, a: f32) -> f32 {
        a.sqrt()
    }
    fn abs(&mut self, a: f32) -> f32 {
        a.abs()
    }
    fn neg(&mut self, a: f32) -> f32 {
        -a
    }
    fn copysign(&mut self, a: f32, sign: f32) -> f32 {
        a.copysign(sign)
    }
    fn select_lt(&mut self, a: f32, b: f32, x: f32, y: f32) -> f32 {
        match a < b {
            true => x,
            false => y,
        }
    }
    fn bits_shl_23(&mut self, a: f32) -> f32 {
        f32::from_bits(a.to_bits() << 23)
    }
    fn round_e4m3(&mut self, a: f32) -> f32 {
        E4M3.decode(E4M3.encode(a))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit patterns spread over all floats, plus the neighbourhoods where the functions change form.
    fn samples() -> impl Iterator<Item = f32> {
        let spread = (0..=u32::MAX).step_by(2999).map(f32::from_bits);
        let fine = (-2_100_000..2_100_000).map(|i| i as f32 * 5.1e-5);
        let special = [
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MAX,
            f32::MIN,
            0.625,
            0.93,
            4.0,
            88.722_84,
            1e-40,
        ];
        spread.chain(fine).chain(special)
    }

    /// Distance in units of the last place of the f32 nearest to `want` (of the smallest subnormal below those).
    fn ulps(got: f32, want: f64) -> f64 {
        let nearest = want as f32;
        if got == nearest || (got.is_nan() && want.is_nan()) {
            return (if nearest.is_finite() { (got as f64 - want).abs() } else { 0.0 }) / ulp(nearest);
        }
        // Rounding to infinity begins half an ulp above the largest float.
        if nearest.is_infinite() || got.is_infinite() {
            return if (got as f64 - want).abs() < 1e32 { 1.0 } else { f64::INFINITY };
        }
        (got as f64 - want).abs() / ulp(nearest)
    }

    fn ulp(x: f32) -> f64 {
        match x.is_finite() {
            true => (f32::from_bits(x.abs().to_bits() + 1) as f64 - x.abs() as f64).min(2f64.powi(104)),
            false => 1.0,
        }
    }

    #[test]
    fn exp_is_within_two_ulp() {
        for (fused, limit) in [(true, 1.5), (false, 2.0)] {
            let mut l = Scalar { fused };
            let mut worst = (0.0, 0.0);
            for x in samples() {
                let e = ulps(exp(&mut l, x), (x as f64).exp());
                assert!(!e.is_nan(), "exp({x}) = {}", exp(&mut l, x));
                if e > worst.0 {
                    worst = (e, x);
                }
            }
            assert!(worst.0 <= limit, "fused {fused}: {} ulp at {}", worst.0, worst.1);
        }
    }

    #[test]
    fn tanh_and_erf_are_within_3e_7() {
        for fused in [true, false] {
            let mut l = Scalar { fused };
            for x in samples() {
                let w = x as f64;
                let (t, e) = (tanh(&mut l, x), erf(&mut l, x));
                if x.is_nan() {
                    assert!(t.is_nan() && e.is_nan());
                    continue;
                }
                assert!((t as f64 - w.tanh()).abs() <= 3e-7, "tanh({x}) = {t}");
                assert!((e as f64 - libm::erf(w)).abs() <= 3e-7, "erf({x}) = {e}");
            }
        }
    }

    #[test]
    fn activations_follow_their_definitions() {
        let mut l = Scalar { fused: true };
        for x in samples().filter(|x| x.is_finite() && x.abs() < 1e18) {
            let w = x as f64;
            let close = |got: f32, want: f64, abs: f64, what: &str| {
                assert!(
                    (got as f64 - want).abs() <= abs + 6e-7 * want.abs(),
                    "{what}({x}) = {got}, not {want}"
                );
            };
            close(sigmoid(&mut l, x), 1.0 / (1.0 + (-w).exp()), 2e-38, "sigmoid");
            close(silu(&mut l, x), w / (1.0 + (-w).exp()), 1e-36, "silu");
            // The definition cancels for large negative x: what erf errs is halved and multiplied by x, up to the
            // point where the result vanishes.
            close(gelu_erf(&mut l, x), 0.5 * w * (1.0 + libm::erf(w / 2f64.sqrt())), 1e-6, "gelu_erf");
            let u = (2.0 / std::f64::consts::PI).sqrt() * (w + 0.044715 * w * w * w);
            close(gelu_tanh(&mut l, x), w / (1.0 + (-2.0 * u).exp()), 1e-6, "gelu_tanh");
        }
    }

    #[test]
    fn round_is_half_to_even() {
        let mut l = Scalar { fused: false };
        for x in samples() {
            let r = l.round(x);
            assert!(r.to_bits() == x.round_ties_even().to_bits() || (r.is_nan() && x.is_nan()), "{x}: {r}");
        }
    }
}
