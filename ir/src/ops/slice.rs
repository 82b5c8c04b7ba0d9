//! A range of one axis.

use super::{InferCx, OpSpec};
use crate::diag::{Diag, Result};
use crate::eval::Data;
use crate::eval::{EvalCx, Tensor, arg};
use crate::ty::{Dim, TensorTy};

op! {
    /// Indices `start .. start + len` of one axis.
    "slice" => pub struct Slice (
        /// Input.
        x: One,
    ) {
        /// The axis that is cut.
        axis: u8 = 0,
        /// First index.
        start: u64 = 0,
        /// Number of indices.
        len: u64 = 0,
    }
}

impl OpSpec for Slice {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let x = cx.float(0)?;
        let end = self.start.checked_add(self.len);
        match (x.shape.0.get(usize::from(self.axis)), end) {
            (Some(Dim::Static(n)), Some(end)) if end <= *n && self.len > 0 => {
                let mut ty = x.clone();
                ty.shape.0[usize::from(self.axis)] = Dim::Static(self.len);
                Ok(ty)
            }
            _ => {
                let (a, s, n) = (self.axis, self.start, self.len);
                Err(Diag::input(format!("{n} indices from {s} on do not lie on axis {a} of {x}")))
            }
        }
    }
    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let x = arg(args, 0)?;
        let dims = x.dims();
        let axis = usize::from(self.axis);
        let inner: usize = dims[axis + 1..].iter().product();
        let (start, len) = (self.start as usize * inner, self.len as usize * inner);
        // Without elements there is nothing to cut, and chunks have no size.
        let whole = (dims[axis] * inner).max(1);
        let cut = x.f32s()?.chunks(whole).flat_map(|c| &c[start..start + len]).copied().collect();
        Ok(Tensor { ty: out.clone(), data: Data::F32(cut) })
    }
}
