//! Caches of keys and values: how they lie in memory, and how rows get into them.
//!
//! A slot of a state has `slot_rows` rows, a multiple of [`BLOCK`]. It holds its heads one after the other, and each
//! head its rows in blocks of [`BLOCK`] tokens, so that a kernel streams through one head. Inside a block,
//!
//! - keys lie with tokens innermost, `[width][token]`: a vector holds one column of many keys, and products with a
//!   query need no sums across lanes;
//! - values lie with columns innermost, `[token][width]`;
//! - where the target multiplies bytes four at a time, int8 goes in quads: keys `[width / 4][token][4]`, plus 128 so
//!   that they are unsigned, and values `[token / 4][width][4]`.
//!
//! Scales of codes are f32, `[head][slot_rows]` in each slot. Columns of codes are padded to [`CODE_COLUMNS`].
use quantc_ir::target::{Dot, TargetDesc};
use quantc_runtime::format::STATE_BLOCK;
use serde::{Deserialize, Serialize};

/// Tokens of a block.
pub const BLOCK: u32 = STATE_BLOCK;

/// Columns of a head of codes are a multiple of this.
pub const CODE_COLUMNS: u32 = 16;

/// What a cache holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheTy {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// Signed bytes, with a scale for each token and head or for each head.
    I8,
    /// OCP E4M3, with a scale for each token and head or for each head.
    E4m3,
}

impl CacheTy {
    /// Bytes of one number.
    pub const fn bytes(self) -> u32 {
        match self {
            CacheTy::F32 => 4,
            CacheTy::F16 | CacheTy::Bf16 => 2,
            CacheTy::I8 | CacheTy::E4m3 => 1,
        }
    }

    /// Short name, for symbols and messages.
    pub const fn name(self) -> &'static str {
        match self {
            CacheTy::F32 => "f32",
            CacheTy::F16 => "f16",
            CacheTy::Bf16 => "bf16",
            CacheTy::I8 => "i8",
            CacheTy::E4m3 => "e4m3",
        }
    }

    /// The largest magnitude that a code stands for, when numbers are stored as codes with scales.
    pub const fn largest_code(self) -> Option<f32> {
        match self {
            CacheTy::F32 | CacheTy::F16 | CacheTy::Bf16 => None,
            CacheTy::I8 => Some(127.0),
            CacheTy::E4m3 => Some(448.0),
        }
    }

    /// Whether scales belong to the numbers.
    pub const fn is_scaled(self) -> bool {
        self.largest_code().is_some()
    }

    /// Columns that a head of `head_dim` takes.
    pub const fn width(self, head_dim: u32) -> u32 {
        if self.is_scaled() { head_dim.next_multiple_of(CODE_COLUMNS) } else { head_dim }
    }
}

/// What attention does with a cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Multiplied with queries.
    Keys,
    /// Summed by weights.
    Values,
}

/// Where the numbers of a block are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockLayout {
    /// What the cache holds.
    pub ty: CacheTy,
    /// What for.
    pub role: Role,
    /// Columns of a head, padding included.
    pub width: u32,
    /// Whether bytes go in quads.
    pub quads: bool,
}

impl BlockLayout {
    /// The layout of a cache on a target.
    pub fn new(ty: CacheTy, role: Role, head_dim: u32, target: &TargetDesc) -> BlockLayout {
        let quads = ty == CacheTy::I8 && target.cpu.dots.contains(&Dot::Vnni);
        BlockLayout { ty, role, width: ty.width(head_dim), quads }
    }

    /// Bytes of a block of one head.
    pub fn bytes(&self) -> u32 {
        BLOCK * self.width * self.ty.bytes()
    }

    /// Bytes from one column to the next of the same token; with quads inside a quad for keys.
    pub fn column_stride(&self) -> u32 {
        let numbers = match (self.role, self.quads) {
            (Role::Keys, false) => BLOCK,
            (Role::Keys, true) | (Role::Values, false) => 1,
            (Role::Values, true) => 4,
        };
        numbers * self.ty.bytes()
    }

    /// The byte of a block at which the number of `token`, `column` begins.
    pub fn at(&self, token: u32, column: u32) -> u32 {
        let index = match (self.role, self.quads) {
            (Role::Keys, false) => column * BLOCK + token,
            (Role::Keys, true) => column / 4 * BLOCK * 4 + token * 4 + column % 4,
            (Role::Values, false) => token * self.width + column,
            (Role::Values, true) => token / 4 * self.width * 4 + column * 4 + token % 4,
        };
        index * self.ty.bytes()
    }
}

