//! Operations: one file each, declared by `op!` and listed in `ops!`.
//!
//! An op's struct holds its attributes; its file holds operands, type inference, meaning ([`OpSpec::eval`]) and cost.
//! What *every* op has is in [`OpSpec`]; what only some pass wants lives in that pass.

use crate::diag::{Diag, Result};
use crate::eval::{EvalCx, Tensor};
use crate::module::Signature;
use crate::ty::{Dim, ElemTy, Shape, TensorTy};
use serde::{Deserialize, Serialize};
use std::fmt;

/// How often an operand occurs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// Always there.
    One,
    /// May be `none`.
    Optional,
    /// Any number, last in the list.
    Many,
}

/// One declared operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// Its name in messages and manuals.
    pub name: &'static str,
    /// What it is.
    pub doc: &'static str,
    /// How often it occurs.
    pub arity: Arity,
}

/// The declared operands of an op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operands(pub &'static [Operand]);

impl Operands {
    /// Number of operands that always have a place (present or `none`).
    pub fn fixed(self) -> usize {
        self.0.iter().filter(|o| o.arity != Arity::Many).count()
    }
    /// Number of operands that must be given.
    pub fn required(self) -> usize {
        self.0.iter().filter(|o| o.arity == Arity::One).count()
    }
    /// Whether any number of further operands may follow.
    pub fn many(self) -> bool {
        self.0.iter().any(|o| o.arity == Arity::Many)
    }
}

/// A float attribute: compared, ordered and hashed by its total order.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Real(pub f64);

impl PartialEq for Real {
    fn eq(&self, other: &Real) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Real {}
impl PartialOrd for Real {
    fn partial_cmp(&self, other: &Real) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Real {
    fn cmp(&self, other: &Real) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}
impl std::hash::Hash for Real {
    fn hash<H: std::hash::Hasher>(&self, h: &mut H) {
        self.0.to_bits().hash(h);
    }
}
impl fmt::Debug for Real {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// What inference may look at.
pub struct InferCx<'a> {
    /// Types of the operands; `None` where an optional operand is absent.
    pub args: Vec<Option<&'a TensorTy>>,
    /// Looks up a layer by name.
    pub layers: &'a dyn Fn(&str) -> Option<Signature>,
}

impl<'a> InferCx<'a> {
    /// The type of operand `i`, which must be present.
    pub fn arg(&self, i: usize) -> Result<&'a TensorTy> {
        self.opt(i).ok_or_else(|| Diag::input(format!("operand {i} is missing")))
    }
    /// The type of operand `i` when it is present.
    pub fn opt(&self, i: usize) -> Option<&'a TensorTy> {
        self.args.get(i).copied().flatten()
    }
    /// The type of operand `i`, which must be a plain float tensor.
    pub fn float(&self, i: usize) -> Result<&'a TensorTy> {
        let ty = self.arg(i)?;
        if ty.elem.is_float() {
            return Ok(ty);
        }
        Err(Diag::input(format!("operand {i} has type {ty}, expected a float tensor"))
            .help("put a `dequantize` in front of it"))
    }
    /// The type of operand `i`, which must have plain elements: floats, doubles or integers.
    pub fn number(&self, i: usize) -> Result<&'a TensorTy> {
        let ty = self.arg(i)?;
        if ty.elem.scheme().is_none() {
            return Ok(ty);
        }
        Err(Diag::input(format!("operand {i} has type {ty}, expected plain numbers"))
            .help("put a `dequantize` in front of it"))
    }
    /// The type of operand `i`, which must have float elements, doubles included.
    pub fn real(&self, i: usize) -> Result<&'a TensorTy> {
        let ty = self.arg(i)?;
        if ty.elem.is_real() {
            return Ok(ty);
        }
        Err(Diag::input(format!("operand {i} has type {ty}, expected floats")))
    }
    /// The type of operand `i`, whose elements keep their meaning wherever they are put: no scale belongs to a place.
    pub fn movable(&self, i: usize) -> Result<&'a TensorTy> {
        let ty = self.arg(i)?;
        match ty.elem.scheme() {
            Some(scheme) if scheme.group != crate::scheme::Group::Tensor => {
                Err(Diag::input(format!("operand {i} has type {ty}, whose scales belong to places"))
                    .help("put a `dequantize` in front of it"))
            }
            _ => Ok(ty),
        }
    }
    /// The type of operand `i`, which must have integers that say places: i32 or i64.
    pub fn indices(&self, i: usize) -> Result<&'a TensorTy> {
        let ty = self.arg(i)?;
        match ty.elem {
            ElemTy::I32 | ElemTy::I64 => Ok(ty),
            _ => Err(Diag::input(format!("operand {i} has type {ty}, expected i32 or i64"))),
        }
    }
    /// The type of operand `i`, which must have truth values.
    pub fn truths(&self, i: usize) -> Result<&'a TensorTy> {
        let ty = self.arg(i)?;
        match ty.elem {
            ElemTy::BOOL => Ok(ty),
            _ => Err(Diag::input(format!("operand {i} has type {ty}, expected bool"))),
        }
    }
    /// The type of operand `i`, which must have plain i32 elements.
    pub fn ints(&self, i: usize) -> Result<&'a TensorTy> {
        let ty = self.arg(i)?;
        if ty.elem == ElemTy::I32 {
            Ok(ty)
        } else {
            Err(Diag::input(format!("operand {i} has type {ty}, expected i32")))
        }
    }
    /// Demands a shape of operand `i`.
    pub fn expect_shape(&self, i: usize, shape: &[Dim], what: &str) -> Result<()> {
        let Some(ty) = self.opt(i) else { return Ok(()) };
        if ty.shape.0 == shape {
            return Ok(());
        }
        let want = TensorTy { elem: ty.elem, shape: Shape(shape.to_vec()) };
        Err(Diag::input(format!("{what} has type {ty}, expected {want}")))
    }
}

