//! The integer products of x86, each in the form that a whole vector of the target takes.

use crate::cpu::llvm::{Elem, Val, VecBuilder};

impl<'c> VecBuilder<'_, 'c> {
    /// The name among three for a whole vector of the target: of 128, of 256, of 512 bits.
    fn of_width<'a>(&self, names: [&'a str; 3]) -> &'a str {
        match self.target().cpu.vector_bits {
            512 => names[2],
            256 => names[1],
            _ => names[0],
        }
    }

    /// `vpdpbusd`: every 32-bit lane of `sum` plus the products of its four unsigned with its four signed bytes.
    ///
    /// For targets with [`Dot::Vnni`](quantc_ir::target::Dot::Vnni).
    pub fn vpdpbusd(&self, sum: Val<'c>, unsigned: Val<'c>, signed: Val<'c>) -> Val<'c> {
        let name = self.of_width([
            "llvm.x86.avx512.vpdpbusd.128",
            "llvm.x86.avx512.vpdpbusd.256",
            "llvm.x86.avx512.vpdpbusd.512",
        ]);
        self.intrinsic(name, &[], &[sum, unsigned, signed])
    }

    /// `pmaddubsw`: the products of unsigned with signed bytes, added in pairs to 16 bits, where sums that do not fit
    /// saturate.
    pub fn pmaddubsw(&self, unsigned: Val<'c>, signed: Val<'c>) -> Val<'c> {
        let name = self.of_width([
            "llvm.x86.ssse3.pmadd.ub.sw.128",
            "llvm.x86.avx2.pmadd.ub.sw",
            "llvm.x86.avx512.pmaddubs.w.512",
        ]);
        let [unsigned, signed] = [unsigned, signed].map(|v| self.bitcast(v, Elem::I8, self.width() * 4));
        self.intrinsic(name, &[], &[unsigned, signed])
    }

    /// `pmaddwd`: the products of signed 16-bit numbers, added in pairs to 32 bits.
    pub fn pmaddwd(&self, x: Val<'c>, y: Val<'c>) -> Val<'c> {
        let name = self.of_width([
            "llvm.x86.sse2.pmadd.wd",
            "llvm.x86.avx2.pmadd.wd",
            "llvm.x86.avx512.pmaddw.d.512",
        ]);
        let [x, y] = [x, y].map(|v| self.bitcast(v, Elem::I16, self.width() * 2));
        self.intrinsic(name, &[], &[x, y])
    }
}
