//! Every text under `tests/errors` is refused for the reasons its `// error:` comments give, on their lines.
//!
//! `UPDATE=1` rewrites the comments; read what changed.

mod files;

use quantc_ir::diag::{Diags, Loc};
use quantc_ir::text::parse;
use quantc_ir::verify::verify;
use std::fmt::Write as _;

const MARK: &str = "// error: ";

/// What is wrong with a text, by line.
fn errors(name: &str, text: &str) -> Vec<(u32, String)> {
    let found: Diags = match parse(text, name) {
        Err(diags) => diags,
        Ok(parsed) => match verify(&parsed.module) {
            Ok(()) => Diags::default(),
            Err(errors) => errors.locate(&parsed.module, &parsed.places, name),
        },
    };
    let mut out = vec![];
    for diag in found.0 {
        assert_eq!(diag.file.as_deref(), Some(name), "{diag}");
        let Loc::Text { line, .. } = diag.loc else { panic!("{name}: no place is given: {diag}") };
        let help = diag.help.map(|h| format!(" ({h})")).unwrap_or_default();
        out.push((line, diag.message + &help));
    }
    out.sort();
    out
}

#[test]
fn errors_have_their_text_and_line() {
    let update = std::env::var_os("UPDATE").is_some();
    let files = files::under("tests/errors", |_| true);
    assert!(files.len() >= 20, "the texts are not where this test looks");
    let mut failures = String::new();
    for (name, text) in files {
        let mut expected = vec![];
        for (line, text) in (1..).zip(text.lines()) {
            expected.extend(text.split(MARK).skip(1).map(|e| (line, e.trim().to_string())));
        }
        expected.sort();
        let found = errors(&name, &text);
        if update && found != expected {
            let mut out = String::new();
            for (line, text) in (1..).zip(text.lines()) {
                let _ = write!(out, "{}", text.split(MARK).next().unwrap_or_default().trim_end());
                for (_, e) in found.iter().filter(|(l, _)| *l == line) {
                    let _ = write!(out, "  {MARK}{e}");
                }
                out.push('\n');
            }
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(&name);
            std::fs::write(path, out).expect("the texts can be rewritten");
        } else if found != expected || found.is_empty() {
            let _ = writeln!(failures, "{name}\n  expected {expected:#?}\n  found {found:#?}");
        }
    }
    assert!(failures.is_empty(), "{failures}");
}
