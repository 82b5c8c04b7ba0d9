//! An engine's weights in memory: the mapped file, of which parts can be moved to huge pages.
//!
//! A mapped file mostly lies in pages of 4 KiB, and looking their addresses up costs bandwidth when every token reads
//! all weights. Anonymous memory can have pages of 2 MiB. So weights are moved, a chunk of 2 MiB at a time: a copy is
//! made elsewhere and then takes the place of the file's pages under **the same address**, with one `mremap`. What holds:
//! - The bytes under an address never change, and reading them is allowed at any time, from any thread, also while
//!   their chunk moves: a reader sees the file's page or the copy, or waits for the kernel in between.
//! - A moved chunk's file pages are released at once, so that moving takes no more than a chunk per worker at a time.
//! - Chunks are copied by the worker that will read them most, which is where the kernel then places the memory.
//! - Moving is only ever an improvement: whatever goes wrong, and when memory is short, the rest stays mapped.
//!
//! Only chunks with bytes that every token reads are moved. Chunks of a file that the system already keeps in huge pages
//! (some file systems of newer kernels do) stay where they are.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Blob;
use crate::mem::PAGE;
use crate::stats;

/// Bytes of a huge page, and of what is moved at once.
const CHUNK: usize = 2 << 20;

/// The weights' file in memory; see the module.
pub(crate) struct Weights {
    /// Where the file begins: a multiple of [`CHUNK`].
    base: NonNull<u8>,
    /// Bytes of the file; not 0.
    len: usize,
    /// The address space that `base` lies in, whole chunks.
    _place: Reserved,
    /// What moving needs; `None` when everything stays mapped.
    movers: Option<Movers>,
}

struct Movers {
    /// Where copies are made: as large as the place itself, so that a chunk has the same offset in both.
    staging: Reserved,
    file: OwnedFd,
    /// Tells whether a page is huge; `None` when the system does not.
    pagemap: Option<OwnedFd>,
    /// Chunks that every token reads, ascending.
    chunks: Vec<Chunk>,
    /// Chunks nobody has claimed yet.
    left: AtomicU64,
    /// Bytes that have been moved.
    moved: AtomicU64,
    /// Nanoseconds workers have spent on it.
    nanos: AtomicU64,
    /// Set when something went wrong: the rest stays mapped.
    stopped: AtomicBool,
}

struct Chunk {
    /// First byte in the file.
    start: usize,
    /// The middle of the chunk as a share of the blob it lies in, in 1/2^16: the worker that reads this share moves it.
    share: u32,
    claimed: AtomicBool,
}

/// How far the weights have moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes of the chunks that are to be moved; 0 when all weights stay mapped.
    pub wanted_bytes: u64,
    /// Bytes moved so far.
    pub moved_bytes: u64,
    /// Time all workers together have spent on it, in nanoseconds.
    pub nanos: u64,
    /// Whether nothing is left to move.
    pub done: bool,
}

// SAFETY: the memory is read-only to everyone and mapped until the last owner drops it; a move replaces pages by equal
// ones under one system call. Everything else is atomic or constant.
unsafe impl Send for Weights {}
// SAFETY: as above.
unsafe impl Sync for Weights {}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Weights")
            .field("len", &self.len)
            .field("moved", &self.moved())
            .finish_non_exhaustive()
    }
}

impl Weights {
    /// Maps `file`, which has `len` bytes, not 0. With `movable`, chunks of streamed `blobs` may be moved later.
    pub(crate) fn map(file: File, len: usize, blobs: &[Blob], movable: bool) -> Result<Weights> {
        let place = Reserved::new(len)?;
        map_file(&file, 0, len, place.base)
            .map_err(|e| Error::new(ErrorKind::Io, format!("cannot map the file: {e}")))?;
        let movers = if movable { Movers::new(file, len, blobs) } else { None };
        Ok(Weights { base: place.base, len, _place: place, movers })
    }

    /// All bytes of the file.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `len` bytes at `base` are mapped and readable as long as `self` lives, and never change.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    /// Maps the pages of streamed `blobs`; where the system cannot do that, they are mapped as they are touched.
    pub(crate) fn prefault(&self, blobs: &[Blob]) {
        for chunk in chunks(self.len, blobs) {
            let at = self.base.as_ptr().wrapping_add(chunk.start);
            // SAFETY: the range is mapped; the advice changes no bytes.
            unsafe { libc::madvise(at.cast(), CHUNK.min(self.len - chunk.start), libc::MADV_POPULATE_READ) };
        }
    }

