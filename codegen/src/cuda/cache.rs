//! Caches of keys and values on GPUs: how they lie in memory, and the kernel that puts rows into them.
//!
//! A state is made of pages of [`PAGE`] tokens. A page holds its heads one after the other:
//!
//! ```text
//! keys     [page][head][token][column]   columns padded with zeros to 32 (bf16) or 64 (codes)
//! values   [page][head][column][token]
//! scales   [page][head][token], f32, of codes that have one for each token and head
//! ```
//!
//! so that a lane of [`super::attention`] finds what it multiplies in runs of 16 bytes, of keys along columns and of values
//! along tokens. Token i of a call is in row `base[i] + positions[i]`, and that row in the page with this number by
//! [`PAGE`]; where pages are anywhere, `pages i32[..]` is looked up with it. So a sequence is either some adjacent pages,
//! as slots of [`crate::cpu::cache`] are, or a row of a block table: `base[i]` is then the table's row times its length
//! times [`PAGE`].

use super::expr::{alignment, load, wide, write};
use super::tile::{Access, Binary, Builder, Extent, Kernel, Mem, Unary, Val, WARP};
use crate::cpu::cache::{BLOCK, CacheAppendSpec, CacheTy, Role};
use crate::cpu::math::Lanes;
use crate::cpu::rope::RopeStyle;
use crate::eexpr::MemTy;
use quantc_ir::diag::{Diag, Result};
use serde::{Deserialize, Serialize};

/// Tokens of a page.
pub const PAGE: u32 = BLOCK;

/// Where the numbers of a cache are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CacheLayout {
    /// What it holds.
    pub ty: CacheTy,
    /// What for.
    pub role: Role,
    /// Heads of a token.
    pub heads: u32,
    /// Columns of a head.
    pub head_dim: u32,
}

impl CacheLayout {
    /// The layout, or what about it has no CUDA kernel.
    pub fn new(ty: CacheTy, role: Role, heads: u32, head_dim: u32) -> Result<CacheLayout> {
        if matches!(ty, CacheTy::F32 | CacheTy::F16) {
            return Err(Diag::target(format!("a cache of {} has no CUDA kernel", ty.name()))
                .help("caches may be bf16, int8 or fp8"));
        }
        if heads == 0 || head_dim == 0 || !head_dim.is_multiple_of(8) {
            return Err(Diag::target(format!(
                "a cache of {heads} heads of {head_dim} columns has no CUDA kernel"
            ))
            .help("columns of a head may be multiples of 8"));
        }
        Ok(CacheLayout { ty, role, heads, head_dim })
    }

    /// Columns of a head as they are stored.
    pub fn width(&self) -> u32 {
        match self.role {
            Role::Keys => self.head_dim.next_multiple_of(64 / self.ty.bytes()),
            Role::Values => self.head_dim,
        }
    }

    /// Bytes of one head of a page.
    pub fn head_bytes(&self) -> u32 {
        PAGE * self.width() * self.ty.bytes()
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> u32 {
        self.heads * self.head_bytes()
    }

    /// Bytes of a row of the state, on average: a page by its tokens.
    pub fn row_bytes(&self) -> u32 {
        self.page_bytes() / PAGE
    }

    /// Bytes of the scales of a page, where each token and head has one.
    pub fn scale_page_bytes(&self) -> u32 {
        self.heads * PAGE * 4
    }

    /// The byte of `column` of `token` in a head of a page.
    pub fn at(&self, token: u32, column: u32) -> u32 {
        let index = match self.role {
            Role::Keys => token * self.width() + column,
            Role::Values => column * PAGE + token,
        };
        index * self.ty.bytes()
    }
}

/// A rotation on the way into a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rotation {
    /// Columns of a head that are rotated; even.
    pub rotary_dim: u32,
    /// Which columns go together.
    pub style: RopeStyle,
}

/// Rows into a cache, perhaps rotated on the way.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AppendSpec {
    /// What goes where; `slot_rows` does not matter here.
    pub rows: CacheAppendSpec,
    /// What is done with a row first.
    pub rotation: Option<Rotation>,
    /// Whether pages are looked up.
    pub paged: bool,
}

