//! Rotation of heads by their tokens' positions: the tables of [`RopeTableSpec`] and the rotation of [`RopeSpec`].
//!
//! As the specs say, an angle is the f32 product of position and frequency; its cosine and sine are within 2e-7 for angles
//! up to 2^20. Buffers are those of the specs; the scalar is `t`, tokens, or `r`, wanted rows.

use super::expr::{alignment, load, wide, write};
use super::tile::{Access, Binary, Builder, Extent, Kernel, Unary, Val};
use crate::cpu::math::Lanes;
use crate::cpu::rope::{RopeSpec, RopeStyle, RopeTableSpec};
use crate::eexpr::MemTy;
use crate::spec::Rows;
use quantc_ir::diag::{Diag, Result};

/// Threads of a block.
const THREADS: u32 = 128;

/// The kernel of a table, called `name`: a thread for each frequency of a token.
pub fn build_table(name: &str, spec: &RopeTableSpec) -> Result<Kernel> {
    spec.check().map_err(|e| Diag::bug(format!("no such rotation table: {e}")))?;
    let mut b = Builder::new(name, THREADS);
    let positions = b.buffer("positions", Access::Read);
    let frequencies = b.buffer("frequencies", Access::Read);
    let out = b.buffer("out", Access::Write);
    let t = b.scalar("t");
    b.grid(Extent::PerScalar { scalar: t, times: spec.half, per: THREADS }, Extent::Fixed(1));
    let (index, here) = item(&mut b, t, spec.half);
    let token = b.div(index, spec.half);
    let j = b.rem(index, spec.half);
    b.when(here, |b| {
        let at = b.mul(token, 4);
        let position = b.load(positions, at, 4)[0];
        let position = b.unary(Unary::IntToFloat, position);
        let at = b.mul(j, 4);
        let frequency = load(b, frequencies, at, MemTy::F32, 1, 4)[0];
        let angle = Lanes::mul(b, position, frequency);
        let (cos, sin) = cos_sin(b, angle);
        for (i, v) in [cos, sin].into_iter().enumerate() {
            let v = Lanes::mul(b, v, spec.factor.get().into());
            let in_row = b.mad(j, 4, i as u32 * spec.half * 4);
            let at = wide(b, token, spec.half * 8, in_row);
            write(b, out, at, MemTy::F32, &[v], 4);
        }
    });
    Ok(b.finish())
}

/// Index of this thread's item among `times` for each token, and whether there is such an item.
fn item(b: &mut Builder, t: u32, times: u32) -> (Val, Val) {
    let (block, thread) = (b.block_x(), b.thread());
    let index = b.mad(block, THREADS, thread);
    let tokens = b.scalar_value(t);
    let count = b.mul(tokens, times);
    (index, b.lt(index, count))
}

