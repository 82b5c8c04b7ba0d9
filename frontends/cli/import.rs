//! `quantc import`: a model as text.

use crate::failure::Outcome;
use crate::output;
use quantc_frontends::ImportOptions;
use quantc_ir::diag::Diag;
use quantc_ir::weights::Store;
use std::path::PathBuf;

/// Arguments of `quantc import`.
#[derive(clap::Args)]
pub struct Args {
    /// A model folder.
    model: PathBuf,
    /// The file to write instead of stdout.
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// Tokens that a sequence may have, instead of the model's context.
    #[arg(long)]
    context: Option<u32>,
}

/// Runs the subcommand.
pub fn run(args: Args) -> Outcome {
    let store = Store::in_memory();
    let imported = quantc_frontends::import(&args.model, &store, &ImportOptions { context: args.context })?;
    imported.notes.iter().for_each(|note| eprintln!("note: {note}"));
    for name in &imported.unused {
        eprintln!("note: tensor `{name}` is not used");
    }
    crate::opt::verify(&imported.module)?;
    let text = quantc_ir::text::print(&imported.module);
    match &args.output {
        None => output::piece(&text),
        Some(path) => std::fs::write(path, text).map_err(|e| {
            Diag::system(format!("cannot write: {e}")).in_file(path.display().to_string()).into()
        }),
    }
}
