//! The `quantc` tool as a library: a list of subcommands.
//!
//! A program outside of this workspace makes a tool with its own passes by calling [`main_with`]:
//!
//! ```no_run
//! # use quantc::passes::pass::PassInfo;
//! # fn my_pass() -> &'static PassInfo { quantc::passes::canon::DropDead::INFO }
//! fn main() -> std::process::ExitCode {
//!     quantc::main_with(quantc::passes::Registry::builtin().with(my_pass()))
//! }
//! ```
//!
//! Results go to stdout, everything else to stderr. `--json` prints one JSON object. Exit codes: 0 success, 1 the input
//! was refused, 2 the command line was wrong, 3 a gate failed.

pub use manual::tables;
pub use quantc_ir as ir;
pub use quantc_passes as passes;

#[cfg(feature = "llvm")]
mod agreement;
mod bench;
mod bench_graph;
#[cfg(feature = "llvm")]
mod cache_cost;
#[cfg(feature = "llvm")]
mod calibrate;
#[cfg(feature = "llvm")]
mod compile;
#[cfg(feature = "llvm")]
mod compile_graph;
mod embed;
mod eval;
mod eval_graph;
mod explain;
mod failure;
mod import;
mod inspect;
#[cfg(feature = "llvm")]
mod layer_exec;
mod manual;
#[cfg(feature = "llvm")]
pub mod measure;
mod opt;
mod output;
mod profile;
#[cfg(feature = "llvm")]
mod report;
mod run;
mod run_graph;
mod score;
mod subject;
mod text_model;
#[cfg(feature = "llvm")]
mod tune;

use clap::{Parser, Subcommand};
use quantc_passes::Registry;
use std::process::ExitCode;

/// A quantizing model compiler.
#[derive(Parser)]
#[command(name = "quantc", version, about, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compiles a model into an engine.
    #[cfg(feature = "llvm")]
    Compile(compile::Args),
    /// Writes statistics of a model on a text to a file, for `compile --stats`.
    #[cfg(feature = "llvm")]
    Calibrate(calibrate::Args),
    /// Generates text with an engine, or evaluates an `.onnx` graph.
    Run(run::Args),
    /// Embeds texts with an encoder's engine.
    Embed(embed::Args),
    /// Scores an engine or a model on a text, alone or against another.
    Eval(eval::Args),
    /// Measures the speed of an engine.
    Bench(bench::Args),
    /// Measures which kernels are fastest on this machine.
    #[cfg(feature = "llvm")]
    Tune(tune::Args),
    /// Runs a pipeline on a `.qir` file: text in, text out.
    Opt(opt::Args),
    /// Prints a model as `.qir` text.
    Import(import::Args),
    /// Shows what a model, an engine or a `.qir` file holds.
    Inspect(inspect::Args),
    /// Shows which kernels an engine has, and what was refused and why.
    Explain(explain::Args),
    /// The manual of passes.
    Passes(manual::Args),
    /// The manual of targets.
    Targets(manual::Args),
    /// The manual of number formats.
    Formats(manual::Args),
    /// The manual of ops.
    Ops(manual::Args),
    /// The manual of presets.
    Presets(manual::Args),
}

/// Runs the tool with the passes of `registry` on the command line of this process.
pub fn main_with(registry: Registry) -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        #[cfg(feature = "llvm")]
        Command::Compile(args) => compile::run(args, &registry),
        #[cfg(feature = "llvm")]
        Command::Calibrate(args) => calibrate::run(args),
        Command::Run(args) => run::run(args),
        Command::Embed(args) => embed::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Bench(args) => bench::run(args),
        #[cfg(feature = "llvm")]
        Command::Tune(args) => tune::run(args),
        Command::Opt(args) => opt::run(args, &registry),
        Command::Import(args) => import::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Explain(args) => explain::run(args),
        Command::Passes(args) => manual::passes(args, &registry),
        Command::Targets(args) => manual::targets(args),
        Command::Formats(args) => manual::formats(args),
        Command::Ops(args) => manual::ops(args),
        Command::Presets(args) => manual::presets(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
