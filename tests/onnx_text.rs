//! Text models from ONNX files give the engines that the same weights give as a checkpoint: the same kernels, and the same
//! numbers. The files are written here over the weights of `tests/models`, op by op as PyTorch's exporter writes them; a
//! large one is looked at when the environment variable `QUANTC_MODELS` names a folder that has it.
#![cfg(feature = "llvm")]

mod common;
#[path = "../frontends/tests/onnx_wire/mod.rs"]
mod wire;

use common::{Built, Golden, Recipe, folder, json, logits, max_difference, models, ok, outer_models, quantc};
use quantc_passes::presets::Preset;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use wire::{FLOAT, INT64, Msg, attr_int, attr_ints, floats, graph, list, model, node, tensor, value};

/// A graph under construction, over the tensors of a checkpoint.
struct Net {
    nodes: Vec<Msg>,
    weights: Vec<Msg>,
    /// Where the tensors lie in the checkpoint's file.
    tensors: BTreeMap<String, (Vec<i64>, usize, usize)>,
    /// Those that are among the weights.
    read: BTreeSet<String>,
    made: usize,
}

impl Net {
    /// Over the tensors in the folder of a checkpoint.
    fn over(folder: &Path) -> Net {
        let bytes = std::fs::read(folder.join("model.safetensors")).expect("the checkpoint has one file");
        let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).expect("a safetensors file");
        let place = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
            let (from, to) = info.data_offsets;
            let dims = info.shape.iter().map(|&d| d as i64).collect();
            (name, (dims, 8 + header + from, to - from))
        };
        let tensors = metadata.tensors().into_iter().map(place).collect();
        Net { nodes: vec![], weights: vec![], tensors, read: BTreeSet::new(), made: 0 }
    }

    /// A tensor of the checkpoint as external data.
    fn weight(&mut self, name: &str) -> String {
        let (dims, at, len) = &self.tensors[name];
        let (at, len) = (at.to_string(), len.to_string());
        let entries = [("location", "model.safetensors"), ("offset", at.as_str()), ("length", len.as_str())];
        if self.read.insert(name.into()) {
            self.weights.push(wire::external(name, dims, &entries));
        }
        name.into()
    }

    fn constant(&mut self, message: impl Fn(&str) -> Msg) -> String {
        self.made += 1;
        let name = format!("c{}", self.made);
        self.weights.push(message(&name));
        name
    }

    fn ints(&mut self, values: &[i64]) -> String {
        self.constant(|n| list(n, values))
    }

    fn int(&mut self, value: i64) -> String {
        self.constant(|n| tensor(n, INT64, &[], &value.to_le_bytes()))
    }

    fn float(&mut self, value: f32) -> String {
        self.constant(|n| floats(n, &[], &[value]))
    }

    fn op(&mut self, op: &str, inputs: &[&str], attrs: &[Msg]) -> String {
        self.made += 1;
        let name = format!("v{}", self.made);
        self.nodes.push(node(&name, op, inputs, &[&name], attrs));
        name
    }

    /// Extent `axis` of a value, as a number.
    fn extent(&mut self, of: &str, axis: i64) -> String {
        let shape = self.op("Shape", &[of], &[]);
        let axis = self.int(axis);
        self.op("Gather", &[&shape, &axis], &[attr_int("axis", 0)])
    }

    fn list_of(&mut self, number: &str) -> String {
        let zero = self.ints(&[0]);
        self.op("Unsqueeze", &[number, &zero], &[])
    }

    /// `x w^T`, with a bias in front, as `Linear` is written.
    fn linear(&mut self, x: &str, name: &str) -> String {
        let w = self.weight(&format!("{name}.weight"));
        let turned = self.op("Transpose", &[&w], &[attr_ints("perm", &[1, 0])]);
        let y = self.op("MatMul", &[x, &turned], &[]);
        if !self.tensors.contains_key(&format!("{name}.bias")) {
            return y;
        }
        let bias = self.weight(&format!("{name}.bias"));
        self.op("Add", &[&bias, &y], &[])
    }

    /// Layer normalization as it is written up to version 16.
    fn layer_norm(&mut self, x: &str, name: &str) -> String {
        let last = attr_ints("axes", &[-1]);
        let (two, eps) = (self.float(2.0), self.float(1e-12));
        let mean = self.op("ReduceMean", &[x], std::slice::from_ref(&last));
        let centred = self.op("Sub", &[x, &mean], &[]);
        let square = self.op("Pow", &[&centred, &two], &[]);
        let variance = self.op("ReduceMean", &[&square], &[last]);
        let shifted = self.op("Add", &[&variance, &eps], &[]);
        let root = self.op("Sqrt", &[&shifted], &[]);
        let plain = self.op("Div", &[&centred, &root], &[]);
        let (gain, bias) = (self.weight(&format!("{name}.weight")), self.weight(&format!("{name}.bias")));
        let scaled = self.op("Mul", &[&plain, &gain], &[]);
        self.op("Add", &[&scaled, &bias], &[])
    }

    /// RMS normalization.
    fn rms_norm(&mut self, x: &str, name: &str, eps: f32) -> String {
        let (two, eps, one) = (self.float(2.0), self.float(eps), self.float(1.0));
        let square = self.op("Pow", &[x, &two], &[]);
        let mean = self.op("ReduceMean", &[&square], &[attr_ints("axes", &[-1])]);
        let shifted = self.op("Add", &[&mean, &eps], &[]);
        let root = self.op("Sqrt", &[&shifted], &[]);
        let inverse = self.op("Div", &[&one, &root], &[]);
        let plain = self.op("Mul", &[x, &inverse], &[]);
        let gain = self.weight(&format!("{name}.weight"));
        self.op("Mul", &[&gain, &plain], &[])
    }

    /// The shape `[batch, tokens, ..]`.
    fn shape(&mut self, of: &str, rest: &[i64]) -> String {
        let parts: Vec<String> = (0..2)
            .map(|axis| {
                let n = self.extent(of, axis);
                self.list_of(&n)
            })
            .collect();
        let rest = self.ints(rest);
        self.op("Concat", &[&parts[0], &parts[1], &rest], &[attr_int("axis", 0)])
    }

    /// `[batch, tokens, heads * size]` as `[batch, heads, tokens, size]`, or with other axes.
    fn heads(&mut self, x: &str, heads: i64, size: i64, perm: &[i64]) -> String {
        let shape = self.shape(x, &[heads, size]);
        let heads = self.op("Reshape", &[x, &shape], &[]);
        self.op("Transpose", &[&heads], &[attr_ints("perm", perm)])
    }

    /// The rows of `v` in the shares that masked scores give them, heads beside each other.
    fn mixed(&mut self, scores: &str, mask: &str, v: &str, width: i64) -> String {
        let scores = self.op("Add", &[scores, mask], &[]);
        let weights = self.op("Softmax", &[&scores], &[attr_int("axis", -1)]);
        let rows = self.op("MatMul", &[&weights, v], &[]);
        let rows = self.op("Transpose", &[&rows], &[attr_ints("perm", &[0, 2, 1, 3])]);
        let shape = self.shape(&rows, &[width]);
        self.op("Reshape", &[&rows, &shape], &[])
    }

    /// Writes the model into a new folder beside a copy of the checkpoint.
    fn written(self, name: &str, inputs: &[&str], output: &str) -> PathBuf {
        let to = folder().join(format!("{name}-onnx"));
        common::copy_folder(&models(name), &to);
        let inputs: Vec<Msg> = inputs.iter().map(|i| value(i, INT64, &["batch", "sequence"])).collect();
        let message = model(graph(&self.nodes, &self.weights, &inputs, &[output]));
        let path = to.join("model.onnx");
        std::fs::write(&path, message.0).expect("the folder was made");
        path
    }
}

