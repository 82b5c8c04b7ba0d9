//! The bundled model, compiled and run: against known logits, against the reference evaluator, and against itself on every
//! target this machine runs, in batches and in chunks.
#![cfg(feature = "llvm")]

mod common;

use common::{Golden, Recipe, TARGETS, greedy, logits, max_difference, models, relative, runs, within};
use quantc_passes::presets;
use quantc_runtime::sample;

/// Perplexity of the bundled model on the bundled text in float arithmetic, computed by another implementation.
const PERPLEXITY: f64 = 14.80724;

fn tales(preset: &str) -> Recipe {
    Recipe::preset(models("tales-3M"), preset)
}

fn golden() -> Golden {
    Golden::open(&models("tales-3M/golden.safetensors"))
}

#[test]
fn float_engines_give_the_known_logits_on_every_target() {
    let golden = golden();
    let (ids, want) = (golden.ids("input_ids"), golden.floats("logits_f32"));
    let (prompt, text) = (golden.ids("greedy_prompt_ids"), golden.ids("greedy_ids"));
    for target in TARGETS.into_iter().filter(|t| runs(t)) {
        let mut session = tales("f32").target(target).built().session(1);
        let off = max_difference(&logits(&mut session, &ids), &want);
        eprintln!("{target}: largest difference {off:e}");
        assert!(off <= 2e-4, "{target}: {off}");
        assert_eq!(greedy(&mut session, &prompt, text.len() - prompt.len()), text, "{target}");
    }
}

#[test]
fn targets_tell_the_same_story() {
    let prompt = golden().ids("greedy_prompt_ids");
    for preset in ["w8a8", "w4a8-g32", "f32"] {
        let mut first: Option<Vec<u32>> = None;
        for target in TARGETS.into_iter().filter(|t| runs(t)) {
            let story = greedy(&mut tales(preset).target(target).built().session(1), &prompt, 64);
            match &first {
                None => first = Some(story),
                Some(first) => assert_eq!(&story, first, "{preset} on {target}"),
            }
        }
    }
}

/// Every other preset, from this one on, layer by layer.
fn presets_agree_with_the_reference(from: usize) {
    for preset in presets::ALL.iter().skip(from).step_by(2) {
        // Which samples scales come from does not matter here, and few take less time.
        let few = preset.pipeline.replace("calibrate{", "calibrate{samples=2, length=64, ");
        let recipe = match preset.needs_data() {
            true => Recipe::pipeline(models("tales-3M"), &few).on_data(),
            false => tales(preset.name),
        };
        let off = recipe.built().disagreement();
        eprintln!("{}: {off:.1e}", preset.name);
        // Where sums differ in the last place, a number of a bf16 row may round to its other neighbour, 2^-8 away.
        // With rows of int8 it is its other code, 1/127 of the largest of its row.
        let most = match preset.pipeline {
            p if p.contains("quantize-activations") => 5e-3,
            p if p.contains("cast-activations") => 2e-3,
            _ => 1e-4,
        };
        assert!(off < most, "{}: {off}", preset.name);
    }
}

#[test]
fn presets_at_even_places_agree_with_the_reference_layer_by_layer() {
    presets_agree_with_the_reference(0);
}

#[test]
fn presets_at_odd_places_agree_with_the_reference_layer_by_layer() {
    presets_agree_with_the_reference(1);
}

#[test]
fn narrow_caches_agree_with_the_reference_layer_by_layer() {
    // Where sums differ in the last place, a number of the cache may round to its other neighbour, 2^-11 or 2^-8 away.
    for (format, most) in [("f16", 2e-4), ("bf16", 2e-3)] {
        let off = tales("f32").with(&["--kv-cache", format]).built().disagreement();
        eprintln!("f32 with a cache of {format}: {off:.1e}");
        assert!(off < most, "{format}: {off}");
    }
    // A step of 8 bits is 1/127 of the largest number of a head, and few numbers lie that near to a tie.
    for format in ["int8", "fp8"] {
        for target in TARGETS.into_iter().filter(|t| runs(t)) {
            let off = tales("f32").target(target).with(&["--kv-cache", format]).built().disagreement();
            eprintln!("f32 with a cache of {format} on {target}: {off:.1e}");
            assert!(off < 1e-3, "{format} on {target}: {off}");
        }
    }
}

#[test]
fn perplexity_is_the_known_one_and_eight_bits_keep_it() {
    let text = models("tales_eval.txt");
    let base = tales("f32").built().path;
    let scores = tales("w8a8").built().eval(&text, &["--against", base.to_str().expect("UTF-8")]);
    assert_eq!(scores["tokens_scored"], 32704);
    assert_eq!(scores["window"], 512);
    let float = common::number(&scores, "perplexity_base");
    within("f32", float, PERPLEXITY, 5e-4);
    within("w8a8", common::number(&scores, "perplexity"), float, 5e-3);
    let scores = tales("w8a16").built().eval(&text, &[]);
    within("w8a16", common::number(&scores, "perplexity"), float, 5e-3);
    let narrow = tales("w8a8").with(&["--kv-cache", "f16", "--agreement", "0"]).built();
    let part = ["--max-tokens", "8176", "--against", base.to_str().expect("UTF-8")];
    let scores = narrow.eval(&text, &part);
    let float = common::number(&scores, "perplexity_base");
    within("w8a8 with a cache of f16", common::number(&scores, "perplexity"), float, 5e-3);
    // What the cache alone costs: measured on the whole text it is 0.03 %, up for fp8 and down for int8.
    for (format, divergence) in [("int8", 3e-4), ("fp8", 3e-3)] {
        let narrow = tales("f32").with(&["--kv-cache", format, "--agreement", "0"]).built();
        let scores = narrow.eval(&text, &part);
        let float = common::number(&scores, "perplexity_base");
        within(format, common::number(&scores, "perplexity"), float, 2e-3);
        let got = common::number(&scores, "kl_mean");
        assert!(got < divergence, "{format}: {got}");
    }
}

