//! Small models of every architecture against known results, and models that do not come with the repository when the
//! environment variable `QUANTC_MODELS` names a folder that has them.
#![cfg(feature = "llvm")]

mod common;

use common::{Golden, Recipe, greedy, json, logits, max_difference, models, number, outer_models, within};
use std::ffi::OsString;
use std::path::Path;

const DECODERS: [&str; 6] =
    ["tiny-gpt2", "tiny-llama3", "tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-sharded-llama"];

#[test]
fn tiny_decoders_give_the_known_logits() {
    for name in DECODERS {
        let golden = Golden::open(&models(name).join("golden.safetensors"));
        let ids = golden.ids("input_ids");
        let built = Recipe::preset(models(name), "f32").built();
        let mut session = built.session(1);
        let off = max_difference(&logits(&mut session, &ids), &golden.floats("logits_f32"));
        eprintln!("{name}: largest difference {off:e}");
        assert!(off <= 2e-4, "{name}: {off}");
        // Token after token gives what the whole text gave.
        session.reset(0).expect("slot 0 exists");
        let each: Vec<f32> =
            ids.iter().flat_map(|&id| session.decode(0, id).expect("the text fits").to_vec()).collect();
        let off = max_difference(&each, &golden.floats("logits_f32"));
        assert!(off <= 2e-4, "{name}, token after token: {off}");
        assert!(built.disagreement() < 1e-4, "{name}: {}", built.disagreement());
    }
}

#[test]
fn tiny_encoder_gives_the_known_hidden_states() {
    let golden = Golden::open(&models("tiny-bert/golden.safetensors"));
    let (ids, types) = (golden.ids("input_ids"), golden.ids("token_type_ids"));
    assert!(types.contains(&1), "both segments are used");
    let built = Recipe::preset(models("tiny-bert"), "f32").built();
    let mut session = built.session(1);
    let hidden = session.encode_segments(&ids, &types).expect("the text fits").to_vec();
    let off = max_difference(&hidden, &golden.floats("last_hidden_state"));
    assert!(off <= 2e-4, "{off}");
    assert_ne!(session.encode(&ids).expect("the text fits"), hidden, "segments matter");
}

#[test]
fn tiny_models_agree_with_the_reference_in_eight_bits() {
    for name in DECODERS.into_iter().chain(["tiny-bert"]) {
        let off = Recipe::preset(models(name), "w8a8").built().disagreement();
        eprintln!("{name}: {off:.1e}");
        assert!(off < 1e-4, "{name}: {off}");
    }
}

/// A decoder that does not come with the repository.
fn outer_decoder(name: &str, perplexity: f64, scored: u64, window: u32) {
    let (Some(model), Some(text)) = (outer_models(name), outer_models("text/tinystories_eval.txt")) else {
        return;
    };
    let golden = Golden::open(&model.join("golden.safetensors"));
    let built = Recipe::preset(&model, "f32").built();
    let mut session = built.session(1);
    let off = max_difference(&logits(&mut session, &golden.ids("input_ids")), &golden.floats("logits_f32"));
    eprintln!("{name}: largest difference {off:e}");
    assert!(off <= 2e-4, "{name}: {off}");
    let (prompt, story) = (golden.ids("greedy_prompt_ids"), golden.ids("greedy_ids"));
    assert_eq!(greedy(&mut session, &prompt, story.len() - prompt.len()), story, "{name}");
    let scores = built.eval(&text, &[]);
    assert_eq!((&scores["tokens_scored"], &scores["window"]), (&scored.into(), &window.into()), "{name}");
    within(name, number(&scores, "perplexity"), perplexity, 5e-4);
    for preset in ["w8a8", "w8a16"] {
        let scores = Recipe::preset(&model, preset).built().eval(&text, &[]);
        within(&format!("{name} {preset}"), number(&scores, "perplexity"), perplexity, 5e-3);
    }
}

#[test]
fn stories260k() {
    outer_decoder("stories260K", 4.03643, 56210, 512);
}