/// `tiny-bert` with the mask as an input, attention in pieces and GELU by its error function.
fn bert() -> PathBuf {
    let (heads, size) = (3, 8);
    let mut net = Net::over(&models("tiny-bert"));
    let word = net.weight("embeddings.word_embeddings.weight");
    let words = net.op("Gather", &[&word, "input_ids"], &[]);
    let kind = net.weight("embeddings.token_type_embeddings.weight");
    let kinds = net.op("Gather", &[&kind, "token_type_ids"], &[]);
    let sum = net.op("Add", &[&words, &kinds], &[]);
    // A row of all positions is cut to the tokens there are.
    let raw: Vec<u8> = (0..32i64).flat_map(i64::to_le_bytes).collect();
    let all = net.constant(|n| tensor(n, INT64, &[1, 32], &raw));
    let tokens = net.extent("input_ids", 1);
    let (from, to, axis, step) = (net.ints(&[0]), net.list_of(&tokens), net.ints(&[1]), net.ints(&[1]));
    let ids = net.op("Slice", &[&all, &from, &to, &axis, &step], &[]);
    let place = net.weight("embeddings.position_embeddings.weight");
    let places = net.op("Gather", &[&place, &ids], &[]);
    let sum = net.op("Add", &[&sum, &places], &[]);
    let mut x = net.layer_norm(&sum, "embeddings.LayerNorm");
    // (1 - mask) * least.
    let axes = net.ints(&[1, 2]);
    let mask = net.op("Unsqueeze", &["attention_mask", &axes], &[]);
    let mask = net.op("Cast", &[&mask], &[attr_int("to", FLOAT)]);
    let (one, least) = (net.float(1.0), net.float(f32::MIN));
    let hidden = net.op("Sub", &[&one, &mask], &[]);
    let mask = net.op("Mul", &[&hidden, &least], &[]);
    for i in 0..2 {
        let l = |name: &str| format!("encoder.layer.{i}.{name}");
        let [q, k, v] = ["query", "key", "value"].map(|p| net.linear(&x, &l(&format!("attention.self.{p}"))));
        let q = net.heads(&q, heads, size, &[0, 2, 1, 3]);
        let k = net.heads(&k, heads, size, &[0, 2, 3, 1]);
        let v = net.heads(&v, heads, size, &[0, 2, 1, 3]);
        let scores = net.op("MatMul", &[&q, &k], &[]);
        let root = net.float((size as f32).sqrt());
        let scores = net.op("Div", &[&scores, &root], &[]);
        let rows = net.mixed(&scores, &mask, &v, heads * size);
        let o = net.linear(&rows, &l("attention.output.dense"));
        let sum = net.op("Add", &[&o, &x], &[]);
        let mid = net.layer_norm(&sum, &l("attention.output.LayerNorm"));
        let up = net.linear(&mid, &l("intermediate.dense"));
        let (root, one, half) = (net.float(std::f32::consts::SQRT_2), net.float(1.0), net.float(0.5));
        let inner = net.op("Div", &[&up, &root], &[]);
        let erf = net.op("Erf", &[&inner], &[]);
        let more = net.op("Add", &[&erf, &one], &[]);
        let product = net.op("Mul", &[&up, &more], &[]);
        let act = net.op("Mul", &[&product, &half], &[]);
        let down = net.linear(&act, &l("output.dense"));
        let sum = net.op("Add", &[&down, &mid], &[]);
        x = net.layer_norm(&sum, &l("output.LayerNorm"));
    }
    let inputs = ["input_ids", "attention_mask", "token_type_ids"];
    net.written("tiny-bert", &inputs, &x)
}

