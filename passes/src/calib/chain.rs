//! What lies between layers, for all samples, in files.

use super::piece::{self, Piece, Wanted};
use super::plain_cache::plain_cache;
use super::{Extent, LayerExec};
use crate::analysis::Function;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::entity::{OpId, ValueId};
use quantc_ir::graph::Graph;
use quantc_ir::module::Module;
use quantc_ir::ops::{Call, Op};
use quantc_ir::ty::ElemTy;
use quantc_ir::weights::{Digest, Recipe, Store};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A text to calibrate on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Data {
    /// Where it comes from, for people.
    pub name: String,
    /// Its tokens, without special ones.
    pub tokens: Vec<u32>,
    /// Where texts end that are read each by itself, as an encoder reads sentences: a sample is as many as fit into its length.
    /// `None` for one running text, of which a sample is a window.
    pub ends: Option<Vec<usize>>,
    /// The tokens in front of what a model reads together.
    pub before: Vec<u32>,
    /// The tokens behind it.
    pub after: Vec<u32>,
}

fn bytes(tokens: &[u32]) -> Vec<u8> {
    tokens.iter().flat_map(|t| t.to_le_bytes()).collect()
}

/// Samples of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Samples {
    /// What the model is run on, call by call, in the order of samples.
    pub calls: Vec<SampleCall>,
    /// How many there are; at least one.
    pub count: usize,
    /// Most tokens of one.
    pub length: usize,
    /// Where the first of them stands among all that the text has, shuffled when they are.
    pub first: usize,
    /// A name for all of them in their order.
    pub digest: Digest,
}

/// Tokens that a model reads together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleCall {
    /// The sample that they are of, counted from 0.
    pub sample: usize,
    /// Special ones included; at least one.
    pub tokens: Vec<u32>,
}

/// Which samples are taken of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// How many are left out in front.
    pub first: u32,
    /// How many at most; 0 takes all.
    pub samples: u32,
    /// Most tokens of one, special ones included.
    pub length: u32,
    /// 0 takes them from the beginning of the text on, any other number shuffles them first.
    pub seed: u64,
}

impl Data {
    /// All ids that a model is given.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        self.tokens.iter().chain(&self.before).chain(&self.after).copied()
    }

    /// A name for the text.
    pub fn digest(&self) -> Digest {
        let tokens = Digest::of(&bytes(&self.tokens));
        let Some(ends) = &self.ends else { return tokens };
        let ends = Digest::of(&ends.iter().flat_map(|&end| (end as u64).to_le_bytes()).collect::<Vec<u8>>());
        Recipe { step: "texts", version: 1, options: String::new(), inputs: vec![tokens, ends] }.digest()
    }

    /// Takes some samples of the text, in its order or shuffled.
    pub fn samples(&self, choice: Choice) -> Result<Samples> {
        let (length, first, most) = (choice.length as usize, choice.first as usize, choice.samples as usize);
        let around = self.before.len() + self.after.len();
        if length <= around {
            let text = format!("samples of {length} tokens have no room beside the {around} around a text");
            return Err(Diag::pipeline(text).help(format!("let `length` be at least {}", around + 1)));
        }
        let parts = match &self.ends {
            None => self.windows(length - around)?,
            Some(ends) => self.packed(ends, length, around),
        };
        // Of a long text no more is looked at than is wanted.
        let wanted = if choice.seed == 0 && most > 0 { first + most } else { usize::MAX };
        let mut all: Vec<Vec<&[u32]>> = parts.take(wanted).collect();
        if choice.seed != 0 {
            shuffle(&mut all, choice.seed);
        }
        let refuse = |text: String| Diag::input(text).in_file(self.name.clone());
        if all.is_empty() {
            return Err(refuse("the text has no line with a token".into()));
        }
        if first >= all.len() {
            let have = all.len();
            let text = format!(
                "the text has {have} samples of {length} tokens: none is left behind the first {first}"
            );
            return Err(refuse(text).help("let `first` be smaller"));
        }
        all.drain(..first);
        if most > 0 {
            all.truncate(most);
        }
        let count = all.len();
        let call = |(sample, part): (usize, &[u32])| {
            let tokens = [&self.before, part, &self.after].concat();
            SampleCall { sample, tokens }
        };
        let parts =
            all.iter().enumerate().flat_map(|(sample, parts)| parts.iter().map(move |&p| (sample, p)));
        let calls: Vec<SampleCall> = parts.map(call).collect();
        let mut options = format!("{count} of {length}");
        if self.ends.is_some() {
            // Where one ends and the next begins.
            options.extend(calls.iter().map(|call| format!(" {}:{}", call.sample, call.tokens.len())));
        }
        let inputs =
            vec![Digest::of(&calls.iter().flat_map(|call| bytes(&call.tokens)).collect::<Vec<u8>>())];
        let digest = Recipe { step: "samples", version: 1, options, inputs }.digest();
        Ok(Samples { calls, count, length, first, digest })
    }

    /// Each sample as the window of `step` tokens that it is; what is left at the end is none.
    fn windows(&self, step: usize) -> Result<Parts<'_>> {
        if self.tokens.len() < step {
            let have = self.tokens.len();
            return Err(Diag::input(format!("the text has {have} tokens, one sample takes {step}"))
                .in_file(self.name.clone())
                .help("give a longer text, or a smaller `length` to `calibrate`"));
        }
        Ok(Box::new(self.tokens.chunks_exact(step).map(|window| vec![window])))
    }

    /// Each sample as the texts that fit into it, with what is `around` each. A text that is longer than a sample is cut.
    fn packed<'a>(&'a self, ends: &'a [usize], length: usize, around: usize) -> Parts<'a> {
        let starts = std::iter::once(&0).chain(ends);
        let texts = starts.zip(ends).map(|(&start, &end)| &self.tokens[start..end]);
        let mut parts = texts.flat_map(move |text| text.chunks(length - around)).peekable();
        Box::new(std::iter::from_fn(move || {
            let (mut sample, mut room) = (vec![], length);
            while let Some(part) = parts.next_if(|part| part.len() + around <= room) {
                room -= part.len() + around;
                sample.push(part);
            }
            (!sample.is_empty()).then_some(sample)
        }))
    }
}

