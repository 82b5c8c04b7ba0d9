//! Anonymous memory: zeroed, page-aligned, between two guard pages.
//!
//! Everything kernels write to (arena, states, scratch, inputs) and the loaded object lie in such mappings, so an
//! access that runs off an end stops at once and cannot touch a neighbour.

use std::ptr::NonNull;

use crate::error::{Error, ErrorKind, Result};

/// Bytes of a page; also the alignment of every mapping.
pub(crate) const PAGE: usize = 4096;

/// Protection of a part of a mapping. There is no "writable and executable".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    Read,
    ReadExecute,
}

/// A private anonymous mapping, readable and writable until [`Mapping::protect`] says otherwise.
pub(crate) struct Mapping {
    /// First byte after the guard page; dangling when `len` is 0.
    base: NonNull<u8>,
    /// Usable bytes, a multiple of [`PAGE`].
    len: usize,
}

// SAFETY: a mapping is plain memory without thread affinity; all access goes through raw pointers or `&mut self`.
unsafe impl Send for Mapping {}
// SAFETY: `&Mapping` gives out nothing but its address.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps at least `len` zeroed bytes; the kernel gives pages as they are first touched.
    pub(crate) fn new(len: usize, what: &str) -> Result<Mapping> {
        Mapping::with_flags(len, 0, what)
    }

    /// Like [`Mapping::new`], below 2 GiB, for code that holds 32-bit addresses.
    pub(crate) fn new_low(len: usize, what: &str) -> Result<Mapping> {
        Mapping::with_flags(len, libc::MAP_32BIT, what)
    }

    fn with_flags(len: usize, extra: i32, what: &str) -> Result<Mapping> {
        if len == 0 {
            return Ok(Mapping { base: NonNull::dangling(), len: 0 });
        }
        let too_much =
            || Error::new(ErrorKind::Memory, format!("cannot map {len} bytes for {what}: too large"));
        let len = len.checked_next_multiple_of(PAGE).ok_or_else(too_much)?;
        let whole = len.checked_add(2 * PAGE).filter(|&n| n <= isize::MAX as usize).ok_or_else(too_much)?;
        let failed = |doing: &str| {
            let os = std::io::Error::last_os_error();
            Error::new(ErrorKind::Memory, format!("cannot {doing} {len} bytes for {what}: {os}"))
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | extra;
        // SAFETY: a new anonymous mapping at an address the kernel chooses touches no existing memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(failed("map"));
        }
        // SAFETY: `start` begins `whole` = `len` + 2 pages, so page 1 is inside.
        let base = unsafe { start.cast::<u8>().add(PAGE) };
        let mapping =
            Mapping { base: NonNull::new(base).expect("one page past a mapping's start is not null"), len };
        // SAFETY: the range is the inside of the mapping just made, and `mapping` owns it now.
        let opened = unsafe { libc::mprotect(base.cast(), len, libc::PROT_READ | libc::PROT_WRITE) };
        if opened != 0 { Err(failed("open")) } else { Ok(mapping) }
    }

    /// Asks for huge pages where they help; a refusal is harmless.
    pub(crate) fn advise_huge(&self) {
        if self.len >= 2 << 20 {
            // SAFETY: the range is this mapping's own; the advice does not change its contents.
            unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, libc::MADV_HUGEPAGE) };
        }
    }

    /// First byte.
    pub(crate) fn ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Usable bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The bytes, while nothing in the mapping has been protected.
    ///
    /// # Safety
    /// No part of the mapping may have lost its write permission, and nobody else may use it meanwhile.
    pub(crate) unsafe fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `base` begins `len` readable and writable bytes (a dangling base with `len` 0 is a valid empty slice).
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }

    /// Takes the write permission from `len` bytes at `offset`, both multiples of [`PAGE`].
    pub(crate) fn protect(&mut self, offset: usize, len: usize, protection: Protection) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(
            inside && offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE),
            "protected ranges are whole pages of the mapping"
        );
        let flags = match protection {
            Protection::Read => libc::PROT_READ,
            Protection::ReadExecute => libc::PROT_READ | libc::PROT_EXEC,
        };
        // SAFETY: the range was checked to lie inside this mapping.
        let done = unsafe { libc::mprotect(self.base.as_ptr().add(offset).cast(), len, flags) };
        if done != 0 {
            let os = std::io::Error::last_os_error();
            return Err(Error::new(ErrorKind::Memory, format!("cannot protect {len} bytes of code: {os}")));
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the mapping began one page before `base` and is `len` + 2 pages long; nobody uses it any more.
            unsafe { libc::munmap(self.base.as_ptr().sub(PAGE).cast(), self.len + 2 * PAGE) };
        }
    }
}
