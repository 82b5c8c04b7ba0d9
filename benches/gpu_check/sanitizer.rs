//! The small table of kernels under NVIDIA's `compute-sanitizer`, where the machine has it: it sees accesses out of bounds, memory
//! that was never written, and races in shared memory.

use crate::parts::{self, Options, Verdict};
use crate::report::WRONG;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Its exit code where it has found something.
const FOUND: i32 = 77;

/// What it looks for, in turn.
const TOOLS: [&str; 3] = ["memcheck", "racecheck", "initcheck"];

fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let toolkits = std::fs::read_dir("/usr/local").into_iter().flatten().flatten().map(|e| e.path());
    for toolkit in toolkits.filter(|p| p.to_string_lossy().contains("cuda")) {
        folders.extend([toolkit.join("bin"), toolkit.join("compute-sanitizer")]);
    }
    folders.into_iter().map(|folder| folder.join("compute-sanitizer")).find(|at| at.is_file())
}

/// Runs the tools, as long as there is time.
pub fn run(options: &Options, until: Instant) -> Result<Verdict, String> {
    println!("## compute-sanitizer\n");
    let Some(sanitizer) = program() else {
        println!("compute-sanitizer is left out: this machine does not have it.\n");
        return Ok(Verdict::Right);
    };
    println!("| tool | |\n|---|---|");
    let mut verdict = Verdict::Right;
    for tool in TOOLS {
        let left = until.saturating_duration_since(Instant::now()).as_secs_f64();
        if left < 5.0 {
            println!("| {tool} | left out: the part's time was over |");
            continue;
        }
        let scratch = std::env::temp_dir().join(format!("gpu-check-{}-{tool}", std::process::id()));
        std::fs::create_dir_all(&scratch).map_err(|e| format!("cannot keep notes: {e}"))?;
        let log = scratch.join("log.txt");
        let mut command = Command::new(&sanitizer);
        command.args(["--tool", tool, "--error-exitcode", &FOUND.to_string(), "--log-file"]).arg(&log);
        command.arg(std::env::current_exe().map_err(|e| format!("cannot start: {e}"))?);
        command.arg("run").arg(&options.folder).args(["--only", "kernels", "--small", "--from", "0"]);
        command.args(["--seconds", &format!("{:.1}", left - 2.0), "--scratch"]).arg(&scratch);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let ended = parts::wait(command, until)?;
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let summary = text.lines().rev().find(|l| l.contains("SUMMARY") || l.contains("rror"));
        let summary = summary.unwrap_or("it said nothing").trim_start_matches(['=', ' ']).to_owned();
        let said = match ended {
            Some(0 | 3) => summary,
            Some(FOUND | 1) => {
                verdict = Verdict::Wrong;
                format!("{summary} {WRONG}")
            }
            Some(code) => format!("does not work here: it ended with code {code}, {summary}"),
            None => "cut off when the part's time was over".into(),
        };
        println!("| {tool} | {said} |");
        let _ = std::fs::remove_dir_all(&scratch);
    }
    println!();
    Ok(verdict)
}
