use super::*;
use crate::calib::observers::tests::{ASYMMETRIC, SYMMETRIC};
use proptest::prelude::*;
use quantc_ir::formats::{E2M1, E4M3, INT4, INT8, UINT4, UINT8};
use quantc_ir::quant::{ScaleRule, dequantize_one, quantize_one, scale_for};
use quantc_ir::scheme::Zero;
use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

fn of(xs: &[f32]) -> Histogram {
    let mut h = Histogram::new(1).unwrap();
    h.see(&Rows::new(0, xs, 1).unwrap()).unwrap();
    h
}

fn span(h: &Histogram, method: Method, scheme: &Scheme) -> Span {
    h.span(method, scheme).unwrap().unwrap()
}

/// Numbers with a normal distribution, by Box and Muller.
fn gaussian(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut one = || {
        let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    };
    (0..n).map(|_| one()).collect()
}

fn uniform(seed: u64, n: usize, lo: f32, hi: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(lo..hi)).collect()
}

fn percentile(percent: f64) -> Method {
    Method::Percentile { ppm: (percent * 1e4) as u32 }
}

#[test]
fn buckets_hold_what_lies_between_their_edges() {
    for at in 0..END {
        let (from, to) = (lower_edge(at), lower_edge(at + 1));
        assert!(from < to);
        assert_eq!((from.to_bits() >> DROPPED) as usize, at);
        if from > f32::MIN_POSITIVE && to < f32::MAX {
            let width = f64::from(to) - f64::from(from);
            assert!(width <= f64::from(from) / 256.0 && width > f64::from(from) / 512.0);
        }
    }
    assert_eq!(lower_edge(END), f32::MAX);
}

#[test]
fn percentiles_by_hand() {
    // 1, 2, .., 1000: each in another bucket up to 512, two in one beyond.
    let xs: Vec<f32> = (1..=1000).map(|i| if i % 3 == 0 { -(i as f32) } else { i as f32 }).collect();
    let h = of(&xs);
    assert_eq!(span(&h, Method::Whole, &SYMMETRIC), Span::symmetric(1000.0));
    assert_eq!(span(&h, Method::Whole, &ASYMMETRIC), Span::new(-999.0, 1000.0));
    assert_eq!(span(&h, percentile(100.0), &ASYMMETRIC), Span::new(-999.0, 1000.0));
    // The 999th of the magnitudes is 999, the 500th 500.
    assert_eq!(span(&h, percentile(99.9), &SYMMETRIC), Span::symmetric(1000.0));
    assert_eq!(span(&h, percentile(50.0), &SYMMETRIC), Span::symmetric(501.0));
    // Five numbers may be left out at each end: 1000, 998, 997, 995, 994 and -999, -996, -993, -990, -987.
    assert_eq!(span(&h, percentile(99.0), &ASYMMETRIC), Span::new(-986.0, 994.0));
}

#[test]
fn numbers_outside_by_hand() {
    let h = of(&[-2.0, -1.0, 0.0, 0.0, 0.5, 1.0, 2.0, 4.0]);
    assert_eq!(h.outside(Span::new(-2.0, 4.0)), Some(0.0));
    assert_eq!(h.outside(Span::new(0.0, 4.0)), Some(2.0 / 8.0));
    assert_eq!(h.outside(Span::new(-1.5, 1.5)), Some(3.0 / 8.0));
    assert_eq!(h.outside(Span::new(0.0, 0.0)), Some(6.0 / 8.0));
    assert_eq!(Histogram::new(1).unwrap().outside(Span::default()), Some(0.0));
    assert_eq!(h.counts.iter().filter(|&&c| c > 0).count(), 7);
}

