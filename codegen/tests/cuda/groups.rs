//! Products of groups of warps against a reference in f64, the tiles that they take, and pipelines with something wrong.

use crate::codes::random_code;
use crate::products::{matrix, weights};
use crate::support::{Near, compare, count, encode, numbers, run};
use half::bf16;
use quantc_codegen::cuda::group::{self, GroupSpec, GroupTile, Scales};
use quantc_codegen::cuda::interp::{self, Counts, Schedule};
use quantc_codegen::cuda::layout::FragmentLayout;
use quantc_codegen::cuda::mixed::{self, MixedTile};
use quantc_codegen::cuda::tile::{Addr, GroupKind, GroupLeft, Kernel, Stmt, Val};
use quantc_codegen::cuda::tiles::rows::{self, From, RowTilesSpec};
use quantc_codegen::cuda::tiles::{ROWS, Tiled};
use quantc_codegen::eexpr::{EExpr, MemTy, UnaryOp};
use quantc_codegen::spec::{AFmt, Code, Rows, ScaleTy, WFmt, Zero, bf16_row_stride, i8_row_stride};
use quantc_ir::formats;
use quantc_ir::quant::quantize_one;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What is multiplied, and how it is scaled.
pub const FORMATS: [(GroupKind, Scales, bool); 6] = [
    (GroupKind::Bf16, Scales::None, false),
    (GroupKind::S8, Scales::Rows, false),
    (GroupKind::S8, Scales::Rows, true),
    (GroupKind::E4m3, Scales::Rows, false),
    (GroupKind::E4m3, Scales::Blocks, false),
    (GroupKind::S8, Scales::Blocks, false),
];

/// A spec that stores sums as f32, or silu of the first times the second, with a bias and a residual.
pub fn spec(n: u32, k: u32, (kind, scales, zeros): (GroupKind, Scales, bool), gated: bool) -> GroupSpec {
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
    e.store(v, MemTy::F32, n + 4);
    GroupSpec { n, k, rows: Rows::T, kind, scales, zeros, epilogue: e }
}

/// Random weights: their blob, and their values times scales in f64.
fn weights_of(spec: &GroupSpec, rng: &mut ChaCha8Rng) -> (Vec<u8>, Vec<f64>) {
    let w = spec.weights();
    let mut m = matrix(spec.n, spec.k, w, rng);
    if spec.scales == Scales::Blocks {
        let groups = spec.k.div_ceil(w.group) as usize;
        for row in 0..spec.n as usize {
            let first = row / 128 * 128;
            for g in 0..groups {
                m.scales[row * groups + g] = m.scales[first * groups + g];
            }
        }
    }
    let blob = spec.pack(&m).unwrap();
    assert_eq!(blob.len() as u64, spec.layout().bytes());
    (blob, weights(&m, spec.n, spec.k, w).into_iter().map(|(q, s)| q * s).collect())
}

/// Random rows in tiles: their buffers, and their values times scales in f64.
fn rows_of(spec: &GroupSpec, m: u32, rng: &mut ChaCha8Rng) -> (Vec<Vec<u8>>, Vec<f64>) {
    let (tiled, code) = (Tiled { kind: spec.kind, rows: m, columns: spec.k }, spec.weights().code);
    let mut tiles = vec![0u8; tiled.bytes() as usize];
    let blocks = spec.k.div_ceil(128);
    let count = match spec.scales {
        Scales::None => 0,
        Scales::Rows => m,
        Scales::Blocks => m * blocks,
    };
    let scales: Vec<f32> = (0..count).map(|_| rng.random_range(0.01f32..0.1)).collect();
    let (mut values, mut sums) = (vec![], vec![]);
    for row in 0..m {
        let mut sum = 0;
        for column in 0..spec.k {
            let bytes = random_code(code, rng);
            let at = tiled.at(row, column) as usize;
            tiles[at..at + bytes.len()].copy_from_slice(&bytes);
            let v = match spec.kind {
                GroupKind::S8 => f64::from(bytes[0] as i8),
                _ => code.value(&bytes),
            };
            sum += v as i32;
            values.push(match spec.scales {
                Scales::None => v,
                Scales::Rows => v * f64::from(scales[row as usize]),
                Scales::Blocks => v * f64::from(scales[(row * blocks + column / 128) as usize]),
            });
        }
        sums.extend(sum.to_le_bytes());
    }
    let mut buffers = vec![tiles];
    if count > 0 {
        buffers.push(encode(MemTy::F32, &scales));
    }
    if spec.zeros {
        buffers.push(sums);
    }
    (buffers, values)
}

