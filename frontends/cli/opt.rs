//! `quantc opt`: runs a pipeline on a `.qir` file, text in, text out.

use crate::failure::{Failure, Outcome};
use crate::output;
use quantc_ir::diag::Diag;
use quantc_ir::module::Module;
use quantc_ir::target::{Backend, TargetDesc};
use quantc_ir::weights::Store;
use quantc_ir::{text, verify};
use quantc_passes::Registry;
use quantc_passes::manager::{self, Hook, PrintIr, Report, Reproduce, VerifyEach, When};
use quantc_passes::pass::{Env, Session};
use quantc_passes::pipeline::{self, Checked};
use std::path::PathBuf;

/// Arguments of `quantc opt`.
#[derive(clap::Args)]
pub struct Args {
    /// A `.qir` file, or `-` for stdin.
    file: PathBuf,
    /// The pipeline, as text.
    #[arg(short, long)]
    pipeline: String,
    /// The target; by default the file's, or none.
    #[arg(long)]
    target: Option<String>,
    #[command(flatten)]
    show: Show,
}

/// What to show of a run of passes.
#[derive(clap::Args, Default)]
pub struct Show {
    /// Print each function after each pass.
    #[arg(long)]
    print_after: bool,
    /// Print a function after each pass that changed it.
    #[arg(long)]
    print_after_change: bool,
    /// Print where the time went.
    #[arg(long)]
    time: bool,
    /// Print what passes remark.
    #[arg(long)]
    remarks: bool,
    /// Print the chain of rules behind each value that equality saturation changed.
    #[arg(long)]
    explain: bool,
    /// Stop after this pass and print the module.
    #[arg(long, value_name = "PASS")]
    stop_after: Option<String>,
    /// Do not verify the module after each pass.
    #[arg(long)]
    no_verify_each: bool,
}

impl Show {
    /// Cuts a pipeline where it is to stop.
    pub fn stop(&self, checked: Checked) -> Outcome<Checked> {
        Ok(match &self.stop_after {
            Some(name) => checked.stopped_after(name)?,
            None => checked,
        })
    }

    /// Whether the run ends before code is generated.
    #[cfg(feature = "llvm")]
    pub fn stops(&self) -> bool {
        self.stop_after.is_some()
    }
}

/// Runs the subcommand.
pub fn run(args: Args, registry: &Registry) -> Outcome {
    let place = args.file.display().to_string();
    let source = match place.as_str() {
        "-" => std::io::read_to_string(std::io::stdin())
            .map_err(|e| Diag::input(format!("cannot read stdin: {e}")))?,
        _ => crate::subject::read_text(&args.file)?,
    };
    let parsed = text::parse(&source, &place)?;
    let mut module = parsed.module;
    if let Err(errors) = verify::verify(&module) {
        return Err(errors.locate(&module, &parsed.places, &place).into());
    }
    let store = Store::in_memory();
    let folder = args.file.parent().map(PathBuf::from).unwrap_or_default();
    for (id, shard) in module.shards.iter() {
        store.add_shard(id, folder.join(&shard.file))?;
    }
    let backend = backend(args.target.as_deref().or(module.target.as_deref()))?;
    let backend = backend.as_deref();
    let target: Option<&TargetDesc> = backend.map(|b| b.target());
    let parsed = pipeline::parse(&args.pipeline)?;
    let checked = args.show.stop(pipeline::check(&parsed, registry, &module, target, backend)?)?;
    let mut env = Env::new(&store);
    if let Some(backend) = backend {
        env = env.with_backend(backend);
    }
    run_pipeline(&mut module, &checked, env, Session::default(), &args.show, &mut [])?;
    output::piece(&text::print(&module))
}

fn backend(target: Option<&str>) -> Outcome<Option<Box<dyn Backend>>> {
    let desc = target.map(quantc_codegen::targets::lookup).transpose()?;
    Ok(desc.map(quantc_codegen::backend::of))
}

/// Verifies a module as it came from the user.
pub fn verify(module: &Module) -> Outcome {
    verify::verify(module).map_err(|errors| {
        eprintln!("{}", errors.show(module));
        Failure::from(errors.diags(module))
    })
}

/// Runs a checked pipeline with the hooks that `show` asks for, and `more`.
pub fn run_pipeline(
    module: &mut Module,
    checked: &Checked,
    env: Env<'_>,
    mut session: Session,
    show: &Show,
    more: &mut [&mut dyn Hook],
) -> Outcome<Report> {
    let mut verify_each = VerifyEach;
    let when = if show.print_after { When::Always } else { When::Change };
    let mut print = PrintIr::new(when, Box::new(std::io::stderr()));
    let mut reproduce = Reproduce::new(std::env::temp_dir());
    let mut hooks: Vec<&mut dyn Hook> = vec![];
    if !show.no_verify_each {
        hooks.push(&mut verify_each);
    }
    if show.print_after || show.print_after_change {
        hooks.push(&mut print);
    }
    hooks.push(&mut reproduce);
    hooks.extend(more.iter_mut().map(|hook| &mut **hook as &mut dyn Hook));
    explain_in(&mut session, show);
    let report = manager::run(module, checked, env, session, &mut hooks)?;
    if show.remarks {
        for remark in &report.remarks.0 {
            eprintln!("remark: {} {}: {}", remark.pass, remark.place, remark.text);
        }
    }
    if show.time {
        eprint!("{}", report.timing);
    }
    if show.explain {
        let explanations = report.session.get::<quantc_passes::saturate::Explanations>();
        match explanations {
            Some(e) if !e.0.is_empty() => {
                for (function, value, rules) in &e.0 {
                    eprintln!("%{value} in @{function}: {}", rules.join(", then "));
                }
            }
            _ => eprintln!("no value was changed by equality saturation"),
        }
    }
    Ok(report)
}

/// Asks for explanations when they are to be shown.
fn explain_in(session: &mut Session, show: &Show) {
    if show.explain {
        session.put(quantc_passes::saturate::Explanations::default());
    }
}