/// Writes row i of `x` into row `base[i] + positions[i]` of a state, as its type; codes with their scales.
///
/// Arguments: x `f32[t][x_stride]`, positions and base `i32[t]`, with fixed scales those, `f32[heads]`, then the state, and
/// for codes with other scales the state of these. Items: `heads` for each token. Codes are those of `quantize` with the
/// fixed scales, or with those of `dynamic_scale`: `s = absmax / largest`, or 1 for zeros, and the code nearest to `x / s`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct CacheAppendSpec {
    /// Heads of a row.
    pub heads: u32,
    /// Columns of a head.
    pub head_dim: u32,
    /// Elements from one row of x to the next.
    pub x_stride: u32,
    /// What the state holds.
    pub ty: CacheTy,
    /// What it is for.
    pub role: Role,
    /// Of codes, whether their scales are given, one for each head.
    pub fixed_scales: bool,
    /// Rows of a slot.
    pub slot_rows: u32,
}

impl CacheAppendSpec {
    /// Why no kernel can be emitted, if none can.
    pub fn check(&self) -> Result<(), String> {
        let width = u64::from(self.heads) * u64::from(self.head_dim);
        if width == 0 || u64::from(self.x_stride) < width {
            return Err(format!("rows of {width} columns, {} apart", self.x_stride));
        }
        check_slot_rows(self.slot_rows)
    }
}

/// Refuses slots that are not whole blocks.
pub fn check_slot_rows(rows: u32) -> Result<(), String> {
    match rows {
        0 => Err("slots of no rows".to_owned()),
        rows if !rows.is_multiple_of(BLOCK) => {
            Err(format!("slots of {rows} rows, not whole blocks of {BLOCK}"))
        }
        _ => Ok(()),
    }
}

#[cfg(feature = "llvm")]
pub use emit::{Slots, emit_append, load};

#[cfg(feature = "llvm")]
mod emit {
    use inkwell::values::PointerValue;
    use quantc_ir::diag::{Diag, Result};

    use super::{BLOCK, BlockLayout, CacheAppendSpec, CacheTy, Role};
    use crate::cpu::llvm::{Elem, FloatCmp, IntCmp, Unit, Val, VecBuilder};
    use crate::eexpr::MemTy;
    use crate::eexpr::llvm::{Valid, load_mem, store_mem, to_i8_range};

    /// Addresses of the heads of a slot.
    #[derive(Clone, Copy)]
    pub struct Slots {
        /// Heads of a row.
        pub heads: i64,
        /// Rows of a slot.
        pub rows: i64,
        /// Bytes that one row of one head takes.
        pub row_bytes: i64,
    }

    impl Slots {
        /// Of the numbers themselves.
        pub fn of(layout: &BlockLayout, heads: u32, slot_rows: u32) -> Slots {
            let row_bytes = i64::from(layout.width * layout.ty.bytes());
            Slots { heads: heads.into(), rows: slot_rows.into(), row_bytes }
        }

        /// Of the scales beside codes.
        pub fn of_scales(heads: u32, slot_rows: u32) -> Slots {
            Slots { heads: heads.into(), rows: slot_rows.into(), row_bytes: 4 }
        }

