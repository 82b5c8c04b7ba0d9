//! Checked against the algorithm as the paper states it, in `f64`, with an explicit inverse.

use super::factor::{cholesky, positions};
use super::*;
use quantc_ir::quant::{
    Options, ScaleRule, Span, dequantize_block, dequantize_one, quantize_one, quantize_rows, scale_for,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[derive(Clone, Copy, Debug)]
enum Inputs {
    Many,
    /// Fewer tokens than channels, channels that occur twice, channels that are always 0.
    Deficient,
    /// Channels of sizes from 1e-4 to 1e4.
    Uneven,
}

struct Case {
    w: Vec<f32>,
    n: usize,
    k: usize,
    h: Hessian,
}

fn case(seed: u64, n: usize, k: usize, inputs: Inputs) -> Case {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let w = (0..n * k).map(|_| rng.random_range(-1.0..1.0f32) * rng.random_range(0.1..1.0f32)).collect();
    let tokens = if matches!(inputs, Inputs::Deficient) { k / 3 + 1 } else { 4 * k };
    let sizes: Vec<f32> = (0..k)
        .map(|_| match inputs {
            Inputs::Uneven => 10f32.powf(rng.random_range(-4.0..4.0)),
            _ => rng.random_range(0.3..3.0),
        })
        .collect();
    let mut h = Hessian::new(k).unwrap();
    for _ in 0..tokens {
        let common = rng.random_range(-1.0..1.0f32);
        let mut x: Vec<f32> = sizes.iter().map(|s| s * (common + rng.random_range(-1.0..1.0f32))).collect();
        if matches!(inputs, Inputs::Deficient) {
            for j in 0..k {
                match j % 8 {
                    3 => x[j] = x[j - 1],
                    5 => x[j] = 0.0,
                    _ => {}
                }
            }
        }
        h.add(&x).unwrap();
    }
    Case { w, n, k, h }
}

fn scheme(text: &str) -> Scheme {
    Scheme::parse(text).unwrap()
}

fn groups(scheme: &Scheme, n: usize, k: usize) -> Groups {
    Groups::new(scheme, &Shape::fixed(&[n as u64, k as u64])).unwrap()
}

/// `d H d^T` of each row by the definition.
fn errors_of(case: &Case, quantized: &[f32]) -> Vec<f64> {
    let k = case.k;
    let row = |(w, q): (&[f32], &[f32])| {
        let d: Vec<f64> = w.iter().zip(q).map(|(&w, &q)| f64::from(q) - f64::from(w)).collect();
        let mut sum = 0.0;
        for i in 0..k {
            for j in 0..k {
                sum += d[i] * f64::from(case.h.get(i, j)) * d[j];
            }
        }
        sum
    };
    case.w.chunks(k).zip(quantized.chunks(k)).map(row).collect()
}

fn numbers(case: &Case, scheme: &Scheme, params: &Params, codes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; codes.len()];
    dequantize_block(&groups(scheme, case.n, case.k), scheme, params, 0, codes, &mut out).unwrap();
    out
}

/// The inverse, by Gauss and Jordan with pivoting.
fn inverse(a: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let k = a.len();
    let mut m: Vec<Vec<f64>> = a
        .iter()
        .enumerate()
        .map(|(i, row)| row.iter().copied().chain((0..k).map(|j| f64::from(u8::from(i == j)))).collect())
        .collect();
    for i in 0..k {
        let pivot = (i..k).max_by(|&a, &b| m[a][i].abs().total_cmp(&m[b][i].abs())).unwrap();
        m.swap(i, pivot);
        let factor = 1.0 / m[i][i];
        m[i].iter_mut().for_each(|x| *x *= factor);
        let row = m[i].clone();
        for (_, other) in m.iter_mut().enumerate().filter(|(j, _)| *j != i) {
            let factor = other[i];
            other.iter_mut().zip(&row).for_each(|(x, y)| *x -= factor * y);
        }
    }
    m.into_iter().map(|row| row[k..].to_vec()).collect()
}

