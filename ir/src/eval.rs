//! The reference evaluator: walks a graph and calls each op's meaning.
//!
//! It is the oracle that importers, rewrites and kernels are compared with, so it is plain, not fast. Values are
//! kept in f32; sums inside an op are taken in f64 and rounded once.

mod stored;

use crate::diag::{Diag, Loc, Result};
use crate::entity::{SecondaryMap, StateId, ValueId};
use crate::graph::{Def, Graph};
use crate::module::Module;
use crate::ops::OpSpec;
use crate::ty::{Dim, ElemTy, Int, Shape, TensorTy};
use crate::weights::Store;
use std::collections::BTreeMap;

/// The elements of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// Numbers of any float type, already rounded to it.
    F32(Vec<f32>),
    /// Doubles.
    F64(Vec<f64>),
    /// Plain integers of 32 bits.
    I32(Vec<i32>),
    /// Plain integers of any other type; those of u64 by their bits.
    I64(Vec<i64>),
    /// Codes of a quantized type, one a byte.
    Codes(Vec<u8>),
}

impl Data {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Data::F32(x) => x.len(),
            Data::F64(x) => x.len(),
            Data::I32(x) => x.len(),
            Data::I64(x) => x.len(),
            Data::Codes(x) => x.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements at `from`, which are indices of elements.
    pub fn take(&self, from: impl Iterator<Item = usize>) -> Data {
        match self {
            Data::F32(x) => Data::F32(from.map(|i| x[i]).collect()),
            Data::F64(x) => Data::F64(from.map(|i| x[i]).collect()),
            Data::I32(x) => Data::I32(from.map(|i| x[i]).collect()),
            Data::I64(x) => Data::I64(from.map(|i| x[i]).collect()),
            Data::Codes(x) => Data::Codes(from.map(|i| x[i]).collect()),
        }
    }

    /// The elements of `self` and of what follows, which has elements of the same kind.
    pub fn append(&mut self, other: Data) -> Result<()> {
        match (self, other) {
            (Data::F32(x), Data::F32(y)) => x.extend(y),
            (Data::F64(x), Data::F64(y)) => x.extend(y),
            (Data::I32(x), Data::I32(y)) => x.extend(y),
            (Data::I64(x), Data::I64(y)) => x.extend(y),
            (Data::Codes(x), Data::Codes(y)) => x.extend(y),
            _ => return Err(Diag::bug("elements of another kind")),
        }
        Ok(())
    }
}

/// A tensor with its type; the shape is static.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Element type and shape.
    pub ty: TensorTy,
    /// Elements, row-major.
    pub data: Data,
}

impl Tensor {
    fn checked(ty: &TensorTy, data: Data, len: usize) -> Result<Tensor> {
        if ty.shape.elements() == Some(len as u64) {
            return Ok(Tensor { ty: ty.clone(), data });
        }
        Err(Diag::bug(format!("{len} elements do not fill {ty}")))
    }