    /// Whether something is left to move.
    pub(crate) fn moving(&self) -> bool {
        self.movers.as_ref().is_some_and(Movers::moving)
    }

    /// Moves chunks that worker `worker` of `workers` reads, until `deadline`; at least one, if there is one.
    pub(crate) fn advance(&self, worker: usize, workers: usize, deadline: Instant) {
        let Some(movers) = &self.movers else { return };
        let mut now = Instant::now();
        for chunk in &movers.chunks {
            let owner = (chunk.share as usize * workers) >> 16;
            if owner != worker || chunk.claimed.swap(true, Ordering::AcqRel) {
                continue;
            }
            movers.left.fetch_sub(1, Ordering::AcqRel);
            if movers.stopped.load(Ordering::Acquire) {
                return;
            }
            if self.move_chunk(movers, chunk.start).is_err() {
                movers.stopped.store(true, Ordering::Release);
            }
            let start = now;
            now = Instant::now();
            let nanos = u64::try_from((now - start).as_nanos()).unwrap_or(u64::MAX);
            movers.nanos.fetch_add(nanos, Ordering::Relaxed);
            if now >= deadline {
                return;
            }
        }
    }

    /// How far moving has come.
    pub(crate) fn moved(&self) -> Moved {
        let Some(movers) = &self.movers else { return Moved { done: true, ..Moved::default() } };
        Moved {
            wanted_bytes: (movers.chunks.len() * CHUNK) as u64,
            moved_bytes: movers.moved.load(Ordering::Relaxed),
            nanos: movers.nanos.load(Ordering::Relaxed),
            done: !movers.moving(),
        }
    }

