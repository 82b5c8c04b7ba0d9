//! NVIDIA's library of products, where the machine has it: the times that ours stand beside.
//!
//! It is looked for in the folder that `QUANTC_CUBLASLT` names, where the system's linker looks, in the toolkit's folders and in
//! those of Python's packages. Functions and numbers are those of `cublasLt.h`, which versions 12 and 13 have alike.

use crate::device::{Device, Fault, Held, Time};
use crate::random::{ROTATED, Random};
use libloading::Library;
use serde::{Deserialize, Serialize};
use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::ptr;

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Numbers {
    /// bf16, summed in f32.
    Bf16,
    /// Signed bytes, summed in i32.
    Int8,
    /// e4m3, summed in f32.
    Fp8,
}

impl Numbers {
    /// Bytes of one.
    pub fn bytes(self) -> u32 {
        if self == Numbers::Bf16 { 2 } else { 1 }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Numbers::Bf16 => "bf16",
            Numbers::Int8 => "int8",
            Numbers::Fp8 => "fp8",
        }
    }

    /// Types of operands and results, of what sums are in, and of the factors; the bytes of a result.
    fn types(self) -> (c_int, c_int, c_int, c_int, u64) {
        match self {
            Numbers::Bf16 => (R_16BF, R_16BF, COMPUTE_32F, R_32F, 2),
            Numbers::Int8 => (R_8I, R_32I, COMPUTE_32I, R_32I, 4),
            Numbers::Fp8 => (R_8F_E4M3, R_16BF, COMPUTE_32F, R_32F, 2),
        }
    }
}

const R_32F: c_int = 0;
const R_8I: c_int = 3;
const R_32I: c_int = 10;
const R_16BF: c_int = 14;
const R_8F_E4M3: c_int = 28;
const COMPUTE_32F: c_int = 68;
const COMPUTE_32I: c_int = 72;
const DESC_TRANSA: c_int = 3;
const DESC_A_SCALE: c_int = 17;
const DESC_B_SCALE: c_int = 18;
const DESC_FAST_ACCUM: c_int = 25;
const PREFERENCE_WORKSPACE: c_int = 1;
const OP_T: i32 = 1;

/// Bytes of the library's own memory for a product.
const WORKSPACE: usize = 32 << 20;

type Handle = *mut c_void;

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Choice {
    algorithm: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

type Create = unsafe extern "C" fn(*mut Handle) -> c_int;
type Destroy = unsafe extern "C" fn(Handle) -> c_int;
type DescCreate = unsafe extern "C" fn(*mut Handle, c_int, c_int) -> c_int;
type SetAttribute = unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int;
type LayoutCreate = unsafe extern "C" fn(*mut Handle, c_int, u64, u64, i64) -> c_int;
type Heuristic = unsafe extern "C" fn(
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    c_int,
    *mut Choice,
    *mut c_int,
) -> c_int;
type Matmul = unsafe extern "C" fn(
    Handle,
    Handle,
    *const c_void,
    *const c_void,
    Handle,
    *const c_void,
    Handle,
    *const c_void,
    *const c_void,
    Handle,
    *mut c_void,
    Handle,
    *const [u64; 8],
    *mut c_void,
    usize,
    *mut c_void,
) -> c_int;

/// The library, open.
pub struct Cublas {
    /// Keeps the functions where they are.
    _library: Library,
    handle: Handle,
    stream: u64,
    version: usize,
    destroy: Destroy,
    desc_create: DescCreate,
    desc_set: SetAttribute,
    desc_destroy: Destroy,
    layout_create: LayoutCreate,
    layout_destroy: Destroy,
    preference_create: Create,
    preference_set: SetAttribute,
    preference_destroy: Destroy,
    heuristic: Heuristic,
    matmul: Matmul,
}

/// Folders where it may be.
fn folders() -> Vec<PathBuf> {
    let mut list: Vec<PathBuf> = std::env::var_os("QUANTC_CUBLASLT").map(PathBuf::from).into_iter().collect();
    if !list.is_empty() {
        return list;
    }
    list.push(PathBuf::new());
    let children = |path: &str| std::fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path());
    let toolkits = children("/usr/local").filter(|p| p.to_string_lossy().contains("cuda"));
    list.extend(toolkits.flat_map(|p| [p.join("lib64"), p.join("targets/x86_64-linux/lib")]));
    let print = "import sys; print('\\n'.join(sys.path))";
    let listed =
        Command::new("python3").args(["-c", print]).output().map(|out| out.stdout).unwrap_or_default();
    for site in String::from_utf8_lossy(&listed).lines().filter(|line| line.ends_with("-packages")) {
        let nvidia = format!("{site}/nvidia");
        list.extend(["cublas/lib", "cu13/lib", "cu12/lib"].map(|below| PathBuf::from(&nvidia).join(below)));
        list.push(PathBuf::from(site).join("torch/lib"));
    }
    list
}