    /// A float tensor; the numbers are rounded to the element type.
    pub fn float(ty: &TensorTy, mut data: Vec<f32>) -> Result<Tensor> {
        match ty.elem {
            ElemTy::F32 => {}
            ElemTy::F16 => data.iter_mut().for_each(|x| *x = half::f16::from_f32(*x).to_f32()),
            ElemTy::Bf16 => data.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32()),
            _ => return Err(Diag::bug(format!("float data for {ty}"))),
        }
        let len = data.len();
        Tensor::checked(ty, Data::F32(data), len)
    }

    /// A tensor of plain floats, doubles, plain integers or codes without scales; numbers are rounded to nearest, and
    /// those that an integer type does not hold saturate.
    pub fn from_reals(ty: &TensorTy, data: Vec<f64>) -> Result<Tensor> {
        let len = data.len();
        match ty.elem {
            ElemTy::F64 => Tensor::checked(ty, Data::F64(data), len),
            ElemTy::Int(int) => {
                let (min, max) = int.range();
                let one = |x: f64| (x.round_ties_even() as i128).clamp(min, max);
                Tensor::from_ints(ty, data.into_iter().map(one))
            }
            ElemTy::Q(s) => {
                Tensor::codes(ty, data.iter().map(|&x| s.format.encode(x as f32) as u8).collect())
            }
            _ => Tensor::float(ty, data.into_iter().map(|x| x as f32).collect()),
        }
    }

    /// A tensor of plain integers, which are taken modulo the range of the type.
    pub fn from_ints(ty: &TensorTy, data: impl Iterator<Item = i128>) -> Result<Tensor> {
        let int = ty.elem.int().ok_or_else(|| Diag::bug(format!("integer data for {ty}")))?;
        let data = match int {
            Int::I32 => Data::I32(data.map(|x| int.wrap(x) as i32).collect()),
            _ => Data::I64(data.map(|x| int.wrap(x) as i64).collect()),
        };
        let len = data.len();
        Tensor::checked(ty, data, len)
    }

    /// A tensor whose elements are of the kind that its type wants.
    pub fn new(ty: &TensorTy, data: Data) -> Result<Tensor> {
        let fits = match ty.elem {
            ElemTy::F32 | ElemTy::F16 | ElemTy::Bf16 => matches!(data, Data::F32(_)),
            ElemTy::F64 => matches!(data, Data::F64(_)),
            ElemTy::I32 => matches!(data, Data::I32(_)),
            ElemTy::Int(_) => matches!(data, Data::I64(_)),
            ElemTy::Q(_) => matches!(data, Data::Codes(_)),
        };
        if !fits {
            return Err(Diag::bug(format!("elements of another kind for {ty}")));
        }
        let len = data.len();
        Tensor::checked(ty, data, len)
    }

    /// An f32 tensor of static extents.
    pub fn f32(dims: &[u64], data: Vec<f32>) -> Result<Tensor> {
        Tensor::float(&TensorTy::fixed(ElemTy::F32, dims), data)
    }

    /// An integer tensor.
    pub fn i32(dims: &[u64], data: Vec<i32>) -> Result<Tensor> {
        let len = data.len();
        Tensor::checked(&TensorTy::fixed(ElemTy::I32, dims), Data::I32(data), len)
    }

    /// A tensor of codes.
    pub fn codes(ty: &TensorTy, data: Vec<u8>) -> Result<Tensor> {
        let len = data.len();
        Tensor::checked(ty, Data::Codes(data), len)
    }

    /// The numbers of a float tensor.
    pub fn f32s(&self) -> Result<&[f32]> {
        match &self.data {
            Data::F32(x) => Ok(x),
            _ => Err(Diag::bug(format!("{} has no float elements", self.ty))),
        }
    }

    /// The numbers of an integer tensor.
    pub fn i32s(&self) -> Result<&[i32]> {
        match &self.data {
            Data::I32(x) => Ok(x),
            _ => Err(Diag::bug(format!("{} has no i32 elements", self.ty))),
        }
    }

    /// All elements as doubles: floats and integers as they are, codes as the numbers they stand for without scales.
    pub fn reals(&self) -> Vec<f64> {
        match &self.data {
            Data::F32(x) => x.iter().map(|&x| x.into()).collect(),
            Data::F64(x) => x.clone(),
            Data::Codes(x) => {
                let format = self.ty.elem.scheme().map(|s| s.format);
                let one = |&c: &u8| format.map_or(f64::from(c), |f| f64::from(f.decode(c.into())));
                x.iter().map(one).collect()
            }
            Data::I32(_) | Data::I64(_) => self.ints().into_iter().map(|x| x as f64).collect(),
        }
    }

    /// All elements of plain integers, and codes of integers without scales; other numbers are cut towards zero.
    pub fn ints(&self) -> Vec<i128> {
        match &self.data {
            Data::I32(x) => x.iter().map(|&x| x.into()).collect(),
            Data::I64(x) if self.ty.elem == ElemTy::Int(Int::U64) => {
                x.iter().map(|&x| i128::from(x as u64)).collect()
            }
            Data::I64(x) => x.iter().map(|&x| x.into()).collect(),
            Data::F32(_) | Data::F64(_) | Data::Codes(_) => {
                self.reals().into_iter().map(|x| x as i128).collect()
            }
        }
    }

    /// The codes of a quantized tensor.
    pub fn code_bytes(&self) -> Result<&[u8]> {
        match &self.data {
            Data::Codes(x) => Ok(x),
            _ => Err(Diag::bug(format!("{} has no codes", self.ty))),
        }
    }

    /// Extents.
    pub fn dims(&self) -> Vec<usize> {
        let fixed = |d: &Dim| d.fixed().expect("shapes of tensors are static, checked when they are made");
        self.ty.shape.0.iter().map(|d| fixed(d) as usize).collect()
    }

    /// Extents as (rows, columns): the last axis against all others.
    pub fn rows_cols(&self) -> (usize, usize) {
        let dims = self.dims();
        let cols = dims.last().copied().unwrap_or(1);
        (dims.iter().rev().skip(1).product(), cols)
    }

    /// The same elements under another shape of as many elements.
    pub fn reshaped(mut self, shape: Shape) -> Result<Tensor> {
        if shape.elements() != self.ty.shape.elements() {
            return Err(Diag::bug(format!("{} does not reshape to {shape}", self.ty)));
        }
        self.ty.shape = shape;
        Ok(self)
    }

    /// Rows `from..from + count` of the first axis.
    pub fn slice_rows(&self, from: usize, count: usize) -> Result<Tensor> {
        let dims = self.dims();
        let (Some(&n), Some(end)) = (dims.first(), from.checked_add(count)) else {
            return Err(Diag::bug("rows of a tensor without axes"));
        };
        if end > n {
            return Err(Diag::bug(format!("rows {from}..{end} of {}", self.ty)));
        }
        let row: usize = dims[1..].iter().product();
        let (a, b) = (from * row, end * row);
        let mut ty = self.ty.clone();
        ty.shape.0[0] = Dim::Static(count as u64);
        let data = match &self.data {
            // Codes and floats of states are many; the others are not worth a line each.
            Data::F32(x) => Data::F32(x[a..b].to_vec()),
            Data::Codes(x) => Data::Codes(x[a..b].to_vec()),
            other => other.take(a..b),
        };
        Ok(Tensor { ty, data })
    }

    /// Overwrites rows of the first axis with those of `rows`, from row `at` on.
    pub fn write_rows(&mut self, at: usize, rows: &Tensor) -> Result<()> {
        let (dims, src) = (self.dims(), rows.dims());
        if dims.is_empty() || dims[1..] != src[1..] || at + src[0] > dims[0] || self.ty.elem != rows.ty.elem {
            return Err(Diag::bug(format!("writing {} into {} at row {at}", rows.ty, self.ty)));
        }
        let start = at * dims[1..].iter().product::<usize>();
        match (&mut self.data, &rows.data) {
            (Data::F32(x), Data::F32(y)) => x[start..start + y.len()].copy_from_slice(y),
            (Data::F64(x), Data::F64(y)) => x[start..start + y.len()].copy_from_slice(y),
            (Data::I32(x), Data::I32(y)) => x[start..start + y.len()].copy_from_slice(y),
            (Data::I64(x), Data::I64(y)) => x[start..start + y.len()].copy_from_slice(y),
            (Data::Codes(x), Data::Codes(y)) => x[start..start + y.len()].copy_from_slice(y),
            _ => return Err(Diag::bug("rows of another kind")),
        }
        Ok(())
    }
}

