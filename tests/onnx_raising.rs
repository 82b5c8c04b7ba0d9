//! Tiny text models as many exporters write them: each is raised, compiled, run, and compared with what ONNX Runtime
//! computes from the same file.
//!
//! `frontends/tests/onnx_text/make_models.py` makes them (`make onnx-text`). They are read from the folder that
//! `QUANTC_ONNX_TEXT` names, else from `target/onnx-text`; where there are none, the test says that it is skipped.
//! `UPDATE=1` rewrites `docs/onnx-raising.md`.
#![cfg(feature = "llvm")]

mod common;

use common::{Golden, folder, logits, quantc, relative};
use quantc_ir::entity::ValueId;
use quantc_ir::graph::Graph;
use quantc_ir::ops::{Attention, Op};
use quantc_ir::text;
use quantc_runtime::session::{Session, SessionOptions};
use quantc_runtime::{Engine, OpenOptions};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Ops of a graph that the importer of checkpoints makes, and sums and products of rows.
const WHOLE: &[&str] = &[
    "add",
    "attention",
    "cache_append",
    "embedding",
    "gelu",
    "last_rows",
    "layernorm",
    "matmul",
    "mul",
    "positions",
    "relu",
    "reshape",
    "rmsnorm",
    "rope",
    "rope_table",
    "silu",
];

/// Relative distance to ONNX Runtime's rows at most; it computes with f16 where the file does.
const NEAR: f64 = 1e-4;
const NEAR_HALF: f64 = 2e-2;

/// What came of a file.
enum Verdict {
    /// Nothing of it is left in pieces.
    Raised { decoder: bool, off: f64 },
    /// It runs, with ops that have no kernels of their own.
    Runs { left: BTreeSet<&'static str>, decoder: bool, off: f64 },
    /// No engine came of it.
    Refused(String),
    /// There is no file: the exporter says why.
    Unwritten(String),
    /// Another result than ONNX Runtime's.
    Wrong(f64),
}

fn models() -> Option<PathBuf> {
    let named = std::env::var_os("QUANTC_ONNX_TEXT").map(PathBuf::from);
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/onnx-text");
    Some(named.unwrap_or(own)).filter(|f| f.is_dir())
}

fn folders(of: &Path) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(of).unwrap_or_else(|e| panic!("{}: {e}", of.display()));
    let paths = entries.map(|e| e.expect("folders are readable").path()).filter(|p| p.is_dir());
    let named = |p: PathBuf| (p.file_name().expect("folders have names").to_string_lossy().into_owned(), p);
    let mut all: Vec<_> = paths.map(named).collect();
    all.sort();
    all
}

/// Names of ops that are left in pieces, without those of constants alone.
fn left(graph: &Graph) -> BTreeSet<&'static str> {
    let mut constants: BTreeSet<ValueId> = BTreeSet::new();
    let mut left = BTreeSet::new();
    for (_, node) in graph.ops() {
        let is_constant =
            |a: &ValueId| graph.is_none(*a) || graph.as_weight(*a).is_some() || constants.contains(a);
        if !node.args.is_empty() && node.args.iter().all(is_constant) {
            constants.insert(node.result);
        } else if !WHOLE.contains(&node.op.name()) {
            left.insert(node.op.name());
        }
    }
    left
}

/// The first line that tells what is wrong.
fn reason(told: &str) -> String {
    let line = told.lines().find(|l| l.starts_with("error")).or(told.lines().next()).unwrap_or_default();
    let line = line.split_once(": ").map_or(line, |(_, rest)| rest);
    // Names of nodes are the exporter's.
    line.to_string()
}