/// `axis` as an index into the shape of `ty`.
pub(crate) fn axis_of(ty: &TensorTy, axis: u8) -> Result<usize> {
    let axis = usize::from(axis);
    if axis < ty.rank() { Ok(axis) } else { Err(Diag::input(format!("{ty} has no axis {axis}"))) }
}

/// The last extent of a tensor of rank one or more.
pub(crate) fn last_dim(ty: &TensorTy) -> Result<Dim> {
    ty.shape.last().ok_or_else(|| Diag::input(format!("{ty} has no axis")))
}

/// Arithmetic and traffic of one execution, with symbols bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Multiply-adds.
    pub macs: u64,
    /// Elements of the result.
    pub elements: u64,
}

/// Extents given to the symbols when work is counted.
pub type Binding<'a> = &'a dyn Fn(char) -> u64;

/// Number of elements of a type when symbols are bound.
pub fn elements(ty: &TensorTy, bind: Binding<'_>) -> u64 {
    let extent = |d: &Dim| match *d {
        Dim::Static(n) => n,
        Dim::Sym(c) => bind(c),
    };
    ty.shape.0.iter().map(extent).fold(1, u64::saturating_mul)
}

/// What every op has.
pub trait OpSpec {
    /// The type of the result, or what is wrong with the operands.
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy>;

