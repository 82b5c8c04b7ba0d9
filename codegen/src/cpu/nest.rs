//! Emits loop nests.
//!
//! One axis is walked in vectors: the last of the index space where neighbours are loaded side by side, or the last of
//! a fold, which then keeps a number for each lane. What does not change along that axis is computed as a scalar and
//! spread when it meets a vector; loads with other strides are gathered lane by lane.

use std::cell::RefCell;
use std::collections::HashMap;

use inkwell::values::PointerValue;
use quantc_ir::diag::Result;

use crate::cpu::llvm::{Elem, FloatCmp, IntCmp, Unit, Val, VecBuilder};
use crate::cpu::math;
use crate::eexpr::llvm::{Vectors, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::nest::{Affine, Bin, Cmp, Fold, FoldKind, Guard, Mem, NestSpec, Node, NodeId, Num, To, Un, nums};

/// The type in registers.
fn elem(num: Num) -> Elem {
    match num {
        Num::Bool => Elem::I1,
        Num::I32 => Elem::I32,
        Num::I64 | Num::U64 => Elem::I64,
        Num::F32 => Elem::F32,
        Num::F64 => Elem::F64,
    }
}

/// The type in memory.
fn raw(mem: Mem) -> Elem {
    match mem {
        Mem::Bool | Mem::I8 | Mem::U8 => Elem::I8,
        Mem::I16 | Mem::U16 | Mem::F16 | Mem::Bf16 => Elem::I16,
        Mem::I32 | Mem::U32 => Elem::I32,
        Mem::I64 | Mem::U64 => Elem::I64,
        Mem::F32 => Elem::F32,
        Mem::F64 => Elem::F64,
    }
}

/// Expressions at one place of the index space.
pub(super) struct Place<'p, 'u, 'c> {
    pub(super) b: &'p VecBuilder<'u, 'c>,
    pub(super) nodes: &'p [Node],
    pub(super) nums: &'p [Num],
    pub(super) inputs: &'p [PointerValue<'c>],
    /// The index of each axis; along the vector's axis that of its first lane.
    pub(super) index: Vec<Val<'c>>,
    /// Which axis the lanes lie along.
    pub(super) axis: usize,
    pub(super) lanes: u32,
    /// What the fold gave.
    pub(super) folded: Option<Val<'c>>,
    pub(super) known: RefCell<HashMap<NodeId, Val<'c>>>,
}

