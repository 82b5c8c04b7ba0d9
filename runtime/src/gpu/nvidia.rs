//! NVIDIA's driver, loaded when it is asked for.
//!
//! One device, the first (`CUDA_VISIBLE_DEVICES` chooses), its primary context, and one stream for everything. Copies to
//! the device go through two pinned buffers, one of which is filled while the other is sent.

use std::ffi::{CStr, CString, c_void};
use std::ptr;

use cudarc::driver::sys;
use cudarc::nvrtc;

use super::{Call, Device, Driver};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Gpu, GpuEntry, GpuKernel};

/// Bytes of a pinned buffer.
const STAGE: usize = 8 << 20;

/// What is called, all of which a driver must have: CUDA 12.0 and later do.
const NEEDED: [&CStr; 31] = [
    c"cuInit",
    c"cuDriverGetVersion",
    c"cuDeviceGet",
    c"cuDeviceGetCount",
    c"cuDeviceGetName",
    c"cuDeviceGetAttribute",
    c"cuDevicePrimaryCtxRetain",
    c"cuDevicePrimaryCtxRelease_v2",
    c"cuCtxSetCurrent",
    c"cuMemGetInfo_v2",
    c"cuMemAlloc_v2",
    c"cuMemFree_v2",
    c"cuMemHostAlloc",
    c"cuMemFreeHost",
    c"cuMemcpyHtoDAsync_v2",
    c"cuMemcpyDtoHAsync_v2",
    c"cuMemsetD8Async",
    c"cuStreamCreate",
    c"cuStreamDestroy_v2",
    c"cuStreamSynchronize",
    c"cuStreamBeginCapture_v2",
    c"cuStreamEndCapture",
    c"cuEventCreate",
    c"cuEventRecord",
    c"cuEventSynchronize",
    c"cuEventDestroy_v2",
    c"cuModuleLoadData",
    c"cuModuleUnload",
    c"cuLaunchKernel",
    c"cuGraphInstantiateWithFlags",
    c"cuGraphLaunch",
];

/// Blocks of a kernel may have this much shared memory without being asked for.
const SHARED_UNASKED: u32 = 48 << 10;

/// A pinned buffer and the event after the last copy from it.
struct Stage {
    bytes: *mut u8,
    sent: sys::CUevent,
    /// Whether a copy may be under way.
    busy: bool,
}

/// A loaded kernel.
struct Kernel {
    module: sys::CUmodule,
    function: sys::CUfunction,
}

/// The driver with a context and a stream.
pub struct Nvidia {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    stages: Vec<Stage>,
    next_stage: usize,
    kernels: Vec<Option<Kernel>>,
    graphs: Vec<Option<sys::CUgraphExec>>,
}

// SAFETY: handles of the driver belong to no thread; every method makes the context current for the thread it is called on.
unsafe impl Send for Nvidia {}

/// What the driver says to a request, in words.
fn check(result: sys::CUresult, doing: &str) -> Result<()> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    // Names of the cases are those of NVIDIA's documentation.
    let kind = match result {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => ErrorKind::Memory,
        _ => ErrorKind::Device,
    };
    Err(Error::new(kind, format!("the GPU's driver cannot {doing}: {result:?}")))
}

impl Nvidia {
    /// Opens the first device.
    pub fn open() -> Result<Nvidia> {
        let target = |what: &str| Error::new(ErrorKind::Target, what.to_string());
        // SAFETY: looks for the library by name, which runs its initializers and nothing else.
        if !unsafe { sys::is_culib_present() } {
            return Err(target(
                "the engine's kernels run on a GPU, and this machine has no NVIDIA driver: there is no `libcuda.so`",
            ));
        }
        // SAFETY: the library is there, as was just seen.
        let library = unsafe { sys::culib() };
        for name in NEEDED {
            // SAFETY: the symbol is looked up and not used.
            if unsafe { library.get::<*const c_void>(name.to_bytes_with_nul()) }.is_err() {
                let name = name.to_string_lossy();
                return Err(target(&format!("this machine's NVIDIA driver is too old: it lacks `{name}`")));
            }
        }
        // SAFETY: the first call to the driver, as it asks.
        match unsafe { sys::cuInit(0) } {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => {
                return Err(target("the engine's kernels run on a GPU, and this machine has none"));
            }
            result => check(result, "start")?,
        }
        let (mut count, mut device) = (0, 0);
        // SAFETY: the places are valid for writing.
        check(unsafe { sys::cuDeviceGetCount(&raw mut count) }, "count devices")?;
        if count == 0 {
            return Err(target("the engine's kernels run on a GPU, and this machine has none"));
        }
        // SAFETY: as above; there is a device.
        check(unsafe { sys::cuDeviceGet(&raw mut device, 0) }, "open the device")?;
        let mut context = ptr::null_mut();
        // SAFETY: as above; the device is the one just opened.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) }, "make a context")?;
        let mut nvidia = Nvidia {
            device,
            context,
            stream: ptr::null_mut(),
            stages: vec![],
            next_stage: 0,
            kernels: vec![],
            graphs: vec![],
        };
        nvidia.enter()?;
        let mut stream = ptr::null_mut();
        // SAFETY: the place is valid for writing; 1 makes a stream that does not wait for the default one.
        check(unsafe { sys::cuStreamCreate(&raw mut stream, 1) }, "make a stream")?;
        nvidia.stream = stream;
        Ok(nvidia)
    }

