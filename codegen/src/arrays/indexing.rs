//! Ops whose places are computed: loads and stores at addresses that depend on data.

use super::value::{Body, Value, View, identity};
use super::{Lowering, dims_of, origin};
use crate::nest::{Affine, Bin, Mem, NestSpec, Node, NodeId, To};
use quantc_ir::diag::Result;
use quantc_ir::entity::ValueId;
use quantc_ir::graph::Graph;
use quantc_ir::ops::Combine;
use quantc_ir::ty::TensorTy;

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
        let rank = dims.len();
        let mut body = Body::new(rank);
        let index = body.absorb(&indices, &identity(rank));
        let index = body.place(index, x.dims[axis]);
        let mut base = x.at.clone();
        base.strides[axis] = 0;
        let at = body.address(base, &[(index, x.at.strides[axis])]);
        self.loaded(&x, body, at, dims)
    }

    /// The place that a list of indices names, from the axis `first` of an array on: the lists lie along the last axis of
    /// `indices`, and `map` says where its other axes are.
    fn listed(
        &mut self,
        body: &mut Body,
        x: &View,
        indices: &Value,
        map: &[Affine],
        first: usize,
    ) -> Vec<(NodeId, i64)> {
        let depth = indices.dims().last().copied().unwrap_or(0) as usize;
        let one = |k: usize| {
            let mut at = map.to_vec();
            at.push(Affine::constant(k as i64, body.rank));
            let index = body.absorb(indices, &at);
            (body.place(index, x.dims[first + k]), x.at.strides[first + k])
        };
        (0..depth).map(one).collect()
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
        let (rank, outer) = (dims.len(), indices.dims().len() - 1);
        let depth = indices.dims()[outer] as usize;
        let mut body = Body::new(rank);
        let map: Vec<Affine> = (0..outer).map(|a| Affine::axis(a, rank)).collect();
        let parts = self.listed(&mut body, &x, &indices, &map, batch);
        let mut base = Affine::constant(x.at.base, rank);
        for (a, &stride) in x.at.strides.iter().enumerate() {
            if a < batch {
                base = base.plus(&Affine::axis(a, rank).scaled(stride, 0));
            } else if a >= batch + depth {
                base = base.plus(&Affine::axis(outer + a - batch - depth, rank).scaled(stride, 0));
            }
        }
        let at = body.address(base, &parts);
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
        let rank = dims.len();
        let mut body = Body::new(rank);
        let index = body.absorb(&indices, &identity(rank));
        let index = body.place(index, view.dims[axis]);
        let mut base = view.at.clone();
        base.strides[axis] = 0;
        let at = body.address(base, &[(index, view.at.strides[axis])]);
        let update = body.absorb(&updates, &identity(rank));
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
        let (rank, outer) = (dims.len(), indices.dims().len() - 1);
        let depth = indices.dims()[outer] as usize;
        let mut body = Body::new(rank);
        let map: Vec<Affine> = (0..outer).map(|a| Affine::axis(a, rank)).collect();
        let parts = self.listed(&mut body, &view, &indices, &map, 0);
        let mut base = origin(rank);
        for (a, &stride) in view.at.strides.iter().enumerate().skip(depth) {
            base = base.plus(&Affine::axis(outer + a - depth, rank).scaled(stride, 0));
        }
        let at = body.address(base, &parts);
        let update = body.absorb(&updates, &identity(rank));
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
