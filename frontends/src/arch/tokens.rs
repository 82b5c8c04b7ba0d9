//! Tokens that start and end texts: where the files of a checkpoint say so.

use super::Facts;
use crate::config::Config;
use crate::json::shown;
use crate::tokenizer::Tokenizer;
use quantc_ir::diag::{Diags, Result};
use serde_json::Value;
use std::path::Path;

/// Fills in `bos` and `eos`.
///
/// What starts a text is what the tokenizer puts there, so `bos_token` of `tokenizer_config.json` decides when the file
/// has that key: null means that texts start with nothing, whatever ids stand in the other files. In all other cases, and
/// for `eos`, the first of `generation_config.json`, `config.json` and `tokenizer_config.json` that names a token is
/// taken. Ids beyond the vocabulary are left out with a note.
pub(crate) fn find(
    dir: &Path,
    config: &mut Config,
    facts: &mut Facts,
    notes: &mut Vec<String>,
) -> Result<(), Diags> {
    let optional = |name: &str| -> Result<Option<Config>, Diags> {
        let path = dir.join(name);
        if path.exists() { Ok(Some(Config::read(&path)?)) } else { Ok(None) }
    };
    let mut generation = optional("generation_config.json")?;
    let mut tokenizer = optional("tokenizer_config.json")?;
    let mut configs = [generation.as_mut(), Some(config)];
    let vocab = facts.vocab;

    let without_bos = tokenizer.as_ref().is_some_and(|t| t.has("bos_token") && t.get("bos_token").is_none());
    if !without_bos {
        facts.bos = match tokenizer.as_mut() {
            Some(from) => of_tokenizer(dir, from, "bos_token", vocab, notes)?,
            None => None,
        };
        if facts.bos.is_none() {
            facts.bos = of_configs(&mut configs, "bos_token_id", vocab, notes)?.first().copied();
        }
    }
    facts.eos = of_configs(&mut configs, "eos_token_id", vocab, notes)?;
    if let (true, Some(from)) = (facts.eos.is_empty(), tokenizer.as_mut()) {
        facts.eos = of_tokenizer(dir, from, "eos_token", vocab, notes)?.into_iter().collect();
    }
    Ok(())
}

/// The ids under `key` of the first configuration that has some.
fn of_configs(
    configs: &mut [Option<&mut Config>],
    key: &str,
    vocab: u32,
    notes: &mut Vec<String>,
) -> Result<Vec<u32>, Diags> {
    for from in configs.iter_mut().flatten() {
        let mut ids = from.ids(key);
        from.finish()?;
        let all = ids.len();
        ids.retain(|&id| id < vocab);
        if ids.len() < all {
            notes.push(format!("`{key}` names tokens beyond the vocabulary of {vocab}, which are left out"));
        }
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    Ok(vec![])
}

/// The id of the token whose text stands under `key` of the tokenizer's configuration `from`.
fn of_tokenizer(
    dir: &Path,
    from: &mut Config,
    key: &str,
    vocab: u32,
    notes: &mut Vec<String>,
) -> Result<Option<u32>, Diags> {
    // The token is given as its text, or as an object around it.
    let text = match from.get(key) {
        Some(Value::Object(token)) => token.get("content").and_then(Value::as_str).map(String::from),
        _ => from.text(key),
    };
    from.finish()?;
    let path = dir.join("tokenizer.json");
    let Some(text) = text.filter(|_| path.exists()) else { return Ok(None) };
    let id = Tokenizer::open(&path)?.token_id(&text).filter(|&id| id < vocab);
    if id.is_none() {
        notes.push(format!("`{key}` of the tokenizer is `{}`, which is not a token", shown(&text)));
    }
    Ok(id)
}
