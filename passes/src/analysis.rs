//! Analyses: facts about one function, computed when asked for, kept until a pass changes the function.

use quantc_ir::diag::Result;
use quantc_ir::entity::{Entity, LayerId};
use quantc_ir::graph::Graph;
use quantc_ir::module::Module;
use std::any::{Any, TypeId};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A fact about one function.
pub trait Analysis: Any + Send + Sync + Sized {
    /// The name in timing tables.
    const NAME: &'static str;

    /// Computes it for `graph`, a function of `module`.
    fn compute(module: &Module, graph: &Graph) -> Result<Self>;
}

/// A function of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Function {
    /// The entry.
    Main,
    /// A layer.
    Layer(LayerId),
}

impl Function {
    /// The name without `@`.
    pub fn name(self, module: &Module) -> &str {
        match self {
            Function::Main => "main",
            Function::Layer(id) => &module.layers[id].name,
        }
    }

    /// The body.
    pub fn graph(self, module: &Module) -> &Graph {
        match self {
            Function::Main => &module.main,
            Function::Layer(id) => &module.layers[id].graph,
        }
    }

    /// The body, to be changed.
    pub fn graph_mut(self, module: &mut Module) -> &mut Graph {
        match self {
            Function::Main => &mut module.main,
            Function::Layer(id) => &mut module.layers[id].graph,
        }
    }

    fn key(self) -> usize {
        match self {
            Function::Main => 0,
            Function::Layer(id) => id.index() + 1,
        }
    }
}

/// The analyses known at present.
#[derive(Default)]
pub struct Analyses {
    known: BTreeMap<(usize, TypeId), Arc<dyn Any + Send + Sync>>,
}

impl Analyses {
    /// The analysis of `function`, computed unless it is known. The flag says whether it was computed now.
    pub fn get<A: Analysis>(&mut self, module: &Module, function: Function) -> Result<(Arc<A>, bool)> {
        let key = (function.key(), TypeId::of::<A>());
        if let Some(known) = self.known.get(&key).cloned().and_then(|a| a.downcast().ok()) {
            return Ok((known, false));
        }
        let made = Arc::new(A::compute(module, function.graph(module))?);
        self.known.insert(key, made.clone());
        Ok((made, true))
    }

    /// Forgets what is known of `function`, except the analyses in `preserved`.
    pub fn forget(&mut self, function: Function, preserved: &[TypeId]) {
        self.known.retain(|(f, ty), _| *f != function.key() || preserved.contains(ty));
    }

    /// Forgets everything, except the analyses in `preserved`.
    pub fn forget_all(&mut self, preserved: &[TypeId]) {
        self.known.retain(|(_, ty), _| preserved.contains(ty));
    }
}
