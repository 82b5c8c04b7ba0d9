//! Statistics of the rows that products read, taken when they are asked for.
//!
//! What was taken is kept in the store while it is small, under the digest of everything that decided it, so that other pipelines
//! with the same beginning find it.

pub mod bytes;
mod given;
mod kept;

pub use given::record;

use super::chain::{Calibrator, Start};
use super::file::StatsFile;
use super::hessian::Hessian;
use super::observers::{
    AnyObserver, ChannelMean, Convergence, Histogram, Method, MinMax, Moments, MovingAverage, Observer, Rows,
};
use crate::analysis::Function;
use crate::pass::{PassCx, Session, quoted};
use quantc_ir::diag::{Diag, Loc, Result, near_misses};
use quantc_ir::entity::{OpId, ValueId};
use quantc_ir::graph::Graph;
use quantc_ir::ops::{Op, Real};
use quantc_ir::scheme::Scheme;
use quantc_ir::ty::ElemTy;
use quantc_ir::weights::{Digest, Recipe};
use rayon::prelude::*;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// The statistics that there are, as options and texts name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The largest magnitude of each channel.
    Absmax,
    /// The sum of `x x^T` over all tokens, a `k x k` matrix.
    Hessian,
    /// Some of the rows as they are, evenly taken.
    Rows,
    /// The mean of each channel.
    Mean,
    /// The largest magnitude of each channel of each head of what goes into caches.
    Cache,
    /// What the observer of this name, one of [`TENSOR`], tells of the tensor as a whole.
    Tensor(&'static str),
}

/// The observers of whole tensors that may be asked for. What they tell does not outlive a change of channels.
pub const TENSOR: [&str; 4] = [MinMax::NAME, Moments::NAME, MovingAverage::NAME, Histogram::NAME];

impl Kind {
    /// The name.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Absmax => "absmax",
            Kind::Hessian => "hessian",
            Kind::Rows => "rows",
            Kind::Mean => "mean",
            Kind::Cache => "cache",
            Kind::Tensor(name) => name,
        }
    }

    /// What tells the range `method` with the least memory.
    pub fn of(method: Method) -> Kind {
        Kind::Tensor(method.statistic())
    }

    fn all() -> impl Iterator<Item = Kind> {
        [Kind::Absmax, Kind::Hessian, Kind::Rows, Kind::Mean, Kind::Cache]
            .into_iter()
            .chain(TENSOR.map(Kind::Tensor))
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        out.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Kind, D::Error> {
        let name = String::deserialize(input)?;
        Kind::all().find(|kind| kind.name() == name).ok_or_else(|| {
            let all: Vec<&str> = Kind::all().map(Kind::name).collect();
            let near = near_misses(&name, all.iter().copied());
            let listed = quoted(if near.is_empty() { &all } else { &near });
            serde::de::Error::custom(format!("unknown statistic `{name}`, there is {listed}"))
        })
    }
}

/// What is known of the rows of one value.
#[derive(Clone, Debug, Default)]
pub struct SiteStats {
    /// Tokens seen.
    pub tokens: u64,
    /// The largest magnitude of each channel.
    pub absmax: Vec<f32>,
    /// The sum of `x x^T`, when it was asked for.
    pub hessian: Option<Hessian>,
    /// Some of the rows, when they were asked for.
    pub rows: Vec<f32>,
    /// Sums of each channel, when they were asked for, as they were before any division.
    sums: Option<ChannelMean>,
    /// What channels have been divided by since; nothing when they have not.
    divided: Vec<f64>,
    /// What observers of the whole tensor tell, those that were asked for.
    tensors: Vec<Watched>,
}

/// An observer, and what it had seen after half of the samples.
#[derive(Clone, Debug)]
struct Watched {
    all: AnyObserver,
    half: Option<AnyObserver>,
}

/// Rows kept of one value.
const KEPT: usize = 512;

/// Rows that one task looks at.
const TOGETHER: usize = 64;

impl SiteStats {
    /// What the observer `name` of the whole tensor tells, when it was asked for.
    pub fn tensor(&self, name: &str) -> Option<&AnyObserver> {
        self.tensors.iter().map(|watched| &watched.all).find(|o| o.info().name == name)
    }