/// Warps of a block: each takes one head of one token.
const WARPS: u32 = 4;

/// The number of the page that holds a row, and the row in it.
pub(super) fn page_of(b: &mut Builder, pages: Option<Mem>, row: Val) -> (Val, Val) {
    let (index, token) = (b.div(row, PAGE), b.rem(row, PAGE));
    let page = match pages {
        Some(pages) => {
            let at = b.mul(index, 4);
            b.load(pages, at, 4)[0]
        }
        None => index,
    };
    (page, token)
}

/// The kernel of `spec`, called `name`.
///
/// Buffers: x `f32[t][x_stride]`; with a rotation the table of [`crate::cpu::rope::RopeTableSpec`]; positions and base
/// `i32[t]`; where pages are looked up their numbers, `i32[..]`; of codes with fixed scales these, `f32[heads]`; the state;
/// of codes with other scales the state of these. Scalar: `t`. Grid: a block for each [`WARPS`] heads of tokens; no shared
/// memory, no workspace.
pub fn build_append(name: &str, spec: &AppendSpec) -> Result<Kernel> {
    let rows = &spec.rows;
    rows.check().map_err(|e| Diag::bug(format!("no such cache: {e}")))?;
    let layout = CacheLayout::new(rows.ty, rows.role, rows.heads, rows.head_dim)?;
    if let Some(r) = spec.rotation
        && (r.rotary_dim == 0 || !r.rotary_dim.is_multiple_of(2) || r.rotary_dim > rows.head_dim)
    {
        return Err(Diag::bug(format!("{} rotated columns of {}", r.rotary_dim, rows.head_dim)));
    }
    let mut b = Builder::new(name, WARPS * WARP);
    let x = b.buffer("x", Access::Read);
    let table = spec.rotation.map(|_| b.buffer("table", Access::Read));
    let positions = b.buffer("positions", Access::Read);
    let base = b.buffer("bases", Access::Read);
    let pages = spec.paged.then(|| b.buffer("pages", Access::Read));
    let scaled = rows.ty.is_scaled();
    let given = (scaled && rows.fixed_scales).then(|| b.buffer("given", Access::Read));
    let state = b.buffer("state", Access::Write);
    let scales = (scaled && !rows.fixed_scales).then(|| b.buffer("scales", Access::Write));
    let t = b.scalar("t");
    b.grid(Extent::PerScalar { scalar: t, times: rows.heads, per: WARPS }, Extent::Fixed(1));

    let (block, thread) = (b.block_x(), b.thread());
    let (warp, lane) = (b.div(thread, WARP), b.rem(thread, WARP));
    let item = b.mad(block, WARPS, warp);
    let tokens = b.scalar_value(t);
    let count = b.mul(tokens, rows.heads);
    let there = b.lt(item, count);
    let last = b.binary(Binary::Sub, count, 1);
    let item = b.binary(Binary::Min, item, last);
    let (token, head) = (b.div(item, rows.heads), b.rem(item, rows.heads));
    let at = b.mul(token, 4);
    let position = b.load(positions, at, 4)[0];
    let first = b.load(base, at, 4)[0];
    let row = b.add(first, position);
    let (page, in_page) = page_of(&mut b, pages, row);

    let into = Incoming { spec, layout, x, table, token, head, lane };
    let values: Vec<Run> = (0..into.runs()).map(|i| into.run(&mut b, i)).collect();
    let scale = scaled.then(|| match given {
        Some(given) => {
            let at = b.mul(head, 4);
            load(&mut b, given, at, MemTy::F32, 1, 4)[0]
        }
        None => dynamic_scale(&mut b, rows.ty, &values),
    });
    b.when(there, |b| {
        if let (Some(scales), Some(scale)) = (scales, scale) {
            let first = b.lt(lane, 1);
            b.when(first, |b| {
                let line = b.mad(head, PAGE, in_page);
                let in_page = b.mul(line, 4);
                let at = wide(b, page, layout.scale_page_bytes(), in_page);
                write(b, scales, at, MemTy::F32, &[scale], 4);
            });
        }
        let in_page_bytes = match layout.role {
            Role::Keys => b.mul(in_page, layout.at(1, 0)),
            Role::Values => b.mul(in_page, layout.at(1, 0)),
        };
        let in_page_bytes = b.mad(head, layout.head_bytes(), in_page_bytes);
        for run in &values {
            let codes = run.codes(b, rows.ty, scale);
            b.when(run.stored, |b| {
                let column = b.mul(run.column, layout.at(0, 1));
                let in_page = b.add(in_page_bytes, column);
                let at = wide(b, page, layout.page_bytes(), in_page);
                store_codes(b, &layout, state, at, &codes);
            });
        }
    });
    Ok(b.finish())
}

