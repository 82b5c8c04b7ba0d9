//! The tool's contract: exit codes, what goes to stdout, the keys of its JSON, what errors suggest, and its help.
#![cfg(feature = "llvm")]

mod common;

use common::{Built, Done, Recipe, command, folder, json, models, number, ok, one_object, quantc};
use serde_json::Value;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// Arguments: text, and paths where `{}` stands.
fn args(text: &str, paths: &[&Path]) -> Vec<OsString> {
    let mut paths = paths.iter();
    let word = |w: &str| match w {
        "{}" => paths.next().expect("a path for each place").as_os_str().to_owned(),
        _ => OsString::from(w),
    };
    text.split(' ').map(word).collect()
}

fn tales() -> PathBuf {
    models("tales-3M")
}

fn decoder() -> Built {
    Recipe::preset(tales(), "w8a8").built()
}

/// A short text.
fn text() -> PathBuf {
    let path = folder().join("text.txt");
    let whole = std::fs::read_to_string(models("tales_eval.txt")).expect("the text is there");
    std::fs::write(&path, &whole[..6000]).expect("the target folder is writable");
    path
}

/// A file of this test's folder.
fn file(name: &str, text: &str) -> PathBuf {
    let path = folder().join(name);
    std::fs::write(&path, text).expect("the target folder is writable");
    path
}

/// A refused call: nothing on stdout, an error on stderr.
fn refused(args: Vec<OsString>, code: i32) -> String {
    let done = quantc(&args);
    assert_eq!(done.code, code, "{args:?}: {}", done.err);
    assert_eq!(done.out, "", "{args:?}");
    assert!(done.err.starts_with("error: "), "{args:?}: {}", done.err);
    done.err
}

fn has_keys(value: &Value, keys: &[&str]) {
    for key in keys {
        assert!(value.get(key).is_some_and(|v| !v.is_null()), "no `{key}` in {value}");
    }
}

#[test]
fn the_command_line_is_wrong() {
    let cases = [
        "compile {} --target host -o engine",
        "compile {} --preset w8a8 -o engine",
        "compile {} --target host --preset w8a8",
        "compile {} --target host --preset w8a8 -p dedupe -o engine",
        "compile {} --target host --preset w8a8 -o engine --colour red",
        "compile {} --target host --preset w8a8 -o engine --threads many",
        "run {} --max-tokens -5",
        "run {} --temperature warm",
        "run {} --weights heavy",
        "bench {} --weights heavy",
        "eval {}",
        "embed {}",
        "opt {}",
        "bake {}",
    ];
    for case in cases {
        refused(args(case, &[&tales()]), 2);
    }
    assert_eq!(quantc::<&str>([]).code, 2);
}

#[test]
fn the_input_is_refused() {
    let missing = folder().join("missing");
    let out = folder().join("never");
    let engine = decoder().path;
    let empty = folder().join("empty");
    std::fs::create_dir_all(&empty).expect("the target folder is writable");
    let cases: [(Vec<OsString>, &str); 15] = [
        (args("compile {} --target host --preset f32 -o {}", &[&missing, &out]), "missing"),
        (args("compile {} --target host --preset f32 -o {}", &[&empty, &out]), "config.json"),
        (args("compile {} --target host --preset f32 -o {}", &[&text(), &out]), "text.txt"),
        (args("run {} --prompt a", &[&missing]), "missing"),
        (args("run {} --prompt a", &[&empty]), "manifest.pb"),
        (args("run {} --prompt a", &[&tales()]), "quantc compile"),
        (args("run {} --prompt a --threads 1 --decode-threads 2", &[&engine]), "2 threads for single tokens"),
        (args("eval {} --text {}", &[&engine, &missing]), "missing"),
        (args("eval {} --text {} --window 100000", &[&engine, &text()]), "context"),
        (args("eval {} --text {} --window 1", &[&engine, &text()]), "window"),
        (args("bench {} --prompt-tokens 5000", &[&engine]), "context"),
        (args("embed {} --text a", &[&engine]), "decoder"),
        (args("explain {}", &[&missing]), "missing"),
        (args("import {}", &[&missing]), "missing"),
        (args("opt {} -p dedupe", &[&missing]), "missing"),
    ];
    for (mut case, what) in cases {
        if case[0] == "compile" {
            case.extend(["--store".into(), common::store().into()]);
        }
        let err = refused(case.clone(), 1);
        assert!(err.contains(what), "{case:?} does not tell {what:?}: {err}");
    }
    assert!(!out.exists());
}

