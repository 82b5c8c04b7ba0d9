//! Calibration and what is built on it, through the tool: quality, equal bytes, and what is refused.
#![cfg(feature = "llvm")]

mod common;

use common::{Recipe, folder, json, models, number, quantc};
use std::path::{Path, PathBuf};

/// A few samples are enough to see that each pass does its work.
const FEW: &str = "calibrate{samples=8, length=256, stats=[absmax, hessian, rows], skip-layers=[head]}";

fn pipeline(in_layers: &str) -> String {
    format!(
        "outline-layers, fold-constants, dedupe, layers({in_layers}, fuse-dequant-matmul, fuse-epilogue), \
         drop-dead, pack-weights"
    )
}

fn calibrated(in_layers: &str) -> Recipe {
    Recipe::pipeline(models("tales-3M"), &pipeline(in_layers)).on_data()
}

/// The divergence from the float model on a part of the text that nothing was calibrated on.
fn divergence(recipe: &Recipe) -> f64 {
    let base = Recipe::preset(models("tales-3M"), "f32").built().path;
    let base = base.to_str().expect("UTF-8").to_string();
    let built = recipe.built();
    assert!(built.disagreement() < 1e-4, "{:?}: {}", recipe.how, built.disagreement());
    number(&built.eval(&models("tales_eval.txt"), &["--against", &base, "--max-tokens", "6132"]), "kl_mean")
}

#[test]
fn rewriting_weights_keeps_more_than_rounding_them() {
    let (int4, skip) = ("format=int4, group=128, skip-layers=[head]", "skip-layers=[head]");
    let rtn =
        divergence(&Recipe::pipeline(models("tales-3M"), &pipeline(&format!("round-to-nearest{{{int4}}}"))));
    let gptq = divergence(&calibrated(&format!("{FEW}, gptq{{{int4}}}")));
    let awq =
        divergence(&calibrated(&format!("{FEW}, awq{{{int4}}}, round-to-nearest{{{int4}, search=output}}")));
    let smooth = divergence(&calibrated(&format!(
        "{FEW}, smoothquant{{alpha=search, {skip}}}, round-to-nearest{{format=int8, {skip}}}"
    )));
    eprintln!("divergence: int4 {rtn:.5}, gptq {gptq:.5}, awq {awq:.5}; smoothed int8 {smooth:.6}");
    assert!(gptq < 0.7 * rtn, "gptq {gptq}, rounded to nearest {rtn}");
    assert!(awq < 0.9 * rtn, "awq {awq}, rounded to nearest {rtn}");
    assert!(smooth < 0.001, "{smooth}");
}

fn bytes(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("weights.bin")).expect("an engine has weights")
}

#[test]
fn threads_and_stores_change_no_byte() {
    let text = pipeline(&format!(
        "{FEW}, smoothquant{{alpha=search, skip-layers=[head]}}, gptq{{group=64, skip-layers=[head]}}"
    ));
    let compile = |name: &str, store: &str, threads: &str| {
        let (engine, store) = (folder().join(name), folder().join(store));
        let made = json([
            "compile".as_ref(),
            models("tales-3M").as_os_str(),
            "--target".as_ref(),
            "host".as_ref(),
            "-p".as_ref(),
            text.as_ref(),
            "--data".as_ref(),
            models("tales_calib.txt").as_os_str(),
            "--store".as_ref(),
            store.as_os_str(),
            "--threads".as_ref(),
            threads.as_ref(),
            "--agreement".as_ref(),
            "0".as_ref(),
            "-o".as_ref(),
            engine.as_os_str(),
        ]);
        (engine, made)
    };
    // What a process that is gone was writing.
    let rows = folder().join("store-one/activations");
    std::fs::create_dir_all(&rows).expect("the folder is writable");
    std::fs::write(rows.join("00.999999999.part"), "half").expect("the folder is writable");
    let (one, _) = compile("one", "store-one", "1");
    let (two, _) = compile("two", "store-two", "2");
    assert!(bytes(&one) == bytes(&two), "the number of threads shows");
    // With the same store nothing is made again, and no rows of layers are left behind.
    let (again, made) = compile("again", "store-one", "2");
    assert_eq!(number(&made, "weights_made"), 0.0);
    assert!(bytes(&one) == bytes(&again));
    let left = |dir: &str| {
        let dir: PathBuf = folder().join("store-one").join(dir);
        std::fs::read_dir(dir).map_or(0, Iterator::count)
    };
    assert_eq!((left("activations"), left("tmp")), (0, 0));
}

