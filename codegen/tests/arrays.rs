//! Graphs over arrays: every op on odd shapes, compiled for every target that this machine runs, against the evaluator.
#![cfg(feature = "llvm")]

use quantc_codegen::arrays::{self, io};
use quantc_codegen::engine::{self, GraphRequest};
use quantc_codegen::nest::{Bin, Node};
use quantc_codegen::spec::KernelSpec;
use quantc_codegen::targets::{self, TARGETS};
use quantc_ir::entity::ValueId;
use quantc_ir::eval::{Evaluator, Tensor};
use quantc_ir::formats;
use quantc_ir::module::Module;
use quantc_ir::ops::*;
use quantc_ir::scheme::{Group, Scheme, Zero};
use quantc_ir::target::TargetDesc;
use quantc_ir::ty::{ElemTy, Float, Int, Shape, TensorTy};
use quantc_ir::weights::{Store, WeightDecl, WeightSource};
use quantc_runtime::engine::{Engine, OpenOptions};
use quantc_runtime::session::{Session, SessionOptions};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// A graph in the making, with the numbers of its inputs.
struct Net {
    module: Module,
    inputs: Vec<Tensor>,
    rng: ChaCha8Rng,
}

impl Net {
    fn new() -> Net {
        Net { module: Module::new("test"), inputs: vec![], rng: ChaCha8Rng::seed_from_u64(7) }
    }

    /// An input of random numbers in a range; integers are whole.
    fn input(&mut self, elem: impl Into<ElemTy>, dims: &[u64], range: std::ops::Range<f64>) -> ValueId {
        let ty = TensorTy::fixed(elem.into(), dims);
        let n: u64 = dims.iter().product();
        let numbers = (0..n).map(|_| self.rng.random_range(range.clone())).collect();
        self.inputs.push(Tensor::from_reals(&ty, numbers).expect("numbers fit"));
        let name = format!("x{}", self.inputs.len());
        self.module.main.add_param(&name, ty)
    }

    fn f32(&mut self, dims: &[u64]) -> ValueId {
        self.input(ElemTy::F32, dims, -2.0..2.0)
    }

    /// A constant of random numbers.
    fn weight(&mut self, elem: impl Into<ElemTy>, dims: &[u64], range: std::ops::Range<f64>) -> ValueId {
        let ty = TensorTy::fixed(elem.into(), dims);
        let n: u64 = dims.iter().product();
        let numbers = (0..n).map(|_| self.rng.random_range(range.clone())).collect();
        let tensor = Tensor::from_reals(&ty, numbers).expect("numbers fit");
        let bytes = io::to_bytes(&tensor).expect("bytes of a plain type");
        let name = format!("w{}", self.module.weights.len());
        let id = self.module.weights.push(WeightDecl {
            name,
            ty: ty.clone(),
            source: WeightSource::Inline(bytes),
        });
        self.module.main.weight(id, &ty)
    }

    fn op(&mut self, op: impl Into<Op>, args: &[ValueId]) -> ValueId {
        let at = self.module.main.order().len();
        self.module.main.insert_inferred(at, op, args, None).expect("the op fits its operands")
    }

    /// An op whose result is one of the graph's.
    fn out(&mut self, op: impl Into<Op>, args: &[ValueId]) -> ValueId {
        let y = self.op(op, args);
        self.module.main.results.push(y);
        y
    }

    /// Compiles for every target that runs here, and compares every result with the evaluator's.
    #[track_caller]
    fn check(&self, tolerance: f64) {
        let all: Vec<&'static TargetDesc> =
            TARGETS.iter().copied().filter(|t| targets::runs_here(t)).collect();
        self.check_on(&all, tolerance);
    }

    /// The same for the least and the best target that runs here: for the many kernels of one kind.
    #[track_caller]
    fn check_extremes(&self, tolerance: f64) {
        self.check_on(&[TARGETS[0], targets::host()], tolerance);
    }