impl<'c> Place<'_, '_, 'c> {
    /// The value of an affine function at the first lane.
    pub(super) fn first(&self, at: &Affine) -> Val<'c> {
        let b = self.b;
        let mut sum = b.i64(at.base);
        for (&index, &stride) in self.index.iter().zip(&at.strides) {
            if stride != 0 {
                sum = b.add(sum, b.mul(index, b.i64(stride)));
            }
        }
        sum
    }

    fn along(&self, at: &Affine) -> i64 {
        if self.lanes == 1 { 0 } else { at.strides[self.axis] }
    }

    /// The value in every lane; a scalar where all agree.
    fn affine(&self, at: &Affine) -> Val<'c> {
        let (b, first, step) = (self.b, self.first(at), self.along(at));
        if step == 0 {
            return first;
        }
        let lanes: Vec<i64> = (0..i64::from(self.lanes)).map(|l| l * step).collect();
        b.add(b.splat(first, self.lanes), b.ints(Elem::I64, &lanes))
    }

    fn guard(&self, guard: &Guard) -> Val<'c> {
        let b = self.b;
        let at = self.affine(&guard.at);
        b.icmp(IntCmp::ULT, at, self.spread(b.i64(guard.below), b.lanes(at)))
    }

    /// Guards that are the same in all lanes, and the others, each combined.
    fn guards(&self, guards: &[Guard]) -> (Option<Val<'c>>, Option<Val<'c>>) {
        let all = |varying: bool| {
            let of = guards.iter().filter(|g| (self.along(&g.at) != 0) == varying);
            of.map(|g| self.guard(g)).reduce(|x, y| self.b.and(x, y))
        };
        (all(false), all(true))
    }

    fn spread(&self, v: Val<'c>, lanes: u32) -> Val<'c> {
        if self.b.lanes(v) == lanes { v } else { self.b.splat(v, lanes) }
    }

    /// The value of a node in as many lanes as the vector has.
    pub(super) fn wide(&self, id: NodeId) -> Val<'c> {
        self.spread(self.value(id), self.lanes)
    }

    /// The value of a node; a scalar where all lanes agree.
    pub(super) fn value(&self, id: NodeId) -> Val<'c> {
        if let Some(&known) = self.known.borrow().get(&id) {
            return known;
        }
        let value = self.compute(id);
        self.known.borrow_mut().insert(id, value);
        value
    }

    fn compute(&self, id: NodeId) -> Val<'c> {
        let (b, num) = (self.b, self.nums[id as usize]);
        match &self.nodes[id as usize] {
            Node::Const(num, bits) => constant(b, *num, *bits),
            Node::Pos(at) => self.affine(at),
            Node::Inside(guards) => {
                let (same, varying) = self.guards(guards);
                match (same, varying) {
                    (Some(x), Some(y)) => b.and(self.spread(x, self.lanes), y),
                    (x, y) => x.or(y).unwrap_or_else(|| b.bit(true)),
                }
            }
            Node::Load { input, mem, at, guards } => self.load(*input, *mem, at, guards),
            Node::LoadAt { input, mem, at } => {
                let at = self.value(*at);
                self.gather(*input, *mem, b.lanes(at), |lane| (b.extract(at, lane), None))
            }
            Node::Folded(_) => self.folded.expect("a fold has a result"),
            Node::Unary(f, x) => unary(b, *f, self.nums[*x as usize], self.value(*x)),
            Node::Binary(f, x, y) => {
                let (x, y) = self.pair(*x, *y);
                binary(b, *f, num, x, y)
            }
            Node::Compare(f, x, y) => {
                let of = self.nums[*x as usize];
                let (x, y) = self.pair(*x, *y);
                compare(b, *f, of, x, y)
            }
            Node::Select(cond, x, y) => {
                let (x, y) = self.pair(*x, *y);
                let cond = self.value(*cond);
                let lanes = b.lanes(x).max(b.lanes(cond));
                let (x, y) = (self.spread(x, lanes), self.spread(y, lanes));
                b.select(self.spread(cond, lanes), x, y)
            }
            Node::Convert(to, x) => convert(b, self.nums[*x as usize], *to, self.value(*x)),
            Node::Nearest(x) => nearest(b, self.value(*x)),
            Node::Fit(mem, x) => fit(b, *mem, self.value(*x)),
        }
    }

    fn pair(&self, x: NodeId, y: NodeId) -> (Val<'c>, Val<'c>) {
        let (x, y) = (self.value(x), self.value(y));
        let lanes = self.b.lanes(x).max(self.b.lanes(y));
        (self.spread(x, lanes), self.spread(y, lanes))
    }

    fn load(&self, input: u16, mem: Mem, at: &Affine, guards: &[Guard]) -> Val<'c> {
        let (b, base, size) = (self.b, self.inputs[usize::from(input)], mem.bytes() as i64);
        let (same, varying) = self.guards(guards);
        let step = self.along(at);
        let ptr = || b.row(base, self.first(at), size);
        match (step, same, varying) {
            (0, same, None) => {
                let first = self.first(at);
                let place = match same {
                    Some(cond) => b.select(cond, first, b.i64(0)),
                    None => first,
                };
                let x = widened(b, mem, b.load(b.row(base, place, size), raw(mem), 1));
                match same {
                    Some(cond) => b.select(cond, x, b.ty(elem(mem.num()), 1).const_zero()),
                    None => x,
                }
            }
            (1, None, None) => widened(b, mem, b.load(ptr(), raw(mem), self.lanes)),
            (1, Some(cond), None) => {
                let zero = || vec![b.ty(raw(mem), self.lanes).const_zero()];
                let loaded = b.if_else(cond, || vec![b.load(ptr(), raw(mem), self.lanes)], zero);
                widened(b, mem, loaded[0])
            }
            (1, same, Some(mask)) => {
                let mask = same.map_or(mask, |cond| b.and(b.splat(cond, self.lanes), mask));
                widened(b, mem, b.load_masked(ptr(), raw(mem), self.lanes, mask))
            }
            (_, same, varying) => {
                let all = self.affine(at);
                self.gather(input, mem, self.lanes, |lane| {
                    let lane_cond = varying.map(|v| b.extract(v, lane));
                    let cond = match (same, lane_cond) {
                        (Some(x), Some(y)) => Some(b.and(x, y)),
                        (x, y) => x.or(y),
                    };
                    (b.extract(all, lane), cond)
                })
            }
        }
    }

    /// Lanes from anywhere; where a condition does not hold they are 0.
    fn gather(
        &self,
        input: u16,
        mem: Mem,
        lanes: u32,
        place: impl Fn(u32) -> (Val<'c>, Option<Val<'c>>),
    ) -> Val<'c> {
        let (b, base) = (self.b, self.inputs[usize::from(input)]);
        let zero = b.ty(raw(mem), 1).const_zero();
        let one = |lane: u32| {
            let (at, cond) = place(lane);
            let at = cond.map_or(at, |c| b.select(c, at, b.i64(0)));
            let x = b.load(b.row(base, at, mem.bytes() as i64), raw(mem), 1);
            cond.map_or(x, |c| b.select(c, x, zero))
        };
        if lanes == 1 {
            return widened(b, mem, one(0));
        }
        let mut all = b.ty(raw(mem), lanes).const_zero();
        for lane in 0..lanes {
            all = b.insert(all, lane, one(lane));
        }
        widened(b, mem, all)
    }

    /// The fold with one more number; products of single precision are not rounded before they join a sum.
    fn folded_in(&self, fold: &Fold, num: Num, acc: Val<'c>) -> Val<'c> {
        match &self.nodes[fold.of as usize] {
            Node::Binary(Bin::Mul, x, y) if fold.kind == FoldKind::Sum && num == Num::F32 => {
                self.b.fma(self.wide(*x), self.wide(*y), acc)
            }
            _ => fold_step(self.b, fold.kind, num, acc, self.wide(fold.of)),
        }
    }

    /// Stores a node's value, as many lanes as there are.
    pub(super) fn store(&self, out: PointerValue<'c>, mem: Mem, at: &Affine, id: NodeId) {
        let (b, size) = (self.b, mem.bytes() as i64);
        let value = narrowed(b, mem, self.wide(id));
        let ptr = b.row(out, self.first(at), size);
        let step = self.along(at);
        if self.lanes == 1 || step == 1 {
            b.store(ptr, value, raw(mem));
            return;
        }
        for lane in 0..self.lanes {
            b.store(b.offset(ptr, i64::from(lane) * step * size), b.extract(value, lane), raw(mem));
        }
    }
}

