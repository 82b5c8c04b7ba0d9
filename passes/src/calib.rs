//! Calibration: parts of a model run on data, and what is learned from it.
//!
//! Statistics are about the rows that products read. They are taken where a pipeline says `calibrate`, of the layer as it
//! is there, on rows that went through all layers before it as *they* are by then: inside of `layers(..)` those are
//! quantized already, and what is rounded later makes up for what was rounded before.
//!
//! How it goes: [`piece`] cuts the part of the model out that leads from one layer to the next, or to the rows wanted;
//! a [`LayerExec`] runs it on all samples; [`Calibrator`] keeps what lies between layers in a file. Nothing of this happens
//! before somebody asks for a number ([`stats`]): weights that were derived from the same statistics in an earlier run
//! are found in the store by their key, and then no layer is run at all. So an interrupted run goes on where it was.
//!
//! What holds: memory is one layer, its statistics and one sample; results do not depend on the number of threads.

pub mod chain;
pub mod file;
pub mod hessian;
pub mod observers;
pub mod pair;
pub mod piece;
pub mod plain_cache;
pub mod stats;

pub use chain::{Calibrator, Data};
pub use file::StatsFile;
pub use piece::Piece;
pub use stats::SiteStats;

use crate::pass::{Env, Session};
use crate::{Registry, manager, pipeline};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::eval::{Evaluator, Tensor};
use quantc_ir::module::Module;
use quantc_ir::ty::ElemTy;
use quantc_ir::weights::Store;

/// Compiles pieces and runs them; what calibration runs with. The tool's is made of the code generator and the runtime,
/// [`Reference`] of the evaluator.
pub trait LayerExec: Send + Sync {
    /// Names what decides the last places of results: the kind of execution and its target.
    fn name(&self) -> String;

    /// Whether products of bf16 rows are much faster than those of f32.
    fn multiplies_bf16(&self) -> bool {
        false
    }

    /// Makes the `main` of `piece` ready for calls.
    fn prepare<'a>(&self, piece: &'a Module, store: &'a Store, calls: Extent)
    -> Result<Box<dyn Runner + 'a>>;
}

/// How many tokens calls have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// At most so many.
    pub most: usize,
    /// Every call has that many.
    pub always: bool,
}

/// A piece that is ready to run.
pub trait Runner {
    /// Runs one call from the beginning: `ids` and `rows` are the inputs of `main` of i32 and of f32, in order. `result`
    /// is called with the index and the numbers of each result, row by row.
    fn run(
        &mut self,
        ids: &[&[u32]],
        rows: &[&[f32]],
        result: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()>;
}

/// A piece with products that read quantized weights as they are, which kernels want; and rows of bf16, when asked for.
fn runnable(piece: &Module, store: &Store, bf16: bool) -> Result<Module> {
    let mut module = piece.clone();
    let rows = if bf16 { "cast-activations{to=bf16}, " } else { "" };
    let parsed = pipeline::parse(&format!("{rows}fuse-dequant-matmul, fuse-epilogue"))?;
    let checked = pipeline::check(&parsed, &Registry::builtin(), &module, None, None);
    let checked = checked.map_err(|e| Diag::bug(format!("fusion of a piece: {e}")))?;
    manager::run(&mut module, &checked, Env::new(store), Session::default(), &mut [])?;
    Ok(module)
}

/// Runs pieces with the reference evaluator.
pub struct Reference;

impl LayerExec for Reference {
    fn name(&self) -> String {
        "reference".into()
    }

    fn prepare<'a>(&self, piece: &'a Module, store: &'a Store, _: Extent) -> Result<Box<dyn Runner + 'a>> {
        Ok(Box::new(ReferenceRunner { piece, store }))
    }
}

struct ReferenceRunner<'a> {
    piece: &'a Module,
    store: &'a Store,
}

impl Runner for ReferenceRunner<'_> {
    fn run(
        &mut self,
        ids: &[&[u32]],
        rows: &[&[f32]],
        result: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let tokens = ids.first().map_or(0, |ids| ids.len() as u64);
        let (mut ids, mut rows) = (ids.iter(), rows.iter());
        let missing = || Diag::bug("a piece has more inputs than it was given");
        let input = |&p| {
            let ty = self.piece.main.ty(p);
            let dims: Vec<u64> = ty.shape.0.iter().map(|d| d.fixed().unwrap_or(tokens)).collect();
            match ty.elem {
                ElemTy::I32 => {
                    let ids = ids.next().ok_or_else(missing)?;
                    Tensor::i32(&dims, ids.iter().map(|&id| id as i32).collect())
                }
                _ => Tensor::f32(&dims, rows.next().ok_or_else(missing)?.to_vec()),
            }
        };
        let inputs = self.piece.main.params.iter().map(input).collect::<Result<Vec<Tensor>>>()?;
        let results = Evaluator::new(self.piece, self.store)?.step(&inputs, tokens)?;
        results.iter().enumerate().try_for_each(|(i, r)| result(i, r.f32s()?))
    }
}
