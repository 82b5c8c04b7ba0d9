//! Views of weights: rows of numbers or of codes, read from wherever the bytes lie.

use super::digest::Digest;
use super::{WeightDecl, problem};
use crate::diag::{Diag, Result};
use crate::ty::{ElemTy, Float, TensorTy};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use memmap2::{Mmap, UncheckedAdvice};
use std::fs::File;
use std::io;
use std::iter::FusedIterator;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Bytes of a file or of memory.
pub(super) enum Mapping {
    File(Mmap),
    Heap(Vec<u8>),
}

impl Mapping {
    /// Maps the file at `path`.
    pub(super) fn open(path: &Path) -> io::Result<Mapping> {
        let file = File::open(path)?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a plain file"));
        }
        if meta.len() == 0 {
            return Ok(Mapping::Heap(vec![]));
        }
        // SAFETY: The mapping is read-only and private. Model files and blobs are not changed while quantc runs: blobs
        // are replaced by renames, never rewritten, and changing a model's files under a running compiler is outside
        // of what any reader of mapped files supports.
        Ok(Mapping::File(unsafe { Mmap::map(&file)? }))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Mapping::File(map) => map,
            Mapping::Heap(bytes) => bytes,
        }
    }
}

/// Where a view reads.
pub(super) enum Source<'a> {
    Mapped { map: Arc<Mapping>, start: usize },
    Inline(&'a [u8]),
    Splat(f32),
}

/// One weight, ready to be read. Rows are all indices but the last; a weight of rank 0 or 1 is one row.
pub struct WeightView<'a> {
    decl: &'a WeightDecl,
    source: Source<'a>,
    rows: usize,
    cols: usize,
    row_bytes: usize,
}

