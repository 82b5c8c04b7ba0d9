//! Times of attention: of one token for each sequence over long caches, bound by their bytes, and of prompts, bound by products.
//!
//! What is timed is checked too: some tokens of it, with all heads.

use crate::ceilings::Ceilings;
use crate::correctness::{POISON, workspace};
use crate::cublas::Numbers;
use crate::device::{Device, Fault, Held, Time};
use crate::inputs::{self};
use crate::kernel::{Asked, Packed, Ready};
use crate::parts::{Part, Verdict};
use crate::random::{Num, ROTATED, Random};
use crate::reference::{self, CacheAt, Wanted};
use crate::report::{Table, judged, percent};
use crate::torch::Torch;
use quantc::ir::diag::Result;
use quantc_codegen::cpu::attention::AttentionSpec;
use quantc_codegen::cpu::cache::{CacheTy, Role};
use quantc_codegen::cuda::attention::AttentionCall;
use quantc_codegen::cuda::cache::PAGE;
use quantc_codegen::cuda::plan;
use quantc_codegen::eexpr::MemTy;

/// A kernel and its calls.
struct Row {
    ty: CacheTy,
    asked: Asked,
    /// Tokens of a call.
    tokens: u32,
    /// Keys that the last token of each sequence sees.
    keys: u32,
}

/// Heads of Llama 3 8B.
const HEADS: (u32, u32, u32) = (32, 8, 128);

/// Keys of a sequence.
const CONTEXT: u32 = 8192;

/// Sequences side by side.
const BATCHES: [u32; 4] = [1, 8, 32, 64];

/// Tokens of prompts.
const PROMPTS: [u32; 3] = [512, 2048, 8192];

fn spec(ty: CacheTy, context: u32) -> AttentionSpec {
    let (heads, kv_heads, d) = HEADS;
    AttentionSpec::cached(heads, kv_heads, d, 1.0 / (d as f32).sqrt(), ty, context)
}

/// What is timed: bf16 first, which the others are compared with.
fn table(small: bool) -> Vec<Row> {
    let mut list = vec![];
    let context = if small { 256 } else { CONTEXT };
    for &tokens in if small { &BATCHES[..1] } else { &BATCHES[..] } {
        for ty in [CacheTy::Bf16, CacheTy::I8, CacheTy::E4m3] {
            let call = AttentionCall::plain(spec(ty, context), true);
            // The class of calls that engines have it in.
            let rows = [1, 8, 16, 32, 64].into_iter().find(|&most| most >= tokens).unwrap_or(tokens);
            let asked = Asked::Decode { call, rows, context };
            list.push(Row { ty, asked, tokens, keys: context });
        }
    }
    for &tokens in if small { &[][..] } else { &PROMPTS[..] } {
        for ty in [CacheTy::Bf16, CacheTy::I8, CacheTy::E4m3] {
            let asked = Asked::Prefill(AttentionCall::plain(spec(ty, context), true));
            list.push(Row { ty, asked, tokens, keys: tokens });
        }
    }
    list
}

impl Row {
    fn single(&self) -> bool {
        matches!(self.asked, Asked::Decode { .. })
    }

    /// Sequences of a call.
    fn slots(&self) -> u32 {
        if self.single() { self.tokens } else { 1 }
    }

    /// Slot and position of a token.
    fn place(&self, token: u32) -> (u32, u32) {
        if self.single() { (token, self.keys - 1) } else { (0, token) }
    }

    fn slot_rows(&self) -> u32 {
        match &self.asked {
            Asked::Decode { context, .. } => *context,
            _ => CONTEXT,
        }
    }

    /// Bytes of keys or of values that a call reads, without scales.
    fn state(&self) -> u64 {
        let (_, kv_heads, d) = HEADS;
        plan::state_row_bytes(self.ty, kv_heads, d) * u64::from(self.slot_rows()) * u64::from(self.slots())
    }

    /// Bytes of their scales.
    fn scales(&self) -> u64 {
        let each = 4 * u64::from(self.slot_rows() * self.slots()) * u64::from(HEADS.1);
        if self.ty.is_scaled() { each } else { 0 }
    }
}

/// Least bytes of a cache for which a share of bandwidth is wanted: fewer are read while a launch begins and ends.
const LARGE: u64 = 64 << 20;

