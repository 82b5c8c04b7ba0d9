//! Writes engines: a folder that the runtime maps and runs.
//!
//! The folder is made under a temporary name beside its place and renamed when it is whole, so an interrupted
//! compilation leaves no half an engine. Its bytes depend on the module, the target and the limits only.

use crate::arrays;
use crate::cuda::plan;
use crate::cuda::sample::SampleSpec;
use crate::kernels::{self, KernelReport, Objects};
use crate::lower::{self, BlobSource, EngineBlob, Limits, Lowered};
use crate::spec::{KernelSpec, MRange, Rows};
use crate::tune::Tuning;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::module::Module;
use quantc_ir::target::TargetDesc;
use quantc_ir::weights::Store;
use quantc_runtime::format::{
    self, Blob, Fact, File as FileEntry, Generation, Kind, Launch, Manifest, NO_BARRIER_AFTER, Program,
    REPLICATED, State, Tap,
};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Bytes copied at a time.
const CHUNK: usize = 1 << 20;
/// Bytes written at a time, from a multiple of their number on.
const BLOCK: usize = 8 << 20;
/// Bytes that the rows of results of one call may take.
const RESULT_BYTES: u64 = 32 << 20;
/// Most tokens of one call unless asked otherwise: enough rows for products to run at full speed, few enough that what lies
/// between two launches stays in the last cache.
const MAX_TOKENS: u32 = 256;

/// What an engine is made of.
pub struct Request<'a> {
    /// The model after its passes.
    pub module: &'a Module,
    /// Where its weights lie.
    pub store: &'a Store,
    /// The machine to compile for.
    pub target: &'static TargetDesc,
    /// Most tokens of one call; 0 for the usual number.
    pub max_tokens: u32,
    /// Every call has `max_tokens` tokens: leaves out the kernels for fewer.
    pub always_full: bool,
    /// Measured choices of tiles; without them the cost model chooses.
    pub tuning: Option<&'a Tuning>,
    /// Where kernels are found that were compiled before, for engines without a table.
    pub objects: Option<&'a Objects>,
    /// Further files of the folder, by name.
    pub files: Vec<(String, Vec<u8>)>,
    /// Further facts for the manifest.
    pub facts: Vec<(String, String)>,
    /// The report; kernels are added to it.
    pub report: serde_json::Map<String, serde_json::Value>,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Written {
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Weight bytes read to decode one token.
    pub decode_bytes_per_token: u64,
    /// Number of kernels.
    pub kernels: usize,
}

