//! Cuts a flat `main` into layers.

use crate::analysis::NarrowPoints;
use crate::pass::prelude::*;
use quantc_ir::entity::SecondaryMap;
use quantc_ir::module::Layer;
use quantc_ir::ops::Call;
use std::collections::{BTreeMap, BTreeSet};

pass! {
    /// Cuts a flat `main` into layers, which later passes work on one at a time.
    ///
    /// The cuts are at narrow points: values through which everything flows that comes after them, apart from cheap
    /// things that many layers share (positions, rotary angles), which become further inputs of the layers. A layer
    /// begins where attention begins and reaches to the next attention, so a residual model gives one layer per
    /// block. What comes before the first is `@embed`; what follows the last block is `@head`: the last block ends
    /// where the blocks before it end. Only ops and edges are looked at, never names. A module without attention, or
    /// with layers already, stays as it is.
    ///
    /// ```qir before
    /// %e = silu %x
    /// %a = attention %e, %e, %e
    /// %y = silu %a
    /// ```
    /// ```qir after
    /// layer @embed (%x: tensor<?tx2x4xf32>) -> tensor<?tx2x4xf32> {
    ///   %e = silu %x
    ///   return %e
    /// }
    /// layer @l0 (%e: tensor<?tx2x4xf32>) -> tensor<?tx2x4xf32> {
    ///   %a = attention %e, %e, %e
    ///   return %a
    /// }
    /// layer @head (%a: tensor<?tx2x4xf32>) -> tensor<?tx2x4xf32> {
    ///   %y = silu %a
    ///   return %y
    /// }
    /// %e = call %x {layer=embed}
    /// %a = call %e {layer=l0}
    /// %y = call %a {layer=head}
    /// ```
    "outline-layers" => pub struct OutlineLayers {}
    provides: [layers],
    scope: Module, numerics: Exact, stats: keeps
}

impl Pass for OutlineLayers {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        if !cx.module.layers.is_empty() {
            return Ok(Changed::No);
        }
        cx.module.main.drop_dead();
        let main = &cx.module.main;
        let flow = Flow::of(main);
        let segments = segments(main, &flow);
        let regions = regions(main, &segments);
        if regions.is_empty() {
            cx.remark("@main", format_args!("there is no attention to cut at: the module stays one layer"));
            return Ok(Changed::No);
        }
        cut(cx.module, &flow, &regions)?;
        cx.remark("@main", format_args!("cut into {} layers", regions.len()));
        Ok(Changed::Yes)
    }
}

/// How the result of an op comes about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    /// From weights alone.
    #[default]
    Constant,
    /// From integers and weights: the same for every layer that asks.
    Shared,
    /// From embeddings or float inputs: the data that flows through the model.
    Flow,
}

struct Flow {
    class: SecondaryMap<OpId, Class>,
}

impl Flow {
    fn of(graph: &Graph) -> Flow {
        let mut class = SecondaryMap::<OpId, Class>::new();
        for (op, node) in graph.ops() {
            let of_arg = |&a: &ValueId| match graph.value(a).def {
                Def::Op(d) => class[d],
                Def::Param(_) if graph.ty(a).elem == ElemTy::I32 => Class::Shared,
                Def::Param(_) | Def::State(_) => Class::Flow,
                Def::Weight(_) | Def::None => Class::Constant,
            };
            let own = match node.op {
                Op::Embedding(_) => Class::Flow,
                Op::Positions(_) => Class::Shared,
                _ if node.op.has_effect() => Class::Flow,
                _ => Class::Constant,
            };
            let inherited = node.args.iter().map(of_arg).max().unwrap_or_default();
            class[op] = own.max(inherited);
        }
        Flow { class }
    }

    fn is_flow(&self, op: OpId) -> bool {
        self.class[op] == Class::Flow
    }
}

/// The ops between two narrow points, in program order; the last one makes the later narrow point.
struct Segment {
    ops: Vec<OpId>,
    /// Whether the later narrow point is the one result of the graph, or is read by another segment.
    ends_narrow: bool,
}

/// Cuts the flow at every narrow point.
fn segments(graph: &Graph, flow: &Flow) -> Vec<Segment> {
    let narrow = NarrowPoints::of(graph, |op| flow.is_flow(op)).ops;
    // An op belongs to the first narrow point that depends on it.
    let mut owner = SecondaryMap::<OpId, Option<usize>>::new();
    for (i, &point) in narrow.iter().enumerate() {
        let mut open = vec![point];
        while let Some(op) = open.pop() {
            if owner[op].is_some() || !flow.is_flow(op) {
                continue;
            }
            owner[op] = Some(i);
            open.extend(graph.node(op).args.iter().filter_map(|&a| graph.def(a)).map(|(d, _)| d));
        }
    }
    let mut segments: Vec<Segment> =
        narrow.iter().map(|_| Segment { ops: vec![], ends_narrow: true }).collect();
    let mut rest = vec![];
    for (op, _) in graph.ops().filter(|&(op, _)| flow.is_flow(op)) {
        match owner[op] {
            Some(i) => segments[i].ops.push(op),
            None => rest.push(op),
        }
    }
    if !rest.is_empty() {
        segments.push(Segment { ops: rest, ends_narrow: false });
    }
    segments
}

