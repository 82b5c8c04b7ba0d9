//! Tokens that start and end texts: where the files of a checkpoint say so.

use super::Facts;
use crate::config::Config;
use crate::json::shown;
use crate::tokenizer::Tokenizer;
use quantc_ir::diag::{Diags, Result};
use serde_json::Value;
use std::path::Path;

/// Fills in `bos` and `eos`: of `generation_config.json`, `config.json` and `tokenizer_config.json` the first that
/// names one. Ids beyond the vocabulary are left out with a note.
pub(super) fn find(
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
    let mut named = |key: &str, token_key: &str| -> Result<Vec<u32>, Diags> {
        for from in [generation.as_mut(), Some(&mut *config)].into_iter().flatten() {
            let mut ids = from.ids(key);
            from.finish()?;
            let all = ids.len();
            ids.retain(|&id| id < facts.vocab);
            if ids.len() < all {
                notes.push(format!(
                    "`{key}` names tokens beyond the vocabulary of {}, which are left out",
                    facts.vocab
                ));
            }
            if !ids.is_empty() {
                return Ok(ids);
            }
        }
        let Some(from) = tokenizer.as_mut() else { return Ok(vec![]) };
        // The token is given as its text, or as an object around it.
        let text = match from.get(token_key) {
            Some(Value::Object(token)) => token.get("content").and_then(Value::as_str).map(String::from),
            _ => from.text(token_key),
        };
        from.finish()?;
        let path = dir.join("tokenizer.json");
        let Some(text) = text.filter(|_| path.exists()) else { return Ok(vec![]) };
        let id = Tokenizer::open(&path)?.token_id(&text).filter(|&id| id < facts.vocab);
        if id.is_none() {
            notes.push(format!("`{token_key}` of the tokenizer is `{}`, which is not a token", shown(&text)));
        }
        Ok(id.into_iter().collect())
    };
    let bos = named("bos_token_id", "bos_token")?;
    let eos = named("eos_token_id", "eos_token")?;
    facts.bos = bos.first().copied();
    facts.eos = eos;
    Ok(())
}
