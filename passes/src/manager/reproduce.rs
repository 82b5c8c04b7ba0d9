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
use std::io::Write;
use std::path::PathBuf;

/// Most bytes of codes that a file may hold.
const MOST_CODES: u64 = 16 << 20;

/// Files of one name that are kept; the first is overwritten when there are as many.
const MOST_FILES: usize = 100;

/// Writes a file for the first failure.
#[derive(Debug)]
pub struct Reproduce {
    dir: PathBuf,
    /// The module before the pass that runs; its weights are only named, so it is small.
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
        let failed =
            |e: std::io::Error| Diag::system(format!("cannot write into {}: {e}", self.dir.display()));
        fs::create_dir_all(&self.dir).map_err(failed)?;
        let first = self.dir.join(format!("{name}.qir"));
        let others = (2..=MOST_FILES).map(|n| self.dir.join(format!("{name}-{n}.qir")));
        for path in std::iter::once(first.clone()).chain(others) {
            match fs::File::create_new(&path) {
                Ok(mut file) => {
                    file.write_all(text.as_bytes()).map_err(failed)?;
                    return Ok(path);
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(failed(e)),
            }
        }
        fs::write(&first, text).map_err(failed)?;
        Ok(first)
    }
}

/// What the file says of the module before the pass.
fn alone(at: At<'_>, before: &Module) -> Result<Module> {
    let whole = at.is_module() || calls(at, before);
    let codes = |module: &Module| -> u64 {
        let stored = module.weights.values().filter(|w| !w.ty.elem.is_float());
        stored.map(|w| w.ty.stored_bytes().unwrap_or(u64::MAX)).fold(0, u64::saturating_add)
    };
    let keep = |decl: &WeightDecl| decl.source.clone();
    let bytes = if whole { codes(before) } else { codes(&extract(before, at.function, keep)) };
    if bytes > MOST_CODES {
        return Err(Diag::system(format!("it would hold {bytes} bytes of codes")));
    }
    Ok(if whole { with_sources(before, stand_in) } else { extract(before, at.function, stand_in) })
}

impl Hook for Reproduce {
    fn before_pass(&mut self, _: At<'_>, module: &Module) -> Result<()> {
        self.before = Some(module.clone());
        Ok(())
    }

    fn failed(&mut self, at: At<'_>, _: &Module, error: Diag) -> Diag {
        let Some(before) = self.before.take() else { return error };
        let written = alone(at, &before).and_then(|m| self.write(at, &error, &quantc_ir::text::print(&m)));
        match written {
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
