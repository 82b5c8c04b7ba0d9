//! What the tests of this crate share: running pipelines on texts, and evaluating modules.

use quantc_ir::diag::{Diags, Result};
use quantc_ir::eval::{Evaluator, Tensor};
use quantc_ir::module::Module;
use quantc_ir::ops::Op;
use quantc_ir::target::{Backend, CpuDesc, Dot, PackJob, Packed, TargetDesc};
use quantc_ir::text;
use quantc_ir::ty::{Dim, ElemTy, TensorTy};
use quantc_ir::weights::{Digest, Store, WeightSource};
use quantc_passes::Registry;
use quantc_passes::manager::{self, Report, VerifyEach};
use quantc_passes::pass::{Env, Session};
use quantc_passes::pipeline;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A target that has kernels for int8 products and for nothing below 8 bits of activations.
pub struct TestBackend;

pub static TARGET: TargetDesc = TargetDesc {
    name: "test",
    doc: "A machine for tests.",
    cpu: CpuDesc {
        llvm_cpu: "generic",
        features: &[],
        vector_bits: 256,
        vector_regs: 16,
        fma: true,
        dots: &[Dot::Maddubs],
        l1_kib: 32,
        l2_kib: 512,
        int8_mac_per_cycle: 32.0,
        f32_mac_per_cycle: 16.0,
        bf16_mac_per_cycle: 0.0,
        stream_bytes_per_cycle: 4.0,
    },
    gpu: None,
};

impl Backend for TestBackend {
    fn target(&self) -> &TargetDesc {
        &TARGET
    }
    fn supports_matmul(&self, x: ElemTy, w: ElemTy) -> Result<()> {
        if x.bits() >= 8 {
            return Ok(());
        }
        let text = format!("target `test` has no kernel for activations {x} with weights {w}");
        Err(quantc_ir::diag::Diag::target(text).help("activations of 8 bits or more have kernels"))
    }
    fn cost(&self, _: &Op, _: &[Option<&TensorTy>], _: &TensorTy, _: u64) -> f64 {
        1.0
    }
    fn pack(&self, job: &PackJob<'_>) -> Result<Option<Packed>> {
        let name = job.graph.node(job.op).op.name();
        Ok(Some(Packed { layout: "test".into(), blob: Digest::of(name.as_bytes()) }))
    }
}

/// Reads a module; its problems are panics, as the tests write the texts.
pub fn module(source: &str) -> text::Parsed {
    let parsed = text::parse(source, "test.qir").unwrap_or_else(|e| panic!("{e}\n{source}"));
    if let Err(e) = quantc_ir::verify::verify(&parsed.module) {
        panic!("{}", e.show(&parsed.module));
    }
    parsed
}

/// Runs a pipeline of built-in passes with verification after each.
pub fn run(module: &mut Module, store: &Store, pipeline: &str, target: bool) -> Result<Report, Diags> {
    run_with(&Registry::builtin(), module, store, pipeline, target)
}

/// Runs a pipeline with verification after each pass.
pub fn run_with(
    registry: &Registry,
    module: &mut Module,
    store: &Store,
    pipeline: &str,
    target: bool,
) -> Result<Report, Diags> {
    let parsed = pipeline::parse(pipeline)?;
    let backend = target.then_some(&TestBackend as &dyn Backend);
    let checked = pipeline::check(&parsed, registry, module, target.then_some(&TARGET), backend)?;
    // Fully spelled, the pipeline is the same pipeline.
    let again = pipeline::check(
        &pipeline::parse(&checked.to_string())?,
        registry,
        module,
        target.then_some(&TARGET),
        backend,
    )?;
    assert_eq!(again.to_string(), checked.to_string());
    let mut env = Env::new(store);
    if target {
        env = env.with_backend(&TestBackend);
    }
    let mut verify = VerifyEach;
    Ok(manager::run(module, &checked, env, Session::default(), &mut [&mut verify])?)
}

