//! Scales and codes of whole tensors, by blocks of rows.

use super::{Groups, IntBounds, Options, Search, Span, dequantize_one, quantize_one, scale_for};
use crate::diag::{Diag, Result};
use crate::formats::Format;
use crate::scheme::{Scheme, Zero};
use crate::weights::WeightView;
use std::ops::Range;

/// Scales, as stored, and zero points of all groups.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Params {
    /// One scale per group.
    pub scales: Vec<f32>,
    /// The integer of each group's zero point; empty for symmetric schemes.
    pub zeros: Vec<i32>,
}

impl Params {
    /// Scale and zero point of a group.
    pub fn get(&self, group: usize) -> (f32, i32) {
        (self.scales[group], self.zeros.get(group).copied().unwrap_or(0))
    }

    /// The zero points as codes of the scheme's zero-point format, one a byte; empty for symmetric schemes.
    pub fn zero_codes(&self, scheme: &Scheme) -> Vec<u8> {
        match scheme.zero {
            Zero::Symmetric => vec![],
            Zero::Point(format) => self.zeros.iter().map(|&z| format.int_code(z) as u8).collect(),
        }
    }

    /// The reverse of [`zero_codes`](Self::zero_codes), with the scales as they were read.
    pub fn from_codes(scheme: &Scheme, scales: Vec<f32>, zero_codes: &[u8]) -> Params {
        let zeros = match scheme.zero {
            Zero::Symmetric => vec![],
            Zero::Point(format) => zero_codes.iter().map(|&c| format.int_value(u32::from(c))).collect(),
        };
        Params { scales, zeros }
    }

    fn append(&mut self, other: Params) {
        self.scales.extend(other.scales);
        self.zeros.extend(other.zeros);
    }
}

/// A quantized block of rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// One code a byte, row by row.
    pub codes: Vec<u8>,
    /// Scales and zero points of the groups of the block.
    pub params: Params,
}

/// Finds the scales of a tensor that is given by blocks of rows, in any order and cut anywhere.
///
/// First all rows go through [`add_ranges`](Self::add_ranges); then, when [`needs_errors`](Self::needs_errors), all
/// rows go through [`add_errors`](Self::add_errors); then [`finish`](Self::finish). The result depends neither on how
/// the rows are cut into blocks nor, without a search, on their order.
pub struct Fit {
    groups: Groups,
    /// What the first row is called in messages.
    origin: usize,
    scheme: Scheme,
    options: Options,
    spans: Vec<Span>,
    /// For each group, the candidates and their squared errors so far.
    tried: Vec<Tried>,
    per_group: usize,
}

#[derive(Clone, Copy)]
struct Tried {
    scale: f32,
    zero: i32,
    error: f64,
}

impl Fit {
    /// Nothing seen yet.
    pub fn new(groups: Groups, scheme: &Scheme, options: Options) -> Fit {
        let per_group = match options.search {
            Search::None => 1,
            Search::Mse { steps } => steps as usize + 1,
        };
        let spans = vec![Span::default(); groups.len()];
        Fit { groups, origin: 0, scheme: *scheme, options, spans, tried: vec![], per_group }
    }

    /// Takes note of the ranges of rows that start with row `from`.
    pub fn add_ranges(&mut self, from: usize, block: &[f32]) -> Result<()> {
        let rows = rows_of(&self.groups, from, block.len())?;
        let (groups, origin, spans) = (self.groups, self.origin, &mut self.spans);
        if groups.cols() == 0 {
            return Ok(());
        }
        for (row, xs) in rows.zip(block.chunks_exact(groups.cols())) {
            let not_finite = |col: usize| {
                let row = row + origin;
                let text = format!("element [{row}, {col}] is {}, which cannot be quantized", xs[col]);
                Err(Diag::input(text))
            };
            let spans = &mut spans[groups.index(row, 0)..][..groups.grid().1];
            if groups.cols_per_group() == 1 {
                if let Err(col) = Span::of(xs) {
                    return not_finite(col);
                }
                for (span, &x) in spans.iter_mut().zip(xs) {
                    *span = span.union(Span { min: x, max: x });
                }
                continue;
            }
            for (i, (span, xs)) in spans.iter_mut().zip(xs.chunks(groups.cols_per_group())).enumerate() {
                match Span::of(xs) {
                    Ok(s) => *span = span.union(s),
                    Err(col) => return not_finite(i * groups.cols_per_group() + col),
                }
            }
        }
        Ok(())
    }

    /// The range of each group so far.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Whether scales are searched for, which takes a second look at all rows.
    pub fn needs_errors(&self) -> bool {
        self.per_group > 1
    }

