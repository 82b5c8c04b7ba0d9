//! Tile IR as CUDA C++ text that needs no header, no library and no compiler option but the architecture.
//!
//! The text has a prelude of its own types and of the helpers that the kernel uses, a line or a few of inline PTX each.
//! Statements become lines one to one, in order, so the text reads as the kernel does. It is to be compiled without
//! contraction of products and sums (`--fmad=false`); what is to be fused says so.

use super::tile::{
    Access, Addr, Binary, Expr, GroupKind, GroupLeft, Kernel, Mem, MmaKind, Stmt, Ternary, Ty, Unary, Val,
};
use helpers::{HELPERS, TYPES};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

mod helpers;

/// The text of a kernel.
pub fn emit(kernel: &Kernel) -> String {
    let mut writer =
        Writer { kernel, out: String::new(), depth: 1, used: BTreeSet::new(), made: BTreeMap::new() };
    writer.body(&kernel.body);
    let Writer { out: body, used, made, .. } = writer;
    let mut out = TYPES.to_owned();
    for (_, definition) in HELPERS.iter().filter(|(name, _)| used.contains(name)) {
        out.push_str(definition);
        out.push('\n');
    }
    made.values().for_each(|definition| out.push_str(definition));
    let aliased = kernel.buffers.iter().any(|b| b.access == Access::ReadBeforeWrite);
    let buffers = kernel.buffers.iter().map(|b| match b.access {
        Access::Read => format!("const u8* __restrict__ {}", b.name),
        Access::ReadBeforeWrite => format!("const u8* {}", b.name),
        Access::Scratch | Access::Counters => format!("u8* {}", b.name),
        Access::Write if aliased => format!("u8* {}", b.name),
        Access::Write | Access::Update => format!("u8* __restrict__ {}", b.name),
    });
    let scalars = kernel.scalars.iter().map(|s| format!("u32 {s}"));
    let arguments = buffers.chain(scalars).collect::<Vec<_>>().join(", ");
    // Shared memory is always the launch's: one way for all sizes.
    if kernel.shared > 0 {
        let align = if made.is_empty() { 128 } else { 1024 };
        let _ = writeln!(out, "extern __shared__ __align__({align}) u8 shared[];");
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
    /// Helpers made for sizes of matrix products, by their names.
    made: BTreeMap<String, String>,
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
            Stmt::LastOf { to, counter, at, count } => {
                let name = self.helper("last_of");
                let at = self.address(Mem::Global(*counter), *at);
                self.line(&format!("const bool {to} = {name}({at}, {});", value(*count)));
            }
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
            Stmt::BarInit { at, count } => {
                let at = self.shared_address(*at);
                self.call("bar_init", &format!("({at}, {count})"));
            }
            Stmt::BarFence => self.call("bar_fence", "()"),
            Stmt::BarExpect { at, bytes } => {
                let at = self.shared_address(*at);
                self.call("bar_expect", &format!("({at}, {bytes})"));
            }
            Stmt::BarArrive { at } => {
                let at = self.shared_address(*at);
                self.call("bar_arrive", &format!("({at})"));
            }
            Stmt::BarWait { at, parity } => {
                let at = self.shared_address(*at);
                self.call("bar_wait", &format!("({at}, {})", value(*parity)));
            }
            Stmt::BulkCopy { to, buffer, at, bytes, barrier } => {
                let (to, barrier) = (self.shared_address(*to), self.shared_address(*barrier));
                let from = self.address(Mem::Global(*buffer), *at);
                self.call("bulk_copy", &format!("({to}, {from}, {bytes}, {barrier})"));
            }
            Stmt::ProxyFence => self.call("proxy_fence", "()"),
            Stmt::Registers { count, more: true } => self.call("more_registers", &format!("<{count}>()")),
            Stmt::Registers { count, more: false } => self.call("fewer_registers", &format!("<{count}>()")),
            Stmt::GroupFence => self.call("group_fence", "()"),
            Stmt::GroupMma { kind, acc, a, b, fresh } => {
                let name = self.group_mma(*kind, acc.len(), matches!(a, GroupLeft::Regs(_)), *fresh);
                self.helper("descriptor");
                let b = self.shared_address(*b);
                let a = match a {
                    GroupLeft::Shared(at) => format!("descriptor({})", self.shared_address(*at)),
                    GroupLeft::Regs(a) => a.map(value).join(", "),
                };
                let acc: Vec<_> = acc.iter().map(|r| r.to_string()).collect();
                self.line(&format!("{name}({}, {a}, descriptor({b}));", acc.join(", ")));
            }
            Stmt::GroupCommit => self.call("group_commit", "()"),
            Stmt::GroupWait { left, acc } => {
                self.call("group_wait", &format!("<{left}>()"));
                if let Some(&first) = acc.first() {
                    let float = self.kernel.ty(first.into()) == Ty::F32;
                    let keep = self.helper(if float { "keep" } else { "keep_word" });
                    let keep: Vec<_> = acc.iter().map(|r| format!("{keep}({r});")).collect();
                    self.line(&keep.join(" "));
                }
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

    /// The helper for a group's matrix product with so many sums of a thread.
    fn group_mma(&mut self, kind: GroupKind, sums: usize, regs: bool, fresh: bool) -> String {
        let (name, shape, ty, letter, end) = match kind {
            GroupKind::Bf16 if regs => ("bf16", "k16.f32.bf16.bf16", "f32", "f", ", 1, 1, 0"),
            GroupKind::Bf16 => ("bf16", "k16.f32.bf16.bf16", "f32", "f", ", 1, 1, 0, 0"),
            GroupKind::E4m3 => ("e4m3", "k32.f32.e4m3.e4m3", "f32", "f", ", 1, 1"),
            GroupKind::S8 => ("s8", "k32.s32.s8.s8", "u32", "r", ""),
        };
        let n = 2 * sums;
        let side = if regs { "regs" } else { "shared" };
        let begin = if fresh { "_fresh" } else { "" };
        let name = format!("group_{name}_n{n}_{side}{begin}");
        let list =
            |f: &dyn Fn(usize) -> String, count: usize| (0..count).map(f).collect::<Vec<_>>().join(", ");
        let left = if regs { 4 } else { 1 };
        let left_args = if regs { list(&|i| format!("u32 a{i}"), 4) } else { "u64 a0".to_owned() };
        let left_asm = list(&|i| format!("%{}", sums + i), left);
        let left_asm = if regs { format!("{{{left_asm}}}") } else { left_asm };
        let letter_a = if regs { "r" } else { "l" };
        let definition = format!(
            "DEVICE void {name}({}, {left_args}, u64 b) {{\n  asm volatile(\"{{ .reg .pred p; setp.ne.b32 p, {}, 0; \"\n    \
             \"wgmma.mma_async.sync.aligned.m64n{n}{shape} {{{}}}, {left_asm}, %{}, p{end}; }}\"\n    \
             : {}\n    : {}, \"l\"(b));\n}}\n",
            list(&|i| format!("{ty}& d{i}"), sums),
            u32::from(!fresh),
            list(&|i| format!("%{i}"), sums),
            sums + left,
            list(&|i| format!("\"+{letter}\"(d{i})"), sums),
            list(&|i| format!("\"{letter_a}\"(a{i})"), left),
        );
        self.made.insert(name.clone(), definition);
        name
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
            Unary::Exp2 => "exp2",
            Unary::Log2 => "log2",
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
            Binary::FMax => return format!("{}({a}, {b})", self.helper("larger")),
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
