//! Passes that divide channels change no result, whatever graph they meet, and say what they leave alone.
//!
//! Everything here runs with data, so that places are really divided; results are compared with those of the graph before, by
//! the evaluator, apart from the check that the passes make themselves.

#[expect(dead_code, reason = "every test program uses a part of it")]
mod harness;

use harness::{distance, evaluate, module, randomize};
use quantc_ir::module::Module;
use quantc_ir::weights::{Store, WeightSource};
use quantc_passes::calib::{Calibrator, Data, Reference};
use quantc_passes::manager::{self, Report};
use quantc_passes::pass::{Env, Fact, Session};
use quantc_passes::{Registry, pipeline};
use std::sync::Arc;

/// A module that embeds tokens as `%x`, 8 columns, and computes `%y` from them.
fn text(declared: &str, body: &str) -> String {
    format!(
        "module @m {{context=16, vocab=32}}\nweight @table : tensor<32x8xf32> = splat 1.0\n{declared}\n\
         main (%ids: tensor<?txi32>) -> tensor<?tx8xf32> {{\n%x = embedding %ids, @table\n{body}\nreturn %y\n}}\n"
    )
}

fn weights(all: &[(&str, &str)]) -> String {
    all.iter().map(|(name, ty)| format!("weight @{name} : tensor<{ty}xf32> = splat 1.0\n")).collect()
}

/// Runs a pipeline on a module with random weights. Returns how far results move, and what the passes told.
fn run(source: &str, passes: &str) -> (f32, Report, Module) {
    let store = Store::in_memory();
    let mut module = module(source).module;
    randomize(&mut module, &store);
    let (moved, report) = run_on(&mut module, &store, passes);
    (moved, report, module)
}

/// As [`run`], on a module as it is.
fn run_on(module: &mut Module, store: &Store, passes: &str) -> (f32, Report) {
    let before = evaluate(module, store);
    let parsed = pipeline::parse(passes).unwrap_or_else(|e| panic!("{e}"));
    let checked = pipeline::check_given(&parsed, &Registry::builtin(), module, None, None, &[Fact::Data]);
    let checked = checked.unwrap_or_else(|e| panic!("{e}"));
    let mut session = Session::default();
    let tokens = (0..64).map(|i| (i * 7 + i / 5) % 32).collect();
    let data = Data { name: "test".into(), tokens, ..Data::default() };
    session.put(Calibrator::new(data, Arc::new(Reference)));
    let report =
        manager::run(module, &checked, Env::new(store), session, &mut []).unwrap_or_else(|e| panic!("{e}"));
    (distance(&before, &evaluate(module, store)), report)
}

const SMOOTH: &str = "calibrate{samples=4, length=6, stats=[absmax]}, smoothquant{alpha=0.8}";
const SMOOTH_CACHE: &str = "calibrate{samples=4, length=6, stats=[cache]}, smooth-cache";

/// Runs and demands equal results; returns the remarks of the pass.
fn remarks(source: &str, passes: &str) -> String {
    let (moved, report, _) = run(source, passes);
    assert!(moved < 1e-5, "results move by {moved}\n{source}");
    let told = report.remarks.0.iter().filter(|r| r.pass != "calibrate");
    told.map(|r| format!("{}: {}\n", r.place, r.text)).collect()
}

#[test]
fn norms_and_products_are_divided() {
    let declared =
        weights(&[("g", "8"), ("b", "8"), ("up", "12x8"), ("ub", "12"), ("gate", "12x8"), ("down", "8x12")]);
    let body = "%n = layernorm %x, @g, @b\n%u = matmul %n, @up\n%v = add %u, @ub\n%g = matmul %n, @gate\n%s = silu %g\n\
                %m = mul %s, %v\n%y = matmul %m, @down";
    let told = remarks(&text(&declared, body), SMOOTH);
    assert!(told.contains("%n in @main: norm into 2 matrices"), "{told}");
    assert!(told.contains("%m in @main: product into 1 matrices"), "{told}");
}

#[test]
fn a_norm_without_gain_gets_one() {
    let told = remarks(&text(&weights(&[("w", "8x8")]), "%n = rmsnorm %x\n%y = matmul %n, @w"), SMOOTH);
    assert!(told.contains("norm into 1 matrices"), "{told}");
}