fn constant<'c>(b: &VecBuilder<'_, 'c>, num: Num, bits: u64) -> Val<'c> {
    match num {
        Num::Bool => b.bit(bits != 0),
        Num::I32 => b.i32(1, bits as i32),
        Num::I64 | Num::U64 => b.i64(bits as i64),
        Num::F32 => b.f32(1, f32::from_bits(bits as u32)),
        Num::F64 => b.bitcast(b.i64(bits as i64), Elem::F64, 1),
    }
}

/// Loaded bits as what is computed with.
fn widened<'c>(b: &VecBuilder<'_, 'c>, mem: Mem, v: Val<'c>) -> Val<'c> {
    let lanes = b.lanes(v);
    match mem {
        Mem::Bool => b.icmp(IntCmp::NE, v, b.int(Elem::I8, lanes, 0)),
        Mem::I8 | Mem::I16 => b.sext(v, Elem::I32),
        Mem::U8 | Mem::U16 => b.zext(v, Elem::I32),
        Mem::U32 => b.zext(v, Elem::I64),
        Mem::F16 if b.target().cpu.features.contains(&"f16c") => {
            b.fpext(b.bitcast(v, Elem::F16, lanes), Elem::F32)
        }
        Mem::F16 => f16_to_f32(b, v),
        Mem::Bf16 => b.bf16_to_f32(v),
        Mem::I32 | Mem::I64 | Mem::U64 | Mem::F32 | Mem::F64 => v,
    }
}

/// A number as it is stored.
fn narrowed<'c>(b: &VecBuilder<'_, 'c>, mem: Mem, v: Val<'c>) -> Val<'c> {
    match mem {
        Mem::Bool => b.zext(v, Elem::I8),
        Mem::I8 | Mem::U8 => b.trunc(v, Elem::I8),
        Mem::I16 | Mem::U16 => b.trunc(v, Elem::I16),
        Mem::U32 => b.trunc(v, Elem::I32),
        Mem::F16 => to_half(b, v),
        Mem::Bf16 => f32_to_bf16(b, v),
        Mem::I32 | Mem::I64 | Mem::U64 | Mem::F32 | Mem::F64 => v,
    }
}

fn to_half<'c>(b: &VecBuilder<'_, 'c>, v: Val<'c>) -> Val<'c> {
    if b.target().cpu.features.contains(&"f16c") {
        return b.bitcast(b.fptrunc(v, Elem::F16), Elem::I16, b.lanes(v));
    }
    f32_to_f16(b, v)
}

/// The nearest number that memory holds.
fn fit<'c>(b: &VecBuilder<'_, 'c>, mem: Mem, v: Val<'c>) -> Val<'c> {
    let lanes = b.lanes(v);
    match mem {
        Mem::F16 | Mem::Bf16 | Mem::I8 | Mem::I16 | Mem::U8 | Mem::U16 => {
            widened(b, mem, narrowed(b, mem, v))
        }
        Mem::U32 => b.and(v, b.int(Elem::I64, lanes, 0xffff_ffff)),
        _ => v,
    }
}

