//! Tensors put behind one another.

use super::walk::around;
use super::{InferCx, OpSpec};
use crate::diag::{Diag, Result};
use crate::eval::{Data, EvalCx, Tensor};
use crate::ty::{Dim, TensorTy};

op! {
    /// The operands behind one another along an axis; all other extents agree.
    "concat" => pub struct Concat (
        /// At least one tensor.
        parts: Many,
    ) {
        /// Which axis.
        axis: u8 = 0,
    }
}

impl OpSpec for Concat {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let mut ty = cx.movable(0)?.clone();
        let axis = super::axis_of(&ty, self.axis)?;
        if cx.args.len() == 1 {
            return Ok(ty);
        }
        let mut total = 0u64;
        for i in 0..cx.args.len() {
            let part = cx.movable(i)?;
            let Some(Dim::Static(n)) = part.shape.0.get(axis) else {
                return Err(Diag::input(format!("operand {i} of type {part} has no fixed extent along axis {axis}")));
            };
            let others = |t: &TensorTy| {
                let dims = t.shape.0.iter().enumerate().filter(|(a, _)| *a != axis);
                (t.elem, dims.map(|(_, d)| *d).collect::<Vec<_>>())
            };
            if others(part) != others(&ty) {
                return Err(Diag::input(format!("operand {i} of type {part} does not go behind {ty}")));
            }
            total = total.checked_add(*n).ok_or_else(|| Diag::input("the result is too large"))?;
        }
        ty.shape.0[axis] = Dim::Static(total);
        Ok(ty)
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let axis = usize::from(self.axis);
        let parts: Vec<&Tensor> = args.iter().copied().flatten().collect();
        let mut all: Option<Data> = None;
        let mut spans = vec![];
        let mut start = 0;
        for part in &parts {
            let (outer, n, inner) = around(&part.dims(), axis);
            spans.push((start, outer, n * inner));
            start += part.data.len();
            match &mut all {
                None => all = Some(part.data.clone()),
                Some(all) => all.append(part.data.clone())?,
            }
        }
        let all = all.ok_or_else(|| Diag::bug("nothing to put together"))?;
        let outer = spans.first().map_or(0, |s| s.1);
        let spans = &spans;
        let from = (0..outer).flat_map(|o| {
            spans.iter().flat_map(move |&(start, _, run)| start + o * run..start + (o + 1) * run)
        });
        Tensor::new(out, all.take(from))
    }
}
