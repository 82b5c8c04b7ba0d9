//! The `quantc` tool.

fn main() -> std::process::ExitCode {
    quantc::main_with(quantc::passes::Registry::builtin())
}
