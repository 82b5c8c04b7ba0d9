//! Imported models compute what their authors' code computes.

mod common;

use common::{Golden, Loaded, eval_with, load, max_difference, model_dir, outer_model_dir};
use quantc_frontends::arch::Kind;
use quantc_frontends::{ImportOptions, Tokenizer, import};
use quantc_ir::eval::Evaluator;
use quantc_ir::ops::{Attention, Op};
use quantc_ir::weights::{Store, WeightSource};
use std::path::Path;

/// Compares logits of `dir` with its golden file; returns the largest difference.
fn decoder_difference(dir: &Path) -> f32 {
    let model = load(dir);
    assert_eq!(model.imported.facts.kind, Kind::Decoder);
    let golden = Golden::open(&dir.join("golden.safetensors"));
    let (_, ids) = golden.ids("input_ids");
    let (_, want) = golden.f32s("logits_f32");
    max_difference(&model.eval(&[ids]), &want)
}

/// What is computed token by token is what is computed at once.
fn check_steps(model: &Loaded, ids: &[i32]) {
    let whole = model.eval(&[ids.to_vec()]);
    let width = whole.len() / ids.len();
    let mut evaluator = Evaluator::new(&model.imported.module, &model.store).unwrap();
    let mut stepped = vec![];
    // One token, then some, then the rest one by one.
    let (first, some) = (1.min(ids.len()), 4.min(ids.len()));
    for part in [&ids[..first], &ids[first..some]].into_iter().chain(ids[some..].chunks(1)) {
        stepped.extend(eval_with(&mut evaluator, &[part.to_vec()]));
    }
    assert_eq!(stepped.len(), ids.len() * width);
    assert_eq!(stepped, whole, "steps differ from one call");
}

// The authors' code sums in f32, which alone is off by up to 1.2e-5 from f64; leaving out a detail shows from 1e-3 on.
macro_rules! decoders {
    ($($test:ident: $dir:literal within $tolerance:literal),* $(,)?) => {$(
        #[test]
        fn $test() {
            let dir = model_dir($dir);
            let difference = decoder_difference(&dir);
            assert!(difference <= $tolerance, "differs by {difference}");
            let model = load(&dir);
            let (_, ids) = Golden::open(&dir.join("golden.safetensors")).ids("input_ids");
            check_steps(&model, &ids[..ids.len().min(12)]);
            assert!(model.imported.unused.is_empty(), "{:?}", model.imported.unused);
        }
    )*};
}

decoders! {
    llama3_scales_its_rotary_positions: "tiny-llama3" within 2e-5,
    mistral_sees_a_window: "tiny-mistral" within 2e-5,
    qwen2_adds_biases: "tiny-qwen2" within 2e-5,
    qwen3_norms_queries_and_keys: "tiny-qwen3" within 2e-5,
    gpt2_turns_its_weights: "tiny-gpt2" within 2e-5,
    shards_are_read_through_the_index: "tiny-sharded-llama" within 2e-5,
    tales_are_told: "tales-3M" within 2e-5,
}

#[test]
fn bert_encodes() {
    let dir = model_dir("tiny-bert");
    let model = load(&dir);
    assert_eq!(model.imported.facts.kind, Kind::Encoder);
    let golden = Golden::open(&dir.join("golden.safetensors"));
    let (ids, types) = (golden.ids("input_ids").1, golden.ids("token_type_ids").1);
    let difference = max_difference(&model.eval(&[ids, types]), &golden.f32s("last_hidden_state").1);
    assert!(difference <= 5e-6, "differs by {difference}");
    assert!(model.imported.unused.is_empty(), "{:?}", model.imported.unused);
}

#[test]
fn other_peoples_decoders() {
    for name in ["stories260K", "babyllama-char105", "tales-3M"] {
        let Some(dir) = outer_model_dir(name) else { return };
        let difference = decoder_difference(&dir);
        assert!(difference <= 5e-5, "{name} differs by {difference}");
    }
}