/// Operand `i`, which inference has shown to be present.
pub fn arg<'a>(args: &[Option<&'a Tensor>], i: usize) -> Result<&'a Tensor> {
    args.get(i).copied().flatten().ok_or_else(|| Diag::bug(format!("operand {i} is missing in evaluation")))
}

/// Runs the layer of a name on operands.
type RunLayer<'a> = dyn Fn(&str, &[&Tensor], EvalCx<'_>) -> Result<Tensor> + 'a;

/// What an op may ask while it is evaluated.
pub struct EvalCx<'a> {
    /// Tokens in the state before this call.
    pub past: u64,
    /// Tokens of this call.
    pub tokens: u64,
    /// Rows of logits wanted.
    pub rows: u64,
    /// Extents that the inputs of `main` have where their types have symbols.
    symbols: BTreeMap<char, u64>,
    states: &'a mut BTreeMap<StateId, Tensor>,
    arg_states: Vec<Option<StateId>>,
    layer: &'a RunLayer<'a>,
}

impl EvalCx<'_> {
    /// The extent bound to a symbol.
    pub fn symbol(&self, c: char) -> u64 {
        match c {
            's' => self.past + self.tokens,
            'r' => self.rows,
            _ => self.symbols.get(&c).copied().unwrap_or(self.tokens),
        }
    }

    /// Writes `rows` into the state given as operand `i`, after the tokens it holds, and returns all it then holds.
    pub fn append(&mut self, i: usize, rows: &Tensor) -> Result<Tensor> {
        let id = self.arg_states.get(i).copied().flatten();
        let id = id.ok_or_else(|| Diag::input(format!("operand {i} is not a state")))?;
        let past = self.past as usize;
        let state = self.states.get_mut(&id).ok_or_else(|| Diag::bug("a state was not allocated"))?;
        let context = state.dims()[0];
        let filled = past + rows.dims()[0];
        if filled > context {
            return Err(Diag::input(format!("{filled} tokens exceed the context of {context}")));
        }
        state.write_rows(past, rows)?;
        state.slice_rows(0, filled)
    }

    /// Runs a layer.
    pub fn call(&mut self, layer: &str, args: &[&Tensor]) -> Result<Tensor> {
        let inner = EvalCx {
            past: self.past,
            tokens: self.tokens,
            rows: self.rows,
            symbols: self.symbols.clone(),
            states: self.states,
            arg_states: vec![],
            layer: self.layer,
        };
        (self.layer)(layer, args, inner)
    }

    /// `ty` with its symbols bound.
    pub fn bind(&self, ty: &TensorTy) -> TensorTy {
        let bound = |d: &Dim| match *d {
            Dim::Sym(c) => Dim::Static(self.symbol(c)),
            fixed => fixed,
        };
        TensorTy { elem: ty.elem, shape: Shape(ty.shape.0.iter().map(bound).collect()) }
    }
}

