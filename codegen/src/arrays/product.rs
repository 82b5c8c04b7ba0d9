//! Products: convolutions, matrix products and sums of products in general.
//!
//! f32 products go to the kernel of [`crate::conv`], with weights packed when the engine is made, or by a nest when they
//! are computed. Products of integers that are bytes less a zero point, with weights that are signed bytes, go there too:
//! the zero point is taken off the sums. So are products of what `dequantize` makes of such codes, whose sums are then
//! scaled. Weights that `dequantize` makes of codes in blocks keep their codes ([`super::coded`]). Everything else is a
//! fold.

use super::coded::Coded;
use super::value::{Body, Lazy, Value, View, broadcast};
use super::{Lowering, Pending, Place, Product, dims_of, mem_of, origin};
use crate::conv::{Axis, ConvSpec, Factors, tile};
use crate::lower::BlobSource;
use crate::nest::{Affine, Bin, FoldKind, Guard, Mem, Node, NodeId, Num, Un};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::entity::ValueId;
use quantc_ir::eval::{Tensor, eval_pure};
use quantc_ir::formats;
use quantc_ir::graph::Graph;
use quantc_ir::ops::{BinaryKind, Conv, Op, Step as EpilogueStep};
use quantc_ir::scheme::Group;
use quantc_ir::ty::{ElemTy, Float, Int, TensorTy};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Bytes that are multiplied as such: `x - zero`, and what the sums are multiplied with.
struct Bytes {
    x: ValueId,
    /// Whether `x` has signed bytes.
    signed: bool,
    zero: i64,
    scale: Option<f32>,
}

/// Weights that are known: numbers, and of bytes the scale of each output or of all.
struct Weights {
    numbers: Vec<f64>,
    scale: Option<Vec<f32>>,
}

/// An array with margins around it, where convolutions read.
#[derive(Clone)]
pub(super) struct Frame {
    /// Before and after, for each axis.
    margins: Vec<(u64, u64)>,
    /// What they hold.
    fill: i64,
    /// Where the midst lies.
    at: Affine,
    /// Its extents.
    dims: Vec<u64>,
}

/// What becomes of the sums of a product of bytes: `(sum + shift) * scale`, by output.
#[derive(Clone)]
pub(super) struct Scaled {
    pub(super) shift: Vec<i64>,
    pub(super) scale: Vec<f32>,
    pub(super) axis: usize,
}

/// How sums become numbers.
enum Finish {
    /// They are the numbers.
    Plain,
    /// With an integer added for each output.
    Shifted(Vec<i64>),
    /// And then scaled.
    Scaled(Vec<i64>, Vec<f32>),
}

/// The windows of a product, and what is known of its operands.
struct Windows {
    strides: Vec<i64>,
    dilations: Vec<i64>,
    before: Vec<i64>,
    kernel: Vec<u64>,
}

