//! Products with few rows: up to 64 tokens at a time, bound by the bytes of the weights.
//!
//! Weights are the left side of the warps' products and tokens the right side, so that 16 rows of weights meet 8 tokens
//! and nothing is wasted on tokens that are not there. A block computes some tiles of 16 output columns for some tiles of 8
//! tokens; its warps take turns at units of [`UNIT`] columns of k, and add up what they have at the end.
//!
//! Every lane copies exactly what it will multiply itself, several units ahead, into its own part of shared memory
//! ([`ring`]): there is no barrier, no exchange and no conflict of banks before the sums are added up. This is what
//! [`super::layout`] is made for.
//!
//! Scales belong to the sums of a group, not to weights: products are of codes, which are exact in bf16 as in bytes, and
//! cost no multiplication per weight. Sums of bytes are exact; where a row has one scale they stay integers to the end.
//!
//! Buffers and their order are those of [`MatmulSpec`], weights as [`FragmentLayout`] stores them; scalars are `t` and `r`.

use super::dequant::{self, Offset};
use super::expr::Frame;
use super::layout::{FragmentLayout, Meets, TILE, UNIT};
use super::tile::{Access, Binary, Builder, Extent, Kernel, Mem, MmaKind, Reg, Unary, Val, WARP};
use crate::cpu::math::Lanes;
use crate::spec::{AFmt, MatmulSpec, ScaleTy, Zero};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::GpuDesc;
use ring::Ring;
use serde::{Deserialize, Serialize};

mod finish;
mod ring;

/// Tokens of a tile.
pub const TOKENS: u32 = 8;

/// How a product is cut.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct SkinnyTile {
    /// Tiles of 16 output columns of a block.
    pub rows: u32,
    /// Tiles of 8 tokens of a block.
    pub tokens: u32,
    /// Warps of a block, among which k is divided.
    pub warps: u32,
    /// Units under way in each warp, at least 2.
    pub stages: u32,
}

impl SkinnyTile {
    /// The tile for calls of up to `m` rows on a GPU: as many warps and stages as shared memory has room for, and one tile
    /// of output columns, or two where that still leaves a block for each of a hundred multiprocessors.
    pub fn of(spec: &MatmulSpec, m: u32, gpu: &GpuDesc) -> Result<SkinnyTile> {
        let layout = FragmentLayout::of(spec)?;
        let tokens = m.div_ceil(TOKENS).next_power_of_two().min(8);
        let rows = if spec.n >= 100 * 2 * TILE && tokens <= 4 && spec.products() == 1 { 2 } else { 1 };
        let sizes = [(8, 4), (8, 3), (4, 4), (4, 3), (4, 2), (2, 2), (1, 2)];
        // Half of what there is, so that two blocks hide each other's beginnings and ends.
        let tiles = sizes.map(|(warps, stages)| SkinnyTile { rows, tokens, warps, stages });
        let fits = |part: u32| {
            let most = gpu.shared_bytes / part;
            tiles.into_iter().find(|tile| tile.shared_bytes(spec, &layout) <= most)
        };
        fits(2).filter(|t| t.warps >= 4).or_else(|| fits(1)).ok_or_else(|| {
            Diag::target(format!("a product of {m} rows has no room in the shared memory of {}", gpu.arch))
        })
    }

    fn shared_bytes(&self, spec: &MatmulSpec, layout: &FragmentLayout) -> u32 {
        let ring = Ring::new(spec, layout, *self).stage_bytes() * self.stages * self.warps;
        ring.max(finish::bytes(spec, *self))
    }
}