/// Called with the function's name, a value and what it holds, each time an op was evaluated.
pub type Tap<'a> = dyn Fn(&str, ValueId, &Tensor) + 'a;

/// Called with the function's name and a value each time an op was evaluated; what it gives is used instead.
pub type Replace<'a> = dyn Fn(&str, ValueId) -> Option<Tensor> + 'a;

/// Who looks at an evaluation.
#[derive(Clone, Copy, Default)]
struct Watch<'a> {
    tap: Option<&'a Tap<'a>>,
    replace: Option<&'a Replace<'a>>,
}

/// Runs a module call by call, keeping its states.
pub struct Evaluator<'m> {
    module: &'m Module,
    store: &'m Store,
    states: BTreeMap<StateId, Tensor>,
    past: u64,
    watch: Watch<'m>,
}

impl<'m> Evaluator<'m> {
    /// An evaluator with empty states.
    pub fn new(module: &'m Module, store: &'m Store) -> Result<Evaluator<'m>> {
        let mut states = BTreeMap::new();
        for (id, state) in module.states.iter() {
            let n = state.ty.shape.elements().filter(|&n| n <= 1 << 30);
            let n = n.ok_or_else(|| {
                Diag::input(format!("state @{} of type {} is too large", state.name, state.ty))
            })?;
            let data = match state.ty.elem {
                ElemTy::I32 => Data::I32(vec![0; n as usize]),
                ElemTy::Int(_) => Data::I64(vec![0; n as usize]),
                ElemTy::F64 => Data::F64(vec![0.0; n as usize]),
                ElemTy::Q(_) => Data::Codes(vec![0; n as usize]),
                _ => Data::F32(vec![0.0; n as usize]),
            };
            states.insert(id, Tensor { ty: state.ty.clone(), data });
        }
        Ok(Evaluator { module, store, states, past: 0, watch: Watch::default() })
    }

    /// Shows every op's result to `tap`.
    pub fn with_tap(mut self, tap: &'m Tap<'m>) -> Self {
        self.watch.tap = Some(tap);
        self
    }

    /// Goes on with what `replace` gives for a value, so that what follows is judged on another's inputs.
    pub fn with_replacement(mut self, replace: &'m Replace<'m>) -> Self {
        self.watch.replace = Some(replace);
        self
    }

    /// Forgets all tokens.
    pub fn reset(&mut self) {
        self.past = 0;
    }

    /// Runs `main` on inputs whose first extent is the number of tokens; `rows` is the number of rows wanted of ops
    /// that cut to the last rows. Returns the results of `main`.
    pub fn step(&mut self, inputs: &[Tensor], rows: u64) -> Result<Vec<Tensor>> {
        let tokens = inputs.first().and_then(|x| x.dims().first().copied()).unwrap_or(1) as u64;
        let (module, store, watch) = (self.module, self.store, self.watch);
        let layer = LayerRunner { module, store, watch };
        let run = |name: &str, args: &[&Tensor], cx: EvalCx<'_>| layer.run(name, args, cx);
        let cx = EvalCx {
            past: self.past,
            tokens,
            rows: rows.min(tokens),
            symbols: symbols(&self.module.main, inputs),
            states: &mut self.states,
            arg_states: vec![],
            layer: &run,
        };
        let args: Vec<&Tensor> = inputs.iter().collect();
        let out = eval_graph("main", &module.main, &args, cx, module, store, watch)?;
        self.past += tokens;
        Ok(out)
    }
}

