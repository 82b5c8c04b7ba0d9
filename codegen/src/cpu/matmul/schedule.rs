//! Which tiles a matmul kernel is made of, and why.

use std::cmp::Reverse;
use std::fmt;

use quantc_ir::target::{CpuDesc, Dot};
use serde::{Deserialize, Serialize};

use crate::layout::{Layout, PANEL};
use crate::spec::{AFmt, Code, MatmulSpec, WFmt, Zero};

/// A block of results held in registers: `mr` rows by `nr` vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CpuTile {
    /// Rows.
    pub mr: u32,
    /// Vectors of columns.
    pub nr: u32,
    /// Steps along k in one turn of the inner loop.
    pub ku: u32,
}

/// The inner product of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Inner {
    /// Integers, by this instruction.
    Int(Dot),
    /// Pairs of bf16, by `vdpbf16ps`.
    Bf16,
    /// f32 multiply-adds on weights converted in registers.
    Float,
}

/// What a tile is expected to take on a core, in cycles per 1000 multiply-adds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Multiplier ports: products, sums at group ends, conversions.
    pub multiply: f64,
    /// All vector instructions.
    pub issue: f64,
    /// Weights through the second-level cache.
    pub cache: f64,
    /// Weights from memory, which all rows of the call share.
    pub memory: f64,
    /// The part of the call's rows that are computed while memory is waited for: those of the first tile, or none when
    /// the weights do not come ahead of their use. All others find the weights in a cache.
    pub first: f64,
}

impl Cost {
    /// All of it: what ports and caches take, and what memory takes beyond the first tile's part of that.
    pub fn total(&self) -> f64 {
        let ports = self.multiply.max(self.issue).max(self.cache);
        (ports * self.first).max(self.memory) + ports * (1.0 - self.first)
    }
}

/// The tiles of one kernel: the first for as many rows as it fits, each next one for what is left.
#[derive(Clone, Debug, PartialEq)]
pub struct MatmulSchedule {
    /// How products are formed.
    pub inner: Inner,
    /// Tiles of falling height, down to one row.
    pub tiles: Vec<CpuTile>,
    /// What the first tile is expected to take.
    pub cost: Cost,
    /// How many tiles were compared for it.
    pub compared: usize,
}

impl fmt::Display for MatmulSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = match self.inner {
            Inner::Int(Dot::Vnni) => "vpdpbusd",
            Inner::Int(Dot::Maddubs) => "vpmaddubsw",
            Inner::Int(Dot::Widening) => "pmaddwd",
            Inner::Bf16 => "vdpbf16ps",
            Inner::Float => "f32",
        };
        write!(f, "{inner}, rows x vectors")?;
        for tile in &self.tiles {
            write!(f, " {}x{}", tile.mr, tile.nr)?;
        }
        let Cost { multiply, issue, cache, memory, .. } = self.cost;
        write!(f, "; cycles per 1000 products: multiply {multiply:.1}, issue {issue:.1}, ")?;
        write!(f, "cache {cache:.1}, memory {memory:.1}; {} tiles compared", self.compared)
    }
}

/// The inner product for `spec`: the target's best dot that is exact for these weights.
pub fn inner(spec: &MatmulSpec, cpu: &CpuDesc) -> Inner {
    match spec.a {
        AFmt::Bf16 if cpu.bf16_mac_per_cycle > 0.0 && exact_in_bf16(&spec.w) => Inner::Bf16,
        AFmt::F32 | AFmt::Bf16 => Inner::Float,
        AFmt::I8Token => {
            // Two products of a full-range byte do not fit in the sixteen bits of `vpmaddubsw`.
            let exact = |dot: &&Dot| **dot != Dot::Maddubs || spec.w.code == Code::U4;
            Inner::Int(cpu.dots.iter().find(exact).copied().unwrap_or(Dot::Widening))
        }
    }
}

/// Whether codes become bf16 without rounding, by tables in registers. The difference of a byte and a zero point has nine
/// bits, and neither f16 nor f32 fits.
pub(super) fn exact_in_bf16(w: &WFmt) -> bool {
    match w.code {
        Code::U4 | Code::Lut4 | Code::E4m3 | Code::E5m2 | Code::Bf16 => true,
        Code::U8 => w.zero == Zero::Sym(128),
        Code::F32 | Code::F16 => false,
    }
}