/// A layer to be: its name and the flow ops it holds.
struct Region {
    name: String,
    ops: Vec<OpId>,
}

/// Joins segments to layers: embedding, one layer for each block, head.
fn regions(graph: &Graph, segments: &[Segment]) -> Vec<Region> {
    let mixes = |s: &Segment| {
        s.ops.iter().any(|&op| matches!(graph.node(op).op, Op::Attention(_) | Op::CacheAppend(_)))
    };
    let starts: Vec<usize> = (0..segments.len()).filter(|&i| mixes(&segments[i])).collect();
    let (Some(&first), Some(&last)) = (starts.first(), starts.last()) else { return vec![] };
    let kinds = |i: usize| -> Vec<OpKind> {
        segments[i].ops.iter().map(|&op| graph.node(op).op.kind()).collect()
    };
    // The last block ends as an earlier one does: after the longest run of segments that an earlier block is, too.
    let is_like = |&[from, to]: &[usize; 2]| {
        let len = to - from;
        last + len <= segments.len() && (0..len).all(|i| kinds(from + i) == kinds(last + i))
    };
    let blocks = starts.windows(2).map(|w| [w[0], w[1]]);
    let like = blocks.filter(is_like).map(|[from, to]| to - from).max();
    // A model of one block: segments in which the flow forks and joins, as it does around a residual sum.
    let forks = |s: &Segment| s.ops.len() > 1;
    let alone = || 1 + segments[last + 1..].iter().take_while(|s| forks(s)).count();
    let end = last + like.unwrap_or_else(alone);

    let mut cuts: Vec<(String, std::ops::Range<usize>)> = vec![];
    if first > 0 {
        cuts.push(("embed".into(), 0..first));
    }
    for (n, &from) in starts.iter().enumerate() {
        let to = starts.get(n + 1).copied().unwrap_or(end);
        cuts.push((format!("l{n}"), from..to));
    }
    if end < segments.len() {
        cuts.push(("head".into(), end..segments.len()));
    }
    // What does not end in one value cannot be a layer and stays in main.
    cuts.retain(|(_, range)| segments[range.end - 1].ends_narrow);
    let ops = |range: std::ops::Range<usize>| segments[range].iter().flat_map(|s| s.ops.iter().copied()).collect();
    cuts.into_iter().map(|(name, range)| Region { name, ops: ops(range) }).collect()
}

/// Moves the regions of `main` into layers and calls them.
fn cut(module: &mut Module, flow: &Flow, regions: &[Region]) -> Result<()> {
    let old = std::mem::take(&mut module.main);
    let homes = homes(&old, flow, regions);
    let mut main = Graph::new();
    let mut at: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for &p in &old.params {
        let v = main.add_param("", old.ty(p).clone());
        main.value_mut(v).name = old.value(p).name.clone();
        at.insert(p, v);
    }
    let mut moved_to: BTreeMap<String, String> = BTreeMap::new();
    let ends: BTreeMap<OpId, usize> =
        regions.iter().enumerate().filter_map(|(i, r)| Some((*r.ops.last()?, i))).collect();
    // A call stands where the region's last op stood: by then all that the region reads is computed.
    for (op, node) in old.ops() {
        match homes[op] {
            None => {
                let args = node.args.iter().map(|&a| in_main(&old, &mut main, &mut at, a)).collect();
                let value = old.value(node.result);
                let v = main.push(node.op.clone(), args, value.ty.clone(), value.name.as_deref());
                at.insert(node.result, v);
            }
            Some(_) if ends.contains_key(&op) => {
                let region = &regions[ends[&op]];
                let name = fresh_layer_name(module, &region.name);
                let (graph, inputs) = body(&old, flow, &homes, ends[&op], node.result);
                let names = graph.values().filter_map(|(_, v)| v.name.clone());
                moved_to.extend(names.map(|n| (n, name.clone())));
                let args = inputs.iter().map(|&a| in_main(&old, &mut main, &mut at, a)).collect();
                let value = old.value(node.result);
                let call = Call { layer: name.clone() };
                let v = main.push(call.into(), args, value.ty.clone(), value.name.as_deref());
                at.insert(node.result, v);
                module.layers.push(Layer { name, graph });
            }
            Some(_) => {}
        }
    }
    main.results = old.results.iter().map(|&r| in_main(&old, &mut main, &mut at, r)).collect();
    main.drop_dead();
    module.main = main;
    move_statistics(module, &moved_to);
    Ok(())
}

