//! Timing of single kernels: pinned threads, huge pages, processor time.
//!
//! A [`Timer`] runs a kernel on some threads, each on a processor and an equal part of the items, and tells how long the
//! slowest of them took. One thread is timed by what it gets of its processor, so other programs disturb a figure only
//! through the memory and caches that they share. Several threads are timed by the clock: those that take turns on a
//! processor do not compete for memory, and would look faster than they are. Figures compare when they were taken in
//! turns: see [`turns`].

use quantc_codegen::tune;
use quantc_codegen::tune::limits::{Limit, STREAM_ITEM};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::TargetDesc;
use quantc_runtime::object::{KernelFn, Object};
use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

/// Zeroed memory on huge pages, which lives until it is dropped.
pub struct Memory {
    start: *mut u8,
    len: usize,
}

// SAFETY: a mapping is plain memory without thread affinity.
unsafe impl Send for Memory {}
// SAFETY: `&Memory` gives out nothing but its address; kernels get parts of it that no two threads write.
unsafe impl Sync for Memory {}

impl Memory {
    /// Huge pages begin and end at multiples of this.
    const HUGE: usize = 2 << 20;

    /// At least `len` bytes.
    pub fn new(len: usize) -> Result<Memory> {
        let len = len.max(1).next_multiple_of(Memory::HUGE) + Memory::HUGE;
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        // SAFETY: a new anonymous mapping at an address the kernel chooses touches no existing memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(Diag::system(format!("cannot map {len} bytes to time a kernel with")));
        }
        // SAFETY: the range is the mapping just made; the advice does not change its contents, a refusal is harmless.
        unsafe { libc::madvise(start, len, libc::MADV_HUGEPAGE) };
        Ok(Memory { start: start.cast(), len })
    }

    /// Memory whose byte `i` is `byte(i)`.
    pub fn filled(len: usize, byte: impl Fn(usize) -> u8) -> Result<Memory> {
        let memory = Memory::new(len)?;
        let start = memory.ptr();
        // SAFETY: the mapping has room for `len` bytes from `ptr` on, and nobody else knows it yet.
        let bytes = unsafe { std::slice::from_raw_parts_mut(start, len) };
        for (i, b) in bytes.iter_mut().enumerate() {
            *b = byte(i);
        }
        Ok(memory)
    }

    /// The first byte, on a huge page's border.
    pub fn ptr(&self) -> *mut u8 {
        self.start.wrapping_add(self.start.align_offset(Memory::HUGE))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nobody uses it any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// A loaded kernel.
pub struct Kernel {
    function: KernelFn,
    /// Keeps the code mapped.
    _object: std::sync::Arc<Object>,
}

impl Kernel {
    /// The kernels `symbols` of an object.
    pub fn load(object: &[u8], symbols: &[&str]) -> Result<Vec<Kernel>> {
        let object = Object::load(object).map_err(|e| Diag::bug(e.to_string()))?;
        let object = std::sync::Arc::new(object);
        let find = |symbol: &&str| {
            let function = object.symbol(symbol);
            let function = function.ok_or_else(|| Diag::bug(format!("the object has no `{symbol}`")))?;
            Ok(Kernel { function, _object: object.clone() })
        };
        symbols.iter().map(find).collect()
    }
}

/// What a kernel is called on.
#[derive(Clone)]
pub struct Call {
    /// Its arguments, for each worker.
    pub args: Vec<Vec<*mut u8>>,
    /// The two sizes of the call.
    pub dims: [i64; 2],
    /// Items, shared by the workers.
    pub items: i64,
}

// SAFETY: the pointers are into `Memory` that the caller keeps; they are used by kernels only.
unsafe impl Sync for Call {}

impl Call {
    /// A call with the same arguments for all of `threads`.
    pub fn shared(threads: usize, args: Vec<*mut u8>, rows: u32, items: u32) -> Call {
        Call { args: vec![args; threads], dims: [i64::from(rows); 2], items: i64::from(items) }
    }
}

/// Runs kernels on pinned threads.
#[derive(Clone, Copy, Debug)]
pub struct Timer {
    threads: usize,
}

impl Timer {
    /// A timer of `threads` threads, each on a processor of its own as far as they go.
    pub fn new(threads: usize) -> Timer {
        Timer { threads: threads.max(1) }
    }

    /// How many threads there are.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Seconds that the slowest thread took for its part of every one of `calls`.
    ///
    /// # Safety
    /// `kernel` must be made for the arguments: buffers as large as its spec demands, none of them written by two
    /// threads.
    pub unsafe fn seconds(&self, kernel: &Kernel, calls: &[Call]) -> f64 {
        let (barrier, threads) = (Barrier::new(self.threads), self.threads as i64);
        let function = kernel.function;
        let work = |worker: usize| {
            pin(worker);
            barrier.wait();
            let (start, clock) = (processor_seconds(), Instant::now());
            for call in calls {
                let (begin, end) =
                    (call.items * worker as i64 / threads, call.items * (worker as i64 + 1) / threads);
                if begin < end {
                    let args = call.args[worker].as_ptr();
                    // SAFETY: the caller promises that the arguments are the kernel's.
                    unsafe { function(black_box(args), call.dims.as_ptr(), begin, end) };
                }
            }
            if threads == 1 { processor_seconds() - start } else { clock.elapsed().as_secs_f64() }
        };
        std::thread::scope(|scope| {
            let work = &work;
            let all: Vec<_> = (0..self.threads).map(|worker| scope.spawn(move || work(worker))).collect();
            all.into_iter().map(|t| t.join().unwrap_or(f64::NAN)).fold(0.0, f64::max)
        })
    }
}

/// What memory gives at a moment: plain reads of a buffer far larger than any cache, on huge pages.
///
/// Memory is shared with whatever else runs on a machine, and on a virtual one with strangers: the same buffer may be read
/// at half the speed for half a minute. A figure that depends on memory compares with another one only when both were
/// taken while this rate was the same.
pub struct Stream {
    kernel: Kernel,
    call: Call,
    timer: Timer,
    /// What the call reads, and where its results go.
    _memory: [Memory; 2],
}

impl Stream {
    /// Bytes read at once.
    const BYTES: usize = 256 << 20;

    /// A reader on `threads` threads.
    pub fn new(target: &'static TargetDesc, threads: usize) -> Result<Stream> {
        let timer = Timer::new(threads);
        let object = tune::object(target, |unit| Limit::Stream.emit(unit, "stream"))?;
        let kernel = Kernel::load(&object, &["stream"])?.pop();
        let kernel = kernel.ok_or_else(|| Diag::bug("one kernel was asked for"))?;
        // Pages that were never written all are the same one.
        let data = Memory::filled(Stream::BYTES, |i| (i >> 12) as u8)?;
        let results = Memory::new(timer.threads() * 4096)?;
        let args = |worker: usize| vec![data.ptr(), results.ptr().wrapping_add(worker * 4096)];
        let args = (0..timer.threads()).map(args).collect();
        let call = Call { args, dims: [1, 1], items: (Stream::BYTES / STREAM_ITEM) as i64 };
        Ok(Stream { kernel, call, timer, _memory: [data, results] })
    }

    /// Bytes a second, the middle one of a few passes of some milliseconds each.
    pub fn rate(&self) -> f64 {
        // SAFETY: the call has what the kernel reads, and room for the result of each worker.
        let pass = |_| unsafe { self.timer.seconds(&self.kernel, std::slice::from_ref(&self.call)) };
        Stream::BYTES as f64 / median(&(0..15).map(pass).collect::<Vec<f64>>())
    }
}

/// Seconds of processor time that this thread has had.
fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock writes the struct given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Ties this thread to the `worker`-th processor of those that the process may use; a refusal is harmless.
fn pin(worker: usize) {
    // SAFETY: a set of processors is plain bits, all zero is the empty set; the calls read and write such sets only, and
    // every index is below the number of bits.
    unsafe {
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut allowed) != 0 {
            return;
        }
        let cpus: Vec<usize> =
            (0..libc::CPU_SETSIZE as usize).filter(|&cpu| libc::CPU_ISSET(cpu, &allowed)).collect();
        if let Some(&cpu) = cpus.get(worker % cpus.len().max(1)) {
            libc::CPU_SET(cpu, &mut one);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &one);
        }
    }
}

