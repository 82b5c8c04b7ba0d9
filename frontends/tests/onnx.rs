//! What ONNX files become: quantized types, symbols, external data, functions; and the table of operators.

#[path = "onnx_wire/mod.rs"]
mod wire;

use quantc_frontends::onnx::{self, Imported, Options, Refused};
use quantc_ir::eval::{Evaluator, Tensor};
use quantc_ir::text;
use quantc_ir::verify::verify;
use quantc_ir::weights::Store;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use tempfile::TempDir;
use wire::*;

/// Imports a file made of these bytes, with `weights.bin` beside it.
fn import(file: &Msg, options: &Options) -> (TempDir, Store, Result<Imported, Refused>) {
    let dir = tempfile::tempdir().unwrap();
    let floats: Vec<u8> = (0..16).flat_map(|i| (i as f32).to_le_bytes()).collect();
    std::fs::write(dir.path().join("weights.bin"), floats).unwrap();
    let path = dir.path().join("model.onnx");
    std::fs::write(&path, &file.0).unwrap();
    let store = Store::in_memory();
    let imported = onnx::import(&path, &store, options);
    (dir, store, imported)
}

/// What the only output is, and the module's text.
fn run(file: &Msg, options: &Options, inputs: &[Tensor]) -> (Vec<f64>, String) {
    let (_dir, store, imported) = import(file, options);
    let imported = imported.unwrap_or_else(|e| panic!("{e}"));
    verify(&imported.module).unwrap_or_else(|e| panic!("{e}"));
    let mut evaluator = Evaluator::new(&imported.module, &store).unwrap();
    let outputs = evaluator.step(inputs, u64::MAX).unwrap_or_else(|e| panic!("{e}"));
    (outputs[0].reals(), text::print(&imported.module))
}

fn f(dims: &[u64], xs: &[f32]) -> Tensor {
    Tensor::f32(dims, xs.to_vec()).unwrap()
}

#[test]
fn quantized_weights_keep_their_bytes() {
    // y = x (q - 0) s with one scale for each column, as exporters write linear layers.
    let nodes = [
        node("d", "DequantizeLinear", &["q", "s"], &["w"], &[attr_int("axis", 1)]),
        node("m", "MatMul", &["x", "w"], &["y"], &[]),
    ];
    let constants = [tensor("q", 3, &[2, 3], &[1, 2, 3, 255, 0, 127]), floats("s", &[3], &[1.0, 0.5, 0.25])];
    let file = model(graph(&nodes, &constants, &[value("x", FLOAT, &["rows", "2"])], &["y"]));
    let (y, printed) = run(&file, &Options::default(), &[f(&[1, 2], &[2.0, 10.0])]);
    assert_eq!(y, [-8.0, 2.0, 319.0]);
    // The matrix is turned as codes, so that the product is one that kernels have.
    assert!(
        printed.contains("tensor<3x2x!q<int8:f32 axis 0>> = inline [[1, -1], [2, 0], [3, 127]]"),
        "{printed}"
    );
    assert!(printed.contains("matmul %x, %"), "{printed}");
}

#[test]
fn weights_of_four_bits_are_ranges_of_the_file() {
    // Two rows of 32 codes, 9 and 7 in every byte: 1 and -1 around the middle.
    let codes = [0x79u8; 32];
    let scale = floats("s", &[2], &[0.5, 2.0]);
    let attrs = [attr_int("K", 32), attr_int("N", 2), attr_int("bits", 4), attr_int("block_size", 32)];
    let nodes = [node("m", "MatMulNBits", &["x", "q", "s"], &["y"], &attrs).text(7, "com.microsoft")];
    let constants = [tensor("q", UINT8, &[2, 1, 16], &codes), scale];
    let g = graph(&nodes, &constants, &[value("x", FLOAT, &["1", "32"])], &["y"]);
    let file = model(g).msg(8, opset("com.microsoft", 1));
    let xs: Vec<f32> = (0..32).map(|i| i as f32).collect();
    let (y, printed) = run(&file, &Options::default(), &[f(&[1, 32], &xs)]);
    // Of each pair the even number minus the odd one.
    assert_eq!(y, [-8.0, -32.0]);
    assert!(printed.contains("!q<uint4:f32 block 32@1 zero uint4>> = file 0["), "{printed}");
}