/// The extents that the inputs give to the symbols of the parameters' types. Where inputs disagree, the first counts.
fn symbols(main: &Graph, inputs: &[Tensor]) -> BTreeMap<char, u64> {
    let mut found = BTreeMap::new();
    for (&param, input) in main.params.iter().zip(inputs) {
        for (want, got) in main.ty(param).shape.0.iter().zip(&input.ty.shape.0) {
            if let (Dim::Sym(c), Dim::Static(n)) = (*want, *got) {
                found.entry(c).or_insert(n);
            }
        }
    }
    found
}

struct LayerRunner<'m> {
    module: &'m Module,
    store: &'m Store,
    watch: Watch<'m>,
}

impl LayerRunner<'_> {
    fn run(&self, name: &str, args: &[&Tensor], cx: EvalCx<'_>) -> Result<Tensor> {
        let id = self.module.layer(name).ok_or_else(|| Diag::input(format!("there is no layer @{name}")))?;
        let graph = &self.module.layers[id].graph;
        let mut out = eval_graph(name, graph, args, cx, self.module, self.store, self.watch)?;
        match out.len() {
            1 => Ok(out.remove(0)),
            n => Err(Diag::input(format!("layer @{name} has {n} results, expected one"))),
        }
    }
}

/// Evaluates a graph that reads no state: what constant folding and rule proofs need. `tokens` binds every symbol.
pub fn eval_pure(
    graph: &Graph,
    args: &[&Tensor],
    tokens: u64,
    module: &Module,
    store: &Store,
) -> Result<Vec<Tensor>> {
    let layer = LayerRunner { module, store, watch: Watch::default() };
    let run = |name: &str, args: &[&Tensor], cx: EvalCx<'_>| layer.run(name, args, cx);
    let mut states = BTreeMap::new();
    let symbols = BTreeMap::new();
    let cx = EvalCx {
        past: 0,
        tokens,
        rows: tokens,
        symbols,
        states: &mut states,
        arg_states: vec![],
        layer: &run,
    };
    eval_graph("main", graph, args, cx, module, store, Watch::default())
}

