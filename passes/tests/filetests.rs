//! Every `tests/filetests/<pass>/*.qir`: runs the pipeline of its `// run:` line and compares with the snapshot beside it.
//!
//! `// target: test` chooses the target of the tests. Passes that promise to keep results are held to it: the module is
//! evaluated before and after, on random weights and inputs.

mod harness;

use quantc_ir::text;
use quantc_ir::weights::Store;
use quantc_passes::pass::Numerics;
use quantc_passes::{Registry, pipeline};
use std::path::Path;

#[test]
fn filetests() {
    insta::glob!("../../tests/filetests", "*/*.qir", |path| {
        let source = std::fs::read_to_string(path).expect("the glob lists files");
        // Files without a pipeline belong to other tests.
        if !source.lines().any(|l| l.starts_with("// run:")) {
            return;
        }
        let mut settings = insta::Settings::clone_current();
        settings.set_snapshot_path(path.parent().expect("files lie in folders"));
        settings.set_prepend_module_to_snapshot(false);
        settings.remove_snapshot_suffix();
        settings.set_omit_expression(true);
        let name = path.file_stem().expect("files have names").to_string_lossy().into_owned();
        settings.bind(|| insta::assert_snapshot!(name, outcome(path, &source)));
    });
}

fn outcome(path: &Path, source: &str) -> String {
    let parsed = harness::module(source);
    let run = &parsed.directive("run").expect("checked by the caller").to_string();
    let target = parsed.directive("target").is_some();
    let store = Store::in_memory();
    let mut module = parsed.module;
    let mut text = match harness::run(&mut module, &store, run, target) {
        Err(problems) => return format!("{problems}\n"),
        Ok(report) => report.remarks.to_string().lines().map(|l| format!("// {l}\n")).collect::<String>(),
    };
    module.pipeline = None;
    harness::inline_small_blobs(&mut module, &store);
    text += &text::print(&module);
    keeps_results(path, source, run, target);
    text
}

/// Results before and after, when no pass of the pipeline rounds anything to fewer bits.
fn keeps_results(path: &Path, source: &str, run: &str, target: bool) {
    let registry = Registry::builtin();
    let store = Store::in_memory();
    let mut before = harness::module(source).module;
    harness::randomize(&mut before, &store);
    let parsed = pipeline::parse(run).expect("the pipeline ran");
    let checked = pipeline::check(&parsed, &registry, &before, None, None);
    let rounds =
        |c: &pipeline::Checked| c.passes().iter().any(|p| p.info().numerics == Numerics::Requantizes);
    // Layers without a main are not evaluated: nothing says what they are given.
    if checked.as_ref().map_or(true, rounds) || before.main.results.is_empty() {
        return;
    }
    let mut after = before.clone();
    harness::run(&mut after, &store, run, target).expect("it ran on other numbers");
    // What keeps states goes on from call to call as the other does in one call.
    let is_whole = before.facts.get("sequence").is_some_and(|s| s == "whole");
    let (a, b) = if after.states.len() > before.states.len() {
        (harness::evaluate_at_once(&before, &store), harness::evaluate_in_parts(&after, &store))
    } else if is_whole {
        (harness::evaluate_at_once(&before, &store), harness::evaluate_at_once(&after, &store))
    } else {
        (harness::evaluate(&before, &store), harness::evaluate(&after, &store))
    };
    let distance = harness::distance(&a, &b);
    assert!(distance < 1e-5, "{}: results differ by {distance}", path.display());
}
