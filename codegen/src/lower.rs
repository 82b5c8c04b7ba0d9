//! Turns a module into launches: which kernels run, on which buffers, in which order.
//!
//! Layers are inlined at their calls. Each op becomes at most one launch; reshapes and state reads become none. What
//! an op needs is described as a [`KernelSpec`], so two layers of the same shape share their kernels. The arena is
//! planned once for the largest call ([`crate::schedule`]), and launches that touch no common bytes run without a
//! barrier between them.
//!
//! Nothing here decides numerics: the order of operations is that of the graph, and an op that no kernel computes is
//! an error that names it.

use crate::backend::{MatmulWeight, Order};
use crate::cpu::attention::{AttentionSpec, KvSource};
use crate::cpu::cache::{CODE_COLUMNS, CacheAppendSpec, CacheTy, Role};
use crate::cpu::gather::GatherSpec;
use crate::cpu::rope::{RopeSpec, RopeStyle, RopeTableSpec};
use crate::cpu::row::{RowCount, RowSpec};
use crate::cuda::plan;
use crate::cuda::tiles::ROWS;
use crate::eexpr::{BinaryOp, EExpr, F32, MemTy, NodeId, OutputKind, UnaryOp};
use crate::schedule::{self, Buffer};
use crate::spec::{AFmt, KernelSpec, MRange, MatmulSpec, Rows, bf16_row_stride};
use quantc_ir::diag::{Diag, Loc, Result};
use quantc_ir::entity::{StateId, ValueId, WeightId};
use quantc_ir::formats;
use quantc_ir::graph::{Def, Graph, Node};
use quantc_ir::module::Module;
use quantc_ir::ops::{self, Op, QMATMUL_EXTRAS, Step as EpilogueStep};
use quantc_ir::scheme::{Group, Scheme};
use quantc_ir::target::{GpuDesc, TargetDesc};
use quantc_ir::ty::{Dim, ElemTy, Float, TensorTy};
use quantc_ir::weights::{Digest, Store};
use quantc_runtime::format::{Input, Items, MAX_BUFFER_BYTES, Ref, Sym, slot_rows};
use std::collections::BTreeMap;

/// Sizes of an engine that are not the model's.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most tokens of one call.
    pub max_tokens: u32,
    /// Most rows of results of one call.
    pub max_rows: u32,
    /// Rows of one sequence's state.
    pub context: u32,
    /// Every call has `max_tokens` tokens: there are no kernels made for fewer.
    pub always_full: bool,
}

/// The token classes that kernels are compiled for: bounds of each, ascending.
pub fn classes(max_tokens: u32) -> Vec<MRange> {
    classes_of(Order::Panels, max_tokens)
}

fn classes_of(order: Order, max_tokens: u32) -> Vec<MRange> {
    let bounds: &[u32] = match order {
        Order::Panels => &[1, 4, 16, u32::MAX],
        // Products of warps take 8 tokens at a time; beyond 64 they are bound by arithmetic.
        Order::Fragments => &[1, 8, 16, 32, 64, u32::MAX],
    };
    let mut from = 1;
    let mut classes = vec![];
    for &to in bounds {
        if from <= max_tokens {
            classes.push(MRange { min: from, max: to.min(max_tokens) });
        }
        from = to.saturating_add(1);
    }
    classes
}

/// Bytes that the engine keeps in `weights.bin`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BlobSource {
    /// A weight as the module stores it.
    Weight(WeightId),
    /// A derived blob of the store.
    Stored(Digest),
    /// Bytes made by the code generator.
    Made(Vec<u8>),
}

/// One blob with its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineBlob {
    /// For people.
    pub name: String,
    /// Where the bytes come from.
    pub source: BlobSource,
    /// Whether every token reads all of it.
    pub streamed: bool,
    /// The bytes that kernels expect of a stored blob.
    pub bytes: Option<u64>,
}

/// A value on the way to its launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Buffer(usize),
    Blob(u32),
    State(u32),
    Input(Input),
    /// Per-worker memory.
    Scratch,
}

impl Place {
    fn buffer(&self) -> Option<usize> {
        match self {
            Place::Buffer(b) => Some(*b),
            _ => None,
        }
    }
}

/// A launch before buffers have addresses.
#[derive(Clone, Debug)]
struct Step {
    name: String,
    spec: KernelSpec,
    reads: Vec<Place>,
    writes: Vec<Place>,
    /// Arguments in the kernel's order.
    args: Vec<Place>,
    items: Items,
    tap: Option<StepTap>,
    tiles: Tiles,
}

/// What a step has to do with tiles of rows, which calls of many tokens have on some GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tiles {
    /// Nothing.
    None,
    /// It makes them: only such calls have it.
    Made,
    /// It reads them there, in place of its first argument.
    Read(Place),
}

/// A value worth comparing after a step: its name, buffer, rows and columns.
#[derive(Clone, Debug)]
struct StepTap {
    name: String,
    buffer: usize,
    rows: Rows,
    width: u32,
}

impl Step {
    /// Whether the kernel makes rows from rows, one after the other, with little work for each.
    fn is_short(&self) -> bool {
        matches!(
            self.spec,
            KernelSpec::Row(_) | KernelSpec::Rope(_) | KernelSpec::RopeTable(_) | KernelSpec::Gather(_)
        )
    }
}

/// A launch of one token class.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What it computes.
    pub name: String,
    /// The kernel.
    pub spec: KernelSpec,
    /// The kernel's symbol.
    pub symbol: String,
    /// Arguments.
    pub args: Vec<Ref>,
    /// Number of work items.
    pub items: Items,
    /// A value worth comparing after it.
    pub tap: Option<Rows32>,
    /// Whether the next launch may begin before all workers have finished this one.
    pub overlaps_next: bool,
    /// Whether every worker runs all items, for itself.
    pub replicated: bool,
}

/// A module as launches.
#[derive(Clone, Debug)]
pub struct Lowered {
    /// Token classes with their launches.
    pub programs: Vec<(MRange, Vec<Launch>)>,
    /// What `weights.bin` holds.
    pub blobs: Vec<EngineBlob>,
    /// States with the bytes of one row.
    pub states: Vec<(String, u64)>,
    /// Where the result lies.
    pub output: Ref,
    /// Columns of the result.
    pub width: u32,
    /// Rows that are given before a call.
    pub row_inputs: Vec<Rows32>,
    /// Rows that may be read after a call, besides the result.
    pub row_outputs: Vec<Rows32>,
    /// Bytes of the arena.
    pub arena_bytes: u64,
    /// Bytes of each worker's scratch.
    pub scratch_bytes: u64,
}

/// Rows of f32.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows32 {
    /// The value's name.
    pub name: String,
    /// Where they lie.
    pub at: Ref,
    /// What counts them.
    pub rows: Rows,
    /// Columns.
    pub width: u32,
}

/// Lowers `module` for a processor. Weights of matmuls are packed through the store unless `pack-weights` has done so.
pub fn lower(module: &Module, store: &Store, limits: Limits) -> Result<Lowered> {
    lower_on(None, module, store, limits)
}

/// Lowers `module` for a target.
///
/// What differs for a GPU: launches follow each other, so none is run by every worker; caches lie in pages, which kernels
/// find through a table; there is no scratch, and there are other classes of tokens. Where groups of warps multiply, calls of
/// many tokens have launches of their own, which put rows into tiles ([`plan::token_tiles`]).
pub fn lower_for(target: &TargetDesc, module: &Module, store: &Store, limits: Limits) -> Result<Lowered> {
    lower_on(target.gpu, module, store, limits)
}

fn lower_on(gpu: Option<&GpuDesc>, module: &Module, store: &Store, limits: Limits) -> Result<Lowered> {
    let order = if gpu.is_some() { Order::Fragments } else { Order::Panels };
    let mut cx = Lowering {
        order,
        gpu,
        module,
        store,
        limits,
        steps: vec![],
        buffers: vec![],
        blobs: vec![],
        blob_index: BTreeMap::new(),
        states: module
            .states
            .iter()
            .map(|(_, s)| Ok((s.name.clone(), state_row_bytes(order, &s.ty)?)))
            .collect::<Result<_>>()?,
        scratch_bytes: 0,
    };
    let (params, row_inputs) = cx.params(&module.main)?;
    let results = cx.graph(&module.main, "main", params)?;
    let (Some(&result), Some(value)) = (module.main.results.first(), results.first()) else {
        return Err(Diag::target("@main has no result"));
    };
    let ty = module.main.ty(result);
    let (rows, _) = matrix(ty)?;
    let encoder = module.facts.get("kind").is_some_and(|kind| kind == "encoder");
    if rows == Rows::T && !encoder {
        let what = "the result of @main has a row for each token, decoders give the rows that are wanted";
        return Err(Diag::target(what).help("put `last_rows` in front of the last product"));
    }
    let out = named_rows(&module.main, result, value)?;
    let more = module.main.results.iter().zip(&results).skip(1);
    let more: Vec<NamedRows> =
        more.map(|(&v, val)| named_rows(&module.main, v, val)).collect::<Result<_>>()?;
    if let Some(of_wanted) = module.main.results[1..]
        .iter()
        .find(|&&v| !encoder && matrix(module.main.ty(v)).is_ok_and(|m| m.0 == Rows::R))
    {
        let ty = module.main.ty(*of_wanted);
        return Err(Diag::target(format!(
            "a further result of @main has type {ty}, engines give a row for each token"
        )));
    }
    cx.finish(&out, &row_inputs, &more)
}

/// A buffer that the caller writes or reads.
struct NamedRows {
    name: String,
    buffer: usize,
    width: u32,
}

