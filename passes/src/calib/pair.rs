//! Two modules side by side on the same samples.

use super::LayerExec;
use super::chain::Samples;
use super::piece::{self, Piece, Wanted};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::module::Module;
use quantc_ir::weights::{Digest, Recipe, Store};

/// Two modules with the same inputs and results, whole.
pub struct Pair {
    pieces: [Piece; 2],
    samples: Samples,
}

/// Takes the tokens of a call and the first result of both modules on it, row by row.
pub type SeeBoth<'a> = dyn FnMut(&[u32], &[f32], &[f32]) -> Result<()> + 'a;

impl Pair {
    /// Prepares nothing yet.
    pub fn new(a: &Module, b: &Module, store: &Store, samples: Samples) -> Result<Pair> {
        let tokens = samples.extent().most;
        let whole =
            |module: &Module| piece::cut(module, store, &[], Wanted::Main(&module.main.results), tokens);
        Ok(Pair { pieces: [whole(a)?, whole(b)?], samples })
    }

    /// A name for what [`run`](Self::run) shows: programs, weights, samples and execution.
    pub fn key(&self, exec: &dyn LayerExec) -> Digest {
        let inputs = vec![self.pieces[0].key, self.pieces[1].key, self.samples.digest];
        Recipe { step: "two modules", version: 1, options: exec.name(), inputs }.digest()
    }

    /// Runs all samples through both, one after the other.
    pub fn run(&self, exec: &dyn LayerExec, store: &Store, see: &mut SeeBoth<'_>) -> Result<()> {
        let extent = self.samples.extent();
        let [a, b] = &self.pieces;
        let modules = [super::runnable(&a.module, store, false)?, super::runnable(&b.module, store, false)?];
        let mut runners = vec![];
        for module in &modules {
            runners.push(exec.prepare(module, store, extent)?);
        }
        let inputs_of_ids = piece::inputs_of_ids(&modules[0]);
        let zeros = vec![0; extent.most];
        for call in &self.samples.calls {
            let ids = call.ids(inputs_of_ids, &zeros);
            let mut results = [vec![], vec![]];
            for (runner, result) in runners.iter_mut().zip(&mut results) {
                runner.run(&ids, &[], &mut |i, rows| {
                    if i == 0 {
                        *result = rows.to_vec();
                    }
                    Ok(())
                })?;
            }
            if results[0].len() != results[1].len() {
                return Err(Diag::bug("two modules with results of different sizes"));
            }
            see(&call.tokens, &results[0], &results[1])?;
        }
        Ok(())
    }
}