/// Runs a product and compares all it writes.
fn check(spec: &GroupSpec, tile: GroupTile, m: u32, rng: &mut ChaCha8Rng) -> Counts {
    let what = format!("{:?} {:?} n {} k {} m {m} {tile:?}", spec.kind, spec.scales, spec.n, spec.k);
    let kernel = group::build("kernel", spec, tile).unwrap_or_else(|e| panic!("{what}: {e}"));
    let (n, k) = (spec.n as usize, spec.k as usize);
    let (mut buffers, x) = rows_of(spec, m, rng);
    let (mut accs, mut size) = (vec![], 0f64);
    for _ in 0..spec.products() {
        let (blob, w) = weights_of(spec, rng);
        for x in x.chunks(k) {
            for row in w.chunks(k) {
                accs.push(row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>());
                size = size.max(row.iter().zip(x).map(|(w, x)| (w * x).abs()).sum());
            }
        }
        buffers.push(blob);
    }
    let gated = spec.products() == 2;
    let elements = m as usize * n;
    let (mut bias, mut residual) = (vec![0.0; n], vec![0.0; elements]);
    if gated {
        let (bytes, v) = numbers(MemTy::F32, n, rng);
        buffers.push(bytes);
        bias = v;
        let (bytes, v) = numbers(MemTy::Bf16, elements, rng);
        buffers.push(bytes);
        residual = v;
    }
    let mut want = vec![f64::NAN; m as usize * (n + 4)];
    for i in 0..elements {
        let (row, col) = (i / n, i % n);
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let y = if gated { silu(accs[i]) * accs[elements + i] } else { accs[i] };
        want[row * (n + 4) + col] = y + f64::from(bias[col]) + f64::from(residual[i]);
    }
    buffers.push(vec![0; want.len() * 4]);
    let got = run(&kernel, &buffers, &[m, 1]);
    let absolute = size * 1e-6 * if gated { size.max(1.0) } else { 1.0 };
    // Sums of bytes are exact up to the scales; others are rounded once a product.
    let integer = spec.kind == GroupKind::S8 && spec.scales == Scales::Rows && !gated;
    let near =
        if integer { Near { relative: 4e-7, absolute: 0.0 } } else { Near { relative: 2e-6, absolute } };
    compare(&what, MemTy::F32, got.buffers.last().unwrap(), &want, near);
    got.counts
}

fn apart(spec: &GroupSpec) -> bool {
    spec.scales == Scales::Blocks || spec.kind == GroupKind::E4m3
}

#[test]
fn all_formats_on_odd_shapes() {
    let mut rng = ChaCha8Rng::seed_from_u64(71);
    for format in FORMATS {
        for (n, k, m, groups, columns) in [(70, 200, 5, 1, 64), (130, 300, 130, 2, 128)] {
            let spec = spec(n, k, format, false);
            let tile = GroupTile { groups, columns, stages: 2 + m % 2, apart: apart(&spec) };
            check(&spec, tile, m, &mut rng);
        }
    }
    // Odd output columns; wide blocks; e4m3 summed inside.
    let bf16 = spec(75, 90, FORMATS[0], false);
    check(&bf16, GroupTile { groups: 1, columns: 256, stages: 2, apart: false }, 3, &mut rng);
    check(&bf16, GroupTile { groups: 1, columns: 64, stages: 2, apart: true }, 3, &mut rng);
    let e4m3 = spec(64, 520, FORMATS[3], false);
    check(&e4m3, GroupTile { groups: 1, columns: 64, stages: 3, apart: false }, 66, &mut rng);
}

#[test]
fn two_products_meet_in_the_epilogue() {
    let mut rng = ChaCha8Rng::seed_from_u64(72);
    for format in FORMATS {
        let spec = spec(66, 256, format, true);
        let tile = GroupTile { groups: 2, columns: 64, stages: 2, apart: apart(&spec) };
        check(&spec, tile, 70, &mut rng);
    }
}

