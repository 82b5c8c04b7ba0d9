//! The table that a tuner writes and a compilation reads.
//!
//! It is a JSON file: the target, the processor it was measured on, and for each product the tile that won beside the
//! one the model had chosen. Equal contents give equal bytes: entries are in order of their names, and figures have
//! three decimals.

use std::collections::BTreeMap;

use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::TargetDesc;
use serde::{Deserialize, Serialize};

use crate::cpu::matmul::schedule::{self, CpuTile};
use crate::spec::MatmulSpec;

/// The version of the file's form.
const VERSION: u32 = 1;
/// Largest file that is read, in bytes.
pub const MAX_BYTES: u64 = 16 << 20;

/// Measured choices of tiles for one target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuning {
    version: u32,
    /// The target whose kernels were timed.
    pub target: String,
    /// The processor they were timed on.
    pub cpu: String,
    /// What was found, by the product's [`key`](super::key).
    pub entries: BTreeMap<String, Entry>,
}

/// What was found for one product.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The fastest tile.
    pub tile: CpuTile,
    /// The tile that the model chose.
    pub model: CpuTile,
    /// Time of the model's tile over that of the fastest; 1 when they are the same.
    pub gain: f64,
    /// The part of the limit that the fastest reaches.
    pub share: f64,
    /// The part of the limit that the model expected of the model's tile.
    pub expected: f64,
}

impl Entry {
    /// With figures as they are written: three decimals.
    fn rounded(self) -> Entry {
        let round = |x: f64| (x * 1000.0).round() / 1000.0;
        Entry { gain: round(self.gain), share: round(self.share), expected: round(self.expected), ..self }
    }
}

impl Tuning {
    /// An empty table.
    pub fn new(target: &TargetDesc, cpu: impl Into<String>) -> Tuning {
        Tuning { version: VERSION, target: target.name.into(), cpu: cpu.into(), entries: BTreeMap::new() }
    }

    /// Reads a table. `file` names it in errors.
    pub fn parse(text: &str, file: &str) -> Result<Tuning> {
        let bad = |why: String| Diag::input(format!("this is no tuning table: {why}")).in_file(file);
        let table: Tuning = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        if table.version != VERSION {
            return Err(bad(format!("its version is {}, expected {VERSION}", table.version))
                .help("measure again with `quantc tune`"));
        }
        for (key, entry) in &table.entries {
            let figures = [entry.gain, entry.share, entry.expected];
            if figures.iter().any(|x| !x.is_finite() || *x < 0.0) {
                return Err(bad(format!("an entry of `{key}` is not a sane number")));
            }
        }
        Ok(table)
    }

    /// The file's text.
    pub fn text(&self) -> String {
        let mut table = self.clone();
        for entry in table.entries.values_mut() {
            *entry = entry.clone().rounded();
        }
        serde_json::to_string_pretty(&table).expect("a table has only serializable fields") + "\n"
    }

    /// What the table knows about `spec`.
    pub fn entry(&self, spec: &MatmulSpec) -> Option<&Entry> {
        self.entries.get(&super::key(spec))
    }

    /// Refuses a table for another target.
    pub fn check(&self, target: &TargetDesc) -> Result<()> {
        if self.target == target.name {
            return Ok(());
        }
        Err(Diag::input(format!("the tuning table is for target {}, not {}", self.target, target.name))
            .help(format!("measure one with `quantc tune --target {}`", target.name)))
    }

    /// The tile for `spec` on `target`, where the table has one; refused when it is none that `spec` could have.
    pub fn tile(&self, spec: &MatmulSpec, target: &TargetDesc) -> Result<Option<CpuTile>> {
        let Some(entry) = self.entry(spec) else { return Ok(None) };
        let tile = entry.tile;
        if schedule::ranked(spec, &target.cpu).iter().any(|(_, t)| *t == tile) {
            return Ok(Some(tile));
        }
        let CpuTile { mr, nr, ku } = tile;
        Err(Diag::input(format!(
            "the tuning table's tile {mr}x{nr} with {ku} steps is none that {} can have on {}",
            super::key(spec),
            target.name
        ))
        .help("measure again with `quantc tune`"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eexpr::{EExpr, MemTy};
    use crate::spec::{AFmt, Code, MRange, Rows, ScaleTy, WFmt, Zero};

    fn spec(max: u32) -> MatmulSpec {
        let w = WFmt { code: Code::U4, group: 32, zero: Zero::Sym(8), scale: ScaleTy::Bf16 };
        let (m, epilogue) = (MRange { min: 1, max }, EExpr::store_acc(MemTy::F32, 128));
        MatmulSpec { n: 128, k: 64, m, rows: Rows::T, w, a: AFmt::I8Token, epilogue }
    }

    fn target() -> &'static TargetDesc {
        crate::targets::lookup("cpu-avx512vnni").expect("a known target")
    }

    fn table(tile: CpuTile) -> Tuning {
        let mut table = Tuning::new(target(), "a processor");
        let entry = Entry { tile, model: tile, gain: 1.0 / 3.0, share: 0.98765, expected: 1.0 };
        table.entries.insert(super::super::key(&spec(512)), entry);
        table
    }

    #[test]
    fn equal_tables_are_equal_texts() {
        let table = table(CpuTile { mr: 4, nr: 2, ku: 4 });
        let text = table.text();
        let read = Tuning::parse(&text, "t").expect("it was just written");
        assert_eq!(read.text(), text);
        assert!(text.contains("0.333") && text.contains("0.988"), "{text}");
        assert_eq!(read.tile(&spec(512), target()).expect("it fits"), Some(CpuTile { mr: 4, nr: 2, ku: 4 }));
        assert_eq!(read.tile(&spec(1), target()).expect("nothing is known"), None);
    }

    #[test]
    fn epilogues_and_what_counts_the_rows_share_an_entry() {
        let mut other = spec(512);
        let sum = other.epilogue.acc();
        other.epilogue.store(sum, MemTy::Bf16, 128);
        other.rows = Rows::R;
        let table = table(CpuTile { mr: 4, nr: 2, ku: 4 });
        assert!(table.entry(&other).is_some());
    }

    #[test]
    fn hostile_tables_are_refused() {
        let good = table(CpuTile { mr: 4, nr: 2, ku: 4 }).text();
        let cases = [
            (String::new(), "no tuning table"),
            ("[]".into(), "no tuning table"),
            (good.replace("\"version\": 1", "\"version\": 2"), "version is 2"),
            (good.replace("\"nr\"", "\"nv\""), "missing field `nr`"),
            (good.replace("0.988", "1e999"), "no tuning table"),
            (good.replace("0.988", "-1"), "not a sane number"),
            (good.replace("\"mr\": 4", "\"mr\": 4294967296"), "no tuning table"),
        ];
        for (text, why) in cases {
            let error = Tuning::parse(&text, "t.json").expect_err(why).to_string();
            assert!(error.contains(why) && error.contains("t.json"), "{error}");
        }
        for (mr, nr, ku) in [(400, 2, 4), (4, 3, 4), (0, 0, 0), (4, 2, 1 << 30)] {
            let error = table(CpuTile { mr, nr, ku }).tile(&spec(512), target()).expect_err("no such tile");
            assert!(error.to_string().contains("is none that"), "{error}");
        }
        let other = crate::targets::lookup("cpu-avx2").expect("a known target");
        let error = table(CpuTile { mr: 4, nr: 2, ku: 4 }).check(other).expect_err("another target");
        assert!(error.to_string().contains("cpu-avx512vnni"), "{error}");
    }
}
