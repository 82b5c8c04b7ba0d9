//! The little language of what happens to values on their way into and out of kernels.
//!
//! An [`EExpr`] is a list of nodes in single assignment form over f32 lanes: each node has one value per
//! `(row, col)`, and some are the same for a whole row or a whole column. It serves as the epilogue of matmuls
//! (bias, residual, activation, casts), and as the body of row kernels (norms, softmax, quantization, elementwise
//! arithmetic). It is plain data: equal expressions compare and hash equal, so a kernel can be shared by all
//! launches that need the same one.
//!
//! Two lowerings exist: [`interp`] runs an expression in Rust (in f64 as reference, in f32 as definition of the
//! rounding steps) and `llvm` emits it for a vector of columns. The language knows nothing of either.
//!
//! # Meaning
//!
//! - All arithmetic is on f32. Inputs of narrower types are widened on load, exactly.
//! - `silu(x) = x * sigmoid(x)`, `sigmoid(x) = 1 / (1 + exp(-x))`.
//! - `gelu_erf(x) = 0.5 * x * (1 + erf(x / sqrt(2)))`,
//!   `gelu_tanh(x) = 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))`.
//! - `rsqrt(x) = 1 / sqrt(x)` and `rcp(x) = 1 / x`, with true square roots and divisions, no estimates.
//! - `round` is to the nearest integer, ties to even. `one_if_zero(x) = if x == 0 { 1 } else { x }`, for scales.
//! - `fma(a, b, c) = a * b + c`, rounded once where the target can and twice where it cannot.
//! - `min(a, b) = if a < b { a } else { b }`, `max(a, b) = if a > b { a } else { b }`: with a NaN, the second operand.
//!   `relu(x) = if x < 0 { 0 } else { x }`, which keeps NaN.
//! - A reduction runs over all columns of the row and gives every column the same value. The order of its sums is
//!   the lowering's; `max` and `absmax` do not depend on order and pass over NaN (of a row of nothing else they give
//!   minus infinity and zero).
//! - `round_e4m3(x)` is the number nearest to x that OCP E4M3 has, ties to even, beyond 448 the largest; NaN stays NaN.
//! - A store to `I8` rounds half to even and clamps to -128..=127 (NaN becomes 0). A store to `F16` or `Bf16`
//!   rounds to nearest even; out of range gives infinity.
use std::fmt;

use serde::{Deserialize, Serialize};

pub mod interp;
#[cfg(feature = "llvm")]
pub mod llvm;

/// An f32 constant, compared and hashed by its bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct F32(u32);

impl F32 {
    /// The constant with this value.
    pub const fn new(value: f32) -> F32 {
        F32(value.to_bits())
    }

    /// The value.
    pub const fn get(self) -> f32 {
        f32::from_bits(self.0)
    }
}

impl From<f32> for F32 {
    fn from(value: f32) -> F32 {
        F32::new(value)
    }
}

impl fmt::Debug for F32 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.get())
    }
}

/// Type of values in memory. In registers everything is f32.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum MemTy {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// Signed bytes.
    I8,
    /// Signed 32-bit integers.
    I32,
}

impl MemTy {
    /// Bytes of one value.
    pub const fn bytes(self) -> usize {
        match self {
            MemTy::F32 | MemTy::I32 => 4,
            MemTy::F16 | MemTy::Bf16 => 2,
            MemTy::I8 => 1,
        }
    }

    /// Short name, for symbols and messages.
    pub const fn name(self) -> &'static str {
        match self {
            MemTy::F32 => "f32",
            MemTy::F16 => "f16",
            MemTy::Bf16 => "bf16",
            MemTy::I8 => "i8",
            MemTy::I32 => "i32",
        }
    }
}

/// How an input is indexed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum InputKind {
    /// One value per row and column; rows are `stride` elements apart.
    Elem {
        /// Elements from one row to the next.
        stride: u32,
    },
    /// One value per column, the same for all rows: gains, biases.
    Col,
    /// One value per row: scales.
    Row,
    /// One value for all rows and columns: static scales.
    One,
}