/// A result of `main` as rows of f32 that a kernel makes or the caller gives.
fn named_rows(graph: &Graph, v: ValueId, val: &Val) -> Result<NamedRows> {
    let ty = graph.ty(v);
    let (_, width) = matrix(ty)?;
    let Place::Buffer(buffer) = val.place else {
        return Err(Diag::target("a result of @main is not computed by any op"));
    };
    if ty.elem != ElemTy::F32 {
        return Err(Diag::target(format!("a result of @main has type {ty}, engines give f32")));
    }
    let name = graph.value(v).name.clone().unwrap_or_else(|| format!("result{}", buffer));
    Ok(NamedRows { name, buffer, width })
}

fn state_row_bytes(order: Order, ty: &TensorTy) -> Result<u64> {
    let dims = ty.shape.dims().filter(|d| !d.is_empty());
    let mut dims = dims.ok_or_else(|| Diag::target(format!("a state of type {ty} has no fixed rows")))?;
    if let (Order::Fragments, &[_, heads, columns]) = (order, &dims[..]) {
        return Ok(plan::state_row_bytes(cache_ty(ty)?, small(heads, ty)?, small(columns, ty)?));
    }
    if let (ElemTy::Q(_), [_, .., columns]) = (ty.elem, &mut dims[..]) {
        *columns = columns.next_multiple_of(u64::from(CODE_COLUMNS));
    }
    let row = dims[1..].iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let bytes = row.and_then(|n| n.checked_mul(u64::from(ty.elem.bits()))).map(|b| b.div_ceil(8));
    bytes.ok_or_else(|| Diag::target(format!("a state of type {ty} is too large")))
}

/// A value and, for quantized activations, what else the matmuls want of it.
#[derive(Clone, Debug)]
struct Val {
    place: Place,
    /// Group length -> group sums of a quantized activation.
    sums: Vec<(u32, Place)>,
    /// Scales of a quantized activation.
    scale: Option<Place>,
}

impl Val {
    fn plain(place: Place) -> Val {
        Val { place, sums: vec![], scale: None }
    }
}

struct Lowering<'a> {
    order: Order,
    /// The GPU, where there is one.
    gpu: Option<&'a GpuDesc>,
    module: &'a Module,
    store: &'a Store,
    limits: Limits,
    steps: Vec<Step>,
    buffers: Vec<Size>,
    blobs: Vec<EngineBlob>,
    blob_index: BTreeMap<BlobSource, u32>,
    states: Vec<(String, u64)>,
    scratch_bytes: u64,
}

/// The size of a buffer.
#[derive(Clone, Copy, Debug)]
struct Size {
    row_bytes: u64,
    /// Rows of the largest call.
    rows: u32,
}

impl Size {
    /// Bytes in calls of at most `rows` rows.
    fn bytes(self, rows: u32) -> u64 {
        self.row_bytes * u64::from(self.rows.min(rows))
    }
}

/// Rows and columns of a value: the symbol that counts rows, rows per symbol, columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    rows: Rows,
    per: u32,
    cols: u32,
}

impl Extent {
    fn count(self) -> RowCount {
        RowCount { sym: self.rows, per: self.per }
    }
    fn items(self) -> Items {
        match self.rows {
            Rows::T => Items { n: u64::from(self.per), sym: Sym::T as i32, div: 1 },
            Rows::R => Items { n: u64::from(self.per), sym: Sym::R as i32, div: 1 },
        }
    }
    /// All columns of one symbol.
    fn width(self) -> u32 {
        self.per * self.cols
    }
}

fn small(n: u64, ty: &TensorTy) -> Result<u32> {
    u32::try_from(n)
        .ok()
        .filter(|&n| n < 1 << 28)
        .ok_or_else(|| Diag::target(format!("{ty} is too large for a kernel")))
}

/// The extent of a value whose first axis is symbolic and whose last axis is a row.
fn extent(ty: &TensorTy) -> Result<Extent> {
    let rows = match ty.shape.0.first() {
        Some(Dim::Sym('r')) => Rows::R,
        Some(Dim::Sym('t' | '?')) => Rows::T,
        _ => {
            return Err(Diag::target(format!("a value of type {ty} is computed when the engine runs")).help(
                "kernels compute one row per token (`?t`) or per result (`?r`); run `fold-constants`",
            ));
        }
    };
    let fixed = |d: &Dim| d.fixed().ok_or_else(|| Diag::target(format!("{ty} has two symbolic extents")));
    let dims: Vec<u64> = ty.shape.0[1..].iter().map(fixed).collect::<Result<_>>()?;
    let (&cols, outer) = dims.split_last().unwrap_or((&1, &[]));
    let per = outer.iter().fold(1u64, |n, &d| n.saturating_mul(d));
    small(per.saturating_mul(cols), ty)?;
    Ok(Extent { rows, per: small(per, ty)?, cols: small(cols, ty)? })
}

/// The symbol that counts rows, and all columns of one.
fn matrix(ty: &TensorTy) -> Result<(Rows, u32)> {
    let e = extent(ty)?;
    Ok((e.rows, e.width()))
}

fn mem(ty: &TensorTy) -> Result<MemTy> {
    match ty.elem {
        ElemTy::F32 => Ok(MemTy::F32),
        ElemTy::F16 => Ok(MemTy::F16),
        ElemTy::Bf16 => Ok(MemTy::Bf16),
        ElemTy::F64 | ElemTy::Int(_) | ElemTy::Q(_) => {
            Err(Diag::target(format!("a value of type {ty} is read as float")))
        }
    }
}

/// One operand of an op, as kernels see it.
#[derive(Clone, Copy)]
struct Operand<'a> {
    val: &'a Val,
    ty: &'a TensorTy,
}

impl Operand<'_> {
    /// Refuses what is not rows of f32, one or some for each token of the call, or for each result.
    fn f32_rows(&self, what: &str, rows: Rows) -> Result<()> {
        if self.ty.elem != ElemTy::F32 || extent(self.ty)?.rows != rows {
            let each = if rows == Rows::T { "token" } else { "result" };
            return Err(Diag::target(format!(
                "{what} of type {} have no kernel: they must be f32, for each {each}",
                self.ty
            )));
        }
        Ok(())
    }
}

