//! How weights lie in an engine: the order that the matmul kernels stream them in.
//!
//! Weights are cut into panels of [`PANEL`] output columns. A panel is one contiguous run of its scale groups; a
//! group is its codes step by step along k, then the 64 scales, then the 64 zero points when there are any:
//!
//! ```text
//! panel = group*            group = step* scale[64] zero[64]
//! step of 4-bit codes   8 k: 64 columns x 4 bytes; byte i holds k+i in its low and k+4+i in its high half
//! step of 8-bit codes   4 k: 64 columns x 4 bytes; byte i holds k+i
//! step of wider codes   1 k: 64 columns
//! ```
//!
//! A vector of any width is thus some columns with four k side by side, which is what integer dot products take. Where
//! rows are bf16, dot products take two k side by side, each of 16 bits ([`Order::Pairs`]):
//!
//! ```text
//! step of 4-bit codes   8 k: 64 columns x 2 halves; half j holds k+j, k+2+j, k+4+j, k+6+j from its lowest bit up
//! step of 8-bit codes   4 k: 16 runs of 4 columns; k and k+1 of each column of the run, then k+2 and k+3 of each
//! step of bf16 codes    2 k: 64 columns x k and k+1
//! step of wider codes   1 k: 64 columns
//! ```
//!
//! Signed bytes in that order are stored as sign and size, where a sign and no size is -128.
//!
//! Every part is a multiple of 64 bytes. Columns past n have scale 0, k past the end of a group has code 0.
//!
//! The packer, its inverse and the emitters all ask [`Layout`]; nobody else knows positions.

use half::bf16;
use quantc_ir::diag::{Diag, Result};
use serde::{Deserialize, Serialize};

use crate::spec::{AFmt, Code, MatmulSpec, ScaleTy, WFmt, Zero};

/// Columns of a panel.
pub const PANEL: u32 = 64;

/// Which k lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Four, as bytes.
    Quads,
    /// Two, as halves of 32 bits.
    Pairs,
}

impl Order {
    /// The order for codes that meet such activations. Wide codes are converted one at a time, for all activations.
    pub fn of(code: Code, a: AFmt) -> Order {
        match (a, code) {
            (AFmt::F32 | AFmt::I8Token, _) | (AFmt::Bf16, Code::F32 | Code::F16) => Order::Quads,
            (AFmt::Bf16, _) => Order::Pairs,
        }
    }
}

/// The layout of one weight matrix of `n` rows (output columns) and `k` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Layout {
    /// Rows of the matrix: output columns of the matmul.
    pub n: u32,
    /// Columns of the matrix: length of the sums.
    pub k: u32,
    /// What is stored for a weight and for a group.
    pub w: WFmt,
    /// Which k lie side by side.
    pub order: Order,
}

/// Where a code lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// Byte in the blob.
    pub byte: u64,
    /// Bit in the byte where the code starts; 0 except for 4-bit codes.
    pub shift: u32,
}

/// Gives the rows of a quantized matrix to the packer.
pub trait WeightRows {
    /// Writes rows `from..from + count`, row by row.
    ///
    /// `codes` takes [`Code::source_bytes`] bytes a weight: unsigned storage codes of integers (a signed code plus its
    /// format's offset) and of four-bit formats, one a byte; the little-endian bits of floats. `scales` and `zeros` take one
    /// value for each group of the row, and are empty when the format has none; zero points are given as storage codes.
    fn rows(
        &mut self,
        from: u32,
        count: u32,
        codes: &mut [u8],
        scales: &mut [f32],
        zeros: &mut [i32],
    ) -> Result<()>;
}

/// A matrix taken out of its layout, row by row as [`WeightRows`] gives it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Unpacked {
    /// Codes.
    pub codes: Vec<u8>,
    /// Scales, one a group.
    pub scales: Vec<f32>,
    /// Zero points, one a group.
    pub zeros: Vec<i32>,
}

impl Unpacked {
    /// Nothing yet of a blob, which must have as many bytes as its layout.
    pub(crate) fn of(blob: &[u8], want: u64) -> Result<Unpacked> {
        let have = blob.len();
        if have as u64 == want {
            return Ok(Unpacked::default());
        }
        Err(Diag::input(format!("packed weights have {have} bytes, their layout {want}")))
    }

