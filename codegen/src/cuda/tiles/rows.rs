//! Rows of activations into tiles: as they are, rounded to bf16, or quantized with a scale for each row or each 128 columns.

use super::{ROW_BYTES, ROWS, TILE_BYTES, Tiled};
use crate::cpu::math::Lanes;
use crate::cuda::expr::{alignment, load, wide, write};
use crate::cuda::group::{BLOCK, Scales};
use crate::cuda::layout::UNIT;
use crate::cuda::tile::{Access, Binary, Builder, Extent, GroupKind, Kernel, Mem, Unary, Val, WARP};
use crate::eexpr::MemTy;
use crate::spec::Rows;
use quantc_ir::diag::{Diag, Result};
use serde::{Deserialize, Serialize};

/// Where numbers of tiles come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum From {
    /// Rows of the same numbers, `stride` bytes apart, a multiple of 16.
    Same {
        /// Bytes from one row to the next.
        stride: u32,
    },
    /// Rows of `F32` or `Bf16`, which become codes with scales, or bf16 without.
    Floats {
        /// Type of the rows.
        ty: MemTy,
        /// Elements from one row to the next.
        stride: u32,
        /// Which numbers share a scale.
        scales: Scales,
        /// Whether the sum of each row's codes is written too.
        sums: bool,
    },
}

/// Rows into tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RowTilesSpec {
    /// Columns of a row.
    pub k: u32,
    /// Which of the scalars counts rows.
    pub rows: Rows,
    /// What tiles hold.
    pub kind: GroupKind,
    /// What rows hold.
    pub from: From,
    /// The order of columns: 0 as they are, else of each so many the first words of four quarters, then the second ones, as
    /// lanes find them in codes ([`crate::cuda::layout`]); rows are then padded to whole units.
    pub span: u32,
}

/// Warps of a block, which has a tile's rows.
const WARPS: u32 = 8;

impl RowTilesSpec {
    /// Columns of the tiles.
    pub fn columns(&self) -> u32 {
        if self.span == 0 { self.k } else { self.k.next_multiple_of(UNIT) }
    }

    /// The column of a row that is column `at` of its tiles.
    pub fn column(&self, at: u32) -> u32 {
        if self.span == 0 {
            return at;
        }
        let word = 4 * self.kind.columns() / ROW_BYTES;
        let (span, at) = (at / self.span, at % self.span);
        let (quarter, within) = (at / word % 4, at / word / 4 * word + at % word);
        span * self.span + quarter * (self.span / 4) + within
    }

    /// The tiles of `rows` rows.
    pub fn tiled(&self, rows: u32) -> Tiled {
        Tiled { kind: self.kind, rows, columns: self.columns() }
    }

    fn check(&self) -> Result<()> {
        let good = match self.from {
            From::Same { stride } => {
                stride.is_multiple_of(16) && stride * self.kind.columns() >= self.k * ROW_BYTES
            }
            From::Floats { ty, stride, scales, sums } => {
                stride >= self.k
                    && matches!(ty, MemTy::F32 | MemTy::Bf16)
                    && (scales == Scales::None) == (self.kind == GroupKind::Bf16)
                    && (!sums || (self.kind, scales) == (GroupKind::S8, Scales::Rows))
            }
        };
        // A word of a quarter has whole numbers, and a tile whole spans.
        let spans = self.span == 0
            || (self.span.is_power_of_two()
                && self.span * ROW_BYTES >= 16 * self.kind.columns()
                && self.span <= self.kind.columns());
        match good && spans && self.k > 0 {
            true => Ok(()),
            false => Err(Diag::bug(format!("no such tiles of rows: {self:?}"))),
        }
    }
}