impl Lowering<'_> {
    /// The inputs of `main`: ids, i32 for each token, at most two, and rows of f32.
    fn params(&mut self, main: &Graph) -> Result<(Vec<Val>, Vec<NamedRows>)> {
        let mut ids = [Input::Tokens, Input::Types].into_iter();
        let (mut params, mut rows) = (vec![], vec![]);
        for &param in &main.params {
            let ty = main.ty(param);
            let of_tokens = extent(ty)?.rows == Rows::T;
            if ty.elem == ElemTy::F32 && of_tokens && ty.rank() > 1 {
                let val = Val::plain(self.buffer(ty)?);
                rows.push(named_rows(main, param, &val)?);
                params.push(val);
                continue;
            }
            if ty.elem != ElemTy::I32 || ty.rank() != 1 || !of_tokens {
                return Err(Diag::target(format!(
                    "an input of @main has type {ty}, engines take ids, i32 for each token, and rows of f32"
                )));
            }
            let input = ids
                .next()
                .ok_or_else(|| Diag::target("@main has more than 2 inputs of ids, engines take 2"))?;
            params.push(Val::plain(Place::Input(input)));
        }
        Ok((params, rows))
    }

    fn graph(&mut self, graph: &Graph, function: &str, params: Vec<Val>) -> Result<Vec<Val>> {
        let mut values: BTreeMap<ValueId, Val> = graph.params.iter().copied().zip(params).collect();
        for (_, node) in graph.ops() {
            let result = self.op(graph, function, node, &mut values).map_err(|e| {
                let name = graph.value(node.result).name.as_deref().unwrap_or(node.op.name());
                e.at(Loc::Item(format!("%{name} = {} in @{function}", node.op.name())))
            })?;
            values.insert(node.result, result);
        }
        let missing = || Diag::target(format!("a result of @{function} is not computed by any op"));
        graph.results.iter().map(|r| values.get(r).cloned().ok_or_else(missing)).collect()
    }

    fn buffer(&mut self, ty: &TensorTy) -> Result<Place> {
        let (rows, width) = matrix(ty)?;
        Ok(self.buffer_of(rows, u64::from(width) * u64::from(ty.elem.bits().div_ceil(8))))
    }

    fn buffer_of(&mut self, rows: Rows, row_bytes: u64) -> Place {
        let most = match rows {
            Rows::T => self.limits.max_tokens,
            Rows::R => self.limits.max_rows,
        };
        self.buffers.push(Size { row_bytes, rows: most });
        Place::Buffer(self.buffers.len() - 1)
    }

    /// A blob that some tokens read rows of, or that is small.
    fn blob(&mut self, name: &str, source: BlobSource) -> Place {
        self.add_blob(EngineBlob { name: name.into(), source, streamed: false, bytes: None })
    }

    fn add_blob(&mut self, blob: EngineBlob) -> Place {
        let next = self.blobs.len() as u32;
        let index = *self.blob_index.entry(blob.source.clone()).or_insert(next);
        if index == next {
            self.blobs.push(blob);
        }
        Place::Blob(index)
    }

    /// The value of an operand; weights become blobs when they are first read.
    fn value(&mut self, graph: &Graph, v: ValueId, values: &mut BTreeMap<ValueId, Val>) -> Result<Val> {
        if let Some(val) = values.get(&v) {
            return Ok(val.clone());
        }
        let val = match graph.value(v).def {
            Def::Weight(w) => {
                let w = quantc_ir::weights::resolve(&self.module.weights, w)?;
                let name = self.module.weights[w].name.clone();
                Val::plain(self.blob(&name, BlobSource::Weight(w)))
            }
            Def::State(s) => Val::plain(Place::State(self.state_index(s))),
            _ => return Err(Diag::bug("an operand is read before it is computed")),
        };
        values.insert(v, val.clone());
        Ok(val)
    }

    fn state_index(&self, s: StateId) -> u32 {
        quantc_ir::entity::Entity::index(s) as u32
    }

    fn launch(&mut self, name: &str, spec: KernelSpec, reads: &[Place], writes: &[Place], items: Items) {
        let args = reads.iter().chain(writes).copied().collect();
        let (reads, writes) = (reads.to_vec(), writes.to_vec());
        let (tap, tiles) = (None, Tiles::None);
        self.steps.push(Step { name: name.into(), spec, reads, writes, args, items, tap, tiles });
    }

    /// A row kernel over `inputs` with one output of type `out`.
    fn row(
        &mut self,
        name: &str,
        spec: RowSpec,
        inputs: &[Place],
        at: Extent,
        out: &TensorTy,
    ) -> Result<Val> {
        let place = self.buffer(out)?;
        self.launch(name, KernelSpec::Row(spec), inputs, &[place], at.items());
        Ok(Val::plain(place))
    }

    fn op(
        &mut self,
        graph: &Graph,
        function: &str,
        node: &Node,
        values: &mut BTreeMap<ValueId, Val>,
    ) -> Result<Val> {
        let out = graph.ty(node.result);
        let name = launch_name(function, graph, node);
        let is_matmul = matches!(node.op, Op::MatMul(_) | Op::QMatMul(_));
        let mut operands: Vec<Option<Val>> = vec![];
        for (i, &a) in node.args.iter().enumerate() {
            // The weight operands of a matmul are read packed, not as they are.
            let packed =
                is_matmul && (1..fixed_operands(&node.op)).contains(&i) && graph.as_weight(a).is_some();
            let absent = graph.is_none(a) || packed;
            operands.push(if absent { None } else { Some(self.value(graph, a, values)?) });
        }
        let get = |i: usize| -> Result<Operand<'_>> {
            let val = operands.get(i).and_then(Option::as_ref);
            let val =
                val.ok_or_else(|| Diag::bug(format!("operand {i} of `{}` is missing", node.op.name())))?;
            Ok(Operand { val, ty: graph.ty(node.args[i]) })
        };
        match &node.op {
            Op::Positions(_) => Ok(Val::plain(Place::Input(Input::Positions))),
            Op::Reshape(_) => Ok(get(0)?.val.clone()),
            Op::Call(call) => {
                let id = self.module.layer(&call.layer);
                let id = id.ok_or_else(|| Diag::input(format!("there is no layer @{}", call.layer)))?;
                let layer = &self.module.layers[id];
                let args: Vec<Val> = operands.iter().flatten().cloned().collect();
                let mut results = self.graph(&layer.graph, &layer.name, args)?;
                let result = results.pop().ok_or_else(|| Diag::input("a layer without a result"))?;
                // What `main` gives is compared as its result.
                if !graph.is_result(node.result) {
                    self.tap(&layer.name, &result, out);
                }
                Ok(result)
            }
            Op::Embedding(e) => {
                let (ids, table) = (get(0)?, get(1)?);
                let Some([rows, width]) = table.ty.shape.dims().and_then(|d| <[u64; 2]>::try_from(d).ok())
                else {
                    return Err(Diag::target(format!("a table of type {}", table.ty)));
                };
                let spec = GatherSpec {
                    width: small(width, table.ty)?,
                    table_rows: small(rows, table.ty)?,
                    ty: mem(table.ty)?,
                    add: false,
                };
                if ElemTy::from(e.to) != ElemTy::F32 {
                    return Err(Diag::target("embeddings are gathered as f32"));
                }
                let at = extent(out)?;
                let place = self.buffer(out)?;
                let reads = [ids.val.place, table.val.place];
                self.launch(&name, KernelSpec::Gather(spec), &reads, &[place], at.items());
                Ok(Val::plain(place))
            }
            Op::RopeTable(table) => {
                let bytes = table.frequencies().iter().flat_map(|f| f.to_le_bytes()).collect();
                let frequencies = self.blob("rope.frequencies", BlobSource::Made(bytes));
                let spec = RopeTableSpec { half: table.size / 2, factor: F32::new(1.0) };
                let place = self.buffer(out)?;
                let reads = [get(0)?.val.place, frequencies];
                self.launch(&name, KernelSpec::RopeTable(spec), &reads, &[place], extent(out)?.items());
                Ok(Val::plain(place))
            }
            Op::Rope(rope) => {
                let (x, table) = (get(0)?, get(1)?);
                let at = extent(x.ty)?;
                x.f32_rows("rotated heads", at.rows)?;
                table.f32_rows("angles", at.rows)?;
                let spec = RopeSpec {
                    heads: at.per,
                    head_dim: at.cols,
                    rotary_dim: matrix(table.ty)?.1,
                    x_stride: at.width(),
                    out_stride: at.width(),
                    style: match rope.style {
                        ops::RopeStyle::Half => RopeStyle::Half,
                        ops::RopeStyle::Interleaved => RopeStyle::Interleaved,
                    },
                    // Items tell processors.
                    rows: if self.gpu.is_some() { at.rows } else { Rows::T },
                };
                let place = self.buffer(out)?;
                let items = Extent { per: 1, ..at }.items();
                self.launch(&name, KernelSpec::Rope(spec), &[x.val.place, table.val.place], &[place], items);
                Ok(Val::plain(place))
            }
            Op::CacheAppend(_) => {
                let scales =
                    fixed_cache_scales(graph, node).map(|v| self.value(graph, v, values)).transpose()?;
                self.cache_append(&name, graph, node, get(0)?, get(1)?, scales.map(|s| s.place))
            }
            Op::Attention(attention) => {
                let scales = [3, 4].map(|i| operands[i].as_ref().map(|scale| scale.place));
                self.attention(&name, attention, [get(0)?, get(1)?, get(2)?], scales, out)
            }
            Op::LastRows(_) => {
                let x = get(0)?;
                let (from, to) = (extent(x.ty)?, extent(out)?);
                if from.rows == Rows::R {
                    return Ok(x.val.clone());
                }
                let ty = mem(x.ty)?;
                let spec = RowSpec::copy_last_rows(from.width(), ty, ty);
                let at = Extent { per: 1, cols: to.width(), ..to };
                self.row(&name, spec, &[x.val.place], at, out)
            }
            Op::RmsNorm(norm) => {
                let x = get(0)?;
                let at = extent(x.ty)?;
                let gain = operands[1].as_ref().map(|_| get(1)).transpose()?;
                let spec = norm_spec(norm.eps.0 as f32, at, x.ty, gain.map(|g| g.ty), None, false)?;
                let mut reads = vec![x.val.place];
                reads.extend(gain.map(|g| g.val.place));
                self.row(&name, spec, &reads, at, out)
            }
            Op::LayerNorm(norm) => {
                let x = get(0)?;
                let at = extent(x.ty)?;
                let gain = operands[1].as_ref().map(|_| get(1)).transpose()?;
                let bias = operands[2].as_ref().map(|_| get(2)).transpose()?;
                let spec =
                    norm_spec(norm.eps.0 as f32, at, x.ty, gain.map(|g| g.ty), bias.map(|b| b.ty), true)?;
                let mut reads = vec![x.val.place];
                reads.extend(gain.map(|g| g.val.place));
                reads.extend(bias.map(|b| b.val.place));
                self.row(&name, spec, &reads, at, out)
            }
            Op::Add(_) => self.binary(&name, BinaryOp::Add, get(0)?, get(1)?, out),
            Op::Mul(_) => self.binary(&name, BinaryOp::Mul, get(0)?, get(1)?, out),
            Op::Silu(_) => self.unary(&name, UnaryOp::Silu, get(0)?, out),
            Op::Relu(_) => self.unary(&name, UnaryOp::Relu, get(0)?, out),
            Op::Tanh(_) => self.unary(&name, UnaryOp::Tanh, get(0)?, out),
            Op::Gelu(g) => {
                let op = if g.approx { UnaryOp::GeluTanh } else { UnaryOp::GeluErf };
                self.unary(&name, op, get(0)?, out)
            }
            // Rows are rounded on their way into the cache.
            Op::Cast(_) | Op::Quantize(_) if only_feeds_caches(graph, node) => Ok(get(0)?.val.clone()),
            Op::Cast(_) if only_feeds_products(graph, node) => self.round_rows(&name, graph, node, get(0)?),
            Op::Cast(_) => {
                let x = get(0)?;
                let at = extent(x.ty)?;
                let at = Extent { per: 1, cols: at.width(), ..at };
                let spec = RowSpec::copy(at.cols, mem(x.ty)?, at.cols, 0, mem(out)?, at.cols);
                self.row(&name, spec.with_rows(at.count()), &[x.val.place], at, out)
            }
            // The scale is computed together with the codes; `quantize` makes the launch.
            Op::DynamicScale(_) if only_scales_codes(graph, node) => Ok(get(0)?.val.clone()),
            Op::DynamicScale(_) => Err(Diag::target("a scale that is read as a number has no kernel")
                .help("kernels compute the scales of rows together with their codes")),
            // Codes of floats are read as the numbers they stand for; `dequantize` makes the launch.
            Op::Quantize(_) if only_rounds_to_e4m3(graph, node) => Ok(get(0)?.val.clone()),
            Op::Quantize(_) => self.quantize(&name, graph, node, get(0)?, get(1)?),
            Op::MatMul(matmul) => {
                self.matmul(&name, graph, node, get(0)?, &matmul.epilogue, &matmul.packed, &operands[2..])
            }
            Op::QMatMul(matmul) => {
                let extras = &operands[QMATMUL_EXTRAS..];
                self.matmul(&name, graph, node, get(0)?, &matmul.epilogue, &matmul.packed, extras)
            }
            Op::Dequantize(_) if rounding_to_e4m3(graph, node).is_some() => {
                self.round_to_e4m3(&name, graph, node, get(0)?, get(1)?)
            }
            Op::Dequantize(_) => Err(Diag::target("expanding a quantized tensor has no kernel")
                .help("run `fuse-dequant-matmul`, so that the product reads the codes")),
            _ => Err(Diag::target(format!("`{}` has no kernel", node.op.name()))
                .help("run `fold-constants`; on values computed by the engine it is not supported")),
        }
    }

    /// Marks the value of a layer's result as worth comparing.
    fn tap(&mut self, layer: &str, result: &Val, ty: &TensorTy) {
        let (Place::Buffer(buffer), Ok((rows, width))) = (result.place, matrix(ty)) else { return };
        if ty.elem != ElemTy::F32 {
            return;
        }
        let writer = self.steps.iter_mut().rev().find(|s| s.writes.contains(&result.place));
        if let Some(step) = writer {
            step.tap = Some(StepTap { name: layer.into(), buffer, rows, width });
        }
    }

    fn attention(
        &mut self,
        name: &str,
        attention: &ops::Attention,
        [q, k, v]: [Operand<'_>; 3],
        scales: [Option<Place>; 2],
        out: &TensorTy,
    ) -> Result<Val> {
        let at = extent(q.ty)?;
        let &[_, Dim::Static(kv_heads), _] = &k.ty.shape.0[..] else {
            return Err(Diag::target(format!("keys of type {}", k.ty)));
        };
        let cached = matches!(k.val.place, Place::State(_));
        q.f32_rows("queries", if cached { at.rows } else { Rows::T })?;
        if cached != matches!(v.val.place, Place::State(_)) || k.ty.elem != v.ty.elem {
            return Err(Diag::target(format!(
                "keys of type {} with values of type {} have no kernel",
                k.ty, v.ty
            ))
            .help("both come from caches of one type, or both from this call"));
        }
        if !cached {
            k.f32_rows("keys", Rows::T)?;
            v.f32_rows("values", Rows::T)?;
        }
        let fixed_scales = k.ty.elem.scheme().is_some_and(|s| s.group == Group::Axis(1));
        let in_states = scales.iter().all(|s| match s {
            Some(Place::State(_)) => !fixed_scales,
            Some(Place::Blob(_)) => fixed_scales,
            _ => false,
        });
        if k.ty.elem.scheme().is_some() && !(cached && in_states) {
            return Err(Diag::target(format!(
                "keys of type {} that do not lie in a cache have no kernel",
                k.ty
            ))
            .help("codes come from caches, and their scales from caches or from constants for each head"));
        }
        let kv_heads = small(kv_heads, k.ty)?;
        let source = match cached {
            true => KvSource::Cache { ty: cache_ty(k.ty)?, slot_rows: self.slot_rows()?, fixed_scales },
            false => KvSource::Direct { stride: kv_heads * at.cols },
        };
        let spec = AttentionSpec {
            heads: at.per,
            kv_heads,
            head_dim: at.cols,
            scale: F32::new(attention.scale.0 as f32),
            causal: attention.causal,
            window: (attention.window > 0).then_some(attention.window),
            softcap: None,
            source,
            q_stride: at.width(),
            rows: at.rows,
        };
        spec.check().map_err(|why| Diag::target(format!("there is no such kernel: {why}")))?;
        if self.order == Order::Panels {
            self.scratch_bytes = self.scratch_bytes.max(spec.scratch_bytes());
        }
        let place = self.buffer(out)?;
        let items = Items { div: spec.block_rows(), ..Extent { per: spec.kv_heads, ..at }.items() };
        let mut reads = vec![q.val.place, k.val.place, v.val.place];
        if cached {
            reads.extend(self.rows_of_states());
            reads.extend(scales.into_iter().flatten());
        }
        let mut args = reads.clone();
        args.push(place);
        if self.order == Order::Panels {
            args.push(Place::Scratch);
        }
        let spec = KernelSpec::Attention(spec);
        let (writes, tap, tiles) = (vec![place], None, Tiles::None);
        self.steps.push(Step { name: name.into(), spec, reads, writes, args, items, tap, tiles });
        Ok(Val::plain(place))
    }

    /// The inputs that tell where the rows of tokens lie in states.
    fn rows_of_states(&self) -> Vec<Place> {
        let pages = (self.order == Order::Fragments).then_some(Input::Pages);
        [Input::Positions, Input::Base].into_iter().chain(pages).map(Place::Input).collect()
    }

    /// Rows of a state for each sequence.
    fn slot_rows(&self) -> Result<u32> {
        u32::try_from(slot_rows(self.limits.context))
            .map_err(|_| Diag::target("a context too long for states"))
    }

    /// Writes rows into a cache: numbers, or codes together with their scales.
    fn cache_append(
        &mut self,
        name: &str,
        graph: &Graph,
        node: &Node,
        state: Operand<'_>,
        x: Operand<'_>,
        scales: Option<Place>,
    ) -> Result<Val> {
        let rounding = graph.def(node.args[1]).map(|(_, n)| n);
        // Scales are written by the launch that writes the codes.
        if rounding.is_some_and(|scale| codes_beside(graph, scale).is_some()) {
            return Ok(state.val.clone());
        }
        let rounds = rounding.is_some_and(|n| only_feeds_caches(graph, n));
        let at = extent(x.ty)?;
        if at.rows != Rows::T || (x.ty.elem != ElemTy::F32 && !rounds) {
            let what = format!("rows of type {} appended to a cache have no kernel", x.ty);
            return Err(
                Diag::target(what).help("a cache takes a row for each token, of f32 or rounded from it")
            );
        }
        let readers: Vec<(&Node, usize)> = graph
            .users(node.result)
            .into_iter()
            .map(|user| graph.node(user))
            .flat_map(|user| (0..user.args.len()).map(move |i| (user, i)))
            .filter(|(user, i)| user.args[*i] == node.result)
            .collect();
        let role = |&(user, i): &(&Node, usize)| match (&user.op, i) {
            (Op::Attention(_), 1) => Some(Role::Keys),
            (Op::Attention(_), 2) => Some(Role::Values),
            _ => None,
        };
        let first = readers.first().map_or(Some(Role::Keys), role);
        let role = first.filter(|_| readers.iter().all(|reader| role(reader) == first));
        let role = role.ok_or_else(|| {
            Diag::target("a state that is read by more than keys, or by more than values, has no kernel")
        })?;
        let spec = CacheAppendSpec {
            heads: at.per,
            head_dim: at.cols,
            x_stride: at.width(),
            ty: cache_ty(state.ty)?,
            role,
            fixed_scales: scales.is_some(),
            slot_rows: self.slot_rows()?,
        };
        spec.check().map_err(|why| Diag::target(format!("there is no such kernel: {why}")))?;
        let mut writes = vec![state.val.place];
        if spec.ty.is_scaled() && scales.is_none() {
            let states: Vec<Option<StateId>> =
                readers.iter().map(|&(reader, i)| scale_state(graph, node, reader.args[i + 2])).collect();
            let scale_state =
                states.first().copied().flatten().filter(|&s| states.iter().all(|&o| o == Some(s)));
            let scale_state = scale_state.ok_or_else(|| {
                Diag::target(
                    "codes are appended to a cache whose scales attention does not read from another",
                )
                .help("`quantize-cache` makes both")
            })?;
            writes.push(Place::State(self.state_index(scale_state)));
        }
        let mut reads = vec![x.val.place];
        reads.extend(self.rows_of_states());
        reads.extend(scales);
        let items = Items::per_token(u64::from(spec.heads), 1);
        self.launch(name, KernelSpec::CacheAppend(spec), &reads, &writes, items);
        Ok(state.val.clone())
    }

    fn unary(&mut self, name: &str, op: UnaryOp, x: Operand<'_>, out: &TensorTy) -> Result<Val> {
        let at = extent(x.ty)?;
        let at = Extent { per: 1, cols: at.width(), ..at };
        let spec = RowSpec::unary(op, at.cols, mem(x.ty)?, mem(out)?).with_rows(at.count());
        self.row(name, spec, &[x.val.place], at, out)
    }

    fn binary(
        &mut self,
        name: &str,
        op: BinaryOp,
        a: Operand<'_>,
        b: Operand<'_>,
        out: &TensorTy,
    ) -> Result<Val> {
        let at = extent(out)?;
        let mut e = EExpr::new();
        let mut node = |operand: Operand<'_>| -> Result<NodeId> {
            let ty = mem(operand.ty)?;
            if operand.ty.shape == out.shape {
                return Ok(e.elem_input(ty, at.cols));
            }
            if operand.ty.shape.0[..] == out.shape.0[out.rank() - 1..] {
                return Ok(e.col_input(ty));
            }
            if operand.ty.rank() == 0 {
                return Ok(e.one_input(ty));
            }
            Err(Diag::target(format!(
                "an operand of type {} next to a result of type {out} has no kernel",
                operand.ty
            )))
        };
        let (x, y) = (node(a)?, node(b)?);
        let z = e.binary(op, x, y);
        e.store(z, mem(out)?, at.cols);
        let spec =
            RowSpec::new(if op == BinaryOp::Add { "add" } else { "mul" }, at.cols, e).with_rows(at.count());
        self.row(name, spec, &[a.val.place, b.val.place], at, out)
    }

    /// Rounds rows to bf16, as far apart as products read them: where they are made, when that kernel does nothing else
    /// with them, or in a launch of its own.
    fn round_rows(&mut self, name: &str, graph: &Graph, node: &Node, x: Operand<'_>) -> Result<Val> {
        if read_only_by(graph, node.args[0], node)
            && let Some(place) = self.round_while_computing(x)?
        {
            return Ok(Val::plain(place));
        }
        Ok(Val::plain(self.bf16_rows(name, x)?))
    }

    /// A copy of rows as bf16, as far apart as products read them.
    fn bf16_rows(&mut self, name: &str, x: Operand<'_>) -> Result<Place> {
        let at = extent(x.ty)?;
        let at = Extent { per: 1, cols: at.width(), ..at };
        let stride = bf16_row_stride(at.cols);
        let spec = RowSpec::copy(at.cols, mem(x.ty)?, at.cols, 0, MemTy::Bf16, stride);
        let place = self.buffer_of(at.rows, 2 * u64::from(stride));
        let spec = KernelSpec::Row(spec.with_rows(at.count()));
        self.launch(name, spec, &[x.val.place], &[place], at.items());
        Ok(place)
    }

    /// Lets the kernel that makes `x` store it as bf16 and as nothing else, when it is one that can. The same f32 numbers
    /// are rounded as in a launch of its own.
    fn round_while_computing(&mut self, x: Operand<'_>) -> Result<Option<Place>> {
        let cols = extent(x.ty)?.width();
        let made = self.steps.iter().position(|s| s.writes == [x.val.place] && s.tap.is_none());
        let Some(made) = made else { return Ok(None) };
        let (rows, body) = match &mut self.steps[made].spec {
            KernelSpec::Row(row) if row.rows.per == 1 && row.cols == cols => (row.rows.sym, &mut row.body),
            KernelSpec::Matmul(m) if m.n == cols => (m.rows, &mut m.epilogue),
            _ => return Ok(None),
        };
        let [output] = &mut body.outputs[..] else { return Ok(None) };
        let plain = OutputKind::Elem { stride: cols, zero_pad: 0 };
        if output.ty != MemTy::F32 || output.kind != plain {
            return Ok(None);
        }
        let stride = bf16_row_stride(cols);
        (output.ty, output.kind) = (MemTy::Bf16, OutputKind::Elem { stride, zero_pad: 0 });
        let place = self.buffer_of(rows, 2 * u64::from(stride));
        let step = &mut self.steps[made];
        step.args.iter_mut().filter(|p| **p == x.val.place).for_each(|p| *p = place);
        step.writes = vec![place];
        Ok(Some(place))
    }

    /// Quantizes rows together with the sums that the matmuls reading them want.
    fn quantize(
        &mut self,
        name: &str,
        graph: &Graph,
        node: &Node,
        x: Operand<'_>,
        scale: Operand<'_>,
    ) -> Result<Val> {
        let scaled_by = row_scale(graph, node).filter(|(format, _)| **format == formats::INT8);
        let Some((_, scaled_by)) = scaled_by else {
            return Err(Diag::target(format!("quantizing to {} has no kernel", graph.ty(node.result).elem))
                .help("kernels quantize activations to symmetric int8 with one dynamic scale per token, or one constant scale"));
        };
        let fixed = (scaled_by == RowScale::Fixed).then_some(scale.val.place);
        let mut groups = vec![];
        for user in graph.users(node.result) {
            let user = graph.node(user);
            let weight = MatmulWeight::of(self.module, graph, user)?;
            let weight = weight.ok_or_else(|| {
                Diag::target(format!("`{}` of quantized rows has no kernel", user.op.name()))
            })?;
            groups.push(weight.layout.w.group.min(weight.layout.k));
        }
        groups.sort_unstable();
        groups.dedup();
        let at = extent(x.ty)?;
        let at = Extent { per: 1, cols: at.width(), ..at };
        if let &[group] = &groups[..]
            && reads_only_quantize(graph, node)
            && let Some(val) = self.quantize_while_computing(name, x, at, group, fixed)
        {
            return Ok(val);
        }
        let q = self.buffer_of(at.rows, u64::from(crate::spec::i8_row_stride(at.cols)));
        let scale = self.buffer_of(at.rows, 4);
        let mut sums = vec![];
        for (i, group) in groups.into_iter().enumerate() {
            let place = self.buffer_of(at.rows, 4 * u64::from(at.cols.div_ceil(group)));
            let spec = match fixed {
                None => RowSpec::quantize_token(at.cols, mem(x.ty)?, Some(group)),
                Some(_) => RowSpec::quantize_static(at.cols, mem(x.ty)?, Some(group)),
            };
            let spec = spec.with_rows(at.count());
            let reads: Vec<Place> = std::iter::once(x.val.place).chain(fixed).collect();
            let suffix = if i == 0 { String::new() } else { format!(".g{group}") };
            let writes = [q, scale, place];
            self.launch(&format!("{name}{suffix}"), KernelSpec::Row(spec), &reads, &writes, at.items());
            sums.push((group, place));
        }
        Ok(Val { place: q, sums, scale: Some(scale) })
    }

    /// Lets the row kernel that makes `x` store it quantized and nothing else, when there is such a kernel. The same f32
    /// operations in the same order: the codes are those of two kernels.
    fn quantize_while_computing(
        &mut self,
        name: &str,
        x: Operand<'_>,
        at: Extent,
        group: u32,
        fixed: Option<Place>,
    ) -> Option<Val> {
        let (row, node, mut reads) = self.last_row_kernel(x, at)?;
        let mut body = row.body;
        match fixed {
            None => crate::cpu::row::quantize_dynamic(&mut body, node, at.cols, Some(group)),
            Some(place) => {
                let scale = body.one_input(MemTy::F32);
                reads.push(place);
                crate::cpu::row::quantize_by(&mut body, node, scale, at.cols, Some(group));
            }
        }
        let spec = RowSpec { name: format!("{}_quantize", row.name), body, ..row };
        self.steps.pop();
        let q = self.buffer_of(at.rows, u64::from(crate::spec::i8_row_stride(at.cols)));
        let scale = self.buffer_of(at.rows, 4);
        let sums = self.buffer_of(at.rows, 4 * u64::from(at.cols.div_ceil(group)));
        self.launch(name, KernelSpec::Row(spec), &reads, &[q, scale, sums], at.items());
        Some(Val { place: q, sums: vec![(group, sums)], scale: Some(scale) })
    }

    /// The row kernel launched last, with its stores taken out, the node it stores and what it reads, when it makes `x` as
    /// f32 and nothing else.
    fn last_row_kernel(&self, x: Operand<'_>, at: Extent) -> Option<(RowSpec, NodeId, Vec<Place>)> {
        let last = self.steps.last()?;
        let KernelSpec::Row(row) = &last.spec else { return None };
        let computes_x = last.writes == [x.val.place] && last.tap.is_none();
        let &[store] = &row.body.stores[..] else { return None };
        let f32_rows = row.body.outputs.first().is_some_and(|o| o.ty == MemTy::F32);
        if !computes_x || !f32_rows || row.rows != at.count() || row.cols != at.cols {
            return None;
        }
        let mut row = row.clone();
        row.body.stores.clear();
        row.body.outputs.clear();
        Some((row, store.node, last.reads.clone()))
    }

    /// Rounds rows to what codes of e4m3 stand for: where they are made, when that kernel does nothing else with them, or in
    /// a launch of its own.
    fn round_to_e4m3(
        &mut self,
        name: &str,
        graph: &Graph,
        node: &Node,
        x: Operand<'_>,
        scale: Operand<'_>,
    ) -> Result<Val> {
        let (quantize, scaled_by) =
            rounding_to_e4m3(graph, node).ok_or_else(|| Diag::bug("a rounding to e4m3 that is none"))?;
        let x = Operand { ty: graph.ty(quantize.args[0]), ..x };
        let at = extent(x.ty)?;
        let at = Extent { per: 1, cols: at.width(), ..at };
        let fixed = (scaled_by == RowScale::Fixed).then_some(scale.val.place);
        if reads_only_quantize(graph, quantize)
            && let Some((row, rounded, mut reads)) = self.last_row_kernel(x, at)
        {
            let mut body = row.body;
            let rounded = match fixed {
                None => crate::cpu::row::e4m3_dynamic(&mut body, rounded),
                Some(place) => {
                    let scale = body.one_input(MemTy::F32);
                    reads.push(place);
                    crate::cpu::row::e4m3_by(&mut body, rounded, scale)
                }
            };
            body.store(rounded, MemTy::F32, at.cols);
            let spec = RowSpec { name: format!("{}_e4m3", row.name), body, ..row };
            self.steps.pop();
            return self.row(name, spec, &reads, at, graph.ty(node.result));
        }
        let x_ty = mem(x.ty)?;
        let spec = match fixed {
            None => RowSpec::round_e4m3_token(at.cols, x_ty, MemTy::F32),
            Some(_) => RowSpec::round_e4m3_static(at.cols, x_ty, MemTy::F32),
        };
        let reads: Vec<Place> = std::iter::once(x.val.place).chain(fixed).collect();
        self.row(name, spec.with_rows(at.count()), &reads, at, graph.ty(node.result))
    }

    #[expect(clippy::too_many_arguments, reason = "one call for each of the two matmul ops")]
    fn matmul(
        &mut self,
        name: &str,
        graph: &Graph,
        node: &Node,
        x: Operand<'_>,
        steps: &[EpilogueStep],
        packed: &str,
        extras: &[Option<Val>],
    ) -> Result<Val> {
        let weight = MatmulWeight::of(self.module, graph, node)?.ok_or_else(|| Diag::bug("not a matmul"))?;
        let layout = weight.layout;
        let packing = weight.packing(self.order)?;
        let digest = match packed.rsplit_once('/') {
            Some((packed_layout, digest)) if packed_layout == packing.name() => digest.parse::<Digest>()?,
            Some((packed_layout, _)) => {
                return Err(Diag::target(format!(
                    "the weight is packed as {packed_layout}, the kernel wants {}",
                    packing.name()
                ))
                .help("run `pack-weights` for this target"));
            }
            None => weight.pack(self.order, self.module, self.store)?.blob,
        };
        let w = self.add_blob(EngineBlob {
            name: self.module.weights[weight.weight()].name.clone(),
            source: BlobSource::Stored(digest),
            streamed: true,
            bytes: Some(packing.bytes()),
        });
        let out = graph.ty(node.result);
        let (rows, n) = matrix(out)?;
        if n != layout.n || !matches!(extent(out)?.per, 1) {
            return Err(Diag::target(format!(
                "a product of type {out} has no kernel: reshape its rows first"
            )));
        }
        let mut reads = vec![x.val.place];
        let a = match x.val.scale {
            None if x.ty.elem == ElemTy::F32 => AFmt::F32,
            None if x.ty.elem == ElemTy::Bf16 => {
                if !graph.def(node.args[0]).is_some_and(|(_, cast)| only_feeds_products(graph, cast)) {
                    reads = vec![self.bf16_rows(&format!("{name}.rows"), x)?];
                }
                AFmt::Bf16
            }
            None => return Err(Diag::target(format!("activations of type {} have no matmul kernel", x.ty))),
            Some(scale) => {
                let quantize = graph.def(node.args[0]).map(|(_, n)| n.args[1]);
                if quantize != Some(node.args[QMATMUL_EXTRAS - 1]) {
                    return Err(Diag::target(
                        "the scales of the rows are not those they were quantized with",
                    ));
                }
                let sums = x.val.sums.iter().find(|(group, _)| *group == layout.w.group.min(layout.k));
                let sums = sums.ok_or_else(|| Diag::bug("group sums of this matmul were not computed"))?;
                reads.extend([scale, sums.1]);
                AFmt::I8Token
            }
        };
        reads.push(w);
        let operands = &node.args[fixed_operands(&node.op)..];
        let mut epilogue = Epilogue::new(n);
        for step in steps {
            let operand = match step.operand().map(usize::from) {
                None => None,
                Some(i) => {
                    let extra = extras.get(i).and_then(Option::as_ref);
                    let extra = extra.ok_or_else(|| Diag::bug("an operand of the epilogue is missing"))?;
                    let known = epilogue.operand(i);
                    Some(match known {
                        Some(value) => value,
                        None => match self.take_partner(graph, node, operands[i], extra.place, &weight)? {
                            Some(partner) => {
                                reads.extend(partner.weights);
                                epilogue.absorb(i, &partner.epilogue, &partner.inputs)?
                            }
                            None => epilogue.read(i, graph.ty(operands[i]), out, extra.place)?,
                        },
                    })
                }
            };
            epilogue.step(*step, operand)?;
        }
        let (epilogue, inputs) = epilogue.finish();
        reads.extend(inputs);
        let m = MRange { min: 0, max: 0 };
        let spec = MatmulSpec { n, k: layout.k, m, rows, w: layout.w, a, epilogue };
        let place = self.buffer(out)?;
        let items = Items::fixed(u64::from(spec.items()));
        self.launch(name, KernelSpec::Matmul(spec), &reads, &[place], items);
        Ok(Val::plain(place))
    }

    /// Takes back the launch that makes `operand`, an operand of the epilogue of the product `node`, when it is a product
    /// of the same rows with weights of the same format that nothing else reads: one kernel then computes both, and
    /// what would lie between them is never written. The same operations on the same numbers.
    fn take_partner(
        &mut self,
        graph: &Graph,
        node: &Node,
        operand: ValueId,
        place: Place,
        weight: &MatmulWeight,
    ) -> Result<Option<Partner>> {
        let Some((_, other)) = graph.def(operand) else { return Ok(None) };
        let rows = |n: &Node| (n.args[0], matches!(n.op, Op::QMatMul(_)).then(|| n.args[QMATMUL_EXTRAS - 1]));
        let Some(layout) = MatmulWeight::of(self.module, graph, other)?.map(|w| w.layout) else {
            return Ok(None);
        };
        let read_once = !graph.is_result(operand) && graph.users(operand).len() == 1;
        let read_here = node.args.iter().filter(|&&a| a == operand).count() == 1;
        if layout != weight.layout || rows(node) != rows(other) || !read_once || !read_here {
            return Ok(None);
        }
        let made_by = |s: &Step| s.writes == [place] && s.tap.is_none();
        let Some(at) = self.steps.iter().position(made_by) else { return Ok(None) };
        let KernelSpec::Matmul(spec) = &self.steps[at].spec else { return Ok(None) };
        let (first, last) = (spec.weights_arg() as usize, spec.fixed_args() as usize);
        let epilogue = spec.epilogue.clone();
        let step = self.steps.remove(at);
        Ok(Some(Partner {
            weights: step.reads[first..last].to_vec(),
            inputs: step.reads[last..].to_vec(),
            epilogue,
        }))
    }

    /// What each worker of a call of one token computes for itself, with memory of its own behind the kernels' scratch.
    ///
    /// A kernel that makes one short row has work for one worker, and the others would wait for it: to do it everywhere
    /// costs nothing, and saves the barrier behind it.
    fn private(&self, range: MRange, read: &[usize], buffers: &[Buffer]) -> Private {
        let size = |b: usize| self.buffers[b].bytes(range.max);
        let one_row = |step: &Step| {
            let bytes: u64 = step.args.iter().filter_map(Place::buffer).map(size).sum();
            let own = |p: &Place| p.buffer().is_some_and(|b| !read.contains(&b));
            range.max == 1
                && self.order == Order::Panels
                && step.is_short()
                && bytes <= MOST_PRIVATE_BYTES
                && step.tap.is_none()
                && step.writes.iter().all(own)
        };
        let mut chosen: Vec<bool> = self.steps.iter().map(one_row).collect();
        // A buffer that several launches write is private when all of them are.
        let writes = |step: &Step, b: usize| step.writes.contains(&Place::Buffer(b));
        let together = |step: &Step, chosen: &[bool]| {
            let others =
                |b| self.steps.iter().zip(chosen).all(|(other, &chosen)| chosen || !writes(other, b));
            step.writes.iter().filter_map(Place::buffer).all(others)
        };
        loop {
            let before = chosen.clone();
            for (i, step) in self.steps.iter().enumerate() {
                chosen[i] = before[i] && together(step, &before);
            }
            if chosen == before {
                break;
            }
        }
        let mut own: Vec<usize> = vec![];
        for (step, _) in self.steps.iter().zip(&chosen).filter(|(_, chosen)| **chosen) {
            own.extend(step.writes.iter().filter_map(Place::buffer));
        }
        own.sort_unstable();
        own.dedup();
        let lives = |&b: &usize| Buffer { bytes: size(b), live: buffers[b].live.clone() };
        let plan = schedule::plan(&own.iter().map(lives).collect::<Vec<_>>());
        let base = self.scratch_bytes.next_multiple_of(schedule::ALIGN);
        let offsets = own.iter().zip(&plan.offsets).map(|(&b, &offset)| (b, base + offset)).collect();
        Private { offsets, end: if own.is_empty() { 0 } else { base + plan.bytes } }
    }

    /// The classes of tokens that calls have.
    fn ranges(&self) -> Vec<MRange> {
        let mut ranges = classes_of(self.order, self.limits.max_tokens);
        if self.limits.always_full {
            ranges.drain(..ranges.len() - 1);
        }
        ranges
    }

    /// Lets products of many rows read tiles, where they have such kernels: rows are put into tiles once for all that read
    /// them. Nothing but calls of the last class have so many.
    fn add_tiles(&mut self) {
        let (Some(gpu), Some(&most)) = (self.gpu, self.ranges().last()) else { return };
        let mut made: BTreeMap<(usize, String), Place> = BTreeMap::new();
        for mut step in std::mem::take(&mut self.steps) {
            let wide = for_class(self.order, &step.spec, most, self.limits.max_rows);
            if let (KernelSpec::Matmul(product), Some(&Place::Buffer(rows))) = (&wide, step.args.first())
                && let Some(spec) = plan::token_tiles(product, gpu)
            {
                let limit = if spec.rows == Rows::T { self.limits.max_tokens } else { self.limits.max_rows };
                let size = Size { row_bytes: spec.tiled(1).row_bytes(), rows: limit.next_multiple_of(ROWS) };
                let spec = KernelSpec::RowTiles(spec);
                let place = *made.entry((rows, spec.key())).or_insert_with(|| {
                    self.buffers.push(size);
                    let place = Place::Buffer(self.buffers.len() - 1);
                    let (reads, writes) = (vec![Place::Buffer(rows)], vec![place]);
                    self.steps.push(Step {
                        name: format!("{}.tiles", step.name),
                        spec,
                        args: vec![Place::Buffer(rows), place],
                        reads,
                        writes,
                        items: step.items,
                        tap: None,
                        tiles: Tiles::Made,
                    });
                    place
                });
                step.reads.push(place);
                step.tiles = Tiles::Read(place);
            }
            self.steps.push(step);
        }
    }

    /// Orders the steps, plans the arena and gives every class its launches.
    fn finish(mut self, out: &NamedRows, inputs: &[NamedRows], more: &[NamedRows]) -> Result<Lowered> {
        self.add_tiles();
        self.steps = in_waves(self.steps);
        let end = self.steps.len();
        let mut lives: Vec<Option<(usize, usize)>> = vec![None; self.buffers.len()];
        let touch = |lives: &mut Vec<Option<(usize, usize)>>, buffer: usize, step: usize| {
            let live = lives[buffer].get_or_insert((step, step));
            *live = (live.0.min(step), live.1.max(step));
        };
        for (i, step) in self.steps.iter().enumerate() {
            // A worker that makes rows for itself may still read when another goes on to the next step.
            let last = if step.is_short() { (i + 1).min(end) } else { i };
            for b in step.args.iter().filter_map(Place::buffer) {
                touch(&mut lives, b, i);
            }
            for b in step.reads.iter().filter_map(Place::buffer) {
                touch(&mut lives, b, last);
            }
        }
        // What the caller writes is there from the beginning, what it reads until the end.
        inputs.iter().for_each(|rows| touch(&mut lives, rows.buffer, 0));
        let read: Vec<usize> = std::iter::once(out).chain(more).map(|rows| rows.buffer).collect();
        read.iter().for_each(|&buffer| touch(&mut lives, buffer, end));
        let buffers: Vec<Buffer> = self
            .buffers
            .iter()
            .zip(&lives)
            .map(|(size, live)| match *live {
                Some((first, last)) => Buffer { bytes: size.bytes(u32::MAX), live: first..=last },
                // What it was for became a part of another step.
                None => Buffer { bytes: 0, live: end..=end },
            })
            .collect();
        let arena = schedule::plan(&buffers);
        if arena.bytes > MAX_BUFFER_BYTES {
            let (tokens, bytes) = (self.limits.max_tokens, arena.bytes);
            return Err(Diag::target(format!("the values of a call of {tokens} tokens take {bytes} bytes"))
                .help("let calls have fewer tokens, or encoders a shorter context"));
        }
        let at = |place: Place, private: &Private| match place {
            Place::Buffer(b) => match private.offsets.get(&b) {
                Some(&offset) => Ref::scratch(offset),
                None => Ref::arena(arena.offsets[b]),
            },
            Place::Blob(i) => Ref::weight(i),
            Place::State(i) => Ref::state(i),
            Place::Input(i) => Ref::input(i),
            Place::Scratch => Ref::scratch(0),
        };
        let bytes = |place: &Place| match *place {
            Place::Buffer(b) => Some((arena.offsets[b], arena.offsets[b] + buffers[b].bytes)),
            _ => None,
        };
        let ranges = self.ranges();
        let most = *ranges.last().ok_or_else(|| Diag::bug("no class of tokens"))?;
        let mut scratch_bytes = self.scratch_bytes;
        let class = |range: MRange| {
            let private = self.private(range, &read, &buffers);
            scratch_bytes = scratch_bytes.max(private.end);
            let shared =
                |place: &&Place| !matches!(place, Place::Buffer(b) if private.offsets.contains_key(b));
            let overlaps = overlaps(&self.steps, shared, bytes);
            // Tiles are made where a product of this class reads them.
            let tiled = |step: &&Step| match step.tiles {
                Tiles::None | Tiles::Read(_) => true,
                Tiles::Made => range == most,
            };
            let kernel = |step: &Step| {
                let mut spec = for_class(self.order, &step.spec, range, self.limits.max_rows);
                if let (KernelSpec::Matmul(product), Tiles::Read(_)) = (&spec, step.tiles)
                    && range == most
                {
                    spec = KernelSpec::TiledMatmul(product.clone());
                }
                let symbol = match self.order {
                    Order::Panels => spec.key(),
                    Order::Fragments => plan::symbol(&spec, range),
                };
                (spec, symbol)
            };
            let args = |step: &Step| {
                let mut args = step.args.clone();
                if let (Tiles::Read(place), true) = (step.tiles, range == most) {
                    args[0] = place;
                }
                args
            };
            let launch = |(i, step): (usize, &Step)| {
                let (spec, symbol) = kernel(step);
                Launch {
                    name: step.name.clone(),
                    spec,
                    symbol,
                    args: args(step).into_iter().map(|p| at(p, &private)).collect(),
                    items: step.items,
                    tap: step.tap.as_ref().map(|tap| Rows32 {
                        name: tap.name.clone(),
                        at: at(Place::Buffer(tap.buffer), &private),
                        rows: tap.rows,
                        width: tap.width,
                    }),
                    overlaps_next: overlaps[i],
                    replicated: private.replicates(step),
                }
            };
            (range, self.steps.iter().enumerate().filter(|(_, step)| tiled(step)).map(launch).collect())
        };
        let rows = |all: &[NamedRows]| {
            let one = |r: &NamedRows| Rows32 {
                name: r.name.clone(),
                at: Ref::arena(arena.offsets[r.buffer]),
                rows: Rows::T,
                width: r.width,
            };
            all.iter().map(one).collect()
        };
        Ok(Lowered {
            programs: ranges.into_iter().map(class).collect(),
            output: Ref::arena(arena.offsets[out.buffer]),
            width: out.width,
            row_inputs: rows(inputs),
            row_outputs: rows(more),
            arena_bytes: arena.bytes,
            scratch_bytes,
            blobs: self.blobs,
            states: self.states,
        })
    }
}

