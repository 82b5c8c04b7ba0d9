//! Expressions of [`crate::eexpr`] in tile IR: each lane computes some adjacent columns of a row.
//!
//! Functions are those of [`crate::cpu::math`] on f32, operation by operation, so a result has the same bits as the
//! interpreter of expressions gives with fused products and sums.

use super::tile::{Access, Binary, Builder, Mem, Unary, Val};
use crate::cpu::math::Lanes;
use crate::eexpr::interp::{binary_lanes, unary_lanes};
use crate::eexpr::{EExpr, InputDesc, InputId, InputKind, MemTy, Node, NodeId, OutputKind, Store};

/// An expression with its buffers.
#[derive(Debug)]
pub struct Frame<'e> {
    e: &'e EExpr,
    inputs: Vec<Mem>,
    outputs: Vec<Mem>,
    uniform: Vec<bool>,
}

/// Some adjacent columns of a row.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// The row of the inputs.
    pub row: Val,
    /// The row of the outputs.
    pub out_row: Val,
    /// The first column, a multiple of `width`.
    pub col: Val,
    /// Number of columns.
    pub width: u32,
}

/// Values of nodes as far as they are known: one for each column, or one where all columns agree.
pub type Known = Vec<Option<Vec<Val>>>;

impl<'e> Frame<'e> {
    /// Declares the buffers of an expression: inputs, then outputs. An input may be an output too when a kernel reads each
    /// place of it before it writes there, which `in_place` says.
    pub fn declare(b: &mut Builder, e: &'e EExpr, in_place: bool) -> Frame<'e> {
        let mut input = |(i, desc): (usize, &InputDesc)| {
            let elem = matches!(desc.kind, InputKind::Elem { .. });
            let access = if in_place && elem { Access::ReadBeforeWrite } else { Access::Read };
            b.buffer(&format!("in{i}"), access)
        };
        let inputs = e.inputs.iter().enumerate().map(&mut input).collect();
        let outputs = (0..e.outputs.len()).map(|i| b.buffer(&format!("out{i}"), Access::Write)).collect();
        Frame { e, inputs, outputs, uniform: e.row_uniform() }
    }

    /// The expression.
    pub fn expr(&self) -> &'e EExpr {
        self.e
    }

    /// For each node whether its value is the same in all columns of a row.
    pub fn uniform(&self) -> &[bool] {
        &self.uniform
    }

    /// The buffer of a store.
    pub fn output(&self, store: &Store) -> Mem {
        self.outputs[store.output.0 as usize]
    }

    /// No values known.
    pub fn nothing(&self) -> Known {
        vec![None; self.e.nodes.len()]
    }

    /// The values of a node, one for each column; computes what is not known yet. `accs` are the sums of products, one for
    /// each column of each product.
    pub fn values(
        &self,
        b: &mut Builder,
        id: NodeId,
        at: &At,
        accs: &[Vec<Val>],
        known: &mut Known,
    ) -> Vec<Val> {
        self.compute(b, id, at, accs, known);
        self.spread(id, at.width, known)
    }

    /// The value of a node that is the same in all columns.
    pub fn scalar(&self, b: &mut Builder, id: NodeId, at: &At, known: &mut Known) -> Val {
        self.compute(b, id, at, &[], known);
        known[id.0 as usize].as_ref().expect("the node was just computed")[0]
    }

    fn spread(&self, id: NodeId, width: u32, known: &Known) -> Vec<Val> {
        let values = known[id.0 as usize].as_ref().expect("operands are computed before their users");
        if values.len() == width as usize { values.clone() } else { vec![values[0]; width as usize] }
    }

