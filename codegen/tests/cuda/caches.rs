//! Rows into caches, to the bit, against codes by the definition of their formats and places by the layout.

use crate::support::{encode, run};
use half::bf16;
use quantc_codegen::cpu::cache::{CacheAppendSpec, CacheTy, Role};
use quantc_codegen::cpu::rope::{RopeSpec, RopeStyle};
use quantc_codegen::cuda::cache::{AppendSpec, CacheLayout, PAGE, Rotation, build_append};
use quantc_codegen::cuda::rope;
use quantc_codegen::eexpr::MemTy;
use quantc_ir::formats;
use quantc_ir::quant::quantize_one;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The types that caches on GPUs have.
pub const TYPES: [CacheTy; 3] = [CacheTy::Bf16, CacheTy::I8, CacheTy::E4m3];

/// The code of a number and its scale.
pub fn code(ty: CacheTy, x: f32, scale: f32) -> Vec<u8> {
    match ty {
        CacheTy::I8 => vec![quantize_one(x, scale, 0, &formats::INT8) as u8],
        CacheTy::E4m3 => vec![quantize_one(x, scale, 0, &formats::E4M3) as u8],
        _ => bf16::from_f32(x).to_le_bytes().to_vec(),
    }
}

/// The scale of a row by its largest magnitude.
pub fn scale_of(ty: CacheTy, x: &[f32]) -> f32 {
    let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
    match ty.largest_code() {
        Some(top) if largest > 0.0 => largest / top,
        _ => 1.0,
    }
}

