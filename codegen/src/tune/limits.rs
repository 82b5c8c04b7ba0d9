//! What a core can do at most, as kernels: products on registers, and reading memory.
//!
//! A kernel's speed means something beside its limit only when both were measured on the same machine at the same
//! time. These kernels are emitted like any other and take two buffers: what they read, and where the result goes, which
//! is every worker's own.

use quantc_ir::diag::Result;
use quantc_ir::target::{CpuDesc, Dot};

use crate::cpu::llvm::{Elem, Unit, Val, VecBuilder};
use crate::cpu::matmul::schedule::{Inner, inner};
use crate::spec::MatmulSpec;

/// A limit to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Limit {
    /// Products of bytes with the target's best integer dot.
    Int8,
    /// Products of pairs of bf16; in f32 on targets without them.
    Bf16,
    /// Multiply-adds in f32.
    F32,
    /// Reading memory from one end to the other.
    Stream,
}

/// Independent sums: enough for any latency, and they fit in the registers of every target.
const CHAINS: u32 = 12;
/// Bytes that one item of [`Limit::Stream`] reads.
pub const STREAM_ITEM: usize = 4096;

impl Limit {
    /// What bounds the products of `spec` on `cpu` when memory does not.
    pub fn of(spec: &MatmulSpec, cpu: &CpuDesc) -> Limit {
        match inner(spec, cpu) {
            Inner::Int(_) => Limit::Int8,
            Inner::Bf16 => Limit::Bf16,
            Inner::Float => Limit::F32,
        }
    }

    /// Short name; also the symbol that [`Limit::emit`] is usually given.
    pub fn name(self) -> &'static str {
        match self {
            Limit::Int8 => "int8 dot",
            Limit::Bf16 => "bf16 dot",
            Limit::F32 => "f32 fma",
            Limit::Stream => "stream",
        }
    }

    /// Bytes that `items` items read, and bytes of the result.
    pub fn buffers(self, items: u64) -> [usize; 2] {
        let read = if self == Limit::Stream { items as usize * STREAM_ITEM } else { 3 * 64 };
        [read, CHAINS as usize * 64]
    }

    /// Multiply-adds of one item on `cpu`; 0 for those that are about memory.
    pub fn macs(self, cpu: &CpuDesc) -> u64 {
        let lanes = u64::from(cpu.vector_bits / 32);
        let each = match self {
            Limit::Int8 => match cpu.dots.first() {
                Some(Dot::Vnni | Dot::Maddubs) => lanes * 4,
                _ => lanes * 2,
            },
            Limit::Bf16 if cpu.bf16_mac_per_cycle > 0.0 => lanes * 2,
            Limit::Bf16 | Limit::F32 => lanes,
            Limit::Stream => 0,
        };
        each * u64::from(CHAINS)
    }

    /// Adds the kernel `symbol` to `unit`.
    pub fn emit(self, unit: &Unit<'_>, symbol: &str) -> Result<()> {
        let cpu = &unit.target().cpu;
        unit.kernel(symbol, |b| {
            match self {
                Limit::Int8 => {
                    let dot = cpu.dots.first().copied().unwrap_or(Dot::Widening);
                    int8(b, dot);
                }
                Limit::Bf16 if cpu.bf16_mac_per_cycle > 0.0 => {
                    let (a, w) = (operand(b, 0, Elem::Bf16), operand(b, 1, Elem::Bf16));
                    let name = format!("llvm.x86.avx512bf16.dpbf16ps.{}", cpu.vector_bits);
                    chains(b, Elem::F32, |b, sum| b.intrinsic(&name, &[], &[sum, a, w]));
                }
                Limit::Bf16 | Limit::F32 => {
                    let a = operand(b, 0, Elem::F32);
                    let w = operand(b, 1, Elem::F32);
                    chains(b, Elem::F32, |b, sum| b.fma(a, w, sum));
                }
                Limit::Stream => stream(b),
            }
            Ok(())
        })
    }
}