#[test]
fn products_of_other_templates_find_theirs() {
    let w = |code, group, zero, scale| WFmt { code, group, zero, scale };
    let of = |w, a| GroupSpec::of(&crate::products::spec(64, 256, w, a, false));
    let bytes = of(w(Code::U8, 256, Zero::Sym(128), ScaleTy::F32), AFmt::I8Token).unwrap();
    assert_eq!((bytes.kind, bytes.scales, bytes.zeros), FORMATS[1]);
    let floats = of(w(Code::Bf16, 256, Zero::Sym(0), ScaleTy::None), AFmt::Bf16).unwrap();
    assert_eq!((floats.kind, floats.scales, floats.zeros), FORMATS[0]);
    let refusal = of(w(Code::U4, 32, Zero::Sym(8), ScaleTy::F32), AFmt::I8Token).unwrap_err().to_string();
    assert!(refusal.contains("weights of u4 with scales of 32 columns"), "{refusal}");
    let tile = GroupTile::of(&bytes, 64, &quantc_codegen::targets::GPUS[0].gpu).unwrap_err().to_string();
    assert!(tile.contains("do not multiply on sm_80"), "{tile}");
}

/// Puts rows into tiles and compares every byte, scale and sum.
fn check_tiles(spec: RowTilesSpec, m: u32, rng: &mut ChaCha8Rng) {
    let what = format!("{spec:?} m {m}");
    let kernel = rows::build("tiles", &spec).unwrap_or_else(|e| panic!("{what}: {e}"));
    let tiled = Tiled { kind: spec.kind, rows: m, columns: spec.columns() };
    // Where the columns of a row go.
    let mut places = vec![0; tiled.columns as usize];
    (0..tiled.columns).for_each(|at| places[spec.column(at) as usize] = at);
    let mut want = vec![0u8; tiled.bytes() as usize];
    let (mut scales, mut row_sums, mut buffers) = (vec![], vec![], vec![]);
    match spec.from {
        From::Same { stride } => {
            let x: Vec<u8> = (0..m * stride).map(|_| rng.random()).collect();
            let bytes = 128 / spec.kind.columns();
            for (row, column) in (0..m).flat_map(|r| (0..spec.k).map(move |c| (r, c))) {
                let from = (row * stride + column * bytes) as usize;
                let to = tiled.at(row, places[column as usize]) as usize;
                let bytes = bytes as usize;
                want[to..to + bytes].copy_from_slice(&x[from..from + bytes]);
            }
            buffers.extend([x, vec![0; want.len()]]);
        }
        From::Floats { ty, stride, scales: by, sums } => {
            let (bytes, x) = numbers(ty, (m * stride) as usize, rng);
            for row in 0..m {
                let x = &x[(row * stride) as usize..][..spec.k as usize];
                let block = if by == Scales::Blocks { 128 } else { spec.k as usize };
                let mut sum = 0i32;
                for (i, part) in x.chunks(block).enumerate() {
                    let top = if spec.kind == GroupKind::S8 { 127.0 } else { 448.0 };
                    let scale = part.iter().fold(0f32, |s, x| s.max(x.abs())) / top;
                    scales.push(scale);
                    for (j, &x) in part.iter().enumerate() {
                        let code = match spec.kind {
                            GroupKind::Bf16 => bf16::from_f32(x).to_le_bytes().to_vec(),
                            GroupKind::S8 => vec![quantize_one(x, scale, 0, &formats::INT8) as u8],
                            GroupKind::E4m3 => vec![quantize_one(x, scale, 0, &formats::E4M3) as u8],
                        };
                        sum += i32::from(code[0] as i8);
                        let at = tiled.at(row, places[i * block + j]) as usize;
                        want[at..at + code.len()].copy_from_slice(&code);
                    }
                }
                row_sums.extend(sum.to_le_bytes());
            }
            buffers.extend([bytes, vec![0; want.len()]]);
            if by != Scales::None {
                buffers.push(vec![0; scales.len() * 4]);
            }
            if sums {
                buffers.push(vec![0; row_sums.len()]);
            }
            if by == Scales::None {
                scales.clear();
            }
        }
    }
    let got = run(&kernel, &buffers, &[m, 1]);
    assert!(got.buffers[1].written.iter().all(|&w| w), "{what}: all is written");
    let differs = got.buffers[1].data.iter().zip(&want).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what}");
    if !scales.is_empty() {
        assert_eq!(got.buffers[2].data, encode(MemTy::F32, &scales), "{what}");
    }
    if let Some(sums) = got.buffers.get(3) {
        assert_eq!(sums.data, row_sums, "{what}");
    }
}

