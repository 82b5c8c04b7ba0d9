//! Time and gain of GPTQ: the Hessian, its factor, the search for scales, the whole of it.
//!
//! ```text
//! cargo bench --bench quantize -- [--sizes 768,2048,4096] [--tokens N] [--threads N] [--compare]
//! ```
//!
//! Weights are square, `int4` in groups of 128; inputs are made up: correlated channels of very different sizes. The
//! factor is timed by rewriting 16 rows, so a little else is in it. `--compare` lists what the options do to the output
//! error instead, for several formats. Run it on a quiet machine.

use quantc_ir::diag::Result;
use quantc_ir::quant::Groups;
use quantc_ir::scheme::Scheme;
use quantc_ir::ty::Shape;
use quantc_passes::calib::hessian::Hessian;
use quantc_passes::weights::gptq_core::{
    GptqOptions, Importance, ScaleSearch, Weighting, fit_scales, output_errors, rewrite,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::Instant;

/// Tokens that are added at a time.
const BATCH: usize = 512;

fn main() {
    if let Err(message) = bench() {
        eprintln!("error: {message}");
        std::process::exit(1);
    }
}

fn bench() -> Result<(), String> {
    let mut sizes = vec![768, 2048, 4096];
    let (mut tokens, mut compared) = (65536, false);
    let mut threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        let number = |text: &str| text.parse::<usize>().map_err(|_| format!("`{text}` is no number"));
        match arg.as_str() {
            "--bench" => {}
            "--sizes" => sizes = value()?.split(',').map(number).collect::<Result<_, _>>()?,
            "--tokens" => tokens = number(&value()?)?,
            "--threads" => threads = number(&value()?)?,
            "--compare" => compared = true,
            _ => return Err(format!("unknown argument `{arg}`")),
        }
    }
    quantc_passes::set_threads(threads);
    if compared { compare(&sizes) } else { times(&sizes, tokens, threads) }.map_err(|d| d.to_string())
}

fn times(sizes: &[usize], tokens: usize, threads: usize) -> Result<()> {
    println!("{tokens} tokens, {threads} threads, int4 g128, seconds\n");
    println!(
        "| k = n | Hessian | GMAC/s | of bf16 | GMAC/s | scales | factor | rewrite, in order | by size | and 2 sweeps | error / nearest |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for &k in sizes {
        let case = Case::new(k, k, 4 * BATCH);
        let scheme = Scheme::parse("!q<int4:bf16 block 128@1>")?;
        let groups = Groups::new(&scheme, &Shape::fixed(&[k as u64, k as u64]))?;
        let mut h = Hessian::new(k)?;
        let batches = || case.x.chunks(BATCH * k).cycle().take(tokens / BATCH);
        let hessian = time(1, || batches().try_for_each(|x| h.add(x)))?;
        let mut of_bf16 = Hessian::new(k)?;
        let rounded = time(1, || batches().try_for_each(|x| of_bf16.add_rounded(x)))?;
        let speed = |seconds: f64| (k * k) as f64 / 2.0 * (tokens / BATCH * BATCH) as f64 / seconds / 1e9;
        let speeds = [hessian, rounded].map(speed);
        let (search, diag) = (ScaleSearch::default(), h.diag());
        let scales = time(3, || {
            fit_scales(&case.w, &groups, &scheme, Weighting::Diagonal(&diag), search).map(|_| ())
        })?;
        let mut gain = 0.0;
        let mut run = |n: usize, options: GptqOptions| {
            time(3, || {
                let done = rewrite(&case.w[..n * k], n, k, &h, &scheme, &options)?;
                gain = done.facts.error / done.facts.error_nearest;
                Ok(())
            })
        };
        let plain = ScaleSearch { steps: 0, ..search };
        let base = GptqOptions { sweeps: 0, ..GptqOptions::default() };
        let factor = run(16, GptqOptions { search: plain, ..base })?;
        let in_order = run(k, GptqOptions { act_order: false, ..base })?;
        let by_size = run(k, base)?;
        let swept = run(k, GptqOptions { sweeps: 2, ..base })?;
        println!(
            "| {k} | {hessian:.2} | {:.0} | {rounded:.2} | {:.0} | {scales:.2} | {factor:.2} | {in_order:.2} | {by_size:.2} | {swept:.2} | {gain:.3} |",
            speeds[0], speeds[1]
        );
    }
    Ok(())
}

