//! What a warp computes of a product: some tiles of 16 output columns by some tiles of 8 tokens.
//!
//! Templates differ in where the fragments of weights and tokens come from ([`Fragments`]), and in how warps share the
//! work; what happens to the fragments is the same and is here. Scales belong to the sums of a group, not to weights:
//! products are of codes, which are exact in bf16 as in bytes, and cost no multiplication per weight. Sums of bytes are
//! exact; where a row of weights has one scale they stay integers to the end.

use super::dequant::{self, Offset};
use super::expr::wide;
use super::layout::{FragmentLayout, Meets};
use super::tile::{Binary, Builder, Mem, MmaKind, Reg, Unary, Val};
use crate::cpu::math::Lanes;
use crate::spec::{MatmulSpec, ScaleTy, Zero};

/// Tokens of a tile.
pub const TOKENS: u32 = 8;

/// Bytes of a token that a lane needs for one matrix product.
pub const STEP_BYTES: u32 = 8;

/// One tile of sums: output columns by tokens.
pub(super) type Acc = [Reg; 4];

/// The fragments of some columns of k. Tiles of output columns are counted over all products.
pub(super) trait Fragments {
    /// The codes of a chunk: two words of row g, two of row g + 8.
    fn codes(&self, b: &mut Builder, tile: u32, chunk: u32) -> Vec<Val>;
    /// The words of this lane's token in a tile of tokens that meet a run of adjacent columns.
    fn tokens(&self, b: &mut Builder, tile: u32, run: u32) -> Vec<Val>;
    /// The record of a scale group.
    fn record(&self, b: &mut Builder, tile: u32, group: u32) -> Vec<Val>;
    /// The sums over a scale group of the bytes of this lane's two tokens in a tile of tokens.
    fn sums(&self, b: &mut Builder, tile: u32, group: u32) -> [Val; 2];
}

/// What a warp computes.
#[derive(Clone, Copy, Debug)]
pub(super) struct WarpTile<'a> {
    /// The product.
    pub spec: &'a MatmulSpec,
    /// How its weights lie.
    pub layout: FragmentLayout,
    /// Tiles of output columns, of each product.
    pub rows: u32,
    /// Tiles of tokens.
    pub tokens: u32,
    /// Columns of k that are multiplied at a time.
    pub columns: u32,
}

