//! Elementwise ops: nodes of expressions.

use super::value::{Body, Value, broadcast, identity};
use super::{Lowering, dims_of, mem_of};
use crate::nest::{Bin, Cmp, Mem, NodeId, Num, Un};
use quantc_ir::diag::Result;
use quantc_ir::formats::{self, Format};
use quantc_ir::graph::{Graph, Node as OpNode};
use quantc_ir::ops::{BinaryKind, Op, Order, UnaryKind};
use quantc_ir::ty::{ElemTy, TensorTy};

impl Lowering<'_> {
    /// An elementwise function of operands that are repeated to `dims`.
    pub(super) fn elementwise(
        &mut self,
        dims: &[u64],
        mem: Mem,
        operands: &[Value],
        f: impl FnOnce(&mut Body, &[NodeId]) -> NodeId,
    ) -> Result<Value> {
        let rank = dims.len();
        let all: u64 = dims.iter().product();
        let mut product = None;
        let mut ready = vec![];
        for value in operands {
            let own: u64 = value.dims().iter().product();
            let fits = value.product().is_none() || (product.is_none() && value.dims() == dims);
            let value = match value {
                // What is repeated is computed once.
                Value::Lazy(_) if !fits || (own < all && own > 1 && !value.is_cheap()) => {
                    Value::View(self.stored(value)?)
                }
                _ => value.clone(),
            };
            product = product.or(value.product());
            ready.push(value);
        }
        let mut body = Body::new(rank);
        let nodes: Vec<NodeId> = ready
            .iter()
            .map(|v| {
                let map =
                    if v.product().is_some() { identity(rank) } else { broadcast(v.dims(), dims, rank) };
                body.absorb(v, &map)
            })
            .collect();
        let root = f(&mut body, &nodes);
        self.lazy_after(mem, dims, body, root, product)
    }

    pub(super) fn elementwise_op(&mut self, g: &Graph, node: &OpNode, out: &TensorTy) -> Result<Value> {
        let operands: Vec<Value> = node.args.iter().map(|&a| self.value(g, a)).collect::<Result<_>>()?;
        let (dims, mem) = (dims_of(out)?, mem_of(out.elem)?);
        let of = g.ty(node.args[0]);
        let from = mem_of(of.elem)?;
        let coded = |ty: &TensorTy| ty.elem.scheme().is_some();
        match &node.op {
            Op::Cast(op) => {
                if let Some(codes) = self.recast(g, node.args[0], op.to, &dims)? {
                    return Ok(codes);
                }
                return self.cast(&operands[0], of.elem, op.to, op.saturate, &dims);
            }
            Op::Select(_) => {
                return self.elementwise(&dims, mem, &operands, |b, x| b.select(x[0], x[1], x[2]));
            }
            _ if node.args.iter().any(|&a| coded(g.ty(a))) => return Err(self.refuse(node.op.name(), of)),
            _ => {}
        }
        let op = node.op.clone();
        if let Op::Binary(b) = &op
            && matches!(b.kind, BinaryKind::Pow)
            && from.num() == Num::U64
        {
            return Err(self.refuse("binary{kind=pow}", of));
        }
        self.elementwise(&dims, mem, &operands, |b, x| {
            let y = match &op {
                Op::Add(_) => b.bin(Bin::Add, x[0], x[1]),
                Op::Mul(_) => b.bin(Bin::Mul, x[0], x[1]),
                Op::Binary(op) => binary(b, op.kind, x[0], x[1]),
                Op::Compare(op) => {
                    let order = match op.order {
                        Order::Equal => Cmp::Equal,
                        Order::Less => Cmp::Less,
                        Order::LessEqual => Cmp::LessEqual,
                    };
                    b.cmp(order, x[0], x[1])
                }
                Op::Unary(op) => unary(b, op.kind, x[0]),
                Op::Relu(_) => {
                    let zero = b.real(from.num(), 0.0);
                    b.bin(Bin::Max, zero, x[0])
                }
                Op::Silu(_) => {
                    let s = b.un(Un::Sigmoid, x[0]);
                    b.bin(Bin::Mul, x[0], s)
                }
                Op::Gelu(op) => gelu(b, x[0], op.approx),
                _ => b.un(Un::Tanh, x[0]),
            };
            b.fit(mem, y)
        })
    }

    /// The same numbers in another element type.
    pub(super) fn cast(
        &mut self,
        x: &Value,
        from: ElemTy,
        to: ElemTy,
        saturate: bool,
        dims: &[u64],
    ) -> Result<Value> {
        let mem = mem_of(to)?;
        if from == to {
            return Ok(x.clone());
        }
        let table = from.bare_format().filter(|f| !f.is_int()).map(|f| self.decode_table(f));
        if let Some(format) = to.bare_format().filter(|f| !f.is_int()) {
            let numbers = self.cast(x, from, ElemTy::F32, saturate, dims)?;
            return self.encode(&numbers, format, saturate, from == ElemTy::F64);
        }
        self.elementwise(dims, mem, std::slice::from_ref(x), |b, x| {
            let v = match (from.bare_format(), table) {
                (Some(_), Some(table)) => decode_at(b, table, x[0]),
                (Some(format), None) => decode_int(b, format, x[0]),
                (None, _) => x[0],
            };
            if let Some(format) = to.bare_format() {
                // Codes of integers wrap around; from floats they are cut towards zero first.
                let wide = b.convert(Num::I64, v);
                let mask = b.int(Num::I64, i64::from(format.mask()));
                let code = b.bin(Bin::And, wide, mask);
                let code = b.convert(Num::I32, code);
                return b.fit(mem, code);
            }
            let y = match (b.num(v).is_float(), to) {
                (true, ElemTy::Int(int)) if mem != Mem::Bool && mem.num() != Num::U64 => {
                    let wide = b.convert(Num::I64, v);
                    let (low, high) = int.range();
                    let (low, high) = (b.int(Num::I64, low as i64), b.int(Num::I64, high as i64));
                    let wide = b.bin(Bin::Max, wide, low);
                    let wide = b.bin(Bin::Min, wide, high);
                    b.convert(mem.num(), wide)
                }
                _ => b.convert(mem.num(), v),
            };
            b.fit(mem, y)
        })
    }
}

