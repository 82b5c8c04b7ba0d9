//! Tiny text models as many exporters write them: each is raised, compiled, run, and compared with what ONNX Runtime
//! computes from the same file, on sequences of several lengths. The same file compiled as a graph over arrays, where
//! nothing is raised, must agree too.
//!
//! `frontends/tests/onnx_text/make_models.py` makes them (`make onnx-text`). They are read from the folder that
//! `QUANTC_ONNX_TEXT` names, else from `target/onnx-text`; where there are none, the test says that it is skipped.
//! `UPDATE=1` rewrites `docs/onnx-raising.md`.
#![cfg(feature = "llvm")]

mod common;

use common::{Golden, folder, logits, quantc, relative, store};
use quantc_codegen::arrays::io;
use quantc_frontends::npy;
use quantc_ir::entity::ValueId;
use quantc_ir::eval::Tensor;
use quantc_ir::graph::Graph;
use quantc_ir::ops::{Attention, Op};
use quantc_ir::text;
use quantc_ir::ty::{ElemTy, TensorTy};
use quantc_runtime::session::{Session, SessionOptions};
use quantc_runtime::{Engine, OpenOptions};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Ops of a graph that the importer of checkpoints makes and that say what kind of model it is.
const TELLING: &[&str] = &["attention", "gelu", "layernorm", "relu", "rmsnorm", "rope", "rope_table", "silu"];
/// The others: sums and products of rows, and what stands between them.
const COMMON: &[&str] =
    &["add", "cache_append", "embedding", "last_rows", "matmul", "mul", "positions", "reshape"];

/// Relative distance to ONNX Runtime's rows at most; it computes with f16 where the file does.
const NEAR: f64 = 1e-4;
const NEAR_HALF: f64 = 2e-2;

/// What came of a file.
enum Verdict {
    /// There is an engine, and it is right.
    Runs(Runs),
    /// No engine came of it.
    Refused(String),
    /// There is no file: the exporter says why.
    Unwritten(String),
    /// Another result than ONNX Runtime's.
    Wrong(String),
}