/// The tensor that a weight is, read as a whole.
pub fn weight_tensor(module: &Module, store: &Store, id: crate::entity::WeightId) -> Result<Tensor> {
    let view = store.view(&module.weights, id)?;
    let ty = &module.weights[id].ty;
    match ty.elem {
        ElemTy::Q(_) => {
            let mut codes = vec![0; view.rows() * view.cols()];
            view.read_rows_codes(0, view.rows(), &mut codes)?;
            Tensor::codes(ty, codes)
        }
        ElemTy::F64 => Tensor::new(ty, Data::F64(view.read_all_f64()?)),
        ElemTy::Int(_) => Tensor::from_ints(ty, view.read_all_ints()?.into_iter()),
        _ => Tensor::float(ty, view.read_all_f32()?),
    }
}

fn eval_graph(
    function: &str,
    graph: &Graph,
    args: &[&Tensor],
    mut cx: EvalCx<'_>,
    module: &Module,
    store: &Store,
    watch: Watch<'_>,
) -> Result<Vec<Tensor>> {
    if args.len() != graph.params.len() {
        return Err(Diag::input(format!(
            "@{function} takes {} inputs, got {}",
            graph.params.len(),
            args.len()
        )));
    }
    let mut uses = SecondaryMap::<ValueId, u32>::new();
    for (_, node) in graph.ops() {
        node.args.iter().for_each(|&a| uses[a] += 1);
    }
    graph.results.iter().for_each(|&r| uses[r] += 1);

    let mut live: BTreeMap<ValueId, Tensor> = BTreeMap::new();
    for (&param, &arg) in graph.params.iter().zip(args) {
        let want = cx.bind(graph.ty(param));
        if arg.ty != want {
            return Err(Diag::input(format!("an input of @{function} has type {}, expected {want}", arg.ty)));
        }
        live.insert(param, arg.clone());
    }
    for (_, node) in graph.ops() {
        for &a in &node.args {
            if let Def::Weight(w) = graph.value(a).def
                && !live.contains_key(&a)
            {
                live.insert(a, weight_tensor(module, store, w)?);
            }
        }
        cx.arg_states = node
            .args
            .iter()
            .map(|&a| match graph.value(a).def {
                Def::State(s) => Some(s),
                _ => None,
            })
            .collect();
        let operands: Vec<Option<&Tensor>> = node.args.iter().map(|a| live.get(a)).collect();
        let out = cx.bind(graph.ty(node.result));
        let result = node.op.eval(&mut cx, &operands, &out).map_err(|e| {
            let name = graph.value(node.result).name.as_deref().unwrap_or(node.op.name());
            e.at(Loc::Item(format!("%{name} in @{function}")))
        })?;
        if result.ty != out {
            return Err(Diag::bug(format!("`{}` made {}, declared {out}", node.op.name(), result.ty)));
        }
        if let Some(tap) = watch.tap {
            tap(function, node.result, &result);
        }
        let result = match watch.replace.and_then(|replace| replace(function, node.result)) {
            None => result,
            Some(other) if other.ty == result.ty => other,
            Some(other) => {
                return Err(Diag::bug(format!("{} was to be replaced by {}", result.ty, other.ty)));
            }
        };
        live.insert(node.result, result);
        for &a in &node.args {
            uses[a] -= 1;
            if uses[a] == 0 {
                live.remove(&a);
            }
        }
    }
    let result = |r: &ValueId| {
        let missing = || Diag::input(format!("a result of @{function} is not computed"));
        live.get(r).cloned().ok_or_else(missing)
    };
    graph.results.iter().map(result).collect()
}
