//! How fast matmul kernels run on this machine, next to what its instructions and its memory can do at most.
//!
//! ```text
//! cargo run --release -p quantc-codegen --example kernel_speed [TARGET] [N K]
//! ```
//!
//! Without N and K, products of many rows are measured on weights that fit in the second-level cache, and products of few
//! rows also on weights that come from memory, by one thread and by two. `ONLY=g32` measures just the formats whose name
//! has it, `ROWS=256` just that many rows, `TILE=8x2x1` tries another first tile than the one chosen.

#[cfg(feature = "llvm")]
fn main() {
    if let Err(e) = speed::run() {
        eprintln!("error: {e}");
        std::process::exit(1);
    }
}

#[cfg(not(feature = "llvm"))]
fn main() {
    eprintln!("kernels are built with the feature `llvm`");
}

#[cfg(feature = "llvm")]
mod speed {
    use std::collections::BTreeMap;
    use std::sync::Barrier;
    use std::time::Instant;

    use inkwell::context::Context;
    use quantc_codegen::cpu::llvm::{Elem, Unit};
    use quantc_codegen::cpu::matmul::schedule::Inner;
    use quantc_codegen::cpu::matmul::{CpuTile, MatmulSchedule, emit, schedule};
    use quantc_codegen::eexpr::{EExpr, MemTy};
    use quantc_codegen::layout::Layout;
    use quantc_codegen::spec::{
        AFmt, Code, MRange, MatmulSpec, Rows, ScaleTy, WFmt, Zero, bf16_row_stride, i8_row_stride,
    };
    use quantc_codegen::targets;
    use quantc_ir::diag::{Diag, Result};
    use quantc_ir::target::{Dot, TargetDesc};
    use quantc_runtime::object::Object;

    /// Memory on huge pages, as an engine's weights are.
    struct Buffer {
        bytes: Vec<u8>,
        skip: usize,
    }

    const HUGE: usize = 2 << 20;

    impl Buffer {
        fn new(len: usize, mut fill: impl FnMut(usize) -> u8) -> Buffer {
            unsafe extern "C" {
                fn madvise(address: *mut u8, len: usize, advice: i32) -> i32;
            }
            let mut bytes: Vec<u8> = Vec::with_capacity(len + HUGE);
            let skip = bytes.as_ptr().align_offset(if len < HUGE { 4096 } else { HUGE });
            if len >= HUGE {
                // SAFETY: the range lies in an allocation that nothing uses yet; the advice does not change contents.
                unsafe { madvise(bytes.as_mut_ptr().wrapping_add(skip), len, 14) };
            }
            bytes.resize(skip + len, 0);
            for (i, b) in bytes[skip..skip + len].iter_mut().enumerate() {
                *b = fill(i);
            }
            Buffer { bytes, skip }
        }

        fn ptr(&mut self) -> *mut u8 {
            self.bytes[self.skip..].as_mut_ptr()
        }
    }

    /// Seconds of the fastest of some runs of `f`.
    fn best(mut f: impl FnMut()) -> f64 {
        f();
        let mut best = f64::MAX;
        let start = Instant::now();
        while start.elapsed().as_secs_f64() < 0.6 {
            let t = Instant::now();
            f();
            best = best.min(t.elapsed().as_secs_f64());
        }
        best
    }

    /// Seconds of the fastest of some runs of `f` by `threads` at once, each from its own start to its own end.
    fn best_of_threads(threads: usize, f: impl Fn(usize) + Sync) -> f64 {
        const RUNS: usize = 12;
        let barrier = Barrier::new(threads);
        let times: Vec<Vec<f64>> = std::thread::scope(|scope| {
            let one = |thread: usize| {
                let (barrier, f) = (&barrier, &f);
                scope.spawn(move || {
                    let mut times = vec![];
                    for _ in 0..RUNS {
                        barrier.wait();
                        let start = Instant::now();
                        f(thread);
                        times.push(start.elapsed().as_secs_f64());
                    }
                    times
                })
            };
            let handles: Vec<_> = (0..threads).map(one).collect();
            handles.into_iter().map(|h| h.join().expect("a thread measures")).collect()
        });
        let slowest = |run: usize| times.iter().map(|t| t[run]).fold(0.0, f64::max);
        (0..RUNS).map(slowest).fold(f64::MAX, f64::min)
    }

    fn load(unit: Unit<'_>) -> Result<(Object, usize)> {
        let bytes = unit.finish()?;
        Ok((Object::load(&bytes).map_err(|e| Diag::bug(e.to_string()))?, bytes.len()))
    }

