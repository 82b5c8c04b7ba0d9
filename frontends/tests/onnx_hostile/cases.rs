//! Files that lie, and sound ones to damage.

use super::wire::*;

/// A file and what its refusal must say.
pub struct Case {
    pub name: &'static str,
    pub bytes: Vec<u8>,
    pub says: &'static [&'static str],
}

fn case(name: &'static str, file: Msg, says: &'static [&'static str]) -> Case {
    Case { name, bytes: file.0, says }
}

/// An input `x` of two rows of four floats.
fn x() -> Msg {
    value("x", FLOAT, &["2", "4"])
}

/// A model of one node with initializers; its output is `y`.
fn one(node: Msg, initializers: &[Msg]) -> Msg {
    model(graph(&[node], initializers, &[x()], &["y"]))
}

/// A model of a node `n` of `op` that reads `x` and these initializers, which are called `a`, `b`, ..
fn of(op: &str, attrs: &[Msg], initializers: &[Msg]) -> Msg {
    let names = ["x", "a", "b", "c", "d"];
    one(node("n", op, &names[..=initializers.len()], &["y"], attrs), initializers)
}

fn relu(name: &str, from: &str, to: &str) -> Msg {
    node(name, "Relu", &[from], &[to], &[])
}

/// A model whose initializer is `w`, read by an addition.
fn with(w: Msg) -> Msg {
    one(node("n", "Add", &["x", "w"], &["y"], &[]), &[w])
}

/// Every file that lies.
pub fn all() -> Vec<Case> {
    let plain = || graph(&[relu("n", "x", "y")], &[], &[x()], &["y"]);
    let mut cases = vec![
        case("empty", Msg::default(), &["it has no graph"]),
        case("text", Msg(b"{\"a\": 1}, and so on and on".to_vec()), &["this is no ONNX model"]),
        case("no_graph", Msg::default().int(1, 8), &["it has no graph"]),
        case("no_outputs", model(graph(&[relu("n", "x", "y")], &[], &[x()], &[])), &["no outputs"]),
        case("truncated", Msg(model(plain()).0[..30].to_vec()), &["this is no ONNX model"]),
        case("unnested_groups", groups(), &["recursion limit"]),
        case("nested_graphs", nested_graphs(60), &["recursion limit"]),
        case("invalid_utf8", model(plain()).bytes(2, &[0xff, 0xfe]), &["UTF-8"]),
        case(
            "no_opset",
            Msg::default().int(1, 8).msg(7, plain()),
            &["Relu", "version the model does not give"],
        ),
        case(
            "old_opset",
            Msg::default().msg(8, opset("", 1)).msg(7, plain()),
            &["Relu", "of version 1 is not supported"],
        ),
    ];
    cases.extend(graphs());
    cases.extend(functions());
    cases.extend(constants());
    cases.extend(external_data());
    cases.extend(nodes());
    cases
}

/// Four megabytes of unknown groups, each in another.
fn groups() -> Msg {
    let open = (2000u64 << 3) | 3;
    let mut m = Msg::default();
    while m.0.len() < 4 << 20 {
        varint(open, &mut m.0);
    }
    m
}

fn nested_graphs(depth: usize) -> Msg {
    let mut inner = graph(&[relu("n", "x", "y")], &[], &[], &["y"]);
    for _ in 0..depth {
        let attrs = [attr_graph("then_branch", inner.clone()), attr_graph("else_branch", Msg::default())];
        inner = graph(&[node("if", "If", &["c"], &["y"], &attrs)], &[], &[], &["y"]);
    }
    model(inner)
}

fn graphs() -> Vec<Case> {
    let circle = [relu("n1", "b", "a"), relu("n2", "a", "b")];
    let many: Vec<Msg> = (0..40).map(|i| value("x", FLOAT, &[&format!("n{i}")])).collect();
    let many: Vec<Msg> = many.into_iter().enumerate().map(|(i, m)| m.text(1, &format!("x{i}"))).collect();
    let unknown = [
        node("first", "Quux", &["x"], &["a"], &[]),
        node("second", "Quux", &["a"], &["b"], &[]),
        node("third", "Frob", &["b"], &["y"], &[]).text(7, "com.example"),
    ];
    let all = |inputs: &[Msg]| model(graph(&[relu("n", "x", "y")], &[], inputs, &["y"]));
    vec![
        case("circle", model(graph(&circle, &[], &[x()], &["b"])), &["`n1` (Relu)", "reads `b`"]),
        case(
            "itself",
            model(graph(&[relu("n", "y", "y")], &[], &[x()], &["y"])),
            &["`n` (Relu)", "reads `y`"],
        ),
        case(
            "unsorted",
            model(graph(&[relu("n1", "a", "y"), relu("n2", "x", "a")], &[], &[x()], &["y"])),
            &["`n1` (Relu)", "reads `a`"],
        ),
        case(
            "missing_output",
            model(graph(&[relu("n", "x", "a")], &[], &[x()], &["y"])),
            &["output `y` is not"],
        ),
        case("missing_initializer", of("Add", &[], &[]), &["`n` (Add)", "input 1 is missing"]),
        case(
            "unknown_name",
            one(node("n", "Add", &["x", "w"], &["y"], &[]), &[]),
            &["`n` (Add)", "reads `w`", "nothing before it makes"],
        ),
        case(
            "given_twice",
            model(graph(&[relu("n1", "x", "y"), relu("n2", "x", "y")], &[], &[x()], &["y"])),
            &["`n2` (Relu)", "`y` is given twice"],
        ),
        case(
            "unknown_ops",
            model(graph(&unknown, &[], &[x()], &["y"])),
            &[
                "operator Quux is not supported: 2 nodes, `first`, `second`",
                "operator com.example.Frob is not supported: 1 nodes, `third`",
            ],
        ),
        case("unnamed_input", all(&[value("", FLOAT, &["2"])]), &["an input has no name"]),
        case(
            "negative_extent",
            all(&[value("x", FLOAT, &["-3"])]),
            &["input `x`", "`type.shape` has the extent -3"],
        ),
        case(
            "overflowing_extents",
            all(&[value("x", FLOAT, &["4611686018427387904", "4611686018427387904"])]),
            &["input `x`", "too large"],
        ),
        case("many_axes", all(&[value("x", FLOAT, &["1"; 9])]), &["input `x`", "`type.shape` has 9 axes"]),
        case("unknown_element", all(&[value("x", 99, &["2"])]), &["input `x`", "no element type 99"]),
        case("texts", all(&[value("x", 8, &["2"])]), &["input `x`", "type string"]),
        case("no_type", all(&[Msg::default().text(1, "x")]), &["input `x`", "`type` is not a tensor"]),
        case("many_symbols", all(&many), &["more than 23 extents with names"]),
        case("sparse", model(plain_with(Msg::default().msg(15, Msg::default()))), &["`sparse_initializer`"]),
    ]
}

fn plain_with(more: Msg) -> Msg {
    let mut g = graph(&[relu("n", "x", "y")], &[], &[x()], &["y"]);
    g.0.extend(more.0);
    g
}

fn functions() -> Vec<Case> {
    let calls = |functions: &[Msg]| {
        let g = graph(&[call("n", "A", &["x"], &["y"])], &[], &[x()], &["y"]);
        model(g).msg(8, opset("f", 1)).msgs(25, functions)
    };
    // Each calls the next twice.
    let chain: Vec<Msg> = (0..20u8)
        .map(|i| {
            let name = char::from(b'A' + i).to_string();
            let next = char::from(b'B' + i).to_string();
            let nodes = if i == 19 {
                vec![relu("r", "x", "y")]
            } else {
                vec![call("c1", &next, &["x"], &["a"]), call("c2", &next, &["a"], &["y"])]
            };
            function(&name, &["x"], &["y"], &nodes)
        })
        .collect();
    let itself = function("A", &["x"], &["y"], &[call("c", "A", &["x"], &["y"])]);
    let a = function("A", &["x"], &["y"], &[call("c", "B", &["x"], &["y"])]);
    let b = function("B", &["x"], &["y"], &[call("c", "A", &["x"], &["y"])]);
    let unknown = function("A", &["x"], &["y"], &[node("inside", "Quux", &["x"], &["y"], &[])]);
    let plain = function("A", &[], &["y"], &[relu("r", "x", "y")]);
    vec![
        case("function_of_itself", calls(&[itself]), &["functions call one another", "`A`"]),
        case("functions_of_each_other", calls(&[a, b]), &["functions call one another"]),
        case("functions_that_double", calls(&chain), &["unfolds to more"]),
        case("function_with_unknown", calls(&[unknown]), &["operator Quux", "`inside`"]),
        case("function_of_more_inputs", calls(std::slice::from_ref(&plain)), &["`A` takes 0 inputs, got 1"]),
        case("function_twice", calls(&[plain.clone(), plain]), &["`A` is defined twice"]),
    ]
}

fn constants() -> Vec<Case> {
    let typed = Msg::default().ints(1, &[4]).int(2, FLOAT).text(8, "w").float(4, 1.0);
    let small = |dims: &[i64]| with(tensor("w", FLOAT, dims, &[0; 16]));
    vec![
        case("four_gigabytes", small(&[1 << 30]), &["tensor `w`", "`raw_data` has 16 bytes"]),
        case("negative_dims", small(&[-4]), &["tensor `w`", "`dims` has the extent -4"]),
        case("overflowing_dims", small(&[1 << 62, 1 << 62]), &["tensor `w`", "too large"]),
        case("nine_axes", small(&[1; 9]), &["tensor `w`", "`dims` has 9 axes"]),
        case(
            "other_type",
            with(tensor("w", 99, &[4], &[0; 16])),
            &["tensor `w`", "`data_type`", "no element type 99"],
        ),
        case("lie_about_type", with(tensor("w", INT64, &[4], &[0; 16])), &["tensor `w`", "takes 32"]),
        case("few_numbers", with(typed), &["tensor `w`", "`float_data` has 1 numbers"]),
        case(
            "gigabytes_of_nothing",
            with(Msg::default().ints(1, &[1 << 40]).int(2, FLOAT).text(8, "w")),
            &["tensor `w`", "`float_data` has 0 numbers"],
        ),
        case(
            "segment",
            with(tensor("w", FLOAT, &[4], &[0; 16]).msg(3, Msg::default().int(1, 0))),
            &["`segment`"],
        ),
        case("nowhere", with(tensor("w", FLOAT, &[4], &[0; 16]).int(14, 7)), &["`data_location` is 7"]),
        case("nameless", with(tensor("", FLOAT, &[4], &[0; 16])), &["an initializer has no name"]),
    ]
}

fn external_data() -> Vec<Case> {
    let at = |location: &str| with(external("w", &[16], &[("location", location)]));
    let ranged = |offset: &str, length: &str| {
        with(external("w", &[16], &[("location", "weights.bin"), ("offset", offset), ("length", length)]))
    };
    const INSIDE: &[&str] = &["tensor `w`", "`external_data.location`", "inside of the model's folder"];
    const OUT: &[&str] = &["tensor `w`", "`external_data.location`", "leads out of the model's folder"];
    vec![
        case("up_and_out", at("../secret.bin"), INSIDE),
        case("down_and_out", at("folder/../../secret.bin"), INSIDE),
        case("absolute", at("/etc/passwd"), INSIDE),
        case("backslashes", at("..\\secret.bin"), INSIDE),
        case("no_location", with(external("w", &[16], &[])), &["`external_data.location` is missing"]),
        case("empty_location", at(""), INSIDE),
        case("link_out", at("link.bin"), OUT),
        case("link_up", at("up/secret.bin"), OUT),
        case("no_such_file", at("none.bin"), &["tensor `w`", "cannot be opened"]),
        case("a_folder", at("folder"), &["tensor `w`", "not a plain file"]),
        case("behind_the_end", ranged("60", "64"), &["`external_data`", "lie outside"]),
        case("overflowing_range", ranged("18446744073709551615", "64"), &["lie outside"]),
        case("offset_of_letters", ranged("ten", "64"), &["`external_data.offset` is `ten`"]),
        case("few_bytes", ranged("0", "32"), &["`external_data` has 32 bytes"]),
    ]
}

fn nodes() -> Vec<Case> {
    let huge = 1i64 << 40;
    let body = graph(
        &[node("i", "Identity", &["c"], &["c2"], &[]), node("j", "Identity", &["v"], &["v2"], &[])],
        &[],
        &[value("i", INT64, &[]), value("c", BOOL, &[]), value("v", FLOAT, &["2", "4"])],
        &["c2", "v2"],
    );
    let turns = tensor("a", INT64, &[], &huge.to_le_bytes());
    let unrolled = one(node("n", "Loop", &["a", "", "x"], &["y"], &[attr_graph("body", body)]), &[turns]);
    let scalar = |name: &str, n: i64| tensor(name, INT64, &[], &n.to_le_bytes());
    let bounds = [scalar("a", 0), scalar("b", huge), scalar("c", 1)];
    let range = model(graph(&[node("n", "Range", &["a", "b", "c"], &["y"], &[])], &bounds, &[x()], &["y"]));
    let zero = [list("a", &[1]), list("b", &[0])];
    let division = model(graph(&[node("n", "Div", &["a", "b"], &["y"], &[])], &zero, &[x()], &["y"]));
    let w = floats("a", &[3, 4, 1], &[0.0; 12]);
    let computed = one(node("n", "Reshape", &["x", "s"], &["y"], &[]), &[]);
    let inputs = [x(), value("s", INT64, &["2"])];
    let computed_shape =
        model(graph(&[node("n", "Reshape", &["x", "s"], &["y"], &[])], &[], &inputs, &["y"]));
    vec![
        case(
            "attribute_of_another_type",
            of("Concat", &[attr_text("axis", "0")], &[]),
            &["`n` (Concat)", "`axis`"],
        ),
        case("unknown_attribute", of("Relu", &[attr_int("slope", 1)], &[]), &["`n` (Relu)", "`slope`"]),
        case("missing_attribute", of("Concat", &[], &[]), &["`n` (Concat)", "`axis` is missing"]),
        case(
            "no_such_axis",
            of("Softmax", &[attr_int("axis", i64::MIN)], &[]),
            &["`n` (Softmax)", "no axis"],
        ),
        case("two_rests", of("Reshape", &[], &[list("a", &[-1, -1])]), &["`n` (Reshape)", "`shape`"]),
        case("no_rest", of("Reshape", &[], &[list("a", &[3, -1])]), &["`n` (Reshape)", "`shape`"]),
        case("more_elements", of("Reshape", &[], &[list("a", &[huge, huge])]), &["`n` (Reshape)"]),
        case("unknown_shape", computed, &["reads `s`"]),
        case("computed_shape", computed_shape, &["`n` (Reshape)", "`shape`", "must be known"]),
        case("long_range", range, &["`n` (Range)", "too long"]),
        case("huge_tile", of("Tile", &[], &[list("a", &[i64::MAX, i64::MAX])]), &["`n` (Tile)"]),
        case("huge_margins", of("Pad", &[], &[list("a", &[i64::MAX; 4])]), &["`n` (Pad)"]),
        case("negative_margins", of("Pad", &[], &[list("a", &[i64::MIN; 4])]), &["`n` (Pad)"]),
        case("few_margins", of("Pad", &[], &[list("a", &[1])]), &["`n` (Pad)", "`pads` has 1 numbers"]),
        case("other_rank", of("Conv", &[], std::slice::from_ref(&w)), &["`n` (Conv)"]),
        case(
            "no_step",
            of("Slice", &[], &[list("a", &[0]), list("b", &[1]), list("c", &[0]), list("d", &[0])]),
            &["`n` (Slice)", "`steps`"],
        ),
        case(
            "lists_of_other_lengths",
            of("Slice", &[], &[list("a", &[0, 1]), list("b", &[1])]),
            &["`n` (Slice)"],
        ),
        case(
            "index_outside",
            model(graph(
                &[node("n", "Gather", &["a", "b"], &["y"], &[])],
                &[list("a", &[1, 2]), list("b", &[7])],
                &[x()],
                &["y"],
            )),
            &["`n` (Gather)", "index 7"],
        ),
        case("division_by_zero", division, &["`n` (Div)", "divided by zero"]),
        case("endless_loop", unrolled, &["`n` (Loop)"]),
        case("odd_equation", of("Einsum", &[attr_text("equation", "ij->ijk")], &[]), &["`n` (Einsum)"]),
        case("equation_of_more", of("Einsum", &[attr_text("equation", "ij,jk,->")], &[]), &["`n` (Einsum)"]),
        case("more_than_there_are", of("TopK", &[], &[list("a", &[huge])]), &["`n` (TopK)"]),
        case("other_matrices", of("MatMul", &[], &[floats("a", &[3, 1], &[0.0; 3])]), &["`n` (MatMul)"]),
        case(
            "huge_depth",
            of("OneHot", &[], &[scalar("a", huge), list("b", &[0, 1])]),
            &["`n` (OneHot)", "`depth`"],
        ),
        case("odd_parts", of("Split", &[], &[list("a", &[i64::MAX, -5])]), &["`n` (Split)", "`split`"]),
        case(
            "large_resize",
            of("Resize", &[], &[floats("a", &[0], &[]), floats("b", &[2], &[1e30, 1.0])]),
            &["`n` (Resize)", "`scales`"],
        ),
        case(
            "order_of_axes",
            of("Transpose", &[attr_ints("perm", &[0, 0])], &[]),
            &["`n` (Transpose)", "`perm`"],
        ),
        case(
            "many_new_axes",
            of("Unsqueeze", &[], &[list("a", &[0, 1, 2, 3, 4, 5, 6])]),
            &["`n` (Unsqueeze)"],
        ),
        case("other_branches", other_branches(), &["`n` (If)", "the branches yield"]),
    ]
}

fn other_branches() -> Msg {
    let cast = node("c", "Cast", &["x"], &["o"], &[attr_int("to", UINT8)]);
    let attrs = [
        attr_graph("then_branch", graph(&[relu("r", "x", "o")], &[], &[], &["o"])),
        attr_graph("else_branch", graph(&[cast], &[], &[], &["o"])),
    ];
    let inputs = [x(), value("c", BOOL, &[])];
    model(graph(&[node("n", "If", &["c"], &["y"], &attrs)], &[], &inputs, &["y"]))
}

/// Sound files to damage.
pub fn sound() -> Vec<(&'static str, Vec<u8>)> {
    let image = value("x", FLOAT, &["1", "2", "6", "6"]);
    let net = [
        node(
            "c",
            "Conv",
            &["x", "w", "b"],
            &["c"],
            &[attr_ints("pads", &[1, 1, 1, 1]), attr_ints("strides", &[2, 2])],
        ),
        relu("r", "c", "r"),
        node("p", "MaxPool", &["r"], &["p"], &[attr_ints("kernel_shape", &[2, 2])]),
        node("s", "Shape", &["p"], &["s"], &[]),
        node("g", "Gather", &["s", "zero"], &["n"], &[]),
        node("k", "Concat", &["n", "rest"], &["k"], &[attr_int("axis", 0)]),
        node("f", "Reshape", &["p", "k"], &["f"], &[]),
        node("m", "Gemm", &["f", "v"], &["m"], &[attr_int("transB", 1)]),
        node("y", "Softmax", &["m"], &["y"], &[]),
    ];
    let weights = [
        floats("w", &[3, 2, 3, 3], &[0.1; 54]),
        floats("b", &[3], &[0.5; 3]),
        floats("v", &[2, 12], &[0.2; 24]),
        list("zero", &[0]),
        list("rest", &[-1]),
    ];
    let free = value("x", FLOAT, &["batch", "4"]);
    let quantized = [
        node("q", "QuantizeLinear", &["x", "s", "z"], &["q"], &[]),
        node("d", "DequantizeLinear", &["q", "s", "z"], &["d"], &[]),
        node("w", "DequantizeLinear", &["w", "ws"], &["wd"], &[attr_int("axis", 1)]),
        node("m", "MatMul", &["d", "wd"], &["m"], &[]),
        call("f", "A", &["m"], &["y"]),
    ];
    let constants = [
        floats("s", &[], &[0.1]),
        tensor("z", UINT8, &[], &[3]),
        tensor("w", 3, &[4, 2], &[1, 2, 3, 4, 5, 250, 7, 8]),
        floats("ws", &[2], &[0.5, 0.25]),
    ];
    let body =
        function("A", &["x"], &["y"], &[relu("r", "x", "a"), node("a", "Add", &["a", "a"], &["y"], &[])]);
    let attention = [
        node("t", "Transpose", &["x"], &["t"], &[]),
        node("d", "MatMul", &["x", "t"], &["d"], &[]),
        node("tri", "Trilu", &["d"], &["u"], &[]),
        node("a", "Add", &["d", "e"], &["a"], &[]),
        node("w", "Where", &["mask", "a", "u"], &["o"], &[]),
        node("r", "ReduceMean", &["o"], &["y"], &[attr_ints("axes", &[1])]),
    ];
    let others =
        [external("e", &[4, 4], &[("location", "weights.bin")]), tensor("mask", BOOL, &[4], &[1, 0, 1, 1])];
    vec![
        ("convolutions", model(graph(&net, &weights, &[image], &["y"])).0),
        (
            "quantized",
            model(graph(&quantized, &constants, &[free], &["y"])).msg(8, opset("f", 1)).msg(25, body).0,
        ),
        ("attention", model(graph(&attention, &others, &[value("x", FLOAT, &["4", "3"])], &["y"])).0),
    ]
}
