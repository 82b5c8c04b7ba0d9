//! Diagnostics: what went wrong, where, and what to do next.
//!
//! Errors are values. A [`Diag`] says whose mistake it is ([`Kind`]), where it lies ([`Loc`]) and, when there is a
//! next step, what that is ([`Diag::help`]). Stages that can find several problems collect them in [`Diags`] and
//! report them together.

use std::fmt;

/// Whose problem it is. It decides the exit code and the wording around the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The model, text or data given by the user.
    Input,
    /// The pipeline or its options.
    Pipeline,
    /// The target cannot do what is asked of it.
    Target,
    /// The machine: a file that cannot be written, memory that cannot be had.
    System,
    /// A bug in quantc.
    Bug,
}

/// Where a problem lies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Loc {
    /// Nowhere in particular.
    #[default]
    None,
    /// A place in a text: line and column count from 1.
    Text {
        /// Line, from 1.
        line: u32,
        /// Column in characters, from 1.
        col: u32,
    },
    /// A named thing of the module, e.g. `@l0` or `%n in @l0`.
    Item(String),
    /// A byte position in a file.
    Byte(u64),
}

impl fmt::Display for Loc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Loc::None => Ok(()),
            Loc::Text { line, col } => write!(f, "{line}:{col}"),
            Loc::Item(name) => f.write_str(name),
            Loc::Byte(at) => write!(f, "byte {at}"),
        }
    }
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diag {
    /// Whose problem it is.
    pub kind: Kind,
    /// The file it was found in, when it was found in a file.
    pub file: Option<String>,
    /// Where in the file or module.
    pub loc: Loc,
    /// One sentence without a final stop.
    pub message: String,
    /// What to do next.
    pub help: Option<String>,
    /// What the compiler was doing, innermost first.
    pub context: Vec<String>,
}

/// Shorthand of this crate and its users.
pub type Result<T, E = Diag> = std::result::Result<T, E>;

impl Diag {
    /// A problem of `kind` described by `message`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Diag {
        Diag { kind, file: None, loc: Loc::None, message: message.into(), help: None, context: vec![] }
    }

    /// A problem in what the user gave.
    pub fn input(message: impl Into<String>) -> Diag {
        Diag::new(Kind::Input, message)
    }

    /// A problem in a pipeline or its options.
    pub fn pipeline(message: impl Into<String>) -> Diag {
        Diag::new(Kind::Pipeline, message)
    }

    /// Something the target cannot do.
    pub fn target(message: impl Into<String>) -> Diag {
        Diag::new(Kind::Target, message)
    }

    /// A problem of the machine.
    pub fn system(message: impl Into<String>) -> Diag {
        Diag::new(Kind::System, message)
    }

    /// A broken promise inside quantc.
    pub fn bug(message: impl Into<String>) -> Diag {
        Diag::new(Kind::Bug, message)
    }

    /// Adds the file.
    pub fn in_file(mut self, file: impl Into<String>) -> Diag {
        self.file.get_or_insert(file.into());
        self
    }

    /// Adds the place, unless a more exact one is known already.
    pub fn at(mut self, loc: Loc) -> Diag {
        if self.loc == Loc::None {
            self.loc = loc;
        }
        self
    }

    /// Adds the next step.
    pub fn help(mut self, help: impl Into<String>) -> Diag {
        self.help.get_or_insert(help.into());
        self
    }

    /// Adds what the compiler was doing.
    pub fn context(mut self, doing: impl Into<String>) -> Diag {
        self.context.push(doing.into());
        self
    }
}

impl fmt::Display for Diag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind == Kind::Bug {
            f.write_str("bug in quantc: ")?;
        }
        f.write_str(&self.message)?;
        match (&self.file, &self.loc) {
            (None, Loc::None) => {}
            (Some(file), Loc::None) => write!(f, "\n  in: {file}")?,
            (None, loc) => write!(f, "\n  at: {loc}")?,
            (Some(file), loc @ Loc::Text { .. }) => write!(f, "\n  in: {file}:{loc}")?,
            (Some(file), loc) => write!(f, "\n  in: {file}, {loc}")?,
        }
        for doing in &self.context {
            write!(f, "\n  while: {doing}")?;
        }
        if let Some(help) = &self.help {
            write!(f, "\n  help: {help}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Diag {}

/// Problems of one stage, reported together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diags(pub Vec<Diag>);

impl Diags {
    /// Adds a problem.
    pub fn push(&mut self, diag: Diag) {
        self.0.push(diag);
    }

    /// Keeps the value of a success and the problem of a failure.
    pub fn keep<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|diag| self.0.push(diag)).ok()
    }

    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `value` when nothing was found.
    pub fn into_result<T>(self, value: T) -> Result<T, Diags> {
        if self.is_empty() { Ok(value) } else { Err(self) }
    }
}

impl From<Diag> for Diags {
    fn from(diag: Diag) -> Diags {
        Diags(vec![diag])
    }
}

impl fmt::Display for Diags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, diag) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            write!(f, "error: {diag}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Diags {}

/// The entries of `known` that `name` may have meant, nearest first, at most three.
pub fn near_misses<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let mut scored: Vec<(usize, &str)> = known
        .into_iter()
        .map(|k| (edit_distance(name, k), k))
        .filter(|&(d, k)| d <= 1 + k.len().max(name.len()) / 3 || (name.len() >= 3 && k.contains(name)))
        .collect();
    scored.sort();
    scored.truncate(3);
    scored.into_iter().map(|(_, k)| k).collect()
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_misses_are_near() {
        assert_eq!(near_misses("smothquant", ["smoothquant", "gptq"]), ["smoothquant"]);
        assert!(near_misses("zzz", ["smoothquant", "gptq"]).is_empty());
    }

    #[test]
    fn the_first_place_stays() {
        let d = Diag::input("short").at(Loc::Byte(3)).at(Loc::Byte(9)).in_file("m.safetensors");
        assert_eq!(d.to_string(), "short\n  in: m.safetensors, byte 3");
    }
}