    /// Adds up the errors that each candidate makes in rows that start with row `from`. All ranges must be known.
    pub fn add_errors(&mut self, from: usize, block: &[f32]) -> Result<()> {
        let rows = rows_of(&self.groups, from, block.len())?;
        if self.tried.is_empty() {
            self.tried = self.candidates()?;
        }
        let groups = self.groups;
        if groups.cols() == 0 {
            return Ok(());
        }
        for (row, xs) in rows.zip(block.chunks_exact(groups.cols())) {
            let first = groups.index(row, 0) * self.per_group;
            let tried = self.tried[first..].chunks_mut(self.per_group);
            for (xs, tried) in xs.chunks(groups.cols_per_group()).zip(tried) {
                for t in tried {
                    t.error += squared_error(xs, t.scale, t.zero, self.scheme.format);
                }
            }
        }
        Ok(())
    }

    /// The scales.
    pub fn finish(mut self) -> Result<Params> {
        if self.tried.is_empty() {
            // Without errors the first candidate, the whole range, is taken.
            self.per_group = 1;
            self.tried = self.candidates()?;
        }
        let best = self.tried.chunks(self.per_group).map(|tried| {
            tried[1..].iter().fold(tried[0], |best, &t| if t.error < best.error { t } else { best })
        });
        let mut params = Params::default();
        for t in best {
            params.scales.push(t.scale);
            if self.scheme.zero != Zero::Symmetric {
                params.zeros.push(t.zero);
            }
        }
        Ok(params)
    }

    fn candidates(&self) -> Result<Vec<Tried>> {
        let mut all = Vec::with_capacity(self.spans.len() * self.per_group);
        for span in &self.spans {
            for i in 0..self.per_group {
                let factor = if i == 0 { 1.0 } else { 1.0 - 0.8 * i as f32 / (self.per_group - 1) as f32 };
                let (scale, zero) = scale_for(span.shrunk(factor), &self.scheme, self.options.rule)?;
                all.push(Tried { scale, zero, error: 0.0 });
            }
        }
        Ok(all)
    }
}

/// Scale and zero point of one group.
pub fn fit(xs: &[f32], scheme: &Scheme, options: Options) -> Result<(f32, i32)> {
    let groups = Groups::one(xs.len());
    let mut fit = Fit::new(groups, scheme, options);
    if xs.is_empty() {
        return scale_for(Span::default(), scheme, options.rule);
    }
    fit.add_ranges(0, xs)?;
    if fit.needs_errors() {
        fit.add_errors(0, xs)?;
    }
    Ok(fit.finish()?.get(0))
}

/// The codes of rows that start with row `from`, one a byte.
pub fn quantize_block(
    groups: &Groups,
    scheme: &Scheme,
    params: &Params,
    from: usize,
    block: &[f32],
    codes: &mut [u8],
) -> Result<()> {
    let rows = rows_of(groups, from, block.len())?;
    let format = narrow(scheme)?;
    check_room(groups, params, block.len(), codes.len())?;
    for_segments(groups, rows, |group, at| {
        let (scale, zero) = params.get(group);
        let (xs, codes) = (&block[at.clone()], &mut codes[at]);
        if format.is_int() {
            let bounds = IntBounds::new(format, zero);
            let mask = format.mask() as u8;
            for (code, &x) in codes.iter_mut().zip(xs) {
                *code = (bounds.round(x / scale) as i32 + zero) as u8 & mask;
            }
        } else {
            for (code, &x) in codes.iter_mut().zip(xs) {
                *code = quantize_one(x, scale, zero, format) as u8;
            }
        }
    });
    Ok(())
}

/// The numbers that codes of rows that start with row `from` stand for.
pub fn dequantize_block(
    groups: &Groups,
    scheme: &Scheme,
    params: &Params,
    from: usize,
    codes: &[u8],
    out: &mut [f32],
) -> Result<()> {
    let rows = rows_of(groups, from, codes.len())?;
    let format = narrow(scheme)?;
    check_room(groups, params, codes.len(), out.len())?;
    for_segments(groups, rows, |group, at| {
        let (scale, zero) = params.get(group);
        for (y, &code) in out[at.clone()].iter_mut().zip(&codes[at]) {
            *y = dequantize_one(u32::from(code), scale, zero, format);
        }
    });
    Ok(())
}

/// Quantizes rows that contain whole groups: `block` is a tensor by itself.
pub fn quantize_rows(groups: &Groups, scheme: &Scheme, options: Options, block: &[f32]) -> Result<Quantized> {
    quantize_part(groups, scheme, options, block, 0)
}

/// Quantizes the rows of a tensor from row `origin` on, which contain whole groups.
fn quantize_part(
    groups: &Groups,
    scheme: &Scheme,
    options: Options,
    block: &[f32],
    origin: usize,
) -> Result<Quantized> {
    narrow(scheme)?;
    let mut fit = Fit { origin, ..Fit::new(*groups, scheme, options) };
    fit.add_ranges(0, block)?;
    if fit.needs_errors() {
        fit.add_errors(0, block)?;
    }
    let params = fit.finish()?;
    let mut codes = vec![0; block.len()];
    quantize_block(groups, scheme, &params, 0, block, &mut codes)?;
    Ok(Quantized { codes, params })
}

/// Takes the codes, one a byte, of a range of rows.
pub type Emit<'a> = &'a mut dyn FnMut(Range<usize>, &[u8]) -> Result<()>;