    #[track_caller]
    fn check_on(&self, targets: &[&'static TargetDesc], tolerance: f64) {
        let store = Store::in_memory();
        let want = Evaluator::new(&self.module, &store).unwrap().step(&self.inputs, u64::MAX).unwrap();
        let names = |n: usize| (0..n).map(|i| i.to_string()).collect::<Vec<_>>();
        let (inputs, outputs) = (names(self.inputs.len()), names(want.len()));
        for &target in targets {
            let folder = tempfile::tempdir().unwrap();
            let out = folder.path().join("engine");
            let request = GraphRequest {
                module: &self.module,
                store: &store,
                target,
                inputs: &inputs,
                outputs: &outputs,
                facts: vec![],
                report: serde_json::Map::new(),
            };
            engine::write_graph(request, &out).unwrap_or_else(|e| panic!("{}: {e}", target.name));
            let engine = Arc::new(Engine::open(&out, &OpenOptions::default()).unwrap());
            for threads in [1, 3] {
                let options = SessionOptions { threads, poison: true, ..SessionOptions::default() };
                let mut session = Session::new(engine.clone(), &options).unwrap();
                let bytes: Vec<Vec<u8>> = self.inputs.iter().map(|t| io::to_bytes(t).unwrap()).collect();
                let refs: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
                session.run_arrays(&refs).unwrap();
                for (i, want) in want.iter().enumerate() {
                    let got = io::from_bytes(&want.ty, session.array(i).unwrap()).unwrap();
                    let producer = self.module.main.def(self.module.main.results[i]).map(|(_, n)| &n.op);
                    close(&got, want, tolerance, &format!("{}: result {i} {producer:?}", target.name));
                }
            }
        }
    }

    /// The error of lowering it.
    fn refused(&self) -> String {
        let store = Store::in_memory();
        match arrays::lower(&self.module, &store, targets::host(), &[], &[]) {
            Ok(_) => panic!("it was lowered"),
            Err(e) => e.to_string(),
        }
    }
}

#[track_caller]
fn close(got: &Tensor, want: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(got.ty, want.ty, "{what}");
    let exact = want.ty.elem.int().is_some() || want.ty.elem.scheme().is_some();
    let tolerance = match want.ty.elem {
        ElemTy::F16 => tolerance.max(2e-3),
        ElemTy::Bf16 => tolerance.max(1e-2),
        _ if exact => 0.0,
        _ => tolerance,
    };
    for (i, (g, w)) in got.reals().into_iter().zip(want.reals()).enumerate() {
        let same = g == w || (g.is_nan() && w.is_nan()) || (g - w).abs() <= tolerance * w.abs().max(1.0);
        assert!(same, "{what}: element {i} is {g}, not {w}");
    }
}

const FLOATS: [ElemTy; 4] = [ElemTy::F32, ElemTy::F64, ElemTy::F16, ElemTy::Bf16];

fn ints() -> Vec<ElemTy> {
    Int::ALL.iter().filter(|&&i| i != Int::Bool).map(|&i| ElemTy::Int(i)).collect()
}

#[test]
fn functions_of_one_number() {
    use UnaryKind as U;
    let mut net = Net::new();
    for elem in FLOATS {
        let x = net.input(elem, &[3, 37], -0.99..0.99);
        let wide = net.input(elem, &[3, 37], -9.0..9.0);
        let above = net.input(elem, &[37], 1.0..5.0);
        for kind in [U::Acos, U::Asin, U::Atanh] {
            net.out(Unary { kind }, &[x]);
        }
        for kind in [U::Acosh, U::Log, U::Sqrt, U::Reciprocal] {
            net.out(Unary { kind }, &[above]);
        }
        for kind in [
            U::Abs,
            U::Asinh,
            U::Atan,
            U::Ceil,
            U::Cos,
            U::Cosh,
            U::Erf,
            U::Exp,
            U::Floor,
            U::IsInf,
            U::IsNan,
            U::Neg,
            U::Round,
            U::Sigmoid,
            U::Sign,
            U::Sin,
            U::Sinh,
            U::Softplus,
            U::Tan,
        ] {
            // Tangents of halves are far from each other.
            if kind == U::Tan {
                net.out(Unary { kind }, &[x]);
            } else {
                net.out(Unary { kind }, &[wide]);
            }
        }
        net.out(Relu {}, &[wide]);
        net.out(Tanh {}, &[wide]);
        net.out(Silu {}, &[wide]);
        net.out(Gelu { approx: false }, &[wide]);
        net.out(Gelu { approx: true }, &[wide]);
    }
    for elem in ints() {
        let x = net.input(elem, &[41], -100.0..100.0);
        for kind in [U::Abs, U::Neg, U::Sign, U::BitNot] {
            net.out(Unary { kind }, &[x]);
        }
    }
    net.check_extremes(4e-6);
}

#[test]
fn functions_of_two_numbers_repeat_axes() {
    use BinaryKind as B;
    let mut net = Net::new();
    for elem in FLOATS.into_iter().chain(ints()) {
        let real = elem.is_real();
        let (a, b) = (net.input(elem, &[3, 1, 19], 1.0..50.0), net.input(elem, &[5, 19], 1.0..6.0));
        let signed = net.input(elem, &[5, 1], -40.0..40.0);
        for kind in [B::Sub, B::Div, B::Min, B::Max, B::Mod, B::Rem] {
            net.out(Binary { kind }, &[a, b]);
        }
        for kind in [B::Sub, B::Div, B::Min, B::Max, B::Rem] {
            net.out(Binary { kind }, &[signed, b]);
        }
        if !real {
            for kind in [B::And, B::Or, B::Xor, B::Shl, B::Shr] {
                net.out(Binary { kind }, &[a, b]);
            }
        }
        if elem != ElemTy::Int(Int::U64) && !matches!(elem, ElemTy::F16 | ElemTy::Bf16) {
            let (x, y) = (net.input(elem, &[23], 1.0..4.0), net.input(elem, &[23], 0.0..5.0));
            net.out(Binary { kind: B::Pow }, &[x, y]);
        }
        net.out(Add {}, &[a, b]);
        net.out(Mul {}, &[a, signed]);
        for order in [Order::Equal, Order::Less, Order::LessEqual] {
            let cond = net.out(Compare { order }, &[a, b]);
            net.out(Select {}, &[cond, signed, b]);
        }
    }
    net.check_extremes(4e-6);
}

#[test]
fn numbers_of_one_type_as_another() {
    let mut net = Net::new();
    let all: Vec<ElemTy> = FLOATS.into_iter().chain(ints()).chain([ElemTy::BOOL]).collect();
    for &from in &all {
        let x = net.input(from, &[43], -300.0..300.0);
        for &to in all.iter().filter(|&&to| to != from) {
            net.out(Cast { to, saturate: true }, &[x]);
        }
    }
    let x = net.input(ElemTy::F32, &[301], -600.0..600.0);
    for format in
        [&formats::E4M3, &formats::E5M2, &formats::INT8, &formats::UINT8, &formats::INT4, &formats::UINT4]
    {
        let codes = net.out(Cast { to: ElemTy::bare(format), saturate: true }, &[x]);
        net.out(Cast { to: ElemTy::F32, saturate: true }, &[codes]);
        if !format.is_int() {
            net.out(Cast { to: ElemTy::bare(format), saturate: false }, &[x]);
        }
    }
    net.check_extremes(0.0);
}

#[test]
fn elements_move() {
    let mut net = Net::new();
    for elem in [ElemTy::F32, ElemTy::F16, ElemTy::I64, ElemTy::Int(Int::U8), ElemTy::BOOL] {
        let x = net.input(elem, &[3, 5, 7], 0.0..2.0);
        let t = net.out(Transpose { perm: vec![2, 0, 1] }, &[x]);
        net.out(Reshape { shape: Shape::fixed(&[7, 15]) }, &[t]);
        net.out(Slice { axis: 1, start: 4, len: 2, step: -3 }, &[x]);
        let cut = net.op(Slice { axis: 2, start: 1, len: 2, step: 2 }, &[t]);
        net.out(Concat { axis: 2 }, &[t, cut, t]);
        let row = net.op(Slice { axis: 0, start: 1, len: 1, step: 1 }, &[x]);
        net.out(Expand { shape: Shape::fixed(&[4, 5, 7]) }, &[row]);
        for mode in [PadMode::Constant, PadMode::Edge, PadMode::Reflect, PadMode::Wrap] {
            net.out(Pad { before: vec![1, 0, 2], after: vec![0, 3, -1], mode }, &[x]);
        }
        let eye = net.weight(elem, &[1, 5, 1], 0.0..2.0);
        net.out(Concat { axis: 0 }, &[eye, eye]);
    }
    let x = net.f32(&[2, 3, 11]);
    let y = net.op(Relu {}, &[x]);
    let value = net.input(ElemTy::F32, &[], 3.0..4.0);
    let p = net.op(Pad { before: vec![0, 1, 2], after: vec![1, 0, 3], mode: PadMode::Constant }, &[y, value]);
    net.out(Unary { kind: UnaryKind::Exp }, &[p]);
    net.check(4e-6);
}

#[test]
fn many_numbers_become_one() {
    use ReduceKind as R;
    let mut net = Net::new();
    for elem in [ElemTy::F32, ElemTy::F64, ElemTy::F16] {
        let x = net.input(elem, &[3, 37, 5], 0.1..2.0);
        for axes in [vec![0], vec![1], vec![2], vec![0, 2], vec![0, 1, 2]] {
            for kind in [R::Sum, R::Mean, R::Max, R::Min, R::L1, R::L2, R::SumSquare, R::LogSum, R::LogSumExp]
            {
                net.out(Reduce { kind, axes: axes.clone() }, &[x]);
            }
        }
        let few = net.input(elem, &[4, 7], 0.7..1.2);
        net.out(Reduce { kind: R::Prod, axes: vec![1] }, &[few]);
        for axis in 0..3 {
            for log in [false, true] {
                net.out(Softmax { axis, log }, &[x]);
            }
            for (least, last) in [(false, false), (true, true)] {
                net.out(ArgReduce { axis, least, last }, &[x]);
            }
            for (product, exclusive, reverse) in
                [(false, false, false), (false, true, true), (true, true, false)]
            {
                net.out(Cumulate { axis, product: product && axis != 1, exclusive, reverse }, &[x]);
            }
            for (least, indices) in [(false, false), (true, true)] {
                net.out(TopK { axis, k: 3, least, indices }, &[x]);
            }
        }
    }
    for elem in [ElemTy::I32, ElemTy::I64, ElemTy::Int(Int::U8), ElemTy::Int(Int::I8)] {
        let x = net.input(elem, &[3, 19, 5], -50.0..50.0);
        for kind in [R::Sum, R::Max, R::Min, R::Prod, R::L1, R::SumSquare] {
            net.out(Reduce { kind, axes: vec![1] }, &[x]);
        }
        // Equal numbers are told apart by their place.
        net.out(TopK { axis: 1, k: 7, least: false, indices: true }, &[x]);
        net.out(ArgReduce { axis: 1, least: false, last: true }, &[x]);
        net.out(Cumulate { axis: 2, product: false, exclusive: false, reverse: true }, &[x]);
    }
    let x = net.f32(&[2, 3, 29]);
    let (gain, bias) = (net.weight(ElemTy::F32, &[29], 0.5..1.5), net.weight(ElemTy::F32, &[29], -1.0..1.0));
    net.out(LayerNorm { eps: Real(1e-5) }, &[x, gain, bias]);
    net.out(RmsNorm { eps: Real(1e-6) }, &[x, gain]);
    net.check_extremes(4e-6);
}

#[test]
fn windows_give_numbers() {
    let mut net = Net::new();
    let x = net.f32(&[2, 3, 9, 11]);
    let half = net.input(ElemTy::F16, &[1, 2, 13], -2.0..2.0);
    let bytes = net.input(ElemTy::Int(Int::U8), &[1, 2, 6, 7], 0.0..255.0);
    let pool = |kind, kernel: &[u32], strides: &[u32], margins: u32, ceil, count_margins| Pool {
        kind,
        kernel: kernel.to_vec(),
        strides: strides.to_vec(),
        dilations: vec![],
        before: vec![margins; kernel.len()],
        after: vec![margins; kernel.len()],
        ceil,
        count_margins,
        p: Real(2.0),
    };
    for kind in [PoolKind::Max, PoolKind::ArgMax, PoolKind::Mean, PoolKind::Norm] {
        for ceil in [false, true] {
            net.out(pool(kind, &[3, 2], &[2, 3], 1, ceil, false), &[x]);
            net.out(pool(kind, &[3, 2], &[2, 3], 1, ceil, true), &[x]);
            net.out(pool(kind, &[2], &[2], 0, ceil, false), &[half]);
        }
    }
    net.out(Pool { dilations: vec![2, 3], ..pool(PoolKind::Max, &[3, 2], &[1, 1], 0, false, false) }, &[x]);
    net.out(pool(PoolKind::Max, &[2, 2], &[1, 2], 1, false, false), &[bytes]);
    net.check(4e-6);
}

#[test]
fn places_are_computed() {
    let mut net = Net::new();
    for elem in [ElemTy::F32, ElemTy::Int(Int::I8), ElemTy::I64] {
        let x = net.input(elem, &[4, 6, 5], -9.0..9.0);
        let at = net.input(ElemTy::I64, &[2, 3], -4.4..3.4);
        for axis in 0..3 {
            net.out(Gather { axis }, &[x, at]);
        }
        let each = net.input(ElemTy::I32, &[3, 6, 2], -4.4..3.4);
        net.out(GatherElements { axis: 0 }, &[x, each]);
        let lists = net.input(ElemTy::I64, &[3, 2], -4.4..3.4);
        net.out(GatherNd { batch: 0 }, &[x, lists]);
        let one_each = net.input(ElemTy::I64, &[4, 1], -4.4..3.4);
        net.out(GatherNd { batch: 1 }, &[x, one_each]);
        let updates = net.input(elem, &[3, 6, 2], -9.0..9.0);
        let slices = net.input(elem, &[3, 5], -9.0..9.0);
        for combine in [Combine::Replace, Combine::Add, Combine::Mul, Combine::Min, Combine::Max] {
            net.out(ScatterElements { axis: 0, combine }, &[x, each, updates]);
            net.out(ScatterNd { combine }, &[x, lists, slices]);
        }
    }
    net.check(4e-6);
}

#[test]
fn matrices_are_multiplied() {
    let mut net = Net::new();
    for (m, k, n) in [(1, 7, 5), (3, 64, 16), (13, 37, 70), (17, 5, 129)] {
        let a = net.f32(&[2, m, k]);
        let b = net.f32(&[2, k, n]);
        net.out(Dot {}, &[a, b]);
        let shared = net.f32(&[k, n]);
        net.out(Dot {}, &[a, shared]);
        let fixed = net.weight(ElemTy::F32, &[k, n], -1.0..1.0);
        let y = net.op(Dot {}, &[a, fixed]);
        // What follows is taken into the product: a bias, a function, and another array.
        let bias = net.weight(ElemTy::F32, &[n], -1.0..1.0);
        let y = net.op(Add {}, &[y, bias]);
        let y = net.op(Relu {}, &[y]);
        let other = net.f32(&[2, m, n]);
        net.out(Add {}, &[y, other]);
        let rows = net.weight(ElemTy::F32, &[n, k], -1.0..1.0);
        net.out(MatMul { epilogue: vec![Step::Add(0), Step::Silu], packed: String::new() }, &[a, rows, bias]);
        let t = net.op(Transpose { perm: vec![0, 2, 1] }, &[b]);
        net.out(Dot {}, &[t, shared]);
    }
    for elem in [ElemTy::F64, ElemTy::F16, ElemTy::I32, ElemTy::I64] {
        let (a, b) = (net.input(elem, &[3, 1, 4, 9], -3.0..3.0), net.input(elem, &[2, 9, 5], -3.0..3.0));
        net.out(Dot {}, &[a, b]);
    }
    let (a, b, c) = (net.f32(&[3, 5, 7]), net.f32(&[7, 4]), net.f32(&[4, 3]));
    net.out(Einsum { equation: "bij,jk,kb->ik".into() }, &[a, b, c]);
    net.out(Einsum { equation: "bij->jb".into() }, &[a]);
    net.check(2e-5);
}

fn conv(strides: &[u32], dilations: &[u32], before: &[u32], after: &[u32], groups: u32) -> Conv {
    Conv {
        strides: strides.to_vec(),
        dilations: dilations.to_vec(),
        before: before.to_vec(),
        after: after.to_vec(),
        groups,
    }
}

#[test]
fn arrays_are_convolved() {
    let mut net = Net::new();
    let x = net.f32(&[2, 5, 9, 11]);
    for (outs, kernel) in [(7u64, [3u64, 2]), (33, [1, 1]), (70, [3, 3])] {
        let w = net.weight(ElemTy::F32, &[outs, 5, kernel[0], kernel[1]], -1.0..1.0);
        net.out(conv(&[], &[], &[], &[], 1), &[x, w]);
        let y = net.op(conv(&[2, 1], &[1, 2], &[1, 2], &[2, 0], 1), &[x, w]);
        let bias = net.weight(ElemTy::F32, &[outs, 1, 1], -1.0..1.0);
        let y = net.op(Add {}, &[y, bias]);
        let y = net.out(Relu {}, &[y]);
        // The next one reads channels as they lie.
        let w = net.weight(ElemTy::F32, &[3, outs, 1, 1], -1.0..1.0);
        net.out(conv(&[], &[], &[], &[], 1), &[y, w]);
        let single = net.weight(ElemTy::F32, &[outs, 1, 3, 3], -1.0..1.0);
        let d = net.op(conv(&[1, 2], &[], &[1, 1], &[1, 1], outs as u32), &[y, single]);
        let d = net.op(Add {}, &[d, bias]);
        net.out(Relu {}, &[d]);
    }
    let computed = net.f32(&[6, 5, 2, 2]);
    net.out(conv(&[], &[], &[], &[], 1), &[x, computed]);
    // An array with margins, and a part of it, whose margins are others.
    let positive = net.op(Relu {}, &[x]);
    let w = net.weight(ElemTy::F32, &[4, 5, 3, 3], -1.0..1.0);
    net.out(conv(&[], &[], &[1, 1], &[1, 1], 1), &[positive, w]);
    let part = net.op(Slice { axis: 2, start: 0, len: 6, step: 1 }, &[positive]);
    net.out(conv(&[], &[], &[1, 1], &[1, 1], 1), &[part, w]);
    let grouped = net.f32(&[2, 6, 8]);
    let w = net.weight(ElemTy::F32, &[4, 3, 3], -1.0..1.0);
    net.out(conv(&[2], &[], &[1], &[0], 2), &[grouped, w]);
    let cube = net.f32(&[1, 2, 4, 5, 3]);
    let w = net.weight(ElemTy::F32, &[3, 2, 2, 2, 2], -1.0..1.0);
    net.out(conv(&[], &[], &[1, 0, 1], &[0, 1, 0], 1), &[cube, w]);
    for elem in [ElemTy::F16, ElemTy::F64, ElemTy::I32] {
        let (x, w) = (net.input(elem, &[1, 3, 6, 6], -4.0..4.0), net.input(elem, &[2, 3, 3, 3], -4.0..4.0));
        net.out(conv(&[], &[], &[1, 1], &[1, 1], 1), &[x, w]);
    }
    net.check(2e-5);
}

/// Sums of bytes, as the importer spells them.
fn byte_products(signed: bool) -> Net {
    let mut net = Net::new();
    let (elem, range, zero) = match signed {
        true => (ElemTy::Int(Int::I8), -128.0..127.0, -3.0),
        false => (ElemTy::Int(Int::U8), 0.0..255.0, 131.0),
    };
    let centred = |net: &mut Net, dims: &[u64]| {
        let x = net.input(elem, dims, range.clone());
        let wide = net.op(Cast { to: ElemTy::I32, saturate: true }, &[x]);
        let zero = net.weight(ElemTy::I32, &[], zero..zero + 0.1);
        net.op(Binary { kind: BinaryKind::Sub }, &[wide, zero])
    };
    for (channels, outs) in [(3u64, 5u64), (8, 70), (17, 33)] {
        let x = centred(&mut net, &[1, channels, 7, 6]);
        let w = net.weight(ElemTy::I32, &[outs, channels, 3, 3], -128.0..127.0);
        let sum = net.out(conv(&[2, 1], &[], &[1, 1], &[1, 0], 1), &[x, w]);
        // Scaled, rounded and cut, all in the product's kernel.
        let real = net.op(Cast { to: ElemTy::F32, saturate: true }, &[sum]);
        let factor = net.weight(ElemTy::F32, &[outs, 1, 1], 0.0001..0.001);
        let real = net.op(Mul {}, &[real, factor]);
        let real = net.op(Unary { kind: UnaryKind::Round }, &[real]);
        net.out(Cast { to: ElemTy::Int(Int::I8), saturate: true }, &[real]);
        let single = net.weight(ElemTy::I32, &[channels, 1, 3, 3], -128.0..127.0);
        net.out(conv(&[], &[], &[1, 1], &[1, 1], channels as u32), &[x, single]);
        let rows = centred(&mut net, &[9, channels]);
        let matrix = net.weight(ElemTy::I32, &[channels, outs], -128.0..127.0);
        net.out(Dot {}, &[rows, matrix]);
    }
    net
}

#[test]
fn products_of_bytes_are_exact() {
    for signed in [false, true] {
        let net = byte_products(signed);
        net.check(0.0);
        let lowered = arrays::lower(&net.module, &Store::in_memory(), targets::host(), &[], &[]).unwrap();
        let bytes = |l: &&arrays::Launch| matches!(&l.spec, KernelSpec::Conv(c) if c.name == "bytes");
        assert_eq!(lowered.launches.iter().filter(bytes).count(), 6, "dense products are of bytes");
    }
}

impl Net {
    /// Numbers as codes with one scale and zero point, read again.
    fn coded(&mut self, x: ValueId, format: &'static formats::Format, scale: f64, zero: i32) -> ValueId {
        let scheme = Scheme { format, group: Group::Tensor, zero: Zero::Point(format), scale: Float::F32 };
        let rank = self.module.main.ty(x).rank();
        let ones = vec![1; rank];
        let scale = self.weight(ElemTy::F32, &ones, scale..scale * 1.01);
        let zero_ty = ElemTy::Q(zero_scheme(scheme, format));
        let zero = self.codes(zero_ty, &ones, |_| zero as u8);
        let q = self.op(Quantize { to: scheme }, &[x, scale, zero]);
        self.op(Dequantize { to: Float::F32 }, &[q, scale, zero])
    }

