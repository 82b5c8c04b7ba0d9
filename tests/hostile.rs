//! Damaged files: each is read, or refused with an error that names the file. Nothing panics and nothing takes long.
//!
//! The damage is the same in every run: it is drawn from a generator with a fixed seed, and a failure tells the case.
#![cfg(feature = "llvm")]

mod common;

use common::{Recipe, copy_folder, folder, models, quantc};
use quantc_codegen::{backend::CpuBackend, targets};
use quantc_frontends::{ImportOptions, Tokenizer};
use quantc_ir::diag::Diags;
use quantc_ir::module::Module;
use quantc_ir::weights::Store;
use quantc_ir::{diag, text, verify};
use quantc_passes::{Registry, manager, pass::Env, pipeline, presets::Preset};
use quantc_runtime::format::{DIGEST_BYTES, MAGIC, MANIFEST_FILE};
use quantc_runtime::{Engine, Object, OpenOptions, Session, SessionOptions};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Damaged copies of each file that are tried inside this process.
const CASES: u64 = 200;

/// Damaged copies of each file that the tool is run on.
const RUNS: u64 = 10;

/// The longest that one case may take on a busy machine.
const LONGEST: Duration = Duration::from_secs(30);

/// What tends to hurt readers of text.
const PIECES: &[&str] = &[
    "-1",
    "0",
    "1",
    "1e999",
    "-0.0",
    "NaN",
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
    "0.5",
    "65536",
    "4294967296",
    "2147483647",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "99999999999999999999",
    "[[[[[[[[[[[[[[[[",
    "((((((((",
    "\"",
    "}",
    "]",
    ",",
    ":",
    "%",
    "@",
    "?",
    "\u{0}",
    "\u{FFFD}",
    "\n",
    "x",
    "7",
];

/// A source of damage.
struct Damage(ChaCha8Rng);

impl Damage {
    fn new(seed: u64) -> Damage {
        Damage(ChaCha8Rng::seed_from_u64(seed))
    }

    fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n.max(1) as u64) as usize
    }

    /// A damaged copy: cut off, bits flipped, parts repeated elsewhere or left out, numbers and other pieces replaced.
    fn of(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = bytes.to_vec();
        for _ in 0..1 + self.below(2) {
            let at = self.below(out.len());
            let end = (at + 1 + self.below(48)).min(out.len());
            match self.below(9) {
                0 => out.truncate(at),
                1 | 2 if at < out.len() => out[at] ^= 1 << self.below(8),
                3 => {
                    let part = out[at..end].to_vec();
                    let to = self.below(out.len());
                    out.splice(to..to, part);
                }
                4 => drop(out.drain(at..end)),
                5 => drop(out.splice(at..end, PIECES[self.below(PIECES.len())].bytes())),
                _ => self.edit_number(&mut out),
            }
        }
        out
    }

    /// Replaces a number of the text.
    fn edit_number(&mut self, out: &mut Vec<u8>) {
        let starts: Vec<usize> = (1..out.len())
            .filter(|&i| out[i].is_ascii_digit() && !out[i - 1].is_ascii_alphanumeric())
            .collect();
        if starts.is_empty() {
            return;
        }
        let at = starts[self.below(starts.len())];
        let len = out[at..].iter().position(|b| !b.is_ascii_digit() && *b != b'.').unwrap_or(out.len() - at);
        let number = match self.below(3) {
            0 => self.below(16).to_string(),
            1 => self.below(1 << 20).to_string(),
            _ => PIECES[self.below(PIECES.len())].to_string(),
        };
        out.splice(at..at + len, number.bytes());
    }
}