    /// What does the products: its name, and GMAC/s of independent ones on registers.
    fn peak(target: &'static TargetDesc, inner: Inner) -> Result<Option<(&'static str, f64)>> {
        let bits = target.cpu.vector_bits;
        let lanes = bits / 32;
        let (name, intrinsic, products) = match (inner, bits) {
            (Inner::Float, _) if target.cpu.fma => ("f32 fma", "llvm.fma", 1.0),
            (Inner::Bf16, _) => ("vdpbf16ps", "llvm.x86.avx512bf16.dpbf16ps.512", 2.0),
            (Inner::Int(Dot::Vnni), 512) => ("vpdpbusd", "llvm.x86.avx512.vpdpbusd.512", 4.0),
            (Inner::Int(Dot::Vnni), _) => ("vpdpbusd", "llvm.x86.avx512.vpdpbusd.256", 4.0),
            (Inner::Int(Dot::Maddubs), 256) => ("vpmaddubsw", "llvm.x86.avx2.pmadd.ub.sw", 4.0),
            _ => return Ok(None),
        };
        let cx = Context::create();
        let unit = Unit::new(&cx, target, "peak")?;
        // As many chains as hide the latency and fit in the registers beside two operands.
        let chains = if target.cpu.vector_regs == 32 { 20 } else { 12 };
        unit.kernel("peak", |b| {
            let vector = |at: i64| b.offset(b.arg(0), at * i64::from(bits / 8));
            let elem = if inner == Inner::Float || inner == Inner::Bf16 { Elem::F32 } else { Elem::I32 };
            let operand = |at| match inner {
                Inner::Float => b.load(vector(at), Elem::F32, lanes),
                Inner::Bf16 => b.bitcast(b.load(vector(at), Elem::I32, lanes), Elem::Bf16, lanes * 2),
                Inner::Int(Dot::Vnni) => b.load(vector(at), Elem::I32, lanes),
                Inner::Int(_) => b.load(vector(at), Elem::I8, lanes * 4),
            };
            let (w, a) = (operand(0), operand(1));
            let zeros = vec![b.bitcast(b.i32(lanes, 0), elem, lanes); chains];
            let sums = b.for_range(b.begin(), b.end(), 1, &zeros, |_, sums| {
                let product = |&sum| match inner {
                    Inner::Float => b.fma(w, a, sum),
                    // The sum takes the place of an operand, so that the products depend on each other.
                    Inner::Int(Dot::Maddubs) => {
                        let sum = b.bitcast(sum, Elem::I8, lanes * 4);
                        b.bitcast(b.intrinsic(intrinsic, &[], &[w, sum]), Elem::I32, lanes)
                    }
                    _ => b.intrinsic(intrinsic, &[], &[sum, w, a]),
                };
                sums.iter().map(product).collect()
            });
            for (i, sum) in sums.into_iter().enumerate() {
                b.store(vector(i as i64), sum, elem);
            }
            Ok(())
        })?;
        let (object, _) = load(unit)?;
        let kernel = object.symbol("peak").ok_or_else(|| Diag::bug("the kernel is missing"))?;
        let mut out = Buffer::new(chains * 64, |_| 0);
        let args = [out.ptr()];
        let turns = 1_000_000;
        // SAFETY: the only buffer has room for all sums.
        let seconds = best(|| unsafe { kernel(args.as_ptr(), [0i64, 0].as_ptr(), 0, turns) });
        Ok(Some((name, turns as f64 * chains as f64 * f64::from(lanes) * products / seconds / 1e9)))
    }

    /// A kernel that reads lines of 4 KiB and does nothing else.
    fn stream(target: &'static TargetDesc) -> Result<Object> {
        const LINE: i64 = 4096;
        let cx = Context::create();
        let unit = Unit::new(&cx, target, "stream")?;
        let lanes = target.cpu.vector_bits / 32;
        unit.kernel("stream", |b| {
            let (from, to) = (b.arg(0), b.arg(1));
            let zero = vec![b.i32(lanes, 0); 8];
            let sums = b.for_range(b.begin(), b.end(), 1, &zero, |line, sums| {
                let line = b.row(from, line, LINE);
                let step = i64::from(lanes) * 4 * 8;
                b.for_const(0, LINE, step, sums, |at, sums| {
                    let vector = |i: usize| b.at(b.offset(line, i as i64 * i64::from(lanes) * 4), at);
                    sums.iter()
                        .enumerate()
                        .map(|(i, &s)| b.xor(s, b.load(vector(i), Elem::I32, lanes)))
                        .collect()
                })
            });
            for sum in sums {
                b.store(to, sum, Elem::I32);
            }
            Ok(())
        })?;
        Ok(load(unit)?.0)
    }

    struct Format {
        name: &'static str,
        code: Code,
        /// Columns of a scale; 0 for a row.
        group: u32,
        zero: Zero,
        a: AFmt,
    }