/// The kernel of `spec`, called `name`.
pub fn build(name: &str, spec: &MatmulSpec, tile: SkinnyTile) -> Result<Kernel> {
    spec.check()?;
    let layout = FragmentLayout::of(spec)?;
    let mut b = Builder::new(name, tile.warps * WARP);
    let a = b.buffer("a", Access::Read);
    let rows = (spec.a == AFmt::I8Token)
        .then(|| (b.buffer("a_scale", Access::Read), b.buffer("a_sums", Access::Read)));
    let weights = (0..spec.products()).map(|i| b.buffer(&format!("w{i}"), Access::Read)).collect();
    let frame = Frame::declare(&mut b, &spec.epilogue, true);
    let (t, r) = (b.scalar("t"), b.scalar("r"));
    let m = [t, r][spec.rows.dim() as usize];
    let columns = layout.tiles().div_ceil(tile.rows);
    b.grid(Extent::Fixed(columns), Extent::PerScalar { scalar: m, times: 1, per: tile.tokens * TOKENS });
    b.shared(tile.shared_bytes(spec, &layout));

    let m = b.scalar_value(m);
    let (x, y) = (b.block_x(), b.block_y());
    let thread = b.thread();
    let (warp, lane) = (b.div(thread, WARP), b.rem(thread, WARP));
    let (g, t) = (b.div(lane, 4), b.rem(lane, 4));
    let first_tile = b.mul(x, tile.rows);
    let first_token = b.mul(y, tile.tokens * TOKENS);
    let ring = Ring::new(spec, &layout, tile);
    let place = Place { m, thread, warp, lane, g, t, first_tile, first_token };
    let skinny = Skinny { spec, layout, tile, a, rows, weights, frame, place, ring };
    skinny.emit(&mut b);
    Ok(b.finish())
}

/// Where a thread is.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Rows of the call.
    m: Val,
    thread: Val,
    warp: Val,
    lane: Val,
    /// Row of a fragment.
    g: Val,
    /// Lane of the row.
    t: Val,
    /// The block's first tile of output columns, and its first token.
    first_tile: Val,
    first_token: Val,
}

struct Skinny<'a> {
    spec: &'a MatmulSpec,
    layout: FragmentLayout,
    tile: SkinnyTile,
    a: Mem,
    /// Scales and sums of rows of bytes.
    rows: Option<(Mem, Mem)>,
    weights: Vec<Mem>,
    frame: Frame<'a>,
    place: Place,
    ring: Ring,
}

/// One tile of sums: output columns by tokens.
type Acc = [Reg; 4];

