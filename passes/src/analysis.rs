//! Analyses: facts about one function, computed when asked for, kept until a pass changes the function.

use quantc_ir::diag::Result;
use quantc_ir::entity::{Entity, LayerId, OpId, SecondaryMap, ValueId};
use quantc_ir::graph::{Def, Graph};
use quantc_ir::module::Module;
use quantc_ir::ops::OpSpec;
use quantc_ir::ty::ElemTy;
use quantc_ir::weights::Digest;
use std::any::{Any, TypeId};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A fact about one function.
pub trait Analysis: Any + Send + Sync + Sized {
    /// The name in timing tables.
    const NAME: &'static str;

    /// Computes it for `graph`, a function of `module`.
    fn compute(module: &Module, graph: &Graph) -> Result<Self>;
}

/// A function of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Function {
    /// The entry.
    Main,
    /// A layer.
    Layer(LayerId),
}

impl Function {
    /// The name without `@`.
    pub fn name(self, module: &Module) -> &str {
        match self {
            Function::Main => "main",
            Function::Layer(id) => &module.layers[id].name,
        }
    }

    /// The body.
    pub fn graph(self, module: &Module) -> &Graph {
        match self {
            Function::Main => &module.main,
            Function::Layer(id) => &module.layers[id].graph,
        }
    }

    /// The body, to be changed.
    pub fn graph_mut(self, module: &mut Module) -> &mut Graph {
        match self {
            Function::Main => &mut module.main,
            Function::Layer(id) => &mut module.layers[id].graph,
        }
    }

    fn key(self) -> usize {
        match self {
            Function::Main => 0,
            Function::Layer(id) => id.index() + 1,
        }
    }
}

/// The analyses known at present.
#[derive(Default)]
pub struct Analyses {
    known: BTreeMap<(usize, TypeId), Arc<dyn Any + Send + Sync>>,
}

impl Analyses {
    /// The analysis of `function`, computed unless it is known. The flag says whether it was computed now.
    pub fn get<A: Analysis>(&mut self, module: &Module, function: Function) -> Result<(Arc<A>, bool)> {
        let key = (function.key(), TypeId::of::<A>());
        if let Some(known) = self.known.get(&key).cloned().and_then(|a| a.downcast().ok()) {
            return Ok((known, false));
        }
        let made = Arc::new(A::compute(module, function.graph(module))?);
        self.known.insert(key, made.clone());
        Ok((made, true))
    }

    /// Forgets what is known of `function`, except the analyses in `preserved`.
    pub fn forget(&mut self, function: Function, preserved: &[TypeId]) {
        self.known.retain(|(f, ty), _| *f != function.key() || preserved.contains(ty));
    }

    /// Forgets everything, except the analyses in `preserved`.
    pub fn forget_all(&mut self, preserved: &[TypeId]) {
        self.known.retain(|(_, ty), _| preserved.contains(ty));
    }
}

/// The ops through whose result everything flows that comes later, from the inputs to the results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NarrowPoints {
    /// Those ops, in order of the flow.
    pub ops: Vec<OpId>,
}

impl NarrowPoints {
    /// The narrow points of the part of `graph` whose ops are `in_flow`: the dominators of its results.
    ///
    /// Ops that act on a state but whose result is not read count as results.
    pub fn of(graph: &Graph, in_flow: impl Fn(OpId) -> bool) -> NarrowPoints {
        // Program order is topological, so one sweep finds all immediate dominators (Cooper, Harvey, Kennedy).
        let flow: Vec<OpId> = graph.order().iter().copied().filter(|&op| in_flow(op)).collect();
        let mut place = SecondaryMap::<OpId, usize>::new();
        // Place 0 is the source of everything; an op that reads nothing of the flow hangs on it.
        let mut idom: Vec<usize> = vec![0];
        let meet = |idom: &[usize], mut a: usize, mut b: usize| {
            while a != b {
                if a > b { a = idom[a] } else { b = idom[b] }
            }
            a
        };
        let join = |idom: &[usize], preds: Vec<usize>| {
            preds.into_iter().reduce(|a, b| meet(idom, a, b)).unwrap_or(0)
        };
        let pred = |place: &SecondaryMap<OpId, usize>, v: ValueId| match graph.value(v).def {
            Def::Op(d) => in_flow(d).then(|| place[d]),
            // A float input is a source beside the others.
            Def::Param(_) if graph.ty(v).elem != ElemTy::I32 => Some(0),
            _ => None,
        };
        let mut read = SecondaryMap::<OpId, bool>::new();
        for (i, &op) in flow.iter().enumerate() {
            let preds = graph.node(op).args.iter().filter_map(|&a| pred(&place, a)).collect();
            let dominator = join(&idom, preds);
            idom.push(dominator);
            place[op] = i + 1;
            graph.node(op).args.iter().filter_map(|&a| graph.def(a)).for_each(|(d, _)| read[d] = true);
        }
        let acts = |op: &OpId| graph.node(*op).op.has_effect() && !read[*op];
        let acting = flow.iter().copied().filter(acts).map(|op| place[op]);
        let ends: Vec<usize> = graph.results.iter().filter_map(|&r| pred(&place, r)).chain(acting).collect();
        let mut at = join(&idom, ends);
        let mut ops = vec![];
        while at > 0 {
            ops.push(flow[at - 1]);
            at = idom[at];
        }
        ops.reverse();
        NarrowPoints { ops }
    }
}

/// A name for what a function computes, whatever its weights hold and its values are called: equal layers of a model
/// have equal hashes, so what is found out for one holds for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RegionHash(pub Digest);

impl Analysis for RegionHash {
    const NAME: &'static str = "region-hash";

    fn compute(_: &Module, graph: &Graph) -> Result<RegionHash> {
        let mut number = SecondaryMap::<ValueId, Option<usize>>::new();
        let mut next = 0;
        let mut text = String::new();
        let mut name = |text: &mut String, v: ValueId| {
            let fresh = number[v].is_none();
            let n = *number[v].get_or_insert_with(|| {
                next += 1;
                next
            });
            let kind = match graph.value(v).def {
                Def::Param(_) => 'p',
                Def::Op(_) => 'v',
                Def::Weight(_) => 'w',
                Def::State(_) => 's',
                Def::None => '-',
            };
            text.push_str(&format!(" {kind}{n}"));
            if fresh {
                text.push_str(&format!(":{}", graph.ty(v)));
            }
        };
        graph.params.iter().for_each(|&p| name(&mut text, p));
        for (_, node) in graph.ops() {
            // The packed form names contents.
            text.push_str(&format!("\n{:?}", crate::canon::unpacked(&node.op)));
            node.args.iter().for_each(|&a| name(&mut text, a));
            text.push_str(" =");
            name(&mut text, node.result);
        }
        text.push_str("\nreturn");
        graph.results.iter().for_each(|&r| name(&mut text, r));
        Ok(RegionHash(Digest::of(text.as_bytes())))
    }
}

/// The readers of each value, in program order, one entry for each use.
#[derive(Clone, Debug, Default)]
pub struct Users {
    users: SecondaryMap<ValueId, Vec<OpId>>,
}

impl Users {
    /// The readers of `v`.
    pub fn of(&self, v: ValueId) -> &[OpId] {
        &self.users[v]
    }
}

impl Analysis for Users {
    const NAME: &'static str = "users";

    fn compute(_: &Module, graph: &Graph) -> Result<Users> {
        let mut users = Users::default();
        for (op, node) in graph.ops() {
            node.args.iter().for_each(|&a| users.users[a].push(op));
        }
        Ok(users)
    }
}
