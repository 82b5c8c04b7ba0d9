//! The manifest of an engine: what its files hold, and which kernels to call with which buffers.
//!
//! An engine is a folder. `manifest.pb` is 8 bytes of magic, the blake3 digest of the body, and the body: a
//! [`Manifest`] as a protocol buffers message, whose first field is the version. `manifest.txt` says the same for
//! people and is never read back. Every other file is listed with its length and digest.
//!
//! What a [`validate`](Manifest::validate)d manifest promises:
//! - every index points at something, every offset lies inside its buffer, and the result and the taps fit theirs;
//! - sizes are below the limits of this module, so no product of them overflows;
//! - exactly one program serves each number of tokens from 1 to `max_tokens`;
//! - file names stay inside the engine's folder.
//!
//! What it cannot promise is that kernels stay inside their buffers: that is between the manifest and the object,
//! which one compiler wrote together and whose digests the manifest holds.
//!
//! ```
//! use quantc_runtime::format::Manifest;
//!
//! let bytes = Manifest { model: "tiny".into(), ..Manifest::empty() }.encode_file();
//! assert_eq!(Manifest::decode_file(&bytes)?.model, "tiny");
//!
//! let mut damaged = bytes.clone();
//! *damaged.last_mut().expect("a manifest is not empty") ^= 1;
//! let error = Manifest::decode_file(&damaged).unwrap_err();
//! assert_eq!(error.message(), "the manifest's digest does not match its body: the file is damaged");
//! # Ok::<(), quantc_runtime::Error>(())
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use prost::Message as _;

pub use crate::cpu::has_feature;
use crate::error::{Error, Result};

/// First bytes of `manifest.pb`.
pub const MAGIC: [u8; 8] = *b"QUANTC\x00\x01";
/// The version this runtime writes and reads.
pub const VERSION: u32 = 1;
/// Bytes of a blake3 digest.
pub const DIGEST_BYTES: usize = 32;

/// Name of the manifest in the engine's folder.
pub const MANIFEST_FILE: &str = "manifest.pb";
/// Name of the readable manifest.
pub const MANIFEST_TEXT_FILE: &str = "manifest.txt";
/// Name of the file with all weights.
pub const WEIGHTS_FILE: &str = "weights.bin";
/// Name of the kernel object.
pub const KERNELS_FILE: &str = "kernels.o";
/// Name of the file of kernels of an engine for a GPU: a [`GpuCode`].
pub const GPU_KERNELS_FILE: &str = "kernels.cuda";

/// Every blob of `weights.bin` begins at a multiple of this.
pub const BLOB_ALIGN: u64 = 4096;
/// Every weight begins at a multiple of this in device memory.
pub const DEVICE_ALIGN: u64 = 256;
/// The launch flag that lets the next launch begin before all workers have finished this one.
pub const NO_BARRIER_AFTER: u32 = 1;
/// The launch flag that lets every worker run all items, each into its own scratch.
pub const REPLICATED: u32 = 2;

/// Largest `manifest.pb`, in bytes.
pub const MAX_MANIFEST_BYTES: u64 = 16 << 20;
/// Largest `context`.
pub const MAX_CONTEXT: u32 = 1 << 24;
/// Largest `max_tokens`, and so `max_rows`.
pub const MAX_TOKENS: u32 = 1 << 16;
/// Largest `vocab` and `token_limit`.
pub const MAX_VOCAB: u32 = 1 << 24;
/// Largest arena, state row times context, and scratch, in bytes.
pub const MAX_BUFFER_BYTES: u64 = 1 << 40;
/// Most work items of a launch.
pub const MAX_ITEMS: u64 = 1 << 40;
/// A slot's rows of states come in whole blocks of this many, so that kernels may lay out a block as they like.
pub const STATE_BLOCK: u32 = 64;
/// Bytes that tell how the token of a row is chosen on a GPU, as little-endian words: temperature (f32, 0 for the largest
/// logit), top-k (0 for all), top-p (f32, 1 for all), seed.
pub const CHOICE_BYTES: u64 = 16;
/// Most programs of an engine.
pub const MAX_PROGRAMS: usize = 256;
/// Most buffers of one launch.
pub const MAX_ARGS: usize = 256;

/// Everything the runtime knows about an engine.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Manifest {
    /// Version of this format; [`VERSION`].
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Version of the compiler that wrote the engine.
    #[prost(string, tag = "2")]
    pub quantc_version: String,
    /// Name of the model.
    #[prost(string, tag = "3")]
    pub model: String,
    /// What the engine computes.
    #[prost(enumeration = "Kind", tag = "4")]
    pub kind: i32,
    /// The machine the kernels are for.
    #[prost(message, required, tag = "5")]
    pub target: Target,
    /// Rows of one sequence slot's states; for encoders the longest input.
    #[prost(uint32, tag = "6")]
    pub context: u32,
    /// Most tokens of one call; longer prompts run in chunks.
    #[prost(uint32, tag = "7")]
    pub max_tokens: u32,
    /// Most result rows of one call.
    #[prost(uint32, tag = "8")]
    pub max_rows: u32,
    /// Width of a result row: vocabulary of decoders, hidden size of encoders.
    #[prost(uint32, tag = "9")]
    pub vocab: u32,
    /// Token ids are smaller than this; 0 means `vocab`.
    #[prost(uint32, tag = "10")]
    pub token_limit: u32,
    /// Bytes of the arena, where all intermediate values lie.
    #[prost(uint64, tag = "11")]
    pub arena_bytes: u64,
    /// Bytes of each worker's scratch.
    #[prost(uint64, tag = "12")]
    pub scratch_bytes: u64,
    /// The weights; a [`Ref`] names one by its index here.
    #[prost(message, repeated, tag = "13")]
    pub weights: Vec<Blob>,
    /// What sequences remember between calls.
    #[prost(message, repeated, tag = "14")]
    pub states: Vec<State>,
    /// Ascending by tokens, without gaps.
    #[prost(message, repeated, tag = "15")]
    pub programs: Vec<Program>,
    /// Where the result lies: `r` rows of `vocab` f32, in the arena.
    #[prost(message, required, tag = "16")]
    pub output: Ref,
    /// Tokens that begin and end a text.
    #[prost(message, optional, tag = "17")]
    pub generation: Option<Generation>,
    /// Every other file of the folder.
    #[prost(message, repeated, tag = "18")]
    pub files: Vec<File>,
    /// The pipeline the engine was made by, fully spelled.
    #[prost(string, tag = "19")]
    pub pipeline: String,
    /// Anything else worth telling, in the writer's order.
    #[prost(message, repeated, tag = "20")]
    pub facts: Vec<Fact>,
    /// Bytes of all weights.
    #[prost(uint64, tag = "21")]
    pub weight_bytes: u64,
    /// Weight bytes read to decode one token.
    #[prost(uint64, tag = "22")]
    pub decode_bytes_per_token: u64,
    /// Rows that the caller writes before a call, besides token ids: a row for each token.
    #[prost(message, repeated, tag = "23")]
    pub row_inputs: Vec<Tap>,
    /// Rows that may be read after a call, besides the output: a row for each token.
    #[prost(message, repeated, tag = "24")]
    pub row_outputs: Vec<Tap>,
    /// Of engines whose kernels run on a GPU, what there is to know to launch them.
    #[prost(message, optional, tag = "25")]
    pub gpu: Option<Gpu>,
    /// Arrays that the caller of a graph gives.
    #[prost(message, repeated, tag = "26")]
    pub array_inputs: Vec<Array>,
    /// Arrays that a graph gives.
    #[prost(message, repeated, tag = "27")]
    pub array_outputs: Vec<Array>,
}

