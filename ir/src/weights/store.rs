//! The store: files and blobs that weights are read from, and the record of what was derived from what.
//!
//! On disk a store is three directories. `blobs/<digest>` holds bytes under the digest of those bytes;
//! `recipes/<digest of the recipe>` lists the blobs that the recipe made; `tmp/` holds what is being written. A file
//! gets its name by a rename when it is whole, and a recipe gets its name after all its blobs. So a process killed at
//! any point leaves a valid store, and two processes may share one.

use super::blob::{self, BlobWriter, Finished, FinishedAt, io_problem};
use super::digest::{Digest, Fields, Recipe};
use super::view::{Mapping, Source, WeightView};
use super::{WeightDecl, WeightSource, Weights, problem, resolve};
use crate::diag::{Diag, Result};
use crate::entity::{Entity, ShardId, WeightId};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Reads weights and keeps derived ones. All methods may be called from several threads.
pub struct Store {
    dir: Option<PathBuf>,
    /// The folder of a store whose blobs are read here too, and never written.
    base: Option<PathBuf>,
    verify: bool,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    shards: BTreeMap<usize, Arc<Mapping>>,
    /// Digests of file ranges, by shard, first byte and length.
    ranges: BTreeMap<(usize, u64, u64), Digest>,
    /// Blobs of a store without a directory.
    blobs: BTreeMap<Digest, Arc<Mapping>>,
    /// Recipes of a store without a directory.
    recipes: BTreeMap<Digest, Vec<Output>>,
    /// Blobs whose content was checked.
    verified: BTreeSet<Digest>,
    stats: StoreStats,
}

/// The bytes of a mapped file.
#[derive(Clone)]
pub struct ShardBytes(Arc<Mapping>);

impl AsRef<[u8]> for ShardBytes {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// One blob that a recipe made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Output {
    digest: Digest,
    len: u64,
}

/// What a store made and what it found made already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Recipes carried out.
    pub made: u64,
    /// Recipes found carried out.
    pub reused: u64,
    /// Bytes of the blobs that were made.
    pub bytes_made: u64,
    /// Bytes of the blobs that were found.
    pub bytes_reused: u64,
}

/// The first line of every recipe file.
const RECIPE_HEAD: &str = "quantc recipe 1";

impl Store {
    /// A store that keeps derived weights in memory.
    pub fn in_memory() -> Store {
        Store { dir: None, base: None, verify: false, inner: Mutex::default() }
    }

