//! Codes of scaled sums: what quantized networks do between products.
//!
//! A product of bytes gives `(sum + shift) * scale`; a bias, a cut to a range and `quantize` follow. In real arithmetic
//! that is `round(sum * f + b)`, cut to a range of codes, where `f` is the scale over that of the codes. So it is computed,
//! without a division: a bias whose numbers are multiples of the scale joins the integers, which is what ONNX Runtime
//! makes of the same nodes. Now and then, where the exact number lies half way between two codes, rounding step by step
//! gives the other one.

use super::product::Scaled;
use super::value::{Body, Value, View, broadcast};
use super::{Lowering, mem_of};
use crate::lower::BlobSource;
use crate::nest::{Bin, Mem, Node, Num};
use quantc_ir::diag::Result;
use quantc_ir::entity::ValueId;
use quantc_ir::formats;
use quantc_ir::graph::Graph;
use quantc_ir::ops::{BinaryKind, Op, UnaryKind};
use quantc_ir::scheme::{Scheme, Zero};
use quantc_ir::ty::{ElemTy, Int};

/// Largest sum of a bias and a shift: together with products of bytes it stays an `i32`.
const MOST: i64 = 1 << 30;

/// A bias by output.
enum Bias {
    None,
    Sums(Vec<i64>),
    Numbers(Vec<f32>),
}

