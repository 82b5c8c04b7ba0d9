//! Runs an engine: a session holds the memory and threads of one conversation, or of several side by side.
//!
//! A session has `slots` sequences. Each slot remembers its tokens in the engine's states, up to `context` of them.
//! [`Session::step`] is the one way kernels are run: a batch of tokens, each with its slot and position, gives rows of
//! results. [`prefill`](Session::prefill), [`decode`](Session::decode), [`decode_batch`](Session::decode_batch),
//! [`score`](Session::score) and [`encode`](Session::encode) are made of steps.
//!
//! What holds:
//! - Everything is allocated by [`Session::new`]; a step allocates nothing.
//! - Nothing runs before the whole call has been checked: a refused call changes neither states nor positions.
//! - Results do not depend on the number of threads, because work items are independent of each other.
//! - A step reads only state rows that were written since the slot's last [`reset`](Session::reset): positions have no
//!   gaps.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::engine::Engine;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    CHOICE_BYTES, Input, Items, Kind, Launch, Manifest, NO_BARRIER_AFTER, REPLICATED, Ref, RefKind, Tap,
    slot_rows,
};
use crate::gpu;
use crate::mem::{Mapping, PAGE};
use crate::object::KernelFn;
use crate::pool::{Pool, PoolOptions};
use crate::sample::Sampler;
use crate::share::Shares;
use crate::stats;

/// How to make a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Workers, the caller included; 0 means one for each CPU this process may use.
    pub threads: usize,
    /// Workers of steps with one token, which mostly wait for memory; at most `threads`, 0 means all of them.
    pub decode_threads: usize,
    /// Sequences side by side.
    pub slots: u32,
    /// Tie the workers to CPUs.
    pub pin: bool,
    /// Fill arena and scratch with NaN before every step, so that a read of something never written shows.
    pub poison: bool,
    /// Measure the time of every launch; see [`Session::profile`].
    pub profile: bool,
    /// On a GPU, pages of 64 tokens that the sequences share; 0 for as many as all of them can fill. Sequences take pages as
    /// they grow, so fewer serve sequences that are not all long. On a processor memory is taken as it is touched.
    pub pages: u32,
}

impl Default for SessionOptions {
    fn default() -> SessionOptions {
        SessionOptions {
            threads: 0,
            decode_threads: 0,
            slots: 1,
            pin: false,
            poison: false,
            profile: false,
            pages: 0,
        }
    }
}

/// A batch of tokens; all slices have the same length.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Token ids.
    pub tokens: &'a [u32],
    /// Position of each token in its slot. Tokens of one slot come in ascending order without gaps; the first is at
    /// most the slot's position (a smaller one forgets what came after).
    pub positions: &'a [u32],
    /// Slot of each token.
    pub slots: &'a [u32],
    /// How many result rows are wanted: those of the last tokens. 0 only updates the states.
    pub rows: usize,
}

/// Time spent in launches of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfileRow {
    /// The launches' name.
    pub name: String,
    /// The first such launch's kernel.
    pub symbol: String,
    /// How often such a launch ran.
    pub calls: u64,
    /// Time from the end of the launch before, with all workers, in nanoseconds.
    pub nanos: u64,
    /// Time inside kernels, the sum over all workers, in nanoseconds. Over launches that end at a barrier, what is
    /// missing to `nanos` times the number of workers was spent waiting for other workers.
    pub busy_nanos: u64,
}

/// What a tap sees: name, rows, width and `rows * width` values.
pub type TapFn<'a> = dyn FnMut(&str, usize, usize, &[f32]) + 'a;

/// Memory and threads to run an engine with; see the module.
pub struct Session {
    pool: Pool,
    /// Workers of steps with one token.
    decode_threads: usize,
    programs: Vec<Prepared>,
    arena: Mapping,
    scratch: Mapping,
    inputs: Mapping,
    /// Read by kernels through the pointer tables only.
    states: Vec<Mapping>,
    /// Whether huge pages have been asked for.
    huge: bool,
    /// Byte offset of the result in the arena.
    output: usize,
    /// Tokens each slot holds.
    positions: Vec<u32>,
    /// Position each slot must go on with inside the batch being checked; [`NOT_SEEN`] before its first token.
    expected: Vec<u32>,
    /// Positions and slots of the batches that `prefill` and the like make.
    batch_positions: Vec<u32>,
    batch_slots: Vec<u32>,
    /// Segments of the tokens of the next step; 0 where it is shorter.
    types: Vec<u32>,
    /// How a GPU is to choose a token for each row of the next step that has so many rows; and the tokens it chose.
    choices: Vec<u8>,
    chosen: Vec<u8>,
    poison: bool,
    profile: bool,
    /// How long weights may be moved before the next step; nothing moves before the first.
    move_for: Option<Duration>,
    /// What the session has on a GPU, when kernels run there. Then `arena` and `inputs` are copies, made of what goes there
    /// and what comes back; there are no states, and no programs for workers.
    gpu: Option<gpu::Memory>,
    /// Kernels and weights the tables point to; dropped last.
    engine: Arc<Engine>,
}

const NOT_SEEN: u32 = u32::MAX;

/// Most tokens of a first step that makes do with small pages.
const FEW_TOKENS: u32 = 64;
/// Longest that weights are moved before one step.
const MOVE_AT_MOST: Duration = Duration::from_millis(10);
/// Weights are moved for this part of the time that steps take, so that short texts lose little by it.
const MOVE_PART: u32 = 4;

/// A program with all addresses known.
struct Prepared {
    launches: Vec<PreparedLaunch>,
    /// For each worker, the buffers of all launches.
    tables: Vec<Vec<*mut u8>>,
}

struct PreparedLaunch {
    kernel: KernelFn,
    /// Where the launch's buffers begin in a worker's table.
    first_arg: usize,
    items: Items,
    barrier_after: bool,
    /// Every worker runs all items, into memory of its own.
    replicated: bool,
    /// Who does which items.
    shares: Shares,
    calls: AtomicU64,
    nanos: AtomicU64,
    busy_nanos: AtomicU64,
}

