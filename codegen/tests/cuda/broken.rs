//! Kernels with something wrong in them: the interpreter finds each of them out.

use crate::products;
use crate::support::count;
use quantc_codegen::cpu::row::RowSpec;
use quantc_codegen::cuda::interp::{self, Schedule};
use quantc_codegen::cuda::layout::FragmentLayout;
use quantc_codegen::cuda::row::{RowTile, build};
use quantc_codegen::cuda::skinny::{self, SkinnyTile};
use quantc_codegen::cuda::tile::{Access, Addr, Binary, Builder, Expr, Extent, Kernel, Mem, Stmt, Val};
use quantc_codegen::cuda::wide::{self, WideTile};
use quantc_codegen::eexpr::MemTy;
use quantc_codegen::spec::{AFmt, Code, ScaleTy, WFmt, Zero};

/// Takes the statement of a kind away that is number `at`.
fn without(body: &[Stmt], is: &impl Fn(&Stmt) -> bool, at: &mut usize) -> Vec<Stmt> {
    let mut kept = vec![];
    for stmt in body {
        match stmt {
            Stmt::If(p, a, b) => kept.push(Stmt::If(*p, without(a, is, at), without(b, is, at))),
            Stmt::For { var, from, to, step, body } => {
                let body = without(body, is, at);
                kept.push(Stmt::For { var: *var, from: *from, to: *to, step: *step, body });
            }
            s if is(s) => {
                if *at != 0 {
                    kept.push(s.clone());
                }
                *at = at.wrapping_sub(1);
            }
            s => kept.push(s.clone()),
        }
    }
    kept
}

/// The kernel runs as it is, and with any one statement of a kind taken away it is found out in any order of its warps.
pub fn each_is_needed(
    kernel: &Kernel,
    buffers: &[Vec<u8>],
    scalars: &[u32],
    is: impl Fn(&Stmt) -> bool,
    why: &[&str],
) {
    let run = |kernel: &Kernel, schedule| interp::run(kernel, buffers, scalars, schedule);
    run(kernel, Schedule::Turns).unwrap();
    let all = count(&kernel.body, &is);
    assert!(all > 0);
    for at in 0..all {
        let broken = Kernel { body: without(&kernel.body, &is, &mut at.clone()), ..kernel.clone() };
        for schedule in [Schedule::Turns, Schedule::Ahead, Schedule::Behind, Schedule::Random(5)] {
            let fault = run(&broken, schedule).expect_err("a statement that is needed is gone");
            assert!(why.iter().any(|w| fault.what.contains(w)), "{fault}");
        }
    }
}

fn norm() -> (Kernel, Vec<Vec<u8>>) {
    let spec = RowSpec::layer_norm(1500, 1e-5, MemTy::F32, MemTy::F32, None, MemTy::F32);
    let tile = RowTile::of(&spec);
    assert!(tile.warps_per_row > 1);
    (build("norm", &spec, tile).unwrap(), vec![vec![0; 6000 * 2], vec![0; 6000], vec![0; 6000 * 2]])
}

#[test]
fn a_norm_without_a_barrier() {
    let (kernel, buffers) = norm();
    each_is_needed(&kernel, &buffers, &[2, 2], |s| *s == Stmt::Barrier, &["a race", "nobody wrote"]);
}

#[test]
fn a_norm_with_a_row_too_many() {
    let (kernel, buffers) = norm();
    let fault = interp::run(&kernel, &buffers, &[3, 3], Schedule::Turns).unwrap_err();
    assert!(fault.what.contains("bytes of `in0`") && fault.what.contains("it has 12000"), "{fault}");
    // The same row by two blocks.
    let twice = Kernel { grid: [kernel.grid[0], Extent::Fixed(2)], ..kernel };
    let fault = interp::run(&twice, &buffers, &[2, 2], Schedule::Turns).unwrap_err();
    assert!(fault.what.contains("written twice"), "{fault}");
}

/// A block that stores what its threads copied, each another's.
fn exchange(waits: bool, barrier: bool) -> Kernel {
    let mut b = Builder::new("exchange", 64);
    let (from, to) = (b.buffer("from", Access::Read), b.buffer("to", Access::Write));
    let at = b.shared(1024);
    let thread = b.thread();
    let mine = b.mad(thread, 16, at);
    b.cp_async(mine, from, mine, 16, 16);
    b.cp_commit();
    if waits {
        b.cp_wait(0);
    }
    if barrier {
        b.barrier();
    }
    let other = b.binary(Binary::Xor, mine, 16 * 33);
    let words = b.load(Mem::Shared, other, 16);
    b.store(to, mine, &words, 16);
    b.finish()
}

