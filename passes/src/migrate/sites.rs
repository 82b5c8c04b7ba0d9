//! Places where the channels of rows may be divided by factors, while the matrices that read them are multiplied.
//!
//! `sum_k w[n,k] x[k] = sum_k (w[n,k] s[k]) (x[k] / s[k])`: rows can be divided where they are made by something that passes a
//! factor on, and where nothing but products with constant matrices reads them. Sites are found on the graph:
//! - the gain and bias of a norm;
//! - the rows of a matrix (and its bias) whose product reaches the reader through steps that keep channels apart: reshapes, the
//!   other factor of an elementwise product, caches, and attention, which weighs the values of a head by numbers
//!   that do not depend on them. Query heads that share a key/value head share its factors.
//!
//! The proof of a site is the path that was found: each step on it is linear in the channel, and each value on it
//! has one reader. A place without such a path is listed with the reason.

use super::equal;
use crate::pass::prelude::*;
use crate::told::{self, Told};
use crate::weights::float_matrix;
use quantc_ir::ops::{Add, Attention, CacheAppend, LastRows, LayerNorm, MatMul, RmsNorm};
use quantc_ir::weights::{BlobWriter, Digest, WeightView};

/// A place where channels can be divided.
#[derive(Clone, Debug)]
pub struct Site {
    /// The rows that products read.
    pub x: ValueId,
    /// Those products.
    pub readers: Vec<OpId>,
    /// For each channel of `x`, which factor it is divided by.
    pub class: Vec<usize>,
    /// Number of factors.
    pub classes: usize,
    /// What passes the factors on.
    pub source: Source,
}

/// What makes rows that can be divided.
#[derive(Clone, Debug)]
pub enum Source {
    /// A norm, by its gain and bias.
    Norm(OpId),
    /// A product, by the rows of its matrix, and biases that are added to it: the op and the operand.
    Product(OpId, Vec<(OpId, usize)>),
}

/// A place that products read and that cannot be divided.
#[derive(Clone, Debug)]
pub struct Refused {
    /// The rows.
    pub x: ValueId,
    /// Why.
    pub why: String,
}

/// All rows that products with float matrices read, each as a site or with the reason why it is none.
pub fn find(module: &Module, graph: &Graph) -> (Vec<Site>, Vec<Refused>) {
    let (mut sites, mut refused) = (vec![], vec![]);
    let mut seen = vec![];
    for (op, node) in graph.ops() {
        if float_matrix(graph, op).is_none() || seen.contains(&node.args[0]) {
            continue;
        }
        seen.push(node.args[0]);
        match site(module, graph, node.args[0]) {
            Ok(site) => sites.push(site),
            Err(why) => refused.push(Refused { x: node.args[0], why }),
        }
    }
    (sites, refused)
}

