//! What kernels should give, in f64, by the definitions of what they compute; and how near a result must be, by the formats that
//! numbers go through on the way. Bounds are those of the tests of kernels.

use crate::inputs::{Buffer, Case, cache_num, place, skipped};
use crate::kernel::Asked;
use crate::random::Num;
use half::bf16;
use quantc::ir::diag::{Diag, Result};
use quantc::ir::formats;
use quantc::ir::quant::quantize_one;
use quantc_codegen::cpu::attention::{AttentionSpec, KvSource};
use quantc_codegen::cpu::cache::{CacheAppendSpec, CacheTy, Role};
use quantc_codegen::cpu::rope::RopeStyle;
use quantc_codegen::cuda::cache::{CacheLayout, PAGE, Rotation};
use quantc_codegen::cuda::group::Scales;
use quantc_codegen::cuda::tile::GroupKind;
use quantc_codegen::cuda::tiles::Tiled;
use quantc_codegen::cuda::tiles::rows::{From, RowTilesSpec};
use quantc_codegen::eexpr::interp::{self, Mode, Rows};
use quantc_codegen::eexpr::{EExpr, InputKind, MemTy, Node, UnaryOp};

/// The contents of one output.
pub struct Wanted {
    /// Its numbers; NaN where nothing may be written.
    pub numbers: Vec<f64>,
    /// How near a number must be, of its size.
    pub relative: f64,
    /// The same, whatever its size.
    pub absolute: f64,
}

impl Wanted {
    fn exact(numbers: Vec<f64>) -> Wanted {
        Wanted { numbers, relative: 0.0, absolute: 0.0 }
    }

    /// Compares; the largest error, as a part of the largest number.
    pub fn compare(&self, got: &[f64], touched: impl Fn(usize) -> bool) -> std::result::Result<f64, String> {
        if got.len() != self.numbers.len() {
            return Err(format!("{} numbers, not {}", got.len(), self.numbers.len()));
        }
        let sizes = self.numbers.iter().filter(|n| !n.is_nan()).map(|n| n.abs());
        let largest = sizes.fold(f64::MIN_POSITIVE, f64::max);
        let mut worst = 0f64;
        for (i, (&have, &want)) in got.iter().zip(&self.numbers).enumerate() {
            if want.is_nan() {
                if touched(i) {
                    return Err(format!("number {i} is written and should not be"));
                }
                continue;
            }
            let off = (have - want).abs();
            let limit = self.absolute + self.relative * want.abs();
            // A number that is none is not near.
            if off > limit || off.is_nan() {
                return Err(format!("number {i} is {have}, expected {want} within {limit:.1e}"));
            }
            worst = worst.max(off / largest);
        }
        Ok(worst)
    }
}

/// Sums of products are rounded to 24 bits at each step: a part of the sum of the terms' sizes.
const SUMMED: f64 = 1e-6;

/// Sums of e4m3 in a matrix unit keep 13 bits below the largest term, and a stage has four steps.
const SUMMED_E4M3: f64 = 4.0 / 8192.0;

/// The sums of products `[product][m][n]`, and the largest sum of the sizes of terms.
pub fn products(x: &[f64], w: &[impl AsRef<[f64]>], k: usize) -> (Vec<f32>, f64) {
    let (mut sums, mut size) = (vec![], 0f64);
    for w in w {
        for x in x.chunks(k) {
            for row in w.as_ref().chunks(k) {
                let (mut sum, mut of_sizes) = (0f64, 0f64);
                for (w, x) in row.iter().zip(x) {
                    sum += w * x;
                    of_sizes += (w * x).abs();
                }
                sums.push(sum as f32);
                size = size.max(of_sizes);
            }
        }
    }
    (sums, size)
}

/// How near sums of such terms must be.
pub fn near(size: f64, e4m3: bool) -> f64 {
    size * if e4m3 { SUMMED_E4M3 } else { SUMMED }
}