/// `tiny-mistral` without earlier tokens: rotary positions by halves, keys and values repeated for several heads, and a
/// causal mask with a window, made of ranges.
fn mistral() -> PathBuf {
    let (heads, groups, size, window) = (4, 2, 8, 6);
    let mut net = Net::over(&models("tiny-mistral"));
    let table = net.weight("model.embed_tokens.weight");
    let mut x = net.op("Gather", &[&table, "input_ids"], &[]);
    let tokens = net.extent("input_ids", 1);
    let (zero, one) = (net.int(0), net.int(1));
    let places = net.op("Range", &[&zero, &tokens, &one], &[]);
    let (down, along) = (net.ints(&[1]), net.ints(&[0]));
    let rows = net.op("Unsqueeze", &[&places, &down], &[]);
    // Angles: frequencies as a column times positions as a row, turned.
    let row = net.op("Unsqueeze", &[&places, &along], &[]);
    let row = net.op("Cast", &[&row], &[attr_int("to", FLOAT)]);
    let powers: Vec<f32> = (0..size / 2).map(|j| 10000f32.powf(-2.0 * j as f32 / size as f32)).collect();
    let column = net.constant(|n| floats(n, &[size / 2, 1], &powers));
    let angles = net.op("MatMul", &[&column, &row], &[]);
    let angles = net.op("Transpose", &[&angles], &[attr_ints("perm", &[1, 0])]);
    let angles = net.op("Concat", &[&angles, &angles], &[attr_int("axis", -1)]);
    let (cos, sin) = (net.op("Cos", &[&angles], &[]), net.op("Sin", &[&angles], &[]));
    let axes = net.ints(&[0, 1]);
    let [cos, sin] = [cos, sin].map(|t| net.op("Unsqueeze", &[&t, &axes], &[]));
    // Hidden is what comes later or is too far back.
    let later = net.op("Greater", &[&places, &rows], &[]);
    let width = net.int(window);
    let edge = net.op("Sub", &[&rows, &width], &[]);
    let far = net.op("LessOrEqual", &[&places, &edge], &[]);
    let hidden = net.op("Or", &[&later, &far], &[]);
    let (least, nothing) = (net.float(f32::MIN), net.float(0.0));
    let mask = net.op("Where", &[&hidden, &least, &nothing], &[]);
    let mask = net.op("Unsqueeze", &[&mask, &axes], &[]);
    for i in 0..2 {
        let l = |name: &str| format!("model.layers.{i}.{name}");
        let n = net.rms_norm(&x, &l("input_layernorm"), 1e-5);
        let [q, k, v] = ["q", "k", "v"].map(|p| net.linear(&n, &l(&format!("self_attn.{p}_proj"))));
        let q = net.heads(&q, heads, size, &[0, 2, 1, 3]);
        let [k, v] = [k, v].map(|p| net.heads(&p, groups, size, &[0, 2, 1, 3]));
        let [q, k] = [q, k].map(|x| {
            let (half, end, axis) = (net.ints(&[size / 2]), net.ints(&[i64::MAX]), net.ints(&[3]));
            let start = net.ints(&[0]);
            let low = net.op("Slice", &[&x, &start, &half, &axis], &[]);
            let high = net.op("Slice", &[&x, &half, &end, &axis], &[]);
            let high = net.op("Neg", &[&high], &[]);
            let turned = net.op("Concat", &[&high, &low], &[attr_int("axis", -1)]);
            let (still, moved) = (net.op("Mul", &[&x, &cos], &[]), net.op("Mul", &[&turned, &sin], &[]));
            net.op("Add", &[&still, &moved], &[])
        });
        let [k, v] = [k, v].map(|x| {
            let (axis, batch) = (net.ints(&[2]), net.extent(&x, 0));
            let one = net.op("Unsqueeze", &[&x, &axis], &[]);
            let (batch, t) = (net.list_of(&batch), net.list_of(&tokens));
            let [g, r, h, d] = [groups, heads / groups, heads, size].map(|n| net.ints(&[n]));
            let wide = net.op("Concat", &[&batch, &g, &r, &t, &d], &[attr_int("axis", 0)]);
            let many = net.op("Expand", &[&one, &wide], &[]);
            let shape = net.op("Concat", &[&batch, &h, &t, &d], &[attr_int("axis", 0)]);
            net.op("Reshape", &[&many, &shape], &[])
        });
        let k = net.op("Transpose", &[&k], &[attr_ints("perm", &[0, 1, 3, 2])]);
        let scores = net.op("MatMul", &[&q, &k], &[]);
        let scale = net.float(1.0 / (size as f32).sqrt());
        let scores = net.op("Mul", &[&scores, &scale], &[]);
        let rows = net.mixed(&scores, &mask, &v, heads * size);
        let o = net.linear(&rows, &l("self_attn.o_proj"));
        let mid = net.op("Add", &[&x, &o], &[]);
        let n = net.rms_norm(&mid, &l("post_attention_layernorm"), 1e-5);
        let [gate, up] = ["gate", "up"].map(|p| net.linear(&n, &l(&format!("mlp.{p}_proj"))));
        let open = net.op("Sigmoid", &[&gate], &[]);
        let act = net.op("Mul", &[&gate, &open], &[]);
        let both = net.op("Mul", &[&act, &up], &[]);
        let down = net.linear(&both, &l("mlp.down_proj"));
        x = net.op("Add", &[&mid, &down], &[]);
    }
    let n = net.rms_norm(&x, "model.norm", 1e-5);
    let y = net.linear(&n, "lm_head");
    net.written("tiny-mistral", &["input_ids"], &y)
}