impl Cublas {
    /// Looks for it; `stream` is the driver's. The reason if there is none.
    pub fn open(stream: u64) -> Result<Cublas, String> {
        if stream == 0 {
            return Err("the driver has no stream of its own".into());
        }
        let names = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];
        let paths = folders().into_iter().flat_map(|folder| names.map(|name| folder.join(name)));
        for path in paths {
            // SAFETY: loading NVIDIA's library runs its initializers, which do nothing to this process but set it up.
            if let Ok(library) = unsafe { Library::new(&path) } {
                return Cublas::with(library, stream);
            }
        }
        Err("no libcublasLt was found".into())
    }

    fn with(library: Library, stream: u64) -> Result<Cublas, String> {
        macro_rules! get {
            ($name:literal) => {
                // SAFETY: the function has this type in the library's header.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }.map_err(|e| e.to_string())?
            };
        }
        let version: unsafe extern "C" fn() -> usize = get!("cublasLtGetVersion");
        let create: Create = get!("cublasLtCreate");
        let (destroy, desc_create) = (get!("cublasLtDestroy"), get!("cublasLtMatmulDescCreate"));
        let (desc_set, desc_destroy) =
            (get!("cublasLtMatmulDescSetAttribute"), get!("cublasLtMatmulDescDestroy"));
        let (layout_create, layout_destroy) =
            (get!("cublasLtMatrixLayoutCreate"), get!("cublasLtMatrixLayoutDestroy"));
        let (preference_create, preference_set) =
            (get!("cublasLtMatmulPreferenceCreate"), get!("cublasLtMatmulPreferenceSetAttribute"));
        let (preference_destroy, heuristic) =
            (get!("cublasLtMatmulPreferenceDestroy"), get!("cublasLtMatmulAlgoGetHeuristic"));
        let matmul = get!("cublasLtMatmul");
        let mut handle = ptr::null_mut();
        // SAFETY: the place is valid for writing.
        check(unsafe { create(&raw mut handle) }, "start")?;
        // SAFETY: it takes nothing.
        let version = unsafe { version() };
        Ok(Cublas {
            _library: library,
            handle,
            stream,
            version,
            destroy,
            desc_create,
            desc_set,
            desc_destroy,
            layout_create,
            layout_destroy,
            preference_create,
            preference_set,
            preference_destroy,
            heuristic,
            matmul,
        })
    }

    /// Its version, as it says it.
    pub fn version(&self) -> String {
        // Version 12.8.4 is 120804.
        let v = self.version;
        format!("{}.{}.{}", v / 10000, v / 100 % 100, v % 100)
    }

    /// The time of `out[m][n] = x[m][k] * w[n][k]` with random numbers and weights that no cache holds, in a graph as ours.
    pub fn time(
        &mut self,
        device: &mut Device<'_>,
        numbers: Numbers,
        m: u32,
        n: u32,
        k: u32,
    ) -> Result<Time, Fault> {
        let (_, _, _, _, out_bytes) = numbers.types();
        let size = u64::from(numbers.bytes());
        let weights = u64::from(n) * u64::from(k) * size;
        let copies = ROTATED.div_ceil(weights).clamp(2, 16) as usize;
        let mut held = Held::new(device);
        let mut random = Random(u64::from(m) ^ u64::from(n) << 20 ^ u64::from(k) << 40);
        let piece = random.operands(numbers, 4 << 20);
        let x = held.repeated(u64::from(m) * u64::from(k) * size, &piece)?;
        let w: Vec<u64> = (0..copies).map(|_| held.repeated(weights, &piece)).collect::<Result<_, _>>()?;
        let out = held.allocate(u64::from(m) * u64::from(n) * out_bytes)?;
        let workspace = held.allocate(WORKSPACE as u64)?;
        let one = held.upload(&1f32.to_le_bytes())?;
        let product = Product::new(self, numbers, [m, n, k], one).map_err(Fault::Wrong)?;
        // One outside of a graph: whatever the library sets up, it sets up here.
        product.launch([w[0], x, out], workspace).map_err(Fault::Lost)?;
        held.wait()?;
        let count = Held::launches(copies, m <= 64);
        held.time(count, &mut |_, i| product.launch([w[i % copies], x, out], workspace).map_err(Fault::Lost))
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        // SAFETY: the handle was made once, and nothing uses it any more.
        let _ = unsafe { (self.destroy)(self.handle) };
    }
}

fn check(status: c_int, doing: &str) -> Result<(), String> {
    if status == 0 { Ok(()) } else { Err(format!("cuBLASLt does not {doing}: status {status}")) }
}

