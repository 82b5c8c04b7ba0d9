//! How subcommands fail, and with which exit code.

use quantc_ir::diag::{Diag, Diags};
use std::fmt;
use std::process::ExitCode;

/// Why a subcommand failed.
#[derive(Debug)]
pub enum Failure {
    /// What was given is refused, or the machine cannot do it.
    Refused(Diags),
    /// A gate failed; the text says which.
    #[cfg_attr(not(feature = "llvm"), expect(dead_code, reason = "gates are set for compiling"))]
    Gate(String),
    /// The reader of stdout has gone.
    Closed,
}

/// The result of a subcommand.
pub type Outcome<T = ()> = std::result::Result<T, Failure>;

impl Failure {
    /// Adds what the tool was doing.
    #[cfg(feature = "llvm")]
    pub fn while_doing(mut self, doing: &str) -> Failure {
        if let Failure::Refused(diags) = &mut self {
            diags.0.iter_mut().for_each(|d| d.context.push(doing.to_string()));
        }
        self
    }

    /// Prints the failure and gives its exit code.
    pub fn report(self) -> ExitCode {
        match self {
            Failure::Refused(diags) => {
                eprintln!("{diags}");
                ExitCode::from(1)
            }
            Failure::Gate(text) => {
                eprintln!("gate failed: {text}");
                ExitCode::from(3)
            }
            Failure::Closed => ExitCode::SUCCESS,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Refused(diags) => write!(f, "{diags}"),
            Failure::Gate(text) => f.write_str(text),
            Failure::Closed => f.write_str("output closed"),
        }
    }
}

impl From<Diag> for Failure {
    fn from(diag: Diag) -> Failure {
        Failure::Refused(diag.into())
    }
}

impl From<Diags> for Failure {
    fn from(diags: Diags) -> Failure {
        Failure::Refused(diags)
    }
}

impl From<quantc_runtime::Error> for Failure {
    fn from(e: quantc_runtime::Error) -> Failure {
        let diag = Diag::input(e.message());
        Failure::from(if e.place().is_empty() { diag } else { diag.in_file(e.place()) })
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Failure {
        match e.kind() {
            std::io::ErrorKind::BrokenPipe => Failure::Closed,
            _ => Diag::system(format!("cannot write the output: {e}")).into(),
        }
    }
}