/// Runs all of `contestants` once a round, round after round, and gives the figures of each, in order of rounds. The
/// first round warms up and is not counted.
pub fn turns(rounds: usize, contestants: &mut [&mut dyn FnMut() -> f64]) -> Vec<Vec<f64>> {
    let mut figures = vec![vec![]; contestants.len()];
    for round in 0..=rounds {
        for (contestant, figures) in contestants.iter_mut().zip(&mut figures) {
            let figure = contestant();
            if round > 0 {
                figures.push(figure);
            }
        }
    }
    figures
}

/// The middle one of some figures, or the mean of the two in the middle; not a number when there are none.
pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// The processor of this machine: name, family, model and stepping.
pub fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |key: &str| {
        let value = info.lines().find_map(|l| l.split_once(':').filter(|(k, _)| k.trim() == key));
        value.map_or("?", |(_, v)| v.trim()).to_string()
    };
    let (name, family) = (field("model name"), field("cpu family"));
    format!("{name}, family {family} model {} stepping {}", field("model"), field("stepping"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_turns() {
        assert!(median(&[]).is_nan());
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), 2.5);
        let (mut a, mut b) = (0.0, 10.0);
        let mut count_a = || {
            a += 1.0;
            a
        };
        let mut count_b = || {
            b += 1.0;
            b
        };
        let figures = turns(2, &mut [&mut count_a, &mut count_b]);
        assert_eq!(figures, [[2.0, 3.0], [12.0, 13.0]]);
    }

    #[test]
    fn memory_is_on_a_border_and_filled() {
        let memory = Memory::filled(5000, |i| i as u8).expect("a few pages are there");
        assert!((memory.ptr() as usize).is_multiple_of(Memory::HUGE));
        // SAFETY: the mapping has more than 5000 bytes.
        let last = unsafe { *memory.ptr().add(4999) };
        assert_eq!(last, 4999u32 as u8);
        assert!(processor_seconds() >= 0.0 && !processor().is_empty());
    }
}
