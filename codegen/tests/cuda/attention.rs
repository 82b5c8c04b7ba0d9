//! Attention against its definition in f64: all caches, mixes of sequences, pages anywhere, odd lengths.

use crate::caches::{TYPES, code, scale_of};
use crate::support::{Near, compare, count, encode, run};
use half::bf16;
use quantc_codegen::cpu::attention::{AttentionSpec, KvSource};
use quantc_codegen::cpu::cache::{CacheTy, Role};
use quantc_codegen::cuda::attention::AttentionCall;
use quantc_codegen::cuda::attention::decode::{self, DecodeTile};
use quantc_codegen::cuda::attention::prefill::{self, PrefillTile};
use quantc_codegen::cuda::cache::{CacheLayout, PAGE};
use quantc_codegen::cuda::interp::{self, Schedule};
use quantc_codegen::cuda::tile::{Kernel, Stmt};
use quantc_codegen::eexpr::{EExpr, F32, MemTy};
use quantc_codegen::spec::Rows as Counted;
use quantc_ir::formats;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tokens of one sequence: how many keys there are with them, and how many of these are of the call.
type Sequence = (u32, u32);

/// Arguments of a call and what it should give.
pub struct Case {
    pub buffers: Vec<Vec<u8>>,
    pub want: Vec<f64>,
    pub t: u32,
    /// The largest of the values.
    largest: f64,
}

fn ints(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Numbers that bf16 has.
fn numbers(count: usize, size: f32, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..count).map(|_| bf16::from_f32(rng.random_range(-size..size)).to_f32()).collect()
}

/// Keys or values of all heads in one sequence, `[token][head][column]`, as the cache has them.
struct Rows {
    values: Vec<f64>,
    stored: Vec<Vec<u8>>,
    scales: Vec<f32>,
}

fn rows(spec: &AttentionSpec, ty: CacheTy, fixed: Option<&[f32]>, keys: u32, rng: &mut ChaCha8Rng) -> Rows {
    let mut rows = Rows { values: vec![], stored: vec![], scales: vec![] };
    for _ in 0..keys {
        for h in 0..spec.kv_heads {
            let x = numbers(spec.head_dim as usize, 2.0, rng);
            let scale = fixed.map_or_else(|| scale_of(ty, &x), |f| f[h as usize]);
            rows.scales.push(scale);
            for x in x {
                let bytes = code(ty, x, scale);
                rows.values.push(match ty {
                    CacheTy::I8 => f64::from(bytes[0] as i8) * f64::from(scale),
                    CacheTy::E4m3 => f64::from(formats::E4M3.decode(bytes[0].into())) * f64::from(scale),
                    _ => f64::from(x),
                });
                rows.stored.push(bytes);
            }
        }
    }
    rows
}