/// The outputs of an expression over rows, where inputs have some more in front.
fn expression(
    e: &EExpr,
    buffers: &[Buffer],
    before: usize,
    rows: usize,
    cols: usize,
    acc: Option<&[f32]>,
    mode: Mode,
) -> Result<Vec<Vec<f64>>> {
    let inputs: Vec<Vec<f32>> = e
        .inputs
        .iter()
        .zip(buffers)
        .map(|(desc, b)| {
            let skipped = match desc.kind {
                InputKind::Elem { stride } => before * stride as usize,
                InputKind::Row => before,
                InputKind::Col | InputKind::One => 0,
            };
            Num::Of(desc.ty).all(b.given()).into_iter().skip(skipped).map(|x| x as f32).collect()
        })
        .collect();
    let inputs: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
    interp::run(e, mode, Rows { rows, cols, inputs: &inputs, acc }).map_err(|e| Diag::bug(e.0))
}

/// The bound of a number that came through sums and functions and was rounded to this type.
fn rounded(ty: MemTy) -> (f64, f64) {
    match ty {
        MemTy::F32 => (2e-5, 2e-6),
        MemTy::F16 => (1e-3, 1e-6),
        MemTy::Bf16 => (4e-3, 1e-6),
        // A number between two codes may go to either.
        MemTy::I8 => (0.0, 1.0),
        MemTy::I32 => (0.0, 2.0),
    }
}

fn product(e: &EExpr, case: &Case, m: usize, n: usize, k: usize, e4m3: bool) -> Result<Vec<Wanted>> {
    let (sums, size) = products(&case.x, &case.w, k);
    let count = e.inputs.len() + e.outputs.len();
    let own = &case.buffers[case.buffers.len() - count..];
    let outputs = expression(e, own, 0, m, n, Some(&sums), Mode::F64)?;
    // Two products meet in a third one, whose size is that of both.
    let size = if case.w.len() > 1 { size * size.max(1.0) } else { size };
    Ok(outputs
        .into_iter()
        .zip(&e.outputs)
        .map(|(numbers, desc)| {
            let (relative, absolute) = rounded(desc.ty);
            let relative = if desc.ty == MemTy::F32 { 2e-6 } else { relative };
            Wanted { numbers, relative, absolute: near(size, e4m3).max(absolute) }
        })
        .collect())
}

fn words(b: &Buffer) -> Vec<u32> {
    Num::Of(MemTy::I32).all(b.given()).into_iter().map(|x| x as i32 as u32).collect()
}

fn f32s(b: &Buffer) -> Vec<f32> {
    Num::Of(MemTy::F32).all(b.given()).into_iter().map(|x| x as f32).collect()
}

/// Where numbers of a cache lie.
#[derive(Clone, Copy)]
pub struct CacheAt {
    ty: CacheTy,
    heads: u32,
    /// `None` where caches lie plainly.
    layout: Option<CacheLayout>,
    width: u32,
}

impl CacheAt {
    /// Of a cache in fragments, or plainly where there is no layout for it.
    pub fn new(ty: CacheTy, role: Role, heads: u32, head_dim: u32) -> CacheAt {
        let layout = CacheLayout::new(ty, role, heads, head_dim).ok();
        let width = layout.map_or(ty.width(head_dim), |l| l.width());
        CacheAt { ty, heads, layout, width }
    }

    /// The first byte of a number.
    pub fn byte(&self, page: u32, head: u32, token: u32, column: u32) -> usize {
        let at = match self.layout {
            Some(l) => {
                u64::from(page) * u64::from(l.page_bytes())
                    + u64::from(head * l.head_bytes() + l.at(token, column))
            }
            None => {
                let line = u64::from(page * self.heads + head) * u64::from(PAGE) + u64::from(token);
                (line * u64::from(self.width) + u64::from(column)) * u64::from(self.ty.bytes())
            }
        };
        at as usize
    }

