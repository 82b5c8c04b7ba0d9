//! What the quality bench reads: a bench has no tests of its own, so they are here.

#[path = "../benches/quality/inputs.rs"]
mod inputs;

use inputs::*;
use serde_json::{Value, json};
use std::path::PathBuf;

const TABLES: &str = "\
# Reference figures

## small: f32 perplexity 14.80724 (32704 tokens scored)

| method | bits | group | zero | perplexity | KL to float | top-1 agreement |
|---|---|---|---|---|---|---|
| w8a8: per-row weights, dynamic activations | 8 | row | sym | 14.81587 | 0.00132 | 0.9755 |
| rtn | 3 | 64 | asym | 16.0728 | 0.13615 | 0.7813 |
| gptq | 4 | 128 | sym | 15.0188 | 0.02867 | 0.8968 |

## Twins

| twin of | f32 | naive w8a8 |
|---|---|---|
| small | 4.03643 | 7.44355 |
";

#[test]
fn tables_are_read() {
    let found = references(TABLES).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].model.as_str(), found[0].perplexity, found[0].tokens), ("small", 14.80724, 32704));
    let rows = &found[0].rows;
    assert_eq!(rows.len(), 3);
    assert_eq!((rows[0].method.as_str(), rows[0].bits, rows[0].group), ("w8a8", 8, None));
    let want = Textbook {
        method: "rtn".into(),
        bits: 3,
        group: Some(64),
        asymmetric: true,
        perplexity: 16.0728,
        divergence: 0.13615,
        agreement: 0.7813,
    };
    assert_eq!(rows[1], want);
    assert_eq!((rows[2].group_name(), rows[2].zero_name()), ("128".into(), "sym"));
}

#[test]
fn bad_tables_are_refused_by_line() {
    for (from, to, says) in [
        ("| gptq | 4 |", "| gptq | four |", "line 9: `four`"),
        ("| 128 | sym |", "| 128 | some |", "line 9: `some` is neither"),
        (" 0.7813 |", "", "line 8: there is no cell for `top-1 agreement`"),
        ("| 0.00132 |", "| - |", "line 7: `-` is no number for `KL to float`"),
    ] {
        let error = references(&TABLES.replace(from, to)).unwrap_err();
        assert!(error.contains(says), "{error}");
    }
    assert_eq!(references("no tables\n").unwrap(), []);
}

#[test]
fn pipelines_parse_and_say_what_the_rows_say() {
    let mut rows = references(TABLES).unwrap().remove(0).rows;
    let pipelines: Vec<String> = rows.iter().map(|r| r.pipeline("f32").unwrap()).collect();
    for text in &pipelines {
        quantc::passes::pipeline::parse(text).unwrap();
        assert!(text.contains("scale=f32") && text.contains("skip-layers=[head]"), "{text}");
    }
    assert!(pipelines[0].contains("quantize-activations{format=int8"));
    assert!(pipelines[1].contains("round-to-nearest{format=int3, group=64, zero=asymmetric"));
    assert!(!pipelines[1].contains("calibrate"));
    assert!(pipelines[2].contains("calibrate{samples=64, skip-layers=[head]}, gptq{format=int4, group=128"));
    rows[0].method = "magic".into();
    assert!(rows[0].pipeline("auto").unwrap_err().contains("magic"));
}

#[test]
fn options_are_read_and_written_without_paths() {
    let read = |text: &str| Options::parse(text.split_whitespace().map(String::from));
    let o = read("--bench --models /m --presets a,b --kv int8,fp8 --max-tokens 40 --out /o.md").unwrap();
    assert_eq!(o.models, Some(PathBuf::from("/m")));
    assert_eq!((o.presets.len(), o.kv.as_slice()), (2, &["int8".to_string(), "fp8".into()][..]));
    let command = "cargo bench --bench quality -- --models MODELS --presets a,b --kv int8,fp8 --max-tokens 40 \
                   --out FILE.md";
    assert_eq!(o.command(), command);
    assert!(read("--max-tokens many").unwrap_err().contains("many"));
    assert!(read("--modles /m").unwrap_err().contains("--modles"));
    assert!(read("--only").unwrap_err().contains("needs a value"));
}