/// Compiles with these arguments, which must be refused.
fn refused(in_layers: &str, data: Option<&Path>) -> String {
    let text = pipeline(in_layers);
    let out = folder().join("refused");
    let mut args: Vec<std::ffi::OsString> = vec!["compile".into(), models("tales-3M").into()];
    args.extend([
        "--target".into(),
        "host".into(),
        "-p".into(),
        text.into(),
        "-o".into(),
        out.clone().into(),
    ]);
    args.extend(["--store".into(), folder().join("store-refused").into()]);
    args.extend(data.iter().flat_map(|d| ["--data".into(), d.into()]));
    let done = quantc(&args);
    assert_eq!(done.code, 1, "{}", done.err);
    assert!(!out.exists());
    done.err
}

#[test]
fn what_is_missing_or_stale_is_said_with_the_remedy() {
    let text = models("tales_calib.txt");
    let says = |err: String, words: &[&str]| {
        for word in words {
            assert!(err.contains(word), "`{word}` is not in\n{err}");
        }
    };
    says(refused("calibrate", None), &["`calibrate` needs a text to calibrate on", "--data"]);
    says(refused("gptq", Some(&text)), &["`gptq` needs the statistic `hessian`", "`calibrate`"]);
    says(
        refused("calibrate{stats=[absmax]}, smoothquant{alpha=search}", Some(&text)),
        &["needs the statistic `rows`"],
    );
    says(
        refused("calibrate, fold-norm-gain, gptq", Some(&text)),
        &["`fold-norm-gain` changes the values it was taken of", "take it again"],
    );
    says(
        refused("calibrate{skip=[\"nothing.*\"]}", Some(&text)),
        &["`nothing.*` of `skip` matches no weight"],
    );
    says(
        refused("calibrate{skip-layers=[head]}, gptq", Some(&text)),
        &["statistic `hessian`", "@head", "let `calibrate` take it"],
    );
    let short = folder().join("short.txt");
    std::fs::write(&short, "Once upon a time.").expect("the folder is writable");
    says(refused("calibrate, gptq", Some(&short)), &["short.txt", "one sample takes", "longer text"]);
    let ids = folder().join("ids.npy");
    std::fs::write(&ids, common::ids_array(&[vec![5, 70_000]])).expect("the folder is writable");
    says(refused("calibrate, gptq", Some(&ids)), &["70000", "1024 tokens only"]);
}

#[test]
fn a_cache_of_codes_is_made_to_fit_its_scales() {
    let base = Recipe::preset(models("tales-3M"), "f32").built().path;
    let base = base.to_str().expect("UTF-8").to_string();
    let recipe = Recipe::preset(models("tales-3M"), "f32").with(&["--kv-cache", "int8"]);
    let plain = recipe.built();
    let smooth = recipe.on_data().built();
    // The report tells what `eval` measures, on the beginning of the text.
    let told = &smooth.summary["report"]["cache"];
    let args = ["--against", &base, "--max-tokens", "1024", "--window", "256"];
    let measured = smooth.eval(&models("tales_calib.txt"), &args);
    common::within("divergence in the report", number(told, "kl_mean"), number(&measured, "kl_mean"), 0.05);
    common::within(
        "perplexity in the report",
        number(told, "perplexity"),
        number(&measured, "perplexity"),
        1e-3,
    );
    assert_eq!(number(told, "tokens"), number(&measured, "tokens_scored"));
    assert!(plain.summary["report"]["cache"].is_null(), "nothing is measured without data");
    let cost = |built: &common::Built| {
        let args = ["--against", &base, "--max-tokens", "6132"];
        number(&built.eval(&models("tales_eval.txt"), &args), "kl_mean")
    };
    let (plain, smooth) = (cost(&plain), cost(&smooth));
    eprintln!("divergence with an int8 cache: {plain:.6}, channels made alike {smooth:.6}");
    assert!(smooth < plain, "{smooth} {plain}");
}

/// What passes tell needs fewer still.
const FEWEST: &str = "calibrate{samples=4, length=64, stats=[absmax, hessian], skip-layers=[head]}";

/// The rows of a section of a report.
fn rows<'a>(report: &'a serde_json::Value, section: &str) -> &'a Vec<serde_json::Value> {
    report[section].as_array().unwrap_or_else(|| panic!("`{section}` is no list"))
}

