//! Vectors that are added behind products.

use crate::pass::PassCx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::entity::{OpId, ValueId, WeightId};
use quantc_ir::ops::Add;

/// The one reader of `y` when it adds a vector that is a weight: the op, which operand, and the weight.
pub(crate) fn added(cx: &PassCx<'_>, y: ValueId) -> Option<(OpId, usize, WeightId)> {
    let graph = cx.graph();
    let [add] = graph.users(y)[..] else { return None };
    let node = graph.node(add);
    if node.op.is::<Add>().is_none() || graph.is_result(y) {
        return None;
    }
    let operand = node.args.iter().position(|&a| a != y)?;
    let b = graph.as_weight(node.args[operand])?;
    let ty = graph.ty(node.args[operand]);
    // As the left operand it would decide the type of the sum.
    (operand == 1 && ty.elem.is_float() && ty.shape.0[..] == graph.ty(y).shape.0[graph.ty(y).rank() - 1..])
        .then_some((add, operand, b))
}

/// Adds the weight `made` behind the op `product`, or puts it in the place of the vector that is added `there`.
pub(crate) fn put(
    cx: &mut PassCx<'_>,
    product: OpId,
    there: Option<(OpId, usize, WeightId)>,
    made: WeightId,
) -> Result<()> {
    let value = cx.weight_value(made);
    let graph = cx.graph_mut();
    if let Some((add, operand, _)) = there {
        graph.node_mut(add).args[operand] = value;
        return Ok(());
    }
    let y = graph.node(product).result;
    let at = graph.position(product).ok_or_else(|| Diag::bug("a product is not part of the program"))? + 1;
    let name = graph.value_mut(y).name.take();
    let sum = graph.insert_inferred(at, Add::default(), &[y, value], None)?;
    let (add, _) = graph.def(sum).expect("the sum was made by an op");
    graph.replace_all_uses(y, sum)?;
    graph.node_mut(add).args[0] = y;
    graph.value_mut(sum).name = name;
    Ok(())
}
