//! Where intermediate values lie: lifetimes and the arena.
//!
//! Every buffer has its full size (the largest call) at a fixed offset for all programs, so an engine needs one
//! arena. Buffers whose lifetimes do not meet may share bytes.

use std::ops::RangeInclusive;

/// Every buffer begins at a multiple of this: two cache lines, so that writers of neighbours do not share one.
pub const ALIGN: u64 = 128;

/// A buffer to be placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Bytes of the largest call.
    pub bytes: u64,
    /// First and last step that touches it.
    pub live: RangeInclusive<usize>,
}

/// Offsets of the buffers, and the bytes of the arena.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arena {
    /// One offset per buffer.
    pub offsets: Vec<u64>,
    /// Bytes of all.
    pub bytes: u64,
}

/// Places buffers, the largest first, each at the lowest offset that is free during its life.
pub fn plan(buffers: &[Buffer]) -> Arena {
    let mut order: Vec<usize> = (0..buffers.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(buffers[i].bytes), *buffers[i].live.start(), i));
    let mut offsets = vec![0; buffers.len()];
    let mut placed: Vec<usize> = vec![];
    let mut top = 0;
    for i in order {
        let meets = |&&j: &&usize| {
            buffers[i].live.start() <= buffers[j].live.end()
                && buffers[j].live.start() <= buffers[i].live.end()
        };
        let mut taken: Vec<(u64, u64)> =
            placed.iter().filter(meets).map(|&j| (offsets[j], offsets[j] + buffers[j].bytes)).collect();
        taken.sort_unstable();
        let mut at = 0;
        for (from, to) in taken {
            if at + buffers[i].bytes <= from {
                break;
            }
            at = at.max(to.next_multiple_of(ALIGN));
        }
        offsets[i] = at;
        top = top.max(at + buffers[i].bytes);
        placed.push(i);
    }
    Arena { offsets, bytes: top.next_multiple_of(ALIGN) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_that_meet_do_not_share() {
        let buffer = |bytes, from, to| Buffer { bytes, live: from..=to };
        let buffers =
            [buffer(100, 0, 2), buffer(50, 1, 3), buffer(100, 3, 4), buffer(7, 4, 9), buffer(300, 5, 6)];
        let arena = plan(&buffers);
        for i in 0..buffers.len() {
            for j in 0..i {
                let (a, b) = (&buffers[i], &buffers[j]);
                let live = a.live.start() <= b.live.end() && b.live.start() <= a.live.end();
                let (x, y) = (arena.offsets[i], arena.offsets[j]);
                let apart = x + a.bytes <= y || y + b.bytes <= x;
                assert!(apart || !live, "buffers {i} and {j}");
            }
        }
        assert!(arena.bytes < buffers.iter().map(|b| b.bytes.next_multiple_of(ALIGN)).sum());
        assert!(arena.offsets.iter().all(|o| o % ALIGN == 0));
    }
}
