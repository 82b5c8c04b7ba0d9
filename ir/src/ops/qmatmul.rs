//! Matrix product with quantized weights.

use super::epilogue::{self, Step};
use super::{Binding, InferCx, OpSpec, Work, elements, scales};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::scheme::{Group, Zero};
use crate::ty::TensorTy;
use rayon::prelude::*;

op! {
    /// `y[i, n] = epilogue(xs[i] * sum_g ws[n, g] * sum_{k in g} x[i, k] (w[n, k] - wz[n, g]))`.
    ///
    /// `x` is float, or symmetric with one scale per token or for all of it, given as `x_scale`. When both sides are integers the inner
    /// sum is an exact integer. The weight is never expanded.
    "qmatmul" => pub struct QMatMul (
        /// Rows to multiply, `[.., K]`, float or quantized per token or as a whole.
        x: One,
        /// Quantized matrix, `[N, K]`.
        w: One,
        /// Scales of the weight.
        w_scale: One,
        /// Zero points of the weight, for schemes that have them.
        w_zero: Optional,
        /// Scales of `x` when it is quantized.
        x_scale: Optional,
        /// Operands of the epilogue's steps.
        extras: Many,
    ) {
        /// Steps applied to each sum, in order.
        epilogue: Vec<Step> = vec![],
        /// The weight in the target's layout: layout and digest of the packed bytes.
        packed: String = String::new(),
    }
}

/// Place of the first operand of the epilogue.
pub const QMATMUL_EXTRAS: usize = 5;

impl OpSpec for QMatMul {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.arg(0)?;
        let (w_scheme, w_shape) = scales::scheme(cx, 1)?;
        scales::check(cx, w_scheme, &w_shape, 2, Some(3))?;
        match x.elem.scheme() {
            None => {
                cx.float(0)?;
                if let Some(ty) = cx.opt(4) {
                    return Err(Diag::input(format!(
                        "scales of type {ty} are given for {x}, which has none"
                    )));
                }
            }
            Some(scheme) => {
                if !matches!(scheme.group, Group::Token | Group::Tensor) || scheme.zero != Zero::Symmetric {
                    return Err(Diag::input(format!(
                        "rows of type {x} must be symmetric with one scale per token or for all"
                    )));
                }
                scales::check(cx, scheme, &x.shape, 4, None)?;
            }
        }
        let out = epilogue::product_type(x, cx.arg(1)?)?;
        epilogue::infer(&self.epilogue, &cx.args[QMATMUL_EXTRAS..], &out)?;
        Ok(out)
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (x, w, w_scale) = (arg(args, 0)?, arg(args, 1)?, arg(args, 2)?);
        let ((m, k), (n, _)) = (x.rows_cols(), w.rows_cols());
        let scheme = w.ty.elem.scheme().expect("inference has checked the operand");
        let grouping = scales::Grouping::new(scheme, &w.dims())?;
        let ws = scales::centred(w, args[3])?;
        let group: Vec<u32> = (0..ws.len()).map(|i| grouping.of(i) as u32).collect();
        let w_scale = w_scale.f32s()?;
        let quantized;
        let xs = match x.ty.elem.scheme() {
            Some(_) => {
                quantized = scales::centred(x, None)?;
                &quantized[..]
            }
            None => x.f32s()?,
        };
        let x_scale = args[4].map(|s| s.f32s()).transpose()?;
        let mut sums = vec![0f64; m * n];
        sums.par_chunks_mut(n.max(1)).zip(xs.par_chunks(k.max(1))).enumerate().for_each(|(i, (sums, x))| {
            for (row, sum) in sums.iter_mut().enumerate() {
                let (w, group) = (&ws[row * k..][..k], &group[row * k..][..k]);
                let mut at = 0;
                while at < k {
                    let len = group[at..].iter().take_while(|&&g| g == group[at]).count();
                    let dot = |(&a, &b): (&f32, &f32)| f64::from(a) * f64::from(b);
                    let inner: f64 = x[at..at + len].iter().zip(&w[at..at + len]).map(dot).sum();
                    *sum += inner * f64::from(w_scale[group[at] as usize]);
                    at += len;
                }
                *sum *= x_scale.map_or(1.0, |s| f64::from(s[if s.len() == 1 { 0 } else { i }]));
            }
        });
        epilogue::apply(&self.epilogue, &mut sums, n, &args[QMATMUL_EXTRAS..])?;
        Tensor::float(out, sums.into_iter().map(|s| s as f32).collect())
    }

    fn cost(&self, args: &[Option<&TensorTy>], out: &TensorTy, bind: Binding<'_>) -> Work {
        let n = elements(out, bind);
        Work { macs: epilogue::macs(args.get(1).copied().flatten(), n, bind), elements: n }
    }
}
