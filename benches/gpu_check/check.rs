//! What a machine with a GPU is asked: whether kernels are right, how fast they are, and whether engines give there what
//! they give on a processor. `make gpu-check` builds and packs it; `docs/gpu.md` tells what it prints.
//!
//! ```text
//! gpu-check pack FOLDER [--target NAME] [--small]    where NVRTC is: compiles the kernels of the table
//! gpu-check run FOLDER [--only PART]                 where the GPU is: facts, correctness, engines, speed; as Markdown
//! ```
//!
//! Exit codes: 0 all is right, 1 something is wrong or there is no GPU, 2 the command line was wrong.

mod engines;
mod inputs;
mod measure;
mod table;

use quantc::ir::diag::{Diag, Result};
use quantc::ir::target::GpuTarget;
use quantc_codegen::cuda::plan;
use quantc_codegen::cuda::text;
use quantc_codegen::targets::GPUS;
use quantc_runtime::format::{Gpu, GpuCode, GpuEntry, GpuKernel};
use quantc_runtime::gpu::{self, Driver};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The file of kernels in a packed folder.
const KERNELS: &str = "kernels.cuda";

/// Its name of the target.
const TARGET: &str = "target.txt";

/// Parts of a run.
const PARTS: [&str; 4] = ["facts", "kernels", "engines", "speed"];

