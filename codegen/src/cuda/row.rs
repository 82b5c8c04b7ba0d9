//! Kernels over rows: a block, or some warps of it, computes one row of a [`RowSpec`] at a time.
//!
//! A warp's lanes take adjacent columns, a few each, so that all accesses are as wide as types and strides allow. A row
//! is gone over as often as its reductions need. Short rows stay in registers meanwhile; long ones are read again. Lanes
//! beyond the last column compute a column that exists and write nothing.
//!
//! Sums are taken in a fixed order, which depends on the tile only: by lane, then across lanes, then across warps.
//!
//! Buffers: the expression's inputs, then its outputs, all aligned to 16 bytes. Scalars: `t` tokens and `r` results.

use super::expr::{At, Frame, Known};
use super::tile::{Binary, Builder, Extent, Kernel, Mem, Unary, Val, WARP};
use crate::cpu::math::Lanes;
use crate::cpu::row::{RowOffset, RowSpec};
use crate::eexpr::{InputKind, Node, NodeId, OutputKind, ReduceOp, Store};
use quantc_ir::diag::{Diag, Result};
use serde::{Deserialize, Serialize};

mod stores;

/// How a kernel over rows is cut.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct RowTile {
    /// Warps that share a row: a power of two up to 16.
    pub warps_per_row: u32,
    /// Rows of a block.
    pub rows: u32,
    /// Adjacent columns of one lane: 1, 2, 4 or 8. Divides the columns of a row.
    pub width: u32,
}

/// Runs of columns that stay in registers.
const MOST_KEPT: u32 = 8;

/// Runs of one round of a loop over a long row: enough loads in flight, few enough registers.
const RUNS_PER_ROUND: u32 = 4;

/// Warps of a block where rows are short.
const WARPS: u32 = 4;

impl RowTile {
    /// The tile for a spec.
    pub fn of(spec: &RowSpec) -> RowTile {
        let groups = group_sums(spec);
        let fits = |width: &u32| {
            spec.cols.is_multiple_of(*width)
                && groups.is_none_or(|(_, group)| group.is_multiple_of(*width) || group >= spec.cols)
        };
        let elems = spec
            .body
            .inputs
            .iter()
            .filter(|d| matches!(d.kind, InputKind::Elem { .. }))
            .map(|d| d.ty.bytes());
        let outputs = spec
            .body
            .outputs
            .iter()
            .filter(|d| matches!(d.kind, OutputKind::Elem { .. }))
            .map(|d| d.ty.bytes());
        let widest = if elems.chain(outputs).max() == Some(2) { 8 } else { 4 };
        let width = [widest, 4, 2].into_iter().find(fits).unwrap_or(1);
        let runs = spec.cols.div_ceil(WARP * width);
        let warps_per_row = runs.div_ceil(4).next_power_of_two().min(16);
        RowTile { warps_per_row, rows: (WARPS / warps_per_row).max(1), width }
    }

    fn threads(&self) -> u32 {
        self.warps_per_row * self.rows * WARP
    }
}

/// The store of sums over groups and the columns of a group, if there is one.
fn group_sums(spec: &RowSpec) -> Option<(&Store, u32)> {
    spec.body.stores.iter().find_map(|s| match spec.body.outputs[s.output.0 as usize].kind {
        OutputKind::GroupSums { group, .. } => Some((s, group)),
        _ => None,
    })
}

