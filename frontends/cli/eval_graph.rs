//! `quantc eval` of classifiers: how often the right class is among the first.

use crate::failure::Outcome;
use crate::output;
use crate::run_graph::{Net, read_tensor};
use crate::subject;
use quantc_frontends::onnx;
use quantc_ir::diag::Diag;
use quantc_ir::eval::Tensor;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Arguments of `quantc eval` about classifiers.
#[derive(clap::Args)]
pub struct Classes {
    /// Samples for an input of an `.onnx` file or its engine: an array as `.npy`, whose first axis counts them.
    #[arg(long = "input", value_name = "NAME=FILE", value_parser = crate::run_graph::input)]
    pub input: Option<(String, PathBuf)>,
    /// The class of each sample: an array of integers as `.npy`.
    #[arg(long, value_name = "FILE", requires = "input")]
    pub labels: Option<PathBuf>,
}

/// What is told.
#[derive(Serialize)]
struct Scores {
    samples: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    top1: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top5: Option<f64>,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    against: Option<Against>,
}

/// Compared with another.
#[derive(Serialize)]
struct Against {
    #[serde(skip_serializing_if = "Option::is_none")]
    top1: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top5: Option<f64>,
    top1_agreement: f64,
    cosine_mean: f64,
    cosine_least: f64,
}

/// Runs the subcommand.
pub fn run(path: &Path, against: Option<&Path>, args: &Classes, threads: usize, json: bool) -> Outcome {
    let Some((name, file)) = &args.input else {
        return Err(Diag::input("a graph over arrays is scored on samples")
            .help("give --input NAME=FILE.npy, and --labels FILE.npy")
            .into());
    };
    let samples = read_tensor(file)?;
    let labels = args.labels.as_deref().map(read_tensor).transpose()?;
    let count = samples.dims().first().copied().unwrap_or(0);
    let labels = labels.map(|l| l.ints());
    if let Some(labels) = &labels
        && labels.len() != count
    {
        let text = format!("{} labels for {count} samples", labels.len());
        return Err(Diag::input(text).into());
    }
    let start = Instant::now();
    let rows = logits(path, name, &samples, threads)?;
    let seconds = start.elapsed().as_secs_f64();
    let (top1, top5) = (hits(&rows, labels.as_deref(), 1), hits(&rows, labels.as_deref(), 5));
    let against = match against {
        None => None,
        Some(other) => {
            let base = logits(other, name, &samples, threads)?;
            if base.len() != rows.len() {
                return Err(Diag::input("both are scored on different numbers of samples").into());
            }
            let cosines: Vec<f64> = rows.iter().zip(&base).map(|(a, b)| cosine(a, b)).collect();
            let same = rows.iter().zip(&base).filter(|(a, b)| first(a, 1) == first(b, 1)).count();
            Some(Against {
                top1: hits(&base, labels.as_deref(), 1),
                top5: hits(&base, labels.as_deref(), 5),
                top1_agreement: same as f64 / rows.len().max(1) as f64,
                cosine_mean: cosines.iter().sum::<f64>() / cosines.len().max(1) as f64,
                cosine_least: cosines.iter().copied().fold(1.0, f64::min),
            })
        }
    };
    let scores = Scores { samples: rows.len(), top1, top5, seconds, against };
    if json {
        return output::json(&scores);
    }
    let share = |x: Option<f64>| x.map_or("unknown".to_string(), |x| format!("{x:.4}"));
    let row = |name: &str, top1: Option<f64>, top5: Option<f64>| {
        output::line(&format!("{name:15}  {:>7}  {:>7}", share(top1), share(top5)))
    };
    let count = format!("{} samples", scores.samples);
    output::line(&format!("{count:15}  {:>7}  {:>7}", "top-1", "top-5"))?;
    row("this", scores.top1, scores.top5)?;
    if let Some(a) = &scores.against {
        row("base", a.top1, a.top5)?;
        output::line(&format!("top-1 agreement  {:.4}", a.top1_agreement))?;
        output::line(&format!("cosine to base   mean {:.6}, least {:.6}", a.cosine_mean, a.cosine_least))?;
    }
    eprintln!("{seconds:.2} s");
    Ok(())
}

/// The first output for each sample.
fn logits(path: &Path, name: &str, samples: &Tensor, threads: usize) -> Outcome<Vec<Vec<f64>>> {
    let (mut net, _folder) = open(path, name, samples, threads)?;
    let engine = std::sync::Arc::clone(net.session().engine());
    let inputs = &engine.manifest().array_inputs;
    let [input] = &inputs[..] else {
        return Err(
            Diag::input(format!("the engine has {} inputs, classifiers have one", inputs.len())).into()
        );
    };
    if input.name != name {
        let text = format!("the engine has no input `{name}`");
        return Err(Diag::input(text).help(format!("its input is {}", input.name)).into());
    }
    let ty = quantc_codegen::arrays::io::ty_of(input)?;
    let batches = subject::batches_of(samples, &ty)?;
    let each = input.dims.first().copied().unwrap_or(1).max(1) as usize;
    let mut rows = vec![];
    let mut bar = subject::Progress::new("scoring");
    for (i, batch) in batches.iter().enumerate() {
        let outputs = net.run(std::slice::from_ref(batch))?;
        let Some(first) = outputs.first() else {
            return Err(Diag::input("the engine has no output").into());
        };
        let numbers = first.reals();
        let width = (numbers.len() / each).max(1);
        rows.extend(numbers.chunks(width).map(<[f64]>::to_vec));
        bar.at(i as f64 / batches.len() as f64);
    }
    bar.done();
    Ok(rows)
}

/// Opens an engine, or compiles a model for this machine, one sample at a time where it may be any number.
#[cfg(feature = "llvm")]
fn open(
    path: &Path,
    name: &str,
    samples: &Tensor,
    threads: usize,
) -> Outcome<(Net, Option<subject::Scratch>)> {
    if !onnx::is_onnx(path) {
        return Ok((Net::open(path, threads)?, None));
    }
    let mut dims: Vec<u64> = samples.dims().iter().map(|&d| d as u64).collect();
    if let Some(first) = dims.first_mut() {
        *first = 1;
    }
    let folder = subject::Scratch::new()?;
    let out = folder.path().join("engine");
    crate::compile_graph::float_engine(path, BTreeMap::from([(name.to_string(), dims)]), &out)?;
    Ok((Net::open(&out, threads)?, Some(folder)))
}

#[cfg(not(feature = "llvm"))]
fn open(path: &Path, _: &str, _: &Tensor, threads: usize) -> Outcome<(Net, Option<BTreeMap<(), ()>>)> {
    if !onnx::is_onnx(path) {
        return Ok((Net::open(path, threads)?, None));
    }
    let diag = Diag::target("this is not an engine, and this build of quantc compiles no models");
    Err(diag.in_file(path.display().to_string()).into())
}

/// The classes of the largest numbers.
fn first(row: &[f64], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
    order.truncate(n);
    order
}

/// The share of samples whose label is among the first `n`.
fn hits(rows: &[Vec<f64>], labels: Option<&[i128]>, n: usize) -> Option<f64> {
    let labels = labels?;
    let hit = |(row, &label): (&Vec<f64>, &i128)| first(row, n).iter().any(|&c| c as i128 == label);
    let count = rows.iter().zip(labels).filter(|&pair| hit(pair)).count();
    Some(count as f64 / rows.len().max(1) as f64)
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let norm = (dot(a, a) * dot(b, b)).sqrt();
    if norm == 0.0 { f64::from(u8::from(a == b)) } else { dot(a, b) / norm }
}
