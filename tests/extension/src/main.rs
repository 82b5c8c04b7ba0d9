//! The tool with one more pass.

mod approximate_gelu;

use approximate_gelu::ApproximateGelu;
use quantc::passes::Registry;
use std::process::ExitCode;

fn main() -> ExitCode {
    quantc::main_with(Registry::builtin().with(ApproximateGelu::INFO))
}
