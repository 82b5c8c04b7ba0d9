//! Graphs over arrays on the command line: compiled, run on arrays and tensors, scored, looked at, and refused clearly.
#![cfg(feature = "llvm")]

mod common;
#[path = "../frontends/tests/onnx_wire/mod.rs"]
mod wire;

use common::{copy_folder, folder, json, number, ok, quantc, store};
use quantc_frontends::npy;
use quantc_ir::eval::Tensor;
use quantc_ir::ty::{ElemTy, TensorTy};
use std::path::{Path, PathBuf};
use wire::{FLOAT, INT64, attr_ints, floats, graph, model, node, tensor, value};

/// Numbers between -1 and 1 that look random.
fn noise(n: i64, seed: f32) -> Vec<f32> {
    (0..n).map(|i| ((i as f32 * 12.9898 + seed).sin() * 43758.547).fract()).collect()
}

fn write(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder().join(name);
    std::fs::write(&path, bytes).expect("the target folder is writable");
    path
}

/// A classifier: a convolution, a batch norm, a mean over places and a matrix; with a second input that is added.
fn net(name: &str, two: bool) -> PathBuf {
    let one = |name: &str, dims: &[i64], seed: f32| floats(name, dims, &noise(dims.iter().product(), seed));
    let weights = [
        one("w", &[5, 2, 3, 3], 1.0),
        one("gain", &[5], 2.0),
        one("bias", &[5], 3.0),
        one("mean", &[5], 4.0),
        floats("var", &[5], &[0.5, 1.0, 2.0, 0.25, 1.5]),
        one("m", &[5, 3], 5.0),
    ];
    let nodes = [
        node("c", "Conv", &["x", "w"], &["c"], &[attr_ints("pads", &[1, 1, 1, 1])]),
        node("n", "BatchNormalization", &["c", "gain", "bias", "mean", "var"], &["n"], &[]),
        node("r", "Relu", &["n"], &["r"], &[]),
        node("p", "GlobalAveragePool", &["r"], &["p"], &[]),
        node("f", "Flatten", &["p"], &["f"], &[]),
        node("g", "MatMul", &["f", "m"], &[if two { "g" } else { "y" }], &[]),
        node("a", "Add", &["g", "shift"], &["y"], &[]),
    ];
    let inputs = [value("x", FLOAT, &["batch", "2", "6", "7"]), value("shift", FLOAT, &["batch", "3"])];
    let (nodes, inputs) = if two { (&nodes[..], &inputs[..]) } else { (&nodes[..6], &inputs[..1]) };
    write(name, &model(graph(nodes, &weights, inputs, &["y"])).0)
}

fn array(name: &str, dims: &[u64], numbers: Vec<f32>) -> PathBuf {
    let tensor = Tensor::f32(dims, numbers).expect("as many numbers as extents say");
    write(name, &npy::write(&tensor).expect("floats have a form"))
}

/// Compiles; gives the engine's folder and what was said.
fn compiled(model: &Path, engine: &str, more: &[&str]) -> (PathBuf, serde_json::Value) {
    let out = folder().join(engine);
    let (model, place, store) = (model.to_str().unwrap(), out.to_str().unwrap(), store());
    let mut args = vec!["compile", model, "--target", "host", "-o", place, "--dim", "batch=1"];
    args.extend(["--store", store.to_str().unwrap()]);
    args.extend(more);
    let told = json(&args);
    (out, told)
}

/// The numbers of an output.
fn output(args: &[&str], name: &str) -> Vec<f64> {
    let out = folder().join(name);
    let mut args = args.to_vec();
    args.extend(["--output", out.to_str().unwrap()]);
    ok(&args);
    npy::read(&std::fs::read(out.join("y.npy")).expect("the output was written")).unwrap().reals()
}

fn given(name: &str, file: &Path) -> String {
    format!("{name}={}", file.display())
}