/// What samples have of a text, one sample after the other.
type Parts<'a> = Box<dyn Iterator<Item = Vec<&'a [u32]>> + 'a>;

/// Fisher and Yates, with numbers of splitmix64.
fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    for i in (1..items.len()).rev() {
        items.swap(i, (next() % (i as u64 + 1)) as usize);
    }
}

impl SampleCall {
    /// The inputs of ids that a module with `count` of them is given: the tokens, and of `zeros` the segments.
    pub fn ids<'a>(&'a self, count: usize, zeros: &'a [u32]) -> Vec<&'a [u32]> {
        let n = self.tokens.len();
        std::iter::once(&self.tokens[..]).chain(std::iter::repeat(&zeros[..n])).take(count).collect()
    }
}

impl Samples {
    /// Each sample's place among all that the text has, with a digest of its tokens.
    pub fn names(&self) -> Vec<(usize, Digest)> {
        let of = |calls: &[SampleCall]| {
            let tokens = calls.iter().flat_map(|call| bytes(&call.tokens)).collect::<Vec<u8>>();
            (self.first + calls[0].sample, Digest::of(&tokens))
        };
        self.calls.chunk_by(|a, b| a.sample == b.sample).map(of).collect()
    }

    /// Tokens of all samples.
    pub fn tokens(&self) -> usize {
        self.calls.iter().map(|call| call.tokens.len()).sum()
    }

    /// How many tokens calls have.
    pub fn extent(&self) -> Extent {
        let lengths = || self.calls.iter().map(|call| call.tokens.len());
        let most = lengths().max().unwrap_or(0);
        Extent { most, always: lengths().all(|n| n == most) }
    }
}

/// Runs a model on samples, from one layer to the next.
pub struct Calibrator {
    data: Data,
    exec: Arc<dyn LayerExec>,
    /// The samples in use, and how they were chosen.
    samples: Option<(Choice, Arc<Samples>)>,
    /// The furthest point between layers so far.
    last: Option<Arc<Boundary>>,
    files: BTreeMap<Digest, Arc<Rows>>,
}

/// A point of `main` between two calls: which rows live there, and how they are made.
pub struct Boundary {
    key: Digest,
    /// Position in `main` of the call that comes next.
    at: usize,
    /// Values of `main`, with the columns of their rows.
    values: Vec<(ValueId, usize)>,
    made: Option<Made>,
}

struct Made {
    from: Arc<Boundary>,
    piece: Piece,
    /// Where each value comes from.
    sources: Vec<Source>,
}