/// The region that each op goes to; `None` stays in main. Shared ops that only one region reads go there.
fn homes(graph: &Graph, flow: &Flow, regions: &[Region]) -> SecondaryMap<OpId, Option<usize>> {
    let mut homes = SecondaryMap::<OpId, Option<usize>>::new();
    for (i, region) in regions.iter().enumerate() {
        region.ops.iter().for_each(|&op| homes[op] = Some(i));
    }
    for &op in graph.order().iter().rev() {
        let result = graph.node(op).result;
        if flow.class[op] != Class::Shared || graph.is_result(result) {
            continue;
        }
        let users: BTreeSet<Option<usize>> = graph.users(result).iter().map(|&u| homes[u]).collect();
        if let [Some(only)] = users.into_iter().collect::<Vec<_>>()[..] {
            homes[op] = Some(only);
        }
    }
    homes
}

/// A value of the old main in the new one.
fn in_main(old: &Graph, main: &mut Graph, at: &mut BTreeMap<ValueId, ValueId>, v: ValueId) -> ValueId {
    if let Some(&known) = at.get(&v) {
        return known;
    }
    let new = leaf(old, main, v);
    at.insert(v, new);
    new
}

fn leaf(old: &Graph, new: &mut Graph, v: ValueId) -> ValueId {
    let ty = old.ty(v);
    match old.value(v).def {
        Def::Weight(w) => new.weight(w, ty),
        Def::State(s) => new.state(s, ty),
        Def::None | Def::Param(_) | Def::Op(_) => new.none(),
    }
}

/// The function of a region whose result is `result`, and the values of main that it reads.
fn body(
    old: &Graph,
    flow: &Flow,
    homes: &SecondaryMap<OpId, Option<usize>>,
    region: usize,
    result: ValueId,
) -> (Graph, Vec<ValueId>) {
    // What depends on weights alone is computed in every layer that reads it.
    let mut inside: BTreeSet<OpId> = BTreeSet::new();
    for &op in old.order().iter().rev() {
        let read = || old.users(old.node(op).result).iter().any(|u| inside.contains(u));
        if homes[op] == Some(region) || (flow.class[op] == Class::Constant && read()) {
            inside.insert(op);
        }
    }
    let ops: Vec<OpId> = old.order().iter().copied().filter(|op| inside.contains(op)).collect();
    let outer = |&v: &ValueId| match old.value(v).def {
        Def::Op(d) => !inside.contains(&d),
        Def::Param(_) => true,
        _ => false,
    };
    // The flow comes first, then what is shared, each in order of first use.
    let mut inputs: Vec<ValueId> = vec![];
    for v in ops.iter().flat_map(|&op| &old.node(op).args).copied().filter(outer) {
        if !inputs.contains(&v) {
            inputs.push(v);
        }
    }
    let is_shared = |v: &ValueId| match old.value(*v).def {
        Def::Op(d) => !flow.is_flow(d),
        _ => old.ty(*v).elem == ElemTy::I32,
    };
    inputs.sort_by_key(is_shared);

    let mut new = Graph::new();
    let mut at: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for &v in &inputs {
        let p = new.add_param("", old.ty(v).clone());
        new.value_mut(p).name = old.value(v).name.clone();
        at.insert(v, p);
    }
    for op in ops {
        let node = old.node(op);
        let args = node.args.iter().map(|&a| in_main(old, &mut new, &mut at, a)).collect();
        let value = old.value(node.result);
        let v = new.push(node.op.clone(), args, value.ty.clone(), value.name.as_deref());
        at.insert(node.result, v);
    }
    new.results = vec![at[&result]];
    (new, inputs)
}

fn fresh_layer_name(module: &Module, stem: &str) -> String {
    let mut name = stem.to_string();
    while module.layer(&name).is_some() {
        name.push('_');
    }
    name
}

/// Statistics of values of main become statistics of the layers that the values moved to.
fn move_statistics(module: &mut Module, moved_to: &BTreeMap<String, String>) {
    let old = std::mem::take(&mut module.calibration);
    for (key, numbers) in old {
        let moved = key.strip_prefix("main.").and_then(|rest| {
            let (value, _) = rest.rsplit_once('.')?;
            Some(format!("{}.{rest}", moved_to.get(value)?))
        });
        module.calibration.insert(moved.unwrap_or(key), numbers);
    }
}
