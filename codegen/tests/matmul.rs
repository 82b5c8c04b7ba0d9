//! Matmul kernels against a reference in f64: every format, odd shapes, all targets that this machine runs.
#![cfg(feature = "llvm")]

#[path = "common/codes.rs"]
mod codes;

use codes::random_code;
use half::bf16;
use inkwell::context::Context;
use quantc_codegen::cpu::llvm::Unit;
use quantc_codegen::cpu::matmul::schedule::Inner;
use quantc_codegen::cpu::matmul::{emit, schedule};
use quantc_codegen::eexpr::{BinaryOp, EExpr, MemTy, UnaryOp};
use quantc_codegen::layout::{Layout, Unpacked};
use quantc_codegen::spec::{
    AFmt, Code, MRange, MatmulSpec, Rows, ScaleTy, WFmt, Zero, bf16_row_stride, i8_row_stride,
};
use quantc_codegen::targets::{TARGETS, with_stand_in};
use quantc_ir::target::Dot;
use quantc_runtime::object::Object;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const POISON: f32 = f32::NAN;
/// Columns after the last one of every output row, which nobody may touch.
const GAP: usize = 3;

/// The machine whose products `cpu-avxvnni` has runs few of these tests; what it would run is looked at.
#[test]
fn avxvnni_has_the_products_of_the_narrow_form_and_nothing_wider() {
    let target = quantc_codegen::targets::lookup("cpu-avxvnni").unwrap();
    for code in [Code::U4, Code::U8] {
        let mut spec = spec(64, 256, MRange { min: 1, max: 512 }, code, Some(128), AFmt::I8Token);
        spec.epilogue = Tail::Plain.expr(64);
        let plan = schedule(&spec, &target.cpu);
        assert_eq!(plan.inner, Inner::Int(Dot::Vnni));
        let cx = Context::create();
        let unit = Unit::new(&cx, target, "test").unwrap();
        emit(&unit, "kernel", &spec, &plan).unwrap();
        let text = unit.assembly().unwrap();
        let dots: Vec<&str> = text.lines().filter(|l| l.contains("vpdpbusd")).collect();
        assert!(dots.len() > 8 && dots.iter().all(|l| l.contains("{vex}") && l.contains("%ymm")), "{dots:?}");
        let wider = |l: &&str| l.contains("%zmm") || l.contains("%ymm16") || l.contains("{%k");
        assert_eq!(text.lines().find(wider), None);
    }
}

/// What follows the sums in a test.
#[derive(Clone, Copy, PartialEq)]
enum Tail {
    /// They are stored.
    Plain,
    /// `silu(sum + bias) + residual`.
    BiasSiluResidual,
}

impl Tail {
    fn expr(self, n: u32) -> EExpr {
        let stride = n + GAP as u32;
        let mut e = EExpr::new();
        let mut v = e.acc();
        if self == Tail::BiasSiluResidual {
            let bias = e.col_input(MemTy::F32);
            v = e.binary(BinaryOp::Add, v, bias);
            v = e.unary(UnaryOp::Silu, v);
            let residual = e.elem_input(MemTy::F32, n);
            v = e.binary(BinaryOp::Add, v, residual);
        }
        e.store(v, MemTy::F32, stride);
        e
    }
}

struct Case {
    spec: MatmulSpec,
    tail: Tail,
    /// Scales of one, so that the result is an integer.
    unit_scales: bool,
    matrix: Unpacked,
    blob: Vec<u8>,
    /// The weights in f64, `[n][k]`.
    weights: Vec<f64>,
}