#[test]
fn rows_become_tiles() {
    let mut rng = ChaCha8Rng::seed_from_u64(73);
    for (k, m) in [(200, 3), (128, 65), (77, 20)] {
        for kind in [GroupKind::Bf16, GroupKind::S8, GroupKind::E4m3] {
            let same = match kind {
                GroupKind::Bf16 => bf16_row_stride(k) * 2,
                _ => i8_row_stride(k),
            };
            let tiles = |from| RowTilesSpec { k, rows: Rows::T, kind, from, span: 0 };
            check_tiles(tiles(From::Same { stride: same }), m, &mut rng);
            for span in [32, 64] {
                check_tiles(RowTilesSpec { span, ..tiles(From::Same { stride: same }) }, m, &mut rng);
            }
            let list: &[Scales] =
                if kind == GroupKind::Bf16 { &[Scales::None] } else { &[Scales::Rows, Scales::Blocks] };
            for &scales in list {
                for (ty, stride) in [(MemTy::F32, k), (MemTy::Bf16, k + 3)] {
                    let sums = kind == GroupKind::S8 && scales == Scales::Rows;
                    let from = tiles(From::Floats { ty, stride, scales, sums });
                    check_tiles(from, m, &mut rng);
                    check_tiles(RowTilesSpec { span: 64, ..from }, m, &mut rng);
                }
            }
        }
    }
}

/// A product of three stages in two slots, with what its kernel is called with.
fn small(format: (GroupKind, Scales, bool)) -> (Kernel, Vec<Vec<u8>>) {
    let mut rng = ChaCha8Rng::seed_from_u64(74);
    let spec = spec(64, 400, format, false);
    let tile = GroupTile { groups: 1, columns: 64, stages: 2, apart: apart(&spec) };
    let (mut buffers, _) = rows_of(&spec, 9, &mut rng);
    buffers.push(weights_of(&spec, &mut rng).0);
    buffers.push(vec![0; 9 * 68 * 4]);
    (group::build("kernel", &spec, tile).unwrap(), buffers)
}

const SCHEDULES: [Schedule; 4] = [Schedule::Turns, Schedule::Ahead, Schedule::Behind, Schedule::Random(5)];

/// Edits the statement of a kind that is number `at`.
fn edited(kernel: &Kernel, at: usize, f: &dyn Fn(&mut Stmt) -> bool) -> Option<Kernel> {
    fn go(body: &mut [Stmt], left: &mut usize, f: &dyn Fn(&mut Stmt) -> bool) -> bool {
        for s in body {
            let mut changed = s.clone();
            if f(&mut changed) {
                if *left == 0 {
                    *s = changed;
                    return true;
                }
                *left -= 1;
            }
            let found = match s {
                Stmt::If(_, a, b) => go(a, left, f) || go(b, left, f),
                Stmt::For { body, .. } => go(body, left, f),
                _ => false,
            };
            if found {
                return true;
            }
        }
        false
    }
    let mut kernel = kernel.clone();
    go(&mut kernel.body, &mut at.clone(), f).then_some(kernel)
}

/// Every edit of a kind makes the kernel fail, or give something else, in some order at least.
fn each_is_found(kernel: &Kernel, buffers: &[Vec<u8>], why: &[&str], f: &dyn Fn(&mut Stmt) -> bool) {
    let right = interp::run(kernel, buffers, &[9, 1], Schedule::Turns).unwrap();
    let mut at = 0;
    while let Some(broken) = edited(kernel, at, f) {
        at += 1;
        let found = SCHEDULES.iter().any(|&order| match interp::run(&broken, buffers, &[9, 1], order) {
            Ok(got) => got.buffers.last().unwrap().data != right.buffers.last().unwrap().data,
            Err(fault) => {
                assert!(why.iter().any(|w| fault.what.contains(w)), "{fault}");
                true
            }
        });
        assert!(found, "edit {at} changes nothing");
    }
    assert!(at > 0, "there is nothing to edit");
}

