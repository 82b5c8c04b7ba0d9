//! From specs to an object: names, emission, and what there is to tell about each kernel.

use crate::cpu::llvm::Unit;
use crate::cpu::matmul::MatmulSchedule;
use crate::cpu::matmul::schedule::{Inner, schedule_from};
use crate::cpu::{attention, cache, conv, gather, matmul, nest, rope, row};
use crate::cuda::plan::GpuReport;
use crate::eexpr::{Node, UnaryOp};
use crate::spec::{Code, KernelSpec, MatmulSpec, Rows};
use crate::tune::{Product, Tuning};
use inkwell::context::Context;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::{Dot, TargetDesc};
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

/// What there is to tell about one kernel.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KernelReport {
    /// The symbol in the object.
    pub symbol: String,
    /// The template it was made from.
    pub template: &'static str,
    /// The choices made for it, in words.
    pub choice: String,
    /// Alternatives that were refused, with the reason.
    pub refused: Vec<String>,
    /// The launches that use it.
    pub launches: Vec<String>,
    /// The multiply-adds of a call, for kernels that are about them.
    pub work: Option<Work>,
    /// More about products.
    pub product: Option<Product>,
    /// More about kernels of GPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuReport>,
}

/// Multiply-adds of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Work {
    /// How many for each `per`.
    pub macs: u64,
    /// What they are counted for.
    pub per: Per,
}

/// What work grows with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Per {
    /// Tokens of the call.
    T,
    /// Rows of results of the call.
    R,
    /// Pairs of a token and a position that it sees.
    Pair,
    /// Calls.
    Call,
}

impl Work {
    /// The work of `spec`, where it is a matter of multiply-adds.
    pub fn of(spec: &KernelSpec) -> Option<Work> {
        match spec {
            KernelSpec::Matmul(s) | KernelSpec::TiledMatmul(s) => {
                let per = if s.rows == Rows::T { Per::T } else { Per::R };
                Some(Work { macs: u64::from(s.n) * u64::from(s.k) * u64::from(s.products()), per })
            }
            KernelSpec::Attention(s) => {
                Some(Work { macs: 2 * u64::from(s.heads) * u64::from(s.head_dim), per: Per::Pair })
            }
            KernelSpec::Conv(s) => Some(Work { macs: s.macs(), per: Per::Call }),
            _ => None,
        }
    }
}

/// What is told of kernels that round rows to e4m3.
const ROUNDED_ROWS: &str = "e4m3 and back: no instruction multiplies such codes, products read the numbers they stand for, \
                            and are no faster than without";