// SAFETY: the tables point into mappings that the session or its engine owns; a session is used by one thread at a time
// (`&mut self`) and may move between threads.
unsafe impl Send for Session {}
// SAFETY: with `&Session` one can only read positions, times and the result; kernels run under `&mut Session`.
unsafe impl Sync for Session {}

impl Session {
    /// Allocates memory and starts threads.
    pub fn new(engine: Arc<Engine>, options: &SessionOptions) -> Result<Session> {
        let on_gpu = engine.manifest().gpu.is_some();
        let cpus = if on_gpu { 1 } else { stats::available_cpus() };
        let threads = if options.threads == 0 || on_gpu { cpus } else { options.threads };
        let decode_threads = if on_gpu { 1 } else { options.decode_threads };
        let options = &SessionOptions { decode_threads, ..*options };
        let decode_threads = if options.decode_threads == 0 { threads } else { options.decode_threads };
        if decode_threads > threads {
            let what = format!(
                "{decode_threads} threads for single tokens are more than the {threads} of the session"
            );
            return Err(Error::input(what));
        }
        let manifest = engine.manifest();
        let mut sizes = Sizes::of(manifest, options.slots, threads)?;
        let gpu = match on_gpu {
            true => {
                sizes.states.clear();
                let loaded = engine.load(&mut |_, _| {})?;
                Some(gpu::Memory::new(loaded, manifest, options.slots, options.pages, options.profile)?)
            }
            false => None,
        };
        // Copies of what is on a GPU take pages of memory only where something is looked at.
        if !on_gpu {
            sizes.check_available(manifest, options.slots, threads)?;
        }
        let pool = Pool::new(threads, PoolOptions { pin: options.pin })?;
        let map = Mapping::new;
        let arena = map(sizes.arena, "the arena")?;
        let scratch = map(sizes.scratch * threads, "scratch")?;
        let inputs = map(sizes.input * 4, "inputs")?;
        let states =
            sizes.states.iter().map(|&bytes| map(bytes, "a state")).collect::<Result<Vec<Mapping>>>()?;
        let memory =
            Memory { arena: &arena, scratch: &scratch, inputs: &inputs, states: &states, sizes: &sizes };
        let prepared = if on_gpu { 0 } else { manifest.programs.len() };
        let programs = (0..prepared).map(|index| memory.prepare(&engine, index, threads)).collect();
        let output = match manifest.output.kind {
            Some(RefKind::Arena(offset)) => offset as usize,
            _ => return Err(Error::format("the result does not lie in the arena")),
        };
        let (max_tokens, max_rows) = (manifest.max_tokens as usize, manifest.max_rows as usize);
        Ok(Session {
            pool,
            decode_threads,
            programs,
            arena,
            scratch,
            inputs,
            states,
            huge: false,
            output,
            positions: vec![0; options.slots as usize],
            expected: vec![NOT_SEEN; options.slots as usize],
            batch_positions: Vec::with_capacity(max_tokens),
            batch_slots: Vec::with_capacity(max_tokens),
            types: Vec::with_capacity(max_tokens),
            choices: Vec::with_capacity(if on_gpu { max_rows * CHOICE_BYTES as usize } else { 0 }),
            chosen: Vec::with_capacity(if on_gpu { max_rows * 4 } else { 0 }),
            poison: options.poison,
            profile: options.profile,
            move_for: None,
            gpu,
            engine,
        })
    }

    /// The engine this session runs.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The GPU that runs the kernels, where one does.
    pub fn device(&self) -> Option<&gpu::Device> {
        self.gpu.as_ref().map(gpu::Memory::device)
    }

    /// How many workers there are.
    pub fn threads(&self) -> usize {
        self.pool.workers()
    }

    /// How many of them run steps with one token.
    pub fn decode_threads(&self) -> usize {
        self.decode_threads
    }

    /// How many sequences there are.
    pub fn slots(&self) -> u32 {
        self.positions.len() as u32
    }

    /// How many tokens `slot` holds; 0 for a slot that does not exist.
    pub fn position(&self, slot: u32) -> u32 {
        self.positions.get(slot as usize).copied().unwrap_or(0)
    }

    /// Forgets everything in `slot`.
    pub fn reset(&mut self, slot: u32) -> Result<()> {
        self.truncate(slot, 0)
    }

    /// Forgets everything in `slot` after its first `len` tokens.
    pub fn truncate(&mut self, slot: u32, len: u32) -> Result<()> {
        let held = self.held(slot)?;
        if len > held {
            return Err(Error::input(format!(
                "slot {slot} holds {held} tokens, fewer than the {len} to keep"
            )));
        }
        self.positions[slot as usize] = len;
        if let Some(gpu) = &mut self.gpu {
            gpu.cut(slot, len);
        }
        Ok(())
    }

    /// On a GPU, the pages that no sequence has, and all pages.
    pub fn free_pages(&self) -> Option<(u32, u32)> {
        self.gpu.as_ref().map(gpu::Memory::free_pages)
    }

    /// Whether tokens are chosen where the kernels run, so that no logits are copied; see [`Session::decode_next`].
    pub fn chooses(&self) -> bool {
        let manifest = self.engine.manifest();
        self.gpu.is_some() && manifest.gpu.as_ref().is_some_and(|gpu| !gpu.sampler.is_empty())
    }

    /// Appends `tokens` to `slot` as [`Session::prefill`] does; returns the token that `sampler` chooses next.
    pub fn prefill_next(&mut self, slot: u32, tokens: &[u32], sampler: &mut Sampler) -> Result<u32> {
        if !self.chooses() {
            return sampler.sample(self.prefill(slot, tokens, 1)?);
        }
        self.choosing(std::slice::from_mut(sampler), |session| session.prefill(slot, tokens, 1).map(|_| ()))?;
        self.chosen(0)
    }