    /// Takes the scale of a group, and its zero point where the format has any, from their places in the blob.
    pub(crate) fn push_group(&mut self, blob: &[u8], w: &WFmt, scale: u64, zero: impl FnOnce() -> u64) {
        let from = &blob[scale as usize..];
        match w.scale {
            ScaleTy::None => {}
            ScaleTy::F32 => self.scales.push(f32::from_le_bytes([from[0], from[1], from[2], from[3]])),
            ScaleTy::Bf16 => self.scales.push(bf16::from_le_bytes([from[0], from[1]]).to_f32()),
        }
        if w.zero == Zero::Asym {
            self.zeros.push(i32::from(blob[zero() as usize]));
        }
    }
}

impl Layout {
    /// The layout of the weights of `spec`.
    pub fn of(spec: &MatmulSpec) -> Layout {
        Layout::new(spec.n, spec.k, spec.w, spec.a)
    }

    /// The layout of `n` rows of `k` weights that meet such activations.
    pub fn new(n: u32, k: u32, w: WFmt, a: AFmt) -> Layout {
        Layout { n, k, w, order: Order::of(w.code, a) }
    }

    /// Whether codes are stored as sign and size.
    pub fn sign_and_size(&self) -> bool {
        self.order == Order::Pairs && self.w.code == Code::U8 && self.w.zero == Zero::Sym(128)
    }

    /// Values of k in one step.
    pub fn step_k(&self) -> u32 {
        match self.w.code.bits() {
            4 => 8,
            8 => 4,
            16 if self.order == Order::Pairs => 2,
            _ => 1,
        }
    }

    /// Bytes of one step of a panel.
    pub fn step_bytes(&self) -> u32 {
        PANEL * self.step_k() * self.w.code.bits() / 8
    }

    /// Panels of the matrix.
    pub fn panels(&self) -> u32 {
        self.n.div_ceil(PANEL)
    }

    /// Scale groups of one row.
    pub fn groups(&self) -> u32 {
        self.k.div_ceil(self.w.group)
    }

    /// Columns of k in `group`.
    pub fn group_len(&self, group: u32) -> u32 {
        self.w.group.min(self.k - group * self.w.group)
    }

    /// Bytes of the codes of a group of `len` columns of k in one panel: where its scales start.
    pub fn codes_bytes(&self, len: u32) -> u32 {
        len.div_ceil(self.step_k()) * self.step_bytes()
    }

    /// Bytes of the scales of one group in one panel.
    pub fn scales_bytes(&self) -> u32 {
        PANEL * self.w.scale.bytes()
    }

    /// Bytes of the zero points of one group in one panel.
    pub fn zeros_bytes(&self) -> u32 {
        if self.w.zero == Zero::Asym { PANEL } else { 0 }
    }

    /// Bytes of a group of full length in one panel: the distance from group to group.
    pub fn group_bytes(&self) -> u32 {
        self.bytes_of(self.w.group)
    }

    fn bytes_of(&self, len: u32) -> u32 {
        self.codes_bytes(len) + self.scales_bytes() + self.zeros_bytes()
    }

    /// Bytes of one panel.
    pub fn panel_bytes(&self) -> u64 {
        let last = self.groups() - 1;
        u64::from(last) * u64::from(self.group_bytes()) + u64::from(self.bytes_of(self.group_len(last)))
    }

    /// Bytes of the blob.
    pub fn bytes(&self) -> u64 {
        u64::from(self.panels()) * self.panel_bytes()
    }

    fn group_start(&self, panel: u32, group: u32) -> u64 {
        u64::from(panel) * self.panel_bytes() + u64::from(group) * u64::from(self.group_bytes())
    }

    /// Where the code of weight `(n, k)` lies.
    pub fn code(&self, n: u32, k: u32) -> Place {
        let (panel, col) = (n / PANEL, n % PANEL);
        let (group, inner) = (k / self.w.group, k % self.w.group);
        let (step, i) = (inner / self.step_k(), inner % self.step_k());
        let at = self.group_start(panel, group) + u64::from(step) * u64::from(self.step_bytes());
        let (byte, shift) = match (self.w.code.bits(), self.order) {
            (4, Order::Quads) => (col * 4 + i % 4, i / 4 * 4),
            (4, Order::Pairs) => (col * 4 + i % 2 * 2 + i / 4, i / 2 % 2 * 4),
            (8, Order::Quads) => (col * 4 + i, 0),
            (8, Order::Pairs) => (col / 4 * 16 + i / 2 * 8 + col % 4 * 2 + i % 2, 0),
            (bits, _) => ((col * self.step_k() + i) * bits / 8, 0),
        };
        Place { byte: at + u64::from(byte), shift }
    }

