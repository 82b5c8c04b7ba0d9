//! Conversion between element types.

use super::{InferCx, OpSpec};
use crate::diag::{Diag, Result};
use crate::eval::{Data, EvalCx, Tensor, arg};
use crate::formats::Format;
use crate::ty::{ElemTy, Int, TensorTy};

op! {
    /// The same numbers in another element type.
    ///
    /// Floats are rounded to nearest, ties to even. Integers from floats are cut towards zero and saturate, from integers
    /// they wrap around, and codes of integers do in both cases; what is not zero is true. Types of codes without scales (`!q<e4m3:f32 tensor>`) stand for the
    /// numbers of their format.
    "cast" => pub struct Cast (
        /// Input.
        x: One,
    ) {
        /// Result element type.
        to: ElemTy = ElemTy::F32,
        /// Whether numbers beyond the largest of a float format become that; else they become infinite or NaN.
        saturate: bool = true,
    }
}

impl OpSpec for Cast {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.arg(0)?;
        for elem in [x.elem, self.to] {
            if elem.scheme().is_some() && elem.bare_format().is_none() {
                return Err(Diag::input(format!("`{elem}` is read with its scales, it is not cast"))
                    .help("use `quantize` and `dequantize`"));
            }
        }
        Ok(x.with_elem(self.to))
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        match (self.to, &x.data) {
            (_, _) if self.to == x.ty.elem => Ok(x.clone()),
            (to, Data::F32(numbers)) if to.is_float() => Tensor::float(out, numbers.clone()),
            (ElemTy::Int(_), Data::I32(_) | Data::I64(_)) => Tensor::from_ints(out, x.ints().into_iter()),
            (ElemTy::Int(Int::Bool), _) => {
                Tensor::from_ints(out, x.reals().iter().map(|&v| i128::from(v != 0.0)))
            }
            (ElemTy::Int(int), _) => {
                let (min, max) = int.range();
                Tensor::from_ints(out, x.reals().iter().map(|v| (v.trunc() as i128).clamp(min, max)))
            }
            (ElemTy::Q(s), _) if s.format.is_int() => {
                let code = |v: i128| (v & i128::from(s.format.mask())) as u8;
                Tensor::codes(out, x.ints().into_iter().map(code).collect())
            }
            (ElemTy::Q(s), _) => {
                let code = |&v: &f64| encode(s.format, v, self.saturate);
                Tensor::codes(out, x.reals().iter().map(code).collect())
            }
            _ => Tensor::from_reals(out, x.reals()),
        }
    }
}

/// The code of `x`, rounded to nearest; beyond the largest number it is that of `inf` or NaN unless it saturates.
fn encode(format: &Format, x: f64, saturate: bool) -> u8 {
    let code = format.encode(x as f32);
    if saturate || format.is_int() || x.is_nan() || x.abs() < f64::from(format.max()) {
        return code as u8;
    }
    let exact = f64::from(format.decode(code));
    // Below halfway to the number that would come next the largest is the nearest, at halfway when it is even.
    let step = f64::from(format.max()) - f64::from(format.decode(format.encode(format.max()) - 1));
    let beyond = x.abs() - exact.abs();
    if x.is_finite() && (beyond < step / 2.0 || (beyond == step / 2.0 && code & 1 == 0)) {
        return code as u8;
    }
    let sign = code & !(format.mask() >> 1);
    let special = |want: fn(f32) -> bool| (0..=format.mask() >> 1).find(|&c| want(format.decode(c)));
    let top = special(f32::is_infinite).or_else(|| special(f32::is_nan));
    (top.map_or(code, |c| c | sign)) as u8
}
