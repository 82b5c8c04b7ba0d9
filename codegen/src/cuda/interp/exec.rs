//! Steps of one warp.

use super::program::Step;
use super::shared::Who;
use super::warp::{Copy, Frame, Lanes, lanes};
use super::{Block, Fault, Status, fold};
use crate::cuda::tile::{Access, Addr, Expr, Mem, Reg, Stmt, Val, WARP};

impl Block<'_> {
    /// One step of a warp.
    pub(super) fn step(&mut self, index: usize) -> Result<(), Fault> {
        self.memory.counts.steps += 1;
        self.try_step(index).map_err(|what| self.fault(index, what))
    }

    fn try_step(&mut self, index: usize) -> Result<(), String> {
        let warp = &mut self.warps[index];
        let Some(step) = self.program.steps.get(warp.pc) else {
            warp.status = Status::Done;
            return Ok(());
        };
        match *step {
            Step::Plain(stmt) => {
                warp.group.check(stmt)?;
                self.plain(index, stmt)?;
                let warp = &mut self.warps[index];
                if warp.status != Status::Ready {
                    return Ok(());
                }
                warp.pc += 1;
            }
            Step::If { cond, otherwise } => {
                let taken = warp.mask & warp.holds(cond);
                warp.frames.push(Frame { outer: warp.mask, other: warp.mask & !taken });
                warp.mask = taken;
                warp.pc = if taken == 0 { otherwise } else { warp.pc + 1 };
            }
            Step::Else { end } => {
                let frame = warp.frames.last().expect("an `Else` is inside an `If`");
                warp.mask = frame.other;
                warp.pc = if warp.mask == 0 { end } else { warp.pc + 1 };
            }
            Step::Join => {
                warp.mask = warp.frames.pop().expect("a `Join` ends an `If` or a loop").outer;
                warp.pc += 1;
            }
            Step::Enter { var, from } => {
                let first = warp.all(from);
                warp.put(var, first);
                warp.frames.push(Frame { outer: warp.mask, other: 0 });
                warp.pc += 1;
            }
            Step::Test { var, to, end } => {
                let (counter, bound) = (warp.all(var.into()), warp.all(to));
                for lane in lanes(warp.mask) {
                    if counter[lane] >= bound[lane] {
                        warp.mask &= !(1 << lane);
                    }
                }
                warp.pc = if warp.mask == 0 { end } else { warp.pc + 1 };
            }
            Step::Again { var, step, test } => {
                let (counter, step) = (warp.all(var.into()), warp.all(step));
                warp.put(
                    var,
                    std::array::from_fn(|i| u64::from((counter[i] as u32).wrapping_add(step[i] as u32))),
                );
                warp.pc = test;
            }
        }
        Ok(())
    }

    fn plain(&mut self, index: usize, stmt: &Stmt) -> Result<(), String> {
        match stmt {
            Stmt::Note(_) | Stmt::If(..) | Stmt::For { .. } => unreachable!("not a step by itself"),
            Stmt::Let(to, expr) => {
                let values = self.eval(index, *expr);
                self.warps[index].put(*to, values);
            }
            Stmt::Set(to, v) => {
                let values = self.warps[index].all(*v);
                self.warps[index].put(*to, values);
            }
            Stmt::Load { to, mem, at, bytes } => self.load(index, to, *mem, *at, *bytes)?,
            Stmt::Store { mem, at, from, bytes } => self.store(index, *mem, *at, from, *bytes)?,
            Stmt::CpAsync { to, buffer, at, bytes, valid } => {
                self.copy(index, *to, *buffer, *at, *bytes, *valid)?;
            }
            Stmt::CpCommit => {
                self.full(index)?;
                let warp = &mut self.warps[index];
                let group = std::mem::take(&mut warp.open);
                warp.groups.push_back(group);
            }
            Stmt::CpWait(left) => self.wait(index, *left as usize)?,
            Stmt::Barrier | Stmt::LastOf { .. } => {
                self.full(index)?;
                self.warps[index].status = Status::AtBarrier;
            }
            Stmt::SyncWarp => {
                self.full(index)?;
                self.warps[index].clock[index] += 1;
            }
            Stmt::ShuffleXor { to, from, mask } => {
                self.full(index)?;
                let warp = &mut self.warps[index];
                let values = warp.all(*from);
                warp.put(*to, std::array::from_fn(|lane| values[lane ^ *mask as usize]));
            }
            Stmt::Mma { kind, acc, a, b } => self.mma(index, *kind, acc, a, b)?,
            Stmt::BarInit { at, count } => self.bar_init(index, *at, *count)?,
            Stmt::BarFence => self.bars.fence(index),
            Stmt::BarExpect { at, bytes } => self.bar_arrive(index, *at, *bytes)?,
            Stmt::BarArrive { at } => self.bar_arrive(index, *at, 0)?,
            Stmt::BarWait { at, parity } => self.bar_wait(index, *at, *parity)?,
            Stmt::BulkCopy { to, buffer, at, bytes, barrier } => {
                self.bulk_copy(index, *to, *buffer, *at, *bytes, *barrier)?;
            }
            Stmt::ProxyFence => self.shared.proxy_fence(index),
            Stmt::Registers { .. } => self.full(index)?,
            Stmt::GroupFence => {
                self.full(index)?;
                self.warps[index].group.fence();
            }
            Stmt::GroupMma { kind, acc, a, b, fresh } => self.group_mma(index, *kind, acc, *a, *b, *fresh)?,
            Stmt::GroupCommit => {
                self.full(index)?;
                self.warps[index].group.commit();
            }
            Stmt::GroupWait { left, acc } => self.group_wait(index, *left as usize, acc)?,
        }
        Ok(())
    }

    /// Refuses to go on without all lanes.
    pub(super) fn full(&self, index: usize) -> Result<(), String> {
        match self.warps[index].mask {
            u32::MAX => Ok(()),
            mask => Err(format!("only lanes {mask:#010x} reach a step of the whole warp")),
        }
    }

    fn eval(&self, index: usize, expr: Expr) -> Lanes {
        let warp = &self.warps[index];
        match expr {
            Expr::Thread => std::array::from_fn(|lane| (index * WARP as usize + lane) as u64),
            Expr::BlockX => [self.at[0].into(); WARP as usize],
            Expr::BlockY => [self.at[1].into(); WARP as usize],
            Expr::Scalar(i) => [self.scalars[i as usize].into(); WARP as usize],
            Expr::Unary(op, a) => warp.all(a).map(|a| fold::unary_bits(op, a)),
            Expr::Binary(op, a, b) => {
                let (a, b) = (warp.all(a), warp.all(b));
                std::array::from_fn(|i| fold::binary_bits(op, a[i], b[i]))
            }
            Expr::Ternary(op, a, b, c) => {
                let (a, b, c) = (warp.all(a), warp.all(b), warp.all(c));
                std::array::from_fn(|i| fold::ternary_bits(op, a[i], b[i], c[i]))
            }
        }
    }

    /// The bytes of a buffer that a lane reads.
    pub(super) fn global(&self, buffer: u32, at: u64, bytes: u32, aligned: u32) -> Result<&[u8], String> {
        let desc = &self.program.kernel.buffers[buffer as usize];
        let data = &self.memory.buffers[buffer as usize].data;
        let place = || format!("{bytes} bytes of `{}` at {at}", desc.name);
        // A copy of no bytes touches no memory, wherever it points.
        if bytes == 0 {
            return Ok(&[]);
        }
        match desc.access {
            Access::Write => return Err(format!("{}: it is an output", place())),
            Access::Counters => return Err(format!("{}: it is for counting", place())),
            Access::Read | Access::ReadBeforeWrite | Access::Update | Access::Scratch => {}
        }
        if !at.is_multiple_of(aligned.into()) {
            return Err(format!("{}: not aligned", place()));
        }
        let end = at.checked_add(bytes.into()).filter(|&end| end <= data.len() as u64);
        let Some(end) = end else { return Err(format!("{}: it has {}", place(), data.len())) };
        let range = at as usize..end as usize;
        match desc.access {
            Access::Update if self.memory.buffers[buffer as usize].written[range.clone()].contains(&true) => {
                return Err(format!("{}: it was written before", place()));
            }
            Access::Scratch => self
                .memory
                .between
                .read(buffer, range, self.number)
                .map_err(|why| format!("{}: {why}", place()))?,
            _ => {}
        }
        Ok(&data[at as usize..][..bytes as usize])
    }

    fn load(&mut self, index: usize, to: &[Reg], mem: Mem, at: Addr, bytes: u32) -> Result<(), String> {
        let at = self.warps[index].offsets(at);
        let mask = self.warps[index].mask;
        if mem == Mem::Shared {
            self.count_conflicts(mask, &at, bytes);
        }
        for lane in lanes(mask) {
            let mut words = [0u8; 16];
            let data = match mem {
                Mem::Global(buffer) => {
                    self.memory.counts.bytes_read += u64::from(bytes);
                    self.global(buffer, at[lane], bytes, bytes)?
                }
                Mem::Shared => {
                    let who = Who { warp: index, lane: lane as u32, clock: &self.warps[index].clock };
                    self.shared.read(who, at[lane], bytes)?
                }
            };
            words[..bytes as usize].copy_from_slice(data);
            for (to, word) in to.iter().zip(words.chunks_exact(4)) {
                let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                self.warps[index].regs[to.0 as usize][lane] = word.into();
            }
        }
        Ok(())
    }

    fn store(&mut self, index: usize, mem: Mem, at: Addr, from: &[Val], bytes: u32) -> Result<(), String> {
        let at = self.warps[index].offsets(at);
        let mask = self.warps[index].mask;
        if mem == Mem::Shared {
            self.count_conflicts(mask, &at, bytes);
        }
        for lane in lanes(mask) {
            let warp = &self.warps[index];
            let words: Vec<u8> =
                from.iter().flat_map(|&v| (warp.get(v, lane) as u32).to_le_bytes()).collect();
            let data = &words[..bytes as usize];
            match mem {
                Mem::Global(ref buffer) => {
                    let desc = &self.program.kernel.buffers[*buffer as usize];
                    let out = &mut self.memory.buffers[*buffer as usize];
                    let place = || format!("{bytes} bytes of `{}` at {}", desc.name, at[lane]);
                    if !matches!(desc.access, Access::Write | Access::Update | Access::Scratch) {
                        return Err(format!("{}: it is an input", place()));
                    }
                    if !at[lane].is_multiple_of(bytes.into()) {
                        return Err(format!("{}: not aligned", place()));
                    }
                    let end = at[lane].checked_add(bytes.into()).filter(|&e| e <= out.data.len() as u64);
                    let Some(end) = end else {
                        return Err(format!("{}: it has {}", place(), out.data.len()));
                    };
                    let range = at[lane] as usize..end as usize;
                    if desc.access == Access::Scratch {
                        let claimed = self.memory.between.write(*buffer, range.clone(), self.number);
                        claimed.map_err(|why| format!("{}: {why}", place()))?;
                    } else if out.written[range.clone()].contains(&true) {
                        return Err(format!("{}: written twice", place()));
                    }
                    out.written[range.clone()].fill(true);
                    out.data[range].copy_from_slice(data);
                }
                Mem::Shared => {
                    let who = Who { warp: index, lane: lane as u32, clock: &warp.clock };
                    self.shared.write(who, at[lane], data)?;
                }
            }
        }
        Ok(())
    }

    fn copy(
        &mut self,
        index: usize,
        to: Addr,
        buffer: u32,
        at: Addr,
        bytes: u32,
        valid: Val,
    ) -> Result<(), String> {
        let (to, at, valid) =
            (self.warps[index].offsets(to), self.warps[index].offsets(at), self.warps[index].all(valid));
        for lane in lanes(self.warps[index].mask) {
            let valid = valid[lane] as u32;
            if valid > bytes {
                return Err(format!("lane {lane} copies {valid} bytes of at most {bytes}"));
            }
            let mut data = vec![0; bytes as usize];
            self.memory.counts.bytes_read += u64::from(valid);
            data[..valid as usize].copy_from_slice(self.global(buffer, at[lane], valid, bytes)?);
            let warp = &self.warps[index];
            let who = Who { warp: index, lane: lane as u32, clock: &warp.clock };
            self.shared.start_copy(who, to[lane], bytes)?;
            self.warps[index].open.push(Copy { lane: lane as u32, to: to[lane], data });
        }
        Ok(())
    }

    fn wait(&mut self, index: usize, left: usize) -> Result<(), String> {
        self.full(index)?;
        while self.warps[index].groups.len() > left {
            let group = self.warps[index].groups.pop_front().unwrap_or_default();
            for copy in group {
                let who = Who { warp: index, lane: copy.lane, clock: &self.warps[index].clock };
                self.shared.end_copy(who, copy.to, &copy.data);
            }
        }
        Ok(())
    }

    /// Counts how often banks are asked for different words at once. Banks are 32, of 4 bytes; wide accesses go by
    /// quarters or halves of a warp.
    fn count_conflicts(&mut self, mask: u32, at: &Lanes, bytes: u32) {
        let together = match bytes {
            16 => 8,
            8 => 16,
            _ => 32,
        };
        for first in (0..WARP as usize).step_by(together) {
            let mut words: Vec<u64> = lanes(mask)
                .filter(|lane| (first..first + together).contains(lane))
                .flat_map(|lane| (0..u64::from(bytes.div_ceil(4))).map(move |i| at[lane] / 4 + i))
                .collect();
            words.sort_unstable();
            words.dedup();
            let mut per_bank = [0u64; 32];
            for word in &words {
                per_bank[(word % 32) as usize] += 1;
            }
            let need = per_bank.iter().copied().max().unwrap_or(0);
            self.memory.counts.shared_wavefronts += need;
            self.memory.counts.bank_conflicts += need.saturating_sub((words.len() as u64).div_ceil(32));
        }
    }
}