#[test]
fn entropy_cuts_outliers_off() {
    let mut xs = gaussian(1, 200_000);
    xs.extend([60.0, -75.0, 80.0, 100.0, -90.0]);
    let h = of(&xs);
    let whole = span(&h, Method::Whole, &SYMMETRIC);
    let t = span(&h, Method::Entropy, &SYMMETRIC).max();
    assert!(t > 3.0 && t < 7.0 && whole.max() == 100.0, "{t}");
    let s = span(&h, Method::Entropy, &ASYMMETRIC);
    assert!(s.max() > 3.0 && s.max() < 7.0 && s.min() < -3.0 && s.min() > -7.0, "{s:?}");
    // With coarse steps more is worth cutting.
    let int4 = span(&h, Method::Entropy, &Scheme { format: &INT4, ..SYMMETRIC }).max();
    assert!(int4 > 1.5 && int4 < t, "{int4}");
    // The outliers of one side leave the other as it is.
    let one_sided: Vec<f32> = xs.iter().map(|x| if *x < -50.0 { -1.0 } else { *x }).collect();
    let s = span(&of(&one_sided), Method::Entropy, &ASYMMETRIC);
    assert!(s.max() < 7.0 && s.min() < -3.0 && s.min() > -7.0, "{s:?}");
}

#[test]
fn entropy_keeps_uniform_data() {
    for n in [3_000, 30_000, 300_000] {
        let h = of(&uniform(n as u64, n, -2.0, 2.0));
        for format in [&INT8, &INT4] {
            let t = span(&h, Method::Entropy, &Scheme { format, ..SYMMETRIC }).max();
            assert!(t > 1.97, "{format} {n}: {t}");
        }
        let s = span(&h, Method::Entropy, &ASYMMETRIC);
        assert!(s.min() < -1.97 && s.max() > 1.97, "{n}: {s:?}");
        // All of one sign: the other end stays 0.
        let h = of(&uniform(n as u64, n, 0.0, 3.0));
        let s = span(&h, Method::Entropy, &ASYMMETRIC);
        assert!(s.min() == 0.0 && s.max() > 2.95, "{n}: {s:?}");
    }
}

/// The relative entropy straight from its definition, over buckets cut at the ends of the intervals.
fn divergence_by_definition(xs: &[f32], reach: f64, levels: u32) -> f64 {
    let step = reach / f64::from(levels - 1);
    let mut magnitudes: Vec<f32> = xs.iter().map(|x| x.abs()).filter(|x| *x > 0.0).collect();
    magnitudes.sort_by(f32::total_cmp);
    let absmax = f64::from(magnitudes[magnitudes.len() - 1]);
    let bucket = |x: f32| x.to_bits() >> 15 << 15;
    let core = bucket(magnitudes[magnitudes.len() / 2] / 16.0);
    // Buckets: from, to, how many; the first is from 0 to the core's edge.
    let n_core = magnitudes.iter().filter(|x| x.to_bits() < core).count();
    let mut buckets = vec![(0.0, f64::from(f32::from_bits(core)), n_core as f64)];
    for same in magnitudes[n_core..].chunk_by(|a, b| bucket(*a) == bucket(*b)) {
        let from = bucket(same[0]);
        buckets.push((f32::from_bits(from).into(), f32::from_bits(from + (1 << 15)).into(), same.len() as f64));
    }
    // Pieces of them within one interval: its number, how many, width.
    let mut pieces: Vec<(usize, f64, f64)> = vec![];
    let mut outside = 0.0;
    for (lo, to, n) in buckets {
        let hi = to.min(absmax);
        let mut edges = vec![lo, hi, reach];
        edges.extend((0..levels).map(|k| (f64::from(k) + 0.5) * step));
        edges.retain(|e| (lo..=hi).contains(e));
        edges.sort_by(f64::total_cmp);
        edges.dedup();
        for pair in edges.windows(2) {
            let share = (pair[1] - pair[0]) / (hi - lo);
            let middle = 0.5 * (pair[0] + pair[1]);
            if middle > reach {
                outside += n * share;
            } else {
                let interval = ((middle / step).round() as usize).min(levels as usize - 1);
                pieces.push((interval, n * share, (to - lo) * share));
            }
        }
    }
    let inside: f64 = pieces.iter().map(|p| p.1).sum();
    let n = inside + outside;
    let last = pieces.iter().map(|p| p.0).max().unwrap();
    let interval = |k: usize| {
        let of = pieces.iter().filter(move |p| p.0 == k);
        of.fold((0.0, 0.0), |sum, p| (sum.0 + p.1, sum.1 + p.2))
    };
    let mut sum = 0.0;
    for &(k, c, w) in pieces.iter().filter(|p| p.1 > 0.0) {
        let (of_interval, width) = interval(k);
        let q = of_interval * w / width / inside;
        sum += c / n * (c / n / q).ln();
    }
    // In the last interval P has the numbers outside too.
    let c = interval(last).0;
    let (p, q) = ((c + outside) / n, c / inside);
    n * (sum - c / n * (c / n / q).ln() + p * (p / q).ln())
}

