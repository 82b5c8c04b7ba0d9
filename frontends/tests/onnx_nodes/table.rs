//! The table of what passes.

use super::case::{Case, Compiled, Verdict};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

/// Passed, of them with inputs given at import, and refused.
#[derive(Clone, Copy, Default)]
struct Counts {
    passed: usize,
    fixed: usize,
    refused: usize,
    failed: usize,
    /// Of those that passed, what became of them as engines.
    compiled: usize,
    no_kernel: usize,
    wrong: usize,
}

impl Counts {
    fn add(&mut self, verdict: &Verdict) {
        match verdict {
            Verdict::Passed { fixed, engine } => {
                match engine {
                    Compiled::Passed => self.compiled += 1,
                    Compiled::Refused(_) => self.no_kernel += 1,
                    Compiled::Failed(_) => self.wrong += 1,
                }
                self.passed += 1;
                self.fixed += usize::from(*fixed);
            }
            Verdict::Refused(_) => self.refused += 1,
            Verdict::Failed(_) => self.failed += 1,
        }
    }

    fn all(self) -> usize {
        self.passed + self.refused + self.failed
    }
}

/// Why cases are refused, and how many, by domain and operator.
type Reasons = BTreeMap<(String, String), BTreeMap<String, usize>>;

/// What the table says.
pub struct Table {
    /// By domain, operator and version.
    rows: BTreeMap<(String, String, i64), Counts>,
    reasons: Reasons,
    /// Why there are no engines of cases that pass.
    no_kernels: Reasons,
    counted: Counts,
    all: Counts,
}

/// Operators that are no part of what is counted: they make random numbers, train, or are about texts, sequences, maps
/// and optional values.
const OUTSIDE: &[&str] = &[
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "ImageDecoder",
    "Optional",
    "OptionalGetElement",
    "OptionalHasElement",
    "RegexFullMatch",
    "SequenceAt",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceLength",
    "SequenceMap",
    "SplitToSequence",
    "ConcatFromSequence",
    "StringConcat",
    "StringNormalizer",
    "StringSplit",
    "TfIdfVectorizer",
];

/// Whether a case is one of those of which three quarters are to pass.
fn counts(case: &Case) -> bool {
    let name = &case.name;
    let outside = OUTSIDE.contains(&case.op.as_str())
        || ["sequence", "optional", "string", "training", "_train_"].iter().any(|w| name.contains(w));
    case.domain.is_empty() && case.opset >= 13 && !outside
}

impl Table {
    /// Counts verdicts.
    pub fn new(cases: &[Case], verdicts: &[Verdict]) -> Table {
        let mut table = Table {
            rows: BTreeMap::new(),
            reasons: Reasons::new(),
            no_kernels: Reasons::new(),
            counted: Counts::default(),
            all: Counts::default(),
        };
        for (case, verdict) in cases.iter().zip(verdicts) {
            let key = (case.domain.clone(), case.op.clone(), case.opset);
            table.rows.entry(key).or_default().add(verdict);
            table.all.add(verdict);
            if counts(case) {
                table.counted.add(verdict);
            }
            if let Verdict::Passed { engine: Compiled::Refused(why), .. } = verdict {
                let reasons = table.no_kernels.entry((case.domain.clone(), case.op.clone())).or_default();
                *reasons.entry(why.lines().next().unwrap_or_default().to_string()).or_default() += 1;
            }
            if let Verdict::Refused(why) = verdict {
                let line = why.lines().next().unwrap_or_default();
                let line = line.trim_start_matches("error: ").split(": 1 nodes").next().unwrap_or_default();
                let reasons = table.reasons.entry((case.domain.clone(), case.op.clone())).or_default();
                *reasons.entry(line.to_string()).or_default() += 1;
            }
        }
        table
    }

    /// The share of the counted cases that pass.
    pub fn share(&self) -> f64 {
        self.counted.passed as f64 / self.counted.all().max(1) as f64
    }

    /// One line.
    pub fn summary(&self) -> String {
        let (all, counted) = (self.all, self.counted);
        format!(
            "{} cases: {} passed ({} with inputs given at import), {} refused, {} failed; of the {} counted ones {:.1} % pass. \
             Engines of those that pass: {} pass, {} are refused, {} fail",
            all.all(),
            all.passed,
            all.fixed,
            all.refused,
            all.failed,
            counted.all(),
            self.share() * 100.0,
            all.compiled,
            all.no_kernel,
            all.wrong
        )
    }

    fn text(&self) -> String {
        let mut out = String::from("# Node tests of the ONNX standard\n\n");
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "Made by `UPDATE=1 cargo test --release -p quantc-frontends --test onnx_nodes` from the cases of the Python package\n\
             `onnx` (`make onnx-nodes`): each is imported, evaluated by the reference evaluator, and compared with its recorded\n\
             outputs; then it is compiled for the machine of the test, run, and compared again. *Given* cases pass with inputs that must be known at import, as shapes and axes. Expanded cases count\n\
             for the operator they are expanded from.\n\n{}.\n\nCounted are the default domain from version 13 on, \
             without operators that make random numbers, train,\nor are about texts, sequences, maps and optional values.\n",
            self.summary()
        );
        let _ = writeln!(
            out,
            "| operator | version | passed | given | refused | failed | compiled | no kernel | wrong |\n|---|---|---|---|---|---|---|---|---|"
        );
        for ((domain, op, version), c) in &self.rows {
            let dot = if domain.is_empty() { "" } else { "." };
            let _ = writeln!(
                out,
                "| {domain}{dot}{op} | {version} | {} | {} | {} | {} | {} | {} | {} |",
                c.passed, c.fixed, c.refused, c.failed, c.compiled, c.no_kernel, c.wrong
            );
        }
        for (title, all) in [("What is refused", &self.reasons), ("What has no kernel", &self.no_kernels)] {
            let _ = writeln!(out, "\n## {title}\n\n| operator | cases | why |\n|---|---|---|");
            for ((domain, op), reasons) in all {
                let dot = if domain.is_empty() { "" } else { "." };
                for (why, n) in reasons {
                    let _ = writeln!(out, "| {domain}{dot}{op} | {n} | {} |", why.replace('|', "\\|"));
                }
            }
        }
        out
    }

    /// Compares the committed table with this one, or rewrites it.
    pub fn settle(&self) {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/onnx-nodes.md"));
        let text = self.text();
        let now = std::fs::read_to_string(path).unwrap_or_default();
        if now == text {
            return;
        }
        if std::env::var_os("UPDATE").is_some_and(|u| u == "1") {
            std::fs::write(path, text).expect("the table is written");
        } else {
            // Another release of the package has other cases, so this is no failure.
            println!("docs/onnx-nodes.md says something else; UPDATE=1 rewrites it");
        }
    }
}
