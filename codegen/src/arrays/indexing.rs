//! Ops whose places are computed: loads and stores at addresses that depend on data.

use super::value::{Body, Value, View, identity};
use super::{Lowering, dims_of};
use crate::nest::{Affine, Bin, Mem, NestSpec, Node, NodeId, To};
use quantc_ir::diag::Result;
use quantc_ir::entity::ValueId;
use quantc_ir::graph::Graph;
use quantc_ir::ops::Combine;
use quantc_ir::ty::TensorTy;

/// The place of `x` whose index along `axis` is an element of `indices`, and elsewhere that of the element.
fn along(body: &mut Body, x: &View, indices: &Value, axis: usize) -> NodeId {
    let index = body.absorb(indices, &identity(body.rank));
    let index = body.place(index, x.dims[axis]);
    let mut base = x.at.clone();
    base.strides[axis] = 0;
    body.address(base, &[(index, x.at.strides[axis])])
}

/// The place of `x` that a list of indices names, from the axis `batch` on: the lists lie along the last axis of `indices`,
/// whose first axes are the first of the body, as the axes of `x` before `batch` are; those after the list are its last.
fn listed(body: &mut Body, x: &View, indices: &Value, batch: usize) -> NodeId {
    let (rank, outer) = (body.rank, indices.dims().len() - 1);
    let depth = indices.dims()[outer] as usize;
    let one = |k: usize| {
        let mut at: Vec<Affine> = (0..outer).map(|a| Affine::axis(a, rank)).collect();
        at.push(Affine::constant(k as i64, rank));
        let index = body.absorb(indices, &at);
        (body.place(index, x.dims[batch + k]), x.at.strides[batch + k])
    };
    let parts: Vec<(NodeId, i64)> = (0..depth).map(one).collect();
    let mut base = Affine::constant(x.at.base, rank);
    for (a, &stride) in x.at.strides.iter().enumerate() {
        if a < batch {
            base = base.plus(&Affine::axis(a, rank).scaled(stride, 0));
        } else if a >= batch + depth {
            base = base.plus(&Affine::axis(outer + a - batch - depth, rank).scaled(stride, 0));
        }
    }
    body.address(base, &parts)
}

