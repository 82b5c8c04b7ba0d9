//! Engines for GPUs on a machine without one: compiled, opened, and run by the interpreter of tile IR.
#![cfg(feature = "llvm")]

mod common;

use common::device::{Asked, Interpreter, Seen, launched};
use common::{Built, Recipe, greedy, logits, models, quantc, relative};
use quantc_codegen::cuda::plan::{self, Want};
use quantc_codegen::spec::KernelSpec;
use quantc_codegen::targets::GPUS;
use quantc_passes::presets;
use quantc_runtime::gpu::Loaded;
use quantc_runtime::sample::{SampleOptions, Sampler};
use quantc_runtime::session::{Session, SessionOptions};
use quantc_runtime::{Engine, ErrorKind};
use std::sync::{Arc, Mutex};

/// The device that an engine is for.
fn device(engine: &Engine) -> Interpreter {
    Interpreter::new(&engine.manifest().gpu.as_ref().expect("it is for a GPU").arch)
}

/// The engine on a device of its own.
fn on_device(built: &Built) -> (Arc<Engine>, Arc<Loaded>) {
    let engine = built.open();
    let loaded = engine.load_with(Box::new(device(&engine)));
    let loaded = loaded.unwrap_or_else(|e| panic!("{e}"));
    (engine, loaded)
}

fn session(engine: &Arc<Engine>, slots: u32) -> Session {
    let options = SessionOptions { slots, poison: true, ..SessionOptions::default() };
    Session::new(engine.clone(), &options).unwrap_or_else(|e| panic!("{e}"))
}

/// A small model for a target with a cache of bf16; a prompt of more than 12 tokens runs in chunks.
fn tiny(model: &str, preset: &str, target: &str) -> Recipe {
    cached(model, preset, target, "bf16")
}

fn cached(model: &str, preset: &str, target: &str, cache: &str) -> Recipe {
    let more = ["--chunk", "12", "--agreement", "0", "--kv-cache", cache];
    Recipe::preset(models(model), preset).target(target).with(&more)
}

const PROMPT: [u32; 14] = [1, 40, 22, 7, 18, 9, 31, 27, 44, 31, 5, 38, 12, 29];

/// Attention of GPUs rounds queries and weights to bf16, 2^-9 off, which a model of random weights makes more of.
const ATTENTION: f64 = 2e-2;

/// Logits of an engine for a GPU and of one for this machine.
fn compare(recipe: impl Fn(&str) -> Recipe, target: &str, limit: f64) {
    let (engine, _loaded) = on_device(&recipe(target).built());
    let got = logits(&mut session(&engine, 1), &PROMPT);
    let want = logits(&mut recipe("host").built().session(1), &PROMPT);
    let apart = relative(&got, &want);
    eprintln!("{} for {target}: {apart:.1e}", engine.manifest().model);
    assert!(apart < limit, "{} for {target}: {apart}", engine.manifest().model);
}

/// A whole model with trained weights: the numbers are those of an engine for processors, to what rounding allows. Where
/// sums differ in the last place, a number of a bf16 row may round to its other neighbour, 2^-8 away.
#[test]
fn a_story_is_told_as_on_a_processor() {
    let recipe = |target: &str| tiny("tales-3M", "w4a16-g128", target).with(&["--context", "512"]);
    let (engine, _loaded) = on_device(&recipe("cuda-sm90").built());
    let (scratch, counters) = engine.manifest().workspace_bytes();
    assert!(scratch > 0 && counters > 0, "keys are split among blocks");
    let mut gpu = session(&engine, 1);
    let mut host = recipe("host").built().session(1);
    let (got, want) = (logits(&mut gpu, &PROMPT[..7]), logits(&mut host, &PROMPT[..7]));
    let apart = relative(&got, &want);
    eprintln!("{apart:.1e}");
    assert!(apart < 5e-3, "{apart}");
    assert_eq!(greedy(&mut gpu, &PROMPT[..5], 1), greedy(&mut host, &PROMPT[..5], 1));
}

