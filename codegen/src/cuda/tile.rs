//! Tile IR: what a CUDA kernel does, thread by thread, as plain data.
//!
//! A [`Kernel`] is one program for all threads of a block. Registers hold 32 bits (or 64, for offsets, or one, for
//! conditions), are assigned once, or are variables that may be assigned again. Some statements need all 32 lanes of a
//! warp (matrix products, shuffles), some all warps of a block (barriers). Memory is either a parameter, addressed in
//! bytes from its start, or the block's shared memory.
//!
//! Templates build kernels with [`Builder`]. A kernel then has two uses: [`crate::cuda::text`] writes it as CUDA C++,
//! and [`crate::cuda::interp`] runs it in Rust and checks what a GPU would not tell. Both go over the same statements, so
//! what was checked is what is compiled.
//!
//! # Meaning
//!
//! - Float operations are IEEE single precision, rounded to nearest even, subnormals kept; nothing is contracted.
//! - Integers wrap. Shifts are by less than the width. Division is of unsigned numbers by constants.
//! - Offsets of memory operations are bytes, and multiples of the bytes accessed.
//! - Loads of one or two bytes give the bits, zero-extended.
//! - What one lane writes to shared memory another may read after a barrier, or, in the same warp, after
//!   [`Stmt::SyncWarp`]; the same for overwriting what another has read.
//! - What [`Stmt::CpAsync`] copies is there for the lane that asked once a [`Stmt::CpWait`] has returned, and for others
//!   after a barrier that follows it.
//! - What [`Stmt::BulkCopy`] copies is there for who has waited for the phase of the barrier at which it counts. Who waits
//!   for a phase sees what those did who arrived in it.
//! - Products of groups read their operands at any time until they were waited for. Rows in shared memory have 128
//!   bytes, from a multiple of 1024 on, and are swizzled ([`crate::cuda::tiles`]); a product takes 32 bytes of each.
//! - Matrix products take the fragments that [`crate::cuda::frag`] describes.

use crate::eexpr::F32;
use serde::{Deserialize, Serialize};
use std::fmt;

mod build;
pub(in crate::cuda) mod clean;
mod floats;
mod ops;

pub use build::Builder;
pub use ops::{Binary, Expr, Ternary, Unary};

/// Lanes of a warp.
pub const WARP: u32 = 32;

/// Type of a register.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Ty {
    /// A condition.
    Pred,
    /// 32 bits: an integer, packed halves or bytes.
    U32,
    /// Single precision.
    F32,
    /// A wide offset.
    U64,
}

/// A register of each thread.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Reg(pub u32);

/// An operand.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Val {
    /// A register.
    Reg(Reg),
    /// A constant of 32 bits.
    U32(u32),
    /// A float constant.
    F32(F32),
    /// A condition that always or never holds.
    Pred(bool),
}

/// A place in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mem {
    /// A parameter of the kernel, by index among the buffers.
    Global(u32),
    /// The block's shared memory.
    Shared,
}

/// A byte offset: a value and a constant, which costs nothing to add.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Addr {
    /// What is computed, of 32 or 64 bits.
    pub base: Val,
    /// What is added.
    pub plus: u32,
}

/// What matrix product a warp computes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MmaKind {
    /// 16 x 16 bf16 times 16 x 8 bf16, summed in f32.
    Bf16,
    /// 16 x 32 signed bytes times 32 x 8 signed bytes, summed in i32.
    S8,
}

/// What matrix product a group of four warps computes: 64 rows, and 32 bytes of each row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupKind {
    /// Products of bf16, summed in f32.
    Bf16,
    /// Products of signed bytes, summed in i32.
    S8,
    /// Products of e4m3, summed in f32.
    E4m3,
}

/// The left side of a group's matrix product.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum GroupLeft {
    /// 64 rows in shared memory, swizzled, from here on.
    Shared(Addr),
    /// Fragments of each warp's 16 rows, as for products of warps.
    Regs([Val; 4]),
}