impl Lowering<'_> {
    /// A value that depends on constants alone, and is worth having when the engine is made.
    pub(super) fn known(&self, g: &Graph, v: ValueId) -> Result<Option<Tensor>> {
        if let Some(tensor) = self.tensor(g, v)? {
            return Ok(Some(tensor));
        }
        let Some((_, node)) = g.def(v) else { return Ok(None) };
        let moves = matches!(
            node.op,
            Op::Dequantize(_) | Op::Transpose(_) | Op::Reshape(_) | Op::Cast(_) | Op::Slice(_)
        );
        if !moves {
            return Ok(None);
        }
        let (mut one, mut tensors, mut args) = (Graph::new(), vec![], vec![]);
        for (i, &arg) in node.args.iter().enumerate() {
            if g.is_none(arg) {
                args.push(one.none());
                continue;
            }
            let Some(tensor) = self.known(g, arg)? else { return Ok(None) };
            args.push(one.add_param(&format!("p{i}"), tensor.ty.clone()));
            tensors.push(tensor);
        }
        let y = one.push(node.op.clone(), args, g.ty(v).clone(), None);
        one.results.push(y);
        let refs: Vec<&Tensor> = tensors.iter().collect();
        Ok(eval_pure(&one, &refs, 1, self.module, self.store)?.into_iter().next())
    }

    /// The bytes that a factor is made of, if it is.
    fn bytes(&self, g: &Graph, v: ValueId) -> Result<Option<Bytes>> {
        let Some((_, node)) = g.def(v) else { return Ok(None) };
        let one = |t: &Tensor| t.ty.shape.elements() == Some(1);
        match &node.op {
            Op::Dequantize(op) if op.to == Float::F32 => {
                let Some(scheme) = g.ty(node.args[0]).elem.scheme() else { return Ok(None) };
                let signed = *scheme.format == formats::INT8;
                let Some(scale) = self.tensor(g, node.args[1])?.filter(one) else { return Ok(None) };
                if g.as_weight(node.args[0]).is_some() || !(signed || *scheme.format == formats::UINT8) {
                    return Ok(None);
                }
                let zero = match node.args.get(2).filter(|&&z| !g.is_none(z)) {
                    Some(&z) => match self.tensor(g, z)?.filter(one) {
                        Some(z) => z.reals()[0] as i64,
                        None => return Ok(None),
                    },
                    None => 0,
                };
                Ok(Some(Bytes { x: node.args[0], signed, zero, scale: Some(scale.f32s()?[0]) }))
            }
            Op::Cast(op) if op.to == ElemTy::I32 => {
                let signed = match g.ty(node.args[0]).elem {
                    ElemTy::Int(Int::I8) => true,
                    ElemTy::Int(Int::U8) => false,
                    ElemTy::Q(s) if ElemTy::bare(s.format) == g.ty(node.args[0]).elem => {
                        if *s.format == formats::INT8 {
                            true
                        } else if *s.format == formats::UINT8 {
                            false
                        } else {
                            return Ok(None);
                        }
                    }
                    _ => return Ok(None),
                };
                Ok(Some(Bytes { x: node.args[0], signed, zero: 0, scale: None }))
            }
            Op::Binary(op) if op.kind == BinaryKind::Sub && g.ty(v).elem == ElemTy::I32 => {
                let Some(inner) = self.bytes(g, node.args[0])? else { return Ok(None) };
                let same = g.ty(node.args[0]).shape == g.ty(v).shape;
                let zero = self.known(g, node.args[1])?.filter(|z| same && one(z));
                let fits =
                    |z: i64| if inner.signed { (-128..128).contains(&z) } else { (0..256).contains(&z) };
                let zero = zero.map(|z| z.ints()[0] as i64 + inner.zero).filter(|&z| fits(z));
                Ok(zero.map(|zero| Bytes { zero, ..inner }))
            }
            _ => Ok(None),
        }
    }

    /// Weights that are known and are signed bytes; `axis` is that of outputs.
    fn byte_weights(&self, g: &Graph, v: ValueId, axis: usize) -> Result<Option<Weights>> {
        let fits = |x: &f64| x.fract() == 0.0 && (-128.0..128.0).contains(x);
        if g.ty(v).elem == ElemTy::I32 {
            let numbers = self.known(g, v)?.map(|t| t.reals());
            return Ok(numbers
                .filter(|n| n.iter().all(fits))
                .map(|numbers| Weights { numbers, scale: None }));
        }
        let Some((_, node)) = g.def(v) else { return Ok(None) };
        if let Op::Transpose(op) = &node.op {
            // Scales follow their axis.
            let Some((_, inner)) = g.def(node.args[0]) else { return Ok(None) };
            if !matches!(inner.op, Op::Dequantize(_)) {
                return Ok(None);
            }
            let rank = g.ty(v).rank();
            let perm: Vec<usize> = if op.perm.is_empty() {
                (0..rank).rev().collect()
            } else {
                op.perm.iter().map(|&p| usize::from(p)).collect()
            };
            let Some(inside) = self.byte_weights(g, node.args[0], perm[axis])? else { return Ok(None) };
            let dims = dims_of(g.ty(node.args[0]))?;
            let steps = super::value::strides(&dims);
            let to: Vec<u64> = perm.iter().map(|&p| dims[p]).collect();
            let steps: Vec<i64> = perm.iter().map(|&p| steps[p]).collect();
            let numbers = each_index(&to).map(|i| {
                let at: i64 = i.iter().zip(&steps).map(|(&i, s)| i as i64 * s).sum();
                inside.numbers[at as usize]
            });
            return Ok(Some(Weights { numbers: numbers.collect(), scale: inside.scale }));
        }
        let Op::Dequantize(op) = &node.op else { return Ok(None) };
        let Some(scheme) = g.ty(node.args[0]).elem.scheme() else { return Ok(None) };
        let by_output = matches!(scheme.group, Group::Axis(a) if usize::from(a) == axis);
        let plain = *scheme.format == formats::INT8 || *scheme.format == formats::UINT8;
        if op.to != Float::F32 || !plain || !(by_output || scheme.group == Group::Tensor) {
            return Ok(None);
        }
        let (Some(codes), Some(scale)) = (self.tensor(g, node.args[0])?, self.tensor(g, node.args[1])?)
        else {
            return Ok(None);
        };
        let mut numbers = codes.reals();
        if let Some(&z) = node.args.get(2).filter(|&&z| !g.is_none(z)) {
            let Some(zeros) = self.tensor(g, z)? else { return Ok(None) };
            let zeros = zeros.reals();
            let dims = dims_of(g.ty(v))?;
            for (i, x) in each_index(&dims).zip(&mut numbers) {
                *x -= if zeros.len() == 1 { zeros[0] } else { zeros[i[axis] as usize] };
            }
        }
        let outs = dims_of(g.ty(v))?[axis] as usize;
        let scale = scale.f32s()?;
        let scale = if scale.len() == 1 { vec![scale[0]; outs] } else { scale.to_vec() };
        Ok(numbers.iter().all(fits).then_some(Weights { numbers, scale: Some(scale) }))
    }

    /// Bytes and byte weights that meet, and what is to become of the sums. `outs` and `each` say how numbers of the
    /// weights belong to outputs.
    fn byte_product(
        &self,
        g: &Graph,
        x: ValueId,
        w: ValueId,
        axis: usize,
    ) -> Result<Option<(Bytes, Vec<f64>, Finish)>> {
        let (Some(bytes), Some(weights)) = (self.bytes(g, x)?, self.byte_weights(g, w, axis)?) else {
            return Ok(None);
        };
        let dims = dims_of(g.ty(w))?;
        let mut sums = vec![0i64; dims[axis] as usize];
        for (i, &n) in each_index(&dims).zip(&weights.numbers) {
            sums[i[axis] as usize] += n as i64;
        }
        // Signed bytes are moved up, so that all are unsigned.
        let zero = bytes.zero + if bytes.signed { 128 } else { 0 };
        let shift: Vec<i64> = sums.iter().map(|s| -zero * s).collect();
        let finish = match (bytes.scale, weights.scale) {
            (None, None) => Finish::Shifted(shift),
            (Some(x), Some(w)) => Finish::Scaled(shift, w.iter().map(|w| w * x).collect()),
            _ => return Ok(None),
        };
        Ok(Some((bytes, weights.numbers, finish)))
    }

    /// Bytes as unsigned ones, with channels last in memory and a multiple of `together` of them; margins hold the zero
    /// point.
    fn unsigned(&mut self, g: &Graph, bytes: &Bytes, pad: &Padding, together: u64) -> Result<View> {
        let x = self.value(g, bytes.x)?;
        let x = self.without_product(&x)?;
        let zero = bytes.zero + if bytes.signed { 128 } else { 0 };
        if let (Value::View(v), false) = (&x, bytes.signed)
            && let Some(view) = self.within_frame(v, pad, together, zero)
        {
            return Ok(view);
        }
        if !bytes.signed && !pad.needed(&x, together) {
            return self.stored(&x);
        }
        let signed = bytes.signed;
        self.padded(
            &x,
            pad,
            together,
            Mem::U8,
            move |b, v| {
                if !signed {
                    return v;
                }
                let up = b.int(Num::I32, 128);
                b.bin(Bin::Add, v, up)
            },
            zero as f64,
        )
    }

    /// A copy with channels side by side, `together` of them at a time, and margins.
    fn padded(
        &mut self,
        x: &Value,
        pad: &Padding,
        together: u64,
        mem: Mem,
        each: impl FnOnce(&mut Body, NodeId) -> NodeId,
        fill: f64,
    ) -> Result<View> {
        let rank = x.dims().len();
        let mut dims = x.dims().to_vec();
        dims[pad.channels] = dims[pad.channels].next_multiple_of(together);
        for (a, (before, after)) in pad.margins.iter().enumerate() {
            dims[a] += before + after;
        }
        let mut layout: Vec<usize> = (0..rank).filter(|&a| a != pad.channels).collect();
        layout.push(pad.channels);
        let view = self.buffer_in(mem, &dims, &layout)?;
        let mut guards = vec![];
        let map: Vec<Affine> = (0..rank)
            .map(|a| {
                let at = Affine::axis(a, rank).scaled(1, -(pad.margins[a].0 as i64));
                if dims[a] != x.dims()[a] {
                    guards.push(Guard { at: at.clone(), below: x.dims()[a] as i64 });
                }
                at
            })
            .collect();
        let mut body = Body::new(rank);
        let v = body.absorb_within(x, &map, &guards);
        let mut root = each(&mut body, v);
        if !guards.is_empty() {
            let (inside, fill) = (body.push(Node::Inside(guards)), body.real(mem.num(), fill));
            root = body.select(inside, root, fill);
        }
        self.map_to(body, root, &view);
        Ok(view)
    }

    /// Outputs of a panel of weights.
    fn panel(&self, factors: Factors, outs: u64, last: u64) -> u64 {
        let lanes = u64::from(self.target.cpu.vector_bits / 32);
        tile(factors, outs, last, lanes, self.target.cpu.vector_bits == 512).vectors * lanes
    }

    /// Weights packed for the kernel when the engine is made. `at(output, step)` is the number of an output at a step of
    /// the window, its channels last.
    fn packed(
        &mut self,
        outs: u64,
        steps: u64,
        channels: u64,
        factors: Factors,
        last: u64,
        at: impl Fn(u64, u64, u64) -> f64,
    ) -> Place {
        let panel = self.panel(factors, outs, last);
        let together = factors.together();
        let blocks = channels.div_ceil(together);
        let mut bytes = vec![];
        for p in 0..outs.div_ceil(panel) {
            for step in 0..steps {
                for block in 0..blocks {
                    for o in p * panel..(p + 1) * panel {
                        for c in block * together..(block + 1) * together {
                            let x = if o < outs && c < channels { at(o, step, c) } else { 0.0 };
                            match factors {
                                Factors::Bytes | Factors::Single => bytes.push(x as i8 as u8),
                                _ => bytes.extend((x as f32).to_le_bytes()),
                            }
                        }
                    }
                }
            }
        }
        let (len, name) = (bytes.len() as u64, format!("{}.weights", self.name));
        self.blob(&name, BlobSource::Made(bytes), len)
    }

    /// The sums of a product as a value that what follows may be taken into. `axis` is that of outputs.
    fn product(
        &mut self,
        what: Product,
        dims: &[u64],
        layout: Vec<usize>,
        axis: usize,
        mem: Mem,
        finish: &Finish,
    ) -> Result<Value> {
        let rank = dims.len();
        self.pending.push(Some(Pending { name: self.name.clone(), what, dims: dims.to_vec(), layout }));
        if let (Finish::Scaled(shift, scale), Mem::F32) = (finish, mem) {
            let scaled = Scaled { shift: shift.clone(), scale: scale.clone(), axis };
            self.scaled.insert(self.pending.len() - 1, scaled);
        }
        let mut body = Body::new(rank);
        let num = match finish {
            Finish::Plain if mem.num().is_float() => mem.num(),
            _ => Num::I32,
        };
        let mut root = body.push(Node::Folded(num));
        if let Finish::Shifted(shift) | Finish::Scaled(shift, _) = finish
            && shift.iter().any(|&s| s != 0)
        {
            let bytes: Vec<u8> = shift.iter().flat_map(|&s| (s as i32).to_le_bytes()).collect();
            let shift = self.per_output(&mut body, bytes, axis, Mem::I32, "shift");
            root = body.bin(Bin::Add, root, shift);
        }
        if let Finish::Scaled(_, scale) = finish {
            let bytes: Vec<u8> = scale.iter().flat_map(|s| s.to_le_bytes()).collect();
            let scale = self.per_output(&mut body, bytes, axis, Mem::F32, "scale");
            root = body.convert(Num::F32, root);
            root = body.bin(Bin::Mul, root, scale);
        }
        let root = body.fit(mem, root);
        let product = Some(self.pending.len() - 1);
        Ok(Value::Lazy(Rc::new(Lazy { mem, dims: dims.to_vec(), body, root, product })))
    }

    pub(super) fn per_output(
        &mut self,
        body: &mut Body,
        bytes: Vec<u8>,
        axis: usize,
        mem: Mem,
        name: &str,
    ) -> NodeId {
        let (len, name) = (bytes.len() as u64, format!("{}.{name}", self.name));
        let place = self.blob(&name, BlobSource::Made(bytes), len);
        let input = body.input(place);
        body.push(Node::Load { input, mem, at: Affine::axis(axis, body.rank), guards: vec![] })
    }

    /// The margins that convolutions want around what they read, so that what computes it writes into their midst.
    pub(super) fn wanted_frames(&self, g: &Graph) -> Result<BTreeMap<ValueId, Frame>> {
        let mut wanted: BTreeMap<ValueId, Option<Frame>> = BTreeMap::new();
        let lanes = u64::from(self.target.cpu.vector_bits / 32);
        for (_, node) in g.ops() {
            let Op::Conv(op) = &node.op else { continue };
            let out = g.ty(node.result);
            let (xd, wd, dims) = (dims_of(g.ty(node.args[0]))?, dims_of(g.ty(node.args[1]))?, dims_of(out)?);
            let (_, pad) = windows_of(op, &xd, &wd, &dims);
            let groups = u64::from(op.groups);
            let single = wd[1] == 1 && wd[0] == groups && groups > 1;
            let empty = dims.contains(&0) || xd.contains(&0) || wd.contains(&0);
            if !pad.grows() || empty || !(single || groups == 1) {
                continue;
            }
            let of_bytes = match self.bytes(g, node.args[0])? {
                Some(bytes) => self.byte_weights(g, node.args[1], 0)?.map(|_| bytes),
                None => None,
            };
            let (value, fill, together) = match of_bytes {
                Some(bytes) if !bytes.signed => (bytes.x, bytes.zero, if single { lanes } else { 4 }),
                None if out.elem == ElemTy::F32 => (node.args[0], 0, 1),
                _ => continue,
            };
            if !xd[1].is_multiple_of(together) {
                continue;
            }
            let frame = Frame { margins: pad.margins, fill, at: origin(xd.len()), dims: xd };
            let merged = match wanted.remove(&value) {
                None => Some(frame),
                Some(Some(other)) if other.fill == fill => {
                    let most = |(a, b): (&(u64, u64), &(u64, u64))| (a.0.max(b.0), a.1.max(b.1));
                    let margins = other.margins.iter().zip(&frame.margins).map(most).collect();
                    Some(Frame { margins, ..frame })
                }
                Some(_) => None,
            };
            wanted.insert(value, merged);
        }
        Ok(wanted.into_iter().filter_map(|(v, frame)| Some((v, frame?))).collect())
    }

    /// Stores a value in an array with margins, channels side by side; gives what is inside of them.
    pub(super) fn stored_in_frame(&mut self, value: &Value, wanted: &Frame) -> Result<View> {
        let (rank, mem) = (value.dims().len(), value.mem());
        let mut dims = value.dims().to_vec();
        for (d, (before, after)) in dims.iter_mut().zip(&wanted.margins) {
            *d += before + after;
        }
        let mut layout: Vec<usize> = (0..rank).filter(|&a| a != 1).collect();
        layout.push(1);
        let whole = self.buffer_in(mem, &dims, &layout)?;
        // The margins, and then their midst: no element is in two of these parts.
        let part = |from: &[u64], extents: &[u64]| {
            let base = from.iter().zip(&whole.at.strides).map(|(&i, s)| i as i64 * s).sum();
            let at = Affine { base, strides: whole.at.strides.clone() };
            View { place: whole.place, mem, dims: extents.to_vec(), at }
        };
        let (mut from, mut extents) = (vec![0; rank], dims.clone());
        self.part = true;
        for a in 0..rank {
            let (before, after) = wanted.margins[a];
            for (start, n) in [(0, before), (dims[a] - after, after)] {
                if n > 0 {
                    (from[a], extents[a]) = (start, n);
                    let mut body = Body::new(rank);
                    let root = body.int(mem.num(), wanted.fill);
                    self.map_to(body, root, &part(&from, &extents));
                }
            }
            (from[a], extents[a]) = (before, dims[a] - before - after);
        }
        let inside = part(&from, &extents);
        let stored = match value {
            Value::Lazy(l) if l.product.is_some() => self.launch_to(l, &inside),
            _ => self.store_to(value, &inside),
        };
        self.part = false;
        stored?;
        let frame = Frame { at: inside.at.clone(), dims: inside.dims.clone(), ..wanted.clone() };
        self.frames.insert(inside.place, frame);
        Ok(inside)
    }

    /// The array with the margins that a convolution wants, if it was stored with such.
    fn within_frame(&self, v: &View, pad: &Padding, together: u64, fill: i64) -> Option<View> {
        // A part of the midst has no margins of its own.
        let whole = |f: &&Frame| f.at == v.at && f.dims == v.dims && f.fill == fill;
        let frame = self.frames.get(&v.place).filter(whole)?;
        let fits = pad.margins.iter().zip(&frame.margins).all(|(p, f)| p.0 <= f.0 && p.1 <= f.1);
        if !fits || pad.channels != 1 || !v.dims[1].is_multiple_of(together) {
            return None;
        }
        let mut view = v.clone();
        for (a, (before, after)) in pad.margins.iter().enumerate() {
            view.dims[a] += before + after;
            view.at.base -= *before as i64 * view.at.strides[a];
        }
        Some(view)
    }

    pub(super) fn conv(&mut self, g: &Graph, args: &[ValueId], op: &Conv, out: &TensorTy) -> Result<Value> {
        let (xt, wt) = (g.ty(args[0]), g.ty(args[1]));
        let (xd, wd, dims) = (dims_of(xt)?, dims_of(wt)?, dims_of(out)?);
        let mem = mem_of(out.elem)?;
        let (windows, pad) = windows_of(op, &xd, &wd, &dims);
        let groups = u64::from(op.groups);
        let single = wd[1] == 1 && wd[0] == groups && groups > 1;
        let empty = dims.contains(&0) || xd.contains(&0) || wd.contains(&0);
        let float = matches!(out.elem, ElemTy::F32 | ElemTy::F16 | ElemTy::Bf16);
        let of_bytes = if empty { None } else { self.byte_product(g, args[0], args[1], 0)? };
        if single && !empty && (float || of_bytes.is_some()) {
            return self.depthwise(g, args, &windows, &pad, of_bytes, &dims, mem);
        }
        if groups == 1 && !empty && (float || of_bytes.is_some()) {
            let (channels, outs) = (xd[1], wd[0]);
            let last = dims[dims.len() - 1];
            let steps: u64 = windows.kernel.iter().product();
            let (factors, x, finish, numbers) = match of_bytes {
                Some((bytes, numbers, finish)) => {
                    (Factors::Bytes, self.unsigned(g, &bytes, &pad, 4)?, finish, Some(numbers))
                }
                None => {
                    let x = self.value(g, args[0])?;
                    let numbers = self.known(g, args[1])?.map(|t| t.reals());
                    (Factors::F32, self.floats(&x, &pad)?, Finish::Plain, numbers)
                }
            };
            let width = x.dims[1];
            let read = factors == Factors::F32 && reads_codes(g, args[0]);
            let run = run(dims[2..].iter().product(), steps * channels);
            let run = (read && numbers.is_some() && (steps > 1 || run < channels)).then_some(run);
            let w = match numbers {
                Some(numbers) if run.is_some() => {
                    self.packed(outs, 1, steps * channels, factors, last, |o, _, k| {
                        numbers[(o * channels * steps + k) as usize]
                    })
                }
                Some(numbers) => self.packed(outs, steps, channels, factors, last, |o, step, c| {
                    numbers[((o * channels + c) * steps + step) as usize]
                }),
                None => {
                    let w = self.value(g, args[1])?;
                    self.pack_computed(&w, 0, 1, outs, last)?.place
                }
            };
            let spec = ConvSpec { run, ..windowed(&windows, &dims, &x, outs, width, factors) };
            let what = Product::Conv { spec, x: x.place, w };
            let mut layout: Vec<usize> = (0..dims.len()).filter(|&a| a != 1).collect();
            layout.push(1);
            return self.product(what, &dims, layout, 1, mem, &finish);
        }
        self.conv_by_folds(g, args, &windows, &pad, groups, &dims, mem)
    }

    /// f32 with channels side by side.
    fn floats(&mut self, x: &Value, pad: &Padding) -> Result<View> {
        let x = self.without_product(x)?;
        if let (Value::View(v), Mem::F32) = (&x, x.mem())
            && let Some(view) = self.within_frame(v, pad, 1, 0)
        {
            return Ok(view);
        }
        if x.mem() == Mem::F32 && !pad.needed(&x, 1) {
            return self.stored(&x);
        }
        let x =
            if let (Value::Lazy(_), true) = (&x, pad.grows()) { Value::View(self.stored(&x)?) } else { x };
        self.padded(&x, pad, 1, Mem::F32, |_, v| v, 0.0)
    }

    /// Packs weights that are computed; other axes than those of outputs and channels are steps of the window, or, when
    /// they come before both, batches.
    fn pack_computed(
        &mut self,
        w: &Value,
        out_axis: usize,
        channel_axis: usize,
        outs: u64,
        last: u64,
    ) -> Result<View> {
        let w = self.without_product(w)?;
        let w = if w.is_cheap() { w } else { Value::View(self.stored(&w)?) };
        let panel = self.panel(Factors::F32, outs, last);
        let panels = outs.div_ceil(panel);
        let first = out_axis.min(channel_axis);
        let others: Vec<usize> =
            (0..w.dims().len()).filter(|&a| a != out_axis && a != channel_axis).collect();
        let (batches, steps): (Vec<usize>, Vec<usize>) = others.iter().partition(|&&a| a < first);
        let mut dims: Vec<u64> = batches.iter().map(|&a| w.dims()[a]).collect();
        let panel_axis = dims.len();
        dims.push(panels);
        dims.extend(steps.iter().map(|&a| w.dims()[a]));
        let at_channel = dims.len();
        dims.extend([w.dims()[channel_axis], panel]);
        let rank = dims.len();
        let output =
            Affine::axis(panel_axis, rank).scaled(panel as i64, 0).plus(&Affine::axis(rank - 1, rank));
        let mut map = vec![origin(rank); w.dims().len()];
        for (i, &a) in batches.iter().enumerate() {
            map[a] = Affine::axis(i, rank);
        }
        for (i, &a) in steps.iter().enumerate() {
            map[a] = Affine::axis(panel_axis + 1 + i, rank);
        }
        map[out_axis] = output.clone();
        map[channel_axis] = Affine::axis(at_channel, rank);
        let guards =
            if outs.is_multiple_of(panel) { vec![] } else { vec![Guard { at: output, below: outs as i64 }] };
        let mut body = Body::new(rank);
        let mut root = body.absorb_within(&w, &map, &guards);
        if !guards.is_empty() && !matches!(w, Value::View(_)) {
            let (inside, zero) = (body.push(Node::Inside(guards)), body.real(Num::F32, 0.0));
            root = body.select(inside, root, zero);
        }
        let view = self.buffer(Mem::F32, &dims)?;
        self.map_to(body, root, &view);
        Ok(view)
    }

    /// One channel for each output: a sum over the window, vectors along channels.
    #[expect(clippy::too_many_arguments, reason = "everything about one convolution")]
    fn depthwise(
        &mut self,
        g: &Graph,
        args: &[ValueId],
        windows: &Windows,
        pad: &Padding,
        of_bytes: Option<(Bytes, Vec<f64>, Finish)>,
        dims: &[u64],
        mem: Mem,
    ) -> Result<Value> {
        let outs = dims[1];
        let steps: u64 = windows.kernel.iter().product();
        let space = windows.kernel.len();
        let mut layout: Vec<usize> = (0..dims.len()).filter(|&a| a != 1).collect();
        layout.push(1);
        let lanes = u64::from(self.target.cpu.vector_bits / 32);
        let across = windows.kernel.last().copied().unwrap_or(1);
        let (x, finish, numbers, bytes) = match of_bytes {
            Some((bytes, numbers, finish)) if across * (steps / across).div_ceil(4) <= MOST_UNROLLED => {
                let x = self.unsigned(g, &bytes, pad, lanes)?;
                let w = self.packed_single(outs, steps / across, across, lanes, &numbers);
                let spec = windowed(windows, dims, &x, outs, 1, Factors::Single);
                let what = Product::Conv { spec, x: x.place, w };
                return self.product(what, dims, layout, 1, mem, &finish);
            }
            Some((bytes, numbers, finish)) => {
                (self.unsigned(g, &bytes, pad, 4)?, finish, Some(numbers), true)
            }
            None => {
                let x = self.value(g, args[0])?;
                (self.floats(&x, pad)?, Finish::Plain, self.known(g, args[1])?.map(|t| t.reals()), false)
            }
        };
        let rank = dims.len() + space;
        let mut body = Body::new(rank);
        let mut map = vec![Affine::axis(0, rank), Affine::axis(1, rank)];
        for a in 0..space {
            let place = Affine::axis(2 + a, rank).scaled(windows.strides[a], 0);
            map.push(place.plus(&Affine::axis(dims.len() + a, rank).scaled(windows.dilations[a], 0)));
        }
        let x = body.absorb(&Value::View(x), &map);
        let w = match numbers {
            Some(numbers) => {
                let mut packed = vec![];
                for step in 0..steps {
                    for o in 0..outs {
                        let n = numbers[(o * steps + step) as usize];
                        if bytes {
                            packed.push(n as i8 as u8)
                        } else {
                            packed.extend((n as f32).to_le_bytes())
                        }
                    }
                }
                let (len, name) = (packed.len() as u64, format!("{}.weights", self.name));
                let place = self.blob(&name, BlobSource::Made(packed), len);
                let mut extents = windows.kernel.clone();
                extents.push(outs);
                let view = View::dense(place, if bytes { Mem::I8 } else { Mem::F32 }, &extents);
                let mut map: Vec<Affine> = (0..space).map(|a| Affine::axis(dims.len() + a, rank)).collect();
                map.push(Affine::axis(1, rank));
                body.absorb(&Value::View(view), &map)
            }
            None => {
                let w = self.value(g, args[1])?;
                let w = Value::View(self.stored(&w)?);
                let mut map = vec![Affine::axis(1, rank), origin(rank)];
                map.extend((0..space).map(|a| Affine::axis(dims.len() + a, rank)));
                body.absorb(&w, &map)
            }
        };
        let of = body.bin(Bin::Mul, x, w);
        let what = Product::Fold { body, of, over: windows.kernel.clone() };
        self.product(what, dims, layout, 1, mem, &finish)
    }

    /// Weights of a channel for each output: those of four rows of the window in a lane.
    fn packed_single(&mut self, outs: u64, rows: u64, across: u64, lanes: u64, numbers: &[f64]) -> Place {
        let mut bytes = vec![];
        for panel in (0..outs).step_by(lanes as usize) {
            for group in (0..rows).step_by(4) {
                for k in 0..across {
                    for o in panel..panel + lanes {
                        for row in group..group + 4 {
                            let there = o < outs && row < rows;
                            let at = ((o * rows + row) * across + k) as usize;
                            bytes.push(if there { numbers[at] as i8 as u8 } else { 0 });
                        }
                    }
                }
            }
        }
        let (len, name) = (bytes.len() as u64, format!("{}.weights", self.name));
        self.blob(&name, BlobSource::Made(bytes), len)
    }

    /// Any convolution, group by group.
    #[expect(clippy::too_many_arguments, reason = "everything about one convolution")]
    fn conv_by_folds(
        &mut self,
        g: &Graph,
        args: &[ValueId],
        windows: &Windows,
        pad: &Padding,
        groups: u64,
        dims: &[u64],
        mem: Mem,
    ) -> Result<Value> {
        let (x, w) = (self.value(g, args[0])?, self.value(g, args[1])?);
        if mem.num() == Num::Bool {
            return Err(self.refuse("conv", g.ty(args[0])));
        }
        let (x, w) = (Value::View(self.stored(&x)?), Value::View(self.stored(&w)?));
        let whole = self.buffer(mem, dims)?;
        let (each, outs, space) = (w.dims()[1], w.dims()[0] / groups.max(1), windows.kernel.len());
        let rank = dims.len() + 1 + space;
        for group in 0..groups {
            let mut body = Body::new(rank);
            let channel = dims.len();
            let mut map =
                vec![Affine::axis(0, rank), Affine::axis(channel, rank).scaled(1, (group * each) as i64)];
            let mut guards = vec![];
            for a in 0..space {
                let place = Affine::axis(2 + a, rank).scaled(windows.strides[a], -windows.before[a]);
                let at = place.plus(&Affine::axis(channel + 1 + a, rank).scaled(windows.dilations[a], 0));
                if pad.margins[2 + a] != (0, 0) {
                    guards.push(Guard { at: at.clone(), below: x.dims()[2 + a] as i64 });
                }
                map.push(at);
            }
            let xv = body.absorb_within(&x, &map, &guards);
            let mut map =
                vec![Affine::axis(1, rank).scaled(1, (group * outs) as i64), Affine::axis(channel, rank)];
            map.extend((0..space).map(|a| Affine::axis(channel + 1 + a, rank)));
            let wv = body.absorb(&w, &map);
            let of = wide_product(&mut body, &[xv, wv]);
            let mut over = vec![each];
            over.extend(&windows.kernel);
            let mut part = dims.to_vec();
            part[1] = outs;
            let base = whole.at.base + (group * outs) as i64 * whole.at.strides[1];
            let at = Affine { base, strides: whole.at.strides.clone() };
            let to = View { place: whole.place, mem, dims: part, at };
            self.sum_into(body, of, &over, &to, groups > 1);
        }
        Ok(Value::View(whole))
    }

    /// Stores sums of `of` in an array.
    fn sum_into(&mut self, mut body: Body, of: NodeId, over: &[u64], to: &View, part: bool) {
        let num = body.num(of);
        let sum = body.push(Node::Folded(num));
        let value = body.convert(to.mem.num(), sum);
        let value = body.fit(to.mem, value);
        let mut at = to.at.clone();
        at.strides.extend(over.iter().map(|_| 0));
        let spec = crate::nest::NestSpec {
            name: "products".into(),
            dims: to.dims.clone(),
            fold: Some(crate::nest::Fold { dims: over.to_vec(), kind: FoldKind::Sum, of, each: None }),
            nodes: vec![],
            value,
            out: to.mem,
            to: crate::nest::To::At(at),
            inputs: 0,
        };
        self.part = part;
        self.nest(body, spec, to.place);
        self.part = false;
    }

    pub(super) fn matmul(
        &mut self,
        g: &Graph,
        args: &[ValueId],
        steps: &[EpilogueStep],
        out: &TensorTy,
    ) -> Result<Value> {
        let dims = dims_of(out)?;
        let mem = mem_of(out.elem)?;
        let mut value = self.rows_times(g, args[0], args[1], true, &dims, mem)?;
        for step in steps {
            let operand = match step.operand() {
                Some(i) => Some(self.value(g, args[2 + usize::from(i)])?),
                None => None,
            };
            let mut operands = vec![value];
            operands.extend(operand);
            value = self.elementwise(&dims, mem, &operands, |b, x| {
                let num = b.num(x[0]);
                match step {
                    EpilogueStep::Add(_) => b.bin(Bin::Add, x[0], x[1]),
                    EpilogueStep::Mul(_) => b.bin(Bin::Mul, x[0], x[1]),
                    EpilogueStep::Silu => {
                        let s = b.un(Un::Sigmoid, x[0]);
                        b.bin(Bin::Mul, x[0], s)
                    }
                    EpilogueStep::Gelu => super::elementwise::gelu(b, x[0], false),
                    EpilogueStep::GeluTanh => super::elementwise::gelu(b, x[0], true),
                    EpilogueStep::Relu => {
                        let zero = b.real(num, 0.0);
                        b.bin(Bin::Max, zero, x[0])
                    }
                    EpilogueStep::Tanh => b.un(Un::Tanh, x[0]),
                }
            })?;
        }
        Ok(value)
    }

    pub(super) fn dot(&mut self, g: &Graph, a: ValueId, b: ValueId, out: &TensorTy) -> Result<Value> {
        self.rows_times(g, a, b, false, &dims_of(out)?, mem_of(out.elem)?)
    }

    /// Rows times matrices; `by_rows` when each output is a row of the matrix, else a column.
    fn rows_times(
        &mut self,
        g: &Graph,
        a: ValueId,
        b: ValueId,
        by_rows: bool,
        dims: &[u64],
        mem: Mem,
    ) -> Result<Value> {
        let (at, bt) = (g.ty(a).clone(), g.ty(b).clone());
        let (ad, bd) = (dims_of(&at)?, dims_of(&bt)?);
        let (rank, inner) = (bd.len(), ad[ad.len() - 1]);
        let (out_axis, channel_axis) = if by_rows { (rank - 2, rank - 1) } else { (rank - 1, rank - 2) };
        let outs = bd[out_axis];
        let float = |t: &TensorTy| matches!(t.elem, ElemTy::F32 | ElemTy::F16 | ElemTy::Bf16);
        let empty = dims.contains(&0) || inner == 0;
        let alone = bd[..rank - 2].iter().all(|&d| d == 1);
        let of_bytes = if empty || !alone { None } else { self.byte_product(g, a, b, out_axis)? };
        if empty || !(of_bytes.is_some() || (float(&at) && float(&bt))) {
            return self.dot_by_folds(g, a, b, by_rows, dims, mem);
        }
        let pad = Padding { channels: ad.len() - 1, margins: vec![(0, 0); ad.len()] };
        let last = dims.len().checked_sub(2).map_or(1, |i| dims[i]);
        let mut coded = None;
        let (factors, x, finish, numbers) = match of_bytes {
            Some((bytes, numbers, finish)) => {
                (Factors::Bytes, self.unsigned(g, &bytes, &pad, 4)?, finish, Some(numbers))
            }
            None => {
                let x = self.value(g, a)?;
                coded = if alone && mem == Mem::F32 { self.coded(g, b, by_rows)? } else { None };
                let known = alone && coded.is_none();
                let numbers = if known { self.known(g, b)?.map(|t| t.reals()) } else { None };
                let factors = coded.as_ref().map_or(Factors::F32, Coded::factors);
                (factors, self.floats(&x, &pad)?, Finish::Plain, numbers)
            }
        };
        let run = run(outs, inner);
        let read = factors == Factors::F32 && numbers.is_some() && reads_codes(g, a);
        let run = (read && run < inner).then_some(run);
        let (w, w_strides) = match numbers {
            None if coded.is_some() => {
                let panel = self.panel(factors, outs, last);
                let bytes = coded.iter().flat_map(|c| c.packed(panel)).collect::<Vec<u8>>();
                let (len, name) = (bytes.len() as u64, format!("{}.weights", self.name));
                (self.blob(&name, BlobSource::Made(bytes), len), vec![0; rank - 2])
            }
            Some(numbers) => {
                let place = self.packed(outs, 1, inner, factors, last, |o, _, c| {
                    numbers[(if by_rows { o * inner + c } else { c * outs + o }) as usize]
                });
                (place, vec![0; rank - 2])
            }
            None => {
                let w = self.value(g, b)?;
                let view = self.pack_computed(&w, out_axis, channel_axis, outs, last)?;
                let stride = |i: usize| if bd[i] == 1 { 0 } else { view.at.strides[i] };
                (view.place, (0..rank - 2).map(stride).collect())
            }
        };
        // Axes of the result before the last, aligned with those of both operands.
        let outer = dims.len() - 1;
        let axis = |i: usize| {
            let behind = outer - i;
            let x = (ad.len() - 1).checked_sub(behind).filter(|&a| ad[a] != 1).map_or(0, |a| x.at.strides[a]);
            // The axis of rows is none of the matrices.
            let w = if by_rows || behind == 1 { None } else { (rank - 1).checked_sub(behind) };
            Axis { n: dims[i], x, w: w.map_or(0, |a| w_strides[a]), y: Some(i as u8) }
        };
        let spec = ConvSpec {
            name: factors.name().into(),
            factors,
            outer: (0..outer).map(axis).collect(),
            window: vec![],
            base: x.at.base,
            run,
            channels: x.dims[x.dims.len() - 1],
            outs,
            axis: outer as u8,
            rank: dims.len() as u8,
            nodes: vec![],
            value: 0,
            out: mem,
            to: origin(dims.len()),
            inputs: 0,
        };
        let what = Product::Conv { spec, x: x.place, w };
        self.product(what, dims, (0..dims.len()).collect(), outer, mem, &finish)
    }

    fn dot_by_folds(
        &mut self,
        g: &Graph,
        a: ValueId,
        b: ValueId,
        by_rows: bool,
        dims: &[u64],
        mem: Mem,
    ) -> Result<Value> {
        let (x, w) = (self.value(g, a)?, self.value(g, b)?);
        let (x, w) = (Value::View(self.stored(&x)?), Value::View(self.stored(&w)?));
        let rank = dims.len() + 1;
        let k = Affine::axis(dims.len(), rank);
        let outer = |v: &Value| {
            let n = v.dims().len() - 2;
            broadcast(&v.dims()[..n], &dims[..dims.len() - 2], rank)
        };
        let (mut xm, mut wm) = if by_rows {
            (broadcast(&x.dims()[..x.dims().len() - 1], &dims[..dims.len() - 1], rank), vec![])
        } else {
            let mut xm = outer(&x);
            xm.push(Affine::axis(dims.len() - 2, rank));
            (xm, outer(&w))
        };
        xm.push(k.clone());
        let column = Affine::axis(dims.len() - 1, rank);
        if by_rows {
            wm.extend([column, k])
        } else {
            wm.extend([k, column])
        }
        let inner = x.dims()[x.dims().len() - 1];
        let mut body = Body::new(rank);
        let (xv, wv) = (body.absorb(&x, &xm), body.absorb(&w, &wm));
        let of = wide_product(&mut body, &[xv, wv]);
        let view = self.buffer(mem, dims)?;
        self.sum_into(body, of, &[inner], &view, false);
        Ok(Value::View(view))
    }

    pub(super) fn einsum(
        &mut self,
        g: &Graph,
        args: &[ValueId],
        equation: &str,
        out: &TensorTy,
    ) -> Result<Value> {
        let bad = || Diag::bug(format!("the equation `{equation}`"));
        let (inputs, output) = equation.split_once("->").ok_or_else(bad)?;
        let inputs: Vec<Vec<char>> = inputs.split(',').map(|i| i.chars().collect()).collect();
        let output: Vec<char> = output.chars().collect();
        let mut parts = vec![];
        for &a in args {
            let value = self.value(g, a)?;
            parts.push(Value::View(self.stored(&value)?));
        }
        let mut extents: std::collections::BTreeMap<char, u64> = std::collections::BTreeMap::new();
        for (letters, part) in inputs.iter().zip(&parts) {
            for (&c, &d) in letters.iter().zip(part.dims()) {
                extents.entry(c).and_modify(|e| *e = if *e == 1 { d } else { *e }).or_insert(d);
            }
        }
        let summed: Vec<char> = extents.keys().copied().filter(|c| !output.contains(c)).collect();
        let order: Vec<char> = output.iter().chain(&summed).copied().collect();
        let (dims, mem) = (dims_of(out)?, mem_of(out.elem)?);
        let rank = order.len();
        let mut body = Body::new(rank);
        let mut factors = vec![];
        for (letters, part) in inputs.iter().zip(&parts) {
            let one = |(c, &d): (&char, &u64)| match order.iter().position(|o| o == c) {
                Some(axis) if d != 1 => Affine::axis(axis, rank),
                _ => origin(rank),
            };
            let map: Vec<Affine> = letters.iter().zip(part.dims()).map(one).collect();
            factors.push(body.absorb(part, &map));
        }
        let of = wide_product(&mut body, &factors);
        let over: Vec<u64> = summed.iter().map(|c| extents[c]).collect();
        let view = self.buffer(mem, &dims)?;
        self.sum_into(body, of, &over, &view, false);
        Ok(Value::View(view))
    }
}