#[test]
fn every_architecture_runs() {
    for (model, preset, target) in [
        ("tiny-llama3", "w4a16-g32", "cuda-sm80"),
        ("tiny-llama3", "w4a8-g32", "cuda-sm89"),
        ("tiny-mistral", "bf16", "cuda-sm90"),
        ("tiny-gpt2", "w8a8", "cuda-sm90"),
        ("tiny-qwen2", "fp8", "cuda-sm100"),
        ("tiny-qwen3", "w8a16", "cuda-sm120"),
    ] {
        // Where sums differ in the last place, a number of a row of int8 is its other code, 1/127 of the largest.
        let limit = if preset.ends_with("a16-g32") || preset == "bf16" { ATTENTION } else { 3.0 * ATTENTION };
        compare(|target| tiny(model, preset, target), target, limit);
    }
}

/// The engine on a device of its own, and what that was asked for.
fn watched(built: &Built) -> (Arc<Engine>, Arc<Loaded>, Arc<Mutex<Seen>>) {
    let engine = built.open();
    let device = device(&engine);
    let seen = device.seen.clone();
    let loaded = engine.load_with(Box::new(device)).unwrap_or_else(|e| panic!("{e}"));
    (engine, loaded, seen)
}

/// A small model whose prompts of up to 96 tokens run in one call.
fn in_one_call(preset: &str, target: &str, cache: &str) -> Recipe {
    let more = ["--chunk", "96", "--agreement", "0", "--kv-cache", cache];
    Recipe::preset(models("tiny-llama3"), preset).target(target).with(&more)
}

/// A text of more tokens than warps take one by one.
fn long() -> Vec<u32> {
    (0..70).map(|i| (i * 13 + 5) % 47 + 1).collect()
}

/// Calls of more than 64 tokens on `sm_90`: products are those of groups of warps, which read tokens as tiles and the same
/// packed weights as single warps do. Of a prompt only the last row goes through the last layer's end.
#[test]
fn long_prompts_go_through_groups_of_warps() {
    for (preset, limit) in [
        ("w4a16-g32", ATTENTION),
        ("bf16", ATTENTION),
        ("w8a16", ATTENTION),
        ("fp8", 3.0 * ATTENTION),
        ("w8a8", 3.0 * ATTENTION),
        ("w4a8-g32", 3.0 * ATTENTION),
    ] {
        let recipe = |target: &str| in_one_call(preset, target, "bf16");
        let built = recipe("cuda-sm90").built();
        let (engine, _loaded, seen) = watched(&built);
        let mut gpu = session(&engine, 1);
        let mut host = recipe("host").built().session(1);
        let text = long();
        let (got, want) = (logits(&mut gpu, &text), logits(&mut host, &text));
        let apart = relative(&got, &want);
        gpu.reset(0).expect("slot 0 exists");
        let last = gpu.prefill(0, &text, 1).expect("the prompt fits").to_vec();
        let narrow = relative(&last, &want[want.len() - last.len()..]);
        eprintln!("{preset}: {apart:.1e}, the last row {narrow:.1e}");
        // One row may be further off than all are on average.
        assert!(apart < limit && narrow < 4.0 * limit, "{preset}: {apart} {narrow}");
        let launched = launched(&seen.lock().expect("nobody panics"));
        for kind in ["tiled_matmul", "row_tiles"] {
            assert!(launched.iter().any(|s| s.starts_with(kind)), "{preset}: {launched:?}");
        }
        if preset == "w4a16-g32" {
            // What is told of it: templates, and the launches of such calls.
            let path = built.path.to_str().expect("UTF-8");
            let told = common::ok(["explain", path]);
            for template in
                ["mixed", "row_tiles", "skinny", "prefill_attention", "decode_attention", "sample"]
            {
                assert!(told.contains(template), "{template}: {told}");
            }
            let text =
                std::fs::read_to_string(built.path.join("manifest.txt")).expect("every engine has one");
            let program = text.split("\nprogram for ").last().unwrap_or_default();
            insta::assert_snapshot!("many-tokens", program);
        }
        let products = |s: &&String| s.starts_with("matmul");
        assert_eq!(launched.iter().find(products), None, "{preset}: all are of many tokens");
    }
}

