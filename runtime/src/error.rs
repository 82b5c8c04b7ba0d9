//! The runtime's error: what went wrong, where, and which kind of trouble it is.
//!
//! An error reads `place: message`. The place is a file of the engine, or a part of a file; an error about the
//! caller's own arguments has no place.

use std::fmt;
use std::path::Path;

/// What kind of trouble an [`Error`] reports; callers choose exit codes and advice by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The operating system refused to read, map or start something.
    Io,
    /// A file of the engine is not what its format says.
    Format,
    /// A file of the engine differs from what the manifest promises.
    Digest,
    /// The kernel object cannot be loaded.
    Object,
    /// The engine was made for another machine.
    Target,
    /// The engine or session needs more memory than there is.
    Memory,
    /// The caller asked for something the engine or session cannot do.
    Input,
    /// A worker thread failed.
    Worker,
    /// The GPU or its driver failed.
    Device,
}

/// An error of the runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    place: String,
    message: String,
}

/// The runtime's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error without a place.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error { kind, place: String::new(), message: message.into() }
    }

    /// Puts the error into `place`; a place it already has lies inside the new one.
    pub fn at(mut self, place: impl fmt::Display) -> Error {
        self.place =
            if self.place.is_empty() { place.to_string() } else { format!("{place}: {}", self.place) };
        self
    }

    /// What kind of trouble it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Where it is: a file or a part of one. Empty for errors about the caller's arguments.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// What is wrong, without the place.
    pub fn message(&self) -> &str {
        &self.message
    }

    pub(crate) fn io(path: &Path, doing: &str, error: &std::io::Error) -> Error {
        Error::new(ErrorKind::Io, format!("cannot {doing}: {error}")).at(path.display())
    }

    pub(crate) fn format(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Format, message)
    }

    pub(crate) fn object(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Object, message)
    }

    pub(crate) fn input(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Input, message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.place.is_empty() {
            write!(f, "{}: ", self.place)?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
