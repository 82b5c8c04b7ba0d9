//! Moves factors and summands of channels into the products beside them.

use crate::pass::prelude::*;
use quantc_ir::ops::{Add, Mul};
use quantc_ir::weights::WeightView;

pass! {
    /// Moves factors and summands of channels into the products beside them.
    ///
    /// What a batch norm multiplies and adds are constants of each channel. Behind a convolution or a product with a
    /// weight, factors become factors of the weights of each output, and summands join one vector. Ahead of one, factors
    /// become factors of what each channel is multiplied with; summands become a vector behind the product, except where a
    /// convolution has margins, which the summands do not reach. So weights are rounded as they are multiplied.
    ///
    /// A product whose result, or whose operand, something else reads too is left as it is.
    ///
    /// ```qir before
    /// %m = matmul %x, @w
    /// %y = mul %m, @bias
    /// ```
    /// ```qir after
    /// %y = matmul %x, @w.folded
    /// ```
    "fold-batch-norm" => pub struct FoldBatchNorm {
        /// Products left as they are, as name patterns of their weights. A pattern that matches nothing is an error.
        skip: Vec<Pattern> = vec![],
    }
    scope: Layer, numerics: Reassociates, stats: drops
}

impl Pass for FoldBatchNorm {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let mut changed = false;
        for op in cx.graph().order().to_vec() {
            let Some(first) = Product::of(cx, op) else { continue };
            if self.skip.any_matches(&cx.module.weights[first.weight].name) {
                continue;
            }
            let mut folded = 0;
            while ahead(cx, op)? || behind(cx, op)? {
                folded += 1;
            }
            if folded > 0 {
                let place = cx.place(cx.graph().node(op).result);
                let name = cx.module.weights[first.weight].name.clone();
                cx.remark(&place, format_args!("folded {folded} vectors into {name} and what is added"));
                changed = true;
            }
        }
        Ok(changed.into())
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::all("skip", &self.skip, NameKind::Weight)
    }
}

/// A product with an f32 weight.
#[derive(Clone)]
struct Product {
    weight: WeightId,
    /// Extents of the weight.
    dims: Vec<u64>,
    /// The axis of the weight that outputs are.
    outputs: usize,
    /// The axis of the weight that channels of the operand are.
    channels: usize,
    /// Runs of outputs that see channels of their own.
    groups: u64,
    /// The axis of channels of the operand, and that of outputs of the result.
    axes: (usize, usize),
    /// Whether windows reach beyond the operand.
    margins: bool,
}

impl Product {
    fn of(cx: &PassCx<'_>, op: OpId) -> Option<Product> {
        let graph = cx.graph();
        let node = graph.node(op);
        let weight = graph.as_weight(*node.args.get(1)?)?;
        let ty = &cx.module.weights[weight].ty;
        let dims = ty.shape.dims()?;
        let (x, y) = (graph.ty(node.args[0]), graph.ty(node.result));
        let plain = [ty, x, y].iter().all(|t| t.elem == ElemTy::F32) && !dims.contains(&0);
        if !plain || graph.as_weight(node.args[0]).is_some() {
            return None;
        }
        let (outputs, channels, groups, axes, margins) = match &node.op {
            Op::Conv(conv) => {
                let margins = conv.before.iter().chain(&conv.after).any(|&n| n != 0);
                (0, 1, u64::from(conv.groups), (1, 1), margins)
            }
            Op::MatMul(mm) if mm.epilogue.is_empty() && mm.packed.is_empty() && dims.len() == 2 => {
                (0, 1, 1, (x.rank() - 1, y.rank() - 1), false)
            }
            Op::Dot(_) if dims.len() == 2 && x.rank() >= 2 => (1, 0, 1, (x.rank() - 1, y.rank() - 1), false),
            _ => return None,
        };
        Some(Product { weight, dims, outputs, channels, groups, axes, margins })
    }

    fn count(&self) -> u64 {
        self.dims[self.outputs]
    }

