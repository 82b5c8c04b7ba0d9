//! Matrix product with weights stored row by row.

use super::epilogue::{self, Step};
use super::{Binding, InferCx, OpSpec, Work, elements};
use crate::diag::Result;
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::TensorTy;
use rayon::prelude::*;

op! {
    /// `y[i, n] = epilogue(sum_k x[i, k] w[n, k])`: weights are `[N, K]`, as checkpoints store them.
    "matmul" => pub struct MatMul (
        /// Rows to multiply, `[.., K]`.
        x: One,
        /// The matrix, `[N, K]`.
        w: One,
        /// Operands of the epilogue's steps.
        extras: Many,
    ) {
        /// Steps applied to each sum, in order.
        epilogue: Vec<Step> = vec![],
        /// The weight in the target's layout: layout and digest of the packed bytes.
        packed: String = String::new(),
    }
}

impl OpSpec for MatMul {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let out = epilogue::product_type(cx.float(0)?, cx.float(1)?)?;
        epilogue::infer(&self.epilogue, &cx.args[2..], &out)?;
        Ok(out)
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (x, w) = (arg(args, 0)?, arg(args, 1)?);
        let ((m, k), (n, _)) = (x.rows_cols(), w.rows_cols());
        let (xs, ws) = (x.f32s()?, w.f32s()?);
        let mut sums = vec![0f64; m * n];
        sums.par_chunks_mut(n.max(1)).zip(xs.par_chunks(k.max(1))).for_each(|(sums, x)| {
            for (sum, w) in sums.iter_mut().zip(ws.chunks(k.max(1))) {
                *sum = x.iter().zip(w).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            }
        });
        epilogue::apply(&self.epilogue, &mut sums, n, &args[2..])?;
        Tensor::float(out, sums.into_iter().map(|s| s as f32).collect())
    }

    fn cost(&self, args: &[Option<&TensorTy>], out: &TensorTy, bind: Binding<'_>) -> Work {
        let n = elements(out, bind);
        Work { macs: epilogue::macs(args.get(1).copied().flatten(), n, bind), elements: n }
    }
}