fn is_nan<'c>(b: &VecBuilder<'_, 'c>, v: Val<'c>) -> Val<'c> {
    b.fcmp(FloatCmp::UNO, v, v)
}

/// A function of f64, of numbers of either float type.
fn through_f64<'c>(b: &VecBuilder<'_, 'c>, name: &str, num: Num, args: &[Val<'c>]) -> Val<'c> {
    if num == Num::F64 {
        return b.external_f64(name, args);
    }
    let args: Vec<Val<'c>> = args.iter().map(|&v| b.fpext(v, Elem::F64)).collect();
    b.fptrunc(b.external_f64(name, &args), Elem::F32)
}

fn float<'c>(b: &VecBuilder<'_, 'c>, num: Num, lanes: u32, x: f64) -> Val<'c> {
    let one = match num {
        Num::F64 => constant(b, num, x.to_bits()),
        _ => constant(b, Num::F32, u64::from((x as f32).to_bits())),
    };
    b.splat(one, lanes)
}

fn unary<'c>(b: &VecBuilder<'_, 'c>, f: Un, num: Num, x: Val<'c>) -> Val<'c> {
    let lanes = b.lanes(x);
    let mut vectors = Vectors { b, lanes };
    let l = &mut vectors;
    let int_zero = || b.int(elem(num), lanes, 0);
    let single = num == Num::F32;
    let rounding = |intrinsic: &str, external: &str| {
        if b.target().cpu.features.contains(&"avx") {
            return b.intrinsic(intrinsic, &[x.get_type()], &[x]);
        }
        through_f64(b, external, num, &[x])
    };
    match f {
        Un::Neg if num.is_float() => b.fneg(x),
        Un::Neg => b.sub(int_zero(), x),
        Un::Abs if num.is_float() => b.fabs(x),
        Un::Abs if num == Num::U64 => x,
        Un::Abs => b.smax(x, b.sub(int_zero(), x)),
        Un::Not => b.xor(x, b.int(elem(num), lanes, -1)),
        Un::Sqrt => b.sqrt(x),
        Un::Ceil => rounding("llvm.ceil", "qc_ceil"),
        Un::Floor => rounding("llvm.floor", "qc_floor"),
        Un::Round => rounding("llvm.roundeven", "qc_round"),
        Un::Key => {
            let (to, bits) = if single { (Elem::I32, 31) } else { (Elem::I64, 63) };
            let v = b.bitcast(x, to, lanes);
            let sign = b.ashr(v, b.int(to, lanes, bits));
            b.xor(v, b.lshr(sign, b.int(to, lanes, 1)))
        }
        Un::Exp if single => math::exp(l, x),
        Un::Sigmoid if single => math::sigmoid(l, x),
        Un::Tanh if single => math::tanh(l, x),
        Un::Erf if single => math::erf(l, x),
        Un::Sigmoid => {
            let e = b.external_f64("qc_exp", &[b.fneg(x)]);
            let one = float(b, num, lanes, 1.0);
            b.fdiv(one, b.fadd(one, e))
        }
        Un::Softplus => {
            let wide = if single { b.fpext(x, Elem::F64) } else { x };
            // log(1 + e^-|x|) + max(x, 0)
            let e = b.external_f64("qc_exp", &[b.fneg(b.fabs(wide))]);
            let low = b.external_f64("qc_log1p", &[e]);
            let zero = float(b, Num::F64, lanes, 0.0);
            let y = b.fadd(b.fmax(zero, wide), low);
            if single { b.fptrunc(y, Elem::F32) } else { y }
        }
        Un::Acos => through_f64(b, "qc_acos", num, &[x]),
        Un::Acosh => through_f64(b, "qc_acosh", num, &[x]),
        Un::Asin => through_f64(b, "qc_asin", num, &[x]),
        Un::Asinh => through_f64(b, "qc_asinh", num, &[x]),
        Un::Atan => through_f64(b, "qc_atan", num, &[x]),
        Un::Atanh => through_f64(b, "qc_atanh", num, &[x]),
        Un::Cos => through_f64(b, "qc_cos", num, &[x]),
        Un::Cosh => through_f64(b, "qc_cosh", num, &[x]),
        Un::Erf => through_f64(b, "qc_erf", num, &[x]),
        Un::Exp => through_f64(b, "qc_exp", num, &[x]),
        Un::Log => through_f64(b, "qc_log", num, &[x]),
        Un::Sin => through_f64(b, "qc_sin", num, &[x]),
        Un::Sinh => through_f64(b, "qc_sinh", num, &[x]),
        Un::Tan => through_f64(b, "qc_tan", num, &[x]),
        Un::Tanh => through_f64(b, "qc_tanh", num, &[x]),
    }
}