/// Algorithm 1 of the paper, a column at a time: `H^-1 = U^T U`; the error of column `j`, `(w - q) / U[j, j]`, is taken
/// off all columns `i > j` times `U[j, i]`.
fn textbook(case: &Case, scheme: &Scheme, params: &Params, act_order: bool, damp: f64) -> Vec<f32> {
    let (n, k) = (case.n, case.k);
    let mut order: Vec<usize> = (0..k).collect();
    if act_order {
        order.sort_by(|&a, &b| case.h.get(b, b).total_cmp(&case.h.get(a, a)));
    }
    let mean = (0..k).map(|i| f64::from(case.h.get(i, i))).sum::<f64>() / k as f64;
    let damped: Vec<Vec<f64>> = (0..k)
        .map(|i| {
            let own = |j| if i == j { damp * mean } else { 0.0 };
            (0..k).map(|j| f64::from(case.h.get(order[i], order[j])) + own(j)).collect()
        })
        .collect();
    let inverse = inverse(&damped);
    // Rows of U, from the first: what is left of the inverse after the rows before.
    let mut u = vec![vec![0.0; k]; k];
    for i in 0..k {
        for j in i..k {
            let before: f64 = (0..i).map(|r| u[r][i] * u[r][j]).sum();
            let left = inverse[i][j] - before;
            u[i][j] = if i == j { left.sqrt() } else { left / u[i][i] };
        }
    }
    let groups = groups(scheme, n, k);
    let mut out = vec![0.0; n * k];
    for row in 0..n {
        let mut w: Vec<f64> = order.iter().map(|&col| f64::from(case.w[row * k + col])).collect();
        for j in 0..k {
            let (scale, zero) = params.get(groups.index(row, order[j]));
            let code = quantize_one(w[j] as f32, scale, zero, scheme.format);
            let q = dequantize_one(code, scale, zero, scheme.format);
            out[row * k + order[j]] = q;
            let error = (w[j] - f64::from(q)) / u[j][j];
            for i in j..k {
                w[i] -= error * u[j][i];
            }
        }
    }
    out
}

#[test]
fn feedback_is_that_of_the_paper() {
    let schemes = ["!q<int4:f32 axis 0>", "!q<uint4:bf16 block 24@1 zero uint4>", "!q<int2:f32 block 16@1>"];
    let mut moved = 0;
    for seed in 0..50u64 {
        for inputs in [Inputs::Many, Inputs::Deficient, Inputs::Uneven] {
            let k = [64, 150, 7][seed as usize % 3];
            let case = case(seed, 6, k, inputs);
            let scheme = scheme(schemes[seed as usize / 3 % 3]);
            let groups = groups(&scheme, 6, k);
            let params =
                fit_scales(&case.w, &groups, &scheme, Weighting::Uniform, ScaleSearch::default()).unwrap();
            for act_order in [false, true] {
                let (found, escalations) = factor(&case.h, act_order, 0.01);
                assert_eq!(escalations, 0);
                let rounder = Rounder::new(scheme.format).unwrap();
                let slab = Slab::new(&case.w, 0..6, &groups, &params, rounder);
                let solution = slab.feed_back(&found.unwrap());
                let mut codes = vec![0; case.w.len()];
                slab.write(&solution, &mut codes);
                let ours = numbers(&case, &scheme, &params, &codes);
                let theirs = textbook(&case, &scheme, &params, act_order, 0.01);
                let (ours_error, theirs_error) = (
                    errors_of(&case, &ours).iter().sum::<f64>(),
                    errors_of(&case, &theirs).iter().sum::<f64>(),
                );
                assert!(
                    (ours_error - theirs_error).abs() <= 1e-3 * theirs_error,
                    "seed {seed}, {inputs:?}, {act_order}: {ours_error:e} for {theirs_error:e}"
                );
                let facts: f64 = slab.errors(&solution, &case.h).iter().sum();
                assert!((facts - ours_error).abs() <= 1e-4 * ours_error);
                moved += ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
            }
        }
    }
    // Where a number lies between two codes, f32 and f64 may differ.
    assert!(moved < 100, "{moved} of {} numbers differ", 50 * 6 * 6 * 73);
}

/// Every grouping, zero points or not, integers and floats; k = 150 and n = 21 leave ragged groups and lanes.
const SCHEMES: &[&str] = &[
    "!q<int8:f32 axis 0>",
    "!q<int4:bf16 block 64@1>",
    "!q<uint4:f16 block 32@1 zero uint4>",
    "!q<uint8:f32 axis 0 zero uint8>",
    "!q<int3:f32 block 40@1>",
    "!q<int2:f32 axis 0>",
    "!q<int4:f32 tensor>",
    "!q<int4:f32 tile 8x64>",
    "!q<int4:f32 axis 1>",
    "!q<int4:f32 block 4@0>",
    "!q<e4m3:f32 tensor>",
    "!q<e2m1:bf16 block 32@1>",
];

