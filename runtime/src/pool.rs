//! Worker threads that wait for work close at hand.
//!
//! A pool has `n` workers: the caller of [`Pool::run`] is worker 0, the others are threads that live as long as the
//! pool. Whoever waits spins for about 50 microseconds and then sleeps on a futex, so that work which comes in quick
//! succession finds everyone awake and an idle pool costs nothing. With more workers than CPUs nobody spins.
//!
//! Work may be for the first few workers only ([`Pool::run_on`]); the others then look and go back to waiting.
//!
//! A worker that panics makes [`Pool::run`] fail; it does not leave the others waiting, because a panic also breaks the
//! barrier they wait at ([`Barrier::wait`] tells them so). Running work allocates nothing.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::stats;

/// How long to spin before sleeping.
const SPIN: Duration = Duration::from_micros(50);

/// Most workers of a pool.
pub const MAX_WORKERS: usize = 1024;

/// A fixed set of workers.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Held while work runs: one piece of work at a time.
    running: Mutex<()>,
}

/// How to make a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolOptions {
    /// Ties worker `i` (but not the caller, worker 0) to the `i`-th CPU this process may use.
    pub pin: bool,
}

type Work<'a> = dyn Fn(usize) + Sync + 'a;

struct Shared {
    /// Counts pieces of work; a change wakes the workers.
    epoch: Event,
    /// Threads that have finished the current piece.
    finished: Event,
    barrier: Barrier,
    /// How many workers the current piece is for; written and read as `work`.
    active: AtomicUsize,
    stop: AtomicBool,
    panicked: AtomicBool,
    /// The current piece; written by `run` before `epoch` changes, read by threads after.
    work: UnsafeCell<Option<*const Work<'static>>>,
}

// SAFETY: `work` is written only by `run`, which holds `running`, while every thread waits for the next epoch; the
// epoch's store and load order the write before the reads. Everything else is atomic. The pointee is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `work` is used only while `run` keeps its pointee alive.
unsafe impl Send for Shared {}

impl Pool {
    /// Starts `workers - 1` threads.
    pub fn new(workers: usize, options: PoolOptions) -> Result<Pool> {
        if !(1..=MAX_WORKERS).contains(&workers) {
            return Err(Error::input(format!("{workers} threads are not in 1..={MAX_WORKERS}")));
        }
        let spin = workers <= stats::available_cpus();
        let shared = Arc::new(Shared {
            epoch: Event::new(spin),
            finished: Event::new(spin),
            barrier: Barrier::new(workers, spin),
            active: AtomicUsize::new(workers),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            work: UnsafeCell::new(None),
        });
        let cpus = if options.pin { allowed_cpus() } else { Vec::new() };
        let mut pool = Pool { shared, threads: Vec::with_capacity(workers - 1), running: Mutex::new(()) };
        for worker in 1..workers {
            let shared = Arc::clone(&pool.shared);
            let cpu = (!cpus.is_empty()).then(|| cpus[worker % cpus.len()]);
            let thread = std::thread::Builder::new().name(format!("quantc-{worker}")).spawn(move || {
                if let Some(cpu) = cpu {
                    pin_to(cpu);
                }
                shared.serve(worker);
            });
            let failed = |e| Error::new(ErrorKind::Io, format!("cannot start worker thread {worker}: {e}"));
            // Dropping the pool ends the threads already started.
            pool.threads.push(thread.map_err(failed)?);
        }
        Ok(pool)
    }

    /// How many workers there are, the caller included.
    pub fn workers(&self) -> usize {
        self.threads.len() + 1
    }

    /// The barrier of all workers that run the current work; only for use inside [`Pool::run`].
    pub fn barrier(&self) -> &Barrier {
        &self.shared.barrier
    }

    /// Calls `f(worker)` once on every worker and waits for all of them.
    ///
    /// Fails when a worker panicked, and when the pool is already running something.
    pub fn run(&self, f: &(dyn Fn(usize) + Sync)) -> Result<()> {
        self.run_on(self.workers(), f)
    }

    /// Like [`Pool::run`], on the first `active` workers, of which there is at least one.
    pub fn run_on(&self, active: usize, f: &(dyn Fn(usize) + Sync)) -> Result<()> {
        if !(1..=self.workers()).contains(&active) {
            let what = format!("{active} of the pool's {} workers", self.workers());
            return Err(Error::input(format!("work cannot run on {what}")));
        }
        let _running = match self.running.try_lock() {
            Ok(guard) => guard,
            // The lock guards no data, so a panic while it was held breaks nothing.
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::new(ErrorKind::Worker, "the worker threads are busy with another call"));
            }
        };
        let shared = &*self.shared;
        shared.panicked.store(false, Ordering::Relaxed);
        shared.barrier.mend(active);
        shared.active.store(active, Ordering::Relaxed);
        shared.finished.value.store(0, Ordering::Relaxed);
        // SAFETY: only the lifetime changes; `run` does not return before all threads are done with the pointer.
        let work = unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(f) };
        // SAFETY: every thread waits for the next epoch and does not look at `work` before it comes.
        unsafe { *shared.work.get() = Some(work) };
        shared.epoch.advance();
        shared.call(f, 0);
        let threads = self.threads.len() as u32;
        shared.finished.wait_while(|finished| finished < threads);
        if shared.panicked.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Worker, "a worker thread panicked"));
        }
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.epoch.advance();
        for thread in self.threads.drain(..) {
            // `serve` catches panics of the work, so a thread ends normally.
            let _ended = thread.join();
        }
    }
}