fn binary<'c>(b: &VecBuilder<'_, 'c>, f: Bin, num: Num, x: Val<'c>, y: Val<'c>) -> Val<'c> {
    let lanes = b.lanes(x);
    if num.is_float() {
        return match f {
            Bin::Add => b.fadd(x, y),
            Bin::Mul => b.fmul(x, y),
            Bin::Div => b.fdiv(x, y),
            Bin::Rem => through_f64(b, "qc_rem", num, &[x, y]),
            Bin::Pow => through_f64(b, "qc_pow", num, &[x, y]),
            // Both give the right operand when one is NaN; the left may be.
            Bin::Min => b.select(is_nan(b, x), x, b.fmin(x, y)),
            Bin::Max => b.select(is_nan(b, x), x, b.fmax(x, y)),
            _ => b.fsub(x, y),
        };
    }
    let unsigned = matches!(num, Num::U64 | Num::Bool);
    let less = if unsigned { IntCmp::ULT } else { IntCmp::SLT };
    let int = |v: i64| b.int(elem(num), lanes, v);
    let divided = |rem: bool| {
        let zero = b.icmp(IntCmp::EQ, y, int(0));
        // The one quotient that does not fit would trap: -(-2^n) is -2^n by 1.
        let negative = b.icmp(IntCmp::EQ, y, int(-1));
        let one = if unsigned { zero } else { b.or(zero, negative) };
        let safe = b.select(one, int(1), y);
        let out = match (rem, unsigned) {
            (false, false) => b.sdiv(x, safe),
            (false, true) => b.udiv(x, safe),
            (true, false) => b.srem(x, safe),
            (true, true) => b.urem(x, safe),
        };
        let out = match (rem, unsigned) {
            (false, false) => b.select(negative, b.sub(int(0), x), out),
            _ => out,
        };
        b.select(zero, int(0), out)
    };
    match f {
        Bin::Add => b.add(x, y),
        Bin::Sub => b.sub(x, y),
        Bin::Mul => b.mul(x, y),
        Bin::Div => divided(false),
        Bin::Rem => divided(true),
        Bin::Min => b.select(b.icmp(less, x, y), x, y),
        Bin::Max => b.select(b.icmp(less, x, y), y, x),
        Bin::And => b.and(x, y),
        Bin::Or => b.or(x, y),
        Bin::Xor => b.xor(x, y),
        Bin::Shl | Bin::Shr => {
            let bits = if num == Num::I32 { 32 } else { 64 };
            let fits = b.icmp(IntCmp::ULT, y, int(bits));
            let by = b.select(fits, y, int(0));
            let (moved, beyond) = match (f, unsigned) {
                (Bin::Shl, _) => (b.shl(x, by), int(0)),
                (_, true) => (b.lshr(x, by), int(0)),
                (_, false) => (b.ashr(x, by), b.ashr(x, int(bits - 1))),
            };
            b.select(fits, moved, beyond)
        }
        Bin::Pow => {
            // Squares and multiplies; powers beyond the number's bits leave what they leave modulo 2^bits.
            let (mut result, mut base) = (int(1), x);
            for bit in 0..31 {
                let set = b.icmp(IntCmp::NE, b.and(y, int(1 << bit)), int(0));
                result = b.select(set, b.mul(result, base), result);
                base = b.mul(base, base);
            }
            if unsigned {
                return result;
            }
            let below = b.select(b.icmp(IntCmp::EQ, x, int(1)), int(1), int(0));
            b.select(b.icmp(IntCmp::SLT, y, int(0)), below, result)
        }
    }
}

fn compare<'c>(b: &VecBuilder<'_, 'c>, f: Cmp, num: Num, x: Val<'c>, y: Val<'c>) -> Val<'c> {
    if num.is_float() {
        let how = match f {
            Cmp::Equal => FloatCmp::OEQ,
            Cmp::Less => FloatCmp::OLT,
            Cmp::LessEqual => FloatCmp::OLE,
        };
        return b.fcmp(how, x, y);
    }
    let unsigned = matches!(num, Num::U64 | Num::Bool);
    let how = match (f, unsigned) {
        (Cmp::Equal, _) => IntCmp::EQ,
        (Cmp::Less, true) => IntCmp::ULT,
        (Cmp::Less, false) => IntCmp::SLT,
        (Cmp::LessEqual, true) => IntCmp::ULE,
        (Cmp::LessEqual, false) => IntCmp::SLE,
    };
    b.icmp(how, x, y)
}