    /// The meaning: computes the result from the operands. `out` is the result type with symbols bound.
    ///
    /// Sums are taken in f64 and rounded once; integer sums are exact.
    fn eval(&self, cx: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor>;

    /// Arithmetic of one execution.
    fn cost(&self, _args: &[Option<&TensorTy>], out: &TensorTy, bind: Binding<'_>) -> Work {
        Work { macs: 0, elements: elements(out, bind) }
    }

    /// Whether the op must stay although nobody reads its result.
    fn has_effect(&self) -> bool {
        false
    }
}

/// Declares an op: its name in texts, its operands and its attributes with their defaults.
macro_rules! op {
    (
        $(#[doc = $doc:literal])*
        $text:literal => pub struct $name:ident (
            $($(#[doc = $adoc:literal])* $arg:ident : $arity:ident),* $(,)?
        ) {
            $($(#[doc = $fdoc:literal])* $field:ident : $fty:ty = $default:expr),* $(,)?
        }
    ) => {
        $(#[doc = $doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
        pub struct $name {
            $($(#[doc = $fdoc])* pub $field: $fty,)*
        }
        impl Default for $name {
            fn default() -> Self {
                $name { $($field: $default,)* }
            }
        }
        impl $name {
            /// Facts about the op.
            pub const INFO: crate::ops::OpInfo = crate::ops::OpInfo {
                name: $text,
                doc: concat!($($doc, "\n"),*),
                operands: crate::ops::Operands(&[$(crate::ops::Operand {
                    name: stringify!($arg),
                    doc: concat!("" $(, $adoc)*),
                    arity: crate::ops::Arity::$arity,
                }),*]),
                attributes: &[$((stringify!($field), stringify!($default), concat!("" $(, $fdoc)*))),*],
            };
        }
    };
}

/// The declaration of an op, for manuals and messages.
#[derive(Clone, Copy, Debug)]
pub struct OpInfo {
    /// The name in texts.
    pub name: &'static str,
    /// The manual page; its first line is a summary.
    pub doc: &'static str,
    /// Operands in order.
    pub operands: Operands,
    /// Attributes: field name, default expression, manual line.
    pub attributes: &'static [(&'static str, &'static str, &'static str)],
}

macro_rules! ops {
    ($($module:ident :: $name:ident),* $(,)?) => {
        $(mod $module;)*
        $(pub use $module::$name;)*

        /// Any op with its attributes.
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Op {
            $(#[doc = concat!("See [`", stringify!($name), "`].")] $name($name),)*
        }

        /// An op without its attributes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum OpKind {
            $(#[doc = concat!("See [`", stringify!($name), "`].")] $name,)*
        }

        $(impl From<$name> for Op {
            fn from(op: $name) -> Op {
                Op::$name(op)
            }
        }

        impl AsOp for $name {
            fn of(op: &Op) -> Option<&Self> {
                match op {
                    Op::$name(op) => Some(op),
                    _ => None,
                }
            }
        })*

        impl OpKind {
            /// Every op.
            pub const ALL: &'static [OpKind] = &[$(OpKind::$name),*];

            /// The declaration.
            pub fn info(self) -> OpInfo {
                match self {
                    $(OpKind::$name => $name::INFO,)*
                }
            }

            /// The op with its attributes read from `fields`.
            pub fn read<'de, D: serde::Deserializer<'de>>(self, fields: D) -> Result<Op, D::Error> {
                match self {
                    $(OpKind::$name => $name::deserialize(fields).map(Op::$name),)*
                }
            }
        }

        impl Op {
            /// Which op this is.
            pub fn kind(&self) -> OpKind {
                match self {
                    $(Op::$name(_) => OpKind::$name,)*
                }
            }

            /// Writes the attributes.
            pub fn write<S: serde::Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
                match self {
                    $(Op::$name(op) => op.serialize(out),)*
                }
            }

            /// The attributes of an op of this kind that nobody set.
            pub fn default_of(kind: OpKind) -> Op {
                match kind {
                    $(OpKind::$name => Op::$name($name::default()),)*
                }
            }

            fn spec(&self) -> &dyn OpSpec {
                match self {
                    $(Op::$name(op) => op,)*
                }
            }
        }
    };
}

/// Looks at an [`Op`] as one of its kinds.
pub trait AsOp: Sized {
    /// The op when it is of this kind.
    fn of(op: &Op) -> Option<&Self>;
}

mod elementwise;
mod epilogue;
mod scales;
mod walk;

ops! {
    add::Add, arg_reduce::ArgReduce, attention::Attention, binary::Binary, bitcast_storage::BitcastStorage,
    cache_append::CacheAppend, call::Call, cast::Cast, compare::Compare, concat::Concat, conv::Conv,
    cumulate::Cumulate, dequantize::Dequantize, dot::Dot, dynamic_scale::DynamicScale, einsum::Einsum,
    embedding::Embedding, expand::Expand, gather::Gather, gather_elements::GatherElements, gather_nd::GatherNd,
    gelu::Gelu, last_rows::LastRows, layernorm::LayerNorm, matmul::MatMul, mul::Mul, pad::Pad, pool::Pool,
    positions::Positions, qmatmul::QMatMul, quantize::Quantize, reduce::Reduce, relu::Relu, reshape::Reshape,
    rmsnorm::RmsNorm, rope::Rope, rope_table::RopeTable, scatter_elements::ScatterElements,
    scatter_nd::ScatterNd, select::Select, silu::Silu, slice::Slice, softmax::Softmax, tanh::Tanh, topk::TopK,
    transpose::Transpose, unary::Unary,
}

pub use attention::visible;
pub use binary::BinaryKind;
pub use compare::Order;
pub use epilogue::Step;
pub use pad::PadMode;
pub use pool::PoolKind;
pub use qmatmul::QMATMUL_EXTRAS;
pub use quantize::DYNAMIC_INT8;
pub use reduce::ReduceKind;
pub use rope::RopeStyle;
pub use rope_table::RopeScaling;
pub use scales::zero_scheme;
pub use scatter_elements::Combine;
pub use unary::UnaryKind;

impl OpKind {
    /// The op named `name`.
    pub fn by_name(name: &str) -> Option<OpKind> {
        OpKind::ALL.iter().copied().find(|k| k.info().name == name)
    }
}

impl Op {
    /// The name in texts.
    pub fn name(&self) -> &'static str {
        self.kind().info().name
    }
    /// The declared operands.
    pub fn operands(&self) -> Operands {
        self.kind().info().operands
    }
    /// This op as a `T`, when it is one.
    pub fn is<T: AsOp>(&self) -> Option<&T> {
        T::of(self)
    }
}

impl OpSpec for Op {
    fn infer(&self, cx: &InferCx<'_>) -> Result<TensorTy> {
        let declared = self.operands();
        if cx.args.len() < declared.fixed() || (cx.args.len() > declared.fixed() && !declared.many()) {
            let want = declared.fixed();
            return Err(Diag::input(format!(
                "`{}` has {} operands, expected {want}",
                self.name(),
                cx.args.len()
            )));
        }
        for (operand, arg) in declared.0.iter().zip(&cx.args) {
            if operand.arity == Arity::One && arg.is_none() {
                return Err(Diag::input(format!("`{}` needs its operand `{}`", self.name(), operand.name)));
            }
        }
        self.spec().infer(cx)
    }
    fn eval(&self, cx: &mut EvalCx<'_>, args: &[Option<&Tensor>], out: &TensorTy) -> Result<Tensor> {
        self.spec().eval(cx, args, out)
    }
    fn cost(&self, args: &[Option<&TensorTy>], out: &TensorTy, bind: Binding<'_>) -> Work {
        self.spec().cost(args, out, bind)
    }
    fn has_effect(&self) -> bool {
        self.spec().has_effect()
    }
}