/// What is to become of a site.
pub enum Decision {
    /// It stays as it is, for this reason.
    Leave(&'static str),
    /// It is divided by these factors; the text tells more.
    Divide(Vec<f32>, String),
}

/// Divides the sites of the function as `decide` says, tells of each place what was done or why nothing was, and checks that the
/// results have stayed the same. Sites with a matrix that `skip` names are left alone; `label` ends the names of new weights.
pub fn divide_each(
    cx: &mut PassCx<'_>,
    skip: &[Pattern],
    label: &str,
    decide: &mut dyn FnMut(&mut PassCx<'_>, &Site) -> Result<Decision>,
) -> Result<Changed> {
    let before = equal::before(cx)?;
    let (sites, refused) = find(cx.module, cx.graph());
    for Refused { x, why } in &refused {
        leave(cx, &cx.place(*x), why);
    }
    let mut changed = false;
    for site in &sites {
        let place = cx.place(site.x);
        let names = site.matrices(cx.graph()).into_iter().map(|w| cx.module.weights[w].name.clone());
        if let Some(name) = names.into_iter().find(|name| skip.any_matches(name)) {
            leave(cx, &place, &format!("@{name} is skipped"));
            continue;
        }
        match decide(cx, site)? {
            Decision::Leave(why) => leave(cx, &place, why),
            Decision::Divide(factors, text) => {
                site.divide(cx, &factors, label)?;
                let (kind, n) = (site.kind(), site.readers.len());
                let what = format!("{kind} into {n} matrices, {text}");
                let told =
                    told::Site { applied: true, what, matrices: n, factors: Some(told::span(&factors)) };
                cx.tell(place, format_args!("{kind} into {n} matrices, {text}"), Told::Site(told));
                changed = true;
            }
        }
    }
    if changed {
        equal::tell(cx, before.as_ref())?;
    }
    Ok(changed.into())
}

/// Tells that a place stays as it is, and why.
fn leave(cx: &mut PassCx<'_>, place: &str, why: &str) {
    cx.tell(place, format_args!("left as it is: {why}"), Told::Site(told::Site::skipped(why)));
}

fn site(module: &Module, graph: &Graph, x: ValueId) -> Result<Site, String> {
    let columns = graph.ty(x).shape.last().and_then(|d| d.fixed()).ok_or("its width is not fixed")? as usize;
    let mut readers = vec![];
    for op in graph.users(x) {
        let node = graph.node(op);
        let matrix = float_matrix(graph, op).filter(|(w, _)| module.weights[*w].ty.elem.is_float());
        if matrix.is_none() || node.args.iter().filter(|&&a| a == x).count() > 1 || node.args[0] != x {
            return Err(format!("`{}` reads it too", node.op.name()));
        }
        readers.push(op);
    }
    if graph.is_result(x) {
        return Err("it is a result".into());
    }
    let (source, heads) = trace(graph, x)?;
    let class: Vec<usize> = match heads {
        None => (0..columns).collect(),
        Some(Heads { queries, shared, size }) => {
            let kv = |c: usize| (c / size) / (queries / shared);
            (0..columns).map(|c| kv(c) * size + c % size).collect()
        }
    };
    let classes = class.iter().max().map_or(0, |c| c + 1);
    let there = match &source {
        // A norm of heads has a gain for the channels of one.
        Source::Norm(op) if width(graph, graph.node(*op).result) != columns => {
            return Err("it is normed by heads, which share a gain".into());
        }
        Source::Norm(_) => columns,
        Source::Product(op, _) => {
            let (w, _) = float_matrix(graph, *op).ok_or("the matrix before it is not a plain one")?;
            module.weights[w].ty.shape.0[0].fixed().unwrap_or(0) as usize
        }
    };
    if classes != there {
        return Err(format!("{classes} channels are made by {there} rows"));
    }
    Ok(Site { x, readers, class, classes, source })
}

/// Query heads that share key/value heads.
pub(super) struct Heads {
    queries: usize,
    shared: usize,
    size: usize,
}

/// Follows `x` back to what its channels can be divided in.
pub(super) fn trace(graph: &Graph, x: ValueId) -> Result<(Source, Option<Heads>), String> {
    let mut heads = None;
    let mut biases = vec![];
    let mut v = x;
    loop {
        let Some((op, node)) = graph.def(v) else { return Err("it is an input".into()) };
        let next = match &node.op {
            Op::RmsNorm(RmsNorm { .. }) | Op::LayerNorm(LayerNorm { .. }) => {
                let of_weights =
                    node.args[1..].iter().all(|&a| graph.is_none(a) || graph.as_weight(a).is_some());
                if heads.is_some() || !biases.is_empty() || !of_weights {
                    return Err("a norm whose gain cannot be divided".into());
                }
                return Ok((Source::Norm(op), None));
            }
            Op::MatMul(MatMul { epilogue, .. }) => {
                if !epilogue.is_empty() {
                    return Err("the product before it has an epilogue".into());
                }
                let Some((_, matrix)) = float_matrix(graph, op) else {
                    return Err("the matrix before it is not a plain one".into());
                };
                // A vector that is added to each head, say, has no element for each row.
                let rows = graph.ty(matrix).shape.0[0].fixed().unwrap_or(0) as usize;
                let vectors =
                    biases.iter().map(|&(add, i): &(OpId, usize)| width(graph, graph.node(add).args[i]));
                if let Some(n) = vectors.into_iter().find(|&n| n != rows) {
                    return Err(format!("a vector of {n} is added to what {rows} rows make"));
                }
                return Ok((Source::Product(op, biases), heads));
            }
            Op::Add(Add { .. }) => {
                let vector = |a: ValueId| graph.as_weight(a).is_some() && graph.ty(a).rank() == 1;
                let Some(at) = node.args[..2].iter().position(|&a| vector(a)) else {
                    return Err("a sum makes it, whose parts are read elsewhere".into());
                };
                biases.push((op, at));
                node.args[1 - at]
            }
            Op::Mul(_) => {
                let [a, b] = [node.args[0], node.args[1]];
                // In a square the factor would count twice.
                let same = graph.ty(a) == graph.ty(b) && a != b;
                // Either factor will do when a product makes it.
                let reaches = |v: ValueId| {
                    same && alone(graph, v, op)
                        && trace(graph, v).is_ok_and(|t| matches!(t.0, Source::Product(..)))
                };
                match (reaches(b), reaches(a)) {
                    (true, _) => b,
                    (false, true) => a,
                    (false, false) => return Err("no factor of it is a product that it alone reads".into()),
                }
            }
            Op::Reshape(_) | Op::LastRows(LastRows { .. }) => node.args[0],
            Op::Attention(Attention { .. }) => {
                let fixed = |v: ValueId, i: usize| {
                    graph.ty(v).shape.0.get(i).and_then(|d| d.fixed()).map(|n| n as usize)
                };
                let (q, values) = (node.args[0], node.args[2]);
                let (Some(queries), Some(shared), Some(size)) =
                    (fixed(q, 1), fixed(values, 1), fixed(values, 2))
                else {
                    return Err("attention over heads of unknown size".into());
                };
                if heads.is_some() || shared == 0 || !queries.is_multiple_of(shared) {
                    return Err("attention over heads that do not match".into());
                }
                heads = Some(Heads { queries, shared, size });
                values
            }
            Op::CacheAppend(CacheAppend {}) => node.args[1],
            Op::Quantize(_) => {
                // Codes and their scales follow the rows.
                let rows = node.args[0];
                let beside = |user: OpId| user == op || matches!(graph.node(user).op, Op::DynamicScale(_));
                if !graph.users(rows).into_iter().all(beside) {
                    return Err("rows that are rounded are read elsewhere".into());
                }
                v = rows;
                continue;
            }
            other => return Err(format!("`{}` makes it", other.name())),
        };
        // The rows themselves may have many readers; what they are made of has one.
        if !alone(graph, next, op) {
            return Err("what it is made of is read elsewhere".into());
        }
        v = next;
    }
}

/// The extent of the last axis, 0 when it is not fixed.
fn width(graph: &Graph, v: ValueId) -> usize {
    graph.ty(v).shape.last().and_then(|d| d.fixed()).unwrap_or(0) as usize
}

/// Whether `reader` alone reads `v`.
pub(super) fn alone(graph: &Graph, v: ValueId, reader: OpId) -> bool {
    !graph.is_result(v) && graph.users(v).into_iter().all(|user| user == reader)
}

impl Site {
    /// What passes the factors on, for people.
    pub fn kind(&self) -> &'static str {
        match &self.source {
            Source::Norm(_) => "norm",
            Source::Product(..) if self.class.len() != self.classes => "values of shared heads",
            Source::Product(..) => "product",
        }
    }

    /// The matrices that read the rows.
    pub fn matrices(&self, graph: &Graph) -> Vec<WeightId> {
        self.readers.iter().filter_map(|&op| Some(float_matrix(graph, op)?.0)).collect()
    }

    /// Divides the channels by `factors`, one for each class, and multiplies the matrices that read them. `label` ends the
    /// names of the weights that are made.
    pub fn divide(&self, cx: &mut PassCx<'_>, factors: &[f32], label: &str) -> Result<()> {
        let by: Vec<f32> = self.class.iter().map(|&c| factors[c]).collect();
        multiply_columns(cx, &self.readers, &by, label)?;
        self.source.divide(cx, factors, label)?;
        crate::calib::stats::divide(cx, self.x, &by)
    }
}

/// Multiplies the columns of the matrices of some products.
pub(super) fn multiply_columns(
    cx: &mut PassCx<'_>,
    products: &[OpId],
    by: &[f32],
    label: &str,
) -> Result<()> {
    for &op in products {
        let (w, _) = float_matrix(cx.graph(), op).ok_or_else(|| Diag::bug("a reader without its matrix"))?;
        let value = scaled(cx, "columns", w, label, by, |rows, _, by| {
            let rows = rows.chunks_exact_mut(by.len().max(1));
            rows.for_each(|row| row.iter_mut().zip(by).for_each(|(w, s)| *w *= s));
        })?;
        cx.graph_mut().node_mut(op).args[1] = value;
    }
    Ok(())
}

impl Source {
    /// Divides what it makes by `factors`, one for each row of the matrix or element of the gain.
    pub fn divide(&self, cx: &mut PassCx<'_>, factors: &[f32], label: &str) -> Result<()> {
        // A vector is one row.
        let vector =
            |rows: &mut [f32], _: usize, by: &[f32]| rows.iter_mut().zip(by).for_each(|(x, s)| *x /= s);
        match self {
            Source::Norm(op) => {
                let args = cx.graph().node(*op).args.clone();
                for (i, &a) in args.iter().enumerate().skip(1) {
                    let value = match cx.graph().as_weight(a) {
                        Some(w) => scaled(cx, "elements", w, label, factors, vector)?,
                        None if i == 1 => inverse(cx, label, factors)?,
                        None => continue,
                    };
                    cx.graph_mut().node_mut(*op).args[i] = value;
                }
            }
            Source::Product(op, biases) => {
                let (w, _) =
                    float_matrix(cx.graph(), *op).ok_or_else(|| Diag::bug("a source without its matrix"))?;
                let columns =
                    cx.module.weights[w].ty.shape.last().and_then(|d| d.fixed()).unwrap_or(1) as usize;
                let value = scaled(cx, "rows", w, label, factors, |rows, first, by| {
                    for (row, s) in rows.chunks_exact_mut(columns.max(1)).zip(&by[first..]) {
                        row.iter_mut().for_each(|w| *w /= s);
                    }
                })?;
                cx.graph_mut().node_mut(*op).args[1] = value;
                for &(add, i) in biases {
                    let b = cx.graph().as_weight(cx.graph().node(add).args[i]);
                    let b = b.ok_or_else(|| Diag::bug("a bias that is no weight"))?;
                    let value = scaled(cx, "elements", b, label, factors, vector)?;
                    cx.graph_mut().node_mut(add).args[i] = value;
                }
            }
        }
        Ok(())
    }
}

/// The value of a weight derived from `w` by blocks of rows: `change` gets numbers, the first row and the factors.
fn scaled(
    cx: &mut PassCx<'_>,
    role: &str,
    w: WeightId,
    label: &str,
    by: &[f32],
    change: impl Fn(&mut [f32], usize, &[f32]),
) -> Result<ValueId> {
    let decl = &cx.module.weights[w];
    let (name, ty) = (
        format!("{}.{label}", decl.name.trim_end_matches(&format!(".{label}"))),
        decl.ty.with_elem(ElemTy::F32),
    );
    let budget = cx.env.budget;
    // A square matrix has as many rows as columns.
    let role = format!("{role} {}", ty.rank());
    let more = format!("{role} {}", name_of(by));
    let made =
        cx.derive_weight(&name, ty, &[w], &more, &mut |views: &[WeightView<'_>], out: &mut BlobWriter| {
            crate::stream::rows(&views[0], budget, |first, rows| {
                change(rows, first, by);
                out.write_f32(Float::F32, rows)
            })
        })?;
    Ok(cx.weight_value(made))
}

/// A gain where there was none.
fn inverse(cx: &mut PassCx<'_>, label: &str, by: &[f32]) -> Result<ValueId> {
    let ty = TensorTy::fixed(ElemTy::F32, &[by.len() as u64]);
    let name = format!("{}.gain.{label}", cx.function_name());
    let made = cx.derive_weight(&name, ty, &[], &format!("gain {}", name_of(by)), &mut |_, out| {
        let gain: Vec<f32> = by.iter().map(|s| 1.0 / s).collect();
        out.write_f32(Float::F32, &gain)
    })?;
    Ok(cx.weight_value(made))
}

fn name_of(factors: &[f32]) -> String {
    let bytes: Vec<u8> = factors.iter().flat_map(|s| s.to_le_bytes()).collect();
    Digest::of(&bytes).to_string()
}
