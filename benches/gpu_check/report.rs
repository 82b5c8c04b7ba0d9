//! Tables that are printed row by row, and what their rows say of right and wrong.

use crate::device::Fault;
use crate::parts::{LOST, Part, Verdict};
use quantc::ir::diag::Result;

/// The mark of a row whose results are wrong.
pub const WRONG: &str = "**wrong**";

/// The mark of a row that is slower than wanted.
pub const MISSED: &str = "**missed**";

/// A table of a part. Rows are printed as they come, so that what was found is there when something hangs.
pub struct Table<'p, 'f> {
    part: &'p Part<'f>,
    verdict: Verdict,
    late: usize,
}

impl<'p, 'f> Table<'p, 'f> {
    /// Begins a table with a note above it; a part that goes on after it was cut off does not say that again.
    pub fn new(part: &'p Part<'f>, title: &str, note: &str, columns: &[&str]) -> Table<'p, 'f> {
        if part.from == 0 {
            println!("## {title}\n");
            if !note.is_empty() {
                println!("{note}\n");
            }
            println!("| {} |\n|{}", columns.join(" | "), "---|".repeat(columns.len()));
        }
        Table { part, verdict: Verdict::Right, late: 0 }
    }

    /// Makes the rows of this number; each is printed once it is told. A driver that refuses something ends the process: the
    /// part goes on after this number in another one.
    pub fn each(
        &mut self,
        number: usize,
        rows: impl FnOnce(&mut dyn FnMut(Vec<String>)) -> std::result::Result<(), Fault>,
    ) -> Result<()> {
        if number < self.part.from {
            return Ok(());
        }
        if self.part.over() {
            self.late += 1;
            return Ok(());
        }
        self.part.reached(number)?;
        let verdict = &mut self.verdict;
        let mut say = |cells: Vec<String>| {
            if cells.iter().any(|c| c.contains(WRONG)) {
                *verdict = (*verdict).max(Verdict::Wrong);
            } else if cells.iter().any(|c| c.contains(MISSED)) {
                *verdict = (*verdict).max(Verdict::Missed);
            }
            println!("| {} |", cells.join(" | "));
        };
        match rows(&mut say) {
            Ok(()) => {}
            Err(Fault::Wrong(what)) => {
                println!("| row {number} | {what} | {WRONG} |");
                self.verdict = Verdict::Wrong;
            }
            Err(Fault::Lost(what)) => {
                println!("| row {number} | {what} | {WRONG} |");
                std::process::exit(LOST);
            }
        }
        Ok(())
    }

    /// Says what is not in the table, and why.
    pub fn skipped(&mut self, what: &str) {
        println!("\n{what}");
    }

    /// Ends it.
    pub fn finish(self) -> Verdict {
        println!();
        match self.late {
            0 => self.verdict,
            late => {
                println!("{late} more rows were left out: the part's time was over.\n");
                self.verdict.max(Verdict::Missed)
            }
        }
    }
}

/// A share in percent.
pub fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Whether what is wanted was met, as a cell.
pub fn judged(met: bool) -> String {
    if met { "met".into() } else { MISSED.into() }
}
