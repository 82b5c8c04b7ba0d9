//! A whole model of 8 billion weights: tokens per second, beside what its bytes take at least.
//!
//! A folder carries the plan and the kernels of such an engine and what is small of it. Its matrices are made on the GPU's
//! machine, from random codes and scales. The engine is then run as any other.

use crate::ceilings::Ceilings;
use crate::device::Fault;
use crate::inputs::{self};
use crate::interpreted::Interpreter;
use crate::kernel::Packed;
use crate::parts::{Part, Verdict};
use crate::random::Random;
use crate::report::{Table, WRONG, judged, percent};
use quantc::ir::diag::{Diag, Result};
use quantc_codegen::cuda::plan::{self, Want};
use quantc_codegen::eexpr::{EExpr, MemTy};
use quantc_codegen::spec::{AFmt, Code, KernelSpec, MatmulSpec};
use quantc_runtime::engine::{Engine, OpenOptions, Pages, read_file, read_manifest};
use quantc_runtime::format::{
    BLOB_ALIGN, Blob, DIGEST_BYTES, File, GPU_KERNELS_FILE, GpuCode, GpuEntry, MANIFEST_FILE, Manifest,
    RefKind, WEIGHTS_FILE,
};
use quantc_runtime::sample::{SampleOptions, Sampler};
use quantc_runtime::session::{Session, SessionOptions};
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// How names of plans end.
const SUFFIX: &str = ".plan";

/// What is small of the weights, in their order.
const KEPT: &str = "kept.bin";

/// Bytes of weights that are kept as they are.
const SMALL: u64 = 1 << 20;

/// Writes what of an engine is not large: its manifest, kernels and small weights. Layers that share their weights get each its
/// own, in the order in which they use them.
pub fn plan(engine: &Path, out: &Path) -> Result<()> {
    let runtime = |e: quantc_runtime::Error| Diag::input(e.to_string());
    let mut manifest = read_manifest(engine).map_err(runtime)?;
    let kernels = read_file(engine, &manifest, GPU_KERNELS_FILE).map_err(runtime)?;
    let options = OpenOptions { verify_weights: false, pages: Pages::Mapped };
    let opened = Engine::open(engine, &options).map_err(runtime)?;
    let order = spread(&mut manifest);
    let (mut blobs, mut kept, mut end) = (vec![], vec![], 0u64);
    for (index, number) in order {
        let shared = &manifest.weights[index as usize];
        let bytes = opened.weight(index as usize).unwrap_or_default();
        if shared.len <= SMALL {
            kept.extend_from_slice(bytes);
        }
        let offset = end.next_multiple_of(BLOB_ALIGN);
        end = offset + shared.len;
        let name = if number == 0 { shared.name.clone() } else { format!("{}.{number}", shared.name) };
        // What there will be is not known yet, and is not verified.
        blobs.push(Blob { name, offset, digest: vec![0; DIGEST_BYTES], ..shared.clone() });
    }
    manifest.weight_bytes = blobs.iter().map(|b| b.len).sum();
    manifest.decode_bytes_per_token = blobs.iter().filter(|b| b.streamed).map(|b| b.len).sum();
    manifest.weights = blobs;
    manifest.files.retain(|f| f.name == GPU_KERNELS_FILE);
    manifest.files.push(File { name: WEIGHTS_FILE.into(), len: end, digest: vec![0; DIGEST_BYTES] });
    manifest.validate().map_err(runtime)?;
    std::fs::create_dir_all(out).map_err(|e| crate::system(out, &e))?;
    for (name, bytes) in [(MANIFEST_FILE, manifest.encode_file()), (GPU_KERNELS_FILE, kernels), (KEPT, kept)]
    {
        let at = out.join(name);
        std::fs::write(&at, bytes).map_err(|e| crate::system(&at, &e))?;
    }
    println!("a plan for {} bytes of weights in {}", manifest.weight_bytes, out.display());
    Ok(())
}

