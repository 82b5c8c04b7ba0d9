//! Values on the way to kernels: arrays in memory seen through strides, and expressions that nobody has stored yet.

use super::Place;
use crate::nest::{Affine, Bin, Cmp, Guard, Mem, Node, NodeId, Num, Un, nums};
use std::rc::Rc;

/// An array in memory.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) place: Place,
    pub(super) mem: Mem,
    pub(super) dims: Vec<u64>,
    /// Which element each index is.
    pub(super) at: Affine,
}

/// An expression over the index of a value.
#[derive(Clone, Debug)]
pub(super) struct Lazy {
    pub(super) mem: Mem,
    pub(super) dims: Vec<u64>,
    pub(super) body: Body,
    pub(super) root: NodeId,
    /// The product whose sums the expression reads.
    pub(super) product: Option<usize>,
}

/// A value.
#[derive(Clone, Debug)]
pub(super) enum Value {
    View(View),
    Lazy(Rc<Lazy>),
}

/// Row-major strides.
pub(super) fn strides(dims: &[u64]) -> Vec<i64> {
    let mut strides = vec![1; dims.len()];
    for axis in (1..dims.len()).rev() {
        strides[axis - 1] = strides[axis] * dims[axis] as i64;
    }
    strides
}

/// Each axis as itself.
pub(super) fn identity(rank: usize) -> Vec<Affine> {
    (0..rank).map(|a| Affine::axis(a, rank)).collect()
}

/// The index of a value of extents `dims` for each index of extents `to`: axes are aligned at the last and extents of one
/// repeated. Further axes of the index space, of which there are `rank`, do not count.
pub(super) fn broadcast(dims: &[u64], to: &[u64], rank: usize) -> Vec<Affine> {
    let ahead = to.len() - dims.len();
    let one = |(a, &d): (usize, &u64)| {
        if d == 1 { Affine::constant(0, rank) } else { Affine::axis(a + ahead, rank) }
    };
    dims.iter().enumerate().map(one).collect()
}

impl View {
    /// An array that lies row after row.
    pub(super) fn dense(place: Place, mem: Mem, dims: &[u64]) -> View {
        let at = Affine { base: 0, strides: strides(dims) };
        View { place, mem, dims: dims.to_vec(), at }
    }

    /// Whether it lies row after row, from the beginning of its place on.
    pub(super) fn is_dense(&self) -> bool {
        let fits = |((&s, want), &d): ((&i64, i64), &u64)| d == 1 || s == want;
        self.at.base == 0 && self.at.strides.iter().zip(strides(&self.dims)).zip(&self.dims).all(fits)
    }

    /// The same elements under other extents, where strides can say that.
    pub(super) fn reshaped(&self, to: &[u64]) -> Option<View> {
        // Runs of axes that lie behind one another, then each run cut anew.
        let old: Vec<(u64, i64)> = self.dims.iter().copied().zip(self.at.strides.iter().copied()).collect();
        let mut old = old.into_iter().filter(|(d, _)| *d != 1).peekable();
        let mut out = vec![0i64; to.len()];
        let mut axis = 0;
        while axis < to.len() {
            if to[axis] == 1 {
                axis += 1;
                continue;
            }
            let (mut have, mut stride) = old.next()?;
            let (from, mut want) = (axis, to[axis]);
            while have != want {
                if have < want {
                    let (d, s) = old.next()?;
                    if stride != s * d as i64 {
                        return None;
                    }
                    have *= d;
                    stride = s;
                } else {
                    axis += 1;
                    want *= *to.get(axis)?;
                }
            }
            let mut step = stride;
            for a in (from..=axis).rev() {
                out[a] = step;
                step *= to[a] as i64;
            }
            axis += 1;
        }
        if old.next().is_some() {
            return None;
        }
        let at = Affine { base: self.at.base, strides: out };
        Some(View { place: self.place, mem: self.mem, dims: to.to_vec(), at })
    }
}

impl Value {
    pub(super) fn dims(&self) -> &[u64] {
        match self {
            Value::View(v) => &v.dims,
            Value::Lazy(l) => &l.dims,
        }
    }

    pub(super) fn mem(&self) -> Mem {
        match self {
            Value::View(v) => v.mem,
            Value::Lazy(l) => l.mem,
        }
    }

    /// The product whose sums it reads.
    pub(super) fn product(&self) -> Option<usize> {
        match self {
            Value::View(_) => None,
            Value::Lazy(l) => l.product,
        }
    }

    /// Whether computing it again costs no more than loading it.
    pub(super) fn is_cheap(&self) -> bool {
        match self {
            Value::View(_) => true,
            Value::Lazy(l) => l.product.is_none() && l.body.is_cheap(),
        }
    }

    /// The axes, the outermost in memory first.
    pub(super) fn layout(&self) -> Vec<usize> {
        let dims = self.dims();
        let whole = |at: &Affine| at.strides.iter().zip(dims).all(|(&s, &d)| d == 1 || s != 0);
        let at = match self {
            Value::View(v) => Some(v.at.clone()).filter(whole),
            Value::Lazy(l) => l.body.nodes.iter().find_map(|node| match node {
                Node::Load { at, guards, .. } if guards.is_empty() && whole(at) => Some(at.clone()),
                _ => None,
            }),
        };
        let mut order: Vec<usize> = (0..dims.len()).collect();
        if let Some(at) = at {
            // Axes of one element go where the next axis is.
            let key = |a: usize| {
                let seen = (a..dims.len()).find(|&a| dims[a] != 1);
                seen.map_or(0, |a| at.strides[a].unsigned_abs())
            };
            order.sort_by_key(|&a| std::cmp::Reverse(key(a)));
        }
        order
    }
}