#[test]
fn no_row_is_worse_than_rounded_to_nearest() {
    for (i, text) in SCHEMES.iter().enumerate() {
        for inputs in [Inputs::Many, Inputs::Deficient, Inputs::Uneven] {
            for sweeps in [0, 2] {
                let case = case(100 + i as u64, 21, 150, inputs);
                let scheme = scheme(text);
                let options = GptqOptions { sweeps, ..GptqOptions::default() };
                let done = rewrite(&case.w, 21, 150, &case.h, &scheme, &options).unwrap();
                let errors = errors_of(&case, &numbers(&case, &scheme, &done.params, &done.codes));
                let groups = groups(&scheme, 21, 150);
                let plain = quantize_rows(&groups, &scheme, Options::default(), &case.w).unwrap();
                let plain = errors_of(&case, &numbers(&case, &scheme, &plain.params, &plain.codes));
                let tall = groups.rows_per_group();
                for (errors, plain) in errors.chunks(tall).zip(plain.chunks(tall)) {
                    let (error, plain) = (errors.iter().sum::<f64>(), plain.iter().sum::<f64>());
                    assert!(error <= plain * (1.0 + 1e-4), "{text} {inputs:?}: {error} above {plain}");
                }
                let (error, plain): (f64, f64) = (errors.iter().sum(), plain.iter().sum());
                assert!((done.facts.error - error).abs() <= 1e-4 * error, "{text} {inputs:?}");
                assert!(done.facts.error <= done.facts.error_scales, "{text} {inputs:?}");
                assert!((done.facts.error_nearest - plain).abs() <= 1e-4 * plain);
                assert!(error < 0.8 * plain, "{text} {inputs:?}: {error} is hardly below {plain}");
                let dead = if matches!(inputs, Inputs::Deficient) { 150 / 8 } else { 0 };
                assert!(done.facts.dead.abs_diff(dead) <= 1 && done.facts.damping.is_some());
            }
        }
    }
}

#[test]
fn rows_fall_back_to_what_they_would_be_without_a_hessian() {
    let case = case(8, 21, 150, Inputs::Many);
    for text in SCHEMES.iter().chain(&["!q<uint4:f32 tile 8x64 zero uint4>"]) {
        let scheme = scheme(text);
        let groups = groups(&scheme, 21, 150);
        let nearest = quantize_rows(&groups, &scheme, Options::default(), &case.w).unwrap();
        let mut done = rewrite(&case.w, 21, 150, &case.h, &scheme, &GptqOptions::default()).unwrap();
        assert!(done.codes != nearest.codes, "{text}");
        for band in 0..groups.grid().0 {
            done.fall_back(&case.w, &groups, &scheme, &nearest.params, band).unwrap();
        }
        assert_eq!((done.codes, done.params), (nearest.codes, nearest.params), "{text}");
    }
}

#[test]
fn codes_of_dead_columns_are_those_of_rounding_to_nearest() {
    let case = case(7, 5, 64, Inputs::Deficient);
    let scheme = scheme("!q<int4:bf16 block 32@1>");
    let done = rewrite(&case.w, 5, 64, &case.h, &scheme, &GptqOptions::default()).unwrap();
    let groups = groups(&scheme, 5, 64);
    for row in 0..5 {
        for col in (5..64).step_by(8) {
            assert_eq!(case.h.get(col, col), 0.0);
            let (scale, zero) = done.params.get(groups.index(row, col));
            let code = quantize_one(case.w[row * 64 + col], scale, zero, scheme.format);
            assert_eq!(u32::from(done.codes[row * 64 + col]), code);
        }
    }
}