/// How kernels of a GPU are launched.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Gpu {
    /// The architecture that machine code is for, as NVIDIA's compiler calls it: `sm_90a`.
    #[prost(string, tag = "1")]
    pub arch: String,
    /// Tokens of a page of states.
    #[prost(uint32, tag = "2")]
    pub page_rows: u32,
    /// Version of CUDA that made the machine code, a thousand times the major and ten times the minor number; 0 when the
    /// kernels are text, which the runtime compiles.
    #[prost(uint32, tag = "3")]
    pub cuda: u32,
    /// How each kernel is launched.
    #[prost(message, repeated, tag = "4")]
    pub kernels: Vec<GpuKernel>,
    /// The kernel that chooses tokens from rows of the result, of buffers of logits, options ([`CHOICE_BYTES`] for each row)
    /// and tokens; empty where there is none.
    #[prost(string, tag = "5")]
    pub sampler: String,
}

/// How one kernel of a GPU is launched.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct GpuKernel {
    /// Its symbol.
    #[prost(string, tag = "1")]
    pub symbol: String,
    /// Threads of a block.
    #[prost(uint32, tag = "2")]
    pub threads: u32,
    /// Bytes of shared memory of a block.
    #[prost(uint32, tag = "3")]
    pub shared: u32,
    /// 32-bit registers of a thread; 0 when they are not known.
    #[prost(uint32, tag = "4")]
    pub registers: u32,
    /// Columns and rows of the grid.
    #[prost(message, repeated, tag = "5")]
    pub grid: Vec<Blocks>,
    /// The sizes that follow the buffers, 32 bits each.
    #[prost(enumeration = "Sym", repeated, tag = "6")]
    pub scalars: Vec<i32>,
    /// Number of buffers that a launch gives.
    #[prost(uint32, tag = "7")]
    pub buffers: u32,
    /// Bytes of scratch for each token, which follows the buffers when there is any, and then the counters.
    #[prost(uint64, tag = "8")]
    pub scratch_each: u64,
    /// Bytes of counters for each token: zero before and after every launch.
    #[prost(uint64, tag = "9")]
    pub counters_each: u64,
}

/// A number of blocks: `ceil(sym * times / per)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct Blocks {
    /// What the number grows with.
    #[prost(enumeration = "Sym", tag = "1")]
    pub sym: i32,
    /// Factor.
    #[prost(uint32, tag = "2")]
    pub times: u32,
    /// Served by one block, at least 1.
    #[prost(uint32, tag = "3")]
    pub per: u32,
}

/// What [`GPU_KERNELS_FILE`] holds.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct GpuCode {
    /// Every kernel, by symbol.
    #[prost(message, repeated, tag = "1")]
    pub kernels: Vec<GpuEntry>,
}

/// One kernel of a GPU.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct GpuEntry {
    /// Its symbol.
    #[prost(string, tag = "1")]
    pub symbol: String,
    /// Machine code; empty when the kernel is text.
    #[prost(bytes = "vec", tag = "2")]
    pub cubin: Vec<u8>,
    /// CUDA C++; empty when there is machine code.
    #[prost(string, tag = "3")]
    pub source: String,
    /// What it computes, as the compiler's JSON: for tools that check kernels.
    #[prost(string, tag = "4")]
    pub spec: String,
}

/// What an engine computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Kind {
    /// Logits of the next token, with state.
    Decoder = 0,
    /// A vector for each token, without state.
    Encoder = 1,
    /// Arrays from arrays, all of fixed shapes.
    Graph = 2,
}

/// An array with a name, in the arena.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Array {
    /// The name in the model.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The element type, as the compiler writes it: `f32`, `u8`, `bool`.
    #[prost(string, tag = "2")]
    pub elem: String,
    /// Bytes of an element.
    #[prost(uint32, tag = "3")]
    pub elem_bytes: u32,
    /// Extents; row-major.
    #[prost(uint64, repeated, tag = "4")]
    pub dims: Vec<u64>,
    /// Where it lies; always in the arena.
    #[prost(message, required, tag = "5")]
    pub at: Ref,
}

impl Array {
    /// Elements; `None` when there are absurdly many.
    pub fn elements(&self) -> Option<u64> {
        self.dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d))
    }

    /// Bytes; `None` when there are absurdly many.
    pub fn bytes(&self) -> Option<u64> {
        self.elements()?.checked_mul(u64::from(self.elem_bytes)).filter(|&b| b <= MAX_BUFFER_BYTES)
    }

    /// Type and extents, as `f32 1x3x224x224`.
    pub fn ty(&self) -> String {
        let dims: Vec<String> = self.dims.iter().map(u64::to_string).collect();
        if dims.is_empty() { self.elem.clone() } else { format!("{} {}", self.elem, dims.join("x")) }
    }
}

/// The machine kernels are compiled for.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Target {
    /// The target's name in the compiler's table.
    #[prost(string, tag = "1")]
    pub name: String,
    /// `x86_64`.
    #[prost(string, tag = "2")]
    pub arch: String,
    /// Instruction sets the kernels use, in LLVM's spelling, for example `avx512vnni`.
    #[prost(string, repeated, tag = "3")]
    pub features: Vec<String>,
}

/// A range of `weights.bin`.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Blob {
    /// What it is, for people.
    #[prost(string, tag = "1")]
    pub name: String,
    /// First byte; a multiple of [`BLOB_ALIGN`].
    #[prost(uint64, tag = "2")]
    pub offset: u64,
    /// Bytes.
    #[prost(uint64, tag = "3")]
    pub len: u64,
    /// blake3 of the bytes.
    #[prost(bytes = "vec", tag = "4")]
    pub digest: Vec<u8>,
    /// Whether every token reads all of it: such weights are worth moving to huge pages.
    #[prost(bool, tag = "5")]
    pub streamed: bool,
}

/// Rows that a slot has in each state of an engine of this context: whole blocks.
pub fn slot_rows(context: u32) -> u64 {
    u64::from(context).next_multiple_of(u64::from(STATE_BLOCK))
}

/// A table with [`slot_rows`] rows for each slot that lives as long as the session.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct State {
    /// What it is, for people.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Bytes of one row.
    #[prost(uint64, tag = "2")]
    pub row_bytes: u64,
}

/// The launches for calls of `min_t..=max_t` tokens.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Program {
    /// Fewest tokens.
    #[prost(uint32, tag = "1")]
    pub min_t: u32,
    /// Most tokens.
    #[prost(uint32, tag = "2")]
    pub max_t: u32,
    /// In order; between two of them all workers meet.
    #[prost(message, repeated, tag = "3")]
    pub launches: Vec<Launch>,
}