        /// Where a head of the slot that begins at row `base` begins.
        pub fn head<'c>(
            &self,
            b: &VecBuilder<'_, 'c>,
            state: PointerValue<'c>,
            base: Val<'c>,
            head: Val<'c>,
        ) -> PointerValue<'c> {
            let slot = b.row(state, base, self.heads * self.row_bytes);
            b.row(slot, head, self.rows * self.row_bytes)
        }
    }

    /// Loads numbers of a cache that lie side by side, without their scales, as f32.
    pub fn load<'c>(
        b: &VecBuilder<'_, 'c>,
        ptr: PointerValue<'c>,
        ty: CacheTy,
        lanes: u32,
        valid: Valid<'c>,
    ) -> Val<'c> {
        let ty = match ty {
            CacheTy::F32 => MemTy::F32,
            CacheTy::F16 => MemTy::F16,
            CacheTy::Bf16 => MemTy::Bf16,
            CacheTy::I8 => MemTy::I8,
            CacheTy::E4m3 => return e4m3_to_f32(b, b.load(ptr, Elem::I8, lanes)),
        };
        load_mem(b, ptr, ty, lanes, valid)
    }

    /// The sign, and exponent and fraction in the place of an f32's, whose bias is 120 larger. The product is exact,
    /// subnormal codes included. The two codes of NaN give 480, which saturated codes never are.
    fn e4m3_to_f32<'c>(b: &VecBuilder<'_, 'c>, codes: Val<'c>) -> Val<'c> {
        let n = b.lanes(codes);
        let moved = b.shl(b.sext(codes, Elem::I32), b.i32(n, 20));
        let bits = b.and(moved, b.i32(n, 0x87f0_0000_u32 as i32));
        b.fmul(b.bitcast(bits, Elem::F32, n), b.f32(n, 2f32.powi(120)))
    }

    /// The codes nearest to f32 lanes, ties to even, saturating; NaN stays NaN.
    fn f32_to_e4m3<'c>(b: &VecBuilder<'_, 'c>, v: Val<'c>) -> Val<'c> {
        let n = b.lanes(v);
        let bits = b.bitcast(v, Elem::I32, n);
        let size = b.and(bits, b.i32(n, 0x7fff_ffff));
        let nan = b.icmp(IntCmp::SGT, size, b.i32(n, 0x7f80_0000));
        let largest = b.i32(n, 448f32.to_bits() as i32);
        let size = b.smin(size, largest);
        // Normal results: rebias, add just under half of the last place (all of it when odd), cut.
        let odd = b.and(b.lshr(size, b.i32(n, 20)), b.i32(n, 1));
        let rebiased = b.sub(size, b.i32(n, (120 << 23) - 0x7_ffff));
        let normal = b.lshr(b.add(rebiased, odd), b.i32(n, 20));
        // Subnormal results: the last place of numbers from 2^14 on is that of the codes, 2^-9.
        let shifted = b.fadd(b.bitcast(size, Elem::F32, n), b.f32(n, 16384.0));
        let small = b.sub(b.bitcast(shifted, Elem::I32, n), b.i32(n, 16384f32.to_bits() as i32));
        let is_small = b.icmp(IntCmp::SLT, size, b.i32(n, 0.015_625_f32.to_bits() as i32));
        let code = b.select(nan, b.i32(n, 0x7f), b.select(is_small, small, normal));
        let sign = b.and(b.lshr(bits, b.i32(n, 24)), b.i32(n, 0x80));
        b.trunc(b.or(code, sign), Elem::I8)
    }

    struct Append<'a, 'u, 'c> {
        b: &'a VecBuilder<'u, 'c>,
        layout: BlockLayout,
        /// Columns of a head that exist.
        d: i64,
    }

    /// Emits the kernel of `spec` as `symbol`.
    pub fn emit_append(unit: &Unit<'_>, spec: &CacheAppendSpec, symbol: &str) -> Result<()> {
        spec.check().map_err(|e| Diag::bug(format!("no such cache kernel: {e}")))?;
        unit.kernel(symbol, |b| {
            let layout = BlockLayout::new(spec.ty, spec.role, spec.head_dim, b.target());
            let append = Append { b, layout, d: spec.head_dim.into() };
            let slots = Slots::of(&layout, spec.heads, spec.slot_rows);
            let (x, positions, base) = (b.arg(0), b.arg(1), b.arg(2));
            let fixed = (spec.ty.is_scaled() && spec.fixed_scales).then(|| b.arg(3));
            let state = b.arg(if fixed.is_some() { 4 } else { 3 });
            let scales = (spec.ty.is_scaled() && fixed.is_none()).then(|| b.arg(4));
            b.for_items(|item| {
                let heads = b.i64(spec.heads.into());
                let (i, head) = (b.sdiv(item, heads), b.srem(item, heads));
                let int = |array| b.sext(b.load(b.row(array, i, 4), Elem::I32, 1), Elem::I64);
                let (base, position) = (int(base), int(positions));
                let from = b.row(b.row(x, i, i64::from(spec.x_stride) * 4), head, append.d * 4);
                let token = b.srem(position, b.i64(BLOCK.into()));
                let first = b.sub(position, token);
                let to = b.row(slots.head(b, state, base, head), first, slots.row_bytes);
                match (fixed, scales) {
                    (Some(fixed), _) => {
                        append.codes(from, to, token, b.load(b.row(fixed, head, 4), Elem::F32, 1))
                    }
                    (None, Some(scales)) => {
                        let slots = Slots::of_scales(spec.heads, spec.slot_rows);
                        let to_scale = b.row(slots.head(b, scales, base, head), position, 4);
                        let scale = append.dynamic_scale(from);
                        append.codes(from, to, token, scale);
                        b.store(to_scale, scale, Elem::F32);
                    }
                    (None, None) => append.numbers(from, to, token),
                }
            });
            Ok(())
        })
    }

    impl<'c> Append<'_, '_, 'c> {
        /// Runs `body` for the vectors of the columns up to `width`: first column, and the lanes that exist.
        fn vectors(&self, width: i64, mut body: impl FnMut(i64, Valid<'c>)) {
            let lanes = i64::from(self.b.width());
            for col in (0..width).step_by(lanes as usize) {
                let exist = (self.d - col).clamp(0, lanes);
                body(col, if exist == lanes { Valid::All } else { Valid::First(exist as u32) });
            }
        }

        /// The first byte of `token` in the block at `block`.
        fn token(&self, block: PointerValue<'c>, token: Val<'c>) -> PointerValue<'c> {
            let b = self.b;
            if self.layout.quads && self.layout.role == Role::Values {
                let (quad, within) = (b.sdiv(token, b.i64(4)), b.srem(token, b.i64(4)));
                return b.at(b.row(block, quad, i64::from(self.layout.width) * 4), within);
            }
            b.row(block, token, i64::from(self.layout.at(1, 0)))
        }

        /// Copies a row of floats.
        fn numbers(&self, from: PointerValue<'c>, block: PointerValue<'c>, token: Val<'c>) {
            let b = self.b;
            let ty = match self.layout.ty {
                CacheTy::F16 => MemTy::F16,
                CacheTy::Bf16 => MemTy::Bf16,
                CacheTy::F32 | CacheTy::I8 | CacheTy::E4m3 => MemTy::F32,
            };
            let to = self.token(block, token);
            let lanes = b.width();
            if self.layout.role == Role::Values {
                let whole = self.d - self.d % i64::from(lanes);
                let copy = |col: Val<'c>, valid| {
                    let v = load_mem(b, b.row(from, col, 4), MemTy::F32, lanes, valid);
                    store_mem(b, b.row(to, col, ty.bytes() as i64), v, ty, valid);
                };
                b.for_const(0, whole, lanes.into(), &[], |col, _| {
                    copy(col, Valid::All);
                    vec![]
                });
                if whole < self.d {
                    copy(b.i64(whole), Valid::First((self.d - whole) as u32));
                }
                return;
            }
            b.for_const(0, self.d, 1, &[], |col, _| {
                let v = b.load(b.row(from, col, 4), Elem::F32, 1);
                store_mem(b, b.row(to, col, self.layout.column_stride().into()), v, ty, Valid::All);
                vec![]
            });
        }

        /// Columns of the row at `from` from `col` on.
        fn x(&self, from: PointerValue<'c>, col: i64, valid: Valid<'c>) -> Val<'c> {
            load_mem(self.b, self.b.offset(from, col * 4), MemTy::F32, self.b.width(), valid)
        }

        /// The scale of a row by its largest magnitude.
        fn dynamic_scale(&self, from: PointerValue<'c>) -> Val<'c> {
            let b = self.b;
            let mut largest = b.f32(b.width(), 0.0);
            self.vectors(self.d, |col, valid| largest = b.fmax(b.fabs(self.x(from, col, valid)), largest));
            let largest = b.reduce(largest, |b, x, y| b.fmax(x, y));
            let top = self.layout.ty.largest_code().unwrap_or(1.0);
            let zero = b.fcmp(FloatCmp::OEQ, largest, b.f32(1, 0.0));
            let scale = b.fmax(b.fdiv(largest, b.f32(1, top)), b.f32(1, f32::MIN_POSITIVE));
            b.select(zero, b.f32(1, 1.0), scale)
        }

        /// Writes a row as codes with this scale.
        fn codes(&self, from: PointerValue<'c>, block: PointerValue<'c>, token: Val<'c>, scale: Val<'c>) {
            let b = self.b;
            let lanes = b.width();
            let divisor = b.splat(scale, lanes);
            let to = self.token(block, token);
            self.vectors(self.layout.width.into(), |col, valid| {
                let y = b.fdiv(self.x(from, col, valid), divisor);
                let code = match (self.layout.ty, self.layout.quads && self.layout.role == Role::Keys) {
                    (CacheTy::E4m3, _) => f32_to_e4m3(b, y),
                    (_, true) => b.trunc(b.add(to_i8_range(b, y), b.i32(lanes, 128)), Elem::I8),
                    (_, false) => b.trunc(to_i8_range(b, y), Elem::I8),
                };
                self.store_codes(to, col, code);
            });
        }

        fn store_codes(&self, to: PointerValue<'c>, col: i64, codes: Val<'c>) {
            let (b, lanes) = (self.b, self.b.lanes(codes));
            let at = |col: i64| b.offset(to, i64::from(self.layout.at(0, col as u32)));
            match (self.layout.role, self.layout.quads) {
                (Role::Values, false) => b.store(at(col), codes, Elem::I8),
                (Role::Keys, true) => {
                    let quads = b.bitcast(codes, Elem::I32, lanes / 4);
                    for i in 0..lanes / 4 {
                        b.store(at(col + 4 * i64::from(i)), b.extract(quads, i), Elem::I8);
                    }
                }
                _ => {
                    for i in 0..lanes {
                        b.store(at(col + i64::from(i)), b.extract(codes, i), Elem::I8);
                    }
                }
            }
        }
    }
}

