//! Emits expressions for a vector of columns.
//!
//! A [`Frame`] knows the expression and its buffers. [`Frame::emit`] computes all stores at one place; kernels that
//! have some values already (column vectors kept in registers over many rows, finished reductions) pass them as
//! `known`. Values that are the same in a whole row are computed as scalars and spread when used.
use inkwell::values::PointerValue;
use quantc_ir::target::CpuDesc;

use super::interp::{binary_lanes, unary_lanes};
use super::{EExpr, InputDesc, InputId, InputKind, MemTy, Node, NodeId, OutputKind, Store};
use crate::cpu::llvm::{Elem, FloatCmp, IntCmp, Val, VecBuilder};
use crate::cpu::math::Lanes;

/// Which lanes of a vector stand for columns that exist.
#[derive(Clone, Copy, Debug)]
pub enum Valid<'c> {
    /// All.
    All,
    /// The first few.
    First(u32),
    /// Those where this vector of `I1` holds.
    Mask(Val<'c>),
}

/// A place: `lanes` columns of one row.
#[derive(Clone, Copy, Debug)]
pub struct At<'c> {
    /// The row of the inputs, an i64.
    pub row: Val<'c>,
    /// The row of the outputs, an i64; the same as `row` in most kernels.
    pub out_row: Val<'c>,
    /// The first column, an i64.
    pub col: Val<'c>,
    /// Columns of the vector.
    pub lanes: u32,
    /// The columns that exist; memory of others is not touched.
    pub valid: Valid<'c>,
}

/// Values of nodes, by index, as far as they are known: vectors, or scalars where all columns agree.
pub type Known<'c> = Vec<Option<Val<'c>>>;

/// Vectors of a builder as [`Lanes`].
#[derive(Clone, Copy)]
pub struct Vectors<'b, 'u, 'c> {
    /// The builder.
    pub b: &'b VecBuilder<'u, 'c>,
    /// Lanes of every value.
    pub lanes: u32,
}

impl<'c> Lanes for Vectors<'_, '_, 'c> {
    type V = Val<'c>;

