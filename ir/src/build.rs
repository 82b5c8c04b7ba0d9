//! Building graphs: the one way importers, passes and tests make ops.

use crate::diag::Result;
use crate::entity::ValueId;
use crate::graph::Graph;
use crate::module::Signature;
use crate::ops::{InferCx, Op, OpSpec};
use crate::ty::TensorTy;

/// Infers the result type of `op` on values of `graph`.
pub fn infer(
    graph: &Graph,
    op: &Op,
    args: &[ValueId],
    layers: &dyn Fn(&str) -> Option<Signature>,
) -> Result<TensorTy> {
    let mut types: Vec<Option<&TensorTy>> =
        args.iter().map(|&a| (!graph.is_none(a)).then(|| graph.ty(a))).collect();
    while types.len() < op.operands().fixed() {
        types.push(None);
    }
    op.infer(&InferCx { args: types, layers })
}

fn no_layers(_: &str) -> Option<Signature> {
    None
}

impl Graph {
    /// Appends an op with the inferred result type.
    pub fn append(&mut self, op: impl Into<Op>, args: &[ValueId], name: Option<&str>) -> Result<ValueId> {
        let at = self.order().len();
        self.insert_inferred(at, op, args, name)
    }

    /// Inserts an op with the inferred result type at a position of the program.
    pub fn insert_inferred(
        &mut self,
        at: usize,
        op: impl Into<Op>,
        args: &[ValueId],
        name: Option<&str>,
    ) -> Result<ValueId> {
        let op = op.into();
        let ty = infer(self, &op, args, &no_layers)
            .map_err(|e| e.context(format!("building `{}` {}", op.name(), name.unwrap_or(""))))?;
        Ok(self.insert(at, op, args.to_vec(), ty, name))
    }
}