    fn compute(&self, b: &mut Builder, id: NodeId, at: &At, accs: &[Vec<Val>], known: &mut Known) {
        let i = id.0 as usize;
        if known[i].is_some() {
            return;
        }
        let node = self.e.nodes[i];
        for operand in node.operands() {
            self.compute(b, operand, at, accs, known);
        }
        let width = if self.uniform[i] { 1 } else { at.width };
        let of = |id: NodeId, known: &Known| self.spread(id, width, known);
        let values = match node {
            Node::Acc(product) => accs[usize::from(product)].clone(),
            Node::Elem(input) => self.elem(b, input, 0, at),
            Node::ElemAt { input, col_offset } => self.elem(b, input, col_offset, at),
            Node::Col(input) => {
                let desc = self.e.inputs[input.0 as usize];
                let bytes = desc.ty.bytes() as u32;
                let offset = b.mul(at.col, bytes);
                let aligned = alignment(&[at.width * bytes]);
                load(b, self.inputs[input.0 as usize], offset, desc.ty, at.width, aligned)
            }
            Node::Row(input) => {
                let desc = self.e.inputs[input.0 as usize];
                let bytes = desc.ty.bytes() as u32;
                let offset = match desc.kind {
                    InputKind::One => 0.into(),
                    _ => b.mul(at.row, bytes),
                };
                load(b, self.inputs[input.0 as usize], offset, desc.ty, 1, bytes)
            }
            Node::Const(v) => vec![v.get().into()],
            Node::Unary(op, x) => of(x, known).into_iter().map(|x| unary_lanes(b, op, x)).collect(),
            Node::Binary(op, x, y) => {
                let pairs = of(x, known).into_iter().zip(of(y, known));
                pairs.map(|(x, y)| binary_lanes(b, op, x, y)).collect()
            }
            Node::Fma(x, y, z) => {
                let pairs = of(x, known).into_iter().zip(of(y, known)).zip(of(z, known));
                pairs.map(|((x, y), z)| b.mul_add(x, y, z)).collect()
            }
            Node::Reduce(..) => unreachable!("row kernels finish a reduction before they use it"),
        };
        known[i] = Some(values);
    }

    fn elem(&self, b: &mut Builder, input: InputId, col_offset: u32, at: &At) -> Vec<Val> {
        let InputDesc { ty, kind } = self.e.inputs[input.0 as usize];
        let bytes = ty.bytes() as u32;
        let stride = match kind {
            InputKind::Elem { stride } => stride * bytes,
            InputKind::Col | InputKind::Row | InputKind::One => 0,
        };
        let in_row = b.mad(at.col, bytes, col_offset * bytes);
        let offset = wide(b, at.row, stride, in_row);
        let aligned = alignment(&[at.width * bytes, stride, col_offset * bytes]);
        load(b, self.inputs[input.0 as usize], offset, ty, at.width, aligned)
    }

    /// Writes the values of a store, one for each column or one for the row.
    pub fn store(&self, b: &mut Builder, store: &Store, at: &At, values: &[Val]) {
        let desc = self.e.outputs[store.output.0 as usize];
        let mem = self.output(store);
        let bytes = desc.ty.bytes() as u32;
        match desc.kind {
            OutputKind::Elem { stride, .. } => {
                let in_row = b.mul(at.col, bytes);
                let offset = wide(b, at.out_row, stride * bytes, in_row);
                let aligned = alignment(&[at.width * bytes, stride * bytes]);
                write(b, mem, offset, desc.ty, values, aligned);
            }
            OutputKind::Row => {
                let offset = b.mul(at.out_row, bytes);
                write(b, mem, offset, desc.ty, &values[..1], bytes);
            }
            // Sums over groups belong to the loop over columns, which row kernels own.
            OutputKind::GroupSums { .. } => {}
        }
    }
}

/// The largest access, up to 16 bytes, that places which are sums of multiples of these are aligned to.
pub fn alignment(parts: &[u32]) -> u32 {
    let shift = parts.iter().map(|p| p.trailing_zeros()).min().unwrap_or(4);
    1 << shift.min(4)
}

/// `row * stride + offset` in 64 bits.
pub fn wide(b: &mut Builder, row: Val, stride: u32, offset: Val) -> Val {
    if stride == 0 || row == Val::U32(0) {
        return offset;
    }
    let offset = b.unary(Unary::Widen, offset);
    b.ternary(super::tile::Ternary::MulWide, row, stride, offset)
}

