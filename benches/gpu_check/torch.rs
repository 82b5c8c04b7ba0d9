//! What PyTorch reaches on the same machine in the same run, where there is one.

use crate::cublas::Numbers;
use crate::kernel::Packed;
use crate::parts::{self, Part, Verdict};
use quantc::ir::diag::Result;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

/// What it is asked.
const SCRIPT: &str = include_str!("torch.py");

/// What it said, for the parts after this one.
const FILE: &str = "torch.txt";

/// Microseconds by name and sizes.
#[derive(Default)]
pub struct Torch {
    times: BTreeMap<String, f64>,
}

impl Torch {
    /// What the part before has left.
    pub fn read(scratch: &Path) -> Torch {
        Torch::parse(&std::fs::read_to_string(scratch.join(FILE)).unwrap_or_default())
    }

    fn parse(text: &str) -> Torch {
        let line = |line: &str| {
            let (name, us) = line.rsplit_once(' ')?;
            Some((name.to_owned(), us.parse().ok()?))
        };
        let told = text.lines().filter(|l| !l.starts_with("failed") && !l.starts_with("version"));
        Torch { times: told.filter_map(line).collect() }
    }

    /// Of a product.
    pub fn product(&self, numbers: Numbers, m: u32, n: u32, k: u32) -> Option<f64> {
        self.times.get(&format!("{} {m} {n} {k}", numbers.name())).copied()
    }

    /// Of causal attention over a prompt, with keys for each of 32 heads.
    pub fn attention(&self, tokens: u32) -> Option<f64> {
        self.times.get(&format!("attention {tokens}")).copied()
    }
}

/// Asks it, and prints what it says.
pub fn run(part: &Part<'_>, _: &Packed) -> Result<Verdict> {
    println!("## PyTorch\n");
    if crate::interpreted() || part.small {
        println!("It is left out.\n");
        return Ok(Verdict::Right);
    }
    let at = part.scratch.join(FILE);
    let file = |e: std::io::Error| crate::system(&at, &e);
    let out = std::fs::File::create(&at).map_err(file)?;
    let mut command = Command::new("python3");
    command.args(["-c", SCRIPT]).stdout(Stdio::from(out)).stderr(Stdio::null());
    let ended = parts::wait(command, part.until).unwrap_or(Some(1));
    let text = std::fs::read_to_string(&at).map_err(file)?;
    let Some(version) = text.lines().find(|l| l.starts_with("version")) else {
        println!("It is left out: this machine has none that finds a device.\n");
        return Ok(Verdict::Right);
    };
    println!("PyTorch {version}. Times stand beside ours in the tables below.\n");
    println!("| what | us |\n|---|---|");
    for (name, us) in &Torch::parse(&text).times {
        println!("| {name} | {us:.1} |");
    }
    for line in text.lines().filter(|l| l.starts_with("failed")) {
        println!("| {line} | |");
    }
    match ended {
        Some(0) => println!(),
        Some(code) => println!("\nIt ended with code {code}.\n"),
        None => println!("\nIt was cut off when its time was over.\n"),
    }
    Ok(Verdict::Right)
}
