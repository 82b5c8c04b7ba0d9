//! Kernels whose items are rows: norms, softmax, quantization, elementwise arithmetic, casts and copies.
//!
//! A [`RowSpec`] is an expression over the columns of a row. The emitter goes over the row as often as the
//! expression's reductions need it to: pass 0 computes all reductions of plain inputs at once, pass 1 those that need
//! results of pass 0, and so on; all stores happen in the last pass. An output may therefore be the very buffer of an
//! input that is read at the same row and column (`Elem`), provided the element types have the same size and the
//! strides are equal.
//!
//! Arguments: the expression's inputs in order, then its outputs. Items: rows.
//!
//! Sums over a row are kept in several vectors of partial sums, added in a fixed tree at the end: the order depends
//! on the target's vector width and on nothing else.
//!
//! # Quantization
//!
//! [`RowSpec::quantize_token`] divides: `scale = absmax / 127` (1 for a row of zeros),
//! `q = clamp(round_half_even(x / scale), -128, 127)`, both divisions rounded to nearest. A product with the
//! reciprocal would differ in the last place now and then, and so pick other integers than the definition does.
use serde::{Deserialize, Serialize};

use crate::eexpr::{EExpr, ExprError, InputKind, MemTy, NodeId, OutputKind, Place, ReduceOp, UnaryOp};
use crate::spec::{Rows, i8_row_stride};

/// How many rows there are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct RowCount {
    /// What is counted.
    pub sym: Rows,
    /// Rows of each: 1, or the heads of a token when a row is one head.
    pub per: u32,
}

impl RowCount {
    /// One row per token.
    pub const TOKENS: RowCount = RowCount { sym: Rows::T, per: 1 };
    /// One row per result.
    pub const RESULTS: RowCount = RowCount { sym: Rows::R, per: 1 };

    /// `per` rows of every token.
    pub const fn per_token(per: u32) -> RowCount {
        RowCount { sym: Rows::T, per }
    }

    /// The number of rows in a call of `t` tokens and `r` results.
    pub const fn rows(self, t: u64, r: u64) -> u64 {
        let n = match self.sym {
            Rows::T => t,
            Rows::R => r,
        };
        n * self.per as u64
    }
}

/// Which rows of the inputs belong to the rows of the outputs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum RowOffset {
    /// The same.
    None,
    /// The last `r` of `t`: input row = row + (t - r) * rows per token.
    LastRows,
}

/// A kernel over rows.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct RowSpec {
    /// What it computes, in a word.
    pub name: String,
    /// Columns of a row.
    pub cols: u32,
    /// Number of rows.
    pub rows: RowCount,
    /// Which rows of the inputs are read.
    pub row_offset: RowOffset,
    /// What is computed. Its inputs and outputs are the arguments.
    pub body: EExpr,
}

/// Functions of two rows.
pub use crate::eexpr::BinaryOp;

impl RowSpec {
    /// A kernel of one row per token.
    pub fn new(name: &str, cols: u32, body: EExpr) -> RowSpec {
        RowSpec { name: name.to_owned(), cols, rows: RowCount::TOKENS, row_offset: RowOffset::None, body }
    }

    /// The same with another number of rows.
    pub fn with_rows(mut self, rows: RowCount) -> RowSpec {
        self.rows = rows;
        self
    }

    /// The same for the last `r` rows of the input: one row per result.
    pub fn last_rows(mut self) -> RowSpec {
        self.rows.sym = Rows::R;
        self.row_offset = RowOffset::LastRows;
        self
    }

    /// Checks that a kernel can be emitted.
    pub fn check(&self) -> Result<(), ExprError> {
        if self.cols == 0 || self.rows.per == 0 {
            return Err(ExprError("a row has at least one column, a token at least one row".to_owned()));
        }
        if self.row_offset == RowOffset::LastRows && self.rows.sym != Rows::R {
            return Err(ExprError("the last rows are one per result".to_owned()));
        }
        self.body.check(Place::Row { cols: self.cols })?;
        let groups = self.body.outputs.iter().filter_map(|o| match o.kind {
            OutputKind::GroupSums { group, .. } => Some(group),
            _ => None,
        });
        let mut groups: Vec<u32> = groups.collect();
        groups.dedup();
        match groups.len() {
            0 | 1 => Ok(()),
            _ => Err(ExprError("group sums of different groups in one kernel".to_owned())),
        }
    }

    /// `x * rsqrt(mean(x^2) + eps) * gain`. Arguments: x, gain, out.
    pub fn rms_norm(cols: u32, eps: f32, x: MemTy, gain: MemTy, out: MemTy) -> RowSpec {
        let mut e = EExpr::new();
        let x = e.elem_input(x, cols);
        let g = e.col_input(gain);
        let y = rms_normalized(&mut e, x, cols, eps);
        let y = e.mul(y, g);
        e.store(y, out, cols);
        RowSpec::new("rms_norm", cols, e)
    }

    /// `(x - mean) * rsqrt(mean((x - mean)^2) + eps) * gain + bias`. Arguments: x, gain, bias when there is one, out.
    pub fn layer_norm(
        cols: u32,
        eps: f32,
        x: MemTy,
        gain: MemTy,
        bias: Option<MemTy>,
        out: MemTy,
    ) -> RowSpec {
        let mut e = EExpr::new();
        let x = e.elem_input(x, cols);
        let g = e.col_input(gain);
        let bias = bias.map(|ty| e.col_input(ty));
        let d = centred(&mut e, x, cols);
        let y = rms_normalized(&mut e, d, cols, eps);
        let y = match bias {
            Some(bias) => e.fma(y, g, bias),
            None => e.mul(y, g),
        };
        e.store(y, out, cols);
        RowSpec::new("layer_norm", cols, e)
    }

    /// `exp(x - max) / sum`. Arguments: x, out.
    pub fn softmax(cols: u32, x: MemTy, out: MemTy) -> RowSpec {
        let mut e = EExpr::new();
        let x = e.elem_input(x, cols);
        let max = e.reduce(ReduceOp::Max, x);
        let d = e.sub(x, max);
        let p = e.unary(UnaryOp::Exp, d);
        let sum = e.reduce(ReduceOp::Sum, p);
        let y = e.div(p, sum);
        e.store(y, out, cols);
        RowSpec::new("softmax", cols, e)
    }

