//! Loop nests over arrays: the one kernel that serves elementwise arithmetic, movement, reductions and general products.
//!
//! A [`NestSpec`] stores one number for every index of `dims`. The number is an expression ([`Node`]s) of what is
//! loaded at addresses that are affine in the index, or computed. With a [`Fold`], a second index space is walked for
//! each number, and the expression may use the result. So a transposition is a load with other strides, a margin a load
//! with guards, a convolution a fold over windows, and a chain of elementwise ops one nest.
//!
//! What holds:
//! - Shapes are part of the spec; nothing about sizes is decided when the kernel runs.
//! - A load with guards touches memory only where they hold, and gives 0 elsewhere.
//! - Floats are never reassociated, except that folds over the last axis may keep a sum for each lane.

use serde::{Deserialize, Serialize};

/// How an element lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "they are what their names say")]
pub enum Mem {
    Bool,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    F16,
    Bf16,
    F32,
    F64,
}

/// What is computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Num {
    /// Truth values.
    Bool,
    /// Integers that fit 32 bits.
    I32,
    /// Integers that fit 64 bits.
    I64,
    /// Unsigned integers of 64 bits.
    U64,
    /// Single precision, and the halves.
    F32,
    /// Double precision.
    F64,
}

impl Mem {
    /// Bytes of an element.
    pub fn bytes(self) -> u64 {
        match self {
            Mem::Bool | Mem::I8 | Mem::U8 => 1,
            Mem::I16 | Mem::U16 | Mem::F16 | Mem::Bf16 => 2,
            Mem::I32 | Mem::U32 | Mem::F32 => 4,
            Mem::I64 | Mem::U64 | Mem::F64 => 8,
        }
    }

    /// What its elements are computed with.
    pub fn num(self) -> Num {
        match self {
            Mem::Bool => Num::Bool,
            Mem::I8 | Mem::I16 | Mem::I32 | Mem::U8 | Mem::U16 => Num::I32,
            Mem::I64 | Mem::U32 => Num::I64,
            Mem::U64 => Num::U64,
            Mem::F16 | Mem::Bf16 | Mem::F32 => Num::F32,
            Mem::F64 => Num::F64,
        }
    }
}

impl Num {
    /// Whether it is a float.
    pub fn is_float(self) -> bool {
        matches!(self, Num::F32 | Num::F64)
    }
}

/// `base + sum index[a] * strides[a]`, over the axes of `dims` and then those of the fold.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Affine {
    /// The value at index 0.
    pub base: i64,
    /// One factor for each axis.
    pub strides: Vec<i64>,
}

impl Affine {
    /// The same number everywhere.
    pub fn constant(base: i64, rank: usize) -> Affine {
        Affine { base, strides: vec![0; rank] }
    }

    /// The index along one axis.
    pub fn axis(axis: usize, rank: usize) -> Affine {
        let mut a = Affine::constant(0, rank);
        a.strides[axis] = 1;
        a
    }

    /// `self * by + base`.
    pub fn scaled(&self, by: i64, base: i64) -> Affine {
        Affine { base: self.base * by + base, strides: self.strides.iter().map(|s| s * by).collect() }
    }

    /// The sum of two.
    pub fn plus(&self, other: &Affine) -> Affine {
        let strides = self.strides.iter().zip(&other.strides).map(|(a, b)| a + b).collect();
        Affine { base: self.base + other.base, strides }
    }

    /// With each axis replaced by a function of other axes, of which there are `rank`.
    pub fn through(&self, map: &[Affine], rank: usize) -> Affine {
        let start = Affine::constant(self.base, rank);
        self.strides.iter().zip(map).fold(start, |sum, (&s, m)| sum.plus(&m.scaled(s, 0)))
    }
}

/// Holds where `0 <= at < below`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Guard {
    /// What is compared.
    pub at: Affine,
    /// One more than the largest that holds.
    pub below: i64,
}

/// Index of a node.
pub type NodeId = u32;

/// Functions of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "they are what their names say, as in C's math library")]
pub enum Un {
    Neg,
    Abs,
    /// Logical, or of all bits.
    Not,
    Sqrt,
    Ceil,
    Floor,
    /// To nearest, ties to even.
    Round,
    /// An integer of as many bits that is ordered as floats are, NaN last.
    Key,
    Acos,
    Acosh,
    Asin,
    Asinh,
    Atan,
    Atanh,
    Cos,
    Cosh,
    Erf,
    Exp,
    Log,
    Sigmoid,
    Sin,
    Sinh,
    Softplus,
    Tan,
    Tanh,
}