impl Lowering<'_> {
    /// Indices that many elements read are computed once.
    fn indices(&mut self, v: &Value) -> Result<Value> {
        if v.is_cheap() { Ok(v.clone()) } else { self.stored(v).map(Value::View) }
    }

    pub(super) fn gather(
        &mut self,
        g: &Graph,
        x: ValueId,
        indices: ValueId,
        axis: usize,
        out: &TensorTy,
    ) -> Result<Value> {
        let (x, indices) = (self.value(g, x)?, self.value(g, indices)?);
        let (x, indices) = (self.stored(&x)?, self.indices(&indices)?);
        let dims = dims_of(out)?;
        let (rank, more) = (dims.len(), indices.dims().len());
        let mut body = Body::new(rank);
        let map: Vec<Affine> = (0..more).map(|a| Affine::axis(axis + a, rank)).collect();
        let index = body.absorb(&indices, &map);
        let index = body.place(index, x.dims[axis]);
        let mut base = Affine::constant(x.at.base, rank);
        for (a, &stride) in x.at.strides.iter().enumerate().filter(|(a, _)| *a != axis) {
            let to = if a < axis { a } else { a + more - 1 };
            base = base.plus(&Affine::axis(to, rank).scaled(stride, 0));
        }
        let at = body.address(base, &[(index, x.at.strides[axis])]);
        self.loaded(&x, body, at, &dims)
    }

    fn loaded(&mut self, x: &View, mut body: Body, at: NodeId, dims: &[u64]) -> Result<Value> {
        // Of an array without elements nothing is loaded.
        if x.dims.contains(&0) {
            return self.buffer(x.mem, dims).map(Value::View);
        }
        let input = body.input(x.place);
        let root = body.push(Node::LoadAt { input, mem: x.mem, at });
        self.lazy(x.mem, dims, body, root)
    }

    pub(super) fn gather_elements(
        &mut self,
        g: &Graph,
        x: ValueId,
        indices: ValueId,
        axis: usize,
        out: &TensorTy,
    ) -> Result<Value> {
        let (x, indices) = (self.value(g, x)?, self.value(g, indices)?);
        self.gathered_elements(&x, &indices, axis, &dims_of(out)?)
    }

    pub(super) fn gathered_elements(
        &mut self,
        x: &Value,
        indices: &Value,
        axis: usize,
        dims: &[u64],
    ) -> Result<Value> {
        let (x, indices) = (self.stored(x)?, self.indices(indices)?);
        let mut body = Body::new(dims.len());
        let at = along(&mut body, &x, &indices, axis);
        self.loaded(&x, body, at, dims)
    }

    pub(super) fn gather_nd(
        &mut self,
        g: &Graph,
        x: ValueId,
        indices: ValueId,
        batch: usize,
        out: &TensorTy,
    ) -> Result<Value> {
        let (x, indices) = (self.value(g, x)?, self.value(g, indices)?);
        let (x, indices) = (self.stored(&x)?, Value::View(self.stored(&indices)?));
        let dims = dims_of(out)?;
        let mut body = Body::new(dims.len());
        let at = listed(&mut body, &x, &indices, batch);
        self.loaded(&x, body, at, &dims)
    }

    pub(super) fn scatter_elements(
        &mut self,
        g: &Graph,
        args: &[ValueId],
        axis: usize,
        combine: Combine,
        out: &TensorTy,
    ) -> Result<Value> {
        let (x, indices, updates) =
            (self.value(g, args[0])?, self.value(g, args[1])?, self.value(g, args[2])?);
        let (indices, updates) = (self.without_product(&indices)?, self.without_product(&updates)?);
        let view = self.copied(&x)?;
        let dims = updates.dims().to_vec();
        let mut body = Body::new(dims.len());
        let at = along(&mut body, &view, &indices, axis);
        let update = body.absorb(&updates, &identity(dims.len()));
        self.scattered(view, body, at, update, &dims, combine, out)
    }

    pub(super) fn scatter_nd(
        &mut self,
        g: &Graph,
        args: &[ValueId],
        combine: Combine,
        out: &TensorTy,
    ) -> Result<Value> {
        let (x, indices, updates) =
            (self.value(g, args[0])?, self.value(g, args[1])?, self.value(g, args[2])?);
        let (indices, updates) = (Value::View(self.stored(&indices)?), self.without_product(&updates)?);
        let view = self.copied(&x)?;
        let dims = updates.dims().to_vec();
        let mut body = Body::new(dims.len());
        let at = listed(&mut body, &view, &indices, 0);
        let update = body.absorb(&updates, &identity(dims.len()));
        self.scattered(view, body, at, update, &dims, combine, out)
    }

    #[expect(clippy::too_many_arguments, reason = "what is stored, where, and how")]
    fn scattered(
        &mut self,
        view: View,
        mut body: Body,
        at: NodeId,
        update: NodeId,
        dims: &[u64],
        combine: Combine,
        out: &TensorTy,
    ) -> Result<Value> {
        let value = match combine {
            Combine::Replace => update,
            _ if out.elem.scheme().is_some() => return Err(self.refuse("scatter", out)),
            _ => {
                let input = body.input(view.place);
                let before = body.push(Node::LoadAt { input, mem: view.mem, at });
                let f = match combine {
                    Combine::Add => Bin::Add,
                    Combine::Mul => Bin::Mul,
                    Combine::Min => Bin::Min,
                    _ => Bin::Max,
                };
                let bool_sum = view.mem == Mem::Bool;
                let f = match (f, bool_sum) {
                    (Bin::Add, true) => return Err(self.refuse("scatter", out)),
                    (f, _) => f,
                };
                let sum = body.bin(f, before, update);
                body.fit(view.mem, sum)
            }
        };
        if view.dims.contains(&0) {
            return Ok(Value::View(view));
        }
        let spec = NestSpec {
            name: "scatter".into(),
            dims: dims.to_vec(),
            fold: None,
            nodes: vec![],
            value,
            out: view.mem,
            to: To::Computed(at),
            inputs: 0,
        };
        self.nest(body, spec, view.place);
        Ok(Value::View(view))
    }
}
