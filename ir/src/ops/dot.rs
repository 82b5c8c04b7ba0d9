//! Products of matrices, one for each index of the outer axes.

use super::walk::Walk;
use super::{Binding, InferCx, OpSpec, Work, elementwise, elements};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, ElemTy, Shape, TensorTy};
use rayon::prelude::*;

op! {
    /// `y[.., i, j] = sum_k a[.., i, k] b[.., k, j]`; outer axes are aligned at the last and extents of one are repeated.
    ///
    /// For products with a weight `matmul` is the op that kernels are made for. Integer sums are exact.
    "dot" => pub struct Dot (
        /// `[.., M, K]`.
        a: One,
        /// `[.., K, N]`, with elements of the same type.
        b: One,
    ) {}
}

fn split(ty: &TensorTy) -> Result<(TensorTy, Dim, Dim)> {
    match &ty.shape.0[..] {
        [outer @ .., rows, cols] => Ok((TensorTy { elem: ty.elem, shape: Shape(outer.to_vec()) }, *rows, *cols)),
        _ => Err(Diag::input(format!("{ty} is not a matrix"))),
    }
}

impl OpSpec for Dot {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let (a, b) = (cx.number(0)?, cx.number(1)?);
        let ((outer_a, m, k), (outer_b, k2, n)) = (split(a)?, split(b)?);
        if k != k2 || a.elem != b.elem || a.elem == ElemTy::BOOL {
            return Err(Diag::input(format!("{a} and {b} do not multiply")));
        }
        let mut shape = elementwise::shape(&[&outer_a, &outer_b])?;
        shape.0.extend([m, n]);
        Ok(TensorTy { elem: a.elem, shape })
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (a, b) = (arg(args, 0)?, arg(args, 1)?);
        let (da, db, to) = (a.dims(), b.dims(), elementwise::extents(out)?);
        let outer = |d: &[usize]| d[..d.len() - 2].to_vec();
        let (m, k, n) = (da[da.len() - 2], da[da.len() - 1], db[db.len() - 1]);
        let places: Vec<(usize, usize)> = Walk::broadcast(&outer(&da), &outer(&to))
            .zip(Walk::broadcast(&outer(&db), &outer(&to)))
            .collect();
        let (xs, ys) = (a.reals(), b.reals());
        let mut sums = vec![0f64; places.len() * m * n];
        sums.par_chunks_mut(n.max(1)).enumerate().for_each(|(row, sums)| {
            let ((pa, pb), i) = (places[row / m], row % m);
            for (j, &x) in xs[(pa * m + i) * k..][..k].iter().enumerate() {
                let y = &ys[(pb * k + j) * n..][..n];
                sums.iter_mut().zip(y).for_each(|(s, y)| *s += x * y);
            }
        });
        Tensor::from_reals(out, sums)
    }

    fn cost(&self, args: &[Option<&TensorTy>], out: &TensorTy, bind: Binding<'_>) -> Work {
        let k = match args.first().copied().flatten().and_then(|a| a.shape.last()) {
            Some(Dim::Static(n)) => n,
            Some(Dim::Sym(c)) => bind(c),
            None => 1,
        };
        let n = elements(out, bind);
        Work { macs: n.saturating_mul(k), elements: n }
    }
}
