//! The generated manual: passes, targets, formats, ops and presets, from their declarations.

use crate::failure::Outcome;
use crate::output;
use quantc_codegen::backend::CpuBackend;
use quantc_codegen::targets::{self, TARGETS};
use quantc_frontends::arch::{ARCHS, Arch};
use quantc_ir::diag::{Diag, near_misses};
use quantc_ir::formats::{self, Class, Format};
use quantc_ir::ops::{Arity, DYNAMIC_INT8, OpKind};
use quantc_ir::scheme::{Group, Scheme, Zero};
use quantc_ir::target::{Backend, TargetDesc};
use quantc_ir::ty::{ElemTy, Float};
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
    let Some(name) = args.name else { return output::piece(&passes_table(registry).text()) };
    let pass = registry.get(&name)?;
    let mut text = format!("{}\n\n{}\n\noptions:\n", pass.name, page(pass.doc));
    if pass.options.is_empty() {
        text += "  none\n";
    }
    for option in pass.options {
        text += &format!(
            "  {} : {} = {}\n      {}\n",
            option.name(),
            option.ty,
            option.default,
            option.doc.trim()
        );
    }
    let list = |facts: &[quantc_passes::pass::Fact]| {
        let texts: Vec<String> = facts.iter().map(|f| f.to_string()).collect();
        if texts.is_empty() { "nothing".to_string() } else { texts.join(", ") }
    };
    text += &format!("\nscope {}, numerics {}, ", pass.scope, pass.numerics);
    text += &format!("needs {}, provides {}\n", list(pass.needs), list(pass.provides));
    output::piece(&text)
}

fn passes_table(registry: &Registry) -> Table {
    let row = |p: &'static quantc_passes::pass::PassInfo| {
        vec![p.name.to_string(), p.scope.to_string(), p.numerics.to_string(), p.summary().to_string()]
    };
    Table::new(&["pass", "scope", "numerics", "what it does"], registry.passes().map(row))
}

/// `quantc targets`.
#[cfg(feature = "llvm")]
pub fn targets(args: Args) -> Outcome {
    use quantc_codegen::targets::{lookup, runs_here};
    let Some(name) = args.name else { return output::piece(&targets_table().text()) };
    let t = lookup(&name)?;
    if let Some(gpu) = t.gpu {
        return output::piece(&gpu_page(t, gpu));
    }
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
    output::piece(&text)
}

/// What there is to tell about a GPU.
#[cfg(feature = "llvm")]
fn gpu_page(t: &TargetDesc, gpu: &quantc_ir::target::GpuDesc) -> String {
    let rates = &gpu.rates;
    format!(
        "{}\n\n{}\n\narchitecture  {}\nshared memory {} bytes of a block\nregisters     {} of a multiprocessor\n\
         bulk copies   {}\nfp8 products  {}\npredictions   by the rates of {}: {} multiprocessors, {} GB/s, \
         {} and {} Tmac/s of bf16 and int8\n",
        t.name,
        t.doc.trim(),
        gpu.arch,
        gpu.shared_bytes,
        gpu.registers,
        if gpu.bulk_copies { "yes" } else { "no" },
        if gpu.fp8_products { "yes" } else { "no" },
        rates.model,
        rates.multiprocessors,
        rates.memory_gb,
        rates.bf16_tmac,
        rates.int8_tmac,
    )
}

fn targets_table() -> Table {
    let row = |t: &'static TargetDesc| {
        let vectors = match t.gpu {
            Some(gpu) => gpu.arch.to_string(),
            None => format!("{} bit", t.cpu.vector_bits),
        };
        vec![t.name.to_string(), vectors, summary(t.doc)]
    };
    let host =
        vec!["host".into(), String::new(), "The best of the processors that this machine runs.".into()];
    Table::new(&["target", "vectors", "what it is"], targets::all().map(row).chain([host]))
}

/// `quantc targets` in a tool that does not compile.
#[cfg(not(feature = "llvm"))]
pub fn targets(_: Args) -> Outcome {
    Err(Diag::target("this build of quantc compiles nothing").help("build it with the feature `llvm`").into())
}

/// `quantc formats`.
pub fn formats(args: Args) -> Outcome {
    let Some(name) = args.name else { return output::piece(&formats_table().text()) };
    let names = formats::ALL.iter().map(|f| f.name);
    let f = Format::by_name(&name).ok_or_else(|| unknown("format", &name, names))?;
    let mut text = format!("{}\n\n{}\n\nbits   {}\nrange  {}\n", f.name, page(f.doc), f.bits, range(f));
    if f.bits <= 4 {
        let codes: Vec<String> = (0..1u32 << f.bits).map(|c| f.decode(c).to_string()).collect();
        text += &format!("codes  {}\n", codes.join(" "));
    }
    output::piece(&text)
}

fn formats_table() -> Table {
    let row = |f: &&'static Format| {
        vec![f.name.to_string(), f.bits.to_string(), range(f), factors(f), summary(f.doc)]
    };
    Table::new(&["format", "bits", "range", "multiplied with", "what it is"], formats::ALL.iter().map(row))
}

