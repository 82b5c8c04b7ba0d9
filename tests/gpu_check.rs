//! The tool that checks a machine with a GPU, on a machine without one: packing, arguments, and what it says.
#![cfg(feature = "cuda")]

mod common;

use common::folder;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Exit code, stdout and stderr.
fn check(args: &[&str], libraries: Option<&Path>) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpu-check"));
    command.args(args).env_remove("QUANTC_NVRTC");
    let nothing = folder().join("nothing");
    std::fs::create_dir_all(&nothing).expect("the target folder is writable");
    command.env("LD_LIBRARY_PATH", libraries.unwrap_or(&nothing));
    let out = command.output().expect("the tool starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it prints UTF-8");
    (out.status.code().unwrap_or(-1), text(out.stdout), text(out.stderr))
}

fn packed() -> PathBuf {
    let to = folder().join("packed");
    let (code, out, err) =
        check(&["pack", to.to_str().expect("UTF-8"), "--target", "cuda-sm90", "--small"], None);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("kernels for cuda-sm90"), "{out}");
    to
}

#[test]
fn arguments_are_checked() {
    for (args, part) in [
        (&[][..], "usage:"),
        (&["pack"], "usage:"),
        (&["measure", "x"], "there is no command `measure`"),
        (&["pack", "x", "--target", "cuda-sm70"], "there is no GPU target `cuda-sm70`: cuda-sm80, cuda-sm89"),
        (&["pack", "x", "--target"], "`--target` needs a value"),
        (
            &["run", "x", "--only", "weather"],
            "there is no part `weather`; parts are facts, kernels, engines, speed",
        ),
    ] {
        let (code, _, err) = check(args, None);
        assert_eq!(code, 2, "{args:?}: {err}");
        assert!(err.contains(part), "{args:?}: {err}");
    }
    let (code, _, err) = check(&["run", "no-such-folder"], None);
    assert_eq!(code, 1);
    assert!(err.contains("`gpu-check pack` makes the folder"), "{err}");
}

#[test]
fn without_a_gpu_it_says_so() {
    let folder = packed();
    let (code, out, err) = check(&["run", folder.to_str().expect("UTF-8")], None);
    if code == 0 {
        return eprintln!("skipped: this machine has a GPU");
    }
    assert_eq!(code, 1, "{out}");
    assert!(err.contains("no GPU to check") || out.contains("compute capability"), "{err}");
}

/// A device whose kernels do nothing is found out, kernel by kernel.
#[test]
fn kernels_that_do_nothing_are_found_out() {
    let Some(libraries) = common::fake_cuda() else { return };
    let folder = packed();
    let (code, out, err) =
        check(&["run", folder.to_str().expect("UTF-8"), "--only", "kernels"], Some(libraries));
    assert_eq!(code, 1, "{err}");
    assert!(out.contains("Something is wrong"), "{out}");
    let rows: Vec<&str> = out.lines().filter(|l| l.starts_with("| `")).collect();
    assert!(rows.len() > 20, "{out}");
    assert!(rows.iter().all(|row| row.contains("**wrong**") && row.contains("expected")), "{out}");
    for template in
        ["skinny", "wide", "row", "rope", "gather", "cache_append", "decode_attention", "prefill_attention"]
    {
        assert!(rows.iter().any(|row| row.contains(template)), "{template}: {out}");
    }
}
