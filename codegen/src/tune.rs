//! Tiles by measurement: what there is to time, and the table that remembers what won.
//!
//! The cost model of [`matmul::schedule`] ranks tiles without running anything, so that engines are the same wherever
//! they are compiled. [`trials`] compiles the first few of that ranking for one product; the tool times them and puts
//! the winner into a [`Tuning`]. A table is an explicit input of a compilation: without one the model decides.
//!
//! Only the first tile of a kernel is tuned, the one that does nearly all rows. What the sums become does not matter
//! for it, so products that differ in their epilogues share an entry.

#[cfg(feature = "llvm")]
pub mod limits;
pub mod table;

use std::ops::Range;

use quantc_ir::target::CpuDesc;
#[cfg(feature = "llvm")]
use quantc_ir::{diag::Result, target::TargetDesc};
use serde::{Deserialize, Serialize};

#[cfg(feature = "llvm")]
use crate::cpu::llvm::Unit;
use crate::cpu::matmul::schedule::{self, Cost, CpuTile, MatmulSchedule};
use crate::eexpr::{EExpr, MemTy};
use crate::layout::{Layout, PANEL};
use crate::spec::{AFmt, KernelSpec, MatmulSpec, Rows, i8_row_stride};
pub use table::{Entry, Tuning};

/// Multiply-adds of one timed call: a hundredth of a second on one core of a fast machine.
const CALL_MACS: u64 = 2 << 30;
/// Rows of a timed call for kernels of many rows.
const MANY_ROWS: u32 = 256;

/// `spec` with an epilogue that only stores: what tuning times, and what names its entry.
pub fn plain(spec: &MatmulSpec) -> MatmulSpec {
    let alone = EExpr::store_acc(MemTy::F32, spec.n);
    let mut epilogue = EExpr::new();
    let mut sum = epilogue.acc();
    for product in 1..spec.products() {
        if let Some(other) = epilogue.absorb(&alone, product as u8) {
            sum = epilogue.add(sum, other);
        }
    }
    epilogue.store(sum, MemTy::F32, spec.n);
    MatmulSpec { rows: Rows::T, epilogue, ..spec.clone() }
}

/// The name of the table's entry for `spec`: readable facts and a digest over all that matters.
pub fn key(spec: &MatmulSpec) -> String {
    KernelSpec::Matmul(plain(spec)).key()
}

/// What a timed call of a product works on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Bytes of each argument of the kernel, in order.
    pub args: Vec<usize>,
    /// The arguments that are weights.
    pub weights: Range<usize>,
    /// Rows of the call: both dimensions that kernels get.
    pub rows: u32,
    /// Items of the call, from 0 on.
    pub items: u32,
    /// Multiply-adds of the call.
    pub macs: u64,
    /// Weight bytes that the call reads.
    pub weight_bytes: u64,
}

impl Workload {
    /// A call of `spec` for `rows` rows, with as many panels as give at most `macs` multiply-adds, and at least one.
    pub fn new(spec: &MatmulSpec, rows: u32, macs: u64) -> Workload {
        let layout = Layout::of(spec);
        let (k, products) = (u64::from(spec.k), spec.products());
        let panel = u64::from(rows) * u64::from(PANEL) * k * u64::from(products);
        let items = u64::from(spec.items()).min(macs / panel.max(1)).max(1);
        let columns = (items * u64::from(PANEL)).min(u64::from(spec.n));
        let matrix = items * layout.panel_bytes();
        let rows_of = |bytes: u64| (u64::from(rows) * bytes) as usize;
        // Activations, however they come, lie in rows of at most this many bytes.
        let row = if spec.a == AFmt::I8Token { u64::from(i8_row_stride(spec.k)) } else { (k + 64) * 4 };
        let mut args = vec![rows_of(row)];
        if spec.weights_arg() > 1 {
            args.extend([rows_of(4), rows_of(4 * u64::from(spec.groups()))]);
        }
        let weights = args.len()..args.len() + products as usize;
        args.extend(weights.clone().map(|_| matrix as usize));
        args.push(rows_of(4 * u64::from(spec.n)));
        Workload {
            args,
            weights,
            rows,
            items: items as u32,
            macs: u64::from(rows) * columns * k * u64::from(products),
            weight_bytes: matrix * u64::from(products),
        }
    }

    /// The call that stands for the sizes of `spec`: its most rows, or 256 when it serves more.
    pub fn of(spec: &MatmulSpec) -> Workload {
        let rows = spec.m.max.min(MANY_ROWS);
        Workload::new(spec, rows, CALL_MACS)
    }

    /// A byte for place `i` of any argument: codes, positive scales near 1/2, floats of ordinary size.
    pub fn fill(i: usize) -> u8 {
        if i % 2 == 1 { 0x3f } else { (i.wrapping_mul(37) >> 3) as u8 & 0x3f }
    }
}

/// A tile to be timed.
#[derive(Clone, Debug, PartialEq)]
pub struct Trial {
    /// The kernel in the object.
    pub symbol: String,
    /// Its first tile.
    pub tile: CpuTile,
    /// What the model expects of it.
    pub cost: Cost,
}

/// The tiles worth timing for one product, best first by the model.
pub struct Trials {
    /// The entry's name.
    pub key: String,
    /// The kernels.
    pub object: Vec<u8>,
    /// One for each tile.
    pub trials: Vec<Trial>,
    /// What each of them is to be called on.
    pub workload: Workload,
}