/// The product of numbers as it is summed: floats in f64.
fn wide_product(body: &mut Body, factors: &[NodeId]) -> NodeId {
    let wide = |b: &mut Body, x: NodeId| {
        let num = if b.num(x).is_float() { Num::F64 } else { b.num(x) };
        b.convert(num, x)
    };
    let mut product = wide(body, factors[0]);
    for &x in &factors[1..] {
        let x = wide(body, x);
        product = body.bin(Bin::Mul, product, x);
    }
    product
}

/// Margins that an array needs, and its axis of channels.
struct Padding {
    channels: usize,
    margins: Vec<(u64, u64)>,
}

impl Padding {
    fn grows(&self) -> bool {
        self.margins.iter().any(|&m| m != (0, 0))
    }

    /// Whether a value has to be copied to have its channels side by side, and margins.
    fn needed(&self, x: &Value, together: u64) -> bool {
        let Value::View(v) = x else { return true };
        let n = v.dims[self.channels];
        self.grows() || !n.is_multiple_of(together) || (n != 1 && v.at.strides[self.channels] != 1)
    }
}

/// The windows of a convolution and the margins that its array needs, as far as windows reach.
fn windows_of(op: &Conv, xd: &[u64], wd: &[u64], dims: &[u64]) -> (Windows, Padding) {
    let space = dims.len() - 2;
    let of = |list: &[u32], a: usize, default: i64| list.get(a).map_or(default, |&n| n.into());
    let windows = Windows {
        strides: (0..space).map(|a| of(&op.strides, a, 1)).collect(),
        dilations: (0..space).map(|a| of(&op.dilations, a, 1)).collect(),
        before: (0..space).map(|a| of(&op.before, a, 0)).collect(),
        kernel: wd[2..].to_vec(),
    };
    let mut margins = vec![(0, 0); 2];
    for a in 0..space {
        let last = (dims[2 + a] as i64 - 1) * windows.strides[a];
        let reach = last + (windows.kernel[a] as i64 - 1) * windows.dilations[a] + 1;
        let after = reach - windows.before[a] - xd[2 + a] as i64;
        margins.push((windows.before[a] as u64, after.max(0) as u64));
    }
    (windows, Padding { channels: 1, margins })
}

