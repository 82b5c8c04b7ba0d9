//! Rows picked by an index: the kernel of [`GatherSpec`].

use super::expr::{alignment, load, wide, write};
use super::tile::{Access, Binary, Builder, Extent, Kernel, Val};
use crate::cpu::gather::GatherSpec;
use crate::cpu::math::Lanes;
use crate::eexpr::MemTy;
use quantc_ir::diag::{Diag, Result};

/// Threads of a block.
const THREADS: u32 = 128;

/// The kernel of `spec`, called `name`: a thread for some adjacent columns of a row.
///
/// Buffers are those of the spec; where rows are added, out is read and written. Scalar: `t`. Grid: a block for each
/// [`THREADS`] runs of columns of all tokens; no shared memory, no workspace.
pub fn build(name: &str, spec: &GatherSpec) -> Result<Kernel> {
    spec.check().map_err(|e| Diag::bug(format!("no such gather kernel: {e}")))?;
    let bytes = spec.ty.bytes() as u32;
    let width = alignment(&[spec.width, 16 / bytes]);
    let per_row = spec.width / width;
    let mut b = Builder::new(name, THREADS);
    let index = b.buffer("index", Access::Read);
    let table = b.buffer("table", Access::Read);
    let scales = (spec.ty == MemTy::I8).then(|| b.buffer("scales", Access::Read));
    let out = b.buffer("out", if spec.add { Access::Update } else { Access::Write });
    let t = b.scalar("t");
    b.grid(Extent::PerScalar { scalar: t, times: per_row, per: THREADS }, Extent::Fixed(1));
    let (block, thread) = (b.block_x(), b.thread());
    let item = b.mad(block, THREADS, thread);
    let tokens = b.scalar_value(t);
    let count = b.mul(tokens, per_row);
    let there = b.lt(item, count);
    b.when(there, |b| {
        let (token, run) = (b.div(item, per_row), b.rem(item, per_row));
        let at = b.mul(token, 4);
        let row = b.load(index, at, 4)[0];
        // As signed numbers: those below zero have the highest bit.
        let below = b.lt(i32::MAX as u32, row);
        let row = b.binary(Binary::Min, row, spec.table_rows - 1);
        let row = b.select(below, 0, row);
        let column = b.mul(run, width);
        let in_row = b.mul(column, bytes);
        let at = wide(b, row, spec.width * bytes, in_row);
        let mut values = load(b, table, at, spec.ty, width, alignment(&[width * bytes, spec.width * bytes]));
        if let Some(scales) = scales {
            let at = b.mul(row, 4);
            let scale = load(b, scales, at, MemTy::F32, 1, 4)[0];
            values = values.into_iter().map(|v| Lanes::mul(b, v, scale)).collect();
        }
        let in_row = b.mul(column, 4);
        let at = wide(b, token, spec.width * 4, in_row);
        let aligned = alignment(&[width * 4, spec.width * 4]);
        if spec.add {
            let before: Vec<Val> = load(b, out, at, MemTy::F32, width, aligned);
            values = values.into_iter().zip(before).map(|(v, before)| Lanes::add(b, before, v)).collect();
        }
        write(b, out, at, MemTy::F32, &values, aligned);
    });
    Ok(b.finish())
}
