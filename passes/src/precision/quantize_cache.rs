//! Stores the key/value cache as codes of 8 bits.

use crate::calib::stats::{self, Kind};
use crate::pass::prelude::*;
use crate::weights::ScaleTime;
use crate::weights::options::FormatName;
use quantc_ir::formats::{self, Class};
use quantc_ir::module::State;
use quantc_ir::ops::{Attention, CacheAppend, DynamicScale, Quantize};
use quantc_ir::quant::{ScaleRule, Span, scale_for};
use quantc_ir::scheme::{Group, Scheme, Zero};
use quantc_ir::weights::{Recipe, WeightDecl, WeightSource};

pass! {
    /// Stores the key/value cache as codes of 8 bits, with a scale for each token and head.
    ///
    /// Every state that attention alone reads becomes two: one of codes, one of scales. Rows are rounded on their way
    /// into it with scales that are computed when the engine runs, and attention gets the scales as operands. A cache of
    /// 8 bits takes a quarter of the memory and traffic of one in f32.
    ///
    /// With `scale=static` each head has one scale for all tokens, from the largest magnitude that the statistic `cache`
    /// tells; then there are no scales to store, and what is larger saturates.
    ///
    /// ```qir before
    /// state @k : tensor<8x2x4xf32>
    /// state @v : tensor<8x2x4xf32>
    /// %k = cache_append @k, %x
    /// %v = cache_append @v, %x
    /// %y = attention %x, %k, %v {scale=0.5}
    /// ```
    /// ```qir after
    /// %ks = dynamic_scale %x
    /// %kq = quantize %x, %ks
    /// %k = cache_append @k, %kq
    /// %k.scale = cache_append @k.scale, %ks
    /// %vs = dynamic_scale %x
    /// %vq = quantize %x, %vs
    /// %v = cache_append @v, %vq
    /// %v.scale = cache_append @v.scale, %vs
    /// %y = attention %x, %k, %v, %k.scale, %v.scale {scale=0.5}
    /// ```
    "quantize-cache" => pub struct QuantizeCache {
        /// The format of the codes.
        format: FormatName = FormatName(&formats::INT8),
        /// `dynamic`, a scale for each token and head, or `static`, one for each head from calibration.
        scale: ScaleTime = ScaleTime::Dynamic,
    }
    scope: Module, numerics: Requantizes, stats: keeps
}

impl Pass for QuantizeCache {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let group = match self.scale {
            ScaleTime::Dynamic => Group::Token,
            ScaleTime::Static => Group::Axis(1),
        };
        let scheme = Scheme { format: self.format.0, group, zero: Zero::Symmetric, scale: Float::F32 };
        let mut changed = Changed::No;
        let states: Vec<StateId> = cx.module.states.keys().collect();
        for state in states {
            let State { name, ty } = cx.module.states[state].clone();
            if !ty.elem.is_float() {
                continue;
            }
            for (place, graph) in cx.module.graphs() {
                only_attention_reads(graph, state).map_err(|what| {
                    Diag::pipeline(format!("@{name} cannot be stored as codes: {what} in @{place}"))
                        .help("a cache of codes is read by the keys and values of attention only")
                })?;
            }
            let codes = ty.with_elem(ElemTy::Q(scheme));
            let scales = TensorTy { elem: scheme.scale.into(), shape: scheme.scale_shape(&ty.shape)? };
            let source = match self.scale {
                ScaleTime::Dynamic => {
                    let scale_name = fresh_name(cx.module, &format!("{name}.scale"));
                    Source::State(cx.module.states.push(State { name: scale_name, ty: scales.clone() }))
                }
                ScaleTime::Static => match static_scales(cx, state, &name, scheme, &scales)? {
                    Some(weight) => Source::Weight(weight),
                    None => continue,
                },
            };
            cx.module.states[state].ty = codes.clone();
            for graph in cx.module.graphs_mut() {
                convert(graph, (state, &codes), (source, &scales), scheme)?;
            }
            changed = Changed::Yes;
        }
        Ok(changed)
    }

    fn validate(&self) -> Result<()> {
        let format = self.format.0;
        let signed = matches!(format.class, Class::Int { signed: true } | Class::Float { .. });
        if signed && format.bits == 8 {
            return Ok(());
        }
        Err(Diag::pipeline(format!("a cache cannot be rounded to `{format}`"))
            .help("use a signed format of 8 bits: `int8` or `e4m3`"))
    }

    fn needs(&self) -> Vec<Fact> {
        match self.scale {
            ScaleTime::Dynamic => vec![],
            ScaleTime::Static => vec![Fact::Stat(Kind::Cache.name())],
        }
    }
}

/// Where the scales of a cache are.
#[derive(Clone, Copy)]
enum Source {
    /// Beside it.
    State(StateId),
    /// They are constant.
    Weight(WeightId),
}