/// Compiles a module and writes the engine to `out`. An engine that lies there is replaced; anything else is refused.
pub fn write(request: Request<'_>, out: &Path) -> Result<Written> {
    check_place(out)?;
    let module = request.module;
    let encoder = match module.facts.get("kind").map(String::as_str) {
        Some("encoder") => true,
        Some("decoder") | None => false,
        Some(other) => {
            return Err(Diag::input(format!("fact `kind` is `{other}`, expected `decoder` or `encoder`")));
        }
    };
    let limits = Limits { always_full: request.always_full, ..limits(module, request.max_tokens, encoder)? };
    let lowered = lower::lower_for(request.target, module, request.store, limits)?;
    let folder = Folder::create(out)?;
    // Kernels are compiled while weights are packed and written.
    let (made, written) = std::thread::scope(|scope| {
        let made = scope.spawn(|| make(&request, &lowered));
        let written = write_weights(&folder, module, request.store, &lowered.blobs);
        (made.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), written)
    });
    let Made { kernels_file, bytes: object, mut reports, gpu } = made?;
    let (blobs, weights_file) = written?;
    name_launches(&mut reports, &lowered);
    let report = report_text(request.report, &reports)?;
    let mut files = vec![weights_file, folder.write(kernels_file, &object)?];
    files.push(folder.write("report.json", report.as_bytes())?);
    let pipeline = module.pipeline.clone().unwrap_or_default();
    files.push(folder.write("pipeline.txt", format!("{pipeline}\n").as_bytes())?);
    for (name, bytes) in &request.files {
        files.push(folder.write(name, bytes)?);
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));

    let streamed = lowered.blobs.iter().zip(&blobs).filter(|(b, _)| b.streamed).map(|(_, b)| b.len).sum();
    let numbers = |name: &str| -> Result<Vec<u32>> {
        let text = module.facts.get(name).map_or("", String::as_str);
        let parse = |word: &str| {
            word.parse().map_err(|_| Diag::input(format!("fact `{name}` is `{text}`, not token ids")))
        };
        text.split([',', ' ']).filter(|w| !w.is_empty()).map(parse).collect()
    };
    let mut facts: Vec<Fact> =
        module.facts.iter().map(|(k, v)| Fact { key: k.clone(), value: v.clone() }).collect();
    facts.extend(request.facts.into_iter().map(|(key, value)| Fact { key, value }));
    let manifest = Manifest {
        version: format::VERSION,
        quantc_version: env!("CARGO_PKG_VERSION").into(),
        model: module.name.clone(),
        kind: if encoder { Kind::Encoder } else { Kind::Decoder } as i32,
        target: target_of(request.target),
        context: limits.context,
        max_tokens: limits.max_tokens,
        max_rows: limits.max_rows,
        vocab: lowered.width,
        token_limit: module.fact_u64("vocab")?.unwrap_or(0).try_into().unwrap_or(0),
        arena_bytes: lowered.arena_bytes,
        scratch_bytes: lowered.scratch_bytes,
        weight_bytes: blobs.iter().map(|b| b.len).sum(),
        decode_bytes_per_token: streamed,
        weights: blobs,
        states: lowered
            .states
            .iter()
            .map(|(name, row_bytes)| State { name: name.clone(), row_bytes: *row_bytes })
            .collect(),
        programs: programs(&lowered),
        output: lowered.output,
        row_inputs: taps(&lowered.row_inputs),
        row_outputs: taps(&lowered.row_outputs),
        array_inputs: vec![],
        array_outputs: vec![],
        generation: Some(Generation { bos: numbers("bos")?.first().copied(), eos: numbers("eos")? }),
        files,
        pipeline,
        facts,
        gpu,
    };
    manifest.validate().map_err(|e| Diag::bug(format!("the engine's manifest is not valid: {e}")))?;
    folder.write(format::MANIFEST_TEXT_FILE, manifest.to_text().as_bytes())?;
    folder.write(format::MANIFEST_FILE, &manifest.encode_file())?;
    let written = Written {
        weight_bytes: manifest.weight_bytes,
        decode_bytes_per_token: streamed,
        kernels: reports.len(),
    };
    folder.publish(out)?;
    Ok(written)
}

/// Kernels, compiled.
struct Made {
    kernels_file: &'static str,
    bytes: Vec<u8>,
    reports: Vec<KernelReport>,
    gpu: Option<format::Gpu>,
}