fn convert<'c>(b: &VecBuilder<'_, 'c>, from: Num, to: Num, x: Val<'c>) -> Val<'c> {
    let lanes = b.lanes(x);
    if from == to {
        return x;
    }
    match (from, to) {
        (Num::Bool, Num::F32 | Num::F64) => b.uitofp(x, elem(to)),
        (Num::Bool, _) => b.zext(x, elem(to)),
        (Num::F32 | Num::F64, Num::Bool) => b.fcmp(FloatCmp::UNE, x, float(b, from, lanes, 0.0)),
        (_, Num::Bool) => b.icmp(IntCmp::NE, x, b.int(elem(from), lanes, 0)),
        (Num::F32, Num::F64) => b.fpext(x, Elem::F64),
        (Num::F64, Num::F32) => b.fptrunc(x, Elem::F32),
        (Num::F32 | Num::F64, to) => {
            let name = if to == Num::U64 { "llvm.fptoui.sat" } else { "llvm.fptosi.sat" };
            b.intrinsic(name, &[b.ty(elem(to), lanes), x.get_type()], &[x])
        }
        (Num::U64, Num::F32 | Num::F64) => b.uitofp(x, elem(to)),
        (_, Num::F32 | Num::F64) => b.sitofp(x, elem(to)),
        (Num::I32, _) => b.sext(x, elem(to)),
        (_, Num::I32) => b.trunc(x, elem(to)),
        _ => x,
    }
}

/// The nearest integers, by the processor's own conversion.
fn nearest<'c>(b: &VecBuilder<'_, 'c>, x: Val<'c>) -> Val<'c> {
    match b.lanes(x) {
        4 => b.intrinsic("llvm.x86.sse2.cvtps2dq", &[], &[x]),
        8 => b.intrinsic("llvm.x86.avx.cvt.ps2dq.256", &[], &[x]),
        1 => b.extract(nearest(b, b.splat(x, 4)), 0),
        _ => b.fptosi(b.intrinsic("llvm.roundeven", &[x.get_type()], &[x]), Elem::I32),
    }
}

fn fold_start<'c>(b: &VecBuilder<'_, 'c>, kind: FoldKind, num: Num, lanes: u32) -> Val<'c> {
    let one = match (kind, num) {
        (FoldKind::Sum, num) => b.ty(elem(num), 1).const_zero(),
        (FoldKind::Prod, Num::F32 | Num::F64) => float(b, num, 1, 1.0),
        (FoldKind::Prod, num) => constant(b, num, 1),
        (FoldKind::Max, Num::F32 | Num::F64) => float(b, num, 1, f64::NEG_INFINITY),
        (FoldKind::Min, Num::F32 | Num::F64) => float(b, num, 1, f64::INFINITY),
        (FoldKind::Max | FoldKind::Arg { .. }, Num::I32) => b.i32(1, i32::MIN),
        (FoldKind::Max | FoldKind::Arg { .. }, Num::I64) => b.i64(i64::MIN),
        (FoldKind::Max | FoldKind::Arg { .. }, _) => constant(b, num, 0),
        (FoldKind::Min, Num::I32) => b.i32(1, i32::MAX),
        (FoldKind::Min, Num::I64) => b.i64(i64::MAX),
        (FoldKind::Min, num) => constant(b, num, u64::MAX),
    };
    b.splat(one, lanes)
}

fn fold_step<'c>(b: &VecBuilder<'_, 'c>, kind: FoldKind, num: Num, acc: Val<'c>, x: Val<'c>) -> Val<'c> {
    let f = match kind {
        FoldKind::Sum => Bin::Add,
        FoldKind::Prod => Bin::Mul,
        FoldKind::Max | FoldKind::Arg { .. } => Bin::Max,
        FoldKind::Min => Bin::Min,
    };
    binary(b, f, num, acc, x)
}

/// How a nest is walked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Walk {
    /// One number at a time.
    Scalar,
    /// In vectors along the last axis of the index space.
    Outer,
    /// In vectors along the last axis of the fold.
    Inner,
}

