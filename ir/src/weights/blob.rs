//! Writing blobs: bytes are hashed as they come, into memory or into a file that nobody sees until it is whole.

use super::digest::Digest;
use crate::diag::{Diag, Result};
use crate::formats::Format;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

/// Bytes gathered before they are hashed and written.
const BUFFER: usize = 1 << 18;

/// How old an unfinished file must be to be swept where files cannot be locked.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// Takes the bytes of one blob, in order.
pub struct BlobWriter {
    hasher: blake3::Hasher,
    len: u64,
    pending: Vec<u8>,
    to: To,
}

enum To {
    Memory(Vec<u8>),
    File { file: File, path: PathBuf },
}

/// What a finished [`BlobWriter`] leaves behind.
pub(super) struct Finished {
    pub(super) digest: Digest,
    pub(super) len: u64,
    pub(super) at: FinishedAt,
}

pub(super) enum FinishedAt {
    Memory(Vec<u8>),
    File(Unpublished),
}

/// A whole file that has not got its name yet; dropped, it is gone.
pub(super) struct Unpublished {
    path: PathBuf,
    /// Keeps the lock, and so the sweeper of another process away.
    _file: File,
}

impl BlobWriter {
    /// A writer into memory.
    pub(super) fn in_memory() -> BlobWriter {
        BlobWriter { hasher: blake3::Hasher::new(), len: 0, pending: vec![], to: To::Memory(vec![]) }
    }

    /// A writer into a new file under `tmp`.
    pub(super) fn in_dir(tmp: &Path) -> Result<BlobWriter> {
        let (file, path) = create_locked(tmp).map_err(|e| io_problem(tmp, "create a file in", &e))?;
        Ok(BlobWriter { hasher: blake3::Hasher::new(), len: 0, pending: vec![], to: To::File { file, path } })
    }

    /// Appends bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.len += bytes.len() as u64;
        if self.pending.len() + bytes.len() >= BUFFER {
            self.flush_pending()?;
            if bytes.len() >= BUFFER {
                return self.put(bytes);
            }
        }
        self.pending.extend_from_slice(bytes);
        Ok(())
    }

    /// Appends one row of codes of a format of at most 8 bits, one code per byte: packs them, and ends on a byte.
    pub fn write_row_codes(&mut self, format: &Format, codes: &[u8]) -> Result<()> {
        let mut packed = vec![0; format.packed_len(codes.len())];
        format.pack(codes, &mut packed);
        self.write(&packed)
    }

    /// Appends numbers as codes of a plain float format, rounding to nearest even.
    pub fn write_f32(&mut self, to: crate::ty::Float, xs: &[f32]) -> Result<()> {
        let mut bytes = Vec::with_capacity(1 << 12);
        for part in xs.chunks(1 << 10) {
            bytes.clear();
            super::view::float_bytes(to, part, &mut bytes);
            self.write(&bytes)?;
        }
        Ok(())
    }

    /// Bytes taken so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing was written yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Ends the blob.
    pub(super) fn finish(mut self) -> Result<Finished> {
        self.flush_pending()?;
        let digest = Digest(*self.hasher.finalize().as_bytes());
        let at = match std::mem::replace(&mut self.to, To::Memory(vec![])) {
            To::Memory(bytes) => FinishedAt::Memory(bytes),
            To::File { file, path } => FinishedAt::File(Unpublished { path, _file: file }),
        };
        Ok(Finished { digest, len: self.len, at })
    }

    fn flush_pending(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        self.put(&pending)?;
        self.pending = pending;
        self.pending.clear();
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        match &mut self.to {
            To::Memory(all) => all.extend_from_slice(bytes),
            To::File { file, path } => file.write_all(bytes).map_err(|e| io_problem(path, "write", &e))?,
        }
        Ok(())
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        if let To::File { path, .. } = &self.to {
            // The file is unfinished; if it cannot be removed now, the next sweep tries again.
            let _ = fs::remove_file(path);
        }
    }
}

impl Unpublished {
    /// Gives the file its name, replacing what had it.
    pub(super) fn publish(mut self, name: &Path) -> Result<()> {
        fs::rename(&self.path, name).map_err(|e| io_problem(name, "rename a file to", &e))?;
        self.path = PathBuf::new();
        Ok(())
    }
}

impl Drop for Unpublished {
    fn drop(&mut self) {
        if self.path != Path::new("") {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Creates a file of an unused name and locks it for as long as it is open.
fn create_locked(tmp: &Path) -> io::Result<(File, PathBuf)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = tmp.join(format!("{}-{n}", std::process::id()));
        let file = match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(e) => return Err(e),
        };
        // A sweeper may have come between the two calls. Then the file is locked by it, or already unlinked.
        match file.try_lock() {
            Ok(()) if file.metadata()?.nlink() > 0 => return Ok((file, path)),
            Ok(()) | Err(TryLockError::WouldBlock) => continue,
            // Where files cannot be locked, sweepers go by age.
            Err(TryLockError::Error(_)) => return Ok((file, path)),
        }
    }
}

/// Removes the files under `tmp` whose writers are gone.
pub(super) fn sweep(tmp: &Path) -> Result<()> {
    for entry in fs::read_dir(tmp).map_err(|e| io_problem(tmp, "list", &e))? {
        let Ok(entry) = entry else { continue };
        let path = entry.path();
        // A file that vanishes in between was swept or published by its owner.
        let Ok(file) = File::open(&path) else { continue };
        let abandoned = match file.try_lock() {
            Ok(()) => true,
            Err(TryLockError::WouldBlock) => false,
            Err(TryLockError::Error(_)) => {
                let modified = file.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
                modified.elapsed().is_ok_and(|age| age > ABANDONED)
            }
        };
        // Whoever published the file in between had it locked, so a lock on it means it still has this name or none.
        if abandoned {
            let _ = fs::remove_file(&path);
        }
    }
    Ok(())
}

/// A file operation that failed.
pub(super) fn io_problem(path: &Path, doing: &str, error: &io::Error) -> Diag {
    Diag::system(format!("cannot {doing} {}: {error}", path.display()))
}