/// Small derived weights are written out, so that a snapshot shows their numbers.
pub fn inline_small_blobs(module: &mut Module, store: &Store) {
    for (_, decl) in module.weights.iter_mut() {
        if let WeightSource::Blob(digest) = decl.source
            && decl.ty.shape.elements().is_some_and(|n| n <= 64)
        {
            decl.source =
                WeightSource::Inline(store.read_blob(digest).expect("a derived blob is in its store"));
        }
    }
}

/// Random inputs for `main` with `tokens` for every symbol. Integers are below 2, so that they fit the smallest tables.
pub fn inputs(module: &Module, tokens: u64, seed: u64) -> Vec<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let one = |ty: &TensorTy| {
        let dims: Vec<u64> =
            ty.shape.0.iter().map(|d| if let Dim::Static(n) = d { *n } else { tokens }).collect();
        let n = dims.iter().product::<u64>() as usize;
        match ty.elem {
            ElemTy::I32 => Tensor::i32(&dims, (0..n).map(|_| rng.random_range(0..2)).collect()),
            elem => {
                let xs = (0..n).map(|_| rng.random_range(-2.0..2.0)).collect();
                Tensor::float(&TensorTy::fixed(elem, &dims), xs)
            }
        }
        .expect("the number of elements is that of the extents")
    };
    module.main.params.iter().map(|&p| module.main.ty(p)).map(one).collect()
}

/// What `main` computes in two calls, the second after the first.
pub fn evaluate(module: &Module, store: &Store) -> Vec<f32> {
    let mut evaluator = Evaluator::new(module, store).expect("states are small");
    let mut out = vec![];
    for (seed, tokens) in [(1, 3), (2, 1)] {
        let results = evaluator.step(&inputs(module, tokens, seed), tokens).unwrap_or_else(|e| panic!("{e}"));
        results.iter().for_each(|t| out.extend_from_slice(t.f32s().expect("results are floats")));
    }
    out
}

/// What `main` computes of four tokens in one call.
pub fn evaluate_at_once(module: &Module, store: &Store) -> Vec<f32> {
    let mut evaluator = Evaluator::new(module, store).expect("states are small");
    let results = evaluator.step(&inputs(module, 4, 1), 4).unwrap_or_else(|e| panic!("{e}"));
    results[0].f32s().expect("results are floats").to_vec()
}

/// The same in two calls, of three tokens and of one.
pub fn evaluate_in_parts(module: &Module, store: &Store) -> Vec<f32> {
    let mut evaluator = Evaluator::new(module, store).expect("states are small");
    let whole = inputs(module, 4, 1);
    let part = |from: usize, n: usize| -> Vec<Tensor> {
        whole.iter().map(|x| x.slice_rows(from, n).expect("there are four rows")).collect()
    };
    let mut out = vec![];
    for (from, n) in [(0, 3), (3, 1)] {
        let results = evaluator.step(&part(from, n), n as u64).unwrap_or_else(|e| panic!("{e}"));
        out.extend_from_slice(results[0].f32s().expect("results are floats"));
    }
    out
}

/// Fills splat weights with random numbers that depend on their names, so that mistakes with them show.
pub fn randomize(module: &mut Module, store: &Store) {
    for (_, decl) in module.weights.iter_mut() {
        if !matches!(decl.source, WeightSource::Splat(_)) {
            continue;
        }
        let seed = decl.name.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let n = decl.ty.shape.elements().expect("weights are static");
        let mut bytes = vec![];
        for _ in 0..n {
            let x: f32 = rng.random_range(-1.0..1.0);
            match decl.ty.elem {
                ElemTy::F32 => bytes.extend(x.to_le_bytes()),
                // The upper half of a single is a number near it.
                ElemTy::Bf16 => bytes.extend(&x.to_le_bytes()[2..]),
                other => panic!("splats of {other} are not used in tests"),
            }
        }
        decl.source = WeightSource::Blob(store.put(&bytes).expect("memory is enough"));
    }
}

/// The largest difference, relative to the largest number.
pub fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let top = a.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max) / top
}
