//! Integer dot products of unsigned weights and signed activations, four k a lane, exact on every target.

use inkwell::values::PointerValue;
use quantc_ir::target::Dot;

use crate::cpu::llvm::{Elem, Val, VecBuilder};
use crate::spec::Code;

/// Four activations, ready to meet any number of weight vectors.
#[derive(Clone, Copy)]
pub(super) enum Act<'c> {
    /// The four bytes in every lane.
    Bytes(Val<'c>),
    /// The even and the odd bytes, as pairs of i16 in every lane.
    Pairs(Val<'c>, Val<'c>),
}

/// Weights of one lane's four k.
#[derive(Clone, Copy)]
pub(super) enum Quad<'c> {
    /// As bytes.
    Bytes(Val<'c>),
    /// The even and the odd bytes, as pairs of i16.
    Pairs(Val<'c>, Val<'c>),
}

/// Spreads the four activations at `ptr` over a vector.
pub(super) fn activations<'c>(b: &VecBuilder<'_, 'c>, dot: Dot, ptr: PointerValue<'c>) -> Act<'c> {
    let quad = b.splat(b.load_aligned(ptr, Elem::I32, 1, 1), b.width());
    match dot {
        Dot::Vnni | Dot::Maddubs => Act::Bytes(quad),
        Dot::Widening => {
            let halves = b.width() * 2;
            let v = b.bitcast(quad, Elem::I16, halves);
            let eight = b.int(Elem::I16, halves, 8);
            Act::Pairs(b.ashr(b.shl(v, eight), eight), b.ashr(v, eight))
        }
    }
}

/// The quads of one vector of one step: two for four-bit codes, in order of k.
pub(super) fn quads<'c>(
    b: &VecBuilder<'_, 'c>,
    dot: Dot,
    code: Code,
    ptr: PointerValue<'c>,
) -> Vec<Quad<'c>> {
    let lanes = b.width();
    let v = b.load(ptr, Elem::I32, lanes);
    match (dot, code.bits()) {
        (Dot::Vnni | Dot::Maddubs, 4) => {
            let mask = b.i32(lanes, 0x0f0f_0f0f);
            vec![Quad::Bytes(b.and(v, mask)), Quad::Bytes(b.and(b.lshr(v, b.i32(lanes, 4)), mask))]
        }
        (Dot::Vnni | Dot::Maddubs, _) => vec![Quad::Bytes(v)],
        (Dot::Widening, bits) => {
            let halves = lanes * 2;
            let v = b.bitcast(v, Elem::I16, halves);
            let right = |by| b.lshr(v, b.int(Elem::I16, halves, by));
            let mask = b.int(Elem::I16, halves, if bits == 4 { 0x0f } else { 0xff });
            if bits == 4 {
                vec![
                    Quad::Pairs(b.and(v, mask), b.and(right(8), mask)),
                    Quad::Pairs(b.and(right(4), mask), right(12)),
                ]
            } else {
                vec![Quad::Pairs(b.and(v, mask), right(8))]
            }
        }
    }
}

/// `sum` plus the products of some quads of one vector with one row's activations, `act(i)` those that meet quad `i`.
pub(super) fn accumulate<'c>(
    b: &VecBuilder<'_, 'c>,
    dot: Dot,
    sum: Val<'c>,
    weights: &[Quad<'c>],
    act: impl Fn(u32) -> Act<'c>,
) -> Val<'c> {
    let mut sum = sum;
    // Products of a pair fit in i16 as long as weights are below 16: eight of them still do.
    let mut narrow: Option<(Val<'c>, u32)> = None;
    for (weight, i) in weights.iter().zip(0..) {
        match (*weight, act(i)) {
            (Quad::Bytes(w), Act::Bytes(a)) if dot == Dot::Vnni => {
                sum = b.vpdpbusd(sum, w, a);
            }
            (Quad::Bytes(w), Act::Bytes(a)) => {
                let product = b.pmaddubsw(w, a);
                narrow = Some(match narrow {
                    None => (product, 1),
                    Some((before, n)) => (b.add(before, product), n + 1),
                });
                if let Some((all, 8)) = narrow {
                    sum = b.add(sum, widen(b, all));
                    narrow = None;
                }
            }
            (Quad::Pairs(we, wo), Act::Pairs(ae, ao)) => {
                sum = b.add(sum, b.add(b.pmaddwd(we, ae), b.pmaddwd(wo, ao)));
            }
            _ => unreachable!("weights and activations are prepared for the same dot"),
        }
    }
    match narrow {
        Some((all, _)) => b.add(sum, widen(b, all)),
        None => sum,
    }
}

/// Adjacent i16 summed to i32.
fn widen<'c>(b: &VecBuilder<'_, 'c>, v: Val<'c>) -> Val<'c> {
    b.pmaddwd(v, b.int(Elem::I16, b.width() * 2, 1))
}
