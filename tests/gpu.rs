//! Engines for GPUs on a machine without one: compiled, opened, and run by the interpreter of tile IR.
#![cfg(feature = "llvm")]

mod common;

use common::device::{Asked, Interpreter, launched};
use common::{Built, Recipe, greedy, logits, models, relative};
use quantc_runtime::Engine;
use quantc_runtime::gpu::Loaded;
use quantc_runtime::session::{Session, SessionOptions};
use std::sync::Arc;

/// A small engine for a GPU: text kernels, so that nothing depends on what is installed.
fn small(preset: &str, target: &str) -> Recipe {
    let recipe = Recipe::preset(models("tales-3M"), preset).target(target);
    recipe.with(&["--chunk", "12", "--context", "128"])
}

/// The engine on a device of its own.
fn on_device(built: &Built) -> (Arc<Engine>, Arc<Loaded>) {
    let engine = built.open();
    let arch = engine.manifest().gpu.as_ref().expect("it is for a GPU").arch.clone();
    let loaded = engine.load_with(Box::new(Interpreter::new(&arch)));
    let loaded = loaded.unwrap_or_else(|e| panic!("{e}"));
    (engine, loaded)
}

fn session(engine: &Arc<Engine>, slots: u32) -> Session {
    let options = SessionOptions { slots, poison: true, ..SessionOptions::default() };
    Session::new(engine.clone(), &options).unwrap_or_else(|e| panic!("{e}"))
}

const PROMPT: [u32; 14] = [1, 403, 22, 7, 118, 9, 1001, 77, 640, 31, 5, 88, 12, 290];

/// The same numbers as an engine for a processor gives, to what rounding allows, over a prompt in chunks and single tokens.
#[test]
fn an_engine_gives_the_logits_of_one_for_processors() {
    for (preset, limit) in [("w4a16-g128", 2e-3), ("w4a8-g32", 2e-3)] {
        let built = small(preset, "cuda-sm90").built();
        let (engine, _loaded) = on_device(&built);
        let mut device = session(&engine, 1);
        let mut host = small(preset, "host").built().session(1);
        let (got, want) = (logits(&mut device, &PROMPT), logits(&mut host, &PROMPT));
        let apart = relative(&got, &want);
        eprintln!("{preset}: {apart:.2e}");
        assert!(apart < limit, "{preset}: {apart}");
        assert_eq!(greedy(&mut device, &PROMPT[..5], 2), greedy(&mut host, &PROMPT[..5], 2), "{preset}");
    }
}
