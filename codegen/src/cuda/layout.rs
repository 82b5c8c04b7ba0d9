//! How weights lie for products of warps: as the lanes' own fragments, so that a lane loads what it multiplies.
//!
//! The matrix is cut into tiles of 16 rows. A tile is its codes, chunk by chunk, then a record for each scale group and
//! pair of rows:
//!
//! ```text
//! tile   = chunk* record[group][8]          chunk  = 16 bytes for each of 32 lanes
//! lane g * 4 + t of a chunk: 8 bytes of row g, then 8 bytes of row g + 8
//! record g of a group: the scales of rows g and g + 8, then their zero points when there are any; 4, 8 or 16 bytes
//! ```
//!
//! A chunk has 64 columns of 4-bit codes, 32 of 8-bit ones, 16 of wider ones. Its columns are cut into spans, of a scale
//! group each where groups are shorter than a chunk; of each span lane t holds the t-th quarter. Sums do not care in
//! which order columns come, so the rows that weights meet are read in the same way: a quarter of a span is a run of
//! adjacent numbers. In the 8 bytes of a row, numbers lie as one step takes them apart:
//!
//! ```text
//! for bf16 rows    4 bits: number i of 8 at nibble i / 2 + 4 (i % 2) of a word; 8 bits: i of 4 at byte i / 2 + 2 (i % 2)
//! for bytes        4 bits: number i of 8 in byte i % 4, the first four in low halves; 8 bits: in order
//! ```
//!
//! Integers of 8 bits, and of 4 bits for byte products, are stored as two's complement around the middle code. Columns
//! are padded to whole units of [`UNIT`], rows to whole tiles, with zeros and scales of zero.

use crate::layout::{Place, Unpacked, WeightRows};
use crate::spec::{AFmt, Code, MatmulSpec, ScaleTy, WFmt, Zero};
use half::bf16;
use quantc_ir::diag::{Diag, Result};
use serde::{Deserialize, Serialize};

/// Rows of a tile.
pub const TILE: u32 = 16;

/// Columns that kernels take at a time.
pub const UNIT: u32 = 128;

/// Bytes of a chunk.
pub const CHUNK_BYTES: u32 = 512;

/// What weights meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Meets {
    /// Rows of bf16; weights become bf16 in registers.
    Bf16,
    /// Rows of signed bytes; weights are bytes, or become bytes in registers.
    Bytes,
}

/// The layout of one weight matrix of `n` rows (output columns) and `k` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FragmentLayout {
    /// Rows of the matrix.
    pub n: u32,
    /// Columns of the matrix: length of the sums.
    pub k: u32,
    /// What is stored for a weight and for a group.
    pub w: WFmt,
    /// What weights meet.
    pub meets: Meets,
}

impl FragmentLayout {
    /// The layout of the weights of `spec`, or what about them has no CUDA kernel.
    pub fn of(spec: &MatmulSpec) -> Result<FragmentLayout> {
        FragmentLayout::new(spec.n, spec.k, spec.w, spec.a)
    }

    /// The layout of `n` rows of `k` weights that meet such activations, or what about them has no CUDA kernel.
    pub fn new(n: u32, k: u32, w: WFmt, a: AFmt) -> Result<FragmentLayout> {
        let meets = match a {
            AFmt::Bf16 => Meets::Bf16,
            AFmt::I8Token => Meets::Bytes,
            AFmt::F32 => {
                return Err(Diag::target("products of f32 activations have no CUDA kernel")
                    .help("cast the activations to bf16, or quantize them to int8; the preset `bf16` does the first and is else as `f32`"));
            }
        };
        if matches!(w.code, Code::F16 | Code::F32) {
            let name = w.code.name();
            return Err(Diag::target(format!("weights of {name} have no CUDA kernel"))
                .help("cast the weights to bf16"));
        }
        let layout = FragmentLayout { n, k, w, meets };
        let group = w.group;
        let least = match meets {
            Meets::Bf16 => 16,
            Meets::Bytes => 32,
        };
        let fits = group >= k || group.is_multiple_of(UNIT) || (UNIT.is_multiple_of(group) && group >= least);
        if !fits {
            return Err(Diag::target(format!("scale groups of {group} columns have no CUDA kernel")).help(
                format!(
                    "groups may be whole rows, powers of two from {least} to {UNIT}, or multiples of {UNIT}"
                ),
            ));
        }
        Ok(layout)
    }

