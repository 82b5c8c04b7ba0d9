//! Runs parts of a model for calibration, as engines of their own.

use quantc_codegen::engine::{self, Request};
use quantc_codegen::kernels::Objects;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::module::Module;
use quantc_ir::target::TargetDesc;
use quantc_ir::weights::Store;
use quantc_passes::calib::{Extent, LayerExec, Runner};
use quantc_runtime::engine::{Engine, OpenOptions};
use quantc_runtime::session::{Session, SessionOptions, Step};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Compiles pieces for this machine.
pub struct Compiled {
    target: &'static TargetDesc,
    threads: usize,
    /// Where the engines of pieces lie while they are used.
    folder: PathBuf,
    count: AtomicU64,
    objects: Objects,
}

impl Compiled {
    /// For `target`, which must run here. Engines of pieces lie in a folder of their own in `place` while they are used; what
    /// processes that are gone have left there is removed.
    pub fn new(target: &'static TargetDesc, threads: usize, place: &Path) -> Compiled {
        sweep(place);
        let folder = place.join(format!("{PREFIX}{}", std::process::id()));
        Compiled { target, threads, folder, count: AtomicU64::new(0), objects: Objects::default() }
    }
}

/// What names of folders of pieces begin with; the number of their process follows.
const PREFIX: &str = "pieces-";

/// Removes folders of processes that are gone.
fn sweep(place: &Path) {
    let Ok(entries) = std::fs::read_dir(place) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|n| n.strip_prefix(PREFIX)).and_then(|n| n.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // Whoever is faster.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

impl Drop for Compiled {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl LayerExec for Compiled {
    fn name(&self) -> String {
        format!("compiled for {}", self.target.name)
    }

    fn multiplies_bf16(&self) -> bool {
        self.target.cpu.bf16_mac_per_cycle > 0.0
    }

    fn prepare<'a>(
        &self,
        piece: &'a Module,
        store: &'a Store,
        calls: Extent,
    ) -> Result<Box<dyn Runner + 'a>> {
        let n = self.count.fetch_add(1, Ordering::Relaxed);
        std::fs::create_dir_all(&self.folder).map_err(|e| {
            Diag::system(format!("cannot make it: {e}")).in_file(self.folder.display().to_string())
        })?;
        let place = self.folder.join(n.to_string());
        // What is packed for a piece is of no use afterwards.
        let packed = store.scratch();
        let request = Request {
            module: piece,
            store: &packed,
            target: self.target,
            max_tokens: calls.most.try_into().unwrap_or(u32::MAX),
            always_full: calls.always,
            tuning: None,
            objects: Some(&self.objects),
            files: vec![],
            facts: vec![],
            report: Default::default(),
        };
        engine::write(request, &place)?;
        drop(packed);
        let broken = |e: quantc_runtime::error::Error| Diag::bug(format!("the engine of a piece: {e}"));
        let engine = Arc::new(Engine::open(&place, &OpenOptions::default()).map_err(broken)?);
        // It stays mapped.
        let _ = std::fs::remove_dir_all(&place);
        let options = SessionOptions { threads: self.threads, ..SessionOptions::default() };
        let session = Session::new(engine, &options).map_err(broken)?;
        Ok(Box::new(PieceRunner { session }))
    }
}

struct PieceRunner {
    session: Session,
}

impl Runner for PieceRunner {
    fn run(
        &mut self,
        ids: &[&[u32]],
        rows: &[&[f32]],
        result: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let failed = |e: quantc_runtime::error::Error| Diag::bug(format!("running a piece: {e}"));
        let tokens = ids.first().ok_or_else(|| Diag::bug("a piece without ids"))?;
        let n = tokens.len();
        let positions: Vec<u32> = (0..n as u32).collect();
        let step = Step { tokens, positions: &positions, slots: &vec![0; n], rows: n };
        let first = self.session.step_with(step, rows).map_err(failed)?;
        result(0, first)?;
        for i in 0..self.session.engine().manifest().row_outputs.len() {
            result(i + 1, self.session.row_output(i, n).map_err(failed)?)?;
        }
        Ok(())
    }
}
