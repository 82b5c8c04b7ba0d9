//! Every op with a kernel, every weight format and every class of shapes, on every CPU target of this machine, and on a
//! GPU by the interpreter of its kernels, against the reference evaluator.
//!
//! One module holds one layer for each case; the engine's value of each layer is compared with the evaluator's. Inputs
//! are random, shapes are odd, and memory holds NaN before each run, so that a value nobody wrote shows.
#![cfg(feature = "llvm")]

mod common;

use common::device::Interpreter;
use quantc_codegen::backend;
use quantc_codegen::engine::{self, Request};
use quantc_codegen::targets;
use quantc_ir::entity::ValueId;
use quantc_ir::eval::{Evaluator, Tensor};
use quantc_ir::graph::Graph;
use quantc_ir::module::{Layer, Module, State};
use quantc_ir::ops::{self, Op};
use quantc_ir::target::TargetDesc;
use quantc_ir::ty::{Dim, ElemTy, Float, Shape, TensorTy};
use quantc_ir::weights::{Store, WeightDecl, WeightSource};
use quantc_passes::pass::Env;
use quantc_passes::{Registry, manager, pipeline};
use quantc_runtime::engine::{Engine, OpenOptions};
use quantc_runtime::session::{Session, SessionOptions, Step};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Rows of the embedding table that the random inputs come from.
const VOCAB: u64 = 37;

/// A module whose `main` embeds tokens and calls one layer after the other on the same rows.
struct Cases {
    module: Module,
    rng: ChaCha8Rng,
    /// The rows that every layer reads: `[t, width]` for each width asked for.
    inputs: BTreeMap<u64, ValueId>,
    tokens: ValueId,
    last: Option<ValueId>,
}

impl Cases {
    fn new(seed: u64) -> Cases {
        let mut module = Module::new("conformance");
        let tokens = module.main.add_param("tokens", TensorTy::new(ElemTy::I32, [Dim::Sym('t')]));
        for (fact, value) in [("context", "40"), ("vocab", "37"), ("kind", "decoder")] {
            module.facts.insert(fact.into(), value.into());
        }
        Cases { module, rng: ChaCha8Rng::seed_from_u64(seed), inputs: BTreeMap::new(), tokens, last: None }
    }

    /// A random weight of plain floats.
    fn weight(
        &mut self,
        name: &str,
        elem: Float,
        dims: &[u64],
        spread: f32,
    ) -> (quantc_ir::entity::WeightId, TensorTy) {
        let n: u64 = dims.iter().product();
        let mut bytes = vec![];
        for _ in 0..n {
            let x = self.rng.random_range(-spread..spread);
            match elem {
                Float::F32 => bytes.extend(x.to_le_bytes()),
                Float::F16 => bytes.extend((elem.format().encode(x) as u16).to_le_bytes()),
                Float::Bf16 => bytes.extend((elem.format().encode(x) as u16).to_le_bytes()),
            }
        }
        let ty = TensorTy::fixed(elem, dims);
        let decl = WeightDecl { name: name.into(), ty: ty.clone(), source: WeightSource::Inline(bytes) };
        (self.module.weights.push(decl), ty)
    }

    /// Rows of `width` random numbers, one for each token.
    fn rows(&mut self, width: u64) -> ValueId {
        if let Some(&v) = self.inputs.get(&width) {
            return v;
        }
        let (w, ty) = self.weight(&format!("table{width}"), Float::F32, &[VOCAB, width], 2.0);
        let table = self.module.main.weight(w, &ty);
        let v = self
            .module
            .main
            .append(ops::Embedding::default(), &[self.tokens, table], None)
            .expect("it infers");
        self.inputs.insert(width, v);
        v
    }

