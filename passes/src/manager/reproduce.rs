//! Writes what it takes to see a failure again: the function before the failing pass, as a test file.
//!
//! The file has `// run:` and `// target:` lines, and weights are replaced by repeated numbers, so that it depends on
//! nothing else. Where a weight is stored quantized, its codes are all 0.

use super::extract::{extract, with_sources};
use super::{At, Hook};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::module::Module;
use quantc_ir::weights::{F32Bits, WeightDecl, WeightSource};
use std::fs;
use std::path::PathBuf;

/// Writes a file for the first failure.
#[derive(Debug)]
pub struct Reproduce {
    dir: PathBuf,
    before: Option<Module>,
    written: Option<PathBuf>,
}

impl Reproduce {
    /// Writes into the directory `dir`, which is made when it is needed.
    pub fn new(dir: impl Into<PathBuf>) -> Reproduce {
        Reproduce { dir: dir.into(), before: None, written: None }
    }

    /// The file, once one is written.
    pub fn written(&self) -> Option<&PathBuf> {
        self.written.as_ref()
    }

    fn write(&self, at: At<'_>, error: &Diag, text: &str) -> Result<PathBuf> {
        let name = at.pass.info().name;
        let target = at.target.map_or(String::new(), |t| format!("// target: {t}\n"));
        let error: String = error.message.lines().map(|l| format!("// error: {l}\n")).collect();
        let text = format!("// run: {name}{}\n{target}{error}{text}", at.pass.options());
        let path = self.dir.join(format!("{name}.qir"));
        let failed = |e: std::io::Error| Diag::system(format!("cannot write {}: {e}", path.display()));
        fs::create_dir_all(&self.dir).map_err(failed)?;
        fs::write(&path, text).map_err(failed)?;
        Ok(path)
    }
}

impl Hook for Reproduce {
    fn before_pass(&mut self, at: At<'_>, module: &Module) -> Result<()> {
        let alone = if at.is_module() || calls(at, module) {
            with_sources(module, stand_in)
        } else {
            extract(module, at.function, stand_in)
        };
        self.before = Some(alone);
        Ok(())
    }

    fn failed(&mut self, at: At<'_>, _: &Module, error: Diag) -> Diag {
        let Some(before) = self.before.take() else { return error };
        match self.write(at, &error, &quantc_ir::text::print(&before)) {
            Ok(path) => {
                let context = format!("a test file that shows it again was written to {}", path.display());
                self.written = Some(path);
                error.context(context)
            }
            Err(problem) => error.context(format!("no test file could be written: {}", problem.message)),
        }
    }
}

/// Whether the function calls layers, which then belong to the file.
fn calls(at: At<'_>, module: &Module) -> bool {
    at.function.graph(module).ops().any(|(_, n)| matches!(n.op, quantc_ir::ops::Op::Call(_)))
}

/// Bytes that stand for those of a weight. Inline weights are small and stay.
fn stand_in(decl: &WeightDecl) -> WeightSource {
    match (&decl.source, decl.ty.elem.is_float(), decl.ty.stored_bytes().map(usize::try_from)) {
        (WeightSource::Inline(bytes), ..) => WeightSource::Inline(bytes.clone()),
        (WeightSource::Splat(x), ..) => WeightSource::Splat(*x),
        (_, false, Some(Ok(len))) => WeightSource::Inline(vec![0; len]),
        _ => WeightSource::Splat(F32Bits::from(1.0)),
    }
}
