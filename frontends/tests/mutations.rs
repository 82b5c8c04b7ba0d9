//! Damaged files are refused with their name, or read: there is no panic, no endless loop, and no allocation that the
//! file's size does not justify.

mod common;
#[path = "common/rng.rs"]
mod rng;

use common::{eval_with, model_dir};
use quantc_frontends::arch::Kind;
use quantc_frontends::{ImportOptions, Tokenizer, import};
use quantc_ir::diag::Loc;
use quantc_ir::eval::Evaluator;
use quantc_ir::weights::Store;
use rng::Rng;
use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The system's allocator, noting the largest request.
struct Watched;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: Every request goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: The caller keeps the contract of `alloc`, which is the same for both.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` was given by `alloc` with this layout, so by the system's allocator.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// The largest single request allowed: the files are below 100 KiB, the mapped text of the largest tokenizer apart.
const MOST_AT_ONCE: usize = 16 << 20;

/// The longest that one case may take on a busy machine.
const LONGEST: Duration = Duration::from_secs(20);

/// Pieces that tend to hurt readers of JSON.
const PIECES: &[&str] = &[
    "null",
    "-1",
    "0",
    "1e999",
    "18446744073709551615",
    "18446744073709551616",
    "4294967296",
    "99999999999999",
    "[]",
    "{}",
    "\"\"",
    "\"\\ud800\"",
    "true",
    "NaN",
    "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    ",",
    ":",
    "}",
    "]",
    "\"",
    "\\",
    "0.5",
    "[1,2,3]",
    "{\"a\":1}",
    "\u{0}",
    "\u{FFFD}",
    "9007199254740993",
];

/// A damaged copy of `bytes`: cut, bits flipped, numbers changed, parts moved, repeated, removed or replaced.
fn mutate(bytes: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut out = bytes.to_vec();
    // Half of the copies stay well-formed more often than not, so that what is behind the JSON is met too.
    if rng.below(2) == 0 {
        edit_value(&mut out, rng);
        return out;
    }
    for _ in 0..1 + rng.below(3) {
        let at = rng.below(out.len());
        let end = (at + 1 + rng.below(40)).min(out.len());
        match rng.below(8) {
            0 => out.truncate(at),
            1 if at < out.len() => out[at] ^= 1 << rng.below(8),
            2 | 3 => edit_value(&mut out, rng),
            4 => {
                let part = out[at..end].to_vec();
                let to = rng.below(out.len());
                out.splice(to..to, part);
            }
            5 => drop(out.drain(at..end)),
            6 => {
                let piece = PIECES[rng.below(PIECES.len())];
                out.splice(at..end, piece.bytes());
            }
            _ => edit_value(&mut out, rng),
        }
    }
    out
}

/// Replaces a number, or what stands behind a colon.
fn edit_value(out: &mut Vec<u8>, rng: &mut Rng) {
    let numbers: Vec<usize> = (1..out.len())
        .filter(|&i| out[i].is_ascii_digit() && !out[i - 1].is_ascii_alphanumeric() && out[i - 1] != b'.')
        .collect();
    let colons: Vec<usize> = (1..out.len()).filter(|&i| out[i - 1] == b':').collect();
    let places = if rng.below(2) == 0 { numbers } else { colons };
    if places.is_empty() {
        return;
    }
    let at = places[rng.below(places.len())];
    let stop = |b: &u8| matches!(b, b',' | b'}' | b']' | b'\n');
    let end = out[at..].iter().position(stop).map_or(out.len(), |n| at + n);
    let piece = match rng.below(4) {
        0 => rng.below(1 << 20).to_string(),
        1 => rng.below(8).to_string(),
        2 => {
            let from = places[rng.below(places.len())];
            let len = out[from..].iter().position(stop).unwrap_or(out.len() - from);
            String::from_utf8_lossy(&out[from..from + len]).into_owned()
        }
        _ => PIECES[rng.below(PIECES.len())].to_string(),
    };
    out.splice(at..end, piece.bytes());
}

/// Runs `case` on damaged copies of a file and watches time and memory.
fn torment(name: &str, bytes: &[u8], cases: usize, mut case: impl FnMut(&[u8]) -> bool) {
    let seed = name.bytes().fold(0x9E37_79B9_7F4A_7C15, |h: u64, b| {
        h.rotate_left(7) ^ u64::from(b).wrapping_mul(0x0100_0000_01B3)
    });
    let mut rng = Rng(seed);
    let mut read = 0;
    for n in 0..cases {
        let damaged = mutate(bytes, &mut rng);
        LARGEST.store(0, Ordering::Relaxed);
        let start = Instant::now();
        read += usize::from(case(&damaged));
        let (took, largest) = (start.elapsed(), LARGEST.load(Ordering::Relaxed));
        assert!(took < LONGEST, "{name}, case {n}: {took:?}");
        assert!(largest < MOST_AT_ONCE, "{name}, case {n}: {largest} bytes at once");
    }
    assert!(read < cases, "{name}: no damage was noticed in {cases} cases");
    eprintln!("{name}: {cases} damaged files, {read} of them read");
}

/// Imports `dir` with the damaged `file` and, if that succeeds, runs the model.
fn import_damaged(dir: &Path, file: &str) -> bool {
    let store = Store::in_memory();
    let options = ImportOptions { context: None };
    match import(dir, &store, &options) {
        Err(problems) => {
            assert!(!problems.is_empty());
            if std::env::var_os("SHOW_REFUSALS").is_some() {
                eprintln!("{}", problems.0[0].message);
            }
            for d in &problems.0 {
                let text = d.to_string();
                assert_ne!(d.kind, quantc_ir::diag::Kind::Bug, "{text}");
                let named = d.file.as_deref().unwrap_or_default();
                assert!(Path::new(named).starts_with(dir), "{text}");
                // What lies in the damaged file has a place; what another file lacks because of it names that file.
                assert!(
                    d.loc != Loc::None || !named.ends_with(file) || text.contains("cannot read"),
                    "{text}"
                );
                assert!(text.len() < 8192 && !text.contains('\u{0}'), "{text}");
            }
            false
        }
        Ok(imported) => {
            let mut evaluator = Evaluator::new(&imported.module, &store).unwrap();
            let ids = vec![1, 0, 1];
            let len = |shard| store.shard_len(shard);
            if let Err(errors) = quantc_ir::verify::verify_with_files(&imported.module, &len) {
                panic!("{}", errors.show(&imported.module));
            }
            let inputs = match imported.facts.kind {
                Kind::Decoder => vec![ids],
                Kind::Encoder => vec![ids, vec![0, 0, 0]],
            };
            if imported.facts.context >= 3 && imported.facts.vocab > 1 {
                eval_with(&mut evaluator, &inputs);
            }
            true
        }
    }
}

/// Damages `file` of a model, `cases` times; of the file only `part` when it is long.
fn torment_model(model: &str, file: &str, cases: usize) {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(model_dir(model)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join(file);
    let bytes = std::fs::read(&path).unwrap();
    torment(&format!("{model}/{file}"), &bytes, cases, |damaged| {
        std::fs::write(&path, damaged).unwrap();
        import_damaged(dir.path(), file)
    });
}

/// One test, since the allocator is watched for the whole process.
#[test]
fn damaged_files_do_no_harm() {
    for model in ["tiny-llama3", "tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-gpt2", "tiny-bert"] {
        torment_model(model, "config.json", 250);
    }
    torment_model("tiny-sharded-llama", "model.safetensors.index.json", 250);
    torment_model("tales-3M", "tokenizer_config.json", 60);
    damaged_headers("tiny-gpt2", 300);
    damaged_headers("tiny-llama3", 300);
    damaged_tokenizers("tiny-qwen2", 300);
    damaged_tokenizers("tales-3M", 200);
}

/// Damages headers of weight files: the length, the text, and the text with the length made to fit.
fn damaged_headers(model: &str, cases: usize) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(model_dir(model).join("config.json"), dir.path().join("config.json")).unwrap();
    let whole = std::fs::read(model_dir(model).join("model.safetensors")).unwrap();
    let text_end = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let path = dir.path().join("model.safetensors");
    let mut rng = Rng(77);
    torment(&format!("{model}/model.safetensors"), &whole[8..text_end], cases, |text| {
        let mut file = match rng.below(4) {
            0 => whole[..8].to_vec(),
            1 => rng.next().to_le_bytes().to_vec(),
            _ => (text.len() as u64).to_le_bytes().to_vec(),
        };
        file.extend(text);
        file.extend(&whole[text_end..]);
        if rng.below(16) == 0 {
            file.truncate(rng.below(file.len()));
        }
        std::fs::write(&path, file).unwrap();
        import_damaged(dir.path(), "model.safetensors")
    });
}

/// Damages tokenizers; those that are read encode and decode.
fn damaged_tokenizers(model: &str, cases: usize) {
    let bytes = std::fs::read(model_dir(model).join("tokenizer.json")).unwrap();
    torment(&format!("{model}/tokenizer.json"), &bytes, cases, |damaged| {
        let named = |d: &quantc_ir::diag::Diag| assert_eq!(d.file.as_deref(), Some("tokenizer.json"), "{d}");
        let tokenizer = match Tokenizer::from_bytes(damaged, "tokenizer.json") {
            Err(d) => {
                named(&d);
                assert!(d.loc != Loc::None || d.message.contains("library panicked"), "{d}");
                return false;
            }
            Ok(tokenizer) => tokenizer,
        };
        for text in [
            "",
            "Once upon a time, there were 17 foxes.\n\n  «ü» 🦊\u{0}",
            "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        ] {
            match tokenizer.encode(text, true) {
                Err(d) => named(&d),
                Ok(ids) => {
                    if let Err(d) = tokenizer.decode(&ids) {
                        named(&d);
                    }
                    if let Err(d) = tokenizer.encode_at_most(text, 5) {
                        named(&d);
                    }
                }
            }
        }
        true
    });
}
