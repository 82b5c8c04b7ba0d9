//! Rows of tables for tokens, and tokens for rows of logits.

use crate::support::{Near, compare, decode, encode, numbers, run};
use quantc_codegen::cpu::gather::GatherSpec;
use quantc_codegen::cuda::gather;
use quantc_codegen::cuda::sample::{self, RowOptions, SampleSpec};
use quantc_codegen::eexpr::MemTy;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[test]
fn rows_of_tables() {
    let mut rng = ChaCha8Rng::seed_from_u64(51);
    for width in [1, 3, 48, 130, 256] {
        for ty in [MemTy::F32, MemTy::F16, MemTy::Bf16, MemTy::I8] {
            for add in [false, true] {
                let spec = GatherSpec { width, table_rows: 11, ty, add };
                let kernel = gather::build("gather", &spec).unwrap();
                // The last two are outside, and give the first and the last row.
                let index = [3i32, 0, 10, 3, -5, 4000];
                let (table, values) = numbers(ty, 11 * width as usize, &mut rng);
                let (scale_bytes, scales) = numbers(MemTy::F32, 11, &mut rng);
                let (before_bytes, before) = numbers(MemTy::F32, 6 * width as usize, &mut rng);
                let mut buffers = vec![index.iter().flat_map(|i| i.to_le_bytes()).collect(), table];
                if ty == MemTy::I8 {
                    buffers.push(scale_bytes);
                }
                buffers.push(before_bytes);
                let mut want = vec![];
                for (i, row) in [3, 0, 10, 3, 0, 10].into_iter().enumerate() {
                    want.extend((0..width as usize).map(|c| {
                        let x = values[row * width as usize + c];
                        let x = if ty == MemTy::I8 { x * scales[row] } else { x };
                        f64::from(if add { before[i * width as usize + c] + x } else { x })
                    }));
                }
                let got = run(&kernel, &buffers, &[6]);
                let exact = Near { relative: 0.0, absolute: 0.0 };
                compare(&format!("{spec:?}"), MemTy::F32, got.buffers.last().unwrap(), &want, exact);
            }
        }
    }
}

/// The tokens of rows.
fn sample(spec: SampleSpec, logits: &[f32], options: &[RowOptions]) -> Vec<i32> {
    let kernel = sample::build("sample", &spec).unwrap();
    let bytes: Vec<u8> = options.iter().flat_map(|o| o.to_bytes()).collect();
    let r = options.len();
    let got = run(&kernel, &[encode(MemTy::F32, logits), bytes, vec![0; r * 4]], &[r as u32]);
    decode(MemTy::I32, &got.buffers[2].data).into_iter().map(|x| x as i32).collect()
}

const GREEDY: RowOptions = RowOptions { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };

#[test]
fn the_first_of_the_largest() {
    let mut rng = ChaCha8Rng::seed_from_u64(52);
    for vocab in [1u32, 33, 1000, 4099] {
        let spec = SampleSpec { vocab, stride: vocab + 5 };
        let mut logits = vec![f32::NAN; 3 * spec.stride as usize];
        for row in logits.chunks_mut(spec.stride as usize) {
            // Few values, so that some are equal, and some that are no numbers.
            row[..vocab as usize].fill_with(|| match rng.random_range(0..40) {
                0 => f32::NAN,
                n => n as f32 - 45.0,
            });
        }
        logits[2 * spec.stride as usize..].fill(f32::NAN);
        let want: Vec<i32> = logits
            .chunks(spec.stride as usize)
            .map(|row| {
                let row = &row[..vocab as usize];
                let top = row.iter().fold(f32::NEG_INFINITY, |top, &x| top.max(x));
                row.iter().position(|&x| x == top).map_or(-1, |i| i as i32)
            })
            .collect();
        assert_eq!(sample(spec, &logits, &[GREEDY; 3]), want, "{vocab} logits");
        // Nothing to draw where there is no number, or an infinite one.
        let drawn = RowOptions { temperature: 1.0, ..GREEDY };
        assert_eq!(sample(spec, &logits, &[drawn; 3])[2], -1);
        logits[0] = f32::INFINITY;
        assert_eq!(sample(spec, &logits, &[drawn; 3])[0], 0);
        logits[..vocab as usize].fill(f32::NEG_INFINITY);
        assert_eq!(sample(spec, &logits, &[GREEDY, drawn, drawn])[0], 0);
        assert_eq!(sample(spec, &logits, &[drawn; 3])[0], 0);
        // Zeros of either sign are equal.
        logits[..vocab as usize].fill(-0.0);
        logits[vocab as usize - 1] = 0.0;
        assert_eq!(sample(spec, &logits, &[GREEDY; 3])[0], 0);
    }
}

/// Which tokens may be drawn, by sorting.
fn allowed(logits: &[f32], o: RowOptions) -> Vec<bool> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let kept = if o.top_k == 0 { order.len() } else { order.len().min(o.top_k as usize) };
    let weight = |i: usize| (f64::from(logits[i]) / f64::from(o.temperature)).exp();
    let bound = logits[order[kept - 1]];
    let left: Vec<usize> = order.into_iter().filter(|&i| logits[i] >= bound).collect();
    let all: f64 = left.iter().map(|&i| weight(i)).sum();
    let (mut sum, mut last) = (0.0, bound);
    for &i in &left {
        sum += weight(i);
        if sum >= all * f64::from(o.top_p) {
            last = logits[i];
            break;
        }
    }
    logits.iter().map(|&x| x >= if o.top_p < 1.0 { last } else { bound }).collect()
}

#[test]
fn tokens_are_drawn_by_their_probabilities() {
    let mut rng = ChaCha8Rng::seed_from_u64(53);
    let vocab = 600usize;
    let spec = SampleSpec { vocab: vocab as u32, stride: vocab as u32 };
    let row: Vec<f32> = (0..vocab).map(|_| rng.random_range(-9f32..3.0)).collect();
    for (top_k, top_p, temperature) in
        [(0, 1.0, 0.8), (5, 1.0, 1.5), (0, 0.4, 0.7), (40, 0.9, 1.0), (1, 1.0, 2.0)]
    {
        let rows = 20u32;
        let options: Vec<RowOptions> =
            (0..rows).map(|i| RowOptions { temperature, top_k, top_p, seed: i * 7 + 1 }).collect();
        let logits = row.repeat(rows as usize);
        let tokens = sample(spec, &logits, &options);
        let allowed = allowed(&row, options[0]);
        assert!(tokens.iter().all(|&t| allowed[t as usize]), "top k {top_k}, top p {top_p}: {tokens:?}");
        // The sum over draws of what each was expected to be less likely than: uniform, so near a half.
        let weight =
            |i: usize| if allowed[i] { (f64::from(row[i]) / f64::from(temperature)).exp() } else { 0.0 };
        let all: f64 = (0..vocab).map(weight).sum();
        let below = |t: usize| ((0..t).map(weight).sum::<f64>() + weight(t) / 2.0) / all;
        let mean = tokens.iter().map(|&t| below(t as usize)).sum::<f64>() / f64::from(rows);
        assert!((mean - 0.5).abs() < 4.0 / (12.0 * f64::from(rows)).sqrt(), "{mean}");
        let distinct: std::collections::BTreeSet<_> = tokens.iter().collect();
        assert_eq!(distinct.len() > 1, top_k != 1, "top k {top_k}, top p {top_p}");
        // The same seeds give the same tokens, whatever rows are beside.
        assert_eq!(sample(spec, &row, &options[9..10]), tokens[9..10]);
    }
}