#[cfg(all(test, feature = "llvm"))]
mod tests {
    use super::*;
    use crate::cpu::llvm::Elem;
    use crate::cpu::testing::{Buf, build, call, random, rng};
    use crate::eexpr::MemTy;
    use crate::eexpr::llvm::Valid;
    use crate::targets::with_stand_in;
    use quantc_ir::formats;
    use quantc_ir::quant::quantize_one;

    const ROWS: usize = 128;

    #[test]
    fn rows_into_a_cache() {
        let types = [CacheTy::F32, CacheTy::F16, CacheTy::Bf16, CacheTy::I8, CacheTy::E4m3];
        let roles = [(Role::Keys, false), (Role::Values, false), (Role::Keys, true), (Role::Values, true)];
        for (target, ty, (role, fixed_scales)) in
            with_stand_in().flat_map(|t| types.map(|ty| roles.map(|role| (t, ty, role)))).flatten()
        {
            if fixed_scales && !ty.is_scaled() {
                continue;
            }
            for (heads, head_dim) in [(1u32, 1u32), (2, 17), (1, 64), (3, 100), (2, 128)] {
                let width = (heads * head_dim) as usize;
                let stride = width + 7;
                let spec = CacheAppendSpec {
                    heads,
                    head_dim,
                    x_stride: stride as u32,
                    ty,
                    role,
                    fixed_scales,
                    slot_rows: ROWS as u32,
                };
                let object = build(target, |unit| emit_append(unit, &spec, "k"));
                let mut x = random(&mut rng(width as u64), 5 * stride, 5.0);
                x[..head_dim as usize].fill(0.0);
                x[stride..stride + head_dim as usize].iter_mut().for_each(|x| *x *= 1e-30);
                let (positions, base) = ([2, 3, 0, 127, 64], [0, 0, 128, 128, 0]);
                let layout = BlockLayout::new(ty, role, head_dim, target);
                let row_bytes = (layout.width * ty.bytes()) as usize;
                let mut state = Buf::poisoned(2 * ROWS * heads as usize * row_bytes);
                let mut scales = Buf::poisoned(2 * ROWS * heads as usize * 4);
                let (mut xb, mut p, mut bb) =
                    (Buf::of(&x, MemTy::F32), Buf::ints(&positions), Buf::ints(&base));
                // So small that some numbers saturate.
                let given: Vec<f32> =
                    (0..heads).map(|h| (1.0 + h as f32) * 4.0 / ty.largest_code().unwrap_or(1.0)).collect();
                let mut given_buf = Buf::of(&given, MemTy::F32);
                let mut args = vec![&mut xb, &mut p, &mut bb];
                if fixed_scales {
                    args.push(&mut given_buf);
                }
                args.push(&mut state);
                if ty.is_scaled() && !fixed_scales {
                    args.push(&mut scales);
                }
                call(&object, "k", &mut args, [5, 5], 0..5 * i64::from(heads));
                let mut want = vec![0xffu8; state.bytes().len()];
                let mut want_scales = vec![f32::NAN; 2 * ROWS * heads as usize];
                // Padding may hold anything.
                let mut padding = vec![false; want.len()];
                for (i, (&p, &base)) in positions.iter().zip(&base).enumerate() {
                    for h in 0..heads as usize {
                        let x = &x[i * stride + h * head_dim as usize..][..head_dim as usize];
                        let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
                        let scale = match ty.largest_code() {
                            _ if fixed_scales => given[h],
                            Some(top) if largest > 0.0 => largest / top,
                            _ => 1.0,
                        };
                        let line = base as usize * heads as usize + h * ROWS + p as usize;
                        want_scales[line] = scale;
                        let block = (line - p as usize % 64) * row_bytes;
                        let at = |c: usize| block + layout.at(p as u32 % 64, c as u32) as usize;
                        for (c, &x) in x.iter().enumerate() {
                            let bytes = match ty {
                                CacheTy::F32 => x.to_le_bytes().to_vec(),
                                CacheTy::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
                                CacheTy::Bf16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
                                CacheTy::E4m3 => vec![quantize_one(x, scale, 0, &formats::E4M3) as u8],
                                CacheTy::I8 => {
                                    let code = quantize_one(x, scale, 0, &formats::INT8) as u8;
                                    let unsigned = layout.quads && role == Role::Keys;
                                    vec![if unsigned { code ^ 0x80 } else { code }]
                                }
                            };
                            want[at(c)..at(c) + bytes.len()].copy_from_slice(&bytes);
                        }
                        (x.len()..layout.width as usize).for_each(|c| padding[at(c)] = true);
                    }
                }
                let what = format!("{} {spec:?}", target.name);
                for (i, (got, want)) in state.bytes().iter().zip(&want).enumerate() {
                    assert!(got == want || padding[i], "{what}: byte {i} is {got}, not {want}");
                }
                let got = scales.read(MemTy::F32);
                let same = |(a, b): (&f32, &f32)| a == b || (a.is_nan() && b.is_nan());
                assert!(!ty.is_scaled() || fixed_scales || got.iter().zip(&want_scales).all(same), "{what}");
            }
        }
    }