/// An expression in the making.
#[derive(Clone, Debug, Default)]
pub(super) struct Body {
    pub(super) nodes: Vec<Node>,
    pub(super) inputs: Vec<Place>,
    /// Axes of the index space.
    pub(super) rank: usize,
}

impl Body {
    pub(super) fn new(rank: usize) -> Body {
        Body { rank, ..Body::default() }
    }

    pub(super) fn push(&mut self, node: Node) -> NodeId {
        if let Some(known) = self.nodes.iter().position(|n| *n == node) {
            return known as NodeId;
        }
        self.nodes.push(node);
        self.nodes.len() as NodeId - 1
    }

    pub(super) fn input(&mut self, place: Place) -> u16 {
        if let Some(known) = self.inputs.iter().position(|p| *p == place) {
            return known as u16;
        }
        self.inputs.push(place);
        self.inputs.len() as u16 - 1
    }

    pub(super) fn num(&self, id: NodeId) -> Num {
        nums(&self.nodes)[id as usize]
    }

    pub(super) fn is_cheap(&self) -> bool {
        let dear = |n: &Node| match n {
            Node::Unary(f, _) => !matches!(f, Un::Neg | Un::Abs | Un::Not | Un::Round),
            Node::Binary(f, ..) => matches!(f, Bin::Div | Bin::Rem | Bin::Pow),
            Node::LoadAt { .. } => true,
            _ => false,
        };
        let loads = self.nodes.iter().filter(|n| matches!(n, Node::Load { .. })).count();
        loads <= 2 && self.nodes.len() <= 8 && !self.nodes.iter().any(dear)
    }

    /// The node of a value at the index that `map` gives for each of its axes.
    pub(super) fn absorb(&mut self, value: &Value, map: &[Affine]) -> NodeId {
        self.absorb_within(value, map, &[])
    }

    /// The same, where memory is read only where guards hold.
    pub(super) fn absorb_within(&mut self, value: &Value, map: &[Affine], within: &[Guard]) -> NodeId {
        let rank = self.rank;
        match value {
            Value::View(v) => {
                let input = self.input(v.place);
                let at = v.at.through(map, rank);
                self.push(Node::Load { input, mem: v.mem, at, guards: within.to_vec() })
            }
            Value::Lazy(l) => {
                let inputs: Vec<u16> = l.body.inputs.iter().map(|&p| self.input(p)).collect();
                let mut new: Vec<NodeId> = vec![];
                for node in &l.body.nodes {
                    let mut node = node.replaced(|n| new[n as usize], |a| a.through(map, rank));
                    match &mut node {
                        Node::Load { input, guards, .. } => {
                            *input = inputs[usize::from(*input)];
                            guards.extend(within.iter().cloned());
                        }
                        Node::LoadAt { input, .. } => *input = inputs[usize::from(*input)],
                        _ => {}
                    }
                    new.push(self.push(node));
                }
                new[l.root as usize]
            }
        }
    }

    // Arithmetic.

    pub(super) fn un(&mut self, f: Un, x: NodeId) -> NodeId {
        self.push(Node::Unary(f, x))
    }

    pub(super) fn bin(&mut self, f: Bin, x: NodeId, y: NodeId) -> NodeId {
        self.push(Node::Binary(f, x, y))
    }

    pub(super) fn cmp(&mut self, f: Cmp, x: NodeId, y: NodeId) -> NodeId {
        self.push(Node::Compare(f, x, y))
    }

    pub(super) fn select(&mut self, cond: NodeId, x: NodeId, y: NodeId) -> NodeId {
        self.push(Node::Select(cond, x, y))
    }

    pub(super) fn convert(&mut self, to: Num, x: NodeId) -> NodeId {
        if self.num(x) == to { x } else { self.push(Node::Convert(to, x)) }
    }

    pub(super) fn fit(&mut self, mem: Mem, x: NodeId) -> NodeId {
        match mem {
            Mem::Bool | Mem::I32 | Mem::I64 | Mem::U64 | Mem::F32 | Mem::F64 => x,
            _ => self.push(Node::Fit(mem, x)),
        }
    }

    /// A number as a constant of a type.
    pub(super) fn real(&mut self, num: Num, x: f64) -> NodeId {
        let bits = match num {
            Num::F32 => u64::from((x as f32).to_bits()),
            Num::F64 => x.to_bits(),
            _ => x as i64 as u64,
        };
        self.push(Node::Const(num, bits))
    }

    pub(super) fn int(&mut self, num: Num, x: i64) -> NodeId {
        if num.is_float() { self.real(num, x as f64) } else { self.push(Node::Const(num, x as u64)) }
    }

    pub(super) fn pos(&mut self, at: Affine) -> NodeId {
        self.push(Node::Pos(at))
    }

    /// An index, counted from the end when it is negative, brought into `0..n`.
    pub(super) fn place(&mut self, index: NodeId, n: u64) -> NodeId {
        let index = self.convert(Num::I64, index);
        let (zero, all, most) = (self.int(Num::I64, 0), self.int(Num::I64, n as i64), n.saturating_sub(1));
        let below = self.cmp(Cmp::Less, index, zero);
        let from_end = self.bin(Bin::Add, index, all);
        let index = self.select(below, from_end, index);
        let index = self.bin(Bin::Max, index, zero);
        let most = self.int(Num::I64, most as i64);
        self.bin(Bin::Min, index, most)
    }

    /// `sum nodes[i] * factors[i] + base`, as an `I64`.
    pub(super) fn address(&mut self, base: Affine, parts: &[(NodeId, i64)]) -> NodeId {
        let mut sum = self.pos(base);
        for &(node, factor) in parts {
            let factor = self.int(Num::I64, factor);
            let part = self.bin(Bin::Mul, node, factor);
            sum = self.bin(Bin::Add, sum, part);
        }
        sum
    }
}
