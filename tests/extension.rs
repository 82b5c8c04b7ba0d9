//! The crate of the guide `docs/writing-a-pass.md` builds against this repository, and its tool does what the guide says.
//!
//! It is built as a newcomer builds it, into the folder where this test was built, so that what it depends on outside
//! of this repository is there already. The packages of this repository are built again, unoptimized: in another
//! workspace cargo counts them as others.
#![cfg(feature = "llvm")]

#[expect(dead_code, reason = "every test program uses a part of it")]
mod markdown;

use markdown::Block;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What cargo builds for the crate alone: the repository's packages, the crate itself, and outside packages that tests of
/// the repository use with more features; and what the workspace does not optimize either.
const UNOPTIMIZED: [&str; 18] = [
    "quantc",
    "quantc-ir",
    "quantc-passes",
    "quantc-codegen",
    "quantc-frontends",
    "quantc-runtime",
    "my-quantc",
    "aho-corasick",
    "clap",
    "clap_builder",
    "fancy-regex",
    "gemm-c32",
    "gemm-c64",
    "regex",
    "regex-automata",
    "rustix",
    "terminal_size",
    "tokenizers",
];

fn build(krate: &Path) -> PathBuf {
    let tool = markdown::tool();
    let target =
        tool.parent().and_then(Path::parent).expect("the tool lies in a folder of the target folder");
    let lock = std::fs::copy(markdown::root().join("Cargo.lock"), krate.join("Cargo.lock"));
    lock.expect("the repository is writable");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--offline", "--quiet", "--manifest-path"]).arg(krate.join("Cargo.toml"));
    cargo.arg("--target-dir").arg(target);
    // As in the manifest of the workspace, so that outside packages are shared with it.
    cargo.args(["--config", "profile.dev.opt-level=1"]);
    if std::env::var_os("CARGO_PROFILE_DEV_DEBUG").is_none() {
        cargo.args(["--config", "profile.dev.debug='line-tables-only'"]);
    }
    for package in UNOPTIMIZED {
        cargo.args(["--config", &format!("profile.dev.package.{package}.opt-level=0")]);
    }
    let out = cargo.output().expect("cargo runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    target.join("debug").join("my-quantc")
}

#[test]
fn a_tool_with_another_pass() {
    let krate = markdown::root().join("tests/extension");
    let tool = build(&krate);
    let said = |blocks: &[Block], i: usize| {
        let block = &blocks[i];
        (block.head == "console extension")
            .then(|| markdown::session(block, &krate, "cargo run --quiet --", &tool))
    };
    let seen = markdown::settle_blocks("docs/writing-a-pass.md", said);
    assert!(seen >= 3, "only {seen} blocks of commands were seen");
}