/// The kernel of a rotation, called `name`: a thread for some columns of a head that are rotated with as many others, or
/// that stay.
pub fn build(name: &str, spec: &RopeSpec) -> Result<Kernel> {
    spec.check().map_err(|e| Diag::bug(format!("no such rotation: {e}")))?;
    let half = spec.rotary_dim / 2;
    let rest = spec.head_dim - spec.rotary_dim;
    let parts = [half, rest, spec.head_dim, spec.x_stride, spec.out_stride];
    // As many columns as make 16 bytes, if all parts are made of such runs.
    let width = parts.iter().fold(4, |w, p| if *p == 0 { w } else { w.min(alignment(&[*p])) });
    let pairs = half / width;
    let items = pairs + rest / width;
    let mut b = Builder::new(name, THREADS);
    let x = b.buffer("x", Access::ReadBeforeWrite);
    let table = b.buffer("table", Access::Read);
    let out = b.buffer("out", Access::Write);
    let t = b.scalar(match spec.rows {
        Rows::T => "t",
        Rows::R => "r",
    });
    let times = spec.heads * items;
    b.grid(Extent::PerScalar { scalar: t, times, per: THREADS }, Extent::Fixed(1));
    let (index, here) = item(&mut b, t, times);
    let token = b.div(index, times);
    let of_token = b.rem(index, times);
    let head = b.div(of_token, items);
    let i = b.rem(of_token, items);
    let first = b.mul(i, width);
    let of_head = b.mul(head, spec.head_dim);
    let bytes = width * 4;
    let place = |b: &mut Builder, stride: u32, col: Val| {
        let col = b.add(of_head, col);
        let in_row = b.mul(col, 4);
        wide(b, token, stride * 4, in_row)
    };
    let rotated = b.lt(i, pairs);
    let rotated_here = b.binary(Binary::PAnd, here, rotated);
    b.when(rotated_here, |b| {
        let table_at = |b: &mut Builder, offset: u32| {
            let in_row = b.mad(first, 4, offset * 4);
            wide(b, token, spec.rotary_dim * 4, in_row)
        };
        let at = table_at(b, 0);
        let cos = load(b, table, at, MemTy::F32, width, alignment(&[bytes, spec.rotary_dim * 4]));
        let at = table_at(b, half);
        let sin = load(b, table, at, MemTy::F32, width, alignment(&[bytes, half * 4]));
        let columns = match spec.style {
            RopeStyle::Half => [first, b.add(first, half)],
            RopeStyle::Interleaved => {
                let at = b.mul(first, 2);
                [at, b.add(at, width)]
            }
        };
        let mut v = vec![];
        for col in columns {
            let at = place(b, spec.x_stride, col);
            v.extend(load(b, x, at, MemTy::F32, width, bytes));
        }
        let of_pair = |j: usize| match spec.style {
            RopeStyle::Half => (j, j + width as usize),
            RopeStyle::Interleaved => (2 * j, 2 * j + 1),
        };
        let mut y = v.clone();
        for j in 0..width as usize {
            let (p, q) = of_pair(j);
            let turned = Lanes::mul(b, v[q], sin[j]);
            let turned = b.neg(turned);
            y[p] = b.mul_add(v[p], cos[j], turned);
            let turned = Lanes::mul(b, v[p], sin[j]);
            y[q] = b.mul_add(v[q], cos[j], turned);
        }
        for (col, y) in columns.into_iter().zip(y.chunks(width as usize)) {
            let at = place(b, spec.out_stride, col);
            write(b, out, at, MemTy::F32, y, bytes);
        }
    });
    let stays = b.unary(Unary::PNot, rotated);
    let stays_here = b.binary(Binary::PAnd, here, stays);
    if rest > 0 {
        b.when(stays_here, |b| {
            let col = b.add(first, half);
            let at = place(b, spec.x_stride, col);
            let v = load(b, x, at, MemTy::F32, width, bytes);
            let at = place(b, spec.out_stride, col);
            write(b, out, at, MemTy::F32, &v, bytes);
        });
    }
    Ok(b.finish())
}

/// Cosine and sine of an angle that is not negative.
fn cos_sin(b: &mut Builder, angle: Val) -> (Val, Val) {
    // The nearest quarter turn, and what is left: a quarter turn in two parts, each product exact until it is added.
    let turns = Lanes::mul(b, angle, std::f32::consts::FRAC_2_PI.into());
    let quarters = b.round(turns);
    let quadrant = b.unary(Unary::FloatToInt, quarters);
    let high = std::f32::consts::FRAC_PI_2;
    let low = (std::f64::consts::FRAC_PI_2 - f64::from(high)) as f32;
    let r = b.mul_add(quarters, (-high).into(), angle);
    let r = b.mul_add(quarters, (-low).into(), r);
    let r2 = Lanes::mul(b, r, r);
    let r3 = Lanes::mul(b, r2, r);
    let r4 = Lanes::mul(b, r2, r2);
    let p = b.poly(r2, &[-0.166_666_5, 0.008_331_957, -1.949_342_8e-4]);
    let sin = b.mul_add(r3, p, r);
    let p = b.poly(r2, &[0.041_666_646, -0.001_388_734_1, 2.443_578e-5]);
    let tail = Lanes::mul(b, r4, p);
    let head = b.mul_add(r2, (-0.5).into(), 1.0.into());
    let cos = Lanes::add(b, head, tail);
    // Quadrant 1: cos, sin = -sin r, cos r; 2: both negated; 3: sin r, -cos r.
    let odd = b.and(quadrant, 1);
    let odd = b.lt(0, odd);
    let (c, s) = (b.select(odd, sin, cos), b.select(odd, cos, sin));
    let flip = |b: &mut Builder, quadrant: Val, v: Val| {
        let bit = b.and(quadrant, 2);
        let bit = b.lt(0, bit);
        let minus = b.neg(v);
        b.select(bit, minus, v)
    };
    let next = b.add(quadrant, 1);
    (flip(b, next, c), flip(b, quadrant, s))
}
