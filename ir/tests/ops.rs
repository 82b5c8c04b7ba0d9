//! What the general ops mean, on small tensors with results that were worked out by hand.

use quantc_ir::diag::Result;
use quantc_ir::eval::{Tensor, eval_pure};
use quantc_ir::graph::Graph;
use quantc_ir::module::Module;
use quantc_ir::ops::*;
use quantc_ir::ty::{ElemTy, Int, TensorTy};
use quantc_ir::weights::Store;

fn run(op: impl Into<Op>, args: &[&Tensor]) -> Result<Tensor> {
    let mut graph = Graph::new();
    let values: Vec<_> = args.iter().map(|a| graph.add_param("x", a.ty.clone())).collect();
    let y = graph.append(op, &values, None)?;
    graph.results = vec![y];
    Ok(eval_pure(&graph, args, 1, &Module::new("m"), &Store::in_memory())?.remove(0))
}

fn f(dims: &[u64], xs: &[f32]) -> Tensor {
    Tensor::f32(dims, xs.to_vec()).unwrap()
}

fn ints(elem: Int, dims: &[u64], xs: &[i64]) -> Tensor {
    let ty = TensorTy::fixed(ElemTy::Int(elem), dims);
    Tensor::from_ints(&ty, xs.iter().map(|&x| x.into())).unwrap()
}

/// 0, 1, 2, ..
fn count(dims: &[u64]) -> Tensor {
    let n = dims.iter().product::<u64>();
    f(dims, &(0..n).map(|i| i as f32).collect::<Vec<_>>())
}

#[track_caller]
fn is(op: impl Into<Op>, args: &[&Tensor], dims: &[usize], want: &[f64]) {
    let y = run(op, args).unwrap();
    assert_eq!((y.dims().as_slice(), y.reals().as_slice()), (dims, want));
}

#[track_caller]
fn refused(op: impl Into<Op>, args: &[&Tensor], why: &str) {
    let e = run(op, args).unwrap_err();
    assert!(e.message.contains(why), "{e}");
}

#[test]
fn numbers_of_every_kind() {
    let (a, b) = (ints(Int::I8, &[3], &[100, -7, 7]), ints(Int::I8, &[1], &[100]));
    is(Add {}, &[&a, &b], &[3], &[-56.0, 93.0, 107.0]);
    let two = ints(Int::I8, &[], &[-2]);
    is(Binary { kind: BinaryKind::Div }, &[&a, &two], &[3], &[-50.0, 3.0, -3.0]);
    is(Binary { kind: BinaryKind::Mod }, &[&a, &two], &[3], &[0.0, -1.0, -1.0]);
    is(Binary { kind: BinaryKind::Rem }, &[&a, &two], &[3], &[0.0, -1.0, 1.0]);
    is(Unary { kind: UnaryKind::BitNot }, &[&a], &[3], &[-101.0, 6.0, -8.0]);
    let (x, nan) = (f(&[2], &[-0.5, 2.0]), f(&[], &[f32::NAN]));
    is(Unary { kind: UnaryKind::Round }, &[&x], &[2], &[-0.0, 2.0]);
    is(Compare { order: Order::Less }, &[&x, &nan], &[2], &[0.0, 0.0]);
    assert!(run(Binary { kind: BinaryKind::Max }, &[&x, &nan]).unwrap().reals().iter().all(|x| x.is_nan()));
    refused(Binary { kind: BinaryKind::Shl }, &[&x, &x], "does not take");
    let places = ints(Int::I8, &[3], &[1, 1, 100]);
    is(Binary { kind: BinaryKind::Shl }, &[&a, &places], &[3], &[-56.0, -14.0, 0.0]);
    is(Binary { kind: BinaryKind::Shr }, &[&a, &places], &[3], &[50.0, -4.0, 0.0]);
    refused(Add {}, &[&x, &a], "different elements");
    let zero = ints(Int::I8, &[], &[0]);
    refused(Binary { kind: BinaryKind::Div }, &[&a, &zero], "divided by zero");
    let large = ints(Int::U64, &[2], &[-1, 3]);
    is(Cast { to: ElemTy::F64, ..Cast::default() }, &[&large], &[2], &[18446744073709551615.0, 3.0]);
    let x = f(&[4], &[-1.9, 300.0, f32::NAN, 0.4]);
    is(Cast { to: ElemTy::Int(Int::U8), ..Cast::default() }, &[&x], &[4], &[0.0, 255.0, 0.0, 0.0]);
    is(Cast { to: ElemTy::BOOL, ..Cast::default() }, &[&x], &[4], &[1.0, 1.0, 1.0, 1.0]);
    let bare = ElemTy::bare(&quantc_ir::formats::E5M2);
    let lost = run(Cast { to: bare, saturate: false }, &[&f(&[2], &[1e9, 61440.0])]).unwrap();
    assert_eq!(lost.reals(), [f64::INFINITY, f64::INFINITY]);
    is(Cast { to: bare, ..Cast::default() }, &[&f(&[1], &[-1e9])], &[1], &[-57344.0]);
}