/// Of a prompt only the rows that are asked for go through the end of the last layer, and are what they are among all.
#[test]
fn wanted_rows_are_what_they_are_among_all() {
    // A cache that attention reads as f32, so that sums differ in their order alone.
    let recipe = |target: &str| in_one_call("w8a16", target, "f32");
    let (engine, _loaded) = on_device(&recipe("cuda-sm90").built());
    let mut gpu = session(&engine, 1);
    let mut host = recipe("host").built().session(1);
    let text = long();
    let want = logits(&mut host, &text);
    for rows in [1, 3] {
        gpu.reset(0).expect("slot 0 exists");
        let got = gpu.prefill(0, &text, rows).expect("the prompt fits");
        let apart = relative(got, &want[want.len() - got.len()..]);
        assert!(apart < 5e-3, "{rows} rows: {apart}");
    }
}

/// Tokens are chosen where the kernels run: only they come back, and they are those that the logits say.
#[test]
fn tokens_are_chosen_on_the_device() {
    let (engine, _loaded, seen) = watched(&tiny("tiny-llama3", "w4a16-g32", "cuda-sm90").built());
    let width = engine.manifest().vocab as usize;
    let sampler = |temperature, top_k, top_p, seed| {
        Sampler::new(SampleOptions { temperature, top_k, top_p, seed }, width)
            .expect("the options are in range")
    };
    let mut session = session(&engine, 2);
    assert!(session.chooses());
    let want = greedy(&mut session, &PROMPT, 4);
    let tell = |session: &mut Session, mut sampler: Sampler| {
        session.reset(0).expect("slot 0 exists");
        let mut text = PROMPT.to_vec();
        text.push(session.prefill_next(0, &PROMPT, &mut sampler).expect("the prompt fits"));
        while text.len() < want.len() {
            text.push(session.decode_next(0, text[text.len() - 1], &mut sampler).expect("the text fits"));
        }
        text
    };
    seen.lock().expect("nobody panics").asked.clear();
    assert_eq!(tell(&mut session, sampler(0.0, 0, 1.0, 0)), want);
    let back = |asked: &Asked| match asked {
        Asked::Download(bytes) if *bytes > 0 => Some(*bytes),
        _ => None,
    };
    let back: Vec<usize> = seen.lock().expect("nobody panics").asked.iter().filter_map(back).collect();
    assert_eq!(back, [4; 4], "a token each time");
    assert_eq!(tell(&mut session, sampler(0.7, 1, 1.0, 9)), want, "the largest one is left");
    let drawn = tell(&mut session, sampler(1.5, 6, 1.0, 3));
    assert_eq!(drawn, tell(&mut session, sampler(1.5, 6, 1.0, 3)), "seeds repeat");
    let others: Vec<_> = (4..8).map(|seed| tell(&mut session, sampler(1.5, 6, 1.0, seed))).collect();
    assert!(others.iter().any(|other| *other != drawn), "seeds matter");
    // What was drawn was among the six largest.
    for text in others.iter().chain([&drawn]) {
        let mut row = session_row(&mut session, &text[..PROMPT.len()]);
        for &token in &text[PROMPT.len()..] {
            let larger = row.iter().filter(|&&x| x > row[token as usize]).count();
            assert!(larger < 6, "{token} is number {larger}");
            row = session.decode(1, token).expect("the text fits").to_vec();
        }
    }
    // Side by side, each with its own options.
    let texts = [&PROMPT[..5], &PROMPT[2..9]];
    let mut tokens = vec![];
    let mut want = vec![];
    for (slot, text) in (0..).zip(texts) {
        session.reset(slot).expect("there are two");
        let token = session.prefill_next(slot, text, &mut sampler(0.0, 0, 1.0, 0)).expect("the prompt fits");
        tokens.push(token);
        want.push(session.decode_next(slot, token, &mut sampler(0.0, 0, 1.0, 0)).expect("the text fits"));
        session.truncate(slot, text.len() as u32).expect("it holds more");
    }
    let mut samplers = [sampler(0.0, 0, 1.0, 0), sampler(2.0, 1, 0.5, 1)];
    session.decode_batch_next(&[0, 1], &mut tokens, &mut samplers).expect("the texts fit");
    assert_eq!(tokens, want);
    let error =
        session.decode_batch_next(&[0, 1], &mut tokens, &mut samplers[..1]).expect_err("one is missing");
    assert!(error.message().contains("1 samplers do not match"), "{error}");
}

