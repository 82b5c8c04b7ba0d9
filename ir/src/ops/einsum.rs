//! Sums of products over named axes.

use super::{Binding, InferCx, OpSpec, Work, elementwise, elements};
use super::walk::Walk;
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor};
use crate::ty::{Dim, Shape, TensorTy};
use std::collections::BTreeMap;

op! {
    /// Einstein's sum: `equation` names the axes of operands and, behind `->`, of the result; `ij,jk->ik` multiplies matrices.
    ///
    /// Over letters that the result has not, the product of the operands is summed.
    "einsum" => pub struct Einsum (
        /// Operands, with float elements of one type.
        parts: Many,
    ) {
        /// Letters for each axis, operands parted by commas.
        equation: String = String::new(),
    }
}

/// The letters of each operand and of the result.
fn letters(equation: &str) -> Option<(Vec<Vec<char>>, Vec<char>)> {
    let (inputs, output) = equation.split_once("->")?;
    let one = |text: &str| -> Option<Vec<char>> {
        text.chars().all(|c| c.is_ascii_alphabetic()).then(|| text.chars().collect())
    };
    Some((inputs.split(',').map(one).collect::<Option<_>>()?, one(output)?))
}

impl Einsum {
    fn parsed(&self) -> Result<(Vec<Vec<char>>, Vec<char>)> {
        letters(&self.equation).ok_or_else(|| {
            Diag::input(format!("`{}` is not an equation", self.equation)).help("write it as in `ij,jk->ik`")
        })
    }
}

impl OpSpec for Einsum {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let (inputs, output) = self.parsed()?;
        if inputs.len() != cx.args.len() {
            let n = cx.args.len();
            return Err(Diag::input(format!("`{}` does not have the {n} operands given", self.equation)));
        }
        let elem = cx.number(0)?.elem;
        let mut extents: BTreeMap<char, Dim> = BTreeMap::new();
        for (i, letters) in inputs.iter().enumerate() {
            let ty = cx.number(i)?;
            let bad = || Diag::input(format!("operand {i} of type {ty} does not fit `{}`", self.equation));
            if ty.rank() != letters.len() || ty.elem != elem {
                return Err(bad());
            }
            for (&c, &d) in letters.iter().zip(&ty.shape.0) {
                let known = extents.entry(c).or_insert(d);
                match (*known, d) {
                    (x, y) if x == y => {}
                    (Dim::Static(1), y) => *known = y,
                    (_, Dim::Static(1)) => {}
                    _ => return Err(bad()),
                }
            }
        }
        let mut seen = vec![];
        let one = |c: &char| {
            let unknown = || Diag::input(format!("`{}` does not say what axis `{c}` is", self.equation));
            let twice = seen.contains(c);
            seen.push(*c);
            extents.get(c).copied().filter(|_| !twice).ok_or_else(unknown)
        };
        Ok(TensorTy { elem, shape: Shape(output.iter().map(one).collect::<Result<_>>()?) })
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (inputs, output) = self.parsed()?;
        let parts: Vec<&Tensor> = args.iter().copied().flatten().collect();
        let mut extents: BTreeMap<char, usize> = BTreeMap::new();
        for (letters, part) in inputs.iter().zip(&parts) {
            for (&c, d) in letters.iter().zip(part.dims()) {
                extents.entry(c).and_modify(|e| *e = if *e == 1 { d } else { *e }).or_insert(d);
            }
        }
        // Results first, so that the sums of one of them are consecutive.
        let summed: Vec<char> = extents.keys().copied().filter(|c| !output.contains(c)).collect();
        let order: Vec<char> = output.iter().chain(&summed).copied().collect();
        let dims: Vec<usize> = order.iter().map(|c| extents[c]).collect();
        let walk = |letters: &[char], part: &Tensor| {
            let own = super::walk::strides(&part.dims());
            let stride = |c: &char| -> isize {
                let axes = letters.iter().zip(part.dims()).zip(&own);
                axes.filter(|((l, d), _)| *l == c && *d != 1).map(|(_, s)| *s as isize).sum()
            };
            Walk::new(&dims, order.iter().map(stride).collect(), 0)
        };
        let mut walks: Vec<Walk> = inputs.iter().zip(&parts).map(|(l, p)| walk(l, p)).collect();
        let values: Vec<Vec<f64>> = parts.iter().map(|p| p.reals()).collect();
        let run: usize = summed.iter().map(|c| extents[c]).product();
        let count: usize = elementwise::extents(out)?.iter().product();
        let mut sums = vec![0.0; count];
        for sum in &mut sums {
            for _ in 0..run {
                let factors = walks.iter_mut().zip(&values).filter_map(|(w, v)| Some(v[w.next()?]));
                *sum += factors.product::<f64>();
            }
        }
        Tensor::from_reals(out, sums)
    }

    fn cost(&self, args: &[Option<&TensorTy>], out: &TensorTy, bind: Binding<'_>) -> Work {
        let mut sizes = BTreeMap::new();
        if let Some((inputs, _)) = letters(&self.equation) {
            for (letters, ty) in inputs.iter().zip(args.iter().flatten()) {
                for (&c, d) in letters.iter().zip(&ty.shape.0) {
                    sizes.insert(c, match *d {
                        Dim::Static(n) => n,
                        Dim::Sym(c) => bind(c),
                    });
                }
            }
        }
        Work { macs: sizes.values().fold(1, |n, &d| n.saturating_mul(d)), elements: elements(out, bind) }
    }
}
