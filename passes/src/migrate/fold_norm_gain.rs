//! Moves the gains of norms into the matrices that read them.

use crate::pass::prelude::*;
use crate::told::{self, Told};
use crate::vectors;
use quantc_ir::ops::{LastRows, LayerNorm, MatMul, RmsNorm};
use quantc_ir::weights::{BlobWriter, WeightView};

pass! {
    /// Moves the gains of norms into the matrices that read them.
    ///
    /// `sum_k w[n,k] (g[k] x[k]) = sum_k (w[n,k] g[k]) x[k]`: where every reader of a norm is a matmul, the gain
    /// becomes a factor on the columns of each matrix. What the matmuls then read has no channels that are large only
    /// because of the gain, so it quantizes better, and the gain costs nothing at run time. The bias of a `layernorm`
    /// becomes a summand behind each matmul: `b'[n] = sum_k w[n,k] b[k]`, and joins a bias that is added there.
    ///
    /// ```qir before
    /// %n = rmsnorm %x, @g
    /// %y = matmul %n, @w
    /// ```
    /// ```qir after
    /// %n = rmsnorm %x
    /// %y = matmul %n, @w.folded
    /// ```
    "fold-norm-gain" => pub struct FoldNormGain {
        /// Gains left where they are, as name patterns of weights. A pattern that matches nothing is an error.
        skip: Vec<Pattern> = vec![],
    }
    scope: Layer, numerics: Reassociates, stats: drops
}

impl Pass for FoldNormGain {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        let mut changed = false;
        for op in cx.graph().order().to_vec() {
            let Some(norm) = Norm::of(cx, op) else { continue };
            if self.skip.any_matches(&cx.module.weights[norm.gain].name) {
                continue;
            }
            match readers(cx, cx.graph().node(op).result, norm.bias.is_some()) {
                Ok(matmuls) if matmuls.is_empty() => {}
                Ok(matmuls) => {
                    for &mm in &matmuls {
                        fold(cx, &norm, mm)?;
                    }
                    strip(cx, op)?;
                    let place = cx.place(cx.graph().node(op).result);
                    let (what, matrices) = (format!("folded the gain into {} matrices", matmuls.len()), matmuls.len());
                    let told = told::Site { applied: true, what: what.clone(), matrices, factors: None };
                    cx.tell(place, format_args!("{what}"), Told::Site(told));
                    changed = true;
                }
                Err(why) => {
                    let place = cx.place(cx.graph().node(op).result);
                    let told = Told::Site(told::Site::skipped(why.to_string()));
                    cx.tell(place, format_args!("kept the gain: {why}"), told);
                }
            }
        }
        Ok(changed.into())
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::all("skip", &self.skip, NameKind::Weight)
    }
}

/// The vectors of a norm that has a gain.
struct Norm {
    gain: WeightId,
    bias: Option<WeightId>,
}

impl Norm {
    fn of(cx: &PassCx<'_>, op: OpId) -> Option<Norm> {
        let graph = cx.graph();
        let node = graph.node(op);
        match node.op {
            Op::RmsNorm(_) => Some(Norm { gain: graph.as_weight(node.args[1])?, bias: None }),
            Op::LayerNorm(_) => {
                let gain = graph.as_weight(node.args[1])?;
                let bias = graph.as_weight(node.args[2]);
                // A bias that is computed cannot move.
                (bias.is_some() || graph.is_none(node.args[2])).then_some(Norm { gain, bias })
            }
            _ => None,
        }
    }
}

/// The matmuls that read `v`, directly or cut to its last rows, if nothing else does.
fn readers(cx: &PassCx<'_>, v: ValueId, with_bias: bool) -> Result<Vec<OpId>, String> {
    let graph = cx.graph();
    if graph.is_result(v) {
        return Err("it is a result".into());
    }
    let mut matmuls = vec![];
    for user in graph.users(v) {
        let node = graph.node(user);
        if node.op.is::<LastRows>().is_some() {
            matmuls.extend(readers(cx, node.result, with_bias)?);
            continue;
        }
        let Some(mm) = node.op.is::<MatMul>() else { return Err(format!("`{}` reads it", node.op.name())) };
        let matrix = graph.as_weight(node.args[1]).filter(|&w| cx.module.weights[w].ty.elem.is_float());
        if node.args[0] != v {
            return Err("an epilogue reads it".into());
        }
        if matrix.is_none() || node.args.iter().filter(|&&a| a == v).count() > 1 {
            return Err("a matmul reads it with something that is not a float weight".into());
        }
        if !mm.packed.is_empty() {
            return Err("the weight of a matmul is packed".into());
        }
        if with_bias && !mm.epilogue.is_empty() {
            return Err("a matmul has an epilogue, which a bias cannot pass".into());
        }
        matmuls.push(user);
    }
    Ok(matmuls)
}