/// Whether a value is what `dequantize` makes of codes.
fn reads_codes(g: &Graph, v: ValueId) -> bool {
    g.def(v).is_some_and(|(_, node)| matches!(node.op, Op::Dequantize(_)))
}

/// How many products of f32 a sum takes before it joins the total, where codes are read: of rows with so many outputs
/// side by side (for convolutions: places), and so many products each. That is how ONNX Runtime does it when it runs
/// nodes one by one, so that what is rounded afterwards gives the same codes as there.
fn run(side: u64, products: u64) -> u64 {
    let (mut columns, mut run) = (128, 128);
    while side < products && columns > 16 && columns / 2 >= side {
        columns /= 2;
        run *= 2;
    }
    run
}

/// Most products of a window of [`Factors::Single`] that are unrolled.
const MOST_UNROLLED: u64 = 64;

/// Every index below extents, the last axis first.
fn each_index(dims: &[u64]) -> impl Iterator<Item = Vec<u64>> + use<> {
    let dims = dims.to_vec();
    let count: u64 = dims.iter().product();
    (0..count).map(move |mut at| {
        let mut index = vec![0; dims.len()];
        for a in (0..dims.len()).rev() {
            index[a] = at % dims[a];
            at /= dims[a];
        }
        index
    })
}

/// The spec of a convolution of an array with its margins, without expression and result.
fn windowed(
    windows: &Windows,
    dims: &[u64],
    x: &View,
    outs: u64,
    channels: u64,
    factors: Factors,
) -> ConvSpec {
    let space = windows.kernel.len();
    let mut outer = vec![Axis { n: dims[0], x: x.at.strides[0], w: 0, y: Some(0) }];
    let mut window = vec![];
    for a in 0..space {
        let step = x.at.strides[2 + a];
        outer.push(Axis { n: dims[2 + a], x: step * windows.strides[a], w: 0, y: Some(2 + a as u8) });
        window.push(Axis { n: windows.kernel[a], x: step * windows.dilations[a], w: 0, y: None });
    }
    ConvSpec {
        name: factors.name().into(),
        factors,
        outer,
        window,
        base: x.at.base,
        run: None,
        channels,
        outs,
        axis: 1,
        rank: dims.len() as u8,
        nodes: vec![],
        value: 0,
        out: Mem::F32,
        to: origin(dims.len()),
        inputs: 0,
    }
}

