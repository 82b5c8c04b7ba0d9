//! What a machine with a GPU is asked: whether kernels are right, how fast they are, and whether engines give there what
//! they give on a processor. `make gpu-check` builds and packs it; `docs/gpu.md` tells what it prints.
//!
//! ```text
//! gpu-check model FOLDER                              a model of 8 billion weights, with holes for them
//! gpu-check plan ENGINE OUT                           what of such a model's engine is not weights
//! gpu-check pack FOLDER [--target NAME] [--small]     where NVRTC is: compiles the kernels of the tables
//! gpu-check run FOLDER [--only PART] [--seconds N] [--small] [--interpreted]
//!                                                     where the GPU is: all parts, as Markdown
//! ```
//!
//! Exit codes: 0 all is right and as fast as wanted, 1 something is wrong or there is no GPU, 2 the command line was wrong, 3
//! results are right and something is slower than wanted or was not reached in time.

mod attention;
mod ceilings;
mod correctness;
mod cublas;
mod device;
mod engines;
mod facts;
mod inputs;
mod interpreted;
mod kernel;
mod model;
mod parts;
mod products;
mod random;
mod reference;
mod report;
mod rows;
mod sanitizer;
mod table;
mod torch;
mod whole;

use parts::Options;
use quantc::ir::diag::{Diag, Result};
use quantc::ir::target::GpuTarget;
use quantc_codegen::targets::GPUS;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

/// Seconds of a run unless asked otherwise: with what parts may take longer, below nine minutes.
const SECONDS: f64 = 505.0;

enum Command {
    Model { folder: PathBuf },
    Plan { engine: PathBuf, out: PathBuf },
    Pack { folder: PathBuf, target: &'static GpuTarget, small: bool },
    Run(Options),
}

const USAGE: &str = "usage: gpu-check model FOLDER, gpu-check plan ENGINE OUT, gpu-check pack FOLDER [--target NAME] [--small], \
                     or gpu-check run FOLDER [--only PART] [--seconds N] [--small] [--interpreted]";

/// Reads the command line; what is wrong with it.
fn parse(args: &[String]) -> std::result::Result<Command, String> {
    let [what, folder, rest @ ..] = args else { return Err(USAGE.into()) };
    let folder = PathBuf::from(folder);
    let value = |name: &str, value: Option<&String>| value.cloned().ok_or(format!("`{name}` needs a value"));
    let other = |option: &str| Err(format!("there is no option `{option}`; {USAGE}"));
    let mut options = rest.iter();
    match what.as_str() {
        "model" => match rest {
            [] => Ok(Command::Model { folder }),
            [option, ..] => other(option),
        },
        "plan" => match rest {
            [out] => Ok(Command::Plan { engine: folder, out: out.into() }),
            _ => Err(USAGE.into()),
        },
        "pack" => {
            let (mut target, mut small) = ("cuda-sm90".to_string(), false);
            while let Some(option) = options.next() {
                match option.as_str() {
                    "--target" => target = value(option, options.next())?,
                    "--small" => small = true,
                    option => return other(option),
                }
            }
            Ok(Command::Pack { folder, target: gpu_target(&target)?, small })
        }
        "run" => {
            let (mut only, mut seconds, mut small, mut interpreted) = (None, SECONDS, false, false);
            let (mut from, mut scratch) = (None, None);
            while let Some(option) = options.next() {
                let number = |text: String| text.parse().map_err(|_| format!("`{option}` needs a number"));
                match option.as_str() {
                    "--only" => only = Some(value(option, options.next())?),
                    "--seconds" => seconds = number(value(option, options.next())?)?,
                    "--small" => small = true,
                    "--interpreted" => interpreted = true,
                    // How a part is started in a process of its own.
                    "--from" => from = Some(number(value(option, options.next())?)? as usize),
                    "--scratch" => scratch = Some(PathBuf::from(value(option, options.next())?)),
                    option => return other(option),
                }
            }
            if !(0.0..=86400.0).contains(&seconds) {
                return Err("`--seconds` needs a number up to 86400".into());
            }
            let inside = from.zip(scratch);
            match &only {
                Some(part) if !parts::names().contains(&part.as_str()) => {
                    Err(format!("there is no part `{part}`; parts are {}", parts::names().join(", ")))
                }
                _ => Ok(Command::Run(Options { folder, only, seconds, small, interpreted, inside })),
            }
        }
        other => Err(format!("there is no command `{other}`; {USAGE}")),
    }
}

/// The target of this name, or what targets there are.
pub fn gpu_target(name: &str) -> std::result::Result<&'static GpuTarget, String> {
    let names = || GPUS.iter().map(|g| g.name).collect::<Vec<_>>().join(", ");
    GPUS.iter()
        .copied()
        .find(|g| g.name == name)
        .ok_or_else(|| format!("there is no GPU target `{name}`: {}", names()))
}

/// Whether kernels are run by the interpreter.
static INTERPRETED: AtomicBool = AtomicBool::new(false);

/// Whether kernels are run by the interpreter, in place of a GPU.
pub fn interpreted() -> bool {
    INTERPRETED.load(Ordering::Relaxed)
}

/// What the system says of a file.
pub fn system(path: &Path, e: &std::io::Error) -> Diag {
    Diag::system(e.to_string()).in_file(path.display().to_string())
}

fn done(outcome: Result<()>) -> Result<ExitCode> {
    outcome.map(|()| ExitCode::SUCCESS)
}

fn run(options: &Options) -> Result<ExitCode> {
    INTERPRETED.store(options.interpreted, Ordering::Relaxed);
    match &options.inside {
        Some((from, scratch)) => {
            parts::inside(options, *from, scratch).map(|verdict| ExitCode::from(verdict.code()))
        }
        None => parts::run(options),
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match parse(&args) {
        Err(what) => {
            eprintln!("error: {what}");
            return ExitCode::from(2);
        }
        Ok(Command::Model { folder }) => done(model::write(&folder)),
        Ok(Command::Plan { engine, out }) => done(whole::plan(&engine, &out)),
        Ok(Command::Pack { folder, target, small }) => {
            done(kernel::pack(&folder, target, table::all(small, &target.gpu)))
        }
        Ok(Command::Run(options)) => run(&options),
    };
    outcome.unwrap_or_else(|diag| {
        eprintln!("error: {diag}");
        ExitCode::FAILURE
    })
}
