//! What an op costs, for choosing among equal expressions.

use quantc_ir::ops::{Op, OpKind, OpSpec, elements};
use quantc_ir::target::Backend;
use quantc_ir::ty::TensorTy;

/// Prices ops. Prices are whole numbers, so that sums do not depend on their order.
pub trait Cost {
    /// The price of one execution; [`u64::MAX`] when it cannot be executed.
    fn cost(&self, op: &Op, args: &[Option<&TensorTy>], out: &TensorTy) -> u64;
}

/// Prices without a code generator: arithmetic, traffic and a fixed price for starting an op.
#[derive(Clone, Copy, Debug)]
pub struct TableCost {
    /// Tokens of one call.
    pub tokens: u64,
}

impl Default for TableCost {
    fn default() -> TableCost {
        TableCost { tokens: 1 }
    }
}

/// Starting an op costs as much as moving this many bytes.
const START: u64 = 1 << 12;

impl Cost for TableCost {
    fn cost(&self, op: &Op, args: &[Option<&TensorTy>], out: &TensorTy) -> u64 {
        let bind = |_| self.tokens;
        let bytes = |ty: &TensorTy| elements(ty, &bind).saturating_mul(u64::from(ty.elem.bits())) / 8;
        let read = args.iter().flatten().map(|ty| bytes(ty)).fold(0, u64::saturating_add);
        // An embedding reads the rows it is asked for, not the table.
        let read = if op.kind() == OpKind::Embedding { bytes(out) } else { read };
        let moved = read.saturating_add(bytes(out));
        let start = if op.kind() == OpKind::Reshape { 1 } else { START };
        let arithmetic = op.cost(args, out, &bind).macs / 16;
        start.saturating_add(moved).saturating_add(arithmetic)
    }
}

/// Prices of a code generator, in picoseconds.
pub struct BackendCost<'a> {
    /// The code generator.
    pub backend: &'a dyn Backend,
    /// Tokens of one call.
    pub tokens: u64,
}

impl Cost for BackendCost<'_> {
    fn cost(&self, op: &Op, args: &[Option<&TensorTy>], out: &TensorTy) -> u64 {
        if let (OpKind::QMatMul, Some(x), Some(w)) =
            (op.kind(), args.first().copied().flatten(), args.get(1).copied().flatten())
            && self.backend.supports_matmul(x.elem, w.elem).is_err()
        {
            return u64::MAX;
        }
        let ns = self.backend.cost(op, args, out, self.tokens);
        // `as` saturates; what is not a number costs nothing.
        (ns * 1000.0) as u64
    }
}