#[test]
fn engines_run_on_arrays_and_tensors() {
    let model = net("two.onnx", true);
    let (engine, told) = compiled(&model, "two", &["--preset", "f32"]);
    assert!(number(&told, "largest_difference") < 1e-5, "{told}");
    assert!(told["pipeline"].to_string().contains("fold-batch-norm"), "{told}");
    let x = array("two-x.npy", &[1, 2, 6, 7], noise(84, 7.0));
    let shift = write("two-shift.pb", &floats("shift", &[1, 3], &[0.5, -1.0, 2.0]).0);
    let (x, shift) = (given("x", &x), given("shift", &shift));
    let inputs = ["--input", &x, "--input", &shift];
    let run =
        |what: &Path, to: &str| output(&[&["run", what.to_str().unwrap()][..], &inputs[..]].concat(), to);
    let (got, want) = (run(&engine, "two-engine"), run(&model, "two-model"));
    assert_eq!(got.len(), 3);
    for (g, w) in got.iter().zip(&want) {
        assert!((g - w).abs() < 1e-5, "{got:?} {want:?}");
    }
    // The norm is part of the convolution: no weights but those of the two products and their vectors.
    let looked = ok(["inspect", engine.to_str().unwrap()]);
    assert!(looked.contains("graph") && looked.contains("fold-batch-norm"), "{looked}");
    let explained = ok(["explain", engine.to_str().unwrap()]);
    assert!(explained.contains("template conv") && explained.contains("launches"), "{explained}");
}

#[test]
fn classifiers_are_calibrated_and_scored() {
    let model = net("one.onnx", false);
    let samples = array("one-x.npy", &[40, 2, 6, 7], noise(40 * 84, 11.0));
    let data = samples.to_str().unwrap();
    let (float, _) = compiled(&model, "one-f32", &["--preset", "f32"]);
    let (bytes, told) = compiled(&model, "one-int8", &["--preset", "w8a8-static", "--data", data]);
    assert!(told["pipeline"].to_string().contains("quantize-products"), "{told}");
    let x = given("x", &samples);
    // Labels are some classes: both engines are scored by the same.
    let numbers = |engine: &Path| {
        let all = noise(40 * 84, 11.0);
        let one = |i: usize| {
            let x = array("one-i.npy", &[1, 2, 6, 7], all[i * 84..(i + 1) * 84].to_vec());
            output(&["run", engine.to_str().unwrap(), "--input", &given("x", &x)], "one-out")
        };
        [0, 17, 39].map(one)
    };
    let (exact, near) = (numbers(&float), numbers(&bytes));
    let largest = exact.iter().flatten().fold(0f64, |m, x| m.max(x.abs()));
    let apart = exact.iter().flatten().zip(near.iter().flatten()).map(|(a, b)| (a - b).abs());
    let apart = apart.fold(0f64, f64::max) / largest;
    assert!(apart > 0.0 && apart < 0.03, "int8 is near, not equal: {apart}");
    let first = |row: &[f64]| (0..3).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u8;
    let labels: Vec<u8> = (0..40).map(|i| first(&exact[if i == 17 { 1 } else { 0 }])).collect();
    let ty = TensorTy::fixed(ElemTy::Int(quantc_ir::ty::Int::U8), &[40]);
    let labels = Tensor::from_reals(&ty, labels.iter().map(|&l| l.into()).collect()).unwrap();
    let labels = write("one-labels.npy", &npy::write(&labels).unwrap());
    let scores = json([
        "eval",
        bytes.to_str().unwrap(),
        "--input",
        &x,
        "--labels",
        labels.to_str().unwrap(),
        "--against",
        model.to_str().unwrap(),
    ]);
    assert_eq!(scores["samples"], 40, "{scores}");
    let against = &scores["against"];
    assert!(number(against, "top1_agreement") >= 0.9, "{scores}");
    assert!(number(against, "cosine_least") > 0.99, "{scores}");
    assert!((number(&scores, "top1") - number(against, "top1")).abs() <= 0.1, "{scores}");
}