enum Command {
    Pack { folder: PathBuf, target: &'static GpuTarget, small: bool },
    Run { folder: PathBuf, only: Option<String> },
}

/// Reads the command line; what is wrong with it.
fn parse(args: &[String]) -> std::result::Result<Command, String> {
    let usage =
        "usage: gpu-check pack FOLDER [--target NAME] [--small], or gpu-check run FOLDER [--only PART]";
    let [what, folder, rest @ ..] = args else { return Err(usage.into()) };
    let folder = PathBuf::from(folder);
    let value = |name: &str, value: Option<&String>| value.cloned().ok_or(format!("`{name}` needs a value"));
    let mut rest = rest.iter();
    match what.as_str() {
        "pack" => {
            let (mut target, mut small) = ("cuda-sm90".to_string(), false);
            while let Some(option) = rest.next() {
                match option.as_str() {
                    "--target" => target = value(option, rest.next())?,
                    "--small" => small = true,
                    other => return Err(format!("there is no option `{other}`; {usage}")),
                }
            }
            Ok(Command::Pack { folder, target: gpu_target(&target)?, small })
        }
        "run" => {
            let mut only = None;
            while let Some(option) = rest.next() {
                match option.as_str() {
                    "--only" => only = Some(value(option, rest.next())?),
                    other => return Err(format!("there is no option `{other}`; {usage}")),
                }
            }
            match &only {
                Some(part) if !PARTS.contains(&part.as_str()) => {
                    Err(format!("there is no part `{part}`; parts are {}", PARTS.join(", ")))
                }
                _ => Ok(Command::Run { folder, only }),
            }
        }
        other => Err(format!("there is no command `{other}`; {usage}")),
    }
}

fn gpu_target(name: &str) -> std::result::Result<&'static GpuTarget, String> {
    let names = || GPUS.iter().map(|g| g.name).collect::<Vec<_>>().join(", ");
    GPUS.iter()
        .copied()
        .find(|g| g.name == name)
        .ok_or_else(|| format!("there is no GPU target `{name}`: {}", names()))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match parse(&args) {
        Err(what) => {
            eprintln!("error: {what}");
            return ExitCode::from(2);
        }
        Ok(Command::Pack { folder, target, small }) => pack(&folder, target, small).map(|()| true),
        Ok(Command::Run { folder, only }) => run(&folder, only.as_deref()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(diag) => {
            eprintln!("error: {diag}");
            ExitCode::FAILURE
        }
    }
}

/// A kernel of the table, ready to be loaded.
pub struct Ready {
    /// Code and spec.
    pub entry: GpuEntry,
    /// What it computes.
    pub want: plan::Want,
    /// How.
    pub planned: plan::Planned,
    /// How it is launched.
    pub launch: GpuKernel,
}

fn ready(want: plan::Want, cubin: Vec<u8>, target: &GpuTarget) -> Result<Ready> {
    let symbol = plan::symbol(&want.spec, want.tokens);
    let planned = plan::kernel(&symbol, &want, &target.gpu)?;
    let launch = plan::launch(&planned.kernel, 0)?;
    let spec = serde_json::to_string(&want).map_err(|e| Diag::bug(format!("a spec: {e}")))?;
    let source = if cubin.is_empty() { text::emit(&planned.kernel) } else { String::new() };
    Ok(Ready { entry: GpuEntry { symbol, cubin, source, spec }, want, planned, launch })
}

fn system(path: &Path, e: &std::io::Error) -> Diag {
    Diag::system(e.to_string()).in_file(path.display().to_string())
}

/// Compiles the kernels of the table; where there is no NVRTC they stay text, which the GPU's machine then compiles.
fn pack(folder: &Path, target: &'static GpuTarget, small: bool) -> Result<()> {
    let wants = table::kernels(small).into_iter().chain(table::shapes(small).into_iter().map(|s| s.want));
    let mut wants: Vec<plan::Want> = wants.collect();
    wants.sort_by_key(|want| plan::symbol(&want.spec, want.tokens));
    wants.dedup();
    let store = quantc::ir::weights::Store::in_memory();
    let wanted = wants.iter().map(|want| (plan::symbol(&want.spec, want.tokens), want.clone())).collect();
    let code = plan::compile(&wanted, &target.gpu, &store)?;
    let count = code.kernels.len();
    let entries: Vec<GpuEntry> = code.kernels.into_iter().map(|k| k.entry).collect();
    let compiled = entries.iter().filter(|e| !e.cubin.is_empty()).count();
    std::fs::create_dir_all(folder).map_err(|e| system(folder, &e))?;
    let bytes = GpuCode { kernels: entries }.encode_file();
    let at = folder.join(KERNELS);
    std::fs::write(&at, &bytes).map_err(|e| system(&at, &e))?;
    let at = folder.join(TARGET);
    std::fs::write(&at, format!("{}\n", target.name)).map_err(|e| system(&at, &e))?;
    println!("{count} kernels for {}, {compiled} of them machine code, {} bytes", target.name, bytes.len());
    Ok(())
}

fn unpack(folder: &Path) -> Result<(&'static GpuTarget, Vec<Ready>)> {
    let at = folder.join(TARGET);
    let name = std::fs::read_to_string(&at)
        .map_err(|e| system(&at, &e).help("`gpu-check pack` makes the folder"))?;
    let target = gpu_target(name.trim()).map_err(|e| Diag::input(e).in_file(at.display().to_string()))?;
    let at = folder.join(KERNELS);
    let bytes = std::fs::read(&at).map_err(|e| system(&at, &e))?;
    let place = |what: String| Diag::input(what).in_file(at.display().to_string());
    let code = GpuCode::decode_file(&bytes).map_err(|e| place(e.to_string()))?;
    let read = |entry: GpuEntry| {
        let want = serde_json::from_str(&entry.spec)
            .map_err(|e| place(format!("the spec of {}: {e}", entry.symbol)))?;
        ready(want, entry.cubin, target)
    };
    Ok((target, code.kernels.into_iter().map(read).collect::<Result<_>>()?))
}

/// Whether all is right.
fn run(folder: &Path, only: Option<&str>) -> Result<bool> {
    let (target, kernels) = unpack(folder)?;
    let asked = |part: &str| only.is_none_or(|only| only == part);
    let device_error = |e: quantc_runtime::Error| Diag::target(format!("no GPU to check: {e}"));
    let mut driver: Box<dyn Driver> = gpu::driver().map_err(device_error)?;
    let device = driver.device().map_err(device_error)?;
    let gpu = Gpu {
        arch: target.gpu.arch.into(),
        page_rows: plan::PAGE,
        cuda: 0,
        kernels: vec![],
        sampler: String::new(),
    };
    println!("# {} with kernels for {}\n", device.name, target.name);
    if asked("facts") {
        println!("| fact | |\n|---|---|");
        println!("| compute capability | {}.{} |", device.capability.0, device.capability.1);
        println!("| driver knows CUDA | {}.{} |", device.cuda / 1000, device.cuda % 1000 / 10);
        println!("| multiprocessors | {} |", device.multiprocessors);
        println!("| memory, free of all | {:.1} of {:.1} GiB |\n", gib(device.free), gib(device.total));
    }
    let mut right = true;
    if asked("kernels") {
        right &= measure::correctness(driver.as_mut(), &gpu, &kernels)?;
    }
    if asked("engines") {
        right &= engines::compare(folder)?;
    }
    if asked("speed") {
        measure::speed(driver.as_mut(), &gpu, &kernels, target)?;
        engines::beside();
    }
    println!(
        "\n{}",
        if right { "All that was checked is right." } else { "**Something is wrong: see above.**" }
    );
    Ok(right)
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