impl Case {
    fn new(spec: MatmulSpec, tail: Tail, unit_scales: bool, rng: &mut ChaCha8Rng) -> Case {
        let layout = Layout::of(&spec);
        let (n, k, groups) = (spec.n as usize, spec.k as usize, spec.groups() as usize);
        let codes: Vec<Vec<u8>> = (0..n * k).map(|_| random_code(spec.w.code, rng)).collect();
        let mut matrix = Unpacked { codes: codes.concat(), ..Unpacked::default() };
        for _ in 0..n * groups {
            if spec.w.scale != ScaleTy::None {
                let scale = if unit_scales { 1.0 } else { rng.random_range(0.01f32..0.1) };
                matrix.scales.push(match spec.w.scale {
                    ScaleTy::Bf16 => bf16::from_f32(scale).to_f32(),
                    _ => scale,
                });
            }
            if spec.w.zero == Zero::Asym {
                let top = if spec.w.code == Code::U4 { 15 } else { 255 };
                matrix.zeros.push(rng.random_range(0..=top));
            }
        }
        let weights = (0..n * k)
            .map(|at| {
                let group = at / k * groups + at % k / spec.w.group as usize;
                let zero = match spec.w.zero {
                    Zero::Sym(z) => f64::from(z),
                    Zero::Asym => f64::from(matrix.zeros[group]),
                };
                let scale = matrix.scales.get(group).map_or(1.0, |&s| f64::from(s));
                (spec.w.code.value(&codes[at]) - zero) * scale
            })
            .collect();
        let mut blob = vec![];
        layout
            .pack(&mut (&layout, &matrix), &mut |panel| {
                blob.extend_from_slice(panel);
                Ok(())
            })
            .unwrap();
        Case { spec, tail, unit_scales, matrix, blob, weights }
    }

    fn name(&self) -> String {
        quantc_codegen::spec::KernelSpec::Matmul(self.spec.clone()).key()
    }

    /// Runs the kernel on `m` random rows, checks everything, and gives the result.
    fn run(&self, object: &Object, symbol: &str, m: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
        let spec = &self.spec;
        let (n, k, groups) = (spec.n as usize, spec.k as usize, spec.groups() as usize);
        let name = format!("{} m={m} zeros={:?}", self.name(), &self.matrix.zeros.first());
        let mut a_values = vec![0f64; m * k];
        let mut a_f32 = vec![];
        let stride = i8_row_stride(spec.k) as usize;
        let mut a_i8 = vec![0i8; m * stride];
        // Padding is not part of a row.
        let bf16_stride = bf16_row_stride(spec.k) as usize;
        let mut a_bf16 = vec![bf16::NAN; m * bf16_stride];
        let (mut a_scale, mut a_sums) = (vec![], vec![0i32; m * groups]);
        for row in 0..m {
            let scale = if self.unit_scales { 1.0 } else { rng.random_range(0.001f32..0.1) };
            a_scale.push(scale);
            for col in 0..k {
                a_values[row * k + col] = match spec.a {
                    AFmt::F32 => {
                        let v = if self.unit_scales {
                            rng.random_range(-127i32..=127) as f32
                        } else {
                            rng.random_range(-3f32..3.0)
                        };
                        a_f32.push(v);
                        f64::from(v)
                    }
                    AFmt::Bf16 => {
                        let v = if self.unit_scales {
                            rng.random_range(-127i32..=127) as f32
                        } else {
                            rng.random_range(-3f32..3.0)
                        };
                        a_bf16[row * bf16_stride + col] = bf16::from_f32(v);
                        bf16::from_f32(v).to_f64()
                    }
                    AFmt::I8Token => {
                        let v: i8 = rng.random();
                        a_i8[row * stride + col] = v;
                        a_sums[row * groups + col / spec.w.group as usize] += i32::from(v);
                        f64::from(v) * f64::from(scale)
                    }
                };
            }
        }
        // Whatever lies behind the buffers would show in the result.
        a_f32.extend([POISON; 64]);
        let mut bias: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
        bias.extend([POISON; 64]);
        let mut residual: Vec<f32> = (0..m * n).map(|_| rng.random_range(-1.0..1.0)).collect();
        residual.extend([POISON; 64]);
        let guard = 0x7fc1_2345u32;
        let mut out = vec![f32::from_bits(guard); m * (n + GAP) + 64];

        let mut args: Vec<*mut u8> = match spec.a {
            AFmt::F32 => vec![a_f32.as_mut_ptr().cast()],
            AFmt::Bf16 => vec![a_bf16.as_mut_ptr().cast()],
            AFmt::I8Token => {
                vec![a_i8.as_mut_ptr().cast(), a_scale.as_mut_ptr().cast(), a_sums.as_mut_ptr().cast()]
            }
        };
        args.push(self.blob.as_ptr().cast_mut());
        if self.tail == Tail::BiasSiluResidual {
            args.push(bias.as_mut_ptr().cast());
            args.push(residual.as_mut_ptr().cast());
        }
        args.push(out.as_mut_ptr().cast());
        let dims = match spec.rows {
            Rows::T => [m as i64, -1],
            Rows::R => [-1, m as i64],
        };
        let kernel = object.symbol(symbol).unwrap();
        let items = i64::from(spec.items());
        for (begin, end) in [(1, items), (0, 1)] {
            // SAFETY: the arguments are the ones that the spec documents, each of the size the shapes demand.
            unsafe { kernel(args.as_ptr(), dims.as_ptr(), begin, end) };
        }

        for row in 0..m {
            for col in 0..n + GAP {
                let got = out[row * (n + GAP) + col];
                if col >= n {
                    assert_eq!(got.to_bits(), guard, "{name}: wrote past row {row}");
                    continue;
                }
                let (mut want, mut size) = (0.0, 0.0);
                for i in 0..k {
                    let product = a_values[row * k + i] * self.weights[col * k + i];
                    want += product;
                    size += product.abs();
                }
                if self.unit_scales && self.tail == Tail::Plain {
                    assert_eq!(f64::from(got), want, "{name}: row {row} column {col}");
                    continue;
                }
                let mut slack = size * f64::from(f32::EPSILON) * (2.0 + (k as f64).sqrt()) + 1e-30;
                // Of centred integers the products grow larger than what is left of them.
                if spec.a != AFmt::I8Token && spec.w.code.is_int() {
                    slack *= 2.0;
                }
                if self.tail == Tail::BiasSiluResidual {
                    let x = want + f64::from(bias[col]);
                    want = x / (1.0 + (-x).exp()) + f64::from(residual[row * n + col]);
                    slack = slack * 1.2 + want.abs() * 1e-6 + 1e-6;
                }
                let error = (f64::from(got) - want).abs();
                assert!(
                    error <= slack,
                    "{name}: row {row} column {col}: {got} is not {want}, off by {error:e}"
                );
            }
        }
        assert!(out[m * (n + GAP)..].iter().all(|v| v.to_bits() == guard), "{name}: wrote past the end");
        out
    }
}