/// The names of an engine's kernels: they are digests of what a kernel does.
fn kernels(built: &Built) -> Vec<String> {
    let text = ok(["explain".as_ref(), built.path.as_os_str()]);
    let is_name = |line: &&str| {
        let digest = line.rsplit_once('_').map_or("", |(_, digest)| digest);
        digest.len() == 12 && digest.bytes().all(|b| b.is_ascii_hexdigit())
    };
    text.lines().filter(is_name).map(String::from).collect()
}

/// Compiles both forms of a model the same way; they must have the same kernels.
fn both(checkpoint: &Path, onnx: &Path, how: impl Fn(&Path) -> Recipe) -> [Built; 2] {
    let built = [how(checkpoint).built(), how(onnx).built()];
    let [a, b] = [kernels(&built[0]), kernels(&built[1])];
    assert!(a.len() > 3, "{a:?}");
    assert_eq!(a, b);
    built
}

/// Token ids below `vocab` in rows, as a NumPy array.
fn ids(name: &str, vocab: u64) -> String {
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    let head = format!("{:<117}\n", "{'descr': '<i8', 'fortran_order': False, 'shape': (16, 24), }");
    bytes.extend((head.len() as u16).to_le_bytes());
    bytes.extend(head.bytes());
    bytes.extend((0..16 * 24u64).flat_map(|i| (i * i * 7 % vocab).to_le_bytes()));
    let path = folder().join(name);
    std::fs::write(&path, bytes).expect("the folder is writable");
    path.display().to_string()
}