/// Gives each use of a weight within a program a weight of its own; the shared weight and the number of its use, for each of
/// them.
fn spread(manifest: &mut Manifest) -> Vec<(u32, u32)> {
    let mut own: BTreeMap<(u32, u32), u32> = BTreeMap::new();
    let mut order = vec![];
    for program in &mut manifest.programs {
        let mut uses: BTreeMap<u32, u32> = BTreeMap::new();
        for arg in program.launches.iter_mut().flat_map(|l| &mut l.args) {
            let Some(RefKind::Weight(index)) = &mut arg.kind else { continue };
            let number = uses.entry(*index).or_default();
            let shared = (*index, *number);
            *number += 1;
            *index = *own.entry(shared).or_insert_with(|| {
                order.push(shared);
                order.len() as u32 - 1
            });
        }
    }
    order
}

/// Sizes of random numbers of weights: with rows of some thousands, what comes out is about as large as what goes in.
const SIZE: f32 = 1.0 / 32.0;

/// The bytes that a large weight repeats, by the kernel that reads it and the place among its arguments.
fn piece(want: Option<&Want>, place: usize, random: &mut Random) -> Result<Vec<u8>> {
    let small = |random: &mut Random| -> Vec<u8> {
        let number = |_| half::bf16::from_f32(random.float() * SIZE).to_le_bytes();
        (0..1 << 20).flat_map(number).collect()
    };
    Ok(match want.map(|w| &w.spec) {
        Some(KernelSpec::Matmul(s) | KernelSpec::TiledMatmul(s)) => {
            let before = if s.a == AFmt::I8Token { 3 } else { 1 };
            if !(before..before + s.products() as usize).contains(&place) {
                return Ok(small(random));
            }
            let n = 48.min(s.n);
            let part = MatmulSpec { n, epilogue: EExpr::store_acc(MemTy::F32, n), ..s.clone() };
            let mut matrix = random.matrix(n, s.k, s.w);
            matrix.scales.iter_mut().for_each(|scale| *scale *= 4.0 * SIZE);
            if s.w.code == Code::Bf16 {
                matrix.codes = small(random).into_iter().cycle().take((n * s.k * 2) as usize).collect();
            }
            inputs::packed(&part, &matrix)?
        }
        Some(KernelSpec::Gather(s)) if s.ty != MemTy::Bf16 => random.numbers(s.ty, 1 << 20),
        // bf16 is sane as whatever it may be read: floats, and codes.
        _ => small(random),
    })
}

/// Makes the weights of a plan, as a file beside it in `folder`.
fn fill(plan: &Path, manifest: &Manifest, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| crate::system(folder, &e))?;
    for name in [MANIFEST_FILE, GPU_KERNELS_FILE] {
        let (from, to) = (plan.join(name), folder.join(name));
        std::fs::copy(&from, &to).map_err(|e| crate::system(&from, &e))?;
    }
    let read = |name: &str| std::fs::read(plan.join(name)).map_err(|e| crate::system(&plan.join(name), &e));
    let code = GpuCode::decode_file(&read(GPU_KERNELS_FILE)?).map_err(|e| Diag::input(e.to_string()))?;
    let specs: BTreeMap<&str, Want> = code
        .kernels
        .iter()
        .filter_map(|k| Some((k.symbol.as_str(), serde_json::from_str(&k.spec).ok()?)))
        .collect();
    let mut readers: BTreeMap<u32, (&str, usize)> = BTreeMap::new();
    for launch in manifest.programs.iter().flat_map(|p| &p.launches) {
        for (place, arg) in launch.args.iter().enumerate() {
            if let Some(RefKind::Weight(index)) = arg.kind {
                readers.entry(index).or_insert((&launch.symbol, place));
            }
        }
    }
    let kept = read(KEPT)?;
    let (mut rest, mut random) = (&kept[..], Random(8));
    let mut pieces: BTreeMap<(&str, usize), Arc<Vec<u8>>> = BTreeMap::new();
    // Place, bytes, and what they repeat.
    let mut jobs: Vec<(u64, u64, Arc<Vec<u8>>)> = vec![];
    for (index, blob) in (0..).zip(&manifest.weights) {
        let bytes = match readers.get(&index) {
            _ if blob.len <= SMALL => {
                let short = || Diag::input("it is too short").in_file(plan.join(KEPT).display().to_string());
                let (own, after) = rest.split_at_checked(blob.len as usize).ok_or_else(short)?;
                rest = after;
                Arc::new(own.to_vec())
            }
            Some(reader) => match pieces.get(reader) {
                Some(piece) => piece.clone(),
                None => {
                    let piece = Arc::new(piece(specs.get(reader.0), reader.1, &mut random)?);
                    pieces.insert(*reader, piece.clone());
                    piece
                }
            },
            None => continue,
        };
        jobs.push((blob.offset, blob.len, bytes));
    }
    let at = folder.join(WEIGHTS_FILE);
    let io = |e: std::io::Error| crate::system(&at, &e);
    let file = std::fs::File::create(&at).map_err(io)?;
    let length = manifest.file(WEIGHTS_FILE).map_or(0, |f| f.len);
    file.set_len(length).map_err(io)?;
    let next = AtomicUsize::new(0);
    let work = || -> std::io::Result<()> {
        loop {
            let Some((offset, len, bytes)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) else {
                return Ok(());
            };
            let mut done = 0;
            while done < *len {
                let part = &bytes[..bytes.len().min((len - done) as usize)];
                file.write_all_at(part, offset + done)?;
                done += part.len() as u64;
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(12);
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        running.into_iter().try_for_each(|thread| match thread.join() {
            Ok(done) => done.map_err(io),
            Err(_) => Err(Diag::bug("a thread that fills weights panicked")),
        })
    })
}