    /// The index of a scale.
    pub fn scale(&self, page: u32, head: u32, token: u32) -> usize {
        ((page * self.heads + head) * PAGE + token) as usize
    }
}

/// The number that is stored for x.
fn stored(ty: CacheTy, x: f32, scale: f32) -> f64 {
    match ty {
        CacheTy::F32 => x.into(),
        CacheTy::F16 => half::f16::from_f32(x).to_f64(),
        CacheTy::Bf16 => bf16::from_f32(x).to_f64(),
        CacheTy::I8 => f64::from(quantize_one(x, scale, 0, &formats::INT8) as i8),
        CacheTy::E4m3 => Num::E4m3.read(&[quantize_one(x, scale, 0, &formats::E4M3) as u8]),
    }
}

fn rotate(x: &mut [f32], table: &[f32], rotary: usize, style: RopeStyle) {
    let half = rotary / 2;
    for j in 0..half {
        let (p, q) = match style {
            RopeStyle::Half => (j, j + half),
            RopeStyle::Interleaved => (2 * j, 2 * j + 1),
        };
        let (cos, sin) = (f64::from(table[j]), f64::from(table[half + j]));
        let (u, v) = (f64::from(x[p]), f64::from(x[q]));
        (x[p], x[q]) = ((u * cos - v * sin) as f32, (v * cos + u * sin) as f32);
    }
}

fn append(s: &CacheAppendSpec, rotation: Option<Rotation>, paged: bool, b: &[Buffer], m: u32) -> Vec<Wanted> {
    let x = f32s(&b[0]);
    let after = usize::from(rotation.is_some());
    let table = rotation.map(|_| f32s(&b[1]));
    let pages = if paged { words(&b[3 + after]) } else { (0..2 * s.slot_rows / PAGE).collect() };
    let at = CacheAt::new(s.ty, s.role, s.heads, s.head_dim);
    let num = cache_num(s.ty);
    let mut outputs = b.iter().filter_map(|b| match b {
        Buffer::Made { bytes, .. } => Some(*bytes),
        Buffer::Given(_) => None,
    });
    let mut state = vec![f64::NAN; outputs.next().unwrap_or(0) / num.bytes()];
    let mut scales = outputs.next().map(|bytes| vec![f64::NAN; bytes / 4]);
    for token in 0..m {
        let (slot, position) = place(m, token);
        let row = slot * s.slot_rows + position;
        let (page, in_page) = (pages[(row / PAGE) as usize], row % PAGE);
        for head in 0..s.heads {
            let from = token as usize * s.x_stride as usize + (head * s.head_dim) as usize;
            let mut x = x[from..][..s.head_dim as usize].to_vec();
            if let (Some(r), Some(table)) = (rotation, &table) {
                let rotary = r.rotary_dim as usize;
                rotate(&mut x, &table[token as usize * rotary..][..rotary], rotary, r.style);
            }
            let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
            let scale = match s.ty.largest_code() {
                Some(top) if largest > 0.0 => largest / top,
                _ => 1.0,
            };
            if let Some(scales) = &mut scales {
                scales[at.scale(page, head, in_page)] = scale.into();
            }
            for column in 0..at.width {
                let x = x.get(column as usize).copied().unwrap_or(0.0);
                state[at.byte(page, head, in_page, column) / num.bytes()] = stored(s.ty, x, scale);
            }
        }
    }
    // A rotated number is rounded once more, and may then be stored as its neighbour.
    let (relative, absolute) = match (rotation.is_some(), s.ty) {
        (false, _) => (0.0, 0.0),
        (true, CacheTy::E4m3) => (0.125, 1.0 / 512.0),
        (true, CacheTy::I8) => (0.0, 1.0),
        (true, _) => (1.0 / 128.0, 1e-6),
    };
    let mut list = vec![Wanted { numbers: state, relative, absolute }];
    let relative = if rotation.is_some() { 1e-6 } else { 0.0 };
    list.extend(scales.map(|numbers| Wanted { numbers, relative, absolute: 0.0 }));
    list
}