    /// Appends one token to `slot`; returns the token that `sampler` chooses next.
    ///
    /// On a GPU the token is chosen there, and nothing else comes back; how choices differ from those of
    /// [`Sampler::sample`] is told in `docs/gpu.md`.
    pub fn decode_next(&mut self, slot: u32, token: u32, sampler: &mut Sampler) -> Result<u32> {
        if !self.chooses() {
            return sampler.sample(self.decode(slot, token)?);
        }
        self.choosing(std::slice::from_mut(sampler), |session| session.decode(slot, token).map(|_| ()))?;
        self.chosen(0)
    }

    /// Appends one token to each of several slots at once; puts the token that each one's sampler chooses next in place of
    /// it.
    pub fn decode_batch_next(
        &mut self,
        slots: &[u32],
        tokens: &mut [u32],
        samplers: &mut [Sampler],
    ) -> Result<()> {
        if tokens.len() != slots.len() || samplers.len() != slots.len() {
            let (slots, tokens, samplers) = (slots.len(), tokens.len(), samplers.len());
            return Err(Error::input(format!(
                "{slots} slots, {tokens} tokens and {samplers} samplers do not match"
            )));
        }
        if !self.chooses() {
            let width = self.engine.manifest().vocab as usize;
            let rows = self.decode_batch(slots, tokens)?;
            for ((token, row), sampler) in tokens.iter_mut().zip(rows.chunks_exact(width)).zip(samplers) {
                *token = sampler.sample(row)?;
            }
            return Ok(());
        }
        self.choosing(samplers, |session| session.decode_batch(slots, tokens).map(|_| ()))?;
        for (row, token) in tokens.iter_mut().enumerate() {
            *token = self.chosen(row)?;
        }
        Ok(())
    }

    /// Does something after which a GPU chooses a token for each sampler.
    fn choosing(
        &mut self,
        samplers: &mut [Sampler],
        run: impl FnOnce(&mut Session) -> Result<()>,
    ) -> Result<()> {
        self.choices.clear();
        samplers.iter_mut().for_each(|sampler| self.choices.extend(sampler.choice()));
        let done = run(self);
        self.choices.clear();
        done
    }

    /// The token that a GPU chose for a row.
    fn chosen(&self, row: usize) -> Result<u32> {
        let word = self.chosen.get(row * 4..row * 4 + 4).and_then(|word| <[u8; 4]>::try_from(word).ok());
        word.map(u32::from_le_bytes)
            .filter(|&token| token < self.engine.manifest().vocab)
            .ok_or_else(|| Error::input("no logit is a number; the engine's result is broken"))
    }

    /// Runs one batch; returns `rows * vocab` numbers.
    pub fn step(&mut self, step: Step<'_>) -> Result<&[f32]> {
        self.run_step(step, None)
    }

    /// Like [`Session::step`], and calls `tap` with every value that the manifest names, in order.
    ///
    /// Workers stop between launches for it, so it is slower; the results are the same.
    pub fn step_tapped(&mut self, step: Step<'_>, tap: &mut TapFn<'_>) -> Result<&[f32]> {
        self.run_step(step, Some(tap))
    }

    /// Like [`Session::step`] for an engine that reads rows besides tokens: `inputs` are the manifest's `row_inputs` in
    /// order, `tokens * width` numbers each. [`Session::row_output`] then gives its further outputs.
    pub fn step_with(&mut self, step: Step<'_>, inputs: &[&[f32]]) -> Result<&[f32]> {
        let wanted = &self.engine.manifest().row_inputs;
        if inputs.len() != wanted.len() {
            let what = format!("{} inputs of rows; the engine has {}", inputs.len(), wanted.len());
            return Err(Error::input(what));
        }
        for (rows, given) in wanted.iter().zip(inputs) {
            let numbers = step.tokens.len() * rows.width as usize;
            if given.len() != numbers {
                let what = format!("input {:?} has {} numbers, expected {numbers}", rows.name, given.len());
                return Err(Error::input(what));
            }
        }
        self.run_with(step, inputs, None)?;
        Ok(self.output(step.rows))
    }

    /// The further output `index` of the last call, which had `tokens` tokens.
    pub fn row_output(&self, index: usize, tokens: usize) -> Result<&[f32]> {
        let manifest = self.engine.manifest();
        let rows = manifest.row_outputs.get(index).filter(|_| tokens <= manifest.max_tokens as usize);
        let Some(Tap { at: Ref { kind: Some(RefKind::Arena(offset)) }, width, .. }) = rows else {
            return Err(Error::input(format!("there is no output {index} of {tokens} rows")));
        };
        Ok(self.floats(*offset as usize, tokens * *width as usize))
    }

    /// Appends `tokens` to `slot`, in chunks of at most `max_tokens`; returns the results of the last `rows` of them.
    pub fn prefill(&mut self, slot: u32, tokens: &[u32], rows: usize) -> Result<&[f32]> {
        let limit = self.engine.manifest().max_tokens as usize;
        let most = tokens.len().min(self.engine.manifest().max_rows as usize);
        if rows > most {
            let what =
                format!("{rows} result rows were asked for, this prompt and engine give at most {most}");
            return Err(Error::input(what));
        }
        self.check_append(slot, tokens)?;
        let mut rest = tokens;
        while rest.len() > limit {
            // The last chunk must hold all the rows wanted; `rows <= max_rows <= max_tokens` makes this at least 1.
            let (chunk, after) = rest.split_at(limit.min(rest.len() - rows));
            self.append(slot, chunk, 0)?;
            rest = after;
        }
        self.append(slot, rest, rows)
    }

    /// Appends one token to `slot` and returns its row of results.
    pub fn decode(&mut self, slot: u32, token: u32) -> Result<&[f32]> {
        self.check_append(slot, &[token])?;
        self.append(slot, &[token], 1)
    }

