//! Calling a layer.

use super::{InferCx, OpSpec};
use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor};
use crate::ty::TensorTy;

op! {
    /// Runs a layer on the operands and yields its result.
    "call" => pub struct Call (
        /// The layer's inputs.
        args: Many,
    ) {
        /// The layer's name.
        layer: String = String::new(),
    }
}

impl OpSpec for Call {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let missing = || Diag::input(format!("there is no layer @{} with one result", self.layer));
        let signature = (cx.layers)(&self.layer).ok_or_else(missing)?;
        if signature.params.len() != cx.args.len() {
            let (want, got) = (signature.params.len(), cx.args.len());
            return Err(Diag::input(format!("layer @{} takes {want} inputs, got {got}", self.layer)));
        }
        for (i, param) in signature.params.iter().enumerate() {
            let arg = cx.arg(i)?;
            if arg != param {
                return Err(Diag::input(format!(
                    "input {i} of layer @{} has type {arg}, expected {param}",
                    self.layer
                )));
            }
        }
        Ok(signature.result)
    }
    fn eval(&self, cx: &mut EvalCx<'_>, args: &[Option<&Tensor>], _: &TensorTy) -> Result<Tensor> {
        let present: Vec<&Tensor> = args.iter().copied().flatten().collect();
        cx.call(&self.layer, &present)
    }
    fn has_effect(&self) -> bool {
        true
    }
}