    /// Copies the chunk at `start` and puts the copy in its place.
    fn move_chunk(&self, movers: &Movers, start: usize) -> std::io::Result<()> {
        let here = self.base.as_ptr().wrapping_add(start);
        // Only a page that has been touched tells how large it is.
        // SAFETY: the chunk begins inside the file.
        unsafe { here.read_volatile() };
        if movers.is_huge(here) {
            return Ok(());
        }
        let copy = movers.staging.base.as_ptr().wrapping_add(start);
        let len = CHUNK.min(self.len - start);
        // SAFETY: `len` bytes are mapped here and inside the staging's chunk, which is this worker's alone, because it
        // claimed the chunk; the rest of the last chunk stays zero.
        unsafe { std::ptr::copy_nonoverlapping(here, copy, len) };
        // SAFETY: the range is the staging's chunk.
        if unsafe { libc::mprotect(copy.cast(), CHUNK, libc::PROT_READ) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        // The address space of the copy stays reserved, so that nobody else's mapping comes to lie there.
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        // SAFETY: both ranges are whole chunks of reservations that `self` owns. The bytes under `here` are equal before
        // and after, and the system lets nobody see the moment between.
        let moved = unsafe { libc::mremap(copy.cast(), CHUNK, CHUNK, flags, here.cast::<libc::c_void>()) };
        if moved != here.cast() {
            let error = std::io::Error::last_os_error();
            // The system may already have taken the file's pages away; here they are again.
            map_file(&movers.file, start, len, NonNull::new(here).expect("inside a mapping"))?;
            return Err(error);
        }
        movers.moved.fetch_add(CHUNK as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl Movers {
    /// `None` when nothing can or need be moved.
    fn new(file: File, len: usize, blobs: &[Blob]) -> Option<Movers> {
        if !huge_pages_allowed() {
            return None;
        }
        let chunks = chunks(len, blobs);
        // Mapped pages can be dropped when memory is short, moved ones cannot: some must be left.
        let needed = (chunks.len() * CHUNK) as u64;
        let available = stats::available_memory_bytes().unwrap_or(u64::MAX);
        if chunks.is_empty() || needed + needed / 4 > available {
            return None;
        }
        let staging = Reserved::new(len).ok()?;
        staging.open().ok()?;
        let pagemap = File::open("/proc/self/pagemap").ok().map(OwnedFd::from);
        let left = AtomicU64::new(chunks.len() as u64);
        let (moved, nanos, stopped) = Default::default();
        Some(Movers { staging, file: file.into(), pagemap, chunks, left, moved, nanos, stopped })
    }

    fn moving(&self) -> bool {
        self.left.load(Ordering::Acquire) > 0 && !self.stopped.load(Ordering::Acquire)
    }

    /// Whether the chunk at `start` is a huge page already; false when the system does not tell.
    fn is_huge(&self, start: *mut u8) -> bool {
        let Some(pagemap) = &self.pagemap else { return false };
        let mut found = PageRegion::default();
        let mut scan = PageScan {
            size: size_of::<PageScan>() as u64,
            start: start as u64,
            end: start as u64 + CHUNK as u64,
            regions: (&raw mut found) as u64,
            n_regions: 1,
            category_mask: PAGE_IS_HUGE,
            return_mask: PAGE_IS_HUGE,
            ..PageScan::default()
        };
        // SAFETY: the structures have the layout of the system's, which writes one region into `found`.
        let n = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
        n == 1 && found.start <= scan.start && found.end >= scan.end
    }
}

/// The chunks of a file of `len` bytes that hold bytes of streamed blobs.
fn chunks(len: usize, blobs: &[Blob]) -> Vec<Chunk> {
    let mut shares = std::collections::BTreeMap::new();
    for blob in blobs.iter().filter(|blob| blob.streamed && blob.len > 0) {
        let (start, end) = (blob.offset as usize, (blob.offset + blob.len) as usize);
        for chunk in start / CHUNK..end.div_ceil(CHUNK) {
            // The middle of what the chunk holds of the blob; of several blobs the one it holds most of counts.
            let (from, to) = (start.max(chunk * CHUNK), end.min((chunk + 1) * CHUNK));
            let share = ((((from + to) / 2 - start) as u128) << 16) / (end - start) as u128;
            let entry = shares.entry(chunk).or_insert((0, 0));
            if to - from > entry.0 {
                *entry = (to - from, share as u32);
            }
        }
    }
    let chunk = |(chunk, (_, share))| Chunk { start: chunk * CHUNK, share, claimed: AtomicBool::new(false) };
    shares.into_iter().map(chunk).filter(|chunk| chunk.start < len).collect()
}

/// Whether the system gives huge pages to those who ask.
fn huge_pages_allowed() -> bool {
    let setting = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    setting.is_ok_and(|text| !text.contains("[never]"))
}

/// Maps `len` bytes of `file` from `start` on read-only at `at`, which lies in a reservation of the caller's.
fn map_file(file: &impl AsRawFd, start: usize, len: usize, at: NonNull<u8>) -> std::io::Result<()> {
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let (fd, start) = (file.as_raw_fd(), start as libc::off_t);
    // SAFETY: the range lies in the caller's reservation; reading it is sound because an engine's file must not change
    // while the engine is open.
    let mapped = unsafe { libc::mmap(at.as_ptr().cast(), len, libc::PROT_READ, flags, fd, start) };
    if mapped == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Address space of whole chunks, at a multiple of [`CHUNK`]; unmapped with all that lies in it when it is dropped.
struct Reserved {
    base: NonNull<u8>,
    len: usize,
}

impl Reserved {
    /// Space for `len` bytes that nobody can touch yet.
    fn new(len: usize) -> Result<Reserved> {
        let failed = |why: &str| {
            Error::new(ErrorKind::Memory, format!("cannot reserve {len} bytes for weights: {why}"))
        };
        let len = len.checked_next_multiple_of(CHUNK).ok_or_else(|| failed("too large"))?;
        let whole = len.checked_add(CHUNK).filter(|&n| n <= isize::MAX as usize);
        let whole = whole.ok_or_else(|| failed("too large"))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address the kernel chooses touches no existing memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(failed(&std::io::Error::last_os_error().to_string()));
        }
        let start = start.cast::<u8>();
        let before = start.align_offset(CHUNK);
        let base = start.wrapping_add(before);
        // SAFETY: both parts lie in the mapping just made, outside of the chunks that are kept; page by page, since the
        // system's pages and the chunks are both multiples of `PAGE`.
        unsafe {
            debug_assert!(before.is_multiple_of(PAGE));
            if before > 0 {
                libc::munmap(start.cast(), before);
            }
            if whole > before + len {
                libc::munmap(base.wrapping_add(len).cast(), whole - before - len);
            }
        }
        Ok(Reserved { base: NonNull::new(base).expect("inside a mapping"), len })
    }

    /// Makes all of it readable and writable, in huge pages where they are to be had.
    fn open(&self) -> std::io::Result<()> {
        let at = self.base.as_ptr().cast();
        // SAFETY: the range is this reservation; nothing lies in it yet.
        let done = unsafe {
            libc::mprotect(at, self.len, libc::PROT_READ | libc::PROT_WRITE) == 0
                && libc::madvise(at, self.len, libc::MADV_HUGEPAGE) == 0
        };
        if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: the range is this reservation's; its owner's users are gone.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// `PAGEMAP_SCAN` of `linux/fs.h`: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong =
    (3 << 30) | ((size_of::<PageScan>() as libc::c_ulong) << 16) | ((b'f' as libc::c_ulong) << 8) | 16;
/// The page is part of a huge page that is mapped as such.
const PAGE_IS_HUGE: u64 = 1 << 6;

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct PageScan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    n_regions: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::time::Duration;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(bytes).expect("it is written");
        file
    }

    fn blob(offset: usize, len: usize, streamed: bool) -> Blob {
        Blob { offset: offset as u64, len: len as u64, streamed, ..Blob::default() }
    }

    fn noise(len: usize) -> Vec<u8> {
        (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
    }

    #[test]
    fn chunks_are_those_that_every_token_reads() {
        let starts = |len, blobs: &[Blob]| {
            chunks(len, blobs).iter().map(|c| (c.start / CHUNK, c.share)).collect::<Vec<_>>()
        };
        let half = 1 << 15;
        assert_eq!(starts(4 * CHUNK, &[blob(0, 3 * CHUNK, false), blob(3 * CHUNK, 8, true)]), [(3, half)]);
        assert_eq!(
            starts(4 * CHUNK, &[blob(0, 4 * CHUNK, true)]),
            [(0, half / 4), (1, half / 4 * 3), (2, half / 4 * 5), (3, half / 4 * 7)]
        );
        // The larger part decides: here the end of a blob of which the chunk has an eighth more.
        let (first, second) = (blob(0, CHUNK / 4 * 5, true), blob(CHUNK / 4 * 5, CHUNK / 8, true));
        assert_eq!(starts(2 * CHUNK, &[first, second]), [(0, (1 << 16) * 2 / 5), (1, (1 << 16) * 9 / 10)]);
        assert_eq!(starts(CHUNK, &[blob(0, 0, true)]), []);
    }

    #[test]
    fn bytes_stay_the_same_wherever_they_are() {
        // The last chunk is a part of one; the file's end is no multiple of a page.
        let bytes = noise(5 * CHUNK + 12345);
        let blobs =
            [blob(0, CHUNK / 2, false), blob(CHUNK, CHUNK, true), blob(3 * CHUNK, 2 * CHUNK + 12345, true)];
        let weights = Weights::map(file(&bytes), bytes.len(), &blobs, true).expect("it is mapped");
        assert!(weights.bytes() == bytes);
        if weights.movers.is_none() {
            return eprintln!("bytes_stay_the_same_wherever_they_are: half skipped, no huge pages here");
        }
        let late = || Instant::now() - Duration::from_secs(1);
        let mut rounds = 0;
        while weights.moving() {
            // Past the deadline each call still moves one chunk.
            (0..2).for_each(|worker| weights.advance(worker, 2, late()));
            assert!(weights.bytes() == bytes, "round {rounds}");
            rounds += 1;
            assert!(rounds <= 4, "four chunks take at most four rounds");
        }
        let moved = weights.moved();
        assert!(moved.done && moved.wanted_bytes == 4 * CHUNK as u64, "{moved:?}");
        assert!(moved.moved_bytes <= moved.wanted_bytes);
    }

    #[test]
    fn readers_see_the_same_bytes_while_chunks_move() {
        let bytes = noise(24 * CHUNK);
        let blobs = [blob(0, bytes.len(), true)];
        let weights = Weights::map(file(&bytes), bytes.len(), &blobs, true).expect("it is mapped");
        let begun = std::sync::Barrier::new(4);
        std::thread::scope(|scope| {
            for worker in 0..2 {
                let (weights, begun) = (&weights, &begun);
                scope.spawn(move || {
                    begun.wait();
                    weights.advance(worker, 2, Instant::now() + Duration::from_secs(60));
                });
            }
            for _ in 0..2 {
                let (weights, begun, bytes) = (&weights, &begun, &bytes);
                scope.spawn(move || {
                    begun.wait();
                    while weights.moving() {
                        assert!(weights.bytes() == *bytes);
                    }
                    assert!(weights.bytes() == *bytes);
                });
            }
        });
        assert!(!weights.moving());
    }

    #[test]
    fn weights_that_are_not_to_move_stay() {
        let bytes = noise(CHUNK + 1);
        let weights = Weights::map(file(&bytes), bytes.len(), &[blob(0, CHUNK, true)], false);
        let weights = weights.expect("it is mapped");
        assert!(!weights.moving() && weights.moved() == Moved { done: true, ..Moved::default() });
        weights.advance(0, 1, Instant::now());
        assert!(weights.bytes() == bytes);
    }
}
