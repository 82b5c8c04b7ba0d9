//! Building kernels statement by statement. Constants are folded, what is computed already is used again, and constants
//! added to offsets become part of the access.

use super::{
    Access, Addr, Binary, Buffer, Expr, Extent, GroupKind, GroupLeft, Kernel, Mem, MmaKind, Reg, Stmt,
    Ternary, Ty, Unary, Val, clean,
};
use crate::cuda::interp::fold;
use std::collections::{HashMap, HashSet};

/// A kernel under construction.
#[derive(Debug)]
pub struct Builder {
    kernel: Kernel,
    /// Bodies that are open, the innermost last.
    open: Vec<Vec<Stmt>>,
    /// For each open body what is computed in it.
    known: Vec<HashMap<Expr, Val>>,
    /// Registers that are a sum of another value and a constant.
    sums: HashMap<Reg, (Val, u32)>,
    /// Registers that are assigned again.
    vars: HashSet<Reg>,
}

impl Builder {
    /// A kernel of `threads` threads a block.
    pub fn new(name: &str, threads: u32) -> Builder {
        let kernel = Kernel {
            name: name.to_owned(),
            buffers: vec![],
            scalars: vec![],
            threads,
            blocks_per_sm: 1,
            shared: 0,
            grid: [Extent::Fixed(1); 2],
            regs: vec![],
            body: vec![],
        };
        Builder {
            kernel,
            open: vec![vec![]],
            known: vec![HashMap::new()],
            sums: HashMap::new(),
            vars: HashSet::new(),
        }
    }

    /// The finished kernel.
    pub fn finish(mut self) -> Kernel {
        self.kernel.body = self.open.pop().expect("the outermost body is open");
        clean::unused(&mut self.kernel);
        self.kernel
    }

    /// Declares a buffer; all buffers come before the first scalar.
    pub fn buffer(&mut self, name: &str, access: Access) -> Mem {
        self.workspace(name, access, 0)
    }

    /// Declares scratch or counters, of so many bytes for each of the first scalar argument.
    pub fn workspace(&mut self, name: &str, access: Access, bytes_each: u64) -> Mem {
        self.kernel.buffers.push(Buffer { name: name.to_owned(), access, bytes_each });
        Mem::Global(self.kernel.buffers.len() as u32 - 1)
    }

    /// Declares a number that the kernel is called with; gives its index.
    pub fn scalar(&mut self, name: &str) -> u32 {
        self.kernel.scalars.push(name.to_owned());
        self.kernel.scalars.len() as u32 - 1
    }

    /// Takes `bytes` of shared memory; gives the offset, a multiple of 128.
    pub fn shared(&mut self, bytes: u32) -> u32 {
        let at = self.kernel.shared;
        self.kernel.shared = (at + bytes).next_multiple_of(128);
        at
    }

    /// Sets the grid.
    pub fn grid(&mut self, x: Extent, y: Extent) {
        self.kernel.grid = [x, y];
    }

    /// Demands that registers suffice for this many blocks on a multiprocessor.
    pub fn blocks_per_sm(&mut self, blocks: u32) {
        self.kernel.blocks_per_sm = blocks;
    }

    fn reg(&mut self, ty: Ty) -> Reg {
        self.kernel.regs.push(ty);
        Reg(self.kernel.regs.len() as u32 - 1)
    }

    fn emit(&mut self, stmt: Stmt) {
        self.open.last_mut().expect("a body is open").push(stmt);
    }

    fn define(&mut self, ty: Ty, expr: Expr) -> Val {
        if let Some(&v) = self.known.iter().find_map(|known| known.get(&expr)) {
            return v;
        }
        let to = self.reg(ty);
        self.emit(Stmt::Let(to, expr));
        // What is made of variables changes with them.
        let changes = |v: Val| matches!(v, Val::Reg(r) if self.vars.contains(&r));
        if !expr.operands().any(changes) {
            self.known.last_mut().expect("a body is open").insert(expr, to.into());
            if let Expr::Binary(Binary::Add | Binary::Add64, a, Val::U32(c)) = expr {
                self.sums.insert(to, (a, c));
            }
        }
        to.into()
    }