    /// The mean of each channel, when it was asked for.
    pub fn means(&self) -> Option<Vec<f64>> {
        let mut means = self.sums.as_ref()?.means();
        means.iter_mut().zip(&self.divided).for_each(|(mean, by)| *mean /= by);
        Some(means)
    }

    /// How far the second half of the samples moved the scale of a range; `None` when there were no two halves.
    pub fn convergence(&self, method: Method, scheme: &Scheme) -> Result<Option<Convergence>> {
        let watched = self.tensors.iter().find(|w| w.all.info().name == method.statistic());
        let Some(Watched { all, half: Some(half) }) = watched else { return Ok(None) };
        Convergence::of(half, all, method, scheme).map(Some)
    }

    /// Folds rows in: those of a sample, or of a part of it that is a call of its own.
    /// Samples are counted from 0; in the text it is the one `first` places further.
    fn see(&mut self, sample: usize, first: usize, rows: &[f32], columns: usize, take: &Take) -> Result<()> {
        self.absmax.resize(columns, 0.0);
        // The largest of some rows and whether all are finite; their order does not matter.
        let largest = |rows: &[f32]| {
            let (mut most, mut finite) = (vec![0f32; columns], true);
            for row in rows.chunks_exact(columns) {
                for (most, x) in most.iter_mut().zip(row.iter().map(|x| x.abs())) {
                    *most = if x > *most { x } else { *most };
                    finite &= x <= f32::MAX;
                }
            }
            (most, finite)
        };
        let parts: Vec<(Vec<f32>, bool)> = rows.par_chunks(columns * TOGETHER).map(largest).collect();
        if parts.iter().any(|(_, finite)| !finite)
            && let Some(at) = rows.iter().position(|x| !x.is_finite())
        {
            let (token, channel) = (at / columns, at % columns);
            return Err(Diag::input(format!("channel {channel} of token {token} is {}", rows[at]))
                .help("the model overflows on this text; calibrate it in f32"));
        }
        for (part, _) in &parts {
            self.absmax.iter_mut().zip(part).for_each(|(most, &x)| *most = most.max(x));
        }
        self.watch(sample, first, rows, columns, take)?;
        if take.rows {
            let kept = rows.chunks_exact(columns).zip(self.tokens..).filter(|&(_, token)| take.keeps(token));
            kept.for_each(|(row, _)| self.rows.extend_from_slice(row));
        }
        self.tokens += (rows.len() / columns) as u64;
        if !take.hessian || columns > take.widest {
            return Ok(());
        }
        let hessian = match &mut self.hessian {
            Some(hessian) => hessian,
            none => none.insert(Hessian::new(columns)?),
        };
        if take.bf16 { hessian.add_rounded(rows) } else { hessian.add(rows) }
    }

    /// Lets the observers see rows.
    fn watch(
        &mut self,
        sample: usize,
        first: usize,
        rows: &[f32],
        columns: usize,
        take: &Take,
    ) -> Result<()> {
        if take.tensors.is_empty() && !take.mean {
            return Ok(());
        }
        let rows = Rows::new((first + sample) as u64, rows, columns)?;
        for (i, &name) in take.tensors.iter().enumerate() {
            if i == self.tensors.len() {
                self.tensors.push(Watched { all: AnyObserver::new(name, columns)?, half: None });
            }
            let Watched { all, half } = &mut self.tensors[i];
            if sample > 0 && sample == take.half && half.is_none() {
                *half = Some(all.clone());
            }
            all.see(&rows)?;
        }
        match &mut self.sums {
            _ if !take.mean => Ok(()),
            Some(sums) => sums.see(&rows),
            none => none.insert(ChannelMean::new(columns)?).see(&rows),
        }
    }

    /// What holds when each channel is divided by its factor. Of the tensor as a whole nothing is known then.
    fn divided(&self, by: &[f32]) -> Result<SiteStats> {
        let absmax = self.absmax.iter().zip(by).map(|(most, s)| most / s).collect();
        let hessian = self.hessian.as_ref().map(|h| h.scaled(by)).transpose()?;
        let mut rows = self.rows.clone();
        for row in rows.chunks_exact_mut(by.len().max(1)) {
            row.iter_mut().zip(by).for_each(|(x, s)| *x /= s);
        }
        let before = self.divided.iter().copied().chain(std::iter::repeat(1.0));
        let divided = by.iter().zip(before).map(|(&s, before)| before * f64::from(s)).collect();
        let (tokens, sums) = (self.tokens, self.sums.clone());
        Ok(SiteStats { tokens, absmax, hessian, rows, sums, divided, tensors: vec![] })
    }
}

