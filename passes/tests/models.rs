//! The canonical passes on whole models: they are cut where their blocks are, and compute what they computed.

#[expect(dead_code, reason = "every test program uses a part of it")]
mod harness;

use quantc_ir::eval::{Evaluator, Tensor};
use quantc_ir::module::Module;
use quantc_ir::ops::Op;
use quantc_ir::text;
use quantc_ir::ty::{Dim, TensorTy};
use quantc_ir::weights::Store;
use std::path::Path;

/// The graph of a bundled model as its importer made it, and a store with its files.
fn model(name: &str) -> (Module, Store) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let snapshot = root.join(format!("frontends/tests/graphs/{name}.snap"));
    let snapshot = std::fs::read_to_string(snapshot).expect("the graph is kept by the importer's tests");
    let start = snapshot.find("module @").expect("a snapshot holds a module");
    let module = text::parse(&snapshot[start..], name).unwrap_or_else(|e| panic!("{e}")).module;
    let store = Store::in_memory();
    for (id, shard) in module.shards.iter() {
        let file = root.join("tests/models").join(name).join(&shard.file);
        store.add_shard(id, file).unwrap_or_else(|e| panic!("{e}"));
    }
    (module, store)
}

/// The names of the layers, and how far results are from those of the flat module.
fn canonical(name: &str, pipeline: &str) -> (Vec<String>, f32) {
    let (before, store) = model(name);
    let mut after = before.clone();
    if let Err(e) = harness::run(&mut after, &store, pipeline, false) {
        panic!("{name}: {e}");
    }
    let layers = after.layers.values().map(|l| l.name.clone()).collect();
    let (a, b) = (harness::evaluate(&before, &store), harness::evaluate(&after, &store));
    (layers, harness::distance(&a, &b))
}

#[test]
fn decoders_are_cut_at_their_blocks() {
    for name in ["tiny-gpt2", "tiny-llama3", "tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-sharded-llama"]
    {
        let (layers, distance) = canonical(name, "outline-layers, fold-constants, dedupe, drop-dead");
        assert_eq!(layers, ["embed", "l0", "l1", "head"], "{name}");
        assert_eq!(distance, 0.0, "{name}");
    }
}

#[test]
fn the_last_block_of_a_decoder_computes_wanted_rows_only() {
    for name in ["tiny-gpt2", "tiny-llama3", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"] {
        let (before, store) = model(name);
        let mut after = before.clone();
        if let Err(e) = harness::run(&mut after, &store, "outline-layers, narrow-rows", false) {
            panic!("{name}: {e}");
        }
        let block = &after.layers[after.layer("l1").expect("the last block")].graph;
        let of_results = |op: fn(&Op) -> bool| {
            block.ops().filter(|(_, n)| op(&n.op)).map(|(_, n)| block.ty(n.result)).all(wanted)
        };
        assert!(of_results(|op| matches!(op, Op::Attention(_))), "{name}");
        assert!(wanted(block.ty(block.results[0])), "{name}");
        let products = block.ops().filter(|(_, n)| matches!(n.op, Op::MatMul(_)));
        let all_rows = products.filter(|(_, n)| !wanted(block.ty(n.result))).count();
        assert!((1..=2).contains(&all_rows), "{name}: keys and values alone are made of all rows");
        let ids = Tensor::i32(&[7], vec![3, 1, 4, 1, 5, 9, 2]).expect("ids");
        for rows in [0, 1, 3, 7] {
            let run = |m: &Module| {
                let mut evaluator = Evaluator::new(m, &store).expect("it verifies");
                evaluator.step(std::slice::from_ref(&ids), rows).expect("it runs").remove(0)
            };
            assert_eq!(
                run(&before).f32s().expect("f32"),
                run(&after).f32s().expect("f32"),
                "{name}, {rows} rows"
            );
        }
    }
}

fn wanted(ty: &TensorTy) -> bool {
    ty.shape.0.first() == Some(&Dim::Sym('r'))
}

#[test]
fn an_encoder_is_cut_at_its_blocks() {
    let (layers, distance) = canonical("tiny-bert", "outline-layers, fold-constants, dedupe, drop-dead");
    assert_eq!(layers, ["embed", "l0", "l1"]);
    assert_eq!(distance, 0.0);
}

#[test]
fn gains_fold_without_changing_results() {
    for name in ["tiny-bert", "tiny-gpt2", "tiny-llama3", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"] {
        let run = "outline-layers, fold-constants, fold-norm-gain, dedupe, drop-dead";
        let (_, distance) = canonical(name, run);
        assert!(distance < 1e-5, "{name}: {distance}");
    }
}

#[test]
fn blocks_of_a_model_are_one_region() {
    use quantc_passes::analysis::{Analyses, Function, RegionHash};
    let (mut module, store) = model("tiny-llama3");
    harness::run(&mut module, &store, "outline-layers", false).expect("it runs");
    let mut analyses = Analyses::default();
    let mut hash = |name: &str| {
        let id = module.layer(name).expect("it was made");
        analyses.get::<RegionHash>(&module, Function::Layer(id)).expect("it is computed").0
    };
    assert_eq!(hash("l0"), hash("l1"));
    assert_ne!(hash("l0"), hash("head"));
}
