//! Files of statistics, through the tool: parts merge to the bytes of the whole, engines are calibrated by them, and what is
//! stale, damaged or missing is refused.
#![cfg(feature = "llvm")]

mod common;

use common::{folder, json, models, number, quantc};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Everything that merges.
const ALL: &str = "absmax,mean,cache,histogram,min-max,moments,moving-average";

fn args(text: &str) -> Vec<OsString> {
    text.split(' ').map(OsString::from).collect()
}

/// The arguments that name the text and the store.
fn on_data() -> Vec<OsString> {
    let data = folder().join("ids.npy");
    if !data.exists() {
        let ids: Vec<i32> = (0..1024).map(|i| (i * i * 31 + i * 7 + 3) % 41 + 3).collect();
        let array = common::ids_array(&[ids]);
        // Tests run at the same time; whoever comes last writes the same.
        let part = folder().join(format!("{:?}.npy", std::thread::current().id()));
        std::fs::write(&part, array)
            .and_then(|()| std::fs::rename(part, &data))
            .expect("the folder is writable");
    }
    vec!["--data".into(), data.into(), "--store".into(), folder().join("store").into()]
}

/// Calibrates the bundled model, with further options.
fn file(name: &str, options: &str) -> PathBuf {
    let path = folder().join(format!("{name}.qcal"));
    let mut all: Vec<OsString> = vec!["calibrate".into(), models("tiny-llama3").into()];
    all.extend(on_data());
    all.extend(args(options));
    all.extend(["-o".into(), path.clone().into()]);
    json(all);
    path
}

/// Merges files and gives the bytes of the result.
fn merged(name: &str, parts: &[&Path]) -> Vec<u8> {
    let path = folder().join(format!("{name}.qcal"));
    let mut all = args("calibrate --merge");
    all.extend(parts.iter().map(OsString::from));
    all.extend(["-o".into(), path.clone().into()]);
    json(all);
    bytes(&path)
}

/// The arguments of a merge but for the files.
fn merge_out() -> Vec<OsString> {
    let mut all = args("calibrate --merge -o");
    all.push(folder().join("out.qcal").into());
    all
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("it was written")
}

fn pipeline(in_layers: &str) -> String {
    format!(
        "outline-layers, fold-constants, dedupe, layers({in_layers}, fuse-dequant-matmul, fuse-epilogue), \
         drop-dead, pack-weights"
    )
}

/// The arguments of a compilation.
fn compilation(engine: &str, model: &str, in_layers: &str, more: Vec<OsString>) -> Vec<OsString> {
    let mut all: Vec<OsString> = vec!["compile".into(), models(model).into()];
    all.extend(args("--target host --agreement 0 -p"));
    all.extend([pipeline(in_layers).into(), "-o".into(), folder().join(engine).into()]);
    all.into_iter().chain(more).collect()
}

fn from_file(file: &Path) -> Vec<OsString> {
    vec!["--stats".into(), file.into(), "--store".into(), folder().join("store").into()]
}

#[test]
fn parts_merge_to_the_bytes_of_the_whole() {
    let take =
        |name: &str, samples: &str| file(name, &format!("--stats {ALL} --length 64 --seed 3 {samples}"));
    let whole = bytes(&take("whole", "--samples 11"));
    let parts = [
        take("first", "--samples 4"),
        take("second", "--first 4 --samples 1"),
        take("third", "--first 5 --samples 6"),
    ];
    let [first, second, third] = &parts.each_ref().map(PathBuf::as_path);
    assert!(whole == merged("in-order", &[first, second, third]));
    assert!(whole == merged("other-order", &[third, first, second]));
    merged("two", &[third, second]);
    assert!(whole == merged("in-steps", &[&folder().join("two.qcal"), first]));
    assert!(merged("one", &[second]) == bytes(second));

    let twice = quantc(merge_out().into_iter().chain([first, first].map(OsString::from)));
    assert_eq!(twice.code, 1);
    assert!(twice.err.contains("both have seen sample 0"), "{}", twice.err);
    let other = file("other-length", &format!("--stats {ALL} --length 65 --seed 3 --first 11 --samples 1"));
    let mixed = quantc(merge_out().into_iter().chain([first, &*other].map(OsString::from)));
    assert!(mixed.code == 1 && mixed.err.contains("different lengths of samples"), "{}", mixed.err);
}