fn walk(spec: &NestSpec, lanes: u64) -> Walk {
    if spec.ordered() || lanes == 1 {
        return Walk::Scalar;
    }
    // Loads that lie side by side or are one for all, and loads that are gathered.
    let cost = |axis: usize| -> u64 {
        let one = |node: &Node| match node {
            Node::Load { at, .. } if matches!(at.strides[axis], 0 | 1) => 1,
            Node::Load { .. } | Node::LoadAt { .. } => 16,
            _ => 0,
        };
        spec.nodes.iter().map(one).sum()
    };
    let extent = |axis: usize| spec.extents()[axis];
    let last = spec.dims.len() - 1;
    let Some(fold) = &spec.fold else {
        return if extent(last) >= lanes / 2 { Walk::Outer } else { Walk::Scalar };
    };
    let inner = spec.rank() - 1;
    let may = !fold.dims.is_empty() && fold.each.is_none() && !matches!(fold.kind, FoldKind::Arg { .. });
    // Lanes of the fold must not differ where the number is finished.
    let inner_fits = may && extent(inner) >= lanes;
    let outer_fits = extent(last) >= lanes / 2;
    match (outer_fits, inner_fits) {
        (true, true) if cost(inner) < cost(last) => Walk::Inner,
        (true, _) => Walk::Outer,
        (false, true) => Walk::Inner,
        (false, false) => Walk::Scalar,
    }
}

/// Emits the kernel of `spec` as `symbol`.
pub fn emit(unit: &Unit<'_>, spec: &NestSpec, symbol: &str) -> Result<()> {
    unit.kernel(symbol, |b| {
        items(b, spec);
        Ok(())
    })
}

/// Walks the items of a call.
fn items<'c>(b: &VecBuilder<'_, 'c>, spec: &NestSpec) {
    let nums = nums(&spec.nodes);
    let inputs: Vec<PointerValue<'c>> = (0..u32::from(spec.inputs)).map(|i| b.arg(i)).collect();
    let out = b.arg(u32::from(spec.inputs));
    let lanes = b.width();
    let walk = walk(spec, lanes.into());
    let nest = Nest { b, spec, nums: &nums, inputs: &inputs, out };
    let outer = &spec.dims[..spec.dims.len() - 1];
    let extent = spec.dims[spec.dims.len() - 1] as i64;
    if spec.ordered() {
        b.for_items(|_| nest.nested(0, &mut vec![]));
        return;
    }
    let (chunk, chunks) = spec.chunks();
    b.for_items(|item| {
        let mut rest = if chunks > 1 { b.udiv(item, b.i64(chunks as i64)) } else { item };
        let mut index = vec![b.i64(0); outer.len()];
        for (a, &n) in outer.iter().enumerate().rev() {
            if a == 0 {
                index[a] = rest;
            } else {
                index[a] = b.urem(rest, b.i64(n as i64));
                rest = b.udiv(rest, b.i64(n as i64));
            }
        }
        let (from, to) = if chunks > 1 {
            let part = b.urem(item, b.i64(chunks as i64));
            let from = b.mul(part, b.i64(chunk as i64));
            (from, b.smin(b.add(from, b.i64(chunk as i64)), b.i64(extent)))
        } else {
            (b.i64(0), b.i64(extent))
        };
        match walk {
            Walk::Outer => {
                let count = b.sub(to, from);
                let whole = b.add(from, b.and(count, b.i64(-i64::from(lanes))));
                nest.row(&index, lanes, from, whole, None);
                nest.row(&index, 1, whole, to, None);
            }
            Walk::Scalar => nest.row(&index, 1, from, to, None),
            Walk::Inner => nest.row(&index, 1, from, to, Some(lanes)),
        }
    });
}

struct Nest<'p, 'u, 'c> {
    b: &'p VecBuilder<'u, 'c>,
    spec: &'p NestSpec,
    nums: &'p [Num],
    inputs: &'p [PointerValue<'c>],
    out: PointerValue<'c>,
}