impl Shared {
    /// The life of a thread.
    fn serve(&self, worker: usize) {
        let mut seen = 0;
        loop {
            self.epoch.wait_while(|epoch| epoch == seen);
            // The next epoch comes only after this thread has reported, so none is missed.
            seen = seen.wrapping_add(1);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            // SAFETY: the epoch's change ordered the write of `work` before this read.
            let work = unsafe { *self.work.get() };
            if let Some(work) = work.filter(|_| worker < self.active.load(Ordering::Relaxed)) {
                // SAFETY: `run` keeps the closure alive until every thread has reported below.
                self.call(unsafe { &*work }, worker);
            }
            self.finished.advance();
        }
    }

    fn call(&self, f: &(dyn Fn(usize) + Sync), worker: usize) {
        if catch_unwind(AssertUnwindSafe(|| f(worker))).is_err() {
            self.panicked.store(true, Ordering::Release);
            self.barrier.break_up();
        }
    }
}

/// The barrier is broken because a worker panicked; whoever sees it should return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

/// A place where all workers meet, any number of times.
///
/// The sense of a round is the parity of a counter that the last worker to arrive moves on.
pub struct Barrier {
    /// Changes only while nobody waits.
    workers: AtomicU32,
    arrived: AtomicU32,
    round: Event,
    broken: AtomicBool,
}

impl Barrier {
    fn new(workers: usize, spin: bool) -> Barrier {
        Barrier {
            workers: AtomicU32::new(workers as u32),
            arrived: AtomicU32::new(0),
            round: Event::new(spin),
            broken: AtomicBool::new(false),
        }
    }

    /// Waits until every worker has come here.
    #[inline]
    pub fn wait(&self) -> Result<(), Broken> {
        let workers = self.workers.load(Ordering::Relaxed);
        if workers == 1 {
            return Ok(());
        }
        let round = self.round.value.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == workers {
            self.arrived.store(0, Ordering::Relaxed);
            self.round.advance();
        } else {
            self.round.wait_while(|now| now == round && !self.broken.load(Ordering::Acquire));
        }
        if self.broken.load(Ordering::Acquire) { Err(Broken) } else { Ok(()) }
    }

    /// Lets everyone go who waits or will wait.
    fn break_up(&self) {
        self.broken.store(true, Ordering::Release);
        self.round.advance();
    }

    /// Makes the barrier whole again, for so many workers; nobody may be waiting.
    fn mend(&self, workers: usize) {
        self.workers.store(workers as u32, Ordering::Relaxed);
        self.broken.store(false, Ordering::Relaxed);
        self.arrived.store(0, Ordering::Relaxed);
    }
}

/// A counter that threads wait on.
#[repr(align(128))]
struct Event {
    value: AtomicU32,
    sleepers: AtomicU32,
    spin: bool,
}

impl Event {
    fn new(spin: bool) -> Event {
        Event { value: AtomicU32::new(0), sleepers: AtomicU32::new(0), spin }
    }

    /// Adds 1 and wakes everyone who sleeps.
    #[inline]
    fn advance(&self) {
        // Sequentially consistent with `sleepers`: either this sees the sleeper, or the sleeper's futex call sees the
        // new value and returns.
        self.value.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            futex(&self.value, libc::FUTEX_WAKE, i32::MAX as u32);
        }
    }

    /// Returns once `unwanted` is false for the value.
    #[inline]
    fn wait_while(&self, unwanted: impl Fn(u32) -> bool) {
        if !unwanted(self.value.load(Ordering::Acquire)) {
            return;
        }
        if self.spin {
            let start = Instant::now();
            loop {
                for _ in 0..32 {
                    std::hint::spin_loop();
                    if !unwanted(self.value.load(Ordering::Acquire)) {
                        return;
                    }
                }
                if start.elapsed() >= SPIN {
                    break;
                }
            }
        }
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        loop {
            let value = self.value.load(Ordering::SeqCst);
            if !unwanted(value) {
                break;
            }
            futex(&self.value, libc::FUTEX_WAIT, value);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// `FUTEX_WAIT` while the word is `value`, or `FUTEX_WAKE` of up to `value` threads. Every outcome is fine: waiters look
/// at the word again.
fn futex(word: &AtomicU32, operation: i32, value: u32) {
    let operation = operation | libc::FUTEX_PRIVATE_FLAG;
    let no_timeout = std::ptr::null::<libc::timespec>();
    // SAFETY: the word is a live, aligned 32-bit integer, and the call neither keeps nor writes it.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, no_timeout) };
}

/// The CPUs this process may run on, ascending; empty when the system does not tell.
fn allowed_cpus() -> Vec<usize> {
    // SAFETY: a set of CPUs is plain bits, all zero is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is a local of the size given.
    let got = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) };
    if got != 0 {
        return Vec::new();
    }
    // SAFETY: every index is below the number of bits the set has.
    (0..libc::CPU_SETSIZE as usize).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect()
}

