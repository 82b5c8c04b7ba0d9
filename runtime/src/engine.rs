//! Opens an engine's folder: checks every file, maps the weights, loads the kernels.
//!
//! What holds for an open engine:
//! - the manifest is valid, and this machine has the instruction sets of the engine's target;
//! - every listed file has the length the manifest says, and kernels its digest;
//! - weights have their digests, when asked to verify them; other files are compared with theirs when they are read;
//! - every launch's symbol is in the object.
//!
//! Weights are mapped, not read: pages come from the file as they are touched and are shared between processes. What
//! every token reads then moves to huge pages, chunk by chunk between the steps of sessions, unless
//! [`OpenOptions::pages`] says otherwise. The file must not be changed while an engine is open.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use crate::cpu;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    self, Blob, GPU_KERNELS_FILE, GpuCode, GpuEntry, KERNELS_FILE, MANIFEST_FILE, Manifest, WEIGHTS_FILE,
};
use crate::gpu::{self, Loaded};
use crate::object::{KernelFn, MAX_OBJECT_BYTES, Object};
use crate::stats;
use crate::weights::{Moved, Weights};

/// How to open an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Compare the weights with their digests. It reads all of them once. [`Engine::verify_weights`] does it later.
    pub verify_weights: bool,
    /// Where weights lie.
    pub pages: Pages,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions { verify_weights: true, pages: Pages::Huge }
    }
}

/// A comparison of weights with their digests that is under way.
#[derive(Debug)]
pub struct Verifying(std::thread::JoinHandle<Result<()>>);

impl Verifying {
    /// Waits for it; fails when a weight differs from its digest.
    pub fn wait(self) -> Result<()> {
        let panicked = |_| Err(Error::new(ErrorKind::Worker, "the thread that verifies weights panicked"));
        self.0.join().unwrap_or_else(panicked)
    }
}

/// Where an engine's weights lie in memory. It changes speed and who shares memory, never results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// In the file's pages: processes that run the same engine share them, and the system may drop them.
    Mapped,
    /// What every token reads moves to huge pages of this process while sessions run; the rest stays in the file's.
    Huge,
}

/// An open engine; sessions share it.
#[derive(Debug)]
pub struct Engine {
    path: PathBuf,
    manifest: Manifest,
    /// `None` when the engine has no weights.
    weights: Option<Weights>,
    /// `None` when the kernels run on a GPU.
    object: Option<Object>,
    /// The kernel of each launch of each program; empty when they run on a GPU.
    kernels: Vec<Vec<KernelFn>>,
    /// The kernels that run on a GPU.
    gpu_kernels: Vec<GpuEntry>,
    /// What sessions have loaded onto a GPU, as long as there is one.
    loaded: Mutex<Weak<Loaded>>,
}