/// Compiles the kernels of `specs`, which map symbols to specs; returns the object and a report for each. Tiles are those
/// of `tuning` where it has any, else the cost model's.
pub fn compile(
    specs: &BTreeMap<String, KernelSpec>,
    target: &'static TargetDesc,
    tuning: Option<&Tuning>,
) -> Result<(Vec<u8>, Vec<KernelReport>)> {
    tuning.map_or(Ok(()), |table| table.check(target))?;
    let cx = Context::create();
    let unit = Unit::new(&cx, target, "kernels")?;
    let mut reports = vec![];
    for (symbol, spec) in specs {
        let mut report = KernelReport {
            symbol: symbol.clone(),
            template: spec.template(),
            choice: String::new(),
            refused: vec![],
            launches: vec![],
            work: Work::of(spec),
            product: None,
            gpu: None,
        };
        match spec {
            KernelSpec::Matmul(spec) => {
                let tile = tuning.map(|table| table.tile(spec, target)).transpose()?.flatten();
                let schedule = match tile {
                    Some(tile) => schedule_from(spec, &target.cpu, tile),
                    None => matmul::schedule(spec, &target.cpu),
                };
                report.product = Some(Product::of(spec, &schedule, &target.cpu, tuning));
                report.choice = schedule.to_string();
                report.refused = refused(spec, &schedule, target);
                matmul::emit(&unit, symbol, spec, &schedule)?;
            }
            KernelSpec::Row(spec) => {
                if spec.body.nodes.iter().any(|n| matches!(n, Node::Unary(UnaryOp::RoundE4m3, _))) {
                    report.choice = ROUNDED_ROWS.into();
                }
                row::emit(&unit, spec, symbol)?;
            }
            KernelSpec::Attention(spec) => attention::emit(&unit, spec, symbol)?,
            KernelSpec::Gather(spec) => gather::emit_gather(&unit, spec, symbol)?,
            KernelSpec::CacheAppend(spec) => cache::emit_append(&unit, spec, symbol)?,
            KernelSpec::Rope(spec) => rope::emit_rope(&unit, spec, symbol)?,
            KernelSpec::RopeTable(spec) => rope::emit_table(&unit, spec, symbol)?,
            KernelSpec::Nest(spec) => nest::emit(&unit, spec, symbol)?,
            KernelSpec::Conv(spec) => {
                let tile = spec.tile(target);
                report.choice = format!("{} windows by {} vectors of outputs", tile.windows, tile.vectors);
                conv::emit(&unit, spec, symbol)?;
            }
            KernelSpec::RowTiles(_) | KernelSpec::TiledMatmul(_) | KernelSpec::Sample(_) => {
                return Err(Diag::bug(format!("{symbol} is a kernel of GPUs only")));
            }
        }
        reports.push(report);
    }
    Ok((unit.finish()?, reports))
}

/// A target's name and the kernels wanted, by symbol.
type Asked = (&'static str, BTreeMap<String, KernelSpec>);

/// What they were compiled to.
type Object = (Vec<u8>, Vec<KernelReport>);

/// Objects that this process has compiled: layers of one shape ask for the same kernels again and again.
#[derive(Debug, Default)]
pub struct Objects(Mutex<HashMap<Asked, Object>>);

impl Objects {
    /// As [`compile`] without a table, unless it was done before.
    pub fn compile(
        &self,
        specs: &BTreeMap<String, KernelSpec>,
        target: &'static TargetDesc,
    ) -> Result<Object> {
        let key = (target.name, specs.clone());
        let known = |key| self.0.lock().unwrap_or_else(|broken| broken.into_inner()).get(key).cloned();
        if let Some(object) = known(&key) {
            return Ok(object);
        }
        let object = compile(specs, target, None)?;
        self.0.lock().unwrap_or_else(|broken| broken.into_inner()).insert(key, object.clone());
        Ok(object)
    }
}

/// What else could have computed a matmul, and why it does not.
fn refused(spec: &MatmulSpec, chosen: &MatmulSchedule, target: &TargetDesc) -> Vec<String> {
    let mut refused = vec![];
    if let Inner::Int(dot) = chosen.inner {
        for other in [Dot::Vnni, Dot::Maddubs, Dot::Widening] {
            if other == dot {
                continue;
            }
            let why = match other {
                other if !target.cpu.dots.contains(&other) => format!("not on {}", target.name),
                Dot::Maddubs if spec.w.code != Code::U4 => {
                    "pairs of full-range products overflow 16 bits".into()
                }
                _ => "slower than the chosen product".into(),
            };
            refused.push(format!("{other:?}: {why}"));
        }
    }
    let best = chosen.cost.total();
    let mut tiles: Vec<(f64, String)> = matmul::candidates(spec, &target.cpu)
        .into_iter()
        .filter(|tile| chosen.tiles.first() != Some(tile))
        .map(|tile| (matmul::cost(spec, &tile, &target.cpu).total(), format!("{}x{}", tile.mr, tile.nr)))
        .collect();
    tiles.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
    tiles.dedup();
    for (cost, tile) in tiles.into_iter().take(4) {
        refused.push(format!("tile {tile}: expected {:.2} times the cycles", cost / best));
    }
    refused
}