    /// The output and the channel of the operand that each number of the weight belongs to.
    fn places(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let p = self.clone();
        let step = |axis: usize| p.dims[axis + 1..].iter().product::<u64>();
        let (by_output, by_channel) = (step(p.outputs), step(p.channels));
        let run = (p.count() / p.groups.max(1)).max(1);
        (0..p.dims.iter().product::<u64>()).map(move |i| {
            let output = i / by_output % p.dims[p.outputs];
            let channel = i / by_channel % p.dims[p.channels] + output / run * p.dims[p.channels];
            (output as usize, channel as usize)
        })
    }

    /// The type of a vector by output that is added to the result.
    fn vector(&self, graph: &Graph, y: ValueId) -> TensorTy {
        let mut dims = vec![1; graph.ty(y).rank() - self.axes.1];
        dims[0] = self.count();
        TensorTy::fixed(ElemTy::F32, &dims)
    }
}

/// An op that joins a value with numbers by channel.
struct Step {
    op: OpId,
    /// Which operand the value is.
    value: usize,
    numbers: WeightId,
    product: bool,
}

/// What `op` does with one of its operands, when that is arithmetic with a weight along `axis` of its result.
fn step(cx: &PassCx<'_>, op: OpId, axis: usize) -> Option<Step> {
    let graph = cx.graph();
    let node = graph.node(op);
    let product = node.op.is::<Mul>().is_some();
    if !product && node.op.is::<Add>().is_none() {
        return None;
    }
    let at = node.args.iter().position(|&a| graph.as_weight(a).is_some())?;
    let (numbers, value) = (graph.as_weight(node.args[at])?, node.args[1 - at]);
    let (ty, out) = (&cx.module.weights[numbers].ty, graph.ty(node.result));
    let dims = ty.shape.dims()?;
    let ahead = out.rank().checked_sub(dims.len())?;
    let along =
        |(a, &d): (usize, &u64)| d == 1 || (a + ahead == axis && Some(d) == out.shape.0[axis].fixed());
    let fits = dims.iter().enumerate().all(along) && ty.elem == ElemTy::F32;
    (fits && graph.ty(value) == out && graph.as_weight(value).is_none()).then_some(Step {
        op,
        value: 1 - at,
        numbers,
        product,
    })
}

/// Reads a vector of which one number stands for all.
fn numbers(view: &WeightView<'_>, n: usize) -> Result<Vec<f32>> {
    let all = view.read_all_f32()?;
    Ok(if all.len() == 1 { vec![all[0]; n] } else { all })
}

/// The one reader of a value that is no result.
fn reader(graph: &Graph, v: ValueId) -> Option<OpId> {
    match graph.users(v)[..] {
        [one] if !graph.is_result(v) => Some(one),
        _ => None,
    }
}

/// Takes an op out of the graph: its readers read its operand.
fn bypass(cx: &mut PassCx<'_>, step: &Step) -> Result<()> {
    let graph = cx.graph_mut();
    let node = graph.node(step.op);
    let (from, to) = (node.result, node.args[step.value]);
    let name = graph.value_mut(from).name.take();
    graph.replace_all_uses(from, to)?;
    graph.erase(step.op);
    if name.is_some() {
        graph.value_mut(to).name = name;
    }
    Ok(())
}

/// The weight of a product with each number multiplied.
fn scaled(cx: &mut PassCx<'_>, op: OpId, p: &Product, by: WeightId, outputs: bool) -> Result<()> {
    let decl = &cx.module.weights[p.weight];
    let (name, ty) = (format!("{}.folded", decl.name), decl.ty.clone());
    let n = if outputs { p.count() } else { p.dims[p.channels] * p.groups } as usize;
    let more = format!("{outputs} {} {:?}", p.groups, (p.outputs, p.channels));
    let made = cx.derive_weight(&name, ty, &[p.weight, by], &more, &mut |views, out| {
        let (mut w, by) = (views[0].read_all_f32()?, numbers(&views[1], n)?);
        for (w, (output, channel)) in w.iter_mut().zip(p.places()) {
            *w *= by[if outputs { output } else { channel }];
        }
        out.write_f32(Float::F32, &w)
    })?;
    let value = cx.weight_value(made);
    cx.graph_mut().node_mut(op).args[1] = value;
    Ok(())
}

