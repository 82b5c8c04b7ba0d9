//! Runs a checked pipeline.
//!
//! What holds:
//! - Passes run one after the other, layers in the order of the module, so that names, remarks and weights do not depend
//!   on the number of threads; heavy passes use threads inside.
//! - A pass that fails, panics or leaves a module that does not verify ends the run with an error that names it.
//! - Everything besides running passes is a [`Hook`]: verification, printing, memory, reproducers.
//!
//! The time of everything that ran is in [`Report::timing`], what passes told in [`Report::remarks`].

mod extract;
pub mod memory;
pub mod print_ir;
pub mod remarks;
pub mod reproduce;
pub mod timing;
pub mod verify_each;

pub use memory::Memory;
pub use print_ir::{PrintIr, When};
pub use remarks::Remarks;
pub use reproduce::Reproduce;
pub use timing::Timing;
pub use verify_each::VerifyEach;

use crate::analysis::Function;
use crate::calib::stats;
use crate::pass::{Changed, Env, Pass, PassCx, PassState, Scope, Session, Stats};
use crate::pipeline::{Checked, Step};
use quantc_ir::diag::{Diag, Kind, Result, near_misses};
use quantc_ir::module::Module;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Rounds of `repeat(..)`, at most.
const ROUNDS: usize = 32;

/// A run of one pass on one function.
#[derive(Clone, Copy)]
pub struct At<'a> {
    /// The pass.
    pub pass: &'a dyn Pass,
    /// The function; `main` for a pass on the module.
    pub function: Function,
    /// The name of the run's target, when it has one.
    pub target: Option<&'a str>,
}

impl At<'_> {
    /// Whether the pass runs on the whole module.
    pub fn is_module(&self) -> bool {
        self.pass.info().scope == Scope::Module
    }
}

/// A layer among those that a group of passes runs on.
#[derive(Clone, Debug)]
pub struct LayerAt {
    /// Its name.
    pub name: String,
    /// Its place among the layers, from 0.
    pub index: usize,
    /// How many layers there are.
    pub total: usize,
}

/// Looks at a run.
pub trait Hook {
    /// Before a pass runs.
    fn before_pass(&mut self, _: At<'_>, _: &Module) -> Result<()> {
        Ok(())
    }

    /// After a pass ran.
    fn after_pass(&mut self, _: At<'_>, _: &Module, _: Changed) -> Result<()> {
        Ok(())
    }

    /// After a group of passes ran on a layer.
    fn after_layer(&mut self, _: &LayerAt) {}

    /// When a pass, or a hook after it, failed: may add to the error. The module is as the pass left it.
    fn failed(&mut self, _: At<'_>, _: &Module, error: Diag) -> Diag {
        error
    }
}

/// What a run leaves besides the module.
#[derive(Default)]
pub struct Report {
    /// What passes told.
    pub remarks: Remarks,
    /// Where the time went.
    pub timing: Timing,
    /// What passes left for later ones.
    pub session: Session,
}

/// Runs `pipeline` on `module`. The order of `hooks` is kept, so a hook that verifies belongs before one that prints.
///
/// `session` is what the program gives the passes, for example calibration data.
pub fn run(
    module: &mut Module,
    pipeline: &Checked,
    env: Env<'_>,
    session: Session,
    hooks: &mut [&mut dyn Hook],
) -> Result<Report> {
    let state = PassState { session, ..PassState::default() };
    let mut manager = Manager { module, env, hooks, state, timing: Timing::default() };
    manager.steps(&pipeline.steps, None)?;
    let Manager { state, timing, .. } = manager;
    if !pipeline.steps.is_empty() {
        let so_far = module.pipeline.take().map_or(String::new(), |text| text + ", ");
        module.pipeline = Some(format!("{so_far}{pipeline}"));
    }
    Ok(Report { remarks: Remarks(state.remarks), timing, session: state.session })
}

impl Checked {
    /// The pipeline up to the first pass called `name`, which still runs on all its layers.
    pub fn stopped_after(mut self, name: &str) -> Result<Checked> {
        fn cut(steps: &mut Vec<Step>, name: &str) -> bool {
            let stops = |step: &mut Step| match step {
                Step::Pass(pass) => pass.info().name == name,
                Step::Layers(inner) | Step::Repeat(inner) => cut(inner, name),
            };
            let end = steps.iter_mut().position(stops);
            steps.truncate(end.map_or(steps.len(), |i| i + 1));
            end.is_some()
        }
        if cut(&mut self.steps, name) {
            return Ok(self);
        }
        let names: Vec<&str> = self.passes().iter().map(|p| p.info().name).collect();
        let diag = Diag::pipeline(format!("there is no pass `{name}` in the pipeline to stop after"));
        Err(match near_misses(name, names)[..] {
            [] => diag,
            ref near => diag.help(format!("did you mean {}?", crate::pass::quoted(near))),
        })
    }
}