#[test]
fn near_misses_are_suggested() {
    let cases = [
        ("compile {} --target host --preset w8a9 -o never", "w8a8"),
        ("compile {} --target cpu-avx512 --preset w8a8 -o never", "cpu-avx512vnni"),
        ("compile {} --target host -p fuse-epilog -o never", "fuse-epilogue"),
        ("compile {} --target host -p layers(round-to-nearest{grup=32}) -o never", "group"),
        ("compile {} --target host -p layers(round-to-nearest{format=int44}) -o never", "int4"),
        ("passes fold-constant", "fold-constants"),
        ("presets w4a16-g12", "w4a16-g128"),
        ("targets cpu-avx", "cpu-avx2"),
        ("formats int44", "int4"),
        ("ops matmull", "matmul"),
    ];
    for (case, meant) in cases {
        let mut case = args(case, &[&tales()]);
        if case[0] == "compile" {
            case.extend(["--store".into(), common::store().into()]);
        }
        let err = refused(case.clone(), 1);
        let said =
            err.split_once("did you mean ").unwrap_or_else(|| panic!("{case:?} helps nobody: {err}")).1;
        assert!(said.contains(meant), "{case:?}: {err}");
    }
}

#[test]
fn compile_tells_one_object() {
    let summary = decoder().summary;
    has_keys(
        &summary,
        &[
            "engine",
            "target",
            "pipeline",
            "weight_bytes",
            "decode_bytes_per_token",
            "kernels",
            "weights_made",
            "weights_reused",
            "seconds",
            "peak_rss_bytes",
            "agreement",
            "report",
            "passes",
        ],
    );
    assert!(number(&summary, "weight_bytes") >= number(&summary, "decode_bytes_per_token"));
    assert!(summary["pipeline"].as_str().expect("text").contains("round-to-nearest{format=int8"));
}

#[test]
fn caches_are_stored_as_asked() {
    let bytes = |format: &str| {
        let built = Recipe::preset(tales(), "f32").with(&["--kv-cache", format, "--agreement", "0"]).built();
        let pipeline = built.summary["pipeline"].as_str().expect("a text").to_owned();
        let states = built.open().manifest().state_bytes(1).expect("they fit");
        (pipeline, states)
    };
    let (_, float) = bytes("f32");
    for (format, pass, share) in [
        ("bf16", "cast-cache{to=bf16}", 0.5),
        ("int8", "quantize-cache{format=int8, scale=dynamic}", 0.25),
        ("fp8", "quantize-cache{format=e4m3, scale=dynamic}", 0.25),
    ] {
        let (pipeline, states) = bytes(format);
        assert!(pipeline.starts_with(pass), "{pipeline}");
        // Beside the numbers of a head lies one scale.
        let most = share + if share < 0.5 { 0.07 } else { 0.0 };
        let got = states as f64 / float as f64;
        assert!((share..=most).contains(&got), "{format}: {got}");
    }
    let mut wrong = args("compile {} --target host --preset f32 --kv-cache int4 -o never", &[&tales()]);
    wrong.extend(["--store".into(), common::store().into()]);
    let err = refused(wrong, 1);
    assert!(err.contains("cache of `int4` has no kernels") && err.contains("int8 or fp8"), "{err}");
}

