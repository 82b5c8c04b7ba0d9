//! Gives the channels of cached keys and values the sizes that one scale loses least by.

use super::equal;
use super::sites::{Source, alone, trace};
use crate::calib::stats;
use crate::pass::prelude::*;
use crate::told::{self, Told};
use crate::weights::{float_matrix, selects};
use quantc_ir::ops::{Attention, Rope, RopeStyle};
use serde::{Deserialize, Serialize};

pass! {
    /// Gives the channels of cached keys and values the sizes that one scale loses least by.
    ///
    /// A key's channel is only ever multiplied with the same channel of queries: dividing it by a factor and multiplying that of
    /// the queries changes no score. Channels that are rotated together share a factor, and query heads that share a key head its
    /// factors. Values are divided likewise, and the columns of the matrix behind attention multiplied. Results stay the same, and
    /// that is checked on a sample whenever there is data.
    ///
    /// Integer codes are as far apart everywhere: with `aim=even` a factor is `m[c]^strength`, with `m[c]` the largest magnitude
    /// of the channel, from the statistic `cache`, by the geometric mean over its head. Floats lose the same part of every
    /// number, and nothing of the largest of a head, which the scale fits: that should be one that counts. With `aim=usual` only
    /// channels change that are out of proportion to what they are multiplied with: `m[c]` is the square root of the
    /// largest magnitude by the size of the matrix rows (of the queries) or columns (behind attention) that read it, a factor is
    /// `m[c]` by the (lower) median over the head, and where it is between 1/4 and 4 the channel stays as it is.
    "smooth-cache" => pub struct SmoothCache {
        /// What is aimed at: `even` makes channels alike, `usual` only brings those back that are out of proportion.
        aim: Aim = Aim::Even,
        /// 0 leaves channels as they are, 1 does what is aimed at.
        strength: f32 = 1.0,
        /// Layers to work on, as name patterns; none given means all.
        layers: Vec<Pattern> = vec![],
        /// Layers left alone, as name patterns.
        skip_layers: Vec<Pattern> = vec![],
    }
    needs: [stat(cache)],
    scope: Layer, numerics: Reassociates, stats: drops
}

/// What sizes channels are to have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aim {
    /// The same.
    #[default]
    Even,
    /// What they are, but for those out of proportion to what they are multiplied with.
    Usual,
}

impl Pass for SmoothCache {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        if !selects(&self.layers, &self.skip_layers, cx.function_name()) {
            return Ok(Changed::No);
        }
        let ops = cx.graph().order().to_vec();
        let attentions: Vec<OpId> = ops.into_iter().filter(|&op| cx.graph().node(op).op.is::<Attention>().is_some()).collect();
        if attentions.is_empty() {
            return Ok(Changed::No);
        }
        let before = equal::before(cx)?;
        let mut changed = false;
        for op in attentions {
            let (keys, values) = (keys(cx.graph(), op), values(cx.graph(), op));
            for (what, pair) in [("keys", keys), ("values", values)] {
                let place = cx.place(cx.graph().node(op).result);
                match pair {
                    Err(why) => {
                        let told = told::Site::skipped(format!("{what}: {why}"));
                        cx.tell(place, format_args!("{what} left as they are: {why}"), Told::Site(told));
                    }
                    Ok(pair) => {
                        let [low, high] = self.smooth(cx, &pair)?;
                        let matrices = match &pair.other {
                            Other::Queries(_) => 1,
                            Other::Columns(readers) => readers.len(),
                        };
                        let (applied, factors) = (true, Some([low, high]));
                        let told = told::Site { applied, what: what.into(), matrices, factors };
                        let text = format_args!("{what} by factors {low:.3} to {high:.3}");
                        cx.tell(place, text, Told::Site(told));
                        changed = true;
                    }
                }
            }
        }
        if changed {
            equal::tell(cx, before.as_ref())?;
        }
        Ok(changed.into())
    }

    fn validate(&self) -> Result<()> {
        if (0.0..=1.0).contains(&self.strength) {
            return Ok(());
        }
        Err(Diag::pipeline(format!("`strength` is {}, not between 0 and 1", self.strength)))
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::filters(&[], &[], &self.layers, &self.skip_layers)
    }
}

/// Factors up to this, and from one by this, are usual.
const USUAL: f64 = 4.0;

/// Rows that go into a cache, and what makes up for dividing their channels.
struct Pair {
    /// The rows, of heads.
    rows: ValueId,
    /// Makes them.
    source: Source,
    /// Channels of a head.
    size: usize,
    /// The channel of the head whose factor a channel shares: the first of those that are rotated together.
    lead: Vec<usize>,
    other: Other,
    /// How many heads of the other side share one of this.
    shared_by: usize,
}

