//! Reductions over axes.

use super::walk::Walk;
use super::{Binding, InferCx, OpSpec, Work, axis_of, elementwise, elements};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, ElemTy, Shape, TensorTy};
use serde::{Deserialize, Serialize};

op! {
    /// One number for all indices of `axes`, whose extents become one.
    ///
    /// Over no elements sums are 0, products 1, the largest number is the least of the type and the smallest its largest.
    "reduce" => pub struct Reduce (
        /// Input.
        x: One,
    ) {
        /// What is computed.
        kind: ReduceKind = ReduceKind::Sum,
        /// Which axes, each once.
        axes: Vec<u8> = vec![],
    }
}

/// What can be computed of several numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReduceKind {
    /// The sum.
    Sum,
    /// The sum divided by the count.
    Mean,
    /// The largest; NaN when one is.
    Max,
    /// The smallest; NaN when one is.
    Min,
    /// The product.
    Prod,
    /// The sum of magnitudes.
    L1,
    /// The root of the sum of squares.
    L2,
    /// The sum of squares.
    SumSquare,
    /// The logarithm of the sum.
    LogSum,
    /// The logarithm of the sum of exponentials.
    LogSumExp,
}

use ReduceKind as K;

impl OpSpec for Reduce {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.number(0)?;
        if x.elem == ElemTy::BOOL && !matches!(self.kind, K::Max | K::Min) {
            return Err(Diag::input(format!("operand 0 has type {x}, which `{:?}` does not take", self.kind)));
        }
        let mut ty = x.clone();
        let mut seen = vec![false; ty.rank()];
        for &axis in &self.axes {
            let axis = axis_of(x, axis)?;
            if std::mem::replace(&mut seen[axis], true) {
                return Err(Diag::input(format!("axis {axis} is reduced twice")));
            }
            ty.shape.0[axis] = Dim::Static(1);
        }
        Ok(ty)
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        let (dims, to) = (x.dims(), elementwise::extents(out)?);
        let places = || Walk::broadcast(&to, &dims);
        let count = to.iter().product::<usize>();
        let each = (x.data.len() / count.max(1)).max(1);
        if let (ElemTy::Int(int), K::Sum | K::Max | K::Min | K::Prod | K::L1 | K::SumSquare) =
            (x.ty.elem, self.kind)
        {
            let start = match self.kind {
                K::Prod => 1,
                K::Max => int.range().0,
                K::Min => int.range().1,
                _ => 0,
            };
            let mut acc = vec![start; count];
            for (to, v) in places().zip(x.ints()) {
                let a = &mut acc[to];
                *a = match self.kind {
                    K::Prod => int.wrap(a.wrapping_mul(v)),
                    K::Max => v.max(*a),
                    K::Min => v.min(*a),
                    K::L1 => *a + v.abs(),
                    K::SumSquare => int.wrap(*a + int.wrap(v * v)),
                    _ => *a + v,
                };
            }
            return Tensor::from_ints(out, acc.into_iter());
        }
        let xs = x.reals();
        let start = match self.kind {
            K::Prod => 1.0,
            K::Max | K::LogSumExp => f64::NEG_INFINITY,
            K::Min => f64::INFINITY,
            _ => 0.0,
        };
        let mut acc = vec![start; count];
        for (to, &v) in places().zip(&xs) {
            let a = &mut acc[to];
            *a = match self.kind {
                K::Prod => *a * v,
                K::Max | K::LogSumExp => elementwise::most(*a, v),
                K::Min => elementwise::least(*a, v),
                K::L1 => *a + v.abs(),
                K::L2 | K::SumSquare => *a + v * v,
                K::Sum | K::Mean | K::LogSum => *a + v,
            };
        }
        match self.kind {
            K::Mean => acc.iter_mut().for_each(|a| *a /= each as f64),
            K::L2 => acc.iter_mut().for_each(|a| *a = a.sqrt()),
            K::LogSum => acc.iter_mut().for_each(|a| *a = a.ln()),
            K::LogSumExp => {
                let mut sums = vec![0.0; count];
                for (to, &v) in places().zip(&xs) {
                    // Equal to the largest is 1, also when that is infinite.
                    sums[to] += if v == acc[to] { 1.0 } else { (v - acc[to]).exp() };
                }
                acc.iter_mut().zip(sums).for_each(|(a, s)| *a = if s == 0.0 { *a } else { *a + s.ln() });
            }
            _ => {}
        }
        if out.elem.int().is_some() {
            acc.iter_mut().for_each(|a| *a = a.trunc());
        }
        Tensor::from_reals(out, acc)
    }

    fn cost(&self, args: &[Option<&TensorTy>], _: &TensorTy, bind: Binding<'_>) -> Work {
        let scalar = TensorTy { elem: ElemTy::F32, shape: Shape::default() };
        Work { macs: 0, elements: elements(args.first().copied().flatten().unwrap_or(&scalar), bind) }
    }
}