fn ints(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Puts rows into a cache and compares every byte of it.
fn check(spec: &AppendSpec, rng: &mut ChaCha8Rng) {
    let CacheAppendSpec { heads, head_dim, x_stride, ty, role, fixed_scales, .. } = spec.rows;
    let what = format!("{spec:?}");
    let kernel = build_append("append", spec).unwrap_or_else(|e| panic!("{what}: {e}"));
    let layout = CacheLayout::new(ty, role, heads, head_dim).unwrap();
    // Tokens of sequences that begin at rows 0 and 128, in two pages each.
    let (positions, base) = ([2, 3, 0, 127, 64, 63], [0, 0, 128, 128, 0, 128]);
    let t = positions.len();
    let mut x: Vec<f32> = (0..t * x_stride as usize).map(|_| rng.random_range(-5f32..5.0)).collect();
    x[..head_dim as usize].fill(0.0);
    let mut buffers = vec![encode(MemTy::F32, &x)];
    if let Some(Rotation { rotary_dim, style }) = spec.rotation {
        let table: Vec<f32> = (0..t * rotary_dim as usize).map(|_| rng.random_range(-1f32..1.0)).collect();
        buffers.push(encode(MemTy::F32, &table));
        // What the rotation by itself makes of the rows.
        let apart =
            RopeSpec { rotary_dim, x_stride, out_stride: x_stride, ..RopeSpec::new(heads, head_dim, style) };
        let rotate = rope::build("rope", &apart).unwrap();
        let rotated =
            run(&rotate, &[buffers[0].clone(), buffers[1].clone(), vec![0; x.len() * 4]], &[t as u32]);
        for (x, word) in x.iter_mut().zip(rotated.buffers[2].data.chunks_exact(4)) {
            *x = f32::from_le_bytes(word.try_into().unwrap());
        }
    }
    buffers.extend([ints(&positions), ints(&base)]);
    let table = [3, 0, 2, 1];
    if spec.paged {
        buffers.push(ints(&table));
    }
    let given: Vec<f32> = (0..heads).map(|h| (1.0 + h as f32) * 0.01).collect();
    if ty.is_scaled() && fixed_scales {
        buffers.push(encode(MemTy::F32, &given));
    }
    let state = buffers.len();
    buffers.push(vec![0; 4 * layout.page_bytes() as usize]);
    let dynamic = ty.is_scaled() && !fixed_scales;
    if dynamic {
        buffers.push(vec![0; 4 * layout.scale_page_bytes() as usize]);
    }
    let mut want = vec![None; buffers[state].len()];
    let mut want_scales = vec![None; (4 * heads * PAGE) as usize];
    for (i, (&p, &base)) in positions.iter().zip(&base).enumerate() {
        let row = base + p;
        let page = if spec.paged { table[(row / PAGE) as usize] } else { row / PAGE };
        for h in 0..heads {
            let x = &x[i * x_stride as usize + (h * head_dim) as usize..][..head_dim as usize];
            let scale = if fixed_scales { given[h as usize] } else { scale_of(ty, x) };
            want_scales[((page * heads + h) * PAGE + row % PAGE) as usize] = Some(scale);
            let head = page * layout.page_bytes() + h * layout.head_bytes();
            for c in 0..layout.width() {
                let value = x.get(c as usize).copied().unwrap_or(0.0);
                let at = (head + layout.at(row % PAGE, c)) as usize;
                for (to, byte) in want[at..].iter_mut().zip(code(ty, value, scale)) {
                    *to = Some(byte);
                }
            }
        }
    }
    let got = run(&kernel, &buffers, &[t as u32]);
    for (i, want) in want.iter().enumerate() {
        let byte = got.buffers[state].written[i].then(|| got.buffers[state].data[i]);
        assert_eq!(byte, *want, "{what}: byte {i}");
    }
    if dynamic {
        let scales = &got.buffers[state + 1];
        for (i, want) in want_scales.iter().enumerate() {
            let word = &scales.data[i * 4..][..4];
            let scale = scales.written[i * 4].then(|| f32::from_le_bytes(word.try_into().unwrap()));
            assert_eq!(scale, *want, "{what}: scale {i}");
        }
    }
}

fn append(heads: u32, head_dim: u32, ty: CacheTy, role: Role) -> AppendSpec {
    let rows = CacheAppendSpec {
        heads,
        head_dim,
        x_stride: heads * head_dim + 7,
        ty,
        role,
        fixed_scales: false,
        slot_rows: 128,
    };
    AppendSpec { rows, rotation: None, paged: false }
}

#[test]
fn rows_into_pages() {
    let mut rng = ChaCha8Rng::seed_from_u64(41);
    for ty in TYPES {
        for role in [Role::Keys, Role::Values] {
            for (heads, head_dim) in [(1, 8), (3, 64), (2, 80), (1, 128), (1, 256)] {
                let mut spec = append(heads, head_dim, ty, role);
                check(&spec, &mut rng);
                spec.paged = true;
                spec.rows.fixed_scales = true;
                check(&spec, &mut rng);
            }
        }
    }
}

#[test]
fn rows_rotated_on_the_way() {
    let mut rng = ChaCha8Rng::seed_from_u64(42);
    for style in [RopeStyle::Half, RopeStyle::Interleaved] {
        for (head_dim, rotary_dim) in [(64, 64), (128, 128), (64, 16), (80, 20), (16, 6)] {
            for ty in TYPES {
                let rotation = Some(Rotation { rotary_dim, style });
                check(&AppendSpec { rotation, ..append(2, head_dim, ty, Role::Keys) }, &mut rng);
            }
        }
    }
}

#[test]
fn what_has_no_cache_is_named() {
    let refusal = |ty, d| CacheLayout::new(ty, Role::Keys, 1, d).unwrap_err().to_string();
    assert!(refusal(CacheTy::F16, 64).contains("a cache of f16"));
    assert!(refusal(CacheTy::Bf16, 60).contains("heads of 60 columns"));
}

/// Two tokens in the same place, and one beyond the state.
#[test]
fn a_row_too_many_is_found_out() {
    let spec = append(1, 64, CacheTy::I8, Role::Keys);
    let kernel = build_append("append", &spec).unwrap();
    let layout = CacheLayout::new(CacheTy::I8, Role::Keys, 1, 64).unwrap();
    let fault = |positions: [u32; 2]| {
        let buffers = [
            vec![0; 2 * 71 * 4],
            ints(&positions),
            ints(&[0, 0]),
            vec![0; layout.page_bytes() as usize],
            vec![0; layout.scale_page_bytes() as usize],
        ];
        let run = quantc_codegen::cuda::interp::run;
        run(&kernel, &buffers, &[2], quantc_codegen::cuda::interp::Schedule::Turns).unwrap_err().what
    };
    assert!(fault([5, 5]).contains("written twice"));
    assert!(fault([5, 64]).contains("it has"));
}