/// One vector of the buffer.
fn operand<'c>(b: &VecBuilder<'_, 'c>, i: i64, elem: Elem) -> Val<'c> {
    b.load(b.offset(b.arg(0), i * 64), elem, b.width() * 4 / elem.bytes())
}

/// Runs `turn` on every one of the sums for each item, and stores them.
fn chains<'c>(b: &VecBuilder<'_, 'c>, elem: Elem, turn: impl Fn(&VecBuilder<'_, 'c>, Val<'c>) -> Val<'c>) {
    let zero = vec![operand(b, 2, elem); CHAINS as usize];
    let sums =
        b.for_range(b.begin(), b.end(), 1, &zero, |_, sums| sums.iter().map(|&sum| turn(b, sum)).collect());
    for (i, sum) in sums.into_iter().enumerate() {
        b.store(b.offset(b.arg(1), i as i64 * 64), sum, elem);
    }
}

fn int8(b: &VecBuilder<'_, '_>, dot: Dot) {
    let (w, a) = (operand(b, 0, Elem::I32), operand(b, 1, Elem::I32));
    match dot {
        Dot::Vnni => chains(b, Elem::I32, |b, sum| b.vpdpbusd(sum, w, a)),
        // The product and the sum of its sixteen-bit halves: widening comes on top only now and then.
        Dot::Maddubs => {
            // What goes into the product comes out of the sum, or it would be taken out of the loop.
            let w = b.bitcast(w, Elem::I16, b.width() * 2);
            chains(b, Elem::I16, |b, sum| b.add(sum, b.pmaddubsw(b.xor(sum, w), a)));
        }
        Dot::Widening => chains(b, Elem::I32, |b, sum| b.add(sum, b.pmaddwd(b.xor(sum, w), a))),
    }
}

/// Reads item after item with plain loads. What was read is folded together, so that no load can be left out.
fn stream(b: &VecBuilder<'_, '_>) {
    // Prefetchers follow each load of the loop: with many of them they give up, and reading takes twice the time.
    const AT_ONCE: i64 = 4;
    let (elem, bytes) = (Elem::I32, i64::from(b.width()) * 4);
    let zero = vec![b.i32(b.width(), 0); 4];
    let sums = b.for_range(b.begin(), b.end(), 1, &zero, |item, sums| {
        let item = b.row(b.arg(0), item, STREAM_ITEM as i64);
        b.for_const(0, STREAM_ITEM as i64, AT_ONCE * bytes, sums, |at, sums| {
            let mut sums = sums.to_vec();
            for i in 0..AT_ONCE {
                let v = b.load(b.offset(b.at(item, at), i * bytes), elem, b.width());
                let sum = &mut sums[i as usize % 4];
                *sum = b.xor(*sum, v);
            }
            sums
        })
    });
    for (i, sum) in sums.into_iter().enumerate() {
        b.store(b.offset(b.arg(1), i as i64 * 64), sum, elem);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{Buf, build, call, runnable};
    use crate::eexpr::MemTy;

    #[test]
    fn limits_run_and_touch_their_buffer_only() {
        for target in runnable() {
            for limit in [Limit::Int8, Limit::Bf16, Limit::F32, Limit::Stream] {
                let object = build(target, |unit| limit.emit(unit, "limit"));
                let items = 3;
                let [read, result] = limit.buffers(items);
                let mut data = Buf::of(&vec![1.0; read / 4], MemTy::F32);
                let mut out = Buf::poisoned(result);
                call(&object, "limit", &mut [&mut data, &mut out], [0, 0], 0..items as i64);
                data.bytes();
                out.bytes();
                assert_eq!(limit.macs(&target.cpu) == 0, limit == Limit::Stream);
                if limit == Limit::F32 {
                    // Sums start at one and gain one an item.
                    assert_eq!(out.read(MemTy::F32)[0], 4.0, "{}", target.name);
                }
            }
        }
    }
}