#[test]
fn the_report_tells_what_was_done_in_fields() {
    let text = &format!(
        "{FEWEST}, smoothquant{{skip=[\"l0.attn.q\"], skip-layers=[head]}}, gptq{{skip-layers=[head]}}"
    );
    let built = calibrated(text).built();
    let report = json(["inspect".as_ref(), built.path.as_os_str(), "--report".as_ref()]);
    assert_eq!(number(&report, "version"), 1.0);
    // What the tool prints is the same, and more that is not the same every time.
    let mut printed = built.summary["report"].clone();
    printed["kernels"] = report["kernels"].clone();
    assert_eq!(printed, report);
    let data = rows(&report, "calibration");
    assert_eq!(data.len(), 1, "{data:?}");
    assert_eq!((&data[0]["data"], number(&data[0], "samples")), (&"tales_calib.txt".into(), 4.0));
    assert_eq!(
        (number(&data[0], "length"), number(&data[0], "seed"), number(&data[0], "layers")),
        (64.0, 0.0, 4.0)
    );
    assert_eq!(data[0]["digest"].as_str().map(str::len), Some(64));
    // Every matrix of the four layers, as the pipeline says.
    let quantized = rows(&report, "quantized");
    assert_eq!(quantized.len(), 28);
    for weight in quantized {
        assert_eq!((&weight["pass"], number(weight, "bits")), (&"gptq".into(), 4.125), "{weight}");
        assert!((10.0..30.0).contains(&number(weight, "sqnr_db")), "{weight}");
        assert!((1e-5..0.1).contains(&number(weight, "output_error")), "{weight}");
        assert!(number(weight, "by_nearest") <= 1.0 && weight["fallback"].is_null(), "{weight}");
    }
    let sites = rows(&report, "sites");
    let left: Vec<_> = sites.iter().filter(|site| site["applied"] == false).collect();
    assert_eq!((sites.len(), left.len()), (16, 1), "{sites:?}");
    assert_eq!(left[0]["what"], "@l0.attn.q is skipped");
    assert!(sites.iter().filter(|s| s["applied"] == true).all(|s| rows(s, "factors").len() == 2));
    assert_eq!(rows(&report, "checks").len(), 4);
    let passes = rows(&built.summary, "passes");
    let gptq = passes.iter().find(|p| p["name"] == "gptq").expect("it ran");
    assert!(number(gptq, "seconds") > 0.0 && number(gptq, "peak_bytes") > 1e6, "{gptq}");
    // The tables name all of it.
    let tables = common::ok(["inspect".as_ref(), built.path.as_os_str(), "--report".as_ref()]);
    for word in ["l3.mlp.down", "tales_calib.txt", "@l0.attn.q is skipped", "smoothquant"] {
        assert!(tables.contains(word), "`{word}` is not in\n{tables}");
    }
}

#[test]
fn the_report_tells_what_saturates() {
    let static_scales = "round-to-nearest{format=int8}, quantize-activations{scale=static, range=mse}";
    let built =
        calibrated(&format!("calibrate{{samples=4, length=64, stats=[histogram]}}, {static_scales}")).built();
    let report = &built.summary["report"];
    let scales = rows(report, "scales");
    assert_eq!(scales.len(), 17);
    let shares: Vec<f64> = scales.iter().map(|s| number(s, "saturates")).collect();
    assert!(
        shares.iter().all(|share| (0.0..0.01).contains(share)) && shares.iter().any(|&s| s > 0.0),
        "{shares:?}"
    );
    assert!(scales.iter().all(|s| number(s, "max") == -number(s, "min")));
}

#[test]
fn channels_are_divided_in_front_of_a_cache_of_codes() {
    // Other codes are rounded then; whether results stay the same is judged without that.
    let smooth = format!("{FEWEST}, smoothquant{{skip-layers=[head]}}, round-to-nearest");
    let built = calibrated(&format!("{smooth}, quantize-activations")).with(&["--kv-cache", "int8"]).built();
    let report = &built.summary["report"];
    let checks = rows(report, "checks");
    assert_eq!(checks.iter().filter(|c| c["pass"] == "smoothquant").count(), 4);
    assert!(checks.iter().all(|c| number(c, "difference") < 1e-5), "{checks:?}");
    assert!(
        rows(report, "sites").iter().any(|s| s["place"] == "%l0_attn_rows in @l0" && s["applied"] == true)
    );
}

#[test]
fn rows_too_wide_for_a_hessian_are_rounded_to_nearest() {
    let calibrate =
        "calibrate{samples=4, length=128, stats=[absmax, hessian], widest=256, skip-layers=[head]}";
    let text = format!(
        "{calibrate}, awq{{rounding=gptq, skip-layers=[head]}}, gptq{{search=mse, skip-layers=[head]}}"
    );
    let built = calibrated(&text).built();
    let report = &built.summary["report"];
    // Only the last product of each layer reads rows of more than 256 channels.
    for weight in rows(report, "quantized") {
        let wide = weight["weight"].as_str().is_some_and(|name| name.contains("mlp.down"));
        assert_eq!(weight["fallback"].is_string(), wide, "{weight}");
        assert_eq!(weight["output_error"].is_null(), wide, "{weight}");
    }
    let why =
        |site: &serde_json::Value| site["what"].as_str().is_some_and(|w| w.contains("too many channels"));
    assert_eq!(rows(report, "sites").iter().filter(|site| why(site)).count(), 4);
    // As rounding to nearest with a search of the same kind, and no statistics at all.
    let nearest =
        calibrated("round-to-nearest{format=int4, group=128, search=mse, skip-layers=[head]}").built();
    let sqnr = |report: &serde_json::Value| -> Vec<f64> {
        let down =
            |w: &&serde_json::Value| w["weight"].as_str().is_some_and(|name| name.contains("mlp.down"));
        rows(report, "quantized").iter().filter(down).map(|w| number(w, "sqnr_db")).collect()
    };
    let (wide, nearest) = (sqnr(report), sqnr(&nearest.summary["report"]));
    assert_eq!(wide.len(), 4);
    assert!(wide.iter().zip(&nearest).all(|(a, b)| (a - b).abs() < 0.05), "{wide:?} {nearest:?}");
}