#[derive(Clone, Copy)]
enum Source {
    /// A value of the point before.
    Kept(usize),
    /// A result of the piece.
    Result(usize),
}

// Rows lie in files as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"));

/// The rows of all samples at one point, call by call and in each value by value.
enum Rows {
    File { file: File, path: PathBuf },
    Memory(Vec<u8>),
}

/// Takes the sample, the index of the value and rows of it: those of one call.
pub type See<'a> = dyn FnMut(usize, usize, &[f32]) -> Result<()> + 'a;

/// As [`See`], with the rows of each value at the point before.
type SeeBoth<'a> = dyn FnMut(usize, usize, &[f32], &[&[f32]]) -> Result<()> + 'a;

/// What calibration of a layer starts from.
pub struct Start {
    /// The samples.
    pub samples: Arc<Samples>,
    /// The point before the layer.
    pub boundary: Arc<Boundary>,
    /// The part of the model from there to the rows wanted.
    pub piece: Piece,
    /// Whether products in it read bf16 rows.
    pub bf16: bool,
}

impl Calibrator {
    /// Nothing has run yet.
    pub fn new(data: Data, exec: Arc<dyn LayerExec>) -> Calibrator {
        Calibrator { data, exec, samples: None, last: None, files: BTreeMap::new() }
    }

    /// The text.
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// The samples in use, once something was calibrated.
    pub fn samples(&self) -> Option<&Samples> {
        self.samples.as_ref().map(|(_, samples)| &**samples)
    }

    /// What pieces run with.
    pub fn exec(&self) -> &dyn LayerExec {
        &*self.exec
    }

    /// Prepares to look at `values` of a function on the samples chosen. Nothing runs yet.
    pub fn start(
        &mut self,
        module: &Module,
        store: &Store,
        function: Function,
        values: &[ValueId],
        choice: Choice,
    ) -> Result<Start> {
        let samples = match &self.samples {
            Some((known, samples)) if *known == choice => samples.clone(),
            _ => {
                let samples = Arc::new(self.data.samples(choice)?);
                (self.samples, self.last) = (Some((choice, samples.clone())), None);
                samples
            }
        };
        let tokens = samples.extent().most;
        let Function::Layer(layer) = function else {
            let boundary = self.first(&samples);
            let piece = piece::cut(module, store, &[], Wanted::Main(values), tokens)?;
            return Ok(Start { samples, boundary, piece, bf16: false });
        };
        let name = &module.layers[layer].name;
        let calls = |(_, op): &(usize, &OpId)| {
            module.main.node(**op).op.is::<Call>().is_some_and(|call| call.layer == *name)
        };
        let mut calls = module.main.order().iter().enumerate().filter(calls);
        let Some((at, &call)) = calls.next() else {
            return Err(Diag::input(format!(
                "@main does not call @{name}, so there is nothing to calibrate it with"
            )));
        };
        if calls.next().is_some() {
            return Err(Diag::input(format!(
                "@main calls @{name} twice; a layer is calibrated at its one call"
            )));
        }
        // Going back means another round over the layers, which have changed since.
        let from = match self.last.take() {
            Some(last) if last.at <= at => last,
            _ => self.first(&samples),
        };
        let boundary = advance(module, store, from, at, tokens)?;
        self.last = Some(boundary.clone());
        let given: Vec<ValueId> = boundary.values.iter().map(|&(v, _)| v).collect();
        let piece = piece::cut(module, store, &given, Wanted::Inside(call, values), tokens)?;
        Ok(Start { samples, boundary, piece, bf16: false })
    }

    /// Whether there is something to gain from products of bf16 rows.
    pub fn multiplies_bf16(&self) -> bool {
        self.exec.multiplies_bf16()
    }

    fn first(&self, samples: &Samples) -> Arc<Boundary> {
        let options = self.exec.name();
        let recipe = Recipe { step: "samples run", version: 1, options, inputs: vec![samples.digest] };
        Arc::new(Boundary { key: recipe.digest(), at: 0, values: vec![], made: None })
    }