    /// Adds a layer on rows of `width`; `body` makes its result from the rows.
    fn case(
        &mut self,
        name: &str,
        width: u64,
        body: impl FnOnce(&mut Cases, &mut Graph, ValueId) -> quantc_ir::diag::Result<ValueId>,
    ) {
        let input = self.rows(width);
        let mut graph = Graph::new();
        let x = graph.add_param("x", self.module.main.ty(input).clone());
        let result = body(self, &mut graph, x).unwrap_or_else(|e| panic!("{name}: {e}"));
        graph.results.push(result);
        let ty = graph.ty(result).clone();
        self.module.layers.push(Layer { name: name.into(), graph });
        let call = Op::Call(ops::Call { layer: name.into() });
        self.last = Some(self.module.main.push(call, vec![input], ty, None));
    }

    /// A layer that multiplies rows of `k` with a random `[n, k]` matrix.
    fn matmul(&mut self, name: &str, elem: Float, n: u64, k: u64) {
        self.case(name, k, |cx, g, x| {
            let (w, ty) = cx.weight(&format!("{name}.w"), elem, &[n, k], 0.5);
            let w = g.weight(w, &ty);
            g.append(ops::MatMul::default(), &[x, w], None)
        });
    }

    fn finish(mut self) -> Module {
        let x = self.rows(5);
        let result = self.module.main.append(ops::LastRows::default(), &[x], None).expect("it infers");
        self.module.main.results.push(result);
        self.module
    }
}

/// Compiles `module` after `text` and compares each layer; returns the largest relative error of each.
fn compare(
    module: &Module,
    text: &str,
    target: &'static TargetDesc,
    tokens: &[usize],
) -> BTreeMap<String, f64> {
    let store = Store::in_memory();
    let backend = &*backend::of(target);
    let (mut module, cases) = (module.clone(), module.layers.len());
    let parsed = pipeline::parse(text).expect("the pipeline parses");
    let registry = Registry::builtin();
    let checked = pipeline::check(&parsed, &registry, &module, Some(target), Some(backend));
    let checked = checked.unwrap_or_else(|e| panic!("{e}"));
    let env = Env::new(&store).with_backend(backend);
    manager::run(&mut module, &checked, env, Default::default(), &mut []).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().expect("a folder for the engine");
    let out = folder.path().join("engine");
    let request = Request {
        module: &module,
        store: &store,
        target,
        max_tokens: 0,
        always_full: false,
        tuning: None,
        objects: None,
        files: vec![],
        facts: vec![],
        report: Default::default(),
    };
    engine::write(request, &out).unwrap_or_else(|e| panic!("{}: {e}", target.name));
    let engine = Arc::new(Engine::open(&out, &OpenOptions::default()).expect("the engine opens"));
    // Kernels for GPUs are interpreted, with all checks.
    let gpu = target.gpu.map(|gpu| engine.load_with(Box::new(Interpreter::new(gpu.arch))));
    let _loaded = gpu.transpose().unwrap_or_else(|e| panic!("{}: {e}", target.name));
    let options = SessionOptions { threads: 2, poison: true, ..SessionOptions::default() };

    let mut errors: BTreeMap<String, f64> = BTreeMap::new();
    for &t in tokens {
        let ids: Vec<u32> = (0..t as u32).map(|i| (i * 11 + 3) % VOCAB as u32).collect();
        let want: RefCell<BTreeMap<String, Vec<f32>>> = RefCell::default();
        let tap = |function: &str, value: ValueId, tensor: &Tensor| {
            if function != "main" {
                return;
            }
            if let Some(call) = module.main.def(value).and_then(|(_, node)| node.op.is::<ops::Call>()) {
                want.borrow_mut()
                    .insert(call.layer.clone(), tensor.f32s().expect("layers give floats").to_vec());
            }
        };
        let input = Tensor::i32(&[t as u64], ids.iter().map(|&i| i as i32).collect()).expect("it fits");
        let mut reference = Evaluator::new(&module, &store).expect("states fit").with_tap(&tap);
        reference.step(&[input], t as u64).unwrap_or_else(|e| panic!("{e}"));
        let mut session = Session::new(engine.clone(), &options).expect("memory is enough");
        let positions: Vec<u32> = (0..t as u32).collect();
        let step = Step { tokens: &ids, positions: &positions, slots: &vec![0; t], rows: t };
        let mut seen = 0;
        let mut check = |name: &str, _: usize, _: usize, got: &[f32]| {
            let want = &want.borrow()[name];
            assert_eq!(got.len(), want.len(), "{name}");
            let difference: f64 =
                got.iter().zip(want).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
            let norm: f64 = want.iter().map(|&b| f64::from(b).powi(2)).sum();
            let error = (difference / norm.max(1e-20)).sqrt();
            let worst = errors.entry(name.into()).or_default();
            *worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
            seen += 1;
        };
        session.step_tapped(step, &mut check).expect("the step runs");
        assert_eq!(seen, cases, "every case is compared");
    }
    errors
}