    fn constant(&mut self, x: f32) -> Val<'c> {
        self.b.f32(self.lanes, x)
    }
    fn add(&mut self, a: Val<'c>, b: Val<'c>) -> Val<'c> {
        self.b.fadd(a, b)
    }
    fn sub(&mut self, a: Val<'c>, b: Val<'c>) -> Val<'c> {
        self.b.fsub(a, b)
    }
    fn mul(&mut self, a: Val<'c>, b: Val<'c>) -> Val<'c> {
        self.b.fmul(a, b)
    }
    fn div(&mut self, a: Val<'c>, b: Val<'c>) -> Val<'c> {
        self.b.fdiv(a, b)
    }
    fn mul_add(&mut self, a: Val<'c>, b: Val<'c>, c: Val<'c>) -> Val<'c> {
        self.b.fma(a, b, c)
    }
    fn sqrt(&mut self, a: Val<'c>) -> Val<'c> {
        self.b.sqrt(a)
    }
    fn abs(&mut self, a: Val<'c>) -> Val<'c> {
        self.b.fabs(a)
    }
    fn neg(&mut self, a: Val<'c>) -> Val<'c> {
        self.b.fneg(a)
    }
    fn copysign(&mut self, a: Val<'c>, sign: Val<'c>) -> Val<'c> {
        self.b.intrinsic("llvm.copysign", &[a.get_type()], &[a, sign])
    }
    fn select_lt(&mut self, a: Val<'c>, b: Val<'c>, x: Val<'c>, y: Val<'c>) -> Val<'c> {
        self.b.select(self.b.fcmp(FloatCmp::OLT, a, b), x, y)
    }
    fn bits_shl_23(&mut self, a: Val<'c>) -> Val<'c> {
        let bits = self.b.bitcast(a, Elem::I32, self.lanes);
        self.b.bitcast(self.b.shl(bits, self.b.i32(self.lanes, 23)), Elem::F32, self.lanes)
    }
    fn round(&mut self, a: Val<'c>) -> Val<'c> {
        if self.b.target().cpu.features.contains(&"avx") {
            return self.b.intrinsic("llvm.roundeven", &[a.get_type()], &[a]);
        }
        // SSE2 has no rounding instruction, and the call LLVM would make instead is not there.
        let limit = self.constant(8_388_608.0);
        let size = self.abs(a);
        let rounded = self.b.fsub(self.b.fadd(size, limit), limit);
        let signed = self.copysign(rounded, a);
        self.select_lt(size, limit, signed, a)
    }
    fn round_e4m3(&mut self, a: Val<'c>) -> Val<'c> {
        let (b, n) = (self.b, self.lanes);
        let largest = self.constant(448.0);
        let size = self.abs(a);
        let size = self.select_lt(size, largest, size, largest);
        let bits = b.bitcast(size, Elem::I32, n);
        // Normal numbers: add just under half of the last place (all of it when odd), cut.
        let odd = b.and(b.lshr(bits, b.i32(n, 20)), b.i32(n, 1));
        let up = b.add(b.add(bits, b.i32(n, 0x7_ffff)), odd);
        let normal = b.bitcast(b.and(up, b.i32(n, 0xfff0_0000_u32 as i32)), Elem::F32, n);
        // Subnormal ones: the last place of numbers from 2^14 on is theirs, 2^-9.
        let shift = self.constant(16384.0);
        let small = b.fsub(b.fadd(size, shift), shift);
        let least = self.constant(0.015_625);
        let rounded = self.select_lt(size, least, small, normal);
        let signed = self.copysign(rounded, a);
        b.select(b.fcmp(FloatCmp::ORD, a, a), signed, a)
    }
}

/// An expression with its buffers, in one kernel.
pub struct Frame<'b, 'u, 'c, 'e> {
    b: &'b VecBuilder<'u, 'c>,
    e: &'e EExpr,
    inputs: Vec<PointerValue<'c>>,
    outputs: Vec<PointerValue<'c>>,
    uniform: Vec<bool>,
}

impl<'b, 'u, 'c, 'e> Frame<'b, 'u, 'c, 'e> {
    /// The expression with its buffers in the kernel's arguments: inputs from `first_arg` on, then outputs.
    pub fn new(b: &'b VecBuilder<'u, 'c>, e: &'e EExpr, first_arg: u32) -> Frame<'b, 'u, 'c, 'e> {
        let inputs: Vec<_> = (0..e.inputs.len() as u32).map(|i| b.arg(first_arg + i)).collect();
        let after = first_arg + e.inputs.len() as u32;
        let outputs = (0..e.outputs.len() as u32).map(|i| b.arg(after + i)).collect();
        Frame { b, e, inputs, outputs, uniform: e.row_uniform() }
    }

    /// The expression.
    pub fn expr(&self) -> &'e EExpr {
        self.e
    }

    /// The address of an output.
    pub fn output(&self, id: super::OutputId) -> PointerValue<'c> {
        self.outputs[id.0 as usize]
    }

    /// No values known.
    pub fn nothing(&self) -> Known<'c> {
        vec![None; self.e.nodes.len()]
    }

    /// The values of the nodes that depend on the column only: loaded once, they serve many rows.
    pub fn columns(&self, at: &At<'c>) -> Known<'c> {
        let mut known = self.nothing();
        for (i, node) in self.e.nodes.iter().enumerate() {
            if let Node::Col(input) = *node {
                known[i] = Some(self.load(input, at.col, at));
            }
        }
        known
    }

    /// Computes and writes all stores at `at`. `accs` are the vectors of the accumulators, in epilogues.
    pub fn emit(&self, at: &At<'c>, accs: &[Val<'c>], known: &Known<'c>) {
        let mut known = known.clone();
        for store in &self.e.stores {
            let v = self.value(store.node, at, accs, &mut known);
            self.store(store, at, v);
        }
    }

    /// The vector of a node, computing what is not known yet.
    pub fn value(&self, id: NodeId, at: &At<'c>, accs: &[Val<'c>], known: &mut Known<'c>) -> Val<'c> {
        self.compute(id, at, accs, known);
        self.spread(id, at.lanes, known)
    }

    /// The scalar of a node that is the same in all columns. Reductions it needs must be known.
    pub fn scalar(&self, id: NodeId, at: &At<'c>, known: &mut Known<'c>) -> Val<'c> {
        self.compute(id, at, &[], known);
        known[id.0 as usize].expect("the node was just computed")
    }

    fn spread(&self, id: NodeId, lanes: u32, known: &Known<'c>) -> Val<'c> {
        let v = known[id.0 as usize].expect("operands are computed before their users");
        if self.b.lanes(v) == lanes { v } else { self.b.splat(v, lanes) }
    }

    fn compute(&self, id: NodeId, at: &At<'c>, accs: &[Val<'c>], known: &mut Known<'c>) {
        let i = id.0 as usize;
        if known[i].is_some() {
            return;
        }
        let node = self.e.nodes[i];
        for operand in node.operands() {
            self.compute(operand, at, accs, known);
        }
        let lanes = if self.uniform[i] { 1 } else { at.lanes };
        let mut l = Vectors { b: self.b, lanes };
        let b = self.b;
        let v = match node {
            Node::Acc(i) => accs[usize::from(i)],
            Node::Elem(input) => self.load_elem(input, 0, at),
            Node::ElemAt { input, col_offset } => self.load_elem(input, col_offset, at),
            Node::Col(input) => self.load(input, at.col, at),
            Node::Row(input) => {
                let desc = self.e.inputs[input.0 as usize];
                let row = if desc.kind == InputKind::One { b.i64(0) } else { at.row };
                let ptr = b.row(self.inputs[input.0 as usize], row, desc.ty.bytes() as i64);
                load_mem(b, ptr, desc.ty, 1, Valid::All)
            }
            Node::Const(v) => l.constant(v.get()),
            Node::Unary(op, x) => {
                let x = self.spread(x, lanes, known);
                unary_lanes(&mut l, op, x)
            }
            Node::Binary(op, x, y) => {
                let (x, y) = (self.spread(x, lanes, known), self.spread(y, lanes, known));
                binary_lanes(&mut l, op, x, y)
            }
            Node::Fma(x, y, z) => {
                let (x, y) = (self.spread(x, lanes, known), self.spread(y, lanes, known));
                b.fma(x, y, self.spread(z, lanes, known))
            }
            Node::Reduce(..) => unreachable!("row kernels finish a reduction before they use it"),
        };
        known[i] = Some(v);
    }

    fn load_elem(&self, input: InputId, col_offset: u32, at: &At<'c>) -> Val<'c> {
        let b = self.b;
        let InputDesc { kind, .. } = self.e.inputs[input.0 as usize];
        let stride = match kind {
            InputKind::Elem { stride } => i64::from(stride),
            InputKind::Col | InputKind::Row | InputKind::One => 0,
        };
        let row = b.mul(at.row, b.i64(stride));
        let index = b.add(b.add(row, at.col), b.i64(i64::from(col_offset)));
        self.load(input, index, at)
    }

    fn load(&self, input: InputId, index: Val<'c>, at: &At<'c>) -> Val<'c> {
        let ty = self.e.inputs[input.0 as usize].ty;
        let ptr = self.b.row(self.inputs[input.0 as usize], index, ty.bytes() as i64);
        load_mem(self.b, ptr, ty, at.lanes, at.valid)
    }

    /// Writes the vector of a store that has a value per row and column.
    pub fn store(&self, store: &Store, at: &At<'c>, v: Val<'c>) {
        let b = self.b;
        let desc = self.e.outputs[store.output.0 as usize];
        let base = self.outputs[store.output.0 as usize];
        match desc.kind {
            OutputKind::Elem { stride, .. } => {
                let index = b.add(b.mul(at.out_row, b.i64(i64::from(stride))), at.col);
                let ptr = b.row(base, index, desc.ty.bytes() as i64);
                store_mem(b, ptr, v, desc.ty, at.valid);
            }
            OutputKind::Row => {
                let ptr = b.row(base, at.out_row, desc.ty.bytes() as i64);
                store_mem(b, ptr, b.extract(v, 0), desc.ty, Valid::All);
            }
            // Sums over groups belong to the loop over columns, which row kernels own.
            OutputKind::GroupSums { .. } => {}
        }
    }
}

