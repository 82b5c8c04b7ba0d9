//! NVIDIA's driver as the runtime calls it, against libraries that stand in for it: what is called, what is given back, and
//! what is said where it is missing or does not suffice.
#![cfg(all(feature = "llvm", feature = "cuda"))]

mod common;

use common::{Done, Recipe, command, fake_cuda, folder, models};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Runs the tool where these libraries are found.
fn run(libraries: &Path, args: &[&str], variables: &[(&str, &str)]) -> Done {
    let mut command = command(args);
    command.env("LD_LIBRARY_PATH", libraries).env_remove("QUANTC_NVRTC").envs(variables.iter().copied());
    let out = command.output().expect("the tool starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the tool prints UTF-8");
    Done { code: out.status.code().unwrap_or(-1), out: text(out.stdout), err: text(out.stderr) }
}

/// An engine whose kernels are text, so that it takes the compiler too.
fn engine() -> PathBuf {
    let recipe = Recipe::preset(models("tales-3M"), "w4a16-g128").target("cuda-sm90");
    recipe.with(&["--context", "512", "--chunk", "80"]).built().path
}

#[test]
fn what_is_called_is_undone() {
    let Some(libraries) = fake_cuda() else { return };
    let engine = engine();
    let engine = engine.to_str().expect("UTF-8");
    let log = folder().join("calls.txt");
    let log = log.to_str().expect("UTF-8");
    let done = run(
        libraries,
        &["run", engine, "--prompt", "Once", "--max-tokens", "4", "--ignore-eos", "--json"],
        &[("FAKE_CUDA_LOG", log)],
    );
    assert_eq!(done.code, 0, "{}", done.err);
    assert_eq!(common::one_object(&done.out)["tokens"].as_array().map(Vec::len), Some(4), "{}", done.out);
    let calls = std::fs::read_to_string(log).expect("calls were written down");
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for (name, _) in calls.lines().filter_map(|line| line.split_once(' ')) {
        *counts.entry(name).or_default() += 1;
    }
    eprintln!("{counts:?}");
    for (made, undone) in [
        ("context", "release"),
        ("stream", "destroy-stream"),
        ("alloc", "free"),
        ("pin", "unpin"),
        ("event", "destroy-event"),
        ("module", "unload"),
        ("graph", "destroy-graph"),
        ("capture", "captured"),
    ] {
        assert!(counts.get(made).is_some_and(|n| *n > 0), "{made}");
        assert_eq!(counts.get(made), counts.get(undone), "{made} and {undone}");
    }
    // A graph for the prompt, and one for single tokens, which is replayed.
    assert_eq!((counts["graph"], counts["replay"]), (2, 4));
    // Kernels before weights, weights before anything runs, and the context last.
    let place = |name: &str| calls.lines().position(|line| line.starts_with(name)).expect("it was called");
    let order = [
        "context", "stream", "module", "alloc", "pin", "upload", "capture", "launch", "graph", "replay",
        "download",
    ];
    let places: Vec<usize> = order.iter().map(|name| place(name)).collect();
    assert!(places.is_sorted(), "{order:?}: {places:?}");
    assert!(calls.trim_end().ends_with("release 1"));
    // Blocks with more shared memory than is given unasked were asked for.
    assert!(
        calls.lines().any(|line| line
            .strip_prefix("shared ")
            .is_some_and(|n| n.parse::<u32>().is_ok_and(|n| n > 49152)))
    );
}

#[test]
fn other_commands_find_the_device_too() {
    let Some(libraries) = fake_cuda() else { return };
    let engine = engine();
    let engine = engine.to_str().expect("UTF-8");
    let text = models("tales_eval.txt");
    let bench = ["bench", engine, "--prompt-tokens", "70", "--gen-tokens", "2", "--repeat", "1", "--profile"];
    let eval = ["eval", engine, "--text", text.to_str().expect("UTF-8"), "--max-tokens", "600", "--json"];
    for args in [&bench[..], &eval] {
        let done = run(libraries, args, &[]);
        assert_eq!(done.code, 0, "{args:?}: {}", done.err);
    }
}

#[test]
fn what_is_missing_is_told_before_anything_is_done() {
    let Some(libraries) = fake_cuda() else { return };
    let engine = engine();
    let engine = engine.to_str().expect("UTF-8");
    let log = folder().join("refused.txt");
    let log = log.to_str().expect("UTF-8");
    let cases = [
        (("FAKE_CUDA_INIT", "100"), "the engine's kernels run on a GPU, and this machine has none"),
        (("FAKE_CUDA_INIT", "999"), "the GPU's driver cannot start: CUDA_ERROR_UNKNOWN"),
        (
            ("FAKE_CUDA_CAPABILITY", "80"),
            "this machine's Fake GPU has compute capability 8.0; compile the model for `cuda-sm80`",
        ),
        (
            ("FAKE_CUDA_FREE", "1000000"),
            "bytes of device memory, but 1000000 of the 1073741824 of Fake GPU are free",
        ),
    ];
    for (variable, part) in cases {
        let done = run(libraries, &["run", engine, "--prompt", "x"], &[variable, ("FAKE_CUDA_LOG", log)]);
        assert_eq!(done.code, 1, "{variable:?}: {}", done.err);
        assert!(done.err.contains(part), "{variable:?}: {}", done.err);
        assert_eq!(done.err.matches("error:").count(), 1, "{}", done.err);
    }
    let calls = std::fs::read_to_string(log).expect("contexts were made");
    assert!(!calls.lines().any(|line| line.starts_with("alloc") || line.starts_with("module")), "{calls}");

    let only = |names: &[&str]| {
        let to = folder().join(names.join("-") + "-only");
        std::fs::create_dir_all(&to).expect("the target folder is writable");
        for name in names {
            std::fs::copy(libraries.join(name), to.join(name)).expect("it was built");
        }
        to
    };
    let done = run(&only(&["libnvrtc.so"]), &["run", engine, "--prompt", "x"], &[]);
    match done.code {
        0 => eprintln!("skipped: this machine has a driver"),
        _ => assert!(
            done.err.contains("NVIDIA driver") || done.err.contains("compute capability"),
            "{}",
            done.err
        ),
    }
    let done = run(&only(&["libcuda.so"]), &["run", engine, "--prompt", "x"], &[]);
    match done.code {
        0 => eprintln!("skipped: this machine has NVRTC"),
        _ => assert!(done.err.contains("no NVRTC to compile them"), "{}", done.err),
    }
}