/// Tries `case` on damaged copies; it says whether the file was read.
fn torment(
    what: &str,
    cases: u64,
    damage: impl Fn(&mut Damage) -> Vec<u8>,
    mut case: impl FnMut(u64, &[u8]) -> bool,
) {
    let mut read = 0;
    for n in 0..cases {
        let damaged = damage(&mut Damage::new(n));
        let start = Instant::now();
        match catch_unwind(AssertUnwindSafe(|| case(n, &damaged))) {
            Ok(fine) => read += u64::from(fine),
            Err(_) => {
                let place = folder().join("case.bin");
                std::fs::write(&place, &damaged).expect("the target folder is writable");
                panic!("{what}, case {n}, kept in {}", place.display());
            }
        }
        assert!(start.elapsed() < LONGEST, "{what}, case {n}: {:?}", start.elapsed());
    }
    eprintln!("{what}: {cases} damaged files, {read} of them read");
    assert!(read < cases, "{what}: no damage was noticed");
}

/// An error is no bug of quantc's, and every part of it names a file in `place`.
fn named(problems: &Diags, place: &Path) {
    assert!(!problems.is_empty());
    for d in &problems.0 {
        assert_ne!(d.kind, diag::Kind::Bug, "{d}");
        let file = d.file.as_deref().unwrap_or_default();
        assert!(Path::new(file).starts_with(place), "{d}");
    }
}

/// A copy of a model to damage.
fn model(name: &str, copy: &str) -> PathBuf {
    let dir = folder().join(copy);
    copy_folder(&models(name), &dir);
    dir
}

/// Runs a preset's passes on a module, which may refuse it, and verifies what comes out.
fn run_passes(module: &mut Module, store: &Store, preset: &str) -> Result<(), Diags> {
    let backend = CpuBackend::new(targets::lookup("cpu-avx2")?);
    let parsed = pipeline::parse(Preset::get(preset)?.pipeline)?;
    let target = Some(targets::lookup("cpu-avx2")?);
    let checked = pipeline::check(&parsed, &Registry::builtin(), module, target, Some(&backend))?;
    let env = Env::new(store).with_backend(&backend);
    manager::run(module, &checked, env, Default::default(), &mut [])?;
    verify::verify(module).unwrap_or_else(|errors| panic!("{}", errors.show(module)));
    Ok(())
}

/// Imports a damaged model and, when that succeeds, runs a preset's passes on it.
fn import(dir: &Path) -> bool {
    let store = Store::in_memory();
    let imported = match quantc_frontends::import(dir, &store, &ImportOptions::default()) {
        Ok(imported) => imported,
        Err(problems) => {
            named(&problems, dir);
            return false;
        }
    };
    let mut module = imported.module;
    verify::verify(&module).unwrap_or_else(|errors| panic!("{}", errors.show(&module)));
    if let Err(problems) = run_passes(&mut module, &store, "w8a8") {
        assert!(problems.0.iter().all(|d| d.kind != diag::Kind::Bug), "{problems}");
        return false;
    }
    true
}

/// Runs the tool on something damaged: it succeeds, fails with an error that mentions `name`, or says itself that what it
/// made is not to be trusted.
fn tool(args: Vec<OsString>, name: &str) {
    let start = Instant::now();
    let done = quantc(&args);
    assert!(start.elapsed() < LONGEST, "{args:?}: {:?}", start.elapsed());
    match done.code {
        0 => {}
        1 => {
            assert!(done.err.contains("error: "), "{args:?}: {}", done.err);
            assert!(done.err.contains(name), "{args:?} does not mention {name}: {}", done.err);
            assert!(!done.err.contains("bug in quantc"), "{args:?}: {}", done.err);
        }
        // Weights so large that sums overflow f32 make an engine that the evaluator, which sums in f64, disagrees with.
        3 => assert!(done.err.contains("gate failed: "), "{args:?}: {}", done.err),
        code => panic!("{args:?}: exit code {code}\n{}", done.err),
    }
}

/// `quantc compile` of a damaged model.
fn compile(dir: &Path, preset: &str, name: &str) {
    let mut args: Vec<OsString> = vec!["compile".into(), dir.into()];
    args.extend(
        ["--target", "cpu-avx2", "--preset", preset, "--agreement", "4", "--store"].map(OsString::from),
    );
    args.extend([common::store().into(), "-o".into(), dir.with_extension("engine").into()]);
    tool(args, name);
}