#[test]
fn a_tiny_bert_has_the_kernels_and_numbers_of_its_checkpoint() {
    let (checkpoint, onnx) = (models("tiny-bert"), bert());
    let golden = Golden::open(&models("tiny-bert/golden.safetensors"));
    let (ids_in, types) = (golden.ids("input_ids"), golden.ids("token_type_ids"));
    let data = ids("bert.npy", 48);
    for preset in ["f32", "w8a8", "w4a16-gptq-g32"] {
        let recipe = |model: &Path| {
            let how = vec!["--preset".into(), preset.to_string()];
            let recipe = Recipe { model: model.into(), target: "host".into(), how };
            if preset.contains("gptq") { recipe.with(&["--data", &data]) } else { recipe }
        };
        let [a, b] = both(&checkpoint, &onnx, recipe).map(|built| {
            let mut session = built.session(1);
            session.encode_segments(&ids_in, &types).expect("the text fits").to_vec()
        });
        assert!(max_difference(&a, &b) <= 1e-5, "{preset}: {}", max_difference(&a, &b));
        if preset == "f32" {
            let off = max_difference(&b, &golden.floats("last_hidden_state"));
            assert!(off <= 2e-4, "{off}");
        }
    }
}

#[test]
fn a_tiny_decoder_goes_on_from_call_to_call_as_its_checkpoint_does() {
    let (checkpoint, onnx) = (models("tiny-mistral"), mistral());
    let golden = Golden::open(&models("tiny-mistral/golden.safetensors"));
    let ids = golden.ids("input_ids");
    for preset in ["f32", "w8a8"] {
        let [a, b] = both(&checkpoint, &onnx, |model| Recipe::preset(model, preset));
        let (mut ours, mut theirs) = (b.session(1), a.session(1));
        let (all, want) = (logits(&mut ours, &ids), logits(&mut theirs, &ids));
        let off = max_difference(&all, &want);
        assert!(off <= 1e-5, "{preset}: {off}");
        if preset == "f32" {
            let off = max_difference(&all, &golden.floats("logits_f32"));
            assert!(off <= 2e-4, "{off}");
        }
        ours.reset(0).expect("slot 0 exists");
        let each: Vec<f32> =
            ids.iter().flat_map(|&id| ours.decode(0, id).expect("the text fits").to_vec()).collect();
        let off = max_difference(&each, &all);
        assert!(off <= 2e-4, "{preset}, token after token: {off}");
    }
}