    /// Makes the context current for this thread.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context is held until drop.
        check(unsafe { sys::cuCtxSetCurrent(self.context) }, "use its context")
    }

    fn attribute(&self, which: sys::CUdevice_attribute) -> Result<u32> {
        let mut value = 0;
        // SAFETY: the place is valid for writing.
        let asked = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, self.device) };
        check(asked, "describe the device")?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    /// The pinned buffers, made when they are first needed.
    fn stage(&mut self) -> Result<usize> {
        while self.stages.len() < 2 {
            let (mut bytes, mut sent) = (ptr::null_mut(), ptr::null_mut());
            // SAFETY: the place is valid for writing.
            check(unsafe { sys::cuMemHostAlloc(&raw mut bytes, STAGE, 0) }, "pin memory")?;
            // SAFETY: the place is valid for writing; 2 makes an event that keeps no time.
            let made = check(unsafe { sys::cuEventCreate(&raw mut sent, 2) }, "make an event");
            if let Err(error) = made {
                // SAFETY: it was just pinned, and nothing uses it.
                unsafe { sys::cuMemFreeHost(bytes) };
                return Err(error);
            }
            self.stages.push(Stage { bytes: bytes.cast(), sent, busy: false });
        }
        self.next_stage = (self.next_stage + 1) % self.stages.len();
        let stage = &mut self.stages[self.next_stage];
        if std::mem::take(&mut stage.busy) {
            // SAFETY: the event is this stage's own.
            check(unsafe { sys::cuEventSynchronize(stage.sent) }, "copy to the device")?;
        }
        Ok(self.next_stage)
    }

    /// Machine code of a kernel's text.
    fn compile(text: &str, gpu: &Gpu) -> Result<Vec<u8>> {
        let missing = |why: &str| {
            Error::new(
                ErrorKind::Target,
                format!(
                    "the engine's kernels are text, and this machine has no NVRTC to compile them: {why}; install CUDA's NVRTC, \
                     or compile the model where it is found"
                ),
            )
        };
        // SAFETY: looks for the library by name, which runs its initializers and nothing else.
        if !unsafe { nvrtc::sys::is_culib_present() } {
            return Err(missing("there is no `libnvrtc.so`"));
        }
        let failed =
            |e: nvrtc::result::NvrtcError| Error::object(format!("NVRTC does not compile a kernel: {e}"));
        let source = CString::new(text).map_err(|_| Error::object("a kernel's text has a zero byte"))?;
        let program = nvrtc::result::create_program(&source, Some(c"kernels.cu")).map_err(failed)?;
        let options = [
            format!("--gpu-architecture={}", gpu.arch),
            "--std=c++17".to_string(),
            "--fmad=false".to_string(),
        ];
        // SAFETY: the program was just made and is destroyed once, below.
        let compiled = unsafe { nvrtc::result::compile_program(program, &options) }.map_err(failed);
        let code = compiled.and_then(|()| {
            let mut size = 0;
            // SAFETY: the program is compiled, the place is valid for writing.
            unsafe { nvrtc::sys::nvrtcGetCUBINSize(program, &raw mut size) }.result().map_err(failed)?;
            let mut bytes = vec![0u8; size];
            // SAFETY: as above; the buffer has the size asked for.
            unsafe { nvrtc::sys::nvrtcGetCUBIN(program, bytes.as_mut_ptr().cast()) }
                .result()
                .map_err(failed)?;
            Ok(bytes)
        });
        // SAFETY: nothing uses the program after this.
        unsafe { nvrtc::result::destroy_program(program) }.map_err(failed)?;
        code
    }
}