    /// Whether there is one scale for each row.
    pub fn per_row(&self) -> bool {
        self.w.group >= self.k
    }

    /// Columns of one lane in a chunk, of each of its two rows.
    pub fn lane_k(&self) -> u32 {
        64 / self.w.code.bits()
    }

    /// Columns of a chunk.
    pub fn chunk_k(&self) -> u32 {
        4 * self.lane_k()
    }

    /// Columns of a span.
    pub fn span(&self) -> u32 {
        if self.per_row() { self.chunk_k() } else { self.chunk_k().min(self.w.group) }
    }

    /// Units of a row.
    pub fn units(&self) -> u32 {
        self.k.div_ceil(UNIT)
    }

    /// Groups of a row that have a record each.
    fn stored_groups(&self) -> u32 {
        if self.per_row() { 1 } else { (self.units() * UNIT).div_ceil(self.w.group) }
    }

    /// Bytes of the record of a group and two rows; 0 without scales.
    pub fn record_bytes(&self) -> u32 {
        let zeros = if self.w.zero == Zero::Asym { 2 } else { 0 };
        match 2 * self.w.scale.bytes() + zeros {
            0 => 0,
            bytes => bytes.next_power_of_two(),
        }
    }

    /// Tiles of the matrix.
    pub fn tiles(&self) -> u32 {
        self.n.div_ceil(TILE)
    }

    /// Bytes of the codes of a tile.
    pub fn codes_bytes(&self) -> u32 {
        self.units() * UNIT / self.chunk_k() * CHUNK_BYTES
    }

    /// Bytes of a tile: the distance from tile to tile, a multiple of 16.
    pub fn tile_bytes(&self) -> u32 {
        (self.codes_bytes() + self.stored_groups() * 8 * self.record_bytes()).next_multiple_of(16)
    }

    /// Bytes of the blob.
    pub fn bytes(&self) -> u64 {
        u64::from(self.tiles()) * u64::from(self.tile_bytes())
    }

    /// What turns a stored code into the code of the format: bits that are exclusive-ored.
    pub fn flip(&self) -> u8 {
        match (self.w.code, self.meets) {
            (Code::U8, _) => 0x80,
            (Code::U4, Meets::Bytes) => 8,
            _ => 0,
        }
    }

    /// Where the code of weight `(n, k)` lies.
    pub fn code(&self, n: u32, k: u32) -> Place {
        let (tile, row) = (n / TILE, n % TILE);
        let (chunk, inner) = (k / self.chunk_k(), k % self.chunk_k());
        let quarter = self.span() / 4;
        let (span, inner) = (inner / self.span(), inner % self.span());
        let lane = row % 8 * 4 + inner / quarter;
        let at = span * quarter + inner % quarter;
        let bits = match (self.w.code.bits(), self.meets) {
            (4, Meets::Bf16) => at / 8 * 32 + (at % 8 / 2 + at % 2 * 4) * 4,
            (4, Meets::Bytes) => at / 8 * 32 + at % 4 * 8 + at % 8 / 4 * 4,
            (8, Meets::Bf16) => at / 4 * 32 + (at % 4 / 2 + at % 2 * 2) * 8,
            (bits, _) => at * bits,
        };
        let byte = u64::from(tile) * u64::from(self.tile_bytes())
            + u64::from(chunk * CHUNK_BYTES + lane * 16 + row / 8 * 8 + bits / 8);
        Place { byte, shift: bits % 8 }
    }

    /// The first byte of the record of row `n` and `group`; rows g and g + 8 of a tile share it.
    pub fn record(&self, n: u32, group: u32) -> u64 {
        let at = self.codes_bytes() + (group * 8 + n % 8) * self.record_bytes();
        u64::from(n / TILE) * u64::from(self.tile_bytes()) + u64::from(at)
    }

    /// The first byte of the scale of row `n` and `group`.
    pub fn scale(&self, n: u32, group: u32) -> u64 {
        self.record(n, group) + u64::from(n % TILE / 8 * self.w.scale.bytes())
    }

    /// The byte of the zero point of row `n` and `group`.
    pub fn zero(&self, n: u32, group: u32) -> u64 {
        self.record(n, group) + u64::from(2 * self.w.scale.bytes() + n % TILE / 8)
    }