/// Shares that are wanted: of the rate of reading, and of the time with a cache of bf16.
const WANTED: (f64, f64) = (0.75, 1.7);

/// Its kernels.
pub fn kernels(small: bool) -> Vec<Asked> {
    table(small).into_iter().map(|row| row.asked).collect()
}

/// Times the kernels of the table.
pub fn run(part: &Part<'_>, packed: &Packed) -> Result<Verdict> {
    let ceilings = Ceilings::read(part.scratch, &packed.target.gpu);
    let torch = Torch::read(part.scratch);
    let mut device = Device::open(packed)?;
    let note = format!(
        "32 heads of 128 columns, 8 of keys. Single tokens see {CONTEXT} keys; their share is of the rate of reading, that of \
         prompts of bf16 products. {}",
        ceilings.note()
    );
    let columns = [
        "call",
        "cache",
        "us",
        "±",
        "GB/s",
        "T/s",
        "share",
        "times bf16",
        "PyTorch us",
        "wanted",
        "",
        "error",
    ];
    let mut table = Table::new(part, "Attention", &note, &columns);
    // By tokens; a part that goes on in another process measures bf16 again.
    let mut bf16: Option<(u32, f64)> = None;
    for (i, row) in self::table(part.small).into_iter().enumerate() {
        let Some(kernel) = packed.find(&row.asked) else { continue };
        table.each(i, |say| {
            let (time, error) = measure(&row, kernel, &mut device)?;
            if row.ty == CacheTy::Bf16 {
                bf16 = Some((row.tokens, time.us));
            }
            let ratio = bf16.filter(|(tokens, _)| *tokens == row.tokens).map(|(_, us)| us / time.us);
            let (heads, _, d) = HEADS;
            let pairs = match row.single() {
                true => f64::from(row.tokens) * f64::from(row.keys),
                false => f64::from(row.tokens) * f64::from(row.tokens + 1) / 2.0,
            };
            let rate = 4.0 * pairs * f64::from(heads * d) / time.us / 1e6;
            let bytes = 2 * (row.state() + row.scales());
            let read = bytes as f64 / time.us / 1e3;
            let share =
                if row.single() { read / ceilings.read } else { rate / 2.0 / ceilings.tmac(Numbers::Bf16) };
            let mut wants = vec![];
            if row.single() && bytes >= LARGE {
                wants.push((percent(WANTED.0), Some(share >= WANTED.0)));
                if row.ty != CacheTy::Bf16 {
                    wants.push((format!("{} times bf16", WANTED.1), ratio.map(|r| r >= WANTED.1)));
                }
            }
            let met = wants.iter().filter_map(|(_, met)| *met).all(|met| met);
            let words: Vec<&str> = wants.iter().map(|(what, _)| what.as_str()).collect();
            let beside = if row.single() { None } else { torch.attention(row.tokens) };
            say(vec![
                if row.single() {
                    format!("{} sequences, a token each", row.tokens)
                } else {
                    format!("{} tokens", row.tokens)
                },
                row.ty.name().into(),
                format!("{:.1}", time.us),
                percent(time.spread),
                if row.single() { format!("{read:.0}") } else { String::new() },
                format!("{rate:.0}"),
                percent(share),
                ratio.map_or(String::new(), |r| format!("{r:.2}")),
                beside.map_or(String::new(), |us| format!("{us:.1}")),
                words.join(", "),
                if wants.is_empty() { String::new() } else { judged(met) },
                format!("{error:.0e}"),
            ]);
            Ok(())
        })?;
    }
    Ok(table.finish())
}

/// Bytes of random numbers that caches repeat: no multiple of a page's, so that one page in another's place shows.
const PIECE: usize = (1 << 20) + 4096;