/// Random queries over random caches; what no token wrote is no number.
pub fn case(call: &AttentionCall, sequences: &[Sequence], rng: &mut ChaCha8Rng) -> Case {
    let spec = &call.spec;
    let (heads, d, group) = (spec.heads as usize, spec.head_dim as usize, spec.group() as usize);
    let t: u32 = sequences.iter().map(|s| s.1).sum();
    let q = numbers(t as usize * spec.q_stride as usize, 2.0, rng);
    let mut buffers = vec![encode(MemTy::F32, &q)];
    let (mut want, mut largest) = (vec![], 0f64);
    let mut token = 0;
    let mut attend = |keys: &Rows, values: &Rows, position: u32, n: u32| {
        for h in 0..heads {
            let kv = h / group;
            let at = |rows: &Rows, i: u32| {
                rows.values[(i as usize * spec.kv_heads as usize + kv) * d..][..d].to_vec()
            };
            let q = &q[token * spec.q_stride as usize + h * d..][..d];
            let last = if spec.causal { position + 1 } else { n };
            let first = last.saturating_sub(spec.window.unwrap_or(u32::MAX));
            let scores: Vec<f64> = (first..last)
                .map(|i| {
                    let dot: f64 = q.iter().zip(at(keys, i)).map(|(q, k)| f64::from(*q) * k).sum();
                    let x = dot * f64::from(spec.scale.get());
                    spec.softcap.map_or(x, |c| f64::from(c.get()) * (x / f64::from(c.get())).tanh())
                })
                .collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|x| (x - top).exp()).collect();
            let all: f64 = weights.iter().sum();
            let mut out = vec![0.0; d];
            for (i, w) in (first..last).zip(weights) {
                for (out, v) in out.iter_mut().zip(at(values, i)) {
                    *out += w / all * v;
                    largest = largest.max(v.abs());
                }
            }
            want.extend(out);
        }
        token += 1;
    };
    let KvSource::Cache { ty, fixed_scales, .. } = spec.source else {
        let KvSource::Direct { stride } = spec.source else { unreachable!() };
        let [k, v] = [(); 2].map(|()| rows(spec, CacheTy::Bf16, None, t, rng));
        for i in 0..t {
            attend(&k, &v, i, t);
        }
        for rows in [k, v] {
            let mut bytes = vec![];
            for row in rows.values.chunks(d * spec.kv_heads as usize) {
                let mut row: Vec<f32> = row.iter().map(|&x| x as f32).collect();
                row.resize(stride as usize, f32::NAN);
                bytes.extend(encode(MemTy::F32, &row));
            }
            buffers.push(bytes);
        }
        buffers.push(vec![0; want.len() * 4]);
        return Case { buffers, want, t, largest };
    };
    let given: Option<Vec<f32>> = (ty.is_scaled() && fixed_scales)
        .then(|| (0..spec.kv_heads).map(|h| 0.01 + 0.003 * h as f32).collect());
    let per_sequence = sequences.iter().map(|s| s.0.div_ceil(PAGE)).max().unwrap_or(1);
    let count = per_sequence * sequences.len() as u32;
    // Pages from last to first.
    let pages: Vec<u32> = (0..count).map(|i| if call.paged { count - 1 - i } else { i }).collect();
    let layouts =
        [Role::Keys, Role::Values].map(|r| CacheLayout::new(ty, r, spec.kv_heads, spec.head_dim).unwrap());
    let mut states = layouts.map(|l| vec![0xffu8; (count * l.page_bytes()) as usize]);
    let mut scales = [(); 2].map(|()| vec![f32::NAN; (count * spec.kv_heads * PAGE) as usize]);
    let (mut positions, mut base) = (vec![], vec![]);
    for (s, &(keys, new)) in (0..).zip(sequences) {
        let first_row = s * per_sequence * PAGE;
        let both = [(); 2].map(|()| rows(spec, ty, given.as_deref(), keys, rng));
        for ((rows, layout), (state, scales)) in
            both.iter().zip(layouts).zip(states.iter_mut().zip(&mut scales))
        {
            for i in 0..keys {
                let row = first_row + i;
                let page = pages[(row / PAGE) as usize];
                for h in 0..spec.kv_heads {
                    let line = (i * spec.kv_heads + h) as usize;
                    scales[((page * spec.kv_heads + h) * PAGE + row % PAGE) as usize] = rows.scales[line];
                    for c in 0..layout.width() {
                        let at =
                            page * layout.page_bytes() + h * layout.head_bytes() + layout.at(row % PAGE, c);
                        let zero = vec![0; ty.bytes() as usize];
                        let stored =
                            if (c as usize) < d { &rows.stored[line * d + c as usize] } else { &zero };
                        state[at as usize..][..stored.len()].copy_from_slice(stored);
                    }
                }
            }
        }
        for p in keys - new..keys {
            attend(&both[0], &both[1], p, keys);
            positions.push(p);
            base.push(first_row);
        }
    }
    buffers.extend(states);
    buffers.extend([ints(&positions), ints(&base)]);
    if call.paged {
        buffers.push(ints(&pages));
    }
    if ty.is_scaled() {
        match given {
            Some(given) => buffers.extend([encode(MemTy::F32, &given), encode(MemTy::F32, &given)]),
            None => buffers.extend(scales.map(|s| encode(MemTy::F32, &s))),
        }
    }
    buffers.push(vec![0; want.len() * 4]);
    Case { buffers, want, t, largest }
}