    /// Appends one token to each of several slots at once; returns a row of results for each, in the same order.
    pub fn decode_batch(&mut self, slots: &[u32], tokens: &[u32]) -> Result<&[f32]> {
        for &slot in slots {
            self.held(slot)?;
        }
        if slots.len() > self.engine.manifest().max_tokens as usize {
            return Err(self.too_many_tokens(slots.len()));
        }
        let mut positions = std::mem::take(&mut self.batch_positions);
        positions.clear();
        positions.extend(slots.iter().map(|&slot| self.positions[slot as usize]));
        let done = self.run(Step { tokens, positions: &positions, slots, rows: tokens.len() }, None);
        self.batch_positions = positions;
        done?;
        Ok(self.output(tokens.len()))
    }

    /// Appends `tokens` to `slot` and calls `row(i, results)` for every one of them, in order.
    pub fn score(&mut self, slot: u32, tokens: &[u32], row: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        self.check_append(slot, tokens)?;
        let width = self.engine.manifest().vocab as usize;
        let limit = self.engine.manifest().max_rows.min(self.engine.manifest().max_tokens) as usize;
        for (index, chunk) in tokens.chunks(limit).enumerate() {
            let results = self.append(slot, chunk, chunk.len())?;
            for (offset, result) in results.chunks_exact(width).enumerate() {
                row(index * limit + offset, result);
            }
        }
        Ok(())
    }

    /// Runs a text through an encoder, whole; returns a row of `vocab` (the hidden size) numbers for each token.
    pub fn encode(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.encode_segments(tokens, &[])
    }

    /// Like [`Session::encode`] with the segment of each token; missing segments are 0.
    pub fn encode_segments(&mut self, tokens: &[u32], segments: &[u32]) -> Result<&[f32]> {
        if segments.len() > tokens.len() {
            let what = format!("{} segments for {} tokens", segments.len(), tokens.len());
            return Err(Error::input(what));
        }
        self.reset(0)?;
        self.check_append(0, tokens)?;
        self.types.clear();
        self.types.extend_from_slice(segments);
        let done = self.append(0, tokens, tokens.len()).map(|_| ());
        self.types.clear();
        done?;
        Ok(self.output(tokens.len()))
    }

    /// Runs a graph: `inputs` are the bytes of the manifest's `array_inputs`, in order. [`Session::array`] then gives its
    /// outputs.
    pub fn run_arrays(&mut self, inputs: &[&[u8]]) -> Result<()> {
        let manifest = self.engine.manifest();
        if manifest.kind() != Kind::Graph {
            return Err(Error::input("the engine takes tokens, not arrays"));
        }
        if inputs.len() != manifest.array_inputs.len() {
            let what = format!("{} arrays; the engine takes {}", inputs.len(), manifest.array_inputs.len());
            return Err(Error::input(what));
        }
        for (array, given) in manifest.array_inputs.iter().zip(inputs) {
            let bytes = array.bytes().unwrap_or(0);
            if given.len() as u64 != bytes {
                let what =
                    format!("input {:?} has {} bytes, {} has {bytes}", array.name, given.len(), array.ty());
                return Err(Error::input(what));
            }
            if array.elem == "bool" && given.iter().any(|&b| b > 1) {
                return Err(Error::input(format!("input {:?} has truth values besides 0 and 1", array.name)));
            }
        }
        if self.poison {
            self.fill_with_nan();
        }
        for (array, given) in self.engine.manifest().array_inputs.iter().zip(inputs) {
            let Some(RefKind::Arena(offset)) = array.at.kind else { continue };
            // SAFETY: the arena is never protected, and no kernel runs while `self` is borrowed here.
            let bytes = unsafe { self.arena.bytes_mut() };
            bytes[offset as usize..][..given.len()].copy_from_slice(given);
        }
        self.ask_for_huge_pages(u32::MAX);
        let Some(program) = self.programs.first() else { return Ok(()) };
        let count = program.launches.len();
        self.run_launches(0, 0..count, 1, 1)
    }

    /// The bytes of output `index` of the last [`Session::run_arrays`].
    pub fn array(&self, index: usize) -> Result<&[u8]> {
        let array = self.engine.manifest().array_outputs.get(index);
        let Some((array, RefKind::Arena(offset))) = array.and_then(|a| Some((a, a.at.kind?))) else {
            return Err(Error::input(format!("there is no output {index}")));
        };
        let bytes = array.bytes().unwrap_or(0) as usize;
        let end = offset as usize + bytes;
        assert!(end <= self.arena.len(), "the manifest was validated");
        // SAFETY: the range was just checked; kernels write the arena only while the session is borrowed mutably.
        Ok(unsafe { std::slice::from_raw_parts(self.arena.ptr().add(offset as usize), bytes) })
    }

    /// Time spent by launch name, in the order of the programs; empty unless the session was made to profile.
    pub fn profile(&self) -> Vec<ProfileRow> {
        let mut rows: Vec<ProfileRow> = Vec::new();
        let mut index_of = std::collections::BTreeMap::new();
        for (number, program) in self.engine.manifest().programs.iter().enumerate() {
            for (place, launch) in program.launches.iter().enumerate() {
                let (calls, nanos, busy_nanos) = self.measured(number, place);
                if calls == 0 {
                    continue;
                }
                let index = *index_of.entry(launch.name.as_str()).or_insert(rows.len());
                if index == rows.len() {
                    let (name, symbol) = (launch.name.clone(), launch.symbol.clone());
                    rows.push(ProfileRow { name, symbol, calls: 0, nanos: 0, busy_nanos: 0 });
                }
                rows[index].calls += calls;
                rows[index].nanos += nanos;
                rows[index].busy_nanos += busy_nanos;
            }
        }
        rows
    }

    /// Calls of a launch, nanoseconds, and those inside kernels.
    fn measured(&self, program: usize, launch: usize) -> (u64, u64, u64) {
        if let Some(gpu) = &self.gpu {
            let (calls, nanos) = gpu.time(program, launch);
            return (calls, nanos, nanos);
        }
        let launch = &self.programs[program].launches[launch];
        let [calls, nanos, busy] =
            [&launch.calls, &launch.nanos, &launch.busy_nanos].map(|n| n.load(Ordering::Relaxed));
        (calls, nanos, busy)
    }

