//! What is emitted, as text: LLVM IR of small kernels and the manifest of a tiny engine. Nothing here depends on the
//! machine the tests run on.
#![cfg(feature = "llvm")]

use inkwell::context::Context;
use quantc_codegen::cpu::gather::{GatherSpec, emit_gather};
use quantc_codegen::cpu::llvm::Unit;
use quantc_codegen::cpu::{matmul, row};
use quantc_codegen::eexpr::{EExpr, MemTy};
use quantc_codegen::engine::{self, Request};
use quantc_codegen::spec::{AFmt, Code, MRange, MatmulSpec, Rows, ScaleTy, WFmt, Zero};
use quantc_codegen::targets;
use quantc_ir::diag::Result;
use quantc_ir::weights::Store;
use quantc_ir::{text, verify};
use quantc_runtime::format;
use std::path::Path;

/// The LLVM IR of one kernel before optimization.
fn ir(target: &str, emit: impl FnOnce(&Unit<'_>) -> Result<()>) -> String {
    let cx = Context::create();
    let unit =
        Unit::new(&cx, targets::lookup(target).expect("a known target"), "kernels").expect("LLVM knows it");
    emit(&unit).expect("the spec can be emitted");
    unit.ir()
}

#[test]
fn a_norm_for_generic_machines() {
    let spec = row::RowSpec::rms_norm(6, 1e-5, MemTy::F32, MemTy::F32, MemTy::F32);
    insta::assert_snapshot!(ir("cpu-generic", |unit| row::emit(unit, &spec, "rms_norm")));
}

#[test]
fn rows_of_a_half_precision_table_for_avx2() {
    let spec = GatherSpec { width: 12, table_rows: 5, ty: MemTy::F16, add: false };
    insta::assert_snapshot!(ir("cpu-avx2", |unit| emit_gather(unit, &spec, "gather")));
}

#[test]
fn a_product_of_four_bit_weights_for_avx512vnni() {
    let mut epilogue = EExpr::new();
    let sum = epilogue.acc();
    epilogue.store(sum, MemTy::F32, 64);
    let w = WFmt { code: Code::U4, group: 32, zero: Zero::Sym(8), scale: ScaleTy::Bf16 };
    let m = MRange { min: 1, max: 1 };
    let spec = MatmulSpec { n: 64, k: 64, m, rows: Rows::T, w, a: AFmt::I8Token, epilogue };
    let cpu = &targets::lookup("cpu-avx512vnni").expect("a known target").cpu;
    let schedule = matmul::schedule(&spec, cpu);
    insta::assert_snapshot!(ir("cpu-avx512vnni", |unit| matmul::emit(unit, "matmul", &spec, &schedule)));
}

const TINY: &str = "
module @tiny {bos=1, context=16, eos=2, kind=decoder, vocab=8}
weight @table : tensor<8x4xf32> = splat 1.0
weight @gain : tensor<4xf32> = splat 2.0
weight @w : tensor<4x4x!q<int8:f32 axis 0>> = inline [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]
weight @s : tensor<4x1xf32> = splat 1.0
weight @head : tensor<8x4xf32> = splat 1.0
state @k : tensor<16x2x2xf32>
state @v : tensor<16x2x2xf32>

layer @l0 (%x: tensor<?tx4xf32>) -> tensor<?tx4xf32> {
  %n = rmsnorm %x, @gain
  %n.s = dynamic_scale %n
  %n.q = quantize %n, %n.s
  %h = qmatmul %n.q, @w, @s, none, %n.s
  %q = reshape %h {shape=?tx2x2}
  %p = positions
  %angles = rope_table %p {size=2}
  %r = rope %q, %angles
  %keys = cache_append @k, %r
  %values = cache_append @v, %q
  %a = attention %r, %keys, %values
  %flat = reshape %a {shape=?tx4}
  %y = add %x, %flat
  return %y
}

main (%tokens: tensor<?txi32>) -> tensor<?rx8xf32> {
  %x = embedding %tokens, @table
  %y = call %x {layer=l0}
  %last = last_rows %y
  %logits = matmul %last, @head
  return %logits
}
";

/// Writes the tiny engine for the generic target to `out`.
fn write_tiny(store: &Store, out: &Path) -> Result<engine::Written> {
    let module = text::parse(TINY, "tiny.qir").expect("it parses").module;
    verify::verify(&module).unwrap_or_else(|e| panic!("{}", e.show(&module)));
    let request = Request {
        module: &module,
        store,
        target: targets::lookup("cpu-generic")?,
        max_tokens: 8,
        always_full: false,
        tuning: None,
        objects: None,
        files: vec![],
        facts: vec![("preset".into(), "none".into())],
        report: Default::default(),
    };
    engine::write(request, out)
}

#[test]
fn the_manifest_of_a_tiny_engine() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("engine");
    write_tiny(&Store::in_memory(), &out).expect("it compiles");
    let text = std::fs::read_to_string(out.join(format::MANIFEST_TEXT_FILE)).expect("it is there");
    // Machine code and the choices for it, which the report tells, may change without the manifest's doing.
    let masked =
        |file: &str| [format::KERNELS_FILE, "report.json"].into_iter().find(|name| file.contains(name));
    let line = |line: &str| match line.split_once(" blake3 ") {
        Some((file, _)) if masked(file).is_some() => format!("  {} ..", masked(file).unwrap_or_default()),
        Some((file, digest)) => format!("{file} blake3 {}..", &digest[..8]),
        None => line.replace(env!("CARGO_PKG_VERSION"), "[version]"),
    };
    insta::assert_snapshot!(text.lines().map(line).collect::<Vec<_>>().join("\n"));
}

