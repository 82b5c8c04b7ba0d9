//! Makes products with constant matrices products with weights.

use super::rebuild::{Rebuild, rebuild, tell_found};
use crate::pass::prelude::*;
use quantc_ir::ops::{Add, MatMul, Slice};

pass! {
    /// Makes products with constant matrices products with weights.
    ///
    /// `dot` with a matrix that is the same in every run becomes `matmul`, whose weight has a row for each column of the
    /// result: the matrix turned, which a matrix that was turned for the product is already. Parts of the columns of a
    /// product that nothing reads as a whole, such as queries, keys and values that come from one matrix, become products
    /// with parts of the weight.
    ///
    /// ```qir before
    /// weight @w : tensor<2x2xf32> = inline [[1, 2], [3, 4]]
    /// %y = dot %x, @w
    /// ```
    /// ```qir after
    /// %0 = transpose @w
    /// %y = matmul %x, %0
    /// ```
    "raise-products" => pub struct RaiseProducts {}
    scope: Layer, numerics: Exact, stats: keeps
}

impl Pass for RaiseProducts {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let mut found = rebuild(cx, &mut product)?;
        for (name, n) in rebuild(cx, &mut part)? {
            *found.entry(name).or_default() += n;
        }
        tell_found(cx, "products", &found);
        Ok((!found.is_empty()).into())
    }
}

fn product(b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], _: &TensorTy) -> Result<Option<ValueId>> {
    let (Op::Dot(_), &[x, w]) = (op, args) else { return Ok(None) };
    let (rows, matrix) = (b.ty(x).clone(), b.ty(w).clone());
    if matrix.rank() != 2 || rows.rank() < 2 || !matrix.elem.is_float() || !b.is_constant(w) || b.is_constant(x) {
        return Ok(None);
    }
    let turned = b.transpose(w, &[1, 0])?;
    b.emit(MatMul::default(), &[x, turned]).map(Some)
}

/// Columns of a product with a constant matrix, and perhaps a row added to it, as a product with rows of the matrix.
fn part(b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], _: &TensorTy) -> Result<Option<ValueId>> {
    let Op::Slice(cut) = op else { return Ok(None) };
    let x = args[0];
    let last = b.ty(x).rank().saturating_sub(1);
    let is_columns = |op: &Op| op.is::<Slice>().is_some_and(|s| usize::from(s.axis) == last && s.step == 1);
    let readers = b.readers(x);
    if readers.result || readers.ops.len() < 2 || !readers.ops.iter().all(is_columns) || !is_columns(op) {
        return Ok(None);
    }
    let columns = b.dims(x).last().copied();
    let (sum, bias) = match b.is::<Add>(x) {
        Some((_, sum)) => match sum[..] {
            [p, c] if b.is_constant(c) && b.dims(c).last().copied() == columns && b.ty(c).rank() == 1 => (p, Some(c)),
            [c, p] if b.is_constant(c) && b.dims(c).last().copied() == columns && b.ty(c).rank() == 1 => (p, Some(c)),
            _ => return Ok(None),
        },
        None => (x, None),
    };
    let Some((m, product)) = b.is::<MatMul>(sum) else { return Ok(None) };
    // What else reads the product before its sum needs it whole.
    if sum != x && !b.is_read_once(sum) {
        return Ok(None);
    }
    if !m.epilogue.is_empty() || !m.packed.is_empty() || !b.is_constant(product[1]) {
        return Ok(None);
    }
    let w = b.slice(product[1], 0, cut.start, cut.len)?;
    let y = b.emit(MatMul::default(), &[product[0], w])?;
    let Some(bias) = bias else { return Ok(Some(y)) };
    let bias = b.slice(bias, 0, cut.start, cut.len)?;
    b.emit(Add {}, &[y, bias]).map(Some)
}