    /// Forgets the times measured so far.
    pub fn clear_profile(&mut self) {
        if let Some(gpu) = &mut self.gpu {
            gpu.clear_times();
        }
        for launch in self.programs.iter_mut().flat_map(|program| &mut program.launches) {
            *launch.calls.get_mut() = 0;
            *launch.nanos.get_mut() = 0;
            *launch.busy_nanos.get_mut() = 0;
        }
    }

    fn held(&self, slot: u32) -> Result<u32> {
        self.positions.get(slot as usize).copied().ok_or_else(|| {
            Error::input(format!(
                "slot {slot} does not exist; the session has {} slots",
                self.positions.len()
            ))
        })
    }

    /// Checks that all of `tokens` can be appended to `slot`, before the first chunk runs.
    fn check_append(&self, slot: u32, tokens: &[u32]) -> Result<()> {
        let held = self.held(slot)?;
        let context = self.engine.manifest().context;
        if tokens.is_empty() {
            return Err(Error::input("there are no tokens"));
        }
        if tokens.len() > (context - held.min(context)) as usize {
            let what = format!(
                "slot {slot} holds {held} tokens, {} more do not fit the engine's context of {context}",
                tokens.len()
            );
            return Err(Error::input(what));
        }
        tokens.iter().try_for_each(|&token| self.check_token(token))?;
        // All of them, so that no part of a prompt runs that does not fit.
        match &self.gpu {
            Some(gpu) => gpu.check_rows(std::iter::once((slot, held + tokens.len() as u32))),
            None => Ok(()),
        }
    }

    fn check_token(&self, token: u32) -> Result<()> {
        let limit = self.engine.manifest().token_ids();
        if token >= limit {
            return Err(Error::input(format!("token {token} does not exist; the model has {limit} tokens")));
        }
        Ok(())
    }

    fn too_many_tokens(&self, given: usize) -> Error {
        let limit = self.engine.manifest().max_tokens;
        Error::input(format!("{given} tokens in one step; the engine takes 1 to {limit}"))
    }

    /// Appends one chunk, already checked, to a slot.
    fn append(&mut self, slot: u32, tokens: &[u32], rows: usize) -> Result<&[f32]> {
        if tokens.len() > self.engine.manifest().max_tokens as usize {
            return Err(self.too_many_tokens(tokens.len()));
        }
        let start = self.held(slot)?;
        // Taken out while the step borrows them; both keep their capacity.
        let mut positions = std::mem::take(&mut self.batch_positions);
        let mut slots = std::mem::take(&mut self.batch_slots);
        positions.clear();
        positions.extend((start..).take(tokens.len()));
        slots.clear();
        slots.resize(tokens.len(), slot);
        let done = self.run(Step { tokens, positions: &positions, slots: &slots, rows }, None);
        self.batch_positions = positions;
        self.batch_slots = slots;
        done?;
        Ok(self.output(rows))
    }

    fn run_step(&mut self, step: Step<'_>, tap: Option<&mut TapFn<'_>>) -> Result<&[f32]> {
        self.run(step, tap)?;
        Ok(self.output(step.rows))
    }

    fn output(&self, rows: usize) -> &[f32] {
        self.floats(self.output, rows * self.engine.manifest().vocab as usize)
    }

    /// Numbers in the arena.
    fn floats(&self, offset: usize, len: usize) -> &[f32] {
        assert!(
            offset.is_multiple_of(4) && offset + len * 4 <= self.arena.len(),
            "the manifest was validated"
        );
        // SAFETY: the range was just checked and is aligned; any bits are an f32; kernels write the arena only during
        // `run`, which borrows the session mutably.
        unsafe { std::slice::from_raw_parts(self.arena.ptr().add(offset).cast::<f32>(), len) }
    }

    /// Checks a step, runs it, and moves the slots' positions on.
    fn run(&mut self, step: Step<'_>, tap: Option<&mut TapFn<'_>>) -> Result<()> {
        if let [rows, ..] = &self.engine.manifest().row_inputs[..] {
            return Err(Error::input(format!("the engine reads the rows {:?} besides tokens", rows.name)));
        }
        self.run_with(step, &[], tap)
    }

    fn run_with(&mut self, step: Step<'_>, inputs: &[&[f32]], mut tap: Option<&mut TapFn<'_>>) -> Result<()> {
        let checked = self.check_step(step).and_then(|()| self.reserve(step));
        for &slot in step.slots {
            if let Some(expected) = self.expected.get_mut(slot as usize) {
                *expected = NOT_SEEN;
            }
        }
        checked?;
        self.write_inputs(step);
        if self.poison && self.gpu.is_none() {
            self.fill_with_nan();
        }
        self.write_rows(inputs);
        let t = step.tokens.len() as u32;
        let rows = step.rows as u32;
        let manifest = self.engine.manifest();
        let program = manifest.program_for(t).ok_or_else(|| self.too_many_tokens(t as usize))?;
        let count = manifest.programs[program].launches.len();
        if self.gpu.is_some() {
            self.run_on_gpu(program, inputs.is_empty(), t, rows, tap)?;
            self.advance(step);
            return Ok(());
        }
        self.ask_for_huge_pages(t);
        self.move_weights()?;
        let start = Instant::now();
        let Some(tap) = &mut tap else {
            self.run_launches(program, 0..count, t, rows)?;
            self.move_for = Some((start.elapsed() / MOVE_PART).min(MOVE_AT_MOST));
            self.advance(step);
            return Ok(());
        };
        for index in 0..count {
            self.run_launches(program, index..index + 1, t, rows)?;
            let launch = &self.engine.manifest().programs[program].launches[index];
            let Some(value) = &launch.tap else { continue };
            let Some(RefKind::Arena(offset)) = value.at.kind else { continue };
            let (rows, width) = (if value.of_results { rows } else { t } as usize, value.width as usize);
            tap(&value.name, rows, width, self.floats(offset as usize, rows * width));
        }
        self.advance(step);
        Ok(())
    }