    /// An offset without the constants that were added to it.
    fn at(&self, offset: impl Into<Val>) -> Addr {
        let mut at = Addr { base: offset.into(), plus: 0 };
        while let Val::Reg(r) = at.base
            && let Some(&(base, plus)) = self.sums.get(&r)
        {
            at = Addr { base, plus: at.plus + plus };
        }
        if let Val::U32(base) = at.base {
            at = Addr { base: 0.into(), plus: at.plus + base };
        }
        at
    }

    /// The type of an operand.
    pub fn ty(&self, v: Val) -> Ty {
        self.kernel.ty(v)
    }

    /// A remark in the text.
    pub fn note(&mut self, text: &str) {
        self.emit(Stmt::Note(text.to_owned()));
    }

    /// A function of one value.
    pub fn unary(&mut self, op: Unary, a: impl Into<Val>) -> Val {
        let a = a.into();
        if let Some(v) = fold::unary(op, a) {
            return v;
        }
        let ty = op.ty(self.kernel.ty(a));
        self.define(ty, Expr::Unary(op, a))
    }

    /// A function of two values.
    pub fn binary(&mut self, op: Binary, a: impl Into<Val>, b: impl Into<Val>) -> Val {
        let (a, b) = (a.into(), b.into());
        if let Some(v) = fold::binary(op, a, b) {
            return v;
        }
        // Constants go last, and together.
        if let (Binary::Add, Val::U32(_), Val::Reg(_)) = (op, a, b) {
            return self.binary(op, b, a);
        }
        if let (Binary::Add, Val::Reg(r), Val::U32(c)) = (op, a, b)
            && let Some(&(base, plus)) = self.sums.get(&r)
        {
            return self.binary(op, base, plus.wrapping_add(c));
        }
        self.define(op.ty(), Expr::Binary(op, a, b))
    }

    /// A function of three values.
    pub fn ternary(&mut self, op: Ternary, a: impl Into<Val>, b: impl Into<Val>, c: impl Into<Val>) -> Val {
        let (a, b, c) = (a.into(), b.into(), c.into());
        if let (Ternary::Select, Val::Pred(p)) = (op, a) {
            return if p { b } else { c };
        }
        let ty = match op {
            Ternary::FFma => Ty::F32,
            Ternary::Select => self.kernel.ty(b),
            Ternary::Bf16Fma2 => Ty::U32,
            Ternary::MulWide => Ty::U64,
        };
        self.define(ty, Expr::Ternary(op, a, b, c))
    }

    /// `a + b` in integers.
    pub fn add(&mut self, a: impl Into<Val>, b: impl Into<Val>) -> Val {
        self.binary(Binary::Add, a, b)
    }

    /// `a * b` in integers.
    pub fn mul(&mut self, a: impl Into<Val>, b: impl Into<Val>) -> Val {
        self.binary(Binary::Mul, a, b)
    }

    /// `a * b + c` in integers.
    pub fn mad(&mut self, a: impl Into<Val>, b: impl Into<Val>, c: impl Into<Val>) -> Val {
        let product = self.mul(a, b);
        self.add(product, c)
    }

    /// `a / b` in unsigned integers.
    pub fn div(&mut self, a: impl Into<Val>, b: impl Into<Val>) -> Val {
        self.binary(Binary::Div, a, b)
    }

    /// `a % b` in unsigned integers.
    pub fn rem(&mut self, a: impl Into<Val>, b: impl Into<Val>) -> Val {
        self.binary(Binary::Rem, a, b)
    }

    /// `a & b`.
    pub fn and(&mut self, a: impl Into<Val>, b: impl Into<Val>) -> Val {
        self.binary(Binary::And, a, b)
    }

    /// `a << b`.
    pub fn shl(&mut self, a: impl Into<Val>, b: u32) -> Val {
        self.binary(Binary::Shl, a, b)
    }

    /// `a >> b` of unsigned numbers.
    pub fn shr(&mut self, a: impl Into<Val>, b: u32) -> Val {
        self.binary(Binary::Shr, a, b)
    }

    /// `a < b` in unsigned integers.
    pub fn lt(&mut self, a: impl Into<Val>, b: impl Into<Val>) -> Val {
        self.binary(Binary::Lt, a, b)
    }

    /// Either of two values.
    pub fn select(&mut self, p: Val, a: impl Into<Val>, b: impl Into<Val>) -> Val {
        self.ternary(Ternary::Select, p, a, b)
    }

