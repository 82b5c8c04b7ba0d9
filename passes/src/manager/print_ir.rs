//! Prints functions while passes run, in a form that can be compared line by line.

use super::{At, Hook};
use crate::analysis::Function;
use crate::pass::Changed;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::module::Module;
use quantc_ir::text::{print_graph, print_layer};
use std::collections::BTreeMap;
use std::io::Write;

/// After which passes something is printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum When {
    /// After each run of each pass.
    Always,
    /// After each run of these passes.
    Named(Vec<String>),
    /// After each run that changed the text of a function: only what changed.
    Change,
}

/// Prints functions to `out`.
pub struct PrintIr<'w> {
    when: When,
    out: Box<dyn Write + 'w>,
    known: BTreeMap<String, String>,
}

impl<'w> PrintIr<'w> {
    /// Prints to `out`.
    pub fn new(when: When, out: Box<dyn Write + 'w>) -> PrintIr<'w> {
        PrintIr { when, out, known: BTreeMap::new() }
    }
}

impl Hook for PrintIr<'_> {
    fn before_pass(&mut self, at: At<'_>, module: &Module) -> Result<()> {
        if self.when == When::Change {
            self.known = texts(at, module);
        }
        Ok(())
    }

    fn after_pass(&mut self, at: At<'_>, module: &Module, changed: Changed) -> Result<()> {
        let name = at.pass.info().name;
        let wanted = match &self.when {
            When::Always => true,
            When::Named(names) => names.iter().any(|n| n == name),
            When::Change => changed == Changed::Yes,
        };
        if !wanted {
            return Ok(());
        }
        for (function, text) in texts(at, module) {
            if self.when == When::Change && self.known.get(&function) == Some(&text) {
                continue;
            }
            let head = format!("// after {name}{} on @{function}", at.pass.options());
            write!(self.out, "{head}\n{text}")
                .map_err(|e| Diag::system(format!("cannot print the module: {e}")))?;
        }
        Ok(())
    }
}

/// The texts of the functions that a pass may change, by name.
fn texts(at: At<'_>, module: &Module) -> BTreeMap<String, String> {
    let mut functions = vec![at.function];
    if at.is_module() {
        functions.extend(module.layers.keys().map(Function::Layer));
    }
    let text = |f: Function| match f {
        Function::Main => print_graph(module, &module.main),
        Function::Layer(id) => print_layer(module, id),
    };
    functions.into_iter().map(|f| (f.name(module).to_string(), text(f))).collect()
}