#[test]
fn names_of_extents_are_symbols() {
    // Flattened by the shape arithmetic that exporters write.
    let nodes = [
        node("s", "Shape", &["x"], &["s"], &[]),
        node("g", "Gather", &["s", "zero"], &["n"], &[]),
        node("u", "Unsqueeze", &["n", "zero1"], &["n1"], &[]),
        node("k", "Concat", &["n1", "rest"], &["k"], &[attr_int("axis", 0)]),
        node("r", "Reshape", &["x", "k"], &["y"], &[]),
    ];
    let zero = tensor("zero", INT64, &[], &[0; 8]);
    let constants = [zero, list("zero1", &[0]), list("rest", &[-1])];
    let file = model(graph(&nodes, &constants, &[value("x", FLOAT, &["batch", "2", "2"])], &["y"]));
    let x = f(&[3, 2, 2], &[1.0; 12]);
    let (y, printed) = run(&file, &Options::default(), std::slice::from_ref(&x));
    assert_eq!(y.len(), 12);
    assert!(printed.contains("%x: tensor<?tx2x2xf32>") && printed.contains("tensor<?tx4xf32>"), "{printed}");
    assert!(printed.contains("extent.t=batch"), "{printed}");
    let dims = BTreeMap::from([("batch".to_string(), 3)]);
    let (_, printed) = run(&file, &Options { dims, ..Options::default() }, &[x]);
    assert!(printed.contains("%x: tensor<3x2x2xf32>"), "{printed}");
}

#[test]
fn what_must_be_known_is_asked_for() {
    let nodes = [node("r", "Reshape", &["x", "shape"], &["y"], &[])];
    let inputs = [value("x", FLOAT, &["4"]), value("shape", INT64, &["2"])];
    let file = model(graph(&nodes, &[], &inputs, &["y"]));
    let (_dir, _store, refused) = import(&file, &Options::default());
    assert_eq!(refused.unwrap_err().needs, ["shape"]);
    let ty = quantc_ir::ty::TensorTy::fixed(quantc_ir::ty::ElemTy::I64, &[2]);
    let shape = Tensor::from_ints(&ty, [2, 2].into_iter()).unwrap();
    let fixed = BTreeMap::from([("shape".to_string(), shape)]);
    let options = Options { fixed, ..Options::default() };
    let (y, _) = run(&file, &options, &[f(&[4], &[1.0, 2.0, 3.0, 4.0])]);
    assert_eq!(y, [1.0, 2.0, 3.0, 4.0]);
}

#[test]
fn functions_and_external_data() {
    // twice(x) = x + x, called with the sum of x and what lies in another file.
    let twice = function("Twice", &["v"], &["r"], &[node("a", "Add", &["v", "v"], &["r"], &[])]);
    let nodes = [node("a", "Add", &["x", "w"], &["s"], &[]), call("c", "Twice", &["s"], &["y"])];
    let w = external("w", &[4], &[("location", "weights.bin"), ("offset", "8"), ("length", "16")]);
    let g = graph(&nodes, &[w], &[value("x", FLOAT, &["4"])], &["y"]);
    let file = model(g).msg(8, opset("f", 1)).msg(25, twice);
    let (y, printed) = run(&file, &Options::default(), &[f(&[4], &[1.0; 4])]);
    assert_eq!(y, [6.0, 8.0, 10.0, 12.0]);
    assert!(
        printed.contains("shard 1 = \"weights.bin\"") && printed.contains("= file 1[8..+16]"),
        "{printed}"
    );
}

#[test]
fn branches_that_depend_on_inputs_are_both_computed() {
    let side = |op: &str| graph(&[node("n", op, &["x"], &["o"], &[])], &[], &[], &["o"]);
    let attrs = [attr_graph("then_branch", side("Relu")), attr_graph("else_branch", side("Neg"))];
    let inputs = [value("x", FLOAT, &["2"]), value("c", BOOL, &[])];
    let file = model(graph(&[node("i", "If", &["c"], &["y"], &attrs)], &[], &inputs, &["y"]));
    for (c, want) in [(1, [0.0, 2.0]), (0, [1.0, -2.0])] {
        let ty = quantc_ir::ty::TensorTy::fixed(quantc_ir::ty::ElemTy::BOOL, &[]);
        let c = Tensor::from_ints(&ty, [c].into_iter()).unwrap();
        let (y, _) = run(&file, &Options::default(), &[f(&[2], &[-1.0, 2.0]), c]);
        assert_eq!(y, want);
    }
}

