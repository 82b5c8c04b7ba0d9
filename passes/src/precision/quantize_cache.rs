//! Stores the key/value cache as codes of 8 bits.

use crate::pass::prelude::*;
use crate::weights::options::FormatName;
use quantc_ir::formats::{self, Class};
use quantc_ir::module::State;
use quantc_ir::ops::{Attention, CacheAppend, DynamicScale, Quantize};
use quantc_ir::scheme::{Group, Scheme, Zero};

pass! {
    /// Stores the key/value cache as codes of 8 bits, with a scale for each token and head.
    ///
    /// Every state that attention alone reads becomes two: one of codes, one of scales. Rows are rounded on their way
    /// into it with scales that are computed when the engine runs, and attention gets the scales as operands. A cache of
    /// 8 bits takes a quarter of the memory and traffic of one in f32.
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
    }
    scope: Module, numerics: Requantizes, stats: keeps
}

impl Pass for QuantizeCache {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let scheme =
            Scheme { format: self.format.0, group: Group::Token, zero: Zero::Symmetric, scale: Float::F32 };
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
            let scale_name = fresh_name(cx.module, &format!("{name}.scale"));
            let scale = cx.module.states.push(State { name: scale_name, ty: scales.clone() });
            cx.module.states[state].ty = codes.clone();
            for graph in cx.module.graphs_mut() {
                convert(graph, (state, &codes), (scale, &scales), scheme)?;
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
    (scale, scales): (StateId, &TensorTy),
    to: Scheme,
) -> Result<()> {
    let Some(value) = value_of(graph, state) else { return Ok(()) };
    graph.value_mut(value).ty = codes.clone();
    let scale_state = graph.state(scale, scales);
    for op in graph.users(value) {
        let at = graph.position(op).ok_or_else(|| Diag::bug("a user of a state is not in the program"))?;
        let (x, all) = (graph.node(op).args[1], graph.node(op).result);
        let s = graph.insert_inferred(at, DynamicScale { to }, &[x], None)?;
        let q = graph.insert_inferred(at + 1, Quantize { to }, &[x, s], None)?;
        graph.node_mut(op).args[1] = q;
        graph.value_mut(all).ty.elem = codes.elem;
        let all_scales = graph.insert_inferred(at + 3, CacheAppend {}, &[scale_state, s], None)?;
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