/// Loads lanes of `ty` as f32; lanes that are not valid are zero.
pub fn load_mem<'c>(
    b: &VecBuilder<'_, 'c>,
    ptr: PointerValue<'c>,
    ty: MemTy,
    lanes: u32,
    valid: Valid<'c>,
) -> Val<'c> {
    let raw = |elem: Elem| match valid {
        Valid::All => b.load(ptr, elem, lanes),
        Valid::First(n) => b.load_partial(ptr, elem, lanes, n),
        Valid::Mask(mask) => b.load_masked(ptr, elem, lanes, mask),
    };
    match ty {
        MemTy::F32 => raw(Elem::F32),
        MemTy::F16 if has_f16(&b.target().cpu) => {
            b.fpext(b.bitcast(raw(Elem::I16), Elem::F16, lanes), Elem::F32)
        }
        MemTy::F16 => f16_to_f32(b, raw(Elem::I16)),
        MemTy::Bf16 => b.bf16_to_f32(raw(Elem::I16)),
        MemTy::I8 => b.sitofp(b.sext(raw(Elem::I8), Elem::I32), Elem::F32),
        MemTy::I32 => b.sitofp(raw(Elem::I32), Elem::F32),
    }
}

/// Stores f32 lanes as `ty`, rounded as the language says.
pub fn store_mem<'c>(b: &VecBuilder<'_, 'c>, ptr: PointerValue<'c>, v: Val<'c>, ty: MemTy, valid: Valid<'c>) {
    let lanes = b.lanes(v);
    let (v, elem) = match ty {
        MemTy::F32 => (v, Elem::F32),
        MemTy::F16 if has_f16(&b.target().cpu) => {
            (b.bitcast(b.fptrunc(v, Elem::F16), Elem::I16, lanes), Elem::I16)
        }
        MemTy::F16 => (f32_to_f16(b, v), Elem::I16),
        MemTy::Bf16 => (f32_to_bf16(b, v), Elem::I16),
        MemTy::I8 => (b.trunc(to_i8_range(b, v), Elem::I8), Elem::I8),
        MemTy::I32 => (b.fptosi(v, Elem::I32), Elem::I32),
    };
    match valid {
        Valid::All => b.store(ptr, v, elem),
        Valid::First(n) => b.store_partial(ptr, v, elem, n),
        Valid::Mask(mask) => b.store_masked(ptr, v, elem, mask),
    }
}

