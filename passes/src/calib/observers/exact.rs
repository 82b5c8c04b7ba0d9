//! Sums without rounding.
//!
//! A single is `m * 2^k` with an integer `m` below `2^24`, and `k` is one of 254 exponents: a fixed-point number of 277
//! bits holds any single, one of 554 bits any square, and 64 bits more hold the sum of as many as a counter counts. So
//! the sum does not depend on the order of the numbers, nor on how they are divided among partial sums.

/// A natural number of `64 * N` bits, least digit first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exact<const N: usize>([u64; N]);

/// Sum of magnitudes of singles, in units of `2^-149`.
pub(super) type Sum = Exact<6>;

/// Sum of squares of singles, in units of `2^-298`.
pub(super) type SumOfSquares = Exact<10>;

/// The bits that the largest single has in units of `2^-149`.
const SINGLE_BITS: usize = 277;

/// A magnitude as `m * 2^shift` units of `2^-149`.
#[inline(always)]
pub(super) fn parts(x: f32) -> (u64, usize) {
    let bits = x.to_bits() & 0x7fff_ffff;
    let exponent = (bits >> 23) as usize;
    let hidden = u32::from(exponent != 0) << 23;
    (u64::from(bits & 0x7f_ffff | hidden), shift_of(exponent))
}

/// The shift that belongs to a biased exponent; subnormal numbers have that of the least normal ones.
#[inline(always)]
pub(super) fn shift_of(exponent: usize) -> usize {
    exponent.max(1) - 1
}

impl Sum {
    /// Whether it can be the sum of `n` finite magnitudes.
    pub fn is_of(&self, n: u64) -> bool {
        self.below(n, SINGLE_BITS)
    }

    pub fn to_f64(self) -> f64 {
        self.scaled(-149)
    }
}

impl SumOfSquares {
    /// Adds the square of a finite number.
    #[inline(always)]
    pub fn add_square(&mut self, x: f32) {
        let (m, shift) = parts(x);
        self.add(m * m, 2 * shift);
    }

    /// Whether it can be the sum of the squares of `n` finite numbers.
    pub fn is_of(&self, n: u64) -> bool {
        self.below(n, 2 * SINGLE_BITS)
    }

    /// Rounded to nearest, halfway cases to even.
    pub fn to_f64(self) -> f64 {
        self.scaled(-298)
    }
}

impl<const N: usize> Exact<N> {
    /// The bytes that it is written as.
    pub const BYTES: usize = 8 * N;

    pub const ZERO: Exact<N> = Exact([0; N]);

    /// Adds `value * 2^shift`. The sum must have room.
    #[inline(always)]
    pub fn add(&mut self, value: u64, shift: usize) {
        let wide = u128::from(value) << (shift & 63);
        let at = shift >> 6;
        let (digit, carry) = self.0[at].overflowing_add(wide as u64);
        self.0[at] = digit;
        // The upper half of a shifted u64 is below 2^63: it has room for the carry.
        let mut carry = (wide >> 64) as u64 + u64::from(carry);
        let mut at = at + 1;
        while carry != 0 && at < N {
            let (digit, over) = self.0[at].overflowing_add(carry);
            self.0[at] = digit;
            carry = u64::from(over);
            at += 1;
        }
    }

    /// Adds another sum. There must be room.
    pub fn add_all(&mut self, other: &Exact<N>) {
        let mut carry = 0;
        for (a, &b) in self.0.iter_mut().zip(&other.0) {
            let sum = u128::from(*a) + u128::from(b) + carry;
            *a = sum as u64;
            carry = sum >> 64;
        }
    }

    /// `self - other` for an `other` that is not larger.
    pub fn less(&self, other: &Exact<N>) -> Exact<N> {
        let mut out = *self;
        let mut borrow = false;
        for (a, &b) in out.0.iter_mut().zip(&other.0) {
            let (d, under) = a.overflowing_sub(b);
            let (d, under_too) = d.overflowing_sub(u64::from(borrow));
            *a = d;
            borrow = under || under_too;
        }
        out
    }

    /// Whether it is above `other`.
    pub fn above(&self, other: &Exact<N>) -> bool {
        self.0.iter().rev().gt(other.0.iter().rev())
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        for digit in self.0 {
            out.extend(digit.to_le_bytes());
        }
    }

    /// Reads [`BYTES`](Self::BYTES) bytes.
    pub fn read(bytes: &[u8]) -> Exact<N> {
        let (digits, _) = bytes.as_chunks::<8>();
        Exact(std::array::from_fn(|i| digits.get(i).map_or(0, |d| u64::from_le_bytes(*d))))
    }

    /// Whether it is a sum of `n` numbers below `2^bits`; of no numbers, whether it is 0.
    fn below(&self, n: u64, bits: usize) -> bool {
        let mut bound = Exact::<N>::ZERO;
        bound.add(n, bits);
        *self == Exact::ZERO || bound.above(self)
    }

