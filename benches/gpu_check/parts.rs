//! The parts of a run. Each is a process of its own, with its own share of the time: one that fails, hangs or is cut off does
//! not take the others with it. A part whose device is lost goes on in another process after the row that lost it.

use crate::kernel::{Asked, Packed};
use quantc::ir::diag::{Diag, Result};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a part says of what it looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// All is right.
    Right,
    /// Results are right; something is slower than wanted, or was not reached in time.
    Missed,
    /// Something is wrong.
    Wrong,
}

impl Verdict {
    /// The exit code that says so.
    pub fn code(self) -> u8 {
        match self {
            Verdict::Right => 0,
            Verdict::Wrong => 1,
            Verdict::Missed => 3,
        }
    }
}

/// The exit code of a part whose driver refused something.
pub const LOST: i32 = 5;

/// Most processes of one part.
const MOST_STARTS: usize = 24;

/// Seconds that one row may take.
const ROW: u64 = 45;

/// Looks at a row in a second.
const LOOKS_A_SECOND: u64 = 2;

/// A part as its process sees it.
pub struct Part<'f> {
    /// The packed folder.
    pub folder: &'f Path,
    /// Where parts leave things for each other.
    pub scratch: &'f Path,
    /// The first row that is wanted.
    pub from: usize,
    /// When it must be over.
    pub until: Instant,
    /// Whether the small tables are wanted.
    pub small: bool,
    /// Whether a thread looks at the time of rows.
    watched: Cell<bool>,
}

/// Looks that are taken at a row before it must be over.
static LOOKS: AtomicU64 = AtomicU64::new(0);

/// Where the number of the row under way is written.
const REACHED: &str = "reached.txt";

impl<'f> Part<'f> {
    /// A part that has so many seconds.
    pub fn new(folder: &'f Path, scratch: &'f Path, from: usize, seconds: f64, small: bool) -> Part<'f> {
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        Part { folder, scratch, from, until, small, watched: Cell::new(false) }
    }

    /// Whether its time is over.
    pub fn over(&self) -> bool {
        Instant::now() >= self.until
    }

    /// Says which row is begun. If it takes too long the process ends, and the part goes on after it.
    pub fn reached(&self, row: usize) -> Result<()> {
        let at = self.scratch.join(REACHED);
        std::fs::write(&at, row.to_string()).map_err(|e| crate::system(&at, &e))?;
        // Looks are counted, and not the time: a process that is stopped for a while has not taken it.
        LOOKS.store(ROW * LOOKS_A_SECOND, Ordering::SeqCst);
        if !self.watched.replace(true) {
            std::thread::spawn(|| {
                while LOOKS.fetch_sub(1, Ordering::SeqCst) > 1 {
                    std::thread::sleep(Duration::from_millis(1000 / LOOKS_A_SECOND));
                }
                println!("| a row took more than {ROW} s | {} |", crate::report::WRONG);
                std::process::exit(LOST);
            });
        }
        Ok(())
    }
}