/// The object with the kernels that `emit` adds.
#[cfg(feature = "llvm")]
pub fn object(target: &'static TargetDesc, emit: impl FnOnce(&Unit<'_>) -> Result<()>) -> Result<Vec<u8>> {
    let cx = inkwell::context::Context::create();
    let unit = Unit::new(&cx, target, "timed")?;
    emit(&unit)?;
    unit.finish()
}

/// Compiles the `count` tiles that the model ranks first for `spec`.
#[cfg(feature = "llvm")]
pub fn trials(spec: &MatmulSpec, target: &'static TargetDesc, count: usize) -> Result<Trials> {
    let spec = plain(spec);
    let mut trials = vec![];
    let object = object(target, |unit| {
        for (cost, tile) in schedule::ranked(&spec, &target.cpu).into_iter().take(count.max(1)) {
            let symbol = format!("tile_{}x{}x{}", tile.mr, tile.nr, tile.ku);
            let schedule = schedule::schedule_from(&spec, &target.cpu, tile);
            crate::cpu::matmul::emit(unit, &symbol, &spec, &schedule)?;
            trials.push(Trial { symbol, tile, cost });
        }
        Ok(())
    })?;
    Ok(Trials { key: key(&spec), object, trials, workload: Workload::of(&spec) })
}

/// The products that stand for `specs`: one for each entry of a table, in order of their names.
pub fn products<'a>(specs: impl IntoIterator<Item = &'a KernelSpec>) -> Vec<MatmulSpec> {
    let mut all = std::collections::BTreeMap::new();
    for spec in specs {
        if let KernelSpec::Matmul(spec) = spec {
            all.insert(key(spec), plain(spec));
        }
    }
    all.into_values().collect()
}

/// What a report tells about a product, and what a tuner reads of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Product {
    /// The product, with an epilogue that only stores.
    pub spec: MatmulSpec,
    /// The kernel's first tile.
    pub tile: CpuTile,
    /// The part of its limit that the model expects of it.
    pub expected: f64,
    /// The part that was measured, where a tuning table knows it.
    pub measured: Option<f64>,
}

impl Product {
    /// What there is to tell about `spec` with `schedule`.
    pub fn of(
        spec: &MatmulSpec,
        schedule: &MatmulSchedule,
        cpu: &CpuDesc,
        table: Option<&Tuning>,
    ) -> Product {
        let round = |x: f64| (x * 1000.0).round() / 1000.0;
        let tile = schedule.tiles[0];
        Product {
            spec: plain(spec),
            tile,
            expected: round(schedule::expected(spec, &schedule.cost, cpu)),
            measured: table.and_then(|t| t.entry(spec)).map(|entry| round(entry.share)),
        }
    }
}

#[cfg(all(test, feature = "llvm"))]
mod tests {
    use super::*;
    use crate::cpu::testing::{Buf, call, runnable};
    use crate::spec::{Code, MRange, ScaleTy, WFmt, Zero};
    use quantc_runtime::object::Object;

    fn spec(n: u32, k: u32, products: u8) -> MatmulSpec {
        let w = WFmt { code: Code::U4, group: 32.min(k), zero: Zero::Asym, scale: ScaleTy::Bf16 };
        let alone = EExpr::store_acc(MemTy::F32, n);
        let mut epilogue = EExpr::new();
        let mut sum = epilogue.acc();
        for product in 1..products {
            let other = epilogue.absorb(&alone, product).expect("it stores something");
            sum = epilogue.mul(sum, other);
        }
        epilogue.store(sum, MemTy::F32, n);
        MatmulSpec { n, k, m: MRange { min: 5, max: 16 }, rows: Rows::R, w, a: AFmt::I8Token, epilogue }
    }

    #[test]
    fn trials_run_on_their_workload_and_agree() {
        for target in runnable() {
            for spec in [spec(100, 72, 1), spec(64, 40, 2)] {
                let Trials { key, object, trials, workload } =
                    trials(&spec, target, 3).expect("the spec has kernels");
                assert_eq!(key, super::key(&spec));
                assert!(!trials.is_empty() && trials.len() <= 3);
                assert_eq!(workload.rows, 16);
                assert_eq!(workload.weights.len() as u32, spec.products());
                let macs = 16 * u64::from(spec.n) * u64::from(spec.k) * u64::from(spec.products());
                assert_eq!(workload.macs, macs);
                let object = Object::load(&object).expect("the object loads");
                let mut results = vec![];
                for trial in &trials {
                    let mut bufs: Vec<Buf> = workload
                        .args
                        .iter()
                        .map(|&len| {
                            let words = (0..len.div_ceil(2)).map(|_| 0.5);
                            Buf::of(&words.collect::<Vec<f32>>(), MemTy::Bf16)
                        })
                        .collect();
                    let mut args: Vec<&mut Buf> = bufs.iter_mut().collect();
                    call(&object, &trial.symbol, &mut args, [16, 16], 0..i64::from(workload.items));
                    let out = bufs.last().expect("there is a result").bytes().to_vec();
                    assert_eq!(out.len() as u32, 16 * spec.n * 4);
                    // Looking at a buffer checks what lies around it.
                    assert!(bufs.iter().all(|buf| !buf.bytes().is_empty()));
                    results.push(out);
                }
                assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "tiles differ on {}", target.name);
            }
        }
    }

    #[test]
    fn products_are_listed_once() {
        let a = spec(64, 64, 1);
        let mut b = a.clone();
        b.rows = Rows::T;
        let all = [a.clone(), b, spec(64, 64, 2)].map(KernelSpec::Matmul);
        let found = products(&all);
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|s| s.check().is_ok() && s.rows == Rows::T));
    }
}
