//! What a cache of codes costs: the module with it against the same module with a cache of floats, on a part of the text that
//! the engine was calibrated on.

use crate::failure::Outcome;
use crate::score::LogSoftmax;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::module::Module;
use quantc_ir::weights::{Recipe, Store};
use quantc_passes::calib::Calibrator;
use quantc_passes::calib::chain::Choice;
use quantc_passes::calib::pair::Pair;
use quantc_passes::calib::plain_cache::plain_cache;
use serde::{Deserialize, Serialize};

/// Windows of the text that are looked at, at most.
const WINDOWS: u32 = 4;

/// Tokens of one, at most.
const LENGTH: u64 = 256;

/// How far a cache of codes moves the distribution of the next token.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CacheCost {
    /// Where the text comes from, for people.
    pub data: String,
    /// Tokens of one window.
    pub length: usize,
    /// Tokens that were scored, over all windows.
    pub tokens: u64,
    /// Mean over them of KL(float cache || this one), in nats.
    pub kl_mean: f64,
    /// Perplexity with this cache.
    pub perplexity: f64,
    /// Perplexity with a cache of floats, with weights and activations rounded all the same.
    pub perplexity_float_cache: f64,
}

impl CacheCost {
    /// One line.
    pub fn line(&self) -> String {
        let CacheCost { kl_mean, perplexity, perplexity_float_cache, tokens, .. } = self;
        format!(
            "KL {kl_mean:.1e} against a cache of floats, perplexity {perplexity:.4} against \
             {perplexity_float_cache:.4}, on {tokens} tokens"
        )
    }
}

/// Measures it; `None` when the module has no cache of codes, and when the text has no window of its own. Kept in the store, so
/// that nothing runs when nothing has changed.
pub fn measure(module: &Module, store: &Store, calibrator: &Calibrator) -> Outcome<Option<CacheCost>> {
    let Some(plain) = plain_cache(module)? else { return Ok(None) };
    let context = module.fact_u64("context")?.unwrap_or(LENGTH);
    let (data, exec) = (calibrator.data(), calibrator.exec());
    let choice = Choice { first: 0, samples: WINDOWS, length: context.min(LENGTH) as u32, seed: 0 };
    // A text that is too short for one of these windows was long enough for shorter samples.
    let Ok(samples) = data.samples(choice) else { return Ok(None) };
    let pair = Pair::new(&plain, module, store, samples)?;
    let recipe =
        Recipe { step: "cache cost", version: 1, options: String::new(), inputs: vec![pair.key(exec)] };
    let blobs = store.derive(&recipe, 1, &mut |out| {
        let mut cost = CacheCost {
            data: data.name.clone(),
            length: choice.length as usize,
            tokens: 0,
            kl_mean: 0.0,
            perplexity: 0.0,
            perplexity_float_cache: 0.0,
        };
        pair.run(exec, store, &mut |window, plain, codes| add(&mut cost, window, plain, codes))?;
        let tokens = cost.tokens.max(1) as f64;
        cost.kl_mean /= tokens;
        cost.perplexity = (cost.perplexity / tokens).exp();
        cost.perplexity_float_cache = (cost.perplexity_float_cache / tokens).exp();
        out[0].write(&serde_json::to_vec(&cost).map_err(|e| Diag::bug(format!("what a cache costs: {e}")))?)
    })?;
    let cost = serde_json::from_slice(&store.read_blob(blobs[0])?)
        .map_err(|e| Diag::input(format!("what the store keeps of a cache's cost is damaged: {e}")))?;
    Ok(Some(cost))
}

/// Adds the divergence and both logarithmic losses of a window.
fn add(cost: &mut CacheCost, window: &[u32], plain: &[f32], codes: &[f32]) -> Result<()> {
    let width = plain.len() / window.len().max(1);
    for (i, &next) in window.iter().skip(1).enumerate() {
        let row = |logits| -> Result<LogSoftmax<'_>> {
            let logits: &[f32] = logits;
            let missing =
                || Diag::bug(format!("a call of {} tokens has too few rows of results", window.len()));
            let row = LogSoftmax::new(logits.get(i * width..(i + 1) * width).ok_or_else(missing)?);
            row.finite().ok_or_else(|| Diag::input("the model's logits are not numbers on this text"))
        };
        let (plain, codes) = (row(plain)?, row(codes)?);
        cost.kl_mean += plain.kl(&codes);
        cost.perplexity -= codes.at(next as usize);
        cost.perplexity_float_cache -= plain.at(next as usize);
        cost.tokens += 1;
    }
    Ok(())
}