/// Scratch and counters.
pub fn workspace(kernel: &Kernel, t: u32) -> Vec<Vec<u8>> {
    kernel
        .buffers
        .iter()
        .map(|b| vec![0; b.bytes_each as usize * t as usize])
        .filter(|b| !b.is_empty())
        .collect()
}

fn check(what: &str, kernel: &Kernel, case: Case) {
    let Case { mut buffers, want, t, largest } = case;
    let out = buffers.len() - 1;
    buffers.extend(workspace(kernel, t));
    let got = run(kernel, &buffers, &[t]);
    // Weights are rounded to 8 bits, by up to half of the last one.
    let near = Near { relative: 0.0, absolute: largest / 250.0 };
    compare(what, MemTy::F32, &got.buffers[out], &want, near);
}

fn check_decode(call: &AttentionCall, tile: DecodeTile, sequences: &[Sequence], rng: &mut ChaCha8Rng) {
    let what = format!("{:?} {tile:?} {sequences:?}", call.spec);
    let kernel = decode::build("decode", call, tile).unwrap_or_else(|e| panic!("{what}: {e}"));
    check(&what, &kernel, case(call, sequences, rng));
}

fn check_prefill(call: &AttentionCall, tile: PrefillTile, sequences: &[Sequence], rng: &mut ChaCha8Rng) {
    let what = format!("{:?} {tile:?} {sequences:?}", call.spec);
    let kernel = prefill::build("prefill", call, tile).unwrap_or_else(|e| panic!("{what}: {e}"));
    check(&what, &kernel, case(call, sequences, rng));
}

/// The case with queries and results of the last `rows` tokens only.
fn wanted(call: &AttentionCall, case: Case, rows: u32) -> Case {
    let Case { mut buffers, mut want, t, largest } = case;
    let before = (t - rows) as usize;
    buffers[0].drain(..before * call.spec.q_stride as usize * 4);
    want.drain(..want.len() / t as usize * before);
    *buffers.last_mut().unwrap() = vec![0; want.len() * 4];
    Case { buffers, want, t, largest }
}

/// Attention of the last rows of a call, by all templates.
#[test]
fn wanted_rows_only() {
    let mut rng = ChaCha8Rng::seed_from_u64(70);
    for (ty, rows, window) in [(CacheTy::Bf16, 1, None), (CacheTy::I8, 3, None), (CacheTy::Bf16, 9, Some(30))]
    {
        let mut call = call(4, 2, 64, ty, true);
        (call.spec.rows, call.spec.window) = (Counted::R, window);
        let sequences = [(80, 5), (150, 4), (40, 7)];
        let decode = DecodeTile { unit: 64, warps: 2, stages: 2, splits: 2 };
        let prefill = PrefillTile { unit: 64, warps: 2, stages: 2 };
        let kernels = [
            decode::build("decode", &call, decode).unwrap(),
            prefill::build("prefill", &call, prefill).unwrap(),
        ];
        for kernel in kernels {
            let case = wanted(&call, case(&call, &sequences, &mut rng), rows);
            let out = case.buffers.len() - 1;
            let mut buffers = case.buffers;
            buffers.extend(workspace(&kernel, case.t));
            let got = run(&kernel, &buffers, &[case.t, rows]);
            let near = Near { relative: 0.0, absolute: case.largest / 250.0 };
            compare(&format!("{} {rows} rows", kernel.name), MemTy::F32, &got.buffers[out], &case.want, near);
        }
    }
}