    /// Sends what the step has written, runs the program, and fetches what callers look at.
    fn run_on_gpu(
        &mut self,
        program: usize,
        no_rows: bool,
        t: u32,
        rows: u32,
        tap: Option<&mut TapFn<'_>>,
    ) -> Result<()> {
        let Session { gpu: Some(gpu), arena, inputs, engine, poison, output, choices, chosen, .. } = self
        else {
            return Ok(());
        };
        let manifest = engine.manifest();
        if *poison {
            gpu.poison(manifest.arena_bytes)?;
        }
        let choose =
            tap.is_none() && !choices.is_empty() && choices.len() == rows as usize * CHOICE_BYTES as usize;
        if choose {
            gpu.send_choices(choices)?;
        }
        // SAFETY: neither mapping is ever protected, and `self` is borrowed mutably.
        let (arena, inputs) = unsafe { (arena.bytes_mut(), inputs.bytes_mut()) };
        gpu.send_inputs(&inputs[..4 * input_bytes(manifest)])?;
        let place = |at: &Ref, rows: u32, width: u32| match at.kind {
            Some(RefKind::Arena(offset)) => {
                offset as usize..offset as usize + rows as usize * width as usize * 4
            }
            _ => 0..0,
        };
        for given in manifest.row_inputs.iter().filter(|_| !no_rows) {
            let range = place(&given.at, t, given.width);
            gpu.send_rows(range.start as u64, &arena[range])?;
        }
        match tap {
            None => gpu.run(manifest, program, t, rows, choose)?,
            Some(tap) => {
                for (index, launch) in manifest.programs[program].launches.iter().enumerate() {
                    gpu.run_one(manifest, program, index, t, rows)?;
                    let Some(value) = &launch.tap else { continue };
                    let count = if value.of_results { rows } else { t };
                    let mut numbers = vec![0u8; count as usize * value.width as usize * 4];
                    gpu.fetch(&mut numbers, place(&value.at, count, value.width).start as u64)?;
                    let float = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                    let numbers: Vec<f32> = numbers.chunks_exact(4).map(float).collect();
                    tap(&value.name, count as usize, value.width as usize, &numbers);
                }
            }
        }
        if choose {
            chosen.clear();
            chosen.resize(rows as usize * 4, 0xff);
            gpu.fetch_chosen(chosen)?;
        } else {
            let results = *output..*output + rows as usize * manifest.vocab as usize * 4;
            gpu.fetch(&mut arena[results.clone()], results.start as u64)?;
        }
        for more in &manifest.row_outputs {
            let range = place(&more.at, t, more.width);
            gpu.fetch(&mut arena[range.clone()], range.start as u64)?;
        }
        Ok(())
    }

    /// Checks everything about a step that kernels rely on. Leaves marks in `expected`.
    fn check_step(&mut self, step: Step<'_>) -> Result<()> {
        let Step { tokens, positions, slots, rows } = step;
        let manifest = self.engine.manifest();
        if manifest.kind() == Kind::Graph {
            return Err(Error::input("the engine takes arrays, not tokens"));
        }
        let t = tokens.len();
        if t == 0 || t > manifest.max_tokens as usize {
            return Err(self.too_many_tokens(t));
        }
        if positions.len() != t || slots.len() != t {
            let what =
                format!("{t} tokens, {} positions and {} slots do not match", positions.len(), slots.len());
            return Err(Error::input(what));
        }
        let most = t.min(manifest.max_rows as usize);
        if rows > most {
            return Err(Error::input(format!(
                "{rows} result rows were asked for, this step gives at most {most}"
            )));
        }
        let (context, encoder) = (manifest.context, manifest.kind() == Kind::Encoder);
        // Rows of the call see each other, so that two texts in one step would mix.
        if encoder && (rows != t || slots.iter().any(|&slot| slot != slots[0])) {
            return Err(Error::input(
                "an encoder takes one text a step and gives a row for each of its tokens",
            ));
        }
        for ((&token, &position), &slot) in tokens.iter().zip(positions).zip(slots) {
            self.check_token(token)?;
            let held = self.held(slot)?;
            if position >= context {
                let what = format!(
                    "position {position} of slot {slot} is outside the engine's context of {context}"
                );
                return Err(Error::input(what));
            }
            let expected = &mut self.expected[slot as usize];
            let allowed = match *expected {
                // An encoder sees a text as a whole, from its beginning.
                NOT_SEEN if encoder => position == 0,
                NOT_SEEN => position <= held,
                next => position == next,
            };
            if !allowed {
                let what = format!(
                    "position {position} of slot {slot} leaves a gap after the {held} tokens it holds"
                );
                return Err(Error::input(what));
            }
            *expected = position + 1;
        }
        Ok(())
    }

    /// Lets the sequences of a step have the rows that it needs. The step has been checked, and its marks are still there.
    fn reserve(&mut self, step: Step<'_>) -> Result<()> {
        let Session { gpu: Some(gpu), expected, .. } = self else { return Ok(()) };
        // The last token of each sequence.
        let ends = step.slots.iter().zip(step.positions).map(|(&slot, &position)| (slot, position + 1));
        gpu.reserve(ends.filter(|&(slot, rows)| expected[slot as usize] == rows))
    }

