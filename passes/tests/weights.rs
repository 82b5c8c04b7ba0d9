//! Rounding to nearest, checked against arithmetic written out by hand in f64.

use quantc_ir::build;
use quantc_ir::entity::WeightId;
use quantc_ir::eval::{Tensor, eval_pure, weight_tensor};
use quantc_ir::formats::{self, Format};
use quantc_ir::graph::Graph;
use quantc_ir::module::Module;
use quantc_ir::ops::{Embedding, MatMul, OpKind, Real};
use quantc_ir::quant;
use quantc_ir::ty::{Dim, ElemTy, TensorTy};
use quantc_ir::weights::{Store, WeightDecl, WeightSource};
use quantc_passes::analysis::Function;
use quantc_passes::pass::{Changed, Declared, Env, Pass, PassCx, PassState, Remark};
use quantc_passes::weights::options::{FormatName, Grouping, ScaleType, ZeroPoints};
use quantc_passes::weights::{BiasCorrect, QuantizeActivations, RoundToNearest};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const N: usize = 7;
const K: usize = 43;

fn numbers(n: usize, k: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut w: Vec<f32> = (0..n * k).map(|_| rng.random_range(-1.0f32..1.3).powi(3)).collect();
    // A row of zeros, and one of positive numbers only.
    w[..k].fill(0.0);
    w[k..2 * k].iter_mut().for_each(|x| *x = x.abs() + 0.25);
    w
}

fn inline(name: &str, dims: &[u64], w: &[f32]) -> WeightDecl {
    let bytes = w.iter().flat_map(|x| x.to_le_bytes()).collect();
    WeightDecl {
        name: name.into(),
        ty: TensorTy::fixed(ElemTy::F32, dims),
        source: WeightSource::Inline(bytes),
    }
}

/// `main (%x) = matmul %x, @w`.
fn module(n: usize, k: usize, w: &[f32]) -> (Module, WeightId) {
    let mut module = Module::new("m");
    let id = module.weights.push(inline("w", &[n as u64, k as u64], w));
    let mut graph = Graph::new();
    let x = graph.add_param("x", TensorTy::new(ElemTy::F32, [Dim::Sym('t'), Dim::Static(k as u64)]));
    let ty = module.weights[id].ty.clone();
    let value = graph.weight(id, &ty);
    let y = graph.append(MatMul::default(), &[x, value], Some("y")).unwrap();
    graph.results = vec![y];
    module.main = graph;
    (module, id)
}

fn run(pass: &dyn Pass, module: &mut Module, env: Env<'_>) -> (Changed, Vec<Remark>) {
    pass.validate().unwrap();
    let mut state = PassState::default();
    let mut cx = PassCx::new(module, Function::Main, env, pass, &mut state);
    let changed = pass.run(&mut cx).unwrap();
    (changed, state.remarks)
}

/// What is multiplied instead of `@w`, evaluated.
fn dequantized(module: &Module, store: &Store) -> Vec<f32> {
    let mut graph = module.main.clone();
    let value = graph.ops().find(|(_, n)| n.op.kind() == OpKind::Dequantize).unwrap().1.result;
    graph.results = vec![value];
    graph.params.clear();
    graph.drop_dead();
    eval_pure(&graph, &[], 1, module, store).unwrap()[0].f32s().unwrap().to_vec()
}

/// The element groups of a matrix.
fn groups(n: usize, k: usize, group: Grouping) -> Vec<Vec<usize>> {
    let (rows, cols) = match group {
        Grouping::Row => (1, k),
        Grouping::Tensor => (n, k),
        Grouping::Columns(c) => (1, c as usize),
        Grouping::Tile([r, c]) => (r as usize, c as usize),
    };
    let mut all = vec![];
    for r in (0..n).step_by(rows) {
        for c in (0..k).step_by(cols) {
            let row = |i: usize| (c..k.min(c + cols)).map(move |j| i * k + j);
            all.push((r..n.min(r + rows)).flat_map(row).collect());
        }
    }
    all
}

/// The magnitude that the scale maps to 1 code, in f64, and what the scale type does to it at most.
fn scale_by_hand(w: &[f64], format: &Format, zero: ZeroPoints) -> f64 {
    let top = |f: fn(f64, f64) -> f64| w.iter().fold(0.0, |m, &x| f(m, x));
    let (min, max) = (top(f64::min), top(f64::max));
    let absmax = max.max(-min);
    if absmax == 0.0 {
        return 1.0;
    }
    let bits = format.bits as i32;
    match (format.is_int(), zero) {
        (true, ZeroPoints::Asymmetric) => (max - min) / f64::from((1 << bits) - 1),
        (true, ZeroPoints::Symmetric) if bits < 4 => absmax / (f64::from(1 << (bits - 1)) - 0.5),
        (true, ZeroPoints::Symmetric) => absmax / f64::from((1 << (bits - 1)) - 1),
        (false, _) => absmax / f64::from(format.max()),
    }
}