fn measure(row: &Row, kernel: &Ready, device: &mut Device<'_>) -> std::result::Result<(Time, f64), Fault> {
    let mut random = Random(u64::from(row.tokens) << 8 | row.ty as u64);
    let (heads, kv_heads, d) = HEADS;
    let tokens = row.tokens;
    // Queries so large that a few keys weigh most, and numbers that bf16 has.
    let q = random.numbers(MemTy::Bf16, (tokens * heads * d) as usize);
    let q = Num::Of(MemTy::Bf16).all(&q).into_iter().map(|x| 8.0 * x as f32);
    let q: Vec<u8> = q.flat_map(f32::to_le_bytes).collect();
    let numbers = inputs::cache_numbers(&mut random, row.ty, PIECE / row.ty.bytes() as usize);
    let scale = |random: &mut Random| (0.004 + random.float().abs() * 0.02).to_le_bytes();
    let scales: Vec<u8> = (0..PIECE / 4).flat_map(|_| scale(&mut random)).collect();
    let mut held = Held::load(device, kernel)?;
    let pages = (row.slots() * row.slot_rows() / PAGE) as usize;
    let table: Vec<u32> = (0..pages as u32).rev().collect();
    let words = |list: Vec<u32>| -> Vec<u8> { list.into_iter().flat_map(u32::to_le_bytes).collect() };
    let positions = words((0..tokens).map(|i| row.place(i).1).collect());
    let bases = words((0..tokens).map(|i| row.place(i).0 * row.slot_rows()).collect());
    let [q_at, positions, bases, pages] =
        [&q, &positions, &bases, &words(table.clone())].map(|bytes| held.upload(bytes));
    let (q_at, positions, bases, pages) = (q_at?, positions?, bases?, pages?);
    let each = 2 * (row.state() + row.scales());
    let copies = if row.single() { ROTATED.div_ceil(each).clamp(2, 16) } else { 1 };
    let mut caches = vec![];
    for _ in 0..copies {
        let mut cache = vec![];
        for _ in 0..2 {
            cache.push(held.repeated(row.state(), &numbers)?);
        }
        for _ in 0..if row.ty.is_scaled() { 2 } else { 0 } {
            cache.push(held.repeated(row.scales(), &scales)?);
        }
        caches.push(cache);
    }
    let out_bytes = u64::from(tokens * heads * d) * 4;
    let out = held.filled(out_bytes, POISON)?;
    let extra = workspace(&mut held, kernel, tokens)?;
    let buffers = |cache: &[u64]| -> Vec<u64> {
        let (states, scales) = cache.split_at(2);
        [q_at]
            .iter()
            .chain(states)
            .chain(&[positions, bases, pages])
            .chain(scales)
            .chain(&[out])
            .chain(&extra)
            .copied()
            .collect()
    };
    held.launch(kernel, &buffers(&caches[0]), tokens, tokens)?;
    held.wait()?;
    // Keys and values hold the same numbers; two tokens are compared, of long prompts early ones, which cost less.
    let at = [Role::Keys, Role::Values].map(|role| CacheAt::new(row.ty, role, kv_heads, d));
    let num = inputs::cache_num(row.ty);
    let queries = Num::Of(MemTy::F32).all(&q);
    let attention = spec(row.ty, row.slot_rows());
    let mut worst = 0f64;
    for token in [0, random.below(tokens)] {
        let (slot, position) = row.place(token);
        let number = |which: usize, i: u32, head: u32, c: u32| {
            let line = slot * row.slot_rows() + i;
            let (page, in_page) = (table[(line / PAGE) as usize], line % PAGE);
            let from = at[which].byte(page, head, in_page, c) % PIECE;
            let v = num.read(&numbers[from..from + num.bytes()]);
            let scale = at[which].scale(page, head, in_page) * 4 % PIECE;
            if row.ty.is_scaled() { v * Num::Of(MemTy::F32).read(&scales[scale..scale + 4]) } else { v }
        };
        let q = &queries[(token * heads * d) as usize..];
        let (numbers, largest) = reference::attend(&attention, q, position, tokens, &number);
        let wanted = Wanted { numbers, relative: 0.0, absolute: largest * reference::ATTENDED };
        let width = (heads * d) as usize * 4;
        let bytes = held.download(out + u64::from(token) * width as u64, width)?;
        let error = wanted.compare(&Num::Of(MemTy::F32).all(&bytes), |_| true);
        worst = worst.max(error.map_err(|what| {
            Fault::Wrong(format!(
                "attention of {tokens} tokens, cache of {}, token {token}: {what}",
                row.ty.name()
            ))
        })?);
    }
    let count = Held::launches(caches.len(), row.single());
    let time = held.time(count, &mut |held, i| {
        held.launch(kernel, &buffers(&caches[i % caches.len()]), tokens, tokens)
    })?;
    Ok((time, worst))
}