/// Where the scales of quantized rows come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RowScale {
    /// Each row's own, computed from it.
    Computed,
    /// A weight: one for all rows.
    Fixed,
}

/// The format and the scales that `quantize` rounds rows with, when they are symmetric and such that kernels know them.
fn row_scale(graph: &Graph, quantize: &Node) -> Option<(&'static formats::Format, RowScale)> {
    let to = quantize.op.is::<ops::Quantize>()?.to;
    let as_token = Scheme { format: to.format, ..ops::DYNAMIC_INT8 };
    if to == as_token {
        let (_, scale) = graph.def(quantize.args[1])?;
        let of_these = scale.args.first() == Some(&quantize.args[0]);
        let computed = of_these && scale.op.is::<ops::DynamicScale>().is_some_and(|s| s.to == to);
        return computed.then_some((to.format, RowScale::Computed));
    }
    let fixed = to == Scheme { group: Group::Tensor, ..as_token };
    (fixed && graph.as_weight(quantize.args[1]).is_some()).then_some((to.format, RowScale::Fixed))
}

/// The rounding of rows of f32 to e4m3 whose codes `dequantize` makes numbers of again, and where its scales come from.
fn rounding_to_e4m3<'a>(graph: &'a Graph, dequantize: &Node) -> Option<(&'a Node, RowScale)> {
    let back = dequantize.op.is::<ops::Dequantize>()?;
    let (_, quantize) = graph.def(dequantize.args[0])?;
    let (format, scale) = row_scale(graph, quantize)?;
    let of_f32 = back.to == Float::F32 && graph.ty(quantize.args[0]).elem == ElemTy::F32;
    (of_f32 && *format == formats::E4M3 && dequantize.args[1] == quantize.args[1])
        .then_some((quantize, scale))
}