#[test]
fn engines_replace_engines_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("engine.v1");
    // What killed compilations may have left: no process has such a number.
    for left in [".engine.v1.partial-4294967295", ".engine.v1.replaced-4294967295", ".engine.v1.old"] {
        std::fs::create_dir(folder.path().join(left)).expect("the folder is new");
        std::fs::write(folder.path().join(left).join("weights.bin"), "x").expect("it is written");
    }
    let store = Store::in_memory();
    write_tiny(&store, &out).expect("it compiles");
    let first = std::fs::read(out.join(format::MANIFEST_FILE)).expect("it is there");
    std::fs::write(out.join("stale"), "x").expect("it is written");
    write_tiny(&store, &out).expect("an engine is replaced");
    assert_eq!(std::fs::read(out.join(format::MANIFEST_FILE)).expect("it is there"), first);
    assert!(!out.join("stale").exists(), "the whole folder is replaced");
    let mut left: Vec<_> =
        std::fs::read_dir(folder.path()).expect("it is there").flatten().map(|e| e.file_name()).collect();
    left.sort();
    assert_eq!(left, [".engine.v1.old", "engine.v1"], "only what is not ours stays");

    let other = folder.path().join("letters");
    std::fs::create_dir(&other).expect("the folder is new");
    std::fs::write(other.join("letter"), "dear").expect("it is written");
    assert!(write_tiny(&store, &other).unwrap_err().message.contains("not an engine"));
    assert!(other.join("letter").exists());
}

#[test]
fn packed_bytes_that_were_changed_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder.path().join("store")).expect("a new store");
    let out = folder.path().join("engine");
    write_tiny(&store, &out).expect("it compiles");
    let mut changed = 0;
    for entry in walk(&folder.path().join("store")) {
        let mut bytes = std::fs::read(&entry).expect("a file");
        // Blobs only; recipes are texts.
        if bytes.len() > 600 {
            bytes[5] ^= 1;
            let mut rights = std::fs::metadata(&entry).expect("a file").permissions();
            #[expect(clippy::permissions_set_readonly_false, reason = "the folder is this test's own")]
            rights.set_readonly(false);
            std::fs::set_permissions(&entry, rights).expect("our file");
            std::fs::write(&entry, bytes).expect("our file");
            changed += 1;
        }
    }
    assert!(changed > 0, "no blob was found");
    let error = write_tiny(&store, &out).expect_err("the store is damaged");
    assert!(error.to_string().contains("not what kernels expect"), "{error}");
    assert!(out.join(format::MANIFEST_FILE).exists(), "the engine that was there is still there");
}

fn walk(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder").flatten().map(|e| e.path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}