/// The best of `times` runs, in seconds.
fn time(times: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..times {
        let start = Instant::now();
        work()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Output errors relative to the output, for the tokens of the Hessian and for others.
fn compare(sizes: &[usize]) -> Result<()> {
    for &k in sizes {
        let n = k.min(512);
        let case = Case::new(n, k, 4 * k + 2048);
        let (seen, unseen) = case.x.split_at(4 * k * k);
        let (mut h, mut others) = (Hessian::new(k)?, Hessian::new(k)?);
        h.add(seen)?;
        others.add(unseen)?;
        let total = |d: &[f32], h: &Hessian| output_errors(d, h).iter().sum::<f64>();
        let (signal, other_signal) = (total(&case.w, &h), total(&case.w, &others));
        for text in [
            "!q<int8:f32 axis 0>",
            "!q<int4:f32 axis 0>",
            "!q<int4:bf16 block 128@1>",
            "!q<uint4:bf16 block 128@1 zero uint4>",
            "!q<int4:bf16 block 32@1>",
            "!q<int3:f32 block 128@1>",
            "!q<int2:f32 block 64@1>",
            "!q<e2m1:bf16 block 32@1>",
            "!q<e4m3:f32 axis 0>",
        ] {
            let Ok(scheme) = Scheme::parse(text) else {
                println!("`{text}` is no scheme");
                continue;
            };
            println!("\n{n} x {k}, {text}; dB below the output: seen, unseen; parts of rounding to nearest");
            let whole = GptqOptions {
                search: ScaleSearch { steps: 0, ..ScaleSearch::default() },
                sweeps: 0,
                ..GptqOptions::default()
            };
            let mut ways = vec![
                ("in order, whole ranges".to_string(), GptqOptions { act_order: false, ..whole }),
                ("by size, whole ranges".to_string(), whole),
            ];
            for importance in
                [Importance::Uniform, Importance::Diagonal, Importance::Block, Importance::Pivots]
            {
                for sweeps in [0, 1, 2, 4] {
                    let options = GptqOptions { importance, sweeps, ..GptqOptions::default() };
                    ways.push((format!("{importance:?}, {sweeps} sweeps").to_lowercase(), options));
                }
            }
            for (name, options) in ways {
                let start = Instant::now();
                let done = rewrite(&case.w, n, k, &h, &scheme, &options)?;
                let seconds = start.elapsed().as_secs_f64();
                let groups = Groups::new(&scheme, &Shape::fixed(&[n as u64, k as u64]))?;
                let mut d = vec![0.0; case.w.len()];
                quantc_ir::quant::dequantize_block(&groups, &scheme, &done.params, 0, &done.codes, &mut d)?;
                d.iter_mut().zip(&case.w).for_each(|(d, w)| *d -= w);
                let f = done.facts;
                println!(
                    "  {name:24} {:6.2} {:6.2}  scales {:.3} result {:.3}  rows to nearest {:3}  {seconds:.2} s",
                    10.0 * (signal / f.error).log10(),
                    10.0 * (other_signal / total(&d, &others)).log10(),
                    f.error_scales / f.error_nearest,
                    f.error / f.error_nearest,
                    f.rows_nearest,
                );
            }
        }
    }
    Ok(())
}

/// A weight and inputs.
struct Case {
    /// `n x k`.
    w: Vec<f32>,
    /// `tokens x k`.
    x: Vec<f32>,
}

impl Case {
    fn new(n: usize, k: usize, tokens: usize) -> Case {
        let mut rng = ChaCha8Rng::seed_from_u64(k as u64);
        let mut normal = move || (0..4).map(|_| rng.random::<f32>() - 0.5).sum::<f32>() * 1.732;
        // Sizes of channels spread over a factor of about ten, some of them far beyond.
        let sizes: Vec<f32> =
            (0..k).map(|j| (normal() * 0.7).exp() * if j % 97 == 5 { 12.0 } else { 1.0 }).collect();
        const COMMON: usize = 24;
        let mix: Vec<f32> = (0..COMMON * k).map(|_| normal()).collect();
        let mut x = vec![0.0; tokens * k];
        for row in x.chunks_mut(k) {
            for at in 0..COMMON {
                let a = normal() / (1.0 + at as f32 * 0.3);
                row.iter_mut().zip(&mix[at * k..]).for_each(|(x, m)| *x += a * m);
            }
            let mut last = 0.0;
            for (x, size) in row.iter_mut().zip(&sizes) {
                last = 0.8 * last + normal();
                *x = (*x + last) * size;
            }
        }
        // Large channels have small weights, as trained layers do to some degree.
        let w = (0..n * k)
            .map(|i| {
                let g = normal();
                (g + 0.15 * g * g * g) * 0.02 / sizes[i % k].sqrt()
            })
            .collect();
        Case { w, x }
    }
}