/// Functions of two numbers of one type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "they are what their names say")]
pub enum Bin {
    Add,
    Sub,
    Mul,
    /// Integers are cut towards zero; by 0 they give 0.
    Div,
    /// With the sign of the left operand; of integers by 0 it is 0.
    Rem,
    Pow,
    /// NaN when one is.
    Min,
    /// NaN when one is.
    Max,
    And,
    Or,
    Xor,
    Shl,
    Shr,
}

/// How numbers are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "they are what their names say")]
pub enum Cmp {
    Equal,
    Less,
    LessEqual,
}

/// One step of an expression.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Node {
    /// A number: the bits of a float, or an integer.
    Const(Num, u64),
    /// An affine function of the index, as `I64`.
    Pos(Affine),
    /// Whether all guards hold.
    Inside(Vec<Guard>),
    /// An element, `at` counting elements; 0 where a guard does not hold.
    Load {
        /// Which input.
        input: u16,
        /// How it lies there.
        mem: Mem,
        /// Which element.
        at: Affine,
        /// Where memory is read at all.
        guards: Vec<Guard>,
    },
    /// An element at a computed place, an `I64` that must lie inside.
    LoadAt {
        /// Which input.
        input: u16,
        /// How it lies there.
        mem: Mem,
        /// Which element.
        at: NodeId,
    },
    /// What the fold gives, or what an accumulator of a product holds.
    Folded(Num),
    /// A function of one number.
    Unary(Un, NodeId),
    /// A function of two numbers.
    Binary(Bin, NodeId, NodeId),
    /// A comparison.
    Compare(Cmp, NodeId, NodeId),
    /// The second where the first holds, else the third.
    Select(NodeId, NodeId, NodeId),
    /// Another type of number. Floats are cut towards zero and saturate, integers wrap around.
    Convert(Num, NodeId),
    /// The nearest integer to a number of single precision that is near one of 32 bits; ties to even.
    Nearest(NodeId),
    /// The nearest number that memory of a type holds; integers wrap around.
    Fit(Mem, NodeId),
}

impl Node {
    /// The nodes it reads.
    pub fn args(&self) -> Vec<NodeId> {
        match self {
            Node::Const(..) | Node::Pos(_) | Node::Inside(_) | Node::Load { .. } | Node::Folded(_) => vec![],
            Node::LoadAt { at, .. } => vec![*at],
            Node::Unary(_, a) | Node::Convert(_, a) | Node::Nearest(a) | Node::Fit(_, a) => vec![*a],
            Node::Binary(_, a, b) | Node::Compare(_, a, b) => vec![*a, *b],
            Node::Select(a, b, c) => vec![*a, *b, *c],
        }
    }

    /// The node with every node it reads, and every affine function, replaced.
    pub fn replaced(&self, node: impl Fn(NodeId) -> NodeId, affine: impl Fn(&Affine) -> Affine) -> Node {
        let guards = |g: &[Guard]| -> Vec<Guard> {
            g.iter().map(|g| Guard { at: affine(&g.at), below: g.below }).collect()
        };
        match self {
            Node::Const(..) | Node::Folded(_) => self.clone(),
            Node::Pos(a) => Node::Pos(affine(a)),
            Node::Inside(g) => Node::Inside(guards(g)),
            Node::Load { input, mem, at, guards: g } => {
                Node::Load { input: *input, mem: *mem, at: affine(at), guards: guards(g) }
            }
            Node::LoadAt { input, mem, at } => Node::LoadAt { input: *input, mem: *mem, at: node(*at) },
            Node::Unary(f, a) => Node::Unary(*f, node(*a)),
            Node::Binary(f, a, b) => Node::Binary(*f, node(*a), node(*b)),
            Node::Compare(f, a, b) => Node::Compare(*f, node(*a), node(*b)),
            Node::Select(a, b, c) => Node::Select(node(*a), node(*b), node(*c)),
            Node::Convert(n, a) => Node::Convert(*n, node(*a)),
            Node::Nearest(a) => Node::Nearest(node(*a)),
            Node::Fit(m, a) => Node::Fit(*m, node(*a)),
        }
    }

    /// The affine functions in it.
    pub fn affines(&self) -> Vec<&Affine> {
        match self {
            Node::Pos(a) => vec![a],
            Node::Inside(g) => g.iter().map(|g| &g.at).collect(),
            Node::Load { at, guards, .. } => {
                std::iter::once(at).chain(guards.iter().map(|g| &g.at)).collect()
            }
            _ => vec![],
        }
    }
}

