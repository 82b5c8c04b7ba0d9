//! Finds the texts of the repository.

use std::path::{Path, PathBuf};

/// The `.qir` files under a folder of the repository whose path passes `keep`, by name, with their texts.
pub fn under(folder: &str, keep: impl Fn(&str) -> bool) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut found = vec![];
    let mut folders = vec![root.join(folder)];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        for entry in entries {
            let path: PathBuf = entry.expect("an entry of a folder that can be read").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "qir") {
                let name = path.strip_prefix(&root).expect("it lies under the root").display().to_string();
                let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
                found.push((name, text));
            }
        }
    }
    found.retain(|(name, _)| keep(&format!("/{name}")));
    found.sort();
    found
}