    /// The number times `2^exponent`, rounded once to nearest, halfway cases to even.
    fn scaled(&self, exponent: i32) -> f64 {
        let Some(top) = (0..N).rev().find(|&i| self.0[i] != 0) else { return 0.0 };
        // The 64 bits from the highest one on; whether anything lies below them goes into the lowest, which is far
        // below the last bit of a double.
        let zeros = self.0[top].leading_zeros();
        let digit = |i: usize| u128::from(if i <= top { self.0[top - i] } else { 0 });
        let pair = (digit(0) << 64 | if top > 0 { digit(1) } else { 0 }) << zeros;
        let rest = pair as u64 != 0 || self.0[..top.saturating_sub(1)].iter().any(|&d| d != 0);
        let bits = (pair >> 64) as u64 | u64::from(rest);
        let exponent = exponent + 64 * top as i32 - zeros as i32;
        // The exponents that occur are far from both ends of a double's.
        bits as f64 * f64::from_bits(((1023 + exponent) as u64) << 52)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sum(xs: &[f32]) -> Sum {
        let mut sum = Sum::ZERO;
        for &x in xs {
            let (m, shift) = parts(x);
            sum.add(m, shift);
        }
        sum
    }

    fn squares(xs: &[f32]) -> SumOfSquares {
        let mut sum = SumOfSquares::ZERO;
        xs.iter().for_each(|&x| sum.add_square(x));
        sum
    }

    fn finite() -> impl Strategy<Value = f32> {
        any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |x| x.is_finite())
    }

    #[test]
    fn nothing_is_lost_beside_large_numbers() {
        let tiny = f32::from_bits(1);
        let mut s = sum(&[f32::MAX, tiny, f32::MAX]);
        s = s.less(&sum(&[f32::MAX]));
        s = s.less(&sum(&[f32::MAX]));
        assert_eq!(s, sum(&[tiny]));
        assert_eq!(s.to_f64(), f64::from(tiny));
        assert_eq!(squares(&[tiny]).to_f64(), f64::from(tiny).powi(2));
        assert_eq!(squares(&[f32::MAX]).to_f64(), f64::from(f32::MAX).powi(2));
    }

    #[test]
    fn carries_go_all_the_way() {
        // 2^64 - 1 largest singles fit, and so do as many squares.
        let mut s = Sum::ZERO;
        s.add(u64::MAX, 253);
        assert_eq!(s.to_f64(), 2f64.powi(64 + 253 - 149));
        let one = sum(&[1.0]);
        let mut all = Exact([u64::MAX, u64::MAX, 0, 0, 0, 0]);
        all.add(1, 0);
        assert_eq!(all, Exact([0, 0, 1, 0, 0, 0]));
        all.add_all(&one);
        assert_eq!(all.less(&one), Exact([0, 0, 1, 0, 0, 0]));
        assert!(all.above(&one) && !one.above(&all) && !one.above(&one));
    }

    #[test]
    fn impossible_sums_are_told() {
        assert!(sum(&[f32::MAX]).is_of(1));
        assert!(!sum(&[f32::MAX]).is_of(0));
        assert!(!sum(&[f32::MAX, f32::MAX]).is_of(1));
        assert!(squares(&[f32::MAX, f32::MAX]).is_of(2));
        assert!(!squares(&[f32::MAX, f32::MAX]).is_of(1));
    }

    proptest! {
        /// A double holds the square of a single, and its addition is rounded once: so is the exact sum of two.
        #[test]
        fn two_squares(a in finite(), b in finite()) {
            let (x, y) = (f64::from(a), f64::from(b));
            prop_assert_eq!(squares(&[a, b]).to_f64(), x * x + y * y);
            prop_assert_eq!(sum(&[a, b]).to_f64(), x.abs() + y.abs());
        }

        /// Integers, whose sums fit 128 bits.
        #[test]
        fn integers(xs in prop::collection::vec(any::<i32>().prop_map(|x| (x >> 7) as f32), 0..200)) {
            let (mut all, mut all_squares) = (0u128, 0u128);
            for &x in &xs {
                all += u128::from((x as i64).unsigned_abs());
                all_squares += (x as i64 as i128).pow(2) as u128;
            }
            prop_assert_eq!(sum(&xs).to_f64(), all as f64);
            prop_assert_eq!(squares(&xs).to_f64(), all_squares as f64);
        }

        #[test]
        fn any_order_and_any_split(xs in prop::collection::vec(finite(), 0..60), cut in 0usize..60) {
            let cut = cut.min(xs.len());
            let back: Vec<f32> = xs.iter().rev().copied().collect();
            let mut parts = squares(&xs[cut..]);
            parts.add_all(&squares(&xs[..cut]));
            prop_assert_eq!(squares(&back), parts);
            prop_assert!(parts.is_of(xs.len() as u64));
            let mut bytes = vec![];
            parts.write(&mut bytes);
            prop_assert_eq!(bytes.len(), SumOfSquares::BYTES);
            prop_assert_eq!(SumOfSquares::read(&bytes), parts);
        }
    }
}