/// What is taken, besides the largest magnitudes.
#[derive(Clone, Default)]
struct Take {
    hessian: bool,
    rows: bool,
    mean: bool,
    /// Observers of the whole tensor.
    tensors: Vec<&'static str>,
    /// The sample before which half of them have been seen.
    half: usize,
    /// Of so many rows in turn one is kept; not 0 when rows are.
    every: u64,
    /// Rows of more channels get no Hessian.
    widest: usize,
    /// Whether products read rows rounded to bf16.
    bf16: bool,
}

impl Take {
    /// Whether the row of this token is kept, one in each run of `every`: anywhere in it, since steps of one length that
    /// divides a sample's would meet the same positions again and again, the first of each sample among them.
    fn keeps(&self, token: u64) -> bool {
        // A finalizer of 64 bits mixes each number into one that looks drawn at random (SplitMix64's).
        let mut z = (token / self.every).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        token % self.every == (z ^ (z >> 31)) % self.every
    }
}

/// Statistics of one function's values, not taken before they are needed.
pub struct LayerStats {
    key: Digest,
    take: Take,
    sites: BTreeMap<ValueId, Site>,
    source: Source,
}

/// Where statistics come from.
enum Source {
    /// Running samples.
    Run(Box<Start>),
    /// A layer of a file.
    File(Arc<StatsFile>, usize),
}

struct Site {
    /// Index among the results of the piece, or among the values of the layer in the file.
    index: usize,
    /// Whether products read it, so that more is taken of it than magnitudes.
    read: bool,
    columns: usize,
    /// What channels have been divided by since, with a name for it.
    divided: Vec<(Digest, Vec<f32>)>,
    /// How many of those divisions `taken` has seen.
    applied: usize,
    taken: Option<Arc<SiteStats>>,
}

impl Site {
    /// What is known of the rows as they are now.
    fn now(&mut self) -> Result<Arc<SiteStats>> {
        // The statistics before a division are not kept beside those after it.
        while let (Some(taken), Some((_, by))) = (&self.taken, self.divided.get(self.applied)) {
            let divided = taken.divided(by)?;
            (self.taken, self.applied) = (Some(Arc::new(divided)), self.applied + 1);
        }
        Ok(self.taken.clone().unwrap_or_default())
    }
}

impl LayerStats {
    /// Of the `values` with their columns that `start` leads to; the first `read` of them are read by products. Those of more
    /// than `widest` columns get no Hessian.
    pub fn new(
        start: Start,
        values: &[(ValueId, usize)],
        read: usize,
        kinds: &[Kind],
        widest: usize,
    ) -> LayerStats {
        let names: Vec<&str> = kinds.iter().map(|k| k.name()).collect();
        let inputs = vec![start.boundary.key(), start.piece.key];
        let rows = if start.bf16 { " of bf16" } else { "" };
        let wide = kinds.contains(&Kind::Hessian) && values[..read].iter().any(|&(_, n)| n > widest);
        let limit = if wide { format!(" of at most {widest} channels") } else { String::new() };
        let options = format!("{}{rows}{limit}", names.join(", "));
        let recipe = Recipe { step: "statistics", version: 3, options, inputs };
        let site = |(index, &(v, columns)): (usize, &(ValueId, usize))| {
            (v, Site { index, columns, read: index < read, divided: vec![], applied: 0, taken: None })
        };
        let sites = values.iter().enumerate().map(site).collect();
        let tokens = start.samples.tokens();
        let tensor = |kind: &Kind| if let Kind::Tensor(name) = kind { Some(*name) } else { None };
        let take = Take {
            tensors: kinds.iter().filter_map(tensor).collect(),
            half: start.samples.count / 2,
            hessian: kinds.contains(&Kind::Hessian),
            rows: kinds.contains(&Kind::Rows),
            mean: kinds.contains(&Kind::Mean),
            every: tokens.div_ceil(KEPT).max(1) as u64,
            widest,
            bf16: start.bf16,
        };
        LayerStats { key: recipe.digest(), take, sites, source: Source::Run(Box::new(start)) }
    }
}