#[test]
fn run_tells_text_on_stdout_and_the_rest_on_stderr() {
    let engine = decoder().path;
    let prompt = [OsString::from("--prompt"), "Once upon a time".into()];
    let call = |more: &str| {
        let all = args(&format!("run {{}} --max-tokens 24 {more}"), &[&engine]);
        all.into_iter().filter(|a| !a.is_empty()).chain(prompt.clone()).collect::<Vec<_>>()
    };
    let plain = quantc(call(""));
    assert_eq!(plain.code, 0, "{}", plain.err);
    let object = quantc(call("--json"));
    assert_eq!(object.err, "");
    let object = one_object(&object.out);
    has_keys(
        &object,
        &["text", "prompt", "tokens", "prompt_tokens", "finish", "seed", "prefill_tok_s", "decode_tok_s"],
    );
    let said = object["text"].as_str().expect("text");
    assert_eq!(plain.out, format!("{said}\n"));
    assert!(plain.err.contains("tokens/s") || plain.err.contains("/s"), "{}", plain.err);
    assert_eq!(object["tokens"].as_array().expect("a list").len(), 24);
    assert_eq!(object["finish"], "length");

    // Where weights lie, how many threads there are, and what else is told change nothing.
    has_keys(&object, &["load_ms", "first_token_ms", "peak_rss_bytes", "moved_bytes", "decode_threads"]);
    for more in
        ["--weights mapped", "--weights huge", "--threads 2 --decode-threads 1", "--no-verify --stats"]
    {
        let done = quantc(call(more));
        assert_eq!(done.out, plain.out, "{more}");
        assert_eq!(done.err.contains("first token after"), more.contains("--stats"), "{}", done.err);
    }

    // Drawing follows the seed and nothing else.
    let drawn =
        |seed| one_object(&ok(call(&format!("--json --temperature 1 --seed {seed}"))))["text"].clone();
    assert_eq!(drawn(7), drawn(7));
    assert_ne!(drawn(7), drawn(8));

    // A prompt that leaves less room than asked for ends with the context.
    let long = json(args("run {} --max-tokens 100000 --ignore-eos --prompt Once", &[&engine]));
    assert_eq!(long["finish"], "context");
    assert!(refused(args("run {} --temperature=-1 --prompt a", &[&engine]), 1).contains("temperature"));
}

#[test]
fn damaged_weights_end_a_run_with_an_error() {
    let good = decoder().path;
    let engine = folder().join("damaged-weights");
    std::fs::create_dir_all(&engine).expect("the target folder is writable");
    for entry in std::fs::read_dir(&good).expect("the engine is readable").flatten() {
        std::fs::copy(entry.path(), engine.join(entry.file_name())).expect("the target folder is writable");
    }
    let path = engine.join("weights.bin");
    let mut weights = std::fs::read(&path).expect("the engine is readable");
    let at = weights.len() / 2;
    weights[at] ^= 1;
    std::fs::write(&path, weights).expect("the target folder is writable");
    // The text may be there by then.
    for more in ["", " --json", " --max-tokens 0", " --max-tokens 1"] {
        let done = quantc(args(&format!("run {{}} --prompt Once{more}"), &[&engine]));
        assert_eq!(done.code, 1, "{more}: {}", done.err);
        assert!(done.err.contains("weights.bin") && done.err.contains("blake3"), "{more}: {}", done.err);
    }
    let unseen = quantc(args("run {} --prompt Once --no-verify", &[&engine]));
    assert_eq!(unseen.code, 0, "{}", unseen.err);
}

#[test]
fn eval_tells_one_object() {
    let engine = decoder().path;
    let scores = json(args("eval {} --text {} --window 128", &[&engine, &text()]));
    has_keys(&scores, &["perplexity", "nll", "tokens_scored", "window", "seconds"]);
    assert!(scores.get("kl_mean").is_none());
    assert!((number(&scores, "nll").exp() / number(&scores, "perplexity") - 1.0).abs() < 1e-9);
    assert_eq!(number(&scores, "tokens_scored") % 127.0, 0.0, "whole windows only");

    // A model is compiled first; that is told on stderr.
    let done =
        quantc(args("eval {} --text {} --window 128 --against {} --json", &[&engine, &text(), &tales()]));
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(done.err.contains("compiling"), "{}", done.err);
    let against = one_object(&done.out);
    let compared = ["kl_mean", "kl_p99", "top1_agreement", "perplexity_base", "logits_error"];
    has_keys(&against, &compared);
    assert!((1e-3..0.5).contains(&number(&against, "logits_error")), "{against}");
    assert_eq!(against["perplexity"], scores["perplexity"]);
    assert!(number(&against, "kl_mean") > 0.0 && number(&against, "kl_mean") <= number(&against, "kl_p99"));

    let itself = json(args("eval {} --text {} --window 128 --against {}", &[&engine, &text(), &engine]));
    assert_eq!((number(&itself, "kl_mean"), number(&itself, "top1_agreement")), (0.0, 1.0));
    assert_eq!(number(&itself, "logits_error"), 0.0);

    // Ids of an array are taken as they are, a row at a time: of 64 tokens 63 are scored. 3 rows make one window of 128.
    let mut array = b"\x93NUMPY\x01\x00v\x00".to_vec();
    let head = "{'descr': '<u2', 'fortran_order': False, 'shape': (3, 64), }";
    array.extend(format!("{head:<117}\n").bytes());
    array.extend((0..192u16).flat_map(|i| (i * 5).to_le_bytes()));
    let ids = folder().join("ids.npy");
    std::fs::write(&ids, array).expect("the folder is writable");
    let scores = json(args("eval {} --text {}", &[&engine, &ids]));
    assert_eq!((number(&scores, "tokens_scored"), number(&scores, "window")), (3.0 * 63.0, 64.0));
    let scores = json(args("eval {} --text {} --window 128", &[&engine, &ids]));
    assert_eq!(number(&scores, "tokens_scored"), 127.0);
}