    #[test]
    fn every_code_of_e4m3_is_read() {
        for target in with_stand_in() {
            let lanes = target.cpu.vector_bits / 32;
            let object = build(target, |unit| {
                unit.kernel("k", |b| {
                    let (from, to) = (b.arg(0), b.arg(1));
                    b.for_items(|i| {
                        let size = i64::from(lanes);
                        let x = load(b, b.row(from, i, size), CacheTy::E4m3, lanes, Valid::All);
                        b.store(b.row(to, i, size * 4), x, Elem::F32);
                    });
                    Ok(())
                })
            });
            let mut codes = Buf::poisoned(256);
            (0..=255u8).for_each(|code| codes.write(code.into(), &[code]));
            let mut out = Buf::poisoned(1024);
            call(&object, "k", &mut [&mut codes, &mut out], [1, 1], 0..i64::from(256 / lanes));
            for (code, x) in out.read(MemTy::F32).into_iter().enumerate() {
                let want = formats::E4M3.decode(code as u32);
                assert!(x.to_bits() == want.to_bits() || (want.is_nan() && x.abs() == 480.0), "{code}: {x}");
            }
        }
    }

    #[test]
    fn malformed_specs_are_refused() {
        let good = CacheAppendSpec {
            heads: 2,
            head_dim: 8,
            x_stride: 16,
            ty: CacheTy::F16,
            role: Role::Keys,
            fixed_scales: false,
            slot_rows: 64,
        };
        assert_eq!(good.check(), Ok(()));
        assert!(CacheAppendSpec { x_stride: 15, ..good.clone() }.check().is_err());
        assert!(CacheAppendSpec { heads: 0, ..good.clone() }.check().is_err());
        assert!(CacheAppendSpec { slot_rows: 0, ..good.clone() }.check().is_err());
        assert!(CacheAppendSpec { slot_rows: 65, ..good }.check().is_err());
    }
}