/// Whether a node rounds rows to e4m3, and its codes are only made numbers of again.
fn only_rounds_to_e4m3(graph: &Graph, node: &Node) -> bool {
    let back = |op| rounding_to_e4m3(graph, graph.node(op)).is_some();
    !graph.is_result(node.result)
        && graph.users(node.result).into_iter().all(back)
        && !graph.users(node.result).is_empty()
}

/// Whether nothing but a quantization, `node`, and the scale made for it read what it quantizes.
fn reads_only_quantize(graph: &Graph, node: &Node) -> bool {
    let x = node.args[0];
    let reader = |op| {
        let user = graph.node(op);
        user.result == node.result || user.result == node.args[1]
    };
    !graph.is_result(x) && graph.users(x).into_iter().all(reader)
}

/// The steps in waves: each as early as what it waits for allows, so that as many as can be run between two barriers.
/// Steps of one wave keep their order.
fn in_waves(steps: Vec<Step>) -> Vec<Step> {
    let clash = |a: &[Place], b: &[Place]| a.iter().any(|x| b.contains(x));
    let mut wave: Vec<usize> = Vec::with_capacity(steps.len());
    for (i, step) in steps.iter().enumerate() {
        let waits = |j: &usize| {
            let before = &steps[*j];
            clash(&before.writes, &step.reads)
                || clash(&before.writes, &step.writes)
                || clash(&before.reads, &step.writes)
        };
        wave.push((0..i).filter(waits).map(|j| wave[j] + 1).max().unwrap_or(0));
    }
    let mut order: Vec<(usize, Step)> = wave.into_iter().zip(steps).collect();
    order.sort_by_key(|(wave, _)| *wave);
    order.into_iter().map(|(_, step)| step).collect()
}