/// The logits after a text, in slot 1.
fn session_row(session: &mut Session, text: &[u32]) -> Vec<f32> {
    session.reset(1).expect("slot 1 exists");
    session.prefill(1, text, 1).expect("the prompt fits").to_vec()
}

/// Sequences of different lengths in one pool of pages that is smaller than all of them could fill.
#[test]
fn sequences_share_a_pool_of_pages() {
    let (engine, loaded, seen) = watched(&tiny("tiny-llama3", "w4a16-g32", "cuda-sm90").built());
    let mut alone = session(&engine, 1);
    let options = SessionOptions { slots: 3, pages: 4, poison: true, ..SessionOptions::default() };
    let mut shared = Session::new(engine.clone(), &options).expect("the device suffices");
    assert_eq!(shared.free_pages(), Some((4, 4)));
    let text = long();
    let texts = [&text[..61], &text[2..5], &text[10..20]];
    let more: Vec<Vec<u32>> = (0..5).map(|i| vec![i + 3, 2 * i + 1, 40 - i]).collect();
    let mut want = vec![vec![]; more.len()];
    for (slot, text) in texts.iter().enumerate() {
        alone.reset(0).expect("slot 0 exists");
        alone.prefill(0, text, 1).expect("the prompt fits");
        shared.prefill(slot as u32, text, 1).expect("there are pages");
        for (tokens, want) in more.iter().zip(&mut want) {
            want.extend_from_slice(alone.decode(0, tokens[slot]).expect("the text fits"));
        }
    }
    assert_eq!(shared.free_pages(), Some((1, 4)), "a page for each");
    for (tokens, want) in more.iter().zip(&want) {
        let got = shared.decode_batch(&[0, 1, 2], tokens).expect("there are pages");
        assert!(relative(got, want) < 1e-6, "{}", relative(got, want));
    }
    assert_eq!(shared.free_pages(), Some((0, 4)), "the first one has another");
    let error = shared.prefill(1, &text[..58], 1).expect_err("there is no page for it");
    assert_eq!(error.kind(), ErrorKind::Memory);
    assert!(error.message().contains("out of pages: 1 more of 64 tokens are needed, and 0 of 4"), "{error}");
    assert_eq!([0, 1, 2].map(|slot| shared.position(slot)), [66, 8, 15], "nothing has changed");
    // Pages that one gives back are another's, whatever lies in them.
    shared.truncate(0, 3).expect("it holds more");
    assert_eq!(shared.free_pages(), Some((1, 4)));
    let got = shared.prefill(1, &text[..58], 1).expect("there is a page").to_vec();
    alone.reset(0).expect("slot 0 exists");
    alone.prefill(0, texts[1], 0).expect("the prompt fits");
    more.iter().for_each(|tokens| drop(alone.decode(0, tokens[1]).expect("the text fits").to_vec()));
    let want = alone.prefill(0, &text[..58], 1).expect("the text fits");
    assert!(relative(&got, want) < 1e-6, "{}", relative(&got, want));
    drop((alone, shared, loaded));
    let seen = seen.lock().expect("nobody panics");
    assert!(seen.blocks.is_empty() && seen.kernels == 0 && seen.graphs == 0, "{seen:?}");
}

#[test]
fn an_encoder_runs() {
    let recipe = |target: &str| {
        Recipe::preset(models("tiny-bert"), "w8a16").target(target).with(&["--agreement", "0"])
    };
    let (engine, _loaded) = on_device(&recipe("cuda-sm90").built());
    let mut gpu = session(&engine, 1);
    let mut host = recipe("host").built().session(1);
    let segments = [0, 0, 0, 1, 1];
    let got = gpu.encode_segments(&PROMPT[..5], &segments).expect("the text fits").to_vec();
    let want = host.encode_segments(&PROMPT[..5], &segments).expect("the text fits");
    assert!(relative(&got, want) < ATTENTION, "{}", relative(&got, want));
}

#[test]
fn caches_of_every_format_run() {
    for format in ["f32", "f16", "bf16", "int8", "fp8"] {
        let recipe = |target: &str| cached("tiny-llama3", "w8a16", target, format);
        compare(recipe, "cuda-sm90", if ["f32", "f16"].contains(&format) { 5e-3 } else { ATTENTION });
    }
}

