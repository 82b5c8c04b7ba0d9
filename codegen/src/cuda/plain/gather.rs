//! Rows of tables: [`GatherSpec`], a thread for a few columns of a row.

use crate::cpu::gather::GatherSpec;
use crate::cuda::expr::{alignment, load, wide, write};
use crate::cuda::tile::{Access, Binary, Builder, Extent, Kernel};
use crate::eexpr::MemTy;
use quantc_ir::diag::{Diag, Result};

/// Threads of a block.
const THREADS: u32 = 128;

/// The kernel of `spec`, called `name`. Buffers are those of the spec; the scalar is `t`.
pub fn build(name: &str, spec: &GatherSpec) -> Result<Kernel> {
    spec.check().map_err(|e| Diag::bug(format!("no such gather: {e}")))?;
    if spec.add || matches!(spec.ty, MemTy::I8 | MemTy::I32) {
        return Err(Diag::target(format!("rows of a table of {} have no CUDA kernel", spec.ty.name())));
    }
    let bytes = spec.ty.bytes() as u32;
    let columns = [4, 2, 1].into_iter().find(|c| spec.width.is_multiple_of(*c)).unwrap_or(1);
    let per_row = spec.width / columns;
    let mut b = Builder::new(name, THREADS);
    let index = b.buffer("index", Access::Read);
    let table = b.buffer("table", Access::Read);
    let out = b.buffer("out", Access::Write);
    let t = b.scalar("t");
    b.grid(Extent::PerScalar { scalar: t, times: per_row, per: THREADS }, Extent::Fixed(1));
    let (block, thread) = (b.block_x(), b.thread());
    let item = b.mad(block, THREADS, thread);
    let tokens = b.scalar_value(t);
    let count = b.mul(tokens, per_row);
    let here = b.lt(item, count);
    b.when(here, |b| {
        let token = b.div(item, per_row);
        let part = b.rem(item, per_row);
        let col = b.mul(part, columns);
        let row = super::word(b, index, token);
        // An index outside of the table gives the nearest row; negative ones are large unsigned numbers.
        let negative = b.shr(row, 31);
        let negative = b.lt(0, negative);
        let row = b.binary(Binary::Min, row, spec.table_rows - 1);
        let row = b.select(negative, 0, row);
        let in_row = b.mul(col, bytes);
        let at = wide(b, row, spec.width * bytes, in_row);
        let aligned = alignment(&[columns * bytes]);
        let values = load(b, table, at, spec.ty, columns, aligned);
        let in_row = b.mul(col, 4);
        let at = wide(b, token, spec.width * 4, in_row);
        write(b, out, at, MemTy::F32, &values, alignment(&[columns * 4]));
    });
    Ok(b.finish())
}