impl Lowering<'_> {
    /// The one number of a constant.
    fn single(&self, g: &Graph, v: ValueId) -> Result<Option<f32>> {
        let one = self.tensor(g, v)?.filter(|t| t.ty.shape.elements() == Some(1));
        Ok(one.map(|t| t.reals()[0] as f32))
    }

    /// The codes of what a product of bytes, a bias and a cut give, when `x`, the first of `args`, is that.
    pub(super) fn requantized(
        &mut self,
        g: &Graph,
        args: &[ValueId],
        x: &Value,
        to: Scheme,
        dims: &[u64],
        mem: Mem,
    ) -> Result<Option<Value>> {
        if *to.format != formats::INT8 && *to.format != formats::UINT8 {
            return Ok(None);
        }
        let Some(product) = x.product() else { return Ok(None) };
        let Some(scaled) = self.scaled.get(&product).cloned() else { return Ok(None) };
        let Some(step) = self.single(g, args[1])? else { return Ok(None) };
        let zero = match (args.get(2).filter(|&&z| !g.is_none(z)), to.zero) {
            (Some(&z), Zero::Point(_)) => self.single(g, z)?,
            _ => Some(0.0),
        };
        let Some(zero) = zero else { return Ok(None) };
        let Some((low, high, bias)) = self.cut_and_biased(g, args[0], product, &scaled, dims)? else {
            return Ok(None);
        };
        // Cutting before rounding is cutting at rounded ends.
        let (least, most) = to.format.int_range();
        let (least, most) = (least as f32 - zero, most as f32 - zero);
        let end = |x: f32| (x / step).round_ties_even().clamp(least, most);
        let (low, high) = (end(low), end(high));
        let Scaled { mut shift, scale, axis } = scaled;
        if let Bias::Sums(sums) = &bias {
            shift.iter_mut().zip(sums).for_each(|(s, b)| *s += b);
        }
        let mut body = Body::new(dims.len());
        let mut root = body.push(Node::Folded(Num::I32));
        if shift.iter().any(|&s| s != 0) {
            let bytes = shift.iter().flat_map(|&s| (s as i32).to_le_bytes()).collect();
            let shift = self.per_output(&mut body, bytes, axis, Mem::I32, "shift");
            root = body.bin(Bin::Add, root, shift);
        }
        root = body.convert(Num::F32, root);
        let factor = scale.iter().flat_map(|s| (s / step).to_le_bytes()).collect();
        let factor = self.per_output(&mut body, factor, axis, Mem::F32, "factor");
        root = body.bin(Bin::Mul, root, factor);
        if let Bias::Numbers(numbers) = &bias {
            let bytes = numbers.iter().flat_map(|b| (b / step).to_le_bytes()).collect();
            let bias = self.per_output(&mut body, bytes, axis, Mem::F32, "bias");
            root = body.bin(Bin::Add, root, bias);
        }
        let (low, high) = (body.real(Num::F32, low.into()), body.real(Num::F32, high.into()));
        root = body.bin(Bin::Max, low, root);
        root = body.bin(Bin::Min, high, root);
        root = body.push(Node::Nearest(root));
        if zero != 0.0 {
            let zero = body.int(Num::I32, zero as i64);
            root = body.bin(Bin::Add, root, zero);
        }
        self.lazy_after(mem, dims, body, root, Some(product)).map(Some)
    }

    /// The codes that `QLinearConv` and its like make of the sums of bytes: what is rounded, moved by a zero point and cut
    /// to the range of `to`, and then cast, is cut first and rounded once.
    pub(super) fn recast(
        &mut self,
        g: &Graph,
        v: ValueId,
        to: ElemTy,
        dims: &[u64],
    ) -> Result<Option<Value>> {
        let (least, most) = match to {
            ElemTy::Int(Int::I8) => (-128.0, 127.0),
            ElemTy::Int(Int::U8) => (0.0, 255.0),
            _ => return Ok(None),
        };
        let Some(product) = self.values.get(&v).and_then(Value::product) else { return Ok(None) };
        // The operand of an op that belongs to the product, and the other one.
        let step = |v: ValueId| {
            let (_, node) = g.def(v).filter(|_| g.ty(v).elem == ElemTy::F32)?;
            let follows = |v: &ValueId| self.values.get(v).and_then(Value::product) == Some(product);
            let i = node.args.iter().position(follows)?;
            Some((&node.op, node.args[i], node.args.get(1 - i.min(1)).copied()))
        };
        let is = |op: &Op, kind: BinaryKind| matches!(op, Op::Binary(b) if b.kind == kind);
        let Some((_, v, Some(high))) = step(v).filter(|s| is(s.0, BinaryKind::Min)) else { return Ok(None) };
        let Some((_, v, Some(low))) = step(v).filter(|s| is(s.0, BinaryKind::Max)) else { return Ok(None) };
        if (self.single(g, low)?, self.single(g, high)?) != (Some(least), Some(most)) {
            return Ok(None);
        }
        let Some((op, operand, other)) = step(v) else { return Ok(None) };
        let (zero, v) = match (op, other) {
            (Op::Add(_), Some(zero)) => (self.single(g, zero)?, operand),
            _ => (Some(0.0), v),
        };
        let Some(zero) = zero.filter(|z| z.fract() == 0.0 && (least..=most).contains(z)) else {
            return Ok(None);
        };
        let round = |op: &Op| matches!(op, Op::Unary(u) if u.kind == UnaryKind::Round);
        let Some((_, scaled, _)) = step(v).filter(|s| round(s.0)) else { return Ok(None) };
        let Some((Op::Mul(_), real, Some(factor))) = step(scaled) else { return Ok(None) };
        let Some((Op::Cast(_), sum, _)) = step(real) else { return Ok(None) };
        let Some(factor) = self.known(g, factor)?.filter(|f| f.reals().iter().all(|x| x.is_finite())) else {
            return Ok(None);
        };
        let Some(Value::Lazy(sum)) = self.values.get(&sum).filter(|s| s.mem() == Mem::I32).cloned() else {
            return Ok(None);
        };
        if sum.dims != dims || factor.dims().len() > dims.len() {
            return Ok(None);
        }
        let bytes: Vec<u8> = factor.reals().iter().flat_map(|&x| (x as f32).to_le_bytes()).collect();
        let extents: Vec<u64> = factor.dims().iter().map(|&d| d as u64).collect();
        let (len, name) = (bytes.len() as u64, format!("{}.factor", self.name));
        let place = self.blob(&name, BlobSource::Made(bytes), len);
        let factor = Value::View(View::dense(place, Mem::F32, &extents));
        let mut body = sum.body.clone();
        let real = body.convert(Num::F32, sum.root);
        let factor = body.absorb(&factor, &broadcast(&extents, dims, dims.len()));
        let mut root = body.bin(Bin::Mul, real, factor);
        let ends = [least - zero, most - zero].map(|x| body.real(Num::F32, x.into()));
        root = body.bin(Bin::Max, ends[0], root);
        root = body.bin(Bin::Min, ends[1], root);
        root = body.push(Node::Nearest(root));
        if zero != 0.0 {
            let zero = body.int(Num::I32, zero as i64);
            root = body.bin(Bin::Add, root, zero);
        }
        self.lazy_after(mem_of(to)?, dims, body, root, Some(product)).map(Some)
    }

    /// What stands between a product and `v`: the range it is cut to, and the bias before that.
    fn cut_and_biased(
        &self,
        g: &Graph,
        v: ValueId,
        product: usize,
        scaled: &Scaled,
        dims: &[u64],
    ) -> Result<Option<(f32, f32, Bias)>> {
        let (mut low, mut high, mut bias) = (f32::NEG_INFINITY, f32::INFINITY, Bias::None);
        let mut at = v;
        loop {
            let follows = |v: ValueId| self.values.get(&v).and_then(Value::product) == Some(product);
            let Some((_, node)) = g.def(at) else { return Ok(None) };
            if g.ty(at).elem != ElemTy::F32 || !follows(at) {
                return Ok(None);
            }
            let other = |i: usize| node.args.get(1 - i).copied().filter(|_| follows(node.args[i]));
            match &node.op {
                Op::Relu(_) if matches!(bias, Bias::None) => {
                    (low, at) = (low.max(0.0), node.args[0]);
                }
                Op::Binary(op)
                    if matches!(op.kind, BinaryKind::Max | BinaryKind::Min) && matches!(bias, Bias::None) =>
                {
                    let i = usize::from(!follows(node.args[0]));
                    let Some(end) = other(i).map(|v| self.single(g, v)).transpose()?.flatten() else {
                        return Ok(None);
                    };
                    if end.is_nan() {
                        return Ok(None);
                    }
                    // What is cut here is cut again to what has been found so far.
                    if op.kind == BinaryKind::Max {
                        low = low.max(end);
                    } else {
                        high = high.min(end.max(low));
                    }
                    at = node.args[i];
                }
                Op::Add(_) if matches!(bias, Bias::None) => {
                    let i = usize::from(!follows(node.args[0]));
                    let Some(v) = other(i) else { return Ok(None) };
                    let Some(numbers) = self.by_output(g, v, scaled, dims)? else { return Ok(None) };
                    bias = joined(&numbers, scaled);
                    at = node.args[i];
                }
                Op::Conv(_) | Op::Dot(_) => return Ok(Some((low, high, bias))),
                Op::MatMul(op) if op.epilogue.is_empty() => return Ok(Some((low, high, bias))),
                _ => return Ok(None),
            }
        }
    }

    /// Constant numbers that are added to a product, one for each output.
    fn by_output(&self, g: &Graph, v: ValueId, scaled: &Scaled, dims: &[u64]) -> Result<Option<Vec<f32>>> {
        let Some(tensor) = self.known(g, v)? else { return Ok(None) };
        let (own, outs) = (tensor.dims(), scaled.scale.len());
        let numbers: Vec<f32> = tensor.reals().iter().map(|&x| x as f32).collect();
        if own.len() > dims.len() || numbers.iter().any(|x| !x.is_finite()) {
            return Ok(None);
        }
        let ahead = dims.len() - own.len();
        let along = |(a, &d)| d == 1 || a + ahead == scaled.axis;
        if !own.iter().enumerate().all(along) {
            return Ok(None);
        }
        Ok(match numbers[..] {
            [one] => Some(vec![one; outs]),
            _ => Some(numbers).filter(|n| n.len() == outs),
        })
    }
}

/// A bias as integers that join the sums, when all its numbers are such multiples of the scales.
fn joined(numbers: &[f32], scaled: &Scaled) -> Bias {
    let one = |((&b, &s), &shift): ((&f32, &f32), &i64)| {
        let n = (f64::from(b) / f64::from(s)).round();
        let same = n.abs() < MOST as f64 && n as f32 * s == b && (n as i64 + shift).abs() < MOST;
        same.then_some(n as i64)
    };
    let sums: Option<Vec<i64>> = numbers.iter().zip(&scaled.scale).zip(&scaled.shift).map(one).collect();
    sums.map_or_else(|| Bias::Numbers(numbers.to_vec()), Bias::Sums)
}