/// The kernel of `spec`, called `name`.
///
/// Buffers: the rows, the tiles, with scales those (`f32[m]`, or `f32[m][blocks]`), with sums those (`i32[m]`). Scales are
/// the largest size of what shares them by the largest code, or 1 for zeros. Scalars: `t` and `r`. Grid: a block for each 64
/// rows; no shared memory, no workspace.
pub fn build(name: &str, spec: &RowTilesSpec) -> Result<Kernel> {
    spec.check()?;
    let mut b = Builder::new(name, WARPS * WARP);
    let x = b.buffer("x", Access::Read);
    let tiles = b.buffer("tiles", Access::Write);
    let (mut scale_out, mut sums_out) = (None, None);
    if let From::Floats { scales, sums, .. } = spec.from {
        scale_out = (scales != Scales::None).then(|| b.buffer("scales", Access::Write));
        sums_out = sums.then(|| b.buffer("sums", Access::Write));
    }
    b.scalar("t");
    b.scalar("r");
    b.grid(Extent::PerScalar { scalar: spec.rows.dim(), times: 1, per: ROWS }, Extent::Fixed(1));
    let m = b.scalar_value(spec.rows.dim());
    let (block, thread) = (b.block_x(), b.thread());
    let (warp, lane) = (b.div(thread, WARP), b.rem(thread, WARP));
    let tiled = spec.tiled(1);
    let cx = Move { spec, tiled, x, lane };
    b.repeat(warp, ROWS, WARPS, |b, in_tile| {
        let row = b.mad(block, ROWS, in_tile);
        let there = b.lt(row, m);
        let last = b.binary(Binary::Sub, m, 1);
        let row = b.binary(Binary::Min, row, last);
        let by_rows = matches!(spec.from, From::Floats { scales: Scales::Rows, .. });
        let whole = by_rows.then(|| cx.row_scale(b, row));
        let first = b.lt(lane, 1);
        let writes = b.binary(Binary::PAnd, first, there);
        let row_at = b.mul(row, 4);
        if let (Some(scale), Some(out)) = (whole, scale_out) {
            b.when(writes, |b| write(b, out, row_at, MemTy::F32, &[scale], 4));
        }
        let total = b.var(0);
        b.repeat(0, tiled.across() * (ROW_BYTES / 16), WARP, |b, base| {
            let segment = b.add(base, lane);
            // Eight lanes have a tile's row: its scale is theirs together.
            let codes = cx.segment(b, row, segment);
            let scale = match spec.from {
                From::Floats { scales: Scales::Blocks, .. } => Some(cx.block_scale(b, &codes)),
                _ => whole,
            };
            let (words, sum) = cx.words(b, &codes, scale, there);
            let next = b.add(total, sum);
            b.set(total, next);
            let inside = b.lt(segment, tiled.across() * (ROW_BYTES / 16));
            b.when(inside, |b| {
                let (across, in_row) = (b.div(segment, ROW_BYTES / 16), b.rem(segment, ROW_BYTES / 16));
                let turned = b.and(in_tile, 7);
                let in_row = b.binary(Binary::Xor, in_row, turned);
                let tile = b.mad(block, tiled.across(), across);
                let offset = b.mul(in_tile, ROW_BYTES);
                let offset = b.mad(in_row, 16, offset);
                let at = wide(b, tile, TILE_BYTES, offset);
                b.store(tiles, at, &words, 16);
                if let (From::Floats { scales: Scales::Blocks, .. }, Some(scale), Some(out)) =
                    (spec.from, scale, scale_out)
                {
                    let piece = b.rem(segment, ROW_BYTES / 16);
                    let first = b.lt(piece, 1);
                    let writes = b.binary(Binary::PAnd, first, there);
                    b.when(writes, |b| {
                        let in_row = b.mul(across, 4);
                        let at = wide(b, row, spec.k.div_ceil(BLOCK) * 4, in_row);
                        write(b, out, at, MemTy::F32, &[scale], 4);
                    });
                }
            });
        });
        if let Some(out) = sums_out {
            let mut sum: Val = total.into();
            for mask in [16, 8, 4, 2, 1] {
                let other = b.shuffle_xor(sum, mask);
                sum = b.add(sum, other);
            }
            b.when(writes, |b| b.store(out, row_at, &[sum], 4));
        }
    });
    Ok(b.finish())
}

struct Move<'a> {
    spec: &'a RowTilesSpec,
    tiled: Tiled,
    x: Mem,
    lane: Val,
}

/// 16 bytes of a row of a tile, before they are codes.
enum Segment {
    /// As they are.
    Words(Vec<Val>),
    /// Numbers; zeros beyond the end of a row.
    Floats(Vec<Val>),
}