/// What a cache of this type holds.
fn cache_ty(ty: &TensorTy) -> Result<CacheTy> {
    let ElemTy::Q(scheme) = ty.elem else {
        return Ok(match mem(ty)? {
            MemTy::F16 => CacheTy::F16,
            MemTy::Bf16 => CacheTy::Bf16,
            MemTy::F32 | MemTy::I8 | MemTy::I32 => CacheTy::F32,
        });
    };
    let of_tokens = Scheme { format: scheme.format, ..ops::DYNAMIC_INT8 };
    let of_heads = Scheme { group: Group::Axis(1), ..of_tokens };
    let as_made = scheme == of_tokens || scheme == of_heads && ty.rank() == 3;
    match scheme.format {
        f if as_made && *f == formats::INT8 => Ok(CacheTy::I8),
        f if as_made && *f == formats::E4M3 => Ok(CacheTy::E4m3),
        _ => Err(Diag::target(format!("a cache of type {ty} has no kernel"))
            .help("kernels take int8 or e4m3, symmetric, with an f32 scale for each token and head, or for each head")),
    }
}

/// The constant scales, one for each head, with which what `append` appends is rounded, when it is.
fn fixed_cache_scales(graph: &Graph, append: &Node) -> Option<ValueId> {
    let (_, quantize) = graph.def(append.args[1])?;
    let of_heads = quantize.op.is::<ops::Quantize>()?.to.group == Group::Axis(1);
    let scales = *quantize.args.get(1)?;
    (of_heads && graph.as_weight(scales).is_some()).then_some(scales)
}