    /// `op(a, b)`. Arguments: a, b, out.
    pub fn binary(op: BinaryOp, cols: u32, a: MemTy, b: MemTy, out: MemTy) -> RowSpec {
        let mut e = EExpr::new();
        let (a, b) = (e.elem_input(a, cols), e.elem_input(b, cols));
        let y = e.binary(op, a, b);
        e.store(y, out, cols);
        let name = match op {
            BinaryOp::Add => "add",
            BinaryOp::Sub => "sub",
            BinaryOp::Mul => "mul",
            BinaryOp::Div => "div",
            BinaryOp::Min => "min",
            BinaryOp::Max => "max",
        };
        RowSpec::new(name, cols, e)
    }

    /// `op(x)`. Arguments: x, out.
    pub fn unary(op: UnaryOp, cols: u32, x: MemTy, out: MemTy) -> RowSpec {
        let mut e = EExpr::new();
        let x = e.elem_input(x, cols);
        let y = e.unary(op, x);
        e.store(y, out, cols);
        RowSpec::new("unary", cols, e)
    }

    /// `act(gate) * up` from two buffers. Arguments: gate, up, out.
    pub fn gated(act: UnaryOp, cols: u32, x: MemTy, out: MemTy) -> RowSpec {
        let mut e = EExpr::new();
        let (g, u) = (e.elem_input(x, cols), e.elem_input(x, cols));
        let a = e.unary(act, g);
        let y = e.mul(a, u);
        e.store(y, out, cols);
        RowSpec::new("gated", cols, e)
    }

    /// `act(x[c]) * x[c + cols]`: gate and up side by side in rows of `2 * cols`. Arguments: x, out.
    pub fn gated_pair(act: UnaryOp, cols: u32, x: MemTy, out: MemTy) -> RowSpec {
        let mut e = EExpr::new();
        let input = e.input(x, InputKind::Elem { stride: 2 * cols });
        let (g, u) = (e.elem(input), e.elem_at(input, cols));
        let a = e.unary(act, g);
        let y = e.mul(a, u);
        e.store(y, out, cols);
        RowSpec::new("gated_pair", cols, e)
    }

    /// `x + bias`. Arguments: x, bias, out.
    pub fn bias(cols: u32, x: MemTy, bias: MemTy, out: MemTy) -> RowSpec {
        let mut e = EExpr::new();
        let (x, b) = (e.elem_input(x, cols), e.col_input(bias));
        let y = e.add(x, b);
        e.store(y, out, cols);
        RowSpec::new("bias", cols, e)
    }

    /// A copy from one type to another: columns `col_offset..` of rows `x_stride` apart, to rows `out_stride` apart.
    /// Arguments: x, out.
    pub fn copy(cols: u32, x: MemTy, x_stride: u32, col_offset: u32, out: MemTy, out_stride: u32) -> RowSpec {
        let mut e = EExpr::new();
        let input = e.input(x, InputKind::Elem { stride: x_stride });
        let x = e.elem_at(input, col_offset);
        e.store(x, out, out_stride);
        RowSpec::new("copy", cols, e)
    }

    /// The last `r` of `t` rows. Arguments: x, out.
    pub fn copy_last_rows(cols: u32, x: MemTy, out: MemTy) -> RowSpec {
        RowSpec::copy(cols, x, cols, 0, out, cols).last_rows()
    }

    /// Symmetric int8 with one scale per row. Arguments: x, q (`i8`, rows of [`i8_row_stride`], padded with zeros),
    /// scales (`f32`, one per row), and with a `group` the sums of q over groups of columns (`i32`, `cols / group`
    /// rounded up per row).
    pub fn quantize_token(cols: u32, x: MemTy, group: Option<u32>) -> RowSpec {
        let mut e = EExpr::new();
        let x = e.elem_input(x, cols);
        quantize_dynamic(&mut e, x, cols, group);
        RowSpec::new("quantize_token", cols, e)
    }

    /// Symmetric int8 with one scale for all rows, which are gone over once. Arguments: x, the scale (`f32`), q, scales
    /// (the same for each row), and the sums with a `group`, as [`RowSpec::quantize_token`] has them.
    pub fn quantize_static(cols: u32, x: MemTy, group: Option<u32>) -> RowSpec {
        let mut e = EExpr::new();
        let x = e.elem_input(x, cols);
        let scale = e.one_input(MemTy::F32);
        quantize_by(&mut e, x, scale, cols, group);
        RowSpec::new("quantize_static", cols, e)
    }

    /// The number nearest to x that e4m3 codes with one scale per row stand for. Arguments: x, out.
    pub fn round_e4m3_token(cols: u32, x: MemTy, out: MemTy) -> RowSpec {
        let mut e = EExpr::new();
        let x = e.elem_input(x, cols);
        let y = e4m3_dynamic(&mut e, x);
        e.store(y, out, cols);
        RowSpec::new("round_e4m3_token", cols, e)
    }

    /// The number nearest to x that e4m3 codes with one scale for all rows stand for. Arguments: x, the scale (`f32`), out.
    pub fn round_e4m3_static(cols: u32, x: MemTy, out: MemTy) -> RowSpec {
        let mut e = EExpr::new();
        let x = e.elem_input(x, cols);
        let scale = e.one_input(MemTy::F32);
        let y = e4m3_by(&mut e, x, scale);
        e.store(y, out, cols);
        RowSpec::new("round_e4m3_static", cols, e)
    }

    /// RMS norm and per-row quantization in one: what [`RowSpec::rms_norm`] and [`RowSpec::quantize_token`] do after
    /// each other, without the rounding in between. Arguments: x, gain, q, scales, and the sums with a `group`.
    pub fn rms_norm_quantize(cols: u32, eps: f32, x: MemTy, gain: MemTy, group: Option<u32>) -> RowSpec {
        let mut e = EExpr::new();
        let x = e.elem_input(x, cols);
        let g = e.col_input(gain);
        let y = rms_normalized(&mut e, x, cols, eps);
        let y = e.mul(y, g);
        quantize_dynamic(&mut e, y, cols, group);
        RowSpec::new("rms_norm_quantize", cols, e)
    }
}

