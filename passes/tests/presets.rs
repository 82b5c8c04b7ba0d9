//! Presets on a whole decoder: they run, and results stay as near as their bits allow. Those that take statistics are for
//! the tests of the whole tool.

#[expect(dead_code, reason = "every test program uses a part of it")]
mod harness;

use quantc_ir::ops::OpKind;
use quantc_ir::text;
use quantc_ir::weights::Store;
use quantc_passes::presets;

const DECODER: &str = include_str!("../../tests/filetests/outline-layers/decoder.qir");

/// How far results of a preset may be from those of the model, as a share of the largest number. The decoder has rows
/// of four numbers, over which errors hardly average out: rounding to bf16 alone makes 0.02.
fn allowed(name: &str) -> f32 {
    match name {
        "f32" => 1e-6,
        "bf16" | "w8a16" => 0.03,
        "w8a8" | "fp8" | "fp8-dynamic" => 0.1,
        _ => 0.4,
    }
}

#[test]
fn presets_keep_results_near() {
    for preset in presets::ALL.iter().filter(|p| !p.needs_data()) {
        let store = Store::in_memory();
        let mut module = harness::module(DECODER).module;
        harness::randomize(&mut module, &store);
        let before = harness::evaluate(&module, &store);
        if let Err(e) = harness::run(&mut module, &store, preset.pipeline, true) {
            panic!("{}: {e}", preset.name);
        }
        let after = harness::evaluate(&module, &store);
        let distance = harness::distance(&before, &after);
        assert!(distance <= allowed(preset.name), "{}: {distance}", preset.name);

        let products: Vec<OpKind> = module
            .graphs()
            .flat_map(|(_, g)| g.ops().map(|(_, n)| n.op.kind()).collect::<Vec<_>>())
            .filter(|k| matches!(k, OpKind::MatMul | OpKind::QMatMul))
            .collect();
        let want = if ["f32", "bf16"].contains(&preset.name) { OpKind::MatMul } else { OpKind::QMatMul };
        assert!(!products.is_empty() && products.iter().all(|&k| k == want), "{}: {products:?}", preset.name);
    }
}

/// Fusion is not what makes the difference: it keeps the results of the rounded model.
#[test]
fn fusion_keeps_what_rounding_left() {
    for preset in presets::ALL.iter().filter(|p| !p.needs_data()) {
        let results = |pipeline: &str| {
            let store = Store::in_memory();
            let mut module = harness::module(DECODER).module;
            harness::randomize(&mut module, &store);
            harness::run(&mut module, &store, pipeline, true)
                .unwrap_or_else(|e| panic!("{}: {e}", preset.name));
            harness::evaluate(&module, &store)
        };
        let unfused = preset.pipeline.replace("fuse-dequant-matmul, ", "").replace(", fuse-epilogue", "");
        assert!(!unfused.contains("fuse"), "{unfused}");
        let distance = harness::distance(&results(&unfused), &results(preset.pipeline));
        assert!(distance < 1e-6, "{}: {distance}", preset.name);
    }
}

#[test]
fn heads_of_four_bit_presets_have_eight() {
    let store = Store::in_memory();
    let mut module = harness::module(DECODER).module;
    harness::randomize(&mut module, &store);
    let preset = presets::Preset::get("w4a8-g32").unwrap();
    harness::run(&mut module, &store, preset.pipeline, true).unwrap_or_else(|e| panic!("{e}"));
    for (function, graph) in module.graphs() {
        for (_, node) in graph.ops().filter(|(_, n)| n.op.kind() == OpKind::QMatMul) {
            let format = |i: usize| graph.ty(node.args[i]).elem.scheme().map(|s| s.format.name);
            let weight = if function == "head" { "int8" } else { "int4" };
            assert_eq!((format(0), format(1)), (Some("int8"), Some(weight)), "@{function}");
        }
    }
    // What a preset makes can be written down and read back.
    harness::inline_small_blobs(&mut module, &store);
    let written = text::print(&module);
    assert_eq!(text::print(&harness::module(&written).module), written);
}
