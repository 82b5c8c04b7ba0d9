//! A checkpoint directory: one safetensors file, or shards with an index.

use crate::json::{self, shown};
use crate::safetensors::{Header, Index, TensorInfo};
use quantc_ir::diag::{Diag, Diags, Loc};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The file of an unsharded checkpoint.
const SINGLE: &str = "model.safetensors";
/// The index of a sharded checkpoint.
const INDEX: &str = "model.safetensors.index.json";
/// The longest index that is read, in bytes.
const MAX_INDEX: u64 = 100_000_000;
/// The most shards a checkpoint has.
const MAX_SHARDS: usize = 4096;

/// A tensor and the file it lies in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Index into [`Checkpoint::shards`].
    pub shard: usize,
    /// What and where it is.
    pub info: TensorInfo,
}

/// The tensors of a checkpoint directory. Only headers were read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The directory.
    pub dir: PathBuf,
    /// The files, relative to the directory, in order of name.
    pub shards: Vec<String>,
    /// The tensors by name.
    pub tensors: BTreeMap<String, Placed>,
    /// Tensors that lie in a shard although the index does not list them, as `file: tensor`.
    pub unlisted: Vec<String>,
}

impl Checkpoint {
    /// Reads the headers of the checkpoint in `dir`.
    pub fn open(dir: &Path) -> Result<Checkpoint, Diags> {
        if dir.join(SINGLE).exists() {
            let header = Header::read(&dir.join(SINGLE))?;
            let placed = |t: TensorInfo| (t.name.clone(), Placed { shard: 0, info: t });
            return Ok(Checkpoint {
                dir: dir.into(),
                shards: vec![SINGLE.into()],
                tensors: header.tensors.into_iter().map(placed).collect(),
                unlisted: vec![],
            });
        }
        if dir.join(INDEX).exists() {
            return Checkpoint::open_sharded(dir);
        }
        Err(no_weights(dir).into())
    }

    fn open_sharded(dir: &Path) -> Result<Checkpoint, Diags> {
        let path = dir.join(INDEX);
        let name = path.display().to_string();
        let index = Index::parse(&name, &json::read_file(&path, MAX_INDEX)?)?;
        let mut shards: Vec<String> = index.files.values().cloned().collect();
        shards.sort();
        shards.dedup();
        let about_index = |text: String| Diag::input(text).in_file(&name).at(Loc::Item("weight_map".into()));
        if shards.len() > MAX_SHARDS {
            return Err(about_index(format!("{} shards, more than {MAX_SHARDS}", shards.len())).into());
        }
        let missing: Vec<&str> =
            shards.iter().map(String::as_str).filter(|s| !dir.join(s).exists()).collect();
        if !missing.is_empty() {
            let files: Vec<String> = missing.iter().map(|s| shown(s)).collect();
            let text =
                format!("{} of {} shards are missing: {}", files.len(), shards.len(), files.join(", "));
            return Err(about_index(text).help("fetch the missing files into the same directory").into());
        }

        let mut listed: BTreeMap<&str, Vec<&String>> = BTreeMap::new();
        for (tensor, file) in &index.files {
            listed.entry(file).or_default().push(tensor);
        }
        let mut problems = Diags::default();
        let mut tensors = BTreeMap::new();
        let mut unlisted = vec![];
        for (shard, file) in shards.iter().enumerate() {
            let Some(header) = problems.keep(Header::read(&dir.join(file))) else { continue };
            for tensor in listed.get(file.as_str()).into_iter().flatten().copied() {
                match header.tensor(tensor) {
                    Some(info) => drop(tensors.insert(tensor.clone(), Placed { shard, info: info.clone() })),
                    None => {
                        let text = format!("tensor `{}` is not in `{}`", shown(tensor), shown(file));
                        problems.push(about_index(text));
                    }
                }
            }
            let extra = header.tensors.iter().filter(|t| index.files.get(&t.name) != Some(file));
            unlisted.extend(extra.map(|t| format!("{file}: {}", shown(&t.name))));
        }
        capped(problems).into_result(Checkpoint { dir: dir.into(), shards, tensors, unlisted })
    }

    /// Whether there is a tensor called `name`.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The path of the file that a tensor lies in.
    pub fn path_of(&self, placed: &Placed) -> PathBuf {
        self.dir.join(&self.shards[placed.shard])
    }
}

/// The most problems of one stage that are spelled out.
const MOST_PROBLEMS: usize = 40;

/// The first problems, and how many more there are.
pub(crate) fn capped(mut problems: Diags) -> Diags {
    let more = problems.0.len().saturating_sub(MOST_PROBLEMS);
    if let Some(first) = problems.0.first().filter(|_| more > 0).cloned() {
        problems.0.truncate(MOST_PROBLEMS);
        problems.push(Diag {
            help: None,
            message: format!("and {more} more problems of this kind"),
            ..first
        });
    }
    problems
}

/// What to say of a directory without weights that can be read.
fn no_weights(dir: &Path) -> Diag {
    let file = dir.display().to_string();
    let names: Vec<String> = match std::fs::read_dir(dir) {
        Ok(entries) => entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect(),
        Err(e) => return Diag::input(format!("cannot read the directory: {e}")).in_file(file),
    };
    let diag = Diag::input(format!("there is neither `{SINGLE}` nor `{INDEX}`")).in_file(file);
    let ends = |ends: &[&str]| names.iter().any(|n| ends.iter().any(|e| n.ends_with(e)));
    if ends(&[".bin", ".pt", ".pth"]) {
        return diag.help("pickled weights are not read; save the model as safetensors");
    }
    if ends(&[".gguf"]) {
        return diag.help("GGUF files are not read; use the safetensors checkpoint they were made from");
    }
    diag.help("a model is a directory with config.json, safetensors files and tokenizer.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_of_problems_are_cut() {
        let many = Diags((0..100).map(|i| Diag::input(format!("p{i}")).in_file("f")).collect());
        let cut = capped(many);
        assert_eq!((cut.0.len(), cut.0[40].message.as_str()), (41, "and 60 more problems of this kind"));
        assert_eq!(capped(Diags(vec![Diag::input("p")])).0.len(), 1);
    }
}
