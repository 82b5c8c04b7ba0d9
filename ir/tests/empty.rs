//! Ops on tensors with extents of 0 and of 1: results of the declared shape, and no panics.

use quantc_ir::eval::{Tensor, eval_pure};
use quantc_ir::graph::Graph;
use quantc_ir::module::Module;
use quantc_ir::ops::{Add, MatMul, Op, RmsNorm, Slice, Step, Transpose};
use quantc_ir::ty::{ElemTy, TensorTy};
use quantc_ir::weights::Store;

/// The result of `op` on f32 tensors of these extents, each filled with one number.
fn run(op: impl Into<Op>, args: &[(&[u64], f32)]) -> Tensor {
    let mut graph = Graph::new();
    let param = |graph: &mut Graph, dims: &[u64]| graph.add_param("x", TensorTy::fixed(ElemTy::F32, dims));
    let values: Vec<_> = args.iter().map(|(dims, _)| param(&mut graph, dims)).collect();
    let y = graph.append(op, &values, None).unwrap();
    graph.results = vec![y];
    let filled = |&(dims, x): &(&[u64], f32)| {
        let n = dims.iter().product::<u64>() as usize;
        Tensor::f32(dims, vec![x; n]).unwrap()
    };
    let tensors: Vec<Tensor> = args.iter().map(filled).collect();
    let tensors: Vec<&Tensor> = tensors.iter().collect();
    eval_pure(&graph, &tensors, 1, &Module::new("m"), &Store::in_memory()).unwrap().remove(0)
}

#[test]
fn a_product_over_nothing_is_zero() {
    let y = run(MatMul::default(), &[(&[2, 0], 0.0), (&[3, 0], 0.0)]);
    assert_eq!((y.dims(), y.f32s().unwrap()), (vec![2, 3], &[0.0; 6][..]));
    let biased = MatMul { epilogue: vec![Step::Add(0)], packed: String::new() };
    let y = run(biased, &[(&[2, 0], 0.0), (&[3, 0], 0.0), (&[3], 1.5)]);
    assert_eq!(y.f32s().unwrap(), [1.5; 6]);
}

#[test]
fn tensors_without_elements_stay_so() {
    assert_eq!(run(MatMul::default(), &[(&[0, 4], 1.0), (&[3, 4], 1.0)]).dims(), [0, 3]);
    assert_eq!(run(MatMul::default(), &[(&[2, 4], 1.0), (&[0, 4], 1.0)]).dims(), [2, 0]);
    assert_eq!(
        run(Slice { axis: 1, start: 1, len: 2, ..Default::default() }, &[(&[4, 8, 0], 1.0)]).dims(),
        [4, 2, 0]
    );
    assert_eq!(
        run(Slice { axis: 0, start: 1, len: 2, ..Default::default() }, &[(&[4, 0], 1.0)]).dims(),
        [2, 0]
    );
    assert_eq!(run(Transpose::default(), &[(&[0, 4], 1.0)]).dims(), [4, 0]);
    assert_eq!(run(RmsNorm::default(), &[(&[3, 0], 1.0)]).dims(), [3, 0]);
    assert_eq!(run(Add {}, &[(&[0, 4], 1.0), (&[4], 1.0)]).dims(), [0, 4]);
}

#[test]
fn extents_of_one_are_not_special() {
    let y = run(MatMul::default(), &[(&[3, 1], 2.0), (&[1, 1], 5.0)]);
    assert_eq!((y.dims(), y.f32s().unwrap()), (vec![3, 1], &[10.0; 3][..]));
    assert_eq!(
        run(Slice { axis: 1, start: 0, len: 1, ..Default::default() }, &[(&[2, 1], 7.0)]).f32s().unwrap(),
        [7.0; 2]
    );
}