/// Attention of one token: `number` gives keys (0) and values (1) by position, head and column. Its results, and the largest of
/// the values.
pub fn attend(
    s: &AttentionSpec,
    q: &[f64],
    position: u32,
    count: u32,
    number: &dyn Fn(usize, u32, u32, u32) -> f64,
) -> (Vec<f64>, f64) {
    let d = s.head_dim;
    let (mut out, mut largest) = (vec![], 0f64);
    for head in 0..s.heads {
        let kv = head / s.group();
        let last = if s.causal { position + 1 } else { count };
        let first = last.saturating_sub(s.window.unwrap_or(u32::MAX));
        let q = &q[(head * d) as usize..][..d as usize];
        let score = |i: u32| {
            let dot: f64 = (0..d).map(|c| q[c as usize] * number(0, i, kv, c)).sum();
            let x = dot * f64::from(s.scale.get());
            s.softcap.map_or(x, |c| f64::from(c.get()) * (x / f64::from(c.get())).tanh())
        };
        let scores: Vec<f64> = (first..last).map(score).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let all: f64 = scores.iter().map(|x| (x - top).exp()).sum();
        let mut sums = vec![0.0; d as usize];
        for (i, x) in (first..last).zip(scores) {
            let weight = (x - top).exp() / all;
            for (c, sum) in (0..).zip(sums.iter_mut()) {
                let v = number(1, i, kv, c);
                *sum += weight * v;
                largest = largest.max(v.abs());
            }
        }
        out.extend(sums);
    }
    (out, largest)
}

/// Weights of softmax and queries are rounded to 8 bits: results are this part of the largest value off at most.
pub const ATTENDED: f64 = 1.0 / 250.0;

/// The same where all is f32.
const ATTENDED_PLAINLY: f64 = 1e-4;

/// Of the last `m` tokens of a call.
fn attention(s: &AttentionSpec, paged: bool, plain: bool, b: &[Buffer], m: u32, tokens: u32) -> Vec<Wanted> {
    let q = Num::Of(MemTy::F32).all(b[0].given());
    let (mut numbers, mut largest) = (vec![], 0f64);
    let mut one = |row: u32, position: u32, number: &dyn Fn(usize, u32, u32, u32) -> f64| {
        let q = &q[row as usize * s.q_stride as usize..];
        let (out, most) = attend(s, q, position, tokens, number);
        numbers.extend(out);
        largest = largest.max(most);
    };
    match s.source {
        KvSource::Direct { stride } => {
            let sides = [1, 2].map(|i| Num::Of(MemTy::F32).all(b[i].given()));
            for token in 0..m {
                // Rows of the call become bf16.
                let round = |x: f64| if plain { x } else { bf16::from_f64(x).to_f64() };
                let number = |which: usize, i: u32, head: u32, c: u32| {
                    round(sides[which][(i * stride + head * s.head_dim + c) as usize])
                };
                one(token, token, &number);
            }
        }
        KvSource::Cache { ty, slot_rows, .. } => {
            let pages = if paged { words(&b[5]) } else { (0..2 * slot_rows / PAGE).collect() };
            let after = 5 + usize::from(paged);
            let scales = ty.is_scaled().then(|| [f32s(&b[after]), f32s(&b[after + 1])]);
            let at = [Role::Keys, Role::Values].map(|role| CacheAt::new(ty, role, s.kv_heads, s.head_dim));
            let num = cache_num(ty);
            for row in 0..m {
                let (slot, position) = place(tokens, tokens - m + row);
                let number = |which: usize, i: u32, head: u32, c: u32| {
                    let line = slot * slot_rows + i;
                    let (page, in_page) = (pages[(line / PAGE) as usize], line % PAGE);
                    let from = at[which].byte(page, head, in_page, c);
                    let v = num.read(&b[1 + which].given()[from..from + num.bytes()]);
                    let scale = |s: &[Vec<f32>; 2]| s[which][at[which].scale(page, head, in_page)];
                    v * scales.as_ref().map_or(1.0, |s| scale(s).into())
                };
                one(row, position, &number);
            }
        }
    }
    let absolute = largest * if plain { ATTENDED_PLAINLY } else { ATTENDED };
    vec![Wanted { numbers, relative: 0.0, absolute }]
}

