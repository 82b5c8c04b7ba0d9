//! Proves every rewrite rule: both sides are evaluated on random tensors and compared.

use quantc_ir::eval::{Tensor, eval_pure};
use quantc_ir::graph::Graph;
use quantc_ir::module::Module;
use quantc_ir::ty::{ElemTy, TensorTy};
use quantc_ir::weights::Store;
use quantc_passes::pass::Numerics;
use quantc_passes::saturate::all_rules;
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

#[test]
fn both_sides_are_equal() {
    let mut proved = 0;
    for rule in all_rules() {
        let samples = (rule.samples)();
        assert!(!samples.is_empty(), "{} has no samples", rule.name);
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
                    let top = a.iter().fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
                    for (a, b) in a.iter().zip(b) {
                        let apart = (a - b).abs() / top;
                        assert!(
                            apart <= tolerance(rule.numerics),
                            "{} with seed {seed}: {a} and {b} are {apart} apart\n{sample:?}",
                            rule.name
                        );
                    }
                }
            }
            proved += 1;
        }
    }
    assert!(proved > 40, "only {proved} samples");
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
