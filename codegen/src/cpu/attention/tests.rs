use quantc_runtime::object::Object;

use super::*;
use crate::cpu::cache::{BlockLayout, Role};
use crate::cpu::testing::{Buf, assert_close, build, call, random, rng};
use crate::eexpr::MemTy;
use crate::spec::Rows;
use crate::targets::with_stand_in;
use quantc_ir::formats::{self, Format};
use quantc_ir::target::TargetDesc;

/// One call: tokens with their positions and bases.
struct Call {
    positions: Vec<i32>,
    base: Vec<i32>,
}

impl Call {
    fn sequence(base: i32, positions: std::ops::Range<i32>) -> Call {
        Call { base: vec![base; positions.len()], positions: positions.collect() }
    }
}

/// The definition in f64: which keys row i sees is given as rows of k and v.
fn reference(
    spec: &AttentionSpec,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    stride: usize,
    sees: impl Fn(usize) -> Vec<usize>,
) -> Vec<f64> {
    let (d, group) = (spec.head_dim as usize, spec.group() as usize);
    let t = q.len() / spec.q_stride as usize;
    let mut out = Vec::new();
    for i in 0..t {
        let keys = sees(i);
        for h in 0..spec.heads as usize {
            let q = &q[i * spec.q_stride as usize + h * d..][..d];
            let at = |s: usize| s * stride + h / group * d;
            let scores: Vec<f64> = keys
                .iter()
                .map(|&s| {
                    let k = &k[at(s)..][..d];
                    let x: f64 = q.iter().zip(k).map(|(&a, &b)| a as f64 * b as f64).sum();
                    let x = x * spec.scale.get() as f64;
                    spec.softcap.map_or(x, |c| c.get() as f64 * (x / c.get() as f64).tanh())
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for c in 0..d {
                out.push(keys.iter().zip(&weights).map(|(&s, w)| w * v[at(s) + c] as f64).sum::<f64>() / sum);
            }
        }
    }
    out
}

fn sees(spec: &AttentionSpec, c: &Call, i: usize) -> Vec<usize> {
    let p = c.positions[i];
    let first = spec.window.map_or(0, |w| (p - w as i32 + 1).max(0));
    (first..=p).map(|s| (c.base[i] + s) as usize).collect()
}

/// A cache of keys or values with its scales, and what it stands for.
struct Stored {
    state: Buf,
    scales: Buf,
    /// `[row][head][column]`, as attention is to understand it.
    numbers: Vec<f32>,
}

/// Rows of a slot in these tests.
const SLOT_ROWS: u32 = 256;

fn format(ty: CacheTy) -> Option<&'static Format> {
    match ty {
        CacheTy::F32 | CacheTy::F16 | CacheTy::Bf16 => None,
        CacheTy::I8 => Some(&formats::INT8),
        CacheTy::E4m3 => Some(&formats::E4M3),
    }
}

/// Stores the rows `written` of `x`, `[row][head][column]`; all else is NaN.
fn store(
    spec: &AttentionSpec,
    role: Role,
    target: &TargetDesc,
    x: &[f32],
    written: impl Fn(usize) -> bool,
) -> Stored {
    let KvSource::Cache { ty, slot_rows, fixed_scales } = spec.source else { panic!("a cache") };
    let (heads, d, slot_rows) = (spec.kv_heads as usize, spec.head_dim as usize, slot_rows as usize);
    let layout = BlockLayout::new(ty, role, spec.head_dim, target);
    let rows = x.len() / (heads * d);
    let mut stored = Stored {
        state: Buf::poisoned(rows * heads * (layout.width * ty.bytes()) as usize),
        scales: Buf::poisoned(rows * heads * 4),
        numbers: vec![f32::NAN; x.len()],
    };
    for (i, x) in x.chunks(d).enumerate().filter(|(i, _)| written(i / heads)) {
        let (row, head) = (i / heads, i % heads);
        let (slot, position) = (row / slot_rows, row % slot_rows);
        let line = (slot * heads + head) * slot_rows + position;
        let (block, token) = (line - position % BLOCK as usize, (position % BLOCK as usize) as u32);
        let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
        // Fixed ones are so small that some numbers saturate.
        let largest = if fixed_scales { 0.7 + 0.1 * head as f32 } else { largest };
        let scale = ty.largest_code().map_or(1.0, |top| if largest == 0.0 { 1.0 } else { largest / top });
        let scale_at = if fixed_scales { head } else { line };
        stored.scales.write(scale_at * 4, &scale.to_le_bytes());
        for (column, &x) in x.iter().enumerate() {
            let (bytes, number) = match (ty, format(ty)) {
                (_, Some(format)) => {
                    let code = quantc_ir::quant::quantize_one(x, scale, 0, format);
                    let number = quantc_ir::quant::dequantize_one(code, scale, 0, format);
                    let unsigned = layout.quads && role == Role::Keys;
                    (vec![if unsigned { code as u8 ^ 0x80 } else { code as u8 }], number)
                }
                (CacheTy::F16, _) => {
                    let x = half::f16::from_f32(x);
                    (x.to_le_bytes().to_vec(), x.to_f32())
                }
                (CacheTy::Bf16, _) => {
                    let x = half::bf16::from_f32(x);
                    (x.to_le_bytes().to_vec(), x.to_f32())
                }
                _ => (x.to_le_bytes().to_vec(), x),
            };
            let at = block * (layout.width * ty.bytes()) as usize + layout.at(token, column as u32) as usize;
            stored.state.write(at, &bytes);
            stored.numbers[i * d + column] = number;
        }
    }
    stored
}

fn run_cached(
    object: &Object,
    spec: &AttentionSpec,
    c: &Call,
    q: &[f32],
    k: &mut Stored,
    v: &mut Stored,
) -> Vec<f32> {
    let t = c.positions.len();
    let r = q.len() / spec.q_stride as usize;
    let mut q = Buf::of(q, MemTy::F32);
    let (mut positions, mut base) = (Buf::ints(&c.positions), Buf::ints(&c.base));
    let mut out = Buf::poisoned(r * (spec.heads * spec.head_dim) as usize * 4);
    let mut scratch = Buf::poisoned(spec.scratch_bytes() as usize);
    let items = spec.items(r as u64) as i64;
    let KvSource::Cache { ty, .. } = spec.source else { panic!("a cache") };
    let mut args = vec![&mut q, &mut k.state, &mut v.state, &mut positions, &mut base];
    if ty.is_scaled() {
        args.extend([&mut k.scales, &mut v.scales]);
    }
    args.extend([&mut out, &mut scratch]);
    for range in [0..items / 2, items / 2..items] {
        call(object, "k", &mut args, [t as i64, r as i64], range);
    }
    scratch.bytes();
    out.read(MemTy::F32)
}

/// Weights are within 4 units in the last place of f32 plus what the error of products makes of them: sums of d <= 128
/// products of numbers up to 1, scaled, err by 1e-6, and the weighted mean of values up to 1 inherits that.
const ABS: f64 = 4e-6;

/// Queries and weights that are multiplied as integers of 16 bits err by 2^-16 of their largest.
const ABS_BYTES: f64 = 3e-5;

fn limit(spec: &AttentionSpec, target: &TargetDesc) -> f64 {
    let KvSource::Cache { ty, .. } = spec.source else { return ABS };
    if !BlockLayout::new(ty, Role::Keys, spec.head_dim, target).quads {
        return ABS;
    }
    // Larger products err by more in the exponent.
    ABS_BYTES * f64::from(spec.scale.get() * 2.0).max(1.0)
}

/// What a cache holds when nothing but what `c` demands was ever written.
fn caches(spec: &AttentionSpec, target: &TargetDesc, c: &Call, seed: u64) -> (Stored, Stored) {
    let rows = 3 * SLOT_ROWS as usize;
    let len = rows * (spec.kv_heads * spec.head_dim) as usize;
    let mut rng = rng(seed);
    let written =
        |row: usize| c.positions.iter().zip(&c.base).any(|(&p, &b)| (b..=b + p).contains(&(row as i32)));
    let (k, v) = (random(&mut rng, len, 1.0), random(&mut rng, len, 1.0));
    (store(spec, Role::Keys, target, &k, written), store(spec, Role::Values, target, &v, written))
}

fn cached_case(spec: &AttentionSpec, calls: &[Call], seed: u64) {
    let width = (spec.kv_heads * spec.head_dim) as usize;
    for target in with_stand_in() {
        let object = build(target, |unit| emit(unit, spec, "k"));
        for (i, c) in calls.iter().enumerate() {
            let t = c.positions.len();
            let q = random(&mut rng(seed + 100), t * spec.q_stride as usize, 1.0);
            let (mut k, mut v) = caches(spec, target, c, seed + i as u64);
            let got = run_cached(&object, spec, c, &q, &mut k, &mut v);
            let want = reference(spec, &q, &k.numbers, &v.numbers, width, |i| sees(spec, c, i));
            assert_close(&got, &want, limit(spec, target), 0.0, &format!("{} {spec:?} t {t}", target.name));
        }
    }
}

fn cached(heads: u32, kv_heads: u32, head_dim: u32, scale: f32, ty: CacheTy) -> AttentionSpec {
    AttentionSpec::cached(heads, kv_heads, head_dim, scale, ty, SLOT_ROWS)
}

const TYPES: [CacheTy; 5] = [CacheTy::F32, CacheTy::F16, CacheTy::Bf16, CacheTy::I8, CacheTy::E4m3];

fn calls() -> Vec<Call> {
    vec![
        Call::sequence(0, 0..1),
        Call::sequence(0, 0..5),
        Call::sequence(256, 70..103),
        Call::sequence(0, 199..200),
        Call::sequence(512, 0..150),
        // The last place of a slot.
        Call::sequence(256, 250..256),
        // A batch: single tokens of three sequences, and chunks of two.
        Call { positions: vec![5, 90, 64], base: vec![0, 256, 512] },
        Call { positions: vec![7, 8, 9, 0, 1, 2, 3], base: vec![0, 0, 0, 256, 256, 256, 256] },
    ]
}

#[test]
fn all_head_widths() {
    for d in [1, 3, 8, 16, 20, 32, 48, 64, 80, 128] {
        let scale = 1.0 / (d as f32).sqrt();
        for ty in [CacheTy::F32, CacheTy::I8] {
            cached_case(&cached(2, 1, d, scale, ty), &calls()[1..4], u64::from(d));
        }
    }
}

#[test]
fn head_groups_types_and_batches() {
    for ty in TYPES {
        for (heads, kv_heads, d) in [(1, 1, 16), (3, 3, 20), (3, 1, 16), (16, 2, 16), (8, 2, 64)] {
            cached_case(&cached(heads, kv_heads, d, 0.2, ty), &calls(), 1);
        }
    }
    for ty in [CacheTy::F32, CacheTy::I8] {
        for heads in [1, 2, 6, 64, 65] {
            cached_case(&cached(heads, 1, 16, 0.25, ty), &calls(), 2);
        }
    }
}

#[test]
fn the_last_rows_alone_have_the_same_bits() {
    for ty in TYPES {
        let all = cached(6, 2, 20, 0.3, ty);
        let last = AttentionSpec { rows: Rows::R, ..all.clone() };
        for target in with_stand_in() {
            let [of_all, of_last] = [&all, &last].map(|spec| build(target, |unit| emit(unit, spec, "k")));
            for c in calls() {
                let t = c.positions.len();
                let q = random(&mut rng(7), t * all.q_stride as usize, 1.0);
                let (mut k, mut v) = caches(&all, target, &c, 3);
                let want = run_cached(&of_all, &all, &c, &q, &mut k, &mut v);
                for r in [0, 1, t / 2, t] {
                    let q = &q[(t - r) * all.q_stride as usize..];
                    let got = run_cached(&of_last, &last, &c, q, &mut k, &mut v);
                    assert_eq!(got, want[want.len() - got.len()..], "{} {ty:?} {r} of {t}", target.name);
                }
            }
        }
    }
}

#[test]
fn codes_with_one_scale_for_each_head() {
    for ty in [CacheTy::I8, CacheTy::E4m3] {
        for (heads, kv_heads, d) in [(3, 3, 20), (16, 2, 16), (8, 2, 64)] {
            let source = KvSource::Cache { ty, slot_rows: SLOT_ROWS, fixed_scales: true };
            cached_case(&AttentionSpec { source, ..cached(heads, kv_heads, d, 0.2, ty) }, &calls(), 1);
        }
    }
}

#[test]
fn windows_and_caps() {
    for ty in [CacheTy::F32, CacheTy::I8, CacheTy::E4m3] {
        for window in [1, 2, 17, 64, 65, 1000] {
            let spec = AttentionSpec { window: Some(window), ..cached(4, 2, 16, 0.25, ty) };
            cached_case(&spec, &calls(), 3);
        }
        let spec = AttentionSpec { softcap: Some(F32::new(1.5)), ..cached(4, 2, 16, 2.0, ty) };
        cached_case(&spec, &calls(), 4);
    }
}

#[test]
fn chunks_and_single_tokens_give_the_bits_of_one_prefill() {
    for (target, ty) in with_stand_in().flat_map(|t| TYPES.map(|ty| (t, ty))) {
        for window in [None, Some(30)] {
            let spec = AttentionSpec { window, ..cached(6, 2, 20, 0.3, ty) };
            let object = build(target, |unit| emit(unit, &spec, "k"));
            let t = 140;
            let q = random(&mut rng(5), t * 120, 2.0);
            let all = Call::sequence(0, 0..t as i32);
            let (mut k, mut v) = caches(&spec, target, &all, 5);
            let whole = run_cached(&object, &spec, &all, &q, &mut k, &mut v);
            for chunk in [1, 7, 33] {
                let mut parts = Vec::new();
                for start in (0..t).step_by(chunk) {
                    let end = (start + chunk).min(t);
                    let c = Call::sequence(0, start as i32..end as i32);
                    let q = &q[start * 120..end * 120];
                    parts.extend(run_cached(&object, &spec, &c, q, &mut k, &mut v));
                }
                assert!(whole == parts, "{} {ty:?} chunks of {chunk}", target.name);
            }
        }
    }
}

#[test]
fn rows_of_the_call() {
    for target in with_stand_in() {
        for (d, causal, window) in
            [(16, false, None), (20, true, None), (64, false, None), (8, true, Some(9))]
        {
            // q, k and v side by side in one buffer.
            let stride = (4 + 2 + 2) * d;
            let spec = AttentionSpec {
                window,
                source: KvSource::Direct { stride },
                q_stride: stride,
                ..AttentionSpec::direct(4, 2, d, 0.3, causal)
            };
            let object = build(target, |unit| emit(unit, &spec, "k"));
            for t in [1usize, 2, 5, 33, 130] {
                let x = random(&mut rng(t as u64), t * stride as usize, 1.0);
                let (k_at, v_at) = (4 * d as usize, 6 * d as usize);
                let mut buf = Buf::of(&x, MemTy::F32);
                let mut out = Buf::poisoned(t * 4 * d as usize * 4);
                let mut scratch = Buf::poisoned(spec.scratch_bytes() as usize);
                let q = buf.ptr();
                let args = [q, q.wrapping_add(k_at * 4), q.wrapping_add(v_at * 4), out.ptr(), scratch.ptr()];
                let kernel = object.symbol("k").expect("the object has the kernel");
                // SAFETY: the three parts lie in one buffer of t rows, out and scratch are as large as stated.
                unsafe {
                    kernel(args.as_ptr(), [t as i64, 1].as_ptr(), 0, spec.items(t as u64) as i64);
                }
                scratch.bytes();
                assert_eq!(buf.read(MemTy::F32), x);
                let want = reference(&spec, &x, &x[k_at..], &x[v_at..], stride as usize, |i| {
                    let last = if causal { i } else { t - 1 };
                    let first = window.map_or(0, |w| (i + 1).saturating_sub(w as usize));
                    (first..=last).collect()
                });
                assert_close(&out.read(MemTy::F32), &want, ABS, 0.0, &format!("{} d {d} t {t}", target.name));
            }
        }
    }
}

#[test]
fn large_products_do_not_overflow() {
    // Products of a thousand: the weights are all or nothing, and nothing is NaN.
    for (target, ty) in with_stand_in().flat_map(|t| [CacheTy::F32, CacheTy::I8].map(|ty| (t, ty))) {
        let spec = cached(2, 1, 32, 360.0, ty);
        let object = build(target, |unit| emit(unit, &spec, "k"));
        let q = random(&mut rng(6), 40 * 64, 3.0);
        let c = Call::sequence(0, 0..40);
        let (mut k, mut v) = caches(&spec, target, &c, 6);
        let got = run_cached(&object, &spec, &c, &q, &mut k, &mut v);
        // A product of size 4000 errs by up to 2e-3 in f32 and by 0.1 with queries of 16 bits; weights err by that much.
        let limit = if limit(&spec, target) == ABS { 1e-2 } else { 0.2 };
        let want = reference(&spec, &q, &k.numbers, &v.numbers, 32, |i| sees(&spec, &c, i));
        assert_close(&got, &want, limit, 0.0, target.name);
    }
}

#[test]
fn queries_and_values_of_zeros() {
    for (target, ty) in with_stand_in().flat_map(|t| TYPES.map(|ty| (t, ty))) {
        let spec = cached(2, 1, 16, 0.25, ty);
        let object = build(target, |unit| emit(unit, &spec, "k"));
        let c = Call::sequence(0, 60..70);
        let zeros = vec![0.0; SLOT_ROWS as usize * 16];
        let x = random(&mut rng(1), zeros.len(), 1.0);
        for (x, q) in [(&x, 0.0), (&zeros, 1.0)] {
            let mut k = store(&spec, Role::Keys, target, x, |_| true);
            let mut v = store(&spec, Role::Values, target, x, |_| true);
            let q = vec![q; 10 * 32];
            let got = run_cached(&object, &spec, &c, &q, &mut k, &mut v);
            let want = reference(&spec, &q, &k.numbers, &v.numbers, 16, |i| sees(&spec, &c, i));
            assert_close(&got, &want, limit(&spec, target), 0.0, target.name);
        }
    }
}

#[test]
fn malformed_specs_are_refused() {
    let good = cached(4, 2, 16, 0.25, CacheTy::F16);
    assert_eq!(good.check(), Ok(()));
    let cache = |ty, slot_rows| KvSource::Cache { ty, slot_rows, fixed_scales: false };
    for bad in [
        AttentionSpec { kv_heads: 3, ..good.clone() },
        AttentionSpec { kv_heads: 0, ..good.clone() },
        AttentionSpec { head_dim: 0, ..good.clone() },
        AttentionSpec { q_stride: 63, ..good.clone() },
        AttentionSpec { window: Some(0), ..good.clone() },
        AttentionSpec { causal: false, ..good.clone() },
        AttentionSpec { source: cache(CacheTy::F32, 0), ..good.clone() },
        AttentionSpec { source: cache(CacheTy::F32, 100), ..good.clone() },
        AttentionSpec { source: cache(CacheTy::I8, 64), head_dim: 513, q_stride: 9999, ..good.clone() },
        AttentionSpec { source: KvSource::Direct { stride: 31 }, ..good.clone() },
        AttentionSpec { source: KvSource::Direct { stride: 32 }, rows: Rows::R, ..good.clone() },
    ] {
        assert!(bad.check().is_err(), "{bad:?}");
    }
}