/// The codes that are made with the scales `scale`, when those and the codes go into caches.
fn codes_beside<'a>(graph: &'a Graph, scale: &Node) -> Option<&'a Node> {
    let dynamic = scale.op.is::<ops::DynamicScale>()?;
    let users = |value| graph.users(value).into_iter().map(|op| graph.node(op));
    users(scale.result).find(|user| matches!(user.op, Op::CacheAppend(_)))?;
    users(scale.result).find(|user| {
        user.op.is::<ops::Quantize>().is_some_and(|q| q.to == dynamic.to)
            && user.args[..2] == [scale.args[0], scale.result]
            && only_feeds_caches(graph, user)
    })
}

/// The state whose rows `scales` are, when it is one that takes the scales of what `append` appends.
fn scale_state(graph: &Graph, append: &Node, scales: ValueId) -> Option<StateId> {
    let (_, codes) = graph.def(append.args[1])?;
    codes.op.is::<ops::Quantize>()?;
    let (_, dynamic) = graph.def(codes.args[1])?;
    codes_beside(graph, dynamic)?;
    let (_, beside) = graph.def(scales)?;
    match (&beside.op, graph.value(beside.args[0]).def) {
        (Op::CacheAppend(_), Def::State(state)) if beside.args[1] == dynamic.result => Some(state),
        _ => None,
    }
}

