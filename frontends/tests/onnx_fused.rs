//! Operators of ONNX Runtime's optimizer and model builders: each computes what the standard's operators compute, of the
//! same inputs.

#[path = "onnx_wire/mod.rs"]
mod wire;

use quantc_frontends::onnx::{self, Options, TextOptions};
use quantc_ir::eval::{Evaluator, Tensor};
use quantc_ir::ty::{ElemTy, TensorTy};
use quantc_ir::weights::Store;
use wire::*;

/// The first output of a graph of these nodes, or why there is none.
fn run(nodes: &[Msg], constants: &[Msg], inputs: &[(&str, Tensor)]) -> Result<Vec<f64>, String> {
    let dims = |t: &Tensor| t.dims().iter().map(|d| d.to_string()).collect::<Vec<_>>();
    let named = |(name, t): &(&str, Tensor)| {
        let dims = dims(t);
        value(name, FLOAT, &dims.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let inputs_of: Vec<Msg> = inputs.iter().map(named).collect();
    let versions = Msg::default().int(1, 8).msg(8, opset("", 23)).msg(8, opset("com.microsoft", 1));
    let file = versions.msg(7, graph(nodes, constants, &inputs_of, &["y"]));
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("model.onnx");
    std::fs::write(&path, &file.0).expect("the folder is writable");
    let store = Store::in_memory();
    let imported = onnx::import(&path, &store, &Options::default()).map_err(|e| e.to_string())?;
    let mut evaluator = Evaluator::new(&imported.module, &store).expect("there are no states");
    let tensors: Vec<Tensor> = inputs.iter().map(|(_, t)| t.clone()).collect();
    let out = evaluator.step(&tensors, u64::MAX).unwrap_or_else(|e| panic!("{e}"));
    Ok(out[0].reals())
}

/// Numbers that follow no pattern.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let step = |state: &mut u32| {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        Some((*state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    std::iter::successors(Some(seed), |_| Some(0)).scan(seed, |state, _| step(state)).take(n).collect()
}

fn tensor_of(dims: &[u64], seed: u32) -> Tensor {
    let n = dims.iter().product::<u64>() as usize;
    Tensor::f32(dims, numbers(n, seed)).expect("there are as many numbers")
}

fn runtime(name: &str, op: &str, inputs: &[&str], outputs: &[&str], attrs: &[Msg]) -> Msg {
    node(name, op, inputs, outputs, attrs).text(7, "com.microsoft")
}

fn near(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().any(|x| x.abs() > 1e-3));
    let off = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
    assert!(off < 1e-5, "{off}: {a:?} {b:?}");
}

fn i32s(name: &str, dims: &[i64], xs: &[i32]) -> Msg {
    let raw: Vec<u8> = xs.iter().flat_map(|x| x.to_le_bytes()).collect();
    tensor(name, 6, dims, &raw)
}