    /// The first byte of the scale of row `n` and `group`.
    pub fn scale(&self, n: u32, group: u32) -> u64 {
        let at = self.group_start(n / PANEL, group) + u64::from(self.codes_bytes(self.group_len(group)));
        at + u64::from(n % PANEL * self.w.scale.bytes())
    }

    /// The byte of the zero point of row `n` and `group`.
    pub fn zero(&self, n: u32, group: u32) -> u64 {
        let at = self.group_start(n / PANEL, group) + u64::from(self.codes_bytes(self.group_len(group)));
        at + u64::from(self.scales_bytes()) + u64::from(n % PANEL)
    }

    /// A short readable name of the order, without the sizes.
    pub fn name(&self) -> String {
        let zero = if self.w.zero == Zero::Asym { ".zero" } else { "" };
        let scale = match self.w.scale {
            ScaleTy::None => "",
            ScaleTy::F32 => ".f32",
            ScaleTy::Bf16 => ".bf16",
        };
        let group = if self.w.group == self.k { "row".into() } else { format!("g{}", self.w.group) };
        let order = match self.order {
            Order::Quads => "",
            Order::Pairs if self.sign_and_size() => ".pairs.signed",
            Order::Pairs => ".pairs",
        };
        format!("panel{PANEL}.k{}.{}.{group}{scale}{zero}{order}", self.step_k(), self.w.code.name())
    }

    /// The digest of everything that decides positions. Kernels and blobs with different digests do not fit.
    pub fn hash(&self) -> blake3::Hash {
        let Layout { n, k, w, .. } = self;
        blake3::hash(format!("{} n{n} k{k} group{}", self.name(), w.group).as_bytes())
    }

    /// Packs a matrix and hands the blob to `out`, panel by panel; at most one panel is in memory.
    pub fn pack(&self, rows: &mut dyn WeightRows, out: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let width = PANEL.min(self.n) as usize;
        let (k, groups) = (self.k as usize, self.groups() as usize);
        let row_bytes = k * self.w.code.source_bytes();
        let mut codes = vec![0; width * row_bytes];
        let mut scales = vec![0.0; if self.w.scale == ScaleTy::None { 0 } else { width * groups }];
        let mut zeros = vec![0; if self.w.zero == Zero::Asym { width * groups } else { 0 }];
        let size = usize::try_from(self.panel_bytes())
            .map_err(|_| Diag::system("a panel of weights is larger than the address space"))?;
        let mut blob = vec![0; size];
        for panel in 0..self.panels() {
            let from = panel * PANEL;
            let count = PANEL.min(self.n - from);
            let n = count as usize;
            let scales_end = if scales.is_empty() { 0 } else { n * groups };
            let zeros_end = if zeros.is_empty() { 0 } else { n * groups };
            let (codes, scales) = (&mut codes[..n * row_bytes], &mut scales[..scales_end]);
            let zeros = &mut zeros[..zeros_end];
            rows.rows(from, count, codes, scales, zeros)?;
            self.check(from, codes, scales, zeros)?;
            blob.fill(0);
            for col in 0..count {
                let row = &codes[col as usize * row_bytes..][..row_bytes];
                self.pack_row(col, row, &mut blob);
                for group in 0..self.groups() {
                    let at = (col * self.groups() + group) as usize;
                    let to = self.scale(col, group) as usize;
                    match self.w.scale {
                        ScaleTy::None => {}
                        ScaleTy::F32 => blob[to..to + 4].copy_from_slice(&scales[at].to_le_bytes()),
                        ScaleTy::Bf16 => {
                            blob[to..to + 2].copy_from_slice(&bf16::from_f32(scales[at]).to_le_bytes());
                        }
                    }
                    if let Some(&zero) = zeros.get(at) {
                        blob[self.zero(col, group) as usize] = zero as u8;
                    }
                }
            }
            out(&blob)?;
        }
        Ok(())
    }