#[test]
fn places_of_unknown_extents_are_counted_when_the_model_runs() {
    // The first n of six constants, times the places 0..n, above the diagonal of a square of unknown size.
    let nodes = [
        node("s", "Shape", &["x"], &["s"], &[]),
        node("g", "Gather", &["s", "one"], &["n"], &[attr_int("axis", 0)]),
        node("r", "Range", &["zero", "n", "one"], &["r"], &[]),
        node("c", "Cast", &["r"], &["places"], &[attr_int("to", FLOAT)]),
        node("u", "Unsqueeze", &["n", "first"], &["n1"], &[]),
        node("f", "Slice", &["six", "first", "n1"], &["some"], &[]),
        node("m", "Mul", &["places", "some"], &["row"], &[]),
        node("a", "Add", &["x", "row"], &["sum"], &[]),
        node("t", "Trilu", &["sum", "one"], &["y"], &[attr_int("upper", 1)]),
    ];
    let number = |name: &str, n: i64| tensor(name, INT64, &[], &n.to_le_bytes());
    let six = floats("six", &[6], &[10.0, 20.0, 30.0, 40.0, 50.0, 60.0]);
    let constants = [number("zero", 0), number("one", 1), list("first", &[0]), six];
    let file = model(graph(&nodes, &constants, &[value("x", FLOAT, &["m", "n"])], &["y"]));
    let (y, _) = run(&file, &Options::default(), &[f(&[3, 3], &[1.0; 9])]);
    assert_eq!(y, [0.0, 21.0, 61.0, 0.0, 0.0, 61.0, 0.0, 0.0, 0.0]);
    let (y, _) = run(&file, &Options::default(), &[f(&[1, 2], &[1.0; 2])]);
    assert_eq!(y, [0.0, 21.0]);
}

#[test]
fn arithmetic_on_unknown_extents_is_done_where_it_has_an_answer() {
    // Where(n * 1 - 0 == -1, 1, n) is n; n - n is 0, and so is 0 * n.
    let nodes = [
        node("s", "Shape", &["x"], &["s"], &[]),
        node("m", "Mul", &["s", "ones"], &["a"], &[]),
        node("b", "Sub", &["a", "zeros"], &["b"], &[]),
        node("e", "Equal", &["b", "minus"], &["e"], &[]),
        node("w", "Where", &["e", "ones", "b"], &["shape"], &[]),
        node("d", "Sub", &["s", "b"], &["none"], &[]),
        node("z", "Mul", &["zeros", "s"], &["also"], &[]),
        node("p", "Add", &["none", "also"], &["nothing"], &[]),
        node("k", "Cast", &["nothing"], &["float"], &[attr_int("to", FLOAT)]),
        node("o", "Expand", &["float", "shape"], &["y"], &[]),
    ];
    let constants = [list("ones", &[1, 1]), list("zeros", &[0, 0]), list("minus", &[-1, -1])];
    let file = model(graph(&nodes, &constants, &[value("x", FLOAT, &["n", "2"])], &["y"]));
    let (y, _) = run(&file, &Options::default(), &[f(&[3, 2], &[1.0; 6])]);
    assert_eq!(y, [0.0; 6]);
    // Half of an extent is not known, and the message says so.
    let nodes = [
        node("s", "Shape", &["x"], &["s"], &[]),
        node("h", "Div", &["s", "two"], &["h"], &[]),
        node("r", "ConstantOfShape", &["h"], &["y"], &[]),
    ];
    let file = model(graph(&nodes, &[list("two", &[2])], &[value("x", FLOAT, &["n"])], &["y"]));
    let (_dir, _store, refused) = import(&file, &Options::default());
    let why = refused.unwrap_err().to_string();
    assert!(why.contains("extents that are not known are computed with"), "{why}");
}