/// What describes a product, and how the library chose to compute it.
struct Product<'c> {
    blas: &'c Cublas,
    numbers: Numbers,
    desc: Handle,
    layouts: [Handle; 3],
    algorithm: [u64; 8],
}

impl<'c> Product<'c> {
    fn new(blas: &'c Cublas, numbers: Numbers, [m, n, k]: [u32; 3], one: u64) -> Result<Product<'c>, String> {
        let (operand, result, compute, factor, _) = numbers.types();
        let mut product = Product {
            blas,
            numbers,
            desc: ptr::null_mut(),
            layouts: [ptr::null_mut(); 3],
            algorithm: [0; 8],
        };
        // SAFETY: here and below, places are valid for writing, and attributes have the sizes that the header gives.
        check(unsafe { (blas.desc_create)(&raw mut product.desc, compute, factor) }, "describe a product")?;
        let desc = product.desc;
        let set = |which: c_int, value: *const c_void, bytes: usize| {
            // SAFETY: as above; the library copies the value.
            check(unsafe { (blas.desc_set)(desc, which, value, bytes) }, "take an attribute")
        };
        let transposed = OP_T;
        set(DESC_TRANSA, (&raw const transposed).cast(), 4)?;
        if numbers == Numbers::Fp8 {
            set(DESC_A_SCALE, (&raw const one).cast(), 8)?;
            set(DESC_B_SCALE, (&raw const one).cast(), 8)?;
            let fast = 1i8;
            set(DESC_FAST_ACCUM, (&raw const fast).cast(), 1)?;
        }
        // Its matrices lie column by column: weights are k x n, rows k x m, results n x m.
        let sizes = [(operand, k, n), (operand, k, m), (result, n, m)];
        for (layout, (ty, rows, columns)) in product.layouts.iter_mut().zip(sizes) {
            // SAFETY: as above.
            let made =
                unsafe { (blas.layout_create)(layout, ty, rows.into(), columns.into(), i64::from(rows)) };
            check(made, "describe a matrix")?;
        }
        let mut preference = ptr::null_mut();
        // SAFETY: as above.
        check(unsafe { (blas.preference_create)(&raw mut preference) }, "take a preference")?;
        let bytes = WORKSPACE;
        let mut choice = Choice { algorithm: [0; 8], workspace: 0, state: 0, waves: 0.0, reserved: [0; 4] };
        let mut count = 0;
        let [a, b, d] = product.layouts;
        // SAFETY: as above; there is room for the one choice that is asked for.
        let chosen = unsafe {
            (blas.preference_set)(preference, PREFERENCE_WORKSPACE, (&raw const bytes).cast(), 8);
            let (chosen, count) = (&raw mut choice, &raw mut count);
            (blas.heuristic)(blas.handle, desc, a, b, d, d, preference, 1, chosen, count)
        };
        // SAFETY: it was made above, and nothing uses it any more.
        unsafe { (blas.preference_destroy)(preference) };
        check(chosen, "choose")?;
        if count == 0 {
            return Err(format!("cuBLASLt has no product of {} for {m} x {n} x {k}", numbers.name()));
        }
        product.algorithm = choice.algorithm;
        Ok(product)
    }

    /// Asks for the product of weights and rows, into results.
    fn launch(&self, [w, x, out]: [u64; 3], workspace: u64) -> Result<(), String> {
        let (float, integer) = ([1f32, 0.0], [1i32, 0]);
        let (alpha, beta): (*const c_void, *const c_void) = match self.numbers {
            Numbers::Int8 => ((&raw const integer[0]).cast(), (&raw const integer[1]).cast()),
            _ => ((&raw const float[0]).cast(), (&raw const float[1]).cast()),
        };
        let [a, b, d] = self.layouts;
        // SAFETY: addresses are of device memory of the sizes that the layouts say; factors are read before it returns.
        let status = unsafe {
            (self.blas.matmul)(
                self.blas.handle,
                self.desc,
                alpha,
                w as *const c_void,
                a,
                x as *const c_void,
                b,
                beta,
                out as *const c_void,
                d,
                out as *mut c_void,
                d,
                &raw const self.algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                self.blas.stream as *mut c_void,
            )
        };
        check(status, "multiply")
    }
}

impl Drop for Product<'_> {
    fn drop(&mut self) {
        for layout in self.layouts.into_iter().filter(|l| !l.is_null()) {
            // SAFETY: it was made once, and nothing uses it any more.
            unsafe { (self.blas.layout_destroy)(layout) };
        }
        if !self.desc.is_null() {
            // SAFETY: as above.
            unsafe { (self.blas.desc_destroy)(self.desc) };
        }
    }
}
