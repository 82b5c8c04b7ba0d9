//! A tiny engine for tests, and a writer of small object files.
//!
//! The engine's kernels are Rust functions of the test itself: its object holds, for each, a jump to the function's
//! address. So tests need neither a compiler nor an assembler, and such an engine works only in the process that wrote it.
//!
//! The model: `x[i] = emb[token]`; the state keeps `x`; `y[i] = sum over p <= i of x[p] / (1 + i - p)`;
//! `result[i][v] = y[i] . head[v] + 0.01 * position`.
#![expect(dead_code, reason = "each test program uses its own part of this module")]

use std::path::Path;

use quantc_runtime::format::{
    BLOB_ALIGN, Blob, File, Generation, Input, Items, KERNELS_FILE, Kind, Launch, MANIFEST_FILE, Manifest,
    NO_BARRIER_AFTER, Program, Ref, State, Tap, Target, WEIGHTS_FILE,
};
use quantc_runtime::{Engine, KernelFn, OpenOptions};

pub const HIDDEN: usize = 8;
pub const VOCAB: usize = 24;
pub const TOKENS: u32 = 20;
pub const CONTEXT: u32 = 64;
pub const MAX_TOKENS: u32 = 16;
pub const MAX_ROWS: u32 = 4;

/// A section of an [`Elf`].
#[derive(Clone)]
pub struct Section {
    pub name: &'static str,
    pub ty: u32,
    pub flags: u64,
    pub align: u64,
    pub data: Vec<u8>,
    /// Size in the header; differs from the data's for zero-filled or lying sections.
    pub size: u64,
    /// Offset, type, symbol, addend.
    pub relocations: Vec<(u64, u32, u32, i64)>,
}

/// A symbol of an [`Elf`].
#[derive(Clone)]
pub struct Symbol {
    pub name: &'static str,
    /// `bind << 4 | type`.
    pub info: u8,
    pub section: u16,
    pub value: u64,
}

/// A relocatable object.
#[derive(Clone, Default)]
pub struct Elf {
    pub sections: Vec<Section>,
    pub symbols: Vec<Symbol>,
}

pub const ALLOC: u64 = 2;
pub const WRITE: u64 = 1;
pub const EXEC: u64 = 4;
pub const PROGBITS: u32 = 1;
pub const NOBITS: u32 = 8;
pub const GLOBAL_FUNC: u8 = 0x12;
pub const GLOBAL_NOTYPE: u8 = 0x10;

impl Section {
    pub fn new(name: &'static str, flags: u64, data: Vec<u8>) -> Section {
        let size = data.len() as u64;
        Section { name, ty: PROGBITS, flags: ALLOC | flags, align: 16, data, size, relocations: Vec::new() }
    }
}