struct Manager<'a, 'h, 'k> {
    module: &'a mut Module,
    env: Env<'a>,
    hooks: &'h mut [&'k mut dyn Hook],
    state: PassState,
    timing: Timing,
}

impl Manager<'_, '_, '_> {
    fn steps(&mut self, steps: &[Step], layer: Option<Function>) -> Result<Changed> {
        let mut changed = Changed::No;
        for (i, step) in steps.iter().enumerate() {
            let label = match step {
                Step::Pass(pass) => pass.info().name,
                Step::Layers(_) => "layers",
                Step::Repeat(_) => "repeat",
            };
            self.timing.enter(i, label);
            let start = Instant::now();
            let done = match step {
                Step::Pass(pass) => self.pass(&**pass, layer.unwrap_or(Function::Main)),
                Step::Layers(inner) => self.layers(inner),
                Step::Repeat(inner) => self.repeat(inner, layer),
            };
            self.timing.leave(start.elapsed());
            changed = changed | done?;
        }
        Ok(changed)
    }

    fn layers(&mut self, steps: &[Step]) -> Result<Changed> {
        let mut functions: Vec<Function> = self.module.layers.keys().map(Function::Layer).collect();
        if functions.is_empty() {
            functions.push(Function::Main);
        }
        let mut changed = Changed::No;
        for (index, &function) in functions.iter().enumerate() {
            changed = changed | self.steps(steps, Some(function))?;
            stats::release(&mut self.state.session, function);
            let name = function.name(self.module).to_string();
            let at = LayerAt { name, index, total: functions.len() };
            self.hooks.iter_mut().for_each(|h| h.after_layer(&at));
        }
        Ok(changed)
    }

    fn repeat(&mut self, steps: &[Step], layer: Option<Function>) -> Result<Changed> {
        let mut changed = Changed::No;
        for _ in 0..ROUNDS {
            if self.steps(steps, layer)? == Changed::No {
                return Ok(changed);
            }
            changed = Changed::Yes;
        }
        let names: Vec<String> = steps.iter().map(Step::to_string).collect();
        let text = format!("repeat({}) still changes something after {ROUNDS} rounds", names.join(", "));
        Err(Diag::pipeline(text).help("passes in `repeat` must come to an end; leave one of them out"))
    }

    fn pass(&mut self, pass: &dyn Pass, function: Function) -> Result<Changed> {
        let at = At { pass, function, target: self.env.target.map(|t| t.name) };
        self.ready(at).and_then(|()| self.run(at)).map_err(|e| self.failed(at, e))
    }

    fn ready(&mut self, at: At<'_>) -> Result<()> {
        if self.env.interrupt.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
            return Err(Diag::system("interrupted"));
        }
        self.hooks.iter_mut().try_for_each(|h| h.before_pass(at, self.module))
    }

    fn run(&mut self, at: At<'_>) -> Result<Changed> {
        let At { pass, function, .. } = at;
        let info = pass.info();
        let mut cx = PassCx::new(self.module, function, self.env, pass, &mut self.state);
        // A panic is a bug in the pass. What it leaves half done is not used again: the run ends.
        let changed = catch_unwind(AssertUnwindSafe(|| pass.run(&mut cx))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("without a message");
            Err(Diag::bug(format!("the pass panicked: {text}")))
        })?;
        for (name, time) in std::mem::take(&mut self.state.spans) {
            self.timing.part(&name, time);
        }
        let preserved = std::mem::take(&mut self.state.preserved);
        if changed == Changed::Yes {
            match info.scope {
                Scope::Layer => self.state.analyses.forget(function, &preserved),
                Scope::Module => self.state.analyses.forget_all(&preserved),
            }
            if info.stats == Stats::Drops {
                self.drop_stats(at);
            }
        }
        self.hooks.iter_mut().try_for_each(|h| h.after_pass(at, self.module, changed))?;
        Ok(changed)
    }

    fn drop_stats(&mut self, at: At<'_>) {
        if at.is_module() {
            self.module.calibration.clear();
            self.state.session.forget_all();
        } else {
            let prefix = format!("{}.", at.function.name(self.module));
            self.module.calibration.retain(|key, _| !key.starts_with(&prefix));
            self.state.session.forget(at.function);
        }
    }

    fn failed(&mut self, at: At<'_>, error: Diag) -> Diag {
        let name = at.pass.info().name;
        let on =
            if at.is_module() { "the module".into() } else { format!("@{}", at.function.name(self.module)) };
        let mut error = error.context(format!("running `{name}` on {on}"));
        // An interruption and a full disk say nothing about the pass.
        if error.kind != Kind::System {
            for hook in self.hooks.iter_mut() {
                error = hook.failed(at, self.module, error);
            }
        }
        error
    }
}