/// Writes adjacent columns of a token.
fn store_codes(b: &mut Builder, layout: &CacheLayout, state: Mem, at: Val, codes: &[Val]) {
    let bytes = layout.ty.bytes();
    let zero = b.unary(Unary::Widen, 0);
    let at = if b.ty(at) == super::tile::Ty::U64 { at } else { b.binary(Binary::Add64, zero, at) };
    match layout.role {
        Role::Keys => {
            // Low bits first, as they lie.
            let per_word = 4 / bytes;
            let words: Vec<Val> = codes
                .chunks(per_word as usize)
                .map(|part| {
                    let mut word = part[0];
                    for (i, &code) in (1..).zip(&part[1..]) {
                        let high = b.shl(code, 8 * bytes * i);
                        word = b.binary(Binary::Or, word, high);
                    }
                    word
                })
                .collect();
            b.store(state, at, &words, codes.len() as u32 * bytes);
        }
        Role::Values => {
            for (i, &code) in (0..).zip(codes) {
                let plus = b.unary(Unary::Widen, i * layout.at(0, 1));
                let at = b.binary(Binary::Add64, at, plus);
                b.store(state, at, &[code], bytes);
            }
        }
    }
}

/// The scale of a row by its largest magnitude, in all lanes.
fn dynamic_scale(b: &mut Builder, ty: CacheTy, values: &[Run]) -> Val {
    let mut largest: Val = 0.0.into();
    for v in values.iter().flat_map(|run| &run.values) {
        let size = b.unary(Unary::FAbs, *v);
        largest = b.binary(Binary::FMax, size, largest);
    }
    for mask in [16, 8, 4, 2, 1] {
        let other = b.shuffle_xor(largest, mask);
        largest = b.binary(Binary::FMax, largest, other);
    }
    let top = ty.largest_code().unwrap_or(1.0);
    let scale = Lanes::div(b, largest, top.into());
    let scale = b.binary(Binary::FMax, scale, f32::MIN_POSITIVE);
    let zero = b.binary(Binary::FEq, largest, 0.0);
    b.select(zero, 1.0, scale)
}

/// A row on its way into the cache.
struct Incoming<'a> {
    spec: &'a AppendSpec,
    layout: CacheLayout,
    x: Mem,
    table: Option<Mem>,
    token: Val,
    head: Val,
    lane: Val,
}

/// Some adjacent columns of a lane.
struct Run {
    column: Val,
    /// Whether they are stored: padding is.
    stored: Val,
    /// Zeros in the padding.
    values: Vec<Val>,
}

impl Run {
    fn codes(&self, b: &mut Builder, ty: CacheTy, scale: Option<Val>) -> Vec<Val> {
        let code = |b: &mut Builder, v: Val| match (ty, scale) {
            (CacheTy::I8, Some(scale)) => {
                let y = Lanes::div(b, v, scale);
                let byte = b.unary(Unary::FloatToByte, y);
                b.and(byte, 0xff)
            }
            (CacheTy::E4m3, Some(scale)) => {
                let y = Lanes::div(b, v, scale);
                b.e4m3_bits(y)
            }
            _ => b.binary(Binary::PackBf16, v, 0.0),
        };
        self.values.iter().map(|&v| code(b, v)).collect()
    }
}