    /// A short readable name of the order, without the sizes.
    pub fn name(&self) -> String {
        let zero = if self.w.zero == Zero::Asym { ".zero" } else { "" };
        let scale = match self.w.scale {
            ScaleTy::None => "",
            ScaleTy::F32 => ".f32",
            ScaleTy::Bf16 => ".bf16",
        };
        let group = if self.per_row() { "row".into() } else { format!("g{}", self.w.group) };
        let meets = match self.meets {
            Meets::Bf16 => "bf16",
            Meets::Bytes => "bytes",
        };
        format!("fragment{TILE}.{meets}.{}.{group}{scale}{zero}", self.w.code.name())
    }

    /// The digest of everything that decides positions. Kernels and blobs with different digests do not fit.
    pub fn hash(&self) -> blake3::Hash {
        let FragmentLayout { n, k, w, .. } = self;
        blake3::hash(format!("{} n{n} k{k} group{}", self.name(), w.group).as_bytes())
    }

    /// Scale groups of a row of the matrix.
    pub fn groups(&self) -> u32 {
        self.k.div_ceil(self.w.group)
    }

    /// Packs a matrix and hands the blob to `out`, tile by tile; at most one tile is in memory.
    pub fn pack(&self, rows: &mut dyn WeightRows, out: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let bytes = self.w.code.source_bytes();
        let (k, groups) = (self.k as usize, self.groups() as usize);
        let height = TILE.min(self.n) as usize;
        let mut codes = vec![0; height * k * bytes];
        let mut scales = vec![0.0; if self.w.scale == ScaleTy::None { 0 } else { height * groups }];
        let mut zeros = vec![0; if self.w.zero == Zero::Asym { height * groups } else { 0 }];
        let mut blob = vec![0; self.tile_bytes() as usize];
        let first = FragmentLayout { n: TILE, ..*self };
        for tile in 0..self.tiles() {
            let from = tile * TILE;
            let count = TILE.min(self.n - from) as usize;
            let (codes, scales) = (&mut codes[..count * k * bytes], cut(&mut scales, count * groups));
            let zeros = cut(&mut zeros, count * groups);
            rows.rows(from, count as u32, codes, scales, zeros)?;
            blob.fill(0);
            for (row, line) in (0..).zip(codes.chunks_exact(k * bytes)) {
                for (column, code) in (0..).zip(line.chunks_exact(bytes)) {
                    let Place { byte, shift } = first.code(row, column);
                    let to = &mut blob[byte as usize..][..bytes];
                    match self.w.code.bits() {
                        4 => to[0] |= (code[0] ^ self.flip()) << shift,
                        8 => to[0] = code[0] ^ self.flip(),
                        _ => to.copy_from_slice(code),
                    }
                }
                for group in 0..self.groups() {
                    let at = (row * self.groups() + group) as usize;
                    if let Some(scale) = scales.get(at) {
                        let to = &mut blob[first.scale(row, group) as usize..];
                        match self.w.scale {
                            ScaleTy::Bf16 => to[..2].copy_from_slice(&bf16::from_f32(*scale).to_le_bytes()),
                            _ => to[..4].copy_from_slice(&scale.to_le_bytes()),
                        }
                    }
                    if let Some(zero) = zeros.get(at) {
                        blob[first.zero(row, group) as usize] = *zero as u8;
                    }
                }
            }
            out(&blob)?;
        }
        Ok(())
    }

    /// Takes a matrix out of its blob: the inverse of [`FragmentLayout::pack`].
    pub fn unpack(&self, blob: &[u8]) -> Result<Unpacked> {
        let mut out = Unpacked::of(blob, self.bytes())?;
        let bytes = self.w.code.source_bytes();
        for n in 0..self.n {
            for k in 0..self.k {
                let Place { byte, shift } = self.code(n, k);
                let from = &blob[byte as usize..][..bytes];
                match self.w.code.bits() {
                    4 => out.codes.push((from[0] >> shift & 15) ^ self.flip()),
                    8 => out.codes.push(from[0] ^ self.flip()),
                    _ => out.codes.extend_from_slice(from),
                }
            }
            for group in 0..self.groups() {
                out.push_group(blob, &self.w, self.scale(n, group), || self.zero(n, group));
            }
        }
        Ok(out)
    }
}

/// The first `count` of what there is, or nothing.
fn cut<T>(list: &mut [T], count: usize) -> &mut [T] {
    let count = count.min(list.len());
    &mut list[..count]
}