/// Quantizes a weight, reading it by blocks of rows of about `budget` bytes, and gives the codes of each block, one a
/// byte, to `emit`, in order of rows. The result does not depend on the budget.
pub fn quantize_view(
    view: &WeightView<'_>,
    scheme: &Scheme,
    options: Options,
    budget: usize,
    emit: Emit<'_>,
) -> Result<Params> {
    let groups = Groups::new(scheme, &view.ty().shape)?;
    narrow(scheme)?;
    let cols = groups.cols();
    let mut block = vec![];
    let read = |rows: Range<usize>, block: &mut Vec<f32>| {
        block.resize(rows.len() * cols, 0.0);
        view.read_rows_f32(rows.start, rows.len(), block)?;
        view.release(rows);
        Ok(())
    };
    // Blocks of whole groups are read once. Where one group is beyond the budget, rows are read again for each phase.
    let per_block = view.row_blocks(budget).next().map_or(1, |rows| rows.len());
    let step = match per_block / groups.rows_per_group() * groups.rows_per_group() {
        0 if per_block >= groups.rows() => groups.rows(),
        whole_groups => whole_groups,
    };
    if step > 0 {
        let mut params = Params::default();
        let mut from = 0;
        while from < groups.rows() {
            let rows = from..groups.rows().min(from + step);
            read(rows.clone(), &mut block)?;
            let part = quantize_part(&groups.of_rows(rows.clone()), scheme, options, &block, rows.start)?;
            emit(rows.clone(), &part.codes)?;
            params.append(part.params);
            from = rows.end;
        }
        return Ok(params);
    }
    let mut fit = Fit::new(groups, scheme, options);
    for rows in view.row_blocks(budget) {
        read(rows.clone(), &mut block)?;
        fit.add_ranges(rows.start, &block)?;
    }
    if fit.needs_errors() {
        for rows in view.row_blocks(budget) {
            read(rows.clone(), &mut block)?;
            fit.add_errors(rows.start, &block)?;
        }
    }
    let params = fit.finish()?;
    let mut codes = vec![];
    for rows in view.row_blocks(budget) {
        read(rows.clone(), &mut block)?;
        codes.resize(block.len(), 0);
        quantize_block(&groups, scheme, &params, rows.start, &block, &mut codes)?;
        emit(rows, &codes)?;
    }
    Ok(params)
}

/// Sum of squared errors, in a fixed order of eight interleaved sums.
fn squared_error(xs: &[f32], scale: f32, zero: i32, format: &Format) -> f64 {
    let mut sums = [0.0f64; 8];
    if format.is_int() {
        let bounds = IntBounds::new(format, zero);
        for xs in xs.chunks(8) {
            for (sum, &x) in sums.iter_mut().zip(xs) {
                let e = f64::from(bounds.round(x / scale) * scale) - f64::from(x);
                *sum += e * e;
            }
        }
    } else {
        for xs in xs.chunks(8) {
            for (sum, &x) in sums.iter_mut().zip(xs) {
                let y = dequantize_one(quantize_one(x, scale, zero, format), scale, zero, format);
                let e = f64::from(y) - f64::from(x);
                *sum += e * e;
            }
        }
    }
    sums.iter().sum()
}

/// Calls `f` with each run of elements that share a scale: its group, and where it lies in the block.
fn for_segments(groups: &Groups, rows: Range<usize>, mut f: impl FnMut(usize, Range<usize>)) {
    let (cols, step) = (groups.cols(), groups.cols_per_group());
    for (i, row) in rows.enumerate() {
        let first = groups.index(row, 0);
        for (g, col) in (0..cols).step_by(step).enumerate() {
            f(first + g, i * cols + col..i * cols + cols.min(col + step));
        }
    }
}

/// The rows that a block of `len` elements from row `from` on makes up.
fn rows_of(groups: &Groups, from: usize, len: usize) -> Result<Range<usize>> {
    let n = if groups.cols() == 0 { 0 } else { len / groups.cols() };
    match from.checked_add(n) {
        Some(end) if n * groups.cols() == len && end <= groups.rows() => Ok(from..end),
        _ => Err(Diag::bug(format!("{len} elements from row {from} on are no rows of {groups:?}"))),
    }
}

fn check_room(groups: &Groups, params: &Params, from: usize, to: usize) -> Result<()> {
    let n = groups.len();
    if from != to || params.scales.len() != n || !(params.zeros.is_empty() || params.zeros.len() == n) {
        return Err(Diag::bug(format!(
            "{n} groups with {} scales, {from} elements into {to}",
            params.scales.len()
        )));
    }
    Ok(())
}

/// The format of a scheme whose codes fit bytes.
fn narrow(scheme: &Scheme) -> Result<&'static Format> {
    if scheme.format.bits <= 8 {
        return Ok(scheme.format);
    }
    Err(Diag::pipeline(format!("{} is not a format to quantize to", scheme.format)).help("use a cast"))
}
