//! Running pipelines: hooks, failures, determinism and reuse of derived weights.

#[expect(dead_code, reason = "every test program uses a part of it")]
mod harness;

use quantc_ir::diag::Kind;
use quantc_ir::text;
use quantc_ir::weights::Store;
use quantc_passes::Registry;
use quantc_passes::manager::{self, Hook, LayerAt, PrintIr, Reproduce, VerifyEach, When};
use quantc_passes::pass::prelude::*;
use quantc_passes::pass::{Env, Session};
use quantc_passes::pipeline::{Checked, check, parse};
use std::sync::atomic::AtomicBool;

quantc_passes::pass! {
    /// Does something wrong, in a way that can be chosen.
    "misbehave" => pub struct Misbehave {
        /// How.
        how: String = "panic".into(),
    }
    scope: Layer, numerics: Exact, stats: keeps
}

impl Pass for Misbehave {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        match self.how.as_str() {
            "panic" => panic!("index out of range"),
            "input" => Err(Diag::input("the matrix is singular")),
            "break" => {
                let result = cx.graph().results[0];
                cx.graph_mut().value_mut(result).ty = TensorTy::fixed(ElemTy::F32, &[1]);
                Ok(Changed::Yes)
            }
            _ => Ok(Changed::Yes),
        }
    }
}

const LAYERS: &str = "module @m
weight @w : tensor<4x4xf32> = splat 1.0
weight @q : tensor<2x4x!q<int8:f32 axis 0>> = inline [[1, 2, 3, 4], [5, 6, 7, 8]]
weight @s : tensor<2x1xf32> = splat 0.5
layer @l0 (%x: tensor<?tx4xf32>) -> tensor<?tx4xf32> {
  %a = silu %x
  %b = silu %x
  %c = add %a, %b
  %t = transpose @w
  %y = matmul %c, %t
  return %y
}
layer @l1 (%x: tensor<?tx4xf32>) -> tensor<?tx2xf32> {
  %w = dequantize @q, @s
  %y = matmul %x, %w
  return %y
}
main (%x: tensor<?tx4xf32>) -> tensor<?tx2xf32> {
  %h = call %x {layer=l0}
  %y = call %h {layer=l1}
  return %y
}
";

fn checked(module: &Module, pipeline: &str) -> Checked {
    let registry = Registry::builtin().with(Misbehave::INFO);
    let parsed = parse(pipeline).expect("the pipeline is written by the test");
    check(&parsed, &registry, module, None, None).expect("the pipeline is written by the test")
}

fn run(pipeline: &str, hooks: &mut [&mut dyn Hook]) -> (Module, Result<manager::Report>) {
    let store = Store::in_memory();
    let mut module = harness::module(LAYERS).module;
    let pipeline = checked(&module, pipeline);
    let report = manager::run(&mut module, &pipeline, Env::new(&store), Session::default(), hooks);
    (module, report)
}

#[test]
fn a_broken_module_is_a_bug_of_the_pass() {
    let error = run("misbehave{how=break}", &mut [&mut VerifyEach]).1.err().expect("the module is broken");
    assert_eq!(error.kind, Kind::Bug);
    assert!(error.message.starts_with("`misbehave` left a module that does not verify"), "{error}");
    assert!(error.message.contains("// ^ error"), "shown in the listing: {error}");
    assert_eq!(error.context, ["running `misbehave` on @l0"]);
}

#[test]
fn a_panic_is_a_bug_with_a_file_that_shows_it_again() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut reproduce = Reproduce::new(dir.path());
    let error = run("layers(dedupe, misbehave)", &mut [&mut reproduce]).1.err().expect("it panics");
    assert_eq!(error.kind, Kind::Bug);
    assert!(error.message.contains("index out of range"), "{error}");
    let path = reproduce.written().expect("a file was written").clone();
    assert!(error.context.iter().any(|c| c.contains(&path.display().to_string())), "{error}");
    let written = std::fs::read_to_string(path).expect("it can be read");
    // The layer as it was before the failing pass: without the second silu.
    insta::assert_snapshot!(written);
    let again = harness::module(&written);
    assert_eq!(again.directive("run"), Some("misbehave{how=panic}"));
    let store = Store::in_memory();
    let mut module = again.module;
    let pipeline = checked(&module, "misbehave{how=panic}");
    let error = manager::run(&mut module, &pipeline, Env::new(&store), Session::default(), &mut []).err();
    assert!(error.expect("it fails again").message.contains("index out of range"));
}

