//! Another shape for the same elements.

use super::{InferCx, OpSpec};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, Shape, TensorTy};

op! {
    /// The same elements in row-major order under another shape.
    "reshape" => pub struct Reshape (
        /// Input.
        x: One,
    ) {
        /// The new shape, as in `?tx4x64`.
        shape: Shape = Shape::default(),
    }
}

impl OpSpec for Reshape {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.arg(0)?;
        let count = |s: &Shape| {
            let mut symbols: Vec<char> = vec![];
            let mut n = 1u64;
            for d in &s.0 {
                match *d {
                    Dim::Static(k) => n = n.saturating_mul(k),
                    Dim::Sym(c) => symbols.push(c),
                }
            }
            symbols.sort_unstable();
            (n, symbols)
        };
        if count(&x.shape) != count(&self.shape) {
            return Err(Diag::input(format!("{x} does not have the elements of shape {}", self.shape)));
        }
        Ok(TensorTy { elem: x.elem, shape: self.shape.clone() })
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        arg(args, 0)?.clone().reshaped(out.shape.clone())
    }
}