/// Compares on a GPU, for calls of these numbers of tokens.
fn conforms_on_gpu(module: &Module, text: &str, tokens: &[usize], limit: f64) {
    let target = targets::lookup("cuda-sm90").expect("a known target");
    let errors = compare(module, text, target, tokens);
    let wrong: Vec<_> = errors.iter().filter(|(_, e)| **e > limit).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// Compares on every target that this machine runs, for every class of tokens.
fn conforms(module: &Module, text: &str, limit: f64) {
    for &target in targets::TARGETS {
        if !targets::runs_here(target) {
            println!("skipped: this machine does not run {}", target.name);
            continue;
        }
        let errors = compare(module, text, target, &[1, 3, 7, 33]);
        let wrong: Vec<_> = errors.iter().filter(|(_, e)| **e > limit).collect();
        assert!(wrong.is_empty(), "{}: {wrong:?}", target.name);
    }
}

/// Weight formats as options of `round-to-nearest`.
const FORMATS: &[(&str, &str)] = &[
    ("int8row", "format=int8, group=row"),
    ("int8tensor", "format=int8, group=tensor"),
    ("int8g32", "format=int8, group=32"),
    ("int8tile", "format=int8, group=16x32"),
    ("int8asym", "format=int8, group=row, zero=asymmetric"),
    ("int4row", "format=int4, group=row"),
    ("int4g32", "format=int4, group=32"),
    ("int4g32asym", "format=int4, group=32, zero=asymmetric"),
    ("int4g64f32", "format=int4, group=64, scale=f32"),
    ("int4tile", "format=int4, group=16x64"),
    ("int3g32", "format=int3, group=32"),
    ("int3asym", "format=int3, group=32, zero=asymmetric"),
    ("int2g32", "format=int2, group=32"),
];

/// Formats whose codes are floats: no integer activations.
const FLOAT_FORMATS: &[(&str, &str)] = &[
    ("e4m3row", "format=e4m3, group=row"),
    ("e4m3tile", "format=e4m3, group=32x32"),
    ("e5m2row", "format=e5m2, group=row"),
    ("e2m1g32", "format=e2m1, group=32"),
];

/// Shapes `(n, k)`: below, at and beside a panel, with groups that do not divide k.
const SHAPES: &[(u64, u64)] = &[(1, 8), (3, 17), (65, 100), (64, 172), (130, 43)];

/// Products with weights of these formats; `activations` is the pass that rounds their rows.
fn quantized(activations: &str, formats: &[(&str, &str)], shape: (u64, u64)) -> (Module, String) {
    let mut cases = Cases::new(shape.0 * 1000 + shape.1);
    let mut text = String::from("layers(");
    for (name, options) in formats {
        cases.matmul(name, Float::F32, shape.0, shape.1);
        text += &format!("round-to-nearest{{{options}, layers=[{name}]}}, ");
    }
    text += activations;
    (cases.finish(), text + "fuse-dequant-matmul, fuse-epilogue), pack-weights")
}

#[test]
fn quantized_weights_and_float_activations() {
    let formats: Vec<_> = FORMATS.iter().chain(FLOAT_FORMATS).copied().collect();
    for &shape in SHAPES {
        let (module, text) = quantized("", &formats, shape);
        conforms(&module, &text, 2e-6);
    }
}

#[test]
fn quantized_weights_and_int8_activations() {
    for &shape in SHAPES {
        let (module, text) = quantized("quantize-activations{format=int8}, ", FORMATS, shape);
        conforms(&module, &text, 2e-6);
    }
}

/// The module with what calibration of a value of every layer would have seen.
fn seen(mut module: Module, value: &str, numbers: [f64; 2]) -> Module {
    for layer in module.layers.values() {
        let key = format!("{}.{value}.min-max", layer.name);
        module.calibration.insert(key, numbers.map(ops::Real).to_vec());
    }
    module
}

#[test]
fn quantized_weights_and_int8_activations_with_one_scale() {
    for &shape in &SHAPES[1..3] {
        let static_scales = "quantize-activations{format=int8, scale=static, range=whole}, ";
        let (module, text) = quantized(static_scales, FORMATS, shape);
        // Rows go up to 2: they saturate on both sides.
        conforms(&seen(module, "x", [-1.0, 1.5]), &text, 2e-6);
    }
}

#[test]
fn quantized_weights_and_e4m3_activations() {
    let ways = [("dynamic", ""), ("static", ""), ("static", "cast-activations{to=bf16}, ")];
    for (&shape, (scale, cast)) in SHAPES[1..].iter().zip(ways) {
        let activations = format!("quantize-activations{{format=e4m3, scale={scale}, range=whole}}, {cast}");
        let (module, text) = quantized(&activations, FLOAT_FORMATS, shape);
        // Numbers of few bits cancel more often than others.
        conforms(&seen(module, "x", [-1.0, 1.5]), &text, 1e-5);
    }
}

#[test]
fn quantized_weights_and_bf16_activations() {
    let formats: Vec<_> = FORMATS.iter().chain(FLOAT_FORMATS).copied().collect();
    for &shape in SHAPES {
        let (module, text) = quantized("cast-activations{to=bf16}, ", &formats, shape);
        conforms(&module, &text, 2e-6);
    }
}

/// Rows that are rounded to bf16 by the kernel that makes them, a norm or a product, and beside another reader of them.
#[test]
fn rows_are_rounded_to_bf16_where_they_are_computed_and_kept_where_they_are_read() {
    let mut cases = Cases::new(12);
    for (name, shared) in [("alone", false), ("shared", true)] {
        cases.case(name, 43, |cx, g, x| {
            let matrix = |cx: &mut Cases, g: &mut Graph, part: &str| {
                let (w, ty) = cx.weight(&format!("{name}.{part}"), Float::F32, &[43, 43], 0.5);
                g.weight(w, &ty)
            };
            let (up, down) = (matrix(cx, g, "up"), matrix(cx, g, "down"));
            let n = g.append(ops::RmsNorm::default(), &[x], None)?;
            let h = g.append(ops::MatMul::default(), &[n, up], None)?;
            let h = g.append(ops::Silu::default(), &[h], None)?;
            let y = g.append(ops::MatMul::default(), &[h, down], None)?;
            let rest = if shared { g.append(ops::Add::default(), &[n, h], None)? } else { x };
            g.append(ops::Add::default(), &[y, rest], None)
        });
    }
    let text = "layers(round-to-nearest{format=int8, group=row}, cast-activations, fuse-dequant-matmul, \
                fuse-epilogue), pack-weights";
    // A sum that differs in the last place may be rounded to the next bf16 number.
    conforms(&cases.finish(), text, 2e-3);
}

/// A norm that is rounded for a product, alone and beside another reader of the same rows.
#[test]
fn norms_are_rounded_where_they_are_computed_and_kept_where_they_are_read() {
    let mut cases = Cases::new(11);
    for (name, shared) in [("alone", false), ("shared", true)] {
        cases.case(name, 43, |cx, g, x| {
            let (w, ty) = cx.weight(&format!("{name}.w"), Float::F32, &[43, 43], 0.5);
            let w = g.weight(w, &ty);
            let n = g.append(ops::RmsNorm::default(), &[x], Some("n"))?;
            let y = g.append(ops::MatMul::default(), &[n, w], None)?;
            g.append(ops::Add::default(), &[y, if shared { n } else { x }], None)
        });
    }
    let module = seen(cases.finish(), "n", [-1.0, 1.5]);
    for format in ["int8", "e4m3"] {
        for scale in ["dynamic", "static"] {
            let text = format!(
                "layers(round-to-nearest{{format={format}, group=row}}, \
                 quantize-activations{{format={format}, scale={scale}, range=whole}}, \
                 fuse-dequant-matmul, fuse-epilogue), pack-weights"
            );
            conforms(&module, &text, 2e-6);
        }
    }
}

#[test]
fn float_weights() {
    let mut cases = Cases::new(7);
    for (i, &(n, k)) in SHAPES.iter().enumerate() {
        cases.matmul(&format!("f32_{i}"), Float::F32, n, k);
        cases.matmul(&format!("bf16_{i}"), Float::Bf16, n, k);
        cases.matmul(&format!("f16_{i}"), Float::F16, n, k);
    }
    let module = cases.finish();
    conforms(&module, "pack-weights", 2e-6);
    conforms(&module, "layers(cast-activations{to=bf16}), pack-weights", 2e-6);
}

#[test]
fn epilogues() {
    use ops::Step;
    let mut cases = Cases::new(8);
    let bodies: [(&str, Vec<Step>); 7] = [
        ("bias", vec![Step::Add(0)]),
        ("bias_residual", vec![Step::Add(0), Step::Add(1)]),
        ("silu_mul", vec![Step::Silu, Step::Mul(1), Step::Add(0)]),
        ("gelu", vec![Step::Add(0), Step::Gelu]),
        ("gelu_tanh", vec![Step::GeluTanh, Step::Mul(0)]),
        ("relu", vec![Step::Add(0), Step::Relu]),
        ("tanh", vec![Step::Tanh, Step::Add(0)]),
    ];
    for (name, steps) in bodies {
        cases.case(name, 43, |cx, g, x| {
            let (w, ty) = cx.weight(&format!("{name}.w"), Float::F32, &[43, 43], 0.2);
            let (b, bty) = cx.weight(&format!("{name}.b"), Float::Bf16, &[43], 0.5);
            let (w, b) = (g.weight(w, &ty), g.weight(b, &bty));
            let extras = if steps.iter().any(|s| s.operand() == Some(1)) { vec![b, x] } else { vec![b] };
            let op = ops::MatMul { epilogue: steps.clone(), ..Default::default() };
            g.append(op, &[vec![x, w], extras].concat(), None)
        });
    }
    conforms(&cases.finish(), "pack-weights", 3e-6);
}

#[test]
fn elementwise_and_norms() {
    conforms(&elementwise(), "", 3e-6);
}

/// Functions of single numbers, and norms, over rows of odd widths.
fn elementwise() -> Module {
    let mut cases = Cases::new(9);
    for width in [1, 17, 64, 100] {
        let unary: [(&str, Op); 5] = [
            ("silu", ops::Silu::default().into()),
            ("gelu", ops::Gelu { approx: false }.into()),
            ("gelu_tanh", ops::Gelu { approx: true }.into()),
            ("relu", ops::Relu::default().into()),
            ("tanh", ops::Tanh::default().into()),
        ];
        for (name, op) in unary {
            cases.case(&format!("{name}{width}"), width, |_, g, x| g.append(op, &[x], None));
        }
        for elem in [Float::F32, Float::F16, Float::Bf16] {
            let name = |what: &str| format!("{what}{width}{elem}");
            cases.case(&name("rmsnorm"), width, |cx, g, x| {
                let (w, ty) = cx.weight(&name("rg"), elem, &[width], 1.5);
                let gain = g.weight(w, &ty);
                g.append(ops::RmsNorm { eps: ops::Real(1e-5) }, &[x, gain], None)
            });
            cases.case(&name("layernorm"), width, |cx, g, x| {
                let (w, ty) = cx.weight(&name("lg"), elem, &[width], 1.5);
                let (b, bty) = cx.weight(&name("lb"), elem, &[width], 1.5);
                let (gain, bias) = (g.weight(w, &ty), g.weight(b, &bty));
                // A row of one column has no variance: eps keeps it finite, and far from rounding.
                g.append(ops::LayerNorm { eps: ops::Real(1e-2) }, &[x, gain, bias], None)
            });
            cases.case(&name("add"), width, |cx, g, x| {
                let (w, ty) = cx.weight(&name("ab"), elem, &[width], 1.5);
                let w = g.weight(w, &ty);
                g.append(ops::Add::default(), &[x, w], None)
            });
            cases.case(&name("scale"), width, |cx, g, x| {
                let (w, ty) = cx.weight(&name("sw"), elem, &[], 1.5);
                let (b, bty) = cx.weight(&name("sb"), elem, &[], 1.5);
                let (w, b) = (g.weight(w, &ty), g.weight(b, &bty));
                let y = g.append(ops::Mul::default(), &[x, w], None)?;
                g.append(ops::Add::default(), &[y, b], None)
            });
        }
        cases.case(&format!("square{width}"), width, |_, g, x| g.append(ops::Mul::default(), &[x, x], None));
        cases.case(&format!("plain_norm{width}"), width, |_, g, x| {
            g.append(ops::RmsNorm::default(), &[x], None)
        });
        cases.case(&format!("cast{width}"), width, |_, g, x| {
            let half = g.append(ops::Cast { to: Float::F16.into(), ..Default::default() }, &[x], None)?;
            g.append(ops::Cast { to: Float::F32.into(), ..Default::default() }, &[half], None)
        });
    }
    cases.finish()
}

/// Attention with rotations, over states and over the rows of the call, for query heads, key heads and widths.
fn attention(shapes: &[(u64, u64, u64)]) -> Module {
    let mut cases = Cases::new(10);
    for &(heads, kv, d) in shapes {
        for window in [0, 6] {
            for causal in [true, false] {
                if !causal && window > 0 {
                    continue;
                }
                let name = format!("attention_{heads}_{kv}_{d}_{window}_{causal}");
                let width = (heads + 2 * kv) * d;
                cases.case(&name.clone(), width, |cx, g, x| {
                    let part = |cx: &mut Cases, g: &mut Graph, what: &str, heads: u64| {
                        let (w, ty) =
                            cx.weight(&format!("{name}.{what}"), Float::F32, &[heads * d, width], 0.3);
                        let w = g.weight(w, &ty);
                        let y = g.append(ops::MatMul::default(), &[x, w], None)?;
                        let shape = Shape(vec![Dim::Sym('t'), Dim::Static(heads), Dim::Static(d)]);
                        g.append(ops::Reshape { shape }, &[y], None)
                    };
                    let mut q = part(cx, g, "q", heads)?;
                    let (mut k, mut v) = (part(cx, g, "k", kv)?, part(cx, g, "v", kv)?);
                    let size = d as u32 / 2 * 2;
                    if causal && size > 0 {
                        let positions = g.append(ops::Positions::default(), &[], None)?;
                        let style =
                            if heads == 4 { ops::RopeStyle::Interleaved } else { ops::RopeStyle::Half };
                        let table = ops::RopeTable { size, ..Default::default() };
                        let table = g.append(table, &[positions], None)?;
                        q = g.append(ops::Rope { style }, &[q, table], None)?;
                        k = g.append(ops::Rope { style }, &[k, table], None)?;
                        let mut cached = |g: &mut Graph, what: &str, x| {
                            g.value_mut(x).name = Some(what.into());
                            // What calibration would have seen; larger numbers saturate.
                            let seen = (0..kv).map(|head| ops::Real(1.0 + head as f64)).collect();
                            cx.module.calibration.insert(format!("{name}.{what}.cache"), seen);
                            let ty = TensorTy::fixed(ElemTy::F32, &[40, kv, d]);
                            let state = State { name: format!("{name}.{what}"), ty: ty.clone() };
                            let id = cx.module.states.push(state);
                            let state = g.state(id, &ty);
                            g.append(ops::CacheAppend::default(), &[state, x], None)
                        };
                        k = cached(g, "kc", k)?;
                        v = cached(g, "vc", v)?;
                    }
                    let scale = ops::Real(1.0 / (d as f64).sqrt());
                    let y = g.append(ops::Attention { scale, causal, window }, &[q, k, v], None)?;
                    let shape = Shape(vec![Dim::Sym('t'), Dim::Static(heads * d)]);
                    g.append(ops::Reshape { shape }, &[y], None)
                });
            }
        }
    }
    cases.finish()
}

#[test]
fn attention_and_rope() {
    let module = attention(&[(1, 1, 8), (4, 2, 16), (3, 3, 20), (8, 2, 64), (6, 1, 5)]);
    conforms(&module, "pack-weights", 5e-6);
}

#[test]
fn attention_over_caches_of_codes() {
    // A number that differs in the last place may be stored as the next code: 1/127 of the largest of its head, or 1/8 of
    // itself.
    let module = attention(&[(3, 3, 20), (8, 2, 64)]);
    for format in ["int8", "e4m3"] {
        for scale in ["dynamic", "static"] {
            let text = format!("quantize-cache{{format={format}, scale={scale}}}, pack-weights");
            conforms(&module, &text, 5e-3);
        }
    }
}

#[test]
fn a_gpu_multiplies_all_formats() {
    // Weights of 2 and 3 bits are stored as those of 4.
    let formats: Vec<_> = FORMATS.iter().chain(FLOAT_FORMATS).copied().collect();
    for (&shape, tokens) in SHAPES[1..].iter().step_by(2).zip([&[1, 9][..], &[33]]) {
        let (module, text) = quantized("cast-activations{to=bf16}, ", &formats, shape);
        conforms_on_gpu(&module, &text, tokens, 2e-6);
        let (module, text) = quantized("quantize-activations{format=int8}, ", FORMATS, shape);
        conforms_on_gpu(&module, &text, tokens, 2e-6);
    }
    let mut cases = Cases::new(7);
    cases.matmul("bf16", Float::Bf16, 65, 100);
    conforms_on_gpu(&cases.finish(), "layers(cast-activations{to=bf16}), pack-weights", &[7], 2e-6);
}

#[test]
fn a_gpu_computes_rows() {
    conforms_on_gpu(&elementwise(), "", &[1, 7], 3e-6);
}

/// Queries, weights of keys and rows of the call are rounded to bf16, 2^-9 off.
#[test]
fn a_gpu_attends() {
    let module = attention(&[(4, 2, 16), (3, 3, 24), (6, 1, 5)]);
    let products = "layers(cast-weights{to=bf16}, cast-activations{to=bf16})";
    for cache in
        ["cast-cache{to=bf16}", "quantize-cache{format=int8}", "quantize-cache{format=e4m3, scale=static}"]
    {
        conforms_on_gpu(&module, &format!("{cache}, {products}, pack-weights"), &[9], 2e-2);
    }
    // Plain kernels round nothing.
    conforms_on_gpu(&module, &format!("cast-cache{{to=f16}}, {products}, pack-weights"), &[7], 2e-2);
}