impl Elf {
    /// The bytes of the object file. Section `i` here has index `i + 1` in the file.
    pub fn build(&self) -> Vec<u8> {
        let mut file = vec![0u8; 64];
        let mut headers: Vec<[u8; 64]> = vec![[0; 64]];
        let mut names = vec![0u8];
        let symtab = self.sections.len() as u32 + 1;
        let mut strings = vec![0u8];
        let mut table = vec![0u8; 24];
        for symbol in &self.symbols {
            let name = strings.len() as u32;
            strings.extend_from_slice(symbol.name.as_bytes());
            strings.push(0);
            table.extend_from_slice(&name.to_le_bytes());
            table.extend_from_slice(&[symbol.info, 0]);
            table.extend_from_slice(&symbol.section.to_le_bytes());
            table.extend_from_slice(&symbol.value.to_le_bytes());
            table.extend_from_slice(&0u64.to_le_bytes());
        }
        let mut add =
            |name: &str, ty: u32, flags: u64, data: &[u8], size: u64, link: u32, info: u32, align, entry| {
                file.resize(file.len().next_multiple_of(16), 0);
                let mut header = [0u8; 64];
                header[0..4].copy_from_slice(&(names.len() as u32).to_le_bytes());
                header[4..8].copy_from_slice(&ty.to_le_bytes());
                let words: [(usize, u64); 5] =
                    [(8, flags), (24, file.len() as u64), (32, size), (48, align), (56, entry)];
                for (at, word) in words {
                    header[at..at + 8].copy_from_slice(&word.to_le_bytes());
                }
                header[40..44].copy_from_slice(&link.to_le_bytes());
                header[44..48].copy_from_slice(&info.to_le_bytes());
                headers.push(header);
                names.extend_from_slice(name.as_bytes());
                names.push(0);
                file.extend_from_slice(data);
            };
        for s in &self.sections {
            add(s.name, s.ty, s.flags, &s.data, s.size, 0, 0, s.align, 0);
        }
        add(".symtab", 2, 0, &table, table.len() as u64, symtab + 1, 1, 8, 24);
        add(".strtab", 3, 0, &strings, strings.len() as u64, 0, 0, 1, 0);
        for (index, s) in self.sections.iter().enumerate() {
            if s.relocations.is_empty() {
                continue;
            }
            let mut relas = Vec::new();
            for &(offset, ty, symbol, addend) in &s.relocations {
                relas.extend_from_slice(&offset.to_le_bytes());
                relas.extend_from_slice(&((u64::from(symbol) << 32) | u64::from(ty)).to_le_bytes());
                relas.extend_from_slice(&addend.to_le_bytes());
            }
            add(".rela", 4, 0x40, &relas, relas.len() as u64, symtab, index as u32 + 1, 8, 24);
        }
        let (names_at, names_index) = (file.len() as u64, headers.len() as u16);
        let mut header = [0u8; 64];
        header[4] = 3;
        header[24..32].copy_from_slice(&names_at.to_le_bytes());
        header[32..40].copy_from_slice(&(names.len() as u64).to_le_bytes());
        headers.push(header);
        file.extend_from_slice(&names);
        file.resize(file.len().next_multiple_of(16), 0);
        let table_at = file.len() as u64;
        headers.iter().for_each(|header| file.extend_from_slice(header));

        file[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file[16..20].copy_from_slice(&[1, 0, 62, 0]);
        file[20] = 1;
        file[40..48].copy_from_slice(&table_at.to_le_bytes());
        file[52] = 64;
        file[58] = 64;
        file[60..62].copy_from_slice(&(headers.len() as u16).to_le_bytes());
        file[62..64].copy_from_slice(&names_index.to_le_bytes());
        file
    }

    /// An object whose functions jump to the given ones.
    pub fn of_functions(functions: &[(&'static str, KernelFn)]) -> Elf {
        let mut elf = Elf::default();
        let mut code = Vec::new();
        for &(name, function) in functions {
            elf.symbols.push(Symbol { name, info: GLOBAL_FUNC, section: 1, value: code.len() as u64 });
            // movabs $function, %rax; jmp *%rax
            code.extend_from_slice(&[0x48, 0xb8]);
            code.extend_from_slice(&(function as usize as u64).to_le_bytes());
            code.extend_from_slice(&[0xff, 0xe0]);
            code.resize(code.len().next_multiple_of(16), 0xcc);
        }
        elf.sections.push(Section::new(".text", EXEC, code));
        elf
    }
}

/// The kernels' view of their arguments.
struct Call {
    args: *const *mut u8,
    t: usize,
    r: usize,
}

impl Call {
    /// # Safety
    /// The pointers are those a session passes to kernels.
    unsafe fn new(args: *const *mut u8, dims: *const i64) -> Call {
        // SAFETY: `dims` holds two numbers.
        unsafe { Call { args, t: *dims as usize, r: *dims.add(1) as usize } }
    }

    /// # Safety
    /// Buffer `arg` has more than `index` values of type `T`.
    unsafe fn get<T: Copy>(&self, arg: usize, index: usize) -> T {
        // SAFETY: as the caller promises.
        unsafe { (*self.args.add(arg)).cast::<T>().add(index).read() }
    }

    /// # Safety
    /// Buffer `arg` has more than `index` f32, and no other worker uses this one.
    unsafe fn put(&self, arg: usize, index: usize, value: f32) {
        // SAFETY: as the caller promises.
        unsafe { (*self.args.add(arg)).cast::<f32>().add(index).write(value) }
    }
}

/// `[emb, tokens, x]`, an item for each token.
unsafe extern "C" fn embed(args: *const *mut u8, dims: *const i64, begin: i64, end: i64) {
    // SAFETY: `toy_manifest` gives these buffers with these sizes.
    unsafe {
        let call = Call::new(args, dims);
        for i in begin as usize..end as usize {
            let token = call.get::<i32>(1, i) as usize;
            for j in 0..HIDDEN {
                call.put(2, i * HIDDEN + j, call.get(0, token * HIDDEN + j));
            }
        }
    }
}

/// `[positions, z]`, an item for each token.
unsafe extern "C" fn clock(args: *const *mut u8, dims: *const i64, begin: i64, end: i64) {
    // SAFETY: as in `embed`.
    unsafe {
        let call = Call::new(args, dims);
        for i in begin as usize..end as usize {
            call.put(1, i, call.get::<i32>(0, i) as f32 * 0.01);
        }
    }
}

/// `[x, base, positions, kv]`, an item for each token.
unsafe extern "C" fn store(args: *const *mut u8, dims: *const i64, begin: i64, end: i64) {
    // SAFETY: as in `embed`.
    unsafe {
        let call = Call::new(args, dims);
        for i in begin as usize..end as usize {
            let row = (call.get::<i32>(1, i) + call.get::<i32>(2, i)) as usize;
            for j in 0..HIDDEN {
                call.put(3, row * HIDDEN + j, call.get(0, i * HIDDEN + j));
            }
        }
    }
}

/// `[kv, base, positions, y, scratch]`, two items for each token: its halves.
unsafe extern "C" fn mix(args: *const *mut u8, dims: *const i64, begin: i64, end: i64) {
    // SAFETY: as in `embed`; the scratch has `HIDDEN` f32.
    unsafe {
        let call = Call::new(args, dims);
        for item in begin as usize..end as usize {
            let (i, columns) = (item / 2, item % 2 * (HIDDEN / 2)..(item % 2 + 1) * (HIDDEN / 2));
            let (base, position) = (call.get::<i32>(1, i) as usize, call.get::<i32>(2, i) as usize);
            columns.clone().for_each(|j| call.put(4, j, 0.0));
            for p in 0..=position {
                for j in columns.clone() {
                    let x: f32 = call.get(0, (base + p) * HIDDEN + j);
                    call.put(4, j, call.get::<f32>(4, j) + x / (1 + position - p) as f32);
                }
            }
            columns.for_each(|j| call.put(3, i * HIDDEN + j, call.get(4, j)));
        }
    }
}

/// `[y, head, z, out, null]`, an item for each four columns of the result.
unsafe extern "C" fn head(args: *const *mut u8, dims: *const i64, begin: i64, end: i64) {
    // SAFETY: as in `embed`.
    unsafe {
        let call = Call::new(args, dims);
        assert!((*call.args.add(4)).is_null(), "an absent buffer is null");
        for row in 0..call.r {
            let i = call.t - call.r + row;
            for v in begin as usize * 4..end as usize * 4 {
                let mut sum: f32 = call.get(2, i);
                for j in 0..HIDDEN {
                    sum += call.get::<f32>(0, i * HIDDEN + j) * call.get::<f32>(1, v * HIDDEN + j);
                }
                call.put(3, row * VOCAB + v, sum);
            }
        }
    }
}

pub fn toy_object() -> Elf {
    Elf::of_functions(&[
        ("toy_embed", embed),
        ("toy_clock", clock),
        ("toy_store", store),
        ("toy_mix", mix),
        ("toy_head", head),
    ])
}

pub fn toy_weights() -> (Vec<f32>, Vec<f32>) {
    let numbers = |n: usize, seed: f32| (0..n).map(|i| ((i as f32 + seed) * 0.7311).sin()).collect();
    (numbers(TOKENS as usize * HIDDEN, 1.0), numbers(VOCAB * HIDDEN, 77.0))
}

/// What the model computes for the last of `tokens`.
pub fn toy_reference(tokens: &[u32]) -> Vec<f32> {
    let (emb, head) = toy_weights();
    let last = tokens.len() - 1;
    let mut y = [0f32; HIDDEN];
    for (p, &token) in tokens.iter().enumerate() {
        for (j, y) in y.iter_mut().enumerate() {
            *y += emb[token as usize * HIDDEN + j] / (1 + last - p) as f32;
        }
    }
    let logit = |v: usize| (0..HIDDEN).fold(last as f32 * 0.01, |sum, j| sum + y[j] * head[v * HIDDEN + j]);
    (0..VOCAB).map(logit).collect()
}

/// The toy's manifest, without files and digests.
pub fn toy_manifest(kind: Kind) -> Manifest {
    let launch = |symbol: &str, args: Vec<Ref>, items: Items| Launch {
        symbol: format!("toy_{symbol}"),
        name: symbol.into(),
        args,
        items,
        ..Launch::default()
    };
    let t = u64::from(MAX_TOKENS);
    let row = HIDDEN as u64 * 4;
    let (x, y, z, out) = (0, t * row, 2 * t * row, 2 * t * row + 64);
    let input = Ref::input;
    let max_rows = if kind == Kind::Encoder { MAX_TOKENS } else { MAX_ROWS };
    let mut launches = vec![
        launch("clock", vec![input(Input::Positions), Ref::arena(z)], Items::per_token(1, 1)),
        launch("embed", vec![Ref::weight(0), input(Input::Tokens), Ref::arena(x)], Items::per_token(1, 1)),
        launch(
            "store",
            vec![Ref::arena(x), input(Input::Base), input(Input::Positions), Ref::state(0)],
            Items::per_token(1, 1),
        ),
        launch(
            "mix",
            vec![Ref::state(0), input(Input::Base), input(Input::Positions), Ref::arena(y), Ref::scratch(64)],
            Items::per_token(2, 1),
        ),
        launch(
            "head",
            vec![Ref::arena(y), Ref::weight(1), Ref::arena(z), Ref::arena(out), Ref::null()],
            Items::fixed(VOCAB as u64 / 4),
        ),
    ];
    launches[0].flags = NO_BARRIER_AFTER;
    launches[1].tap =
        Some(Tap { name: "x".into(), at: Ref::arena(x), width: HIDDEN as u32, of_results: false });
    launches[3].tap =
        Some(Tap { name: "y".into(), at: Ref::arena(y), width: HIDDEN as u32, of_results: false });
    Manifest {
        quantc_version: "test".into(),
        model: "toy".into(),
        kind: kind as i32,
        target: Target { name: "any".into(), arch: "x86_64".into(), features: vec!["sse2".into()] },
        context: CONTEXT,
        max_tokens: MAX_TOKENS,
        max_rows,
        vocab: VOCAB as u32,
        token_limit: TOKENS,
        arena_bytes: out + u64::from(max_rows) * VOCAB as u64 * 4,
        scratch_bytes: 128,
        states: vec![State { name: "kv".into(), row_bytes: row }],
        programs: vec![
            Program { min_t: 1, max_t: 1, launches: launches.clone() },
            Program { min_t: 2, max_t: MAX_TOKENS, launches },
        ],
        output: Ref::arena(out),
        generation: Some(Generation { bos: None, eos: vec![3] }),
        ..Manifest::empty()
    }
}

/// Writes an engine from a manifest without files, and returns the whole manifest.
pub fn write_engine(folder: &Path, mut manifest: Manifest, object: &[u8]) -> Manifest {
    let (emb, head) = toy_weights();
    let mut weights: Vec<u8> = Vec::new();
    for (name, values) in [("emb", emb), ("head", head)] {
        weights.resize(weights.len().next_multiple_of(BLOB_ALIGN as usize), 0);
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let digest = blake3::hash(&bytes).as_bytes().to_vec();
        let (offset, len) = (weights.len() as u64, bytes.len() as u64);
        manifest.weights.push(Blob { name: name.into(), offset, len, digest, streamed: name == "head" });
        weights.extend_from_slice(&bytes);
    }
    for (name, bytes) in
        [(WEIGHTS_FILE, weights.as_slice()), (KERNELS_FILE, object), ("pipeline.txt", b"none\n".as_slice())]
    {
        std::fs::write(folder.join(name), bytes).expect("the file is written");
        let digest = blake3::hash(bytes).as_bytes().to_vec();
        manifest.files.push(File { name: name.into(), len: bytes.len() as u64, digest });
    }
    std::fs::write(folder.join(MANIFEST_FILE), manifest.encode_file()).expect("the manifest is written");
    manifest
}

/// A toy engine in a folder of its own, which the caller keeps.
pub fn toy(kind: Kind) -> (tempfile::TempDir, Engine) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_engine(folder.path(), toy_manifest(kind), &toy_object().build());
    let engine = Engine::open(folder.path(), &OpenOptions::default()).expect("the toy engine opens");
    (folder, engine)
}

/// A small generator for damage and tokens.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 11) as usize % n
    }

    pub fn tokens(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(TOKENS as usize) as u32).collect()
    }

    /// Changes, inserts or removes a few bytes.
    pub fn damage(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut damaged = bytes.to_vec();
        for _ in 0..1 + self.below(3) {
            if damaged.is_empty() {
                break;
            }
            let at = self.below(damaged.len());
            match self.below(8) {
                0 => damaged.truncate(at),
                1 => damaged.insert(at, self.next() as u8),
                2 => {
                    damaged.remove(at);
                }
                3 => damaged[at] = 0xff,
                4 => damaged[at] ^= 1 << self.below(8),
                _ => damaged[at] = self.next() as u8,
            }
        }
        damaged
    }
}
