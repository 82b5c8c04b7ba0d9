//! Saturation as a whole: what becomes of functions.

use super::*;
use crate::fuse;
use quantc_ir::entity::{StateId, ValueId, WeightId};
use quantc_ir::formats;
use quantc_ir::ops::{
    Add, CacheAppend, Dequantize, MatMul, Mul, Op, OpKind, QMatMul, RmsNorm, Silu, Step as Epilogue,
};
use quantc_ir::scheme::{Group, Scheme, Zero};
use quantc_ir::ty::{Dim, ElemTy, Float, TensorTy};

const K: u64 = 64;

struct Builder {
    graph: Graph,
    weights: usize,
}

impl Builder {
    fn new() -> Builder {
        Builder { graph: Graph::new(), weights: 0 }
    }

    fn input(&mut self) -> ValueId {
        self.graph.add_param("x", TensorTy::new(ElemTy::F32, [Dim::Sym('t'), Dim::Static(K)]))
    }

    fn weight(&mut self, ty: TensorTy) -> ValueId {
        self.weights += 1;
        self.graph.weight(quantc_ir::entity::Entity::new(self.weights), &ty)
    }

    fn dequantized(&mut self) -> ValueId {
        let scheme = Scheme {
            format: &formats::INT8,
            group: Group::Axis(0),
            zero: Zero::Symmetric,
            scale: Float::F32,
        };
        let q = self.weight(TensorTy::fixed(ElemTy::Q(scheme), &[K, K]));
        let s = self.weight(TensorTy::fixed(ElemTy::F32, &[K, 1]));
        self.graph.append(Dequantize::default(), &[q, s], None).unwrap()
    }

    fn matmul(&mut self, x: ValueId, name: Option<&str>) -> ValueId {
        let w = self.dequantized();
        self.graph.append(MatMul::default(), &[x, w], name).unwrap()
    }

    /// A gated block with a residual connection.
    fn block(&mut self, x: ValueId, i: usize) -> ValueId {
        let gain = self.weight(TensorTy::fixed(ElemTy::F32, &[K]));
        let name = |s: &str| format!("{s}{i}");
        let n = self.graph.append(RmsNorm::default(), &[x, gain], Some(&name("n"))).unwrap();
        let gate = self.matmul(n, Some(&name("gate")));
        let up = self.matmul(n, Some(&name("up")));
        let act = self.graph.append(Silu::default(), &[gate], Some(&name("act"))).unwrap();
        let h = self.graph.append(Mul::default(), &[act, up], Some(&name("h"))).unwrap();
        let down = self.matmul(h, Some(&name("down")));
        self.graph.append(Add::default(), &[x, down], Some(&name("y"))).unwrap()
    }
}

fn rules() -> impl Iterator<Item = &'static Rule> {
    fuse::RULES.iter().flat_map(|list| list.iter())
}

fn saturate(graph: &mut Graph) -> Report {
    Saturator::new(rules(), Limits::default()).unwrap().run(graph, &TableCost::default()).unwrap()
}

fn kinds(graph: &Graph) -> Vec<OpKind> {
    graph.ops().map(|(_, n)| n.op.kind()).collect()
}

/// A chain of `n` gated residual blocks, saturated; the graph, and how often rules matched.
fn chain(n: usize) -> (Graph, u64) {
    let mut b = Builder::new();
    let mut x = b.input();
    for i in 0..n {
        x = b.block(x, i);
    }
    b.graph.results = vec![x];
    let report = saturate(&mut b.graph);
    assert_eq!(report.limit, None);
    let matches = report.rules.iter().map(|r| r.matches).sum();
    (b.graph, matches)
}

#[test]
fn a_long_chain_of_residual_blocks_is_fused_with_work_in_proportion() {
    let (graph, matches) = chain(32);
    let block = [OpKind::RmsNorm, OpKind::QMatMul, OpKind::QMatMul, OpKind::QMatMul];
    assert_eq!(kinds(&graph), block.repeat(32));
    let epilogues: Vec<Vec<Epilogue>> =
        graph.ops().filter_map(|(_, n)| Some(n.op.is::<QMatMul>()?.epilogue.clone())).collect();
    let one = [vec![], vec![Epilogue::Silu, Epilogue::Mul(0)], vec![Epilogue::Add(0)]];
    assert!(epilogues.chunks(3).all(|block| block == one), "{epilogues:?}");
    let (_, of_two) = chain(2);
    assert!(matches <= 17 * of_two, "{matches} matches in 32 blocks, {of_two} in two");
}