/// The integer of a code.
pub(super) fn decode_int(b: &mut Body, format: &Format, code: NodeId) -> NodeId {
    if format.is_signed_int() && format.bits < 8 {
        let by = b.int(Num::I32, i64::from(32 - format.bits));
        let up = b.bin(Bin::Shl, code, by);
        return b.bin(Bin::Shr, up, by);
    }
    // `int8` is loaded with its sign.
    debug_assert!(format.bits < 8 || !format.is_signed_int() || *format == formats::INT8);
    code
}

/// The number of a code, from the table of its format.
pub(super) fn decode_at(b: &mut Body, table: super::Place, code: NodeId) -> NodeId {
    let input = b.input(table);
    let at = b.convert(Num::I64, code);
    let mask = b.int(Num::I64, 255);
    let at = b.bin(Bin::And, at, mask);
    b.push(crate::nest::Node::LoadAt { input, mem: Mem::F32, at })
}

fn binary(b: &mut Body, kind: BinaryKind, x: NodeId, y: NodeId) -> NodeId {
    let num = b.num(x);
    let f = match kind {
        BinaryKind::Sub => Bin::Sub,
        BinaryKind::Div => Bin::Div,
        BinaryKind::Pow => {
            // Squares and roots are what most powers are.
            if num.is_float() && b.nodes[y as usize] == constant_of(num, 2.0) {
                return b.bin(Bin::Mul, x, x);
            }
            Bin::Pow
        }
        BinaryKind::Min => Bin::Min,
        BinaryKind::Max => Bin::Max,
        BinaryKind::Rem => Bin::Rem,
        BinaryKind::Mod => {
            let rem = b.bin(Bin::Rem, x, y);
            if num == Num::U64 {
                return rem;
            }
            let zero = b.int(num, 0);
            let (low, below) = (b.cmp(Cmp::Less, rem, zero), b.cmp(Cmp::Less, y, zero));
            let differ = b.bin(Bin::Xor, low, below);
            let none = b.cmp(Cmp::Equal, rem, zero);
            let moved = b.bin(Bin::Add, rem, y);
            let moved = b.select(differ, moved, rem);
            return b.select(none, rem, moved);
        }
        BinaryKind::And => Bin::And,
        BinaryKind::Or => Bin::Or,
        BinaryKind::Xor => Bin::Xor,
        BinaryKind::Shl => Bin::Shl,
        BinaryKind::Shr => Bin::Shr,
    };
    // A constant goes first: the kernel then looks for NaN in the constant only.
    let constant = |b: &Body, i: NodeId| matches!(b.nodes[i as usize], crate::nest::Node::Const(..));
    match f {
        Bin::Min | Bin::Max if constant(b, y) => b.bin(f, y, x),
        _ => b.bin(f, x, y),
    }
}