impl WarpTile<'_> {
    /// Tiles of output columns of all products.
    pub fn row_tiles(&self) -> u32 {
        self.spec.products() * self.rows
    }

    /// Bytes of one number of a token.
    pub fn token_bytes(&self) -> u32 {
        match self.layout.meets {
            Meets::Bf16 => 2,
            Meets::Bytes => 1,
        }
    }

    /// Bytes of a run of adjacent columns of a token that a lane takes at a time: a quarter of a span, or a part of it.
    pub fn run_bytes(&self) -> u32 {
        (self.layout.span() / 4 * self.token_bytes()).min(16)
    }

    /// Runs of a lane in the columns.
    pub fn runs(&self) -> u32 {
        self.columns / 4 * self.token_bytes() / self.run_bytes()
    }

    /// Byte of a token's columns where lane t's run begins: what is the same for all lanes, and the factor on t.
    pub fn run_start(&self, run: u32) -> (u32, u32) {
        let quarter = self.layout.span() / 4 * self.token_bytes();
        let (span, part) = (run * self.run_bytes() / quarter, run * self.run_bytes() % quarter);
        (span * self.layout.span() * self.token_bytes() + part, quarter)
    }

    /// Chunks of the columns.
    pub fn chunks(&self) -> u32 {
        self.columns / self.layout.chunk_k()
    }

    /// Scale groups of the columns, of which a longer group counts as one; none where a row has one scale.
    pub fn groups(&self) -> u32 {
        if self.layout.per_row() { 0 } else { self.columns.div_ceil(self.layout.w.group) }
    }

    /// The scale group that the columns with this number begin with.
    pub fn first_group(&self, b: &mut Builder, number: Val) -> Val {
        let group = self.layout.w.group;
        match group < self.columns {
            true => b.mul(number, self.columns / group),
            false => b.div(number, group / self.columns),
        }
    }

    /// Whether sums are integers until the end.
    pub fn stays_integer(&self) -> bool {
        self.layout.meets == Meets::Bytes && self.layout.per_row()
    }

    /// Whether sums of scale groups need the sums of the tokens' bytes.
    pub fn needs_sums(&self) -> bool {
        let zeros = match self.layout.w.zero {
            Zero::Asym => true,
            Zero::Sym(z) => dequant::stored_zero(&self.layout, z) != 0,
        };
        zeros && self.layout.meets == Meets::Bytes && !self.layout.per_row()
    }

    /// Sums of nothing, for all tiles.
    pub fn accs(&self, b: &mut Builder) -> Vec<Acc> {
        self.zeros(b, self.stays_integer())
    }

    /// Sums of nothing, as integers or floats.
    pub fn zeros(&self, b: &mut Builder, integer: bool) -> Vec<Acc> {
        let tile = |b: &mut Builder| [(); 4].map(|()| if integer { b.var(0) } else { b.var(0.0) });
        (0..self.row_tiles() * self.tokens).map(|_| tile(b)).collect()
    }

    /// Offsets of codes where they are the same along a row: for each tile of output columns, of rows g and g + 8.
    /// `tiles` are the tiles' numbers in the matrix.
    pub fn row_offsets(
        &self,
        b: &mut Builder,
        weights: &[Mem],
        tiles: &[Val],
        g: Val,
    ) -> Vec<[Option<Offset>; 2]> {
        let layout = &self.layout;
        if layout.meets == Meets::Bytes || layout.w.zero != Zero::Asym || !layout.per_row() {
            return vec![[dequant::fixed_offset(layout); 2]; self.row_tiles() as usize];
        }
        let mut list = vec![];
        for &w in weights {
            for &tile in tiles {
                let in_tile = b.mad(g, layout.record_bytes(), layout.codes_bytes());
                let at = wide(b, tile, layout.tile_bytes(), in_tile);
                let record = b.load(w, at, layout.record_bytes());
                list.push(self.zeros_of(b, &record).map(|z| Some(dequant::offset(b, layout, z))));
            }
        }
        list
    }

    /// Adds the products of some columns. `fixed` are the offsets of [`WarpTile::row_offsets`].
    pub fn compute(&self, b: &mut Builder, from: &dyn Fragments, acc: &[Acc], fixed: &[[Option<Offset>; 2]]) {
        let layout = &self.layout;
        let kind = match layout.meets {
            Meets::Bf16 => MmaKind::Bf16,
            Meets::Bytes => MmaKind::S8,
        };
        let steps = layout.chunk_k() / kind.k();
        let per_run = self.run_bytes() / STEP_BYTES;
        // Steps of a scale group.
        let per_group = if layout.per_row() { u32::MAX } else { layout.w.group.min(self.columns) / kind.k() };
        let (mut sub, mut group) = (vec![], Group::default());
        let (mut codes, mut tokens) = (vec![], vec![]);
        for at in 0..self.chunks() * steps {
            let (chunk, step) = (at / steps, at % steps);
            if step == 0 {
                codes = (0..self.row_tiles()).map(|i| from.codes(b, i, chunk)).collect();
            }
            if at % per_run == 0 {
                tokens = (0..self.tokens).map(|i| from.tokens(b, i, at / per_run)).collect::<Vec<_>>();
            }
            if !layout.per_row() && at % per_group == 0 {
                group = self.group(b, from, at / per_group);
                sub = self.zeros(b, layout.meets == Meets::Bytes);
            }
            for (i, words) in codes.iter().enumerate() {
                let offsets = group.offsets.get(i).unwrap_or(&fixed[i]);
                let left = self.left(b, words, step, offsets);
                for (j, words) in tokens.iter().enumerate() {
                    let to = i * self.tokens as usize + j;
                    let to = if layout.per_row() { acc[to] } else { sub[to] };
                    let first = (at % per_run * 2) as usize;
                    b.mma(kind, to, left, [words[first], words[first + 1]]);
                }
            }
            if !layout.per_row() && (at + 1) % per_group == 0 {
                self.end_group(b, &group, &sub, acc);
            }
        }
    }

    /// The left side of a matrix product: a step of a chunk's codes.
    pub fn left(&self, b: &mut Builder, words: &[Val], step: u32, offsets: &[Option<Offset>; 2]) -> [Val; 4] {
        [(0, 0), (1, 0), (0, 1), (1, 1)].map(|(row, part)| {
            let words = [words[2 * row], words[2 * row + 1]];
            match self.layout.meets {
                Meets::Bf16 => dequant::bf16_pair(b, &self.layout, words, 2 * step + part, offsets[row]),
                Meets::Bytes => dequant::byte_word(b, &self.layout, words, 2 * step + part),
            }
        })
    }

    /// What is known of a scale group.
    fn group(&self, b: &mut Builder, from: &dyn Fragments, index: u32) -> Group {
        let records = (0..self.row_tiles()).map(|i| from.record(b, i, index)).collect();
        let mut group = self.group_of(b, records);
        if self.needs_sums() {
            group.sums = (0..self.tokens).map(|i| from.sums(b, i, index)).collect();
        }
        group
    }

    /// What records, of each tile of output columns, tell of a scale group.
    pub fn group_of(&self, b: &mut Builder, records: Vec<Vec<Val>>) -> Group {
        let mut group = Group::default();
        for record in records {
            group.scales.push(self.scales_of(b, &record));
            if self.layout.w.zero == Zero::Asym {
                let zeros = self.zeros_of(b, &record);
                match self.layout.meets {
                    Meets::Bf16 => {
                        group.offsets.push(zeros.map(|z| Some(dequant::offset(b, &self.layout, z))));
                    }
                    Meets::Bytes => group.zeros.push(zeros),
                }
            }
        }
        group
    }

    /// Adds the sums of a group, scaled.
    pub fn end_group(&self, b: &mut Builder, group: &Group, sub: &[Acc], acc: &[Acc]) {
        for (i, (sub, acc)) in sub.iter().zip(acc).enumerate() {
            let (tile, tokens) = (i / self.tokens as usize, i % self.tokens as usize);
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

    /// A sum of byte products less what zero points put in, as a float. `total` is the sum of the token's bytes.
    pub fn corrected(&self, b: &mut Builder, sum: Val, zero: Option<Val>, total: Option<Val>) -> Val {
        let factor = dequant::byte_factor(&self.layout);
        let stored = match (zero, self.layout.w.zero) {
            (Some(z), _) => Some(b.binary(Binary::Sub, z, u32::from(self.layout.flip()))),
            (None, Zero::Sym(z)) => {
                let stored = dequant::stored_zero(&self.layout, z);
                (stored != 0).then_some(Val::U32(stored as u32))
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

/// What is known of a scale group: for each tile of output columns, of rows g and g + 8.
#[derive(Default)]
pub(super) struct Group {
    scales: Vec<[Val; 2]>,
    pub offsets: Vec<[Option<Offset>; 2]>,
    zeros: Vec<[Val; 2]>,
    /// For each tile of tokens the sums of the bytes of this lane's two tokens.
    sums: Vec<[Val; 2]>,
}
