//! Kernels of several products give the bits that kernels of one product each give one after the other.
#![cfg(feature = "llvm")]

use inkwell::context::Context;
use quantc_codegen::cpu::llvm::Unit;
use quantc_codegen::cpu::matmul::{emit, schedule};
use quantc_codegen::eexpr::{EExpr, MemTy, UnaryOp};
use quantc_codegen::layout::{Layout, Unpacked};
use quantc_codegen::spec::{AFmt, Code, MRange, MatmulSpec, Rows, ScaleTy, WFmt, Zero, i8_row_stride};
use quantc_codegen::targets::{TARGETS, runs_here};
use quantc_runtime::object::Object;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// `sum + bias`.
fn up(n: u32) -> EExpr {
    let mut e = EExpr::new();
    let (sum, bias) = (e.acc(), e.col_input(MemTy::F32));
    let value = e.add(sum, bias);
    e.store(value, MemTy::F32, n);
    e
}

/// `silu(sum) * up`, with `up` from memory.
fn gated(n: u32) -> EExpr {
    let mut e = EExpr::new();
    let (sum, up) = (e.acc(), e.elem_input(MemTy::F32, n));
    let gate = e.unary(UnaryOp::Silu, sum);
    let value = e.mul(gate, up);
    e.store(value, MemTy::F32, n);
    e
}

/// Both at once.
fn both(n: u32) -> EExpr {
    let mut e = EExpr::new();
    let sum = e.acc();
    let up = e.absorb(&up(n), 1).expect("it stores its sum");
    let gate = e.unary(UnaryOp::Silu, sum);
    let value = e.mul(gate, up);
    e.store(value, MemTy::F32, n);
    e
}

fn packed(layout: &Layout, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let (n, k, groups) = (layout.n as usize, layout.k as usize, layout.groups() as usize);
    let codes = match layout.w.code {
        Code::U4 => (0..n * k).map(|_| rng.random_range(0..16)).collect(),
        Code::U8 => (0..n * k).map(|_| rng.random()).collect(),
        _ => (0..n * k).flat_map(|_| rng.random_range(-1f32..1.0).to_le_bytes()).collect(),
    };
    let scales = (0..n * groups).map(|_| rng.random_range(0.01f32..0.1)).collect();
    let scales = if layout.w.scale == ScaleTy::None { vec![] } else { scales };
    let matrix = Unpacked { codes, scales, zeros: vec![] };
    let mut blob = vec![];
    let mut append = |panel: &[u8]| {
        blob.extend_from_slice(panel);
        Ok(())
    };
    layout.pack(&mut (layout, &matrix), &mut append).unwrap();
    blob
}

#[test]
fn products_that_meet_in_one_kernel_give_the_same_bits() {
    let classes = [
        (MRange { min: 1, max: 1 }, 1),
        (MRange { min: 2, max: 4 }, 3),
        (MRange { min: 5, max: 16 }, 13),
        (MRange { min: 17, max: 512 }, 37),
    ];
    let formats = [
        (Code::U4, 32, Zero::Sym(8), ScaleTy::F32, AFmt::I8Token),
        (Code::U8, 172, Zero::Sym(128), ScaleTy::F32, AFmt::I8Token),
        (Code::U4, 12, Zero::Sym(8), ScaleTy::F32, AFmt::F32),
        (Code::F32, 172, Zero::Sym(0), ScaleTy::None, AFmt::F32),
    ];
    let mut rng = ChaCha8Rng::seed_from_u64(31);
    for target in TARGETS.iter().filter(|t| runs_here(t)) {
        for (i, (m, rows)) in classes.into_iter().enumerate() {
            for (j, (code, group, zero, scale, a)) in formats.into_iter().enumerate() {
                let n = [100, 192][(i + j) % 2];
                let w = WFmt { code, group, zero, scale };
                let spec = |epilogue| MatmulSpec { n, k: 172, m, rows: Rows::T, w, a, epilogue };
                let case = Case {
                    one: [spec(up(n)), spec(gated(n))],
                    two: spec(both(n)),
                    weights: [(); 2].map(|()| packed(&Layout::of(&spec(up(n))), &mut rng)),
                };
                case.check(target, rows, &mut rng);
            }
        }
    }
}

struct Case {
    /// The products one by one.
    one: [MatmulSpec; 2],
    /// The products at once.
    two: MatmulSpec,
    /// Of `up` and of the gate.
    weights: [Vec<u8>; 2],
}

impl Case {
    fn check(&self, target: &'static quantc_ir::target::TargetDesc, rows: usize, rng: &mut ChaCha8Rng) {
        let cx = Context::create();
        let unit = Unit::new(&cx, target, "test").unwrap();
        for (symbol, spec) in [("up", &self.one[0]), ("gated", &self.one[1]), ("both", &self.two)] {
            emit(&unit, symbol, spec, &schedule(spec, &target.cpu)).unwrap();
        }
        let object = Object::load(&unit.finish().unwrap()).unwrap();
        let (n, k, groups) = (self.two.n as usize, self.two.k as usize, self.two.groups() as usize);
        let stride = i8_row_stride(self.two.k) as usize;
        let mut floats: Vec<f32> = (0..rows * k).map(|_| rng.random_range(-2.0..2.0)).collect();
        let mut codes = vec![0i8; rows * stride];
        let mut sums = vec![0i32; rows * groups];
        for (row, codes) in codes.chunks_mut(stride).enumerate() {
            for (col, code) in codes[..k].iter_mut().enumerate() {
                *code = rng.random_range(-127..=127);
                sums[row * groups + col / self.two.w.group as usize] += i32::from(*code);
            }
        }
        let mut scales: Vec<f32> = (0..rows).map(|_| rng.random_range(0.001..0.1)).collect();
        let mut bias: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
        let a: Vec<*mut u8> = match self.two.a {
            AFmt::I8Token => {
                vec![codes.as_mut_ptr().cast(), scales.as_mut_ptr().cast(), sums.as_mut_ptr().cast()]
            }
            _ => vec![floats.as_mut_ptr().cast()],
        };
        let [up, gate] = [&self.weights[0], &self.weights[1]].map(|w| w.as_ptr().cast_mut());
        let bias = bias.as_mut_ptr().cast();
        let (mut between, mut want) = (vec![f32::NAN; rows * n], vec![f32::NAN; rows * n]);
        let mut got = vec![f32::NAN; rows * n];
        let runs: [(&str, Vec<*mut u8>); 3] = [
            ("up", vec![up, bias, between.as_mut_ptr().cast()]),
            ("gated", vec![gate, between.as_mut_ptr().cast(), want.as_mut_ptr().cast()]),
            ("both", vec![gate, up, bias, got.as_mut_ptr().cast()]),
        ];
        for (symbol, rest) in runs {
            let args = [a.clone(), rest].concat();
            let items = i64::from(self.two.items());
            // SAFETY: the arguments are those that the spec documents, as large as its shapes demand.
            unsafe { object.symbol(symbol).unwrap()(args.as_ptr(), [rows as i64, -1].as_ptr(), 0, items) };
        }
        let same = got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits() && a.is_finite());
        assert!(same, "{} {:?} {rows} rows of {n}", target.name, self.two.w);
    }
}