/// `x - mean(x)` over the columns of a row.
pub fn centred(e: &mut EExpr, x: NodeId, cols: u32) -> NodeId {
    let sum = e.reduce(ReduceOp::Sum, x);
    let n = e.constant(cols as f32);
    let mean = e.div(sum, n);
    e.sub(x, mean)
}

/// `x * rsqrt(mean(x^2) + eps)`.
pub fn rms_normalized(e: &mut EExpr, x: NodeId, cols: u32, eps: f32) -> NodeId {
    let square = e.mul(x, x);
    let sum = e.reduce(ReduceOp::Sum, square);
    let n = e.constant(cols as f32);
    let mean = e.div(sum, n);
    let eps = e.constant(eps);
    let shifted = e.add(mean, eps);
    let r = e.unary(UnaryOp::Rsqrt, shifted);
    e.mul(x, r)
}

/// Adds the stores of per-row quantization of `x`: q, scales, sums.
pub fn quantize_dynamic(e: &mut EExpr, x: NodeId, cols: u32, group: Option<u32>) {
    let scale = dynamic_scale(e, x, 127.0);
    quantize_by(e, x, scale, cols, group);
}

/// Adds the stores of quantization of `x` by `scale`, which is the same in all columns: q, scales, sums.
pub fn quantize_by(e: &mut EExpr, x: NodeId, scale: NodeId, cols: u32, group: Option<u32>) {
    let y = e.div(x, scale);
    store_quantized(e, y, cols);
    e.store_row(scale, MemTy::F32);
    store_sums(e, y, cols, group);
}

/// What e4m3 codes of `x` with a scale for each row stand for.
pub fn e4m3_dynamic(e: &mut EExpr, x: NodeId) -> NodeId {
    let scale = dynamic_scale(e, x, 448.0);
    e4m3_by(e, x, scale)
}

/// What e4m3 codes of `x` with this scale stand for.
pub fn e4m3_by(e: &mut EExpr, x: NodeId, scale: NodeId) -> NodeId {
    let y = e.div(x, scale);
    let y = e.unary(UnaryOp::RoundE4m3, y);
    e.mul(y, scale)
}

/// The scale with which the largest magnitude of a row becomes `most`.
fn dynamic_scale(e: &mut EExpr, x: NodeId, most: f32) -> NodeId {
    let absmax = e.reduce(ReduceOp::AbsMax, x);
    let most = e.constant(most);
    let scale = e.div(absmax, most);
    e.unary(UnaryOp::OneIfZero, scale)
}

fn store_quantized(e: &mut EExpr, y: NodeId, cols: u32) {
    let stride = i8_row_stride(cols);
    e.store_to(y, MemTy::I8, OutputKind::Elem { stride, zero_pad: stride - cols });
}

fn store_sums(e: &mut EExpr, y: NodeId, cols: u32, group: Option<u32>) {
    if let Some(group) = group {
        // A group of zero columns is refused by the check, not here.
        let stride = cols.div_ceil(group.max(1));
        e.store_to(y, MemTy::I32, OutputKind::GroupSums { group, stride });
    }
}

#[cfg(feature = "llvm")]
pub use emit::emit;

#[cfg(feature = "llvm")]
mod emit {
    use quantc_ir::diag::{Diag, Result};

    use super::{RowOffset, RowSpec};
    use crate::cpu::llvm::{Elem, Unit, Val, VecBuilder};
    use crate::eexpr::llvm::{At, Frame, Known, Valid, to_i8_range};
    use crate::eexpr::{EExpr, Node, NodeId, OutputId, OutputKind, ReduceOp, Store, UnaryOp};

    /// Emits the kernel of `spec` as `symbol`.
    pub fn emit(unit: &Unit<'_>, spec: &RowSpec, symbol: &str) -> Result<()> {
        spec.check().map_err(|e| Diag::bug(format!("{}: {e}", spec.name)))?;
        unit.kernel(symbol, |b| {
            let frame = Frame::new(b, &spec.body, 0);
            let shift = match spec.row_offset {
                RowOffset::None => b.i64(0),
                RowOffset::LastRows => b.mul(b.sub(b.dim(0), b.dim(1)), b.i64(i64::from(spec.rows.per))),
            };
            b.for_items(|row| Row::new(b, spec, &frame, b.add(row, shift), row).emit());
            Ok(())
        })
    }