/// The kernel of `spec`, called `name`.
pub fn build(name: &str, spec: &RowSpec, tile: RowTile) -> Result<Kernel> {
    spec.check().map_err(|e| Diag::bug(format!("{}: {e}", spec.name)))?;
    if let Some((_, group)) = group_sums(spec)
        && group < spec.cols
        && !(group.is_power_of_two() && (tile.width..=tile.width * WARP).contains(&group))
    {
        return Err(Diag::target(format!(
            "{}: sums of groups of {group} columns have no CUDA kernel",
            spec.name
        ))
        .help(format!("groups that do are powers of two up to {}, or whole rows", tile.width * WARP)));
    }
    let mut b = Builder::new(name, tile.threads());
    let frame = Frame::declare(&mut b, &spec.body, true);
    let (t, r) = (b.scalar("t"), b.scalar("r"));
    let rows = [t, r][spec.rows.sym.dim() as usize];
    b.grid(Extent::PerScalar { scalar: rows, times: spec.rows.per, per: tile.rows }, Extent::Fixed(1));

    let thread = b.thread();
    let lane = b.rem(thread, tile.warps_per_row * WARP);
    let block = b.block_x();
    let mut out_row = block;
    let mut exists = Val::Pred(true);
    if tile.rows > 1 {
        let in_block = b.div(thread, tile.warps_per_row * WARP);
        out_row = b.mad(block, tile.rows, in_block);
        let count = b.scalar_value(rows);
        let count = b.mul(count, spec.rows.per);
        exists = b.lt(out_row, count);
        let last = b.binary(Binary::Sub, count, 1);
        out_row = b.binary(Binary::Min, out_row, last);
    }
    let row = match spec.row_offset {
        RowOffset::None => out_row,
        RowOffset::LastRows => {
            let (t, r) = (b.scalar_value(t), b.scalar_value(r));
            let skipped = b.binary(Binary::Sub, t, r);
            b.mad(skipped, spec.rows.per, out_row)
        }
    };
    let step = tile.warps_per_row * WARP * tile.width;
    let runs = spec.cols.div_ceil(step);
    let kept = (runs <= MOST_KEPT).then(|| vec![frame.nothing(); runs as usize]);
    let known = frame.nothing();
    let mut row = Row {
        spec,
        tile,
        frame,
        lane,
        row,
        out_row,
        exists,
        step,
        runs,
        kept,
        known,
        level: spec.body.passes(),
    };
    row.emit(&mut b);
    Ok(b.finish())
}

struct Row<'e> {
    spec: &'e RowSpec,
    tile: RowTile,
    frame: Frame<'e>,
    /// Lane among those of the row.
    lane: Val,
    row: Val,
    out_row: Val,
    exists: Val,
    /// Columns of one run of all lanes.
    step: u32,
    runs: u32,
    /// What is known of each run, when all stay in registers.
    kept: Option<Vec<Known>>,
    /// What is known of the row: reductions.
    known: Known,
    /// For each node the pass in which it can be computed.
    level: Vec<u32>,
}

/// A run of columns: where a lane is, and whether it has a column.
struct Run {
    at: At,
    valid: Val,
}