/// One buffer an expression reads.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct InputDesc {
    /// Type in memory: `F32`, `F16`, `Bf16` or `I8`.
    pub ty: MemTy,
    /// How it is indexed.
    pub kind: InputKind,
}

/// How an output is indexed and what it holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum OutputKind {
    /// One value per row and column; rows are `stride` elements apart.
    Elem {
        /// Elements from one row to the next.
        stride: u32,
        /// Columns written as zeros after the last one (row kernels only); at most `stride - cols`.
        zero_pad: u32,
    },
    /// One value per row; the node stored must not depend on the column.
    Row,
    /// `I32`: for each group of `group` columns (the last may be shorter) the sum of the values as a store to `I8`
    /// would write them. Rows are `stride` sums apart. Row kernels only.
    GroupSums {
        /// Columns of one sum.
        group: u32,
        /// Sums from one row to the next.
        stride: u32,
    },
}

/// One buffer an expression writes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct OutputDesc {
    /// Type in memory: `F32`, `F16`, `Bf16`, `I8`, or `I32` for group sums.
    pub ty: MemTy,
    /// How it is indexed.
    pub kind: OutputKind,
}

/// Index of an input in [`EExpr::inputs`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InputId(pub u32);

/// Index of an output in [`EExpr::outputs`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OutputId(pub u32);

/// Index of a node in [`EExpr::nodes`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub u32);

/// Functions of one value. The module docs define each.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the module docs define each of them in a line")]
pub enum UnaryOp {
    Neg,
    Abs,
    Exp,
    Silu,
    GeluErf,
    GeluTanh,
    Tanh,
    Sigmoid,
    Sqrt,
    Rsqrt,
    Rcp,
    Relu,
    Round,
    OneIfZero,
    RoundE4m3,
}

/// Functions of two values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say all; min and max of NaN are in the module docs")]
pub enum BinaryOp {
    Add,
    Sub,
    Mul,
    Div,
    Min,
    Max,
}

/// What a reduction over the columns of a row computes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReduceOp {
    /// The sum.
    Sum,
    /// The largest value.
    Max,
    /// The largest absolute value.
    AbsMax,
}

/// One value per `(row, col)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Node {
    /// An accumulator of the matmul this is the epilogue of: the sums of its first product, of its second, and so on.
    Acc(u8),
    /// `input[row][col]`.
    Elem(InputId),
    /// `input[row][col + col_offset]`: the other half of a buffer that holds two things side by side.
    ElemAt {
        /// The input.
        input: InputId,
        /// Columns to the right.
        col_offset: u32,
    },
    /// `input[col]`.
    Col(InputId),
    /// `input[row]`, or the one value there is.
    Row(InputId),
    /// A constant.
    Const(F32),
    /// A function of one value.
    Unary(UnaryOp, NodeId),
    /// A function of two values.
    Binary(BinaryOp, NodeId, NodeId),
    /// `a * b + c`.
    Fma(NodeId, NodeId, NodeId),
    /// A reduction over all columns of the row (row kernels only).
    Reduce(ReduceOp, NodeId),
}

impl Node {
    /// The nodes this one reads.
    pub fn operands(&self) -> impl Iterator<Item = NodeId> + use<> {
        let list = match *self {
            Node::Unary(_, a) | Node::Reduce(_, a) => [Some(a), None, None],
            Node::Binary(_, a, b) => [Some(a), Some(b), None],
            Node::Fma(a, b, c) => [Some(a), Some(b), Some(c)],
            _ => [None, None, None],
        };
        list.into_iter().flatten()
    }
}

/// Writes a node to an output.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Store {
    /// What to write.
    pub node: NodeId,
    /// Where to; its description says type and form.
    pub output: OutputId,
}

/// An expression: inputs, nodes in order of definition, outputs, and stores.
///
/// Kernels take the inputs in order, then the outputs in order, as their arguments (a kernel's spec says what comes
/// before them).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub struct EExpr {
    /// Buffers read.
    pub inputs: Vec<InputDesc>,
    /// Nodes; operands come before their users.
    pub nodes: Vec<Node>,
    /// Buffers written.
    pub outputs: Vec<OutputDesc>,
    /// Stores, one per output.
    pub stores: Vec<Store>,
}

