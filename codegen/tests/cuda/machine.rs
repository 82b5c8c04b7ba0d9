//! Machine code of kernels: what compiler and assembler say of it, and what instructions it is made of.

use crate::support::count;
use quantc_codegen::cuda::nvrtc::{Compiler, Cubin, FOLDER_VAR};
use quantc_codegen::cuda::text::emit;
use quantc_codegen::cuda::tile::{Kernel, Mem, Stmt};
use quantc_ir::target::GpuTarget;
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where `make nvrtc` puts things.
const FETCHED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/nvrtc/nvidia/cu13");

/// Whether all configurations are to be compiled, and all machine code is to be looked at: takes minutes.
pub fn everything() -> bool {
    std::env::var_os("QUANTC_ALL_CUBINS").is_some()
}

/// NVRTC from the folder the environment names, or where `make nvrtc` puts it; says so when there is none.
pub fn compiler(test: &str) -> Option<Compiler> {
    let fetched = Path::new(FETCHED).join("lib");
    let folder = std::env::var_os(FOLDER_VAR).or_else(|| fetched.is_dir().then(|| fetched.into_os_string()));
    let found = Compiler::find_in(folder);
    found.inspect_err(|why| eprintln!("{test}: skipped, {why}")).ok()
}

/// NVIDIA's disassembler from where `make nvrtc` puts it; says so when there is none.
fn disassembler(test: &str) -> Option<PathBuf> {
    let tool = Path::new(FETCHED).join("bin/nvdisasm");
    if tool.is_file() {
        return Some(tool);
    }
    eprintln!("{test}: instructions are not looked at, there is no {}", tool.display());
    None
}

/// Compiles kernels, each for an architecture, and looks at what they use and are made of.
pub fn check(test: &str, jobs: &[(Kernel, &GpuTarget)]) {
    let Some(compiler) = compiler(test) else { return };
    let disassembler = disassembler(test);
    let all = everything();
    jobs.par_iter().enumerate().for_each(|(i, (kernel, target))| {
        let what = format!("{} for {}", kernel.name, target.name);
        let cubin = compiler.compile(&emit(kernel), &target.gpu).unwrap_or_else(|e| panic!("{what}: {e}"));
        let [usage] = cubin.usage().try_into().unwrap_or_else(|_| panic!("{what}: {}", cubin.log));
        if all {
            let wide = kernel.shared;
            eprintln!(
                "{what}: {} registers, {} threads, {wide} bytes shared",
                usage.registers, kernel.threads
            );
        }
        assert_eq!((usage.spills, usage.stack, usage.shared), (0, 0, 0), "{what}: {}", cubin.log);
        let registers = usage.registers.next_multiple_of(8) * kernel.threads * kernel.blocks_per_sm;
        assert!(registers <= target.gpu.registers, "{what}: {} registers", usage.registers);
        assert!(kernel.shared <= target.gpu.shared_bytes, "{what}: {} bytes shared", kernel.shared);
        // Every third: to take code apart takes longer than to make it.
        // What the assembler says when it gives up on what a kernel is made for.
        for word in ["setmaxnreg", "serializ"] {
            assert!(!cubin.log.contains(word), "{what}: {}", cubin.log);
        }
        let products = count(&kernel.body, &|s| matches!(s, Stmt::Mma { .. } | Stmt::GroupMma { .. })) > 0;
        if let Some(tool) = disassembler.as_ref().filter(|_| products && (all || i % 3 == 0)) {
            contract(&what, kernel, &instructions(tool, &cubin));
        }
    });
}

/// The instructions of a cubin without their operands: `LDG.E.128.CONSTANT`.
fn instructions(tool: &Path, cubin: &Cubin) -> Vec<String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, &cubin.bytes).unwrap();
    let out = Command::new(tool).args(["-c", "-ndf"]).arg(file.path()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout).unwrap();
    // A line of code: `/*0150*/   @P0 BRA 0x20 ;`.
    let instruction = |line: &str| {
        let (_, rest) = line.split_once("*/")?;
        let mut words = rest.split_whitespace().skip_while(|w| w.starts_with('@'));
        let word = words.next()?.trim_end_matches(';');
        word.starts_with(|c: char| c.is_ascii_uppercase()).then(|| word.to_owned())
    };
    text.lines().filter(|l| l.trim_start().starts_with("/*")).filter_map(instruction).collect()
}

/// What machine code owes its kernel.
fn contract(what: &str, kernel: &Kernel, code: &[String]) {
    let count_of = |is: &dyn Fn(&str) -> bool| code.iter().filter(|i| is(i)).count();
    let of = |is: &dyn Fn(&Stmt) -> bool| count(&kernel.body, &is);
    let local = count_of(&|i| i.starts_with("LDL") || i.starts_with("STL"));
    assert_eq!(local, 0, "{what}: registers in memory");
    let products = count_of(&|i| i.starts_with("HMMA.16816.F32.BF16") || i.starts_with("IMMA.16832.S8.S8"));
    assert_eq!(products, of(&|s| matches!(s, Stmt::Mma { .. })), "{what}: matrix products");
    let groups = count_of(&|i| {
        let whole = |kind: &str, types: &str| i.starts_with(kind) && i.contains(types);
        whole("HGMMA.64x", ".F32.BF16")
            || whole("QGMMA.64x", ".F32.E4M3.E4M3")
            || whole("IGMMA.64x", ".S8.S8")
    });
    assert_eq!(groups, of(&|s| matches!(s, Stmt::GroupMma { .. })), "{what}: products of groups");
    let bulk = count_of(&|i| i.starts_with("UBLKCP"));
    assert_eq!(bulk, of(&|s| matches!(s, Stmt::BulkCopy { .. })), "{what}: bulk copies");
    let waits = count_of(&|i| i.starts_with("SYNCS.PHASECHK"));
    assert!(waits >= of(&|s| matches!(s, Stmt::BarWait { .. })), "{what}: waits for barriers");
    let registers = count_of(&|i| i.starts_with("USETMAXREG"));
    assert_eq!(registers, of(&|s| matches!(s, Stmt::Registers { .. })), "{what}: changes of registers");
    let products = products + groups;
    let other = count_of(&|i| i.split('.').next().is_some_and(|name| name.ends_with("MMA")));
    assert_eq!(other, products, "{what}: matrix products of another kind");
    // Copies and loads keep their width; the compiler may repeat them.
    let copies = count_of(&|i| i.starts_with("LDGSTS") && i.contains(".128"));
    let wide = of(&|s| matches!(s, Stmt::CpAsync { bytes: 16, .. }));
    assert!(copies >= wide, "{what}: {copies} copies of 16 bytes, not {wide}");
    let loads = count_of(&|i| i.starts_with("LDS") && i.contains(".128"));
    let wide = of(&|s| matches!(s, Stmt::Load { mem: Mem::Shared, bytes: 16, .. }));
    assert!(loads >= wide, "{what}: {loads} loads of 16 bytes, not {wide}");
}