fn verdict(path: &Path, name: &str) -> Verdict {
    if let Ok(why) = std::fs::read_to_string(path.join("failed.txt")) {
        return Verdict::Unwritten(why.trim().into());
    }
    let model = path.join("model.onnx");
    let raised = quantc(["import".as_ref(), "--raise".as_ref(), model.as_os_str()]);
    if raised.code != 0 {
        return Verdict::Refused(reason(&raised.err));
    }
    let parsed = text::parse(&raised.out, "raised.qir").unwrap_or_else(|e| panic!("{name}: {e}"));
    let main = &parsed.module.main;
    let left = left(main);
    let heads = main.ops().filter(|(_, n)| n.op.is::<Attention>().is_some()).count();
    let decoder = main.ops().any(|(_, n)| matches!(n.op, Op::CacheAppend(_)));
    let engine = folder().join(name);
    let args = ["compile", "--target", "host", "--preset", "f32", "--agreement", "0", "-o"]
        .map(std::ffi::OsStr::new);
    let built = quantc(args.into_iter().chain([engine.as_os_str(), model.as_os_str()]));
    if built.code != 0 {
        return Verdict::Refused(reason(&built.err));
    }
    let known = Golden::open(&path.join("case.safetensors"));
    let (ids, want) = (known.ids("input_ids"), known.floats("rows"));
    let engine = Engine::open(&engine, &OpenOptions::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
    let options = SessionOptions { poison: true, ..SessionOptions::default() };
    let mut session = Session::new(Arc::new(engine), &options).expect("the engine starts");
    let got = if decoder {
        let all = logits(&mut session, &ids);
        session.reset(0).expect("slot 0 exists");
        let each: Vec<f32> =
            ids.iter().flat_map(|&id| session.decode(0, id).expect("the text fits").to_vec()).collect();
        let off = relative(&each, &all);
        assert!(off <= NEAR, "{name}: token after token is another text: {off}");
        all
    } else {
        session.encode(&ids).expect("the text fits").to_vec()
    };
    let off = relative(&got, &want);
    let near = if name.contains("half") { NEAR_HALF } else { NEAR };
    if off.is_nan() || off > near {
        return Verdict::Wrong(off);
    }
    if left.is_empty() && heads > 0 {
        Verdict::Raised { decoder, off }
    } else {
        Verdict::Runs { left, decoder, off }
    }
}

#[test]
fn exporters_raise() {
    let Some(models) = models() else {
        println!("skipped: exporters_raise: no models of exporters; `make onnx-text` makes them");
        return;
    };
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut table: BTreeMap<String, BTreeMap<String, Verdict>> = BTreeMap::new();
    let (mut wrong, mut exporters) = (vec![], BTreeSet::new());
    for (family, path) in folders(&models) {
        for (exporter, path) in folders(&path) {
            let name = format!("{family}-{exporter}");
            let made = ["model.onnx", "failed.txt"].iter().any(|f| path.join(f).is_file());
            if !made || !name.contains(&only) {
                continue;
            }
            let verdict = verdict(&path, &name);
            match &verdict {
                Verdict::Raised { decoder, off } => {
                    println!("{name}: raised, decoder {decoder}, off {off:.1e}")
                }
                Verdict::Runs { left, decoder, off } => {
                    println!("{name}: left {left:?}, decoder {decoder}, off {off:.1e}");
                }
                Verdict::Refused(why) => println!("{name}: refused: {why}"),
                Verdict::Unwritten(why) => println!("{name}: unwritten: {why}"),
                Verdict::Wrong(off) => wrong.push(format!("{name}: {off}")),
            }
            exporters.insert(exporter.clone());
            table.entry(family.clone()).or_default().insert(exporter, verdict);
        }
    }
    assert!(wrong.is_empty(), "other results than ONNX Runtime's: {wrong:?}");
    if only.is_empty() {
        settle(&page(&table, &exporters));
    }
}

/// The page with the table, and what stands behind its cells.
fn page(table: &BTreeMap<String, BTreeMap<String, Verdict>>, exporters: &BTreeSet<String>) -> String {
    let mut notes: Vec<String> = vec![];
    let mut note = |text: String| {
        let at = notes.iter().position(|n| *n == text).unwrap_or_else(|| {
            notes.push(text);
            notes.len() - 1
        });
        at + 1
    };
    let mut rows = String::new();
    let _ = writeln!(rows, "| family | {} |", exporters.iter().cloned().collect::<Vec<_>>().join(" | "));
    let _ = writeln!(rows, "|---{}|", "|---".repeat(exporters.len()));
    let (mut raised, mut all) = (0, 0);
    for (family, cells) in table {
        let _ = write!(rows, "| {family} |");
        for exporter in exporters {
            let cell = match cells.get(exporter) {
                None => "".into(),
                Some(Verdict::Unwritten(why)) => {
                    format!("no file ({})", note(format!("the exporter says: {why}")))
                }
                Some(verdict) => {
                    all += 1;
                    match verdict {
                        Verdict::Raised { .. } => {
                            raised += 1;
                            "raised".into()
                        }
                        Verdict::Runs { left, .. } => {
                            let left: Vec<String> = left.iter().map(|l| format!("`{l}`")).collect();
                            format!("runs ({})", note(format!("left: {}", left.join(", "))))
                        }
                        Verdict::Refused(why) => format!("refused ({})", note(why.clone())),
                        Verdict::Wrong(_) | Verdict::Unwritten(_) => unreachable!("told before"),
                    }
                }
            };
            let _ = write!(rows, " {cell} |");
        }
        rows.push('\n');
    }
    let mut page = String::from(HEAD);
    let _ = writeln!(page, "{raised} of {all} files are raised whole.\n\n{rows}");
    if !notes.is_empty() {
        page += "| note | why |\n|---|---|\n";
        for (i, text) in notes.iter().enumerate() {
            let _ = writeln!(page, "| {} | {} |", i + 1, text.replace('|', "\\|"));
        }
    }
    page
}

const HEAD: &str = "\
# Text models of ONNX exporters

Made by `UPDATE=1 cargo test --test onnx_raising` from the files of `make onnx-text`: tiny models with random weights, a
family of architectures in each row, an exporter in each column. Each file is imported, [raised](onnx.md), compiled with the
preset `f32`, run, and compared with what ONNX Runtime computes from it: rows differ by 1e-4 of their length at most, and by
2e-2 where the file computes with f16. Decoders are also run token after token.

`raised`: the graph has only ops that a checkpoint's has. `runs`: it has others besides, which the note names. `refused`:
there is no engine, and the note says why. `no file`: the exporter does not write the family.

";

fn settle(page: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/onnx-raising.md");
    if std::fs::read_to_string(&path).is_ok_and(|now| now == page) {
        return;
    }
    assert!(std::env::var_os("UPDATE").is_some(), "docs/onnx-raising.md is not fresh: UPDATE=1 rewrites it");
    std::fs::write(&path, page).expect("the folder is writable");
}