impl<'a> WeightView<'a> {
    /// A view of `decl`, whose source has `len` bytes.
    pub(super) fn new(decl: &'a WeightDecl, source: Source<'a>, len: u64) -> Result<WeightView<'a>> {
        let ty = &decl.ty;
        let Some(dims) = ty.shape.dims() else {
            return Err(problem(decl, format!("of type {ty} has extents that are not static")));
        };
        let stored = ty.stored_bytes().ok_or_else(|| problem(decl, format!("of type {ty} is too large")))?;
        if stored != len {
            return Err(problem(
                decl,
                format!("of type {ty} takes {stored} bytes, but its source has {len}"),
            ));
        }
        let (&cols, outer) = dims.split_last().unwrap_or((&1, &[]));
        // Bytes fit u64, but with an extent of 0 the other extents may be anything.
        let sizes = || {
            let rows = outer.iter().try_fold(1u64, |n, &d| n.checked_mul(d))?;
            rows.checked_mul(cols)?.checked_mul(8)?;
            Some((usize::try_from(rows).ok()?, usize::try_from(cols).ok()?, ty.row_bytes(cols)?))
        };
        let (rows, cols, row_bytes) =
            sizes().ok_or_else(|| problem(decl, format!("of type {ty} is too large")))?;
        let row_bytes =
            usize::try_from(row_bytes).map_err(|_| problem(decl, format!("of type {ty} is too large")))?;
        Ok(WeightView { decl, source, rows, cols, row_bytes })
    }

    /// The type.
    pub fn ty(&self) -> &'a TensorTy {
        &self.decl.ty
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Stored bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// The stored bytes, unless the weight is one number repeated.
    pub fn bytes(&self) -> Option<&[u8]> {
        match &self.source {
            Source::Mapped { map, start } => Some(&map.bytes()[*start..*start + self.rows * self.row_bytes]),
            Source::Inline(bytes) => Some(bytes),
            Source::Splat(_) => None,
        }
    }

    /// Reads stored bytes of `count` rows.
    pub fn read_rows_bytes(&self, from: usize, count: usize, out: &mut [u8]) -> Result<()> {
        self.check(from, count, self.row_bytes, out.len())?;
        match (self.raw(from, count), &self.source) {
            (Some(raw), _) => out.copy_from_slice(raw),
            (None, Source::Splat(x)) => {
                let mut one = vec![];
                float_bytes(self.float()?, &[*x], &mut one);
                out.chunks_exact_mut(one.len()).for_each(|e| e.copy_from_slice(&one));
            }
            (None, _) => return Err(Diag::bug("a weight without bytes")),
        }
        Ok(())
    }

    /// Reads `count` rows of a weight of plain floats.
    pub fn read_rows_f32(&self, from: usize, count: usize, out: &mut [f32]) -> Result<()> {
        self.check(from, count, self.cols, out.len())?;
        let float = self.float()?;
        match (self.raw(from, count), &self.source) {
            (Some(raw), _) => floats_from_bytes(float, raw, out),
            (None, Source::Splat(x)) => out.fill(match float {
                Float::F32 => *x,
                Float::F16 => f16::from_f32(*x).to_f32(),
                Float::Bf16 => bf16::from_f32(*x).to_f32(),
            }),
            (None, _) => return Err(Diag::bug("a weight without bytes")),
        }
        Ok(())
    }

    /// Reads `count` rows of a quantized weight of at most 8 bits an element: one code a byte.
    pub fn read_rows_codes(&self, from: usize, count: usize, out: &mut [u8]) -> Result<()> {
        self.check(from, count, self.cols, out.len())?;
        let format = match self.decl.ty.elem {
            ElemTy::Q(scheme) if scheme.format.bits <= 8 => scheme.format,
            _ => {
                return Err(Diag::bug(format!(
                    "weight @{} of type {} has no codes",
                    self.decl.name, self.decl.ty
                )));
            }
        };
        let raw = self.raw(from, count).ok_or_else(|| Diag::bug("a quantized weight without bytes"))?;
        if self.cols > 0 {
            for (row, out) in raw.chunks_exact(self.row_bytes).zip(out.chunks_exact_mut(self.cols)) {
                format.unpack(row, out);
            }
        }
        Ok(())
    }

    /// Reads `count` rows of a weight of 32-bit integers.
    pub fn read_rows_i32(&self, from: usize, count: usize, out: &mut [i32]) -> Result<()> {
        self.check(from, count, self.cols, out.len())?;
        match (self.decl.ty.elem, self.raw(from, count)) {
            (ElemTy::I32, Some(raw)) => {
                for (x, b) in out.iter_mut().zip(raw.chunks_exact(4)) {
                    *x = i32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
                Ok(())
            }
            _ => Err(Diag::bug(format!(
                "weight @{} of type {} is not of integers",
                self.decl.name, self.decl.ty
            ))),
        }
    }

    /// All numbers of a weight of doubles.
    pub fn read_all_f64(&self) -> Result<Vec<f64>> {
        match (self.decl.ty.elem, self.bytes()) {
            (ElemTy::F64, Some(raw)) => {
                Ok(raw.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect())
            }
            _ => Err(self.not_of("doubles")),
        }
    }

    /// All numbers of a weight of plain integers. A truth value is true when its byte is not 0.
    pub fn read_all_ints(&self) -> Result<Vec<i128>> {
        match (self.decl.ty.elem, self.bytes()) {
            (ElemTy::Int(int), Some(raw)) => {
                let one = |b: &[u8]| b.iter().rev().fold(0u64, |n, &b| n << 8 | u64::from(b));
                Ok(raw.chunks_exact(int.bits() as usize / 8).map(|b| int.wrap(one(b).into())).collect())
            }
            _ => Err(self.not_of("integers")),
        }
    }

    fn not_of(&self, what: &str) -> Diag {
        Diag::bug(format!("weight @{} of type {} is not of {what}", self.decl.name, self.decl.ty))
    }

    /// All numbers of a weight of plain floats.
    pub fn read_all_f32(&self) -> Result<Vec<f32>> {
        self.float()?;
        let mut out = vec![0.0; self.rows * self.cols];
        self.read_rows_f32(0, self.rows, &mut out)?;
        Ok(out)
    }

    /// All codes of a quantized weight of at most 8 bits an element.
    pub fn read_all_codes(&self) -> Result<Vec<u8>> {
        let mut out = vec![0; if self.decl.ty.elem.scheme().is_some() { self.rows * self.cols } else { 0 }];
        self.read_rows_codes(0, self.rows, &mut out)?;
        Ok(out)
    }

    /// Consecutive ranges of rows whose numbers, as `f32`, take at most `bytes_budget` bytes each; a range has at
    /// least one row.
    pub fn row_blocks(&self, bytes_budget: usize) -> RowBlocks {
        let per_row = self.cols.max(1).saturating_mul(4);
        RowBlocks { next: 0, rows: self.rows, step: (bytes_budget / per_row).max(1) }
    }

    /// Says that these rows will not be read again soon, so that their pages need not stay in memory. They may be
    /// read all the same.
    pub fn release(&self, rows: Range<usize>) {
        let Source::Mapped { map, start } = &self.source else { return };
        let Mapping::File(map) = &**map else { return };
        let rows = rows.start.min(self.rows)..rows.end.min(self.rows);
        if rows.is_empty() {
            return;
        }
        let (from, len) = (start + rows.start * self.row_bytes, rows.len() * self.row_bytes);
        // SAFETY: The mapping is of a file and never written to, so a page that is dropped is read again from the file
        // with the same content.
        let advised = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, from, len) };
        // A system that does not take the advice only uses more memory.
        drop(advised);
    }

    /// The digest of the stored bytes.
    pub(super) fn content_digest(&self) -> Digest {
        let bytes = self.bytes().unwrap_or_default();
        let mut h = blake3::Hasher::new();
        let rows = ((1 << 24) / self.row_bytes.max(1)).max(1);
        let mut from = 0;
        for part in bytes.chunks((rows * self.row_bytes).max(1)) {
            h.update(part);
            self.release(from..from + rows);
            from += rows;
        }
        Digest(*h.finalize().as_bytes())
    }

    /// Stored bytes of rows that are known to exist.
    fn raw(&self, from: usize, count: usize) -> Option<&[u8]> {
        let bytes = self.bytes()?;
        bytes.get(from * self.row_bytes..(from + count) * self.row_bytes)
    }

    fn float(&self) -> Result<Float> {
        match self.decl.ty.elem {
            ElemTy::F32 => Ok(Float::F32),
            ElemTy::F16 => Ok(Float::F16),
            ElemTy::Bf16 => Ok(Float::Bf16),
            _ => Err(Diag::bug(format!(
                "weight @{} of type {} is not of floats",
                self.decl.name, self.decl.ty
            ))),
        }
    }

    fn check(&self, from: usize, count: usize, per_row: usize, room: usize) -> Result<()> {
        if from.checked_add(count).is_none_or(|end| end > self.rows) {
            let text =
                format!("rows {from}..+{count} of weight @{}, which has {}", self.decl.name, self.rows);
            return Err(Diag::bug(text));
        }
        if count * per_row != room {
            let name = &self.decl.name;
            return Err(Diag::bug(format!(
                "room for {room} elements, but {count} rows of @{name} are {per_row} each"
            )));
        }
        Ok(())
    }
}