#[test]
fn order_by_size_is_a_permutation_of_columns() {
    assert_eq!(positions(&[1.0, 5.0, 5.0, 2.0], true), [0, 3, 2, 1]);
    assert_eq!(positions(&[1.0, 5.0, 5.0, 2.0], false), [3, 2, 1, 0]);
    // With one scale per row, columns sorted by hand and visited from the left give the same codes.
    let (n, k) = (9, 140);
    let case = case(11, n, k, Inputs::Many);
    let diag = case.h.diag();
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by(|&a, &b| diag[b].total_cmp(&diag[a]));
    let mut bytes = (k as u64).to_le_bytes().to_vec();
    bytes.extend(case.h.count().to_le_bytes());
    for i in 0..k {
        (0..=i).for_each(|j| bytes.extend(case.h.get(order[i], order[j]).to_le_bytes()));
    }
    let sorted_h = Hessian::from_bytes(&bytes).unwrap();
    let sorted: Vec<f32> = (0..n * k).map(|i| case.w[i / k * k + order[i % k]]).collect();
    let scheme = scheme("!q<int4:f32 axis 0>");
    let options = GptqOptions { importance: Importance::Uniform, sweeps: 0, ..GptqOptions::default() };
    let by_size = rewrite(&case.w, n, k, &case.h, &scheme, &options).unwrap();
    let in_order = GptqOptions { act_order: false, ..options };
    let by_hand = rewrite(&sorted, n, k, &sorted_h, &scheme, &in_order).unwrap();
    for i in 0..n * k {
        assert_eq!(by_size.codes[i / k * k + order[i % k]], by_hand.codes[i]);
    }
    assert_eq!(by_size.params, by_hand.params);
}

#[test]
fn threads_do_not_matter() {
    let case = case(12, 600, 300, Inputs::Many);
    for text in ["!q<int4:bf16 block 128@1>", "!q<int4:f32 tensor>", "!q<uint4:f32 tile 100x70 zero uint4>"] {
        let options = GptqOptions { sweeps: 2, importance: Importance::Block, ..GptqOptions::default() };
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| rewrite(&case.w, 600, 300, &case.h, &scheme(text), &options).unwrap())
        };
        let one = run(1);
        assert_eq!(one, run(2), "{text}");
        assert_eq!(one, run(3), "{text}");
    }
}

#[test]
fn scales_are_the_best_of_the_grid() {
    for (i, text) in SCHEMES.iter().enumerate() {
        let (n, k) = (70, 150);
        let case = case(200 + i as u64, n, k, Inputs::Many);
        let scheme = scheme(text);
        let groups = groups(&scheme, n, k);
        let diag = case.h.diag();
        let search = ScaleSearch { steps: 12, ..ScaleSearch::default() };
        for weighting in [Weighting::Uniform, Weighting::Diagonal(&diag), Weighting::Block(&case.h)] {
            let params = fit_scales(&case.w, &groups, &scheme, weighting, search).unwrap();
            // The loss of a group by the definition.
            let loss = |group: usize, scale: f32, zero: i32| {
                let mut sum = 0.0;
                for row in 0..n {
                    let inside: Vec<usize> = (0..k).filter(|&col| groups.index(row, col) == group).collect();
                    let error = |col: usize| {
                        let w = case.w[row * k + col];
                        let code = quantize_one(w, scale, zero, scheme.format);
                        f64::from(dequantize_one(code, scale, zero, scheme.format) - w)
                    };
                    let d: Vec<f64> = inside.iter().map(|&col| error(col)).collect();
                    for (i, &a) in inside.iter().enumerate() {
                        sum += match weighting {
                            Weighting::Uniform => d[i] * d[i],
                            Weighting::Diagonal(h) => f64::from(h[a]) * d[i] * d[i],
                            Weighting::Block(h) => {
                                let near = inside.iter().enumerate().filter(|(j, _)| i / 128 == j / 128);
                                near.map(|(j, &b)| d[i] * f64::from(h.get(a, b)) * d[j]).sum()
                            }
                        };
                    }
                }
                sum
            };
            for group in (0..groups.len()).step_by(groups.len().div_ceil(7)) {
                let mut span = Span::default();
                for (_, &x) in case.w.iter().enumerate().filter(|(i, _)| groups.index(i / k, i % k) == group)
                {
                    span = span.union(Span::new(x, x));
                }
                let (scale, zero) = params.get(group);
                let found = loss(group, scale, zero);
                for step in 0..=12 {
                    let factor = 1.0 - 0.6 * step as f32 / 12.0;
                    let span = Span::new(span.min() * factor, span.max() * factor);
                    let (scale, zero) = scale_for(span, &scheme, ScaleRule::Real).unwrap();
                    // 2 and 3 bits have a grid of their own, of which the whole range is the only sure member.
                    let wide = scheme.format.bits < 4;
                    let other = loss(group, scale, zero);
                    assert!(
                        found <= other * (1.0 + 1e-5) || wide && step > 0,
                        "{text} group {group} step {step}: {found} above {other}"
                    );
                }
            }
        }
    }
}

