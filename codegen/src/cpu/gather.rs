//! Rows picked by an index: embeddings out of tables.
use serde::{Deserialize, Serialize};

use crate::eexpr::MemTy;

/// `out[i] = table[index[i]]`, one row per token.
///
/// Arguments: index `i32[t]` (tokens or positions), table, for an `I8` table the scales `f32[table_rows]`, out
/// `f32[t][width]`. Items: tokens. An index outside the table gives the nearest row, so that no token can make the
/// kernel read elsewhere.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct GatherSpec {
    /// Columns of a row.
    pub width: u32,
    /// Rows of the table.
    pub table_rows: u32,
    /// Type of the table: `F32`, `F16`, `Bf16`, or `I8` with one scale per row.
    pub ty: MemTy,
    /// Whether the row is added to what `out` holds: position embeddings on top of token embeddings.
    pub add: bool,
}

impl GatherSpec {
    /// Why no kernel can be emitted, if none can.
    pub fn check(&self) -> Result<(), String> {
        match self.ty {
            _ if self.width == 0 || self.table_rows == 0 || self.table_rows > i32::MAX as u32 => {
                Err(format!("a table of {} x {}", self.table_rows, self.width))
            }
            MemTy::F32 | MemTy::F16 | MemTy::Bf16 | MemTy::I8 => Ok(()),
            MemTy::I32 => Err("a table of i32".to_owned()),
        }
    }
}

#[cfg(feature = "llvm")]
pub use emit::emit_gather;

#[cfg(feature = "llvm")]
mod emit {
    use quantc_ir::diag::{Diag, Result};

    use super::GatherSpec;
    use crate::cpu::llvm::{Elem, Unit, Val, VecBuilder};
    use crate::eexpr::MemTy;
    use crate::eexpr::llvm::{Valid, load_mem, store_mem};

    /// Emits the kernel of `spec` as `symbol`.
    pub fn emit_gather(unit: &Unit<'_>, spec: &GatherSpec, symbol: &str) -> Result<()> {
        spec.check().map_err(|e| Diag::bug(format!("no such gather kernel: {e}")))?;
        let (width, size) = (i64::from(spec.width), spec.ty.bytes() as i64);
        let scaled = spec.ty == MemTy::I8;
        unit.kernel(symbol, |b| {
            let (index, table) = (b.arg(0), b.arg(1));
            let scales = scaled.then(|| b.arg(2));
            let out = b.arg(if scaled { 3 } else { 2 });
            b.for_items(|i| {
                let row = b.load(b.row(index, i, 4), Elem::I32, 1);
                let row = b.smin(b.smax(row, b.i32(1, 0)), b.i32(1, spec.table_rows as i32 - 1));
                let row = b.sext(row, Elem::I64);
                let scale = scales.map(|s| b.load(b.row(s, row, 4), Elem::F32, 1));
                let (from, to) = (b.row(table, row, width * size), b.row(out, i, width * 4));
                vectors(b, width, |col, lanes, valid| {
                    let mut x = load_mem(b, b.row(from, col, size), spec.ty, lanes, valid);
                    if let Some(scale) = scale {
                        x = b.fmul(x, b.splat(scale, lanes));
                    }
                    let to = b.row(to, col, 4);
                    if spec.add {
                        x = b.fadd(load_mem(b, to, MemTy::F32, lanes, valid), x);
                    }
                    store_mem(b, to, x, MemTy::F32, valid);
                });
            });
            Ok(())
        })
    }

    /// Runs `body` for the vectors of a row: first column, lanes, and which of them exist.
    fn vectors<'c>(b: &VecBuilder<'_, 'c>, width: i64, body: impl Fn(Val<'c>, u32, Valid<'c>)) {
        let lanes = i64::from(b.width());
        let whole = width - width % lanes;
        b.for_const(0, whole, lanes, &[], |col, _| {
            body(col, lanes as u32, Valid::All);
            vec![]
        });
        if whole < width {
            body(b.i64(whole), lanes as u32, Valid::First((width - whole) as u32));
        }
    }
}

#[cfg(all(test, feature = "llvm"))]
mod tests {
    use super::*;
    use crate::cpu::testing::{Buf, build, call, random, rng, runnable, through};

    #[test]
    fn rows_of_a_table() {
        for target in runnable() {
            for width in [1u32, 3, 17, 48, 64, 172, 288] {
                for ty in [MemTy::F32, MemTy::F16, MemTy::Bf16, MemTy::I8] {
                    for add in [false, true] {
                        let spec = GatherSpec { width, table_rows: 11, ty, add };
                        let object = build(target, |unit| emit_gather(unit, &spec, "k"));
                        let w = width as usize;
                        let table = through(&random(&mut rng(width.into()), 11 * w, 100.0), ty);
                        let scales = random(&mut rng(8), 11, 1.0);
                        // The last two are outside and give the first and the last row.
                        let index = [3, 0, 10, 3, -5, 4000];
                        let before = random(&mut rng(9), 6 * w, 1.0);
                        let mut out =
                            if add { Buf::of(&before, MemTy::F32) } else { Buf::poisoned(6 * w * 4) };
                        let (mut i, mut tb) = (Buf::ints(&index), Buf::of(&table, ty));
                        let mut sb = Buf::of(&scales, MemTy::F32);
                        let mut args = vec![&mut i, &mut tb];
                        if ty == MemTy::I8 {
                            args.push(&mut sb);
                        }
                        args.push(&mut out);
                        call(&object, "k", &mut args, [6, 6], 0..6);
                        let mut want = Vec::new();
                        for (i, row) in [3, 0, 10, 3, 0, 10].into_iter().enumerate() {
                            want.extend((0..w).map(|c| {
                                let x = table[row * w + c] * if ty == MemTy::I8 { scales[row] } else { 1.0 };
                                if add { before[i * w + c] + x } else { x }
                            }));
                        }
                        assert_eq!(out.read(MemTy::F32), want, "{} {spec:?}", target.name);
                    }
                }
            }
        }
    }

    #[test]
    fn malformed_specs_are_refused() {
        let table = GatherSpec { width: 8, table_rows: 4, ty: MemTy::F32, add: false };
        assert!(GatherSpec { width: 0, ..table.clone() }.check().is_err());
        assert!(GatherSpec { table_rows: 0, ..table.clone() }.check().is_err());
        assert!(GatherSpec { ty: MemTy::I32, ..table }.check().is_err());
    }
}