/// The type of each node's number.
pub fn nums(nodes: &[Node]) -> Vec<Num> {
    let mut out: Vec<Num> = Vec::with_capacity(nodes.len());
    for node in nodes {
        let of = |i: &NodeId| out[*i as usize];
        let num = match node {
            Node::Const(n, _) | Node::Folded(n) | Node::Convert(n, _) => *n,
            Node::Pos(_) => Num::I64,
            Node::Nearest(_) => Num::I32,
            Node::Inside(_) | Node::Compare(..) => Num::Bool,
            Node::Load { mem, .. } | Node::LoadAt { mem, .. } => mem.num(),
            Node::Unary(Un::Key, a) => match of(a) {
                Num::F64 => Num::I64,
                Num::F32 => Num::I32,
                other => other,
            },
            Node::Unary(_, a) | Node::Binary(_, a, _) | Node::Select(_, a, _) | Node::Fit(_, a) => of(a),
        };
        out.push(num);
    }
    out
}

/// How numbers of the fold's index space become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FoldKind {
    /// Their sum.
    Sum,
    /// Their product.
    Prod,
    /// The largest; NaN when one is.
    Max,
    /// The smallest; NaN when one is.
    Min,
    /// The index, along the one axis of the fold, of the largest integer.
    Arg {
        /// Whether the last of equal ones counts.
        last: bool,
    },
}

/// A fold over a second index space.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Fold {
    /// Extents of the index space.
    pub dims: Vec<u64>,
    /// What is done.
    pub kind: FoldKind,
    /// The numbers.
    pub of: NodeId,
    /// Stores at every step, at the index of the fold too, and whether before the step.
    pub each: Option<bool>,
}

/// Where numbers are stored, counting elements.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum To {
    /// At an affine place.
    At(Affine),
    /// At a computed place, which must lie inside; indices are walked in order by one worker.
    Computed(NodeId),
}

/// A kernel; see the module. Arguments: the inputs, then the output.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NestSpec {
    /// For people.
    pub name: String,
    /// Extents of the index space.
    pub dims: Vec<u64>,
    /// What is folded for each index.
    pub fold: Option<Fold>,
    /// The expression.
    pub nodes: Vec<Node>,
    /// The node that is stored.
    pub value: NodeId,
    /// How it is stored.
    pub out: Mem,
    /// Where it is stored.
    pub to: To,
    /// Number of inputs.
    pub inputs: u16,
}

/// Numbers of the last axis that make an item.
pub const CHUNK: u64 = 2048;

/// Fewest neighbours that are worth a vector.
const SIDE: u64 = 8;

impl NestSpec {
    /// Axes of `dims` and of the fold.
    pub fn rank(&self) -> usize {
        self.dims.len() + self.fold.as_ref().map_or(0, |f| f.dims.len())
    }

    /// All extents.
    pub fn extents(&self) -> Vec<u64> {
        self.dims.iter().chain(self.fold.iter().flat_map(|f| &f.dims)).copied().collect()
    }

    /// Whether one worker walks the indices in order.
    pub fn ordered(&self) -> bool {
        matches!(self.to, To::Computed(_))
    }

    /// Numbers of the last axis of an item, and items of it.
    pub fn chunks(&self) -> (u64, u64) {
        let last = self.dims.last().copied().unwrap_or(1);
        let work: u64 = self.fold.iter().flat_map(|f| &f.dims).product();
        let chunk = (CHUNK / work.max(1)).clamp(64, CHUNK).min(last.max(1));
        (chunk, last.div_ceil(chunk))
    }

    /// Items of a launch.
    pub fn items(&self) -> u64 {
        if self.ordered() {
            return 1;
        }
        let rows: u64 = self.dims[..self.dims.len().saturating_sub(1)].iter().product();
        rows * self.chunks().1
    }

    /// Numbers that are computed: a measure of work.
    pub fn work(&self) -> u64 {
        self.extents().iter().product()
    }

    /// The same computation with fewer axes, and the axis along which neighbours are stored last.
    pub fn simplified(mut self) -> NestSpec {
        self.drop_dead();
        let outer = self.dims.len();
        if let To::At(at) = &self.to {
            let mut order: Vec<usize> = (0..outer).collect();
            let stride = |a: usize| if self.dims[a] == 1 { i64::MAX } else { at.strides[a].abs() };
            order.sort_by_key(|&a| std::cmp::Reverse(stride(a)));
            // A few neighbours are stored one by one, so that neighbours may as well be loaded side by side.
            let few = order.last().is_some_and(|&a| self.dims[a] < SIDE);
            if let Some(at) = order.iter().rposition(|&a| self.dims[a] >= 2 * SIDE && self.side_by_side(a))
                && few
                && self.fold.is_none()
            {
                let axis = order.remove(at);
                order.push(axis);
            }
            self.permute(&order);
            self.merge_axes();
        }
        if self.dims.is_empty() {
            self.insert_axis();
        }
        self
    }