    struct Row<'a, 'u, 'c> {
        b: &'a VecBuilder<'u, 'c>,
        e: &'a EExpr,
        frame: &'a Frame<'a, 'u, 'c, 'a>,
        cols: i64,
        row: Val<'c>,
        out_row: Val<'c>,
        lanes: u32,
        unroll: i64,
        level: Vec<u32>,
        uniform: Vec<bool>,
    }

    impl<'a, 'u, 'c> Row<'a, 'u, 'c> {
        fn new(
            b: &'a VecBuilder<'u, 'c>,
            spec: &'a RowSpec,
            frame: &'a Frame<'a, 'u, 'c, 'a>,
            row: Val<'c>,
            out_row: Val<'c>,
        ) -> Self {
            let e = &spec.body;
            let long = e.nodes.iter().any(|n| {
                matches!(
                    n,
                    Node::Unary(
                        UnaryOp::Exp
                            | UnaryOp::Silu
                            | UnaryOp::Sigmoid
                            | UnaryOp::Tanh
                            | UnaryOp::GeluErf
                            | UnaryOp::GeluTanh,
                        _
                    )
                )
            });
            // Long chains fill the pipelines by two; short ones need more to hide the latency of sums.
            let unroll = if long { 2 } else { 4 };
            let (level, uniform) = (e.passes(), e.row_uniform());
            Row {
                b,
                e,
                frame,
                cols: i64::from(spec.cols),
                row,
                out_row,
                lanes: b.width(),
                unroll,
                level,
                uniform,
            }
        }

        fn at(&self, col: Val<'c>, lanes: u32, valid: Valid<'c>) -> At<'c> {
            At { row: self.row, out_row: self.out_row, col, lanes, valid }
        }

        fn emit(&self) {
            let mut known = self.frame.nothing();
            let stores = self.e.stores.iter();
            let last = stores.map(|s| self.level[s.node.0 as usize]).max().unwrap_or(0);
            for pass in 0..last {
                self.uniforms(pass, &mut known);
                self.reductions(pass, &mut known);
            }
            self.uniforms(last, &mut known);
            self.stores(&known);
        }

        /// Computes the scalars of this pass before its loop.
        fn uniforms(&self, pass: u32, known: &mut Known<'c>) {
            let at = self.at(self.b.i64(0), 1, Valid::All);
            for i in 0..self.e.nodes.len() {
                let ready = self.uniform[i] && self.level[i] <= pass && known[i].is_none();
                if ready && !matches!(self.e.nodes[i], Node::Const(_)) {
                    self.frame.scalar(NodeId(i as u32), &at, known);
                }
            }
        }

        fn reductions(&self, pass: u32, known: &mut Known<'c>) {
            let b = self.b;
            let wanted: Vec<(usize, ReduceOp, NodeId)> = self
                .e
                .nodes
                .iter()
                .enumerate()
                .filter_map(|(i, node)| match *node {
                    Node::Reduce(op, of) if self.level[of.0 as usize] == pass => Some((i, op, of)),
                    _ => None,
                })
                .collect();
            let vectors = (self.cols as u64).div_ceil(u64::from(self.lanes));
            let accs = vectors.min(self.unroll as u64) as usize;
            let init: Vec<Val<'c>> = wanted
                .iter()
                .flat_map(|&(_, op, _)| std::iter::repeat_n(b.f32(self.lanes, neutral(op)), accs))
                .collect();
            let done = self.sweep(0, self.cols, &init, |at, lane, carried| {
                let mut known = known.clone();
                for (w, &(_, op, of)) in wanted.iter().enumerate() {
                    let v = self.frame.value(of, at, &[], &mut known);
                    // Columns that are not there must not count.
                    let v = match at.valid {
                        Valid::First(n) => {
                            b.select(first(b, self.lanes, n), v, b.f32(self.lanes, neutral(op)))
                        }
                        _ => v,
                    };
                    let slot = &mut carried[w * accs + lane % accs];
                    *slot = combine(b, op, v, *slot);
                }
            });
            for (w, &(i, op, _)) in wanted.iter().enumerate() {
                let mut parts = done[w * accs..(w + 1) * accs].to_vec();
                while parts.len() > 1 {
                    parts = parts
                        .chunks(2)
                        .map(|pair| match *pair {
                            [x, y] => combine(b, op, x, y),
                            _ => pair[0],
                        })
                        .collect();
                }
                // The partial results are magnitudes already, so absmax goes on as max.
                known[i] = Some(b.reduce(parts[0], |b, x, y| combine(b, op, x, y)));
            }
        }

        fn stores(&self, known: &Known<'c>) {
            let b = self.b;
            let mut vector: Vec<&Store> = Vec::new();
            let mut sums: Vec<(&Store, u32, u32)> = Vec::new();
            for store in &self.e.stores {
                match self.e.outputs[store.output.0 as usize].kind {
                    OutputKind::Elem { .. } => vector.push(store),
                    OutputKind::GroupSums { group, stride } => sums.push((store, group, stride)),
                    OutputKind::Row => {
                        let at = self.at(b.i64(0), 1, Valid::All);
                        let v = self.frame.scalar(store.node, &at, &mut known.clone());
                        self.frame.store(store, &at, v);
                    }
                }
            }
            match sums.first() {
                None if vector.is_empty() => {}
                None => {
                    self.sweep(0, self.cols, &[], |at, _, _| self.store_all(&vector, at, known));
                }
                Some(&(_, group, _)) => {
                    let group = i64::from(group).min(self.cols);
                    let whole = self.cols / group;
                    // Whole groups, then what is left.
                    b.for_const(0, whole, 1, &[], |g, _| {
                        self.group(&vector, &sums, g, group, known);
                        vec![]
                    });
                    if self.cols % group > 0 {
                        self.group(&vector, &sums, b.i64(whole), self.cols % group, known);
                    }
                }
            }
            for store in vector {
                self.zero_pad(store.output);
            }
        }

        fn store_all(&self, stores: &[&Store], at: &At<'c>, known: &Known<'c>) {
            let mut known = known.clone();
            // All values first: a store may overwrite what a later expression reads at this place.
            let values: Vec<_> =
                stores.iter().map(|s| self.frame.value(s.node, at, &[], &mut known)).collect();
            for (store, v) in stores.iter().zip(values) {
                self.frame.store(store, at, v);
            }
        }

        /// One group of `width` columns: its stores, and its sums.
        fn group(
            &self,
            vector: &[&Store],
            sums: &[(&Store, u32, u32)],
            g: Val<'c>,
            width: i64,
            known: &Known<'c>,
        ) {
            let b = self.b;
            let init = vec![b.i32(self.lanes, 0); sums.len()];
            // `sums` is not empty: it is why there are groups.
            let start = b.mul(g, b.i64(i64::from(sums[0].1)));
            let done = self.sweep_from(start, width, &init, |at, _, carried| {
                let mut known = known.clone();
                let values: Vec<_> =
                    vector.iter().map(|s| self.frame.value(s.node, at, &[], &mut known)).collect();
                for (slot, (store, ..)) in carried.iter_mut().zip(sums) {
                    let q = to_i8_range(b, self.frame.value(store.node, at, &[], &mut known));
                    let q = match at.valid {
                        Valid::First(n) => b.select(first(b, self.lanes, n), q, b.i32(self.lanes, 0)),
                        _ => q,
                    };
                    *slot = b.add(*slot, q);
                }
                for (store, v) in vector.iter().zip(values) {
                    self.frame.store(store, at, v);
                }
            });
            for (sum, &(store, _, stride)) in done.iter().zip(sums) {
                let total = b.reduce(*sum, |b, x, y| b.add(x, y));
                let index = b.add(b.mul(self.out_row, b.i64(i64::from(stride))), g);
                b.store(b.row(self.frame.output(store.output), index, 4), total, Elem::I32);
            }
        }

        fn zero_pad(&self, output: OutputId) {
            let b = self.b;
            let desc = self.e.outputs[output.0 as usize];
            let OutputKind::Elem { stride, zero_pad } = desc.kind else { return };
            let size = desc.ty.bytes() as i64;
            let row = b.row(self.frame.output(output), self.out_row, i64::from(stride) * size);
            let start = b.offset(row, self.cols * size);
            let (bytes, lanes) = (i64::from(zero_pad) * size, self.lanes * 4);
            let whole = bytes - bytes % i64::from(lanes);
            b.for_const(0, whole, i64::from(lanes), &[], |at, _| {
                b.store(b.at(start, at), b.int(Elem::I8, lanes, 0), Elem::I8);
                vec![]
            });
            let rest = (bytes - whole) as u32;
            b.store_partial(b.offset(start, whole), b.int(Elem::I8, lanes, 0), Elem::I8, rest);
        }

        fn sweep(
            &self,
            start: i64,
            width: i64,
            init: &[Val<'c>],
            body: impl FnMut(&At<'c>, usize, &mut Vec<Val<'c>>),
        ) -> Vec<Val<'c>> {
            self.sweep_from(self.b.i64(start), width, init, body)
        }

        /// Runs `body` for all vectors of `width` columns from `start` on, carrying values; `body` also gets the
        /// number of the vector, which repeats in loops.
        fn sweep_from(
            &self,
            start: Val<'c>,
            width: i64,
            init: &[Val<'c>],
            mut body: impl FnMut(&At<'c>, usize, &mut Vec<Val<'c>>),
        ) -> Vec<Val<'c>> {
            let b = self.b;
            let lanes = i64::from(self.lanes);
            let step = lanes * self.unroll;
            let looped = width - width % step;
            let mut carried = b.for_const(0, looped, step, init, |col, carried| {
                let mut carried = carried.to_vec();
                for u in 0..self.unroll {
                    let col = b.add(b.add(start, col), b.i64(u * lanes));
                    body(&self.at(col, self.lanes, Valid::All), u as usize, &mut carried);
                }
                carried
            });
            let mut done = looped;
            let mut u = 0;
            while done < width {
                let valid =
                    if width - done >= lanes { Valid::All } else { Valid::First((width - done) as u32) };
                let col = b.add(start, b.i64(done));
                body(&self.at(col, self.lanes, valid), u, &mut carried);
                done += lanes;
                u += 1;
            }
            carried
        }
    }

    fn neutral(op: ReduceOp) -> f32 {
        match op {
            ReduceOp::Sum | ReduceOp::AbsMax => 0.0,
            ReduceOp::Max => f32::NEG_INFINITY,
        }
    }

    /// `v` into `acc`; a NaN in `v` is passed over by the maxima.
    fn combine<'c>(b: &VecBuilder<'_, 'c>, op: ReduceOp, v: Val<'c>, acc: Val<'c>) -> Val<'c> {
        match op {
            ReduceOp::Sum => b.fadd(acc, v),
            ReduceOp::Max => b.fmax(v, acc),
            ReduceOp::AbsMax => b.fmax(b.fabs(v), acc),
        }
    }

    fn first<'c>(b: &VecBuilder<'_, 'c>, lanes: u32, n: u32) -> Val<'c> {
        let mask: Vec<i64> = (0..lanes).map(|l| i64::from(l < n)).collect();
        b.ints(Elem::I1, &mask)
    }
}