#[test]
fn narrow_integers_may_use_their_positive_end() {
    // Two bits: -2, -1, 0, 1. Numbers of one sign fit the scale 1 exactly, which is 1.5 times the usual one.
    let scheme = scheme("!q<int2:f32 axis 0>");
    let w = [1.0, 1.0, 0.0, 1.0, -1.0, 1.0];
    let groups = groups(&scheme, 1, 6);
    let params = fit_scales(&w, &groups, &scheme, Weighting::Uniform, ScaleSearch::default()).unwrap();
    assert!((params.scales[0] - 1.0).abs() < 1e-6, "{params:?}");
}

#[test]
fn without_a_search_scales_are_those_of_the_ranges() {
    for text in SCHEMES {
        let case = case(5, 21, 150, Inputs::Many);
        let (scheme, search) = (scheme(text), ScaleSearch { steps: 0, ..ScaleSearch::default() });
        let groups = groups(&scheme, 21, 150);
        let ours = fit_scales(&case.w, &groups, &scheme, Weighting::Block(&case.h), search).unwrap();
        assert_eq!(ours, quantize_rows(&groups, &scheme, Options::default(), &case.w).unwrap().params);
    }
}

#[test]
fn descent_ends_where_no_single_code_can_be_bettered() {
    let case = case(21, 16, 40, Inputs::Many);
    let scheme = scheme("!q<int4:f32 block 20@1>");
    let groups = groups(&scheme, 16, 40);
    let params = fit_scales(&case.w, &groups, &scheme, Weighting::Uniform, ScaleSearch::default()).unwrap();
    let slab = Slab::new(&case.w, 0..16, &groups, &params, Rounder::new(scheme.format).unwrap());
    let mut solution = slab.nearest();
    let mut last = slab.errors(&solution, &case.h);
    for _ in 0..30 {
        slab.descend(&case.h, None, &mut solution);
        let next = slab.errors(&solution, &case.h);
        assert!(next.iter().zip(&last).all(|(next, last)| *next <= last * (1.0 + 1e-5)));
        last = next;
    }
    let mut codes = vec![0; 16 * 40];
    slab.write(&solution, &mut codes);
    let settled = errors_of(&case, &numbers(&case, &scheme, &params, &codes));
    for at in 0..codes.len() {
        for code in 0..16 {
            let mut other = codes.clone();
            other[at] = code;
            let row = at / 40;
            let error = errors_of(&case, &numbers(&case, &scheme, &params, &other))[row];
            assert!(error >= settled[row] * (1.0 - 1e-4), "{at}: code {code} has {error} < {}", settled[row]);
        }
    }
}

#[test]
fn refitted_scales_are_the_best_for_their_codes() {
    // Groups of 20 columns make blocks of 120, the second of which is not whole.
    for text in ["!q<int4:f32 block 20@1>", "!q<uint4:f32 block 20@1 zero uint4>", "!q<e2m1:f32 block 20@1>"]
    {
        let scheme = scheme(text);
        let case = case(23, 16, 140, Inputs::Many);
        let groups = groups(&scheme, 16, 140);
        let params =
            fit_scales(&case.w, &groups, &scheme, Weighting::Uniform, ScaleSearch::default()).unwrap();
        let slab = Slab::new(&case.w, 0..16, &groups, &params, Rounder::new(scheme.format).unwrap());
        let mut solution = slab.nearest();
        let mut last = slab.errors(&solution, &case.h);
        for _ in 0..60 {
            let changed = slab.descend(&case.h, Some(Float::F32), &mut solution);
            let next = slab.errors(&solution, &case.h);
            assert!(next.iter().zip(&last).all(|(next, last)| *next <= last * (1.0 + 1e-5)), "{text}");
            last = next;
            if !changed {
                break;
            }
        }
        let mut codes = vec![0; 16 * 140];
        slab.write(&solution, &mut codes);
        let scales = slab.scales(&solution);
        assert!(scales.iter().zip(&params.scales).any(|(new, old)| new != old), "{text}");
        let settled_params = Params { scales, zeros: params.zeros.clone() };
        let settled = errors_of(&case, &numbers(&case, &scheme, &settled_params, &codes));
        for (row, (settled, last)) in settled.iter().zip(&last).enumerate() {
            assert!((settled - last).abs() < 1e-3 * last, "{text}: row {row} has {settled}, expected {last}");
        }
        for group in 0..settled_params.scales.len() {
            for by in [0.995, 1.005] {
                let mut other = settled_params.clone();
                other.scales[group] *= by;
                let row = group / groups.grid().1;
                let error = errors_of(&case, &numbers(&case, &scheme, &other, &codes))[row];
                assert!(
                    error >= settled[row] * (1.0 - 1e-4),
                    "{text}, group {group}: {error} < {}",
                    settled[row]
                );
            }
        }
    }
}