/// Sequences side by side give what each gives alone, whatever chunks they came in.
#[test]
fn sequences_side_by_side_do_not_mix() {
    let built = tiny("tiny-llama3", "w4a16-g32", "cuda-sm90").built();
    let (engine, loaded) = on_device(&built);
    let mut alone = session(&engine, 1);
    let mut both = session(&engine, 2);
    assert_eq!(Arc::strong_count(&loaded), 3, "sessions share what is loaded");
    let texts = [&PROMPT[..13], &PROMPT[3..9]];
    let mut want = vec![];
    for text in texts {
        alone.reset(0).expect("slot 0 exists");
        alone.prefill(0, text, 1).expect("the prompt fits");
        want.push(alone.decode(0, 21).expect("the text fits").to_vec());
    }
    for (slot, text) in texts.iter().enumerate() {
        both.prefill(slot as u32, text, 1).expect("the prompt fits");
    }
    let got = both.decode_batch(&[0, 1], &[21, 21]).expect("the texts fit");
    assert!(relative(got, &want.concat()) < 1e-6, "{}", relative(got, &want.concat()));
}

/// What is asked of a driver, in order, and that all is given back.
#[test]
fn a_driver_is_asked_in_order_and_gets_all_back() {
    let built = tiny("tiny-llama3", "w4a16-g32", "cuda-sm90").built();
    let engine = built.open();
    let device = device(&engine);
    let seen = device.seen.clone();
    let take = |seen: &Arc<Mutex<Seen>>| std::mem::take(&mut seen.lock().expect("nobody panics").asked);
    let loaded = engine.load_with(Box::new(device)).expect("the device suffices");
    let manifest = engine.manifest();
    let kernels = manifest.gpu.as_ref().expect("it is for a GPU").kernels.len();
    let need = manifest.device_bytes(1).expect("it is little");
    let asked = take(&seen);
    assert!(asked[..kernels].iter().all(|a| matches!(a, Asked::Load(_))), "{asked:?}");
    assert_eq!(asked[kernels], Asked::Allocate(need.weights));
    let lengths: Vec<Asked> = manifest.weights.iter().map(|b| Asked::Upload(b.len as usize)).collect();
    assert_eq!(asked[kernels + 1..], lengths);

    let mut session = session(&engine, 1);
    let memory = take(&seen);
    assert_eq!(memory[0], Asked::Allocate(manifest.arena_bytes));
    assert_eq!(memory.len(), manifest.states.len() + 2, "arena, states, inputs");
    session.decode(0, 5).expect("the text fits");
    session.decode(0, 6).expect("the text fits");
    let steps = take(&seen);
    let launches = manifest.programs[0].launches.len();
    let (first, second) = steps.split_at(launches + 6);
    // A page is taken before the first token.
    let [
        Asked::Upload(4),
        Asked::Upload(_),
        Asked::Begin,
        recorded @ ..,
        Asked::End,
        Asked::Replay,
        Asked::Download(_),
    ] = first
    else {
        panic!("{first:?}")
    };
    for (asked, launch) in recorded.iter().zip(&manifest.programs[0].launches) {
        let Asked::Launch { symbol, scalars, recorded: true, .. } = asked else { panic!("{asked:?}") };
        assert_eq!(symbol, &launch.symbol);
        assert!(scalars.iter().all(|&s| s == 1), "one token and one row");
    }
    assert!(matches!(second, [Asked::Upload(_), Asked::Replay, Asked::Download(_)]), "{second:?}");
    drop((session, loaded));
    let seen = seen.lock().expect("nobody panics");
    assert!(seen.blocks.is_empty() && seen.kernels == 0 && seen.graphs == 0, "{seen:?}");
}