#[test]
fn elements_are_moved() {
    let x = count(&[2, 3]);
    is(Transpose { perm: vec![1, 0] }, &[&x], &[3, 2], &[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    is(Slice { axis: 1, start: 2, len: 2, step: -2 }, &[&x], &[2, 2], &[2.0, 0.0, 5.0, 3.0]);
    refused(Slice { axis: 1, start: 1, len: 3, step: -1 }, &[&x], "do not lie");
    is(Concat { axis: 1 }, &[&x, &count(&[2, 1])], &[2, 4], &[0.0, 1.0, 2.0, 0.0, 3.0, 4.0, 5.0, 1.0]);
    let shape = quantc_ir::ty::Shape::fixed(&[2, 2, 1]);
    is(Expand { shape }, &[&count(&[2, 1])], &[2, 2, 1], &[0.0, 1.0, 0.0, 1.0]);
    let at = ints(Int::I64, &[2], &[-1, 0]);
    is(Gather { axis: 1 }, &[&x, &at], &[2, 2], &[2.0, 0.0, 5.0, 3.0]);
    refused(Gather { axis: 0 }, &[&x, &ints(Int::I64, &[1], &[2])], "index 2");
    let each = ints(Int::I32, &[1, 3], &[1, 0, 1]);
    is(GatherElements { axis: 0 }, &[&x, &each], &[1, 3], &[3.0, 1.0, 5.0]);
    is(GatherNd { batch: 1 }, &[&x, &ints(Int::I64, &[2, 1], &[2, 0])], &[2], &[2.0, 3.0]);
    let updates = f(&[1, 3], &[10.0, 20.0, 30.0]);
    let add = ScatterElements { axis: 0, combine: Combine::Add };
    is(add, &[&x, &each, &updates], &[2, 3], &[0.0, 21.0, 2.0, 13.0, 4.0, 35.0]);
    let at = ints(Int::I64, &[1, 1], &[1]);
    is(ScatterNd::default(), &[&x, &at, &updates], &[2, 3], &[0.0, 1.0, 2.0, 10.0, 20.0, 30.0]);
    let cond = ints(Int::Bool, &[3], &[1, 0, 1]);
    is(Select {}, &[&cond, &x, &f(&[1, 1], &[9.0])], &[2, 3], &[0.0, 9.0, 2.0, 3.0, 9.0, 5.0]);
}

#[test]
fn margins() {
    let pad = |mode| Pad { before: vec![2], after: vec![1], mode };
    let x = count(&[3]);
    is(pad(PadMode::Constant), &[&x, &f(&[], &[7.0])], &[6], &[7.0, 7.0, 0.0, 1.0, 2.0, 7.0]);
    is(pad(PadMode::Reflect), &[&x], &[6], &[2.0, 1.0, 0.0, 1.0, 2.0, 1.0]);
    is(pad(PadMode::Edge), &[&x], &[6], &[0.0, 0.0, 0.0, 1.0, 2.0, 2.0]);
    is(pad(PadMode::Wrap), &[&x], &[6], &[1.0, 2.0, 0.0, 1.0, 2.0, 0.0]);
    is(Pad { before: vec![-1], after: vec![1], ..Pad::default() }, &[&x], &[3], &[1.0, 2.0, 0.0]);
    refused(Pad { before: vec![-2], after: vec![-2], ..Pad::default() }, &[&x], "does not take margins");
}

#[test]
fn reductions() {
    let x = count(&[2, 3]);
    let reduce = |kind, axes: &[u8]| Reduce { kind, axes: axes.to_vec() };
    is(reduce(ReduceKind::Sum, &[1]), &[&x], &[2, 1], &[3.0, 12.0]);
    is(reduce(ReduceKind::Mean, &[0]), &[&x], &[1, 3], &[1.5, 2.5, 3.5]);
    is(reduce(ReduceKind::Max, &[0, 1]), &[&x], &[1, 1], &[5.0]);
    is(reduce(ReduceKind::Prod, &[]), &[&x], &[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let large = f(&[2], &[1000.0, 1000.0]);
    is(reduce(ReduceKind::LogSumExp, &[0]), &[&large], &[1], &[f64::from((1000.0 + 2f64.ln()) as f32)]);
    is(reduce(ReduceKind::Min, &[0]), &[&f(&[0], &[])], &[1], &[f64::INFINITY]);
    is(reduce(ReduceKind::Max, &[0]), &[&ints(Int::I8, &[0], &[])], &[1], &[-128.0]);
    refused(reduce(ReduceKind::Sum, &[1, 1]), &[&x], "twice");
    let tied = f(&[1, 4], &[1.0, 3.0, 3.0, 0.0]);
    is(ArgReduce { axis: 1, ..ArgReduce::default() }, &[&tied], &[1, 1], &[1.0]);
    is(ArgReduce { axis: 1, last: true, ..ArgReduce::default() }, &[&tied], &[1, 1], &[2.0]);
    is(TopK { axis: 1, k: 3, ..TopK::default() }, &[&tied], &[1, 3], &[3.0, 3.0, 1.0]);
    is(TopK { axis: 1, k: 3, indices: true, ..TopK::default() }, &[&tied], &[1, 3], &[1.0, 2.0, 0.0]);
    let back = Cumulate { axis: 0, exclusive: true, reverse: true, product: false };
    is(back, &[&count(&[4])], &[4], &[6.0, 5.0, 3.0, 0.0]);
    let y = run(Softmax { axis: 0, log: false }, &[&f(&[2, 1], &[0.0, 3f32.ln()])]).unwrap();
    assert!((y.reals()[0] - 0.25).abs() < 1e-6 && (y.reals()[1] - 0.75).abs() < 1e-6);
}

#[test]
fn products_and_windows() {
    let (a, b) = (count(&[2, 1, 2]), count(&[2, 2]));
    is(Dot {}, &[&a, &b], &[2, 1, 2], &[2.0, 3.0, 6.0, 11.0]);
    refused(Dot {}, &[&a, &count(&[3, 2])], "do not multiply");
    let equation = |text: &str| Einsum { equation: text.into() };
    is(equation("ij,kj->ik"), &[&b, &b], &[2, 2], &[1.0, 3.0, 3.0, 13.0]);
    is(equation("ii->"), &[&b], &[], &[3.0]);
    refused(equation("ij->ik"), &[&b], "axis `k`");
    // Two groups of one channel, one margin before, every second place.
    let conv = Conv { strides: vec![2], before: vec![1], groups: 2, ..Conv::default() };
    let w = f(&[2, 1, 2], &[1.0, 10.0, 2.0, 3.0]);
    is(conv, &[&count(&[1, 2, 3]), &w], &[1, 2, 2], &[0.0, 21.0, 9.0, 23.0]);
    let x = f(&[1, 1, 5], &[1.0, 5.0, 2.0, 4.0, 3.0]);
    let pool = Pool { kernel: vec![2], strides: vec![2], ceil: true, ..Pool::default() };
    is(pool.clone(), &[&x], &[1, 1, 3], &[5.0, 4.0, 3.0]);
    is(Pool { kind: PoolKind::ArgMax, ..pool.clone() }, &[&x], &[1, 1, 3], &[1.0, 3.0, 4.0]);
    is(Pool { kind: PoolKind::Mean, ..pool.clone() }, &[&x], &[1, 1, 3], &[3.0, 3.0, 3.0]);
    let counted = Pool { kind: PoolKind::Mean, before: vec![1], count_margins: true, ..pool };
    is(counted, &[&x], &[1, 1, 3], &[0.5, 3.5, 3.5]);
}