#[cfg(all(test, feature = "llvm"))]
mod tests {
    use super::*;
    use crate::cpu::testing::{Buf, assert_close, build, call, random, rng, runnable, through};
    use crate::eexpr::interp::{self, Mode, run};
    use quantc_ir::formats;
    use quantc_ir::quant::{dequantize_one, quantize_one};

    const COLS: [u32; 8] = [1, 3, 17, 48, 64, 172, 288, 1000];
    const ROWS: [usize; 4] = [1, 2, 5, 33];

    fn elements(spec: &RowSpec, input: usize, rows: usize) -> usize {
        match spec.body.inputs[input].kind {
            InputKind::Elem { stride } => rows * stride as usize,
            InputKind::Col => spec.cols as usize,
            InputKind::Row => rows,
            InputKind::One => 1,
        }
    }

    fn out_elements(spec: &RowSpec, output: usize, rows: usize) -> usize {
        match spec.body.outputs[output].kind {
            OutputKind::Elem { stride, .. } | OutputKind::GroupSums { stride, .. } => rows * stride as usize,
            OutputKind::Row => rows,
        }
    }

    /// Runs a kernel in two calls that split the rows, and gives its outputs.
    fn run_kernel(
        object: &quantc_runtime::object::Object,
        spec: &RowSpec,
        inputs: &[Vec<f32>],
        rows: usize,
    ) -> Vec<Vec<f32>> {
        let mut inputs: Vec<Buf> =
            inputs.iter().zip(&spec.body.inputs).map(|(v, d)| Buf::of(v, d.ty)).collect();
        let mut outputs: Vec<Buf> = (0..spec.body.outputs.len())
            .map(|i| Buf::poisoned(out_elements(spec, i, rows) * spec.body.outputs[i].ty.bytes()))
            .collect();
        let split = rows as i64 / 3;
        for items in [0..split, split..rows as i64] {
            let mut args: Vec<&mut Buf> = inputs.iter_mut().chain(outputs.iter_mut()).collect();
            call(object, "k", &mut args, [rows as i64, rows as i64], items);
        }
        for input in &inputs {
            input.bytes();
        }
        outputs.iter().zip(&spec.body.outputs).map(|(b, d)| b.read(d.ty)).collect()
    }