/// Declares the scales of a state's heads, a weight, from the largest magnitude of what is appended to it; `None` when nothing
/// is.
fn static_scales(
    cx: &mut PassCx<'_>,
    state: StateId,
    name: &str,
    scheme: Scheme,
    scales: &TensorTy,
) -> Result<Option<WeightId>> {
    let own = cx.function;
    let heads = scales.shape.elements().unwrap_or(0) as usize;
    let functions = std::iter::once(Function::Main).chain(cx.module.layers.keys().map(Function::Layer));
    let mut rows = vec![];
    for function in functions.collect::<Vec<_>>() {
        let graph = function.graph(cx.module);
        let Some(value) = value_of(graph, state) else { continue };
        rows.extend(graph.users(value).into_iter().map(|op| (function, graph.node(op).args[1])));
    }
    let mut inputs = vec![];
    for &(function, x) in &rows {
        cx.function = function;
        inputs.push(stats::key(cx, x, Kind::Cache).ok_or_else(|| stats::missing(cx, x, Kind::Cache))?);
    }
    if rows.is_empty() {
        return Ok(None);
    }
    let info = QuantizeCache::INFO;
    let recipe = Recipe { step: info.name, version: info.version, options: scheme.to_string(), inputs };
    let mut largest = vec![0f32; heads];
    if !cx.store.has(&recipe, 1) {
        for (function, x) in rows {
            cx.function = function;
            let seen = stats::heads(cx, x, heads)?;
            largest.iter_mut().zip(seen).for_each(|(most, x)| *most = most.max(x));
        }
    }
    cx.function = own;
    let blobs = cx.store.derive(&recipe, 1, &mut |out| {
        for &most in &largest {
            let (scale, _) = scale_for(Span::symmetric(most), &scheme, ScaleRule::Real)
                .map_err(|d| d.at(Loc::Item(format!("@{name}"))))?;
            out[0].write(&scale.to_le_bytes())?;
        }
        Ok(())
    })?;
    let bytes = cx.store.read_blob(blobs[0])?;
    let found: Vec<String> = bytes
        .as_chunks()
        .0
        .iter()
        .map(|&b| format!("{:.3e}", f32::from_le_bytes(b)))
        .collect();
    cx.remark(format_args!("@{name}"), format_args!("{scheme}: scales {}", found.join(", ")));
    let name = cx.module.fresh_weight_name(&format!("{name}.scale"));
    let source = WeightSource::Blob(blobs[0]);
    Ok(Some(cx.module.weights.push(WeightDecl { name, ty: scales.clone(), source })))
}

/// `wanted`, or with a number behind it when a weight or state is called so already.
fn fresh_name(module: &Module, wanted: &str) -> String {
    let taken = |name: &str| module.state(name).is_some() || module.weights.values().any(|w| w.name == name);
    let numbered = (2..).map(|i| format!("{wanted}.{i}"));
    let mut names = std::iter::once(wanted.to_string()).chain(numbered);
    names.find(|name| !taken(name)).unwrap_or_else(|| wanted.to_string())
}

/// What else than attention over its rows a graph does with a state.
fn only_attention_reads(graph: &Graph, state: StateId) -> std::result::Result<(), String> {
    let Some(value) = value_of(graph, state) else { return Ok(()) };
    for op in graph.users(value) {
        let append = graph.node(op);
        if append.op.is::<CacheAppend>().is_none() || append.args[1] == value {
            return Err(format!("`{}` reads it", append.op.name()));
        }
        if graph.is_result(append.result) {
            return Err("its rows are a result".into());
        }
        for user in graph.users(append.result) {
            let user = graph.node(user);
            let reads = |i: usize| user.args.get(i) == Some(&append.result);
            if user.op.is::<Attention>().is_none()
                || (0..user.args.len()).any(|i| reads(i) && ![1, 2].contains(&i))
            {
                return Err(format!("`{}` reads its rows", user.op.name()));
            }
        }
    }
    Ok(())
}

fn value_of(graph: &Graph, state: StateId) -> Option<ValueId> {
    graph.values().find(|(_, v)| v.def == Def::State(state)).map(|(id, _)| id)
}

/// Rounds what `graph` appends to a state, appends the scales beside it and gives them to attention.
fn convert(
    graph: &mut Graph,
    (state, codes): (StateId, &TensorTy),
    (source, scales): (Source, &TensorTy),
    to: Scheme,
) -> Result<()> {
    let Some(value) = value_of(graph, state) else { return Ok(()) };
    graph.value_mut(value).ty = codes.clone();
    let kept = match source {
        Source::State(scale) => graph.state(scale, scales),
        Source::Weight(scale) => graph.weight(scale, scales),
    };
    for op in graph.users(value) {
        let at = graph.position(op).ok_or_else(|| Diag::bug("a user of a state is not in the program"))?;
        let (x, all) = (graph.node(op).args[1], graph.node(op).result);
        let s = match source {
            Source::State(_) => Some(graph.insert_inferred(at, DynamicScale { to }, &[x], None)?),
            Source::Weight(_) => None,
        };
        let at = if s.is_some() { at + 1 } else { at };
        let q = graph.insert_inferred(at, Quantize { to }, &[x, s.unwrap_or(kept)], None)?;
        graph.node_mut(op).args[1] = q;
        graph.value_mut(all).ty.elem = codes.elem;
        let all_scales = match s {
            Some(s) => graph.insert_inferred(at + 2, CacheAppend {}, &[kept, s], None)?,
            None => kept,
        };
        for user in graph.users(all) {
            let attention = graph.node_mut(user);
            for i in [1, 2] {
                if attention.args[i] == all {
                    attention.args[i + 2] = all_scales;
                }
            }
        }
    }
    Ok(())
}
