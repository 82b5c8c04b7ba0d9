//! Turns a graph over arrays of fixed shapes into launches.
//!
//! Values are arrays in memory seen through strides, or expressions that nobody has stored yet ([`value`]): moving axes,
//! cutting and repeating cost nothing, and chains of elementwise ops become one nest. Expressions are stored when more
//! than one op reads them, or one that reads elements many times. Products of windows take what follows them into the
//! kernel. Arrays keep the order of axes that their producer likes, so that channels stay side by side from one
//! convolution to the next; results of the graph lie row after row.
//!
//! An op, or an element type, that no kernel computes is an error that names it. Nothing here reads the numbers of an
//! input: an index outside of its axis, which the evaluator refuses, becomes the nearest one, and an integer divided
//! by 0 gives 0.

mod coded;
mod elementwise;
mod fold;
mod indexing;
pub mod io;
mod movement;
mod product;
mod quantized;
mod requantize;
mod value;

use crate::conv::ConvSpec;
use crate::lower::{BlobSource, EngineBlob};
use crate::nest::{Affine, Fold, FoldKind, Mem, NestSpec, NodeId, To};
use crate::schedule::{self, Buffer};
use crate::spec::KernelSpec;
use quantc_ir::diag::{Diag, Loc, Result};
use quantc_ir::entity::ValueId;
use quantc_ir::eval::{Tensor, weight_tensor};
use quantc_ir::formats;
use quantc_ir::graph::{Def, Graph, Node as OpNode};
use quantc_ir::module::Module;
use quantc_ir::ops::Op;
use quantc_ir::target::TargetDesc;
use quantc_ir::ty::{ElemTy, Int, TensorTy};
use quantc_ir::weights::Store;
use quantc_runtime::format::{Array, Items, MAX_BUFFER_BYTES, Ref};
use std::collections::BTreeMap;
use std::rc::Rc;
use value::{Body, Lazy, Value, View, identity, strides};

/// Where an array lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Buffer(usize),
    Blob(u32),
}

/// A launch before buffers have addresses.
struct Step {
    name: String,
    spec: KernelSpec,
    args: Vec<Place>,
    items: u64,
    /// Writes, to its last argument, a part of an array whose other parts other such steps write.
    part: bool,
}

/// A launch.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What it computes.
    pub name: String,
    /// The kernel.
    pub spec: KernelSpec,
    /// Arguments.
    pub args: Vec<Ref>,
    /// Number of work items.
    pub items: Items,
    /// Whether the next launch may begin before all workers have finished this one.
    pub overlaps_next: bool,
}

/// A graph as launches.
#[derive(Clone, Debug)]
pub struct Arrays {
    /// In order.
    pub launches: Vec<Launch>,
    /// What `weights.bin` holds.
    pub blobs: Vec<EngineBlob>,
    /// What the caller gives.
    pub inputs: Vec<Array>,
    /// What the graph gives.
    pub outputs: Vec<Array>,
    /// Bytes of the arena.
    pub arena_bytes: u64,
}

/// How elements of a type lie in an engine's memory: codes take a byte each.
pub fn mem_of(elem: ElemTy) -> Result<Mem> {
    Ok(match elem {
        ElemTy::F32 => Mem::F32,
        ElemTy::F16 => Mem::F16,
        ElemTy::Bf16 => Mem::Bf16,
        ElemTy::F64 => Mem::F64,
        ElemTy::Int(int) => match int {
            Int::Bool => Mem::Bool,
            Int::I8 => Mem::I8,
            Int::I16 => Mem::I16,
            Int::I32 => Mem::I32,
            Int::I64 => Mem::I64,
            Int::U8 => Mem::U8,
            Int::U16 => Mem::U16,
            Int::U32 => Mem::U32,
            Int::U64 => Mem::U64,
        },
        ElemTy::Q(s) if s.format.bits > 8 => {
            return Err(Diag::target(format!("codes of `{}` have no kernel", s.format)));
        }
        ElemTy::Q(s) if *s.format == formats::INT8 => Mem::I8,
        ElemTy::Q(_) => Mem::U8,
    })
}

/// The extents of a value, all of which must be numbers.
fn dims_of(ty: &TensorTy) -> Result<Vec<u64>> {
    ty.shape.dims().ok_or_else(|| {
        Diag::target(format!("a value of type {ty} has no fixed extents"))
            .help("give every named extent a number, as in `--dim batch=1`")
    })
}

