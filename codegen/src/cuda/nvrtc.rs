//! Compiles CUDA text to machine code with NVIDIA's runtime compiler, NVRTC, without a GPU or a driver.
//!
//! NVRTC is a library that is found when the tool runs: in the folder that `QUANTC_NVRTC` names, else where the system's
//! linker looks. Its assembler's report tells what a kernel uses; [`Cubin::usage`] has it.

use cudarc::nvrtc::{result, sys};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::GpuDesc;
use std::ffi::{CString, OsString};
use std::path::Path;
use std::sync::OnceLock;

/// Names the folder of `libnvrtc.so` and `libnvrtc-builtins.so`.
pub const FOLDER_VAR: &str = "QUANTC_NVRTC";

/// NVRTC, loaded.
#[derive(Clone, Copy, Debug)]
pub struct Compiler {
    /// Major and minor version.
    pub version: (i32, i32),
}

/// Machine code of one architecture.
#[derive(Clone, Debug)]
pub struct Cubin {
    /// An ELF file.
    pub bytes: Vec<u8>,
    /// What compiler and assembler said.
    pub log: String,
}

/// What a kernel uses, as the assembler reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Symbol of the kernel.
    pub kernel: String,
    /// 32-bit registers of a thread.
    pub registers: u32,
    /// Bytes of a thread's stack.
    pub stack: u32,
    /// Bytes of registers saved to and restored from memory.
    pub spills: u32,
    /// Bytes of shared memory that do not depend on the launch.
    pub shared: u32,
}

/// The version found, or why there is none. Libraries stay loaded, so the answer stays the same.
static FOUND: OnceLock<std::result::Result<Compiler, String>> = OnceLock::new();

impl Compiler {
    /// Finds NVRTC in the folder of [`FOLDER_VAR`] or on the system.
    pub fn find() -> Result<Compiler> {
        Compiler::find_in(std::env::var_os(FOLDER_VAR))
    }

    /// Finds NVRTC in `folder`, or on the system. The first call of a process decides.
    pub fn find_in(folder: Option<OsString>) -> Result<Compiler> {
        let found = FOUND.get_or_init(|| load(folder.as_deref().map(Path::new)));
        found.clone().map_err(|why| {
            Diag::system(format!("NVIDIA's compiler library NVRTC cannot be used: {why}")).help(format!(
                "install CUDA's NVRTC, or set {FOLDER_VAR} to a folder with `libnvrtc.so.13` and `libnvrtc-builtins.so.13.0` \
                 (the Python wheel `nvidia-cuda-nvrtc` has them)"
            ))
        })
    }

    /// Compiles a text as [`super::text::emit`] writes it.
    pub fn compile(&self, text: &str, gpu: &GpuDesc) -> Result<Cubin> {
        let bug = |what: String| Diag::bug(format!("CUDA text for {}: {what}", gpu.arch));
        let source = CString::new(text).map_err(|_| bug("a zero byte".into()))?;
        let program = result::create_program(&source, Some(c"kernels.cu"))
            .map_err(|e| Diag::system(format!("NVRTC makes no program: {e}")))?;
        let options = [
            format!("--gpu-architecture={}", gpu.arch),
            "--std=c++17".into(),
            "--fmad=false".into(),
            "--ptxas-options=-v".into(),
        ];
        // SAFETY: the program was just made and is destroyed once, below.
        let compiled = unsafe { result::compile_program(program, &options) };
        // SAFETY: as above; NVRTC has a log for each program.
        let log = unsafe { log(program) };
        let bytes = compiled.map_err(|e| bug(format!("{e}\n{log}"))).and_then(|()| {
            // SAFETY: as above; the program is compiled for a real architecture.
            unsafe { cubin(program) }.map_err(|e| bug(format!("no machine code: {e}")))
        });
        // SAFETY: nothing uses the program after this.
        let destroyed = unsafe { result::destroy_program(program) };
        destroyed.map_err(|e| Diag::system(format!("NVRTC keeps a program: {e}")))?;
        Ok(Cubin { bytes: bytes?, log })
    }
}