/// Sequences side by side.
const BATCHES: [u32; 5] = [1, 8, 16, 32, 64];

/// Tokens of each sequence before those that are timed.
const PROMPT: usize = 256;

/// Timed steps of a batch, after some that are not: the first one gives logits, which are looked at.
const STEPS: [usize; 2] = [3, 24];

/// What of the least time is wanted of a quantized model with one sequence.
const WANTED: f64 = 0.6;

/// Runs the plans of the folder.
pub fn run(part: &Part<'_>, packed: &Packed) -> Result<Verdict> {
    let ceilings = Ceilings::read(part.scratch, &packed.target.gpu);
    let listed = std::fs::read_dir(part.folder).map_err(|e| crate::system(part.folder, &e))?;
    let mut plans: Vec<PathBuf> = listed
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.to_string_lossy().ends_with(SUFFIX))
        .collect();
    // bf16 comes first: the others are measured by it.
    plans.sort();
    if plans.is_empty() {
        println!("## Whole models\n\nThere are no plans in the folder.\n");
        return Ok(Verdict::Right);
    }
    let note = format!(
        "Weights are random; each sequence has {PROMPT} tokens before. A step is from token ids to the ids of the next tokens, \
         which the device chooses. The floor is what reading its weights and caches takes. {}",
        ceilings.note()
    );
    let columns = ["engine", "call", "us", "tokens/s", "floor us", "share of it", "times bf16", "wanted", ""];
    let mut table = Table::new(part, "Whole models", &note, &columns);
    let mut bf16: BTreeMap<u32, f64> = BTreeMap::new();
    for (i, plan) in plans.iter().enumerate() {
        let name = plan.file_name().unwrap_or_default().to_string_lossy().trim_end_matches(SUFFIX).to_owned();
        let folder = part.scratch.join(format!("{name}.engine"));
        let done = table.each(i, |say| one(&name, plan, &folder, part, packed, i, &ceilings, &mut bf16, say));
        let _ = std::fs::remove_dir_all(&folder);
        done?;
    }
    Ok(table.finish())
}

fn refused(e: quantc_runtime::Error) -> Fault {
    Fault::Wrong(e.to_string().replace('\n', " "))
}