    /// Compares a kernel with the f64 reference on random data, for all targets and numbers of rows.
    fn compare(spec: &RowSpec, range: f32, abs: f64, rel: f64) {
        for target in runnable() {
            let object = build(target, |unit| emit(unit, spec, "k"));
            for rows in ROWS {
                let mut rng = rng(u64::from(spec.cols) * 100 + rows as u64);
                let inputs: Vec<Vec<f32>> = (0..spec.body.inputs.len())
                    .map(|i| {
                        through(&random(&mut rng, elements(spec, i, rows), range), spec.body.inputs[i].ty)
                    })
                    .collect();
                let got = run_kernel(&object, spec, &inputs, rows);
                let slices: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
                let on = interp::Rows { rows, cols: spec.cols as usize, inputs: &slices, acc: None };
                let want = run(&spec.body, Mode::F64, on).expect("the body is well formed");
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    // A rounded store adds half a unit of its own last place.
                    let rel = rel
                        + match spec.body.outputs[i].ty {
                            MemTy::F16 => 2f64.powi(-11),
                            MemTy::Bf16 => 2f64.powi(-8),
                            _ => 0.0,
                        };
                    let what =
                        format!("{} {} cols {} rows {rows} output {i}", target.name, spec.name, spec.cols);
                    let holes: Vec<bool> = want.iter().map(|w| w.is_nan()).collect();
                    assert!(got.iter().zip(&holes).all(|(g, hole)| g.is_nan() == *hole), "{what}: NaN");
                    let keep = |v: usize| !holes[v];
                    let g: Vec<f32> = (0..got.len()).filter(|&v| keep(v)).map(|v| got[v]).collect();
                    let w: Vec<f64> = (0..want.len()).filter(|&v| keep(v)).map(|v| want[v]).collect();
                    assert_close(&g, &w, abs, rel, &what);
                }
            }
        }
    }

    #[test]
    fn norms() {
        // A sum of n squares in f32 with 16 or more partial sums errs by less than n/8 roundings; the root halves
        // it. 1e-6 is eight units in the last place. Small results of x - mean carry an error relative to x.
        for cols in COLS {
            compare(&RowSpec::rms_norm(cols, 1e-5, MemTy::F32, MemTy::F32, MemTy::F32), 3.0, 1e-7, 2e-6);
            let layer = RowSpec::layer_norm(cols, 1e-5, MemTy::F32, MemTy::F32, Some(MemTy::F32), MemTy::F32);
            compare(&layer, 3.0, 4e-6, 2e-6);
        }
        compare(&RowSpec::rms_norm(288, 1e-6, MemTy::Bf16, MemTy::F16, MemTy::Bf16), 3.0, 1e-7, 2e-6);
        compare(&RowSpec::layer_norm(172, 1e-6, MemTy::F16, MemTy::Bf16, None, MemTy::F16), 3.0, 4e-6, 2e-6);
    }

    #[test]
    fn norms_of_large_rows_keep_f32_accuracy() {
        compare(&RowSpec::rms_norm(4096, 1e-5, MemTy::F32, MemTy::F32, MemTy::F32), 50.0, 1e-7, 2e-6);
    }

    #[test]
    fn softmax_rows() {
        // exp errs by 1.5 units, the difference x - max by one unit of |x| <= 20: 2e-6 relative.
        for cols in COLS {
            compare(&RowSpec::softmax(cols, MemTy::F32, MemTy::F32), 20.0, 1e-30, 6e-6);
        }
    }

    #[test]
    fn elementwise() {
        for cols in COLS {
            for op in
                [BinaryOp::Add, BinaryOp::Sub, BinaryOp::Mul, BinaryOp::Div, BinaryOp::Min, BinaryOp::Max]
            {
                // One correctly rounded operation: 2^-24.
                compare(&RowSpec::binary(op, cols, MemTy::F32, MemTy::F32, MemTy::F32), 4.0, 1e-37, 6e-8);
            }
            compare(&RowSpec::bias(cols, MemTy::F32, MemTy::F32, MemTy::F32), 4.0, 1e-37, 6e-8);
            compare(&RowSpec::gated(UnaryOp::Silu, cols, MemTy::F32, MemTy::F32), 12.0, 1e-7, 6e-7);
            compare(&RowSpec::gated_pair(UnaryOp::GeluTanh, cols, MemTy::F32, MemTy::F32), 6.0, 4e-6, 2e-6);
            compare(
                &RowSpec::copy(cols, MemTy::F32, 2 * cols + 5, cols + 1, MemTy::F32, cols + 3),
                4.0,
                0.0,
                0.0,
            );
        }
        for (from, to) in [
            (MemTy::F32, MemTy::F16),
            (MemTy::F16, MemTy::Bf16),
            (MemTy::Bf16, MemTy::F32),
            (MemTy::I8, MemTy::F16),
        ] {
            compare(&RowSpec::copy(77, from, 77, 0, to, 77), 100.0, 0.0, 0.0);
        }
    }

    #[test]
    fn unary_functions() {
        use UnaryOp::*;
        for op in [Neg, Abs, Exp, Silu, GeluErf, GeluTanh, Tanh, Sigmoid, Relu, Round, OneIfZero, RoundE4m3] {
            // gelu and tanh are good to 3e-7 absolute, times |x| <= 9.
            compare(&RowSpec::unary(op, 77, MemTy::F32, MemTy::F32), 9.0, 2e-6, 6e-7);
        }
        // Of the random numbers half are negative: their roots are NaN in kernel and reference alike.
        for op in [Sqrt, Rsqrt, Rcp] {
            compare(&RowSpec::unary(op, 77, MemTy::F32, MemTy::F32), 9.0, 0.0, 2e-7);
        }
    }

    #[test]
    fn emitted_functions_equal_the_interpreter_bit_by_bit() {
        use UnaryOp::*;
        let values: Vec<f32> = (0..=u32::MAX).step_by(104_729).map(f32::from_bits).collect();
        let mut values = values;
        values.extend([
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            0.5,
            1.5,
            2.5,
            -0.5,
            88.73,
            -103.9,
        ]);
        let cols = values.len() as u32;
        for target in runnable() {
            for op in [
                Neg, Abs, Exp, Silu, GeluErf, GeluTanh, Tanh, Sigmoid, Sqrt, Rsqrt, Rcp, Relu, Round,
                OneIfZero, RoundE4m3,
            ] {
                let spec = RowSpec::unary(op, cols, MemTy::F32, MemTy::F32);
                let object = build(target, |unit| emit(unit, &spec, "k"));
                let got = run_kernel(&object, &spec, std::slice::from_ref(&values), 1);
                let on = interp::Rows { rows: 1, cols: cols as usize, inputs: &[&values], acc: None };
                let mode = Mode::F32 { fused: target.cpu.fma };
                let want = run(&spec.body, mode, on).expect("the body is well formed");
                for ((&g, &w), x) in got[0].iter().zip(&want[0]).zip(&values) {
                    let same = g.to_bits() == (w as f32).to_bits() || (g.is_nan() && w.is_nan());
                    assert!(same, "{} {op:?}({x}) = {g}, not {w}", target.name);
                }
            }
        }
    }

    #[test]
    fn conversions_equal_the_definition_for_all_bits() {
        let mut values: Vec<f32> = (0..=u32::MAX).step_by(50_021).map(f32::from_bits).collect();
        // All halves, and the points between neighbours.
        for bits in 0..=u16::MAX {
            let v = half::f16::from_bits(bits).to_f32();
            values.extend([
                v,
                f32::from_bits(v.to_bits().wrapping_add(0x1000)),
                f32::from_bits(v.to_bits() | 0xfff),
            ]);
        }
        let cols = values.len() as u32;
        for target in runnable() {
            for ty in [MemTy::F16, MemTy::Bf16, MemTy::I8] {
                let narrow = RowSpec::copy(cols, MemTy::F32, cols, 0, ty, cols);
                let object = build(target, |unit| emit(unit, &narrow, "k"));
                let got = run_kernel(&object, &narrow, std::slice::from_ref(&values), 1);
                for (&g, &x) in got[0].iter().zip(&values) {
                    let w = match ty {
                        MemTy::F16 => half::f16::from_f32(x).to_f32(),
                        MemTy::Bf16 => half::bf16::from_f32(x).to_f32(),
                        _ if x.is_nan() => 0.0,
                        _ => x.round_ties_even().clamp(-128.0, 127.0),
                    };
                    assert!(
                        g == w || (g.is_nan() && w.is_nan()),
                        "{} {ty:?}({x}) = {g}, not {w}",
                        target.name
                    );
                }
                // And back: every stored pattern is read exactly.
                let wide = RowSpec::copy(cols, ty, cols, 0, MemTy::F32, cols);
                let object = build(target, |unit| emit(unit, &wide, "k"));
                let back = run_kernel(&object, &wide, &got, 1);
                let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
                assert!(back[0].iter().zip(&got[0]).all(same), "{} {ty:?}", target.name);
            }
        }
    }

    /// Per-token quantization written out once more.
    fn quantized(row: &[f32]) -> (Vec<f32>, f32) {
        let absmax = row.iter().fold(0f32, |m, v| m.max(v.abs()));
        let scale = if absmax == 0.0 { 1.0 } else { absmax / 127.0 };
        (row.iter().map(|v| (v / scale).round_ties_even().clamp(-127.0, 127.0)).collect(), scale)
    }

    #[test]
    fn quantization_is_exact() {
        for target in runnable() {
            for cols in COLS {
                for group in [None, Some(32), Some(128), Some(cols), Some(7)] {
                    let spec = RowSpec::quantize_token(cols, MemTy::F32, group);
                    let object = build(target, |unit| emit(unit, &spec, "k"));
                    let rows = 5;
                    let mut x = random(&mut rng(u64::from(cols)), rows * cols as usize, 40.0);
                    x[..cols as usize].fill(0.0);
                    let got = run_kernel(&object, &spec, std::slice::from_ref(&x), rows);
                    let stride = i8_row_stride(cols) as usize;
                    for (r, row) in x.chunks(cols as usize).enumerate() {
                        let (q, scale) = quantized(row);
                        let line = &got[0][r * stride..(r + 1) * stride];
                        assert_eq!(&line[..cols as usize], q, "{} cols {cols} group {group:?}", target.name);
                        assert!(line[cols as usize..].iter().all(|&v| v == 0.0), "padding is zero");
                        assert_eq!(got[1][r], scale);
                        if let Some(group) = group {
                            let sums: Vec<f32> = q.chunks(group as usize).map(|g| g.iter().sum()).collect();
                            assert_eq!(&got[2][r * sums.len()..(r + 1) * sums.len()], sums);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn static_quantization_clamps() {
        for target in runnable() {
            for cols in COLS {
                for group in [32, cols, 7] {
                    let spec = RowSpec::quantize_static(cols, MemTy::F32, Some(group));
                    let object = build(target, |unit| emit(unit, &spec, "k"));
                    let (rows, scale) = (5, 0.05f32);
                    let mut x = random(&mut rng(u64::from(cols)), rows * cols as usize, 10.0);
                    (x[0], x[cols as usize]) = (-9.0, 9.0);
                    let got = run_kernel(&object, &spec, &[x.clone(), vec![scale]], rows);
                    let stride = i8_row_stride(cols) as usize;
                    for (r, row) in x.chunks(cols as usize).enumerate() {
                        let code = |&x: &f32| quantize_one(x, scale, 0, &formats::INT8) as u8 as i8;
                        let q: Vec<f32> = row.iter().map(|x| f32::from(code(x))).collect();
                        let line = &got[0][r * stride..(r + 1) * stride];
                        assert_eq!(&line[..cols as usize], q, "{} cols {cols} group {group}", target.name);
                        assert!(line[cols as usize..].iter().all(|&v| v == 0.0), "padding is zero");
                        assert_eq!(got[1][r], scale);
                        let sums: Vec<f32> = q.chunks(group as usize).map(|g| g.iter().sum()).collect();
                        assert_eq!(&got[2][r * sums.len()..(r + 1) * sums.len()], sums);
                    }
                    // Both ends saturate, each at its own.
                    assert_eq!((got[0][0], got[0][stride]), (-128.0, 127.0));
                }
            }
        }
    }

    #[test]
    fn rounding_to_e4m3_equals_the_definition() {
        let mut values: Vec<f32> = (0..=u32::MAX).step_by(50_021).map(f32::from_bits).collect();
        // All numbers of the format, those halfway between, and their neighbours.
        let numbers: Vec<f32> = (0..0x7f).map(|code| formats::E4M3.decode(code)).collect();
        for pair in numbers.windows(2) {
            let half = (pair[0] + pair[1]) / 2.0;
            values.extend([pair[0], half, half.next_up(), half.next_down(), -half, -pair[1]]);
        }
        values.extend([448.0, 464.0, 1e9, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -0.0]);
        let cols = values.len() as u32;
        for target in runnable() {
            let spec = RowSpec::unary(UnaryOp::RoundE4m3, cols, MemTy::F32, MemTy::F32);
            let object = build(target, |unit| emit(unit, &spec, "k"));
            let got = run_kernel(&object, &spec, std::slice::from_ref(&values), 1);
            for (&g, &x) in got[0].iter().zip(&values) {
                let want = formats::E4M3.decode(formats::E4M3.encode(x));
                let same = g.to_bits() == want.to_bits() || x.is_nan() && g.is_nan();
                assert!(same, "{} e4m3({x}) = {g}, not {want}", target.name);
            }
        }
    }

    #[test]
    fn e4m3_and_back_is_what_its_codes_stand_for() {
        let back =
            |x: f32, s: f32| dequantize_one(quantize_one(x, s, 0, &formats::E4M3), s, 0, &formats::E4M3);
        for target in runnable() {
            for cols in COLS {
                let rows = 5;
                let mut x = random(&mut rng(u64::from(cols)), rows * cols as usize, 40.0);
                x[..cols as usize].fill(0.0);
                let spec = RowSpec::round_e4m3_static(cols, MemTy::F32, MemTy::F32);
                let object = build(target, |unit| emit(unit, &spec, "k"));
                // 0.05 is too small for 40 / 448: some saturate.
                let got = run_kernel(&object, &spec, &[x.clone(), vec![0.05]], rows);
                let want: Vec<f32> = x.iter().map(|&x| back(x, 0.05)).collect();
                assert_eq!(got[0], want, "{} cols {cols}", target.name);
                let spec = RowSpec::round_e4m3_token(cols, MemTy::F32, MemTy::F32);
                let object = build(target, |unit| emit(unit, &spec, "k"));
                let got = run_kernel(&object, &spec, std::slice::from_ref(&x), rows);
                let row = |row: &[f32]| {
                    let absmax = row.iter().fold(0f32, |m, v| m.max(v.abs()));
                    let scale = if absmax == 0.0 { 1.0 } else { absmax / 448.0 };
                    row.iter().map(|&x| back(x, scale)).collect::<Vec<f32>>()
                };
                let want: Vec<f32> = x.chunks(cols as usize).flat_map(row).collect();
                assert_eq!(got[0], want, "{} cols {cols}", target.name);
            }
        }
    }

    #[test]
    fn norm_and_quantization_in_one() {
        // The fused kernel may differ from the f64 reference by one step where a value lies near a tie; more than
        // one value in a hundred there would be a wrong scale.
        for target in runnable() {
            let spec = RowSpec::rms_norm_quantize(288, 1e-5, MemTy::F32, MemTy::F32, Some(96));
            let object = build(target, |unit| emit(unit, &spec, "k"));
            let (x, g) = (random(&mut rng(1), 33 * 288, 3.0), random(&mut rng(2), 288, 2.0));
            let got = run_kernel(&object, &spec, &[x.clone(), g.clone()], 33);
            let on = interp::Rows { rows: 33, cols: 288, inputs: &[&x, &g], acc: None };
            let want = run(&spec.body, Mode::F64, on).expect("the body is well formed");
            let off = got[0].iter().zip(&want[0]).filter(|&(&g, &w)| g as f64 != w).count();
            assert_close(&got[0], &want[0], 1.0, 0.0, target.name);
            assert!(off * 100 < got[0].len(), "{off} values differ");
            assert_close(&got[1], &want[1], 0.0, 1e-6, target.name);
        }
    }

    #[test]
    fn last_rows_and_rows_of_heads() {
        for target in runnable() {
            let spec = RowSpec::copy_last_rows(17, MemTy::F32, MemTy::F32);
            let object = build(target, |unit| emit(unit, &spec, "k"));
            let x = random(&mut rng(3), 5 * 17, 1.0);
            for r in 1..=5 {
                let (mut input, mut out) = (Buf::of(&x, MemTy::F32), Buf::poisoned(r * 17 * 4));
                call(&object, "k", &mut [&mut input, &mut out], [5, r as i64], 0..r as i64);
                assert_eq!(out.read(MemTy::F32), x[(5 - r) * 17..]);
            }
            // A norm over heads, in place: 5 tokens of 3 heads.
            let spec = RowSpec::rms_norm(16, 1e-5, MemTy::F32, MemTy::F32, MemTy::F32)
                .with_rows(RowCount::per_token(3));
            assert_eq!(spec.rows.rows(5, 1), 15);
            let object = build(target, |unit| emit(unit, &spec, "k"));
            let (x, g) = (random(&mut rng(4), 15 * 16, 3.0), random(&mut rng(5), 16, 2.0));
            let want = run_kernel(&object, &spec, &[x.clone(), g.clone()], 15);
            let (mut buf, mut gain) = (Buf::of(&x, MemTy::F32), Buf::of(&g, MemTy::F32));
            let address = buf.ptr();
            let args = [address, gain.ptr(), address];
            let kernel = object.symbol("k").expect("the object has the kernel");
            // SAFETY: the buffers hold 15 rows of 16 and 16 values.
            unsafe { kernel(args.as_ptr(), [5i64, 5].as_ptr(), 0, 15) };
            assert_eq!(buf.read(MemTy::F32), want[0]);
        }
    }

    #[test]
    fn malformed_specs_are_refused() {
        let mut e = EExpr::new();
        let acc = e.acc();
        e.store(acc, MemTy::F32, 8);
        assert!(RowSpec::new("acc", 8, e).check().is_err());
        assert!(RowSpec::quantize_token(8, MemTy::F32, Some(0)).check().is_err());
        assert!(RowSpec::copy(8, MemTy::F32, 10, 3, MemTy::F32, 8).check().is_err(), "reads past its rows");
        assert!(RowSpec::copy(8, MemTy::F32, 8, 0, MemTy::F32, 7).check().is_err(), "writes past its rows");
        let mut spec = RowSpec::copy(8, MemTy::F32, 8, 0, MemTy::F32, 8);
        spec.row_offset = RowOffset::LastRows;
        assert!(spec.check().is_err(), "last rows of all tokens");
    }

    #[test]
    fn the_same_spec_gives_the_same_bytes() {
        use inkwell::context::Context;
        let object = || {
            let cx = Context::create();
            let unit = crate::cpu::llvm::Unit::new(&cx, crate::targets::TARGETS[0], "x").expect("a target");
            emit(&unit, &RowSpec::quantize_token(288, MemTy::F32, Some(32)), "k").expect("a kernel");
            unit.finish().expect("an object")
        };
        assert_eq!(object(), object());
    }
}