/// Extents that are not known are numbers when another type is asked for.
#[test]
fn extents_are_cast_to_numbers() {
    let shape = node("s", "Shape", &["x"], &["s"], &[]);
    let to_float = |from: &str| node("f", "Cast", &[from], &["f"], &[attr_int("to", FLOAT)]);
    let add = node("a", "Add", &["x", "f"], &["y"], &[]);
    let x = value("x", FLOAT, &["n", "2"]);
    let file =
        model(graph(&[shape.clone(), to_float("s"), add.clone()], &[], std::slice::from_ref(&x), &["y"]));
    for n in [1, 3] {
        let (y, _) = run(&file, &Options::default(), &[f(&[n, 2], &vec![0.5; 2 * n as usize])]);
        assert_eq!(y, [n as f64 + 0.5, 2.5].repeat(n as usize));
    }
    // One number, and the -1 that stands for the rest.
    let nodes = [
        shape,
        node("g", "Gather", &["s", "first"], &["g"], &[]),
        node("c", "Concat", &["g", "minus"], &["c"], &[attr_int("axis", 0)]),
        to_float("c"),
        add,
    ];
    let constants = [list("first", &[0]), list("minus", &[-1])];
    let file = model(graph(&nodes, &constants, &[x], &["y"]));
    let (y, _) = run(&file, &Options::default(), &[f(&[3, 2], &[0.0; 6])]);
    assert_eq!(y, [3.0, -1.0, 3.0, -1.0, 3.0, -1.0]);
}

/// Norms of heads in rows of their own, as builders write them: there are twice as many rows as tokens.
#[test]
fn rows_whose_number_is_a_product_are_normalized() {
    let split = node("r", "Reshape", &["x", "rows"], &["h"], &[]);
    let norm = node("n", "SimplifiedLayerNormalization", &["h", "gain"], &["z"], &[]);
    let joined = node("j", "Reshape", &["z", "wide"], &["y"], &[]);
    let constants =
        [list("rows", &[0, -1, 3]), list("wide", &[0, -1, 6]), floats("gain", &[3], &[1.0, 2.0, 0.5])];
    let x = value("x", FLOAT, &["1", "n", "6"]);
    let nodes = [split.clone(), norm.clone(), joined];
    let file = model(graph(&nodes, &constants, std::slice::from_ref(&x), &["y"]));
    let numbers: Vec<f32> = (0..30).map(|i| (i * 7 % 11) as f32 - 4.0).collect();
    let (y, printed) = run(&file, &Options::default(), &[f(&[1, 5, 6], &numbers)]);
    assert!(printed.contains("tensor<1x?tx2x3xf32>"), "{printed}");
    let dims = BTreeMap::from([("n".to_string(), 5)]);
    let (fixed, printed) = run(&file, &Options { dims, ..Options::default() }, &[f(&[1, 5, 6], &numbers)]);
    assert!(printed.contains("tensor<1x10x3xf32>"), "{printed}");
    assert_eq!(y, fixed);
    // What is not done row by row, or asks how many rows there are, is refused.
    for (op, why) in [("Neg", "two axes of tensor<1x?tx2x3xf32> are one"), ("Shape", "a product of others")] {
        let nodes = [split.clone(), norm.clone(), node("o", op, &["z"], &["y"], &[])];
        let (_dir, _store, refused) =
            import(&model(graph(&nodes, &constants, std::slice::from_ref(&x), &["y"])), &Options::default());
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains(why), "{refused}");
    }
}

/// `docs/onnx.md` lists the operators. `UPDATE=1` rewrites the table.
#[test]
fn the_table_of_operators_is_fresh() {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/onnx.md"));
    let now = std::fs::read_to_string(path).unwrap();
    let (begin, end) = ("<!-- begin: onnx-operators -->\n", "<!-- end: onnx-operators -->");
    let (head, rest) = now.split_once(begin).expect("the table has a beginning");
    let (_, tail) = rest.split_once(end).expect("the table has an end");
    let mut table = String::from("| family | operator | from version | covered |\n|---|---|---|---|\n");
    for op in onnx::operators() {
        let dot = if op.domain.is_empty() { "" } else { "." };
        let doc = op.doc.trim();
        // Writing to a string does not fail.
        let _ = writeln!(table, "| {} | {}{dot}{} | {} | {doc} |", op.family, op.domain, op.name, op.since);
    }
    let should = format!("{head}{begin}{table}{end}{tail}");
    if now != should && std::env::var_os("UPDATE").is_some_and(|u| u == "1") {
        std::fs::write(path, &should).unwrap();
        return;
    }
    assert!(now == should, "docs/onnx.md is not fresh; UPDATE=1 rewrites it");
}