#[test]
fn what_a_factor_would_not_pass_through_is_left_alone() {
    let cases = [
        // Squared: the factor would count twice.
        ("square", "%u = matmul %x, @a\n%m = mul %u, %u\n%y = matmul %m, @b", "no factor of it is a product"),
        // The gain of a norm of heads is shared by them.
        (
            "heads",
            "%h = reshape %x {shape=?tx2x4}\n%n = rmsnorm %h, @g4\n%m = reshape %n {shape=?tx8}\n%y = matmul %m, @a",
            "normed by heads",
        ),
        // So is a bias that is added to each head.
        (
            "bias of heads",
            "%u = matmul %x, @a\n%h = reshape %u {shape=?tx2x4}\n%i = add %h, @g4\n%m = reshape %i {shape=?tx8}\n\
             %y = matmul %m, @b",
            "a vector of 4 is added",
        ),
        ("also read", "%u = matmul %x, @a\n%z = matmul %u, @b\n%y = add %z, %u", "`add` reads it too"),
        ("bent", "%u = matmul %x, @a\n%m = silu %u\n%y = matmul %m, @b", "`silu` makes it"),
    ];
    let declared = weights(&[("a", "8x8"), ("b", "8x8"), ("g4", "4")]);
    for (name, body, why) in cases {
        let told = remarks(&text(&declared, body), SMOOTH);
        assert!(told.contains(why), "{name}: `{why}` is not in\n{told}");
    }
}

/// Attention with two query heads for one of the keys and values, rotated.
fn attention(style: &str, between: &str, k: &str) -> String {
    let declared = weights(&[("q", "8x8"), ("k", "4x8"), ("v", "4x8"), ("vb", "4"), ("o", "8x8")])
        + "state @ks : tensor<16x1x4xf32>\nstate @vs : tensor<16x1x4xf32>";
    let body = format!(
        "%p = positions\n%t = rope_table %p {{size=4}}\n%q0 = matmul %x, @q\n%q1 = reshape %q0 {{shape=?tx2x4}}\n\
         %q = rope %q1, %t {{style={style}}}\n%k0 = matmul %x, @k\n%k1 = reshape %k0 {{shape=?tx1x4}}\n\
         %k = rope %k1, %t {{style={style}}}\n%v0 = matmul %x, @v\n%v1 = add %v0, @vb\n%v = reshape %v1 {{shape=?tx1x4}}\n\
         %ka = cache_append @ks, {k}\n%va = cache_append @vs, %v\n%a = attention %q, %ka, %va {{scale=0.5}}\n\
         %m = reshape %a {{shape=?tx8}}\n%z = matmul %m, @o\n{between}"
    );
    text(&declared, &body)
}

#[test]
fn values_and_keys_of_shared_heads_are_divided() {
    let plain = "%y = add %z, %z";
    for style in ["half", "interleaved"] {
        let told = remarks(&attention(style, plain, "%k"), SMOOTH);
        assert!(told.contains("values of shared heads into 1 matrices"), "{told}");
        let told = remarks(&attention(style, plain, "%k"), SMOOTH_CACHE);
        assert!(told.contains("keys by factors") && told.contains("values by factors"), "{told}");
    }
}