/// One kernel call, shared by the workers.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Launch {
    /// The kernel's symbol in the object.
    #[prost(string, tag = "1")]
    pub symbol: String,
    /// What it computes, for profiles and explanations.
    #[prost(string, tag = "2")]
    pub name: String,
    /// The kernel's buffers, in its order.
    #[prost(message, repeated, tag = "3")]
    pub args: Vec<Ref>,
    /// How many work items there are.
    #[prost(message, required, tag = "4")]
    pub items: Items,
    /// A value worth comparing once the launch is done.
    #[prost(message, optional, tag = "5")]
    pub tap: Option<Tap>,
    /// Any of [`NO_BARRIER_AFTER`] and [`REPLICATED`].
    #[prost(uint32, tag = "6")]
    pub flags: u32,
}

/// A buffer of a launch.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct Ref {
    /// Always there in a valid manifest.
    #[prost(oneof = "RefKind", tags = "1, 2, 3, 4, 5, 6")]
    pub kind: Option<RefKind>,
}

/// Where a buffer begins.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Oneof)]
pub enum RefKind {
    /// Index of a weight.
    #[prost(uint32, tag = "1")]
    Weight(u32),
    /// Byte offset in the arena.
    #[prost(uint64, tag = "2")]
    Arena(u64),
    /// Index of a state.
    #[prost(uint32, tag = "3")]
    State(u32),
    /// One of the call's integer inputs.
    #[prost(enumeration = "Input", tag = "4")]
    Input(i32),
    /// Byte offset in the worker's scratch.
    #[prost(uint64, tag = "5")]
    Scratch(u64),
    /// A null pointer, for an operand that is absent.
    #[prost(bool, tag = "6")]
    Null(bool),
}

/// The integer inputs of a call, each `i32[t]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Input {
    /// Token ids.
    Tokens = 0,
    /// Position of each token in its own sequence.
    Positions = 1,
    /// First state row of each token's slot.
    Base = 2,
    /// Segment of each token, for encoders that tell texts of a pair apart; 0 unless given.
    Types = 3,
    /// Of engines for GPUs, the page of states that has each [`STATE_BLOCK`] rows of all slots in order.
    Pages = 4,
}

/// A number of work items: `n * ceil(sym / div)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct Items {
    /// Factor.
    #[prost(uint64, tag = "1")]
    pub n: u64,
    /// What the number grows with.
    #[prost(enumeration = "Sym", tag = "2")]
    pub sym: i32,
    /// At least 1.
    #[prost(uint32, tag = "3")]
    pub div: u32,
}

/// A size that each call chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Sym {
    /// 1.
    One = 0,
    /// Tokens of the call.
    T = 1,
    /// Result rows of the call.
    R = 2,
}

/// A value to look at after a launch, or to give before one: rows of `width` f32 in the arena.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Tap {
    /// The value's name in the model's graph.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Where it lies; always in the arena.
    #[prost(message, required, tag = "2")]
    pub at: Ref,
    /// Columns.
    #[prost(uint32, tag = "3")]
    pub width: u32,
    /// Whether there is a row for each result wanted, and not for each token.
    #[prost(bool, tag = "4")]
    pub of_results: bool,
}

/// Tokens that begin and end a text.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Generation {
    /// Put in front of a text, when the model has one.
    #[prost(uint32, optional, tag = "1")]
    pub bos: Option<u32>,
    /// Each of them ends a text.
    #[prost(uint32, repeated, tag = "2")]
    pub eos: Vec<u32>,
}

/// A file of the engine's folder.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct File {
    /// Its name; a plain name without folders.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub len: u64,
    /// blake3 of the bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub digest: Vec<u8>,
}

/// Something worth telling.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Fact {
    /// What it is about.
    #[prost(string, tag = "1")]
    pub key: String,
    /// What is said.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// The fields every version begins with.
#[derive(Clone, PartialEq, prost::Message)]
struct Preamble {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(string, tag = "2")]
    quantc_version: String,
}

impl Ref {
    /// Weight number `index`.
    pub fn weight(index: u32) -> Ref {
        RefKind::Weight(index).into()
    }

    /// The arena from byte `offset` on.
    pub fn arena(offset: u64) -> Ref {
        RefKind::Arena(offset).into()
    }

    /// State number `index`.
    pub fn state(index: u32) -> Ref {
        RefKind::State(index).into()
    }

    /// An integer input.
    pub fn input(input: Input) -> Ref {
        RefKind::Input(input as i32).into()
    }

    /// The worker's scratch from byte `offset` on.
    pub fn scratch(offset: u64) -> Ref {
        RefKind::Scratch(offset).into()
    }

    /// A null pointer.
    pub fn null() -> Ref {
        RefKind::Null(true).into()
    }
}

impl Blocks {
    /// Blocks of a call of `t` tokens and `r` rows; `None` when the number is absurd.
    pub fn count(&self, t: u32, r: u32) -> Option<u32> {
        let size = match Sym::try_from(self.sym).ok()? {
            Sym::One => 1,
            Sym::T => t,
            Sym::R => r,
        };
        let all = u64::from(size) * u64::from(self.times);
        // Rows of a grid may be at most 65535, columns more; what is beyond that the driver refuses.
        u32::try_from(all.checked_div(self.per.into())? + u64::from(!all.is_multiple_of(self.per.into())))
            .ok()
            .filter(|&n| n <= i32::MAX as u32)
    }
}

impl Blocks {
    /// As `manifest.txt` writes it.
    fn text(self) -> String {
        let sym = match Sym::try_from(self.sym) {
            Ok(Sym::One) => return self.count(1, 1).unwrap_or(0).to_string(),
            Ok(Sym::T) => "t",
            Ok(Sym::R) => "r",
            Err(_) => "?",
        };
        match (self.times, self.per) {
            (1, per) => format!("ceil({sym} / {per})"),
            (times, per) => format!("ceil({times} {sym} / {per})"),
        }
    }
}

impl GpuCode {
    /// The bytes of [`GPU_KERNELS_FILE`].
    pub fn encode_file(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    /// Reads the bytes of [`GPU_KERNELS_FILE`].
    pub fn decode_file(bytes: &[u8]) -> Result<GpuCode> {
        GpuCode::decode(bytes)
            .map_err(|e| Error::format(format!("the file of kernels is not a message: {e}")))
    }
}

impl From<RefKind> for Ref {
    fn from(kind: RefKind) -> Ref {
        Ref { kind: Some(kind) }
    }
}

impl Items {
    /// `n` items whatever the call.
    pub fn fixed(n: u64) -> Items {
        Items { n, sym: Sym::One as i32, div: 1 }
    }

    /// `n * ceil(t / div)` items.
    pub fn per_token(n: u64, div: u32) -> Items {
        Items { n, sym: Sym::T as i32, div }
    }

    /// `n * ceil(r / div)` items.
    pub fn per_row(n: u64, div: u32) -> Items {
        Items { n, sym: Sym::R as i32, div }
    }