/// One step of a kernel.
#[derive(Clone, PartialEq, Debug)]
pub enum Stmt {
    /// Defines a register.
    Let(Reg, Expr),
    /// Assigns a variable again.
    Set(Reg, Val),
    /// Loads `bytes` (1, 2 or 4 into one register, 8 into two, 16 into four).
    Load {
        /// Registers defined.
        to: Vec<Reg>,
        /// Which memory.
        mem: Mem,
        /// Byte offset.
        at: Addr,
        /// Bytes of one lane.
        bytes: u32,
    },
    /// Stores `bytes`, as loads.
    Store {
        /// Which memory.
        mem: Mem,
        /// Byte offset.
        at: Addr,
        /// What to store.
        from: Vec<Val>,
        /// Bytes of one lane.
        bytes: u32,
    },
    /// Copies from a buffer to shared memory without waiting; bytes from `valid` on are zero.
    CpAsync {
        /// Byte offset in shared memory.
        to: Addr,
        /// The buffer.
        buffer: u32,
        /// Byte offset in the buffer.
        at: Addr,
        /// Bytes of one lane: 4, 8 or 16.
        bytes: u32,
        /// Bytes read, at most `bytes`.
        valid: Val,
    },
    /// Ends a group of copies of this lane.
    CpCommit,
    /// Waits until at most this many groups of this lane are under way.
    CpWait(u32),
    /// All warps of the block.
    Barrier,
    /// All warps of the block; what the block has written to scratch is there for others, and it is counted. Where it is the
    /// last of `count` blocks at this counter, `to` holds, the counter is zero again, and the block may read what the others
    /// wrote before they were counted.
    LastOf {
        /// Condition defined.
        to: Reg,
        /// A buffer of counters.
        counter: u32,
        /// Byte offset of the counter.
        at: Addr,
        /// Blocks that are counted.
        count: Val,
    },
    /// All lanes of a warp.
    SyncWarp,
    /// Gives each lane the value of the lane whose number differs in the bits of `mask`.
    ShuffleXor {
        /// Register defined.
        to: Reg,
        /// The value.
        from: Val,
        /// Bits of the lane number that differ.
        mask: u32,
    },
    /// `acc += a * b`.
    Mma {
        /// Types and sizes.
        kind: MmaKind,
        /// Variables.
        acc: [Reg; 4],
        /// Fragments of the left side.
        a: [Val; 4],
        /// Fragments of the right side.
        b: [Val; 2],
    },
    /// Sets up a barrier of 8 bytes in shared memory, whose phases are over after so many arrivals.
    BarInit {
        /// Byte offset.
        at: Addr,
        /// Arrivals of a phase.
        count: u32,
    },
    /// What this thread has set up is known to bulk copies.
    BarFence,
    /// Arrives at a barrier, whose phase is over when so many bytes have come too.
    BarExpect {
        /// Byte offset.
        at: Addr,
        /// Bytes.
        bytes: u32,
    },
    /// Arrives at a barrier.
    BarArrive {
        /// Byte offset.
        at: Addr,
    },
    /// Waits until the phase of this parity is over: the first one has parity 0, and the one before it is over.
    BarWait {
        /// Byte offset.
        at: Addr,
        /// 0 or 1.
        parity: Val,
    },
    /// Copies many bytes from a buffer to shared memory without waiting; they count at a barrier.
    BulkCopy {
        /// Byte offset in shared memory, a multiple of 16.
        to: Addr,
        /// The buffer.
        buffer: u32,
        /// Byte offset in the buffer, a multiple of 16.
        at: Addr,
        /// How many, a multiple of 16.
        bytes: u32,
        /// Byte offset of the barrier.
        barrier: Addr,
    },
    /// What this warp's threads have stored to shared memory is there for groups' products and bulk copies.
    ProxyFence,
    /// Registers of each thread from here on: `more` than it was launched with, or fewer.
    Registers {
        /// How many.
        count: u32,
        /// Whether they are more.
        more: bool,
    },
    /// Orders accesses to registers before the matrix products that follow.
    GroupFence,
    /// `acc += a * b` by four warps, without waiting: `b` are rows of shared memory, two for each sum of a thread, swizzled.
    GroupMma {
        /// Types.
        kind: GroupKind,
        /// Variables: sums, as [`crate::cuda::frag::sums`] has them for each 8 columns.
        acc: Vec<Reg>,
        /// Left side.
        a: GroupLeft,
        /// Right side.
        b: Addr,
        /// Whether sums begin anew.
        fresh: bool,
    },
    /// Ends a group of matrix products.
    GroupCommit,
    /// Waits until at most `left` groups of matrix products are under way; the sums listed may be read then.
    GroupWait {
        /// Groups.
        left: u32,
        /// Variables.
        acc: Vec<Reg>,
    },
    /// Lanes where the condition holds do the first, the others the second.
    If(Val, Vec<Stmt>, Vec<Stmt>),
    /// `for (var = from; var < to; var += step)`.
    For {
        /// The counter, defined in the body.
        var: Reg,
        /// First value.
        from: Val,
        /// Bound.
        to: Val,
        /// Step, at least 1.
        step: Val,
        /// What is repeated.
        body: Vec<Stmt>,
    },
    /// A remark for readers of the text.
    Note(String),
}