impl Driver for Nvidia {
    fn device(&mut self) -> Result<Device> {
        use sys::CUdevice_attribute as A;
        self.enter()?;
        let mut name = [0; 128];
        let (mut cuda, mut free, mut total) = (0, 0, 0);
        let length = name.len() as i32 - 1;
        // SAFETY: the buffer has the length said, and a zero behind it.
        let asked = unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), length, self.device) };
        check(asked, "name the device")?;
        // SAFETY: the place is valid for writing.
        check(unsafe { sys::cuDriverGetVersion(&raw mut cuda) }, "tell its version")?;
        // SAFETY: the places are valid for writing.
        check(unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }, "tell its memory")?;
        // SAFETY: the driver ended the name with a zero, at the latest at the last byte, which was zero before.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) };
        Ok(Device {
            name: name.to_string_lossy().into_owned(),
            capability: (
                self.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                self.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            cuda: u32::try_from(cuda).unwrap_or(0),
            free: free as u64,
            total: total as u64,
            multiprocessors: self.attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        })
    }

    fn allocate(&mut self, bytes: u64) -> Result<u64> {
        self.enter()?;
        let mut at = 0;
        let size = usize::try_from(bytes.max(1)).unwrap_or(usize::MAX);
        // SAFETY: the place is valid for writing.
        check(unsafe { sys::cuMemAlloc_v2(&raw mut at, size) }, &format!("allocate {bytes} bytes"))?;
        Ok(at)
    }

    fn free(&mut self, at: u64) {
        if self.enter().is_ok() {
            // SAFETY: the address came from `allocate`; the driver waits for what uses it. A failure leaves memory held.
            let _ = unsafe { sys::cuMemFree_v2(at) };
        }
    }

    fn fill(&mut self, at: u64, byte: u8, bytes: u64) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller gives a range it has allocated.
        check(unsafe { sys::cuMemsetD8Async(at, byte, bytes as usize, self.stream) }, "fill memory")
    }

    fn upload(&mut self, to: u64, from: &[u8]) -> Result<()> {
        self.enter()?;
        let mut to = to;
        for piece in from.chunks(STAGE) {
            let index = self.stage()?;
            let stream = self.stream;
            let stage = &mut self.stages[index];
            // SAFETY: the buffer has `STAGE` bytes, and no copy from it is under way.
            unsafe { ptr::copy_nonoverlapping(piece.as_ptr(), stage.bytes, piece.len()) };
            // SAFETY: the caller gives a range it has allocated; the buffer stays as it is until the event.
            let sent = unsafe { sys::cuMemcpyHtoDAsync_v2(to, stage.bytes.cast(), piece.len(), stream) };
            check(sent, "copy to the device")?;
            stage.busy = true;
            // SAFETY: both are this driver's own.
            check(unsafe { sys::cuEventRecord(stage.sent, stream) }, "copy to the device")?;
            to += piece.len() as u64;
        }
        Ok(())
    }

    fn download(&mut self, to: &mut [u8], from: u64) -> Result<()> {
        self.enter()?;
        if to.is_empty() {
            return self.wait();
        }
        // SAFETY: the caller gives a range it has allocated; `to` is borrowed until the copy is done, below.
        let asked = unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), self.stream) };
        check(asked, "copy from the device")?;
        self.wait()
    }

    fn load(&mut self, entry: &GpuEntry, launch: &GpuKernel, gpu: &Gpu) -> Result<u64> {
        self.enter()?;
        let compiled = if entry.cubin.is_empty() { Nvidia::compile(&entry.source, gpu)? } else { vec![] };
        let code = if entry.cubin.is_empty() { &compiled } else { &entry.cubin };
        let name = CString::new(entry.symbol.as_str())
            .map_err(|_| Error::object(format!("a kernel called {:?}", entry.symbol)))?;
        let (mut module, mut function) = (ptr::null_mut(), ptr::null_mut());
        let doing = format!("load the kernel `{}`", entry.symbol);
        // SAFETY: the place is valid for writing; the driver checks the code, whose digest was compared.
        check(unsafe { sys::cuModuleLoadData(&raw mut module, code.as_ptr().cast()) }, &doing)?;
        self.kernels.push(Some(Kernel { module, function }));
        // SAFETY: the place is valid for writing, the module was just loaded.
        check(unsafe { sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) }, &doing)?;
        if let Some(Some(kernel)) = self.kernels.last_mut() {
            kernel.function = function;
        }
        if launch.shared > SHARED_UNASKED {
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was just found.
            check(unsafe { sys::cuFuncSetAttribute(function, which, launch.shared as i32) }, &doing)?;
        }
        Ok(self.kernels.len() as u64)
    }

    fn unload(&mut self, function: u64) {
        let kernel = self.kernels.get_mut(function as usize - 1).and_then(Option::take);
        if let (Ok(()), Some(kernel)) = (self.enter(), kernel) {
            // SAFETY: the module was loaded and is unloaded once.
            let _ = unsafe { sys::cuModuleUnload(kernel.module) };
        }
    }

    fn launch(&mut self, call: &Call<'_>) -> Result<()> {
        self.enter()?;
        let kernel = self.kernels.get((call.function as usize).wrapping_sub(1)).and_then(Option::as_ref);
        let kernel = kernel.ok_or_else(|| Error::object(format!("`{}` is not loaded", call.symbol)))?;
        let buffers = call.buffers.iter().map(|at| ptr::from_ref(at).cast::<c_void>().cast_mut());
        let scalars = call.scalars.iter().map(|n| ptr::from_ref(n).cast::<c_void>().cast_mut());
        let mut arguments: Vec<*mut c_void> = buffers.chain(scalars).collect();
        let [x, y] = call.grid;
        // SAFETY: arguments are those of the kernel in order, as the engine's author vouches; the driver copies them.
        let launched = unsafe {
            sys::cuLaunchKernel(
                kernel.function,
                x,
                y,
                1,
                call.threads,
                1,
                1,
                call.shared,
                self.stream,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        check(launched, &format!("launch `{}`", call.symbol))
    }

    fn begin(&mut self) -> Result<()> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is this driver's own.
        check(unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) }, "begin a graph")
    }

    fn end(&mut self) -> Result<u64> {
        self.enter()?;
        let (mut graph, mut exec) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the place is valid for writing.
        check(unsafe { sys::cuStreamEndCapture(self.stream, &raw mut graph) }, "end a graph")?;
        // SAFETY: the place is valid for writing, the graph was just made.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut exec, graph, 0) };
        // SAFETY: what was instantiated does not need it.
        let _ = unsafe { sys::cuGraphDestroy(graph) };
        check(made, "prepare a graph")?;
        self.graphs.push(Some(exec));
        Ok(self.graphs.len() as u64)
    }

    fn replay(&mut self, graph: u64) -> Result<()> {
        self.enter()?;
        let exec = self.graphs.get((graph as usize).wrapping_sub(1)).copied().flatten();
        let exec = exec.ok_or_else(|| Error::new(ErrorKind::Device, "a graph that is gone"))?;
        // SAFETY: both are this driver's own.
        check(unsafe { sys::cuGraphLaunch(exec, self.stream) }, "run a graph")
    }

    fn forget(&mut self, graph: u64) {
        let exec = self.graphs.get_mut((graph as usize).wrapping_sub(1)).and_then(Option::take);
        if let (Ok(()), Some(exec)) = (self.enter(), exec) {
            // SAFETY: it was instantiated and is destroyed once.
            let _ = unsafe { sys::cuGraphExecDestroy(exec) };
        }
    }

    fn wait(&mut self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream is this driver's own.
        check(unsafe { sys::cuStreamSynchronize(self.stream) }, "finish its work")
    }

    fn stream(&self) -> u64 {
        self.stream as u64
    }
}

impl Drop for Nvidia {
    fn drop(&mut self) {
        if self.enter().is_ok() {
            // SAFETY: each was made by this driver and is given back once; nothing is asked of it afterwards.
            unsafe {
                let _ = sys::cuStreamSynchronize(self.stream);
                for exec in self.graphs.drain(..).flatten() {
                    let _ = sys::cuGraphExecDestroy(exec);
                }
                for kernel in self.kernels.drain(..).flatten() {
                    let _ = sys::cuModuleUnload(kernel.module);
                }
                for stage in self.stages.drain(..) {
                    let _ = sys::cuEventDestroy_v2(stage.sent);
                    let _ = sys::cuMemFreeHost(stage.bytes.cast());
                }
                if !self.stream.is_null() {
                    let _ = sys::cuStreamDestroy_v2(self.stream);
                }
            }
        }
        // SAFETY: the context was retained once.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}