/// Where an expression is used: what it may contain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// After a matmul: `Acc` is there, reductions, padding and group sums are not.
    Epilogue,
    /// In a row kernel: everything but `Acc`.
    Row {
        /// Columns of a row.
        cols: u32,
    },
}

/// Why an expression is not well formed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExprError(pub String);

impl fmt::Display for ExprError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed expression: {}", self.0)
    }
}

impl std::error::Error for ExprError {}

/// Building. Equal nodes are made once.
impl EExpr {
    /// An empty expression.
    pub fn new() -> EExpr {
        EExpr::default()
    }

    /// The epilogue that writes the accumulator as it is: rows of `stride` values.
    pub fn store_acc(ty: MemTy, stride: u32) -> EExpr {
        let mut e = EExpr::new();
        let acc = e.acc();
        e.store(acc, ty, stride);
        e
    }

    fn push(&mut self, node: Node) -> NodeId {
        let at = self.nodes.iter().position(|n| *n == node).unwrap_or_else(|| {
            self.nodes.push(node);
            self.nodes.len() - 1
        });
        NodeId(at as u32)
    }

    /// Declares an input.
    pub fn input(&mut self, ty: MemTy, kind: InputKind) -> InputId {
        self.inputs.push(InputDesc { ty, kind });
        InputId(self.inputs.len() as u32 - 1)
    }

    /// Declares an input with a value per row and column, and reads it.
    pub fn elem_input(&mut self, ty: MemTy, stride: u32) -> NodeId {
        let input = self.input(ty, InputKind::Elem { stride });
        self.elem(input)
    }

    /// Declares an input with a value per column, and reads it.
    pub fn col_input(&mut self, ty: MemTy) -> NodeId {
        let input = self.input(ty, InputKind::Col);
        self.push(Node::Col(input))
    }

    /// Declares an input with a value per row, and reads it.
    pub fn row_input(&mut self, ty: MemTy) -> NodeId {
        let input = self.input(ty, InputKind::Row);
        self.push(Node::Row(input))
    }

    /// Declares an input with one value, and reads it.
    pub fn one_input(&mut self, ty: MemTy) -> NodeId {
        let input = self.input(ty, InputKind::One);
        self.push(Node::Row(input))
    }

    /// The accumulator of a matmul's first product.
    pub fn acc(&mut self) -> NodeId {
        self.push(Node::Acc(0))
    }

    /// Takes over the nodes and inputs of `other`, the epilogue of another product, which becomes product number `product`
    /// here. Gives the node that `other` stores; its inputs follow those already declared.
    pub fn absorb(&mut self, other: &EExpr, product: u8) -> Option<NodeId> {
        let first = self.inputs.len() as u32;
        self.inputs.extend(&other.inputs);
        let input = |id: InputId| InputId(first + id.0);
        let mut moved: Vec<NodeId> = Vec::with_capacity(other.nodes.len());
        for node in &other.nodes {
            let at = |id: NodeId| moved[id.0 as usize];
            let node = match *node {
                Node::Acc(i) => Node::Acc(product + i),
                Node::Elem(id) => Node::Elem(input(id)),
                Node::ElemAt { input: id, col_offset } => Node::ElemAt { input: input(id), col_offset },
                Node::Col(id) => Node::Col(input(id)),
                Node::Row(id) => Node::Row(input(id)),
                Node::Const(value) => Node::Const(value),
                Node::Unary(op, a) => Node::Unary(op, at(a)),
                Node::Binary(op, a, b) => Node::Binary(op, at(a), at(b)),
                Node::Fma(a, b, c) => Node::Fma(at(a), at(b), at(c)),
                Node::Reduce(op, a) => Node::Reduce(op, at(a)),
            };
            moved.push(self.push(node));
        }
        other.stores.first().map(|store| moved[store.node.0 as usize])
    }

