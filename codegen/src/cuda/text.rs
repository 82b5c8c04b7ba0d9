//! Tile IR as CUDA C++ text that needs no header, no library and no compiler option but the architecture.
//!
//! The text has a prelude of its own types and of the helpers that the kernel uses, a line or a few of inline PTX each.
//! Statements become lines one to one, in order, so the text reads as the kernel does. It is to be compiled without
//! contraction of products and sums (`--fmad=false`); what is to be fused says so.

use super::tile::{Access, Addr, Binary, Expr, Kernel, Mem, MmaKind, Stmt, Ternary, Ty, Unary, Val};
use std::collections::BTreeSet;
use std::fmt::Write;

/// Helpers that texts may use: name, definition. Written before the kernel in this order, those it uses.
const HELPERS: &[(&str, &str)] = &[
    ("ld1", "DEVICE u32 ld1(const u8* p) { return *p; }"),
    ("ld2", "DEVICE u32 ld2(const u8* p) { return *(const u16*)p; }"),
    ("ld4", "DEVICE u32 ld4(const u8* p) { return *(const u32*)p; }"),
    ("ld8", "DEVICE v2 ld8(const u8* p) { return *(const v2*)p; }"),
    ("ld16", "DEVICE v4 ld16(const u8* p) { return *(const v4*)p; }"),
    ("st1", "DEVICE void st1(u8* p, u32 a) { *p = (u8)a; }"),
    ("st2", "DEVICE void st2(u8* p, u32 a) { *(u16*)p = (u16)a; }"),
    ("st4", "DEVICE void st4(u8* p, u32 a) { *(u32*)p = a; }"),
    ("st8", "DEVICE void st8(u8* p, u32 a, u32 b) { *(v2*)p = v2{a, b}; }"),
    ("st16", "DEVICE void st16(u8* p, u32 a, u32 b, u32 c, u32 d) { *(v4*)p = v4{a, b, c, d}; }"),
    (
        "shared_address",
        "DEVICE u32 shared_address(const u8* p) {\n  u32 a;\n  asm(\"{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }\" : \"=r\"(a) : \"l\"(p));\n  return a;\n}",
    ),
    (
        "cp_async_4",
        "DEVICE void cp_async_4(u32 to, const u8* from, u32 valid) {\n  asm volatile(\"cp.async.ca.shared.global [%0], [%1], 4, %2;\" :: \"r\"(to), \"l\"(from), \"r\"(valid) : \"memory\");\n}",
    ),
    (
        "cp_async_8",
        "DEVICE void cp_async_8(u32 to, const u8* from, u32 valid) {\n  asm volatile(\"cp.async.ca.shared.global [%0], [%1], 8, %2;\" :: \"r\"(to), \"l\"(from), \"r\"(valid) : \"memory\");\n}",
    ),
    (
        "cp_async_16",
        "DEVICE void cp_async_16(u32 to, const u8* from, u32 valid) {\n  asm volatile(\"cp.async.cg.shared.global [%0], [%1], 16, %2;\" :: \"r\"(to), \"l\"(from), \"r\"(valid) : \"memory\");\n}",
    ),
    ("cp_commit", "DEVICE void cp_commit() { asm volatile(\"cp.async.commit_group;\" ::: \"memory\"); }"),
    (
        "cp_wait",
        "template <int N> DEVICE void cp_wait() { asm volatile(\"cp.async.wait_group %0;\" :: \"n\"(N) : \"memory\"); }",
    ),
    (
        "ldmatrix",
        "DEVICE v4 ldmatrix(u32 at) {\n  v4 m;\n  asm volatile(\"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\"\n               : \"=r\"(m.x), \"=r\"(m.y), \"=r\"(m.z), \"=r\"(m.w) : \"r\"(at) : \"memory\");\n  return m;\n}",
    ),
    (
        "ldmatrix_trans",
        "DEVICE v4 ldmatrix_trans(u32 at) {\n  v4 m;\n  asm volatile(\"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\"\n               : \"=r\"(m.x), \"=r\"(m.y), \"=r\"(m.z), \"=r\"(m.w) : \"r\"(at) : \"memory\");\n  return m;\n}",
    ),
    (
        "mma_bf16",
        "DEVICE void mma_bf16(f32& d0, f32& d1, f32& d2, f32& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {\n  asm(\"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\"\n      : \"+f\"(d0), \"+f\"(d1), \"+f\"(d2), \"+f\"(d3) : \"r\"(a0), \"r\"(a1), \"r\"(a2), \"r\"(a3), \"r\"(b0), \"r\"(b1));\n}",
    ),
    (
        "mma_s8",
        "DEVICE void mma_s8(u32& d0, u32& d1, u32& d2, u32& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {\n  asm(\"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\"\n      : \"+r\"(d0), \"+r\"(d1), \"+r\"(d2), \"+r\"(d3) : \"r\"(a0), \"r\"(a1), \"r\"(a2), \"r\"(a3), \"r\"(b0), \"r\"(b1));\n}",
    ),
    (
        "half_to_float",
        "DEVICE f32 half_to_float(u32 h) {\n  f32 x;\n  asm(\"{ .reg .b16 t; cvt.u16.u32 t, %1; cvt.f32.f16 %0, t; }\" : \"=f\"(x) : \"r\"(h));\n  return x;\n}",
    ),
    (
        "float_to_half",
        "DEVICE u32 float_to_half(f32 x) {\n  u32 h;\n  asm(\"{ .reg .b16 t; cvt.rn.f16.f32 t, %1; cvt.u32.u16 %0, t; }\" : \"=r\"(h) : \"f\"(x));\n  return h;\n}",
    ),
    (
        "pack_bf16",
        "DEVICE u32 pack_bf16(f32 low, f32 high) {\n  u32 p;\n  asm(\"cvt.rn.bf16x2.f32 %0, %2, %1;\" : \"=r\"(p) : \"f\"(low), \"f\"(high));\n  return p;\n}",
    ),
    (
        "bf16_fma2",
        "DEVICE u32 bf16_fma2(u32 a, u32 b, u32 c) {\n  u32 d;\n  asm(\"fma.rn.bf16x2 %0, %1, %2, %3;\" : \"=r\"(d) : \"r\"(a), \"r\"(b), \"r\"(c));\n  return d;\n}",
    ),
    (
        "round_even",
        "DEVICE f32 round_even(f32 x) {\n  f32 r;\n  asm(\"cvt.rni.f32.f32 %0, %1;\" : \"=f\"(r) : \"f\"(x));\n  return r;\n}",
    ),
    (
        "to_int",
        "DEVICE u32 to_int(f32 x) {\n  u32 r;\n  asm(\"cvt.rni.s32.f32 %0, %1;\" : \"=r\"(r) : \"f\"(x));\n  return r;\n}",
    ),
    (
        "to_byte",
        "DEVICE u32 to_byte(f32 x) {\n  u32 r;\n  asm(\"cvt.rni.s8.f32 %0, %1;\" : \"=r\"(r) : \"f\"(x));\n  return r;\n}",
    ),
    (
        "divide",
        "DEVICE f32 divide(f32 a, f32 b) {\n  f32 q;\n  asm(\"div.rn.f32 %0, %1, %2;\" : \"=f\"(q) : \"f\"(a), \"f\"(b));\n  return q;\n}",
    ),
    (
        "square_root",
        "DEVICE f32 square_root(f32 a) {\n  f32 r;\n  asm(\"sqrt.rn.f32 %0, %1;\" : \"=f\"(r) : \"f\"(a));\n  return r;\n}",
    ),
    (
        "fma",
        "DEVICE f32 fma(f32 a, f32 b, f32 c) {\n  f32 d;\n  asm(\"fma.rn.f32 %0, %1, %2, %3;\" : \"=f\"(d) : \"f\"(a), \"f\"(b), \"f\"(c));\n  return d;\n}",
    ),
    (
        "copysign",
        "DEVICE f32 copysign(f32 size, f32 sign) { return from_bits(bits(size) & 0x7fffffffu | bits(sign) & 0x80000000u); }",
    ),
    ("absolute", "DEVICE f32 absolute(f32 x) { return from_bits(bits(x) & 0x7fffffffu); }"),
    (
        "shuffle_xor",
        "DEVICE u32 shuffle_xor(u32 x, u32 mask) {\n  u32 y;\n  asm volatile(\"shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;\" : \"=r\"(y) : \"r\"(x), \"r\"(mask));\n  return y;\n}",
    ),
    ("barrier", "DEVICE void barrier() { asm volatile(\"bar.sync 0;\" ::: \"memory\"); }"),
    ("sync_warp", "DEVICE void sync_warp() { asm volatile(\"bar.warp.sync 0xffffffff;\" ::: \"memory\"); }"),
];

