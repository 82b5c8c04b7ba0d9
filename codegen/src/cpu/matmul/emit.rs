//! The skeleton: loops over panels, row tiles, strips, groups and steps.

use inkwell::values::PointerValue;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::Dot;

use super::dot::{Act, Quad, accumulate, activations, quads};
use super::pairs::{self, Pairs};
use super::schedule::{CpuTile, Inner, MatmulSchedule, panel_vectors};
use super::unpack::{Unpack, check_width, load_zeros, pair_of_bf16};
use crate::cpu::llvm::{Elem, IntCmp, Unit, Val, VecBuilder};
use crate::eexpr::llvm::{At, Frame, Valid};
use crate::layout::{Layout, PANEL};
use crate::spec::{AFmt, MatmulSpec, ScaleTy, Zero, bf16_row_stride, i8_row_stride};

/// Emits the kernel of `spec` as `symbol`, made of the tiles of `schedule`.
pub fn emit(unit: &Unit<'_>, symbol: &str, spec: &MatmulSpec, schedule: &MatmulSchedule) -> Result<()> {
    spec.check()?;
    let cpu = &unit.target().cpu;
    check_width(cpu.vector_bits)?;
    if let Some(tile) = schedule.tiles.iter().find(|t| t.nr == 0 || !panel_vectors(cpu).is_multiple_of(t.nr))
    {
        return Err(Diag::bug(format!("a tile of {} vectors does not divide a panel", tile.nr)));
    }
    if !schedule.tiles.iter().any(|t| t.mr == 1) {
        return Err(Diag::bug("a matmul needs a tile of one row for what is left over"));
    }
    unit.kernel(symbol, |b| {
        Matmul::new(b, spec, schedule.inner).run(b, schedule);
        Ok(())
    })
}

/// A kernel being emitted: its spec and its buffers.
struct Matmul<'s, 'b, 'u, 'c> {
    spec: &'s MatmulSpec,
    layout: Layout,
    inner: Inner,
    a: PointerValue<'c>,
    /// Scale of a row and sums of its groups, for integer activations.
    a_int: Option<(PointerValue<'c>, PointerValue<'c>)>,
    /// Weights of each product.
    w: Vec<PointerValue<'c>>,
    frame: Frame<'b, 'u, 'c, 's>,
}

/// Where a tile works.
#[derive(Clone, Copy)]
struct Spot<'p, 'c> {
    /// The panel.
    panel: Val<'c>,
    /// First row.
    row: Val<'c>,
    /// First column within the panel.
    col: Val<'c>,
    /// The first byte of the panel's weights, for each product.
    w: &'p [PointerValue<'c>],
    tile: CpuTile,
}

/// One scale group: where its operands are and how long it is.
#[derive(Clone, Copy)]
struct Group<'c> {
    index: Val<'c>,
    /// Columns of k.
    len: u32,
    /// The first byte of the group's codes.
    w: PointerValue<'c>,
    /// The first row's activations at the group's first k.
    a: PointerValue<'c>,
}

impl<'s, 'b, 'u, 'c> Matmul<'s, 'b, 'u, 'c> {
    fn new(b: &'b VecBuilder<'u, 'c>, spec: &'s MatmulSpec, inner: Inner) -> Self {
        let a_int = match spec.a {
            AFmt::F32 | AFmt::Bf16 => None,
            AFmt::I8Token => Some((b.arg(1), b.arg(2))),
        };
        Matmul {
            spec,
            layout: Layout::of(spec),
            inner,
            a: b.arg(0),
            a_int,
            w: (spec.weights_arg()..spec.fixed_args()).map(|i| b.arg(i)).collect(),
            frame: Frame::new(b, &spec.epilogue, spec.fixed_args()),
        }
    }

    /// Bytes from one row of activations to the next.
    fn a_stride(&self) -> i64 {
        match self.spec.a {
            AFmt::F32 => i64::from(self.spec.k) * 4,
            AFmt::Bf16 => i64::from(bf16_row_stride(self.spec.k)) * 2,
            AFmt::I8Token => i64::from(i8_row_stride(self.spec.k)),
        }
    }

