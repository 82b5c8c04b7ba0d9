//! What a pass may use while it runs.

use super::{Numerics, OptionInfo, Pass, PassInfo};
use crate::analysis::{Analyses, Analysis, Function};
use crate::told::Told;
use quantc_ir::diag::{Diag, Loc, Result};
use quantc_ir::entity::{OpId, ValueId, WeightId};
use quantc_ir::graph::Graph;
use quantc_ir::module::Module;
use quantc_ir::ops::Real;
use quantc_ir::target::{Backend, TargetDesc};
use quantc_ir::text::fields::Fields;
use quantc_ir::ty::TensorTy;
use quantc_ir::weights::{BlobWriter, Recipe, Store, WeightDecl, WeightSource, WeightView};
use std::any::{Any, TypeId};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What all passes of a run share.
#[derive(Clone, Copy)]
pub struct Env<'a> {
    /// Where weights are read and derived ones go.
    pub store: &'a Store,
    /// The target, when one is chosen.
    pub target: Option<&'a TargetDesc>,
    /// The code generator for the target, when one is linked in.
    pub backend: Option<&'a dyn Backend>,
    /// The most that rewrites which a pass chooses by itself may do to results. Naming a pass in the pipeline is
    /// consent to what that pass declares.
    pub numerics: Numerics,
    /// Threads that heavy passes may use. Results do not depend on it.
    pub threads: usize,
    /// Bytes that a pass should hold at most at one time.
    pub budget: usize,
    /// The seed of everything random.
    pub seed: u64,
    /// Set from outside to stop the run.
    pub interrupt: Option<&'a AtomicBool>,
}

impl<'a> Env<'a> {
    /// The defaults: no target, exact rewrites only, one thread, a quarter of a GiB.
    pub fn new(store: &'a Store) -> Env<'a> {
        Env {
            store,
            target: None,
            backend: None,
            numerics: Numerics::Exact,
            threads: 1,
            budget: 256 << 20,
            seed: 0,
            interrupt: None,
        }
    }

    /// For the target that `backend` compiles for.
    pub fn with_backend(mut self, backend: &'a dyn Backend) -> Env<'a> {
        self.target = Some(backend.target());
        self.backend = Some(backend);
        self
    }
}

/// Something a pass tells about what it did.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Remark {
    /// The pass.
    pub pass: &'static str,
    /// What it is about, e.g. `%n in @l0`.
    pub place: String,
    /// The remark: one clause without a final stop.
    pub text: String,
    /// The same in fields, for reports.
    #[serde(skip)]
    pub told: Option<Told>,
}

/// Things that passes leave for later passes of the same run, one for each type: calibration data, executors. And
/// things about one function, one for each type and function: statistics too large for the module.
#[derive(Default)]
pub struct Session {
    items: BTreeMap<TypeId, Item>,
    about: BTreeMap<(Function, TypeId), Item>,
}

type Item = Box<dyn Any + Send>;

impl Session {
    /// Leaves an item, replacing the one of its type.
    pub fn put<T: Any + Send>(&mut self, item: T) {
        self.items.insert(TypeId::of::<T>(), Box::new(item));
    }

    /// The item of this type.
    pub fn get<T: Any + Send>(&self) -> Option<&T> {
        self.items.get(&TypeId::of::<T>())?.downcast_ref()
    }

    /// The item of this type, to be changed.
    pub fn get_mut<T: Any + Send>(&mut self) -> Option<&mut T> {
        self.items.get_mut(&TypeId::of::<T>())?.downcast_mut()
    }

    /// Takes the item of this type out.
    pub fn take<T: Any + Send>(&mut self) -> Option<T> {
        Some(*self.items.remove(&TypeId::of::<T>())?.downcast().ok()?)
    }

    /// Leaves an item about a function. It is dropped when a pass that drops statistics changes the function.
    pub fn put_about<T: Any + Send>(&mut self, function: Function, item: T) {
        self.about.insert((function, TypeId::of::<T>()), Box::new(item));
    }

    /// The item of this type about a function.
    pub fn about<T: Any + Send>(&self, function: Function) -> Option<&T> {
        self.about.get(&(function, TypeId::of::<T>()))?.downcast_ref()
    }

    /// The item of this type about a function, to be changed.
    pub fn about_mut<T: Any + Send>(&mut self, function: Function) -> Option<&mut T> {
        self.about.get_mut(&(function, TypeId::of::<T>()))?.downcast_mut()
    }

    /// Takes the item of this type about a function out.
    pub fn take_about<T: Any + Send>(&mut self, function: Function) -> Option<T> {
        Some(*self.about.remove(&(function, TypeId::of::<T>()))?.downcast().ok()?)
    }