impl Engine {
    /// Opens the engine in the folder `path`.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Engine> {
        let path = path.as_ref();
        let manifest = read_manifest(path)?;
        cpu::check(&manifest.target).map_err(|e| e.at(path.display()))?;
        let mut object = None;
        let mut gpu_kernels = vec![];
        let mut weights = None;
        // What is copied to a GPU is read once.
        let pages = if manifest.gpu.is_some() { Pages::Mapped } else { options.pages };
        for file in &manifest.files {
            let at = path.join(&file.name);
            match file.name.as_str() {
                GPU_KERNELS_FILE if manifest.gpu.is_some() => {
                    let code = GpuCode::decode_file(&read_checked(&at, file)?);
                    gpu_kernels = code.map_err(|e| e.at(at.display()))?.kernels;
                }
                KERNELS_FILE => {
                    let bytes = read_checked(&at, file)?;
                    object = Some(Object::load(&bytes).map_err(|e| e.at(at.display()))?);
                }
                WEIGHTS_FILE => weights = map_weights(&at, file, &manifest.weights, pages)?,
                _ => drop(open_listed(&at, file)?),
            }
        }
        let kernels = match &object {
            Some(object) if manifest.gpu.is_none() => resolve_kernels(&manifest, object),
            _ if manifest.gpu.is_some() => Ok(vec![]),
            _ => return Err(Error::format(format!("{KERNELS_FILE} is not listed"))),
        };
        let kernels = kernels.map_err(|e| e.at(path.join(KERNELS_FILE).display()))?;
        let (path, loaded) = (path.to_owned(), Mutex::new(Weak::new()));
        let engine = Engine { path, manifest, weights, object, kernels, gpu_kernels, loaded };
        if options.verify_weights {
            engine.verify_weights()?;
        }
        Ok(engine)
    }

    /// Compares the weights with their digests, on all CPUs. Sessions may run meanwhile.
    pub fn verify_weights(&self) -> Result<()> {
        verify_weights(self.weight_file(), &self.manifest.weights)
            .map_err(|e| e.at(self.path.join(WEIGHTS_FILE).display()))
    }

    /// Starts to compare the weights with their digests, on a thread that takes only time that others leave. Whoever
    /// does not wait for what it returns may go on with damaged weights.
    pub fn verify_weights_beside(self: &Arc<Engine>) -> Result<Verifying> {
        let engine = Arc::clone(self);
        let thread = std::thread::Builder::new().name("quantc-verify".into()).spawn(move || {
            // SAFETY: the call changes this thread's priority and nothing else; a refusal is harmless. Threads it
            // starts have the same.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
            engine.verify_weights()
        });
        let failed = |e| Error::new(ErrorKind::Io, format!("cannot start a thread to verify weights: {e}"));
        Ok(Verifying(thread.map_err(failed)?))
    }

    /// Maps the pages of what every token reads, as far as the system does that at once. The first step then does not
    /// stop at each of them; to be called beside what else precedes it.
    pub fn prefault(&self) {
        if let Some(weights) = &self.weights {
            weights.prefault(&self.manifest.weights);
        }
    }

    /// How far the weights have moved to huge pages.
    pub fn moved(&self) -> Moved {
        self.weights.as_ref().map_or(Moved { done: true, ..Moved::default() }, Weights::moved)
    }

    /// The weights, when some of them are yet to be moved.
    pub(crate) fn moving(&self) -> Option<&Weights> {
        self.weights.as_ref().filter(|weights| weights.moving())
    }

    fn weight_file(&self) -> &[u8] {
        self.weights.as_ref().map_or(&[], Weights::bytes)
    }

    /// The engine's folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The manifest; it is valid.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The loaded kernels; `None` when they run on a GPU.
    pub fn object(&self) -> Option<&Object> {
        self.object.as_ref()
    }

    /// The kernels that run on a GPU, as the engine has them.
    pub fn gpu_kernels(&self) -> &[GpuEntry] {
        &self.gpu_kernels
    }

    /// Loads kernels and weights onto this machine's GPU, unless a session has them there. `progress` is told how many
    /// bytes of how many have been sent.
    pub fn load(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Arc<Loaded>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(|broken| broken.into_inner());
        if let Some(there) = loaded.upgrade() {
            return Ok(there);
        }
        let fresh = self.load_fresh(gpu::driver().map_err(|e| e.at(self.path.display()))?, progress)?;
        *loaded = Arc::downgrade(&fresh);
        Ok(fresh)
    }

    /// As [`Engine::load`], through a driver of the caller's. Sessions share it as long as the result, or one of them, lives.
    pub fn load_with(&self, driver: Box<dyn gpu::Driver>) -> Result<Arc<Loaded>> {
        let fresh = self.load_fresh(driver, &mut |_, _| {})?;
        *self.loaded.lock().unwrap_or_else(|broken| broken.into_inner()) = Arc::downgrade(&fresh);
        Ok(fresh)
    }

    fn load_fresh(
        &self,
        driver: Box<dyn gpu::Driver>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Arc<Loaded>> {
        let weight = |index: usize| self.weight(index).unwrap_or_default();
        let loaded = Loaded::new(driver, &self.manifest, &self.gpu_kernels, &weight, progress);
        loaded.map(Arc::new).map_err(|e| e.at(self.path.display()))
    }

    /// The bytes of weight `index`; `None` when there is no such weight.
    pub fn weight(&self, index: usize) -> Option<&[u8]> {
        let blob = self.manifest.weights.get(index)?;
        self.weight_file().get(blob.offset as usize..)?.get(..blob.len as usize)
    }

    /// The bytes of another listed file, compared with its digest; for example `tokenizer.json`.
    pub fn read_file(&self, name: &str) -> Result<Vec<u8>> {
        read_file(&self.path, &self.manifest, name)
    }

    /// The kernel of a launch; both indices are the manifest's.
    pub(crate) fn kernel(&self, program: usize, launch: usize) -> KernelFn {
        self.kernels[program][launch]
    }
}

/// Reads and validates the manifest of the engine in `folder`, without looking at any other file.
pub fn read_manifest(folder: &Path) -> Result<Manifest> {
    let at = folder.join(MANIFEST_FILE);
    let (file, len) = open_plain(&at)?;
    if len > format::MAX_MANIFEST_BYTES {
        let what = format!("the manifest has {len} bytes, more than {}", format::MAX_MANIFEST_BYTES);
        return Err(Error::format(what).at(at.display()));
    }
    let bytes = read_exactly(file, len, &at)?;
    let manifest = Manifest::decode_file(&bytes).map_err(|e| e.at(at.display()))?;
    manifest.validate().map_err(|e| e.at(at.display()))?;
    Ok(manifest)
}

/// The bytes of a file that the manifest lists, compared with its digest. It needs no machine that runs the engine.
pub fn read_file(folder: &Path, manifest: &Manifest, name: &str) -> Result<Vec<u8>> {
    let at = folder.join(name);
    match manifest.file(name) {
        Some(file) => read_checked(&at, file),
        None => Err(Error::input("the engine has no such file").at(at.display())),
    }
}

