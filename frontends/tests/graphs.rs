//! The graph of each architecture as text, next to this file in `graphs/`.

mod common;

use common::{load, model_dir};
use quantc_ir::{text, verify};

fn check(model: &str) {
    let loaded = load(&model_dir(model));
    let module = &loaded.imported.module;
    let len = |shard| loaded.store.shard_len(shard);
    if let Err(errors) = verify::verify_with_files(module, &len) {
        panic!("{}", errors.show(module));
    }
    let printed = text::print(module);
    let read = text::parse(&printed, "printed.qir").unwrap_or_else(|e| panic!("{e}"));
    assert!(text::same(&read.module, module), "{model} does not read back");

    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("graphs");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(model, printed));
}

macro_rules! graphs {
    ($($test:ident: $model:literal),* $(,)?) => {$(
        #[test]
        fn $test() {
            check($model);
        }
    )*};
}

graphs! {
    bert: "tiny-bert",
    gpt2: "tiny-gpt2",
    llama: "tiny-llama3",
    llama_in_shards: "tiny-sharded-llama",
    mistral: "tiny-mistral",
    qwen2: "tiny-qwen2",
    qwen3: "tiny-qwen3",
}
