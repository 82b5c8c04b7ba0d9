//! A step allocates nothing: counted over all threads of this process, which runs only this test.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{MAX_ROWS, Random, VOCAB, toy};
use quantc_runtime::format::Kind;
use quantc_runtime::{SampleOptions, Sampler, Session, SessionOptions};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn steps_allocate_nothing_after_warm_up() {
    let (_folder, engine) = toy(Kind::Decoder);
    let engine = Arc::new(engine);
    let tokens = Random(8).tokens(40);
    for threads in [1, 3] {
        let options = SessionOptions { threads, slots: 2, ..SessionOptions::default() };
        let mut session = Session::new(Arc::clone(&engine), &options).expect("the session starts");
        let options = SampleOptions { temperature: 0.8, top_k: 10, top_p: 0.9, seed: 3 };
        let mut sampler = Sampler::new(options, VOCAB).expect("the options are in range");
        session.prefill(0, &tokens[..5], 1).expect("it fits");
        session.reset(0).expect("slot 0 exists");

        let before = ALLOCATIONS.load(Ordering::SeqCst);
        session.prefill(0, &tokens, MAX_ROWS as usize).expect("it fits");
        let mut token = 1;
        for _ in 0..20 {
            let logits = session.decode(0, token).expect("it fits");
            token = sampler.sample(logits).expect("the logits are numbers") % 20;
            session.decode_batch(&[1], &[token]).expect("it fits");
        }
        session.reset(0).expect("slot 0 exists");
        let mut rows = 0;
        session.score(0, &tokens, &mut |_, _| rows += 1).expect("it fits");
        let allocated = ALLOCATIONS.load(Ordering::SeqCst) - before;
        assert_eq!(rows, tokens.len());
        assert_eq!(allocated, 0, "on {threads} threads");
    }
}