const CLASSES: [(MRange, &[usize]); 3] = [
    (MRange { min: 1, max: 1 }, &[1]),
    (MRange { min: 2, max: 4 }, &[2, 3, 4]),
    (MRange { min: 1, max: 512 }, &[1, 5, 7, 16, 33]),
];

/// Builds all cases into one object a target and runs them.
fn check(cases: &[Case], seed: u64) {
    for target in with_stand_in() {
        let cx = Context::create();
        let unit = Unit::new(&cx, target, "test").unwrap();
        for (i, case) in cases.iter().enumerate() {
            emit(&unit, &format!("k{i}"), &case.spec, &schedule(&case.spec, &target.cpu)).unwrap();
        }
        let object = Object::load(&unit.finish().unwrap()).unwrap();
        for (i, case) in cases.iter().enumerate() {
            let (_, rows) = CLASSES.iter().find(|(m, _)| *m == case.spec.m).unwrap();
            for &m in *rows {
                let mut rng = ChaCha8Rng::seed_from_u64(seed ^ (i as u64) << 8);
                case.run(&object, &format!("k{i}"), m, &mut rng);
            }
        }
    }
}

const SHAPES: [(u32, u32); 8] =
    [(1, 8), (3, 17), (63, 43), (65, 172), (100, 256), (64, 64), (130, 100), (192, 96)];

fn spec(n: u32, k: u32, m: MRange, code: Code, group: Option<u32>, a: AFmt) -> MatmulSpec {
    let group = group.unwrap_or(k).min(k);
    let zero = match code {
        Code::U4 => Zero::Sym(8),
        Code::U8 => Zero::Sym(128),
        _ => Zero::Sym(0),
    };
    let w = WFmt { code, group, zero, scale: ScaleTy::F32 };
    MatmulSpec { n, k, m, rows: Rows::T, w, a, epilogue: EExpr::new() }
}

