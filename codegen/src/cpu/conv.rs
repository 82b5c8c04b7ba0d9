//! Emits products of windows with weights.

use std::cell::RefCell;
use std::collections::BTreeMap;

use inkwell::values::PointerValue;
use quantc_ir::diag::Result;
use quantc_ir::target::Dot;

use super::nest::Place;
use crate::conv::{ConvSpec, Factors};
use crate::cpu::llvm::{Elem, IntCmp, Unit, Val, VecBuilder};
use crate::nest::{Num, nums};

/// Emits the kernel of `spec` as `symbol`.
pub fn emit(unit: &Unit<'_>, spec: &ConvSpec, symbol: &str) -> Result<()> {
    unit.kernel(symbol, |b| {
        items(b, spec);
        Ok(())
    })
}

/// Walks the items of a call.
fn items<'c>(b: &VecBuilder<'_, 'c>, spec: &ConvSpec) {
    let tile = spec.tile(b.target());
    let lanes = b.width();
    let panel = tile.vectors * u64::from(lanes);
    let x_size = match spec.factors {
        Factors::F32 | Factors::Codes { .. } => 4,
        Factors::Bytes | Factors::Single => 1,
    };
    let panel_bytes = spec.panel_bytes(panel) as i64;
    let nums = nums(&spec.nodes);
    let (x, w) = (b.arg(0), b.arg(1));
    let inputs: Vec<PointerValue<'c>> = (0..u32::from(spec.inputs)).map(|i| b.arg(2 + i)).collect();
    let out = b.arg(2 + u32::from(spec.inputs));
    let Some((tiled, rows_axes)) = spec.outer.split_last() else { return };
    let rows: u64 = rows_axes.iter().map(|a| a.n).product();
    let tiles = tiled.n.div_ceil(tile.windows);
    b.for_items(|item| {
        let part = b.urem(item, b.i64(tiles as i64));
        let rest = b.udiv(item, b.i64(tiles as i64));
        let mut row = b.urem(rest, b.i64(rows as i64));
        let panel_index = b.udiv(rest, b.i64(rows as i64));
        // The last tile begins early enough to be whole.
        let first = b.mul(part, b.i64(tile.windows as i64));
        let first = b.smin(first, b.i64((tiled.n - tile.windows) as i64));
        let mut at = vec![b.i64(0); spec.outer.len()];
        for (a, axis) in rows_axes.iter().enumerate().rev() {
            at[a] = b.urem(row, b.i64(axis.n as i64));
            row = b.udiv(row, b.i64(axis.n as i64));
        }
        at[rows_axes.len()] = first;
        let (mut x_at, mut w_at) = (b.i64(spec.base * x_size), b.i64(0));
        for (&i, axis) in at.iter().zip(&spec.outer) {
            x_at = b.add(x_at, b.mul(i, b.i64(axis.x * x_size)));
            if axis.w != 0 {
                w_at = b.add(w_at, b.mul(i, b.i64(axis.w * 4)));
            }
        }
        let w = b.row(b.at(w, w_at), panel_index, panel_bytes);
        if spec.factors == Factors::Single {
            x_at = b.add(x_at, b.mul(panel_index, b.i64(panel as i64)));
        }
        let step = tiled.x * x_size;
        let product = Product { b, spec, windows: tile.windows, vectors: tile.vectors, step, x_size };
        let sums = product.sums(b.at(x, x_at), w);
        let finish = Finish { b, spec, nums: &nums, inputs: &inputs, out, panel };
        let column = b.mul(panel_index, b.i64(panel as i64));
        for (i, row) in sums.chunks(tile.vectors as usize).enumerate() {
            let mut index = vec![b.i64(0); usize::from(spec.rank)];
            for (a, axis) in spec.outer.iter().enumerate() {
                let Some(y) = axis.y else { continue };
                let tiled = a == rows_axes.len();
                index[usize::from(y)] = if tiled { b.add(at[a], b.i64(i as i64)) } else { at[a] };
            }
            for (v, &total) in row.iter().enumerate() {
                finish.vector(&index, b.add(column, b.i64(v as i64 * i64::from(lanes))), total);
            }
        }
    });
}

/// What becomes of sums.
struct Finish<'p, 'u, 'c> {
    b: &'p VecBuilder<'u, 'c>,
    spec: &'p ConvSpec,
    nums: &'p [Num],
    inputs: &'p [PointerValue<'c>],
    out: PointerValue<'c>,
    panel: u64,
}