/// Takes gain and bias off a norm.
fn strip(cx: &mut PassCx<'_>, op: OpId) -> Result<()> {
    let graph = cx.graph_mut();
    let none = graph.none();
    let node = graph.node_mut(op);
    match &node.op {
        Op::RmsNorm(RmsNorm { .. }) => node.args[1] = none,
        Op::LayerNorm(LayerNorm { .. }) => node.args[1..3].fill(none),
        other => return Err(Diag::bug(format!("`{}` is not a norm", other.name()))),
    }
    Ok(())
}

fn fold(cx: &mut PassCx<'_>, norm: &Norm, mm: OpId) -> Result<()> {
    let node = cx.graph().node(mm).clone();
    let budget = cx.env.budget;
    let w = cx.graph().as_weight(node.args[1]).expect("readers have been found to have weights");
    let decl = &cx.module.weights[w];
    let (name, ty) = (format!("{}.folded", decl.name), decl.ty.with_elem(ElemTy::F32));
    if let Some(bias) = norm.bias {
        add_bias(cx, mm, w, bias)?;
    }
    // w'[n,k] = w[n,k] g[k]
    let folded = cx.derive_weight(&name, ty, &[w, norm.gain], "gain", &mut |views, out| {
        let gain = views[1].read_all_f32()?;
        scale_columns(&views[0], &gain, budget, out)
    })?;
    let value = cx.weight_value(folded);
    cx.graph_mut().node_mut(mm).args[1] = value;
    Ok(())
}

/// Writes `w[n,k] s[k]`.
fn scale_columns(w: &WeightView<'_>, s: &[f32], budget: usize, out: &mut BlobWriter) -> Result<()> {
    crate::stream::rows(w, budget, |_, rows| {
        for row in rows.chunks_exact_mut(s.len().max(1)) {
            row.iter_mut().zip(s).for_each(|(w, s)| *w *= s);
        }
        out.write_f32(Float::F32, rows)
    })
}

/// Adds `b'[n] = sum_k w[n,k] b[k]` behind a matmul, or to the bias that is added there.
fn add_bias(cx: &mut PassCx<'_>, mm: OpId, w: WeightId, bias: WeightId) -> Result<()> {
    let budget = cx.env.budget;
    let y = cx.graph().node(mm).result;
    let there = vectors::added(cx, y);
    let rows = cx.module.weights[w].ty.shape.0[..1].to_vec();
    let ty = TensorTy::new(ElemTy::F32, rows);
    let (inputs, name) = match there {
        Some((_, _, b)) => (vec![w, bias, b], format!("{}.folded", cx.module.weights[b].name)),
        None => (vec![w, bias], format!("{}.bias", cx.module.weights[w].name)),
    };
    let made = cx.derive_weight(&name, ty, &inputs, "bias", &mut |views, out| {
        let b = views[1].read_all_f32()?;
        let old = views.get(2).map(WeightView::read_all_f32).transpose()?;
        crate::stream::rows(&views[0], budget, |first, rows| {
            let dot = |row: &[f32]| row.iter().zip(&b).map(|(&w, &b)| f64::from(w) * f64::from(b)).sum::<f64>();
            let old = |n: usize| old.as_ref().map_or(0.0, |o| f64::from(o[n]));
            let sums: Vec<f32> =
                rows.chunks_exact(b.len().max(1)).enumerate().map(|(i, r)| (dot(r) + old(first + i)) as f32).collect();
            out.write_f32(Float::F32, &sums)
        })
    })?;
    vectors::put(cx, mm, there, made)
}