/// Every format with every group and class, over rotating shapes: there are eight of them and three classes, so a
/// class meets all shapes in turn.
fn sweep(a: AFmt, codes: &[Code], unit_scales: bool, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut cases = vec![];
    let mut at = 0;
    for &code in codes {
        // Rounding does not depend on the group as sums do: fewer groups will do there.
        let groups: &[Option<u32>] = match unit_scales && a == AFmt::I8Token {
            true => &[Some(32), Some(64), Some(128), Some(12), None],
            false => &[Some(32), Some(12), None],
        };
        for &group in groups {
            for asym in [false, true] {
                if asym && !code.is_int() {
                    continue;
                }
                for (m, _) in CLASSES {
                    let (n, k) = SHAPES[at % SHAPES.len()];
                    let mut spec = spec(n, k, m, code, group, a);
                    if asym {
                        spec.w.zero = Zero::Asym;
                    }
                    if at % 3 == 1 {
                        spec.w.scale = ScaleTy::Bf16;
                    }
                    if at % 5 == 2 && code.bits() >= 16 {
                        spec.w.group = k;
                        spec.w.scale = ScaleTy::None;
                    }
                    if at % 7 == 3 {
                        spec.rows = Rows::R;
                    }
                    let tail = if at % 4 == 2 { Tail::BiasSiluResidual } else { Tail::Plain };
                    spec.epilogue = tail.expr(n);
                    cases.push(Case::new(spec, tail, unit_scales, &mut rng));
                    at += 1;
                }
            }
        }
    }
    check(&cases, seed);
}

#[test]
fn integer_sums_are_exact() {
    sweep(AFmt::I8Token, &[Code::U4, Code::U8], true, 11);
}

#[test]
fn scaled_integer_sums_are_close() {
    sweep(AFmt::I8Token, &[Code::U4, Code::U8], false, 12);
}

#[test]
fn integers_in_float_arithmetic_are_exact() {
    sweep(AFmt::F32, &[Code::U4, Code::U8], true, 13);
}

#[test]
fn integers_meet_floats() {
    sweep(AFmt::F32, &[Code::U4, Code::U8], false, 14);
}

#[test]
fn small_floats_meet_floats() {
    sweep(AFmt::F32, &[Code::Lut4, Code::E4m3, Code::E5m2], false, 15);
}

#[test]
fn wide_floats_meet_floats() {
    sweep(AFmt::F32, &[Code::F32, Code::F16, Code::Bf16], false, 16);
}

#[test]
fn integers_in_bf16_arithmetic_are_exact() {
    sweep(AFmt::Bf16, &[Code::U4, Code::U8], true, 17);
}

#[test]
fn integers_meet_bf16() {
    sweep(AFmt::Bf16, &[Code::U4, Code::U8], false, 18);
}

#[test]
fn small_floats_meet_bf16() {
    sweep(AFmt::Bf16, &[Code::Lut4, Code::E4m3, Code::E5m2], false, 19);
}

#[test]
fn wide_floats_meet_bf16() {
    sweep(AFmt::Bf16, &[Code::F32, Code::F16, Code::Bf16], false, 20);
}

/// One row of ones picks single weights: their conversion is exact, subnormals included.
#[test]
fn every_code_converts_exactly() {
    let codes = [
        (Code::U4, (0..16u32).collect::<Vec<_>>()),
        (Code::U8, (0..256).collect()),
        (Code::Lut4, (0..16).collect()),
        (Code::E4m3, (0..256).filter(|c| c & 0x7f != 0x7f).collect()),
        (Code::E5m2, (0..256).filter(|c| c & 0x7c != 0x7c).collect()),
        (Code::F16, (0..0x7c00).step_by(37).chain((0x8000..0x8400).step_by(5)).collect()),
    ];
    let all_of = |a| codes.iter().map(move |(code, all)| (a, code, all));
    for target in with_stand_in() {
        for (a, code, all) in all_of(AFmt::F32).chain(all_of(AFmt::Bf16)) {
            // k = 1, so that column n gives weight n itself.
            let n = all.len() as u32;
            let mut spec = spec(n, 1, MRange { min: 1, max: 1 }, *code, None, a);
            spec.epilogue = EExpr::store_acc(MemTy::F32, n);
            let layout = Layout::of(&spec);
            let bytes = code.source_bytes();
            let matrix = Unpacked {
                codes: all.iter().flat_map(|c| c.to_le_bytes()[..bytes].to_vec()).collect(),
                scales: vec![1.0; all.len()],
                zeros: vec![],
            };
            let mut blob = vec![];
            layout
                .pack(&mut (&layout, &matrix), &mut |panel| {
                    blob.extend_from_slice(panel);
                    Ok(())
                })
                .unwrap();
            let cx = Context::create();
            let unit = Unit::new(&cx, target, "test").unwrap();
            emit(&unit, "kernel", &spec, &schedule(&spec, &target.cpu)).unwrap();
            let object = Object::load(&unit.finish().unwrap()).unwrap();
            // A row of f32, or of bf16 and what follows.
            let mut one = [if a == AFmt::F32 { 1f32 } else { f32::from_bits(0x7fc0_3f80) }];
            let mut out = vec![POISON; all.len()];
            let args: [*mut u8; 3] = [one.as_mut_ptr().cast(), blob.as_mut_ptr(), out.as_mut_ptr().cast()];
            let zero = if let Zero::Sym(z) = spec.w.zero { f64::from(z) } else { 0.0 };
            let kernel = object.symbol("kernel").unwrap();
            // SAFETY: one row of one value, the packed weights, and room for all columns.
            unsafe { kernel(args.as_ptr(), [1i64, 1].as_ptr(), 0, i64::from(spec.items())) };
            for (c, got) in all.iter().zip(&out) {
                let want = code.value(&c.to_le_bytes()[..bytes]) - zero;
                assert_eq!(f64::from(*got), want, "{} {code:?} {a:?} {c:#x}", target.name);
            }
        }
    }
}