/// Turns a statement into a remark, which does nothing.
fn gone(s: &mut Stmt) -> bool {
    *s = Stmt::Note(String::new());
    true
}

#[test]
fn pipelines_without_a_step() {
    for format in [FORMATS[0], FORMATS[4]] {
        let (kernel, buffers) = small(format);
        let races = [
            "a race",
            "under way",
            "may read it",
            "nobody wrote",
            "never ends",
            "never waited for",
            "than it counts",
        ];
        each_is_found(&kernel, &buffers, &races, &|s| matches!(s, Stmt::BarWait { .. }) && gone(s));
        each_is_found(&kernel, &buffers, &races, &|s| {
            matches!(s, Stmt::BarArrive { .. } | Stmt::BarExpect { .. }) && gone(s)
        });
        each_is_found(&kernel, &buffers, &races, &|s| matches!(s, Stmt::BulkCopy { .. }) && gone(s));
        let set_up = ["set up", "no barrier", "do not know"];
        each_is_found(&kernel, &buffers, &set_up, &|s| {
            matches!(s, Stmt::BarInit { .. } | Stmt::BarFence | Stmt::Barrier) && gone(s)
        });
        let sums =
            ["without a fence", "is used while a product", "never waited for", "may read it", "a race"];
        each_is_found(&kernel, &buffers, &sums, &|s| {
            matches!(s, Stmt::GroupWait { .. } | Stmt::GroupFence | Stmt::GroupCommit) && gone(s)
        });
    }
}

#[test]
fn pipelines_with_a_wrong_number() {
    let (kernel, buffers) = small(FORMATS[0]);
    let why =
        ["a race", "under way", "may read it", "nobody wrote", "never ends", "rows of a product", "it has"];
    // The phase before or after.
    each_is_found(&kernel, &buffers, &why, &|s| match s {
        Stmt::BarWait { parity, .. } => {
            *parity = Val::U32(0);
            true
        }
        _ => false,
    });
    // A stage, an arrival or some bytes too many.
    let numbers = ["never ends", "never waited for", "than it counts", "a race", "under way", "may read it"];
    each_is_found(&kernel, &buffers, &numbers, &|s| match s {
        Stmt::BarInit { count, .. } => {
            *count += 1;
            true
        }
        Stmt::BarExpect { bytes, .. } => {
            *bytes += 16;
            true
        }
        _ => false,
    });
    // Rows that begin elsewhere, on either side of a product or of a copy.
    let off = |at: &mut Addr, by: u32| at.plus += by;
    each_is_found(&kernel, &buffers, &why, &|s| match s {
        Stmt::GroupMma { b, .. } => {
            off(b, 32);
            true
        }
        _ => false,
    });
    each_is_found(&kernel, &buffers, &why, &|s| match s {
        Stmt::GroupMma { a: GroupLeft::Shared(a), .. } => {
            off(a, 128);
            true
        }
        Stmt::BulkCopy { to, .. } => {
            off(to, 16);
            true
        }
        _ => false,
    });
    // A wait for one group too few.
    each_is_found(&kernel, &buffers, &["a race", "may read it", "is used while"], &|s| match s {
        Stmt::GroupWait { left, .. } => {
            *left += 1;
            true
        }
        _ => false,
    });
}

/// A tile whose segments are not swizzled, or by one row too many, is read as something else.
#[test]
fn tiles_that_are_not_swizzled_as_they_are_read() {
    let (kernel, buffers) = small(FORMATS[1]);
    let right = interp::run(&kernel, &buffers, &[9, 1], Schedule::Turns).unwrap();
    for by in [0u64, 1] {
        let mut wrong = buffers.clone();
        let tile = wrong[0].clone();
        for at in (0..tile.len() as u64).step_by(16) {
            let row = at >> 7;
            // From its place to where it would be, and to where another row's would be.
            let segment = (at >> 4 & 7) ^ (row & 7) ^ if by == 0 { 0 } else { (row + by) & 7 };
            let to = (at & !0x70 | segment << 4) as usize;
            wrong[0][to..to + 16].copy_from_slice(&tile[at as usize..at as usize + 16]);
        }
        let got = interp::run(&kernel, &wrong, &[9, 1], Schedule::Turns).unwrap();
        assert!(got.buffers.last().unwrap().data != right.buffers.last().unwrap().data);
    }
}