/// Whichever request a driver refuses: it is told, and nothing is left behind.
#[test]
fn a_driver_that_fails_leaves_nothing_behind() {
    let built = tiny("tiny-llama3", "w4a16-g32", "cuda-sm90").built();
    let engine = built.open();
    let run = |at: Option<usize>| {
        let mut device = device(&engine);
        device.fail_at = at;
        let seen = device.seen.clone();
        let outcome = engine.load_with(Box::new(device)).and_then(|_loaded| {
            let mut session = Session::new(engine.clone(), &SessionOptions::default())?;
            session.decode(0, 5).map(|_| ())
        });
        (outcome, seen)
    };
    let (outcome, seen) = run(None);
    outcome.expect("nothing fails");
    let freed = |a: &Asked| matches!(a, Asked::Free | Asked::Unload | Asked::Forget);
    let requests = seen.lock().expect("nobody panics").asked.iter().position(freed).expect("it frees");
    let steps = (0..requests).step_by(7).chain(requests - 4..requests);
    for at in steps {
        let (outcome, seen) = run(Some(at));
        let error = outcome.expect_err("a request fails");
        assert!(error.message().contains("asked to fail"), "request {at}: {error}");
        let seen = seen.lock().expect("nobody panics");
        assert!(seen.blocks.is_empty() && seen.kernels == 0 && seen.graphs == 0, "request {at}: {seen:?}");
    }
}

/// Machines that do not suffice are refused before anything is asked of them.
#[test]
fn what_a_device_lacks_is_told_first() {
    let engine = tiny("tiny-llama3", "w4a16-g32", "cuda-sm90").built().open();
    let need = engine.manifest().device_bytes(1).expect("it is little").total();
    type Change = fn(&mut Interpreter, u64);
    let cases: [(Change, ErrorKind, &str); 3] = [
        (
            |d, _| d.device.capability = (8, 0),
            ErrorKind::Target,
            "compute capability 8.0; compile the model for `cuda-sm80`",
        ),
        (|d, _| d.device.capability = (9, 3), ErrorKind::Target, "`cuda-sm93`"),
        (|d, need| d.device.free = need - 1, ErrorKind::Memory, "bytes of device memory"),
    ];
    for (change, kind, part) in cases {
        let mut device = device(&engine);
        change(&mut device, need);
        let seen = device.seen.clone();
        let error = engine.load_with(Box::new(device)).expect_err(part);
        assert_eq!(error.kind(), kind);
        assert!(error.message().contains(part), "{error}");
        assert!(seen.lock().expect("nobody panics").asked.is_empty());
    }
    let mut device = device(&engine);
    device.device.free = need;
    let _loaded = engine.load_with(Box::new(device)).expect("one sequence fits");
    let options = SessionOptions { slots: 100, ..SessionOptions::default() };
    let error = Session::new(engine.clone(), &options).expect_err("a hundred do not");
    assert!(error.message().contains("a session of 100 sequences of 256 tokens needs"), "{error}");
}

/// Compiling twice gives the same bytes.
#[test]
fn engines_are_the_same_when_compiled_again() {
    let recipe = tiny("tiny-llama3", "w4a8-g32", "cuda-sm89");
    let first = recipe.built();
    let again = recipe.with(&["--threads", "1"]).built();
    assert_eq!(common::files_under(&first.path), common::files_under(&again.path));
}

#[test]
fn what_has_no_kernel_is_refused_by_name() {
    let model = models("tiny-llama3");
    let model = model.to_str().expect("UTF-8");
    let out = common::folder().join("never");
    let out = out.to_str().expect("UTF-8");
    let store = common::store();
    let compile = |how: &[&str]| {
        let head =
            ["compile", model, "--target", "cuda-sm90", "-o", out, "--store", store.to_str().expect("UTF-8")];
        quantc(head.iter().chain(how))
    };
    for (how, parts) in [
        (&["--preset", "f32"][..], &["products of f32 activations have no CUDA kernel", "preset `bf16`"][..]),
        (
            &["--pipeline", "round-to-nearest{format=int8}"],
            &["products of f32 activations", "`round-to-nearest`"],
        ),
        (
            &["--pipeline", "cast-weights{to=f16}, cast-activations{to=bf16}"],
            &["weights of f16 have no CUDA kernel"],
        ),
        (
            &["--pipeline", "round-to-nearest{format=int4, group=8}, quantize-activations{format=int8}"],
            &["scale groups of 8 columns have no CUDA kernel"],
        ),
    ] {
        let done = compile(how);
        assert_eq!(done.code, 1, "{how:?}: {}", done.err);
        parts.iter().for_each(|part| assert!(done.err.contains(part), "{part}: {}", done.err));
        assert!(!std::path::Path::new(out).exists());
    }
}