/// The values of rows that the products of a graph read, in order, with their columns.
pub fn sites(graph: &Graph, reads: impl Fn(OpId) -> bool) -> Vec<(ValueId, usize)> {
    let mut found: Vec<(ValueId, usize)> = vec![];
    for (op, node) in graph.ops() {
        if !matches!(node.op, Op::MatMul(_)) || !reads(op) {
            continue;
        }
        let x = node.args[0];
        let ty = graph.ty(x);
        let columns = ty.shape.last().and_then(|d| d.fixed()).unwrap_or(0) as usize;
        if ty.elem == ElemTy::F32 && ty.rank() == 2 && columns > 0 && !found.iter().any(|&(v, _)| v == x) {
            found.push((x, columns));
        }
    }
    found
}

/// The rows that a graph appends to caches, as they are before they are rounded, with the columns of all heads.
pub fn cached(graph: &Graph) -> Vec<(ValueId, usize)> {
    let mut found: Vec<(ValueId, usize)> = vec![];
    for (_, node) in graph.ops() {
        if !matches!(node.op, Op::CacheAppend(_)) {
            continue;
        }
        let mut rows = node.args[1];
        while let Some((_, rounding)) =
            graph.def(rows).filter(|(_, n)| matches!(n.op, Op::Quantize(_) | Op::Cast(_)))
        {
            rows = rounding.args[0];
        }
        let ty = graph.ty(rows);
        let columns = ty.shape.0[1..].iter().try_fold(1, |n, d| Some(n * d.fixed()? as usize));
        let of_scales = graph.def(rows).is_some_and(|(_, n)| matches!(n.op, Op::DynamicScale(_)));
        if let (ElemTy::F32, Some(columns), false) = (ty.elem, columns, of_scales)
            && !found.iter().any(|&(v, _)| v == rows)
        {
            found.push((rows, columns));
        }
    }
    found
}

/// The largest magnitude of each of the `heads` of rows that go into a cache.
pub fn heads(cx: &mut PassCx<'_>, x: ValueId, heads: usize) -> Result<Vec<f32>> {
    if let Some(numbers) = cx.stat(x, Kind::Cache.name()) {
        let numbers: Vec<f32> = numbers.iter().map(|&Real(x)| x as f32).collect();
        if numbers.len() == heads {
            return Ok(numbers);
        }
        let text = format!("`cache` of {} has {} numbers, expected {heads}", cx.place(x), numbers.len());
        return Err(Diag::input(text));
    }
    let stats = of(cx, x)?;
    let size =
        stats.absmax.len().checked_div(heads).filter(|&size| size * heads == stats.absmax.len() && size > 0);
    let size = size.ok_or_else(|| Diag::bug("rows that are no heads"))?;
    Ok(stats.absmax.chunks(size).map(|head| head.iter().fold(0f32, |a, &b| a.max(b))).collect())
}

/// Gives the memory of what was taken of a function's values back. It is taken again when somebody asks.
pub fn release(session: &mut Session, function: Function) {
    let sites =
        session.about_mut::<LayerStats>(function).into_iter().flat_map(|stats| stats.sites.values_mut());
    sites.for_each(|site| (site.taken, site.applied) = (None, 0));
}

/// A name for what is known of the rows `x`: decided by samples, layers before and what was divided out. There is none when
/// nothing is known.
pub fn key(cx: &mut PassCx<'_>, x: ValueId, kind: Kind) -> Option<Digest> {
    if let Some(numbers) = cx.stat(x, kind.name()) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.0.to_le_bytes()).collect();
        return Some(Digest::of(&bytes));
    }
    let function = cx.function;
    let stats = cx.session().about::<LayerStats>(function)?;
    let taken = match kind {
        Kind::Absmax | Kind::Cache => true,
        Kind::Hessian => stats.take.hessian,
        Kind::Rows => stats.take.rows,
        Kind::Mean => stats.take.mean,
        Kind::Tensor(name) => stats.take.tensors.contains(&name),
    };
    let stays = |site: &&Site| site.divided.is_empty() || !matches!(kind, Kind::Tensor(_));
    let site = stats.sites.get(&x).filter(|_| taken).filter(stays)?;
    if site.read == (kind == Kind::Cache) {
        return None;
    }
    let inputs = std::iter::once(stats.key).chain(site.divided.iter().map(|(name, _)| *name)).collect();
    Some(Recipe { step: "site", version: 1, options: site.index.to_string(), inputs }.digest())
}