/// Vectors of 32-bit lanes in a panel.
pub fn panel_vectors(cpu: &CpuDesc) -> u32 {
    PANEL / (cpu.vector_bits / 32)
}

/// Every tile worth comparing: it fits in the registers, and `spec` has rows for it.
pub fn candidates(spec: &MatmulSpec, cpu: &CpuDesc) -> Vec<CpuTile> {
    let inner = inner(spec, cpu);
    let mut tiles = vec![];
    for mr in [1, 2, 3, 4, 6, 8, 12] {
        if mr > spec.m.max {
            continue;
        }
        for nr in [1, 2, 4, 8, 16] {
            // Beside eight sums, those of joined steps and their operands are too many for rows in all columns.
            if inner == Inner::Int(Dot::Maddubs) && mr > 6 {
                continue;
            }
            if panel_vectors(cpu).is_multiple_of(nr) && registers(spec, inner, mr, nr) <= cpu.vector_regs {
                tiles.push(CpuTile { mr, nr, ku: unroll(spec, inner, mr) });
            }
        }
    }
    tiles
}

/// Registers that the inner loop keeps busy. Sums of finished groups may wait in memory.
fn registers(spec: &MatmulSpec, inner: Inner, mr: u32, nr: u32) -> u32 {
    let sums = mr * nr;
    match inner {
        // A four-bit step gives two operands a vector; the mask and one broadcast come on top.
        Inner::Int(Dot::Vnni) if spec.w.code == Code::U4 => sums + 2 * nr + 2,
        Inner::Int(Dot::Vnni) => sums + nr + 1,
        // Four operands of one vector, the mask, ones, a sum and a broadcast.
        Inner::Int(Dot::Maddubs) => sums + 7,
        // Even and odd operands, the mask, even and odd activations, a product.
        Inner::Int(Dot::Widening) => sums + 6,
        // An operand, codes and tables; a broadcast unless the product reads memory.
        Inner::Bf16 => {
            let codes = match spec.w.code.bits() {
                16 => 0,
                4 => nr + 1,
                _ => nr + 6,
            };
            sums + nr + codes + u32::from(nr > 1)
        }
        // The operands or the broadcasts, whichever are fewer, one of the others and the next one; codes of the vectors with
        // a table or a constant. A single row's codes are read again for each k. Broadcasts of bf16 hold two k, and wait for the second: for one
        // vector, those of all rows.
        Inner::Float => {
            let codes = match spec.w.code.bits() {
                16.. => 0,
                _ if mr == 1 => 2,
                _ => nr + 1,
            };
            let waiting = match spec.a {
                AFmt::Bf16 if nr == 1 => mr,
                AFmt::Bf16 => 2,
                AFmt::F32 | AFmt::I8Token => 1,
            };
            sums + mr.min(nr) + 1 + waiting + codes
        }
    }
}

/// Steps in one turn of the inner loop: enough work to hide the loop, little enough code.
fn unroll(spec: &MatmulSpec, inner: Inner, mr: u32) -> u32 {
    match inner {
        // As many steps of `vpmaddubsw` share one widening as sums of sixteen bits have room for; one row, whose
        // activations stay in registers, has registers for two.
        Inner::Int(Dot::Maddubs) => {
            if mr == 1 {
                2
            } else {
                4
            }
        }
        // Loops of two or three turns run at two thirds of the speed: short groups have none.
        Inner::Int(Dot::Vnni) => match spec.w.group.div_ceil(Layout::of(spec).step_k()) {
            steps @ 1..=8 => steps,
            _ => 4,
        },
        Inner::Int(Dot::Widening) => 1,
        Inner::Bf16 | Inner::Float if spec.w.code.bits() >= 16 => 4,
        Inner::Bf16 | Inner::Float => 1,
    }
}