    /// Puts one row's codes into a panel: the index function, with what does not change taken out of the loop.
    fn pack_row(&self, col: u32, row: &[u8], blob: &mut [u8]) {
        let bytes = self.w.code.source_bytes();
        for group in 0..self.groups() {
            let first = group * self.w.group;
            let begin = self.code(col, first).byte as usize;
            for (n, step) in (0..self.group_len(group)).step_by(self.step_k() as usize).enumerate() {
                let at = begin + n * self.step_bytes() as usize;
                let len = self.step_k().min(self.group_len(group) - step) as usize;
                let from = &row[(first + step) as usize * bytes..][..len * bytes];
                match (self.w.code.bits(), self.order) {
                    (4, Order::Quads) => {
                        for (i, &code) in from.iter().enumerate() {
                            blob[at + i % 4] |= code << (i / 4 * 4);
                        }
                    }
                    (4, Order::Pairs) => {
                        for (i, &code) in from.iter().enumerate() {
                            blob[at + i % 2 * 2 + i / 4] |= code << (i / 2 % 2 * 4);
                        }
                    }
                    (8, Order::Pairs) => {
                        for (i, pair) in from.chunks(2).enumerate() {
                            let to = &mut blob[at + i * 8..][..pair.len()];
                            to.copy_from_slice(pair);
                            if self.sign_and_size() {
                                to.iter_mut().for_each(|c| *c = sign_and_size(*c));
                            }
                        }
                    }
                    _ => blob[at..at + from.len()].copy_from_slice(from),
                }
            }
        }
    }

    /// Refuses what cannot be stored, or would not mean the same afterwards.
    fn check(&self, from: u32, codes: &[u8], scales: &[f32], zeros: &[i32]) -> Result<()> {
        let k = self.k as usize;
        let place = |at: usize, per_row: usize| format!("row {}", from as usize + at / per_row);
        let bytes = self.w.code.source_bytes();
        let bad = match self.w.code {
            Code::U8 => None,
            Code::U4 | Code::Lut4 => codes.iter().position(|&c| c > 15),
            Code::E4m3 => codes.iter().position(|&c| c & 0x7f == 0x7f),
            Code::E5m2 => codes.iter().position(|&c| c & 0x7c == 0x7c),
            Code::F16 => codes.chunks_exact(2).position(|c| c[1] & 0x7c == 0x7c),
            Code::Bf16 => codes.chunks_exact(2).position(|c| c[1] & 0x7f == 0x7f && c[0] & 0x80 != 0),
            Code::F32 => codes.chunks_exact(4).position(|c| c[3] & 0x7f == 0x7f && c[2] & 0x80 != 0),
        };
        if let Some(at) = bad {
            let code = &codes[at * bytes..(at + 1) * bytes];
            return Err(match self.w.code {
                Code::U4 | Code::Lut4 => Diag::bug(format!(
                    "weight code {} of {} does not fit in four bits",
                    code[0],
                    place(at, k)
                )),
                _ => Diag::input(format!("a weight of {}, column {} is not finite", place(at, k), at % k)),
            });
        }
        let groups = self.groups() as usize;
        if let Some(at) = scales.iter().position(|s| !s.is_finite()) {
            return Err(Diag::input(format!("a weight scale of {} is not finite", place(at, groups))));
        }
        if self.w.scale == ScaleTy::Bf16
            && let Some(at) = scales.iter().position(|&s| bf16::from_f32(s).to_f32() != s)
        {
            return Err(Diag::bug(format!(
                "weight scale {} of {} is not a bf16 number",
                scales[at],
                place(at, groups)
            )));
        }
        if let Some(at) = zeros.iter().position(|z| !(0..=255).contains(z)) {
            return Err(Diag::bug(format!(
                "zero point {} of {} does not fit in eight bits",
                zeros[at],
                place(at, groups)
            )));
        }
        Ok(())
    }

    /// Takes a matrix out of its blob: the inverse of [`Layout::pack`].
    pub fn unpack(&self, blob: &[u8]) -> Result<Unpacked> {
        let mut out = Unpacked::of(blob, self.bytes())?;
        let bytes = self.w.code.source_bytes();
        for n in 0..self.n {
            for k in 0..self.k {
                let place = self.code(n, k);
                let at = place.byte as usize;
                match self.w.code.bits() {
                    4 => out.codes.push(blob[at] >> place.shift & 15),
                    _ if self.sign_and_size() => out.codes.push(sign_and_size(blob[at] ^ 0x80) ^ 0x80),
                    _ => out.codes.extend_from_slice(&blob[at..at + bytes]),
                }
            }
            for group in 0..self.groups() {
                out.push_group(blob, &self.w, self.scale(n, group), || self.zero(n, group));
            }
        }
        Ok(out)
    }
}