impl Incoming<'_> {
    /// Adjacent columns of a lane.
    fn width(&self) -> u32 {
        let parts = match self.spec.rotation {
            None => 4,
            Some(Rotation { rotary_dim, style: RopeStyle::Half }) => rotary_dim / 2,
            Some(Rotation { rotary_dim, style: RopeStyle::Interleaved }) => rotary_dim,
        };
        alignment(&[parts, self.spec.rows.head_dim]).min(4)
    }

    fn runs(&self) -> u32 {
        self.layout.width().div_ceil(self.width() * WARP)
    }

    /// Loads columns of x.
    fn load(&self, b: &mut Builder, column: Val) -> Vec<Val> {
        let rows = &self.spec.rows;
        let column = b.mad(self.head, rows.head_dim, column);
        let in_row = b.mul(column, 4);
        let at = wide(b, self.token, rows.x_stride * 4, in_row);
        let aligned = alignment(&[self.width() * 4, rows.head_dim * 4, rows.x_stride * 4]);
        load(b, self.x, at, MemTy::F32, self.width(), aligned)
    }

    /// Run `i` of this lane, rotated.
    fn run(&self, b: &mut Builder, i: u32) -> Run {
        let (width, head_dim) = (self.width(), self.spec.rows.head_dim);
        let first = b.mad(self.lane, width, i * WARP * width);
        let inside = b.lt(first, head_dim);
        let column = b.binary(Binary::Min, first, head_dim - width);
        let mut values = self.load(b, column);
        if let (Some(rotation), Some(table)) = (self.spec.rotation, self.table) {
            values = self.rotated(b, rotation, table, column, values);
        }
        let values = values.into_iter().map(|v| b.select(inside, v, 0.0)).collect();
        Run { column: first, stored: b.lt(first, self.layout.width()), values }
    }

    fn rotated(&self, b: &mut Builder, rotation: Rotation, table: Mem, column: Val, v: Vec<Val>) -> Vec<Val> {
        let Rotation { rotary_dim, style } = rotation;
        let (width, half) = (self.width(), rotary_dim / 2);
        let angles = |b: &mut Builder, first: Val, count: u32| {
            let at = |b: &mut Builder, plus: u32| {
                let in_row = b.mad(first, 4, plus * 4);
                wide(b, self.token, rotary_dim * 4, in_row)
            };
            let aligned = alignment(&[count * 4, half * 4]);
            let cos_at = at(b, 0);
            let cos = load(b, table, cos_at, MemTy::F32, count, aligned);
            let sin_at = at(b, half);
            (cos, load(b, table, sin_at, MemTy::F32, count, aligned))
        };
        // As the rotation by itself computes it, to the bit.
        let turn = |b: &mut Builder, v: Val, other: Val, cos: Val, sin: Val, minus: Val| {
            let turned = Lanes::mul(b, other, sin);
            let negated = b.neg(turned);
            let turned = b.select(minus, negated, turned);
            b.mul_add(v, cos, turned)
        };
        let turned: Vec<Val> = match style {
            RopeStyle::Half => {
                let low = b.lt(column, half);
                // Columns that stay compute something that is there.
                let rest = b.binary(Binary::Sub, column, half);
                let rest = b.binary(Binary::Min, rest, half - width);
                let in_half = b.select(low, column, rest);
                let up = b.add(in_half, half);
                let partner = b.select(low, up, in_half);
                let others = self.load(b, partner);
                let (cos, sin) = angles(b, in_half, width);
                (0..width as usize).map(|j| turn(b, v[j], others[j], cos[j], sin[j], low)).collect()
            }
            RopeStyle::Interleaved => {
                let pair = b.div(column, 2);
                let pair = b.binary(Binary::Min, pair, half - width / 2);
                let (cos, sin) = angles(b, pair, width / 2);
                (0..width as usize)
                    .map(|j| turn(b, v[j], v[j ^ 1], cos[j / 2], sin[j / 2], Val::Pred(j % 2 == 0)))
                    .collect()
            }
        };
        let rotates = b.lt(column, rotary_dim);
        turned.into_iter().zip(v).map(|(turned, v)| b.select(rotates, turned, v)).collect()
    }
}