/// The types of activations that a matrix of this format is multiplied with by kernels of every target.
fn factors(f: &'static Format) -> String {
    let matrix = match Float::by_name(f.name) {
        Some(float) => float.into(),
        None => {
            let (group, zero) = (Group::Axis(0), Zero::Symmetric);
            ElemTy::Q(Scheme { format: f, group, zero, scale: Float::F32 })
        }
    };
    let runs = |x: ElemTy| TARGETS.iter().all(|t| CpuBackend::new(t).supports_matmul(x, matrix).is_ok());
    let known = [("f32", ElemTy::F32), ("int8", ElemTy::Q(DYNAMIC_INT8))];
    let names: Vec<&str> = known.into_iter().filter(|(_, x)| runs(*x)).map(|(name, _)| name).collect();
    names.join(", ")
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
    let Some(name) = args.name else { return output::piece(&ops_table().text()) };
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

fn ops_table() -> Table {
    let row = |k: &OpKind| vec![k.info().name.to_string(), summary(k.info().doc)];
    Table::new(&["op", "what it computes"], OpKind::ALL.iter().map(row))
}

/// `quantc presets`.
pub fn presets(args: Args) -> Outcome {
    let Some(name) = args.name else {
        let graphs = graph_presets_table().text();
        return output::piece(&format!("{}\nOf graphs over arrays:\n{graphs}", presets_table().text()));
    };
    let graph = presets::GraphPreset::get(&name).ok();
    let mut pages = vec![];
    // Both may have one of a name; what is no name of either is looked for among those of models of text.
    if graph.is_none() || presets::ALL.iter().any(|p| p.name == name) {
        let preset = presets::Preset::get(&name)?;
        pages.push(format!(
            "{}\n\n{}\n\nembedding  {}\nhead       {}\npipeline   {}\n",
            preset.name,
            page(preset.doc),
            preset.embedding,
            preset.head,
            preset.pipeline
        ));
    }
    if let Some(preset) = graph {
        let (name, doc) = (preset.name, page(preset.doc));
        pages.push(format!("{name} of graphs over arrays\n\n{doc}\n\npipeline   {}\n", preset.pipeline));
    }
    output::piece(&pages.join("\n"))
}

fn graph_presets_table() -> Table {
    let row = |p: &presets::GraphPreset| [p.name, p.doc].map(String::from).to_vec();
    Table::new(&["preset", "products"], presets::GRAPHS.iter().map(row))
}

fn presets_table() -> Table {
    let row = |p: &presets::Preset| [p.name, p.doc, p.embedding, p.head].map(String::from).to_vec();
    Table::new(&["preset", "matrices", "embedding", "head"], presets::ALL.iter().map(row))
}

fn architectures_table() -> Table {
    let row = |a: &Arch| vec![a.model_type.to_string(), a.classes.join(", "), format!("{}.", a.doc)];
    Table::new(&["`model_type`", "classes", "what is covered"], ARCHS.iter().map(row))
}

/// The tables of the manual in Markdown, by name.
pub fn tables(registry: &Registry) -> Vec<(&'static str, String)> {
    let tables = [
        ("passes", passes_table(registry)),
        ("presets", presets_table()),
        ("targets", targets_table()),
        ("formats", formats_table()),
        ("ops", ops_table()),
        ("architectures", architectures_table()),
    ];
    tables.into_iter().map(|(name, table)| (name, table.markdown())).collect()
}

/// A table with all columns to the left.
struct Table {
    head: &'static [&'static str],
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Every cell becomes one line.
    fn new(head: &'static [&'static str], rows: impl Iterator<Item = Vec<String>>) -> Table {
        let one_line = |cell: String| cell.split_whitespace().collect::<Vec<_>>().join(" ");
        Table { head, rows: rows.map(|row| row.into_iter().map(one_line).collect()).collect() }
    }

    fn text(&self) -> String {
        let plain = |cells: &[&str]| cells.iter().map(|c| c.replace('`', "")).collect::<Vec<_>>();
        let mut lines = vec![plain(self.head)];
        lines.extend(self.rows.iter().cloned());
        let width = |i: usize| lines.iter().map(|l| l[i].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.head.len()).map(width).collect();
        let line = |cells: &Vec<String>| {
            let padded: Vec<String> = cells.iter().zip(&widths).map(|(c, &w)| format!("{c:<w$}")).collect();
            padded.join("  ").trim_end().to_string() + "\n"
        };
        lines.iter().map(line).collect()
    }

    /// The first column is set as code.
    fn markdown(&self) -> String {
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let mut text = line(self.head.iter().map(|c| c.to_string()).collect());
        text += &format!("|{}\n", "---|".repeat(self.head.len()));
        for row in &self.rows {
            let mut cells: Vec<String> = row.iter().map(|c| c.replace('|', "\\|")).collect();
            cells[0] = format!("`{}`", cells[0]);
            text += &line(cells);
        }
        text
    }
}
