//! Pages of states: one pool for all sequences of a session.
//!
//! A sequence has as many pages as its tokens need, wherever they lie; it takes them as it grows, and gives back those
//! behind its end when it is cut. What is asked for is given whole or not at all.

use crate::error::{Error, ErrorKind, Result};
use crate::format::STATE_BLOCK;

/// Pages that hold so many rows.
fn pages_for(rows: u32) -> usize {
    rows.div_ceil(STATE_BLOCK) as usize
}

/// Which page is whose.
#[derive(Debug)]
pub(super) struct Pages {
    /// The next one to be given is the last.
    free: Vec<u32>,
    /// Pages of each sequence, in the order of its rows.
    of_slot: Vec<Vec<u32>>,
    count: u32,
}

impl Pages {
    /// A pool of `count` pages for `slots` sequences of up to `each` pages. Nothing is allocated later.
    pub fn new(count: u32, slots: u32, each: usize) -> Pages {
        let of_slot = (0..slots).map(|_| Vec::with_capacity(each)).collect();
        Pages { free: (0..count).rev().collect(), of_slot, count }
    }

    /// Checks that each sequence can have pages for so many rows.
    pub fn check(&self, wanted: impl Iterator<Item = (u32, u32)>) -> Result<()> {
        let missing = |(slot, rows): (u32, u32)| {
            pages_for(rows).saturating_sub(self.of_slot.get(slot as usize).map_or(0, Vec::len))
        };
        let missing: usize = wanted.map(missing).sum();
        if missing <= self.free.len() {
            return Ok(());
        }
        let what = format!(
            "the pool is out of pages: {missing} more of {STATE_BLOCK} tokens are needed, and {} of {} are free; forget a \
             sequence, or give the session more pages",
            self.free.len(),
            self.count
        );
        Err(Error::new(ErrorKind::Memory, what))
    }

    /// Lets a sequence have pages for `rows` rows; whether it got more. It was checked that there are enough.
    pub fn grow(&mut self, slot: u32, rows: u32) -> bool {
        let own = &mut self.of_slot[slot as usize];
        let before = own.len();
        let missing = pages_for(rows).saturating_sub(before);
        let kept = self.free.len() - missing.min(self.free.len());
        own.extend(self.free.drain(kept..).rev());
        own.len() > before
    }

    /// Takes back the pages of a sequence behind its first `rows` rows.
    pub fn cut(&mut self, slot: u32, rows: u32) {
        let own = &mut self.of_slot[slot as usize];
        let kept = pages_for(rows).min(own.len());
        // The first of them is the next one given.
        self.free.extend(own.drain(kept..).rev());
    }

    /// The pages of a sequence.
    pub fn of(&self, slot: u32) -> &[u32] {
        &self.of_slot[slot as usize]
    }

    /// Pages that nobody has, and all pages.
    pub fn free(&self) -> (u32, u32) {
        (self.free.len() as u32, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_belong_to_one_sequence_at_a_time() {
        let mut pages = Pages::new(5, 3, 4);
        assert!(pages.grow(0, 65));
        assert!(!pages.grow(0, 128));
        assert!(pages.grow(1, 1));
        assert!(pages.grow(0, 129));
        assert_eq!((pages.of(0), pages.of(1), pages.of(2)), (&[0, 1, 3][..], &[2][..], &[][..]));
        assert_eq!(pages.free(), (1, 5));
        assert_eq!(pages.check([(2, 64), (1, 64)].into_iter()), Ok(()));
        let error = pages.check([(2, 64), (1, 65)].into_iter()).expect_err("one is left");
        assert_eq!(error.kind(), ErrorKind::Memory);
        assert!(error.message().contains("2 more of 64 tokens are needed, and 1 of 5 are free"), "{error}");
        pages.cut(0, 64);
        assert_eq!(pages.of(0), [0]);
        assert!(pages.grow(2, 190));
        assert_eq!((pages.of(2), pages.free()), (&[1, 3, 4][..], (0, 5)));
        pages.cut(2, 0);
        pages.cut(2, 0);
        assert_eq!(pages.free(), (3, 5));
    }
}