impl<'c> Finish<'_, '_, 'c> {
    /// Stores numbers of outputs from `begin` on, where `index` says besides.
    fn store(&self, index: &[Val<'c>], lanes: u32, begin: Val<'c>, total: Val<'c>) {
        let mut index = index.to_vec();
        index[usize::from(self.spec.axis)] = begin;
        let place = Place {
            b: self.b,
            nodes: &self.spec.nodes,
            nums: self.nums,
            inputs: self.inputs,
            index,
            axis: usize::from(self.spec.axis),
            lanes,
            folded: Some(total),
            known: RefCell::default(),
        };
        place.store(self.out, self.spec.out, &self.spec.to, self.spec.value);
    }

    /// Stores a vector, of which the last of a panel may reach beyond the last output.
    fn vector(&self, index: &[Val<'c>], begin: Val<'c>, total: Val<'c>) {
        let (b, lanes) = (self.b, self.b.width());
        if self.spec.outs.is_multiple_of(self.panel) {
            self.store(index, lanes, begin, total);
            return;
        }
        let outs = b.i64(self.spec.outs as i64);
        let whole = b.icmp(IntCmp::SLE, b.add(begin, b.i64(lanes.into())), outs);
        let all = || {
            self.store(index, lanes, begin, total);
            vec![]
        };
        let some = || {
            let left = (self.spec.outs % u64::from(lanes)) as u32;
            b.when(b.icmp(IntCmp::SLT, begin, outs), || {
                for lane in 0..left {
                    self.store(index, 1, b.add(begin, b.i64(lane.into())), b.extract(total, lane));
                }
            });
            vec![]
        };
        b.if_else(whole, all, some);
    }
}

struct Product<'p, 'u, 'c> {
    b: &'p VecBuilder<'u, 'c>,
    spec: &'p ConvSpec,
    windows: u64,
    vectors: u64,
    /// Bytes from one window to the next.
    step: i64,
    x_size: i64,
}

impl<'c> Product<'_, '_, 'c> {
    /// The sums of all windows with all vectors, window by window.
    fn sums(&self, x: PointerValue<'c>, w: PointerValue<'c>) -> Vec<Val<'c>> {
        let b = self.b;
        let elem = match self.spec.factors {
            Factors::F32 | Factors::Codes { .. } => Elem::F32,
            Factors::Bytes | Factors::Single => Elem::I32,
        };
        let zero = b.ty(elem, b.width()).const_zero();
        let start = vec![zero; (self.windows * self.vectors) as usize];
        match (self.spec.factors, self.spec.run) {
            (Factors::Single, _) => self.single(x, w, start),
            (Factors::Codes { bits, block }, _) => self.codes(x, w, bits, block.into(), &start),
            (_, Some(run)) => self.runs(x, w, run as i64, &start),
            _ => self.window(0, b.i64(0), b.i64(0), x, w, start),
        }
    }