/// Damages a file of a model, here and through the tool.
fn torment_model(name: &str, file: &str, damage: impl Fn(&mut Damage) -> Vec<u8>) {
    let dir = model(name, &format!("{name}-{file}"));
    let path = dir.join(file);
    torment(&format!("{name}/{file}"), CASES, &damage, |n, damaged| {
        std::fs::write(&path, damaged).expect("the target folder is writable");
        let read = import(&dir);
        if n < RUNS {
            // What a damaged configuration lacks may be told of the weights, so the folder is what is named.
            compile(&dir, "w8a8", &dir.display().to_string());
        }
        read
    });
}

#[test]
fn damaged_headers_of_weights() {
    let whole = std::fs::read(models("tiny-qwen2/model.safetensors")).expect("the model is readable");
    let end = 8 + u64::from_le_bytes(whole[..8].try_into().expect("eight bytes")) as usize;
    torment_model("tiny-qwen2", "model.safetensors", |damage| {
        let text = damage.of(&whole[8..end]);
        let mut file = match damage.below(8) {
            0 => damage.0.next_u64().to_le_bytes().to_vec(),
            1 => whole[..8].to_vec(),
            _ => (text.len() as u64).to_le_bytes().to_vec(),
        };
        file.extend(text);
        file.extend(&whole[end..]);
        if damage.below(8) == 0 {
            file.truncate(damage.below(whole.len()));
        }
        file
    });
}

#[test]
fn damaged_configurations() {
    for name in ["tiny-qwen2", "tiny-bert"] {
        let whole = std::fs::read(models(name).join("config.json")).expect("the model is readable");
        torment_model(name, "config.json", |damage| damage.of(&whole));
    }
}

#[test]
fn damaged_tokenizers() {
    let dir = model("tiny-qwen2", "tokenizers");
    let path = dir.join("tokenizer.json");
    let whole = std::fs::read(&path).expect("the model is readable");
    let engine = Recipe::preset(models("tiny-qwen2"), "w8a8").built();
    assert!(engine.path.join("tokenizer.json").is_file());
    torment(
        "tokenizer.json",
        CASES,
        |damage| damage.of(&whole),
        |n, damaged| {
            if n < RUNS {
                std::fs::write(&path, damaged).expect("the target folder is writable");
                compile(&dir, "w8a8", "tokenizer.json");
            }
            let names_it = |d: &diag::Diag| assert!(d.to_string().contains("tokenizer.json"), "{d}");
            let read = Tokenizer::from_bytes(damaged, "tokenizer.json");
            let read = read.and_then(|t| t.decode(&t.encode("The fox can't eat 17.\n «ü» 🦊\u{0}", true)?));
            read.inspect_err(names_it).is_ok()
        },
    );
}

/// Every `.qir` file among the tests.
fn qir_files() -> Vec<(PathBuf, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/filetests");
    let files = common::files_under(&root)
        .into_iter()
        .filter(|(name, _)| name.extension().is_some_and(|e| e == "qir"));
    let files: Vec<_> = files.collect();
    assert!(files.len() > 20);
    files
}

#[test]
fn damaged_modules() {
    let files = qir_files();
    let path = folder().join("damaged.qir");
    torment(
        "modules",
        3 * CASES,
        |damage| {
            let whole = &files[damage.below(files.len())].1;
            damage.of(whole)
        },
        |n, damaged| {
            if n < 2 * RUNS {
                std::fs::write(&path, damaged).expect("the target folder is writable");
                let passes = "dedupe, fuse-epilogue, drop-dead";
                tool(vec!["opt".into(), path.clone().into(), "-p".into(), passes.into()], "damaged.qir");
            }
            let Ok(source) = std::str::from_utf8(damaged) else { return false };
            let module = match text::parse(source, "damaged.qir") {
                Ok(parsed) => parsed.module,
                Err(problems) => {
                    named(&problems, Path::new("damaged.qir"));
                    return false;
                }
            };
            if verify::verify(&module).is_err() {
                return false;
            }
            let printed = text::print(&module);
            let again = text::parse(&printed, "printed").unwrap_or_else(|e| panic!("{e}\n{printed}")).module;
            assert!(text::same(&module, &again), "{printed}");
            true
        },
    );
}