/// What is done in a part, and the kernels that it takes.
struct Does {
    name: &'static str,
    /// Seconds of 505, with those of the sanitizer.
    share: f64,
    kernels: fn(small: bool) -> Vec<Asked>,
    run: fn(&Part<'_>, &Packed) -> Result<Verdict>,
}

const fn part(
    name: &'static str,
    share: f64,
    kernels: fn(small: bool) -> Vec<Asked>,
    run: fn(&Part<'_>, &Packed) -> Result<Verdict>,
) -> Does {
    Does { name, share, kernels, run }
}

/// The parts in order.
const PARTS: [Does; 9] = [
    part("facts", 5.0, |_| vec![], crate::facts::run),
    part("ceilings", 20.0, |_| crate::ceilings::kernels(), crate::ceilings::run),
    part("kernels", 85.0, crate::table::kernels, crate::correctness::run),
    part("engines", 45.0, |_| vec![], crate::engines::run),
    part("pytorch", 40.0, |_| vec![], crate::torch::run),
    part("rows", 20.0, crate::rows::kernels, crate::rows::run),
    part("products", 125.0, crate::products::kernels, crate::products::run),
    part("attention", 35.0, crate::attention::kernels, crate::attention::run),
    part("whole", 95.0, |_| vec![], crate::whole::run),
];

/// The last one, which runs the second one of them again.
pub const SANITIZER: (&str, f64) = ("sanitizer", 35.0);

/// Names of all parts.
pub fn names() -> Vec<&'static str> {
    PARTS.iter().map(|part| part.name).chain([SANITIZER.0]).collect()
}

/// Options of a run.
pub struct Options {
    /// The packed folder.
    pub folder: PathBuf,
    /// One part alone.
    pub only: Option<String>,
    /// Seconds for everything.
    pub seconds: f64,
    /// Small tables.
    pub small: bool,
    /// Kernels are run by the interpreter.
    pub interpreted: bool,
    /// A part's own process: the first row that is wanted, and where parts leave things.
    pub inside: Option<(usize, PathBuf)>,
}

/// Runs a part in this process.
pub fn inside(options: &Options, from: usize, scratch: &Path) -> Result<Verdict> {
    let part = Part::new(&options.folder, scratch, from, options.seconds, options.small);
    let name = options.only.as_deref().unwrap_or_default();
    let does = PARTS.iter().find(|part| part.name == name);
    let does = does.ok_or_else(|| Diag::bug(format!("no part `{name}` runs inside of one")))?;
    let packed = crate::kernel::unpack(&options.folder, &(does.kernels)(options.small))?;
    (does.run)(&part, &packed)
}

/// Runs the parts, one after the other, and tells what came of them.
pub fn run(options: &Options) -> Result<ExitCode> {
    // What is wrong with the folder or the machine is told once, and not by every part.
    let packed = crate::kernel::unpack(&options.folder, &[])?;
    let device = crate::device::Device::open(&packed)?.driver.device();
    let device = device.map_err(|e| Diag::target(format!("no GPU to check: {e}")))?;
    println!("# {} with kernels for {}\n", device.name, packed.target.name);
    drop(packed);
    let scratch = std::env::temp_dir().join(format!("gpu-check-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).map_err(|e| crate::system(&scratch, &e))?;
    let scratch = Scratch(scratch);
    let shares: Vec<(&str, f64)> =
        PARTS.iter().map(|part| (part.name, part.share)).chain([SANITIZER]).collect();
    let wanted = |name: &str| options.only.as_deref().is_none_or(|only| only == name);
    let all: f64 = shares.iter().filter(|(name, _)| wanted(name)).map(|(_, share)| share).sum();
    let (began, mut share_before) = (Instant::now(), 0.0);
    let mut told = vec![];
    for (name, share) in shares.into_iter().filter(|(name, _)| wanted(name)) {
        // What parts before did not need is there for this one.
        share_before += share;
        let until = began + Duration::from_secs_f64(options.seconds * share_before / all);
        let start = Instant::now();
        let outcome = if name == SANITIZER.0 {
            crate::sanitizer::run(options, until)
        } else {
            outside(options, name, &scratch.0, until)
        };
        let (verdict, what) = match outcome {
            Ok(verdict) => (verdict, String::new()),
            Err(what) => (Verdict::Wrong, what),
        };
        if !what.is_empty() {
            println!("\nThe part `{name}` {what}.\n");
        }
        told.push((name, start.elapsed(), verdict, what));
    }
    println!("## Parts\n\n| part | seconds | |\n|---|---|---|");
    for (name, took, verdict, what) in &told {
        let said = match verdict {
            Verdict::Right => "right",
            Verdict::Missed => crate::report::MISSED,
            Verdict::Wrong => crate::report::WRONG,
        };
        println!("| {name} | {:.0} | {said} {what} |", took.as_secs_f64());
    }
    let verdict = told.iter().map(|(_, _, verdict, _)| *verdict).max().unwrap_or(Verdict::Right);
    println!(
        "\n{}",
        match verdict {
            Verdict::Right => "All that was checked is right, and as fast as wanted.",
            Verdict::Missed =>
                "Results are right; something is slower than wanted, or was not reached in time.",
            Verdict::Wrong => "**Something is wrong: see above.**",
        }
    );
    Ok(ExitCode::from(verdict.code()))
}

/// A folder that is removed.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs a part in processes of its own, until it is through or its time is over; the error says what became of it.
fn outside(
    options: &Options,
    name: &str,
    scratch: &Path,
    until: Instant,
) -> std::result::Result<Verdict, String> {
    let mut from = 0;
    let mut worst = Verdict::Right;
    for _ in 0..MOST_STARTS {
        let left = until.saturating_duration_since(Instant::now()).as_secs_f64();
        // A part that is told to end has a moment for its last row.
        let mut command = command()?;
        command.arg("run").arg(&options.folder).args(["--only", name]);
        command.args(["--seconds", &format!("{:.1}", (left - GRACE / 2.0).max(0.0))]);
        command.args(["--from", &from.to_string(), "--scratch"]).arg(scratch);
        if options.small {
            command.arg("--small");
        }
        if options.interpreted {
            command.arg("--interpreted");
        }
        let _ = std::fs::remove_file(scratch.join(REACHED));
        match wait(command, until + Duration::from_secs_f64(GRACE / 2.0))? {
            Some(0) => return Ok(worst),
            Some(3) => return Ok(worst.max(Verdict::Missed)),
            Some(1) => return Ok(Verdict::Wrong),
            Some(LOST) => {}
            None if Instant::now() >= until => return Err("was cut off when its time was over".into()),
            // A crash: a signal, or another code.
            _ => println!("| the process ended | {} |", crate::report::WRONG),
        }
        worst = Verdict::Wrong;
        let reached = std::fs::read_to_string(scratch.join(REACHED)).unwrap_or_default();
        match reached.trim().parse::<usize>() {
            Ok(row) => from = row + 1,
            Err(_) => return Err("ended before its first row".into()),
        }
    }
    Err(format!("lost the device {MOST_STARTS} times"))
}

/// Seconds beyond a part's time that its process may take to end.
const GRACE: f64 = 4.0;

/// This program.
pub fn command() -> std::result::Result<Command, String> {
    std::env::current_exe().map(Command::new).map_err(|e| format!("cannot start: {e}"))
}

/// Waits for a process, and ends it when the time is over; its exit code, if it has one.
pub fn wait(mut command: Command, until: Instant) -> std::result::Result<Option<i32>, String> {
    let mut child = command.spawn().map_err(|e| format!("cannot start: {e}"))?;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status.code()),
            Ok(None) if Instant::now() >= until => {
                let _ = child.kill();
                let _ = child.wait();
                return Ok(None);
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(20)),
            Err(e) => return Err(format!("cannot be waited for: {e}")),
        }
    }
}