/// More keys cost products and reads, and no conflicts of banks: those there are belong to the ends.
#[test]
fn nothing_waits_for_banks_on_the_way() {
    let mut rng = ChaCha8Rng::seed_from_u64(71);
    for ty in TYPES {
        let call = call(4, 2, 64, ty, false);
        let of_decode = DecodeTile { unit: unit(ty), warps: 1, stages: 2, splits: 1 };
        let of_prefill = PrefillTile { unit: unit(ty), warps: 1, stages: 2 };
        let mut kernels = vec![decode::build("decode", &call, of_decode).unwrap()];
        // Of many tokens scales lie in order: two lanes of a row wait for the others, and no registers are left to spread them.
        if !ty.is_scaled() {
            kernels.push(prefill::build("prefill", &call, of_prefill).unwrap());
        }
        for kernel in kernels {
            let conflicts = [128, 384].map(|keys| {
                let case = case(&call, &[(keys, 1)], &mut rng);
                run(&kernel, &case.buffers, &[1]).counts.bank_conflicts
            });
            assert_eq!(conflicts[0], conflicts[1], "{} {ty:?}", kernel.name);
        }
    }
}

/// Copies that go 16 bytes too far, or come from there: what is read is not what was meant, or was never there.
#[test]
fn copies_to_and_from_the_wrong_place() {
    fn shift(body: &mut [Stmt], at: &mut usize, source: bool) {
        for s in body {
            match s {
                Stmt::CpAsync { to, at: from, bytes: 16, .. } => {
                    *at = at.wrapping_sub(1);
                    if *at == usize::MAX {
                        let place = if source { from } else { to };
                        place.plus += 16;
                    }
                }
                Stmt::For { body, .. } => shift(body, at, source),
                Stmt::If(_, then, otherwise) => {
                    shift(then, at, source);
                    shift(otherwise, at, source);
                }
                _ => {}
            }
        }
    }
    let mut rng = ChaCha8Rng::seed_from_u64(72);
    let call = call(2, 1, 64, CacheTy::Bf16, false);
    let of_decode = DecodeTile { unit: 32, warps: 1, stages: 2, splits: 1 };
    let of_prefill = PrefillTile { unit: 32, warps: 1, stages: 2 };
    for kernel in [
        decode::build("decode", &call, of_decode).unwrap(),
        prefill::build("prefill", &call, of_prefill).unwrap(),
    ] {
        // More units than are under way, so that each copy of the loop runs.
        let case = case(&call, &[(190, 1)], &mut rng);
        let right = interp::run(&kernel, &case.buffers, &[1], Schedule::Turns).unwrap();
        let all = count(&kernel.body, &|s| matches!(s, Stmt::CpAsync { bytes: 16, .. }));
        for (at, source) in (0..all).step_by(3).flat_map(|at| [(at, false), (at, true)]) {
            let mut broken = kernel.clone();
            shift(&mut broken.body, &mut at.clone(), source);
            if let Ok(wrong) = interp::run(&broken, &case.buffers, &[1], Schedule::Turns) {
                let same = wrong.buffers.last().unwrap().data == right.buffers.last().unwrap().data;
                assert!(!same, "{}: copy {at}, {source}", kernel.name);
            }
        }
    }
}

/// Attention over a cache.
pub fn call(heads: u32, kv_heads: u32, head_dim: u32, ty: CacheTy, paged: bool) -> AttentionCall {
    let spec = AttentionSpec::cached(heads, kv_heads, head_dim, 0.5 / (head_dim as f32).sqrt(), ty, 64);
    AttentionCall::plain(spec, paged)
}

fn unit(ty: CacheTy) -> u32 {
    if ty.is_scaled() { 64 } else { 32 }
}

#[test]
fn single_tokens_over_all_caches() {
    let mut rng = ChaCha8Rng::seed_from_u64(61);
    for (i, ty) in TYPES.into_iter().enumerate() {
        for (heads, kv_heads, d) in [(4, 2, 64), (3, 3, 24), (16, 1, 128), (5, 1, 80), (12, 1, 256)] {
            let tile = DecodeTile { unit: unit(ty), warps: 2, stages: 2 + i as u32 % 2, splits: 1 };
            check_decode(&call(heads, kv_heads, d, ty, d == 64), tile, &[(1, 1), (135, 1)], &mut rng);
        }
    }
}

#[test]
fn keys_are_split_among_blocks() {
    let mut rng = ChaCha8Rng::seed_from_u64(62);
    for ty in TYPES {
        for (splits, warps) in [(3, 1), (2, 4), (7, 2)] {
            let tile = DecodeTile { unit: 64, warps, stages: 3, splits };
            let sequences = [(3, 1), (700, 1), (65, 1)];
            check_decode(&call(4, 2, 64, ty, true), tile, &sequences, &mut rng);
        }
    }
}