impl Skinny<'_> {
    fn emit(&self, b: &mut Builder) {
        let Place { warp, .. } = self.place;
        let units = self.layout.units();
        let stages = self.tile.stages;
        let stage = self.ring.stage_bytes();
        let source = self.source(b);
        let fixed = self.row_offsets(b);
        b.note("units ahead");
        for i in 0..stages - 1 {
            let unit = b.add(warp, i * self.tile.warps);
            self.issue(b, &source, unit, (i * stage).into());
        }
        let acc: Vec<Acc> = (0..self.tiles()).map(|_| self.zeros(b, self.stays_integer())).collect();
        let (read, write) = (b.var(0), b.var((stages - 1) * stage));
        b.repeat(warp, units, self.tile.warps, |b, unit| {
            b.cp_wait(stages - 2);
            let ahead = b.add(unit, (stages - 1) * self.tile.warps);
            self.issue(b, &source, ahead, write.into());
            self.compute(b, read.into(), &acc, &fixed);
            for slot in [read, write] {
                let next = b.add(slot, stage);
                let over = b.lt(next, stages * stage);
                let next = b.select(over, next, 0);
                b.set(slot, next);
            }
        });
        self.finish(b, &acc);
    }

    /// Tiles of sums of a warp: products, by tiles of output columns, by tiles of tokens.
    fn tiles(&self) -> u32 {
        self.spec.products() * self.tile.rows * self.tile.tokens
    }

    /// Whether sums are integers until the end.
    fn stays_integer(&self) -> bool {
        self.layout.meets == Meets::Bytes && self.layout.per_row()
    }

    fn zeros(&self, b: &mut Builder, integer: bool) -> Acc {
        [(); 4].map(|()| if integer { b.var(0) } else { b.var(0.0) })
    }

    /// Offsets of codes whose rows have one zero point each: for each product and tile of output columns, of rows g and
    /// g + 8.
    fn row_offsets(&self, b: &mut Builder) -> Vec<[Option<Offset>; 2]> {
        let tiles = self.spec.products() * self.tile.rows;
        if self.layout.meets == Meets::Bytes || self.layout.w.zero != Zero::Asym || !self.layout.per_row() {
            return vec![[dequant::fixed_offset(&self.layout); 2]; tiles as usize];
        }
        let mut list = vec![];
        for &w in &self.weights {
            for i in 0..self.tile.rows {
                let tile = self.tile_index(b, i);
                let in_tile = b.mad(self.place.g, self.layout.record_bytes(), self.layout.codes_bytes());
                let at = super::expr::wide(b, tile, self.layout.tile_bytes(), in_tile);
                let record = b.load(w, at, self.layout.record_bytes());
                list.push(self.zeros_of(b, &record).map(|z| Some(dequant::offset(b, &self.layout, z))));
            }
        }
        list
    }

    /// The block's tile of output columns number `i`; the last one again beyond the end.
    fn tile_index(&self, b: &mut Builder, i: u32) -> Val {
        let tile = b.add(self.place.first_tile, i);
        if self.layout.tiles().is_multiple_of(self.tile.rows) {
            return tile;
        }
        b.binary(Binary::Min, tile, self.layout.tiles() - 1)
    }

    /// The scales of rows g and g + 8 in a record.
    fn scales_of(&self, b: &mut Builder, record: &[Val]) -> [Val; 2] {
        let bits = match self.layout.w.scale {
            ScaleTy::Bf16 => [b.shl(record[0], 16), b.and(record[0], 0xffff_0000)],
            _ => [record[0], record[1]],
        };
        bits.map(|bits| b.unary(Unary::FromBits, bits))
    }

    /// The zero points of rows g and g + 8 in a record.
    fn zeros_of(&self, b: &mut Builder, record: &[Val]) -> [Val; 2] {
        let word = record[(2 * self.layout.w.scale.bytes() / 4) as usize];
        let second = b.shr(word, 8);
        [b.and(word, 0xff), b.and(second, 0xff)]
    }

    /// Adds the products of the unit in a slot.
    fn compute(&self, b: &mut Builder, slot: Val, acc: &[Acc], fixed: &[[Option<Offset>; 2]]) {
        let layout = &self.layout;
        let ring = self.ring.lane(b, self.place.warp, self.place.lane, slot);
        let (kind, step_k) = match layout.meets {
            Meets::Bf16 => (MmaKind::Bf16, 4),
            Meets::Bytes => (MmaKind::S8, 8),
        };
        let steps = layout.lane_k() / step_k;
        // Steps of a scale group.
        let per_group = if layout.per_row() { u32::MAX } else { layout.w.group.min(UNIT) / kind.k() };
        let mut sub: Vec<Acc> = vec![];
        let mut group = Group::default();
        for chunk in 0..UNIT / layout.chunk_k() {
            let codes: Vec<Vec<Val>> = (0..self.spec.products() * self.tile.rows)
                .map(|i| ring.codes(b, &self.ring, i, chunk))
                .collect();
            let tokens: Vec<Vec<Val>> =
                (0..self.tile.tokens).map(|i| ring.tokens(b, &self.ring, layout, i, chunk)).collect();
            for step in 0..steps {
                let at = chunk * steps + step;
                if !layout.per_row() && at.is_multiple_of(per_group) {
                    group = self.group(b, &ring, at / per_group);
                    sub = (0..self.tiles()).map(|_| self.zeros(b, layout.meets == Meets::Bytes)).collect();
                }
                for (i, words) in codes.iter().enumerate() {
                    let offsets = group.offsets.get(i).unwrap_or(&fixed[i]);
                    let fragment = |b: &mut Builder, row: usize, part: u32| {
                        let words = [words[2 * row], words[2 * row + 1]];
                        match layout.meets {
                            Meets::Bf16 => {
                                dequant::bf16_pair(b, layout, words, 2 * step + part, offsets[row])
                            }
                            Meets::Bytes => dequant::byte_word(b, layout, words, 2 * step + part),
                        }
                    };
                    let left = [(0, 0), (1, 0), (0, 1), (1, 1)].map(|(row, part)| fragment(b, row, part));
                    for (j, words) in tokens.iter().enumerate() {
                        let to = i * self.tile.tokens as usize + j;
                        let to = if layout.per_row() { acc[to] } else { sub[to] };
                        let at = 2 * step as usize;
                        b.mma(kind, to, left, [words[at], words[at + 1]]);
                    }
                }
                if !layout.per_row() && (at + 1).is_multiple_of(per_group) {
                    self.end_group(b, &group, &sub, acc);
                }
            }
        }
    }

    /// What is known of a scale group of the unit.
    fn group(&self, b: &mut Builder, ring: &ring::Lane, index: u32) -> Group {
        let mut group = Group::default();
        let asym = self.layout.w.zero == Zero::Asym;
        for i in 0..self.spec.products() * self.tile.rows {
            let record = ring.record(b, &self.ring, i, index);
            group.scales.push(self.scales_of(b, &record));
            if asym {
                let zeros = self.zeros_of(b, &record);
                match self.layout.meets {
                    Meets::Bf16 => {
                        group.offsets.push(zeros.map(|z| Some(dequant::offset(b, &self.layout, z))));
                    }
                    Meets::Bytes => group.zeros.push(zeros),
                }
            }
        }
        if self.ring.has_sums() {
            group.sums = (0..self.tile.tokens).map(|i| ring.sums(b, &self.ring, i, index)).collect();
        }
        group
    }

    /// Adds the sums of a group, scaled.
    fn end_group(&self, b: &mut Builder, group: &Group, sub: &[Acc], acc: &[Acc]) {
        for (i, (sub, acc)) in sub.iter().zip(acc).enumerate() {
            let (tile, tokens) = (i / self.tile.tokens as usize, i % self.tile.tokens as usize);
            for (j, (&sub, &acc)) in sub.iter().zip(acc).enumerate() {
                let sum = match self.layout.meets {
                    Meets::Bf16 => sub.into(),
                    Meets::Bytes => {
                        let zero = group.zeros.get(tile).map(|z| z[j / 2]);
                        let total = group.sums.get(tokens).map(|s| s[j % 2]);
                        self.corrected(b, sub.into(), zero, total)
                    }
                };
                let next = b.mul_add(sum, group.scales[tile][j / 2], acc.into());
                b.set(acc, next);
            }
        }
    }

    /// A sum of byte products less what zero points put in, as a float. `total` is the sum of the tokens' bytes.
    fn corrected(&self, b: &mut Builder, sum: Val, zero: Option<Val>, total: Option<Val>) -> Val {
        let factor = dequant::byte_factor(&self.layout);
        let stored = match (zero, self.layout.w.zero) {
            (Some(z), _) => Some(b.binary(Binary::Sub, z, u32::from(self.layout.flip()))),
            (None, Zero::Sym(z)) => {
                Some(dequant::stored_zero(&self.layout, z)).filter(|&z| z != 0).map(|z| Val::U32(z as u32))
            }
            (None, Zero::Asym) => None,
        };
        let sum = match (stored, total) {
            (Some(stored), Some(total)) => {
                let put_in = b.mul(stored, total);
                let put_in = b.mul(put_in, factor as u32);
                b.binary(Binary::Sub, sum, put_in)
            }
            _ => sum,
        };
        let sum = b.unary(Unary::IntToFloat, sum);
        if factor == 1.0 { sum } else { Lanes::mul(b, sum, (1.0 / factor).into()) }
    }
}

/// What is known of a scale group: for each product and tile of output columns, of rows g and g + 8.
#[derive(Default)]
struct Group {
    scales: Vec<[Val; 2]>,
    offsets: Vec<[Option<Offset>; 2]>,
    zeros: Vec<[Val; 2]>,
    /// For each tile of tokens the sums of the bytes of this lane's two tokens.
    sums: Vec<[Val; 2]>,
}