#[test]
fn refitted_scales_are_as_they_are_stored() {
    let case = case(24, 20, 256, Inputs::Many);
    let scheme = scheme("!q<int4:bf16 block 64@1>");
    let made = |refit| {
        let options = GptqOptions { refit, ..GptqOptions::default() };
        rewrite(&case.w, 20, 256, &case.h, &scheme, &options).unwrap()
    };
    let (with, without) = (made(true), made(false));
    assert!(with.params.scales.iter().all(|s| s.to_bits() & 0xffff == 0));
    assert!(with.facts.error < without.facts.error, "{:?} {:?}", with.facts, without.facts);
    let told: f64 = errors_of(&case, &numbers(&case, &scheme, &with.params, &with.codes)).iter().sum();
    assert!((told - with.facts.error).abs() < 1e-3 * told, "{told} {:?}", with.facts);
}

#[test]
fn sweeps_lower_the_error() {
    let case = case(22, 64, 256, Inputs::Many);
    let scheme = scheme("!q<int3:f32 block 64@1>");
    let error = |sweeps| {
        let options = GptqOptions { sweeps, ..GptqOptions::default() };
        rewrite(&case.w, 64, 256, &case.h, &scheme, &options).unwrap().facts.error
    };
    let (none, one, three) = (error(0), error(1), error(3));
    assert!(one < none && three <= one, "{none} {one} {three}");
}

#[test]
fn the_factor_multiplies_back() {
    for k in [1, 2, 127, 128, 129, 300] {
        let case = case(k as u64, 1, k, Inputs::Many);
        let full: Vec<f64> = case.h.mirrored().into_iter().map(f64::from).collect();
        let mut l = full.clone();
        assert!(cholesky(&mut l, k));
        for i in 0..k {
            for j in 0..=i {
                let product: f64 = (0..=j).map(|c| l[i * k + c] * l[j * k + c]).sum();
                let size = (full[i * k + i] * full[j * k + j]).sqrt();
                assert!((product - full[i * k + j]).abs() <= 1e-12 * size, "{k} [{i}, {j}]");
            }
        }
        // A matrix that is not positive definite is noticed wherever it shows.
        let mut bad = full;
        bad[k * k - 1] = -1.0;
        assert!(!cholesky(&mut bad, k));
    }
}

/// A Hessian of ones on the diagonal and `x` beside it.
fn beside(k: usize, x: f32) -> Hessian {
    let mut bytes = (k as u64).to_le_bytes().to_vec();
    bytes.extend(1u64.to_le_bytes());
    for i in 0..k {
        (0..=i).for_each(|j| bytes.extend((if i == j { 1.0 } else { x }).to_le_bytes()));
    }
    Hessian::from_bytes(&bytes).unwrap()
}

#[test]
fn damping_is_raised_and_at_last_given_up() {
    let case = case(31, 4, 20, Inputs::Many);
    let scheme = scheme("!q<int4:f32 axis 0>");
    let run = |h: &Hessian, damp| {
        let options = GptqOptions { damp, ..GptqOptions::default() };
        rewrite(&case.w, 4, 20, h, &scheme, &options).unwrap()
    };
    let fine = run(&beside(20, 0.5), 0.01);
    assert_eq!((fine.facts.escalations, fine.facts.damping), (0, Some(0.01)));
    // The least eigenvalue is 1 - 5: from 0.01 over 0.1 and 1 to 10.
    let raised = run(&beside(20, 5.0), 0.01);
    assert_eq!(raised.facts.escalations, 3);
    assert!((raised.facts.damping.unwrap() - 10.0).abs() < 1e-6);
    // A singular one without damping.
    let singular = run(&beside(20, 1.0), 0.0);
    assert!(singular.facts.escalations > 0 && singular.facts.damping.unwrap() < 0.01);
    let hopeless = run(&beside(20, 1e8), 0.01);
    assert_eq!((hopeless.facts.damping, hopeless.facts.rows_nearest), (None, 4));
    for bad in [-1.0, f64::NAN, f64::INFINITY] {
        let options = GptqOptions { damp: bad, ..GptqOptions::default() };
        assert!(rewrite(&case.w, 4, 20, &case.h, &scheme, &options).is_err());
    }
}

