//! What passes told about what they did.

use crate::pass::Remark;
use std::fmt;

/// All remarks of a run, in order.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
#[serde(transparent)]
pub struct Remarks(pub Vec<Remark>);

impl Remarks {
    /// The remarks of one pass.
    pub fn of<'a>(&'a self, pass: &'a str) -> impl Iterator<Item = &'a Remark> {
        self.0.iter().filter(move |r| r.pass == pass)
    }
}

impl fmt::Display for Remarks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|r| writeln!(f, "{}: {}: {}", r.pass, r.place, r.text))
    }
}
