//! Quantizing a weight by blocks of rows, on several threads, with what it does to the numbers.

use quantc_ir::diag::{Diag, Result};
use quantc_ir::formats::Format;
use quantc_ir::quant::{Fit, Groups, Options, Params, dequantize_block, quantize_block, quantize_rows};
use quantc_ir::scheme::{Scheme, Zero};
use quantc_ir::ty::Shape;
use quantc_ir::weights::{BlobWriter, WeightView};
use rayon::prelude::*;
use std::ops::Range;

/// What quantization did to some numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Sum of squares of the numbers.
    pub signal: f64,
    /// Sum of squares of the errors.
    pub noise: f64,
    /// The largest error.
    pub worst: f64,
}

impl Loss {
    /// Between `before` and `after`.
    pub fn between(before: &[f32], after: &[f32]) -> Loss {
        let mut loss = Loss::default();
        for (&a, &b) in before.iter().zip(after) {
            let (a, e) = (f64::from(a), f64::from(b) - f64::from(a));
            loss.signal += a * a;
            loss.noise += e * e;
            loss.worst = loss.worst.max(e.abs());
        }
        loss
    }

    /// Of both together.
    pub fn and(self, other: Loss) -> Loss {
        Loss {
            signal: self.signal + other.signal,
            noise: self.noise + other.noise,
            worst: self.worst.max(other.worst),
        }
    }

    /// Signal over noise in decibels; infinite when nothing was lost.
    pub fn sqnr_db(self) -> f64 {
        if self.noise == 0.0 { f64::INFINITY } else { 10.0 * (self.signal / self.noise).log10() }
    }

    /// As the bytes that the store keeps beside a weight.
    pub fn to_bytes(self) -> [u8; 24] {
        let mut bytes = [0; 24];
        for (to, x) in bytes.chunks_exact_mut(8).zip([self.signal, self.noise, self.worst]) {
            to.copy_from_slice(&x.to_le_bytes());
        }
        bytes
    }

    /// The reverse of [`to_bytes`](Self::to_bytes).
    pub fn from_bytes(bytes: &[u8]) -> Result<Loss> {
        let bytes: &[u8; 24] = bytes
            .try_into()
            .map_err(|_| Diag::input("what the store keeps of a weight's errors is damaged"))?;
        let at = |i: usize| f64::from_le_bytes(std::array::from_fn(|j| bytes[8 * i + j]));
        Ok(Loss { signal: at(0), noise: at(1), worst: at(2) })
    }
}

/// Where a quantized weight goes.
pub struct Outputs<'a> {
    /// Packed codes, row by row.
    pub codes: &'a mut BlobWriter,
    /// Scales.
    pub scales: &'a mut BlobWriter,
    /// Packed zero points, for schemes that have them.
    pub zeros: Option<&'a mut BlobWriter>,
}

/// Bytes of the numbers of one block of rows, unless a group takes more.
const BLOCK: usize = 1 << 20;

/// A quantized block of rows.
struct Block {
    packed: Vec<u8>,
    params: Params,
    loss: Vec<Loss>,
}

/// Quantizes the matrix `view` and writes it. `threads` blocks of rows, plus what has not been written yet, are held
/// at a time; the result depends on neither.
pub fn quantize(
    view: &WeightView<'_>,
    scheme: &Scheme,
    options: Options,
    threads: usize,
    out: &mut Outputs<'_>,
) -> Result<Loss> {
    let groups = Groups::new(scheme, &view.ty().shape)?;
    let (rows, cols) = (groups.rows(), groups.cols());
    let per_block = (BLOCK / cols.max(1).saturating_mul(4)).max(1);
    let tall = groups.rows_per_group();
    if tall > per_block && tall.saturating_mul(cols).saturating_mul(4) > 4 * BLOCK {
        return quantize_tall(view, &groups, scheme, options, per_block, threads, out);
    }
    let step = (per_block / tall).max(1) * tall;
    let mut loss = Loss::default();
    batches(
        rows,
        step,
        threads,
        |block: Range<usize>| {
            let numbers = read(view, block.clone())?;
            let shape = Shape::fixed(&[block.len() as u64, cols as u64]);
            let groups = Groups::new(scheme, &shape)?;
            let quantized = quantize_rows(&groups, scheme, options, &numbers)
                .map_err(|d| d.context(format!("quantizing rows from {} on", block.start)))?;
            finish(&groups, scheme, 0, &numbers, &quantized.codes, quantized.params)
        },
        |block| {
            loss = block.loss.iter().fold(loss, |sum, &row| sum.and(row));
            out.codes.write(&block.packed)?;
            write_params(&groups, scheme, &block.params, out)
        },
    )?;
    Ok(loss)
}

