//! Takes out what nothing uses: values that are computed, and never read.

use super::{GroupLeft, Kernel, Reg, Stmt, Val};
use std::collections::HashSet;

/// Removes definitions that nothing uses. Loads stay: they may be why a copy was waited for.
pub(super) fn unused(kernel: &mut Kernel) {
    let mut used = HashSet::new();
    sweep(&mut kernel.body, &mut used);
}

/// Goes over a body from its end, where all uses of what it defines are behind.
fn sweep(body: &mut Vec<Stmt>, used: &mut HashSet<Reg>) {
    let mut kept = vec![];
    for mut stmt in std::mem::take(body).into_iter().rev() {
        match &mut stmt {
            Stmt::Let(to, _) if !used.contains(to) => continue,
            Stmt::If(_, then, otherwise) => {
                sweep(then, used);
                sweep(otherwise, used);
            }
            Stmt::For { body, .. } => sweep(body, used),
            _ => {}
        }
        uses(&stmt, &mut |v| {
            if let Val::Reg(r) = v {
                used.insert(r);
            }
        });
        kept.push(stmt);
    }
    kept.reverse();
    *body = kept;
}

/// The operands of a statement, without those of statements inside it. A variable that is assigned counts, so that it is
/// defined. What a loop's next round reads of this one are variables.
pub(in crate::cuda) fn uses(stmt: &Stmt, f: &mut impl FnMut(Val)) {
    match stmt {
        Stmt::Let(_, expr) => expr.operands().for_each(f),
        Stmt::Set(to, v) => {
            f((*to).into());
            f(*v);
        }
        Stmt::Load { at, .. } => f(at.base),
        Stmt::Store { at, from, .. } => {
            f(at.base);
            from.iter().copied().for_each(f);
        }
        Stmt::CpAsync { to, at, valid, .. } => [to.base, at.base, *valid].into_iter().for_each(f),
        Stmt::LastOf { at, count, .. } => [at.base, *count].into_iter().for_each(f),
        Stmt::ShuffleXor { from, .. } => f(*from),
        Stmt::Mma { acc, a, b, .. } => {
            acc.iter().for_each(|r| f((*r).into()));
            a.iter().chain(b).copied().for_each(f);
        }
        Stmt::BarInit { at, .. } | Stmt::BarExpect { at, .. } | Stmt::BarArrive { at } => f(at.base),
        Stmt::BarWait { at, parity } => [at.base, *parity].into_iter().for_each(f),
        Stmt::BulkCopy { to, at, barrier, .. } => [to.base, at.base, barrier.base].into_iter().for_each(f),
        Stmt::GroupMma { acc, a, b, .. } => {
            acc.iter().for_each(|r| f((*r).into()));
            match a {
                GroupLeft::Shared(at) => f(at.base),
                GroupLeft::Regs(a) => a.iter().copied().for_each(&mut *f),
            }
            f(b.base);
        }
        Stmt::GroupWait { acc, .. } => acc.iter().for_each(|r| f((*r).into())),
        Stmt::BarFence | Stmt::ProxyFence | Stmt::Registers { .. } | Stmt::GroupFence | Stmt::GroupCommit => {
        }
        Stmt::If(p, ..) => f(*p),
        Stmt::For { from, to, step, .. } => [*from, *to, *step].into_iter().for_each(f),
        Stmt::CpCommit | Stmt::CpWait(_) | Stmt::Barrier | Stmt::SyncWarp | Stmt::Note(_) => {}
    }
}