/// A signed byte, given with an offset of 128, as sign and size; undone by itself between two offsets.
fn sign_and_size(code: u8) -> u8 {
    let signed = code ^ 0x80;
    if signed < 0x80 { signed } else { signed.wrapping_neg() | 0x80 }
}

impl WeightRows for (&Layout, &Unpacked) {
    fn rows(
        &mut self,
        from: u32,
        count: u32,
        codes: &mut [u8],
        scales: &mut [f32],
        zeros: &mut [i32],
    ) -> Result<()> {
        let (layout, all) = self;
        let (from, count) = (from as usize, count as usize);
        let row = layout.k as usize * layout.w.code.source_bytes();
        let groups = layout.groups() as usize;
        let short = || Diag::bug("the matrix has fewer rows than its layout");
        codes.copy_from_slice(all.codes.get(from * row..(from + count) * row).ok_or_else(short)?);
        if !scales.is_empty() {
            scales.copy_from_slice(all.scales.get(from * groups..(from + count) * groups).ok_or_else(short)?);
        }
        if !zeros.is_empty() {
            zeros.copy_from_slice(all.zeros.get(from * groups..(from + count) * groups).ok_or_else(short)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn layouts() -> impl Strategy<Value = Layout> {
        let code = prop::sample::select(vec![
            Code::F32,
            Code::F16,
            Code::Bf16,
            Code::U8,
            Code::U4,
            Code::Lut4,
            Code::E4m3,
            Code::E5m2,
        ]);
        let scale = prop::sample::select(vec![ScaleTy::F32, ScaleTy::Bf16]);
        let a = prop::sample::select(vec![AFmt::F32, AFmt::Bf16]);
        (code, 1u32..150, 1u32..200, 1u32..200, scale, any::<bool>(), a).prop_map(
            |(code, n, k, group, scale, asym, a)| {
                let group = group.min(k);
                let zero = match (asym, code) {
                    (true, Code::U4 | Code::U8) => Zero::Asym,
                    (false, Code::U8) => Zero::Sym(128),
                    _ => Zero::Sym(0),
                };
                let plain = !code.is_int() && code.bits() >= 16;
                let scale = if plain { ScaleTy::None } else { scale };
                let group = if plain { k } else { group };
                Layout::new(n, k, WFmt { code, group, zero, scale }, a)
            },
        )
    }

    fn fill(layout: &Layout, seed: u64) -> Unpacked {
        use rand::{Rng, SeedableRng};
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let weights = (layout.n * layout.k) as usize;
        let groups = (layout.n * layout.groups()) as usize;
        let mut codes = vec![];
        for _ in 0..weights {
            match layout.w.code {
                Code::U4 | Code::Lut4 => codes.push(rng.random_range(0..16)),
                Code::U8 => codes.push(rng.random()),
                Code::E4m3 => codes.push(rng.random_range(0..0x7f)),
                Code::E5m2 => codes.push(rng.random_range(0x80..0xfc)),
                code => {
                    // Finite for all three: the top exponent bit is off.
                    let mut bytes = [0; 4];
                    rng.fill(&mut bytes[..code.source_bytes()]);
                    bytes[code.source_bytes() - 1] &= 0xbf;
                    codes.extend_from_slice(&bytes[..code.source_bytes()]);
                }
            }
        }
        let scales = if layout.w.scale == ScaleTy::None { 0 } else { groups };
        let zeros = if layout.w.zero == Zero::Asym { groups } else { 0 };
        Unpacked {
            codes,
            scales: (0..scales).map(|_| bf16::from_f32(rng.random_range(0.1..2.0)).to_f32()).collect(),
            zeros: (0..zeros).map(|_| rng.random_range(0..256)).collect(),
        }
    }

    fn pack(layout: &Layout, from: &Unpacked) -> Result<Vec<u8>> {
        let mut blob = vec![];
        layout.pack(&mut (layout, from), &mut |panel| {
            blob.extend_from_slice(panel);
            Ok(())
        })?;
        Ok(blob)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn positions_are_one_to_one(layout in layouts()) {
            let mut taken = BTreeSet::new();
            let mut take = |byte: u64, shift: u32, bits: u32| {
                for bit in shift..shift + bits {
                    let at = byte * 8 + u64::from(bit);
                    assert!(at < layout.bytes() * 8, "bit {at} lies outside the blob");
                    assert!(taken.insert(at), "bit {at} is used twice");
                }
            };
            for n in 0..layout.n {
                for k in 0..layout.k {
                    let place = layout.code(n, k);
                    take(place.byte, place.shift, layout.w.code.bits());
                }
                for group in 0..layout.groups() {
                    take(layout.scale(n, group), 0, layout.w.scale.bytes() * 8);
                    if layout.w.zero == Zero::Asym {
                        take(layout.zero(n, group), 0, 8);
                    }
                }
            }
        }

        #[test]
        fn unpacking_undoes_packing(layout in layouts(), seed in any::<u64>()) {
            let matrix = fill(&layout, seed);
            let blob = pack(&layout, &matrix).unwrap();
            prop_assert_eq!(blob.len() as u64, layout.bytes());
            prop_assert_eq!(layout.panel_bytes() % 64, 0);
            prop_assert_eq!(layout.unpack(&blob).unwrap(), matrix);
        }
    }

    #[test]
    fn padding_is_neutral() {
        let w = WFmt { code: Code::U4, group: 12, zero: Zero::Asym, scale: ScaleTy::F32 };
        let layout = Layout::new(3, 29, w, AFmt::I8Token);
        let blob = pack(&layout, &fill(&layout, 7)).unwrap();
        let padded = Layout::new(64, 29, w, AFmt::I8Token).unpack(&blob).unwrap();
        assert!(padded.scales[3 * 3..].iter().all(|&s| s == 0.0));
        assert!(padded.codes[3 * 29..].iter().all(|&c| c == 0));
        // The second group ends after four of its second step's eight columns.
        let last = layout.code(1, 23).byte as usize;
        assert_eq!(blob[last] >> 4, 0);
    }

    #[test]
    fn what_cannot_be_stored_is_refused() {
        let of = |code, scale| {
            let w = WFmt { code, group: 3, zero: Zero::Sym(0), scale };
            let layout = Layout::new(2, 3, w, AFmt::F32);
            (layout, fill(&layout, 1))
        };
        let (layout, mut matrix) = of(Code::U4, ScaleTy::Bf16);
        matrix.scales[1] = 1.0 + f32::EPSILON;
        assert!(pack(&layout, &matrix).unwrap_err().message.contains("not a bf16"));
        let (layout, mut matrix) = of(Code::U4, ScaleTy::F32);
        matrix.codes[4] = 16;
        assert!(pack(&layout, &matrix).unwrap_err().message.contains("row 1"));
        for (code, bits) in [
            (Code::E4m3, &[0xff][..]),
            (Code::E5m2, &[0x7c]),
            (Code::F16, &[0, 0xfc]),
            (Code::Bf16, &[0x80, 0x7f]),
            (Code::F32, &[0, 0, 0x80, 0xff]),
        ] {
            let (layout, mut matrix) = of(code, ScaleTy::F32);
            matrix.codes[bits.len()..2 * bits.len()].copy_from_slice(bits);
            let diag = pack(&layout, &matrix).unwrap_err();
            assert_eq!(diag.message, "a weight of row 0, column 1 is not finite", "{code:?}");
        }
        let (layout, mut matrix) = of(Code::E4m3, ScaleTy::F32);
        matrix.scales[0] = f32::NAN;
        assert!(pack(&layout, &matrix).is_err());
        assert!(layout.unpack(&[0; 5]).is_err());
    }

    #[test]
    fn the_hash_tells_layouts_apart() {
        let w = WFmt { code: Code::U4, group: 32, zero: Zero::Sym(8), scale: ScaleTy::Bf16 };
        let base = Layout::new(64, 128, w, AFmt::F32);
        let others = [
            Layout::new(64, 128, w, AFmt::Bf16),
            Layout { n: 65, ..base },
            Layout { k: 120, ..base },
            Layout { w: WFmt { code: Code::U8, ..w }, ..base },
            Layout { w: WFmt { group: 64, ..w }, ..base },
            Layout { w: WFmt { scale: ScaleTy::F32, ..w }, ..base },
            Layout { w: WFmt { zero: Zero::Asym, ..w }, ..base },
        ];
        assert!(others.iter().all(|l| l.hash() != base.hash()));
        assert_eq!(base.name(), "panel64.k8.u4.g32.bf16");
        // The format's offset is the kernel's business, not the layout's.
        assert_eq!(Layout { w: WFmt { zero: Zero::Sym(0), ..w }, ..base }.hash(), base.hash());
    }
}