#[test]
fn damaged_modules_go_through_passes() {
    let files = qir_files();
    torment(
        "modules through passes",
        CASES,
        |damage| {
            let whole = &files[damage.below(files.len())].1;
            damage.of(whole)
        },
        |_, damaged| {
            let Ok(source) = std::str::from_utf8(damaged) else { return false };
            let Ok(parsed) = text::parse(source, "damaged.qir") else { return false };
            let mut module = parsed.module;
            // A module that says it has more weights than fit is no matter for passes.
            let bytes: u64 =
                module.weights.values().filter_map(|w| w.ty.stored_bytes()).fold(0, u64::saturating_add);
            if verify::verify(&module).is_err() || bytes > 1 << 24 {
                return false;
            }
            match run_passes(&mut module, &Store::in_memory(), "w8a8") {
                Ok(()) => true,
                Err(problems) => {
                    assert!(problems.0.iter().all(|d| d.kind != diag::Kind::Bug), "{problems}");
                    false
                }
            }
        },
    );
}

/// Opens an engine and reads every file that is compared with its digest only then.
fn open(dir: &Path) -> quantc_runtime::Result<Engine> {
    let engine = Engine::open(dir, &OpenOptions::default())?;
    for file in engine.manifest().files.iter().filter(|file| file.name != "weights.bin") {
        engine.read_file(&file.name)?;
    }
    Ok(engine)
}

#[test]
fn damaged_engine_files() {
    let good = Recipe::preset(models("tiny-qwen2"), "w8a8").built().path;
    for file in [
        "manifest.pb",
        "kernels.o",
        "weights.bin",
        "tokenizer.json",
        "tokenizer.bin",
        "report.json",
        "pipeline.txt",
    ] {
        let dir = folder().join(format!("damaged-{file}"));
        copy_folder(&good, &dir);
        let path = dir.join(file);
        let whole = std::fs::read(&path).expect("the engine is readable");
        torment(
            file,
            CASES,
            |damage| damage.of(&whole),
            |n, damaged| {
                if damaged == whole {
                    return true;
                }
                std::fs::write(&path, damaged).expect("the target folder is writable");
                if n < RUNS {
                    let mut args: Vec<OsString> = vec!["run".into(), dir.clone().into()];
                    args.extend(["--prompt", "The fox", "--max-tokens", "2"].map(OsString::from));
                    tool(args, file);
                    let explained = quantc(["explain".into(), dir.clone().into_os_string()]);
                    assert!(matches!(explained.code, 0 | 1), "{}", explained.err);
                }
                let refused =
                    open(&dir).map(drop).expect_err("no change of a byte goes unnoticed").to_string();
                assert!(refused.contains(file), "{refused}");
                false
            },
        );
    }
}

/// A manifest with a digest that fits: what is damaged is what it says.
#[test]
fn manifests_that_lie() {
    let good = Recipe::preset(models("tiny-qwen2"), "w8a8").built().path;
    let dir = folder().join("lies");
    copy_folder(&good, &dir);
    let path = dir.join(MANIFEST_FILE);
    let whole = std::fs::read(&path).expect("the engine is readable");
    let head = MAGIC.len() + DIGEST_BYTES;
    let lie = |damage: &mut Damage| {
        let body = damage.of(&whole[head..]);
        [&MAGIC[..], blake3::hash(&body).as_bytes(), &body].concat()
    };
    torment("manifest.pb with its digest", 3 * CASES, lie, |n, damaged| {
        std::fs::write(&path, damaged).expect("the target folder is writable");
        if n < RUNS {
            tool(vec!["inspect".into(), dir.clone().into()], &dir.display().to_string());
        }
        match open(&dir) {
            Err(e) => {
                assert!(e.to_string().contains(&dir.display().to_string()), "{e}");
                false
            }
            // A session allocates what the manifest asks for; more than there is must be an error too.
            Ok(engine) => {
                Session::new(engine.into(), &SessionOptions { threads: 1, ..Default::default() }).is_ok()
            }
        }
    });
}