/// A tokenizer of the words `w3` to `w47`, which puts 1 in front of a text and 2 behind it.
fn words() -> String {
    let special =
        |id: u32| serde_json::json!({ "id": format!("[{id}]"), "ids": [id], "tokens": [format!("[{id}]")] });
    let place = |id: u32| serde_json::json!({ "SpecialToken": { "id": format!("[{id}]"), "type_id": 0 } });
    let text = serde_json::json!({ "Sequence": { "id": "A", "type_id": 0 } });
    let vocab: serde_json::Map<String, serde_json::Value> =
        (0..48).map(|i| (if i < 3 { format!("[{i}]") } else { format!("w{i}") }, i.into())).collect();
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" }, "decoder": null,
        "post_processor": {
            "type": "TemplateProcessing", "single": [place(1), text, place(2)], "pair": [],
            "special_tokens": { "[1]": special(1), "[2]": special(2) },
        },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "[0]" },
    })
    .to_string()
}

#[test]
fn an_encoder_is_calibrated_on_lines_as_it_embeds_them() {
    let model = folder().join("bert-of-words");
    common::copy_folder(&models("tiny-bert"), &model);
    std::fs::write(model.join("tokenizer.json"), words()).expect("the folder is writable");
    let weights = |data: &Path, length: u32| {
        let calibrate = format!("calibrate{{samples=0, length={length}, stats=[absmax, min-max, rows]}}");
        let rounded =
            "round-to-nearest{format=int8}, quantize-activations{format=int8, scale=static, range=whole}";
        let recipe = Recipe::pipeline(&model, &pipeline(&format!("{calibrate}, {rounded}")));
        bytes(&recipe.with(&["--agreement", "0", "--data", data.to_str().expect("UTF-8")]).built().path)
    };
    let text = |name: &str, lines: &[Vec<i32>]| {
        let line = |ids: &Vec<i32>| ids.iter().map(|id| format!("w{id} ")).collect::<String>() + "\n\n";
        let path = folder().join(name);
        std::fs::write(&path, lines.iter().map(line).collect::<String>()).expect("the folder is writable");
        path
    };
    let line =
        |n: i32, words: i32| -> Vec<i32> { (0..words).map(|i| (n * 17 + i * i * 5 + i) % 45 + 3).collect() };

    // Lines of one length are what an array of ids says, with what stands around each, however many a sample has.
    let lines: Vec<Vec<i32>> = (0..12).map(|n| line(n, 6)).collect();
    let array = |name: &str, rows: &[Vec<i32>]| {
        let path = folder().join(name);
        std::fs::write(&path, common::ids_array(rows)).expect("the folder is writable");
        path
    };
    let around: Vec<Vec<i32>> = lines.iter().map(|ids| [&[1][..], ids, &[2]].concat()).collect();
    let (same, bare) = (array("around.npy", &around), array("bare.npy", &lines));
    let lines = text("lines.txt", &lines);
    let want = weights(&same, 8);
    assert!(weights(&lines, 8) == want);
    assert!(weights(&lines, 32) == want, "texts of one sample do not run each by itself");
    assert!(weights(&bare, 6) != want, "what stands around a line changes nothing");

    // Lines of many lengths: calls are of their own length.
    let mut lines: Vec<Vec<i32>> = (0..20).map(|n| line(n, n % 7 + 1)).collect();
    let ragged = text("ragged.txt", &lines);
    lines.reverse();
    let (back, want) = (text("back.txt", &lines), weights(&ragged, 9));
    assert!(weights(&ragged, 32) == want);
    assert!(weights(&back, 32) == want, "what a later layer sees of a text is not its own");
    // A line that is longer than a sample is cut.
    let long = text("long.txt", &[[line(1, 6), line(2, 6)].concat()]);
    let cut = text("cut.txt", &[line(1, 6), line(2, 6)]);
    assert!(weights(&long, 8) == weights(&cut, 8));
    assert!(weights(&long, 14) != weights(&cut, 8));
}