#[test]
fn values_say_which_rules_made_them() {
    let mut b = Builder::new();
    let x = b.input();
    let y = b.block(x, 0);
    b.graph.results = vec![y];
    let report = saturate(&mut b.graph);
    insta::assert_snapshot!(report.explain(), @r"
    %up0: dequant-into-matmul
    %h0: silu-of-matmul, mul-after-matmul, dequant-into-matmul
    %y0: add-before-matmul, dequant-into-matmul
    ");
}

#[test]
fn what_is_read_twice_stays() {
    let mut b = Builder::new();
    let x = b.input();
    let m = b.matmul(x, None);
    let act = b.graph.append(Silu::default(), &[m], None).unwrap();
    let y = b.graph.append(Mul::default(), &[act, m], None).unwrap();
    b.graph.results = vec![y];
    saturate(&mut b.graph);
    assert_eq!(kinds(&b.graph), [OpKind::QMatMul, OpKind::Silu, OpKind::Mul]);
}

#[test]
fn effects_stay_as_often_as_they_were() {
    let mut b = Builder::new();
    let x = b.input();
    let m = b.matmul(x, None);
    let act = b.graph.append(Silu::default(), &[m], None).unwrap();
    let state = TensorTy::fixed(ElemTy::F32, &[16, K]);
    let state = b.graph.state(quantc_ir::entity::Entity::new(0), &state);
    let first = b.graph.append(CacheAppend::default(), &[state, act], None).unwrap();
    // The same rows once more, and nobody reads what the state then holds.
    b.graph.append(CacheAppend::default(), &[state, act], None).unwrap();
    b.graph.results = vec![first];
    saturate(&mut b.graph);
    assert_eq!(kinds(&b.graph), [OpKind::QMatMul, OpKind::CacheAppend, OpKind::CacheAppend]);
    assert_eq!(b.graph.results, [first]);
}

#[test]
fn an_operand_is_computed_before_the_product_that_takes_it() {
    let mut b = Builder::new();
    let x = b.input();
    let m = b.matmul(x, Some("m"));
    let late = b.graph.append(RmsNorm::default(), &[x], Some("late")).unwrap();
    let y = b.graph.append(Add::default(), &[m, late], Some("y")).unwrap();
    b.graph.results = vec![y];
    saturate(&mut b.graph);
    assert_eq!(kinds(&b.graph), [OpKind::RmsNorm, OpKind::QMatMul]);
    assert_eq!(b.graph.value(y).name.as_deref(), Some("y"));
    assert_eq!(b.graph.results, [y]);
}

#[test]
fn equal_functions_are_solved_once() {
    let mut saturator = Saturator::new(rules(), Limits::default()).unwrap();
    let mut graphs: Vec<Graph> = vec![];
    for first_weight in [0, 40] {
        let mut b = Builder::new();
        b.weights = first_weight;
        let x = b.input();
        let y = b.block(x, 7);
        b.graph.results = vec![y];
        let report = saturator.run(&mut b.graph, &TableCost::default()).unwrap();
        assert_eq!(report.replayed, first_weight == 40);
        assert!(report.changed);
        graphs.push(b.graph);
    }
    assert_eq!(kinds(&graphs[0]), kinds(&graphs[1]));
    let weights = |g: &Graph| -> Vec<Option<WeightId>> {
        g.ops().flat_map(|(_, n)| n.args.iter().map(|&a| g.as_weight(a))).collect()
    };
    assert_ne!(weights(&graphs[0]), weights(&graphs[1]));
}

#[test]
fn a_function_without_matches_is_left_as_it_is() {
    let mut b = Builder::new();
    let x = b.input();
    let y = b.graph.append(Silu::default(), &[x], None).unwrap();
    b.graph.results = vec![y];
    let before = b.graph.clone();
    let report = saturate(&mut b.graph);
    assert!(!report.changed);
    assert_eq!(b.graph, before);
}

#[test]
fn limits_end_the_search_and_are_told() {
    let mut b = Builder::new();
    let x = b.input();
    let y = b.block(x, 0);
    b.graph.results = vec![y];
    let run = |graph: &mut Graph, limits| {
        Saturator::new(rules(), limits).unwrap().run(graph, &TableCost::default()).unwrap()
    };
    assert_eq!(run(&mut b.graph.clone(), Limits { rounds: 1, nodes: 1000 }).limit, Some("rounds"));
    assert_eq!(run(&mut b.graph.clone(), Limits { rounds: 9, nodes: 3 }).limit, Some("nodes"));
}

#[test]
fn a_rule_that_changes_a_type_is_refused() {
    static WRONG: &[Rule] = &[crate::rule! {
        /// `silu(x) = cast(x)`, which it is not.
        "wrong", Exact, "(silu ?x)" => "(cast ?x)",
        root: |_| Some(Op::Cast(quantc_ir::ops::Cast { to: Float::Bf16.into(), ..Default::default() })), samples: Vec::new,
    }];
    let mut b = Builder::new();
    let x = b.input();
    let y = b.graph.append(Silu::default(), &[x], None).unwrap();
    b.graph.results = vec![y];
    let error = Saturator::new(WRONG, Limits::default())
        .unwrap()
        .run(&mut b.graph, &TableCost::default())
        .unwrap_err();
    assert_eq!(error.kind, quantc_ir::diag::Kind::Bug);
    assert!(error.message.contains("`wrong` makes"), "{error}");
}

#[test]
fn a_state_that_is_a_leaf_is_not_a_weight() {
    let mut g = Graph::new();
    let ty = TensorTy::fixed(ElemTy::F32, &[4, 4]);
    let state = g.state(<StateId as quantc_ir::entity::Entity>::new(0), &ty);
    let y = g.append(Silu::default(), &[state], None).unwrap();
    g.results = vec![y];
    let (region, _) = Region::of(&g).unwrap();
    assert_eq!(region.leaves[0].0, region::LeafKind::State);
    let built = build_egraph(&region).unwrap();
    assert!(!built.egraph[built.ops[0]].data.constant);
}