/// Rows as tiles: numbers, scales and sums by the definition of the formats.
fn tiles(s: &RowTilesSpec, b: &[Buffer], m: u32) -> Vec<Wanted> {
    let tiled = Tiled { kind: s.kind, rows: m, columns: s.columns() };
    let num = match s.kind {
        GroupKind::Bf16 => Num::Of(MemTy::Bf16),
        GroupKind::S8 => Num::Of(MemTy::I8),
        GroupKind::E4m3 => Num::E4m3,
    };
    let size = num.bytes();
    let mut places = vec![0; tiled.columns as usize];
    (0..tiled.columns).for_each(|at| places[s.column(at) as usize] = at);
    // All is written: what is beyond the rows with zeros.
    let mut numbers = vec![0.0; tiled.bytes() as usize / size];
    let (mut scales, mut sums) = (vec![], vec![]);
    let x = b[0].given();
    for row in 0..m {
        let mut put = |column: u32, v: f64| {
            numbers[tiled.at(row, places[column as usize]) as usize / size] = v;
        };
        match s.from {
            From::Same { stride } => {
                for column in 0..s.k {
                    put(column, num.read(&x[(row * stride) as usize + column as usize * size..][..size]));
                }
            }
            From::Floats { ty, stride, scales: by, .. } => {
                let from = (row * stride) as usize * ty.bytes();
                let x = &Num::Of(ty).all(&x[from..from + s.k as usize * ty.bytes()]);
                let block = if by == Scales::Blocks { 128 } else { s.k as usize };
                let mut sum = 0.0;
                for (i, part) in x.chunks(block).enumerate() {
                    let top = if s.kind == GroupKind::S8 { 127f32 } else { 448.0 };
                    let scale = part.iter().fold(0f32, |m, x| m.max(x.abs() as f32)) / top;
                    let scale = if scale > 0.0 { scale } else { 1.0 };
                    scales.push(f64::from(scale));
                    for (j, &x) in part.iter().enumerate() {
                        let v = match s.kind {
                            GroupKind::Bf16 => stored(CacheTy::Bf16, x as f32, 1.0),
                            GroupKind::S8 => stored(CacheTy::I8, x as f32, scale),
                            GroupKind::E4m3 => stored(CacheTy::E4m3, x as f32, scale),
                        };
                        sum += v;
                        put((i * block + j) as u32, v);
                    }
                }
                sums.push(sum);
            }
        }
    }
    let mut list = vec![Wanted::exact(numbers)];
    if let From::Floats { scales: by, sums: with, .. } = s.from {
        if by != Scales::None {
            list.push(Wanted::exact(scales));
        }
        if with {
            list.push(Wanted::exact(sums));
        }
    }
    list
}