/// f32 lanes rounded half to even and clamped to -128..=127, as i32; NaN gives 0.
pub fn to_i8_range<'c>(b: &VecBuilder<'_, 'c>, v: Val<'c>) -> Val<'c> {
    let lanes = b.lanes(v);
    let mut l = Vectors { b, lanes };
    let number = b.select(b.fcmp(FloatCmp::ORD, v, v), v, b.f32(lanes, 0.0));
    let (low, high) = (b.f32(lanes, -128.0), b.f32(lanes, 127.0));
    let clamped = b.fmin(b.fmax(number, low), high);
    b.fptosi(l.round(clamped), Elem::I32)
}

fn has_f16(cpu: &CpuDesc) -> bool {
    cpu.features.contains(&"f16c")
}

/// Half precision to single by integer operations and one exact product.
pub(crate) fn f16_to_f32<'c>(b: &VecBuilder<'_, 'c>, bits: Val<'c>) -> Val<'c> {
    let n = b.lanes(bits);
    let h = b.zext(bits, Elem::I32);
    let size = b.and(h, b.i32(n, 0x7fff));
    // Exponent and mantissa in the place of an f32's; the exponent's bias is off by 112.
    let moved = b.bitcast(b.shl(size, b.i32(n, 13)), Elem::F32, n);
    let scaled = b.fmul(moved, b.f32(n, 2f32.powi(112)));
    let special = b.icmp(IntCmp::SGE, size, b.i32(n, 0x7c00));
    let infinite = b.select(special, b.i32(n, 0x7f80_0000), b.i32(n, 0));
    let sign = b.shl(b.and(h, b.i32(n, 0x8000)), b.i32(n, 16));
    let all = b.or(b.or(b.bitcast(scaled, Elem::I32, n), infinite), sign);
    b.bitcast(all, Elem::F32, n)
}

/// Single precision to half, to nearest even, by integer operations and one sum.
pub(crate) fn f32_to_f16<'c>(b: &VecBuilder<'_, 'c>, v: Val<'c>) -> Val<'c> {
    let n = b.lanes(v);
    let bits = b.bitcast(v, Elem::I32, n);
    let size = b.and(bits, b.i32(n, 0x7fff_ffff));
    // Normal results: rebias, add just under half of the last place (all of it when odd), cut.
    let odd = b.and(b.lshr(size, b.i32(n, 13)), b.i32(n, 1));
    let rebiased = b.sub(size, b.i32(n, (112 << 23) - 0xfff));
    let normal = b.lshr(b.add(rebiased, odd), b.i32(n, 13));
    // Subnormal results: adding 0.5 puts the last place of a half at the last place of the sum.
    let shifted = b.fadd(b.bitcast(size, Elem::F32, n), b.f32(n, 0.5));
    let small = b.sub(b.bitcast(shifted, Elem::I32, n), b.i32(n, 0x3f00_0000));
    // From 65536 on infinity; NaN stays NaN.
    let nan = b.icmp(IntCmp::SGT, size, b.i32(n, 0x7f80_0000));
    let large = b.select(nan, b.i32(n, 0x7e00), b.i32(n, 0x7c00));
    let is_small = b.icmp(IntCmp::SLT, size, b.i32(n, 0x3880_0000));
    let is_large = b.icmp(IntCmp::SGE, size, b.i32(n, 0x4780_0000));
    let h = b.select(is_large, large, b.select(is_small, small, normal));
    let sign = b.and(b.lshr(bits, b.i32(n, 16)), b.i32(n, 0x8000));
    b.trunc(b.or(h, sign), Elem::I16)
}

/// Single precision to the upper half, to nearest even; NaN stays NaN.
pub(crate) fn f32_to_bf16<'c>(b: &VecBuilder<'_, 'c>, v: Val<'c>) -> Val<'c> {
    let n = b.lanes(v);
    let bits = b.bitcast(v, Elem::I32, n);
    let high = b.lshr(bits, b.i32(n, 16));
    let odd = b.and(high, b.i32(n, 1));
    let rounded = b.lshr(b.add(b.add(bits, b.i32(n, 0x7fff)), odd), b.i32(n, 16));
    let number = b.fcmp(FloatCmp::ORD, v, v);
    b.trunc(b.select(number, rounded, b.or(high, b.i32(n, 0x40))), Elem::I16)
}