/// The other side of the product.
enum Other {
    /// Queries: the rows of their matrix are multiplied.
    Queries(Source),
    /// What attention gives: the columns of the matrix that reads it are multiplied.
    Columns(Vec<OpId>),
}

/// The rows that go into the cache `cached`, which `reader` alone reads, as they are before they are rounded.
fn behind_cache(graph: &Graph, cached: ValueId, mut reader: OpId) -> Result<ValueId, String> {
    let (mut v, mut appended) = (cached, false);
    loop {
        // The scale of codes follows the rows.
        let follows = |user: OpId| user == reader || matches!(graph.node(user).op, Op::DynamicScale(_));
        if graph.is_result(v) || !graph.users(v).into_iter().all(follows) {
            return Err("they are read elsewhere".into());
        }
        let Some((op, node)) = graph.def(v) else { return Err("they are an input".into()) };
        v = match &node.op {
            Op::CacheAppend(_) => {
                appended = true;
                node.args[1]
            }
            Op::Quantize(_) | Op::Cast(_) => node.args[0],
            _ if appended => return Ok(v),
            _ => return Err("they go into no cache".into()),
        };
        reader = op;
    }
}

fn heads(graph: &Graph, v: ValueId) -> Result<(usize, usize), String> {
    let fixed = |i: usize| graph.ty(v).shape.0.get(i).and_then(|d| d.fixed()).map(|n| n as usize);
    Ok((fixed(1).ok_or("heads of unknown number")?, fixed(2).ok_or("heads of unknown size")?))
}

/// What is rotated to make `rows`, and how; `rows` itself when nothing is.
fn before_rotation(graph: &Graph, rows: ValueId) -> Result<(ValueId, Option<(Rope, usize)>), String> {
    let Some((op, node)) = graph.def(rows) else { return Ok((rows, None)) };
    let Some(rope) = node.op.is::<Rope>() else { return Ok((rows, None)) };
    if !alone(graph, node.args[0], op) {
        return Err("what is rotated is read elsewhere".into());
    }
    let size = graph.ty(node.args[1]).shape.last().and_then(|d| d.fixed()).unwrap_or(0) as usize;
    Ok((node.args[0], Some((rope.clone(), size))))
}

fn keys(graph: &Graph, attention: OpId) -> Result<Pair, String> {
    let node = graph.node(attention);
    let (q, k) = (node.args[0], node.args[1]);
    let rows = behind_cache(graph, k, attention)?;
    let ((queries, size), (shared, key_size)) = (heads(graph, q)?, heads(graph, rows)?);
    if size != key_size || shared == 0 || !queries.is_multiple_of(shared) || !alone(graph, q, attention) {
        return Err("queries and keys do not match".into());
    }
    let ((q_in, q_rope), (k_in, k_rope)) = (before_rotation(graph, q)?, before_rotation(graph, rows)?);
    if q_rope != k_rope {
        return Err("queries and keys are rotated in different ways".into());
    }
    let product = |v: ValueId| match trace(graph, v)? {
        (source @ Source::Product(..), None) => Ok(source),
        _ => Err("no product makes them".to_string()),
    };
    let lead = match k_rope {
        None => (0..size).collect(),
        Some((rope, turned)) => (0..size).map(|c| partner(rope.style, turned, c)).collect(),
    };
    let (source, other) = (product(k_in)?, Other::Queries(product(q_in)?));
    Ok(Pair { rows, source, size, lead, other, shared_by: queries / shared })
}

/// The first of the channels that are rotated together with channel `c` of a head, of which `turned` are rotated.
fn partner(style: RopeStyle, turned: usize, c: usize) -> usize {
    match style {
        _ if c >= turned => c,
        RopeStyle::Half => c % (turned / 2),
        RopeStyle::Interleaved => c / 2 * 2,
    }
}

fn values(graph: &Graph, attention: OpId) -> Result<Pair, String> {
    let node = graph.node(attention);
    let rows = behind_cache(graph, node.args[2], attention)?;
    let ((queries, _), (shared, size)) = (heads(graph, node.args[0])?, heads(graph, rows)?);
    if shared == 0 || !queries.is_multiple_of(shared) {
        return Err("queries and values do not match".into());
    }
    let (Source::Product(op, biases), None) = trace(graph, rows)? else { return Err("no product makes them".into()) };
    let mut x = node.result;
    while let [reader] = graph.users(x)[..] {
        match graph.node(reader).op {
            Op::Reshape(_) => x = graph.node(reader).result,
            _ => break,
        }
    }
    let readers = graph.users(x);
    let reads = |&op: &OpId| float_matrix(graph, op).is_some() && graph.node(op).args[0] == x;
    if readers.is_empty() || graph.is_result(x) || !readers.iter().all(reads) {
        return Err("what attention gives is not read by products alone".into());
    }
    let source = Source::Product(op, biases);
    Ok(Pair { rows, source, size, lead: (0..size).collect(), other: Other::Columns(readers), shared_by: queries / shared })
}

