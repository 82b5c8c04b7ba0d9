//! Memory in use after each pass, and the peak of the process.

use super::{At, Hook};
use crate::pass::Changed;
use quantc_ir::diag::Result;
use quantc_ir::module::Module;

/// Measures what is resident during each pass, where the system tells it: what it holds in the end, and the peak of the process
/// when that was reached in it. Passes that hold more for a moment, but less than an earlier one did, show less than they took.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    largest: Vec<(&'static str, u64)>,
    /// The peak before the present pass.
    before: u64,
}

impl Memory {
    /// The most bytes that were seen resident in each pass, in order of first run.
    pub fn largest(&self) -> &[(&'static str, u64)] {
        &self.largest
    }

    /// The most bytes that were resident at any time since the process started.
    pub fn peak() -> Option<u64> {
        status("VmHWM:")
    }
}

impl Hook for Memory {
    fn before_pass(&mut self, _: At<'_>, _: &Module) -> Result<()> {
        self.before = Memory::peak().unwrap_or(0);
        Ok(())
    }

    fn after_pass(&mut self, at: At<'_>, _: &Module, _: Changed) -> Result<()> {
        let Some(now) = status("VmRSS:") else { return Ok(()) };
        let now = Memory::peak().filter(|&peak| peak > self.before).unwrap_or(now);
        let name = at.pass.info().name;
        match self.largest.iter_mut().find(|(n, _)| *n == name) {
            Some((_, most)) => *most = now.max(*most),
            None => self.largest.push((name, now)),
        }
        Ok(())
    }
}

/// A figure of the process in bytes; the system gives it in KiB.
fn status(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}