/// Some channels of keys and values are sixteen times as large, and what reads them as much smaller.
#[test]
fn channels_out_of_proportion_are_brought_back_and_others_stay() {
    let store = Store::in_memory();
    let numbers = |module: &Module, name: &str| -> Vec<f32> {
        // What was made last.
        let found = module.weights.iter().rfind(|(_, w)| w.name == name || w.name == format!("{name}.even"));
        store.view(&module.weights, found.expect("it is declared").0).unwrap().read_all_f32().unwrap()
    };
    let changed = |twin: bool, aim: &str| -> Vec<f32> {
        let mut module = module(&attention("half", "%y = add %z, %z", "%k")).module;
        randomize(&mut module, &store);
        // Key channels 1 and 3 are rotated together; two query heads share the head of keys and values.
        let scale = |name: &str, by: &dyn Fn(usize, usize) -> f32| {
            let xs = numbers(&module, name);
            let columns = if name == "vb" { 1 } else { 8 };
            let xs = xs.iter().enumerate().map(|(i, x)| x * by(i / columns, i % columns));
            (name.to_string(), xs.flat_map(f32::to_le_bytes).collect::<Vec<u8>>())
        };
        let scaled = [
            scale("k", &|row, _| if row % 2 == 1 { 16.0 } else { 1.0 }),
            scale("q", &|row, _| if row % 2 == 1 { 1.0 / 16.0 } else { 1.0 }),
            scale("v", &|row, _| if row == 2 { 16.0 } else { 1.0 }),
            scale("vb", &|row, _| if row == 2 { 16.0 } else { 1.0 }),
            scale("o", &|_, column| if column % 4 == 2 { 1.0 / 16.0 } else { 1.0 }),
        ];
        for (name, bytes) in scaled.into_iter().filter(|_| twin) {
            let (_, decl) = module.weights.iter_mut().find(|(_, w)| w.name == name).expect("it is declared");
            decl.source = WeightSource::Inline(bytes);
        }
        let before = ["k", "v"].map(|name| numbers(&module, name)).concat();
        let (moved, _) = run_on(&mut module, &store, &SMOOTH_CACHE.replace("smooth-cache", aim));
        assert!(moved < 1e-5, "results move by {moved}");
        let after = ["k", "v"].map(|name| numbers(&module, name)).concat();
        // What the rows of keys, then of values, were divided by.
        before.iter().zip(&after).step_by(8).map(|(before, after)| before / after).collect()
    };
    assert_eq!(changed(false, "smooth-cache{aim=usual}"), [1.0; 8]);
    assert!(changed(false, "smooth-cache").iter().any(|&by| by != 1.0));
    let by = changed(true, "smooth-cache{aim=usual}");
    for (row, by) in by.into_iter().enumerate() {
        match row {
            1 | 3 | 6 => assert!((4.0..64.0).contains(&by), "row {row} is divided by {by}"),
            _ => assert_eq!(by, 1.0, "row {row}"),
        }
    }
}

#[test]
fn cached_rows_that_are_read_elsewhere_are_left_alone() {
    // The keys as they go into the cache are read again, and so are the values.
    let again = "%kk = reshape %k {shape=?tx4}\n%kz = matmul %kk, @ko\n%vv = reshape %v {shape=?tx4}\n\
                 %vz = matmul %vv, @ko\n%kv = add %kz, %vz\n%y = add %z, %kv";
    let source = attention("half", again, "%k")
        .replace("weight @q ", "weight @ko : tensor<8x4xf32> = splat 1.0\nweight @q ");
    let told = remarks(&source, SMOOTH_CACHE);
    assert!(told.contains("keys left as they are") && told.contains("values left as they are"), "{told}");
    // Rows before the rotation are read again.
    let again = "%kk = reshape %k1 {shape=?tx4}\n%kz = matmul %kk, @ko\n%y = add %z, %kz";
    let source = attention("half", again, "%k")
        .replace("weight @q ", "weight @ko : tensor<8x4xf32> = splat 1.0\nweight @q ");
    let told = remarks(&source, SMOOTH_CACHE);
    assert!(told.contains("keys left as they are") && told.contains("values by factors"), "{told}");
}

#[test]
fn attention_without_a_cache_is_left_alone() {
    let declared = weights(&[("q", "8x8"), ("k", "8x8"), ("v", "8x8"), ("o", "8x8")]);
    let body = "%q0 = matmul %x, @q\n%q = reshape %q0 {shape=?tx2x4}\n%k0 = matmul %x, @k\n%k = reshape %k0 {shape=?tx2x4}\n\
                %v0 = matmul %x, @v\n%v = reshape %v0 {shape=?tx2x4}\n%a = attention %q, %k, %v {causal=false, scale=0.5}\n\
                %m = reshape %a {shape=?tx8}\n%y = matmul %m, @o";
    let told = remarks(&text(&declared, body), SMOOTH_CACHE);
    assert!(told.contains("keys left as they are: they go into no cache"), "{told}");
}