    /// The results of a function as they are now, to be compared with what they are later; `None` before any calibration.
    ///
    /// Caches of codes are taken for caches of floats here: what changes rows that are rounded changes how they are rounded, and
    /// is to be judged without that.
    pub fn probe(&mut self, module: &Module, store: &Store, function: Function) -> Result<Option<Start>> {
        let Some((choice, _)) = self.samples else { return Ok(None) };
        let results = function.graph(module).results.clone();
        let Some(plain) = plain_cache(module)? else {
            return self.start(module, store, function, &results, choice).map(Some);
        };
        // Layers behind are calibrated on rows that went through the caches as they are.
        let last = self.last.clone();
        let start = self.start(&plain, store, function, &results, choice);
        self.last = last;
        start.map(Some)
    }

    /// How far the results of two probes of one function lie apart on the first sample: the norm of the difference by that of
    /// the first.
    pub fn difference(&mut self, before: &Start, after: &Start, store: &Store) -> Result<f64> {
        let mut runs = vec![];
        for start in [before, after] {
            let mut all: Vec<f32> = vec![];
            self.run(start, store, 1, None, &mut |_, _, rows| {
                all.extend_from_slice(rows);
                Ok(())
            })?;
            runs.push(all);
        }
        let (mut apart, mut norm) = (0.0, 0.0);
        for (&a, &b) in runs[0].iter().zip(&runs[1]) {
            let (a, d) = (f64::from(a), f64::from(b) - f64::from(a));
            apart += d * d;
            norm += a * a;
        }
        Ok(if apart == 0.0 { 0.0 } else { (apart / norm).sqrt() })
    }

    /// Runs `most` samples through the piece of `start`; `see` gets the sample, the index of the value and its rows.
    pub fn run(
        &mut self,
        start: &Start,
        store: &Store,
        most: usize,
        interrupt: Option<&AtomicBool>,
        see: &mut See<'_>,
    ) -> Result<()> {
        let rows = self.rows(&start.boundary, &start.samples, store, interrupt)?;
        let job = Job { exec: &*self.exec, samples: &start.samples, store, interrupt, bf16: start.bf16 };
        job.run(&start.piece, &start.boundary, &rows, most, &mut |sample, i, rows, _| see(sample, i, rows))
    }

    /// The rows at a point: kept, found in the store's folder, or made from those of the point before.
    fn rows(
        &mut self,
        boundary: &Boundary,
        samples: &Samples,
        store: &Store,
        interrupt: Option<&AtomicBool>,
    ) -> Result<Arc<Rows>> {
        if let Some(known) = self.files.get(&boundary.key) {
            return Ok(known.clone());
        }
        let bytes = boundary.columns() * samples.tokens() * 4;
        let path = store.dir().map(|dir| dir.join("activations").join(boundary.key.to_string()));
        let found = path.as_deref().and_then(|path| Rows::open(path, bytes as u64));
        let rows = match (found, &boundary.made) {
            (Some(rows), _) => rows,
            (None, None) => Rows::Memory(vec![]),
            (None, Some(made)) => {
                let from = self.rows(&made.from, samples, store, interrupt)?;
                let job = Job { exec: &*self.exec, samples, store, interrupt, bf16: false };
                let rows = boundary.make(made, &from, &job, path.as_deref())?;
                drop(from);
                // Nobody goes back behind a point that is there.
                if let Some(Rows::File { path, .. }) = self.files.remove(&made.from.key).as_deref() {
                    let _ = fs::remove_file(path);
                }
                rows
            }
        };
        let rows = Arc::new(rows);
        self.files.insert(boundary.key, rows.clone());
        Ok(rows)
    }

