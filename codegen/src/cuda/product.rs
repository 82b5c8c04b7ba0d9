//! What kernels of products have in common: their arguments, and copying rows and weights.

use super::expr::{Frame, wide};
use super::layout::{FragmentLayout, Meets};
use super::tile::{Access, Binary, Builder, Mem, Unary, Val};
use super::warp::WarpTile;
use crate::spec::{AFmt, MatmulSpec, bf16_row_stride, i8_row_stride};

/// The buffers of a product, in the order of [`MatmulSpec`].
pub(super) struct Arguments<'a> {
    pub a: Mem,
    /// Scales and sums of rows of bytes.
    pub rows: Option<(Mem, Mem)>,
    pub weights: Vec<Mem>,
    pub frame: Frame<'a>,
}

impl<'a> Arguments<'a> {
    /// Declares them, and the scalars `t` and `r`.
    pub fn declare(b: &mut Builder, spec: &'a MatmulSpec) -> Arguments<'a> {
        let a = b.buffer("a", Access::Read);
        let rows = (spec.a == AFmt::I8Token)
            .then(|| (b.buffer("a_scale", Access::Read), b.buffer("a_sums", Access::Read)));
        let weights = (0..spec.products()).map(|i| b.buffer(&format!("w{i}"), Access::Read)).collect();
        let frame = Frame::declare(b, &spec.epilogue, true);
        b.scalar("t");
        b.scalar("r");
        Arguments { a, rows, weights, frame }
    }
}

/// The numbers of `count` tiles of output columns from `first` on, in blocks of `block`; the last one again beyond the end.
pub(super) fn tile_numbers(
    b: &mut Builder,
    layout: &FragmentLayout,
    first: Val,
    count: u32,
    block: u32,
) -> Vec<Val> {
    let number = |i: u32| {
        let tile = b.add(first, i);
        if layout.tiles().is_multiple_of(block) {
            tile
        } else {
            b.binary(Binary::Min, tile, layout.tiles() - 1)
        }
    };
    (0..count).map(number).collect()
}

/// Row `token` of the call, or the last one, and whether it is there.
pub(super) fn token(b: &mut Builder, token: Val, m: Val) -> (Val, Val) {
    let there = b.lt(token, m);
    let last = b.binary(Binary::Sub, m, 1);
    (b.binary(Binary::Min, token, last), there)
}

/// Bytes from one row of activations to the next.
pub(super) fn row_stride(layout: &FragmentLayout) -> u32 {
    match layout.meets {
        Meets::Bf16 => bf16_row_stride(layout.k) * 2,
        Meets::Bytes => i8_row_stride(layout.k),
    }
}

/// Copies `bytes` of a row of activations from byte `in_row` on; zeros beyond the end of k or where the row is not there.
pub(super) fn copy_token(
    b: &mut Builder,
    warp: &WarpTile<'_>,
    a: Mem,
    (token, there): (Val, Val),
    in_row: Val,
    to: Val,
    bytes: u32,
) {
    let layout = &warp.layout;
    let mut valid: Val = bytes.into();
    if !layout.k.is_multiple_of(super::layout::UNIT) {
        let end = layout.k * warp.token_bytes();
        let inside = b.lt(in_row, end);
        let left = b.binary(Binary::Sub, end, in_row);
        let left = b.binary(Binary::Min, left, bytes);
        valid = b.select(inside, left, 0);
    }
    let valid = b.select(there, valid, 0);
    let at = wide(b, token, row_stride(layout), in_row);
    b.cp_async(to, a, at, bytes, valid);
}

/// Where the record of a scale group and of rows g and g + 8 lies in a matrix, in a tile that begins at `start`.
pub(super) fn record(b: &mut Builder, layout: &FragmentLayout, start: Val, group: Val, g: Val) -> Val {
    let row = b.mad(group, 8, g);
    let in_tile = b.mad(row, layout.record_bytes(), layout.codes_bytes());
    plus(b, start, in_tile)
}

/// A wide offset and a narrow one.
pub(super) fn plus(b: &mut Builder, start: Val, offset: Val) -> Val {
    let offset = b.unary(Unary::Widen, offset);
    b.binary(Binary::Add64, start, offset)
}