    /// Bytes of one activation.
    fn a_bytes(&self) -> i64 {
        match self.spec.a {
            AFmt::F32 => 4,
            AFmt::Bf16 => 2,
            AFmt::I8Token => 1,
        }
    }

    fn run(&self, b: &VecBuilder<'u, 'c>, schedule: &MatmulSchedule) {
        let m = b.dim(self.spec.rows.dim());
        b.for_items(|panel| {
            let panel_bytes = self.layout.panel_bytes() as i64;
            let w: Vec<_> = self.w.iter().map(|&w| b.row(w, panel, panel_bytes)).collect();
            let mut row = b.i64(0);
            for &tile in &schedule.tiles {
                let height = i64::from(tile.mr);
                // While the tile's rows are all there.
                let end = b.sub(m, b.i64(height - 1));
                let block = self.block(b, tile);
                row = b.for_range(row, end, height * block, &[row], |first, _| {
                    // All columns of the panel for the rows of one tile, or of some.
                    let width = i64::from(tile.nr * b.width());
                    b.for_const(0, i64::from(PANEL), width, &[first], |col, _| {
                        let one = |row| {
                            self.tile(b, &Spot { panel, row, col, w: &w, tile });
                            b.add(row, b.i64(height))
                        };
                        if block == 1 {
                            return vec![one(first)];
                        }
                        let stop = b.smin(b.add(first, b.i64(height * block)), end);
                        b.for_range(first, stop, height, &[first], |row, _| vec![one(row)])
                    })
                })[0];
            }
        });
    }

    /// Tiles of rows that share a strip of a panel before the next strip: a panel that the second-level cache does not keep
    /// from one tile to the next comes by once for several.
    fn block(&self, b: &VecBuilder<'u, 'c>, tile: CpuTile) -> i64 {
        let kept = u64::from(b.target().cpu.l2_kib) * 1024 / 2;
        let wide = self.layout.panel_bytes() * self.w.len() as u64 > kept;
        if wide && tile.mr > 1 && tile.nr * b.width() < PANEL { 4 } else { 1 }
    }

    /// One tile: all of k of each product, then the epilogue. Products follow each other, so that each streams its own
    /// weights; the sums of those that are finished wait in memory.
    fn tile(&self, b: &VecBuilder<'u, 'c>, spot: &Spot<'_, 'c>) {
        let sums: Vec<_> = spot.w.iter().map(|&w| self.product(b, spot, w)).collect();
        self.store(b, spot, &sums);
    }

    /// The sums of the tile over all of k, with the weights that begin at `panel`.
    fn product(&self, b: &VecBuilder<'u, 'c>, spot: &Spot<'_, 'c>, panel: PointerValue<'c>) -> Vec<Val<'c>> {
        let (group, k) = (self.spec.w.group, self.spec.k);
        let full = k / group;
        let a_row = b.row(self.a, spot.row, self.a_stride());
        let turn = |index: Val<'c>, len: u32, sums: &[Val<'c>]| {
            let w = b.row(panel, index, i64::from(self.layout.group_bytes()));
            let a = b.row(a_row, index, i64::from(group) * self.a_bytes());
            self.group(b, spot, &Group { index, len, w, a }, sums)
        };
        let zero = vec![b.f32(b.width(), 0.0); (spot.tile.mr * spot.tile.nr) as usize];
        let mut sums = b.for_const(0, i64::from(full), 1, &zero, |index, sums| turn(index, group, sums));
        if !k.is_multiple_of(group) {
            sums = turn(b.i64(i64::from(full)), k % group, &sums);
        }
        if let Some((scales, _)) = self.a_int {
            for (r, sums) in sums.chunks_mut(spot.tile.nr as usize).enumerate() {
                let row = b.add(spot.row, b.i64(r as i64));
                let scale = b.splat(b.load(b.row(scales, row, 4), Elem::F32, 1), b.width());
                for sum in sums {
                    *sum = b.fmul(*sum, scale);
                }
            }
        }
        sums
    }