    /// Removes what lies in files. Without it the next run with the same store finds it.
    pub fn clear(&mut self) {
        for rows in std::mem::take(&mut self.files).values() {
            if let Rows::File { path, .. } = &**rows {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// The point before the op of `main` at position `at`; `from` itself when it has all the rows.
fn advance(
    module: &Module,
    store: &Store,
    from: Arc<Boundary>,
    at: usize,
    tokens: usize,
) -> Result<Arc<Boundary>> {
    let main = &module.main;
    let values = live_at(main, at)?;
    let given: Vec<ValueId> = from.values.iter().map(|&(v, _)| v).collect();
    let new: Vec<ValueId> = values.iter().map(|&(v, _)| v).filter(|v| !given.contains(v)).collect();
    if new.is_empty() {
        return Ok(from);
    }
    let piece = piece::cut(module, store, &given, Wanted::Main(&new), tokens)?;
    let source = |&(v, _): &(ValueId, usize)| match given.iter().position(|&g| g == v) {
        Some(i) => Source::Kept(i),
        None => Source::Result(new.iter().position(|&n| n == v).unwrap_or_default()),
    };
    let sources: Vec<Source> = values.iter().map(source).collect();
    let order: Vec<String> = sources
        .iter()
        .map(|s| match s {
            Source::Kept(i) => format!("kept {i}"),
            Source::Result(i) => format!("made {i}"),
        })
        .collect();
    let recipe =
        Recipe { step: "rows", version: 1, options: order.join(", "), inputs: vec![from.key, piece.key] };
    Ok(Arc::new(Boundary { key: recipe.digest(), at, values, made: Some(Made { from, piece, sources }) }))
}

/// The results of calls before position `at` of `main` that are read from there on, with their columns.
fn live_at(main: &Graph, at: usize) -> Result<Vec<(ValueId, usize)>> {
    let (before, after) = main.order().split_at(at);
    // What is computed between calls is computed again, from what it is made of.
    let mut live = vec![];
    let mut open: Vec<ValueId> =
        after.iter().flat_map(|&op| &main.node(op).args).chain(&main.results).copied().collect();
    let mut seen = std::collections::BTreeSet::new();
    while let Some(v) = open.pop() {
        if !seen.insert(v) {
            continue;
        }
        let Some((op, node)) = main.def(v) else { continue };
        if !before.contains(&op) {
            continue;
        }
        match node.op {
            Op::Call(_) => live.push(v),
            _ => open.extend(&node.args),
        }
    }
    live.sort_unstable();
    let columns = |v: ValueId| {
        let ty = main.ty(v);
        let columns = ty.shape.0[1..].iter().try_fold(1u64, |n, d| Some(n * d.fixed()?));
        let columns = columns
            .filter(|_| ty.elem == ElemTy::F32 && ty.shape.0.first().is_some_and(|d| d.fixed().is_none()));
        let text = || format!("calibration passes rows of f32 from layer to layer, not {ty}");
        columns.map(|n| (v, n as usize)).ok_or_else(|| Diag::input(text()))
    };
    live.into_iter().map(columns).collect()
}

impl Boundary {
    /// A name for the rows: samples and everything they went through.
    pub fn key(&self) -> Digest {
        self.key
    }

    /// Numbers of one token.
    fn columns(&self) -> usize {
        self.values.iter().map(|&(_, columns)| columns).sum()
    }

    /// Of the rows of one call, those of each value.
    fn parts<'a>(&self, mut rows: &'a [f32], tokens: usize) -> Vec<&'a [f32]> {
        let part = |&(_, columns): &(ValueId, usize)| {
            let (part, rest) = rows.split_at(columns * tokens);
            rows = rest;
            part
        };
        self.values.iter().map(part).collect()
    }

    fn make(&self, made: &Made, from: &Rows, job: &Job<'_>, path: Option<&Path>) -> Result<Rows> {
        let mut out = Sink::new(path)?;
        let only_result = matches!(made.sources[..], [Source::Result(_)]);
        let results = made.sources.iter().filter(|s| matches!(s, Source::Result(_))).count();
        let mut call: Vec<Vec<f32>> = vec![vec![]; self.values.len()];
        let mut seen = 0;
        job.run(&made.piece, &made.from, from, usize::MAX, &mut |_, i, rows, given| {
            if only_result {
                return out.write(rows);
            }
            for (source, part) in made.sources.iter().zip(&mut call) {
                let rows = match *source {
                    Source::Result(k) if k == i => rows,
                    Source::Kept(k) if seen == 0 => given[k],
                    _ => continue,
                };
                part.clear();
                part.extend_from_slice(rows);
            }
            seen += 1;
            if seen == results {
                seen = 0;
                call.iter().try_for_each(|part| out.write(part))?;
            }
            Ok(())
        })?;
        out.finish(path)
    }
}

/// What runs pieces need.
struct Job<'a> {
    exec: &'a dyn LayerExec,
    samples: &'a Samples,
    store: &'a Store,
    interrupt: Option<&'a AtomicBool>,
    bf16: bool,
}

impl Job<'_> {
    /// Runs `most` samples; `see` gets the sample, the index of the result, its rows, and the rows of each value at the point
    /// before.
    fn run(
        &self,
        piece: &Piece,
        boundary: &Boundary,
        rows: &Rows,
        most: usize,
        see: &mut SeeBoth<'_>,
    ) -> Result<()> {
        let extent = self.samples.extent();
        let ready = super::runnable(&piece.module, self.store, self.bf16)?;
        let mut runner = self.exec.prepare(&ready, self.store, extent)?;
        let inputs_of_ids = piece::inputs_of_ids(&ready);
        let zeros = vec![0; extent.most];
        let columns = boundary.columns();
        let mut given = vec![0.0; columns * extent.most];
        let mut at = 0;
        for call in self.samples.calls.iter().take_while(|call| call.sample < most) {
            if self.interrupt.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
                return Err(Diag::system("interrupted"));
            }
            let n = call.tokens.len();
            let given = &mut given[..columns * n];
            rows.read(at, given)?;
            at += given.len();
            let inputs = boundary.parts(given, n);
            runner.run(&call.ids(inputs_of_ids, &zeros), &inputs, &mut |k, rows| {
                see(call.sample, k, rows, &inputs)
            })?;
        }
        Ok(())
    }
}