/// Whether Hessians are taken, and the rows `x` have too many channels for one.
pub fn too_wide(cx: &mut PassCx<'_>, x: ValueId) -> bool {
    let function = cx.function;
    let Some(stats) = cx.session().about::<LayerStats>(function) else { return false };
    let wide = |site: &Site| site.read && site.columns > stats.take.widest;
    stats.take.hessian && stats.sites.get(&x).is_some_and(wide)
}

/// An error that says how to get statistics.
pub fn missing(cx: &mut PassCx<'_>, x: ValueId, kind: Kind) -> Diag {
    let (name, place, function) = (kind.name(), cx.place(x), cx.function);
    let stats = cx.session().about::<LayerStats>(function);
    let site = stats.and_then(|stats| stats.sites.get(&x));
    if matches!(kind, Kind::Tensor(_)) && site.is_some_and(|site| !site.divided.is_empty()) {
        let what = format!("the statistic `{name}` of {place} is stale: channels were divided since");
        return Diag::pipeline(what)
            .help("let `calibrate` take it again, behind the pass that moves scales between channels");
    }
    Diag::pipeline(format!("the statistic `{name}` of {place} is not known"))
        .help("let `calibrate` take it in front, of the layers and weights that this pass works on")
}

/// What is known of the rows `x`; taken now, for all values of the function, when it has not been before.
pub fn of(cx: &mut PassCx<'_>, x: ValueId) -> Result<Arc<SiteStats>> {
    if let Some(stats) = from_text(cx, x)? {
        return Ok(Arc::new(stats));
    }
    let function = cx.function;
    let (store, env) = (cx.store, cx.env);
    let place = cx.place(x);
    let session = cx.session();
    let Some(mut stats) = session.take_about::<LayerStats>(function) else {
        return Err(missing(cx, x, Kind::Absmax));
    };
    let clock = Instant::now();
    let taken = take(session, &mut stats, store, env.interrupt);
    let found = stats.sites.get_mut(&x).map(Site::now);
    session.put_about(function, stats);
    cx.add_span("running samples", clock.elapsed());
    taken.map_err(|d| d.context(format!("calibrating for {place}")))?;
    found.unwrap_or_else(|| Err(missing(cx, x, Kind::Absmax)))
}

fn take(
    session: &mut Session,
    stats: &mut LayerStats,
    store: &quantc_ir::weights::Store,
    interrupt: Option<&std::sync::atomic::AtomicBool>,
) -> Result<()> {
    if stats.sites.values().all(|site| site.taken.is_some()) {
        return Ok(());
    }
    let start = match &stats.source {
        Source::Run(start) => start,
        Source::File(file, layer) => {
            for site in stats.sites.values_mut() {
                (site.taken, site.applied) = (Some(Arc::new(file.site(*layer, site.index)?)), 0);
            }
            return Ok(());
        }
    };
    let recipe =
        Recipe { step: "taken statistics", version: 1, options: String::new(), inputs: vec![stats.key] };
    if store.has(&recipe, 1) {
        let blob = store.read_blob(store.derive(&recipe, 1, &mut |_| Ok(()))?[0])?;
        for site in stats.sites.values_mut() {
            (site.taken, site.applied) = (Some(Arc::new(kept::read(&blob, site)?)), 0);
        }
        return Ok(());
    }
    let calibrator = session.get_mut::<Calibrator>();
    let calibrator = calibrator.ok_or_else(|| Diag::bug("statistics are asked for, and the data is gone"))?;
    let mut by_index: BTreeMap<usize, (usize, bool, SiteStats)> = stats
        .sites
        .values()
        .map(|site| (site.index, (site.columns, site.read, SiteStats::default())))
        .collect();
    let take = stats.take.clone();
    // Of what goes into caches only magnitudes are taken.
    let magnitudes = Take { hessian: false, rows: false, mean: false, tensors: vec![], ..take.clone() };
    let first = start.samples.first;
    calibrator.run(start, store, usize::MAX, interrupt, &mut |sample, index, rows| {
        let Some((columns, read, stats)) = by_index.get_mut(&index) else { return Ok(()) };
        let take = if *read { &take } else { &magnitudes };
        stats
            .see(sample, first, rows, *columns, take)
            .map_err(|d| d.at(Loc::Item(format!("sample {sample}"))))
    })?;
    for site in stats.sites.values_mut() {
        site.taken = by_index.remove(&site.index).map(|(.., stats)| Arc::new(stats));
    }
    kept::keep(store, &recipe, stats.sites.values())
}