    /// Thread of the block.
    pub fn thread(&mut self) -> Val {
        self.define(Ty::U32, Expr::Thread)
    }

    /// Column of the grid.
    pub fn block_x(&mut self) -> Val {
        self.define(Ty::U32, Expr::BlockX)
    }

    /// Row of the grid.
    pub fn block_y(&mut self) -> Val {
        self.define(Ty::U32, Expr::BlockY)
    }

    /// A number the kernel is called with.
    pub fn scalar_value(&mut self, index: u32) -> Val {
        self.define(Ty::U32, Expr::Scalar(index))
    }

    /// A variable with its first value.
    pub fn var(&mut self, first: impl Into<Val>) -> Reg {
        let first = first.into();
        let var = self.reg(self.kernel.ty(first));
        self.vars.insert(var);
        self.emit(Stmt::Let(var, Expr::Unary(Unary::Copy, first)));
        var
    }

    /// Assigns a variable.
    pub fn set(&mut self, var: Reg, v: impl Into<Val>) {
        self.emit(Stmt::Set(var, v.into()));
    }

    /// Adds `step` to a variable that goes round below `end`.
    pub fn turn(&mut self, var: Reg, step: u32, end: u32) {
        let next = self.add(var, step);
        let over = self.lt(next, end);
        let next = self.select(over, next, 0);
        self.set(var, next);
    }

    /// Loads 1, 2, 4, 8 or 16 bytes as words.
    pub fn load(&mut self, mem: Mem, at: impl Into<Val>, bytes: u32) -> Vec<Val> {
        let to: Vec<Reg> = (0..bytes.div_ceil(4)).map(|_| self.reg(Ty::U32)).collect();
        let at = self.at(at);
        self.emit(Stmt::Load { to: to.clone(), mem, at, bytes });
        to.into_iter().map(Val::Reg).collect()
    }

    /// Stores 1, 2, 4, 8 or 16 bytes of words.
    pub fn store(&mut self, mem: Mem, at: impl Into<Val>, from: &[Val], bytes: u32) {
        let at = self.at(at);
        self.emit(Stmt::Store { mem, at, from: from.to_vec(), bytes });
    }

    /// Copies to shared memory without waiting.
    pub fn cp_async(&mut self, to: Val, from: Mem, at: Val, bytes: u32, valid: impl Into<Val>) {
        let Mem::Global(buffer) = from else { unreachable!("copies come from buffers") };
        let (to, at) = (self.at(to), self.at(at));
        self.emit(Stmt::CpAsync { to, buffer, at, bytes, valid: valid.into() });
    }

    /// Ends a group of copies.
    pub fn cp_commit(&mut self) {
        self.emit(Stmt::CpCommit);
    }

    /// Waits for all but the last `groups` groups of copies.
    pub fn cp_wait(&mut self, groups: u32) {
        self.emit(Stmt::CpWait(groups));
    }

    /// A barrier of the block.
    pub fn barrier(&mut self) {
        self.emit(Stmt::Barrier);
    }

    /// Counts the block; whether it is the last of `count`.
    pub fn last_of(&mut self, counters: Mem, at: impl Into<Val>, count: impl Into<Val>) -> Val {
        let Mem::Global(counter) = counters else { unreachable!("counters are a buffer") };
        let to = self.reg(Ty::Pred);
        let at = self.at(at);
        self.emit(Stmt::LastOf { to, counter, at, count: count.into() });
        to.into()
    }

    /// Orders the shared memory accesses of a warp's lanes.
    pub fn sync_warp(&mut self) {
        self.emit(Stmt::SyncWarp);
    }

    /// The value of the lane whose number differs in `mask`.
    pub fn shuffle_xor(&mut self, from: Val, mask: u32) -> Val {
        let to = self.reg(self.kernel.ty(from));
        self.emit(Stmt::ShuffleXor { to, from, mask });
        to.into()
    }

    /// `acc += a * b`.
    pub fn mma(&mut self, kind: MmaKind, acc: [Reg; 4], a: [Val; 4], b: [Val; 2]) {
        self.emit(Stmt::Mma { kind, acc, a, b });
    }

    /// Sets up a barrier.
    pub fn bar_init(&mut self, at: impl Into<Val>, count: u32) {
        let at = self.at(at);
        self.emit(Stmt::BarInit { at, count });
    }