    const fn format(name: &'static str, code: Code, group: u32, zero: u8, a: AFmt) -> Format {
        Format { name, code, group, zero: Zero::Sym(zero), a }
    }

    const FORMATS: [Format; 16] = [
        format("u4 g128 x i8", Code::U4, 128, 8, AFmt::I8Token),
        format("u4 g32 x i8", Code::U4, 32, 8, AFmt::I8Token),
        Format { zero: Zero::Asym, ..format("u4 g128 asym x i8", Code::U4, 128, 8, AFmt::I8Token) },
        format("u8 row x i8", Code::U8, 0, 128, AFmt::I8Token),
        format("u4 g128 x bf16", Code::U4, 128, 8, AFmt::Bf16),
        format("u4 g32 x bf16", Code::U4, 32, 8, AFmt::Bf16),
        Format { zero: Zero::Asym, ..format("u4 g128 asym x bf16", Code::U4, 128, 8, AFmt::Bf16) },
        format("u8 row x bf16", Code::U8, 0, 128, AFmt::Bf16),
        format("e4m3 row x bf16", Code::E4m3, 0, 0, AFmt::Bf16),
        format("e5m2 row x bf16", Code::E5m2, 0, 0, AFmt::Bf16),
        format("bf16 x bf16", Code::Bf16, 0, 0, AFmt::Bf16),
        format("u4 g128 x f32", Code::U4, 128, 8, AFmt::F32),
        format("u8 row x f32", Code::U8, 0, 128, AFmt::F32),
        format("f16 x f32", Code::F16, 0, 0, AFmt::F32),
        format("bf16 x f32", Code::Bf16, 0, 0, AFmt::F32),
        format("f32 x f32", Code::F32, 0, 0, AFmt::F32),
    ];

    impl Format {
        fn spec(&self, n: u32, k: u32, m: u32) -> MatmulSpec {
            let class = match m {
                1 => MRange { min: 1, max: 1 },
                2..=4 => MRange { min: 2, max: 4 },
                5..=16 => MRange { min: 5, max: 16 },
                _ => MRange { min: 17, max: 512 },
            };
            let group = if self.group == 0 { k } else { self.group };
            let plain = self.group == 0 && self.code.bits() >= 16;
            let scale = if plain { ScaleTy::None } else { ScaleTy::Bf16 };
            let w = WFmt { code: self.code, group, zero: self.zero, scale };
            let epilogue = EExpr::store_acc(MemTy::F32, n);
            MatmulSpec { n, k, m: class, rows: Rows::T, w, a: self.a, epilogue }
        }
    }

    /// A kernel with its operands.
    struct Ready {
        object: Object,
        plan: MatmulSchedule,
        spec: MatmulSpec,
        built_ms: f64,
        code_bytes: usize,
        buffers: Vec<Buffer>,
        m: u32,
    }

    impl Ready {
        fn new(target: &'static TargetDesc, spec: MatmulSpec, m: u32) -> Result<Ready> {
            let mut plan = schedule(&spec, &target.cpu);
            if let Ok(tile) = std::env::var("TILE") {
                let parts: Vec<u32> = tile.split('x').filter_map(|p| p.parse().ok()).collect();
                if let &[mr, nr, ku] = parts.as_slice() {
                    plan.tiles[0] = CpuTile { mr, nr, ku };
                }
            }
            let start = Instant::now();
            let cx = Context::create();
            let unit = Unit::new(&cx, target, "speed")?;
            emit(&unit, "kernel", &spec, &plan)?;
            let (object, code_bytes) = load(unit)?;
            let built_ms = start.elapsed().as_secs_f64() * 1e3;
            let (layout, rows) = (Layout::of(&spec), m as usize);
            // Bytes that are small numbers in every format.
            let number = |i: usize| ((i * 37) >> 3) as u8 & 0x3f;
            let acts = match spec.a {
                AFmt::F32 => rows * spec.k as usize * 4,
                AFmt::Bf16 => rows * bf16_row_stride(spec.k) as usize * 2,
                AFmt::I8Token => rows * i8_row_stride(spec.k) as usize,
            };
            let mut buffers = vec![Buffer::new(acts, number)];
            if spec.a == AFmt::I8Token {
                buffers.push(Buffer::new(rows * 4, |_| 0x3c));
                buffers.push(Buffer::new(rows * spec.groups() as usize * 4, |_| 0));
            }
            buffers.push(Buffer::new(layout.bytes() as usize, number));
            buffers.push(Buffer::new(rows * spec.n as usize * 4, |_| 0xff));
            Ok(Ready { object, plan, spec, built_ms, code_bytes, buffers, m })
        }