#[test]
fn an_error_names_pass_and_layer() {
    let error = run("layers(dedupe, misbehave{how=input})", &mut []).1.err().expect("it fails");
    assert_eq!(error.to_string(), "the matrix is singular\n  while: running `misbehave` on @l0");
}

#[test]
fn what_changed_is_printed() {
    let mut out = vec![];
    let mut print = PrintIr::new(When::Change, Box::new(&mut out));
    run("layers(dedupe, fold-constants)", &mut [&mut print]).1.expect("it runs");
    drop(print);
    insta::assert_snapshot!(String::from_utf8(out).expect("text"));
}

#[test]
fn repeat_ends_or_says_so() {
    run("repeat(dedupe, fold-constants)", &mut [&mut VerifyEach]).1.expect("it ends");
    let error = run("repeat(misbehave{how=never-done})", &mut []).1.err().expect("it does not end");
    assert_eq!(error.kind, Kind::Pipeline);
    assert!(error.message.contains("32 rounds"), "{error}");
}

#[test]
fn a_stop_cuts_the_pipeline() {
    let module = harness::module(LAYERS).module;
    let cut = checked(&module, "layers(dedupe, fold-constants), drop-dead").stopped_after("dedupe");
    assert_eq!(cut.expect("it is there").to_string(), "layers(dedupe)");
    let error = checked(&module, "layers(dedupe)").stopped_after("dedup").expect_err("it is not there");
    assert_eq!(error.help.as_deref(), Some("did you mean `dedupe`?"));
}

#[test]
fn an_interruption_ends_the_run() {
    let store = Store::in_memory();
    let mut module = harness::module(LAYERS).module;
    let pipeline = checked(&module, "dedupe");
    let stop = AtomicBool::new(true);
    let env = Env { interrupt: Some(&stop), ..Env::new(&store) };
    let error = manager::run(&mut module, &pipeline, env, Session::default(), &mut []).err();
    assert_eq!(error.expect("it is stopped").kind, Kind::System);
}

#[test]
fn layers_are_told_in_order() {
    #[derive(Default)]
    struct Progress(Vec<String>);
    impl Hook for Progress {
        fn after_layer(&mut self, at: &LayerAt) {
            self.0.push(format!("{} {}/{}", at.name, at.index + 1, at.total));
        }
    }
    let mut progress = Progress::default();
    let (module, report) = run("layers(dedupe), drop-dead", &mut [&mut progress]);
    assert_eq!(progress.0, ["l0 1/2", "l1 2/2"]);
    assert_eq!(module.pipeline.as_deref(), Some("layers(dedupe), drop-dead"));
    let names: Vec<&str> =
        report.as_ref().expect("it runs").timing.steps().iter().map(|n| n.name.as_str()).collect();
    assert_eq!(names, ["layers", "drop-dead"]);
    assert_eq!(report.expect("it runs").timing.steps()[0].parts[0].count, 2);
}

#[test]
fn a_second_run_derives_nothing_again() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let pipeline = "fold-constants, cast-weights{to=bf16}, drop-dead";
    let once = || {
        let store = Store::open(dir.path()).expect("a store");
        let mut module = harness::module(LAYERS).module;
        let pipeline = checked(&module, pipeline);
        manager::run(&mut module, &pipeline, Env::new(&store), Session::default(), &mut []).expect("it runs");
        (text::print(&module), store.stats())
    };
    let ((first, made), (second, reused)) = (once(), once());
    assert_eq!(first, second);
    assert_eq!((made.made, reused.made, reused.reused), (2, 0, 2));
}