fn make(request: &Request<'_>, lowered: &Lowered) -> Result<Made> {
    let Some(gpu) = request.target.gpu else {
        let specs = &specs(lowered);
        let (bytes, reports) = match (request.objects, request.tuning) {
            (Some(objects), None) => objects.compile(specs, request.target)?,
            (_, tuning) => kernels::compile(specs, request.target, tuning)?,
        };
        return Ok(Made { kernels_file: format::KERNELS_FILE, bytes, reports, gpu: None });
    };
    if request.tuning.is_some() {
        return Err(Diag::target(format!("there are no tuning tables for {}", request.target.name))
            .help("the target's cost model chooses"));
    }
    let programs = lowered.programs.iter();
    let wanted = programs.flat_map(|(tokens, launches)| {
        let want =
            |l: &lower::Launch| (l.symbol.clone(), plan::Want { spec: l.spec.clone(), tokens: *tokens });
        launches.iter().map(want)
    });
    let mut wanted: BTreeMap<String, plan::Want> = wanted.collect();
    let mut sampler = String::new();
    if request.module.facts.get("kind").is_none_or(|kind| kind == "decoder") {
        let spec = KernelSpec::Sample(SampleSpec { vocab: lowered.width, stride: lowered.width });
        let last = lowered.programs.last().map_or(1, |(tokens, _)| tokens.max);
        sampler = spec.key();
        wanted.insert(sampler.clone(), plan::Want { spec, tokens: MRange { min: 1, max: last } });
    }
    let code = plan::compile(&wanted, gpu, request.store)?;
    let report = |kernel: &plan::Compiled| KernelReport {
        symbol: kernel.launch.symbol.clone(),
        template: kernel.template,
        choice: kernel.choice.clone(),
        refused: vec![],
        launches: if kernel.launch.symbol == sampler { vec!["choice of tokens".into()] } else { vec![] },
        work: wanted.get(&kernel.launch.symbol).and_then(|want| kernels::Work::of(&want.spec)),
        product: None,
        gpu: Some(kernel.report.clone()),
    };
    let reports = code.kernels.iter().map(report).collect();
    let (launches, entries) = code.kernels.into_iter().map(|k| (k.launch, k.entry)).unzip();
    let (major, minor) = code.nvrtc;
    let gpu = format::Gpu {
        arch: gpu.arch.into(),
        page_rows: plan::PAGE,
        cuda: (major * 1000 + minor * 10) as u32,
        kernels: launches,
        sampler,
    };
    let bytes = format::GpuCode { kernels: entries }.encode_file();
    Ok(Made { kernels_file: format::GPU_KERNELS_FILE, bytes, reports, gpu: Some(gpu) })
}

/// A graph over arrays to be compiled.
pub struct GraphRequest<'a> {
    /// The graph after its passes.
    pub module: &'a Module,
    /// Where its weights lie.
    pub store: &'a Store,
    /// The machine to compile for.
    pub target: &'static TargetDesc,
    /// Names of the parameters of `main`.
    pub inputs: &'a [String],
    /// Names of its results.
    pub outputs: &'a [String],
    /// Further facts for the manifest.
    pub facts: Vec<(String, String)>,
    /// The report; kernels are added to it.
    pub report: serde_json::Map<String, serde_json::Value>,
}

/// Compiles a graph over arrays and writes the engine to `out`. An engine that lies there is replaced; anything else is
/// refused.
pub fn write_graph(request: GraphRequest<'_>, out: &Path) -> Result<Written> {
    check_place(out)?;
    let module = request.module;
    let lowered = arrays::lower(module, request.store, request.target, request.inputs, request.outputs)?;
    let specs: BTreeMap<String, KernelSpec> =
        lowered.launches.iter().map(|l| (l.spec.key(), l.spec.clone())).collect();
    let (object, mut reports) = kernels::compile(&specs, request.target, None)?;
    for report in &mut reports {
        let of = lowered.launches.iter().filter(|l| l.spec.key() == report.symbol);
        for launch in of {
            if !report.launches.contains(&launch.name) {
                report.launches.push(launch.name.clone());
            }
        }
    }
    let folder = Folder::create(out)?;
    let (blobs, weights_file) = write_weights(&folder, module, request.store, &lowered.blobs)?;
    let mut files = vec![weights_file, folder.write(format::KERNELS_FILE, &object)?];
    files.push(folder.write("report.json", report_text(request.report, &reports)?.as_bytes())?);
    let pipeline = module.pipeline.clone().unwrap_or_default();
    files.push(folder.write("pipeline.txt", format!("{pipeline}\n").as_bytes())?);
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let launches = lowered.launches.iter().map(|l| Launch {
        symbol: l.spec.key(),
        name: l.name.clone(),
        args: l.args.clone(),
        items: l.items,
        tap: None,
        flags: if l.overlaps_next { NO_BARRIER_AFTER } else { 0 },
    });
    let mut facts: Vec<Fact> =
        module.facts.iter().map(|(k, v)| Fact { key: k.clone(), value: v.clone() }).collect();
    facts.extend(request.facts.into_iter().map(|(key, value)| Fact { key, value }));
    let weight_bytes = blobs.iter().map(|b| b.len).sum();
    let manifest = Manifest {
        quantc_version: env!("CARGO_PKG_VERSION").into(),
        model: module.name.clone(),
        kind: Kind::Graph as i32,
        target: target_of(request.target),
        context: 1,
        max_tokens: 1,
        max_rows: 1,
        vocab: 1,
        arena_bytes: lowered.arena_bytes,
        weight_bytes,
        decode_bytes_per_token: weight_bytes,
        weights: blobs,
        programs: vec![Program { min_t: 1, max_t: 1, launches: launches.collect() }],
        output: format::Ref::arena(0),
        array_inputs: lowered.inputs,
        array_outputs: lowered.outputs,
        files,
        pipeline,
        facts,
        ..Manifest::empty()
    };
    manifest.validate().map_err(|e| Diag::bug(format!("the engine's manifest is not valid: {e}")))?;
    folder.write(format::MANIFEST_TEXT_FILE, manifest.to_text().as_bytes())?;
    folder.write(format::MANIFEST_FILE, &manifest.encode_file())?;
    folder.publish(out)?;
    Ok(Written { weight_bytes, decode_bytes_per_token: weight_bytes, kernels: specs.len() })
}