/// The largest distance of neighbouring finite numbers of a float format at magnitude `x`.
fn step_at(format: &Format, x: f64) -> f64 {
    let mut codes: Vec<f64> = (0..=format.mask())
        .map(|c| f64::from(format.decode(c)))
        .filter(|v| v.is_finite() && *v >= 0.0)
        .collect();
    codes.sort_by(f64::total_cmp);
    let above = codes.partition_point(|&c| c < x).clamp(1, codes.len() - 1);
    codes[above] - codes[above - 1]
}

#[test]
fn errors_are_at_most_half_a_step() {
    let w = numbers(N, K, 3);
    let groupings = [
        Grouping::Row,
        Grouping::Tensor,
        Grouping::Columns(8),
        Grouping::Columns(16),
        Grouping::Columns(64),
        Grouping::Tile([2, 16]),
        Grouping::Tile([3, 10]),
    ];
    let names = ["int8", "uint8", "int4", "uint4", "int3", "int2", "e4m3", "e5m2", "e2m1"];
    let mut checked = 0;
    for name in names {
        let format = Format::by_name(name).unwrap();
        for group in groupings {
            for zero in [ZeroPoints::Symmetric, ZeroPoints::Asymmetric] {
                for scale in [ScaleType::F32, ScaleType::F16, ScaleType::Bf16] {
                    let pass = RoundToNearest {
                        format: FormatName(format),
                        group,
                        zero,
                        scale,
                        ..RoundToNearest::default()
                    };
                    if pass.validate().is_err() {
                        continue;
                    }
                    check(&pass, &w);
                    checked += 1;
                }
            }
        }
    }
    // int8, int4, int3, int2: both; uint8, uint4: asymmetric; floats: symmetric.
    assert_eq!(checked, (4 * 2 + 2 + 3) * groupings.len() * 3);
}

fn check(pass: &RoundToNearest, w: &[f32]) {
    let store = Store::in_memory();
    let (mut module, _) = module(N, K, w);
    let (changed, _) = run(pass, &mut module, Env::new(&store));
    assert_eq!(changed, Changed::Yes);
    let got = dequantized(&module, &store);
    let about = pass.options();
    let eps = match pass.scale {
        ScaleType::F16 => 2f64.powi(-11),
        ScaleType::Bf16 => 2f64.powi(-8),
        _ => 2f64.powi(-23),
    };
    for group in groups(N, K, pass.group) {
        let numbers: Vec<f64> = group.iter().map(|&i| f64::from(w[i])).collect();
        let scale = scale_by_hand(&numbers, pass.format.0, pass.zero);
        for &i in &group {
            let (want, got) = (f64::from(w[i]), f64::from(got[i]));
            // Half a step, and what the rounded scale does to codes at the end of the range.
            let bound = if pass.format.0.is_int() {
                let most = f64::from(1u32 << pass.format.0.bits);
                0.5 * scale * (1.0 + eps) + eps * scale * most
            } else {
                0.5 * scale
                    * step_at(pass.format.0, want.abs() / scale * (1.0 - eps))
                        .max(step_at(pass.format.0, want.abs() / scale * (1.0 + eps)))
                    + eps * want.abs() * 2.0
            };
            assert!(
                (got - want).abs() <= bound * 1.0001,
                "{about} at {i}: {got} for {want}, off by more than {bound}"
            );
            if want == 0.0 {
                assert_eq!(got, 0.0, "{about} at {i}: zero is exact");
            }
        }
    }
}

#[test]
fn symmetric_int8_codes_are_those_computed_by_hand() {
    let w = [1.0, -2.0, 0.5, 127.0 / 64.0, 3.0, 0.0, -6.0, 1.5];
    let store = Store::in_memory();
    let (mut module, _) = module(2, 4, &w);
    let (_, remarks) = run(&RoundToNearest::default(), &mut module, Env::new(&store));
    let tensor = |name: &str| weight_tensor(&module, &store, module.weight(name).unwrap()).unwrap();
    let codes: Vec<i8> = tensor("w.q").code_bytes().unwrap().iter().map(|&c| c as i8).collect();
    // 1 / (2/127) = 63.5 rounds to even; 3 / (6/127) = 63.5 as well.
    assert_eq!(codes, [64, -127, 32, 126, 64, 0, -127, 32]);
    assert_eq!(tensor("w.s").f32s().unwrap(), [2.0 / 127.0, 6.0 / 127.0]);
    assert_eq!(remarks.len(), 1);
    assert_eq!(remarks[0].place, "@w");
    assert!(remarks[0].text.contains("16.000 bits per weight"), "{}", remarks[0].text);
}