/// Ranges of rows; see [`WeightView::row_blocks`].
#[derive(Clone, Debug)]
pub struct RowBlocks {
    next: usize,
    rows: usize,
    step: usize,
}

impl Iterator for RowBlocks {
    type Item = Range<usize>;
    fn next(&mut self) -> Option<Range<usize>> {
        if self.next >= self.rows {
            return None;
        }
        let range = self.next..self.rows.min(self.next.saturating_add(self.step));
        self.next = range.end;
        Some(range)
    }
    fn size_hint(&self) -> (usize, Option<usize>) {
        let n = (self.rows - self.next).div_ceil(self.step);
        (n, Some(n))
    }
}

impl ExactSizeIterator for RowBlocks {}
impl FusedIterator for RowBlocks {}

/// Elements converted at a time.
const LANES: usize = 1024;

/// Numbers stored as `from`, at any alignment.
fn floats_from_bytes(from: Float, bytes: &[u8], out: &mut [f32]) {
    match from {
        Float::F32 => {
            for (x, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Float::Bf16 => {
            for (x, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *x = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            }
        }
        Float::F16 => {
            let mut aligned = [f16::ZERO; LANES];
            for (out, bytes) in out.chunks_mut(LANES).zip(bytes.chunks(2 * LANES)) {
                let aligned = &mut aligned[..out.len()];
                for (x, b) in aligned.iter_mut().zip(bytes.chunks_exact(2)) {
                    *x = f16::from_le_bytes([b[0], b[1]]);
                }
                aligned.convert_to_f32_slice(out);
            }
        }
    }
}

/// Appends numbers stored as `to`, rounded to nearest even.
pub(super) fn float_bytes(to: Float, xs: &[f32], out: &mut Vec<u8>) {
    match to {
        Float::F32 => xs.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Float::F16 => xs.iter().for_each(|&x| out.extend_from_slice(&f16::from_f32(x).to_le_bytes())),
        Float::Bf16 => xs.iter().for_each(|&x| out.extend_from_slice(&bf16::from_f32(x).to_le_bytes())),
    }
}