/// Statistics that stand in the module's text. For observers of the whole tensor, the numbers that they have seen.
fn from_text(cx: &PassCx<'_>, x: ValueId) -> Result<Option<SiteStats>> {
    let numbers =
        |kind: Kind| cx.stat(x, kind.name()).map(|n| n.iter().map(|&Real(x)| x as f32).collect::<Vec<f32>>());
    let (absmax, hessian, mean) = (numbers(Kind::Absmax), numbers(Kind::Hessian), numbers(Kind::Mean));
    let tensors: Vec<(&str, Vec<f32>)> =
        TENSOR.iter().filter_map(|&name| Some((name, numbers(Kind::Tensor(name))?))).collect();
    if absmax.is_none() && hessian.is_none() && mean.is_none() && tensors.is_empty() {
        return Ok(None);
    }
    let columns = cx.graph().ty(x).shape.last().and_then(|d| d.fixed()).unwrap_or(0) as usize;
    let fits = |kind: Kind, n: usize, want: usize| match n == want {
        true => Ok(()),
        false => {
            let text = format!("`{}` of {} has {n} numbers, expected {want}", kind.name(), cx.place(x));
            Err(Diag::input(text))
        }
    };
    let mut stats = SiteStats { tokens: 1, ..SiteStats::default() };
    if let Some(absmax) = absmax {
        fits(Kind::Absmax, absmax.len(), columns)?;
        stats.absmax = absmax;
    }
    if let Some(hessian) = hessian {
        fits(Kind::Hessian, hessian.len(), columns * columns)?;
        stats.hessian = Some(from_numbers(columns, &hessian)?);
    }
    if let Some(mean) = mean {
        fits(Kind::Mean, mean.len(), columns)?;
        // The mean of one row is the row.
        let mut sums = ChannelMean::new(columns)?;
        sums.see(&Rows::new(0, &mean, columns)?)
            .map_err(|d| d.context(format!("reading `mean` of {}", cx.place(x))))?;
        stats.sums = Some(sums);
    }
    for (name, numbers) in tensors {
        let mut all = AnyObserver::new(name, 1)?;
        all.see(&Rows::new(0, &numbers, 1)?)
            .map_err(|d| d.context(format!("reading `{name}` of {}", cx.place(x))))?;
        stats.tensors.push(Watched { all, half: None });
    }
    Ok(Some(stats))
}