    /// How many items a call of `t` tokens and `r` rows has; `None` when the number is absurd.
    pub fn count(&self, t: u32, r: u32) -> Option<u64> {
        let size = match Sym::try_from(self.sym).ok()? {
            Sym::One => 1,
            Sym::T => t,
            Sym::R => r,
        };
        if self.div == 0 {
            return None;
        }
        self.n.checked_mul(u64::from(size.div_ceil(self.div))).filter(|&items| items <= MAX_ITEMS)
    }
}

impl Manifest {
    /// A manifest without weights and programs, at the current version; a base for struct updates.
    pub fn empty() -> Manifest {
        Manifest { version: VERSION, ..Manifest::default() }
    }

    /// The bytes of `manifest.pb`.
    pub fn encode_file(&self) -> Vec<u8> {
        let body = self.encode_to_vec();
        let mut bytes = Vec::with_capacity(MAGIC.len() + DIGEST_BYTES + body.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(blake3::hash(&body).as_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Reads the bytes of `manifest.pb`: magic, digest, version, message. Does not [`validate`](Manifest::validate).
    pub fn decode_file(bytes: &[u8]) -> Result<Manifest> {
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            let what = format!("the manifest has {} bytes, more than {MAX_MANIFEST_BYTES}", bytes.len());
            return Err(Error::format(what));
        }
        let Some(rest) = bytes.strip_prefix(MAGIC.as_slice()) else {
            return Err(Error::format("not an engine's manifest: the first 8 bytes differ"));
        };
        let Some((digest, body)) = rest.split_first_chunk::<DIGEST_BYTES>() else {
            return Err(Error::format("the manifest ends before its body"));
        };
        if blake3::hash(body).as_bytes() != digest {
            return Err(Error::format("the manifest's digest does not match its body: the file is damaged"));
        }
        let bad = |e: prost::DecodeError| Error::format(format!("the manifest's body is not a message: {e}"));
        let preamble = Preamble::decode(body).map_err(bad)?;
        if preamble.version != VERSION {
            let (theirs, by) = (preamble.version, preamble.quantc_version);
            let what = format!(
                "the engine has format version {theirs} (written by quantc {by:?}), this runtime reads version {VERSION}; \
                 compile the model again with this quantc"
            );
            return Err(Error::format(what));
        }
        Manifest::decode(body).map_err(bad)
    }

    /// Token ids are smaller than this.
    pub fn token_ids(&self) -> u32 {
        if self.token_limit == 0 { self.vocab } else { self.token_limit }
    }

    /// The listed file called `name`.
    pub fn file(&self, name: &str) -> Option<&File> {
        self.files.iter().find(|file| file.name == name)
    }

    /// Name of the file with the kernels.
    pub fn kernels_file(&self) -> &'static str {
        if self.gpu.is_some() { GPU_KERNELS_FILE } else { KERNELS_FILE }
    }

    /// Device memory that a session of `slots` sequences needs on a GPU, weights included; `None` when that is absurd.
    pub fn device_bytes(&self, slots: u32) -> Option<DeviceBytes> {
        self.device_bytes_of(slots, self.pages_of(slots))
    }

    /// The same where the sequences share a pool of so many pages.
    pub fn device_bytes_of(&self, slots: u32, pages: u64) -> Option<DeviceBytes> {
        let mut states = 0u64;
        for state in &self.states {
            let bytes = state.row_bytes.checked_mul(STATE_BLOCK.into())?.checked_mul(pages)?;
            states = states.checked_add(bytes).filter(|&bytes| bytes <= MAX_BUFFER_BYTES)?;
        }
        let inputs = self.device_inputs(slots).bytes;
        let (scratch, counters) = self.workspace_bytes();
        let weights = self.weights.iter().map(|b| b.len.next_multiple_of(DEVICE_ALIGN)).sum();
        let arena = self.arena_bytes + scratch + counters;
        Some(DeviceBytes { weights, states, arena, inputs })
    }

    /// Pages of states of one sequence of the whole context.
    pub fn pages_of_slot(&self) -> u64 {
        slot_rows(self.context) / u64::from(STATE_BLOCK)
    }

    /// Pages of `slots` such sequences.
    pub fn pages_of(&self, slots: u32) -> u64 {
        self.pages_of_slot() * u64::from(slots)
    }

    /// Where what a session of `slots` sequences sends to a GPU lies.
    pub(crate) fn device_inputs(&self, slots: u32) -> DeviceInputs {
        let each = (4 * u64::from(self.max_tokens)).next_multiple_of(64);
        let table = 4 * each;
        let choices = (table + 4 * self.pages_of(slots)).next_multiple_of(64);
        let rows = match &self.gpu {
            Some(gpu) if !gpu.sampler.is_empty() => u64::from(self.max_rows),
            _ => 0,
        };
        let chosen = choices + CHOICE_BYTES * rows;
        DeviceInputs { each, table, choices, chosen, bytes: chosen + 4 * rows }
    }

    /// Bytes of scratch and of counters of the largest launch on a GPU.
    pub fn workspace_bytes(&self) -> (u64, u64) {
        let kernels = || self.gpu.iter().flat_map(|gpu| &gpu.kernels);
        let of_call = |launch: &Launch, tokens: u32, each: fn(&GpuKernel) -> u64| {
            let kernel = kernels().find(|kernel| kernel.symbol == launch.symbol);
            kernel.map_or(0, |kernel| each(kernel).saturating_mul(tokens.into()))
        };
        let most = |each: fn(&GpuKernel) -> u64| {
            let launches = self.programs.iter().flat_map(|p| p.launches.iter().map(|l| (l, p.max_t)));
            launches.map(|(launch, tokens)| of_call(launch, tokens, each)).max().unwrap_or(0)
        };
        (most(|k| k.scratch_each), most(|k| k.counters_each))
    }

    /// The program for calls of `t` tokens, as an index.
    pub fn program_for(&self, t: u32) -> Option<usize> {
        self.programs.iter().position(|program| (program.min_t..=program.max_t).contains(&t))
    }

    /// Bytes of all states for `slots` sequences; `None` when they exceed [`MAX_BUFFER_BYTES`].
    pub fn state_bytes(&self, slots: u32) -> Option<u64> {
        let rows = slot_rows(self.context).checked_mul(u64::from(slots))?;
        let mut total = 0u64;
        for state in &self.states {
            total = total.checked_add(state.row_bytes.checked_mul(rows)?)?;
        }
        (total <= MAX_BUFFER_BYTES).then_some(total)
    }

    /// Checks everything that can be checked without the other files; see the module's list.
    pub fn validate(&self) -> Result<()> {
        self.validate_sizes()?;
        self.validate_files()?;
        self.validate_weights()?;
        self.validate_states()?;
        self.validate_programs()?;
        self.validate_gpu()?;
        for rows in self.row_inputs.iter().chain(&self.row_outputs) {
            let bytes = u64::from(self.max_tokens) * u64::from(rows.width) * 4;
            self.check_floats(&rows.at, bytes).map_err(|e| e.at(format_args!("rows {:?}", rows.name)))?;
        }
        for array in self.array_inputs.iter().chain(&self.array_outputs) {
            self.check_array(array).map_err(|e| e.at(format_args!("array {:?}", array.name)))?;
        }
        let bytes = u64::from(self.max_rows) * u64::from(self.vocab) * 4;
        self.check_floats(&self.output, bytes).map_err(|e| e.at("output"))
    }

    fn validate_sizes(&self) -> Result<()> {
        if self.version != VERSION {
            return Err(Error::format(format!("version {} is not {VERSION}", self.version)));
        }
        if Kind::try_from(self.kind).is_err() {
            return Err(Error::format(format!("kind {} is neither decoder, encoder nor graph", self.kind)));
        }
        if self.target.arch != "x86_64" {
            let (name, arch) = (&self.target.name, &self.target.arch);
            return Err(Error::format(format!(
                "target `{name}` is for {arch:?}, this runtime is for \"x86_64\""
            )));
        }
        in_range("context", self.context, MAX_CONTEXT)?;
        in_range("max_tokens", self.max_tokens, MAX_TOKENS)?;
        in_range("max_rows", self.max_rows, self.max_tokens)?;
        in_range("vocab", self.vocab, MAX_VOCAB)?;
        if self.token_limit > MAX_VOCAB {
            return Err(Error::format(format!("token_limit {} is more than {MAX_VOCAB}", self.token_limit)));
        }
        for (what, bytes) in [("arena_bytes", self.arena_bytes), ("scratch_bytes", self.scratch_bytes)] {
            if bytes > MAX_BUFFER_BYTES {
                return Err(Error::format(format!("{what} {bytes} is more than {MAX_BUFFER_BYTES}")));
            }
        }
        if let Some(generation) = &self.generation {
            for &token in generation.bos.iter().chain(&generation.eos) {
                if token >= self.token_ids() {
                    let what = format!("token {token} is outside the {} tokens there are", self.token_ids());
                    return Err(Error::format(what).at("generation"));
                }
            }
        }
        Ok(())
    }

    fn validate_files(&self) -> Result<()> {
        let mut names = BTreeSet::new();
        for file in &self.files {
            let name = file.name.as_str();
            let at = |e: Error| e.at(format_args!("file {name:?}"));
            let plain = !name.is_empty()
                && name != "."
                && name != ".."
                && name.len() <= 255
                && !name.contains(['/', '\\', '\0'])
                && !name.chars().any(char::is_control);
            if !plain || name == MANIFEST_FILE {
                return Err(at(Error::format("not a plain file name beside the manifest")));
            }
            check_digest(&file.digest).map_err(at)?;
            if !names.insert(name) {
                return Err(at(Error::format("listed twice")));
            }
        }
        let kernels = self.kernels_file();
        if !names.contains(kernels) {
            return Err(Error::format(format!("{kernels} is not listed")));
        }
        if !self.weights.is_empty() && !names.contains(WEIGHTS_FILE) {
            return Err(Error::format(format!("{WEIGHTS_FILE} is not listed")));
        }
        Ok(())
    }

    fn validate_weights(&self) -> Result<()> {
        let available = self.file(WEIGHTS_FILE).map_or(0, |file| file.len);
        for (index, blob) in self.weights.iter().enumerate() {
            let at = |e: Error| e.at(format_args!("weight {index} {:?}", blob.name));
            check_digest(&blob.digest).map_err(at)?;
            if blob.offset % BLOB_ALIGN != 0 {
                return Err(at(Error::format(format!(
                    "offset {} is not a multiple of {BLOB_ALIGN}",
                    blob.offset
                ))));
            }
            if blob.offset.checked_add(blob.len).is_none_or(|end| end > available) {
                let (offset, len) = (blob.offset, blob.len);
                let what = format!("{len} bytes at {offset} are not within {WEIGHTS_FILE}'s {available}");
                return Err(at(Error::format(what)));
            }
        }
        Ok(())
    }

    fn validate_states(&self) -> Result<()> {
        for (index, state) in self.states.iter().enumerate() {
            if state.row_bytes == 0 || state.row_bytes > MAX_BUFFER_BYTES {
                let what = format!("row_bytes {} is not in 1..={MAX_BUFFER_BYTES}", state.row_bytes);
                return Err(Error::format(what).at(format_args!("state {index} {:?}", state.name)));
            }
        }
        match self.state_bytes(1) {
            Some(_) => Ok(()),
            None => Err(Error::format(format!("the states take more than {MAX_BUFFER_BYTES} bytes"))),
        }
    }

    fn validate_programs(&self) -> Result<()> {
        if self.programs.len() > MAX_PROGRAMS {
            return Err(Error::format(format!("{} programs, more than {MAX_PROGRAMS}", self.programs.len())));
        }
        let mut next = 1;
        for (index, program) in self.programs.iter().enumerate() {
            let at = |e: Error| e.at(format_args!("program {index}"));
            let (min, max) = (program.min_t, program.max_t);
            if min != next || max < min {
                let what = format!("covers {min}..={max} tokens, but the next to be covered is {next}");
                return Err(at(Error::format(what)));
            }
            next = match max.checked_add(1) {
                Some(next) if max <= MAX_TOKENS => next,
                _ => return Err(at(Error::format(format!("max_t {max} is more than {MAX_TOKENS}")))),
            };
            for (index, launch) in program.launches.iter().enumerate() {
                let (symbol, name) = (&launch.symbol, &launch.name);
                self.validate_launch(launch, max)
                    .map_err(|e| at(e.at(format_args!("launch {index} {name:?} ({symbol})"))))?;
            }
        }
        if next <= self.max_tokens {
            return Err(Error::format(format!(
                "no program serves {next} tokens; max_tokens is {}",
                self.max_tokens
            )));
        }
        Ok(())
    }

    fn validate_launch(&self, launch: &Launch, max_t: u32) -> Result<()> {
        if launch.args.len() > MAX_ARGS {
            return Err(Error::format(format!("{} buffers, more than {MAX_ARGS}", launch.args.len())));
        }
        if launch.flags & !(NO_BARRIER_AFTER | REPLICATED) != 0 {
            return Err(Error::format(format!("flags {:#x} are unknown", launch.flags)));
        }
        if launch.items.count(max_t, max_t).is_none() {
            let Items { n, sym, div } = launch.items;
            return Err(Error::format(format!(
                "{n} items times ceil(symbol {sym} / {div}) is not a sane number"
            )));
        }
        for (index, arg) in launch.args.iter().enumerate() {
            self.check_ref(arg).map_err(|e| e.at(format_args!("buffer {index}")))?;
        }
        if let Some(tap) = &launch.tap {
            let most = if tap.of_results { self.max_rows } else { self.max_tokens };
            let bytes = u64::from(max_t.min(most)) * u64::from(tap.width) * 4;
            self.check_floats(&tap.at, bytes).map_err(|e| e.at(format_args!("tap {:?}", tap.name)))?;
        }
        Ok(())
    }

    fn validate_gpu(&self) -> Result<()> {
        let paged = |launch: &Launch| launch.args.contains(&Ref::input(Input::Pages));
        let launches = || self.programs.iter().flat_map(|program| &program.launches);
        let Some(gpu) = &self.gpu else {
            return match launches().any(paged) {
                true => Err(Error::format("states in pages are for GPUs only")),
                false => Ok(()),
            };
        };
        if gpu.page_rows != STATE_BLOCK {
            return Err(Error::format(format!("pages of {} rows are not of {STATE_BLOCK}", gpu.page_rows)));
        }
        for kernel in &gpu.kernels {
            let at = |e: Error| e.at(format_args!("kernel {}", kernel.symbol));
            in_range("threads", kernel.threads, 1024).map_err(at)?;
            let most = MAX_BUFFER_BYTES / u64::from(MAX_TOKENS);
            if kernel.scratch_each > most || kernel.counters_each > most {
                return Err(at(Error::format("its workspace is absurdly large")));
            }
            let counted =
                |blocks: &Blocks| blocks.per > 0 && blocks.count(self.max_tokens, self.max_rows).is_some();
            if kernel.grid.len() != 2 || !kernel.grid.iter().all(counted) {
                return Err(at(Error::format("the grid is not two sane numbers of blocks")));
            }
            if kernel.scalars.iter().any(|&s| Sym::try_from(s).is_err()) {
                return Err(at(Error::format("a size of no known kind")));
            }
        }
        let chooses = |kernel: &GpuKernel| {
            kernel.symbol == gpu.sampler
                && kernel.buffers == 3
                && kernel.scalars == [Sym::R as i32]
                && kernel.scratch_each + kernel.counters_each == 0
        };
        if !gpu.sampler.is_empty() && !gpu.kernels.iter().any(chooses) {
            return Err(Error::format(format!("no kernel `{}` chooses tokens", gpu.sampler)));
        }
        let known: BTreeMap<&str, u32> =
            gpu.kernels.iter().map(|kernel| (kernel.symbol.as_str(), kernel.buffers)).collect();
        for launch in launches() {
            let at = |what: String| {
                Err(Error::format(what).at(format_args!("launch {:?} ({})", launch.name, launch.symbol)))
            };
            match known.get(launch.symbol.as_str()) {
                None => return at("there is no such kernel".into()),
                Some(&buffers) if buffers as usize != launch.args.len() => {
                    return at(format!("{} buffers, the kernel has {buffers}", launch.args.len()));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn check_ref(&self, at: &Ref) -> Result<()> {
        let outside = |what: &str, index: u64, count: u64| {
            Err(Error::format(format!("{what} {index} is outside the {count} there are")))
        };
        match at.kind {
            None => Err(Error::format("the buffer is of no known kind")),
            Some(RefKind::Weight(index)) if index as usize >= self.weights.len() => {
                outside("weight", u64::from(index), self.weights.len() as u64)
            }
            Some(RefKind::State(index)) if index as usize >= self.states.len() => {
                outside("state", u64::from(index), self.states.len() as u64)
            }
            Some(RefKind::Arena(offset)) if offset >= self.arena_bytes => {
                outside("arena byte", offset, self.arena_bytes)
            }
            Some(RefKind::Scratch(offset)) if offset >= self.scratch_bytes => {
                outside("scratch byte", offset, self.scratch_bytes)
            }
            Some(RefKind::Input(input)) if Input::try_from(input).is_err() => {
                Err(Error::format(format!("input {input} is unknown")))
            }
            Some(_) => Ok(()),
        }
    }

    fn check_array(&self, array: &Array) -> Result<()> {
        if !matches!(array.elem_bytes, 1 | 2 | 4 | 8) {
            return Err(Error::format(format!("elements of {} bytes", array.elem_bytes)));
        }
        let bytes = array.bytes().ok_or_else(|| Error::format("its extents are absurdly large"))?;
        let Some(RefKind::Arena(offset)) = array.at.kind else {
            return Err(Error::format("the array does not lie in the arena"));
        };
        if offset % u64::from(array.elem_bytes) != 0 {
            return Err(Error::format(format!("arena offset {offset} is not a multiple of an element")));
        }
        if offset.checked_add(bytes).is_none_or(|end| end > self.arena_bytes) {
            let have = self.arena_bytes;
            return Err(Error::format(format!(
                "{bytes} bytes at {offset} are not within the arena's {have}"
            )));
        }
        Ok(())
    }

    /// Checks that `at` is `bytes` bytes of f32 in the arena.
    fn check_floats(&self, at: &Ref, bytes: u64) -> Result<()> {
        let Some(RefKind::Arena(offset)) = at.kind else {
            return Err(Error::format("the value does not lie in the arena"));
        };
        if offset % 4 != 0 {
            return Err(Error::format(format!("arena offset {offset} is not a multiple of 4")));
        }
        if offset.checked_add(bytes).is_none_or(|end| end > self.arena_bytes) {
            let have = self.arena_bytes;
            return Err(Error::format(format!(
                "{bytes} bytes at {offset} are not within the arena's {have}"
            )));
        }
        Ok(())
    }

    /// The text of `manifest.txt`.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        self.write_text(&mut text).expect("writing to a string does not fail");
        text
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        let kind = match Kind::try_from(self.kind) {
            Ok(Kind::Decoder) => "decoder",
            Ok(Kind::Encoder) => "encoder",
            Ok(Kind::Graph) => "graph",
            Err(_) => "unknown",
        };
        writeln!(
            out,
            "engine {:?}: {kind}, format version {}, quantc {}",
            self.model, self.version, self.quantc_version
        )?;
        writeln!(
            out,
            "target {} ({}): {}",
            self.target.name,
            self.target.arch,
            self.target.features.join(", ")
        )?;
        if !self.pipeline.is_empty() {
            writeln!(out, "pipeline {}", self.pipeline)?;
        }
        writeln!(out, "context {}", self.context)?;
        writeln!(out, "max_tokens {}", self.max_tokens)?;
        writeln!(out, "max_rows {}", self.max_rows)?;
        writeln!(out, "vocab {}", self.vocab)?;
        writeln!(out, "token_limit {}", self.token_ids())?;
        writeln!(out, "arena_bytes {}", self.arena_bytes)?;
        match &self.gpu {
            None => writeln!(out, "scratch_bytes {} per worker", self.scratch_bytes)?,
            Some(gpu) => {
                let code = match gpu.cuda {
                    0 => "as text, compiled when it is loaded".into(),
                    cuda => format!("machine code by CUDA {}.{}", cuda / 1000, cuda % 1000 / 10),
                };
                writeln!(out, "gpu {}: kernels {code}; pages of {} tokens", gpu.arch, gpu.page_rows)?;
                if !gpu.sampler.is_empty() {
                    writeln!(out, "tokens are chosen by {}", gpu.sampler)?;
                }
                if let Some(need) = self.device_bytes(1) {
                    writeln!(
                        out,
                        "device_bytes {} (weights {}, states {}, arena {}, inputs {})",
                        need.total(),
                        need.weights,
                        need.states,
                        need.arena,
                        need.inputs
                    )?;
                }
            }
        }
        writeln!(out, "weight_bytes {}", self.weight_bytes)?;
        writeln!(out, "decode_bytes_per_token {}", self.decode_bytes_per_token)?;
        writeln!(out, "output {}", RefText(&self.output, self))?;
        for (what, all) in [("input", &self.row_inputs), ("further output", &self.row_outputs)] {
            for rows in all {
                writeln!(out, "{what} {} {} x {}", rows.name, RefText(&rows.at, self), rows.width)?;
            }
        }
        for (what, all) in [("input", &self.array_inputs), ("output", &self.array_outputs)] {
            for array in all {
                writeln!(out, "{what} {} {} {}", array.name, RefText(&array.at, self), array.ty())?;
            }
        }
        if let Some(generation) = &self.generation {
            match generation.bos {
                Some(bos) => writeln!(out, "bos {bos}")?,
                None => writeln!(out, "bos none")?,
            }
            writeln!(out, "eos {:?}", generation.eos)?;
        }
        for fact in &self.facts {
            writeln!(out, "fact {} = {}", fact.key, fact.value)?;
        }
        writeln!(out, "\nfiles")?;
        for file in &self.files {
            writeln!(out, "  {} {} bytes blake3 {}", file.name, file.len, hex(&file.digest))?;
        }
        writeln!(out, "\nweights")?;
        for (index, blob) in self.weights.iter().enumerate() {
            let (name, offset, len) = (&blob.name, blob.offset, blob.len);
            let streamed = if blob.streamed { " streamed" } else { "" };
            writeln!(out, "  {index} {name} {len} bytes at {offset}{streamed} blake3 {}", hex(&blob.digest))?;
        }
        writeln!(out, "\nstates")?;
        for (index, state) in self.states.iter().enumerate() {
            writeln!(out, "  {index} {} {} bytes a row", state.name, state.row_bytes)?;
        }
        if let Some(gpu) = &self.gpu {
            writeln!(out, "\nkernels")?;
            for kernel in &gpu.kernels {
                let grid: Vec<String> = kernel.grid.iter().map(|blocks| blocks.text()).collect();
                write!(out, "  {} grid {} threads {}", kernel.symbol, grid.join(" x "), kernel.threads)?;
                write!(out, " shared {} registers {}", kernel.shared, kernel.registers)?;
                if kernel.scratch_each + kernel.counters_each > 0 {
                    write!(out, " workspace {} + {} a token", kernel.scratch_each, kernel.counters_each)?;
                }
                writeln!(out)?;
            }
        }
        for program in &self.programs {
            writeln!(out, "\nprogram for {}..={} tokens", program.min_t, program.max_t)?;
            for launch in &program.launches {
                self.write_launch(out, launch)?;
            }
        }
        Ok(())
    }

    fn write_launch(&self, out: &mut String, launch: &Launch) -> std::fmt::Result {
        let Items { n, div, .. } = launch.items;
        let sym = match Sym::try_from(launch.items.sym) {
            Ok(Sym::One) => "1",
            Ok(Sym::T) => "t",
            Ok(Sym::R) => "r",
            Err(_) => "?",
        };
        write!(out, "  {} = {}(", launch.name, launch.symbol)?;
        for (index, arg) in launch.args.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(out, "{comma}{}", RefText(arg, self))?;
        }
        write!(out, ")")?;
        if self.gpu.is_none() {
            write!(out, " items {n}")?;
            if sym != "1" {
                write!(out, " * ceil({sym} / {div})")?;
            }
        }
        if launch.flags & NO_BARRIER_AFTER != 0 {
            write!(out, " no-barrier-after")?;
        }
        if launch.flags & REPLICATED != 0 {
            write!(out, " by-every-worker")?;
        }
        if let Some(tap) = &launch.tap {
            write!(out, " tap {} {} x {}", tap.name, RefText(&tap.at, self), tap.width)?;
        }
        writeln!(out)
    }
}

/// A reference as `manifest.txt` writes it.
struct RefText<'a>(&'a Ref, &'a Manifest);

impl std::fmt::Display for RefText<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let RefText(at, manifest) = self;
        match at.kind {
            Some(RefKind::Weight(index)) => match manifest.weights.get(index as usize) {
                Some(blob) => write!(f, "@{}", blob.name),
                None => write!(f, "@weight {index}"),
            },
            Some(RefKind::State(index)) => match manifest.states.get(index as usize) {
                Some(state) => write!(f, "${}", state.name),
                None => write!(f, "$state {index}"),
            },
            Some(RefKind::Arena(offset)) => write!(f, "arena+{offset}"),
            Some(RefKind::Scratch(offset)) => write!(f, "scratch+{offset}"),
            Some(RefKind::Input(input)) => f.write_str(match Input::try_from(input) {
                Ok(Input::Tokens) => "tokens",
                Ok(Input::Positions) => "positions",
                Ok(Input::Base) => "base",
                Ok(Input::Types) => "types",
                Ok(Input::Pages) => "pages",
                Err(_) => "unknown input",
            }),
            Some(RefKind::Null(_)) => f.write_str("null"),
            None => f.write_str("unknown"),
        }
    }
}

fn in_range(what: &str, value: u32, max: u32) -> Result<()> {
    if value == 0 || value > max {
        return Err(Error::format(format!("{what} {value} is not in 1..={max}")));
    }
    Ok(())
}

fn check_digest(digest: &[u8]) -> Result<()> {
    if digest.len() != DIGEST_BYTES {
        return Err(Error::format(format!("the digest has {} bytes, not {DIGEST_BYTES}", digest.len())));
    }
    Ok(())
}

/// Device memory, by use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceBytes {
    /// Weights.
    pub weights: u64,
    /// Caches.
    pub states: u64,
    /// Intermediate values, and what blocks hand each other.
    pub arena: u64,
    /// Token ids, positions, tables of pages, and choices of tokens.
    pub inputs: u64,
}

impl DeviceBytes {
    /// All of it.
    pub fn total(self) -> u64 {
        [self.weights, self.states, self.arena, self.inputs].into_iter().fold(0, u64::saturating_add)
    }
}

/// Byte offsets of what a session sends to a GPU, and of the tokens that come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceInputs {
    /// Bytes of each of the inputs of tokens, which come first.
    pub each: u64,
    /// The table of pages.
    pub table: u64,
    /// How tokens are chosen.
    pub choices: u64,
    /// The tokens chosen.
    pub chosen: u64,
    /// Bytes of all.
    pub bytes: u64,
}