    /// The sums of windows that see one channel for each lane.
    fn single(&self, x: PointerValue<'c>, w: PointerValue<'c>, mut sums: Vec<Val<'c>>) -> Vec<Val<'c>> {
        let b = self.b;
        let vector = i64::from(b.width()) * 4;
        let (rows, last) = self.spec.rows();
        for (group, rows) in rows.chunks(4).enumerate() {
            let from = group as i64 * last.n as i64;
            let weights: Vec<Signed<'c>> =
                (0..last.n as i64).map(|k| Signed::load(b, b.offset(w, (from + k) * vector))).collect();
            let mut known: BTreeMap<i64, Unsigned<'c>> = BTreeMap::new();
            for (i, sum) in sums.iter_mut().enumerate() {
                for (k, weight) in weights.iter().enumerate() {
                    let at = i as i64 * self.step + k as i64 * last.x;
                    let column = known.entry(at).or_insert_with(|| Unsigned::of(b, self.column(x, at, rows)));
                    *sum = column.times(b, weight, *sum);
                }
            }
        }
        sums
    }

    /// The bytes of up to four rows of the window, those of each channel in a lane.
    fn column(&self, x: PointerValue<'c>, at: i64, rows: &[i64]) -> Val<'c> {
        let (b, lanes) = (self.b, self.b.width());
        let mut loaded: Vec<Val<'c>> =
            rows.iter().map(|row| b.load(b.offset(x, at + row), Elem::I8, lanes)).collect();
        // The weights of rows that are not there are 0.
        loaded.resize(4, loaded[0]);
        let both: Vec<u32> = (0..2 * lanes).collect();
        let (front, back) = (b.shuffle(loaded[0], loaded[1], &both), b.shuffle(loaded[2], loaded[3], &both));
        let mixed: Vec<u32> = (0..lanes).flat_map(|lane| (0..4).map(move |r| r * lanes + lane)).collect();
        b.bitcast(b.shuffle(front, back, &mixed), Elem::I32, lanes)
    }

    /// Sums of f32, of so many products at a time.
    fn runs(&self, x: PointerValue<'c>, w: PointerValue<'c>, run: i64, start: &[Val<'c>]) -> Vec<Val<'c>> {
        let b = self.b;
        let all = self.spec.steps() as i64;
        let whole = all / run;
        let totals = b.for_const(0, whole, 1, start, |i, totals| {
            let part = self.run(x, w, b.mul(i, b.i64(run)), run, start);
            totals.iter().zip(&part).map(|(&t, &p)| b.fadd(t, p)).collect()
        });
        if whole * run == all {
            return totals;
        }
        let part = self.run(x, w, b.i64(whole * run), all - whole * run, start);
        totals.iter().zip(&part).map(|(&t, &p)| b.fadd(t, p)).collect()
    }

    /// The sums of `count` products from `begin` on, channel by channel.
    fn run(
        &self,
        x: PointerValue<'c>,
        w: PointerValue<'c>,
        begin: Val<'c>,
        count: i64,
        start: &[Val<'c>],
    ) -> Vec<Val<'c>> {
        let (b, lanes) = (self.b, self.b.width());
        let step_bytes = self.vectors as i64 * i64::from(lanes) * 4;
        b.for_const(0, count, 1, start, |i, sums| {
            let step = b.add(begin, i);
            let mut rest = step;
            let mut at = b.i64(0);
            for axis in self.spec.window.iter().rev().filter(|a| a.n != 1) {
                let n = b.i64(axis.n as i64);
                at = b.add(at, b.mul(b.urem(rest, n), b.i64(axis.x * 4)));
                rest = b.udiv(rest, n);
            }
            let x = b.at(b.row(x, rest, 4), at);
            self.floats(x, b.row(w, step, step_bytes), sums)
        })
    }

    /// Sums of f32 with weights that are made of codes as they are met, block by block.
    fn codes(
        &self,
        x: PointerValue<'c>,
        w: PointerValue<'c>,
        bits: u8,
        block: i64,
        start: &[Val<'c>],
    ) -> Vec<Val<'c>> {
        let (b, lanes) = (self.b, self.b.width());
        let wide = i64::from(lanes);
        let panel = self.vectors as i64 * wide;
        // Codes that a byte holds, one after another.
        let each = i64::from(8 / bits);
        let code_bytes = block / each * panel;
        let mask = b.int(Elem::I32, lanes, (1 << bits) - 1);
        let vectors = |from: PointerValue<'c>| -> Vec<Val<'c>> {
            (0..self.vectors as i64).map(|v| b.load(b.offset(from, v * wide * 4), Elem::F32, lanes)).collect()
        };
        b.for_const(0, self.spec.channels as i64 / block, 1, start, |i, sums| {
            let from = b.row(w, i, 8 * panel + code_bytes);
            let (scales, zeros) = (vectors(from), vectors(b.offset(from, 4 * panel)));
            let (codes, x) = (b.offset(from, 8 * panel), b.row(x, i, block * 4));
            b.for_const(0, block / each, 1, sums, |k, sums| {
                let (codes, x) = (b.row(codes, k, panel), b.row(x, k, each * 4));
                let bytes: Vec<Val<'c>> = (0..self.vectors as i64)
                    .map(|v| b.zext(b.load(b.offset(codes, v * wide), Elem::I8, lanes), Elem::I32))
                    .collect();
                let mut sums = sums.to_vec();
                for part in 0..each {
                    let by = b.int(Elem::I32, lanes, part * i64::from(bits));
                    let number = |(v, &byte): (usize, &Val<'c>)| {
                        let code = b.and(b.lshr(byte, by), mask);
                        b.fmul(b.fsub(b.sitofp(code, Elem::F32), zeros[v]), scales[v])
                    };
                    let weights: Vec<Val<'c>> = bytes.iter().enumerate().map(number).collect();
                    sums = self.multiplied(b.offset(x, part * 4), &weights, &sums);
                }
                sums
            })
        })
    }

    /// The sums after one more product each: of a number for each window with a vector of weights for each vector.
    fn floats(&self, x: PointerValue<'c>, from: PointerValue<'c>, sums: &[Val<'c>]) -> Vec<Val<'c>> {
        let (b, lanes) = (self.b, self.b.width());
        let vector = i64::from(lanes) * 4;
        let weights: Vec<Val<'c>> =
            (0..self.vectors as i64).map(|v| b.load(b.offset(from, v * vector), Elem::F32, lanes)).collect();
        self.multiplied(x, &weights, sums)
    }

    fn multiplied(&self, x: PointerValue<'c>, weights: &[Val<'c>], sums: &[Val<'c>]) -> Vec<Val<'c>> {
        let b = self.b;
        let mut next = Vec::with_capacity(sums.len());
        for (i, sums) in sums.chunks(weights.len()).enumerate() {
            let a = b.load(b.offset(x, i as i64 * self.step), Elem::F32, 1);
            let a = b.splat(a, b.width());
            next.extend(sums.iter().zip(weights).map(|(&s, &w)| b.fma(a, w, s)));
        }
        next
    }

    /// Adds what the axes of the window from `axis` on give; `x_at` and `step` count bytes of the array and elements of the
    /// window.
    fn window(
        &self,
        axis: usize,
        x_at: Val<'c>,
        step: Val<'c>,
        x: PointerValue<'c>,
        w: PointerValue<'c>,
        sums: Vec<Val<'c>>,
    ) -> Vec<Val<'c>> {
        let b = self.b;
        let Some(a) = self.spec.window.get(axis) else { return self.channels(x_at, step, x, w, sums) };
        b.for_const(0, a.n as i64, 1, &sums, |i, sums| {
            let x_at = b.add(x_at, b.mul(i, b.i64(a.x * self.x_size)));
            let step = b.add(b.mul(step, b.i64(a.n as i64)), i);
            self.window(axis + 1, x_at, step, x, w, sums.to_vec())
        })
    }

    fn channels(
        &self,
        x_at: Val<'c>,
        step: Val<'c>,
        x: PointerValue<'c>,
        w: PointerValue<'c>,
        sums: Vec<Val<'c>>,
    ) -> Vec<Val<'c>> {
        let (b, lanes) = (self.b, self.b.width());
        let together = self.spec.factors.together() as i64;
        let steps = self.spec.channels as i64 / together;
        let vector = i64::from(lanes) * 4;
        let step_bytes = self.vectors as i64 * vector;
        let x = b.at(x, x_at);
        let w = b.at(w, b.mul(step, b.i64(steps * step_bytes)));
        b.for_const(0, steps, 1, &sums, |k, sums| {
            let from = b.row(w, k, step_bytes);
            let x = b.row(x, k, 4);
            if self.spec.factors == Factors::F32 {
                return self.floats(x, from, sums);
            }
            let weights: Vec<Signed<'c>> =
                (0..self.vectors as i64).map(|v| Signed::load(b, b.offset(from, v * vector))).collect();
            let mut next = Vec::with_capacity(sums.len());
            for (i, sums) in sums.chunks(weights.len()).enumerate() {
                let a = b.load_aligned(b.offset(x, i as i64 * self.step), Elem::I32, 1, 1);
                let a = Unsigned::of(b, b.splat(a, lanes));
                next.extend(sums.iter().zip(&weights).map(|(&s, w)| a.times(b, w, s)));
            }
            next
        })
    }
}

/// Four signed bytes a lane.
enum Signed<'c> {
    Bytes(Val<'c>),
    /// The even and the odd ones, as pairs of i16.
    Pairs(Val<'c>, Val<'c>),
}

/// Four unsigned bytes a lane.
enum Unsigned<'c> {
    Bytes(Val<'c>),
    Pairs(Val<'c>, Val<'c>),
}

fn vnni(b: &VecBuilder<'_, '_>) -> bool {
    b.target().cpu.dots.contains(&Dot::Vnni)
}

impl<'c> Signed<'c> {
    fn load(b: &VecBuilder<'_, 'c>, ptr: PointerValue<'c>) -> Signed<'c> {
        let v = b.load(ptr, Elem::I32, b.width());
        if vnni(b) {
            return Signed::Bytes(v);
        }
        let halves = b.width() * 2;
        let v = b.bitcast(v, Elem::I16, halves);
        let eight = b.int(Elem::I16, halves, 8);
        Signed::Pairs(b.ashr(b.shl(v, eight), eight), b.ashr(v, eight))
    }
}

impl<'c> Unsigned<'c> {
    fn of(b: &VecBuilder<'_, 'c>, v: Val<'c>) -> Unsigned<'c> {
        if vnni(b) {
            return Unsigned::Bytes(v);
        }
        let halves = b.width() * 2;
        let v = b.bitcast(v, Elem::I16, halves);
        let low = b.and(v, b.int(Elem::I16, halves, 0xff));
        Unsigned::Pairs(low, b.lshr(v, b.int(Elem::I16, halves, 8)))
    }

    fn times(&self, b: &VecBuilder<'_, 'c>, w: &Signed<'c>, sum: Val<'c>) -> Val<'c> {
        match (self, w) {
            (Unsigned::Bytes(x), Signed::Bytes(w)) => b.vpdpbusd(sum, *x, *w),
            (Unsigned::Pairs(xe, xo), Signed::Pairs(we, wo)) => {
                b.add(sum, b.add(b.pmaddwd(*xe, *we), b.pmaddwd(*xo, *wo)))
            }
            _ => unreachable!("both are prepared for the same target"),
        }
    }
}