    /// Reads `input[row][col]`.
    pub fn elem(&mut self, input: InputId) -> NodeId {
        self.push(Node::Elem(input))
    }

    /// Reads `input[row][col + col_offset]`.
    pub fn elem_at(&mut self, input: InputId, col_offset: u32) -> NodeId {
        match col_offset {
            0 => self.elem(input),
            _ => self.push(Node::ElemAt { input, col_offset }),
        }
    }

    /// A constant.
    pub fn constant(&mut self, value: f32) -> NodeId {
        self.push(Node::Const(F32::new(value)))
    }

    /// A function of one value.
    pub fn unary(&mut self, op: UnaryOp, a: NodeId) -> NodeId {
        self.push(Node::Unary(op, a))
    }

    /// A function of two values.
    pub fn binary(&mut self, op: BinaryOp, a: NodeId, b: NodeId) -> NodeId {
        self.push(Node::Binary(op, a, b))
    }

    /// `a + b`.
    pub fn add(&mut self, a: NodeId, b: NodeId) -> NodeId {
        self.binary(BinaryOp::Add, a, b)
    }

    /// `a - b`.
    pub fn sub(&mut self, a: NodeId, b: NodeId) -> NodeId {
        self.binary(BinaryOp::Sub, a, b)
    }

    /// `a * b`.
    pub fn mul(&mut self, a: NodeId, b: NodeId) -> NodeId {
        self.binary(BinaryOp::Mul, a, b)
    }

    /// `a / b`.
    pub fn div(&mut self, a: NodeId, b: NodeId) -> NodeId {
        self.binary(BinaryOp::Div, a, b)
    }

    /// `a * b + c`.
    pub fn fma(&mut self, a: NodeId, b: NodeId, c: NodeId) -> NodeId {
        self.push(Node::Fma(a, b, c))
    }

    /// A reduction over the row.
    pub fn reduce(&mut self, op: ReduceOp, a: NodeId) -> NodeId {
        self.push(Node::Reduce(op, a))
    }

    /// Declares an output and stores `node` to it.
    pub fn store_to(&mut self, node: NodeId, ty: MemTy, kind: OutputKind) -> OutputId {
        let output = OutputId(self.outputs.len() as u32);
        self.outputs.push(OutputDesc { ty, kind });
        self.stores.push(Store { node, output });
        output
    }

    /// Stores one value per row and column.
    pub fn store(&mut self, node: NodeId, ty: MemTy, stride: u32) -> OutputId {
        self.store_to(node, ty, OutputKind::Elem { stride, zero_pad: 0 })
    }

    /// Stores one value per row.
    pub fn store_row(&mut self, node: NodeId, ty: MemTy) -> OutputId {
        self.store_to(node, ty, OutputKind::Row)
    }
}

/// Facts.
impl EExpr {
    /// The node with this id.
    ///
    /// Ids come from this expression's own nodes and stores, which [`EExpr::check`] has found in range.
    pub fn node(&self, id: NodeId) -> Node {
        self.nodes[id.0 as usize]
    }

    /// Products whose sums the expression reads: accumulators `0..products()`.
    pub fn products(&self) -> u32 {
        let last =
            self.nodes.iter().filter_map(|n| if let Node::Acc(i) = n { Some(u32::from(*i)) } else { None });
        last.max().map_or(0, |i| i + 1)
    }