#[test]
fn engines_are_calibrated_by_a_file() {
    let path = file("few", "--stats absmax,hessian,histogram --samples 8 --length 128");
    // In the first layer nothing was rounded yet: there the file tells what the text does.
    let choice = "samples=8, length=128, stats=[absmax, hessian, histogram], layers=[l0]";
    let first = format!("calibrate{{{choice}}}, smoothquant{{layers=[l0]}}, gptq{{layers=[l0]}}");
    json(compilation("by-text", "tiny-llama3", &first, on_data()));
    json(compilation("by-file", "tiny-llama3", &first, from_file(&path)));
    let weights = |engine: &str| bytes(&folder().join(engine).join("weights.bin"));
    assert!(weights("by-text") == weights("by-file"));
    // And all layers, with static scales.
    let all = "calibrate{stats=[hessian, histogram]}, gptq{skip-layers=[head]}, \
               round-to-nearest{format=int8, layers=[head]}, quantize-activations{scale=static}";
    let built = json(compilation("static", "tiny-llama3", all, from_file(&path)));
    let report = &built["report"];
    assert_eq!(report["scales"].as_array().map(Vec::len), Some(9));
    let data = &report["calibration"][0];
    assert_eq!(
        (&data["data"], number(data, "samples"), number(data, "length")),
        (&"ids.npy".into(), 8.0, 128.0)
    );
    // Sums of products are not merged.
    let merge = quantc(merge_out().into_iter().chain([path.into()]));
    assert_eq!(merge.code, 0, "one file is itself: {}", merge.err);
    let a = file("hessians-a", "--stats hessian --length 32 --samples 2");
    let b = file("hessians-b", "--stats hessian --length 32 --first 2 --samples 2");
    let done = quantc(merge_out().into_iter().chain([a.into(), b.into()]));
    assert!(done.code == 1 && done.err.contains("`hessian` cannot be merged"), "{}", done.err);
}

/// The error of a compilation, which must leave no engine.
fn refused(model: &str, in_layers: &str, file: &Path) -> String {
    let done = quantc(compilation("refused", model, in_layers, from_file(file)));
    assert_eq!(done.code, 1, "{}", done.err);
    assert!(!folder().join("refused").exists());
    done.err
}

#[test]
fn what_is_stale_damaged_or_missing_is_refused_with_the_remedy() {
    let path = file("absmax", "--stats absmax --samples 2 --length 32");
    let says = |err: String, words: &[&str]| {
        for word in words.iter().chain(&[".qcal"]) {
            assert!(err.contains(word), "`{word}` is not in\n{err}");
        }
    };
    let smooth = "calibrate{stats=[absmax]}, smoothquant{skip-layers=[head]}";
    says(refused("tiny-mistral", smooth, &path), &["stale", "of the model tiny-llama3", "--data"]);
    says(
        refused("tiny-llama3", &format!("fold-norm-gain, {smooth}"), &path),
        &["stale", "program or weights of @l0", "--before"],
    );
    let folded = file("folded", "--stats absmax --samples 2 --length 32 --before fold-norm-gain");
    json(compilation("folded", "tiny-llama3", &format!("fold-norm-gain, {smooth}"), from_file(&folded)));
    says(
        refused("tiny-llama3", "calibrate{stats=[hessian]}, gptq", &path),
        &["no statistic `hessian`", "it has absmax", "--stats"],
    );
    says(
        refused("tiny-llama3", "calibrate{stats=[cache]}, smooth-cache", &path),
        &["nothing of what goes into caches"],
    );

    let whole = bytes(&path);
    let damaged = folder().join("damaged.qcal");
    let middle = whole.len() / 2;
    let mut flipped = whole.clone();
    flipped[middle] ^= 1;
    for bytes in [&whole[..0], &whole[..40], &whole[..middle], &whole[..whole.len() - 1], &flipped] {
        std::fs::write(&damaged, bytes).expect("the folder is writable");
        says(refused("tiny-llama3", smooth, &damaged), &["no file of statistics", "quantc calibrate MODEL"]);
    }
    // A text and a file at once are too much.
    let both = on_data().into_iter().chain(["--stats".into(), path.into()]).collect();
    assert_eq!(quantc(compilation("both", "tiny-llama3", smooth, both)).code, 2);
}