#[test]
fn without_tokens_numbers_are_rounded_to_nearest() {
    let case = case(32, 6, 40, Inputs::Many);
    let scheme = scheme("!q<int4:bf16 block 16@1>");
    let empty = Hessian::new(40).unwrap();
    let whole = ScaleSearch { steps: 0, ..ScaleSearch::default() };
    for search in [whole, ScaleSearch::default()] {
        let options = GptqOptions { search, sweeps: 2, ..GptqOptions::default() };
        let done = rewrite(&case.w, 6, 40, &empty, &scheme, &options).unwrap();
        let nearest = quantize_rows(&groups(&scheme, 6, 40), &scheme, Options::default(), &case.w).unwrap();
        assert_eq!((done.codes, done.params), (nearest.codes, nearest.params));
        assert_eq!((done.facts.dead, done.facts.error, done.facts.damping), (40, 0.0, None));
    }
}

#[test]
fn smallest_sizes() {
    let scheme = scheme("!q<int4:bf16 block 16@1>");
    for (n, k) in [(0, 0), (0, 5), (5, 0), (1, 1), (3, 1), (1, 17)] {
        let case = case(33, n, k, Inputs::Many);
        let done = rewrite(&case.w, n, k, &case.h, &scheme, &GptqOptions::default()).unwrap();
        assert_eq!((done.codes.len(), done.params.scales.len()), (n * k, n * k.div_ceil(16)));
    }
}

#[test]
fn what_is_not_finite_is_refused() {
    let scheme = scheme("!q<int4:bf16 block 16@1>");
    let mut case = case(34, 3, 20, Inputs::Many);
    let mut overflowing = case.h.clone();
    overflowing.add(&[1e30; 20]).unwrap();
    let error = rewrite(&case.w, 3, 20, &overflowing, &scheme, &GptqOptions::default()).unwrap_err();
    assert!(error.message.contains("of the Hessian is inf"), "{error}");
    for bad in [f32::NAN, f32::INFINITY] {
        case.w[27] = bad;
        let error = rewrite(&case.w, 3, 20, &case.h, &scheme, &GptqOptions::default()).unwrap_err();
        assert!(error.message.contains("element [1, 7]"), "{error}");
    }
    case.w[27] = 0.0;
    assert!(rewrite(&case.w, 3, 19, &case.h, &scheme, &GptqOptions::default()).is_err());
    assert!(rewrite(&case.w, 4, 20, &case.h, &scheme, &GptqOptions::default()).is_err());
    let wide = Scheme::parse("!q<f16:f32 axis 0>").unwrap();
    assert!(rewrite(&case.w, 3, 20, &case.h, &wide, &GptqOptions::default()).is_err());
    for least in [0.0, -1.0, 1.5, f32::NAN] {
        let search = ScaleSearch { least, ..ScaleSearch::default() };
        let options = GptqOptions { search, ..GptqOptions::default() };
        assert!(rewrite(&case.w, 3, 20, &case.h, &scheme, &options).is_err());
    }
}

#[test]
fn huge_numbers_end_as_rounded_to_nearest() {
    let mut case = case(35, 3, 20, Inputs::Many);
    case.w.iter_mut().for_each(|w| *w *= 1e30);
    let scheme = scheme("!q<int4:f32 axis 0>");
    let done = rewrite(&case.w, 3, 20, &case.h, &scheme, &GptqOptions::default()).unwrap();
    assert!(numbers(&case, &scheme, &done.params, &done.codes).iter().all(|x| x.is_finite()));
}

#[test]
fn output_errors_are_those_of_the_definition() {
    let case = case(36, 300, 33, Inputs::Many);
    let ours = output_errors(&case.w, &case.h);
    let theirs = errors_of(&case, &vec![0.0; case.w.len()]);
    assert_eq!(ours.len(), 300);
    for (a, b) in ours.iter().zip(theirs) {
        assert!((a - b).abs() <= 1e-5 * b, "{a} {b}");
    }
    assert!(output_errors(&[], &Hessian::new(0).unwrap()).is_empty());
}