#[test]
fn bench_tells_one_object() {
    let engine = decoder().path;
    let call = "bench {} --prompt-tokens 8 --gen-tokens 4 --batch 2 --repeat 3 --threads 1";
    let speed = json(args(call, &[&engine]));
    has_keys(
        &speed,
        &[
            "prefill_tok_s",
            "decode_tok_s",
            "weight_bytes",
            "decode_bytes_per_token",
            "peak_rss_bytes",
            "load_ms",
            "threads",
            "prompt_tokens",
            "gen_tokens",
            "runs",
        ],
    );
    assert_eq!(
        (number(&speed, "threads"), number(&speed, "prompt_tokens"), number(&speed, "gen_tokens")),
        (1.0, 8.0, 4.0)
    );
    let mut runs: Vec<f64> =
        speed["runs"].as_array().expect("a list").iter().map(|r| number(r, "decode_tok_s")).collect();
    runs.sort_by(f64::total_cmp);
    assert_eq!(runs.len(), 3);
    assert_eq!(number(&speed, "decode_tok_s"), runs[1], "the median");
}

#[test]
fn embed_needs_a_tokenizer_and_an_encoder() {
    let engine = Recipe::preset(models("tiny-bert"), "f32").built().path;
    let err = refused(args("embed {} --text hello", &[&engine]), 1);
    assert!(err.contains("tokenizer"), "{err}");
    let err = refused(args("run {} --prompt hello", &[&engine]), 1);
    assert!(err.contains("encoder") || err.contains("tokenizer"), "{err}");
}

/// A tokenizer for an encoder with the words of `vocab` and nothing else.
fn words(vocab: &[&str]) -> String {
    let vocab: serde_json::Map<String, Value> =
        vocab.iter().enumerate().map(|(i, w)| (w.to_string(), Value::from(i))).collect();
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "unknown" },
    })
    .to_string()
}

#[test]
fn encoders_neither_generate_nor_score_text() {
    let encoder = Recipe::preset(models("tiny-bert"), "f32").built().path;
    let decoder = decoder().path;
    let (encoder, decoder, text) = (encoder.as_path(), decoder.as_path(), text());
    let cases = [
        args("run {} --prompt a", &[encoder]),
        args("bench {}", &[encoder]),
        args("eval {} --text {}", &[encoder, &text]),
        args("eval {} --text {} --against {}", &[decoder, &text, encoder]),
    ];
    for case in cases {
        let err = refused(case.clone(), 1);
        assert!(err.contains("an encoder cannot be") && err.contains("quantc embed"), "{case:?}: {err}");
    }
}

#[test]
fn what_is_not_an_engine_is_not_replaced() {
    let letters = folder().join("letters");
    std::fs::create_dir_all(&letters).expect("the target folder is writable");
    std::fs::write(letters.join("letter"), "dear").expect("the target folder is writable");
    // Before anything is read: the model need not be there.
    let missing = folder().join("missing");
    let err = refused(
        args(
            "compile {} --target host --preset f32 --store {} -o {}",
            &[&missing, &common::store(), &letters],
        ),
        1,
    );
    assert!(err.contains("it is not an engine") && err.contains("letters"), "{err}");
    assert!(letters.join("letter").exists());
}