#[expect(clippy::too_many_arguments, reason = "a closure's captures, written down")]
fn one(
    name: &str,
    plan: &Path,
    folder: &Path,
    part: &Part<'_>,
    packed: &Packed,
    number: usize,
    ceilings: &Ceilings,
    bf16: &mut BTreeMap<u32, f64>,
    say: &mut dyn FnMut(Vec<String>),
) -> std::result::Result<(), Fault> {
    let manifest = read_manifest(plan).map_err(refused)?;
    // The interpreter takes its time.
    let mut slots = if crate::interpreted() { 1 } else { BATCHES[BATCHES.len() - 1] };
    let mut driver = match crate::interpreted() {
        true => Box::new(interpreter(plan, packed)?),
        false => quantc_runtime::gpu::driver().map_err(refused)?,
    };
    let free = driver.device().map_err(refused)?.free;
    let need = |slots: u32| manifest.device_bytes(slots).map_or(u64::MAX, |bytes| bytes.total());
    while slots > 1 && need(slots) > free {
        slots /= 2;
    }
    if need(slots) > free {
        say(row(name, &format!("left out: it needs {} bytes, {free} are free", need(slots))));
        return Ok(());
    }
    fill(plan, &manifest, folder)?;
    part.reached(number)?;
    let options = OpenOptions { verify_weights: false, pages: Pages::Mapped };
    let engine = Arc::new(Engine::open(folder, &options).map_err(refused)?);
    let loaded = engine.load_with(driver).map_err(refused)?;
    let options = SessionOptions { slots, ..SessionOptions::default() };
    let mut session = Session::new(engine, &options).map_err(refused)?;
    drop(loaded);
    part.reached(number)?;
    let vocab = if manifest.token_limit == 0 { manifest.vocab } else { manifest.token_limit };
    let mut random = Random(9);
    let mut tokens = |count: usize| -> Vec<u32> { (0..count).map(|_| random.below(vocab)).collect() };
    // The largest one is chosen, as where nothing else is asked for.
    let sampler = || Sampler::new(SampleOptions::default(), manifest.vocab as usize);
    let mut samplers =
        (0..slots).map(|_| sampler()).collect::<std::result::Result<Vec<_>, _>>().map_err(refused)?;
    // A prompt as long as a context has room for, and again once graphs are recorded.
    let long = (manifest.context as usize - 1).min(if crate::interpreted() { 4 } else { 1024 });
    let mut best = f64::INFINITY;
    // The first time its logits are looked at; then tokens are chosen, at first while graphs are recorded.
    sane(session.prefill(0, &tokens(long), 1).map_err(refused)?)?;
    for _ in 0..3 {
        session.reset(0).map_err(refused)?;
        let prompt = tokens(long);
        let start = Instant::now();
        session.prefill_next(0, &prompt, &mut samplers[0]).map_err(refused)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    let cells = [format!("prompt of {long} tokens"), format!("{:.0}", best * 1e6)];
    let rate = format!("{:.0}", long as f64 / best);
    let blank = || std::iter::repeat_n(String::new(), 5);
    say(std::iter::once(name.to_owned()).chain(cells).chain([rate]).chain(blank()).collect());
    let prompt = if crate::interpreted() { 2 } else { PROMPT.min(manifest.context as usize / 4) };
    let mut ready = 0;
    for batch in BATCHES.into_iter().filter(|&batch| batch <= slots) {
        part.reached(number)?;
        if part.over() {
            say(row(name, &format!("{batch} sequences: left out, the part's time was over")));
            continue;
        }
        let all: Vec<u32> = (0..batch).collect();
        for slot in ready.min(batch)..batch {
            session.reset(slot).map_err(refused)?;
            session.prefill(slot, &tokens(prompt), 1).map_err(refused)?;
        }
        ready = batch;
        let mut times = vec![];
        for step in 0..if crate::interpreted() { STEPS[0] + 1 } else { STEPS[0] + STEPS[1] } {
            let mut ids = tokens(batch as usize);
            if step == 0 {
                sane(session.decode_batch(&all, &ids).map_err(refused)?)?;
                continue;
            }
            let choosing = &mut samplers[..batch as usize];
            let start = Instant::now();
            session.decode_batch_next(&all, &mut ids, choosing).map_err(refused)?;
            if step >= STEPS[0] {
                times.push(start.elapsed().as_secs_f64());
            }
        }
        times.sort_unstable_by(f64::total_cmp);
        let us = times[times.len() / 2] * 1e6;
        let each: u64 = manifest.states.iter().map(|s| s.row_bytes).sum();
        let seen: u64 = all.iter().map(|&slot| u64::from(session.position(slot))).sum();
        let floor = (manifest.decode_bytes_per_token + each * seen) as f64 / ceilings.read / 1e3;
        let is_bf16 = name == "bf16";
        if is_bf16 {
            bf16.insert(batch, us);
        }
        let times_bf16 = bf16.get(&batch).filter(|_| !is_bf16).map(|other| other / us);
        let (wanted, said) = match (is_bf16, batch) {
            (true, _) => (String::new(), String::new()),
            (false, 1) => (format!("{} of the floor", percent(WANTED)), judged(floor / us >= WANTED)),
            _ => ("faster than bf16".into(), times_bf16.map_or(String::new(), |t| judged(t > 1.0))),
        };
        say(vec![
            name.to_owned(),
            format!("{batch} sequences"),
            format!("{us:.0}"),
            format!("{:.0}", f64::from(batch) * 1e6 / us),
            format!("{floor:.0}"),
            percent(floor / us),
            times_bf16.map_or(String::new(), |t| format!("{t:.2}")),
            wanted,
            said,
        ]);
    }
    Ok(())
}

/// The kernels of a plan, in the interpreter.
fn interpreter(plan: &Path, packed: &Packed) -> Result<Interpreter> {
    let at = plan.join(GPU_KERNELS_FILE);
    let bytes = std::fs::read(&at).map_err(|e| crate::system(&at, &e))?;
    let code = GpuCode::decode_file(&bytes).map_err(|e| Diag::input(e.to_string()))?;
    let gpu = &packed.target.gpu;
    let kernel = |entry: &GpuEntry| {
        let want: Want = serde_json::from_str(&entry.spec).map_err(|e| Diag::input(e.to_string()))?;
        plan::kernel(&entry.symbol, &want, gpu).map(|planned| planned.kernel)
    };
    let kernels = code.kernels.iter().map(kernel).collect::<Result<_>>()?;
    Ok(Interpreter::with(kernels, gpu.arch))
}

/// A row that only says something.
fn row(name: &str, what: &str) -> Vec<String> {
    let mut cells = vec![name.to_owned(), what.to_owned()];
    cells.resize(9, String::new());
    cells
}

/// Logits are numbers, and not all the same.
fn sane(logits: &[f32]) -> std::result::Result<(), Fault> {
    let first = logits.first().copied().unwrap_or(f32::NAN);
    match logits.iter().all(|x| x.is_finite()) && logits.iter().any(|&x| x != first) {
        true => Ok(()),
        false => Err(Fault::Wrong(format!("logits are no numbers or all the same: {first} {WRONG}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quantc_runtime::format::{Items, Launch, Program, Ref, Sym};

    #[test]
    fn every_use_has_its_own_weight() {
        let launch = |weights: &[u32]| Launch {
            symbol: "k".into(),
            name: "k".into(),
            args: weights.iter().map(|&w| Ref::weight(w)).chain([Ref::arena(0)]).collect(),
            items: Items { n: 1, sym: Sym::One as i32, div: 1 },
            tap: None,
            flags: 0,
        };
        // A table, two layers that share, and both in each of two programs.
        let launches = vec![launch(&[2]), launch(&[0, 1]), launch(&[0, 1])];
        let program = |min_t, max_t| Program { min_t, max_t, launches: launches.clone() };
        let mut manifest = Manifest { programs: vec![program(1, 1), program(2, 9)], ..Manifest::empty() };
        assert_eq!(spread(&mut manifest), [(2, 0), (0, 0), (1, 0), (0, 1), (1, 1)]);
        for program in &manifest.programs {
            let args = program.launches.iter().flat_map(|l| &l.args);
            let weights: Vec<u32> = args
                .filter_map(|a| match a.kind {
                    Some(RefKind::Weight(w)) => Some(w),
                    _ => None,
                })
                .collect();
            assert_eq!(weights, [0, 1, 2, 3, 4]);
        }
    }
}
