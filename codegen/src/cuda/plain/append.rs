//! Rows into caches: [`CacheAppendSpec`], a warp for each head of a token.

use super::{Pages, WARPS, across, float_to_e4m3, warp_item, word};
use crate::cpu::cache::{CacheAppendSpec, CacheTy};
use crate::cpu::math::Lanes;
use crate::cuda::expr::{load, wide, write};
use crate::cuda::tile::{Access, Binary, Builder, Extent, Kernel, Unary, Val, WARP};
use crate::eexpr::{MemTy, ReduceOp};
use quantc_ir::diag::{Diag, Result};

/// The kernel of `spec`, called `name`.
///
/// Buffers: x, positions, base, the table of pages, fixed scales where there are such, the state, and for other scales of
/// codes their state. The scalar is `t`.
pub fn build(name: &str, spec: &CacheAppendSpec) -> Result<Kernel> {
    spec.check().map_err(|e| Diag::bug(format!("no such append: {e}")))?;
    let mut b = Builder::new(name, WARPS * WARP);
    let x = b.buffer("x", Access::Read);
    let positions = b.buffer("positions", Access::Read);
    let base = b.buffer("base", Access::Read);
    let table = b.buffer("pages", Access::Read);
    let scaled = spec.ty.is_scaled();
    let fixed = (scaled && spec.fixed_scales).then(|| b.buffer("scales", Access::Read));
    let state = b.buffer("state", Access::Write);
    let scales = (scaled && fixed.is_none()).then(|| b.buffer("state_scales", Access::Write));
    let t = b.scalar("t");
    b.grid(Extent::PerScalar { scalar: t, times: spec.heads, per: WARPS }, Extent::Fixed(1));
    let width = spec.ty.width(spec.head_dim);
    let pages = Pages { ty: spec.ty, heads: spec.heads, width, base, table };

    let (item, here, lane) = warp_item(&mut b, t, spec.heads);
    let (token, head) = (b.div(item, spec.heads), b.rem(item, spec.heads));
    let position = word(&mut b, positions, token);
    let first = pages.base(&mut b, token);
    let row = pages.row(&mut b, first, position, head);
    let from = b.mul(head, spec.head_dim);
    // Each lane has columns 32 apart; beyond the last there are zeros.
    let rounds = width.div_ceil(WARP);
    let columns: Vec<(Val, Val)> = (0..rounds)
        .map(|i| {
            let col = b.add(lane, i * WARP);
            let inside = b.lt(col, spec.head_dim);
            let near = b.binary(Binary::Min, col, spec.head_dim - 1);
            let at = b.add(from, near);
            let at = b.mul(at, 4);
            let at = wide(&mut b, token, spec.x_stride * 4, at);
            let v = load(&mut b, x, at, MemTy::F32, 1, 4)[0];
            (col, b.select(inside, v, 0.0))
        })
        .collect();
    let scale = match (fixed, spec.ty.largest_code()) {
        (Some(fixed), _) => {
            let bits = word(&mut b, fixed, head);
            Some(b.unary(Unary::FromBits, bits))
        }
        (None, Some(most)) => {
            let mut largest: Val = 0.0.into();
            for &(_, v) in &columns {
                let size = b.abs(v);
                largest = b.select_lt(largest, size, size, largest);
            }
            let largest = across(&mut b, ReduceOp::AbsMax, largest);
            let scale = Lanes::div(&mut b, largest, most.into());
            let scale = Lanes::max(&mut b, scale, f32::MIN_POSITIVE.into());
            Some(b.select_lt(0.0.into(), largest, scale, 1.0.into()))
        }
        (None, None) => None,
    };
    for &(col, v) in &columns {
        let inside = b.lt(col, width);
        let here = b.binary(Binary::PAnd, here, inside);
        b.when(here, |b| {
            let at = pages.at(b, row, col);
            let v = scale.map_or(v, |scale| Lanes::div(b, v, scale));
            let ty = match spec.ty {
                CacheTy::F32 => MemTy::F32,
                CacheTy::F16 => MemTy::F16,
                CacheTy::Bf16 => MemTy::Bf16,
                CacheTy::I8 => MemTy::I8,
                CacheTy::E4m3 => {
                    let code = float_to_e4m3(b, v);
                    return b.store(state, at, &[code], 1);
                }
            };
            write(b, state, at, ty, &[v], ty.bytes() as u32);
        });
    }
    if let (Some(scales), Some(scale)) = (scales, scale) {
        let first = b.lt(lane, 1);
        let here = b.binary(Binary::PAnd, here, first);
        b.when(here, |b| {
            let at = wide(b, row, 4, 0.into());
            let bits = b.unary(Unary::Bits, scale);
            b.store(scales, at, &[bits], 4);
        });
    }
    Ok(b.finish())
}