#[test]
fn copies_that_nobody_waits_for() {
    let buffers = [(0..1024u32).map(|i| i as u8).collect::<Vec<_>>(), vec![0; 1024]];
    let run = |kernel: &Kernel, schedule| interp::run(kernel, &buffers, &[], schedule);
    let got = run(&exchange(true, true), Schedule::Turns).unwrap();
    assert_eq!(got.buffers[1].data[..16], buffers[0][16 * 33..][..16]);
    for schedule in [Schedule::Turns, Schedule::Ahead, Schedule::Behind, Schedule::Random(7)] {
        let fault = run(&exchange(false, true), schedule).unwrap_err();
        assert!(fault.what.contains("while a copy to it is under way"), "{fault}");
        let fault = run(&exchange(true, false), schedule).unwrap_err();
        assert!(["a race", "under way", "nobody wrote"].iter().any(|w| fault.what.contains(w)), "{fault}");
    }
}

#[test]
fn what_a_warp_must_do_together() {
    let mut b = Builder::new("alone", 32);
    let thread = b.thread();
    let some = b.lt(thread, 7);
    b.when(some, |b| b.barrier());
    let fault = interp::run(&b.finish(), &[], &[], Schedule::Turns).unwrap_err();
    assert!(fault.what.contains("only lanes 0x0000007f"), "{fault}");

    // A warp reads what its lanes wrote, without and with waiting for them.
    for syncs in [false, true] {
        let mut b = Builder::new("lanes", 32);
        let at = b.shared(128);
        let out = b.buffer("out", Access::Write);
        let thread = b.thread();
        let mine = b.mad(thread, 4, at);
        b.store(Mem::Shared, mine, &[thread], 4);
        if syncs {
            b.sync_warp();
        }
        let other = b.binary(Binary::Xor, mine, 4);
        let word = b.load(Mem::Shared, other, 4);
        b.store(out, mine, &word, 4);
        let run = interp::run(&b.finish(), &[vec![0; 128]], &[], Schedule::Turns);
        assert_eq!(run.is_ok(), syncs, "{run:?}");
    }
}

#[test]
fn warps_at_different_barriers() {
    let mut b = Builder::new("apart", 64);
    let thread = b.thread();
    let first = b.lt(thread, 32);
    b.when(first, |b| b.barrier());
    let fault = interp::run(&b.finish(), &[], &[], Schedule::Turns).unwrap_err();
    assert!(fault.what.contains("this one is gone"), "{fault}");
}

fn product() -> (Kernel, Vec<Vec<u8>>) {
    let w = WFmt { code: Code::U4, group: 32, zero: Zero::Sym(8), scale: ScaleTy::Bf16 };
    let spec = products::spec(32, 1024, w, AFmt::Bf16, false);
    let tile = SkinnyTile { rows: 2, tokens: 1, warps: 2, stages: 3 };
    let layout = FragmentLayout::of(&spec).unwrap();
    let buffers = vec![vec![0; 5 * 2 * 1056], vec![0; layout.bytes() as usize], vec![0; 5 * 35 * 4]];
    (skinny::build("product", &spec, tile).unwrap(), buffers)
}

#[test]
fn a_product_without_a_barrier_or_a_wait() {
    let (kernel, buffers) = product();
    each_is_needed(
        &kernel,
        &buffers,
        &[5, 1],
        |s| *s == Stmt::Barrier,
        &["a race", "nobody wrote", "under way"],
    );
    let why = ["under way", "nobody wrote", "never waited for", "a race"];
    each_is_needed(&kernel, &buffers, &[5, 1], |s| matches!(s, Stmt::CpWait(_)), &why);
    each_is_needed(&kernel, &buffers, &[5, 1], |s| matches!(s, Stmt::CpCommit), &why);
}

/// Waiting for one group of copies fewer than needed.
#[test]
fn a_product_that_waits_too_little() {
    fn later(body: &mut [Stmt]) {
        for s in body {
            match s {
                Stmt::CpWait(n) if *n > 0 => *n += 1,
                Stmt::For { body, .. } | Stmt::If(_, body, _) => later(body),
                _ => {}
            }
        }
    }
    let (mut kernel, buffers) = product();
    later(&mut kernel.body);
    let fault = interp::run(&kernel, &buffers, &[5, 1], Schedule::Turns).unwrap_err();
    assert!(fault.what.contains("while a copy to it is under way"), "{fault}");
}