/// A product whose kernel has not been launched: what follows may be taken into it.
struct Pending {
    name: String,
    what: Product,
    dims: Vec<u64>,
    /// The axes of the result, the outermost in memory first.
    layout: Vec<usize>,
}

/// A product.
enum Product {
    /// Of windows with weights: the spec without its expression and result.
    Conv { spec: ConvSpec, x: Place, w: Place },
    /// A sum over the extents `over`, with the axes of the result in front.
    Fold { body: Body, of: NodeId, over: Vec<u64> },
}

struct Lowering<'a> {
    module: &'a Module,
    store: &'a Store,
    target: &'static TargetDesc,
    steps: Vec<Step>,
    /// Bytes.
    buffers: Vec<u64>,
    blobs: Vec<EngineBlob>,
    blob_index: BTreeMap<BlobSource, u32>,
    pending: Vec<Option<Pending>>,
    /// Products of [`Self::pending`] whose sums of bytes are scaled, and nothing else.
    scaled: BTreeMap<usize, product::Scaled>,
    values: BTreeMap<ValueId, Value>,
    /// Arrays that were stored with margins.
    frames: BTreeMap<Place, product::Frame>,
    /// The op being lowered, for names of launches.
    name: String,
    /// Steps write parts of one array.
    part: bool,
}

/// Most nodes of an expression, and most arrays it reads.
const MOST_NODES: usize = 96;
const MOST_INPUTS: usize = 20;

/// Lowers `module`, whose `main` is a graph over arrays: `inputs` and `outputs` name its parameters and results.
pub fn lower(
    module: &Module,
    store: &Store,
    target: &'static TargetDesc,
    inputs: &[String],
    outputs: &[String],
) -> Result<Arrays> {
    let main = &module.main;
    let mut cx = Lowering {
        module,
        store,
        target,
        steps: vec![],
        buffers: vec![],
        blobs: vec![],
        blob_index: BTreeMap::new(),
        pending: vec![],
        scaled: BTreeMap::new(),
        values: BTreeMap::new(),
        frames: BTreeMap::new(),
        name: String::new(),
        part: false,
    };
    let mut uses: BTreeMap<ValueId, usize> = BTreeMap::new();
    for arg in main.ops().flat_map(|(_, node)| &node.args) {
        *uses.entry(*arg).or_default() += 1;
    }
    let wanted = cx.wanted_frames(main)?;
    let mut given = vec![];
    for &param in &main.params {
        let ty = main.ty(param);
        let view = cx.buffer(mem_of(ty.elem)?, &dims_of(ty)?)?;
        given.push((ty.clone(), view.place));
        cx.values.insert(param, Value::View(view));
    }
    for (i, (_, node)) in main.ops().enumerate() {
        let numbered = || format!("{}.{i}", node.op.name());
        cx.name = main.value(node.result).name.clone().unwrap_or_else(numbered);
        let name = cx.name.clone();
        let at = |e: Diag| e.at(Loc::Item(format!("%{name} = {}", node.op.name())));
        let value = cx.op(main, node).map_err(at)?;
        let ty = main.ty(node.result);
        if value.dims() != dims_of(ty).map_err(at)? || value.mem() != mem_of(ty.elem).map_err(at)? {
            return Err(at(Diag::bug(format!("{:?} {:?} for {ty}", value.mem(), value.dims()))));
        }
        let uses = uses.get(&node.result).copied().unwrap_or(0) + usize::from(main.is_result(node.result));
        // Bytes end a product: those who multiply them look for them behind what makes numbers of them.
        let bytes = value.product().is_some() && matches!(value.mem(), Mem::I8 | Mem::U8);
        let kept = bytes || (uses > 1 && !value.is_cheap());
        let value = match (&value, wanted.get(&node.result)) {
            (Value::Lazy(_), Some(frame)) => Value::View(cx.stored_in_frame(&value, frame)?),
            _ if kept => Value::View(cx.stored(&value)?),
            _ => value,
        };
        cx.values.insert(node.result, value);
    }
    let mut made = vec![];
    for (i, &result) in main.results.iter().enumerate() {
        cx.name = outputs.get(i).cloned().unwrap_or_else(|| format!("result{i}"));
        let value = cx.value(main, result)?;
        let view = cx.dense(&value)?;
        // Each output has memory of its own.
        let shared = |p: Place| {
            let place = |(_, q): &(TensorTy, Place)| *q == p;
            matches!(p, Place::Blob(_)) || given.iter().any(place) || made.iter().any(place)
        };
        let place = if shared(view.place) { cx.copied(&Value::View(view))?.place } else { view.place };
        made.push((main.ty(result).clone(), place));
    }
    cx.finish(&given, &made, inputs, outputs)
}

