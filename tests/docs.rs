//! What README.md and the guides say is true: tables, files shown, examples, commands and links.
//!
//! The tables of README.md stand between `<!-- begin: name -->` and `<!-- end: name -->`. The first word behind the
//! fence of a block is its language; further words say what is checked:
//!
//! | block | what holds |
//! |---|---|
//! | `LANGUAGE file=PATH` | it is the file, whole |
//! | `qir` | it parses, is well-formed, and prints to a text that prints the same |
//! | `qir refused` | it is refused; the next block shows why |
//! | `console` | the commands print what stands under them |
//!
//! `UPDATE=1 cargo test --test docs` rewrites what is not fresh.
#![cfg(feature = "llvm")]

#[path = "extension/src/approximate_gelu.rs"]
mod approximate_gelu;
mod markdown;

use approximate_gelu::ApproximateGelu;
use markdown::{Block, blocks, files, read, root};
use quantc::ir::{text, verify::verify, weights::Store};
use quantc::passes::pass::{Env, Session};
use quantc::passes::{Registry, manager, pipeline};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Tests that rewrite files do so one after the other.
static FILES: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    FILES.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn tables_are_fresh() {
    let _alone = alone();
    let now = read("README.md");
    let mut should = now.clone();
    for (name, table) in quantc::tables(&Registry::builtin()) {
        let (begin, end) = (format!("<!-- begin: {name} -->\n"), format!("<!-- end: {name} -->"));
        let from = should.find(&begin).unwrap_or_else(|| panic!("README.md has no `{begin}`")) + begin.len();
        let to = from + should[from..].find(&end).unwrap_or_else(|| panic!("README.md has no `{end}`"));
        should.replace_range(from..to, &table);
    }
    markdown::settle("README.md", &now, &should, "a table has changed");
}

#[test]
fn files_shown_are_the_files() {
    let _alone = alone();
    let whole = |blocks: &[Block], i: usize| blocks[i].value("file").map(read);
    let shown: usize = files().iter().map(|file| markdown::settle_blocks(file, whole)).sum();
    assert!(shown >= 4, "only {shown} files are shown");
}

#[test]
fn texts_are_understood() {
    let mut seen = 0;
    for block in files().iter().flat_map(|file| blocks(file)).filter(|b| b.head == "qir") {
        well_formed(&block);
        seen += 1;
    }
    assert!(seen >= 4, "only {seen} texts were seen");
}

#[test]
fn problems_are_shown() {
    let _alone = alone();
    let refused = |blocks: &[Block], i: usize| {
        let before = blocks.get(i.checked_sub(1)?)?;
        (before.head == "qir refused").then(|| problems(before))
    };
    let seen: usize = files().iter().map(|file| markdown::settle_blocks(file, refused)).sum();
    assert!(seen >= 1, "no refusal is shown");
}

fn well_formed(block: &Block) {
    let parsed = text::parse(&block.text, &block.place).unwrap_or_else(|e| panic!("{e}"));
    if let Err(errors) = verify(&parsed.module) {
        panic!("{}: {}", block.place, errors.show(&parsed.module));
    }
    let printed = text::print(&parsed.module);
    let again = text::parse(&printed, "printed").unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(text::print(&again.module), printed, "{}", block.place);
}

fn problems(block: &Block) -> String {
    match text::parse(&block.text, "model.qir") {
        Err(problems) => format!("{problems}\n"),
        Ok(parsed) => {
            verify(&parsed.module).expect_err(&block.place).show(&parsed.module).trim_end().to_string() + "\n"
        }
    }
}

#[test]
fn commands_print_what_is_shown() {
    let _alone = alone();
    let said = |blocks: &[Block], i: usize| {
        let block = &blocks[i];
        (block.head == "console").then(|| markdown::session(block, root(), "quantc", &markdown::tool()))
    };
    let seen: usize = files().iter().map(|file| markdown::settle_blocks(file, said)).sum();
    assert!(seen >= 3, "only {seen} blocks of commands were seen");
}

/// The snapshot of the guide's pass, as `passes/tests/filetests.rs` makes it.
#[test]
fn the_guide_shows_the_snapshot() {
    let _alone = alone();
    let source = read("tests/extension/tests/two_layers.qir");
    let parsed = text::parse(&source, "two_layers.qir").unwrap_or_else(|e| panic!("{e}"));
    let run = parsed.directive("run").expect("the file says what to run").to_string();
    let mut module = parsed.module;
    let registry = Registry::builtin().with(ApproximateGelu::INFO);
    let pipeline = pipeline::parse(&run).unwrap_or_else(|e| panic!("{e}"));
    let checked =
        pipeline::check(&pipeline, &registry, &module, None, None).unwrap_or_else(|e| panic!("{e}"));
    let store = Store::in_memory();
    let report = manager::run(&mut module, &checked, Env::new(&store), Session::default(), &mut []);
    let remarks = report.unwrap_or_else(|e| panic!("{e}")).remarks.to_string();
    module.pipeline = None;
    let should: String = remarks.lines().map(|l| format!("// {l}\n")).collect();
    let should = should + &text::print(&module);
    let snapshot = |blocks: &[Block], i: usize| {
        let block = &blocks[i];
        let header = (block.head == "text snapshot").then(|| block.text.rfind("---\n"))?;
        Some(format!("{}{}\n", &block.text[..header? + 4], should.trim_end()))
    };
    assert_eq!(markdown::settle_blocks("docs/writing-a-pass.md", snapshot), 1);
}

/// Links lead to files, and names of files in the text are those of files.
#[test]
fn paths_exist() {
    for file in files() {
        let text = read(&file);
        let folder = root().join(&file).parent().expect("files lie in folders").to_path_buf();
        for link in text.split("](").skip(1).filter_map(|t| t.split_once(')')).map(|(link, _)| link) {
            let path = link.split('#').next().unwrap_or_default();
            let outside = link.starts_with("http") || path.is_empty();
            assert!(outside || folder.join(path).exists(), "{file}: there is no {link}");
        }
        for line in text.lines().filter(|l| !l.starts_with("```")) {
            for name in line.split('`').skip(1).step_by(2) {
                let is_path =
                    name.contains('/') && name.ends_with(".rs") && !name.contains(['<', '*', '{', ' ']);
                let homes = [root().join(name), root().join("tests/extension").join(name)];
                assert!(!is_path || homes.iter().any(|p| p.exists()), "{file}: there is no `{name}`");
            }
        }
    }
}
