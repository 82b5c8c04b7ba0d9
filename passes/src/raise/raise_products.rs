//! Makes products with constant matrices products with weights.

use super::rebuild::{Rebuild, rebuild, tell_found};
use crate::pass::prelude::*;
use quantc_ir::ops::{Add, MatMul, Reshape, Slice, Transpose};

pass! {
    /// Makes products with constant matrices products with weights.
    ///
    /// `dot` with a matrix that is the same in every run becomes `matmul`, whose weight has a row for each column of the
    /// result: the matrix turned, which a matrix that was turned for the product is already. Parts of the columns of a
    /// product that nothing reads as a whole, such as queries, keys and values that come from one matrix, become products
    /// with parts of the weight; also where the columns were parted into axes, which were put in another order.
    ///
    /// ```qir before
    /// weight @w : tensor<2x2xf32> = inline [[1, 2], [3, 4]]
    /// %y = dot %x, @w
    /// ```
    /// ```qir after
    /// %0 = transpose @w
    /// %y = matmul %x, %0
    /// ```
    "raise-products" => pub struct RaiseProducts {
        /// Whether products are parted, too.
        parts: bool = true,
    }
    scope: Layer, numerics: Exact, stats: keeps
}

impl Pass for RaiseProducts {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let mut found = rebuild(cx, &mut product)?;
        let parts = if self.parts { rebuild(cx, &mut part)? } else { Default::default() };
        parts.into_iter().for_each(|(name, n)| *found.entry(name).or_default() += n);
        tell_found(cx, "products", &found);
        Ok((!found.is_empty()).into())
    }
}

fn product(b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], ty: &TensorTy) -> Result<Option<ValueId>> {
    let (Op::Dot(_), &[x, w]) = (op, args) else { return Ok(None) };
    let (rows, matrix) = (b.ty(x).clone(), b.ty(w).clone());
    if ty.elem != ElemTy::F32
        || matrix.rank() != 2
        || rows.rank() < 2
        || !matrix.elem.is_float()
        || !b.is_constant(w)
        || b.is_constant(x)
    {
        return Ok(None);
    }
    let turned = b.transpose(w, &[1, 0])?;
    b.emit(MatMul::default(), &[x, turned]).map(Some)
}

/// Columns of a product with a constant matrix, and perhaps a row added to it, as a product with rows of the matrix.
fn part(b: &mut Rebuild<'_>, op: &Op, args: &[ValueId], _: &TensorTy) -> Result<Option<ValueId>> {
    let Op::Slice(cut) = op else { return Ok(None) };
    let x = args[0];
    let alike = |op: &Op| op.is::<Slice>().is_some_and(|s| s.axis == cut.axis && s.step == 1);
    let readers = b.readers(x);
    if cut.step != 1 || readers.result || readers.ops.len() < 2 || !readers.ops.iter().all(alike) {
        return Ok(None);
    }
    columns(b, x, Part { axis: cut.axis.into(), start: cut.start, len: cut.len })
}

/// Indices `start .. start + len` of an axis.
#[derive(Clone, Copy)]
struct Part {
    axis: usize,
    start: u64,
    len: u64,
}

/// The part of `x` that moves of a product's columns leave, with fewer columns.
fn columns(b: &mut Rebuild<'_>, x: ValueId, part: Part) -> Result<Option<ValueId>> {
    let rank = b.ty(x).rank();
    if let Some((turn, inner)) = b.is::<Transpose>(x) {
        let perm = super::canonicalize::order(&turn.perm);
        if !b.is_read_once(inner[0]) {
            return Ok(None);
        }
        let part = Part { axis: perm[part.axis].into(), ..part };
        let Some(y) = columns(b, inner[0], part)? else { return Ok(None) };
        return b.emit(turn, &[y]).map(Some);
    }
    if let Some((_, inner)) = b.is::<Reshape>(x) {
        // The columns were parted into several axes; those before them stay.
        let (from, to) = (b.dims(inner[0]), b.dims(x));
        let Some(last) = from.len().checked_sub(1).filter(|&l| l < rank && part.axis >= l) else {
            return Ok(None);
        };
        let split: Option<Vec<u64>> = to[last..].iter().map(|d| d.fixed()).collect();
        let (Some(split), true) = (split, from[..last] == to[..last] && b.is_read_once(inner[0])) else {
            return Ok(None);
        };
        let Some(y) = product_of(b, inner[0], &split, Part { axis: part.axis - last, ..part })? else {
            return Ok(None);
        };
        let mut dims = to;
        dims[part.axis] = Dim::Static(part.len);
        return b.reshape(y, &dims).map(Some);
    }
    match b.dims(x).last() {
        Some(&Dim::Static(n)) if part.axis + 1 == rank => product_of(b, x, &[n], Part { axis: 0, ..part }),
        _ => Ok(None),
    }
}

/// The product `x`, whose columns are parted as `split` says, with those columns alone that are in a part.
fn product_of(b: &mut Rebuild<'_>, x: ValueId, split: &[u64], part: Part) -> Result<Option<ValueId>> {
    let columns = b.dims(x).last().copied();
    let (sum, bias) = match b.is::<Add>(x) {
        Some((_, sum)) => match sum[..] {
            [p, c] if b.is_constant(c) && b.dims(c).last().copied() == columns && b.ty(c).rank() == 1 => {
                (p, Some(c))
            }
            [c, p] if b.is_constant(c) && b.dims(c).last().copied() == columns && b.ty(c).rank() == 1 => {
                (p, Some(c))
            }
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
    // Codes stay in rows as they are.
    if split.len() > 1 && !b.ty(product[1]).elem.is_float() {
        return Ok(None);
    }
    let w = rows(b, product[1], split, part)?;
    let y = b.emit(MatMul::default(), &[product[0], w])?;
    let Some(bias) = bias else { return Ok(Some(y)) };
    let bias = rows(b, bias, split, part)?;
    b.emit(Add {}, &[y, bias]).map(Some)
}

/// Rows of a constant that a part of its rows, parted as `split` says, has.
fn rows(b: &mut Rebuild<'_>, w: ValueId, split: &[u64], part: Part) -> Result<ValueId> {
    let rest = b.dims(w)[1..].to_vec();
    let mut dims: Vec<Dim> = split.iter().map(|&n| Dim::Static(n)).collect();
    dims.extend(&rest);
    let wide = b.reshape(w, &dims)?;
    let cut = b.slice(wide, part.axis, part.start, part.len)?;
    let others = split.iter().enumerate().filter(|(at, _)| *at != part.axis).map(|(_, n)| n).product::<u64>();
    let mut dims = vec![Dim::Static(others * part.len)];
    dims.extend(&rest);
    b.reshape(cut, &dims)
}