#[test]
fn another_gpt2_block_by_block() {
    let Some(dir) = outer_model_dir("gpt-nano-sort") else { return };
    let model = load(&dir);
    let golden = Golden::open(&dir.join("golden_activations.safetensors"));
    let (shape, ids) = golden.f32s("idx");
    let (batch, tokens) = (shape[0], shape[1]);
    let named = [
        ("l0_norm1", "ln1"),
        ("l0_act", "gelu"),
        ("l0_mid", "attnResid"),
        ("l0_out", "block0"),
        ("l1_out", "block1"),
        ("l2_out", "block2"),
        ("normed", "ln_f"),
        ("logits", "lm_head"),
    ];
    let known: Vec<(&str, Vec<f32>)> =
        named.iter().map(|(ours, theirs)| (*ours, golden.f32s(theirs).1)).collect();
    for b in 0..batch {
        let row: Vec<i32> = ids[b * tokens..][..tokens].iter().map(|&x| x as i32).collect();
        let graph = &model.imported.module.main;
        let seen = std::cell::Cell::new(0);
        let tap = |_: &str, v: quantc_ir::entity::ValueId, x: &quantc_ir::eval::Tensor| {
            let name = graph.value(v).name.as_deref().unwrap_or_default();
            let Some((_, all)) = known.iter().find(|k| k.0 == name) else { return };
            let want = &all[b * all.len() / batch..][..all.len() / batch];
            let difference = max_difference(x.f32s().unwrap(), want);
            assert!(difference <= 5e-5, "%{name} of prompt {b} differs by {difference}");
            seen.set(seen.get() + 1);
        };
        let mut evaluator = Evaluator::new(&model.imported.module, &model.store).unwrap().with_tap(&tap);
        eval_with(&mut evaluator, &[row]);
        assert_eq!(seen.get(), known.len());
    }
}

#[test]
fn a_sentence_encoder() {
    let Some(dir) = outer_model_dir("all-MiniLM-L6-v2") else { return };
    let model = load(&dir);
    let golden = Golden::open(&dir.join("golden.safetensors"));
    let (shape, ids) = golden.ids("input_ids");
    let (mask, types) = (golden.ids("attention_mask").1, golden.ids("token_type_ids").1);
    let (_, want) = golden.f32s("last_hidden_state");
    let width = want.len() / ids.len();
    let sentences: Vec<String> =
        serde_json::from_slice(&std::fs::read(dir.join("golden_sentences.json")).unwrap()).unwrap();
    let tokenizer = Tokenizer::open(&dir.join("tokenizer.json")).unwrap();
    for (b, sentence) in sentences.iter().enumerate().take(shape[0]) {
        let at = b * shape[1];
        let n = mask[at..at + shape[1]].iter().filter(|&&m| m == 1).count();
        let part = |x: &[i32]| x[at..at + n].to_vec();
        let encoded: Vec<i32> = tokenizer.encode(sentence, true).unwrap().iter().map(|&i| i as i32).collect();
        assert_eq!(encoded, part(&ids), "{}", sentence);
        let difference =
            max_difference(&model.eval(&[part(&ids), part(&types)]), &want[at * width..(at + n) * width]);
        assert!(difference <= 2e-5, "sentence {b} differs by {difference}");
    }
}

/// The model writes on as it did for its authors, with keys and values kept between steps.
#[test]
fn greedy_text_is_the_same() {
    let dir = model_dir("tales-3M");
    let model = load(&dir);
    let golden = Golden::open(&dir.join("golden.safetensors"));
    let (prompt, want) = (golden.ids("greedy_prompt_ids").1, golden.ids("greedy_ids").1);
    let mut evaluator = Evaluator::new(&model.imported.module, &model.store).unwrap();
    let vocab = model.imported.facts.vocab as usize;
    let mut ids = prompt.clone();
    let mut logits = eval_with(&mut evaluator, &[prompt]);
    while ids.len() < want.len() {
        let last = &logits[logits.len() - vocab..];
        let best = (0..vocab).fold(0, |best, i| if last[i] > last[best] { i } else { best });
        ids.push(best as i32);
        logits = eval_with(&mut evaluator, &[vec![best as i32]]);
    }
    assert_eq!(ids, want);
}