    /// Writes tokens, positions and bases where kernels read them. The step has been checked.
    fn write_inputs(&mut self, step: Step<'_>) {
        // At most `i32::MAX` for all slots together, which `Sizes` has seen to.
        let slot_rows = slot_rows(self.engine.manifest().context) as u32;
        let stride = input_bytes(self.engine.manifest());
        // SAFETY: inputs are never protected, and no kernel runs while `self` is borrowed here.
        let bytes = unsafe { self.inputs.bytes_mut() };
        let (tokens, rest) = bytes.split_at_mut(stride);
        let (positions, rest) = rest.split_at_mut(stride);
        let (bases, types) = rest.split_at_mut(stride);
        for (index, ((&token, &position), &slot)) in
            step.tokens.iter().zip(step.positions).zip(step.slots).enumerate()
        {
            let at = index * 4..index * 4 + 4;
            tokens[at.clone()].copy_from_slice(&token.to_le_bytes());
            positions[at.clone()].copy_from_slice(&position.to_le_bytes());
            bases[at.clone()].copy_from_slice(&(slot * slot_rows).to_le_bytes());
            let segment = self.types.get(index).copied().unwrap_or(0);
            types[at].copy_from_slice(&segment.to_le_bytes());
        }
    }

    /// Writes the rows that the engine reads besides tokens. Their sizes have been checked.
    fn write_rows(&mut self, inputs: &[&[f32]]) {
        for (rows, given) in self.engine.manifest().row_inputs.iter().zip(inputs) {
            let Some(RefKind::Arena(offset)) = rows.at.kind else { continue };
            // SAFETY: the arena is never protected, and no kernel runs while `self` is borrowed here.
            let bytes = unsafe { self.arena.bytes_mut() };
            let at = &mut bytes[offset as usize..][..given.len() * 4];
            for (to, x) in at.chunks_exact_mut(4).zip(*given) {
                to.copy_from_slice(&x.to_le_bytes());
            }
        }
    }

    fn fill_with_nan(&mut self) {
        // All bits set is NaN as f64, f32, f16 and bf16, and -1 as an integer.
        // SAFETY: neither mapping is ever protected, and no kernel runs while `self` is borrowed here.
        unsafe {
            self.arena.bytes_mut().fill(0xff);
            self.scratch.bytes_mut().fill(0xff);
        }
    }

    fn advance(&mut self, step: Step<'_>) {
        if self.engine.manifest().kind() == Kind::Encoder {
            return;
        }
        for (&slot, &position) in step.slots.iter().zip(step.positions) {
            self.positions[slot as usize] = position + 1;
        }
        if let Some(gpu) = &mut self.gpu {
            // A step may have forgotten what came after it.
            step.slots.iter().for_each(|&slot| gpu.cut(slot, self.positions[slot as usize]));
        }
    }

    /// Asks for huge pages of everything, unless this is the first step and has few tokens: these touch a little of each
    /// of many buffers, and zeroing so many huge pages takes longer than all the rest.
    fn ask_for_huge_pages(&mut self, t: u32) {
        let first = self.move_for.is_none();
        if self.huge || (first && t <= FEW_TOKENS) {
            return;
        }
        self.huge = true;
        let others = [&self.arena, &self.scratch, &self.inputs];
        others.into_iter().chain(&self.states).for_each(Mapping::advise_huge);
    }

    /// Moves some of the engine's weights to huge pages, for a part of the time that the step before took: the first
    /// result comes as soon as it can, and no later one is much delayed.
    fn move_weights(&self) -> Result<()> {
        let (Some(weights), Some(time)) = (self.engine.moving(), self.move_for) else { return Ok(()) };
        // Each worker moves what it reads in a step of one token: those are bound by memory.
        let (workers, deadline) = (self.decode_threads, Instant::now() + time);
        self.pool.run_on(workers, &|worker| weights.advance(worker, workers, deadline))
    }

    fn run_launches(&self, program: usize, range: std::ops::Range<usize>, t: u32, rows: u32) -> Result<()> {
        let program = &self.programs[program];
        let launches = &program.launches[range];
        let tables = Tables(&program.tables);
        let dims = [i64::from(t), i64::from(rows)];
        let active = if t == 1 { self.decode_threads } else { self.pool.workers() };
        let (barrier, profile) = (self.pool.barrier(), self.profile);
        let work = |worker: usize| {
            let table = tables.of(worker);
            let mut start = profile.then(Instant::now);
            let mut since = 0;
            for (index, launch) in launches.iter().enumerate() {
                // The manifest was validated for every size of this program.
                let items = launch.items.count(t, rows).unwrap_or(0);
                let entered = profile.then(Instant::now);
                let args = table[launch.first_arg..].as_ptr();
                let run = |begin: u64, end: u64| {
                    // SAFETY: the engine's author vouches for its kernels; the table holds the launch's buffers in
                    // the manifest's order, each as large as the manifest says, and no two workers share an item unless
                    // each writes to its own scratch.
                    unsafe { (launch.kernel)(args, dims.as_ptr(), begin as i64, end as i64) };
                };
                match launch.replicated {
                    true if items > 0 => run(0, items),
                    true => {}
                    false => launch.shares.run(items, worker, active, run),
                }
                if let Some(entered) = entered {
                    launch.busy_nanos.fetch_add(nanos_since(entered, Instant::now()), Ordering::Relaxed);
                }
                let last = index + 1 == launches.len();
                if launch.barrier_after && (!last || profile) {
                    if barrier.wait().is_err() {
                        return;
                    }
                    // Nobody is inside a launch before the barrier any more.
                    launches[since..=index].iter().for_each(|launch| launch.shares.reset(worker));
                    since = index + 1;
                }
                if worker == 0
                    && let Some(start) = &mut start
                {
                    let now = Instant::now();
                    launch.nanos.fetch_add(nanos_since(*start, now), Ordering::Relaxed);
                    launch.calls.fetch_add(1, Ordering::Relaxed);
                    *start = now;
                }
            }
        };
        let done = self.pool.run_on(active, &work);
        // Those since the last barrier, or all when a worker did not get there.
        let reset = if done.is_ok() { trailing(launches, profile) } else { 0 };
        launches[reset..].iter().for_each(|launch| launch.shares.reset_all());
        done
    }
}