/// Loads the libraries and asks for the version.
fn load(folder: Option<&Path>) -> std::result::Result<Compiler, String> {
    if let Some(folder) = folder {
        let files = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let mut names: Vec<_> = files.filter_map(|f| f.ok().map(|f| f.path())).collect();
        names.sort();
        let named = |prefix: &str| {
            let is = |p: &&std::path::PathBuf| {
                p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(prefix))
            };
            let found = names.iter().find(is);
            found.ok_or_else(|| format!("{} has no `{prefix}*`", folder.display()))
        };
        // By name, NVRTC would look for the second library, and cudarc for the first; both find what is loaded already.
        for prefix in ["libnvrtc-builtins.so", "libnvrtc.so"] {
            let path = named(prefix)?;
            // SAFETY: the file is NVIDIA's library by its name; its initializers take no arguments and touch nothing of ours.
            let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
            std::mem::forget(library.map_err(|e| format!("{}: {e}", path.display()))?);
        }
    }
    // SAFETY: loads the library by name and nothing else.
    if !unsafe { sys::is_culib_present() } {
        return Err("there is no `libnvrtc.so`".into());
    }
    let mut version = (0, 0);
    // SAFETY: both places are valid for writing.
    let asked = unsafe { sys::nvrtcVersion(&raw mut version.0, &raw mut version.1) };
    asked.result().map_err(|e| format!("it does not tell its version: {e}"))?;
    Ok(Compiler { version })
}

/// What was said while a program was compiled.
///
/// # Safety
///
/// `program` is a program that was not destroyed.
unsafe fn log(program: sys::nvrtcProgram) -> String {
    // SAFETY: as the caller promises.
    let chars = unsafe { result::get_program_log(program) }.unwrap_or_default();
    let bytes: Vec<u8> = chars.into_iter().map(|c| c as u8).take_while(|&c| c != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The machine code of a compiled program.
///
/// # Safety
///
/// `program` is a program that was compiled and not destroyed.
unsafe fn cubin(program: sys::nvrtcProgram) -> std::result::Result<Vec<u8>, result::NvrtcError> {
    let mut size = 0;
    // SAFETY: as the caller promises, and the place is valid for writing.
    unsafe { sys::nvrtcGetCUBINSize(program, &raw mut size) }.result()?;
    let mut bytes = vec![0u8; size];
    // SAFETY: as above; the buffer has the size asked for.
    unsafe { sys::nvrtcGetCUBIN(program, bytes.as_mut_ptr().cast()) }.result()?;
    Ok(bytes)
}

impl Cubin {
    /// What each kernel uses, from the assembler's report.
    pub fn usage(&self) -> Vec<Usage> {
        usage(&self.log)
    }
}

/// Reads the assembler's report.
fn usage(log: &str) -> Vec<Usage> {
    let mut list: Vec<Usage> = vec![];
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            list.push(Usage { kernel, ..Usage::default() });
        }
        let Some(last) = list.last_mut() else { continue };
        for (part, number) in line.split(',').filter_map(|p| first_number(p).map(|n| (p, n))) {
            match part {
                p if p.contains("stack frame") => last.stack = number,
                p if p.contains("bytes spill") => last.spills += number,
                p if p.contains("registers") => last.registers = number,
                p if p.contains("bytes smem") => last.shared = number,
                _ => {}
            }
        }
    }
    list
}

/// The first number of a text.
fn first_number(text: &str) -> Option<u32> {
    let from = text.find(|c: char| c.is_ascii_digit())?;
    let digits = &text[from..];
    let to = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    digits[..to].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read() {
        let log = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'norm' for 'sm_80'
ptxas info    : Function properties for norm
    8 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 38 registers, used 1 barriers, 128 bytes smem, 380 bytes cmem[0]";
        let want = Usage { kernel: "norm".into(), registers: 38, stack: 8, spills: 48, shared: 128 };
        assert_eq!(usage(log), [want]);
        assert_eq!(usage("nothing of use, 3 bytes smem"), []);
    }
}