    /// Adds the scaled sums of one group to `sums`.
    fn group(
        &self,
        b: &VecBuilder<'u, 'c>,
        spot: &Spot<'_, 'c>,
        group: &Group<'c>,
        sums: &[Val<'c>],
    ) -> Vec<Val<'c>> {
        let inner = match self.inner {
            Inner::Int(dot) => self.int_group(b, dot, spot, group),
            Inner::Bf16 => self.pair_group(b, spot, group),
            Inner::Float => self.float_group(b, spot, group),
        };
        let nr = spot.tile.nr as usize;
        let scales: Vec<_> = (0..spot.tile.nr).map(|v| self.load_scale(b, spot, group, v)).collect();
        sums.iter()
            .zip(inner)
            .enumerate()
            .map(|(i, (&sum, group_sum))| match scales[i % nr] {
                Some(scale) => b.fma(group_sum, scale, sum),
                // Without scales there is one group, and nothing before it.
                None => group_sum,
            })
            .collect()
    }

    /// The column of vector `v` of the tile, times `bytes`.
    fn col_bytes(&self, b: &VecBuilder<'u, 'c>, spot: &Spot<'_, 'c>, v: u32, bytes: u32) -> Val<'c> {
        let col = b.add(spot.col, b.i64(i64::from(v * b.width())));
        b.mul(col, b.i64(i64::from(bytes)))
    }

    fn load_scale(
        &self,
        b: &VecBuilder<'u, 'c>,
        spot: &Spot<'_, 'c>,
        group: &Group<'c>,
        v: u32,
    ) -> Option<Val<'c>> {
        let base = b.offset(group.w, i64::from(self.layout.codes_bytes(group.len)));
        let ty = self.spec.w.scale;
        let ptr = b.at(base, self.col_bytes(b, spot, v, ty.bytes()));
        match ty {
            ScaleTy::None => None,
            ScaleTy::F32 => Some(b.load(ptr, Elem::F32, b.width())),
            ScaleTy::Bf16 => Some(b.load_bf16(ptr, b.width())),
        }
    }

    /// The zero points of vector `v`.
    fn zeros(
        &self,
        b: &VecBuilder<'u, 'c>,
        spot: &Spot<'_, 'c>,
        group: &Group<'c>,
        v: u32,
    ) -> PointerValue<'c> {
        let at = self.layout.codes_bytes(group.len) + self.layout.scales_bytes();
        b.at(b.offset(group.w, i64::from(at)), self.col_bytes(b, spot, v, 1))
    }

    /// The codes of vector `v` in step `step`; a code step gives each column `bytes` bytes.
    fn codes(
        &self,
        b: &VecBuilder<'u, 'c>,
        spot: &Spot<'_, 'c>,
        group: &Group<'c>,
        step: Val<'c>,
        v: u32,
    ) -> PointerValue<'c> {
        let column = self.layout.step_bytes() / PANEL;
        let base = b.row(group.w, step, i64::from(self.layout.step_bytes()));
        b.at(base, self.col_bytes(b, spot, v, column))
    }

    /// The activations of row `r` of the tile at k = `k` of the group.
    fn act(&self, b: &VecBuilder<'u, 'c>, group: &Group<'c>, r: u32, k: Val<'c>) -> PointerValue<'c> {
        let row = b.offset(group.a, i64::from(r) * self.a_stride());
        b.row(row, k, self.a_bytes())
    }

    /// The exact sums of one group, as f32.
    fn int_group(
        &self,
        b: &VecBuilder<'u, 'c>,
        dot: Dot,
        spot: &Spot<'_, 'c>,
        group: &Group<'c>,
    ) -> Vec<Val<'c>> {
        let CpuTile { mr, nr, ku } = spot.tile;
        let step_k = self.layout.step_k();
        let seeds = self.seeds(b, spot, group);
        // The last step of a group may have fewer k than a step: its codes are zero there, and what it reads of the
        // activations is the next group or the row's padding.
        let steps = group.len.div_ceil(step_k);
        let body = |first: Val<'c>, count: u32, sums: &[Val<'c>]| {
            let at = |s: u32| b.add(first, b.i64(i64::from(s)));
            let mut sums = sums.to_vec();
            // Steps whose narrow products are summed before they are widened.
            let joined = if dot == Dot::Maddubs { count } else { 1 };
            for s in (0..count).step_by(joined as usize) {
                let weights = |v: u32| -> Vec<Quad<'c>> {
                    (s..s + joined)
                        .flat_map(|s| quads(b, dot, self.spec.w.code, self.codes(b, spot, group, at(s), v)))
                        .collect()
                };
                let act = |r: u32, quad: u32| {
                    let k = b.mul(at(s), b.i64(i64::from(step_k)));
                    activations(b, dot, self.act(b, group, r, b.add(k, b.i64(i64::from(quad * 4)))))
                };
                if joined > 1 && mr > 1 {
                    // One vector of weights at a time: few registers hold the operands of joined steps.
                    for v in 0..nr {
                        let weights = weights(v);
                        for r in 0..mr {
                            let sum = &mut sums[(r * nr + v) as usize];
                            *sum = accumulate(b, dot, *sum, &weights, |quad| act(r, quad));
                        }
                    }
                    continue;
                }
                let weights: Vec<_> = (0..nr).map(weights).collect();
                for r in 0..mr {
                    let acts: Vec<Act<'c>> = (0..joined * step_k / 4).map(|quad| act(r, quad)).collect();
                    for v in 0..nr {
                        let sum = &mut sums[(r * nr + v) as usize];
                        *sum = accumulate(b, dot, *sum, &weights[v as usize], |quad| acts[quad as usize]);
                    }
                }
            }
            sums
        };
        let ku = ku.clamp(1, steps);
        let whole = steps / ku * ku;
        let mut sums = b.for_const(0, i64::from(whole), i64::from(ku), &seeds, |s, sums| body(s, ku, sums));
        if whole < steps {
            sums = body(b.i64(i64::from(whole)), steps - whole, &sums);
        }
        sums.into_iter().map(|sum| b.sitofp(sum, Elem::F32)).collect()
    }

    /// What integer sums of a group start with: minus the zero point times the sum of the row's activations.
    fn seeds(&self, b: &VecBuilder<'u, 'c>, spot: &Spot<'_, 'c>, group: &Group<'c>) -> Vec<Val<'c>> {
        let CpuTile { mr, nr, .. } = spot.tile;
        let lanes = b.width();
        let Some((_, a_sums)) = self.a_int.filter(|_| self.spec.w.zero != Zero::Sym(0)) else {
            return vec![b.i32(lanes, 0); (mr * nr) as usize];
        };
        let zeros: Vec<_> = match self.spec.w.zero {
            Zero::Sym(_) => vec![],
            Zero::Asym => (0..nr).map(|v| load_zeros(b, self.zeros(b, spot, group, v))).collect(),
        };
        let mut seeds = vec![];
        for r in 0..mr {
            let row = b.add(spot.row, b.i64(i64::from(r)));
            let at = b.add(b.mul(row, b.i64(i64::from(self.spec.groups()))), group.index);
            let sum = b.load(b.row(a_sums, at, 4), Elem::I32, 1);
            let minus = b.sub(b.i32(1, 0), sum);
            match self.spec.w.zero {
                Zero::Sym(zero) => {
                    let seed = b.splat(b.mul(minus, b.i32(1, i32::from(zero))), lanes);
                    seeds.extend((0..nr).map(|_| seed));
                }
                Zero::Asym => {
                    let minus = b.splat(minus, lanes);
                    seeds.extend(zeros.iter().map(|&zero| b.mul(zero, minus)));
                }
            }
        }
        seeds
    }

    /// The sums of one group by products of bf16 pairs.
    fn pair_group(&self, b: &VecBuilder<'u, 'c>, spot: &Spot<'_, 'c>, group: &Group<'c>) -> Vec<Val<'c>> {
        let CpuTile { mr, nr, .. } = spot.tile;
        let unpack = Pairs::new(b, &self.spec.w);
        let zeros: Vec<_> = (0..nr).map(|v| unpack.group(b, self.zeros(b, spot, group, v))).collect();
        self.steps(b, spot, group, |step, valid, sums| {
            let weights: Vec<_> = (0..nr)
                .map(|v| unpack.load(b, self.codes(b, spot, group, step, v), zeros[v as usize]))
                .collect();
            let k = b.mul(step, b.i64(i64::from(self.layout.step_k())));
            for first in (0..valid).step_by(2) {
                let k = b.add(k, b.i64(i64::from(first)));
                for r in 0..mr {
                    let acts = pairs::activations(b, self.act(b, group, r, k), first + 1 < valid);
                    for v in 0..nr {
                        let sum = &mut sums[(r * nr + v) as usize];
                        *sum = pairs::accumulate(b, *sum, weights[v as usize][first as usize / 2], acts);
                    }
                }
            }
        })
    }

    /// The sums of one group in f32.
    fn float_group(&self, b: &VecBuilder<'u, 'c>, spot: &Spot<'_, 'c>, group: &Group<'c>) -> Vec<Val<'c>> {
        let CpuTile { mr, nr, .. } = spot.tile;
        let unpack = Unpack::new(b, &self.layout);
        let zeros: Vec<_> = (0..nr)
            .map(|v| match self.spec.w.zero {
                Zero::Sym(_) => None,
                Zero::Asym => unpack.group(b, self.zeros(b, spot, group, v)),
            })
            .collect();
        self.steps(b, spot, group, |step, valid, sums| {
            let first = b.mul(step, b.i64(i64::from(self.layout.step_k())));
            let act = |r, i| self.float_act(b, group, r, first, i, valid);
            let load = |v| unpack.load(b, self.codes(b, spot, group, step, v));
            let codes: Vec<_> = (0..nr).map(load).collect();
            for i in 0..valid {
                let weight = |v: u32| unpack.value(b, &codes[v as usize], i, zeros[v as usize]);
                // What there is less of is held in registers.
                if mr <= nr {
                    let acts: Vec<_> = (0..mr).map(|r| act(r, i)).collect();
                    for v in 0..nr {
                        let w = weight(v);
                        for r in 0..mr {
                            let sum = &mut sums[(r * nr + v) as usize];
                            *sum = b.fma(acts[r as usize], w, *sum);
                        }
                    }
                } else {
                    let weights: Vec<_> = (0..nr).map(weight).collect();
                    for r in 0..mr {
                        let a = act(r, i);
                        for v in 0..nr {
                            let sum = &mut sums[(r * nr + v) as usize];
                            *sum = b.fma(a, weights[v as usize], *sum);
                        }
                    }
                }
            }
        })
    }

    /// The activation of row `r` at k = `first` + `i` of the group as f32, in every lane; `valid` k follow `first`.
    fn float_act(
        &self,
        b: &VecBuilder<'u, 'c>,
        group: &Group<'c>,
        r: u32,
        first: Val<'c>,
        i: u32,
        valid: u32,
    ) -> Val<'c> {
        let at = |i: u32| self.act(b, group, r, b.add(first, b.i64(i64::from(i))));
        match self.spec.a {
            // Two come with one load.
            AFmt::Bf16 if i / 2 * 2 + 1 < valid => {
                let pair = b.splat(b.load_aligned(at(i / 2 * 2), Elem::I32, 1, 2), b.width());
                pair_of_bf16(b, pair)[i as usize % 2]
            }
            AFmt::Bf16 => b.bf16_to_f32(b.splat(b.load(at(i), Elem::I16, 1), b.width())),
            AFmt::F32 | AFmt::I8Token => b.splat(b.load(at(i), Elem::F32, 1), b.width()),
        }
    }

    /// Runs `body` for each step of a group, with the sums from zero on. `body` gets the step and how many k it has.
    fn steps(
        &self,
        b: &VecBuilder<'u, 'c>,
        spot: &Spot<'_, 'c>,
        group: &Group<'c>,
        body: impl Fn(Val<'c>, u32, &mut [Val<'c>]),
    ) -> Vec<Val<'c>> {
        let CpuTile { mr, nr, ku } = spot.tile;
        let step_k = self.layout.step_k();
        // `valid` k of each of `count` steps from `first` on.
        let body = |first: Val<'c>, count: u32, valid: u32, sums: &[Val<'c>]| {
            let mut sums = sums.to_vec();
            for s in 0..count {
                body(b.add(first, b.i64(i64::from(s))), valid, &mut sums);
            }
            sums
        };
        let steps = group.len / step_k;
        let ku = ku.clamp(1, steps.max(1));
        let whole = steps / ku * ku;
        let zero = vec![b.f32(b.width(), 0.0); (mr * nr) as usize];
        let mut sums =
            b.for_const(0, i64::from(whole), i64::from(ku), &zero, |s, sums| body(s, ku, step_k, sums));
        if whole < steps {
            sums = body(b.i64(i64::from(whole)), steps - whole, step_k, &sums);
        }
        let left = group.len % step_k;
        if left > 0 {
            sums = body(b.i64(i64::from(steps)), 1, left, &sums);
        }
        sums
    }

    /// The epilogue of a tile. Only the last panel of an n that is no multiple of 64 has columns that do not exist.
    fn store(&self, b: &VecBuilder<'u, 'c>, spot: &Spot<'_, 'c>, sums: &[Vec<Val<'c>>]) {
        let tail = self.spec.n % PANEL;
        let whole = || {
            self.store_vectors(b, spot, sums, |_| Valid::All);
            vec![]
        };
        if tail == 0 {
            whole();
            return;
        }
        let partial = || {
            self.store_tail(b, spot, sums, tail);
            vec![]
        };
        if self.spec.n < PANEL {
            partial();
            return;
        }
        let last = b.i64(i64::from(self.spec.n / PANEL));
        b.if_else(b.icmp(IntCmp::EQ, spot.panel, last), partial, whole);
    }

    /// The epilogue of a tile in the last panel, which has `tail` columns.
    fn store_tail(&self, b: &VecBuilder<'u, 'c>, spot: &Spot<'_, 'c>, sums: &[Vec<Val<'c>>], tail: u32) {
        let lanes = b.width();
        if spot.tile.nr * lanes == PANEL {
            // The strip is the panel: which lanes exist is known now.
            self.store_vectors(b, spot, sums, |v| Valid::First(tail.saturating_sub(v * lanes).min(lanes)));
            return;
        }
        self.store_vectors(b, spot, sums, |v| {
            let col = b.add(spot.col, b.i64(i64::from(v * lanes)));
            Valid::Mask(b.lane_mask(lanes, b.sub(b.i64(i64::from(tail)), col)))
        });
    }

    fn store_vectors(
        &self,
        b: &VecBuilder<'u, 'c>,
        spot: &Spot<'_, 'c>,
        sums: &[Vec<Val<'c>>],
        valid: impl Fn(u32) -> Valid<'c>,
    ) {
        let first = b.add(b.mul(spot.panel, b.i64(i64::from(PANEL))), spot.col);
        for v in 0..spot.tile.nr {
            let valid = valid(v);
            if matches!(valid, Valid::First(0)) {
                continue;
            }
            let col = b.add(first, b.i64(i64::from(v * b.width())));
            let at = |row| At { row, out_row: row, col, lanes: b.width(), valid };
            let known = self.frame.columns(&at(spot.row));
            for r in 0..spot.tile.mr {
                let row = b.add(spot.row, b.i64(i64::from(r)));
                let accs: Vec<_> = sums.iter().map(|s| s[(r * spot.tile.nr + v) as usize]).collect();
                self.frame.emit(&at(row), &accs, &known);
            }
        }
    }
}
