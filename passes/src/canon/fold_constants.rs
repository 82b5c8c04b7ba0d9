//! Computes when the model is compiled what depends on weights alone.

use crate::pass::prelude::*;
use quantc_ir::eval::{Data, Tensor, eval_pure, weight_tensor};
use quantc_ir::ops::{Cast, Dequantize, Slice, Transpose};
use quantc_ir::weights::{BlobWriter, WeightView};

pass! {
    /// Computes when the model is compiled what depends on weights alone.
    ///
    /// An op whose operands are all weights is evaluated by the op's own meaning and becomes a derived weight. Casts,
    /// transposes and slices are computed a block of rows at a time; other ops whole, and one that would take more memory
    /// than the budget is left to run time with a remark. Weights that are stored quantized stay so unless asked.
    ///
    /// ```qir before
    /// %t = transpose @w
    /// %y = matmul %x, %t
    /// ```
    /// ```qir after
    /// %y = matmul %x, @w.transpose
    /// ```
    "fold-constants" => pub struct FoldConstants {
        /// Whether weights that are stored quantized are expanded.
        dequantize: bool = false,
    }
    scope: Layer, numerics: Exact, stats: keeps
}

impl Pass for FoldConstants {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let mut changed = false;
        // In program order, what is folded is a weight for the ops after it.
        for op in cx.graph().order().to_vec() {
            let Some(inputs) = self.constant_inputs(cx, op) else { continue };
            let node = cx.graph().node(op).clone();
            let ty = cx.graph().ty(node.result).clone();
            if !streams(&node.op, &ty) && bytes(cx, &inputs, &ty).is_none_or(|n| n > cx.env.budget as u64) {
                let place = cx.place(node.result);
                cx.remark(place, format_args!("left to run time: it takes more memory than the budget"));
                continue;
            }
            let folded = fold(cx, &node, &inputs, &ty).map_err(|e| e.at(cx.loc(op)))?;
            let value = cx.weight_value(folded);
            let graph = cx.graph_mut();
            graph.replace_all_uses(node.result, value)?;
            // A weight is called by its own name.
            graph.value_mut(value).name = None;
            graph.erase(op);
            changed = true;
        }
        Ok(changed.into())
    }
}

impl FoldConstants {
    /// The weights that `op` reads, if it reads nothing else and may be folded.
    fn constant_inputs(&self, cx: &PassCx<'_>, op: OpId) -> Option<Vec<WeightId>> {
        let graph = cx.graph();
        let node = graph.node(op);
        let expands = node.op.is::<Dequantize>().is_some();
        if node.op.has_effect() || (expands && !self.dequantize) || graph.is_result(node.result) {
            return None;
        }
        let present = node.args.iter().filter(|&&a| !graph.is_none(a));
        let inputs: Vec<WeightId> = present.map(|&a| graph.as_weight(a)).collect::<Option<_>>()?;
        // A type without elements may have extents of any size, and nothing is gained by computing it here.
        let plain = |ty: &TensorTy| ty.elem != ElemTy::I32 && ty.shape.elements().is_some_and(|n| n > 0);
        let result = graph.ty(node.result);
        // Integers and truths are no weights that passes make.
        let is_stored = float(result).is_some() || result.elem.scheme().is_some();
        let all_plain = inputs.iter().all(|&w| plain(&cx.module.weights[w].ty)) && plain(result);
        (!inputs.is_empty() && all_plain && is_stored).then_some(inputs)
    }
}

/// Whether the op is computed without holding whole tensors.
fn streams(op: &Op, ty: &TensorTy) -> bool {
    let rows_or_columns = |s: &Slice| s.step == 1 && (s.axis == 0 || usize::from(s.axis) + 1 == ty.rank());
    op.is::<Cast>().is_some()
        || op.is::<Transpose>().is_some_and(|t| t.perm.is_empty())
        || op.is::<Slice>().is_some_and(rows_or_columns)
}

/// Bytes held while the op is evaluated whole.
fn bytes(cx: &PassCx<'_>, inputs: &[WeightId], out: &TensorTy) -> Option<u64> {
    let size = |ty: &TensorTy| ty.shape.elements()?.checked_mul(4);
    inputs.iter().try_fold(size(out)?, |n, &w| n.checked_add(size(&cx.module.weights[w].ty)?))
}

