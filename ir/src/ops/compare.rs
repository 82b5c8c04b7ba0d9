//! Elementwise comparison.

use super::walk::Walk;
use super::{InferCx, OpSpec, elementwise};
use crate::diag::Result;
use crate::eval::{Data, EvalCx, Tensor, arg};
use crate::ty::{ElemTy, TensorTy};
use serde::{Deserialize, Serialize};

op! {
    /// Elementwise truth of `a order b`; shapes are aligned at the last axis and extents of one are repeated.
    ///
    /// NaN equals nothing and has no order.
    "compare" => pub struct Compare (
        /// Left operand.
        a: One,
        /// Right operand, with elements of the same type.
        b: One,
    ) {
        /// What is asked.
        order: Order = Order::Equal,
    }
}

/// How two numbers may be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// `a = b`.
    Equal,
    /// `a < b`.
    Less,
    /// `a <= b`.
    LessEqual,
}

impl OpSpec for Compare {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        Ok(elementwise::broadcast(cx)?.with_elem(ElemTy::BOOL))
    }

    fn eval(&self, _: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        let (a, b) = (arg(args, 0)?, arg(args, 1)?);
        let dims = elementwise::extents(out)?;
        let places = Walk::broadcast(&a.dims(), &dims).zip(Walk::broadcast(&b.dims(), &dims));
        let floats = matches!(a.data, Data::F32(_) | Data::F64(_));
        let truths: Vec<bool> = if floats {
            let (x, y) = (a.reals(), b.reals());
            places.map(|(i, j)| self.holds(&x[i], &y[j])).collect()
        } else {
            let (x, y) = (a.ints(), b.ints());
            places.map(|(i, j)| self.holds(&x[i], &y[j])).collect()
        };
        Tensor::from_ints(out, truths.into_iter().map(i128::from))
    }
}

impl Compare {
    fn holds<T: PartialOrd>(&self, a: &T, b: &T) -> bool {
        match self.order {
            Order::Equal => a == b,
            Order::Less => a < b,
            Order::LessEqual => a <= b,
        }
    }
}