#[test]
fn several_inputs_are_calibrated_together() {
    let model = net("both.onnx", true);
    let x = array("both-x.npy", &[6, 2, 6, 7], noise(6 * 84, 3.0));
    let shift = array("both,shift.npy", &[6, 3], noise(18, 5.0));
    let data = format!("{},{}", given("x", &x), given("shift", &shift));
    let (engine, _) = compiled(&model, "both", &["--preset", "w8a8-static", "--data", &data]);
    let explained = ok(["explain", engine.to_str().unwrap()]);
    assert!(explained.contains("conv_bytes"), "{explained}");
    let one = given("x", &x);
    let out = folder().join("none");
    let refused = quantc([
        "compile",
        model.to_str().unwrap(),
        "--target",
        "host",
        "--preset",
        "w8a8-static",
        "--dim",
        "batch=1",
        "--data",
        &one,
        "-o",
        out.to_str().unwrap(),
    ]);
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("no samples for the input `shift`"), "{}", refused.err);
    assert!(refused.err.contains("--data x=FILE,shift=FILE"), "{}", refused.err);
}

/// A refused run: one error, and nothing on stdout.
fn refused(engine: &Path, inputs: &[String]) -> String {
    let mut args = vec!["run".to_string(), engine.display().to_string()];
    args.extend(inputs.iter().flat_map(|i| ["--input".into(), i.clone()]));
    let done = quantc(&args);
    assert_eq!((done.code, done.out.as_str()), (1, ""), "{args:?}: {}", done.err);
    assert_eq!(done.err.matches("error: ").count(), 1, "{}", done.err);
    done.err
}

#[test]
fn wrong_arrays_and_damaged_engines_are_refused() {
    let (engine, _) = compiled(&net("wrong.onnx", false), "wrong", &["--preset", "f32"]);
    let x = array("wrong-x.npy", &[1, 2, 6, 7], noise(84, 7.0));
    let said = refused(&engine, &[given("y", &x)]);
    assert!(said.contains("no input `y`") && said.contains("its inputs are x"), "{said}");
    assert!(refused(&engine, &[]).contains("the input `x` is not given"));
    let long = array("wrong-long.npy", &[1, 2, 7, 6], noise(84, 7.0));
    let said = refused(&engine, &[given("x", &long)]);
    assert!(said.contains("tensor<1x2x7x6xf32>, the engine takes tensor<1x2x6x7xf32>"), "{said}");
    let whole = write("wrong-ints.pb", &tensor("x", INT64, &[1, 2, 6, 7], &[0; 84 * 8]).0);
    let said = refused(&engine, &[given("x", &whole)]);
    assert!(said.contains("i64") && said.contains("the engine takes"), "{said}");
    let torn = write("wrong-torn.npy", &std::fs::read(&x).unwrap()[..100]);
    assert!(refused(&engine, &[given("x", &torn)]).contains("wrong-torn.npy"));
    for part in ["weights.bin", "kernels.o", "manifest.pb"] {
        let copy = folder().join(format!("cut-{part}"));
        copy_folder(&engine, &copy);
        let bytes = std::fs::read(copy.join(part)).unwrap();
        std::fs::write(copy.join(part), &bytes[..bytes.len() / 2]).unwrap();
        let said = refused(&copy, &[given("x", &x)]);
        assert!(said.contains(part), "{part}: {said}");
        if part == "manifest.pb" {
            let done =
                quantc(["eval".as_ref(), copy.as_os_str(), "--input".as_ref(), given("x", &x).as_ref()]);
            assert!(done.code == 1 && done.err.contains(part), "{}", done.err);
            assert!(!done.err.contains("--input is for"), "{}", done.err);
        }
    }
}

#[test]
fn presets_of_graphs_are_listed() {
    let all = ok(["presets"]);
    let (_, graphs) = all.split_once("Of graphs over arrays:").expect("they have a table");
    assert!(graphs.contains("f32 ") && graphs.contains("w8a8-static "), "{graphs}");
    let both = ok(["presets", "w8a8-static"]);
    assert!(both.contains("calibrate{stats=[histogram]}"), "{both}");
    assert!(
        both.contains("w8a8-static of graphs over arrays") && both.contains("quantize-products"),
        "{both}"
    );
    let wrong = quantc(["presets", "w8a8-statik"]);
    assert!(wrong.code != 0 && wrong.err.contains("w8a8-static"), "{}", wrong.err);
}
