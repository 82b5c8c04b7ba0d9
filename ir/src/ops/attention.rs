//! Scaled dot-product attention.

use super::{Binding, InferCx, OpSpec, Real, Work, elements, scales};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, ElemTy, TensorTy};
use std::borrow::Cow;

op! {
    /// `y[i,h] = sum_j softmax_j(scale * q[i,h] . k[j,g]) v[j,g]` with `g = h / (heads / kv_heads)`.
    ///
    /// `q` is `[t, heads, d]`, `k` and `v` are `[s, kv_heads, d]`. The queries are the last `t` of the `s` positions. With
    /// `causal` a query sees no later position; with `window = w > 0` it sees only the last `w` positions, itself included.
    ///
    /// Keys and values may be codes; then their scales follow, and what is meant is attention over the numbers that
    /// `dequantize` makes of them.
    "attention" => pub struct Attention (
        /// Queries.
        q: One,
        /// Keys.
        k: One,
        /// Values.
        v: One,
        /// One scale per group of keys, when those are codes.
        k_scale: Optional,
        /// One scale per group of values, when those are codes.
        v_scale: Optional,
    ) {
        /// Factor on the dot products.
        scale: Real = Real(1.0),
        /// Whether later positions are hidden.
        causal: bool = true,
        /// Number of positions seen; 0 means all.
        window: u32 = 0,
    }
}

/// Whether a query at position `q` sees position `k`.
pub fn visible(q: u64, k: u64, causal: bool, window: u32) -> bool {
    (!causal || k <= q) && (window == 0 || k + u64::from(window) > q)
}

/// The type of the keys or values `at`, whose scales must be there exactly when they are codes.
fn rows<'a>(cx: &InferCx<'a>, at: usize, scale: usize) -> Result<&'a TensorTy> {
    let ty = cx.arg(at)?;
    match (ty.elem, cx.opt(scale)) {
        (ElemTy::Q(scheme), _) => scales::check(cx, scheme, &ty.shape, scale, None).map(|()| ty),
        (_, None) => cx.float(at),
        (_, Some(scale)) => {
            Err(Diag::input(format!("rows of type {ty} have no scales, but one of type {scale} is given")))
        }
    }
}

/// The numbers of the keys or values `at`.
fn numbers<'a>(args: &[Option<&'a Tensor>], at: usize, scale: usize) -> Result<Cow<'a, [f32]>> {
    let x = arg(args, at)?;
    let Some(scheme) = x.ty.elem.scheme() else { return Ok(Cow::Borrowed(x.f32s()?)) };
    let (grouping, scale) = (scales::Grouping::new(scheme, &x.dims())?, arg(args, scale)?.f32s()?);
    let mut y = scales::centred(x, None)?;
    y.iter_mut().enumerate().for_each(|(i, y)| *y *= scale[grouping.of(i)]);
    Ok(Cow::Owned(y))
}

impl OpSpec for Attention {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let (q, k, v) = (cx.float(0)?, rows(cx, 1, 3)?, rows(cx, 2, 4)?);
        let ([_, Dim::Static(h), Dim::Static(d)], [_, Dim::Static(g), Dim::Static(kd)]) =
            (&q.shape.0[..], &k.shape.0[..])
        else {
            return Err(Diag::input(format!(
                "queries {q} and keys {k} must have shape tokens x heads x size"
            )));
        };
        if d != kd || *g == 0 || h % g != 0 {
            return Err(Diag::input(format!("queries {q} do not match keys {k}")));
        }
        if v.shape != k.shape {
            return Err(Diag::input(format!("values {v} do not match keys {k}")));
        }
        Ok(q.clone())
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (q, k) = (arg(args, 0)?, arg(args, 1)?);
        let (qd, kd) = (q.dims(), k.dims());
        let (t, heads, d, s, kv_heads) = (qd[0], qd[1], qd[2], kd[0], kd[1]);
        if s < t {
            return Err(Diag::input(format!("{t} queries but only {s} keys")));
        }
        let (q, k, v) = (q.f32s()?, numbers(args, 1, 3)?, numbers(args, 2, 4)?);
        let mut y = vec![0f32; t * heads * d];
        for i in 0..t {
            let position = (s - t + i) as u64;
            for h in 0..heads {
                let g = h / (heads / kv_heads);
                let query = &q[(i * heads + h) * d..][..d];
                let seen: Vec<usize> =
                    (0..s).filter(|&j| visible(position, j as u64, self.causal, self.window)).collect();
                let row = |j: usize| (j * kv_heads + g) * d;
                let scores: Vec<f64> = seen
                    .iter()
                    .map(|&j| {
                        let key = &k[row(j)..][..d];
                        self.scale.0
                            * query.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
                    })
                    .collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|x| (x - top).exp()).collect();
                let total: f64 = weights.iter().sum();
                for e in 0..d {
                    let sum: f64 =
                        seen.iter().zip(&weights).map(|(&j, w)| w * f64::from(v[row(j) + e])).sum();
                    y[(i * heads + h) * d + e] = (sum / total) as f32;
                }
            }
        }
        Tensor::float(out, y)
    }

    fn cost(&self, args: &[Option<&TensorTy>], out: &TensorTy, bind: Binding<'_>) -> Work {
        let keys = args.get(1).copied().flatten().and_then(|k| k.shape.0.first()).map_or(1, |d| match *d {
            Dim::Static(n) => n,
            Dim::Sym(c) => bind(c),
        });
        let n = elements(out, bind);
        Work { macs: n.saturating_mul(keys).saturating_mul(2), elements: n }
    }
}