#[test]
fn damaged_objects() {
    let good = Recipe::preset(models("tiny-qwen2"), "w8a8").built().path.join("kernels.o");
    let whole = std::fs::read(good).expect("the engine is readable");
    // Headers, the section table and the symbols lie at the ends; code is nobody's to check.
    let ends = |damage: &mut Damage| {
        let mut out = whole.clone();
        for _ in 0..1 + damage.below(4) {
            let span = damage.below(2048).min(whole.len() - 1);
            let at = if damage.below(2) == 0 { span } else { whole.len() - 1 - span };
            out[at] = if damage.below(2) == 0 { 0xFF } else { out[at] ^ 1 << damage.below(8) };
        }
        if damage.below(4) == 0 {
            out.truncate(damage.below(whole.len()));
        }
        out
    };
    torment("kernels.o", 3 * CASES, ends, |_, damaged| Object::load(damaged).is_ok());
}

/// Writes `number` over the first element of a weight of tiny-qwen2 and compiles it.
fn compiled_with(tensor: &str, number: f32, preset: &str) -> common::Done {
    let dir = model("tiny-qwen2", &format!("bits-{tensor}-{preset}"));
    let path = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&path).expect("the model is readable");
    let (len, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("a good model");
    let info = header.info(tensor).expect("the model has this tensor");
    assert_eq!(info.dtype, safetensors::Dtype::BF16);
    let at = 8 + len + info.data_offsets.0;
    // bf16 is the upper half of f32.
    bytes[at..at + 2].copy_from_slice(&number.to_le_bytes()[2..]);
    std::fs::write(&path, bytes).expect("the target folder is writable");
    let mut args: Vec<OsString> = vec!["compile".into(), dir.clone().into()];
    args.extend(["--target", "cpu-avx2", "--preset", preset, "--store"].map(OsString::from));
    args.extend([common::store().into(), "-o".into(), dir.join("engine").into()]);
    let done = quantc(args);
    assert!(done.code == 0 || !dir.join("engine").exists());
    done
}

#[test]
fn weights_that_are_not_numbers_are_named() {
    let weights = [
        ("model.layers.0.self_attn.q_proj.weight", "l0.attn.q"),
        ("model.layers.1.mlp.down_proj.weight", "l1.mlp.down"),
        // What no product reads.
        ("model.embed_tokens.weight", "@head"),
        ("model.norm.weight", "@norm"),
        ("model.layers.0.self_attn.q_proj.bias", "l0.attn.q.bias"),
    ];
    for (tensor, name) in weights {
        for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for preset in ["w8a8", "w4a16-g32"] {
                let done = compiled_with(tensor, number, preset);
                let case = format!("{tensor} {number} {preset}: {}", done.err);
                assert_eq!(done.code, 1, "{case}");
                assert!(done.err.contains(name) || done.err.contains(tensor), "{case}");
            }
        }
    }
}

#[test]
fn flipped_bits_of_weights_compile_or_are_refused() {
    let dir = model("tiny-qwen2", "flips");
    let path = dir.join("model.safetensors");
    let whole = std::fs::read(&path).expect("the model is readable");
    let start = 8 + u64::from_le_bytes(whole[..8].try_into().expect("eight bytes")) as usize;
    for n in 0..CASES {
        let mut damage = Damage::new(n);
        let mut bytes = whole.clone();
        for _ in 0..20 {
            let at = start + damage.below(whole.len() - start);
            bytes[at] ^= 1 << damage.below(8);
        }
        std::fs::write(&path, bytes).expect("the target folder is writable");
        if n < RUNS {
            // The weight is named, or the layer whose sums overflow when the engine is compared.
            compile(&dir, "w8a8", "@l");
        }
        import(&dir);
    }
}