    /// Constant codes.
    fn codes(&mut self, elem: ElemTy, dims: &[u64], mut code: impl FnMut(&mut ChaCha8Rng) -> u8) -> ValueId {
        let ty = TensorTy::fixed(elem, dims);
        let n: u64 = dims.iter().product();
        let mut bytes: Vec<u8> = (0..n).map(|_| code(&mut self.rng)).collect();
        if elem.scheme().is_some_and(|s| s.format.bits == 4) {
            // Two codes a byte, each row for itself.
            let row = dims.last().map_or(1, |&d| d as usize);
            let byte = |pair: &[u8]| pair[0] | pair.get(1).map_or(0, |high| high << 4);
            bytes = bytes.chunks(row).flat_map(|row| row.chunks(2).map(byte).collect::<Vec<_>>()).collect();
        }
        let name = format!("w{}", self.module.weights.len());
        let source = WeightSource::Inline(bytes);
        let id = self.module.weights.push(WeightDecl { name, ty: ty.clone(), source });
        self.module.main.weight(id, &ty)
    }

    /// Weights of signed bytes with a scale for each output, read. Those of `wide` have a zero point that makes them
    /// numbers beyond signed bytes.
    fn coded_weights(&mut self, dims: &[u64], wide: bool) -> ValueId {
        let format = if wide { &formats::UINT8 } else { &formats::INT8 };
        let zero = if wide { Zero::Point(format) } else { Zero::Symmetric };
        let group = if wide { Group::Tensor } else { Group::Axis(0) };
        let scheme = Scheme { format, group, zero, scale: Float::F32 };
        let shape = scheme.scale_shape(&Shape::fixed(dims)).unwrap().dims().unwrap();
        let q = self.codes(ElemTy::Q(scheme), dims, |rng| rng.random());
        let scale = self.weight(ElemTy::F32, &shape, 0.001..0.003);
        let zero = match wide {
            true => self.codes(ElemTy::Q(zero_scheme(scheme, format)), &shape, |_| 101),
            false => self.module.main.none(),
        };
        self.op(Dequantize { to: Float::F32 }, &[q, scale, zero])
    }
}

#[test]
fn matrices_of_codes_in_blocks_keep_them() {
    let formats =
        [(&formats::UINT4, true), (&formats::INT4, false), (&formats::UINT8, true), (&formats::INT8, true)];
    for (format, pointed) in formats {
        let mut net = Net::new();
        for (rows, outs, axis) in [(1u64, 40u64, 1u8), (9, 70, 0), (5, 3, 1)] {
            let zero = if pointed { Zero::Point(format) } else { Zero::Symmetric };
            let scheme = Scheme { format, group: Group::Block { axis, size: 8 }, zero, scale: Float::F32 };
            let dims = if axis == 1 { [outs, 48] } else { [48, outs] };
            let shape = scheme.scale_shape(&Shape::fixed(&dims)).unwrap().dims().unwrap();
            let mask = format.mask() as u8;
            let q = net.codes(ElemTy::Q(scheme), &dims, |rng| rng.random::<u8>() & mask);
            let scale = net.weight(ElemTy::F32, &shape, 0.01..0.1);
            let zero = match pointed {
                true => {
                    net.codes(ElemTy::Q(zero_scheme(scheme, format)), &shape, |rng| rng.random::<u8>() & mask)
                }
                false => net.module.main.none(),
            };
            let w = net.op(Dequantize { to: Float::F32 }, &[q, scale, zero]);
            let x = net.f32(&[rows, 48]);
            if axis == 1 {
                let y = net.op(MatMul::default(), &[x, w]);
                net.out(Relu {}, &[y]);
            } else {
                net.out(Dot {}, &[x, w]);
            }
        }
        net.check(2e-5);
        let lowered = arrays::lower(&net.module, &Store::in_memory(), targets::host(), &[], &[]).unwrap();
        let codes =
            |l: &&arrays::Launch| matches!(&l.spec, KernelSpec::Conv(c) if c.name.starts_with("codes"));
        assert_eq!(lowered.launches.iter().filter(codes).count(), 3, "{format}");
    }
}

#[test]
fn quantized_networks_give_the_same_codes() {
    for (format, zero) in [(&formats::UINT8, 121), (&formats::INT8, -7)] {
        for (channels, wide) in [(3, false), (16, false), (48, false), (20, true)] {
            let mut net = Net::new();
            let x = net.f32(&[2, 4, 9, 11]);
            let x = net.coded(x, format, 0.02, zero);
            let w = net.coded_weights(&[channels, 4, 3, 3], wide);
            let y = net.op(conv(&[], &[], &[1, 1], &[1, 1], 1), &[x, w]);
            let bias = net.weight(ElemTy::F32, &[channels, 1, 1], -1.0..1.0);
            let y = net.op(Add {}, &[y, bias]);
            let y = net.op(Relu {}, &[y]);
            // What follows wants margins of two kinds around the same array.
            let y = net.coded(y, format, 0.03, zero);
            for (kernel, pads) in [([3, 3], [1, 0]), ([5, 2], [2, 1]), ([1, 4], [0, 2])] {
                let w = net.coded_weights(&[channels, 1, kernel[0], kernel[1]], wide);
                let [before, after] = pads;
                let op = conv(&[1, 2], &[], &[before, before], &[after, before], channels as u32);
                let z = net.op(op, &[y, w]);
                let six = net.weight(ElemTy::F32, &[], 2.0..2.1);
                let none = net.weight(ElemTy::F32, &[], -0.5..-0.4);
                let z = net.op(Binary { kind: BinaryKind::Max }, &[z, none]);
                let z = net.op(Binary { kind: BinaryKind::Min }, &[six, z]);
                let z = net.coded(z, format, 0.021, zero);
                net.module.main.results.push(z);
            }
            let w = net.coded_weights(&[7, channels, 1, 1], wide);
            let z = net.op(conv(&[], &[], &[], &[], 1), &[y, w]);
            let z = net.coded(z, format, 0.05, zero);
            let w = net.coded_weights(&[5, 7, 2, 2], wide);
            let z = net.op(conv(&[], &[], &[0, 1], &[1, 0], 1), &[z, w]);
            let z = net.coded(z, format, 0.01, zero);
            net.module.main.results.extend([z, y]);
            net.check(1e-6);
            let lowered = arrays::lower(&net.module, &Store::in_memory(), targets::host(), &[], &[]).unwrap();
            let of = |name: &str| {
                let named = |l: &&arrays::Launch| matches!(&l.spec, KernelSpec::Conv(c) if c.name == name);
                lowered.launches.iter().filter(named).count()
            };
            assert_eq!((of("single"), of("bytes")), if wide { (0, 0) } else { (3, 3) });
            let divides = |l: &&arrays::Launch| match &l.spec {
                KernelSpec::Conv(c) => c.nodes.iter().any(|n| matches!(n, Node::Binary(Bin::Div, ..))),
                _ => false,
            };
            assert_eq!(
                lowered.launches.iter().any(|l| divides(&l)),
                wide,
                "sums of bytes are scaled at once"
            );
        }
    }
}

#[test]
fn codes_are_made_and_read() {
    let mut net = Net::new();
    let x = net.input(ElemTy::F32, &[4, 10], -9.0..9.0);
    for format in [&formats::INT8, &formats::UINT8, &formats::INT4, &formats::E4M3] {
        for group in [Group::Tensor, Group::Axis(0), Group::Block { axis: 1, size: 4 }] {
            let scheme = Scheme { format, group, zero: Zero::Symmetric, scale: Float::F32 };
            let shape = scheme.scale_shape(&Shape::fixed(&[4, 10])).unwrap().dims().unwrap();
            let scale = net.weight(ElemTy::F32, &shape, 0.05..0.2);
            let none = net.module.main.none();
            let q = net.op(Quantize { to: scheme }, &[x, scale, none]);
            net.out(BitcastStorage {}, &[q]);
            net.out(Dequantize { to: Float::F32 }, &[q, scale, none]);
        }
    }
    net.check(1e-6);
}

#[test]
fn what_has_no_kernel_is_refused_by_name() {
    let mut net = Net::new();
    let x = net.input(ElemTy::Int(Int::U64), &[3, 4], 0.0..9.0);
    net.out(ArgReduce { axis: 0, least: false, last: false }, &[x]);
    let said = net.refused();
    assert!(said.contains("`arg_reduce` has no kernel for elements of type u64"), "{said}");

    let mut net = Net::new();
    let ty = TensorTy { elem: ElemTy::F32, shape: Shape::parse("?nx4").unwrap() };
    let x = net.module.main.add_param("x", ty);
    net.out(Relu {}, &[x]);
    let said = net.refused();
    assert!(said.contains("no fixed extents") && said.contains("--dim"), "{said}");
}

#[test]
fn calls_with_other_arrays_are_refused() {
    let mut net = Net::new();
    let x = net.f32(&[3, 4]);
    let cond = net.input(ElemTy::BOOL, &[4], 0.0..1.0);
    net.out(Select {}, &[cond, x, x]);
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("engine");
    let store = Store::in_memory();
    let names: Vec<String> = vec!["x".into(), "cond".into()];
    let write = || {
        let request = GraphRequest {
            module: &net.module,
            store: &store,
            target: TARGETS[0],
            inputs: &names,
            outputs: &names[..1],
            facts: vec![],
            report: serde_json::Map::new(),
        };
        engine::write_graph(request, &out).unwrap();
    };
    write();
    let engine = Arc::new(Engine::open(&out, &OpenOptions::default()).unwrap());
    let mut session = Session::new(engine, &SessionOptions::default()).unwrap();
    let said = |e: quantc_runtime::Error| e.to_string();
    assert!(said(session.run_arrays(&[&[0; 48]]).unwrap_err()).contains("1 arrays; the engine takes 2"));
    let short = said(session.run_arrays(&[&[0; 44], &[0; 4]]).unwrap_err());
    assert!(short.contains("input \"x\" has 44 bytes, f32 3x4 has 48"), "{short}");
    let truth = said(session.run_arrays(&[&[0; 48], &[0, 1, 2, 0]]).unwrap_err());
    assert!(truth.contains("truth values besides 0 and 1"), "{truth}");
    assert!(said(session.decode(0, 0).unwrap_err()).contains("arrays, not tokens"));
    session.run_arrays(&[&[0; 48], &[0; 4]]).unwrap();
    assert!(session.array(1).is_err());
    // The same graph gives the same bytes.
    let bytes = |name: &str| std::fs::read(out.join(name)).unwrap();
    let before: Vec<_> = ["manifest.pb", "kernels.o", "weights.bin"].map(bytes).to_vec();
    write();
    assert_eq!(before, ["manifest.pb", "kernels.o", "weights.bin"].map(bytes).to_vec());
}