    /// For each node whether its value is the same in all columns of a row.
    pub fn row_uniform(&self) -> Vec<bool> {
        let mut uniform: Vec<bool> = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            let is = match node {
                Node::Row(_) | Node::Const(_) | Node::Reduce(..) => true,
                Node::Acc(_) | Node::Elem(_) | Node::ElemAt { .. } | Node::Col(_) => false,
                _ => node.operands().all(|id| uniform[id.0 as usize]),
            };
            uniform.push(is);
        }
        uniform
    }

    /// For each node in which pass over the row it can first be computed: nodes that need no reduction in pass 0,
    /// a reduction's value one pass after its operand's.
    pub fn passes(&self) -> Vec<u32> {
        let mut pass: Vec<u32> = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            let inner = node.operands().map(|id| pass[id.0 as usize]).max().unwrap_or(0);
            pass.push(inner + matches!(node, Node::Reduce(..)) as u32);
        }
        pass
    }

    /// Checks that the expression may stand in `place`.
    pub fn check(&self, place: Place) -> Result<(), ExprError> {
        let err = |text: String| Err(ExprError(text));
        let input = |id: InputId| self.inputs.get(id.0 as usize).map(|d| d.kind);
        for (i, desc) in self.inputs.iter().enumerate() {
            if desc.ty == MemTy::I32 {
                return err(format!("input {i} is i32; inputs are f32, f16, bf16 or i8"));
            }
        }
        for (i, node) in self.nodes.iter().enumerate() {
            if node.operands().any(|id| id.0 as usize >= i) {
                return err(format!("node {i} reads a node that is not before it"));
            }
            let fits = match *node {
                Node::Elem(id) => {
                    matches!(input(id), Some(InputKind::Elem { stride }) if reach_ok(place, 0, stride))
                }
                Node::ElemAt { input: id, col_offset } => {
                    matches!(input(id), Some(InputKind::Elem { stride }) if reach_ok(place, col_offset, stride))
                }
                Node::Col(id) => input(id) == Some(InputKind::Col),
                Node::Row(id) => matches!(input(id), Some(InputKind::Row | InputKind::One)),
                _ => true,
            };
            if !fits {
                return err(format!(
                    "node {i} reads an input that is not there, of another kind, or too narrow"
                ));
            }
            match (place, node) {
                (Place::Row { .. }, Node::Acc(_)) => {
                    return err(format!("node {i}: no accumulator in a row kernel"));
                }
                (Place::Epilogue, Node::Reduce(..)) => {
                    return err(format!("node {i}: no reduction in an epilogue"));
                }
                _ => {}
            }
        }
        if let Some(i) = (0..self.products()).find(|&i| !self.nodes.contains(&Node::Acc(i as u8))) {
            return err(format!("accumulator {i} is never read"));
        }
        if self.stores.is_empty() {
            return err("it stores nothing".to_owned());
        }
        let uniform = self.row_uniform();
        let mut written = vec![false; self.outputs.len()];
        for (i, store) in self.stores.iter().enumerate() {
            let (Some(desc), Some(&uniform)) =
                (self.outputs.get(store.output.0 as usize), uniform.get(store.node.0 as usize))
            else {
                return err(format!("store {i} names a node or an output that is not there"));
            };
            if std::mem::replace(&mut written[store.output.0 as usize], true) {
                return err(format!("output {} is written twice", store.output.0));
            }
            let ok = match (desc.kind, place) {
                (OutputKind::Elem { stride, zero_pad }, Place::Row { cols }) => {
                    desc.ty != MemTy::I32 && zero_pad.checked_add(cols).is_some_and(|width| width <= stride)
                }
                (OutputKind::Elem { zero_pad, .. }, Place::Epilogue) => {
                    desc.ty != MemTy::I32 && zero_pad == 0
                }
                (OutputKind::Row, Place::Row { .. }) => desc.ty != MemTy::I32 && uniform,
                (OutputKind::Row, Place::Epilogue) => false,
                (OutputKind::GroupSums { group, stride }, Place::Row { cols }) => {
                    desc.ty == MemTy::I32 && group > 0 && stride >= cols.div_ceil(group)
                }
                (OutputKind::GroupSums { .. }, Place::Epilogue) => false,
            };
            if !ok {
                return err(format!("store {i} does not fit its output"));
            }
        }
        match written.iter().position(|w| !w) {
            Some(output) => err(format!("output {output} is never written")),
            None => Ok(()),
        }
    }
}

/// Whether a row of `stride` elements has all columns from `offset` on that the place reads.
fn reach_ok(place: Place, offset: u32, stride: u32) -> bool {
    match place {
        // A stride of zero repeats one row; then only the row's own width counts, which nobody states.
        Place::Row { cols } => stride == 0 || offset.checked_add(cols).is_some_and(|end| end <= stride),
        Place::Epilogue => true,
    }
}