/// What sequences side by side may differ by from sequences alone: sums run in another order, and with codes for
/// activations a last place may tip a rounding.
fn slack(preset: &str) -> f64 {
    if preset == "f32" { 1e-5 } else { 2e-3 }
}

/// As [`slack`], with codes in the cache.
fn cache_slack(preset: &str, cache: &str) -> f64 {
    if cache == "f32" { slack(preset) } else { 2e-3 }
}

#[test]
fn batches_give_what_single_sequences_give() {
    let ids = golden().ids("input_ids");
    for (preset, cache) in
        [("f32", "f32"), ("w8a8", "f32"), ("w4a8-g32", "f32"), ("f32", "int8"), ("f32", "fp8")]
    {
        let built = tales(preset).with(&["--kv-cache", cache, "--agreement", "0"]).built();
        let prompts = [&ids[..9], &ids[3..20], &ids[30..31], &ids[10..45], &ids[..2]];
        let alone: Vec<(Vec<u32>, Vec<f32>)> = prompts
            .iter()
            .map(|prompt| {
                let mut session = built.session(1);
                let text = greedy(&mut session, prompt, 8);
                // The last token was not appended yet.
                let row =
                    session.decode(0, *text.last().expect("not empty")).expect("the text fits").to_vec();
                (text, row)
            })
            .collect();
        let mut session = built.session(prompts.len() as u32);
        let slots: Vec<u32> = (0..prompts.len() as u32).collect();
        let mut texts: Vec<Vec<u32>> = prompts.iter().map(|p| p.to_vec()).collect();
        for (text, &slot) in texts.iter_mut().zip(&slots) {
            let row = session.prefill(slot, &text.clone(), 1).expect("the prompt fits");
            text.push(sample::greedy(row).expect("logits are numbers"));
        }
        let vocab = session.engine().manifest().vocab as usize;
        for step in 0..8 {
            let last: Vec<u32> = texts.iter().map(|t| *t.last().expect("not empty")).collect();
            let rows = session.decode_batch(&slots, &last).expect("the texts fit").to_vec();
            for ((text, row), (want, want_row)) in texts.iter_mut().zip(rows.chunks(vocab)).zip(&alone) {
                if step < 7 {
                    text.push(sample::greedy(row).expect("logits are numbers"));
                    continue;
                }
                assert_eq!(text, want, "{preset} with a cache of {cache}");
                let off = relative(row, want_row);
                assert!(off < cache_slack(preset, cache), "{preset} with a cache of {cache}: {off}");
            }
        }
    }
}

#[test]
fn prompts_in_chunks_give_what_whole_prompts_give() {
    let ids = golden().ids("input_ids");
    for preset in ["f32", "w8a8"] {
        let whole = logits(&mut tales(preset).built().session(1), &ids);
        let chunked = tales(preset).with(&["--chunk", "16"]).built();
        let mut session = chunked.session(1);
        assert_eq!(session.engine().manifest().max_tokens, 16);
        let off = relative(&logits(&mut session, &ids), &whole);
        eprintln!("{preset}: {off:.1e}");
        assert!(off < slack(preset), "{preset}: {off}");
        // A prompt that ends in the middle of a chunk, and the last row only.
        let vocab = session.engine().manifest().vocab as usize;
        session.reset(0).expect("slot 0 exists");
        let row = session.prefill(0, &ids[..50], 1).expect("the prompt fits");
        let off = relative(row, &whole[49 * vocab..][..vocab]);
        assert!(off < slack(preset), "{preset}: {off}");
    }
    // Codes do not depend on chunks either, for rows of the same bits.
    let coded = tales("f32").with(&["--kv-cache", "int8", "--agreement", "0"]);
    let whole = logits(&mut coded.built().session(1), &ids);
    let chunked = coded.with(&["--chunk", "16"]).built();
    let off = relative(&logits(&mut chunked.session(1), &ids), &whole);
    assert!(off < cache_slack("f32", "int8"), "int8: {off}");
}

#[test]
fn threads_change_nothing() {
    let built = tales("w4a8-g32").with(&["--kv-cache", "int8", "--agreement", "0"]).built();
    let ids = golden().ids("input_ids");
    let run = |threads| {
        let options = quantc_runtime::SessionOptions { threads, ..Default::default() };
        logits(&mut quantc_runtime::Session::new(built.open(), &options).expect("it starts"), &ids)
    };
    let one = run(1);
    for threads in [2, 3, 5] {
        assert!(run(threads) == one, "{threads} threads");
    }
}