/// The spec with axes joined that lie behind one another everywhere.
pub(super) fn flattened(mut spec: ConvSpec) -> ConvSpec {
    spec.outer.retain(|a| a.n != 1);
    let mut i = spec.outer.len();
    while i >= 2 {
        i -= 1;
        let (a, b) = (spec.outer[i - 1], spec.outer[i]);
        let (Some(ya), Some(yb)) = (a.y, b.y) else { continue };
        let n = b.n as i64;
        let joins = |at: &Affine| at.strides[usize::from(ya)] == at.strides[usize::from(yb)] * n;
        let all = spec.nodes.iter().flat_map(Node::affines).chain([&spec.to]).all(joins);
        if all && a.x == b.x * n && a.w == b.w * n {
            spec.outer[i - 1] = Axis { n: a.n * b.n, ..b };
            spec.outer.remove(i);
        }
    }
    // Windows of a tile share their weights.
    if spec.outer.last().is_none_or(|a| a.w != 0) {
        spec.outer.push(Axis { n: 1, x: 0, w: 0, y: None });
    }
    spec
}

/// Puts the nodes of an expression behind those of a body, with axes and inputs replaced; gives its root.
pub(super) fn appended(
    body: &mut Body,
    nodes: &[Node],
    root: NodeId,
    map: &[Affine],
    inputs: &[u16],
) -> NodeId {
    let rank = body.rank;
    let mut new: Vec<NodeId> = vec![];
    for node in nodes {
        let mut node = node.replaced(|n| new[n as usize], |a| a.through(map, rank));
        if let Node::Load { input, .. } | Node::LoadAt { input, .. } = &mut node {
            *input = inputs[usize::from(*input)];
        }
        new.push(body.push(node));
    }
    new[root as usize]
}
