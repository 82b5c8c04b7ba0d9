//! Ops that make one number of several: folds, and what is made of them.

use super::value::{Body, Value, View, broadcast, strides};
use super::{Lowering, dims_of, mem_of, origin};
use crate::nest::{Affine, Bin, Cmp, Fold, FoldKind, Guard, Mem, NestSpec, Node, NodeId, Num, To, Un};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::entity::ValueId;
use quantc_ir::graph::Graph;
use quantc_ir::ops::{ArgReduce, Cumulate, Pool, PoolKind, Reduce, ReduceKind, Softmax, TopK};
use quantc_ir::ty::TensorTy;

/// A fold to be launched: the expression has the axes of the result and then those of the fold.
pub(super) struct Folding<'a> {
    pub(super) name: &'static str,
    /// Extents of the result.
    pub(super) dims: &'a [u64],
    /// Axes of the result, the outermost in memory first.
    pub(super) layout: &'a [usize],
    /// Extents of the fold.
    pub(super) over: &'a [u64],
    pub(super) kind: FoldKind,
    pub(super) mem: Mem,
}

impl Lowering<'_> {
    /// Launches a fold of `of`, whose result `finish` makes the stored number of.
    pub(super) fn folded(
        &mut self,
        folding: &Folding<'_>,
        mut body: Body,
        of: NodeId,
        finish: impl FnOnce(&mut Body, NodeId) -> NodeId,
    ) -> Result<View> {
        let view = self.buffer_in(folding.mem, folding.dims, folding.layout)?;
        let num = match folding.kind {
            FoldKind::Arg { .. } => Num::I64,
            _ => body.num(of),
        };
        let sum = body.push(Node::Folded(num));
        let value = finish(&mut body, sum);
        let value = body.fit(folding.mem, value);
        let mut at = view.at.clone();
        at.strides.extend(folding.over.iter().map(|_| 0));
        let spec = NestSpec {
            name: folding.name.into(),
            dims: folding.dims.to_vec(),
            fold: Some(Fold { dims: folding.over.to_vec(), kind: folding.kind, of, each: None }),
            nodes: vec![],
            value,
            out: folding.mem,
            to: To::At(at),
            inputs: 0,
        };
        self.nest(body, spec, view.place);
        Ok(view)
    }

    /// For each axis of `dims`, where a fold over `axes` walks it; and the extents of the fold.
    fn walked(dims: &[u64], axes: &[usize]) -> (Vec<Affine>, Vec<u64>) {
        let rank = dims.len() + axes.len();
        let one = |a: usize| match axes.iter().position(|&r| r == a) {
            Some(j) => Affine::axis(dims.len() + j, rank),
            None => Affine::axis(a, rank),
        };
        ((0..dims.len()).map(one).collect(), axes.iter().map(|&a| dims[a]).collect())
    }

    /// A reduction of a value whose axes keep an extent of one.
    #[expect(clippy::too_many_arguments, reason = "what is folded, how, and what becomes of it")]
    fn reduction(
        &mut self,
        name: &'static str,
        x: &Value,
        axes: &[usize],
        kind: FoldKind,
        mem: Mem,
        each: impl FnOnce(&mut Body, NodeId) -> NodeId,
        finish: impl FnOnce(&mut Body, NodeId) -> NodeId,
    ) -> Result<View> {
        let x = self.without_product(x)?;
        let mut dims = x.dims().to_vec();
        let (map, over) = Self::walked(&dims, axes);
        axes.iter().for_each(|&a| dims[a] = 1);
        let mut body = Body::new(dims.len() + axes.len());
        let node = body.absorb(&x, &map);
        let of = each(&mut body, node);
        let layout = x.layout();
        self.folded(&Folding { name, dims: &dims, layout: &layout, over: &over, kind, mem }, body, of, finish)
    }

    pub(super) fn reduce(&mut self, g: &Graph, x: ValueId, op: &Reduce, out: &TensorTy) -> Result<Value> {
        use ReduceKind as K;
        let ty = g.ty(x);
        if ty.elem.scheme().is_some() {
            return Err(self.refuse("reduce", ty));
        }
        let x = self.value(g, x)?;
        let axes: Vec<usize> = op.axes.iter().map(|&a| usize::from(a)).collect();
        let (mem, num) = (mem_of(out.elem)?, x.mem().num());
        let count: u64 = axes.iter().map(|&a| x.dims()[a]).product();
        let whole =
            !num.is_float() && matches!(op.kind, K::Sum | K::Max | K::Min | K::Prod | K::L1 | K::SumSquare);
        if whole
            && count == 0
            && matches!(op.kind, K::Max | K::Min)
            && mem.num() == Num::I32
            && mem != Mem::I32
        {
            return Err(Diag::target("the largest of no numbers has no kernel for this type"));
        }
        // Sums of floats are taken in f64; of integers, in what holds them.
        let wide = match (whole, num, op.kind) {
            (true, Num::Bool, _) | (true, _, K::Max | K::Min) => num,
            (true, Num::I32, _) => Num::I32,
            (true, num, _) => num,
            (false, num, K::Max | K::Min) if num.is_float() => num,
            _ => Num::F64,
        };
        let x = if op.kind == K::LogSumExp { Value::View(self.stored(&x)?) } else { x };
        let kind = match op.kind {
            K::Max | K::LogSumExp => FoldKind::Max,
            K::Min => FoldKind::Min,
            K::Prod => FoldKind::Prod,
            _ => FoldKind::Sum,
        };
        let each = |b: &mut Body, x: NodeId| {
            let x = b.convert(wide, x);
            match op.kind {
                K::L1 => b.un(Un::Abs, x),
                K::L2 | K::SumSquare => {
                    let square = b.bin(Bin::Mul, x, x);
                    if whole { b.fit(mem, square) } else { square }
                }
                _ => x,
            }
        };
        if op.kind == K::LogSumExp {
            let top = self.reduction("reduce_max", &x, &axes, kind, Mem::F64, each, |_, y| y)?;
            return self.log_sum_exp(&x, &axes, top, mem).map(Value::View);
        }
        let finish = |b: &mut Body, y: NodeId| {
            let y = match op.kind {
                K::Mean => {
                    let n = b.real(wide, count.max(1) as f64);
                    b.bin(Bin::Div, y, n)
                }
                K::L2 => b.un(Un::Sqrt, y),
                K::LogSum => b.un(Un::Log, y),
                _ => y,
            };
            truncated(b, y, mem)
        };
        self.reduction("reduce", &x, &axes, kind, mem, each, finish).map(Value::View)
    }

    fn log_sum_exp(&mut self, x: &Value, axes: &[usize], top: View, mem: Mem) -> Result<View> {
        let mut dims = x.dims().to_vec();
        let (map, over) = Self::walked(&dims, axes);
        axes.iter().for_each(|&a| dims[a] = 1);
        let rank = dims.len() + axes.len();
        let mut body = Body::new(rank);
        let v = body.absorb(x, &map);
        let v = body.convert(Num::F64, v);
        let top = Value::View(top);
        let t = body.absorb(&top, &broadcast(&dims, x.dims(), rank));
        let same = body.cmp(Cmp::Equal, v, t);
        let one = body.real(Num::F64, 1.0);
        let less = body.bin(Bin::Sub, v, t);
        let power = body.un(Un::Exp, less);
        let of = body.select(same, one, power);
        let layout: Vec<usize> = (0..dims.len()).collect();
        let folding = Folding {
            name: "log_sum_exp",
            dims: &dims,
            layout: &layout,
            over: &over,
            kind: FoldKind::Sum,
            mem,
        };
        self.folded(&folding, body, of, |b, sum| {
            let zero = b.real(Num::F64, 0.0);
            let none = b.cmp(Cmp::Equal, sum, zero);
            let log = b.un(Un::Log, sum);
            let all = b.bin(Bin::Add, t, log);
            let y = b.select(none, t, all);
            truncated(b, y, mem)
        })
    }

    pub(super) fn arg_reduce(
        &mut self,
        g: &Graph,
        x: ValueId,
        op: &ArgReduce,
        out: &TensorTy,
    ) -> Result<Value> {
        let ty = g.ty(x);
        let x = self.value(g, x)?;
        if x.mem().num() == Num::U64 || ty.elem.scheme().is_some() {
            return Err(self.refuse("arg_reduce", ty));
        }
        let kind = FoldKind::Arg { last: op.last };
        let each = |b: &mut Body, x: NodeId| {
            let key = key(b, x);
            if op.least { b.un(Un::Not, key) } else { key }
        };
        let axes = [usize::from(op.axis)];
        let view = self.reduction("arg_reduce", &x, &axes, kind, mem_of(out.elem)?, each, |_, i| i)?;
        Ok(Value::View(view))
    }

    pub(super) fn softmax(&mut self, g: &Graph, x: ValueId, op: &Softmax, out: &TensorTy) -> Result<Value> {
        let x = self.value(g, x)?;
        let x = Value::View(self.stored(&x)?);
        let (mem, axes, num) = (mem_of(out.elem)?, [usize::from(op.axis)], x.mem().num());
        let top =
            self.reduction("softmax_max", &x, &axes, FoldKind::Max, num_mem(num), |_, x| x, |_, y| y)?;
        let dims = x.dims().to_vec();
        let mut one = dims.clone();
        one[axes[0]] = 1;
        let rank = dims.len() + 1;
        let (map, over) = Self::walked(&dims, &axes);
        let mut body = Body::new(rank);
        let v = body.absorb(&x, &map);
        let top = Value::View(top);
        let t = body.absorb(&top, &broadcast(&one, &dims, rank));
        let less = body.bin(Bin::Sub, v, t);
        let power = body.un(Un::Exp, less);
        let of = body.convert(Num::F64, power);
        let layout = x.layout();
        let folding = Folding {
            name: "softmax_sum",
            dims: &one,
            layout: &layout,
            over: &over,
            kind: FoldKind::Sum,
            mem: num_mem(num),
        };
        let sum = self.folded(&folding, body, of, |b, sum| {
            let y = if op.log { b.un(Un::Log, sum) } else { sum };
            b.convert(num, y)
        })?;
        self.elementwise(&dims, mem, &[x, top, Value::View(sum)], |b, x| {
            let less = b.bin(Bin::Sub, x[0], x[1]);
            let y = if op.log {
                b.bin(Bin::Sub, less, x[2])
            } else {
                let power = b.un(Un::Exp, less);
                b.bin(Bin::Div, power, x[2])
            };
            b.fit(mem, y)
        })
    }

    pub(super) fn cumulate(&mut self, g: &Graph, x: ValueId, op: &Cumulate, out: &TensorTy) -> Result<Value> {
        let x = self.value(g, x)?;
        let x = self.without_product(&x)?;
        let (dims, mem, axis) = (dims_of(out)?, mem_of(out.elem)?, usize::from(op.axis));
        let view = self.buffer(mem, &dims)?;
        let n = dims[axis];
        let mut outer = dims.clone();
        outer[axis] = 1;
        let rank = dims.len() + 1;
        let (mut map, over) = Self::walked(&dims, &[axis]);
        if op.reverse {
            map[axis] = map[axis].scaled(-1, n as i64 - 1);
        }
        let mut body = Body::new(rank);
        let v = body.absorb(&x, &map);
        let num = body.num(v);
        let wide = if num == Num::F32 { Num::F64 } else { num };
        let of = body.convert(wide, v);
        let sum = body.push(Node::Folded(wide));
        let value = body.convert(num, sum);
        let value = body.fit(mem, value);
        let spec = NestSpec {
            name: "cumulate".into(),
            dims: outer,
            fold: Some(Fold {
                dims: over,
                kind: if op.product { FoldKind::Prod } else { FoldKind::Sum },
                of,
                each: Some(op.exclusive),
            }),
            nodes: vec![],
            value,
            out: mem,
            to: To::At(view.at.through(&map, rank)),
            inputs: 0,
        };
        self.nest(body, spec, view.place);
        Ok(Value::View(view))
    }

    /// Ranks are counted: how many come before each element. Then each place of the result looks for its rank.
    pub(super) fn topk(&mut self, g: &Graph, x: ValueId, op: &TopK, out: &TensorTy) -> Result<Value> {
        const LONGEST: u64 = 1 << 14;
        let ty = g.ty(x).clone();
        let x = self.value(g, x)?;
        if x.mem().num() == Num::U64 || ty.elem.scheme().is_some() {
            return Err(self.refuse("topk", &ty));
        }
        let x = Value::View(self.stored(&x)?);
        let (dims, axis, to) = (x.dims().to_vec(), usize::from(op.axis), dims_of(out)?);
        let n = dims[axis];
        if n > LONGEST {
            return Err(Diag::target(format!(
                "`topk` has a kernel for axes of up to {LONGEST} elements, not {n}"
            )));
        }
        let rank = dims.len() + 1;
        let mut body = Body::new(rank);
        let mine = body.absorb(&x, &(0..dims.len()).map(|a| Affine::axis(a, rank)).collect::<Vec<_>>());
        let (map, over) = Self::walked(&dims, &[axis]);
        let other = body.absorb(&x, &map);
        let (mine, other) = (key(&mut body, mine), key(&mut body, other));
        let better =
            if op.least { body.cmp(Cmp::Less, other, mine) } else { body.cmp(Cmp::Less, mine, other) };
        let equal = body.cmp(Cmp::Equal, mine, other);
        let (at, at_other) = (body.pos(Affine::axis(axis, rank)), body.pos(Affine::axis(rank - 1, rank)));
        let earlier = body.cmp(Cmp::Less, at_other, at);
        let tie = body.bin(Bin::And, equal, earlier);
        let before = body.bin(Bin::Or, better, tie);
        let of = body.convert(Num::I32, before);
        let layout: Vec<usize> = (0..dims.len()).collect();
        let folding = Folding {
            name: "ranks",
            dims: &dims,
            layout: &layout,
            over: &over,
            kind: FoldKind::Sum,
            mem: Mem::I32,
        };
        let ranks = Value::View(self.folded(&folding, body, of, |_, y| y)?);
        // The one element of each rank.
        let mut body = Body::new(rank);
        let found = body.absorb(&ranks, &map);
        let wanted = body.pos(Affine::axis(axis, rank));
        let found = body.convert(Num::I64, found);
        let same = body.cmp(Cmp::Equal, found, wanted);
        let (at, none) = (body.pos(Affine::axis(rank - 1, rank)), body.int(Num::I64, 0));
        let of = body.select(same, at, none);
        let folding = Folding {
            name: "by_rank",
            dims: &to,
            layout: &layout,
            over: &over,
            kind: FoldKind::Sum,
            mem: Mem::I64,
        };
        let places = self.folded(&folding, body, of, |_, y| y)?;
        if op.indices {
            return Ok(Value::View(places));
        }
        self.gathered_elements(&x, &Value::View(places), axis, &to)
    }

    pub(super) fn pool(&mut self, g: &Graph, x: ValueId, op: &Pool, out: &TensorTy) -> Result<Value> {
        let ty = g.ty(x).clone();
        let x = self.value(g, x)?;
        if ty.elem.scheme().is_some() || x.mem().num() == Num::U64 {
            return Err(self.refuse("pool", &ty));
        }
        let x = Value::View(self.stored(&x)?);
        let (dims, mem) = (dims_of(out)?, mem_of(out.elem)?);
        let space = op.kernel.len();
        let over: Vec<u64> = op.kernel.iter().map(|&k| k.into()).collect();
        let rank = dims.len() + space;
        let of = |list: &[u32], a: usize, default: i64| list.get(a).map_or(default, |&n| n.into());
        let mut map: Vec<Affine> = (0..2).map(|a| Affine::axis(a, rank)).collect();
        let (mut guards, mut counted) = (vec![], vec![]);
        for a in 0..space {
            let place = Affine::axis(2 + a, rank).scaled(of(&op.strides, a, 1), 0);
            let seen = Affine::axis(dims.len() + a, rank).scaled(of(&op.dilations, a, 1), 0);
            let with_margins = place.plus(&seen);
            let (before, after) = (of(&op.before, a, 0), of(&op.after, a, 0));
            let at = with_margins.scaled(1, -before);
            let n = x.dims()[2 + a] as i64;
            let last = (dims[2 + a] as i64 - 1) * of(&op.strides, a, 1)
                + (i64::from(op.kernel[a]) - 1) * of(&op.dilations, a, 1);
            if before > 0 || last - before >= n {
                guards.push(Guard { at: at.clone(), below: n });
            }
            if last >= n + before + after {
                counted.push(Guard { at: with_margins, below: n + before + after });
            }
            map.push(at);
        }
        let layout = x.layout();
        let mut body = Body::new(rank);
        let v = body.absorb_within(&x, &map, &guards);
        let num = body.num(v);
        let inside = (!guards.is_empty()).then(|| body.push(Node::Inside(guards.clone())));
        let folding =
            |name, kind, mem| Folding { name, dims: &dims, layout: &layout, over: &over, kind, mem };
        match op.kind {
            PoolKind::Max if matches!(mem, Mem::Bool) => Err(self.refuse("pool", &ty)),
            PoolKind::Max => {
                let least = match mem {
                    Mem::I8 => body.int(num, i8::MIN.into()),
                    Mem::I16 => body.int(num, i16::MIN.into()),
                    Mem::U8 | Mem::U16 | Mem::U32 => body.int(num, 0),
                    Mem::I32 => body.int(num, i32::MIN.into()),
                    Mem::I64 => body.int(num, i64::MIN),
                    _ => body.real(num, f64::NEG_INFINITY),
                };
                let of = inside.map_or(v, |inside| body.select(inside, v, least));
                Ok(Value::View(self.folded(&folding("pool_max", FoldKind::Max, mem), body, of, |_, y| y)?))
            }
            PoolKind::ArgMax => self.pool_arg_max(&x, &map, &guards, &dims, &over),
            PoolKind::Mean | PoolKind::Norm => {
                let (mean, p) = (op.kind == PoolKind::Mean, op.p.0);
                let wide = body.convert(Num::F64, v);
                let p = body.real(Num::F64, p);
                let term = if mean {
                    wide
                } else {
                    let size = body.un(Un::Abs, wide);
                    body.bin(Bin::Pow, size, p)
                };
                let zero = body.real(Num::F64, 0.0);
                let term = inside.map_or(term, |inside| body.select(inside, term, zero));
                let all: u64 = over.iter().product();
                let limits = if op.count_margins { counted } else { guards };
                if mean && !limits.is_empty() {
                    return self.pool_mean(body, term, limits, &folding("pool_sum", FoldKind::Sum, mem));
                }
                let view = self.folded(&folding("pool_sum", FoldKind::Sum, mem), body, term, |b, sum| {
                    let y = if mean {
                        let n = b.real(Num::F64, all as f64);
                        b.bin(Bin::Div, sum, n)
                    } else {
                        let one = b.real(Num::F64, 1.0);
                        let root = b.bin(Bin::Div, one, p);
                        b.bin(Bin::Pow, sum, root)
                    };
                    b.convert(mem.num(), y)
                })?;
                Ok(Value::View(view))
            }
        }
    }

    /// Means over windows that are cut at the edges: the number of elements is a product of one number for each axis.
    fn pool_mean(
        &mut self,
        mut body: Body,
        term: NodeId,
        limits: Vec<Guard>,
        folding: &Folding<'_>,
    ) -> Result<Value> {
        let (rank, outer) = (body.rank, folding.dims.len());
        let mut count = body.real(Num::F64, 1.0);
        for (a, &k) in folding.over.iter().enumerate() {
            let guard = limits.iter().find(|g| g.at.strides[outer + a] != 0);
            let Some(guard) = guard else {
                let k = body.real(Num::F64, k as f64);
                count = body.bin(Bin::Mul, count, k);
                continue;
            };
            // How many of `start + i * step`, `i < k`, lie in `0..below`.
            let step = guard.at.strides[outer + a].max(1);
            let start = Affine {
                base: guard.at.base,
                strides: guard
                    .at
                    .strides
                    .iter()
                    .enumerate()
                    .map(|(i, &s)| if i < outer { s } else { 0 })
                    .collect(),
            };
            let start = body.pos(start);
            let (zero, one, step) = (body.int(Num::I64, 0), body.int(Num::I64, 1), body.int(Num::I64, step));
            let k = body.int(Num::I64, k as i64);
            let up = |b: &mut Body, distance: NodeId| {
                // The least `i` with `i * step >= distance`.
                let distance = b.bin(Bin::Max, distance, zero);
                let almost = b.bin(Bin::Sub, step, one);
                let sum = b.bin(Bin::Add, distance, almost);
                let i = b.bin(Bin::Div, sum, step);
                b.bin(Bin::Min, i, k)
            };
            let to_first = body.bin(Bin::Sub, zero, start);
            let first = up(&mut body, to_first);
            let below = body.int(Num::I64, guard.below);
            let to_end = body.bin(Bin::Sub, below, start);
            let end = up(&mut body, to_end);
            let n = body.bin(Bin::Sub, end, first);
            let n = body.bin(Bin::Max, n, zero);
            let n = body.convert(Num::F64, n);
            count = body.bin(Bin::Mul, count, n);
        }
        debug_assert_eq!(body.rank, rank);
        let view = self.folded(folding, body, term, |b, sum| {
            let one = b.real(Num::F64, 1.0);
            let count = b.bin(Bin::Max, one, count);
            let y = b.bin(Bin::Div, sum, count);
            b.convert(folding.mem.num(), y)
        })?;
        Ok(Value::View(view))
    }

    /// The place of the first of the largest elements: windows are copied out, so that the fold has one axis.
    fn pool_arg_max(
        &mut self,
        x: &Value,
        map: &[Affine],
        guards: &[Guard],
        dims: &[u64],
        over: &[u64],
    ) -> Result<Value> {
        let rank = dims.len() + over.len();
        let mut all = dims.to_vec();
        all.extend(over);
        // Keys order all numbers with NaN last; what is outside comes before everything.
        let mut body = Body::new(rank);
        let v = body.absorb_within(x, map, guards);
        let key = key(&mut body, v);
        let key = body.convert(Num::I64, key);
        let root = if guards.is_empty() {
            key
        } else {
            let (inside, least) = (body.push(Node::Inside(guards.to_vec())), body.int(Num::I64, i64::MIN));
            body.select(inside, key, least)
        };
        let windows = self.buffer(Mem::I64, &all)?;
        self.map_to(body, root, &windows);
        let count: u64 = over.iter().product();
        let mut flat = dims.to_vec();
        flat.push(count);
        let windows = Value::View(View::dense(windows.place, Mem::I64, &flat));
        let last = [dims.len()];
        let kind = FoldKind::Arg { last: false };
        let best = self.reduction("pool_arg_max", &windows, &last, kind, Mem::I64, |_, x| x, |_, i| i)?;
        // From the place in the window to that in the array.
        let best = Value::View(View::dense(best.place, Mem::I64, dims));
        let steps = strides(x.dims());
        let (to, over) = (dims.to_vec(), over.to_vec());
        let rank = to.len();
        self.elementwise(&to, Mem::I64, &[best], |b, x| {
            let mut rest = x[0];
            let mut parts = vec![];
            for (a, &k) in over.iter().enumerate().rev() {
                let n = b.int(Num::I64, k as i64);
                let i = b.bin(Bin::Rem, rest, n);
                rest = b.bin(Bin::Div, rest, n);
                let per = map[2 + a].strides[rank + a];
                parts.push((i, per * steps[2 + a]));
            }
            let mut base = origin(rank);
            for (a, at) in map.iter().enumerate() {
                let own = Affine { base: at.base, strides: at.strides[..rank].to_vec() };
                base = base.plus(&own.scaled(steps[a], 0));
            }
            b.address(base, &parts)
        })
    }

    /// A norm over the last axis.
    pub(super) fn norm(
        &mut self,
        g: &Graph,
        args: &[ValueId],
        eps: f64,
        centred: bool,
        out: &TensorTy,
    ) -> Result<Value> {
        let x = self.value(g, args[0])?;
        let x = Value::View(self.stored(&x)?);
        let (dims, mem) = (dims_of(out)?, mem_of(out.elem)?);
        let last = dims.len() - 1;
        let n = dims[last].max(1) as f64;
        let mean = if centred {
            let each = |b: &mut Body, x: NodeId| b.convert(Num::F64, x);
            let finish = move |b: &mut Body, y: NodeId| {
                let n = b.real(Num::F64, n);
                b.bin(Bin::Div, y, n)
            };
            Some(Value::View(self.reduction(
                "norm_mean",
                &x,
                &[last],
                FoldKind::Sum,
                Mem::F64,
                each,
                finish,
            )?))
        } else {
            None
        };
        let rank = dims.len() + 1;
        let mut one = dims.clone();
        one[last] = 1;
        let (map, over) = Self::walked(&dims, &[last]);
        let mut body = Body::new(rank);
        let v = body.absorb(&x, &map);
        let v = body.convert(Num::F64, v);
        let v = match &mean {
            Some(mean) => {
                let m = body.absorb(mean, &broadcast(&one, &dims, rank));
                body.bin(Bin::Sub, v, m)
            }
            None => v,
        };
        let of = body.bin(Bin::Mul, v, v);
        let layout = x.layout();
        let folding = Folding {
            name: "norm_scale",
            dims: &one,
            layout: &layout,
            over: &over,
            kind: FoldKind::Sum,
            mem: Mem::F64,
        };
        let scale = self.folded(&folding, body, of, |b, sum| {
            let (n, eps, one) = (b.real(Num::F64, n), b.real(Num::F64, eps), b.real(Num::F64, 1.0));
            let var = b.bin(Bin::Div, sum, n);
            let var = b.bin(Bin::Add, var, eps);
            let root = b.un(Un::Sqrt, var);
            b.bin(Bin::Div, one, root)
        })?;
        let (gain, bias) = (self.optional(g, args, 1)?, self.optional(g, args, 2)?);
        let mut operands = vec![x, Value::View(scale)];
        let at = |list: &mut Vec<Value>, v: Option<Value>| {
            v.map(|v| {
                list.push(v);
                list.len() - 1
            })
        };
        let (mean, gain, bias) = (at(&mut operands, mean), at(&mut operands, gain), at(&mut operands, bias));
        self.elementwise(&dims, mem, &operands, |b, x| {
            let mut y = b.convert(Num::F64, x[0]);
            if let Some(i) = mean {
                y = b.bin(Bin::Sub, y, x[i]);
            }
            y = b.bin(Bin::Mul, y, x[1]);
            if let Some(i) = gain {
                let gain = b.convert(Num::F64, x[i]);
                y = b.bin(Bin::Mul, y, gain);
            }
            if let Some(i) = bias {
                let bias = b.convert(Num::F64, x[i]);
                y = b.bin(Bin::Add, y, bias);
            }
            let y = b.convert(mem.num(), y);
            b.fit(mem, y)
        })
    }
}

