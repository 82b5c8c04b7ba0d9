//! What kernels over rows write: columns, values of rows, sums of groups, and padding.

use super::{Row, Run, combine, group_sums};
use crate::cuda::expr::{At, alignment, wide};
use crate::cuda::tile::{Binary, Builder, Reg, Unary, Val, WARP};
use crate::eexpr::{OutputKind, ReduceOp, Store};

impl Row<'_> {
    /// The last pass: everything that is stored.
    pub(super) fn stores(&mut self, b: &mut Builder) {
        let e = self.frame.expr();
        let sums = group_sums(self.spec);
        let total = sums.filter(|&(_, group)| group >= self.spec.cols).map(|_| b.var(0.0));
        self.each_run(b, |row, b, run, known| {
            let mut values = vec![];
            for store in &e.stores {
                match e.outputs[store.output.0 as usize].kind {
                    OutputKind::Elem { .. } => {
                        values.push((store, row.frame.values(b, store.node, &run.at, &[], known)));
                    }
                    OutputKind::GroupSums { group, stride } => {
                        let v = row.frame.values(b, store.node, &run.at, &[], known);
                        row.add_codes(b, store, run, &v, (group, stride), total);
                    }
                    OutputKind::Row => {}
                }
            }
            let here = b.binary(Binary::PAnd, run.valid, row.exists);
            b.when(here, |b| {
                for (store, v) in &values {
                    row.frame.store(b, store, &run.at, v);
                }
            });
        });
        if let (Some(total), Some((store, _))) = (total, sums) {
            let sum = self.across(b, &[(ReduceOp::Sum, total.into())])[0];
            self.store_sum(b, store, sum, self.lane, self.out_row);
        }
        self.store_row_values(b);
        self.store_padding(b);
    }

    /// Sums the codes that `values` are stored as: into `total` where a group is a row, else across the lanes of a group.
    fn add_codes(
        &self,
        b: &mut Builder,
        store: &Store,
        run: &Run,
        values: &[Val],
        (group, stride): (u32, u32),
        total: Option<Reg>,
    ) {
        let mut sum: Val = 0.0.into();
        for &v in values {
            let code = b.unary(Unary::FloatToByte, v);
            // Sums of fewer than 2^17 codes are exact in f32.
            let code = b.unary(Unary::IntToFloat, code);
            sum = combine(b, ReduceOp::Sum, sum, code);
        }
        let sum = b.select(run.valid, sum, 0.0);
        if let Some(total) = total {
            let sum = combine(b, ReduceOp::Sum, total.into(), sum);
            return b.set(total, sum);
        }
        let lanes = group / self.tile.width;
        let sum = self.across_warp(b, ReduceOp::Sum, sum, lanes);
        let in_group = b.rem(self.lane, lanes);
        let in_group = b.select(run.valid, in_group, 1);
        let index = b.div(run.at.col, group);
        let place = b.mad(self.out_row, stride, index);
        self.store_sum(b, store, sum, in_group, place);
    }

    /// Writes a sum of codes from the lane that is 0.
    fn store_sum(&self, b: &mut Builder, store: &Store, sum: Val, lane: Val, index: Val) {
        let first = b.lt(lane, 1);
        let here = b.binary(Binary::PAnd, first, self.exists);
        b.when(here, |b| {
            let at = b.mul(index, 4);
            let sum = b.unary(Unary::FloatToInt, sum);
            b.store(self.frame.output(store), at, &[sum], 4);
        });
    }

    fn store_row_values(&mut self, b: &mut Builder) {
        let e = self.frame.expr();
        let at = At { row: self.row, out_row: self.out_row, col: 0.into(), width: 1 };
        let mut known = self.known.clone();
        let first = b.lt(self.lane, 1);
        let here = b.binary(Binary::PAnd, first, self.exists);
        for store in &e.stores {
            if e.outputs[store.output.0 as usize].kind == OutputKind::Row {
                let v = self.frame.scalar(b, store.node, &at, &mut known);
                b.when(here, |b| self.frame.store(b, store, &at, &[v]));
            }
        }
    }

    fn store_padding(&self, b: &mut Builder) {
        let e = self.frame.expr();
        for store in &e.stores {
            let desc = e.outputs[store.output.0 as usize];
            let OutputKind::Elem { stride, zero_pad } = desc.kind else { continue };
            if zero_pad == 0 {
                continue;
            }
            let bytes = desc.ty.bytes() as u32;
            let piece = alignment(&[stride * bytes, self.spec.cols * bytes, zero_pad * bytes]);
            let (from, to) = (self.spec.cols * bytes, (self.spec.cols + zero_pad) * bytes);
            let lanes = self.tile.warps_per_row * WARP;
            let first = b.mad(self.lane, piece, from);
            b.when(self.exists, |b| {
                b.repeat(first, to, lanes * piece, |b, at| {
                    let at = wide(b, self.out_row, stride * bytes, at);
                    b.store(self.frame.output(store), at, &vec![0.into(); piece.div_ceil(4) as usize], piece);
                });
            });
        }
    }
}