#[test]
fn facts_come_from_the_files() {
    let facts = |name: &str| load(&model_dir(name)).imported;
    let tales = facts("tales-3M");
    assert_eq!((tales.facts.bos, tales.facts.eos.as_slice()), (Some(0), &[1][..]));
    assert_eq!((tales.facts.context, tales.facts.vocab), (512, 1024));
    assert_eq!(tales.module.facts["kind"], "decoder");
    assert_eq!(tales.module.facts["eos"], "1");
    assert!(tales.tokenizer.is_some_and(|p| p.ends_with("tokenizer.json")));
    // No start token anywhere; the end token stands in config.json.
    let qwen = facts("tiny-qwen2");
    assert_eq!((qwen.facts.bos, qwen.facts.eos.as_slice()), (None, &[271][..]));
    assert!(facts("tiny-gpt2").tokenizer.is_none());
}

#[test]
fn a_tied_head_is_an_alias() {
    let source = |name: &str, weight: &str| {
        let module = load(&model_dir(name)).imported.module;
        let id = module.weight(weight).unwrap();
        match module.weights[id].source {
            WeightSource::Alias(of) => Some(module.weights[of].name.clone()),
            _ => None,
        }
    };
    assert_eq!(source("tiny-qwen2", "head").as_deref(), Some("embed"));
    assert_eq!(source("tiny-gpt2", "head").as_deref(), Some("embed"));
    assert_eq!(source("tiny-llama3", "head"), None);
}

#[test]
fn the_context_can_be_chosen() {
    let with = |name: &str, context| {
        import(&model_dir(name), &Store::in_memory(), &ImportOptions { context: Some(context) })
    };
    let module = with("tiny-llama3", 20).unwrap().module;
    assert_eq!(module.facts["context"], "20");
    assert!(module.states.values().all(|s| s.ty.to_string() == "tensor<20x2x8xf32>"));
    for (name, context) in [("tiny-gpt2", 17), ("tiny-llama3", 0)] {
        let text = with(name, context).unwrap_err().to_string();
        assert!(text.contains(&format!("a context of {context} tokens is asked for")), "{text}");
    }
}