/// Every preset passes the check of pipelines for every class of GPUs, which comes before any data is read.
#[test]
fn coverage_is_known_before_weights_are_read() {
    use quantc_ir::weights::Store;
    use quantc_passes::pass::Fact;
    use quantc_passes::{Registry, pipeline, presets};
    let store = Store::in_memory();
    let options = quantc_frontends::ImportOptions::default();
    let module = quantc_frontends::import(&models("tales-3M"), &store, &options).expect("it imports").module;
    let registry = Registry::builtin();
    for target in quantc_codegen::targets::GPU_TARGETS.iter() {
        let backend = quantc_codegen::backend::of(target);
        for preset in presets::ALL {
            let parsed = pipeline::parse(preset.pipeline).expect("presets parse");
            let checked = pipeline::check_given(
                &parsed,
                &registry,
                &module,
                Some(target),
                Some(&*backend),
                &[Fact::Data],
            );
            if let Err(diags) = checked {
                panic!("{} for {}: {diags}", preset.name, target.name);
            }
        }
    }
}

/// Every preset that needs no text compiles for a class of GPUs, and has kernels for all others; or it is refused by name.
/// The rest differs in the values of weights.
#[test]
fn every_preset_has_kernels_or_is_refused() {
    let model = models("tiny-llama3");
    let out = common::folder().join("preset");
    let store = common::store();
    let presets = presets::ALL.iter().filter(|preset| !preset.needs_data());
    for (preset, target) in presets.zip(GPUS.iter().cycle()) {
        let head = ["compile", "--preset", preset.name, "--target", target.name, "--agreement", "0"];
        let places = [("--store", &store), ("-o", &out)];
        let mut command = common::command(head);
        command.arg(&model).args(places.iter().flat_map(|(name, path)| [name.as_ref(), path.as_os_str()]));
        // As text, which is quick; other tests compile it.
        let done = command.env_remove("QUANTC_NVRTC").output().expect("the tool starts");
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        if preset.name == "f32" {
            assert!(said.contains("products of f32 activations have no CUDA kernel"), "{said}");
            continue;
        }
        assert!(done.status.success(), "{} for {}: {said}", preset.name, target.name);
        let engine =
            Engine::open(&out, &quantc_runtime::OpenOptions::default()).expect("it was just written");
        for entry in engine.gpu_kernels() {
            let want: Want = serde_json::from_str(&entry.spec).expect("a spec reads back");
            let tiled = matches!(want.spec, KernelSpec::TiledMatmul(_));
            for other in GPUS.iter().filter(|other| !tiled || other.gpu.arch == "sm_90a") {
                let planned = plan::kernel(&entry.symbol, &want, &other.gpu);
                let what = || format!("{} for {}: {}", preset.name, other.name, entry.symbol);
                planned.unwrap_or_else(|e| panic!("{}: {e}", what()));
            }
        }
    }
}

/// The manifest for people, without digests and sizes of files, which change with every kernel.
#[test]
fn the_plan_of_a_small_engine() {
    for target in ["cuda-sm80", "cuda-sm89", "cuda-sm90"] {
        let built = tiny("tiny-llama3", "w4a8-g32", target).built();
        let text = std::fs::read_to_string(built.path.join("manifest.txt")).expect("every engine has one");
        let short = |line: &str| match line.split_once(" blake3 ") {
            Some((line, _)) if line.contains(" bytes at ") => line.to_owned(),
            Some((line, _)) => line.split_whitespace().next().unwrap_or_default().to_owned(),
            None => line.to_owned(),
        };
        let lines: Vec<String> = text.lines().filter(|l| !l.starts_with("pipeline")).map(short).collect();
        insta::assert_snapshot!(target, lines.join("\n"));
    }
}

/// What plain kernels are as CUDA C++; texts of the others are snapshots of their own tests.
#[test]
fn the_texts_of_plain_kernels() {
    let engine = cached("tiny-llama3", "w8a16", "cuda-sm90", "f16").built().open();
    for (kind, name) in [("attention", "plain_attention"), ("cache_append", "plain_append")] {
        let entry = engine.gpu_kernels().iter().find(|k| k.symbol.starts_with(kind)).expect("it has one");
        // Helpers are the same for all kernels.
        let text = entry.source.split_once("extern \"C\"").map_or("", |(_, text)| text);
        insta::assert_snapshot!(name, text);
    }
}