    /// The store in the directory `dir`, which is made when it does not exist. Files left by processes that were
    /// killed are removed.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Store> {
        let dir = dir.into();
        for sub in ["blobs", "recipes", "tmp"] {
            let sub = dir.join(sub);
            fs::create_dir_all(&sub).map_err(|e| io_problem(&sub, "create", &e))?;
        }
        blob::sweep(&dir.join("tmp"))?;
        Ok(Store { dir: Some(dir), base: None, verify: false, inner: Mutex::default() })
    }

    /// A store in memory that also reads what this one holds now: for weights that are derived for one use.
    pub fn scratch(&self) -> Store {
        let inner = self.lock();
        let kept = Inner {
            shards: inner.shards.clone(),
            ranges: inner.ranges.clone(),
            blobs: inner.blobs.clone(),
            ..Inner::default()
        };
        let base = self.dir.clone().or_else(|| self.base.clone());
        Store { dir: None, base, verify: self.verify, inner: Mutex::new(kept) }
    }

    /// Also checks the content of each blob against its name, once, before it is used.
    pub fn verifying(mut self) -> Store {
        self.verify = true;
        self
    }

    /// Maps the file at `path` as the shard `id`; a shard added before under this id is replaced.
    pub fn add_shard(&self, id: ShardId, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let map = Mapping::open(path).map_err(|e| {
            let of = if e.kind() == std::io::ErrorKind::NotFound { Diag::input } else { Diag::system };
            of(format!("cannot read {}: {e}", path.display()))
        })?;
        let mut inner = self.lock();
        inner.shards.insert(id.index(), Arc::new(map));
        inner.ranges.retain(|&(shard, ..), _| shard != id.index());
        Ok(())
    }

    /// The length of a shard in bytes, if it was added.
    pub fn shard_len(&self, id: ShardId) -> Option<u64> {
        self.lock().shards.get(&id.index()).map(|m| m.bytes().len() as u64)
    }

    /// The bytes of a shard, which stay mapped as long as they are held.
    pub fn shard(&self, id: ShardId) -> Option<ShardBytes> {
        self.lock().shards.get(&id.index()).cloned().map(ShardBytes)
    }

    /// A view of the weight `id`. Nothing is read until rows are.
    pub fn view<'a>(&self, weights: &'a Weights, id: WeightId) -> Result<WeightView<'a>> {
        let decl = &weights[resolve(weights, id)?];
        let (source, len) = match &decl.source {
            WeightSource::File { shard, at, len } => {
                let (map, start) = self.range(decl, *shard, *at, *len)?;
                (Source::Mapped { map, start }, *len)
            }
            WeightSource::Blob(digest) => {
                let map =
                    self.blob(*digest).map_err(|d| d.context(format!("reading weight @{}", decl.name)))?;
                let len = map.bytes().len() as u64;
                (Source::Mapped { map, start: 0 }, len)
            }
            WeightSource::Inline(bytes) => (Source::Inline(bytes), bytes.len() as u64),
            WeightSource::Splat(x) => {
                if !decl.ty.elem.is_float() {
                    return Err(problem(decl, format!("of type {} cannot be one number repeated", decl.ty)));
                }
                (Source::Splat(x.get()), decl.ty.stored_bytes().unwrap_or(u64::MAX))
            }
            WeightSource::Alias(_) => return Err(Diag::bug("an alias resolved to an alias")),
        };
        WeightView::new(decl, source, len)
    }

    /// The digest of type and content: equal digests mean equal weights, so recipes name their inputs by it.
    ///
    /// (Repeated numbers count as other content than the same numbers written out.)
    pub fn digest(&self, weights: &Weights, id: WeightId) -> Result<Digest> {
        let decl = &weights[resolve(weights, id)?];
        let content = match &decl.source {
            WeightSource::File { shard, at, len } => {
                let key = (shard.index(), *at, *len);
                let known = self.lock().ranges.get(&key).copied();
                match known {
                    Some(digest) => digest,
                    None => {
                        let digest = self.view(weights, id)?.content_digest();
                        self.lock().ranges.insert(key, digest);
                        digest
                    }
                }
            }
            WeightSource::Blob(digest) => *digest,
            WeightSource::Inline(bytes) => Digest::of(bytes),
            WeightSource::Splat(x) => {
                let mut h = Fields::new("quantc splat 1");
                h.field(&x.get().to_bits().to_le_bytes());
                h.finish()
            }
            WeightSource::Alias(_) => return Err(Diag::bug("an alias resolved to an alias")),
        };
        let mut h = Fields::new("quantc weight 1");
        h.field(decl.ty.to_string().as_bytes());
        h.field(&content.0);
        Ok(h.finish())
    }

    /// Whether `recipe` was carried out before and its `outputs` blobs are there.
    pub fn has(&self, recipe: &Recipe, outputs: usize) -> bool {
        self.look_up(recipe.digest(), outputs).is_some()
    }

    /// The blobs that `recipe` makes: found when it was carried out before, else made by `f`, which writes `outputs`
    /// blobs. `f` must write the same bytes whenever the recipe is the same.
    ///
    /// Two threads asking for one recipe at the same time may both run `f`; they get the same blobs, and only the
    /// first counts as having made them.
    pub fn derive(
        &self,
        recipe: &Recipe,
        outputs: usize,
        f: &mut dyn FnMut(&mut [BlobWriter]) -> Result<()>,
    ) -> Result<Vec<Digest>> {
        let key = recipe.digest();
        if let Some(found) = self.look_up(key, outputs) {
            return Ok(self.count_reused(&found));
        }
        let mut writers = Vec::with_capacity(outputs);
        for _ in 0..outputs {
            writers.push(self.writer()?);
        }
        f(&mut writers).map_err(|d| d.context(format!("carrying out the step {}", recipe.step)))?;
        let finished: Vec<Finished> = writers.into_iter().map(BlobWriter::finish).collect::<Result<_>>()?;
        let made: Vec<Output> = finished.iter().map(|f| Output { digest: f.digest, len: f.len }).collect();

        // Another thread may have been here first; the lock makes one of the two the first.
        let mut inner = self.lock();
        let earlier = match &self.dir {
            None => inner.recipes.get(&key).cloned(),
            Some(dir) => read_recipe(&recipe_path(dir, key)),
        };
        if let Some(earlier) = earlier.filter(|e| e.len() == outputs && self.all_there(&inner, e)) {
            if earlier == made && !self.verify {
                drop(inner);
                return Ok(self.count_reused(&made));
            }
            if earlier != made {
                let text = format!("the step {} made different bytes from the same recipe", recipe.step);
                return Err(Diag::bug(text).help("raise the version of the step"));
            }
        }
        for Finished { digest, at, .. } in finished {
            self.publish(&mut inner, digest, at)?;
        }
        match &self.dir {
            None => {
                inner.recipes.insert(key, made.clone());
            }
            Some(dir) => write_recipe(dir, key, recipe, &made)?,
        }
        inner.stats.made += 1;
        inner.stats.bytes_made += made.iter().map(|o| o.len).sum::<u64>();
        Ok(made.iter().map(|o| o.digest).collect())
    }

    /// Keeps `bytes` as a blob.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest> {
        let mut writer = self.writer()?;
        writer.write(bytes)?;
        let Finished { digest, at, .. } = writer.finish()?;
        self.publish(&mut self.lock(), digest, at)?;
        Ok(digest)
    }

    /// The file of a blob, when the store has a directory. The blob need not exist.
    pub fn blob_path(&self, digest: Digest) -> Option<PathBuf> {
        if self.lock().blobs.contains_key(&digest) {
            return None;
        }
        self.dir.as_ref().or(self.base.as_ref()).map(|dir| blob_path(dir, digest))
    }

    /// The bytes of a blob.
    pub fn read_blob(&self, digest: Digest) -> Result<Vec<u8>> {
        Ok(self.blob(digest)?.bytes().to_vec())
    }

    /// What was made and reused since the store was opened.
    pub fn stats(&self) -> StoreStats {
        self.lock().stats
    }

    /// The directory, unless the store is in memory.
    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code of a caller runs under the lock, and each change of the state is one insertion.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writer(&self) -> Result<BlobWriter> {
        match &self.dir {
            None => Ok(BlobWriter::in_memory()),
            Some(dir) => BlobWriter::in_dir(&dir.join("tmp")),
        }
    }

    /// The mapping of a shard and where the range starts in it, once the range is known to lie inside.
    fn range(&self, decl: &WeightDecl, shard: ShardId, at: u64, len: u64) -> Result<(Arc<Mapping>, usize)> {
        let map = self.lock().shards.get(&shard.index()).cloned();
        let map =
            map.ok_or_else(|| Diag::bug(format!("weight @{} lies in a file that is not open", decl.name)))?;
        let size = map.bytes().len() as u64;
        let inside = at.checked_add(len).is_some_and(|end| end <= size);
        let start = usize::try_from(at).ok().filter(|_| inside);
        let start = start.ok_or_else(|| {
            problem(decl, format!("lies at bytes {at}..+{len} of a file of {size} bytes"))
                .help("the file is cut short, or its header is wrong; fetch it again")
        })?;
        Ok((map, start))
    }

    fn blob(&self, digest: Digest) -> Result<Arc<Mapping>> {
        if let Some(found) = self.lock().blobs.get(&digest) {
            return Ok(found.clone());
        }
        let Some(dir) = self.dir.as_ref().or(self.base.as_ref()) else {
            return Err(Diag::input(format!("the store has no blob {digest}")));
        };
        let path = blob_path(dir, digest);
        let map = Mapping::open(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Diag::input(format!("the store has no blob {digest}"))
                .in_file(dir.display().to_string())
                .help("compile again: blobs that are missing are derived again"),
            _ => io_problem(&path, "read", &e),
        })?;
        if self.verify && !self.lock().verified.contains(&digest) {
            if Digest::of(map.bytes()) != digest {
                return Err(
                    Diag::input(format!("the blob {digest} is corrupt")).in_file(path.display().to_string())
                );
            }
            self.lock().verified.insert(digest);
        }
        Ok(Arc::new(map))
    }

    /// The outputs recorded for a recipe, when they are as many as expected and all still there.
    fn look_up(&self, key: Digest, outputs: usize) -> Option<Vec<Output>> {
        let found = match &self.dir {
            None => self.lock().recipes.get(&key).cloned(),
            Some(dir) => read_recipe(&recipe_path(dir, key)),
        }?;
        let there = found.len() == outputs && self.all_there(&self.lock(), &found);
        // A corrupt blob is made again, which replaces it.
        let sound = there && (!self.verify || found.iter().all(|o| self.blob(o.digest).is_ok()));
        sound.then_some(found)
    }

    /// Whether all blobs exist with their recorded lengths.
    fn all_there(&self, inner: &Inner, outputs: &[Output]) -> bool {
        outputs.iter().all(|o| match &self.dir {
            None => inner.blobs.contains_key(&o.digest),
            Some(dir) => {
                fs::metadata(blob_path(dir, o.digest)).is_ok_and(|m| m.is_file() && m.len() == o.len)
            }
        })
    }

    fn count_reused(&self, outputs: &[Output]) -> Vec<Digest> {
        let stats = &mut self.lock().stats;
        stats.reused += 1;
        stats.bytes_reused += outputs.iter().map(|o| o.len).sum::<u64>();
        outputs.iter().map(|o| o.digest).collect()
    }

    fn publish(&self, inner: &mut Inner, digest: Digest, at: FinishedAt) -> Result<()> {
        match (at, &self.dir) {
            (FinishedAt::Memory(bytes), _) => {
                inner.blobs.entry(digest).or_insert_with(|| Arc::new(Mapping::Heap(bytes)));
            }
            // A blob of that name is replaced: it has the same bytes, or it is damaged.
            (FinishedAt::File(file), Some(dir)) => file.publish(&blob_path(dir, digest))?,
            (FinishedAt::File(_), None) => return Err(Diag::bug("a store in memory wrote a file")),
        }
        Ok(())
    }
}