/// The report with its kernels, as text.
fn report_text(
    mut report: serde_json::Map<String, serde_json::Value>,
    kernels: &[KernelReport],
) -> Result<String> {
    let kernels = serde_json::to_value(kernels)
        .map_err(|e| Diag::bug(format!("the report does not serialize: {e}")))?;
    report.insert("kernels".into(), kernels);
    Ok(serde_json::to_string_pretty(&report).map_err(|e| Diag::bug(format!("the report: {e}")))? + "\n")
}

/// A target as the manifest names it.
fn target_of(target: &TargetDesc) -> format::Target {
    format::Target {
        name: target.name.into(),
        arch: "x86_64".into(),
        features: target.cpu.features.iter().map(|f| f.to_string()).collect(),
    }
}

/// Sizes that follow from the module.
fn limits(module: &Module, max_tokens: u32, encoder: bool) -> Result<Limits> {
    let context = module.fact_u64("context")?.unwrap_or(512);
    let context = u32::try_from(context).ok().filter(|c| (1..=format::MAX_CONTEXT).contains(c));
    let context = context.ok_or_else(|| Diag::input("fact `context` is out of range"))?;
    let asked = if max_tokens == 0 { MAX_TOKENS } else { max_tokens };
    // An encoder sees its whole input at once.
    let max_tokens = if encoder { context } else { asked.min(context) }.min(format::MAX_TOKENS);
    let result = *module.main.results.first().ok_or_else(|| Diag::input("@main has no result"))?;
    let width = module.main.ty(result).shape.last().and_then(|d| d.fixed()).unwrap_or(1);
    let max_rows = if encoder {
        max_tokens
    } else {
        u32::try_from(RESULT_BYTES / (4 * width.max(1))).unwrap_or(u32::MAX).clamp(1, max_tokens)
    };
    Ok(Limits { max_tokens, max_rows, context, always_full: false })
}

/// Every kernel of a lowered module by its symbol.
fn specs(lowered: &Lowered) -> BTreeMap<String, KernelSpec> {
    let launches = lowered.programs.iter().flat_map(|(_, launches)| launches);
    launches.map(|l| (l.symbol.clone(), l.spec.clone())).collect()
}

fn name_launches(reports: &mut [KernelReport], lowered: &Lowered) {
    let mut names: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for launch in lowered.programs.iter().flat_map(|(_, launches)| launches) {
        let users = names.entry(launch.symbol.clone()).or_default();
        if !users.contains(&launch.name) {
            users.push(launch.name.clone());
        }
    }
    for report in reports {
        report.launches.extend(names.remove(&report.symbol).unwrap_or_default());
    }
}