/// Opens a plain file; anything else (a pipe would wait for ever) is refused.
fn open_plain(path: &Path) -> Result<(fs::File, u64)> {
    let metadata = fs::metadata(path).map_err(|e| Error::io(path, "open the file", &e))?;
    if !metadata.is_file() {
        return Err(Error::new(ErrorKind::Io, "not a plain file").at(path.display()));
    }
    let file = fs::File::open(path).map_err(|e| Error::io(path, "open the file", &e))?;
    let len = file.metadata().map_err(|e| Error::io(path, "ask for the file's length", &e))?.len();
    Ok((file, len))
}

/// Opens a listed file and compares its length.
fn open_listed(path: &Path, listed: &format::File) -> Result<fs::File> {
    let (file, len) = open_plain(path)?;
    if len != listed.len {
        let what = format!("the file has {len} bytes, the manifest says {}", listed.len);
        return Err(Error::new(ErrorKind::Digest, what).at(path.display()));
    }
    Ok(file)
}

fn read_exactly(file: fs::File, len: u64, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0).min(MAX_OBJECT_BYTES));
    file.take(len).read_to_end(&mut bytes).map_err(|e| Error::io(path, "read the file", &e))?;
    Ok(bytes)
}

fn read_checked(path: &Path, listed: &format::File) -> Result<Vec<u8>> {
    let file = open_listed(path, listed)?;
    if listed.len > MAX_OBJECT_BYTES as u64 {
        let what = format!("the file has {} bytes, more than {MAX_OBJECT_BYTES}", listed.len);
        return Err(Error::format(what).at(path.display()));
    }
    let bytes = read_exactly(file, listed.len, path)?;
    compare(&listed.digest, &blake3::hash(&bytes)).map_err(|e| e.at(path.display()))?;
    Ok(bytes)
}

fn compare(listed: &[u8], found: &blake3::Hash) -> Result<()> {
    if listed == found.as_bytes() {
        return Ok(());
    }
    let what = format!("the contents have blake3 {found}, the manifest says {}", format::hex(listed));
    Err(Error::new(ErrorKind::Digest, what))
}

fn map_weights(path: &Path, listed: &format::File, blobs: &[Blob], pages: Pages) -> Result<Option<Weights>> {
    let file = open_listed(path, listed)?;
    let len =
        usize::try_from(listed.len).map_err(|_| Error::format("too large to map").at(path.display()))?;
    if len == 0 {
        return Ok(None);
    }
    let movable = pages == Pages::Huge;
    let weights = Weights::map(file, len, blobs, movable).map_err(|e| e.at(path.display()))?;
    // The file may have changed between asking for its length and mapping it.
    open_listed(path, listed)?;
    Ok(Some(weights))
}

/// Compares every blob with its digest, and every byte between blobs with zero, so that no byte goes unchecked.
fn verify_weights(bytes: &[u8], blobs: &[Blob]) -> Result<()> {
    let outside = |index: usize, blob: &Blob| {
        Error::format("lies outside the file").at(format_args!("weight {index} {:?}", blob.name))
    };
    let mut ranges = Vec::with_capacity(blobs.len());
    for (index, blob) in blobs.iter().enumerate() {
        let range = blob.offset as usize..blob.offset.saturating_add(blob.len) as usize;
        bytes.get(range.clone()).ok_or_else(|| outside(index, blob))?;
        ranges.push(range);
    }
    let next = AtomicUsize::new(0);
    let first_bad = AtomicUsize::new(usize::MAX);
    let verify_some = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(range) = ranges.get(index) else { return };
            if blake3::hash(&bytes[range.clone()]).as_bytes() != blobs[index].digest.as_slice() {
                first_bad.fetch_min(index, Ordering::Relaxed);
            }
        }
    };
    let helpers = stats::available_cpus().min(blobs.len()).saturating_sub(1);
    std::thread::scope(|scope| {
        for _ in 0..helpers {
            // When a thread cannot be started, the others do its part.
            let _started = std::thread::Builder::new().spawn_scoped(scope, verify_some);
        }
        verify_some();
    });
    let bad = first_bad.into_inner();
    if let Some(blob) = blobs.get(bad) {
        let found = blake3::hash(&bytes[ranges[bad].clone()]);
        return compare(&blob.digest, &found).map_err(|e| e.at(format_args!("weight {bad} {:?}", blob.name)));
    }
    ranges.sort_by_key(|range| (range.start, range.end));
    let mut end = 0;
    for range in ranges {
        check_zero(bytes, end, range.start)?;
        end = end.max(range.end);
    }
    check_zero(bytes, end, bytes.len())
}

fn check_zero(bytes: &[u8], start: usize, end: usize) -> Result<()> {
    if start < end && bytes[start..end].iter().any(|&byte| byte != 0) {
        let what = format!("the bytes {start}..{end} belong to no weight but are not zero");
        return Err(Error::new(ErrorKind::Digest, what));
    }
    Ok(())
}

fn resolve_kernels(manifest: &Manifest, object: &Object) -> Result<Vec<Vec<KernelFn>>> {
    let resolve = |launch: &format::Launch| {
        object.symbol(&launch.symbol).ok_or_else(|| {
            Error::object(format!("the object lacks `{}`, which `{}` calls", launch.symbol, launch.name))
        })
    };
    manifest.programs.iter().map(|program| program.launches.iter().map(resolve).collect()).collect()
}