    /// Drops everything about a function.
    pub fn forget(&mut self, function: Function) {
        self.about.retain(|(f, _), _| *f != function);
    }

    /// Drops everything about functions.
    pub fn forget_all(&mut self) {
        self.about.clear();
    }
}

/// What outlives a single pass: analyses, remarks, what passes leave for each other.
#[derive(Default)]
pub struct PassState {
    /// The analyses known at present.
    pub analyses: Analyses,
    /// All remarks so far.
    pub remarks: Vec<Remark>,
    /// What passes leave for each other.
    pub session: Session,
    /// Time spent in the parts of the present pass, in order of first appearance.
    pub spans: Vec<(String, Duration)>,
    /// The analyses that the present pass keeps true.
    pub preserved: Vec<TypeId>,
}

/// Writes one blob for each derived weight from views of the inputs.
pub type Derive<'f> = dyn FnMut(&[WeightView<'_>], &mut [BlobWriter]) -> Result<()> + 'f;

/// What a pass may use while it runs.
pub struct PassCx<'a> {
    /// The module.
    pub module: &'a mut Module,
    /// The function a layer pass runs on; `main` for passes on the module.
    pub function: Function,
    /// What all passes of the run share.
    pub env: Env<'a>,
    /// The store; the same as in `env`.
    pub store: &'a Store,
    /// The target; the same as in `env`.
    pub target: Option<&'a TargetDesc>,
    /// The code generator; the same as in `env`.
    pub backend: Option<&'a dyn Backend>,
    info: &'static PassInfo,
    /// The options that decide what is derived: all but name filters.
    options: String,
    state: &'a mut PassState,
}