fn fold(cx: &mut PassCx<'_>, node: &Node, inputs: &[WeightId], ty: &TensorTy) -> Result<WeightId> {
    let name = format!("{}.{}", cx.module.weights[inputs[0]].name, node.op.name());
    let budget = cx.env.budget;
    let attributes = quantc_ir::text::fields::to_fields(&Attributes(&node.op));
    let absent: String = node.args.iter().map(|&a| if cx.graph().is_none(a) { '-' } else { '+' }).collect();
    let more = format!("{}({absent}){attributes}", node.op.name());
    match (&node.op, float(ty)) {
        (Op::Cast(_), Some(to)) => cx.derive_weight(&name, ty.clone(), inputs, &more, &mut |views, out| {
            crate::stream::rows(&views[0], budget, |_, rows| out.write_f32(to, rows))
        }),
        (Op::Transpose(t), Some(to)) if t.perm.is_empty() => {
            cx.derive_weight(&name, ty.clone(), inputs, &more, &mut |views, out| {
                transpose(&views[0], to, budget, out)
            })
        }
        (Op::Slice(cut), Some(to)) if streams(&node.op, ty) => {
            cx.derive_weight(&name, ty.clone(), inputs, &more, &mut |views, out| {
                slice(&views[0], cut, to, budget, out)
            })
        }
        _ => {
            // The values must outlive the call that derives, which reads weights by views of its own.
            let (module, store) = (cx.module.clone_declarations(), cx.store);
            let graph = cx.graph().clone();
            cx.derive_weight(&name, ty.clone(), inputs, &more, &mut |_, out| {
                let mut alone = Graph::new();
                let mut tensors = vec![];
                let mut args = vec![];
                for &a in &node.args {
                    args.push(match graph.as_weight(a) {
                        Some(w) => {
                            tensors.push(weight_tensor(&module, store, w)?);
                            alone.add_param("", graph.ty(a).clone())
                        }
                        None => alone.none(),
                    });
                }
                let y = alone.push(node.op.clone(), args, ty.clone(), None);
                alone.results = vec![y];
                let tensors: Vec<&Tensor> = tensors.iter().collect();
                let y = eval_pure(&alone, &tensors, 1, &module, store)?;
                write(&y[0], out)
            })
        }
    }
}

/// Attributes of an op, to be written as fields.
struct Attributes<'a>(&'a Op);

impl serde::Serialize for Attributes<'_> {
    fn serialize<S: serde::Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        self.0.write(out)
    }
}

/// Declarations of a module, without its functions.
trait Declarations {
    fn clone_declarations(&self) -> Module;
}

impl Declarations for Module {
    fn clone_declarations(&self) -> Module {
        Module { weights: self.weights.clone(), shards: self.shards.clone(), ..Module::default() }
    }
}

fn float(ty: &TensorTy) -> Option<Float> {
    [Float::F32, Float::F16, Float::Bf16].into_iter().find(|&f| ElemTy::from(f) == ty.elem)
}

/// Writes the transposed matrix: as many of its rows at a time as fit the budget, each time reading all of the weight.
fn transpose(w: &WeightView<'_>, to: Float, budget: usize, out: &mut BlobWriter) -> Result<()> {
    let (n_rows, n_cols) = (w.rows(), w.cols());
    let half = budget / 2;
    let step = (half / (4 * n_rows.max(1))).clamp(1, n_cols.max(1));
    let mut block = vec![];
    for from in (0..n_cols).step_by(step) {
        let count = step.min(n_cols - from);
        block.resize(count * n_rows, 0.0);
        crate::stream::rows(w, half, |first, rows| {
            for (i, row) in rows.chunks_exact(n_cols).enumerate() {
                for (c, &x) in row[from..from + count].iter().enumerate() {
                    block[c * n_rows + first + i] = x;
                }
            }
            Ok(())
        })?;
        out.write_f32(to, &block)?;
    }
    Ok(())
}

/// Writes a range of the columns, or of the first axis.
fn slice(w: &WeightView<'_>, cut: &Slice, to: Float, budget: usize, out: &mut BlobWriter) -> Result<()> {
    // Inference has checked that the range lies inside.
    let (start, len) = (cut.start as usize, cut.len as usize);
    if usize::from(cut.axis) + 1 == w.ty().rank() {
        return crate::stream::rows(w, budget, |_, rows| {
            rows.chunks_exact(w.cols()).try_for_each(|row| out.write_f32(to, &row[start..start + len]))
        });
    }
    let dims = w.ty().shape.dims().unwrap_or_default();
    let per_index: usize = dims[1..dims.len() - 1].iter().product::<u64>() as usize;
    let range = start * per_index..(start + len) * per_index;
    crate::stream::rows_in(w, range, budget, |_, rows| out.write_f32(to, rows))
}

/// Writes a tensor as it is stored.
fn write(t: &Tensor, out: &mut BlobWriter) -> Result<()> {
    match (&t.data, t.ty.elem, float(&t.ty)) {
        (Data::F32(xs), _, Some(to)) => out.write_f32(to, xs),
        (Data::Codes(codes), ElemTy::Q(scheme), _) => {
            let (_, cols) = t.rows_cols();
            codes.chunks(cols.max(1)).try_for_each(|row| out.write_row_codes(scheme.format, row))
        }
        _ => Err(Diag::bug(format!("{} cannot be stored as a weight", t.ty))),
    }
}