/// What `tile` takes for `spec` with as many rows as the class is meant for.
///
/// A port model: per vector of 32-bit lanes and four k, `products` instructions use the multipliers, and so do, in part,
/// those that prepare an operand, which all rows of the tile share. All instructions together share the issue slots.
/// Figures are cycles of one full-width multiplier, fitted to timed tiles of every kind on a Zen 4 core: tiles worth
/// choosing come out within a few hundredths of what they take, those with few sums too well.
pub fn cost(spec: &MatmulSpec, tile: &CpuTile, cpu: &CpuDesc) -> Cost {
    let inner = inner(spec, cpu);
    let lanes = f64::from(cpu.vector_bits / 32);
    let (mr, nr) = (f64::from(tile.mr), f64::from(tile.nr));
    let group = f64::from(spec.w.group);
    let (products, shared) = match inner {
        // Beside each product a load: of activations, of which a narrow tile needs one for every product or two.
        Inner::Int(Dot::Vnni) => (1.0 + [0.055, 0.012, 0.0][(tile.nr as usize - 1).min(2)], 0.5),
        Inner::Int(Dot::Maddubs) => (2.0, 0.5),
        Inner::Int(Dot::Widening) => (4.0, 3.0),
        Inner::Bf16 => (2.0, 1.0),
        // Rows of bf16 are widened first.
        Inner::Float => (4.0, if spec.a == AFmt::Bf16 { 8.0 } else { 4.0 }),
    };
    let (prepare, instructions) = prepare(spec, inner, tile);
    // The wide multiplier of the best dot is also the one of f32.
    let rate = (f64::from(cpu.f32_mac_per_cycle) / lanes).max(1.0);
    // At the end of a group: the scaling of a sum, beside which its conversion is hidden, and the product of its zero
    // point. Where sums of groups and sums of sums do not fit side by side, the latter go to memory and back.
    let zero = if spec.w.zero == Zero::Asym && matches!(inner, Inner::Int(_)) { 0.7 } else { 0.0 };
    let waits = registers(spec, inner, tile.mr, tile.nr) + tile.mr * tile.nr > cpu.vector_regs;
    let extra = 1.0 + zero + if waits { 0.5 } else { 0.0 };
    let quads = (group / 4.0).max(1.0);
    let macs = mr * nr * lanes * 4.0 * quads;
    let mut multiply = mr * nr * (products * quads + extra) + nr * prepare * quads;
    // A multiplier is busy with eight sums of bf16 at a time, and with four others.
    let chains = if inner == Inner::Bf16 { 8.0 } else { 4.0 };
    multiply *= (chains * rate / (mr * nr)).max(1.0) / rate;
    // Rows of f32 lie a power of two apart as often as not: more of them than a cache set has places push each other out.
    // Rows of bytes are kept off such distances, which helps most of the time.
    if tile.mr > 8 && spec.a != AFmt::Bf16 {
        multiply *= if spec.a == AFmt::F32 { 1.25 } else { 1.04 };
    }
    let issue =
        (mr * nr * (products * quads + extra) + nr * instructions * quads + mr * shared * quads) / 3.0;
    let bytes = nr * lanes * (quads * 4.0 * f64::from(spec.w.code.bits()) / 8.0 + 4.0);
    // A strip of a panel reads a part of every step: prefetchers lose track, so that memory comes much slower, and only
    // when it is asked for.
    let strays = tile.nr < panel_vectors(cpu);
    let per = 1000.0 / macs;
    Cost {
        multiply: multiply * per,
        issue: issue * per,
        cache: bytes / 28.0 * per,
        memory: memory(spec, cpu) * if strays { STRAY } else { 1.0 },
        first: if strays { 0.0 } else { (mr / rows(spec)).min(1.0) },
    }
}