#[test]
fn bits_count_scales_and_leave_out_biases() {
    let model = json!({ "weights": [
        { "name": "embed", "type": "tensor<10x4xf32>" },
        { "name": "l0.up", "type": "tensor<8x4xf32>" },
        { "name": "l0.up.bias", "type": "tensor<8xf32>" },
    ]});
    let report = json!({ "weights": [
        { "name": "embed", "type": "tensor<10x4xf32>", "bytes": 160 },
        { "name": "l0.up.q", "type": "tensor<8x4x!q<int4:bf16 block 4@1>>", "bytes": 16 },
        { "name": "l0.up.s", "type": "tensor<8x1xbf16>", "bytes": 16 },
        { "name": "l0.up.bias", "type": "tensor<8xf32>", "bytes": 32 },
        { "name": "sums", "type": "tensor<8xf32>", "bytes": 32 },
    ]});
    let found = bits(&model, &report).unwrap();
    assert_eq!(found.quantized, Some(8.0));
    // 256 bytes for 80 numbers.
    assert_eq!(found.all, 25.6);
    assert_eq!(bits(&model, &json!({ "weights": [] })).unwrap().quantized, None);
    assert_eq!(scale_type(&report), Some("bf16".into()));
    assert_eq!(scale_type(&model), None);
    assert!(bits(&json!({}), &report).unwrap_err().contains("the model"));
}

#[test]
fn cosines_are_of_directions() {
    let of = |v: Value| json!({ "embeddings": v });
    let base = of(json!([[1.0, 0.0], [3.0, 4.0]]));
    let (mean, least) = cosines(&of(json!([[2.0, 0.0], [4.0, 3.0]])), &base).unwrap();
    assert!((mean - 0.98).abs() < 1e-12 && (least - 0.96).abs() < 1e-12, "{mean} {least}");
    assert!(cosines(&of(json!([[1.0, 0.0]])), &base).is_err());
    assert!(cosines(&of(json!([[0.0, 0.0], [1.0, 1.0]])), &base).is_err());
    assert!(cosines(&of(json!([[1.0], [1.0]])), &base).is_err());
}

#[test]
fn every_question_comes_once_and_texts_share_none() {
    let mut all = questions();
    assert!(!all[..10].iter().all(|q| q.starts_with('A')));
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 729);
    assert_eq!(answer("CABBAC"), "AABBCC");
    let [calibration, evaluation] = sorting_texts([5, 4]);
    assert_eq!((calibration.len(), evaluation.len()), (243 * 11, 486 * 10));
    let rows = |text: &str, len: usize| -> std::collections::BTreeSet<String> {
        text.as_bytes().chunks(len).map(|row| String::from_utf8_lossy(&row[..6]).into_owned()).collect()
    };
    assert!(rows(&calibration, 11).is_disjoint(&rows(&evaluation, 10)));
    check_apart(&calibration, &evaluation).unwrap();
}

#[test]
fn texts_that_overlap_are_refused() {
    assert!(check_apart("one two", "three").is_ok());
    for (a, b) in [("one two", "one two\n"), ("one two", "two"), ("two", "one two"), ("", "one")] {
        assert!(check_apart(a, b).is_err(), "{a} {b}");
    }
    let long = "é".repeat(600);
    let lines = sentences(&format!("\n a \n\n{long}\nb\n"), 2);
    assert_eq!((lines.len(), lines[0].as_str(), lines[1].chars().count()), (2, "a", 500));
}

#[test]
fn reasons_name_no_folders() {
    let known = [("/tmp/x".to_string(), "WORK")];
    let text = "note: this\nerror: /tmp/x/a: no | kernel\nhelp: that\n";
    assert_eq!(reason(text, &known), "error: WORK/a: no / kernel");
    assert_eq!(reason("Traceback\nKeyError: 'hidden'\n", &known), "KeyError: 'hidden'");
    assert_eq!(reason("", &known), "it says nothing");
}