/// Windows, softcaps, given scales, wide rows of queries; of single tokens and of many.
#[test]
fn everything_a_spec_may_ask() {
    let mut rng = ChaCha8Rng::seed_from_u64(63);
    for ty in TYPES {
        let mut call = call(4, 2, 64, ty, false);
        call.spec.window = Some(70);
        call.spec.softcap = Some(F32::new(3.0));
        call.spec.q_stride += 6;
        call.spec.source = KvSource::Cache { ty, slot_rows: 64, fixed_scales: true };
        let tile = DecodeTile { unit: 64, warps: 2, stages: 2, splits: 2 };
        check_decode(&call, tile, &[(300, 1), (40, 1), (70, 2)], &mut rng);
        let tile = PrefillTile { unit: 64, warps: 2, stages: 2 };
        check_prefill(&call, tile, &[(300, 9), (40, 40), (75, 3)], &mut rng);
    }
}

#[test]
fn many_tokens_over_all_caches() {
    let mut rng = ChaCha8Rng::seed_from_u64(64);
    for (i, ty) in TYPES.into_iter().enumerate() {
        for (heads, kv_heads, d) in [(4, 2, 64), (3, 1, 24), (2, 2, 128), (20, 1, 80), (4, 1, 256)] {
            let tile = PrefillTile { unit: unit(ty), warps: 2, stages: 2 + i as u32 % 2 };
            let sequences = [(41, 41), (70, 1), (130, 7), (64, 1)];
            check_prefill(&call(heads, kv_heads, d, ty, d == 64), tile, &sequences, &mut rng);
        }
    }
}

#[test]
fn rows_of_the_call() {
    let mut rng = ChaCha8Rng::seed_from_u64(65);
    for (heads, kv_heads, d, causal, window) in
        [(2, 1, 64, true, None), (2, 2, 24, false, None), (3, 3, 40, true, Some(9)), (4, 1, 128, false, None)]
    {
        let mut spec = AttentionSpec::direct(heads, kv_heads, d, 0.1, causal);
        spec.window = window;
        spec.source = KvSource::Direct { stride: kv_heads * d + 5 };
        for t in [1, 37, 90] {
            let call = AttentionCall::plain(spec.clone(), false);
            check_prefill(&call, PrefillTile { unit: 32, warps: 2, stages: 1 }, &[(t, t)], &mut rng);
        }
    }
}

/// The same token gives the same bits, alone and among others.
#[test]
fn tokens_do_not_depend_on_others() {
    let mut rng = ChaCha8Rng::seed_from_u64(66);
    let call = call(4, 2, 64, CacheTy::I8, false);
    let kernel = prefill::build("prefill", &call, PrefillTile { unit: 64, warps: 2, stages: 2 }).unwrap();
    let case = case(&call, &[(90, 20)], &mut rng);
    let all = run(&kernel, &case.buffers, &[20]);
    let cut = |buffer: usize, row: usize| case.buffers[buffer][19 * row..20 * row].to_vec();
    let mut one = case.buffers.clone();
    (one[0], one[3], one[4]) = (cut(0, 1024), cut(3, 4), cut(4, 4));
    let out = one.len() - 1;
    one[out] = vec![0; 1024];
    let alone = run(&kernel, &one, &[1]);
    assert_eq!(alone.buffers[out].data, all.buffers[out].data[19 * 1024..]);
}

#[test]
fn results_go_through_an_epilogue() {
    let mut rng = ChaCha8Rng::seed_from_u64(67);
    let mut e = EExpr::new();
    let v = e.acc();
    let gate = e.elem_input(MemTy::F32, 256);
    let v = e.mul(v, gate);
    e.store(v, MemTy::F32, 256);
    for splits in [1, 2] {
        let call = AttentionCall { epilogue: e.clone(), ..call(4, 2, 64, CacheTy::Bf16, false) };
        let mut case = case(&call, &[(50, 1), (9, 1)], &mut rng);
        let gates = numbers(512, 1.0, &mut rng);
        case.want.iter_mut().zip(&gates).for_each(|(w, g)| *w *= f64::from(*g));
        let out = case.buffers.len() - 1;
        case.buffers.insert(out, encode(MemTy::F32, &gates));
        let tile = DecodeTile { unit: 32, warps: 2, stages: 2, splits };
        check("epilogue", &decode::build("decode", &call, tile).unwrap(), case);
    }
}