impl Pair {
    /// The size of what each of `channels` channels is multiplied with: the root of the sum of squares of the matrix's rows or
    /// columns, over the heads that share it.
    fn weights(&self, cx: &PassCx<'_>, channels: usize) -> Result<Vec<f32>> {
        let mut squares = vec![0f64; channels];
        let per_head = self.size * self.shared_by;
        let (ops, rows) = match &self.other {
            Other::Queries(Source::Product(op, _)) => (vec![*op], true),
            Other::Queries(Source::Norm(_)) => return Err(Diag::bug("queries without a product")),
            Other::Columns(readers) => (readers.clone(), false),
        };
        for op in ops {
            let (w, _) = float_matrix(cx.graph(), op).ok_or_else(|| Diag::bug("a product without its matrix"))?;
            let view = cx.store.view(&cx.module.weights, w)?;
            crate::stream::rows(&view, cx.env.budget, |first, block| {
                for (i, row) in block.chunks_exact(view.cols().max(1)).enumerate() {
                    for (j, &x) in row.iter().enumerate() {
                        let wide = if rows { first + i } else { j };
                        let channel = wide / per_head * self.size + wide % self.size;
                        squares[channel] += f64::from(x) * f64::from(x);
                    }
                }
                Ok(())
            })?;
        }
        Ok(squares.iter().map(|s| s.sqrt() as f32).collect())
    }
}

impl SmoothCache {
    /// Divides and multiplies; returns the least and the largest factor.
    fn smooth(&self, cx: &mut PassCx<'_>, pair: &Pair) -> Result<[f32; 2]> {
        let known = stats::of(cx, pair.rows)?;
        let mut most = known.absmax.clone();
        if self.aim == Aim::Usual {
            let weights = pair.weights(cx, most.len())?;
            // What nothing reads counts as little as what is always 0.
            most.iter_mut().zip(&weights).for_each(|(m, w)| *m = if *w > 0.0 { (*m / w).sqrt() } else { 0.0 });
        }
        for head in most.chunks_exact_mut(pair.size) {
            for c in 0..pair.size {
                let lead = pair.lead[c];
                head[lead] = head[lead].max(head[c]);
            }
            for c in 0..pair.size {
                head[c] = head[pair.lead[c]];
            }
        }
        let factors: Vec<f32> = most.chunks_exact(pair.size).flat_map(|head| self.of_head(head)).collect();
        pair.source.divide(cx, &factors, "even")?;
        let per_head = pair.size * pair.shared_by;
        let wide: Vec<f32> = (0..factors.len() * pair.shared_by)
            .map(|c| factors[c / per_head * pair.size + c % pair.size])
            .collect();
        match &pair.other {
            Other::Queries(source) => {
                let inverse: Vec<f32> = wide.iter().map(|s| 1.0 / s).collect();
                source.divide(cx, &inverse, "even")?;
            }
            Other::Columns(readers) => super::sites::multiply_columns(cx, readers, &wide, "even")?,
        }
        Ok(told::span(&factors))
    }

    /// The factors of the channels of a head; those that were never anything but 0 stay.
    fn of_head(&self, most: &[f32]) -> Vec<f32> {
        let mut logs: Vec<f64> = most.iter().filter(|&&x| x > 0.0).map(|&x| f64::from(x).ln()).collect();
        let middle = match self.aim {
            Aim::Even => logs.iter().sum::<f64>() / logs.len().max(1) as f64,
            Aim::Usual => {
                logs.sort_by(f64::total_cmp);
                logs.get(logs.len().saturating_sub(1) / 2).copied().unwrap_or(0.0)
            }
        };
        let stays = |log: f64| self.aim == Aim::Usual && log.abs() <= USUAL.ln();
        let factor = |&x: &f32| match f64::from(x).ln() - middle {
            log if x > 0.0 && !stays(log) => (f64::from(self.strength) * log).exp().clamp(1e-4, 1e4) as f32,
            _ => 1.0,
        };
        most.iter().map(factor).collect()
    }
}
