//! How fast matmul kernels run on this machine, next to what its integer dot product can do at most.
//!
//! ```text
//! cargo run --release -p quantc-codegen --example kernel_speed [TARGET] [N K]
//! ```

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
    use std::time::Instant;

    use inkwell::context::Context;
    use quantc_codegen::cpu::llvm::{Elem, Unit};
    use quantc_codegen::cpu::matmul::{CpuTile, emit, schedule};
    use quantc_codegen::eexpr::{EExpr, MemTy};
    use quantc_codegen::layout::Layout;
    use quantc_codegen::spec::{AFmt, Code, MRange, MatmulSpec, Rows, ScaleTy, WFmt, Zero, i8_row_stride};
    use quantc_codegen::targets;
    use quantc_ir::diag::{Diag, Result};
    use quantc_ir::target::Dot;
    use quantc_runtime::object::Object;

    /// Memory on whole cache lines, as an engine's weights are.
    struct Buffer {
        bytes: Vec<u8>,
        skip: usize,
    }

    impl Buffer {
        fn new(len: usize, mut fill: impl FnMut(usize) -> u8) -> Buffer {
            let mut bytes = vec![0u8; len + 4096];
            let skip = bytes.as_ptr().align_offset(4096);
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

    /// GMAC/s of independent integer dots on registers, when the target has them.
    fn peak(target: &'static quantc_ir::target::TargetDesc) -> Result<Option<f64>> {
        if !target.cpu.dots.contains(&Dot::Vnni) {
            return Ok(None);
        }
        let cx = Context::create();
        let unit = Unit::new(&cx, target, "peak")?;
        const CHAINS: usize = 16;
        unit.kernel("peak", |b| {
            let out = b.arg(0);
            let w = b.load(out, Elem::I32, 16);
            let a = b.load(b.offset(out, 64), Elem::I32, 16);
            let zero = vec![b.i32(16, 0); CHAINS];
            let sums = b.for_range(b.begin(), b.end(), 1, &zero, |_, sums| {
                sums.iter().map(|&s| b.intrinsic("llvm.x86.avx512.vpdpbusd.512", &[], &[s, w, a])).collect()
            });
            for (i, sum) in sums.into_iter().enumerate() {
                b.store(b.offset(out, i as i64 * 64), sum, Elem::I32);
            }
            Ok(())
        })?;
        let object = Object::load(&unit.finish()?).map_err(|e| Diag::bug(e.to_string()))?;
        let kernel = object.symbol("peak").ok_or_else(|| Diag::bug("the kernel is missing"))?;
        let mut out = Buffer::new(CHAINS * 64, |i| i as u8);
        let args = [out.ptr()];
        let turns = 1_000_000;
        // SAFETY: the only buffer has room for the sixteen sums.
        let seconds = best(|| unsafe { kernel(args.as_ptr(), [0i64, 0].as_ptr(), 0, turns) });
        Ok(Some(turns as f64 * CHAINS as f64 * 64.0 / seconds / 1e9))
    }

    pub fn run() -> Result<()> {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let target = targets::lookup(args.first().map_or("host", String::as_str))?;
        let size = |i: usize, default: u32| args.get(i).and_then(|s| s.parse().ok()).unwrap_or(default);
        let (n, k) = (size(1, 1024), size(2, 4096));
        println!("{}: n={n} k={k}, one thread", target.name);
        let peak = peak(target)?;
        if let Some(peak) = peak {
            println!("peak of vpdpbusd: {peak:.1} GMAC/s");
        }
        let formats = [
            ("u4 g128 x i8", Code::U4, 128, Zero::Sym(8), AFmt::I8Token),
            ("u4 g32 x i8", Code::U4, 32, Zero::Sym(8), AFmt::I8Token),
            ("u4 g128 asym x i8", Code::U4, 128, Zero::Asym, AFmt::I8Token),
            ("u8 row x i8", Code::U8, k, Zero::Sym(128), AFmt::I8Token),
            ("u4 g128 x f32", Code::U4, 128, Zero::Sym(8), AFmt::F32),
            ("u8 row x f32", Code::U8, k, Zero::Sym(128), AFmt::F32),
            ("e4m3 row x f32", Code::E4m3, k, Zero::Sym(0), AFmt::F32),
            ("bf16 x f32", Code::Bf16, k, Zero::Sym(0), AFmt::F32),
        ];
        // ONLY=g32 measures just the formats whose name has it, ROWS=256 just that many rows.
        let only = std::env::var("ONLY").unwrap_or_default();
        for (name, code, group, zero, a) in formats.into_iter().filter(|f| f.0.contains(&only)) {
            for m in [1u32, 4, 16, 256] {
                if std::env::var("ROWS").is_ok_and(|rows| rows != m.to_string()) {
                    continue;
                }
                let class = match m {
                    1 => MRange { min: 1, max: 1 },
                    4 => MRange { min: 2, max: 4 },
                    _ => MRange { min: 1, max: 512 },
                };
                let w = WFmt { code, group, zero, scale: ScaleTy::Bf16 };
                let epilogue = EExpr::store_acc(MemTy::F32, n);
                let spec = MatmulSpec { n, k, m: class, rows: Rows::T, w, a, epilogue };
                let mut plan = schedule(&spec, &target.cpu);
                // TILE=8x2x1 tries another first tile than the one chosen.
                if let Ok(tile) = std::env::var("TILE") {
                    let parts: Vec<u32> = tile.split('x').filter_map(|p| p.parse().ok()).collect();
                    if let ([mr, nr, ku], true) = (parts.as_slice(), m > 4) {
                        plan.tiles[0] = CpuTile { mr: *mr, nr: *nr, ku: *ku };
                    }
                }
                let start = Instant::now();
                let cx = Context::create();
                let unit = Unit::new(&cx, target, "speed")?;
                emit(&unit, "kernel", &spec, &plan)?;
                let bytes = unit.finish()?;
                let built = start.elapsed().as_secs_f64() * 1e3;
                let object = Object::load(&bytes).map_err(|e| Diag::bug(e.to_string()))?;
                let kernel = object.symbol("kernel").ok_or_else(|| Diag::bug("the kernel is missing"))?;

                let layout = Layout::of(&spec);
                let mut weights = Buffer::new(layout.bytes() as usize, |i| ((i * 37) >> 3) as u8 & 0x3f);
                let a_len = match a {
                    AFmt::F32 => (m * k * 4) as usize,
                    AFmt::I8Token => (m * i8_row_stride(k)) as usize,
                };
                let mut acts =
                    Buffer::new(a_len, |i| if a == AFmt::F32 && i % 4 == 3 { 0x3f } else { i as u8 & 0x3f });
                let mut scales = Buffer::new(m as usize * 4, |_| 0x3c);
                let mut sums = Buffer::new((m * spec.groups()) as usize * 4, |_| 0);
                let mut out = Buffer::new((m * n) as usize * 4, |_| 0xff);
                let args = match a {
                    AFmt::F32 => vec![acts.ptr(), weights.ptr(), out.ptr()],
                    AFmt::I8Token => vec![acts.ptr(), scales.ptr(), sums.ptr(), weights.ptr(), out.ptr()],
                };
                let dims = [i64::from(m), i64::from(m)];
                // SAFETY: the arguments are the ones that the spec documents, with the sizes it demands.
                let seconds = best(|| unsafe {
                    kernel(args.as_ptr(), dims.as_ptr(), 0, i64::from(spec.items()));
                });
                let gmac = f64::from(m) * f64::from(n) * f64::from(k) / seconds / 1e9;
                let gbytes = layout.bytes() as f64 / seconds / 1e9;
                let share = match (peak, a) {
                    (Some(peak), AFmt::I8Token) => format!(" {:4.1}%", gmac / peak * 100.0),
                    _ => String::new(),
                };
                println!(
                    "{name:18} m={m:<4} {gmac:7.1} GMAC/s{share} {gbytes:6.1} GB/s  {built:5.1} ms, {} B",
                    bytes.len()
                );
                println!("{:18} {plan}", "");
            }
        }
        Ok(())
    }
}
