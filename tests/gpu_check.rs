//! The tool that checks a machine with a GPU, on a machine without one: packing, arguments, what it says of kernels that are right
//! and of some that are not, and that a part that fails does not take the others with it.
#![cfg(feature = "cuda")]

mod common;

use common::folder;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Exit code, stdout and stderr.
fn check(args: &[&str], libraries: Option<&Path>, variables: &[(&str, &str)]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpu-check"));
    command.args(args).env_remove("QUANTC_NVRTC");
    let nothing = folder().join("nothing");
    std::fs::create_dir_all(&nothing).expect("the target folder is writable");
    let libraries = libraries.unwrap_or(&nothing);
    command
        .env("LD_LIBRARY_PATH", libraries)
        .env("QUANTC_CUBLASLT", libraries)
        .envs(variables.iter().copied());
    let out = command.output().expect("the tool starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it prints UTF-8");
    (out.status.code().unwrap_or(-1), text(out.stdout), text(out.stderr))
}

/// A folder of small tables.
fn packed() -> &'static str {
    static PACKED: OnceLock<PathBuf> = OnceLock::new();
    let pack = || {
        let to = folder().join("packed");
        let name = to.to_str().expect("UTF-8");
        let (code, out, err) = check(&["pack", name, "--target", "cuda-sm90", "--small"], None, &[]);
        assert_eq!(code, 0, "{err}");
        assert!(out.contains("kernels for cuda-sm90"), "{out}");
        to
    };
    PACKED.get_or_init(pack).to_str().expect("UTF-8")
}

/// Rows of tables that say of a kernel what became of it.
fn rows<'a>(out: &'a str, about: &str) -> Vec<&'a str> {
    out.lines().filter(|l| l.starts_with('|') && l.contains(about)).collect()
}

const TEMPLATES: [&str; 13] = [
    "skinny",
    "wide",
    "mixed",
    "group",
    "tiles",
    "row",
    "rope",
    "gather",
    "cache_append",
    "decode_attention",
    "prefill_attention",
    "plain",
    "sample",
];

#[test]
fn arguments_are_checked() {
    let parts =
        "parts are facts, ceilings, kernels, engines, pytorch, rows, products, attention, whole, sanitizer";
    for (args, part) in [
        (&[][..], "usage:"),
        (&["pack"], "usage:"),
        (&["plan", "x"], "usage:"),
        (&["model", "x", "y"], "there is no option `y`"),
        (&["measure", "x"], "there is no command `measure`"),
        (&["pack", "x", "--target", "cuda-sm70"], "there is no GPU target `cuda-sm70`: cuda-sm80, cuda-sm89"),
        (&["pack", "x", "--target"], "`--target` needs a value"),
        (&["run", "x", "--seconds", "soon"], "`--seconds` needs a number"),
        (&["run", "x", "--seconds", "-1"], "`--seconds` needs a number up to 86400"),
        (&["run", "x", "--only", "weather"], &format!("there is no part `weather`; {parts}")),
    ] {
        let (code, _, err) = check(args, None, &[]);
        assert_eq!(code, 2, "{args:?}: {err}");
        assert!(err.contains(part), "{args:?}: {err}");
    }
    let (code, _, err) = check(&["run", "no-such-folder"], None, &[]);
    assert_eq!(code, 1);
    assert!(err.contains("`gpu-check pack` makes the folder"), "{err}");
}

#[test]
fn without_a_gpu_it_says_so() {
    let (code, out, err) = check(&["run", packed(), "--only", "facts"], None, &[]);
    if code == 0 {
        return eprintln!("skipped: this machine has a GPU");
    }
    assert_eq!(code, 1, "{out}");
    assert!(err.contains("no GPU to check") || out.contains("compute capability"), "{err}");
}

/// References, bounds and inputs are right: kernels that are right, run by the interpreter, pass.
#[test]
fn kernels_that_are_right_pass() {
    let (code, out, err) =
        check(&["run", packed(), "--only", "kernels", "--small", "--interpreted"], None, &[]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("All that was checked is right"), "{out}");
    for template in TEMPLATES {
        let told = rows(&out, &format!("`{template}_"));
        assert!(!told.is_empty() && told.iter().all(|row| row.ends_with("| right |")), "{template}: {out}");
    }
}

/// A device whose kernels do nothing is found out, kernel by kernel.
#[test]
fn kernels_that_do_nothing_are_found_out() {
    let Some(libraries) = common::fake_cuda() else { return };
    let (code, out, err) = check(&["run", packed(), "--only", "kernels", "--small"], Some(libraries), &[]);
    assert_eq!(code, 1, "{err}");
    assert!(out.contains("Something is wrong"), "{out}");
    for template in TEMPLATES {
        let told = rows(&out, &format!("`{template}_"));
        assert!(!told.is_empty(), "{template}: {out}");
        assert!(told.iter().all(|r| r.contains("**wrong**") && r.contains("expected")), "{template}: {out}");
    }
}