/// As [`quantize`], for groups of so many rows that they are read once for their ranges and again for their codes.
fn quantize_tall(
    view: &WeightView<'_>,
    groups: &Groups,
    scheme: &Scheme,
    options: Options,
    step: usize,
    threads: usize,
    out: &mut Outputs<'_>,
) -> Result<Loss> {
    let rows = groups.rows();
    let mut fit = Fit::new(*groups, scheme, options);
    for block in blocks(rows, step) {
        fit.add_ranges(block.start, &read(view, block)?)?;
    }
    if fit.needs_errors() {
        for block in blocks(rows, step) {
            fit.add_errors(block.start, &read(view, block)?)?;
        }
    }
    let params = fit.finish()?;
    let mut loss = Loss::default();
    batches(
        rows,
        step,
        threads,
        |block: Range<usize>| {
            let numbers = read(view, block.clone())?;
            let mut codes = vec![0; numbers.len()];
            quantize_block(groups, scheme, &params, block.start, &numbers, &mut codes)?;
            let mut done = finish_with(groups, scheme, block.start, &numbers, &codes, &params)?;
            done.params = Params::default();
            Ok(done)
        },
        |block| {
            loss = block.loss.iter().fold(loss, |sum, &row| sum.and(row));
            out.codes.write(&block.packed)
        },
    )?;
    write_params(groups, scheme, &params, out)?;
    Ok(loss)
}

fn finish(
    groups: &Groups,
    scheme: &Scheme,
    from: usize,
    numbers: &[f32],
    codes: &[u8],
    params: Params,
) -> Result<Block> {
    let mut block = finish_with(groups, scheme, from, numbers, codes, &params)?;
    block.params = params;
    Ok(block)
}

/// Packs codes and measures what was lost, row by row, so that sums do not depend on blocks.
fn finish_with(
    groups: &Groups,
    scheme: &Scheme,
    from: usize,
    numbers: &[f32],
    codes: &[u8],
    params: &Params,
) -> Result<Block> {
    let cols = groups.cols().max(1);
    let mut after = vec![0.0; numbers.len()];
    dequantize_block(groups, scheme, params, from, codes, &mut after)?;
    let loss = numbers.chunks(cols).zip(after.chunks(cols)).map(|(a, b)| Loss::between(a, b)).collect();
    Ok(Block { packed: pack_rows(scheme.format, codes, cols), params: Params::default(), loss })
}

/// Codes with rows that begin on byte boundaries.
pub(super) fn pack_rows(format: &Format, codes: &[u8], cols: usize) -> Vec<u8> {
    let row_bytes = format.packed_len(cols);
    let mut packed = vec![0; codes.len() / cols * row_bytes];
    for (codes, packed) in codes.chunks(cols).zip(packed.chunks_mut(row_bytes.max(1))) {
        format.pack(codes, packed);
    }
    packed
}

pub(super) fn write_params(
    groups: &Groups,
    scheme: &Scheme,
    params: &Params,
    out: &mut Outputs<'_>,
) -> Result<()> {
    out.scales.write_f32(scheme.scale, &params.scales)?;
    match (scheme.zero, &mut out.zeros) {
        (Zero::Point(format), Some(zeros)) => {
            zeros.write(&pack_rows(format, &params.zero_codes(scheme), groups.grid().1.max(1)))
        }
        (Zero::Symmetric, None) => Ok(()),
        _ => Err(Diag::bug(format!("zero points of {scheme} have no place to go"))),
    }
}

fn read(view: &WeightView<'_>, rows: Range<usize>) -> Result<Vec<f32>> {
    let mut numbers = vec![0.0; rows.len() * view.cols()];
    view.read_rows_f32(rows.start, rows.len(), &mut numbers)?;
    view.release(rows);
    Ok(numbers)
}

fn blocks(rows: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(step.max(1)).map(move |from| from..rows.min(from.saturating_add(step)))
}

/// Does `work` on blocks of rows, several at a time, and `write`s the results in order.
fn batches<T: Send>(
    rows: usize,
    step: usize,
    threads: usize,
    work: impl Fn(Range<usize>) -> Result<T> + Sync,
    mut write: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    let all: Vec<Range<usize>> = blocks(rows, step).collect();
    for batch in all.chunks(threads.max(1) * 2) {
        let done: Vec<Result<T>> = match threads {
            0 | 1 => batch.iter().cloned().map(&work).collect(),
            _ => batch.par_iter().cloned().map(&work).collect(),
        };
        for part in done {
            write(part?)?;
        }
    }
    Ok(())
}