impl Move<'_> {
    /// Numbers of 16 bytes.
    fn per_segment(&self) -> u32 {
        self.spec.kind.columns() / (ROW_BYTES / 16)
    }

    /// The first column of word `i` of a segment.
    fn word(&self, b: &mut Builder, segment: Val, i: u32) -> Val {
        let (per, span) = (self.per_segment(), self.spec.span);
        if span == 0 {
            return b.mad(segment, per, i * per / 4);
        }
        let segments = span / per;
        let (number, within) = (b.div(segment, segments), b.rem(segment, segments));
        let first = b.mad(number, span, i * span / 4);
        b.mad(within, per / 4, first)
    }

    fn segment(&self, b: &mut Builder, row: Val, segment: Val) -> Segment {
        let per = self.per_segment();
        match self.spec.from {
            From::Same { stride } => {
                let bytes = 16 / per;
                let end = self.spec.k * bytes;
                let whole = self.spec.span == 0;
                let mut words = vec![];
                for i in 0..4 {
                    let column = self.word(b, segment, i);
                    let at = b.mul(column, bytes);
                    if i == 0 && whole {
                        let inside = b.binary(Binary::Min, at, stride - 16);
                        let from = wide(b, row, stride, inside);
                        words = b.load(self.x, from, 16);
                    } else if !whole {
                        let inside = b.binary(Binary::Min, at, stride - 4);
                        let from = wide(b, row, stride, inside);
                        words.extend(b.load(self.x, from, 4));
                    }
                    words[i as usize] = before(b, words[i as usize], at, end);
                }
                Segment::Words(words)
            }
            From::Floats { ty, stride, .. } => {
                let bytes = ty.bytes() as u32;
                let together = if self.spec.span == 0 { 16 / bytes } else { per / 4 };
                let step = alignment(&[self.spec.k, stride, together]).min(per);
                let mut values = vec![];
                for i in (0..per).step_by(step as usize) {
                    let word = self.word(b, segment, i / (per / 4));
                    let column = b.add(word, i % (per / 4));
                    let inside = b.lt(column, self.spec.k);
                    let column = b.binary(Binary::Min, column, self.spec.k - step);
                    let in_row = b.mul(column, bytes);
                    let from = wide(b, row, stride * bytes, in_row);
                    let v = load(b, self.x, from, ty, step, step * bytes);
                    values.extend(v.into_iter().map(|v| b.select(inside, v, 0.0)));
                }
                Segment::Floats(values)
            }
        }
    }

    /// The scale that goes with a largest size.
    fn scale(&self, b: &mut Builder, largest: Val) -> Val {
        let top = if self.spec.kind == GroupKind::S8 { 127.0 } else { 448.0 };
        let scale = Lanes::div(b, largest, top.into());
        let scale = b.binary(Binary::FMax, scale, f32::MIN_POSITIVE);
        let zero = b.binary(Binary::FEq, largest, 0.0);
        b.select(zero, 1.0, scale)
    }

    fn largest(&self, b: &mut Builder, mut largest: Val, values: &[Val]) -> Val {
        for &v in values {
            let size = b.unary(Unary::FAbs, v);
            largest = b.binary(Binary::FMax, size, largest);
        }
        largest
    }

    /// The scale of a row.
    fn row_scale(&self, b: &mut Builder, row: Val) -> Val {
        let largest = b.var(0.0);
        b.repeat(self.lane, self.tiled.across() * (ROW_BYTES / 16), WARP, |b, segment| {
            if let Segment::Floats(values) = self.segment(b, row, segment) {
                let next = self.largest(b, largest.into(), &values);
                b.set(largest, next);
            }
        });
        let mut all: Val = largest.into();
        for mask in [16, 8, 4, 2, 1] {
            let other = b.shuffle_xor(all, mask);
            all = b.binary(Binary::FMax, all, other);
        }
        self.scale(b, all)
    }

    /// The scale of the columns of eight lanes.
    fn block_scale(&self, b: &mut Builder, segment: &Segment) -> Val {
        let Segment::Floats(values) = segment else { unreachable!("codes have their scales") };
        let mut largest = self.largest(b, 0.0.into(), values);
        for mask in [4, 2, 1] {
            let other = b.shuffle_xor(largest, mask);
            largest = b.binary(Binary::FMax, largest, other);
        }
        self.scale(b, largest)
    }

    /// The words of a segment, zeros where there is no such row, and the sum of its codes where they are bytes.
    fn words(&self, b: &mut Builder, segment: &Segment, scale: Option<Val>, there: Val) -> (Vec<Val>, Val) {
        let mut sum: Val = 0.into();
        let words = match segment {
            Segment::Words(words) => words.clone(),
            Segment::Floats(values) => {
                let codes: Vec<Val> = values
                    .iter()
                    .map(|&v| match (self.spec.kind, scale) {
                        (GroupKind::S8, Some(scale)) => {
                            let y = Lanes::div(b, v, scale);
                            let code = b.unary(Unary::FloatToByte, y);
                            sum = b.add(sum, code);
                            b.and(code, 0xff)
                        }
                        (GroupKind::E4m3, Some(scale)) => {
                            let y = Lanes::div(b, v, scale);
                            b.e4m3_bits(y)
                        }
                        _ => b.binary(Binary::PackBf16, v, 0.0),
                    })
                    .collect();
                let per_word = codes.len() / 4;
                let bits = 32 / per_word as u32;
                codes
                    .chunks(per_word)
                    .map(|part| {
                        let mut word = part[0];
                        for (i, &code) in (1..).zip(&part[1..]) {
                            let high = b.shl(code, bits * i);
                            word = b.binary(Binary::Or, word, high);
                        }
                        word
                    })
                    .collect()
            }
        };
        (words.into_iter().map(|w| b.select(there, w, 0)).collect(), sum)
    }
}

/// The bytes of a word at byte `at` of a row that are before byte `end`, and zeros.
fn before(b: &mut Builder, word: Val, at: Val, end: u32) -> Val {
    let inside = b.lt(at, end);
    let left = b.binary(Binary::Sub, end, at);
    let whole = b.lt(3, left);
    let left = b.and(left, 3);
    let bits = b.mul(left, 8);
    let mask = b.binary(Binary::Shl, 1, bits);
    let mask = b.binary(Binary::Sub, mask, 1);
    let mask = b.select(whole, u32::MAX, mask);
    let mask = b.select(inside, mask, 0);
    b.and(word, mask)
}
