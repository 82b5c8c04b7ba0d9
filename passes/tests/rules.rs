//! Proves every rewrite rule: both sides are evaluated on random tensors and compared.

use quantc_ir::eval::{Tensor, eval_pure};
use quantc_ir::graph::Graph;
use quantc_ir::module::Module;
use quantc_ir::ops::{MatMul, Step};
use quantc_ir::ty::{ElemTy, TensorTy};
use quantc_ir::weights::Store;
use quantc_passes::pass::Numerics;
use quantc_passes::rule;
use quantc_passes::saturate::{Rule, Sample, all_rules};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SEEDS: u64 = 24;

/// Any tensor of the type: codes of finite numbers, floats in both directions.
fn random(ty: &TensorTy, rng: &mut ChaCha8Rng) -> Tensor {
    let n = ty.shape.elements().expect("samples have static shapes") as usize;
    match ty.elem {
        ElemTy::Q(scheme) => {
            let finite = |code: &u8| scheme.format.decode(u32::from(*code)).is_finite();
            let mut code = || loop {
                let code = rng.random::<u8>() & scheme.format.mask() as u8;
                if finite(&code) {
                    return code;
                }
            };
            Tensor::codes(ty, (0..n).map(|_| code()).collect()).unwrap()
        }
        ElemTy::I32 => {
            Tensor::i32(&ty.shape.dims().unwrap(), (0..n).map(|_| rng.random_range(0..4)).collect()).unwrap()
        }
        _ => Tensor::float(ty, (0..n).map(|_| rng.random_range(-2.0f32..2.0)).collect()).unwrap(),
    }
}

/// How far apart results may be, as a share of the largest of them.
fn tolerance(numerics: Numerics) -> f32 {
    match numerics {
        // One rounding of an intermediate result, kept or not.
        Numerics::Exact => 4e-6,
        Numerics::Reassociates => 1e-4,
        Numerics::Requantizes => 0.1,
    }
}

fn eval(graph: &Graph, args: &[Tensor]) -> Tensor {
    let args: Vec<&Tensor> = args.iter().collect();
    let mut out = eval_pure(graph, &args, 1, &Module::new("rule"), &Store::in_memory()).unwrap();
    out.remove(0)
}

/// How far the sides of a rule are apart, as a share of the largest number on the left: the largest over all samples,
/// seeds and ways in which the rule applies. With it, how many samples there were.
fn apart(rule: &'static Rule) -> (f32, usize) {
    let samples = (rule.samples)();
    let mut most = 0f32;
    for sample in &samples {
        let (lhs, sides) = rule.sides(sample).unwrap_or_else(|e| panic!("{}: {e}", rule.name));
        for seed in 0..SEEDS {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let args: Vec<Tensor> = lhs.params.iter().map(|&p| random(lhs.ty(p), &mut rng)).collect();
            let left = eval(&lhs, &args);
            for rhs in &sides {
                let right = eval(rhs, &args);
                assert_eq!(left.ty, right.ty, "{}", rule.name);
                let (a, b) = (left.f32s().unwrap(), right.f32s().unwrap());
                assert!(a.iter().chain(b).all(|x| x.is_finite()), "{} with seed {seed}", rule.name);
                let top = a.iter().fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
                most = a.iter().zip(b).fold(most, |m, (a, b)| m.max((a - b).abs() / top));
            }
        }
    }
    (most, samples.len())
}

#[test]
fn both_sides_are_equal() {
    let mut proved = 0;
    for rule in all_rules() {
        let (apart, samples) = apart(rule);
        assert!(samples > 0, "{} has no samples", rule.name);
        assert!(apart <= tolerance(rule.numerics), "{}: its sides are {apart} apart", rule.name);
        proved += samples;
    }
    assert!(proved > 40, "only {proved} samples");
}

#[test]
fn wrong_equations_are_found_out() {
    static WRONG: Rule = rule! {
        /// `silu(p) = p then relu`, which it is not.
        "wrong", Exact, "(silu (matmul:m ?x ?w ?e*))" => "(matmul ?x ?w ?e*)",
        root: |_| Some(MatMul { epilogue: vec![Step::Relu], packed: String::new() }.into()),
        samples: || {
            let ty = |dims: &[u64]| TensorTy::fixed(ElemTy::F32, dims);
            vec![Sample::new().value("x", ty(&[3, 4])).value("w", ty(&[2, 4]))]
        },
    };
    assert!(apart(&WRONG).0 > 100.0 * tolerance(Numerics::Exact));
}

#[test]
fn names_are_unique_and_equations_are_written_down() {
    let mut names: Vec<&str> = all_rules().map(|r| r.name).collect();
    let n = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), n);
    for rule in all_rules() {
        assert!(rule.doc.contains('='), "{} has no equation", rule.name);
    }
}
