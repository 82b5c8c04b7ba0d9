//! The ONNX standard's own node tests: each is imported, evaluated by the reference evaluator, and compared with the
//! outputs recorded beside it; then it is compiled for this machine, run, and compared again.
//!
//! The Python package `onnx` makes them (`make onnx-nodes`). They are read from the folder that
//! `QUANTC_ONNX_NODE_TESTS` names, else from `target/onnx-nodes`; where there are none, the test says that it is skipped.
//! `UPDATE=1` rewrites the table in `docs/onnx-nodes.md`.

#[path = "onnx_nodes/case.rs"]
mod case;
#[path = "onnx_nodes/table.rs"]
mod table;

use case::{Case, Compiled, Verdict};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The folder with the tests, if there is one.
fn folder() -> Option<PathBuf> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/onnx-nodes");
    let named = std::env::var_os("QUANTC_ONNX_NODE_TESTS").map(PathBuf::from);
    let folder = named.unwrap_or_else(|| root.into());
    [folder.join("node"), folder].into_iter().find(|f| f.join("test_abs").is_dir())
}

#[test]
fn node_tests_of_the_standard() {
    let Some(folder) = folder() else {
        println!("skipped: node_tests_of_the_standard: no node tests; `make onnx-nodes` makes them");
        return;
    };
    let cases = Case::all(&folder);
    let next = AtomicUsize::new(0);
    let verdicts: Mutex<Vec<Option<Verdict>>> = Mutex::new(cases.iter().map(|_| None).collect());
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(i) else { break };
                    let verdict = case.run();
                    verdicts.lock().expect("no worker panics")[i] = Some(verdict);
                }
            });
        }
    });
    let verdicts = verdicts.into_inner().expect("no worker panics");
    let verdicts: Vec<Verdict> = verdicts.into_iter().map(|v| v.expect("each case has run")).collect();
    let mut wrong = vec![];
    for (case, verdict) in cases.iter().zip(&verdicts) {
        match verdict {
            Verdict::Failed(why) => wrong.push(format!("{}: {why}", case.name)),
            Verdict::Passed { engine: Compiled::Failed(why), .. } => {
                wrong.push(format!("engine of {}: {why}", case.name));
            }
            Verdict::Passed { engine: Compiled::Refused(why), .. } if std::env::var_os("SHOW").is_some() => {
                println!("no engine of {}: {why}", case.name);
            }
            Verdict::Refused(why) if std::env::var_os("SHOW").is_some() => {
                println!("refused {}: {}", case.name, why.replace('\n', " "));
            }
            _ => {}
        }
    }
    let table = table::Table::new(&cases, &verdicts);
    println!("{}", table.summary());
    assert!(wrong.is_empty(), "{} wrong answers or panics:\n{}", wrong.len(), wrong.join("\n"));
    table.settle();
    let share = table.share();
    assert!(share >= 0.90, "only {:.1} % of the tests that are to pass do", share * 100.0);
}