impl<'a> PassCx<'a> {
    /// The context of one run of `pass`.
    pub fn new(
        module: &'a mut Module,
        function: Function,
        env: Env<'a>,
        pass: &dyn Pass,
        state: &'a mut PassState,
    ) -> PassCx<'a> {
        let Env { store, target, backend, .. } = env;
        let info = pass.info();
        let mut fields = Fields::parse(&pass.options()).unwrap_or_default();
        let filters = info.options.iter().filter(|o| o.ty.contains("Pattern")).map(OptionInfo::name);
        let filters: Vec<String> = filters.collect();
        fields.entries.retain(|e| !filters.contains(&e.key));
        let options = fields.to_string();
        PassCx { module, function, env, store, target, backend, info, options, state }
    }

    /// The function it runs on.
    pub fn graph(&self) -> &Graph {
        self.function.graph(self.module)
    }

    /// The function it runs on, to be changed.
    pub fn graph_mut(&mut self) -> &mut Graph {
        self.function.graph_mut(self.module)
    }

    /// The name of the function, without `@`.
    pub fn function_name(&self) -> &str {
        self.function.name(self.module)
    }

    /// The pass's name.
    pub fn pass(&self) -> &'static str {
        self.info.name
    }

    /// `%n in @l0`; a value without a name is called by its op.
    pub fn place(&self, v: ValueId) -> String {
        let (graph, function) = (self.graph(), self.function_name());
        match (graph.as_weight(v), &graph.value(v).name, graph.def(v)) {
            (Some(w), ..) => format!("@{}", self.module.weights[w].name),
            (_, Some(name), _) => format!("%{name} in @{function}"),
            (_, None, Some((_, node))) => format!("`{}` in @{function}", node.op.name()),
            _ => format!("@{function}"),
        }
    }

    /// The place of an op, for errors.
    pub fn loc(&self, op: OpId) -> Loc {
        Loc::Item(self.place(self.graph().node(op).result))
    }

    /// Tells about what was done at `place`.
    pub fn remark(&mut self, place: impl fmt::Display, text: fmt::Arguments<'_>) {
        let (place, text) = (place.to_string(), text.to_string());
        self.state.remarks.push(Remark { pass: self.info.name, place, text, told: None });
    }

    /// As [`remark`](Self::remark), with the same in fields, for reports.
    pub fn tell(&mut self, place: impl fmt::Display, text: fmt::Arguments<'_>, told: Told) {
        let (place, text) = (place.to_string(), text.to_string());
        let pass = self.info.name;
        self.state.remarks.push(Remark { pass, place, text, told: Some(told) });
    }

    /// An analysis of the function, computed unless it is known.
    pub fn analysis<A: Analysis>(&mut self) -> Result<Arc<A>> {
        let start = Instant::now();
        let (analysis, made) = self.state.analyses.get::<A>(self.module, self.function)?;
        if made {
            self.add_span(A::NAME, start.elapsed());
        }
        Ok(analysis)
    }

    /// Says that what this pass changes leaves the analysis true.
    pub fn preserve<A: Analysis>(&mut self) {
        self.state.preserved.push(TypeId::of::<A>());
    }

    /// Things that passes leave for each other.
    pub fn session(&mut self) -> &mut Session {
        &mut self.state.session
    }

    /// Adds time to a named part of the pass, for the timing tree.
    pub fn add_span(&mut self, name: &str, time: Duration) {
        match self.state.spans.iter_mut().find(|(n, _)| n == name) {
            Some((_, total)) => *total += time,
            None => self.state.spans.push((name.into(), time)),
        }
    }

    /// Runs a named part of the pass and counts its time.
    pub fn timed<T>(&mut self, name: &str, f: impl FnOnce(&mut PassCx<'a>) -> T) -> T {
        let start = Instant::now();
        let out = f(self);
        self.add_span(name, start.elapsed());
        out
    }

    /// An error when the run is to stop. Long passes ask between tensors.
    pub fn check_interrupt(&self) -> Result<()> {
        match self.env.interrupt {
            Some(flag) if flag.load(Ordering::Relaxed) => Err(Diag::system("interrupted")),
            _ => Ok(()),
        }
    }

    /// A statistic of a value of the function, when it is known.
    pub fn stat(&self, v: ValueId, statistic: &str) -> Option<&[Real]> {
        let name = self.graph().value(v).name.as_ref()?;
        let key = format!("{}.{name}.{statistic}", self.function_name());
        self.module.calibration.get(&key).map(Vec::as_slice)
    }

    /// Sets a statistic of a value of the function, which must have a name.
    pub fn set_stat(&mut self, v: ValueId, statistic: &str, numbers: Vec<Real>) -> Result<()> {
        let name = self.graph().value(v).name.clone();
        let name = name.ok_or_else(|| Diag::bug("a statistic of a value without a name"))?;
        let key = format!("{}.{name}.{statistic}", self.function_name());
        self.module.calibration.insert(key, numbers);
        Ok(())
    }

    /// Forgets a statistic of a value of the function.
    pub fn drop_stat(&mut self, v: ValueId, statistic: &str) {
        if let Some(name) = self.graph().value(v).name.clone() {
            let key = format!("{}.{name}.{statistic}", self.function_name());
            self.module.calibration.remove(&key);
        }
    }

    /// The value of a weight in the function.
    pub fn weight_value(&mut self, w: WeightId) -> ValueId {
        let ty = self.module.weights[w].ty.clone();
        self.graph_mut().weight(w, &ty)
    }

    /// Declares a weight derived from others. See [`PassCx::derive_weights`].
    pub fn derive_weight(
        &mut self,
        name: &str,
        ty: TensorTy,
        inputs: &[WeightId],
        more: &str,
        f: &mut dyn FnMut(&[WeightView<'_>], &mut BlobWriter) -> Result<()>,
    ) -> Result<WeightId> {
        let mut first = |views: &[WeightView<'_>], out: &mut [BlobWriter]| f(views, &mut out[0]);
        Ok(self.derive_weights(&[(name, ty)], inputs, more, &mut first)?[0])
    }

    /// Declares weights derived from others: `f` reads the views of `inputs` and writes one blob for each of `outputs`,
    /// unless the same pass with the same options and `more` has done so before on the same inputs.
    ///
    /// `more` is everything besides options and inputs that decides the bytes. The names are made fresh.
    pub fn derive_weights(
        &mut self,
        outputs: &[(&str, TensorTy)],
        inputs: &[WeightId],
        more: &str,
        f: &mut Derive<'_>,
    ) -> Result<Vec<WeightId>> {
        self.check_interrupt()?;
        let (store, weights) = (self.store, &self.module.weights);
        let digests = inputs.iter().map(|&w| store.digest(weights, w)).collect::<Result<_>>()?;
        let types: Vec<String> = outputs.iter().map(|(_, ty)| ty.to_string()).collect();
        let options = format!("{} {more} -> {}", self.options, types.join(", "));
        let recipe = Recipe { step: self.info.name, version: self.info.version, options, inputs: digests };
        let blobs = store.derive(&recipe, outputs.len(), &mut |out| {
            let views = inputs.iter().map(|&w| store.view(weights, w)).collect::<Result<Vec<_>>>()?;
            f(&views, out)
        })?;
        let mut made = vec![];
        for ((name, ty), blob) in outputs.iter().zip(blobs) {
            let name = self.module.fresh_weight_name(name);
            let source = WeightSource::Blob(blob);
            made.push(self.module.weights.push(WeightDecl { name, ty: ty.clone(), source }));
        }
        Ok(made)
    }
}
