//! `quantc import`: a model as text.

use crate::failure::Outcome;
use crate::output;
use crate::text_model::{TextArgs, read_model};
use quantc_frontends::{ImportOptions, onnx};
use quantc_ir::diag::Diag;
use quantc_ir::weights::Store;
use std::path::PathBuf;

/// Arguments of `quantc import`.
#[derive(clap::Args)]
pub struct Args {
    /// A model folder or an `.onnx` file.
    model: PathBuf,
    /// The file to write instead of stdout.
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// Tokens that a sequence may have, instead of the model's context.
    #[arg(long)]
    context: Option<u32>,
    /// The `.onnx` file as the text model that `compile` makes of it.
    #[arg(long)]
    raise: bool,
    #[command(flatten)]
    text: TextArgs,
}

/// Reads `NAME=N`.
pub(crate) fn dim(text: &str) -> Result<(String, u64), String> {
    let parts = text.rsplit_once('=').ok_or("expected NAME=N")?;
    Ok((parts.0.into(), parts.1.parse().map_err(|_| format!("`{}` is not a number", parts.1))?))
}

/// Runs the subcommand.
pub fn run(args: Args) -> Outcome {
    let store = Store::in_memory();
    let (module, notes) = if args.raise {
        let imported = read_model(&args.model, &store, args.context, &args.text)?;
        (imported.module, imported.notes)
    } else if onnx::is_onnx(&args.model) {
        let options = onnx::Options { dims: args.text.dims(), ..onnx::Options::default() };
        let imported = onnx::import(&args.model, &store, &options).map_err(|refused| refused.problems)?;
        (imported.module, imported.notes)
    } else {
        let options = ImportOptions { context: args.context };
        let imported = quantc_frontends::import(&args.model, &store, &options)?;
        let unused = imported.unused.iter().map(|name| format!("tensor `{name}` is not used"));
        (imported.module, imported.notes.into_iter().chain(unused).collect())
    };
    notes.iter().for_each(|note| eprintln!("note: {note}"));
    crate::opt::verify(&module)?;
    let text = quantc_ir::text::print(&module);
    match &args.output {
        None => output::piece(&text),
        Some(path) => std::fs::write(path, text).map_err(|e| {
            Diag::system(format!("cannot write: {e}")).in_file(path.display().to_string()).into()
        }),
    }
}