fn programs(lowered: &Lowered) -> Vec<Program> {
    let launch = |l: &lower::Launch| Launch {
        symbol: l.symbol.clone(),
        name: l.name.clone(),
        args: l.args.clone(),
        items: l.items,
        tap: l.tap.as_ref().map(tap),
        flags: if l.overlaps_next { NO_BARRIER_AFTER } else { 0 } | if l.replicated { REPLICATED } else { 0 },
    };
    let mut from = 1;
    let program = |(range, launches): &(crate::spec::MRange, Vec<lower::Launch>)| {
        let min_t = std::mem::replace(&mut from, range.max + 1);
        Program { min_t, max_t: range.max, launches: launches.iter().map(launch).collect() }
    };
    lowered.programs.iter().map(program).collect()
}

fn taps(rows: &[lower::Rows32]) -> Vec<Tap> {
    rows.iter().map(tap).collect()
}

fn tap(r: &lower::Rows32) -> Tap {
    Tap { name: r.name.clone(), at: r.at, width: r.width, of_results: r.rows == Rows::R }
}

/// Writes `weights.bin`, blob by blob.
fn write_weights(
    folder: &Folder,
    module: &Module,
    store: &Store,
    sources: &[EngineBlob],
) -> Result<(Vec<Blob>, FileEntry)> {
    let mut out = Sink::create(folder.path.join(format::WEIGHTS_FILE))?;
    let mut blobs = vec![];
    for source in sources {
        out.pad(format::BLOB_ALIGN)?;
        let (offset, mut hash) = (out.len, blake3::Hasher::new());
        let mut put = |bytes: &[u8]| -> Result<()> {
            hash.update(bytes);
            out.put(bytes)
        };
        match &source.source {
            BlobSource::Made(bytes) => put(bytes)?,
            BlobSource::Stored(digest) => match store.blob_path(*digest) {
                None => put(&store.read_blob(*digest)?)?,
                Some(path) => copy_file(&path, &mut put)?,
            },
            BlobSource::Weight(id) => {
                let view = store.view(&module.weights, *id)?;
                for rows in view.row_blocks(CHUNK) {
                    let mut block = vec![0; view.row_bytes() * rows.len()];
                    view.read_rows_bytes(rows.start, rows.len(), &mut block)?;
                    put(&block)?;
                    view.release(rows);
                }
            }
        }
        let len = out.len - offset;
        let digest = hash.finalize().as_bytes().to_vec();
        if let BlobSource::Stored(stored) = &source.source
            && (stored.0[..] != digest[..] || source.bytes.is_some_and(|bytes| bytes != len))
        {
            let diag = Diag::input(format!(
                "the packed bytes of weight @{} are not what kernels expect",
                source.name
            ));
            return Err(diag.in_file(store.dir().unwrap_or(Path::new("memory")).display().to_string()).help(
                "the folder of derived weights is damaged, or the module names a blob of something else",
            ));
        }
        let (name, streamed) = (source.name.clone(), source.streamed);
        blobs.push(Blob { name, offset, len, digest, streamed });
    }
    Ok((blobs, out.finish(format::WEIGHTS_FILE)?))
}

fn copy_file(path: &Path, put: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    use std::io::Read;
    let io =
        |e: std::io::Error| Diag::system(format!("cannot read it: {e}")).in_file(path.display().to_string());
    let mut file = File::open(path).map_err(io)?;
    let mut block = vec![0; CHUNK];
    loop {
        match file.read(&mut block).map_err(io)? {
            0 => return Ok(()),
            n => put(&block[..n])?,
        }
    }
}

/// A file that is hashed while it is written.
///
/// The file is written in whole blocks at multiples of their size: file systems that keep what is written in
/// large pages then have huge ones for weights, and engines run from those at full speed without a copy.
struct Sink {
    file: File,
    /// What is not yet a whole block.
    block: Vec<u8>,
    path: PathBuf,
    hash: blake3::Hasher,
    len: u64,
}