fn constant_of(num: Num, x: f64) -> crate::nest::Node {
    let bits = if num == Num::F64 { x.to_bits() } else { u64::from((x as f32).to_bits()) };
    crate::nest::Node::Const(num, bits)
}

fn unary(b: &mut Body, kind: UnaryKind, x: NodeId) -> NodeId {
    use UnaryKind as K;
    let num = b.num(x);
    let f = match kind {
        K::Abs => Un::Abs,
        K::Neg => Un::Neg,
        K::Not | K::BitNot => Un::Not,
        K::Sign => {
            let (zero, one, below) = (b.int(num, 0), b.int(num, 1), b.int(num, -1));
            let positive = b.cmp(Cmp::Less, zero, x);
            if num == Num::U64 {
                return b.select(positive, one, zero);
            }
            let negative = b.cmp(Cmp::Less, x, zero);
            let rest = b.select(negative, below, x);
            return b.select(positive, one, rest);
        }
        K::IsNan => {
            let same = b.cmp(Cmp::Equal, x, x);
            return b.un(Un::Not, same);
        }
        K::IsInf => {
            let (size, infinity) = (b.un(Un::Abs, x), b.real(num, f64::INFINITY));
            return b.cmp(Cmp::Equal, size, infinity);
        }
        K::IsPosInf | K::IsNegInf => {
            let sign = if kind == K::IsPosInf { 1.0 } else { -1.0 };
            let infinity = b.real(num, f64::INFINITY * sign);
            return b.cmp(Cmp::Equal, x, infinity);
        }
        K::Reciprocal => {
            let one = b.real(num, 1.0);
            return b.bin(Bin::Div, one, x);
        }
        K::Acos => Un::Acos,
        K::Acosh => Un::Acosh,
        K::Asin => Un::Asin,
        K::Asinh => Un::Asinh,
        K::Atan => Un::Atan,
        K::Atanh => Un::Atanh,
        K::Ceil => Un::Ceil,
        K::Cos => Un::Cos,
        K::Cosh => Un::Cosh,
        K::Erf => Un::Erf,
        K::Exp => Un::Exp,
        K::Floor => Un::Floor,
        K::Log => Un::Log,
        K::Round => Un::Round,
        K::Sigmoid => Un::Sigmoid,
        K::Sin => Un::Sin,
        K::Sinh => Un::Sinh,
        K::Softplus => Un::Softplus,
        K::Sqrt => Un::Sqrt,
        K::Tan => Un::Tan,
    };
    b.un(f, x)
}

/// `x * Phi(x)`.
pub(super) fn gelu(b: &mut Body, x: NodeId, approx: bool) -> NodeId {
    let num = b.num(x);
    let (one, half) = (b.real(num, 1.0), b.real(num, 0.5));
    let inner = if approx {
        let (c, root) = (b.real(num, 0.044715), b.real(num, (2.0 / std::f64::consts::PI).sqrt()));
        let square = b.bin(Bin::Mul, x, x);
        let cube = b.bin(Bin::Mul, square, x);
        let cube = b.bin(Bin::Mul, c, cube);
        let sum = b.bin(Bin::Add, x, cube);
        let scaled = b.bin(Bin::Mul, root, sum);
        b.un(Un::Tanh, scaled)
    } else {
        let root = b.real(num, std::f64::consts::FRAC_1_SQRT_2);
        let scaled = b.bin(Bin::Mul, x, root);
        b.un(Un::Erf, scaled)
    };
    let sum = b.bin(Bin::Add, one, inner);
    let x = b.bin(Bin::Mul, half, x);
    b.bin(Bin::Mul, x, sum)
}