#[test]
fn babyllama() {
    outer_decoder("babyllama-char105", 2.21502, 119_595, 256);
}

/// All words of six letters out of three, in order.
fn words() -> impl Iterator<Item = Vec<u32>> {
    (0..729u32).map(|n| (0..6).map(|i| n / 3u32.pow(i) % 3).collect())
}

#[test]
fn gpt_nano_sorts_every_word() {
    let Some(model) = outer_models("gpt-nano-sort") else { return };
    for preset in ["f32", "w8a8"] {
        let mut session = Recipe::preset(&model, preset).built().session(1);
        let right = words().filter(|word| {
            let mut sorted = word.clone();
            sorted.sort_unstable();
            greedy(&mut session, word, 6)[6..] == sorted
        });
        let right = right.count();
        eprintln!("gpt-nano-sort {preset}: {right} of 729");
        assert!(preset != "f32" || right == 729, "{right} of 729");
    }
}

#[test]
fn gpt_nano_gives_the_known_logits() {
    let Some(model) = outer_models("gpt-nano-sort") else { return };
    let golden = Golden::open(&model.join("golden_activations.safetensors"));
    let (ids, want) = (golden.floats("idx"), golden.floats("lm_head"));
    let mut session = Recipe::preset(&model, "f32").built().session(1);
    for (row, want) in ids.chunks(11).zip(want.chunks(33)) {
        let ids: Vec<u32> = row.iter().map(|&id| id as u32).collect();
        let off = max_difference(&logits(&mut session, &ids), want);
        eprintln!("gpt-nano-sort: largest difference {off:e}");
        assert!(off <= 2e-4, "{off}");
    }
}

#[test]
fn minilm_gives_the_known_sentences() {
    let Some(model) = outer_models("all-MiniLM-L6-v2") else { return };
    let golden = Golden::open(&model.join("golden.safetensors"));
    let (ids, mask, types) =
        (golden.ids("input_ids"), golden.ids("attention_mask"), golden.ids("token_type_ids"));
    let (hidden, sentences) = (golden.floats("last_hidden_state"), golden.floats("sentence_embedding"));
    let length = golden.shape_of_ids("input_ids")[1];
    let built = Recipe::preset(&model, "f32").built();
    let mut session = built.session(1);
    let width = session.engine().manifest().vocab as usize;
    for (n, mask) in mask.chunks(length).enumerate() {
        let used = mask.iter().filter(|&&m| m == 1).count();
        let at = n * length;
        let got = session.encode_segments(&ids[at..at + used], &types[at..at + used]).expect("the text fits");
        let off = max_difference(got, &hidden[at * width..(at + used) * width]);
        eprintln!("sentence {n}: hidden states differ by {off:e} at most");
        assert!(off <= 1e-4, "sentence {n}: {off}");
    }
    let list = std::fs::read_to_string(model.join("golden_sentences.json")).expect("the sentences are there");
    let list: Vec<String> = serde_json::from_str(&list).expect("a list of sentences");
    let file = common::folder().join("sentences.txt");
    std::fs::write(&file, list.join("\n")).expect("the target folder is writable");
    for (preset, most) in [("f32", 1e-5), ("w8a8", 5e-2)] {
        let engine = Recipe::preset(&model, preset).built().path;
        let embedded = embed(&engine, &file);
        let off = max_difference(&embedded, &sentences);
        eprintln!("{preset}: embeddings differ by {off:e} at most");
        assert!(off <= most, "{preset}: {off}");
    }
}

fn embed(engine: &Path, file: &Path) -> Vec<f32> {
    let args: [OsString; 6] =
        ["embed".into(), engine.into(), "--file".into(), file.into(), "--pool".into(), "mean".into()];
    let vectors = json(args);
    let rows = vectors["embeddings"].as_array().expect("a list of vectors");
    let row = |r: &serde_json::Value| r.as_array().expect("a vector").clone();
    rows.iter().flat_map(row).map(|x| x.as_f64().expect("a number") as f32).collect()
}