/// Chunks of a prompt and single tokens give the same bits.
#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    for target in with_stand_in() {
        for (code, a) in [
            (Code::U4, AFmt::I8Token),
            (Code::U8, AFmt::I8Token),
            (Code::U4, AFmt::F32),
            (Code::Bf16, AFmt::F32),
            (Code::U4, AFmt::Bf16),
            (Code::U8, AFmt::Bf16),
            (Code::E4m3, AFmt::Bf16),
            (Code::Bf16, AFmt::Bf16),
        ] {
            let cx = Context::create();
            let unit = Unit::new(&cx, target, "test").unwrap();
            let mut cases = vec![];
            for (i, (m, _)) in CLASSES.into_iter().enumerate() {
                let mut spec = spec(100, 172, m, code, Some(32), a);
                spec.epilogue = Tail::Plain.expr(100);
                emit(&unit, &format!("k{i}"), &spec, &schedule(&spec, &target.cpu)).unwrap();
                cases.push(Case::new(spec, Tail::Plain, false, &mut ChaCha8Rng::seed_from_u64(3)));
            }
            let object = Object::load(&unit.finish().unwrap()).unwrap();
            let run = |i: usize, m: usize| {
                let out = cases[i].run(&object, &format!("k{i}"), m, &mut ChaCha8Rng::seed_from_u64(5));
                out[..100].iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            };
            // The random rows come in the same order, so row 0 is the same.
            let one = run(0, 1);
            for (i, m) in [(1, 2), (1, 3), (1, 4), (2, 1), (2, 5), (2, 33)] {
                assert_eq!(run(i, m), one, "{} {code:?} {a:?} class {i} m={m}", target.name);
            }
        }
    }
}

#[test]
fn the_same_spec_gives_the_same_bytes() {
    for target in TARGETS {
        let build = || {
            let cx = Context::create();
            let unit = Unit::new(&cx, target, "test").unwrap();
            for (i, (m, _)) in CLASSES.into_iter().enumerate() {
                let mut spec = spec(100, 172, m, Code::U4, Some(32), AFmt::I8Token);
                spec.epilogue = Tail::BiasSiluResidual.expr(100);
                emit(&unit, &format!("k{i}"), &spec, &schedule(&spec, &target.cpu)).unwrap();
            }
            unit.finish().unwrap()
        };
        assert!(build() == build(), "{}", target.name);
    }
}

#[test]
fn what_no_kernel_computes_is_refused() {
    let m = MRange { min: 1, max: 1 };
    let refused = |change: &dyn Fn(&mut MatmulSpec), why: &str| {
        let mut spec = spec(64, 64, m, Code::U4, Some(32), AFmt::I8Token);
        spec.epilogue = EExpr::store_acc(MemTy::F32, 64);
        change(&mut spec);
        let diag = spec.check().unwrap_err();
        assert!(diag.message.contains(why), "{}", diag.message);
    };
    refused(&|s| s.w.code = Code::E4m3, "zero point on a float");
    refused(&|s| (s.w.code, s.w.zero) = (Code::E4m3, Zero::Sym(0)), "need integer weights");
    refused(&|s| s.w.group = 65, "scale group of 65");
    refused(&|s| s.n = 0, "empty");
    refused(&|s| s.w.scale = ScaleTy::None, "need scales");
    refused(&|s| s.epilogue = EExpr::new(), "reads no sums");
    let silent = |s: &mut MatmulSpec| {
        s.epilogue = EExpr::new();
        s.epilogue.acc();
    };
    refused(&silent, "stores nothing");
}