#[test]
fn entropy_is_what_it_is_defined_as() {
    let mut xs = gaussian(2, 4000);
    xs.extend([9.005, -12.01, 0.0, -0.0, 0.0]);
    let h = entropy::without_zeros(&of(&xs));
    let axis = Axis::magnitudes(&h, entropy::core(&h));
    for levels in [8, 128] {
        let bins = axis.positive().bins();
        for from_top in [1, 2, 3, 10, 50, 150] {
            // A range ends where a bucket does that is not empty.
            let reach = bins[bins.len() - from_top].hi;
            let fast = entropy::divergence(&axis, h.n as f64, 0.0, reach, levels);
            let slow = divergence_by_definition(&xs, reach, levels);
            assert!((fast - slow).abs() < 1e-6 * slow.abs().max(1.0), "{levels} {reach}: {fast} {slow}");
        }
    }
}

#[test]
fn entropy_sees_past_zeros_and_far_outliers() {
    let xs = gaussian(7, 100_000);
    let t = span(&of(&xs), Method::Entropy, &SYMMETRIC);
    let mut zeros = xs.clone();
    zeros.resize(400_000, 0.0);
    assert_eq!(span(&of(&zeros), Method::Entropy, &SYMMETRIC), t);
    for format in [&INT8, &INT4] {
        for outlier in [1e2, 1e3, 1e5] {
            let mut far = xs.clone();
            far.push(outlier);
            let t = span(&of(&far), Method::Entropy, &Scheme { format, ..SYMMETRIC }).max();
            assert!(t > 2.0 && t < 7.0, "{format} {outlier}: {t}");
        }
    }
    // Half of a normal distribution, as a rectifier leaves it.
    let half: Vec<f32> = xs.iter().map(|x| x.max(0.0)).collect();
    let s = span(&of(&half), Method::Entropy, &ASYMMETRIC);
    assert!(s.min() == 0.0 && s.max() > 3.0, "{s:?}");
}

fn error_of(xs: &[f32], span: Span, scheme: &Scheme) -> f64 {
    let (scale, zero) = scale_for(span, scheme, ScaleRule::Real).unwrap();
    let error = |&x: &f32| {
        let y = dequantize_one(quantize_one(x, scale, zero, scheme.format), scale, zero, scheme.format);
        (f64::from(y) - f64::from(x)).powi(2)
    };
    xs.iter().map(error).sum()
}

#[test]
fn mse_is_that_of_the_numbers_themselves() {
    let mut heavy = gaussian(3, 20_000);
    heavy.iter_mut().for_each(|x| *x = x.powi(3));
    for xs in [gaussian(4, 20_000), heavy, uniform(5, 20_000, -1.0, 3.0)] {
        let h = of(&xs);
        for scheme in [
            SYMMETRIC,
            ASYMMETRIC,
            Scheme { format: &INT4, ..SYMMETRIC },
            Scheme { format: &UINT8, ..SYMMETRIC },
            Scheme { format: &E4M3, ..SYMMETRIC },
            Scheme { format: &E2M1, ..SYMMETRIC },
        ] {
            let found = span(&h, Method::Mse, &scheme);
            let error = error_of(&xs, found, &scheme);
            let estimate = mse::squared_error(&Axis::signed(&h, 1), found, &scheme).unwrap();
            assert!((estimate - error).abs() < 0.03 * error, "{scheme}: {estimate} {error}");
            if scheme.zero != Zero::Symmetric {
                // Brute force over both ends.
                let whole = h.extremes.span();
                let ends = (0..=12).flat_map(|i| (0..=12).map(move |j| (mse::factor(4 * i), mse::factor(4 * j))));
                let least = ends
                    .map(|(i, j)| error_of(&xs, Span::new(whole.min() * i, whole.max() * j), &scheme))
                    .fold(f64::INFINITY, f64::min);
                assert!(error <= 1.005 * least, "{scheme}: {error} {least}");
                continue;
            }
            // Brute force over the same factors, on the numbers.
            let absmax = h.extremes.absmax();
            let least = (0..=256)
                .map(|i| error_of(&xs, Span::symmetric(absmax * mse::factor(i)), &scheme))
                .fold(f64::INFINITY, f64::min);
            assert!(error <= 1.005 * least, "{scheme}: {error} {least}");
        }
    }
}