impl Rows {
    /// A file of earlier, when it is whole.
    fn open(path: &Path, bytes: u64) -> Option<Rows> {
        let file = File::open(path).ok()?;
        let whole = file.metadata().is_ok_and(|m| m.len() == bytes);
        whole.then(|| Rows::File { file, path: path.into() })
    }

    /// Numbers from index `at` on.
    fn read(&self, at: usize, out: &mut [f32]) -> Result<()> {
        // SAFETY: the bytes are those of `out`, which is borrowed alone, and any bytes are numbers.
        let bytes = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u8>(), out.len() * 4) };
        match self {
            Rows::Memory(all) => bytes.copy_from_slice(&all[at * 4..][..bytes.len()]),
            Rows::File { file, path } => file.read_exact_at(bytes, at as u64 * 4).map_err(|e| {
                Diag::system(format!("cannot read it: {e}")).in_file(path.display().to_string())
            })?,
        }
        Ok(())
    }
}

/// Takes rows, into memory or into a file that gets its name when it is whole.
enum Sink {
    Memory(Vec<u8>),
    File { file: std::io::BufWriter<File>, path: PathBuf },
}

impl Sink {
    fn new(path: Option<&Path>) -> Result<Sink> {
        let Some(path) = path else { return Ok(Sink::Memory(vec![])) };
        let name = path.with_extension(format!("{}.part", std::process::id()));
        let make = || {
            if let Some(place) = path.parent() {
                fs::create_dir_all(place)?;
                sweep(place);
            }
            File::create(&name)
        };
        let file = make().map_err(|e| io(&name, &e))?;
        Ok(Sink::File { file: std::io::BufWriter::with_capacity(1 << 20, file), path: name })
    }

    fn write(&mut self, numbers: &[f32]) -> Result<()> {
        // SAFETY: the bytes are those of `numbers`, and numbers have no gaps.
        let bytes = unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast::<u8>(), numbers.len() * 4) };
        match self {
            Sink::Memory(all) => all.extend_from_slice(bytes),
            Sink::File { file, path } => file.write_all(bytes).map_err(|e| io(path, &e))?,
        }
        Ok(())
    }

    fn finish(self, path: Option<&Path>) -> Result<Rows> {
        match (self, path) {
            (Sink::Memory(bytes), _) => Ok(Rows::Memory(bytes)),
            (Sink::File { file, path: part }, Some(path)) => {
                file.into_inner().map_err(|e| io(&part, e.error()))?;
                fs::rename(&part, path).map_err(|e| io(path, &e))?;
                let file = File::open(path).map_err(|e| io(path, &e))?;
                Ok(Rows::File { file, path: path.into() })
            }
            (Sink::File { path, .. }, None) => {
                Err(Diag::bug(format!("a file {} without a name", path.display())))
            }
        }
    }
}

/// Removes files that processes which are gone were writing: `NAME.PROCESS.part`.
fn sweep(place: &Path) {
    let Ok(entries) = fs::read_dir(place) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let part = path.extension().is_some_and(|e| e == "part");
        let owner = path.file_stem().and_then(|stem| Path::new(stem).extension());
        let owner = owner.and_then(|pid| pid.to_str()?.parse::<u32>().ok());
        if part && owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // Whoever is faster.
            let _ = fs::remove_file(path);
        }
    }
}