#[test]
fn results_do_not_depend_on_threads_or_on_the_store() {
    // Several blocks of rows; the group of the whole tensor is larger than what is held at a time.
    let (n, k) = (6000, 200);
    let w = numbers(n, k, 5);
    for group in [Grouping::Columns(64), Grouping::Tile([48, 48]), Grouping::Tensor] {
        let pass = RoundToNearest { format: FormatName(&formats::INT4), group, ..RoundToNearest::default() };
        let made = |threads: usize| {
            let store = Store::in_memory();
            let (mut module, _) = module(n, k, &w);
            let (_, remarks) = run(&pass, &mut module, Env { threads, ..Env::new(&store) });
            let sources: Vec<WeightSource> = module.weights.values().map(|d| d.source.clone()).collect();
            (sources, remarks, store.stats().made)
        };
        let (one, four) = (made(1), made(4));
        assert_eq!(one, four);

        // The same codes and scales as from the whole weight at once.
        let store = Store::in_memory();
        let (mut module, id) = module(n, k, &w);
        run(&pass, &mut module, Env::new(&store));
        let tensor = |name: &str| weight_tensor(&module, &store, module.weight(name).unwrap()).unwrap();
        let (codes, scales) = (tensor("w.q"), tensor("w.s"));
        let scheme = codes.ty.elem.scheme().unwrap();
        let view = store.view(&module.weights, id).unwrap();
        let mut all = vec![];
        let mut emit = |_: std::ops::Range<usize>, codes: &[u8]| {
            all.extend_from_slice(codes);
            Ok(())
        };
        let params =
            quant::quantize_view(&view, &scheme, quant::Options::default(), usize::MAX, &mut emit).unwrap();
        assert_eq!(codes.code_bytes().unwrap(), all);
        // Scales are kept as their type stores them.
        assert_eq!(scales.f32s().unwrap(), params.scales);
    }
}

#[test]
fn a_weight_is_quantized_once_and_remembered() {
    let store = Store::in_memory();
    let pass = RoundToNearest::default();
    let w = numbers(N, K, 1);
    let (mut first, _) = module(N, K, &w);
    let (_, told) = run(&pass, &mut first, Env::new(&store));
    let (mut second, _) = module(N, K, &w);
    let (_, told_again) = run(&pass, &mut second, Env::new(&store));
    assert_eq!((store.stats().made, store.stats().reused), (1, 1));
    assert_eq!(told, told_again, "remarks do not depend on what the store knows");
    assert_eq!(first, second);
}

#[test]
fn searching_never_makes_the_error_larger() {
    let w = numbers(N, K, 9);
    let error = |search| {
        let pass = RoundToNearest {
            format: FormatName(&formats::INT3),
            group: Grouping::Columns(16),
            search,
            ..RoundToNearest::default()
        };
        let store = Store::in_memory();
        let (mut module, _) = module(N, K, &w);
        run(&pass, &mut module, Env::new(&store));
        let got = dequantized(&module, &store);
        got.iter().zip(&w).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
    };
    use quantc_passes::weights::options::RangeSearch;
    assert!(error(RangeSearch::Mse) < error(RangeSearch::None));
}

#[test]
fn a_tied_table_keeps_its_numbers_as_an_embedding() {
    let store = Store::in_memory();
    let w = numbers(N, K, 2);
    let (mut module, id) = module(N, K, &w);
    let alias = module.weights.push(WeightDecl {
        name: "table".into(),
        ty: module.weights[id].ty.clone(),
        source: WeightSource::Alias(id),
    });
    let ids = module.main.add_param("ids", TensorTy::new(ElemTy::I32, [Dim::Sym('t')]));
    let ty = module.weights[alias].ty.clone();
    let table = module.main.weight(alias, &ty);
    let e = module.main.append(Embedding::default(), &[ids, table], Some("e")).unwrap();
    let same = module.main.weight(id, &ty);
    let e2 = module.main.append(Embedding::default(), &[ids, same], Some("e2")).unwrap();
    module.main.results.extend([e, e2]);
    run(&RoundToNearest::default(), &mut module, Env::new(&store));
    let weights: Vec<_> =
        module.main.ops().map(|(_, n)| (n.op.kind(), module.main.as_weight(n.args[1]))).collect();
    let q = module.weight("w.q").unwrap();
    let s = module.weight("w.s").unwrap();
    assert_eq!(
        weights,
        [
            (OpKind::Dequantize, Some(s)),
            (OpKind::MatMul, None),
            (OpKind::Embedding, Some(alias)),
            (OpKind::Embedding, Some(id)),
        ]
    );
    assert_eq!(module.weights[q].ty.to_string(), format!("tensor<{N}x{K}x!q<int8:f32 axis 0>>"));
}

