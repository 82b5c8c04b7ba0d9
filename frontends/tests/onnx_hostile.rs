//! ONNX files that lie: each is refused with the node and the field, in time and memory that its size justifies, and
//! nothing outside of its folder is opened. Damaged files are refused, or read and evaluated; nothing panics.

#[path = "onnx_hostile/cases.rs"]
mod cases;
#[path = "common/rng.rs"]
mod rng;
#[path = "onnx_wire/mod.rs"]
mod wire;

use quantc_frontends::onnx::{self, Options};
use quantc_ir::diag::Kind;
use quantc_ir::eval::{Data, Evaluator, Tensor};
use quantc_ir::ty::{Dim, ElemTy, TensorTy};
use quantc_ir::verify::verify_with_files;
use quantc_ir::weights::Store;
use rng::Rng;
use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The system's allocator, counting the bytes that are held.
struct Watched;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: Every request goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(held, Ordering::Relaxed);
        // SAFETY: The caller keeps the contract of `alloc`, which is the same for both.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `ptr` was given by `alloc` with this layout, so by the system's allocator.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// Memory is counted for one import at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Memory that an import may take beside what its file justifies: small constants that are computed, and the graph that
/// a small file unfolds to.
const MOST_BYTES: usize = 256 << 20;

/// Bytes that an import may take for each byte of the file.
const PER_BYTE: usize = 64;

/// The longest that one import may take on a busy machine.
const LONGEST: Duration = Duration::from_secs(20);

/// Imports a file under watch.
fn import(path: &Path) -> Result<(onnx::Imported, Store), onnx::Refused> {
    let size = std::fs::metadata(path).map_or(0, |m| m.len()) as usize;
    let before = HELD.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let begun = Instant::now();
    let store = Store::in_memory();
    let imported = onnx::import(path, &store, &Options::default());
    let (took, took_bytes) = (begun.elapsed(), MOST.load(Ordering::Relaxed).saturating_sub(before));
    assert!(took < LONGEST, "{}: {took:?}", path.display());
    assert!(took_bytes < MOST_BYTES + PER_BYTE * size, "{}: {took_bytes} bytes", path.display());
    imported.map(|i| (i, store))
}

#[test]
fn lies_are_refused_by_name() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let outer = tempfile::tempdir().unwrap();
    // What must not be opened lies beside the model's folder.
    std::fs::write(outer.path().join("secret.bin"), [0u8; 64]).unwrap();
    let dir = outer.path().join("model");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("weights.bin"), [0u8; 64]).unwrap();
    std::os::unix::fs::symlink("../secret.bin", dir.join("link.bin")).unwrap();
    std::os::unix::fs::symlink("..", dir.join("up")).unwrap();
    std::fs::create_dir(dir.join("folder")).unwrap();
    let cases = cases::all();
    assert!(cases.len() >= 50, "only {} cases", cases.len());
    let mut wrong = vec![];
    for case in &cases {
        let path = dir.join(format!("{}.onnx", case.name));
        std::fs::write(&path, &case.bytes).unwrap();
        let refused = match import(&path) {
            Err(refused) => refused,
            Ok(_) => {
                wrong.push(format!("{}: it was imported", case.name));
                continue;
            }
        };
        let text = refused.to_string();
        for d in &refused.problems.0 {
            if d.kind == Kind::Bug || d.file.is_none() {
                wrong.push(format!("{}: {text}", case.name));
            }
        }
        for part in case.says {
            if !text.contains(part) {
                wrong.push(format!("{}: no `{part}` in: {text}", case.name));
            }
        }
        if text.len() > 16_384 || text.contains('\0') {
            wrong.push(format!("{}: {} bytes of message", case.name, text.len()));
        }
        std::fs::remove_file(&path).unwrap();
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The file with one to four damages.
fn damaged(rng: &mut Rng, sound: &[u8]) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    for _ in 0..1 + rng.below(4) {
        let at = rng.below(bytes.len());
        match rng.below(6) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = [0, 1, 127, 128, 255][rng.below(5)],
            2 => bytes.truncate(at),
            3 => {
                // A number becomes a large one.
                let large = [255, 255, 255, 255, 255, 255, 255, 255, 127];
                let end = (at + large.len()).min(bytes.len());
                bytes[at..end].copy_from_slice(&large[..end - at]);
            }
            4 => {
                let end = (at + rng.below(32)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                let to = rng.below(bytes.len());
                bytes.splice(to..to, part);
            }
            _ => {
                let end = (at + rng.below(16)).min(bytes.len());
                bytes.drain(at..end);
            }
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
    bytes
}

/// Evaluates a module whose values are small, on inputs of ones.
fn evaluate(imported: &onnx::Imported, store: &Store) {
    let module = &imported.module;
    let small = |ty: &TensorTy| {
        let n = ty.shape.0.iter().try_fold(1u64, |n, d| n.checked_mul(d.fixed().unwrap_or(2)));
        n.is_some_and(|n| n <= 1 << 12)
    };
    let windows = |node: &quantc_ir::graph::Node| {
        let kernel = |k: &[u32]| k.iter().map(|&k| u64::from(k)).product::<u64>() > 1 << 12;
        matches!(&node.op, quantc_ir::ops::Op::Pool(p) if kernel(&p.kernel))
    };
    if !module.main.values().all(|(_, v)| small(&v.ty)) || module.main.ops().any(|(_, n)| windows(n)) {
        return;
    }
    let input = |&p| {
        let ty = module.main.ty(p);
        let dims: Vec<u64> = ty.shape.0.iter().map(|d| if let Dim::Static(n) = d { *n } else { 2 }).collect();
        let ty = TensorTy::fixed(ty.elem, &dims);
        let n = dims.iter().product::<u64>() as usize;
        match ty.elem {
            ElemTy::Q(_) => Tensor::new(&ty, Data::Codes(vec![0; n])),
            ElemTy::Int(_) => Tensor::from_ints(&ty, std::iter::repeat_n(1, n)),
            _ => Tensor::from_reals(&ty, vec![1.0; n]),
        }
    };
    let inputs: Vec<Tensor> = module.main.params.iter().map(|p| input(p).unwrap()).collect();
    let mut evaluator = Evaluator::new(module, store).unwrap();
    if let Err(e) = evaluator.step(&inputs, u64::MAX) {
        assert_ne!(e.kind, Kind::Bug, "{e}");
    }
}

#[test]
fn damaged_files_are_refused_or_read() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("weights.bin"), [0u8; 64]).unwrap();
    let path = dir.path().join("damaged.onnx");
    let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
    let (mut read, mut all) = (0, 0);
    for (name, sound) in cases::sound() {
        std::fs::write(&path, &sound).unwrap();
        let (imported, store) = import(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
        evaluate(&imported, &store);
        for n in 0..200 {
            let bytes = damaged(&mut rng, &sound);
            std::fs::write(&path, &bytes).unwrap();
            all += 1;
            match import(&path) {
                Err(refused) => {
                    assert!(!refused.problems.is_empty());
                    for d in &refused.problems.0 {
                        assert_ne!(d.kind, Kind::Bug, "{name} {n}: {d}");
                    }
                }
                Ok((imported, store)) => {
                    read += 1;
                    let len = |shard| store.shard_len(shard);
                    if let Err(errors) = verify_with_files(&imported.module, &len) {
                        panic!("{name} {n}: {errors}");
                    }
                    evaluate(&imported, &store);
                }
            }
        }
    }
    println!("{all} damaged files, {read} of them read");
    assert!(all >= 500 && read < all);
}