    /// Makes barriers known to bulk copies.
    pub fn bar_fence(&mut self) {
        self.emit(Stmt::BarFence);
    }

    /// Arrives, and expects bytes.
    pub fn bar_expect(&mut self, at: impl Into<Val>, bytes: u32) {
        let at = self.at(at);
        self.emit(Stmt::BarExpect { at, bytes });
    }

    /// Arrives.
    pub fn bar_arrive(&mut self, at: impl Into<Val>) {
        let at = self.at(at);
        self.emit(Stmt::BarArrive { at });
    }

    /// Waits for the phase of a parity.
    pub fn bar_wait(&mut self, at: impl Into<Val>, parity: impl Into<Val>) {
        let at = self.at(at);
        self.emit(Stmt::BarWait { at, parity: parity.into() });
    }

    /// Copies many bytes, which count at a barrier.
    pub fn bulk_copy(&mut self, to: Val, from: Mem, at: Val, bytes: u32, barrier: Val) {
        let Mem::Global(buffer) = from else { unreachable!("copies come from buffers") };
        let (to, at, barrier) = (self.at(to), self.at(at), self.at(barrier));
        self.emit(Stmt::BulkCopy { to, buffer, at, bytes, barrier });
    }

    /// Makes stores to shared memory known to groups' products.
    pub fn proxy_fence(&mut self) {
        self.emit(Stmt::ProxyFence);
    }

    /// Changes the number of registers.
    pub fn registers(&mut self, count: u32, more: bool) {
        self.emit(Stmt::Registers { count, more });
    }

    /// Orders registers before groups' products.
    pub fn group_fence(&mut self) {
        self.emit(Stmt::GroupFence);
    }

    /// `acc += a * b` by a group of warps, both sides in shared memory.
    pub fn group_mma(&mut self, kind: GroupKind, acc: &[Reg], a: Val, b: Val, fresh: bool) {
        let (a, b) = (GroupLeft::Shared(self.at(a)), self.at(b));
        self.emit(Stmt::GroupMma { kind, acc: acc.to_vec(), a, b, fresh });
    }

    /// `acc += a * b` by a group of warps, the left side in registers.
    pub fn group_mma_regs(&mut self, kind: GroupKind, acc: &[Reg], a: [Val; 4], b: Val, fresh: bool) {
        let b = self.at(b);
        self.emit(Stmt::GroupMma { kind, acc: acc.to_vec(), a: GroupLeft::Regs(a), b, fresh });
    }

    /// Ends a group of matrix products.
    pub fn group_commit(&mut self) {
        self.emit(Stmt::GroupCommit);
    }

    /// Waits for all but the last `left` groups of matrix products; the sums listed may be read.
    pub fn group_wait(&mut self, left: u32, acc: &[Reg]) {
        self.emit(Stmt::GroupWait { left, acc: acc.to_vec() });
    }

    /// What lanes do where `p` holds, and what the others do.
    pub fn either(&mut self, p: Val, then: impl FnOnce(&mut Builder), otherwise: impl FnOnce(&mut Builder)) {
        let then = self.body(then);
        let otherwise = self.body(otherwise);
        self.emit(Stmt::If(p, then, otherwise));
    }

    /// What lanes do where `p` holds.
    pub fn when(&mut self, p: Val, then: impl FnOnce(&mut Builder)) {
        if let Val::Pred(p) = p {
            if p {
                then(self);
            }
            return;
        }
        let body = self.body(then);
        self.emit(Stmt::If(p, body, vec![]));
    }

    /// What is repeated with a counter.
    pub fn repeat(
        &mut self,
        from: impl Into<Val>,
        to: impl Into<Val>,
        step: impl Into<Val>,
        f: impl FnOnce(&mut Builder, Val),
    ) {
        let (from, to, step) = (from.into(), to.into(), step.into());
        let var = self.reg(Ty::U32);
        let body = self.body(|b| f(b, var.into()));
        self.emit(Stmt::For { var, from, to, step, body });
    }

    fn body(&mut self, f: impl FnOnce(&mut Builder)) -> Vec<Stmt> {
        self.open.push(vec![]);
        self.known.push(HashMap::new());
        f(self);
        self.known.pop();
        self.open.pop().expect("the body is open")
    }
}
