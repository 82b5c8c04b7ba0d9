//! Reads the Markdown files of the repository: fenced blocks, and commands with what they print.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The text of a file of the repository.
pub fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// README.md and the guides, as paths from the root.
pub fn files() -> Vec<String> {
    let guides = std::fs::read_dir(root().join("docs")).expect("there are guides");
    let names =
        guides.map(|g| g.expect("folders are readable").file_name().into_string().expect("plain names"));
    let mut files: Vec<String> = names.filter(|n| n.ends_with(".md")).map(|n| format!("docs/{n}")).collect();
    files.push("README.md".into());
    files.sort();
    files
}

/// A fenced block.
pub struct Block {
    /// What stands behind the opening fence: a language, then what the tests do with the block.
    pub head: String,
    /// The lines between the fences, each with its end.
    pub text: String,
    /// The ticks around it.
    pub fence: String,
    /// Where it is, for messages.
    pub place: String,
}

impl Block {
    /// `value` when the head has a word `key=value`.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.head.split_whitespace().find_map(|w| w.strip_prefix(key)?.strip_prefix('='))
    }
}

/// The fenced blocks of a file.
pub fn blocks(file: &str) -> Vec<Block> {
    let text = read(file);
    let mut out: Vec<Block> = vec![];
    let mut fence: Option<usize> = None;
    for (number, line) in text.lines().enumerate() {
        let ticks = line.bytes().take_while(|&b| b == b'`').count();
        match fence {
            // A block ends with as many ticks as it began with: fewer are part of it.
            Some(n) if ticks == n => fence = None,
            Some(_) => {
                let block = out.last_mut().expect("a block is open");
                block.text += line;
                block.text.push('\n');
            }
            None if ticks >= 3 => {
                fence = Some(ticks);
                let place = format!("{file}:{}", number + 1);
                let fence = line[..ticks].to_string();
                out.push(Block { head: line[ticks..].into(), text: String::new(), fence, place });
            }
            None => {}
        }
    }
    assert!(fence.is_none(), "{file}: a block is not closed");
    out
}

/// What the commands of a block print in `folder`, with `tool` for the word `name`, each under its command.
pub fn session(block: &Block, folder: &Path, name: &str, tool: &Path) -> String {
    let mut said = String::new();
    for line in block.text.lines() {
        let Some(command) = line.strip_prefix("$ ") else { continue };
        let arguments = command.strip_prefix(name);
        let arguments = arguments.unwrap_or_else(|| panic!("{}: `{command}` is not `{name}`", block.place));
        let shell = format!("'{}'{arguments} 2>&1", tool.display());
        let out =
            Command::new("sh").arg("-c").arg(&shell).current_dir(folder).output().expect("there is a shell");
        said += &format!("{line}\n{}", String::from_utf8_lossy(&out.stdout));
    }
    said
}

/// Compares the blocks of a file with what they should be, or rewrites them when `UPDATE` is set. `should` tells the
/// text of a block that is checked. Returns how many are.
pub fn settle_blocks(file: &str, mut should: impl FnMut(&[Block], usize) -> Option<String>) -> usize {
    let (now, blocks) = (read(file), blocks(file));
    let mut text = now.clone();
    let (mut checked, mut wrong) = (0, String::new());
    for (i, block) in blocks.iter().enumerate() {
        let Some(new) = should(&blocks, i) else { continue };
        checked += 1;
        if new != block.text {
            wrong += &format!("{}: this should be\n{new}", block.place);
            let whole = |text: &str| format!("{0}{1}\n{text}{0}\n", block.fence, block.head);
            text = text.replacen(&whole(&block.text), &whole(&new), 1);
        }
    }
    settle(file, &now, &text, &wrong);
    checked
}

/// Compares a file with what it should be, or rewrites it when `UPDATE` is set.
pub fn settle(file: &str, now: &str, should: &str, wrong: &str) {
    if now == should {
        return;
    }
    let update = std::env::var_os("UPDATE").is_some();
    assert!(update, "{wrong}\n{file} is not fresh; run `UPDATE=1 cargo test --test docs --test extension`");
    std::fs::write(root().join(file), should).expect("the repository is writable");
}

/// The tool that belongs to this test program.
pub fn tool() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_quantc"))
}
