//! The generated manual: passes, targets, formats, ops and presets, from their declarations.

use crate::failure::Outcome;
use crate::output;
use quantc_ir::diag::{Diag, near_misses};
use quantc_ir::formats::{self, Class, Format};
use quantc_ir::ops::{Arity, OpKind};
use quantc_passes::Registry;
use quantc_passes::presets;

/// Arguments of the manual's subcommands.
#[derive(clap::Args)]
pub struct Args {
    /// The entry to show; all are listed without it.
    name: Option<String>,
}

/// The first line of a manual page.
fn summary(doc: &str) -> String {
    doc.lines().map(str::trim).find(|l| !l.is_empty()).unwrap_or("").to_string()
}

/// A manual page without the space that doc comments put before each line.
fn page(doc: &str) -> String {
    doc.lines().map(|l| l.strip_prefix(' ').unwrap_or(l)).collect::<Vec<_>>().join("\n").trim().to_string()
}

fn unknown<'a>(what: &str, name: &str, known: impl IntoIterator<Item = &'a str>) -> Diag {
    let diag = Diag::input(format!("unknown {what} `{name}`"));
    match near_misses(name, known)[..] {
        [] => diag.help(format!("`quantc {what}s` lists all")),
        ref near => diag.help(format!("did you mean `{}`?", near.join("`, `"))),
    }
}

/// `quantc passes`.
pub fn passes(args: Args, registry: &Registry) -> Outcome {
    let Some(name) = args.name else { return output::piece(&passes_table(registry)) };
    let pass = registry.get(&name)?;
    let mut text = format!("{}\n\n{}\n\noptions:\n", pass.name, page(pass.doc));
    if pass.options.is_empty() {
        text += "  none\n";
    }
    for option in pass.options {
        text += &format!("  {} : {} = {}\n      {}\n", option.name(), option.ty, option.default, option.doc.trim());
    }
    let list = |facts: &[quantc_passes::pass::Fact]| {
        let texts: Vec<String> = facts.iter().map(|f| f.to_string()).collect();
        if texts.is_empty() { "nothing".to_string() } else { texts.join(", ") }
    };
    text += &format!("\nscope {}, numerics {}, ", pass.scope, pass.numerics);
    text += &format!("needs {}, provides {}\n", list(pass.needs), list(pass.provides));
    output::piece(&text)
}

/// The table of passes, also part of the README.
pub fn passes_table(registry: &Registry) -> String {
    let row = |p: &'static quantc_passes::pass::PassInfo| {
        vec![p.name.to_string(), p.scope.to_string(), p.numerics.to_string(), p.summary().trim().to_string()]
    };
    let rows: Vec<_> = registry.passes().map(row).collect();
    left_table(&["pass", "scope", "numerics", "what it does"], &rows)
}

/// `quantc targets`.
#[cfg(feature = "llvm")]
pub fn targets(args: Args) -> Outcome {
    use quantc_codegen::targets::{TARGETS, host, lookup, runs_here};
    let Some(name) = args.name else { return output::piece(&targets_table()) };
    let t = lookup(&name)?;
    let cpu = &t.cpu;
    let text = format!(
        "{}\n\n{}\n\nprocessor    {}\nfeatures     {}\nvectors      {} registers of {} bits\n\
         dot products {:?}\ncaches       {} KiB, {} KiB\nruns here    {}\n",
        t.name,
        t.doc.trim(),
        cpu.llvm_cpu,
        cpu.features.join(" "),
        cpu.vector_regs,
        cpu.vector_bits,
        cpu.dots,
        cpu.l1_kib,
        cpu.l2_kib,
        if runs_here(t) { "yes" } else { "no" },
    );
    let _ = (TARGETS.len(), host());
    output::piece(&text)
}

/// The table of targets, also part of the README.
#[cfg(feature = "llvm")]
pub fn targets_table() -> String {
    let row = |t: &&'static quantc_ir::target::TargetDesc| {
        vec![t.name.to_string(), format!("{} bit", t.cpu.vector_bits), summary(t.doc)]
    };
    let mut rows: Vec<_> = quantc_codegen::targets::TARGETS.iter().map(row).collect();
    rows.push(vec!["host".into(), String::new(), "The best of these that this machine runs.".into()]);
    left_table(&["target", "vectors", "what it is"], &rows)
}

