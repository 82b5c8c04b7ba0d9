//! Products against a reference in f64: every format of weights and rows, odd shapes, and layouts there and back.

use crate::codes::random_code;
use crate::support::{Near, compare, numbers, run};
use half::bf16;
use quantc_codegen::cuda::interp::{self, Counts, Schedule};
use quantc_codegen::cuda::layout::FragmentLayout;
use quantc_codegen::cuda::mixed::{self, MixedTile};
use quantc_codegen::cuda::skinny::{self, SkinnyTile};
use quantc_codegen::cuda::tile::Kernel;
use quantc_codegen::cuda::tiles::{self, Tiled};
use quantc_codegen::cuda::wide::{self, WideTile};
use quantc_codegen::eexpr::{EExpr, MemTy, UnaryOp};
use quantc_codegen::layout::Unpacked;
use quantc_codegen::spec::{
    AFmt, Code, MRange, MatmulSpec, Rows, ScaleTy, WFmt, Zero, bf16_row_stride, i8_row_stride,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A random matrix in a format.
pub fn matrix(n: u32, k: u32, w: WFmt, rng: &mut ChaCha8Rng) -> Unpacked {
    let groups = (n * k.div_ceil(w.group)) as usize;
    let codes: Vec<Vec<u8>> = (0..n * k).map(|_| random_code(w.code, rng)).collect();
    let mut m = Unpacked { codes: codes.concat(), ..Unpacked::default() };
    if w.scale != ScaleTy::None {
        let scale = |rng: &mut ChaCha8Rng| {
            let s = rng.random_range(0.01f32..0.1);
            if w.scale == ScaleTy::Bf16 { bf16::from_f32(s).to_f32() } else { s }
        };
        m.scales = (0..groups).map(|_| scale(rng)).collect();
    }
    if w.zero == Zero::Asym {
        let most = if w.code == Code::U4 { 15 } else { 255 };
        m.zeros = (0..groups).map(|_| rng.random_range(0..=most)).collect();
    }
    m
}

/// The weights in f64, `[n][k]`: code less zero point, and the scale.
pub fn weights(m: &Unpacked, n: u32, k: u32, w: WFmt) -> Vec<(f64, f64)> {
    let groups = k.div_ceil(w.group);
    let bytes = w.code.source_bytes();
    let at = |row: u32, col: u32| {
        let group = (row * groups + col / w.group) as usize;
        let zero = match w.zero {
            Zero::Sym(z) => f64::from(z),
            Zero::Asym => f64::from(m.zeros[group]),
        };
        let code = &m.codes[(row * k + col) as usize * bytes..][..bytes];
        (w.code.value(code) - zero, m.scales.get(group).map_or(1.0, |s| f64::from(*s)))
    };
    (0..n).flat_map(|row| (0..k).map(move |col| (row, col))).map(|(row, col)| at(row, col)).collect()
}

/// Random rows of activations: their buffers, and their values in f64 with the scale of each row.
fn activations(
    a: AFmt,
    m: u32,
    k: u32,
    group: u32,
    rng: &mut ChaCha8Rng,
) -> (Vec<Vec<u8>>, Vec<f64>, Vec<f64>) {
    let (mut values, mut bytes, mut sums) = (vec![], vec![], vec![]);
    let scales: Vec<f32> = (0..m).map(|_| rng.random_range(0.01f32..0.1)).collect();
    for _ in 0..m {
        match a {
            AFmt::Bf16 => {
                let (mut row, v) = numbers(MemTy::Bf16, k as usize, rng);
                // What lies between rows is not zero: NaN.
                row.resize(bf16_row_stride(k) as usize * 2, 0xff);
                bytes.extend(row);
                values.extend(v.into_iter().map(f64::from));
            }
            _ => {
                let (mut row, v) = numbers(MemTy::I8, k as usize, rng);
                row.resize(i8_row_stride(k) as usize, 0);
                bytes.extend(row);
                sums.extend(
                    v.chunks(group as usize).flat_map(|g| (g.iter().sum::<f32>() as i32).to_le_bytes()),
                );
                values.extend(v.into_iter().map(f64::from));
            }
        }
    }
    match a {
        AFmt::Bf16 => (vec![bytes], values, vec![1.0; m as usize]),
        _ => {
            let packed = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
            (vec![bytes, packed, sums], values, scales.into_iter().map(f64::from).collect())
        }
    }
}

/// A spec of a product that stores its sums as f32, or silu of the first times the second, with a bias and a residual.
pub fn spec(n: u32, k: u32, w: WFmt, a: AFmt, gated: bool) -> MatmulSpec {
    let mut e = EExpr::new();
    let mut v = e.acc();
    if gated {
        let mut other = EExpr::new();
        let up = other.acc();
        other.store(up, MemTy::F32, n);
        let gate = e.unary(UnaryOp::Silu, v);
        let up = e.absorb(&other, 1).expect("the other stores its sums");
        v = e.mul(gate, up);
        let bias = e.col_input(MemTy::F32);
        let residual = e.elem_input(MemTy::Bf16, n);
        v = e.add(v, bias);
        v = e.add(v, residual);
    }
    e.store(v, MemTy::F32, n + 3);
    MatmulSpec { n, k, m: MRange { min: 1, max: 64 }, rows: Rows::T, w, a, epilogue: e }
}

/// Formats of weights that meet such rows.
pub fn formats(a: AFmt, k: u32) -> Vec<WFmt> {
    let f = |code, group: u32, zero, scale| WFmt { code, group: group.min(k), zero, scale };
    use Code::*;
    use Zero::{Asym, Sym};
    let mut list = vec![
        f(U4, 128, Sym(8), ScaleTy::Bf16),
        f(U4, 32, Sym(8), ScaleTy::Bf16),
        f(U4, 32, Asym, ScaleTy::Bf16),
        f(U4, k, Sym(8), ScaleTy::F32),
        f(U4, 64, Asym, ScaleTy::F32),
        f(U4, k, Asym, ScaleTy::Bf16),
        f(U4, 128, Sym(4), ScaleTy::F32),
        f(U8, k, Sym(128), ScaleTy::F32),
        f(U8, 128, Sym(128), ScaleTy::Bf16),
        f(U8, k, Asym, ScaleTy::F32),
        f(U8, 64, Asym, ScaleTy::F32),
        f(U8, k, Sym(0), ScaleTy::Bf16),
        f(U8, 256, Sym(128), ScaleTy::F32),
    ];
    if a == AFmt::Bf16 {
        list.extend([
            f(U4, 16, Sym(8), ScaleTy::Bf16),
            f(E4m3, k, Sym(0), ScaleTy::F32),
            f(E4m3, 128, Sym(0), ScaleTy::F32),
            f(E5m2, k, Sym(0), ScaleTy::F32),
            f(Lut4, 32, Sym(0), ScaleTy::Bf16),
            f(Bf16, k, Sym(0), ScaleTy::None),
        ]);
    }
    list
}

/// Tokens and results of a call that has `m` rows for a product.
fn sizes(spec: &MatmulSpec, m: u32) -> [u32; 2] {
    match spec.rows {
        Rows::T => [m, 1],
        Rows::R => [m + 40, m],
    }
}

/// Runs a product of few rows and compares all it writes.
fn check(spec: &MatmulSpec, tile: SkinnyTile, m: u32, rng: &mut ChaCha8Rng) -> Counts {
    let kernel = skinny::build("kernel", spec, tile).unwrap_or_else(|e| panic!("{spec:?}: {e}"));
    check_kernel(spec, &format!("{tile:?}"), &kernel, m, rng)
}

/// Runs a product of many rows and compares all it writes.
fn check_wide(spec: &MatmulSpec, tile: WideTile, m: u32, rng: &mut ChaCha8Rng) -> Counts {
    let kernel = wide::build("kernel", spec, tile).unwrap_or_else(|e| panic!("{spec:?}: {e}"));
    check_kernel(spec, &format!("{tile:?}"), &kernel, m, rng)
}

/// Runs a product of groups of warps and compares all it writes.
fn check_mixed(spec: &MatmulSpec, tile: MixedTile, m: u32, rng: &mut ChaCha8Rng) -> Counts {
    let kernel = mixed::build("kernel", spec, tile).unwrap_or_else(|e| panic!("{spec:?}: {e}"));
    check_of(spec, &format!("{tile:?}"), &kernel, m, rng, &|rows| tokens(spec, rows, m))
}

/// Rows of activations as tiles of tokens, by the kernel that makes them.
pub fn tokens(spec: &MatmulSpec, rows: Vec<u8>, m: u32) -> Vec<u8> {
    let tiles = MixedTile::tokens_spec(spec).unwrap();
    let tiled = Tiled { kind: tiles.kind, rows: m, columns: tiles.columns() };
    let kernel = tiles::rows::build("tiles", &tiles).unwrap();
    let out = vec![0; tiled.bytes() as usize];
    let got = interp::run(&kernel, &[rows, out], &sizes(spec, m), Schedule::Turns).unwrap();
    got.buffers[1].data.clone()
}

/// Runs a product and compares all it writes.
fn check_kernel(spec: &MatmulSpec, tile: &str, kernel: &Kernel, m: u32, rng: &mut ChaCha8Rng) -> Counts {
    check_of(spec, tile, kernel, m, rng, &|rows| rows)
}

/// Runs a product, of rows that are made into something first, and compares all it writes.
fn check_of(
    spec: &MatmulSpec,
    tile: &str,
    kernel: &Kernel,
    m: u32,
    rng: &mut ChaCha8Rng,
    rows: &dyn Fn(Vec<u8>) -> Vec<u8>,
) -> Counts {
    let what = format!("{:?} {:?} n {} k {} m {m} {tile}", spec.w, spec.a, spec.n, spec.k);
    let (n, k) = (spec.n, spec.k);
    let layout = FragmentLayout::of(spec).unwrap();
    let (mut buffers, x, x_scale) = activations(spec.a, m, k, spec.w.group, rng);
    buffers[0] = rows(std::mem::take(&mut buffers[0]));
    let mut accs = vec![];
    // The largest sums of sizes, for what rounding each step may cost.
    let mut size = 0f64;
    for _ in 0..spec.products() {
        let matrix = matrix(n, k, spec.w, rng);
        let mut blob = vec![];
        layout
            .pack(&mut (&quantc_codegen::layout::Layout::of(spec), &matrix), &mut |part| {
                blob.extend_from_slice(part);
                Ok(())
            })
            .unwrap();
        assert_eq!(blob.len() as u64, layout.bytes(), "{what}");
        assert_eq!(layout.unpack(&blob).unwrap(), matrix, "{what}: there and back");
        let w = weights(&matrix, n, k, spec.w);
        for i in 0..m as usize {
            let x = &x[i * k as usize..][..k as usize];
            for row in w.chunks(k as usize) {
                let terms = || row.iter().zip(x).map(|((q, s), x)| q * s * x * x_scale[i]);
                accs.push(terms().sum::<f64>());
                size = size.max(terms().map(f64::abs).sum());
            }
        }
        buffers.push(blob);
    }
    let gated = spec.products() == 2;
    let elements = (m * n) as usize;
    let (mut bias, mut residual) = (vec![0.0; n as usize], vec![0.0; elements]);
    if gated {
        let (bytes, v) = numbers(MemTy::F32, n as usize, rng);
        buffers.push(bytes);
        bias = v;
        let (bytes, v) = numbers(MemTy::Bf16, elements, rng);
        buffers.push(bytes);
        residual = v;
    }
    let mut want = vec![f64::NAN; m as usize * (n + 3) as usize];
    for i in 0..elements {
        let (row, col) = (i / n as usize, i % n as usize);
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let y = if gated { silu(accs[i]) * accs[elements + i] } else { accs[i] };
        want[row * (n + 3) as usize + col] = y + f64::from(bias[col]) + f64::from(residual[i]);
    }
    buffers.push(vec![0; want.len() * 4]);
    let got = run(kernel, &buffers, &sizes(spec, m));
    // Sums of a few hundred terms, each rounded to 24 bits.
    let absolute = size * 1e-6 * if gated { size.max(1.0) } else { 1.0 };
    compare(&what, MemTy::F32, got.buffers.last().unwrap(), &want, Near { relative: 2e-6, absolute });
    got.counts
}

#[test]
fn all_formats_on_odd_shapes() {
    let mut rng = ChaCha8Rng::seed_from_u64(31);
    for a in [AFmt::Bf16, AFmt::I8Token] {
        for (n, k, m) in [(40, 300, 5), (17, 72, 1), (16, 128, 9)] {
            for w in formats(a, k) {
                let tile = SkinnyTile {
                    rows: rng.random_range(1..3),
                    tokens: rng.random_range(1..3),
                    warps: [1, 2, 4][rng.random_range(0..3)],
                    stages: rng.random_range(2..4),
                };
                check(&spec(n, k, w, a, false), tile, m, &mut rng);
            }
        }
    }
}

#[test]
fn all_tiles() {
    let mut rng = ChaCha8Rng::seed_from_u64(32);
    let w = WFmt { code: Code::U4, group: 128, zero: Zero::Sym(8), scale: ScaleTy::Bf16 };
    for (warps, stages, rows, tokens, m) in
        [(1, 2, 1, 1, 3), (8, 4, 3, 1, 8), (4, 2, 4, 2, 17), (2, 3, 1, 8, 64), (4, 3, 2, 4, 33)]
    {
        let tile = SkinnyTile { rows, tokens, warps, stages };
        check(&spec(68, 1300, w, AFmt::Bf16, false), tile, m, &mut rng);
        check(&spec(34, 520, w, AFmt::I8Token, true), tile, m, &mut rng);
    }
}

/// Rows are results where the spec says so, however many tokens there are.
#[test]
fn wanted_rows_only() {
    let mut rng = ChaCha8Rng::seed_from_u64(40);
    let w = WFmt { code: Code::U4, group: 128, zero: Zero::Sym(8), scale: ScaleTy::Bf16 };
    for a in [AFmt::Bf16, AFmt::I8Token] {
        let spec = MatmulSpec { rows: Rows::R, ..spec(40, 256, w, a, false) };
        check(&spec, SkinnyTile { rows: 1, tokens: 1, warps: 2, stages: 2 }, 5, &mut rng);
        check_wide(&spec, WideTile { rows: 1, tokens: 2, warps: [2, 1], stages: 2 }, 19, &mut rng);
        check_mixed(&spec, MixedTile { groups: 1, tokens: 64, stages: 2 }, 19, &mut rng);
    }
}

#[test]
fn two_products_meet_in_the_epilogue() {
    let mut rng = ChaCha8Rng::seed_from_u64(33);
    let tile = SkinnyTile { rows: 2, tokens: 1, warps: 2, stages: 2 };
    for a in [AFmt::Bf16, AFmt::I8Token] {
        for w in formats(a, 256).into_iter().step_by(3) {
            check(&spec(24, 256, w, a, true), tile, 6, &mut rng);
        }
    }
}

/// Longer sums cost products and reads, and no conflicts: those there are belong to the end.
#[test]
fn nothing_waits_for_banks_on_the_way() {
    let mut rng = ChaCha8Rng::seed_from_u64(34);
    let tile = SkinnyTile { rows: 1, tokens: 1, warps: 2, stages: 3 };
    for a in [AFmt::Bf16, AFmt::I8Token] {
        for w in formats(a, 1 << 20).into_iter().step_by(2) {
            let w = |k: u32| WFmt { group: w.group.min(k), ..w };
            let short = check(&spec(32, 256, w(256), a, false), tile, 4, &mut rng);
            let long = check(&spec(32, 1024, w(1024), a, false), tile, 4, &mut rng);
            assert_eq!(short.bank_conflicts, long.bank_conflicts, "{:?}", w(256));
            assert_eq!(4 * short.products, long.products, "{:?}", w(256));
        }
    }
}

#[test]
fn what_has_no_kernel_is_named() {
    let w = |code, group| WFmt { code, group, zero: Zero::Sym(0), scale: ScaleTy::F32 };
    let refusal = |w, a| FragmentLayout::new(64, 960, w, a).unwrap_err().to_string();
    assert!(refusal(w(Code::U4, 48), AFmt::Bf16).contains("groups of 48 columns"));
    assert!(refusal(w(Code::U4, 16), AFmt::I8Token).contains("groups of 16 columns"));
    assert!(refusal(w(Code::F16, 960), AFmt::Bf16).contains("weights of f16"));
    assert!(refusal(w(Code::U4, 128), AFmt::F32).contains("f32 activations"));
}

#[test]
fn many_rows_of_all_formats() {
    let mut rng = ChaCha8Rng::seed_from_u64(35);
    for a in [AFmt::Bf16, AFmt::I8Token] {
        for w in formats(a, 200) {
            let tile = WideTile { rows: 1, tokens: 2, warps: [2, 1], stages: 3 };
            check_wide(&spec(40, 200, w, a, false), tile, 19, &mut rng);
        }
    }
}

#[test]
fn many_rows_in_all_tiles() {
    let mut rng = ChaCha8Rng::seed_from_u64(36);
    let w = |group| WFmt { code: Code::U4, group, zero: Zero::Sym(8), scale: ScaleTy::Bf16 };
    for (rows, tokens, warps, stages, m) in
        [(2, 4, [2, 2], 2, 70), (4, 8, [1, 1], 4, 64), (1, 1, [1, 4], 3, 45), (3, 2, [2, 1], 2, 1)]
    {
        let tile = WideTile { rows, tokens, warps, stages };
        check_wide(&spec(70, 384, w(128), AFmt::Bf16, false), tile, m, &mut rng);
        check_wide(&spec(33, 300, w(300), AFmt::I8Token, true), tile, m, &mut rng);
    }
}

/// As for few rows: the swizzle leaves no conflicts, whatever a lane's runs are.
#[test]
fn swizzled_rows_meet_all_banks() {
    let mut rng = ChaCha8Rng::seed_from_u64(37);
    let tile = WideTile { rows: 1, tokens: 1, warps: [1, 1], stages: 2 };
    for a in [AFmt::Bf16, AFmt::I8Token] {
        for w in formats(a, 1 << 20) {
            let w = |k: u32| WFmt { group: w.group.min(k), ..w };
            let short = check_wide(&spec(16, 256, w(256), a, false), tile, 8, &mut rng);
            let long = check_wide(&spec(16, 512, w(512), a, false), tile, 8, &mut rng);
            assert_eq!(short.bank_conflicts, long.bank_conflicts, "{:?}", w(256));
        }
    }
}

#[test]
fn groups_of_warps_take_the_same_weights() {
    let mut rng = ChaCha8Rng::seed_from_u64(38);
    for a in [AFmt::Bf16, AFmt::I8Token] {
        for (i, w) in formats(a, 200).into_iter().enumerate() {
            let spec = spec(70, 200, w, a, false);
            let tile = MixedTile { groups: 1 + i as u32 % 2, tokens: 64, stages: 2 };
            let sums =
                a == AFmt::I8Token && w.group < 200 && (w.zero == Zero::Asym || w.zero == Zero::Sym(4));
            if sums {
                let refusal = mixed::build("kernel", &spec, tile).unwrap_err().to_string();
                assert!(refusal.contains("zero points for groups"), "{refusal}");
                continue;
            }
            check_mixed(&spec, tile, 19, &mut rng);
        }
    }
}

#[test]
fn groups_of_warps_in_all_tiles() {
    let mut rng = ChaCha8Rng::seed_from_u64(39);
    let w = |group| WFmt { code: Code::U4, group, zero: Zero::Sym(8), scale: ScaleTy::Bf16 };
    for (groups, tokens, stages, m) in [(2, 128, 3, 130), (1, 64, 4, 64), (1, 128, 2, 1)] {
        let tile = MixedTile { groups, tokens, stages };
        check_mixed(&spec(70, 640, w(128), AFmt::Bf16, false), tile, m, &mut rng);
        check_mixed(&spec(33, 300, w(300), AFmt::I8Token, true), tile, m, &mut rng);
        let tile = MixedTile { tokens: 64, ..tile };
        check_mixed(&spec(24, 640, w(256), AFmt::Bf16, true), tile, m, &mut rng);
    }
}