/// Whether a node is a cast or quantization of f32 whose result is only appended to caches.
fn only_feeds_caches(graph: &Graph, node: &Node) -> bool {
    let appends = |op| matches!(graph.node(op).op, Op::CacheAppend(_));
    matches!(node.op, Op::Cast(_) | Op::Quantize(_))
        && graph.ty(node.args[0]).elem == ElemTy::F32
        && !graph.is_result(node.result)
        && graph.users(node.result).into_iter().all(appends)
}

/// Whether a node is a cast to bf16 whose result is only multiplied with weights.
fn only_feeds_products(graph: &Graph, node: &Node) -> bool {
    let rows = node.result;
    let multiplies = |op| {
        let user = graph.node(op);
        let product = matches!(user.op, Op::MatMul(_) | Op::QMatMul(_));
        product && user.args.iter().enumerate().all(|(i, &a)| (a == rows) == (i == 0))
    };
    matches!(node.op, Op::Cast(_))
        && graph.ty(rows).elem == ElemTy::Bf16
        && !graph.is_result(rows)
        && graph.users(rows).into_iter().all(multiplies)
}

/// Whether `reader` alone reads `x`, and whatever `x` is another shape of is read for nothing else.
fn read_only_by(graph: &Graph, x: ValueId, reader: &Node) -> bool {
    let alone = |v: ValueId, reader: &Node| {
        let users = graph.users(v);
        !graph.is_result(v) && users.len() == 1 && graph.node(users[0]).result == reader.result
    };
    let (mut x, mut reader) = (x, reader);
    while alone(x, reader) {
        match graph.def(x) {
            Some((_, node)) if matches!(node.op, Op::Reshape(_)) => (x, reader) = (node.args[0], node),
            // What comes from outside of the function may be read there too.
            Some((_, node)) => return !matches!(node.op, Op::Call(_)),
            None => return false,
        }
    }
    false
}

/// Whether the result of a node is read by no one but the quantization of its rows and the products of those.
fn only_scales_codes(graph: &Graph, node: &Node) -> bool {
    let scale = node.result;
    let only_at =
        |user: &Node, i: usize| user.args.iter().enumerate().all(|(j, &a)| (a == scale) == (j == i));
    let fits = |user: &Node| match user.op {
        Op::Quantize(_) => user.args[0] == node.args[0] && only_at(user, 1),
        Op::QMatMul(_) => only_at(user, QMATMUL_EXTRAS - 1),
        Op::Dequantize(_) => only_at(user, 1) && rounding_to_e4m3(graph, user).is_some(),
        Op::CacheAppend(_) => codes_beside(graph, node).is_some(),
        _ => false,
    };
    !graph.is_result(scale) && graph.users(scale).into_iter().all(|user| fits(graph.node(user)))
}

/// Operands of a matmul before those of its epilogue.
fn fixed_operands(op: &Op) -> usize {
    match op {
        Op::QMatMul(_) => QMATMUL_EXTRAS,
        _ => 2,
    }
}

/// The name of a launch: function and value.
fn launch_name(function: &str, graph: &Graph, node: &Node) -> String {
    let value = graph.value(node.result).name.as_deref();
    format!("{function}.{}", value.unwrap_or(node.op.name()))
}

/// The spec of a step for one class of tokens.
fn for_class(order: Order, spec: &KernelSpec, range: MRange, max_rows: u32) -> KernelSpec {
    match spec {
        KernelSpec::Matmul(m) => {
            // Warps take 8 rows whether they are there or not: calls of fewer have the same kernel.
            let range = match order {
                Order::Panels => range,
                Order::Fragments => MRange { min: 1, max: range.max.max(8) },
            };
            let range = match m.rows {
                Rows::T => range,
                Rows::R => MRange { min: 1, max: range.max.min(max_rows) },
            };
            KernelSpec::Matmul(MatmulSpec { m: range, ..m.clone() })
        }
        other => other.clone(),
    }
}

/// A norm over the last axis; absent gains and biases are left out of the arithmetic.
fn norm_spec(
    eps: f32,
    at: Extent,
    x: &TensorTy,
    gain: Option<&TensorTy>,
    bias: Option<&TensorTy>,
    centred: bool,
) -> Result<RowSpec> {
    let mut e = EExpr::new();
    let x_ty = mem(x)?;
    let mut y = e.elem_input(x_ty, at.cols);
    let gain = gain.map(|g| Ok::<_, Diag>(e.col_input(mem(g)?))).transpose()?;
    let bias = bias.map(|b| Ok::<_, Diag>(e.col_input(mem(b)?))).transpose()?;
    if centred {
        y = crate::cpu::row::centred(&mut e, y, at.cols);
    }
    y = crate::cpu::row::rms_normalized(&mut e, y, at.cols, eps);
    y = match (gain, bias) {
        (Some(g), Some(b)) => e.fma(y, g, b),
        (Some(g), None) => e.mul(y, g),
        (None, Some(b)) => e.add(y, b),
        (None, None) => y,
    };
    e.store(y, x_ty, at.cols);
    Ok(RowSpec::new(if centred { "layer_norm" } else { "rms_norm" }, at.cols, e).with_rows(at.count()))
}

/// Most bytes that a launch touches which every worker runs for itself.
const MOST_PRIVATE_BYTES: u64 = 64 << 10;

/// Buffers of which each worker has its own.
struct Private {
    /// Buffer -> offset in the worker's scratch.
    offsets: BTreeMap<usize, u64>,
    /// End of the last one.
    end: u64,
}

impl Private {
    /// Whether every worker runs all of `step`.
    fn replicates(&self, step: &Step) -> bool {
        step.writes.iter().filter_map(Place::buffer).any(|b| self.offsets.contains_key(&b))
    }
}

/// A product whose launch was taken back, to be computed by the kernel that reads it.
struct Partner {
    /// Packed weights of its products.
    weights: Vec<Place>,
    /// What its epilogue reads.
    inputs: Vec<Place>,
    epilogue: EExpr,
}

/// The epilogue of a product being written as an expression, with what it reads in the order of its inputs.
struct Epilogue {
    e: EExpr,
    value: NodeId,
    inputs: Vec<Place>,
    /// Operands that have a node.
    operands: Vec<(usize, NodeId)>,
    /// Columns of the result.
    n: u32,
}

impl Epilogue {
    fn new(n: u32) -> Epilogue {
        let mut e = EExpr::new();
        let value = e.acc();
        Epilogue { e, value, inputs: vec![], operands: vec![], n }
    }

    /// The node of operand `i`, when it has one.
    fn operand(&self, i: usize) -> Option<NodeId> {
        self.operands.iter().find(|(known, _)| *known == i).map(|&(_, node)| node)
    }

    /// Operand `i` from memory.
    fn read(&mut self, i: usize, ty: &TensorTy, out: &TensorTy, place: Place) -> Result<NodeId> {
        let mem = mem(ty)?;
        let node = if ty.shape == out.shape { self.e.elem_input(mem, self.n) } else { self.e.col_input(mem) };
        self.inputs.push(place);
        self.operands.push((i, node));
        Ok(node)
    }

    /// Operand `i` as what the epilogue of another product gives.
    fn absorb(&mut self, i: usize, other: &EExpr, inputs: &[Place]) -> Result<NodeId> {
        let many = || Diag::target("too many products meet in one epilogue");
        let product = u8::try_from(self.e.products()).map_err(|_| many())?;
        product.checked_add(other.products() as u8).ok_or_else(many)?;
        let node =
            self.e.absorb(other, product).ok_or_else(|| Diag::bug("an epilogue that stores nothing"))?;
        self.inputs.extend(inputs);
        self.operands.push((i, node));
        Ok(node)
    }

    fn step(&mut self, step: EpilogueStep, operand: Option<NodeId>) -> Result<()> {
        let operand = || operand.ok_or_else(|| Diag::bug("a step without its operand"));
        let (e, value) = (&mut self.e, self.value);
        self.value = match step {
            EpilogueStep::Add(_) => e.add(value, operand()?),
            EpilogueStep::Mul(_) => e.mul(value, operand()?),
            EpilogueStep::Silu => e.unary(UnaryOp::Silu, value),
            EpilogueStep::Gelu => e.unary(UnaryOp::GeluErf, value),
            EpilogueStep::GeluTanh => e.unary(UnaryOp::GeluTanh, value),
            EpilogueStep::Relu => e.unary(UnaryOp::Relu, value),
            EpilogueStep::Tanh => e.unary(UnaryOp::Tanh, value),
        };
        Ok(())
    }

    fn finish(mut self) -> (EExpr, Vec<Place>) {
        self.e.store(self.value, MemTy::F32, self.n);
        (self.e, self.inputs)
    }
}

/// For each step, whether the next may begin while it still runs: nothing that runs since the last barrier writes what
/// the next step touches, or touches what it writes. Places that are not `shared` belong to one worker, which runs its part
/// of the steps in their order.
fn overlaps(
    steps: &[Step],
    shared: impl Fn(&&Place) -> bool,
    bytes: impl Fn(&Place) -> Option<(u64, u64)>,
) -> Vec<bool> {
    let meet = |a: &Place, b: &Place| match (bytes(a), bytes(b)) {
        (Some(a), Some(b)) => a.0 < b.1 && b.0 < a.1,
        _ => a == b,
    };
    let clash = |a: &[Place], b: &[Place]| {
        a.iter().filter(&shared).any(|x| b.iter().filter(&shared).any(|y| meet(x, y)))
    };
    let mut free = vec![false; steps.len()];
    let mut running = 0;
    for next in 1..steps.len() {
        let conflict = steps[running..next].iter().any(|s| {
            clash(&s.writes, &steps[next].reads)
                || clash(&s.writes, &steps[next].writes)
                || clash(&s.reads, &steps[next].writes)
        });
        if conflict {
            running = next;
        } else {
            free[next - 1] = true;
        }
    }
    free
}