/// A Hessian written out, row by row.
fn from_numbers(k: usize, numbers: &[f32]) -> Result<Hessian> {
    let mut bytes = vec![];
    bytes.extend((k as u64).to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    for i in 0..k {
        bytes.extend(numbers[i * k..][..=i].iter().flat_map(|x| x.to_le_bytes()));
    }
    Hessian::from_bytes(&bytes)
}

/// Says that the channels of `x` are divided by `by` from now on, so that what is known of it stays true. What was known of
/// the tensor as a whole is not known any more.
pub fn divide(cx: &mut PassCx<'_>, x: ValueId, by: &[f32]) -> Result<()> {
    if let Some(stats) = from_text(cx, x)? {
        let divided = stats.divided(by)?;
        let reals = |xs: &[f32]| xs.iter().map(|&x| Real(f64::from(x))).collect::<Vec<Real>>();
        if !divided.absmax.is_empty() {
            cx.set_stat(x, Kind::Absmax.name(), reals(&divided.absmax))?;
        }
        if let Some(hessian) = &divided.hessian {
            cx.set_stat(x, Kind::Hessian.name(), reals(&hessian.mirrored()))?;
        }
        if let Some(means) = divided.means() {
            cx.set_stat(x, Kind::Mean.name(), means.into_iter().map(Real).collect())?;
        }
        TENSOR.iter().for_each(|name| cx.drop_stat(x, name));
        return Ok(());
    }
    let bytes: Vec<u8> = by.iter().flat_map(|s| s.to_le_bytes()).collect();
    let function = cx.function;
    if let Some(site) = cx.session().about_mut::<LayerStats>(function).and_then(|s| s.sites.get_mut(&x)) {
        site.divided.push((Digest::of(&bytes), by.to_vec()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_kept_one_in_each_run_and_from_all_positions_of_samples() {
        let (samples, length) = (128, 512);
        let take = Take { rows: true, every: samples * length / KEPT as u64, ..Take::default() };
        let kept: Vec<u64> = (0..samples * length).filter(|&token| take.keeps(token)).collect();
        let runs: Vec<u64> = kept.iter().map(|token| token / take.every).collect();
        assert_eq!(runs, (0..KEPT as u64).collect::<Vec<_>>());
        let mut positions: Vec<u64> = kept.iter().map(|token| token % length).collect();
        let first = positions.iter().filter(|&&p| p == 0).count();
        positions.sort();
        positions.dedup();
        // 512 positions drawn at random from 512 are 324 different ones, and each comes once.
        assert!(positions.len() > 290 && first < 8, "{} positions, {first} times the first", positions.len());
        // However samples come, what is kept is the same.
        let mut stats = SiteStats::default();
        for (i, sample) in (0..samples * length).collect::<Vec<_>>().chunks(length as usize).enumerate() {
            let rows: Vec<f32> = sample.iter().map(|&token| token as f32).collect();
            stats.see(i, 0, &rows, 1, &take).unwrap();
        }
        assert_eq!(stats.rows, kept.iter().map(|&token| token as f32).collect::<Vec<_>>());
    }

    /// Half of the samples is what was seen before the first call of the next one.
    #[test]
    fn a_sample_may_have_several_calls() {
        let take = Take { tensors: vec![MinMax::NAME], half: 1, ..Take::default() };
        let mut stats = SiteStats::default();
        for (sample, x) in [(0, 1.0), (0, 2.0), (1, 4.0), (1, 3.0)] {
            stats.see(sample, 0, &[x], 1, &take).unwrap();
        }
        let scheme = Scheme::parse("!q<int8:f32 tensor>").unwrap();
        let moved = stats.convergence(Method::Whole, &scheme).unwrap().unwrap();
        assert_eq!((moved.n_scales, moved.largest), (1, 0.5));
    }

    #[test]
    fn observers_see_the_samples_and_half_of_them() {
        let take =
            Take { tensors: vec![MinMax::NAME, Histogram::NAME], mean: true, half: 1, ..Take::default() };
        let mut stats = SiteStats::default();
        stats.see(0, 0, &[1.0, -2.0, 0.5, 0.0], 2, &take).unwrap();
        stats.see(1, 0, &[4.0, -1.0], 2, &take).unwrap();
        let scheme = Scheme::parse("!q<int8:f32 tensor>").unwrap();
        for name in [MinMax::NAME, Histogram::NAME] {
            let seen = stats.tensor(name).unwrap();
            assert_eq!((seen.n_seen(), seen.span(Method::Whole, &scheme).unwrap().max()), (6, 4.0));
        }
        // Half of the samples reached 2, all of them 4.
        let moved = stats.convergence(Method::Whole, &scheme).unwrap().unwrap();
        assert_eq!((moved.n_scales, moved.largest), (1, 0.5));
        assert!(moved.remark(0.1).unwrap().contains("50.0 %"));
        assert_eq!(stats.absmax, [4.0, 2.0]);
        // Divided channels are known one by one, the tensor is not.
        let divided = stats.divided(&[2.0, 4.0]).unwrap();
        assert_eq!(divided.absmax, [2.0, 0.5]);
        assert_eq!(stats.means().unwrap(), [5.5 / 3.0, -1.0]);
        assert_eq!(divided.means().unwrap(), [5.5 / 3.0 / 2.0, -0.25]);
        assert_eq!(divided.divided(&[0.5, 1.0]).unwrap().means().unwrap(), [5.5 / 3.0, -0.25]);
        assert!(divided.tensor(MinMax::NAME).is_none());
        assert!(divided.convergence(Method::Whole, &scheme).unwrap().is_none());
    }

    #[test]
    fn names_of_statistics_read_back() {
        for kind in Kind::all() {
            let json = serde_json::to_string(&kind).unwrap();
            assert_eq!(serde_json::from_str::<Kind>(&json).unwrap(), kind);
        }
        let refused = serde_json::from_str::<Kind>("\"histogramm\"").unwrap_err();
        assert!(refused.to_string().contains("there is `histogram`"), "{refused}");
    }
}
