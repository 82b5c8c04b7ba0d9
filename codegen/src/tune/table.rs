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