/// What it takes to make four operands of one vector: cycles of a multiplier, and instructions.
fn prepare(spec: &MatmulSpec, inner: Inner, tile: &CpuTile) -> (f64, f64) {
    let four_bit = spec.w.code.bits() == 4;
    let (cycles, instructions) = match (inner, spec.w.code) {
        (Inner::Int(Dot::Vnni), Code::U4) => (0.16, 1.5),
        (Inner::Int(Dot::Vnni), _) => (0.1, 0.5),
        (Inner::Int(Dot::Maddubs), _) => (0.3, 1.5),
        (Inner::Int(Dot::Widening), _) => (0.5, if four_bit { 3.0 } else { 2.0 }),
        (Inner::Bf16, Code::U4 | Code::Lut4) => (1.0, 4.0),
        (Inner::Bf16, Code::U8) => (4.0, 4.0),
        (Inner::Bf16, Code::E4m3 | Code::E5m2) => (2.8, 4.0),
        (Inner::Bf16, _) => (0.4, 0.0),
        (Inner::Float, Code::U4 | Code::Lut4) => (1.9, 12.0),
        (Inner::Float, Code::U8) => (3.4, 12.0),
        (Inner::Float, Code::E4m3 | Code::E5m2) => (5.2, 12.0),
        (Inner::Float, Code::F16 | Code::Bf16) => (1.7, 6.0),
        (Inner::Float, Code::F32) => (0.7, 6.0),
    };
    // One vector of columns takes its activations straight from memory; two have a broadcast each for few products.
    let spread = match (inner, tile.nr) {
        (Inner::Int(_), _) => 1.0,
        (_, 1) => 0.7,
        (_, 2) => 2.2,
        _ => 1.0,
    };
    (cycles * spread, instructions)
}

/// How much slower memory comes when only a strip of each panel is read at a time.
const STRAY: f64 = 2.7;

/// Rows that a call of `spec` is taken to have.
fn rows(spec: &MatmulSpec) -> f64 {
    f64::from(spec.m.max.min(256))
}

/// Cycles per 1000 multiply-adds to read the weights from memory, once for all rows.
fn memory(spec: &MatmulSpec, cpu: &CpuDesc) -> f64 {
    let bytes = Layout::of(spec).bytes() as f64 / (f64::from(spec.n) * f64::from(spec.k));
    bytes / f64::from(cpu.stream_bytes_per_cycle) * 1000.0 / rows(spec)
}

/// Cycles per 1000 multiply-adds on a core that does nothing but the products of `spec`, at the target's best rate.
pub fn ideal(spec: &MatmulSpec, cpu: &CpuDesc) -> f64 {
    let rate = match inner(spec, cpu) {
        Inner::Int(_) => cpu.int8_mac_per_cycle,
        Inner::Bf16 => cpu.bf16_mac_per_cycle,
        Inner::Float => cpu.f32_mac_per_cycle,
    };
    1000.0 / f64::from(rate).max(1.0)
}

/// The part of its limit that a tile of this cost is expected to reach: products at the target's best rate, or reading
/// the weights, whatever takes longer.
pub fn expected(spec: &MatmulSpec, cost: &Cost, cpu: &CpuDesc) -> f64 {
    ideal(spec, cpu).max(memory(spec, cpu)) / cost.total()
}

/// Whether a call of `spec` has so few rows that they are one tile: then the weights come by once.
fn few(spec: &MatmulSpec) -> bool {
    spec.m.max <= 4
}

/// The tiles that may come first in a kernel for `spec`, the cheapest first.
pub fn ranked(spec: &MatmulSpec, cpu: &CpuDesc) -> Vec<(Cost, CpuTile)> {
    let height = few(spec).then_some(spec.m.max);
    let first = by_cost(spec, cpu, &candidates(spec, cpu), height);
    if first.is_empty() { vec![(cost(spec, &SMALLEST, cpu), SMALLEST)] } else { first }
}

/// Those of `tiles` that have `height` rows, the cheapest first.
fn by_cost(spec: &MatmulSpec, cpu: &CpuDesc, tiles: &[CpuTile], height: Option<u32>) -> Vec<(Cost, CpuTile)> {
    let fitting = tiles.iter().filter(|t| height.is_none_or(|h| t.mr == h));
    let mut all: Vec<(Cost, CpuTile)> = fitting.map(|t| (cost(spec, t, cpu), *t)).collect();
    all.sort_by_key(|(c, t)| {
        // Differences below a hundredth say nothing; then more results per load win.
        ((c.total().ln() * 100.0).round() as i64, Reverse(t.mr * t.nr), t.mr)
    });
    all
}

/// The tiles for `spec`: the cheapest first one, then lower ones for the rows left over.
pub fn schedule(spec: &MatmulSpec, cpu: &CpuDesc) -> MatmulSchedule {
    schedule_from(spec, cpu, ranked(spec, cpu)[0].1)
}