/// The contents of the outputs of a call of `m` rows, in order.
pub fn of(asked: &Asked, case: &Case, m: u32) -> Result<Vec<Wanted>> {
    let (b, rows) = (&case.buffers[..], m as usize);
    Ok(match asked {
        Asked::Skinny(s) | Asked::Wide(s) | Asked::Mixed(s) => {
            product(&s.epilogue, case, rows, s.n as usize, s.k as usize, false)?
        }
        Asked::Group { spec: s, .. } => {
            let e4m3 = s.kind == GroupKind::E4m3;
            product(&s.epilogue, case, rows, s.n as usize, s.k as usize, e4m3)?
        }
        Asked::Tiles(s) => tiles(s, b, m),
        Asked::Row(s) => {
            // What is rounded to few bits on the way is compared with the same steps, since f64 may round to a neighbour.
            let rounds = |n: &Node| matches!(n, Node::Unary(UnaryOp::RoundE4m3, _));
            let steps = s.body.nodes.iter().any(rounds);
            let mode = if steps { Mode::F32 { fused: true } } else { Mode::F64 };
            let [before, rows] = [skipped(asked, m), rows].map(|count| count * s.rows.per as usize);
            let outputs = expression(&s.body, b, before, rows, s.cols as usize, None, mode)?;
            let wanted = |(numbers, desc): (Vec<f64>, &quantc_codegen::eexpr::OutputDesc)| {
                let (relative, absolute) = rounded(desc.ty);
                Wanted { numbers, relative, absolute }
            };
            outputs.into_iter().zip(&s.body.outputs).map(wanted).collect()
        }
        Asked::RopeTable(s) => {
            let (positions, frequencies, mut numbers) = (words(&b[0]), f32s(&b[1]), vec![]);
            for p in positions {
                // The angle is that of f32.
                let angles = || frequencies.iter().map(|f| f64::from(p as f32 * f));
                let factor = f64::from(s.factor.get());
                numbers.extend(angles().map(|a| a.cos() * factor));
                numbers.extend(angles().map(|a| a.sin() * factor));
            }
            vec![Wanted { numbers, relative: 1e-7, absolute: 2.5e-7 }]
        }
        Asked::Rope(s) => {
            let (x, table) = (f32s(&b[0]), f32s(&b[1]));
            let (d, rotary) = (s.head_dim as usize, s.rotary_dim as usize);
            let mut numbers = vec![f64::NAN; rows * s.out_stride as usize];
            for (token, head) in (0..rows).flat_map(|t| (0..s.heads as usize).map(move |h| (t, h))) {
                let mut x = x[token * s.x_stride as usize + head * d..][..d].to_vec();
                rotate(&mut x, &table[token * rotary..][..rotary], rotary, s.style);
                let to = &mut numbers[token * s.out_stride as usize + head * d..][..d];
                to.iter_mut().zip(x).for_each(|(to, x)| *to = x.into());
            }
            vec![Wanted { numbers, relative: 1e-6, absolute: 5e-7 }]
        }
        Asked::Gather(s) => {
            let (index, table) = (words(&b[0]), Num::Of(s.ty).all(b[1].given()));
            let scales = (s.ty == MemTy::I8).then(|| f32s(&b[2]));
            let mut numbers = vec![];
            for row in index {
                let scale = scales.as_ref().map_or(1.0, |s| s[row as usize]);
                let values = &table[(row * s.width) as usize..][..s.width as usize];
                numbers.extend(values.iter().map(|&x| f64::from(x as f32 * scale)));
            }
            vec![Wanted::exact(numbers)]
        }
        Asked::Append(s) => append(&s.rows, s.rotation, s.paged, b, m),
        Asked::PlainAppend(s) => append(s, None, true, b, m),
        Asked::Decode { call, .. } | Asked::Prefill(call) => {
            attention(&call.spec, call.paged, false, b, m, asked.tokens(m))
        }
        Asked::PlainAttention(s) => {
            attention(s, matches!(s.source, KvSource::Cache { .. }), true, b, m, asked.tokens(m))
        }
        Asked::Sample(s) => {
            let logits = Num::Of(MemTy::F32).all(b[0].given());
            let largest = |row: &[f64]| {
                let row = &row[..s.vocab as usize];
                let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                row.iter().position(|&x| x == top).map_or(-1.0, |i| i as f64)
            };
            vec![Wanted::exact(logits.chunks(s.stride as usize).map(largest).collect())]
        }
        Asked::Ceiling(_) => return Err(Diag::bug("ceilings are measured, not compared")),
    })
}