impl Sink {
    fn create(path: PathBuf) -> Result<Sink> {
        let file = File::create(&path).map_err(|e| cannot_write(&path, &e))?;
        Ok(Sink { file, block: Vec::with_capacity(BLOCK), path, hash: blake3::Hasher::new(), len: 0 })
    }
    fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(BLOCK - self.block.len()));
            self.block.extend_from_slice(now);
            bytes = rest;
            if self.block.len() == BLOCK {
                self.flush()?;
            }
        }
        Ok(())
    }
    fn flush(&mut self) -> Result<()> {
        self.file.write_all(&self.block).map_err(|e| cannot_write(&self.path, &e))?;
        self.block.clear();
        Ok(())
    }
    fn pad(&mut self, align: u64) -> Result<()> {
        let missing = self.len.next_multiple_of(align) - self.len;
        self.put(&vec![0; missing as usize])
    }
    fn finish(mut self, name: &str) -> Result<FileEntry> {
        self.flush()?;
        Ok(FileEntry { name: name.into(), len: self.len, digest: self.hash.finalize().as_bytes().to_vec() })
    }
}

fn cannot_write(path: &Path, e: &std::io::Error) -> Diag {
    Diag::system(format!("cannot write: {e}")).in_file(path.display().to_string())
}

/// Refuses to replace what is not an engine. [`write`] asks it too; ask it before long work.
pub fn check_place(out: &Path) -> Result<()> {
    if !out.exists() || out.join(format::MANIFEST_FILE).is_file() {
        return Ok(());
    }
    let empty = fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
    if empty {
        return Ok(());
    }
    Err(Diag::input("there is something here already, and it is not an engine")
        .in_file(out.display().to_string())
        .help("name another output folder"))
}

/// A folder under a temporary name; dropped before it is published, it is gone.
struct Folder {
    path: PathBuf,
}

impl Folder {
    fn create(out: &Path) -> Result<Folder> {
        let name = out.file_name().ok_or_else(|| Diag::input("the output must be a folder with a name"))?;
        let parent = match out.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(|e| cannot_write(parent, &e))?;
        let (partial, replaced) = (temporary(name, "partial"), temporary(name, "replaced"));
        // What a killed compilation to the same place has left.
        for entry in fs::read_dir(parent).map_err(|e| cannot_write(parent, &e))?.flatten() {
            let name = entry.file_name();
            let owner = |prefix| name.to_string_lossy().strip_prefix(prefix)?.parse::<u32>().ok();
            let owner = owner(partial.as_str()).or_else(|| owner(replaced.as_str()));
            if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let path = parent.join(format!("{partial}{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).map_err(|e| cannot_write(&path, &e))?;
        Ok(Folder { path })
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<FileEntry> {
        let mut sink = Sink::create(self.path.join(name))?;
        sink.put(bytes)?;
        sink.finish(name)
    }

    /// Moves the folder to its place.
    fn publish(self, out: &Path) -> Result<()> {
        if !out.exists() {
            return fs::rename(&self.path, out).map_err(|e| cannot_write(out, &e));
        }
        let name = out.file_name().unwrap_or_default();
        let old = self.path.with_file_name(format!("{}{}", temporary(name, "replaced"), std::process::id()));
        let _ = fs::remove_dir_all(&old);
        fs::rename(out, &old).map_err(|e| cannot_write(out, &e))?;
        if let Err(e) = fs::rename(&self.path, out) {
            let _ = fs::rename(&old, out);
            return Err(cannot_write(out, &e));
        }
        fs::remove_dir_all(&old).map_err(|e| cannot_write(&old, &e))
    }
}

/// How the name of a folder beside `name` begins that belongs to one process, whose number follows.
fn temporary(name: &std::ffi::OsStr, what: &str) -> String {
    format!(".{}.{what}-", name.to_string_lossy())
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}