/// `at + bytes`, whatever the width of `at` is.
pub(super) fn advance(b: &mut Builder, at: Val, bytes: u32) -> Val {
    if bytes == 0 {
        return at;
    }
    match b.ty(at) {
        super::tile::Ty::U64 => {
            let bytes = b.unary(Unary::Widen, bytes);
            b.binary(Binary::Add64, at, bytes)
        }
        _ => b.add(at, bytes),
    }
}

/// Loads adjacent values as f32, by accesses of `aligned` bytes.
pub fn load(b: &mut Builder, mem: Mem, at: Val, ty: MemTy, count: u32, aligned: u32) -> Vec<Val> {
    let bytes = ty.bytes() as u32;
    let piece = aligned.max(bytes).min(count * bytes);
    let mut values = vec![];
    for first in (0..count * bytes).step_by(piece as usize) {
        let at = advance(b, at, first);
        let words = b.load(mem, at, piece);
        for i in 0..piece / bytes {
            let word = words[(i * bytes / 4) as usize];
            let low = i * bytes % 4 * 8;
            values.push(widen(b, word, low, ty));
        }
    }
    values
}

/// The number of `ty` that begins at bit `low` of a word.
fn widen(b: &mut Builder, word: Val, low: u32, ty: MemTy) -> Val {
    match ty {
        MemTy::F32 => b.unary(Unary::FromBits, word),
        MemTy::F16 => {
            let half = b.shr(word, low);
            b.unary(Unary::HalfToFloat, half)
        }
        MemTy::Bf16 => {
            let high = if low == 0 { b.shl(word, 16) } else { b.and(word, 0xffff_0000) };
            b.unary(Unary::FromBits, high)
        }
        MemTy::I8 => {
            let byte = b.shr(word, low);
            let number = b.unary(Unary::SignExtend8, byte);
            b.unary(Unary::IntToFloat, number)
        }
        MemTy::I32 => b.unary(Unary::IntToFloat, word),
    }
}

/// Stores adjacent f32 values as `ty`, rounded as the language of expressions says, by accesses of `aligned` bytes.
pub fn write(b: &mut Builder, mem: Mem, at: Val, ty: MemTy, values: &[Val], aligned: u32) {
    let bytes = ty.bytes() as u32;
    let piece = aligned.max(bytes).min(values.len() as u32 * bytes);
    for (i, part) in values.chunks((piece / bytes) as usize).enumerate() {
        let at = advance(b, at, i as u32 * piece);
        let words: Vec<Val> = part.chunks(4usize.div_ceil(bytes as usize)).map(|w| pack(b, ty, w)).collect();
        b.store(mem, at, &words, piece);
    }
}

/// Up to four bytes of values.
fn pack(b: &mut Builder, ty: MemTy, values: &[Val]) -> Val {
    match ty {
        MemTy::F32 => b.unary(Unary::Bits, values[0]),
        MemTy::Bf16 => {
            let high = values.get(1).copied().unwrap_or(0.0.into());
            b.binary(Binary::PackBf16, values[0], high)
        }
        MemTy::F16 => {
            let halves: Vec<Val> = values.iter().map(|&v| b.unary(Unary::FloatToHalf, v)).collect();
            join(b, &halves, 16)
        }
        MemTy::I8 => {
            let bytes: Vec<Val> = values
                .iter()
                .map(|&v| {
                    let byte = b.unary(Unary::FloatToByte, v);
                    b.and(byte, 0xff)
                })
                .collect();
            join(b, &bytes, 8)
        }
        MemTy::I32 => unreachable!("only group sums are stored as integers, and they are made of integers"),
    }
}

fn join(b: &mut Builder, parts: &[Val], bits: u32) -> Val {
    let mut word = parts[0];
    for (i, &part) in parts.iter().enumerate().skip(1) {
        let shifted = b.shl(part, bits * i as u32);
        word = b.binary(Binary::Or, word, shifted);
    }
    word
}