#[test]
fn mse_cuts_outliers_off_where_that_pays() {
    let mut xs = gaussian(6, 100_000);
    xs.push(30.0);
    let int4 = Scheme { format: &INT4, ..SYMMETRIC };
    let t = span(&of(&xs), Method::Mse, &int4).max();
    assert!(t > 2.0 && t < 3.5, "{t}");
    let zero_points = Scheme { format: &UINT4, zero: Zero::Point(&UINT4), ..SYMMETRIC };
    let s = span(&of(&xs), Method::Mse, &zero_points);
    assert!(s.max() < 4.0 && s.max() > 2.0 && s.min() < -2.0 && s.min() > -4.0, "{s:?}");
}

#[test]
fn methods_say_what_they_cannot_do() {
    let h = of(&[1.0, 2.0]);
    let e4m3 = Scheme { format: &E4M3, ..SYMMETRIC };
    assert!(h.span(Method::Entropy, &e4m3).unwrap_err().message.contains("e4m3"));
    assert!(h.span(Method::Moments { deviations: 3.0 }, &SYMMETRIC).unwrap().is_none());
}

#[test]
fn constants_and_zeros() {
    for method in [percentile(99.9), Method::Entropy, Method::Mse, Method::Whole] {
        for scheme in [SYMMETRIC, ASYMMETRIC] {
            let zeros = span(&of(&[0.0, -0.0, 0.0]), method, &scheme);
            assert_eq!((zeros.min(), zeros.max()), (0.0, 0.0), "{method} {scheme}");
            let ones = span(&of(&[1.0; 9]), method, &scheme);
            assert_eq!(ones.max(), 1.0, "{method} {scheme}");
        }
    }
}

proptest! {
    /// The end is that of the nearest rank, but for a part of its bucket.
    #[test]
    fn percentiles_are_quantiles(
        xs in prop::collection::vec(prop_oneof![-1e3f32..1e3, -1f32..1.0, Just(0.0f32)], 1..400),
        ppm in 500_000u32..=1_000_000,
    ) {
        let h = of(&xs);
        let n = xs.len() as u64;
        let mut magnitudes: Vec<f32> = xs.iter().map(|x| x.abs()).collect();
        magnitudes.sort_by(f32::total_cmp);
        let rank = (n * u64::from(ppm)).div_ceil(1_000_000);
        let exact = magnitudes[rank as usize - 1];
        let found = span(&h, Method::Percentile { ppm }, &SYMMETRIC).max();
        prop_assert!(found >= exact && found <= exact * (1.0 + 1.0 / 256.0) + 1e-38, "{found} {exact}");

        let mut sorted = xs.clone();
        sorted.sort_by(f32::total_cmp);
        let cut = ((n - rank) / 2) as usize;
        let (lo, hi) = (sorted[cut].min(0.0), sorted[xs.len() - 1 - cut].max(0.0));
        let found = span(&h, Method::Percentile { ppm }, &ASYMMETRIC);
        prop_assert!(found.max() >= hi && found.max() <= hi * (1.0 + 1.0 / 256.0) + 1e-38);
        prop_assert!(found.min() <= lo && found.min() >= lo * (1.0 + 1.0 / 256.0) - 1e-38);
    }

    /// The share outside is exact up to the buckets at the ends.
    #[test]
    fn the_share_outside(xs in prop::collection::vec(-10f32..10.0, 1..300), lo in -12f32..0.0, hi in 0f32..12.0) {
        let h = of(&xs);
        let share = |lo: f32, hi: f32| {
            xs.iter().filter(|&&x| x < lo || x > hi).count() as f64 / xs.len() as f64
        };
        let found = h.outside(Span::new(lo, hi)).unwrap();
        let (more, less) = (1.0 + 1.0 / 256.0, 1.0 - 1.0 / 256.0);
        prop_assert!(found >= share(lo * more, hi * more) - 1e-12);
        prop_assert!(found <= share(lo * less, hi * less) + 1e-12);
    }
}