/// What a kernel does with a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Access {
    /// Reads it; nothing writes it while the kernel runs.
    Read,
    /// Reads it, each place before the kernel writes there: it may be an output too.
    ReadBeforeWrite,
    /// Writes each byte at most once.
    Write,
    /// Reads each place before it writes there, and writes each byte at most once.
    Update,
    /// What blocks hand each other: what it holds before does not matter, nor what it holds after. Only a block that
    /// was the last one to be counted may read what others wrote.
    Scratch,
    /// Counts of blocks, of 4 bytes each: zero before and after.
    Counters,
}

/// A buffer argument.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Buffer {
    /// Name in the text.
    pub name: String,
    /// What is done with it.
    pub access: Access,
    /// Bytes that scratch and counters need for each of the first scalar argument; 0 for other buffers.
    pub bytes_each: u64,
}

/// A number of blocks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Extent {
    /// Always the same.
    Fixed(u32),
    /// One block for each `per` of a scalar argument times `times`, the last one perhaps with fewer.
    PerScalar {
        /// Index among the scalars.
        scalar: u32,
        /// Factor on the scalar.
        times: u32,
        /// Served by one block.
        per: u32,
    },
}

impl Extent {
    /// Blocks of a call with these scalars.
    pub fn blocks(self, scalars: &[u32]) -> u32 {
        match self {
            Extent::Fixed(n) => n,
            Extent::PerScalar { scalar, times, per } => (scalars[scalar as usize] * times).div_ceil(per),
        }
    }
}

/// A kernel.
#[derive(Clone, PartialEq, Debug)]
pub struct Kernel {
    /// Its symbol.
    pub name: String,
    /// Buffers, the first arguments.
    pub buffers: Vec<Buffer>,
    /// Names of the 32-bit numbers that follow.
    pub scalars: Vec<String>,
    /// Threads of a block.
    pub threads: u32,
    /// Blocks that fit on a multiprocessor at once: a demand on registers.
    pub blocks_per_sm: u32,
    /// Bytes of shared memory.
    pub shared: u32,
    /// Columns and rows of the grid.
    pub grid: [Extent; 2],
    /// Types of registers.
    pub regs: Vec<Ty>,
    /// What a thread does.
    pub body: Vec<Stmt>,
}

impl Kernel {
    /// The type of an operand.
    pub fn ty(&self, v: Val) -> Ty {
        match v {
            Val::Reg(r) => self.regs[r.0 as usize],
            Val::U32(_) => Ty::U32,
            Val::F32(_) => Ty::F32,
            Val::Pred(_) => Ty::Pred,
        }
    }

    /// The fewest bytes of shared memory that one lane reads or writes at once; 16 where none is used.
    pub fn shared_granule(&self) -> u32 {
        fn least(body: &[Stmt]) -> u32 {
            let of = |s: &Stmt| match s {
                Stmt::Load { mem: Mem::Shared, bytes, .. }
                | Stmt::Store { mem: Mem::Shared, bytes, .. }
                | Stmt::CpAsync { bytes, .. } => *bytes,
                Stmt::If(_, a, b) => least(a).min(least(b)),
                Stmt::For { body, .. } => least(body),
                _ => 16,
            };
            body.iter().map(of).min().unwrap_or(16)
        }
        least(&self.body)
    }
}

impl From<u32> for Val {
    fn from(x: u32) -> Val {
        Val::U32(x)
    }
}

impl From<f32> for Val {
    fn from(x: f32) -> Val {
        Val::F32(F32::new(x))
    }
}

impl From<Reg> for Val {
    fn from(r: Reg) -> Val {
        Val::Reg(r)
    }
}

impl fmt::Display for Reg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}", self.0)
    }
}