/// Whatever a driver refuses is told, and what follows is looked at in another process.
#[test]
fn a_lost_device_does_not_end_a_part() {
    let Some(libraries) = common::fake_cuda() else { return };
    let run = ["run", packed(), "--only", "kernels", "--small"];
    let (code, out, err) = check(&run, Some(libraries), &[("FAKE_CUDA_LOST", "4")]);
    assert_eq!(code, 1, "{err}");
    let lost = rows(&out, "launch").len();
    assert!(lost > 4, "{lost}: {out}");
    for template in TEMPLATES {
        assert!(!rows(&out, &format!("`{template}_")).is_empty(), "{template}: {out}");
    }
}

/// Everything from the first part to the last, on a device that does nothing: each part says its own, none hides another.
#[test]
fn all_parts_are_told_whatever_becomes_of_them() {
    let Some(libraries) = common::fake_cuda() else { return };
    let run = ["run", packed(), "--small"];
    let (code, out, err) = check(&run, Some(libraries), &[]);
    assert_eq!(code, 1, "{err}");
    for heading in [
        "# Fake GPU with kernels for cuda-sm90",
        "## Facts",
        "## Ceilings",
        "## Kernels",
        "## Engines",
        "## PyTorch",
        "## Rows",
        "## Products",
        "## Attention",
        "## Whole models",
        "## compute-sanitizer",
        "## Parts",
    ] {
        assert!(out.lines().any(|l| l == heading), "{heading}: {out}");
    }
    for said in [
        "| compute capability | 9.0 |",
        "| bf16 | cuBLASLt 13.1.0 |",
        "There are no engines",
        "There are no plans",
        "RMS norm, f32 to bf16",
    ] {
        assert!(out.contains(said), "{said}: {out}");
    }
    // Products and attention are checked as they are timed.
    assert!(rows(&out, "small 512 x 512, ").len() >= 3, "{out}");
    assert!(out.contains("attention of 1 tokens, cache of bf16, token 0: number"), "{out}");
    let parts = out.split("## Parts").nth(1).expect("it is there");
    for (part, verdict) in
        [("facts", "right"), ("kernels", "**wrong**"), ("products", "**wrong**"), ("engines", "right")]
    {
        assert!(rows(parts, part).iter().any(|r| r.contains(verdict)), "{part}: {parts}");
    }
}

/// A part whose time is over says what it left out.
#[test]
fn time_is_kept() {
    let Some(libraries) = common::fake_cuda() else { return };
    let run = ["run", packed(), "--small", "--only", "kernels", "--seconds", "0"];
    let (code, out, err) = check(&run, Some(libraries), &[]);
    assert_eq!(code, 3, "{out}{err}");
    assert!(out.contains("more rows were left out: the part's time was over"), "{out}");
    assert!(
        out.contains("Results are right; something is slower than wanted, or was not reached in time."),
        "{out}"
    );
}

/// A plan is an engine without its large weights, which are made where it is run. What they give are numbers, and a device
/// that does nothing is found out.
#[cfg(feature = "llvm")]
#[test]
fn engines_without_weights_are_filled() {
    let recipe = common::Recipe::preset(common::models("tales-3M"), "w4a16-g128").target("cuda-sm90");
    let engine = recipe.with(&["--context", "256", "--chunk", "16", "--agreement", "0"]).built().path;
    let to = folder().join("with-plan");
    let (name, plan) = (to.to_str().expect("UTF-8"), to.join("tales.plan"));
    let (code, _, err) = check(&["pack", name, "--small"], None, &[]);
    assert_eq!(code, 0, "{err}");
    let (engine, plan) = (engine.to_str().expect("UTF-8"), plan.to_str().expect("UTF-8"));
    let (code, out, err) = check(&["plan", engine, plan], None, &[]);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("bytes of weights"), "{out}");
    assert!(!Path::new(plan).join("weights.bin").exists());
    let (code, out, err) = check(&["run", name, "--only", "whole", "--interpreted"], None, &[]);
    assert!(code == 0 || code == 3, "{out}{err}");
    assert!(rows(&out, "| tales | prompt of 4 tokens |").len() == 1, "{out}");
    assert!(rows(&out, "| tales | 1 sequences |").len() == 1, "{out}");
    let Some(libraries) = common::fake_cuda() else { return };
    let (code, out, _) = check(&["run", name, "--only", "whole"], Some(libraries), &[]);
    assert_eq!(code, 1, "{out}");
    assert!(out.contains("logits are no numbers or all the same"), "{out}");
}