/// `quantc targets` in a tool that does not compile.
#[cfg(not(feature = "llvm"))]
pub fn targets(_: Args) -> Outcome {
    Err(Diag::target("this build of quantc compiles nothing").help("build it with the feature `llvm`").into())
}

/// `quantc formats`.
pub fn formats(args: Args) -> Outcome {
    let Some(name) = args.name else { return output::piece(&formats_table()) };
    let names = formats::ALL.iter().map(|f| f.name);
    let f = Format::by_name(&name).ok_or_else(|| unknown("format", &name, names))?;
    let mut text = format!("{}\n\n{}\n\nbits   {}\nrange  {}\n", f.name, page(f.doc), f.bits, range(f));
    if f.bits <= 4 {
        let codes: Vec<String> = (0..1u32 << f.bits).map(|c| f.decode(c).to_string()).collect();
        text += &format!("codes  {}\n", codes.join(" "));
    }
    output::piece(&text)
}

/// The table of formats, also part of the README.
pub fn formats_table() -> String {
    let row = |f: &&'static Format| vec![f.name.to_string(), f.bits.to_string(), range(f), summary(f.doc)];
    left_table(&["format", "bits", "range", "what it is"], &formats::ALL.iter().map(row).collect::<Vec<_>>())
}

fn range(f: &'static Format) -> String {
    match f.class {
        Class::Exponent => "2^-127 .. 2^127".into(),
        _ if f.bits == 32 || f.name == "bf16" => format!("±{:e}", Format::max(f)),
        _ => format!("{} .. {}", Format::min(f), Format::max(f)),
    }
}

/// `quantc ops`.
pub fn ops(args: Args) -> Outcome {
    let Some(name) = args.name else { return output::piece(&ops_table()) };
    let names = OpKind::ALL.iter().map(|k| k.info().name);
    let kind = OpKind::by_name(&name).ok_or_else(|| unknown("op", &name, names))?;
    let info = kind.info();
    let mut text = format!("{}\n\n{}\n", info.name, page(info.doc));
    if !info.operands.0.is_empty() {
        text += "\noperands:\n";
    }
    for o in info.operands.0 {
        let arity = match o.arity {
            Arity::One => "",
            Arity::Optional => " (optional)",
            Arity::Many => " (any number)",
        };
        text += &format!("  {}{arity}: {}\n", o.name, o.doc.trim());
    }
    if !info.attributes.is_empty() {
        text += "\nattributes:\n";
    }
    for (name, default, doc) in info.attributes {
        text += &format!("  {} = {default}: {}\n", name.replace('_', "-"), doc.trim());
    }
    output::piece(&text)
}

/// The table of ops, also part of the README.
pub fn ops_table() -> String {
    let row = |k: &OpKind| vec![k.info().name.to_string(), summary(k.info().doc)];
    left_table(&["op", "what it computes"], &OpKind::ALL.iter().map(row).collect::<Vec<_>>())
}

/// `quantc presets`.
pub fn presets(args: Args) -> Outcome {
    let Some(name) = args.name else { return output::piece(&presets_table()) };
    let preset = presets::Preset::get(&name)?;
    output::piece(&format!(
        "{}\n\n{}\n\nembedding  {}\nhead       {}\npipeline   {}\n",
        preset.name,
        page(preset.doc),
        preset.embedding,
        preset.head,
        preset.pipeline
    ))
}

/// The table of presets, also part of the README.
pub fn presets_table() -> String {
    let row = |p: &presets::Preset| vec![p.name, p.doc.trim(), p.embedding, p.head].into_iter().map(String::from).collect();
    left_table(&["preset", "matrices", "embedding", "head"], &presets::ALL.iter().map(row).collect::<Vec<_>>())
}

/// A table with all columns to the left.
fn left_table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |i: usize| {
        let cells = rows.iter().map(|r| r[i].chars().count());
        cells.chain([head[i].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(c, &w)| format!("{c:<w$}")).collect();
        padded.join("  ").trim_end().to_string() + "\n"
    };
    let mut text = line(head.to_vec());
    for row in rows {
        text += &line(row.iter().map(String::as_str).collect());
    }
    text
}