fn wide_product() -> (Kernel, Vec<Vec<u8>>) {
    let w = WFmt { code: Code::U4, group: 32, zero: Zero::Sym(8), scale: ScaleTy::Bf16 };
    let spec = products::spec(64, 640, w, AFmt::Bf16, false);
    // Ten stages in three slots: the last one lies where the sums go.
    let tile = WideTile { rows: 1, tokens: 2, warps: [2, 2], stages: 3 };
    let layout = FragmentLayout::of(&spec).unwrap();
    // One number that is not zero in each row, so that what is read in the wrong place makes a difference.
    let mut a = vec![0; 32 * 2 * 672];
    for (i, row) in a.chunks_exact_mut(2 * 672).enumerate() {
        row[2 * 37 * (i % 8)..][..2].copy_from_slice(&half::bf16::from_f32(1.0 + i as f32).to_le_bytes());
    }
    let mut blob: Vec<u8> = (0..layout.bytes()).map(|i| (i * 7 % 251) as u8).collect();
    for (n, group) in (0..64).flat_map(|n| (0..20).map(move |g| (n, g))) {
        blob[layout.scale(n, group) as usize..][..2].copy_from_slice(&half::bf16::ONE.to_le_bytes());
    }
    (wide::build("wide", &spec, tile).unwrap(), vec![a, blob, vec![0; 32 * 67 * 4]])
}

#[test]
fn a_wide_product_without_a_barrier_or_a_wait() {
    let (kernel, buffers) = wide_product();
    let why = ["a race", "nobody wrote", "under way"];
    each_is_needed(&kernel, &buffers, &[32, 1], |s| *s == Stmt::Barrier, &why);
    each_is_needed(&kernel, &buffers, &[32, 1], |s| matches!(s, Stmt::CpWait(_)), &why);
}

/// A swizzle that is off by one segment on one side: what is read was written, without a race, and is wrong.
#[test]
fn a_swizzle_of_readers_that_is_not_the_writers() {
    let (kernel, buffers) = wide_product();
    let right = interp::run(&kernel, &buffers, &[32, 1], Schedule::Turns).unwrap();
    // The swizzles' exclusive ors, in order: those of copies before those of loads.
    let is_swizzle = |s: &Stmt| matches!(s, Stmt::Let(_, Expr::Binary(Binary::Xor, ..)));
    let all = count(&kernel.body, &is_swizzle);
    assert!(all >= 2);
    fn edit(body: &mut [Stmt], at: &mut usize) {
        for s in body {
            match s {
                Stmt::Let(_, expr @ Expr::Binary(Binary::Xor, ..)) => {
                    *at = at.wrapping_sub(1);
                    if *at == usize::MAX
                        && let Expr::Binary(_, a, _) = *expr
                    {
                        *expr = Expr::Binary(Binary::Xor, a, Val::U32(1));
                    }
                }
                Stmt::For { body, .. } => edit(body, at),
                Stmt::If(_, then, otherwise) => {
                    edit(then, at);
                    edit(otherwise, at);
                }
                _ => {}
            }
        }
    }
    for i in 0..all {
        let mut broken = kernel.clone();
        edit(&mut broken.body, &mut i.clone());
        match interp::run(&broken, &buffers, &[32, 1], Schedule::Turns) {
            Ok(wrong) => assert!(wrong.buffers[2].data != right.buffers[2].data, "swizzle {i}"),
            Err(fault) => assert!(fault.what.contains("shared byte"), "{fault}"),
        }
    }
}

/// A stage that begins 16 bytes late runs into the next one, or out of memory.
#[test]
fn a_copy_to_the_wrong_place() {
    fn shift(body: &mut [Stmt]) {
        for s in body {
            match s {
                Stmt::CpAsync { to: Addr { plus, .. }, bytes: 16, .. } => *plus += 16,
                Stmt::For { body, .. } | Stmt::If(_, body, _) => shift(body),
                _ => {}
            }
        }
    }
    let (mut kernel, buffers) = wide_product();
    shift(&mut kernel.body);
    let fault = interp::run(&kernel, &buffers, &[32, 1], Schedule::Turns).unwrap_err();
    assert!(fault.what.contains("shared"), "{fault}");
}