/// Lower-case hexadecimal, as `b3sum` prints it.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Manifest {
        let digest = vec![7; DIGEST_BYTES];
        let launch = Launch {
            symbol: "k".into(),
            name: "embed".into(),
            args: vec![
                Ref::weight(0),
                Ref::input(Input::Tokens),
                Ref::arena(64),
                Ref::state(0),
                Ref::scratch(8),
            ],
            items: Items::per_token(3, 2),
            tap: Some(Tap { name: "x".into(), at: Ref::arena(64), width: 4, of_results: false }),
            flags: NO_BARRIER_AFTER,
        };
        Manifest {
            quantc_version: "0.1.0".into(),
            model: "small".into(),
            target: Target { name: "x86-64".into(), arch: "x86_64".into(), features: vec!["sse2".into()] },
            context: 16,
            max_tokens: 4,
            max_rows: 2,
            vocab: 8,
            token_limit: 10,
            arena_bytes: 128,
            scratch_bytes: 64,
            weights: vec![Blob {
                name: "w".into(),
                offset: 4096,
                len: 100,
                digest: digest.clone(),
                streamed: true,
            }],
            states: vec![State { name: "kv".into(), row_bytes: 32 }],
            programs: vec![
                Program { min_t: 1, max_t: 1, launches: vec![launch.clone()] },
                Program { min_t: 2, max_t: 4, launches: vec![launch] },
            ],
            output: Ref::arena(0),
            generation: Some(Generation { bos: Some(1), eos: vec![2, 3] }),
            files: vec![
                File { name: KERNELS_FILE.into(), len: 10, digest: digest.clone() },
                File { name: WEIGHTS_FILE.into(), len: 4196, digest },
            ],
            pipeline: "outline-layers".into(),
            facts: vec![Fact { key: "preset".into(), value: "w4a16".into() }],
            weight_bytes: 100,
            decode_bytes_per_token: 100,
            ..Manifest::empty()
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let manifest = small();
        manifest.validate().expect("the small manifest is valid");
        assert_eq!(Manifest::decode_file(&manifest.encode_file()).expect("it was just written"), manifest);
    }

    #[test]
    fn text_is_readable() {
        let text = small().to_text();
        for line in [
            "target x86-64 (x86_64): sse2",
            "eos [2, 3]",
            "fact preset = w4a16",
            "program for 2..=4 tokens",
            "  embed = k(@w, tokens, arena+64, $kv, scratch+8) items 3 * ceil(t / 2) no-barrier-after tap x arena+64 x 4",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} is missing in\n{text}");
        }
    }

    #[test]
    fn items_are_counted() {
        assert_eq!(Items::fixed(5).count(100, 3), Some(5));
        assert_eq!(Items::per_token(5, 4).count(9, 3), Some(15));
        assert_eq!(Items::per_row(5, 4).count(9, 0), Some(0));
        assert_eq!(Items { n: 1, sym: 0, div: 0 }.count(1, 1), None);
        assert_eq!(Items { n: 1, sym: 9, div: 1 }.count(1, 1), None);
        assert_eq!(Items::per_token(u64::MAX, 1).count(2, 1), None);
    }

    #[test]
    fn each_broken_promise_is_refused() {
        type Break = fn(&mut Manifest);
        let cases: &[(Break, &str)] = &[
            (|m| m.version = 2, "version 2"),
            (|m| m.kind = 7, "kind 7"),
            (|m| m.target.arch = "aarch64".into(), "aarch64"),
            (|m| m.context = 0, "context 0"),
            (|m| m.context = u32::MAX, "context"),
            (|m| m.max_tokens = 5, "no program serves 5 tokens"),
            (|m| m.max_tokens = MAX_TOKENS + 1, "max_tokens"),
            (|m| m.max_rows = 5, "max_rows 5"),
            (|m| m.vocab = 0, "vocab 0"),
            (|m| m.vocab = MAX_VOCAB + 1, "vocab"),
            (|m| m.token_limit = u32::MAX, "token_limit"),
            (|m| m.arena_bytes = 96, "tap \"x\": 64 bytes at 64"),
            (|m| m.arena_bytes = u64::MAX, "arena_bytes"),
            (|m| m.scratch_bytes = u64::MAX, "scratch_bytes"),
            (|m| m.scratch_bytes = 8, "scratch byte 8"),
            (|m| m.output = Ref::arena(68), "output: 64 bytes at 68"),
            (|m| m.output = Ref::arena(u64::MAX - 3), "output"),
            (|m| m.output = Ref::arena(2), "not a multiple of 4"),
            (|m| m.output = Ref::weight(0), "output: the value does not lie in the arena"),
            (|m| m.weights[0].offset = 8, "multiple of 4096"),
            (|m| m.weights[0].len = 101, "101 bytes at 4096"),
            (|m| m.weights[0].len = u64::MAX, "weight 0"),
            (|m| m.weights[0].digest.clear(), "digest has 0 bytes"),
            (|m| m.weights.clear(), "weight 0 is outside the 0"),
            (|m| m.states.clear(), "state 0 is outside the 0"),
            (|m| m.states[0].row_bytes = 0, "row_bytes 0"),
            (|m| m.states[0].row_bytes = MAX_BUFFER_BYTES, "states take more"),
            (|m| m.programs[1].min_t = 3, "next to be covered is 2"),
            (|m| m.programs[1].min_t = 1, "next to be covered is 2"),
            (|m| m.programs[1].max_t = u32::MAX, "max_t"),
            (|m| m.programs.clear(), "no program serves 1"),
            (|m| m.programs[0].launches[0].items.div = 0, "not a sane number"),
            (|m| m.programs[0].launches[0].items.n = u64::MAX, "not a sane number"),
            (|m| m.programs[0].launches[0].flags = 4, "flags 0x4"),
            (
                |m| m.programs[0].launches[0].args[1] = Ref { kind: None },
                "buffer 1: the buffer is of no known kind",
            ),
            (|m| m.programs[0].launches[0].args[1] = RefKind::Input(9).into(), "input 9"),
            (|m| m.programs[0].launches[0].args = vec![Ref::null(); MAX_ARGS + 1], "257 buffers"),
            (|m| m.files[0].name = "../kernels.o".into(), "not a plain file name"),
            (|m| m.files[0].name = "other.o".into(), "kernels.o is not listed"),
            (|m| m.files[1].name = "other.bin".into(), "weights.bin is not listed"),
            (|m| m.files[1].name = KERNELS_FILE.into(), "listed twice"),
            (|m| m.files[1].digest.push(0), "digest has 33 bytes"),
            (|m| m.generation = Some(Generation { bos: Some(10), eos: vec![] }), "token 10"),
            (|m| m.array_inputs = vec![array(Ref::arena(m.arena_bytes), &[4])], "are not within the arena's"),
            (|m| m.array_outputs = vec![array(Ref::arena(2), &[1])], "not a multiple of an element"),
            (|m| m.array_outputs = vec![array(Ref::null(), &[1])], "does not lie in the arena"),
            (|m| m.array_inputs = vec![array(Ref::arena(0), &[1 << 40, 1 << 40])], "absurdly large"),
            (
                |m| m.array_inputs = vec![Array { elem_bytes: 3, ..array(Ref::arena(0), &[1]) }],
                "elements of 3 bytes",
            ),
        ];
        for (index, (change, part)) in cases.iter().enumerate() {
            let mut manifest = small();
            change(&mut manifest);
            let error = manifest.validate().expect_err(part).to_string();
            assert!(error.contains(part), "case {index}: {error:?} does not say {part:?}");
            manifest.to_text();
        }
    }

    fn array(at: Ref, dims: &[u64]) -> Array {
        Array { name: "a".into(), elem: "f32".into(), elem_bytes: 4, dims: dims.to_vec(), at }
    }

    #[test]
    fn foreign_and_future_files_are_told_apart() {
        let bytes = small().encode_file();
        let message = |bytes: &[u8]| Manifest::decode_file(bytes).expect_err("damaged").to_string();
        assert!(message(b"QUANTC").contains("not an engine's manifest"));
        assert!(message(&bytes[..20]).contains("ends before its body"));
        let mut future = small();
        future.version = 9;
        future.quantc_version = "3.1".into();
        assert!(message(&future.encode_file()).contains("format version 9 (written by quantc \"3.1\")"));
    }
}