#[test]
fn a_number_that_is_not_finite_is_refused_with_its_weight() {
    let store = Store::in_memory();
    let mut w = numbers(N, K, 2);
    w[K + 5] = f32::NAN;
    let (mut module, _) = module(N, K, &w);
    let pass = RoundToNearest::default();
    let mut state = PassState::default();
    let mut cx = PassCx::new(&mut module, Function::Main, Env::new(&store), &pass, &mut state);
    let error = pass.run(&mut cx).unwrap_err();
    assert!(error.to_string().contains("[1, 5]") && error.to_string().contains("@w"), "{error}");
}

#[test]
fn rounded_activations_are_near_and_shared() {
    let store = Store::in_memory();
    let w = numbers(N, K, 4);
    let (mut module, id) = module(N, K, &w);
    let (x, ty) = (module.main.params[0], module.weights[id].ty.clone());
    let value = module.main.weight(id, &ty);
    let z = module.main.append(MatMul::default(), &[x, value], Some("z")).unwrap();
    module.main.results.push(z);
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let input =
        Tensor::f32(&[3, K as u64], (0..3 * K).map(|_| rng.random_range(-1.0..1.0)).collect()).unwrap();
    let eval = |module: &Module| {
        eval_pure(&module.main, &[&input], 3, module, &store).unwrap()[0].f32s().unwrap().to_vec()
    };
    run(&RoundToNearest::default(), &mut module, Env::new(&store));
    let before = eval(&module);
    let (changed, _) = run(&QuantizeActivations::default(), &mut module, Env::new(&store));
    assert_eq!(changed, Changed::Yes);
    let after = eval(&module);
    let top = before.iter().fold(0f32, |m, x| m.max(x.abs()));
    assert!(before.iter().zip(&after).all(|(a, b)| (a - b).abs() < 0.02 * top));
    assert_ne!(before, after);
    let count = |kind| module.main.ops().filter(|(_, n)| n.op.kind() == kind).count();
    assert_eq!((count(OpKind::Quantize), count(OpKind::DynamicScale), count(OpKind::MatMul)), (1, 1, 2));
    let (again, _) = run(&QuantizeActivations::default(), &mut module, Env::new(&store));
    assert_eq!(again, Changed::No);
    // Types are what inference says.
    for (_, node) in module.main.ops() {
        let ty = build::infer(&module.main, &node.op, &node.args, &|_| None).unwrap();
        assert_eq!(&ty, module.main.ty(node.result));
    }
}

#[test]
fn a_corrected_product_has_no_mean_error() {
    let tokens = 61;
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    // Channels with means of their own, some of them none.
    let offsets: Vec<f32> =
        (0..K).map(|j| if j % 3 == 0 { 0.0 } else { rng.random_range(-2.0..2.0) }).collect();
    let x: Vec<f32> = (0..tokens * K).map(|i| offsets[i % K] + rng.random_range(-1.0f32..1.0)).collect();
    let rows = Tensor::f32(&[tokens as u64, K as u64], x.clone()).unwrap();
    let w = numbers(N, K, 17);
    let (mut module, _) = module(N, K, &w);
    let means: Vec<Real> = (0..K)
        .map(|j| Real(x.iter().skip(j).step_by(K).map(|&x| f64::from(x)).sum::<f64>() / tokens as f64))
        .collect();
    module.calibration.insert("main.x.mean".into(), means);
    let store = Store::in_memory();
    let result = |module: &Module| -> Vec<f32> {
        let results = eval_pure(&module.main, &[&rows], tokens as u64, module, &store).unwrap();
        results[0].f32s().unwrap().to_vec()
    };
    let exact = result(&module);
    // The largest mean error of a channel.
    let off = |module: &Module| {
        let got = result(module);
        let mean = |n: usize| {
            let errors = got.iter().zip(&exact).skip(n).step_by(N).map(|(a, b)| f64::from(a - b));
            (errors.sum::<f64>() / tokens as f64).abs()
        };
        (0..N).map(mean).fold(0.0, f64::max)
    };
    let mut state = PassState::default();
    let int4 = RoundToNearest { format: FormatName(&formats::INT4), ..RoundToNearest::default() };
    let mut offs = vec![];
    let passes: [&dyn Pass; 2] = [&int4, &BiasCorrect::default()];
    for pass in passes {
        let mut cx = PassCx::new(&mut module, Function::Main, Env::new(&store), pass, &mut state);
        assert_eq!(pass.run(&mut cx).unwrap(), Changed::Yes);
        quantc_ir::verify::verify(&module).unwrap_or_else(|e| panic!("{}", e.show(&module)));
        offs.push(off(&module));
    }
    eprintln!("largest mean error: rounded {:.3e}, corrected {:.3e}", offs[0], offs[1]);
    assert!(offs[0] > 1e-2 && offs[1] < 1e-5, "{offs:?}");
}