    /// Whether neighbours along an axis are loaded side by side, or are one, and nothing else is looked up.
    fn side_by_side(&self, axis: usize) -> bool {
        let mut loads = self.nodes.iter().filter_map(|node| match node {
            Node::Load { at, .. } => Some(at.strides[axis]),
            Node::LoadAt { .. } => Some(2),
            _ => None,
        });
        let mut any = false;
        loads.all(|stride| {
            any |= stride == 1;
            matches!(stride, 0 | 1)
        }) && any
    }

    fn drop_dead(&mut self) {
        let mut live = vec![false; self.nodes.len()];
        let mut stack = vec![self.value];
        stack.extend(self.fold.iter().map(|f| f.of));
        stack.extend(match self.to {
            To::Computed(at) => Some(at),
            To::At(_) => None,
        });
        while let Some(i) = stack.pop() {
            if !std::mem::replace(&mut live[i as usize], true) {
                stack.extend(self.nodes[i as usize].args());
            }
        }
        let mut new = vec![0; live.len()];
        let mut kept = vec![];
        for (i, node) in self.nodes.iter().enumerate().filter(|(i, _)| live[*i]) {
            new[i] = kept.len() as NodeId;
            kept.push(node.replaced(|n| new[n as usize], Affine::clone));
        }
        self.nodes = kept;
        self.value = new[self.value as usize];
        if let Some(fold) = &mut self.fold {
            fold.of = new[fold.of as usize];
        }
        if let To::Computed(at) = &mut self.to {
            *at = new[*at as usize];
        }
    }

    /// Replaces every affine function.
    fn each_affine(&mut self, f: impl Fn(&Affine) -> Affine) {
        for node in &mut self.nodes {
            *node = node.replaced(|n| n, &f);
        }
        if let To::At(at) = &mut self.to {
            *at = f(at);
        }
    }

    fn permute(&mut self, order: &[usize]) {
        let outer = self.dims.len();
        self.dims = order.iter().map(|&a| self.dims[a]).collect();
        self.each_affine(|at| {
            let strides = order.iter().map(|&a| at.strides[a]).chain(at.strides[outer..].iter().copied());
            Affine { base: at.base, strides: strides.collect() }
        });
    }

    fn insert_axis(&mut self) {
        self.dims.push(1);
        self.each_affine(|at| {
            let mut strides = vec![0];
            strides.extend(&at.strides);
            Affine { base: at.base, strides }
        });
    }

    fn remove_axis(&mut self, axis: usize) {
        let outer = self.dims.len();
        if axis < outer {
            self.dims.remove(axis);
        } else if let Some(fold) = &mut self.fold {
            fold.dims.remove(axis - outer);
        }
        self.each_affine(|at| {
            let mut strides = at.strides.clone();
            strides.remove(axis);
            Affine { base: at.base, strides }
        });
    }

    fn merge_axes(&mut self) {
        let arg =
            self.fold.as_ref().is_some_and(|f| matches!(f.kind, FoldKind::Arg { .. }) || f.each.is_some());
        let mut axis = self.rank();
        while axis > 0 {
            axis -= 1;
            let extents = self.extents();
            let in_fold = axis >= self.dims.len();
            if in_fold && arg {
                continue;
            }
            if extents[axis] == 1 {
                self.remove_axis(axis);
                continue;
            }
            let next = axis + 1;
            let together = next < extents.len() && in_fold == (next >= self.dims.len());
            let joins = |at: &Affine| at.strides[axis] == at.strides[next] * extents[next] as i64;
            let stored = match &self.to {
                To::At(at) => vec![at],
                To::Computed(_) => vec![],
            };
            if together && self.nodes.iter().flat_map(Node::affines).chain(stored).all(joins) {
                let n = extents[axis] * extents[next];
                self.remove_axis(axis);
                match (&mut self.fold, in_fold) {
                    (Some(fold), true) => fold.dims[axis - self.dims.len()] = n,
                    _ => self.dims[axis] = n,
                }
            }
        }
    }
}