/// An engine that is right.
struct Runs {
    /// Ops that have no kernels of their own.
    left: BTreeSet<&'static str>,
    /// Ops that say what kind of model it is, with what they were found to have.
    told: BTreeSet<String>,
    decoder: bool,
    /// Largest relative distance to ONNX Runtime's rows.
    off: f64,
    /// That of the same file as a graph over arrays, or why there is no such engine.
    plain: Result<f64, String>,
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

/// Names of ops that are left in pieces, and of those that tell; without those of constants alone.
fn ops(graph: &Graph) -> (BTreeSet<&'static str>, BTreeSet<String>) {
    let mut constants: BTreeSet<ValueId> = BTreeSet::new();
    let (mut left, mut told) = (BTreeSet::new(), BTreeSet::new());
    for (_, node) in graph.ops() {
        let is_constant =
            |a: &ValueId| graph.is_none(*a) || graph.as_weight(*a).is_some() || constants.contains(a);
        let name = node.op.name();
        if !node.args.is_empty() && node.args.iter().all(is_constant) {
            constants.insert(node.result);
        } else if let Op::Attention(a) = &node.op {
            let kind = if a.causal { "causal attention" } else { "attention" };
            let window = if a.window > 0 { format!(" within {} tokens", a.window) } else { String::new() };
            told.insert(format!("{kind}{window}"));
        } else if TELLING.contains(&name) {
            told.insert(name.replace("rope_table", "rope"));
        } else if !COMMON.contains(&name) {
            left.insert(name);
        }
    }
    (left, told)
}

/// The first line that tells what is wrong, without places of this machine.
fn reason(told: &str) -> String {
    let line = told.lines().find(|l| l.starts_with("error")).or(told.lines().next()).unwrap_or_default();
    let line = line.strip_prefix("error: ").unwrap_or(line);
    let words: Vec<&str> = line.split_whitespace().filter(|w| !w.starts_with('/')).collect();
    words.join(" ")
}

/// The file as a graph over arrays, where nothing is raised: its rows for `ids`, or why there is no such engine.
fn plain(model: &Path, name: &str, ids: &[u32]) -> Result<Vec<f32>, String> {
    let tokens = ids.len() as u64;
    let fill = |ty: &TensorTy, from: &dyn Fn(usize) -> f64| {
        let n = ty.shape.dims().expect("arrays have fixed extents").iter().product::<u64>() as usize;
        Tensor::from_reals(ty, (0..n).map(from).collect()).expect("as many numbers as the type says")
    };
    let mask = folder().join(format!("{name}-mask.npy"));
    let ones = fill(&TensorTy::fixed(ElemTy::I64, &[1, tokens]), &|_| 1.0);
    std::fs::write(&mask, npy::write(&ones).expect("integers have a form")).expect("the folder is writable");
    let engine = folder().join(format!("{name}-plain"));
    let fixed = format!("attention_mask={}", mask.display());
    let mut args: Vec<String> =
        ["compile", "--target", "host", "--preset", "f32", "--fix", &fixed].map(String::from).to_vec();
    // The names that exporters give to extents.
    for one in ["batch", "batch_size"] {
        args.extend(["--dim".into(), format!("{one}=1")]);
    }
    for all in
        ["sequence", "sequence_length", "total_sequence_length", "past_sequence_length + sequence_length"]
    {
        args.extend(["--dim".into(), format!("{all}={tokens}")]);
    }
    // Of nothing that was kept, the width is any.
    args.extend(["--dim", "past_sequence_length=0", "--dim", "kv_cache_dim=1", "--store"].map(String::from));
    args.extend(
        [store(), "-o".into(), engine.clone(), model.into()].map(|p: PathBuf| p.display().to_string()),
    );
    let built = quantc(&args);
    if built.code != 0 {
        return Err(reason(&built.err));
    }
    let engine = Arc::new(Engine::open(&engine, &OpenOptions::default()).expect("it was just made"));
    let options = SessionOptions { poison: true, ..SessionOptions::default() };
    let mut session = Session::new(engine.clone(), &options).expect("the engine starts");
    let given = |a: &quantc_runtime::format::Array| {
        let ty = io::ty_of(a).expect("the engine was checked");
        let tensor = match a.name.as_str() {
            "input_ids" => fill(&ty, &|i| f64::from(ids[i])),
            "position_ids" => fill(&ty, &|i| i as f64),
            _ => fill(&ty, &|_| 0.0),
        };
        io::to_bytes(&tensor).expect("arrays have bytes")
    };
    let inputs: Vec<Vec<u8>> = engine.manifest().array_inputs.iter().map(given).collect();
    let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
    session.run_arrays(&inputs).expect("the engine takes them");
    let ty = io::ty_of(&engine.manifest().array_outputs[0]).expect("the engine was checked");
    let rows = io::from_bytes(&ty, session.array(0).expect("there is an output")).expect("it has the bytes");
    Ok(rows.reals().into_iter().map(|x| x as f32).collect())
}

fn verdict(path: &Path, name: &str) -> Verdict {
    if let Ok(why) = std::fs::read_to_string(path.join("failed.txt")) {
        let told = reason(why.trim());
        return Verdict::Unwritten(told.split(". ").next().unwrap_or_default().trim_end_matches('.').into());
    }
    let model = path.join("model.onnx");
    let raised = quantc(["import".as_ref(), "--raise".as_ref(), model.as_os_str()]);
    if raised.code != 0 {
        return Verdict::Refused(reason(&raised.err));
    }
    let parsed = text::parse(&raised.out, "raised.qir").unwrap_or_else(|e| panic!("{name}: {e}"));
    let main = &parsed.module.main;
    let (mut left, told) = ops(main);
    if !main.ops().any(|(_, n)| n.op.is::<Attention>().is_some()) {
        left.insert("attention");
    }
    let decoder = main.ops().any(|(_, n)| matches!(n.op, Op::CacheAppend(_)));
    let engine = folder().join(name);
    let args = ["compile", "--target", "host", "--preset", "f32", "--agreement", "0", "-o"]
        .map(std::ffi::OsStr::new);
    let built = quantc(args.into_iter().chain([engine.as_os_str(), model.as_os_str()]));
    if built.code != 0 {
        return Verdict::Refused(reason(&built.err));
    }
    let engine = Engine::open(&engine, &OpenOptions::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
    let options = SessionOptions { poison: true, ..SessionOptions::default() };
    let mut session = Session::new(Arc::new(engine), &options).expect("the engine starts");
    let near = if name.contains("half") { NEAR_HALF } else { NEAR };
    let known = Golden::open(&path.join("case.safetensors"));
    let (mut off, mut sample) = (0f64, None);
    for rows in known.names().iter().filter(|n| n.starts_with("rows.")) {
        let (ids, want) = (known.ids(&rows.replace("rows.", "ids.")), known.floats(rows));
        let got = if decoder {
            let all = logits(&mut session, &ids);
            session.reset(0).expect("slot 0 exists");
            let each: Vec<f32> =
                ids.iter().flat_map(|&id| session.decode(0, id).expect("the text fits").to_vec()).collect();
            let apart = relative(&each, &all);
            if apart.is_nan() || apart > NEAR {
                return Verdict::Wrong(format!(
                    "{} tokens one by one are another text: {apart:.1e}",
                    ids.len()
                ));
            }
            all
        } else {
            session.encode(&ids).expect("the text fits").to_vec()
        };
        let apart = relative(&got, &want);
        if apart.is_nan() || apart > near {
            return Verdict::Wrong(format!("{apart:.1e} off on {} tokens", ids.len()));
        }
        off = off.max(apart);
        if sample
            .as_ref()
            .is_none_or(|(ids, _): &(Vec<u32>, Vec<f32>)| ids.len() < want.len() && ids.len() < 13)
        {
            sample = Some((ids, want));
        }
    }
    let (ids, want) = sample.unwrap_or_else(|| panic!("{name}: no rows were recorded"));
    let plain = plain(&model, name, &ids).map(|rows| relative(&rows, &want));
    if let Some(apart) = plain.as_ref().ok().filter(|apart| apart.is_nan() || **apart > near) {
        return Verdict::Wrong(format!("{apart:.1e} off as a graph over arrays, on {} tokens", ids.len()));
    }
    Verdict::Runs(Runs { left, told, decoder, off, plain })
}

#[test]
fn exporters_raise() {
    let Some(models) = models() else {
        println!("skipped: exporters_raise: no models of exporters; `make onnx-text` makes them");
        return;
    };
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut files = vec![];
    for (family, path) in folders(&models) {
        for (exporter, path) in folders(&path) {
            let made = ["model.onnx", "failed.txt"].iter().any(|f| path.join(f).is_file());
            if made && format!("{family}-{exporter}").contains(&only) {
                files.push((family.clone(), exporter, path));
            }
        }
    }
    let (next, table) = (AtomicUsize::new(0), Mutex::new(BTreeMap::<_, BTreeMap<_, _>>::new()));
    let work = || {
        while let Some((family, exporter, path)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            let name = format!("{family}-{exporter}");
            let verdict = verdict(path, &name);
            match &verdict {
                Verdict::Runs(Runs { left, told, decoder, off, plain }) => {
                    let plain = plain.as_ref().map(|off| format!("{off:.1e}"));
                    println!(
                        "{name}: {off:.1e}, plain {plain:?}, decoder {decoder}, {told:?}, left {left:?}"
                    );
                }
                Verdict::Refused(why) => println!("{name}: refused: {why}"),
                Verdict::Unwritten(why) => println!("{name}: unwritten: {why}"),
                Verdict::Wrong(why) => println!("{name}: WRONG: {why}"),
            }
            let mut table = table.lock().expect("no other thread panics");
            table.entry(family.clone()).or_default().insert(exporter.clone(), verdict);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|s| (0..threads).for_each(|_| drop(s.spawn(work))));
    let table = table.into_inner().expect("no thread panicked");
    let wrong: Vec<String> = (table.iter())
        .flat_map(|(family, cells)| cells.iter().map(move |(exporter, v)| (family, exporter, v)))
        .filter_map(|(family, exporter, v)| match v {
            Verdict::Wrong(why) => Some(format!("{family}/{exporter}: {why}")),
            _ => None,
        })
        .collect();
    assert!(wrong.is_empty(), "other results than ONNX Runtime's: {wrong:#?}");
    if only.is_empty() {
        settle(&page(&table));
    }
}

/// A power of ten that is larger, and no less than 1e-6: what rounding does differs from machine to machine.
fn bound(off: f64) -> String {
    let power = (-6..0).find(|&p| off < 10f64.powi(p)).unwrap_or(0);
    format!("1e{power}")
}

/// The page with the table, and what stands behind its cells.
fn page(table: &BTreeMap<String, BTreeMap<String, Verdict>>) -> String {
    let mut notes: Vec<String> = vec![];
    let mut note = |text: String| {
        let at = notes.iter().position(|n| *n == text).unwrap_or_else(|| {
            notes.push(text);
            notes.len() - 1
        });
        at + 1
    };
    let exporters: BTreeSet<&String> = table.values().flat_map(BTreeMap::keys).collect();
    let listed: Vec<&str> = exporters.iter().map(|e| e.as_str()).collect();
    let mut rows = format!("| family | {} |\n|---{}|\n", listed.join(" | "), "|---".repeat(listed.len()));
    let mut kinds = String::from("| family | ops |\n|---|---|\n");
    let (mut raised, mut all, mut plains) = (0, 0, 0);
    for (family, cells) in table {
        let _ = write!(rows, "| {family} |");
        for exporter in &exporters {
            let cell = match cells.get(*exporter) {
                None => String::new(),
                Some(Verdict::Unwritten(why)) => format!("no file ({})", note(why.clone())),
                Some(Verdict::Refused(why)) => {
                    all += 1;
                    format!("refused ({})", note(why.clone()))
                }
                Some(Verdict::Wrong(why)) => unreachable!("{why}"),
                Some(Verdict::Runs(Runs { left, off, plain, .. })) => {
                    all += 1;
                    raised += usize::from(left.is_empty());
                    let mut why = vec![];
                    if !left.is_empty() {
                        let left: Vec<String> = left.iter().map(|l| format!("`{l}`")).collect();
                        why.push(format!("left in pieces: {}", left.join(", ")));
                    }
                    match plain {
                        Ok(_) => plains += 1,
                        Err(told) => why.push(format!("as a graph over arrays: {told}")),
                    }
                    let why = why.into_iter().map(|w| format!(" ({})", note(w))).collect::<String>();
                    format!("{}{why}", bound(*off))
                }
            };
            let _ = write!(rows, " {cell} |");
        }
        rows.push('\n');
        let sets: BTreeSet<_> = (cells.values())
            .filter_map(|v| match v {
                Verdict::Runs(Runs { told, .. }) => Some(told.iter().cloned().collect::<Vec<_>>().join(", ")),
                _ => None,
            })
            .collect();
        let _ = writeln!(kinds, "| {family} | {} |", sets.into_iter().collect::<Vec<_>>().join("; or "));
    }
    let mut page = String::from(HEAD);
    let _ = writeln!(
        page,
        "{raised} of {all} files are raised whole; {plains} are compared as graphs over arrays too."
    );
    let _ = writeln!(page, "\n{rows}");
    if !notes.is_empty() {
        page += "| note | why |\n|---|---|\n";
        for (i, text) in notes.iter().enumerate() {
            let _ = writeln!(page, "| {} | {} |", i + 1, text.replace('|', "\\|"));
        }
    }
    let _ = write!(page, "{KINDS}{kinds}");
    page
}

const HEAD: &str = "\
# Text models of ONNX exporters

Made by `UPDATE=1 cargo test --test onnx_raising` from the files of `make onnx-text`: tiny models with random weights, a
family of architectures in each row, an exporter in each column. Each file is imported, [raised](onnx.md), compiled with the
preset `f32`, run on sequences of 1 to 37 tokens, and compared with what ONNX Runtime computes from it. Decoders are also run
token after token. The same file is compiled as a graph over arrays, where nothing is raised, and compared too.

A number is above the relative distance of all rows: 1e-4 at most, and 2e-2 where the file computes with f16
(`torchscript-half`). `refused`: there is no engine, and the note says why. `no file`: the exporter does not write the family.

";

const KINDS: &str = "
## What is found

Ops of the raised graphs besides sums, products, tables of rows and caches; each has kernels of its own.

";

fn settle(page: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/onnx-raising.md");
    if std::fs::read_to_string(&path).is_ok_and(|now| now == page) {
        return;
    }
    assert!(std::env::var_os("UPDATE").is_some(), "docs/onnx-raising.md is not fresh: UPDATE=1 rewrites it");
    std::fs::write(&path, page).expect("the folder is writable");
}
