//! Verifies the module after each pass that changed it.

use super::{At, Hook};
use crate::pass::Changed;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::module::Module;
use quantc_ir::verify::verify;

/// Ends the run after a pass that leaves something broken: a bug of that pass.
#[derive(Clone, Copy, Debug, Default)]
pub struct VerifyEach;

impl Hook for VerifyEach {
    fn after_pass(&mut self, at: At<'_>, module: &Module, changed: Changed) -> Result<()> {
        if changed == Changed::No {
            return Ok(());
        }
        verify(module).map_err(|problems| {
            let listing = problems.show(module);
            Diag::bug(format!("`{}` left a module that does not verify:\n{listing}", at.pass.info().name))
        })
    }
}