#[test]
fn what_has_no_attention_is_named() {
    let refusal = |call: &AttentionCall| call.check().unwrap_err().to_string();
    assert!(refusal(&call(1, 1, 64, CacheTy::F32, false)).contains("a cache of f32"));
    assert!(refusal(&call(1, 1, 512, CacheTy::Bf16, false)).contains("heads of 512 columns"));
    let many = call(40, 1, 64, CacheTy::Bf16, false);
    let tile = DecodeTile { unit: 32, warps: 1, stages: 2, splits: 1 };
    assert!(decode::build("decode", &many, tile).unwrap_err().to_string().contains("40 heads for one"));
}

/// A small call that needs everything: splits, several warps, several units of each.
fn split() -> (Kernel, Vec<Vec<u8>>) {
    let mut rng = ChaCha8Rng::seed_from_u64(68);
    let call = call(2, 1, 16, CacheTy::I8, false);
    let tile = DecodeTile { unit: 64, warps: 2, stages: 2, splits: 2 };
    let kernel = decode::build("decode", &call, tile).unwrap();
    let mut buffers = case(&call, &[(600, 1)], &mut rng).buffers;
    buffers.extend(workspace(&kernel, 1));
    (kernel, buffers)
}

#[test]
fn single_tokens_without_a_wait_or_a_barrier() {
    let (kernel, buffers) = split();
    let why = ["a race", "nobody wrote", "under way", "never waited for", "written twice", "wrote it"];
    for is in [
        &(|s: &Stmt| *s == Stmt::Barrier) as &dyn Fn(&Stmt) -> bool,
        &|s| matches!(s, Stmt::CpWait(_)),
        &|s| *s == Stmt::SyncWarp,
    ] {
        crate::broken::each_is_needed(&kernel, &buffers, &[1], is, &why);
    }
}

/// Blocks that add up before all have arrived, or that count one too many.
#[test]
fn blocks_that_do_not_wait_for_each_other() {
    fn edit(body: &mut [Stmt], f: &dyn Fn(&mut Stmt)) {
        for s in body {
            f(s);
            if let Stmt::If(_, body, _) | Stmt::For { body, .. } = s {
                edit(body, f);
            }
        }
    }
    let (kernel, buffers) = split();
    interp::run(&kernel, &buffers, &[1], Schedule::Turns).unwrap();
    for (count, why) in [(1u32, "did not hand it on"), (3, "does not end as zeros")] {
        let mut broken = kernel.clone();
        edit(&mut broken.body, &|s| {
            if let Stmt::LastOf { count: c, .. } = s {
                *c = count.into();
            }
        });
        let fault = interp::run(&broken, &buffers, &[1], Schedule::Turns).unwrap_err();
        assert!(fault.what.contains(why) || fault.what.contains("nobody wrote"), "{fault}");
    }
}

#[test]
fn many_tokens_without_a_wait_or_a_barrier() {
    let mut rng = ChaCha8Rng::seed_from_u64(69);
    let call = call(2, 1, 16, CacheTy::E4m3, false);
    let kernel = prefill::build("prefill", &call, PrefillTile { unit: 64, warps: 2, stages: 3 }).unwrap();
    let buffers = case(&call, &[(500, 3), (300, 2)], &mut rng).buffers;
    let why = ["a race", "nobody wrote", "under way", "never waited for"];
    crate::broken::each_is_needed(&kernel, &buffers, &[5], |s| *s == Stmt::Barrier, &why);
    crate::broken::each_is_needed(&kernel, &buffers, &[5], |s| matches!(s, Stmt::CpWait(_)), &why);
}