#[test]
fn embed_tells_one_object() {
    let dir = folder().join("worded-bert");
    common::copy_folder(&models("tiny-bert"), &dir);
    std::fs::write(dir.join("tokenizer.json"), words(&["unknown", "the", "cat", "sits"])).expect("writable");
    let engine = Recipe::preset(&dir, "f32").built().path;
    let texts = file("texts.txt", "the cat sits\ncat\nthe dog sits\n");
    let vectors = json(args("embed {} --file {}", &[&engine, &texts]));
    has_keys(&vectors, &["embeddings", "tokens", "width"]);
    assert_eq!(vectors["tokens"], serde_json::json!([3, 1, 3]));
    let rows: Vec<Vec<f64>> = serde_json::from_value(vectors["embeddings"].clone()).expect("rows of numbers");
    assert!(
        rows.iter().all(|row| row.len() == 24 && (row.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5)
    );

    // One text gives the vector it has in a file; of one token the mean is the first.
    let call = |more: &str| {
        json(args(&format!("embed {{}} --text cat {more}"), &[&engine]))["embeddings"][0].clone()
    };
    let (mean, cls) = (call("--pool mean"), call("--pool cls"));
    assert_eq!(mean, vectors["embeddings"][1]);
    assert_eq!(mean, cls);
    assert_ne!(mean, call("--no-normalize"));
    let plain = ok(args("embed {} --file {}", &[&engine, &texts]));
    assert_eq!(plain.lines().count(), 3);
    assert!(plain.lines().all(|l| l.split(' ').count() == 24));
}

#[test]
fn inspect_shows_what_things_hold() {
    let engine = decoder().path;
    let object = json(args("inspect {}", &[&engine]));
    assert_eq!((&object["kind"], &object["model"]), (&"engine".into(), &"tales-3M".into()));
    assert_eq!(object["facts"]["preset"], "w8a8");
    let files: Vec<&str> =
        object["files"].as_array().expect("a list").iter().filter_map(|f| f["name"].as_str()).collect();
    assert_eq!(
        files,
        ["kernels.o", "pipeline.txt", "report.json", "tokenizer.bin", "tokenizer.json", "weights.bin"]
    );
    let text = ok(args("inspect {}", &[&engine]));
    let written = std::fs::read_to_string(engine.join("manifest.txt")).expect("the engine has it");
    assert_eq!(text, written);

    let model = json(args("inspect {} --digests", &[&tales()]));
    assert_eq!(model["kind"], "module");
    let weights = model["weights"].as_array().expect("a list");
    assert!(weights.len() > 30);
    assert!(weights.iter().all(|w| w["digest"].as_str().is_some_and(|d| d.len() == 64)), "{model}");
    assert_eq!(number(&model, "weight_bytes"), weights.iter().map(|w| number(w, "bytes")).sum::<f64>());
}

#[test]
fn explain_shows_kernels() {
    let engine = decoder().path;
    let object = json(args("explain {}", &[&engine]));
    has_keys(&object, &["target", "pipeline", "kernels"]);
    let kernels = object["kernels"].as_array().expect("a list");
    assert_eq!(kernels.len() as f64, number(&decoder().summary, "kernels"));
    assert!(
        kernels
            .iter()
            .all(|k| k["symbol"].is_string() && !k["launches"].as_array().expect("a list").is_empty())
    );
    let some = json(args("explain {} --only attn", &[&engine]));
    let some = some["kernels"].as_array().expect("a list").len();
    assert!(some > 0 && some < kernels.len());
    let text = ok(args("explain {}", &[&engine]));
    assert!(text.starts_with("target ") && text.contains("template attention"), "{text}");
}

#[test]
fn imported_text_is_a_module_again() {
    let path = folder().join("tales.qir");
    let done = quantc(args("import {} -o {}", &[&tales(), &path]));
    assert_eq!((done.code, done.out.as_str()), (0, ""), "{}", done.err);
    let text = std::fs::read_to_string(&path).expect("it was written");
    assert_eq!(ok(args("import {}", &[&tales()])), text);
    assert!(text.starts_with("module @"), "{}", &text[..80]);
    let object = json(args("inspect {}", &[&path]));
    assert_eq!(object["kind"], "module");
}

const TEN_LINES: &str = "\
module @ten
weight @w : tensor<4x4xf32> = splat 0.5
weight @b : tensor<4xf32> = splat 0.125
main (%x: tensor<?tx4xf32>) -> tensor<?tx4xf32> {
  %p = matmul %x, @w
  %q = add %p, @b
  %r = add %p, @b
  %y = add %q, %r
  return %y
}
";

fn opt(more: &str) -> Done {
    let path = file("ten.qir", TEN_LINES);
    let done = quantc(args(&format!("opt {{}} -p dedupe,fuse-epilogue {more}"), &[&path]));
    assert_eq!(done.code, 0, "{}", done.err);
    done
}

#[test]
fn opt_prints_the_module_on_stdout_and_what_was_asked_for_on_stderr() {
    let plain = quantc(args("opt {} -p dedupe,fuse-epilogue", &[&file("plain.qir", TEN_LINES)]));
    assert_eq!((plain.code, plain.err.as_str()), (0, ""));
    insta::assert_snapshot!("opt", plain.out);

    let change = opt("--print-after-change");
    assert_eq!(change.out, plain.out);
    insta::assert_snapshot!("opt_print_after_change", change.err);
    // A pass that changes nothing is not printed after a change, but after each.
    let path = file("still.qir", TEN_LINES);
    let still = |flag: &str| quantc(args(&format!("opt {{}} -p drop-dead {flag}"), &[&path])).err;
    assert_eq!(still("--print-after-change"), "");
    assert!(still("--print-after").contains("// after drop-dead"), "{}", still("--print-after"));

    let explain = opt("--explain");
    assert_eq!(explain.out, plain.out);
    assert_eq!(explain.err, "%q in @main: add-after-matmul\n");

    let time = opt("--time").err;
    for pass in ["all passes", "dedupe", "fuse-epilogue", "add-after-matmul"] {
        assert!(time.lines().any(|l| l.trim_end().ends_with(pass) && l.contains(" s ")), "{pass}: {time}");
    }
    assert!(opt("--remarks").err.contains("remark: fuse-epilogue @main: add-after-matmul"));

    let stopped = opt("--stop-after dedupe");
    assert!(stopped.out.contains("%p = matmul %x, @w :") && !stopped.out.contains("%r"), "{}", stopped.out);
    let err = refused(args("opt {} -p dedupe --stop-after fuse-epilogue", &[&path]), 1);
    assert!(err.contains("fuse-epilogue"), "{err}");
}

#[test]
fn opt_reads_stdin() {
    let mut child = command(["opt", "-", "-p", "dedupe"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the tool starts");
    child.stdin.take().expect("it is piped").write_all(TEN_LINES.as_bytes()).expect("the tool reads");
    let out = child.wait_with_output().expect("the tool ends");
    assert!(out.status.success());
    assert!(String::from_utf8_lossy(&out.stdout).starts_with("module @ten"));
}

#[test]
fn opt_shows_where_a_module_is_wrong() {
    let path = file("wrong.qir", &TEN_LINES.replace("%q = add %p, @b", "%q = add %p, @bias"));
    let err = refused(args("opt {} -p dedupe", &[&path]), 1);
    assert!(err.contains("wrong.qir:6") && err.contains("bias"), "{err}");
    let path = file("ill.qir", &TEN_LINES.replace("<4x4xf32> = splat", "<5x6xf32> = splat"));
    let err = refused(args("opt {} -p dedupe", &[&path]), 1);
    assert!(err.contains("ill.qir:5"), "{err}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    for case in [vec!["passes"], vec!["ops"], vec!["import", tales().to_str().expect("UTF-8")]] {
        let mut child =
            command(&case).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the tool starts");
        drop(child.stdout.take());
        let out = child.wait_with_output().expect("the tool ends");
        assert!(out.status.success(), "{case:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
}

#[test]
fn manual_pages_exist_for_every_entry() {
    for page in ["passes", "targets", "formats", "ops", "presets"] {
        let table = ok([page]);
        // A table, and for presets a second one behind it.
        let lines = table.lines().skip(1).take_while(|l| !l.is_empty());
        let names: Vec<&str> = lines.filter_map(|l| l.split_whitespace().next()).collect();
        assert!(names.len() >= 4, "{table}");
        for name in names.into_iter().take(40) {
            let text = ok([page, name]);
            assert!(text.lines().count() >= 3, "{page} {name}: {text}");
        }
    }
}

#[test]
fn bench_splits_its_steps() {
    let call = "bench {} --prompt-tokens 8 --gen-tokens 4 --batch 2 --repeat 2 --threads 1 --profile";
    let call = args(call, &[&decoder().path]);
    let text = ok(&call);
    assert!(text.contains("prefill: ") && text.contains("waiting at barriers"), "{text}");
    let speed = json(call);
    for (phase, steps, tokens) in [("prefill", 4.0, 8.0), ("decode", 8.0, 2.0)] {
        let phase = &speed["profile"][phase];
        has_keys(phase, &["step_ms", "waiting_ms", "outside_ms", "sampling_ms", "kinds"]);
        assert_eq!(number(phase, "steps"), steps);
        let kinds = phase["kinds"].as_array().expect("a list");
        let share: f64 = kinds.iter().map(|k| number(k, "share")).sum();
        assert!(share > 0.0 && share <= 1.001, "{phase}");
        let logits = kinds.iter().find(|k| k["kind"] == "head.logits").expect("a head");
        assert_eq!(number(logits, "calls_per_step"), 1.0);
        let up = kinds.iter().filter(|k| number(k, "macs_per_step") > 0.0);
        assert!(up.count() > 3, "{tokens} tokens: {phase}");
    }
}

#[test]
fn tuning_is_an_input_of_its_own() {
    let table = folder().join("tuning.json");
    let _ = std::fs::remove_file(&table);
    let engine = decoder().path;
    let call = "tune {} --shape bf16:int4:g32:70x96 --out {} --rounds 1 --count 2";
    let first = json(args(call, &[&engine, &table]));
    has_keys(&first, &["target", "cpu", "measured", "entries", "seconds"]);
    let measured = first["measured"].as_array().expect("a list");
    assert!(measured.len() > 4 && measured.len() as f64 == number(&first, "entries"));
    let text = std::fs::read_to_string(&table).expect("it was written");
    // What is known is not measured again, and the same table has the same bytes.
    let again = json(args(call, &[&engine, &table]));
    assert_eq!(again["measured"].as_array().map(Vec::len), Some(0));
    assert_eq!(std::fs::read_to_string(&table).expect("it was written"), text);

    let out = folder().join("tuned");
    let call = "compile {} --target host --preset w8a8 -o {} --store {} --tuning {} --agreement 4";
    json(args(call, &[&tales(), &out, &common::store(), &table]));
    let facts = &json(args("inspect {}", &[&out]))["facts"];
    assert_eq!(facts["tuning"], blake3::hash(text.as_bytes()).to_hex().as_str());
    let explained = ok(args("explain {}", &[&out]));
    assert!(explained.contains("measured") && explained.contains("of the limit"), "{explained}");

    let broken = file("broken.json", "{\"version\": 1}");
    let err = refused(args(call, &[&tales(), &out, &common::store(), &broken]), 1);
    assert!(err.contains("no tuning table") && err.contains("broken.json"), "{err}");
    let other = file("other.json", &text.replace("\"cpu\": \"", "\"cpu\": \"other "));
    let err = refused(args("tune {} --out {}", &[&engine, &other]), 1);
    assert!(err.contains("was measured on other"), "{err}");
    for (shape, why) in
        [("int8", "four parts"), ("int8:e4m3:row:64x64", "no kernel"), ("f32:int4:g0:9x9", "no kernel")]
    {
        let err = refused(args(&format!("tune --shape {shape} --out {{}}"), &[&folder().join("no.json")]), 1);
        assert!(err.contains(why), "{err}");
    }
}

#[test]
fn help() {
    let mut pages = vec![vec!["--help"]];
    for page in [
        "compile",
        "calibrate",
        "run",
        "embed",
        "eval",
        "bench",
        "tune",
        "opt",
        "import",
        "inspect",
        "explain",
        "passes",
    ] {
        pages.push(vec![page, "--help"]);
    }
    for page in pages {
        let name = format!("help_{}", page[0].trim_start_matches('-'));
        insta::assert_snapshot!(name, ok(page));
    }
}