/// The tiles for `spec` with `first` as the first one.
pub fn schedule_from(spec: &MatmulSpec, cpu: &CpuDesc, first: CpuTile) -> MatmulSchedule {
    let all = candidates(spec, cpu);
    let mut tiles = vec![first];
    let mut height = first.mr;
    while height > 1 {
        // Few rows get a tile for each count, what is left of many rows gets halves.
        height = if few(spec) { height - 1 } else { (height / 2).next_power_of_two() };
        tiles.push(by_cost(spec, cpu, &all, Some(height)).first().map_or(SMALLEST, |(_, t)| *t));
    }
    MatmulSchedule { inner: inner(spec, cpu), tiles, cost: cost(spec, &first, cpu), compared: all.len() }
}

/// The tile that fits everywhere.
const SMALLEST: CpuTile = CpuTile { mr: 1, nr: 1, ku: 1 };

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eexpr::{EExpr, MemTy};
    use crate::spec::{MRange, Rows, ScaleTy, WFmt};
    use crate::targets::TARGETS;

    fn specs() -> Vec<MatmulSpec> {
        let mut all = vec![];
        for (code, zero, a) in [
            (Code::U4, Zero::Sym(8), AFmt::I8Token),
            (Code::U4, Zero::Asym, AFmt::I8Token),
            (Code::U8, Zero::Sym(128), AFmt::I8Token),
            (Code::U4, Zero::Sym(8), AFmt::F32),
            (Code::Lut4, Zero::Sym(0), AFmt::F32),
            (Code::E4m3, Zero::Sym(0), AFmt::F32),
            (Code::F32, Zero::Sym(0), AFmt::F32),
            (Code::U4, Zero::Sym(8), AFmt::Bf16),
            (Code::U8, Zero::Sym(128), AFmt::Bf16),
            (Code::U8, Zero::Asym, AFmt::Bf16),
            (Code::E5m2, Zero::Sym(0), AFmt::Bf16),
            (Code::Bf16, Zero::Sym(0), AFmt::Bf16),
        ] {
            for max in [1, 2, 3, 4, 16, 512] {
                for group in [32, 128] {
                    let w = WFmt { code, group, zero, scale: ScaleTy::Bf16 };
                    let epilogue = EExpr::store_acc(MemTy::F32, 256);
                    let m = MRange { min: 1, max };
                    all.push(MatmulSpec { n: 256, k: 1024, m, rows: Rows::T, w, a, epilogue });
                }
            }
        }
        all
    }

    #[test]
    fn tiles_fit_and_reach_down_to_one_row() {
        for target in TARGETS {
            for spec in specs() {
                let plan = schedule(&spec, &target.cpu);
                assert!(plan.compared > 0, "{} {spec:?}", target.name);
                assert_eq!(plan.tiles.last().unwrap().mr, 1);
                assert!(plan.tiles.windows(2).all(|t| t[0].mr > t[1].mr), "{plan}");
                for tile in &plan.tiles {
                    assert!(tile.mr <= spec.m.max);
                    assert!(panel_vectors(&target.cpu).is_multiple_of(tile.nr));
                    let used = registers(&spec, plan.inner, tile.mr, tile.nr);
                    assert!(used <= target.cpu.vector_regs, "{} {plan}: {used} registers", target.name);
                }
                if spec.m.max <= 4 {
                    assert_eq!(plan.tiles.len() as u32, spec.m.max, "a tile for each count of rows");
                }
                assert!(plan.cost.total() > 0.0);
                assert_eq!(plan, schedule(&spec, &target.cpu));
            }
        }
    }

    #[test]
    fn few_rows_stream_whole_panels() {
        let cpu = &crate::targets::lookup("cpu-avx512vnni").expect("a known target").cpu;
        for spec in specs().iter().filter(|s| s.m.max <= 16 && s.a == AFmt::I8Token) {
            let first = schedule(spec, cpu).tiles[0];
            assert_eq!(first.nr, panel_vectors(cpu), "{spec:?}");
        }
    }

    #[test]
    fn full_range_bytes_never_meet_a_saturating_product() {
        for target in TARGETS {
            for spec in specs().iter().filter(|s| s.w.code == Code::U8 && s.a == AFmt::I8Token) {
                assert_ne!(inner(spec, &target.cpu), Inner::Int(Dot::Maddubs), "{}", target.name);
            }
        }
    }
}
