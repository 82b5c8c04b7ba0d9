//! Ops that move elements: other strides where those can say it, else nests that load at other places.

use super::value::{Body, Value, View, broadcast, identity};
use super::{Lowering, Place, dims_of, mem_of, origin};
use crate::lower::BlobSource;
use crate::nest::{Affine, Guard, Mem, Node};
use quantc_ir::diag::Result;
use quantc_ir::entity::ValueId;
use quantc_ir::graph::Graph;
use quantc_ir::ops::{Pad, PadMode, Slice};
use quantc_ir::ty::TensorTy;
use std::rc::Rc;

impl Lowering<'_> {
    /// The elements of `value` at the places that `map` gives for indices of extents `dims`.
    fn moved(&mut self, value: &Value, dims: &[u64], map: &[Affine]) -> Result<Value> {
        let rank = dims.len();
        match value {
            Value::View(v) => {
                let at = v.at.through(map, rank);
                Ok(Value::View(View { place: v.place, mem: v.mem, dims: dims.to_vec(), at }))
            }
            Value::Lazy(l) if l.product.is_some() => {
                let view = self.stored(value)?;
                self.moved(&Value::View(view), dims, map)
            }
            Value::Lazy(l) => {
                let mut body = Body::new(rank);
                let root = body.absorb(value, map);
                let lazy = super::value::Lazy { mem: l.mem, dims: dims.to_vec(), body, root, product: None };
                Ok(Value::Lazy(Rc::new(lazy)))
            }
        }
    }

    pub(super) fn transpose(&mut self, g: &Graph, x: ValueId, perm: &[u8]) -> Result<Value> {
        let x = self.value(g, x)?;
        let rank = x.dims().len();
        let swapped: Vec<u8> = (0..rank as u8).rev().collect();
        let perm: Vec<usize> =
            if perm.is_empty() { &swapped[..] } else { perm }.iter().map(|&p| usize::from(p)).collect();
        let dims: Vec<u64> = perm.iter().map(|&p| x.dims()[p]).collect();
        // Axis `perm[i]` of the operand is axis `i` of the result.
        let mut map = vec![origin(rank); rank];
        for (i, &p) in perm.iter().enumerate() {
            map[p] = Affine::axis(i, rank);
        }
        self.moved(&x, &dims, &map)
    }

    pub(super) fn slice(&mut self, g: &Graph, x: ValueId, op: &Slice, out: &TensorTy) -> Result<Value> {
        let x = self.value(g, x)?;
        let dims = dims_of(out)?;
        let mut map = identity(dims.len());
        let axis = usize::from(op.axis);
        map[axis] = map[axis].scaled(op.step, op.start as i64);
        self.moved(&x, &dims, &map)
    }

    pub(super) fn expand(&mut self, g: &Graph, x: ValueId, out: &TensorTy) -> Result<Value> {
        let x = self.value(g, x)?;
        let dims = dims_of(out)?;
        let grows = dims.iter().product::<u64>() > x.dims().iter().product();
        let x = if grows && !x.is_cheap() { Value::View(self.stored(&x)?) } else { x };
        let map = broadcast(x.dims(), &dims, dims.len());
        self.moved(&x, &dims, &map)
    }

    pub(super) fn reshape(&mut self, g: &Graph, x: ValueId, out: &TensorTy) -> Result<Value> {
        let x = self.value(g, x)?;
        self.reshaped(&x, &dims_of(out)?)
    }

    pub(super) fn reshaped(&mut self, x: &Value, dims: &[u64]) -> Result<Value> {
        if x.dims() == dims {
            return Ok(x.clone());
        }
        if dims.contains(&0) {
            return self.buffer(x.mem(), dims).map(Value::View);
        }
        if let Value::View(v) = x
            && let Some(view) = v.reshaped(dims)
        {
            return Ok(Value::View(view));
        }
        // Axes of one element may come and go in any expression.
        let solid = |d: &[u64]| -> Vec<usize> { (0..d.len()).filter(|&a| d[a] != 1).collect() };
        let (from, to) = (solid(x.dims()), solid(dims));
        let extents = |d: &[u64], axes: &[usize]| -> Vec<u64> { axes.iter().map(|&a| d[a]).collect() };
        if x.product().is_none() && extents(x.dims(), &from) == extents(dims, &to) {
            let mut map = vec![origin(dims.len()); x.dims().len()];
            for (&f, &t) in from.iter().zip(&to) {
                map[f] = Affine::axis(t, dims.len());
            }
            return self.moved(x, dims, &map);
        }
        let view = self.dense(x)?;
        Ok(Value::View(View::dense(view.place, view.mem, dims)))
    }

    pub(super) fn concat(
        &mut self,
        g: &Graph,
        parts: &[ValueId],
        axis: usize,
        out: &TensorTy,
    ) -> Result<Value> {
        let dims = dims_of(out)?;
        let parts: Vec<Value> = parts.iter().map(|&p| self.value(g, p)).collect::<Result<_>>()?;
        if let [one] = &parts[..] {
            return Ok(one.clone());
        }
        let layout = parts.first().map(Value::layout).unwrap_or_default();
        let whole = self.buffer_in(mem_of(out.elem)?, &dims, &layout)?;
        let mut start = 0;
        for part in parts {
            let part = self.without_product(&part)?;
            let base = whole.at.base + start * whole.at.strides[axis];
            let at = Affine { base, strides: whole.at.strides.clone() };
            start += part.dims()[axis] as i64;
            let to = View { place: whole.place, mem: whole.mem, dims: part.dims().to_vec(), at };
            self.part = true;
            let stored = self.store_to(&part, &to);
            self.part = false;
            stored?;
        }
        Ok(Value::View(whole))
    }

    pub(super) fn pad(&mut self, g: &Graph, args: &[ValueId], op: &Pad, out: &TensorTy) -> Result<Value> {
        let x = self.value(g, args[0])?;
        let x = self.without_product(&x)?;
        let dims = dims_of(out)?;
        let rank = dims.len();
        let mut body = Body::new(rank);
        if op.mode == PadMode::Constant {
            let fill = self.optional(g, args, 1)?;
            let shifted: Vec<Affine> =
                (0..rank).map(|a| Affine::axis(a, rank).scaled(1, -op.before[a])).collect();
            let mut guards = vec![];
            for (a, at) in shifted.iter().enumerate() {
                if op.before[a] > 0 || op.after[a] > 0 {
                    // What is cut off on one side stays outside.
                    let end = x.dims()[a] as i64 + op.after[a].min(0);
                    guards.push(Guard { at: at.clone(), below: end });
                }
            }
            let inner = body.absorb_within(&x, &shifted, &guards);
            if guards.is_empty() {
                return self.lazy(x.mem(), &dims, body, inner);
            }
            let fill = match fill {
                Some(fill) => {
                    let fill = self.without_product(&fill)?;
                    let map = vec![origin(rank); fill.dims().len()];
                    body.absorb(&fill, &map)
                }
                None => body.real(x.mem().num(), 0.0),
            };
            let inside = body.push(Node::Inside(guards));
            let root = body.select(inside, inner, fill);
            return self.lazy(x.mem(), &dims, body, root);
        }
        // Where each index of an axis comes from is looked up.
        let view = self.stored(&x)?;
        let mut parts = vec![];
        let mut base = Affine::constant(view.at.base, rank);
        for (a, &extent) in dims.iter().enumerate() {
            let (n, stride) = (view.dims[a] as i64, view.at.strides[a]);
            if (op.before[a], op.after[a]) == (0, 0) {
                base = base.plus(&Affine::axis(a, rank).scaled(stride, 0));
                continue;
            }
            let table = margins(op, a, n, extent as i64);
            let place = self.table("margins", &table);
            let input = body.input(place);
            let at = Affine::axis(a, rank);
            let from = body.push(Node::Load { input, mem: Mem::I64, at, guards: vec![] });
            parts.push((from, stride));
        }
        let at = body.address(base, &parts);
        let input = body.input(view.place);
        let root = body.push(Node::LoadAt { input, mem: view.mem, at });
        self.lazy(view.mem, &dims, body, root)
    }

    /// A table of numbers that the engine keeps.
    pub(super) fn table(&mut self, name: &str, numbers: &[i64]) -> Place {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        let len = bytes.len() as u64;
        self.blob(name, BlobSource::Made(bytes), len)
    }
}

/// Where the elements of an axis with margins come from; nothing is outside.
fn margins(op: &Pad, axis: usize, n: i64, to: i64) -> Vec<i64> {
    let (first, last) = (-op.before[axis].min(0), n + op.after[axis].min(0));
    let inside = (last - first).max(1);
    let one = |i: i64| {
        let i = i - op.before[axis].max(0);
        let i = match op.mode {
            PadMode::Wrap => i.rem_euclid(inside),
            PadMode::Reflect if inside > 1 => {
                let i = i.rem_euclid(2 * (inside - 1));
                if i < inside { i } else { 2 * (inside - 1) - i }
            }
            PadMode::Reflect => 0,
            PadMode::Edge | PadMode::Constant => i.clamp(0, inside - 1),
        };
        first + i
    };
    (0..to).map(one).collect()
}
