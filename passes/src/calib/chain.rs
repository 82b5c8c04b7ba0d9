//! What lies between layers, for all samples, in files.

use super::LayerExec;
use super::piece::{self, Piece, Wanted};
use super::plain_cache::plain_cache;
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    /// Where it comes from, for people.
    pub name: String,
    /// Its tokens, without special ones.
    pub tokens: Vec<u32>,
    /// The token in front of each sample, when the model has one.
    pub bos: Option<u32>,
}

/// Samples: windows of a text, all of one length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Samples {
    /// Tokens of each sample, the one in front included.
    pub windows: Vec<Vec<u32>>,
    /// Where the first of them stands among all that the text has, shuffled when they are.
    pub first: usize,
    /// A name for all of them in their order.
    pub digest: Digest,
}

/// Which samples are taken of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// How many are left out in front.
    pub first: u32,
    /// How many at most; 0 takes all.
    pub samples: u32,
    /// Tokens of one, the one in front included.
    pub length: u32,
    /// 0 takes them from the beginning of the text on, any other number shuffles them first.
    pub seed: u64,
}

impl Data {
    /// Cuts the text into consecutive windows and takes some.
    pub fn samples(&self, choice: Choice) -> Result<Samples> {
        let step = (choice.length as usize).saturating_sub(usize::from(self.bos.is_some()));
        if step == 0 {
            return Err(Diag::pipeline("samples of no tokens").help("let `length` be at least 2"));
        }
        if self.tokens.len() < step {
            let have = self.tokens.len();
            return Err(Diag::input(format!("the text has {have} tokens, one sample takes {step}"))
                .in_file(self.name.clone())
                .help("give a longer text, or a smaller `length` to `calibrate`"));
        }
        let mut parts: Vec<&[u32]> = self.tokens.chunks_exact(step).collect();
        if choice.seed != 0 {
            shuffle(&mut parts, choice.seed);
        }
        let first = choice.first as usize;
        if first >= parts.len() {
            let text = format!(
                "the text has {} samples of {} tokens: none is left behind the first {first}",
                parts.len(),
                choice.length
            );
            return Err(Diag::input(text).in_file(self.name.clone()).help("let `first` be smaller"));
        }
        parts.drain(..first);
        if choice.samples > 0 {
            parts.truncate(choice.samples as usize);
        }
        let windows: Vec<Vec<u32>> =
            parts.into_iter().map(|part| self.bos.iter().chain(part).copied().collect()).collect();
        let bytes: Vec<u8> = windows.iter().flatten().flat_map(|t| t.to_le_bytes()).collect();
        let options = format!("{} of {}", windows.len(), choice.length);
        let digest =
            Recipe { step: "samples", version: 1, options, inputs: vec![Digest::of(&bytes)] }.digest();
        Ok(Samples { windows, first, digest })
    }
}

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

impl Samples {
    /// Each sample's place among all that the text has, with a digest of its tokens.
    pub fn names(&self) -> Vec<(usize, Digest)> {
        let name =
            |window: &Vec<u32>| Digest::of(&window.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>());
        self.windows.iter().enumerate().map(|(i, window)| (self.first + i, name(window))).collect()
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

/// The rows of all samples at one point, sample by sample.
enum Rows {
    File { file: File, path: PathBuf },
    Memory(Vec<u8>),
}

/// Takes the sample, the index of the value and its rows.
pub type See<'a> = dyn FnMut(usize, usize, &[f32]) -> Result<()> + 'a;

/// As [`See`], with all rows of the sample at the point before.
type SeeBoth<'a> = dyn FnMut(usize, usize, &[f32], &[f32]) -> Result<()> + 'a;

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
        let tokens = samples.windows[0].len();
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
        let tokens = samples.windows[0].len();
        let bytes = boundary.sample_len(tokens) * 4 * samples.windows.len();
        let path = store.dir().map(|dir| dir.join("activations").join(boundary.key.to_string()));
        let found = path.as_deref().and_then(|path| Rows::open(path, bytes as u64));
        let rows = match (found, &boundary.made) {
            (Some(rows), _) => rows,
            (None, None) => Rows::Memory(vec![]),
            (None, Some(made)) => {
                let from = self.rows(&made.from, samples, store, interrupt)?;
                let job = Job { exec: &*self.exec, samples, store, interrupt, bf16: false };
                let rows = boundary.make(made, &from, &job, path.as_deref(), tokens)?;
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

    /// Numbers of one sample.
    fn sample_len(&self, tokens: usize) -> usize {
        self.values.iter().map(|&(_, columns)| columns * tokens).sum()
    }

    fn make(
        &self,
        made: &Made,
        from: &Rows,
        job: &Job<'_>,
        path: Option<&Path>,
        tokens: usize,
    ) -> Result<Rows> {
        let mut out = Sink::new(path)?;
        let offsets = |boundary: &Boundary| -> Vec<usize> {
            let sums = boundary.values.iter().scan(0, |sum, &(_, columns)| {
                let at = *sum;
                *sum += columns * tokens;
                Some(at)
            });
            sums.collect()
        };
        let (to, old) = (offsets(self), offsets(&made.from));
        let only_result = matches!(made.sources[..], [Source::Result(_)]);
        let mut sample = vec![0.0; if only_result { 0 } else { self.sample_len(tokens) }];
        let results = made.sources.iter().filter(|s| matches!(s, Source::Result(_))).count();
        let mut seen = 0;
        job.run(&made.piece, &made.from, from, usize::MAX, &mut |_, i, rows, given| {
            if only_result {
                return out.write(rows);
            }
            for ((source, &at), &(_, columns)) in made.sources.iter().zip(&to).zip(&self.values) {
                let place = &mut sample[at..at + columns * tokens];
                match *source {
                    Source::Result(k) if k == i => place.copy_from_slice(rows),
                    Source::Kept(k) if seen == 0 => {
                        place.copy_from_slice(&given[old[k]..][..columns * tokens])
                    }
                    _ => {}
                }
            }
            seen += 1;
            if seen == results {
                seen = 0;
                out.write(&sample)?;
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
    /// Runs `most` samples; `see` gets the sample, the index of the result, its rows, and all rows of the sample at the point
    /// before.
    fn run(
        &self,
        piece: &Piece,
        boundary: &Boundary,
        rows: &Rows,
        most: usize,
        see: &mut SeeBoth<'_>,
    ) -> Result<()> {
        let tokens = self.samples.windows[0].len();
        let ready = super::runnable(&piece.module, self.store, self.bf16)?;
        let mut runner = self.exec.prepare(&ready, self.store, tokens)?;
        let ids = ready.main.params.iter().filter(|&&p| ready.main.ty(p).elem == ElemTy::I32).count();
        let zeros = vec![0; tokens];
        let len = boundary.sample_len(tokens);
        let mut given = vec![0.0; len];
        for (i, window) in self.samples.windows.iter().enumerate().take(most) {
            if self.interrupt.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
                return Err(Diag::system("interrupted"));
            }
            rows.read(i * len, &mut given)?;
            let mut inputs = vec![];
            let mut rest = &given[..];
            for &(_, columns) in &boundary.values {
                let (rows, after) = rest.split_at(columns * tokens);
                inputs.push(rows);
                rest = after;
            }
            // Segments, where a model has them, are 0.
            let ids: Vec<&[u32]> =
                std::iter::once(&window[..]).chain(std::iter::repeat(&zeros[..])).take(ids).collect();
            runner.run(&ids, &inputs, &mut |k, rows| see(i, k, rows, &given))?;
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
