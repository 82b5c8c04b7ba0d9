//! Items of a launch, shared between workers.
//!
//! Each worker owns a contiguous range of the items and takes parts of it from the front, large ones first; a worker that
//! has finished takes parts of what others have left. So nobody waits for a worker that was held up, and most items
//! are still done by the worker that owns them, whose weights lie close to it. Which worker does an item does not
//! change what it computes.

use std::sync::atomic::{AtomicU64, Ordering};

/// Owners that a worker helps at most: looking at more costs more than it finds.
const HELPED: usize = 8;
/// A worker takes one of so many parts of what is left.
const PARTS: u64 = 4;

/// How much of each owner's range has been taken.
pub(crate) struct Shares {
    taken: Box<[Taken]>,
}

/// Items taken from the front of a range; alone on its cache lines.
#[repr(align(128))]
struct Taken(AtomicU64);

impl Shares {
    /// Nothing taken yet, of the ranges of `workers`.
    pub(crate) fn new(workers: usize) -> Shares {
        Shares { taken: (0..workers).map(|_| Taken(AtomicU64::new(0))).collect() }
    }

    /// Calls `run(begin, end)` until all of `items` have been taken, by this worker or another; `workers` share them, all of
    /// which must call this once between two resets.
    pub(crate) fn run(&self, items: u64, worker: usize, workers: usize, mut run: impl FnMut(u64, u64)) {
        for owner in (worker..workers).chain(0..worker).take(HELPED) {
            // Items are at most 2^40 and workers 2^10.
            let begin = items * owner as u64 / workers as u64;
            let end = items * (owner as u64 + 1) / workers as u64;
            while let Some((from, to)) = self.take(owner, end - begin) {
                run(begin + from, begin + to);
            }
        }
    }

    /// Takes a part of the `len` items of `owner`.
    fn take(&self, owner: usize, len: u64) -> Option<(u64, u64)> {
        // The items themselves are ordered by the barriers around a launch.
        let taken = &self.taken[owner].0;
        let mut from = taken.load(Ordering::Relaxed);
        while from < len {
            let to = from + (len - from).div_ceil(PARTS);
            match taken.compare_exchange_weak(from, to, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some((from, to)),
                Err(now) => from = now,
            }
        }
        None
    }

    /// Gives back the range of `owner`. No worker may be inside [`Shares::run`].
    pub(crate) fn reset(&self, owner: usize) {
        self.taken[owner].0.store(0, Ordering::Relaxed);
    }

    /// Gives back all ranges. No worker may be inside [`Shares::run`].
    pub(crate) fn reset_all(&self) {
        (0..self.taken.len()).for_each(|owner| self.reset(owner));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn every_item_is_run_once_whoever_comes_first() {
        for (workers, items) in [(1, 7), (2, 1), (2, 64), (3, 0), (3, 5), (7, 100), (20, 13)] {
            let shares = Shares::new(workers);
            for round in 0..20 {
                let runs: Vec<AtomicU32> = (0..items).map(|_| AtomicU32::new(0)).collect();
                std::thread::scope(|scope| {
                    for worker in 0..workers {
                        let (shares, runs) = (&shares, &runs);
                        scope.spawn(move || {
                            if worker == round % workers {
                                std::thread::yield_now();
                            }
                            shares.run(items, worker, workers, |begin, end| {
                                assert!(begin < end && end <= items);
                                for item in begin..end {
                                    runs[item as usize].fetch_add(1, Ordering::Relaxed);
                                }
                            });
                        });
                    }
                });
                assert!(
                    runs.iter().all(|n| n.load(Ordering::Relaxed) == 1),
                    "{workers} workers, {items} items"
                );
                shares.reset_all();
            }
        }
    }

    #[test]
    fn a_worker_alone_does_the_work_of_those_it_helps() {
        let shares = Shares::new(4);
        let mut done = vec![];
        shares.run(10, 2, 4, |begin, end| done.extend(begin..end));
        assert_eq!(done[..2], [5, 6], "its own come first");
        done.sort_unstable();
        assert_eq!(done, (0..10).collect::<Vec<_>>());
    }
}