/// An integer that is ordered as the numbers are.
pub(super) fn key(b: &mut Body, x: NodeId) -> NodeId {
    match b.num(x) {
        Num::Bool => b.convert(Num::I32, x),
        num if num.is_float() => b.un(Un::Key, x),
        _ => x,
    }
}

/// Memory that holds what is computed with.
pub(super) fn num_mem(num: Num) -> Mem {
    match num {
        Num::Bool => Mem::Bool,
        Num::I32 => Mem::I32,
        Num::I64 => Mem::I64,
        Num::U64 => Mem::U64,
        Num::F32 => Mem::F32,
        Num::F64 => Mem::F64,
    }
}

/// A number as one of another type, cut towards zero where that is an integer's, whose range it is brought into.
fn truncated(b: &mut Body, y: NodeId, mem: Mem) -> NodeId {
    let limits = match mem {
        Mem::I8 => Some((i8::MIN.into(), i8::MAX.into())),
        Mem::I16 => Some((i16::MIN.into(), i16::MAX.into())),
        Mem::U8 => Some((0, i64::from(u8::MAX))),
        Mem::U16 => Some((0, i64::from(u16::MAX))),
        Mem::U32 => Some((0, i64::from(u32::MAX))),
        _ => None,
    };
    let float = b.num(y).is_float();
    if let (true, Some((low, high))) = (float, limits) {
        let wide = b.convert(Num::I64, y);
        let (low, high) = (b.int(Num::I64, low), b.int(Num::I64, high));
        let wide = b.bin(Bin::Max, wide, low);
        let wide = b.bin(Bin::Min, wide, high);
        return b.convert(mem.num(), wide);
    }
    b.convert(mem.num(), y)
}