impl Lowering<'_> {
    fn op(&mut self, g: &Graph, node: &OpNode) -> Result<Value> {
        let out = g.ty(node.result);
        let args = node.args.clone();
        match &node.op {
            Op::Add(_)
            | Op::Mul(_)
            | Op::Binary(_)
            | Op::Compare(_)
            | Op::Select(_)
            | Op::Unary(_)
            | Op::Relu(_)
            | Op::Silu(_)
            | Op::Gelu(_)
            | Op::Tanh(_)
            | Op::Cast(_) => self.elementwise_op(g, node, out),
            Op::Reshape(_) => self.reshape(g, args[0], out),
            Op::Transpose(op) => self.transpose(g, args[0], &op.perm),
            Op::Slice(op) => self.slice(g, args[0], op, out),
            Op::Expand(_) => self.expand(g, args[0], out),
            Op::Concat(op) => self.concat(g, &args, usize::from(op.axis), out),
            Op::Pad(op) => self.pad(g, &args, op, out),
            Op::Reduce(op) => self.reduce(g, args[0], op, out),
            Op::ArgReduce(op) => self.arg_reduce(g, args[0], op, out),
            Op::Softmax(op) => self.softmax(g, args[0], op, out),
            Op::Cumulate(op) => self.cumulate(g, args[0], op, out),
            Op::TopK(op) => self.topk(g, args[0], op, out),
            Op::Pool(op) => self.pool(g, args[0], op, out),
            Op::LayerNorm(op) => self.norm(g, &args, op.eps.0, true, out),
            Op::RmsNorm(op) => self.norm(g, &args, op.eps.0, false, out),
            Op::Gather(op) => self.gather(g, args[0], args[1], usize::from(op.axis), out),
            Op::GatherElements(op) => self.gather_elements(g, args[0], args[1], usize::from(op.axis), out),
            Op::GatherNd(op) => self.gather_nd(g, args[0], args[1], usize::from(op.batch), out),
            Op::ScatterElements(op) => self.scatter_elements(g, &args, usize::from(op.axis), op.combine, out),
            Op::ScatterNd(op) => self.scatter_nd(g, &args, op.combine, out),
            Op::Dot(_) => self.dot(g, args[0], args[1], out),
            Op::MatMul(op) => self.matmul(g, &args, &op.epilogue, out),
            Op::Einsum(op) => self.einsum(g, &args, &op.equation, out),
            Op::Conv(op) => self.conv(g, &args, op, out),
            Op::Quantize(op) => self.quantize(g, &args, op.to, out),
            Op::Dequantize(_) => self.dequantize(g, &args, out),
            Op::DynamicScale(op) => self.dynamic_scale(g, args[0], op.to, out),
            Op::BitcastStorage(_) => self.bitcast(g, args[0]),
            other => Err(Diag::target(format!("`{}` has no kernel for graphs over arrays", other.name()))),
        }
    }

    /// An error that says that an op has no kernel for an element type.
    fn refuse(&self, op: &str, ty: &TensorTy) -> Diag {
        Diag::target(format!("`{op}` has no kernel for elements of type {}", ty.elem))
    }

    fn value(&mut self, g: &Graph, v: ValueId) -> Result<Value> {
        if let Some(value) = self.values.get(&v) {
            return Ok(value.clone());
        }
        let value = match g.value(v).def {
            Def::Weight(_) => self.constant(g, v)?,
            _ => return Err(Diag::target("an operand is not computed by any op before")),
        };
        self.values.insert(v, value.clone());
        Ok(value)
    }

    /// The operand `i` of an op, when it is there.
    fn optional(&mut self, g: &Graph, args: &[ValueId], i: usize) -> Result<Option<Value>> {
        match args.get(i) {
            Some(&v) if !g.is_none(v) => self.value(g, v).map(Some),
            _ => Ok(None),
        }
    }

    /// The numbers of a weight.
    fn tensor(&self, g: &Graph, v: ValueId) -> Result<Option<Tensor>> {
        g.as_weight(v).map(|id| weight_tensor(self.module, self.store, id)).transpose()
    }

    fn constant(&mut self, g: &Graph, v: ValueId) -> Result<Value> {
        let id = g.as_weight(v).ok_or_else(|| Diag::bug("a constant that is no weight"))?;
        let (ty, name) = (self.module.weights[id].ty.clone(), self.module.weights[id].name.clone());
        let (mem, dims) = (mem_of(ty.elem)?, dims_of(&ty)?);
        if dims.iter().product::<u64>() == 1 {
            let tensor = weight_tensor(self.module, self.store, id)?;
            let mut body = Body::new(dims.len());
            let num = mem.num();
            let root = match tensor.ty.elem {
                ElemTy::Q(s) if *s.format != formats::INT8 => {
                    let code = tensor.code_bytes()?.first().copied().unwrap_or(0);
                    body.int(num, code.into())
                }
                _ if num.is_float() => body.real(num, tensor.reals()[0]),
                _ => body.int(num, tensor.ints()[0] as i64),
            };
            return Ok(Value::Lazy(Rc::new(Lazy { mem, dims, body, root, product: None })));
        }
        let source = match ty.elem {
            ElemTy::Q(s) if s.format.bits < 8 => {
                let tensor = weight_tensor(self.module, self.store, id)?;
                BlobSource::Made(tensor.code_bytes()?.to_vec())
            }
            _ => BlobSource::Weight(id),
        };
        let bytes = dims.iter().product::<u64>() * mem.bytes();
        let place = self.blob(&name, source, bytes);
        Ok(Value::View(View::dense(place, mem, &dims)))
    }

    fn blob(&mut self, name: &str, source: BlobSource, bytes: u64) -> Place {
        if let Some(&known) = self.blob_index.get(&source) {
            return Place::Blob(known);
        }
        let index = self.blobs.len() as u32;
        self.blob_index.insert(source.clone(), index);
        self.blobs.push(EngineBlob { name: name.into(), source, streamed: true, bytes: Some(bytes) });
        Place::Blob(index)
    }

    /// Fresh memory for an array, row after row.
    fn buffer(&mut self, mem: Mem, dims: &[u64]) -> Result<View> {
        let size = dims.iter().try_fold(mem.bytes(), |n, &d| n.checked_mul(d));
        let size = size
            .filter(|&n| n < MAX_BUFFER_BYTES)
            .ok_or_else(|| Diag::target(format!("an array of extents {dims:?} is too large")))?;
        self.buffers.push(size.max(1));
        Ok(View::dense(Place::Buffer(self.buffers.len() - 1), mem, dims))
    }

    /// Fresh memory with the axes in an order, the outermost first.
    fn buffer_in(&mut self, mem: Mem, dims: &[u64], layout: &[usize]) -> Result<View> {
        let mut view = self.buffer(mem, dims)?;
        let moved: Vec<u64> = layout.iter().map(|&a| dims[a]).collect();
        for (&axis, stride) in layout.iter().zip(strides(&moved)) {
            view.at.strides[axis] = stride;
        }
        Ok(view)
    }

    /// Adds a launch of a nest that stores `root` for each index of `dims` (and the fold's) at `to`.
    fn nest(&mut self, body: Body, spec: NestSpec, out: Place) {
        if spec.extents()[..spec.dims.len()].contains(&0) {
            return;
        }
        let spec = NestSpec { nodes: body.nodes, inputs: body.inputs.len() as u16, ..spec }.simplified();
        let mut args = body.inputs;
        args.push(out);
        let items = spec.items();
        self.steps.push(Step {
            name: self.name.clone(),
            spec: KernelSpec::Nest(spec),
            args,
            items,
            part: self.part,
        });
    }

    /// The value in memory, in the order of axes that it likes.
    fn stored(&mut self, value: &Value) -> Result<View> {
        match value {
            Value::View(v) => Ok(v.clone()),
            Value::Lazy(l) if l.product.is_some() => self.launch(l, None),
            Value::Lazy(_) => {
                let view = self.buffer_in(value.mem(), value.dims(), &value.layout())?;
                self.store_to(value, &view)?;
                Ok(view)
            }
        }
    }

    /// The value row after row.
    fn dense(&mut self, value: &Value) -> Result<View> {
        match value {
            Value::View(v) if v.is_dense() => Ok(v.clone()),
            Value::Lazy(l) if l.product.is_some() => {
                let all: Vec<usize> = (0..l.dims.len()).collect();
                self.launch(l, Some(&all))
            }
            _ => self.copied(value),
        }
    }

    /// The value row after row, in fresh memory.
    fn copied(&mut self, value: &Value) -> Result<View> {
        let value = self.without_product(value)?;
        let view = self.buffer(value.mem(), value.dims())?;
        self.store_to(&value, &view)?;
        Ok(view)
    }

    /// The value as something that any nest can read.
    fn without_product(&mut self, value: &Value) -> Result<Value> {
        if value.product().is_some() { self.stored(value).map(Value::View) } else { Ok(value.clone()) }
    }

    /// Stores a value, which reads no product, in an array.
    fn store_to(&mut self, value: &Value, to: &View) -> Result<()> {
        let rank = to.dims.len();
        let mut body = Body::new(rank);
        let root = body.absorb(value, &identity(rank));
        self.map_to(body, root, to);
        Ok(())
    }

    /// Stores an expression in an array.
    fn map_to(&mut self, body: Body, root: NodeId, to: &View) {
        let spec = NestSpec {
            name: "map".into(),
            dims: to.dims.clone(),
            fold: None,
            nodes: vec![],
            value: root,
            out: to.mem,
            to: To::At(to.at.clone()),
            inputs: 0,
        };
        self.nest(body, spec, to.place);
    }

    /// Launches a product with its expression.
    fn launch(&mut self, lazy: &Lazy, layout: Option<&[usize]>) -> Result<View> {
        let id = lazy.product.ok_or_else(|| Diag::bug("a product that is none"))?;
        let pending = self.pending[id].as_ref().ok_or_else(|| Diag::bug("a product is computed twice"))?;
        let (dims, layout) = (pending.dims.clone(), layout.unwrap_or(&pending.layout).to_vec());
        let view = self.buffer_in(lazy.mem, &dims, &layout)?;
        self.launch_to(lazy, &view)?;
        Ok(view)
    }

    /// Launches a product with its expression, whose numbers go into an array.
    fn launch_to(&mut self, lazy: &Lazy, view: &View) -> Result<()> {
        let id = lazy.product.ok_or_else(|| Diag::bug("a product that is none"))?;
        let pending = self.pending[id].take().ok_or_else(|| Diag::bug("a product is computed twice"))?;
        let name = std::mem::replace(&mut self.name, pending.name);
        match pending.what {
            Product::Conv { spec, x, w } => {
                let spec = ConvSpec {
                    nodes: lazy.body.nodes.clone(),
                    value: lazy.root,
                    out: lazy.mem,
                    to: view.at.clone(),
                    inputs: lazy.body.inputs.len() as u16,
                    ..spec
                };
                let spec = product::flattened(spec);
                let mut args = vec![x, w];
                args.extend(&lazy.body.inputs);
                args.push(view.place);
                let (items, name) = (spec.items(self.target), self.name.clone());
                self.steps.push(Step { name, spec: KernelSpec::Conv(spec), args, items, part: self.part });
            }
            Product::Fold { mut body, of, over } => {
                let outer = pending.dims.len();
                let map: Vec<Affine> = (0..outer).map(|a| Affine::axis(a, body.rank)).collect();
                let inputs: Vec<u16> = lazy.body.inputs.iter().map(|&p| body.input(p)).collect();
                let value = product::appended(&mut body, &lazy.body.nodes, lazy.root, &map, &inputs);
                let mut at = view.at.clone();
                at.strides.extend(over.iter().map(|_| 0));
                let spec = NestSpec {
                    name: "windows".into(),
                    dims: pending.dims.clone(),
                    fold: Some(Fold { dims: over, kind: FoldKind::Sum, of, each: None }),
                    nodes: vec![],
                    value,
                    out: lazy.mem,
                    to: To::At(at),
                    inputs: 0,
                };
                self.nest(body, spec, view.place);
            }
        }
        self.name = name;
        Ok(())
    }

    /// An expression as a value; it is stored when it has grown too large.
    fn lazy(&mut self, mem: Mem, dims: &[u64], body: Body, root: NodeId) -> Result<Value> {
        self.lazy_after(mem, dims, body, root, None)
    }

    fn lazy_after(
        &mut self,
        mem: Mem,
        dims: &[u64],
        body: Body,
        root: NodeId,
        product: Option<usize>,
    ) -> Result<Value> {
        let large = body.nodes.len() > MOST_NODES || body.inputs.len() > MOST_INPUTS;
        let value = Value::Lazy(Rc::new(Lazy { mem, dims: dims.to_vec(), body, root, product }));
        if large { self.stored(&value).map(Value::View) } else { Ok(value) }
    }

    fn finish(
        self,
        given: &[(TensorTy, Place)],
        made: &[(TensorTy, Place)],
        inputs: &[String],
        outputs: &[String],
    ) -> Result<Arrays> {
        let end = self.steps.len();
        let mut live: Vec<Option<(usize, usize)>> = vec![None; self.buffers.len()];
        let touch = |live: &mut Vec<Option<(usize, usize)>>, place: &Place, at: usize| {
            if let Place::Buffer(b) = place {
                let span = live[*b].get_or_insert((at, at));
                *span = (span.0.min(at), span.1.max(at));
            }
        };
        // Step 0 is the caller, who gives the inputs; the last is the caller again.
        given.iter().for_each(|(_, p)| touch(&mut live, p, 0));
        for (i, step) in self.steps.iter().enumerate() {
            step.args.iter().for_each(|p| touch(&mut live, p, i + 1));
        }
        made.iter().for_each(|(_, p)| touch(&mut live, p, end + 1));
        let buffers: Vec<Buffer> = (self.buffers.iter().zip(&live))
            .map(|(&bytes, live)| {
                let (from, to) = live.unwrap_or((0, 0));
                Buffer { bytes: if live.is_some() { bytes } else { 1 }, live: from..=to }
            })
            .collect();
        let arena = schedule::plan(&buffers);
        if arena.bytes > MAX_BUFFER_BYTES {
            return Err(Diag::target(format!("the graph needs {} bytes for its values", arena.bytes)));
        }
        let at = |place: Place| match place {
            Place::Buffer(b) => Ref::arena(arena.offsets[b]),
            Place::Blob(i) => Ref::weight(i),
        };
        let bytes = |place: &Place| match place {
            Place::Buffer(b) => Some((arena.offsets[*b], arena.offsets[*b] + buffers[*b].bytes)),
            Place::Blob(_) => None,
        };
        let meet = |a: &Place, b: &Place| match (bytes(a), bytes(b)) {
            (Some(a), Some(b)) => a.0 < b.1 && b.0 < a.1,
            _ => false,
        };
        // A step may run beside those since the last barrier when none writes what the other touches; parts of one
        // array are written by steps of their own.
        let clash = |a: &Step, b: &Step| {
            let (Some((to_a, from_a)), Some((to_b, from_b))) = (a.args.split_last(), b.args.split_last())
            else {
                return true;
            };
            let parts = to_a == to_b && a.part && b.part;
            (meet(to_a, to_b) && !parts)
                || from_b.iter().any(|p| meet(to_a, p))
                || from_a.iter().any(|p| meet(to_b, p))
        };
        let mut free = vec![false; end];
        let mut running = 0;
        for next in 1..end {
            if self.steps[running..next].iter().any(|s| clash(s, &self.steps[next])) {
                running = next;
            } else {
                free[next - 1] = true;
            }
        }
        let launches = self.steps.iter().zip(&free).map(|(step, &free)| Launch {
            name: step.name.clone(),
            spec: step.spec.clone(),
            args: step.args.iter().map(|&p| at(p)).collect(),
            items: Items::fixed(step.items),
            overlaps_next: free,
        });
        let array = |(i, (ty, place)): (usize, &(TensorTy, Place)), names: &[String]| -> Result<Array> {
            Ok(Array {
                name: names.get(i).cloned().unwrap_or_else(|| i.to_string()),
                elem: ty.elem.to_string(),
                elem_bytes: mem_of(ty.elem)?.bytes() as u32,
                dims: dims_of(ty)?,
                at: at(*place),
            })
        };
        Ok(Arrays {
            launches: launches.collect(),
            inputs: given.iter().enumerate().map(|x| array(x, inputs)).collect::<Result<_>>()?,
            outputs: made.iter().enumerate().map(|x| array(x, outputs)).collect::<Result<_>>()?,
            arena_bytes: arena.bytes.max(schedule::ALIGN),
            blobs: self.blobs,
        })
    }
}

/// `0`, with as many axes as an index space has.
fn origin(rank: usize) -> Affine {
    Affine::constant(0, rank)
}