/// Queries, keys and values of two sequences of three tokens, four heads sharing two.
fn rows() -> [(&'static str, Tensor); 3] {
    [("q", tensor_of(&[2, 3, 16], 1)), ("k", tensor_of(&[2, 3, 8], 2)), ("v", tensor_of(&[2, 3, 8], 3))]
}

const HEADS: [(&str, i64); 2] = [("q_num_heads", 4), ("kv_num_heads", 2)];

fn standard(more: &[Msg]) -> Msg {
    let attrs: Vec<Msg> = HEADS.iter().map(|(n, x)| attr_int(n, *x)).chain(more.iter().cloned()).collect();
    node("a", "Attention", &["q", "k", "v"], &["y"], &attrs)
}

#[test]
fn grouped_attention_is_causal_attention() {
    let lengths = [i32s("last", &[2], &[2, 2]), i32s("all", &[], &[3])];
    let attrs = [attr_int("num_heads", 4), attr_int("kv_num_heads", 2)];
    let grouped = |more: &[Msg]| {
        let attrs: Vec<Msg> = attrs.iter().chain(more).cloned().collect();
        runtime("g", "GroupQueryAttention", &["q", "k", "v", "", "", "last", "all"], &["y"], &attrs)
    };
    let ours = run(&[grouped(&[])], &lengths, &rows()).unwrap();
    near(&ours, &run(&[standard(&[attr_int("is_causal", 1)])], &[], &rows()).unwrap());
    // A window of two tokens: the token and one before it.
    let ours = run(&[grouped(&[attr_int("local_window_size", 2)])], &lengths, &rows()).unwrap();
    let window = [attr_int("is_causal", 1), attr_int("left_window_size", 1)];
    near(&ours, &run(&[standard(&window)], &[], &rows()).unwrap());
    // A sequence that is shorter than the others has keys that do not count.
    let shorter = [i32s("last", &[2], &[2, 1]), i32s("all", &[], &[3])];
    let refused = run(&[grouped(&[])], &shorter, &rows()).unwrap_err();
    assert!(refused.contains("`seqlens_k`"), "{refused}");
    let refused = run(&[grouped(&[attr_int("smooth_softmax", 1)])], &lengths, &rows()).unwrap_err();
    assert!(refused.contains("smooth_softmax"), "{refused}");
}

#[test]
fn packed_grouped_attention_rotates_by_position() {
    // All of a token in one row; rotations of the whole head by tables of two angles.
    let packed = [("x", tensor_of(&[1, 3, 32], 4))];
    let tables = [
        floats("cos", &[5, 2], &[1.0, 1.0, 0.5, 0.8, -0.4, 0.9, -0.9, 0.7, -0.6, 0.3]),
        floats("sin", &[5, 2], &[0.0, 0.0, 0.8, 0.5, 0.9, 0.4, 0.1, 0.7, -0.7, 0.9]),
        i32s("last", &[1], &[2]),
        i32s("all", &[], &[3]),
        list("sizes", &[16, 8, 8]),
        tensor("at", INT64, &[1, 3], &[0i64, 1, 2].iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()),
    ];
    let attrs = [attr_int("num_heads", 4), attr_int("kv_num_heads", 2), attr_int("do_rotary", 1)];
    let inputs = ["x", "", "", "", "", "last", "all", "cos", "sin"];
    let ours =
        run(&[runtime("g", "GroupQueryAttention", &inputs, &["y"], &attrs)], &tables, &packed).unwrap();
    let parts = node("s", "Split", &["x", "sizes"], &["q0", "k0", "v"], &[attr_int("axis", 2)]);
    let turned = |x: &str, y: &str, heads| {
        node(y, "RotaryEmbedding", &[x, "cos", "sin", "at"], &[y], &[attr_int("num_heads", heads)])
    };
    let nodes = [parts, turned("q0", "q", 4), turned("k0", "k", 2), standard(&[attr_int("is_causal", 1)])];
    near(&ours, &run(&nodes, &tables, &packed).unwrap());
}

/// Rows of a text model of these nodes for each sequence, or why there is no such model.
fn rows_of_text(nodes: &[Msg], constants: &[Msg], texts: &[&[i32]]) -> Result<Vec<Vec<f64>>, String> {
    let inputs = [
        value("input_ids", INT64, &["batch", "sequence"]),
        value("attention_mask", INT64, &["batch", "total"]),
        value("past.key", FLOAT, &["batch", "2", "past", "width"]),
        value("past.value", FLOAT, &["batch", "2", "past", "width"]),
    ];
    let versions = Msg::default().int(1, 8).msg(8, opset("", 23)).msg(8, opset("com.microsoft", 1));
    let file = versions.msg(7, graph(nodes, constants, &inputs, &["y"]));
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("model.onnx");
    std::fs::write(&path, &file.0).expect("the folder is writable");
    let store = Store::in_memory();
    let imported = onnx::import_text(&path, &store, &TextOptions::default()).map_err(|e| e.to_string())?;
    let rows = |text: &&[i32]| {
        let ty = TensorTy::fixed(ElemTy::I32, &[text.len() as u64]);
        let tokens = Tensor::from_ints(&ty, text.iter().map(|&id| id.into())).expect("as many as tokens");
        let mut evaluator = Evaluator::new(&imported.module, &store).expect("there are no states");
        evaluator.step(&[tokens], u64::MAX).unwrap_or_else(|e| panic!("{e}"))[0].reals()
    };
    Ok(texts.iter().map(rows).collect())
}

/// Lengths that builders compute from the mask are those of the text, whatever it is; one that is written is refused.
#[test]
fn lengths_of_a_text_follow_from_its_mask() {
    let number = |name: &str, n: i64| tensor(name, INT64, &[], &n.to_le_bytes());
    let constants = [
        floats("table", &[7, 32], &numbers(7 * 32, 5)),
        list("sizes", &[16, 8, 8]),
        list("last", &[1]),
        number("second", 1),
        i32s("written", &[1], &[2]),
    ];
    let before = [
        node("e", "Gather", &["table", "input_ids"], &["x"], &[]),
        node("sum", "ReduceSum", &["attention_mask", "last"], &["sums"], &[attr_int("keepdims", 0)]),
        node("less", "Sub", &["sums", "last"], &["lasts"], &[]),
        node("lasts", "Cast", &["lasts"], &["seqlens"], &[attr_int("to", 6)]),
        node("shape", "Shape", &["attention_mask"], &["extents"], &[]),
        node("pick", "Gather", &["extents", "second"], &["length"], &[]),
        node("total", "Cast", &["length"], &["total"], &[attr_int("to", 6)]),
    ];
    let grouped = |lengths: &str| {
        let inputs = ["x", "", "", "past.key", "past.value", lengths, "total"];
        let attrs = [attr_int("num_heads", 4), attr_int("kv_num_heads", 2)];
        let mut nodes = before.to_vec();
        nodes.push(runtime(
            "g",
            "GroupQueryAttention",
            &inputs,
            &["y", "present.key", "present.value"],
            &attrs,
        ));
        nodes
    };
    let texts: [&[i32]; 3] = [&[3], &[6, 0, 2], &[1, 1, 5, 4, 2, 0]];
    let ours = rows_of_text(&grouped("seqlens"), &constants, &texts).unwrap();
    let parts = node("s", "Split", &["x", "sizes"], &["q", "k", "v"], &[attr_int("axis", 2)]);
    let plain = [before[0].clone(), parts, standard(&[attr_int("is_causal", 1)])];
    for (ours, plain) in ours.iter().zip(rows_of_text(&plain, &constants, &texts).unwrap()) {
        near(ours, &plain);
    }
    let refused = rows_of_text(&grouped("written"), &constants, &texts).unwrap_err();
    assert!(refused.contains("`seqlens_k`) is the length of one text"), "{refused}");
}

#[test]
fn rotations_have_the_standard_s_numbers() {
    let tables = [
        floats("cos", &[5, 2], &[1.0, 1.0, 0.5, 0.8, -0.4, 0.9, -0.9, 0.7, -0.6, 0.3]),
        floats("sin", &[5, 2], &[0.0, 0.0, 0.8, 0.5, 0.9, 0.4, 0.1, 0.7, -0.7, 0.9]),
        list("first", &[1]),
        tensor(
            "at",
            INT64,
            &[2, 3],
            &[1i64, 2, 3, 1, 2, 3].iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>(),
        ),
    ];
    let x = [("x", tensor_of(&[2, 3, 12], 5))];
    for interleaved in [0, 1] {
        let more = [
            attr_int("num_heads", 2),
            attr_int("rotary_embedding_dim", 4),
            attr_int("interleaved", interleaved),
        ];
        let standard = node("r", "RotaryEmbedding", &["x", "cos", "sin", "at"], &["y"], &more);
        let want = run(&[standard], &tables, &x).unwrap();
        // Places for each token, and the place of the first one.
        for at in ["at", "first"] {
            let ours = runtime("r", "RotaryEmbedding", &["x", at, "cos", "sin"], &["y"], &more);
            near(&run(&[ours], &tables, &x).unwrap(), &want);
        }
    }
}

#[test]
fn one_matrix_for_queries_keys_and_values() {
    let constants = [
        floats("w", &[6, 24], &numbers(144, 6)),
        floats("c", &[24], &numbers(24, 7)),
        i32s("mask", &[2, 3], &[1, 1, 1, 1, 1, 0]),
        tensor("seen", 9, &[2, 1, 1, 3], &[1, 1, 1, 1, 1, 0]),
        list("sizes", &[8, 8, 8]),
    ];
    let x = [("x", tensor_of(&[2, 3, 6], 8))];
    let attrs = [attr_int("num_heads", 2)];
    let product = [
        node("m", "MatMul", &["x", "w"], &["p"], &[]),
        node("b", "Add", &["p", "c"], &["s"], &[]),
        node("t", "Split", &["s", "sizes"], &["q", "k", "v"], &[attr_int("axis", 2)]),
    ];
    let heads = [attr_int("q_num_heads", 2), attr_int("kv_num_heads", 2)];
    let whole = |mask: &[&str], more: &[Msg]| {
        let attrs: Vec<Msg> = heads.iter().chain(more).cloned().collect();
        let inputs: Vec<&str> = ["q", "k", "v"].iter().chain(mask).copied().collect();
        let mut nodes = product.to_vec();
        nodes.push(node("a", "Attention", &inputs, &["y"], &attrs));
        run(&nodes, &constants, &x).unwrap()
    };
    let ours =
        run(&[runtime("a", "Attention", &["x", "w", "c", "mask"], &["y"], &attrs)], &constants, &x).unwrap();
    near(&ours, &whole(&["seen"], &[]));
    let later = [attrs[0].clone(), attr_int("unidirectional", 1)];
    let ours = run(&[runtime("a", "Attention", &["x", "w", "c"], &["y"], &later)], &constants, &x).unwrap();
    near(&ours, &whole(&[], &[attr_int("is_causal", 1)]));
    // The same rows given to attention of separate operands.
    let mut nodes = product.to_vec();
    nodes.push(runtime("a", "MultiHeadAttention", &["q", "k", "v", "", "mask"], &["y"], &attrs));
    near(&run(&nodes, &constants, &x).unwrap(), &whole(&["seen"], &[]));
    let refused = runtime("a", "Attention", &["x", "w", "c", "", "x"], &["y"], &attrs);
    assert!(run(&[refused], &constants, &x).unwrap_err().contains("earlier keys"));
}

#[test]
fn embeddings_are_summed_and_normalized() {
    let constants = [
        i32s("ids", &[2, 3], &[1, 4, 2, 0, 3, 3]),
        i32s("types", &[2, 3], &[0, 0, 1, 1, 1, 0]),
        floats("words", &[5, 4], &numbers(20, 9)),
        floats("places", &[7, 4], &numbers(28, 10)),
        floats("kinds", &[2, 4], &numbers(8, 11)),
        floats("g", &[4], &numbers(4, 12)),
        floats("b", &[4], &numbers(4, 13)),
        list("row", &[0, 1, 2]),
    ];
    let inputs = [("x", tensor_of(&[2, 3, 4], 14))];
    let embed = runtime(
        "e",
        "EmbedLayerNormalization",
        &["ids", "types", "words", "places", "kinds", "g", "b"],
        &["z"],
        &[],
    );
    let sum = node("r", "Add", &["z", "x"], &["y"], &[]);
    let ours = run(&[embed, sum.clone()], &constants, &inputs).unwrap();
    let nodes = [
        node("w", "Gather", &["words", "ids"], &["a"], &[]),
        node("p", "Gather", &["places", "row"], &["c"], &[]),
        node("k", "Gather", &["kinds", "types"], &["d"], &[]),
        node("s", "Add", &["a", "c"], &["e"], &[]),
        node("t", "Add", &["e", "d"], &["f"], &[]),
        node(
            "n",
            "LayerNormalization",
            &["f", "g", "b"],
            &["z"],
            &[attr("epsilon", 1, Msg::default().float(2, 1e-12))],
        ),
        sum,
    ];
    near(&ours, &run(&nodes, &constants, &inputs).unwrap());
}