impl Row<'_> {
    fn emit(&mut self, b: &mut Builder) {
        let e = self.frame.expr();
        let last = e.stores.iter().map(|s| self.level[s.node.0 as usize]).max().unwrap_or(0);
        for pass in 0..last {
            let of_pass = |&(i, node): &(usize, &Node)| match *node {
                Node::Reduce(_, a) => self.level[i] == pass + 1 && self.level[a.0 as usize] == pass,
                _ => false,
            };
            let list: Vec<(usize, ReduceOp, NodeId)> = e
                .nodes
                .iter()
                .enumerate()
                .filter(of_pass)
                .filter_map(|(i, n)| if let Node::Reduce(op, a) = *n { Some((i, op, a)) } else { None })
                .collect();
            if list.is_empty() {
                continue;
            }
            b.note(&format!(
                "pass {pass}: {} over the row",
                if list.len() == 1 { "a reduction" } else { "reductions" }
            ));
            let totals: Vec<_> = list.iter().map(|&(_, op, _)| b.var(identity(op))).collect();
            self.each_run(b, |row, b, run, known| {
                for (&(_, op, a), &total) in list.iter().zip(&totals) {
                    for v in row.frame.values(b, a, &run.at, &[], known) {
                        let v = if op == ReduceOp::AbsMax { b.abs(v) } else { v };
                        let v = b.select(run.valid, v, identity(op));
                        let sum = combine(b, op, total.into(), v);
                        b.set(total, sum);
                    }
                }
            });
            let parts =
                list.iter().zip(&totals).map(|(&(_, op, _), &v)| (op, Val::Reg(v))).collect::<Vec<_>>();
            let results = self.across(b, &parts);
            for (&(i, ..), v) in list.iter().zip(results) {
                self.known[i] = Some(vec![v]);
            }
        }
        b.note("the last pass: stores");
        self.stores(b);
    }

    /// Does something for all runs of columns, with what is known of each.
    fn each_run(&mut self, b: &mut Builder, mut f: impl FnMut(&Self, &mut Builder, &Run, &mut Known)) {
        if let Some(mut kept) = self.kept.take() {
            for (i, known) in kept.iter_mut().enumerate() {
                self.share(&self.known, known);
                let run = self.run(b, (i as u32 * self.step).into(), i as u32 + 1 == self.runs);
                f(self, b, &run, known);
                let mut row = std::mem::take(&mut self.known);
                self.share(known, &mut row);
                self.known = row;
            }
            self.kept = Some(kept);
            return;
        }
        let round = self.step * RUNS_PER_ROUND;
        b.repeat(0, self.spec.cols, round, |b, base| {
            let mut row = self.known.clone();
            for i in 0..RUNS_PER_ROUND {
                let first = b.add(base, i * self.step);
                let run = self.run(b, first, true);
                let mut known = row.clone();
                f(self, b, &run, &mut known);
                self.share(&known, &mut row);
            }
        });
    }

    /// Takes over what is known of the row, rather than of a run.
    fn share(&self, from: &Known, to: &mut Known) {
        let nodes = from.iter().zip(to).zip(self.frame.uniform());
        for ((from, to), _) in nodes.filter(|(_, uniform)| **uniform) {
            if to.is_none() {
                to.clone_from(from);
            }
        }
    }

    /// The run from column `first` on, which may be the last.
    fn run(&self, b: &mut Builder, first: Val, last: bool) -> Run {
        let offset = b.mul(self.lane, self.tile.width);
        let col = b.add(offset, first);
        let at = At { row: self.row, out_row: self.out_row, col, width: self.tile.width };
        let whole = self.spec.cols.is_multiple_of(if self.kept.is_some() || self.runs <= MOST_KEPT {
            self.step
        } else {
            self.step * RUNS_PER_ROUND
        });
        if !last || whole {
            return Run { at, valid: Val::Pred(true) };
        }
        let valid = b.lt(col, self.spec.cols);
        let col = b.binary(Binary::Min, col, self.spec.cols - self.tile.width);
        Run { at: At { col, ..at }, valid }
    }

    /// The results over all lanes of the row.
    fn across(&self, b: &mut Builder, parts: &[(ReduceOp, Val)]) -> Vec<Val> {
        let mut parts = parts.to_vec();
        for (op, v) in &mut parts {
            *v = self.across_warp(b, *op, *v, WARP);
        }
        let warps = self.tile.warps_per_row;
        if warps == 1 {
            return parts.into_iter().map(|(_, v)| v).collect();
        }
        let slots = self.tile.rows * warps * 4;
        let at = b.shared(slots * parts.len() as u32);
        let thread = b.thread();
        let warp = b.div(thread, WARP);
        let in_warp = b.rem(thread, WARP);
        let first = b.lt(in_warp, 1);
        b.when(first, |b| {
            for (i, (_, v)) in parts.iter().enumerate() {
                let place = b.mad(warp, 4, at + i as u32 * slots);
                let bits = b.unary(Unary::Bits, *v);
                b.store(Mem::Shared, place, &[bits], 4);
            }
        });
        b.barrier();
        let row = b.div(thread, warps * WARP);
        let results = parts.iter().enumerate().map(|(i, &(op, _))| {
            let mut result = None;
            for warp in 0..warps {
                let place = b.mad(row, warps * 4, at + i as u32 * slots + warp * 4);
                let word = b.load(Mem::Shared, place, 4)[0];
                let v = b.unary(Unary::FromBits, word);
                result = Some(result.map_or(v, |r| combine(b, op, r, v)));
            }
            result.expect("a row has warps")
        });
        results.collect()
    }

    /// The result over each `lanes` adjacent lanes, in all of them.
    fn across_warp(&self, b: &mut Builder, op: ReduceOp, mut v: Val, lanes: u32) -> Val {
        let mut mask = lanes / 2;
        while mask > 0 {
            let other = b.shuffle_xor(v, mask);
            v = combine(b, op, v, other);
            mask /= 2;
        }
        v
    }
}

/// What a reduction of nothing gives.
fn identity(op: ReduceOp) -> f32 {
    match op {
        ReduceOp::Sum | ReduceOp::AbsMax => 0.0,
        ReduceOp::Max => f32::NEG_INFINITY,
    }
}

/// A reduction of two values: NaN is passed over by maxima.
fn combine(b: &mut Builder, op: ReduceOp, a: Val, v: Val) -> Val {
    match op {
        ReduceOp::Sum => Lanes::add(b, a, v),
        ReduceOp::Max | ReduceOp::AbsMax => b.select_lt(a, v, v, a),
    }
}