fn io(path: &Path, e: &std::io::Error) -> Diag {
    Diag::system(format!("cannot write it: {e}")).in_file(path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts read each by itself.
    fn texts(all: &[Vec<u32>], [before, after]: [&[u32]; 2]) -> Data {
        let ends = all.iter().scan(0, |end, text| {
            *end += text.len();
            Some(*end)
        });
        let ends = Some(ends.collect());
        Data { name: "lines".into(), tokens: all.concat(), ends, before: before.into(), after: after.into() }
    }

    fn each(lengths: &[u32]) -> Data {
        let all: Vec<Vec<u32>> = lengths.iter().map(|&n| (n * 100..n * 100 + n).collect()).collect();
        texts(&all, [&[1], &[2, 3]])
    }

    fn running(tokens: Vec<u32>, bos: u32) -> Data {
        Data { name: "running".into(), tokens, before: vec![bos], ..Data::default() }
    }

    fn choice(length: u32) -> Choice {
        Choice { first: 0, samples: 0, length, seed: 0 }
    }

    fn calls(samples: &Samples) -> Vec<(usize, &[u32])> {
        samples.calls.iter().map(|call| (call.sample, &call.tokens[..])).collect()
    }

    #[test]
    fn a_sample_is_a_window_or_as_many_texts_as_fit() {
        let samples = running((10..17).collect(), 9).samples(choice(4)).unwrap();
        assert_eq!(calls(&samples), [(0, &[9, 10, 11, 12][..]), (1, &[9, 13, 14, 15])]);
        assert_eq!((samples.count, samples.tokens()), (2, 8));
        assert_eq!(samples.extent(), Extent { most: 4, always: true });

        // With three around each: 4 and 5 fit into 9, 11 is cut, what is left of it has room for 4 behind it.
        let samples = each(&[1, 2, 0, 8, 1]).samples(choice(9)).unwrap();
        let want: [(usize, &[u32]); 5] = [
            (0, &[1, 100, 2, 3]),
            (0, &[1, 200, 201, 2, 3]),
            (1, &[1, 800, 801, 802, 803, 804, 805, 2, 3]),
            (2, &[1, 806, 807, 2, 3]),
            (2, &[1, 100, 2, 3]),
        ];
        assert_eq!(calls(&samples), want);
        assert_eq!((samples.count, samples.length, samples.tokens()), (3, 9, 27));
        assert_eq!(samples.extent(), Extent { most: 9, always: false });
        assert_eq!(each(&[2]).ids().collect::<Vec<_>>(), [200, 201, 1, 2, 3]);
    }

    #[test]
    fn parts_are_samples_of_the_whole_under_their_names() {
        let data = each(&[3, 4, 1, 2, 5, 6, 7, 1, 1, 2]);
        for seed in [0, 7] {
            let all = data.samples(Choice { seed, ..choice(12) }).unwrap();
            let parts = [(0, 2), (2, 1), (3, 0)]
                .map(|(first, samples)| data.samples(Choice { first, samples, seed, ..choice(12) }).unwrap());
            assert_eq!(parts.iter().map(|p| p.count).collect::<Vec<_>>(), [2, 1, all.count - 3]);
            assert_eq!(parts.iter().flat_map(Samples::names).collect::<Vec<_>>(), all.names());
            assert_eq!(parts.iter().map(Samples::tokens).sum::<usize>(), all.tokens());
        }
    }

    #[test]
    fn names_tell_the_same_tokens_in_other_texts() {
        // One text of four, and two of two with nothing around them.
        let (one, two) = (vec![vec![5, 6, 7, 8]], vec![vec![5, 6], vec![7, 8]]);
        let [one, two] = [one, two].map(|all| texts(&all, [&[], &[]]));
        assert_ne!(one.digest(), two.digest());
        assert_ne!(one.samples(choice(4)).unwrap().digest, two.samples(choice(4)).unwrap().digest);
    }

    #[test]
    fn what_leaves_no_sample_is_refused() {
        let says = |data: Data, choice: Choice, what: &str| {
            let err = data.samples(choice).unwrap_err().to_string();
            assert!(err.contains(what), "{err}");
        };
        says(each(&[3]), choice(3), "no room beside the 3 around a text");
        says(each(&[0, 0]), choice(9), "no line with a token");
        says(each(&[]), choice(9), "no line with a token");
        says(each(&[3]), Choice { first: 1, ..choice(9) }, "none is left behind the first 1");
        says(running(vec![4; 3], 1), choice(9), "one sample takes 8");
        says(running(vec![4; 3], 1), choice(1), "no room beside the 1 around a text");
    }
}