fn blob_path(dir: &Path, digest: Digest) -> PathBuf {
    dir.join("blobs").join(digest.to_string())
}

fn recipe_path(dir: &Path, key: Digest) -> PathBuf {
    dir.join("recipes").join(key.to_string())
}

/// Writes what a recipe made. The step and its options are there for people to read.
fn write_recipe(dir: &Path, key: Digest, recipe: &Recipe, outputs: &[Output]) -> Result<()> {
    let mut text = format!("{RECIPE_HEAD}\n");
    for o in outputs {
        // Writing to a string does not fail.
        let _ = writeln!(text, "blob {} {}", o.digest, o.len);
    }
    let _ = writeln!(text, "step {:?} {} {:?}", recipe.step, recipe.version, recipe.options);
    for input in &recipe.inputs {
        let _ = writeln!(text, "input {input}");
    }
    text.push_str("end\n");
    let mut writer = BlobWriter::in_dir(&dir.join("tmp"))?;
    writer.write(text.as_bytes())?;
    match writer.finish()?.at {
        FinishedAt::File(file) => file.publish(&recipe_path(dir, key)),
        FinishedAt::Memory(_) => Err(Diag::bug("a recipe was written into memory")),
    }
}

/// What a recipe made, if that is recorded and the record is whole.
fn read_recipe(path: &Path) -> Option<Vec<Output>> {
    let text = fs::read_to_string(path).ok()?;
    let body = text.strip_prefix(RECIPE_HEAD)?.strip_prefix('\n')?.strip_suffix("end\n")?;
    let outputs = body.lines().filter_map(|line| line.strip_prefix("blob ")).map(|line| {
        let (digest, len) = line.split_once(' ')?;
        Some(Output { digest: digest.parse().ok()?, len: len.parse().ok()? })
    });
    outputs.collect()
}