        /// Seconds of one product by `threads`.
        fn seconds(&mut self, threads: usize) -> Result<f64> {
            let kernel = self.object.symbol("kernel").ok_or_else(|| Diag::bug("the kernel is missing"))?;
            let args: Vec<usize> = self.buffers.iter_mut().map(|b| b.ptr() as usize).collect();
            let dims = [i64::from(self.m); 2];
            let items = i64::from(self.spec.items());
            let part = |thread: usize| {
                let at = |i: usize| items * i as i64 / threads as i64;
                // SAFETY: the arguments are the ones that the spec documents, with the sizes it demands; threads write
                // different columns.
                unsafe { kernel(args.as_ptr().cast(), dims.as_ptr(), at(thread), at(thread + 1)) };
            };
            Ok(if threads == 1 { best(|| part(0)) } else { best_of_threads(threads, part) })
        }

        fn bytes(&self) -> f64 {
            Layout::of(&self.spec).bytes() as f64
        }

        fn macs(&self) -> f64 {
            f64::from(self.m) * f64::from(self.spec.n) * f64::from(self.spec.k)
        }
    }

    pub fn run() -> Result<()> {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let target = targets::lookup(args.first().map_or("host", String::as_str))?;
        let size = |i: usize| args.get(i).and_then(|s| s.parse::<u32>().ok());
        let (n, k) = (size(1).unwrap_or(1024), size(2).unwrap_or(4096));
        let only = std::env::var("ONLY").unwrap_or_default();
        let rows = std::env::var("ROWS").ok().and_then(|r| r.parse::<u32>().ok());
        let formats: Vec<&Format> = FORMATS.iter().filter(|f| f.name.contains(&only)).collect();
        println!("{}: n={n} k={k}, one thread", target.name);
        let mut peaks = BTreeMap::new();
        for &format in &formats {
            for m in [1, 2, 4, 8, 16, 256].into_iter().filter(|m| rows.is_none_or(|r| r == *m)) {
                let mut ready = Ready::new(target, format.spec(n, k, m), m)?;
                let inner = ready.plan.inner;
                let peak = match peaks.entry(format!("{inner:?}")) {
                    std::collections::btree_map::Entry::Occupied(known) => *known.get(),
                    std::collections::btree_map::Entry::Vacant(new) => *new.insert(peak(target, inner)?),
                };
                let seconds = ready.seconds(1)?;
                let gmac = ready.macs() / seconds / 1e9;
                let share = peak.map_or(String::new(), |(name, most)| {
                    format!("{:5.1}% of {name} {most:.1}", gmac / most * 100.0)
                });
                println!(
                    "{:20} m={m:<4} {gmac:7.1} GMAC/s {share:26} {:6.1} GB/s  {:5.1} ms, {} B",
                    format.name,
                    ready.bytes() / seconds / 1e9,
                    ready.built_ms,
                    ready.code_bytes
                );
                println!("{:20} {}", "", ready.plan);
            }
        }
        if size(1).is_none() {
            memory(target, &formats, rows)?;
        }
        Ok(())
    }

    /// Products of few rows with weights that no cache holds.
    fn memory(target: &'static TargetDesc, formats: &[&Format], rows: Option<u32>) -> Result<()> {
        const BYTES: u64 = 400 << 20;
        println!("weights of {} MiB from memory", BYTES >> 20);
        let object = stream(target)?;
        let read = object.symbol("stream").ok_or_else(|| Diag::bug("the kernel is missing"))?;
        let mut from = Buffer::new(BYTES as usize, |i| i as u8);
        let from = from.ptr() as usize;
        for threads in [1, 2] {
            let stream = || {
                let lines = (BYTES / 4096) as i64;
                let part = |thread: usize| {
                    let mut to = [0u8; 64];
                    let args = [from, to.as_mut_ptr() as usize];
                    let at = |i: usize| lines * i as i64 / threads as i64;
                    // SAFETY: the lines are there, and a vector fits where the result goes.
                    unsafe { read(args.as_ptr().cast(), [0i64; 2].as_ptr(), at(thread), at(thread + 1)) };
                };
                BYTES as f64 / best_of_threads(threads, part) / 1e9
            };
            for &format in formats {
                for m in [1, 2, 4, 8].into_iter().filter(|m| rows.is_none_or(|r| r == *m)) {
                    let k = 4096;
                    let panel = Layout::of(&format.spec(64, k, m)).panel_bytes();
                    let n = (BYTES / panel) as u32 * 64;
                    let mut ready = Ready::new(target, format.spec(n, k, m), m)?;
                    let before = stream();
                    let speed = ready.bytes() / ready.seconds(threads)? / 1e9;
                    let most = before.max(stream());
                    println!(
                        "{:20} m={m:<4} threads={threads} {speed:6.1} GB/s {:5.1}% of {most:.1} GB/s",
                        format.name,
                        speed / most * 100.0
                    );
                }
            }
        }
        Ok(())
    }
}