/// The first launch that no barrier follows.
fn trailing(launches: &[PreparedLaunch], profile: bool) -> usize {
    let inner = if profile { launches.len() } else { launches.len().saturating_sub(1) };
    launches[..inner].iter().rposition(|launch| launch.barrier_after).map_or(0, |last| last + 1)
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("engine", &self.engine.path())
            .field("threads", &self.threads())
            .field("positions", &self.positions)
            .finish_non_exhaustive()
    }
}

/// The workers' pointer tables, shared with the workers.
struct Tables<'a>(&'a [Vec<*mut u8>]);

// SAFETY: the tables are only read; what the pointers may be used for is the kernels' contract.
unsafe impl Sync for Tables<'_> {}

impl Tables<'_> {
    fn of(&self, worker: usize) -> &[*mut u8] {
        &self.0[worker]
    }
}

fn nanos_since(start: Instant, now: Instant) -> u64 {
    u64::try_from((now - start).as_nanos()).unwrap_or(u64::MAX)
}

/// Bytes of one integer input.
fn input_bytes(manifest: &Manifest) -> usize {
    (manifest.max_tokens as usize * 4).next_multiple_of(64)
}

/// Bytes of everything a session allocates.
struct Sizes {
    arena: usize,
    /// For each worker.
    scratch: usize,
    /// For each integer input.
    input: usize,
    states: Vec<usize>,
}

impl Sizes {
    fn of(manifest: &Manifest, slots: u32, threads: usize) -> Result<Sizes> {
        let slot_rows = slot_rows(manifest.context);
        let rows = slot_rows * u64::from(slots);
        // Kernels hold row numbers as i32.
        if slots == 0 || rows > i32::MAX as u64 {
            let most = i32::MAX as u64 / slot_rows;
            return Err(Error::input(format!(
                "{slots} slots are not in 1..={most}, what this engine's context allows"
            )));
        }
        let states_fit = manifest.state_bytes(slots).is_some();
        let scratch = (manifest.scratch_bytes as usize).next_multiple_of(PAGE);
        let scratch_fits = scratch.checked_mul(threads).is_some_and(|bytes| bytes <= isize::MAX as usize);
        if !states_fit || !scratch_fits {
            let what = format!(
                "the states of {slots} slots, or the scratch of {threads} threads, are absurdly large"
            );
            return Err(Error::new(ErrorKind::Memory, what));
        }
        Ok(Sizes {
            arena: manifest.arena_bytes as usize,
            scratch,
            input: input_bytes(manifest),
            states: manifest.states.iter().map(|state| (state.row_bytes * rows) as usize).collect(),
        })
    }

    /// Compares the sum with what the machine has left.
    fn check_available(&self, manifest: &Manifest, slots: u32, threads: usize) -> Result<()> {
        let states = self.states.iter().fold(0u64, |sum, &bytes| sum.saturating_add(bytes as u64));
        let scratch = (self.scratch * threads) as u64;
        let arena = self.arena as u64;
        let needed = arena.saturating_add(states).saturating_add(scratch);
        match stats::available_memory_bytes() {
            Some(available) if needed > available => {
                let context = manifest.context;
                let what = format!(
                    "the session needs {needed} bytes (arena {arena}, states {states} for {slots} slots of {context} \
                     tokens, scratch {scratch} for {threads} threads), but only {available} are available; use fewer \
                     slots or compile with a smaller context"
                );
                Err(Error::new(ErrorKind::Memory, what))
            }
            _ => Ok(()),
        }
    }
}

/// Where buffers lie.
struct Memory<'a> {
    arena: &'a Mapping,
    scratch: &'a Mapping,
    inputs: &'a Mapping,
    states: &'a [Mapping],
    sizes: &'a Sizes,
}

impl Memory<'_> {
    fn prepare(&self, engine: &Engine, program: usize, threads: usize) -> Prepared {
        let launches = &engine.manifest().programs[program].launches;
        let mut first_arg = 0;
        let prepare = |(index, launch): (usize, &Launch)| {
            let prepared = PreparedLaunch {
                kernel: engine.kernel(program, index),
                first_arg,
                items: launch.items,
                barrier_after: launch.flags & NO_BARRIER_AFTER == 0,
                replicated: launch.flags & REPLICATED != 0,
                shares: Shares::new(threads),
                calls: AtomicU64::new(0),
                nanos: AtomicU64::new(0),
                busy_nanos: AtomicU64::new(0),
            };
            first_arg += launch.args.len();
            prepared
        };
        let prepared = launches.iter().enumerate().map(prepare).collect();
        let table = |worker: usize| {
            let args = launches.iter().flat_map(|launch| &launch.args);
            args.map(|arg| self.address(engine, arg.kind, worker)).collect()
        };
        Prepared { launches: prepared, tables: (0..threads).map(table).collect() }
    }

    /// Where a buffer begins. The manifest was validated, so every index and offset is inside.
    fn address(&self, engine: &Engine, kind: Option<RefKind>, worker: usize) -> *mut u8 {
        match kind {
            Some(RefKind::Weight(index)) => {
                let bytes = engine.weight(index as usize).unwrap_or_default();
                // Kernels only read weights; the pages are mapped read-only.
                bytes.as_ptr().cast_mut()
            }
            Some(RefKind::Arena(offset)) => self.arena.ptr().wrapping_add(offset as usize),
            Some(RefKind::State(index)) => self.states[index as usize].ptr(),
            Some(RefKind::Input(input)) => {
                let index = match Input::try_from(input) {
                    Ok(Input::Tokens) | Err(_) => 0,
                    Ok(Input::Positions) => 1,
                    Ok(Input::Base) => 2,
                    Ok(Input::Types) => 3,
                    // The manifest was validated: engines for processors have no pages.
                    Ok(Input::Pages) => return std::ptr::null_mut(),
                };
                self.inputs.ptr().wrapping_add(index * self.sizes.input)
            }
            Some(RefKind::Scratch(offset)) => {
                self.scratch.ptr().wrapping_add(worker * self.sizes.scratch + offset as usize)
            }
            Some(RefKind::Null(_)) | None => std::ptr::null_mut(),
        }
    }
}