/// What every text begins with.
const TYPES: &str = "typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef float f32;
struct alignas(8) v2 { u32 x, y; };
struct alignas(16) v4 { u32 x, y, z, w; };
#define DEVICE static __device__ __forceinline__
DEVICE f32 from_bits(u32 x) { f32 y; asm(\"mov.b32 %0, %1;\" : \"=f\"(y) : \"r\"(x)); return y; }
DEVICE u32 bits(f32 x) { u32 y; asm(\"mov.b32 %0, %1;\" : \"=r\"(y) : \"f\"(x)); return y; }
";

/// The text of a kernel.
pub fn emit(kernel: &Kernel) -> String {
    let mut writer = Writer { kernel, out: String::new(), depth: 1, used: BTreeSet::new() };
    writer.body(&kernel.body);
    let Writer { out: body, used, .. } = writer;
    let mut out = TYPES.to_owned();
    for (_, definition) in HELPERS.iter().filter(|(name, _)| used.contains(name)) {
        out.push_str(definition);
        out.push('\n');
    }
    let aliased = kernel.buffers.iter().any(|b| b.access == Access::ReadBeforeWrite);
    let buffers = kernel.buffers.iter().map(|b| match b.access {
        Access::Read => format!("const u8* __restrict__ {}", b.name),
        Access::ReadBeforeWrite => format!("const u8* {}", b.name),
        Access::Write if aliased => format!("u8* {}", b.name),
        Access::Write => format!("u8* __restrict__ {}", b.name),
    });
    let scalars = kernel.scalars.iter().map(|s| format!("u32 {s}"));
    let arguments = buffers.chain(scalars).collect::<Vec<_>>().join(", ");
    // Shared memory is always the launch's: one way for all sizes.
    if kernel.shared > 0 {
        out.push_str("extern __shared__ __align__(128) u8 shared[];\n");
    }
    let base = match used.contains("shared_address") {
        true => "  const u32 base = shared_address(shared);\n",
        false => "",
    };
    let _ = write!(
        out,
        "extern \"C\" __global__ void __launch_bounds__({}, {}) {}({arguments}) {{\n{base}{body}}}\n",
        kernel.threads, kernel.blocks_per_sm, kernel.name
    );
    out
}

struct Writer<'a> {
    kernel: &'a Kernel,
    out: String,
    depth: usize,
    used: BTreeSet<&'static str>,
}

impl Writer<'_> {
    fn body(&mut self, body: &[Stmt]) {
        for stmt in body {
            self.stmt(stmt);
        }
    }

    fn line(&mut self, text: &str) {
        let _ = writeln!(self.out, "{:width$}{text}", "", width = self.depth * 2);
    }

    /// A helper by its name, which is thereby used.
    fn helper(&mut self, name: &'static str) -> &'static str {
        debug_assert!(HELPERS.iter().any(|(n, _)| *n == name), "there is no helper {name}");
        self.used.insert(name);
        name
    }

    fn ty(&self, ty: Ty) -> &'static str {
        match ty {
            Ty::Pred => "bool",
            Ty::U32 => "u32",
            Ty::F32 => "f32",
            Ty::U64 => "u64",
        }
    }

    fn address(&mut self, mem: Mem, at: Addr) -> String {
        let base = match mem {
            Mem::Global(i) => self.kernel.buffers[i as usize].name.clone(),
            Mem::Shared => "shared".to_owned(),
        };
        offset(base, at)
    }

    /// An address in shared memory as 32 bits, for instructions that take one.
    fn shared_address(&mut self, at: Addr) -> String {
        self.helper("shared_address");
        offset("base".to_owned(), at)
    }

    fn sized(&mut self, load: bool, bytes: u32) -> &'static str {
        let name = match (load, bytes) {
            (true, 1) => "ld1",
            (true, 2) => "ld2",
            (true, 4) => "ld4",
            (true, 8) => "ld8",
            (true, _) => "ld16",
            (false, 1) => "st1",
            (false, 2) => "st2",
            (false, 4) => "st4",
            (false, 8) => "st8",
            (false, _) => "st16",
        };
        self.helper(name)
    }

    fn stmt(&mut self, stmt: &Stmt) {
        match stmt {
            Stmt::Note(text) => self.line(&format!("// {text}")),
            Stmt::Let(to, expr) => {
                let ty = self.kernel.regs[to.0 as usize];
                let text = self.expr(*expr);
                let constant = if matches!(expr, Expr::Unary(Unary::Copy, _)) { "" } else { "const " };
                let ty = self.ty(ty);
                self.line(&format!("{constant}{ty} {to} = {text};"));
            }
            Stmt::Set(to, v) => self.line(&format!("{to} = {};", value(*v))),
            Stmt::Load { to, mem, at, bytes } => {
                let name = self.sized(true, *bytes);
                let address = self.address(*mem, *at);
                let ty = ["u32", "v2", "", "v4"][to.len() - 1];
                match to.as_slice() {
                    [one] => self.line(&format!("const u32 {one} = {name}({address});")),
                    many => {
                        let first = many[0];
                        self.line(&format!("const {ty} m{} = {name}({address});", first.0));
                        let parts = many.iter().zip(["x", "y", "z", "w"]);
                        let parts: Vec<_> =
                            parts.map(|(r, field)| format!("{r} = m{}.{field}", first.0)).collect();
                        self.line(&format!("const u32 {};", parts.join(", ")));
                    }
                }
            }
            Stmt::Store { mem, at, from, bytes } => {
                let name = self.sized(false, *bytes);
                let address = self.address(*mem, *at);
                let from: Vec<_> = from.iter().map(|v| self.word(*v)).collect();
                self.line(&format!("{name}({address}, {});", from.join(", ")));
            }
            Stmt::CpAsync { to, buffer, at, bytes, valid } => {
                let name = self.helper(match bytes {
                    4 => "cp_async_4",
                    8 => "cp_async_8",
                    _ => "cp_async_16",
                });
                let to = self.shared_address(*to);
                let from = self.address(Mem::Global(*buffer), *at);
                self.line(&format!("{name}({to}, {from}, {});", value(*valid)));
            }
            Stmt::CpCommit => self.call("cp_commit", "()"),
            Stmt::CpWait(n) => self.call("cp_wait", &format!("<{n}>()")),
            Stmt::Barrier => self.call("barrier", "()"),
            Stmt::SyncWarp => self.call("sync_warp", "()"),
            Stmt::ShuffleXor { to, from, mask } => {
                let name = self.helper("shuffle_xor");
                let word = self.word(*from);
                let line = match self.kernel.ty(*from) {
                    Ty::F32 => format!("const f32 {to} = from_bits({name}({word}, {mask}u));"),
                    _ => format!("const u32 {to} = {name}({word}, {mask}u);"),
                };
                self.line(&line);
            }
            Stmt::LdMatrix { to, at, transposed } => {
                let name = self.helper(if *transposed { "ldmatrix_trans" } else { "ldmatrix" });
                let at = self.shared_address(*at);
                let m = to[0].0;
                self.line(&format!("const v4 m{m} = {name}({at});"));
                let [a, b, c, d] = to;
                self.line(&format!("const u32 {a} = m{m}.x, {b} = m{m}.y, {c} = m{m}.z, {d} = m{m}.w;"));
            }
            Stmt::Mma { kind, acc, a, b } => {
                let name = self.helper(match kind {
                    MmaKind::Bf16 => "mma_bf16",
                    MmaKind::S8 => "mma_s8",
                });
                let acc = acc.iter().map(|r| r.to_string());
                let sides = a.iter().chain(b).map(|v| value(*v));
                let all: Vec<_> = acc.chain(sides).collect();
                self.line(&format!("{name}({});", all.join(", ")));
            }
            Stmt::If(p, then, otherwise) => {
                self.line(&format!("if ({}) {{", value(*p)));
                self.nested(then);
                if !otherwise.is_empty() {
                    self.line("} else {");
                    self.nested(otherwise);
                }
                self.line("}");
            }
            Stmt::For { var, from, to, step, body } => {
                let (from, to, step) = (value(*from), value(*to), value(*step));
                // The compiler would unroll small loops of its own accord, and spill: bodies are as long as they should be.
                self.line("#pragma unroll 1");
                self.line(&format!("for (u32 {var} = {from}; {var} < {to}; {var} += {step}) {{"));
                self.nested(body);
                self.line("}");
            }
        }
    }

    fn call(&mut self, name: &'static str, rest: &str) {
        let name = self.helper(name);
        self.line(&format!("{name}{rest};"));
    }

    fn nested(&mut self, body: &[Stmt]) {
        self.depth += 1;
        self.body(body);
        self.depth -= 1;
    }

    /// An operand as 32 bits.
    fn word(&mut self, v: Val) -> String {
        match self.kernel.ty(v) {
            Ty::F32 => format!("bits({})", value(v)),
            _ => value(v),
        }
    }

    fn expr(&mut self, expr: Expr) -> String {
        match expr {
            Expr::Thread => "threadIdx.x".into(),
            Expr::BlockX => "blockIdx.x".into(),
            Expr::BlockY => "blockIdx.y".into(),
            Expr::Scalar(i) => self.kernel.scalars[i as usize].clone(),
            Expr::Unary(op, a) => self.unary(op, &value(a)),
            Expr::Binary(op, a, b) => self.binary(op, &value(a), &value(b)),
            Expr::Ternary(op, a, b, c) => {
                let (a, b, c) = (value(a), value(b), value(c));
                match op {
                    Ternary::FFma => format!("{}({a}, {b}, {c})", self.helper("fma")),
                    Ternary::Select => format!("{a} ? {b} : {c}"),
                    Ternary::Bf16Fma2 => format!("{}({a}, {b}, {c})", self.helper("bf16_fma2")),
                    Ternary::MulWide => format!("(u64){a} * {b} + {c}"),
                }
            }
        }
    }

    fn unary(&mut self, op: Unary, a: &str) -> String {
        let helper = match op {
            Unary::Copy => return a.to_owned(),
            Unary::FNeg => return format!("-{a}"),
            Unary::IntToFloat => return format!("(f32)(int){a}"),
            Unary::SignExtend8 => return format!("(u32)(int)(signed char){a}"),
            Unary::PNot => return format!("!{a}"),
            Unary::Widen => return format!("(u64){a}"),
            Unary::FromBits => return format!("from_bits({a})"),
            Unary::Bits => return format!("bits({a})"),
            Unary::FAbs => "absolute",
            Unary::FSqrt => "square_root",
            Unary::FRound => "round_even",
            Unary::FloatToInt => "to_int",
            Unary::FloatToByte => "to_byte",
            Unary::HalfToFloat => "half_to_float",
            Unary::FloatToHalf => "float_to_half",
        };
        format!("{}({a})", self.helper(helper))
    }

    fn binary(&mut self, op: Binary, a: &str, b: &str) -> String {
        let sign = match op {
            Binary::FAdd | Binary::Add | Binary::Add64 => "+",
            Binary::FSub | Binary::Sub => "-",
            Binary::FMul | Binary::Mul => "*",
            Binary::Div => "/",
            Binary::Rem => "%",
            Binary::And => "&",
            Binary::Or => "|",
            Binary::Xor => "^",
            Binary::Shl => "<<",
            Binary::Shr => ">>",
            Binary::FLt | Binary::Lt => "<",
            Binary::FEq | Binary::Eq => "==",
            Binary::PAnd => "&&",
            Binary::Min => return format!("{a} < {b} ? {a} : {b}"),
            Binary::FDiv => return format!("{}({a}, {b})", self.helper("divide")),
            Binary::FCopySign => return format!("{}({a}, {b})", self.helper("copysign")),
            Binary::PackBf16 => return format!("{}({a}, {b})", self.helper("pack_bf16")),
        };
        format!("{a} {sign} {b}")
    }
}

/// An offset from a base.
fn offset(base: String, at: Addr) -> String {
    let with = |base: String, v: Val| if v == Val::U32(0) { base } else { format!("{base} + {}", value(v)) };
    with(with(base, at.base), at.plus.into())
}

/// An operand in C++.
fn value(v: Val) -> String {
    match v {
        Val::Reg(r) => r.to_string(),
        Val::U32(x) if x < 1 << 16 => format!("{x}u"),
        Val::U32(x) => format!("{x:#x}u"),
        Val::F32(x) if x.get().is_finite() && x.get().abs() < 1e6 && x.get().fract() == 0.0 => {
            // `-0.0` keeps its sign in this form too.
            format!("{:.1}f", x.get())
        }
        Val::F32(x) => format!("from_bits({:#010x}u)", x.get().to_bits()),
        Val::Pred(p) => p.to_string(),
    }
}
