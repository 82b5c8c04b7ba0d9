//! The `quantc` tool: a list of subcommands.
fn main() {}