impl<'c> Nest<'_, '_, 'c> {
    fn place(
        &self,
        index: Vec<Val<'c>>,
        axis: usize,
        lanes: u32,
        folded: Option<Val<'c>>,
    ) -> Place<'_, '_, 'c> {
        Place {
            b: self.b,
            nodes: &self.spec.nodes,
            nums: self.nums,
            inputs: self.inputs,
            index,
            axis,
            lanes,
            folded,
            known: RefCell::default(),
        }
    }

    /// Loops over the remaining axes, and stores every number in order.
    fn nested(&self, axis: usize, index: &mut Vec<Val<'c>>) {
        if axis == self.spec.dims.len() {
            let place = self.place(index.clone(), 0, 1, None);
            if let To::Computed(at) = self.spec.to {
                let at = place.value(at);
                let value = narrowed(self.b, self.spec.out, place.value(self.spec.value));
                self.b.store(
                    self.b.row(self.out, at, self.spec.out.bytes() as i64),
                    value,
                    raw(self.spec.out),
                );
            }
            return;
        }
        self.b.for_const(0, self.spec.dims[axis] as i64, 1, &[], |i, _| {
            index.push(i);
            self.nested(axis + 1, index);
            index.pop();
            vec![]
        });
    }

    /// Computes and stores a part of a row, so many numbers at a time.
    fn row(&self, index: &[Val<'c>], lanes: u32, from: Val<'c>, to: Val<'c>, inner: Option<u32>) {
        self.b.for_range(from, to, i64::from(lanes), &[], |i, _| {
            let mut at = index.to_vec();
            at.push(i);
            self.number(at, inner.unwrap_or(lanes), inner.is_some());
            vec![]
        });
    }

    /// Computes and stores the numbers at `index`: a vector of them, or one with the fold in vectors.
    fn number(&self, index: Vec<Val<'c>>, lanes: u32, inner: bool) {
        let (spec, last) = (self.spec, self.spec.dims.len() - 1);
        let To::At(to) = &spec.to else { return };
        let Some(fold) = &spec.fold else {
            self.place(index, last, lanes, None).store(self.out, spec.out, to, spec.value);
            return;
        };
        let wide = if inner { 1 } else { lanes };
        let folded = if let FoldKind::Arg { last: late } = fold.kind {
            self.arg(&index, wide, late)
        } else {
            let start = fold_start(self.b, fold.kind, self.nums[fold.of as usize], wide);
            self.fold(&mut index.clone(), 0, start, wide, inner.then_some(lanes))
        };
        if fold.each.is_none() {
            let mut at = index;
            at.extend(fold.dims.iter().map(|_| self.b.i64(0)));
            self.place(at, last, wide, Some(folded)).store(self.out, spec.out, to, spec.value);
        }
    }

    /// Folds over the axes from `axis` of the fold on, going on from `acc`.
    fn fold(
        &self,
        index: &mut Vec<Val<'c>>,
        axis: usize,
        acc: Val<'c>,
        lanes: u32,
        inner: Option<u32>,
    ) -> Val<'c> {
        let (b, spec) = (self.b, self.spec);
        let Some(fold) = &spec.fold else { return acc };
        let (last, num) = (spec.dims.len() - 1, self.nums[fold.of as usize]);
        let Some(&n) = fold.dims.get(axis) else {
            let place = self.place(index.clone(), last, lanes, None);
            let next = place.folded_in(fold, num, acc);
            if let Some(before) = fold.each {
                let stored = if before { acc } else { next };
                let place = self.place(index.clone(), last, lanes, Some(stored));
                if let To::At(to) = &spec.to {
                    place.store(self.out, spec.out, to, spec.value);
                }
            }
            return next;
        };
        let n = n as i64;
        let (Some(wide), true) = (inner, axis + 1 == fold.dims.len()) else {
            let done = b.for_const(0, n, 1, &[acc], |i, acc| {
                index.push(i);
                let next = self.fold(index, axis + 1, acc[0], lanes, inner);
                index.pop();
                vec![next]
            });
            return done[0];
        };
        // A number for each lane, then all lanes, then what is left.
        let whole = n - n % i64::from(wide);
        let axis = spec.rank() - 1;
        let start = fold_start(b, fold.kind, num, wide);
        let vector = b.for_const(0, whole, wide.into(), &[start], |i, acc| {
            index.push(i);
            let place = self.place(index.clone(), axis, wide, None);
            let next = place.folded_in(fold, num, acc[0]);
            index.pop();
            vec![next]
        });
        let one = b.reduce(vector[0], |b, x, y| fold_step(b, fold.kind, num, x, y));
        let acc = fold_step(b, fold.kind, num, acc, one);
        let done = b.for_const(whole, n, 1, &[acc], |i, acc| {
            index.push(i);
            let place = self.place(index.clone(), axis, 1, None);
            let next = place.folded_in(fold, num, acc[0]);
            index.pop();
            vec![next]
        });
        done[0]
    }

    /// The index of the largest integer along the one axis of the fold.
    fn arg(&self, index: &[Val<'c>], lanes: u32, late: bool) -> Val<'c> {
        let (b, spec) = (self.b, self.spec);
        let Some(fold) = &spec.fold else { return b.i64(0) };
        let num = self.nums[fold.of as usize];
        let start = [fold_start(b, fold.kind, num, lanes), b.int(Elem::I64, lanes, 0)];
        let n = fold.dims.first().copied().unwrap_or(0) as i64;
        let done = b.for_const(0, n, 1, &start, |i, best| {
            let mut at = index.to_vec();
            at.push(i);
            let x = self.place(at, spec.dims.len() - 1, lanes, None).wide(fold.of);
            let order = if late { Cmp::LessEqual } else { Cmp::Less };
            let better = compare(b, order, num, best[0], x);
            vec![b.select(better, x, best[0]), b.select(better, b.splat(i, lanes), best[1])]
        });
        done[1]
    }
}