#[test]
fn every_product_is_counted_once() {
    let mut rng = ChaCha8Rng::seed_from_u64(75);
    let spec = spec(64, 256, FORMATS[1], false);
    let tile = GroupTile { groups: 1, columns: 64, stages: 2, apart: false };
    // Four warps, two stages, four products each.
    assert_eq!(check(&spec, tile, ROWS, &mut rng).products, 32);
    let kernel = group::build("kernel", &spec, tile).unwrap();
    assert_eq!(count(&kernel.body, &|s| matches!(s, Stmt::GroupMma { .. })), 4);
}

/// Longer sums cost no conflicts of banks: those there are belong to the end, where sums go through shared memory.
#[test]
fn nothing_waits_for_banks_on_the_way() {
    let mut rng = ChaCha8Rng::seed_from_u64(77);
    for a in [AFmt::Bf16, AFmt::I8Token] {
        for w in crate::products::formats(a, 1 << 20).into_iter().step_by(4) {
            let conflicts = [128, 512].map(|k| {
                let w = WFmt { group: w.group.min(k), ..w };
                let spec = crate::products::spec(64, k, w, a, false);
                let tile = MixedTile { groups: 1, tokens: 64, stages: 2 };
                let Ok(kernel) = mixed::build("kernel", &spec, tile) else { return 0 };
                let stride = if a == AFmt::Bf16 { 2 * bf16_row_stride(k) } else { i8_row_stride(k) };
                let x = (0..3 * stride).map(|_| rng.random::<u8>() & 0x3f).collect();
                let mut buffers = vec![crate::products::tokens(&spec, x, 3)];
                if a == AFmt::I8Token {
                    buffers.extend([vec![0; 12], vec![0; 12 * spec.groups() as usize]]);
                }
                let blob = vec![0; FragmentLayout::of(&spec).unwrap().bytes() as usize];
                buffers.extend([blob, vec![0; 3 * 67 * 4]]);
                run(&kernel, &buffers, &[3, 1]).counts.bank_conflicts
            });
            assert_eq!(conflicts[0], conflicts[1], "{w:?}");
        }
    }
}

#[test]
fn pipelines_of_codes_in_registers() {
    let mut rng = ChaCha8Rng::seed_from_u64(76);
    let w = WFmt { code: Code::U4, group: 64, zero: Zero::Sym(8), scale: ScaleTy::Bf16 };
    let spec = crate::products::spec(64, 400, w, AFmt::Bf16, false);
    let kernel = mixed::build("kernel", &spec, MixedTile { groups: 1, tokens: 64, stages: 2 }).unwrap();
    let layout = FragmentLayout::of(&spec).unwrap();
    let x = numbers(MemTy::Bf16, 9 * bf16_row_stride(400) as usize, &mut rng).0;
    let mut blob: Vec<u8> = (0..layout.bytes()).map(|i| (i * 7 % 251) as u8).collect();
    for (n, group) in (0..64).flat_map(|n| (0..7).map(move |g| (n, g))) {
        blob[layout.scale(n, group) as usize..][..2].copy_from_slice(&bf16::ONE.to_le_bytes());
    }
    let buffers = vec![crate::products::tokens(&spec, x, 9), blob, vec![0; 9 * 67 * 4]];
    let why = [
        "a race",
        "under way",
        "may read it",
        "nobody wrote",
        "never ends",
        "never waited for",
        "than it counts",
        "without a fence",
        "while a product",
        "set up",
        "no barrier",
        "do not know",
    ];
    each_is_found(&kernel, &buffers, &why, &|s| {
        matches!(
            s,
            Stmt::BarWait { .. }
                | Stmt::BarArrive { .. }
                | Stmt::BarExpect { .. }
                | Stmt::BarInit { .. }
                | Stmt::BarFence
                | Stmt::Barrier
                | Stmt::BulkCopy { .. }
                | Stmt::GroupWait { left: 0, .. }
                | Stmt::GroupFence
        ) && gone(s)
    });
}