/// Ties this thread to a CPU; a refusal is harmless.
fn pin_to(cpu: usize) {
    // SAFETY: as in `allowed_cpus`, where `cpu` comes from.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_may_be_for_the_first_few() {
        let pool = Pool::new(3, PoolOptions::default()).expect("threads start");
        for active in [3, 1, 2, 3, 1] {
            let counts: [AtomicUsize; 3] = Default::default();
            pool.run_on(active, &|worker| {
                for _ in 0..100 {
                    counts[worker].fetch_add(1, Ordering::Relaxed);
                    pool.barrier().wait().expect("nobody panics");
                }
            })
            .expect("nobody panics");
            let counts = counts.map(AtomicUsize::into_inner);
            assert_eq!(counts, [0, 1, 2].map(|worker| if worker < active { 100 } else { 0 }));
        }
        assert!(pool.run_on(0, &|_| ()).is_err() && pool.run_on(4, &|_| ()).is_err());
    }

    #[test]
    fn every_worker_runs_once_and_barriers_separate() {
        for workers in [1, 2, 3, 7] {
            let pool = Pool::new(workers, PoolOptions { pin: workers == 2 }).expect("threads start");
            assert_eq!(pool.workers(), workers);
            let counts: Vec<AtomicUsize> = (0..workers).map(|_| AtomicUsize::new(0)).collect();
            let wrong = AtomicUsize::new(0);
            for _ in 0..50 {
                counts.iter().for_each(|count| count.store(0, Ordering::Relaxed));
                pool.run(&|worker| {
                    for round in 1..=20 {
                        counts[worker].fetch_add(1, Ordering::Relaxed);
                        pool.barrier().wait().expect("nobody panics");
                        if counts.iter().any(|count| count.load(Ordering::Relaxed) != round) {
                            wrong.fetch_add(1, Ordering::Relaxed);
                        }
                        pool.barrier().wait().expect("nobody panics");
                    }
                })
                .expect("nobody panics");
            }
            assert_eq!(wrong.load(Ordering::Relaxed), 0);
        }
    }

    #[test]
    fn sleeping_workers_wake() {
        let pool = Pool::new(2, PoolOptions::default()).expect("threads start");
        let calls = AtomicUsize::new(0);
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(2));
            pool.run(&|worker| {
                if worker == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                pool.barrier().wait().expect("nobody panics");
                calls.fetch_add(1, Ordering::Relaxed);
            })
            .expect("nobody panics");
        }
        assert_eq!(calls.load(Ordering::Relaxed), 20);
    }

    #[test]
    fn a_panic_is_an_error_and_does_not_hang() {
        let pool = Pool::new(3, PoolOptions::default()).expect("threads start");
        let calls = AtomicUsize::new(0);
        for bad in 0..3 {
            let error = pool
                .run(&|worker| {
                    assert_ne!(worker, bad, "this panic is part of the test");
                    while pool.barrier().wait().is_ok() {}
                })
                .expect_err("a worker panicked");
            assert_eq!(error.kind(), ErrorKind::Worker);
            pool.run(&|_| {
                pool.barrier().wait().expect("the pool works again");
                calls.fetch_add(1, Ordering::Relaxed);
            })
            .expect("nobody panics");
        }
        assert_eq!(calls.load(Ordering::Relaxed), 9);
    }

    #[test]
    fn a_nested_run_is_refused() {
        let pool = Pool::new(2, PoolOptions::default()).expect("threads start");
        let refused = AtomicUsize::new(0);
        pool.run(&|_| {
            refused.fetch_add(usize::from(pool.run(&|_| ()).is_err()), Ordering::Relaxed);
        })
        .expect("the outer run is fine");
        assert_eq!(refused.load(Ordering::Relaxed), 2);
        assert!(Pool::new(0, PoolOptions::default()).is_err());
        assert!(Pool::new(MAX_WORKERS + 1, PoolOptions::default()).is_err());
    }
}