/// Folds one op that the product `op` reads.
fn ahead(cx: &mut PassCx<'_>, op: OpId) -> Result<bool> {
    let Some(p) = Product::of(cx, op) else { return Ok(false) };
    let graph = cx.graph();
    let (x, y) = (graph.node(op).args[0], graph.node(op).result);
    let made = graph.def(x).map(|(op, _)| op);
    let Some(step) = made.and_then(|made| step(cx, made, p.axes.0)) else { return Ok(false) };
    if reader(graph, x) != Some(op) || (!step.product && p.margins) {
        return Ok(false);
    }
    if step.product {
        scaled(cx, op, &p, step.numbers, false)?;
    } else {
        // b[o] = sum w[o, c] s[c]
        let (ty, n) = (p.vector(graph, y), (p.dims[p.channels] * p.groups) as usize);
        let name = format!("{}.bias", cx.module.weights[p.weight].name);
        let more = format!("bias {} {:?}", p.groups, (p.outputs, p.channels));
        let made = cx.derive_weight(&name, ty, &[p.weight, step.numbers], &more, &mut |views, out| {
            let (w, s) = (views[0].read_all_f32()?, numbers(&views[1], n)?);
            let mut sums = vec![0f64; p.count() as usize];
            for (&w, (output, channel)) in w.iter().zip(p.places()) {
                sums[output] += f64::from(w) * f64::from(s[channel]);
            }
            out.write_f32(Float::F32, &sums.iter().map(|&s| s as f32).collect::<Vec<_>>())
        })?;
        crate::vectors::put(cx, op, None, made)?;
    }
    let graph = cx.graph_mut();
    let from = graph.node(step.op).args[step.value];
    graph.node_mut(op).args[0] = from;
    graph.erase(step.op);
    Ok(true)
}

/// Folds one op that reads the product `op`, or the vector that is added to it.
fn behind(cx: &mut PassCx<'_>, op: OpId) -> Result<bool> {
    let Some(p) = Product::of(cx, op) else { return Ok(false) };
    let y = cx.graph().node(op).result;
    let next = |cx: &PassCx<'_>, v: ValueId| {
        let step = step(cx, reader(cx.graph(), v)?, p.axes.1)?;
        (cx.graph().node(step.op).args[step.value] == v).then_some(step)
    };
    let Some(first) = next(cx, y) else { return Ok(false) };
    if first.product {
        scaled(cx, op, &p, first.numbers, true)?;
        bypass(cx, &first)?;
        return Ok(true);
    }
    let added = cx.graph().node(first.op).result;
    let Some(second) = next(cx, added) else { return Ok(false) };
    // (y + b) f = y f + b f, and (y + b) + c = y + (b + c).
    let ty = p.vector(cx.graph(), y);
    let name = format!("{}.folded", cx.module.weights[first.numbers].name);
    let (n, product) = (p.count() as usize, second.product);
    let more = format!("vector {product}");
    let made = cx.derive_weight(&name, ty, &[first.numbers, second.numbers], &more, &mut |views, out| {
        let (b, c) = (numbers(&views[0], n)?, numbers(&views[1], n)?);
        let one = |(&b, &c): (&f32, &f32)| if product { b * c } else { b + c };
        out.write_f32(Float::F32, &b.iter().zip(&c).map(one).collect::<Vec<_>>())
    })?;
    if product {
        scaled(cx, op, &p, second.numbers, true)?;
    }
    let value = cx.weight_value(made);
    cx.graph_mut().node_mut(first.op).args[1 - first.value] = value;
    bypass(cx, &second)?;
    Ok(true)
}