/// A copy of a model's folder in which files may be changed.
fn copy_of(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(model_dir(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

/// Replaces a part of a file's text, which must occur.
fn replace(dir: &Path, file: &str, from: &str, to: &str) {
    let text = std::fs::read_to_string(dir.join(file)).unwrap();
    assert!(text.contains(from), "{from} not in {file}");
    std::fs::write(dir.join(file), text.replace(from, to)).unwrap();
}

fn refusal(dir: &Path) -> String {
    match import(dir, &Store::in_memory(), &ImportOptions::default()) {
        Ok(_) => panic!("imported"),
        Err(problems) => problems.to_string(),
    }
}

#[test]
fn qwen2_windows_begin_at_a_layer() {
    let windows = |edits: &[(&str, &str)]| -> Vec<u32> {
        let dir = copy_of("tiny-qwen2");
        for (from, to) in edits {
            replace(dir.path(), "config.json", from, to);
        }
        let module = load(dir.path()).imported.module;
        let window = |n: &quantc_ir::graph::Node| n.op.is::<Attention>().map(|a| a.window);
        module.main.ops().filter_map(|(_, n)| window(n)).collect()
    };
    let using = ("\"use_sliding_window\": false", "\"use_sliding_window\": true");
    let no_types = ("\"layer_types\"", "\"no_layer_types\"");
    let first = ("\"max_window_layers\": 0", "\"max_window_layers\": 1");
    assert_eq!(windows(&[]), [0, 0]);
    assert_eq!(windows(&[using]), [0, 0]);
    assert_eq!(windows(&[using, no_types]), [6, 6]);
    assert_eq!(windows(&[using, no_types, first]), [0, 6]);
    assert_eq!(windows(&[no_types]), [0, 0]);
    assert_eq!(windows(&[using, ("\"full_attention\"\n", "\"sliding_attention\"\n")]), [0, 6]);
}

#[test]
fn configurations_are_checked_whole() {
    let dir = copy_of("tiny-llama3");
    replace(dir.path(), "config.json", "\"hidden_size\": 32", "\"hidden_size\": -32");
    replace(dir.path(), "config.json", "\"vocab_size\"", "\"no_vocab_size\"");
    replace(dir.path(), "config.json", "\"silu\"", "\"zelu\"");
    replace(dir.path(), "config.json", "\"llama3\"", "\"yarn\"");
    let text = refusal(dir.path());
    for want in
        ["`hidden_size` is -32", "`vocab_size` is missing", "`zelu`", "`rope_scaling.rope_type` is `yarn`"]
    {
        assert!(text.contains(want), "{want} not in {text}");
    }
    assert_eq!(text.matches("config.json, key").count(), 4, "{text}");
}

#[test]
fn configurations_and_weights_belong_together() {
    let edits = [
        ("tiny-llama3", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000", "of 2 layers only"),
        (
            "tiny-llama3",
            "\"intermediate_size\": 64",
            "\"intermediate_size\": 65",
            "has shape [64, 32], expected [65, 32]",
        ),
        (
            "tiny-llama3",
            "\"num_key_value_heads\": 2",
            "\"num_key_value_heads\": 3",
            "does not divide the 4 heads",
        ),
        ("tiny-llama3", "\"head_dim\": 8", "\"head_dim\": 7", "a positive even number"),
        (
            "tiny-llama3",
            "\"mlp_bias\": false",
            "\"mlp_bias\": true",
            "lacks 6 tensors: `model.layers.0.mlp.gate_proj.bias`",
        ),
        (
            "tiny-qwen2",
            "\"tie_word_embeddings\": true",
            "\"tie_word_embeddings\": false",
            "lacks 1 tensor: `lm_head.weight`",
        ),
        ("tiny-gpt2", "\"n_head\": 4", "\"n_head\": 5", "does not divide the width"),
        ("tiny-bert", "\"is_decoder\": false", "\"is_decoder\": true", "only encoders"),
        ("tiny-gpt2", "\"vocab_size\": 48", "\"vocab_size\": 1e3", "expected a whole number"),
    ];
    for (model, from, to, want) in edits {
        let dir = copy_of(model);
        replace(dir.path(), "config.json", from, to);
        let text = refusal(dir.path());
        assert!(text.contains(want), "{want} not in {text}");
    }
}

#[test]
fn what_is_not_read_is_told() {
    let dir = copy_of("tiny-llama3");
    replace(dir.path(), "config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
    let unused = load(dir.path()).imported.unused;
    assert_eq!(unused.len(), 9, "{unused:?}");
    assert!(unused.iter().all(|n| n.starts_with("model.layers.1.")));

    let dir = copy_of("tiny-llama3");
    replace(dir.path(), "config.json", "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
    assert!(load(dir.path()).imported.notes.iter().any(|n| n.contains("`lm_head.weight` is not read")));
}

#[test]
fn end_tokens_may_be_several_and_start_tokens_may_stand_in_the_tokenizer() {
    let dir = copy_of("tales-3M");
    replace(dir.path(), "generation_config.json", "\"eos_token_id\": 1", "\"eos_token_id\": [1, 5, 4000]");
    let imported = load(dir.path()).imported;
    assert_eq!(imported.facts.eos, [1, 5]);
    assert!(imported.notes.iter().any(|n| n.contains("beyond the vocabulary")));

    std::fs::remove_file(dir.path().join("generation_config.json")).unwrap();
    replace(dir.path(), "config.json", "\"bos_token_id\": 0", "\"bos_token_id\": null");
    assert_eq!(load(dir.path()).imported.facts.bos, Some(0));
    replace(dir.path(), "tokenizer_config.json", "\"<s>\"", "{\"content\": \"</s>\", \"lstrip\": false}");
    assert_eq!(load(dir.path()).imported.facts.bos, Some(1));
    replace(dir.path(), "tokenizer_config.json", "\"</s>\", \"lstrip\"", "\"<none>\", \"lstrip\"");
    assert_eq!(load(dir.path()).imported.facts.bos, None);
}

#[test]
fn the_tokenizer_decides_what_starts_a_text() {
    // As in Qwen 2.5: ids in both configurations, and a tokenizer that puts nothing in front of texts.
    let dir = copy_of("tales-3M");
    replace(dir.path(), "tokenizer_config.json", "\"<s>\"", "null");
    let imported = load(dir.path()).imported;
    assert_eq!((imported.facts.bos, imported.facts.eos.as_slice()), (None, &[1][..]));
    assert!(!imported.module.facts.contains_key("bos"));

    // Without the key the configurations decide.
    replace(dir.path(), "tokenizer_config.json", "\"bos_token\"", "\"pad_token\"");
    assert_eq!(load(dir.path()).imported.facts.bos, Some(0));

    // A token that the tokenizer names goes before an id that differs.
    let dir = copy_of("tales-3M");
    replace(dir.path(), "generation_config.json", "\"bos_token_id\": 0", "\"bos_token_id\": 7");
    assert_eq!(load(dir.path()).imported.facts.bos, Some(0));
}

#[test]
fn quantized_weights_are_refused_and_still_listed() {
    let dir = copy_of("tiny-llama3");
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    // The same bytes as twice as many 8-bit elements.
    let header = String::from_utf8_lossy(&bytes[..4096]).into_owned();
    let at =
        header.find("\"model.layers.0.mlp.up_proj.weight\":{\"dtype\":\"BF16\",\"shape\":[64,32]").unwrap();
    let at =
        String::from_utf8_lossy(&bytes[..at + 64]).find("\"BF16\",\"shape\":[64,32]").map(|_| at).unwrap();
    let entry = &mut bytes[at..at + 69];
    let new = String::from_utf8(entry.to_vec())
        .unwrap()
        .replace("\"BF16\"", "\"I8\"  ")
        .replace("[64,32]", "[64,64]");
    entry.copy_from_slice(new.as_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let text = refusal(dir.path());
    assert!(
        text.contains(
            "already quantized (I8 elements in 1 tensor, first `model.layers.0.mlp.up_proj.weight`)"
        ),
        "{text}"
    );
    let listed = quantc_frontends::Checkpoint::open(dir.path()).unwrap();
    assert_eq!(listed.tensors["model.layers.0.mlp.up_proj.weight"].info.dtype.name, "I8");
}

#[test]
fn missing_shards_are_named_together() {
    let dir = copy_of("tiny-sharded-llama");
    std::fs::remove_file(dir.path().join("model-00001-of-00003.safetensors")).unwrap();
    std::fs::remove_file(dir.path().join("model-00003-of-00003.safetensors")).unwrap();
    let text = refusal(dir.path());
    assert!(
        text.contains("2 of 3 shards are missing: model-00001-of-00003.safetensors, model-00003"),
        "{text}"
    );

    let dir = copy_of("tiny-sharded-llama");
    replace(
        dir.path(),
        "model.safetensors.index.json",
        "\"model-00003-of-00003.safetensors\"",
        "\"../a.safetensors\"",
    );
    assert!(refusal(dir.path()).contains("lies in `../a.safetensors`"));

    let dir = copy_of("tiny-sharded-llama");
    let wrong = "\"lm_head.weight\": \"model-00001-of-00003.safetensors\"";
    replace(
        dir.path(),
        "model.safetensors.index.json",
        "\"lm_head.weight\": \"model-00003-of-00003.safetensors\"",
        wrong,
    );
    assert!(refusal(dir.path()).contains("tensor `lm_head.weight` is not in `model-00001"));
}

#[test]
fn directories_without_a_model_say_what_they_lack() {
    let dir = tempfile::tempdir().unwrap();
    assert!(refusal(dir.path()).contains("config.json"));
    std::fs::copy(model_dir("tiny-llama3").join("config.json"), dir.path().join("config.json")).unwrap();
    assert!(refusal(dir.path()).contains("there is neither `model.safetensors` nor"));
    std::fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    assert!(refusal(dir.path()).contains("pickled weights are not read"));
}

#[test]
fn imports_are_the_same_every_time() {
    let dir = model_dir("tiny-qwen3");
    let (a, b) = (load(&dir).imported, load(&dir).imported);
    assert_eq!(a, b);
    let rope_tables = a.module.main.ops().filter(|(_, n)| matches!(n.op, Op::RopeTable(_))).count();
    assert_eq!(rope_tables, 1);
}
