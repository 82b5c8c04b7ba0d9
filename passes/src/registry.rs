//! The registry: the passes that pipelines may name.

use crate::pass::PassInfo;
use quantc_ir::diag::{Diag, Result, near_misses};

/// The passes that pipelines may name: the built-in ones, and those that a program adds.
#[derive(Clone, Debug)]
pub struct Registry {
    passes: Vec<&'static PassInfo>,
}

impl Registry {
    /// The passes of this crate.
    pub fn builtin() -> Registry {
        Registry { passes: crate::FAMILIES.iter().copied().flatten().copied().collect() }
    }

    /// Adds a pass; one of the same name is replaced.
    pub fn with(mut self, pass: &'static PassInfo) -> Registry {
        self.passes.retain(|p| p.name != pass.name);
        self.passes.push(pass);
        self
    }

    /// The pass called `name`.
    pub fn find(&self, name: &str) -> Option<&'static PassInfo> {
        self.passes.iter().copied().find(|p| p.name == name)
    }

    /// The pass called `name`, or an error that lists names like it.
    pub fn get(&self, name: &str) -> Result<&'static PassInfo> {
        self.find(name).ok_or_else(|| {
            let diag = Diag::pipeline(format!("unknown pass `{name}`"));
            match near_misses(name, self.passes.iter().map(|p| p.name))[..] {
                [] => diag.help("`quantc passes` lists all passes"),
                ref near => diag.help(format!("did you mean {}?", crate::pass::quoted(near))),
            }
        })
    }

    /// All passes, in the order in which they were listed.
    pub fn passes(&self) -> impl Iterator<Item = &'static PassInfo> + '_ {
        self.passes.iter().copied()
    }
}

impl Default for Registry {
    fn default() -> Registry {
        Registry::builtin()
    }
}