#[test]
fn what_inputs_were_taken_for_is_told() {
    let onnx = bert();
    let told = quantc(["inspect".as_ref(), onnx.as_os_str()]);
    assert_eq!(told.code, 0, "{}", told.err);
    assert!(told.err.contains("`attention_mask` is ones"), "{}", told.err);
    assert!(told.out.contains("vocab = 48"), "{}", told.out);
    let raised = ok(["import".as_ref(), "--raise".as_ref(), onnx.as_os_str()]);
    assert_eq!(raised.matches("= attention").count(), 2, "{raised}");
    assert!(!raised.contains("= dot") && !raised.contains("= softmax"), "{raised}");
}

#[test]
fn inputs_that_follow_from_nothing_are_named() {
    let onnx = bert();
    let compile = |more: &[&str]| {
        let out = folder().join("refused");
        let mut args: Vec<std::ffi::OsString> = vec!["compile".into(), onnx.clone().into()];
        args.extend(["--target", "host", "--preset", "f32", "-o"].map(Into::into));
        args.push(out.into());
        args.extend(more.iter().map(Into::into));
        quantc(args)
    };
    let none = compile(&["--bind", "input_ids=ones"]);
    assert_eq!(none.code, 1);
    assert!(none.err.contains("no input takes the tokens"), "{}", none.err);
    let other = compile(&["--bind", "ids=tokens"]);
    assert!(other.code == 1 && other.err.contains("there is no input `ids`"), "{}", other.err);
    let what = compile(&["--bind", "input_ids=word"]);
    assert!(what.code == 2 && what.err.contains("nothing that an input can be"), "{}", what.err);
    let output = compile(&["--result", "logits"]);
    assert!(output.code == 1 && output.err.contains("there is no output `logits`"), "{}", output.err);
    // A mask of another number hides nothing either: softmax does not change.
    let half = compile(&["--bind", "attention_mask=0.5"]);
    assert_eq!(half.code, 0, "{}", half.err);
}

#[test]
fn minilm_has_the_kernels_and_vectors_of_its_checkpoint() {
    let (Some(checkpoint), Some(text)) =
        (outer_models("all-MiniLM-L6-v2"), outer_models("text/tinystories_calib.txt"))
    else {
        return;
    };
    let onnx = checkpoint.join("model.onnx");
    let text = text.display().to_string();
    for preset in ["f32", "w8a8", "w4a16-gptq-g128"] {
        let pipeline = Preset::get(preset).expect("a preset").pipeline;
        // A few samples tell as much here as all of them.
        let pipeline = pipeline.replace("calibrate{", "calibrate{samples=4, ");
        let recipe = |model: &Path| {
            let recipe = Recipe::pipeline(model, &pipeline).with(&["--agreement", "0"]);
            if preset.contains("gptq") { recipe.with(&["--data", &text]) } else { recipe }
        };
        let [a, b] = both(&checkpoint, &onnx, recipe).map(|built| {
            let sentence = "The quick brown fox jumps over the lazy dog.";
            let told = json(["embed".as_ref(), built.path.as_os_str(), "--text".as_ref(), sentence.as_ref()]);
            let row = told["embeddings"][0].as_array().expect("one vector").clone();
            row.iter().map(|x| x.as_f64().expect("a number") as f32).collect::<Vec<f32>>()
        });
        let off = max_difference(&a, &b);
        eprintln!("{preset}: largest difference {off:e}");
        assert!(off <= 1e-5, "{preset}: {off}");
    }
}
